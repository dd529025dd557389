# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of ours outlives a process, and whose it is: the state directory, processes named for good,
and private directories that are swept once their owner is gone."""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import socket
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple


class Process(NamedTuple):
    """A process for good, as pids are used again."""

    pid: int
    start: int
    """In clock ticks since boot."""
    seen_from: str = ""
    """The namespaces in which it has that number and began then; empty: not noted."""


_PATHS = ("VIRTBACKUP_CONF", "VIRTBACKUP_SCRATCH_DIR", "VIRTBACKUP_STATE_DIR")
_NAMESPACES = ("pid", "time")
_TCP_LISTEN = "0A"
_UCRED = struct.Struct("iII")
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_PRIVATE = re.compile(r"private-(\d+)-(\d+)-\w+")
_PIDFD_GETFD = 438
_HELD = "held"
"""What a private directory's owner has locked; not itself, in which he may want to listen alone."""


def settle_paths() -> None:
    """Have the environment's paths of ours lead where they do now, wherever this process goes.
    Errors: OSError, where one of them begins in a working directory that is gone."""
    for name in _PATHS:
        if given := os.environ.get(name):
            try:
                os.environ[name] = str(pathlib.Path(given).absolute())
            except OSError as failure:
                raise OSError(failure.errno, failure.strerror, f"{name}={given}") from failure


def directory() -> pathlib.Path:
    """Where our files live: $VIRTBACKUP_STATE_DIR, root's /run/virtbackup, or the user's."""
    if own := os.environ.get("VIRTBACKUP_STATE_DIR"):
        return pathlib.Path(own).absolute()
    if os.geteuid() == 0:
        return pathlib.Path("/run/virtbackup")
    return (users_directory("XDG_RUNTIME_DIR") or home() / ".cache") / "virtbackup"


def home() -> pathlib.Path:
    """The user's; the root directory where none is known, as for a number that is no user's, or
    where that would be another one from another directory."""
    found = os.path.expanduser("~")  # noqa: PTH111
    return pathlib.Path(found if found.startswith("/") else "/")


def users_directory(variable: str) -> pathlib.Path | None:
    """What VARIABLE names; None where it does not, or by a relative path, which is not one for all
    that the user runs (XDG base directory specification)."""
    given = os.environ.get(variable, "")
    return pathlib.Path(given) if given.startswith("/") else None


def make_directory() -> pathlib.Path:
    """``directory``, made where absent, for this user alone. Errors: OSError."""
    made = directory()
    try:
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as failure:
        number = errno.ENOTDIR
        raise NotADirectoryError(number, os.strerror(number), os.fspath(made)) from failure
    return made


def open_file(path: str | os.PathLike[str], flags: int) -> int:
    """As ``os.open``, of a file, this user's alone where it is made. What is none is neither waited
    for nor read: a FIFO would block, a device may have no end. Errors: OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "it is no file", os.fspath(path))


def status(path: pathlib.Path) -> os.stat_result | None:
    """Of what PATH leads to; None: nothing is there. Errors: OSError, where that is not known, for
    which pathlib's ``exists``, ``is_file`` and the like say no since Python 3.14."""
    try:
        return path.stat()
    except OSError as failure:
        if failure.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def read_file(path: str | os.PathLike[str], most: int = -1) -> bytes:
    """What is in the file at PATH, its first MOST bytes. Errors: OSError, as ``open_file``."""
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as opened:
        try:
            data: bytes | None = opened.read(most)
        except OSError as failure:
            raise OSError(failure.errno, failure.strerror, os.fspath(path)) from failure
    if data is None:  # /proc/kmsg, say, calls itself a file
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), os.fspath(path))
    return data


def process_start(pid: int) -> int | None:
    """When process PID began, in clock ticks since boot; None when there is none."""
    fields = stat_of(pid)
    if not fields or fields[0] in (b"Z", b"X"):
        return None  # it has ended, and its parent has not looked yet
    return int(fields[19])


def name_of_qemu(pid: int) -> str | None:
    """What process PID goes by: the name of a QEMU (``kvm`` is Debian's) or qemu-storage-daemon;
    None of another one."""
    try:
        name = pathlib.Path(f"/proc/{pid}/comm").read_text(errors="replace").removesuffix("\n")
    except OSError:
        return None
    return name if name.startswith("qemu-") or name == "kvm" else None


def is_stopped(pid: int) -> bool:
    """Whether process PID stands still, as a signal or a debugger has made it to."""
    return stat_of(pid)[:1] in ([b"T"], [b"t"])


def stat_of(pid: int) -> list[bytes]:
    """What is told of process PID from its state on (proc(5)); nothing where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  (bytes, not a path at rest)
            text = file.read()
    except OSError:
        return []
    # The command's name may hold anything; what follows its last bracket is orderly.
    return text[text.rindex(b")") + 2 :].split()


def in_proc(pid: int) -> pathlib.Path:
    """The directory in /proc of PID, a process that is ours to wait for: where /proc is of another
    namespace, that has another number there (proc(5)). Errors: OSError."""
    fd = os.pidfd_open(pid)
    try:
        text = pathlib.Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    if (found := re.search(r"^Pid:\s+(\d+)$", text, re.MULTILINE)) is None:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return pathlib.Path("/proc", found[1])


def process_user(pid: int) -> int | None:
    """The user that process PID acts as; None when there is none (proc(5))."""
    with contextlib.suppress(OSError):
        status = pathlib.Path(f"/proc/{pid}/status").read_text(errors="replace")
        if found := re.search(r"^Uid:\s+\d+\s+(\d+)", status, re.MULTILINE):
            return int(found[1])
    return None


def peer_of(connected: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of who is at the other end of a unix socket, by the kernel's word: of a
    server, as it was when it began to listen. The pid is 0 where it cannot be seen from here
    (SO_PEERCRED). Errors: OSError."""
    told = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(told)
    return pid, uid, gid


@contextlib.contextmanager
def alone_in(directory: str, wait: bool = True) -> Iterator[None]:
    """While nobody else who asks for this is about to listen there: he might take what is not
    served yet for what is left over. Errors: OSError; without WAIT, BlockingIOError where somebody
    is, or holds the directory for something else, as a pull does, which may take hours."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def is_left_over(path: str) -> bool:
    """Whether PATH is a socket that nobody serves."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                return False
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def not_accepted_by(connected: socket.socket) -> int:
    """The process that listens where a TCP connection leads, and has not accepted it; 0 where there
    is none, or it cannot be seen from here: it is of another machine, or of another network
    (proc(5)). Errors: OSError."""
    here, there = (f":{name[1]:04X}" for name in (connected.getsockname(), connected.getpeername()))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in pathlib.Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    theirs = [row[9] for row in rows if row[1].endswith(there) and row[2].endswith(here)]
    if theirs != ["0"]:  # the other end: once it is accepted, it has an inode
        return 0
    listens = {int(row[9]) for row in rows if row[1].endswith(there) and row[3] == _TCP_LISTEN}
    every = map(int, _numbers("/proc"))
    found = {pid for pid in every if listens.intersection(sockets_of(pid).values())}
    return found.pop() if len(found) == 1 else 0


def sockets_of(pid: int) -> dict[int, int]:
    """Descriptor of process PID -> the socket's inode, of those that are one; none where we may not
    look (proc(5))."""
    found = {}
    for number in _numbers(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/{pid}/fd/{number}")  # noqa: PTH115
            if match := _SOCKET.fullmatch(name):
                found[int(number)] = int(match[1])
    return found


def duplicate(process: int, number: int) -> int:
    """Another descriptor of what the process that the pidfd PROCESS is of has open as NUMBER, for
    the caller to close: of the same open file (pidfd_getfd(2), Linux 5.6). Errors: OSError, where
    we may not trace it."""
    import ctypes  # a millisecond to load, and only a stop needs it

    fd: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, number, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _numbers(directory: str) -> list[str]:
    with contextlib.suppress(OSError):
        return list(filter(str.isdecimal, os.listdir(directory)))  # noqa: PTH208
    return []


def this_process() -> Process:
    """Ourselves."""
    pid = os.getpid()
    return Process(pid, process_start(pid) or 0, namespaces())


def namespaces() -> str:
    """Ours, of those that a process's number and its start depend on (pid_namespaces(7),
    time_namespaces(7))."""
    found = []
    for kind in _NAMESPACES:
        with contextlib.suppress(OSError):  # Linux before 5.6 has none of time
            found.append(os.readlink(f"/proc/self/ns/{kind}"))  # noqa: PTH115
    return " ".join(found)


def is_seen(process: Process) -> bool:
    """Whether PROCESS can be seen from here at all, as far as that was noted: one of a container,
    say, has another number here, or none."""
    return process.seen_from in ("", namespaces())


def is_alive(process: Process) -> bool:
    """Whether PROCESS still runs; one that cannot be seen from here is taken to."""
    return not is_seen(process) or process_start(process.pid) == process.start


def are_different(one: Process, other: Process) -> bool:
    """Whether two processes are not one and the same, as far as that can be told."""
    unknown = one.seen_from != other.seen_from and "" not in (one.seen_from, other.seen_from)
    return not unknown and one[:2] != other[:2]


@contextlib.contextmanager
def private_directory() -> Iterator[pathlib.Path]:
    """A directory that only this user reaches, for sockets and files; gone afterwards, or with the
    first ``sweep`` after this process was killed. Errors: OSError."""
    pid, start, _ = this_process()
    made = make_directory() / f"private-{pid}-{start}-{os.urandom(8).hex()}"
    made.mkdir(mode=0o700)
    try:
        with _held(made / _HELD):
            yield made
    finally:
        _remove(made)


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[None]:
    """Make the file at PATH, of which ``is_held`` tells while this lasts. Where the file system has
    no locks, nobody does."""
    with contextlib.ExitStack() as undo:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield


def is_held(path: pathlib.Path) -> bool:
    """Whether a process has a lock (flock(2)) on what is at PATH, be it one that cannot be seen
    from here."""
    with contextlib.ExitStack() as undo, contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        undo.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def sweep() -> list[str]:
    """Remove the private directories of processes that are gone; a line for each."""
    removed = []
    place = directory()
    names = []
    with contextlib.suppress(OSError):
        # As text: there may be thousands of other files, of as many domains.
        names = sorted(name for name in os.listdir(place) if name.startswith("private-"))  # noqa: PTH208
    for name in names:
        match = _PRIVATE.fullmatch(name)
        if match is None or is_alive(Process(int(match[1]), int(match[2]))):
            continue
        path = place / name
        if not is_held(path / _HELD) and _remove(path):
            removed.append(f"directory '{path}'")
    return removed


def _remove(path: pathlib.Path) -> bool:
    """Whether a private directory is gone now; there are no directories in it."""
    with contextlib.suppress(OSError):
        for inside in path.iterdir():
            inside.unlink()
        path.rmdir()
        return True
    return False
