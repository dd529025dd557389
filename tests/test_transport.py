# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages and descriptors over real sockets: unix, tcp and tls."""

import contextlib
import dataclasses
import os
import pathlib
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests import rpc_server, test_rpc, waiting
from virtbackup.remote import keepalive, program, rpc, transport

DEADLINE = waiting.DEADLINE
BIG = dataclasses.replace(test_rpc.LOOKUP, payload=os.urandom(1 << 22))

Ends = tuple[transport.Transport, transport.Transport]


@contextlib.contextmanager
def joined(
    address: transport.Address,
    client: ssl.SSLContext | None = None,
    server: ssl.SSLContext | None = None,
) -> Iterator[Ends]:
    """A client and the server's end of its connection."""
    with transport.listen(address) as listening, contextlib.ExitStack() as stack:
        if address.kind != "unix":
            address = dataclasses.replace(address, port=listening.getsockname()[1])
        accepted: list[transport.Transport] = []

        def accept() -> None:
            accepted.append(rpc_server.serve(listening.accept()[0], server, DEADLINE))

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            ours = transport.connect(address, client, DEADLINE)
            stack.callback(ours.close)
        finally:
            thread.join()
        stack.callback(accepted[0].close)
        yield ours, accepted[0]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A certificate with its key, that signs itself, for localhost."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", path, "-out", path.with_suffix(".crt")],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


def contexts(certificate: pathlib.Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's; each shows and asks for the certificate."""
    client = ssl.create_default_context(cafile=str(certificate.with_suffix(".crt")))
    server = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH, cafile=str(certificate.with_suffix(".crt"))
    )
    server.verify_mode = ssl.CERT_REQUIRED
    for context in (client, server):
        context.load_cert_chain(certificate)
    return client, server


@pytest.fixture(params=["unix", "tcp", "tls"])
def ends(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Ends]:
    kind = request.param
    if kind == "unix":
        with joined(transport.Address("unix", path=f"{tmp_path}/s")) as both:
            yield both
    elif kind == "tcp":
        with joined(transport.Address("tcp", host="127.0.0.1")) as both:
            yield both
    else:
        client, server = contexts(request.getfixturevalue("certificate"))
        address = transport.Address("tls", host="127.0.0.1")
        with joined(address, client, server) as both:
            yield both


@pytest.fixture
def unix() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    one, other = transport.Transport(ours), transport.Transport(theirs)
    yield one, other
    one.close()
    other.close()


def send_many(end: transport.Transport, timeout: float) -> None:
    """More than the kernel takes by itself."""
    for _ in range(20):
        end.send(BIG, timeout)


# --- messages ---


def test_there_and_back(ends: Ends) -> None:
    client, server = ends
    client.send(test_rpc.LOOKUP)
    client.send(keepalive.PING)
    assert server.receive(DEADLINE) == test_rpc.LOOKUP
    assert server.receive(DEADLINE) == keepalive.PING
    server.send(keepalive.PONG)
    assert client.receive(DEADLINE) == keepalive.PONG
    assert client.receive(0) is None
    assert client.receive(0.05) is None


def test_many_send_while_one_reads(ends: Ends) -> None:
    """Both ways at once, and no message is cut by another."""
    count, senders = 20, 4
    message = dataclasses.replace(BIG, payload=BIG.payload[: 1 << 18])

    def send(end: transport.Transport, serial: int) -> None:
        for _ in range(count):
            end.send(dataclasses.replace(message, serial=serial), DEADLINE)

    def receive(end: transport.Transport, into: list[rpc.Message | None]) -> None:
        for _ in range(count * senders):
            into.append(end.receive(DEADLINE))

    found: tuple[list[rpc.Message | None], list[rpc.Message | None]] = ([], [])
    threads = [threading.Thread(target=send, args=(end, n)) for end in ends for n in range(senders)]
    threads += [
        threading.Thread(target=receive, args=pair) for pair in zip(ends, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for received in found:
        assert {one.payload for one in received if one} == {message.payload}
        serials = sorted(one.serial for one in received if one)
        assert serials == sorted(list(range(senders)) * count)


def test_a_peer_that_hangs_up(ends: Ends) -> None:
    client, server = ends
    client.send(test_rpc.LOOKUP)
    client.close()
    assert server.receive(DEADLINE) == test_rpc.LOOKUP
    with pytest.raises(transport.Closed):
        server.receive(DEADLINE)
    with pytest.raises(transport.Closed):
        send_many(server, DEADLINE)


def test_shutdown_wakes_who_waits(ends: Ends) -> None:
    client, _ = ends
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            client.receive()
        except transport.Closed as closed:
            ended.append(closed)

    thread = threading.Thread(target=wait)
    thread.start()
    client.shutdown()
    thread.join(DEADLINE)
    assert ended


def test_a_peer_that_takes_nothing(ends: Ends) -> None:
    client, _ = ends
    with pytest.raises(transport.Closed, match="takes nothing more"):
        send_many(client, 0.2)
    with pytest.raises(transport.Closed):
        client.send(test_rpc.LOOKUP, DEADLINE)


def test_what_is_no_rpc(ends: Ends) -> None:
    client, server = ends
    client._socket.send(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(rpc.ProtocolError, match="message of 1195725856 bytes"):
        server.receive(DEADLINE)


# --- descriptors ---


def open_fds() -> int:
    return len(list(pathlib.Path("/proc/self/fd").iterdir()))


def test_descriptors_travel(unix: Ends) -> None:
    client, server = unix
    assert client.passes_fds
    read, write = os.pipe()
    call = dataclasses.replace(test_rpc.WITH_FDS, fds=(read, write))
    client.send(call)
    client.send(test_rpc.LOOKUP)
    os.close(read)
    received = server.receive(DEADLINE)
    assert received is not None
    assert received.payload == call.payload
    assert server.receive(DEADLINE) == test_rpc.LOOKUP
    os.write(received.fds[1], b"through")
    assert os.read(received.fds[0], 10) == b"through"
    assert not any(map(os.get_inheritable, received.fds))
    for fd in (write, *received.fds):
        os.close(fd)


def test_as_many_as_there_may_be(unix: Ends) -> None:
    client, server = unix
    call = dataclasses.replace(test_rpc.WITH_FDS, fds=(0,) * program.FDS_MAX)
    client.send(call)
    received = server.receive(DEADLINE)
    assert received is not None
    assert len(set(received.fds)) == program.FDS_MAX
    for fd in received.fds:
        os.close(fd)


@pytest.mark.parametrize(("count", "text"), [(1, "no message has announced"), (33, "more than 32")])
def test_descriptors_that_nobody_wants_are_closed(unix: Ends, count: int, text: str) -> None:
    client, server = unix
    before = open_fds()
    socket.send_fds(client._socket, [test_rpc.CALL], [0] * count)
    with pytest.raises(rpc.ProtocolError, match=text):  # noqa: PT012
        while server.receive(DEADLINE):
            pass
    server.close()
    assert open_fds() == before - 1


def test_descriptors_of_a_message_without_an_end_are_closed(unix: Ends) -> None:
    client, server = unix
    before = open_fds()
    socket.send_fds(client._socket, [test_rpc.WITH_FDS.encode() + b"\0"], [0])
    assert server.receive(0.05) is None
    assert open_fds() == before + 1
    server.close()
    assert open_fds() == before - 1


def test_descriptors_that_there_is_no_room_for(unix: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process may open no more files: some are lost, the rest are closed."""
    client, server = unix
    before = open_fds()
    monkeypatch.setattr(transport, "SCM_MAX_FD", 1)
    socket.send_fds(client._socket, [test_rpc.CALL], [0] * 9)
    with pytest.raises(rpc.ProtocolError, match="lost on the way"):
        server.receive(DEADLINE)
    assert open_fds() == before


def test_tcp_passes_none() -> None:
    with joined(transport.Address("tcp", host="127.0.0.1")) as (client, _):
        assert not client.passes_fds
        with pytest.raises(AssertionError):
            client.send(dataclasses.replace(test_rpc.WITH_FDS, fds=(0,)))


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/x", transport.Address("unix", path="/run/x")),
        ("unix:/a:b", transport.Address("unix", path="/a:b")),
        ("tcp:127.0.0.1:7000", transport.Address("tcp", host="127.0.0.1", port=7000)),
        ("tcp::0", transport.Address("tcp", host="", port=0)),
        ("tls:[::1]:65535", transport.Address("tls", host="::1", port=65535)),
        ("tls:a.b:1", transport.Address("tls", host="a.b", port=1)),
    ],
)
def test_addresses(text: str, address: transport.Address) -> None:
    assert transport.parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is none of"),
        ("/run/x", "is none of"),
        ("unix:", "is absolute"),
        ("unix:x", "is absolute"),
        ("unix:/\0", "is absolute"),
        ("unix:/" + "x" * 107, "longer than 107 bytes"),
        ("unix:/" + "\u2603" * 36, "longer than 107 bytes"),
        ("tcp:7000", "is none of"),
        ("udp:a:1", "is none of"),
        ("tcp:a:", "'' is no port"),
        ("tcp:a:65536", "'65536' is no port"),
        ("tcp:a:-1", "'-1' is no port"),
        ("tcp:a:\u0661", "is no port"),
        ("tcp:a:" + "1" * 5000, "is no port"),
        ("tcp:::1:7000", "in brackets"),
    ],
)
def test_no_addresses(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        transport.parse_address(text)


def test_a_unix_socket_has_its_mode(tmp_path: pathlib.Path) -> None:
    for mode in (0o600, 0o660):
        path = tmp_path / str(mode)
        with transport.listen(transport.Address("unix", path=str(path)), mode):
            assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_unix_socket_is_never_open_to_more(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even between bind and chmod, whatever the umask."""
    path = tmp_path / "s"
    monkeypatch.setattr(os, "chmod", lambda *_: None)
    before = os.umask(0)
    try:
        transport.listen(transport.Address("unix", path=str(path))).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_unix_socket_that_nobody_serves_is_replaced(tmp_path: pathlib.Path) -> None:
    address = transport.Address("unix", path=f"{tmp_path}/s")
    transport.listen(address).close()
    with transport.listen(address):
        with pytest.raises(OSError, match="Address already in use"):
            transport.listen(address)
        transport.connect(address).close()
    pathlib.Path(address.path).unlink()
    pathlib.Path(address.path).write_text("a file")
    with pytest.raises(OSError, match="Address already in use"):
        transport.listen(address)


def test_a_server_that_has_no_room_yet(tmp_path: pathlib.Path) -> None:
    """It is waited for, as for a server that is far."""
    address = transport.Address("unix", path=f"{tmp_path}/s")
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as stack:
        listening.bind(address.path)
        listening.listen(0)
        stack.enter_context(transport.connected(address))
        with pytest.raises(TimeoutError, match="timed out"):
            transport.connected(address, 0.1)
        accepting = threading.Timer(0.1, lambda: stack.enter_context(listening.accept()[0]))
        accepting.start()
        late = stack.enter_context(transport.connected(address, DEADLINE))
        accepting.join()
        assert late.gettimeout() == DEADLINE
        late.settimeout(0.05)
        with pytest.raises(TimeoutError):
            late.recv(1)


def test_nobody_is_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        transport.connect(transport.Address("unix", path=f"{tmp_path}/s"))
    with socket.socket() as held:  # who does not listen, nor lets another do so
        held.bind(("127.0.0.1", 0))
        address = transport.Address("tcp", host="127.0.0.1", port=held.getsockname()[1])
        with pytest.raises(ConnectionRefusedError):
            transport.connect(address)
