# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proposed calls on libvirt's own backup job (virDomainBackupBegin): ``?native=yes``.

So that one program can use, and compare, both engines.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TextIO

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, domain_conf, native_conf, native_job
from virtbackup.qemu import libvirt_driver, libvirt_queries, scratch, status, sweep

_LOOK_AGAIN = 0.01
_own_errors = libvirt_queries.own_errors


def _image(disk: str) -> str:
    return native_job.image_path(scratch.default_directory(), disk, secrets.token_hex(4))


class NativeDriver(libvirt_queries.LibvirtQueries):
    """The driver of libvirt's own engine; all but backups is as without it."""

    def __init__(self, host: libvirt_driver.LibvirtDriver) -> None:
        self._host = host
        self._owned: dict[str, tuple[hypervisor.DomainRef, native_conf.BackupDef]] = {}
        """By uuid: a domain whose backup is to end with us, and what was begun."""

    def close(self) -> None:
        """End the backups that were started to end with us. It is warned of one that cannot be."""
        for ref, begun in self._owned.values():
            try:
                found = self._host.lookup(ref)
                document = self._running(found)
                if native_job.is_of(document, begun):
                    self._end(found, document)
            except libvirt.libvirtError as failure:
                if (text := native_job.left(ref.name, failure)) is not None:
                    sweep.left_logger.warning("%s", text)
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
        """Errors: those of ``native_job.begin``, libvirt's own."""
        quiesce = bool(flags & hypervisor.START_QUIESCE)
        native = native_job.begin(xml, quiesce, lambda: self._definition(ref), _image)
        found = self._host.lookup(ref)
        if self._runs(found):
            raise native_job.another_runs()
        found.backupBegin(native.format(), None, 0)
        self._owned.pop(ref.uuid, None)
        if flags & hypervisor.START_AUTODESTROY:
            self._owned[ref.uuid] = ref, native

    @_own_errors()
    def domain_backup_stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        found = self._host.lookup(ref)
        _, begun = self._owned.get(ref.uuid, (None, None))
        document = self._running(found)
        native_job.check_ends(document, begun)
        self._end(found, document)
        self._owned.pop(ref.uuid, None)
        if not found.isActive() and not flags & hypervisor.STOP_CANCEL:
            raise native_job.not_good()

    def _end(self, found: "libvirt.virDomain", document: str) -> None:
        """End the backup that libvirt tells by DOCUMENT. Another one may run right behind it: who
        begins one waits for half a minute until there is no job."""
        ended = native_conf.BackupDef.parse(document)
        found.abortJob()
        end = time.monotonic() + native_job.END_TIMEOUT
        while found.isActive() and self._still_runs(found, ended):
            if time.monotonic() > end:
                raise native_job.does_not_end()
            time.sleep(_LOOK_AGAIN)

    def _still_runs(self, found: "libvirt.virDomain", ended: native_conf.BackupDef) -> bool:
        try:
            return native_job.is_of(self._running(found), ended)
        except errors.Error:
            return False

    @_own_errors()
    def domain_backup_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return self._proposal(ref).format()

    @_own_errors()
    def domain_backup_get_info(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        definition = self._proposal(ref)
        found = self._host.lookup(ref)
        began = 0.0
        with contextlib.suppress(libvirt.libvirtError):
            began = time.time() - found.jobStats().get("time_elapsed", 0) / 1000
        return native_job.info(definition, began, lambda disk: int(found.blockInfo(disk)[0]))

    def domain_backup_cleanup(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        """libvirt cleans up by itself."""
        return []

    def _definition(self, ref: hypervisor.DomainRef) -> domain_conf.DomainDef:
        return domain_conf.DomainDef.parse(self.domain_get_xml_desc(ref, 0))

    def _proposal(self, ref: hypervisor.DomainRef) -> backup_conf.BackupDef:
        """The running backup, in the proposal's dialect."""
        document = self._running(self._host.lookup(ref))
        return native_job.running(document, lambda: self._definition(ref))

    def _runs(self, found: "libvirt.virDomain") -> bool:
        try:
            self._running(found)
        except libvirt.libvirtError as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                raise
            return False
        return True

    def _running(self, found: "libvirt.virDomain") -> str:
        """libvirt's document of the backup that runs. Errors: VIR_ERR_NO_DOMAIN_BACKUP."""
        try:
            return str(found.backupGetXMLDesc(0))
        except libvirt.libvirtError as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                raise
            raise native_job.none_runs() from failure


_: Callable[[libvirt_driver.LibvirtDriver], hypervisor.QueryDriver] = NativeDriver
"""mypy's proof that the driver has every hook."""
