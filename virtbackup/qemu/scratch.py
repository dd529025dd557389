# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scratch files: made so that nothing can be left of them.

An image without a name of the user's never outlives QEMU's use of it: it is a file without a name,
handed over as a descriptor; or, where the monitor takes none, a file that loses its name as soon as
QEMU has it open.
"""

import dataclasses
import errno
import logging
import os
import pathlib
import time
from collections.abc import Iterable

import libvirt

from virtbackup import errors, runtime
from virtbackup.conf import storage_conf
from virtbackup.qemu import hang, qcow2

logger = logging.getLogger(__name__)


LEAST_FREE = 1 << 20
"""Bytes for each image that must be free, or a start is refused: the guest would stand at once."""
_HEADER = 4096
"""Bytes within which an image has its mark, wherever QEMU has put that."""
PATIENCE = 10.0
"""Seconds within which a file system must answer before an image is made there."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A scratch image before it is made, for a disk of SIZE guest-visible bytes."""

    target: str
    source: storage_conf.Source
    size: int

    @property
    def directory(self) -> str:
        """Where it is going to be."""
        return place(self.source)

    @property
    def worst_case(self) -> int:
        """Bytes it takes when the guest overwrites the whole disk during the backup."""
        return qcow2.full_size(self.size)


@dataclasses.dataclass(frozen=True)
class Space:
    """What the scratch images on one file system may come to need, and what there is."""

    images: tuple[Wanted, ...]
    free: int
    """Bytes that an image can take before anybody else writes there."""

    @property
    def worst_case(self) -> int:
        """Bytes of all images, those that reserve their space before the start not counted."""
        return sum(image.worst_case for image in self.images if not image.source.reserve)

    @property
    def warning(self) -> str | None:
        """Words for people, where the worst case does not fit."""
        if self.worst_case <= self.free:
            return None
        return (
            f"scratch space in '{self.images[0].directory}' may run out: if the guest overwrites"
            f" all of its disks during the backup, {_mib(self.worst_case)} are needed, and"
            f" {_mib(self.free)} are free"
        )

    @property
    def threshold(self) -> int | None:
        """The size in bytes of one image that is worth a warning; None where all of it fits."""
        growing = [image for image in self.images if not image.source.reserve]
        return None if self.warning is None else self.free // (2 * len(growing))


def spaces(images: Iterable[Wanted]) -> list[Space]:
    """IMAGES by file system.

    Errors: VIR_ERR_SYSTEM_ERROR, naming disk and directory, when one is not there, when there is
    not even room to begin, or when what is to be reserved does not fit.
    """
    by_device: dict[int, list[Wanted]] = {}
    for image in images:
        try:
            device = pathlib.Path(image.directory).stat().st_dev
        except OSError as failure:
            place = image.source.file or image.directory
            raise _cannot(failure, place, image.target) from failure
        by_device.setdefault(device, []).append(image)
    found = []
    for group in by_device.values():
        space = Space(tuple(group), free_bytes(group[0].directory))
        reserved = sum(image.worst_case for image in group if image.source.reserve)
        growing = [image for image in group if not image.source.reserve]
        least = reserved + sum(min(LEAST_FREE, image.worst_case) for image in growing)
        if space.free < least:
            targets = ", ".join(f"'{image.target}'" for image in group)
            disks = "disks" if len(group) > 1 else "disk"
            raise errors.system_error(
                OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
                f"scratch space for {disks} {targets} in '{group[0].directory}' needs at least"
                f" {_mib(least)}, {space.free >> 10} KiB are free",
            )
        found.append(dataclasses.replace(space, free=space.free - reserved))
    return found


def free_bytes(where: str | int) -> int:
    """Bytes free for us on the file system of a path or descriptor."""
    found = os.statvfs(where)
    return found.f_bavail * found.f_frsize


def _mib(size: int) -> str:
    return f"{-(-size // (1 << 20))} MiB"


def default_directory() -> str:
    """Where images go for which nobody named a place: $VIRTBACKUP_SCRATCH_DIR or /var/tmp."""
    return str(pathlib.Path(os.environ.get("VIRTBACKUP_SCRATCH_DIR") or "/var/tmp").absolute())


def place(source: storage_conf.Source) -> str:
    """The directory of a scratch image."""
    return source.dir or str(pathlib.Path(str(source.file)).parent)


def name(source: storage_conf.Source, opaque: str) -> str:
    """The path of a scratch image while it has one; OPAQUE makes it unique."""
    return source.file or f"{source.dir}/{opaque}.qcow2"


def ask(sources: Iterable[storage_conf.Source]) -> hang.Question:
    """Whether the file systems answer where images may be going to be."""
    return hang.Question({place(source.placed(default_directory())) for source in sources})


def check(images: Iterable[Wanted], asked: hang.Question) -> None:
    """Raise VIR_ERR_INVALID_ARG when one of IMAGES is already there, VIR_ERR_OPERATION_TIMEOUT when
    a file system does not answer what was ASKED; both name disk and place."""
    images = list(images)
    end = time.monotonic() + PATIENCE
    hung = asked.unanswered({image.directory for image in images}, end)
    for image in images:
        if image.directory in hung:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_TIMEOUT,
                f"cannot create a scratch image for disk '{image.target}': the file system of"
                f" '{image.directory}' does not answer",
            )
        if image.source.file is not None and os.path.lexists(image.source.file):
            raise _exists(image.source.file, image.target)


def create(path: str, target: str, uid: int | None) -> int:
    """Make an empty file at PATH for user UID's QEMU, where that is known, and give an open
    descriptor.

    Errors: VIR_ERR_INVALID_ARG when it exists, VIR_ERR_SYSTEM_ERROR; both name disk TARGET.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as failure:
        raise _exists(path, target) from failure
    except OSError as failure:
        raise _cannot(failure, path, target) from failure
    if uid is not None and uid != os.geteuid() == 0:
        try:
            os.fchown(fd, uid, -1)
        except OSError as failure:
            os.close(fd)
            remove(path)
            raise _cannot(failure, path, target) from failure
    return fd


def create_nameless(directory: str, target: str) -> int | None:
    """An open descriptor of a file in DIRECTORY that has no name; None where the file system
    has no such files. Errors: VIR_ERR_SYSTEM_ERROR, naming disk TARGET."""
    try:
        return os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as failure:
        if failure.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            return None
        raise _cannot(failure, directory, target) from failure


def format(fd: int, size: int, target: str, reserve: bool = False, mark: str = "") -> None:
    """Write an empty image of SIZE guest-visible bytes; RESERVE allocates all it can grow to, MARK
    is what it is known by.

    Errors: VIR_ERR_SYSTEM_ERROR.
    """
    try:
        for offset, data in qcow2.empty_image(size, mark):
            os.pwrite(fd, data, offset)
        os.ftruncate(fd, qcow2.file_size(size))
        if reserve:
            os.posix_fallocate(fd, 0, qcow2.full_size(size))
    except OSError as failure:
        raise errors.system_error(
            failure, f"cannot format the scratch image of disk '{target}'"
        ) from failure


def duplicate(fd: int, target: str) -> int:
    """Another descriptor of the scratch image FD. Errors: VIR_ERR_SYSTEM_ERROR."""
    try:
        return os.dup(fd)
    except OSError as failure:
        raise errors.system_error(
            failure, f"cannot keep the scratch image of disk '{target}' open"
        ) from failure


def is_image(path: str, size: int) -> bool:
    """Whether what is at PATH is an image of SIZE guest-visible bytes that ``format`` made, what
    QEMU has written to it since aside, or was just making."""
    [(_, header), *_] = qcow2.empty_image(size)
    begins = header[: qcow2.FIXED]
    try:
        return runtime.read_file(path, len(begins)) == begins or is_unused_image(path, size)
    except OSError:
        return False


def has_mark(path: str, mark: str) -> bool:
    """Whether what is at PATH is the image that ``format`` gave MARK."""
    try:
        return mark.encode() in runtime.read_file(path, _HEADER)
    except OSError:
        return False


def is_unused_image(path: str, size: int) -> bool:
    """Whether what is at PATH is an image of SIZE guest-visible bytes as ``create`` and ``format``
    make it or were just making it, and nothing else that somebody put there."""
    try:
        with os.fdopen(runtime.open_file(path, os.O_RDONLY), "rb") as file:
            found = os.fstat(file.fileno())
            if not found.st_size:
                return found.st_mode & 0o7777 == 0o600
            if found.st_size > qcow2.full_size(size):
                return False
            for offset, data in qcow2.empty_image(size):
                file.seek(offset)
                here = file.read(len(data))
                if here.rstrip(b"\0") != data[: len(here)].rstrip(b"\0") and any(here):
                    return False
    except OSError:
        return False
    return True


def remove(path: str) -> bool:
    """Whether a file was there and is gone now."""
    try:
        pathlib.Path(path).unlink()
    except FileNotFoundError:
        return False
    except OSError as failure:
        logger.warning("path=%s cannot be removed: %s", path, failure)
        return False
    return True


def _exists(path: str, target: str) -> errors.Error:
    return errors.error(
        libvirt.VIR_ERR_INVALID_ARG, f"store '{path}' for backup of '{target}' exists"
    )


def _cannot(failure: OSError, path: str, target: str) -> errors.Error:
    return errors.system_error(failure, f"cannot create scratch image '{path}' for disk '{target}'")
