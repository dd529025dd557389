# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection to a server: calls of many threads, events, keepalive (libvirt's virnetclient.c).

One thread reads. It hands replies to the threads that wait for them, in whatever order they come,
and events to another thread, so that what is done about an event may call. Errors are those that
libvirt's own client has.
"""

import collections
import contextlib
import datetime
import errno
import itertools
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, TextIO

import libvirt

from virtbackup import errors
from virtbackup.remote import dump, keepalive, program, rpc, rpc_error, transport
from virtbackup.remote.program import MessageStatus, MessageType

logger = logging.getLogger(__name__)

KEEPALIVE_INTERVAL: Final = 5.0
"""Seconds of silence until a ping, and from one to the next."""
KEEPALIVE_COUNT: Final = 5
"""Pings without an answer, an interval after which the server is dead."""
MAX_EVENTS = 10_000
"""Events that wait; the oldest go first."""
MAX_EVENTS_BYTES = 16 << 20
CLOSE_TIMEOUT = 5.0
"""Seconds that a close waits for what is done about an event."""

_SERIALS = 1 << 32


class Trace:
    """Where messages are shown, for as long as that can be written. TO may change at any time."""

    def __init__(self, to: TextIO | None = None) -> None:
        self.to = to
        # Reentrant, as a signal's handler may call.
        self._lock = threading.RLock()

    def __call__(self, direction: dump.Direction, message: rpc.Message) -> None:
        if self.to is None:
            return
        now = datetime.datetime.fromtimestamp(time.time(), datetime.timezone.utc)
        text = dump.line(now, direction, message)
        with self._lock:
            to = self.to
            if to is None:
                return
            try:
                to.write(f"{text}\n")
                to.flush()
            except (OSError, ValueError) as failure:
                # Not the call's business; ValueError: it was closed, or cannot hold a character.
                logger.warning("trace ends: %s", failure)
                self.to = None


# --- what goes wrong, in the words of libvirt's client ---


def socket_closed() -> errors.Error:
    """For a call on a connection that has ended before."""
    return _internal("client socket is closed")


def _internal(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, detail, domain=libvirt.VIR_FROM_RPC)


def system_error(failure: OSError, text: str) -> errors.Error:
    """As errors.system_error, of the RPC."""
    made = errors.system_error(failure, text)
    code, _, *rest = made.err
    made.err = (code, libvirt.VIR_FROM_RPC, *rest)
    return made


def _lost(failure: transport.Closed, text: str) -> errors.Error:
    reason = str(failure)
    if reason == "end of file":
        text = "End of file while reading data"
        return system_error(OSError(errno.EIO, os.strerror(errno.EIO)), text)
    return system_error(OSError(0, reason), text)


def _again(failure: errors.Error) -> errors.Error:
    """The same error, for another thread to raise."""
    made = errors.Error(failure.get_error_code(), str(failure))
    made.err = failure.err
    return made


# --- events ---


class _Dispatcher:
    """A thread, once there is an event, that has the events seen one after the other."""

    def __init__(self, name: str, see: Callable[[rpc.Message], None]) -> None:
        self._name = name
        self._see = see
        self._changed = threading.Condition()
        self._events: collections.deque[rpc.Message] = collections.deque()
        self._bytes = 0
        self._ends = False
        self._thread: threading.Thread | None = None

    def put(self, event: rpc.Message) -> None:
        with self._changed:
            if self._ends:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._events.append(event)
            self._bytes += len(event.payload)
            while len(self._events) > MAX_EVENTS or self._bytes > MAX_EVENTS_BYTES:
                self._bytes -= len(self._events.popleft().payload)
                logger.warning("%s: an event is lost: too many wait", self._name)
            self._changed.notify()

    def end(self) -> None:
        """No events come any more; those that wait are seen still."""
        with self._changed:
            self._ends = True
            self._changed.notify()

    def close(self) -> None:
        """Forget the events that wait, and wait for the one that is being seen."""
        with self._changed:
            self._events.clear()
            self._ends = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._ends)
                if not self._events:
                    return
                event = self._events.popleft()
                self._bytes -= len(event.payload)
            try:
                self._see(event)
            except Exception:
                logger.exception("%s: an event is not seen", self._name)


# --- the connection ---


class _Waiting:
    """A call that has no reply yet."""

    def __init__(self, of: program.Program, number: int) -> None:
        self.program = of
        self.procedure = number
        self.outcome: queue.SimpleQueue[rpc.Message | errors.Error] = queue.SimpleQueue()
        """The reply, or why there will be none. Of a kind that a signal's handler may be given."""


class Client:
    """A connection. Every method may be called by any thread; in a process that was forked from
    the one that made it, it is closed."""

    def __init__(
        self,
        connected: transport.Transport,
        name: str,
        see: Callable[[rpc.Message], None],
        trace: Trace | None = None,
        interval: float = KEEPALIVE_INTERVAL,
        count: int = KEEPALIVE_COUNT,
    ) -> None:
        """CONNECTED is ours now. NAME is for logs. SEE is called for every event of a program that
        we know, by one thread that is not the one that reads."""
        self.name = name
        self._transport = connected
        self._trace = trace or Trace()
        self._interval = interval
        self._keepalive = keepalive.Keepalive(interval, count)
        self._pings = False
        self._patience = interval * count or None
        self._events = _Dispatcher(f"rpc events {name}", see)
        self._pid = os.getpid()
        # Reentrant, as a signal's handler may close us.
        self._lock = threading.RLock()
        self._serials = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        """By serial; also those that nobody waits for any more, whose reply is still to come."""
        self._ended: errors.Error | None = None
        self._sending = threading.Lock()
        self._senders: set[int] = set()
        """The threads that send a call just now."""
        self._due: collections.deque[rpc.Message] = collections.deque(maxlen=4)
        """What the reader has to send; it never waits for another thread that sends."""
        self._reader = threading.Thread(target=self._run, name=f"rpc {name}", daemon=True)
        self._reader.start()
        _clients.add(self)

    @property
    def is_alive(self) -> bool:
        """Whether the connection stands, as far as anybody knows."""
        return self._ended is None and os.getpid() == self._pid

    def start_keepalive(self) -> None:
        """Ping the server when it is silent, as it answers pings."""
        self._pings = True

    def call(
        self, of: program.Program, name: str, args: Any = None, timeout: float | None = None
    ) -> Any:
        """What the server returns.

        Errors: the server's; VIR_ERR_RPC for what cannot be encoded or decoded;
        VIR_ERR_SYSTEM_ERROR or VIR_ERR_INTERNAL_ERROR where the connection has ended, or ends
        meanwhile: then whether the call took effect is not known; the latter for a signal's handler
        in the middle of another call that is being sent; VIR_ERR_OPERATION_TIMEOUT after TIMEOUT
        seconds.
        """
        if os.getpid() != self._pid:
            raise socket_closed()
        if self._is_sending_here:
            raise _internal("called by a signal's handler, in the middle of another call")
        waiting = self._send_call(of, name, args)
        try:
            outcome = waiting.outcome.get(timeout=timeout)
        except queue.Empty:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_TIMEOUT,
                f"server '{self.name}' does not answer",
                domain=libvirt.VIR_FROM_RPC,
            ) from None
        if isinstance(outcome, errors.Error):
            raise _again(outcome)
        return _returned(outcome, waiting)

    def close(self) -> None:
        """End the connection, and every call that waits. Closing twice does nothing."""
        if os.getpid() != self._pid:
            return
        self._end(socket_closed())
        # Which waits for the call that a signal's handler, which we are in, has interrupted.
        if threading.current_thread() is not self._reader and not self._is_sending_here:
            self._reader.join()
        self._events.close()

    def abandon(self) -> None:
        """End the connection without a lock taken or a thread waited for: for the collector."""
        if os.getpid() == self._pid:
            self._transport.shutdown()

    # --- sending ---

    def _send_call(self, of: program.Program, name: str, args: Any) -> _Waiting:
        waiting = _Waiting(of, of[name].number)
        serial = next(self._serials) % _SERIALS
        here = threading.get_ident()
        try:
            self._senders.add(here)  # not before: a signal's exception may come at once (SIGINT)
            message = rpc.call(of, name, serial, args)
            with self._lock:
                if self._ended is not None:
                    raise socket_closed()
                self._waiting[serial] = waiting
            self._send(message)
        except rpc.CodecError as failure:
            self._waiting.pop(serial, None)
            raise rpc_error.rpc_error(f"Unable to encode message payload: {failure}") from failure
        except transport.Closed as failure:
            self._end(_lost(failure, "Cannot write data"))
            assert self._ended is not None
            waiting.outcome.put(self._ended)  # it may have ended just before this was noted
        finally:
            self._senders.discard(here)
        return waiting

    @property
    def _is_sending_here(self) -> bool:
        """Whether this thread sends a call: we are in a signal's handler."""
        return threading.get_ident() in self._senders

    def _send(self, message: rpc.Message) -> None:
        """Errors: CodecError, transport.Closed."""
        with self._sending:
            self._show("->", message)
            self._transport.send(message)
        with contextlib.suppress(transport.Closed):  # the reader finds the same
            self._send_due()

    def _send_due(self) -> None:
        """Send what the reader has to, unless a thread is sending: that will do it then.
        Errors: transport.Closed."""
        while self._due and self._sending.acquire(blocking=False):
            try:
                while self._due:
                    message = self._due.popleft()
                    self._show("->", message)
                    self._transport.send(message, self._patience)
            finally:
                self._sending.release()

    # --- reading ---

    def _run(self) -> None:
        reason = _internal("the thread that reads has failed")
        try:
            reason = self._read()
        finally:
            self._end(reason)
            self._events.end()
            with self._sending:
                self._transport.close()

    def _read(self) -> errors.Error:
        """Read until the connection ends; why it did."""
        try:
            while True:
                patience = self._keepalive.next(time.monotonic())
                message = self._transport.receive(patience)
                if message is not None:
                    self._keepalive.received(time.monotonic())
                    self._show("<-", message)
                    for fd in message.fds:  # we have asked for none
                        os.close(fd)
                    self._take(message)
                elif self._is_dead():
                    return _internal("connection closed due to keepalive timeout")
                self._send_due()
        except transport.Closed as failure:
            return _lost(failure, "Cannot recv data")
        except rpc.ProtocolError as failure:
            logger.warning("server=%s connection closed: %s", self.name, failure)
            return rpc_error.rpc_error(str(failure))

    def _is_dead(self) -> bool:
        """Whether the server has not answered; pings it where it is time."""
        if not self._pings:
            self._keepalive.received(time.monotonic())
            return False
        due = self._keepalive.due(time.monotonic())
        if due == "ping":
            self._due.append(keepalive.PING)
        return due == "dead"

    def _take(self, message: rpc.Message) -> None:
        """Errors: ProtocolError."""
        if keepalive.is_keepalive(message):
            if keepalive.is_ping(message):
                self._due.append(keepalive.PONG)
            return
        match message.type:
            case MessageType.REPLY | MessageType.REPLY_WITH_FDS:
                self._take_reply(message)
            case MessageType.MESSAGE:
                self._take_event(message)
            case MessageType.STREAM | MessageType.STREAM_HOLE:
                pass  # of no stream of ours
            case _:
                raise rpc.ProtocolError(f"got unexpected RPC call {_where(message)}")

    def _take_reply(self, message: rpc.Message) -> None:
        with self._lock:
            if self._ended is not None:
                return  # it comes as we close
            waiting = self._waiting.get(message.serial)
            if waiting is None or (message.program, message.version) != (
                waiting.program.number,
                waiting.program.version,
            ):
                raise rpc.ProtocolError(f"no call waiting for reply with {_where(message)}")
            del self._waiting[message.serial]
        waiting.outcome.put(message)

    def _take_event(self, message: rpc.Message) -> None:
        if rpc.known_program(message) is None:
            raise rpc.ProtocolError(f"No program found for event with {_where(message)}")
        if message.proc is None or message.proc.kind != "event":
            logger.info("server=%s unknown event: %s", self.name, dump.describe(message))
            return
        self._events.put(message)

    # --- the end ---

    def _end(self, reason: errors.Error) -> None:
        """Nothing goes over the connection any more; calls that wait fail for REASON."""
        with self._lock:
            if self._ended is not None:
                return
            self._ended = reason
            waiting = list(self._waiting.values())
            self._waiting.clear()
        self._transport.shutdown()
        logger.info("server=%s connection ended: %s", self.name, reason)
        for one in waiting:
            one.outcome.put(reason)

    def _show(self, direction: dump.Direction, message: rpc.Message) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("server=%s %s %s", self.name, direction, dump.describe(message))
        self._trace(direction, message)


def _where(message: rpc.Message) -> str:
    return (
        f"prog {message.program} vers {message.version} proc {message.procedure}"
        f" type {message.type} serial {message.serial}"
    )


def _returned(reply: rpc.Message, to: _Waiting) -> Any:
    """What a reply carries. Errors: the server's; VIR_ERR_RPC, VIR_ERR_INTERNAL_ERROR."""
    if reply.procedure != to.procedure:
        raise _internal(f"Unexpected message proc {reply.procedure} != {to.procedure}")
    try:
        match reply.status:
            case MessageStatus.OK:
                return rpc.ret(reply)
            case MessageStatus.ERROR:
                failure = rpc_error.of_reply(reply)
            case _:
                raise rpc_error.rpc_error(f"Unexpected message status {reply.status}")
    except rpc.CodecError as wrong:
        logger.warning("%s: %s", dump.describe(reply), wrong)
        raise rpc_error.undecodable() from wrong
    raise failure


_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


def _close_in_child() -> None:
    """A process that was forked has no use for the sockets, and would keep the connections up."""
    for one in list(_clients):
        one._transport.close()


os.register_at_fork(after_in_child=_close_in_child)
