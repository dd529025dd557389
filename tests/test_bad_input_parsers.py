# SPDX-License-Identifier: LGPL-2.1-or-later
"""What QEMU says, broken: any bytes to the QMP parser, and recorded replies of real QEMUs with a
part of them spoilt to every parser of a reply.

Only ``qmp.ProtocolError`` may come out; what does not fail has the types and ranges it promises.
"""

import dataclasses
import inspect
import itertools
import json
import tracemalloc
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import hostile_monitor, json_mutations, test_block, test_qmp
from virtbackup.qemu import block, capabilities, monitor_json, naming, qmp

Parser = Callable[[Any], object]

# --- the wire -------------------------------------------------------------------------------------

LINES = [
    *(line for line, _ in test_qmp.MESSAGES),
    *(
        hostile_monitor.encode(message)
        for direction, message in hostile_monitor.messages("backup-stop")
        if direction == "<-"
    ),
]


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    """Lines of QMP with some bytes replaced, taken away or put in."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(LINES), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 10)))
        data[start:end] = draw(st.binary(max_size=10))
    return bytes(data)


def _drained(parser: qmp.Parser, data: bytes, cuts: list[int]) -> list[qmp.Message]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    found = []
    for start, end in itertools.pairwise(edges):
        parser.receive_data(data[start:end])
        found += test_qmp.drain(parser)
    return found


@given(mutated_bytes(), st.lists(st.integers(0, 1 << 20), max_size=5))
def test_mutated_streams(data: bytes, cuts: list[int]) -> None:
    try:
        found = _drained(qmp.Parser(), data, cuts)
    except qmp.ProtocolError as failure:
        assert len(str(failure)) < 1000
    else:
        assert found == _drained(qmp.Parser(), data, [])
        for message in found:
            check_type(message, qmp.Message)


@given(st.lists(st.sampled_from([b"{", b"{" * 40, b"\n", b"\r\n", b" " * 30]), max_size=40))
def test_what_a_parser_holds_is_bounded(parts: list[bytes]) -> None:
    """Whether messages are taken or not: no more than two lines and the last data."""
    parser = qmp.Parser(max_line=100)
    taken = 0
    for number, part in enumerate(parts):
        try:
            parser.receive_data(part)
            assert len(parser._buffer) <= 200 + len(part)
            if number % 7 == 6:
                while (line := parser.next_line()) is not None:
                    assert 0 < len(line) <= 100
                    taken += 1
        except qmp.ProtocolError as failure:
            assert "than 100 bytes" in str(failure)
            return


def test_messages_that_nobody_takes_are_bounded() -> None:
    parser = qmp.Parser(max_line=len(test_qmp.STREAM))
    for _ in range(2):
        parser.receive_data(test_qmp.STREAM)
    with pytest.raises(qmp.ProtocolError, match="not taken"):
        parser.receive_data(test_qmp.STREAM)


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_line_around_the_limit(size: int) -> None:
    """And the next one behind it."""
    frame = b'{"return": "%s", "id": 1}'
    text = b"x" * (1000 + size - len(frame % b""))
    parser = qmp.Parser(max_line=1000)
    if size > 0:
        with pytest.raises(qmp.ProtocolError, match="longer than 1000"):
            parser.receive_data(frame % text + b"\n" + b'{"more"')
        return
    parser.receive_data(frame % text + b"\n" + test_qmp.GREETING + b'{"more"')
    assert parser.next_message() == qmp.Success(1, text.decode())
    assert isinstance(parser.next_message(), qmp.Greeting)
    assert parser.next_message() is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "E", "timestamp": {"seconds": 1' + b"0" * 400 + b', "microseconds": 0}}',
        b'{"event": "E", "timestamp": {"seconds": 1, "microseconds": 1' + b"0" * 400 + b"}}",
        b'{"event": "E", "timestamp": {"seconds": true, "microseconds": 0}}',
        b'{"return": NaN, "id": 1}',
        b'{"return": -Infinity, "id": 1}',
        b'{"return": "\\ud800", "id": 1}',
        b'{"return": {"\\uDFFF": 1}, "id": 1}',
        b'{"return": "\xed\xa0\x80", "id": 1}',
        b'{"return": ' + b"[" * 900 + b'"\\ud800"' + b"]" * 900 + b', "id": 1}',
        b"\xef\xbb\xbf" + b'{"return": 1, "id": 1}',
        '{"return": 1, "id": 1}'.encode("utf-16"),
        '{"return": 1, "id": 1}'.encode("utf-32-le"),
        *(
            b'{"QMP": {"version": {"qemu": {"major": %s, "minor": 2, "micro": 3}, "package": ""}}}'
            % version
            for version in (b"true", b"-1", b"1000", b"1.0", b"1" + b"0" * 400)
        ),
        b'{"QMP": {"version": {"qemu": [7, 2, 22], "package": ""}}}',
        b'{"return": 1, "id": 1.0}',
    ],
    ids=range(19),
)
def test_what_json_lets_through_and_qmp_does_not(line: bytes) -> None:
    with pytest.raises(qmp.ProtocolError):
        qmp.decode(line)


def test_a_character_in_two_halves_is_one() -> None:
    assert qmp.decode(b'{"return": "\\ud83d\\uDE00", "id": 1}') == qmp.Success(1, "\U0001f600")


def test_an_error_fits_one_line() -> None:
    desc = json.dumps("a\nb\x1b[2J" + "x" * 10_000).encode()
    failure = qmp.decode(b'{"error": {"class": "C", "desc": ' + desc + b'}, "id": 1}')
    assert isinstance(failure, qmp.Failure)
    assert failure.desc.startswith("a b [2Jxxx")
    assert len(failure.desc) < 1010


DENSE = [b"{}", b"[]", b"[[[]]]", b'{"":1}', b'{"a":[]}', b'{"":{"":[]}}', b'"ab"', b"1.5", b"999",
         '"\U0001f600aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"'.encode(),
         b'"\\u0101aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"']  # fmt: skip


@pytest.mark.parametrize("value", DENSE)
def test_nothing_takes_more_memory_than_it_weighs(value: bytes) -> None:
    line = b'{"return":[' + b",".join([value] * (100_000 // len(value))) + b'],"id":1}'
    tracemalloc.start()
    try:
        message = qmp.decode(line)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(message, qmp.Success)
    assert size < qmp.weight(line)


def test_a_message_of_too_many_values_is_not_decoded() -> None:
    line = b'{"return":[' + b"{}," * (qmp.MAX_WEIGHT // 200) + b'{}],"id":1}'
    assert len(line) < qmp.MAX_LINE
    tracemalloc.start()
    try:
        with pytest.raises(qmp.ProtocolError, match="too many values"):
            qmp.decode(line)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_block_info_of_any_size_that_fits_is_decoded() -> None:
    """Some 9000 disks in query-block."""
    reply = test_block.recorded(test_block.VERSIONS[0], "rest", "query-block")
    many = reply * ((qmp.MAX_LINE - 1000) // len(json.dumps(reply)))
    line = hostile_monitor.encode({"return": many, "id": 1})
    assert len(line) <= qmp.MAX_LINE
    assert qmp.weight(line) < qmp.MAX_WEIGHT


# --- replies --------------------------------------------------------------------------------------


def _recorded(command: str) -> list[Any]:
    """All recorded replies to COMMAND."""
    folders = [path for version in test_block.DATA.iterdir() for path in version.iterdir()]
    files = [folder / f"{command}.json" for folder in folders]
    replies = [json.loads(path.read_text()) for path in files if path.exists()]
    for conversation in hostile_monitor.CONVERSATIONS:
        asked = {}
        for direction, message in hostile_monitor.messages(conversation):
            if direction == "->":
                asked[message["id"]] = message["execute"]
            elif asked.get(message.get("id")) == command and "return" in message:
                replies.append(message["return"])
    assert replies, command
    return replies


NAMED_NODES = _recorded("query-named-block-nodes")
SCHEMA = [
    {"name": "blockdev-add", "meta-type": "command", "arg-type": "1"},
    {"name": "1", "meta-type": "object", "members": [{"name": "driver", "type": "str"}],
     "variants": [{"case": "snapshot-access", "type": "2"}]},
    {"name": "blockdev-backup", "meta-type": "command", "arg-type": "3"},
    {"name": "3", "meta-type": "object", "members": [{"name": "on-cbw-error", "type": "str"}]},
]  # fmt: skip

BLOCK_STATS = {
    f"{verb}_{what}": 1
    for verb, names in {
        "rd": ("operations", "bytes", "total_time_ns"),
        "wr": ("operations", "bytes", "total_time_ns"),
        "flush": ("operations", "total_time_ns"),
    }.items()
    for what in names
}

PARSERS: dict[str, tuple[Parser, list[Any]]] = {
    "parse_block": (block.parse_block, _recorded("query-block")),
    "parse_named_nodes": (block.parse_named_nodes, NAMED_NODES),
    "parse_actual_sizes": (block.parse_actual_sizes, NAMED_NODES),
    "parse_write_thresholds": (block.parse_write_thresholds, NAMED_NODES),
    "parse_graph": (block.parse_graph, _recorded("x-debug-query-block-graph")),
    "parse_commands": (monitor_json.parse_commands, _recorded("query-commands")),
    "parse_name": (monitor_json.parse_name, _recorded("query-name")),
    "parse_uuid": (monitor_json.parse_uuid, _recorded("query-uuid")),
    "parse_status": (monitor_json.parse_status, _recorded("query-status")),
    "parse_replay": (monitor_json.parse_replay, [{"mode": "record", "icount": 1}]),
    "parse_migration": (monitor_json.parse_migration, [{"status": "failed", "error-desc": "no"}]),
    "parse_children": (monitor_json.parse_children, _recorded("qom-list")),
    "parse_credentials": (monitor_json.parse_credentials, _recorded("qom-list")),
    "parse_property": (monitor_json.parse_property, ["/machine/peripheral/scsi0/scsi0.0"]),
    "parse_add_fd": (monitor_json.parse_add_fd, _recorded("add-fd")),
    "parse_fdsets": (
        monitor_json.parse_fdsets,
        [[{"fdset-id": 0, "fds": [{"fd": 24, "opaque": "virtbackup-00000000-0"}]}]],
    ),
    "parse_chardevs": (
        monitor_json.parse_chardevs,
        [[{"label": "compat_monitor0", "filename": "unix:/qmp,server=on", "frontend-open": True}]],
    ),
    "parse_jobs": (monitor_json.parse_jobs, _recorded("query-jobs")),
    "parse_block_jobs": (
        monitor_json.parse_block_jobs,
        [[{"device": "j", "type": "backup", "status": "running", "error": "e", "speed": 0}]],
    ),
    "parse_others_block_jobs": (
        monitor_json.parse_others_block_jobs,
        [[{"device": "j", "type": "mirror", "speed": 1, "offset": 0, "len": 2}]],
    ),
    "parse_memory_size": (
        monitor_json.parse_memory_size,
        [{"base-memory": 1 << 26, "plugged-memory": 0}, {"base-memory": 1 << 26}],
    ),
    "parse_cpus": (
        monitor_json.parse_cpus,
        [[{"cpu-index": 0, "thread-id": 7, "qom-path": "/machine/unattached/device[0]"}]],
    ),
    "parse_text": (monitor_json.parse_text, ["VM status: running\r\n"]),
    "parse_blockstats": (
        block.parse_blockstats,
        [[{"device": "", "node-name": "A", "qdev": "sdb", "stats": BLOCK_STATS}]],
    ),
    "parse_exports": (monitor_json.parse_exports, _recorded("query-block-exports")),
    "parse_features": (capabilities.parse_features, [SCHEMA]),
}

NOT_OF_REPLIES = {"parse_probe"}
"""These look at an error that has its types already."""


def test_no_parser_is_left_out() -> None:
    found = {
        name
        for module in (block, monitor_json, capabilities)
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("parse_") and value.__module__ == module.__name__
    }
    assert found - NOT_OF_REPLIES == set(PARSERS)


def parse(parser: Parser, reply: Any) -> None:
    """Parse a broken REPLY; what comes out is what the parser's signature says."""
    try:
        result = parser(reply)
    except qmp.ProtocolError as failure:
        assert "unexpected" in str(failure)
        assert len(str(failure)) < 300
        assert str(failure).isprintable()
        return
    check_type(result, typing.get_type_hints(parser)["return"])


def check_type(value: object, kind: Any) -> None:
    """Raise AssertionError where VALUE, or a part of it, is not of its type. Numbers of these
    replies count something: a bool or a negative one is none."""
    while hasattr(kind, "__supertype__"):
        kind = kind.__supertype__
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return
    if origin in (typing.Union, types.UnionType):
        fitting = [option for option in inner if _is_instance(value, option)]
        assert fitting, (value, kind)
        check_type(value, fitting[0])
    elif origin is typing.Literal:
        assert value in inner
    elif origin is not None:
        assert isinstance(value, origin), (value, kind)
        _check_items(value, origin, inner)
    else:
        assert _is_instance(value, kind), (value, kind)
        if kind is int:
            assert 0 <= typing.cast(int, value) < 1 << 63
        if dataclasses.is_dataclass(value):
            hints = typing.get_type_hints(type(value))
            for field in dataclasses.fields(value):
                check_type(getattr(value, field.name), hints[field.name])


def _is_instance(value: object, kind: Any) -> bool:
    while hasattr(kind, "__supertype__"):
        kind = kind.__supertype__
    kind = typing.get_origin(kind) or kind
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _check_items(value: Any, origin: type, inner: tuple[Any, ...]) -> None:
    if issubclass(origin, typing.get_origin(typing.Mapping[str, str]) or dict):
        for key, item in value.items():
            check_type(key, inner[0])
            check_type(item, inner[1])
    else:
        kinds = inner * len(value) if len(inner) == 1 else inner
        if inner[-1] is Ellipsis:
            kinds = inner[:1] * len(value)
        for item, kind in zip(value, kinds, strict=True):
            check_type(item, kind)


@pytest.mark.parametrize("name", PARSERS)
def test_recorded_replies_parse(name: str) -> None:
    """What is spoilt below is good before, and the types are as they are said to be."""
    parser, replies = PARSERS[name]
    for reply in replies:
        check_type(parser(reply), typing.get_type_hints(parser)["return"])


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
def test_spoilt_replies(name: str, data: st.DataObject) -> None:
    parser, replies = PARSERS[name]
    reply = data.draw(st.sampled_from(replies))
    for spoil in data.draw(st.lists(json_mutations.spoilers, min_size=1, max_size=2)):
        reply = spoil(reply)
    parse(parser, reply)


@given(json_mutations.values)
@example([{}] * 3)
@example([{"name": "blockdev-add", "arg-type": 10**400}])
def test_any_reply(reply: Any) -> None:
    for parser, _ in PARSERS.values():
        parse(parser, reply)


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"name": [value]}
    return value


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize(
    "reply",
    [
        None,
        7,
        [7],
        ["text"],
        [[]],
        {"nodes": 7, "edges": []},
        {"nodes": [7], "edges": []},
        {"nodes": [], "edges": [{"parent": 1, "child": 2}]},
        [{"id": 7}],
        [{"inserted": 7, "device": ""}],
        [{"device": 7}],
        [{"fdset-id": "0", "fds": []}],
        [{"fdset-id": 0, "fds": 7}],
        _nested(400),
        [_nested(400)],
        "x" * 100_000,
        ["\n"] * 1000,
    ],
    ids=range(17),
)
def test_replies_of_odd_shape(name: str, reply: Any) -> None:
    parse(PARSERS[name][0], reply)


# --- many of everything: no parser and no question takes time by the square -----------------------

MANY = 20_000


def _vertices(kind: str, names: Iterator[str], start: int) -> list[dict[str, object]]:
    return [{"id": id, "type": kind, "name": name} for id, name in enumerate(names, start)]


@pytest.mark.timeout(20)
def test_many_disks_and_a_graph_of_all() -> None:
    """One chain as long as the disks are many, a job on something else, all roots asked for."""
    disks = block.parse_block([{"device": f"d{n}"} for n in range(MANY)])
    assert len(disks) == MANY
    nodes = _vertices("block-driver", (f"n{n}" for n in range(MANY)), 0)
    chain = [{"parent": n, "child": n + 1, "name": "backing", "perm": []} for n in range(MANY - 1)]
    other = _vertices("block-job", iter(["j"]), MANY) + _vertices(
        "block-driver", iter(["other"]), MANY + 1
    )
    graph = block.parse_graph(
        {
            "nodes": nodes + other,
            "edges": [*chain, {"parent": MANY, "child": MANY + 1, "name": "file", "perm": []}],
        }
    )
    names = [naming.NodeName(f"n{n}") for n in range(MANY)]
    assert set(names) - graph.below(names) == {"n0"}
    assert [name for name in names if graph.is_unused(name)] == ["n0"]
    assert [name for name in names if graph.jobs_on(name)] == []
    assert graph.jobs_on(naming.NodeName("other")) == {"j"}
