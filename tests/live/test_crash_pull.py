# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pull is killed before and after every QMP command, and while it copies; whoever comes next
removes all that is ours and says so, and what is somebody else's stays."""

import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests import conftest
from tests.live import callers, crashing, foreign, machines, proxy
from virtbackup.nbd import copy
from virtbackup.tools import manifest, pull

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")


def ours(machine: machines.Machine) -> set[str]:
    """What of ours is in QEMU and has to be removed by a command of its own (a fd set does not)."""
    probe = machine.probe
    names = {f"export '{e['id']}'" for e in probe("query-block-exports")}
    names |= {f"job '{job['id']}'" for job in probe("query-jobs")}
    # Not query-named-block-nodes, which kills QEMU 5.2 while a job is there that has ended.
    graph = probe("x-debug-query-block-graph")["nodes"]
    names |= {f"node '{node['name']}'" for node in graph if node["type"] == "block-driver"}
    mine = re.compile(r"(export|job|node) 'virtbackup-[0-9a-f]{8}-\d+(-scr|-acc)?'")
    return set(filter(mine.fullmatch, names))


def is_whole(directory: pathlib.Path) -> bool:
    """Whether there is a good backup in DIRECTORY; without one, every file there is partial."""
    files = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if all(name.endswith(pull.PARTIAL) for name in files):
        return False
    if manifest.FILE not in files:
        # Killed while the files of a backup that is good get their names.
        assert manifest.FILE + pull.PARTIAL in files
        return True
    made = manifest.read(directory)
    assert files == {manifest.FILE, *(disk.file for disk in made.disks)}
    for disk in made.disks:
        found = copy.checksum_of_file(directory / disk.file, "qcow2", disk.size)
        assert found == disk.checksum.value
    return True


def empty(directory: pathlib.Path) -> None:
    """Remove what a killed pull left where the user told it to, and the user may look at it."""
    for path in directory.iterdir() if directory.exists() else ():
        path.unlink()


@pytest.mark.parametrize("fault", ["kill-before", "kill-after"])
def test_killed_at_every_command(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    fault: proxy.Fault,
) -> None:
    """After every other one backup-cleanup comes, after the rest the next backup-start."""
    machines.image(tmp_path / "a.qcow2", crashing.SIZE, "qcow2")
    machines.image(tmp_path / "b.raw", crashing.SIZE)
    out = tmp_path / "out"
    wrong: list[str] = []
    with (
        crashing.machine_behind_proxy(tmp_path) as (machine, between),
        callers.Caller() as caller,
    ):
        state = machine.state()
        before = crashing.files(tmp_path, state_dir)
        pull_vm = ("virsh-backup", "-c", between.uri, "backup-pull", "vm", str(out))
        # Before one command and after it, for some of them, unless there is time for each.
        step = 1 if conftest.long() else 7
        for number in range(0, 200, step):
            status = caller.spoilt(between, (number, fault), *pull_vm)
            where = f"{fault} {number} {between.spoilt}"
            if between.spoilt is None:
                assert status == 0
                break
            assert status != 0, where
            between.disarm()
            is_whole(out)
            if number // step % 2 == (fault == "kill-after"):
                wrong += [f"{problem}: {where}" for problem in clean(machine, between, state_dir)]
            else:
                for call in ("start", "stop"):
                    assert crashing.run(between, tmp_path, call)[0] == 0, where
            empty(out)
            left = crashing.files(tmp_path, state_dir) ^ before
            wrong += [f"{what}: {where}" for what in sorted(left)]
            wrong += [f"{what}: {where}" for what in foreign.problems(machine)]
            assert machine.state() == state, where
            before |= left
    assert wrong == []
    assert number > 50
    assert is_whole(out)


def clean(machine: machines.Machine, between: proxy.Proxy, state: pathlib.Path) -> list[str]:
    """Let backup-cleanup do it; what it removed and did not say."""
    # Whoever is served has the command of a client before him behind him.
    assert crashing.program(between.uri, "list")[0] == 0
    there, server = ours(machine), any(state.glob("private-*/nbd.sock"))
    status, said = crashing.program(between.uri, "backup-cleanup", "vm")
    assert status == 0, said
    lines = set(said.splitlines())
    silent = there - lines
    assert ("NBD server" in lines) == server, said
    again = crashing.program(between.uri, "backup-cleanup", "vm")
    assert again == (0, "Nothing to clean up\n")
    return [f"not told: {what}" for what in sorted(silent)]


_KILLED_WHILE_COPYING = """
import os, pathlib, signal, sys
import virtbackup
from virtbackup.tools import pull
class Progress:
    def start(self, index, size):
        self.advance(index, size)
    def advance(self, index, count):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
left = int(sys.argv[3])
with virtbackup.open(sys.argv[1]) as connection:
    pull.pull(connection.lookupByID(1), pathlib.Path(sys.argv[2]), progress=Progress())
"""


def test_killed_while_it_copies(tmp_path: pathlib.Path, state_dir: pathlib.Path) -> None:
    machines.image(tmp_path / "a.qcow2", crashing.SIZE, "qcow2")
    machines.image(tmp_path / "b.raw", crashing.SIZE)
    out = tmp_path / "out"
    with crashing.machine_behind_proxy(tmp_path) as (machine, between):
        machine.io("sdb", "write -P 3 0 4M")
        state = machine.state()
        before = crashing.files(tmp_path, state_dir)
        for advance in range(3):
            argv = [sys.executable, "-c", _KILLED_WHILE_COPYING, between.uri, str(out)]
            killed = subprocess.run([*argv, str(advance)], check=False)
            assert killed.returncode == -signal.SIGKILL
            assert not is_whole(out)
            assert {path.name for path in out.iterdir()} >= {"manifest.json.partial"}
            assert len(ours(machine)) >= 6
            assert clean(machine, between, state_dir) == []
            empty(out)
            assert machine.state() == state
            assert crashing.files(tmp_path, state_dir) == before
            assert foreign.problems(machine) == []
