# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command that compares our engine with libvirt's own; ``compare`` does the work."""

import pathlib
import urllib.parse
from typing import Any

from virtbackup.tools import virsh_connection, vsh


def _compare(shell: virsh_connection.Shell, args: vsh.Args) -> int:
    import libvirt

    import virtbackup
    from virtbackup.tools import compare

    uri = shell.control.uri
    if not uri.startswith("qemu"):
        raise vsh.Failure(f"only a domain of libvirt's can be backed up by both, not of '{uri}'")
    document = virsh_connection.read_document(args.text("xmlfile"))
    rounds = args.number("rounds") or 3
    if not 1 <= rounds <= 1000:
        raise vsh.UsageError("--rounds is a number from 1 to 1000")
    log = args.optional("log")
    ours = virsh_connection.domain(shell, args)
    with virtbackup.open(_with_native(uri)) as native:
        theirs = native.lookupByUUIDString(ours.UUIDString())
        guest = libvirt.open(_plain(uri))
        try:
            found = compare.compare(
                ours,
                theirs,
                guest.lookupByUUIDString(ours.UUIDString()),
                document,
                rounds,
                None if log is None else pathlib.Path(log),
            )
        finally:
            guest.close()
    facts = found.facts()
    if args.flag("json"):
        virsh_connection.print_json(shell, {"domain": ours.name(), "rounds": rounds, **facts})
    else:
        _print(shell, facts)
    return vsh.FAILED if found.agree is False else vsh.DONE


def _options(uri: str) -> tuple[urllib.parse.SplitResult, list[tuple[str, str]]]:
    parts = urllib.parse.urlsplit(uri)
    options = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    return parts, [pair for pair in options if pair[0] not in ("engine", "native")]


def _with_native(uri: str) -> str:
    parts, options = _options(uri)
    query = urllib.parse.urlencode([*options, ("native", "yes")])
    return urllib.parse.urlunsplit(parts._replace(query=query))


def _plain(uri: str) -> str:
    parts, options = _options(uri)
    return urllib.parse.urlunsplit(parts._replace(query=urllib.parse.urlencode(options)))


_ROWS = (
    ("Start", "start"),
    ("Read", "read"),
    ("Stop", "stop"),
    ("Guest's write", "write_latency"),
)


def _print(shell: virsh_connection.Shell, facts: dict[str, Any]) -> None:
    engines = facts["engines"]
    rows = [
        (label, *(_milliseconds(told[key]) for told in engines.values())) for label, key in _ROWS
    ]
    for label, key in (("Commands", "commands"), ("Bytes said", "bytes_said")):
        rows.append((label, *(_number(told[key]) for told in engines.values())))
    shell.print_table(("Median", *engines), rows)
    agree = facts["agree"]
    words = {
        True: "Both showed the same bytes",
        False: "The engines showed DIFFERENT bytes",
        None: "The guest wrote meanwhile: whether the bytes agree cannot be told",
    }
    shell.print(words[agree])


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


COMPARE = vsh.Command(
    "compare", "backup", "Compare our engine with libvirt's own on a domain",
    "Make the same pull backup by our engine and by libvirt's own (virDomainBackupBegin), several\n"
    "times in turn, and tell what each costs: start and stop, the guest's own writes meanwhile,\n"
    "what was said to QEMU (libvirt's by its debug log), and whether the exports showed the same\n"
    "bytes. Exit status 1 when they did not.",
    (
        virsh_connection.DOMAIN,
        vsh.Option(
            "xmlfile", vsh.Kind.DATA, "domainbackup XML; - is standard input",
            required=True, completer=vsh.complete_files,
        ),
        vsh.Option("rounds", vsh.Kind.INT, "backups by each engine (default 3)"),
        vsh.Option(
            "log", vsh.Kind.STRING, "libvirtd's debug log with its monitors' messages",
            completer=vsh.complete_files,
        ),
        virsh_connection.JSON,
    ),
    _compare,
)  # fmt: skip
