# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QEMU behind a monitor: who it is, what it can do, which disks it has (qemu_domain.c)."""

import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import re
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import libvirt

from virtbackup import errors, hypervisor, runtime
from virtbackup.conf import backup_conf, domain_conf
from virtbackup.qemu import (
    backup,
    block,
    blockjob,
    capabilities,
    dialect,
    monitor,
    monitor_json,
    naming,
)

ID = 1
"""The id of the one domain behind a monitor."""

STREAM_PATIENCE = 5.0
"""Seconds to wait for a job that must be over before QEMU's nodes can be asked for."""
_STREAM_POLL = 0.02
_PASSING = {"stream": capabilities.STREAM_CRASH, "create": capabilities.CREATE_CRASH}
"""By their types: the jobs that are waited for so."""

_NO_UUID = "00000000-0000-0000-0000-000000000000"
_DEVICES = ("/machine/peripheral", "/machine/peripheral-anon")
"""Where QEMU has its devices, those with an id and those without."""
_OBJECTS = "/objects"
"""Where it has what else its user has made."""
_PASSED_THROUGH = frozenset({"scsi-block", "scsi-generic"})
_ELSEWHERE = re.compile(r"(vhost-user-(blk|scsi)|vhost-scsi)(-|$)")
"""Types of devices whose disks QEMU does not read and write itself."""
_NO_MEDIUM = os.strerror(errno.ENOMEDIUM)
_EJECTED = " is ejected"
"""What QEMU says of an image that it has closed, on being asked for all."""
_URL = bytes.fromhex("6ba7b8119dad11d180b400c04fd430c8")
"""The namespace of URLs, by RFC 4122."""

# QEMU's RunState -> libvirt's state and reason; what is not here and not running is paused.
_STATES = {
    "running": (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_UNKNOWN),
    "shutdown": (libvirt.VIR_DOMAIN_SHUTDOWN, libvirt.VIR_DOMAIN_SHUTDOWN_USER),
    "io-error": (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR),
    "prelaunch": (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP),
    "guest-panicked": (libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_CRASHED_PANICKED),
}


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which QEMU answers, and what it can do."""

    ref: hypervisor.DomainRef
    capabilities: capabilities.Capabilities
    process: runtime.Process | None
    """None where the process cannot be seen from here."""


@dataclasses.dataclass(frozen=True)
class Session:
    """A monitor for the length of one call, and who answers on it."""

    qemu: monitor.Monitor
    identity: Identity
    known: Sequence[domain_conf.DiskDef] | None = None
    """The disks as somebody knows them who gives them names; None: each is known by its id."""

    @property
    def ref(self) -> hypervisor.DomainRef:
        return self.identity.ref

    @property
    def capabilities(self) -> capabilities.Capabilities:
        return self.identity.capabilities

    @property
    def process(self) -> runtime.Process | None:
        return self.identity.process

    @property
    def pid(self) -> int | None:
        return self.process[0] if self.process else None

    @property
    def targets(self) -> Mapping[str, str] | None:
        """A device's id -> the name of the disk that people know it by; None: its own id."""
        if self.known is None:
            return None
        return {disk.alias: disk.target for disk in self.known if disk.alias}

    def restarted_since(self, then: runtime.Process | None, backup: naming.BackupId) -> bool:
        """Whether another QEMU answers than THEN did, as BACKUP began: another process, as far as
        both can be seen, and not one that passes on what a QEMU says that still has BACKUP."""
        if self.process is None or then is None:
            return False
        return runtime.are_different(self.process, then) and not self._has(backup)

    def _has(self, backup: naming.BackupId) -> bool:
        """Whether QEMU shows a job of BACKUP."""
        spoken = dialect.Dialect(self.capabilities)
        jobs = spoken.parse_jobs(self.qemu.execute(spoken.query_jobs()))
        return any(naming.backup_of(job) == backup for job in jobs)


def identify(
    qemu: monitor.Monitor,
    ref: hypervisor.DomainRef | None = None,
    known: capabilities.Capabilities | None = None,
    place: str | None = None,
) -> Identity:
    """Ask QEMU what it can do, where that is not KNOWN, and who it is, where REF does not tell. A
    guest without a uuid gets one made from PLACE, by default the monitor's path."""
    caps = known or _ask_capabilities(qemu)
    if ref is not None:
        return Identity(ref, caps, process_of(qemu))
    name, given = None, _NO_UUID
    if caps.devices:
        told = qemu.execute_all([monitor_json.query_name(), monitor_json.query_uuid()])
        name, given = monitor_json.parse_name(told[0]), monitor_json.parse_uuid(told[1])
    if given == _NO_UUID:
        given = made_uuid(place or qemu.path)
    ref = hypervisor.DomainRef(name or pathlib.Path(qemu.path).name, given, ID)
    return Identity(ref, caps, process_of(qemu))


def made_uuid(path: str) -> str:
    """Of a guest that has none, by its monitor's PATH: version 5 of RFC 4122 of the URL, as
    ``uuid.uuid5`` makes it, which is slow to load."""
    url = f"qmp://{os.path.realpath(path)}".encode(errors="surrogateescape")
    digest = bytearray(hashlib.sha1(_URL + url, usedforsecurity=False).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _ask_capabilities(qemu: monitor.Monitor) -> capabilities.Capabilities:
    greeting = qemu.greeting
    commands = monitor_json.parse_commands(qemu.execute(monitor_json.query_commands()))
    features: frozenset[str] = frozenset()
    if "query-qmp-schema" in commands:
        features = capabilities.parse_features(qemu.execute(monitor_json.query_qmp_schema()))
    return capabilities.Capabilities(greeting.version, greeting.package, commands, features)


def process_of(qemu: monitor.Monitor) -> runtime.Process | None:
    """The process behind a monitor."""
    pid = qemu.peer_pid()
    start = None if pid is None else runtime.process_start(pid)
    if pid is None or start is None:
        return None
    return runtime.Process(pid, start, runtime.namespaces())


def state(qemu: monitor.Monitor, caps: capabilities.Capabilities) -> tuple[int, int]:
    """libvirt's (state, reason)."""
    if not caps.devices:
        return _STATES["running"]
    now = monitor_json.parse_status(qemu.execute(monitor_json.query_status()))
    if now.running:
        return _STATES["running"]
    return _STATES.get(now.status, (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER))


def runs(qemu: monitor.Monitor, caps: capabilities.Capabilities) -> bool:
    """Whether the guest does, or there is none."""
    return state(qemu, caps) == _STATES["running"]


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the block layer shows at one moment; None is what cannot be asked for."""

    jobs: Mapping[naming.JobId, monitor_json.Job]
    exports: Mapping[naming.ExportId, monitor_json.Export] | None
    graph: block.Graph | None
    drives: Any
    """The reply to ``query-block``."""
    state: monitor_json.RunState | None


def _queries(caps: capabilities.Capabilities) -> list[monitor_json.Command]:
    """What is asked to see it."""
    queries = [dialect.Dialect(caps).query_jobs()]
    if caps.block_exports:
        queries.append(monitor_json.query_block_exports())
    if caps.block_graph:
        queries.append(monitor_json.query_block_graph())
    if caps.devices:
        queries += [monitor_json.query_block(), monitor_json.query_status()]
    return queries


def _seen(caps: capabilities.Capabilities, told: list[Any]) -> _Seen:
    """What was TOLD to ``_queries``. Errors: the first CommandFailed in it."""
    replies = iter(monitor.all_done(told))
    return _Seen(
        dialect.Dialect(caps).parse_jobs(next(replies)),
        monitor_json.parse_exports(next(replies)) if caps.block_exports else None,
        block.parse_graph(next(replies)) if caps.block_graph else None,
        next(replies) if caps.devices else None,
        monitor_json.parse_status(next(replies)) if caps.devices else None,
    )


def ask(session: Session, bitmaps: bool = False) -> backup.BlockState:
    """Everything a plan needs to know of QEMU's block layer; BITMAPS: of every image, too.

    Errors: ``named_nodes``'s.
    """
    qemu, caps = session.qemu, session.capabilities
    queries = _queries(caps)
    places: list[str] = []
    if caps.devices and "qom-list" in caps.commands:
        # Whoever gives the disks their names tells of the devices, too.
        places += _DEVICES if session.known is None else ()
        places += [_OBJECTS] if capabilities.NBD_IOTHREAD_ABORT.affects(caps.version) else []
    told = qemu.execute_each([*queries, *map(monitor_json.qom_list, places)])
    types = _types(places, told[len(queries) :])
    seen = _seen(caps, told[: len(queries)])
    strangers: tuple[block.Disk, ...] = ()
    if seen.state is None:
        disks = block.disks_of_nodes(named_nodes(qemu, caps, flat=False), seen.graph)
        runs = io_error = False
    else:
        disks, strangers = _drives(session, seen)
        runs, io_error = seen.state.running, _is_paused_by_error(qemu, seen.state, disks)
    iothreads = _iothreads(qemu, caps, disks, types)
    synchronous: frozenset[str] = frozenset()
    if capabilities.SYNCHRONOUS_WRITER.affects(caps.version):
        synchronous = _synchronous(qemu, disks)
    nodes: dict[naming.NodeName, block.Medium] = {}
    filtered = any(disk.medium and disk.medium.driver in block.FILTERS for disk in disks)
    wanted = seen.graph is None or (filtered and caps.guards(filtered))
    wanted = wanted or _may_be_twins(disks, strangers)
    if bitmaps or (wanted and named_nodes_are_safe(qemu, caps)):
        nodes = named_nodes(qemu, caps)
    return backup.BlockState(
        disks, seen.jobs, seen.exports or {}, seen.graph, runs, iothreads, io_error, synchronous,
        nodes, strangers, passed_through(disks, session.known, types), _replayed(qemu, caps, disks),
        {path.rpartition("/")[2]: type for path, type in types.items() if _ELSEWHERE.match(type)},
    )  # fmt: skip


def _drives(session: Session, seen: _Seen) -> tuple[tuple[block.Disk, ...], tuple[block.Disk, ...]]:
    """(The guest's disks, those that are known to nobody who gives them their names)."""
    disks = block.with_parts(block.parse_block(seen.drives, session.targets), seen.graph)
    if session.known is None:
        return disks, ()
    known = {disk.qom_path for disk in disks}
    every = block.parse_block(seen.drives)
    return disks, tuple(d for d in every if d.qom_path and d.qom_path not in known)


def _types(places: Iterable[str], lists: Iterable[Any]) -> dict[str, str]:
    """A device's or an object's place in QEMU's object tree -> its type. LISTS are of PLACES."""
    types: dict[str, str] = {}
    for place, told in zip(places, lists, strict=True):
        match told:
            case monitor_json.CommandFailed(error_class="DeviceNotFound"):
                pass  # nothing of the kind was ever made
            case monitor_json.CommandFailed():
                raise told
            case _:
                children = monitor_json.parse_children(told)
                types |= {f"{place}/{name}": type for name, type in children.items()}
    return types


def passed_through(
    disks: Iterable[block.Disk],
    known: Iterable[domain_conf.DiskDef] | None,
    types: Mapping[str, str],
) -> frozenset[str]:
    """As ``backup.BlockState``; TYPES of devices by their places, or KNOWN as libvirt has it."""
    luns = {disk.target for disk in known or () if disk.device == "lun"}
    return frozenset(
        disk.target
        for disk in disks
        if disk.target in luns or types.get(disk.qom_path or "") in _PASSED_THROUGH
    )


def _may_be_twins(disks: Iterable[block.Disk], strangers: Iterable[block.Disk]) -> bool:
    """Whether the names of the files alone do not tell that no two drives write to the same: QEMU
    has one of options for what has a filter above it, or is a part of something."""
    media = [disk.medium for disk in (*disks, *strangers) if disk.medium]
    names = [medium.filename for medium in media if not medium.readonly]
    return len(names) > 1 and any(name.startswith("json:") for name in names)


def check_known(
    session: Session, wanted: backup_conf.BackupDef, state: backup.BlockState
) -> backup_conf.BackupDef:
    """Refuse where those who name the disks know one that QEMU has not, or the other way round: the
    guest's data in it would be missing in the backup, and nobody told. WANTED may leave such a disk
    out by name; the rest of it is returned. So where QEMU has closed a disk's image.

    Errors: VIR_ERR_OPERATION_UNSUPPORTED, VIR_ERR_OPERATION_INVALID.
    """
    left_out = {disk.name for disk in wanted.disks if disk.present is False}
    found = {disk.target for disk in state.disks}
    for disk in session.known or ():
        if disk.target in found | left_out or disk.readonly or not disk.has_medium:
            continue
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            f"disk '{disk.target}' is not one that QEMU itself reads and writes (type"
            f" '{disk.type}'), or is not in QEMU any more: leave it out (present=\"no\")",
        )
    for drive in state.disks:
        if drive.medium is None and not drive.removable and drive.target not in left_out:
            raise domain_conf.no_image(drive.target)
    for drive in state.strangers:
        if drive.target in left_out or drive.medium is None or drive.medium.readonly:
            continue
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            f"device '{drive.target}' of QEMU writes '{drive.medium.shown}' and is no disk of"
            ' the domain\'s XML: leave it out by that name (present="no")',
        )
    for name, type in state.elsewhere.items():
        if name not in left_out:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"disk '{name}' is not one that QEMU itself reads and writes (a device of type"
                f" '{type}'): leave it out (present=\"no\")",
            )
    known = {disk.target for disk in (session.known or ())} - found
    strangers = {drive.target for drive in state.strangers}
    elsewhere = left_out & (known | strangers | set(state.elsewhere))
    disks = tuple(disk for disk in wanted.disks if disk.name not in elsewhere)
    return dataclasses.replace(wanted, disks=disks)


def look(qemu: monitor.Monitor, caps: capabilities.Capabilities) -> blockjob.Sight:
    """What has become of a backup, the reading of frozen disks not tried."""
    told = qemu.execute_each(_queries(caps))
    closed = _closed_image(told[-2]) if caps.devices else None
    if closed is not None:
        told[-2] = []
    seen = _seen(caps, told)
    sight = blockjob.Sight(
        seen.jobs, seen.exports, None, io_error=False, graph=seen.graph, closed=closed
    )
    if seen.state is None or closed is not None:
        return sight
    disks = block.parse_block(seen.drives)
    return dataclasses.replace(
        sight,
        drives={disk.qom_path: disk for disk in disks if disk.qom_path},
        io_error=_is_paused_by_error(qemu, seen.state, disks),
    )


def _closed_image(reply: Any) -> str | None:
    """QEMU's words where it does not tell of its drives, as it has closed an image below a filter,
    a job's, say: it does so with one that it finds corrupt. None: REPLY is something else."""
    if isinstance(reply, monitor_json.CommandFailed) and _NO_MEDIUM in reply.desc:
        return reply.desc
    return None


def _is_paused_by_error(
    qemu: monitor.Monitor, now: monitor_json.RunState, disks: Iterable[block.Disk]
) -> bool:
    """Whether the guest is paused for an error of a drive. QEMU before 10.0 forgets that as the
    guest is saved or migrated, be it in vain, and only DISKS tell."""
    if now.status != "postmigrate" or not any(d.io_status in blockjob.STOPPED for d in disks):
        return now.status == "io-error"
    try:
        reply = qemu.execute(monitor_json.query_migrate())
    except monitor_json.CommandFailed:
        return False
    return monitor_json.parse_migration(reply) == "failed"


def named_nodes(
    qemu: monitor.Monitor, caps: capabilities.Capabilities, flat: bool = True
) -> dict[naming.NodeName, block.Medium]:
    """As ``told_nodes``. Errors: VIR_ERR_OPERATION_INVALID where they are not told."""
    nodes = told_nodes(qemu, caps, flat)
    if isinstance(nodes, str):
        raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, nodes)
    return nodes


def told_nodes(
    qemu: monitor.Monitor, caps: capabilities.Capabilities, flat: bool = True
) -> dict[naming.NodeName, block.Medium] | str:
    """Every node; FLAT, each without what the images below its own say of theirs, where QEMU can
    leave that out. Else why not: asking for them would kill QEMU, or it does not tell of any for
    one."""
    return danger_of_named_nodes(qemu, caps) or asked_nodes(qemu, caps, flat)


def asked_nodes(
    qemu: monitor.Monitor, caps: capabilities.Capabilities, flat: bool = True
) -> dict[naming.NodeName, block.Medium] | str:
    """As ``told_nodes``, where it is known to be safe to ask."""
    asked = monitor_json.query_named_block_nodes(flat and caps.flat_nodes)
    try:
        return block.parse_named_nodes(qemu.execute(asked))
    except monitor_json.CommandFailed as failure:
        if not failure.desc.endswith(_EJECTED):
            raise
        return (
            "QEMU does not tell of its images any more, as it has closed one that it found corrupt:"
            f" {failure.desc}"
        )


def named_nodes_are_safe(qemu: monitor.Monitor, caps: capabilities.Capabilities) -> bool:
    """Whether QEMU survives query-named-block-nodes if it is the next thing that it is asked."""
    return not _jobs_against_named_nodes(qemu, caps)


def danger_of_named_nodes(qemu: monitor.Monitor, caps: capabilities.Capabilities) -> str | None:
    """Why query-named-block-nodes might kill QEMU, if it is the next thing that it is asked; None:
    it does not. A job that streams, or makes an image, is waited for until STREAM_PATIENCE is
    over."""
    end = time.monotonic() + STREAM_PATIENCE
    while found := _jobs_against_named_nodes(qemu, caps):
        passing = next((job for job in found if job.type in _PASSING), None)
        if passing is None:
            return (
                "a backup job has ended that nobody has dismissed, and on this QEMU"
                f" {capabilities.NAMED_NODES_CRASH.evidence}"
            )
        if time.monotonic() > end:
            return (
                f"job '{passing.id}' is not over, or not dismissed, and on this QEMU"
                f" {_PASSING[passing.type].evidence}"
            )
        time.sleep(_STREAM_POLL)
    return None


def _jobs_against_named_nodes(
    qemu: monitor.Monitor, caps: capabilities.Capabilities
) -> list[monitor_json.Job]:
    """The jobs for which QEMU must not be asked just now."""
    if caps.named_nodes_are_always_safe:
        return []
    spoken = dialect.Dialect(caps)
    return caps.jobs_against_named_nodes(
        spoken.parse_jobs(qemu.execute(spoken.query_jobs())).values()
    )


def definition(ref: hypervisor.DomainRef, found: Iterable[block.Disk]) -> domain_conf.DomainDef:
    """The domain as its XML tells it."""
    disks = (disk.definition() for disk in found)
    return domain_conf.DomainDef(ref.name, ref.uuid, ref.id, tuple(map(_as_seen_here, disks)))


def _as_seen_here(disk: domain_conf.DiskDef) -> domain_conf.DiskDef:
    """DISK, as that of a block device where it is one, which QEMU does not say. What is not in /dev
    is not looked at, as its file system may hang."""
    if disk.source is not None and disk.source.startswith("/dev/"):
        with contextlib.suppress(OSError, ValueError):
            if stat.S_ISBLK(os.stat(disk.source).st_mode):  # noqa: PTH116  (it need not be a path)
                return dataclasses.replace(disk, type="block")
    return disk


def _synchronous(qemu: monitor.Monitor, found: Iterable[block.Disk]) -> frozenset[str]:
    """The writable floppies and SD cards."""
    writable = (disk for disk in found if disk.removable and disk.medium)
    return frozenset(
        disk.target
        for disk in writable
        if disk.medium and not disk.medium.readonly and disk.qom_path
        if _property(qemu, disk.qom_path, "type") in ("floppy", "sd-card")
    )


def _replayed(
    qemu: monitor.Monitor, caps: capabilities.Capabilities, found: Iterable[block.Disk]
) -> frozenset[str]:
    """The disks whose requests QEMU records or replays, and what those are made of."""
    disks = {
        disk.target: disk.medium.replays
        for disk in found
        if disk.medium and (disk.medium.replays or disk.is_part)
    }
    if not any(disks.values()) or "query-replay" not in caps.commands:
        return frozenset()
    mode = monitor_json.parse_replay(qemu.execute(monitor_json.query_replay()))
    return frozenset() if mode == "none" else frozenset(disks)


def _iothreads(
    qemu: monitor.Monitor,
    caps: capabilities.Capabilities,
    found: Iterable[block.Disk],
    types: Mapping[str, str],
) -> dict[str, str]:
    """Disk -> its iothread, where that matters; TYPES of a guest's objects by their places. Of a
    node without a device QEMU does not say where it runs: where an iothread exists at all, such a
    node is taken to be in it."""
    matters = caps.aborts_in_iothreads or capabilities.NBD_IOTHREAD_ABORT.affects(caps.version)
    if not caps.devices and matters and "qom-list" in caps.commands:
        types = _types([_OBJECTS], qemu.execute_each([monitor_json.qom_list(_OBJECTS)]))
    iothreads = [path.rpartition("/")[2] for path, type in types.items() if type == "iothread"]
    if not iothreads:
        return {}
    if not caps.devices:
        return {disk.target: iothreads[0] for disk in found}
    return {
        disk.target: iothread
        for disk in found
        if disk.qom_path and (iothread := _iothread_of(qemu, disk.qom_path))
    }


def _iothread_of(qemu: monitor.Monitor, path: str) -> str | None:
    """The iothread of a device, or of the controller whose bus it sits on."""
    bus = _property(qemu, path, "parent_bus")
    for device in (path, *_prefixes(bus)):
        if iothread := _property(qemu, device, "iothread"):
            return iothread.rsplit("/", 1)[-1]
    return None


def _property(qemu: monitor.Monitor, path: str, name: str) -> str:
    """A property of a QOM object, empty where the object has none of that name."""
    try:
        reply = qemu.execute(monitor_json.qom_get(path, name))
    except monitor_json.CommandFailed:
        return ""
    return monitor_json.parse_property(reply)


def _prefixes(path: str) -> list[str]:
    """The objects above a QOM path, the nearest first: devices, not QEMU's own containers."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 3, -1)]
