# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proposed calls on libvirt's own backup job (virDomainBackupBegin), by whichever way a libvirt
is reached.
"""

import contextlib
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any, Protocol

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, domain_conf, native_conf, native_job

left_logger = logging.getLogger(f"{__name__}.left")
"""What no error tells: that a backup is left."""

END_TIMEOUT = 60.0
"""Seconds for libvirt to end a backup job that was aborted."""

_LOOK_AGAIN = 0.01


class Calls(Protocol):
    """What libvirt is asked. Errors, of each: libvirt's own."""

    def scratch_directory(self) -> str:
        """On libvirt's host, for scratch images for which nobody named a place."""

    def definition(self, ref: hypervisor.DomainRef) -> domain_conf.DomainDef:
        """virDomainGetXMLDesc"""

    def is_active(self, ref: hypervisor.DomainRef) -> bool:
        """virDomainIsActive"""

    def begin(self, ref: hypervisor.DomainRef, document: str) -> None:
        """virDomainBackupBegin"""

    def running(self, ref: hypervisor.DomainRef) -> str:
        """virDomainBackupGetXMLDesc"""

    def abort(self, ref: hypervisor.DomainRef) -> None:
        """virDomainAbortJob"""

    def set_speed(self, ref: hypervisor.DomainRef, disk: str, speed: int) -> None:
        """virDomainBlockJobSetSpeed: MiB a second, 0 without a limit."""

    def stats(self, ref: hypervisor.DomainRef) -> Mapping[str, Any]:
        """virDomainGetJobStats"""

    def capacity(self, ref: hypervisor.DomainRef, disk: str) -> int:
        """virDomainGetBlockInfo: bytes."""


class NativeJobs:
    """The backups of all domains of one libvirt."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._owned: dict[str, tuple[hypervisor.DomainRef, native_conf.BackupDef]] = {}
        """By uuid: a domain whose backup is to end with us, and what was begun."""

    def close(self) -> None:
        """End the backups that were started to end with us. It is warned of one that cannot be."""
        owned, self._owned = self._owned, {}
        for ref, begun in owned.values():
            try:
                document = self._running(ref)
                if native_job.is_of(document, begun):
                    self._end(ref, document)
            except libvirt.libvirtError as failure:
                if failure.get_error_code() not in _NOTHING_LEFT:
                    left_logger.warning(
                        "the backup of domain '%s' runs on until virsh domjobabort ends it: %s",
                        ref.name,
                        failure,
                    )

    def start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> None:
        """Errors: those of ``native_job.begin``, libvirt's own, VIR_ERR_OPERATION_INVALID."""
        quiesce = bool(flags & hypervisor.START_QUIESCE)
        native = native_job.begin(xml, quiesce, lambda: self._calls.definition(ref), self._image)
        if self._runs(ref):  # libvirt would wait half a minute for its end
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID, "another backup job is already running"
            )
        self._calls.begin(ref, native.format())
        self._owned.pop(ref.uuid, None)
        if flags & hypervisor.START_AUTODESTROY:
            self._owned[ref.uuid] = ref, native

    def _image(self, disk: str) -> str:
        return native_job.image_path(self._calls.scratch_directory(), disk, secrets.token_hex(4))

    def stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        """A pull is good whose jobs all run until it is aborted: until then its exports tell what
        the disks were.

        Errors: those of ``native_job.check_ends``, libvirt's own, VIR_ERR_OPERATION_TIMEOUT;
        VIR_ERR_OPERATION_FAILED where the backup is not good.
        """
        _, begun = self._owned.get(ref.uuid, (None, None))
        document = self._running(ref)
        native_job.check_ends(document, begun)
        is_judged = not flags & hypervisor.STOP_CANCEL
        reasons = self._lost(ref, document) if is_judged else []
        was_there = self._end(ref, document)
        self._owned.pop(ref.uuid, None)
        if is_judged and not was_there:
            reasons = reasons or ["somebody else ended it"]
        # What ends the domain once they have run, as a save that has waited, is nothing to them.
        if reasons and not self._is_active(ref):
            reasons = ["the domain ended"]
        if reasons:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_FAILED, f"the backup is not good: {'; '.join(reasons)}"
            )

    def _lost(self, ref: hypervisor.DomainRef, document: str) -> list[str]:
        """The disks whose jobs do not run, of the backup that libvirt tells by DOCUMENT: it may not
        have heard of that yet, when their exports have told for long what the guest writes."""
        disks = native_conf.BackupDef.parse(document).disks
        return [
            f"disk '{disk.name}': its backup job ended"
            for disk in disks
            if disk.backup is not False and self._has_ended(ref, disk.name)
        ]

    def _has_ended(self, ref: hypervisor.DomainRef, disk: str) -> bool:
        """Whether DISK has no job that runs: of no other can the speed be set, which QEMU is asked
        for, and is nothing to a pull."""
        try:
            self._calls.set_speed(ref, disk, 0)
        except libvirt.libvirtError as failure:
            lost = failure.get_error_domain() == libvirt.VIR_FROM_RPC
            if lost or failure.get_error_code() not in _NO_JOB:
                raise
            return True
        return False

    def _end(self, ref: hypervisor.DomainRef, document: str) -> bool:
        """End the backup that libvirt tells by DOCUMENT; whether it was there. Another one may run
        right behind it: who begins one waits for half a minute until there is no job."""
        ended = native_conf.BackupDef.parse(document)
        if not self._still_runs(ref, ended):
            return False
        try:
            self._calls.abort(ref)
        except libvirt.libvirtError as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                raise
            if self._still_runs(ref, ended):
                raise
        end = time.monotonic() + END_TIMEOUT
        while self._still_runs(ref, ended):
            if time.monotonic() > end:
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_TIMEOUT, "libvirt's backup job does not end"
                )
            time.sleep(_LOOK_AGAIN)
        return True

    def _still_runs(self, ref: hypervisor.DomainRef, ended: native_conf.BackupDef) -> bool:
        try:
            return native_job.is_of(self._running(ref), ended)
        except libvirt.libvirtError as failure:
            if not _none_runs(failure) and self._is_active(ref):
                raise
            return False

    def _is_active(self, ref: hypervisor.DomainRef) -> bool:
        try:
            return self._calls.is_active(ref)
        except libvirt.libvirtError as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            return False  # it was transient

    def get_xml_desc(self, ref: hypervisor.DomainRef) -> str:
        return self._proposal(ref).format()

    def get_info(self, ref: hypervisor.DomainRef) -> backup_conf.BackupInfo:
        definition = self._proposal(ref)
        began = 0.0
        with contextlib.suppress(libvirt.libvirtError):
            began = time.time() - int(self._calls.stats(ref).get("time_elapsed", 0)) / 1000
        return native_job.info(definition, began, lambda disk: self._calls.capacity(ref, disk))

    def _proposal(self, ref: hypervisor.DomainRef) -> backup_conf.BackupDef:
        """The running backup, in the proposal's dialect."""
        return native_job.running(self._running(ref), lambda: self._calls.definition(ref))

    def _runs(self, ref: hypervisor.DomainRef) -> bool:
        try:
            self._running(ref)
        except libvirt.libvirtError as failure:
            if not _none_runs(failure):
                raise
            return False
        return True

    def _running(self, ref: hypervisor.DomainRef) -> str:
        """libvirt's document of the backup that runs. Errors: VIR_ERR_NO_DOMAIN_BACKUP, in the
        words of our own engine."""
        try:
            return self._calls.running(ref)
        except libvirt.libvirtError as failure:
            if not _none_runs(failure):
                raise
            raise errors.error(
                libvirt.VIR_ERR_NO_DOMAIN_BACKUP, "no domain backup job present"
            ) from failure


_NO_JOB = (
    libvirt.VIR_ERR_INVALID_ARG,
    libvirt.VIR_ERR_INTERNAL_ERROR,
    libvirt.VIR_ERR_OPERATION_INVALID,
    libvirt.VIR_ERR_NO_DOMAIN,
)
"""libvirt has no such job, QEMU's takes no command any more, or the domain is not there."""

_NOTHING_LEFT = (libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_NO_DOMAIN)


def _none_runs(failure: libvirt.libvirtError) -> bool:
    return bool(failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP)
