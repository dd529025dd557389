# SPDX-License-Identifier: LGPL-2.1-or-later
"""The remote driver against a real libvirtd, which it asks as libvirt's own client does and whose
backups it makes by the merged calls; and against a virtbackupd that is killed meanwhile."""

import contextlib
import logging
import pathlib
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator

import libvirt
import pytest

import virtbackup
from tests import daemon_scene, waiting
from tests.live import libvirtd
from virtbackup import hypervisor
from virtbackup.remote import driver

pytestmark = pytest.mark.needs("libvirtd", "virsh", "qemu-system-x86_64", "nbdcopy", "unshare")

DEADLINE = waiting.DEADLINE
BACKUP_ENDED = virtbackup.VIR_DOMAIN_EVENT_ID_BACKUP_ENDED
LIFECYCLE = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE


@pytest.fixture
def domain(host: libvirtd.Host) -> Iterator[libvirtd.Domain]:
    """One with two disks."""
    disks = "".join(
        libvirtd.disk_xml(target, libvirtd.image(host.path(f"{target}.img"), number))
        for number, target in enumerate(("vda", "sdb"))
    )
    with host.domain("two", disks) as made:
        yield made


@pytest.fixture
def uri(host: libvirtd.Host) -> str:
    return f"virtbackup+unix://{host.daemon.socket}"


def document(host: libvirtd.Host, inside: str = "") -> str:
    path = host.path("nbd.sock")
    return f'<domainbackup><address type="unix" path="{path}"/>{inside}</domainbackup>'


def test_it_sees_what_libvirts_own_client_sees(
    host: libvirtd.Host, domain: libvirtd.Domain, uri: str
) -> None:
    theirs, their = host.connection, domain.libvirt
    with contextlib.closing(driver.open(uri, False)) as ours:
        assert ours.get_type() == theirs.getType()
        assert ours.get_version() == theirs.getVersion()
        assert ours.get_lib_version() == theirs.getLibVersion()
        assert ours.get_hostname() == theirs.getHostname()
        assert ours.get_capabilities() == theirs.getCapabilities()
        model, kib, *numbers = ours.node_get_info()
        assert [model, kib // 1024, *numbers] == theirs.getInfo()  # libvirt-python's has MiB
        assert list(ours.node_get_security_model()) == theirs.getSecurityModel()
        [ref] = [one for one in ours.list_domains() if one.name == "two"]
        assert ref == hypervisor.DomainRef("two", their.UUIDString(), their.ID())
        for wanted in ({"name": "two"}, {"uuid": ref.uuid}, {"id": ref.id}):
            assert ours.domain_lookup(**wanted) == ref
        assert ours.domain_lookup(name="three") is None
        assert list(ours.domain_get_state(ref)) == their.state()
        assert ours.domain_get_xml_desc(ref, 0) == their.XMLDesc()
        assert ours.domain_get_info(ref)[:4] == tuple(their.info()[:4])
        assert ours.domain_get_os_type(ref) == their.OSType()
        assert ours.domain_is_persistent(ref) == bool(their.isPersistent())
        assert ours.domain_get_autostart(ref) == bool(their.autostart())
        assert [ours.domain_get_security_label(ref)] == [
            (their.securityLabel()[0], bool(their.securityLabel()[1]))
        ]
        assert list(ours.domain_get_block_info(ref, "vda", 0)) == their.blockInfo("vda")
        assert ours.domain_block_stats_flags(ref, "vda", 0) == their.blockStatsFlags("vda")
        assert ours.domain_get_block_job_info(ref, "vda", 0) is None
        state = libvirt.VIR_DOMAIN_STATS_STATE | libvirt.VIR_DOMAIN_STATS_BLOCK
        [(of, stats)] = ours.get_all_domain_stats([ref], state, 0)
        [(_, their_stats)] = theirs.domainListGetStats([their], state)
        assert (of, stats) == (ref, their_stats)
        said = ours.domain_monitor_command(ref, '{"execute":"query-name"}', 0)
        assert '"two"' in said
        with pytest.raises(virtbackup.Error) as caught:
            ours.domain_fsfreeze(ref, [], 0)
        assert _told(caught.value) == _their_failure(lambda: their.fsFreeze())
        ours.domain_suspend(ref)
        assert ours.domain_get_state(ref)[0] == libvirt.VIR_DOMAIN_PAUSED
        ours.domain_resume(ref)


def _told(failure: libvirt.libvirtError) -> tuple[object, ...]:
    return failure.get_error_code(), failure.get_error_domain(), failure.get_error_message()


def _their_failure(call: object) -> tuple[object, ...]:
    with pytest.raises(libvirt.libvirtError) as caught:
        call()  # type: ignore[operator]
    return _told(caught.value)


def test_a_backup_by_the_merged_calls(
    host: libvirtd.Host,
    domain: libvirtd.Domain,
    uri: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    events: queue.SimpleQueue[tuple[object, ...]] = queue.SimpleQueue()
    with virtbackup.open(uri) as connection:
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert warned == ["server is libvirt's own: using virDomainBackupBegin"]
        two = connection.lookupByName("two")
        connection.domainEventRegisterAny(
            None, BACKUP_ENDED, lambda c, d, *rest: events.put((d.name(), *rest)), None
        )
        two.backupStart(document(host, '<disks><disk name="sdb" present="no"/></disks>'))
        info = two.backupGetInfo()
        assert [(disk.name, disk.capacity) for disk in info.disks] == [("vda", libvirtd.SIZE)]
        assert str(host.path("nbd.sock")) in two.backupGetXMLDesc()
        domain.write("vda", 3)
        assert libvirtd.read(host.path("nbd.sock"), "vda") == libvirtd.pattern(0)
        with pytest.raises(virtbackup.Error, match="another backup job is already running"):
            two.backupStart(document(host))
        two.backupStop()
        assert events.get(timeout=DEADLINE) == ("two", True, None, None)
        for call in (two.backupStop, two.backupGetInfo, two.backupGetXMLDesc):
            with pytest.raises(virtbackup.Error) as caught:
                call()
            assert caught.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
        with pytest.raises(virtbackup.Error, match="checkpoints, no branches"):
            two.branchList()
        with pytest.raises(virtbackup.Error, match="checkpoints, no branches"):
            two.backupStart(document(host, '<branch name="b"/>'))
    assert not [line for line in str(domain.state()).split("'") if "virtbackup" in line]


def test_autodestroy_on_libvirts_own(
    host: libvirtd.Host, domain: libvirtd.Domain, uri: str
) -> None:
    with virtbackup.open(uri) as connection:
        two = connection.lookupByName("two")
        two.backupStart(document(host), virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)
        assert domain.libvirt.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE
    assert domain.libvirt.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE


def test_errors_are_those_of_libvirts_own_client(
    host: libvirtd.Host, domain: libvirtd.Domain, uri: str
) -> None:
    with contextlib.closing(driver.open(uri, False)) as ours:
        nobody = hypervisor.DomainRef("nobody", "0" * 8 + "-0000-4000-8000-" + "0" * 12, None)
        with pytest.raises(virtbackup.Error) as caught:
            ours.domain_get_state(nobody)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN
        with pytest.raises(virtbackup.Error) as caught:
            ours.domain_monitor_command(nobody, "{}", 1 << 20)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_INVALID_ARG
    with contextlib.closing(libvirt.openReadOnly(host.daemon.uri)) as read_only:
        theirs = read_only.lookupByName("two")
        ref = hypervisor.DomainRef("two", theirs.UUIDString(), theirs.ID())
        with contextlib.closing(driver.open(uri, True)) as reader:
            with pytest.raises(virtbackup.Error) as caught:
                reader.domain_suspend(ref)
            assert _told(caught.value) == _their_failure(lambda: theirs.suspend())
            assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_DENIED
    with pytest.raises(virtbackup.Error) as caught:
        virtbackup.open(f"{uri}?name=nosuch:///")
    assert _told(caught.value)[::2] == (
        libvirt.VIR_ERR_NO_CONNECT,
        "no connection driver available for nosuch:///",
    )


def test_libvirtd_is_killed_and_started_again(
    host: libvirtd.Host, domain: libvirtd.Domain, uri: str
) -> None:
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    with (
        virtbackup.open(uri) as lost,
        virtbackup.open(f"{uri}?reconnect=yes") as again,
    ):
        again.domainEventRegisterAny(None, LIFECYCLE, lambda c, d, e, *_: events.put(e), None)
        host.daemon.kill()
        host.daemon.start()
        host.connection = libvirt.open(host.daemon.uri)
        libvirtd.wait_for(lambda: lost.isAlive() == 0)
        with pytest.raises(virtbackup.Error, match="client socket is closed"):
            lost.listAllDomains()
        two = again.lookupByName("two")
        host.connection.lookupByName("two").suspend()
        assert events.get(timeout=DEADLINE) == libvirt.VIR_DOMAIN_EVENT_SUSPENDED
        two.backupStart(document(host))
        two.backupStop()


def test_the_shell_and_its_trace(
    host: libvirtd.Host, domain: libvirtd.Domain, uri: str, tmp_path: pathlib.Path
) -> None:
    trace = tmp_path / "trace"
    done = subprocess.run(
        [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", uri, "--trace", str(trace),
         "domblklist", "two"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "vda" in done.stdout
    lines = trace.read_text().splitlines()
    assert any(" -> REMOTE.DOMAIN_LOOKUP_BY_NAME serial=" in line for line in lines)
    assert any(" <- REMOTE.DOMAIN_GET_XML_DESC serial=" in line for line in lines)


# --- a daemon of ours ---


def test_our_daemon_is_killed_during_a_backup(
    host: libvirtd.Host, domain: libvirtd.Domain, tmp_path: pathlib.Path
) -> None:
    """The backup runs on, and is stopped through the next daemon, by whoever connects anew."""
    with virtbackup.open(host.daemon.uri) as local, contextlib.ExitStack() as stack:
        with daemon_scene.Program(tmp_path, "--uri", host.daemon.uri) as first:
            uri = f"virtbackup+unix://{first.path}?reconnect=yes"
            opened = stack.enter_context(virtbackup.open(uri))
            two = opened.lookupByName("two")
            two.backupStart(document(host, '<branch name="nightly"/>'))
            first.end(signal.SIGKILL)
        libvirtd.wait_for(lambda: opened.isAlive() == 0)
        with daemon_scene.running(tmp_path, host.daemon.uri):
            info = two.backupGetInfo()
            assert info.branch == "nightly"
            assert libvirtd.read(host.path("nbd.sock"), "vda") == libvirtd.pattern(0)
            there = local.lookupByName("two")
            assert there.backupGetInfo().id == info.id
            assert there.backupGetXMLDesc() == two.backupGetXMLDesc()
            two.backupStop()
            assert there.branchList() == two.branchList()
            two.branchDelete("nightly")
            opened.close()


def test_autodestroy_when_the_client_is_killed(
    host: libvirtd.Host, domain: libvirtd.Domain, tmp_path: pathlib.Path
) -> None:
    code = (
        "import sys, virtbackup\n"
        "conn = virtbackup.open(sys.argv[1])\n"
        "flag = virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY\n"
        "conn.lookupByName('two').backupStart(sys.argv[2], flag)\n"
        "print('started', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(daemon_scene.running(tmp_path, host.daemon.uri))
        uri = f"virtbackup+unix://{served.path}"
        opened = stack.enter_context(virtbackup.open(uri))
        events: queue.SimpleQueue[bool] = queue.SimpleQueue()
        opened.domainEventRegisterAny(
            None, BACKUP_ENDED, lambda c, d, good, *_: events.put(good), None
        )
        client = subprocess.Popen(
            [sys.executable, "-c", code, uri, document(host)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert client.stdout is not None
        assert client.stdout.readline() == b"started\n"
        assert opened.lookupByName("two").backupGetInfo().state == "running"
        client.kill()
        client.communicate(timeout=DEADLINE)
        libvirtd.wait_for(lambda: _ended(opened))
        assert events.get(timeout=DEADLINE) is False


def _ended(connection: virtbackup.Connection) -> bool:
    try:
        connection.lookupByName("two").backupGetInfo()
    except virtbackup.Error as failure:
        return bool(failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP)
    return False
