# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random rounds of pulled backups on two branches: every chain holds what the disks were.

A life is one guest with three disks and a directory for each branch; everything in it follows from
its seed, but for what depends on who is faster. To do one again:

VIRTBACKUP_ROUNDS_SEED=SEED pytest tests/live/test_branch_rounds.py -k LIFE

VIRTBACKUP_LONG=1 makes it some hundred rounds; -s shows the figures.
"""

import collections
import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import libvirt
import pytest

import virtbackup
from tests import conftest
from tests.live import machines
from virtbackup import errors
from virtbackup.conf import backup_conf
from virtbackup.tools import manifest, pull

pytestmark = [pytest.mark.needs("qemu-system-x86_64", "qemu-img"), pytest.mark.timeout(180)]

SIZE = 6 << 20
ROUNDS = 14
LIVES = 24 if conftest.long() else 1
SEED = os.environ.get("VIRTBACKUP_ROUNDS_SEED", "1")
DISKS = {"vda": "a.qcow2", "sdb": "b.raw", "sdc": "c.qcow2"}
GRANULARITY = {"daily": None, "hourly": 4096}
FIGURES: collections.Counter[str] = collections.Counter()


class Life:
    """A guest in DIRECTORY, what its disks hold, and what its backups have to hold."""

    def __init__(self, directory: pathlib.Path, state_dir: pathlib.Path, seed: str) -> None:
        self.directory, self.state_dir = directory, state_dir
        self.rng = random.Random(seed)
        self.log: list[str] = []
        self.live = {disk: bytearray(SIZE) for disk in DISKS}
        self.points: dict[str, dict[int, list[dict[str, bytes]]]] = {b: {} for b in GRANULARITY}
        """Branch -> number -> what the disks were when it was pulled, each time it was tried."""
        self.machine: machines.Machine | None = None
        self.left = False
        """The backup of a process that was killed may still run."""
        machines.image(directory / "base.qcow2", SIZE, "qcow2")
        machines.image(directory / "a.qcow2", SIZE, "qcow2", backing=directory / "base.qcow2")
        machines.image(directory / "b.raw", SIZE)
        machines.image(directory / "c.qcow2", SIZE, "qcow2")

    # --- the guest ---

    def boot(self) -> None:
        options = "discard=unmap,file.discard=unmap,file.driver=file,file.filename="
        self.machine = machines.qemu(
            self.directory, "-name", "vm", "-uuid", "6a1b5b0c-0000-4000-8000-000000000001",
            "-blockdev", f"qcow2,node-name=A,{options}{self.directory}/a.qcow2",
            "-device", "virtio-blk,drive=A,id=vda",
            "-device", "virtio-scsi,id=scsi0",
            "-blockdev", f"raw,node-name=B,{options}{self.directory}/b.raw",
            "-device", "scsi-hd,drive=B,id=sdb",
            "-blockdev", f"qcow2,node-name=C,{options}{self.directory}/c.qcow2",
            "-device", "scsi-hd,drive=C,id=sdc",
        )  # fmt: skip

    def shut_down(self, *, killed: bool) -> None:
        assert self.machine is not None
        if killed:
            for disk in DISKS:
                self.machine.io(disk, "flush")
            self.machine.kill()
        else:
            self.machine.probe("quit")
            self.machine.process.wait()
        self.machine.close()
        self.machine = None

    def write(self, *, meanwhile: bool = False) -> None:
        """The guest writes bytes or zeroes, or discards; MEANWHILE a backup runs, whose filter may
        not pass a discard on."""
        assert self.machine is not None
        disk = self.rng.choice(list(DISKS))
        what = self.rng.choice(
            ["bytes", "bytes", "zeroes", *([] if meanwhile or self.left else ["discard"])]
        )
        grain = 65536 if what == "discard" else 512
        length = self.rng.randrange(
            1, 1 + (1 << 20 if self.rng.random() < 0.2 else 1 << 17) // grain
        )
        length *= grain
        offset = self.rng.randrange(0, (SIZE - length) // grain + 1) * grain
        byte = 0 if what != "bytes" else self.rng.randrange(1, 256)
        command = {"bytes": f"write -P {byte}", "zeroes": "write -z", "discard": "discard"}[what]
        self.log.append(f"{disk} {command} {offset} {length}")
        self.machine.io(disk, f"{command} {offset} {length}")
        self.live[disk][offset : offset + length] = bytes([byte]) * length

    # --- backups ---

    @property
    def uri(self) -> str:
        return f"qmp://{self.directory}/qmp.sock"

    def out(self, branch: str) -> pathlib.Path:
        return self.directory / branch

    def document(self, branch: str, disks: list[str]) -> str:
        size = GRANULARITY[branch]
        bitmap = "" if size is None else f'<bitmap granularity="{size}"/>'
        listed = "".join(
            f'<disk name="{disk}" present="{"yes" if disk in disks else "no"}">'
            f"{bitmap if disk in disks else ''}</disk>"
            for disk in DISKS
        )
        return (
            f'<domainbackup><address type="unix" path="{self.directory}/nbd.sock"/>'
            f'<branch name="{branch}"/><disks>{listed}</disks></domainbackup>'
        )

    def frozen(self) -> dict[str, bytes]:
        return {disk: bytes(self.live[disk]) for disk in DISKS}

    def expect(self, branch: str) -> None:
        """The next number of BRANCH, if it comes to be, is what the disks are now."""
        number = 1 + max((made.number or 0 for made in self.manifests(branch)), default=0)
        # One that was cut off may be finished first, and push the new one on.
        for which in (number, number + 1):
            self.points[branch].setdefault(which, []).append(self.frozen())

    def pull(self, branch: str, kind: backup_conf.DiskType, disks: list[str]) -> None:
        self.expect(branch)
        self.log.append(f"pull {branch} {kind} {disks}")
        with virtbackup.open(self.uri) as connection:
            domain = connection.lookupByName("vm")
            try:
                made = pull.pull(
                    domain,
                    self.out(branch),
                    xml=self.document(branch, disks),
                    kind=kind,
                    progress=_Writing(self),
                )
            except virtbackup.Error as failure:
                self.log.append(f"refused: {failure}")
                # Nothing but a gap, or a bitmap that is of no use, is a reason.
                assert kind == "incremental", failure
                gap = libvirt.VIR_ERR_OPERATION_INVALID
                assert failure.get_error_code() in (gap, errors.CHECKPOINT_INCONSISTENT)
                FIGURES["refused"] += 1
                return
        self.left = False
        FIGURES[f"pull {kind}: {made.kind}"] += 1
        self.log.append(f"made {[(disk.name, disk.kind, disk.reason) for disk in made.disks]}")
        assert kind != "incremental" or made.kind == "incremental"
        assert made == manifest.read(self.out(branch))
        self.check(branch, made)
        self.leftovers()

    def pull_killed(self, branch: str) -> None:
        """By a process that is killed, perhaps too late."""
        self.expect(branch)
        after = self.rng.choice([self.rng.uniform(0, 0.6), self.rng.uniform(0.25, 0.45)])
        self.log.append(f"pull {branch} auto, killed after {after:.3f}")
        argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", self.uri]
        argv += ["backup-pull", "vm", str(self.out(branch)), "--xml", "-", "--auto"]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, text=True) as process:  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(self.document(branch, list(DISKS)))
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(after)
            process.kill()
        self.left = True
        FIGURES[f"killed: {process.returncode == -signal.SIGKILL}"] += 1

    def cancelled(self, branch: str) -> None:
        """Without a pull: given up, or stopped, which leaves a gap in the chain."""
        cancel = self.rng.random() < 0.7
        self.log.append(f"start {branch}, {'cancel' if cancel else 'stop'}")
        flags = virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL if cancel else 0
        with virtbackup.open(self.uri) as connection:
            domain = connection.lookupByName("vm")
            domain.backupStart(self.document(branch, list(DISKS)))
            self.left = False
            for _ in range(self.rng.randrange(3)):
                self.write(meanwhile=True)
            domain.backupStop(flags)

    def restart(self) -> None:
        killed = self.rng.random() < 0.4
        running = self.rng.random() < 0.4
        self.log.append(f"restart killed={killed} with a backup={running}")
        if running:
            branch = self.rng.choice(list(GRANULARITY))
            with virtbackup.open(self.uri) as connection:
                connection.lookupByName("vm").backupStart(self.document(branch, list(DISKS)))
            self.write(meanwhile=True)
        self.shut_down(killed=killed)
        self.boot()
        self.left = False
        FIGURES[f"restarts killed={killed}"] += 1

    # --- what has to hold ---

    def manifests(self, branch: str) -> list[manifest.Manifest]:
        out = self.out(branch)
        names = sorted(path.name for path in out.glob("manifest.*.json")) if out.exists() else []
        return [manifest.read(out, name) for name in names]

    def check(self, branch: str, made: manifest.Manifest) -> None:
        """The files of MADE open as what the disks were."""
        assert made.number is not None
        expected = self.points[branch][made.number]
        for disk in made.disks:
            found = machines.contents(self.out(branch) / disk.file, disk.format)
            wrong = [_differences(found, one[disk.name]) for one in expected]
            assert [] in wrong, f"{branch} {disk.file} differs at {wrong}"
            FIGURES["files compared"] += 1

    def leftovers(self) -> None:
        """At rest: nothing of ours but the branches' own bitmaps and their points."""
        assert self.machine is not None
        said = str(self.machine.probe("query-named-block-nodes"))
        assert re.findall(r"virtbackup-[0-9a-f]{8}[-\w]*", said) == []
        assert list(self.state_dir.glob("*.json")) == []

    def run(self) -> None:
        self.boot()
        for disk in DISKS:
            assert self.machine is not None
            self.machine.io(disk, f"write -P 7 0 {SIZE // 2}")
            self.live[disk][: SIZE // 2] = b"\7" * (SIZE // 2)
        for number in range(ROUNDS):
            self.log.append(f"--- round {number}")
            for _ in range(self.rng.randrange(5)):
                self.write()
            branch = self.rng.choice(list(GRANULARITY))
            what = self.rng.choices(["pull", "pull killed", "cancelled", "restart"], [10, 2, 3, 2])[
                0
            ]
            if what == "pull":
                kind = self.rng.choices(["full", "incremental", "auto"], [1, 4, 4])[0]
                some = list(DISKS) if self.rng.random() < 0.8 else self.rng.sample(list(DISKS), 2)
                self.pull(branch, kind, some)  # type: ignore[arg-type]
            elif what == "pull killed":
                self.pull_killed(branch)
            elif what == "cancelled":
                self.cancelled(branch)
                self.leftovers()
            else:
                self.restart()
            FIGURES["rounds"] += 1
        for branch in GRANULARITY:
            self.pull(branch, "auto", list(DISKS))
            for made in self.manifests(branch):
                self.check(branch, made)
        self.shut_down(killed=False)
        for disk, file in DISKS.items():
            fmt = "raw" if file.endswith("raw") else "qcow2"
            assert machines.contents(self.directory / file, fmt) == self.live[disk]


def _differences(found: bytes, expected: bytes) -> list[int]:
    """Offsets of the blocks of 512 bytes that differ, the size for a file of another size."""
    if len(found) != len(expected):
        return [len(found)]
    blocks = range(0, len(found), 512)
    return [n for n in blocks if found[n : n + 512] != expected[n : n + 512]]


class _Writing:
    """Progress during which the guest goes on writing."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._left = life.rng.randrange(3)

    def start(self, index: int, size: int) -> None:
        self.advance(index, 0)

    def advance(self, index: int, count: int) -> None:
        if self._left and threading.current_thread() is threading.main_thread():
            self._left -= 1
            self._life.write(meanwhile=True)


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    FIGURES.clear()
    yield
    print("\n" + "\n".join(f"{name}: {count}" for name, count in sorted(FIGURES.items())))


@pytest.mark.parametrize("number", range(LIVES))
def test_rounds(tmp_path: pathlib.Path, state_dir: pathlib.Path, number: int) -> None:
    life = Life(tmp_path, state_dir, f"{SEED}/{number}")
    try:
        life.run()
    except BaseException:
        print(f"seed {SEED}, life {number}:", *life.log, sep="\n")
        raise
    finally:
        if life.machine is not None:
            life.machine.close()
