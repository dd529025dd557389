# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt's own clients ask for, and events, by the driver on a real libvirt: as libvirt has
them."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import libvirt_qemu
import pytest

import virtbackup
from tests.live import libvirtd, listening
from tests.live.libvirtd import disk_xml, image
from virtbackup import errors, hypervisor
from virtbackup.qemu import libvirt_driver

pytestmark = pytest.mark.needs("libvirtd", "qemu-system-x86_64", "unshare")


@contextlib.contextmanager
def running(host: libvirtd.Host, name: str, directory: pathlib.Path) -> Iterator[libvirtd.Domain]:
    """A domain with two disks in DIRECTORY."""
    vda = image(directory / f"{name}-a.qcow2", 1)
    sdb = image(directory / f"{name}-b.raw", 2, "raw")
    with host.domain(name, disk_xml("vda", vda) + disk_xml("sdb", sdb, "raw")) as domain:
        yield domain


@pytest.fixture(scope="module")
def place(libvirt_host: libvirtd.Host) -> pathlib.Path:
    """Where files may stay as long as this module's tests go on."""
    path = libvirt_host.path("asked")
    path.mkdir()
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def asked(libvirt_host: libvirtd.Host, place: pathlib.Path) -> Iterator[str]:
    """The name of a domain for all tests: it runs before and after each."""
    with running(libvirt_host, "asked", place):
        yield "asked"


@pytest.fixture
def domain(host: libvirtd.Host, asked: str) -> libvirtd.Domain:
    """By the connection of now: a test may have restarted the daemon."""
    return libvirtd.Domain(host.connection.lookupByName(asked))


@pytest.fixture
def doomed(host: libvirtd.Host) -> Iterator[libvirtd.Domain]:
    """One for a test that ends it."""
    with running(host, "doomed", host.directory) as domain:
        yield domain


@pytest.fixture(params=["", "&native=yes"], ids=["ours", "native"])
def driver(host: libvirtd.Host, request: pytest.FixtureRequest) -> Iterator[Any]:
    found = libvirt_driver.open(host.daemon.uri + request.param, False)
    yield found
    found.close()


def ref_of(domain: libvirtd.Domain) -> hypervisor.DomainRef:
    return hypervisor.DomainRef(
        domain.libvirt.name(), domain.libvirt.UUIDString(), domain.libvirt.ID()
    )


def test_the_host(host: libvirtd.Host, driver: Any) -> None:
    connection = host.connection
    assert driver.get_hostname() == connection.getHostname()
    assert driver.get_lib_version() == connection.getLibVersion()
    assert driver.get_capabilities() == connection.getCapabilities()
    assert driver.node_get_security_model() == tuple(connection.getSecurityModel())
    model, memory, *rest = driver.node_get_info()
    assert [model, memory >> 10, *rest] == connection.getInfo()
    cells = [connection.getMemoryStats(cell)["total"] for cell in (-1, *range(rest[2]))]
    told = {cells[0], sum(cells[1:])}  # as libvirt has counted it, one way or the other
    assert memory in {kib for kib in told if kib >> 10 == memory >> 10}


def test_lookups(host: libvirtd.Host, domain: libvirtd.Domain, driver: Any) -> None:
    ref = ref_of(domain)
    assert driver.domain_lookup(uuid=ref.uuid) == ref
    assert driver.domain_lookup(name="asked") == ref
    assert driver.domain_lookup(id=ref.id) == ref
    assert driver.domain_lookup(uuid=ref.uuid.replace("-", "")) == ref
    assert driver.domain_lookup(name="another") is None
    assert driver.domain_lookup(name="not UTF-8: \udcff") is None
    assert driver.domain_lookup(id=4711) is None
    assert driver.domain_lookup(uuid="6695eb01-f6a4-8304-79aa-97f2502e193f") is None
    with pytest.raises(virtbackup.Error, match="Invalid UUID"):
        driver.domain_lookup(uuid="none")


def test_a_domain_that_is_gone_is_found_while_its_backup_is_not(
    host: libvirtd.Host, doomed: libvirtd.Domain
) -> None:
    with virtbackup.open(host.daemon.uri) as connection:
        dom = connection.lookupByName("doomed")
        dom.backupStart(
            f'<domainbackup><address type="unix" path="{host.path("nbd.sock")}"/></domainbackup>'
        )
        doomed.libvirt.destroy()
        for found in (
            connection.lookupByName("doomed"), connection.lookupByUUIDString(dom.UUIDString())
        ):  # fmt: skip
            assert (found.name(), found.UUIDString(), found.ID()) == (
                "doomed",
                dom.UUIDString(),
                -1,
            )
        with pytest.raises(virtbackup.Error, match=libvirtd.end_of_a_transient_domain()):
            dom.backupStop()
        with pytest.raises(virtbackup.Error, match="no domain with matching name 'doomed'"):
            connection.lookupByName("doomed")


def test_a_domain(place: pathlib.Path, domain: libvirtd.Domain, driver: Any) -> None:
    domain.write("vda", 3)
    domain.libvirt.suspend()
    ref, theirs = ref_of(domain), domain.libvirt
    *info, time = driver.domain_get_info(ref)
    *expected, later = theirs.info()
    assert info == expected
    assert 0 < time <= later
    assert driver.domain_get_os_type(ref) == theirs.OSType()
    assert driver.domain_is_persistent(ref) is bool(theirs.isPersistent())
    assert driver.domain_get_autostart(ref) is bool(theirs.autostart())
    if hasattr(theirs, "autostartOnce"):
        assert driver.domain_get_autostart_once(ref) is bool(theirs.autostartOnce())
    else:
        with pytest.raises(virtbackup.Error, match="connection driver: virDomainGetAutostartOnce"):
            driver.domain_get_autostart_once(ref)
    assert driver.domain_has_managed_save_image(ref, 0) is False
    assert driver.domain_get_security_label(ref) == tuple(theirs.securityLabel())
    messages = driver.domain_get_messages(ref, 0)
    assert messages == theirs.messages(0)
    assert any("tainted" in line for line in messages)
    for path in ("vda", "sdb", str(place / "asked-a.qcow2")):
        assert driver.domain_get_block_info(ref, path, 0) == tuple(theirs.blockInfo(path, 0))
    for path in ("vda", "sdb", ""):
        assert driver.domain_block_stats_flags(ref, path, 0) == theirs.blockStatsFlags(path, 0)
    domain.libvirt.resume()


def test_statistics(host: libvirtd.Host, domain: libvirtd.Domain, driver: Any) -> None:
    ref = ref_of(domain)
    gone = hypervisor.DomainRef("gone", "6695eb01-f6a4-8304-79aa-97f2502e193f", 7)
    [(theirs, expected)] = host.connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_BLOCK, 0)
    assert theirs.name() == ref.name
    assert expected["block.count"] == 2
    for domains in ([], [ref], [gone, ref]):
        found = driver.get_all_domain_stats(domains, libvirt.VIR_DOMAIN_STATS_BLOCK, 0)
        assert found == [(ref, expected)]
    assert driver.get_all_domain_stats([gone], 0, 0) == []


def test_block_jobs(host: libvirtd.Host, domain: libvirtd.Domain, driver: Any) -> None:
    ref, theirs = ref_of(domain), domain.libvirt
    assert driver.domain_get_block_job_info(ref, "vda", 0) is None
    target = f"<disk type='file'><source file='{host.path('copy')}'/></disk>"
    theirs.blockCopy("vda", target, {"bandwidth": 1 << 20}, libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)  # fmt: skip  # noqa: E501
    try:
        kind, bandwidth, cur, end = driver.domain_get_block_job_info(ref, "vda", 0)
        expected = theirs.blockJobInfo("vda", 0)
        assert (kind, bandwidth, end) == tuple(
            expected[key] for key in ("type", "bandwidth", "end")
        )
        assert kind == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY
        assert cur <= end
    finally:
        theirs.blockJobAbort("vda")


def test_deeds(domain: libvirtd.Domain, driver: Any) -> None:
    ref, theirs = ref_of(domain), domain.libvirt
    driver.domain_suspend(ref)
    assert theirs.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    driver.domain_resume(ref)
    assert theirs.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    said = driver.domain_monitor_command(ref, "info status", 1)
    assert said == libvirt_qemu.qemuMonitorCommand(theirs, "info status", 1)
    assert '"return"' in driver.domain_monitor_command(ref, '{"execute":"query-status"}', 0)


NOWHERE = hypervisor.DomainRef("gone", "6695eb01-f6a4-8304-79aa-97f2502e193f", None)


def test_refused_as_libvirt_refuses(domain: libvirtd.Domain, driver: Any) -> None:
    ref, theirs = ref_of(domain), domain.libvirt
    pairs: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: driver.domain_get_block_info(ref, "nope", 0), lambda: theirs.blockInfo("nope", 0)),
        (lambda: driver.domain_block_stats_flags(ref, "nope", 0),
         lambda: theirs.blockStatsFlags("nope", 0)),
        (lambda: driver.domain_get_block_job_info(ref, "nope", 0),
         lambda: theirs.blockJobInfo("nope", 0)),
        (lambda: driver.domain_resume(ref), lambda: theirs.resume()),
        (lambda: driver.domain_fsfreeze(ref, [], 0), lambda: theirs.fsFreeze(None, 0)),
        (lambda: driver.domain_fsthaw(ref, ["/"], 0), lambda: theirs.fsThaw(["/"], 0)),
        (lambda: driver.domain_monitor_command(ref, "x", 0),
         lambda: libvirt_qemu.qemuMonitorCommand(theirs, "x", 0)),
        (lambda: driver.domain_get_info(NOWHERE),
         lambda: theirs.connect().lookupByUUIDString(NOWHERE.uuid)),
    ]  # fmt: skip
    for ours, expected in pairs:
        with pytest.raises(libvirt.libvirtError) as of_libvirt:
            expected()
        with pytest.raises(errors.Error) as caught:
            ours()
        assert caught.value.err == of_libvirt.value.err


def test_what_is_not_utf_8_is_refused(domain: libvirtd.Domain, driver: Any) -> None:
    ref, other = ref_of(domain), "\udcff"  # as the byte 0xff comes
    calls: list[Callable[[], Any]] = [
        lambda: driver.domain_get_block_info(ref, other, 0),
        lambda: driver.domain_block_stats_flags(ref, other, 0),
        lambda: driver.domain_get_block_job_info(ref, other, 0),
        lambda: driver.domain_monitor_command(ref, other, 0),
        lambda: virtbackup.open(f"qemu:///system?socket=/{other}"),
    ]
    for call in calls:
        with pytest.raises(errors.Error, match="is not UTF-8") as caught:
            call()
        assert caught.value.get_error_code() == libvirt.VIR_ERR_INVALID_ARG


# --- events ---------------------------------------------------------------------------------------

STARTED = (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED)
SUSPENDED = (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED)
RESUMED = (libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_RESUMED_UNPAUSED)
STOPPED = (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED)


def lifecycle(listener: listening.Listener) -> tuple[str, tuple[int, int]]:
    """The next event: whose, and which; those on the way to it left out."""
    between = (libvirt.VIR_DOMAIN_EVENT_SHUTDOWN,)
    while True:
        name, _, _, event, detail = listener.next("lifecycle")
        if event not in between:
            return name, (event, detail)


def test_lifecycle_events(host: libvirtd.Host) -> None:
    """In a program that has an event loop, until nobody wants to hear them any more."""
    disk = disk_xml("vda", image(host.path("a.qcow2"), 1))
    with listening.listening(host.daemon.uri, "own") as listener:
        with host.domain("happens", disk) as domain:
            assert lifecycle(listener) == ("happens", RESUMED)
            assert lifecycle(listener) == ("happens", STARTED)
            domain.libvirt.suspend()
            assert lifecycle(listener) == ("happens", SUSPENDED)
            domain.libvirt.resume()
            assert lifecycle(listener) == ("happens", RESUMED)
        assert lifecycle(listener) == ("happens", STOPPED)
        listener.is_silent_after("deregister", "silent")
        with host.domain("unheard", disk):
            pass
        assert listener.close() == []


def test_events_go_on_after_a_restart_of_libvirt(host: libvirtd.Host) -> None:
    """Although nobody asks for anything."""
    with listening.listening(host.daemon.uri, "loop") as listener:
        host.daemon.kill()
        host.daemon.start()
        host.connection = libvirt.open(host.daemon.uri)
        xml = libvirtd.domain_xml("defined", "")
        while not listener.has_heard(0.1):  # it looks for the daemon now and then
            host.connection.defineXML(xml).undefine()
        assert listener.next("lifecycle")[0] == "defined"


def test_without_a_loop_only_the_ends_of_backups(
    host: libvirtd.Host, doomed: libvirtd.Domain
) -> None:
    document = f'<domainbackup><address type="unix" path="{host.path("nbd.sock")}"/></domainbackup>'
    uuid = doomed.libvirt.UUIDString()
    with virtbackup.open(host.daemon.uri) as connection:
        dom = connection.lookupByName("doomed")
        dom.backupStart(document)  # found when the listener comes
        with listening.listening(host.daemon.uri) as listener:
            doomed.libvirt.suspend()
            doomed.libvirt.destroy()
            reason = libvirtd.end_of_a_transient_domain()  # as this process noted it
            assert listener.next("ended") == ["doomed", uuid, False, reason]
            with pytest.raises(virtbackup.Error, match=reason):
                dom.backupStop()
            assert listener.close() == []
