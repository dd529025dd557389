# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directories of backups that ``pull`` made of a real guest, and what each point of them shows."""

import contextlib
import dataclasses
import io
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

import virtbackup
from tests.live import copies, machines
from virtbackup.nbd import checksum, copy, qcow2, target, writer
from virtbackup.tools import chain, listing, manifest, pull, restore, verify, virsh_backup

SIZE = (4 << 20) + 512
"""One sector more than whole clusters."""
LAYERS: list[dict[int, int | None]] = [
    {n: n for n in range(12)},
    {5: 100, 6: None},
    {5: None, 7: 102},
    {8: 103, 5: 104},
]
"""Of one disk, in four points (``built``)."""
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
        shown = {number: dict(disks) for number, disks in self.shown.items()}
        return Backed(directory, shown, dict(self.made))


@dataclasses.dataclass
class Guest:
    """A running QEMU with disks vda and sdb, which is backed up at will."""

    machine: machines.Machine
    domain: virtbackup.Domain

    def contents(self) -> dict[str, bytes]:
        return machines.on_two_disks(self.machine)

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


def pulled(directory: pathlib.Path, points: int = 4, fmt: copy.Format | None = None) -> Backed:
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


def built(
    directory: pathlib.Path,
    size: int,
    layers: Sequence[Mapping[int, int | None]],
    base: copy.Format = "qcow2",
) -> Backed:
    """A directory of one disk, vda, as a pull would have made it: LAYERS, the full one first, say
    what each has of blocks: random bytes of a seed, or None, zeroes."""
    directory.mkdir()
    backed = Backed(directory)
    content = bytearray(size)
    below: manifest.Disk | None = None
    for number, layer in enumerate(layers, 1):
        fmt: copy.Format = "qcow2" if below else base
        file = chain_file(number, fmt)
        made = _write(directory / file, fmt, content, layer, below)
        value = copies.defined_checksum(bytes(content), None if below is None else layer)
        algorithm = checksum.INCREMENT if below else checksum.ALGORITHM
        disk = manifest.Disk(
            "vda", file, fmt, size, manifest.Checksum(algorithm, checksum.BLOCK, value), made,
            "incremental" if below else "full", below.file if below else None,
            f"id{number - 1}" if below else None,
            tables=manifest.tables_of(directory / file, size) if fmt == "qcow2" else None,
            length=(directory / file).stat().st_size if fmt == "qcow2" else None,
        )  # fmt: skip
        one = manifest.Manifest(
            manifest.VERSION, manifest.Domain("vm", UUID), disk.kind,
            f"2026-01-01T00:00:{number:02}+00:00", (disk,), "<domainbackup/>", DOMAIN,
            f"id{number}", "daily", number,
        )  # fmt: skip
        for name in (chain.manifest_file(number), manifest.FILE):
            (directory / name).write_text(one.to_json())
        backed.shown[number], backed.made[number] = {"vda": bytes(content)}, one
        below = disk
    return backed


DOMAIN = """<domain type='kvm' id='3'>
  <name>vm</name>
  <devices>
    <disk type='file' device='disk' snapshot='external'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/images/a.qcow2' index='1'><encryption format='luks'/></source>
      <backingStore type='file'><format type='raw'/><source file='/images/b'/></backingStore>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sr0'/>
    </disk>
    <disk type='block' device='disk'>
      <source dev='/dev/x'/>
      <target dev='vdb'/>
    </disk>
  </devices>
</domain>
"""


def chain_file(number: int, fmt: str) -> str:
    return chain.disk_file("vda", number, fmt)


def _write(
    path: pathlib.Path,
    fmt: str,
    content: bytearray,
    layer: Mapping[int, int | None],
    below: manifest.Disk | None,
) -> int:
    """Put LAYER over CONTENT and into an image; what that takes."""
    size = len(content)
    where: target.Target
    if fmt == "raw":
        where = target.Raw(path, size)
    else:
        backing = qcow2.Backing(below.file, "raw" if below.format == "raw" else "qcow2") if (
            below
        ) else None  # fmt: skip
        where = writer.QemuWriter(path, size, backing)
        where.begin()
    for block, seed in layer.items():
        start, end = block * checksum.BLOCK, min((block + 1) * checksum.BLOCK, size)
        if start >= end:
            continue
        data = bytes(end - start) if seed is None else random.Random(seed).randbytes(end - start)
        content[start:end] = data
        if seed is None:
            where.write_zeroes(start, end - start)
        else:
            where.write(start, memoryview(data))
    return where.finish()


def verified(directory: pathlib.Path, point: str | None = None) -> verify.Verdict:
    backups = listing.read(directory)
    return verify.verify(backups, None if point is None else backups.find(point))


def flip(path: pathlib.Path, offset: int, bit: int = 1) -> None:
    """Change a BIT of the byte at OFFSET; once more, and it is as it was."""
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ bit]))


def find_data(path: pathlib.Path, byte: int) -> int:
    """Where a cluster of BYTE is in the file."""
    return path.read_bytes().index(bytes([byte]) * 4096) + 2000


def put_back(backed: Backed, out: object, **options: object) -> list[restore.Restored]:
    """Restore a POINT of OPTIONS, else the newest, to OUT; the rest is for ``restore.restore``."""
    backups = listing.read(backed.directory)
    point = backups.find(options.pop("point", None))  # type: ignore[arg-type]
    cancel = copy.Cancel()
    try:
        return restore.restore(backups, point, str(out), cancel=cancel, **options)  # type: ignore[arg-type]
    finally:
        cancel.close()


def padded(content: bytes) -> bytes:
    """As a qcow2 image has it: of whole sectors."""
    return content + bytes(-len(content) % 512)


def run(*argv: str) -> tuple[int, str, str]:
    """Exit status, standard output and error of virsh-backup in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "virtbackup.tools.virsh_backup", *argv],
        capture_output=True, text=True, errors="surrogateescape", timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def call(*argv: str) -> tuple[int, str, str]:
    """The same in this process, which is faster."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = virsh_backup.main(argv)
    return status, out.getvalue(), err.getvalue()
