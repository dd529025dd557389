# SPDX-License-Identifier: LGPL-2.1-or-later
"""The disks of a point over NBD, as they were then: to look into a backup without restoring it.

QEMU's storage daemon opens a disk's files as their manifests tell, one behind the other, and for
reading only. It ends with this process, whatever ends that.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import IO

import libvirt

from virtbackup import config, errors, runtime
from virtbackup.conf import backup_conf
from virtbackup.nbd import copy
from virtbackup.tools import interrupt, listing, verify

PROGRAM = "qemu-storage-daemon"

_BEHIND = re.compile(r"(Could not open backing file: )+")
"""What QEMU says once for each file of a chain before it names the one that it is about."""
_START_TIMEOUT = 30.0
_FILE_TIMEOUT = 1.0
"""For each file more that QEMU opens: what it takes for one grows with those that are behind it."""
_END_TIMEOUT = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass
class Server:
    """A server that runs."""

    process: "subprocess.Popen[bytes]"
    log: IO[bytes]
    address: backup_conf.Address

    def wait(self, cancel: copy.Cancel) -> None:
        """Until CANCEL is set. Errors: VIR_ERR_OPERATION_FAILED when the server ended first."""
        poll = select.poll()
        poll.register(cancel, select.POLLIN)
        fd = os.pidfd_open(self.process.pid)
        try:
            with interrupt.woken() as woken:
                poll.register(fd, select.POLLIN)
                poll.register(woken, select.POLLIN)
                while not (ready := {found for found, _ in poll.poll()} - {woken.fileno()}):
                    woken.recv(1 << 12)
        finally:
            os.close(fd)
        if cancel.fileno() not in ready:
            raise self.failed()

    def failed(self) -> errors.Error:
        """What the server said at last."""
        status = self.process.wait()
        self.log.seek(0)
        # Of one that was killed the last words are about something else.
        said = self.log.read().decode(errors="replace").splitlines() if status > 0 else []
        reason = self._without_options(said[-1]) if said else f"it ended with status {status}"
        return errors.error(libvirt.VIR_ERR_OPERATION_FAILED, f"{PROGRAM}: {reason}")

    def _without_options(self, said: str) -> str:
        """What a line says without the option that it is about, which may be long."""
        reason = _BEHIND.sub("", said.removeprefix(f"{PROGRAM}: "))
        assert isinstance(self.process.args, list)
        for option, value in itertools.pairwise(self.process.args):
            reason = reason.removeprefix(f"{option} {value}: ")
        return reason


@contextlib.contextmanager
def serving(
    backups: listing.Backups,
    point: listing.Point,
    names: Sequence[str],
    address: backup_conf.Address | None = None,
    *,
    progress: copy.Progress | None = None,
    cancel: copy.Cancel | None = None,
) -> Iterator[Server]:
    """A server of the disks NAMES of POINT, each an export of its name; it answers from here on and
    is gone afterwards, and so is its socket. Without ADDRESS only this user reaches it.

    Errors: VIR_ERR_INVALID_ARG for a name; VIR_ERR_OPERATION_FAILED for a file that is not as its
    manifest says, as far as that is seen without reading all of it, and for ADDRESS; those of
    ``verify.checked``; VIR_ERR_OPERATION_INVALID where something is at the socket's path, and where
    a prune has changed meanwhile what POINT is made of.
    """
    verify.need(PROGRAM)
    with contextlib.ExitStack() as undo:
        with backups.telling_of_prunes(point):
            server = _serve(backups, point, names, address, undo, progress, cancel)
        backups.check_not_pruned(point)  # from here on it has all files open
        yield server


def _serve(
    backups: listing.Backups,
    point: listing.Point,
    names: Sequence[str],
    address: backup_conf.Address | None,
    undo: contextlib.ExitStack,
    progress: copy.Progress | None,
    cancel: copy.Cancel | None,
) -> Server:
    """A server that answers; UNDO ends it."""
    argv = [PROGRAM]
    files: list[listing.Link] = []
    for index, name in enumerate(names):
        links = backups.links(point, name)
        listing.check(links)
        links = verify.checked(links, progress, cancel)
        files += links
        argv += ["--blockdev", json.dumps({**tree(links), "node-name": f"disk{index}"})]
        argv += ["--export", json.dumps(_export(index, name))]
    private = config.private_directory(undo)
    where = address or backup_conf.UnixAddress(str(private / "nbd.sock"))
    ready = private / "pid"
    argv[1:1] = ["--nbd-server", _address(where)]
    argv += ["--pidfile", str(ready)]
    log = undo.enter_context((private / "log").open("w+b"))
    if isinstance(where, backup_conf.UnixAddress):
        _make_room(pathlib.Path(where.path))
        undo.callback(_remove, pathlib.Path(where.path))
    server = Server(_start(argv, log), log, where)
    undo.callback(_end, server.process)
    _wait_until_it_listens(server, ready, _START_TIMEOUT + len(files) * _FILE_TIMEOUT, cancel)
    _check_opened(server, backups, files, private)
    return server


def _check_opened(
    server: Server,
    backups: listing.Backups,
    links: Sequence[listing.Link],
    private: pathlib.Path,
) -> None:
    """Raise VIR_ERR_OPERATION_FAILED where the server has a file open that is not one of LINKS, as
    they were looked at: what is in the directory may lead to any by now."""
    elsewhere = {os.path.realpath(link.path) if link.named else str(link.path) for link in links}
    directories = (backups.directory, private)
    try:
        for file in _opened(server.process.pid):
            if str(file) in elsewhere or any(_is_same(file.parent, one) for one in directories):
                continue
            raise listing.bad(
                f"{backups.directory} was changed while it was opened, and leads to {file}"
            )
    except OSError as failure:
        if server.process.poll() is None:
            text = f"cannot see what {PROGRAM} has open"
            raise errors.system_error(failure, text) from failure
    if server.process.poll() is not None:
        raise server.failed()


def _opened(pid: int) -> Iterator[pathlib.Path]:
    """The files and block devices that process PID, which is ours, has open. Errors: OSError."""
    for fd in (runtime.in_proc(pid) / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a client has left
            file = fd.readlink()
            if fd.is_file() or fd.is_block_device():
                yield file


def _is_same(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether both are one directory: by its name, or as it is where a name may be written in more
    ways than one, which the kernel tells but one of."""
    with contextlib.suppress(OSError):
        return str(one) == os.path.realpath(other) or one.samefile(other)
    return False


def _make_room(path: pathlib.Path) -> None:
    """Remove a socket at PATH that nobody serves any more, as of a server that was killed. Errors:
    something else is there, or somebody just listens there, or pulls into the directory it is in.
    """
    try:
        if runtime.is_left_over(str(path)):
            with runtime.alone_in(str(path.parent), wait=False):
                if runtime.is_left_over(str(path)):
                    path.unlink()
    except OSError as failure:
        raise errors.system_error(failure, f"cannot listen at {path}") from failure
    if os.path.lexists(path):
        raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, f"{path} exists already")


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def tree(links: Sequence[listing.Link]) -> dict[str, object]:
    """How QEMU opens LINKS, the newest first, as a disk, whatever they say is behind them."""
    top: dict[str, object] | None = None
    for link in reversed(links):
        node = {**verify.node(link), "read-only": True}
        node["file"] = {**verify.file_node(link), "read-only": True}
        if link.disk.format == "qcow2":
            node["backing"] = top
        top = node
    assert top is not None
    return top


def _export(index: int, name: str) -> dict[str, object]:
    return {
        "type": "nbd", "id": f"export{index}", "node-name": f"disk{index}", "name": name,
        "writable": False,
    }  # fmt: skip


def _address(address: backup_conf.Address) -> str:
    """The option's value, not in JSON: a path need not be UTF-8."""
    if isinstance(address, backup_conf.UnixAddress):
        told = {"type": "unix", "path": address.path}
    else:
        told = {"type": "inet", "host": address.host, "port": str(address.port)}
    return ",".join(f"addr.{name}={value.replace(',', ',,')}" for name, value in told.items())


def _start(argv: Sequence[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    parent = os.getpid()

    def before_exec() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before that
            os._exit(1)

    try:
        # A session of its own: ^C is for us, who end it.
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=before_exec, umask=0o077,
        )  # fmt: skip
    except OSError as failure:
        raise errors.system_error(failure, f"cannot run {PROGRAM}") from failure


def _wait_until_it_listens(
    server: Server, ready: pathlib.Path, timeout: float, cancel: copy.Cancel | None
) -> None:
    """The daemon writes its pid file, READY, once it has made everything else. Errors: it ended, or
    has not done so in TIMEOUT seconds; VIR_ERR_OPERATION_ABORTED when cancelled."""
    end = time.monotonic() + timeout
    while not ready.exists():
        if cancel is not None:
            cancel.check()
        if server.process.poll() is not None:
            raise server.failed()
        if time.monotonic() > end:
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, f"{PROGRAM} does not answer")
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(0.01)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
