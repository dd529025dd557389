# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's monitor by way of libvirt (virDomainQemuMonitorCommand): what ``monitor`` is to a socket.

libvirt has its own client on the monitor, passes on one command at a time, and marks the domain as
tainted with the first. Events stay with libvirt; whoever waits for one asks again instead.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

import libvirt
import libvirt_qemu

from virtbackup import errors, runtime
from virtbackup.qemu import monitor, monitor_json, qmp

_T = TypeVar("_T")

PATIENCE = 60.0
"""Seconds until a command must be answered: libvirt itself waits for as long as it takes."""
_JOIN = 2.0
"""Seconds for the thread that makes the calls to end."""
LOOK_AGAIN = 0.01
"""Seconds between two looks at what would have come as an event."""

_GONE = frozenset({libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN})
"""What libvirt says of a domain that is not running, or not there."""

_PASSES_FILES = 8_002_000
"""libvirt's first version with virDomainQemuMonitorCommandWithFiles."""

_REFUSED = frozenset(
    {
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
        libvirt.VIR_ERR_OPERATION_DENIED,
        libvirt.VIR_ERR_OPERATION_TIMEOUT,
    }
)
"""What libvirt says of a command that it did not pass on: its daemon takes no descriptors, as
virtbackupd; the connection is read-only; or another job of its own on the domain does not end."""


class NotRunning(monitor.NotListening):
    """The domain does not run, in libvirt's own words."""

    def __init__(self, failure: "libvirt.libvirtError", name: str) -> None:
        super().__init__(OSError(0, str(failure)), name)
        self.args = (str(failure),)
        self.err = failure.err


def not_running(path: str) -> NotRunning:
    """Of a domain that libvirt knows."""
    detail = "domain is not running"
    failure = errors.error(
        libvirt.VIR_ERR_OPERATION_INVALID, detail, domain=libvirt.VIR_FROM_DOMAIN
    )
    return NotRunning(failure, path)


class LibvirtMonitor:
    """A ``monitor.Monitor`` of a domain of libvirt's."""

    hears_events = False

    @functools.cached_property
    def passes_files(self) -> bool:
        """Whether libvirt hands descriptors to QEMU: its library, and its daemon, which may be
        older. Errors: libvirt's own."""
        if not hasattr(libvirt_qemu, "qemuMonitorCommandWithFiles"):
            return False
        return bool(self._domain.connect().getLibVersion() >= _PASSES_FILES)

    def __init__(self, domain: "libvirt.virDomain", trace: TextIO | None = None) -> None:
        """DOMAIN has been looked up just now. Errors: NotRunning when it does not run;
        monitor.MonitorLost."""
        self._domain = domain
        self.path = f"{domain.connect().getURI()} {domain.name()}"
        if domain.ID() < 0:
            # A command would fail likewise, and libvirt tell its error handler, which prints that:
            # of a domain that has ended there is something to tell all the same.
            raise not_running(self.path)
        self._lines = monitor.Lines(self.path, trace)
        self._negotiated = False
        self._calls = _Calls(f"libvirt {domain.name()}")
        try:
            self.greeting = self._ask_version()
            self._negotiated = True
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LibvirtMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._calls.close()

    def peer_pid(self) -> int | None:
        """QEMU's process; None where it cannot be seen."""
        return pid_of(self._domain)

    def peer_uid(self) -> int | None:
        """QEMU's user; None where its process cannot be seen, as from a container."""
        pid = self.peer_pid()
        return None if pid is None else runtime.process_user(pid)

    def execute(self, command: monitor_json.Command) -> Any:
        """As ``monitor.Monitor.execute``."""
        return self.execute_all([command])[0]

    def execute_all(self, commands: Sequence[monitor_json.Command]) -> list[Any]:
        """As ``monitor.Monitor.execute_all``."""
        return monitor.all_done(self.execute_each(commands))

    def execute_each(self, commands: Sequence[monitor_json.Command]) -> list[Any]:
        """As ``monitor.Monitor.execute_each``, one command after the other: libvirt has the domain
        to itself for each, and sent at once they take as long."""
        return [monitor_json.outcome(command, self._ask(command)) for command in commands]

    def wait_event(self, matches: Callable[[qmp.Event], bool], timeout: float) -> qmp.Event | None:
        """No event comes this way: a moment to wait before looking again."""
        time.sleep(min(timeout, LOOK_AGAIN))
        return None

    def _ask_version(self) -> qmp.Greeting:
        """What a socket's greeting would have told."""
        version = self.execute(monitor_json.query_version())
        greeting = qmp.decode(json.dumps({"QMP": {"version": version}}).encode())
        if isinstance(greeting, qmp.Greeting):
            return greeting
        raise qmp.ProtocolError(f"unexpected version: {qmp.shown(version)}")

    def _ask(self, command: monitor_json.Command) -> qmp.Success | qmp.Failure:
        line = json.dumps({"execute": command.execute, "arguments": dict(command.arguments)})
        self._lines.note("->", line)
        try:
            reply = self._calls.call(
                lambda: self._pass_on(line, command.fds), PATIENCE, self._is_in_vain
            )
        except TimeoutError as failure:
            patience = monitor.CONNECT_TIMEOUT if self._is_in_vain() else PATIENCE
            text = f"no reply to '{command.execute}' within {patience:g} seconds"
            if (why := monitor.why_stopped(self.peer_pid())) is not None:
                text = f"{text}: {why}"
            raise monitor.NoAnswer(text) from failure
        except libvirt.libvirtError as failure:
            raise self._lost(failure) from failure
        self._lines.note("<-", reply)
        message = qmp.decode(_with_id(reply))
        if isinstance(message, qmp.Success | qmp.Failure):
            return message
        raise qmp.ProtocolError(f"unexpected reply: {qmp.shown(reply)}")

    def _is_in_vain(self) -> bool:
        """Whether QEMU is not waited for any longer: one that was made to stand still and has not
        answered at all, as by a socket."""
        return not self._negotiated and monitor.why_stopped(self.peer_pid()) is not None

    def _pass_on(self, line: str, fds: Sequence[int]) -> str:
        if not fds:
            return str(libvirt_qemu.qemuMonitorCommand(self._domain, line, 0))
        reply, _ = libvirt_qemu.qemuMonitorCommandWithFiles(self._domain, line, list(fds), 0)
        return str(reply)

    def _lost(self, failure: "libvirt.libvirtError") -> errors.Error:
        text = failure.get_error_message() or str(failure)
        if failure.get_error_code() in _GONE and not self._runs():
            return NotRunning(failure, self.path)
        if failure.get_error_code() in _REFUSED:
            return errors.of_libvirt(failure)
        if failure.get_error_domain() == libvirt.VIR_FROM_RPC:
            text = f"the connection to libvirt was lost: {text}"
        return monitor.MonitorLost(text)

    def _runs(self) -> bool:
        try:
            return bool(self._domain.isActive())
        except libvirt.libvirtError:
            return False


_pids: dict[tuple[str, int], int] = {}
"""Where a run of a domain, by uuid and id, was found last."""


def pid_of(domain: "libvirt.virDomain") -> int | None:
    """The process of a running DOMAIN: by libvirt's own note, else by looking at all processes, as
    the note of a libvirtd in a mount namespace of its own is not to be seen. None where there is
    none, or more than one that it could be."""
    run = domain.UUIDString(), domain.ID()
    known = _pids.get(run)
    if known is not None and _is_of(known, *run):
        return known
    found = next((pid for pid in _noted(domain.name()) if _is_of(pid, *run)), None)
    if found is None:
        candidates = [pid for pid in _processes() if _is_of(pid, *run)]
        found = candidates[0] if len(candidates) == 1 else None
    if found is not None:
        _pids[run] = found
    return found


def _processes() -> list[int]:
    """All that there are; none where they cannot be listed, as where no descriptor is left."""
    with contextlib.suppress(OSError):
        return [int(path.name) for path in pathlib.Path("/proc").glob("[0-9]*")]
    return []


def _noted(name: str) -> Iterator[int]:
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    for place in ("/run/libvirt/qemu", f"{runtime}/libvirt/qemu/run"):
        with contextlib.suppress(OSError, ValueError):
            yield int(pathlib.Path(place, f"{name}.pid").read_text())


def _is_of(pid: int, uuid: str, id: int) -> bool:
    """Whether process PID is the QEMU of a domain, in its run of that ID: while a domain migrates
    within a host there are two of its uuid."""
    try:
        argv = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    if (b"-uuid", uuid.encode()) not in itertools.pairwise(argv):
        return False
    # libvirt's directory for what is of this run: its secret key is in there, of every QEMU.
    runs = {int(found) for found in re.findall(rb"/domain-(\d+)-", b" ".join(argv))}
    return not runs or id in runs


def _with_id(reply: str) -> bytes:
    """A reply as it comes from a socket: libvirt's id is a text of its own."""
    try:
        message = json.loads(reply)
    except (ValueError, RecursionError) as failure:
        raise qmp.ProtocolError(f"unexpected reply: {qmp.shown(reply)}") from failure
    if not isinstance(message, dict):
        raise qmp.ProtocolError(f"unexpected reply: {qmp.shown(reply)}")
    return json.dumps({**message, "id": 0}).encode()


def patiently(what: Callable[[], _T], patience: float | None = None) -> _T:
    """What WHAT, a call of libvirt's that may never return, returns or raises. PATIENCE None: the
    one that a command has. Errors: monitor.NoAnswer."""
    patience = PATIENCE if patience is None else patience
    calls = _Calls("libvirt")
    try:
        return calls.call(what, patience)
    except TimeoutError as failure:
        text = f"libvirt does not answer within {patience:g} seconds"
        raise monitor.NoAnswer(text) from failure
    finally:
        calls.close()


class _Calls:
    """A thread for calls that may never return, which is then left to itself. Where none can begin,
    as in what ``atexit`` calls on Python 3.12, they are made as any other."""

    def __init__(self, name: str) -> None:
        self._todo: queue.SimpleQueue[tuple[Callable[[], Any], _Answer] | None] = (
            queue.SimpleQueue()
        )
        self._stuck = False
        # Not of ours alone, so that the thread ends when nobody knows us any more: a signal's
        # exception may come before we can be closed (SIGINT).
        self._abandoned = weakref.finalize(self, self._todo.put, None)
        self._abandoned.atexit = False
        self._thread = threading.Thread(
            target=_carry_out, args=(self._todo,), name=name, daemon=True
        )
        self._begins = True
        try:
            self._thread.start()
        except RuntimeError:
            self._begins = False

    def call(
        self,
        what: Callable[[], _T],
        timeout: float,
        is_in_vain: Callable[[], bool] = lambda: False,
    ) -> _T:
        """What WHAT returns or raises. IS_IN_VAIN is asked, once that has taken as long as a socket
        may take to greet, whether to wait no longer. Errors: TimeoutError, from then on at once."""
        if self._stuck:
            raise TimeoutError
        if not self._begins:
            return what()
        answer = _Answer()
        self._todo.put((what, answer))
        soon = min(timeout, monitor.CONNECT_TIMEOUT)
        is_done = answer.done.wait(soon)
        if not is_done and (is_in_vain() or not answer.done.wait(timeout - soon)):
            self._stuck = True
            raise TimeoutError
        if answer.failure is not None:
            try:
                raise answer.failure
            finally:
                del answer  # or it, this frame and the error would hold each other
        value: _T = answer.value
        return value

    def close(self) -> None:
        self._todo.put(None)
        self._abandoned.detach()
        if self._begins and not self._stuck:
            # Who waited for a call may have been interrupted.
            self._thread.join(_JOIN)


def _carry_out(calls: "queue.SimpleQueue[tuple[Callable[[], Any], _Answer] | None]") -> None:
    while (todo := calls.get()) is not None:
        what, answer = todo
        try:
            answer.value = what()
        except BaseException as failure:  # noqa: BLE001  (raised again, by call)
            answer.failure = failure
        answer.done.set()
        del todo, what, answer  # what it was is not kept until the next


class _Answer:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: Any = None
        self.failure: BaseException | None = None
