# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our messages to a real libvirtd's test driver, and to a real domain of its."""

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import pytest

from tests import waiting
from tests.live import libvirtd
from virtbackup.remote import (
    keepalive,
    program,
    protocol,
    qemu_protocol,
    remote_structs,
    remote_types,
    rpc,
    rpc_error,
    transport,
)

REMOTE = protocol.REMOTE
DEADLINE = waiting.DEADLINE

pytestmark = pytest.mark.needs("libvirtd")


class Client:
    """One connection, one call at a time."""

    def __init__(self, path: pathlib.Path, uri: str) -> None:
        self.transport = transport.connect(transport.Address("unix", path=str(path)))
        self.events: list[rpc.Message] = []
        self._serial = 0
        assert self.call("AUTH_LIST").types == (remote_types.AUTH_NONE,)
        self.call("CONNECT_OPEN", remote_structs.ConnectOpenArgs(uri, 0))

    def call(
        self, name: str, args: Any = None, fds: tuple[int, ...] = (), of: program.Program = REMOTE
    ) -> Any:
        self._serial += 1
        return self.ask(rpc.call(of, name, self._serial, args, fds))

    def ask(self, call: rpc.Message) -> Any:
        """What a call returns; raises what it says. Events that come meanwhile are kept."""
        self.transport.send(call, DEADLINE)
        while (reply := self.receive()).type == program.MessageType.MESSAGE:
            self.events.append(reply)
        assert (reply.serial, reply.proc) == (call.serial, call.proc)
        if reply.status == program.MessageStatus.ERROR:
            raise rpc_error.of_reply(reply)
        return rpc.ret(reply)

    def receive(self) -> rpc.Message:
        message = self.transport.receive(DEADLINE)
        assert message is not None
        return message

    def supports(self, feature: int) -> bool:
        asked = remote_structs.ConnectSupportsFeatureArgs(feature)
        return bool(self.call("CONNECT_SUPPORTS_FEATURE", asked).supported)


Connect = Callable[[str], Client]


@pytest.fixture
def connect(libvirt_host: libvirtd.Host) -> Iterator[Connect]:
    made: list[Client] = []

    def one(uri: str) -> Client:
        made.append(Client(libvirt_host.daemon.socket, uri))
        return made[-1]

    yield one
    for client in made:
        client.transport.close()


@pytest.fixture
def client(connect: Connect) -> Client:
    return connect("test:///default")


def lookup(client: Client, name: str) -> remote_types.NonnullDomain:
    args = remote_structs.DomainLookupByNameArgs(name)
    dom: remote_types.NonnullDomain = client.call("DOMAIN_LOOKUP_BY_NAME", args).dom
    return dom


def test_calls(client: Client) -> None:
    dom = lookup(client, "test")
    assert (dom.name, dom.id) == ("test", 1)
    listed = client.call("CONNECT_LIST_ALL_DOMAINS", remote_structs.ConnectListAllDomainsArgs(1, 0))
    assert listed == remote_structs.ConnectListAllDomainsRet((dom,), 1)
    args = remote_structs.DomainFlagsArgs(dom, 0)
    assert client.call("DOMAIN_GET_STATE", args).state == libvirt.VIR_DOMAIN_RUNNING
    assert "<name>test</name>" in client.call("DOMAIN_GET_XML_DESC", args).xml
    assert client.call("CONNECT_GET_TYPE").type == "TEST"
    assert client.call("CONNECT_CLOSE") is None


def test_features(client: Client) -> None:
    for feature in (
        remote_types.FEATURE_FD_PASSING,
        remote_types.FEATURE_PROGRAM_KEEPALIVE,
        remote_types.FEATURE_REMOTE_EVENT_CALLBACK,
        remote_types.FEATURE_REMOTE_CLOSE_CALLBACK,
    ):
        assert client.supports(feature)
    assert not client.supports(0x10000)


def test_errors(client: Client) -> None:
    with pytest.raises(libvirt.libvirtError, match="Domain not found") as caught:
        lookup(client, "nobody")
    assert caught.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN


@pytest.mark.parametrize(
    ("number", "version", "procedure"),
    [
        (REMOTE.number, 1, 9999),
        (REMOTE.number, 1, -1),
        (REMOTE.number, 2, 1),
        (0xFFFFFFFF, 1, 1),
        (protocol.VIRTBACKUP.number, 1, 1),
    ],
)
def test_what_it_does_not_know_is_said_in_our_words(
    client: Client, number: int, version: int, procedure: int
) -> None:
    call = rpc.Message(number, version, procedure, program.MessageType.CALL, 99)
    client.transport.send(call)
    said = client.receive()
    if number == protocol.VIRTBACKUP.number:  # known here, so by another number
        expected = rpc_error.rpc_error(f"Cannot find program {number} version 1")
    else:
        expected = rpc_error.unknown(call)
    assert said == rpc_error.reply(call, expected)


def test_what_it_cannot_decode_is_said_in_our_words(client: Client) -> None:
    call = rpc.Message(REMOTE.number, 1, 23, program.MessageType.CALL, 99, 0, b"\0\0\0\x09abc\0")
    client.transport.send(call)
    assert client.receive() == rpc_error.reply(call, rpc_error.undecodable())
    lookup(client, "test")


def test_the_longest_strings(client: Client) -> None:
    """One byte more and we do not even send it."""
    with pytest.raises(libvirt.libvirtError, match="Domain not found"):
        lookup(client, "x" * program.STRING_MAX)
    with pytest.raises(rpc.CodecError, match="at most 4194304"):
        lookup(client, "x" * (program.STRING_MAX + 1))


def test_it_answers_a_ping(client: Client) -> None:
    client.transport.send(keepalive.PING)
    assert client.receive() == keepalive.PONG


def test_events(client: Client) -> None:
    dom = lookup(client, "test")
    args = remote_structs.ConnectDomainEventCallbackRegisterAnyArgs(0, dom)
    number = client.call("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", args).callbackID
    client.call("DOMAIN_SUSPEND", remote_structs.DomainArgs(dom))
    message = client.events[0] if client.events else client.receive()
    value = remote_structs.DomainEventCallbackLifecycleMsg(
        number,
        remote_structs.DomainEventLifecycleMsg(
            dom, libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED
        ),
    )
    assert message == rpc.event(REMOTE, "DOMAIN_EVENT_CALLBACK_LIFECYCLE", value)


def test_descriptors(connect: Connect, host: libvirtd.Host) -> None:
    """QEMU itself has what we sent."""
    image = libvirtd.image(host.path("fds.qcow2"), 1)
    client = connect("qemu:///system")
    with host.domain("fds", libvirtd.disk_xml("vda", image)):
        command = '{"execute": "getfd", "arguments": {"fdname": "ours"}}'
        args = qemu_protocol.DomainMonitorCommandArgs(lookup(client, "fds"), command, 0)
        read, write = os.pipe()
        name = "DOMAIN_MONITOR_COMMAND_WITH_FILES"
        result = client.call(name, args, (write,), of=protocol.QEMU).result
        assert '"return":{}' in result
        os.close(write)
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 1)  # QEMU has the other end open
        os.close(read)


def test_too_many_descriptors_hang_up(client: Client) -> None:
    call = rpc.call(REMOTE, "DOMAIN_FD_ASSOCIATE", 5, _associate(), (0,) * program.FDS_MAX)
    with pytest.raises(libvirt.libvirtError):
        client.ask(call)
    data = bytearray(call.encode())
    data[31] += 1
    client.transport._socket.send(data)
    with pytest.raises(transport.Closed):
        client.receive()


def _associate() -> remote_structs.DomainFdAssociateArgs:
    nobody = remote_types.NonnullDomain("nobody", bytes(16), -1)
    return remote_structs.DomainFdAssociateArgs(nobody, "n", 0)
