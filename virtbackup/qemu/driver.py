# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU driver over a QMP socket: ``qmp:///absolute/path`` (the patch's hunk of qemu_driver.c).

A QMP socket serves one client at a time, so the driver connects for a call and lets go after it:
between calls the monitor is everybody's. What must outlast a call is in the status file and QEMU.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import secrets
import stat
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    backup,
    block,
    blockjob,
    domain,
    monitor,
    monitor_json,
    naming,
    nbdserver,
    process,
    qmp,
    scratch,
    status,
    sweep,
)

logger = logging.getLogger(__name__)

# The public flags (api.py), which a driver may not import: the wire numbers are the contract.
START_QUIESCE = 1 << 0
START_AUTODESTROY = 1 << 1
STOP_CANCEL = 1 << 0

_GONE = "QEMU is gone"


def open(uri: str, readonly: bool) -> "QmpDriver":
    """Serve ``qmp:///path``. Errors: VIR_ERR_INVALID_ARG for another shape of URI; those of
    ``monitor.Monitor``, unless nobody listens and a status file says that a backup ran there."""
    parts = urllib.parse.urlsplit(uri)
    path = urllib.parse.unquote(parts.path)
    if parts.netloc or not path.startswith("/") or parts.query or parts.fragment:
        raise errors.invalid_arg(
            "virConnectOpen", "uri", f"'{uri}': expected qmp:///absolute/path/to/qmp.sock"
        )
    return QmpDriver(path)


class QmpDriver:
    """The driver for the one QEMU (or qemu-storage-daemon) behind a QMP socket."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._trace: TextIO | None = None
        self._file = status.StatusFile(os.path.realpath(path))
        self._identity: domain.Identity | None = None
        self._autodestroy: tuple[hypervisor.DomainRef, naming.BackupId] | None = None
        self._connect_first()

    def _connect_first(self) -> None:
        try:
            with self._monitor():
                pass
        except errors.Error as failure:
            if _is_dead(failure) and self._file.load() is not None:
                return
            raise

    # --- the connection ---

    def close(self) -> None:
        """End the backup that was started to end with us; a failure to is logged."""
        if self._autodestroy is None:
            return
        (ref, backup_id), self._autodestroy = self._autodestroy, None
        running = self._file.load()
        if running is None or running.id != backup_id:
            return
        try:
            self.domain_backup_stop(ref, STOP_CANCEL)
        except errors.Error as failure:
            logger.warning("backup=%s could not be ended on close: %s", backup_id, failure)

    def get_type(self) -> str:
        return "QEMU"

    def get_version(self) -> int:
        major, minor, micro = self._known().capabilities.version
        return major * 1000000 + minor * 1000 + micro

    def is_alive(self) -> bool:
        try:
            with self._monitor():
                return True
        except errors.Error:
            return False

    def set_trace(self, trace: TextIO | None) -> None:
        self._trace = trace

    @contextlib.contextmanager
    def _monitor(self) -> Iterator[tuple[monitor.Monitor, domain.Identity]]:
        """A monitor for one call, and who answers; asked again only when another QEMU does."""
        with _qmp_border(), monitor.Monitor(self._path, self._trace) as qemu:
            known = self._identity
            if known is None or known.process is None or known.process != domain.process_of(qemu):
                known = self._identity = domain.identify(qemu)
            yield qemu, known

    def _known(self) -> domain.Identity:
        if self._identity is None:
            raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running")
        return self._identity

    # --- domains ---

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        """The one domain; one whose QEMU is gone is listed while its backup's status file is."""
        try:
            with self._monitor() as (_, known):
                return [known.ref]
        except errors.Error as failure:
            left = self._file.load()
            if not _is_dead(failure):
                raise
            if left is None:
                return []
            return [hypervisor.DomainRef(left.name, left.uuid, None)]

    def domain_get_state(self, ref: hypervisor.DomainRef) -> tuple[int, int]:
        try:
            with self._monitor() as (qemu, known):
                return domain.state(qemu, known.capabilities)
        except errors.Error as failure:
            if not _is_dead(failure):
                raise
            return libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN

    def domain_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        with self._monitor() as (qemu, known):
            state = domain.ask(qemu, known.capabilities)
            return domain.definition(known.ref, state.disks).format()

    # --- backup ---

    def domain_backup_start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> None:
        definition = backup_conf.BackupDef.parse(xml)
        if flags & START_QUIESCE:
            raise errors.error(
                libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, "QEMU guest agent is not configured"
            )
        owner = monitor.this_process() if flags & START_AUTODESTROY else None
        with self._file.locked(), self._monitor() as (qemu, known):
            state = self._make_room(qemu, known)
            aligned = definition.align_disks(domain.definition(known.ref, state.disks))
            plan = backup.plan(
                aligned, state, known.capabilities, _new_id(), scratch.default_directory()
            )
            process.check_address(plan.address)
            for disk in plan.disks:
                scratch.check(disk.source, disk.target)
            by_fd = known.capabilities.fdsets and state.vcpus_run
            self._run(process.Run(qemu, plan, by_fd), known, _status(plan, known, owner))
            if owner is not None:
                self._autodestroy = ref, plan.id

    def domain_backup_stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        with self._file.locked():
            running = self._file.load()
            if running is None:
                raise errors.error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP, "no domain backup job present")
            reasons = self._stop(running)
        if reasons and not flags & STOP_CANCEL:
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, _verdict(reasons))
        logger.info("backup=%s stopped cancel=%s", running.id, bool(flags & STOP_CANCEL))

    def domain_backup_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        with self._file.locked():
            return self._running().definition

    def domain_backup_get_info(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        with self._file.locked():
            running = self._running()
            try:
                with self._monitor() as (qemu, known):
                    reasons, nodes = self._look(qemu, known, running)
            except errors.Error as failure:
                if not _is_dead(failure):
                    raise
                reasons, nodes = _all(running, _GONE), {}
        return _info(running, reasons, nodes)

    def domain_backup_cleanup(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        with self._file.locked():
            left = self._file.load()
            try:
                with self._monitor() as (qemu, known):
                    if left is not None and not _is_stale(
                        known, domain.ask(qemu, known.capabilities), left
                    ):
                        raise errors.error(
                            libvirt.VIR_ERR_OPERATION_INVALID,
                            f"backup {left.id} is running: backup-stop ends it",
                        )
                    return self._clean(qemu, known, left)
            except errors.Error as failure:
                if not _is_dead(failure):
                    raise
                return self._forget(left) if left is not None else []

    # --- start ---

    def _make_room(self, qemu: monitor.Monitor, known: domain.Identity) -> backup.BlockState:
        """Refuse while a backup runs; clear away what a crash left of an earlier one."""
        state = domain.ask(qemu, known.capabilities)
        left = self._file.load()
        if left is not None and not _is_stale(known, state, left):
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
        for line in self._clean(qemu, known, left):
            logger.info("left by an earlier backup, removed: %s", line)
        return domain.ask(qemu, known.capabilities)

    def _run(self, run: process.Run, known: domain.Identity, starting: status.Status) -> None:
        """Do the plan, or undo all of it."""
        self._file.save(starting)
        try:
            run.server()
            starting = dataclasses.replace(starting, server=True)
            run.scratch_images()
            run.freeze()
            run.exports()
            self._file.save(dataclasses.replace(starting, phase="running"))
        except BaseException:
            self._undo(run.qemu, known, starting)
            raise
        logger.info("backup=%s started disks=%d", starting.id, len(starting.disks))

    def _undo(self, qemu: monitor.Monitor, known: domain.Identity, starting: status.Status) -> None:
        """After a failed start. Where the monitor broke, by a new one; else the next call will."""
        try:
            self._clean(qemu, known, starting)
        except (errors.Error, qmp.ProtocolError) as failure:
            logger.warning("backup=%s undo: %s; trying again", starting.id, failure)
            try:
                with self._monitor() as (fresh, again):
                    self._clean(fresh, again, starting)
            except errors.Error as lasting:
                if _is_dead(lasting):
                    self._forget(starting)
                else:
                    logger.warning("backup=%s left for backup-cleanup: %s", starting.id, lasting)

    # --- stop, info and cleanup ---

    def _running(self) -> status.Status:
        running = self._file.load()
        if running is None or running.phase != "running":
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP, "no domain backup job present")
        return running

    def _stop(self, running: status.Status) -> dict[str, str]:
        """Take the backup down; disk -> why it is bad."""
        try:
            with self._monitor() as (qemu, known):
                reasons = self._end(qemu, known, running)
                self._clean(qemu, known, running)
                return reasons
        except errors.Error as failure:
            if not _is_dead(failure) and not (
                isinstance(failure, monitor.MonitorLost) and not self.is_alive()
            ):
                raise
            self._forget(running)
            return _all(running, _GONE)

    def _end(
        self, qemu: monitor.Monitor, known: domain.Identity, running: status.Status
    ) -> dict[str, str]:
        """End the exports, and only then look whether the jobs still vouched for all reads."""
        before = monitor_json.parse_exports(qemu.execute(monitor_json.query_block_exports()))
        self._file.save(dataclasses.replace(running, phase="stopping"))
        sweep.Sweeper(qemu, known.capabilities, running.id).exports()
        jobs = monitor_json.parse_jobs(qemu.execute(monitor_json.query_jobs()))
        return self._judge(known, running, jobs, before)

    def _look(
        self, qemu: monitor.Monitor, known: domain.Identity, running: status.Status
    ) -> tuple[dict[str, str], dict[naming.NodeName, int]]:
        """The verdict so far, and the bytes every scratch image takes."""
        jobs = monitor_json.parse_jobs(qemu.execute(monitor_json.query_jobs()))
        exports = monitor_json.parse_exports(qemu.execute(monitor_json.query_block_exports()))
        sizes = block.parse_actual_sizes(qemu.execute(monitor_json.query_named_block_nodes()))
        return self._judge(known, running, jobs, exports), sizes

    def _judge(
        self,
        known: domain.Identity,
        running: status.Status,
        jobs: dict[naming.JobId, monitor_json.Job],
        exports: dict[naming.ExportId, monitor_json.Export],
    ) -> dict[str, str]:
        if _restarted(known, running):
            return _all(running, "the domain was restarted")
        if running.phase != "running":
            return _all(running, f"the process that was {running.phase} it died")
        return blockjob.judge(running.disks, jobs, exports)

    def _clean(
        self, qemu: monitor.Monitor, known: domain.Identity, left: status.Status | None
    ) -> list[str]:
        """Take a backup out of QEMU, then its files; without a status, whatever is ours by name."""
        sweeper = sweep.Sweeper(qemu, known.capabilities, left.id if left else None)
        removed = sweeper.exports()
        stopped = True
        if self._owns_server(qemu, known, left, bool(removed)):
            stopped = sweeper.server(_pid(known), _address(left) if left else None)
            removed.append("NBD server")
        removed += [*sweeper.jobs(), *sweeper.nodes(), *sweeper.fdsets()]
        if left is not None:
            removed += _remove_files(left)
            if stopped:
                self._file.remove()
            else:
                self._file.save(dataclasses.replace(left, phase="stopping", disks=()))
        return removed if stopped else [line for line in removed if line != "NBD server"]

    def _owns_server(
        self,
        qemu: monitor.Monitor,
        known: domain.Identity,
        left: status.Status | None,
        had_exports: bool,
    ) -> bool:
        """Whether an NBD server runs that is ours to stop: nobody else may export on it."""
        exports = monitor_json.parse_exports(qemu.execute(monitor_json.query_block_exports()))
        if any(export.type == "nbd" for export in exports.values()):
            return False
        if left is None:
            return had_exports
        if left.server:
            return not _restarted(known, left)
        return nbdserver.listens(_pid(known) or os.getpid(), _address(left))

    def _forget(self, left: status.Status) -> list[str]:
        """Remove the files of a backup whose QEMU is gone."""
        removed = _remove_files(left)
        address = _address(left)
        if isinstance(address, backup_conf.UnixAddress) and _is_dead_socket(address):
            pathlib.Path(address.path).unlink(missing_ok=True)
            removed.append(f"socket '{address.path}'")
        self._file.remove()
        return removed


@contextlib.contextmanager
def _qmp_border() -> Iterator[None]:
    """A reply that no parser knows leaves here as an error for the caller."""
    try:
        yield
    except qmp.ProtocolError as failure:
        raise errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, f"QEMU monitor: {failure}") from failure


def _is_dead(failure: errors.Error) -> bool:
    """Whether FAILURE means that no QEMU listens (any more)."""
    return failure.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR and isinstance(
        failure.__cause__, ConnectionRefusedError | FileNotFoundError
    )


def _is_dead_socket(address: backup_conf.UnixAddress) -> bool:
    with contextlib.suppress(OSError):
        mode = pathlib.Path(address.path).lstat().st_mode
        return stat.S_ISSOCK(mode) and not nbdserver.answers(address)
    return False


def _is_stale(known: domain.Identity, state: backup.BlockState, left: status.Status) -> bool:
    """Whether LEFT is of no running backup. The lock is held: nobody is starting or ending one."""
    return (
        left.phase != "running"
        or not _alive(left.owner)
        or _restarted(known, left)
        or left.id not in state.backups()
    )


def _restarted(known: domain.Identity, running: status.Status) -> bool:
    """Whether another process answers than the one the backup ran in."""
    return None not in (known.process, running.qemu) and known.process != running.qemu


def _alive(owner: status.Process | None) -> bool:
    return owner is None or monitor.process_start(owner[0]) == owner[1]


def _new_id() -> naming.BackupId:
    return naming.BackupId(secrets.token_hex(4))


def _pid(known: domain.Identity) -> int | None:
    return known.process[0] if known.process else None


def _all(running: status.Status, reason: str) -> dict[str, str]:
    return {disk.target: reason for disk in running.disks}


def _verdict(reasons: dict[str, str]) -> str:
    disks = "; ".join(f"disk '{target}': {reason}" for target, reason in reasons.items())
    return f"the backup is not good: {disks}"


def _address(of: status.Status) -> backup_conf.Address:
    return backup_conf.BackupDef.parse(of.definition).address


def _remove_files(left: status.Status) -> list[str]:
    paths = [disk.path for disk in left.disks if disk.path is not None]
    return [f"scratch image '{path}'" for path in paths if scratch.remove(path)]


def _status(
    plan: backup.BackupPlan, known: domain.Identity, owner: status.Process | None
) -> status.Status:
    """What is on disk while PLAN is being carried out."""
    return status.Status(
        id=plan.id,
        phase="starting",
        name=known.ref.name,
        uuid=known.ref.uuid,
        definition=plan.definition.format(),
        started=time.time(),
        server=False,
        qemu=known.process,
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


def _info(
    running: status.Status, reasons: dict[str, str], used: dict[naming.NodeName, int]
) -> backup_conf.BackupInfo:
    return backup_conf.BackupInfo(
        state="failed" if reasons else "running",
        started=running.started,
        address=_address(running),
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


_: Callable[[str, bool], hypervisor.BackupDriver] = open
"""mypy's proof that the driver has every hook."""
