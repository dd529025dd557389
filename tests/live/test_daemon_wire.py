# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same bytes to a real libvirtd, with its test driver behind it, and to ours: the same bytes
come back, whatever they are."""

import dataclasses
import pathlib
import struct
from collections.abc import Iterator

import pytest

from tests import daemon_scene
from tests.live import libvirtd
from tests.test_server import IGNORED, REFUSED, raw, text, words
from virtbackup import hypervisor
from virtbackup.remote import remote_types, rpc, xdr

pytestmark = pytest.mark.needs("libvirtd")

TEST = hypervisor.DomainRef("test", "6695eb01-f6a4-8304-79aa-97f2502e193f", 1)
"""The domain of libvirt's test:///default."""
REMOTE, QEMU, KEEPALIVE = 0x20008086, 0x20008087, 0x6B656570
UUID = bytes.fromhex(TEST.uuid.replace("-", ""))
DOM = text("test") + UUID + words(1)
OPEN = raw(REMOTE, 1, 1, serial=0, payload=words(1) + text("test:///default") + words(0))


@pytest.fixture
def theirs(libvirt_host: libvirtd.Host) -> Iterator[daemon_scene.Raw]:
    with daemon_scene.Raw.unix(libvirt_host.daemon.socket) as client:
        yield client


@pytest.fixture
def ours(tmp_path: pathlib.Path) -> Iterator[daemon_scene.Raw]:
    driver = daemon_scene.Driver(TEST)
    driver.state = (1, 0)
    serving = daemon_scene.serving(tmp_path, driver, uri="test:///default")
    with serving as served, served.raw() as client:
        yield client


def said(client: daemon_scene.Raw, *messages: bytes, opened: bool = True) -> list[bytes | None]:
    """What is answered to each of MESSAGES; None: nothing, as a later ping is answered first."""
    client.call(daemon_scene.REMOTE, "AUTH_LIST")
    if opened:
        client.send(OPEN)
        assert client.reply(0).status == 0
    return [answer(client, message) for message in messages]


def answer(client: daemon_scene.Raw, message: bytes) -> bytes | None:
    """What is answered to a MESSAGE; None: nothing, as a later call is answered first."""
    client.send(message)
    if message[16:20] == words(0):  # to a call something is, however late
        return client.reply(5).encode()
    client.send(raw(REMOTE, 1, 66, serial=77777))
    before: bytes | None = None
    while True:
        got = client.receive()
        assert got is not None
        if got.serial == 77777:
            return before
        before = got.encode()


def both(
    theirs: daemon_scene.Raw, ours: daemon_scene.Raw, *messages: bytes, opened: bool = True
) -> list[bytes | None]:
    expected = [unnumbered(answer) for answer in said(theirs, *messages, opened=opened)]
    got = said(ours, *messages, opened=opened)
    different = [
        (message, one, other)
        for message, one, other in zip(messages, expected, got, strict=True)
        if one != other
    ]
    assert not different
    return expected


def unnumbered(answer: bytes | None) -> bytes | None:
    """An answer as libvirt 9.0 gives it. Newer ones number what a template of an error's text
    takes, for translators, and send the template along: ``internal error: %1$s``."""
    if answer is None or b"%1$s" not in answer:
        return answer
    parser = rpc.Parser()
    parser.receive_data(answer)
    message = parser.next_message()
    assert message is not None
    error = xdr.decode(remote_types.RemoteError, message.payload)
    assert error.str1 is not None
    error = dataclasses.replace(error, str1=error.str1.replace("%1$s", "%s"))
    return dataclasses.replace(message, payload=xdr.encode(error)).encode()


CALLS = [
    raw(REMOTE, 1, 23, payload=text("test")),
    raw(REMOTE, 1, 23, payload=text("test") + b"garbage"),
    raw(REMOTE, 1, 22, payload=words(1)),
    raw(REMOTE, 1, 24, payload=UUID),
    raw(REMOTE, 1, 273, payload=words(1, 0)),
    raw(REMOTE, 1, 273, payload=words(0, 0)),
    raw(REMOTE, 1, 273, payload=words(1, 2)),
    raw(REMOTE, 1, 51),
    raw(REMOTE, 1, 37, payload=words(10)),
    raw(REMOTE, 1, 25),
    raw(REMOTE, 1, 150, payload=DOM),
    raw(REMOTE, 1, 212, payload=DOM + words(0)),
    raw(REMOTE, 1, 60, payload=words(14)),
    raw(REMOTE, 1, 60, payload=words(0x10000)),
    raw(REMOTE, 1, 66),
    raw(REMOTE, 1, 360),
    raw(REMOTE, 1, 361),
    raw(REMOTE, 1, 421, status=1, payload=DOM),
    raw(REMOTE, 1, 14, payload=DOM),
    raw(REMOTE, 1, 14, payload=text("test") + UUID[:8]),
    raw(REMOTE, 1, 316, payload=words(99, 0)),
    raw(REMOTE, 1, 317, payload=words(99)),
    raw(KEEPALIVE, 1, 1),
    raw(KEEPALIVE, 2, 1, type=2),
    raw(KEEPALIVE, 1, 1, type=3),
    raw(KEEPALIVE, 1, 1, type=2, serial=0),
    raw(KEEPALIVE, 1, 1, type=2, serial=0, status=1),
    raw(KEEPALIVE, 1, 9, type=2, serial=0),
    # libvirtd forgets the connection then, which ours does not.
    raw(REMOTE, 1, 1, payload=words(1) + text("test:///default") + words(0)),
]


def test_known_and_unknown_calls(theirs: daemon_scene.Raw, ours: daemon_scene.Raw) -> None:
    answered = both(theirs, ours, *CALLS)
    assert sum(answer is not None for answer in answered) > len(CALLS) // 2


def test_what_is_refused_and_ignored(theirs: daemon_scene.Raw, ours: daemon_scene.Raw) -> None:
    refused = [message.replace(text("vm"), text("test")) for message, _ in REFUSED]
    answered = both(theirs, ours, *refused, *IGNORED)
    assert [answer is None for answer in answered] == [False] * len(refused) + [True] * len(IGNORED)


def test_before_it_is_open(theirs: daemon_scene.Raw, ours: daemon_scene.Raw) -> None:
    some = [message for message, _ in REFUSED[:9]]
    both(theirs, ours, *some, raw(REMOTE, 1, 51), raw(REMOTE, 1, 212, payload=DOM + words(0)),
         raw(REMOTE, 1, 1, payload=words(1) + text("foo:///x") + words(0)),
         raw(REMOTE, 1, 1, payload=words(0, 0)),
         opened=False)  # fmt: skip


@pytest.mark.parametrize(
    "garbage",
    [
        words(0), words(3), words(4), words(33554437), words(0xFFFFFFFF),
        words(27) + b"\0" * 23, raw(REMOTE, 1, 66, type=4),
        raw(REMOTE, 1, 66, type=4, payload=words(33)),
    ],
)  # fmt: skip
def test_what_ends_the_connection(
    theirs: daemon_scene.Raw, ours: daemon_scene.Raw, garbage: bytes
) -> None:
    for client in (theirs, ours):
        client.call(daemon_scene.REMOTE, "AUTH_LIST")
        client.send(garbage)
        assert client.is_dropped()


def test_room_for_descriptors(theirs: daemon_scene.Raw, ours: daemon_scene.Raw) -> None:
    """With some in it libvirtd answers, too, and we do not: see tests/test_server.py."""
    replies = []
    for client in (theirs, ours):
        client.call(daemon_scene.REMOTE, "AUTH_LIST")
        client.send(raw(REMOTE, 1, 66, type=4, payload=words(0)))
        message = client.receive()
        assert message is not None
        replies.append(message.encode())
    assert replies[0] == replies[1]
    assert struct.unpack(">I", replies[0][:4])[0] == len(replies[0])
