# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in examples/ and systemd/, and rpc-dump, as people use them."""

import contextlib
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

import virtbackup
from tests import daemon_scene, waiting
from tests.live import machines

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

ROOT = pathlib.Path(__file__).parents[2]
MIB = 1 << 20
PULL = "<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>"


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    with machines.two_disks(tmp_path, size=2 * MIB) as one:
        one.io("vda", f"write -P 5 0 {MIB}")
        yield one


@pytest.fixture
def socket(tmp_path: pathlib.Path, machine: machines.Machine) -> Iterator[pathlib.Path]:
    """Of a daemon that serves the machine."""
    with daemon_scene.running(tmp_path, machine.uri) as served:
        yield served.path


def name_of(machine: machines.Machine) -> str:
    with virtbackup.open(machine.uri) as connection:
        return connection.listAllDomains()[0].name()


@pytest.mark.parametrize("by_daemon", [False, True])
def test_the_client(
    tmp_path: pathlib.Path, machine: machines.Machine, socket: pathlib.Path, by_daemon: bool
) -> None:
    uri = f"virtbackup+unix://{socket}" if by_daemon else machine.uri
    out = tmp_path / "out.raw"
    argv = [sys.executable, str(ROOT / "examples" / "client.py"), uri, name_of(machine)]
    subprocess.run([*argv, str(tmp_path / "nbd.sock"), str(out)], check=True, timeout=60)
    assert out.read_bytes() == bytes([5]) * MIB + bytes(MIB)


@contextlib.contextmanager
def events(uri: str, output: pathlib.Path) -> Iterator[None]:
    """event_test.py, waiting."""
    argv = [sys.executable, str(ROOT / "examples" / "event_test.py"), uri]
    with output.open("wb") as file, subprocess.Popen(argv, stdout=file) as watching:
        try:
            waiting.until(lambda: "waiting for events" in output.read_text())
            yield
        finally:
            watching.send_signal(signal.SIGINT)
    assert watching.returncode == 0


def test_events_by_our_own_api(
    tmp_path: pathlib.Path, machine: machines.Machine, socket: pathlib.Path
) -> None:
    output = tmp_path / "events"
    with (
        events(f"virtbackup+unix://{socket}", output),
        virtbackup.open(f"virtbackup+unix://{socket}") as connection,
    ):
        [domain] = connection.listAllDomains()
        for cancel in (0, virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL):
            domain.backupStart(
                f"<domainbackup><address type='unix' path='{tmp_path}/n'/></domainbackup>"
            )
            domain.backupStop(cancel)
        last = "not good: the backup was cancelled"
        waiting.until(lambda: last in output.read_text())
    said = [line for line in output.read_text().splitlines() if "backup ended" in line]
    assert said == [
        f"backup ended EVENT: Domain {domain.name()}(1) good",
        f"backup ended EVENT: Domain {domain.name()}(1) {last}",
    ]


@pytest.mark.needs("virsh")
def test_events_as_libvirts_clients_see_them(
    tmp_path: pathlib.Path, machine: machines.Machine, socket: pathlib.Path
) -> None:
    uri, output = f"qemu:///system?socket={socket}", tmp_path / "events"
    (tmp_path / "pull.xml").write_text(PULL.format(tmp_path / "nbd.sock"))
    with events(uri, output):
        for command in ("suspend 1", "resume 1", f"backup-begin 1 {tmp_path}/pull.xml"):
            subprocess.run(["virsh", "-c", uri, *command.split()], check=True)
        subprocess.run(["virsh", "-c", uri, "domjobabort", "1"], check=True)
        waiting.until(lambda: "job completed EVENT" in output.read_text())
    said = output.read_text()
    assert "lifecycle EVENT: Domain " in said
    assert "Suspended" in said
    assert "'success': True" in said


@pytest.mark.needs("virsh")
def test_rpc_dump(tmp_path: pathlib.Path, machine: machines.Machine, socket: pathlib.Path) -> None:
    proxy, output = tmp_path / "proxy", tmp_path / "dump"
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "rpc-dump", f"unix:{socket}"]
    argv += ["--listen", f"unix:{proxy}", "--clients", "2"]
    with output.open("wb") as file, subprocess.Popen(argv, stdout=file) as dumping:
        waiting.until(proxy.exists)
        virsh = ["virsh", "-c", f"qemu:///system?socket={proxy}", "domstate", "1"]
        done = subprocess.run(virsh, check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "running"
        with virtbackup.open(f"virtbackup+unix://{proxy}") as connection:
            assert connection.listAllDomains()
        assert dumping.wait(waiting.DEADLINE) == 0
    said = output.read_text().splitlines()
    assert said[0] == f"unix:{proxy}"
    assert said[1] == "1 connected"
    assert any(" -> REMOTE.DOMAIN_GET_STATE serial=" in line for line in said)
    assert any("REPLY DomainGetStateRet(state=1, reason=" in line for line in said)
    assert any(line.startswith("2 ") and "VIRTBACKUP.SUPPORTED" in line for line in said)
    assert not proxy.exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["tls:h:1"], "what goes over tls cannot be read on the way"),
        (["/x"], "'/x' is none of unix:PATH, tcp:HOST:PORT, tls:HOST:PORT"),
        (["unix:/x", "--listen", "unix:rel"], "the path of a unix socket is absolute"),
        (["unix:/x", "--listen", "unix:/nope/x"], "cannot listen on 'unix:/nope/x'"),
        (["unix:/x", "--listen", "tcp:0.0.0.0:0"], "whoever reaches 0.0.0.0 would be you"),
        (["unix:/x", "--listen", "tcp::0"], "'tcp::0': whoever reaches this host would be you"),
        (["unix:/x", "--clients", "0"], "--clients is how many, one or more"),
    ],
)
def test_rpc_dump_of_what_makes_no_sense(words: list[str], text: str) -> None:
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "rpc-dump", *words]
    done = subprocess.run(
        argv, check=False, capture_output=True, text=True, timeout=waiting.DEADLINE
    )
    assert done.returncode in (1, 2)
    assert text in done.stderr


def test_the_settings_are_valid(tmp_path: pathlib.Path) -> None:
    """As they are, and with every one of them set."""
    text = (ROOT / "systemd" / "virtbackup.conf").read_text()
    every = "\n".join(
        line[1:] if line.startswith("#") and not line.startswith("# ") else line
        for line in text.splitlines()
    ).replace("backup_tls_psk", "#backup_tls_psk")
    for number, content in enumerate((text, every)):
        path = tmp_path / f"{number}.conf"
        path.write_text(content)
        done = subprocess.run(
            [sys.executable, "-m", "virtbackup.tools.virtbackupd", "--check-config",
             "--config", str(path), "--uri", "test:///default"],
            check=False, capture_output=True, text=True, timeout=waiting.DEADLINE,
        )  # fmt: skip
        assert (done.stdout, done.stderr) == ("configuration is good\n", "")
