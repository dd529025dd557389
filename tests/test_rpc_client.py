# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's connection: who gets which reply, what ends it, and what is left then."""

import contextlib
import gc
import io
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import libvirt
import pytest
from hypothesis import strategies as st

from tests import daemon_scene, rpc_server
from virtbackup import errors
from virtbackup.remote import (
    client,
    keepalive,
    program,
    protocol,
    rpc,
    rpc_error,
    transport,
    xdr,
)
from virtbackup.remote import remote_structs as structs
from virtbackup.remote.program import MessageType
from virtbackup.remote.protocol import REMOTE, VIRTBACKUP

DEADLINE = rpc_server.DEADLINE
HOSTNAME = "CONNECT_GET_HOSTNAME"


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[rpc_server.Server]:
    with rpc_server.Server(rpc_server.unix(tmp_path)) as made:
        yield made


@pytest.fixture
def seen() -> list[rpc.Message]:
    return []


Connect = Callable[..., client.Client]


@pytest.fixture
def connect(
    server: rpc_server.Server, tmp_path: pathlib.Path, seen: list[rpc.Message]
) -> Iterator[Connect]:
    """Connects; nothing of it is left afterwards."""
    gc.collect()  # or what another test has left ends meanwhile
    before = leftovers()
    with contextlib.ExitStack() as stack:

        def connect(
            see: Callable[[rpc.Message], None] = seen.append,
            trace: client.Trace | None = None,
            interval: float = 60.0,
        ) -> client.Client:
            made = client.Client(
                transport.connect(rpc_server.unix(tmp_path)), "test", see, trace, interval
            )
            stack.callback(made.close)
            made.call(REMOTE, "CONNECT_OPEN", structs.ConnectOpenArgs("", 0))
            return made

        yield connect
    for peer in server.peers:
        assert peer.ended.wait(DEADLINE)
    if leftovers() != before:
        gc.collect()
    assert leftovers() == before


def leftovers() -> tuple[int, list[str]]:
    """(Open descriptors, threads of clients)."""
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("rpc ")]
    return len(list(pathlib.Path("/proc/self/fd").iterdir())), threads


def hostname(of: client.Client) -> str:
    return str(of.call(REMOTE, HOSTNAME).hostname)


def fails(what: Callable[[], object]) -> errors.Error:
    with pytest.raises(errors.Error) as caught:
        what()
    return caught.value


def told(failure: errors.Error) -> tuple[int, int, str]:
    return failure.get_error_code(), failure.get_error_domain(), str(failure)


CLOSED = (
    libvirt.VIR_ERR_INTERNAL_ERROR,
    libvirt.VIR_FROM_RPC,
    "internal error: client socket is closed",
)
END_OF_FILE = (
    libvirt.VIR_ERR_SYSTEM_ERROR,
    libvirt.VIR_FROM_RPC,
    "End of file while reading data: Input/output error",
)

# --- calls ---


def test_a_call(server: rpc_server.Server, connect: Connect) -> None:
    one = connect()
    assert hostname(one) == "here"
    assert [call.serial for call in server.peer().calls] == [0, 1]


def test_an_error_is_the_servers(server: rpc_server.Server, connect: Connect) -> None:
    sent = errors.error(libvirt.VIR_ERR_NO_DOMAIN, "no domain with matching name 'x'")

    def fail(*_: object) -> None:
        raise sent

    server.handlers[f"REMOTE.{HOSTNAME}"] = fail
    failure = fails(lambda: hostname(connect()))
    assert failure.err == sent.err


def test_an_unknown_procedure_is_not_supported(connect: Connect) -> None:
    failure = fails(lambda: connect().call(REMOTE, "NODE_GET_INFO"))
    assert told(failure) == (
        libvirt.VIR_ERR_NO_SUPPORT,
        libvirt.VIR_FROM_RPC,
        "unknown procedure: 6",
    )


def test_what_cannot_be_encoded_is_not_sent(server: rpc_server.Server, connect: Connect) -> None:
    one = connect()
    args = structs.DomainLookupByNameArgs("x" * (program.STRING_MAX + 1))
    failure = fails(lambda: one.call(REMOTE, "DOMAIN_LOOKUP_BY_NAME", args))
    assert told(failure)[:2] == (libvirt.VIR_ERR_RPC, libvirt.VIR_FROM_RPC)
    assert str(failure).startswith("Unable to encode message payload: DomainLookupByNameArgs.name")
    assert hostname(one) == "here"


def test_replies_out_of_order_to_many_threads(server: rpc_server.Server, connect: Connect) -> None:
    gate = rpc_server.Gate()
    server.handlers["REMOTE.DOMAIN_LOOKUP_BY_NAME"] = gate
    one = connect()
    answers: dict[str, str] = {}

    def ask(name: str) -> None:
        args = structs.DomainLookupByNameArgs(name)
        answers[name] = one.call(REMOTE, "DOMAIN_LOOKUP_BY_NAME", args).dom.name

    names = [f"vm{number}" for number in range(20)]
    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: len(gate.held) == len(names))
    assert hostname(one) == "here"  # while twenty calls wait
    for peer, message in reversed(gate.held):
        asked = rpc.args(message).name
        peer.send(rpc.reply(message, structs.DomainRet(rpc_server.domain(asked))))
    for thread in threads:
        thread.join(DEADLINE)
    assert answers == {name: name for name in names}


def test_many_threads_that_call_at_once(server: rpc_server.Server, connect: Connect) -> None:
    def find(peer: rpc_server.Peer, message: rpc.Message) -> structs.DomainArgs:
        return structs.DomainRet(rpc_server.domain(rpc.args(message).name))

    server.handlers["REMOTE.DOMAIN_LOOKUP_BY_NAME"] = find
    one = connect()
    wrong: list[str] = []

    def ask(number: int) -> None:
        for turn in range(50):
            name = f"{number} {turn} " + "x" * (turn * 997 % 20_000)
            args = structs.DomainLookupByNameArgs(name)
            if one.call(REMOTE, "DOMAIN_LOOKUP_BY_NAME", args).dom.name != name:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert not wrong


def test_a_call_that_is_given_up(server: rpc_server.Server, connect: Connect) -> None:
    """The reply that comes late is nobody's, and ends nothing."""
    gate = rpc_server.Gate()
    server.handlers["REMOTE.CONNECT_GET_TYPE"] = gate
    one = connect()
    failure = fails(lambda: one.call(REMOTE, "CONNECT_GET_TYPE", timeout=0.01))
    assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
    server.wait_for(lambda: bool(gate.held))
    peer, message = gate.held[0]
    peer.send(rpc.reply(message, structs.TypeRet("QEMU")))
    assert hostname(one) == "here"


# --- replies that are none ---

EMPTY_STRING = b"\0\0\0\0"


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (rpc_server.raw(REMOTE, 59, 1, 1, b"\0\0"), libvirt.VIR_ERR_RPC,
         "Unable to decode message payload"),
        (rpc_server.raw(REMOTE, 59, 1, 1, b"\0\0", status=1), libvirt.VIR_ERR_RPC,
         "Unable to decode message payload"),
        (rpc_server.raw(REMOTE, 59, 1, 1, b"", status=7), libvirt.VIR_ERR_RPC,
         "Unexpected message status 7"),
        (rpc_server.raw(REMOTE, 58, 1, 1, EMPTY_STRING), libvirt.VIR_ERR_INTERNAL_ERROR,
         "internal error: Unexpected message proc 58 != 59"),
    ],
    ids=["short", "short error", "status", "procedure"],
)  # fmt: skip
def test_a_reply_that_is_wrong_fails_the_call_alone(
    server: rpc_server.Server, connect: Connect, message: rpc.Message, code: int, text: str
) -> None:
    def answer(peer: rpc_server.Peer, _: rpc.Message) -> object:
        peer.send(message)
        return rpc_server.SILENCE

    own = server.handlers[f"REMOTE.{HOSTNAME}"]
    server.handlers[f"REMOTE.{HOSTNAME}"] = answer
    one = connect()
    assert told(fails(lambda: hostname(one))) == (code, libvirt.VIR_FROM_RPC, text)
    server.handlers[f"REMOTE.{HOSTNAME}"] = own
    assert hostname(one) == "here"


UNKNOWN_PROGRAM = program.Program("NOBODY", 0x20008088, 1, ())
OTHER_VERSION = program.Program("REMOTE", REMOTE.number, 2, ())


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (rpc_server.raw(REMOTE, 59, 1, 4711, EMPTY_STRING),
         "no call waiting for reply with prog 536903814 vers 1 proc 59 type 1 serial 4711"),
        (rpc_server.raw(VIRTBACKUP, 59, 1, 1, EMPTY_STRING),
         "no call waiting for reply with prog 538316934 vers 1 proc 59 type 1 serial 1"),
        (rpc_server.raw(OTHER_VERSION, 59, 1, 1, EMPTY_STRING),
         "no call waiting for reply with prog 536903814 vers 2 proc 59 type 1 serial 1"),
        (rpc_server.raw(REMOTE, 59, 0, 1),
         "got unexpected RPC call prog 536903814 vers 1 proc 59 type 0 serial 1"),
        (rpc_server.raw(REMOTE, 59, 99, 1),
         "got unexpected RPC call prog 536903814 vers 1 proc 59 type 99 serial 1"),
        (rpc_server.raw(UNKNOWN_PROGRAM, 1, 2, 1),
         "No program found for event with prog 536903816 vers 1 proc 1 type 2 serial 1"),
    ],
    ids=["serial", "program", "version", "call", "type", "event"],
)  # fmt: skip
def test_what_no_server_says_ends_the_connection(
    server: rpc_server.Server, connect: Connect, message: rpc.Message, text: str
) -> None:
    def answer(peer: rpc_server.Peer, _: rpc.Message) -> object:
        peer.send(message)
        return rpc_server.SILENCE

    server.handlers[f"REMOTE.{HOSTNAME}"] = answer
    one = connect()
    failure = fails(lambda: hostname(one))
    assert told(failure) == (libvirt.VIR_ERR_RPC, libvirt.VIR_FROM_RPC, text)
    assert not one.is_alive
    assert told(fails(lambda: hostname(one))) == CLOSED


@pytest.mark.parametrize(
    "garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3, b"\0\0\0\3", b"\xff" * 64, bytes(4)]
)
def test_garbage_ends_the_connection(
    server: rpc_server.Server, connect: Connect, garbage: bytes
) -> None:
    def answer(peer: rpc_server.Peer, _: rpc.Message) -> object:
        peer.transport._socket.send(garbage)
        return rpc_server.SILENCE

    server.handlers[f"REMOTE.{HOSTNAME}"] = answer
    failure = fails(lambda: hostname(connect()))
    assert failure.get_error_code() == libvirt.VIR_ERR_RPC
    assert "message of " in str(failure)


@hypothesis.given(data=st.binary(max_size=200), whole=st.booleans())
def test_anything_may_come(data: bytes, whole: bool) -> None:
    """The call has an end, and so has the connection."""
    first, second = socket.socketpair()
    one = client.Client(transport.Transport(first), "pair", lambda message: None)
    if whole:  # a message, by its length
        data = (len(data) + 4).to_bytes(4, "big") + data
    second.send(data)
    second.shutdown(socket.SHUT_WR)
    failure = fails(lambda: hostname(one))
    assert failure.get_error_domain() == libvirt.VIR_FROM_RPC
    one.close()
    second.close()


@hypothesis.given(
    type=st.integers(-1, 7),
    serial=st.integers(0, 1),
    status=st.integers(-1, 3),
    number=st.sampled_from([59, 318, 1, -1, 2]),
    of=st.sampled_from(list(protocol.PROGRAMS.values())),
    payload=st.binary(max_size=64),
)
def test_any_message_may_come(
    type: int, serial: int, status: int, number: int, of: program.Program, payload: bytes
) -> None:
    first, second = socket.socketpair()
    one = client.Client(transport.Transport(first), "pair", lambda message: None)
    with contextlib.suppress(rpc.CodecError):
        message = rpc_server.raw(of, number, type, serial, payload, status)
        second.send(message.encode())
    second.shutdown(socket.SHUT_WR)
    with contextlib.suppress(errors.Error):
        hostname(one)
    one.close()
    second.close()


def test_nothing_is_left_of_many_connections(server: rpc_server.Server, connect: Connect) -> None:
    before = leftovers()
    for _ in range(50):
        one = connect()
        server.peer().send(lifecycle(1))
        hostname(one)
        one.close()
    for peer in server.peers:
        assert peer.ended.wait(DEADLINE)
    assert leftovers() == before


def test_streams_and_unknown_events_are_passed_over(
    server: rpc_server.Server, connect: Connect, seen: list[rpc.Message]
) -> None:
    one = connect()
    for message in (
        rpc_server.raw(REMOTE, 208, MessageType.STREAM, 5, b"data", status=2),
        rpc_server.raw(REMOTE, 208, MessageType.STREAM_HOLE, 5, bytes(12)),
        rpc_server.raw(REMOTE, 99999, MessageType.MESSAGE, 1),
        rpc_server.raw(REMOTE, 59, MessageType.MESSAGE, 1),
        rpc_server.raw(protocol.KEEPALIVE, 17, MessageType.MESSAGE, 0),
    ):
        server.peer().send(message)
    assert hostname(one) == "here"
    assert not seen


def test_descriptors_that_come_unasked_are_closed(
    server: rpc_server.Server, connect: Connect
) -> None:
    def answer(peer: rpc_server.Peer, message: rpc.Message) -> object:
        with pathlib.Path(os.devnull).open() as null:
            ret = structs.ConnectGetHostnameRet("here")
            peer.send(rpc.reply(message, ret, [null.fileno()] * 5))
        return rpc_server.SILENCE

    server.handlers[f"REMOTE.{HOSTNAME}"] = answer
    assert hostname(connect()) == "here"  # and the fixture counts


# --- the end of a connection ---


def test_a_server_that_hangs_up_fails_every_waiting_call(
    server: rpc_server.Server, connect: Connect
) -> None:
    gate = rpc_server.Gate()
    server.handlers["REMOTE.CONNECT_GET_TYPE"] = gate
    one = connect()
    failures: list[errors.Error] = []

    def ask() -> None:
        failures.append(fails(lambda: one.call(REMOTE, "CONNECT_GET_TYPE")))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: len(gate.held) == 5)
    server.peer().hang_up()
    for thread in threads:
        thread.join(DEADLINE)
    assert [told(failure) for failure in failures] == [END_OF_FILE] * 5
    assert len({id(failure) for failure in failures}) == 5
    assert not one.is_alive
    assert told(fails(lambda: hostname(one))) == CLOSED


def test_a_connection_that_is_reset() -> None:
    """The server ends with something unread, so the kernel resets."""
    first, second = socket.socketpair()
    one = client.Client(transport.Transport(first), "pair", print)
    thread = threading.Thread(target=lambda: failures.append(fails(lambda: hostname(one))))
    failures: list[errors.Error] = []
    thread.start()
    second.recv(1)
    second.close()
    thread.join(DEADLINE)
    one.close()
    code, domain, text = told(failures[0])
    assert (code, domain) == (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC)
    assert text == "Cannot recv data: Connection reset by peer"


def test_close_while_a_call_waits(server: rpc_server.Server, connect: Connect) -> None:
    gate = rpc_server.Gate()
    server.handlers["REMOTE.CONNECT_GET_TYPE"] = gate
    one = connect()
    failures: list[errors.Error] = []
    thread = threading.Thread(
        target=lambda: failures.append(fails(lambda: one.call(REMOTE, "CONNECT_GET_TYPE")))
    )
    thread.start()
    server.wait_for(lambda: bool(gate.held))
    one.close()
    thread.join(DEADLINE)
    assert [told(failure) for failure in failures] == [CLOSED]
    one.close()
    assert server.peer().ended.wait(DEADLINE)


@pytest.mark.parametrize("when", ["it is noted", "it is sent"])
def test_a_signal_s_handler_closes_in_the_middle_of_a_call(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Nobody waits for what the handler is in the middle of."""
    one = connect()
    refused: list[errors.Error] = []

    def handler() -> None:
        refused.append(fails(lambda: one.call(REMOTE, "CONNECT_CLOSE")))
        one.close()

    class Noted(dict[int, Any]):
        def __setitem__(self, serial: int, waiting: object) -> None:
            handler()
            super().__setitem__(serial, waiting)

    send = one._transport.send

    def interrupted(message: rpc.Message, timeout: float | None = None) -> None:
        handler()
        send(message, timeout)

    if when == "it is sent":
        monkeypatch.setattr(one._transport, "send", interrupted)
    else:
        monkeypatch.setattr(one, "_waiting", Noted())
    assert told(fails(lambda: hostname(one))) == CLOSED
    [failure] = refused
    assert "in the middle of another call" in str(failure)


def test_a_reader_that_fails(
    server: rpc_server.Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug of ours keeps nobody waiting."""
    hooked: list[object] = []
    monkeypatch.setattr(threading, "excepthook", hooked.append)
    one = connect()

    def broken(message: rpc.Message) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(one, "_take", broken)
    failure = fails(lambda: hostname(one))
    assert told(failure) == (
        libvirt.VIR_ERR_INTERNAL_ERROR,
        libvirt.VIR_FROM_RPC,
        "internal error: the thread that reads has failed",
    )
    one.close()
    assert len(hooked) == 1


def test_a_server_that_takes_nothing_more() -> None:
    """A call that cannot be sent ends with the connection, which keepalive ends."""
    first, second = socket.socketpair()
    one = client.Client(transport.Transport(first), "pair", print, None, 0.05, 3)
    one.start_keepalive()
    args = structs.DomainLookupByNameArgs("x" * program.STRING_MAX)
    failure = fails(lambda: one.call(REMOTE, "DOMAIN_LOOKUP_BY_NAME", args))
    assert told(failure) == KEEPALIVE
    one.close()
    second.close()


# --- keepalive ---

KEEPALIVE = (
    libvirt.VIR_ERR_INTERNAL_ERROR,
    libvirt.VIR_FROM_RPC,
    "internal error: connection closed due to keepalive timeout",
)


def test_a_server_that_never_answers(server: rpc_server.Server, connect: Connect) -> None:
    server.handlers["REMOTE.CONNECT_GET_TYPE"] = rpc_server.Gate()
    one = connect(interval=0.05)
    server.answers_pings = False
    begin = time.monotonic()
    one.start_keepalive()
    assert told(fails(lambda: one.call(REMOTE, "CONNECT_GET_TYPE"))) == KEEPALIVE
    assert 0.25 < time.monotonic() - begin < 10
    assert server.peer().ended.wait(DEADLINE)
    assert server.peer().pings == client.KEEPALIVE_COUNT


def test_by_default_it_takes_half_a_minute() -> None:
    assert client.KEEPALIVE_INTERVAL * (client.KEEPALIVE_COUNT + 1) == 30


def test_a_slow_call_on_a_server_that_answers_pings(
    server: rpc_server.Server, connect: Connect
) -> None:
    gate = rpc_server.Gate()
    server.handlers["REMOTE.CONNECT_GET_TYPE"] = gate
    one = connect(interval=0.1)
    one.start_keepalive()
    answers: list[str] = []
    thread = threading.Thread(
        target=lambda: answers.append(one.call(REMOTE, "CONNECT_GET_TYPE").type)
    )
    thread.start()
    server.wait_for(lambda: server.peer().pings > client.KEEPALIVE_COUNT + 1)
    peer, message = gate.held[0]
    peer.send(rpc.reply(message, structs.TypeRet("QEMU")))
    thread.join(DEADLINE)
    assert answers == ["QEMU"]


def test_a_server_that_knows_no_keepalive_is_not_pinged(
    server: rpc_server.Server, connect: Connect
) -> None:
    one = connect(interval=0.01)
    threading.Event().wait(0.2)
    assert hostname(one) == "here"
    assert server.peer().pings == 0


def test_pings_of_the_server_are_answered(server: rpc_server.Server, connect: Connect) -> None:
    pongs: list[rpc.Message] = []
    take = server._take

    def watch(peer: rpc_server.Peer, message: rpc.Message) -> None:
        if keepalive.is_keepalive(message):
            pongs.append(message)
        take(peer, message)

    server._take = watch  # type: ignore[method-assign]
    connect()
    server.peer().send(keepalive.PING)
    server.wait_for(lambda: pongs == [keepalive.PONG])


def test_a_ping_while_another_thread_sends_is_answered_after_that(
    server: rpc_server.Server, connect: Connect
) -> None:
    one = connect()
    with one._sending:
        server.peer().send(keepalive.PING)
        daemon_scene.wait_for(lambda: bool(one._due))
    assert hostname(one) == "here"
    assert not one._due


# --- events ---

LIFECYCLE = "DOMAIN_EVENT_CALLBACK_LIFECYCLE"


def lifecycle(detail: int) -> rpc.Message:
    event = structs.DomainEventLifecycleMsg(rpc_server.VM, 5, detail)
    return rpc.event(REMOTE, LIFECYCLE, structs.DomainEventCallbackLifecycleMsg(0, event))


def test_an_event_before_the_reply(server: rpc_server.Server, connect: Connect) -> None:
    came = threading.Event()

    def answer(peer: rpc_server.Peer, _: rpc.Message) -> structs.ConnectGetHostnameRet:
        peer.send(lifecycle(1))
        return structs.ConnectGetHostnameRet("here")

    server.handlers[f"REMOTE.{HOSTNAME}"] = answer
    one = connect(see=lambda message: came.set())
    assert hostname(one) == "here"
    assert came.wait(DEADLINE)


def test_who_sees_an_event_may_call(server: rpc_server.Server, connect: Connect) -> None:
    names: list[str] = []
    came = threading.Event()

    def see(message: rpc.Message) -> None:
        names.append(hostname(one))
        came.set()

    one = connect(see=see)
    server.peer().send(lifecycle(1))
    assert came.wait(DEADLINE)
    assert names == ["here"]


def test_who_sees_an_event_may_close(server: rpc_server.Server, connect: Connect) -> None:
    came = threading.Event()

    def see(message: rpc.Message) -> None:
        one.close()
        came.set()

    one = connect(see=see)
    server.peer().send(lifecycle(1))
    assert came.wait(DEADLINE)
    assert server.peer().ended.wait(DEADLINE)


def test_a_callback_that_fails_or_is_slow_keeps_nobody_waiting(
    server: rpc_server.Server, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, last = threading.Event(), threading.Event()
    details: list[int] = []

    def see(message: rpc.Message) -> None:
        details.append(rpc.args(message).msg.detail)
        go_on.wait(DEADLINE)
        if details[-1] == 0:
            raise RuntimeError("a callback's bug")
        last.set()

    one = connect(see=see)
    for detail in (0, 1):
        server.peer().send(lifecycle(detail))
    assert hostname(one) == "here"
    go_on.set()
    assert last.wait(DEADLINE)
    assert details == [0, 1]
    assert "a callback's bug" in caplog.text


def test_events_that_nobody_takes_are_bounded(
    server: rpc_server.Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_EVENTS", 3)
    held, go_on, last = threading.Event(), threading.Event(), threading.Event()
    details: list[int] = []

    def see(message: rpc.Message) -> None:
        held.set()
        go_on.wait(DEADLINE)
        details.append(rpc.args(message).msg.detail)
        if details[-1] == 9:
            last.set()

    one = connect(see=see)
    server.peer().send(lifecycle(0))
    assert held.wait(DEADLINE)
    for detail in range(1, 10):
        server.peer().send(lifecycle(detail))
    assert hostname(one) == "here"
    go_on.set()
    assert last.wait(DEADLINE)
    assert details == [0, 7, 8, 9]


def test_events_before_the_end_are_seen(
    server: rpc_server.Server, connect: Connect, seen: list[rpc.Message]
) -> None:
    one = connect()
    for detail in range(5):
        server.peer().send(lifecycle(detail))
    server.peer().hang_up()
    daemon_scene.wait_for(lambda: not one.is_alive)
    daemon_scene.wait_for(lambda: len(seen) == 5)


# --- forks, traces ---


def test_in_a_forked_child_it_is_closed_and_the_parents_goes_on(
    server: rpc_server.Server, connect: Connect
) -> None:
    one = connect()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            assert not one.is_alive
            assert told(fails(lambda: hostname(one))) == CLOSED
            one.close()
            one.abandon()
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert hostname(one) == "here"


def test_a_trace(server: rpc_server.Server, connect: Connect) -> None:
    text = io.StringIO()
    trace = client.Trace()
    one = connect(trace=trace)
    trace.to = text
    hostname(one)
    server.peer().send(keepalive.PING)
    daemon_scene.wait_for(lambda: "PONG" in text.getvalue())
    trace.to = None
    hostname(one)
    lines = [line.split(" ", 1) for line in text.getvalue().splitlines()]
    assert [rest for _, rest in lines] == [
        "-> REMOTE.CONNECT_GET_HOSTNAME serial=1 CALL",
        "<- REMOTE.CONNECT_GET_HOSTNAME serial=1 REPLY ConnectGetHostnameRet(hostname='here')",
        "<- KEEPALIVE.PING serial=0 MESSAGE",
        "-> KEEPALIVE.PONG serial=0 MESSAGE",
    ]
    assert all(when.endswith("Z") for when, _ in lines)


def test_a_trace_that_cannot_be_written_ends(connect: Connect) -> None:
    text = io.StringIO()
    trace = client.Trace(text)
    one = connect(trace=trace)
    text.close()
    assert hostname(one) == "here"
    assert trace.to is None


def test_the_texts_are_errors_of_the_rpc() -> None:
    assert rpc_error.is_unknown_program(rpc_error.rpc_error("Cannot find program 1 version 1"))
    assert not rpc_error.is_unknown_program(rpc_error.rpc_error("unknown procedure: 1"))
    assert isinstance(xdr.CodecError("x"), rpc.ProtocolError)
