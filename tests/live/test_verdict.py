# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop tells the truth, and what runs outlives the process that started it."""

import contextlib
import dataclasses
import gc
import itertools
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import nbd
import pytest

import virtbackup
from tests import conftest, waiting
from tests.live import machines, nbdclient, places, steps, striking
from virtbackup import hypervisor
from virtbackup.conf import backup_conf
from virtbackup.qemu import driver, monitor, status, verdict

AUTODESTROY = virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY
START = """
import sys, virtbackup
conn = virtbackup.open(sys.argv[1])
conn.lookupByID(1).backupStart(sys.argv[2], int(sys.argv[3]))
print("started", flush=True)
sys.stdin.read()
"""


def unix(directory: pathlib.Path, disks: str = "") -> str:
    return (
        f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/>'
        f"<disks>{disks}</disks></domainbackup>"
    )


@contextlib.contextmanager
def starter(uri: str, xml: str, flags: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Another process that starts a backup and stays; entered once it has."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, uri, xml, str(flags)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "started\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.close()


def job_of(machine: machines.Machine, disk: str) -> str:
    """The id of the backup job on DISK: ours, in the order of the disks."""
    jobs = sorted(job["id"] for job in machine.probe("query-jobs"))
    return str(jobs[["vda", "sdb"].index(disk)])


def test_a_cancelled_job_is_reported_with_disk_and_reason(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        machine.probe("block-job-cancel", device=job_of(machine, "sdb"))
        machine.probe.wait_event("BLOCK_JOB_CANCELLED")
        info = dom.backupGetInfo()
        assert info.state == "failed"
        assert {disk.name: disk.state for disk in info.disks} == {"vda": "running", "sdb": "failed"}
        with pytest.raises(virtbackup.Error) as caught:
            dom.backupStop()
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
        assert "disk 'sdb': its backup job ended: Operation canceled" in str(caught.value)
        assert "'vda'" not in str(caught.value)
        assert machine.state() == before


def test_a_vanished_job_is_reported(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        job = job_of(machine, "vda")
        machine.probe("block-job-cancel", device=job)
        machine.probe.wait_event("BLOCK_JOB_CANCELLED")
        while machine.probe.reply("job-dismiss", id=job).get("error"):
            machine.probe.wait_event("JOB_STATUS_CHANGE")
        with pytest.raises(virtbackup.Error, match="disk 'vda': its backup job disappeared"):
            dom.backupStop()
        assert machine.state() == before


def test_a_removed_export_is_reported(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        machine.probe("nbd-server-stop")
        with pytest.raises(virtbackup.Error, match=r"'vda': its export was removed.*'sdb'"):
            dom.backupStop()
        assert machine.state() == before


def test_cancel_asks_for_no_verdict(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        machine.probe("block-job-cancel", device=job_of(machine, "vda"))
        assert dom.backupStop(virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL) == 0
        assert machine.state() == before


def test_another_process_finds_and_stops_it(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine:
        machine.io("vda", "write -P 0 0 1M")
        before = machine.state()
        with starter(machine.uri, unix(tmp_path)):
            pass
        machine.io("vda", "write -P 1 0 1M")
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[: 1 << 20] == bytes(1 << 20)
        with virtbackup.open(machine.uri) as conn:
            dom = conn.lookupByID(1)
            assert dom.backupGetInfo().state == "running"
            assert f"{tmp_path}/nbd.sock" in dom.backupGetXMLDesc()
            # Somebody removes the monitor's socket, as what sweeps /tmp does: QEMU is not gone.
            away = machine.qmp.rename(tmp_path / "away")
            for call in dom.backupStop, dom.backupGetInfo, dom.backupCleanup:
                with pytest.raises(virtbackup.Error, match="failed to connect to monitor socket"):
                    call()
            away.rename(machine.qmp)
            dom.backupStop()
        assert machine.state() == before


@pytest.mark.parametrize("address", ["unix", "ip"])
@pytest.mark.parametrize("said", [b"", b"\0\0\0\3"], ids=["silent", "halfway"])
def test_clients_in_the_handshake_do_not_hang_qemu(
    tmp_path: pathlib.Path, address: str, said: bytes
) -> None:
    """On some QEMUs nbd-server-stop would wait for them for ever, and the guest with it."""
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        port = 0
        xml = unix(tmp_path)
        if address == "ip":
            port = places.free_port()
            xml = (
                f'<domainbackup><address type="ip" host="127.0.0.1" port="{port}"/></domainbackup>'
            )
        dom.backupStart(xml)
        clients = [
            socket.create_connection(("127.0.0.1", port)) if port else unix_client(tmp_path)
            for _ in range(20)
        ]
        for client in clients:
            client.recv(18)
            client.sendall(said)
        dom.backupStop()
        assert machine.state() == before
        for client in clients:
            client.close()


def unix_client(directory: pathlib.Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(f"{directory}/nbd.sock")
    return client


def test_stop_disconnects_a_reading_client(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        client = nbd.NBD()
        client.set_export_name("vda")
        client.connect_unix(f"{tmp_path}/nbd.sock")
        client.pread(512, 0)
        dom.backupStop()
        with pytest.raises(nbd.Error):
            client.pread(512, 0)
        assert machine.state() == before


def test_qemu_killed(tmp_path: pathlib.Path, state_dir: pathlib.Path) -> None:
    scratch = tmp_path / "scratch.qcow2"
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        disks = f'<disk name="vda"><source file="{scratch}"/></disk>'
        conn.lookupByID(1).backupStart(unix(tmp_path, disks))
        machine.kill()
        with virtbackup.open(machine.uri) as later:
            [dom] = later.listAllDomains()
            assert (dom.ID(), dom.isActive()) == (-1, 0)
            assert dom.state()[0] == libvirt.VIR_DOMAIN_SHUTOFF
            assert dom.backupGetInfo().state == "failed"
            with pytest.raises(virtbackup.Error, match="'vda': QEMU is gone"):
                dom.backupStop()
            assert later.listAllDomains() == []
        assert not scratch.exists()
        assert not (tmp_path / "nbd.sock").exists()
        assert not list(state_dir.glob("*.json"))
        with pytest.raises(virtbackup.Error, match="failed to connect to monitor socket"):
            virtbackup.open(machine.uri)


def test_qemu_restarted_on_the_same_socket(tmp_path: pathlib.Path) -> None:
    scratch = tmp_path / "scratch.qcow2"
    xml = unix(tmp_path, f'<disk name="vda"><source file="{scratch}"/></disk>')
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        conn.lookupByID(1).backupStart(xml)
        machine.kill()
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        with pytest.raises(virtbackup.Error, match="the domain was restarted"):
            dom.backupStop()
        assert not scratch.exists()
        dom.backupStart(xml)
        dom.backupStop()
        assert machine.state() == before


@pytest.mark.parametrize("again", [False, True])
def test_cleanup_tells_the_verdict_that_nobody_was_told(
    tmp_path: pathlib.Path, again: bool
) -> None:
    """Where the stop can tell it no more: QEMU was killed, and perhaps there is another one."""
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path, '<disk name="sdb" present="no"/>'))
        id = dom.backupGetInfo().id
        machine.kill()
        with contextlib.ExitStack() as stack:
            if again:
                stack.enter_context(machines.two_disks(tmp_path))
            [dom] = stack.enter_context(virtbackup.open(machine.uri)).listAllDomains()
            why = "the domain was restarted" if again else "QEMU is gone"
            told = f"verdict on backup {id}: the backup is not good: disk 'vda': {why}"
            assert dom.backupCleanup()[0] == told
            assert not any(line.startswith("verdict") for line in dom.backupCleanup())


def test_start_clears_a_dead_backups_status_by_itself(tmp_path: pathlib.Path) -> None:
    scratch = tmp_path / "scratch.qcow2"
    xml = unix(tmp_path, f'<disk name="vda"><source file="{scratch}"/></disk>')
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        conn.lookupByID(1).backupStart(xml)
        machine.kill()
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        conn.lookupByID(1).backupStart(xml)
        assert scratch.exists()
        conn.lookupByID(1).backupStop()
    assert not scratch.exists()


def test_autodestroy_ends_with_the_connection(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine:
        before = machine.state()
        with virtbackup.open(machine.uri) as conn:
            conn.lookupByID(1).backupStart(
                unix(tmp_path), virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY
            )
            assert machine.state() != before
        assert machine.state() == before


def test_autodestroy_ends_with_a_connection_that_a_signal_s_handler_closes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a call, which comes to its end before."""
    look = verdict.look

    def interrupted(*args: Any) -> backup_conf.BackupInfo:
        conn.close()
        return look(*args)

    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        before = machine.state()
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path), AUTODESTROY)
        monkeypatch.setattr(verdict, "look", interrupted)
        assert dom.backupGetInfo().state == "running"
        waiting.until(lambda: machine.probe("query-jobs") == [])
        waiting.until(lambda: machine.state() == before)


def test_autodestroy_ends_with_a_connection_that_is_closed_meanwhile(
    tmp_path: pathlib.Path,
) -> None:
    """By another thread, as the backup is being started."""
    with machines.two_disks(tmp_path) as machine:
        before = machine.state()
        conn = virtbackup.open(machine.uri)
        dom = conn.lookupByID(1)

        def close(_: object) -> None:
            closer = threading.Thread(target=conn.close)
            closer.start()
            closer.join()

        with steps.before("exports", close), pytest.raises(libvirt.libvirtError) as caught:
            dom.backupStart(unix(tmp_path), AUTODESTROY)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_INVALID_CONN
        assert machine.state() == before


def test_a_stop_that_means_another_backup_leaves_the_one_that_runs(tmp_path: pathlib.Path) -> None:
    """It goes on to be watched, and ends with the driver, as of a daemon with several clients."""
    with machines.two_disks(tmp_path) as machine:
        before = machine.state()
        with contextlib.closing(driver.open(machine.uri, False)) as opened:
            [ref] = opened.list_domains()
            first = opened.domain_backup_start(ref, unix(tmp_path), AUTODESTROY)
            opened.domain_backup_stop_of(ref, 0, None)
            opened.domain_backup_start(ref, unix(tmp_path), AUTODESTROY)
            with pytest.raises(virtbackup.Error, match="another one runs"):
                opened.domain_backup_stop_of(ref, hypervisor.STOP_CANCEL, first)
            assert "virtbackup-watch" in [thread.name for thread in threading.enumerate()]
            assert machine.state() != before
        assert machine.state() == before


@pytest.mark.parametrize("what", ["start", "cleanup", "stop"])
def test_autodestroy_owner_killed(tmp_path: pathlib.Path, what: str) -> None:
    with machines.two_disks(tmp_path) as machine:
        before = machine.state()
        flags = virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY
        with starter(machine.uri, unix(tmp_path), flags) as owner:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
        with virtbackup.open(machine.uri) as conn:
            dom = conn.lookupByID(1)
            assert machine.state() != before
            if what == "cleanup":
                hybrid = dom.backupGetInfo().engine == "hybrid"
                removed = dom.backupCleanup()
                # 2 exports, server, 2 jobs, 2 images; where they are nodes 2 frozen disks, and
                # where there is something to keep the disks from 2 bitmaps
                guards = machines.version() >= (8, 0, 0)
                assert len(removed) == 7 + 2 * hybrid + 2 * guards, removed
                assert dom.backupCleanup() == []
            elif what == "start":
                dom.backupStart(unix(tmp_path))
                dom.backupStop()
            else:
                dom.backupStop()
            assert machine.state() == before


def test_two_processes_start_at_once_and_one_wins(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine:
        before = machine.state()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", START, machine.uri, unix(tmp_path), "0"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for _ in range(4)
        ]  # fmt: skip
        results = [(process.communicate(timeout=60), process.returncode) for process in processes]
        assert sorted(code for _, code in results) == [0, 1, 1, 1]
        for (_, err), code in results:
            assert code == 0 or "another backup job is already running" in err
        with virtbackup.open(machine.uri) as conn:
            conn.lookupByID(1).backupStop()
        assert machine.state() == before


def test_monitor_held_by_another_client(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machines.two_disks(tmp_path) as machine:
        with monkeypatch.context() as impatient:
            impatient.setattr(monitor, "CONNECT_TIMEOUT", 0.3)
            holder = machines.Probe(machine.qmp)
            with pytest.raises(virtbackup.Error, match="another client may be using it") as caught:
                virtbackup.open(machine.uri)
            assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
            holder.close()
            waiting.stop(machine.process)
            stopped = f"its process {machine.process.pid} is stopped"
            with pytest.raises(virtbackup.Error, match=stopped):
                virtbackup.open(machine.uri)
        machine.process.send_signal(signal.SIGCONT)
        virtbackup.open(machine.uri).close()


def test_cleanup_without_a_status_touches_only_ours(
    tmp_path: pathlib.Path, state_dir: pathlib.Path
) -> None:
    with machines.two_disks(tmp_path) as machine:
        machines.image(tmp_path / "other.raw", 1 << 20)
        file = {"driver": "file", "filename": f"{tmp_path}/other.raw"}
        machine.probe("blockdev-add", driver="raw", node_name="virtbackup-of-mine", file=file)
        before = machine.state()
        with virtbackup.open(machine.uri) as conn:
            conn.lookupByID(1).backupStart(unix(tmp_path))
        [path] = state_dir.glob("*.json")
        path.unlink()
        with virtbackup.open(machine.uri) as conn:
            dom = conn.lookupByID(1)
            with pytest.raises(virtbackup.Error, match="no status of it"):
                dom.backupStart(unix(tmp_path))
            assert dom.backupCleanup()
            assert machine.state() == before


def test_cleanup_leaves_what_runs_by_another_monitor(tmp_path: pathlib.Path) -> None:
    """A backup that was started over one monitor of a QEMU is not taken for a crash's by who has
    another one of the same."""
    second = tmp_path / "second.sock"
    with (
        machines.two_disks(tmp_path, "-qmp", f"unix:{second},server=on,wait=off") as machine,
        virtbackup.open(machine.uri) as conn,
        virtbackup.open(f"qmp://{second}") as other,
    ):
        dom, same = conn.lookupByID(1), other.lookupByID(1)
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        running = machine.state()
        file = status.StatusFile(str(machine.qmp))
        found = file.load()
        assert found is not None
        calls: tuple[Callable[[], object], ...] = (
            same.backupCleanup,
            lambda: same.backupStart(unix(tmp_path)),
            lambda: same.branchDelete("nightly"),
        )
        ending = dataclasses.replace(found, phase="stopping")
        for now, call in itertools.product((found, ending), calls):
            with file.locked():
                file.save(now)
                with pytest.raises(virtbackup.Error, match="runs by another monitor") as caught:
                    call()
            assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
        file.save(dataclasses.replace(found, phase="starting"))
        with pytest.raises(virtbackup.Error, match="who was at it over another monitor of this"):
            same.backupStart(unix(tmp_path))
        file.save(dataclasses.replace(found, advances="nightly"))
        with pytest.raises(virtbackup.Error, match="runs by another monitor"):
            same.branchCreate("nightly")
        file.save(found)
        assert machine.state() == running
        dom.backupStop()
        assert machine.state() == before
        assert same.backupCleanup() == []


def test_a_broken_status_file_is_no_obstacle(
    tmp_path: pathlib.Path, state_dir: pathlib.Path
) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        [path] = state_dir.glob("*.json")
        path.write_text(path.read_text().rstrip()[:-100])
        with virtbackup.open(machine.uri) as another:  # the first one has it in mind
            assert another.lookupByID(1).backupCleanup()
        assert machine.state() == before


@pytest.mark.parametrize("is_there", [False, True])
def test_the_status_file_is_the_users_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *, is_there: bool
) -> None:
    """In a directory that is made where there is none, and that nobody else may enter."""
    place = tmp_path / "state" / "ours"
    if is_there:
        place.mkdir(0o755, parents=True)
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(place))
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path))
        assert place.stat().st_mode & 0o777 == (0o755 if is_there else 0o700)
        [path] = place.glob("*.json")
        assert path.stat().st_mode & 0o777 == 0o600
        written = status.parse(path.read_text())
        assert status.parse(status.format(written)) == written
        assert written.phase == "running"
        assert json.loads(path.read_text())["version"] == status.VERSION
        dom.backupStop()


def test_an_interrupted_start_leaves_nothing_that_is_not_found(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, scratch_dir: pathlib.Path
) -> None:
    """KeyboardInterrupt whenever it comes to a process: nothing remains, or, where it came once the
    start was done, a backup that can be stopped."""
    with machines.two_disks(tmp_path) as machine:
        with virtbackup.open(machine.uri) as conn:
            conn.lookupByID(1).backupCleanup()  # the lock is there from now on
        before = what_is_there(machine, tmp_path, state_dir, scratch_dir)
        for delay in [0.001 * step for step in range(1, 25, 2)]:
            process = subprocess.Popen(
                [sys.executable, "-c", INTERRUPTED, machine.uri, unix(tmp_path), str(delay)],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            out, _ = process.communicate(timeout=60)
            assert out in ("started\n", "interrupted\n")
            with virtbackup.open(machine.uri) as conn:
                dom = conn.lookupByID(1)
                if out == "started\n" or list(state_dir.glob("*.json")):
                    dom.backupStop()
            assert what_is_there(machine, tmp_path, state_dir, scratch_dir) == before, (delay, out)


EVERY = 1 if conftest.long() else 40
"""Of how many places where a signal may strike one is tried."""
HOLD = striking.HOLD if conftest.long() else ()
NOT_COME_TO_AN_END = "the process that was stopping it did not come to an end"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Who waits here waits for ever: for what this process has not let go of. It is not let go of
    by chance, either, as the garbage of a cycle."""
    monkeypatch.setattr(status, "LOCK_TIMEOUT", monitor.CONNECT_TIMEOUT)
    gc.disable()
    yield
    gc.enable()


def in_another_thread(call: Callable[[], Any]) -> None:
    """Do CALL there; what it raises is raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except virtbackup.Error as failure:
            failed.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def interrupt(strikes: striking.Strikes, call: Callable[[], Any], then: Callable[[], Any]) -> bool:
    """Strike CALL, and do THEN: at once, while the exception is looked at, or by another thread
    after that. False when there was no place left."""
    try:
        strikes.strike(call)
    except KeyboardInterrupt:
        assert strikes.place
        at_once = strikes.number % 2 == 0
        if at_once:
            then()
    else:
        assert not strikes.place, f"an interrupt was lost: {strikes.place}"
        return False
    if not at_once:
        try:
            in_another_thread(then)
        except virtbackup.Error as failure:
            raise AssertionError(f"struck at {strikes.place}") from failure
    return True


def stop_again(dom: virtbackup.Domain) -> None:
    """Until there is nothing to be stopped any more; each answer must be one of a stop."""
    for _ in range(2):
        try:
            dom.backupStop()
        except virtbackup.Error as failure:
            if failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                return
            assert NOT_COME_TO_AN_END in str(failure)
    raise AssertionError("it is still there")


def what_is_there(machine: machines.Machine, *directories: pathlib.Path) -> Any:
    """In QEMU, and in directories."""
    return machine.state(), [sorted(path.name for path in each.iterdir()) for each in directories]


class BackedUp:
    """A guest of which a backup was made that is over, and what was there before all that comes."""

    def __init__(
        self, machine: machines.Machine, domain: virtbackup.Domain, *directories: pathlib.Path
    ) -> None:
        self.machine, self.domain, self._directories = machine, domain, directories
        self.before = self.look()

    def look(self) -> Any:
        """What is there now."""
        return what_is_there(self.machine, *self._directories)


@pytest.fixture
def backed_up(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, scratch_dir: pathlib.Path, impatient: None
) -> Iterator[BackedUp]:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as connection:
        domain = connection.lookupByID(1)
        domain.backupStart(unix(tmp_path))
        domain.backupStop()
        yield BackedUp(machine, domain, tmp_path, state_dir, scratch_dir)


def test_a_stop_that_is_interrupted_anywhere_can_be_called_again(
    backed_up: BackedUp, tmp_path: pathlib.Path, state_dir: pathlib.Path
) -> None:
    dom = backed_up.domain

    def stop() -> None:
        if not list(state_dir.glob("*.json")):
            # It was over, so the next backup is not taken for it, whoever starts that.
            with virtbackup.open(backed_up.machine.uri) as other:
                other.lookupByID(1).backupStart(unix(tmp_path))
                assert dom.backupGetInfo().state == "running"
                other.lookupByID(1).backupStop()
        stop_again(dom)

    strikes = striking.Strikes(EVERY, HOLD)
    while True:
        dom.backupStart(unix(tmp_path), AUTODESTROY)
        if not interrupt(strikes, dom.backupStop, stop):
            break
        assert backed_up.look() == backed_up.before, strikes.place
    assert strikes.met > 500


def test_a_start_that_is_interrupted_anywhere_is_undone(
    backed_up: BackedUp, tmp_path: pathlib.Path
) -> None:
    """Or what is left of it can be stopped."""
    dom = backed_up.domain
    strikes = striking.Strikes(EVERY, HOLD)

    def start() -> None:
        dom.backupStart(unix(tmp_path), AUTODESTROY if strikes.number % 4 < 2 else 0)

    while interrupt(strikes, start, lambda: stop_again(dom)):
        assert backed_up.look() == backed_up.before, strikes.place
    assert strikes.met > 500
    dom.backupStop()
    assert backed_up.look() == backed_up.before


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", ["backupGetInfo", "backupGetXMLDesc", "XMLDesc", "branchList"])
def test_a_look_that_is_interrupted_anywhere_holds_nothing(
    tmp_path: pathlib.Path, what: str
) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        during = machine.state()
        look = getattr(dom, what)
        strikes = striking.Strikes(EVERY, HOLD)
        while interrupt(strikes, look, look):
            assert machine.state() == during, strikes.place
        assert strikes.met > 40
        dom.backupStop()
        assert machine.state() == before


INTERRUPTED = """
import _thread, sys, threading, virtbackup
dom = virtbackup.open(sys.argv[1]).lookupByID(1)
timer = threading.Timer(float(sys.argv[3]), _thread.interrupt_main)
try:
    timer.start()
    dom.backupStart(sys.argv[2])
    timer.cancel()
    timer.join()
except KeyboardInterrupt:
    print("interrupted")
else:
    print("started")
"""


def test_many_threads_on_one_connection(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        outcomes = []

        def start() -> None:
            try:
                dom.backupStart(unix(tmp_path))
                outcomes.append("won")
            except virtbackup.Error as failure:
                outcomes.append(str(failure))

        threads = [threading.Thread(target=start) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [won, *lost] = sorted(outcomes, reverse=True)
        assert won == "won"
        assert all("another backup job is already running" in text for text in lost), lost
        assert len(lost) == 4
        dom.backupStop()
        assert machine.state() == before
