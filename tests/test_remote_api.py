# SPDX-License-Identifier: LGPL-2.1-or-later
"""The API through a daemon, beside the same local: answers and errors are equal, in every field.

tests/test_test_driver.py is the suite that runs whole on both.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import pytest

import virtbackup
from tests import daemon_scene, daemons
from virtbackup import hypervisor
from virtbackup.conf import backup_conf, virtbackup_conf
from virtbackup.qemu import domain_obj
from virtbackup.remote import transport
from virtbackup.test import test_driver
from virtbackup.tools import pull

DEFAULT = "test:///default"
RECORDINGS = test_driver.RECORDINGS


@pytest.fixture(autouse=True)
def state(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pathlib.Path]:
    directory = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(directory))
    monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", str(directory))
    yield directory
    assert list(directory.iterdir()) == []
    assert not daemons.threads_left("rpc ", "daemon", "worker-", "fake ")


@dataclasses.dataclass
class Pair:
    """Connections to two hypervisors that are alike."""

    local: virtbackup.Connection
    remote: virtbackup.Connection
    directory: pathlib.Path

    def same(self, do: Callable[[virtbackup.Connection, str], Any]) -> Any:
        """What DO returns or raises with either connection, and a document for it; it is equal."""
        told = []
        for name, connection in (("one", self.local), ("two", self.remote)):
            place = self.directory / name / "nbd.sock"
            xml = f'<domainbackup><address type="unix" path="{place}"/></domainbackup>'
            told.append(normal(functools.partial(do, connection, xml), place))
        assert told[0] == told[1]
        return told[0]


def normal(do: Callable[[], Any], place: pathlib.Path) -> Any:
    """What DO returns or raises, without what no two backups share."""
    try:
        found = do()
    except libvirt.libvirtError as failure:
        return type(failure), *(plain(part, place) for part in failure.err)
    return plain(found, place)


def plain(value: Any, place: pathlib.Path) -> Any:
    match value:
        case str():
            return value.replace(str(place), "NBD")
        case backup_conf.BackupInfo():
            told = [
                dataclasses.replace(
                    disk,
                    scratch_free=None,
                    scratch_used=None,
                    since=disk.since and backup_conf.Point("ID", 0),
                    type_reason=disk.type_reason and re.sub("[0-9a-f]{8}", "ID", disk.type_reason),
                )
                for disk in value.disks
            ]
            known = value.id and "ID", value.started > 0
            address = plain(value.address, place)
            info = dataclasses.replace(
                value, disks=tuple(told), id=None, started=0, address=address
            )
            return known, info
        case backup_conf.UnixAddress():
            return dataclasses.replace(value, path=plain(value.path, place))
        case backup_conf.Branch():
            without = tuple(dataclasses.replace(d, point=None) for d in value.disks)
            return dataclasses.replace(value, disks=without), [d.point is None for d in value.disks]
        case list():
            return [plain(item, place) for item in value]
    return value


@pytest.fixture
def pair(tmp_path: pathlib.Path) -> Iterator[Pair]:
    """Two fakes that were made from one recording."""
    newest = max(RECORDINGS.glob("qemu-*.jsonl"), key=test_driver._version_in)
    uris = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(newest, tmp_path / name / "recording.jsonl")
        uris.append(f"test://{tmp_path / name}")
    with contextlib.ExitStack() as stack:
        open = functools.partial(test_driver.open, uris[1], False)
        address = transport.Address("unix", path=str(tmp_path / "sock"))
        served = stack.enter_context(daemons.serving([(uris[1], open)], address))
        local = stack.enter_context(virtbackup.open(uris[0]))
        remote = stack.enter_context(virtbackup.open(served.uri))
        yield Pair(local, remote, tmp_path)


def vm(connection: virtbackup.Connection) -> virtbackup.Domain:
    return connection.lookupByName("vm")


def with_branch(xml: str, attributes: str = "") -> str:
    return xml.replace("<address", f'<branch name="b1" {attributes}/><address')


def listing(xml: str, disks: str) -> str:
    return xml.replace("</domainbackup>", f"<disks>{disks}</disks></domainbackup>")


Do = Callable[[virtbackup.Connection, str], Any]

ANSWERS: dict[str, Do] = {
    "type": lambda c, x: c.getType(),
    "version": lambda c, x: c.getVersion(),
    "hostname": lambda c, x: c.getHostname(),
    "alive": lambda c, x: c.isAlive(),
    "domains": lambda c, x: [(d.name(), d.UUIDString(), d.ID()) for d in c.listAllDomains()],
    "state": lambda c, x: vm(c).state(),
    "xml": lambda c, x: vm(c).XMLDesc(),
    "info": lambda c, x: vm(c).info()[:4],
    "kind of machine": lambda c, x: vm(c).OSType(),
    "persistent": lambda c, x: vm(c).isPersistent(),
    "library": lambda c, x: c.getLibVersion(),
    "autostart": lambda c, x: vm(c).autostart(),
    "saved state": lambda c, x: vm(c).hasManagedSaveImage(),
    "snapshots": lambda c, x: vm(c).snapshotNum(),
    "messages": lambda c, x: vm(c).messages(),
    "security label": lambda c, x: vm(c).securityLabel(),
    "security model": lambda c, x: c.getSecurityModel(),
    "definition": lambda c, x: vm(c).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE),
    "by id": lambda c, x: c.lookupByID(1).name(),
    "by uuid": lambda c, x: c.lookupByUUIDString(vm(c).UUIDString().upper()).name(),
    "cleanup": lambda c, x: vm(c).backupCleanup(),
    "branches": lambda c, x: vm(c).branchList(),
}

REFUSALS: dict[str, Do] = {
    "no domain": lambda c, x: c.lookupByName("nope"),
    "a name that no domain has": lambda c, x: c.lookupByName("a\0b"),
    "no id": lambda c, x: c.lookupByID(4711),
    "an id that no domain has": lambda c, x: c.lookupByID(1 << 40),
    "no uuid": lambda c, x: c.lookupByUUIDString("0" * 32),
    "no backup": lambda c, x: vm(c).backupStop(),
    "no backup to cancel": lambda c, x: vm(c).backupStop(1),
    "no backup to describe": lambda c, x: vm(c).backupGetXMLDesc(),
    "no backup to tell of": lambda c, x: vm(c).backupGetInfo(),
    "flags": lambda c, x: vm(c).backupStart(x, 1 << 20),
    "no document": lambda c, x: vm(c).backupStart(""),
    "no xml": lambda c, x: vm(c).backupStart("<domainbackup>"),
    "not that xml": lambda c, x: vm(c).backupStart("<domain/>"),
    "no address": lambda c, x: vm(c).backupStart("<domainbackup/>"),
    "a document with a NUL": lambda c, x: vm(c).backupStart(x + "\0"),
    "a document with half a character": lambda c, x: vm(c).backupStart(x + "\ud800"),
    "a document that is too large": lambda c, x: vm(c).backupStart(x + " " * (5 << 20)),
    "a large document": lambda c, x: vm(c).backupStart(x + " " * (1 << 20)),
    "an unknown disk": lambda c, x: vm(c).backupStart(listing(x, '<disk name="vdz"/>')),
    "a read-only disk": lambda c, x: vm(c).backupStart(listing(x, '<disk name="sdc"/>')),
    "an empty drive": lambda c, x: vm(c).backupStart(listing(x, '<disk name="sdd"/>')),
    "a disk twice": lambda c, x: vm(c).backupStart(listing(x, '<disk name="vda"/>' * 2)),
    "incremental without a branch": lambda c, x: vm(c).backupStart(
        listing(x, '<disk name="vda" type="incremental"/>')
    ),
    "no agent": lambda c, x: vm(c).backupStart(x, virtbackup.VIR_DOMAIN_BACKUP_START_QUIESCE),
    "no branch": lambda c, x: vm(c).branchDelete("nope"),
    "a branch without a name": lambda c, x: vm(c).branchCreate(""),
    "a branch with our prefix": lambda c, x: vm(c).branchCreate("virtbackup-x"),
    "no event of that kind": lambda c, x: c.domainEventRegisterAny(None, 8, print, None),
}


@pytest.mark.parametrize("do", ANSWERS.values(), ids=ANSWERS)
def test_answers_are_equal(pair: Pair, do: Do) -> None:
    pair.same(do)


@pytest.mark.parametrize("do", REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_equal(pair: Pair, do: Do) -> None:
    told = pair.same(do)
    assert told[0] is virtbackup.Error
    pair.same(lambda c, x: c.isAlive())


def test_a_backup_with_a_branch_is_equal(pair: Pair) -> None:
    same = pair.same
    same(lambda c, x: vm(c).backupStart(with_branch(x)))
    running, info = same(lambda c, x: vm(c).backupGetInfo())
    assert running == ("ID", True)
    assert [disk.name for disk in info.disks] == ["sdb", "vda"]
    same(lambda c, x: vm(c).backupGetXMLDesc())
    refused = same(lambda c, x: vm(c).backupStart(x))
    assert refused[1] == libvirt.VIR_ERR_OPERATION_INVALID
    same(lambda c, x: vm(c).branchDelete("b1"))  # of a backup that runs
    same(lambda c, x: vm(c).backupStop())
    assert len(same(lambda c, x: vm(c).branchList())) == 1
    auto = '<disk name="vda" type="auto"/><disk name="sdb" type="auto"/>'
    same(lambda c, x: vm(c).backupStart(listing(with_branch(x), auto)))
    _, info = same(lambda c, x: vm(c).backupGetInfo())
    assert "incremental" in {disk.type for disk in info.disks}
    same(lambda c, x: vm(c).backupStop(virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL))
    same(lambda c, x: vm(c).branchDelete("b1"))
    same(lambda c, x: vm(c).branchCreate("b2"))
    same(lambda c, x: vm(c).branchCreate("b2"))  # which there is
    assert [branch.name for branch, _ in same(lambda c, x: vm(c).branchList())] == ["b2"]
    same(lambda c, x: vm(c).branchDelete("b2"))


def test_a_read_only_connection_is_equal(pair: Pair) -> None:
    def read_only(c: virtbackup.Connection, x: str) -> None:
        with virtbackup.open(c.getURI(), readonly=True) as reader:
            vm(reader).XMLDesc()
            vm(reader).backupStart(x)

    told = pair.same(read_only)
    assert told[1] == libvirt.VIR_ERR_OPERATION_DENIED


def test_autodestroy_ends_with_the_connection(pair: Pair) -> None:
    def start_and_close(c: virtbackup.Connection, x: str) -> None:
        with virtbackup.open(c.getURI()) as other:
            vm(other).backupStart(x, virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)
            assert vm(c).backupGetInfo().state == "running"
        vm(c).backupGetInfo()

    told = pair.same(start_and_close)
    assert told[1] == libvirt.VIR_ERR_NO_DOMAIN_BACKUP


def test_a_backup_outlives_its_connection(pair: Pair) -> None:
    def start_and_close(c: virtbackup.Connection, x: str) -> Any:
        with virtbackup.open(c.getURI()) as other:
            vm(other).backupStart(x)
        return vm(c).backupStop()

    assert pair.same(start_and_close) == 0


def test_what_the_driver_has_not_is_equal(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(domain_obj.BackupHooks, "domain_branch_list")
    told = pair.same(lambda c, x: vm(c).branchList())
    assert told[1:4] == (
        libvirt.VIR_ERR_NO_SUPPORT,
        libvirt.VIR_FROM_DOMAIN,
        "this function is not supported by the connection driver: virDomainBranchList",
    )


# --- the ways to a daemon ---


def test_tcp(tmp_path: pathlib.Path) -> None:
    open = functools.partial(test_driver.open, DEFAULT, False)
    address = transport.Address("tcp", host="127.0.0.1", port=0)
    with daemons.serving([(DEFAULT, open)], address) as served:
        assert served.uri.startswith("virtbackup+tcp://127.0.0.1:")
        with virtbackup.open(served.uri) as connection:
            assert vm(connection).ID() == 1


def is_lost(connection: virtbackup.Connection) -> bool:
    return connection.isAlive() == 0


def test_a_daemon_that_stops_in_the_middle_of_a_pull(tmp_path: pathlib.Path) -> None:
    """It was told as the export's end alone, as if that were QEMU's."""
    open = functools.partial(test_driver.open, DEFAULT, False)
    address = transport.Address("unix", path=str(tmp_path / "sock"))
    with contextlib.ExitStack() as daemon:
        served = daemon.enter_context(daemons.serving([(DEFAULT, open)], address))

        class Progress:
            def start(self, index: int, size: int) -> None:
                daemon.close()

            def advance(self, index: int, count: int) -> None: ...

        with (
            virtbackup.open(served.uri) as connection,
            pytest.raises(virtbackup.Error, match="the connection that began the backup is lost"),
        ):
            pull.pull(vm(connection), tmp_path / "out", progress=Progress())
    assert not (tmp_path / "out").exists()


def test_a_daemon_that_stops_and_comes_back(tmp_path: pathlib.Path) -> None:
    """With reconnect=yes the next call connects anew, and events come again."""
    open = functools.partial(test_driver.open, DEFAULT, False)
    keeper = open()  # its QEMU outlives the daemon
    address = transport.Address("unix", path=str(tmp_path / "sock"))
    xml = f'<domainbackup><address type="unix" path="{tmp_path}/nbd.sock"/></domainbackup>'
    with contextlib.ExitStack() as stack:
        with daemons.serving([(DEFAULT, open)], address) as served:
            plain_one = stack.enter_context(virtbackup.open(served.uri))
            again = stack.enter_context(virtbackup.open(f"{served.uri}?reconnect=yes"))
            vm(plain_one).backupStart(xml)
        for connection in (plain_one, again):
            daemon_scene.wait_for(functools.partial(is_lost, connection))
        with pytest.raises(virtbackup.Error) as caught:
            again.listAllDomains()
        assert caught.value.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
        with daemons.serving([(DEFAULT, open)], address):
            assert plain_one.isAlive() == 0
            with pytest.raises(virtbackup.Error, match="client socket is closed"):
                plain_one.listAllDomains()
            assert vm(again).backupGetInfo().state == "running"
            assert vm(again).backupStop() == 0
            assert again.isAlive() == 1
            again.close()
    keeper.close()


def test_a_daemon_that_serves_a_daemon(tmp_path: pathlib.Path) -> None:
    open = functools.partial(test_driver.open, DEFAULT, False)
    xml = f'<domainbackup><address type="unix" path="{tmp_path}/nbd.sock"/></domainbackup>'
    first, second = (transport.Address("unix", path=str(tmp_path / n)) for n in ("1", "2"))
    with daemons.serving([(DEFAULT, open)], first) as inner:
        between = functools.partial(hypervisor.open_driver, inner.uri, False)
        with (
            daemons.serving([(inner.uri, between)], second) as outer,
            virtbackup.open(outer.uri) as connection,
        ):
            vm(connection).backupStart(xml, virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)
            assert [disk.name for disk in vm(connection).backupGetInfo().disks] == ["sdb", "vda"]
            with virtbackup.open(inner.uri) as other:
                connection.close()
                with pytest.raises(virtbackup.Error, match="no domain backup job present"):
                    vm(other).backupGetInfo()


def test_many_connections_and_threads(tmp_path: pathlib.Path) -> None:
    open = functools.partial(test_driver.open, DEFAULT, False)
    address = transport.Address("unix", path=str(tmp_path / "sock"))
    wrong: list[object] = []
    with daemons.serving([(DEFAULT, open)], address) as served, virtbackup.open(served.uri) as one:

        def work() -> None:
            with virtbackup.open(served.uri) as own:
                for connection in (one, own) * 5:
                    if vm(connection).state()[0] != libvirt.VIR_DOMAIN_RUNNING:
                        wrong.append(connection)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not wrong


def test_the_settings_of_a_daemon_are_its_own(tmp_path: pathlib.Path) -> None:
    settings = dataclasses.replace(virtbackup_conf.Settings(), access=("unix:nobody * read",))
    open = functools.partial(test_driver.open, DEFAULT, False)
    address = transport.Address("unix", path=str(tmp_path / "sock"))
    with (
        daemons.serving([(DEFAULT, open)], address, settings) as served,
        pytest.raises(virtbackup.Error) as caught,
    ):
        virtbackup.open(served.uri)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_ACCESS_DENIED
