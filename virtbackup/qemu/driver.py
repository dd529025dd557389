# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU driver over a QMP socket: ``qmp:///absolute/path`` (the patch's hunk of qemu_driver.c).

A QMP socket serves one client at a time, so the driver connects for a call and lets go after it:
between calls the monitor is everybody's. What must outlast a call is in the status file and QEMU.
"""

import contextlib
import dataclasses
import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import libvirt

from virtbackup import errors, hypervisor, runtime
from virtbackup.conf import dialects, domain_conf
from virtbackup.qemu import (
    agent,
    capabilities,
    capabilities_cache,
    domain,
    domain_obj,
    monitor,
    qmp,
    queries,
    status,
)


def parse_uri(uri: str) -> tuple[str, capabilities.Engine | None, str | None]:
    """(monitor's path, engine asked for, agent's path). Errors: VIR_ERR_INVALID_ARG."""
    parts = urllib.parse.urlsplit(uri)
    path = urllib.parse.unquote(parts.path, errors="surrogateescape")
    pairs = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    twice = len(options) < len(pairs)
    engine, socket = options.pop("engine", None), options.pop("agent", None)
    engines: tuple[capabilities.Engine | None, ...] = (None, "classic", "hybrid")
    bad = bool(parts.netloc or parts.fragment or options or twice) or not _is_absolute(path)
    if bad or engine not in engines or not (socket is None or _is_absolute(socket)):
        raise errors.invalid_arg(
            "virConnectOpen",
            "uri",
            f"'{uri}': expected qmp:///absolute/path/to/qmp.sock[?engine=classic|hybrid]"
            "[&agent=/absolute/path/to/qga.sock]",
        )
    return path, engine, socket


def _is_absolute(path: str) -> bool:
    """Whether PATH is absolute, and can be a file's at all."""
    try:
        return os.fsencode(path).startswith(b"/") and "\0" not in path
    except UnicodeEncodeError:
        return False


@hypervisor.checked_by(parse_uri)
def open(uri: str, readonly: bool) -> "QmpDriver":
    """Serve ``qmp:///path[?engine=classic|hybrid][&agent=/path]``: without an engine, the safest
    that QEMU has; the agent's socket is for quiescing.

    Errors: those of ``parse_uri``; those of ``monitor.Monitor``, unless nobody listens and a status
    file says that a backup ran there.
    """
    path, engine, socket = parse_uri(uri)
    return QmpDriver(path, engine, quiesce=agent.SocketAgent(socket) if socket else None)


class QmpDriver(domain_obj.BackupHooks, queries.QmpQueries):
    """The driver for the one QEMU (or qemu-storage-daemon) behind a QMP socket."""

    def __init__(
        self,
        path: str,
        engine: capabilities.Engine | None = None,
        file: status.StatusFile | None = None,
        quiesce: agent.Agent | None = None,
        place: str | None = None,
    ) -> None:
        """FILE is where the state of PATH's backup is, in place of the user's state directory;
        PLACE what a guest without a uuid is known by, in place of PATH."""
        super().__init__()
        self._path = path
        self._place = place
        self._pid = os.getpid()
        self._trace: TextIO | None = None
        self._identity: domain.Identity | None = None
        self._file = file or status.StatusFile(os.path.realpath(path))
        self._domain = domain_obj.DomainObj(self._file, self._connect, engine, quiesce)
        try:
            with self._session():
                pass
        except monitor.NotListening:
            if (left := self._left()) is None:
                raise
            self._gone = left

    # --- the connection ---

    def close(self) -> None:
        """End the backup that was started to end with us; a failure to is logged. In a process that
        was forked from the one that opened us, nothing: what there is is the other's."""
        if os.getpid() == self._pid:
            self._domain.close()
            self._events.close()

    def get_type(self) -> str:
        return "QEMU"

    def get_version(self) -> int:
        if self._identity is None:
            raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running")
        major, minor, micro = self._identity.capabilities.version
        return major * 1000000 + minor * 1000 + micro

    def is_alive(self) -> bool:
        try:
            with self._session():
                return True
        except status.Interrupted:
            return True
        except errors.Error:
            return False

    def set_trace(self, trace: TextIO | None) -> None:
        self._trace = trace

    @contextlib.contextmanager
    def _session(self) -> Iterator[domain.Session]:
        """QEMU, for one call. Errors, too: status.Interrupted, as the monitor serves the call that
        a signal's handler is in the middle of."""
        if self._file.is_taken_here():
            raise status.Interrupted
        with self._connect() as session:
            yield session

    @contextlib.contextmanager
    def _connect(self) -> Iterator[domain.Session]:
        """QEMU. Who it is is asked again only when another process answers."""
        with _qmp_border(), monitor.SocketMonitor(self._path, self._trace) as qemu:
            process = domain.process_of(qemu)
            if self._identity is None or process is None or process != self._identity.process:
                self._identity = _identify(qemu, process, self._place)
                self._watch_process()
            yield domain.Session(qemu, self._identity)

    # --- domains ---

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        """The one domain; one whose QEMU is gone is listed while its backup's status file is."""
        try:
            with self._session() as session:
                return [session.ref]
        except monitor.NotListening:
            left = self._left()
            return [] if left is None else [left]

    def _left(self) -> hypervisor.DomainRef | None:
        """The domain, by its backup's status file."""
        left = self._file.load()
        return None if left is None else hypervisor.DomainRef(left.name, left.uuid, None)

    def domain_get_state(self, ref: hypervisor.DomainRef) -> tuple[int, int]:
        try:
            with self._session() as session:
                return domain.state(session.qemu, session.capabilities)
        except monitor.NotListening:
            return libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN

    def domain_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        """Nothing is known of the domain but how it runs: INACTIVE, it is without its id alone."""
        found = self._definition()
        if flags & libvirt.VIR_DOMAIN_XML_INACTIVE:
            found = dataclasses.replace(found, id=None)
        return found.format()

    def _definition(self) -> domain_conf.DomainDef:
        with self._session() as session:
            return domain.definition(session.ref, self._domain.job.disks(session))

    # --- backup ---

    def adopt_backups(self) -> None:
        self._domain.adopt()

    def _obj(self, ref: hypervisor.DomainRef) -> domain_obj.DomainObj:
        return self._domain

    def domain_backup_start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> str:
        return self._domain.backup_start(dialects.read(xml, self._definition), flags)


def _identify(
    qemu: monitor.Monitor, process: runtime.Process | None, place: str | None
) -> domain.Identity:
    """Who answers, in PROCESS, at PLACE; what its program can do is asked once."""
    program = capabilities_cache.program_of(process)
    known = capabilities_cache.load(program, qemu.greeting) if program else None
    identity = domain.identify(qemu, known=known, place=place)
    if program and known is None and identity.process == process:
        capabilities_cache.store(program, qemu.greeting, identity.capabilities)
    return identity


@contextlib.contextmanager
def _qmp_border() -> Iterator[None]:
    """A reply that no parser knows leaves here as an error for the caller."""
    try:
        yield
    except qmp.ProtocolError as failure:
        raise errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, f"QEMU monitor: {failure}") from failure


if TYPE_CHECKING:

    class _Complete(QmpDriver):
        """With those hooks of ``hypervisor.QueryDriver`` that only libvirt has."""

        domain_get_autostart_once: Any
        get_all_domain_stats: Any
        domain_fsfreeze: Any
        domain_fsthaw: Any

    _queries: type[hypervisor.QueryDriver] = _Complete


_: Callable[[str, bool], hypervisor.BackupDriver] = open
_events: Callable[[str, bool], hypervisor.EventDriver] = open
_keeps: Callable[[str, bool], hypervisor.KeeperDriver] = open
_shares: Callable[[str, bool], hypervisor.SharedDriver] = open
"""mypy's proofs that the driver has every hook."""
