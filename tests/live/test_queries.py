# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt's clients ask for, and events, of a real QEMU without libvirt."""

import contextlib
import json
import os
import pathlib
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

import virtbackup
from tests import waiting
from tests.live import listening, machines
from virtbackup import errors, hypervisor
from virtbackup.qemu import driver as qmp_driver

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-storage-daemon", "qemu-img")

SIZE = 64 << 20
PATIENCE = waiting.DEADLINE


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    with machines.two_disks(tmp_path, "-name", "vm", "-smp", "2") as machine:
        yield machine


@pytest.fixture
def driver(machine: machines.Machine) -> Iterator[qmp_driver.QmpDriver]:
    found = qmp_driver.open(machine.uri, False)
    yield found
    found.close()


@pytest.fixture
def ref(driver: qmp_driver.QmpDriver) -> hypervisor.DomainRef:
    [ref] = driver.list_domains()
    return ref


def test_lookups(driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef) -> None:
    assert driver.domain_lookup(name="vm") == ref
    assert driver.domain_lookup(uuid=ref.uuid) == ref
    assert driver.domain_lookup(id=ref.id) == ref
    assert driver.domain_lookup(name="another") is None
    assert driver.domain_lookup(id=4711) is None


def test_the_domain(
    driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef, machine: machines.Machine
) -> None:
    state, most, memory, vcpus, used = driver.domain_get_info(ref)
    assert (state, most, memory, vcpus) == (libvirt.VIR_DOMAIN_RUNNING, 64 << 10, 64 << 10, 2)
    assert 0 < used < 60 * 10**9
    machine.kill()
    driver._file.path.write_text("")  # as if something were known of a backup
    assert driver.domain_get_info(ref) == (libvirt.VIR_DOMAIN_SHUTOFF, 0, 0, 0, 0)


def test_disks(
    driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef, machine: machines.Machine
) -> None:
    raw = machine.directory / "b.raw"
    machine.io("sdb", "write -P 1 0 1M")
    for path in ("sdb", str(raw)):
        found = driver.domain_get_block_info(ref, path, 0)
        assert found == (SIZE, raw.stat().st_blocks * 512, SIZE)
    capacity, allocation, physical = driver.domain_get_block_info(ref, "vda", 0)
    assert capacity == SIZE
    assert 0 < allocation < SIZE
    assert physical == (machine.directory / "a.qcow2").stat().st_size
    by_disk = [driver.domain_block_stats_flags(ref, path, 0) for path in ("vda", "sdb")]
    together = driver.domain_block_stats_flags(ref, "", 0)
    assert list(together) == [
        "wr_bytes", "wr_operations", "rd_bytes", "rd_operations", "flush_operations",
        "wr_total_times", "rd_total_times", "flush_total_times",
    ]  # fmt: skip
    assert together == {name: sum(disk[name] for disk in by_disk) for name in together}


def test_what_the_firmware_read_is_counted(tmp_path: pathlib.Path) -> None:
    image = machines.image(tmp_path / "a", SIZE)
    node = f"raw,node-name=A,file.driver=file,file.filename={image}"
    with (
        machines.qemu(
            tmp_path, *machines.BOOTING, "-blockdev", node, "-device", "virtio-blk,drive=A,id=vda"
        ) as booted,
        contextlib.closing(qmp_driver.open(booted.uri, True)) as driver,
    ):
        [ref] = driver.list_domains()
        waiting.until(lambda: driver.domain_block_stats_flags(ref, "vda", 0)["rd_bytes"])
        assert driver.domain_block_stats_flags(ref, str(image), 0)["rd_operations"]


def test_block_jobs_of_others(
    driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef, machine: machines.Machine
) -> None:
    backup = virtbackup.api.Domain(virtbackup.api.Connection(machine.uri, driver, False), ref)
    backup.backupStart(
        f'<domainbackup><address type="unix" path="{machine.directory}/nbd.sock"/></domainbackup>'
    )
    assert driver.domain_get_block_job_info(ref, "vda", 0) is None
    backup.backupStop()
    target = {"driver": "file", "filename": str(machine.directory / "copy")}
    machines.image(machine.directory / "copy", SIZE)
    machine.probe("blockdev-add", driver="raw", node_name="T", file=target)
    machine.io("sdb", f"write -P 1 0 {SIZE}")
    machine.probe(
        "blockdev-mirror", job_id="m0", device="B", target="T", sync="full", speed=1500000
    )
    found = driver.domain_get_block_job_info(ref, "sdb", 0)
    assert found is not None
    kind, bandwidth, cur, end = found
    assert (kind, bandwidth) == (libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY, 2)
    assert 0 <= cur <= end == SIZE
    exact = libvirt.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES
    found = driver.domain_get_block_job_info(ref, "sdb", exact)
    assert found is not None
    assert found[1] == 1500000
    assert driver.domain_get_block_job_info(ref, "vda", 0) is None


def test_the_monitor(driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef) -> None:
    assert driver.domain_monitor_command(ref, "info status", 1) == "VM status: running\r\n"
    reply = driver.domain_monitor_command(ref, '{"execute":"query-name"}', 0)
    assert reply == '{"return":{"name":"vm"}}'
    arguments = '{"execute": "qom-get", "arguments": {"path": "/nope", "property": "x"}}'
    refused = json.loads(driver.domain_monitor_command(ref, arguments, 0))
    assert refused["error"]["class"] == "DeviceNotFound"
    assert "/nope" in refused["error"]["desc"]


REFUSED: list[tuple[Any, int, str]] = [
    (lambda d, r: d.domain_monitor_command(r, "nonsense", 0), libvirt.VIR_ERR_INTERNAL_ERROR,
     "cannot parse json nonsense: "),
    (lambda d, r: d.domain_monitor_command(r, '["x"]', 0), libvirt.VIR_ERR_INVALID_ARG, "expected"),
    (lambda d, r: d.domain_monitor_command(r, '{"execute":"stop","id":1}', 0),
     libvirt.VIR_ERR_INVALID_ARG, "expected"),
    (lambda d, r: d.domain_monitor_command(r, "info status", 4), libvirt.VIR_ERR_INVALID_ARG,
     "unsupported flags (0x4)"),
    (lambda d, r: d.domain_resume(r), libvirt.VIR_ERR_OPERATION_INVALID,
     "domain is already running"),
    (lambda d, r: d.domain_get_block_info(r, "nope", 0), libvirt.VIR_ERR_INVALID_ARG,
     "invalid argument: invalid path nope not assigned to domain"),
    (lambda d, r: d.domain_block_stats_flags(r, "nope", 0), libvirt.VIR_ERR_INVALID_ARG,
     "invalid argument: invalid path: nope"),
    (lambda d, r: d.domain_get_block_job_info(r, "nope", 0), libvirt.VIR_ERR_INVALID_ARG,
     "invalid argument: disk 'nope' not found in domain"),
]  # fmt: skip


def test_refused_in_libvirts_words(driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef) -> None:
    for call, code, text in REFUSED:
        with pytest.raises(errors.Error) as caught:
            call(driver, ref)
        assert caught.value.get_error_code() == code
        assert text in str(caught.value)


def test_a_storage_daemon(tmp_path: pathlib.Path) -> None:
    image = machines.image(tmp_path / "a", SIZE)
    node = f"raw,node-name=A,file.driver=file,file.filename={image}"
    with (
        machines.storage_daemon(tmp_path, "--blockdev", node) as machine,
        contextlib.closing(qmp_driver.open(machine.uri, False)) as driver,
    ):
        [ref] = driver.list_domains()
        state, memory, _, vcpus, _ = driver.domain_get_info(ref)
        assert (state, memory, vcpus) == (libvirt.VIR_DOMAIN_RUNNING, 0, 0)
        assert driver.domain_get_block_info(ref, "A", 0)[0] == SIZE
        assert driver.domain_get_block_job_info(ref, "A", 0) is None
        assert "return" in driver.domain_monitor_command(ref, '{"execute":"query-jobs"}', 0)
        for call in (
            lambda: driver.domain_block_stats_flags(ref, "A", 0),
            lambda: driver.domain_suspend(ref),
            lambda: driver.domain_resume(ref),
            lambda: driver.domain_monitor_command(ref, "info status", 1),
        ):
            with pytest.raises(errors.Error, match=r"qemu-storage-daemon .* has no ") as caught:
                call()
            assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED


# --- events ---------------------------------------------------------------------------------------


class Ear:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[hypervisor.Event] = queue.SimpleQueue()

    def __call__(self, event: hypervisor.Event) -> None:
        self._events.put(event)

    def next(self) -> hypervisor.Event:
        return self._events.get(timeout=PATIENCE)

    def is_silent(self, seconds: float = 0.5) -> bool:
        try:
            self._events.get(timeout=seconds)
        except queue.Empty:
            return True
        return False


def threads() -> list[str]:
    """Those that events take."""
    names = ("virtbackup-ending", "virtbackup-process-end")
    return [thread.name for thread in threading.enumerate() if thread.name in names]


def test_what_happens_to_the_guest(
    driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef, machine: machines.Machine
) -> None:
    ear, other = Ear(), Ear()
    end = driver.event_register(ear)
    end_other = driver.event_register(other)
    driver.domain_suspend(ref)
    assert machine.probe("query-status")["status"] == "paused"
    driver.domain_suspend(ref)
    driver.domain_resume(ref)
    assert machine.probe("query-status")["running"]
    suspended = hypervisor.LifecycleEvent(
        ref, libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED
    )
    resumed = hypervisor.LifecycleEvent(
        ref, libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_RESUMED_UNPAUSED
    )
    assert [ear.next(), ear.next(), other.next(), other.next()] == [suspended, resumed] * 2
    end_other()
    end_other()
    os.kill(machine.probe.pid, signal.SIGKILL)
    gone = hypervisor.DomainRef(ref.name, ref.uuid, None)
    assert ear.next() == hypervisor.LifecycleEvent(
        gone, libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN
    )
    assert ear.is_silent(0.1)
    assert other.is_silent(0.1)
    end()
    waiting.until(lambda: not threads())


def test_threads_are_there_only_while_somebody_listens(driver: qmp_driver.QmpDriver) -> None:
    assert threads() == []
    end = driver.event_register(Ear())
    assert threads() == ["virtbackup-process-end"]
    end()
    waiting.until(lambda: not threads())
    driver.event_register(Ear())
    driver.close()
    waiting.until(lambda: not threads())


def document(machine: machines.Machine) -> str:
    return (
        f'<domainbackup><address type="unix" path="{machine.directory}/nbd.sock"/></domainbackup>'
    )


def test_the_end_of_a_backup_is_told_once(
    driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef, machine: machines.Machine
) -> None:
    ear = Ear()
    end = driver.event_register(ear)
    for cancel, expected in (
        (0, hypervisor.BackupEnded(ref, True, None)),
        (1, hypervisor.BackupEnded(ref, False, "the backup was cancelled")),
    ):
        driver.domain_backup_start(ref, document(machine), 0)
        driver.domain_backup_get_info(ref, 0)
        driver.domain_backup_stop(ref, cancel)
        assert ear.next() == expected
    driver.domain_backup_start(ref, document(machine), 0)
    [job, *_] = machine.probe("query-jobs")
    machine.probe("job-cancel", id=job["id"])
    with pytest.raises(errors.Error) as caught:
        driver.domain_backup_stop(ref, 0)
    told = ear.next()
    assert isinstance(told, hypervisor.BackupEnded)
    assert not told.good
    assert str(caught.value) == f"operation failed: {told.reason}"
    assert ear.is_silent()
    end()
    waiting.until(lambda: not threads())


def test_the_end_by_another_process(
    driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef, machine: machines.Machine
) -> None:
    """Of one that ran when the listener came. Another that begins and ends before it looks again is
    not told of, and does no harm."""
    driver.domain_backup_start(ref, document(machine), 0)
    with listening.listening(machine.uri) as listener:
        driver.domain_backup_stop(ref, 0)
        name, _, good, reason = listener.next("ended")
        assert name == "vm"
        assert good or "stopped by another process" in reason  # if it came too late for the verdict
        driver.domain_backup_start(ref, document(machine), 0)
        driver.domain_backup_stop(ref, 0)
        assert listener.close() == []


def test_the_end_by_the_end_of_qemu(
    driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef, machine: machines.Machine
) -> None:
    ear = Ear()
    driver.event_register(ear)
    driver.domain_backup_start(ref, document(machine), 0)
    machine.kill()
    assert isinstance(ear.next(), hypervisor.LifecycleEvent)
    gone = hypervisor.DomainRef(ref.name, ref.uuid, None)
    assert ear.next() == hypervisor.BackupEnded(gone, False, "QEMU is gone")
    with pytest.raises(errors.Error, match="QEMU is gone"):
        driver.domain_backup_stop(ref, 0)
    assert ear.is_silent()


def test_a_backup_that_is_given_up(
    driver: qmp_driver.QmpDriver, ref: hypervisor.DomainRef, machine: machines.Machine
) -> None:
    ear = Ear()
    driver.event_register(ear)
    driver.domain_backup_start(ref, document(machine), 0)
    running = driver._file.load()
    assert running is not None
    driver._domain.job.give_up(running.id, "given up, as a test said so")
    assert ear.next() == hypervisor.BackupEnded(ref, False, "given up, as a test said so")
    with pytest.raises(errors.Error, match="given up"):
        driver.domain_backup_stop(ref, 0)
    assert ear.is_silent()
