# SPDX-License-Identifier: LGPL-2.1-or-later
"""The public API in libvirt-python's shapes (libvirt-domain-backup.c): check arguments, hand on."""

import os
import re
import socket
from collections.abc import Callable, Set
from types import TracebackType
from typing import Any, TextIO

import libvirt

from virtbackup import access, errors, hypervisor
from virtbackup.conf import backup_conf

VERSION = 0 * 1000000 + 1 * 1000 + 0
"""This library's version as virConnectGetLibVersion counts."""

VIR_DOMAIN_BACKUP_START_QUIESCE = 1 << 0
"""The guest agent freezes all mounted file systems for the instant of the start."""
VIR_DOMAIN_BACKUP_START_AUTODESTROY = 1 << 1
"""The backup ends, cancelled, when the connection that started it closes or its process dies."""
VIR_DOMAIN_BACKUP_STOP_CANCEL = 1 << 0
"""Give the backup up: the branch stays where it was and no verdict is asked for."""

START_FLAGS = VIR_DOMAIN_BACKUP_START_QUIESCE | VIR_DOMAIN_BACKUP_START_AUTODESTROY
STOP_FLAGS = VIR_DOMAIN_BACKUP_STOP_CANCEL

_ACTIVE = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
_INACTIVE = libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE


def open(uri: str | None = None, readonly: bool = False) -> "Connection":
    """Connect to a hypervisor (virConnectOpen, virConnectOpenReadOnly).

    URI None is $LIBVIRT_DEFAULT_URI, else ``qemu:///system``. Errors: VIR_ERR_NO_CONNECT when no
    driver serves the URI, VIR_ERR_INVALID_ARG for a URI that makes no sense, and the driver's own.
    """
    if uri is None:
        uri = os.environ.get("LIBVIRT_DEFAULT_URI") or "qemu:///system"
    return Connection(uri, hypervisor.open_driver(uri, readonly), readonly)


class Connection:
    """A connection to a hypervisor (virConnect)."""

    def __init__(self, uri: str, driver: hypervisor.Driver, readonly: bool) -> None:
        self._uri = uri
        self._driver: hypervisor.Driver | None = driver
        self._readonly = readonly

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> int:
        """Close the connection; 0, as libvirt-python. Closing twice does nothing."""
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()
        return 0

    def getURI(self) -> str:
        """The URI that was opened."""
        return self._uri

    def getType(self) -> str:
        """The kind of hypervisor: ``QEMU``."""
        return self._open("virConnectGetType").get_type()

    def getHostname(self) -> str:
        """The name of the host this process runs on."""
        return socket.gethostname()

    def getVersion(self) -> int:
        """The hypervisor's version: major * 1000000 + minor * 1000 + micro."""
        return self._open("virConnectGetVersion").get_version()

    def getLibVersion(self) -> int:
        """This library's version, counted likewise."""
        return VERSION

    def isAlive(self) -> int:
        """1 while the hypervisor can be spoken to, else 0."""
        return int(self._driver is not None and self._driver.is_alive())

    def isReadOnly(self) -> bool:
        """Whether the connection was opened read-only."""
        return self._readonly

    def setTrace(self, trace: TextIO | None) -> None:
        """Write every monitor line sent and received, with times, to TRACE; None ends it."""
        self._open("virConnectSetTrace").set_trace(trace)

    def listAllDomains(self, flags: int = 0) -> list["Domain"]:
        """All domains; FLAGS: VIR_CONNECT_LIST_DOMAINS_ACTIVE, _INACTIVE, or both."""
        function = "virConnectListAllDomains"
        _check_flags(function, flags, _ACTIVE | _INACTIVE)
        refs = self._open(function).list_domains()
        wanted = flags & (_ACTIVE | _INACTIVE) or (_ACTIVE | _INACTIVE)
        return [
            Domain(self, ref) for ref in refs if wanted & (_INACTIVE if ref.id is None else _ACTIVE)
        ]

    def lookupByName(self, name: str) -> "Domain":
        """The domain called NAME. Errors: VIR_ERR_NO_DOMAIN."""
        function = "virDomainLookupByName"
        _check_not_none(function, name=name)
        return self._lookup(
            function, lambda ref: ref.name == name, f"no domain with matching name '{name}'"
        )

    def lookupByUUIDString(self, uuidstr: str) -> "Domain":
        """The domain of that UUID. Errors: VIR_ERR_NO_DOMAIN, VIR_ERR_INVALID_ARG."""
        function = "virDomainLookupByUUIDString"
        _check_not_none(function, uuidstr=uuidstr)
        if not re.fullmatch(r"[0-9a-fA-F-]{32,36}", uuidstr):
            raise errors.invalid_arg(function, "uuidstr", "Invalid UUID")
        import uuid  # slow to load, and few ask by one

        try:
            wanted = str(uuid.UUID(uuidstr))
        except ValueError as failure:
            raise errors.invalid_arg(function, "uuidstr", "Invalid UUID") from failure
        return self._lookup(
            function, lambda ref: ref.uuid == wanted, f"no domain with matching uuid '{wanted}'"
        )

    def lookupByID(self, id: int) -> "Domain":
        """The running domain of that id. Errors: VIR_ERR_NO_DOMAIN."""
        function = "virDomainLookupByID"
        return self._lookup(function, lambda ref: ref.id == id, f"no domain with matching id {id}")

    def _lookup(
        self, function: str, matches: Callable[[hypervisor.DomainRef], bool], otherwise: str
    ) -> "Domain":
        for ref in self._open(function).list_domains():
            if matches(ref):
                return Domain(self, ref)
        raise errors.error(libvirt.VIR_ERR_NO_DOMAIN, otherwise)

    def _open(self, function: str) -> hypervisor.Driver:
        if self._driver is None:
            raise errors.error(libvirt.VIR_ERR_INVALID_CONN, function, domain=libvirt.VIR_FROM_NONE)
        return self._driver

    def _granted(self) -> Set[access.Perm]:
        return access.READ_ONLY if self._readonly else access.EVERYTHING


class Domain:
    """A domain of a connection (virDomain)."""

    def __init__(self, connection: Connection, ref: hypervisor.DomainRef) -> None:
        self._connection = connection
        self._ref = ref

    def connect(self) -> Connection:
        """The connection this domain came from."""
        return self._connection

    def name(self) -> str:
        """The domain's name."""
        return self._ref.name

    def UUIDString(self) -> str:
        """The domain's uuid."""
        return self._ref.uuid

    def ID(self) -> int:
        """The running domain's id, else -1."""
        return -1 if self._ref.id is None else self._ref.id

    def isActive(self) -> int:
        """1 when the domain was running as it was looked up, else 0."""
        return int(self._ref.id is not None)

    def state(self, flags: int = 0) -> list[int]:
        """[VIR_DOMAIN_* state, reason]."""
        function = "virDomainGetState"
        _check_flags(function, flags, 0)
        return list(self._connection._open(function).domain_get_state(self._ref))

    def XMLDesc(self, flags: int = 0) -> str:
        """The ``<domain>`` document: at least name, uuid and disks."""
        function = "virDomainGetXMLDesc"
        xml: str = self._call(function, "domain_get_xml_desc")(self._ref, flags)
        return xml

    def backupStart(self, xmlDesc: str, flags: int = 0) -> int:
        """Freeze disks at one instant and export them over NBD (virDomainBackupStart).

        XMLDESC is a ``<domainbackup>``; FLAGS are VIR_DOMAIN_BACKUP_START_*. Returns 0 once the
        exports answer. On any error nothing of the backup remains. Errors: those of
        ``BackupDef.parse`` and ``align_disks``; VIR_ERR_OPERATION_INVALID while a backup runs or
        when something else owns a disk or the NBD server; VIR_ERR_INTERNAL_ERROR with QEMU's words.
        """
        function = "virDomainBackupStart"
        start = self._call(function, "domain_backup_start")
        _check_flags(function, flags, START_FLAGS)
        _check_not_none(function, xmlDesc=xmlDesc)
        start(self._ref, xmlDesc, flags)
        return 0

    def backupStop(self, flags: int = 0) -> int:
        """End the exports and say whether the backup was good (virDomainBackupStop).

        Returns 0 when every disk was good until its export ended. FLAGS:
        VIR_DOMAIN_BACKUP_STOP_CANCEL asks for no verdict. Errors: VIR_ERR_OPERATION_FAILED, each
        bad disk with its reason (everything is cleaned up all the same);
        VIR_ERR_NO_DOMAIN_BACKUP when none runs.
        """
        function = "virDomainBackupStop"
        stop = self._call(function, "domain_backup_stop")
        _check_flags(function, flags, STOP_FLAGS)
        stop(self._ref, flags)
        return 0

    def backupGetXMLDesc(self, flags: int = 0) -> str:
        """The running backup with every default filled in. Errors: VIR_ERR_NO_DOMAIN_BACKUP."""
        function = "virDomainBackupGetXMLDesc"
        get = self._call(function, "domain_backup_get_xml_desc")
        _check_flags(function, flags, 0)
        xml: str = get(self._ref, flags)
        return xml

    def backupGetInfo(self, flags: int = 0) -> backup_conf.BackupInfo:
        """How the running backup does, disk by disk. Errors: VIR_ERR_NO_DOMAIN_BACKUP."""
        function = "virDomainBackupGetInfo"
        get = self._call(function, "domain_backup_get_info")
        _check_flags(function, flags, 0)
        info: backup_conf.BackupInfo = get(self._ref, flags)
        return info

    def backupCleanup(self, flags: int = 0) -> list[str]:
        """Remove what a crash left of a backup, and only that; one line for each thing removed."""
        function = "virDomainBackupCleanup"
        cleanup = self._call(function, "domain_backup_cleanup")
        _check_flags(function, flags, 0)
        return list(cleanup(self._ref, flags))

    def branchList(self, flags: int = 0) -> list[backup_conf.Branch]:
        """The branches of incremental backups, and dirty bitmaps of others (foreign).

        Errors: VIR_ERR_OPERATION_UNSUPPORTED where the hypervisor cannot have any."""
        function = "virDomainBranchList"
        get = self._call(function, "domain_branch_list")
        _check_flags(function, flags, 0)
        return list(get(self._ref, flags))

    def branchDelete(self, name: str, flags: int = 0) -> int:
        """Forget branch NAME on every disk; 0. Its next backup is a full one.

        Errors: VIR_ERR_NO_DOMAIN_CHECKPOINT where there is none; VIR_ERR_OPERATION_INVALID while a
        backup of it runs, and for a bitmap that somebody else made.
        """
        function = "virDomainBranchDelete"
        delete = self._call(function, "domain_branch_delete")
        _check_flags(function, flags, 0)
        _check_not_none(function, name=name)
        delete(self._ref, name, flags)
        return 0

    def _call(self, function: str, method: str) -> Callable[..., Any]:
        """The driver's METHOD, where the connection may use it and the driver has it."""
        driver = self._connection._open(function)
        if not access.allowed(method, self._connection._granted()):
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_DENIED,
                f"read only access prevents {function}",
                domain=libvirt.VIR_FROM_DOMAIN,
            )
        hook: Callable[..., Any] | None = getattr(driver, method, None)
        if hook is None:
            raise errors.error(libvirt.VIR_ERR_NO_SUPPORT, function, domain=libvirt.VIR_FROM_DOMAIN)
        return hook


def _check_flags(function: str, flags: int, known: int) -> None:
    if unknown := flags & ~known:
        raise errors.unsupported_flags(function, unknown)


def _check_not_none(function: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value is None:
            raise errors.null_arg(function, name)
