# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is the user's or somebody else's is left alone, however much it looks like ours; and what of
ours cannot be removed is said."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

import virtbackup
from tests import waiting
from tests.live import machines
from virtbackup.qemu import scratch

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

_KILLED_AT_ONCE = """
import os, signal, sys, virtbackup
from virtbackup.qemu import process
process.Run.server = lambda run: os.kill(os.getpid(), signal.SIGKILL)
virtbackup.open(sys.argv[1]).lookupByID(1).backupStart(sys.argv[2])
"""


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    with machines.two_disks(tmp_path, size=4 << 20) as one:
        yield one


def document(address: str, disks: str = "") -> str:
    return f"<domainbackup>{address}<disks>{disks}</disks></domainbackup>"


def unix(directory: pathlib.Path) -> str:
    return f'<address type="unix" path="{directory}/nbd.sock"/>'


def one_file(path: pathlib.Path) -> str:
    return f'<disk name="vda"><source file="{path}"/></disk><disk name="sdb" present="no"/>'


def start_and_die_at_once(machine: machines.Machine, xml: str) -> None:
    """Before QEMU was told anything."""
    argv = [sys.executable, "-c", _KILLED_AT_ONCE, machine.uri, xml]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("ends", ["cleanup", "start"])
def test_a_file_that_the_user_made_where_an_image_was_to_be(
    tmp_path: pathlib.Path, machine: machines.Machine, ends: str
) -> None:
    path = tmp_path / "backup.hdd"
    start_and_die_at_once(machine, document(unix(tmp_path), one_file(path)))
    path.write_text("precious")
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        if ends == "cleanup":
            assert dom.backupCleanup() == []
        else:
            dom.backupStart(document(unix(tmp_path)))
            dom.backupStop()
    assert path.read_text() == "precious"


def test_a_file_that_the_user_put_in_place_of_an_image(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    path = tmp_path / "backup.hdd"
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(document(unix(tmp_path), one_file(path)))
        path.rename(tmp_path / "moved")
        path.write_text("precious")
        dom.backupStop()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("done", ["nothing", "made", "some of it"])
def test_an_image_that_a_crash_left_is_no_file_of_the_users(
    tmp_path: pathlib.Path, machine: machines.Machine, done: str
) -> None:
    """Killed before its inode was noted."""
    path = tmp_path / "backup.hdd"
    start_and_die_at_once(machine, document(unix(tmp_path), one_file(path)))
    fd = scratch.create(str(path), "vda", 0)
    if done != "nothing":
        scratch.format(fd, 4 << 20, "vda")
    if done == "some of it":
        os.truncate(path, 70_000)
    with virtbackup.open(machine.uri) as conn:
        assert conn.lookupByID(1).backupCleanup() == [f"scratch image '{path}'"]
    assert not path.exists()


def test_a_server_while_somebody_else_listens_on_our_port(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    """At another address, with a client; and the server in QEMU is somebody else's, too."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        address = f'<address type="ip" host="127.0.0.1" port="{port}"/>'
        with socket.create_connection(listener.getsockname()), virtbackup.open(machine.uri) as conn:
            dom = conn.lookupByID(1)
            dom.backupStart(document(address))
            dom.backupStop()
            assert (
                machine.probe.reply("nbd-server-stop")["error"]["desc"] == "NBD server not running"
            )
            start_and_die_at_once(machine, document(address))
            theirs = {"type": "unix", "data": {"path": f"{tmp_path}/theirs.sock"}}
            machine.probe("nbd-server-start", addr=theirs)
            assert dom.backupCleanup() == []
            machine.probe("nbd-server-stop")


def test_a_start_that_cannot_listen_claims_no_server(
    tmp_path: pathlib.Path, machine: machines.Machine, state_dir: pathlib.Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        xml = document(f'<address type="ip" host="127.0.0.1" port="{port}"/>')
        with socket.create_connection(listener.getsockname()), virtbackup.open(machine.uri) as conn:
            dom = conn.lookupByID(1)
            with pytest.raises(virtbackup.Error, match=f"cannot listen on 127.0.0.1:{port}"):
                dom.backupStart(xml)
    assert list(state_dir.glob("*.json")) == []


def test_what_cannot_be_removed_is_said(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    """Somebody has put a node over our image's."""
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        dom.backupStart(document(unix(tmp_path), '<disk name="sdb" present="no"/>'))
        nodes = [node["node-name"] for node in machine.probe("query-named-block-nodes")]
        [image] = [name for name in nodes if name.endswith("-scr")]
        over = {"node_name": "theirs", "read_only": True, "file": image}
        machine.probe("blockdev-add", driver="raw", **over)
        dom.backupStop()
        for call in (dom.backupCleanup, lambda: dom.backupStart(document(unix(tmp_path)))):
            with pytest.raises(virtbackup.Error, match=f"cannot be removed.*node '{image}'"):
                call()
        machine.probe("blockdev-del", node_name="theirs")
        assert dom.backupCleanup() == [f"node '{image}'"]
        assert machine.state() == before


def test_a_process_that_nobody_has_waited_for_is_dead(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    code = (
        "import os, signal, sys, virtbackup\n"
        "dom = virtbackup.open(sys.argv[1]).lookupByID(1)\n"
        "dom.backupStart(sys.argv[2], virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    argv = [sys.executable, "-c", code, machine.uri, document(unix(tmp_path))]
    with subprocess.Popen(argv) as zombie:
        stat = pathlib.Path(f"/proc/{zombie.pid}/stat")
        waiting.until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
        with virtbackup.open(machine.uri) as conn:
            conn.lookupByID(1).backupStart(document(unix(tmp_path)))
            conn.lookupByID(1).backupStop()


def test_a_relative_scratch_directory(
    tmp_path: pathlib.Path, machine: machines.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", "here")
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(document(unix(tmp_path)))
        assert f'dir="{tmp_path}/here"' in dom.backupGetXMLDesc()
        dom.backupStop()
