# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server: what it answers to anything that comes, and that no client disturbs another."""

import array
import contextlib
import dataclasses
import functools
import gc
import os
import pathlib
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator

import libvirt
import pytest

from tests import daemon_scene, waiting
from virtbackup import hypervisor
from virtbackup.remote import program, protocol, rpc, rpc_error, server, transport, workers

REMOTE, VIRTBACKUP, QEMU = protocol.REMOTE, protocol.VIRTBACKUP, protocol.QEMU
VM = daemon_scene.ref("vm", 7)


@pytest.fixture
def driver() -> daemon_scene.Driver:
    return daemon_scene.Driver(VM)


@pytest.fixture
def served(tmp_path: pathlib.Path, driver: daemon_scene.Driver) -> Iterator[daemon_scene.Served]:
    with daemon_scene.serving(tmp_path, driver) as one:
        yield one


def words(*some: int) -> bytes:
    return struct.pack(f">{len(some)}I", *some)


def raw(
    prog: int, vers: int, proc: int, type: int = 0, serial: int = 5, status: int = 0,
    payload: bytes = b"",
) -> bytes:  # fmt: skip
    """A message."""
    head = struct.pack(">IIiiIi", prog, vers, proc, type, serial, status)
    return words(28 + len(payload)) + head + payload


# --- framing: libvirtd's answers ---


def text(value: str) -> bytes:
    data = value.encode()
    return words(len(data)) + data + b"\0" * (-len(data) % 4)


def error_of(call: bytes, message: str, code: int = 39, domain: int = 7) -> bytes:
    """libvirtd's reply to a CALL that it refuses."""
    payload = words(code, domain, 1) + text(message)
    payload += words(2, 0, 1) + text("%s") + words(1) + text(message)
    payload += words(0, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return words(28 + len(payload)) + call[4:16] + words(1) + call[20:24] + words(1) + payload


UNKNOWN = bytes.fromhex(
    "00000088 20008086 00000001 0000270f 00000001 00000006 00000001 00000027 00000007 00000001"
    "00000017 756e6b6e6f776e2070726f6365647572653a203939393900 00000002 00000000 00000001"
    "00000002 25730000 00000001 00000017 756e6b6e6f776e2070726f6365647572653a203939393900"
    "00000000 ffffffff ffffffff 00000000"
)
"""What a real libvirtd has said to procedure 9999."""

REMOTE_, QEMU_ = 0x20008086, 0x20008087
REFUSED = [
    (raw(REMOTE_, 1, 9999), "unknown procedure: 9999"),
    (raw(REMOTE_, 1, 0), "unknown procedure: 0"),
    (raw(REMOTE_, 1, -1), "unknown procedure: -1"),
    (raw(REMOTE_, 1, 318), "unknown procedure: 318"),
    (raw(REMOTE_, 1, 454), "unknown procedure: 454"),
    (raw(QEMU_, 1, 8), "unknown procedure: 8"),
    (raw(0x20008088, 1, 1), "Cannot find program 536903816 version 1"),
    (raw(0xF0008088, 1, 1), "Cannot find program -268402552 version 1"),
    (raw(REMOTE_, 2, 1), "Cannot find program 536903814 version 2"),
    (raw(REMOTE_, 1, 23, payload=words(9)), "Unable to decode message payload"),
    (raw(REMOTE_, 1, 23, payload=words(4194305) + b"x"), "Unable to decode message payload"),
    (raw(REMOTE_, 1, 22), "Unable to decode message payload"),
    (raw(REMOTE_, 1, 23, status=1, payload=text("vm")), "Unexpected message status 1"),
    (raw(REMOTE_, 1, 23, status=7, payload=text("vm")), "Unexpected message status 7"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_is_refused(served: daemon_scene.Served, call: bytes, message: str) -> None:
    with served.connect() as client:
        client.send(call)
        assert client.socket.recv(4096) == error_of(call, message)
        assert client.is_served()


def test_golden_replies(served: daemon_scene.Served) -> None:
    with served.connect() as client:
        client.send(raw(REMOTE_, 1, 9999, serial=6))
        assert client.socket.recv(4096) == UNKNOWN
        client.send(raw(REMOTE_, 1, 23, payload=text("vm")))
        found = words(0x34) + words(REMOTE_, 1, 23, 1, 5, 0) + text("vm")
        found += bytes.fromhex(VM.uuid.replace("-", "")) + words(7)
        assert client.socket.recv(4096) == words(len(found)) + found[4:]


IGNORED = [
    raw(REMOTE_, 1, 23, type=1),
    raw(REMOTE_, 1, 23, type=2),
    raw(REMOTE_, 1, 23, type=3),
    raw(REMOTE_, 1, 23, type=6),
    raw(REMOTE_, 1, 23, type=99),
    raw(0x6B656570, 1, 2, type=2),
    raw(0x6B656570, 1, 77, type=2),
]


@pytest.mark.parametrize("message", IGNORED)
def test_what_is_ignored(served: daemon_scene.Served, message: bytes) -> None:
    with served.connect() as client:
        client.send(message)
        assert client.is_served()


def test_bytes_behind_the_arguments(served: daemon_scene.Served) -> None:
    with served.connect() as client:
        client.send(raw(REMOTE_, 1, 23, payload=text("vm") + b"garbage!"))
        assert client.reply(5).status == 0


@pytest.mark.parametrize("length", [0, 3, 4, 27, 33554437, 0xFFFFFFFF])
def test_a_length_that_cannot_be(served: daemon_scene.Served, length: int) -> None:
    with served.raw() as bad, served.connect() as other:
        bad.send(words(length) + b"\0" * 24)
        assert bad.is_dropped()
        assert other.is_served()


def test_the_largest_message(served: daemon_scene.Served) -> None:
    call = raw(REMOTE_, 1, 66, payload=b"\0" * (33554436 - 28))
    with served.raw() as client:
        threading.Thread(target=client.send, args=(call,)).start()
        assert client.reply(5).status == 0


def test_a_ping_is_answered_before_anything_else(served: daemon_scene.Served) -> None:
    with served.raw() as client:
        client.send(daemon_scene.PING.encode())
        assert client.socket.recv(64) == raw(0x6B656570, 1, 2, type=2, serial=0)


def test_a_call_of_keepalive_is_no_ping(served: daemon_scene.Served) -> None:
    call = raw(0x6B656570, 1, 1)
    with served.raw() as client:
        client.send(call)
        assert client.socket.recv(4096) == error_of(
            call, "Cannot find program 1801807216 version 1"
        )


def test_same_serial_twice_and_replies_out_of_order(
    served: daemon_scene.Served, driver: daemon_scene.Driver
) -> None:
    with served.connect() as client:
        client.send(raw(REMOTE_, 1, 66) * 2)
        assert [client.reply(5).proc for _ in range(2)] == [REMOTE["AUTH_LIST"]] * 2
        held = driver.hold("domain_get_state")
        slow = client.post(REMOTE, "DOMAIN_GET_STATE", daemon_scene.domain("vm"), 0)
        driver.wait_entered("domain_get_state")
        fast = client.post(REMOTE, "AUTH_LIST")
        assert client.reply().serial == fast
        held.set()
        assert client.reply().serial == slow


# --- descriptors ---


def send_fds(client: daemon_scene.Raw, data: bytes, count: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        fds = array.array("i", [null] * count)
        client.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    finally:
        os.close(null)


def fds_of_this_process() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@contextlib.contextmanager
def lingering() -> Iterator[int]:
    """A descriptor that nobody closes for the last time before a minute is over, or this is."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            one.send(bytes(1 << 20))
    one.setblocking(True)
    fd = one.detach()
    try:
        yield fd
    finally:
        other.close()  # with much unread, which is a reset


@pytest.fixture
def by_older_kernel(
    tmp_path: pathlib.Path, driver: daemon_scene.Driver, monkeypatch: pytest.MonkeyPatch
) -> Iterator[daemon_scene.Served]:
    """A server whose kernel cannot refuse descriptors for it."""
    monkeypatch.setattr(transport, "SO_PASSRIGHTS", 9999)
    with daemon_scene.serving(tmp_path, driver) as one:
        yield one


def test_descriptors_are_refused(served: daemon_scene.Served) -> None:
    with served.connect() as client:
        try:
            send_fds(client, raw(REMOTE_, 1, 66), 1)
        except PermissionError:
            assert client.is_served()
        else:  # before Linux 6.16
            assert client.is_dropped()


@pytest.mark.parametrize("count", [1, 32, 33])
@pytest.mark.parametrize("call", [raw(REMOTE_, 1, 66), raw(REMOTE_, 1, 66, type=4), words(100)])
def test_who_passes_descriptors_is_let_go(
    by_older_kernel: daemon_scene.Served, count: int, call: bytes
) -> None:
    """Every one is closed, whatever it came with."""
    before = fds_of_this_process()
    with by_older_kernel.raw() as bad, by_older_kernel.connect() as other:
        send_fds(bad, call, count)
        assert bad.is_dropped()
        assert other.is_served()
    daemon_scene.wait_for(lambda: fds_of_this_process() == before)


@pytest.mark.parametrize("before", [raw(REMOTE_, 1, 66), bytes(28)], ids=["read", "left unread"])
def test_a_descriptor_that_takes_long_to_close(
    tmp_path: pathlib.Path,
    driver: daemon_scene.Driver,
    monkeypatch: pytest.MonkeyPatch,
    before: bytes,
) -> None:
    """The server has the last of its kind, so it is the one who waits; and keeps nobody waiting."""
    monkeypatch.setattr(transport, "SO_PASSRIGHTS", 9999)
    monkeypatch.setattr(transport, "CHUNK", len(before))
    serving = daemon_scene.serving(tmp_path, driver, settings={"max_clients": 1})
    with serving as served, lingering() as fd:
        with served.connect():
            bad = served.raw()  # which is not accepted yet
            bad.send(before)
            socket.send_fds(bad.socket, [b"\0"], [fd])
            os.close(fd)
        assert bad.is_dropped()
        bad.close()
        with served.raw() as other:
            other.socket.settimeout(daemon_scene.DEADLINE)
            assert other.is_served()


# --- other clients ---


def test_half_a_message_for_ever(served: daemon_scene.Served) -> None:
    clients = [served.raw() for _ in range(8)]
    for client in clients:
        client.send(words(33554432) + b"\0" * 100000)
    with served.connect() as other:
        assert other.names() == ["vm"]
    for client in clients:
        client.close()


def held_by(served: daemon_scene.Served) -> int:
    """Bytes."""
    return sum(client._holds() for client in served.daemon.server.clients)


def holds(served: daemon_scene.Served, least: int) -> bool:
    return held_by(served) >= least


def test_all_together_hold_no_more_than_there_is(
    tmp_path: pathlib.Path, driver: daemon_scene.Driver
) -> None:
    limits = {"max_held": 16 << 20}
    with (
        daemon_scene.serving(tmp_path, driver, limits=limits) as served,
        served.connect() as modest,
    ):
        modest.send(words(33554432) + b"\0" * 1000)
        greedy = [served.raw() for _ in range(8)]
        dropped = 0
        for client in greedy:
            try:
                client.send(words(33554432) + b"\0" * (4 << 20))
                client.send(daemon_scene.PING.encode())
            except ConnectionError:
                dropped += 1
        with served.connect() as other:
            assert other.is_served()
        assert held_by(served) <= (16 << 20) + (8 << 20)
        assert len(served.daemon.server.clients) < 10
        for client in greedy:
            client.close()
        modest.send(b"\0" * 1000)


def test_who_holds_most_is_let_go(tmp_path: pathlib.Path, driver: daemon_scene.Driver) -> None:
    """Not who happens to come when it is too much, with less."""
    with (
        daemon_scene.serving(tmp_path, driver, limits={"max_held": 8 << 20}) as served,
        served.connect() as modest,
    ):
        greedy = [served.connect() for _ in range(4)]
        for number, client in enumerate(greedy, 1):
            client.send(words(33554432) + bytes(2000000))
            daemon_scene.wait_for(functools.partial(holds, served, 2000000 * number))
        modest.send(raw(REMOTE_, 1, 66, payload=bytes(1 << 20)))
        assert modest.reply(5).status == 0
        assert len(served.daemon.server.clients) == 4
        for client in greedy:
            client.close()


def test_who_reads_no_replies_is_not_worked_for(
    tmp_path: pathlib.Path, driver: daemon_scene.Driver
) -> None:
    """10,000 calls with replies of 1 KiB, of which none is read before all are sent."""
    limits = {"max_unread": 1 << 20}
    call = raw(REMOTE_, 1, 14, payload=text("vm") + uuid_of(VM) + words(7, 0))
    with (
        daemon_scene.serving(tmp_path, driver, limits=limits) as served,
        served.connect() as greedy,
    ):
        greedy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sender = threading.Thread(target=greedy.send, args=(call * 10000,))
        sender.start()
        with served.connect() as other:
            for _ in range(100):
                assert other.names() == ["vm"]
        [client] = [one for one in served.daemon.server.clients if one.number == 1]
        assert len(client._unsent) < (1 << 20) + 6 * 1024
        assert len(client._calls) <= 32 + transport_chunk_of(call)
        for _ in range(10000):
            assert greedy.reply(5).status == 0
        sender.join(daemon_scene.DEADLINE)


def uuid_of(ref: hypervisor.DomainRef) -> bytes:
    return bytes.fromhex(ref.uuid.replace("-", ""))


def transport_chunk_of(call: bytes) -> int:
    return (1 << 16) // len(call) + 1


def test_a_flood_of_small_calls(served: daemon_scene.Served) -> None:
    with served.connect() as flood, served.connect() as other:
        sender = threading.Thread(target=flood.send, args=(raw(REMOTE_, 1, 66) * 10000,))
        sender.start()
        for _ in range(20):
            assert other.is_served()
        for _ in range(10000):
            assert flood.reply(5).status == 0
        sender.join(daemon_scene.DEADLINE)


def test_who_reads_no_pongs_is_not_read_from(
    tmp_path: pathlib.Path, driver: daemon_scene.Driver
) -> None:
    with daemon_scene.serving(tmp_path, driver, limits={"max_unread": 1 << 16}) as served:
        flood, other = served.raw(), served.connect()
        flood.socket.settimeout(0.5)
        with pytest.raises((TimeoutError, ConnectionError)):
            flood.send(daemon_scene.PING.encode() * 100000)
        assert other.is_served()
        flood.close()
        other.close()


def test_who_reads_no_events_is_let_go(tmp_path: pathlib.Path, driver: daemon_scene.Driver) -> None:
    limits = {"max_unread": 1 << 16}
    with daemon_scene.serving(tmp_path, driver, limits=limits) as served:
        deaf, other = served.connect(), served.connect()
        for client in (deaf, other):
            client.call(REMOTE, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 0, None)
            assert client.names() == ["vm"]
        event = hypervisor.LifecycleEvent(VM, 2, 0)
        for _ in range(5000):
            driver.tell(event)
            other.event()
        daemon_scene.wait_for(lambda: len(served.daemon.server.clients) == 1)
        assert deaf.is_dropped()
        assert other.is_served()
        deaf.close()
        other.close()


def test_closed_in_the_middle_of_a_call(
    served: daemon_scene.Served, driver: daemon_scene.Driver
) -> None:
    held = driver.hold("domain_get_state")
    before = fds_of_this_process()
    clients = [served.connect() for _ in range(10)]
    for client in clients:
        client.post(REMOTE, "DOMAIN_GET_STATE", daemon_scene.domain("vm"), 0)
    driver.wait_entered("domain_get_state", 10)
    for client in clients:
        client.close()
    daemon_scene.wait_for(lambda: not served.daemon.server.clients)
    held.set()
    daemon_scene.wait_for(lambda: fds_of_this_process() == before)
    with served.connect() as other:
        assert other.is_served()


def test_what_the_dead_have_asked_for_is_not_done(
    served: daemon_scene.Served, driver: daemon_scene.Driver
) -> None:
    """A client sends 1,000 calls, and hangs up."""
    held = driver.hold("domain_get_state")
    with served.connect() as client:
        call = client.message(REMOTE, "DOMAIN_GET_STATE", daemon_scene.domain("vm"), 0).encode()
        client.send(call * 1000)
        driver.wait_entered("domain_get_state", 5)
    held.set()
    daemon_scene.wait_for(lambda: not served.daemon.server.clients)
    assert len([call for call in driver.calls if call[0] == "domain_get_state"]) < 50


def test_five_calls_of_a_client_at_once(
    served: daemon_scene.Served, driver: daemon_scene.Driver
) -> None:
    held = driver.hold("domain_get_state")
    with served.connect() as client:
        for _ in range(20):
            client.post(REMOTE, "DOMAIN_GET_STATE", daemon_scene.domain("vm"), 0)
        driver.wait_entered("domain_get_state", 5)
        client.send(daemon_scene.PING.encode())
        pong = client.receive()  # the loop goes on
        assert pong is not None
        assert pong.program == protocol.KEEPALIVE.number
        assert not driver.entered["domain_get_state"].acquire(timeout=0.05)
        held.set()
        for _ in range(20):
            assert client.reply().status == 0


def test_calls_that_are_worked_on_make_room(
    served: daemon_scene.Served, driver: daemon_scene.Driver
) -> None:
    """Of a client with 32 waiting it is read on as soon as one of them is worked on, and not only
    once one is done, which may take longer than it may be silent."""
    held = driver.hold("domain_get_state")
    with served.connect() as client:
        dom = daemon_scene.domain("vm")
        calls = [client.message(REMOTE, "DOMAIN_GET_STATE", dom, 0).encode() for _ in range(36)]
        client.send(b"".join(calls))
        driver.wait_entered("domain_get_state", 5)
        client.send(daemon_scene.PING.encode())
        pong = client.receive()
        assert pong is not None
        assert pong.program == protocol.KEEPALIVE.number
        held.set()
        for _ in calls:
            assert client.reply().status == 0


def test_slow_calls_of_many_starve_nobody(
    served: daemon_scene.Served, driver: daemon_scene.Driver
) -> None:
    """Ten clients have all workers at slow calls, and as many wait; another has its own."""
    held = driver.hold("domain_get_state")
    greedy = [served.connect() for _ in range(10)]
    for client in greedy:
        for _ in range(10):
            client.post(REMOTE, "DOMAIN_GET_STATE", daemon_scene.domain("vm"), 0)
    driver.wait_entered("domain_get_state", 20)
    with served.connect() as other:
        for _ in range(20):
            assert other.names() == ["vm"]
    held.set()
    for client in greedy:
        for _ in range(10):
            assert client.reply().status == 0
        client.close()


def test_one_more_client_than_may_be(tmp_path: pathlib.Path, driver: daemon_scene.Driver) -> None:
    with daemon_scene.serving(tmp_path, driver, settings={"max_clients": 4}) as served:
        clients = [served.connect() for _ in range(4)]
        late = [served.raw() for _ in range(3)]
        serials = [client.post(REMOTE, "AUTH_LIST") for client in late]
        assert all(client.is_served() for client in clients)
        assert len(served.daemon.server.clients) == 4
        for client in clients:
            client.close()
        for client, serial in zip(late, serials, strict=True):
            assert client.reply(serial).status == 0
            client.close()


def test_who_does_not_open_is_let_go(tmp_path: pathlib.Path, driver: daemon_scene.Driver) -> None:
    """Whatever else it says; and who has opened may be as silent as it likes."""
    settings = {"keepalive_interval": 0}
    serving = daemon_scene.serving(
        tmp_path, driver, settings=settings, limits={"keepalive_interval": 0.05}
    )
    with serving as served, served.connect() as open, served.connect() as closed:
        server = served.daemon.server  # none of those two was in a hurry
        server.limits = dataclasses.replace(server.limits, open_timeout=0.1)
        with served.raw() as silent, served.raw() as busy:
            closed.call(REMOTE, "CONNECT_CLOSE")
            busy.send(daemon_scene.PING.encode())
            for one in (silent, busy, closed):
                assert one.is_dropped()
        assert open.is_served()


def test_who_has_no_rights_keeps_nobody_out(
    tmp_path: pathlib.Path, driver: daemon_scene.Driver
) -> None:
    """All places are taken by clients that never open, and more wait."""
    settings = {"max_clients": 4}
    limits = {"crowded_timeout": 0.1, "keepalive_interval": 0.05}
    with daemon_scene.serving(tmp_path, driver, settings=settings, limits=limits) as served:
        idle = [served.raw() for _ in range(20)]
        with served.connect() as other:
            assert other.names() == ["vm"]
        for client in idle:
            client.close()


def _names(client: daemon_scene.Raw) -> list[str]:
    """None where there is no descriptor just then for a way to the guest: one of those who never
    open may have it, for a while."""
    try:
        return client.names()
    except libvirt.libvirtError as failure:
        assert "Too many open files" in str(failure)
        return []


def test_who_never_opens_keeps_nobody_out_for_want_of_descriptors(tmp_path: pathlib.Path) -> None:
    """A daemon that may have fewer than max_clients takes."""
    command = ["prlimit", "--nofile=33", sys.executable, "-m", "virtbackup.tools.virtbackupd"]
    argv = ["--uri", "test:///default", "--listen", f"unix:{tmp_path}/few.sock"]
    with daemon_scene.Program(tmp_path, *argv, name="few", command=command) as program:
        with program.connect() as first:
            idle = [program.raw() for _ in range(40)]
            waiting.until(lambda: "cannot be accepted" in program.log.read_text())
            with program.connect() as other:
                waiting.until(lambda: _names(other) == ["vm"])
            assert first.is_served()
        for client in idle:
            client.close()
        assert program.end() == 0


def test_threads_end_that_are_too_many() -> None:
    some = workers.Workers(2)
    go, running = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        running.release()
        assert go.wait(daemon_scene.DEADLINE)

    for _ in range(10):
        some.do(work, urgent=True)
    for _ in range(10):
        assert running.acquire(timeout=daemon_scene.DEADLINE)
    for _ in range(5):
        some.do(work)
    assert running.acquire(timeout=daemon_scene.DEADLINE)
    assert running.acquire(timeout=daemon_scene.DEADLINE)
    assert not running.acquire(timeout=0.05)  # as many as there may be are at ordinary work
    go.set()
    daemon_scene.wait_for(lambda: len(some._threads) <= 2)
    some.close(daemon_scene.DEADLINE)
    assert not some._threads


def test_work_that_raises_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    some = workers.Workers(1)
    done = threading.Event()
    some.do(lambda: 1 // 0)  # type: ignore[arg-type]
    some.do(done.set)
    assert done.wait(daemon_scene.DEADLINE)
    some.close(daemon_scene.DEADLINE)
    assert "a worker failed" in caplog.text


# --- a session that fails ---


class Failing:
    """A session that does as a test says."""

    opened = True

    def __init__(self, reply: Callable[[rpc.Message], rpc.Message | None]) -> None:
        self._reply = reply
        self.closed = threading.Event()

    def handle(self, call: rpc.Message) -> rpc.Message | None:
        return self._reply(call)

    def close(self) -> None:
        self.closed.set()


def test_a_failure_of_ours_is_one_client_s(tmp_path: pathlib.Path) -> None:
    def reply(call: rpc.Message) -> rpc.Message | None:
        if call.serial == 1:
            raise RuntimeError("ours")
        return rpc_error.reply(call, rpc_error.rpc_error("late"))

    sessions: list[Failing] = []

    def serve(client: server.Client) -> Failing:
        sessions.append(Failing(reply))
        return sessions[-1]

    path = tmp_path / "x.sock"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    one = server.Server(serve)
    one.listen(listening)
    thread = threading.Thread(target=one.run)
    thread.start()
    with daemon_scene.Raw.unix(path) as client:
        client.post(REMOTE, "AUTH_LIST")
        late = client.post(REMOTE, "AUTH_LIST")
        assert client.reply(late).status == program.MessageStatus.ERROR
    assert sessions[0].closed.wait(daemon_scene.DEADLINE)
    one.stop()
    thread.join(daemon_scene.DEADLINE)
    assert not thread.is_alive()


# --- keepalive ---


def test_who_answers_no_pings_is_let_go(
    tmp_path: pathlib.Path, driver: daemon_scene.Driver
) -> None:
    settings = {"keepalive_count": 2}
    limits = {"keepalive_interval": 0.05}
    serving = daemon_scene.serving(tmp_path, driver, settings=settings, limits=limits)
    with serving as served, served.raw() as quiet, served.raw() as silent:
        assert quiet.call(REMOTE, "CONNECT_SUPPORTS_FEATURE", 10).supported == 1
        pings = 0
        while (message := quiet.receive()) is not None:
            assert message == daemon_scene.PING
            pings += 1
        assert pings == 2
        silent.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            silent.receive()  # it has not asked, and is left alone
        silent.socket.settimeout(daemon_scene.DEADLINE)
        assert silent.is_served()


def test_who_answers_pings_stays(tmp_path: pathlib.Path, driver: daemon_scene.Driver) -> None:
    settings = {"keepalive_count": 4}
    limits = {"keepalive_interval": 0.1}
    serving = daemon_scene.serving(tmp_path, driver, settings=settings, limits=limits)
    with serving as served, served.raw() as client:
        client.call(REMOTE, "CONNECT_SUPPORTS_FEATURE", 10)
        for _ in range(5):
            assert client.receive() == daemon_scene.PING
            client.send(raw(0x6B656570, 1, 2, type=2, serial=0))
        assert client.is_served()


def test_no_pings_where_they_are_off(tmp_path: pathlib.Path, driver: daemon_scene.Driver) -> None:
    serving = daemon_scene.serving(tmp_path, driver, settings={"keepalive_interval": 0})
    with serving as served, served.connect() as client:
        assert client.call(REMOTE, "CONNECT_SUPPORTS_FEATURE", 10).supported == 1
        assert client.is_served()
        [one] = served.daemon.server.clients
        assert not one.has_deadline


# --- the end ---


def test_a_call_in_flight_has_its_reply(
    served: daemon_scene.Served, driver: daemon_scene.Driver
) -> None:
    held = driver.hold("domain_get_state")
    with served.connect() as client, served.connect() as idle:
        serial = client.post(REMOTE, "DOMAIN_GET_STATE", daemon_scene.domain("vm"), 0)
        driver.wait_entered("domain_get_state")
        served.daemon.stop()
        daemon_scene.wait_for(lambda: not served.daemon.server._listeners[0].accepts)
        idle.post(REMOTE, "AUTH_LIST")  # which nobody reads any more
        held.set()
        assert client.reply(serial).status == 0
        assert client.receive() is None
        assert idle.receive() is None
        served.thread.join(daemon_scene.DEADLINE)
    assert driver.closed
    assert not served.path.exists()


def test_stopped_twice_it_does_not_wait(
    served: daemon_scene.Served, driver: daemon_scene.Driver
) -> None:
    held = driver.hold("domain_get_state")
    with served.connect() as client:
        client.post(REMOTE, "DOMAIN_GET_STATE", daemon_scene.domain("vm"), 0)
        driver.wait_entered("domain_get_state")
        served.daemon.stop()
        served.daemon.stop()
        assert client.receive() is None
        served.thread.join(8.0)  # of the ten that it waits otherwise
        assert not served.thread.is_alive()
    held.set()


def test_stopped_while_nobody_is_accepted(
    tmp_path: pathlib.Path, driver: daemon_scene.Driver
) -> None:
    serving = daemon_scene.serving(tmp_path, driver, settings={"max_clients": 1})
    with serving as served, served.connect() as client:
        assert client.is_served()
        served.stop()


def test_no_descriptors_are_left(
    tmp_path: pathlib.Path, driver: daemon_scene.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that can accept nobody goes on when it can."""
    real = socket.socket.accept
    failures = [OSError(24, "Too many open files")] * 2

    def accept(self: socket.socket) -> object:
        if failures:
            raise failures.pop()
        return real(self)

    with daemon_scene.serving(tmp_path, driver) as served:
        monkeypatch.setattr(socket.socket, "accept", accept)
        with served.connect() as client:
            assert client.is_served()
        assert not failures


def test_codes_are_as_sent(served: daemon_scene.Served) -> None:
    with served.raw() as client:
        code, message = daemon_scene.code_of(client.lookup, "vm")
        assert (code, message) == (
            libvirt.VIR_ERR_INTERNAL_ERROR,
            "internal error: hypervisor connection not open",
        )
        client.open()
        code, message = daemon_scene.code_of(client.open)
        assert message == "internal error: connection already open"
        assert daemon_scene.code_of(client.lookup, "x")[0] == libvirt.VIR_ERR_NO_DOMAIN
        shown = "\udcff\udcfe\n"
        assert daemon_scene.code_of(client.lookup, shown)[1] == (
            f"Domain not found: no domain with matching name '{shown}'"
        )
    with served.raw() as client:
        for uri in ("foo:///x", "http://[", "\udcff"):
            code, message = daemon_scene.code_of(client.open, uri)
            assert code == libvirt.VIR_ERR_NO_CONNECT, message
        client.open("qemu+unix:///system")
