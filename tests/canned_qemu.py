# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU of canned answers, for finding out what the driver sends to it.

It knows just enough of jobs, nodes, exports and descriptors for a backup to be started, looked at,
stopped and cleaned up, in any way that any QEMU's schema allows; what it is told is kept. It does
no I/O. What it answers about disks was recorded.
"""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests import replies
from virtbackup.qemu import domain, monitor, monitor_json, qmp, recording, sweep

DISK_SIZE = 16 << 40
"""Guest-visible bytes of the disks: no machine has room for their scratch images."""

MONITOR = "/qmp.sock"
"""Where its monitor listens."""

Reply = Any


def disks_of(found: recording.Recording) -> dict[str, Reply]:
    """Query -> what was answered about the disks at rest; but they are of DISK_SIZE, and all are
    drives with an id, as on the oldest QEMUs."""
    queries = ("query-block", "query-named-block-nodes", "x-debug-query-block-graph")
    answers: dict[str, Reply] = {}
    for exchange in found.exchanges():
        if exchange.execute in queries:
            answers.setdefault(exchange.execute, _enlarged(exchange.reply["return"]))
    for drive in answers.get("query-block", ()):
        drive["device"] = drive["device"] or f"drive{drive['qdev'].replace('/', '-')}"
    return answers


class Clock:
    """Time, which goes by only for those who wait: for an event, say, that does not come."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class CannedQemu:
    """One QEMU; its monitors come and go."""

    def __init__(self, said: replies.Replies, disks: Mapping[str, Reply], clock: Clock) -> None:
        """DISKS: as ``disks_of`` has it."""
        self._said = said
        self.clock = clock
        self._block = disks
        self.sent: list[monitor_json.Command] = []
        self.nodes: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.exports: dict[str, str] = {}
        self.fdsets: dict[int, str] = {}
        self.objects: dict[str, str] = {}
        """Id -> kind."""
        self.fds: set[str] = set()
        """Descriptors by the names that they were handed over with."""
        self.server = False
        self.run_state = "running"
        self.io_status = "ok"
        self.unplugged: set[str] = set()
        """Ids of devices that are gone."""
        self.iothread = False
        self.refuse: Callable[[monitor_json.Command], bool] = lambda command: False
        """Whether a command is refused."""

    @property
    def greeting(self) -> qmp.Greeting:
        line = json.dumps({"QMP": {"version": self._said.version, "capabilities": []}})
        greeting = qmp.decode(line.encode())
        assert isinstance(greeting, qmp.Greeting)
        return greeting

    def is_clean(self) -> bool:
        """Whether nothing is left of any backup."""
        left = (self.nodes, self.jobs, self.exports, self.fdsets, self.fds, self.objects)
        return not (any(left) or self.server)

    def clean(self) -> None:
        """Somebody else takes away what is left."""
        for one in (self.nodes, self.jobs, self.exports, self.fdsets, self.fds, self.objects):
            one.clear()
        self.server = False

    def answer(self, command: monitor_json.Command) -> Reply:
        """What COMMAND returns. Errors: CommandFailed."""
        self.sent.append(command)
        if self.refuse(command):
            raise self.failure(command, "refused")
        name = command.execute.removeprefix("x-").replace("-", "_")
        handler = getattr(self, f"_{name}", None)
        return {} if handler is None else handler(command, command.arguments)

    def failure(
        self, command: monitor_json.Command, desc: str, error_class: str = "GenericError"
    ) -> monitor_json.CommandFailed:
        return monitor_json.command_failed(command, qmp.Failure(0, error_class, desc))

    # --- questions ---

    def _query_version(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return self._said.version

    def _query_commands(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return self._said.commands

    def _query_qmp_schema(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return self._said.schema

    def _query_name(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return {"name": "vm"}

    def _query_uuid(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return {"UUID": "c0ffee00-0000-4000-8000-000000000001"}

    def _query_status(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return {"running": self.run_state == "running", "status": self.run_state}

    def _query_memory_size_summary(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return {"base-memory": 64 << 20, "plugged-memory": 0}

    def _query_cpus_fast(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return [{"cpu-index": 0, "qom-path": "/machine", "thread-id": 1, "target": "x86_64"}]

    def _query_blockstats(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return []

    def _human_monitor_command(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return ""

    def _query_block(self, command: monitor_json.Command, arguments: Any) -> Reply:
        drives = copy.deepcopy(self._block.get("query-block", []))
        for drive in drives:
            drive["io-status"] = self.io_status
        return [d for d in drives if not any(id in d.get("qdev", "") for id in self.unplugged)]

    def _query_named_block_nodes(self, command: monitor_json.Command, arguments: Any) -> Reply:
        recorded = self._block["query-named-block-nodes"]
        return [*recorded, *({**recorded[0], "node-name": node} for node in self.nodes)]

    def _debug_query_block_graph(self, command: monitor_json.Command, arguments: Any) -> Reply:
        recorded = self._block["x-debug-query-block-graph"]
        own = [
            {"id": 1000 + number, "type": "block-driver", "name": node}
            for number, node in enumerate(self.nodes)
        ]
        return {"edges": recorded["edges"], "nodes": [*recorded["nodes"], *own]}

    def _query_jobs(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return list(self.jobs.values())

    def _query_block_jobs(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return [
            {"device": job["id"], "type": job["type"], "status": job["status"], "len": 1,
             "offset": 0, "speed": 0, "busy": True, "paused": False, "ready": False,
             "io-status": "ok"}
            for job in self.jobs.values()
        ]  # fmt: skip

    def _query_block_exports(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return [
            {"id": id, "type": "nbd", "node-name": node, "shutting-down": False}
            for id, node in self.exports.items()
        ]

    def _query_fdsets(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return [
            {"fdset-id": id, "fds": [{"fd": 3, "opaque": opaque}]}
            for id, opaque in self.fdsets.items()
        ]

    def _query_chardev(self, command: monitor_json.Command, arguments: Any) -> Reply:
        return [{"label": "qmp", "filename": f"unix:{MONITOR},server=on", "frontend-open": True}]

    def _qom_list(self, command: monitor_json.Command, arguments: Any) -> Reply:
        objects = {**self.objects, **({"io0": "iothread"} if self.iothread else {})}
        return [{"name": id, "type": f"child<{kind}>"} for id, kind in objects.items()]

    def _qom_get(self, command: monitor_json.Command, arguments: Any) -> Reply:
        if arguments["property"] == "parent_bus":
            return "/machine/peripheral/scsi0/virtio-backend/scsi0.0"
        raise self.failure(command, "Property not found")

    # --- deeds ---

    def _add_fd(self, command: monitor_json.Command, arguments: Any) -> Reply:
        id = max(self.fdsets, default=-1) + 1
        self.fdsets[id] = arguments.get("opaque", "")
        return {"fdset-id": id, "fd": 3}

    def _remove_fd(self, command: monitor_json.Command, arguments: Any) -> Reply:
        del self.fdsets[arguments["fdset-id"]]
        return {}

    def _object_add(self, command: monitor_json.Command, arguments: Any) -> Reply:
        self.objects[arguments["id"]] = arguments["qom-type"]
        return {}

    def _object_del(self, command: monitor_json.Command, arguments: Any) -> Reply:
        if arguments["id"] not in self.objects:
            raise self.failure(command, f"object '{arguments['id']}' not found")
        del self.objects[arguments["id"]]
        return {}

    def _getfd(self, command: monitor_json.Command, arguments: Any) -> Reply:
        self.fds.add(arguments["fdname"])
        return {}

    def _closefd(self, command: monitor_json.Command, arguments: Any) -> Reply:
        if arguments["fdname"] not in self.fds:
            name = arguments["fdname"]
            raise self.failure(command, f"File descriptor named '{name}' not found")
        self.fds.remove(arguments["fdname"])
        return {}

    def _blockdev_add(self, command: monitor_json.Command, arguments: Any) -> Reply:
        options = arguments.get("options", arguments)
        if options["driver"] == "bochs":
            raise self.failure(command, "Image not in Bochs format")
        self.nodes[options.get("node-name") or options["id"]] = options
        return {}

    def _blockdev_del(self, command: monitor_json.Command, arguments: Any) -> Reply:
        wanted = arguments.get("node-name") or arguments["id"]
        for node, options in self.nodes.items():
            if wanted in (node, options.get("id")):
                del self.nodes[node]
                return {}
        raise self.failure(command, f"Failed to find node with node-name='{wanted}'")

    def _blockdev_create(self, command: monitor_json.Command, arguments: Any) -> Reply:
        self._new_job(arguments["job-id"], "create")["status"] = "concluded"
        return {}

    def _transaction(self, command: monitor_json.Command, arguments: Any) -> Reply:
        for action in arguments["actions"]:
            if action["type"] in ("blockdev-backup", "drive-backup"):
                self._blockdev_backup(command, action["data"])
        return {}

    def _blockdev_backup(self, command: monitor_json.Command, arguments: Any) -> Reply:
        job = self._new_job(arguments.get("job-id", arguments["device"]), "backup")
        job["auto-dismiss"] = arguments.get("auto-dismiss", True)
        if filter := arguments.get("filter-node-name"):
            job["filter"] = filter
            self.nodes[filter] = {}
        return {}

    def _new_job(self, id: str, kind: str) -> dict[str, Any]:
        progress = {"current-progress": 0, "total-progress": 1}
        job = self.jobs[id] = {"id": id, "type": kind, "status": "running", **progress}
        return job

    def end_job(self, id: str, error: str) -> None:
        """The job ends by itself."""
        job = self.jobs[id]
        job.update(status="concluded", error=error)
        if job.get("auto-dismiss"):
            del self.jobs[id]
        self.nodes.pop(job.get("filter", ""), None)

    def _job_cancel(self, command: monitor_json.Command, arguments: Any) -> Reply:
        self.end_job(self._job(command, arguments["id"]), "Operation canceled")
        return {}

    def _block_job_cancel(self, command: monitor_json.Command, arguments: Any) -> Reply:
        self.end_job(self._job(command, arguments["device"]), "Operation canceled")
        return {}

    def _job_dismiss(self, command: monitor_json.Command, arguments: Any) -> Reply:
        del self.jobs[self._job(command, arguments["id"])]
        return {}

    _block_job_dismiss = _job_dismiss

    def _job(self, command: monitor_json.Command, id: str) -> str:
        if id not in self.jobs:
            raise self.failure(command, f"Block job '{id}' not found", "DeviceNotActive")
        return id

    def _nbd_server_start(self, command: monitor_json.Command, arguments: Any) -> Reply:
        if self.server:
            raise self.failure(command, "NBD server already running")
        if arguments["addr"]["type"] == "fd":
            self.fds.remove(arguments["addr"]["data"]["str"])
        self.server = True
        return {}

    def _nbd_server_stop(self, command: monitor_json.Command, arguments: Any) -> Reply:
        if not self.server:
            raise self.failure(command, "NBD server not running")
        self.server = False
        self.exports.clear()
        return {}

    def _nbd_server_add(self, command: monitor_json.Command, arguments: Any) -> Reply:
        self.exports[arguments.get("name", arguments["device"])] = arguments["device"]
        return {}

    def _nbd_server_remove(self, command: monitor_json.Command, arguments: Any) -> Reply:
        del self.exports[arguments["name"]]
        return {}

    def _block_export_add(self, command: monitor_json.Command, arguments: Any) -> Reply:
        self.exports[arguments["id"]] = arguments["node-name"]
        return {}

    def _block_export_del(self, command: monitor_json.Command, arguments: Any) -> Reply:
        del self.exports[arguments["id"]]
        return {}


class CannedMonitor:
    """A monitor of a CannedQemu: no socket, no thread, nobody to be seen behind it."""

    def __init__(self, qemu: CannedQemu, path: str) -> None:
        self._qemu = qemu
        self.path = path
        self.greeting = qemu.greeting

    passes_files = True
    hears_events = False

    def close(self) -> None:
        pass

    def peer_pid(self) -> int | None:
        return None

    def peer_uid(self) -> int:
        return 0

    def execute(self, command: monitor_json.Command) -> Any:
        return self.execute_all([command])[0]

    def execute_all(self, commands: Sequence[monitor_json.Command]) -> list[Any]:
        return monitor.all_done(self.execute_each(commands))

    def execute_each(self, commands: Sequence[monitor_json.Command]) -> list[Any]:
        values = []
        for command in commands:
            try:
                values.append(self._qemu.answer(_as_sent(command)))
            except monitor_json.CommandFailed as failure:
                # The driver knows its command by identity.
                failed = qmp.Failure(0, failure.error_class, failure.desc)
                values.append(monitor_json.command_failed(command, failed))
        return values

    def wait_event(self, matches: Callable[[qmp.Event], bool], timeout: float) -> qmp.Event | None:
        """None: all that is done here is done at once, and nothing comes later."""
        self._qemu.clock.now += max(timeout, sweep.TIMEOUT / 4)
        return None


@contextlib.contextmanager
def session(
    qemu: CannedQemu, path: str, identity: domain.Identity | None = None
) -> Iterator[domain.Session]:
    """As the driver has one for each of its calls."""
    one = CannedMonitor(qemu, path)
    yield domain.Session(one, identity or domain.identify(one))


def _as_sent(command: monitor_json.Command) -> monitor_json.Command:
    """COMMAND as it is read at the other end."""
    message = json.loads(qmp.encode(command.execute, command.arguments, 1))
    return dataclasses.replace(command, arguments=message.get("arguments", {}))


def _enlarged(value: Any) -> Any:
    """A recorded reply about disks, but of DISK_SIZE."""
    match value:
        case dict():
            return {
                key: DISK_SIZE if key == "virtual-size" else _enlarged(item)
                for key, item in value.items()
            }
        case list():
            return [_enlarged(item) for item in value]
    return value
