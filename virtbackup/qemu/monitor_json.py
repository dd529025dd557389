# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP commands as data and their replies as types (qemu_monitor_json.c).

One function a command; None leaves an argument out. One parser a reply; a reply that has not the
shape QAPI promises is a ``qmp.ProtocolError``.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf
from virtbackup.qemu import naming, qmp


@dataclasses.dataclass(frozen=True)
class Command:
    """A QMP command; ``fds`` names the descriptors to be passed along with it."""

    execute: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fds: tuple[int, ...] = ()


class CommandFailed(errors.Error):
    """QEMU refused a command: which, with QEMU's class and words, in libvirt's text."""

    def __init__(self, command: Command, error_class: str, desc: str) -> None:
        text = f"unable to execute QEMU command '{command.execute}': {desc}"
        super().__init__(
            libvirt.VIR_ERR_INTERNAL_ERROR,
            f"internal error: {text}",
            strings=("internal error: %s", text, None),
        )
        self.command = command
        self.error_class = error_class
        self.desc = desc


class NotFound(CommandFailed):
    """What was to be taken away is not there (any more): not a failure of the monitor."""


class JobNotFound(NotFound):
    """It was a job (the patch's second part)."""


def command_failed(command: Command, failure: qmp.Failure) -> CommandFailed:
    """The exception for QEMU's refusal of COMMAND."""
    kind: type[CommandFailed] = CommandFailed
    match command.execute, failure.error_class, failure.desc:
        case "block-job-cancel", "DeviceNotActive", _:
            kind = JobNotFound
        case "job-cancel" | "job-dismiss", _, "Job not found":
            kind = JobNotFound
        case "closefd" | "object-del", _, desc if desc.endswith(" not found"):
            kind = NotFound
    return kind(command, failure.error_class, failure.desc)


def outcome(command: Command, reply: qmp.Success | qmp.Failure) -> Any:
    """What COMMAND returns, or the exception for QEMU's refusal."""
    return reply.value if isinstance(reply, qmp.Success) else command_failed(command, reply)


def _command(execute: str, **arguments: Any) -> Command:
    """Underscores stand for the dashes of QAPI names; None is left out."""
    return Command(
        execute,
        {name.replace("_", "-"): value for name, value in arguments.items() if value is not None},
    )


# --- handshake and identity ---


def qmp_capabilities() -> Command:
    return _command("qmp_capabilities")


def query_version() -> Command:
    return _command("query-version")


def query_commands() -> Command:
    return _command("query-commands")


def query_qmp_schema() -> Command:
    return _command("query-qmp-schema")


def query_name() -> Command:
    return _command("query-name")


def query_uuid() -> Command:
    return _command("query-uuid")


def query_status() -> Command:
    return _command("query-status")


def query_replay() -> Command:
    return _command("query-replay")


def query_migrate() -> Command:
    return _command("query-migrate")


def cont() -> Command:
    return _command("cont")


def stop() -> Command:
    return _command("stop")


def query_memory_size_summary() -> Command:
    return _command("query-memory-size-summary")


def query_cpus_fast() -> Command:
    return _command("query-cpus-fast")


def human_monitor_command(line: str) -> Command:
    """A command of the monitor for people."""
    return _command("human-monitor-command", command_line=line)


def parse_commands(reply: Any) -> frozenset[str]:
    """The names in a ``query-commands`` reply."""
    return frozenset(_str(item, "name") for item in _list(reply))


def parse_name(reply: Any) -> str | None:
    """The ``-name``, or None where none was given."""
    match reply:
        case {"name": str(name)} if qmp.is_plain(name):
            return name
        case dict() if "name" not in reply:
            return None
    raise _unexpected("query-name", reply)


def parse_uuid(reply: Any) -> str:
    """The uuid, which is all zeroes where none was given."""
    uuid = _str(reply, "UUID").lower()
    if not _UUID.fullmatch(uuid):
        raise _unexpected("query-uuid", reply)
    return uuid


@dataclasses.dataclass(frozen=True)
class RunState:
    """``query-status``: whether vCPUs run, and QEMU's RunState."""

    running: bool
    status: str


def parse_status(reply: Any) -> RunState:
    match reply:
        case {"running": bool(running), "status": str(status)}:
            return RunState(running, status)
    raise _unexpected("query-status", reply)


def parse_replay(reply: Any) -> str:
    """Whether the guest is recorded or replayed: none, record or play."""
    match reply:
        case {"mode": str(mode)}:
            return mode
    raise _unexpected("query-replay", reply)


def parse_migration(reply: Any) -> str | None:
    """How the last one stands, a save counts as one; None: there was none."""
    match reply:
        case {"status": str(status)}:
            return status
        case dict():
            return None
    raise _unexpected("query-migrate", reply)


def parse_memory_size(reply: Any) -> int:
    """Bytes of memory that the guest has, those that were plugged in included."""
    base = _int(reply, "base-memory")
    return min(base + (_int(reply, "plugged-memory") if "plugged-memory" in reply else 0), _MOST)


def parse_cpus(reply: Any) -> int:
    """How many virtual CPUs there are."""
    return len(_list(reply))


def parse_text(reply: Any) -> str:
    """What the monitor for people says, line ends and all."""
    if isinstance(reply, str):
        return reply
    raise _unexpected("human-monitor-command", reply)


# --- block devices, nodes, the graph: parsed in block ---


def query_block() -> Command:
    return _command("query-block")


def query_named_block_nodes(flat: bool = False) -> Command:
    """FLAT: of each image without those that it is backed by, which are nodes themselves."""
    return _command("query-named-block-nodes", flat=flat or None)


def query_blockstats() -> Command:
    return _command("query-blockstats")


def query_block_graph() -> Command:
    return _command("x-debug-query-block-graph")


def qom_get(path: str, property: str) -> Command:
    return _command("qom-get", path=path, property=property)


def qom_list(path: str) -> Command:
    return _command("qom-list", path=path)


def parse_children(reply: Any) -> dict[str, str]:
    """A ``qom-list``: what is within the object, by name -> its type."""
    return {
        _str(item, "name"): type.removeprefix("child<").removesuffix(">")
        for item in _list(reply)
        if (type := _str(item, "type")).startswith("child<")
    }


def object_add(kind: str, id: str, wrapped: bool, **properties: Any) -> Command:
    """Make an object; WRAPPED: its properties are one argument. None is left out."""
    given = {k.replace("_", "-"): value for k, value in properties.items() if value is not None}
    rest = {"props": given} if wrapped else given
    return Command("object-add", {"qom-type": kind, "id": id, **rest})


def object_del(id: str) -> Command:
    """Fails as NotFound where there is none of that ID."""
    return _command("object-del", id=id)


def parse_credentials(reply: Any) -> tuple[str, ...]:
    """The ids of the TLS credentials in a ``qom-list`` of ``/objects``."""
    found = parse_children(reply)
    return tuple(name for name, type in found.items() if type.startswith("tls-creds-"))


def parse_property(reply: Any) -> str:
    """``qom-get`` of a property that holds a name or a path."""
    if isinstance(reply, str) and qmp.is_plain(reply):
        return reply
    raise _unexpected("qom-get", reply)


# --- file descriptors ---


def add_fd(fd: int, opaque: str) -> Command:
    """Hand FD over into a new fd set."""
    return dataclasses.replace(_command("add-fd", opaque=opaque), fds=(fd,))


def parse_add_fd(reply: Any) -> int:
    """The number of the set."""
    return _int(reply, "fdset-id")


def remove_fd(fdset_id: int) -> Command:
    return _command("remove-fd", fdset_id=fdset_id)


def query_fdsets() -> Command:
    return _command("query-fdsets")


def parse_fdsets(reply: Any) -> dict[int, tuple[str, ...]]:
    """fd set -> the notes (``opaque``) on its descriptors."""
    return {
        _int(fdset, "fdset-id"): tuple(
            _str(fd, "opaque") for fd in _list(fdset.get("fds")) if "opaque" in fd
        )
        for fdset in _list(reply)
    }


def getfd(fd: int, name: str) -> Command:
    """Hand FD over under NAME, for one command that uses it up."""
    return dataclasses.replace(_command("getfd", fdname=name), fds=(fd,))


def closefd(name: str) -> Command:
    """Take back what was handed over by ``getfd``. Fails as NotFound where it is not there."""
    return _command("closefd", fdname=name)


# --- character devices ---


def query_chardev() -> Command:
    return _command("query-chardev")


def parse_chardevs(reply: Any) -> tuple[str, ...]:
    """What every character device is, in QEMU's words: a socket's tell where it listens."""
    return tuple(_str(item, "filename") for item in _list(reply))


# --- nodes ---


def blockdev_add_scratch(
    node: naming.NodeName, file: naming.NodeName, filename: str, backing: naming.NodeName | None
) -> Command:
    """Open the qcow2 image in FILENAME as NODE, its file as FILE, over the node BACKING or nothing.

    Never flushed: a scratch image need not outlive QEMU, and to delete one would wait for the disk
    it is on, and the guest with it.
    """
    protocol = {"driver": "file", "node-name": file, "filename": filename}
    cache = {"no-flush": True}  # its file's, too
    plain = _command("blockdev-add", driver="qcow2", node_name=node, file=protocol, cache=cache)
    return dataclasses.replace(plain, arguments={**plain.arguments, "backing": backing})


def blockdev_add_snapshot_access(node: naming.NodeName, filter: naming.NodeName) -> Command:
    """Show as NODE the disk under FILTER as it was when the filter came."""
    return _command("blockdev-add", driver="snapshot-access", node_name=node, file=filter)


def blockdev_add_raw(node: naming.NodeName, file: naming.NodeName) -> Command:
    """Show FILE as NODE, as it is."""
    return _command("blockdev-add", driver="raw", node_name=node, file=file)


def blockdev_add_null(node: naming.NodeName, size: int) -> Command:
    """A NODE of SIZE bytes that is nowhere."""
    return _command("blockdev-add", driver="null-co", node_name=node, size=size, read_zeroes=True)


def blockdev_mirror(job: naming.JobId, node: naming.NodeName, target: naming.NodeName) -> Command:
    """From now on, what is written to NODE goes to TARGET, too."""
    return _command("blockdev-mirror", job_id=job, device=node, target=target, sync="none")


PROBE_DRIVER = "bochs"
"""A format without backing files that reads its node's first sector when it is opened."""


def blockdev_add_probe(node: naming.NodeName, file: naming.NodeName) -> Command:
    """Open FILE, read-only, as an image that it is not; see ``parse_probe``."""
    sector = {"driver": "raw", "file": file, "size": 512}
    return _command(
        "blockdev-add", driver=PROBE_DRIVER, node_name=node, file=sector, read_only=True
    )


_PROBE_WAS_READ = ("Image not in Bochs format", "Catalog size is too", "Extent size")
"""How QEMU's words begin when it does not like a sector that it has read."""


def parse_probe(failure: CommandFailed) -> str | None:
    """Why FAILURE of a probe says that its node cannot be read; None when it was read, and was no
    image of that format.

    Only words known to mean that count as read: a frozen disk that is not understood is not good.
    """
    if failure.desc.startswith(_PROBE_WAS_READ):
        return None
    return failure.desc.rsplit(": ", 1)[-1]


def block_set_write_threshold(node: naming.NodeName, threshold: int) -> Command:
    """Note a write to NODE beyond THRESHOLD bytes: once, by BLOCK_WRITE_THRESHOLD."""
    return _command("block-set-write-threshold", node_name=node, write_threshold=threshold)


def blockdev_del(node: naming.NodeName) -> Command:
    return _command("blockdev-del", node_name=node)


def x_blockdev_del(node: naming.NodeName | None = None, id: str | None = None) -> Command:
    """As ``blockdev-del`` was called up to QEMU 2.8; up to 2.7 it wants the id of a drive."""
    return _command("x-blockdev-del", node_name=node, id=id)


# --- jobs ---


def blockdev_backup(
    job: naming.JobId | None,
    device: str,
    target: str,
    filter: naming.NodeName | None = None,
    on_cbw_error: Literal["break-snapshot"] | None = None,
    auto_dismiss: bool | None = False,
    speed: int | None = None,
) -> dict[str, Any]:
    """The transaction action: from now on, old data of DEVICE goes to TARGET before it is lost.

    JOB None: the job has the id of its device. SPEED, in bytes a second, limits nothing here.
    ON_CBW_ERROR says what breaks when TARGET fails; None is the guest's write.
    """
    data = {
        "job-id": job,
        "device": device,
        "target": target,
        "sync": "none",
        "auto-dismiss": auto_dismiss,
        "speed": speed,
        "filter-node-name": filter,
        "on-cbw-error": on_cbw_error,
    }
    given = {name: value for name, value in data.items() if value is not None}
    return {"type": "blockdev-backup", "data": given}


@dataclasses.dataclass(frozen=True)
class BitmapOf:
    """A dirty bitmap by its node and name; NODE None is looked for from the export's node down."""

    node: naming.NodeName | None
    name: naming.BitmapName

    def data(self) -> Any:
        """QAPI's BlockDirtyBitmapOrStr."""
        return self.name if self.node is None else {"node": self.node, "name": self.name}

    def __str__(self) -> str:
        return f"bitmap '{self.name}' of node '{self.node}'"


def bitmap_add(
    bitmap: BitmapOf, granularity: int, persistent: bool, disabled: bool = False
) -> dict[str, Any]:
    """The transaction action: from now on BITMAP notes what is written; GRANULARITY in bytes."""
    return _bitmap_action(
        "add", bitmap, granularity=granularity, persistent=persistent, disabled=disabled
    )


def bitmap_remove(bitmap: BitmapOf) -> dict[str, Any]:
    """The transaction action, which takes effect when the whole transaction does."""
    return _bitmap_action("remove", bitmap)


def bitmap_enable(bitmap: BitmapOf) -> dict[str, Any]:
    return _bitmap_action("enable", bitmap)


def bitmap_disable(bitmap: BitmapOf) -> dict[str, Any]:
    return _bitmap_action("disable", bitmap)


def bitmap_clear(bitmap: BitmapOf) -> dict[str, Any]:
    return _bitmap_action("clear", bitmap)


def bitmap_merge(target: BitmapOf, source: BitmapOf) -> dict[str, Any]:
    """The transaction action: TARGET knows, too, what SOURCE knows."""
    data = {"node": target.node, "target": target.name, "bitmaps": [source.data()]}
    return {"type": "block-dirty-bitmap-merge", "data": data}


def _bitmap_action(verb: str, bitmap: BitmapOf, **more: Any) -> dict[str, Any]:
    data = {"node": bitmap.node, "name": bitmap.name, **more}
    return {"type": f"block-dirty-bitmap-{verb}", "data": data}


def transaction(actions: Sequence[Mapping[str, Any]]) -> Command:
    return _command("transaction", actions=list(actions))


def query_jobs() -> Command:
    return _command("query-jobs")


def query_block_jobs() -> Command:
    return _command("query-block-jobs")


@dataclasses.dataclass(frozen=True)
class Job:
    """One entry of ``query-jobs``: QAPI's JobInfo."""

    id: naming.JobId
    type: str
    status: str
    error: str | None
    device: str = ""
    """By what QEMU calls a job that could not be given an id of ours; else empty."""


def parse_jobs(reply: Any) -> dict[naming.JobId, Job]:
    jobs = {}
    for item in _list(reply):
        id = naming.JobId(_str(item, "id"))
        error = qmp.one_line(_str(item, "error")) if "error" in item else None
        jobs[id] = Job(id, _str(item, "type"), _str(item, "status"), error)
    return jobs


def parse_block_jobs(reply: Any) -> dict[naming.JobId, Job]:
    """``query-block-jobs``: before QEMU 2.12 a job has no status, and is gone when it ends. A job
    that has its drive's id and the speed of one of ours goes by our name for it."""
    jobs = {}
    for item in _list(reply):
        device = _str(item, "device")
        ours = naming.job_of_speed(_int(item, "speed"))
        id = ours or naming.JobId(device)
        status = _str(item, "status") if "status" in item else "running"
        error = qmp.one_line(_str(item, "error")) if "error" in item else None
        jobs[id] = Job(id, _str(item, "type"), status, error, device if ours else "")
    return jobs


@dataclasses.dataclass(frozen=True)
class BlockJob:
    """One entry of ``query-block-jobs``: QAPI's BlockJobInfo, of a job that is none of ours."""

    id: naming.JobId
    type: str
    speed: int
    """Its limit, bytes a second; 0: none."""
    offset: int
    length: int


def parse_others_block_jobs(reply: Any) -> tuple[BlockJob, ...]:
    """``query-block-jobs``: how far the jobs are that are none of ours."""
    found = (
        BlockJob(
            naming.JobId(_str(item, "device")),
            _str(item, "type"),
            _int(item, "speed"),
            _int(item, "offset"),
            _int(item, "len"),
        )
        for item in _list(reply)
    )
    return tuple(
        job
        for job in found
        if naming.backup_of(job.id) is None and naming.job_of_speed(job.speed) is None
    )


def block_job_cancel(job: str) -> Command:
    """Also of a job that somebody has paused. Fails as JobNotFound when the job is gone."""
    return _command("block-job-cancel", device=job, force=True)


def block_job_dismiss(job: str) -> Command:
    return _command("block-job-dismiss", id=job)


def job_cancel(job: naming.JobId) -> Command:
    """Also of a job that somebody has paused. Fails as JobNotFound when the job is gone."""
    return _command("job-cancel", id=job)


def job_dismiss(job: naming.JobId) -> Command:
    return _command("job-dismiss", id=job)


# --- NBD ---


def nbd_server_start(
    address: backup_conf.Address,
    max_connections: int | None = 0,
    fdname: str | None = None,
    tls_creds: str | None = None,
) -> Command:
    """Listen on ADDRESS, or with the socket that was handed over as FDNAME; with TLS_CREDS only to
    clients that go by these. MAX_CONNECTIONS 0 is any number of clients; QEMU's own limit, None,
    differs from version to version."""
    addr: dict[str, Any]
    match address:
        case _ if fdname is not None:
            addr = {"type": "fd", "data": {"str": fdname}}
        case backup_conf.IpAddress():
            host, port = address.endpoint
            addr = {"type": "inet", "data": {"host": host, "port": str(port)}}
        case backup_conf.UnixAddress(path):
            addr = {"type": "unix", "data": {"path": path}}
    return _command(
        "nbd-server-start", addr=addr, max_connections=max_connections, tls_creds=tls_creds
    )


def nbd_server_stop() -> Command:
    return _command("nbd-server-stop")


def block_export_add_nbd(
    id: naming.ExportId, node: naming.NodeName, name: str, bitmap: BitmapOf | None = None
) -> Command:
    bitmaps = None if bitmap is None else [bitmap.data()]
    return _command(
        "block-export-add",
        type="nbd", id=id, node_name=node, name=name, writable=False, bitmaps=bitmaps,
    )  # fmt: skip


def nbd_server_add(device: str, name: str | None, bitmap: str | None = None) -> Command:
    """As exports were made before ``block-export-add``: of a node or drive, read-only, under NAME
    or the device's own; with a BITMAP of it or of what it is over."""
    return _command("nbd-server-add", device=device, name=name, bitmap=bitmap)


def block_export_del(id: naming.ExportId) -> Command:
    """Also of one that a client reads."""
    return _command("block-export-del", id=id, mode="hard")


def query_block_exports() -> Command:
    return _command("query-block-exports")


@dataclasses.dataclass(frozen=True)
class Export:
    """One entry of ``query-block-exports``: QAPI's BlockExportInfo."""

    id: naming.ExportId
    type: str
    node: naming.NodeName
    shutting_down: bool


def parse_exports(reply: Any) -> dict[naming.ExportId, Export]:
    exports = {}
    for item in _list(reply):
        id = naming.ExportId(_str(item, "id"))
        node = naming.NodeName(_str(item, "node-name"))
        exports[id] = Export(id, _str(item, "type"), node, _bool(item, "shutting-down"))
    return exports


# --- shapes ---


def _unexpected(what: str, reply: Any) -> qmp.ProtocolError:
    return qmp.ProtocolError(f"unexpected reply to {what}: {qmp.shown(reply)}")


def _list(reply: Any) -> list[dict[str, Any]]:
    if isinstance(reply, list) and all(isinstance(item, dict) for item in reply):
        return reply
    raise _unexpected("a query", reply)


def _str(item: Any, key: str) -> str:
    value = item.get(key) if isinstance(item, dict) else None
    if isinstance(value, str):
        return value
    raise _unexpected(f"a query ('{key}')", item)


def _bool(item: Any, key: str) -> bool:
    value = item.get(key) if isinstance(item, dict) else None
    if isinstance(value, bool):
        return value
    raise _unexpected(f"a query ('{key}')", item)


def _int(item: Any, key: str) -> int:
    """A number, zero or more."""
    value = item.get(key) if isinstance(item, dict) else None
    if type(value) is int and 0 <= value <= _MOST:
        return value
    raise _unexpected(f"a query ('{key}')", item)


_MOST = (1 << 63) - 1
"""The largest number that QEMU counts with."""


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
