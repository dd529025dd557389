# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QMP client: a unix socket, a reader thread, blocking calls (qemu_monitor.c)."""

import array
import collections
import contextlib
import datetime
import errno
import logging
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, TextIO

import libvirt

from virtbackup import errors, runtime
from virtbackup.qemu import monitor_json, qmp

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
"""Seconds until a monitor must have greeted; it does not while it serves another client."""
REPLY_TIMEOUT = 60.0
"""Seconds until a command must be answered."""
SESSION_TIMEOUT = 900.0
"""Seconds that one connection may wait for replies in all, however many they are."""
_JOIN = 2.0
"""Seconds for the reader to end, once there is nothing to read."""
MAX_EVENTS = 10_000
"""Events kept for whoever waits; the oldest go first."""
MAX_EVENTS_WEIGHT = 16 << 20
"""What the kept events may weigh together (``qmp.weight``)."""


class MonitorLost(errors.Error):
    """The monitor is gone or no longer speaks QMP: whether a command took effect is unknown."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            libvirt.VIR_ERR_INTERNAL_ERROR,
            f"internal error: {detail}",
            strings=("internal error: %s", detail, None),
        )


class NoAnswer(errors.Error):
    """QEMU speaks to us and does not answer in time: it stands still, or is very slow."""

    def __init__(self, detail: str) -> None:
        text = f"Timed out during operation: {detail}"
        super().__init__(
            libvirt.VIR_ERR_OPERATION_TIMEOUT,
            text,
            strings=("Timed out during operation: %s", detail, None),
        )


class NotListening(errors.Error):
    """There is no monitor: no socket, or nobody behind it. QEMU is not running (any more)."""

    def __init__(self, failure: OSError, path: str) -> None:
        described = errors.system_error(failure, f"failed to connect to monitor socket '{path}'")
        super().__init__(
            libvirt.VIR_ERR_SYSTEM_ERROR,
            str(described),
            strings=("%s", str(described), None),
            ints=(failure.errno or 0, -1),
        )


class Monitor(Protocol):
    """A way to speak to one QEMU, for the length of one call."""

    path: str
    """What tells it from others."""
    greeting: qmp.Greeting

    @property
    def passes_files(self) -> bool:
        """Whether commands may pass descriptors."""

    @property
    def hears_events(self) -> bool:
        """Whether QEMU's events come this way."""

    def close(self) -> None: ...

    def peer_pid(self) -> int | None:
        """QEMU's process, or None where it cannot be seen from here."""

    def peer_uid(self) -> int | None:
        """QEMU's user; None where it is not known."""

    def execute(self, command: monitor_json.Command) -> Any:
        """Send COMMAND, wait, and give QEMU's ``return``; see execute_all."""

    def execute_all(self, commands: Sequence[monitor_json.Command]) -> list[Any]:
        """Have all COMMANDS carried out in this order, each whether or not those before it failed,
        and give every ``return``. At most one of them may pass descriptors.

        Errors: the first CommandFailed, with QEMU's words; MonitorLost; NoAnswer; NotListening.
        """

    def execute_each(self, commands: Sequence[monitor_json.Command]) -> list[Any]:
        """As ``execute_all``, but that QEMU refused a command stands in place of its ``return``, as
        a CommandFailed."""

    def wait_event(self, matches: Callable[[qmp.Event], bool], timeout: float) -> qmp.Event | None:
        """The first event not taken yet that MATCHES, waiting at most TIMEOUT seconds for it."""


def why_stopped(pid: int | None) -> str | None:
    """Where QEMU, process PID, was made to stand still, by whom; None where it was not, or is not
    seen."""
    if pid is None or not runtime.is_stopped(pid):
        return None
    return f"its process {pid} is stopped, by a signal (SIGSTOP) or a debugger"


class Lines:
    """The lines that go over one monitor, for the log and for whoever traces them."""

    def __init__(self, path: str, trace: TextIO | None) -> None:
        self._path = path
        self._trace = trace

    def note(self, direction: str, line: bytes | str) -> None:
        """One was sent (``->``) or has come (``<-``)."""
        logs = logger.isEnabledFor(logging.DEBUG)
        if not logs and self._trace is None:
            return
        text = line if isinstance(line, str) else line.decode(errors="replace")
        text = text.strip()
        if logs:
            logger.debug("monitor=%s %s %s", self._path, direction, text)
        if self._trace is None:
            return
        now = datetime.datetime.fromtimestamp(time.time(), datetime.timezone.utc)
        try:
            self._trace.write(f"{now:%Y-%m-%dT%H:%M:%S.%fZ} {direction} {text}\n")
            self._trace.flush()
        except (OSError, ValueError) as failure:
            # Not the backup's business; ValueError: it was closed, or cannot hold a character.
            logger.warning("monitor=%s trace ends: %s", self._path, failure)
            self._trace = None


def all_done(replies: list[Any]) -> list[Any]:
    """What ``execute_each`` gave. Errors: the first CommandFailed in it."""
    for reply in replies:
        if isinstance(reply, monitor_json.CommandFailed):
            try:
                raise reply
            finally:
                # The error knows this frame: a cycle would keep what its callers have open.
                del reply, replies
    return replies


class _Connected(threading.local):
    """The last monitor of each path that this thread has connected to, while anybody knows it."""

    def __init__(self) -> None:
        self.by_path: weakref.WeakValueDictionary[str, SocketMonitor] = (
            weakref.WeakValueDictionary()
        )


_connected = _Connected()


class SocketMonitor:
    """A connection to one QEMU's socket. Every method may be called from any thread.

    A signal's exception (SIGINT) may come before its user can close it, or within that. So it is
    hung up once nobody knows it any more, its reader thread aside; and where somebody does, as the
    exception is looked at yet, once the same thread connects to the same QEMU again.
    """

    passes_files = True
    hears_events = True

    def __init__(self, path: str, trace: TextIO | None = None) -> None:
        """Connect to the socket at PATH and negotiate.

        Errors: NotListening, VIR_ERR_SYSTEM_ERROR, VIR_ERR_OPERATION_TIMEOUT when the monitor does
        not greet because another client holds it, MonitorLost.
        """
        self.path = path
        self._lines = Lines(path, trace)
        # Taken and let go of without a line of Python, in which a signal's exception could come.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._sending = threading.Lock()
        self._end = time.monotonic() + SESSION_TIMEOUT
        self._replies: dict[int, tuple[qmp.Success | qmp.Failure, int]] = {}
        """Not taken yet, each with its weight."""
        self._replies_weight = 0
        self._waiting: set[int] = set()
        """The commands without a reply."""
        self._events: collections.deque[tuple[qmp.Event, int]] = collections.deque()
        self._events_weight = 0
        self._greeting: qmp.Greeting | None = None
        self._lost: str | None = None
        self._last_id = 0
        self._negotiated = False
        self._socket = _socket(path)
        self._abandoned = weakref.finalize(self, _abandon, self._socket, path, os.getpid())
        self._abandoned.atexit = False
        self._reader = threading.Thread(
            target=_read, args=(weakref.ref(self), self._socket), name=f"qmp {path}", daemon=True
        )
        before = _connected.by_path.get(path)
        _connected.by_path[path] = self
        try:
            if before is not None:
                before.close()
            self._connect()
            self._reader.start()
            self.greeting = self._wait_greeting()
            self.execute(monitor_json.qmp_capabilities())
            self._negotiated = True
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SocketMonitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; QEMU then greets the next client."""
        self._hang_up()
        # A signal's exception that came within a lock's own code may have left it locked (SIGINT).
        # One that came as the thread began leaves it unknown whether it did.
        if self._reader.is_alive():
            self._reader.join(_JOIN)
        self._socket.close()
        self._abandoned.detach()

    def _hang_up(self) -> None:
        _hang_up(self._socket, self.path)

    def peer_pid(self) -> int | None:
        """The process that listens, or None where it cannot be seen from here."""
        return runtime.peer_of(self._socket)[0] or None

    def peer_uid(self) -> int:
        """The user who listens by now: QEMU may have become another one since (``-runas``)."""
        pid, then, _ = runtime.peer_of(self._socket)
        now = runtime.process_user(pid)
        return then if now is None else now

    def execute(self, command: monitor_json.Command) -> Any:
        """Send COMMAND, wait, and give QEMU's ``return``; see execute_all."""
        return self.execute_all([command])[0]

    def execute_all(self, commands: Sequence[monitor_json.Command]) -> list[Any]:
        """Send all COMMANDS, then wait for all replies; QEMU carries them out in this order, each
        whether or not those before it failed. At most one of them may pass descriptors: QEMU keeps
        only the last it was sent.

        Errors: the first CommandFailed, with QEMU's words; MonitorLost; VIR_ERR_OPERATION_TIMEOUT
        (the connection is then given up, for nobody knows what the command will still do).
        """
        return all_done(self.execute_each(commands))

    def execute_each(self, commands: Sequence[monitor_json.Command]) -> list[Any]:
        """As ``Monitor.execute_each``."""
        sent = [(self._begin(command), command) for command in commands]
        return [
            monitor_json.outcome(command, self._wait_reply(id, command)) for id, command in sent
        ]

    def _begin(self, command: monitor_json.Command) -> int:
        """Send COMMAND; its id."""
        with self._lock:
            if self._lost is not None:
                raise MonitorLost(self._lost)
            self._last_id += 1
            id = self._last_id
            self._waiting.add(id)
        self._send(command, id)
        return id

    def _wait_reply(self, id: int, command: monitor_json.Command) -> qmp.Success | qmp.Failure:
        with self._lock:
            answered = self._changed.wait_for(
                lambda: id in self._replies or self._lost is not None, self._patience()
            )
            if id in self._replies:
                reply, weight = self._replies.pop(id)
                self._replies_weight -= weight
                return reply
            if answered:
                raise MonitorLost(str(self._lost))
            raise self._give_up(f"no reply to '{command.execute}'")

    def _patience(self) -> float:
        """Seconds that the next reply may take."""
        return max(0.0, min(self._reply_timeout, self._end - time.monotonic()))

    @property
    def _reply_timeout(self) -> float:
        """A QEMU that greets and then does not negotiate stands still: that is known sooner."""
        return REPLY_TIMEOUT if self._negotiated else CONNECT_TIMEOUT

    def _give_up(self, what: str) -> errors.Error:
        """The connection is of no use any more: WHAT did not happen in time."""
        if time.monotonic() < self._end:
            reason = f"{what} within {self._reply_timeout:g} seconds"
            if (why := self._why_stopped()) is not None:
                reason = f"{reason}: {why}"
        else:
            reason = f"{what}: the monitor took more than {SESSION_TIMEOUT:g} seconds in all"
        self._lose(reason)
        return NoAnswer(reason)

    def wait_event(self, matches: Callable[[qmp.Event], bool], timeout: float) -> qmp.Event | None:
        """The first event not taken yet that MATCHES, waiting at most TIMEOUT seconds for it."""
        with self._lock:
            self._changed.wait_for(
                lambda: self._lost is not None or any(matches(e) for e, _ in self._events), timeout
            )
            for kept in self._events:
                if matches(kept[0]):
                    self._events.remove(kept)
                    self._events_weight -= kept[1]
                    return kept[0]
        return None

    # --- the wire ---

    def _connect(self) -> None:
        # A full queue of waiting clients makes a non-blocking connect fail at once; a blocking
        # one waits for as long as it may send (unix(7)).
        end = time.monotonic() + CONNECT_TIMEOUT
        try:
            while not _is_connected(self._socket):
                _limit_sending(self._socket, max(0.001, end - time.monotonic()))
                self._socket.connect(self.path)
        except BlockingIOError as failure:
            raise self._busy() from failure
        except (ConnectionRefusedError, FileNotFoundError) as failure:
            raise NotListening(failure, self.path) from failure
        except OSError as failure:
            raise errors.system_error(
                failure, f"failed to connect to monitor socket '{self.path}'"
            ) from failure

    def _busy(self) -> errors.Error:
        return errors.error(
            libvirt.VIR_ERR_OPERATION_TIMEOUT,
            f"monitor socket '{self.path}' did not answer within {CONNECT_TIMEOUT:g} seconds:"
            f" {self._why_stopped() or 'another client may be using it, or it is no QMP socket'}",
        )

    def _why_stopped(self) -> str | None:
        return why_stopped(self.peer_pid())

    def _wait_greeting(self) -> qmp.Greeting:
        with self._lock:
            self._changed.wait_for(
                lambda: self._greeting is not None or self._lost is not None, CONNECT_TIMEOUT
            )
            if self._lost is not None:
                raise MonitorLost(self._lost)
            if self._greeting is None:
                raise self._busy()
            return self._greeting

    def _send(self, command: monitor_json.Command, id: int) -> None:
        line = qmp.encode(command.execute, command.arguments, id)
        self._lines.note("->", line)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", command.fds))]
        ancillary = rights if command.fds else []
        rest = memoryview(line)
        end = time.monotonic() + self._patience()
        try:
            with self._sending:
                while rest:
                    if not self._can_send(end):
                        raise self._give_up(f"'{command.execute}' was not taken")
                    with contextlib.suppress(BlockingIOError):
                        sent = self._socket.sendmsg([rest], ancillary, socket.MSG_DONTWAIT)
                        rest, ancillary = rest[sent:], []
        except OSError as failure:
            raise MonitorLost(
                f"unable to write to monitor '{self.path}': {failure.strerror}"
            ) from failure

    def _can_send(self, end: float) -> bool:
        """Wait until something can be sent; False when the time is END before."""
        ready = select.poll()
        ready.register(self._socket, select.POLLOUT)
        return bool(ready.poll(max(0.0, end - time.monotonic()) * 1000))

    def received(self, parser: qmp.Parser, data: bytes) -> None:
        """DATA has come. Errors: qmp.ProtocolError."""
        parser.receive_data(data)
        while (line := parser.next_line()) is not None:
            self._lines.note("<-", line)
            self._take(qmp.decode(line), qmp.weight(line))

    def ended(self, failure: Exception | None) -> None:
        """Nothing comes any more, for FAILURE, or as it was hung up."""
        match failure:
            case None:
                reason = f"end of file from monitor '{self.path}'"
            case qmp.ProtocolError():
                reason = f"monitor '{self.path}' does not speak QMP: {failure}"
            case OSError():
                reason = f"unable to read from monitor '{self.path}': {failure.strerror}"
            case _:
                reason = f"unable to read from monitor '{self.path}': {failure!r}"
        self._lose(reason)

    def _lose(self, reason: str) -> None:
        """Speak no more, and let QEMU serve the next client: that may be us, to clean up."""
        with self._lock:
            self._lost = self._lost or reason
            self._changed.notify_all()
        self._hang_up()

    def _take(self, message: qmp.Message, weight: int) -> None:
        with self._lock:
            match message:
                case qmp.Greeting():
                    if self._greeting is not None:
                        raise qmp.ProtocolError("it greeted twice")
                    self._greeting = message
                case qmp.Event():
                    self._keep(message, weight)
                case qmp.Success(id) | qmp.Failure(int(id)) if id in self._waiting:
                    self._take_reply(id, message, weight)
                case qmp.Failure(None) if self._waiting:
                    # It cannot read a command, as for a character in a text that its JSON has not.
                    # Nor then its id; but it answers in the order in which it is asked.
                    self._take_reply(min(self._waiting), message, weight)
                case qmp.Success(id) | qmp.Failure(id):
                    logger.warning("monitor=%s reply to nothing, id=%s", self.path, id)
            self._changed.notify_all()

    def _take_reply(self, id: int, reply: qmp.Success | qmp.Failure, weight: int) -> None:
        self._waiting.discard(id)
        self._replies_weight += weight
        if self._replies_weight > qmp.MAX_WEIGHT:
            raise qmp.ProtocolError("its replies are too large together")
        self._replies[id] = reply, weight

    def _keep(self, event: qmp.Event, weight: int) -> None:
        """Keep EVENT for whoever waits, and as many of those before it as there is room for."""
        self._events.append((event, weight))
        self._events_weight += weight
        while len(self._events) > MAX_EVENTS or self._events_weight > MAX_EVENTS_WEIGHT:
            self._events_weight -= self._events.popleft()[1]


def _read(of: "weakref.ref[SocketMonitor]", connection: socket.socket) -> None:
    """The reader thread: everything that comes, until the end. In between it knows the monitor no
    more than anybody does."""
    parser = qmp.Parser()
    failure: Exception | None = None
    try:
        while data := connection.recv(1 << 16):
            if (one := of()) is None:
                break
            one.received(parser, data)
            del one
    except Exception as caught:  # whoever waits for a reply must be told
        # Interrupted as this thread began, ``close`` does not wait for it.
        if connection.fileno() >= 0:
            failure = caught
            logger.debug("reader failed", exc_info=True)
    if (one := of()) is not None:
        one.ended(failure)
    else:
        connection.close()


def _abandon(connection: socket.socket, path: str, pid: int) -> None:
    """Nobody knows the monitor any more. In a process that was forked from the one that connected,
    process PID, it is that one's."""
    if os.getpid() == pid:
        _hang_up(connection, path)


def _hang_up(connection: socket.socket, path: str) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        logger.debug("monitor=%s already disconnected", path)


def _socket(path: str) -> socket.socket:
    """One to be connected to PATH. Errors: VIR_ERR_SYSTEM_ERROR, which says nothing of QEMU."""
    try:
        return socket.socket(socket.AF_UNIX)
    except OSError as failure:  # no descriptors are left, say
        text = f"cannot make a socket for monitor socket '{path}'"
        raise errors.system_error(failure, text) from failure


def _is_connected(connection: socket.socket) -> bool:
    """Whether it is. Of a wait that a signal has cut short, or the freezer, Python's connect says
    that it has come to a good end."""
    try:
        connection.getpeername()
    except OSError as failure:
        if failure.errno != errno.ENOTCONN:
            raise
        return False
    return True


def _limit_sending(connection: socket.socket, seconds: float) -> None:
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
