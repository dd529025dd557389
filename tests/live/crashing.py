# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a start or a stop that came to a bad end may have left, and what users do about it."""

import contextlib
import io
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Literal

import libvirt

import virtbackup
from tests.live import foreign, machines, proxy
from virtbackup.tools import virsh_backup

SIZE = 4 << 20
Call = Literal["start", "stop", "pull"]
LONGEST = 50.0
"""Seconds that a call may take whose QEMU has died."""
KEPT = (".lock", ".capabilities")
"""What stays in the state directory: the lock of a monitor, and what is known of a running QEMU."""


def files(directory: pathlib.Path, state: pathlib.Path) -> set[str]:
    """Every file that could have been left, wherever it may be, but for what is KEPT; private
    directories of pulls are in STATE."""
    scratch = pathlib.Path(os.environ["VIRTBACKUP_SCRATCH_DIR"])
    out = directory / "out"
    places = [directory, out, state, *state.glob("private-*"), scratch]
    found = [path for place in places if place.exists() for path in place.iterdir() if path != out]
    return {str(path) for path in found if path.suffix not in KEPT}


def document(directory: pathlib.Path, named: bool) -> str:
    source = f'<source file="{directory}/scratch.qcow2"/>' if named else ""
    return (
        f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/>'
        f'<disks><disk name="vda">{source}</disk></disks></domainbackup>'
    )


def finish(dom: virtbackup.Domain) -> None:
    """What a user does whose stop failed: again, and where there is no backup to stop, clean up."""
    try:
        dom.backupStop()
    except virtbackup.Error as failure:
        assert failure.get_error_code() in (
            libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
            libvirt.VIR_ERR_OPERATION_FAILED,
        )
    assert dom.backupCleanup() == []


def start_after_crash(dom: virtbackup.Domain, xml: str) -> None:
    """The next start does its own cleaning; where the killed one had come to run, it says so."""
    try:
        dom.backupStart(xml)
    except virtbackup.Error as failure:
        assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    dom.backupStop()


# --- by the shell ---------------------------------------------------------------------------------


@contextlib.contextmanager
def machine_behind_proxy(
    directory: pathlib.Path,
) -> Iterator[tuple[machines.Machine, proxy.Proxy]]:
    """A QEMU with the images in DIRECTORY and foreign things; clients of the proxy see its pid."""
    disks = machines.two_disks_of(directory)
    with proxy.taken_for_qemu(directory, *disks) as (machine, between):
        foreign.add(machine)
        yield machine, between


def program(uri: str, *argv: str) -> tuple[int, str]:
    """Run virsh-backup; its exit status and what it says, which is checked to be orderly."""
    out, err = io.StringIO(), io.StringIO()
    begin = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = virsh_backup.main(["-c", uri, *argv])
    assert time.monotonic() - begin < LONGEST, argv
    said = err.getvalue()
    assert "Traceback" not in said
    if status:
        assert status == 1, said
        assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, said
    return status, said + out.getvalue()


def run(between: proxy.Proxy, directory: pathlib.Path, call: Call) -> tuple[int, str]:
    if call == "pull":
        return program(between.uri, "backup-pull", "vm", str(directory / "out"))
    if call == "stop":
        return program(between.uri, "backup-stop", "vm")
    argv = ["--unix", f"{directory}/nbd.sock", "--disk", f"vda,source={directory}/scratch.qcow2"]
    return program(between.uri, "backup-start-as", "vm", *argv)
