# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proposed calls on libvirt's own backup job (virDomainBackupBegin): what is begun and told.

What libvirt's own cannot say or do is refused: branches (it has checkpoints), quiescing, and what
``translate`` names.
"""

import dataclasses
from collections.abc import Callable

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf, dialects, native_conf, translate


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


def is_of(document: str, begun: native_conf.BackupDef) -> bool:
    """Whether the backup that libvirt tells by DOCUMENT is the one that was BEGUN, and no other
    that somebody has begun since: it has its server, and the scratch images that it names."""
    told = native_conf.BackupDef.parse(document)
    images = {disk.name: disk.image.path for disk in told.disks if disk.image is not None}
    named = {disk.name: disk.image.path for disk in begun.disks if disk.image is not None}
    return _place(told) == _place(begun) and named.items() <= images.items()


def _place(definition: native_conf.BackupDef) -> native_conf.Server | None:
    server = definition.server
    return None if server is None else dataclasses.replace(server, tls=None)


def check_ends(document: str, begun: native_conf.BackupDef | None) -> None:
    """Refuse to end the backup that libvirt tells by DOCUMENT where it is somebody else's: not the
    one that was BEGUN to end with the connection that ends it, or a push. It would be lost, and
    called good.

    Errors: VIR_ERR_NO_DOMAIN_BACKUP.
    """
    if begun is not None and not is_of(document, begun):
        raise errors.error(
            libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
            "the backup that was started here was ended by somebody else, and another one runs",
        )
    if native_conf.BackupDef.parse(document).mode == "push":
        raise errors.error(
            libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
            "no domain backup job present that pulls: libvirt's own pushes (virsh domjobabort ends"
            " it)",
        )


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
