# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an incremental copy costs on a large disk: 64 MiB of changes on 256 GiB against on 1 GiB.

Both disks are sparse, and on each the same 1024 pieces of 64 KiB were written all over it since its
bitmap began. A copy counts from the connection to the sync of its file, checksum included. Runs are
in pairs, in changing order, and ratios are taken within a pair.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import nbd

from tests.live import machines
from virtbackup.nbd import connection, copy

GIB = 1 << 30
SIZES = (GIB, 256 * GIB)
PIECE = 64 << 10
PIECES = 1024
BITMAP = "branch"


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk that is exported with its changes."""

    size: int
    export: connection.Export


def main() -> int:
    """Print a table for each format of the disks."""
    parser = argparse.ArgumentParser(description="what an incremental copy costs on a large disk")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--directory", type=pathlib.Path, help="for disks and copies")
    options = parser.parse_args()
    for fmt in ("qcow2", "raw"):
        with tempfile.TemporaryDirectory(dir=options.directory) as name:
            directory = pathlib.Path(name)
            with _disks(directory, fmt) as disks:
                times = _measure(directory, disks, options.pairs)
        _print(fmt, times)
    return 0


# --- disks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disks(directory: pathlib.Path, fmt: str) -> Iterator[list[Disk]]:
    """A disk of each size with the same changes, served by QEMU's storage daemon."""
    address = f"{directory}/nbd.sock"
    with machines.storage_daemon(directory) as daemon:
        daemon.probe("nbd-server-start", addr={"type": "unix", "data": {"path": address}})
        for size in SIZES:
            path = machines.image(directory / f"{size}.{fmt}", size, fmt)
            node, name = f"disk-{size}", f"export-{size}"
            daemon.probe(
                "blockdev-add", node_name=node, driver=fmt,
                file={"driver": "file", "filename": str(path)},
            )  # fmt: skip
            daemon.probe("block-dirty-bitmap-add", node=node, name=BITMAP)
            _add_export(daemon, node, name, writable=True)
            _write(address, name, size)
            daemon.probe("block-export-del", id=name)
            daemon.probe.wait_event("BLOCK_EXPORT_DELETED")
            daemon.probe("block-dirty-bitmap-disable", node=node, name=BITMAP)
            _add_export(daemon, node, name, bitmaps=[BITMAP])
        yield [Disk(size, connection.Export(address, f"export-{size}")) for size in SIZES]


def _add_export(daemon: machines.Machine, node: str, name: str, **options: object) -> None:
    daemon.probe(
        "block-export-add", id=name, type="nbd", node_name=node, name=name, **options
    )  # fmt: skip


def _write(address: str, name: str, size: int) -> None:
    """One piece somewhere in each of PIECES parts of the disk; the same bytes for every size."""
    source, places = random.Random(1), random.Random(2)
    client = nbd.NBD()
    client.set_export_name(name)
    client.connect_unix(address)
    part = size // PIECES
    for start in range(0, size, part):
        client.pwrite(source.randbytes(PIECE), start + places.randrange(part // PIECE) * PIECE)
    client.flush()
    client.shutdown()


# --- runs -----------------------------------------------------------------------------------------


def _measure(directory: pathlib.Path, disks: Sequence[Disk], pairs: int) -> dict[int, list[float]]:
    """Seconds of the copies of each disk, by its size."""
    times: dict[int, list[float]] = {disk.size: [] for disk in disks}
    for number in range(pairs + 1):
        for disk in disks if number % 2 else reversed(disks):
            seconds = _copy(directory / "copy.qcow2", disk)
            if number:  # the first pair only warms up
                times[disk.size].append(seconds)
    return times


def _copy(path: pathlib.Path, disk: Disk) -> float:
    context = f"qemu:dirty-bitmap:{BITMAP}"
    backing = copy.Backing("full.qcow2", "qcow2")
    _make_room(path.with_name("room"))
    begin = time.perf_counter()
    (result,) = copy.copy([copy.Job(disk.export, path, "qcow2", dirty=context, backing=backing)])
    took = time.perf_counter() - begin
    path.unlink()
    if result.changed != PIECES * PIECE:
        raise RuntimeError(f"{result.changed} bytes have changed, not {PIECES * PIECE}")
    return took


def _make_room(path: pathlib.Path) -> None:
    """No writes left over from before, and free memory that the machine has at hand."""
    os.sync()
    with path.open("wb") as file:
        for _ in range(2 * PIECES):
            file.write(bytes(PIECE))
    path.unlink()


def _print(fmt: str, times: dict[int, list[float]]) -> None:
    print(f"{PIECES * PIECE >> 20} MiB of changes, {fmt} disks")
    for size, seconds in times.items():
        low, high = min(seconds), max(seconds)
        median = statistics.median(seconds)
        print(f"  {size // GIB:3} GiB   median {median:6.3f} s   {low:6.3f} to {high:6.3f}")
    small, large = (times[size] for size in SIZES)
    ratios = [b / a for a, b in zip(small, large, strict=True)]
    print(f"  256 GiB/1 GiB, median of {len(ratios)} pairs: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    sys.exit(main())
