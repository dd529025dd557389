# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command that compares our engine with libvirt's own; ``compare`` does the work."""

import contextlib
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
    given = args.number("rounds")
    rounds = 3 if given is None else given
    if not 1 <= rounds <= 1000:
        raise vsh.UsageError("--rounds is a number from 1 to 1000")
    log = args.optional("log")
    domain = virsh_connection.domain(shell, args)
    # Connections of its own: the shell's has a trace of the user's, and one engine only.
    with (
        virtbackup.open(_uri(uri)) as own,
        virtbackup.open(_uri(uri, native="yes")) as native,
        contextlib.closing(libvirt.open(_uri(uri, engine=None))) as plain,
    ):
        found = compare.compare(
            own.lookupByUUIDString(domain.UUIDString()),
            native.lookupByUUIDString(domain.UUIDString()),
            plain.lookupByUUIDString(domain.UUIDString()),
            document,
            rounds,
            None if log is None else virsh_connection.local_path(log),
        )
    facts = found.facts()
    if args.flag("json"):
        shell.print_json({"domain": domain.name(), "rounds": rounds, **facts})
    else:
        _print(shell, facts)
    return vsh.FAILED if found.agree is False else vsh.DONE


def _uri(uri: str, **options: str | None) -> str:
    """URI with OPTIONS in place of those it has of these names, and of none of libvirt's own
    engine; None takes one out."""
    parts = urllib.parse.urlsplit(uri)
    given = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    wanted = {**given, "native": None, **options}
    query = urllib.parse.urlencode({key: value for key, value in wanted.items() if value})
    return urllib.parse.urlunsplit(parts._replace(query=query))


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
