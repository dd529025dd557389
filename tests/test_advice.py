# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the shell says to do next: of errors that there are, and nothing where nothing is known."""

import ast
import functools
import pathlib

import libvirt
import pytest

from virtbackup import errors
from virtbackup.tools import advice, virsh_backup

PACKAGE = pathlib.Path(errors.__file__).parent
SYSTEMS = {"No such file or directory", "Connection refused", "Permission denied",
           "Address already in use", "No space left on device", "Disk quota exceeded",
           "File too large", "Cannot assign requested address",
           "address resolution failed",
           "fd passing is not supported by this connection"}  # fmt: skip
"""Words of the operating system's, of QEMU's and of libvirt's, which stand nowhere in the
package."""


@functools.cache
def _literals() -> set[str]:
    """The texts in the package, of f-strings the parts, but for those of the advice itself."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "advice.py":
            nodes = ast.walk(ast.parse(path.read_text()))
            found |= {n.value for n in nodes if isinstance(n, ast.Constant)
                      and isinstance(n.value, str)}  # fmt: skip
    return found


@pytest.mark.parametrize("known", advice.KNOWN, ids=lambda known: known.advice)
def test_what_is_known_is_an_error_that_there_is(known: advice.Known) -> None:
    """Its words stand in the source, or it would be about nothing once they change there."""
    assert known.words or known.code
    for words in set(known.words) - SYSTEMS:
        assert any(words in literal for literal in _literals()), words


@pytest.mark.parametrize("known", advice.KNOWN, ids=lambda known: known.advice)
def test_the_commands_and_options_that_are_named_are_there(known: advice.Known) -> None:
    names = {command.name for command in virsh_backup.TABLE.commands}
    options = {f"--{o.name}" for command in virsh_backup.TABLE.commands for o in command.options}
    named = [word.strip("',;:?()") for word in known.advice.split()]
    assert {w for w in named if w.startswith(("backup-", "branch-"))} <= names
    assert {w for w in named if w.startswith("--")} <= options | {"--listen"}  # virtbackupd's


@pytest.mark.parametrize("known", advice.KNOWN, ids=lambda known: known.advice)
def test_no_advice_is_hidden_by_one_before_it(known: advice.Known) -> None:
    code = known.code or libvirt.VIR_ERR_OPERATION_FAILED
    assert advice.advice(errors.Error(code, " x ".join(known.words))) == known.advice


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (
            libvirt.VIR_ERR_XML_ERROR,
            "a name or a path holds characters that XML cannot carry",
            "Take names and paths in UTF-8 without control characters",
        ),
        (
            libvirt.VIR_ERR_SYSTEM_ERROR,
            "failed to connect to monitor socket '/q': Permission denied",
            "Be the user that QEMU runs as, or root",
        ),
        (
            libvirt.VIR_ERR_INTERNAL_ERROR,
            "internal error: disk 'vda': unable to execute QEMU command 'add-fd': No file"
            " descriptor supplied via SCM_RIGHTS",
            "What passes the monitor on, as socat does, passes no descriptors: take QEMU's own"
            " socket",
        ),
        (
            libvirt.VIR_ERR_OPERATION_INVALID,
            "Requested operation is not valid: another backup job is already running ('j'), but"
            " there is no status of it in '/r'; if nobody owns it, backup-cleanup ends it",
            "It may be another user's, who then has to stop it",
        ),
        (
            libvirt.VIR_ERR_OPERATION_INVALID,
            "Requested operation is not valid: another backup job is already running: libvirt's"
            " own (virsh domjobabort ends it)",
            "'virsh domjobinfo' shows how far it is",  # our commands know nothing of it
        ),
        (
            libvirt.VIR_ERR_OPERATION_INVALID,
            "Requested operation is not valid: domain is not running",
            "Start the domain, which may stay paused: what does not run can be copied as it is",
        ),
        (
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            "unsupported configuration: export address must be specifed: expected an <address>"
            " element (line 1, element <domainbackup>)",
            "'backup-start-as' with --print-xml prints a document to begin with",
        ),
        (
            libvirt.VIR_ERR_SYSTEM_ERROR,
            "cannot write /b/vda.raw.partial: Disk quota exceeded",
            "Make room there, or take another place",
        ),
        (
            libvirt.VIR_ERR_OPERATION_FAILED,
            "operation failed: the backup is not good: disk 'vda': No space left on device",
            "It has ended: throw away what was read of it, see to the reason, and take another one",
        ),
        (
            libvirt.VIR_ERR_OPERATION_INVALID,
            "Requested operation is not valid: /b/manifest.json.partial exists already, as what a"
            " killed pull leaves",
            "Remove the files called *.partial, which no restore writes now, or pull elsewhere",
        ),
        (
            libvirt.VIR_ERR_OPERATION_FAILED,
            "operation failed: cannot listen on '/x/nbd.sock': Failed to bind socket to"
            " /x/nbd.sock: Permission denied",
            "QEMU makes the socket: take a directory that its user may write to",
        ),
        (
            libvirt.VIR_ERR_OPERATION_FAILED,
            "operation failed: cannot listen on 127.0.0.1:80: Failed to bind socket: Permission"
            " denied (QEMU runs as user x)",
            "Only root's QEMU has the ports below 1024: take a higher one, or --autoport",
        ),
        (
            libvirt.VIR_ERR_RPC,
            "message of 1312965709 bytes, not from 28 to 33554436",
            "What listens there is another server: a QEMU is reached by qmp:///PATH of its QMP"
            " socket",
        ),
        (libvirt.VIR_ERR_OPERATION_FAILED, "operation failed: no backup job is running", None),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "internal error", None),
    ],
)
def test_advice(code: int, text: str, expected: str | None) -> None:
    assert advice.advice(errors.Error(code, text)) == expected
