# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup whose status is lost is cleaned up while NBD clients hold on: the guest outlives it.

On some QEMUs a client that is still in the handshake when the server is stopped kills the guest as
soon as it goes away, on others the guest stands still at once.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import libvirt
import nbd
import pytest

import virtbackup
from tests import waiting
from tests.live import machines, places, proxy, scene
from virtbackup import hypervisor, runtime
from virtbackup.qemu import capabilities, driver, naming

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

SIZE = 8 << 20
IN_USE = "cannot be removed, as it is in use: NBD server"


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    with machines.two_disks(tmp_path, size=SIZE) as one:
        assert goes_on(one)  # what it writes is no news then
        yield one


def survives() -> bool:
    """Whether the QEMU under test can stop its server whatever its clients do."""
    qemu = capabilities.Capabilities(machines.version(), "", frozenset())
    return qemu.nbd_stop_is_safe


def start(machine: machines.Machine, address: str, uri: str | None = None) -> None:
    with virtbackup.open(uri or machine.uri) as conn:
        conn.lookupByID(1).backupStart(f"<domainbackup>{address}</domainbackup>")


def unix(machine: machines.Machine) -> str:
    return f'<address type="unix" path="{machine.directory}/nbd.sock"/>'


def lose_status() -> None:
    [path] = scene.state_files()
    path.unlink()


def clean_up(machine: machines.Machine, uri: str | None = None) -> list[str]:
    with virtbackup.open(uri or machine.uri) as conn:
        return conn.lookupByID(1).backupCleanup()


def greeted(family: socket.AddressFamily, address: str | tuple[str, int]) -> socket.socket:
    """A client that has read the server's greeting and says no more."""
    client = socket.socket(family)
    client.connect(address)
    client.recv(18)
    return client


def greeted_at(machine: machines.Machine) -> socket.socket:
    return greeted(socket.AF_UNIX, f"{machine.directory}/nbd.sock")


def goes_on(machine: machines.Machine) -> bool:
    """After what its clients did has come to QEMU."""
    machine.io("vda", "write -P 1 0 64k")
    machine.io("sdb", "write -P 1 0 64k")
    return machine.process.poll() is None and bool(machine.probe("query-status")["running"])


@pytest.mark.parametrize("address", ["unix", "ip"])
def test_clients_in_the_handshake(machine: machines.Machine, address: str) -> None:
    before = machine.state()
    xml = unix(machine)
    if address == "ip":
        port = places.free_port()
        xml = f'<address type="ip" host="127.0.0.1" port="{port}"/>'
    start(machine, xml)
    clients = [
        greeted(socket.AF_INET, ("127.0.0.1", port)) if address == "ip" else greeted_at(machine)
        for _ in range(3)
    ]
    lose_status()
    assert "NBD server" in clean_up(machine)
    for client in clients:
        client.settimeout(waiting.DEADLINE)
        assert client.recv(1) == b""
        client.close()
    assert goes_on(machine)
    assert machine.state() == before


def test_a_client_that_has_stopped_reading(machine: machines.Machine) -> None:
    before = machine.state()
    start(machine, unix(machine))
    client = nbd.NBD()
    client.set_export_name("sdb")
    client.connect_unix(f"{machine.directory}/nbd.sock")
    for offset in range(0, SIZE, 1 << 20):
        client.aio_pread(nbd.Buffer(1 << 20), offset)
    lose_status()
    assert "NBD server" in clean_up(machine)
    assert goes_on(machine)
    assert machine.state() == before


def left_or_gone(machine: machines.Machine, end: Callable[[], object]) -> None:
    """END leaves the server running where QEMU would not survive; it can be stopped later."""
    if survives():
        end()
        return
    with pytest.raises(virtbackup.Error, match=IN_USE):
        end()
    assert machine.probe("query-jobs") == []


@pytest.mark.parametrize("viewer", [False, True])
def test_where_it_may_be_one_of_two_that_listen(tmp_path: pathlib.Path, viewer: bool) -> None:
    """Somebody who looks at the guest's screen is not disconnected for it."""
    with machines.two_disks(tmp_path, "-vnc", f"unix:{tmp_path}/vnc.sock", size=SIZE) as machine:
        assert goes_on(machine)
        before = machine.state()
        start(machine, unix(machine))
        client = greeted(socket.AF_UNIX, f"{tmp_path}/vnc.sock") if viewer else greeted_at(machine)
        lose_status()
        left_or_gone(machine, lambda: clean_up(machine))
        client.settimeout(0.1)
        if viewer:
            with pytest.raises(TimeoutError):
                client.recv(1)
        client.close()
        assert goes_on(machine)
        if not survives():
            machine.probe("nbd-server-stop")
        assert machine.state() == before


def test_where_one_of_two_that_listen_has_no_client(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path, "-vnc", f"unix:{tmp_path}/vnc.sock", size=SIZE) as machine:
        assert goes_on(machine)
        before = machine.state()
        start(machine, unix(machine))
        lose_status()
        assert "NBD server" in clean_up(machine)
        assert machine.state() == before


@pytest.mark.parametrize("lost", [False, True], ids=["status", "no status"])
def test_where_qemus_process_cannot_be_seen(machine: machines.Machine, lost: bool) -> None:
    """Somebody stands between it and us."""
    before = machine.state()
    with proxy.Proxy(machine.directory, machine.qmp) as between:
        start(machine, unix(machine), between.uri)
        client = greeted_at(machine)
        if lost:
            lose_status()
        else:
            with virtbackup.open(between.uri) as conn:
                conn.lookupByID(1).backupStop()
        left_or_gone(machine, lambda: clean_up(machine, between.uri))
        client.close()
        assert goes_on(machine)
        left = [] if survives() else ["NBD server"]
        if lost and left:  # it may be anybody's
            machine.probe("nbd-server-stop")
            left = []
        assert clean_up(machine, between.uri) == left
        assert machine.state() == before


@pytest.mark.parametrize("branch", ["", '<branch name="b"/>'])
def test_where_the_status_has_no_room(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, branch: str
) -> None:
    """Somebody else has filled its file system: a backup that runs can be ended all the same."""
    with (
        places.small_file_system(tmp_path / "state", 64 << 10) as state,
        machines.two_disks(tmp_path, size=SIZE) as machine,
    ):
        monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(state))
        start(machine, unix(machine) + branch)
        hog = places.fill_up(state)
        with virtbackup.open(machine.uri) as conn:
            assert conn.lookupByID(1).backupGetInfo().state == "running"
            conn.lookupByID(1).backupStop()
        assert list(state.glob("*.json")) == list(state.glob("*.partial")) == []
        hog.unlink()
        places.fill_up(state)
        with pytest.raises(virtbackup.Error, match=r"cannot write status .*: No space left"):
            start(machine, unix(machine))
        assert not machine.probe("query-jobs")


def test_where_nothing_can_be_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs no status is told; a start says what it misses."""
    with (
        places.small_file_system(tmp_path / "state", 64 << 10) as state,
        machines.two_disks(tmp_path, size=SIZE) as machine,
    ):
        subprocess.run(["mount", "-o", "remount,ro", str(state)], check=True)
        monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(state))
        with virtbackup.open(machine.uri) as conn:
            domain = conn.lookupByID(1)
            assert domain.name()
            with pytest.raises(virtbackup.Error, match=r"state lock .*Read-only") as caught:
                domain.backupStart(f"<domainbackup>{unix(machine)}</domainbackup>")
            assert caught.value.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
        assert not machine.probe("query-jobs")


def test_a_status_that_is_removed_of_a_backup_that_is_looked_after(
    tmp_path: pathlib.Path, machine: machines.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever began it and is still there writes it anew; where that cannot be, the guest does not
    keep the backup."""
    before = machine.state()
    state = tmp_path / "state"
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(state))
    document = f"<domainbackup>{unix(machine)}</domainbackup>"
    with virtbackup.open(machine.uri) as conn:
        domain = conn.lookupByID(1)
        domain.backupStart(document, virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)
        shutil.rmtree(state)
        assert domain.backupGetInfo().state == "running"
        [owner] = state.glob("*.owner")
        assert runtime.is_held(owner)
        shutil.rmtree(state)
        waiting.until(lambda: scene.state_files())  # it is watched
        domain.backupStop()
        assert machine.state() == before
        assert scene.state_files() == []
        domain.backupStart(document, virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)
        shutil.rmtree(state)
        state.touch()
        with pytest.raises(virtbackup.Error, match=r"state lock .*: Not a directory"):
            domain.backupStop()
    assert machine.state() == before


@pytest.mark.needs("unshare")
def test_a_container(
    tmp_path: pathlib.Path, machine: machines.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody takes a process for gone, or QEMU for another one, because he cannot see it."""
    if os.geteuid() != 0:
        pytest.skip("wants root")
    before = machine.state()
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path / "s"))
    program = (sys.executable, "-m", "virtbackup.tools.virsh_backup", "-q", "-c", machine.uri)
    start(machine, unix(machine))
    elsewhere = ("unshare", "--time", "--boottime", "5000", "--fork")
    said = subprocess.run([*elsewhere, *program, "backup-stop", "1"], capture_output=True)
    assert (said.returncode, said.stderr) == (0, b"")
    assert machine.state() == before

    machine.io("vda", "write -P 1 0 4M")  # or a pull is done before anybody has looked
    before = machine.state()
    argv = [*program, "backup-pull", "1", str(tmp_path / "out"), "--bandwidth", "64KiB"]
    with subprocess.Popen(
        ["unshare", "--pid", "--mount-proc", "--kill-child", *argv], stderr=subprocess.PIPE
    ) as owner:
        waiting.until(lambda: machine.probe("query-block-exports"), process=owner)
        with pytest.raises(virtbackup.Error, match="another backup job is already running"):
            start(machine, unix(machine))
        assert runtime.sweep() == []
        owner.kill()
    waiting.until(lambda: started_since(machine))
    with virtbackup.open(machine.uri) as conn:
        conn.lookupByID(1).backupStop()
    assert clean_up(machine) == []
    assert machine.state() == before


def started_since(machine: machines.Machine) -> bool:
    """Whether the one who began the other backup is gone, as a start has found."""
    try:
        start(machine, unix(machine))
    except virtbackup.Error:
        return False
    return True


def test_a_backup_is_given_up_without_a_note_of_it(
    tmp_path: pathlib.Path, machine: machines.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest goes first, whether that can be written down or not."""
    before = machine.state()
    state = tmp_path / "state"
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(state))
    with contextlib.closing(driver.QmpDriver(str(machine.qmp))) as own:
        [ref] = own.list_domains()
        document = f"<domainbackup>{unix(machine)}</domainbackup>"
        told: list[hypervisor.Event] = []
        own.event_register(told.append)
        id = naming.BackupId(own.domain_backup_start(ref, document, 0))
        shutil.rmtree(state)
        waiting.until(lambda: scene.state_files())
        assert told == []
        shutil.rmtree(state)
        state.touch()
        looked_after = own._domain.job
        assert looked_after.guest_trouble(id) is None
        assert looked_after.give_up(id, "given up, as a test said so")
        assert machine.state() == before
        state.unlink()
        with pytest.raises(virtbackup.Error, match="given up, as a test said so"):
            own.domain_backup_stop(ref, 0)
    assert machine.state() == before
