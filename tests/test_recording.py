# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recorded conversations are read, or refused by line."""

import pathlib

import pytest

from virtbackup.qemu import recording

FILES = sorted((pathlib.Path(__file__).parent / "monitordata").glob("*/*.jsonl"))
GREETING = '{"<-": {"QMP": {}}}\n'


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_was_recorded_is_read_and_written_alike(path: pathlib.Path) -> None:
    text = path.read_text()
    found = recording.parse(text)
    assert recording.format(found.lines) == text
    assert "QMP" in found.greeting
    exchanges = list(found.exchanges())
    assert exchanges[0].execute == "qmp_capabilities"
    assert exchanges[0].reply == {"return": {}}
    assert len(exchanges) == sum(line.direction == "->" for line in found.lines)


def test_replies_find_their_commands_and_events_follow_them() -> None:
    text = GREETING + (
        '{"->": {"execute": "a", "id": 1}}\n{"->": {"execute": "b", "id": 2}}\n'
        '{"<-": {"error": {"class": "GenericError", "desc": "no"}, "id": 2}}\n'
        '{"<-": {"event": "E"}}\n{"<-": {"id": 1, "return": 7}}\n'
    )
    found = recording.parse(text)
    assert [(e.execute, e.reply, e.events) for e in found.exchanges()] == [
        ("a", {"return": 7}, ()),
        ("b", {"error": {"class": "GenericError", "desc": "no"}}, ({"event": "E"},)),
    ]
    assert found.reply("a") == 7
    for name in ("b", "c"):
        with pytest.raises(KeyError):
            found.reply(name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: a recording begins"),
        ('{"->": {"execute": "a"}}', "line 1: a recording begins"),
        (GREETING + "nonsense", "line 2: not JSON"),
        (GREETING + "[" * 100000, "line 2: not JSON"),
        (GREETING + "\n[1]", "line 3: expected"),
        (GREETING + '{"->": {}}', "line 2: expected"),
        (GREETING + '{"->": {"execute": "a", "arguments": 1}}', "line 2: arguments"),
        (GREETING + '{"<-": 3}', "line 2: expected"),
        (GREETING + '{"<-": {}, "->": {"execute": "a"}}', "line 2: expected"),
    ],
)
def test_what_is_no_recording_is_refused_by_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recording.parse(text)


def test_a_trace_is_read() -> None:
    text = (
        '2016-01-01T00:00:00.000001Z <- {"QMP": {}}\n'
        '2016-01-01T00:00:00.000002Z -> {"execute":"a","id":1}\n'
        '2016-01-01T00:00:00.000003Z <- {"return": "x\u2028y\x85z", "id": 1}\n\n'
    )
    found = recording.parse_trace(text)
    assert found.reply("a") == "x\u2028y\x85z"
    assert recording.parse(recording.format(found.lines)).reply("a") == found.reply("a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: a recording begins"),
        ("x <- {}", "line 1: a recording begins"),
        ('x <- {"QMP": {}}\n\nnonsense', "line 3: expected TIME -> COMMAND"),
        ('x <- {"QMP": {}}\nx == {}', "line 2: expected TIME -> COMMAND"),
        ('x <- {"QMP": {}}\nx -> {', "line 2: not JSON"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recording.parse_trace(text)
