# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt's clients ask for, and events, of one QEMU without libvirt."""

import contextlib
import dataclasses
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence

import libvirt

from virtbackup import errors, hypervisor, runtime
from virtbackup.conf import capabilities_conf
from virtbackup.qemu import (
    block,
    capabilities,
    domain,
    domain_obj,
    events,
    host,
    monitor,
    monitor_json,
    naming,
)

logger = logging.getLogger(__name__)

_HMP = 1 << 0
"""VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP: the command is one for people."""

_JOB_TYPES = {
    "stream": libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL,
    "mirror": libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY,
    "commit": libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT,
    "backup": libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP,
}
_MIB = 1 << 20


class QmpQueries:
    """The hooks of ``hypervisor.QueryDriver``, without those that need somebody who knows more than
    QEMU does, and of ``EventDriver``. Errors, of each: the monitor's."""

    _domain: domain_obj.DomainObj
    _identity: domain.Identity | None
    _gone: hypervisor.DomainRef | None = None
    """The domain where there has been no QEMU of it yet, but in its backup's status file."""

    def __init__(self) -> None:
        self._events = events.Events(self._begin, self._end)
        self._process_end = events.ProcessEnd(self._ended)

    @contextlib.contextmanager
    def _session(self) -> Iterator[domain.Session]:
        """QEMU, for one call."""
        raise NotImplementedError
        yield

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        raise NotImplementedError

    def domain_get_state(self, ref: hypervisor.DomainRef) -> tuple[int, int]:
        raise NotImplementedError

    # --- the host ---

    def domain_lookup(
        self, *, uuid: str | None = None, name: str | None = None, id: int | None = None
    ) -> hypervisor.DomainRef | None:
        for ref in self.list_domains():
            if ref.uuid == uuid or ref.name == name or (id is not None and ref.id == id):
                return ref
        return None

    def get_hostname(self) -> str:
        return socket.gethostname()

    def get_lib_version(self) -> int:
        """Ours: nobody else's library has to do with the domain."""
        return hypervisor.VERSION

    def get_capabilities(self) -> str:
        return capabilities_conf.Capabilities(host.arch()).format()

    def node_get_info(self) -> host.NodeInfo:
        return host.node_info()

    def node_get_security_model(self) -> tuple[str, str]:
        return "", ""

    # --- the domain ---

    def domain_get_info(self, ref: hypervisor.DomainRef) -> tuple[int, int, int, int, int]:
        """What this QEMU does not tell is 0, and all is of one that is gone."""
        state, _ = self.domain_get_state(ref)
        try:
            with self._session() as session:
                memory, vcpus = _memory(session) >> 10, _vcpus(session)
        except monitor.NotListening:
            return state, 0, 0, 0, 0
        time = None if session.pid is None else host.cpu_time(session.pid)
        return state, memory, memory, vcpus, time or 0

    def domain_get_os_type(self, ref: hypervisor.DomainRef) -> str:
        return "hvm"

    def domain_is_persistent(self, ref: hypervisor.DomainRef) -> bool:
        return False

    def domain_get_autostart(self, ref: hypervisor.DomainRef) -> bool:
        return False

    def domain_has_managed_save_image(self, ref: hypervisor.DomainRef, flags: int) -> bool:
        return False

    def domain_snapshot_num(self, ref: hypervisor.DomainRef, flags: int) -> int:
        return 0

    def domain_get_security_label(self, ref: hypervisor.DomainRef) -> tuple[str, bool]:
        return "", False

    def domain_get_messages(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        return []

    # --- its disks ---

    def domain_get_block_info(
        self, ref: hypervisor.DomainRef, path: str, flags: int
    ) -> tuple[int, int, int]:
        """Errors, too: VIR_ERR_INVALID_ARG for a disk that there is not, or without a medium."""
        with self._session() as session:
            disk = self._disk(session, path, f"invalid path {path} not assigned to domain")
        if disk.medium is None:
            raise _invalid(f"disk '{path}' does not currently have a source assigned")
        allocation, physical = _file_sizes(disk.medium)
        return disk.medium.size, allocation, physical

    def domain_block_stats_flags(
        self, ref: hypervisor.DomainRef, path: str, flags: int
    ) -> Mapping[str, int]:
        """PATH empty: of all disks together. Errors, too: VIR_ERR_INVALID_ARG for a disk that there
        is not; VIR_ERR_OPERATION_UNSUPPORTED."""
        with self._session() as session:
            _check_devices(session, "statistics of disks")
            disks = list(self._domain.job.disks(session))
            if path:
                disks = [_find(disks, path, f"invalid path: {path}")]
            reply = session.qemu.execute(monitor_json.query_blockstats())
        found = block.parse_blockstats(reply)
        return _told(sum((_statistics_of(disk, found) for disk in disks), block.Statistics()))

    def domain_get_block_job_info(
        self, ref: hypervisor.DomainRef, path: str, flags: int
    ) -> tuple[int, int, int, int] | None:
        """Of somebody else's job. Errors, too: VIR_ERR_INVALID_ARG for a disk that there is not."""
        with self._session() as session:
            disk = self._disk(session, path, f"disk '{path}' not found in domain")
            found = _job_on(session, disk)
        if found is None:
            return None
        bandwidth = found.speed
        if not flags & libvirt.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES:
            bandwidth = -(-bandwidth // _MIB)
        unknown = libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_UNKNOWN
        return _JOB_TYPES.get(found.type, unknown), bandwidth, found.offset, found.length

    def _disk(self, session: domain.Session, path: str, otherwise: str) -> block.Disk:
        return _find(self._domain.job.disks(session), path, otherwise)

    # --- deeds ---

    def domain_suspend(self, ref: hypervisor.DomainRef) -> None:
        """Of a guest that stands already, nothing. Errors, too: VIR_ERR_OPERATION_UNSUPPORTED."""
        with self._session() as session:
            _check_devices(session, "guest that could stand")
            if not _runs(session):
                return
            session.qemu.execute(monitor_json.stop())
        self._tell(
            session.ref,
            libvirt.VIR_DOMAIN_EVENT_SUSPENDED,
            libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED,
        )

    def domain_resume(self, ref: hypervisor.DomainRef) -> None:
        """Errors, too: VIR_ERR_OPERATION_INVALID where it runs, VIR_ERR_OPERATION_UNSUPPORTED."""
        with self._session() as session:
            _check_devices(session, "guest that could run")
            if _runs(session):
                raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "domain is already running")
            session.qemu.execute(monitor_json.cont())
        self._tell(
            session.ref,
            libvirt.VIR_DOMAIN_EVENT_RESUMED,
            libvirt.VIR_DOMAIN_EVENT_RESUMED_UNPAUSED,
        )

    def domain_monitor_command(self, ref: hypervisor.DomainRef, command: str, flags: int) -> str:
        """A command of QMP and its reply, QEMU's refusal included, as JSON; or with FLAGS 1 one of
        the monitor for people, and what that says. Errors, too: VIR_ERR_INVALID_ARG,
        VIR_ERR_INTERNAL_ERROR for what is not JSON, VIR_ERR_OPERATION_UNSUPPORTED."""
        errors.check_flags("virDomainQemuMonitorCommand", flags, _HMP)
        if flags & _HMP:
            with self._session() as session:
                _check_devices(session, "monitor for people")
                reply = session.qemu.execute(monitor_json.human_monitor_command(command))
                return monitor_json.parse_text(reply)
        sent = _parse_command(command)
        answer: dict[str, object]
        with self._session() as session:
            try:
                answer = {"return": session.qemu.execute(sent)}
            except monitor_json.CommandFailed as failure:
                answer = {"error": {"class": failure.error_class, "desc": failure.desc}}
        return json.dumps(answer, separators=(",", ":"))

    # --- events ---

    def event_register(self, callback: events.Callback) -> Callable[[], None]:
        """The ends of backups, the one that runs now included; that the guest was made to stand
        here, or to go on; and the end of QEMU."""
        return self._events.register(callback)

    def _begin(self) -> None:
        self._watch_process()
        self._domain.listen(self._backup_ended)

    def _end(self) -> None:
        self._process_end.watch(None)
        self._domain.listen(None)

    def _watch_process(self) -> None:
        """Watch the QEMU that answered last, where somebody wants to know."""
        if self._events and self._identity is not None:
            self._process_end.watch(self._identity.process)

    def _ended(self) -> None:
        """QEMU has ended; nobody tells why."""
        self._tell(
            self._ref_now(),
            libvirt.VIR_DOMAIN_EVENT_STOPPED,
            libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN,
        )

    def _backup_ended(self, good: bool, reason: str | None) -> None:
        self._events.emit(hypervisor.BackupEnded(self._ref_now(), good, reason))

    def _ref_now(self) -> hypervisor.DomainRef:
        """The domain; without an id where its QEMU is seen to have ended."""
        if self._identity is None:
            assert self._gone is not None
            return self._gone
        ref, process = self._identity.ref, self._identity.process
        gone = process is not None and not runtime.is_alive(process)
        return dataclasses.replace(ref, id=None) if gone else ref

    def _tell(self, ref: hypervisor.DomainRef, event: int, detail: int) -> None:
        self._events.emit(hypervisor.LifecycleEvent(ref, event, detail))


def _memory(session: domain.Session) -> int:
    """Bytes."""
    if "query-memory-size-summary" not in session.capabilities.commands:
        return 0
    reply = session.qemu.execute(monitor_json.query_memory_size_summary())
    return monitor_json.parse_memory_size(reply)


def _vcpus(session: domain.Session) -> int:
    if "query-cpus-fast" not in session.capabilities.commands:
        return 0
    return monitor_json.parse_cpus(session.qemu.execute(monitor_json.query_cpus_fast()))


def _runs(session: domain.Session) -> bool:
    status = session.qemu.execute(monitor_json.query_status())
    return monitor_json.parse_status(status).running


def _check_devices(session: domain.Session, what: str) -> None:
    """Errors: VIR_ERR_OPERATION_UNSUPPORTED."""
    if not session.capabilities.devices:
        version = capabilities.dotted(session.capabilities.version)
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED, f"qemu-storage-daemon {version} has no {what}"
        )


def _find(disks: Sequence[block.Disk], path: str, otherwise: str) -> block.Disk:
    """The disk that is called PATH, or has that file in it."""
    for disk in disks:
        if path == disk.target:
            return disk
    for disk in disks:
        if disk.medium is not None and path in (disk.medium.filename, disk.medium.shown):
            return disk
    raise _invalid(otherwise)


def _invalid(text: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_INVALID_ARG, text)


def _file_sizes(medium: block.Medium) -> tuple[int, int]:
    """(Bytes that are taken, bytes from the file's begin to its end), each by the other where it is
    not told: what is not a file here, QEMU alone knows."""
    taken = length = None
    if medium.filename.startswith("/"):
        with contextlib.suppress(OSError):
            found = os.stat(medium.filename)  # noqa: PTH116  (it need not be a path)
            taken, length = found.st_blocks * 512, found.st_size
    allocation = taken if medium.allocation is None else medium.allocation
    return allocation or 0, length or allocation or 0


def _statistics_of(disk: block.Disk, found: Mapping[str, block.Statistics]) -> block.Statistics:
    names = (disk.qom_path, disk.drive, disk.medium.node if disk.medium else None)
    told = (found[name] for name in names if name and name in found)
    return next(told, block.Statistics())


def _told(found: block.Statistics) -> dict[str, int]:
    """By the names that libvirt has for it, and in its order."""
    return {
        libvirt.VIR_DOMAIN_BLOCK_STATS_WRITE_BYTES: found.wr_bytes,
        libvirt.VIR_DOMAIN_BLOCK_STATS_WRITE_REQ: found.wr_operations,
        libvirt.VIR_DOMAIN_BLOCK_STATS_READ_BYTES: found.rd_bytes,
        libvirt.VIR_DOMAIN_BLOCK_STATS_READ_REQ: found.rd_operations,
        libvirt.VIR_DOMAIN_BLOCK_STATS_FLUSH_REQ: found.flush_operations,
        libvirt.VIR_DOMAIN_BLOCK_STATS_WRITE_TOTAL_TIMES: found.wr_time_ns,
        libvirt.VIR_DOMAIN_BLOCK_STATS_READ_TOTAL_TIMES: found.rd_time_ns,
        libvirt.VIR_DOMAIN_BLOCK_STATS_FLUSH_TOTAL_TIMES: found.flush_time_ns,
    }


def _job_on(session: domain.Session, disk: block.Disk) -> monitor_json.BlockJob | None:
    """Somebody's job on a disk."""
    if disk.medium is None or "query-block-jobs" not in session.capabilities.commands:
        return None
    jobs = monitor_json.parse_others_block_jobs(
        session.qemu.execute(monitor_json.query_block_jobs())
    )
    if not jobs:
        return None
    names = {naming.JobId(name) for name in (disk.drive, disk.medium.node) if name}
    if session.capabilities.block_graph:
        graph = session.qemu.execute(monitor_json.query_block_graph())
        names |= block.parse_graph(graph).jobs_on(disk.medium.node)
    return next((job for job in jobs if job.id in names), None)


def _parse_command(text: str) -> monitor_json.Command:
    """A caller's words to QEMU. Errors: VIR_ERR_INTERNAL_ERROR, VIR_ERR_INVALID_ARG."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise errors.error(
            libvirt.VIR_ERR_INTERNAL_ERROR, f"cannot parse json {text}: {failure}"
        ) from failure
    match message:
        case {"execute": str(execute), "arguments": dict(arguments)} if len(message) == 2:
            return monitor_json.Command(execute, arguments)
        case {"execute": str(execute)} if len(message) == 1:
            return monitor_json.Command(execute)
    raise _invalid('expected {"execute": COMMAND, "arguments": {...}}, the second where need be')
