# SPDX-License-Identifier: LGPL-2.1-or-later
"""Certificates and keys for TLS, by openssl: good for a few tests, and for nothing else."""

import pathlib
import subprocess

from tests import waiting

KEY = "0123456789abcdef" * 4
CA = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n"
LEAF = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n"


def authority(directory: pathlib.Path, days: int = 2) -> None:
    """Make ca-cert.pem, and the key to it, in DIRECTORY, which is made, too. DAYS: how long it is
    in force; 0: it was."""
    directory.mkdir()
    _request(directory, "ca", "authority")
    _sign(directory, "ca", CA, days, "-signkey", "ca-key.pem")


def server(directory: pathlib.Path, days: int = 2) -> None:
    """Make server-cert.pem and server-key.pem, for this machine."""
    usage = "serverAuth\nsubjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    _leaf(directory, "server", usage, days)


def client(directory: pathlib.Path) -> None:
    """Make client-cert.pem and client-key.pem."""
    _leaf(directory, "client", "clientAuth")


def keys(directory: pathlib.Path, username: str = "qemu") -> None:
    """Make keys.psk in DIRECTORY, which is made, too."""
    directory.mkdir()
    (directory / "keys.psk").write_text(f"{username}:{KEY}\n")


def _leaf(directory: pathlib.Path, name: str, usage: str, days: int = 2) -> None:
    _request(directory, name, name)
    extensions = f"{LEAF}extendedKeyUsage={usage}\n"
    authority = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial")
    _sign(directory, name, extensions, days, *authority)


def _request(directory: pathlib.Path, name: str, subject: str) -> None:
    _openssl(
        directory, "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-subj", f"/CN={subject}", "-keyout", f"{name}-key.pem", "-out", f"{name}.csr",
    )  # fmt: skip


def _sign(directory: pathlib.Path, name: str, extensions: str, days: int, *by: str) -> None:
    (directory / f"{name}.ext").write_text(extensions)
    _openssl(
        directory, "x509", "-req", "-days", str(days), "-in", f"{name}.csr",
        "-extfile", f"{name}.ext", "-out", f"{name}-cert.pem", *by,
    )  # fmt: skip
    if days == 0:  # openssl from 3.4 on makes none that has expired, but in the second it does
        waiting.until(lambda: _has_expired(directory / f"{name}-cert.pem"))
    for suffix in ("csr", "ext"):
        (directory / f"{name}.{suffix}").unlink()


def _has_expired(certificate: pathlib.Path) -> bool:
    argv = ["openssl", "x509", "-checkend", "0", "-noout", "-in", str(certificate)]
    return subprocess.run(argv, check=False, capture_output=True).returncode == 1


def _openssl(directory: pathlib.Path, *argv: str) -> None:
    subprocess.run(["openssl", *argv], cwd=directory, check=True, capture_output=True)
