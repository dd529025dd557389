# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest always goes on: scratch images that fill, fail or are reserved, clients that hang."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import libvirt
import nbd
import pytest

import virtbackup
from demo import guest, records
from tests import daemon_scene, waiting
from tests.live import machines, places, scene
from virtbackup.qemu import capabilities, monitor, nbdserver, qcow2, scratch, watch

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "mount")

SIZE = 64 << 20
MIB = 1 << 20


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A file system with less room than the disks have."""
    with places.small_file_system(tmp_path_factory.mktemp("small"), 24 * MIB) as path:
        yield path


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    """Disks full of data: what is overwritten has to be saved."""
    with machines.two_disks(tmp_path, size=SIZE) as one:
        fill_disks(one)
        yield one


@pytest.fixture
def booted(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    """The same, by firmware that has used the disks, without which a reset would not wait for them,
    and does so no more: it resets them itself, for which QEMU would wait, too."""
    log = tmp_path / "firmware.log"
    said = ("-debugcon", f"file:{log}", "-global", "isa-debugcon.iobase=0x402")
    with machines.two_disks(tmp_path, *machines.BOOTING, *said, size=SIZE) as one:
        waiting.until(lambda: b"No bootable device" in log.read_bytes())
        fill_disks(one)
        yield one


def fill_disks(one: machines.Machine) -> None:
    for disk in ("vda", "sdb"):
        one.io(disk, f"write -P 1 0 {SIZE}")


def document(directory: pathlib.Path, source: str, disk: str = "vda") -> str:
    other = {"vda": "sdb", "sdb": "vda"}[disk]
    return (
        f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/><disks>'
        f'<disk name="{disk}"><source {source}/></disk><disk name="{other}" present="no"/>'
        "</disks></domainbackup>"
    )


def virsh(uri: str, *argv: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", uri, *argv]
    return subprocess.run(program, capture_output=True, text=True, timeout=60)


# --- room -----------------------------------------------------------------------------------------


def fill(machine: machines.Machine, disk: str) -> None:
    """Let the guest write all of a disk, not so fast that on a busy machine nobody could watch."""
    for at in range(0, SIZE, MIB // 2):
        machine.io(disk, f"write -P 2 {at} {MIB // 2}")
        time.sleep(0.01)


def test_a_start_without_any_room_is_refused_by_name(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine
) -> None:
    before = machine.state()
    places.fill_up(small, leave=scratch.LEAST_FREE // 2)
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        with pytest.raises(virtbackup.Error, match=f"disk 'vda' in '{small}' needs at least 1 MiB"):
            dom.backupStart(document(tmp_path, f'dir="{small}"'))
        assert machine.state() == before


def test_the_worst_case_is_said_in_words(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine
) -> None:
    xml = tmp_path / "x.xml"
    xml.write_text(document(tmp_path, f'dir="{small}"'))
    done = virsh(machine.uri, "backup-start", "1", str(xml))
    assert done.stdout == "Domain backup started\n"
    assert "warning: disk 'vda': if the guest overwrites the whole disk" in done.stderr
    info = virsh(machine.uri, "backup-info", "1")
    assert "Scratch hangs:" in info.stdout
    assert "does not fit" in info.stderr
    assert virsh(machine.uri, "backup-stop", "1").returncode == 0


def test_looking_at_a_backup_is_no_danger(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine
) -> None:
    """However often: QEMU is not asked for its nodes where a block-stream that ends just then would
    kill it."""
    (xml := tmp_path / "x.xml").write_text(document(tmp_path, f'dir="{small}"'))
    assert virsh(machine.uri, "backup-start", "1", str(xml)).returncode == 0
    machine.io("vda", f"write -P 2 0 {MIB}")
    info = virsh(machine.uri, "--trace", "-", "backup-info", "1")
    assert re.search(r"^ vda +vda +running +64.00 MiB +1\.\d+ MiB ", info.stdout, re.M)
    is_asked = '"query-named-block-nodes"' in info.stderr
    assert is_asked != capabilities.STREAM_CRASH.affects(machines.version())
    assert virsh(machine.uri, "backup-stop", "1").returncode == 0


def test_an_image_that_grows_large_is_noted(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine
) -> None:
    xml = tmp_path / "x.xml"
    xml.write_text(document(tmp_path, f'dir="{small}"'))
    assert virsh(machine.uri, "backup-start", "1", str(xml)).returncode == 0
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        assert "has grown" not in str(dom.backupGetInfo().disks[0].warning)
        machine.io("vda", f"write -P 2 0 {16 * MIB}")
        event = machine.probe.wait_event("BLOCK_WRITE_THRESHOLD")
        assert event["data"]["write-threshold"] > 8 * MIB
        assert "has grown beyond" in str(dom.backupGetInfo().disks[0].warning)
        assert dom.backupGetInfo().state == "running"
        dom.backupStop()


@pytest.mark.parametrize("size", [512, 65536, 5 * MIB + 512, SIZE])
def test_an_image_never_outgrows_its_worst_case(tmp_path: pathlib.Path, size: int) -> None:
    path = tmp_path / "scratch.qcow2"
    fd = scratch.create(str(path), "vda", os.geteuid())
    scratch.format(fd, size, "vda")
    os.close(fd)
    clusters = [n * qcow2.CLUSTER for n in range(-(-size // qcow2.CLUSTER))]
    order = clusters[1::2][::-1] + clusters[::2]
    commands = "".join(f"write -P 7 {at} {min(qcow2.CLUSTER, size - at)}\n" for at in order)
    argv = ["qemu-io", "-f", "qcow2", str(path)]
    subprocess.run(argv, input=commands, text=True, check=True, capture_output=True)
    assert subprocess.run(["qemu-img", "check", "-q", str(path)], check=False).returncode == 0
    assert path.stat().st_size <= qcow2.full_size(size)


@pytest.mark.parametrize("named", [False, True])
def test_a_reserved_image_needs_no_more_room(
    tmp_path: pathlib.Path, machine: machines.Machine, named: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    with places.small_file_system(tmp_path_factory.mktemp("reserve"), 96 * MIB) as room:
        source = f'file="{room}/mine.qcow2"' if named else f'dir="{room}"'
        with virtbackup.open(machine.uri) as conn:
            dom = conn.lookupByID(1)
            before = machine.state()
            dom.backupStart(document(tmp_path, f'{source} reserve="yes"', "sdb"))
            assert 96 * MIB - scratch.free_bytes(str(room)) >= SIZE
            places.fill_up(room)
            machine.io("sdb", f"write -P 2 0 {SIZE}")
            assert dom.backupGetInfo().state == "running"
            assert nbd_is(tmp_path, "sdb", 1)
            dom.backupStop()
            assert machine.state() == before
            assert [path.name for path in room.iterdir()] == ["hog"]


def test_what_cannot_be_reserved_is_refused(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine
) -> None:
    before = machine.state()
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        with pytest.raises(virtbackup.Error, match=r"disk 'vda' in .* needs at least 65 MiB"):
            dom.backupStart(document(tmp_path, f'dir="{small}" reserve="yes"'))
        assert machine.state() == before
        assert list(small.iterdir()) == []


def nbd_is(directory: pathlib.Path, disk: str, byte: int) -> bool:
    """Whether every byte of an export is BYTE."""
    handle = nbd.NBD()
    handle.set_export_name(disk)
    handle.connect_unix(f"{directory}/nbd.sock")
    return all(
        handle.pread(MIB, at) == bytes([byte]) * MIB for at in range(0, handle.get_size(), MIB)
    )


# --- somebody watches -----------------------------------------------------------------------------


@pytest.mark.parametrize("disk", ["vda", "sdb"])
def test_a_backup_is_given_up_before_the_guest_notices(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine, disk: str
) -> None:
    """Also while a client does not read, for which QEMU 10.0 and 11.1 would wait at the first
    command that ends the backup."""
    with virtbackup.open(machine.uri) as conn, contextlib.ExitStack() as clients:
        dom = conn.lookupByID(1)
        before = machine.state()
        for stuck in False, True:
            dom.backupStart(document(tmp_path, f'dir="{small}"', disk))
            if stuck:
                clients.enter_context(stuck_client(tmp_path, disk))
            fill(machine, disk)
            info = dom.backupGetInfo()
            assert info.state == "failed"
            assert "given up before the scratch image" in str(info.disks[0].reason)
            assert machine.state() == before
            assert scratch.free_bytes(str(small)) == 24 * MIB
            with pytest.raises(
                virtbackup.Error, match="another backup job is not stopped yet, it was given up"
            ):
                dom.backupStart(document(tmp_path, f'dir="{small}"', disk))
            with pytest.raises(virtbackup.Error, match=f"disk '{disk}': given up before"):
                dom.backupStop()
            machine.io(disk, f"write -P 1 0 {SIZE}")
        assert machine.probe("query-status")["status"] == "running"


def test_a_guest_is_freed_from_a_backup_although_a_client_cannot_be_sent_away(
    tmp_path: pathlib.Path,
    machine: machines.Machine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By who is not root, and has no room to spare in a socket. Where QEMU lets nobody do that, it
    would stand still."""
    monkeypatch.setattr(nbdserver, "_SO_SNDBUFFORCE", socket.SO_BROADCAST)
    monkeypatch.setattr(nbdserver, "TIMEOUT", 0.1)
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        reason: list[str] = []
        monkeypatch.setattr(watch.Watch, "_no_room", lambda self: next(iter(reason), None))
        dom.backupStart(document(tmp_path, f'dir="{tmp_path}"'))
        with stuck_client(tmp_path, "vda"):
            reason.append("given up, as a test said so")
            waiting.until(lambda: "cannot be disconnected" in caplog.text)
            [job] = machine.probe("query-jobs")
            assert job["status"] == ("concluded" if machines.version() < (8, 0, 0) else "running")
            machine.io("vda", f"write -P 2 0 {MIB}")
            with pytest.raises(virtbackup.Error, match="end them, or see to that") as refused:
                dom.backupStop()
            # A verdict would have ended it.
            assert refused.value.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
            assert dom.backupGetInfo().id is not None
        waiting.until(lambda: not any(t.name == "virtbackup-watch" for t in threading.enumerate()))
        with pytest.raises(virtbackup.Error, match="as a test said so"):
            dom.backupStop()


def test_an_export_that_somebody_has_just_deleted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there until what is being read of it has come, by who may not disconnect clients."""
    monkeypatch.setattr(nbdserver, "_duplicates", lambda pid, address: iter(()))
    slow = f"null-co,node-name=A,size={64 * MIB},latency-ns=500000000"
    with machines.qemu(
        tmp_path, "-blockdev", slow, "-device", "virtio-blk-pci,drive=A,id=vda"
    ) as machine, virtbackup.open(machine.uri) as conn:  # fmt: skip
        before = machine.state()
        [dom] = conn.listAllDomains()
        xml = document(tmp_path, f'dir="{tmp_path}"').replace('<disk name="sdb" present="no"/>', "")
        dom.backupStart(xml)
        client = nbd.NBD()
        client.set_export_name("vda")
        client.connect_unix(f"{tmp_path}/nbd.sock")
        client.aio_pread(nbd.Buffer(MIB), 0)
        for _ in range(9):  # QEMU has seen to its client by then
            [export] = machine.probe("query-block-exports")
        machine.probe.send("block-export-del", id=export["id"], mode="hard")
        machine.probe.send("query-block-exports")  # in one go: it is gone half a second later
        assert machine.probe.receive() == {"return": {}}
        [export] = machine.probe.receive()["return"]
        assert export["shutting-down"]
        with pytest.raises(virtbackup.Error, match="its export was removed before"):
            dom.backupStop()
        assert machine.state() == before
        assert scene.state_files() == []


def test_the_backup_of_a_qemu_that_was_killed_is_not_given_up_in_the_next_one(
    tmp_path: pathlib.Path, small: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended with its QEMU, and has left a socket."""
    reason: list[str] = []
    monkeypatch.setattr(watch.Watch, "_no_room", lambda self: next(iter(reason), None))
    with machines.two_disks(tmp_path, size=MIB) as first, virtbackup.open(first.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(document(tmp_path, f'dir="{small}"'))
        first.kill()
        with machines.qemu(tmp_path, *machines.two_disks_of(tmp_path)):
            reason.append("given up")
            waiting.until(
                lambda: not any(t.name == "virtbackup-watch" for t in threading.enumerate())
            )
            with pytest.raises(virtbackup.Error, match="disk 'vda': the domain was restarted"):
                dom.backupStop()
        assert not (tmp_path / "nbd.sock").exists()


def test_a_pull_says_why_its_backup_was_given_up(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine
) -> None:
    before = machine.state()
    out = tmp_path / "out"
    code = (
        "import sys; from virtbackup.nbd import copy; from virtbackup.tools import virsh_backup;"
        "plain = copy.copy;\n"
        "def late(*a, **k):\n"
        "    print('started', flush=True); sys.stdin.readline(); return plain(*a, **k)\n"
        "copy.copy = late; sys.exit(virsh_backup.main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, "-c", machine.uri, "backup-pull", "1", str(out)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "VIRTBACKUP_SCRATCH_DIR": str(small)},
    ) as pull:  # fmt: skip
        assert pull.stdout is not None
        assert pull.stdout.readline() == "started\n"
        fill(machine, "sdb")
        _, err = pull.communicate("go\n", timeout=60)
    assert pull.returncode == 1
    assert "disk 'sdb': given up before the scratch image" in err
    assert not out.exists()
    assert machine.state() == before


def test_the_interactive_shell_watches(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine
) -> None:
    xml = tmp_path / "x.xml"
    xml.write_text(document(tmp_path, f'dir="{small}"'))
    program = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", machine.uri]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write(f"backup-start 1 {xml}\n")
        shell.stdin.flush()
        while "Domain backup started" not in (line := shell.stdout.readline()):
            assert line, "the shell has ended"
        fill(machine, "vda")
        out, _ = shell.communicate("backup-info 1\nbackup-stop 1\nquit\n", timeout=60)
    assert out.count("given up before the scratch image") == 2, out
    assert machine.probe("query-jobs") == []


def test_a_daemon_watches_what_it_finds_running(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine
) -> None:
    xml = tmp_path / "x.xml"
    xml.write_text(document(tmp_path, f'dir="{small}"'))
    assert virsh(machine.uri, "backup-start", "1", str(xml)).returncode == 0
    with daemon_scene.running(tmp_path, machine.uri) as served:
        waiting.until(lambda: "found running" in served.log.read_text())
        fill(machine, "vda")
        assert machine.probe("query-status")["status"] == "running"
        done = virsh(f"virtbackup+unix://{served.path}", "backup-stop", "1")
        assert done.returncode == 1
        assert "disk 'vda': given up before the scratch image" in done.stderr
    assert machine.probe("query-jobs") == []


def test_a_watch_ends_with_the_backup_whoever_stops_it(
    tmp_path: pathlib.Path, small: pathlib.Path, machine: machines.Machine
) -> None:
    with virtbackup.open(machine.uri) as conn:
        conn.lookupByID(1).backupStart(document(tmp_path, f'dir="{small}"'))
        machine.io("vda", f"write -P 2 0 {8 * MIB}")
        assert scratch.free_bytes(str(small)) < 20 * MIB
        assert virsh(machine.uri, "backup-stop", "1").returncode == 0
        waiting.until(lambda: scratch.free_bytes(str(small)) == 24 * MIB)


# --- clients that hang ------------------------------------------------------------------------


@contextlib.contextmanager
def stuck_client(directory: pathlib.Path, export: str) -> Iterator[None]:
    client = nbd.NBD()
    client.set_export_name(export)
    client.connect_unix(f"{directory}/nbd.sock")
    for at in range(0, SIZE, MIB):
        client.aio_pread(nbd.Buffer(MIB), at)
    yield


WAITS = ("transaction", "system_reset", "stop")
"""Commands for which QEMU waits for all requests; 5.2 does not."""


def waits() -> bool:
    return machines.version() >= (6, 0, 0)


def answers(machine: machines.Machine, within: float) -> bool:
    """Whether QEMU replies to the probe's last command; the reply stays to be received."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if b'"return"' in machine.probe.peek():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(("by", "what"), [("watch", WAITS[0]), *[("stop", one) for one in WAITS]])
def test_qemu_is_freed_from_a_client_it_waits_for(
    tmp_path: pathlib.Path,
    booted: machines.Machine,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    what: str,
) -> None:
    """Somebody's transaction waits for all requests, so for a client that does not read: QEMU and
    the guest stand still, and no monitor answers. So do a reset of the guest and its pause."""
    before = booted.state()
    xml = f'<domainbackup><address type="unix" path="{tmp_path}/nbd.sock"/></domainbackup>'
    with contextlib.ExitStack() as stack:
        conn = stack.enter_context(virtbackup.open(booted.uri))
        dom = conn.lookupByID(1)
        if by == "watch":
            dom.backupStart(xml)
        else:
            argv = ["backup-start-as", "1", "--unix", f"{tmp_path}/nbd.sock"]
            assert virsh(booted.uri, *argv).returncode == 0
        monkeypatch.setattr(monitor, "CONNECT_TIMEOUT", 1.0)
        stack.enter_context(stuck_client(tmp_path, "vda"))
        bitmap = {"node": "B", "name": "theirs"}
        action = {"type": "block-dirty-bitmap-add", "data": bitmap}
        booted.probe.send(what, **{"actions": [action]} if what == "transaction" else {})
        if by == "stop" or not waits():
            within = 1.0 if waits() else waiting.DEADLINE
            assert answers(booted, within) == (not waits())
            dom.backupStop()
            assert booted.probe.receive() == {"return": {}}
        else:
            assert booted.probe.receive() == {"return": {}}
            waiting.until(lambda: dom.backupGetInfo().state == "failed")
            with pytest.raises(virtbackup.Error, match="an NBD client stopped reading"):
                dom.backupStop()
        booted.probe.events.clear()
        if what == "transaction":
            booted.probe("block-dirty-bitmap-remove", **bitmap)
        assert booted.state() == before


def test_a_monitor_that_is_held_is_not_a_qemu_that_stands_still(
    tmp_path: pathlib.Path, machine: machines.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK", 0.05)
    with virtbackup.open(machine.uri) as conn, stuck_client_of(conn, tmp_path):
        dom = conn.lookupByID(1)
        holder = machines.Probe(machine.qmp)
        # Not before: a QEMU that answers may take as long on a busy machine.
        monkeypatch.setattr(monitor, "CONNECT_TIMEOUT", 0.2)
        for _ in range(3):
            with pytest.raises(virtbackup.Error, match="another client may be using it"):
                dom.backupGetInfo()
        with pytest.raises(virtbackup.Error, match="another client may be using it"):
            dom.backupStop()
        holder.close()
        monkeypatch.setattr(monitor, "CONNECT_TIMEOUT", 10.0)
        assert dom.backupGetInfo().state == "running"
        dom.backupStop()


@contextlib.contextmanager
def stuck_client_of(conn: virtbackup.Connection, directory: pathlib.Path) -> Iterator[None]:
    """A backup, and a client of it that does not read."""
    conn.lookupByID(1).backupStart(
        f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/></domainbackup>'
    )
    with stuck_client(directory, "vda"):
        yield


def test_a_forked_process_ends_nothing(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    code = (
        "import os, sys, virtbackup\n"
        "conn = virtbackup.open(sys.argv[1])\n"
        "dom = conn.lookupByID(1)\n"
        "dom.backupStart(sys.argv[2], virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    conn.close()\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(dom.backupGetInfo().state)\n"
        "conn.close()\n"
    )
    before = machine.state()
    xml = f'<domainbackup><address type="unix" path="{tmp_path}/nbd.sock"/></domainbackup>'
    argv = [sys.executable, "-c", code, machine.uri, xml]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "running\n"
    assert machine.state() == before


# --- what the address may not be --------------------------------------------------------------


def test_another_servers_clients_are_left_alone(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    """The guest's user exports something over QEMU's own server: a start is refused, and the
    client of that export reads on."""
    address = {"type": "unix", "data": {"path": f"{tmp_path}/nbd.sock"}}
    machine.probe("nbd-server-start", addr=address)
    machine.probe("block-export-add", type="nbd", id="theirs", node_name="A", name="theirs")
    client = nbd.NBD()
    client.set_export_name("theirs")
    client.connect_unix(f"{tmp_path}/nbd.sock")
    with socket.socket(socket.AF_UNIX) as halfway, virtbackup.open(machine.uri) as conn:
        halfway.connect(f"{tmp_path}/nbd.sock")
        for path, reason in (
            (f"{tmp_path}/nbd.sock", "another server listens on"),
            (f"{tmp_path}/other.sock", "NBD server is already in use by another job or client"),
        ):
            with pytest.raises(virtbackup.Error, match=reason):
                conn.lookupByID(1).backupStart(
                    f'<domainbackup><address type="unix" path="{path}"/></domainbackup>'
                )
        assert halfway.recv(8) == b"NBDMAGIC"
        assert client.pread(512, 0) == bytes([1]) * 512


# --- a guest that was paused ----------------------------------------------------------------------


@contextlib.contextmanager
def one_disk(directory: pathlib.Path, below: str, werror: str) -> Iterator[machines.Machine]:
    """A machine whose disk's device can be made to write (``device_writes``): vda, of raw data over
    BELOW, as blockdev options with {file} for the file's own."""
    path = machines.image(directory / "b.raw", 8 * MIB)
    with machines.qemu(
        directory, "-M", "pc,accel=tcg",
        "-blockdev", f"raw,node-name=B,{below.format(file=path)}",
        "-device", f"ide-hd,drive=B,id=vda,bus=ide.0,werror={werror}",
        before_exec=scene.endure_limits,
    ) as machine:  # fmt: skip
        yield machine


def device_writes(machine: machines.Machine, sector: int, byte: int) -> None:
    """As a guest does it, by its own writes to I/O ports: so that werror matters."""
    ports = (0x1F6, 0xE0), (0x1F2, 1), (0x1F3, sector & 255), (0x1F4, sector >> 8), (0x1F5, 0)
    words = [("b", port, value) for port, value in (*ports, (0x1F7, 0x30))]
    for width, port, value in (*words, *[("w", 0x1F0, byte * 0x01010101)] * 128):
        line = f"o /{width} {port:#x} {value:#x}"
        machine.probe("human-monitor-command", command_line=line)


def is_there(machine: machines.Machine, sector: int, byte: int) -> bool:
    """Whether a sector of the disk has that byte throughout by now."""
    with contextlib.suppress(AssertionError):
        machine.io("vda", f"read -P {byte} {sector * 512} 512")
        return True
    return False


def fails_to_save(machine: machines.Machine) -> bool:
    """Try to save the guest to a file; False: it is saved."""
    machine.probe("migrate", uri="exec:cat > /dev/null")
    ends = ("failed", "completed")
    waiting.until(lambda: machine.probe("query-migrate")["status"] in ends)
    waiting.until(lambda: machine.probe("query-status")["status"] != "finish-migrate")
    return bool(machine.probe("query-migrate")["status"] == "failed")


def fails_to_save_for_an_export(machine: machines.Machine) -> bool:
    """The same, for one of somebody's that is there meanwhile, and which may be written to."""
    address = {"type": "unix", "data": {"path": f"{machine.directory}/theirs.sock"}}
    machine.probe("nbd-server-start", addr=address)
    machine.probe("blockdev-add", driver="null-co", node_name="theirs", size=MIB)
    machine.probe("block-export-add", type="nbd", id="theirs", node_name="theirs", writable=True)
    failed = fails_to_save(machine)
    machine.probe("nbd-server-stop")
    machine.probe("blockdev-del", node_name="theirs")
    return failed


BROKEN_ONCE = (
    "file.driver=blkdebug,file.image.driver=file,file.image.filename={file},"
    "file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.errno=28,"
    "file.inject-error.0.sector=256,file.inject-error.0.once=on"
)


@pytest.mark.parametrize("saved", [False, True])
def test_a_guest_that_its_own_storage_paused(tmp_path: pathlib.Path, saved: bool) -> None:
    """Nobody can tell it from a scratch image that is full, but where that cannot pause a guest. A
    backup that is running is ended by nothing but its stop. SAVED: in vain, meanwhile."""
    xml = document(tmp_path, f'dir="{tmp_path}"').replace('<disk name="sdb" present="no"/>', "")
    with one_disk(tmp_path, BROKEN_ONCE, "enospc") as machine, virtbackup.open(machine.uri) as conn:
        scene.start_and_die(machine.uri, xml)
        device_writes(machine, 256, 7)
        waiting.until(lambda: machine.probe("query-status")["status"] == "io-error")
        [dom] = conn.listAllDomains()
        if saved and not fails_to_save(machine):
            return
        info = dom.backupGetInfo()
        assert nbd_is(tmp_path, "vda", 0)
        with pytest.raises(virtbackup.Error, match="is running: backup-stop ends it"):
            dom.backupCleanup()
        with pytest.raises(virtbackup.Error, match="another backup job is already running"):
            dom.backupStart(xml)
        if info.scratch_failure == "backup":
            assert info.state == "running"
            dom.backupStop()
            assert machine.probe("query-status")["status"] == "io-error"
            return
        assert "its scratch image, or its own storage, is full" in str(info.disks[0].reason)
        with pytest.raises(virtbackup.Error, match="the guest was paused: its scratch image, or"):
            dom.backupStop()
        assert machine.probe("query-status")["status"] == "running"
        waiting.until(lambda: is_there(machine, 256, 7))


@pytest.mark.parametrize("saved", [False, True])
def test_a_guest_that_stood_still_before_stays_so(tmp_path: pathlib.Path, saved: bool) -> None:
    """Why it does is none of the backup's business. SAVED: in vain, before the start."""
    xml = document(tmp_path, f'dir="{tmp_path}"').replace('<disk name="sdb" present="no"/>', "")
    with one_disk(tmp_path, BROKEN_ONCE, "enospc") as machine, virtbackup.open(machine.uri) as conn:
        device_writes(machine, 256, 7)
        waiting.until(lambda: machine.probe("query-status")["status"] == "io-error")
        if saved and not fails_to_save_for_an_export(machine):
            return
        before = machine.probe("query-status")
        [dom] = conn.listAllDomains()
        try:
            dom.backupStart(xml)
        except virtbackup.Error as refused:  # QEMU 5.2 does not take back what it has given away
            assert saved
            assert "given away to a migration or a save" in str(refused)
        else:
            assert dom.backupGetInfo().state == "running"
            dom.backupStop()
        assert machine.probe("query-status") == before


def test_the_watch_lets_a_guest_go_on_that_a_broken_scratch_image_paused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room, and yet it cannot be written."""
    monkeypatch.setattr(watch, "LOOK", 0.05)
    xml = document(tmp_path, f'dir="{tmp_path}"').replace('<disk name="sdb" present="no"/>', "")
    plain = "file.driver=file,file.filename={file}"
    with one_disk(tmp_path, plain, "stop") as machine, virtbackup.open(machine.uri) as conn:
        machine.io("vda", "write -P 1 0 8M")
        [dom] = conn.listAllDomains()
        dom.backupStart(xml)
        with scene.small_files(machine, 128 << 10):
            device_writes(machine, 0, 7)
            waiting.until(lambda: dom.backupGetInfo().state == "failed")
        reason = "own storage, failed and the guest was paused|its snapshot is broken"
        waiting.until(lambda: machine.probe("query-status")["status"] == "running")
        with pytest.raises(virtbackup.Error, match=reason):
            dom.backupStop()
        waiting.until(lambda: is_there(machine, 0, 7))
        assert machine.probe("query-jobs") == []


def end(dom: virtbackup.Domain, linux: guest.Guest, how: str, other: str) -> None:
    """End the backup in one of the ways that let the guest go on."""
    if how == "cleanup":
        assert "job" in " ".join(dom.backupCleanup())
    elif how == "start":
        dom.backupStart(other)
        dom.backupStop()
    else:
        with pytest.raises(virtbackup.Error, match="the backup is not good"):
            dom.backupStop()
    assert not (linux.directory / "backup.sock").exists()


# The last one: its guest, which writes all the time, ends with it.
@pytest.mark.parametrize("ends", ["stop", "cleanup", "start"])
def test_a_guest_that_our_scratch_paused_goes_on_and_loses_nothing(
    linux: guest.Guest, tmp_path_factory: pytest.TempPathFactory, ends: str
) -> None:
    """Nobody watches. Where QEMU can break the backup instead, the guest is not even paused."""
    socket_path = linux.directory / "backup.sock"
    address = f'<domainbackup><address type="unix" path="{socket_path}"/>'
    with places.small_file_system(tmp_path_factory.mktemp("room"), 3 * MIB) as room:
        disks = "".join(
            f'<disk name="{disk.name}"><source dir="{room}"/></disk>' for disk in records.DISKS
        )
        xml = f"{address}<disks>{disks}</disks></domainbackup>"
        scene.start_and_die(linux.uri, xml, autodestroy=ends in ("cleanup", "start"))
        number = linux.report.number
        with virtbackup.open(linux.uri) as conn:
            [dom] = conn.listAllDomains()
            info = dom.backupGetInfo()
            while info.state == "running":
                info = dom.backupGetInfo()
            paused = linux.monitor.command("query-status")["status"] == "io-error"
            assert paused == (info.scratch_failure == "guest")
            if paused:
                assert any("the guest was paused" in str(disk.reason) for disk in info.disks)
                assert dom.state()[0] == libvirt.VIR_DOMAIN_PAUSED
            end(dom, linux, ends, f"{address}</domainbackup>")
        assert linux.monitor.command("query-status")["status"] == "running"
        linux.wait_for_number(max(number, linux.report.number) + 200)
        assert scene.damage(linux) == ()
