# SPDX-License-Identifier: LGPL-2.1-or-later
"""The remote driver on a server that does as it is told: opening, events, reconnecting, and what
it does where the server is libvirt's own."""

import configparser
import contextlib
import fcntl
import gc
import io
import logging
import os
import pathlib
import queue
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import pytest

import virtbackup
from tests import daemon_scene, daemons, rpc_server, waiting
from tests.live import striking
from virtbackup import errors, hypervisor, native
from virtbackup.conf import native_conf
from virtbackup.remote import (
    client,
    connect,
    driver,
    program,
    qemu_protocol,
    remote_types,
    rpc,
    rpc_error,
    transport,
    virtbackup_protocol,
    xdr,
)
from virtbackup.remote import remote_structs as structs
from virtbackup.remote.protocol import QEMU, REMOTE, VIRTBACKUP

DEADLINE = rpc_server.DEADLINE
AT_ONCE = client.CLOSE_TIMEOUT - 1
"""Seconds: fewer than any wait takes, on a machine that does other things too."""
UUID, VM = rpc_server.UUID, rpc_server.VM
REF = hypervisor.DomainRef("vm", UUID, 2)


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[rpc_server.Server]:
    with rpc_server.Server(rpc_server.unix(tmp_path)) as made:
        yield made


@pytest.fixture
def uri(tmp_path: pathlib.Path) -> str:
    return f"virtbackup+unix://{tmp_path}/rpc.sock"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not daemons.threads_left("rpc ")


def fails(what: Callable[[], object]) -> errors.Error:
    with pytest.raises(errors.Error) as caught:
        what()
    return caught.value


# --- URIs ---

TARGETS = {
    "virtbackup+unix:///run/x.sock": connect.Target(transport.Address("unix", path="/run/x.sock")),
    "virtbackup+unix:///a%20b?reconnect=yes&name=test:///default": connect.Target(
        transport.Address("unix", path="/a b"), name="test:///default", reconnect=True
    ),
    "virtbackup+tcp://host": connect.Target(transport.Address("tcp", host="host", port=16509)),
    "virtbackup+tcp://[::1]:17/": connect.Target(transport.Address("tcp", host="::1", port=17)),
    "virtbackup+tls://host/?reconnect=no": connect.Target(
        transport.Address("tls", host="host", port=16514)
    ),
    "virtbackup+tls://host:1/?pkipath=/etc/mine&no_verify=1": connect.Target(
        transport.Address("tls", host="host", port=1), pki="/etc/mine", verify=False
    ),
}


@pytest.mark.parametrize(("text", "target"), TARGETS.items(), ids=TARGETS)
def test_a_uri(text: str, target: connect.Target) -> None:
    assert connect.parse_uri(text) == target


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("virtbackup+unix://host/x.sock", "a unix socket is on this host"),
        ("virtbackup+unix:///", "the path of the socket is missing, or none"),
        ("virtbackup+unix:///x%00y", "the path of the socket is missing, or none"),
        ("virtbackup+unix:x/y", "the path 'x/y' is not absolute"),
        ("virtbackup+unix:///x#y", "a fragment has no meaning"),
        ("virtbackup+unix:///x?pkipath=/y", "there is no option 'pkipath'"),
        ("virtbackup+unix:///x?reconnect=maybe", "'maybe' is no value of 'reconnect'"),
        ("virtbackup+unix:///x?reconnect=yes&reconnect=no", "an option is given twice"),
        ("virtbackup+unix:///x?reconnect", "bad query field: 'reconnect'"),
        ("virtbackup+tcp:///", "a host is needed, and no user"),
        ("virtbackup+tcp://fred@host/", "a host is needed, and no user"),
        ("virtbackup+tcp://host/system", "the path '/system' has no meaning"),
        ("virtbackup+tcp://host:0x10/", "Port could not be cast"),
        ("virtbackup+tcp://host:70000/", "Port out of range"),
        ("virtbackup+tcp://a..b/", "'a..b' is no host"),
        (f"virtbackup+tcp://{'a' * 64}/", f"'{'a' * 64}' is no host"),
        ("virtbackup+tcp://a%00b/", "'a\0b' is no host"),
        ("virtbackup+tcp://a%FFb/", "'a\ufffdb' is no host"),
        ("virtbackup+tls://host/?pkipath=mine", "'mine' is no value of 'pkipath'"),
        ("virtbackup+tls://host/?no_verify=yes", "'yes' is no value of 'no_verify'"),
    ],
)
def test_a_uri_that_makes_no_sense(text: str, reason: str) -> None:
    failure = fails(lambda: virtbackup.open(text))
    assert failure.get_error_code() == libvirt.VIR_ERR_INVALID_ARG
    assert str(failure).startswith(f"'{text}': {reason}")
    assert ": expected virtbackup+" in str(failure)


def test_the_entry_points_are_declared() -> None:
    config = configparser.ConfigParser()
    config.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
    lines = config["options.entry_points"]["virtbackup.drivers"].split("\n")
    for kind in ("unix", "tcp", "tls"):
        assert f"virtbackup+{kind} = virtbackup.remote.driver:open" in lines


# --- opening ---


def test_nobody_listens(tmp_path: pathlib.Path) -> None:
    failure = fails(lambda: virtbackup.open(f"virtbackup+unix://{tmp_path}/nobody"))
    assert failure.err[:3] == (
        libvirt.VIR_ERR_SYSTEM_ERROR,
        libvirt.VIR_FROM_RPC,
        f"Failed to connect socket to '{tmp_path}/nobody': No such file or directory",
    )


def test_nobody_listens_on_a_port() -> None:
    failure = fails(lambda: virtbackup.open("virtbackup+tcp://127.0.0.1:1/"))
    assert str(failure) == "unable to connect to server at '127.0.0.1:1': Connection refused"


def test_the_calls_of_an_open_and_a_close(server: rpc_server.Server, uri: str) -> None:
    virtbackup.open(uri).close()
    assert server.named() == [
        "REMOTE.AUTH_LIST",
        "REMOTE.CONNECT_SUPPORTS_FEATURE",
        "REMOTE.CONNECT_OPEN",
        "VIRTBACKUP.SUPPORTED",
        "REMOTE.CONNECT_CLOSE",
    ]
    feature, opened = (rpc.args(call) for call in server.peer().calls[1:3])
    assert feature.feature == 10
    assert opened == structs.ConnectOpenArgs("", 0)


def test_a_name_and_read_only(server: rpc_server.Server, uri: str) -> None:
    virtbackup.open(f"{uri}?name=qemu:///system", readonly=True).close()
    assert rpc.args(server.peer().calls[2]) == structs.ConnectOpenArgs("qemu:///system", 1)


def refuse(*_: object) -> None:
    raise errors.error(libvirt.VIR_ERR_ACCESS_DENIED, "not you")


def raises(failure: libvirt.libvirtError) -> rpc_server.Handler:
    def handler(*_: object) -> None:
        raise failure

    return handler


def test_a_server_that_refuses(server: rpc_server.Server, uri: str) -> None:
    server.handlers["REMOTE.CONNECT_OPEN"] = refuse
    failure = fails(lambda: virtbackup.open(uri))
    assert failure.err == errors.error(libvirt.VIR_ERR_ACCESS_DENIED, "not you").err
    assert server.peer().ended.wait(DEADLINE)


@pytest.mark.parametrize(
    ("types", "reason"),
    [((1,), "the server wants SASL, which this client does not speak"),
     ((7, 0), "unsupported authentication type 7")],
)  # fmt: skip
def test_authentication_that_we_do_not_speak(
    server: rpc_server.Server, uri: str, types: tuple[int, ...], reason: str
) -> None:
    server.handlers["REMOTE.AUTH_LIST"] = lambda *_: structs.AuthListRet(types)
    failure = fails(lambda: virtbackup.open(uri))
    assert failure.get_error_code() == libvirt.VIR_ERR_AUTH_FAILED
    assert str(failure) == f"authentication failed: {reason}"


def test_polkit(server: rpc_server.Server, uri: str) -> None:
    server.handlers["REMOTE.AUTH_LIST"] = lambda *_: structs.AuthListRet((2,))
    server.handlers["REMOTE.AUTH_POLKIT"] = lambda *_: structs.AuthPolkitRet(1)
    virtbackup.open(uri).close()
    server.handlers["REMOTE.AUTH_POLKIT"] = lambda *_: structs.AuthPolkitRet(0)
    assert "polkit" in str(fails(lambda: virtbackup.open(uri)))


def test_an_old_server_without_authentication_or_features(
    server: rpc_server.Server, uri: str
) -> None:
    del server.handlers["REMOTE.AUTH_LIST"], server.handlers["REMOTE.CONNECT_SUPPORTS_FEATURE"]
    virtbackup.open(uri).close()
    server.handlers["REMOTE.AUTH_LIST"] = lambda *_: structs.AuthListRet(())
    virtbackup.open(uri).close()


def test_a_server_that_does_not_answer_at_first(
    server: rpc_server.Server, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "ANSWER_TIMEOUT", 0.05)
    server.handlers["REMOTE.AUTH_LIST"] = rpc_server.Gate()
    failure = fails(lambda: virtbackup.open(uri))
    assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
    assert server.peer().ended.wait(DEADLINE)


def test_a_server_that_dies_is_found_out(server: rpc_server.Server, tmp_path: pathlib.Path) -> None:
    target = connect.Target(rpc_server.unix(tmp_path))
    with contextlib.closing(driver.RemoteDriver(target, interval=0.05)) as opened:
        server.handlers["REMOTE.CONNECT_GET_TYPE"] = rpc_server.Gate()
        server.answers_pings = False
        failure = fails(opened.get_type)
    assert str(failure) == "internal error: connection closed due to keepalive timeout"
    assert not opened.is_alive()


def test_a_server_without_keepalive_is_never_dead(
    server: rpc_server.Server, tmp_path: pathlib.Path
) -> None:
    server.handlers["REMOTE.CONNECT_SUPPORTS_FEATURE"] = lambda *_: (
        structs.ConnectSupportsFeatureRet(0)
    )
    target = connect.Target(rpc_server.unix(tmp_path))
    with contextlib.closing(driver.RemoteDriver(target, interval=0.01, count=1)) as opened:
        server.answers_pings = False
        threading.Event().wait(0.2)
        assert opened.get_hostname() == "here"
        assert server.peer().pings == 0


def test_a_close_ends_with_a_server_that_is_gone(server: rpc_server.Server, uri: str) -> None:
    opened = virtbackup.open(uri)
    server.peer().hang_up()
    opened.close()
    opened.close()


@contextlib.contextmanager
def taking_no_more(server: rpc_server.Server, opened: driver.RemoteDriver) -> Iterator[None]:
    """The server is busy with a call of another thread, which fails in the end."""
    busy, served = threading.Event(), threading.Event()

    def serve(*_: object) -> object:
        busy.set()
        served.wait(DEADLINE)
        return rpc_server.SILENCE

    server.handlers["REMOTE.CONNECT_GET_HOSTNAME"] = serve
    other = threading.Thread(
        target=lambda: fails(lambda: opened._call(REMOTE, "CONNECT_GET_HOSTNAME"))
    )
    other.start()
    assert busy.wait(DEADLINE)
    yield
    other.join(DEADLINE)
    assert not other.is_alive()
    served.set()


@contextlib.contextmanager
def interrupted_by(server: rpc_server.Server, handler: Callable[..., object]) -> Iterator[None]:
    """By a signal with that HANDLER, once some of a message has come, which nobody takes."""
    main, struck = threading.get_ident(), threading.Event()

    def handle(*args: object) -> None:
        if not struck.is_set():
            struck.set()
            handler(*args)

    def some_has_come() -> bool:
        queued = fcntl.ioctl(server.peer().transport._socket, termios.FIONREAD, bytes(4))
        return int.from_bytes(queued, sys.byteorder) > 0

    def strike() -> None:
        waiting.until(some_has_come)
        while not struck.is_set():  # one that comes just before a wait does not end that
            signal.pthread_kill(main, signal.SIGALRM)
            struck.wait(0.2)

    striker = threading.Thread(target=strike)
    before = signal.signal(signal.SIGALRM, handle)
    try:
        striker.start()
        yield
    finally:
        struck.set()
        striker.join()
        signal.signal(signal.SIGALRM, before)


def test_a_signal_s_handler_closes_in_the_middle_of_a_message(
    server: rpc_server.Server, uri: str
) -> None:
    """Of which the server takes no more: nobody waits for the end of that."""
    opened = driver.open(uri, False)
    took = list[float]()

    def close(*_: object) -> None:
        failure = fails(opened.get_type)
        assert "called by a signal's handler, in the middle of another call" in str(failure)
        begin = time.monotonic()
        opened.close()
        took.append(time.monotonic() - begin)

    with taking_no_more(server, opened), interrupted_by(server, close):
        failure = fails(lambda: opened.domain_backup_start(REF, "x" * (1 << 20), 0))
    assert "client socket is closed" in str(failure)
    assert took[0] < AT_ONCE


def test_an_interrupt_in_the_middle_of_a_message_ends_the_connection(
    server: rpc_server.Server, uri: str
) -> None:
    """Its rest would be the next message's first bytes, and no answer come."""
    opened = driver.open(uri, False)
    with (
        taking_no_more(server, opened),
        interrupted_by(server, signal.default_int_handler),
        pytest.raises(KeyboardInterrupt),
    ):
        opened.domain_backup_start(REF, "x" * (1 << 20), 0)
    begin = time.monotonic()
    fails(opened.get_type)
    opened.close()
    assert time.monotonic() < begin + AT_ONCE


def test_a_signal_s_handler_closes_at_any_place_of_a_call(
    server: rpc_server.Server, uri: str
) -> None:
    """It may have interrupted what holds what a close would wait for."""
    opened = driver.open(uri, False)
    took = list[float]()

    def close() -> None:
        begin = time.monotonic()
        opened.close()
        took.append(time.monotonic() - begin)

    def call() -> None:
        with contextlib.suppress(errors.Error):
            opened._call(REMOTE, "CONNECT_GET_HOSTNAME")

    strikes = striking.Strikes(sys.maxsize, ("/client.py", "/transport.py"), close)
    while True:
        strikes.strike(call)
        if not strikes.place:
            break
        opened = driver.open(uri, False)
    opened.close()
    assert strikes.number > 20
    assert max(took) < AT_ONCE


def test_an_interrupt_at_any_place_of_a_call_leaves_nobody_in_the_middle(
    server: rpc_server.Server, uri: str
) -> None:
    """The next call is made, or finds that the connection has ended."""
    strikes = striking.Strikes(sys.maxsize, ("/client.py",))
    opened = driver.open(uri, False)

    def call() -> None:
        opened._call(REMOTE, "CONNECT_GET_HOSTNAME")

    while True:
        with contextlib.suppress(KeyboardInterrupt, errors.Error):
            strikes.strike(call)
        if not strikes.place:
            break
        assert not opened._current.client._is_sending_here, strikes.place
        if not opened._current.client.is_alive:
            opened.close()
            opened = driver.open(uri, False)
    opened.close()
    assert strikes.number > 10


def test_a_driver_that_is_forgotten_hangs_up(server: rpc_server.Server, uri: str) -> None:
    opened = virtbackup.open(uri)
    del opened
    gc.collect()
    assert server.peer().ended.wait(DEADLINE)
    daemon_scene.wait_for(lambda: not any(t.name.startswith("rpc ") for t in threading.enumerate()))


def test_a_close_in_a_forked_child_does_nothing(server: rpc_server.Server, uri: str) -> None:
    with virtbackup.open(uri) as opened:
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                assert opened.isAlive() == 0
                assert "client socket is closed" in str(fails(opened.getHostname))
                opened.close()
                status = 0
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert opened.getHostname() == "here"
        assert "REMOTE.CONNECT_CLOSE" not in server.named()


def test_a_trace(server: rpc_server.Server, uri: str) -> None:
    text = io.StringIO()
    with virtbackup.open(uri) as opened:
        opened.setTrace(text)
        opened.getHostname()
        opened.setTrace(None)
    sent, received = text.getvalue().splitlines()
    assert sent.endswith("Z -> REMOTE.CONNECT_GET_HOSTNAME serial=4 CALL")
    assert received.endswith("REPLY ConnectGetHostnameRet(hostname='here')")


# --- events ---


class Registry:
    """The server's part of events."""

    def __init__(self, server: rpc_server.Server) -> None:
        self.registered: list[tuple[str, int]] = []
        self._number = 0
        for of in ("REMOTE.CONNECT_DOMAIN_EVENT_CALLBACK_{}_ANY", "VIRTBACKUP.BACKUP_EVENT_{}"):
            server.handlers[of.format("REGISTER")] = self.register
            server.handlers[of.format("DEREGISTER")] = self.deregister

    def register(self, peer: rpc_server.Peer, message: rpc.Message) -> structs.CallbackIdArgs:
        self._number += 1
        args = rpc.args(message)
        assert getattr(args, "dom", None) is None
        event = str(getattr(args, "eventID", "ended"))
        self.registered.append((event, self._number))
        return structs.CallbackIdRet(self._number)

    def deregister(self, peer: rpc_server.Peer, message: rpc.Message) -> None:
        number = rpc.args(message).callbackID
        self.registered = [one for one in self.registered if one[1] != number]


def lifecycle(event: int) -> rpc.Message:
    sent = structs.DomainEventLifecycleMsg(VM, event, 1)
    value = structs.DomainEventCallbackLifecycleMsg(1, sent)
    return rpc.event(REMOTE, "DOMAIN_EVENT_CALLBACK_LIFECYCLE", value)


def ended(good: bool, reason: str | None) -> rpc.Message:
    return rpc.event(
        VIRTBACKUP, "BACKUP_ENDED", virtbackup_protocol.BackupEndedMsg(2, VM, good, reason)
    )


def test_events(server: rpc_server.Server, uri: str) -> None:
    registry = Registry(server)
    opened = driver.open(uri, False)
    events: queue.SimpleQueue[hypervisor.Event] = queue.SimpleQueue()
    first = opened.event_register(events.put)
    second = opened.event_register(events.put)
    assert [event for event, _ in registry.registered] == ["0", "ended"]
    server.peer().send(lifecycle(5))
    server.peer().send(ended(False, "vda: it broke"))
    told = [events.get(timeout=DEADLINE) for _ in range(4)]
    assert (
        told[::2]
        == told[1::2]
        == [
            hypervisor.LifecycleEvent(REF, 5, 1),
            hypervisor.BackupEnded(REF, False, "vda: it broke"),
        ]
    )
    first()
    server.peer().send(lifecycle(6))
    assert events.get(timeout=DEADLINE) == hypervisor.LifecycleEvent(REF, 6, 1)
    second()
    second()
    assert registry.registered == []
    server.peer().send(lifecycle(7))
    assert opened.get_hostname() == "here"
    assert events.empty()
    opened.close()


def test_an_event_that_comes_before_the_registration_is_answered(
    server: rpc_server.Server, uri: str
) -> None:
    registry = Registry(server)

    def register(peer: rpc_server.Peer, message: rpc.Message) -> structs.CallbackIdArgs:
        peer.send(lifecycle(5))
        return registry.register(peer, message)

    server.handlers["REMOTE.CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"] = register
    events: queue.SimpleQueue[hypervisor.Event] = queue.SimpleQueue()
    with contextlib.closing(driver.open(uri, False)) as opened:
        opened.event_register(events.put)
        assert events.get(timeout=DEADLINE) == hypervisor.LifecycleEvent(REF, 5, 1)


def test_events_that_cannot_be_had(server: rpc_server.Server, uri: str) -> None:
    """Then there is no registration of half of them."""
    registry = Registry(server)
    server.handlers["VIRTBACKUP.BACKUP_EVENT_REGISTER"] = refuse
    with contextlib.closing(driver.open(uri, False)) as opened:
        failure = fails(lambda: opened.event_register(print))
        assert failure.get_error_code() == libvirt.VIR_ERR_ACCESS_DENIED
        assert registry.registered == []
        assert opened._events.callbacks == ()


def test_a_registration_that_is_interrupted(
    server: rpc_server.Server, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is told of all events, too."""
    registry = Registry(server)
    call = client.Client.call

    def interrupted(self: client.Client, of: program.Program, name: str, *args: Any) -> Any:
        if name == "BACKUP_EVENT_REGISTER":
            raise KeyboardInterrupt
        return call(self, of, name, *args)

    with contextlib.closing(driver.open(uri, False)) as opened:
        with monkeypatch.context() as patch:
            patch.setattr(client.Client, "call", interrupted)
            with pytest.raises(KeyboardInterrupt):
                opened.event_register(print)
        ends = opened.event_register(print)
        assert [event for event, _ in registry.registered] == ["0", "ended"]
        ends()
        assert registry.registered == []


def test_a_callback_that_fails_and_an_event_that_is_none(
    server: rpc_server.Server, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    Registry(server)
    events: queue.SimpleQueue[hypervisor.Event] = queue.SimpleQueue()

    def bad(event: hypervisor.Event) -> None:
        raise RuntimeError("a bug")

    with contextlib.closing(driver.open(uri, False)) as opened:
        opened.event_register(bad)
        opened.event_register(events.put)
        server.peer().send(rpc_server.raw(REMOTE, 318, 2, 1, b"\0"))
        server.peer().send(lifecycle(5))
        assert events.get(timeout=DEADLINE) == hypervisor.LifecycleEvent(REF, 5, 1)
    assert "a bug" in caplog.text
    assert "an event that cannot be decoded" in caplog.text


def test_events_of_the_api(server: rpc_server.Server, uri: str) -> None:
    Registry(server)
    told: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    with virtbackup.open(uri) as opened:
        opened.domainEventRegisterAny(
            None,
            virtbackup.VIR_DOMAIN_EVENT_ID_BACKUP_ENDED,
            lambda conn, dom, *rest: told.put((dom.name(), *rest)),
            "opaque",
        )
        server.peer().send(ended(True, None))
        assert told.get(timeout=DEADLINE) == ("vm", True, None, "opaque")


# --- reconnecting ---


def test_without_being_asked_it_stays_lost(server: rpc_server.Server, uri: str) -> None:
    with virtbackup.open(uri) as opened:
        lose(server, opened)
        for _ in range(2):
            assert "client socket is closed" in str(fails(opened.getHostname))
        assert opened.isAlive() == 0
    assert len(server.peers) == 1


def lose(server: rpc_server.Server, opened: virtbackup.Connection) -> None:
    """Have the server hang up, and the client see it."""
    server.peer().hang_up()
    inner = opened._driver
    assert isinstance(inner, driver.RemoteDriver)
    daemon_scene.wait_for(lambda: not inner._current.client.is_alive)


def test_the_next_call_connects_anew_and_events_go_on(server: rpc_server.Server, uri: str) -> None:
    registry = Registry(server)
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    with virtbackup.open(f"{uri}?reconnect=yes") as opened:
        opened.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lambda c, d, e, *_: events.put(e), None
        )
        lose(server, opened)
        registry.registered.clear()
        assert opened.getHostname() == "here"
        assert len(server.peers) == 2
        assert [event for event, _ in registry.registered] == ["0", "ended"]
        server.peer().send(lifecycle(5))
        assert events.get(timeout=DEADLINE) == 5
        lose(server, opened)
        assert opened.isAlive() == 1  # which looks
        assert len(server.peers) == 3
    opened.close()


def test_events_that_cannot_be_had_again_keep_no_call_from_being_made(
    server: rpc_server.Server, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    Registry(server)
    with virtbackup.open(f"{uri}?reconnect=yes") as opened:
        opened.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, print, None)
        lose(server, opened)
        server.handlers["VIRTBACKUP.BACKUP_EVENT_REGISTER"] = refuse
        assert opened.getHostname() == "here"
    assert "no events any more: access denied: not you" in caplog.text


@pytest.mark.parametrize("when", ["it has connected", "it asks for events"])
def test_a_signal_s_handler_closes_as_it_connects_anew(
    server: rpc_server.Server, uri: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    Registry(server)
    opened = driver.open(f"{uri}?reconnect=yes", False)
    opened.event_register(print)
    opened._current.client.close()
    connect = opened._connect
    made = []

    def interrupted() -> Any:
        made.append(connect())
        if when == "it has connected":
            opened.close()
        else:
            monkeypatch.setattr(made[0], "register", opened.close)
        return made[0]

    monkeypatch.setattr(opened, "_connect", interrupted)
    assert "client socket is closed" in str(fails(opened.get_type))
    assert not made[0].client.is_alive


def test_a_call_that_was_on_its_way_is_not_made_again(server: rpc_server.Server, uri: str) -> None:
    """Whether it took effect nobody knows."""
    own = server.handlers["REMOTE.CONNECT_GET_HOSTNAME"]

    def hang_up(peer: rpc_server.Peer, message: rpc.Message) -> object:
        peer.hang_up()
        return rpc_server.SILENCE

    server.handlers["REMOTE.CONNECT_GET_HOSTNAME"] = hang_up
    with virtbackup.open(f"{uri}?reconnect=yes") as opened:
        failure = fails(opened.getHostname)
        assert str(failure) == "End of file while reading data: Input/output error"
        server.handlers["REMOTE.CONNECT_GET_HOSTNAME"] = own
        assert opened.getHostname() == "here"


def test_many_threads_connect_anew_once(server: rpc_server.Server, uri: str) -> None:
    with virtbackup.open(f"{uri}?reconnect=yes") as opened:
        lose(server, opened)
        names: list[str] = []
        threads = [
            threading.Thread(target=lambda: names.append(opened.getHostname())) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    assert names == ["here"] * 8
    assert len(server.peers) == 2


def test_a_server_that_does_not_come_back(uri: str, tmp_path: pathlib.Path) -> None:
    server = rpc_server.Server(rpc_server.unix(tmp_path))
    with virtbackup.open(f"{uri}?reconnect=yes") as opened:
        server.close()
        daemon_scene.wait_for(lambda: opened.isAlive() == 0)
        failure = fails(opened.getHostname)
        assert str(failure).startswith("Failed to connect socket to")
        with rpc_server.Server(rpc_server.unix(tmp_path)):
            assert opened.getHostname() == "here"


# --- the hooks ---


def params(**values: tuple[int, Any]) -> tuple[remote_types.TypedParam, ...]:
    return tuple(remote_types.TypedParam(name, xdr.Arm(*v)) for name, v in values.items())


def stats(_: rpc_server.Peer, message: rpc.Message) -> structs.DomainBlockStatsFlagsRet:
    sent = params(rd_bytes=(3, 512), wr_bytes=(3, 0))
    count = rpc.args(message).nparams
    return structs.DomainBlockStatsFlagsRet(sent[:count], len(sent))


HOOKS: list[tuple[str, Any, Callable[[driver.RemoteDriver], Any], Any]] = [
    ("REMOTE.CONNECT_GET_TYPE", structs.TypeRet("QEMU"), lambda d: d.get_type(), "QEMU"),
    ("REMOTE.CONNECT_GET_VERSION", structs.ConnectGetVersionRet(8001002),
     lambda d: d.get_version(), 8001002),
    ("REMOTE.CONNECT_GET_LIB_VERSION", structs.ConnectGetLibVersionRet(9000000),
     lambda d: d.get_lib_version(), 9000000),
    ("REMOTE.CONNECT_GET_CAPABILITIES", structs.ConnectGetCapabilitiesRet("<capabilities/>"),
     lambda d: d.get_capabilities(), "<capabilities/>"),
    ("REMOTE.NODE_GET_INFO", structs.NodeGetInfoRet(b"x86_64" + bytes(26), 1, 2, 3, 4, 5, 6, 7),
     lambda d: d.node_get_info(), ("x86_64", 1, 2, 3, 4, 5, 6, 7)),
    ("REMOTE.NODE_GET_SECURITY_MODEL", structs.NodeGetSecurityModelRet(b"dac\0", b"0\0"),
     lambda d: d.node_get_security_model(), ("dac", "0")),
    ("REMOTE.NODE_GET_SECURITY_MODEL", structs.NodeGetSecurityModelRet(b"", b""),
     lambda d: d.node_get_security_model(), ("", "")),
    ("REMOTE.CONNECT_LIST_ALL_DOMAINS", structs.ConnectListAllDomainsRet((VM,), 1),
     lambda d: d.list_domains(), [REF]),
    ("REMOTE.DOMAIN_LOOKUP_BY_NAME", structs.DomainRet(VM),
     lambda d: d.domain_lookup(name="vm"), REF),
    ("REMOTE.DOMAIN_LOOKUP_BY_UUID", structs.DomainRet(VM),
     lambda d: d.domain_lookup(uuid=UUID), REF),
    ("REMOTE.DOMAIN_LOOKUP_BY_ID", structs.DomainRet(VM), lambda d: d.domain_lookup(id=2), REF),
    ("REMOTE.DOMAIN_GET_STATE", structs.DomainGetStateRet(1, 5),
     lambda d: d.domain_get_state(REF), (1, 5)),
    ("REMOTE.DOMAIN_GET_XML_DESC", structs.XmlRet("<domain/>"),
     lambda d: d.domain_get_xml_desc(REF, 0), "<domain/>"),
    ("REMOTE.DOMAIN_GET_INFO", structs.DomainGetInfoRet(1, 2, 3, 4, 5),
     lambda d: d.domain_get_info(REF), (1, 2, 3, 4, 5)),
    ("REMOTE.DOMAIN_GET_OS_TYPE", structs.TypeRet("hvm"),
     lambda d: d.domain_get_os_type(REF), "hvm"),
    ("REMOTE.DOMAIN_IS_PERSISTENT", structs.DomainIsPersistentRet(1),
     lambda d: d.domain_is_persistent(REF), True),
    ("REMOTE.DOMAIN_GET_AUTOSTART", structs.DomainGetAutostartRet(0),
     lambda d: d.domain_get_autostart(REF), False),
    ("REMOTE.DOMAIN_GET_AUTOSTART_ONCE", structs.DomainGetAutostartRet(1),
     lambda d: d.domain_get_autostart_once(REF), True),
    ("REMOTE.DOMAIN_HAS_MANAGED_SAVE_IMAGE", structs.DomainHasManagedSaveImageRet(0),
     lambda d: d.domain_has_managed_save_image(REF, 0), False),
    ("REMOTE.DOMAIN_SNAPSHOT_NUM", structs.NumRet(3),
     lambda d: d.domain_snapshot_num(REF, 0), 3),
    ("REMOTE.DOMAIN_GET_SECURITY_LABEL", structs.DomainGetSecurityLabelRet(b"+0:+0\0", 1),
     lambda d: d.domain_get_security_label(REF), ("+0:+0", True)),
    ("REMOTE.DOMAIN_GET_MESSAGES", structs.DomainGetMessagesRet(("tainted",)),
     lambda d: d.domain_get_messages(REF, 0), ["tainted"]),
    ("REMOTE.DOMAIN_GET_BLOCK_INFO", structs.DomainGetBlockInfoRet(1, 2, 3),
     lambda d: d.domain_get_block_info(REF, "vda", 0), (2, 1, 3)),
    ("REMOTE.DOMAIN_BLOCK_STATS_FLAGS", stats,
     lambda d: d.domain_block_stats_flags(REF, "vda", 0), {"rd_bytes": 512, "wr_bytes": 0}),
    ("REMOTE.DOMAIN_GET_BLOCK_JOB_INFO", structs.DomainGetBlockJobInfoRet(1, 2, 3, 4, 5),
     lambda d: d.domain_get_block_job_info(REF, "vda", 0), (2, 3, 4, 5)),
    ("REMOTE.DOMAIN_GET_BLOCK_JOB_INFO", structs.DomainGetBlockJobInfoRet(0, 0, 0, 0, 0),
     lambda d: d.domain_get_block_job_info(REF, "vda", 0), None),
    ("REMOTE.CONNECT_GET_ALL_DOMAIN_STATS",
     structs.ConnectGetAllDomainStatsRet(
         (structs.DomainStatsRecord(VM, params(a=(6, 1), b=(7, "x"), c=(5, 0.5))),)),
     lambda d: d.get_all_domain_stats([REF], 0, 0), [(REF, {"a": True, "b": "x", "c": 0.5})]),
    ("REMOTE.DOMAIN_FSFREEZE", structs.DomainFsfreezeRet(2),
     lambda d: d.domain_fsfreeze(REF, ["/"], 0), 2),
    ("REMOTE.DOMAIN_FSTHAW", structs.DomainFsfreezeRet(2),
     lambda d: d.domain_fsthaw(REF, ["/"], 0), 2),
    ("REMOTE.DOMAIN_SUSPEND", None, lambda d: d.domain_suspend(REF), None),
    ("REMOTE.DOMAIN_RESUME", None, lambda d: d.domain_resume(REF), None),
    ("QEMU.DOMAIN_MONITOR_COMMAND", QEMU["DOMAIN_MONITOR_COMMAND"].ret("{}"),  # type: ignore[misc]
     lambda d: d.domain_monitor_command(REF, "{}", 0), "{}"),
    ("VIRTBACKUP.DOMAIN_BRANCH_CREATE", None, lambda d: d.domain_branch_create(REF, "b", 0), None),
    ("VIRTBACKUP.DOMAIN_BRANCH_DELETE", None, lambda d: d.domain_branch_delete(REF, "b", 0), None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "answer", "ask", "expected"), HOOKS, ids=[f"{n}-{h[0]}" for n, h in enumerate(HOOKS)]
)
def test_a_hook(
    server: rpc_server.Server,
    uri: str,
    name: str,
    answer: Any,
    ask: Callable[[driver.RemoteDriver], Any],
    expected: Any,
) -> None:
    server.handlers[name] = answer if callable(answer) else lambda *_: answer
    with contextlib.closing(driver.open(uri, False)) as opened:
        assert ask(opened) == expected
        del server.handlers[name]
        missing = fails(lambda: ask(opened))
        assert missing.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT


def test_every_hook_is_there() -> None:
    kinds = (hypervisor.BackupDriver, hypervisor.QueryDriver, hypervisor.EventDriver)
    hooks = {name for kind in kinds for name in dir(kind) if not name.startswith("_")}
    assert hooks <= set(dir(driver.RemoteDriver))


def test_a_domain_that_there_is_not(server: rpc_server.Server, uri: str) -> None:
    server.handlers["REMOTE.DOMAIN_LOOKUP_BY_NAME"] = raises(
        errors.error(libvirt.VIR_ERR_NO_DOMAIN, "x")
    )
    with contextlib.closing(driver.open(uri, False)) as opened:
        assert opened.domain_lookup(name="x") is None


def test_a_value_that_is_not_known(server: rpc_server.Server, uri: str) -> None:
    address = xdr.Arm(2, virtbackup_protocol.UnixAddress("/x", None))
    info = virtbackup_protocol.DomainBackupGetInfoRet(
        "levitating", 0.0, address, (), None, None, None, None, None, None, None
    )
    server.handlers["VIRTBACKUP.DOMAIN_BACKUP_GET_INFO"] = lambda *_: info
    with contextlib.closing(driver.open(uri, False)) as opened:
        failure = fails(lambda: opened.domain_backup_get_info(REF, 0))
    assert failure.err == rpc_error.undecodable().err


# --- a server that is libvirt's own ---

DOMAIN = f"""<domain type='qemu' id='2'><name>vm</name><uuid>{UUID}</uuid><devices>
<disk type='file' device='disk'><source file='/vda.qcow2'/><target dev='vda'/></disk>
<disk type='file' device='disk'><source file='/vdb.qcow2'/><target dev='vdb'/></disk>
</devices></domain>"""

PROPOSAL = (
    '<domainbackup><address type="unix" path="/x.sock"/>'
    '<disks><disk name="vdb" present="no"/></disks></domainbackup>'
)
NO_JOB = structs.DomainGetJobStatsRet(0, ())
JOB = structs.DomainGetBlockJobInfoRet(1, 5, 0, 0, 1 << 20)
JOBS = '{"return": [{"id": "backup-vda-libvirt-1-format", "type": "backup", "status": "running"}]}'


class Libvirtd:
    """The server's part of a backup of libvirt's own."""

    def __init__(self, server: rpc_server.Server) -> None:
        self.begun: structs.DomainBackupBeginArgs | None = None
        self.aborted = 0
        self.active = 1
        self.ends_after = 2
        server.handlers |= {
            "REMOTE.DOMAIN_GET_XML_DESC": lambda *_: structs.XmlRet(DOMAIN),
            "REMOTE.DOMAIN_BACKUP_BEGIN": self.begin,
            "REMOTE.DOMAIN_BACKUP_GET_XML_DESC": self.xml,
            "REMOTE.DOMAIN_ABORT_JOB": self.abort,
            "QEMU.DOMAIN_MONITOR_COMMAND": lambda *_: qemu_protocol.DomainMonitorCommandRet(JOBS),
            "REMOTE.DOMAIN_GET_JOB_STATS": self.stats,
            "REMOTE.DOMAIN_IS_ACTIVE": lambda *_: structs.DomainIsActiveRet(self.active),
            "REMOTE.DOMAIN_GET_BLOCK_INFO": lambda *_: structs.DomainGetBlockInfoRet(1, 1 << 20, 1),
            "REMOTE.DOMAIN_GET_BLOCK_JOB_INFO": lambda *_: JOB,
        }

    def begin(self, peer: rpc_server.Peer, message: rpc.Message) -> None:
        self.begun = rpc.args(message)

    def xml(self, *_: object) -> structs.XmlRet:
        if self.aborted:
            self.ends_after -= 1
            if self.ends_after <= 0:
                self.begun = None
        if self.begun is None:
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP)
        return structs.XmlRet(self.begun.backup_xml)

    def abort(self, *_: object) -> None:
        self.aborted += 1

    def stats(self, *_: object) -> structs.DomainGetJobStatsRet:
        if self.begun is None:
            return NO_JOB
        return structs.DomainGetJobStatsRet(2, params(operation=(1, 9), time_elapsed=(4, 5000)))


@pytest.fixture
def theirs(tmp_path: pathlib.Path) -> Iterator[rpc_server.Server]:
    with rpc_server.Server(rpc_server.unix(tmp_path), ours=False) as made:
        yield made


@pytest.fixture
def daemon(theirs: rpc_server.Server) -> Libvirtd:
    return Libvirtd(theirs)


@pytest.fixture
def opened(theirs: rpc_server.Server, uri: str) -> Iterator[driver.RemoteDriver]:
    with contextlib.closing(driver.open(uri, False)) as made:
        yield made


def test_it_is_said_once(
    theirs: rpc_server.Server, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    with virtbackup.open(f"{uri}?reconnect=yes") as opened:
        lose(theirs, opened)
        assert opened.getHostname() == "here"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["server is libvirt's own: using virDomainBackupBegin"]


def test_a_backup_by_the_merged_calls(daemon: Libvirtd, opened: driver.RemoteDriver) -> None:
    opened.domain_backup_start(REF, PROPOSAL, 0)
    assert daemon.begun is not None
    assert (daemon.begun.dom, daemon.begun.checkpoint_xml, daemon.begun.flags) == (VM, None, 0)
    sent = native_conf.BackupDef.parse(daemon.begun.backup_xml)
    assert sent.server == native_conf.UnixServer("/x.sock")
    listed = {disk.name: disk for disk in sent.disks}
    assert (listed["vda"].backup, listed["vdb"].backup) == (True, False)
    image = listed["vda"].image
    assert image is not None
    assert image.path.startswith("/var/tmp/virtbackup-libvirt-")
    assert image.path.endswith(".vda")
    again = fails(lambda: opened.domain_backup_start(REF, PROPOSAL, 0))
    assert again.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    assert str(again).endswith("another backup job is already running")
    document = opened.domain_backup_get_xml_desc(REF, 0)
    assert '<address type="unix" path="/x.sock"/>' in document
    info = opened.domain_backup_get_info(REF, 0)
    assert [(disk.name, disk.capacity) for disk in info.disks] == [("vda", 1 << 20)]
    assert info.engine == "libvirt"
    assert time.time() - 60 < info.started < time.time() - 4
    opened.domain_backup_stop(REF, 0)
    assert daemon.aborted == 1
    gone = fails(lambda: opened.domain_backup_stop(REF, 0))
    assert gone.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
    assert str(gone).endswith("no domain backup job present")


def test_a_domain_that_ended_had_no_good_backup(
    daemon: Libvirtd, theirs: rpc_server.Server, opened: driver.RemoteDriver
) -> None:
    opened.domain_backup_start(REF, PROPOSAL, 0)
    daemon.active = 0
    refusal = errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running")
    theirs.handlers["QEMU.DOMAIN_MONITOR_COMMAND"] = raises(refusal)
    failure = fails(lambda: opened.domain_backup_stop(REF, 0))
    assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
    assert str(failure).endswith("the backup is not good: the domain ended")
    daemon.begun = structs.DomainBackupBeginArgs(VM, "<domainbackup mode='pull'/>", None, 0)
    daemon.aborted = 0
    no_domain = raises(errors.error(libvirt.VIR_ERR_NO_DOMAIN, "vm"))
    theirs.handlers["REMOTE.DOMAIN_IS_ACTIVE"] = no_domain

    def end(*_: object) -> None:
        theirs.handlers["REMOTE.DOMAIN_BACKUP_GET_XML_DESC"] = no_domain

    theirs.handlers["REMOTE.DOMAIN_ABORT_JOB"] = end
    opened.domain_backup_stop(REF, hypervisor.STOP_CANCEL)


def test_a_job_that_does_not_end(
    daemon: Libvirtd, opened: driver.RemoteDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "END_TIMEOUT", 0.1)
    daemon.ends_after = 10**6
    opened.domain_backup_start(REF, PROPOSAL, 0)
    failure = fails(lambda: opened.domain_backup_stop(REF, 0))
    assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT


def test_autodestroy_is_ours_to_see_to(daemon: Libvirtd, uri: str) -> None:
    first, second = (driver.open(uri, False) for _ in range(2))
    first.domain_backup_start(REF, PROPOSAL, hypervisor.START_AUTODESTROY)
    second.close()
    assert daemon.aborted == 0
    first.close()
    assert daemon.aborted == 1
    third = driver.open(uri, False)
    third.domain_backup_start(REF, PROPOSAL, 0)
    third.close()
    assert daemon.aborted == 1


def test_autodestroy_of_a_backup_whose_stop_is_refused(
    daemon: Libvirtd, theirs: rpc_server.Server, uri: str
) -> None:
    opened = driver.open(uri, False)
    opened.domain_backup_start(REF, PROPOSAL, hypervisor.START_AUTODESTROY)
    abort = theirs.handlers["REMOTE.DOMAIN_ABORT_JOB"]
    theirs.handlers["REMOTE.DOMAIN_ABORT_JOB"] = refuse
    assert "not you" in str(fails(lambda: opened.domain_backup_stop(REF, 0)))
    theirs.handlers["REMOTE.DOMAIN_ABORT_JOB"] = abort
    opened.close()
    assert daemon.aborted == 1


def test_a_backup_that_cannot_be_ended_on_close_is_said(
    daemon: Libvirtd, theirs: rpc_server.Server, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    opened = driver.open(uri, False)
    opened.domain_backup_start(REF, PROPOSAL, hypervisor.START_AUTODESTROY)
    theirs.handlers["REMOTE.DOMAIN_ABORT_JOB"] = refuse
    opened.close()
    assert (
        "domain 'vm' runs on until virsh domjobabort ends it: access denied: not you" in caplog.text
    )
    opened = driver.open(uri, False)
    daemon.begun = None
    opened.domain_backup_start(REF, PROPOSAL, hypervisor.START_AUTODESTROY)
    daemon.begun = None  # somebody else has ended it
    caplog.clear()
    opened.close()
    assert "runs on" not in caplog.text


@pytest.mark.parametrize(
    ("ask", "code", "text"),
    [
        (lambda d: d.domain_branch_list(REF, 0), libvirt.VIR_ERR_NO_SUPPORT,
         "virDomainBranchList (the server is libvirt's own, which has checkpoints, no branches)"),
        (lambda d: d.domain_branch_create(REF, "b", 0), libvirt.VIR_ERR_NO_SUPPORT,
         "virDomainBranchCreate (the server is libvirt's own"),
        (lambda d: d.domain_branch_delete(REF, "b", 0), libvirt.VIR_ERR_NO_SUPPORT,
         "virDomainBranchDelete (the server is libvirt's own"),
        (lambda d: d.domain_backup_cleanup(REF, 0), libvirt.VIR_ERR_NO_SUPPORT,
         "virDomainBackupCleanup (the server is libvirt's own"),
        (lambda d: d.domain_backup_start(REF, PROPOSAL, hypervisor.START_QUIESCE),
         libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, "libvirt's own backup does not quiesce"),
        (lambda d: d.domain_backup_start(
            REF, PROPOSAL.replace("<disks>", '<branch name="b"/><disks>'), 0),
         libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
         "branch 'b': libvirt's own backup has checkpoints, no branches"),
        (lambda d: d.domain_backup_start(REF, "<domainbackup/>", 0),
         libvirt.VIR_ERR_CONFIG_UNSUPPORTED, "export address must be specifed"),
    ],
    ids=["list", "create", "delete", "cleanup", "quiesce", "branch", "no address"],
)  # fmt: skip
def test_what_libvirts_own_has_not(
    daemon: Libvirtd,
    opened: driver.RemoteDriver,
    ask: Callable[[driver.RemoteDriver], Any],
    code: int,
    text: str,
) -> None:
    failure = fails(lambda: ask(opened))
    assert failure.get_error_code() == code
    assert text in str(failure)
    assert daemon.begun is None


def test_the_end_of_a_job_is_the_end_of_a_backup(
    theirs: rpc_server.Server, opened: driver.RemoteDriver
) -> None:
    registry = Registry(theirs)
    events: queue.SimpleQueue[hypervisor.Event] = queue.SimpleQueue()
    opened.event_register(events.put)
    assert [event for event, _ in registry.registered] == ["0", "21"]
    for values in (
        params(operation=(1, 5)),
        params(operation=(1, 9), success=(6, 1), errmsg=(7, "Operation canceled")),
        params(operation=(1, 9), success=(6, 0), errmsg=(7, "no space")),
    ):
        value = structs.DomainEventCallbackJobCompletedMsg(1, VM, values)
        theirs.peer().send(rpc.event(REMOTE, "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED", value))
    assert events.get(timeout=DEADLINE) == hypervisor.BackupEnded(REF, True, None)
    assert events.get(timeout=DEADLINE) == hypervisor.BackupEnded(REF, False, "no space")


def test_a_server_that_changes_its_kind(uri: str, tmp_path: pathlib.Path) -> None:
    """As where a daemon of ours takes the place of libvirt's."""
    address = rpc_server.unix(tmp_path)
    with contextlib.ExitStack() as stack:
        with rpc_server.Server(address, ours=False):
            opened = driver.open(f"{uri}?reconnect=yes", False)
            stack.callback(opened.close)
            assert fails(lambda: opened.domain_branch_list(REF, 0))
        daemon_scene.wait_for(lambda: not opened._current.client.is_alive)
        branches = virtbackup_protocol.DomainBranchListRet(())
        handlers: dict[str, rpc_server.Handler] = {
            "VIRTBACKUP.DOMAIN_BRANCH_LIST": lambda *_: branches
        }
        with rpc_server.Server(address, handlers):
            assert opened.domain_branch_list(REF, 0) == []
