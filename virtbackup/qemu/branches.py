# SPDX-License-Identifier: LGPL-2.1-or-later
"""The branches of a running QEMU: told, ended with their backup, deleted (qemu_checkpoint.c).

What a branch is made of, ``branch`` says. What is to be done is read off the bitmaps that QEMU
shows, so a step whose reply was lost, or that a crash cut off, is found done or is done again.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
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
    """Set RUNNING as the last point of the branch that advances by it, on every disk, in one
    transaction.

    Why it could not be; None: it is, or had been before.
    """
    if running.branch is None or running.advances is None:
        return None
    danger = domain.danger_of_named_nodes(session.qemu, session.capabilities)
    if danger is not None:
        return danger
    nodes = _nodes(session).values()
    actions = []
    for number, disk in enumerate(running.disks):
        assert disk.branch is not None
        point = naming.Point(
            running.id, int(running.started), disk.size, naming.disk_key(disk.target)
        )
        note = naming.point_bitmap(running.advances, point)
        if any(medium.bitmap(note) for medium in nodes):
            continue
        name = naming.next_bitmap(running.id, number, running.branch)
        found = [(medium, next) for medium in nodes if (next := medium.bitmap(name))]
        if not found:
            return f"disk '{disk.target}': its bitmap '{name}' was removed"
        (medium, next), keeps = found[0], disk.branch.keeps and not running.forks
        trouble = branch.trouble(running.advances, keeps, medium, next)
        if len(found) > 1:
            trouble = "somebody had its bitmap go on in an overlay"
        if trouble is not None:
            return f"disk '{disk.target}': {trouble}"
        set_point = branch.set_point(running.advances, keeps, medium, next, point)
        # What a fork is told of, the branch that stays is told of, too.
        remove = branch.roll_back(medium, next) if running.forks else branch.remove(medium, next)
        actions += [*set_point, *remove]
    return _transact(session, actions)


def roll_back(
    session: domain.Session,
    backup: naming.BackupId | None,
    disown: bool = False,
    fork: str | None = None,
) -> tuple[list[str], list[str]]:
    """Join again what backup BACKUP, or any of ours, divided; to DISOWN it, forget that it is a
    branch's point, if it is, and the FORK that it began. (A line for each bitmap removed, what is
    still there.)

    An image that is only read, as it has an overlay now, stays as it is until it is written to.
    """
    media = [medium for medium in _nodes(session).values() if not medium.readonly]
    found = [(medium, next) for medium in media for next in _divided(medium, backup)]
    actions = [action for medium, next in found for action in branch.roll_back(medium, next)]
    names = [f"bitmap '{next.name}' of node '{medium.node}'" for medium, next in found]
    if disown and backup is not None:
        for medium in media:
            if forget := branch.disown(medium, backup, fork):
                actions += forget
                names.append(f"point '{backup}' of node '{medium.node}', of which nobody was told")
    if failure := _transact(session, actions):
        logger.warning("backup=%s bitmaps not joined again: %s", backup or "any", failure)
        return [], names
    return names, []


def remove_guards(
    session: domain.Session, backup: naming.BackupId | None
) -> tuple[list[str], list[str]]:
    """Remove the bitmaps that kept the disks of BACKUP, or any of ours, from going back to a
    snapshot. (A line for each, what is still there, as a migration has begun to take it along.)"""
    found = [
        monitor_json.BitmapOf(medium.node, bitmap.name)
        for medium in _nodes(session).values()
        for bitmap in medium.bitmaps
        if naming.is_guard(bitmap.name) and backup in (None, naming.backup_of(bitmap.name))
    ]
    names = list(map(str, found))
    if failure := remove(session, found):
        logger.warning("backup=%s bitmaps not removed: %s", backup or "any", failure)
        return [], names
    return names, []


def remove(session: domain.Session, bitmaps: Iterable[monitor_json.BitmapOf]) -> str | None:
    """Remove all BITMAPS at one instant. Why QEMU refused; None: it did not."""
    return _transact(session, [monitor_json.bitmap_remove(one) for one in bitmaps])


def _divided(medium: block.Medium, backup: naming.BackupId | None) -> Iterator[block.Bitmap]:
    for bitmap in medium.bitmaps:
        told = naming.next_of(bitmap.name)
        if told is not None and backup in (None, told[0]):
            yield bitmap


def _nodes(session: domain.Session) -> Mapping[naming.NodeName, block.Medium]:
    """Every node; those of drives alone where QEMU does not tell of others, as it has closed an
    image."""
    nodes = domain.asked_nodes(session.qemu, session.capabilities)
    if not isinstance(nodes, str):
        return nodes
    if not session.capabilities.devices:
        return {}
    drives = block.parse_block(session.qemu.execute(monitor_json.query_block()))
    return {drive.medium.node: drive.medium for drive in drives if drive.medium}


def _transact(session: domain.Session, actions: list[dict[str, Any]]) -> str | None:
    """Why QEMU refused; None: it did not."""
    if not actions:
        return None
    try:
        session.qemu.execute(monitor_json.transaction(actions))
    except monitor_json.CommandFailed as failure:
        return failure.desc
    return None


# --- list, create, delete ---


def told(state: backup.BlockState) -> list[backup_conf.Branch]:
    """Every branch, and every bitmap of somebody else's."""
    disks = {}
    sizes = {}
    for disk in state.disks:
        if disk.medium is None:
            continue
        images = state.images(disk.medium.node)
        if images is not None:
            disks[disk.target], sizes[disk.target] = images, disk.medium.size
    found = []
    for name in branch.names(disks.values()):
        lines = {
            target: line
            for target, images in disks.items()
            if (line := branch.line(name, images, sizes[target], target)) and _has(line)
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
    known = line.dirty
    if bitmap is not None and line.foreign:
        known = min(bitmap.count, line.size)
    return backup_conf.BranchDisk(
        name=target,
        granularity=None if bitmap is None else bitmap.granularity,
        dirty=known,
        persistent=bitmap is not None and bitmap.persistent,
        reason=line.unsound,
        point=None if point is None else backup_conf.Point(point.backup, point.time),
        note=note,
    )


def create(session: domain.Session, state: backup.BlockState, name: str, at: naming.Point) -> None:
    """Begin branch NAME at one instant on every disk that a backup can have; AT, but for
    the disks' sizes and names, is its first point.

    Errors: VIR_ERR_CONFIG_UNSUPPORTED where there is something of that name, or no disk;
    VIR_ERR_OPERATION_INVALID where one was given away; VIR_ERR_OPERATION_FAILED with QEMU's
    words.
    """
    lines: dict[str, branch.Line] = {}
    for disk in state.disks:
        if disk.medium is None or disk.medium.readonly or disk.is_part:
            continue
        if disk.target in state.passed_through:
            continue
        backup.check_owned(disk, state.graph)
        images = state.images(disk.medium.node)
        if images is None:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"disk '{disk.target}': QEMU does not tell which image the guest writes to",
            )
        if images.active.node not in {line.node for line in lines.values()}:  # of another device
            lines[disk.target] = branch.line(name, images, disk.medium.size, disk.target)
    if not lines:
        raise errors.error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, "no disks selected for backup")
    backup.check_new(name, lines)
    points = {
        target: dataclasses.replace(at, size=line.size, disk=naming.disk_key(target))
        for target, line in lines.items()
    }
    actions = [
        action
        for target, line in lines.items()
        for action in branch.begin(name, line, points[target])
    ]
    if failure := _transact(session, actions):
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_FAILED, f"branch '{name}' cannot be created: {failure}"
        )


def delete(session: domain.Session, state: backup.BlockState, name: str) -> None:
    """Remove branch NAME from every disk.

    Errors: VIR_ERR_NO_DOMAIN_CHECKPOINT where no disk has it, VIR_ERR_OPERATION_INVALID where the
    bitmap is somebody else's or cannot be removed, or a disk was given away.
    """
    actions = []
    foreign, backing = [], []
    nodes = set()
    for disk in state.disks:
        images = state.images(disk.medium.node) if disk.medium else None
        if images is None or disk.medium is None or images.active.node in nodes:
            continue
        nodes.add(images.active.node)  # which another device may have, too
        backup.check_owned(disk, state.graph)
        line = branch.line(name, images, disk.medium.size, disk.target)
        if line.foreign:
            foreign.append(disk.target)
            continue
        # The branch's own goes first: while it is in the image, the mark is.
        own = [*([line.bitmap.name] if line.bitmap else []), *line.beside]
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
