# SPDX-License-Identifier: LGPL-2.1-or-later
"""The normal form of recordings: whatever QEMU does differently the next time, it is the same."""

import dataclasses
import json
import pathlib
import random
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import virtbackup
from tests import json_mutations
from virtbackup.qemu import normal, recording

Message = Mapping[str, Any]

DIRECTORY = pathlib.Path(virtbackup.__file__).parent / "recordings"
FILES = sorted(DIRECTORY.glob("*.jsonl"))
GREETING = '{"<-": {"QMP": {}}}\n'
RECORDINGS = {path.stem: recording.parse(path.read_text()) for path in FILES}


def dump(found: recording.Recording) -> str:
    return recording.format(found.lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_shipped_is_in_normal_form(path: pathlib.Path) -> None:
    text = path.read_text()
    found = RECORDINGS[path.stem]
    assert dump(found) == text
    assert dump(normal.normalise(found)) == text


@pytest.mark.parametrize("name", RECORDINGS)
def test_what_is_shipped_is_a_whole_backup(name: str) -> None:
    exchanges = list(RECORDINGS[name].exchanges())
    version = RECORDINGS[name].reply("query-version")
    assert RECORDINGS[name].greeting["QMP"]["version"] == version
    assert name.endswith("{major}.{minor}.{micro}".format(**version["qemu"]))
    asked = [exchange.execute for exchange in exchanges]
    assert {"query-commands", "query-qmp-schema", "transaction", "nbd-server-stop"} <= {*asked}
    assert asked.count("block-export-add") == asked.count("block-export-del") == 2
    assert asked.count("job-dismiss") == 2
    assert exchanges[-1].execute != "query-jobs" or exchanges[-1].reply == {"return": []}
    for exchange in exchanges:
        known = exchange.execute == "qom-list" or exchange.arguments.get("driver") == "bochs"
        assert known or "error" not in exchange.reply


# --- the same, said otherwise ---------------------------------------------------------------------


def otherwise(found: recording.Recording, chance: random.Random) -> recording.Recording:
    """FOUND as QEMU might say it another time."""
    id = f"{chance.getrandbits(32):08x}"
    start = chance.randrange(1000)
    size = chance.randrange(1, 1 << 40)
    lines: list[recording.Line] = []
    late: list[recording.Line] = []
    before = ""
    for line in found.lines:
        message = json.loads(_reworded(json.dumps(line.message), id, size))
        if "id" in message:
            message["id"] += start
        if "timestamp" in message:
            message["timestamp"] = {"seconds": size, "microseconds": start}
        if line.direction == "->":
            # What comes late comes when the next command was sent already, unless the one who
            # sends it has waited: for an answer to go by, for the end of what it names.
            if late and (_names_one_of(message, late) or chance.random() < 0.5):
                lines += late
                late = []
            held, late = late, []
            if message["execute"] != before:
                lines += _waiting(message, chance)
            before = message["execute"]
            lines += [recording.Line("->", message), *held]
        elif "QMP" in message:
            lines += [*late, recording.Line("<-", message)]
            late = []
        else:
            late.append(recording.Line("<-", message))
    return recording.Recording((*lines, *late))


def _reworded(text: str, id: str, size: int) -> str:
    """Another backup's id, another directory, sizes and numbers; the same all through."""
    text = text.replace("virtbackup-00000000", f"virtbackup-{id}")
    text = re.sub(r"#block0(\d\d)", r"#block7\1", text)
    text = re.sub(r'"(actual-size|fd)": 0', rf'"\1": {size}', text)
    return text.replace("/images/", "/srv/my guest/")


def _names_one_of(command: Message, late: list[recording.Line]) -> bool:
    arguments = json.dumps(command.get("arguments"))
    events = (line.message.get("data", {}) for line in late)
    return any(f'"{data.get("id", data.get("device"))}"' in arguments for data in events)


def _waiting(command: Message, chance: random.Random) -> list[recording.Line]:
    """The same question asked before, and answered otherwise."""
    if command["execute"] not in ("query-jobs", "query-block-exports"):
        return []
    lines = []
    for number in range(chance.randrange(3)):
        id = 100_000 + 10 * command["id"] + number
        lines.append(recording.Line("->", {**command, "id": id}))
        lines.append(_pause(chance))
        lines.append(recording.Line("<-", {"return": [{"not": "yet", "n": number}], "id": id}))
    return lines


def _pause(chance: random.Random) -> recording.Line:
    data = {"id": "virtbackup-1", "status": chance.choice(["paused", "running"])}
    stamp = {"seconds": 1, "microseconds": 2}
    return recording.Line("<-", {"event": "JOB_STATUS_CHANGE", "data": data, "timestamp": stamp})


def without_large_replies(found: recording.Recording) -> recording.Recording:
    """The schema takes long to write and to read, and has nothing in it that changes."""
    large = ("query-qmp-schema", "query-commands")
    ids = [line.message["id"] for line in found.lines if line.message.get("execute") in large]
    lines = (
        dataclasses.replace(line, message={**line.message, "return": []})
        if "return" in line.message and line.message["id"] in ids and number < 20
        else line
        for number, line in enumerate(found.lines)
    )
    return recording.Recording(tuple(lines))


SHORT = {name: without_large_replies(found) for name, found in RECORDINGS.items()}


@settings(max_examples=10)
@given(seed=st.integers(0, 1 << 32))
@pytest.mark.parametrize("name", RECORDINGS)
def test_said_otherwise_it_is_the_same(name: str, seed: int) -> None:
    other = otherwise(SHORT[name], random.Random(seed))
    assert dump(other) != dump(SHORT[name])
    assert dump(normal.normalise(other)) == dump(SHORT[name])


SMALL = [
    {line.direction: dict(line.message)}
    for line in SHORT[FILES[0].stem].lines
    if len(str(line.message)) < 2000
]


@given(
    spoilt=st.lists(st.tuples(st.sampled_from(SMALL), json_mutations.spoilers), max_size=6),
)
def test_whatever_is_a_recording_has_a_normal_form(
    spoilt: list[tuple[Any, json_mutations.Spoil]],
) -> None:
    lines = [json.dumps(spoil(line)) for line, spoil in spoilt]
    text = GREETING + "".join(f"{line}\n" for line in lines)
    try:
        found = recording.parse(text)
    except ValueError:
        return
    done = normal.normalise(found)
    assert dump(normal.normalise(done)) == dump(done)


def test_a_message_nested_too_deeply() -> None:
    deep: Any = []
    for _ in range(700):
        deep = {"x": [deep]}
    found = recording.Recording(
        (
            recording.Line("<-", {"QMP": {}}),
            recording.Line("->", {"execute": "x", "arguments": deep}),
        )
    )
    with pytest.raises(ValueError, match="nested too deeply"):
        normal.normalise(found)


# --- one thing each -------------------------------------------------------------------------------


def normal_lines(*lines: dict[str, Message], prefixes: Mapping[str, str] | None = None) -> Any:
    """The normal form of LINES behind a greeting, the greeting left out."""
    text = GREETING + "".join(json.dumps(line) + "\n" for line in lines)
    done = normal.normalise(recording.parse(text), prefixes)
    return [{line.direction: line.message} for line in done.lines[1:]]


def asked(execute: str, number: int, /, **arguments: Any) -> dict[str, Message]:
    return {"->": {"execute": execute, "id": number, "arguments": arguments}}


def said(id: int, value: Any = None) -> dict[str, Message]:
    return {"<-": {"return": value or {}, "id": id}}


def event(name: str, **data: Any) -> dict[str, Message]:
    return {"<-": {"event": name, "data": data}}


def test_an_event_stands_with_what_led_to_it() -> None:
    assert normal_lines(
        asked("job-cancel", 7, id="a"), asked("job-cancel", 8, id="b"), asked("stop", 9),
        said(7), event("CONCLUDED", id="b"), said(8), event("CONCLUDED", id="a"), event("STOP"),
        said(9),
    ) == [
        asked("job-cancel", 1, id="a"), event("CONCLUDED", id="a"), said(1),
        asked("job-cancel", 2, id="b"), event("CONCLUDED", id="b"), said(2),
        asked("stop", 3), event("STOP"), said(3),
    ]  # fmt: skip


def test_a_job_begins_once_and_its_pauses_are_left_out() -> None:
    def status(status: str) -> dict[str, Message]:
        return event("JOB_STATUS_CHANGE", id="a", status=status)

    assert normal_lines(
        status("running"),
        asked("transaction", 1, actions=["a"]),
        *map(status, ["created", "running", "paused", "running", "paused", "running"]),
        said(1),
        asked("job-cancel", 2, id="a"),
        *map(status, ["paused", "running", "aborting", "concluded"]),
    ) == [
        asked("transaction", 1, actions=["a"]),
        *map(status, ["created", "running"]),
        said(1),
        asked("job-cancel", 2, id="a"),
        *map(status, ["aborting", "concluded"]),
    ]


def test_a_query_is_there_with_the_answer_that_was_waited_for() -> None:
    waited = [asked("query-jobs", n) for n in (1, 2, 3, 4)]
    assert normal_lines(
        waited[0], said(1, ["running"]), waited[1], said(2, ["aborting"]), waited[2], said(3, []),
        waited[3], said(4, []),
    ) == [waited[0], said(1, []), waited[1], said(2, [])]  # fmt: skip
    done = [asked("job-dismiss", 1, id="a"), said(1), asked("job-dismiss", 2, id="a"), said(2, [1])]
    assert normal_lines(*done) == done  # only a query can be asked again for nothing


def test_paths() -> None:
    names = [
        "/home/me/vm/a.img", "/srv/b.img", "json:{\"filename\": \"/home/me/vm/a.img\"}",
        "/mnt/srv/b.img", "/dev/sda", "/home/me/vm/virtbackup-0123abcd-0.qcow2", "/tmp/s/nbd.sock",
    ]  # fmt: skip
    [_, reply] = normal_lines(
        asked("x", 1),
        said(1, [{"filename": names[0]}, {"file": names[1]}, *names[2:]]),
        prefixes={"/tmp/s/": "/sockets/", "/home/me/vm/virtbackup-": "/scratch/virtbackup-"},
    )
    assert reply == said(
        1,
        [
            {"filename": "/images/a.img"}, {"file": "/images2/b.img"},
            "json:{\"filename\": \"/images/a.img\"}",
            "/mnt/srv/b.img", "/dev/sda", "/scratch/virtbackup-00000000-0.qcow2",
            "/sockets/nbd.sock",
        ],
    )  # fmt: skip
