# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sending QEMU's NBD clients away before its server is stopped.

``nbd-server-stop`` waits for its clients, and with it the guest: on some QEMUs for ever, when one
is still in the handshake (``capabilities.NBD_STOP_HANG``), and on all of them when one has stopped
reading while answers wait for it (``capabilities.NBD_STUCK_CLIENT``). QMP has no way to disconnect
such a client. So we do, from outside: a duplicate of QEMU's own socket (pidfd_getfd(2)) is shut
down, while QEMU's loop runs.
"""

import contextlib
import errno
import fcntl
import ipaddress
import logging
import os
import pathlib
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator

from virtbackup import runtime
from virtbackup.conf import backup_conf

logger = logging.getLogger(__name__)

TIMEOUT = 3.0
"""Seconds for QEMU to notice that its clients are gone."""

IpNumber = ipaddress.IPv4Address | ipaddress.IPv6Address

_SO_SNDBUFFORCE = 32
_MUCH_ROOM = 1 << 30
_STUCK = 0.5
"""Seconds in which a client that reads at all reads something."""
_LOOK_AGAIN = 0.02
"""Seconds for QEMU to notice that its clients are gone."""
_UNIX_CONNECTED = "03"
_UNIX_LISTENS = "00010000"
_TCP_LISTEN = "0A"


def send_clients_away(
    pid: int, address: backup_conf.Address, let_qemu_run: Callable[[], object]
) -> int | None:
    """Close ADDRESS to newcomers and end every connection to it; how many clients still hold on.

    PID is QEMU's. LET_QEMU_RUN is called between looks; QEMU's main loop has run when it returns.
    Where we have not the right to duplicate QEMU's sockets (ptrace(2)), nothing is ended and None
    is returned.
    """
    end = time.monotonic() + TIMEOUT
    while True:
        ended = 0
        for duplicate in _duplicates(pid, address):
            with duplicate:
                _hang_up(duplicate)
            ended += 1
        let_qemu_run()
        left = clients(pid, address)
        if not left:
            return 0
        if not ended:
            return None
        if time.monotonic() > end:
            return left


def _hang_up(connection: socket.socket) -> None:
    """End a connection, also for a QEMU that waits until its client reads.

    It waits for room in the socket, and a shut down unix socket has none until the other end is
    read. So there is made more room (socket(7): for which one must be privileged), and a write that
    is tried then fails.
    """
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, option, _MUCH_ROOM)
            return


def describe(address: backup_conf.Address) -> str:
    """An address as people write it."""
    match address:
        case backup_conf.IpAddress(host, port):
            where = f"[{host}]" if ":" in host else host
            return f"a free port of {where}" if port is None else f"{where}:{port}"
        case backup_conf.UnixAddress(path):
            return f"'{path}'"


def stuck_clients(pid: int, address: backup_conf.Address) -> int:
    """How many clients of process PID's server at ADDRESS do not read what waits for them."""
    before = _waiting(pid, address)
    if not any(before.values()):
        return 0
    time.sleep(_STUCK)
    after = _waiting(pid, address)
    return sum(count > 0 and after.get(client) == count for client, count in before.items())


def _waiting(pid: int, address: backup_conf.Address) -> dict[int, int]:
    """Client, by its socket's inode -> bytes sent that it has not read yet (SIOCOUTQ)."""
    waiting = {}
    for duplicate in _duplicates(pid, address):
        with duplicate, contextlib.suppress(OSError):
            count = fcntl.ioctl(duplicate, termios.TIOCOUTQ, bytes(4))
            waiting[os.fstat(duplicate.fileno()).st_ino] = int.from_bytes(count, sys.byteorder)
    return waiting


def pause() -> None:
    """What ``send_clients_away`` may do between two looks at a QEMU that does not answer."""
    time.sleep(_LOOK_AGAIN)


def listens(pid: int, address: backup_conf.Address) -> bool:
    """Whether anybody listens on ADDRESS in the network namespace of process PID. Nothing is sent:
    a connection made to find out would be one more client to wait for."""
    return bool(_inodes(pid, address)[0])


def clients(pid: int, address: backup_conf.Address) -> int:
    """How many are connected to ADDRESS in the network namespace of process PID."""
    return len(_inodes(pid, address)[1])


def listening(pid: int) -> tuple[backup_conf.Address, ...]:
    """Every address on which process PID listens; none where we may not look."""
    own = _own(pid)
    unix = (line.split(maxsplit=7) for line in _lines(pid, "unix"))
    paths = {
        fields[7]
        for fields in unix
        if len(fields) == 8 and fields[3] == _UNIX_LISTENS and int(fields[6]) in own
    }
    tcp = (line.split() for table in ("tcp", "tcp6") for line in _lines(pid, table))
    places = {fields[1] for fields in tcp if fields[3] == _TCP_LISTEN and int(fields[9]) in own}
    return (
        *map(backup_conf.UnixAddress, sorted(paths)),
        *(_parse_place(place) for place in sorted(places)),
    )


def is_chardev(address: backup_conf.Address, chardevs: Iterable[str]) -> bool:
    """Whether one of QEMU's character devices, as they are told of, listens on ADDRESS."""
    match address:
        case backup_conf.IpAddress(_, port):
            where = f":{port},server"  # the host may be written in more than one way
        case backup_conf.UnixAddress(path):
            where = f"unix:{path},server"
    return any(where in chardev for chardev in chardevs)


def is_reached(pid: int | None, address: backup_conf.Address) -> bool:
    """Whether who connects to ADDRESS from here comes to process PID's server, as far as can be
    seen: the same network and file systems, and a socket of that process listens there. Not by a
    host's name, which would have to be looked up."""
    if pid is None:
        return False
    if isinstance(address, backup_conf.IpAddress) and _number(address.host) is None:
        return False
    try:
        for kind in ("net", "mnt"):
            ours, theirs = (
                pathlib.Path(f"/proc/{who}/ns/{kind}").readlink() for who in ("self", pid)
            )
            if ours != theirs:
                return False
    except OSError:
        return False
    return not _own(pid).isdisjoint(_inodes(pid, address)[0])


def is_taken(address: backup_conf.Address) -> bool:
    """Whether somebody has ADDRESS, a path or a port of an address by its number, here: by trying
    to. The kernel's tables, which tell of all sockets, may take milliseconds to be read."""
    try:
        match address:
            case backup_conf.UnixAddress(path):
                # One of another type finds the server's, and is no client of it.
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
                    probe.connect(path)
            case backup_conf.IpAddress() if _number(address.host) is not None:
                host, port = address.endpoint
                numeric = socket.AI_NUMERICHOST
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=numeric)
                with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # over ended ones
                    probe.bind(found[0][4])
    except OSError as failure:
        return failure.errno in (errno.EADDRINUSE, errno.EPROTOTYPE)
    return False


def answers(address: backup_conf.Address) -> bool:
    """Whether anybody listens on ADDRESS."""
    try:
        match address:
            case backup_conf.IpAddress():
                host, port = address.endpoint
                host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
                socket.create_connection((host, port), timeout=2).close()
            case backup_conf.UnixAddress(path):
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.settimeout(2)
                    probe.connect(path)
    except OSError as failure:
        # As many wait to be taken on as may, or it is one of another kind, as of datagrams.
        return failure.errno in (errno.EAGAIN, errno.EPROTOTYPE)
    return True


def _duplicates(pid: int, address: backup_conf.Address) -> Iterator[socket.socket]:
    """Duplicates of QEMU's sockets at ADDRESS, the listening one first."""
    listening, connected = _inodes(pid, address)
    if not listening and not connected:
        return
    sockets = runtime.sockets_of(pid).items()
    with contextlib.suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            for inode in (*listening, *connected):
                for number in [number for number, found in sockets if found == inode]:
                    try:
                        fd = runtime.duplicate(process, number)
                    except OSError as failure:
                        logger.debug("pidfd_getfd fd=%d reason=%s", number, failure)
                        continue
                    if os.fstat(fd).st_ino == inode:
                        yield socket.socket(fileno=fd)
                    else:  # it was closed meanwhile, and the number is another file's
                        os.close(fd)
        finally:
            os.close(process)


def _own(pid: int) -> set[int]:
    """The sockets of process PID, by inode; none where we may not look."""
    return set(runtime.sockets_of(pid).values())


def _inodes(pid: int, address: backup_conf.Address) -> tuple[list[int], list[int]]:
    """(listening, connected) sockets at ADDRESS in PID's network namespace, by inode (proc(5))."""
    match address:
        case backup_conf.UnixAddress(path):
            return _unix_inodes(_lines(pid, "unix"), path)
        case backup_conf.IpAddress():
            host, port = address.endpoint
            lines = [*_lines(pid, "tcp"), *_lines(pid, "tcp6")]
            listening, connected = _tcp_inodes(lines, _number(host), port)
            own = _own(pid)
            if not own.isdisjoint(listening):
                # Others may serve the same port of other addresses.
                connected = [inode for inode in connected if inode in own]
            return listening, connected


def _unix_inodes(lines: list[str], path: str) -> tuple[list[int], list[int]]:
    listening: list[int] = []
    connected: list[int] = []
    for line in lines:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == path:
            (connected if fields[5] == _UNIX_CONNECTED else listening).append(int(fields[6]))
    return listening, connected


def _tcp_inodes(lines: list[str], host: IpNumber | None, port: int) -> tuple[list[int], list[int]]:
    """Those at HOST; with None at any."""
    listening: list[int] = []
    connected: list[int] = []
    for line in lines:
        fields = line.split()
        here, _, there = fields[1].partition(":")
        inode = int(fields[9])
        if not inode or int(there, 16) != port:
            continue
        number = _parse_number(here)
        if fields[3] == _TCP_LISTEN:
            if host in (None, number):
                listening.append(inode)
        elif host is None or host.is_unspecified or number == host:
            connected.append(inode)
    return listening, connected


def _number(host: str) -> IpNumber | None:
    """The address that HOST is, of whichever interface, if it is no name."""
    try:
        return _plain(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return None


def _parse_place(text: str) -> backup_conf.IpAddress:
    """An address and a port as proc(5) has them."""
    number, _, port = text.partition(":")
    return backup_conf.IpAddress(str(_parse_number(number)), int(port, 16))


def _parse_number(text: str) -> IpNumber:
    """An address as proc(5) has it: words in the machine's byte order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    number = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return _plain(ipaddress.ip_address(number))


def _plain(number: IpNumber) -> IpNumber:
    """What is IPv4 is told so."""
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return mapped or number


def _lines(pid: int, table: str) -> list[str]:
    with contextlib.suppress(OSError):
        return (
            pathlib.Path(f"/proc/{pid}/net/{table}")
            .read_text(errors="surrogateescape")
            .splitlines()[1:]
        )
    return []
