# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's messages, however they were cut on the way; its errors and its keepalive.

The golden vectors are what a real libvirtd 9.0.0 and its client said.
"""

import dataclasses
import itertools
import struct
import tracemalloc
from collections.abc import Sequence

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import rpc_values
from virtbackup import errors
from virtbackup.remote import (
    keepalive,
    program,
    protocol,
    remote_structs,
    remote_types,
    rpc,
    rpc_error,
    xdr,
)

REMOTE = protocol.REMOTE
UUID = bytes.fromhex("c9be7d1300000000000000000000abcd")
DOMAIN = remote_types.NonnullDomain("rpcvm", UUID, 2)

CALL = bytes.fromhex(
    "00000028 20008086 00000001 00000017 00000000 00000005 00000000 00000005 727063766d000000"
)
REPLY = bytes.fromhex(
    "0000003c 20008086 00000001 00000017 00000001 00000005 00000000 00000005 727063766d000000"
    "c9be7d1300000000000000000000abcd 00000002"
)
UNKNOWN = (
    bytes.fromhex(
        "00000088 20008086 00000001 0000270f 00000001 00000006 00000001 00000027 00000007 00000001"
        "00000017"
    )
    + b"unknown procedure: 9999\0"
    + bytes.fromhex("00000002 00000000 00000001 00000002")
    + b"%s\0\0"
    + bytes.fromhex("00000001 00000017")
    + b"unknown procedure: 9999\0"
    + bytes.fromhex("00000000 ffffffff ffffffff 00000000")
)

LOOKUP = rpc.call(
    REMOTE, "DOMAIN_LOOKUP_BY_NAME", 5, remote_structs.DomainLookupByNameArgs("rpcvm")
)
WITH_FDS = rpc.call(
    REMOTE, "DOMAIN_FD_ASSOCIATE", 7, remote_structs.DomainFdAssociateArgs(DOMAIN, "n", 0), (11, 12)
)

Piece = tuple[bytes, tuple[int, ...]]
"""One byte, and the descriptors that come with it."""


def pieces(message: rpc.Message) -> list[Piece]:
    """MESSAGE byte by byte, as a peer sends it."""
    sent: list[Piece] = [(bytes([byte]), ()) for byte in message.encode()]
    return sent + [(b"\0", (fd,)) for fd in message.fds]


MESSAGES = [
    LOOKUP,
    rpc.reply(LOOKUP, remote_structs.DomainRet(DOMAIN)),
    keepalive.PING,
    WITH_FDS,
    dataclasses.replace(WITH_FDS, fds=()),
    rpc_error.reply(LOOKUP, errors.error(libvirt.VIR_ERR_NO_DOMAIN, "rpcvm")),
    dataclasses.replace(WITH_FDS, type=program.MessageType.REPLY_WITH_FDS, fds=(13,)),
    rpc.event(
        REMOTE,
        "DOMAIN_EVENT_CALLBACK_LIFECYCLE",
        remote_structs.DomainEventCallbackLifecycleMsg(
            3, remote_structs.DomainEventLifecycleMsg(DOMAIN, 5, 1)
        ),
    ),
    rpc.Message(1, 2, -3, 99, 0xFFFFFFFF, -1, b"abcd"),
]
STREAM = [piece for message in MESSAGES for piece in pieces(message)]


def feed(parser: rpc.Parser, some: Sequence[Piece]) -> None:
    """All pieces as one read returns them."""
    fds = tuple(fd for _, with_it in some for fd in with_it)
    parser.receive_data(b"".join(byte for byte, _ in some), fds)


def drain(parser: rpc.Parser) -> list[rpc.Message]:
    found = []
    while (message := parser.next_message()) is not None:
        found.append(message)
    return found


# --- messages ---


def test_golden_vectors() -> None:
    assert LOOKUP.encode() == CALL
    assert rpc.reply(LOOKUP, remote_structs.DomainRet(DOMAIN)).encode() == REPLY
    nobody = rpc.Message(REMOTE.number, 1, 9999, program.MessageType.CALL, 6)
    assert rpc_error.reply(nobody, rpc_error.unknown(nobody)).encode() == UNKNOWN


def test_golden_vectors_are_read() -> None:
    parser = rpc.Parser()
    parser.receive_data(CALL + REPLY + UNKNOWN)
    call, reply, unknown = drain(parser)
    assert call == LOOKUP
    assert call.proc is REMOTE["DOMAIN_LOOKUP_BY_NAME"]
    assert rpc.args(call) == remote_structs.DomainLookupByNameArgs("rpcvm")
    assert rpc.ret(reply) == remote_structs.DomainRet(DOMAIN)
    assert (unknown.procedure, unknown.proc, unknown.serial) == (9999, None, 6)
    assert unknown.status == program.MessageStatus.ERROR
    failure = rpc_error.of_reply(unknown)
    assert failure.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT
    assert str(failure) == "unknown procedure: 9999"


@pytest.mark.parametrize("message", MESSAGES)
def test_whole_and_with_the_next_behind_it(message: rpc.Message) -> None:
    parser = rpc.Parser()
    feed(parser, pieces(message))
    assert drain(parser) == [message]
    feed(parser, pieces(message) + pieces(LOOKUP)[:10])
    assert drain(parser) == [message]
    feed(parser, pieces(LOOKUP)[10:])
    assert drain(parser) == [LOOKUP]


def test_byte_by_byte() -> None:
    parser = rpc.Parser()
    found = []
    for piece in STREAM:
        feed(parser, [piece])
        found += drain(parser)
    assert found == MESSAGES


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_cut_anywhere(cuts: list[int]) -> None:
    parser = rpc.Parser()
    found = []
    for start, end in itertools.pairwise([0, *sorted(cuts), len(STREAM)]):
        feed(parser, STREAM[start:end])
        found += drain(parser)
    assert found == MESSAGES
    assert parser.take_fds() == []


@pytest.mark.parametrize("length", [0, 1, 3, 4, 27, (32 << 20) + 5, 0x80000000, 0xFFFFFFFF])
def test_lengths_that_cannot_be(length: int) -> None:
    """libvirtd hangs up too; and nothing is waited for."""
    parser = rpc.Parser()
    with pytest.raises(rpc.ProtocolError, match=f"message of {length} bytes, not from 28"):
        parser.receive_data(struct.pack(">I", length))


def test_the_length_of_the_next_message_is_looked_at() -> None:
    parser = rpc.Parser()
    parser.receive_data(CALL + bytes(4))
    assert parser.next_message() == LOOKUP
    with pytest.raises(rpc.ProtocolError, match="message of 0 bytes"):
        parser.next_message()


def test_the_longest_message() -> None:
    message = dataclasses.replace(LOOKUP, payload=bytes(program.MESSAGE_MAX - program.HEADER_SIZE))
    parser = rpc.Parser()
    data = message.encode()
    assert len(data) == program.MESSAGE_MAX + 4
    parser.receive_data(data)
    assert parser.next_message() == message
    with pytest.raises(rpc.CodecError, match="message of 33554437 bytes, at most 33554432"):
        dataclasses.replace(message, payload=message.payload + b"x").encode()


def test_a_server_may_take_less() -> None:
    with pytest.raises(rpc.ProtocolError, match="message of 40 bytes, not from 28 to 39"):
        rpc.Parser(max_length=35).receive_data(CALL)
    parser = rpc.Parser(max_length=36)
    parser.receive_data(CALL)
    assert parser.next_message() == LOOKUP


def test_messages_that_nobody_takes_are_bounded() -> None:
    parser = rpc.Parser(max_length=1000)
    parser.receive_data(CALL * 30)
    with pytest.raises(rpc.ProtocolError, match="are not taken"):
        parser.receive_data(CALL)


def test_a_length_takes_no_memory() -> None:
    parser = rpc.Parser()
    tracemalloc.start()
    try:
        parser.receive_data(struct.pack(">I", program.MESSAGE_MAX) + CALL[4:])
        assert parser.next_message() is None
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=300), st.lists(st.integers(3, 9), max_size=40))
def test_any_bytes_are_messages_or_a_protocol_error(data: bytes, fds: list[int]) -> None:
    parser = rpc.Parser()
    try:
        parser.receive_data(struct.pack(">I", 28 + len(data) % 50) + data, fds)
        taken = [fd for message in drain(parser) for fd in message.fds]
    except rpc.ProtocolError as failure:
        assert str(failure)
    else:
        assert taken + parser.take_fds() == fds


# --- descriptors ---


def test_no_descriptor_of_a_broken_connection_is_lost() -> None:
    parser = rpc.Parser()
    feed(parser, pieces(WITH_FDS)[:-1])
    assert parser.next_message() is None
    assert parser.take_fds() == [11]
    assert parser.take_fds() == []


def test_descriptors_are_counted() -> None:
    many = tuple(range(program.FDS_MAX + 1))
    parser = rpc.Parser()
    with pytest.raises(rpc.ProtocolError, match="more than 32 descriptors"):
        parser.receive_data(b"", many)
    assert len(parser.take_fds()) == 33
    with pytest.raises(rpc.CodecError, match="33 descriptors, at most 32"):
        dataclasses.replace(WITH_FDS, fds=many).encode()
    with pytest.raises(rpc.CodecError, match="2 descriptors"):
        dataclasses.replace(LOOKUP, fds=many[:2]).encode()
    data = WITH_FDS.encode()
    parser.receive_data(data[:28] + struct.pack(">I", 33) + data[32:])
    with pytest.raises(rpc.ProtocolError, match="33 descriptors, at most 32"):
        parser.next_message()


@pytest.mark.parametrize(
    ("data", "fds", "text"),
    [
        (WITH_FDS.encode() + bytes(2), (11,), "1 of 2 descriptors came"),
        (WITH_FDS.encode() + b"\0\1", (11, 12), "not NUL"),
        (CALL, (11,), "1 descriptors that no message has announced"),
        (WITH_FDS.encode() + bytes(2), (11, 12, 13), "1 descriptors that no message"),
        (WITH_FDS.encode()[:28] + b"\xff\xff\xff\xff" + WITH_FDS.encode()[32:], (), "4294967295 d"),
        (struct.pack(">I", 28) + WITH_FDS.encode()[4:28], (), "within its number of descriptors"),
    ],
)
def test_descriptors_that_do_not_fit(data: bytes, fds: tuple[int, ...], text: str) -> None:
    parser = rpc.Parser()
    parser.receive_data(data, fds)
    with pytest.raises(rpc.ProtocolError, match=text):
        drain(parser)


# --- calls and their answers ---


def test_the_answer_has_the_calls_numbers() -> None:
    call = rpc.call(protocol.VIRTBACKUP, "SUPPORTED", 77)
    failed = rpc_error.reply(call, rpc_error.unknown(dataclasses.replace(call, version=2)))
    assert dataclasses.replace(failed, payload=b"") == dataclasses.replace(
        call, type=program.MessageType.REPLY, status=program.MessageStatus.ERROR
    )
    assert str(rpc_error.of_reply(failed)) == "Cannot find program 538316934 version 2"


def test_an_answer_of_the_wrong_type_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        rpc.reply(LOOKUP, remote_structs.NumRet(1))
    with pytest.raises(AssertionError):
        rpc.call(REMOTE, "CONNECT_CLOSE", 1, remote_structs.NumRet(1))


def test_descriptors_make_another_type() -> None:
    assert WITH_FDS.type == program.MessageType.CALL_WITH_FDS
    call = rpc.call(REMOTE, "CONNECT_CLOSE", 1)
    assert rpc.reply(call).type == program.MessageType.REPLY
    assert rpc.reply(call, None, (5,)).type == program.MessageType.REPLY_WITH_FDS
    assert rpc.ret(rpc.reply(call)) is None


def test_events_have_libvirtds_serial() -> None:
    assert MESSAGES[-2].serial == 1
    assert MESSAGES[-2].type == program.MessageType.MESSAGE


@pytest.mark.parametrize(
    ("number", "version", "text"),
    [
        (0x20008086, 2, "Cannot find program 536903814 version 2"),
        (0x20008088, 1, "Cannot find program 536903816 version 1"),
        (0xFFFFFFFF, 0xFFFFFFFE, "Cannot find program -1 version -2"),
        (0x20008087, 1, "unknown procedure: -8"),
    ],
)
def test_what_libvirtd_says_of_unknown_calls(number: int, version: int, text: str) -> None:
    call = rpc.Message(number, version, -8, program.MessageType.CALL, 1)
    assert rpc_error.unknown(call).err == (39, 7, text, 2, "%s", text, None, -1, -1)


# --- errors ---


@given(rpc_values.of(remote_types.RemoteError))
def test_errors_round_trip(sent: remote_types.RemoteError) -> None:
    again = rpc_error.to_wire(rpc_error.from_wire(sent))
    assert again.message
    expected = dataclasses.replace(
        sent,
        dom=None,
        net=None,
        code=again.code if sent.code == 0 else sent.code,
        message=sent.message or again.message,
    )
    assert again == expected


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        (0, None, (1, "An error occurred, but the cause is unknown")),
        (1, None, (1, "Unknown error")),
        (42, "Domain not found", (42, "Domain not found")),
        (39, "unknown procedure: 5", (3, "unknown procedure: 5")),
        (39, "Cannot find program 1 version 1", (39, "Cannot find program 1 version 1")),
    ],
)
def test_errors_as_libvirts_client_raises_them(
    code: int, message: str | None, expected: tuple[int, str]
) -> None:
    sent = remote_types.RemoteError(code, 7, message, 2, None, None, None, None, -1, -1, None)
    raised = rpc_error.from_wire(sent)
    assert (raised.get_error_code(), str(raised)) == expected
    assert raised.get_error_message() == expected[1]


@pytest.mark.parametrize(
    "change", [{"domain": 10}, {"level": 1}, {"message": "an unknown procedure: 5"}, {"code": 38}]
)
def test_only_the_rpcs_own_error_is_an_unknown_procedure(change: dict[str, int | str]) -> None:
    unknown = rpc_error.to_wire(rpc_error.rpc_error("unknown procedure: 5"))
    assert rpc_error.is_unknown_procedure(unknown)
    changed = dataclasses.replace(unknown, **change)  # type: ignore[arg-type]
    assert not rpc_error.is_unknown_procedure(changed)
    assert rpc_error.from_wire(changed).get_error_code() == changed.code


def test_any_text_of_an_error_can_be_sent() -> None:
    """Cut between characters, and well within a message."""
    text = "a\0b\ud800\udcff" + "\U0001f600" * 5_000_000
    reply = rpc_error.reply(LOOKUP, errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, text))
    assert len(reply.encode()) < program.MESSAGE_MAX / 2
    assert (
        str(rpc_error.of_reply(reply))
        == "internal error: "
        + (f"ab?\udcff{text[5:]}"[: rpc_error.MAX_TEXT - len("internal error: ") - 1])
    )


@given(st.text(st.characters(exclude_categories=[])))
def test_texts_of_errors_arrive(text: str) -> None:
    error = errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, text)
    found = rpc_error.of_reply(rpc_error.reply(LOOKUP, error))
    if "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text):
        assert (str(found), found.err) == (str(error), error.err)


def test_an_error_of_libvirts_own() -> None:
    theirs = libvirt.libvirtError("x")
    theirs.err = (42, 10, "Domain not found", 2, "a", None, None, 3, 4)
    sent = rpc_error.to_wire(theirs)
    assert (sent.code, sent.domain, sent.str1, sent.int1) == (42, 10, "a", 3)
    assert rpc_error.from_wire(sent).err == theirs.err
    theirs.err = None
    assert rpc_error.to_wire(theirs).code == libvirt.VIR_ERR_INTERNAL_ERROR


@pytest.mark.parametrize("payload", [b"", UNKNOWN[28:-1]])
def test_an_error_that_is_none(payload: bytes) -> None:
    with pytest.raises(xdr.CodecError, match="RemoteError"):
        rpc_error.of_reply(dataclasses.replace(LOOKUP, payload=payload))


# --- keepalive ---


def test_keepalive_messages() -> None:
    assert keepalive.PING.encode().hex() == (
        "0000001c6b656570000000010000000100000002" + "0000000000000000"
    )
    assert keepalive.PONG.procedure == 2
    assert keepalive.is_ping(keepalive.PING)
    assert not keepalive.is_ping(keepalive.PONG)
    assert not keepalive.is_ping(dataclasses.replace(keepalive.PING, type=0))
    assert not keepalive.is_ping(LOOKUP)
    assert keepalive.is_keepalive(keepalive.PONG)
    assert not keepalive.is_keepalive(LOOKUP)


@pytest.mark.parametrize(("count", "end"), [(5, 30.0), (6, 35.0), (0, 5.0)])
def test_a_silent_peer_is_dead_when_libvirt_says_so(count: int, end: float) -> None:
    """libvirtd (5, 5) hangs up after 30 s, virsh (5, 6) after 35 s."""
    watch = keepalive.Keepalive(5.0, count)
    now = 1000.0
    told: list[tuple[float, str | None]] = []
    assert watch.due(now) is None
    while not told or told[-1][1] != "dead":
        left = watch.next(now)
        assert left is not None
        now += left
        told.append((now - 1000.0, watch.due(now)))
    assert told == [(5.0 * n, "ping") for n in range(1, count + 1)] + [(end, "dead")]


def test_any_message_is_life() -> None:
    watch = keepalive.Keepalive(5.0, 1)
    watch.received(0.0)
    assert watch.due(5.0) == "ping"
    assert watch.due(5.0) is None
    watch.received(9.9)
    assert watch.due(10.0) is None
    assert watch.next(10.0) == pytest.approx(4.9)
    assert watch.due(14.9) == "ping"
    assert watch.due(100.0) == "dead"


def test_no_keepalive() -> None:
    watch = keepalive.Keepalive(0.0, 5)
    watch.received(0.0)
    assert watch.next(1e9) is None
    assert watch.due(1e9) is None
