# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's checkpoints as a view of our branches: each is a branch that never advances.

A domain's checkpoints are in one line, by the time at which they began, as libvirt's are.
"""

import dataclasses
import time
from collections.abc import Mapping

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf, checkpoint_conf, domain_conf
from virtbackup.remote import domains


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One of a domain's."""

    name: str
    time: float
    """Seconds since the epoch."""
    disks: Mapping[str, int | None]
    """Target -> bytes changed since, where that is known."""
    parent: str | None = None


def of(found: domains.Found) -> list[Checkpoint]:
    """A domain's checkpoints, the eldest first; with that which a running backup is to begin, as it
    is there at once in libvirt. Errors: the driver's."""
    known = {}
    branches: list[backup_conf.Branch] = found.call(
        "virDomainListAllCheckpoints", "domain_branch_list", 0
    )
    for branch in branches:
        points = {disk.name: disk for disk in branch.disks if disk.point is not None}
        if branch.foreign or not points:
            continue
        began = max(disk.point.time for disk in points.values() if disk.point)
        dirty = {name: disk.dirty for name, disk in points.items()}
        known[branch.name] = Checkpoint(branch.name, began, dirty)
    if (begins := _beginning(found)) is not None:
        known[begins.name] = begins
    in_order = sorted(known.values(), key=lambda one: (one.time, one.name))
    parents = [None, *(one.name for one in in_order)]
    return [
        dataclasses.replace(one, parent=parent)
        for one, parent in zip(in_order, parents, strict=False)
    ]


def _beginning(found: domains.Found) -> Checkpoint | None:
    """That which the running backup is going to begin, if it is good."""
    try:
        document = found.call("virDomainBackupGetXMLDesc", "domain_backup_get_xml_desc", 0)
        info = found.call("virDomainBackupGetInfo", "domain_backup_get_info", 0)
    except libvirt.libvirtError as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
            raise
        return None
    live = backup_conf.BackupDef.parse(document)
    if live.advances is None:
        return None
    disks = dict.fromkeys((disk.name for disk in live.disks if disk.present), 0)
    return Checkpoint(live.advances, info.started, disks)


def by_name(found: domains.Found, name: str) -> Checkpoint:
    """Errors: VIR_ERR_NO_DOMAIN_CHECKPOINT."""
    return in_line(found, name)[0]


def in_line(found: domains.Found, name: str) -> tuple[Checkpoint, list[Checkpoint]]:
    """The checkpoint of that NAME, and those behind it. Errors: VIR_ERR_NO_DOMAIN_CHECKPOINT."""
    known = of(found)
    for place, one in enumerate(known):
        if one.name == name:
            return one, known[place + 1 :]
    raise missing(f"no domain checkpoint with matching name '{name}'")


def missing(detail: str) -> errors.Error:
    """VIR_ERR_NO_DOMAIN_CHECKPOINT."""
    return errors.error(
        libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, detail, domain=libvirt.VIR_FROM_DOMAIN_CHECKPOINT
    )


def name_of(wanted: checkpoint_conf.CheckpointDef, found: domains.Found) -> str:
    """The name for a new checkpoint that begins now: the time, where none is given. Waits until its
    second is not that of an earlier one, as they are told apart by that.

    Errors: VIR_ERR_INVALID_ARG for one that no branch can have, VIR_ERR_OPERATION_FAILED for one
    that is there.
    """
    known = of(found)
    while known and int(known[-1].time) == int(time.time()):
        time.sleep(0.01)
    name = wanted.name or str(int(time.time()))
    backup_conf.check_branch_name(name)
    if any(one.name == name for one in known):
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_FAILED,
            f"domain moment {name} already exists",
            domain=libvirt.VIR_FROM_DOMAIN,
        )
    for disk in wanted.disks:
        if disk.bitmap not in (None, name):
            raise _unsupported(f"bitmap for disk '{disk.name}' must match checkpoint name '{name}'")
    return name


def check_disks(
    wanted: checkpoint_conf.CheckpointDef, name: str, domain: domain_conf.DomainDef,
    taken: list[str],
) -> None:  # fmt: skip
    """Refuse a checkpoint that is not of just the disks that are TAKEN. Errors, by disk:
    VIR_ERR_CONFIG_UNSUPPORTED."""
    usable = {disk.target: disk.has_medium and not disk.readonly for disk in domain.disks}
    listed = set()
    for disk in wanted.disks:
        if disk.name not in usable:
            raise _unsupported(f"no disk named '{disk.name}'")
        if disk.name in listed:
            raise _unsupported(f"disk '{disk.name}' specified twice")
        listed.add(disk.name)
        if disk.checkpoint != "no" and not usable[disk.name]:
            raise _unsupported(f"disk '{disk.name}' is empty or readonly")
        if disk.checkpoint != "no" and disk.name not in taken:
            raise _unsupported(
                f"disk '{disk.name}' is in checkpoint '{name}', and takes no part here"
            )
    for target in wanted.left_out(taken):
        raise _unsupported(
            f"disk '{target}' takes part, and is not in checkpoint '{name}': here, a checkpoint is"
            " of all disks that do"
        )


def begun_by(
    definition: backup_conf.BackupDef,
    wanted: checkpoint_conf.CheckpointDef,
    name: str,
    domain: domain_conf.DomainDef,
) -> backup_conf.BackupDef:
    """The backup DEFINITION, with which checkpoint NAME begins. Errors: as ``check_disks``."""
    taken = [disk.name for disk in definition.align_disks(domain).disks if disk.present]
    check_disks(wanted, name, domain, taken)
    if definition.branch is not None:
        return dataclasses.replace(definition, fork=name)
    return dataclasses.replace(definition, branch=name)


def document(
    one: Checkpoint,
    domain: domain_conf.DomainDef,
    description: str | None,
    sizes: bool,
    domain_xml: str | None,
) -> str:
    """The ``<domaincheckpoint>``; with SIZES, of what has changed since."""
    disks = tuple(
        checkpoint_conf.CheckpointDiskDef(
            disk.target,
            checkpoint="bitmap" if disk.target in one.disks else "no",
            bitmap=one.name if disk.target in one.disks else None,
            size=one.disks.get(disk.target) if sizes else None,
        )
        for disk in domain.disks
    )
    made = checkpoint_conf.CheckpointDef(one.name, description, one.parent, int(one.time), disks)
    return made.format(domain_xml)


def _unsupported(detail: str) -> errors.Error:
    return errors.error(
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED, detail, domain=libvirt.VIR_FROM_DOMAIN_CHECKPOINT
    )
