# SPDX-License-Identifier: LGPL-2.1-or-later
"""What virsh and a real libvirtd have said to each other (tests/record_rpc.py), read by our code
and said again byte for byte."""

import collections
import pathlib
from collections.abc import Iterable
from typing import Any

import pytest

from tests import record_rpc
from virtbackup.remote import program, protocol, rpc, rpc_error, xdr

SCENES = sorted(record_rpc.HERE.glob("virsh-*.jsonl"))
CALLS = (program.MessageType.CALL, program.MessageType.CALL_WITH_FDS)

NOT_SAID = {
    # Of authentication, or of clients other than virsh.
    "AUTH_SASL_INIT", "AUTH_SASL_START", "AUTH_SASL_STEP", "AUTH_POLKIT", "CONNECT_GET_URI",
    "CONNECT_GET_CAPABILITIES", "CONNECT_GET_LIB_VERSION", "DOMAIN_LOOKUP_BY_UUID",
    "DOMAIN_DEFINE_XML_FLAGS", "DOMAIN_FD_ASSOCIATE", "STORAGE_POOL_LOOKUP_BY_TARGET_PATH",
    "DOMAIN_ABORT_JOB_FLAGS", "DOMAIN_IS_ACTIVE", "CONNECT_EVENT_CONNECTION_CLOSED",
    "DOMAIN_FSTHAW", "DOMAIN_SNAPSHOT_NUM",
    "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY",
    # What only a virsh newer than the recorded one asks for.
    "DOMAIN_GET_AUTOSTART_ONCE",
    # What virsh falls back to with older servers.
    "CONNECT_LIST_DEFINED_DOMAINS", "CONNECT_NUM_OF_DEFINED_DOMAINS", "CONNECT_LIST_DOMAINS",
    "CONNECT_NUM_OF_DOMAINS",
}  # fmt: skip


def streams(said: Iterable[record_rpc.Said]) -> dict[tuple[int, bool], list[record_rpc.Said]]:
    """What one end of one connection said."""
    found = collections.defaultdict(list)
    for one in said:
        found[one.connection, one.by_client].append(one)
    return found


def check(said: list[record_rpc.Said]) -> set[str]:
    """Read all of it, in one piece and message by message; the procedures there were."""
    names = set()
    for one_end in streams(said).values():
        whole = rpc.Parser(max_length=1 << 24)
        apart = rpc.Parser()
        for one in one_end:
            fds = range(one.fds)
            whole.receive_data(one.data + bytes(one.fds), fds)
            apart.receive_data(one.data)
            for fd in fds:
                assert apart.next_message() is None
                apart.receive_data(b"\0", (fd,))
            message = apart.next_message()
            assert message is not None
            check_message(message, one)
            names.add(message.proc.name if message.proc else str(message))
            assert apart.next_message() is None
        assert [message.payload for message in iter(whole.next_message, None)]
    return names


def check_message(message: rpc.Message, said: record_rpc.Said) -> None:
    """What it carries is of its type, and our words for it are the same bytes."""
    assert message.encode() == said.data
    assert message.fds == tuple(range(said.fds))
    proc = message.proc
    assert proc is not None, message
    if message.status == program.MessageStatus.ERROR:
        failure = rpc_error.of_reply(message)
        assert rpc_error.reply(message, failure).encode() == said.data
        return
    kind = proc.ret if message.type == program.MessageType.REPLY else proc.args
    assert (message.type in CALLS) == said.by_client
    assert (message.type == program.MessageType.MESSAGE) == (proc.kind == "event")
    if kind is None:
        assert message.payload == b""
        return
    value: Any
    value, used = xdr.decode_prefix(kind, message.payload)
    assert used == len(message.payload)
    assert xdr.encode(value) == message.payload
    if proc.kind == "event":
        remade = rpc.event(protocol.PROGRAMS[message.program], proc.name, value)
        assert remade.encode() == said.data


@pytest.mark.parametrize("path", SCENES, ids=lambda path: path.stem)
def test_recorded(path: pathlib.Path) -> None:
    said = record_rpc.load(path)
    assert len(said) > 300
    check(said)


def test_every_procedure_is_recorded_or_excused() -> None:
    names = {name for path in SCENES for name in check(record_rpc.load(path))}
    spoken = {proc.name for each in (protocol.REMOTE, protocol.QEMU) for proc in each.procedures}
    assert spoken - names == NOT_SAID


def test_descriptors_are_recorded() -> None:
    assert sum(one.fds for path in SCENES for one in record_rpc.load(path)) == 1
