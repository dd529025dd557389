# SPDX-License-Identifier: LGPL-2.1-or-later
"""The public API in libvirt-python's shapes (libvirt-domain-backup.c): check arguments, hand on."""

import contextlib
import itertools
import logging
import operator
import os
import re
import socket
from collections.abc import Callable, Set
from types import TracebackType
from typing import Any, TextIO

import libvirt

from virtbackup import access, errors, hypervisor
from virtbackup.conf import backup_conf

logger = logging.getLogger(__name__)

VERSION = hypervisor.VERSION
"""This library's version as virConnectGetLibVersion counts."""

VIR_DOMAIN_BACKUP_START_QUIESCE = hypervisor.START_QUIESCE
"""The guest agent freezes all mounted file systems for the instant of the start."""
VIR_DOMAIN_BACKUP_START_AUTODESTROY = hypervisor.START_AUTODESTROY
"""The backup ends, cancelled, when the connection that started it closes. Where the process ends
without that, virtbackupd ends it at once; elsewhere the next start or ``backupCleanup`` does, and
until then nobody watches it for the guest's sake. A connection that is dropped is not closed, but
for virtbackupd's: its backup runs on, watched, as long as the process does."""
VIR_DOMAIN_BACKUP_STOP_CANCEL = hypervisor.STOP_CANCEL
"""Give the backup up: the branch stays where it was and no verdict is asked for."""

VIR_DOMAIN_EVENT_ID_BACKUP_ENDED = 1 << 16
"""Of domainEventRegisterAny: a backup has ended, whoever ended it. Told are those that are started
or asked for by the connection, and those that run as its first callback is registered; by a
virtbackupd, all that its clients start."""

EventCallback = Callable[..., object]
"""(connection, domain, event, detail, opaque) for VIR_DOMAIN_EVENT_ID_LIFECYCLE; (connection,
domain, good, reason, opaque) for VIR_DOMAIN_EVENT_ID_BACKUP_ENDED, REASON being None where the
backup was good. May be called by any thread."""

START_FLAGS = VIR_DOMAIN_BACKUP_START_QUIESCE | VIR_DOMAIN_BACKUP_START_AUTODESTROY
STOP_FLAGS = VIR_DOMAIN_BACKUP_STOP_CANCEL

_ACTIVE = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
_INACTIVE = libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE
_KINDS: dict[int, type] = {
    libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: hypervisor.LifecycleEvent,
    VIR_DOMAIN_EVENT_ID_BACKUP_ENDED: hypervisor.BackupEnded,
}
_numbers = itertools.count()
"""Of callbacks."""


def open(uri: str | None = None, readonly: bool = False) -> "Connection":
    """Connect to a hypervisor (virConnectOpen, virConnectOpenReadOnly).

    URI None, or empty, is $LIBVIRT_DEFAULT_URI, else ``qemu:///system``. Errors:
    VIR_ERR_NO_CONNECT when no driver serves the URI, VIR_ERR_INVALID_ARG for a URI that makes no
    sense, and the driver's own.
    """
    if uri is None or uri == "":  # not what else is false
        uri = os.environ.get("LIBVIRT_DEFAULT_URI") or "qemu:///system"
    _check_text("virConnectOpen", uri=uri)
    return Connection(uri, hypervisor.open_driver(uri, readonly), readonly)


class Connection:
    """A connection to a hypervisor (virConnect)."""

    def __init__(self, uri: str, driver: hypervisor.Driver, readonly: bool) -> None:
        self._uri = uri
        self._driver: hypervisor.Driver | None = driver
        self._readonly = readonly
        self._callbacks: dict[int, Callable[[], None]] = {}
        """Callback's id -> what ends it."""

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
        callbacks, self._callbacks = self._callbacks, {}
        with contextlib.ExitStack() as stack:
            if driver is not None:
                stack.callback(driver.close)
            for end in callbacks.values():
                stack.callback(end)
        return 0

    def getURI(self) -> str:
        """The URI that was opened."""
        return self._uri

    def getType(self) -> str:
        """The kind of hypervisor: ``QEMU``."""
        return self._open("virConnectGetType").get_type()

    def getHostname(self) -> str:
        """The name of the host on which the domains run."""
        driver = self._open("virConnectGetHostname")
        get: Callable[[], str] = getattr(driver, "get_hostname", socket.gethostname)
        return get()

    def getVersion(self) -> int:
        """The hypervisor's version: major * 1000000 + minor * 1000 + micro."""
        return self._open("virConnectGetVersion").get_version()

    def getLibVersion(self) -> int:
        """This library's version, counted likewise."""
        return VERSION

    def getDaemonVersion(self) -> int:
        """The version of the library that runs the domains, libvirt's or, where that has no part in
        it, this one's, counted likewise; of a virtbackupd, that of libvirt's whose protocol it
        speaks."""
        return int(self._hook("virConnectGetLibVersion", "get_lib_version")())

    def getSecurityModel(self) -> list[str]:
        """[what keeps domains from one another, its domain of interpretation]; empty: nothing."""
        return list(self._hook("virNodeGetSecurityModel", "node_get_security_model")())

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
        errors.check_flags(function, flags, _ACTIVE | _INACTIVE)
        refs = self._open(function).list_domains()
        wanted = flags & (_ACTIVE | _INACTIVE) or (_ACTIVE | _INACTIVE)
        return [
            Domain(self, ref) for ref in refs if wanted & (_INACTIVE if ref.id is None else _ACTIVE)
        ]

    def lookupByName(self, name: str) -> "Domain":
        """The domain called NAME. Errors: VIR_ERR_NO_DOMAIN."""
        function = "virDomainLookupByName"
        _check_text(function, name=name)
        return self._lookup(function, f"no domain with matching name '{name}'", name=name)

    def lookupByUUIDString(self, uuidstr: str) -> "Domain":
        """The domain of that UUID. Errors: VIR_ERR_NO_DOMAIN, VIR_ERR_INVALID_ARG."""
        function = "virDomainLookupByUUIDString"
        _check_text(function, uuidstr=uuidstr)
        if not re.fullmatch(r"[0-9a-fA-F-]{32,36}", uuidstr):
            raise errors.invalid_arg(function, "uuidstr", "Invalid UUID")
        import uuid  # slow to load, and few ask by one

        try:
            wanted = str(uuid.UUID(uuidstr))
        except ValueError as failure:
            raise errors.invalid_arg(function, "uuidstr", "Invalid UUID") from failure
        return self._lookup(function, f"no domain with matching uuid '{wanted}'", uuid=wanted)

    def lookupByID(self, id: int) -> "Domain":
        """The running domain of that id. Errors: VIR_ERR_NO_DOMAIN, VIR_ERR_INVALID_ARG."""
        function = "virDomainLookupByID"
        id = operator.index(id)
        if id < 0:
            text = f"id in {function} must be zero or greater"
            raise errors.invalid_arg(function, "id", text)
        return self._lookup(function, f"no domain with matching id {id}", id=id)

    def domainEventRegisterAny(
        self, dom: "Domain | None", eventID: int, cb: EventCallback, opaque: object
    ) -> int:
        """Have CB called for every event of that kind, of domain DOM or of all; the callback's id.
        EVENTID: VIR_DOMAIN_EVENT_ID_LIFECYCLE or VIR_DOMAIN_EVENT_ID_BACKUP_ENDED. By libvirt the
        former come where an event loop of libvirt's was registered before the connection was
        opened, and is run; by a QMP socket there is the end of QEMU, and that the guest was stopped
        or resumed by this connection.

        Errors: VIR_ERR_NO_SUPPORT for other events, and where the driver has none.
        """
        function = "virConnectDomainEventRegisterAny"
        _check_not_none(function, cb=cb)
        register = getattr(self._open(function), "event_register", None)
        if eventID not in _KINDS or register is None:
            raise errors.error(libvirt.VIR_ERR_NO_SUPPORT, function, domain=libvirt.VIR_FROM_NONE)
        uuid = None if dom is None else dom.UUIDString()

        def tell(event: hypervisor.Event) -> None:
            if type(event) is not _KINDS[eventID]:
                return
            if uuid is not None and uuid != event.domain.uuid:
                return
            words = (
                (event.event, event.detail)
                if isinstance(event, hypervisor.LifecycleEvent)
                else (event.good, event.reason)
            )
            try:
                cb(self, Domain(self, event.domain), *words, opaque)
            except Exception:  # it is not the driver's to know
                logger.exception("a callback of %s failed", function)

        number = next(_numbers)
        self._callbacks[number] = register(tell)
        return number

    def domainEventDeregisterAny(self, callbackID: int) -> int:
        """End a callback; 0. Errors: VIR_ERR_INVALID_ARG."""
        function = "virConnectDomainEventDeregisterAny"
        end = self._callbacks.pop(callbackID, None)
        if end is None:
            raise errors.invalid_arg(
                function, "callbackID", f"domain event callback {callbackID} not registered"
            )
        end()
        return 0

    def _lookup(self, function: str, otherwise: str, **wanted: str | int) -> "Domain":
        """The domain by its name, uuid or id. Errors: VIR_ERR_NO_DOMAIN with words OTHERWISE."""
        driver = self._open(function)
        find = getattr(driver, "domain_lookup", None)
        if find is None:
            [(field, value)] = wanted.items()
            refs = driver.list_domains()
            found = next((ref for ref in refs if getattr(ref, field) == value), None)
        else:
            found = find(**wanted)
        if found is None:
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN, otherwise)
        return Domain(self, found)

    def _open(self, function: str) -> hypervisor.Driver:
        if self._driver is None:
            raise errors.error(libvirt.VIR_ERR_INVALID_CONN, function, domain=libvirt.VIR_FROM_NONE)
        return self._driver

    def _hook(
        self, function: str, method: str, domain: int = libvirt.VIR_FROM_NONE
    ) -> Callable[..., Any]:
        """The driver's METHOD, where the connection may use it and the driver has it."""
        driver = self._open(function)
        if not access.allowed(method, self._granted()):
            raise access.read_only(function)
        hook: Callable[..., Any] | None = getattr(driver, method, None)
        if hook is None:
            raise errors.error(libvirt.VIR_ERR_NO_SUPPORT, function, domain=domain)
        return hook

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
        errors.check_flags(function, flags, 0)
        return list(self._connection._open(function).domain_get_state(self._ref))

    def info(self) -> list[int]:
        """[VIR_DOMAIN_* state, maximum memory, memory, virtual CPUs, CPU time]; KiB, and ns."""
        return list(self._call("virDomainGetInfo", "domain_get_info")(self._ref))

    def OSType(self) -> str:
        """What kind of machine the guest runs on: ``hvm``."""
        kind: str = self._call("virDomainGetOSType", "domain_get_os_type")(self._ref)
        return kind

    def isPersistent(self) -> int:
        """1 when the domain is there also while it does not run, else 0."""
        return int(self._call("virDomainIsPersistent", "domain_is_persistent")(self._ref))

    def autostart(self) -> int:
        """1 when the domain is started along with its host, else 0."""
        return int(self._call("virDomainGetAutostart", "domain_get_autostart")(self._ref))

    def autostartOnce(self) -> int:
        """1 when the domain is started along with its host the next time, and not thereafter, else
        0. Errors: VIR_ERR_NO_SUPPORT, too, by a libvirt or a libvirt-python before 11.2."""
        get = self._call("virDomainGetAutostartOnce", "domain_get_autostart_once")
        return int(get(self._ref))

    def hasManagedSaveImage(self, flags: int = 0) -> int:
        """1 when there is a saved state that the domain's next start resumes, else 0."""
        has = self._call("virDomainHasManagedSaveImage", "domain_has_managed_save_image")
        return int(has(self._ref, flags))

    def snapshotNum(self, flags: int = 0) -> int:
        """How many snapshots of the domain libvirt has noted; FLAGS as libvirt has them."""
        return int(self._call("virDomainSnapshotNum", "domain_snapshot_num")(self._ref, flags))

    def messages(self, flags: int = 0) -> list[str]:
        """What there is to know of how the domain runs, as that it is tainted; FLAGS as libvirt
        has them. Errors: VIR_ERR_NO_SUPPORT, too, by a libvirt-python before 7.1."""
        return list(self._call("virDomainGetMessages", "domain_get_messages")(self._ref, flags))

    def securityLabel(self) -> list[Any]:
        """[the running domain's security label, whether it is enforced]."""
        get = self._call("virDomainGetSecurityLabel", "domain_get_security_label")
        return list(get(self._ref))

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
        errors.check_flags(function, flags, START_FLAGS)
        _check_text(function, xmlDesc=xmlDesc)
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
        errors.check_flags(function, flags, STOP_FLAGS)
        stop(self._ref, flags)
        return 0

    def backupGetXMLDesc(self, flags: int = 0) -> str:
        """The running backup with every default filled in. Errors: VIR_ERR_NO_DOMAIN_BACKUP."""
        function = "virDomainBackupGetXMLDesc"
        get = self._call(function, "domain_backup_get_xml_desc")
        errors.check_flags(function, flags, 0)
        xml: str = get(self._ref, flags)
        return xml

    def backupGetInfo(self, flags: int = 0) -> backup_conf.BackupInfo:
        """How the running backup does, disk by disk. Errors: VIR_ERR_NO_DOMAIN_BACKUP."""
        function = "virDomainBackupGetInfo"
        get = self._call(function, "domain_backup_get_info")
        errors.check_flags(function, flags, 0)
        info: backup_conf.BackupInfo = get(self._ref, flags)
        return info

    def backupCleanup(self, flags: int = 0) -> list[str]:
        """Remove what a crash left of a backup, and only that; one line for each thing removed, the
        verdict of a backup that was not good first where no stop has told it."""
        function = "virDomainBackupCleanup"
        cleanup = self._call(function, "domain_backup_cleanup")
        errors.check_flags(function, flags, 0)
        return list(cleanup(self._ref, flags))

    def branchList(self, flags: int = 0) -> list[backup_conf.Branch]:
        """The branches of incremental backups, and dirty bitmaps of others (foreign).

        Errors: VIR_ERR_OPERATION_UNSUPPORTED where the hypervisor cannot have any."""
        function = "virDomainBranchList"
        get = self._call(function, "domain_branch_list")
        errors.check_flags(function, flags, 0)
        return list(get(self._ref, flags))

    def branchCreate(self, name: str, flags: int = 0) -> int:
        """Begin branch NAME on every writable disk, without a backup; 0. Its first incremental
        backup tells what changes from now on.

        Errors: VIR_ERR_CONFIG_UNSUPPORTED where there is a branch, or a bitmap, of that name;
        VIR_ERR_OPERATION_UNSUPPORTED where the hypervisor cannot have any.
        """
        function = "virDomainBranchCreate"
        create = self._call(function, "domain_branch_create")
        errors.check_flags(function, flags, 0)
        _check_text(function, name=name)
        create(self._ref, name, flags)
        return 0

    def branchDelete(self, name: str, flags: int = 0) -> int:
        """Forget branch NAME on every disk; 0. Its next backup is a full one.

        Errors: VIR_ERR_NO_DOMAIN_CHECKPOINT where there is none; VIR_ERR_OPERATION_INVALID while a
        backup of it runs, and for a bitmap that somebody else made.
        """
        function = "virDomainBranchDelete"
        delete = self._call(function, "domain_branch_delete")
        errors.check_flags(function, flags, 0)
        _check_text(function, name=name)
        delete(self._ref, name, flags)
        return 0

    def _call(self, function: str, method: str) -> Callable[..., Any]:
        return self._connection._hook(function, method, libvirt.VIR_FROM_DOMAIN)


def _check_text(function: str, **arguments: object) -> None:
    """Errors: VIR_ERR_INVALID_ARG for None; TypeError, as libvirt-python's, for what is no text."""
    _check_not_none(function, **arguments)
    for name, value in arguments.items():
        if not isinstance(value, str):
            kind = type(value).__name__
            raise TypeError(f"{function}() argument {name} must be str, not {kind}")


def _check_not_none(function: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value is None:
            raise errors.null_arg(function, name)
