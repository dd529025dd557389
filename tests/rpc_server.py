# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server of the RPC that does as a test says, and is no part of ours but its codec."""

import collections
import contextlib
import pathlib
import socket
import ssl
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import libvirt

from tests import waiting
from virtbackup.remote import (
    keepalive,
    program,
    protocol,
    remote_types,
    rpc,
    rpc_error,
    transport,
    virtbackup_protocol,
)
from virtbackup.remote import remote_structs as structs

DEADLINE = waiting.DEADLINE
UUID = "c9be7d13-0000-4000-8000-00000000002a"
VM = remote_types.NonnullDomain("vm", bytes.fromhex(UUID.replace("-", "")), 2)

SILENCE = object()
"""What a handler returns for no reply."""

Handler = Callable[["Peer", rpc.Message], Any]


def serve(
    accepted: socket.socket, context: ssl.SSLContext | None, timeout: float
) -> transport.Transport:
    """The other end of ``transport.connect``. Errors: OSError."""
    if context is not None:
        accepted.settimeout(timeout)
        accepted = context.wrap_socket(accepted, server_side=True)
        accepted.sendall(transport.ACCEPTED)
    return transport.Transport(accepted)


class Peer:
    """One client, as the server has it."""

    def __init__(self, connected: transport.Transport) -> None:
        self.transport = connected
        self.calls: list[rpc.Message] = []
        self.pings = 0
        self.ended = threading.Event()

    def send(self, message: rpc.Message) -> None:
        with contextlib.suppress(transport.Closed):
            self.transport.send(message)

    def hang_up(self) -> None:
        self.transport.shutdown()


class Server:
    """Listens at ADDRESS. ``handlers`` by ``PROGRAM.PROCEDURE``: what one returns is the reply,
    what it raises is the error; calls without one are unknown."""

    def __init__(
        self,
        address: transport.Address,
        handlers: dict[str, Handler] | None = None,
        ours: bool = True,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.handlers: dict[str, Handler] = {
            "REMOTE.AUTH_LIST": lambda *_: structs.AuthListRet((0,)),
            "REMOTE.CONNECT_SUPPORTS_FEATURE": lambda *_: structs.ConnectSupportsFeatureRet(1),
            "REMOTE.CONNECT_OPEN": lambda *_: None,
            "REMOTE.CONNECT_CLOSE": lambda *_: None,
            "REMOTE.CONNECT_GET_HOSTNAME": lambda *_: structs.ConnectGetHostnameRet("here"),
        }
        if ours:
            supported = virtbackup_protocol.SupportedRet(1)
            self.handlers["VIRTBACKUP.SUPPORTED"] = lambda *_: supported
        self.ours = ours
        self.handlers.update(handlers or {})
        self.answers_pings = True
        self.peers: list[Peer] = []
        self._context = context
        self._came = threading.Condition()
        self._listening = transport.listen(address)
        self.port = 0 if address.kind == "unix" else self._listening.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up on everybody."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(2)
        self._listening.close()
        for peer in self.peers:
            peer.hang_up()
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()

    def peer(self, number: int = -1) -> Peer:
        return self.peers[number]

    def named(self, number: int = -1) -> list[str]:
        """The calls of a client, by name."""
        return [name_of(call) for call in self.peers[number].calls]

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Wait until WHAT holds, which is asked after everything that comes."""
        with self._came:
            assert self._came.wait_for(what, DEADLINE), self.named() if self.peers else "nobody"

    def _start(self, what: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=what, args=args, daemon=True, name="test server")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listening.accept()
            except OSError:
                return
            self._start(self._serve, accepted)

    def _serve(self, accepted: Any) -> None:
        try:
            peer = Peer(serve(accepted, self._context, DEADLINE))
        except OSError:
            return
        self.peers.append(peer)
        try:
            while (message := peer.transport.receive()) is not None:
                self._take(peer, message)
                with self._came:
                    self._came.notify_all()
        except (transport.Closed, rpc.ProtocolError):
            pass
        finally:
            peer.transport.close()
            peer.ended.set()
            with self._came:
                self._came.notify_all()

    def _take(self, peer: Peer, message: rpc.Message) -> None:
        if keepalive.is_keepalive(message):
            if keepalive.is_ping(message):
                peer.pings += 1
                if self.answers_pings:
                    peer.send(keepalive.PONG)
            return
        peer.calls.append(message)
        handler = self.handlers.get(name_of(message))
        try:
            if handler is None:
                raise self._unknown(message)
            answer = handler(peer, message)
        except libvirt.libvirtError as failure:
            peer.send(rpc_error.reply(message, failure))
            return
        if answer is not SILENCE:
            peer.send(rpc.reply(message, answer))

    def _unknown(self, message: rpc.Message) -> libvirt.libvirtError:
        if message.program == protocol.VIRTBACKUP.number and not self.ours:
            return rpc_error.rpc_error(f"Cannot find program {message.program} version 1")
        return rpc_error.rpc_error(f"unknown procedure: {message.procedure}")


def name_of(message: rpc.Message) -> str:
    of = protocol.PROGRAMS[message.program]
    return f"{of.name}.{of.by_number[message.procedure].name}"


def raw(
    of: program.Program, number: int, type: int, serial: int, payload: bytes = b"", status: int = 0
) -> rpc.Message:
    """Any message."""
    return rpc.Message(of.number, of.version, number, type, serial, status, payload)


class Gate:
    """Holds calls back until it is opened; answers them in the order that it is told."""

    def __init__(self) -> None:
        self.held: collections.deque[tuple[Peer, rpc.Message]] = collections.deque()

    def __call__(self, peer: Peer, message: rpc.Message) -> Any:
        self.held.append((peer, message))
        return SILENCE


def domain(name: str) -> remote_types.NonnullDomain:
    """One that does not run."""
    return remote_types.NonnullDomain(name, bytes(16), -1)


def unix(directory: pathlib.Path) -> transport.Address:
    return transport.Address("unix", path=str(directory / "rpc.sock"))
