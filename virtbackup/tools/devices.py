# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the disks of a pull may go to block devices: nothing is written to them here."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf, domain_conf
from virtbackup.nbd import device

_WITH_PATH = ("file", "block")
"""The types of disks whose source is a path here."""


def usable(
    targets: Mapping[str, pathlib.Path], wanted: backup_conf.BackupDef, domain_xml: str
) -> dict[str, pathlib.Path]:
    """TARGETS, with absolute paths, once nothing speaks against them: a disk of the guest that has
    DOMAIN_XML -> the device that it goes to.

    Errors: VIR_ERR_OPERATION_INVALID for a disk that is not in the backup, or is of a branch, a
    device that has bytes of the guest's, or of another one of TARGETS, or is in use;
    VIR_ERR_OPERATION_FAILED for one that is too small; VIR_ERR_SYSTEM_ERROR.
    """
    domain = domain_conf.DomainDef.parse(domain_xml)
    capacity = {disk.target: disk.capacity for disk in domain.disks}
    chosen = {disk.name for disk in wanted.disks if disk.present}
    devices: dict[str, pathlib.Path] = {}
    for name, given in targets.items():
        path = given
        with contextlib.suppress(OSError):  # nothing is in a directory that was removed
            path = pathlib.Path(os.path.abspath(given))  # noqa: PTH100  (a link stays one)
        if name not in chosen:
            raise _invalid(f"disk '{name}' is not in the backup, so {path} cannot take it")
        if wanted.branch is not None:
            raise _invalid(
                f"disk '{name}': a backup of a branch cannot go to {path}, as increments are qcow2"
                " images over the files of a directory"
            )
        for disk in domain.disks:
            if disk.type not in _WITH_PATH or not disk.source:
                continue
            if device.has_bytes_of(path, pathlib.Path(disk.source)):
                raise _invalid(f"disk '{name}': {path} is the guest's own disk '{disk.target}'")
        with _naming_disk(name):
            size = device.look(path)
        for of, other in devices.items():
            if device.share(path, other):
                raise _invalid(f"disk '{name}': {path} takes disk '{of}' already")
        if size < (needs := capacity[name] or 0):
            with _naming_disk(name):
                raise device.too_small(str(path), size, needs)
        devices[name] = path
    return devices


@contextlib.contextmanager
def _naming_disk(name: str) -> Iterator[None]:
    try:
        yield
    except errors.Error as failure:
        raise errors.error(
            failure.get_error_code(), f"disk '{name}': {failure.get_str2() or failure}"
        ) from failure


def _invalid(text: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_OPERATION_INVALID, text)
