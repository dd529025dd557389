# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scratch files: made so that nothing can be left of them.

An image without a name of the user's never outlives QEMU's use of it: it is a file without a name,
handed over as a descriptor; or, where the monitor takes none, a file that loses its name as soon as
QEMU has it open.
"""

import errno
import logging
import os
import pathlib

import libvirt

from virtbackup import errors
from virtbackup.conf import storage_conf
from virtbackup.qemu import qcow2

logger = logging.getLogger(__name__)


def default_directory() -> str:
    """Where images go for which nobody named a place: $VIRTBACKUP_SCRATCH_DIR or /var/tmp."""
    return os.environ.get("VIRTBACKUP_SCRATCH_DIR") or "/var/tmp"


def name(source: storage_conf.Source, opaque: str) -> str:
    """The path of a scratch image while it has one; OPAQUE makes it unique."""
    return source.file or f"{source.dir}/{opaque}.qcow2"


def check(source: storage_conf.Source, target: str) -> None:
    """Raise VIR_ERR_INVALID_ARG when the image for disk TARGET is already there."""
    if source.file is not None and os.path.lexists(source.file):
        raise _exists(source.file, target)


def create(path: str, target: str, uid: int) -> int:
    """Make an empty file at PATH for user UID's QEMU, and give an open descriptor.

    Errors: VIR_ERR_INVALID_ARG when it exists, VIR_ERR_SYSTEM_ERROR; both name disk TARGET.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as failure:
        raise _exists(path, target) from failure
    except OSError as failure:
        raise _cannot(failure, path, target) from failure
    if uid != os.geteuid() == 0:
        os.fchown(fd, uid, -1)
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


def format(fd: int, size: int, target: str) -> None:
    """Write an empty image of SIZE guest-visible bytes. Errors: VIR_ERR_SYSTEM_ERROR."""
    try:
        for offset, data in qcow2.empty_image(size):
            os.pwrite(fd, data, offset)
        os.ftruncate(fd, qcow2.file_size(size))
    except OSError as failure:
        raise errors.system_error(
            failure, f"cannot format the scratch image of disk '{target}'"
        ) from failure


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
