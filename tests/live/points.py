# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directories of backups that ``pull`` made of a real guest, and what each point of them shows."""

import contextlib
import dataclasses
import io
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import virtbackup
from tests.live import machines
from virtbackup.nbd import copy
from virtbackup.tools import manifest, pull, virsh_backup

SIZE = (4 << 20) + 512
"""One sector more than whole clusters."""
UUID = "6a1b5b0c-0000-4000-8000-000000000001"
FORMATS = {"vda": "qcow2", "sdb": "raw"}


@dataclasses.dataclass
class Backed:
    """A directory, and number -> disk -> what the disk was then."""

    directory: pathlib.Path
    shown: dict[int, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    made: dict[int, manifest.Manifest] = dataclasses.field(default_factory=dict)

    def copy(self, directory: pathlib.Path) -> "Backed":
        """The same in another place, to be spoilt."""
        shutil.copytree(self.directory, directory)
        return Backed(directory, dict(self.shown), dict(self.made))


@dataclasses.dataclass
class Guest:
    """A running QEMU with disks vda and sdb, which is backed up at will."""

    machine: machines.Machine
    domain: virtbackup.Domain

    def contents(self) -> dict[str, bytes]:
        for disk in FORMATS:
            self.machine.io(disk, "flush")
        return {
            "vda": machines.contents(self.machine.directory / "a.qcow2", "qcow2"),
            "sdb": machines.contents(self.machine.directory / "b.raw", "raw"),
        }

    def back_up(self, to: Backed, fmt: copy.Format | None = None) -> manifest.Manifest:
        """One more point, an increment where that is possible."""
        shown = self.contents()
        made = pull.pull(self.domain, to.directory, branch="daily", kind="auto", fmt=fmt)
        assert made.number is not None
        to.shown[made.number], to.made[made.number] = shown, made
        return made

    def change(self, step: int) -> None:
        """Write data over old and new places, and zeroes over data."""
        for disk in FORMATS:
            self.machine.io(disk, f"write -P {step + 1} {step * 320}k 96k")
            self.machine.io(disk, f"write -P {step + 100} 2M 64k")
            self.machine.io(disk, f"write -z {step * 64}k 64k")
            self.machine.io(disk, f"write -P {step + 200} 4M 512")


@contextlib.contextmanager
def guest(directory: pathlib.Path, size: int = SIZE) -> Iterator[Guest]:
    """A QEMU whose disks have something on them."""
    with machines.two_disks(directory, "-name", "vm", "-uuid", UUID, size=size) as machine:
        for disk in FORMATS:
            machine.io(disk, "write -P 1 0 1M")
            machine.io(disk, "write -P 9 2M 512k")
        with virtbackup.open(machine.uri) as connection:
            yield Guest(machine, connection.lookupByName("vm"))


def chain(directory: pathlib.Path, points: int = 4, fmt: copy.Format | None = None) -> Backed:
    """A full backup and increments, of a guest that is gone when this returns."""
    images = directory / "images"
    images.mkdir(parents=True)
    backed = Backed(directory / "backups")
    with guest(images) as one:
        for step in range(points):
            if step:
                one.change(step)
            one.back_up(backed, fmt if not step else None)
    return backed


def run(*argv: str) -> tuple[int, str, str]:
    """Exit status, standard output and error of virsh-backup in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "virtbackup.tools.virsh_backup", *argv],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def call(*argv: str) -> tuple[int, str, str]:
    """The same in this process, which is faster."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = virsh_backup.main(argv)
    return status, out.getvalue(), err.getvalue()
