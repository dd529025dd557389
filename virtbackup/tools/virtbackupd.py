# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program ``virtbackupd``: serves the API over libvirt's wire protocol."""

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import signal
import socket
import sys
from collections.abc import Sequence

import libvirt

from virtbackup import api, config, errors, hypervisor
from virtbackup.conf import virtbackup_conf
from virtbackup.qemu import libvirt_events
from virtbackup.remote import daemon, domains, transport
from virtbackup.tools import virtbackupd_options

logger = logging.getLogger("virtbackupd")

DEFAULT_LISTEN = virtbackupd_options.DEFAULT_LISTEN
_FIRST_FD = 3
"""Of those that systemd hands over (sd_listen_fds)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 stopped, or the configuration is good; 1 it could not run; 2 usage."""
    options = virtbackupd_options.parser(_version()).parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr,
        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(options.verbose, 2)],
        format="%(levelname)s %(name)s: %(message)s",
    )
    libvirt.registerErrorHandler(lambda *_: None, None)  # it would print what is raised
    try:
        settings = _settings(options)
        if options.check_config:
            _check(settings)
            print("configuration is good")
            return 0
        return _run(settings)
    except libvirt.libvirtError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1


def _version() -> str:
    version = api.VERSION
    return f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}"


def _settings(options: argparse.Namespace) -> virtbackup_conf.Settings:
    """Errors: those of ``config.load``; VIR_ERR_INVALID_ARG where there is nothing to serve."""
    if options.config:
        os.environ["VIRTBACKUP_CONF"] = options.config
    settings = config.load()
    if options.uri:
        settings = dataclasses.replace(settings, uris=tuple(options.uri))
    if options.listen:
        settings = dataclasses.replace(settings, listen=tuple(options.listen))
    if not settings.uris:
        raise errors.error(libvirt.VIR_ERR_INVALID_ARG, "nothing to serve: give --uri, or set uris")
    return settings


def _addresses(settings: virtbackup_conf.Settings) -> list[transport.Address]:
    """Errors: VIR_ERR_INVALID_ARG."""
    try:
        return [transport.parse_address(text) for text in settings.listen]
    except ValueError as failure:
        raise errors.error(libvirt.VIR_ERR_INVALID_ARG, f"listen: {failure}") from failure


def _check(settings: virtbackup_conf.Settings) -> None:
    """Raise for what a start would stumble over, without one."""
    daemon.policy(settings)
    for address in _addresses(settings):
        daemon.check(address, settings)
        if address.kind == "tls":
            daemon.tls_context(settings)
    for uri in settings.uris:
        hypervisor.check_uri(uri)


def _run(settings: virtbackup_conf.Settings) -> int:
    _check(settings)
    hosts = [
        domains.Host(uri, functools.partial(hypervisor.open_driver, uri, False))
        for uri in settings.uris
    ]
    if any(uri.startswith("qemu") for uri in settings.uris):
        libvirt_events.start_loop()
    served = daemon.Daemon(hosts, settings)
    try:
        places = [served.adopt(fd) for fd in _handed_over()] if not settings.listen else []
        if not places:
            for address in _addresses(settings) or [_default()]:
                places.append(served.listen(address))
        for host in hosts:
            with contextlib.suppress(libvirt.libvirtError):  # it is logged, and tried again
                host.driver()
    except BaseException:
        served.close()
        raise
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: served.stop())
    print(f"virtbackupd: listening on {', '.join(places)}", flush=True)
    for place in places:
        if place.startswith("tcp:") and settings.access is None:
            logger.warning("%s: every user of this host may use it, unless access is set", place)
    _notify("READY=1")
    served.run()
    _notify("STOPPING=1")
    return 0


def _default() -> transport.Address:
    address = transport.parse_address(DEFAULT_LISTEN)
    with contextlib.suppress(OSError):
        pathlib.Path(address.path).parent.mkdir(mode=0o755, parents=True)
    return address


def _handed_over() -> list[int]:
    """The listening sockets that systemd has made (sd_listen_fds(3))."""
    if os.environ.pop("LISTEN_PID", None) != str(os.getpid()):
        return []
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    os.environ.pop("LISTEN_FDNAMES", None)
    fds = list(range(_FIRST_FD, _FIRST_FD + count))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def _notify(state: str) -> None:
    """Tell systemd, where it listens (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.connect("\0" + path[1:] if path.startswith("@") else path)
        told.send(state.encode())


if __name__ == "__main__":
    sys.exit(main())
