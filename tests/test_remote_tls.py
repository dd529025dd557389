# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS between client and server: who proves what to whom, and what is said where that fails."""

import contextlib
import functools
import os
import pathlib
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator

import libvirt
import pytest

import virtbackup
from tests import daemons, rpc_server
from tests.live import certificates
from virtbackup import errors
from virtbackup.conf import virtbackup_conf
from virtbackup.remote import connect, transport
from virtbackup.test import test_driver

pytestmark = pytest.mark.needs("openssl")

LOOPBACK = transport.Address("tls", host="127.0.0.1", port=0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with the certificates of an authority, a server and a client."""
    directory = tmp_path_factory.mktemp("tls") / "pki"
    certificates.authority(directory)
    certificates.server(directory)
    certificates.client(directory)
    for name in ("cert", "key"):
        shutil.copy(directory / f"client-{name}.pem", directory / f"client{name}.pem")
    shutil.copy(directory / "ca-cert.pem", directory / "cacert.pem")
    return directory


@pytest.fixture
def pki(authority: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """What a client has, to be spoilt."""
    directory = tmp_path / "client"
    directory.mkdir()
    for name in ("cacert", "clientcert", "clientkey"):
        shutil.copy(authority / f"{name}.pem", directory)
    return directory


@pytest.fixture
def context(authority: pathlib.Path) -> ssl.SSLContext:
    """The server's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority / "cacert.pem")
    context.load_cert_chain(authority / "server-cert.pem", authority / "server-key.pem")
    return context


@pytest.fixture
def server(context: ssl.SSLContext) -> Iterator[rpc_server.Server]:
    with rpc_server.Server(LOOPBACK, context=context) as made:
        yield made


def uri(server: rpc_server.Server, pki: pathlib.Path, host: str = "localhost") -> str:
    return f"virtbackup+tls://{host}:{server.port}/?pkipath={pki}"


def refused(open: Callable[[], object]) -> errors.Error:
    with pytest.raises(errors.Error) as caught:
        open()
    assert caught.value.get_error_domain() == libvirt.VIR_FROM_RPC
    return caught.value


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_both_prove_who_they_are(server: rpc_server.Server, pki: pathlib.Path, host: str) -> None:
    with virtbackup.open(uri(server, pki, host)) as opened:
        assert opened.getHostname() == "here"
        connected = server.peer().transport._socket
        assert isinstance(connected, ssl.SSLSocket)
        assert connected.getpeercert(binary_form=True)


def test_a_server_of_another_name(context: ssl.SSLContext, pki: pathlib.Path) -> None:
    address = transport.Address("tls", host="127.0.0.2", port=0)
    with rpc_server.Server(address, context=context) as server:
        failure = refused(lambda: virtbackup.open(uri(server, pki, "127.0.0.2")))
    assert failure.get_error_code() == libvirt.VIR_ERR_AUTH_FAILED
    assert "Failed to verify peer's certificate: '127.0.0.2:" in str(failure)
    assert "IP address mismatch" in str(failure)


def test_a_server_of_another_authority(
    server: rpc_server.Server, pki: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    certificates.authority(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca-cert.pem", pki / "cacert.pem")
    failure = refused(lambda: virtbackup.open(uri(server, pki)))
    assert failure.get_error_code() == libvirt.VIR_ERR_AUTH_FAILED
    with virtbackup.open(f"{uri(server, pki)}&no_verify=1") as opened:
        assert opened.getHostname() == "here"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_a_certificate(
    server: rpc_server.Server,
    context: ssl.SSLContext,
    pki: pathlib.Path,
    version: ssl.TLSVersion,
) -> None:
    context.maximum_version = version
    for name in ("clientcert", "clientkey"):
        (pki / f"{name}.pem").unlink()
    failure = refused(lambda: virtbackup.open(uri(server, pki)))
    if version == ssl.TLSVersion.TLSv1_3:
        assert failure.get_error_code() == libvirt.VIR_ERR_RPC
        assert str(failure).startswith(
            f"server verification (of our certificate '{pki}/clientcert.pem', which is not there)"
            " failed"
        )
    else:
        assert str(failure).startswith(f"unable to connect to server at 'localhost:{server.port}'")


def test_a_client_of_another_authority(
    server: rpc_server.Server, pki: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / "other"
    certificates.authority(other)
    certificates.client(other)
    for name in ("cert", "key"):
        shutil.copy(other / f"client-{name}.pem", pki / f"client{name}.pem")
    failure = refused(lambda: virtbackup.open(uri(server, pki)))
    assert f"server verification (of our certificate '{pki}/clientcert.pem') failed" in str(failure)


def test_a_server_that_speaks_no_tls(pki: pathlib.Path) -> None:
    plain = transport.Address("tcp", host="127.0.0.1", port=0)
    with rpc_server.Server(plain) as server:
        failure = refused(lambda: virtbackup.open(uri(server, pki)))
        assert failure.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
        assert str(failure).startswith("unable to connect to server at 'localhost:")


def context_of(pki: pathlib.Path) -> ssl.SSLContext:
    return connect.context_of(connect.Target(LOOPBACK, pki=str(pki)))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda d: (d / "cacert.pem").unlink(),
         "Cannot read CA certificate '{}/cacert.pem': No such file or directory"),
        (lambda d: (d / "clientcert.pem").unlink(),
         "Cannot read client certificate '{}/clientcert.pem': No such file or directory"),
        (lambda d: (d / "clientkey.pem").unlink(),
         "Cannot read client private key '{}/clientkey.pem': No such file or directory"),
        (lambda d: (d / "cacert.pem").write_text("nonsense"),
         "Unable to use CA certificate '{}/cacert.pem': "),
        (lambda d: (d / "clientkey.pem").write_text("nonsense"),
         "Unable to use client certificate '{}/clientcert.pem' with key '{}/clientkey.pem': "),
    ],
    ids=["no authority", "no certificate", "no key", "bad authority", "bad key"],
)  # fmt: skip
def test_files_that_are_no_good_are_named(
    pki: pathlib.Path, spoil: Callable[[pathlib.Path], object], text: str
) -> None:
    spoil(pki)
    failure = refused(lambda: context_of(pki))
    assert failure.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
    assert str(failure).startswith(text.replace("{}", str(pki)))


def test_a_key_with_a_passphrase_asks_nobody(pki: pathlib.Path) -> None:
    key = pki / "clientkey.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", f"{key}.new"],
        check=True, capture_output=True,
    )  # fmt: skip
    shutil.move(f"{key}.new", key)
    assert "clientkey.pem" in str(refused(lambda: context_of(pki)))


def test_the_default_places(monkeypatch: pytest.MonkeyPatch, pki: pathlib.Path) -> None:
    target = connect.parse_uri("virtbackup+tls://host/")
    assert connect._files(target) == (
        "/etc/pki/CA/cacert.pem",
        "/etc/pki/libvirt/clientcert.pem",
        "/etc/pki/libvirt/private/clientkey.pem",
    )
    monkeypatch.setattr(connect, "SYSTEM_CA", str(pki / "nothing.pem"))
    assert "nothing.pem" in str(refused(lambda: connect.context_of(target)))
    monkeypatch.setattr(connect, "SYSTEM_CA", str(pki / "cacert.pem"))
    connect.context_of(target)  # a client may have none


# --- the daemon ---


@pytest.fixture
def served(
    authority: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[daemons.Served]:
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path_factory.mktemp("state")))
    settings = virtbackup_conf.Settings(tls_x509_cert_dir=str(authority))
    open = functools.partial(test_driver.open, "test:///default", False)
    with daemons.serving([("test:///default", open)], LOOPBACK, settings) as made:
        yield made


def test_the_daemon(served: daemons.Served, pki: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        many = [
            stack.enter_context(virtbackup.open(f"{served.uri}/?pkipath={pki}")) for _ in range(5)
        ]
        assert [one.lookupByName("vm").ID() for one in many] == [1] * 5
    for name in ("clientcert", "clientkey"):
        (pki / f"{name}.pem").unlink()
    assert "server verification" in str(
        refused(lambda: virtbackup.open(f"{served.uri}/?pkipath={pki}"))
    )


@pytest.mark.needs("virsh")
def test_libvirts_own_client_by_tls(served: daemons.Served, pki: pathlib.Path) -> None:
    """It waits for the server's word that it is accepted."""
    port = served.uri.rpartition(":")[2]
    virsh = subprocess.run(
        ["virsh", "-c", f"qemu+tls://localhost:{port}/system?pkipath={pki}", "list", "--name"],
        check=False, capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    assert (virsh.returncode, virsh.stderr) == (0, "")
    assert virsh.stdout.split() == ["vm"]
