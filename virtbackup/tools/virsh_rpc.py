# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command about libvirt's wire protocol itself, for those who develop it."""

import contextlib
import dataclasses
import datetime
import itertools
import os
import socket
import threading
from typing import TYPE_CHECKING

from virtbackup.tools import virsh_connection, vsh

if TYPE_CHECKING:
    from virtbackup.remote import dump, rpc, transport

GROUP = vsh.Group("rpc", "Wire protocol")


def _dump(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup import config
    from virtbackup.remote import transport
    from virtbackup.tools import interrupt

    try:
        server = transport.parse_address(args.text("server"))
        given = args.optional("listen")
        address = None if given is None else transport.parse_address(given)
    except ValueError as error:
        raise vsh.UsageError(str(error)) from error
    if "tls" in (server.kind, address and address.kind):
        raise vsh.UsageError("what goes over tls cannot be read on the way")
    if address is not None and server.kind == "unix":
        _refuse_strangers(address)
    clients = args.number("clients")
    if clients == 0:
        raise vsh.UsageError("--clients is how many, one or more")
    with contextlib.ExitStack() as stack:
        if address is None:
            directory = config.private_directory(stack)
            address = transport.Address("unix", path=str(directory / "libvirt-sock"))
        try:
            listening = stack.enter_context(transport.listen(address))
            if address.kind == "unix":
                stack.callback(transport.remove, address.path, os.lstat(address.path))
        except OSError as error:
            raise vsh.Failure(f"cannot listen on '{address}': {error.strerror}") from error
        if address.kind != "unix":
            address = dataclasses.replace(address, port=listening.getsockname()[1])
        stack.enter_context(interrupt.is_the_end())
        telling = _Lines(shell) if args.flag("json") else _Text(shell)
        telling.listening(address)
        Proxy(telling, server).serve(listening, clients or 0)


def _refuse_strangers(address: "transport.Address") -> None:
    """Of a daemon's unix socket, by which it sees no other user than this process's."""
    if address.kind == "tcp" and not virsh_connection.is_loopback(address.host):
        text = (
            f"'{address}': whoever reaches {address.host or 'this host'} would be you to the daemon"
        )
        raise vsh.UsageError(f"{text}; listen on a unix socket, or on loopback")


class _Text:
    """What happens, in lines for people; ``client`` is a number."""

    def __init__(self, shell: virsh_connection.Shell) -> None:
        self._shell = shell
        self._printing = threading.Lock()

    def listening(self, address: "transport.Address") -> None:
        self._print(str(address))

    def connected(self, client: int) -> None:
        self._print(f"{client} connected")

    def unreachable(self, client: int, server: "transport.Address", reason: str) -> None:
        """The SERVER was not reached for the client, who is let go."""
        self._print(f"{client} cannot connect to '{server}': {reason}")

    def message(self, client: int, direction: "dump.Direction", message: "rpc.Message") -> None:
        from virtbackup.remote import dump

        self._print(f"{client} {dump.line(_now(), direction, message)}")

    def unreadable(self, client: int, direction: "dump.Direction", problem: str) -> None:
        """What one side says is passed on and no longer read."""
        self._print(f"{client} {direction} no message: {problem}")

    def closed(self, client: int) -> None:
        self._print(f"{client} closed")

    def _print(self, text: str) -> None:
        with self._printing:
            self._shell.print(text)
            vsh.flush()


class _Lines(_Text):
    """The same in lines of JSON for programs."""

    def listening(self, address: "transport.Address") -> None:
        unix, ip = virsh_connection.unix_facts, virsh_connection.ip_facts
        is_unix = address.kind == "unix"
        facts = unix(address.path) if is_unix else ip(address.host, address.port)
        self._tell("listening", address=facts)

    def connected(self, client: int) -> None:
        self._tell("connected", client=client)

    def unreachable(self, client: int, server: "transport.Address", reason: str) -> None:
        self._tell("failed", client=client, error=f"cannot connect to '{server}': {reason}")

    def message(self, client: int, direction: "dump.Direction", message: "rpc.Message") -> None:
        from virtbackup.remote import dump

        self._tell("message", client=client, **dump.facts(_now(), direction, message))

    def unreadable(self, client: int, direction: "dump.Direction", problem: str) -> None:
        self._tell("unreadable", client=client, direction=direction, problem=problem)

    def closed(self, client: int) -> None:
        self._tell("closed", client=client)

    def _tell(self, event: str, **facts: object) -> None:
        with self._printing:
            self._shell.print_event(event, **facts)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


class Proxy:
    """Passes on what clients and a server say, descriptors included, and tells of it."""

    def __init__(self, telling: _Text, server: "transport.Address") -> None:
        self.telling = telling
        self._server = server
        self._gone = threading.Semaphore(0)
        """Counts the clients that have gone."""
        self._failure: Exception | None = None
        """Why nothing can be told any more."""

    def serve(self, listening: socket.socket, clients: int) -> None:
        """Until that many CLIENTS have come and gone; 0: for ever. Errors: those of telling, which
        end it."""
        from virtbackup.tools import interrupt

        listening.settimeout(interrupt.LOOK_AGAIN)
        for number in itertools.count(1):
            try:
                client = self._accepted(listening)
            except OSError:
                self._check()
                raise
            args = number, client, listening
            threading.Thread(target=self._serve, args=args, daemon=True).start()
            if number == clients:
                break
        for _ in range(clients):
            while not self._gone.acquire(timeout=interrupt.LOOK_AGAIN):
                pass
            self._check()

    def _accepted(self, listening: socket.socket) -> socket.socket:
        while True:
            with contextlib.suppress(TimeoutError):
                return listening.accept()[0]
            self._check()  # a socket that was shut down times out, too

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _serve(self, number: int, client: socket.socket, listening: socket.socket) -> None:
        try:
            self._pass(number, client)
        except (vsh.OutputClosed, vsh.Failure) as failure:
            self._failure = failure
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # or it would be waited for one more client
        finally:
            self._gone.release()

    def _pass(self, number: int, client: socket.socket) -> None:
        from virtbackup.remote import transport

        with client, contextlib.ExitStack() as stack:
            try:
                server = stack.enter_context(transport.connected(self._server))
            except OSError as error:
                self.telling.unreachable(number, self._server, str(error.strerror))
                return
            self.telling.connected(number)
            # Each way by a thread of its own: who reads nothing until it is read from holds up
            # what is said to it, and not what it says.
            there = _Way(self, number, "->", client, server)
            back = _Way(self, number, "<-", server, client)
            other = threading.Thread(target=self._carry, args=(back,), daemon=True)
            other.start()
            self._carry(there)
            other.join()
            self._check()
            self.telling.closed(number)

    def _carry(self, way: "_Way") -> None:
        try:
            way.carry()
        except (vsh.OutputClosed, vsh.Failure) as failure:
            self._failure = failure


class _Way:
    """What one side says to the other."""

    def __init__(
        self,
        proxy: Proxy,
        number: int,
        direction: "dump.Direction",
        source: socket.socket,
        target: socket.socket,
    ) -> None:
        from virtbackup.remote import rpc

        self._proxy, self._number, self._direction = proxy, number, direction
        self._source, self._target = source, target
        self._parser: rpc.Parser | None = rpc.Parser()

    def carry(self) -> None:
        """Pass on all that comes, until one of the two is gone; then both are let go. Errors: those
        of telling."""
        from virtbackup.remote import rpc

        try:
            with contextlib.suppress(OSError):
                while self._pass():
                    pass
        except rpc.ProtocolError as failure:
            self._proxy.telling.unreadable(self._number, self._direction, str(failure))
        finally:
            for side in (self._source, self._target):
                with contextlib.suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)

    def _pass(self) -> bool:
        """Pass on what has come; whether the side is still there. Errors: OSError, ProtocolError
        where descriptors were lost, those of telling."""
        from virtbackup.remote import transport

        data, fds = transport.read(self._source)
        try:
            if not data:
                self._tell_of_half_a_message()
                return False
            self._show(data, fds)
            # Descriptors come with the byte that is theirs, which is the last that was read.
            body = data[:-1] if fds else data
            self._target.sendall(body)
            if fds:
                socket.send_fds(self._target, [data[-1:]], fds)
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _tell_of_half_a_message(self) -> None:
        if self._parser is not None and (held := self._parser.held_bytes):
            problem = f"{held} bytes of one that did not come whole"
            self._proxy.telling.unreadable(self._number, self._direction, problem)

    def _show(self, data: bytes, fds: list[int]) -> None:
        from virtbackup.remote import rpc

        if self._parser is None:
            return
        try:
            self._parser.receive_data(data, fds)
            while (message := self._parser.next_message()) is not None:
                self._proxy.telling.message(self._number, self._direction, message)
        except rpc.ProtocolError as failure:
            self._proxy.telling.unreadable(self._number, self._direction, str(failure))
            self._parser = None


DUMP = vsh.Command(
    "rpc-dump", GROUP.keyword, "Print what goes between libvirt's clients and a daemon",
    "Listen as a daemon would, pass on what comes to SERVER and back, and print every message:\n"
    "the client's number, time, direction, procedure, serial and what is in it. Ends when\n"
    "interrupted. The first line that is printed is where to connect to.",
    (
        vsh.Option(
            "server", vsh.Kind.DATA, "unix:PATH or tcp:HOST:PORT of the daemon", required=True
        ),
        vsh.Option(
            "listen", vsh.Kind.STRING,
            "unix:PATH or tcp:HOST:PORT, of loopback for a daemon's unix socket (default: a private"
            " directory)",
        ),
        vsh.Option("clients", vsh.Kind.INT, "end after that many clients have gone"),
        virsh_connection.JSON_LINES,
    ),
    _dump,
)  # fmt: skip
