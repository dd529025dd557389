# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proposed calls on libvirt-python's own objects, as if the patch had been merged."""

import contextlib
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import pytest

from tests.live import libvirtd
from tests.live.libvirtd import disk_xml, image, pattern
from virtbackup import extend

pytestmark = pytest.mark.needs("libvirtd", "qemu-system-x86_64", "nbdcopy", "unshare")


@pytest.fixture(scope="module")
def defined(libvirt_host: libvirtd.Host) -> Iterator[None]:
    """Two running domains, of one disk each."""
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(("one", "two"), 1):
            path = libvirt_host.path(f"drop-in-{name}")
            path.mkdir()
            devices = disk_xml("vda", image(path / "a.qcow2", number))
            stack.enter_context(libvirt_host.domain(f"drop-in-{name}", devices))
        yield


@pytest.fixture
def installed() -> Iterator[None]:
    before = dict(vars(libvirt.virDomain)), dict(vars(libvirt)), dict(vars(libvirt.virConnect))
    extend.install(libvirt)
    yield
    extend.uninstall(libvirt)
    after = dict(vars(libvirt.virDomain)), dict(vars(libvirt)), dict(vars(libvirt.virConnect))
    assert after == before


@pytest.fixture
def dom(libvirt_host: libvirtd.Host, defined: None, installed: None) -> "libvirt.virDomain":
    return libvirt_host.connection.lookupByName("drop-in-one")


def document(path: pathlib.Path) -> str:
    return f'<domainbackup><address type="unix" path="{path}"/></domainbackup>'


def code_of(error: "pytest.ExceptionInfo[libvirt.libvirtError]") -> tuple[int, int]:
    return error.value.get_error_code(), error.value.get_error_domain()


def test_a_backup_on_the_callers_own_connection(
    dom: "libvirt.virDomain", tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = tmp_path / "nbd.sock"
    typed: extend.virDomain = dom
    with monkeypatch.context() as alone:
        for name in ("open", "openAuth", "openReadOnly"):
            alone.delattr(libvirt, name)
        _back_up(typed, socket)
    assert extend.domain(dom).branchList() == typed.branchList() == []


def _back_up(dom: "libvirt.virDomain", socket: pathlib.Path) -> None:
    typed: extend.virDomain = dom
    assert typed.backupStart(document(socket), 0) == 0
    assert libvirtd.read(socket, "vda") == pattern(1)
    assert typed.backupGetInfo().state == "running"
    assert 'exportname="vda"' in extend.domain(dom).backupGetXMLDesc()
    with pytest.raises(libvirt.libvirtError) as error:
        dom.backupGetXMLDesc()  # libvirt's own, of libvirt's own backup
    assert error.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
    assert typed.backupStop() == 0


def test_errors_are_as_libvirts(dom: "libvirt.virDomain", tmp_path: pathlib.Path) -> None:
    xml = document(tmp_path / "nbd.sock")
    refused: tuple[tuple[Callable[[], Any], int], ...] = (
        (lambda: dom.backupStart(xml, 1 << 9), libvirt.VIR_ERR_INVALID_ARG),
        (lambda: dom.backupStart("<domainbackup/>"), libvirt.VIR_ERR_CONFIG_UNSUPPORTED),
        (lambda: dom.backupStop(), libvirt.VIR_ERR_NO_DOMAIN_BACKUP),
        (
            lambda: dom.backupStart(xml, libvirt.VIR_DOMAIN_BACKUP_START_QUIESCE),
            libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
        ),
    )
    for call, code in refused:
        with pytest.raises(libvirt.libvirtError) as error:
            call()
        assert error.value.get_error_code() == code
    assert "QEMU guest agent is not configured" in str(error.value)


def test_connections_of_every_kind(
    libvirt_host: libvirtd.Host, dom: "libvirt.virDomain", tmp_path: pathlib.Path
) -> None:
    """By a callback that would ask for a password, by another transport, and read-only."""
    uri = f"qemu+unix:///system?socket={libvirt_host.daemon.socket}"
    xml = document(tmp_path / "nbd.sock")
    auth = [[libvirt.VIR_CRED_PASSPHRASE], lambda *_: 0, None]
    with contextlib.closing(libvirt.openAuth(uri, auth, 0)) as connection:
        connection.lookupByName("drop-in-one").backupStart(xml)
    dom.backupStop()
    with contextlib.closing(libvirt.openReadOnly(uri)) as connection:
        with pytest.raises(libvirt.libvirtError) as error:
            connection.lookupByName("drop-in-one").backupStart(xml)
        assert code_of(error) == (libvirt.VIR_ERR_OPERATION_DENIED, libvirt.VIR_FROM_DOMAIN)
        text = "operation forbidden: read only access prevents virDomainBackupStart"
        assert str(error.value) == text


def test_a_backup_that_is_to_end_with_its_connection(
    libvirt_host: libvirtd.Host, dom: "libvirt.virDomain", tmp_path: pathlib.Path
) -> None:
    flag = libvirt.VIR_DOMAIN_BACKUP_START_AUTODESTROY
    connection = libvirt.open(libvirt_host.daemon.uri)
    connection.lookupByName("drop-in-one").backupStart(document(tmp_path / "a"), flag)
    connection.lookupByName("drop-in-two").backupStart(document(tmp_path / "b"))
    assert connection.close() == 0
    with pytest.raises(libvirt.libvirtError, match="no domain backup job present"):
        dom.backupStop()
    libvirt_host.connection.lookupByName("drop-in-two").backupStop()


_LOOP = """
import pathlib, sys, threading, libvirt
from tests.live import libvirtd
from virtbackup import extend
libvirt.virEventRegisterDefaultImpl()
def loop():
    while True:
        libvirt.virEventRunDefaultImpl()
threading.Thread(target=loop, daemon=True).start()
extend.install(libvirt)
connection = libvirt.open(sys.argv[1])
connection.setKeepAlive(5, 3)
failures, rounds = [], int(sys.argv[3])
def work(number, name):
    try:
        dom = connection.lookupByName("drop-in-" + name)
        socket = pathlib.Path(sys.argv[2], name)
        xml = f'<domainbackup><address type="unix" path="{socket}"/></domainbackup>'
        for _ in range(rounds):
            dom.backupStart(xml)
            assert libvirtd.read(socket, "vda") == libvirtd.pattern(number)
            assert dom.backupGetInfo().state == "running"
            dom.backupStop()
    except BaseException as failure:
        failures.append(failure)
threads = [threading.Thread(target=work, args=a) for a in enumerate(("one", "two"), 1)]
for thread in threads: thread.start()
for thread in threads: thread.join()
connection.close()
assert not failures, failures
"""


def test_two_threads_beside_libvirts_event_loop(
    libvirt_host: libvirtd.Host, defined: None, tmp_path: pathlib.Path
) -> None:
    argv = [sys.executable, "-c", _LOOP, libvirt_host.daemon.uri, str(tmp_path), "5"]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_connection_that_lost_its_daemon(
    libvirt_host: libvirtd.Host, dom: "libvirt.virDomain", tmp_path: pathlib.Path
) -> None:
    """It is its owner's to open anew; what was started on it runs on."""
    dom.backupStart(document(tmp_path / "nbd.sock"))
    libvirt_host.daemon.kill()
    libvirt_host.daemon.start()
    libvirt_host.connection = libvirt.open(libvirt_host.daemon.uri)
    again = libvirt_host.connection.lookupByName("drop-in-one")
    assert again.backupGetInfo().state == "running"
    again.backupStop()
