# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver interface (driver-hypervisor.h) and the registry of drivers by URI scheme.

A driver is any object with the methods of ``Driver``; those of ``BackupDriver`` are optional one
by one, as the hooks of the C driver table are. A package offers a driver by an entry point of the
group ``virtbackup.drivers``, named as the URI scheme, that points to an ``Opener``.
"""

import dataclasses
import importlib
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar, runtime_checkable

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf

if TYPE_CHECKING:
    import importlib.metadata

VERSION = 0 * 1000000 + 1 * 1000 + 0
"""This library's version as virConnectGetLibVersion counts."""

ENTRY_POINTS = "virtbackup.drivers"

START_QUIESCE = 1 << 0
START_AUTODESTROY = 1 << 1
STOP_CANCEL = 1 << 0
"""The flags of a backup's start and stop, which api.py has by their public names."""


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

    def domain_backup_start(self, domain: DomainRef, xml: str, flags: int) -> str | None:
        """The id of the backup that runs now; None: the driver does not tell."""

    def domain_backup_stop(self, domain: DomainRef, flags: int) -> None: ...

    def domain_backup_get_xml_desc(self, domain: DomainRef, flags: int) -> str: ...

    def domain_backup_get_info(self, domain: DomainRef, flags: int) -> backup_conf.BackupInfo: ...

    def domain_backup_cleanup(self, domain: DomainRef, flags: int) -> Sequence[str]: ...

    def domain_branch_list(self, domain: DomainRef, flags: int) -> Sequence[backup_conf.Branch]: ...

    def domain_branch_create(self, domain: DomainRef, name: str, flags: int) -> None: ...

    def domain_branch_delete(self, domain: DomainRef, name: str, flags: int) -> None: ...


Value = int | float | str | bool
"""Of one statistic."""


class QueryDriver(Driver, Protocol):
    """What libvirt's own clients ask for besides; a daemon serves those hooks that there are."""

    def domain_lookup(
        self, *, uuid: str | None = None, name: str | None = None, id: int | None = None
    ) -> DomainRef | None:
        """The domain of that uuid, name or id, exactly one of which is given; None: there is none.
        Without the hook, ``list_domains`` is searched."""

    def get_hostname(self) -> str: ...

    def get_lib_version(self) -> int:
        """The version of the library that runs the domains, counted as ``get_version``."""

    def get_capabilities(self) -> str:
        """A ``<capabilities>`` document."""

    def node_get_info(self) -> tuple[str, int, int, int, int, int, int, int]:
        """(CPU model, memory in KiB, CPUs, MHz, NUMA nodes, sockets, cores, threads)."""

    def node_get_security_model(self) -> tuple[str, str]:
        """(model, domain of interpretation); empty where there is none."""

    def domain_get_info(self, domain: DomainRef) -> tuple[int, int, int, int, int]:
        """(state, maximum memory in KiB, memory in KiB, virtual CPUs, CPU time in ns)."""

    def domain_get_os_type(self, domain: DomainRef) -> str: ...

    def domain_is_persistent(self, domain: DomainRef) -> bool: ...

    def domain_get_autostart(self, domain: DomainRef) -> bool: ...

    def domain_get_autostart_once(self, domain: DomainRef) -> bool: ...

    def domain_has_managed_save_image(self, domain: DomainRef, flags: int) -> bool: ...

    def domain_snapshot_num(self, domain: DomainRef, flags: int) -> int:
        """How many snapshots of it libvirt has noted."""

    def domain_get_security_label(self, domain: DomainRef) -> tuple[str, bool]:
        """(label, enforced)."""

    def domain_get_messages(self, domain: DomainRef, flags: int) -> Sequence[str]: ...

    def domain_get_block_info(
        self, domain: DomainRef, path: str, flags: int
    ) -> tuple[int, int, int]:
        """(capacity, allocation, physical) of the disk PATH, a target or a source; bytes."""

    def domain_block_stats_flags(
        self, domain: DomainRef, path: str, flags: int
    ) -> Mapping[str, int]: ...

    def domain_get_block_job_info(
        self, domain: DomainRef, path: str, flags: int
    ) -> tuple[int, int, int, int] | None:
        """(type, bandwidth, cur, end); None: no job runs on the disk PATH."""

    def get_all_domain_stats(
        self, domains: Sequence[DomainRef], stats: int, flags: int
    ) -> Sequence[tuple[DomainRef, Mapping[str, Value]]]:
        """DOMAINS empty: of all that there are."""

    def domain_fsfreeze(self, domain: DomainRef, mountpoints: Sequence[str], flags: int) -> int:
        """How many file systems were frozen; MOUNTPOINTS empty: all that there are."""

    def domain_fsthaw(self, domain: DomainRef, mountpoints: Sequence[str], flags: int) -> int:
        """How many file systems were thawed; MOUNTPOINTS empty: all that there are."""

    def domain_suspend(self, domain: DomainRef) -> None: ...

    def domain_resume(self, domain: DomainRef) -> None: ...

    def domain_monitor_command(self, domain: DomainRef, command: str, flags: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class LifecycleEvent:
    """What became of a domain, in libvirt's numbers (VIR_DOMAIN_EVENT_*)."""

    domain: DomainRef
    event: int
    detail: int


@dataclasses.dataclass(frozen=True)
class BackupEnded:
    """A backup has ended, whoever ended it."""

    domain: DomainRef
    good: bool
    reason: str | None
    """Why it is not good."""


Event = LifecycleEvent | BackupEnded


@runtime_checkable
class KeeperDriver(Driver, Protocol):
    """The hook for who stays: a daemon."""

    def adopt_backups(self) -> None:
        """Watch the backups that run, as if they had been started by this driver. Takes as long as
        file systems hang. Errors: OSError, errors.Error."""


class SharedDriver(Driver, Protocol):
    """Those hooks of ``BackupDriver`` by which somebody means one backup, for who has several
    clients: the backup ONLY; None: whichever runs. Without them it is the one that this driver has
    started last to end with it, if any. Errors: VIR_ERR_NO_DOMAIN_BACKUP where another one runs."""

    def domain_backup_stop_of(self, domain: DomainRef, flags: int, only: str | None) -> None: ...

    def domain_backup_get_xml_desc_of(
        self, domain: DomainRef, flags: int, only: str | None
    ) -> str: ...

    def domain_backup_get_info_of(
        self, domain: DomainRef, flags: int, only: str | None
    ) -> backup_conf.BackupInfo: ...


class EventDriver(Driver, Protocol):
    """The hook that tells what happens unasked."""

    def event_register(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Have CALLBACK called, by any thread, for every event from now on; what is returned ends
        that. CALLBACK neither blocks nor raises."""


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


def check_uri(uri: str) -> None:
    """Raise where no driver serves URI, or where its own does not by what the URI says. Errors: as
    ``open_driver``, without opening it."""
    opener = _opener(uri)
    if (check := getattr(opener, "check", None)) is not None:
        check(uri)


_AnyOpener = TypeVar("_AnyOpener", bound=Opener)


def checked_by(check: Callable[[str], object]) -> Callable[[_AnyOpener], _AnyOpener]:
    """Marks an opener whose URIs CHECK raises for as opening them does, without doing so."""

    def mark(opener: _AnyOpener) -> _AnyOpener:
        opener.check = check  # type: ignore[attr-defined]
        return opener

    return mark


class Adopter(Protocol):
    """An opener that can also serve the domains of a connection of libvirt-python's."""

    def __call__(self, uri: str, readonly: bool) -> Driver: ...

    def adopt(self, connection: Any) -> Driver:
        """A driver on CONNECTION, a virConnect, which its owner closes. It may have a method
        ``leave()``: to hear nothing more over it, as it is to be as it was."""


def adopt_driver(connection: Any) -> Driver | None:
    """The driver for a virConnect, on that itself; None where the driver for its URI is none that
    could. Errors: as ``open_driver``."""
    adopt = getattr(_opener(connection.getURI()), "adopt", None)
    driver: Driver | None = None if adopt is None else adopt(connection)
    return driver


_NO_CHARACTERS = re.compile("[\0-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")
"""Of no URI: where there are line ends or tabs, they would be left out without a word."""


def _opener(uri: str) -> Opener:
    if found := _NO_CHARACTERS.search(uri):
        text = f"{uri!r}: a URI has no character {found[0]!r} in it"
        raise errors.invalid_arg("virConnectOpen", "uri", text)
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
