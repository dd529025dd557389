# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands about QEMU's monitor itself, for those who test what is said on it.

They need a driver below libvirt's API, so unlike all other tools this one imports ``qemu``.
"""

import os
import pathlib
from typing import TYPE_CHECKING

from virtbackup.tools import virsh_connection, vsh

if TYPE_CHECKING:
    from virtbackup.qemu import recorder

GROUP = vsh.Group("monitor", "QEMU monitor")


def _record(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.qemu import recording

    path = args.text("file")
    if path != "-" and os.path.lexists(path):
        raise vsh.Failure(f"file '{path}' exists")
    found = _recorder(shell.control).record()
    text = recording.format(found.lines)
    if path == "-":
        shell.print_document(text)
        return
    _write_new(path, text)
    shell.extra(f"Monitor recorded to {path}")


def _recorder(control: virsh_connection.Control) -> "recorder.Recorder":
    """Of the QEMU at the shell's URI. Errors: Failure where there cannot be one."""
    from virtbackup.qemu import driver, recorder

    if not control.uri.startswith("qmp:"):
        raise vsh.Failure(f"only a QEMU at a qmp:// URI can be recorded, not '{control.uri}'")
    if control.readonly:
        raise vsh.Failure("operation forbidden: read only access prevents monitor-record")
    path, engine = driver.parse_uri(control.uri)
    return recorder.Recorder(path, engine, control.trace)


def _write_new(path: str, text: str) -> None:
    """Write TEXT to a file that is new; where that fails, there is none."""
    try:
        file = pathlib.Path(path).open("x", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise vsh.Failure(f"Failed to create file '{path}': {error.strerror}") from error
    try:
        with file:
            file.write(text)
    except BaseException as error:
        pathlib.Path(path).unlink()
        if isinstance(error, OSError):
            raise vsh.Failure(f"Failed to write file '{path}': {error.strerror}") from error
        raise


COMMANDS = (
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
)  # fmt: skip
