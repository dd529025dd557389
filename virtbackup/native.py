# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proposed calls on libvirt's own backup job (virDomainBackupBegin), by whichever way a libvirt
is reached.
"""

import collections
import contextlib
import functools
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, domain_conf, native_conf, native_job

left_logger = logging.getLogger(f"{__name__}.left")
"""What no error tells: that a backup is left."""

END_TIMEOUT = 60.0
"""Seconds for libvirt to end a backup job that was aborted."""

PATIENCE = 10.0
"""Seconds for a daemon of libvirt's that is restarted to be there again."""

_LOOK_AGAIN = 0.01
_TRY_AGAIN = 0.2
_Told = TypeVar("_Told")


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

    def monitor_command(self, ref: hypervisor.DomainRef, command: str) -> str:
        """virDomainQemuMonitorCommand: QMP's reply to COMMAND."""

    def stats(self, ref: hypervisor.DomainRef) -> Mapping[str, Any]:
        """virDomainGetJobStats"""

    def has_job(self, ref: hypervisor.DomainRef, disk: str) -> bool:
        """virDomainGetBlockJobInfo"""

    def capacity(self, ref: hypervisor.DomainRef, disk: str) -> int:
        """virDomainGetBlockInfo: bytes."""


class NativeJobs:
    """The backups of all domains of one libvirt."""

    def __init__(self, calls: Calls, patience: float = PATIENCE) -> None:
        """PATIENCE: seconds to try what has to be done by new connections, where the one that was
        is lost; 0 where there are none."""
        self._calls = calls
        self._patience = patience
        self._owned: dict[str, tuple[hypervisor.DomainRef, native_conf.BackupDef]] = {}
        """By uuid: a domain whose backup is to end with us, and what was begun."""
        # Reentrant, as a signal's handler may start one.
        self._starting: dict[str, threading.RLock] = collections.defaultdict(threading.RLock)
        """By uuid: libvirt lets who begins a second backup wait for half a minute, and with it, up
        to 9.0 at least, whoever asks something by the same connection. Nor is a capacity asked for
        meanwhile."""

    def close(self) -> None:
        """End the backups that were started to end with us. It is warned of one that cannot be."""
        owned, self._owned = self._owned, {}
        until = time.monotonic() + self._patience
        for ref, begun in owned.values():
            try:
                _patiently(functools.partial(self._end, ref, begun), until)
            except libvirt.libvirtError as failure:
                if failure.get_error_code() not in _NOTHING_LEFT:
                    left_logger.warning(
                        "the backup of domain '%s' runs on until virsh domjobabort ends it: %s",
                        ref.name,
                        failure,
                    )

    def start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> None:
        """Errors: those of ``native_job.begin``, libvirt's own, VIR_ERR_OPERATION_INVALID. What a
        libvirt that is lost meanwhile has begun all the same is ended, or told to be left."""
        quiesce = bool(flags & hypervisor.START_QUIESCE)
        native = native_job.begin(xml, quiesce, lambda: self._calls.definition(ref), self._image)
        with self._starting[ref.uuid]:
            if self._runs(ref):
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_INVALID, "another backup job is already running"
                )
            self._begin(ref, native)
            self._owned.pop(ref.uuid, None)
            if flags & hypervisor.START_AUTODESTROY:
                self._owned[ref.uuid] = ref, native

    def _begin(self, ref: hypervisor.DomainRef, native: native_conf.BackupDef) -> None:
        try:
            self._calls.begin(ref, native.format())
        except BaseException as failure:
            if isinstance(failure, libvirt.libvirtError) and not _is_lost(failure):
                raise
            self._undo(ref, native)
            raise

    def _undo(self, ref: hypervisor.DomainRef, begun: native_conf.BackupDef) -> None:
        """End what was BEGUN perhaps, in a start that has failed."""
        try:
            _patiently(lambda: self._end(ref, begun), time.monotonic() + self._patience)
        except libvirt.libvirtError as failure:
            left_logger.warning(
                "a backup of domain '%s' that may have begun runs on until virsh domjobabort ends"
                " it: %s",
                ref.name,
                failure,
            )

    def _image(self, disk: str) -> str:
        return native_job.image_path(self._calls.scratch_directory(), disk, secrets.token_hex(4))

    def stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        """A pull is good whose jobs all run until it is aborted: until then its exports tell what
        the disks were.

        Errors: those of ``native_job.check_ends``, libvirt's own, VIR_ERR_OPERATION_TIMEOUT;
        VIR_ERR_OPERATION_FAILED where the backup is not good.
        """
        _, begun = self._owned.get(ref.uuid, (None, None))
        cancel = bool(flags & hypervisor.STOP_CANCEL)
        until = time.monotonic() + (0.0 if begun is None or cancel else self._patience)
        document = _patiently(lambda: self._running(ref), until)
        native_job.check_ends(document, begun)
        ended = native_conf.BackupDef.parse(document)
        reasons = []
        if not cancel:
            reasons = _patiently(lambda: self._why_not_good(ref, ended), until)
        _patiently(lambda: self._end(ref, ended), until)
        self._owned.pop(ref.uuid, None)
        # What ends the domain once they have run, as a save that has waited, is nothing to them.
        if reasons and not self._is_active(ref):
            reasons = ["the domain ended"]
        if reasons:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_FAILED, f"the backup is not good: {'; '.join(reasons)}"
            )

    def _why_not_good(self, ref: hypervisor.DomainRef, asked: native_conf.BackupDef) -> list[str]:
        """Which disks have no job that runs: libvirt may not have heard of that yet, when their
        exports have told for long what the guest writes."""
        try:
            running = self._jobs_that_run(ref)
        except libvirt.libvirtError as failure:
            if _is_lost(failure) or self._is_active(ref):
                raise
            return ["the domain ended"]
        lost = [
            f"disk '{disk.name}': its backup job ended"
            for disk in asked.disks
            if disk.backup is not False
            # As libvirt has named its backup jobs, a disk's and a node's name behind.
            and not any(id.startswith(f"backup-{disk.name}-") for id in running)
        ]
        if not lost and not self._still_runs(ref, asked):
            return ["somebody else ended it"]
        return lost

    def _jobs_that_run(self, ref: hypervisor.DomainRef) -> set[str]:
        """By their ids in QEMU, which alone knows. That a job takes a speed would say the same, but
        libvirt 11.3 lets none be set while there is a backup. Errors: libvirt's own;
        VIR_ERR_INTERNAL_ERROR."""
        reply = self._calls.monitor_command(ref, _QUERY_JOBS)
        try:
            return {str(job["id"]) for job in json.loads(reply)["return"] if job["status"] in _RUNS}
        except (ValueError, LookupError, TypeError) as failure:
            raise errors.error(
                libvirt.VIR_ERR_INTERNAL_ERROR, "unexpected reply of QEMU to 'query-jobs'"
            ) from failure

    def _end(self, ref: hypervisor.DomainRef, ended: native_conf.BackupDef) -> None:
        """End a backup, where it is still there. Another one may run right behind it: who begins
        one waits for half a minute until there is no job."""
        if not self._still_runs(ref, ended):
            return
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
        """Errors: VIR_ERR_NO_DOMAIN_BACKUP, also of one that is still being begun."""
        definition = self._proposal(ref)
        began = 0.0
        with contextlib.suppress(libvirt.libvirtError):
            began = time.time() - int(self._calls.stats(ref).get("time_elapsed", 0)) / 1000
        with self._starting[ref.uuid]:
            self._check_made(ref, definition)
            return native_job.info(definition, began, lambda disk: self._calls.capacity(ref, disk))

    def _check_made(self, ref: hypervisor.DomainRef, definition: backup_conf.BackupDef) -> None:
        """libvirt tells of a backup while it has scratch images made. QEMU before 10.0 dies then of
        what libvirt asks it for a capacity (``capabilities.CREATE_CRASH``)."""
        if not all(
            self._calls.has_job(ref, disk.name) for disk in definition.disks if disk.present
        ):
            raise errors.error(
                libvirt.VIR_ERR_NO_DOMAIN_BACKUP, "the domain's backup begins or ends just now"
            )

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


_QUERY_JOBS = '{"execute": "query-jobs"}'
_RUNS = {"created", "running", "paused", "ready", "standby"}
"""QAPI's JobStatus of a job that has not ended."""


def _patiently(ask: Callable[[], _Told], until: float) -> _Told:
    """What is told, by a libvirt that may be restarted just now, UNTIL some ``time.monotonic``."""
    while True:
        try:
            return ask()
        except libvirt.libvirtError as failure:
            if not _is_lost(failure) or time.monotonic() >= until:
                raise
        time.sleep(_TRY_AGAIN)


def _is_lost(failure: libvirt.libvirtError) -> bool:
    """Whether the connection was, and not what was asked for."""
    return bool(failure.get_error_domain() == libvirt.VIR_FROM_RPC)


_NOTHING_LEFT = (libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_NO_DOMAIN)


def _none_runs(failure: libvirt.libvirtError) -> bool:
    return bool(failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP)
