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
import logging
import os
import selectors
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from virtbackup import access
from virtbackup.remote import keepalive, peer, rpc, rpc_error, transport, workers
from virtbackup.remote.program import MessageStatus, MessageType

logger = logging.getLogger(__name__)

CLOSE_TIME = 5.0
"""Seconds for what is left to do when a server ends."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What clients may take; the names of the first three are libvirtd.conf's."""

    max_clients: int = 500
    """Further ones wait until there is room. Of one user nine tenths at most, but for root and the
    server's own, and so of one certificate, and by tcp; further ones are let go."""
    max_client_requests: int = 5
    """Calls of one client that are worked on at once."""
    max_workers: int = 20
    """Calls that are worked on at once, but for the one of each client that never waits for other
    clients'."""
    max_waiting_calls: int = 32
    """Of one client, before it is not read from."""
    max_waiting_bytes: int = 8 << 20
    """In those calls."""
    max_unread: int = 16 << 20
    """Bytes of replies that a client leaves unread, before no more of its calls are worked on; of
    events, before it is let go."""
    max_held: int = 256 << 20
    """Bytes of all clients together that wait for anything, before who has most of them is let go,
    if that is more than its share."""
    max_handshaking: int = 50
    """Clients that have not shaken hands by TLS yet; further ones wait."""
    handshake_timeout: float = 10.0
    """Seconds for TLS."""
    open_timeout: float = 60.0
    """Seconds that a client may be there without having opened the hypervisor, as whoever has no
    rights never has."""
    crowded_timeout: float = 2.0
    """For either, while there is no room for further clients."""
    keepalive_interval: float = 5.0
    keepalive_count: int = 5


class Session(Protocol):
    """What a server keeps of one client for whom it serves."""

    opened: bool
    """Whether the client has opened the hypervisor, and not closed it."""

    def handle(self, call: rpc.Message) -> rpc.Message | None:
        """The reply to a call; runs in a worker, several at once."""

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
        self._stop_by: float | None = None
        self._accept_from = 0.0
        """When clients are accepted again, after that went wrong; 0: it did not."""
        self._all_shake_hands = False
        """Whether there is no room for clients that have not shaken hands."""
        self._numbers = 0
        self._held = 0
        """Bytes that wait for something: for their end, for a worker, for the client."""
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._asked: collections.deque[Callable[[], None]] = collections.deque()
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)
        self.workers = workers.Workers(self.limits.max_workers)

    def listen(self, listening: socket.socket, context: ssl.SSLContext | None = None) -> None:
        """Serve the clients of a LISTENING socket, which is the server's now; with CONTEXT by TLS.
        Before ``run``."""
        listening.setblocking(False)
        transport.refuse_descriptors(listening)
        self._listeners.append(_Listener(listening, context))

    def run(self, by_signals: bool = False) -> None:
        """Serve until ``stop``; then calls that are worked on get their replies first. BY_SIGNALS,
        in the main thread: a signal's handler runs at once, whatever is waited for. Without it, a
        signal that comes just before the wait is seen to after it."""
        try:
            with self._woken_by_signals() if by_signals else contextlib.nullcontext():
                self._serve_until_done()
        finally:
            self.close()

    @contextlib.contextmanager
    def _woken_by_signals(self) -> Iterator[None]:
        """Over before anything is closed: a descriptor of that number may then be another's."""
        before = signal.set_wakeup_fd(self._wake_out.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)

    def _serve_until_done(self) -> None:
        self._select_listeners()
        while not self._done():
            for key, mask in self._selector.select(self._timeout()):
                key.data(mask)
            while self._asked:
                self._asked.popleft()()
            self._look_at_the_clock()

    def close(self) -> None:
        """Let go of everything, where ``run`` has not done so."""
        for client in list(self._clients):
            client.drop("the server stops")
        for listener in self._listeners:
            listener.socket.close()
        late = self._stop_by is not None and time.monotonic() > self._stop_by
        self.workers.close(0.0 if late else CLOSE_TIME)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    def stop(self, timeout: float = 10.0) -> None:
        """Have ``run`` return, with calls that are worked on for up to TIMEOUT seconds; when it is
        called again, at once. By any thread, or a signal's handler."""
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
        if self._stop_by is not None:
            self._stop_by = 0.0
            return
        self._stop_by = time.monotonic() + timeout
        self._select_listeners()
        for client in list(self._clients):
            client.read_no_more()

    def _done(self) -> bool:
        if self._stop_by is None:
            return False
        late = time.monotonic() > self._stop_by
        return late or not any(client.is_busy for client in self._clients)

    def _accept(self, listener: "_Listener") -> None:
        try:
            accepted, _ = listener.socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as failure:  # no descriptors are left, say
            logger.warning("a client cannot be accepted: %s", failure)
            self._accept_from = time.monotonic() + 1.0
            self._select_listeners()
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
        if self.is_full:
            logger.warning("clients=%d no more are accepted for now", len(self._clients))
        self._select_listeners()

    def _select_listeners(self) -> None:
        """Accept at those listeners for whose clients there is room."""
        room = self._stop_by is None and not self.is_full
        handshaking = sum(client.is_handshaking for client in self._clients)
        self._all_shake_hands = handshaking >= self.limits.max_handshaking
        for listener in self._listeners:
            accepts = room and not (listener.context is not None and self._all_shake_hands)
            if accepts and not listener.accepts:
                accept = functools.partial(self._accept_of, listener)
                self._selector.register(listener.socket, selectors.EVENT_READ, accept)
            elif listener.accepts and not accepts:
                self._selector.unregister(listener.socket)
            listener.accepts = accepts

    @property
    def is_full(self) -> bool:
        """Whether there is no room for further clients, nor a descriptor for one."""
        return len(self._clients) >= self.limits.max_clients or bool(self._accept_from)

    def _accept_of(self, listener: "_Listener", mask: int) -> None:
        if listener.accepts:  # not, where an earlier one's client was the last for now
            self._accept(listener)

    def forget(self, client: "Client") -> None:
        """A client is gone."""
        self._clients.discard(client)
        self._select_listeners()

    def has_shaken_hands(self) -> None:
        """A client has, so that there is room for another."""
        self._select_listeners()

    def select(self, client: "Client", mask: int) -> None:
        """Have ``Client.ready`` called for events of MASK; 0: for none."""
        current = self._selector.get_map().get(client.socket)
        if current is None and mask:
            self._selector.register(client.socket, mask, client.ready)
        elif current is not None and not mask:
            self._selector.unregister(client.socket)
        elif current is not None and current.events != mask:
            self._selector.modify(client.socket, mask, client.ready)

    @property
    def handshake_patience(self) -> float:
        """Seconds for a client to shake hands by TLS."""
        limits = self.limits
        return limits.crowded_timeout if self._all_shake_hands else limits.handshake_timeout

    def has_its_share(self, who: object) -> bool:
        """Whether all clients but a tenth of those that there may be are WHO's already."""
        most = max(1, self.limits.max_clients * 9 // 10)
        return sum(client.who == who for client in self._clients) > most

    @property
    def patience(self) -> float:
        """Seconds for a client to open the hypervisor."""
        return self.limits.crowded_timeout if self.is_full else self.limits.open_timeout

    def hold(self, more: int) -> None:
        """Count MORE bytes that a client holds."""
        self._held += more
        while self._held > self.limits.max_held:
            greediest = max(self._clients, key=lambda client: client.held)
            if greediest.held <= self.limits.max_held // self.limits.max_clients:
                return
            greediest.drop("it has too much wait, and all clients together have")

    def serve(self, client: "Client") -> Session:
        """The session of a client."""
        return self._serve(client)

    def _timeout(self) -> float | None:
        """Seconds to wait for the next event."""
        if self._stop_by is not None:
            return 0.05
        if any(client.has_deadline for client in self._clients):
            return min(1.0, self.limits.keepalive_interval or 1.0)
        return 1.0 if self._accept_from else None

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._accept_from and now >= self._accept_from:
            self._accept_from = 0.0
            self._select_listeners()
        for client in list(self._clients):
            client.look_at_the_clock(now)


@dataclasses.dataclass
class _Listener:
    socket: socket.socket
    context: ssl.SSLContext | None
    accepts: bool = False


class Client:
    """One connection. ``send`` and ``start_keepalive`` are for any thread, all else for that of the
    server's ``run``."""

    def __init__(
        self, server: Server, number: int, accepted: socket.socket, context: ssl.SSLContext | None
    ) -> None:
        """Errors: OSError where it is gone already."""
        self.number = number
        """For logs."""
        self._server = server
        self._limits = server.limits
        self._peer = peer.Peer(accepted, tls=context is not None)
        accepted.setblocking(False)
        if accepted.family in (socket.AF_INET, socket.AF_INET6):
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A host that is gone says nothing of it, and not every client asks to be pinged.
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.socket: socket.socket = accepted
        self.is_handshaking = context is not None
        if context is not None:
            self.socket = context.wrap_socket(
                accepted, server_side=True, do_handshake_on_connect=False
            )
        self._since = time.monotonic()
        """When it came, or was last seen to have the hypervisor open."""
        self._parser = rpc.Parser()
        self._session: Session | None = None
        self._keepalive: keepalive.Keepalive | None = None
        self._lock = threading.Lock()
        """Held for every use of the socket, and of what follows."""
        self._unsent = bytearray()
        self._calls: collections.deque[rpc.Message] = collections.deque()
        self._calls_bytes = 0
        self._working = 0
        self._coming: set[bool] = set()
        """The workers that are going to look for calls: whether an urgent one is, and another."""
        self._gone = False
        self._reads = True
        self.held = 0
        """Bytes, as the server has counted them."""

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
                self._server.ask(self._go_on)

    def start_keepalive(self) -> None:
        """Ping from now on, as the client knows that."""
        self._server.ask(self._start_keepalive)

    @property
    def who(self) -> object:
        """As ``Peer.who``."""
        return self._peer.who

    @property
    def identity(self) -> access.Identity:
        """Who the client is."""
        return self._peer.identity

    # --- the thread of run ---

    @property
    def is_busy(self) -> bool:
        """Whether a call is worked on, or a reply has not gone out."""
        with self._lock:
            return not self._gone and bool(self._working or self._calls or self._unsent)

    @property
    def has_deadline(self) -> bool:
        """Whether time alone may have something happen."""
        return self._keepalive is not None or not self._has_opened

    @property
    def _has_opened(self) -> bool:
        session = self._session  # which a worker may take away
        return session is not None and session.opened

    def begin(self) -> None:
        """Take what the client sends."""
        if self.is_handshaking:
            self.ready(selectors.EVENT_READ)
        else:
            self._begin_session()
            self._select()

    def _begin_session(self) -> None:
        if not self._peer.has_all_places and self._server.has_its_share(self.who):
            self.drop(f"there are too many of {self._peer.address}")
            return
        self._session = self._server.serve(self)
        logger.info("client=%d connected: %s", self.number, self._peer.address)

    def _start_keepalive(self) -> None:
        interval, count = self._limits.keepalive_interval, self._limits.keepalive_count
        if self._keepalive is None and interval > 0:
            self._keepalive = keepalive.Keepalive(interval, count)

    def read_no_more(self) -> None:
        """Take no more calls."""
        self._reads = False
        self._select()

    def ready(self, mask: int) -> None:
        """The socket can be read from or written to."""
        if self._gone:
            return
        try:
            if self.is_handshaking and not self._shake_hands():
                return
            if self._gone:
                return
            with self._lock:
                self._flush()
                self._wake_a_worker()
            if mask & selectors.EVENT_READ and self._may_read():
                self._read()
        except (rpc.ProtocolError, transport.Closed, OSError) as failure:
            self.drop(str(failure))
        except Exception as failure:  # ours to mend, and no other client's to suffer
            logger.exception("client=%d failed", self.number)
            self.drop(f"{type(failure).__name__}: {failure}")
        else:
            self._select()

    def look_at_the_clock(self, now: float) -> None:
        """Ping, or let go of who has not answered, or does not come to the point."""
        if self._gone:
            return
        if self.is_handshaking:
            if now > self._since + self._server.handshake_patience:
                self.drop("no TLS handshake in time")
            return
        if self._has_opened:
            self._since = now
        elif now > self._since + self._server.patience:
            self.drop("it has not opened the hypervisor in time")
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
            self._calls.clear()
            self._unsent.clear()
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)
            idle = not self._working
        self.is_handshaking = False
        held, self.held = self.held, 0
        self._server.hold(-held)
        logger.info("client=%d gone: %s", self.number, why)
        self._server.forget(self)
        self._server.workers.do(self._close, urgent=True)
        if idle:
            self._close_session()

    def _close(self) -> None:
        """Close the socket, and what came over it: in a worker, as the last descriptor of a file or
        socket may take its owner's time to close, also one that was passed and is not read yet."""
        for fd in self._parser.take_fds():
            os.close(fd)
        self.socket.close()

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._server.workers.do(session.close, urgent=True)

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
        self.is_handshaking = False
        self._peer.has_shaken_hands(self.socket)
        with self._lock:
            self._unsent += transport.ACCEPTED
        self._begin_session()
        self._server.has_shaken_hands()
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
        """Wait for what can be done now; but let go of a client that takes too much."""
        if self._gone or self.is_handshaking:
            return
        before, self.held = self.held, self._holds()
        self._server.hold(self.held - before)
        if self._gone:
            return
        mask = selectors.EVENT_READ if self._may_read() else 0
        self._server.select(self, mask | (selectors.EVENT_WRITE if self._unsent else 0))

    def _holds(self) -> int:
        """Bytes."""
        return self._parser.held_bytes + self._calls_bytes + len(self._unsent)

    def _read(self) -> None:
        """Take what has come. Errors: ProtocolError, transport.Closed, OSError."""
        with self._lock:
            try:
                data, fds = transport.read(self.socket)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
        self._parser.receive_data(data, fds)
        if fds:
            raise rpc.ProtocolError("descriptors, which no call of ours takes")
        if not data:
            raise transport.Closed("end of file")
        if self._keepalive is not None:
            self._keepalive.received(time.monotonic())
        while (message := self._parser.next_message()) is not None:
            self._take(message)

    def _take(self, message: rpc.Message) -> None:
        if keepalive.is_ping(message):
            self.send(keepalive.PONG, unasked=True)
        if message.type not in (MessageType.CALL, MessageType.CALL_WITH_FDS):
            return  # as libvirtd, which says nothing
        with self._lock:
            self._calls.append(message)
            self._calls_bytes += len(message.payload)
            self._wake_a_worker()

    def _flush(self) -> None:
        """Send what the socket takes. Under the lock."""
        while self._unsent:
            try:
                # A copy, as a view in a failure's frames would keep the buffer as it is.
                sent = self.socket.send(bytes(self._unsent[: transport.CHUNK]))
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as failure:
                # It has hung up, so what else it has asked for is of no use to anybody.
                self._unsent.clear()
                self._calls.clear()
                self._server.ask(functools.partial(self.drop, str(failure)))
                return
            del self._unsent[:sent]

    def _go_on(self) -> None:
        """Read on, or write, where that may be now."""
        if self._gone:
            return
        with self._lock:
            self._wake_a_worker()
        self._select()

    # --- workers ---

    def _wake_a_worker(self) -> None:
        """Under the lock."""
        if not self._has_work():
            return
        urgent = not self._working
        """One call of a client never waits for calls of others."""
        if urgent not in self._coming:
            self._coming.add(urgent)
            self._server.workers.do(functools.partial(self._work, urgent), urgent)

    def _has_work(self) -> bool:
        return (
            bool(self._calls)
            and not self._gone
            and self._working < self._limits.max_client_requests
            and len(self._unsent) < self._limits.max_unread
        )

    def _work(self, urgent: bool) -> None:
        """Work on one call, if there is any."""
        with self._lock:
            self._coming.discard(urgent)
            if not self._has_work():
                return
            was_read = self._may_read()
            call = self._calls.popleft()
            self._working += 1
            self._wake_a_worker()
            session = self._session
        if not was_read:  # there is room for another call
            self._server.ask(self._select)
        assert session is not None
        try:
            self._answer(session, call)
        finally:
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
