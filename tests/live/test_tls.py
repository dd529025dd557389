# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exports over TLS: who may read them, and that nothing of it is left in QEMU."""

import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

import virtbackup
from tests import conftest
from tests.live import callers, certificates, crashing, machines, nbdclient, places, proxy
from virtbackup.conf import backup_conf
from virtbackup.nbd import connection
from virtbackup.tools import pull, virsh_connection

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "nbdcopy", "nbdinfo", "openssl")

SIZE = 1 << 20
TCP = '<address type="ip" host="127.0.0.1" autoport="yes" tls="yes"/>'


@pytest.fixture(scope="module")
def pki() -> Iterator[pathlib.Path]:
    """A server's directory, with a client's certificate below it; QEMU sees it, too."""
    with tempfile.TemporaryDirectory(prefix="vb-tls-", dir="/var/tmp") as name:
        made = pathlib.Path(name) / "server"
        certificates.authority(made)
        certificates.server(made)
        _client_of(made, "client")
        certificates.authority(pathlib.Path(name) / "others")
        certificates.client(pathlib.Path(name) / "others")
        shutil.copy(made / "ca-cert.pem", pathlib.Path(name) / "others" / "ca-cert.pem")
        (made / "nobody").mkdir()
        shutil.copy(made / "ca-cert.pem", made / "nobody")
        certificates.keys(pathlib.Path(name) / "keys", "me")
        yield made


def _client_of(authority: pathlib.Path, name: str) -> None:
    certificates.client(authority)
    (authority / name).mkdir()
    for file in ("client-cert.pem", "client-key.pem"):
        (authority / file).rename(authority / name / file)
    shutil.copy(authority / "ca-cert.pem", authority / name)


class Settings:
    """virtbackup.conf."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def set(self, **values: str) -> None:
        lines = (f'backup_tls_{name} = "{value}"\n' for name, value in values.items())
        self._path.write_text("".join(lines))

    def set_certificates(self, pki: pathlib.Path, **more: str) -> None:
        self.set(x509_cert_dir=str(pki), x509_client_cert_dir=str(pki / "client"), **more)

    def set_keys(self, pki: pathlib.Path) -> None:
        self.set(psk_dir=str(pki.parent / "keys"), psk_username="me")


@pytest.fixture
def settings(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    path = tmp_path / "virtbackup.conf"
    monkeypatch.setenv("VIRTBACKUP_CONF", str(path))
    made = Settings(path)
    made.set()
    return made


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[machines.Machine]:
    """One for all tests: each of them leaves it as it was."""
    with machines.two_disks(tmp_path_factory.mktemp("machine"), size=SIZE) as running:
        running.io("vda", f"write -P 7 0 {SIZE}")
        yield running


@pytest.fixture
def domain(machine: machines.Machine) -> Iterator[virtbackup.Domain]:
    with virtbackup.open(machine.uri) as connection:
        yield connection.lookupByID(1)


INET_ONLY = machines.version() < (7, 0, 0)
"""This QEMU does TLS on TCP addresses alone."""


def is_refused(domain: virtbackup.Domain, address: str) -> bool:
    """Whether it is a unix socket, which this QEMU does no TLS on, and that is said."""
    if 'type="unix"' not in address or not INET_ONLY:
        return False
    with pytest.raises(virtbackup.Error, match="no TLS for exports on a unix socket"):
        domain.backupStart(document(address))
    return True


def document(address: str) -> str:
    return f"<domainbackup>{address}</domainbackup>"


def objects(machine: machines.Machine) -> Any:
    """QEMU's TLS credentials."""
    found = machine.probe.reply("qom-list", path="/objects").get("return", [])
    return [one["name"] for one in found if "tls-creds" in one["type"]]


def uri_of(domain: virtbackup.Domain, **parameters: str) -> str:
    info = domain.backupGetInfo()
    [export, _] = [disk.export for disk in info.disks]
    uri = virsh_connection.nbd_uri(info.address, export)
    more = "&".join(f"{name.replace('_', '-')}={value}" for name, value in parameters.items())
    return f"{uri}{'&' if '?' in uri else '?'}{more}"


def refused(uri: str) -> str:
    """Why nbdinfo cannot connect."""
    done = subprocess.run(["nbdinfo", uri], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    return done.stderr


def addresses(directory: pathlib.Path) -> dict[str, str]:
    return {"tcp": TCP, "unix": f'<address type="unix" path="{directory}/nbd.sock" tls="yes"/>'}


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_only_who_has_a_certificate_may_read(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    settings: Settings,
    pki: pathlib.Path,
    tmp_path: pathlib.Path,
    kind: str,
) -> None:
    settings.set_certificates(pki)
    before, address = machine.state(), addresses(tmp_path)[kind]
    if is_refused(domain, address):
        return
    domain.backupStart(document(address))
    assert 'tls="yes"' in domain.backupGetXMLDesc()
    read = nbdclient.read_uri(uri_of(domain, tls_certificates=str(pki / "client")))
    assert read == bytes([7]) * SIZE
    for who in (pki / "nobody", pki.parent / "others"):
        assert "gnutls" in refused(uri_of(domain, tls_certificates=str(who)))
    plain = uri_of(domain, tls_certificates="/").replace("nbds", "nbd").partition("tls-")[0]
    assert "Operation not supported" in refused(plain.rstrip("?&"))
    assert domain.backupGetInfo().state == "running"
    domain.backupStop()
    assert (machine.state(), objects(machine)) == (before, [])


def test_everybody_may_read_where_clients_are_not_verified(
    machine: machines.Machine, domain: virtbackup.Domain, settings: Settings, pki: pathlib.Path
) -> None:
    settings.set_certificates(pki, x509_verify="no")
    domain.backupStart(document(TCP))
    nobody = uri_of(domain, tls_certificates=str(pki / "nobody"))
    assert nbdclient.read_uri(nobody) == bytes([7]) * SIZE
    domain.backupStop()
    assert objects(machine) == []


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_key_that_both_have(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    settings: Settings,
    pki: pathlib.Path,
    tmp_path: pathlib.Path,
    kind: str,
) -> None:
    settings.set_keys(pki)
    file = pki.parent / "keys" / "keys.psk"
    address = addresses(tmp_path)[kind]
    if is_refused(domain, address):
        return
    trace = tmp_path / "trace"
    with trace.open("w") as lines, virtbackup.open(machine.uri) as connection:
        connection.setTrace(lines)
        connection.lookupByID(1).backupStart(document(address))
    assert certificates.KEY not in trace.read_text()
    uri = uri_of(domain, tls_psk_file=str(file)).replace("127.0.0.1", "me@127.0.0.1")
    assert nbdclient.read_uri(uri.replace(":///", "://me@/")) == bytes([7]) * SIZE
    other = tmp_path / "other.psk"
    other.write_text(f"me:{certificates.KEY[::-1]}\n")
    assert "gnutls" in refused(uri.replace(":///", "://me@/").replace(str(file), str(other)))
    domain.backupStop()
    assert objects(machine) == []


@pytest.mark.parametrize(
    ("way", "host"),
    [
        ("certificates", "0.0.0.0"), ("certificates", "localhost"), ("certificates", "unix"),
        ("keys", "127.0.0.1"), ("keys", "unix"),
    ],
)  # fmt: skip
def test_a_pull_over_tls(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    settings: Settings,
    pki: pathlib.Path,
    tmp_path: pathlib.Path,
    way: str,
    host: str,
) -> None:
    settings.set_certificates(pki) if way == "certificates" else settings.set_keys(pki)
    before = machine.state()
    address = TCP.replace("127.0.0.1", host)
    address = addresses(tmp_path)["unix"] if host == "unix" else address
    if is_refused(domain, address):
        return
    pull.pull(domain, tmp_path / "out", xml=document(address), fmt="raw")
    assert (tmp_path / "out" / "vda.raw").read_bytes() == bytes([7]) * SIZE
    assert (machine.state(), objects(machine)) == (before, [])


def test_whether_an_export_can_be_read(
    domain: virtbackup.Domain, settings: Settings, pki: pathlib.Path
) -> None:
    settings.set_certificates(pki)
    domain.backupStart(document(TCP))
    address = domain.backupGetInfo().address
    assert isinstance(address, backup_conf.IpAddress)

    def why_not(tls: connection.Tls | None) -> str | None:
        return connection.unreadable(connection.Export(address.endpoint, "vda", tls), 20)

    assert why_not(connection.Tls(str(pki / "client"), verify=False)) is None
    for tls in (None, connection.Tls(str(pki / "nobody")), connection.Tls(psk_file="/nowhere")):
        with pytest.raises(virtbackup.Error, match="export 'vda'"):
            why_not(tls)
    domain.backupStop()


@pytest.mark.skipif(machines.version() < (10, 1, 0), reason="snapshots break from QEMU 10.1 on")
@pytest.mark.may_skip
def test_a_snapshot_that_breaks_is_seen(
    machine: machines.Machine, settings: Settings, pki: pathlib.Path, scratch_dir: pathlib.Path
) -> None:
    settings.set_certificates(pki)
    with places.small_file_system(scratch_dir, 4 << 20):
        _start_and_leave(machine)
        places.fill_up(scratch_dir)
        machine.io("vda", f"write -P 7 0 {SIZE}")
        with virtbackup.open(machine.uri) as conn:
            [vda, sdb] = conn.lookupByID(1).backupGetInfo().disks
            assert (vda.state, sdb.state) == ("failed", "running")
            assert "its snapshot is broken" in (vda.reason or "")
            with pytest.raises(virtbackup.Error, match="the backup is not good"):
                conn.lookupByID(1).backupStop()
    assert objects(machine) == []


def _start_and_leave(machine: machines.Machine) -> None:
    """By another process."""
    code = (
        "import sys, virtbackup\n"
        "virtbackup.open(sys.argv[1]).lookupByID(1).backupStart(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, machine.uri, document(TCP)], check=True)


def test_a_pull_whose_client_is_not_let_in(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    settings: Settings,
    pki: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    settings.set(x509_cert_dir=str(pki), x509_client_cert_dir=str(pki / "nobody"))
    before = machine.state()
    with pytest.raises(virtbackup.Error, match=r"cannot (connect to|open|read|talk to) export"):
        pull.pull(domain, tmp_path / "out", xml=document(TCP))
    assert not (tmp_path / "out").exists()
    assert (machine.state(), objects(machine)) == (before, [])


def test_without_settings_qemu_is_not_touched(
    machine: machines.Machine, domain: virtbackup.Domain, settings: Settings
) -> None:
    before = machine.state()
    with pytest.raises(virtbackup.Error) as caught:
        domain.backupStart(document(TCP))
    assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    assert "backup TLS directory not configured: expected backup_tls_x509_cert_dir" in str(
        caught.value
    )
    assert f"in '{os.environ['VIRTBACKUP_CONF']}'" in str(caught.value)
    assert (machine.state(), objects(machine)) == (before, [])


@pytest.mark.parametrize("what", ["nowhere", "incomplete", "garbage"])
def test_what_qemu_cannot_use_is_told_in_its_words(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    settings: Settings,
    pki: pathlib.Path,
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    what: str,
) -> None:
    bad = tmp_path / "bad"
    if what != "nowhere":
        shutil.copytree(pki, bad)
    if what == "incomplete":
        (bad / "server-key.pem").unlink()
    if what == "garbage":
        (bad / "server-cert.pem").write_text("not one\n")
    settings.set(x509_cert_dir=str(bad))
    before, files = machine.state(), crashing.files(tmp_path, state_dir)
    with pytest.raises(virtbackup.Error) as caught:
        domain.backupStart(document(TCP))
    assert f"operation failed: QEMU cannot use the TLS credentials in '{bad}': " in str(
        caught.value
    )
    assert domain.backupCleanup() == []
    assert (machine.state(), objects(machine)) == (before, [])
    assert crashing.files(tmp_path, state_dir) == files


def test_a_daemon_with_tls(settings: Settings, pki: pathlib.Path, tmp_path: pathlib.Path) -> None:
    image = machines.image(tmp_path / "d.raw", SIZE)
    node = f"driver=raw,node-name=disk,file.driver=file,file.filename={image}"
    settings.set_certificates(pki)
    with (
        machines.storage_daemon(tmp_path, "--blockdev", node) as machine,
        virtbackup.open(machine.uri) as connection,
    ):
        domain = connection.lookupByID(1)
        if machines.version() < (6, 0, 0):
            with pytest.raises(virtbackup.Error, match="has no TLS for exports"):
                domain.backupStart(document(TCP))
            return
        pull.pull(domain, tmp_path / "out", xml=document(TCP))
        assert objects(machine) == []


# --- killed in the middle -------------------------------------------------------------------------


def commands_to_spoil(between: proxy.Proxy) -> list[int]:
    """The numbers of a start's commands; those that TLS and the port add, unless there is time."""
    with virtbackup.open(between.uri) as connection:
        domain = connection.lookupByID(1)
        between.arm(10**6, "refuse")
        domain.backupStart(document(TCP))
        sent = list(between.commands)
        domain.backupStop()
        between.disarm()
    ours = {"object-add", "nbd-server-start"} | (set() if INET_ONLY else {"getfd"})
    assert ours <= set(sent)
    return [number for number, name in enumerate(sent) if conftest.long() or name in ours]


def test_killed_in_the_middle_of_a_start(
    settings: Settings, pki: pathlib.Path, tmp_path: pathlib.Path, state_dir: pathlib.Path
) -> None:
    """After each command: the socket that QEMU has by then, the credentials, the server."""
    settings.set_certificates(pki)
    with (
        proxy.spoiled(tmp_path) as (machine, between),
        callers.Caller(between.uri) as caller,
    ):
        before, files = machine.state(), crashing.files(tmp_path, state_dir)
        rounds = itertools.product(commands_to_spoil(between), ("start", "cleanup"))
        for turn, (number, then) in enumerate(rounds):
            if turn % 4 in (0, 3) or conftest.long():
                spoil: tuple[int, proxy.Fault] = (number, "kill-after")
                caller.spoilt(between, spoil, "", "backupStart", document(TCP))
                where = f"{between.spoilt}, {then}"
                between.disarm()
                with virtbackup.open(between.uri) as connection:
                    domain = connection.lookupByID(1)
                    if then == "start":
                        crashing.start_after_crash(domain, document(TCP))
                    else:
                        _clean(domain)
                seen = machine.state(), objects(machine), _sockets(machine)
                assert seen == (before, [], 0), where
                assert crashing.files(tmp_path, state_dir) == files, where


def _clean(domain: virtbackup.Domain) -> None:
    try:
        domain.backupCleanup()
    except virtbackup.Error:
        domain.backupStop()
    assert domain.backupCleanup() == []


def _sockets(machine: machines.Machine) -> int:
    """How many QEMU has that are not one of its monitors' clients."""
    lines = pathlib.Path(f"/proc/{machine.probe.pid}/net/tcp").read_text().splitlines()
    inodes = {line.split()[9] for line in lines[1:]}
    names = machines.opened(machine.probe.pid)
    return sum(name.removeprefix("socket:[").rstrip("]") in inodes for name in names)


@pytest.mark.parametrize("status", ["kept", "lost"])
def test_a_start_whose_process_is_killed(
    machine: machines.Machine,
    settings: Settings,
    pki: pathlib.Path,
    state_dir: pathlib.Path,
    status: str,
) -> None:
    """The backup runs on; without its status it is found by its names."""
    settings.set_certificates(pki)
    before = machine.state()
    _start_and_leave(machine)
    assert len(objects(machine)) == 1
    with virtbackup.open(machine.uri) as connection:
        domain = connection.lookupByID(1)
        if status == "lost":
            for path in state_dir.glob("*.json"):
                path.unlink()
            assert any("TLS credentials" in line for line in domain.backupCleanup())
        else:
            domain.backupStop()
    assert (machine.state(), objects(machine)) == (before, [])


@pytest.mark.parametrize("fault", ["refuse", "lose-reply"])
def test_each_command_of_a_start_fails_in_turn(
    settings: Settings,
    pki: pathlib.Path,
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    fault: proxy.Fault,
) -> None:
    settings.set_certificates(pki)
    with proxy.spoiled(tmp_path) as (machine, between):
        before, files = machine.state(), crashing.files(tmp_path, state_dir)
        numbers = commands_to_spoil(between)
        with virtbackup.open(between.uri) as connection:
            domain = connection.lookupByID(1)
            for number in numbers:
                between.arm(number, fault)
                with pytest.raises(virtbackup.Error):
                    domain.backupStart(document(TCP))
                where = between.spoilt
                between.disarm()
                seen = machine.state(), objects(machine), _sockets(machine)
                assert seen == (before, [], 0), where
                assert crashing.files(tmp_path, state_dir) == files, where
