# SPDX-License-Identifier: LGPL-2.1-or-later
"""What it takes to write a qcow2 file: a copy alone, without a backup around it.

All copy the same export of a raw disk in the page cache, by a qemu-nbd, and have the file on the
medium when they end. Ours writes through a qemu-storage-daemon that is shown its memory, or, where
none can be found, through a qemu-nbd. The peers are ``nbdcopy`` into a qemu-nbd and ``qemu-img
convert``, which writes qcow2 in its own process. Told are seconds from start to exit, and the
seconds of processor time of all processes, the server's included: on a busy machine these count.
"""

import argparse
import contextlib
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

from bench import pull_speed
from tests import waiting

SHARED = "ours, by qemu-storage-daemon"
SOCKET = "ours, by qemu-nbd"
PEERS = ("nbdcopy --flush", "qemu-img convert -t writeback")

_COPY = """
import pathlib, sys
from virtbackup.nbd import connection, copy
export = connection.Export(sys.argv[1], "vda")
copy.copy([copy.Job(export, pathlib.Path(sys.argv[2]), "qcow2")])
"""
_WITHOUT_DAEMON = ("qemu-nbd", "qemu-img", "setpriv", "sh")


def main() -> int:
    """Print a table for each disk."""
    parser = argparse.ArgumentParser(description="what it takes to write a qcow2 file")
    parser.add_argument("--quick", action="store_true", help="small disks, few rounds")
    parser.add_argument("--rounds", type=int, help="default 5, quick 2")
    parser.add_argument("--directory", type=pathlib.Path, help="for source and target files")
    parser.add_argument("--disk", choices=[disk.name for disk in pull_speed.DISKS])
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 5)
    for disk in pull_speed.DISKS:
        if options.disk in (None, disk.name):
            with tempfile.TemporaryDirectory(dir=options.directory) as name:
                size = disk.size // (8 if options.quick else 1)
                _table(pathlib.Path(name), disk, size, rounds)
    return 0


def _table(directory: pathlib.Path, disk: pull_speed.Disk, size: int, rounds: int) -> None:
    data = disk.make(directory / "disk.raw", size) / pull_speed.GIB
    print(f"\n{disk.name}, {size / pull_speed.GIB:g} GiB with {data:.2f} GiB, {rounds} rounds")
    order = [SHARED, SOCKET, *PEERS]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
    with _serving(directory) as server:
        for number in range(rounds + 1):
            for name in order:
                if number:  # the first round only warms up
                    found[name].append(_run(name, directory, server))
                else:
                    _run(name, directory, server)
            order = order[1:] + order[:1]
    ours = [seconds for seconds, _ in found[SHARED]]
    for name, measured in found.items():
        seconds, processor = zip(*measured, strict=True)
        ratio = statistics.median(a / b for a, b in zip(ours, seconds, strict=True))
        line = f"  {name:30} median {statistics.median(seconds):5.2f}"
        line += f"   processor {statistics.median(processor):5.2f}"
        print(line if name == SHARED else f"{line}   the first/it {ratio:.2f}")


@contextlib.contextmanager
def _serving(directory: pathlib.Path) -> Iterator[subprocess.Popen[bytes]]:
    socket = directory / "server.sock"
    argv = ["qemu-nbd", "-r", "-t", "-e", "8", "-x", "vda", "-f", "raw", "-k", str(socket)]
    server = subprocess.Popen([*argv, str(directory / "disk.raw")])
    try:
        waiting.until(socket.exists)
        yield server
    finally:
        server.kill()
        server.wait()


def _run(
    name: str, directory: pathlib.Path, server: "subprocess.Popen[bytes]"
) -> tuple[float, float]:
    """(seconds, seconds of processor time) of one copy."""
    out, socket = directory / "out", directory / "server.sock"
    environment: Mapping[str, str] = os.environ
    if name in (SHARED, SOCKET):
        steps = [[sys.executable, "-c", _COPY, str(socket), str(out)]]
        if name == SOCKET:
            environment = {**os.environ, "PATH": str(_programs(directory))}
    else:
        uri = f"nbd+unix:///vda?socket={socket}"
        if name.startswith("nbdcopy"):
            size = str((directory / "disk.raw").stat().st_size)
            steps = [
                ["qemu-img", "create", "-q", "-f", "qcow2", str(out), size],
                [*name.split(), "--", uri, "[", "qemu-nbd", "-f", "qcow2", str(out), "]"],
            ]
        else:
            steps = [[*name.split(), "-f", "raw", "-O", "qcow2", uri, str(out)]]
    os.sync()
    before, begin = _processor(server.pid), time.perf_counter()
    for argv in steps:
        subprocess.run(argv, check=True, env=environment)
    took = time.perf_counter() - begin, _processor(server.pid) - before
    out.unlink()
    return took


def _programs(directory: pathlib.Path) -> pathlib.Path:
    """A directory with all programs that are needed but qemu-storage-daemon."""
    path = directory / "programs"
    if not path.exists():
        path.mkdir()
        for name in _WITHOUT_DAEMON:
            found = shutil.which(name)
            assert found is not None, name
            (path / name).symlink_to(found)
    return path


def _processor(pid: int) -> float:
    """Of all processes that have ended, and of PID so far."""
    words = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK") + ended.ru_utime + ended.ru_stime


if __name__ == "__main__":
    sys.exit(main())
