# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of a libvirt domain during its backup, heard by the program that started the backup."""

import ast
import contextlib
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import pytest

import virtbackup
from tests import conftest, waiting
from tests.live import libvirtd
from tests.live.libvirtd import disk_xml, image, pattern
from virtbackup.qemu import status

pytestmark = pytest.mark.needs("libvirtd", "qemu-system-x86_64", "nbdcopy", "unshare")

NAME = "listened"


class Program:
    """``tests.live.listening_program``, which has started a backup."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def __call__(self, expression: str) -> Any:
        """What EXPRESSION is there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"p.{expression}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "it has ended"
        return ast.literal_eval(line)


@pytest.fixture
def connection(host: libvirtd.Host) -> Iterator[virtbackup.Connection]:
    """Of a process that has started nothing."""
    with virtbackup.open(host.daemon.uri) as opened:
        yield opened


def socket(host: libvirtd.Host) -> pathlib.Path:
    return host.path("nbd.sock")


@contextlib.contextmanager
def program(host: libvirtd.Host, loop: str = "default", way: str = "open") -> Iterator[Program]:
    """One that has started a backup; it ends by itself, and with no word on its standard error."""
    argv = [sys.executable, "-m", "tests.live.listening_program", host.daemon.uri, NAME]
    argv += [str(socket(host)), loop, way]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield Program(process)
            _, errors = process.communicate(timeout=libvirtd.DEADLINE)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()


def domain(
    host: libvirtd.Host, persistent: bool = True, **more: Any
) -> contextlib.AbstractContextManager[libvirtd.Domain]:
    disks = disk_xml("vda", image(host.path("a.qcow2"), 1))
    return host.domain(NAME, disks, persistent, **more)


@pytest.fixture
def nothing_left(
    host: libvirtd.Host, scratch_dir: pathlib.Path, state_dir: pathlib.Path
) -> Callable[[], None]:
    """Asserts that all that is there of ours is the note of why the backup ended."""

    def check() -> None:
        assert not list(scratch_dir.iterdir())
        assert not socket(host).exists()
        [(_, left)] = status.all_in(state_dir)
        assert left.given_up is not None

    return check


@pytest.mark.parametrize("how", libvirtd.ENDS)
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "transient"])
def test_why_a_domain_ended_is_heard_and_told_to_who_stops_the_backup(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    nothing_left: Callable[[], None],
    state_dir: pathlib.Path,
    how: str,
    persistent: bool,
) -> None:
    """Nobody has to stop it for its scratch images and its socket to be gone. A transient domain
    libvirt does not even know any more."""
    end, reason = libvirtd.ENDS[how]
    with domain(host, persistent) as one, program(host) as started:
        started("start()")
        assert started("listens()") == 1
        end(one.libvirt)
        assert started("next_end()") == reason
        nothing_left()
        dom = connection.lookupByName(NAME)
        assert {disk.reason for disk in dom.backupGetInfo().disks} == {reason}
        with pytest.raises(virtbackup.Error, match=f"disk 'vda': {reason}$"):
            dom.backupStop()
        assert not list(state_dir.glob("*.json"))
        libvirtd.wait_for(lambda: started("listens()") == 0 and started("threads()") == 0)
        assert "no domain backup job present" in started("stop()")
        assert started("close()") == 0


LOOP_KINDS = ("default", "asyncio", "idle", "none")
LOOPS = [(way, loop) for way in ("open", "install") for loop in LOOP_KINDS]
"""Unless there is time, each kind once and each way twice."""


@pytest.mark.parametrize(("way", "loop"), LOOPS if conftest.long() else LOOPS[::3] + LOOPS[5:6])
def test_every_event_loop_and_none(
    host: libvirtd.Host, nothing_left: Callable[[], None], loop: str, way: str
) -> None:
    """Where nothing is heard, that QEMU has ended is seen all the same; of a transient domain that
    is all. Nothing is left to be heard once the backup has ended, or the connection is closed."""
    hears = loop in ("default", "asyncio")
    with domain(host, persistent=False) as one, program(host, loop, way) as started:
        started("start()")
        assert started("listens()") == (loop != "none")
        assert started("threads()") == 1
        assert started("stop()") == "good"
        assert (started("listens()"), started("threads()")) == (0, 0)
        started("start()")
        one.libvirt.destroy()
        reason = "the domain was destroyed" if hears else "the domain is gone"
        assert started("next_end()") == reason
        nothing_left()
        assert f"disk 'vda': {reason}" in started("stop()")
        assert (started("listens()"), started("threads()")) == (0, 0)
        assert started("close()") == 0
    with domain(host) as one, program(host, loop, way) as started:
        started("start()")
        one.libvirt.destroy()
        assert started("next_end()") == "the domain was destroyed"
        nothing_left()
        one.libvirt.create()
        assert "disk 'vda': the domain was destroyed" in started("stop()")
        started("start()")
        assert started("close()") == 0
        assert (started("listens()"), started("threads()")) == (0, 0)
        with virtbackup.open(host.daemon.uri) as other:
            other.lookupByName(NAME).backupStop()


def test_a_stop_right_after_the_end(host: libvirtd.Host) -> None:
    """It waits for libvirt's word, where that is to come."""
    with domain(host, persistent=False) as one, program(host) as started:
        started("start()")
        assert started(f"connection.lookupByName('{NAME}').ID()") == one.libvirt.ID()
        one.libvirt.destroy()
        assert "disk 'vda': the domain was destroyed" in started("stop()")


def test_uninstalling_leaves_nothing_on_the_connection(host: libvirtd.Host) -> None:
    """The backup goes on, and is watched."""
    with domain(host), program(host, way="install") as started:
        started("start()")
        assert (started("listens()"), started("threads()")) == (1, 1)
        started("uninstall()")
        assert (started("listens()"), started("threads()")) == (0, 1)
        assert started("close()") == 0
        with virtbackup.open(host.daemon.uri) as other:
            assert libvirtd.read(socket(host), "vda") == pattern(1)
            other.lookupByName(NAME).backupStop()
        libvirtd.wait_for(lambda: started("threads()") == 0)


def test_libvirtd_is_started_anew_meanwhile(
    host: libvirtd.Host, nothing_left: Callable[[], None]
) -> None:
    with domain(host, persistent=False), program(host) as started:
        started("start()")
        host.daemon.kill()
        host.daemon.start()
        host.connection = libvirt.open(host.daemon.uri)
        assert started("domain.backupGetInfo().state") == "running"
        assert started("listens()") == 1
        host.connection.lookupByName(NAME).destroy()
        assert started("next_end()") == "the domain was destroyed"
        nothing_left()


def test_a_domain_that_is_set_back_to_a_snapshot(
    host: libvirtd.Host, scratch_dir: pathlib.Path
) -> None:
    with domain(host) as one, program(host) as started:
        snapshot = one.libvirt.snapshotCreateXML("<domainsnapshot/>")
        started("start()")
        one.libvirt.revertToSnapshot(snapshot)
        assert started("next_end()") == "the domain was set back to a snapshot"
        assert not list(scratch_dir.iterdir())
        assert "disk 'vda': the domain was set back to a snapshot" in started("stop()")


def test_a_pull_of_a_transient_domain_tells_why_that_ended(
    host: libvirtd.Host, tmp_path: pathlib.Path, scratch_dir: pathlib.Path, state_dir: pathlib.Path
) -> None:
    """The shell runs an event loop of its own."""
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", host.daemon.uri]
    argv += ["backup-pull", NAME, str(tmp_path / "out"), "--bandwidth", "256KiB"]
    with (
        domain(host, persistent=False) as one,
        subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as pull,
    ):
        libvirtd.wait_for(lambda: any(p.stat().st_size for p in tmp_path.glob("out/vda.*")))
        waiting.stop(pull)
        one.libvirt.destroy()
        pull.send_signal(signal.SIGCONT)
        _, errors = pull.communicate(timeout=libvirtd.DEADLINE)
    assert pull.returncode == 1
    assert "disk 'vda': the domain was destroyed" in errors
    assert not list(scratch_dir.iterdir())
    assert not list(state_dir.glob("*.json"))
