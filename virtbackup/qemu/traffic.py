# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was said on a monitor, by whichever witness, made comparable. Pure.

A recording, a ``--trace`` file, or libvirtd's debug log (its probes QEMU_MONITOR_SEND_MSG,
QEMU_MONITOR_IO_WRITE, QEMU_MONITOR_RECV_REPLY and QEMU_MONITOR_RECV_EVENT). Compared is what is
said, not when: ids, times and numbers of descriptors are left out, and what each side names as it
likes (nodes, jobs, exports, files) is named by the order of first use.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from virtbackup.qemu import naming, recording

_TRACE = re.compile(r"^\d{4}-\d\d-\d\dT[\d:.]+Z (->|<-) ", re.MULTILINE)
_PROBE = re.compile(
    r"QEMU_MONITOR_(SEND_MSG|IO_WRITE|RECV_REPLY|RECV_EVENT): mon=(\S+) (?:msg|buf|reply|event)="
)
_DECODER = json.JSONDecoder()


def parse(text: str, monitor: str | None = None) -> tuple[recording.Line, ...]:
    """Every message of a recording, a trace or a log, in order.

    A log may be of several monitors: then the messages of MONITOR, by its address there; None is
    the one on which an NBD server was started. Errors: ValueError.
    """
    first = text.lstrip()[:200]
    if _TRACE.match(first):
        return recording.trace_lines(text)
    if "QEMU_MONITOR_" in text:
        if (trace := _TRACE.search(text)) is not None:
            number = text.count("\n", 0, trace.start()) + 1
            raise ValueError(f"line {number}: a line of a trace in a log of libvirtd's monitor")
        return _chosen(list(_logged(text)), monitor)
    if first.startswith("{"):
        return recording.parse(text).lines
    raise ValueError("neither a recording, nor a trace, nor a log of libvirtd's monitor")


def _chosen(
    logged: Sequence[tuple[str, recording.Line]], monitor: str | None
) -> tuple[recording.Line, ...]:
    """The messages of one monitor."""
    monitors = list(dict.fromkeys(address for address, _ in logged))
    if monitor is None and len(monitors) > 1:
        started = {a for a, line in logged if line.message.get("execute") == "nbd-server-start"}
        if len(started) != 1:
            raise ValueError(f"several monitors, choose one: {', '.join(monitors)}")
        [monitor] = started
    if monitor is not None and monitor not in monitors:
        raise ValueError(f"no monitor {monitor}, only {', '.join(monitors)}")
    return tuple(line for address, line in logged if monitor in (None, address))


def _logged(text: str) -> Iterator[tuple[str, recording.Line]]:
    """(monitor, message). A log tells of a command when it is queued and again when it is written:
    one is enough. An address is used again for a later monitor, whose messages begin with the
    negotiation: it is called ADDRESS#2 then."""
    times: dict[str, int] = {}
    sent = "SEND_MSG" if "QEMU_MONITOR_SEND_MSG" in text else "IO_WRITE"
    number, counted = 1, 0
    for probe in _PROBE.finditer(text):
        number += text.count("\n", counted, probe.start())
        counted = probe.start()
        if probe[1] in (sent, "RECV_REPLY", "RECV_EVENT"):
            direction: recording.Direction = "->" if probe[1] == sent else "<-"
            try:
                for message in _objects(text, probe.end()):
                    if message.get("execute") == "qmp_capabilities":
                        times[probe[2]] = times.get(probe[2], 0) + 1
                    time = times.get(probe[2], 1)
                    monitor = probe[2] if time == 1 else f"{probe[2]}#{time}"
                    yield monitor, recording.Line(direction, message, number)
            except (ValueError, RecursionError) as failure:
                raise ValueError(f"line {number}: not a whole message: {failure}") from failure


def _objects(text: str, start: int) -> Iterator[Mapping[str, Any]]:
    """The JSON objects from START on, until something else comes. Errors: ValueError."""
    while text.startswith("{", start):
        message, end = _DECODER.raw_decode(text, start)
        yield message
        start = end + len(text[end : end + 4]) - len(text[end : end + 4].lstrip())


# --- what is compared ---


_ANYWHERE = {
    "node-name": "node", "node": "node", "file": "node", "backing": "node", "target": "node",
    "device": "node", "filter-node-name": "node", "job-id": "job", "fdset-id": "fdset",
    "fdname": "fd", "filename": "file", "backing-file": "file", "path": "path",
}  # fmt: skip
"""Member -> what its text, or number, is the name of."""
_OF_JOBS = {"id": "job", "device": "job"}
_OF_EXPORTS = {"id": "export"}
_OURS = re.compile(rf"{naming.PREFIX}[0-9a-f]{{8}}(?=-\d)")
"""A backup of ours."""
_FDSET = re.compile(r"/dev/fdset/(\d+)")


def _kinds(execute: str) -> Mapping[str, str]:
    """As _ANYWHERE, for one command or event."""
    if re.fullmatch(r"(block-)?job-.*", execute):
        return {**_ANYWHERE, **_OF_JOBS}
    if execute.startswith("block-export-"):
        return {**_ANYWHERE, **_OF_EXPORTS}
    if execute.startswith(("qom-", "device_", "block-dirty-bitmap-")):
        return {key: kind for key, kind in _ANYWHERE.items() if key != "path"}
    return _ANYWHERE


class _Names:
    """Names of one side, told by what they are of and the order of first use."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, Any], str] = {}

    def renamed(self, value: Any, kinds: Mapping[str, str], kind: str | None = None) -> Any:
        """VALUE with the names in it told so; KIND is what VALUE itself would be a name of."""
        match value:
            case dict():
                # In an order that is not the sender's whim.
                members = sorted(value.items())
                return {k: self.renamed(v, kinds, kinds.get(k)) for k, v in members}
            case list():
                return [self.renamed(item, kinds, kind) for item in value]
            case str() if kind == "file" and (found := _FDSET.fullmatch(value)):
                return f"/dev/fdset/{self._name('fdset', int(found[1]))}"
            case str() | int() if kind is not None and not isinstance(value, bool):
                return self._name(kind, value)
        return value

    def _name(self, kind: str, value: Any) -> str:
        count = sum(other == kind for other, _ in self._told)
        return self._told.setdefault((kind, value), f"{kind}{count + 1}")


_QUERIES = re.compile(
    r"(x-debug-|x-)?query-.*|qom-(get|list.*)|device-list-properties|qmp_capabilities"
)


def without_queries(lines: Iterable[recording.Line]) -> list[recording.Line]:
    """The commands of LINES that ask for something to be done."""
    return [
        line
        for line in lines
        if line.direction == "->" and not _QUERIES.fullmatch(str(line.message.get("execute")))
    ]


def comparable(
    lines: Iterable[recording.Line], everything: bool = False, literal: bool = False
) -> list[str]:
    """What is compared, a text a message: the commands, or EVERYTHING that was said.

    LITERAL leaves names as they are.
    """
    names = _Names()
    asked: dict[str, str] = {}
    told = []
    for line in lines:
        message = {k: v for k, v in line.message.items() if k not in ("id", "timestamp")}
        if message.get("arguments") == {}:
            del message["arguments"]  # as good as none
        id = json.dumps(line.message.get("id"))
        if line.direction == "->":
            asked[id] = str(message.get("execute", message.get("exec-oob")))
        elif not everything:
            continue
        if "event" in message:
            about = str(message["event"]).lower().replace("_", "-")
        else:
            about = asked.get(id, "")
        if not literal:
            message = names.renamed(message, _kinds(about))
        mark = f"{line.direction} " if everything else ""
        text = json.dumps(_without_numbers(message), sort_keys=True)
        told.append(mark + _OURS.sub(f"{naming.PREFIX}0", text))
    return told


def _without_numbers(value: Any) -> Any:
    """VALUE without the numbers of descriptors."""
    match value:
        case dict():
            return {k: _without_numbers(v) for k, v in value.items() if k != "fd"}
        case list():
            return [_without_numbers(item) for item in value]
    return value


def diff(ours: Sequence[str], theirs: Sequence[str], names: tuple[str, str]) -> list[str]:
    """The difference as ``diff -u`` tells it; none where there is none."""
    return list(difflib.unified_diff(ours, theirs, *names, lineterm=""))


@dataclasses.dataclass(frozen=True)
class Hunk:
    """Neighbouring differences, with the messages around them."""

    first: int
    """The number of the first message of one side, from 1; of none, that of the one before."""
    second: int
    messages: list[tuple[Literal["both", "first", "second"], str]]
    """In which of the sides, and what ``comparable`` made of it."""


def hunks(ours: Sequence[str], theirs: Sequence[str]) -> list[Hunk]:
    """What ``diff`` tells, for programs."""
    found = []
    for group in difflib.SequenceMatcher(None, ours, theirs).get_grouped_opcodes():
        hunk = Hunk(_number(group, 1), _number(group, 3), [])
        for tag, start, end, their_start, their_end in group:
            if tag == "equal":
                hunk.messages.extend(("both", text) for text in ours[start:end])
            else:
                hunk.messages.extend(("first", text) for text in ours[start:end])
                hunk.messages.extend(("second", text) for text in theirs[their_start:their_end])
        found.append(hunk)
    return found


def _number(group: Sequence[tuple[Any, ...]], start: int) -> int:
    """Where a side's part of GROUP begins; START is the place of that in an opcode."""
    begin: int = group[0][start]
    end: int = group[-1][start + 1]
    return begin + 1 if end > begin else begin
