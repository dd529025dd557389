# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket of QEMU's NBD server, where it is made here and handed over.

A free TCP port: QEMU tells nobody which one it was given, so it is taken here and, where QEMU takes
descriptors, handed over with the socket that has it: nobody else can come between. Else it is let
go of again, and who finds it in use tries the next.

A unix socket, where QEMU is another user's: that one need not be allowed to make one there.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import socket
from collections.abc import Iterator

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf
from virtbackup.qemu import nbdserver

_BACKLOG = 128
"""Clients that may wait to be taken on, as QEMU's own socket has it for any number of clients."""
TRIES = 20
"""How many ports are tried where none can be handed over."""


@dataclasses.dataclass
class Listener:
    """Where the NBD server is to listen."""

    address: backup_conf.Address
    """With its port."""
    _socket: socket.socket | None = None

    @property
    def fd(self) -> int | None:
        """The socket that has the port, to be handed over; None where there is none."""
        return None if self._socket is None else self._socket.fileno()

    def close(self) -> None:
        """Let go of the socket: once QEMU has it, or a client would be ours."""
        if self._socket is not None:
            self._socket.close()

    def withdraw(self) -> None:
        """QEMU does not take it: remove what was made for it."""
        if self._socket is not None and isinstance(self.address, backup_conf.UnixAddress):
            pathlib.Path(self.address.path).unlink(missing_ok=True)


@contextlib.contextmanager
def reserve(address: backup_conf.Address, by_fd: bool, uid: int | None) -> Iterator[Listener]:
    """The listener for ADDRESS, of user UID's QEMU, which may be anybody's where that is not known:
    with a port that is free now, where that is to be picked. BY_FD: a socket can be handed over.

    Errors: VIR_ERR_OPERATION_FAILED where nobody can listen there.
    """
    if isinstance(address, backup_conf.UnixAddress) and by_fd and uid != os.geteuid():
        with _at(address.path) as made:
            yield Listener(address, made)
        return
    if isinstance(address, backup_conf.UnixAddress) or not address.picks_port:
        yield Listener(address)
        return
    try:
        made, several = _bind(address.host)
    except OSError as failure:
        where = nbdserver.describe(dataclasses.replace(address, port=None))
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_FAILED,
            f"cannot listen on {where}: {failure.strerror or failure}",
        ) from failure
    with made:
        picked = dataclasses.replace(address, port=made.getsockname()[1])
        # QEMU listens on every address that a name has, which one descriptor cannot.
        if not by_fd or several:
            made.close()
            yield Listener(picked)
            return
        made.listen()
        yield Listener(picked, made)


def _at(path: str) -> socket.socket:
    """A unix socket that listens at PATH, where nobody does. Errors: as ``reserve``."""
    made = socket.socket(socket.AF_UNIX)
    try:
        pathlib.Path(path).unlink(missing_ok=True)
        made.bind(path)
        made.listen(_BACKLOG)
    except OSError as failure:
        made.close()
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_FAILED,
            f"cannot listen on '{path}': {failure.strerror or failure}",
        ) from failure
    return made


def _bind(host: str) -> tuple[socket.socket, bool]:
    """(A socket with a free port of HOST, whether it has other addresses, too). Errors: OSError."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as failure:  # no name of a host
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from failure
    places = {place for *_, place in found}
    failures = []
    for family, kind, protocol, _, place in found:
        with contextlib.ExitStack() as undo:
            try:
                made = undo.enter_context(socket.socket(family, kind, protocol))
                if family == socket.AF_INET6:  # "::" is all addresses, as QEMU has it
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                made.bind(place)
                # Who listens there next need not wait for what is left of our clients' connections.
                # Not before: two could be given one port.
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            except OSError as failure:
                failures.append(failure)
            else:
                undo.pop_all()
                return made, len(places) > 1
    raise failures[0]


def same_network(pid: int | None) -> bool:
    """Whether process PID has our network, as far as can be seen: it may have a port of its own
    that is in use here."""
    try:
        ours, theirs = (pathlib.Path(f"/proc/{who}/ns/net").readlink() for who in ("self", pid))
    except OSError:
        return True
    return ours == theirs
