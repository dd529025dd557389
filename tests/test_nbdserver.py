# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a process listens, and which of that is a monitor."""

import contextlib
import os
import pathlib
import socket

import pytest

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


def test_nobody_listens_where_there_is_no_process() -> None:
    assert nbdserver.listening(1 << 30) == ()
