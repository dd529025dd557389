# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fake QEMU made from a recording of a real one (libvirt's tests/qemumonitortestutils.c). Pure.

What a QEMU says of itself (version, commands, schema, name, ...) is answered as it was recorded;
nodes, jobs, exports, bitmaps, descriptors and the run state begin as recorded and are simulated
from there. Commands go in by ``receive``, messages come out; everything outside a program is the
``Host``'s. A command that is neither simulated nor recorded is refused in words that say so.
"""

import contextlib
import dataclasses
import errno
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from virtbackup.qemu import recording
from virtbackup.test import fake_layer, fake_state, faults, schema

Message = dict[str, Any]

_Change = Callable[[Message], Any]
"""Does a command with its arguments; gives what it returns, None for nothing."""

MAX_MESSAGE = 64 << 20
"""Bytes; QEMU takes no more either."""
MAX_SUN_PATH = 107
"""Bytes of a unix socket's path (unix(7))."""
_COMMAND_NOT_FOUND = "CommandNotFound"
_FDSET = "/dev/fdset/"
_QUOTE, _BACKSLASH = b'"\\'
_DIGITS = tuple("0123456789")


class Unresolved(OSError):
    """No address has that name, or no port."""


class OtherAccess(OSError):
    """A descriptor is for reading alone, or not for that."""


class Unresized(OSError):
    """A file was made, and cannot be as large as that."""


class NoFile(OSError):
    """It can be opened, and is not a file."""


class Host(Protocol):
    """What the fake needs of the world. Methods raise OSError."""

    def now(self) -> float:
        """Seconds since the epoch."""

    def open_image(self, path: str | int, readonly: bool) -> fake_state.Image:
        """Open a file by its path, or a duplicate of a descriptor. Errors: NoFile, of a descriptor
        OtherAccess, too."""

    def create_file(self, path: str, size: int) -> None:
        """Make a file of SIZE bytes, or empty one that is there. Errors: Unresized, too."""

    def close_fd(self, fd: int) -> None: ...

    def start_server(self, address: Mapping[str, Any], fd: int | None, tls: bool) -> None:
        """Listen for NBD clients at a QAPI SocketAddress, or on a descriptor; with TLS for those
        alone that do it, too. Errors: Unresolved too."""

    def stop_server(self) -> None:
        """Listen no more; all clients are disconnected."""

    def clients(self, export: str) -> int:
        """How many clients read an export, by its id."""

    def disconnect(self, export: str) -> None:
        """Cut off the clients of an export."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What comes of a command: messages in their order, and whether that was the end."""

    messages: tuple[Message, ...] = ()
    hang_up: bool = False
    """The connection ends."""
    quit: bool = False
    """QEMU ends."""


@dataclasses.dataclass
class FdSet:
    """Descriptors that were handed over, with their notes; nodes that have one open."""

    fds: dict[int, str | None] = dataclasses.field(default_factory=dict)
    removed: set[int] = dataclasses.field(default_factory=set)
    """Those that go once they can."""
    users: set[str] = dataclasses.field(default_factory=set)


class Splitter:
    """Splits what a client sends into messages: JSON values, however they are spaced and cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = self._depth = 0
        self._in_string = self._escaped = False

    def receive_data(self, data: bytes) -> None:
        """Take bytes as they came. Errors: ValueError for a message that is too long."""
        self._buffer += data
        if len(self._buffer) > MAX_MESSAGE:
            raise ValueError(f"a message is longer than {MAX_MESSAGE} bytes")

    def next_message(self) -> bytes | None:
        """The next whole object; or a line that does not begin as one; None until more comes."""
        if not self._at:
            self._buffer = self._buffer.lstrip()
            if self._buffer and not self._buffer.startswith(b"{"):
                return self._take(self._buffer.find(b"\n") + 1)
        while self._at < len(self._buffer):
            byte = self._buffer[self._at]
            self._at += 1
            if self._in_string:
                self._in_string = self._escaped or byte != _QUOTE
                self._escaped = byte == _BACKSLASH and not self._escaped
            elif byte == _QUOTE:
                self._in_string = True
            elif byte in b"{}":
                self._depth += 1 if byte == b"{"[0] else -1
                if not self._depth:
                    return self._take(self._at)
        return None

    def _take(self, end: int) -> bytes | None:
        taken = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._at = 0
        return taken or None


class Fake:
    """One fake QEMU, for one client at a time: ``connect``, then ``receive`` for every message."""

    def __init__(
        self,
        recorded: recording.Recording,
        host: Host,
        rules: Sequence[faults.Rule] = (),
    ) -> None:
        """Errors: ValueError, saying what is missing in the recording, or what is wrong with a
        rule."""
        self._host = host
        self._recorded = recorded
        self._replies = _by_command(recorded)
        self.version = _version(recorded.greeting)
        self.commands = _names(self._static("query-commands"))
        found = self._static("query-qmp-schema")
        self._schema = (
            None if found is None else schema.Schema.parse(found, self.version < (6, 0, 0))
        )
        self.layer = fake_layer.BlockLayer(self.version)
        self.layer.load(
            self._static("query-block") or [],
            self._static("query-named-block-nodes") or [],
            self._static("x-debug-query-block-graph") or {},
        )
        if self._static("query-jobs"):
            raise ValueError("it was recorded while a block job ran")
        self._status = _run_state(self._static("query-status"))
        self._rules = faults.Rules(rules)
        self._rules.check(self.commands)
        self._fdsets: dict[int, FdSet] = {}
        self._fds: dict[str, int] = {}
        self._objects: dict[str, str] = {}
        """TLS credentials: id -> type."""
        self._server = False
        self._negotiated = False
        self._received: list[int] = []
        """Descriptors that came with a message and were not asked for yet."""
        self._handlers = self._table()

    # --- the wire ---

    def connect(self) -> Message:
        """A client has come, and the one before is gone; the greeting."""
        self._negotiated = False
        self._let_go_of_received()
        for id in [*self._fdsets]:
            self._clean_fdset(id)
        return dict(self._recorded.greeting)

    def take_fds(self, fds: Sequence[int]) -> None:
        """FDS have come and are ours from now on; those before that nobody took are closed."""
        if fds:
            self._let_go_of_received()
            self._received = list(fds)

    def _let_go_of_received(self) -> None:
        while self._received:
            self._host.close_fd(self._received.pop())

    def receive(self, line: bytes) -> Answer:
        """Carry out one message of the client's."""
        message: Any = None
        try:
            message = _decode(line)
            execute, arguments = _dispatch(message)
            self._check_mode(execute)
            answer = self._obey(execute, arguments)
        except schema.Refused as failure:
            answer = Answer((failure.reply,))
        id = {"id": message["id"]} if isinstance(message, dict) and "id" in message else {}
        told = (m if "event" in m else {**m, **id} for m in answer.messages)
        return dataclasses.replace(answer, messages=tuple(told))

    def _check_mode(self, execute: str) -> None:
        if execute == "qmp_capabilities":
            if self._negotiated:
                raise schema.Refused(
                    "Capabilities negotiation is already complete, command ignored",
                    _COMMAND_NOT_FOUND,
                )
        elif not self._negotiated:
            raise schema.Refused(
                "Expecting capabilities negotiation with 'qmp_capabilities'", _COMMAND_NOT_FOUND
            )
        elif execute not in self.commands:
            raise schema.Refused(f"The command {execute} has not been found", _COMMAND_NOT_FOUND)

    def _obey(self, execute: str, arguments: Message) -> Answer:
        """Do a command, as the rules for faults let it be done."""
        before, after = self._rules.take(execute)
        events = [event for rule in before for event in self._cause(rule)]
        if any(rule.hang_up for rule in before):
            return Answer(tuple(events), hang_up=True)
        refusal = next((rule.error for rule in before if rule.error is not None), None)
        reply = {"error": dict(refusal)} if refusal else self._try(execute, arguments)
        self._note_closed()
        events += self._events()
        replies = [] if any(rule.silent for rule in before) else [reply]
        late = [event for rule in after for event in self._cause(rule)]
        hang_up = any(rule.hang_up for rule in after)
        quit = execute == "quit" and "return" in reply
        quit = quit or any(rule.quit for rule in (*before, *after))
        return Answer((*events, *replies, *late), hang_up or quit, quit)

    def _try(self, execute: str, arguments: Message) -> Message:
        try:
            checked = execute != "object-add" or not self.layer.old_words
            if checked and self._schema is not None and self._schema.knows(execute):
                self._schema.check(execute, arguments)
            handler = self._handlers.get(execute)
            if handler is None:
                return self._recorded_reply(execute, arguments)
            found = handler(arguments)
            return {"return": {} if found is None else found}
        except schema.Refused as failure:
            return failure.reply
        except RecursionError:
            return schema.Refused("JSON nesting depth limit exceeded").reply
        except (KeyError, TypeError, AttributeError) as failure:
            if self._schema is not None:
                raise
            return schema.Refused(f"arguments that make no sense: {failure!r}").reply

    def _cause(self, rule: faults.Rule) -> Iterator[Message]:
        """Make happen what a rule says, and the events that come of it."""
        self._cause_in_jobs(rule)
        self._cause_in_guest(rule)
        yield from self._events()
        if rule.event is not None:
            yield self._stamped(dict(rule.event))

    def _cause_in_jobs(self, rule: faults.Rule) -> None:
        for id, job in [*self.layer.state.jobs.items()]:
            if rule.break_snapshot is not None and faults.matches(rule.break_snapshot, id):
                job.broken = True
            wanted = rule.cancel_job is not None and faults.matches(rule.cancel_job, id)
            if wanted and job.status != "concluded":
                self.layer.end_job(job, rule.job_error or "Operation canceled")

    def _cause_in_guest(self, rule: faults.Rule) -> None:
        if rule.unplug is not None:
            with contextlib.suppress(schema.Refused):  # it may be gone already
                self._unplug(rule.unplug)
        if rule.stop is not None:
            self._set_running(False, rule.stop)
        if rule.io_status is not None:
            self.layer.set_io_status(rule.io_status)

    def _events(self) -> list[Message]:
        found = []
        for name, data in self.layer.take_events():
            found.append(self._stamped({"event": name, **({"data": data} if data else {})}))
        return found

    def _stamped(self, event: Message) -> Message:
        now = self._host.now()
        time = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        return {"timestamp": time, **event}

    # --- what was recorded ---

    def _static(self, execute: str) -> Any:
        """What a query returned first; None where it is not recorded, or failed."""
        for _, reply in self._replies.get(execute, ()):
            if "return" in reply:
                return reply["return"]
        return None

    def _recorded_reply(self, execute: str, arguments: Message) -> Message:
        for given, reply in self._replies.get(execute, ()):
            if given == arguments:
                return dict(reply)
        raise schema.Refused(f"'{execute}' is not simulated, and not in the recording")

    # --- the commands ---

    def _table(self) -> dict[str, _Change]:
        """Command -> what does it, given its arguments."""
        layer = self.layer
        queries: dict[str, Callable[[], Any]] = {
            "query-status": lambda: self._status,
            "query-block": lambda: layer.info.block(),
            "x-debug-query-block-graph": lambda: layer.info.graph(),
            "query-jobs": lambda: layer.info.jobs(),
            "query-block-jobs": lambda: layer.info.block_jobs(),
            "query-block-exports": lambda: layer.info.exports(),
            "query-fdsets": self._query_fdsets,
            "query-memory-size-summary": self._query_memory,
            "query-cpus-fast": self._query_cpus,
            "stop": self._stop,
            "cont": lambda: self._set_running(True, "running"),
            "quit": self._quit,
            "nbd-server-stop": self._nbd_server_stop,
        }
        changes: dict[str, _Change] = {
            "qmp_capabilities": self._negotiate,
            "query-named-block-nodes": lambda a: layer.info.named_block_nodes(a.get("flat", False)),
            "query-blockstats": self._query_blockstats,
            "blockdev-add": self._blockdev_add,
            "blockdev-create": self._blockdev_create,
            "blockdev-del": lambda a: layer.blockdev_del(a["node-name"]),
            "x-blockdev-del": lambda a: layer.blockdev_del(str(a.get("node-name") or a.get("id"))),
            "transaction": lambda a: layer.transaction(a["actions"]),
            "block-set-write-threshold": lambda a: layer.set_write_threshold(
                a["node-name"], a["write-threshold"]
            ),
            "block-job-cancel": self._block_job_cancel,
            "job-cancel": lambda a: layer.cancel(layer.job(a["id"], "cancel")),
            "job-dismiss": lambda a: layer.dismiss(layer.job(a["id"], "dismiss")),
            "block-job-dismiss": lambda a: layer.dismiss(layer.job(a["id"], "dismiss", True)),
            "job-pause": lambda a: layer.set_paused(layer.job(a["id"], "pause"), True),
            "job-resume": lambda a: layer.set_paused(layer.job(a["id"], "resume"), False),
            "block-job-pause": lambda a: layer.set_paused(
                layer.job(a["device"], "pause", True), True
            ),
            "block-job-resume": lambda a: layer.set_paused(
                layer.job(a["device"], "resume", True), False
            ),
            "block-export-add": self._block_export_add,
            "block-export-del": lambda a: self._unexport(a["id"], a.get("mode", "safe")),
            "nbd-server-add": self._nbd_server_add,
            "nbd-server-remove": lambda a: self._unexport(a["name"], a.get("mode", "safe")),
            "add-fd": self._add_fd,
            "remove-fd": self._remove_fd,
            "getfd": self._getfd,
            "closefd": self._closefd,
            "nbd-server-start": self._nbd_server_start,
            "device_del": lambda a: self._unplug(a["id"]),
            "object-add": self._object_add,
            "object-del": self._object_del,
            "qom-list": self._qom_list,
            "qom-get": lambda a: self._qom("qom-get", a),
        }
        for type in ("blockdev-backup", *_BITMAP_ACTIONS):
            changes[type] = _single(layer, type)
        return {**{name: _ignoring(do) for name, do in queries.items()}, **changes}

    def _negotiate(self, arguments: Message) -> None:
        self._negotiated = True

    def _stop(self) -> None:
        if self._status["running"]:  # else it stands, for whatever reason
            self._set_running(False, "paused")

    def _set_running(self, running: bool, status: str) -> None:
        if running != self._status["running"]:
            self.layer.events.append(fake_layer.event("RESUME" if running else "STOP"))
        self._status |= {"running": running, "status": status}
        if running:
            self.layer.set_io_status("ok")

    def _quit(self) -> None:
        self._end_server()
        data = {"guest": False, "reason": "host-qmp-quit"}
        self.layer.events.append(fake_layer.event("SHUTDOWN", data))

    def _query_memory(self) -> Any:
        recorded = self._static("query-memory-size-summary")
        return recorded or {"base-memory": MEMORY, "plugged-memory": 0}

    def _query_cpus(self) -> Any:
        """One, of a PC, where it was not recorded."""
        if (recorded := self._static("query-cpus-fast")) is not None:
            return recorded
        [cpu] = self._zero("query-cpus-fast")
        known = {"arch": "x86", "qom-type": "qemu64-x86_64-cpu"}
        cpu |= {name: value for name, value in known.items() if name in cpu}
        return [{**cpu, **_CPU}]

    def _query_blockstats(self, arguments: Message) -> list[Message]:
        zero = self._zero("query-blockstats")[0]["stats"]
        if arguments.get("query-nodes"):
            return self.layer.info.node_blockstats(zero)
        return self.layer.info.blockstats(zero)

    def _zero(self, execute: str) -> Any:
        if self._schema is None or not self._schema.knows(execute):
            raise schema.Refused(f"'{execute}' cannot be simulated without its schema")
        return self._schema.zero(execute)

    def _unplug(self, id: str) -> None:
        """The guest is taken to let go at once."""
        path = self.layer.unplug(id)
        if path is None:
            raise schema.Refused(f"Device '{id}' not found", "DeviceNotFound")
        deleted = {"device": id, "path": path}
        self.layer.events.append(fake_layer.event("DEVICE_DELETED", deleted))

    def _qom(self, execute: str, arguments: Message) -> Any:
        try:
            reply = self._recorded_reply(execute, arguments)
        except schema.Refused as failure:
            missing = f"Device '{arguments['path']}' not found"
            raise schema.Refused(missing, "DeviceNotFound") from failure
        if "error" in reply:
            raise schema.Refused(reply["error"]["desc"], reply["error"]["class"])
        return reply["return"]

    def _qom_list(self, arguments: Message) -> Any:
        own = [{"name": id, "type": f"child<{type}>"} for id, type in self._objects.items()]
        if arguments["path"] != "/objects" or not own:
            return self._qom("qom-list", arguments)
        try:
            return [*self._qom("qom-list", arguments), *own]
        except schema.Refused:  # it was recorded when there was no object
            return [{"name": "type", "type": "string"}, *own]

    def _object_add(self, arguments: Message) -> None:
        type, id = arguments["qom-type"], arguments["id"]
        if type not in _CREDENTIALS:
            raise schema.Refused(f"object type '{type}' is not simulated")
        if id in self._objects:
            raise schema.Refused(
                f"attempt to add duplicate property '{id}' to object (type 'container')"
            )
        properties = {**arguments, **arguments.get("props", {})}
        for name in _CREDENTIALS[type]:
            path = f"{properties.get('dir')}/{name}"
            try:
                self._host.open_image(path, True).close()
            except OSError as failure:
                raise schema.Refused(
                    f"Unable to access credentials {path}: {failure.strerror}"
                ) from failure
        self._objects[id] = type

    def _object_del(self, arguments: Message) -> None:
        if arguments["id"] not in self._objects:
            raise schema.Refused(f"object '{arguments['id']}' not found")
        del self._objects[arguments["id"]]

    # --- files and descriptors ---

    def _blockdev_add(self, arguments: Message) -> None:
        # Before QEMU 2.9 the options were one argument.
        options = arguments.get("options", arguments)
        opened = [(name, self._open(name, readonly)) for name, readonly in _filenames(options)]
        try:
            self.layer.blockdev_add(options, [image for _, image in opened])
        finally:
            users = {id(image): node for node, image in self.layer.images.items()}
            for _, image in opened:
                if not isinstance(image, str) and id(image) not in users:
                    image.close()
        for name, image in opened:
            fdset = self._fdset_of(name)
            if fdset is not None:
                fdset.users.add(users[id(image)])

    def _blockdev_create(self, arguments: Message) -> None:
        options, failure = arguments["options"], None
        if options["driver"] == "file":
            try:
                self._host.create_file(options["filename"], options["size"])
            except Unresized as error:
                failure = f"Could not resize file: {error.strerror}"
            except OSError as error:
                failure = f"Could not create '{options['filename']}': {error.strerror}"
            except ValueError:
                failure = f"Could not create '{options['filename']}': Invalid argument"
        self.layer.create(arguments["job-id"], options, failure)

    def _open(self, filename: str, readonly: bool) -> fake_state.Image | str:
        """The file, or QEMU's words for why not."""
        if not filename:
            return "The 'file' block driver requires a file name"
        if filename.startswith(_FDSET):
            return self._open_fdset(filename, readonly)
        try:
            return self._host.open_image(filename, readonly)
        except NoFile:
            return f"'file' driver requires '{filename}' to be a regular file"
        except OSError as failure:
            return f"Could not open '{filename}': {failure.strerror}"
        except ValueError:  # no file can be called so
            return f"Could not open '{filename}': Invalid argument"

    def _open_fdset(self, filename: str, readonly: bool) -> fake_state.Image | str:
        """As ``_open``: the first of its descriptors by which that can be done."""
        fdset = self._fdset_of(filename)
        flags = 0 if readonly else 2
        if fdset is None or not fdset.fds:
            if self.version >= (9, 1, 0):
                return f"Failed to find fdset {filename}"
            return f"Could not dup FD for {filename} flags {flags}: No such file or directory"
        for fd in fdset.fds:
            with contextlib.suppress(OtherAccess):
                return self._host.open_image(fd, readonly)
        if self.version >= (9, 1, 0):
            return f"Failed to find file descriptor with matching flags={flags:#x}"
        return f"Could not dup FD for {filename} flags {flags}: Permission denied"

    def _fdset_of(self, filename: str) -> FdSet | None:
        number = filename.removeprefix(_FDSET)
        if number == filename or not number.isdecimal():
            return None
        return self._fdsets.get(int(number))

    def _take_fd(self) -> int:
        if not self._received:
            raise schema.Refused("No file descriptor supplied via SCM_RIGHTS")
        taken, *rest = self._received
        self._received = rest
        self._let_go_of_received()
        return taken

    def _add_fd(self, arguments: Message) -> Message:
        fd = self._take_fd()
        id = arguments.get("fdset-id")
        if id is not None and id < 0:
            self._host.close_fd(fd)
            raise schema.Refused("Parameter 'fdset-id' expects a non-negative value")
        if id is None:
            id = next(number for number in range(len(self._fdsets) + 1)
                      if number not in self._fdsets)  # fmt: skip
        self._fdsets.setdefault(id, FdSet()).fds[fd] = arguments.get("opaque")
        return {"fdset-id": id, "fd": fd}

    def _remove_fd(self, arguments: Message) -> None:
        id, fd = arguments["fdset-id"], arguments.get("fd")
        fdset = self._fdsets.get(id)
        if fdset is None or fd not in (None, *fdset.fds):
            which = f"fdset-id:{id}" if fd is None else f"fdset-id:{id}, fd:{fd}"
            raise schema.Refused(f"File descriptor named '{which}' not found")
        fdset.removed |= set(fdset.fds) if fd is None else {fd}
        self._clean_fdset(id)

    def _clean_fdset(self, id: int) -> None:
        """What was removed goes, before QEMU 9.1 only while the guest runs; and a set that nobody
        uses."""
        fdset = self._fdsets[id]
        if self._status["running"] or self.version >= (9, 1, 0):
            for fd in fdset.removed:
                self._host.close_fd(fd)
                del fdset.fds[fd]
            fdset.removed.clear()
        if not fdset.fds and not fdset.users:
            del self._fdsets[id]

    def _note_closed(self) -> None:
        """Sets are cleaned as well once the last node that has one open is gone."""
        for id, fdset in [*self._fdsets.items()]:
            if fdset.users and not fdset.users & self.layer.images.keys():
                fdset.users.clear()
                self._clean_fdset(id)

    def _query_fdsets(self) -> list[Message]:
        return [
            {
                "fdset-id": id,
                "fds": [
                    {"fd": fd, **({} if note is None else {"opaque": note})}
                    for fd, note in fdset.fds.items()
                ],
            }
            for id, fdset in self._fdsets.items()
        ]

    def _getfd(self, arguments: Message) -> None:
        fd = self._take_fd()
        if arguments["fdname"][:1] in _DIGITS:
            self._host.close_fd(fd)
            raise schema.Refused("Parameter 'fdname' expects a name not starting with a digit")
        old = self._fds.pop(arguments["fdname"], None)
        if old is not None:
            self._host.close_fd(old)
        self._fds[arguments["fdname"]] = fd

    def _closefd(self, arguments: Message) -> None:
        name = arguments["fdname"]
        if name not in self._fds:
            raise schema.Refused(f"File descriptor named '{name}' not found")
        self._host.close_fd(self._fds.pop(name))

    # --- jobs ---

    def _block_job_cancel(self, arguments: Message) -> None:
        id = arguments["device"]
        job = self.layer.job(id, "cancel", blockjob=True)
        if job.paused and not arguments.get("force"):
            raise schema.Refused(f"The block job for device '{id}' is currently paused")
        self.layer.cancel(job)

    # --- NBD ---

    def _nbd_server_start(self, arguments: Message) -> None:
        if self._server:
            raise schema.Refused("NBD server already running")
        address, fd = arguments["addr"], None
        if not 0 <= arguments.get("max-connections", 0) < 1 << 32:
            raise schema.Refused("Parameter 'max-connections' expects uint32_t")
        tls = arguments.get("tls-creds")
        if tls is not None and tls not in self._objects:
            raise schema.Refused(f"No TLS credentials with id '{tls}'")
        if tls is not None and address["type"] != "inet" and self.version < (7, 0, 0):
            raise schema.Refused("TLS is only supported with IPv4/IPv6")
        if address["type"] == "fd":
            name = address["data"]["str"]
            if name not in self._fds:
                raise schema.Refused(f"File descriptor named '{name}' has not been found")
            fd = self._fds.pop(name)
        if address["type"] == "unix" and len(address["data"]["path"].encode()) > MAX_SUN_PATH:
            raise schema.Refused(f"UNIX socket path '{address['data']['path']}' is too long")
        try:
            self._host.start_server(address, fd, tls is not None)
        except OSError as failure:
            told = _cannot_bind(address, failure)
            if address["type"] != "fd":
                told = f"{told}: {failure.strerror or failure}"
            raise schema.Refused(told) from failure
        self._server = True

    def _nbd_server_stop(self) -> None:
        if not self._server:
            raise schema.Refused("NBD server not running")
        self._end_server()

    def _end_server(self) -> None:
        if self._server:
            self._server = False
            for id in reversed([*self.layer.state.exports]):
                self.layer.unexport(id)
            self._host.stop_server()

    def _block_export_add(self, arguments: Message) -> None:
        if arguments["type"] != "nbd":
            raise schema.Refused(f"export type '{arguments['type']}' is not simulated")
        id, node = str(arguments["id"]), str(arguments["node-name"])
        if not fake_layer.ID.fullmatch(id):
            raise schema.Refused("Invalid block export id")
        if id in self.layer.state.exports:
            raise schema.Refused(f"Block export id '{id}' is already in use")
        found = self.layer.node(node)
        self._export(
            fake_state.Export(
                id, found.name, str(arguments.get("name", node)), arguments.get("description")
            ),
            arguments.get("bitmaps", ()),
        )

    def _nbd_server_add(self, arguments: Message) -> None:
        device = str(arguments["device"])
        name = str(arguments.get("name", device))
        found = self.layer.find(device)
        if not self._server:
            raise schema.Refused("NBD server not running")
        if name in self.layer.state.exports:
            raise schema.Refused(f"Block export id '{name}' is already in use")
        bitmaps = [arguments["bitmap"]] if "bitmap" in arguments else []
        self._export(fake_state.Export(name, found.name, name), bitmaps)

    def _export(self, export: fake_state.Export, bitmaps: Sequence[Any]) -> None:
        if not self._server:
            raise schema.Refused("NBD server not running")
        self.layer.export(export, bitmaps)

    def _unexport(self, id: str, mode: str) -> None:
        if id not in self.layer.state.exports:
            raise schema.Refused(f"Export '{id}' is not found")
        if mode == "safe" and self._host.clients(id):
            raise schema.Refused(f"export '{id}' still in use")
        self._host.disconnect(id)
        self.layer.unexport(id)

    # --- the end ---

    def close(self) -> None:
        """Let go of everything."""
        self._end_server()
        self.layer.close()
        self._let_go_of_received()
        for fd in [*self._fds.values(), *(fd for s in self._fdsets.values() for fd in s.fds)]:
            self._host.close_fd(fd)
        self._fds.clear()
        self._fdsets.clear()


MEMORY = 64 << 20
"""Bytes that the guest has where nothing was recorded of that."""

_CPU: Mapping[str, Any] = {
    "qom-path": "/machine/unattached/device[0]",
    "props": {"core-id": 0, "thread-id": 0, "socket-id": 0},
    "target": "x86_64",
}

_CREDENTIALS: Mapping[str, Sequence[str]] = {
    "tls-creds-x509": ("ca-cert.pem", "server-cert.pem", "server-key.pem"),
    "tls-creds-psk": ("keys.psk",),
}
"""Type -> the files that a server must have."""

_BITMAP_ACTIONS = tuple(
    f"block-dirty-bitmap-{verb}" for verb in ("add", "remove", "enable", "disable", "clear",
                                              "merge")
)  # fmt: skip


def _single(layer: fake_layer.BlockLayer, type: str) -> _Change:
    """A transaction's action as a command of its own."""
    return lambda arguments: layer.transaction([{"type": type, "data": arguments}])


def _ignoring(do: Callable[[], Any]) -> _Change:
    """A command without arguments that matter."""
    return lambda arguments: do()


def _cannot_bind(address: Mapping[str, Any], failure: OSError) -> str:
    """QEMU's words, without the reason."""
    data = address["data"]
    if address["type"] == "fd":
        return f"File descriptor '{data['str']}' is not a socket"
    if address["type"] == "unix":
        done = "unlink socket" if failure.errno == errno.EISDIR else "bind socket to"
        return f"Failed to {done} {data['path']}"
    if isinstance(failure, Unresolved):
        return f"address resolution failed for {data['host']}:{data['port']}"
    if failure.errno == errno.EADDRINUSE:
        return "Failed to find an available port"
    return "Failed to bind socket"


def _decode(line: bytes) -> Any:
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # not with half a character in it
    except (ValueError, RecursionError) as failure:
        raise schema.Refused("JSON parse error, invalid keyword or value") from failure
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _dispatch(message: Any) -> tuple[str, Message]:
    """A command and its arguments, or QEMU's words for what is no command."""
    if not isinstance(message, dict):
        raise schema.Refused("QMP input must be a JSON object")
    for name, value in message.items():
        if name in ("execute", "exec-oob"):
            if not isinstance(value, str):
                raise schema.Refused(f"QMP input member '{name}' must be a string")
        elif name == "arguments":
            if not isinstance(value, dict):
                raise schema.Refused("QMP input member 'arguments' must be an object")
        elif name != "id":
            raise schema.Refused(f"QMP input member '{name}' is unexpected")
    execute = message.get("execute", message.get("exec-oob"))
    if execute is None:
        raise schema.Refused("QMP input lacks member 'execute'")
    return execute, message.get("arguments", {})


def _filenames(options: Any, readonly: bool = False) -> Iterator[tuple[str, bool]]:
    """The files that blockdev-add's options name: (name, only read); READONLY is the parent's."""
    if not isinstance(options, dict):
        return
    readonly = options.get("read-only", readonly)
    if options.get("driver") == "file":
        yield options["filename"], readonly
    for role in ("file", "target", "backing"):
        yield from _filenames(options.get(role), readonly)


def _by_command(
    recorded: recording.Recording,
) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """Command -> (arguments, reply) of each time that it was sent."""
    found: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for exchange in recorded.exchanges():
        found.setdefault(exchange.execute, []).append((exchange.arguments, exchange.reply))
    return found


def _names(commands: Any) -> frozenset[str]:
    """Of a ``query-commands`` reply. Errors: ValueError."""
    match commands:
        case list() if all(
            isinstance(c, dict) and isinstance(c.get("name"), str) for c in commands
        ):
            return frozenset(command["name"] for command in commands)
    raise ValueError("the recording has no query-commands")


def _run_state(reply: Any) -> Message:
    """Of a ``query-status`` reply; without one, there is no guest that could stand."""
    match reply:
        case {"running": bool(), "status": str()}:
            return dict(reply)
        case None:
            return {"running": True, "status": "running"}
    raise ValueError("its query-status is not understood")


def _version(greeting: Mapping[str, Any]) -> tuple[int, int, int]:
    match greeting:
        case {"QMP": {"version": {"qemu": {"major": int(a), "minor": int(b), "micro": int(c)}}}}:
            return a, b, c
    raise ValueError("the greeting has no version")


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as a line, as QEMU ends it."""
    return json.dumps(message).encode() + b"\r\n"
