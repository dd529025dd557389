# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that may never return, made by a thread of their own."""

import contextlib
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import libvirt
import pytest

from tests import daemon_scene, waiting
from virtbackup import errors, hypervisor
from virtbackup.qemu import monitor, monitor_json, passthrough
from virtbackup.tools import advice

LONG = 20.0


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What hangs until a test ends."""
    event = threading.Event()
    yield event
    event.set()


def test_an_interrupt_is_not_held_up_by_a_call_that_hangs(hanging: threading.Event) -> None:
    """Ctrl-C ends the wait for libvirt, and what is done with the connection then."""
    interrupted = threading.Event()

    def hang() -> str:
        # One that comes just before the wait is seen to after it: then again, as people do.
        time.sleep(0.1)
        while not interrupted.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            interrupted.wait(3)
        hanging.wait(LONG)
        return ""

    calls = passthrough._Calls("calls")
    # What a shell starts in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            calls.call(hang, LONG)
        interrupted.set()
    finally:
        signal.signal(signal.SIGINT, before)
    calls.close()
    assert time.monotonic() - begin < LONG / 2


def test_a_call_that_hangs_is_left_to_itself(hanging: threading.Event) -> None:
    calls = passthrough._Calls("calls")
    begin = time.monotonic()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            calls.call(lambda: str(hanging.wait(LONG)), 0.01)
    calls.close()
    assert time.monotonic() - begin < LONG / 2


def test_a_qemu_that_stands_still_is_not_waited_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, hanging: threading.Event
) -> None:
    """No longer than by its socket, and it is told why it does not answer."""

    class Stopped(daemon_scene.Driver):
        def domain_monitor_command(self, *_: object) -> str:
            return str(hanging.wait(LONG))

    monkeypatch.setattr(monitor, "CONNECT_TIMEOUT", 0.1)
    with contextlib.ExitStack() as ended:
        process = ended.enter_context(subprocess.Popen(["sleep", "60"]))
        ended.callback(process.kill)
        waiting.stop(process)
        monkeypatch.setattr(passthrough, "pid_of", lambda _: process.pid)
        served = ended.enter_context(
            daemon_scene.serving(tmp_path, Stopped(daemon_scene.ref("vm")))
        )
        ended.callback(hanging.set)
        connection = libvirt.open(f"qemu:///system?socket={served.path}")
        begin = time.monotonic()
        with pytest.raises(monitor.NoAnswer) as caught:
            passthrough.LibvirtMonitor(connection.lookupByName("vm"))
    assert time.monotonic() - begin < LONG / 2
    assert str(caught.value) == (
        "Timed out during operation: no reply to 'query-version' within 0.1 seconds: its process"
        f" {process.pid} is stopped, by a signal (SIGSTOP) or a debugger"
    )


def test_a_domain_that_does_not_run_is_not_asked(capfd: pytest.CaptureFixture[str]) -> None:
    """libvirt would print the error, of a call that may go well."""
    name = "ends"
    with contextlib.closing(libvirt.open("test:///default")) as connection:
        found = connection.defineXML(
            f"<domain type='test'><name>{name}</name><memory>1024</memory>"
            "<os><type>hvm</type></os></domain>"
        )
        with pytest.raises(passthrough.NotRunning, match="domain is not running") as caught:
            passthrough.LibvirtMonitor(found)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
        found.undefine()
    assert capfd.readouterr() == ("", "")


class Qemu(daemon_scene.Driver):
    """One that answers whoever asks for its version."""

    def domain_monitor_command(self, domain: hypervisor.DomainRef, command: str, flags: int) -> str:
        return '{"return": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}}'


def test_a_daemon_that_passes_no_descriptors_on(tmp_path: pathlib.Path) -> None:
    """As virtbackupd: nothing was lost, and the shell says by which URI it is reached."""
    running = daemon_scene.serving(tmp_path, Qemu(daemon_scene.ref("vm")))
    with running as served, open(os.devnull, "rb") as file:  # noqa: PTH123  (for its number)
        uri = f"qemu:///system?socket={served.path}"
        with contextlib.closing(libvirt.open(uri)) as connection:
            qemu = passthrough.LibvirtMonitor(connection.lookupByName("vm"))
            with pytest.raises(errors.Error, match=r"^argument unsupported: ") as caught:
                qemu.execute(monitor_json.add_fd(file.fileno(), ""))
            qemu.close()
    assert "virtbackup+unix:///" in (advice.advice(caught.value) or "")


def test_what_a_call_returns_and_raises() -> None:
    calls = passthrough._Calls("calls")
    assert calls.call(lambda: "told", LONG) == "told"
    with pytest.raises(ZeroDivisionError):
        calls.call(lambda: str(1 // 0), LONG)
    calls.close()
    assert not calls._thread.is_alive()


def test_calls_are_made_where_no_thread_can_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert passthrough.patiently(lambda: "told") == "told"
    with pytest.raises(ZeroDivisionError):
        passthrough.patiently(lambda: 1 // 0)
