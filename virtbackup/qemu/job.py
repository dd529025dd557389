# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's backup from start to verdict (the patch's qemuDomainBackupStart and -Stop).

What runs is in QEMU and in the status file, never only in this process. Every call holds the
domain's lock from its first look to its last command.
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    backup,
    block,
    blockjob,
    cleanup,
    domain,
    monitor,
    monitor_json,
    naming,
    process,
    qmp,
    scratch,
    status,
    sweep,
)

logger = logging.getLogger(__name__)

Connect = Callable[[], contextlib.AbstractContextManager[domain.Session]]
"""Opens a session with the domain's QEMU; raises ``monitor.NotListening`` when there is none."""

_GONE = "QEMU is gone"


class BackupJob:
    """The one backup that a domain can have."""

    def __init__(self, file: status.StatusFile, connect: Connect) -> None:
        self._file = file
        self._connect = connect

    def start(
        self, definition: backup_conf.BackupDef, owner: status.Process | None
    ) -> naming.BackupId:
        """Start the backup; it ends with OWNER, if any. Nothing remains of a start that fails."""
        with self._file.locked(), self._connect() as session:
            state = self._make_room(session)
            aligned = definition.align_disks(domain.definition(session.ref, state.disks))
            id = naming.BackupId(os.urandom(4).hex())
            plan = backup.plan(
                aligned, state, session.capabilities, id, scratch.default_directory()
            )
            process.check_address(plan.address)
            for disk in plan.disks:
                scratch.check(disk.source, disk.target)
            by_fd = session.capabilities.fdsets and state.vcpus_run
            run = process.Run(session.qemu, plan, by_fd)
            self._run(run, session, _starting(plan, session, owner))
            return id

    def stop(self) -> dict[str, str]:
        """Take the backup down; disk -> why its data is not good. Empty: all of it is.

        Errors: VIR_ERR_NO_DOMAIN_BACKUP when there is none.
        """
        with self._file.locked():
            running = self._file.load()
            if running is None:
                raise _no_backup()
            try:
                with self._connect() as session:
                    reasons = self._end(session, running)
                    cleanup.clean(session, running, self._file)
            except monitor.NotListening:
                reasons = self._gone(running)
            except monitor.MonitorLost:
                if self._listening():
                    raise
                reasons = self._gone(running)
        logger.info("backup=%s stopped bad=%s", running.id, list(reasons))
        return reasons

    def definition(self) -> str:
        """The live ``<domainbackup>``. Errors: VIR_ERR_NO_DOMAIN_BACKUP."""
        with self._file.locked():
            return self._running().definition

    def info(self) -> backup_conf.BackupInfo:
        """The verdict so far. Errors: VIR_ERR_NO_DOMAIN_BACKUP."""
        with self._file.locked():
            running = self._running()
            try:
                with self._connect() as session:
                    return _look(session, running)
            except monitor.NotListening:
                return _info(running, _all(running, _GONE), {})

    def cleanup(self) -> list[str]:
        """Remove what a crash left; a line for each thing. Errors: VIR_ERR_OPERATION_INVALID
        while a backup runs."""
        with self._file.locked():
            left = self._file.load()
            try:
                with self._connect() as session:
                    state = domain.ask(session.qemu, session.capabilities)
                    if left is not None and not _is_stale(session, state, left):
                        raise errors.error(
                            libvirt.VIR_ERR_OPERATION_INVALID,
                            f"backup {left.id} is running: backup-stop ends it",
                        )
                    return cleanup.clean(session, left, self._file)
            except monitor.NotListening:
                return cleanup.forget(left, self._file) if left is not None else []

    # --- start ---

    def _make_room(self, session: domain.Session) -> backup.BlockState:
        """Refuse while a backup runs; clear away what a crash left of an earlier one."""
        state = domain.ask(session.qemu, session.capabilities)
        left = self._file.load()
        if left is not None and not _is_stale(session, state, left):
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID, "another backup job is already running"
            )
        if left is None and (jobs := state.running_jobs()):
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID,
                f"another backup job is already running ('{jobs[0]}'), but there is no status of"
                f" it in '{status.directory()}'; if nobody owns it, backup-cleanup ends it",
            )
        if left is None and not state.backups():
            return state
        for line in cleanup.clean(session, left, self._file):
            logger.info("left by an earlier backup, removed: %s", line)
        return domain.ask(session.qemu, session.capabilities)

    def _run(self, run: process.Run, session: domain.Session, starting: status.Status) -> None:
        """Do the plan, or undo all of it."""
        self._file.save(starting)
        try:
            run.server()
            socket = cleanup.socket_inode(run.plan.address)
            starting = dataclasses.replace(starting, server=True, socket=socket)
            run.scratch_images()
            run.freeze()
            run.exports()
            self._file.save(dataclasses.replace(starting, phase="running"))
        except BaseException as failure:
            if isinstance(failure, process.ServerInUse):
                starting = dataclasses.replace(starting, server=False)
            self._undo(session, _without_others_files(starting, run.created))
            raise
        logger.info("backup=%s started disks=%d", starting.id, len(starting.disks))

    def _undo(self, session: domain.Session, starting: status.Status) -> None:
        """After a failed start. Where the monitor broke, by a new one; else the next call will."""
        try:
            cleanup.clean(session, starting, self._file)
        except (errors.Error, qmp.ProtocolError) as failure:
            logger.warning("backup=%s undo: %s; trying again", starting.id, failure)
            try:
                with self._connect() as again:
                    cleanup.clean(again, starting, self._file)
            except monitor.NotListening:
                cleanup.forget(starting, self._file)
            except errors.Error as lasting:
                logger.warning("backup=%s left for backup-cleanup: %s", starting.id, lasting)

    # --- stop and info ---

    def _running(self) -> status.Status:
        running = self._file.load()
        if running is None or running.phase != "running":
            raise _no_backup()
        return running

    def _end(self, session: domain.Session, running: status.Status) -> dict[str, str]:
        """End the exports, and only then look whether the jobs still vouched for all reads."""
        qemu = session.qemu
        exports = monitor_json.parse_exports(qemu.execute(monitor_json.query_block_exports()))
        self._file.save(dataclasses.replace(running, phase="stopping"))
        sweep.Sweeper(qemu, session.capabilities, running.id).exports()
        jobs = monitor_json.parse_jobs(qemu.execute(monitor_json.query_jobs()))
        return _judge(session, running, jobs, exports)

    def _gone(self, running: status.Status) -> dict[str, str]:
        """After QEMU's end."""
        cleanup.forget(running, self._file)
        return _all(running, _GONE)

    def _listening(self) -> bool:
        try:
            with self._connect():
                return True
        except monitor.NotListening:
            return False


def _no_backup() -> errors.Error:
    return errors.error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP, "no domain backup job present")


def _starting(
    plan: backup.BackupPlan, session: domain.Session, owner: status.Process | None
) -> status.Status:
    """What is on disk while PLAN is being carried out."""
    return status.Status(
        id=plan.id,
        phase="starting",
        name=session.ref.name,
        uuid=session.ref.uuid,
        definition=plan.definition.format(),
        started=time.time(),
        server=None,
        socket=None,
        qemu=session.process,
        owner=owner,
        disks=tuple(
            status.DiskStatus(
                target=disk.target,
                size=disk.size,
                export=disk.export,
                exportname=disk.exportname,
                job=disk.job,
                scratch_file=disk.scratch_file,
                path=scratch.name(disk.source, disk.opaque),
            )
            for disk in plan.disks
        ),
    )


def _without_others_files(starting: status.Status, created: list[str]) -> status.Status:
    """The status of a start that failed: files it did not come to create are not its own."""
    disks = (
        disk if disk.path in created else dataclasses.replace(disk, path=None)
        for disk in starting.disks
    )
    return dataclasses.replace(starting, disks=tuple(disks))


def _is_stale(session: domain.Session, state: backup.BlockState, left: status.Status) -> bool:
    """Whether LEFT is of no running backup. The lock is held: nobody is starting or ending one."""
    return (
        left.phase != "running"
        or not _alive(left.owner)
        or session.restarted_since(left.qemu)
        or left.id not in state.backups()
    )


def _alive(owner: status.Process | None) -> bool:
    return owner is None or status.process_start(owner[0]) == owner[1]


def _look(session: domain.Session, running: status.Status) -> backup_conf.BackupInfo:
    """The verdict so far, and the bytes every scratch image takes where it is safe to ask."""
    queries = [monitor_json.query_jobs(), monitor_json.query_block_exports()]
    replies = session.qemu.execute_all(queries)
    jobs = monitor_json.parse_jobs(replies[0])
    reasons = _judge(session, running, jobs, monitor_json.parse_exports(replies[1]))
    used: dict[naming.NodeName, int] = {}
    if session.capabilities.named_nodes_are_safe(jobs.values()):
        nodes = session.qemu.execute(monitor_json.query_named_block_nodes())
        used = block.parse_actual_sizes(nodes)
    return _info(running, reasons, used)


def _judge(
    session: domain.Session,
    running: status.Status,
    jobs: Mapping[naming.JobId, monitor_json.Job],
    exports: Mapping[naming.ExportId, monitor_json.Export],
) -> dict[str, str]:
    """Disk -> why its data is not good."""
    if session.restarted_since(running.qemu):
        return _all(running, "the domain was restarted")
    if running.phase != "running":
        return _all(running, f"the process that was {running.phase} it died")
    return blockjob.judge(running.disks, jobs, exports)


def _all(running: status.Status, reason: str) -> dict[str, str]:
    return {disk.target: reason for disk in running.disks}


def _info(
    running: status.Status,
    reasons: Mapping[str, str],
    used: Mapping[naming.NodeName, int],
) -> backup_conf.BackupInfo:
    return backup_conf.BackupInfo(
        state="failed" if reasons else "running",
        started=running.started,
        address=backup_conf.BackupDef.parse(running.definition).address,
        disks=tuple(
            backup_conf.DiskInfo(
                name=disk.target,
                export=disk.exportname,
                state="failed" if disk.target in reasons else "running",
                reason=reasons.get(disk.target),
                capacity=disk.size,
                scratch_used=used.get(disk.scratch_file),
            )
            for disk in running.disks
        ),
    )
