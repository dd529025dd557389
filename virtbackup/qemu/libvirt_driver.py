# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU driver for libvirt's own URIs, by libvirt-python and monitor passthrough.

libvirt has the domains, their names and their disks' names; the backup is made on QEMU itself,
beside libvirt's own jobs, with the same code as over a QMP socket.
"""

import contextlib
import logging
import os
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO, TypeVar

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, dialects, domain_conf
from virtbackup.qemu import (
    agent,
    capabilities,
    domain,
    domain_obj,
    libvirt_events,
    libvirt_queries,
    lifecycle,
    monitor,
    passthrough,
    qmp,
    status,
)

logger = logging.getLogger(__name__)

_ENGINES: tuple[capabilities.Engine | None, ...] = (None, "classic", "hybrid")

_OURS = ("engine", "native")
"""Options of a URI that libvirt is not told."""


_own_errors = libvirt_queries.own_errors
_ref = libvirt_queries.ref_of
_Asked = TypeVar("_Asked")


class Opener:
    """Opens the driver by a URI, or on a connection of libvirt's that is open."""

    def __call__(self, uri: str, readonly: bool) -> hypervisor.Driver:
        """Serve a libvirt URI on this host; ``?engine=`` is ours, and ``?native=yes``, which has
        the backups made by libvirt itself; the rest is libvirt's.

        Errors: VIR_ERR_INVALID_ARG for an engine that there is not, VIR_ERR_CONFIG_UNSUPPORTED for
        another host, libvirt's own.
        """
        plain, engine, native = _split(uri)
        connect = libvirt.openReadOnly if readonly else libvirt.open
        with _own_errors():
            host = LibvirtDriver(connect(plain), engine, lambda: connect(plain))
        if not native:
            return host
        from virtbackup.qemu import libvirt_native

        return libvirt_native.NativeDriver(host)

    def check(self, uri: str) -> None:
        """Errors: as to open it, for what is ours to say of a URI."""
        _split(uri)

    def adopt(self, connection: "libvirt.virConnect") -> hypervisor.Driver:
        """Serve the domains of a CONNECTION that stays its owner's to close.

        Errors: VIR_ERR_CONFIG_UNSUPPORTED for another host.
        """
        uri = connection.getURI()
        _split(uri)
        return LibvirtDriver(connection, None, lambda: libvirt.open(uri), owned=False)


open: hypervisor.Adopter = Opener()
"""What the registry of drivers points to."""


def _split(uri: str) -> tuple[str, capabilities.Engine | None, bool]:
    """(The URI that is libvirt's, the engine, whether libvirt makes the backups itself)."""
    parts = urllib.parse.urlsplit(uri)
    options = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    engines = [value for key, value in options if key == "engine"]
    engine = engines[0] if engines else None
    if engine not in _ENGINES or len(engines) > 1:
        raise errors.invalid_arg(
            "virConnectOpen", "uri", f"'{uri}': expected engine=classic or engine=hybrid"
        )
    if parts.netloc:
        raise errors.error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            f"'{uri}': a backup is started on the host of the domain, not from another",
        )
    native = dict(options).get("native", "no")
    if native not in ("yes", "no"):
        raise errors.invalid_arg("virConnectOpen", "uri", f"'{uri}': expected native=yes or no")
    rest = (pair for pair in parts.query.split("&") if pair.partition("=")[0] not in _OURS)
    return urllib.parse.urlunsplit(parts._replace(query="&".join(rest))), engine, native == "yes"


def _is_none_of_libvirts(ref: hypervisor.DomainRef) -> errors.Error:
    """Of a guest that runs and has disks, by none of which QEMU has a device."""
    return errors.error(
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        f"'{ref.name}' is no guest of libvirt's, but one that a virtbackupd serves by its QMP"
        " socket: open the daemon's own URI, virtbackup+unix:///path/to/socket or the like",
    )


class LibvirtDriver(domain_obj.BackupHooks, libvirt_events.LibvirtEvents):
    """The driver for all domains of one libvirt."""

    def __init__(
        self,
        connection: "libvirt.virConnect",
        engine: capabilities.Engine | None = None,
        connect: "Callable[[], libvirt.virConnect] | None" = None,
        owned: bool = True,
    ) -> None:
        """CONNECT opens one anew after libvirt's daemon was restarted, or after CONNECTION was
        closed by whom it belongs to, where it is not OWNED by us."""
        super().__init__()
        self._current = connection
        self._uri: str = connection.getURI()
        self._connect = connect
        self._owned = owned
        # Reentrant, as a signal's handler may close us.
        self._connecting = threading.RLock()
        self._adding = threading.RLock()
        self._closed = False
        self._asked: set[object] = set()
        """One for each call by the connection that has not returned."""
        self._engine = engine
        self._pid = os.getpid()
        self._trace: TextIO | None = None
        self._identities: dict[str, tuple[int, domain.Identity]] = {}
        """By uuid: of the domain's run of that id."""
        self._hearings: weakref.WeakKeyDictionary[lifecycle.Hearing, str] = (
            weakref.WeakKeyDictionary()
        )
        """Who listens to a domain, to its uuid."""
        self._listens = True
        self.backup_ended: Callable[[str, str], None] = lambda uuid, reason: None
        """Called, in any thread, with a domain's uuid and the reason, when a backup that was
        started here ends before it is stopped."""

    # --- the connection ---

    def close(self) -> None:
        """End the backups that were started to end with us, and libvirt's connection."""
        if os.getpid() != self._pid:
            return
        until = time.monotonic() + domain_obj.PATIENCE
        with self._adding:
            self._closed = True
        is_over = [one.close(until) for one in list(self._domains.values())]
        self._events.close()
        # libvirt frees what a call by the connection still uses: then it ends with the last of us.
        if self._owned and all(is_over) and not self._asked:
            with contextlib.suppress(libvirt.libvirtError):
                passthrough.patiently(self._current.close, domain_obj.HASTE)

    def leave(self) -> None:
        """Hear nothing more over libvirt's connection; what was started goes on."""
        with self._connecting:
            self._listens = False
            for hearing in self._hearings:
                hearing.pause()

    def listen(self, hearing: lifecycle.Hearing, uuid: str) -> None:
        """Have HEARING listen to a domain, through all connections. Errors: libvirt's own."""
        connection = self._connection
        with self._connecting:
            self._hearings[hearing] = uuid
            if self._listens:
                hearing.listen(connection, uuid)

    @property
    def _connection(self) -> "libvirt.virConnect":
        """libvirt, by a new connection where the last was lost. Errors: libvirt's own."""
        with self._connecting, _own_errors():
            if self._connect is not None and not self.is_alive():
                self._current = self._connect()
                self._owned = True
                logger.info("connected to libvirt anew")
                self._connected_anew(self._current)
                for hearing, uuid in self._hearings.items() if self._listens else ():
                    hearing.listen(self._current, uuid)
            return self._current

    @_own_errors()
    def get_type(self) -> str:
        return str(self._connection.getType())

    @_own_errors()
    def get_version(self) -> int:
        return int(self._connection.getVersion())

    def is_alive(self) -> bool:
        try:
            # Who has no event loop does not notice that the daemon has gone until it is asked.
            ask = self._current.getLibVersion
            return bool(self._current.isAlive() and self._patiently(ask, domain_obj.HASTE))
        except monitor.NoAnswer:  # it stands still, or has much to do
            return True
        except (libvirt.libvirtError, TypeError):  # the latter once it is closed
            return False

    def set_trace(self, trace: TextIO | None) -> None:
        self._trace = trace

    # --- domains ---

    @_own_errors()
    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        """libvirt's; and transient ones that are gone, while their backups' status files are."""
        found = [_ref(one) for one in self._connection.listAllDomains()]
        known = {ref.uuid for ref in found}
        return found + [ref for ref in self._left_behind() if ref.uuid not in known]

    def _file(self, uuid: str) -> status.StatusFile:
        """The same for every way to spell the URI of one libvirt."""
        path = urllib.parse.urlsplit(self._uri).path
        return status.StatusFile(f"libvirt {path} {uuid}")

    @_own_errors()
    def domain_get_state(self, ref: hypervisor.DomainRef) -> tuple[int, int]:
        state, reason = self.lookup(ref).state()
        return state, reason

    @_own_errors()
    def domain_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return str(self.lookup(ref).XMLDesc(flags))

    @_own_errors()
    def lookup(self, ref: hypervisor.DomainRef) -> "libvirt.virDomain":
        """libvirt's own. Errors: VIR_ERR_NO_DOMAIN."""
        connection = self._connection
        return self._patiently(lambda: connection.lookupByUUIDString(ref.uuid))

    def _patiently(self, what: Callable[[], _Asked], patience: float | None = None) -> _Asked:
        """As ``passthrough.patiently``, for a call by the connection."""
        token = object()
        self._asked.add(token)

        def ask() -> _Asked:
            try:
                return what()
            finally:
                self._asked.discard(token)

        return passthrough.patiently(ask, patience)

    def _obj(self, ref: hypervisor.DomainRef) -> domain_obj.DomainObj:
        with self._adding:
            if ref.uuid not in self._domains:
                self._domains[ref.uuid] = domain_obj.DomainObj(
                    self._file(ref.uuid),
                    lambda: self._session(ref),
                    self._engine,
                    quiesce=agent.LibvirtAgent(lambda: self.lookup(ref), ref.name),
                    host=_Host(self, ref),
                    notify=self._notify(ref),
                )
                if self._closed:
                    self._domains[ref.uuid].close()
            return self._domains[ref.uuid]

    @contextlib.contextmanager
    def _session(self, ref: hypervisor.DomainRef) -> Iterator[domain.Session]:
        """QEMU of a domain, for one call. Errors: monitor.NotListening where there is none."""
        found = _not_running_where_gone(ref, lambda: self.lookup(ref))
        try:
            with _own_errors(), passthrough.LibvirtMonitor(found, self._trace) as qemu:
                identity = self._identify(found, qemu)
                xml = _not_running_where_gone(ref, found.XMLDesc)
                disks = domain_conf.DomainDef.parse(xml).disks
                if disks and not any(disk.alias for disk in disks):
                    # Or it has ended since its monitor answered: what is defined has none.
                    if not _not_running_where_gone(ref, found.isActive):
                        raise passthrough.not_running(qemu.path)
                    raise _is_none_of_libvirts(ref)
                yield domain.Session(qemu, identity, disks)
        except qmp.ProtocolError as failure:
            raise errors.error(
                libvirt.VIR_ERR_INTERNAL_ERROR, f"QEMU monitor: {failure}"
            ) from failure

    def _identify(
        self, found: "libvirt.virDomain", qemu: passthrough.LibvirtMonitor
    ) -> domain.Identity:
        uuid, id = found.UUIDString(), found.ID()
        known = self._identities.get(uuid)
        process = domain.process_of(qemu)
        if known is None or known[0] != id or known[1].process != process:
            identity = domain.identify(qemu, _ref(found))
            self._identities[uuid] = id, identity
        return self._identities[uuid][1]

    # --- backup ---

    def adopt_backups(self) -> None:
        """One that cannot be keeps no other domain's from it, and is logged."""
        for ref in self._left_behind():
            try:
                self._obj(ref).adopt()
            except (OSError, errors.Error) as failure:
                logger.warning("domain=%s its backup is not watched: %s", ref.name, failure)

    @_own_errors()
    def domain_backup_start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> str:
        found = self.lookup(ref)
        definition = dialects.read(xml, lambda: domain_conf.DomainDef.parse(found.XMLDesc()))
        if not found.isActive():
            raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running")
        _check_jobs(found, definition)
        return self._obj(ref).backup_start(definition, flags)


def _not_running_where_gone(ref: hypervisor.DomainRef, ask: Callable[[], _Asked]) -> _Asked:
    """What is asked; a domain that libvirt does not know, or not any more, does not run."""
    try:
        return ask()
    except libvirt.libvirtError as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        raise passthrough.NotRunning(failure, ref.name) from failure


class _Host:
    """What libvirt knows of one domain (``domain_obj.Host``)."""

    def __init__(self, driver: LibvirtDriver, ref: hypervisor.DomainRef) -> None:
        self._driver = driver
        self._ref = ref

    def why_ended(self) -> str | None:
        try:
            state, reason = self._driver.lookup(self._ref).state()
        except libvirt.libvirtError as failure:
            gone = failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN
            return lifecycle.UNKNOWN if gone else None
        return lifecycle.why_ended(state, reason)

    def listen(self, hearing: lifecycle.Hearing) -> None:
        self._driver.listen(hearing, self._ref.uuid)

    def backup_ended(self, reason: str) -> None:
        self._driver.backup_ended(self._ref.uuid, reason)


def _check_jobs(found: "libvirt.virDomain", definition: backup_conf.BackupDef) -> None:
    """Refuse while libvirt itself has a job on the domain or on a chosen disk.

    Errors: VIR_ERR_OPERATION_INVALID, VIR_ERR_OPERATION_UNSUPPORTED.
    """
    if (job := _libvirts_job(found)) is not None:
        raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, job)
    left_out = {disk.name for disk in definition.disks if disk.present is False}
    for disk in domain_conf.DomainDef.parse(found.XMLDesc()).disks:
        # Of a disk without a medium libvirt says no word, but an error on stderr and in its log.
        if disk.target in left_out or not disk.has_medium:
            continue
        job = None
        with contextlib.suppress(libvirt.libvirtError):
            job = found.blockJobInfo(disk.target, 0)
        if job:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"disk '{disk.target}' already in active block job of libvirt's",
            )


_OPERATIONS = {
    getattr(libvirt, f"VIR_DOMAIN_JOB_OPERATION_{name}", None): words
    for name, words in {
        "START": "start",
        "SAVE": "save",
        "RESTORE": "restore",
        "MIGRATION_IN": "migration",
        "MIGRATION_OUT": "migration",
        "SNAPSHOT": "snapshot",
        "SNAPSHOT_REVERT": "snapshot revert",
        "DUMP": "dump",
    }.items()
}
_BACKUP = getattr(libvirt, "VIR_DOMAIN_JOB_OPERATION_BACKUP", None)


def _libvirts_job(found: "libvirt.virDomain") -> str | None:
    """What libvirt is at with the whole domain, as an error says it; None: nothing."""
    try:
        job = found.jobStats()
    except libvirt.libvirtError:
        return None  # it ended just now, or QEMU did
    if job.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
        return None
    operation = job.get("operation")
    if operation == _BACKUP:
        return "another backup job is already running: libvirt's own (virsh domjobabort ends it)"
    return f"the domain is busy with another job of libvirt's: {_OPERATIONS.get(operation, 'job')}"


_: Callable[["libvirt.virConnect"], hypervisor.BackupDriver] = LibvirtDriver
_queries: Callable[["libvirt.virConnect"], hypervisor.QueryDriver] = LibvirtDriver
_events: Callable[["libvirt.virConnect"], hypervisor.EventDriver] = LibvirtDriver
_keeps: Callable[["libvirt.virConnect"], hypervisor.KeeperDriver] = LibvirtDriver
_shares: Callable[["libvirt.virConnect"], hypervisor.SharedDriver] = LibvirtDriver
"""mypy's proofs that the driver has every hook."""
