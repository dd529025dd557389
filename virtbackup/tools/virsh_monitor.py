# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands about QEMU's monitor itself, for those who test what is said on it.

They need a driver below libvirt's API, so unlike all other tools this one imports ``qemu``.
"""

import contextlib
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from virtbackup.tools import virsh_connection, vsh

if TYPE_CHECKING:
    from virtbackup.qemu import recorder, recording, traffic

GROUP = vsh.Group("qmp", "QEMU monitor")
MAX_FILE = 256 << 20
"""Bytes of what is compared."""


def _record(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.qemu import recording
    from virtbackup.tools import interrupt

    path = args.text("file")
    if path != "-" and os.path.lexists(virsh_connection.local_path(path)):
        raise vsh.Failure(f"file '{path}' exists")
    recorder = _recorder(shell.control)

    def record() -> str:
        with interrupt.held():
            return recording.format(recorder.record().lines)

    if path == "-":
        shell.print_document(record())
        return
    _write_new(path, record)
    shell.extra(f"Monitor recorded to {path}")


def _recorder(control: virsh_connection.Control) -> "recorder.Recorder":
    """Of the QEMU at the shell's URI. Errors: Failure where there cannot be one."""
    from virtbackup.qemu import driver, recorder

    if not control.uri.lower().startswith("qmp:"):
        raise vsh.Failure(f"only a QEMU at a qmp:// URI can be recorded, not '{control.uri}'")
    if control.readonly:
        raise vsh.Failure("operation forbidden: read only access prevents monitor-record")
    path, engine, _ = driver.parse_uri(control.uri)
    return recorder.Recorder(path, engine, control.trace)


def _write_new(path: str, text: Callable[[], str]) -> None:
    """Write what TEXT gives to a file that is new; where that fails, there is none."""
    try:
        file = pathlib.Path(path).open("x", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise vsh.Failure(f"Failed to create file '{path}': {error.strerror}") from error
    try:
        with file:
            file.write(text())
    except BaseException as error:
        pathlib.Path(path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise vsh.Failure(f"Failed to write file '{path}': {error.strerror}") from error
        raise


def _replay(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup import config
    from virtbackup.test import fake_server, test_driver
    from virtbackup.tools import interrupt

    given, faults = args.optional("socket"), args.optional("faults")
    path = None if given is None else virsh_connection.local_path(given)
    script = test_driver.load(
        virsh_connection.local_path(args.text("file")),
        None if faults is None else virsh_connection.local_path(faults),
    )
    with contextlib.ExitStack() as stack:
        if path is None:
            path = config.private_directory(stack) / "qmp.sock"
        try:
            server = fake_server.Server(path.absolute(), script.recorded, script.rules)
        except OSError as error:
            raise vsh.Failure(f"cannot listen on '{path}': {error.strerror or error}") from error
        except ValueError as error:
            raise vsh.Failure(f"'{args.text('file')}': {error}") from error
        stack.enter_context(server)
        stack.enter_context(interrupt.is_the_end())
        if args.flag("json"):
            uri = "qmp://" + urllib.parse.quote(os.fsencode(server.path))
            address = virsh_connection.unix_facts(str(server.path))
            shell.print_json({"address": address, "uri": uri})
        else:
            shell.print(str(server.path))
        vsh.flush()
        while not server.ended.wait(interrupt.LOOK_AGAIN):
            pass


def _diff(shell: virsh_connection.Shell, args: vsh.Args) -> int:
    from virtbackup.qemu import traffic

    args.exclusive("all", "changes")
    paths = args.text("first"), args.text("second")
    lines = [_traffic(path, args.optional("monitor")) for path in paths]
    if args.flag("changes"):
        lines = [traffic.without_queries(said) for said in lines]
    try:
        first, second = (
            traffic.comparable(said, args.flag("all"), args.flag("names")) for said in lines
        )
        if args.flag("json"):
            names = {"first": paths[0], "second": paths[1], "same": first == second}
            hunks = traffic.hunks(first, second)
            facts = [_hunk_facts(hunk, args.flag("all")) for hunk in hunks]
            shell.print_json({**names, "differences": facts})
    except RecursionError as error:
        raise _trouble(f"'{paths[0]}' or '{paths[1]}' is nested too deeply") from error
    if not args.flag("json"):
        for line in traffic.diff(first, second, paths):
            shell.print(line)
    return vsh.DONE if first == second else vsh.FAILED


def _hunk_facts(hunk: "traffic.Hunk", marked: bool) -> dict[str, object]:
    """For JSON. MARKED: the messages have their directions."""
    import json

    messages = []
    for side, text in hunk.messages:
        direction, said = text.split(" ", 1) if marked else ("->", text)
        messages.append({"in": side, "direction": direction, "message": json.loads(said)})
    return {"first_number": hunk.first, "second_number": hunk.second, "messages": messages}


def _traffic(path: str, monitor: str | None) -> "Sequence[recording.Line]":
    """What was said, by the file at PATH. Errors: Failure: there is nothing to compare."""
    from virtbackup.qemu import traffic

    local = virsh_connection.local_path(path, vsh.USAGE)
    try:
        with local.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise _trouble(f"file '{path}' is larger than {MAX_FILE} bytes")
        # A log may hold anything that a guest or a file was called.
        return traffic.parse(data.decode(errors="replace").replace("\r\n", "\n"), monitor)
    except OSError as error:
        raise _trouble(f"Failed to open file '{path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _trouble(f"file '{path}': {error}") from error


def _trouble(text: str) -> vsh.Failure:
    """Not to be taken for a difference, whose status is FAILED (diff(1))."""
    return vsh.Failure(text, status=vsh.USAGE)


COMMANDS = (
    vsh.Command(
        "monitor-diff", GROUP.keyword, "Compare what was said on two monitors",
        "Compare the commands in two files, each a recording, a trace (--trace) or a debug log of\n"
        "libvirtd, leaving out ids, times and numbers of descriptors. Nodes, jobs, exports and\n"
        "files are called by the order of their first use. Exit status 0: no difference, 1: some,\n"
        "2: trouble.",
        (
            vsh.Option(
                "first", vsh.Kind.DATA, "the file to compare", required=True,
                completer=vsh.complete_files,
            ),
            vsh.Option(
                "second", vsh.Kind.DATA, "the file to compare it with", required=True,
                completer=vsh.complete_files,
            ),
            vsh.Option(
                "monitor", vsh.Kind.STRING, "the monitor's address in a log of several"
            ),
            vsh.Option("all", vsh.Kind.BOOL, "compare replies and events, too"),
            vsh.Option("changes", vsh.Kind.BOOL, "compare only commands that change something"),
            vsh.Option("names", vsh.Kind.BOOL, "compare names as they are"),
            virsh_connection.JSON,
        ),
        _diff,
    ),
    vsh.Command(
        "monitor-record", GROUP.keyword, "Record what a QEMU says on its monitor",
        "Ask the QEMU at a qmp:// URI for all it tells of itself and its disks, take one backup\n"
        "of them, and write what was said: a JSON object a line, without what differs from one\n"
        "recording to the next. The guest is as before.",
        (
            vsh.Option(
                "file", vsh.Kind.DATA, "file to be made; - is standard output",
                required=True, completer=vsh.complete_files,
            ),
        ),
        _record,
    ),
    vsh.Command(
        "monitor-replay", GROUP.keyword, "Serve a recording on a QMP socket",
        "Listen on a QMP socket as the QEMU that was recorded, for any QMP client, and print the\n"
        "socket's path. Nodes, jobs, exports and bitmaps are simulated. Ends when interrupted, or\n"
        "when told to quit on the monitor.",
        (
            vsh.Option(
                "file", vsh.Kind.DATA, "the recording", required=True,
                completer=vsh.complete_files,
            ),
            vsh.Option(
                "socket", vsh.Kind.STRING, "where to listen (default: a private directory)",
                completer=vsh.complete_files,
            ),
            vsh.Option(
                "faults", vsh.Kind.STRING, "faults to have, a JSON file",
                completer=vsh.complete_files,
            ),
            virsh_connection.JSON,
        ),
        _replay,
    ),
)  # fmt: skip
