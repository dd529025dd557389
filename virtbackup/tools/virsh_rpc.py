# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command about libvirt's wire protocol itself, for those who develop it."""

import contextlib
import datetime
import os
import selectors
import socket
import threading
from typing import TYPE_CHECKING

from virtbackup.tools import virsh_connection, vsh

if TYPE_CHECKING:
    from virtbackup.remote import dump, transport

GROUP = vsh.Group("rpc", "Wire protocol")


def _dump(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup import runtime
    from virtbackup.remote import transport

    try:
        server = transport.parse_address(args.text("server"))
        given = args.optional("listen")
        address = None if given is None else transport.parse_address(given)
    except ValueError as error:
        raise vsh.UsageError(str(error)) from error
    if "tls" in (server.kind, address and address.kind):
        raise vsh.UsageError("what goes over tls cannot be read on the way")
    with contextlib.ExitStack() as stack:
        if address is None:
            directory = stack.enter_context(runtime.private_directory())
            address = transport.Address("unix", path=str(directory / "libvirt-sock"))
        try:
            listening = stack.enter_context(transport.listen(address))
        except OSError as error:
            raise vsh.Failure(f"cannot listen on '{address}': {error.strerror}") from error
        if address.kind == "unix":
            stack.callback(os.unlink, address.path)
        stack.enter_context(vsh.until_interrupted())
        shell.print(str(address))
        vsh.flush()
        Proxy(shell, server).serve(listening, args.number("clients") or 0)


class Proxy:
    """Passes on what clients and a server say, descriptors included, and prints it."""

    def __init__(self, shell: virsh_connection.Shell, server: "transport.Address") -> None:
        self._shell = shell
        self._server = server
        self._printing = threading.Lock()

    def serve(self, listening: socket.socket, clients: int) -> None:
        """Until that many CLIENTS have come and gone; 0: for ever."""
        threads: list[threading.Thread] = []
        for number in range(1, clients + 1) if clients else iter(lambda: len(threads) + 1, 0):
            client, _ = listening.accept()
            thread = threading.Thread(target=self._pass, args=(number, client), daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()

    def _pass(self, number: int, client: socket.socket) -> None:
        from virtbackup.remote import transport

        with client, contextlib.ExitStack() as stack:
            try:
                server = stack.enter_context(transport.connected(self._server))
            except OSError as error:
                self._print(number, f"cannot connect to '{self._server}': {error.strerror}")
                return
            self._print(number, "connected")
            both = selectors.DefaultSelector()
            both.register(client, selectors.EVENT_READ, _Way(self, number, "->", client, server))
            both.register(server, selectors.EVENT_READ, _Way(self, number, "<-", server, client))
            with both, contextlib.suppress(OSError):
                while all(key.data.carry() for key, _ in both.select()):
                    pass
            self._print(number, "closed")

    def show(self, number: int, text: str) -> None:
        """Print a line about a client."""
        self._print(number, text)

    def _print(self, number: int, text: str) -> None:
        with self._printing:
            self._shell.print(f"{number} {text}")
            vsh.flush()


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

    def carry(self) -> bool:
        """Pass on what has come; whether the side is still there. Errors: OSError."""
        from virtbackup.remote import transport

        data, fds = transport.read(self._source)
        try:
            if not data:
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

    def _show(self, data: bytes, fds: list[int]) -> None:
        from virtbackup.remote import dump, rpc

        if self._parser is None:
            return
        try:
            self._parser.receive_data(data, fds)
            while (message := self._parser.next_message()) is not None:
                now = datetime.datetime.now(datetime.timezone.utc)
                self._proxy.show(self._number, dump.line(now, self._direction, message))
        except rpc.ProtocolError as failure:
            self._proxy.show(self._number, f"{self._direction} no message: {failure}")
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
            "unix:PATH or tcp:HOST:PORT (default: a private directory)",
        ),
        vsh.Option("clients", vsh.Kind.INT, "end after that many clients have gone"),
    ),
    _dump,
)  # fmt: skip
