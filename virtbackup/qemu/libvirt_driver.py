# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU driver for libvirt's own URIs, by libvirt-python and monitor passthrough.

libvirt has the domains, their names and their disks' names; the backup is made on QEMU itself,
beside libvirt's own jobs, with the same code as over a QMP socket.
"""

import contextlib
import os
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

import libvirt

from virtbackup import errors, hypervisor, runtime
from virtbackup.conf import backup_conf, domain_conf, translate
from virtbackup.qemu import (
    agent,
    capabilities,
    domain,
    domain_obj,
    monitor,
    passthrough,
    qmp,
    status,
)

_ENGINES: tuple[capabilities.Engine | None, ...] = (None, "classic", "hybrid")

_OURS = ("engine", "native")
"""Options of a URI that libvirt is not told."""

_ENDS = {
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: "the guest shut down",
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: "the domain was destroyed",
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: "QEMU crashed or was killed",
    libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED: "the domain was migrated to another host",
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED: "the domain was saved to a file",
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: "the domain failed",
    libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT: "the domain was set back to a snapshot",
}
"""Why a domain does not run, as libvirt tells it."""


def open(uri: str, readonly: bool) -> hypervisor.Driver:
    """Serve a libvirt URI on this host; ``?engine=`` is ours, and ``?native=yes``, which has the
    backups made by libvirt itself; the rest is libvirt's.

    Errors: VIR_ERR_INVALID_ARG for an engine that there is not, VIR_ERR_CONFIG_UNSUPPORTED for
    another host, libvirt's own.
    """
    parts = urllib.parse.urlsplit(uri)
    options = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    engine = next((value for key, value in options if key == "engine"), None)
    if engine not in _ENGINES:
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
    rest = urllib.parse.urlencode([pair for pair in options if pair[0] not in _OURS])
    plain = urllib.parse.urlunsplit(parts._replace(query=rest))
    connect = libvirt.openReadOnly if readonly else libvirt.open
    host = LibvirtDriver(connect(plain), engine)
    if native == "no":
        return host
    from virtbackup.qemu import libvirt_native

    return libvirt_native.NativeDriver(host)


class LibvirtDriver:
    """The driver for all domains of one libvirt."""

    def __init__(
        self, connection: "libvirt.virConnect", engine: capabilities.Engine | None = None
    ) -> None:
        self._connection = connection
        self._engine = engine
        self._pid = os.getpid()
        self._trace: TextIO | None = None
        self._domains: dict[str, domain_obj.DomainObj] = {}
        self._identities: dict[str, tuple[int, domain.Identity]] = {}
        """By uuid: of the domain's run of that id."""

    # --- the connection ---

    def close(self) -> None:
        """End the backups that were started to end with us, and libvirt's connection."""
        if os.getpid() != self._pid:
            return
        for one in self._domains.values():
            one.close()
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()

    def get_type(self) -> str:
        return str(self._connection.getType())

    def get_version(self) -> int:
        return int(self._connection.getVersion())

    def is_alive(self) -> bool:
        try:
            return bool(self._connection.isAlive())
        except libvirt.libvirtError:
            return False

    def set_trace(self, trace: TextIO | None) -> None:
        self._trace = trace

    # --- domains ---

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        """libvirt's; and transient ones that are gone, while their backups' status files are."""
        found = [_ref(one) for one in self._connection.listAllDomains()]
        known = {ref.uuid for ref in found}
        left = status.all_in(runtime.directory())
        return found + [
            hypervisor.DomainRef(one.name, one.uuid, None)
            for file, one in left
            if one.uuid not in known and self._file(one.uuid).path == file
        ]

    def _file(self, uuid: str) -> status.StatusFile:
        return status.StatusFile(f"{self._connection.getURI()} {uuid}")

    def domain_get_state(self, ref: hypervisor.DomainRef) -> tuple[int, int]:
        state, reason = self.lookup(ref).state()
        return state, reason

    def domain_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return str(self.lookup(ref).XMLDesc(flags))

    def lookup(self, ref: hypervisor.DomainRef) -> "libvirt.virDomain":
        """libvirt's own. Errors: VIR_ERR_NO_DOMAIN."""
        return self._connection.lookupByUUIDString(ref.uuid)

    def _obj(self, ref: hypervisor.DomainRef) -> domain_obj.DomainObj:
        if ref.uuid not in self._domains:
            self._domains[ref.uuid] = domain_obj.DomainObj(
                self._file(ref.uuid),
                lambda: self._session(ref),
                self._engine,
                quiesce=agent.LibvirtAgent(self._connection, ref.uuid),
                why_gone=lambda: self._why_gone(ref),
            )
        return self._domains[ref.uuid]

    def _why_gone(self, ref: hypervisor.DomainRef) -> str | None:
        """Why the domain does not run, in libvirt's knowledge; None where it has none."""
        try:
            state, reason = self.lookup(ref).state()
        except libvirt.libvirtError:
            return "the domain is gone"
        return _ENDS.get(reason) if state == libvirt.VIR_DOMAIN_SHUTOFF else None

    @contextlib.contextmanager
    def _session(self, ref: hypervisor.DomainRef) -> Iterator[domain.Session]:
        """QEMU of a domain, for one call. Errors: monitor.NotListening where there is none."""
        try:
            found = self.lookup(ref)
        except libvirt.libvirtError as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            raise monitor.NotListening(OSError(0, str(failure)), ref.name) from failure
        try:
            with passthrough.LibvirtMonitor(found, self._trace) as qemu:
                identity = self._identify(found, qemu)
                targets = _targets(domain_conf.DomainDef.parse(found.XMLDesc()))
                yield domain.Session(qemu, identity, targets)
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

    def domain_backup_start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> None:
        found = self.lookup(ref)
        definition = translate.read(xml, lambda: domain_conf.DomainDef.parse(found.XMLDesc()))
        if not found.isActive():
            raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running")
        _check_jobs(found, definition)
        self._obj(ref).backup_start(definition, flags)

    def domain_backup_stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        self._obj(ref).backup_stop(flags)

    def domain_backup_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return self._obj(ref).backup_xml()

    def domain_backup_get_info(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        return self._obj(ref).backup_info()

    def domain_backup_cleanup(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        return self._obj(ref).job.cleanup()

    def domain_branch_list(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> Sequence[backup_conf.Branch]:
        return self._obj(ref).job.branches()

    def domain_branch_delete(self, ref: hypervisor.DomainRef, name: str, flags: int) -> None:
        self._obj(ref).job.delete_branch(name)


def _ref(found: "libvirt.virDomain") -> hypervisor.DomainRef:
    id = found.ID()
    return hypervisor.DomainRef(found.name(), found.UUIDString(), None if id < 0 else id)


def _targets(definition: domain_conf.DomainDef) -> Mapping[str, str]:
    """A device's id in QEMU, which is its alias -> the disk's target."""
    return {disk.alias: disk.target for disk in definition.disks if disk.alias}


def _check_jobs(found: "libvirt.virDomain", definition: backup_conf.BackupDef) -> None:
    """Refuse while libvirt itself has a job on the domain or on a chosen disk.

    Errors: VIR_ERR_OPERATION_INVALID, VIR_ERR_OPERATION_UNSUPPORTED.
    """
    if (job := _libvirts_backup(found)) is not None:
        raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, job)
    left_out = {disk.name for disk in definition.disks if disk.present is False}
    for disk in domain_conf.DomainDef.parse(found.XMLDesc()).disks:
        if disk.target in left_out:
            continue
        with contextlib.suppress(libvirt.libvirtError):  # what has no medium has no job
            if found.blockJobInfo(disk.target, 0):
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                    f"disk '{disk.target}' already in active block job of libvirt's",
                )


def _libvirts_backup(found: "libvirt.virDomain") -> str | None:
    """What libvirt's own backup job is called, if one runs."""
    if not hasattr(found, "backupGetXMLDesc"):
        return None
    try:
        found.backupGetXMLDesc(0)
    except libvirt.libvirtError:
        return None
    return "another backup job is already running: libvirt's own (virsh domjobabort ends it)"


_: Callable[["libvirt.virConnect"], hypervisor.BackupDriver] = LibvirtDriver
"""mypy's proof that the driver has every hook."""
