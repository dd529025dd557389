# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way to a server: what a URI says, and the connection (libvirt's remote_driver.c, and
virnettlscontext.c for certificates).

``virtbackup+unix:///path``, ``virtbackup+tls://host[:port]/``, ``virtbackup+tcp://host[:port]/``.
"""

import contextlib
import dataclasses
import pathlib
import ssl
import urllib.parse
from collections.abc import Iterator, Sequence

import libvirt

from virtbackup import errors
from virtbackup.remote import client, rpc_error, transport

PORTS = {"tls": 16514, "tcp": 16509}
"""libvirtd's."""
CONNECT_TIMEOUT = 30.0
"""Seconds until a server must have taken the connection, and have shaken hands."""

SYSTEM_CA = "/etc/pki/CA/cacert.pem"
SYSTEM_CERTIFICATE = "/etc/pki/libvirt/clientcert.pem"
SYSTEM_KEY = "/etc/pki/libvirt/private/clientkey.pem"

_OPTIONS = {
    "virtbackup+unix": ("name", "reconnect"),
    "virtbackup+tcp": ("name", "reconnect"),
    "virtbackup+tls": ("name", "reconnect", "pkipath", "no_verify"),
}
_SHAPES = {
    "virtbackup+unix": "virtbackup+unix:///absolute/path/to/socket",
    "virtbackup+tcp": "virtbackup+tcp://host[:port]/",
    "virtbackup+tls": "virtbackup+tls://host[:port]/",
}
_VALUES = {"reconnect": "yes|no", "pkipath": "/absolute/directory", "no_verify": "0|1"}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a URI asks for."""

    address: transport.Address
    name: str = ""
    """The URI that the server is asked to open; empty: the server knows."""
    reconnect: bool = False
    """Whether a call after the connection was lost connects anew."""
    pki: str | None = None
    """The directory of cacert.pem, clientcert.pem and clientkey.pem; None: libvirt's places."""
    verify: bool = True
    """Whether the server must prove who it is."""


def parse_uri(uri: str) -> Target:
    """Errors: VIR_ERR_INVALID_ARG."""
    parts = urllib.parse.urlsplit(uri)
    try:
        options = _options(parts)
        address = _address(parts)
    except ValueError as failure:
        raise errors.invalid_arg(
            "virConnectOpen", "uri", f"'{uri}': {failure}: expected {_shape(parts.scheme)}"
        ) from failure
    return Target(
        address,
        name=options.get("name", ""),
        reconnect=options.get("reconnect") == "yes",
        pki=options.get("pkipath"),
        verify=options.get("no_verify", "0") == "0",
    )


def _shape(scheme: str) -> str:
    options = (f"{name}={_VALUES.get(name, 'URI')}" for name in _OPTIONS[scheme])
    return f"{_SHAPES[scheme]}[?{'][&'.join(options)}]"


def _options(parts: urllib.parse.SplitResult) -> dict[str, str]:
    """Errors: ValueError."""
    pairs = urllib.parse.parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if (
        parts.query
    ) else []  # fmt: skip
    options = dict(pairs)
    for name, value in options.items():
        if name not in _OPTIONS[parts.scheme]:
            raise ValueError(f"there is no option '{name}'")
        if name == "pkipath":
            wrong = not value.startswith("/") or "\0" in value
        else:
            wrong = name in _VALUES and value not in _VALUES[name].split("|")
        if wrong:
            raise ValueError(f"'{value}' is no value of '{name}'")
    if len(options) != len(pairs):
        raise ValueError("an option is given twice")
    return options


def _address(parts: urllib.parse.SplitResult) -> transport.Address:
    """Errors: ValueError."""
    kind = parts.scheme.partition("+")[2]
    if parts.fragment:
        raise ValueError("a fragment has no meaning")
    if kind == "unix":
        if parts.netloc:
            raise ValueError("a unix socket is on this host")
        path = urllib.parse.unquote(parts.path, errors="surrogateescape")
        if not path.strip("/") or "\0" in path:
            raise ValueError("the path of the socket is missing, or none")
        if not path.startswith("/"):
            raise ValueError(f"the path '{path}' is not absolute")
        return transport.Address("unix", path=path)
    if parts.path not in ("", "/"):
        raise ValueError(f"the path '{parts.path}' has no meaning")
    if "@" in parts.netloc or not parts.hostname:
        raise ValueError("a host is needed, and no user")
    port = PORTS[kind] if parts.port is None else parts.port
    host = urllib.parse.unquote(parts.hostname)
    if not _may_be_host(host):
        raise ValueError(f"'{host}' is no host")
    return transport.Address("tls" if kind == "tls" else "tcp", host=host, port=port)


def _may_be_host(host: str) -> bool:
    """Whether it is worth asking anybody for the address of HOST."""
    try:
        return b"\0" not in host.encode("idna")  # as the socket module has it sent
    except UnicodeError:  # a part of it is empty, too long, or no text
        return False


# --- connecting ---


def connect(target: Target, timeout: float = CONNECT_TIMEOUT) -> transport.Transport:
    """A connection to the server.

    Errors: VIR_ERR_SYSTEM_ERROR, by address or by file; VIR_ERR_AUTH_FAILED for a server that has
    not proved who it is; VIR_ERR_RPC from a server to which we have not proved who we are.
    """
    address = target.address
    context = context_of(target) if address.kind == "tls" else None
    try:
        return transport.connect(address, context, timeout)
    except ssl.SSLCertVerificationError as failure:
        raise errors.error(
            libvirt.VIR_ERR_AUTH_FAILED,
            f"Failed to verify peer's certificate: '{place(address)}': {failure.verify_message}",
            domain=libvirt.VIR_FROM_RPC,
        ) from failure
    except transport.NotAccepted as failure:
        certificate = _files(target)[1]
        missing = "" if pathlib.Path(certificate).exists() else ", which is not there"
        raise rpc_error.rpc_error(
            f"server verification (of our certificate '{certificate}'{missing}) failed:"
            f" '{place(address)}': {failure.strerror}"
        ) from failure
    except OSError as failure:
        text = f"unable to connect to server at '{place(address)}'"
        if address.kind == "unix":
            text = f"Failed to connect socket to '{place(address)}'"
        raise client.system_error(failure, text) from failure


def place(address: transport.Address) -> str:
    """An address as people write it."""
    return str(address).partition(":")[2]


def context_of(target: Target) -> ssl.SSLContext:
    """How TLS is spoken: with a certificate of ours, where there is one, to a server that has one
    for its name. Errors: VIR_ERR_SYSTEM_ERROR, by file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    ca, certificate, key = _files(target)
    if target.verify:
        with _using("CA certificate", ca):
            context.load_verify_locations(ca)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    missing = [path for path in (certificate, key) if not pathlib.Path(path).exists()]
    if len(missing) < 2:
        for what, path in (("client certificate", certificate), ("client private key", key)):
            with _using(what, path):
                pathlib.Path(path).open("rb").close()
        with _using("client certificate", certificate, f" with key '{key}'"):
            context.load_cert_chain(certificate, key, password=lambda: b"")
    return context


def _files(target: Target) -> Sequence[str]:
    """(authority, certificate, key)."""
    if target.pki is None:
        return SYSTEM_CA, SYSTEM_CERTIFICATE, SYSTEM_KEY
    directory = target.pki.rstrip("/")
    return [f"{directory}/{name}.pem" for name in ("cacert", "clientcert", "clientkey")]


@contextlib.contextmanager
def _using(what: str, path: str, more: str = "") -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as failure:
        reason = failure.reason or str(failure)
        text = f"Unable to use {what} '{path}'{more}"
        raise client.system_error(OSError(0, reason), text) from failure
    except OSError as failure:
        raise client.system_error(failure, f"Cannot read {what} '{path}'") from failure
