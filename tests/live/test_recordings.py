# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recording a real QEMU: twice the same, the guest untouched, and nothing left of a failure."""

import pathlib
import signal
import subprocess

import pytest

from tests import conftest, recordings
from tests.live import machines, signalled
from virtbackup.qemu import recording
from virtbackup.tools import virsh_backup

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-storage-daemon", "qemu-img"),
    pytest.mark.usefixtures("unknown_qemu"),
]

BINARIES = ("qemu-system-x86_64", "qemu-storage-daemon")

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("binary", BINARIES)
def test_twice_the_same_and_as_shipped(binary: str) -> None:
    first, second = (recordings.record(binary) for _ in range(2))
    text = recording.format(first.lines)
    assert recording.format(second.lines) == text
    shipped = recordings.default_path(binary, first)
    if shipped.exists():
        theirs = recording.parse(shipped.read_text())
        if theirs.greeting == first.greeting:  # the same package, even
            assert text == shipped.read_text(), "./dev record makes it anew"


@pytest.mark.parametrize("binary", BINARIES)
def test_by_the_shell_twice_from_one_qemu(
    binary: str, tmp_path: pathlib.Path, capsys: Capture
) -> None:
    file = tmp_path / "a.jsonl"
    trace = tmp_path / "trace"
    with recordings.running(binary) as machine:
        before = machine.state()
        argv = ["-c", machine.uri, "--trace", str(trace), "monitor-record", str(file)]
        assert virsh_backup.main(argv) == 0
        assert capsys.readouterr() == (f"Monitor recorded to {file}\n", "")
        assert virsh_backup.main(["-c", machine.uri, "monitor-record", "-"]) == 0
        assert capsys.readouterr().out.rstrip("\n") == file.read_text().rstrip("\n")
        assert machine.state() == before
    found = recording.parse(file.read_text())
    assert found.reply("query-version")
    assert recording.parse_trace(trace.read_text()).greeting == found.greeting


def record(machine: machines.Machine, file: pathlib.Path, *options: str) -> int:
    return virsh_backup.main(["-c", machine.uri, *options, "monitor-record", str(file)])


def test_what_cannot_be_recorded_leaves_no_file(tmp_path: pathlib.Path, capsys: Capture) -> None:
    file = tmp_path / "a.jsonl"
    with machines.two_disks(tmp_path, "-name", "vm") as machine:
        before = machine.state()
        assert record(machine, file, "-r") == 1
        assert capsys.readouterr().err == (
            "error: operation forbidden: read only access prevents monitor-record\n"
        )
        file.touch()
        assert record(machine, file) == 1
        assert capsys.readouterr().err == f"error: file '{file}' exists\n"
        file.unlink()
        assert record(machine, tmp_path / "nowhere" / "a") == 1
        assert "a': No such file or directory" in capsys.readouterr().err
        assert machine.state() == before

        start = ["backup-start-as", "vm", "--unix", f"{tmp_path}/nbd.sock"]
        assert virsh_backup.main(["-c", machine.uri, *start]) == 0
        running = machine.state()
        capsys.readouterr()
        assert record(machine, file) == 1
        assert "is running: backup-stop ends it" in capsys.readouterr().err
        assert machine.state() == running
        assert virsh_backup.main(["-c", machine.uri, "backup-stop", "vm"]) == 0

        # Somebody else has the NBD server.
        addr = {"type": "unix", "data": {"path": f"{tmp_path}/other.sock"}}
        machine.probe("nbd-server-start", addr=addr)
        capsys.readouterr()
        assert record(machine, file) == 1
        assert "NBD server is already in use" in capsys.readouterr().err
        machine.probe("nbd-server-stop")
        assert machine.state() == before
    assert record(machine, file) == 1
    assert "failed to connect to monitor socket" in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_leaves_the_guest_as_it_was(
    number: signal.Signals, tmp_path: pathlib.Path, state_dir: pathlib.Path
) -> None:
    """At a line that goes over the monitor, each time a later one, to the end."""
    file = tmp_path / "a.jsonl"
    with machines.two_disks(tmp_path) as machine:
        before = machine.state()
        line = 3
        while True:
            argv = signalled.program(number, line)
            argv += ["-q", "-c", machine.uri, "monitor-record", str(file)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
            assert machine.state() == before, line
            assert [path.name for path in state_dir.iterdir() if path.suffix == ".json"] == []
            if done.returncode == 0:
                break
            assert done.returncode == 128 + number, (line, done.stderr)
            assert done.stderr.startswith("error: interrupted")
            assert not file.exists()
            line += 2 if conftest.long() else 40
        assert line > 60
