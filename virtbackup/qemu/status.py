# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of a domain's backup, on disk: any later process can stop it or clean up.

One JSON file and one lock a domain, in a directory of this user's, and a second file for the next
status, so that nothing that comes to that later keeps it from being written. And one that whoever
has begun a backup which ends with him keeps locked, as his number tells nothing in a container. The
status is written before the first command that changes QEMU and removed after the last. What runs,
QEMU says.
"""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import libvirt

from virtbackup import errors, runtime
from virtbackup.conf import backup_conf
from virtbackup.qemu import block, naming

logger = logging.getLogger(__name__)

VERSION = 10
"""Of what is written. Whoever raises it has ``_complete`` read the one before, as far as a verdict
that rests on it can be an honest one; a backup that is under way at an upgrade is ended so."""
_READ = range(8, VERSION + 1)
LOCK_TIMEOUT = 30.0
"""Seconds to wait for another process that starts, stops or looks at the same domain's backup."""
_LOCK_POLL = 0.01
_LOCK_TRIES = 50
"""How often it may be gone by the time that it is ours; else it is one that cannot be told so."""

_UNIT = 4096
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT = (errno.EINVAL, errno.ENOSYS)
_LIBC = ctypes.CDLL(None, use_errno=True)

_taken: "weakref.WeakValueDictionary[tuple[int, pathlib.Path], io.FileIO]" = (
    weakref.WeakValueDictionary()
)
"""The locks that a thread has, or is waiting for, until they are closed; of all connections."""
_owned: "weakref.WeakSet[io.FileIO]" = weakref.WeakSet()
"""As ``StatusFile.owned`` gives them."""


def _close_in_child() -> None:
    """In a process that was forked: the locks are those of the other one, which could not let go of
    one that is open here, too (flock(2))."""
    for lock in (*_taken.values(), *_owned):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)

Phase = Literal["starting", "running", "stopping"]


@dataclasses.dataclass(frozen=True)
class DiskStatus:
    """One disk, and the names of what was made for it."""

    target: str
    size: int
    node: naming.NodeName
    """The live disk's root node at the start."""
    device: str | None
    """The device's place in QEMU's object tree; None where there was none to be asked about."""
    image: naming.NodeName
    stores: tuple[naming.NodeName, ...]
    offset: int | None
    backing: tuple[block.Backing, ...] | None
    """As ``backup.DiskPlan``, in order. What an older version, which began the backup, did not note
    is None, here and in ``guards``."""
    guards: tuple[naming.NodeName, ...] | None
    """The nodes with a bitmap that keeps them from going back to a snapshot."""
    export: naming.ExportId
    exportname: str
    job: naming.JobId
    scratch_file: naming.NodeName
    access: naming.NodeName | None
    """The frozen disk where it is a node of its own."""
    breaks_snapshot: bool
    """When the scratch image fails, the backup breaks and not the guest's write."""
    directory: str
    """Where the scratch image is."""
    threshold: int | None
    """Bytes of the scratch image beyond which QEMU took a note; None: no need to."""
    path: str | None
    """What the scratch image is called while it has a name; None: it has, or will have, none."""
    inode: int | None
    """The scratch image's, once it is made."""
    type: backup_conf.DiskType
    type_reason: str | None
    branch: "BranchStatus | None"
    """What the backup's branch has on this disk; None without a branch."""


@dataclasses.dataclass(frozen=True)
class BranchStatus:
    """What was begun with one disk's bitmaps."""

    node: naming.NodeName
    """The image that has them."""
    keeps: bool
    """Its own bitmap stood still during the backup; else it is made when that was good."""
    since: naming.Point | None
    """The point since which the changes are told along with the disk; None: they are not."""
    dirty: int | None
    """Bytes that have changed since then, once that is known."""


@dataclasses.dataclass(frozen=True)
class Status:
    """One domain's backup. The file is this type as JSON."""

    id: naming.BackupId
    phase: Phase
    name: str
    uuid: str
    definition: str
    """The live ``<domainbackup>``."""
    engine: str
    started: float
    """Seconds since the epoch."""
    server: bool | None
    """Whether the NBD server is ours; None: not known yet, whatever listens on our address is."""
    socket: int | None
    """The inode of the server's unix socket, once there is one that can be seen from here."""
    qemu: runtime.Process | None
    owner: runtime.Process | None
    """The process whose end is the backup's end; None: it goes on without one."""
    given_up: str | None
    """Why the backup was ended before its time, by whoever watched it or by QEMU's end, to be told
    by the stop; None while it runs."""
    was_stopped: bool
    """The guest was paused for an I/O error already at the start: that is not for us to end."""
    cancelled: bool
    """The backup is not wanted, as a stop was told, or as nobody was told of its verdict: it is
    not to be a point of its branch, and where it is already, that is undone."""
    advanced: bool
    """The backup is the last point of its branch."""
    verdict: dict[str, str] | None
    """Disk -> why it is not good, once a stop has judged; None before."""
    told: bool
    """The verdict was told: all that is left is to be cleaned up."""
    save_failure: backup_conf.SaveFailure | None
    save_reason: str | None
    """As ``backup_conf.BackupInfo``."""
    branch: str | None
    advances: str | None
    """The branch of which the backup becomes a point where it is good: ``branch``, its fork, or
    none."""
    disks: tuple[DiskStatus, ...]

    @property
    def address(self) -> backup_conf.Address:
        """Where the NBD server listens."""
        return _address(self.definition)

    @property
    def forks(self) -> bool:
        """Whether another branch than its own begins with it."""
        return self.advances not in (None, self.branch)


@functools.lru_cache(maxsize=16)
def _address(definition: str) -> backup_conf.Address:
    return backup_conf.BackupDef.parse(definition).address


class OtherVersion(ValueError):
    """A status that another version of the package has written, and that this one cannot read."""

    def __init__(self, version: int, id: str) -> None:
        older = "a newer" if version > VERSION else "an older"
        super().__init__(
            f"backup {id} was begun by {older} version of virtbackup, whose status file, of version"
            f" {version}, cannot be read by this one, which reads {_READ[0]} to {_READ[-1]}"
        )
        self.id = id
        """The backup's."""


class Unusable(errors.Error):
    """A file of the state directory cannot be read or written, or the lock not be had for it."""

    def __init__(self, failure: OSError, what: str) -> None:
        described = errors.system_error(failure, what)
        super().__init__(
            libvirt.VIR_ERR_SYSTEM_ERROR,
            str(described),
            strings=("%s", str(described), None),
            ints=(failure.errno or 0, -1),
        )


def parse(text: str) -> Status:
    """Read a file. Errors: OtherVersion; another ValueError for what ``format`` did not write."""
    try:
        fields: dict[str, Any] = json.loads(text)
        version = fields.pop("version")
        if type(version) is int and version not in _READ:
            raise OtherVersion(version, str(fields["id"]))
        if version not in _READ:
            raise ValueError("no version")
        fields["disks"] = [_complete(disk) for disk in fields["disks"]]
        disks = tuple(_parse_disk(disk) for disk in fields.pop("disks"))
        qemu, owner = (fields.pop(key) for key in ("qemu", "owner"))
        _address(fields["definition"])
        return Status(
            disks=disks,
            qemu=None if qemu is None else _parse_process(qemu),
            owner=None if owner is None else _parse_process(owner),
            **fields,
        )
    except (
        KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, errors.Error
    ) as failure:  # fmt: skip
        raise ValueError(f"not a status: {failure!r}") from failure


def _parse_process(fields: Any) -> runtime.Process:
    """An older version has not noted from where it was seen."""
    return runtime.Process(int(fields[0]), int(fields[1]), *map(str, fields[2:3]))


def _complete(fields: dict[str, Any]) -> dict[str, Any]:
    """A disk of whatever version can be read, with what was not noted then.

    Without ``image`` it is taken to be ``node``, so that an image that comes between the two, as by
    a snapshot, is one too many: a verdict may be bad then where it could be good, never the other
    way round. Where the disk has no branch, whose bitmap does the same, it may have had a guard.
    """
    known = {"image": fields["node"], "offset": None, "backing": None, **fields}
    if "guards" not in known:
        guarded = known.pop("guarded", None if known["branch"] is None else False)
        known["guards"] = None if guarded is None else [known["image"]] if guarded else []
    return known


def _parse_disk(fields: dict[str, Any]) -> DiskStatus:
    stores = tuple(map(naming.NodeName, fields.pop("stores")))
    guards, backing, branch = (fields.pop(key) for key in ("guards", "backing", "branch"))
    if guards is not None:
        guards = tuple(map(naming.NodeName, guards))
    if backing is not None:
        backing = tuple(block.Backing(**one) for one in backing)
    if branch is not None:
        since = branch.pop("since")
        point = None if since is None else naming.Point(**since)
        branch = BranchStatus(since=point, **branch)
    return DiskStatus(branch=branch, stores=stores, guards=guards, backing=backing, **fields)


def format(status: Status) -> str:
    """The file's text."""
    # Not by asdict() and with an indent: that takes seven times as long.
    return json.dumps({"version": VERSION, **vars(status)}, default=vars) + "\n"


class Interrupted(errors.Error):
    """Who asks for a domain's lock has it already, or waits for it: a signal's handler, in the
    middle of a call that goes on once the handler is done."""

    def __init__(self) -> None:
        detail = "called by a signal's handler, in the middle of another call of this domain"
        super().__init__(
            libvirt.VIR_ERR_OPERATION_INVALID,
            f"Requested operation is not valid: {detail}",
            strings=("Requested operation is not valid: %s", detail, None),
        )


class StatusFile:
    """The file and the lock of one domain, KEY being the way to its monitor; in DIRECTORY, which is
    the user's state directory where it is not given."""

    def __init__(self, key: str, directory: pathlib.Path | None = None) -> None:
        stem = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:24]
        self.path = (directory or runtime.directory()) / f"{stem}.json"
        self._lock_path = _lock_path(self.path)
        self._partial = self.path.with_suffix(".partial")
        self._owner_path = _owner_path(self.path)

    def locked(self) -> io.FileIO:
        """Hold the domain's lock, until what this gives is closed: it is the context for that, and
        one that ends without a line of Python in which a signal's exception could come (SIGINT).

        Errors: VIR_ERR_OPERATION_TIMEOUT, Unusable, Interrupted.
        """
        if self.is_taken_here():
            raise Interrupted
        lock = None
        end = time.monotonic() + LOCK_TIMEOUT
        try:
            for left in reversed(range(_LOCK_TRIES)):
                runtime.make_directory()
                lock = io.FileIO(self._lock_path, "r+", opener=_open_or_make)
                _taken[threading.get_ident(), self._lock_path] = lock
                _acquire(lock.fileno(), self._lock_path, end)
                # Where it was removed meanwhile, who comes later locks another one.
                if not left or _is_at(self._lock_path, lock.fileno()):
                    break
                lock.close()
        except BaseException as failure:
            if lock is not None:
                lock.close()
            if isinstance(failure, OSError):
                raise Unusable(failure, f"cannot open state lock '{self._lock_path}'") from failure
            raise
        assert lock is not None
        return lock

    def is_taken_here(self) -> bool:
        """Whether this thread has the lock, or waits for it: we are in a signal's handler."""
        lock = _taken.get((threading.get_ident(), self._lock_path))
        return lock is not None and not lock.closed

    def owned(self) -> io.FileIO:
        """Tell processes that cannot see ours that the one is there with which a backup ends, until
        what this gives is closed. Errors: Unusable."""
        try:
            held = io.FileIO(self._owner_path, "r+", opener=_open_or_make)
            _owned.add(held)
            fcntl.flock(held.fileno(), fcntl.LOCK_SH)
        except OSError as failure:
            raise Unusable(failure, f"cannot open '{self._owner_path}'") from failure
        return held

    def load(self) -> Status | None:
        """The status, or None where there is none (a broken one, or one of another version, is
        logged and counts so).

        Errors: Unusable, when the file is there and cannot be read.
        """
        try:
            return self._read()
        except ValueError as failure:
            logger.warning("status=%s unreadable: %s", self.path, failure)
            return None

    def of_other_version(self) -> OtherVersion | None:
        """Why the status, where ``load`` gives none, is one of another version. Errors: as
        ``load``."""
        try:
            self._read()
        except OtherVersion as other:
            return other
        except ValueError:
            pass
        return None

    def _read(self) -> Status | None:
        """Errors: as ``load``, and as ``parse``."""
        try:
            return parse(runtime.read_file(self.path).decode())
        except FileNotFoundError:
            return None
        except OSError as failure:
            raise Unusable(failure, f"cannot read status '{self.path}'") from failure

    def save(self, status: Status) -> None:
        """Replace the file; whoever reads sees the old one or the new one. The first time there has
        to be room for two, one of which is the next one's: as a backup that runs has to come to its
        end, where there is no room any more, too. Errors: Unusable."""
        data = format(status).encode()
        try:
            is_first = not self.path.exists()
            _write_over(self._partial, data)
            if not is_first and _are_exchanged(self._partial, self.path):
                return
            self._partial.replace(self.path)
            try:
                _write_over(self._partial, data)
            except OSError:
                if is_first:
                    self.path.unlink()
                    raise
        except OSError as failure:
            raise Unusable(failure, f"cannot write status '{self.path}'") from failure

    def remove(self) -> None:
        """Forget the backup. Errors: Unusable."""
        try:
            self.path.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)
            self._owner_path.unlink(missing_ok=True)
        except OSError as failure:
            raise Unusable(failure, f"cannot remove status '{self.path}'") from failure


def has_owner(path: pathlib.Path, owner: runtime.Process | None) -> bool:
    """Whether OWNER, of the backup whose status is at PATH, is still there, or it goes on without
    one."""
    if owner is None:
        return True
    if runtime.is_seen(owner):
        return runtime.is_alive(owner)
    return runtime.is_held(_owner_path(path))


def is_locked(path: pathlib.Path) -> bool:
    """Whether somebody has the lock of the domain whose status is at PATH."""
    return runtime.is_held(_lock_path(path))


def _lock_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".lock")


def _owner_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".owner")


def all_in(directory: pathlib.Path) -> Iterator[tuple[pathlib.Path, Status]]:
    """The status files of a directory, whosever domains they are about; not those that cannot be
    read."""
    for path, found in _files_in(directory):
        if isinstance(found, Status):
            yield path, found


def of_other_versions_in(
    directory: pathlib.Path,
) -> Iterator[tuple[pathlib.Path, OtherVersion]]:
    """Those of a directory that ``all_in`` leaves out for their version."""
    for path, found in _files_in(directory):
        if isinstance(found, OtherVersion):
            yield path, found


def _files_in(directory: pathlib.Path) -> Iterator[tuple[pathlib.Path, Status | OtherVersion]]:
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            try:
                found: Status | OtherVersion = parse(runtime.read_file(path).decode())
            except OtherVersion as other:
                found = other
            yield path, found


def _open_or_make(path: str | os.PathLike[str], flags: int) -> int:
    return runtime.open_file(path, flags | os.O_CREAT)


def _write_over(path: pathlib.Path, data: bytes) -> None:
    """Have the file at PATH begin with DATA, the rest blank; it takes no more room if it is large
    enough, which it is made with some to spare."""
    with os.fdopen(_open_or_make(path, os.O_RDWR), "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size < len(data):
            size = -(-2 * len(data) // _UNIT) * _UNIT
        file.write(data.ljust(size))


def _are_exchanged(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchange two files' names in one step; not where their file system cannot."""
    first, second = (ctypes.c_char_p(os.fsencode(path)) for path in (one, other))
    if not _LIBC.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number))


def _is_at(path: pathlib.Path, fd: int) -> bool:
    """Whether what is at PATH is the file that FD is of. Errors: OSError."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _is_taken_by_others_here(path: pathlib.Path) -> bool:
    """Whether another thread of this process has the lock at PATH, or waits for it."""
    return any(
        at == path and thread != threading.get_ident() and not lock.closed
        for (thread, at), lock in list(_taken.items())
    )


def _acquire(fd: int, path: pathlib.Path, end: float) -> None:
    """Lock FD before END by the monotonic clock. Errors: OSError, VIR_ERR_OPERATION_TIMEOUT."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as failure:
            if time.monotonic() > end:
                who = "another process"
                if _is_taken_by_others_here(path):
                    who += ", or another call of this one,"
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_TIMEOUT,
                    f"cannot acquire state lock '{path}': {who} works on this domain",
                ) from failure
        time.sleep(_LOCK_POLL)
