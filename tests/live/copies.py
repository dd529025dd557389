# SPDX-License-Identifier: LGPL-2.1-or-later
"""What copies are made of and compared with: servers, who watches, and what has to come out."""

import contextlib
import itertools
import os
import pathlib
import socket
import subprocess
from collections.abc import Callable, Collection, Iterator

import xxhash

from tests import waiting
from tests.live import nbdclient, places
from virtbackup.nbd import checksum, connection

BLOCK = checksum.BLOCK


# --- servers --------------------------------------------------------------------------------------


class Server:
    """A server process, one export of it, and the whole of what it serves."""

    def __init__(self, process: subprocess.Popen[bytes], export: connection.Export) -> None:
        self.process = process
        self.export = export

    def contents(self) -> bytes:
        """By nbdcopy, in requests that every server of these tests takes."""
        assert isinstance(self.export.server, str)
        uri = nbdclient.uri(pathlib.Path(self.export.server), self.export.name)
        argv = ["nbdcopy", "--request-size=16384", uri, "-"]
        return subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout


@contextlib.contextmanager
def running(argv: list[str], ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that is READY."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        waiting.until(ready, process=process)
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def nbdkit(directory: pathlib.Path, *argv: str) -> Iterator[Server]:
    """An nbdkit with ARGV on a unix socket."""
    path, ready = directory / "kit.sock", directory / "kit.pid"
    for old in (path, ready):
        old.unlink(missing_ok=True)
    command = ["nbdkit", "-f", "--exit-with-parent", "-U", str(path), "-P", str(ready), *argv]
    with running(command, ready.exists) as process:
        yield Server(process, connection.Export(str(path), "disk"))


@contextlib.contextmanager
def qemu_nbd(directory: pathlib.Path, *argv: str) -> Iterator[Server]:
    """A read-only qemu-nbd with ARGV on a unix socket, for any number of clients."""
    path = directory / "qemu.sock"
    command = ["qemu-nbd", "-r", "-t", "-e", "8", "-x", "disk", "-k", str(path), *argv]
    with running(command, lambda: accepts(path)) as process:
        yield Server(process, connection.Export(str(path), "disk"))


@contextlib.contextmanager
def qemu_nbd_on_a_port(*argv: str) -> Iterator[Server]:
    """The same on a TCP port."""
    where = ("127.0.0.1", places.free_port())
    command = ["qemu-nbd", "-r", "-t", "-e", "8", "-x", "disk", "-b", where[0], "-p", str(where[1])]
    with running([*command, *argv], lambda: _greets(where)) as process:
        yield Server(process, connection.Export(where, "disk"))


def _greets(where: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(where) as client:
            return client.recv(8) == b"NBDMAGIC"
    except OSError:
        return False


def accepts(path: pathlib.Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def children(pid: int = os.getpid()) -> dict[int, str]:
    """pid -> program of every child of PID that is not dead."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = words[2].split()[:2]
        if int(parent) == pid and state != "Z":
            found[int(path.parent.name)] = words[0].partition("(")[2]
    return found


# --- progress -------------------------------------------------------------------------------------


class Watch:
    """Progress that counts, and does something at the first byte or at the start."""

    def __init__(
        self,
        at_first_byte: Callable[[], object] | None = None,
        at_start: Callable[[], object] | None = None,
    ) -> None:
        self.sizes: dict[int, int] = {}
        self.counts: dict[int, int] = {}
        self._at_first_byte = at_first_byte
        self._at_start = at_start

    def start(self, index: int, size: int) -> None:
        self.sizes[index] = size
        self.counts[index] = 0
        if self._at_start is not None:
            self._at_start()

    def advance(self, index: int, count: int) -> None:
        assert count > 0
        if self._at_first_byte is not None:
            self._at_first_byte()
            self._at_first_byte = None
        self.counts[index] += count


# --- what comes out -------------------------------------------------------------------------------


def image_bytes(path: pathlib.Path, fmt: str) -> bytes:
    """What QEMU reads from an image that it has found whole."""
    if fmt == "raw":
        return path.read_bytes()
    subprocess.run(["qemu-img", "check", "-q", "-f", fmt, path], check=True)
    raw = path.with_suffix(".flat")
    subprocess.run(["qemu-img", "convert", "-f", fmt, "-O", "raw", path, raw], check=True)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def defined_checksum(disk: bytes, held: Collection[int] | None = None) -> str:
    """By the definition, in the words of ``virtbackup.nbd.checksum``: of all of a disk, or of an
    increment that has the blocks HELD of it."""
    entries: list[bytes] = []
    blocks = range(-(-len(disk) // BLOCK))
    for is_held, run in itertools.groupby(blocks, lambda block: held is None or block in held):
        if is_held:
            starts = (block * BLOCK for block in run)
            entries += [xxhash.xxh3_128_digest(disk[at : at + BLOCK]) for at in starts]
        else:
            entries.append(len(list(run)).to_bytes(16, "big"))
    value: str = xxhash.xxh3_128_hexdigest(b"".join(entries))
    return value
