# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU is killed before and after every QMP command; a clear error, nothing left, and a new QEMU
on the same monitor is backed up as if nothing had been."""

import contextlib
import io
import pathlib
import time
from collections.abc import Iterator
from typing import Literal

import pytest

from tests import conftest
from tests.live import foreign, machines, proxy, test_undo
from virtbackup.tools import manifest, virsh_backup

SIZE = 4 << 20
Call = Literal["start", "stop", "pull"]
LONGEST = 15.0
"""Seconds that a call may take whose QEMU has died."""


@contextlib.contextmanager
def machine_behind_proxy(
    directory: pathlib.Path,
) -> Iterator[tuple[machines.Machine, proxy.Proxy]]:
    """A QEMU with the images in DIRECTORY and foreign things; clients of the proxy see its pid."""
    for name in ("qmp.sock", "probe.sock", "proxy.sock"):
        (directory / name).unlink(missing_ok=True)
    between = proxy.Proxy(directory, directory / "qmp.sock", start=False)
    disks = machines.two_disks_of(directory)
    with machines.qemu(directory, "-name", "vm", *disks, before_exec=between.listen) as machine:
        between.kill_qemu = machine.kill
        between.start()
        foreign.add(machine)
        try:
            yield machine, between
        finally:
            between.close()


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


def files(directory: pathlib.Path, state: pathlib.Path) -> set[str]:
    """Every file of ours, wherever it may be; private directories of pulls are in STATE."""
    places = [directory / "out", state, *state.glob("private-*")]
    found = test_undo.files(directory, state) - {str(directory / "out")}
    there = [path for place in places if place.exists() for path in place.iterdir()]
    return found | {str(path) for path in there if path.suffix not in test_undo.KEPT}


@pytest.mark.parametrize("fault", ["kill-qemu-before", "kill-qemu-after"])
@pytest.mark.parametrize("call", ["start", "stop", "pull"])
def test_qemu_killed_at_every_command(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    call: Call,
    fault: proxy.Fault,
) -> None:
    machines.image(tmp_path / "a.qcow2", SIZE, "qcow2")
    machines.image(tmp_path / "b.raw", SIZE)
    before: set[str] = set()
    wrong: list[str] = []
    # Between two commands is after the one and before the other: unless there is time, once.
    for number in range(0, 200, 1 if conftest.long() or call == "start" else 2):
        with machine_behind_proxy(tmp_path) as (machine, between):
            start_and_stop(machine, between, tmp_path, wrong)
            before = before or files(tmp_path, state_dir)
            if call == "stop":
                assert run(between, tmp_path, "start")[0] == 0
            between.arm(number, fault)
            status, said = run(between, tmp_path, call)
            where = f"{fault} {number} {between.spoilt}: {said}"
            if between.spoilt is None or (call == "start" and status == 0):
                # A started backup may lose its QEMU while the program still looks at it.
                assert status == 0, said
                break
            machine.process.wait(10)
        if status == 0:
            wrong.append(f"called good: {where}")
        # A stop that never came to see the status leaves it to the next start.
        left = files(tmp_path, state_dir) ^ before
        if left and not (call == "stop" and "backup is not good" not in said):
            wrong.append(f"left {left}: {where}")
        if foreign.problems(None):
            wrong.append(f"{foreign.problems(None)}: {where}")
    assert wrong == []
    assert number > 5
    if call == "pull":
        assert manifest.read(tmp_path / "out").disks


def start_and_stop(
    machine: machines.Machine, between: proxy.Proxy, directory: pathlib.Path, wrong: list[str]
) -> None:
    """A backup of a QEMU on the sockets of one that was killed, by the next start on its own."""
    state = machine.state()
    for call in ("start", "stop"):
        status, said = run(between, directory, call)
        if status != 0:
            wrong.append(f"{call} after it: {said}")
    wrong += foreign.problems(machine)
    assert machine.state() == state
