# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirt URI whose backups are libvirt's own: ``?native=yes``.

So that one program can use, and compare, both engines.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import libvirt
import libvirt_qemu

from virtbackup import hypervisor, native
from virtbackup.conf import backup_conf, domain_conf
from virtbackup.qemu import libvirt_driver, libvirt_queries, passthrough, scratch, status

_own_errors = libvirt_queries.own_errors


class _Calls:
    """As libvirt-python has them."""

    def __init__(self, host: libvirt_driver.LibvirtDriver) -> None:
        self._host = host

    def scratch_directory(self) -> str:
        return scratch.default_directory()

    def definition(self, ref: hypervisor.DomainRef) -> domain_conf.DomainDef:
        return domain_conf.DomainDef.parse(self._host.domain_get_xml_desc(ref, 0))

    def is_active(self, ref: hypervisor.DomainRef) -> bool:
        return bool(self._host.lookup(ref).isActive())

    def begin(self, ref: hypervisor.DomainRef, document: str) -> None:
        self._host.lookup(ref).backupBegin(document, None, 0)

    def running(self, ref: hypervisor.DomainRef) -> str:
        return str(self._host.lookup(ref).backupGetXMLDesc(0))

    def abort(self, ref: hypervisor.DomainRef) -> None:
        self._host.lookup(ref).abortJob()

    def monitor_command(self, ref: hypervisor.DomainRef, command: str) -> str:
        domain = self._host.lookup(ref)
        ask = functools.partial(libvirt_qemu.qemuMonitorCommand, domain, command, 0)
        return str(passthrough.patiently(ask))

    def stats(self, ref: hypervisor.DomainRef) -> Mapping[str, Any]:
        stats: Mapping[str, Any] = self._host.lookup(ref).jobStats()
        return stats

    def has_job(self, ref: hypervisor.DomainRef, disk: str) -> bool:
        return bool(self._host.lookup(ref).blockJobInfo(disk, 0))

    def capacity(self, ref: hypervisor.DomainRef, disk: str) -> int:
        return int(self._host.lookup(ref).blockInfo(disk)[0])


class NativeDriver(libvirt_queries.LibvirtQueries):
    """The driver of libvirt's own engine; all but backups is as without it."""

    def __init__(self, host: libvirt_driver.LibvirtDriver) -> None:
        self._host = host
        self._jobs = native.NativeJobs(_Calls(host))

    def close(self) -> None:
        self._jobs.close()
        self._host.close()

    def get_type(self) -> str:
        return self._host.get_type()

    def get_version(self) -> int:
        return self._host.get_version()

    def is_alive(self) -> bool:
        return self._host.is_alive()

    def set_trace(self, trace: TextIO | None) -> None:
        """Nothing: what libvirt says to QEMU it keeps to itself, or in its log."""

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        return self._host.list_domains()

    def domain_get_state(self, ref: hypervisor.DomainRef) -> tuple[int, int]:
        return self._host.domain_get_state(ref)

    def domain_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return self._host.domain_get_xml_desc(ref, flags)

    @property
    def _connection(self) -> "libvirt.virConnect":
        return self._host._connection

    def lookup(self, ref: hypervisor.DomainRef) -> "libvirt.virDomain":
        return self._host.lookup(ref)

    def _file(self, uuid: str) -> status.StatusFile:
        return self._host._file(uuid)

    # --- backup ---

    @_own_errors()
    def domain_backup_start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> None:
        self._jobs.start(ref, xml, flags)

    @_own_errors()
    def domain_backup_stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        self._jobs.stop(ref, flags)

    @_own_errors()
    def domain_backup_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return self._jobs.get_xml_desc(ref)

    @_own_errors()
    def domain_backup_get_info(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        return self._jobs.get_info(ref)

    def domain_backup_cleanup(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        """libvirt cleans up by itself."""
        return []


_: Callable[[libvirt_driver.LibvirtDriver], hypervisor.QueryDriver] = NativeDriver
"""mypy's proof that the driver has every hook."""
