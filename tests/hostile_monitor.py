# SPDX-License-Identifier: LGPL-2.1-or-later
"""A monitor on a real socket that answers as a real QEMU was recorded to, but for what a test
spoils (tests/record_conversations.py).

What it says is counted in turns: a greeting is one, and the answer to each command. A spoiler is
called at a turn in place of the answer.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tests import record_conversations

DATA = record_conversations.HERE
[VERSION] = sorted(path.name for path in DATA.iterdir())
CONVERSATIONS = sorted(path.stem for path in (DATA / VERSION).glob("*.jsonl"))

Message = dict[str, Any]

_WITHOUT_NAMES = {"query-commands", "query-qmp-schema"}
"""Long answers, in which nothing of a backup is named."""

EVENT = b'{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "RESUME"}\r\n'


def messages(conversation: str) -> list[tuple[str, Message]]:
    """A recording: (direction, message). Nobody may change a message."""
    lines = (DATA / VERSION / f"{conversation}.jsonl").read_text().splitlines()
    return [item for line in lines for item in _parsed(line)]


@functools.cache  # the longest is in all of them
def _parsed(line: str) -> list[tuple[str, Message]]:
    return list(json.loads(line).items())


def encode(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


@dataclasses.dataclass
class Turn:
    """QEMU's turn to speak."""

    number: int
    """Counted over all connections since ``play``."""
    command: str
    """What is answered; empty for a greeting."""
    id: int
    """The command's; 0 for a greeting."""
    events: list[Message]
    """What QEMU said before it answered."""
    message: Message
    """The answer."""
    client: socket.socket

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.client.sendall(part)

    def answer(self) -> None:
        """Say what QEMU said."""
        self.send(*map(encode, self.events), encode(self.message))

    def hang_up(self) -> None:
        self.client.shutdown(socket.SHUT_RDWR)


Spoiler = Callable[[Turn], None]


class HostileMonitor:
    """Serves one client after the other, as QEMU does."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.path = directory / "qmp.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._backup = record_conversations.BACKUP_ID
        self._idle = threading.Condition()
        self._serving = False
        self.play("list")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"qmp://{self.path}"

    def play(
        self, conversation: str, turn: int | None = None, spoil: Spoiler | None = None
    ) -> None:
        """Answer as recorded from now on, but for TURN (None: every one), which SPOIL takes."""
        with self._idle:
            self._idle.wait_for(lambda: not self._serving, 10)
        self._answers: dict[str, collections.deque[tuple[list[Message], Message]]] = {}
        self._greeting: Message = {}
        asked: dict[int, str] = {}
        events: list[Message] = []
        for direction, message in messages(conversation):
            if direction == "->":
                asked[message["id"]] = message["execute"]
            elif "QMP" in message:
                self._greeting = message
            elif "event" in message:
                events.append(message)
            else:
                answers = self._answers.setdefault(asked[message["id"]], collections.deque())
                answers.append((events, message))
                events = []
        self._turn, self._spoil = turn, spoil
        self.turns = 0
        self.spoilt: str | None = None
        """The command whose answer was spoilt."""

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def __enter__(self) -> "HostileMonitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._serving = True
                with client, contextlib.suppress(OSError):
                    self._speak(client)
                with self._idle:
                    self._serving = False
                    self._idle.notify_all()

    def _speak(self, client: socket.socket) -> None:
        self._take(Turn(self.turns, "", 0, [], self._greeting, client))
        received = b""
        while data := client.recv(1 << 16):
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                self._answer(line, client)

    def _answer(self, line: bytes, client: socket.socket) -> None:
        for id in re.findall(rb"virtbackup-([0-9a-f]{8})", line):
            self._backup = id.decode()
        command = json.loads(line)
        answers = self._answers.get(command["execute"])
        events: list[Message] = []
        reply: Message = {"error": {"class": "CommandNotFound", "desc": "not recorded"}}
        if answers:
            # The last answer is repeated: what is polled for has come by then.
            events, reply = answers.popleft() if len(answers) > 1 else answers[0]
        if command["execute"] not in _WITHOUT_NAMES:
            recorded = f"virtbackup-{record_conversations.BACKUP_ID}"
            reply = json.loads(json.dumps(reply).replace(recorded, f"virtbackup-{self._backup}"))
        message = {**reply, "id": command["id"]}
        self._take(Turn(self.turns, command["execute"], command["id"], events, message, client))

    def _take(self, turn: Turn) -> None:
        self.turns += 1
        if self._spoil is not None and self._turn in (None, turn.number):
            self.spoilt = turn.command
            self._spoil(turn)
        else:
            turn.answer()
