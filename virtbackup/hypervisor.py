# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver interface (driver-hypervisor.h) and the registry of drivers by URI scheme.

A driver is any object with the methods of ``Driver``; those of ``BackupDriver`` are optional one
by one, as the hooks of the C driver table are. A package offers a driver by an entry point of the
group ``virtbackup.drivers``, named as the URI scheme, that points to an ``Opener``.
"""

import dataclasses
import importlib
import urllib.parse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf

if TYPE_CHECKING:
    import importlib.metadata

ENTRY_POINTS = "virtbackup.drivers"


@dataclasses.dataclass(frozen=True)
class DomainRef:
    """Which domain is meant; the uuid decides (virDomainPtr)."""

    name: str
    uuid: str
    id: int | None
    """None when the domain is not running."""


class Driver(Protocol):
    """What every driver has. All sizes are bytes; every failure is an ``errors.Error``."""

    def close(self) -> None:
        """Let go of the hypervisor; ends the backups that were started to end with it."""

    def get_type(self) -> str:
        """The kind of hypervisor, as virConnectGetType tells it: ``QEMU``."""

    def get_version(self) -> int:
        """The hypervisor's version: major * 1000000 + minor * 1000 + micro."""

    def is_alive(self) -> bool:
        """Whether the connection to the hypervisor still stands."""

    def set_trace(self, trace: TextIO | None) -> None:
        """Write every line of the hypervisor's monitor to TRACE from now on."""

    def list_domains(self) -> Sequence[DomainRef]:
        """All domains, running or not."""

    def domain_get_state(self, domain: DomainRef) -> tuple[int, int]:
        """(VIR_DOMAIN_* state, reason)."""

    def domain_get_xml_desc(self, domain: DomainRef, flags: int) -> str:
        """A ``<domain>`` document with at least name, uuid and disks."""


class BackupDriver(Driver, Protocol):
    """The hooks that the backup API adds."""

    def domain_backup_start(self, domain: DomainRef, xml: str, flags: int) -> None: ...

    def domain_backup_stop(self, domain: DomainRef, flags: int) -> None: ...

    def domain_backup_get_xml_desc(self, domain: DomainRef, flags: int) -> str: ...

    def domain_backup_get_info(self, domain: DomainRef, flags: int) -> backup_conf.BackupInfo: ...

    def domain_backup_cleanup(self, domain: DomainRef, flags: int) -> Sequence[str]: ...

    def domain_branch_list(self, domain: DomainRef, flags: int) -> Sequence[backup_conf.Branch]: ...

    def domain_branch_delete(self, domain: DomainRef, name: str, flags: int) -> None: ...


Opener = Callable[[str, bool], Driver]
"""(uri, readonly) -> an open driver."""

_OWN = {
    "qemu": "virtbackup.qemu.libvirt_driver",
    "qemu+unix": "virtbackup.qemu.libvirt_driver",
    "qmp": "virtbackup.qemu.driver",
    "test": "virtbackup.test.test_driver",
}
"""The modules whose ``open`` our own entry points name: looking those up takes longer than to load
the driver."""

_registered: dict[str, Opener] = {}


def register(scheme: str, opener: Opener) -> None:
    """Serve URIs of SCHEME by OPENER in this process, before any entry point."""
    _registered[scheme] = opener


def unregister(scheme: str) -> None:
    """Take back ``register``."""
    _registered.pop(scheme, None)


def open_driver(uri: str, readonly: bool) -> Driver:
    """The driver for URI, opened.

    Errors: VIR_ERR_INVALID_ARG when it is no URI; VIR_ERR_NO_CONNECT when no driver serves the
    scheme; what the driver's opener raises.
    """
    return _opener(uri)(uri, readonly)


class Adopter(Protocol):
    """An opener that can also serve the domains of a connection of libvirt-python's."""

    def __call__(self, uri: str, readonly: bool) -> Driver: ...

    def adopt(self, connection: Any) -> Driver:
        """A driver on CONNECTION, a virConnect, which its owner closes."""


def adopt_driver(connection: Any) -> Driver | None:
    """The driver for a virConnect, on that itself; None where the driver for its URI is none that
    could. Errors: as ``open_driver``."""
    adopt = getattr(_opener(connection.getURI()), "adopt", None)
    driver: Driver | None = None if adopt is None else adopt(connection)
    return driver


def _opener(uri: str) -> Opener:
    try:
        scheme = urllib.parse.urlsplit(uri).scheme
    except ValueError as failure:
        raise errors.invalid_arg("virConnectOpen", "uri", f"'{uri}': {failure}") from failure
    if not scheme:
        raise errors.error(libvirt.VIR_ERR_NO_CONNECT, uri, domain=libvirt.VIR_FROM_NONE)
    if scheme in _registered:
        return _registered[scheme]
    if scheme in _OWN:
        own: Opener = importlib.import_module(_OWN[scheme]).open
        return own
    for entry_point in _entry_points(scheme):
        opener: Opener = entry_point.load()
        return opener
    raise errors.error(libvirt.VIR_ERR_NO_CONNECT, uri, domain=libvirt.VIR_FROM_NONE)


def _entry_points(scheme: str) -> "list[importlib.metadata.EntryPoint]":
    """The drivers for SCHEME, our own package's first: it is found without reading every other."""
    import importlib.metadata  # slow to load, and a registered driver needs no entry point

    try:
        own = importlib.metadata.distribution("virtbackup").entry_points
    except importlib.metadata.PackageNotFoundError:
        own = importlib.metadata.EntryPoints()
    found = own.select(group=ENTRY_POINTS, name=scheme)
    return list(found or importlib.metadata.entry_points(group=ENTRY_POINTS, name=scheme))
