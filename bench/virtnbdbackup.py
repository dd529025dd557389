# SPDX-License-Identifier: LGPL-2.1-or-later
"""How fast a backup of a libvirt domain is: ours against virtnbdbackup, of the same disk.

Both are whole commands, from the start of the process to its exit, each with its own defaults:
``virsh-backup backup-pull`` to qcow2, with checksum and sync, by our engine; virtnbdbackup to its
stream format by libvirt's. Of an increment, each has a line of its own, and both see the same
pieces of 64 KiB that were written since the round before.

Runs are in pairs, in changing order, and ratios are taken within a pair. All sources are in the
page cache.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from tests.live import libvirtd

MIB = 1 << 20
GIB = 1 << 30
NAME = "measured"
PIECE = libvirtd.CLUSTER
PIECES = 512
"""Written between two increments."""


@dataclasses.dataclass(frozen=True)
class Disk:
    """A kind of disk."""

    name: str
    size: int
    data: int
    """Bytes of it that are not zero."""


DISKS = (Disk("dense", GIB, GIB), Disk("sparse", 16 * GIB, GIB))


def main() -> int:
    """Print a table for each disk, full and increment."""
    parser = argparse.ArgumentParser(description="how fast a backup of a libvirt domain is")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--directory", type=pathlib.Path, help="for disks and backups")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("virtnbdbackup") is None:
        print("this wants root, for a libvirtd of its own, and virtnbdbackup")
        return 0
    for disk in DISKS:
        with tempfile.TemporaryDirectory(dir=options.directory or "/var/tmp") as name:
            directory = pathlib.Path(name)
            directory.chmod(0o755)
            _measure(directory, disk, options.pairs)
    return 0


def _measure(directory: pathlib.Path, disk: Disk, pairs: int) -> None:
    image = directory / "disk.qcow2"
    _make(image, disk)
    (directory / "daemon").mkdir()
    with libvirtd.host(directory / "daemon", directory) as host:
        tools = {"backup-pull": _ours(host, directory), "virtnbdbackup": _theirs(host, directory)}
        with host.domain(NAME, libvirtd.disk_xml("vda", image), persistent=True) as domain:
            full, increments = _runs(directory, domain, tools, disk, pairs)
    title = f"{disk.name}, {disk.size // GIB} GiB with {disk.data / GIB:g} GiB of data"
    _print(f"{title}, full", full)
    _print(f"{title}, an increment of {PIECES * PIECE // MIB} MiB", increments)


def _make(path: pathlib.Path, disk: Disk) -> None:
    """A qcow2 image with DISK's data evenly over it."""
    raw = path.with_suffix(".raw")
    source = random.Random(1)
    with raw.open("wb") as file:
        file.truncate(disk.size)
        for number in range(disk.data // MIB):
            file.seek(number * (disk.size // disk.data) * MIB)
            file.write(source.randbytes(MIB))
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)], check=True
    )
    raw.unlink()


# --- runs -----------------------------------------------------------------------------------------

Tool = Callable[[str], None]
"""Makes a backup: ``full``, which begins the tool's own line anew, or ``inc``."""


def _ours(host: libvirtd.Host, directory: pathlib.Path) -> Tool:
    def backup(kind: str) -> None:
        argv = ["virtbackup.tools.virsh_backup", "-q", "-c", host.daemon.uri, "backup-pull"]
        argv += [NAME, str(directory / "ours"), "--branch", "measured"]
        argv += ["--incremental"] if kind == "inc" else []
        subprocess.run([sys.executable, "-m", *argv], check=True, stdout=subprocess.DEVNULL)

    return backup


def _theirs(host: libvirtd.Host, directory: pathlib.Path) -> Tool:
    def backup(kind: str) -> None:
        argv = ["virtnbdbackup", "-U", host.daemon.uri, "-d", NAME, "--noprogress", "-l", kind]
        argv += ["-o", str(directory / "theirs"), "-S", str(directory)]
        argv += ["-f", str(directory / "theirs.sock")]
        subprocess.run(argv, check=True, capture_output=True)

    return backup


def _runs(
    directory: pathlib.Path,
    domain: libvirtd.Domain,
    tools: Mapping[str, Tool],
    disk: Disk,
    pairs: int,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of full backups and of increments, by tool and pair by pair."""
    full: dict[str, list[float]] = {name: [] for name in tools}
    increments: dict[str, list[float]] = {name: [] for name in tools}
    places = random.Random(2)
    order = list(tools)
    for number in range(pairs + 1):
        for times, kind in ((full, "full"), (increments, "inc")):
            if kind == "inc":
                for cluster in places.sample(range(disk.size // PIECE), PIECES):
                    domain.write("vda", cluster)
            for name in order:
                os.sync()
                begin = time.perf_counter()
                tools[name](kind)
                if number:  # the first pair only warms up
                    times[name].append(time.perf_counter() - begin)
        order.reverse()
        for name in ("ours", "theirs"):
            shutil.rmtree(directory / name)
    return full, increments


def _print(title: str, times: Mapping[str, Sequence[float]]) -> None:
    ours, theirs = times.values()
    print(f"\n{title}, {len(ours)} pairs")
    for name, seconds in times.items():
        low, high = min(seconds), max(seconds)
        median = statistics.median(seconds)
        print(f"  {name:14} median {median:6.2f} s  {low:5.2f} to {high:5.2f}")
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"  ours/it {ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main())
