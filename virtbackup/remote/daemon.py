# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon: listeners, clients, their sessions and the domains (libvirt's remote_daemon.c)."""

import grp
import logging
import os
import pathlib
import socket
import ssl
from collections.abc import Sequence

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

LOOPBACK = ("127.", "::1", "localhost")


class Daemon:
    """Serves HOSTS to clients, by SETTINGS."""

    def __init__(self, hosts: Sequence[domains.Host], settings: virtbackup_conf.Settings) -> None:
        """Errors: VIR_ERR_CONF_SYNTAX for a setting that makes no sense."""
        self.settings = settings
        self.domains = domains.Domains(hosts)
        shared = dispatch.Daemon(self.domains, [host.uri for host in hosts], policy(settings))
        self.server = server.Server(
            shared.serve,
            server.Limits(
                max_clients=settings.max_clients,
                max_client_requests=settings.max_client_requests,
                max_workers=settings.max_workers,
                keepalive_interval=settings.keepalive_interval,
                keepalive_count=settings.keepalive_count,
            ),
        )
        self._paths: list[tuple[str, int]] = []
        """Unix sockets that we made, by path and inode."""

    def listen(self, address: transport.Address) -> str:
        """Listen at an ADDRESS; where, with the port that the system has chosen for 0. Errors:
        VIR_ERR_SYSTEM_ERROR, and those of ``check``."""
        check(address, self.settings)
        mode = int(self.settings.unix_sock_mode, 8)
        try:
            made = transport.listen(address, mode)
        except OSError as failure:
            raise errors.system_error(failure, f"cannot listen on '{address}'") from failure
        if address.kind == "unix":
            self._own(address.path)
            self._paths.append((address.path, os.stat(address.path).st_ino))  # noqa: PTH116
        context = None if address.kind != "tls" else tls_context(self.settings)
        return self._add(made, address.kind, context)

    def adopt(self, fd: int) -> str:
        """Listen on a unix or tcp socket that somebody else has made (sd_listen_fds). Errors:
        VIR_ERR_CONFIG_UNSUPPORTED for a tcp socket that is not on loopback."""
        made = socket.socket(fileno=fd)
        if made.family == socket.AF_UNIX:
            return self._add(made, "unix", None)
        host, port = made.getsockname()[:2]
        kind = "tcp" if _is_loopback(host) else "tls"
        check(transport.Address("tls" if kind == "tls" else "tcp", host=host, port=port),
              self.settings)  # fmt: skip
        return self._add(made, kind, tls_context(self.settings) if kind == "tls" else None)

    def _add(self, made: socket.socket, kind: str, context: ssl.SSLContext | None) -> str:
        self.server.listen(made, context)
        name = made.getsockname()
        if made.family == socket.AF_UNIX:
            return f"unix:{name}"
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"{kind}:{host}:{name[1]}"

    def _own(self, path: str) -> None:
        """Give a socket to the group that is set. Errors: VIR_ERR_SYSTEM_ERROR."""
        group = self.settings.unix_sock_group
        if group is None:
            return
        try:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        except (KeyError, OSError) as failure:
            reason = failure if isinstance(failure, OSError) else OSError(0, "no such group")
            raise errors.system_error(reason, f"cannot give '{path}' to '{group}'") from failure

    def run(self) -> None:
        """Serve until ``stop``. Backups that run go on."""
        try:
            self.server.run()
        finally:
            self.close()

    def stop(self) -> None:
        """Have ``run`` return, once calls that are worked on have their replies."""
        self.server.stop()

    def close(self) -> None:
        """Let go of drivers, and remove the sockets."""
        self.domains.close()
        for path, inode in self._paths:
            found = pathlib.Path(path)
            if found.is_socket() and found.stat().st_ino == inode:
                found.unlink()


def policy(settings: virtbackup_conf.Settings) -> access.Policy:
    """Errors: VIR_ERR_CONF_SYNTAX."""
    if settings.access is None:
        return access.Policy()
    try:
        return access.Policy.parse(settings.access)
    except ValueError as failure:
        raise _conf(f"access: {failure}") from failure


def check(address: transport.Address, settings: virtbackup_conf.Settings) -> None:
    """Refuse where nobody should listen. Errors: VIR_ERR_CONFIG_UNSUPPORTED for tcp beyond
    loopback, as nobody there says who he is; VIR_ERR_CONF_SYNTAX."""
    try:
        mode = int(settings.unix_sock_mode, 8)
    except ValueError as failure:
        raise _conf(f"unix_sock_mode: '{settings.unix_sock_mode}' is not octal") from failure
    if not 0 <= mode <= 0o777:
        raise _conf(f"unix_sock_mode: '{settings.unix_sock_mode}' is no mode")
    if address.kind == "tcp" and not _is_loopback(address.host):
        raise errors.error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            f"'{address}': tcp is for loopback only (127.0.0.1, ::1, localhost): its clients do"
            " not say who they are; beyond it, use tls",
        )


def _is_loopback(host: str) -> bool:
    return host.startswith(LOOPBACK[0]) or host in LOOPBACK[1:]


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
    ca, cert, key = (
        str(pathlib.Path(directory, name))
        for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem")
    )
    for path in (ca, cert, key):
        try:
            pathlib.Path(path).read_bytes()
        except OSError as failure:
            raise errors.system_error(failure, f"cannot read '{path}'") from failure
    try:
        made.load_verify_locations(ca)
        made.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as failure:
        reason = OSError(0, getattr(failure, "reason", None) or str(failure))
        raise errors.system_error(
            reason, f"cannot use the certificates in '{directory}'"
        ) from failure
    return made


def _conf(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_CONF_SYNTAX, detail, domain=libvirt.VIR_FROM_CONF)
