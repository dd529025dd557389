# SPDX-License-Identifier: LGPL-2.1-or-later
"""The drop-in: backupStart and backupStop on libvirt-python's own virDomain.

    import libvirt, virtbackup.extend
    virtbackup.extend.install(libvirt)
    libvirt.open("qemu:///system").lookupByName("vm").backupStart(xml)

The call goes to the driver registered for the scheme of the connection's URI; where there is none,
it fails as an old libvirt would: VIR_ERR_NO_SUPPORT. What libvirt has already is never replaced.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import libvirt

from virtbackup import api, errors, hypervisor

METHODS = ("backupStart", "backupStop")
CONSTANTS = (
    "VIR_DOMAIN_BACKUP_START_QUIESCE",
    "VIR_DOMAIN_BACKUP_START_AUTODESTROY",
    "VIR_DOMAIN_BACKUP_STOP_CANCEL",
)

_MARK = "_virtbackup_method"


def install(module: types.ModuleType = libvirt) -> None:
    """Add the methods to MODULE.virDomain and the constants to MODULE. Twice is as once.

    Errors: RuntimeError when MODULE has one of the names as its own.
    """
    for owner, name, value in _additions(module):
        present = getattr(owner, name, None)
        if present is not None and not _is_ours(present, value):
            raise RuntimeError(f"{module.__name__} already has {name}: it is not replaced")
    for owner, name, value in _additions(module):
        setattr(owner, name, value)


def uninstall(module: types.ModuleType = libvirt) -> None:
    """Take back ``install``; MODULE is as it was."""
    for owner, name, value in _additions(module):
        if name in vars(owner) and _is_ours(getattr(owner, name), value):
            delattr(owner, name)


def _additions(module: types.ModuleType) -> list[tuple[Any, str, Any]]:
    return [
        *((module.virDomain, name, _method(name)) for name in METHODS),
        *((module, name, getattr(api, name)) for name in CONSTANTS),
    ]


def _is_ours(present: Any, value: Any) -> bool:
    return hasattr(present, _MARK) or bool(present == value)


@functools.cache
def _method(name: str) -> Callable[..., Any]:
    """A method of virDomain that does what api.Domain's method of that NAME does."""
    ours = getattr(api.Domain, name)

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(_domain(self, f"virDomainB{name[1:]}"), *args, **kwargs)

    setattr(method, _MARK, True)
    return method


def _domain(domain: Any, function: str) -> api.Domain:
    """Our Domain for a virDomain. The driver stays open as long as the virConnect it serves."""
    connection = domain.connect()
    ours: api.Connection = getattr(connection, "_virtbackup", None) or _connect(
        connection.getURI(), function
    )
    try:
        ours.lookupByUUIDString(domain.UUIDString())
    except errors.Error as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        # What our driver serves at that URI is not what libvirt's does.
        ours.close()
        raise _unsupported(function) from failure
    connection._virtbackup = ours
    id = domain.ID()
    ref = hypervisor.DomainRef(domain.name(), domain.UUIDString(), None if id < 0 else id)
    return api.Domain(ours, ref)


def _connect(uri: str, function: str) -> api.Connection:
    try:
        return api.open(uri)
    except errors.Error as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_NO_CONNECT:
            raise
        raise _unsupported(function) from failure


def _unsupported(function: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_NO_SUPPORT, function, domain=libvirt.VIR_FROM_DOMAIN)
