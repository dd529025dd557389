# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fake QEMU that is made from a recording answers as the recorded one did.

What it says differently on purpose is named here; tests/live/test_replay.py has the proof on what
was not recorded.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import pytest

from tests import replayed
from virtbackup.qemu import faults, qcow2, recording, replay, replay_block

HERE = pathlib.Path(__file__).parent
PACKAGE = HERE.parent / "virtbackup"
SHIPPED = sorted((PACKAGE / "recordings").glob("*.jsonl"))
SIZE = 4 << 20
"""Of the disks in all recordings, and of the scratch images made for them."""

Message = dict[str, Any]


class Image:
    """A scratch image."""

    def __init__(self, key: object, size: int = SIZE) -> None:
        self.key = key
        self.size = qcow2.file_size(size)
        self.header = qcow2.empty_image(size)[0][1]

    def actual_size(self) -> int:
        return 1 << 16

    def close(self) -> None:
        pass


class Host:
    """A world in which every file is an empty scratch image."""

    def __init__(self) -> None:
        self.closed: list[int] = []
        self.address: Mapping[str, Any] | None = None
        self.readers: dict[str, int] = {}

    def now(self) -> float:
        return 0.5

    def open_image(self, path: str | int, readonly: bool) -> replay_block.Image:
        if str(path).startswith("/nothere"):
            raise FileNotFoundError(2, "No such file or directory")
        return Image(path)

    def close_fd(self, fd: int) -> None:
        self.closed.append(fd)

    def start_server(self, address: Mapping[str, Any], fd: int | None) -> None:
        self.address = address

    def stop_server(self) -> None:
        self.address = None

    def clients(self, export: str) -> int:
        return self.readers.get(export, 0)

    def disconnect(self, export: str) -> None:
        self.readers.pop(export, None)


class Client:
    """What is said to a fake, without a wire."""

    def __init__(self, recorded: recording.Recording, rules: tuple[faults.Rule, ...] = ()) -> None:
        self.host = Host()
        self.replay = replay.Replay(recorded, self.host, rules)
        self.replay.connect()
        self.ends: list[replay.Answer] = []
        self.events: list[Message] = []

    def __call__(self, execute: str, *fds: int, **arguments: Any) -> Message | None:
        """The reply, None where there is none."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.send({"execute": execute, "arguments": names}, *fds)

    def send(self, message: Any, *fds: int) -> Message | None:
        answer = self.replay.receive(json.dumps(message).encode(), fds)
        self.ends.append(answer)
        self.events += [told for told in answer.messages if "event" in told]
        replies = [dict(told) for told in answer.messages if "event" not in told]
        return replies[0] if replies else None

    def done(self, execute: str, *fds: int, **arguments: Any) -> Any:
        reply = self(execute, *fds, **arguments)
        assert "return" in (reply or {}), reply
        assert reply is not None
        return reply["return"]

    def refused(self, execute: str, **arguments: Any) -> str:
        reply = self(execute, **arguments)
        assert reply is not None
        return str(reply["error"]["desc"])


def load(path: pathlib.Path) -> recording.Recording:
    return recording.parse(path.read_text())


@pytest.fixture(params=["qemu-7.2.22", "qemu-11.1.3"])
def client(request: pytest.FixtureRequest) -> Client:
    found = Client(load(PACKAGE / "recordings" / f"{request.param}.jsonl"))
    found.done("qmp_capabilities")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_fake_answers_as_the_recorded_qemu_did(path: pathlib.Path) -> None:
    recorded = load(path)
    fake = Client(recorded)
    for number, exchange in enumerate(recorded.exchanges()):
        if exchange.execute == "qmp_capabilities":
            fake.replay.connect()
        fds = (1000 + number,) if exchange.execute == "add-fd" else ()
        message = {"execute": exchange.execute, "arguments": exchange.arguments, "id": "x"}
        reply = fake.send(message, *fds)
        assert reply is not None
        assert reply.pop("id") == "x"
        real, ours = replayed.comparable(exchange.reply), replayed.comparable(reply)
        assert ours == real, f"{exchange.execute} {exchange.arguments}"
        if not exchange.execute.endswith("graph"):  # an edge may come without permissions
            assert replayed.shape(reply) == replayed.shape(exchange.reply)
