# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon: several hosts as one, backups and their clients, and the program itself."""

import errno
import functools
import itertools
import math
import os
import pathlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import libvirt
import pytest

import virtbackup
from tests import daemon_scene, waiting
from tests.live import certificates
from tests.test_access import me
from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, virtbackup_conf
from virtbackup.remote import (
    daemon,
    dispatch,
    domains,
    program,
    protocol,
    remote_types,
    rpc,
    transport,
    wire_conf,
)

REMOTE, VIRTBACKUP = protocol.REMOTE, protocol.VIRTBACKUP
A, B, C = daemon_scene.ref("a", 1), daemon_scene.ref("b", 2), daemon_scene.ref("c", None)
XML = '<domainbackup><address type="unix" path="/x.sock"/></domainbackup>'
QUIESCE, AUTODESTROY, CANCEL = 1, 2, 1


# --- several hosts ---


def test_two_hosts_are_one(tmp_path: pathlib.Path) -> None:
    first = daemon_scene.Driver(A, C, host="first")
    second = daemon_scene.Driver(daemon_scene.ref("d", 1), daemon_scene.ref("e", 2), host="second")
    with daemon_scene.serving(tmp_path, first, second) as served, served.connect() as client:
        listed = client.call(REMOTE, "CONNECT_LIST_ALL_DOMAINS", 1, 0).domains
        assert [(dom.name, dom.id) for dom in listed] == [("a", 1), ("c", -1), ("d", 2), ("e", 3)]
        for dom in listed[0], *listed[2:]:
            assert client.call(REMOTE, "DOMAIN_LOOKUP_BY_ID", dom.id).dom == dom
            assert client.lookup(dom.name) == dom
            assert client.call(REMOTE, "DOMAIN_LOOKUP_BY_UUID", dom.uuid).dom == dom
        client.call(REMOTE, "DOMAIN_SUSPEND", client.lookup("e"))
        assert ("domain_suspend", second.refs[1]) in second.calls
        assert client.call(REMOTE, "CONNECT_GET_HOSTNAME").hostname == "first"
        # An id is a domain's as long as it runs, whoever comes and goes.
        second.refs[0] = daemon_scene.ref("d", None)
        listed = client.call(REMOTE, "CONNECT_LIST_ALL_DOMAINS", 1, 0).domains
        assert [dom.id for dom in listed] == [1, -1, -1, 3]
        assert client.lookup("e").id == 3


def test_a_guest_without_libvirt_is_none_of_libvirts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the passthrough, its disks would be none of QEMU's, and its branches none. So are those of
    libvirt's own that has just ended, which is told of as any."""
    fake = hypervisor.open_driver("test:///default", False)
    with daemon_scene.serving(tmp_path, fake) as served:
        uri = f"qemu+unix:///system?socket={served.path}"
        with virtbackup.open(uri) as connection:
            dom = connection.lookupByName("vm")
            for call in (dom.branchList, lambda: dom.backupStart(XML)):
                with pytest.raises(errors.Error, match="'vm' is no guest of libvirt's") as caught:
                    call()
                assert caught.value.get_error_code() == libvirt.VIR_ERR_CONFIG_UNSUPPORTED
            monkeypatch.setattr(libvirt.virDomain, "isActive", lambda _: 0)
            with pytest.raises(errors.Error, match="domain is not running") as caught:
                dom.branchList()
            assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (1_000, 9_000_000),
        (11_003_000, 11_003_000),
        (11_010_000, 11_009_000),
        (12_008_000, 11_009_000),
    ],
)
def test_a_version_by_which_clients_ask_for_nothing_unknown(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, theirs: int, told: int
) -> None:
    """From libvirt 11.10 on, virtnbdbackup has a backup begun with a flag that is refused here."""
    driver = daemon_scene.Driver(A)
    monkeypatch.setattr(driver, "get_lib_version", lambda: theirs, raising=False)
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as client:
        assert client.call(REMOTE, "CONNECT_GET_LIB_VERSION").lib_ver == told


def test_of_two_with_one_uuid_the_first_host_s_is_meant(tmp_path: pathlib.Path) -> None:
    """By whatever it was looked up."""
    first, second = daemon_scene.Driver(A), daemon_scene.Driver(A)
    with daemon_scene.serving(tmp_path, first, second) as served, served.connect() as client:
        for _ in range(2):
            dom = client.lookup("a")
            client.call(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, XML, 0)
            client.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", dom, 0)
        assert client.names() == ["a"]
        client.call(REMOTE, "DOMAIN_SUSPEND", dom)
    assert not [call for call in second.calls if call[0] != "list_domains"]


class Counting(daemon_scene.Driver):
    """One that has statistics, as libvirt does and a QMP socket does not."""

    def get_all_domain_stats(
        self, refs: Sequence[hypervisor.DomainRef], stats: int, flags: int
    ) -> Sequence[tuple[hypervisor.DomainRef, Mapping[str, hypervisor.Value]]]:
        return [(ref, {"vcpu.current": 2}) for ref in refs]


def test_statistics_of_all_are_those_of_the_hosts_that_have_any(tmp_path: pathlib.Path) -> None:
    """Of domains that are named, they are refused as ever."""
    first, second = daemon_scene.Driver(A), Counting(daemon_scene.ref("d", 2))
    with daemon_scene.serving(tmp_path, first, second) as served, served.connect() as client:
        [record] = client.call(REMOTE, "CONNECT_GET_ALL_DOMAIN_STATS", (), 0, 0).retStats
        assert record.dom == client.lookup("d")
        doms = client.lookup("a"), client.lookup("d")
        code, _ = daemon_scene.code_of(
            client.call, REMOTE, "CONNECT_GET_ALL_DOMAIN_STATS", doms, 0, 0
        )
        assert code == libvirt.VIR_ERR_NO_SUPPORT
        second.refs.clear()
        code, _ = daemon_scene.code_of(
            client.call, REMOTE, "CONNECT_GET_ALL_DOMAIN_STATS", (), 0, 0
        )
        assert code == libvirt.VIR_ERR_NO_SUPPORT


def test_a_name_that_two_have(tmp_path: pathlib.Path) -> None:
    other = daemon_scene.ref("a", 1, number=77)
    first, second = daemon_scene.Driver(A), daemon_scene.Driver(other)
    with daemon_scene.serving(tmp_path, first, second) as served, served.connect() as client:
        code, text = daemon_scene.code_of(client.lookup, "a")
        assert code == libvirt.VIR_ERR_OPERATION_INVALID
        assert f"several domains have the name 'a': ask by uuid ({A.uuid}, {other.uuid})" in text
        for ref, driver in ((A, first), (other, second)):
            dom = wire_conf.domain_to_wire(ref)
            found = client.call(REMOTE, "DOMAIN_LOOKUP_BY_UUID", dom.uuid).dom
            client.call(REMOTE, "DOMAIN_SUSPEND", found)
            assert ("domain_suspend", ref) in driver.calls


def test_a_host_that_comes_later(tmp_path: pathlib.Path) -> None:
    late = daemon_scene.Driver(B)
    fails: list[Exception] = [OSError("not there yet")]

    def open_late() -> hypervisor.Driver:
        if fails:
            raise fails[0]
        return late

    drivers = (daemon_scene.Driver(A), open_late)
    with daemon_scene.serving(tmp_path, *drivers) as served, served.connect() as client:
        assert client.names() == ["a"]
        _, text = daemon_scene.code_of(client.lookup, "b")
        assert text == (
            "Domain not found: no domain with matching name 'b' (not to be asked: fake1:///)"
        )
        client.call(REMOTE, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
        fails.clear()
        assert client.names() == ["a", "b"]
        assert client.lookup("b").name == "b"
        late.tell(hypervisor.LifecycleEvent(B, 2, 0))
        assert client.event().proc == REMOTE["DOMAIN_EVENT_CALLBACK_LIFECYCLE"]


def test_a_driver_whose_events_cannot_be_had_is_closed(tmp_path: pathlib.Path) -> None:
    """It is opened anew with the next call, and the next."""
    opened: list[daemon_scene.Driver] = []

    class Deaf(daemon_scene.Driver):
        def event_register(
            self, callback: Callable[[hypervisor.Event], None]
        ) -> Callable[[], None]:
            if len(opened) < 3:
                raise errors.error(libvirt.VIR_ERR_SYSTEM_ERROR, "too many callbacks")
            return super().event_register(callback)

    def open_driver() -> hypervisor.Driver:
        opened.append(Deaf(A))
        return opened[-1]

    with daemon_scene.serving(tmp_path, open_driver) as served, served.connect() as client:
        for _ in range(2):
            assert "too many callbacks" in daemon_scene.code_of(client.names)[1]
        assert client.names() == ["a"]
        assert [one.closed for one in opened] == [True, True, False]


def test_no_host_at_all(tmp_path: pathlib.Path) -> None:
    def fail() -> hypervisor.Driver:
        raise errors.error(libvirt.VIR_ERR_NO_CONNECT, "gone")

    for drivers in ([fail], [fail, fail]):
        with daemon_scene.serving(tmp_path, *drivers) as served, served.connect() as client:
            code, _ = daemon_scene.code_of(client.names)
            assert code == libvirt.VIR_ERR_NO_CONNECT
            code, _ = daemon_scene.code_of(client.call, REMOTE, "CONNECT_GET_HOSTNAME")
            assert code == libvirt.VIR_ERR_NO_CONNECT


def test_a_host_that_hangs(tmp_path: pathlib.Path) -> None:
    """It is waited for once, for a while, and until it answers not again."""
    hangs, lives = daemon_scene.Driver(A), daemon_scene.Driver(B, host="second")
    held = hangs.hold("list_domains")
    serving = daemon_scene.serving(tmp_path, hangs, lives, patience=1.0)
    with serving as served, served.connect() as client:
        assert client.names() == ["b"]
        hostname = hangs.hold("get_hostname")
        assert client.call(REMOTE, "CONNECT_GET_HOSTNAME").hostname == "second"
        hostname.set()
        for _ in range(200):
            assert client.names() == ["b"]
            assert client.lookup("b").name == "b"
        assert len([call for call in hangs.calls if call[0] == "list_domains"]) < 5
        _, text = daemon_scene.code_of(client.lookup, "a")
        assert "(not to be asked: fake0:///)" in text
        held.set()
        daemon_scene.wait_for(lambda: client.names() == ["a", "b"])


def test_a_host_that_hangs_answers_nobody_else_s_question(tmp_path: pathlib.Path) -> None:
    """It may come back while another host is waited for: with what it was asked long ago."""
    slow, hangs = daemon_scene.Driver(B), daemon_scene.Driver(A, daemon_scene.ref("d"))
    held = hangs.hold("list_domains")
    serving = daemon_scene.serving(tmp_path, slow, hangs, patience=0.2)
    with serving as served, served.connect() as client:
        with pytest.raises(errors.Error, match="no domain with matching name 'd'"):
            client.lookup("d")
        served.daemon.domains._hanging[served.daemon.domains.hosts[1]]._since = -math.inf
        served.daemon.domains.patience = daemon_scene.DEADLINE
        first = slow.hold("list_domains")
        serial = client.post(REMOTE, "DOMAIN_LOOKUP_BY_NAME", "b")
        slow.wait_entered("list_domains")
        held.set()  # 'd' is found there, which was asked for long ago
        time.sleep(0.05)
        first.set()
        reply = client.reply(serial)
        assert reply.status == program.MessageStatus.OK
        assert rpc.ret(reply).dom.name == "b"


def test_a_host_whose_driver_gives_up_is_waited_for_once(tmp_path: pathlib.Path) -> None:
    """As that of a QMP socket does, after as long as a host is waited for; it is asked again."""
    hangs, lives = daemon_scene.Driver(A), daemon_scene.Driver(B)
    given_up = errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "monitor socket did not answer")
    hangs.failures["list_domains"] = given_up
    serving = daemon_scene.serving(tmp_path, hangs, lives, patience=5.0)
    with serving as served, served.connect() as client:
        assert client.names() == ["b"]
        held = hangs.hold("list_domains")
        begin = time.monotonic()
        assert [client.names(), client.names()] == [["b"], ["b"]]
        assert time.monotonic() - begin < 5.0
        del hangs.failures["list_domains"]
        held.set()
        daemon_scene.wait_for(lambda: client.names() == ["a", "b"])


def test_a_host_that_hangs_when_it_is_opened(tmp_path: pathlib.Path) -> None:
    go = threading.Event()

    def opener() -> hypervisor.Driver:
        assert go.wait(daemon_scene.DEADLINE)
        return daemon_scene.Driver(A)

    drivers = (opener, daemon_scene.Driver(B, host="second"))
    with (
        daemon_scene.serving(tmp_path, *drivers, patience=1.0) as served,
        served.connect() as client,
    ):
        assert client.names() == ["b"]
        assert client.lookup("b").name == "b"
        assert client.call(REMOTE, "CONNECT_GET_HOSTNAME").hostname == "second"
        go.set()
        daemon_scene.wait_for(lambda: client.names() == ["a", "b"])


def test_a_host_that_hangs_when_it_is_let_go(tmp_path: pathlib.Path) -> None:
    """As libvirt's library does, while a libvirtd stands still: the daemon ends all the same."""
    hangs, lives = daemon_scene.Driver(A), daemon_scene.Driver(B)
    held = hangs.hold("close")
    try:
        with daemon_scene.serving(tmp_path, hangs, lives) as served:
            with served.connect() as client:
                assert client.names() == ["a", "b"]
            served.daemon.domains.patience = 0.2
            served.stop()
        daemon_scene.wait_for(lambda: lives.closed)
        assert not hangs.closed
    finally:
        held.set()


def test_many_hosts_hang_when_they_are_let_go(tmp_path: pathlib.Path) -> None:
    """All others are let go of, whose backups end with a client, say."""
    some = [daemon_scene.Driver(daemon_scene.ref(f"h{n}")) for n in range(25)]
    held = [driver.hold("close") for driver in some]
    lives = daemon_scene.Driver(B)
    try:
        with daemon_scene.serving(tmp_path, *some, lives) as served:
            with served.connect() as client:
                assert len(client.names()) == 26
            served.daemon.domains.patience = 0.5
            served.stop()
        daemon_scene.wait_for(lambda: lives.closed)
    finally:
        for one in held:
            one.set()


def test_a_host_that_cannot_be_let_go_does_not_hang(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    fails = daemon_scene.Driver(A)
    fails.hold("close").set()
    fails.failures["close"] = OSError("no")
    with daemon_scene.serving(tmp_path, fails) as served, served.connect() as client:
        assert client.names() == ["a"]
    assert "hangs" not in caplog.text


def test_who_asks_for_events_of_a_host_that_hangs(tmp_path: pathlib.Path) -> None:
    """As often as it likes: it is one thread that waits for the host to be opened."""
    go = threading.Event()

    def opener() -> hypervisor.Driver:
        assert go.wait(daemon_scene.DEADLINE)
        return daemon_scene.Driver(B)

    register = "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"
    with (
        daemon_scene.serving(tmp_path, daemon_scene.Driver(A), opener) as served,
        served.connect() as client,
    ):
        for _ in range(50):
            client.call(REMOTE, register, 0, None)
        assert len(served.daemon.domains._workers._threads) <= 2
        go.set()
        daemon_scene.wait_for(lambda: client.names() == ["a", "b"])


def test_a_host_is_asked_one_thing_after_the_other(tmp_path: pathlib.Path) -> None:
    """By one thread, however many clients want to know; who waits for the same shares an answer."""
    one = daemon_scene.Driver(A)
    held = one.hold("list_domains")
    with daemon_scene.serving(tmp_path, one, daemon_scene.Driver(B)) as served:
        of = served.daemon.domains
        of.hosts[0].driver()

        def ask(key: str) -> domains.Question[Sequence[hypervisor.DomainRef]]:
            question, fresh = of._ask(of.hosts[0], lambda driver: driver.list_domains(), key)
            assert fresh
            return question

        first = ask("all")
        one.wait_entered("list_domains")
        second = ask("all")
        assert second is not first  # which may have been answered by what was before
        others = [ask("all") for _ in range(50)] + [ask("b"), ask("b")]
        assert len({first, second, *others}) == 3
        held.set()
        for question in (first, second, *others):
            assert question.answer(time.monotonic() + daemon_scene.DEADLINE) == [A]
        assert len([call for call in one.calls if call[0] == "list_domains"]) == 3
        assert len(of._workers._threads) <= 2


def test_the_hosts_of_all_domains_are_learned_at_once(tmp_path: pathlib.Path) -> None:
    """A daemon that has just come up asked every host for each domain of another."""
    many = [[daemon_scene.ref(f"{host}{n}", n) for n in range(1, 6)] for host in "ab"]
    drivers = [daemon_scene.Driver(*refs) for refs in many]
    with daemon_scene.serving(tmp_path, *drivers) as served:
        for ref in itertools.chain(*many):
            assert served.daemon.domains.by_uuid(ref.uuid).own == ref
    for driver in drivers:
        assert [call[0] for call in driver.calls] == ["list_domains"] * 6


def test_what_is_gone_is_forgotten_beside_a_host_that_is_away(tmp_path: pathlib.Path) -> None:
    """For months, say, while the other's guests are started and ended; the host's own ids stay."""
    away, other = daemon_scene.Driver(A), daemon_scene.Driver(B)
    with daemon_scene.serving(tmp_path, other, away) as served:
        of = served.daemon.domains
        assert [one.ref.id for one in of.all()] == [2, 1]
        away.failures["list_domains"] = errors.error(libvirt.VIR_ERR_NO_CONNECT, "away")
        for number in range(20):
            other.refs = [daemon_scene.ref(f"vm{number}", 1)]
            assert [one.ref.id for one in of.all()] == [2]
        away.failures.clear()
        assert [one.ref.id for one in of.all()] == [2, 1]
        assert len(of._ids) == 2


def test_a_call_that_hangs_is_one_domain_s(tmp_path: pathlib.Path) -> None:
    hangs, lives = daemon_scene.Driver(A), daemon_scene.Driver(B)
    held = hangs.hold("domain_backup_start")
    serving = daemon_scene.serving(tmp_path, hangs, lives)
    with serving as served, served.connect() as client, served.connect() as other:
        a, b = client.lookup("a"), client.lookup("b")
        late = client.post(VIRTBACKUP, "DOMAIN_BACKUP_START", a, XML, 0)
        hangs.wait_entered("domain_backup_start")
        for one in (client, other):
            assert one.names() == ["a", "b"]
            one.call(VIRTBACKUP, "DOMAIN_BACKUP_START", b, XML, 0)
            one.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", b, 0)
        held.set()
        assert client.reply(late).status == 0


def test_what_a_driver_raises(tmp_path: pathlib.Path) -> None:
    """Not even what it may not raise is any other host's trouble."""
    bad, good = daemon_scene.Driver(A), daemon_scene.Driver(B)
    with daemon_scene.serving(tmp_path, bad, good) as served, served.connect() as client:
        dom = client.lookup("a")
        bad.failures["list_domains"] = ZeroDivisionError("oops")
        bad.failures["domain_get_state"] = ZeroDivisionError("oops")
        assert client.names() == ["b"]
        code, text = daemon_scene.code_of(client.call, REMOTE, "DOMAIN_GET_STATE", dom, 0)
        assert (code, text) == (
            libvirt.VIR_ERR_INTERNAL_ERROR, "internal error: ZeroDivisionError: oops"
        )  # fmt: skip


def test_a_domain_that_goes_while_it_is_listed(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A, B)
    running = libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as client:
        driver.failures["domain_get_state"] = errors.error(libvirt.VIR_ERR_NO_DOMAIN, "gone")
        assert client.call(REMOTE, "CONNECT_LIST_ALL_DOMAINS", 1, running).domains == ()
        assert client.call(VIRTBACKUP, "LIST_DOMAINS").domains == ()
        driver.failures["domain_get_state"] = errors.error(libvirt.VIR_ERR_SYSTEM_ERROR, "busy")
        states = client.call(VIRTBACKUP, "LIST_DOMAINS").domains
        assert [one.state for one in states] == [0, 0]


# --- backups, and whose they are ---


def start(client: daemon_scene.Raw, ref: hypervisor.DomainRef, flags: int = 0) -> None:
    client.call(VIRTBACKUP, "DOMAIN_BACKUP_START", wire_conf.domain_to_wire(ref), XML, flags)


def stop(client: daemon_scene.Raw, ref: hypervisor.DomainRef, flags: int = 0) -> None:
    client.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", wire_conf.domain_to_wire(ref), flags)


def test_flags_that_there_are_not(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A)
    dom = wire_conf.domain_to_wire(A)
    calls = [
        ("DOMAIN_BACKUP_START", "virDomainBackupStart", (dom, XML, 8)),
        ("DOMAIN_BACKUP_STOP", "virDomainBackupStop", (dom, 8)),
        ("DOMAIN_BACKUP_GET_XML_DESC", "virDomainBackupGetXMLDesc", (dom, 8)),
        ("DOMAIN_BACKUP_GET_INFO", "virDomainBackupGetInfo", (dom, 8)),
        ("DOMAIN_BACKUP_CLEANUP", "virDomainBackupCleanup", (dom, 8)),
        ("DOMAIN_BRANCH_LIST", "virDomainBranchList", (dom, 8)),
        ("DOMAIN_BRANCH_CREATE", "virDomainBranchCreate", (dom, "x", 8)),
        ("DOMAIN_BRANCH_DELETE", "virDomainBranchDelete", (dom, "x", 8)),
    ]
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as client:
        for name, function, args in calls:
            code, text = daemon_scene.code_of(client.call, VIRTBACKUP, name, *args)
            assert code == libvirt.VIR_ERR_INVALID_ARG
            assert text == f"unsupported flags (0x8) in function {function}"
    assert not [call for call in driver.calls if call[0].startswith("domain_b")]


def test_one_of_many_starts(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A)
    with daemon_scene.serving(tmp_path, driver) as served:
        clients = [served.connect() for _ in range(8)]
        for _ in range(5):
            serials = [
                client.post(VIRTBACKUP, "DOMAIN_BACKUP_START", wire_conf.domain_to_wire(A), XML, 0)
                for client in clients
            ]
            replies = [
                client.reply(serial) for client, serial in zip(clients, serials, strict=True)
            ]
            assert sorted(reply.status for reply in replies) == [0] + [1] * 7
            serials = [
                client.post(VIRTBACKUP, "DOMAIN_BACKUP_STOP", wire_conf.domain_to_wire(A), 0)
                for client in clients
            ]
            replies = [
                client.reply(serial) for client, serial in zip(clients, serials, strict=True)
            ]
            assert sorted(reply.status for reply in replies) == [0] + [1] * 7
        for client in clients:
            client.close()


def test_a_backup_ends_with_its_client(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A, B)
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as other:
        with served.connect() as client:
            start(client, A, AUTODESTROY)
            start(client, B)
        daemon_scene.wait_for(lambda: A.uuid not in driver.running)
        assert ("domain_backup_stop", A, CANCEL) in driver.calls
        stop(other, B)


def test_closed_or_not_its_backup_ends(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A)
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as client:
        start(client, A, AUTODESTROY)
        client.call(REMOTE, "CONNECT_CLOSE")
        assert not driver.running
        code, _ = daemon_scene.code_of(client.names)
        assert code == libvirt.VIR_ERR_INTERNAL_ERROR


def test_a_backup_of_which_nothing_can_be_asked_ends_with_its_client(
    tmp_path: pathlib.Path,
) -> None:
    """It runs all the same."""
    driver = daemon_scene.Driver(A)
    with daemon_scene.serving(tmp_path, driver) as served:
        with served.connect() as client:
            busy = errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "cannot acquire a lock")
            driver.failures["domain_backup_get_info"] = busy
            start(client, A, AUTODESTROY)
            assert driver.running
        daemon_scene.wait_for(lambda: not driver.running)


def test_what_is_opened_again_begins_anew(tmp_path: pathlib.Path) -> None:
    with (
        daemon_scene.serving(tmp_path, daemon_scene.Driver(A)) as served,
        served.connect() as client,
    ):
        client.call(REMOTE, "CONNECT_REGISTER_CLOSE_CALLBACK")
        client.call(REMOTE, "CONNECT_CLOSE")
        client.call(REMOTE, "CONNECT_OPEN", "", 0)
        client.call(REMOTE, "CONNECT_REGISTER_CLOSE_CALLBACK")
        code, text = daemon_scene.code_of(
            lambda: client.call(REMOTE, "CONNECT_REGISTER_CLOSE_CALLBACK")
        )
        assert code == libvirt.VIR_ERR_INTERNAL_ERROR
        assert "already registered" in text


@pytest.mark.parametrize("how", ["closes", "vanishes"])
def test_a_backup_ends_after_its_client_once_it_can(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As where libvirtd is down just then."""
    monkeypatch.setattr(dispatch, "TRY_AGAIN", 0.01)
    driver = daemon_scene.Driver(A)
    with daemon_scene.serving(tmp_path, driver) as served:
        client = served.connect()
        start(client, A, AUTODESTROY)
        down = errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, "client socket is closed")
        driver.failures["domain_backup_stop"] = down
        if how == "closes":
            client.call(REMOTE, "CONNECT_CLOSE")
        client.close()
        tried = ("domain_backup_stop", A, CANCEL)
        daemon_scene.wait_for(lambda: driver.calls.count(tried) > 3)
        assert driver.running
        driver.failures.clear()
        daemon_scene.wait_for(lambda: not driver.running)
        name = "virtbackup-end"
        daemon_scene.wait_for(lambda: name not in [t.name for t in threading.enumerate()])


def test_it_is_not_tried_for_ever(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "TRY_AGAIN", 0.01)
    monkeypatch.setattr(dispatch, "PATIENCE", 0.1)
    driver = daemon_scene.Driver(A)
    with daemon_scene.serving(tmp_path, driver) as served:
        with served.connect() as client:
            start(client, A, AUTODESTROY)
            down = errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, "client socket is closed")
            driver.failures["domain_backup_stop"] = down
        why = f"domain={A.uuid} backup not ended: internal error: client socket is closed"
        daemon_scene.wait_for(lambda: caplog.messages.count(why) == 2)  # at first, and at last
        name = "virtbackup-end"
        daemon_scene.wait_for(lambda: name not in [t.name for t in threading.enumerate()])
        assert driver.running


@pytest.mark.parametrize("elsewhere", [False, True])
def test_another_s_backup_does_not(tmp_path: pathlib.Path, elsewhere: bool) -> None:
    """A client's backup was stopped by somebody else, who has started another since."""
    driver = daemon_scene.Driver(A)
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as other:
        with served.connect() as client:
            start(client, A, AUTODESTROY)
            if elsewhere:
                del driver.running[A.uuid]
            else:
                stop(other, A)
            start(other, A)
        daemon_scene.wait_for(lambda: len(served.daemon.server.clients) == 1)
        assert other.names() == ["a"]
        daemon_scene.wait_for(lambda: not served.daemon.server.workers._urgent)
        stop(other, A)
    assert ("domain_backup_stop", A, CANCEL) not in driver.calls


class Silent(daemon_scene.Driver):
    """Does not tell which backup runs; and no backup of it is good."""

    def domain_backup_get_info(
        self, domain: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        raise errors.error(libvirt.VIR_ERR_NO_SUPPORT, "virDomainBackupGetInfo")

    def domain_backup_stop(self, domain: hypervisor.DomainRef, flags: int) -> None:
        super().domain_backup_stop(domain, flags)
        raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, "vda: it broke")


def test_another_s_backup_does_not_after_a_bad_one(tmp_path: pathlib.Path) -> None:
    """A stop that says that the backup was not good has ended it all the same."""
    driver = Silent(A)
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as other:
        with served.connect() as client:
            start(client, A, AUTODESTROY)
            code, _ = daemon_scene.code_of(lambda: stop(other, A))
            assert code == libvirt.VIR_ERR_OPERATION_FAILED
            start(other, A)
        daemon_scene.wait_for(lambda: len(served.daemon.server.clients) == 1)
    assert A.uuid in driver.running
    assert ("domain_backup_stop", A, CANCEL) not in driver.calls


class Once(daemon_scene.Driver):
    """Its branches are deleted by somebody else, once they were told."""

    branches = [
        backup_conf.Branch(
            name,
            foreign=False,
            disks=(
                backup_conf.BranchDisk(
                    "vda", 65536, 0, True, None, backup_conf.Point("0000000a", time)
                ),
            ),
        )
        for time, name in enumerate(("first", "second", "third"))
    ]

    def domain_branch_list(
        self, domain: hypervisor.DomainRef, flags: int
    ) -> Sequence[backup_conf.Branch]:
        told, self.branches = self.branches, []
        return told

    def domain_branch_delete(self, domain: hypervisor.DomainRef, name: str, flags: int) -> None:
        self._enter("domain_branch_delete", name)


@pytest.mark.parametrize("what", ["list", "delete"])
def test_checkpoints_that_somebody_else_deletes_meanwhile(
    tmp_path: pathlib.Path, what: str
) -> None:
    """Those behind one are of the same moment as that."""
    driver = Once(A)
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as client:
        second = remote_types.NonnullDomainCheckpoint("second", client.lookup("a"))
        if what == "list":
            found = client.call(REMOTE, "DOMAIN_CHECKPOINT_LIST_ALL_CHILDREN", second, 1, 0)
            assert [one.name for one in found.checkpoints] == ["third"]
        else:
            children = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN
            client.call(REMOTE, "DOMAIN_CHECKPOINT_DELETE", second, children)
            deleted = [call[1] for call in driver.calls if call[0] == "domain_branch_delete"]
            assert deleted == ["third", "second"]


def test_a_start_that_outlives_its_client(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A)
    held = driver.hold("domain_backup_start")
    with daemon_scene.serving(tmp_path, driver) as served:
        with served.connect() as client:
            dom = wire_conf.domain_to_wire(A)
            client.post(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, XML, AUTODESTROY)
            driver.wait_entered("domain_backup_start")
        daemon_scene.wait_for(lambda: not served.daemon.server.clients)
        held.set()
        daemon_scene.wait_for(lambda: ("domain_backup_stop", A, CANCEL) in driver.calls)
        assert not driver.running


def test_a_start_that_fails_forgets_no_job(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A)
    completed = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED
    keep = libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as client:
        dom = client.lookup("a")
        start(client, A)
        assert client.call(REMOTE, "DOMAIN_GET_JOB_STATS", dom, 0).type == 2
        stop(client, A)
        driver.failures["domain_backup_start"] = errors.error(libvirt.VIR_ERR_SYSTEM_ERROR, "no")
        daemon_scene.code_of(lambda: start(client, A))
        stats = client.call(REMOTE, "DOMAIN_GET_JOB_STATS", dom, completed | keep)
        assert stats.type == libvirt.VIR_DOMAIN_JOB_COMPLETED
        assert "time_elapsed" in [param.field for param in stats.params]
        assert client.call(REMOTE, "DOMAIN_GET_JOB_STATS", dom, completed).type == 3
        assert client.call(REMOTE, "DOMAIN_GET_JOB_STATS", dom, completed).type == 0
        code, text = daemon_scene.code_of(client.call, REMOTE, "DOMAIN_ABORT_JOB", dom)
        assert code == libvirt.VIR_ERR_OPERATION_INVALID
        assert text == "Requested operation is not valid: no job is active on the domain"


def test_events_of_one_domain_and_of_all(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A, B)
    register = "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as client:
        a = client.lookup("a")
        of_a = client.call(REMOTE, register, 21, a).callbackID
        of_all = client.call(REMOTE, register, 21, None).callbackID
        for ref in (B, A):
            start(client, ref)
            stop(client, ref)
        told = [client.event() for _ in range(3)]
        assert [int.from_bytes(one.payload[:4], "big") for one in told] == [of_all, of_a, of_all]
        assert not client.events, "of our own program, which it has not asked"
        client.call(REMOTE, "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY", of_a)
        deregister = "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY"
        for number in (of_a, 99, -1):
            code, _ = daemon_scene.code_of(client.call, REMOTE, deregister, number)
            assert code == libvirt.VIR_ERR_INTERNAL_ERROR
        code, _ = daemon_scene.code_of(client.call, REMOTE, register, 27, None)
        assert code == libvirt.VIR_ERR_INTERNAL_ERROR


def test_events_while_clients_come_and_go(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A)
    register = "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"
    over = threading.Event()
    failures: list[Exception] = []

    def tell() -> None:
        event = hypervisor.LifecycleEvent(A, 2, 0)
        try:
            while not over.is_set():
                driver.tell(event)
        except Exception as failure:  # noqa: BLE001  (which the test shows)
            failures.append(failure)

    with daemon_scene.serving(tmp_path, driver) as served:
        with served.connect() as first:
            assert first.names() == ["a"]
        teller = threading.Thread(target=tell)
        teller.start()
        for _ in range(30):
            with served.connect() as client:
                for _ in range(10):
                    client.call(REMOTE, register, 0, None)
                client.call(REMOTE, "CONNECT_CLOSE")
        over.set()
        teller.join(daemon_scene.DEADLINE)
    assert not failures


def test_subscriptions_are_not_without_end(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A)
    register = "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as client:
        assert client.names() == ["a"]
        for _ in range(4096 // 64):
            for _ in [client.post(REMOTE, register, 0, None) for _ in range(64)]:
                assert client.reply().status == 0
        code, text = daemon_scene.code_of(client.call, REMOTE, register, 0, None)
        assert (code, text) == (1, "internal error: more than 4096 event callbacks")


def test_one_user_s_subscriptions_are_not_without_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many connections there are: the driver waits until all have been told."""
    monkeypatch.setattr(dispatch, "MAX_SUBSCRIPTIONS_OF_ONE", 10)
    register = "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"
    with (
        daemon_scene.serving(tmp_path, daemon_scene.Driver(A)) as served,
        served.connect() as client,
    ):
        with served.connect() as other:
            for _ in range(5):
                for one in (client, other):
                    one.call(REMOTE, register, 0, None)
            code, text = daemon_scene.code_of(client.call, REMOTE, register, 0, None)
            assert code == libvirt.VIR_ERR_INTERNAL_ERROR
            assert text == f"internal error: more than 10 event callbacks of unix client '{me()}'"
        daemon_scene.wait_for(lambda: len(served.daemon._shared.sessions()) == 1)
        for _ in range(5):
            client.call(REMOTE, register, 0, None)


def test_arguments_out_of_range(tmp_path: pathlib.Path) -> None:
    driver = daemon_scene.Driver(A)
    with daemon_scene.serving(tmp_path, driver) as served, served.connect() as client:
        dom = client.lookup("a")
        for number in (-1, 17, 2**31 - 1):
            code, text = daemon_scene.code_of(
                client.call, REMOTE, "DOMAIN_BLOCK_STATS_FLAGS", dom, "vda", number, 0
            )
            assert (code, text) == (1, "internal error: nparams too large")
        for number in (-1, 0):
            assert client.call(REMOTE, "CONNECT_LIST_DOMAINS", number).ids == ()
        for bad in ("\udcff", "<", "<a/>", "x" * 4000000):
            for xml in (bad, None):
                code, _ = daemon_scene.code_of(
                    client.call, REMOTE, "DOMAIN_BACKUP_BEGIN", dom, bad, xml, 0
                )
                assert code in (libvirt.VIR_ERR_XML_ERROR, libvirt.VIR_ERR_RPC)


# --- tls and tcp ---


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("pki") / "ca"
    certificates.authority(made)
    certificates.server(made)
    certificates.client(made)
    return made


def client_context(pki: pathlib.Path, certificate: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))
    if certificate:
        context.load_cert_chain(pki / "client-cert.pem", pki / "client-key.pem")
    return context


@pytest.fixture
def by_tls(tmp_path: pathlib.Path, pki: pathlib.Path) -> Iterator[daemon_scene.Served]:
    settings = {"tls_x509_cert_dir": str(pki)}
    limits = {"handshake_timeout": 1.0, "max_handshaking": 3, "max_unread": 1 << 18}
    with daemon_scene.serving(
        tmp_path, daemon_scene.Driver(A),
        listen=["tls:127.0.0.1:0", "tcp:localhost:0"], settings=settings, limits=limits,
    ) as served:  # fmt: skip
        yield served


def test_tls_tcp_and_unix(by_tls: daemon_scene.Served, pki: pathlib.Path) -> None:
    with daemon_scene.Raw.tcp(by_tls.port("tls"), client_context(pki)) as client:
        assert client.open().names() == ["a"]
    with daemon_scene.Raw.tcp(by_tls.port("tcp")) as client:
        assert client.open().names() == ["a"]
    with by_tls.connect() as client:
        assert client.names() == ["a"]


def test_who_has_no_certificate(by_tls: daemon_scene.Served, pki: pathlib.Path) -> None:
    with pytest.raises((AssertionError, OSError)):
        daemon_scene.Raw.tcp(by_tls.port("tls"), client_context(pki, certificate=False))
    daemon_scene.wait_for(lambda: not by_tls.daemon.server.clients)


def test_plain_bytes_where_tls_is_spoken(by_tls: daemon_scene.Served) -> None:
    with daemon_scene.Raw.tcp(by_tls.port("tls")) as client:
        client.send(client.message(REMOTE, "AUTH_LIST").encode())
        assert client.is_dropped()


def test_slow_handshakes_are_nobody_else_s_trouble(
    by_tls: daemon_scene.Served, pki: pathlib.Path
) -> None:
    slow = [daemon_scene.Raw.tcp(by_tls.port("tls")) for _ in range(10)]
    daemon_scene.wait_for(lambda: len(by_tls.daemon.server.clients) == 3)
    with by_tls.connect() as client:
        assert client.names() == ["a"]
    slow[0].send(b"\x16\x03\x01")
    # Those that hang are let go in time, so that who means it has a turn.
    for one in slow[3:]:
        one.close()
    with daemon_scene.Raw.tcp(by_tls.port("tls"), client_context(pki)) as client:
        assert client.open().names() == ["a"]
    for one in slow:
        one.close()


def test_who_shakes_no_hands_keeps_nobody_out(tmp_path: pathlib.Path, pki: pathlib.Path) -> None:
    """Where more of them wait than there is room for, they are given less time."""
    settings = {"tls_x509_cert_dir": str(pki)}
    limits = {"max_handshaking": 3, "crowded_timeout": 0.1, "keepalive_interval": 0.05}
    serving = daemon_scene.serving(
        tmp_path, daemon_scene.Driver(A), listen=["tls:127.0.0.1:0"], settings=settings,
        limits=limits,
    )  # fmt: skip
    with serving as served:
        silent = [daemon_scene.Raw.tcp(served.port("tls")) for _ in range(7)]
        begin = time.monotonic()
        with daemon_scene.Raw.tcp(served.port("tls"), client_context(pki)) as client:
            assert client.open().names() == ["a"]
        assert time.monotonic() - begin < served.daemon.server.limits.handshake_timeout
        for one in silent:
            one.close()


def test_a_reset_with_much_unread(by_tls: daemon_scene.Served, pki: pathlib.Path) -> None:
    """What is left to be sent is of no use when the client is gone."""
    for _ in range(3):
        client = daemon_scene.Raw.tcp(by_tls.port("tls"), client_context(pki)).open()
        dom = client.lookup("a")
        call = client.message(REMOTE, "DOMAIN_GET_XML_DESC", dom, 0).encode()
        client.socket.settimeout(0.5)
        with pytest.raises((TimeoutError, OSError)):
            client.send(call * 200000)
        linger = socket.SOL_SOCKET, socket.SO_LINGER
        client.socket.setsockopt(*linger, bytes.fromhex("0100000000000000"))
        client.close()
        daemon_scene.wait_for(lambda: not by_tls.daemon.server.clients)
    with by_tls.connect() as other:
        assert other.names() == ["a"]


# --- where it listens ---


@pytest.mark.parametrize(
    "address",
    ["tcp:0.0.0.0:0", "tcp::0", "tcp:[::]:0", "tcp:127.evil.example:0", "tcp:192.0.2.1:0"],
)
def test_tcp_beyond_loopback(tmp_path: pathlib.Path, address: str) -> None:
    serving = daemon_scene.serving(tmp_path, daemon_scene.Driver(), listen=[address])
    with pytest.raises(libvirt.libvirtError, match="tcp is for loopback only"), serving:
        pass


def test_a_name_that_is_not_what_it_says(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def lie(host: str | None, *args: object, **more: object) -> object:
        return real("0.0.0.0" if host == "localhost" else host, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", lie)
    serving = daemon_scene.serving(tmp_path, daemon_scene.Driver(), listen=["tcp:localhost:0"])
    refused = pytest.raises(
        libvirt.libvirtError, match=r"'tcp:0\.0\.0\.0:\d+': tcp is for loopback"
    )
    with refused, serving:
        pass


def test_a_socket_that_somebody_serves(tmp_path: pathlib.Path) -> None:
    with daemon_scene.serving(tmp_path, daemon_scene.Driver(A)) as served:
        refused = pytest.raises(libvirt.libvirtError, match="somebody listens there already")
        with refused, daemon_scene.serving(tmp_path, daemon_scene.Driver(B)):
            pass
        assert served.path.is_socket()
        with served.connect() as client:
            assert client.names() == ["a"]


def test_a_socket_that_is_left_over(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "daemon.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with (
        daemon_scene.serving(tmp_path, daemon_scene.Driver(A)) as served,
        served.connect() as client,
    ):
        assert client.names() == ["a"]
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def _listen(
    path: str,
    together: threading.Barrier,
    made: list[socket.socket],
    failures: list[int | None],
) -> None:
    together.wait()
    try:
        made.append(transport.listen(transport.Address("unix", path=path)))
    except OSError as failure:
        failures.append(failure.errno)


def test_many_who_want_one_socket(tmp_path: pathlib.Path) -> None:
    """One has it, the one that is left over there included; and it is served."""
    for _ in range(20):
        path = tmp_path / "x.sock"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        made: list[socket.socket] = []
        failures: list[int | None] = []
        listen = functools.partial(_listen, str(path), threading.Barrier(4), made, failures)
        threads = [threading.Thread(target=listen) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(daemon_scene.DEADLINE)
        assert (len(made), failures) == (1, [errno.EADDRINUSE] * 3)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        made[0].close()
        path.unlink()


def test_a_file_in_the_way(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "daemon.sock"
    path.write_text("precious")
    serving = daemon_scene.serving(tmp_path, daemon_scene.Driver(A))
    with pytest.raises(libvirt.libvirtError, match="': what is there is no socket"), serving:
        pass
    assert path.read_text() == "precious"


def test_another_s_socket_is_not_removed(tmp_path: pathlib.Path) -> None:
    with daemon_scene.serving(tmp_path, daemon_scene.Driver(A)) as served:
        served.path.unlink()
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(served.path))
    assert served.path.exists()
    other.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="to give a socket to a group takes root")
def test_a_group_that_may_connect(tmp_path: pathlib.Path) -> None:
    settings = {"unix_sock_group": "nogroup", "unix_sock_mode": "0660"}
    with daemon_scene.serving(tmp_path, daemon_scene.Driver(A), settings=settings) as served:
        found = served.path.stat()
        assert found.st_mode & 0o777 == 0o660
        assert found.st_gid == 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="to give a socket to a group takes root")
def test_a_link_in_the_place_of_the_socket(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write to the directory does not have us change what is elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    before = victim.stat()
    settings = {"unix_sock_group": "nogroup", "unix_sock_mode": "0666"}
    binds, listens = socket.socket.bind, transport.listen

    def swap(path: str) -> None:
        pathlib.Path(path).unlink()
        pathlib.Path(path).symlink_to(victim)

    def bind(self: socket.socket, path: str) -> None:
        binds(self, path)
        swap(path)

    def listen(address: transport.Address, mode: int) -> socket.socket:
        made = listens(address, mode)
        swap(address.path)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "bind", bind)
        serving = daemon_scene.serving(tmp_path, daemon_scene.Driver(A), settings=settings)
        with pytest.raises(libvirt.libvirtError, match="somebody has replaced it"), serving:
            pass
    (tmp_path / "daemon.sock").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(transport, "listen", listen)
        with daemon_scene.serving(tmp_path, daemon_scene.Driver(A), settings=settings):
            pass
    after = victim.stat()
    assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)


# --- the program ---

PROGRAM = [sys.executable, "-m", "virtbackup.tools.virtbackupd"]


def run(*argv: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        [*PROGRAM, *argv], capture_output=True, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_check_config(tmp_path: pathlib.Path, pki: pathlib.Path) -> None:
    from virtbackup.tools import virtbackupd

    conf = tmp_path / "x.conf"
    good = f'uris = ["test:///default"]\ntls_x509_cert_dir = "{pki}"\n'

    def check(text: str, *argv: str) -> tuple[int, str]:
        conf.write_text(text)
        return run_main(virtbackupd.main, "--config", str(conf), "--check-config", *argv)

    assert check(good) == (0, "configuration is good\n")
    listen = f'listen = ["tls:127.0.0.1:0", "unix:{tmp_path}/x"]'
    assert check(good + listen) == (0, "configuration is good\n")
    bad = [
        ('access = ["unix:me"]', ":3: access: 'unix:me': expected WHO DOMAINS PERMISSIONS"),
        ('access = ["me * read"]', ":3: access: 'me': expected unix:USER, unix:@GROUP,"),
        ('access = ["* * write"]', ":3: access: there is no permission 'write': expected read"),
        ('listen = ["unix:x"]', ":3: listen: 'unix:x': the path of a unix socket is absolute"),
        ('listen = ["tcp:127.0.0.1:99999"]', ":3: listen: 'tcp:127.0.0.1:99999': '99999' is no p"),
        ('unix_sock_mode = "0999"', ":3: unix_sock_mode: '0999' is no mode"),
        ('unix_sock_mode = "rw"', ":3: unix_sock_mode: 'rw' is no mode"),
        ('unix_sock_mode = "7777"', ":3: unix_sock_mode: '7777' is no mode"),
        ('unix_sock_group = "nobodies"', ":3: unix_sock_group: there is no group 'nobodies'"),
        ("max_clients = 0", ":3: expected at least 1 for 'max_clients'"),
        ("max_workers = 0", ":3: expected at least 1 for 'max_workers'"),
        ("max_client_requests = 0", ":3: expected at least 1 for 'max_client_requests'"),
        ("keepalive_count = 0", ":3: expected at least 1 for 'keepalive_count'"),
        ("max_clients = -1", ":3: expected NAME = VALUE"),
        ("max_clents = 1", ":3: there is no setting 'max_clents'"),
        ('uris = ["foo:///x"]', ":3: uris: no connection driver available for foo:///x"),
        ('listen = ["unix:/x", "unix:/x"]', ":3: listen: 'unix:/x' is there twice"),
        (f'listen = ["unix:{tmp_path}/s", "unix:{tmp_path}/./s"]',
         f":3: listen: 'unix:{tmp_path}/./s' is 'unix:{tmp_path}/s' once more"),
        (f'listen = ["unix:{tmp_path}/link/s", "unix:{tmp_path}/s"]',
         f":3: listen: 'unix:{tmp_path}/s' is 'unix:{tmp_path}/link/s' once more"),
        ('uris = ["qmp://rel"]', ":3: uris: 'qmp://rel': expected qmp:///absolute/path"),
        ('uris = ["test://x/"]', ":3: uris: 'test://x/': expected test:///default"),
        ('uris = ["virtbackup+unix://x"]', ":3: uris: 'virtbackup+unix://x': a unix socket"),
        ('uris = ["qemu:///?engine=x"]', ":3: uris: 'qemu:///?engine=x': expected engine=c"),
        ('access = [\n"unix:root * read",\n"x"\n]', ":3: access: 'x': expected WHO DOMAINS PERMI"),
    ]  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path)
    for text, message in bad:
        status, said = check(good + text)
        assert (status, said[:6]) == (1, "error:"), text
        assert f"{conf}{message}" in said
        assert said.count("\n") == 1
    status, said = check(good + 'listen = ["tcp:0.0.0.0:1"]')
    assert (status, "'tcp:0.0.0.0:1': tcp is for loopback only" in said) == (1, True)
    status, said = check('uris = ["test:///default"]\nlisten = ["tls:127.0.0.1:0"]')
    assert (status, "set tls_x509_cert_dir" in said) == (1, True)
    status, said = check('uris = ["test:///default"]\ntls_x509_cert_dir = "/nowhere"\n'
                         'listen = ["tls:127.0.0.1:0"]')  # fmt: skip
    assert (status, "cannot read '/nowhere/ca-cert.pem': No such" in said) == (1, True)
    for path, reason in ((conf / "x", "Not a directory"), (conf, "what is there is no socket"),
                         (tmp_path / "no" / "x", "No such file or directory")):  # fmt: skip
        said = f"error: cannot listen on 'unix:{path}': {reason}\n"
        assert check(good + f'listen = ["unix:{path}"]') == (1, said)
    for kind in ("tcp", "tls"):
        status, said = check(good + f'listen = ["{kind}:[::1%nope]:0"]')
        told = f"error: cannot listen on '{kind}:[::1%nope]:0': "
        assert (status, said.startswith(told)) == (1, True), said
    with socket.socket(socket.AF_UNIX) as served:  # as the daemon itself, for which it is checked
        served.bind(str(tmp_path / "s"))
        assert check(good, "--listen", f"unix:{tmp_path / 's'}")[0] == 0
    assert check(good + 'listen = ["tcp:localhost:0", "tcp:localhost:0"]')[0] == 0
    # What the command line says is not the file's fault.
    status, said = check(good + 'listen = ["unix:x"]', "--listen", "bad")
    assert said == "error: invalid argument: listen: 'bad' is none of unix:PATH, tcp:HOST:PORT, " \
                   "tls:HOST:PORT\n"  # fmt: skip
    status, said = check(good + 'uris = ["foo:///x"]', "--uri", "bar:///")
    assert said == "error: no connection driver available for bar:///\n"
    status, said = check("")
    assert "nothing to serve: give --uri, or set uris" in said


@pytest.mark.parametrize("named", [True, False])
def test_the_default_s_directory_is_made(
    tmp_path: pathlib.Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is named, as the documentation does: /run is empty when a host comes up."""
    from virtbackup.tools import virtbackupd

    default = f"unix:{tmp_path}/run/sock"
    monkeypatch.setattr(virtbackupd, "DEFAULT_LISTEN", default)
    argv = ["--uri", "test:///default", *(["--listen", default] if named else [])]
    status, said = run_main(virtbackupd.main, *argv, "--check-config")
    assert (status, said) == (0, "configuration is good\n")
    monkeypatch.setattr(virtbackupd, "_allow_descriptors", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(daemon.Daemon, "run", lambda served, **_: served.close())
    umask = os.umask(0o077)
    try:
        status, said = run_main(virtbackupd.main, *argv)
    finally:
        os.umask(umask)
    assert (status, said) == (0, f"virtbackupd: listening on {default}\n")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755
    (tmp_path / "run" / "sock").touch()
    status, said = run_main(virtbackupd.main, *argv, "--check-config")
    assert (status, "what is there is no socket" in said) == (int(named), named)


def test_a_place_where_only_others_may_make_a_socket() -> None:
    """By --check-config as by a start."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        for call in (daemon.check_place, _listen_at):
            with pytest.raises(errors.Error, match="on 'unix:/no-such': Permission denied"):
                call(transport.parse_address("unix:/no-such"))
    finally:
        os.seteuid(was)


def _listen_at(address: transport.Address) -> None:
    daemon.Daemon([], virtbackup_conf.Settings()).listen(address)


def run_main(main: Callable[[list[str]], int], *argv: str) -> tuple[int, str]:
    """Exit status, and all that is said."""
    import contextlib
    import io

    out = io.StringIO()
    before = os.environ.get("VIRTBACKUP_CONF")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = main(list(argv))
    finally:
        if before is not None:
            os.environ["VIRTBACKUP_CONF"] = before
    return status, out.getvalue()


def test_certificates_that_are_no_good(tmp_path: pathlib.Path, pki: pathlib.Path) -> None:
    made = tmp_path / "pki"
    made.mkdir()
    for name in ("ca-cert.pem", "server-cert.pem"):
        (made / name).write_bytes((pki / name).read_bytes())
    locked = ["openssl", "pkey", "-in", str(pki / "server-key.pem"), "-aes128", "-passout",
              "pass:x", "-out", str(made / "server-key.pem")]  # fmt: skip
    subprocess.run(locked, check=True, capture_output=True)
    conf = tmp_path / "x.conf"
    conf.write_text(f'tls_x509_cert_dir = "{made}"')
    argv = ["--config", str(conf), "--uri", "test:///default", "--listen", "tls:127.0.0.1:0"]
    for more in ([], ["--check-config"]):
        status, _, said = run(*argv, *more)  # and nobody is asked for a password
        assert status == 1
        assert f"cannot use the certificates in '{made}'" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("old", ["ca", "server"])
def test_certificates_that_have_expired(
    old: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    from virtbackup.tools import virtbackupd

    pki = tmp_path / "pki"
    certificates.authority(pki, 0 if old == "ca" else 2)
    certificates.server(pki, 0 if old == "server" else 2)
    conf = tmp_path / "x.conf"
    conf.write_text(f'tls_x509_cert_dir = "{pki}"\nuris = ["test:///default"]\n')
    said = f"nobody comes in by TLS with '{pki}/{old}-cert.pem': certificate has expired"
    argv = ["--config", str(conf), "--listen", "tls:127.0.0.1:0"]
    status, told = run_main(virtbackupd.main, *argv, "--check-config")
    assert (status, told) == (1, f"error: unsupported configuration: {said}\n")
    # Who comes by another way is served all the same.
    settings = {"tls_x509_cert_dir": str(pki)}
    listen = ["tls:127.0.0.1:0", "tcp:localhost:0"]
    with daemon_scene.serving(tmp_path, daemon_scene.Driver(A), listen=listen, settings=settings):
        assert [record.message for record in caplog.records] == [said]


def test_the_program_and_its_signals(tmp_path: pathlib.Path) -> None:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(daemon_scene.DEADLINE)
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    path = tmp_path / "x.sock"
    argv = ["--uri", "test:///default", "--listen", f"unix:{path}", "--listen", "tcp:127.0.0.1:0"]
    with daemon_scene.Program(tmp_path, *argv, env=env) as program:
        assert notify.recv(100) == b"READY=1"
        assert program.places[0] == f"unix:{path}"
        port = int(program.places[1].rpartition(":")[2])
        assert port > 0
        with daemon_scene.Raw.tcp(port) as client, daemon_scene.Raw.unix(path) as other:
            assert client.open().names() == other.open("test:///default").names()
            # A socket that is served is refused, and stays as it is.
            status, _, said = run("--uri", "test:///default", "--listen", f"unix:{path}")
            assert status == 1
            assert said == (
                f"error: cannot listen on 'unix:{path}': somebody listens there already\n"
            )
            assert other.is_served()
        assert program.end() == 0
        assert notify.recv(100) == b"STOPPING=1"
        assert not path.exists()
        assert "Traceback" not in program.log.read_text()
    # One that was killed leaves its socket, which the next takes over.
    with daemon_scene.Program(tmp_path, *argv[:4]) as program:
        program.end(signal.SIGKILL)
        assert path.is_socket()
    with daemon_scene.Program(tmp_path, *argv[:4]) as program:
        with daemon_scene.Raw.unix(path) as client:
            assert client.open().names()
        assert program.end(signal.SIGINT) == 0
    notify.close()


@pytest.mark.parametrize("to", ["/dev/full", "a pipe that nobody reads"])
def test_nobody_hears_where_it_listens(tmp_path: pathlib.Path, to: str) -> None:
    path, log = tmp_path / "x.sock", tmp_path / "log"
    reads, pipe = os.pipe()
    os.close(reads)
    with (
        open(pipe, "wb") as broken,  # noqa: PTH123
        pathlib.Path("/dev/full").open("wb") as full,
        log.open("wb") as said,
        subprocess.Popen(
            [*PROGRAM, "--uri", "test:///default", "--listen", f"unix:{path}"],
            stdout=full if to == "/dev/full" else broken, stderr=said, stdin=subprocess.DEVNULL,
        ) as process,
    ):  # fmt: skip
        try:
            waiting.until(lambda: _listens(path), process=process)
            with daemon_scene.Raw.unix(path) as client:
                assert client.open().names() == ["vm"]
        finally:
            process.terminate()
        assert process.wait(daemon_scene.DEADLINE) == 0
    assert not path.exists()
    assert f"cannot print: virtbackupd: listening on unix:{path}" in log.read_text()
    assert "Traceback" not in log.read_text()


def _listens(path: pathlib.Path) -> bool:
    """Whether it takes clients: its socket is seen a moment earlier."""
    try:
        daemon_scene.Raw.unix(path).close()
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def test_signals_until_it_has_ended(tmp_path: pathlib.Path) -> None:
    """None is written into what is closed, or is another's by then."""
    with daemon_scene.Program(tmp_path, "--uri", "test:///default") as program:
        while program.process.poll() is None:
            program.process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        assert "Traceback" not in program.log.read_text()


def test_whose_terminal_is_closed(tmp_path: pathlib.Path) -> None:
    argv = ["--uri", "test:///default"]
    with daemon_scene.Program(tmp_path, *argv) as program:
        assert program.end(signal.SIGHUP) == 0
        assert not program.path.exists()
    command = ["nohup", sys.executable, "-m", "virtbackup.tools.virtbackupd", "--listen",
               f"unix:{program.path}"]  # fmt: skip
    with daemon_scene.Program(tmp_path, *argv, command=command) as program:
        program.process.send_signal(signal.SIGHUP)
        with program.connect() as client:
            assert client.is_served()
        assert program.end() == 0


_SIGNALLED_ELSEWHERE = """
import pathlib, signal, sys, threading, time
from virtbackup.tools import virtbackupd
def tell():
    while not pathlib.Path(sys.argv[-1].removeprefix("unix:")).is_socket():
        time.sleep(0.01)
    time.sleep(0.5)  # then it waits for clients
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Timer(0, tell).start()
sys.exit(virtbackupd.main())
"""


def test_a_signal_that_does_not_break_the_wait_ends_it(tmp_path: pathlib.Path) -> None:
    """One that another thread gets; one that comes just before the wait is as one that does."""
    path = tmp_path / "x.sock"
    argv = ["--uri", "test:///default", "--listen", f"unix:{path}"]
    command = [sys.executable, "-c", _SIGNALLED_ELSEWHERE, *argv]
    with daemon_scene.Program(tmp_path, command=command) as program:
        assert program.wait() == 0
    assert not path.exists()


def test_what_clients_say_is_one_line_of_the_log(tmp_path: pathlib.Path) -> None:
    """Of no more than so many characters, none of which controls a terminal."""
    with daemon_scene.Program(tmp_path, "--uri", "test:///default") as program:
        with program.connect() as client:
            for name in ("x\nERROR root: forged", "\x1b[2J\u202e\udcff", "y" * 4_000_000):
                daemon_scene.code_of(client.lookup, name)
        assert program.end() == 0
    log = program.log.read_text()
    assert not re.search("^ERROR", log, re.MULTILINE)
    assert r"matching name 'x\nERROR root: forged'" in log
    assert r"matching name '\x1b[2J\u202e\udcff'" in log
    assert max(map(len, log.splitlines())) < 5000


ACTIVATED = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "virtbackup.tools.virtbackupd", *sys.argv[1:]])
"""


def activated(*argv: str) -> list[str]:
    """A command that becomes the program, with sockets from descriptor 3 on."""
    return [sys.executable, "-c", ACTIVATED, *argv]


def test_sockets_that_are_handed_over(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "handed.sock"
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(path))
    unix.listen()
    tcp = socket.create_server(("127.0.0.1", 0))
    moved = os.dup2(unix.fileno(), 300), os.dup2(tcp.fileno(), 301)
    script = "import os\nos.dup2(300, 3)\nos.dup2(301, 4)\n" + ACTIVATED
    command = [sys.executable, "-c", script, "-v", "--uri", "test:///default"]
    env = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    with daemon_scene.Program(
        tmp_path, command=command, env=env, pass_fds=[3, 4, *moved]
    ) as program:
        assert program.places == [f"unix:{path}", f"tcp:127.0.0.1:{tcp.getsockname()[1]}"]
        with (
            daemon_scene.Raw.unix(path) as client,
            daemon_scene.Raw.tcp(tcp.getsockname()[1]) as other,
        ):
            assert client.open().names() == other.open().names()
        assert program.end() == 0
    assert path.is_socket(), "which is not ours"
    for fd in moved:
        os.close(fd)
    unix.close()
    tcp.close()


def test_what_is_handed_over_is_served_beside_what_is_set(tmp_path: pathlib.Path) -> None:
    """Nobody waits at a socket of systemd's for nothing; whose mode is not ours to set."""
    path = tmp_path / "handed.sock"
    conf = tmp_path / "x.conf"
    conf.write_text(f'listen = ["unix:{tmp_path}/set.sock"]\nunix_sock_mode = "0666"\n')
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        path.chmod(0o600)
        unix.listen()
        moved = os.dup2(unix.fileno(), 300)
        script = "import os\nos.dup2(300, 3)\n" + ACTIVATED
        command = [sys.executable, "-c", script, "--uri", "test:///default", "--config", str(conf)]
        with daemon_scene.Program(
            tmp_path, command=command, env={"LISTEN_FDS": "1"}, pass_fds=[3, moved]
        ) as program:
            assert program.places == [f"unix:{path}", f"unix:{tmp_path}/set.sock"]
            for one in (path, tmp_path / "set.sock"):
                with daemon_scene.Raw.unix(one) as client:
                    assert client.open().names()
            assert path.stat().st_mode & 0o777 == 0o600
            assert (tmp_path / "set.sock").stat().st_mode & 0o777 == 0o666
            assert program.end() == 0
        os.close(moved)
    assert program.log.read_text() == (
        f"WARNING virtbackup.remote.daemon: unix:{path} was handed over, and unix_sock_mode"
        f" ({conf}:2) is not for it: set SocketMode= of its unit\n"
        f"WARNING virtbackupd: unix:{tmp_path}/set.sock: every user of this host may use it, unless"
        " access is set\n"
    )


def test_sockets_that_are_for_everybody(tmp_path: pathlib.Path) -> None:
    """Where no rule says who may do what, they are warned of."""
    from virtbackup.tools import virtbackupd

    for mode, expected in ((0o660, False), (0o662, True), (0o666, True)):
        address = transport.Address("unix", path=f"{tmp_path}/{mode}")
        with transport.listen(address, mode):
            assert virtbackupd._is_for_everybody(str(address)) == expected
    assert virtbackupd._is_for_everybody("tcp:127.0.0.1:1")
    assert not virtbackupd._is_for_everybody("tls:127.0.0.1:1")
    conf = tmp_path / "x.conf"
    conf.write_text('access = ["tcp * read"]\n')
    argv = ["--uri", "test:///default", "--config", str(conf), "--listen", "tcp:127.0.0.1:0"]
    with daemon_scene.Program(tmp_path, *argv) as program:
        assert program.end() == 0
    assert "every user of this host" not in program.log.read_text()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LISTEN_FDS": "many"}, "LISTEN_FDS: 'many' is no number"),
        ({"LISTEN_FDS": "1"}, "descriptor 3 that was handed over is no listening stream socket"),
    ],
)
def test_what_is_handed_over_is_no_good(env: dict[str, str], message: str) -> None:
    command = activated("--uri", "test:///default")
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, **env}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_usage(tmp_path: pathlib.Path) -> None:
    assert run("--bad")[0] == 2
    status, _, said = run("--uri", "foo:///x", "--listen", f"unix:{tmp_path}/x")
    assert (status, said) == (1, "error: no connection driver available for foo:///x\n")
    status, _, said = run("--uri", "test:///default", "--listen", f"unix:{tmp_path}/none/x")
    assert status == 1
    assert said == (
        f"error: cannot listen on 'unix:{tmp_path}/none/x': No such file or directory\n"
    )
