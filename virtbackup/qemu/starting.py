# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is on disk of a backup while it is being started, from before the first command on."""

import dataclasses
import os
import time
from collections.abc import Collection, Mapping

from virtbackup import runtime
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    backup,
    capabilities,
    domain,
    image_lock,
    process,
    scratch,
    status,
)


def status_of(
    run: process.Run, owner: runtime.Process | None, was_stopped: bool, kept: str | None
) -> status.Status:
    """What is noted before RUN begins, of a guest that, where it WAS_STOPPED, stands still already;
    KEPT: as ``why_kept``."""
    plan, session = run.plan, run.session
    wanted = {disk.name: disk for disk in plan.definition.disks}
    noted = status.Status(
        id=plan.id,
        phase="starting",
        name=session.ref.name,
        uuid=session.ref.uuid,
        definition=plan.definition.format(),
        engine=plan.engine,
        started=time.time(),
        server=None,
        socket=None,
        qemu=session.process,
        owner=owner,
        given_up=None,
        was_stopped=was_stopped,
        cancelled=False,
        advanced=False,
        verdict=None,
        told=False,
        save_failure="backup",
        save_reason=None,
        branch=plan.definition.branch,
        advances=plan.definition.advances,
        disks=tuple(
            status.DiskStatus(
                target=disk.target,
                size=disk.size,
                node=disk.node,
                device=disk.device,
                image=disk.image,
                stores=tuple(sorted(disk.stores)),
                offset=disk.offset,
                backing=disk.backing,
                guards=disk.guards,
                export=disk.export,
                exportname=disk.exportname,
                job=disk.job,
                scratch_file=disk.scratch_file,
                access=disk.access,
                breaks_snapshot=disk.breaks_snapshot,
                directory=os.path.realpath(scratch.place(disk.source)),
                threshold=run.thresholds.get(disk.target),
                path=scratch.name(disk.source, disk.opaque),
                inode=None,
                type=wanted[disk.target].type or "full",
                type_reason=wanted[disk.target].reason,
                branch=_branch(disk),
            )
            for disk in plan.disks
        ),
    )
    return noted if kept is None else keeping(noted, session, kept)


def _branch(disk: backup.DiskPlan) -> status.BranchStatus | None:
    if disk.step is None:
        return None
    return status.BranchStatus(disk.step.node, disk.step.keeps, disk.since, dirty=None)


def keeping(noted: status.Status, session: domain.Session, reason: str) -> status.Status:
    """The status of a backup whose disks QEMU is not made to give away, for REASON."""
    refuses = session.capabilities.refuses_saves
    if not refuses:
        return dataclasses.replace(noted, save_failure=None if refuses is None else "backup")
    return dataclasses.replace(noted, save_failure="save", save_reason=reason)


def why_kept(
    session: domain.Session,
    engine: capabilities.Engine,
    aligned: backup_conf.BackupDef,
    state: backup.BlockState,
) -> str | None:
    """Why QEMU is not to be made to give its disks away in the middle of the backup; None: it is,
    as somebody knows the domain who migrates and saves it. With the classic engine QEMU then keeps
    the disks all the same, so whoever takes them over must be kept from them until it has ended."""
    if session.known is None:
        return "QEMU gives its disks away during a backup only where that was started over libvirt"
    if not session.capabilities.gives_way(engine):
        version = capabilities.dotted(session.capabilities.version)
        return f"QEMU {version} cannot give its disks away during a backup (engine {engine})"
    if engine == "hybrid":
        return None
    if session.pid is None:
        return "the process of QEMU cannot be seen, nor who else is kept from its disks"
    chosen = {disk.name for disk in aligned.disks if disk.present}
    for disk in state.disks:
        if disk.target not in chosen:
            continue
        if not disk.medium or not image_lock.is_kept(session.pid, disk.medium.filename):
            return f"disk '{disk.target}' is no local file that only this QEMU can write to"
    return None


def with_inodes(noted: status.Status, inodes: Mapping[str, int]) -> status.Status:
    """Noted which files the scratch images are that have been made so far."""
    disks = (dataclasses.replace(disk, inode=inodes.get(disk.target)) for disk in noted.disks)
    return dataclasses.replace(noted, disks=tuple(disks))


def with_changed(noted: status.Status, changed: Mapping[str, int]) -> status.Status:
    """Noted how many bytes of a disk have changed since its branch's last point."""
    disks = tuple(
        dataclasses.replace(
            disk, branch=dataclasses.replace(disk.branch, dirty=changed[disk.target])
        )
        if disk.branch and disk.target in changed
        else disk
        for disk in noted.disks
    )
    return dataclasses.replace(noted, disks=disks)


def without_others_files(noted: status.Status, created: Collection[str]) -> status.Status:
    """The status of a start that failed: files it did not come to create are not its own."""
    disks = (
        disk if disk.path in created else dataclasses.replace(disk, path=None)
        for disk in noted.disks
    )
    return dataclasses.replace(noted, disks=tuple(disks))
