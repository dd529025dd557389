# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fake QEMU against a real one: the same commands, right and wrong, and the same answers."""

import dataclasses
import difflib
import json
import pathlib
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

import virtbackup
from tests import recordings, replayed, waiting
from tests.live import certificates, machines
from virtbackup.conf import backup_conf
from virtbackup.qemu import recorder, recording, traffic
from virtbackup.test import fake_server

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-storage-daemon", "qemu-img")

DATA = pathlib.Path(__file__).parents[1] / "fakedata"
CONVERSATIONS = sorted(DATA.glob("*.jsonl"))
SIZE = 64 << 20
QUERIES = (
    "qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "query-name",
    "query-uuid", "query-status", "query-block", "query-named-block-nodes", "query-jobs",
    "query-block-exports", "x-debug-query-block-graph", "query-fdsets",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Effect:
    """The event by which a command's effect is known."""

    name: str
    status: str | None = None

    def has_come(self, event: dict[str, Any]) -> bool:
        status = event.get("data", {}).get("status")
        return event["event"] == self.name and self.status in (None, status)


_EFFECTS = {
    "job-cancel": Effect("JOB_STATUS_CHANGE", "concluded"),
    "block-job-cancel": Effect("JOB_STATUS_CHANGE", "concluded"),
    "blockdev-create": Effect("JOB_STATUS_CHANGE", "concluded"),
    "block-export-del": Effect("BLOCK_EXPORT_DELETED"),
}


class Client:
    """A QMP client that knows nothing of the package, and keeps all that is said."""

    def __init__(self, path: pathlib.Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(waiting.DEADLINE)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self.lines = [recording.Line("<-", json.loads(self._file.readline()))]

    def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to MESSAGE, which has taken its effect: some QEMUs reply before."""
        self._socket.sendall(json.dumps(message).encode())
        self.lines.append(recording.Line("->", message))
        events: list[dict[str, Any]] = []
        while "event" in (reply := self._next()):
            events.append(reply)
        effect = _EFFECTS.get(message.get("execute", ""))
        while effect and "return" in reply and not any(map(effect.has_come, events)):
            events.append(self._next())
        return reply

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._file.readline())
        self.lines.append(recording.Line("<-", message))
        return message

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    """vda over a base, sdb, a CD-ROM with a medium and one without, sdd with a drive's id, and sdt
    and sdr under filters; images for scratch."""
    base = machines.image(tmp_path / "base.qcow2", SIZE, "qcow2")
    machines.image(tmp_path / "vda.qcow2", SIZE, "qcow2", backing=base)
    machines.image(tmp_path / "sdb.raw", SIZE)
    machines.image(tmp_path / "install.iso", 8 << 20)
    machines.image(tmp_path / "plain.raw", SIZE)
    machines.image(tmp_path / "sdd.raw", SIZE)
    machines.image(tmp_path / "sdt.qcow2", SIZE, "qcow2")
    machines.image(tmp_path / "sdr.raw", SIZE)
    certificates.keys(tmp_path / "keys")
    for name, size in (("s1", SIZE), ("s2", SIZE), ("small", SIZE // 2)):
        machines.image(tmp_path / f"{name}.qcow2", size, "qcow2")
    with machines.qemu(
        tmp_path, "-name", "demo",
        "-blockdev", f"file,node-name=Af,filename={tmp_path}/vda.qcow2",
        "-blockdev", "qcow2,node-name=A,file=Af",
        "-device", "virtio-blk,drive=A,id=vda",
        "-device", "virtio-scsi,id=scsi0",
        "-blockdev", f"raw,node-name=B,file.driver=file,file.filename={tmp_path}/sdb.raw",
        "-device", "scsi-hd,drive=B,id=sdb",
        "-blockdev",
        f"raw,node-name=C,read-only=on,file.driver=file,file.filename={tmp_path}/install.iso",
        "-device", "scsi-cd,drive=C,id=cdrom",
        "-device", "scsi-cd,id=empty",
        "-drive", f"file={tmp_path}/sdd.raw,format=raw,if=none,id=drive-d,node-name=D",
        "-device", "scsi-hd,drive=drive-d,id=sdd",
        "-object", "throttle-group,id=limits",
        "-blockdev", f"file,node-name=Tf,filename={tmp_path}/sdt.qcow2",
        "-blockdev", "qcow2,node-name=Tt-image,file=Tf",
        "-blockdev", "throttle,node-name=Tt,throttle-group=limits,file=Tt-image",
        "-device", "scsi-hd,drive=Tt,id=sdt",
        "-blockdev", f"file,node-name=Rf,filename={tmp_path}/sdr.raw",
        "-blockdev", "copy-on-read,node-name=Rr,file.driver=raw,file.file=Rf",
        "-device", "scsi-hd,drive=Rr,id=sdr",
    ) as machine:  # fmt: skip
        yield machine


def recorded(client: Client) -> recording.Recording:
    for id, name in enumerate(QUERIES, 1):
        client({"execute": name, "id": id})
    client({"execute": "qom-list", "arguments": {"path": "/objects"}, "id": 0})
    return recording.Recording(tuple(client.lines))


@pytest.mark.parametrize("path", CONVERSATIONS, ids=lambda path: path.stem)
def test_answers_are_those_of_a_real_qemu(
    path: pathlib.Path, machine: machines.Machine, tmp_path: pathlib.Path
) -> None:
    commands = [
        json.loads(line.replace("{dir}", str(tmp_path))) for line in path.read_text().splitlines()
    ]
    real = Client(machine.qmp)
    start = recorded(real)
    expected = [[command, replayed.comparable(real(command))] for command in commands]
    real.close()
    machine.close()
    with fake_server.Server(tmp_path / "fake.sock", start) as server:
        fake = Client(server.path)
        fake({"execute": "qmp_capabilities"})
        found = [[command, replayed.comparable(fake(command))] for command in commands]
        fake.close()
    assert_same(expected, found)


def assert_same(expected: list[Any], found: list[Any]) -> None:
    differences = []
    for one, other in zip(expected, found, strict=True):
        real, fake = (json.dumps(x, indent=1, sort_keys=True).splitlines() for x in (one, other))
        if real != fake:
            differences += [
                f"real and fake on {json.dumps(one[0])}",
                *difflib.unified_diff(real, fake, n=1, lineterm=""),
            ]
    assert not differences, "\n".join(differences)


@pytest.mark.parametrize("binary", ["qemu-system-x86_64", "qemu-storage-daemon"])
def test_a_fake_is_recorded_as_the_qemu_that_it_was_made_from(
    binary: str, tmp_path: pathlib.Path
) -> None:
    """The driver says the same to it, and it answers the same."""
    real = recordings.record(binary)
    with fake_server.Server(tmp_path / "fake.sock", real) as server:
        fake = recorder.Recorder(str(server.path)).record()
    commands = [traffic.comparable(found.lines) for found in (real, fake)]
    assert traffic.diff(commands[0], commands[1], ("real", "fake")) == []
    answers = [
        [[exchange.execute, replayed.comparable(exchange.reply)] for exchange in found.exchanges()]
        for found in (real, fake)
    ]
    assert_same(*answers)


# --- its NBD server, under real clients ---


@pytest.fixture
def started(tmp_path: pathlib.Path) -> Iterator[tuple[virtbackup.Domain, str]]:
    """A backup of a fake QEMU, and the address of its exports."""
    address = f"{tmp_path}/nbd.sock"
    with virtbackup.open("test:///default") as connection:
        [domain] = connection.listAllDomains()
        domain.backupStart(f'<domainbackup><address type="unix" path="{address}"/></domainbackup>')
        yield domain, address


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.needs("nbdinfo", "nbdcopy")
def test_clients_read_what_is_exported(
    started: tuple[virtbackup.Domain, str], tmp_path: pathlib.Path
) -> None:
    domain, address = started
    listed = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={address}"))
    assert [export["export-name"] for export in listed["exports"]] == ["sdb", "vda"]
    uri = f"nbd+unix:///vda?socket={address}"
    mapped = json.loads(run("nbdinfo", "--json", "--map", uri))
    assert [(extent["offset"], extent["type"]) for extent in mapped] == [(0, 0), (1 << 20, 3)]
    copies = [tmp_path / "nbdcopy.raw", tmp_path / "qemu-img.raw"]
    run("nbdcopy", uri, str(copies[0]))
    run("qemu-img", "convert", "-O", "raw", uri, str(copies[1]))
    data = [path.read_bytes() for path in copies]
    assert data[0] == data[1]
    assert data[0].startswith(b"/images/vda.qcow2 sector 0\n")
    assert domain.backupStop() == 0


@pytest.mark.needs("nbdinfo")
def test_with_tls_nobody_is_let_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not simulated, beyond the monitor; so nothing is shown that was to be hidden."""
    certificates.keys(tmp_path / "keys")
    (tmp_path / "conf").write_text(f'backup_tls_psk_dir = "{tmp_path}/keys"')
    monkeypatch.setenv("VIRTBACKUP_CONF", str(tmp_path / "conf"))
    address = '<address type="ip" host="127.0.0.1" port="0" tls="yes"/>'
    with virtbackup.open("test:///default") as connection:
        [domain] = connection.listAllDomains()
        domain.backupStart(f"<domainbackup>{address}</domainbackup>")
        found = domain.backupGetInfo().address
        assert isinstance(found, backup_conf.IpAddress)
        done = subprocess.run(
            ["nbdinfo", f"nbd://127.0.0.1:{found.port}/vda"], capture_output=True, timeout=60
        )
        assert done.returncode != 0
        assert domain.backupStop() == 0
        assert domain.backupCleanup() == []


@pytest.mark.needs("nbdinfo")
def test_a_stop_cuts_clients_off(started: tuple[virtbackup.Domain, str]) -> None:
    domain, address = started
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(waiting.DEADLINE)
        client.connect(address)
        assert client.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGIC")
        assert domain.backupStop() == 0
        assert client.recv(1) == b""
