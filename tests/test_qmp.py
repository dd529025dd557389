# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP messages, however they were cut on the way, and what is no QMP."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtbackup.qemu import monitor_json, qmp

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"},'
    b' "capabilities": ["oob"]}}\r\n'
)
MESSAGES: list[tuple[bytes, qmp.Message]] = [
    (GREETING, qmp.Greeting((7, 2, 22), "Debian")),
    (b'{"return": {}, "id": 1}\r\n', qmp.Success(1, {})),
    (b'{"return": [1, "\xc3\xa9"], "id": 2}\n', qmp.Success(2, [1, "é"])),
    (
        b'{"error": {"class": "GenericError", "desc": "no"}, "id": 3}\r\n',
        qmp.Failure(3, "GenericError", "no"),
    ),
    (
        b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n',
        qmp.Failure(None, "GenericError", "JSON parse error"),
    ),
    (
        b'{"timestamp": {"seconds": 5, "microseconds": 500000}, "event": "STOP"}\r\n',
        qmp.Event("STOP", {}, 5.5),
    ),
    (
        b'{"timestamp": {"seconds": 5, "microseconds": 0}, "event": "E", "data": {"id": "x"}}\r\n',
        qmp.Event("E", {"id": "x"}, 5.0),
    ),
]
STREAM = b"".join(line for line, _ in MESSAGES)


def drain(parser: qmp.Parser) -> list[qmp.Message]:
    found = []
    while (message := parser.next_message()) is not None:
        found.append(message)
    return found


@pytest.mark.parametrize(("line", "message"), MESSAGES)
def test_whole_and_with_the_next_behind_it(line: bytes, message: qmp.Message) -> None:
    parser = qmp.Parser()
    parser.receive_data(line)
    assert drain(parser) == [message]
    parser.receive_data(line + line[:10])
    assert drain(parser) == [message]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_cut_anywhere(cuts: list[int]) -> None:
    parser = qmp.Parser()
    found = []
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        parser.receive_data(STREAM[start:end])
        found += drain(parser)
    assert found == [message for _, message in MESSAGES]


def test_byte_by_byte() -> None:
    parser = qmp.Parser()
    found = []
    for index in range(len(STREAM)):
        parser.receive_data(STREAM[index : index + 1])
        found += drain(parser)
    assert found == [message for _, message in MESSAGES]


@pytest.mark.parametrize(
    "line",
    [
        b"HTTP/1.1 200 OK",
        b"[]",
        b"7",
        b"{}",
        b'{"return": {}}',
        b'{"return": {}, "id": "1"}',
        b'{"return": {}, "id": true}',
        b'{"error": "no", "id": 1}',
        b'{"event": "STOP"}',
        b'{"event": "STOP", "data": 7, "timestamp": {"seconds": 1, "microseconds": 1}}',
        b'{"QMP": {"version": {}}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"return": 1' + b"0" * 5000 + b', "id": 1}',
    ],
    ids=range(14),
)
def test_no_qmp(line: bytes) -> None:
    parser = qmp.Parser()
    parser.receive_data(line + b"\n")
    with pytest.raises(qmp.ProtocolError):
        parser.next_message()


@pytest.mark.parametrize("sent", [b"NBDMAGIC\0IHAVEOPT\0\3", b"login: ", b"\0"])
def test_no_qmp_without_an_end(sent: bytes) -> None:
    """As what an NBD server greets with: nothing more would come."""
    parser = qmp.Parser()
    parser.receive_data(sent)
    with pytest.raises(qmp.ProtocolError, match="not a QMP message: b'"):
        parser.next_message()


def test_a_line_without_an_end_is_bounded() -> None:
    parser = qmp.Parser(max_line=1000)
    for _ in range(10):
        parser.receive_data(b"x" * 100)
    with pytest.raises(qmp.ProtocolError, match="longer than 1000"):
        parser.receive_data(b"x")


@given(st.binary(max_size=300))
def test_any_bytes_are_messages_or_a_protocol_error(data: bytes) -> None:
    parser = qmp.Parser()
    try:
        parser.receive_data(data + b"\n")
        drain(parser)
    except qmp.ProtocolError as failure:
        assert str(failure)


def test_commands_are_one_line_each() -> None:
    line = qmp.encode("blockdev-del", {"node-name": "a\nb"}, 7)
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "execute": "blockdev-del",
        "arguments": {"node-name": "a\nb"},
        "id": 7,
    }
    assert "arguments" not in json.loads(qmp.encode("query-jobs", {}, 8))


@pytest.mark.parametrize(
    ("command", "error_class", "desc", "kind"),
    [
        ("block-job-cancel", "DeviceNotActive", "Block job 'j' not found", "JobNotFound"),
        ("block-job-cancel", "GenericError", "Job 'j' in state 'concluded'", "CommandFailed"),
        ("job-dismiss", "GenericError", "Job not found", "JobNotFound"),
        ("blockdev-del", "GenericError", "Job not found", "CommandFailed"),
        ("blockdev-del", "DeviceNotActive", "x", "CommandFailed"),
    ],
)
def test_a_job_that_is_gone_is_an_error_of_its_own(
    command: str, error_class: str, desc: str, kind: str
) -> None:
    sent = monitor_json.Command(command)
    failed = monitor_json.command_failed(sent, qmp.Failure(1, error_class, desc))
    assert type(failed).__name__ == kind
    assert failed.command is sent
    assert str(failed) == f"internal error: unable to execute QEMU command '{command}': {desc}"
