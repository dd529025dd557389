# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a backup's NBD server listens: a port that is picked, and somebody who answers there."""

import concurrent.futures
import contextlib
import ctypes
import errno
import os
import pathlib
import socket
from collections.abc import Iterator

import libvirt
import pytest

import virtbackup
from tests.live import crashing, machines, nbdclient, steps
from virtbackup.conf import backup_conf
from virtbackup.qemu import listener, monitor, nbdserver

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "nbdcopy")

AUTOPORT = (
    '<address type="ip" host="127.0.0.1" autoport="yes"/>',
    '<address type="ip" host="127.0.0.1" port="0"/>',
)


def document(address: str) -> str:
    return f"<domainbackup>{address}</domainbackup>"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[machines.Machine]:
    """One for all tests: each of them leaves it as it was."""
    with machines.two_disks(tmp_path_factory.mktemp("machine"), size=1 << 20) as running:
        yield running


@pytest.fixture
def domain(machine: machines.Machine) -> Iterator[virtbackup.Domain]:
    with virtbackup.open(machine.uri) as connection:
        yield connection.lookupByID(1)


def started(domain: virtbackup.Domain, address: str) -> backup_conf.IpAddress:
    """Where a backup listens that was started just now."""
    domain.backupStart(document(address))
    found = backup_conf.BackupDef.parse(domain.backupGetXMLDesc()).address
    assert isinstance(found, backup_conf.IpAddress)
    assert domain.backupGetInfo().address == found
    return found


def sockets(machine: machines.Machine) -> list[str]:
    """QEMU's, but for those of its monitors."""
    names = machines.opened(machine.probe.pid)
    return sorted(name for name in names if name.startswith("socket:"))


def connects(address: backup_conf.IpAddress) -> bool:
    try:
        socket.create_connection(address.endpoint, timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture(params=[True, False], ids=["passed", "picked"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether QEMU is handed descriptors."""
    monkeypatch.setattr(monitor.SocketMonitor, "passes_files", request.param)
    return bool(request.param)


@pytest.mark.parametrize("address", AUTOPORT)
def test_a_port_is_picked_and_told(
    machine: machines.Machine, domain: virtbackup.Domain, address: str, passes: bool
) -> None:
    machine.io("vda", "write -P 7 0 64k")
    before, had = machine.state(), sockets(machine)
    found = started(domain, address)
    assert connects(found)
    assert f'host="127.0.0.1" port="{found.port}" autoport="yes"' in domain.backupGetXMLDesc()
    assert nbdclient.read_uri(f"nbd://127.0.0.1:{found.port}/vda")[:65536] == bytes([7]) * 65536
    again = document(AUTOPORT[0]).replace("autoport", f'port="{found.port}" autoport')
    domain.backupStop()
    assert not connects(found)
    assert (machine.state(), sockets(machine)) == (before, had)
    with socket.create_server(("127.0.0.1", found.port or 0)):  # what it was told is no wish
        domain.backupStart(again)
        assert f'port="{found.port}"' not in domain.backupGetXMLDesc()
        domain.backupStop()


def test_two_at_once_never_get_the_same_port(tmp_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        domains = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            machine = stack.enter_context(machines.two_disks(tmp_path / name, size=1 << 20))
            connection = stack.enter_context(virtbackup.open(machine.uri))
            domains.append(connection.lookupByID(1))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(2))
        for _ in range(3):
            one, two = pool.map(lambda domain: started(domain, AUTOPORT[0]), domains)
            assert one.port != two.port
            for domain in domains:
                domain.backupStop()


def test_a_port_that_somebody_was_faster_to_take(
    machine: machines.Machine, domain: virtbackup.Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor.SocketMonitor, "passes_files", False)
    before = machine.state()
    real = listener._bind
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = [other] * 2

        def bind(host: str) -> tuple[socket.socket, bool]:
            return (taken.pop().dup(), False) if taken else real(host)

        monkeypatch.setattr(listener, "_bind", bind)
        found = started(domain, AUTOPORT[0])
        assert (taken, found.port == other.getsockname()[1]) == ([], False)
        domain.backupStop()
        taken += [other] * 99
        with pytest.raises(virtbackup.Error, match="Address already in use") as caught:
            started(domain, AUTOPORT[0])
    assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
    assert len(taken) == 99 - listener.TRIES
    assert machine.state() == before


def test_a_name_that_has_several_addresses(domain: virtbackup.Domain) -> None:
    """QEMU listens on each of them."""
    try:
        places = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=1)}
        for place in places:
            socket.create_server((place, 0), family=_family(str(place))).close()
    except OSError:
        places = {"127.0.0.1"}
    found = started(domain, '<address type="ip" host="localhost" autoport="yes"/>')
    for place in places:
        assert connects(backup_conf.IpAddress(str(place), found.port))
    domain.backupStop()


def _family(place: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in place else socket.AF_INET


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "a free port of 192.0.2.1: Cannot assign requested address"),
        ("2001:db8::1", r"a free port of \[2001:db8::1\]: "),
        ("no-such-host.invalid", "a free port of no-such-host.invalid: "),
        ("a" * 70, "a free port of aaaa"),
    ],
)
def test_where_nobody_can_listen(
    machine: machines.Machine, domain: virtbackup.Domain, host: str, reason: str
) -> None:
    with pytest.raises(virtbackup.Error, match=f"cannot listen on {reason}"):
        started(domain, f'<address type="ip" host="{host}" port="0"/>')
    assert domain.backupCleanup() == []


def test_a_name_has_an_address_of_a_kind_that_the_kernel_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ::1, of localhost, where it was told to have no IPv6: QEMU goes on to the next."""
    kinds = [(socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")]
    found = [(kind, socket.SOCK_STREAM, 0, "", (host, 0)) for kind, host in kinds]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    make = socket.socket

    def without(kind: int = -1, *args: int) -> socket.socket:
        if kind == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return make(kind, *args)

    monkeypatch.setattr(socket, "socket", without)
    made, several = listener._bind("localhost")
    with made:
        assert made.getsockname()[0] == "127.0.0.1"
        assert several


def test_a_directory_that_qemu_has_not(tmp_path: pathlib.Path) -> None:
    """As in a container, or with PrivateTmp of a unit: it has another one of that name, or none."""
    if os.geteuid() != 0:
        pytest.skip("wants root")
    place = tmp_path / "place" / "of" / "ours"
    place.mkdir(parents=True)
    images = machines.two_disks_of(tmp_path)
    for image in ("a.qcow2", "b.raw"):
        machines.image(tmp_path / image, 1 << 20, image.rpartition(".")[2])

    def hide() -> None:
        libc, private = ctypes.CDLL(None), 1 << 18 | 1 << 14
        cover = os.fsencode("".join((*machines.INTO_ROOT[1:], str(place.parent))))
        assert libc.unshare(0x20000) == 0
        assert libc.mount(b"none", b"/", None, ctypes.c_ulong(private), None) == 0
        assert libc.mount(b"none", cover, b"tmpfs", ctypes.c_ulong(0), None) == 0

    there = f"'{place}' is there, but not where QEMU runs"
    with (
        machines.qemu(tmp_path, *images, before_exec=hide) as hidden,
        virtbackup.open(hidden.uri) as connection,
    ):
        before = hidden.state()
        domain = connection.lookupByID(1)
        with pytest.raises(virtbackup.Error, match=f"cannot listen on .*{there}"):
            domain.backupStart(document(f'<address type="unix" path="{place}/nbd.sock"/>'))
        hidden.probe("stop")  # its scratch images are handed over by name then
        scratch = f'<disks><disk name="vda"><source file="{place}/x"/></disk></disks>'
        with pytest.raises(virtbackup.Error, match=f"disk 'vda': .*{there}"):
            domain.backupStart(document(AUTOPORT[0] + scratch))
        assert hidden.state() == before
        assert list(place.iterdir()) == []


def test_a_socket_is_taken_back_where_no_server_is_started(
    machine: machines.Machine, domain: virtbackup.Domain, tmp_path: pathlib.Path
) -> None:
    address = {"type": "unix", "data": {"path": str(tmp_path / "theirs.sock")}}
    machine.probe("nbd-server-start", addr=address)
    before, had = machine.state(), sockets(machine)
    with pytest.raises(virtbackup.Error, match="already in use by another job or client"):
        started(domain, AUTOPORT[0])
    assert (machine.state(), sockets(machine)) == (before, had)
    machine.probe("nbd-server-stop")


def test_a_daemon_that_takes_no_sockets(tmp_path: pathlib.Path) -> None:
    image = machines.image(tmp_path / "d.raw", 1 << 20)
    node = f"driver=raw,node-name=disk,file.driver=file,file.filename={image}"
    with (
        machines.storage_daemon(tmp_path, "--blockdev", node) as machine,
        virtbackup.open(machine.uri) as connection,
    ):
        domain = connection.lookupByID(1)
        assert connects(started(domain, AUTOPORT[1]))
        domain.backupStop()


@pytest.mark.may_skip
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_port_that_is_listened_on_is_taken(host: str) -> None:
    """And none that is left of connections that have ended."""
    try:
        server = socket.create_server((host, 0), family=_family(host))
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        address = backup_conf.IpAddress(host, server.getsockname()[1])
        assert nbdserver.is_taken(address)
        with socket.create_connection(server.getsockname()[:2]) as client:
            accepted, _ = server.accept()
            accepted.close()
            assert client.recv(1) == b""
    assert not nbdserver.is_taken(address)
    assert not nbdserver.is_taken(backup_conf.IpAddress("localhost", address.port))


def test_a_path_that_is_listened_at_is_taken(tmp_path: pathlib.Path) -> None:
    """Who asks is no client of the server."""
    address = backup_conf.UnixAddress(str(tmp_path / "socket"))
    assert not nbdserver.is_taken(address)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address.path)
        server.listen()
        assert nbdserver.is_taken(address)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not nbdserver.is_taken(address)


@pytest.mark.parametrize("kind", ["unix", "ip"])
def test_a_server_that_does_not_listen_fails_the_start(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """As if QEMU's word were not true."""
    before, files = machine.state(), crashing.files(tmp_path, state_dir)
    for look in ("listens", "answers", "is_taken"):
        monkeypatch.setattr(nbdserver, look, lambda *_: False)
    unix = f'<address type="unix" path="{tmp_path}/nbd.sock"/>'
    with pytest.raises(virtbackup.Error, match="the NBD server does not listen on") as caught:
        domain.backupStart(document(unix if kind == "unix" else AUTOPORT[0]))
    assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
    assert domain.backupCleanup() == []
    assert machine.probe.reply("nbd-server-stop")["error"]["desc"] == "NBD server not running"
    assert machine.state() == before
    assert crashing.files(tmp_path, state_dir) == files


def test_a_server_that_somebody_put_elsewhere_in_the_middle_of_a_start(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    tmp_path: pathlib.Path,
) -> None:
    """The disks would be shown where nobody was told of."""
    before = machine.state()

    def late(_: object) -> None:
        machine.probe("nbd-server-stop")
        elsewhere = {"type": "unix", "data": {"path": f"{tmp_path}/theirs.sock"}}
        machine.probe("nbd-server-start", addr=elsewhere)

    unix = f'<address type="unix" path="{tmp_path}/nbd.sock"/>'
    with (
        steps.after("scratch_images", late),
        pytest.raises(virtbackup.Error, match="the NBD server does not listen on"),
    ):
        domain.backupStart(document(unix))
    assert machine.state() == before
