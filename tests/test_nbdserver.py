# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a process listens, and which of that is a monitor."""

import contextlib
import os
import pathlib
import socket

import pytest

from tests.live import places
from virtbackup import runtime
from virtbackup.conf import backup_conf
from virtbackup.qemu import nbdserver

CHARDEVS = (
    "disconnected:unix:/run/serial 1,server=on",
    "unix:/run/qmp.sock,server",
    "tcp:127.0.0.1:4444,server=on <-> 127.0.0.1:52236",
    "unix:/run/agent.sock",
    "pty:/dev/pts/3",
)
"""As QEMU 5.2 and newer ones tell of them, with a client and without."""


@pytest.mark.parametrize(
    ("address", "is_one"),
    [
        (backup_conf.UnixAddress("/run/serial 1"), True),
        (backup_conf.UnixAddress("/run/qmp.sock"), True),
        (backup_conf.UnixAddress("/run/agent.sock"), False),
        (backup_conf.UnixAddress("/run/qmp"), False),
        (backup_conf.UnixAddress("/qmp.sock"), False),
        (backup_conf.IpAddress("127.0.0.1", 4444), True),
        (backup_conf.IpAddress("::1", 4444), True),
        (backup_conf.IpAddress("127.0.0.1", 52236), False),
        (backup_conf.IpAddress("127.0.0.1", 444), False),
    ],
)
def test_which_address_is_a_character_device(address: backup_conf.Address, is_one: bool) -> None:
    assert nbdserver.is_chardev(address, CHARDEVS) == is_one


def test_where_a_process_listens(tmp_path: pathlib.Path) -> None:
    before = set(nbdserver.listening(os.getpid()))
    with contextlib.ExitStack() as stack:
        path = str(tmp_path / "a socket")
        here = stack.enter_context(socket.socket(socket.AF_UNIX))
        here.bind(path)
        assert set(nbdserver.listening(os.getpid())) == before
        here.listen()
        ip = stack.enter_context(socket.create_server(("127.0.0.2", 0)))
        port = ip.getsockname()[1]
        client = stack.enter_context(socket.create_connection(("127.0.0.2", port)))
        peer = stack.enter_context(ip.accept()[0])
        found = {backup_conf.UnixAddress(path), backup_conf.IpAddress("127.0.0.2", port)}
        assert set(nbdserver.listening(os.getpid())) == before | found
        assert nbdserver.clients(os.getpid(), backup_conf.IpAddress("127.0.0.2", port)) == 1
        assert nbdserver.clients(os.getpid(), backup_conf.UnixAddress(path)) == 0
        assert client.getsockname() == peer.getpeername()
    assert set(nbdserver.listening(os.getpid())) == before


@pytest.mark.parametrize("host", ["::ffff:127.0.0.1", pytest.param("::1%1", marks=places.IPV6)])
def test_an_address_that_can_be_written_in_another_way(host: str) -> None:
    """The kernel tells of neither that it is of IPv4, nor of which interface it is."""
    family, kind, protocol, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as server:
        server.bind(place)
        server.listen()
        address = backup_conf.IpAddress(host, server.getsockname()[1])
        with socket.create_connection(server.getsockname()[:2]), server.accept()[0]:
            assert nbdserver.listens(os.getpid(), address)
            assert nbdserver.clients(os.getpid(), address) == 1


def test_a_server_that_takes_nobody_on_is_there(tmp_path: pathlib.Path) -> None:
    """As many clients wait as may: nobody's socket is to be put in its place."""
    path = str(tmp_path / "busy.sock")
    address = backup_conf.UnixAddress(path)
    with socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
        server.bind(path)
        assert not nbdserver.answers(address)
        server.listen(0)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(path)
        assert nbdserver.answers(address)
    assert not nbdserver.answers(address)


def test_a_server_of_datagrams_is_there(tmp_path: pathlib.Path) -> None:
    """As that of a system's log, which QEMU would put its own socket in place of."""
    address = backup_conf.UnixAddress(str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(address.path)
        assert nbdserver.answers(address)
    assert not nbdserver.answers(address)


def test_a_descriptor_that_is_another_sockets_by_now(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where QEMU has closed a client's since it was looked for, and opened something else."""
    address = backup_conf.UnixAddress(str(tmp_path / "nbd.sock"))
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as server:
        server.bind(address.path)
        server.listen()
        of_server = os.fstat(server.fileno()).st_ino
        monkeypatch.setattr(runtime, "sockets_of", lambda pid: {ours.fileno(): of_server})
        assert nbdserver.send_clients_away(os.getpid(), address, lambda: None) == 0
        ours.sendall(b"alive")
        assert theirs.recv(5) == b"alive"


def test_nobody_listens_where_there_is_no_process() -> None:
    assert nbdserver.listening(1 << 30) == ()
