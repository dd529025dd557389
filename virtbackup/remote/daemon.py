# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon: listeners, clients, their sessions and the domains (libvirt's remote_daemon.c)."""

import contextlib
import errno
import grp
import ipaddress
import logging
import os
import pathlib
import re
import socket
import ssl
import stat
import time
from collections.abc import Iterator, Sequence

import libvirt

from virtbackup import access, errors
from virtbackup.conf import virtbackup_conf
from virtbackup.remote import (
    dispatch,
    dispatch_backup,
    dispatch_checkpoint,
    dispatch_connect,
    dispatch_domain,
    dispatch_event,
    domains,
    server,
    transport,
)

logger = logging.getLogger(__name__)

_HANDLERS = (
    dispatch_backup,
    dispatch_checkpoint,
    dispatch_connect,
    dispatch_domain,
    dispatch_event,
)
"""The modules that fill the table of handlers, by being loaded."""


class Daemon:
    """Serves HOSTS to clients, by SETTINGS."""

    def __init__(self, hosts: Sequence[domains.Host], settings: virtbackup_conf.Settings) -> None:
        """Errors: VIR_ERR_CONF_SYNTAX for a setting that makes no sense."""
        self.settings = settings
        self.domains = domains.Domains(hosts)
        uris = [host.uri for host in hosts]
        self._shared = dispatch.Daemon(self.domains, uris, policy(settings))
        self.server = server.Server(
            self._shared.serve,
            server.Limits(
                max_clients=settings.max_clients,
                max_client_requests=settings.max_client_requests,
                max_workers=settings.max_workers,
                keepalive_interval=settings.keepalive_interval,
                keepalive_count=settings.keepalive_count,
            ),
        )
        self._paths: list[tuple[str, os.stat_result]] = []
        """Unix sockets that we made."""

    def listen(self, address: transport.Address) -> str:
        """Listen at an ADDRESS; where, with the port that the system has chosen for 0. Errors:
        VIR_ERR_SYSTEM_ERROR, and those of ``check``."""
        check(address, self.settings)
        context = None if address.kind != "tls" else self._tls_context()
        try:
            made = transport.listen(address, mode(self.settings))
        except OSError as failure:
            raise _cannot_listen(failure, address) from failure
        with _closed_on_error(made):
            if address.kind == "unix":
                self._paths.append((address.path, os.lstat(address.path)))
                self._own(address.path)
            return self._add(made, address.kind, context)

    def adopt(self, fd: int) -> str:
        """Listen on a unix or tcp socket that somebody else has made (sd_listen_fds). Errors:
        VIR_ERR_CONFIG_UNSUPPORTED for another descriptor, and for a tcp socket that is not on
        loopback, where no certificates are set."""
        made = _adopted(fd)
        with _closed_on_error(made):
            if made.family == socket.AF_UNIX:
                place = self._add(made, "unix", None)
                self._warn_of_settings(place)
                return place
            on_loopback = _is_loopback(made.getsockname()[0])
            context = None if on_loopback else self._tls_context()
            return self._add(made, "tcp" if on_loopback else "tls", context)

    def _tls_context(self) -> ssl.SSLContext:
        """As ``tls_context``; warns where nobody will come in by it, for whose sake those who come
        otherwise are not shut out."""
        if refused := refused_certificate(self.settings):
            logger.warning("%s", refused)
        return tls_context(self.settings)

    def _warn_of_settings(self, place: str) -> None:
        """Of those that a socket which somebody else has made does not go by."""
        for name, theirs in (("unix_sock_mode", "SocketMode"), ("unix_sock_group", "SocketGroup")):
            if name in self.settings.places:
                logger.warning(
                    "%s was handed over, and %s (%s) is not for it: set %s= of its unit",
                    place, name, self.settings.places[name], theirs,
                )  # fmt: skip

    def _add(self, made: socket.socket, kind: str, context: ssl.SSLContext | None) -> str:
        name = made.getsockname()
        if made.family == socket.AF_UNIX:
            place = f"unix:{name}"
        else:
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            place = f"{kind}:{host}:{name[1]}"
            if kind == "tcp" and not _is_loopback(name[0]):
                raise _beyond_loopback(place)  # whatever the name was, that stands for this
        self.server.listen(made, context)
        return place

    def _own(self, path: str) -> None:
        """Give a socket to the group that is set. Errors: VIR_ERR_SYSTEM_ERROR."""
        gid = group(self.settings)
        if gid is None:
            return
        try:
            os.chown(path, -1, gid, follow_symlinks=False)
        except OSError as failure:
            name = self.settings.unix_sock_group
            raise errors.system_error(failure, f"cannot give '{path}' to '{name}'") from failure

    def run(self, by_signals: bool = False) -> None:
        """Serve until ``stop``. Backups that run go on. BY_SIGNALS: as ``server.Server.run``."""
        try:
            self.server.run(by_signals)
        finally:
            self.close()

    def stop(self) -> None:
        """Have ``run`` return, once calls that are worked on have their replies; when it is called
        again, at once. By any thread, or a signal's handler."""
        self.server.stop()

    def close(self) -> None:
        """Remove the sockets, and let go of drivers."""
        for path, made in self._paths:
            transport.remove(path, made)
        self._paths.clear()
        self.server.close()
        self._shared.closed.set()
        self.domains.close()


@contextlib.contextmanager
def _closed_on_error(made: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        made.close()
        raise


def _adopted(fd: int) -> socket.socket:
    """The listening socket behind FD. Errors: VIR_ERR_CONFIG_UNSUPPORTED."""
    try:
        made = socket.socket(fileno=fd)
        listens = made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as failure:
        raise _no_listener(fd) from failure
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
    if not listens or made.type != socket.SOCK_STREAM or made.family not in families:
        made.close()
        raise _no_listener(fd)
    return made


def _no_listener(fd: int) -> errors.Error:
    return errors.error(
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        f"descriptor {fd} that was handed over is no listening stream socket of unix or tcp",
    )


# --- what settings mean ---


def check(address: transport.Address, settings: virtbackup_conf.Settings) -> None:
    """Refuse where nobody should listen. Errors: VIR_ERR_CONFIG_UNSUPPORTED for tcp beyond
    loopback, as nobody there says who he is; VIR_ERR_CONF_SYNTAX."""
    mode(settings)
    group(settings)
    if address.kind == "tcp" and not _is_loopback(address.host):
        raise _beyond_loopback(str(address))


def policy(settings: virtbackup_conf.Settings) -> access.Policy:
    """Errors: VIR_ERR_CONF_SYNTAX."""
    if settings.access is None:
        return access.Policy()
    try:
        return access.Policy.parse(settings.access)
    except ValueError as failure:
        raise settings.wrong("access", str(failure)) from failure


def mode(settings: virtbackup_conf.Settings) -> int:
    """Of unix sockets. Errors: VIR_ERR_CONF_SYNTAX."""
    text = settings.unix_sock_mode
    if not re.fullmatch("[0-7]{3,4}", text) or int(text, 8) > 0o777:
        raise settings.wrong("unix_sock_mode", f"'{text}' is no mode: expected 0600, say")
    return int(text, 8)


def group(settings: virtbackup_conf.Settings) -> int | None:
    """Of unix sockets, by number. Errors: VIR_ERR_CONF_SYNTAX."""
    name = settings.unix_sock_group
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as failure:
        raise settings.wrong("unix_sock_group", f"there is no group '{name}'") from failure


def _beyond_loopback(place: str) -> errors.Error:
    return errors.error(
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        f"'{place}': tcp is for loopback only (127.0.0.1, ::1, localhost): its clients do not say"
        " who they are; beyond it, use tls",
    )


def _is_loopback(host: str) -> bool:
    """Of an address; a name is taken at its word, and looked at again once it is an address."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def check_place(address: transport.Address) -> None:
    """Refuse an ADDRESS at which no socket can be made: a path, or an IPv6 address that is none,
    as one of an interface that is not there. Errors: VIR_ERR_SYSTEM_ERROR."""
    directory = os.path.dirname(address.path)  # noqa: PTH120
    try:
        if address.kind != "unix":
            if ":" in address.host:
                socket.getaddrinfo(address.host, None, flags=socket.AI_NUMERICHOST)
            return
        os.close(os.open(directory, os.O_PATH | os.O_DIRECTORY))
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if os.path.lexists(address.path) and not stat.S_ISSOCK(os.lstat(address.path).st_mode):
            raise OSError(errno.EADDRINUSE, "")
    except OSError as failure:
        raise _cannot_listen(failure, address) from failure


def _cannot_listen(failure: OSError, address: transport.Address) -> errors.Error:
    """A FAILURE to listen at an ADDRESS, in words."""
    if failure.errno == errno.EADDRINUSE:
        reason = "somebody listens there already"
        with contextlib.suppress(OSError):  # it has gone since
            if address.kind == "unix" and not stat.S_ISSOCK(os.lstat(address.path).st_mode):
                reason = "what is there is no socket"
        failure = OSError(failure.errno, reason)
    return errors.system_error(failure, f"cannot listen on '{address}'")


def tls_context(settings: virtbackup_conf.Settings) -> ssl.SSLContext:
    """For clients that have a certificate of our authority. Errors: VIR_ERR_CONFIG_UNSUPPORTED
    where no certificates are set, VIR_ERR_SYSTEM_ERROR where they cannot be read."""
    directory = settings.tls_x509_cert_dir
    if directory is None:
        raise errors.error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            "tls takes certificates: set tls_x509_cert_dir to a directory with ca-cert.pem,"
            " server-cert.pem and server-key.pem",
        )
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.verify_mode = ssl.CERT_REQUIRED
    # libvirt's client takes what comes first for the word that it is accepted.
    made.num_tickets = 0
    ca, cert, key = _files(directory)
    for path in (ca, cert, key):
        try:
            pathlib.Path(path).read_bytes()
        except OSError as failure:
            raise errors.system_error(failure, f"cannot read '{path}'") from failure
    try:
        made.load_verify_locations(ca)
        made.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError) as failure:
        reason = OSError(0, getattr(failure, "reason", None) or str(failure))
        raise errors.system_error(
            reason, f"cannot use the certificates in '{directory}'"
        ) from failure
    return made


def refused_certificate(settings: virtbackup_conf.Settings) -> str | None:
    """Which of our certificates is well made, and lets no client in today all the same, and why;
    None: none is. Errors: those of ``tls_context``."""
    context = tls_context(settings)
    assert settings.tls_x509_cert_dir is not None
    ca, cert, _ = _files(settings.tls_x509_cert_dir)
    for path, trouble in ((ca, _out_of_time(context)), (cert, _untrusted(context, cert))):
        if trouble is not None:
            return f"nobody comes in by TLS with '{path}': {trouble}"
    return None


def _files(directory: str) -> list[str]:
    """(authority, certificate, key)."""
    names = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
    return [str(pathlib.Path(directory, name)) for name in names]


def _out_of_time(context: ssl.SSLContext) -> str | None:
    """Why none of CONTEXT's authorities counts today; None: one does, or there is none to ask."""
    trouble = None
    for authority in context.get_ca_certs():
        if time.time() > ssl.cert_time_to_seconds(str(authority["notAfter"])):
            trouble = "certificate has expired"
        elif time.time() < ssl.cert_time_to_seconds(str(authority["notBefore"])):
            trouble = "certificate is not yet valid"
        else:
            return None
    return trouble


def _untrusted(context: ssl.SSLContext, cert: str) -> str | None:
    """Why a client that has been told to trust CERT, which is CONTEXT's own, does not; None: it
    does. Whoever has signed it counts for nothing here."""
    context.verify_mode = ssl.CERT_NONE
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up), context.wrap_bio(up, down, server_side=True)]
    for end in ends * 3:  # as often as the one waits for the other
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as failure:
            return getattr(failure, "verify_message", None) or failure.reason or str(failure)
    return None


def _no_password() -> str:
    """For a key that wants one: nobody is there to be asked."""
    return ""
