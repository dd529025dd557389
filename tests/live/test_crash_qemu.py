# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU is killed before and after every QMP command; a clear error, nothing left, and a new QEMU
on the same monitor is backed up as if nothing had been."""

import pathlib

import pytest

from tests import conftest, waiting
from tests.live import crashing, foreign, machines, proxy
from virtbackup.tools import manifest


@pytest.mark.usefixtures("unknown_qemu")
@pytest.mark.parametrize("fault", ["kill-qemu-before", "kill-qemu-after"])
@pytest.mark.parametrize("call", ["start", "stop", "pull"])
def test_qemu_killed_at_every_command(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    call: crashing.Call,
    fault: proxy.Fault,
) -> None:
    machines.image(tmp_path / "a.qcow2", crashing.SIZE, "qcow2")
    machines.image(tmp_path / "b.raw", crashing.SIZE)
    before: set[str] = set()
    wrong: list[str] = []
    # Before one command and after it, for some of them, unless there is time for each.
    for number in range(0, 200, 1 if conftest.long() else 9 if call == "pull" else 7):
        with crashing.machine_behind_proxy(tmp_path) as (machine, between):
            start_and_stop(machine, between, tmp_path, wrong)
            before = before or crashing.files(tmp_path, state_dir)
            if call == "stop":
                assert crashing.run(between, tmp_path, "start")[0] == 0
            between.arm(number, fault)
            status, said = crashing.run(between, tmp_path, call)
            where = f"{fault} {number} {between.spoilt}: {said}"
            if between.spoilt is None or (call == "start" and status == 0):
                # A started backup may lose its QEMU while the program still looks at it.
                assert status == 0, said
                break
            machine.process.wait(waiting.DEADLINE)
        if status == 0:
            wrong.append(f"called good: {where}")
        # A stop that never came to see the status leaves it to the next start.
        left = crashing.files(tmp_path, state_dir) ^ before
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
        status, said = crashing.run(between, directory, call)
        if status != 0:
            wrong.append(f"{call} after it: {said}")
    wrong += foreign.problems(machine)
    assert machine.state() == state
