# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NBD server of the fake QEMU, by the bytes: whole, one by one, and such as no client sends.

tests/live/test_replay.py has it under real clients.
"""

import contextlib
import dataclasses
import struct
from collections.abc import Sequence

import hypothesis
import pytest
from hypothesis import strategies

from virtbackup.test import fake_server, nbdwire

OPTION_MAGIC = b"IHAVEOPT"
DISK = fake_server.Disk("/images/a", 1 << 20, "words", {"b": True, "clean": False})
BROKEN = fake_server.Disk("", 1 << 20, readable=False)
GREETED = struct.pack(">I", 3)


@dataclasses.dataclass(frozen=True)
class Reply:
    """To an option."""

    option: int
    kind: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Of a structured reply; a simple one is flags -1 with its error as the kind."""

    flags: int
    kind: int
    cookie: int
    body: bytes


def server() -> nbdwire.Server:
    return nbdwire.Server(lambda: {"a": DISK, "broken": BROKEN})


def say(speaker: nbdwire.Server, *pieces: bytes) -> bytes:
    told = b""
    for piece in pieces:
        speaker.receive_data(piece)
        while (reply := speaker.next_message()) is not None:
            told += reply
    return told


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION_MAGIC + struct.pack(">II", number, len(data)) + data


def text(words: str) -> bytes:
    return struct.pack(">I", len(words.encode())) + words.encode()


def go(name: str, *infos: int, number: int = 7) -> bytes:
    return option(number, text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def contexts(name: str, *queries: str, number: int = 10) -> bytes:
    asked = b"".join(map(text, queries))
    return option(number, text(name) + struct.pack(">I", len(queries)) + asked)


def request(kind: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 7) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length)


def replies(told: bytes) -> list[Reply]:
    found = []
    while told:
        magic, number, kind, length = struct.unpack_from(">QIII", told)
        assert magic == 0x3E889045565A9
        found.append(Reply(number, kind, told[20 : 20 + length]))
        told = told[20 + length :]
    return found


def chunks(told: bytes) -> list[Chunk]:
    found = []
    while told:
        magic, flags, kind, cookie, length = struct.unpack_from(">IHHQI", told)
        assert magic == 0x668E33EF
        found.append(Chunk(flags, kind, cookie, told[20 : 20 + length]))
        told = told[20 + length :]
    assert [chunk.flags for chunk in found] == [0] * (len(found) - 1) + [1]
    return found


def chosen(name: str = "a", structured: bool = True, *queries: str) -> nbdwire.Server:
    """A connection past its handshake."""
    speaker = server()
    say(speaker, GREETED)
    if structured:
        say(speaker, option(8))
    if queries:
        say(speaker, contexts(name, *queries))
    say(speaker, go(name))
    assert speaker.export == name
    return speaker


def extents(body: bytes) -> list[tuple[int, int]]:
    return list(struct.iter_unpack(">II", body))


def test_the_greeting() -> None:
    assert server().greeting() == b"NBDMAGICIHAVEOPT\0\3"


def test_a_whole_conversation_however_it_is_cut() -> None:
    handshake = GREETED, option(8), contexts("a", "base:allocation"), go("a")
    requests = request(0, 0, 512), request(7, 0, 1 << 20), request(3), request(2)
    said = b"".join(handshake + requests)
    whole, bytewise = server(), server()
    told = say(whole, said)
    assert say(bytewise, *(bytes([byte]) for byte in said)) == told
    assert whole.over
    assert b"/images/a sector 0\n" in told


def test_list_and_info() -> None:
    speaker = server()
    say(speaker, GREETED)
    told = replies(say(speaker, option(3)))
    assert [reply.kind for reply in told] == [2, 2, 1]
    assert told[0].data == text("a") + b"words"
    told = replies(say(speaker, go("a", 1, 2, 3, number=6)))
    assert [struct.unpack_from(">H", reply.data)[0] for reply in told[:-1]] == [0, 1, 2, 3]
    assert struct.unpack(">HQH", told[0].data) == (0, 1 << 20, 0b10110000111)
    assert told[-1] == Reply(6, 1, b"")
    assert speaker.export is None


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (option(5), 1),  # STARTTLS
        (option(99, b"xyz"), 1),
        (option(3, b"x"), 3),
        (option(8, b"x"), 3),
        (go("nope"), 6),
        (option(7, b"\0\0"), 3),
        (option(7, b"\xff\xff\xff\xffa\0\0"), 3),
        (option(7, text("a") + b"\0\2\0\0"), 3),
        (option(7, struct.pack(">I", 2) + b"\xff\xfe\0\0"), 3),
        (option(7, text("x" * 5000) + b"\0\0"), 3),
        (contexts("a", "base:allocation"), 3),  # before structured replies
    ],
)
def test_options_that_are_refused(said: bytes, kind: int) -> None:
    speaker = server()
    say(speaker, GREETED)
    [reply] = replies(say(speaker, said))
    assert reply.kind == (1 << 31) + kind
    assert speaker.export is None
    say(speaker, go("a"))
    assert speaker.export == "a"


def test_contexts() -> None:
    speaker = server()
    say(speaker, GREETED, option(8))
    told = replies(say(speaker, contexts("a", number=9)))
    assert [reply.data[4:] for reply in told[:-1]] == [
        b"base:allocation", b"qemu:dirty-bitmap:b", b"qemu:dirty-bitmap:clean"
    ]  # fmt: skip
    told = replies(say(speaker, contexts("a", "qemu:", number=9)))
    assert [reply.data[4:] for reply in told[:-1]] == [
        b"qemu:dirty-bitmap:b", b"qemu:dirty-bitmap:clean"
    ]  # fmt: skip
    told = replies(say(speaker, contexts("a", "base:allocation", "nope")))
    assert [reply.data for reply in told] == [b"\0\0\0\0base:allocation", b""]
    [reply] = replies(say(speaker, contexts("nope", "base:allocation")))
    assert reply.kind == (1 << 31) + 6
    [reply] = replies(say(speaker, option(10, text("a") + struct.pack(">I", 1))))
    assert reply.kind == (1 << 31) + 3


@pytest.mark.parametrize("name", [b"nope", b"\xff", b"a" * 5000])
def test_the_option_that_cannot_say_no(name: bytes) -> None:
    speaker = server()
    told = say(speaker, struct.pack(">I", 1), option(1, b"a"))
    assert told == struct.pack(">QH", 1 << 20, 0b10110000111) + bytes(124)
    speaker = server()
    assert say(speaker, GREETED, option(1, name)) == b""
    assert speaker.over


def test_abort() -> None:
    speaker = server()
    [reply] = replies(say(speaker, GREETED, option(2)))
    assert reply.kind == 1
    assert speaker.over


def test_reads_with_simple_replies() -> None:
    speaker = chosen(structured=False)
    told = say(speaker, request(0, 512, 1024, cookie=9))
    assert told[:16] == struct.pack(">IIQ", 0x67446698, 0, 9)
    assert told[16:] == DISK.read(512, 1024)
    told = say(speaker, request(4, 0, 512))
    assert told == struct.pack(">IIQ", 0x67446698, 1, 7)


def test_reads_with_structured_replies() -> None:
    speaker = chosen()
    start = DISK.data - 512
    data, hole = chunks(say(speaker, request(0, start, 1024)))
    assert data.body == struct.pack(">Q", start) + DISK.read(start, 512)
    assert (hole.kind, hole.body) == (2, struct.pack(">QI", DISK.data, 512))
    [whole] = chunks(say(speaker, request(0, start, 1024, flags=4)))
    assert whole.body == struct.pack(">Q", start) + DISK.read(start, 1024)
    [done] = chunks(say(speaker, request(3)))
    assert done.kind == 0


def test_block_status() -> None:
    speaker = chosen("a", True, "base:allocation", "qemu:dirty-bitmap:b", "qemu:dirty-bitmap:clean")
    told = chunks(say(speaker, request(7, 0, 1 << 20)))
    data, rest = DISK.data, DISK.size - DISK.data
    assert [struct.unpack_from(">I", chunk.body)[0] for chunk in told] == [0, 1, 2]
    assert [extents(chunk.body[4:]) for chunk in told] == [
        [(data, 0), (rest, 3)], [(data, 1), (rest, 0)], [(data, 0), (rest, 0)]
    ]  # fmt: skip
    [one, *_] = chunks(say(speaker, request(7, 0, 1 << 20, flags=8)))
    assert extents(one.body[4:]) == [(data, 0)]


@pytest.mark.parametrize(
    ("said", "errno"),
    [
        (request(0, 1 << 20, 1), 22),
        (request(0, (1 << 64) - 1, 2), 22),
        (request(0, 0, 0), 22),
        (request(0, 0, (1 << 32) - 1), 22),
        (request(4, 0, 512), 1),
        (request(6, 0, 512), 1),
        (request(7, 0, 512), 22),  # no context was chosen
        (request(99, 0, 512), 22),
    ],
)
def test_requests_that_fail(said: bytes, errno: int) -> None:
    speaker = chosen()
    [chunk] = chunks(say(speaker, said))
    assert (chunk.kind, chunk.body) == (0x8001, struct.pack(">IH", errno, 0))
    assert chunks(say(speaker, request(0, 0, 512)))[0].kind == 1


def test_a_snapshot_that_broke() -> None:
    speaker = chosen("broken", True, "base:allocation")
    for said in (request(0, 0, 512), request(7, 0, 512)):
        [chunk] = chunks(say(speaker, said))
        assert (chunk.kind, chunk.body[:4]) == (0x8001, struct.pack(">I", 95))


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xff\xff\xff",
        GREETED + b"nonsense" + bytes(8),
        GREETED + OPTION_MAGIC + struct.pack(">II", 7, 1 << 20),
    ],
)
def test_what_is_no_handshake(said: bytes) -> None:
    with pytest.raises(nbdwire.ProtocolError):
        say(server(), said)


@pytest.mark.parametrize("said", [bytes(28), request(1, 0, 4) + b"data"])
def test_what_is_no_request(said: bytes) -> None:
    with pytest.raises(nbdwire.ProtocolError):
        say(chosen(), said)


def test_an_export_that_is_gone() -> None:
    exports: dict[str, nbdwire.Export] = {"a": DISK}
    speaker = nbdwire.Server(lambda: exports)
    say(speaker, GREETED, go("a"))
    exports.clear()
    with pytest.raises(nbdwire.ProtocolError):
        say(speaker, request(0, 0, 512))


@hypothesis.given(strategies.binary(max_size=200), strategies.booleans())
def test_any_bytes(said: bytes, greeted: bool) -> None:
    speaker = server()
    with contextlib.suppress(nbdwire.ProtocolError):
        say(speaker, GREETED if greeted else b"", said)


@hypothesis.given(strategies.integers(0, DISK.size - 1), strategies.integers(1, 5000))
def test_a_disk_is_the_same_wherever_it_is_read(offset: int, length: int) -> None:
    length = min(length, DISK.size - offset)
    whole = DISK.read(0, DISK.size)
    assert len(whole) == DISK.size
    assert DISK.read(offset, length) == whole[offset : offset + length]
    found: Sequence[nbdwire.Extent] = DISK.extents(nbdwire.ALLOCATION, offset, length)
    assert sum(extent.length for extent in found) == length
