# SPDX-License-Identifier: LGPL-2.1-or-later
"""How fast a pull is: ours against nbdcopy and qemu-img convert, of the same disk, to the same kind
of file.

Ours is the whole command: ``virsh-backup backup-pull`` from the start of its process to its exit,
as an installed script runs it, with connecting, start, checksum, fsync, stop and manifest. The same
in a shell that has loaded all it needs has a line of its own, and so has what does no more than the
peers: ``virtbackup.nbd.copy.copy``, with checksum and fsync still. The peers only copy, each with
its own defaults, from the same export of a backup that was started for them outside the time; they
are timed from the start of their process to its exit. To qcow2, nbdcopy writes through a qemu-nbd,
and the image is created within the time.

What the peers leave in the page cache is told apart from what they leave on the disk, as ours does:
``nbdcopy`` to raw and ``qemu-img convert`` do not sync. ``nbdcopy --flush`` and ``qemu-img convert
-t writeback`` do, and so does a qemu-nbd at its end, whatever nbdcopy asks of it. So there are two
ratios: to the better of those that do not sync, which do less than a backup has to, and to the
better of those that do.

The source is in the page cache all the time. Before each run all that was written is synced, and
the file of the run before is gone. Runs are in rounds, one of each program in changing order after
one round to warm up, and ratios are taken within a round.

The disks: dense and sparse, where what a pull takes beside the copy counts; a larger one, where it
does not; and data and holes in turn, by 4 KiB and by 64 KiB. Beside the copies of a dense one to
raw stands what it takes to write as many bytes from memory, and sync them.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import virtbackup
from tests.live import machines
from virtbackup.nbd import connection, copy
from virtbackup.tools import pull

GIB = 1 << 30
MIB = 1 << 20
OURS = "backup-pull"
LOADED = "backup-pull, all loaded"
COPY = "its copy alone"
ALL_OURS = (OURS, LOADED, COPY)
UNSYNCED = ("nbdcopy", "qemu-img convert")
SYNCED = ("nbdcopy --flush", "qemu-img convert -t writeback")
PEERS = (*UNSYNCED, *SYNCED)
MEMORY = "memory to file"
"""Of a dense disk to raw: what the writes alone take, with the sync, and no server to read from."""

_WRITE = """
import os, sys
block = os.urandom(1 << 20)
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
for _ in range(int(sys.argv[2]) // len(block)):
    os.write(fd, block)
os.fsync(fd)
"""

_CHILD = """
import pathlib, sys
from virtbackup.tools.virsh_backup import main
status = main()
told = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in told if line.startswith("VmHWM")))
sys.exit(status)
"""


@dataclasses.dataclass(frozen=True)
class Disk:
    """A kind of disk."""

    name: str
    size: int
    make: Callable[[pathlib.Path, int], int]
    """Makes one of a size at a path; its bytes of data."""
    share: int = 1
    """One of so many rounds is enough: it takes long."""


def main() -> int:
    """Print a table for each disk and format."""
    parser = argparse.ArgumentParser(description="how fast a pull is")
    parser.add_argument("--quick", action="store_true", help="small disks, few rounds")
    parser.add_argument("--rounds", type=int, help="default 7, quick 3")
    parser.add_argument("--directory", type=pathlib.Path, help="for source and target files")
    parser.add_argument("--disk", choices=[disk.name for disk in DISKS], help="only this one")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 7)
    scale = 4 if options.quick else 1
    print("all sources in the page cache; ratio below 1: ours is faster; times in seconds")
    for disk in DISKS:
        if options.disk in (None, disk.name):
            with tempfile.TemporaryDirectory(dir=options.directory) as name:
                _table(pathlib.Path(name), disk, disk.size // scale, -(-rounds // disk.share))
    return 0


def _table(directory: pathlib.Path, disk: Disk, size: int, rounds: int) -> None:
    data = disk.make(directory / "disk.raw", size)
    for fmt in ("raw", "qcow2"):
        title = f"{disk.name}, {size / GIB:g} GiB with {data / GIB:.2f} GiB of data -> {fmt}"
        print(f"\n{title}, {rounds} rounds")
        _print(*_measure(directory, fmt, rounds, data))


# --- disks ----------------------------------------------------------------------------------------


def _dense(path: pathlib.Path, size: int) -> int:
    source = random.Random(1)
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(source.randbytes(MIB))
    return size


def _sparse(path: pathlib.Path, size: int) -> int:
    """Runs of 4 KiB to 4 MiB all over the disk, about a sixteenth of it."""
    source = random.Random(2)
    written = 0
    with path.open("wb") as file:
        file.truncate(size)
        while written < size // 16:
            length = source.choice((4 << 10, 64 << 10, 512 << 10, 4 << 20))
            file.seek(source.randrange(0, size - length) & ~4095)
            written += file.write(source.randbytes(length))
    return path.stat().st_blocks * 512


def _alternating(path: pathlib.Path, size: int, *, piece: int) -> int:
    """PIECE bytes of data and as many of nothing in turn."""
    source = random.Random(3)
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 2 * piece):
            file.seek(start)
            file.write(source.randbytes(piece))
    return path.stat().st_blocks * 512


DISKS = (
    Disk("dense", GIB, _dense),
    Disk("sparse", 16 * GIB, _sparse),
    Disk("large", 3 * GIB, _dense, share=2),
    Disk("4-KiB", GIB // 8, functools.partial(_alternating, piece=4 << 10), share=2),
    Disk("64-KiB", GIB, functools.partial(_alternating, piece=64 << 10), share=2),
)


# --- runs -----------------------------------------------------------------------------------------


def _measure(
    directory: pathlib.Path, fmt: copy.Format, rounds: int, data: int
) -> tuple[dict[str, list[float]], int]:
    """Seconds of each program, round by round, and ours' peak memory in bytes."""
    names = [*ALL_OURS, *PEERS]
    if fmt == "raw" and data == (directory / "disk.raw").stat().st_size:
        names.append(MEMORY)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = []
    disk = f"driver=raw,node-name=A,file.driver=file,file.filename={directory}/disk.raw"
    with (
        machines.qemu(directory, "-blockdev", disk, "-device", "virtio-blk,drive=A,id=vda") as one,
        virtbackup.open(one.uri) as connection,
    ):
        domain = connection.lookupByID(1)
        order = names
        for number in range(rounds + 1):
            for name in order:
                _make_room(directory, data)
                if name == OURS:
                    seconds, peak = _ours(one.uri, directory, fmt)
                    peaks.append(peak)
                elif name == LOADED:
                    seconds = _loaded(domain, directory, fmt)
                else:
                    seconds = _from_export(domain, directory, _copy_by(name, directory, fmt))
                if number:  # the first round only warms up
                    times[name].append(seconds)
            order = order[1:] + order[:1]
    return times, max(peaks)


def _make_room(directory: pathlib.Path, data: int) -> None:
    """No writes left over from before, and free memory that the machine has at hand.

    A virtual machine's free memory may be its host's: whoever comes first would pay for it.
    """
    os.sync()
    path = directory / "room"
    with path.open("wb") as file:
        for _ in range(data // MIB + 64):
            file.write(bytes(MIB))
    path.unlink()


def _ours(uri: str, directory: pathlib.Path, fmt: copy.Format) -> tuple[float, int]:
    out = directory / "out"
    argv = [sys.executable, "-c", _CHILD, "-c", uri, "-q", "backup-pull", "1", str(out)]
    begin = time.perf_counter()
    done = subprocess.run([*argv, "--format", fmt], check=True, capture_output=True, text=True)
    took = time.perf_counter() - begin
    _remove(out)
    return took, int(done.stdout.split()[-1]) << 10


def _loaded(domain: virtbackup.Domain, directory: pathlib.Path, fmt: copy.Format) -> float:
    begin = time.perf_counter()
    pull.pull(domain, directory / "out", fmt=fmt)
    took = time.perf_counter() - begin
    _remove(directory / "out")
    return took


def _remove(out: pathlib.Path) -> None:
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


def _from_export(
    domain: virtbackup.Domain, directory: pathlib.Path, copy_it: Callable[[], object]
) -> float:
    """Seconds of COPY_IT, which makes a file from the export of a backup."""
    address = f'<address type="unix" path="{directory}/peer.sock"/>'
    domain.backupStart(f"<domainbackup>{address}</domainbackup>")
    try:
        begin = time.perf_counter()
        copy_it()
        return time.perf_counter() - begin
    finally:
        domain.backupStop()
        (directory / "peer.out").unlink(missing_ok=True)


def _copy_by(name: str, directory: pathlib.Path, fmt: copy.Format) -> Callable[[], object]:
    if name == COPY:
        export = connection.Export(str(directory / "peer.sock"), "vda")
        job = copy.Job(export, directory / "peer.out", fmt)
        return functools.partial(copy.copy, [job])
    return functools.partial(_run, _argv(name, directory, fmt))


def _run(steps: Sequence[Sequence[str]]) -> None:
    for argv in steps:
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def _argv(name: str, directory: pathlib.Path, fmt: copy.Format) -> list[list[str]]:
    """The commands that copy the export as PEER does, into a file of the format."""
    uri, out = f"nbd+unix:///vda?socket={directory}/peer.sock", f"{directory}/peer.out"
    size = (directory / "disk.raw").stat().st_size
    if name == MEMORY:
        return [[sys.executable, "-c", _WRITE, out, str(size)]]
    copy = name.split()
    if copy[0] == "qemu-img":
        return [[*copy, "-f", "raw", "-O", fmt, uri, out]]
    if fmt == "raw":
        return [[*copy, uri, out]]
    create = ["qemu-img", "create", "-q", "-f", fmt, out, str(size)]
    return [create, [*copy, "--", uri, "[", "qemu-nbd", "-f", fmt, out, "]"]]


# --- the table ------------------------------------------------------------------------------------


def _print(times: dict[str, list[float]], peak: int) -> None:
    titles = "".join(f"{name + '/it':>28}" for name in ALL_OURS)
    print(f"  {'':29} {'seconds':27}{titles}")
    for name, seconds in times.items():
        low, high = min(seconds), max(seconds)
        line = f"  {name:29} median {statistics.median(seconds):6.2f}  {low:5.2f} to {high:5.2f}"
        ours = ALL_OURS if name not in ALL_OURS else ()
        print(line + "".join(f"{_ratio(times[one], seconds):28.2f}" for one in ours))
    for which, names in (("do not sync", UNSYNCED), ("sync", SYNCED)):
        better = min(names, key=lambda name: statistics.median(times[name]))
        ratios = [_ratio(times[one], times[better]) for one in ALL_OURS]
        title = f"against the better of those that {which}"
        print(f"  {title:57}" + "".join(f"{ratio:28.2f}" for ratio in ratios))
    print(f"  peak memory of backup-pull: {peak / MIB:.0f} MiB")


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
