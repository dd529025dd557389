# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose the scratch images' descriptors are while a backup is watched, whatever comes between."""

import contextlib
import os
import pathlib
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

from tests import hostile_monitor, waiting
from tests.test_ending import RUNNING, having
from virtbackup import errors, hypervisor, runtime
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    domain,
    domain_obj,
    job,
    libvirt_driver,
    lifecycle,
    monitor,
    passthrough,
    status,
    watch,
)


class Nobody:
    """A backup that goes on and has no trouble."""

    def is_over(self) -> bool:
        return False

    def why_ended(self) -> str | None:
        return None

    def note_end(self, reason: str) -> None:
        pass

    def guest_trouble(self) -> str | None:
        return None

    def give_up(self, reason: str) -> bool:
        return True

    def let_go(self) -> None:
        pass


def image_in(directory: pathlib.Path) -> watch.Image:
    return watch.Image("vda", os.open(directory, os.O_RDONLY), 1 << 20)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_file_system_that_cannot_be_asked_costs_no_descriptor(tmp_path: pathlib.Path) -> None:
    good, bad = image_in(tmp_path), image_in(tmp_path)
    os.close(bad.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        watch.Watch([good, bad], Nobody())
    assert not is_open(good.fd)


def test_a_watch_that_is_closed_has_closed_its_descriptors(tmp_path: pathlib.Path) -> None:
    image = image_in(tmp_path)
    watched = watch.Watch([image], Nobody())
    watched.start()
    watched.close()
    assert not is_open(image.fd)


def test_a_watch_that_is_closed_before_it_begins_looks_at_nothing(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where another thread has stopped the backup by then."""
    watched = watch.Watch([image_in(tmp_path)], Nobody())
    watched.close()
    watched.start()
    watched._thread.join()
    assert not caplog.messages


def test_what_cannot_be_done_is_told_once_each(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where two things cannot be, too, the one every half a second and the other every two."""
    asked: list[str] = []

    class Unreachable(Nobody):
        def is_over(self) -> bool:
            raise errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "no lock")

        def guest_trouble(self) -> str | None:
            asked.append("again")
            raise errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "no monitor")

    monkeypatch.setattr(watch, "LONGEST", 0.001)
    monkeypatch.setattr(watch, "LOOK", 0.001)
    watched = watch.Watch([image_in(tmp_path)], Unreachable())
    watched.start()
    waiting.until(lambda: len(asked) > 3)
    watched.close()
    assert len(caplog.messages) == len(set(caplog.messages)) == 2


class Interrupted:
    """A host at whom a signal ends what is done."""

    def why_ended(self) -> str | None:
        return None

    def listen(self, hearing: lifecycle.Hearing) -> None:
        raise KeyboardInterrupt

    def backup_ended(self, reason: str) -> None:
        pass


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(Thread, what the descriptor was of) for each that is closed from now on."""
    found: list[tuple[str, str]] = []
    close = os.close

    def noted(fd: int) -> None:
        what = "nothing"
        with contextlib.suppress(OSError):
            what = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        found.append((threading.current_thread().name, what))
        close(fd)

    monkeypatch.setattr(os, "close", noted)
    return found


@pytest.mark.parametrize("when", ["as it listens", "as it has begun"])
def test_a_start_that_is_interrupted_closes_each_descriptor_once(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    closed: list[tuple[str, str]],
    when: str,
) -> None:
    """Be it by the watch, which has begun by then and looks at none that is closed, or by the
    start."""
    begin = domain_obj.DomainObj._begin_to_watch

    def interrupted(*args: Any) -> None:
        begin(*args)
        raise KeyboardInterrupt

    if when == "as it has begun":
        monkeypatch.setattr(Interrupted, "listen", lambda self, hearing: None)
        monkeypatch.setattr(domain_obj.DomainObj, "_begin_to_watch", interrupted)
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", str(tmp_path / "scratch"))
    address = backup_conf.UnixAddress(str(tmp_path / "nbd.sock"))
    file = status.StatusFile("key", tmp_path / "state")
    with hostile_monitor.HostileMonitor(tmp_path) as qemu:

        @contextlib.contextmanager
        def connect() -> Iterator[domain.Session]:
            with monitor.SocketMonitor(str(qemu.path)) as one:
                yield domain.Session(one, domain.identify(one))
            qemu.play("backup-stop")

        found = domain_obj.DomainObj(file, connect, host=Interrupted())
        qemu.play("backup-start")
        with pytest.raises(KeyboardInterrupt):
            found.backup_start(backup_conf.BackupDef(address, ()), 0)
        found.close()
    assert file.load() is None
    images = [name for name, what in closed if what.startswith(f"{tmp_path}/scratch")]
    assert len(images) == 4  # of two disks, each once as QEMU had it and once as the watch did
    assert images.count("virtbackup-watch") == 2
    assert "nothing" not in [what for _, what in closed]
    assert all("scratch" in what for name, what in closed if name == "virtbackup-watch")


def test_the_end_of_a_qemu_that_cannot_be_seen_from_here_is_heard_of(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a daemon that runs in another container since: what is not seen is not alive for that,
    where libvirt says so."""
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path))
    file = status.StatusFile("key", tmp_path)
    elsewhere = runtime.this_process()._replace(seen_from="pid:[1] time:[1]")
    file.save(having(qemu=elsewhere))

    class Hears(Interrupted):
        def listen(self, hearing: lifecycle.Hearing) -> None:
            shut_down = libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN
            hearing._hear(None, None, libvirt.VIR_DOMAIN_EVENT_STOPPED, shut_down, None)

    def nowhere() -> contextlib.AbstractContextManager[domain.Session]:
        raise AssertionError("nobody is to be asked")

    watched = domain_obj._Watched(job.BackupJob(file, nowhere), RUNNING.id, Hears())
    assert watched.why_ended() is None
    watched.listen(lambda: None)
    assert watched.why_ended() == "the guest shut down"


def test_why_a_domain_ended_is_asked_for_as_its_watch_ends(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, whose stop has ended the backup."""
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path))

    def nowhere() -> contextlib.AbstractContextManager[domain.Session]:
        raise AssertionError("nobody is to be asked")

    file = status.StatusFile("key", tmp_path)
    found = domain_obj.DomainObj(file, nowhere, host=Interrupted())
    looks = iter([domain_obj._Watched(found.job, RUNNING.id, None)])
    forgotten = property(lambda self: next(looks, None))
    monkeypatch.setattr(domain_obj.DomainObj, "_watched", forgotten, raising=False)
    assert found._why_ended() is None


@pytest.mark.parametrize(
    "failure", [monitor.NoAnswer("no reply"), KeyboardInterrupt()], ids=["no answer", "signal"]
)
def test_a_stop_that_was_in_vain_does_not_hold_up_the_close(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """It is tried once more all the same, and goes on where it takes long."""
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(domain_obj, "HASTE", 0.01)
    file = status.StatusFile("key", tmp_path)
    file.save(having())

    def nowhere() -> contextlib.AbstractContextManager[domain.Session]:
        raise AssertionError("nobody is to be asked")

    found = domain_obj.DomainObj(file, nowhere, host=Interrupted())
    found._autodestroy = RUNNING.id
    goes_on, ended = threading.Event(), threading.Event()
    tries = iter([failure])

    def stop(only: object, cancel: bool) -> tuple[str, dict[str, str]]:
        if (first := next(tries, None)) is not None:
            raise first
        goes_on.wait(20)
        ended.set()
        return RUNNING.id, {}

    monkeypatch.setattr(found.job, "stop", stop)
    with pytest.raises(type(failure)):
        found.backup_stop(hypervisor.STOP_CANCEL, RUNNING.id)
    assert not found.close()
    assert not ended.is_set()
    goes_on.set()
    assert ended.wait(20)


class Libvirt:
    """A libvirt's connection, by which no domain can be asked for."""

    def getURI(self) -> str:
        return "qemu:///system"

    def isAlive(self) -> int:
        return 1

    def getLibVersion(self) -> int:
        return 9000000

    def domainEventRegisterAny(self, *_: object) -> int:
        return 0  # asked where an event loop runs, as another test may have left one

    def domainEventDeregisterAny(self, _: int) -> None:
        pass

    def lookupByUUIDString(self, uuid: str) -> None:
        raise errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, "client socket is closed")


def test_a_backup_that_cannot_be_adopted_keeps_no_other_from_being_watched(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one whose process is gone, and whose libvirtd, or file system, does not answer."""
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path))
    own = libvirt_driver.LibvirtDriver(Libvirt())
    with subprocess.Popen(["true"]) as process:
        gone = runtime.Process(process.pid, 1)
    first, second = sorted((own._file(uuid) for uuid in ("one", "two")), key=lambda file: file.path)
    uuids = {own._file(uuid).path: uuid for uuid in ("one", "two")}
    first.save(having(uuid=uuids[first.path], owner=gone))
    document = backup_conf.BackupDef(backup_conf.UnixAddress("/nbd.sock")).format()
    second.save(having(uuid=uuids[second.path], definition=document))
    own.adopt_backups()
    assert [uuid for uuid, one in own._domains.items() if one._watch] == [uuids[second.path]]
    assert "client socket is closed" in caplog.text
    for file in (first, second):
        file.remove()
    for one in own._domains.values():
        one.close()


def test_a_libvirt_that_stands_still_is_not_waited_for_for_ever(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in C, where no signal is seen to: each call by a thread of its own. While one is
    under way the connection is not closed: libvirt would free what it uses."""
    goes_on = threading.Event()
    closed: list[str] = []

    class Hangs(Libvirt):
        def getLibVersion(self) -> int:
            goes_on.wait(20)
            return 9000000

        def lookupByUUIDString(self, uuid: str) -> None:
            goes_on.wait(20)

        def close(self) -> None:
            closed.append("closed")
            goes_on.wait(20)

    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(passthrough, "PATIENCE", 0.1)
    monkeypatch.setattr(domain_obj, "HASTE", 0.1)
    own = libvirt_driver.LibvirtDriver(Hangs())
    own._file(RUNNING.uuid).save(having(uuid=RUNNING.uuid))
    ref = hypervisor.DomainRef("vm", RUNNING.uuid, 1)
    begin = time.monotonic()
    with pytest.raises(monitor.NoAnswer, match="libvirt does not answer within"):
        own.domain_backup_stop(ref, hypervisor.STOP_CANCEL)
    own.close()
    assert not closed
    libvirt_driver.LibvirtDriver(Hangs()).close()
    assert closed
    assert time.monotonic() - begin < 10
    goes_on.set()
