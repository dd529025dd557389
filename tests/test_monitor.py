# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QMP client before monitors that are slow, broken or hostile: real sockets, no QEMU."""

import contextlib
import io
import json
import logging
import pathlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import libvirt
import pytest

import virtbackup
from tests import test_qmp, waiting
from virtbackup.qemu import monitor, monitor_json, qmp

DEADLINE = waiting.DEADLINE
Script = Callable[[socket.socket], None]


@contextlib.contextmanager
def served(directory: pathlib.Path, script: Script) -> Iterator[str]:
    """The path of a monitor that does what SCRIPT does with its one client."""
    path = directory / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                with client:
                    script(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield str(path)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def greet(client: socket.socket) -> None:
    client.sendall(test_qmp.GREETING)
    answer(client, {})


def answer(client: socket.socket, value: object) -> int:
    id = json.loads(client.recv(1 << 16))["id"]
    client.sendall(json.dumps({"return": value, "id": id}).encode() + b"\r\n")
    return int(id)


def until_closed(client: socket.socket) -> None:
    while client.recv(1 << 16):
        pass


def test_handshake_command_and_trace(tmp_path: pathlib.Path) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        answer(client, [])
        until_closed(client)

    trace = io.StringIO()
    with served(tmp_path, script) as path, monitor.SocketMonitor(path, trace) as qemu:
        assert qemu.greeting == qmp.Greeting((7, 2, 22), "Debian")
        assert qemu.execute(monitor_json.query_jobs()) == []
        assert qemu.peer_pid() is not None
    lines = trace.getvalue().splitlines()
    assert [line.split(" ")[1] for line in lines] == ["<-", "->", "<-", "->", "<-"]
    assert '"query-jobs"' in lines[3]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak QMP"),
        (b"NBDMAGICIHAVEOPT\0\3", "does not speak QMP: not a QMP message: b'NBDMAGIC"),
        (b"", "end of file from monitor"),
        (test_qmp.GREETING[:-20], "end of file from monitor"),
    ],
)
def test_no_qmp_at_all(tmp_path: pathlib.Path, sent: bytes, reason: str) -> None:
    with (
        served(tmp_path, lambda client: client.sendall(sent)) as path,
        pytest.raises(virtbackup.Error, match=reason),
    ):
        monitor.SocketMonitor(path)


def test_silence_is_bounded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "CONNECT_TIMEOUT", 0.2)
    began = time.monotonic()
    with (
        served(tmp_path, until_closed) as path,
        pytest.raises(virtbackup.Error, match="may be using it, or it is no QMP socket") as caught,
    ):
        monitor.SocketMonitor(path)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
    assert time.monotonic() - began < 9  # of the ten otherwise


def test_a_command_without_a_reply(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        until_closed(client)

    monkeypatch.setattr(monitor, "REPLY_TIMEOUT", 0.2)
    with served(tmp_path, script) as path, monitor.SocketMonitor(path) as qemu:
        with pytest.raises(virtbackup.Error, match="no reply to 'query-jobs'"):
            qemu.execute(monitor_json.query_jobs())
        with pytest.raises(monitor.MonitorLost, match="no reply to 'query-jobs'"):
            qemu.execute(monitor_json.query_jobs())


@pytest.mark.parametrize(
    "garbage",
    [
        b"not json\r\n",
        b'{"return": {}, "id": "text"}\r\n',
        b'{"unknown": 1}\r\n',
        b"[" * 100_000 + b"\r\n",
        b"\xff\xff\xff\r\n",
    ],
)
def test_garbage_ends_the_connection(tmp_path: pathlib.Path, garbage: bytes) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        client.recv(1 << 16)
        client.sendall(garbage)
        until_closed(client)

    with (
        served(tmp_path, script) as path,
        monitor.SocketMonitor(path) as qemu,
        pytest.raises(monitor.MonitorLost, match="does not speak QMP"),
    ):
        qemu.execute(monitor_json.query_jobs())


def test_a_line_without_an_end_takes_bounded_memory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp.Parser.__init__, "__defaults__", (1 << 20,))

    def script(client: socket.socket) -> None:
        greet(client)
        client.recv(1 << 16)
        client.sendall(b"{")
        while True:
            client.sendall(b"x" * (1 << 16))

    with (
        served(tmp_path, script) as path,
        monitor.SocketMonitor(path) as qemu,
        pytest.raises(monitor.MonitorLost, match="longer than 1048576 bytes"),
    ):
        qemu.execute(monitor_json.query_jobs())


def test_replies_out_of_order_and_to_nothing(tmp_path: pathlib.Path) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        received = b""
        while received.count(b"\n") < 2:
            received += client.recv(1 << 16)
        first, second = (json.loads(line)["id"] for line in received.splitlines())
        for id, value in ((77, "nobody's"), (second, "second"), (first, "first")):
            client.sendall(json.dumps({"return": value, "id": id}).encode() + b"\r\n")
        until_closed(client)

    with served(tmp_path, script) as path, monitor.SocketMonitor(path) as qemu:
        commands = [monitor_json.query_jobs(), monitor_json.query_block()]
        assert qemu.execute_all(commands) == ["first", "second"]


def test_what_qemu_cannot_read_is_the_eldest_command_s_failure(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not know the id then, either."""
    unread = {"error": {"class": "GenericError", "desc": "JSON parse error, invalid Unicode"}}

    def script(client: socket.socket) -> None:
        greet(client)
        received = b""
        while received.count(b"\n") < 2:
            received += client.recv(1 << 16)
        _, second = (json.loads(line)["id"] for line in received.splitlines())
        client.sendall(json.dumps(unread).encode() + b"\r\n")
        client.sendall(json.dumps({"return": [], "id": second}).encode() + b"\r\n")
        client.sendall(json.dumps(unread).encode() + b"\r\n")  # to nothing
        answer(client, "third")
        until_closed(client)

    with served(tmp_path, script) as path, monitor.SocketMonitor(path) as qemu:
        commands = [monitor_json.query_jobs(), monitor_json.query_block()]
        failed, read = qemu.execute_each(commands)
        assert isinstance(failed, monitor_json.CommandFailed)
        assert "JSON parse error, invalid Unicode" in str(failed)
        assert read == []
        waiting.until(lambda: "reply to nothing" in caplog.text)
        assert qemu.execute(monitor_json.query_jobs()) == "third"


def test_a_flood_of_events_is_bounded_and_in_nobodys_way(tmp_path: pathlib.Path) -> None:
    event = b'{"timestamp":{"seconds":1,"microseconds":0},"event":"%s","data":{"n":%d}}\r\n'
    count = monitor.MAX_EVENTS + 5

    def script(client: socket.socket) -> None:
        greet(client)
        client.sendall(b"".join(event % (b"E", number) for number in range(count)))
        answer(client, "done")
        until_closed(client)

    with served(tmp_path, script) as path, monitor.SocketMonitor(path) as qemu:
        assert qemu.execute(monitor_json.query_jobs()) == "done"
        first = qemu.wait_event(lambda seen: seen.name == "E", 1)
        assert first is not None
        assert first.data["n"] == count - monitor.MAX_EVENTS
        last = qemu.wait_event(lambda seen: seen.data.get("n") == count - 1, 1)
        assert last is not None
        assert qemu.wait_event(lambda seen: seen.name == "OTHER", 0.01) is None


def test_all_of_a_batch_are_answered_before_the_first_failure_is_raised(
    tmp_path: pathlib.Path,
) -> None:
    def script(client: socket.socket) -> None:
        greet(client)
        received = b""
        while received.count(b"\n") < 3:
            received += client.recv(1 << 16)
        for line in received.splitlines():
            command = json.loads(line)
            outcome: dict[str, object] = {"return": 1}
            if command["execute"] == "query-block":
                outcome = {"error": {"class": "GenericError", "desc": "no"}}
            client.sendall(json.dumps({**outcome, "id": command["id"]}).encode() + b"\r\n")
        answer(client, "next")
        until_closed(client)

    batch = [monitor_json.query_jobs(), monitor_json.query_block(), monitor_json.query_fdsets()]
    with served(tmp_path, script) as path, monitor.SocketMonitor(path) as qemu:
        with pytest.raises(monitor_json.CommandFailed, match="no") as caught:
            qemu.execute_all(batch)
        assert caught.value.command is batch[1]
        assert qemu.execute(monitor_json.query_jobs()) == "next"


def test_a_signal_while_others_are_served(tmp_path: pathlib.Path) -> None:
    """It cuts the wait for the monitor short, which begins anew then."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    path = tmp_path / "qmp.sock"
    got: list[object] = []
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as other:
        server.bind(str(path))
        server.listen(0)
        other.connect(str(path))  # the queue is full

        def connect() -> None:
            try:
                with monitor.SocketMonitor(str(path)):
                    got.append("served")
            except libvirt.libvirtError as failure:
                got.append(failure)

        thread = threading.Thread(target=connect)
        thread.start()
        assert thread.ident is not None
        for _ in range(50):
            if thread.is_alive():
                signal.pthread_kill(thread.ident, signal.SIGUSR1)
            thread.join(0.002)
        assert got == []
        server.accept()[0].close()
        client, _ = server.accept()
        with client:
            greet(client)
            until_closed(client)
        thread.join(DEADLINE)
    signal.signal(signal.SIGUSR1, before)
    assert got == ["served"]


def test_an_interrupt_before_the_reader_begins(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It finds its socket closed then, which is no failure of the monitor's."""
    main = threading.get_ident()
    closed, read = threading.Event(), threading.Event()
    struck: list[int] = []

    def strike(number: int, frame: object) -> None:
        if not struck:
            struck.append(number)
            raise KeyboardInterrupt

    class Late(threading.Thread):
        def _bootstrap(self) -> None:
            # It does not wake a thread that is about to wait for a lock, and not yet asleep.
            while not struck:
                signal.pthread_kill(main, signal.SIGINT)
                closed.wait(0.1)
            assert closed.wait(DEADLINE)
            super()._bootstrap()  # type: ignore[misc]

        def run(self) -> None:
            super().run()
            read.set()

    caplog.set_level(logging.DEBUG)
    with served(tmp_path, until_closed) as path:
        handler = signal.signal(signal.SIGINT, strike)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(threading, "Thread", Late)
                with pytest.raises(KeyboardInterrupt):
                    monitor.SocketMonitor(path)
        finally:
            signal.signal(signal.SIGINT, handler)
        closed.set()
        assert read.wait(DEADLINE)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
