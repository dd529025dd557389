# SPDX-License-Identifier: LGPL-2.1-or-later
"""backup-serve: what it exports is the point, and it leaves nothing and changes nothing."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests import waiting
from tests.live import nbdclient, points
from virtbackup.tools import chain, serve

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-storage-daemon", "nbdcopy"),
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("unknown_qemu"),  # or there is more in the state directory
]

SHELL = (sys.executable, "-m", "virtbackup.tools.virsh_backup")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> points.Backed:
    """Four points, never to be changed."""
    return points.pulled(tmp_path_factory.mktemp("whole"))


class Served:
    """A backup-serve that runs."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, process.communicate()
            text += line
        self.facts = json.loads(text)
        self.exports: dict[str, str] = self.facts["exports"]

    def daemon(self) -> int:
        """The pid of the server."""
        pid = self.process.pid
        [child] = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)


@contextlib.contextmanager
def served(backed: points.Backed, *options: str) -> Iterator[Served]:
    process = subprocess.Popen(
        [*SHELL, "backup-serve", str(backed.directory), *options, "--json"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Served(process)
    finally:
        process.kill()
        process.communicate()


def state(directory: pathlib.Path) -> dict[str, str]:
    return {
        path.name: f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in directory.iterdir()
    }


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return b"\0" not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_point(whole: points.Backed, state_dir: pathlib.Path, number: signal.Signals) -> None:
    before = state(whole.directory)
    with served(whole, "--point=2") as one:
        assert one.facts["point"]["number"] == 2
        daemon = one.daemon()
        for disk, uri in one.exports.items():
            assert nbdclient.read_uri(uri) == whole.shown[2][disk]
        argv = ["nbdcopy", "/dev/null", one.exports["vda"]]
        assert subprocess.run(argv, capture_output=True).returncode
        assert {path.stat().st_mode & 0o777 for path in state_dir.iterdir()} == {0o700}
        one.process.send_signal(number)
        _, err = one.process.communicate(timeout=waiting.DEADLINE)
        assert (one.process.returncode, err) == (0, "")
    assert gone(daemon)
    assert list(state_dir.iterdir()) == []
    assert state(whole.directory) == before


@pytest.mark.parametrize("name", [b"s, x", b"s=\xff,,\n%"], ids=ascii)
def test_one_disk_at_a_path(whole: points.Backed, tmp_path: pathlib.Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    with served(whole, "--disk=sdb", f"--unix={path}") as one:
        assert nbdclient.read_uri(one.exports["sdb"]) == whole.shown[4]["sdb"]
        assert list(one.exports) == ["sdb"]
        assert path.stat().st_mode & 0o77 == 0
        again = points.run("backup-serve", str(whole.directory), f"--unix={path}")
        assert again[:2] == (1, "")
        assert again[2].endswith(" exists already\n")
        one.process.send_signal(signal.SIGINT)
        one.process.communicate(timeout=waiting.DEADLINE)
    assert not path.exists()


def test_a_socket_that_is_left_over(whole: points.Backed, tmp_path: pathlib.Path) -> None:
    """Of a server that was killed; a file that is called so is somebody's."""
    path = tmp_path / "s"
    with served(whole, "--disk=sdb", f"--unix={path}") as one:
        daemon = one.daemon()
        waiting.stop(one.process)  # who would clear up after the other
        os.kill(daemon, signal.SIGKILL)
        one.process.kill()
        one.process.communicate(timeout=waiting.DEADLINE)
        waiting.until(lambda: gone(daemon))
    assert path.is_socket()
    with chain.locked(tmp_path):
        status, out, err = points.run("backup-serve", str(whole.directory), f"--unix={path}")
        assert (status, out) == (1, "")
        assert f"cannot listen at {path}: Resource temporarily unavailable" in err
    assert path.is_socket()
    with served(whole, "--disk=sdb", f"--unix={path}") as one:
        assert nbdclient.read_uri(one.exports["sdb"]) == whole.shown[4]["sdb"]
        one.process.send_signal(signal.SIGINT)
        one.process.communicate(timeout=waiting.DEADLINE)
    path.write_text("mine")
    status, out, err = points.run("backup-serve", str(whole.directory), f"--unix={path}")
    assert (status, out, path.read_text()) == (1, "", "mine")
    assert err.endswith(f"{path} exists already\n")


def test_a_socket_in_a_directory_that_is_pulled_into(
    whole: points.Backed, tmp_path: pathlib.Path
) -> None:
    """A pull holds it for as long as it takes."""
    backed = whole.copy(tmp_path / "backups")
    path = backed.directory / "s"
    with (
        chain.locked(backed.directory),
        served(backed, "--disk=sdb", f"--unix={path}") as one,
    ):
        assert nbdclient.read_uri(one.exports["sdb"]) == backed.shown[4]["sdb"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_takes_its_time_to_come_up(
    whole: points.Backed, tmp_path: pathlib.Path, state_dir: pathlib.Path, number: signal.Signals
) -> None:
    """As one with many files does; nobody has to wait for it to be rid of it."""
    program, pid = tmp_path / "qemu-storage-daemon", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > '{pid}.new'; mv '{pid}.new' '{pid}'; exec sleep 60\n")
    program.chmod(0o755)
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "backup-serve"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(
        [*argv, str(whole.directory)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        waiting.until(pid.exists)
        process.send_signal(number)
        out, err = process.communicate(timeout=50)
    assert (process.returncode, out, err) == (0, "", "")
    assert gone(int(pid.read_text()))
    assert list(state_dir.iterdir()) == []


def test_links_that_lead_out_of_the_directory(whole: points.Backed, tmp_path: pathlib.Path) -> None:
    """To an image that was put elsewhere; what has something else is not given away."""
    backed, away = whole.copy(tmp_path / "backups"), tmp_path / "away.qcow2"
    path = backed.directory / "vda.0001.qcow2"
    path.rename(away)
    path.symlink_to(away)
    with served(backed) as one:
        assert nbdclient.read_uri(one.exports["vda"]) == whole.shown[4]["vda"]
        one.process.send_signal(signal.SIGINT)
        _, err = one.process.communicate(timeout=waiting.DEADLINE)
    assert err == f"warning: {path} is not in the directory and is checked first\n"
    points.flip(away, points.find_data(away, 9))
    status, out, err = points.run("backup-serve", str(backed.directory))
    assert (status, out) == (1, "")
    assert f"disk 'vda': {away} is not good: it is not what was backed up: its checksum" in err
    with served(backed, "--disk=sdb") as one:
        assert nbdclient.read_uri(one.exports["sdb"]) == whole.shown[4]["sdb"]
    link = tmp_path / "link"
    link.symlink_to(whole.directory)
    with served(points.Backed(link), "--disk=vda") as one:
        assert nbdclient.read_uri(one.exports["vda"]) == whole.shown[4]["vda"]
        one.process.send_signal(signal.SIGINT)
        assert one.process.communicate(timeout=waiting.DEADLINE)[1] == ""


def _daemon() -> str:
    found = shutil.which(serve.PROGRAM)
    assert found is not None
    return found


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("prefix", [(), ("unshare", "--pid", "--kill-child")], ids=["", "pid"])
@pytest.mark.parametrize("how", ["data file", "link"])
def test_an_image_that_is_another_once_it_was_looked_at(
    whole: points.Backed,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    prefix: tuple[str, ...],
) -> None:
    """By who may write to the directory, and not read what it leads to now; where /proc has other
    pids than this process knows, too."""
    if prefix and os.geteuid() != 0:
        pytest.skip("wants root")
    backed, secret = whole.copy(tmp_path / "backups"), tmp_path / "secret"
    secret.write_bytes(b"s" * points.SIZE)
    path, other = backed.directory / "vda.0001.qcow2", tmp_path / "other"
    if how == "link":
        secret.rename(tmp_path / "plain")
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "plain", "secret"]
        subprocess.run(argv, check=True, cwd=tmp_path)
        other.symlink_to(secret)
    else:
        options = f"data_file={secret},data_file_raw=on"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(other)]
        subprocess.run([*argv, str(points.SIZE)], check=True)
        secret.write_bytes(b"s" * points.SIZE)
    put_first(tmp_path / "bin", monkeypatch, f'mv {other} {path}\nexec {_daemon()} "$@"')
    refusal = (
        f"error: operation failed: {backed.directory} was changed while it was opened, and leads"
        f" to {secret}\n"
    )
    argv = [*prefix, *SHELL, "backup-serve", str(backed.directory), "--point=1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", refusal)


def put_first(directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have SCRIPT be the server."""
    directory.mkdir()
    program = directory / serve.PROGRAM
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_a_server_that_ends_as_it_begins(
    whole: points.Backed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its file is there, before it is looked at."""
    wait = serve._wait_until_it_listens

    def wait_for_its_end(server: serve.Server, *more: Any) -> None:
        wait(server, *more)
        os.waitid(os.P_PID, server.process.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(serve, "_wait_until_it_listens", wait_for_its_end)
    put_first(tmp_path / "bin", monkeypatch, 'for last; do :; done; exec touch "$last" /nope/x')
    status, out, err = points.run("backup-serve", str(whole.directory))
    assert (status, out) == (1, "")
    assert err.startswith(f"error: operation failed: {serve.PROGRAM}: touch: ")


def test_tcp(whole: points.Backed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        status, out, err = points.run("backup-serve", str(whole.directory), f"--port={port}")
        assert (status, out) == (1, "")
        assert "error: operation failed: qemu-storage-daemon: " in err
        assert err.endswith("Address already in use\n")
    with served(whole, f"--port={port}") as one:
        assert one.exports["vda"] == f"nbd://127.0.0.1:{port}/vda"
        assert nbdclient.read_uri(one.exports["vda"]) == whole.shown[4]["vda"]
    with served(whole, "--host=0.0.0.0", f"--port={port}", "--insecure") as one:
        assert nbdclient.read_uri(f"nbd://127.0.0.1:{port}/vda") == whole.shown[4]["vda"]
    status, _, err = points.call(
        "backup-serve", str(whole.directory), "--host=198.51.100.1", "--port=7"
    )
    assert status == 1
    assert err.startswith("warning: whoever reaches 198.51.100.1 can read the backup")
    for wrong in ("--port=0", "--port=65536"):
        assert points.call("backup-serve", str(whole.directory), wrong)[0] == 2
    assert points.call("backup-serve", str(whole.directory), "--port=7", "--unix=/x")[0] == 2


def test_the_server_ends_with_a_killed_process(whole: points.Backed) -> None:
    with served(whole) as one:
        daemon = one.daemon()
        one.process.kill()
        one.process.wait()
        waiting.until(lambda: gone(daemon))


def test_a_killed_server_is_told(whole: points.Backed) -> None:
    with served(whole) as one:
        os.kill(one.daemon(), signal.SIGKILL)
        _, err = one.process.communicate(timeout=waiting.DEADLINE)
        assert one.process.returncode == 1
        assert err == "error: operation failed: qemu-storage-daemon: it ended with status -9\n"


def test_what_cannot_be_served(whole: points.Backed, tmp_path: pathlib.Path) -> None:
    backed = whole.copy(tmp_path / "backups")
    (backed.directory / "vda.0001.qcow2").unlink()
    status, _, err = points.call("backup-serve", str(backed.directory))
    assert status == 1
    assert "vda.0001.qcow2 is not good: it is missing" in err
    assert points.call("backup-serve", str(backed.directory), "--disk=x")[0] == 1
    status, _, err = points.call("backup-serve", str(whole.directory), f"--unix=/{'x' * 200}")
    assert status == 1
    assert err.count("\n") == 1
    path = backed.directory / "manifest.0004.json"
    points.flip(path, path.read_bytes().index(b"<domain "))
    status, _, err = points.call("backup-serve", str(backed.directory))
    assert status == 1
    assert err.startswith("warning: manifest.0004.json: it is not as it was written: its own")


def test_the_file_that_cannot_be_opened_is_told(tmp_path: pathlib.Path) -> None:
    """And not how many are before it."""
    backed = points.built(tmp_path / "backups", 1 << 20, [{0: number} for number in range(20)])
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "backup-serve"]
    done = subprocess.run(
        ["prlimit", "--nofile=24:24", *argv, str(backed.directory)],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(
        "error: operation failed: qemu-storage-daemon: Could not open"
        rf" '{backed.directory}/vda\.[0-9]*\.qcow2': Too many open files\n",
        done.stderr,
    )


def test_no_private_directory(whole: points.Backed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", "/proc/x")
    status, _, err = points.call("backup-serve", str(whole.directory))
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("error: cannot make a directory in /proc/x")
