# SPDX-License-Identifier: LGPL-2.1-or-later
"""A directory with the backups of one branch of one guest: what is there, and what may follow.

Backup NUMBER (from 1 on) of disk NAME is ``NAME.NUMBER.FORMAT``; an increment is a qcow2 overlay
over an earlier file of the same disk, so any file of a disk opens as what the disk was then. A pull
that was cut off between the backup's verdict and its last rename leaves all it needs under partial
names: whether the branch moved on to it tells the next pull whether to keep it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import pathlib
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import libvirt

from virtbackup import api, errors, runtime
from virtbackup.conf import backup_conf
from virtbackup.nbd import checksum, header, qcow2
from virtbackup.tools import manifest

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
MERGED = ".merged"
"""What a prune makes aside: an image or a manifest that is to take the place of that name."""

_LOOK = 0.02
"""Seconds, longer than ``is_locked`` has a lock."""
_MANIFEST = re.compile(r"manifest\.([0-9]{4,9})\.json")
_PARTIAL = re.compile(r".+\.([0-9]{4,9})\.(qcow2|raw|json)" + re.escape(PARTIAL))


@dataclasses.dataclass(frozen=True)
class Chain:
    """The backups that DIRECTORY has, the oldest first."""

    directory: pathlib.Path
    backups: tuple[manifest.Manifest, ...]

    @property
    def next_number(self) -> int:
        return 1 + max((backup.number or 0 for backup in self.backups), default=0)

    def last(self, disk: str) -> tuple[manifest.Manifest, manifest.Disk] | None:
        """The newest backup that has a DISK of that name."""
        for backup in reversed(self.backups):
            for found in backup.disks:
                if found.name == disk:
                    return backup, found
        return None

    def gap(self, disk: str, line: backup_conf.BranchDisk | None) -> str | None:
        """Why DISK, of which LINE is what the guest has of the branch, cannot have an increment
        here; None: it can."""
        if (last := self.last(disk)) is None:
            return f"{self.directory} has no backup of it"
        backup, found = last
        if line is None:
            return "the guest has nothing of the branch on it"
        if line.reason is not None:
            return line.reason
        if line.point is None or line.point.id != backup.id:
            point = "none" if line.point is None else f"'{line.point.id}'"
            return (
                f"the last backup of the branch is {point}, and '{backup.id}' that in"
                f" {self.directory}: what changed between them is not known"
            )
        return self._broken(found)

    def _broken(self, disk: manifest.Disk) -> str | None:
        """Why the files that DISK's last backup is made of are not all there, and theirs, as far as
        that is seen without reading them."""
        by_file = {found.file: (backup, found) for backup in self.backups for found in backup.disks}
        above: manifest.Disk | None = None
        file: str | None = disk.file
        seen: set[str] = set()
        while file is not None:
            if file not in by_file:
                return f"{self.directory} has no manifest of {file}"
            if file in seen:
                return f"{self.directory / file} is behind itself"
            seen.add(file)
            backup, found = by_file[file]
            if own := file_problem(self.directory / file, found):
                return f"{self.directory / file}: {own}"
            if above is not None and (problem := other_backup(above, backup)):
                return f"{self.directory / above.file}: {problem}"
            above, file = found, found.backing
        return None


def other_backup(disk: manifest.Disk, behind: manifest.Manifest) -> str | None:
    """Why BEHIND, which has the file that DISK, an increment, is over, is not the backup that DISK
    follows; None: it is, as far as is told."""
    if disk.since is None or disk.since == behind.id:
        return None
    return f"it follows backup '{disk.since}', and {disk.backing} is of '{behind.id}'"


def read_header(path: pathlib.Path) -> header.Header:
    """Of a qcow2 image. Errors: OSError, for what is no file, too; BadHeader."""
    return header.parse(runtime.read_file(path, header.SIZE))


def file_problem(path: pathlib.Path, disk: manifest.Disk) -> str | None:
    """What can be seen of the file of DISK, without reading all of it, not to be as its manifest
    says; that it cannot be read, too."""
    try:
        return seen_problem(path, disk)
    except OSError as failure:
        return f"it cannot be read: {failure.strerror}"


def seen_problem(path: pathlib.Path, disk: manifest.Disk) -> str | None:
    """The same. Errors: OSError, where nothing is known of the file."""
    if disk.type == "block":
        return _problem_of_device(path, disk)
    status = runtime.status(path)
    if status is None or not stat.S_ISREG(status.st_mode):
        return "it is no file" if status else "it is missing"
    found = status.st_size
    if disk.format == "raw":
        return None if found == disk.size else f"it has {found} bytes, expected {disk.size}"
    if disk.format != "qcow2":
        return f"format '{disk.format}' is unknown"
    try:
        own = _problem_of_qcow2(disk, read_header(path))
    except header.BadHeader as failure:
        own = str(failure)
    if own is not None:
        return own
    # With more behind its end, which a verify tells, it has the disk all the same.
    is_cut = disk.length is not None and found < disk.length
    return f"it has {found} bytes, expected {disk.length}" if is_cut else None


def _problem_of_device(path: pathlib.Path, disk: manifest.Disk) -> str | None:
    status = runtime.status(path)
    if status is None or not stat.S_ISBLK(status.st_mode):
        return "it is no block device" if status else "it is missing"
    if disk.format != "raw" or disk.backing is not None:
        return "a block device has a whole disk, raw"
    with path.open("rb") as device:
        found = device.seek(0, os.SEEK_END)
    return None if found >= disk.size else (
        f"it has {found} bytes, expected at least {disk.size}"
    )  # fmt: skip


def _problem_of_qcow2(disk: manifest.Disk, found: header.Header) -> str | None:
    if found.external_data or found.encrypted:
        return "its data is encrypted or in another file, so it is not of a backup"
    size = qcow2.virtual_size(disk.size)
    if found.size != size:
        return f"it is a disk of {found.size} bytes, expected {size}"
    backing = None if found.backing is None else found.backing.removeprefix("./")
    if backing != disk.backing:
        return f"its backing file is {backing or 'none'}, expected {disk.backing or 'none'}"
    if disk.backing is not None and found.cluster % checksum.BLOCK:
        return f"it is no increment: its clusters have {found.cluster} bytes"
    return None


def make(directory: pathlib.Path, undo: contextlib.ExitStack) -> None:
    """Make DIRECTORY, and what it is in, where absent; UNDO removes what was made, unless somebody
    has put something there. Its own name is for ``sync_names`` to make durable, those of what it is
    in are. Errors: OSError."""
    if _is_directory(directory):
        return
    for one in (*reversed(directory.absolute().parents), directory):
        if _is_directory(one):
            continue
        try:
            one.mkdir()
            undo.callback(_remove_empty, one)
        except FileExistsError:
            if not _is_directory(one):  # else somebody was faster
                raise
        if one != directory:
            sync_directory(one.parent)


def _is_directory(path: pathlib.Path) -> bool:
    """Errors: OSError, where that is not known."""
    status = runtime.status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _remove_empty(directory: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Hold DIRECTORY against other pulls and prunes. Errors: VIR_ERR_OPERATION_INVALID when one is
    there; VIR_ERR_SYSTEM_ERROR."""
    with contextlib.ExitStack() as undo:
        with naming("cannot lock", directory):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, fd)
            _lock(fd, directory)
        yield


def _lock(fd: int, directory: pathlib.Path) -> None:
    for is_last in (False, False, True):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            if is_last:
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_INVALID,
                    f"another backup is pulled into {directory}, or it is being pruned",
                ) from failure
            time.sleep(_LOOK)
        else:
            return


def is_locked(directory: pathlib.Path) -> bool:
    """Whether a pull or a prune has DIRECTORY; not where that cannot be told."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as failure:
        return isinstance(failure, BlockingIOError)
    finally:
        os.close(fd)
    return False


@contextlib.contextmanager
def naming(what: str, directory: pathlib.Path) -> Iterator[None]:
    """Has an error of the system say WHAT it keeps from being done with DIRECTORY, and which file
    is in the way, where that is told."""
    try:
        yield
    except OSError as failure:
        file = failure.filename
        if failure.filename2 is not None and os.path.lexists(failure.filename2):
            file = failure.filename2  # nothing could be put in its place
        told = file is not None and os.fsdecode(file) != str(directory)
        text = f"{what} {directory}: {os.fsdecode(file)}" if told else f"{what} {directory}"
        raise errors.system_error(failure, text) from failure


def manifest_file(number: int) -> str:
    return f"manifest.{number:04}.json"


def number_of(name: str) -> int | None:
    """Of the backup whose manifest is called NAME; None: no backup's is, as that of a copy."""
    match = _MANIFEST.fullmatch(name)
    return int(match[1]) if match and name == manifest_file(int(match[1])) else None


def numbers_of(names: Iterable[str]) -> list[int]:
    """Of the backups whose manifests are among NAMES, in order."""
    return sorted(number for name in names if (number := number_of(name)) is not None)


def disk_file(name: str, number: int, fmt: str) -> str:
    return f"{name}.{number:04}.{fmt}"


def read(directory: pathlib.Path, domain: api.Domain, branch: str) -> Chain:
    """The backups of DOMAIN's BRANCH in DIRECTORY.

    Errors: VIR_ERR_OPERATION_INVALID when it has those of another guest or branch, be it one that
    the next pull of that finishes, or a backup without one; those of ``manifest.read``.
    """
    with naming("cannot read", directory):
        names = os.listdir(directory)  # noqa: PTH208  (names, not paths)
    backups = tuple(
        merged(directory, file, manifest.read(directory, file), names)
        for file in map(manifest_file, numbers_of(names))
    )
    with naming("cannot read", directory):
        if not backups and runtime.status(directory / manifest.FILE):
            backups = (manifest.read(directory),)
        found = Chain(directory, backups)
        pending = _pending(directory, found.next_number)
    for backup in backups if pending is None else (*backups, pending):
        _check(directory, backup, domain, branch)
    return found


def check_none(directory: pathlib.Path) -> None:
    """Raise VIR_ERR_OPERATION_INVALID where DIRECTORY has backups of a branch, be it one that the
    next pull finishes: its ``manifest.json`` is theirs."""
    with naming("cannot read", directory):
        names = sorted(os.listdir(directory))  # noqa: PTH208  (names, not paths)
    for name in names:
        if number_of(name.removesuffix(PARTIAL)) is not None:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID,
                f"{directory} is of the backups of a branch, as it has {name}: a backup without one"
                " needs a directory of its own",
            )


def merged(
    directory: pathlib.Path, file: str, made: manifest.Manifest, names: Iterable[str]
) -> manifest.Manifest:
    """MADE, the manifest FILE of a DIRECTORY that has NAMES, with those of its disks that a prune
    cut off has put in their places already.

    Until the manifest follows, a file that stands alone is told from the increment that it takes
    the place of by having no backing file.
    """
    if file + MERGED not in names:
        return made
    try:
        coming = manifest.read(directory, file + MERGED)
    except errors.Error:
        return made
    if coming.id != made.id:
        return made
    return in_place(directory, made, coming, _seems_to_stand_alone)


def in_place(
    directory: pathlib.Path,
    made: manifest.Manifest,
    coming: manifest.Manifest,
    stands_alone: Callable[[pathlib.Path], bool],
) -> manifest.Manifest:
    """MADE, with those disks of COMING, the one that is to follow, that are in their places: whose
    files STAND ALONE."""
    new = {disk.file: disk for disk in coming.disks if disk.backing is None}
    disks = tuple(
        new[disk.file] if disk.file in new and stands_alone(directory / disk.file) else disk
        for disk in made.disks
    )
    return coming if disks == coming.disks else dataclasses.replace(made, disks=disks)


def stands_alone(path: pathlib.Path) -> bool:
    """Whether there is an image at PATH that has no backing file. Errors: OSError."""
    try:
        return read_header(path).backing is None
    except (FileNotFoundError, header.BadHeader):
        return False


def _seems_to_stand_alone(path: pathlib.Path) -> bool:
    try:
        return stands_alone(path)
    except OSError:
        return False


def _check(
    directory: pathlib.Path, backup: manifest.Manifest, domain: api.Domain, branch: str
) -> None:
    if backup.domain.uuid != domain.UUIDString():
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID,
            f"{directory} has backups of guest '{backup.domain.name}' ({backup.domain.uuid}), not"
            f" of '{domain.name()}' ({domain.UUIDString()})",
        )
    if backup.branch != branch:
        found = f"backups of branch '{backup.branch}'"
        if backup.branch is None:
            found = "a backup without a branch"
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID, f"{directory} has {found}, not of '{branch}'"
        )


def lines(domain: api.Domain, branch: str) -> dict[str, backup_conf.BranchDisk]:
    """Disk -> what DOMAIN has of BRANCH. Errors: those of ``branchList``."""
    try:
        branches = domain.branchList()
    except errors.Error as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
            raise
        # What a killed pull left may be in the way; of a backup that runs this tells, too.
        domain.backupCleanup()
        branches = domain.branchList()
    return {
        disk.name: disk
        for found in branches
        if found.name == branch and not found.foreign
        for disk in found.disks
    }


def recover(
    directory: pathlib.Path, found: Mapping[str, backup_conf.BranchDisk], known: Chain
) -> bool:
    """Finish or remove what an earlier pull left when it was cut off; whether it was finished.

    FOUND is what the guest has of the branch. Errors: VIR_ERR_SYSTEM_ERROR.
    """
    with naming("cannot make a backup in", directory):
        return _recover(directory, found, known)


def _recover(
    directory: pathlib.Path, found: Mapping[str, backup_conf.BranchDisk], known: Chain
) -> bool:
    """The same. Errors: OSError, too."""
    number = known.next_number
    pending = _pending(directory, number)
    (directory / (manifest.FILE + PARTIAL)).unlink(missing_ok=True)
    left = [
        path
        for path in directory.iterdir()
        if (match := _PARTIAL.fullmatch(path.name)) and int(match[1]) == number
    ]
    if not left:
        return False
    if pending is not None:
        if _is_last_point(pending, found):
            finish(directory, pending)
            logger.warning("directory=%s backup=%s of a pull cut off, kept", directory, pending.id)
            return True
        left += [directory / disk.file for disk in pending.disks if disk.type == "file"]
    for path in left:
        path.unlink(missing_ok=True)
    logger.warning("directory=%s removed files of a pull cut off: %d", directory, len(left))
    return False


def _pending(directory: pathlib.Path, number: int) -> manifest.Manifest | None:
    """The manifest of backup NUMBER, whose pull was cut off; None where it did not come to one, or
    that is not as it was written: it would name files of others. Errors: OSError,
    VIR_ERR_SYSTEM_ERROR: there is a file, and what it says is not known."""
    file = manifest_file(number) + PARTIAL
    status = runtime.status(directory / file)
    if status is None or not stat.S_ISREG(status.st_mode):
        return None
    try:
        found, changed = manifest.read_checked(directory, file)
    except errors.Error as failure:
        if failure.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR:
            raise
        return None
    return found if changed is None and found.number == number else None


def _is_last_point(pending: manifest.Manifest, found: Mapping[str, backup_conf.BranchDisk]) -> bool:
    """Whether the branch moved on to PENDING, so that its stop had called it good."""
    points = [found[disk.name].point if disk.name in found else None for disk in pending.disks]
    return bool(points) and all(point is not None and point.id == pending.id for point in points)


def finish(directory: pathlib.Path, made: manifest.Manifest) -> None:
    """Give the files of a good backup, whose manifest is written, their names, the manifest last;
    durable when it returns. Errors: VIR_ERR_SYSTEM_ERROR."""
    own = manifest.FILE if made.number is None else manifest_file(made.number)
    with naming("cannot finish the backup in", directory):
        for name in (*(disk.file for disk in made.disks if disk.type == "file"), own):
            partial, final = directory / (name + PARTIAL), directory / name
            if runtime.status(partial) or not runtime.status(final):  # else it came so far before
                partial.rename(final)
        if made.number is not None:
            newest = directory / (manifest.FILE + PARTIAL)
            if not runtime.status(newest):  # else it was made with the other one
                write(directory, manifest.FILE, made)
            newest.rename(directory / manifest.FILE)
        sync_names(directory)


def write(directory: pathlib.Path, file: str, made: manifest.Manifest) -> None:
    """A manifest under FILE's partial name, durable. Errors: OSError."""
    write_text(directory, file, made.to_json())


def write_text(directory: pathlib.Path, file: str, text: str) -> None:
    """The same of any TEXT, or nothing under that name. Errors: OSError, where the name is a link,
    which may lead anywhere, or a pipe, too."""
    partial = directory / (file + PARTIAL)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(partial, flags, 0o666)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as failure:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(failure.errno, failure.strerror, os.fspath(partial)) from failure
    sync_directory(directory)


def sync_names(directory: pathlib.Path) -> None:
    """Make the names in DIRECTORY durable, and its own. Errors: OSError."""
    for path in (directory, directory.absolute().parent):
        sync_directory(path)


def sync_directory(path: pathlib.Path) -> None:
    """Make the names in a directory durable, as far as that can be asked for: not by who may not
    read it, nor where its file system, as an automounter's, cannot. Errors: OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as failure:
        if failure.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)
