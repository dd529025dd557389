# SPDX-License-Identifier: LGPL-2.1-or-later
"""Any bytes at the wire: no exception but ProtocolError, no hang, no memory beyond what came.

``one_input`` is the whole test of one input; ``by_mutation`` makes many of what was recorded.
tests/fuzz_rpc_atheris.py makes them by what they reach in the code.
"""

import random
import time
from collections.abc import Callable
from typing import Any

from tests import record_rpc, rpc_values
from virtbackup.remote import (
    remote_types,
    rpc,
    rpc_error,
    virtbackup_protocol,
    wire_conf,
    xdr,
)

MAX_SIZE = 1024
"""Bytes of an input; nothing in the code changes with more, and what has limits has other tests."""

CONVERSIONS: dict[type, Callable[[Any], object]] = {
    virtbackup_protocol.DomainBackupGetInfoRet: wire_conf.info_from_wire,
    virtbackup_protocol.DomainBranchListRet: wire_conf.branches_from_wire,
    remote_types.RemoteError: rpc_error.from_wire,
}
"""Struct -> what is made of it."""


def one_input(data: bytes) -> None:
    """The first byte says whether the rest is a stream, and how it is cut, or a struct, and which.
    Raises AssertionError, and whatever it should not."""
    if data[:1] and data[0] % 2:
        stream(data[1:], 1 + data[0] // 2)
    elif len(data) > 1:
        payload(rpc_values.STRUCTS[data[1] % len(rpc_values.STRUCTS)], data[2:])


def stream(data: bytes, step: int) -> None:
    """DATA come STEP bytes at once, now and then with a descriptor."""
    parser = rpc.Parser(MAX_SIZE)
    given: list[int] = []
    taken: list[int] = []
    try:
        for start in range(0, len(data), step):
            chunk = data[start : start + step]
            fds = [len(given)] if chunk[-1] == 0 and step % 2 else []
            given += fds
            parser.receive_data(chunk, fds)
            for message in iter(parser.next_message, None):
                taken += message.fds
                one_message(message)
    except xdr.ProtocolError as failure:
        assert len(str(failure)) < 300
    assert taken + parser.take_fds() == given


def one_message(message: rpc.Message) -> None:
    """Its bytes are the ones that came, and it is answered whatever it carries."""
    again = rpc.Parser(MAX_SIZE)
    again.receive_data(message.encode() + bytes(len(message.fds)), message.fds)
    assert again.next_message() == message
    assert rpc_error.reply(message, rpc_error.unknown(message)).encode()
    if message.proc is None:
        return
    for kind in (message.proc.args, message.proc.ret, remote_types.RemoteError):
        if kind is not None:
            payload(kind, message.payload)


def payload(kind: type, data: bytes) -> None:
    """DATA are a struct of KIND, which is the same after another round, or a CodecError."""
    value: Any
    try:
        value, used = xdr.decode_prefix(kind, data)
    except xdr.CodecError as failure:
        assert len(str(failure)) < 300
        assert failure.path.startswith(kind.__name__)
        return
    assert used <= len(data)
    sent = xdr.encode(value)
    assert len(sent) == used
    assert xdr.encode(xdr.decode(kind, sent)) == sent
    if kind in CONVERSIONS:
        try:
            CONVERSIONS[kind](value)
        except xdr.CodecError as failure:
            assert len(str(failure)) < 300


# --- many inputs ---


def corpus() -> list[bytes]:
    """What was recorded, as inputs."""
    found = set()
    for path in record_rpc.HERE.glob("virsh-*.jsonl"):
        for said in record_rpc.load(path):
            if len(said.data) < MAX_SIZE:
                found.add(b"\x07" + said.data + bytes(said.fds))
                parser = rpc.Parser()
                parser.receive_data(said.data + bytes(said.fds), range(said.fds))
                message = parser.next_message()
                assert message is not None
                assert message.proc is not None
                for kind in (message.proc.args, message.proc.ret):
                    if kind is not None:
                        index = rpc_values.STRUCTS.index(kind)
                        found.add(bytes([0, index]) + message.payload)
    return sorted(found)


def mutated(chance: random.Random, seeds: list[bytes]) -> bytes:
    """One of SEEDS with some changes of the kinds that find mistakes."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                word = chance.choice(WORDS)
                data[at // 4 * 4 + 1 : at // 4 * 4 + 5] = word
            case 2:
                del data[at:]
            case 3:
                del data[at : at + chance.choice((1, 4, 8))]
            case 4:
                data[at:at] = chance.randbytes(chance.choice((1, 4, 8)))
            case 5:
                data += chance.choice(seeds)[1:]
    return bytes(data[:MAX_SIZE])


WORDS = [
    number.to_bytes(4, "big")
    for number in (0, 1, 2, 7, 27, 28, 32, 33, 255, 65536, 16384, 1 << 22, 1 << 31, (1 << 32) - 1)
]


def by_mutation(count: int, seed: int) -> float:
    """Try COUNT inputs; seconds that the slowest took. Raises AssertionError with the input."""
    chance = random.Random(seed)
    seeds = corpus()
    slowest = 0.0
    for _ in range(count):
        data = mutated(chance, seeds)
        start = time.thread_time()
        try:
            one_input(data)
        except Exception as failure:
            raise AssertionError(f"one_input(bytes.fromhex('{data.hex()}'))") from failure
        slowest = max(slowest, time.thread_time() - start)
    return slowest
