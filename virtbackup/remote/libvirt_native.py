# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server that is libvirt's own, whose backups are by virDomainBackupBegin."""

from collections.abc import Callable, Mapping
from typing import Any

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.conf import domain_conf
from virtbackup.remote import protocol, wire_conf

SCRATCH_DIRECTORY = "/var/tmp"
"""On the server's host, for scratch images for which nobody named a place."""


def unsupported(function: str) -> errors.Error:
    """For what libvirt has nothing like."""
    return errors.error(
        libvirt.VIR_ERR_NO_SUPPORT,
        f"{function} (the server is libvirt's own, which has checkpoints, no branches)",
        domain=libvirt.VIR_FROM_DOMAIN,
    )


class Calls:
    """What is asked of it for a backup, by procedures of libvirt's programs."""

    def __init__(self, of: Callable[..., Any]) -> None:
        """OF: (domain, procedure's name, arguments behind the domain, of=its program) -> what it
        returns."""
        self._of = of

    def scratch_directory(self) -> str:
        return SCRATCH_DIRECTORY

    def definition(self, ref: hypervisor.DomainRef) -> domain_conf.DomainDef:
        return domain_conf.DomainDef.parse(self._of(ref, "DOMAIN_GET_XML_DESC", 0).xml)

    def is_active(self, ref: hypervisor.DomainRef) -> bool:
        return bool(self._of(ref, "DOMAIN_IS_ACTIVE").active)

    def begin(self, ref: hypervisor.DomainRef, document: str) -> None:
        self._of(ref, "DOMAIN_BACKUP_BEGIN", document, None, 0)

    def running(self, ref: hypervisor.DomainRef) -> str:
        return str(self._of(ref, "DOMAIN_BACKUP_GET_XML_DESC", 0).xml)

    def abort(self, ref: hypervisor.DomainRef) -> None:
        self._of(ref, "DOMAIN_ABORT_JOB")

    def monitor_command(self, ref: hypervisor.DomainRef, command: str) -> str:
        return str(self._of(ref, "DOMAIN_MONITOR_COMMAND", command, 0, of=protocol.QEMU).result)

    def stats(self, ref: hypervisor.DomainRef) -> Mapping[str, Any]:
        return wire_conf.params_from_wire(self._of(ref, "DOMAIN_GET_JOB_STATS", 0).params)

    def has_job(self, ref: hypervisor.DomainRef, disk: str) -> bool:
        return bool(self._of(ref, "DOMAIN_GET_BLOCK_JOB_INFO", disk, 0).found)

    def capacity(self, ref: hypervisor.DomainRef, disk: str) -> int:
        return int(self._of(ref, "DOMAIN_GET_BLOCK_INFO", disk, 0).capacity)
