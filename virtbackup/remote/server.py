# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients on sockets: one thread for all input and output, others for what they ask for
(libvirt's virnetserver.c).

Nothing that takes time runs in the first thread, so a slow call never keeps another client, or a
ping, waiting. What a client can have the server hold is bounded: calls that wait, bytes that it
does not read, calls that are worked on at once. Over a bound it is not read from, or let go.
"""

import collections
import contextlib
import dataclasses
import functools
import grp
import logging
import os
import pwd
import queue
import selectors
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from virtbackup import access
from virtbackup.remote import keepalive, rpc, rpc_error, transport
from virtbackup.remote.program import MessageStatus, MessageType

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What clients may take; the names of the first three are libvirtd.conf's."""

    max_clients: int = 500
    """Further ones wait until there is room."""
    max_client_requests: int = 5
    """Calls of one client that are worked on at once."""
    max_workers: int = 20
    max_waiting_calls: int = 32
    """Of one client, before it is not read from."""
    max_waiting_bytes: int = 8 << 20
    """In those calls."""
    max_unread: int = 16 << 20
    """Bytes of events that a client leaves unread, before it is let go."""
    handshake_timeout: float = 10.0
    """Seconds for TLS."""
    keepalive_interval: float = 5.0
    keepalive_count: int = 5


class Session(Protocol):
    """What a server keeps of one client for whom it serves."""

    def handle(self, call: rpc.Message) -> rpc.Message | None:
        """The reply to a call; runs in a worker, several at once. The descriptors that come with
        the call are closed by the server afterwards."""

    def close(self) -> None:
        """The client is gone, and no call of it is worked on any more; runs in a worker."""


Serve = Callable[["Client"], Session]
"""Begins the session of a client whose identity is known; neither blocks nor raises."""


class Server:
    """Serves clients on listening sockets until it is stopped."""

    def __init__(self, serve: Serve, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._serve = serve
        self._selector = selectors.DefaultSelector()
        self._listeners: list[_Listener] = []
        self._clients: set[Client] = set()
        self._stopping = False
        self._stop_by: float | None = None
        self._numbers = 0
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._asked: collections.deque[Callable[[], None]] = collections.deque()
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)
        self.workers = Workers(self.limits.max_workers)

    def listen(self, listening: socket.socket, context: ssl.SSLContext | None = None) -> None:
        """Serve the clients of a LISTENING socket, which is the server's now; with CONTEXT by TLS.
        Before ``run``."""
        listening.setblocking(False)
        listener = _Listener(listening, context)
        self._listeners.append(listener)
        self._selector.register(listening, selectors.EVENT_READ, lambda _: self._accept(listener))

    def run(self) -> None:
        """Serve until ``stop``; then calls that are worked on get their replies first."""
        try:
            while not self._done():
                for key, mask in self._selector.select(self._timeout()):
                    key.data(mask)
                while self._asked:
                    self._asked.popleft()()
                self._look_at_the_clock()
        finally:
            for client in list(self._clients):
                client.drop("the server stops")
            for listener in self._listeners:
                listener.socket.close()
            self.workers.close()
            self._selector.close()
            self._wake_in.close()
            self._wake_out.close()

    def stop(self, timeout: float = 10.0) -> None:
        """Have ``run`` return, with calls that are worked on for up to TIMEOUT seconds. By any
        thread, or a signal's handler."""
        self.ask(lambda: self._begin_to_stop(timeout))

    def ask(self, what: Callable[[], None]) -> None:
        """Have the thread of ``run`` do WHAT, soon."""
        self._asked.append(what)
        with contextlib.suppress(OSError):  # it is full of this already, or closed
            self._wake_out.send(b"\0")

    @property
    def clients(self) -> Sequence["Client"]:
        """Those that are connected."""
        return list(self._clients)

    # --- in the thread of run ---

    def _woken(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_in.recv(4096):
                pass

    def _begin_to_stop(self, timeout: float) -> None:
        if self._stopping:
            return
        self._stopping, self._stop_by = True, time.monotonic() + timeout
        for listener in self._listeners:
            self._selector.unregister(listener.socket)
        for client in list(self._clients):
            client.read_no_more()

    def _done(self) -> bool:
        if not self._stopping:
            return False
        assert self._stop_by is not None
        late = time.monotonic() > self._stop_by
        return late or not any(client.is_busy for client in self._clients)

    def _accept(self, listener: "_Listener") -> None:
        try:
            accepted, _ = listener.socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as failure:  # no descriptors are left, say
            logger.warning("a client cannot be accepted: %s", failure)
            self._pause_accepting()
            self.workers.later(1.0, lambda: self.ask(self._accept_again))
            return
        self._numbers += 1
        try:
            client = Client(self, self._numbers, accepted, listener.context)
        except (OSError, ValueError) as failure:
            logger.info("client=%d gone at once: %s", self._numbers, failure)
            accepted.close()
            return
        self._clients.add(client)
        client.begin()
        if len(self._clients) >= self.limits.max_clients:
            logger.warning("clients=%d no more are accepted for now", len(self._clients))
            self._pause_accepting()

    def _pause_accepting(self) -> None:
        for listener in self._listeners:
            if listener.accepts:
                self._selector.unregister(listener.socket)
                listener.accepts = False

    def _accept_again(self) -> None:
        if self._stopping or len(self._clients) >= self.limits.max_clients:
            return
        for listener in self._listeners:
            if not listener.accepts:
                self._selector.register(
                    listener.socket,
                    selectors.EVENT_READ,
                    lambda _, listener=listener: self._accept(listener),
                )
                listener.accepts = True

    def forget(self, client: "Client") -> None:
        """A client is gone."""
        self._clients.discard(client)
        self._accept_again()

    def select(self, client: "Client", mask: int) -> None:
        """Have ``Client.ready`` called for events of MASK; 0: for none."""
        current = self._selector.get_map().get(client.socket)
        if current is None and mask:
            self._selector.register(client.socket, mask, client.ready)
        elif current is not None and not mask:
            self._selector.unregister(client.socket)
        elif current is not None and current.events != mask:
            self._selector.modify(client.socket, mask, client.ready)

    def serve(self, client: "Client") -> Session:
        """The session of a client."""
        return self._serve(client)

    def _timeout(self) -> float | None:
        """Seconds to wait for the next event."""
        if self._stopping:
            return 0.05
        return 1.0 if any(client.has_deadline for client in self._clients) else None

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for client in [client for client in self._clients if client.has_deadline]:
            client.look_at_the_clock(now)


@dataclasses.dataclass
class _Listener:
    socket: socket.socket
    context: ssl.SSLContext | None
    accepts: bool = True


class Client:
    """One connection. ``send`` and ``start_keepalive`` are for any thread, all else for that of the
    server's ``run``."""

    def __init__(
        self, server: Server, number: int, accepted: socket.socket, context: ssl.SSLContext | None
    ) -> None:
        self.number = number
        """For logs."""
        self._server = server
        self._limits = server.limits
        accepted.setblocking(False)
        if accepted.family in (socket.AF_INET, socket.AF_INET6):
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket: socket.socket = accepted
        self._handshaking = context is not None
        if context is not None:
            self.socket = context.wrap_socket(
                accepted, server_side=True, do_handshake_on_connect=False
            )
        self.address = _address_of(self.socket)
        """For logs."""
        self._since = time.monotonic()
        self._parser = rpc.Parser()
        self._session: Session | None = None
        self._keepalive: keepalive.Keepalive | None = None
        self._lock = threading.Lock()
        """Held for every use of the socket, and of what follows."""
        self._unsent = bytearray()
        self._calls: collections.deque[rpc.Message] = collections.deque()
        self._calls_bytes = 0
        self._working = 0
        self._queued = False
        """A worker is going to look for calls."""
        self._gone = False
        self._reads = True

    # --- any thread ---

    def send(self, message: rpc.Message, unasked: bool = False) -> None:
        """Send a message, now or when the client takes it. UNASKED, as events are: a client that
        does not read those is let go. Errors: CodecError."""
        assert not message.fds
        data = message.encode()
        with self._lock:
            if self._gone:
                return
            if unasked and len(self._unsent) > self._limits.max_unread:
                self._server.ask(lambda: self.drop("it does not read what it is sent"))
                return
            waiting = bool(self._unsent)
            self._unsent += data
            if not waiting:
                self._flush()
            if self._unsent:
                self._server.ask(self._select)

    def start_keepalive(self) -> None:
        """Ping from now on, as the client knows that."""

        def start() -> None:
            if self._keepalive is None:
                limits = self._limits
                self._keepalive = keepalive.Keepalive(
                    limits.keepalive_interval, limits.keepalive_count
                )

        self._server.ask(start)

    @functools.cached_property
    def identity(self) -> access.Identity:
        """Who the client is. It may take time to ask for a user's groups."""
        if isinstance(self.socket, ssl.SSLSocket):
            return access.Identity("tls", _common_name(self.socket))
        if self.socket.family == socket.AF_UNIX:
            return _user_of(self.socket)
        return access.Identity("tcp")

    # --- the thread of run ---

    @property
    def is_busy(self) -> bool:
        """Whether a call is worked on, or a reply has not gone out."""
        with self._lock:
            return not self._gone and bool(self._working or self._calls or self._unsent)

    @property
    def has_deadline(self) -> bool:
        """Whether time alone may have something happen."""
        return self._handshaking or self._keepalive is not None

    def begin(self) -> None:
        """Take what the client sends."""
        if not self._handshaking:
            self._session = self._server.serve(self)
            logger.info("client=%d connected: %s", self.number, self.address)
        self._select()
        if self._handshaking:
            self.ready(selectors.EVENT_READ)

    def read_no_more(self) -> None:
        """Take no more calls."""
        self._reads = False
        self._select()

    def ready(self, mask: int) -> None:
        """The socket can be read from or written to."""
        if self._gone:
            return
        try:
            if self._handshaking and not self._shake_hands():
                return
            with self._lock:
                self._flush()
            if mask & selectors.EVENT_READ and self._may_read():
                self._read()
        except (rpc.ProtocolError, transport.Closed, OSError) as failure:
            self.drop(str(failure))
            return
        self._select()

    def look_at_the_clock(self, now: float) -> None:
        """Ping, or let go of who has not answered."""
        if self._handshaking:
            if now > self._since + self._limits.handshake_timeout:
                self.drop("no TLS handshake in time")
            return
        if self._keepalive is None or not self._may_read():
            return  # what is not read cannot be heard
        due = self._keepalive.due(now)
        if due == "dead":
            self.drop("it does not answer pings")
        elif due == "ping":
            self.send(keepalive.PING)

    def drop(self, why: str) -> None:
        """Let go of the client."""
        with self._lock:
            if self._gone:
                return
            self._gone = True
            self._server.select(self, 0)
            for call in self._calls:
                _close_all(call.fds)
            self._calls.clear()
            _close_all(self._parser.take_fds())
            with contextlib.suppress(OSError):
                self.socket.close()
            idle = not self._working
        logger.info("client=%d gone: %s", self.number, why)
        self._server.forget(self)
        if idle:
            self._close_session()

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._server.workers.do(session.close)

    def _shake_hands(self) -> bool:
        assert isinstance(self.socket, ssl.SSLSocket)
        try:
            self.socket.do_handshake()
        except ssl.SSLWantReadError:
            self._server.select(self, selectors.EVENT_READ)
            return False
        except ssl.SSLWantWriteError:
            self._server.select(self, selectors.EVENT_WRITE)
            return False
        self._handshaking = False
        with self._lock:
            self._unsent += transport.ACCEPTED
        self._session = self._server.serve(self)
        logger.info("client=%d connected: %s", self.number, self.address)
        return True

    def _may_read(self) -> bool:
        limits = self._limits
        return (
            self._reads
            and len(self._calls) < limits.max_waiting_calls
            and self._calls_bytes < limits.max_waiting_bytes
            and len(self._unsent) < limits.max_unread
        )

    def _select(self) -> None:
        """Wait for what can be done now."""
        if self._gone or self._handshaking:
            return
        mask = selectors.EVENT_READ if self._may_read() else 0
        self._server.select(self, mask | (selectors.EVENT_WRITE if self._unsent else 0))

    def _read(self) -> None:
        """Take what has come. Errors: ProtocolError, transport.Closed, OSError."""
        while self._may_read():
            with self._lock:
                try:
                    data, fds = transport.read(self.socket)
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    return
            self._parser.receive_data(data, fds)
            if not data:
                raise transport.Closed("end of file")
            if self._keepalive is not None:
                self._keepalive.received(time.monotonic())
            while (message := self._parser.next_message()) is not None:
                self._take(message)
            if not isinstance(self.socket, ssl.SSLSocket) or not self.socket.pending():
                return  # and others have their turn

    def _take(self, message: rpc.Message) -> None:
        if keepalive.is_keepalive(message):
            if keepalive.is_ping(message):
                self.send(keepalive.PONG, unasked=True)
            return
        if message.type not in (MessageType.CALL, MessageType.CALL_WITH_FDS):
            _close_all(message.fds)  # as libvirtd, which says nothing
            return
        with self._lock:
            self._calls.append(message)
            self._calls_bytes += len(message.payload)
            self._wake_a_worker()

    def _flush(self) -> None:
        """Send what the socket takes. Under the lock. Errors: OSError."""
        while self._unsent:
            try:
                # A copy: a view, which an error would hold on to, lets nothing be taken away.
                sent = self.socket.send(self._unsent[: transport.CHUNK])
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError:
                # Whoever reads from the socket finds the same, and says so.
                self._unsent.clear()
                return
            del self._unsent[:sent]

    # --- workers ---

    def _wake_a_worker(self) -> None:
        """Under the lock."""
        if self._queued or not self._calls or self._working >= self._limits.max_client_requests:
            return
        self._queued = True
        self._server.workers.do(self._work)

    def _work(self) -> None:
        """Work on one call."""
        with self._lock:
            self._queued = False
            if self._gone or not self._calls:
                return
            call = self._calls.popleft()
            self._working += 1
            self._wake_a_worker()
            session = self._session
        assert session is not None
        try:
            self._answer(session, call)
        finally:
            _close_all(call.fds)
            with self._lock:
                self._working -= 1
                self._calls_bytes -= len(call.payload)
                self._wake_a_worker()
                last = self._gone and not self._working
            if last:
                self._close_session()
            else:
                self._server.ask(self._go_on)

    def _answer(self, session: Session, call: rpc.Message) -> None:
        if call.status != MessageStatus.OK:
            failure = rpc_error.rpc_error(f"Unexpected message status {call.status}")
            self.send(rpc_error.reply(call, failure))
            return
        reply = session.handle(call)
        if reply is None:
            return
        try:
            self.send(reply)
        except rpc.CodecError as failure:
            logger.warning("client=%d reply cannot be sent: %s", self.number, failure)
            too_large = rpc_error.rpc_error("Unable to encode message payload")
            self.send(rpc_error.reply(call, too_large))

    def _go_on(self) -> None:
        """Read on, where the calls that waited had been too many."""
        if self._gone:
            return
        self._select()
        if isinstance(self.socket, ssl.SSLSocket) and not self._handshaking:
            self.ready(selectors.EVENT_READ)  # what tls has read already, no selector tells


class Workers:
    """Threads that do one thing after the other; made when they are needed, up to a number."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._idle = 0

    def do(self, what: Callable[[], None]) -> None:
        """Have a thread do WHAT; what it raises is logged."""
        with self._lock:
            self._todo.put(what)
            if self._idle >= self._todo.qsize() or len(self._threads) >= self._most:
                return
            number = len(self._threads)
            thread = threading.Thread(target=self._run, name=f"worker-{number}", daemon=True)
            self._threads.append(thread)
        thread.start()

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        """Do WHAT after a while, in a thread of its own."""
        timer = threading.Timer(seconds, what)
        timer.daemon = True
        timer.start()

    def close(self, timeout: float = 5.0) -> None:
        """Do what is left to do, for up to TIMEOUT seconds."""
        end = time.monotonic() + timeout
        self._todo.put(None)
        for thread in self._threads:  # and those that are made meanwhile
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            what = self._todo.get()
            with self._lock:
                self._idle -= 1
            if what is None:  # of which there is one, for all
                is_last = self._todo.empty()
                self._todo.put(None)
                if is_last:
                    return
                continue
            try:
                what()
            except Exception:
                logger.exception("a worker failed")


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _address_of(connected: socket.socket) -> str:
    if connected.family == socket.AF_UNIX:
        pid, uid, _ = _credentials(connected)
        return f"process {pid} of user {uid}"
    name = connected.getpeername()
    return f"{name[0]}:{name[1]}"


def _credentials(connected: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) at the other end of a unix socket."""
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, gid = struct.unpack("iII", found)
    return pid, uid, gid


def _user_of(connected: socket.socket) -> access.Identity:
    """The user at the other end of a unix socket, by the kernel's word."""
    _, uid, gid = _credentials(connected)
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return access.Identity("unix", str(uid), frozenset({_group(gid)}))
    gids = os.getgrouplist(user.pw_name, gid)
    return access.Identity("unix", user.pw_name, frozenset(map(_group, gids)))


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _common_name(connected: ssl.SSLSocket) -> str:
    """Of the certificate that was checked."""
    found = connected.getpeercert() or {}
    subject = found.get("subject", ())
    pairs = [pair for relative in subject for pair in relative]
    names = [pair[1] for pair in pairs if pair[0] == "commonName"]
    return str(names[-1]) if names else ""
