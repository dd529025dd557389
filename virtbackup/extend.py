# SPDX-License-Identifier: LGPL-2.1-or-later
"""The drop-in: backupStart and backupStop on libvirt-python's own virDomain.

    import libvirt, virtbackup.extend
    virtbackup.extend.install(libvirt)
    libvirt.open("qemu:///system").lookupByName("vm").backupStart(xml)

The call goes to the driver registered for the scheme of the connection's URI, on the connection
itself where the driver can; where there is none, it fails as an old libvirt would:
VIR_ERR_NO_SUPPORT. What libvirt has already is never replaced. A type checker, to which libvirt's
own classes are unknown, knows the methods by ``dom: virtbackup.extend.virDomain = ...``.
"""

import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import libvirt

from virtbackup import access, api, errors, hypervisor
from virtbackup.conf import backup_conf

METHODS = ("backupStart", "backupStop")
"""What the proposal has: where libvirt has them already, ``install`` fails."""
MORE_METHODS = ("backupGetInfo", "backupCleanup", "branchList", "branchCreate", "branchDelete")
"""Ours: added where libvirt has no such method. ``domain`` has backupGetXMLDesc, too, which is
libvirt's own from 6.0 on, of libvirt's own backups."""
CONSTANTS = (
    "VIR_DOMAIN_BACKUP_START_QUIESCE",
    "VIR_DOMAIN_BACKUP_START_AUTODESTROY",
    "VIR_DOMAIN_BACKUP_STOP_CANCEL",
)

_MARK = "_virtbackup_method"
_OURS = "_virtbackup"
"""Where a virConnect keeps our connection on it."""
_LEAVE = "_virtbackup_leave"
"""Where it keeps what has our driver hear nothing more over it."""


class virDomain(Protocol):
    """The methods that ``install`` adds to libvirt.virDomain, for type checkers."""

    def backupStart(self, xmlDesc: str, flags: int = 0) -> int: ...

    def backupStop(self, flags: int = 0) -> int: ...

    def backupGetInfo(self, flags: int = 0) -> backup_conf.BackupInfo: ...

    def backupCleanup(self, flags: int = 0) -> list[str]: ...

    def branchList(self, flags: int = 0) -> list[backup_conf.Branch]: ...

    def branchCreate(self, name: str, flags: int = 0) -> int: ...

    def branchDelete(self, name: str, flags: int = 0) -> int: ...


def install(module: types.ModuleType = libvirt) -> None:
    """Add the methods to MODULE.virDomain and the constants to MODULE. Twice is as once.

    Errors: RuntimeError when MODULE has one of METHODS or CONSTANTS as its own.
    """
    for owner, name, value in _additions(module):
        present = getattr(owner, name, None)
        if present is not None and not _is_ours(present, value):
            raise RuntimeError(f"{module.__name__} already has {name}: it is not replaced")
    for owner, name, value in [*_additions(module), *_more_additions(module)]:
        setattr(owner, name, value)


def uninstall(module: types.ModuleType = libvirt) -> None:
    """Take back ``install``; MODULE is as it was, and so are its connections. Backups run on."""
    for owner, name, value in [*_additions(module), *_more_additions(module)]:
        if name in vars(owner) and _is_ours(getattr(owner, name), value):
            delattr(owner, name)
    with _connecting:
        for connection in list(_connections):
            leave = vars(connection).pop(_LEAVE, None)
            if leave is not None:
                leave()
            for name in (_OURS, "close"):
                vars(connection).pop(name, None)
        _connections.clear()


def domain(domain: Any) -> api.Domain:
    """All of our methods for a domain of libvirt-python's, under their own names.

    Errors: VIR_ERR_NO_SUPPORT where no driver serves its connection.
    """
    return _domain(domain, "virDomainBackup")


def _additions(module: types.ModuleType) -> list[tuple[Any, str, Any]]:
    return [
        *((module.virDomain, name, _method(name)) for name in METHODS),
        *((module, name, getattr(api, name)) for name in CONSTANTS),
    ]


def _more_additions(module: types.ModuleType) -> list[tuple[Any, str, Any]]:
    owner = module.virDomain
    absent = (
        n for n in MORE_METHODS if hasattr(getattr(owner, n, None), _MARK) or n not in dir(owner)
    )
    return [(owner, name, _method(name)) for name in absent]


def _is_ours(present: Any, value: Any) -> bool:
    return hasattr(present, _MARK) or bool(present == value)


@functools.cache
def _method(name: str) -> Callable[..., Any]:
    """A method of virDomain that does what api.Domain's method of that NAME does."""
    ours = getattr(api.Domain, name)
    function = f"virDomain{name[0].upper()}{name[1:]}"

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = _domain(self, function)
        if name == "backupStart":
            _end_with(self.connect(), found.connect())
        try:
            return ours(found, *args, **kwargs)
        except errors.Error as failure:
            if not _is_of_read_only(failure):
                raise
            raise access.read_only(function) from failure

    setattr(method, _MARK, True)
    return method


def _is_of_read_only(failure: errors.Error) -> bool:
    """Whether the connection turns out to be read-only by what is not allowed for a call's sake."""
    denied = failure.get_error_code() == libvirt.VIR_ERR_OPERATION_DENIED
    return bool(denied and "read only access" in str(failure))


_connections: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Every virConnect that has a connection of ours."""
_connecting = threading.RLock()
"""Reentrant, as a signal's handler may call."""


def _domain(domain: Any, function: str) -> api.Domain:
    """Our Domain for a virDomain. The driver stays open as long as the virConnect it serves."""
    connection = domain.connect()
    with _connecting:
        ours: api.Connection | None = vars(connection).get(_OURS)
        if ours is None:
            ours = vars(connection).setdefault(_OURS, _connect(connection, domain, function))
            _connections.add(connection)
    id = domain.ID()
    ref = hypervisor.DomainRef(domain.name(), domain.UUIDString(), None if id < 0 else id)
    return api.Domain(ours, ref)


def _connect(connection: Any, domain: Any, function: str) -> api.Connection:
    """Ours: on the virConnect itself, or by its URI."""
    uri, readonly = connection.getURI(), _is_read_only(domain)
    try:
        adopted = hypervisor.adopt_driver(connection)
        if adopted is not None:
            vars(connection)[_LEAVE] = getattr(adopted, "leave", None)
            return api.Connection(uri, adopted, readonly)
        ours = api.open(uri, readonly)
    except errors.Error as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_NO_CONNECT:
            raise
        raise _unsupported(function) from failure
    try:
        ours.lookupByUUIDString(domain.UUIDString())
    except errors.Error as failure:
        # What our driver serves at that URI is not what libvirt's does.
        ours.close()
        if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        raise _unsupported(function) from failure
    return ours


def _is_read_only(domain: Any) -> bool:
    """Whether the connection of DOMAIN is: libvirt does not tell, but for what it refuses there."""
    try:
        domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
    except libvirt.libvirtError as failure:
        return bool(failure.get_error_code() == libvirt.VIR_ERR_OPERATION_DENIED)
    return False


def _end_with(connection: Any, ours: api.Connection) -> None:
    """Have the backups that are to end with CONNECTION end when it is closed."""
    if "close" in vars(connection):
        return
    reference = weakref.ref(connection)

    def close() -> int:
        closing = reference()
        assert closing is not None
        vars(closing).pop("close", None)
        vars(closing).pop(_OURS, None)
        vars(closing).pop(_LEAVE, None)
        ours.close()
        code: int = type(closing).close(closing)
        return code

    connection.close = functools.wraps(type(connection).close)(close)


def _unsupported(function: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_NO_SUPPORT, function, domain=libvirt.VIR_FROM_DOMAIN)
