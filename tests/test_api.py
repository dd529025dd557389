# SPDX-License-Identifier: LGPL-2.1-or-later
"""The API's arguments and errors, the registry of drivers, and the drop-in for libvirt-python.

The driver here is a third party's: a class that the registry was told of, no part of ours.
"""

import configparser
import contextlib
import copy
import ctypes
import pathlib
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import libvirt
import pytest

import virtbackup
from virtbackup import access, api, errors, extend, hypervisor
from virtbackup.qemu import libvirt_driver, monitor, monitor_json

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"


class Recorder:
    """Remembers what reached it; backs up nothing."""

    def __init__(self, uri: str, readonly: bool) -> None:
        self.uri = uri
        self.readonly = readonly
        self.calls: list[tuple[Any, ...]] = []
        self.closed = 0
        opened.append(self)

    def close(self) -> None:
        self.closed += 1

    def get_type(self) -> str:
        return "RECORDER"

    def get_version(self) -> int:
        return 1002003

    def is_alive(self) -> bool:
        return True

    def set_trace(self, trace: TextIO | None) -> None:
        self.calls.append(("trace", trace))

    def list_domains(self) -> list[hypervisor.DomainRef]:
        return [
            hypervisor.DomainRef("up", UUID, 7),
            hypervisor.DomainRef("down", UUID.replace("6", "7"), None),
        ]

    def domain_get_state(self, domain: hypervisor.DomainRef) -> tuple[int, int]:
        return libvirt.VIR_DOMAIN_RUNNING, 0

    def domain_get_xml_desc(self, domain: hypervisor.DomainRef, flags: int) -> str:
        return f"<domain><name>{domain.name}</name></domain>"


class BackupRecorder(Recorder):
    """One that has the hooks."""

    def domain_backup_start(self, domain: hypervisor.DomainRef, xml: str, flags: int) -> None:
        self.calls.append(("start", domain.name, xml, flags))

    def domain_backup_stop(self, domain: hypervisor.DomainRef, flags: int) -> None:
        self.calls.append(("stop", domain.name, flags))

    def domain_backup_cleanup(self, domain: hypervisor.DomainRef, flags: int) -> list[str]:
        return ["node 'x'"]


opened: list[Recorder] = []


@pytest.fixture(autouse=True)
def drivers() -> Iterator[None]:
    opened.clear()
    hypervisor.register("recorder", BackupRecorder)
    hypervisor.register("plain", Recorder)
    yield
    for scheme in ("recorder", "plain", "test", "finder"):
        hypervisor.unregister(scheme)


def up(uri: str = "recorder:///", readonly: bool = False) -> virtbackup.Domain:
    return virtbackup.open(uri, readonly).lookupByName("up")


def test_all_names_are_there_before_they_are_loaded() -> None:
    code = (
        "import virtbackup, sys; print(set(virtbackup.__all__) <= set(dir(virtbackup)),"
        " 'virtbackup.extend' in sys.modules, virtbackup.extend.METHODS[0])"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout == "True False backupStart\n"


def test_calls_reach_the_driver() -> None:
    dom = up()
    assert dom.backupStart("<x/>", virtbackup.VIR_DOMAIN_BACKUP_START_QUIESCE) == 0
    assert dom.backupStop(virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL) == 0
    assert dom.backupCleanup() == ["node 'x'"]
    assert opened[0].calls == [("start", "up", "<x/>", 1), ("stop", "up", 1)]


def test_the_numbers_of_the_public_flags() -> None:
    """They are the contract, and the wire's."""
    assert virtbackup.VIR_DOMAIN_BACKUP_START_QUIESCE == 1
    assert virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY == 2
    assert virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL == 1


def test_lookups() -> None:
    with virtbackup.open("recorder:///") as conn:
        assert conn.lookupByID(7).name() == "up"
        assert conn.lookupByUUIDString(UUID.upper()).ID() == 7
        assert conn.lookupByName("down").ID() == -1
        assert [dom.name() for dom in conn.listAllDomains()] == ["up", "down"]
        active = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
        inactive = libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE
        assert [dom.name() for dom in conn.listAllDomains(active)] == ["up"]
        assert [dom.name() for dom in conn.listAllDomains(inactive)] == ["down"]
        assert conn.lookupByName("up").XMLDesc().startswith("<domain>")
        assert (conn.getType(), conn.getVersion(), conn.isAlive()) == ("RECORDER", 1002003, 1)
    assert opened[0].closed == 1
    assert conn.close() == 0
    assert opened[0].closed == 1


START = "virDomainBackupStart"
REFUSED: list[tuple[Any, int, str]] = [
    (lambda: up().backupStart("<x/>", 8), libvirt.VIR_ERR_INVALID_ARG,
     f"unsupported flags (0x8) in function {START}"),
    (lambda: up().backupStart("<x/>", 0xFF), libvirt.VIR_ERR_INVALID_ARG,
     f"unsupported flags (0xfc) in function {START}"),
    (lambda: up().backupStart("<x/>", -1), libvirt.VIR_ERR_INVALID_ARG,
     f"unsupported flags (0xfffffffc) in function {START}"),
    (lambda: up().backupStart("<x/>", 1 << 40), libvirt.VIR_ERR_INVALID_ARG,
     f"unsupported flags (0x10000000000) in function {START}"),
    (lambda: up().backupStop(2), libvirt.VIR_ERR_INVALID_ARG,
     "unsupported flags (0x2) in function virDomainBackupStop"),
    (lambda: up().backupStart(None), libvirt.VIR_ERR_INVALID_ARG,  # type: ignore[arg-type]
     f"xmlDesc in {START} must not be NULL"),
    (lambda: up(readonly=True).backupStart("<x/>"), libvirt.VIR_ERR_OPERATION_DENIED,
     f"operation forbidden: read only access prevents {START}"),
    (lambda: up(readonly=True).backupStop(), libvirt.VIR_ERR_OPERATION_DENIED,
     "operation forbidden: read only access prevents virDomainBackupStop"),
    (lambda: up(readonly=True).backupCleanup(), libvirt.VIR_ERR_OPERATION_DENIED,
     "operation forbidden: read only access prevents virDomainBackupCleanup"),
    (lambda: up("plain:///").backupStart("<x/>"), libvirt.VIR_ERR_NO_SUPPORT,
     f"this function is not supported by the connection driver: {START}"),
    (lambda: up().backupGetXMLDesc(), libvirt.VIR_ERR_NO_SUPPORT,
     "this function is not supported by the connection driver: virDomainBackupGetXMLDesc"),
    (lambda: virtbackup.open("nosuch:///"), libvirt.VIR_ERR_NO_CONNECT,
     "no connection driver available for nosuch:///"),
    (lambda: virtbackup.open("just words"), libvirt.VIR_ERR_NO_CONNECT,
     "no connection driver available for just words"),
    (lambda: virtbackup.open("qmp://relative/path"), libvirt.VIR_ERR_INVALID_ARG,
     "'qmp://relative/path': expected qmp:///absolute/path/to/qmp.sock[?engine=classic|hybrid]"
        "[&agent=/absolute/path/to/qga.sock]"),
    (lambda: virtbackup.open("qmp:///a\nb"), libvirt.VIR_ERR_INVALID_ARG,
     r"'qmp:///a\nb': a URI has no character '\n' in it"),
    (lambda: virtbackup.open("qemu:///system\0"), libvirt.VIR_ERR_INVALID_ARG,
     r"'qemu:///system\x00': a URI has no character '\x00' in it"),
    (lambda: virtbackup.open("virtbackup+unix:///\ud800"), libvirt.VIR_ERR_INVALID_ARG,
     r"'virtbackup+unix:///\ud800': a URI has no character '\ud800' in it"),
    (lambda: virtbackup.open("qmp:///a?engine=classic&engine=hybrid"), libvirt.VIR_ERR_INVALID_ARG,
     "'qmp:///a?engine=classic&engine=hybrid': expected qmp:///absolute/path/to/qmp.sock"
        "[?engine=classic|hybrid][&agent=/absolute/path/to/qga.sock]"),
    (lambda: virtbackup.open("qemu:///a?engine=classic&engine=hybrid"), libvirt.VIR_ERR_INVALID_ARG,
     "'qemu:///a?engine=classic&engine=hybrid': expected engine=classic or engine=hybrid"),
    (lambda: virtbackup.open("qmp:///nonexistent.sock"), libvirt.VIR_ERR_SYSTEM_ERROR,
     "failed to connect to monitor socket '/nonexistent.sock': No such file or directory"),
    (lambda: virtbackup.open("recorder:///").lookupByName("nope"), libvirt.VIR_ERR_NO_DOMAIN,
     "Domain not found: no domain with matching name 'nope'"),
    (lambda: virtbackup.open("recorder:///").lookupByName(None),  # type: ignore[arg-type]
     libvirt.VIR_ERR_INVALID_ARG, "name in virDomainLookupByName must not be NULL"),
    (lambda: virtbackup.open("recorder:///").lookupByID(8), libvirt.VIR_ERR_NO_DOMAIN,
     "Domain not found: no domain with matching id 8"),
    (lambda: virtbackup.open("recorder:///").lookupByID(-1), libvirt.VIR_ERR_INVALID_ARG,
     "id in virDomainLookupByID must be zero or greater"),
    (lambda: virtbackup.open("recorder:///").lookupByUUIDString("x"),
     libvirt.VIR_ERR_INVALID_ARG, "Invalid UUID"),
    (lambda: virtbackup.open("recorder:///").listAllDomains(1 << 30),
     libvirt.VIR_ERR_INVALID_ARG,
     "unsupported flags (0x40000000) in function virConnectListAllDomains"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "code", "text"), REFUSED, ids=range(len(REFUSED)))
def test_refused_in_libvirts_words(call: Any, code: int, text: str) -> None:
    with pytest.raises(libvirt.libvirtError) as caught:
        call()
    assert isinstance(caught.value, virtbackup.Error)
    assert caught.value.get_error_code() == code
    assert caught.value.get_error_message() == str(caught.value) == text
    assert caught.value.get_error_level() == libvirt.VIR_ERR_ERROR


@pytest.mark.parametrize("value", [5, b"x", ["x"], pathlib.Path("/x")])
def test_what_is_no_text(value: Any) -> None:
    """The type's error, as in libvirt-python."""
    domain = up()
    connection = domain.connect()
    lookups = (connection.lookupByName, connection.lookupByUUIDString)
    for call in (virtbackup.open, domain.backupStart, *lookups):
        with pytest.raises(TypeError, match="must be str, not"):
            call(value)


@pytest.mark.parametrize("value", ["7", None, 7.0, b"7"])
def test_what_is_no_id(value: Any) -> None:
    """It is not told that there is no such domain, as there may be."""
    with virtbackup.open("recorder:///") as conn, pytest.raises(TypeError, match="integer"):
        conn.lookupByID(value)


@pytest.mark.parametrize(
    "wanted", [{"id": 1 << 31}, {"id": 1 << 70}, {"name": "a\0b"}, {"name": "\udcff"}], ids=repr
)
def test_what_no_domain_of_libvirts_can_have(wanted: dict[str, Any]) -> None:
    """libvirt-python cannot hand it on, and has errors of Python's own for that."""
    with contextlib.closing(libvirt.open("test:///default")) as connection:
        assert libvirt_driver.LibvirtDriver(connection).domain_lookup(**wanted) is None


@pytest.mark.parametrize("uri", [None, ""])
def test_no_uri_is_the_default(uri: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "recorder:///default")
    with virtbackup.open(uri) as conn:
        assert conn.getURI() == "recorder:///default"


def test_errors_are_copied_and_pickled() -> None:
    """As where a worker of a pool fails: what cannot be read back ends the whole pool."""
    made = errors.error(libvirt.VIR_ERR_NO_DOMAIN, "no domain with matching id 8")
    refused = monitor_json.CommandFailed(monitor_json.Command("stop"), "GenericError", "no")
    for failure in (made, refused, monitor.NoAnswer("no reply")):
        for again in (pickle.loads(pickle.dumps(failure)), copy.copy(failure)):
            assert type(again) is type(failure)
            assert (str(again), again.err) == (str(failure), failure.err)


def test_a_closed_connection() -> None:
    dom = up()
    dom.connect().close()
    with pytest.raises(virtbackup.Error) as caught:
        dom.backupStop()
    assert caught.value.get_error_code() == libvirt.VIR_ERR_INVALID_CONN
    assert dom.connect().isAlive() == 0


class Deaf(BackupRecorder):
    """One whose callbacks cannot be ended."""

    def event_register(self, callback: Any) -> Any:
        def end() -> None:
            raise errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, "lost")

        return end


def test_a_callback_that_cannot_be_ended_keeps_no_driver_open() -> None:
    hypervisor.register("finder", Deaf)
    conn = virtbackup.open("finder:///")
    for _ in range(2):
        conn.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, print, None)
    with pytest.raises(virtbackup.Error, match="lost"):
        conn.close()
    assert opened[0].closed == 1
    assert conn.close() == 0


def test_events_of_what_is_no_domain_are_refused_at_once() -> None:
    """And not by the call in which an event comes, as a stop whose backup was good."""
    hypervisor.register("finder", Deaf)
    conn = virtbackup.open("finder:///")
    wrong: Any = "up"
    with pytest.raises(AttributeError, match="UUIDString"):
        conn.domainEventRegisterAny(wrong, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, print, None)
    assert conn.close() == 0


def test_read_only_connections_may_read() -> None:
    assert up(readonly=True).XMLDesc()
    assert opened[0].readonly
    protocols = (hypervisor.BackupDriver, hypervisor.QueryDriver, hypervisor.EventDriver)
    hooks = {name for protocol in protocols for name in vars(protocol) if name[0] != "_"}
    assert hooks <= set(access.NEEDED)
    assert not access.allowed("domain_suspend", access.READ_ONLY)


class Finder(BackupRecorder):
    """One that finds its domains by itself, and knows more of them."""

    def list_domains(self) -> list[hypervisor.DomainRef]:
        raise AssertionError("they are not to be listed")

    def domain_lookup(self, **wanted: Any) -> hypervisor.DomainRef | None:
        self.calls.append(("lookup", wanted))
        return None if "none" in wanted.values() else hypervisor.DomainRef("up", UUID, 7)

    def domain_get_info(self, domain: hypervisor.DomainRef) -> tuple[int, int, int, int, int]:
        return libvirt.VIR_DOMAIN_RUNNING, 2048, 1024, 2, 10**9

    def domain_get_os_type(self, domain: hypervisor.DomainRef) -> str:
        return "hvm"

    def domain_is_persistent(self, domain: hypervisor.DomainRef) -> bool:
        return True


def test_a_driver_that_finds_its_domains() -> None:
    hypervisor.register("finder", Finder)
    with virtbackup.open("finder:///", readonly=True) as conn:
        for dom in (
            conn.lookupByName("up"), conn.lookupByUUIDString(UUID.upper()), conn.lookupByID(7)
        ):  # fmt: skip
            assert dom.name() == "up"
        wanted: list[dict[str, object]] = [{"name": "up"}, {"uuid": UUID}, {"id": 7}]
        assert opened[0].calls == [("lookup", one) for one in wanted]
        with pytest.raises(virtbackup.Error, match="no domain with matching name 'none'"):
            conn.lookupByName("none")
        assert dom.info() == [libvirt.VIR_DOMAIN_RUNNING, 2048, 1024, 2, 10**9]
        assert (dom.OSType(), dom.isPersistent()) == ("hvm", 1)
    with pytest.raises(virtbackup.Error) as caught:
        up("plain:///").info()
    assert caught.value.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT


@pytest.fixture
def fake_libvirt() -> types.ModuleType:
    """A module with a virDomain of its own, so that the real one stays as it is."""
    module = types.ModuleType("libvirt")
    module.virDomain = type("virDomain", (libvirt.virDomain,), {})  # type: ignore[attr-defined]
    return module


def nobody(uri: str, readonly: bool) -> hypervisor.Driver:
    """As where no driver serves a scheme."""
    raise errors.error(libvirt.VIR_ERR_NO_CONNECT, uri, domain=libvirt.VIR_FROM_NONE)


def test_install_on_real_libvirt_and_uninstall() -> None:
    """On libvirt's own test driver, whose scheme a driver of ours has registered for."""
    hypervisor.register("test", nobody)
    before = dict(vars(libvirt.virDomain)), dict(vars(libvirt))
    dom = libvirt.open("test:///default").lookupByName("test")
    extend.install(libvirt)
    extend.install(libvirt)
    try:
        with pytest.raises(libvirt.libvirtError) as caught:
            dom.backupStart("<x/>")
        assert caught.value.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT
        hypervisor.register("test", BackupRecorder)
        assert dom.backupStart("<x/>", libvirt.VIR_DOMAIN_BACKUP_START_QUIESCE) == 0
        assert dom.backupStop() == 0
        assert [driver.calls for driver in opened] == [
            [("start", "test", "<x/>", 1), ("stop", "test", 0)]
        ]
        assert libvirt.virDomain.backupStart.__doc__ == api.Domain.backupStart.__doc__
    finally:
        extend.uninstall(libvirt)
    assert (dict(vars(libvirt.virDomain)), dict(vars(libvirt))) == before


def test_a_read_only_connection_of_libvirts() -> None:
    """What changes something comes to no driver, which might do it without asking libvirt."""
    hypervisor.register("test", BackupRecorder)
    dom = extend.domain(libvirt.openReadOnly("test:///default").lookupByName("test"))
    calls: tuple[Callable[[], object], ...] = (
        lambda: dom.backupStart("<x/>"), dom.backupStop, dom.backupCleanup,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(libvirt.libvirtError, match="read only access prevents virDomainBackup"):
            call()
    assert [(driver.readonly, driver.calls) for driver in opened] == [(True, [])]


def test_a_signal_s_handler_calls_while_a_connection_is_taken_up() -> None:
    """It has the connection that the call, which is in the middle of that, goes on with."""
    dom = libvirt.open("test:///default").lookupByName("test")
    theirs: list[virtbackup.Connection] = []

    def interrupted(uri: str, readonly: bool) -> hypervisor.Driver:
        if not theirs:
            hypervisor.register("test", BackupRecorder)
            theirs.append(extend.domain(dom).connect())
        return BackupRecorder(uri, readonly)

    hypervisor.register("test", interrupted)
    assert [extend.domain(dom).connect()] == theirs


def test_install_replaces_nothing(fake_libvirt: types.ModuleType) -> None:
    def own(self: Any) -> None:
        """libvirt's own, merged after all."""

    fake_libvirt.virDomain.backupStop = own
    with pytest.raises(RuntimeError, match="already has backupStop"):
        extend.install(fake_libvirt)
    assert not hasattr(fake_libvirt.virDomain, "backupStart")
    extend.uninstall(fake_libvirt)
    assert fake_libvirt.virDomain.backupStop is own


def test_a_driver_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypervisor, "_OWN", {})
    assert hypervisor._opener("qmp:///x").__module__ == "virtbackup.qemu.driver"


def test_our_own_drivers_are_those_of_the_entry_points() -> None:
    config = configparser.ConfigParser()
    config.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
    declared = config["options.entry_points"][hypervisor.ENTRY_POINTS].split("\n")
    for scheme, module in hypervisor._OWN.items():
        assert f"{scheme} = {module}:open" in declared


def test_every_code_has_libvirts_text() -> None:
    """Compared with what the C library itself says for the code."""
    of_libvirt = ctypes.CDLL("libvirt.so.0").virErrorMsg
    of_libvirt.restype, of_libvirt.argtypes = ctypes.c_char_p, (ctypes.c_int, ctypes.c_char_p)
    for code in errors._TEXTS:
        assert str(errors.error(code)) == of_libvirt(code, None).decode()
        template = of_libvirt(code, b"").decode().replace("%1$s", "%s")  # as newer ones have it
        assert str(errors.error(code, "100%")) == template % "100%"
