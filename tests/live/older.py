# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real QEMU that speaks as an older one did.

Nobody has QEMU 2.5 to 5.1 at hand any more; but most of their commands are still there. So between
the driver and a QEMU of today stands a monitor that hides what came later, refuses whoever uses
it all the same, and translates the few commands that are gone. What is done is done by real QEMU.
"""

import contextlib
import dataclasses
import json
import pathlib
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from tests.live import proxy

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Age:
    """What QEMU of a version did not have yet, and what it still had."""

    name: str
    hidden: frozenset[str]
    """Commands and events."""
    members: frozenset[tuple[str, str]]
    """(command, argument) that are hidden, or (command, +case) of its arguments."""
    wraps_options: bool = False
    drive_ids: bool = False


def _ages() -> Iterator[Age]:
    """From the newest to the oldest: each has less than the one before."""
    age = Age("new", frozenset(), frozenset())
    for name, hidden, members, changes in (
        ("5.1", "block-export-add block-export-del query-block-exports BLOCK_EXPORT_DELETED",
         "nbd-server-start/max-connections blockdev-add/+snapshot-access", {}),
        ("3.1", "x-debug-query-block-graph", "blockdev-backup/filter-node-name", {}),
        ("2.12", "query-jobs job-cancel job-dismiss job-pause job-resume job-complete job-finalize"
         " JOB_STATUS_CHANGE", "", {}),
        ("2.11", "block-job-dismiss block-job-finalize nbd-server-remove",
         "blockdev-backup/auto-dismiss blockdev-backup/auto-finalize nbd-server-add/name", {}),
        ("2.8", "blockdev-del", "", {"wraps_options": True}),
        ("2.7", "", "", {"drive_ids": True}),
        ("2.5", "", "blockdev-backup/job-id", {}),
    ):  # fmt: skip
        pairs = (member.split("/") for member in members.split())
        age = dataclasses.replace(
            age,
            name=name,
            hidden=age.hidden | set(hidden.split()),
            members=age.members | {(command, member) for command, member in pairs},
            **changes,
        )
        yield age


AGES = tuple(_ages())


class Refused(Exception):
    """The older QEMU would not do that."""


@dataclasses.dataclass
class Translator:
    """Between a client and a QEMU of today, as of AGE."""

    age: Age
    drives: dict[str, str] = dataclasses.field(default_factory=dict)
    """What has been made under an id, by node name."""

    def command(self, message: Message) -> Message:
        """What QEMU is told. Raises Refused."""
        name, arguments = message["execute"], dict(message.get("arguments", {}))
        if name in self.age.hidden:
            raise Refused(f"The command {name} has not been found")
        match name:
            case "blockdev-add" if self.age.wraps_options:
                arguments = self._options(arguments)
            case "x-blockdev-del" if self.age.wraps_options:
                name, arguments = "blockdev-del", self._deleted(arguments)
            case "transaction":
                arguments["actions"] = [self._action(one) for one in arguments["actions"]]
            case "nbd-server-add":
                self._check(name, arguments)
                drive = arguments["device"]
                if self.age.drive_ids:
                    arguments = {**arguments, "device": self._node(drive), "name": drive}
            case _:
                self._check(name, arguments)
        return {**message, "execute": name, "arguments": arguments}

    def _options(self, arguments: Message) -> Message:
        self._only(arguments, "options")
        options = dict(arguments["options"])
        if self.age.drive_ids:
            self.drives[options.pop("id")] = options["node-name"]
        return options

    def _deleted(self, arguments: Message) -> Message:
        if not self.age.drive_ids:
            self._only(arguments, "node-name")
            return arguments
        self._only(arguments, "id")
        return {"node-name": self._node(arguments["id"])}

    def _action(self, action: Message) -> Message:
        data = action["data"]
        self._check(action["type"], data)
        if action["type"] == "blockdev-backup" and self.age.drive_ids:
            if data["device"].startswith("#"):
                raise Refused(f"Device '{data['device']}' not found")
            data = {**data, "target": self._node(data["target"])}
        return {**action, "data": data}

    def _node(self, drive: str) -> str:
        if drive not in self.drives:
            raise Refused(f"Device '{drive}' not found")
        return self.drives[drive]

    def _check(self, name: str, arguments: Mapping[str, Any]) -> None:
        for command, member in self.age.members:
            if command == name and member in arguments:
                raise Refused(f"Parameter '{member}' is unexpected")

    def _only(self, arguments: Mapping[str, Any], member: str) -> None:
        if set(arguments) != {member}:
            raise Refused(f"Parameter '{member}' is missing, or others are unexpected")

    def reply(self, command: str, message: Message) -> Message:
        """What the client is told."""
        if "return" not in message:
            return message
        value = message["return"]
        match command:
            case "query-commands":
                value = [item for item in value if item["name"] not in self.age.hidden]
                value += [{"name": "x-blockdev-del"}] if self.age.wraps_options else []
            case "query-qmp-schema":
                value = self.schema(value)
            case "query-block-jobs" if ("blockdev-backup", "auto-dismiss") in self.age.members:
                later = {"status", "error", "auto-dismiss", "auto-finalize"}
                value = [{k: v for k, v in item.items() if k not in later} for item in value]
        return {**message, "return": value}

    def schema(self, entities: list[Message]) -> list[Message]:
        """QEMU's schema without what is hidden, and with what was there then."""
        by_name = {item["name"]: dict(item) for item in entities}
        for command, member in self.age.members:
            arguments = by_name[by_name[command]["arg-type"]]
            arguments["members"] = [m for m in arguments["members"] if m["name"] != member]
            if "variants" in arguments:
                arguments["variants"] = [
                    case for case in arguments["variants"] if f"+{case['case']}" != member
                ]
        if self.age.wraps_options:
            add = by_name["blockdev-add"]
            options = by_name[add["arg-type"]]
            if self.age.drive_ids:
                id = {"name": "id", "type": "str", "default": None}
                options["members"] = [*options["members"], id]
            by_name["wrapped"] = _object("wrapped", "options", options["name"])
            add["arg-type"] = "wrapped"
            key = "id" if self.age.drive_ids else "node-name"
            by_name["deleted"] = _object("deleted", key, "str")
            by_name["x-blockdev-del"] = {
                "name": "x-blockdev-del", "meta-type": "command",
                "arg-type": "deleted", "ret-type": add["ret-type"],
            }  # fmt: skip
        return [item for name, item in by_name.items() if name not in self.age.hidden]


def _object(name: str, member: str, type: str) -> Message:
    return {"name": name, "meta-type": "object", "members": [{"name": member, "type": type}]}


class Monitor:
    """Serves clients one after the other, as a QMP socket does."""

    def __init__(self, directory: pathlib.Path, qmp: pathlib.Path, age: Age) -> None:
        self.path = directory / "older.sock"
        self.translator = Translator(age)
        self._qmp = qmp
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"qmp://{self.path}"

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, socket.socket(socket.AF_UNIX) as qemu:
                    qemu.connect(str(self._qmp))
                    _Connection(self.translator, client, qemu).serve()


class _Connection:
    def __init__(self, translator: Translator, client: socket.socket, qemu: socket.socket) -> None:
        self._translator = translator
        self._client = client
        self._qemu = qemu
        self._sent: dict[Any, str] = {}

    def serve(self) -> None:
        down = threading.Thread(target=self._down, daemon=True)
        down.start()
        pending = b""
        while received := proxy.receive(self._client):
            data, fds = received
            if not data:
                break
            pending += data
            *lines, pending = pending.split(b"\n")
            for line in lines:
                self._up(json.loads(line), fds)
                fds = []
        with contextlib.suppress(OSError):
            self._qemu.shutdown(socket.SHUT_RDWR)
        down.join()

    def _up(self, message: Message, fds: list[int]) -> None:
        self._sent[message["id"]] = message["execute"]
        try:
            told = self._translator.command(message)
        except Refused as refusal:
            error = {"class": "GenericError", "desc": str(refusal)}
            self._tell({"id": message["id"], "error": error})
            return
        proxy.send(self._qemu, json.dumps(told).encode(), fds)

    def _down(self) -> None:
        with self._qemu.makefile("rb") as qemu, contextlib.suppress(OSError):
            for line in qemu:
                message = json.loads(line)
                if message.get("event") in self._translator.age.hidden:
                    continue
                command = self._sent.pop(message.get("id"), "")
                self._tell(self._translator.reply(command, message))
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)

    def _tell(self, message: Message) -> None:
        with contextlib.suppress(OSError):
            self._client.sendall(json.dumps(message).encode() + b"\r\n")
