# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proposed calls on libvirt's own backup job (virDomainBackupBegin), whoever calls it.

What libvirt's own cannot say or do is refused: branches (it has checkpoints), quiescing, and what
``translate`` names.
"""

import dataclasses
from collections.abc import Callable

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf, dialects, native_conf, translate

END_TIMEOUT = 60.0
"""Seconds for libvirt to end a backup job that was aborted."""


def begin(
    document: str, quiesce: bool, domain: dialects.Domain, image: Callable[[str], str]
) -> native_conf.BackupDef:
    """What is begun for a document in either dialect. IMAGE: a disk's name -> the path of a scratch
    image, where the document names none.

    Errors: VIR_ERR_CONFIG_UNSUPPORTED, VIR_ERR_ARGUMENT_UNSUPPORTED, those of ``translate``.
    """
    if quiesce:
        raise errors.error(
            libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, "libvirt's own backup does not quiesce"
        )
    definition = dialects.read(document, domain)
    if definition.branch is not None:
        raise errors.error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            f"branch '{definition.branch}': libvirt's own backup has checkpoints, no branches",
        )
    native = translate.to_native(definition, domain)
    return dataclasses.replace(
        native, disks=tuple(_with_image(disk, image) for disk in native.disks)
    )


def _with_image(
    disk: native_conf.BackupDiskDef, image: Callable[[str], str]
) -> native_conf.BackupDiskDef:
    """A listed disk has to have a type, and with one libvirt 9.0 does not come to name an image."""
    if not disk.backup or disk.image is not None:
        return disk
    return dataclasses.replace(disk, image=native_conf.Image(image(disk.name)))


def image_path(directory: str, disk: str, token: str) -> str:
    """The path of a scratch image in DIRECTORY; TOKEN tells it from others."""
    return f"{directory}/virtbackup-libvirt-{token}.{disk}"


def running(document: str, domain: dialects.Domain) -> backup_conf.BackupDef:
    """A running backup, which libvirt tells by DOCUMENT, in the proposal's dialect."""
    native = native_conf.BackupDef.parse(document)
    return translate.to_proposal(native, domain).align_disks(domain())


def info(
    definition: backup_conf.BackupDef, started: float, capacity: Callable[[str], int]
) -> backup_conf.BackupInfo:
    """What is known of a running backup; CAPACITY: of a disk, bytes."""
    return backup_conf.BackupInfo(
        state="running",
        started=started,
        address=definition.address,
        engine="libvirt",
        scratch_failure="guest",
        disks=tuple(
            backup_conf.DiskInfo(
                name=disk.name,
                export=disk.exportname or disk.name,
                state="running",
                reason=None,
                capacity=capacity(disk.name),
                scratch_used=None,
            )
            for disk in definition.disks
            if disk.present
        ),
    )


def another_runs() -> errors.Error:
    """For a start while libvirt has a backup job: it would wait half a minute for its end."""
    return errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "another backup job is already running")


def none_runs() -> errors.Error:
    """In the words of our own engine."""
    return errors.error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP, "no domain backup job present")


def not_good() -> errors.Error:
    """libvirt tells no more of a pull than that the job ran until it was aborted."""
    return errors.error(
        libvirt.VIR_ERR_OPERATION_FAILED, "the backup is not good: the domain ended"
    )


def does_not_end() -> errors.Error:
    """For a job that was aborted ``END_TIMEOUT`` ago."""
    return errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "libvirt's backup job does not end")
