# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proposed calls on a server that is libvirt's own: by virDomainBackupBegin and its kin."""

import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, domain_conf, native_conf, native_job
from virtbackup.remote import program, protocol, wire_conf
from virtbackup.remote import remote_structs as structs

left_logger = logging.getLogger(f"{__name__}.left")
"""What no error tells: that a backup is left."""

SCRATCH_DIRECTORY = "/var/tmp"
"""On the server's host, for scratch images for which nobody named a place."""

_LOOK_AGAIN = 0.02

Call = Callable[..., Any]
"""(program, procedure's name, arguments) -> what the server returns."""


def unsupported(function: str) -> errors.Error:
    """For what libvirt has nothing like."""
    return errors.error(
        libvirt.VIR_ERR_NO_SUPPORT,
        f"{function} (the server is libvirt's own, which has checkpoints, no branches)",
        domain=libvirt.VIR_FROM_DOMAIN,
    )


class NativeJobs:
    """The backups of all domains of one server."""

    def __init__(self, call: Call) -> None:
        self._call_program = call
        self._owned: dict[str, tuple[hypervisor.DomainRef, native_conf.BackupDef]] = {}
        """By uuid: a domain whose backup is to end with us, and what was begun."""

    def close(self) -> None:
        """End the backups that were started to end with us. It is warned of one that cannot be."""
        owned, self._owned = self._owned, {}
        for ref, begun in list(owned.values()):
            try:
                document = self._running(ref)
                if native_job.is_of(document, begun):
                    self._end(ref, document)
            except libvirt.libvirtError as failure:
                if (text := native_job.left(ref.name, failure)) is not None:
                    left_logger.warning("%s", text)

    def start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> None:
        """Errors: those of ``native_job.begin``, the server's."""
        native = native_job.begin(
            xml, bool(flags & hypervisor.START_QUIESCE), lambda: self._definition(ref), _image
        )
        if self._runs(ref):
            raise native_job.another_runs()
        dom = wire_conf.domain_to_wire(ref)
        self._call(
            "DOMAIN_BACKUP_BEGIN", structs.DomainBackupBeginArgs(dom, native.format(), None, 0)
        )
        self._owned.pop(ref.uuid, None)
        if flags & hypervisor.START_AUTODESTROY:
            self._owned[ref.uuid] = ref, native

    def stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        _, begun = self._owned.get(ref.uuid, (None, None))
        document = self._running(ref)
        native_job.check_ends(document, begun)
        self._end(ref, document)
        self._owned.pop(ref.uuid, None)
        if not flags & hypervisor.STOP_CANCEL and not self._is_active(ref):
            raise native_job.not_good()

    def xml_desc(self, ref: hypervisor.DomainRef) -> str:
        return self._proposal(ref).format()

    def info(self, ref: hypervisor.DomainRef) -> backup_conf.BackupInfo:
        definition = self._proposal(ref)
        began = 0.0
        with contextlib.suppress(libvirt.libvirtError):
            stats = wire_conf.params_from_wire(self._job_stats(ref).params)
            began = time.time() - int(stats.get("time_elapsed", 0)) / 1000
        return native_job.info(definition, began, lambda disk: self._capacity(ref, disk))

    def _capacity(self, ref: hypervisor.DomainRef, disk: str) -> int:
        args = structs.DomainPathFlagsArgs(wire_conf.domain_to_wire(ref), disk, 0)
        return int(self._call("DOMAIN_GET_BLOCK_INFO", args).capacity)

    def _end(self, ref: hypervisor.DomainRef, document: str) -> None:
        """End the backup that libvirt tells by DOCUMENT. Another one may run right behind it: who
        begins one waits for half a minute until there is no job."""
        ended = native_conf.BackupDef.parse(document)
        self._call("DOMAIN_ABORT_JOB", structs.DomainArgs(wire_conf.domain_to_wire(ref)))
        end = time.monotonic() + native_job.END_TIMEOUT
        while self._still_runs(ref, ended):
            if time.monotonic() > end:
                raise native_job.does_not_end()
            time.sleep(_LOOK_AGAIN)

    def _still_runs(self, ref: hypervisor.DomainRef, ended: native_conf.BackupDef) -> bool:
        try:
            return native_job.is_of(self._running(ref), ended)
        except libvirt.libvirtError as failure:
            gone = failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
            if not gone and self._is_active(ref):
                raise
            return False

    def _job_stats(self, ref: hypervisor.DomainRef) -> structs.DomainGetJobStatsRet:
        stats: structs.DomainGetJobStatsRet = self._call("DOMAIN_GET_JOB_STATS", _flags(ref))
        return stats

    def _is_active(self, ref: hypervisor.DomainRef) -> bool:
        try:
            args = structs.DomainArgs(wire_conf.domain_to_wire(ref))
            return bool(self._call("DOMAIN_IS_ACTIVE", args).active)
        except libvirt.libvirtError as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            return False

    def _definition(self, ref: hypervisor.DomainRef) -> domain_conf.DomainDef:
        return domain_conf.DomainDef.parse(self._call("DOMAIN_GET_XML_DESC", _flags(ref)).xml)

    def _proposal(self, ref: hypervisor.DomainRef) -> backup_conf.BackupDef:
        return native_job.running(self._running(ref), lambda: self._definition(ref))

    def _runs(self, ref: hypervisor.DomainRef) -> bool:
        try:
            self._running(ref)
        except errors.Error as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                raise
            return False
        return True

    def _running(self, ref: hypervisor.DomainRef) -> str:
        """libvirt's document of the backup that runs. Errors: VIR_ERR_NO_DOMAIN_BACKUP."""
        try:
            return str(self._call("DOMAIN_BACKUP_GET_XML_DESC", _flags(ref)).xml)
        except errors.Error as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                raise
            raise native_job.none_runs() from failure

    def _call(self, name: str, args: object) -> Any:
        of: program.Program = protocol.REMOTE
        return self._call_program(of, name, args)


def _flags(ref: hypervisor.DomainRef) -> structs.DomainFlagsArgs:
    return structs.DomainFlagsArgs(wire_conf.domain_to_wire(ref), 0)


def _image(disk: str) -> str:
    return native_job.image_path(SCRATCH_DIRECTORY, disk, secrets.token_hex(4))
