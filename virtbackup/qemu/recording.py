# SPDX-License-Identifier: LGPL-2.1-or-later
"""A recorded conversation with a QEMU's monitor (libvirt's tests/qemumonitortestutils.c). Pure.

A text of lines, each a message with its direction: ``{"->": MESSAGE}`` to QEMU, ``{"<-": MESSAGE}``
from it. It begins with QEMU's greeting; a later greeting is another connection's first message.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

Direction = Literal["->", "<-"]


@dataclasses.dataclass(frozen=True)
class Line:
    """One message; its line in the text, where it came from one (from 1), else 0."""

    direction: Direction
    message: Mapping[str, Any]
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A command with its reply, ``{"return": ...}`` or ``{"error": ...}`` without an id, and the
    events that came between it and the next command."""

    execute: str
    arguments: Mapping[str, Any]
    reply: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Recording:
    """What was said, in order."""

    lines: tuple[Line, ...]

    @property
    def greeting(self) -> Mapping[str, Any]:
        """QEMU's first message."""
        return self.lines[0].message

    def exchanges(self) -> Iterator[Exchange]:
        """The commands in the order of their sending."""
        sent: list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]] = []
        replies: dict[int, Mapping[str, Any]] = {}
        open_ids: dict[str, int] = {}
        for line in self.lines:
            if "QMP" in line.message:
                open_ids.clear()
            elif line.direction == "->":
                open_ids[json.dumps(line.message.get("id"))] = len(sent)
                sent.append((line.message, []))
            elif "event" in line.message:
                if sent:
                    sent[-1][1].append(line.message)
            else:
                number = open_ids.pop(json.dumps(line.message.get("id")), None)
                if number is not None:
                    replies[number] = {k: v for k, v in line.message.items() if k != "id"}
        for number, (command, events) in enumerate(sent):
            if number in replies:
                arguments = command.get("arguments") or {}
                yield Exchange(command["execute"], arguments, replies[number], tuple(events))

    def reply(self, execute: str) -> Any:
        """What the first such command returned. Errors: KeyError for a command that is not there,
        or that failed."""
        for exchange in self.exchanges():
            if exchange.execute == execute:
                return exchange.reply["return"]
        raise KeyError(execute)


def parse(text: str) -> Recording:
    """Read a recording. Errors: ValueError, naming the line."""
    return _whole(tuple(_lines(text)))


def _whole(lines: tuple[Line, ...]) -> Recording:
    """A recording of LINES. Errors: ValueError."""
    if not lines or lines[0].direction != "<-" or "QMP" not in lines[0].message:
        raise ValueError("line 1: a recording begins with QEMU's greeting")
    return Recording(lines)


def _lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as failure:
            raise ValueError(f"line {number}: not JSON: {failure}") from failure
        match found:
            case {"->": {"execute": str(), **rest} as message} if len(found) == 1:
                if not isinstance(rest.get("arguments", {}), dict):
                    raise ValueError(f"line {number}: arguments are no object")
                yield Line("->", message, number)
            case {"<-": dict() as message} if len(found) == 1:
                yield Line("<-", message, number)
            case _:
                raise ValueError(f'line {number}: expected {{"->": COMMAND}} or {{"<-": MESSAGE}}')


def parse_trace(text: str) -> Recording:
    """Read a trace that is a recording, as that of a QMP socket is. Errors: as trace_lines."""
    return _whole(trace_lines(text))


def trace_lines(text: str) -> tuple[Line, ...]:
    """Read what ``--trace`` writes: a line a message, behind its time and its direction. By libvirt
    there is no greeting: that was said to libvirt.

    Errors: ValueError, naming the line.
    """
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            lines.append("")
            continue
        match line.split(" ", 2):
            case [_, ("->" | "<-") as direction, message]:
                lines.append(f'{{"{direction}": {message}}}')
            case _:
                raise ValueError(f"line {number}: expected TIME -> COMMAND or TIME <- MESSAGE")
    return tuple(_lines("\n".join(lines)))


def format(lines: Iterable[Line]) -> str:
    """The text; ``parse`` reads it."""
    return "".join(
        json.dumps({line.direction: line.message}, sort_keys=True) + "\n" for line in lines
    )
