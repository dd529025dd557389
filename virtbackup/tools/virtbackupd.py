# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program ``virtbackupd``: serves the API over libvirt's wire protocol."""

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import resource
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from typing import Any

import libvirt

from virtbackup import api, config, errors, event_loop, hypervisor
from virtbackup.conf import virtbackup_conf
from virtbackup.remote import daemon, domains, transport
from virtbackup.tools import virsh_host, virtbackupd_options

logger = logging.getLogger("virtbackupd")

DEFAULT_LISTEN = virtbackupd_options.DEFAULT_LISTEN
_FIRST_FD = 3
"""Of those that systemd hands over (sd_listen_fds)."""
_DRIVERS_FDS = 4096
"""Descriptors that drivers have room for."""
_MAX_LINE = 4000
"""Characters of a line of the log."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 stopped, or the configuration is good; 1 it could not run; 2 usage."""
    options = virtbackupd_options.parser(virsh_host.dotted(api.VERSION)).parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(
        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(options.verbose, 2)],
        handlers=[handler],
    )
    libvirt.registerErrorHandler(lambda *_: None, None)  # it would print what is raised
    try:
        settings = _settings(options)
        if options.check_config:
            _check(settings)
            _check_certificates(settings)
            _check_places(settings)
            print("configuration is good")
            return 0
        return _run(settings)
    except libvirt.libvirtError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1


class _Formatter(logging.Formatter):
    """Clients choose what much of the log says, so that is shown: it neither begins a line, nor
    controls a terminal, nor goes on for ever."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _shown(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {_shown(line)}" for line in super().formatException(ei).splitlines())


def _shown(text: str) -> str:
    """TEXT as one line of characters that can be seen, cut where it is too long."""
    if len(text) > _MAX_LINE:
        text = f"{text[:_MAX_LINE]}... ({len(text)} characters)"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _settings(options: argparse.Namespace) -> virtbackup_conf.Settings:
    """Errors: those of ``config.load``; VIR_ERR_INVALID_ARG where there is nothing to serve."""
    if options.config:
        os.environ["VIRTBACKUP_CONF"] = options.config
    settings = config.load()
    places = dict(settings.places)
    if options.uri:
        places.pop("uris", None)
        settings = dataclasses.replace(settings, uris=tuple(options.uri), places=places)
    if options.listen:
        places.pop("listen", None)
        settings = dataclasses.replace(settings, listen=tuple(options.listen), places=places)
    if not settings.uris:
        raise errors.error(libvirt.VIR_ERR_INVALID_ARG, "nothing to serve: give --uri, or set uris")
    return settings


def _addresses(settings: virtbackup_conf.Settings) -> list[transport.Address]:
    """Errors: VIR_ERR_INVALID_ARG; VIR_ERR_CONF_SYNTAX where a file says so."""
    try:
        addresses = [transport.parse_address(text) for text in settings.listen]
        before: dict[transport.Address, transport.Address] = {}
        for address in addresses:
            same = before.setdefault(_resolved(address), address)
            if same is not address and (address.kind == "unix" or address.port):
                is_spelled_so = str(same) == str(address)
                what = "there twice" if is_spelled_so else f"'{same}' once more"
                raise ValueError(f"'{address}' is {what}")
        return addresses
    except ValueError as failure:
        if "listen" in settings.places:
            raise settings.wrong("listen", str(failure)) from failure
        raise errors.error(libvirt.VIR_ERR_INVALID_ARG, f"listen: {failure}") from failure


def _resolved(address: transport.Address) -> transport.Address:
    """The one of all spellings of a unix socket's path."""
    if address.kind != "unix":
        return address
    directory, name = os.path.split(address.path)
    return dataclasses.replace(address, path=f"{os.path.realpath(directory)}/{name}")


def _check(settings: virtbackup_conf.Settings) -> None:
    """Raise for what a start would stumble over, without one."""
    daemon.policy(settings)
    daemon.check(transport.parse_address(DEFAULT_LISTEN), settings)
    for address in _addresses(settings):
        daemon.check(address, settings)
        if address.kind == "tls":
            daemon.tls_context(settings)
    for uri in settings.uris:
        try:
            hypervisor.check_uri(uri)
        except libvirt.libvirtError as failure:
            if "uris" in settings.places:
                raise settings.wrong("uris", str(failure)) from failure
            raise


def _check_certificates(settings: virtbackup_conf.Settings) -> None:
    """Raise where nobody will come in by TLS: a start warns of it, and serves others."""
    by_tls = any(address.kind == "tls" for address in _addresses(settings))
    if by_tls and (refused := daemon.refused_certificate(settings)):
        raise errors.error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, refused)


def _check_places(settings: virtbackup_conf.Settings) -> None:
    """Raise where no socket can be made, as a start finds out when it makes one; that somebody
    listens there is no fault, as that may be the daemon. The default's directory a start makes."""
    for address in _addresses(settings):
        is_made = str(address) == DEFAULT_LISTEN and not pathlib.Path(address.path).parent.exists()
        if not is_made:
            daemon.check_place(address)


def _run(settings: virtbackup_conf.Settings) -> int:
    _check(settings)
    hosts = [
        domains.Host(uri, functools.partial(hypervisor.open_driver, uri, False))
        for uri in settings.uris
    ]
    _allow_descriptors(settings)
    if any(uri.startswith("qemu") for uri in settings.uris):
        event_loop.start()
    served = daemon.Daemon(hosts, settings)
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, functools.partial(_stop, served))
    try:
        places = [served.adopt(fd) for fd in _handed_over()]
        wanted = _addresses(settings)
        if not places and not wanted:
            wanted = [transport.parse_address(DEFAULT_LISTEN)]
        for address in wanted:
            if str(address) == DEFAULT_LISTEN:  # /run is empty when a host comes up
                with contextlib.suppress(OSError):
                    directory = pathlib.Path(address.path).parent
                    directory.mkdir(parents=True)
                    directory.chmod(0o755)  # by whatever umask
        places += [served.listen(address) for address in wanted]
    except BaseException:
        served.close()
        raise
    served.domains.open()
    _say(f"virtbackupd: listening on {', '.join(places)}")
    for place in places:
        if settings.access is None and _is_for_everybody(place):
            logger.warning("%s: every user of this host may use it, unless access is set", place)
    _notify("READY=1")
    served.run(by_signals=True)
    return 0


def _say(text: str) -> None:
    """Print TEXT. Where that cannot be, it is served all the same."""
    try:
        print(text, flush=True)
    except OSError as failure:  # nobody reads it any more, say
        logger.warning("cannot print: %s: %s", text, failure)
        with contextlib.suppress(OSError), pathlib.Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())  # for what is left in its buffer


def _is_for_everybody(place: str) -> bool:
    """Whether all users of this host can connect to a PLACE where we listen."""
    kind, _, path = place.partition(":")
    if kind != "unix":
        return kind == "tcp"
    try:
        return bool(os.stat(path).st_mode & stat.S_IWOTH)  # noqa: PTH116
    except OSError:
        return False


def _stop(served: daemon.Daemon, *_: object) -> None:
    _notify("STOPPING=1")
    served.stop()


def _allow_descriptors(settings: virtbackup_conf.Settings) -> None:
    """Have room for as many clients as there may be, and for what drivers open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * settings.max_clients + _DRIVERS_FDS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _handed_over() -> list[int]:
    """The listening sockets that systemd has made (sd_listen_fds(3))."""
    if os.environ.pop("LISTEN_PID", None) != str(os.getpid()):
        return []
    said = os.environ.pop("LISTEN_FDS", "0")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not (said.isascii() and said.isdigit() and len(said) < 5):
        raise errors.error(libvirt.VIR_ERR_INVALID_ARG, f"LISTEN_FDS: '{said}' is no number")
    fds = list(range(_FIRST_FD, _FIRST_FD + int(said)))
    for fd in fds:
        with contextlib.suppress(OSError):  # there is none, as whoever adopts it says
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
