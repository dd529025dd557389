# SPDX-License-Identifier: LGPL-2.1-or-later
"""The branches of a running QEMU: told, ended with their backup, deleted (qemu_checkpoint.c).

What a branch is made of, ``branch`` says. What is to be done is read off the bitmaps that QEMU
shows, so a step whose reply was lost, or that a crash cut off, is found done or is done again.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    backup,
    block,
    branch,
    domain,
    monitor_json,
    naming,
    status,
)

logger = logging.getLogger(__name__)


def advance(session: domain.Session, running: status.Status) -> str | None:
    """Set RUNNING as the last point of its branch on every disk, in one transaction.

    Why QEMU did not; None: it did, or had done so before.
    """
    if running.branch is None:
        return None
    nodes = _nodes(session)
    actions = []
    for disk in running.disks:
        assert disk.branch is not None
        medium = nodes.get(disk.branch.node)
        key = naming.branch_key(running.branch)
        if medium is None or (next := branch.next_of(medium, key)) is None:
            continue
        point = naming.Point(running.id, int(running.started), disk.size)
        actions += branch.advance(running.branch, disk.branch.keeps, medium, next, point)
    return _transact(session, actions)


def roll_back(
    session: domain.Session, backup: naming.BackupId | None
) -> tuple[list[str], list[str]]:
    """Join again what backup BACKUP, or any of ours, divided. (A line for each bitmap removed, what
    is still there.)"""
    found = list(_divided(session, backup))
    actions = [action for medium, next in found for action in branch.roll_back(medium, next)]
    names = [f"bitmap '{next.name}' of node '{medium.node}'" for medium, next in found]
    if failure := _transact(session, actions):
        logger.warning("backup=%s bitmaps not joined again: %s", backup or "any", failure)
        return [], names
    return names, []


def _divided(
    session: domain.Session, backup: naming.BackupId | None
) -> Iterator[tuple[block.Medium, block.Bitmap]]:
    for medium in _nodes(session).values():
        for bitmap in medium.bitmaps:
            told = naming.next_of(bitmap.name)
            if told is not None and backup in (None, told[0]):
                yield medium, bitmap


def _nodes(session: domain.Session) -> Mapping[naming.NodeName, block.Medium]:
    return block.parse_named_nodes(session.qemu.execute(monitor_json.query_named_block_nodes()))


def _transact(session: domain.Session, actions: list[dict[str, Any]]) -> str | None:
    """Why QEMU refused; None: it did not."""
    if not actions:
        return None
    try:
        session.qemu.execute(monitor_json.transaction(actions))
    except monitor_json.CommandFailed as failure:
        return failure.desc
    return None


# --- list, delete ---


def told(state: backup.BlockState, running: status.Status | None) -> list[backup_conf.Branch]:
    """Every branch, and every bitmap of somebody else's. RUNNING is the backup that runs."""
    roots = {disk.target: disk.node for disk in running.disks} if running else {}
    disks = {}
    sizes = {}
    for disk in state.disks:
        if disk.medium is None:
            continue
        images = state.images(roots.get(disk.target, disk.medium.node))
        if images is not None:
            disks[disk.target], sizes[disk.target] = images, disk.medium.size
    found = []
    for name in branch.names(disks.values()):
        lines = {
            target: line
            for target, images in disks.items()
            if (line := branch.line(name, images, sizes[target])) and _has(line)
        }
        own = {target: line for target, line in lines.items() if not line.foreign}
        theirs = {target: line for target, line in lines.items() if line.foreign}
        found += [
            backup_conf.Branch(name, foreign, tuple(map(_told_disk, some, some.values())))
            for foreign, some in ((False, own), (True, theirs))
            if some
        ]
    return found


def _has(line: branch.Line) -> bool:
    return line.bitmap is not None or line.point is not None


def _told_disk(target: str, line: branch.Line) -> backup_conf.BranchDisk:
    bitmap, point = line.bitmap, line.point
    note = None
    if bitmap is not None and not bitmap.persistent:
        note = "the bitmap is lost when the guest ends: its image cannot hold it"
    known = bitmap.count if bitmap is not None and line.foreign else line.dirty
    return backup_conf.BranchDisk(
        name=target,
        granularity=None if bitmap is None else bitmap.granularity,
        dirty=known,
        persistent=bitmap is not None and bitmap.persistent,
        reason=line.unsound,
        point=None if point is None else backup_conf.Point(point.backup, point.time),
        note=note,
    )


def delete(session: domain.Session, state: backup.BlockState, name: str) -> None:
    """Remove branch NAME from every disk.

    Errors: VIR_ERR_NO_DOMAIN_CHECKPOINT where no disk has it, VIR_ERR_OPERATION_INVALID where the
    bitmap is somebody else's or cannot be removed.
    """
    actions = []
    foreign, backing = [], []
    for disk in state.disks:
        images = state.images(disk.medium.node) if disk.medium else None
        if images is None or disk.medium is None:
            continue
        line = branch.line(name, images, disk.medium.size)
        if line.foreign:
            foreign.append(disk.target)
            continue
        bitmaps = [line.bitmap.name if line.bitmap else None, line.marker]
        own = [bitmap for bitmap in bitmaps if bitmap is not None]
        if not own and line.point is not None:
            backing.append(disk.target)
        actions += [
            monitor_json.bitmap_remove(monitor_json.BitmapOf(line.node, bitmap)) for bitmap in own
        ]
    if not actions:
        raise _not_there(name, foreign, backing)
    if failure := _transact(session, actions):
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_FAILED, f"branch '{name}' cannot be deleted: {failure}"
        )


def _not_there(name: str, foreign: list[str], backing: list[str]) -> errors.Error:
    if foreign:
        disks = ", ".join(f"'{target}'" for target in foreign)
        return errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID,
            f"the bitmap '{name}' of disk {disks} was made by somebody else: it is not touched",
        )
    if backing:
        disks = ", ".join(f"'{target}'" for target in backing)
        return errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID,
            f"branch '{name}' of disk {disks} is in a backing image, which cannot be changed",
        )
    return errors.error(libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, f"no branch named '{name}'")
