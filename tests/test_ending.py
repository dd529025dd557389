# SPDX-License-Identifier: LGPL-2.1-or-later
"""That the end of a backup is told once, whatever is seen of it."""

import dataclasses
import os
import pathlib
import queue
import resource
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests import waiting
from virtbackup import hypervisor, runtime
from virtbackup.qemu import driver, ending, events, libvirt_events, lifecycle, naming, status

PATIENCE = waiting.DEADLINE
FIRST, SECOND = naming.BackupId("00000001"), naming.BackupId("00000002")

RUNNING = status.Status(
    id=FIRST, phase="running", name="vm", uuid="u",
    definition="<domainbackup><address type='unix' path='/s'/></domainbackup>", engine="classic",
    started=1.0, server=True, socket=None, qemu=None, owner=None, given_up=None, was_stopped=False,
    cancelled=False, advanced=False, verdict=None, told=False, save_failure=None,
    save_reason=None, branch=None, advances=None, disks=(),
)  # fmt: skip


def having(**changes: Any) -> status.Status:
    return dataclasses.replace(RUNNING, **changes)


class Ends:
    """Keeps the ends that it is told."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[tuple[bool, str | None]] = queue.SimpleQueue()

    def __call__(self, good: bool, reason: str | None) -> None:
        self._told.put((good, reason))

    def next(self) -> tuple[bool, str | None]:
        return self._told.get(timeout=PATIENCE)

    def is_silent(self) -> bool:
        try:
            self._told.get(timeout=3 * ending.LOOK)
        except queue.Empty:
            return True
        return False


@pytest.fixture
def file(tmp_path: pathlib.Path) -> status.StatusFile:
    return status.StatusFile("key", tmp_path)


@pytest.fixture
def dead() -> runtime.Process:
    """A process that was there."""
    with subprocess.Popen(["sleep", "60"]) as process:
        start = runtime.process_start(process.pid)
        assert start is not None
        process.kill()
    return runtime.Process(process.pid, start)


@pytest.fixture
def one(file: status.StatusFile) -> Iterator[tuple[ending.Ending, Ends]]:
    """An ending, and who is told."""
    found, ends = ending.Ending(file, lambda: None), Ends()
    yield found, ends
    found.listen(None)


ELSEWHERE = "the backup was stopped by another process, which was told whether it was good"
LATER: list[tuple[status.Status | None, tuple[bool, str | None]]] = [
    (None, (False, ELSEWHERE)),
    (having(id=SECOND), (False, ELSEWHERE)),
    (having(given_up="no room"), (False, "no room")),
    (having(phase="stopping", told=True, verdict={"vda": "bad"}),
     (False, "the backup is not good: disk 'vda': bad")),
]  # fmt: skip


@pytest.mark.parametrize(("later", "expected"), LATER)
def test_ends_that_are_seen(
    later: status.Status | None,
    expected: tuple[bool, str | None],
    one: tuple[ending.Ending, Ends],
    file: status.StatusFile,
) -> None:
    found, ends = one
    file.save(RUNNING)
    found.listen(ends)
    if later is None:
        file.remove()
    else:
        file.save(later)
    assert ends.next() == expected
    with found.stopping() as tell:
        tell(FIRST, True, None)
    assert (later is not None and later.id == SECOND) or ends.is_silent()


STOPPING = [
    ({"verdict": {}}, (True, None)),
    ({"verdict": {"vda": "a", "vdb": "b"}},
     (False, "the backup is not good: disk 'vda': a; disk 'vdb': b")),
    ({"verdict": {}, "cancelled": True}, (False, ending.CANCELLED)),
    ({"verdict": {}, "branch": "b", "advances": "b"}, (False, ELSEWHERE)),
    ({"verdict": {}, "branch": "b", "advances": "b", "advanced": True}, (True, None)),
    ({}, (False, ELSEWHERE)),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), STOPPING)
def test_a_stop_elsewhere_as_far_as_it_is_seen(
    changes: dict[str, Any], expected: tuple[bool, str | None]
) -> None:
    following = ending._Following(FIRST)
    assert following.look(RUNNING, lambda: None) is None
    assert following.pause == ending.LOOK
    assert following.look(having(phase="stopping", **changes), lambda: None) is None
    assert following.pause == ending.LOOK_AT_STOP
    assert following.look(None, lambda: None) == expected


def test_the_end_of_qemu(dead: runtime.Process) -> None:
    gone = having(qemu=dead)
    assert ending._Following(FIRST).look(gone, lambda: "it crashed") == (False, "it crashed")
    following = ending._Following(FIRST)
    assert following.look(gone, lambda: None) is None
    following._gone_since = -ending.GRACE
    assert following.look(gone, lambda: None) == (False, "QEMU is gone")


def test_the_end_of_a_qemu_that_was_gone_already(
    dead: runtime.Process, file: status.StatusFile, tmp_path: pathlib.Path
) -> None:
    """Whoever connects then knows its domain by the status alone."""
    file.save(having(qemu=dead))
    told: queue.SimpleQueue[hypervisor.Event] = queue.SimpleQueue()
    opened = driver.QmpDriver(str(tmp_path / "gone.sock"), file=file)
    opened.event_register(told.put)
    ref = hypervisor.DomainRef("vm", "u", None)
    assert told.get(timeout=PATIENCE) == hypervisor.BackupEnded(ref, False, "QEMU is gone")
    opened.close()


def test_the_end_of_a_domain_that_is_known_no_more(dead: runtime.Process) -> None:
    """Who heard why has a moment to note it."""
    gone = having(qemu=dead)
    heard = having(qemu=dead, given_up="the domain was destroyed")
    following = ending._Following(FIRST)
    assert following.look(gone, lambda: lifecycle.UNKNOWN) is None
    assert following.look(heard, lambda: lifecycle.UNKNOWN) == (False, "the domain was destroyed")
    following._gone_since = -ending.GRACE
    assert following.look(gone, lambda: lifecycle.UNKNOWN) == (False, lifecycle.UNKNOWN)


def test_who_stops_tells(one: tuple[ending.Ending, Ends], file: status.StatusFile) -> None:
    """Although the file is gone, and that seen, before it does."""
    found, ends = one
    file.save(RUNNING)
    found.listen(ends)
    with found.stopping() as tell:
        file.remove()
        assert ends.is_silent()
        tell(FIRST, True, None)
        tell(FIRST, False, "once")
    assert ends.next() == (True, None)
    assert ends.is_silent()


def test_a_stop_that_fails_goes_on_to_be_looked_at(
    one: tuple[ending.Ending, Ends], file: status.StatusFile
) -> None:
    found, ends = one
    file.save(RUNNING)
    found.listen(ends)
    with found.stopping():
        pass
    assert ends.is_silent()
    file.save(having(given_up="no room"))
    assert ends.next() == (False, "no room")


@pytest.mark.parametrize("fails", [False, True])
def test_another_backup_begins_before_a_stop_comes_to_tell(
    fails: bool, one: tuple[ending.Ending, Ends], file: status.StatusFile
) -> None:
    """Whoever waits to start one does not wait for that; each end is told all the same."""
    found, ends = one
    file.save(RUNNING)
    found.listen(ends)
    with found.stopping() as tell, found.stopping():
        file.save(having(id=SECOND))
        found.find()
        assert ends.is_silent()
        if not fails:
            tell(FIRST, True, None)
    assert ends.next() == ((False, ELSEWHERE) if fails else (True, None))
    assert ends.is_silent()
    with found.stopping() as tell:
        tell(SECOND, True, None)
    assert ends.next() == (True, None)
    file.remove()
    assert ends.is_silent()


@pytest.mark.parametrize("found_by_then", [False, True])
def test_a_stop_waits_for_the_start_of_what_it_stops(
    found_by_then: bool, one: tuple[ending.Ending, Ends], file: status.StatusFile
) -> None:
    """That of another thread, which has it found when it is being stopped, or has been."""
    found, ends = one
    found.listen(ends)
    with found.stopping() as tell:
        file.save(RUNNING)
        if found_by_then:
            found.find()
        file.remove()
        assert ends.is_silent()
        tell(FIRST, True, None)
    found.find()
    assert ends.next() == (True, None)
    assert ends.is_silent()


def test_what_has_ended_or_does_not_run_yet_is_not_told(
    one: tuple[ending.Ending, Ends], file: status.StatusFile
) -> None:
    found, ends = one
    for state in (having(phase="starting"), having(given_up="no room")):
        file.save(state)
        found.listen(ends)
        if state.given_up is not None:
            with found.stopping() as tell:
                tell(FIRST, False, "no room")
        file.remove()
        assert ends.is_silent()


def test_the_end_of_a_process_is_told_by_a_thread(dead: runtime.Process) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    watching = events.ProcessEnd(lambda: told.put("ended"))
    for nobody in (None, dead, runtime.this_process(), runtime.Process(os.getppid(), 1)):
        watching.watch(nobody)
        assert not [t for t in threading.enumerate() if t.name == "virtbackup-process-end"]
    with subprocess.Popen(["sleep", "60"]) as one, subprocess.Popen(["sleep", "60"]) as other:
        for process in (one, other, other):
            start = runtime.process_start(process.pid)
            assert start is not None
            watching.watch(runtime.Process(process.pid, start))
        one.kill()
        one.wait()
        assert told.empty()
        other.kill()
        assert told.get(timeout=PATIENCE) == "ended"
    assert told.empty()


def test_a_signal_s_handler_closes_as_a_process_comes_to_be_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is left of what it was in the middle of."""
    alive = runtime.is_alive
    watching = events.ProcessEnd(lambda: None)

    def interrupted(process: runtime.Process) -> bool:
        callbacks.close()
        return alive(process)

    with subprocess.Popen(["sleep", "60"]) as one:
        start = runtime.process_start(one.pid)
        assert start is not None
        process = runtime.Process(one.pid, start)
        callbacks = events.Events(lambda: watching.watch(process), lambda: watching.watch(None))
        monkeypatch.setattr(runtime, "is_alive", interrupted)
        callbacks.register(lambda event: None)
        waiting.until(
            lambda: "virtbackup-process-end" not in [t.name for t in threading.enumerate()]
        )
        one.kill()


@pytest.mark.parametrize("spare", [0, 1])
def test_the_end_of_a_process_is_not_seen_where_no_more_files_may_be_open(
    spare: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Which fails nothing, and loses no descriptor."""
    watching = events.ProcessEnd(lambda: None)
    with subprocess.Popen(["sleep", "60"]) as one:
        start = runtime.process_start(one.pid)
        assert start is not None
        free = os.pipe()
        for number in free:
            os.close(number)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], limits[1]))
        try:
            watching.watch(runtime.Process(one.pid, start))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        one.kill()
    assert "its end will not be seen: [Errno 24] Too many open files" in caplog.text
    with open(os.devnull) as lowest:  # noqa: PTH123
        assert lowest.fileno() == free[0]


def test_callbacks_come_and_go() -> None:
    happened: list[str] = []
    registry = events.Events(lambda: happened.append("begin"), lambda: happened.append("end"))
    assert not registry
    ends = [registry.register(lambda event: None) for _ in range(2)]
    assert registry
    for end in (*ends, *ends):
        end()
    assert happened == ["begin", "end"]
    registry.register(lambda event: None)
    registry.close()
    registry.close()
    assert happened == ["begin", "end"] * 2

    def fail() -> None:
        raise ValueError("nothing to begin")

    failing = events.Events(fail, lambda: happened.append("end"))
    with pytest.raises(ValueError, match="nothing"):
        failing.register(lambda event: None)
    assert not failing


def test_callbacks_end_as_they_come() -> None:
    """As by a signal's handler, which closes the driver."""
    happened: list[str] = []
    registry = events.Events(lambda: registry.close(), lambda: happened.append("end"))
    registering = threading.Thread(target=lambda: registry.register(print), daemon=True)
    registering.start()
    registering.join(PATIENCE)
    assert not registering.is_alive()
    assert happened == ["end"] * 2  # the second of what was begun after the first
    assert not registry


def test_libvirts_events_end_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, while libvirt is asked for them."""
    monkeypatch.setattr(lifecycle, "has_event_loop", lambda: True)
    told = libvirt_events.Lifecycle(print, lambda: None)

    class Connection:
        def domainEventRegisterAny(self, *_: object) -> int:
            told.detach()
            return 1

    attaching = threading.Thread(target=lambda: told.attach(Connection(), False), daemon=True)
    attaching.start()
    attaching.join(PATIENCE)
    assert not attaching.is_alive()
