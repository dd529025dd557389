# SPDX-License-Identifier: LGPL-2.1-or-later
"""The normal form of a recording: what differs from one recording to the next is gone. Pure.

What QEMU does at moments of its own is told as if it did all of it at once: a reply directly behind
its command, and before the reply the events that the command led to. That is one of the orders in
which QEMU may say it, and so can be replayed.

- Message ids count from 1 on every connection. Times are 0, and so are bytes that files take on
  disk and the numbers of file descriptors.
- Backups of ours are called 00000000, nodes without a name ``#block000`` on, in the order in which
  they are met. The directories of images are /images, /images2, ...
- A query that was repeated until its answer changed is there once, with that answer.
- An event stands at the last command before it that names its job or export; there, one job's
  events follow another's. That a job paused and went on is left out: QEMU has them do so whenever
  it changes the block graph, as often as it comes about.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from virtbackup.qemu import naming, recording

BACKUP_ID = naming.BackupId("00000000")
"""Stands for every backup's id."""

_Message = Mapping[str, Any]

_OURS = re.compile(rf"(?<={naming.PREFIX})[0-9a-f]{{8}}(?=-\d)")
_NO_NAME = re.compile(r"#block\d+")
_ZEROED = {"actual-size", "fd", "seconds", "microseconds"}
_FILE_KEYS = {"filename", "file", "backing_file", "backing-filename", "full-backing-filename"}
_IMAGE = re.compile(rf"(?!/dev/)/.+/(?!{naming.PREFIX})[^/]+")


@dataclasses.dataclass
class _Exchange:
    """A command, its reply if one came, and the events to be told between them."""

    command: _Message
    reply: _Message | None = None
    events: list[_Message] = dataclasses.field(default_factory=list)

    @property
    def question(self) -> str | None:
        """What is asked, where this is a query."""
        if not str(self.command["execute"]).startswith(("query-", "x-debug-query-")):
            return None
        return json.dumps({k: v for k, v in self.command.items() if k != "id"}, sort_keys=True)

    @property
    def answer(self) -> _Message | None:
        return self.reply and {k: v for k, v in self.reply.items() if k != "id"}


def normalise(
    found: recording.Recording, prefixes: Mapping[str, str] | None = None
) -> recording.Recording:
    """The normal form of FOUND; that of a normal form is itself.

    PREFIXES of paths are replaced there, beside the images' directories. Errors: ValueError for
    messages that are nested too deeply.
    """
    try:
        return _normalise(found, prefixes or {})
    except RecursionError as failure:
        raise ValueError("a message is nested too deeply") from failure


def _normalise(found: recording.Recording, prefixes: Mapping[str, str]) -> recording.Recording:
    lines: list[recording.Line] = []
    for greeting, rest in _connections(found.lines):
        lines.append(recording.Line("<-", greeting))
        exchanges = _without_waiting(_with_events(rest))
        for id, exchange in enumerate(exchanges, 1):
            lines.append(recording.Line("->", {**exchange.command, "id": id}))
            lines += [recording.Line("<-", event) for event in exchange.events]
            if exchange.reply is not None:
                lines.append(recording.Line("<-", {**exchange.reply, "id": id}))
    names = _Names((line.message for line in lines), prefixes)
    return recording.Recording(
        tuple(recording.Line(line.direction, names.renamed(line.message)) for line in lines)
    )


def _connections(
    lines: Iterable[recording.Line],
) -> Iterator[tuple[_Message, list[recording.Line]]]:
    """Each connection's greeting, and what follows it."""
    greeting: _Message | None = None
    rest: list[recording.Line] = []
    for line in lines:
        if "QMP" in line.message:
            if greeting is not None:
                yield greeting, rest
            greeting, rest = line.message, []
        else:
            rest.append(line)
    if greeting is not None:
        yield greeting, rest


# --- order ---


def _with_events(lines: Iterable[recording.Line]) -> list[_Exchange]:
    """The exchanges of one connection in the order of their commands."""
    exchanges: list[_Exchange] = []
    unanswered: dict[str, _Exchange] = {}
    events: list[tuple[_Message, int]] = []
    for line in lines:
        id = json.dumps(line.message.get("id"))
        if line.direction == "->":
            exchanges.append(_Exchange(line.message))
            unanswered[id] = exchanges[-1]
        elif "event" in line.message:
            events.append((line.message, len(exchanges)))
        elif exchange := unanswered.pop(id, None):
            exchange.reply = line.message
    for event, sent in _without_pauses(events):
        if exchanges:
            _cause(event, exchanges, sent).events.append(event)
    for exchange in exchanges:
        exchange.events.sort(key=_subject)  # stable: each subject's own order stays
    return exchanges


def _without_pauses(events: Iterable[tuple[_Message, int]]) -> Iterator[tuple[_Message, int]]:
    """EVENTS but for jobs that pause and go on."""
    begun: set[str] = set()
    for event, sent in events:
        if event["event"] == "JOB_STATUS_CHANGE":
            job, status = _subject(event), _data(event).get("status")
            if status == "paused" or (status == "running" and job not in begun):
                continue
            (begun.add if status == "created" else begun.discard)(job)
        yield event, sent


def _cause(event: _Message, exchanges: list[_Exchange], sent: int) -> _Exchange:
    """Where EVENT is told, which came when SENT commands had been sent."""
    subject = _subject(event)
    before = exchanges[: max(sent, 1)]
    for exchange in reversed(before):
        if subject and subject in _strings(exchange.command.get("arguments")):
            return exchange
    return before[-1]


def _subject(event: _Message) -> str:
    """The job, export, device or node that an event is of; empty for none."""
    names = (_data(event).get(key) for key in ("id", "device", "node-name"))
    return next((name for name in names if isinstance(name, str) and name), "")


def _data(event: _Message) -> _Message:
    data = event.get("data")
    return data if isinstance(data, dict) else {}


def _strings(value: Any) -> Iterator[str]:
    """Every string in VALUE."""
    match value:
        case str():
            yield value
        case dict():
            for item in value.values():
                yield from _strings(item)
        case list():
            for item in value:
                yield from _strings(item)


def _without_waiting(exchanges: Iterable[_Exchange]) -> list[_Exchange]:
    """EXCHANGES but for the queries that were asked again, and then had another answer."""
    kept: list[_Exchange] = []
    for exchange in exchanges:
        before = []
        while (
            kept
            and exchange.question is not None
            and kept[-1].question == exchange.question
            and kept[-1].answer != exchange.answer
        ):
            before.append(kept.pop())
        exchange.events[:0] = [event for one in reversed(before) for event in one.events]
        kept.append(exchange)
    return kept


# --- names ---


class _Names:
    """What is called otherwise in the normal form."""

    def __init__(self, messages: Iterable[_Message], prefixes: Mapping[str, str]) -> None:
        self._prefixes = dict(prefixes)
        found = dict.fromkeys(d for message in messages for d in _image_directories(message))
        for number, directory in enumerate(found, 1):
            self._prefixes.setdefault(f"{directory}/", f"/images{number if number > 1 else ''}/")
        longest_first = sorted(self._prefixes, key=len, reverse=True)
        # Where a path begins: not in the middle of another.
        self._pattern = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, longest_first))})")
        self._nodes: dict[str, str] = {}

    def renamed(self, value: Any) -> Any:
        match value:
            case dict():
                return {key: self._member(key, item) for key, item in value.items()}
            case list():
                return [self.renamed(item) for item in value]
            case str():
                return self._text(value)
        return value

    def _member(self, key: str, value: Any) -> Any:
        return 0 if key in _ZEROED and type(value) is int else self.renamed(value)

    def _text(self, text: str) -> str:
        if self._prefixes:
            text = self._pattern.sub(lambda match: self._prefixes[match[0]], text)
        return _NO_NAME.sub(self._node, _OURS.sub(BACKUP_ID, text))

    def _node(self, match: re.Match[str]) -> str:
        return self._nodes.setdefault(match[0], f"#block{len(self._nodes):03}")


def _image_directories(value: Any) -> Iterator[str]:
    """The directories of the images that VALUE tells of, but for devices and our scratch images."""
    match value:
        case dict():
            for key, item in value.items():
                if key in _FILE_KEYS and isinstance(item, str) and _IMAGE.fullmatch(item):
                    yield item.rpartition("/")[0]
                else:
                    yield from _image_directories(item)
        case list():
            for item in value:
                yield from _image_directories(item)
