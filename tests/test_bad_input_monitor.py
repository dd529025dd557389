# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver before a hostile monitor, end to end: every answer of every conversation spoilt.

Whatever the monitor says or does not say, a call ends in time, in its result or in an error of
libvirt's kind, and nothing is left behind where scratch images are made.
"""

import contextlib
import io
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import virtbackup
from tests import conftest, hostile_monitor, json_mutations, record_conversations
from virtbackup.qemu import monitor, monitor_json, qmp, sweep

PATIENCE = 0.05
"""Seconds that the driver waits here where it waits for a minute otherwise."""
DEADLINE = 50.0
"""Seconds that a call may take, on a machine that does other things too: fewer than it would wait
for one reply otherwise."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module", autouse=True)
def impatient(directory: pathlib.Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONNECT_TIMEOUT", "REPLY_TIMEOUT"):
            patch.setattr(monitor, name, PATIENCE)
        patch.setattr(monitor, "SESSION_TIMEOUT", 1.0)
        patch.setattr(sweep, "TIMEOUT", PATIENCE)
        patch.setenv("VIRTBACKUP_STATE_DIR", str(directory / "state"))
        (directory / "scratch").mkdir()
        patch.setenv("VIRTBACKUP_SCRATCH_DIR", str(directory / "scratch"))
        yield


@pytest.fixture(scope="module")
def hostile(directory: pathlib.Path, impatient: None) -> Iterator[hostile_monitor.HostileMonitor]:
    with hostile_monitor.HostileMonitor(directory) as served:
        yield served


USUAL = {
    name: getattr(monitor, name) for name in ("CONNECT_TIMEOUT", "REPLY_TIMEOUT", "SESSION_TIMEOUT")
}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what must not come to waiting, however busy the machine is."""
    _be_patient(monkeypatch)


def _be_patient(patch: pytest.MonkeyPatch) -> None:
    for name, seconds in USUAL.items():
        patch.setattr(monitor, name, seconds)


# --- the calls ------------------------------------------------------------------------------------


def _document(hostile: hostile_monitor.HostileMonitor) -> str:
    path = hostile.path.parent / "nbd.sock"
    return f'<domainbackup><address type="unix" path="{path}"/></domainbackup>'


CALLS = record_conversations.CALLS
NEED_BACKUP = {
    "backup-info": "backup-start",
    "backup-stop": "backup-start",
    "branch-stop": "branch-start",
}
"""Call -> the start of the backup that it is about."""


def call(hostile: hostile_monitor.HostileMonitor, name: str) -> object:
    with virtbackup.open(hostile.uri) as connection:
        return CALLS[name](connection.lookupByName("vm"), _document(hostile))


def prepare(hostile: hostile_monitor.HostileMonitor, name: str) -> None:
    """A backup runs, or none does, as the call NAME has it."""
    state = hostile.path.parent / "state"
    for path in state.glob("*.json") if state.is_dir() else ():
        path.unlink()
    if name in NEED_BACKUP:
        hostile.play(NEED_BACKUP[name])
        with pytest.MonkeyPatch.context() as patch:
            _be_patient(patch)
            call(hostile, NEED_BACKUP[name])


def outcome(hostile: hostile_monitor.HostileMonitor, name: str) -> str | None:
    """What the call NAME fails with; None when it does not. It has to end in time."""
    began = time.monotonic()
    try:
        call(hostile, name)
    except libvirt.libvirtError as failure:
        assert str(failure)
        return str(failure)
    finally:
        assert time.monotonic() - began < DEADLINE
        assert list((hostile.path.parent / "scratch").iterdir()) == []
    return None


def turns(name: str) -> int:
    """How often QEMU speaks in the conversation NAME."""
    said = (message for direction, message in hostile_monitor.messages(name) if direction == "<-")
    return sum("event" not in message for message in said)


def test_every_call_was_recorded() -> None:
    assert set(CALLS) == set(hostile_monitor.CONVERSATIONS)


@pytest.mark.parametrize("name", CALLS)
def test_unspoilt(hostile: hostile_monitor.HostileMonitor, patient: None, name: str) -> None:
    """What is spoilt below is good before."""
    prepare(hostile, name)
    hostile.play(name)
    assert outcome(hostile, name) is None
    assert hostile.turns >= turns(name) - 2


# --- one turn is spoilt ---------------------------------------------------------------------------


def _with_value(value: object) -> hostile_monitor.Spoiler:
    def spoil(turn: hostile_monitor.Turn) -> None:
        key = "return" if turn.command else "QMP"
        turn.send(hostile_monitor.encode({**turn.message, key: value}))

    return spoil


def _silence(turn: hostile_monitor.Turn) -> None:
    while turn.client.recv(1 << 16):
        pass


def _half_a_line(turn: hostile_monitor.Turn) -> None:
    line = hostile_monitor.encode(turn.message)
    turn.send(line[: len(line) // 2])
    turn.hang_up()


def _half_a_line_and_silence(turn: hostile_monitor.Turn) -> None:
    turn.send(hostile_monitor.encode(turn.message)[:-3])
    _silence(turn)


def _another_half(turn: hostile_monitor.Turn) -> None:
    """The line, cut, and the whole of it after that."""
    line = hostile_monitor.encode(turn.message)
    turn.send(line[: len(line) // 2], line)


def _answered_twice(turn: hostile_monitor.Turn) -> None:
    turn.answer()
    turn.send(hostile_monitor.encode({"return": ["other"], "id": turn.id}))


def _another_id(by: int) -> hostile_monitor.Spoiler:
    def spoil(turn: hostile_monitor.Turn) -> None:
        turn.send(hostile_monitor.encode({**turn.message, "id": turn.id + by}))

    return spoil


def _answer_to_nothing(turn: hostile_monitor.Turn) -> None:
    for id in (0, -1, 1 << 70):
        turn.send(hostile_monitor.encode({"return": {"not": "asked"}, "id": id}))
    turn.answer()


def _greeting_again(turn: hostile_monitor.Turn) -> None:
    greeting = {"version": {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}}
    turn.send(hostile_monitor.encode({"QMP": {**greeting, "capabilities": []}}))
    turn.answer()


def _error(turn: hostile_monitor.Turn) -> None:
    error = {"class": "GenericError", "desc": "no\x1b[2J\nway" * 1000}
    turn.send(hostile_monitor.encode({"error": error, "id": turn.id}))


def _error_of_nobody(turn: hostile_monitor.Turn) -> None:
    turn.send(b'{"error": {"class": "GenericError", "desc": "what?"}}\r\n')


def _events_first(turn: hostile_monitor.Turn) -> None:
    turn.send(hostile_monitor.EVENT * 200)
    turn.answer()


def _events_for_ever(turn: hostile_monitor.Turn) -> None:
    """Valid, and never an answer: no reason to wait any longer than for silence."""
    while True:
        turn.send(hostile_monitor.EVENT * 10)


def _blank_lines_for_ever(turn: hostile_monitor.Turn) -> None:
    while True:
        turn.send(b"\r\n" * 1000)


WRONG: list[object] = [
    None,
    True,
    7,
    -1,
    1.5,
    "text",
    [],
    [None],
    [[]],
    [{}],
    {},
    {"name": []},
    [{"id": 1}],
]

SPOILERS: dict[str, hostile_monitor.Spoiler] = {
    **{f"value {json.dumps(value)}": _with_value(value) for value in WRONG},
    "hang up": hostile_monitor.Turn.hang_up,
    "silence": _silence,
    "half a line": _half_a_line,
    "half a line and silence": _half_a_line_and_silence,
    "another half": _another_half,
    "answered twice": _answered_twice,
    "id of a later command": _another_id(1),
    "id of an earlier command": _another_id(-1),
    "answer to nothing": _answer_to_nothing,
    "greeting again": _greeting_again,
    "error": _error,
    "error of nobody": _error_of_nobody,
    "events first": _events_first,
    "events for ever": _events_for_ever,
    "blank lines for ever": _blank_lines_for_ever,
}

SLOW = ("silence", "half a line and silence", "id of a later command", "id of an earlier command",
        "error of nobody", "events for ever", "blank lines for ever")  # fmt: skip
"""These cost the driver its patience."""

LOST = (*SLOW, "hang up", "half a line", "another half")
"""After these nobody knows what a command did: the call cannot be good."""

HARMLESS = ("answered twice", "answer to nothing", "events first")

EVERY = 1 if conftest.long() else 24
"""One of so many turns is spoilt, another one with each spoiler, so that each turn is by some."""


def _spoil_turns(hostile: hostile_monitor.HostileMonitor, name: str, spoiler: str) -> None:
    first = list(SPOILERS).index(spoiler) % EVERY
    for turn in range(first, turns(name), EVERY):
        prepare(hostile, name)
        hostile.play(name, turn, SPOILERS[spoiler])
        failure = outcome(hostile, name)
        if spoiler in LOST and hostile.spoilt:
            assert failure is not None, (turn, hostile.spoilt)
        if spoiler in HARMLESS and hostile.spoilt:
            assert failure is None, (turn, hostile.spoilt)


@pytest.mark.parametrize("spoiler", SLOW)
@pytest.mark.parametrize("name", CALLS)
def test_each_turn_without_its_answer(
    hostile: hostile_monitor.HostileMonitor, name: str, spoiler: str
) -> None:
    _spoil_turns(hostile, name, spoiler)


@pytest.mark.parametrize("spoiler", [name for name in SPOILERS if name not in SLOW])
@pytest.mark.parametrize("name", CALLS)
def test_each_turn_spoilt(
    hostile: hostile_monitor.HostileMonitor, patient: None, name: str, spoiler: str
) -> None:
    """Nothing of this is waited for."""
    _spoil_turns(hostile, name, spoiler)


@given(
    st.sampled_from([(name, turn) for name in CALLS for turn in range(turns(name))]),
    json_mutations.spoilers,
)
def test_any_part_of_any_answer_spoilt(
    hostile: hostile_monitor.HostileMonitor, at: tuple[str, int], spoil: json_mutations.Spoil
) -> None:
    def spoilt(turn: hostile_monitor.Turn) -> None:
        turn.send(*map(hostile_monitor.encode, [*turn.events, spoil(turn.message)]))

    prepare(hostile, at[0])
    hostile.play(*at, spoilt)
    outcome(hostile, at[0])


# --- QEMU ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hangs_up", [1, 2, 4])
@pytest.mark.parametrize("first", range(2, 36, 6))
def test_a_stop_meets_a_qemu_that_is_being_killed(
    tmp_path: pathlib.Path,
    patient: None,
    monkeypatch: pytest.MonkeyPatch,
    first: int,
    hangs_up: int,
) -> None:
    """It speaks no more in the middle, takes clients for a moment yet, and then is gone: the first
    stop says so."""
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path / "state"))
    left = hangs_up

    def die(turn: hostile_monitor.Turn) -> None:
        nonlocal left
        if turn.number < first:
            turn.answer()
            return
        left -= 1
        if left <= 0:
            dying.path.unlink(missing_ok=True)
        turn.hang_up()

    with hostile_monitor.HostileMonitor(tmp_path) as dying:
        prepare(dying, "backup-stop")
        with virtbackup.open(dying.uri) as connection:
            dom = connection.lookupByName("vm")
            dying.play("backup-stop", spoil=die)
            with pytest.raises(virtbackup.Error, match="is not good: disk 'vda': QEMU is gone"):
                dom.backupStop()
    assert not list((tmp_path / "state").glob("*.json"))


# --- all that is said is spoilt -------------------------------------------------------------------


def test_byte_by_byte(hostile: hostile_monitor.HostileMonitor, patient: None) -> None:
    def dribble(turn: hostile_monitor.Turn) -> None:
        line = hostile_monitor.encode(turn.message)
        turn.send(*(line[i : i + 1] for i in range(len(line))))

    prepare(hostile, "domblklist")
    hostile.play("domblklist", spoil=dribble)
    assert outcome(hostile, "domblklist") is None


def test_answers_out_of_order(hostile: hostile_monitor.HostileMonitor, patient: None) -> None:
    """Those to commands that were sent together, the last one first."""
    held: list[bytes] = []

    def reverse(turn: hostile_monitor.Turn) -> None:
        batch = ("query-jobs", "query-block-exports", "x-debug-query-block-graph", "query-block")
        if turn.command in batch:
            held.insert(0, hostile_monitor.encode(turn.message))
        elif turn.command == "query-status" and held:
            turn.send(hostile_monitor.encode(turn.message), *held)
            held.clear()
        else:
            turn.answer()

    prepare(hostile, "domblklist")
    hostile.play("domblklist", spoil=reverse)
    assert outcome(hostile, "domblklist") is None


def test_a_session_is_bounded_however_many_answers_are_slow(
    hostile: hostile_monitor.HostileMonitor, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer comes in its time, and there is no end of them: exports that never go."""
    monkeypatch.setattr(monitor, "SESSION_TIMEOUT", 0.3)
    monkeypatch.setattr(sweep, "TIMEOUT", 60.0)
    never_gone = {"return": [{"id": "virtbackup-00000000-0", "type": "nbd", "node-name": "n",
                              "shutting-down": False}]}  # fmt: skip

    def spoil(turn: hostile_monitor.Turn) -> None:
        if turn.command == "query-block-exports":
            turn.send(hostile_monitor.encode({**never_gone, "id": turn.id}))
        elif turn.command == "block-export-del":
            turn.send(hostile_monitor.encode({"return": {}, "id": turn.id}))
        else:
            turn.answer()

    prepare(hostile, "backup-cleanup")
    hostile.play("backup-cleanup", spoil=spoil)
    failure = outcome(hostile, "backup-cleanup")
    assert failure is not None
    assert "more than 0.3 seconds in all" in failure


# --- the client alone -----------------------------------------------------------------------------


@contextlib.contextmanager
def connected(
    hostile: hostile_monitor.HostileMonitor, spoil: hostile_monitor.Spoiler
) -> Iterator[monitor.Monitor]:
    """A client whose first command after the handshake SPOIL answers."""
    hostile.play("list", 2, spoil)
    with monitor.SocketMonitor(str(hostile.path)) as qemu:
        yield qemu


def test_events_are_bounded_in_bytes(
    hostile: hostile_monitor.HostileMonitor, patient: None
) -> None:
    size, count = 1 << 20, 40

    def flood(turn: hostile_monitor.Turn) -> None:
        for number in range(count):
            event = {"timestamp": {"seconds": 1, "microseconds": 0}, "event": "E"}
            data = {"number": number, "text": "x" * size}
            turn.send(hostile_monitor.encode({**event, "data": data}))
        turn.answer()

    kept = []
    with connected(hostile, flood) as qemu:
        qemu.execute(monitor_json.query_commands())
        while (event := qemu.wait_event(lambda event: True, 0)) is not None:
            kept.append(event.data["number"])
    assert kept == list(range(count - monitor.MAX_EVENTS_WEIGHT // size + 1, count))


def test_an_event_too_large_to_keep_is_in_nobodys_way(
    hostile: hostile_monitor.HostileMonitor, patient: None
) -> None:
    def flood(turn: hostile_monitor.Turn) -> None:
        half = qmp.MAX_LINE // 12
        for data in ({"wide": "\u0101" * half}, {}):
            event = {"timestamp": {"seconds": 1, "microseconds": 0}, "event": "E"}
            turn.send(hostile_monitor.encode({**event, "data": data}))
        turn.answer()

    with connected(hostile, flood) as qemu:
        qemu.execute(monitor_json.query_commands())
        assert qemu.wait_event(lambda event: "wide" in event.data, 0) is None
        assert qemu.wait_event(lambda event: not event.data, 0) is not None


def test_answers_of_a_batch_are_bounded_together(
    hostile: hostile_monitor.HostileMonitor, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "MAX_WEIGHT", 100_000)

    ids: list[int] = []

    def large(turn: hostile_monitor.Turn) -> None:
        if turn.command != "query-jobs":
            turn.answer()
            return
        ids.append(turn.id)
        # The first is waited for, so it comes last: until then the others are kept.
        for id in reversed(ids) if len(ids) == 3 else ():
            turn.send(hostile_monitor.encode({"return": "x" * 40_000, "id": id}))

    hostile.play("list", spoil=large)
    with (
        monitor.SocketMonitor(str(hostile.path)) as qemu,
        pytest.raises(monitor.MonitorLost, match="too large together"),
    ):
        qemu.execute_all([monitor_json.query_jobs()] * 3)


@pytest.mark.parametrize("bites", [0, 1])
def test_a_command_that_is_not_taken(hostile: hostile_monitor.HostileMonitor, bites: int) -> None:
    """Not at all, or a little at a time: that is no reason to wait any longer."""
    ended = threading.Event()

    def sip(turn: hostile_monitor.Turn) -> None:
        while not ended.wait(PATIENCE / 10):
            turn.client.recv(bites * 100)

    large = monitor_json.Command("x", {"y": "z" * (4 << 20)})
    with connected(hostile, sip) as qemu:
        began = time.monotonic()
        with pytest.raises(virtbackup.Error, match="'x' was not taken within") as caught:
            qemu.execute_all([monitor_json.query_commands(), large])
        ended.set()
        assert time.monotonic() - began < DEADLINE
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
        with pytest.raises(monitor.MonitorLost):
            qemu.execute(monitor_json.query_jobs())


def test_the_first_of_two_answers_counts(
    hostile: hostile_monitor.HostileMonitor, patient: None
) -> None:
    first: list[int] = []

    def twice(turn: hostile_monitor.Turn) -> None:
        if turn.command == "query-commands":
            first.append(turn.id)
        elif turn.command == "query-jobs":
            for id, value in ((turn.id, "first"), (turn.id, "second"), (*first, "last")):
                turn.send(hostile_monitor.encode({"return": value, "id": id}))
        else:
            turn.answer()

    hostile.play("list", spoil=twice)
    with monitor.SocketMonitor(str(hostile.path)) as qemu:
        commands = [monitor_json.query_commands(), monitor_json.query_jobs()]
        assert qemu.execute_all(commands) == ["last", "first"]


def test_a_second_greeting_ends_the_connection(
    hostile: hostile_monitor.HostileMonitor, patient: None
) -> None:
    with (
        connected(hostile, _greeting_again) as qemu,
        pytest.raises(monitor.MonitorLost, match="greeted twice"),
    ):
        qemu.execute(monitor_json.query_commands())


def _closed() -> TextIO:
    trace = io.StringIO()
    trace.close()
    return trace


@pytest.mark.parametrize(
    "trace",
    [_closed, lambda: open("/dev/full", "w", encoding="ascii")],  # noqa: PTH123, SIM115
)
def test_a_trace_that_cannot_be_written_is_not_the_callers_trouble(
    hostile: hostile_monitor.HostileMonitor, patient: None, trace: Callable[[], TextIO]
) -> None:
    prepare(hostile, "list")
    hostile.play("list")
    opened = trace()
    with virtbackup.open(hostile.uri) as connection:
        connection.setTrace(opened)
        assert [domain.name() for domain in connection.listAllDomains()] == ["vm"]
    with contextlib.suppress(OSError):
        opened.close()  # tries to write it once more


def test_a_disk_larger_than_any_image_can_be(
    hostile: hostile_monitor.HostileMonitor, patient: None
) -> None:
    def large(turn: hostile_monitor.Turn) -> None:
        if turn.command == "query-block":
            turn.message["return"][0]["inserted"]["image"]["virtual-size"] = 1 << 62
        turn.answer()

    prepare(hostile, "backup-start")
    hostile.play("backup-start", spoil=large)
    failure = outcome(hostile, "backup-start")
    assert failure is not None
    assert "larger than a scratch image can be" in failure
