# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a driver keeps of one domain while it is open (virDomainObj): its backup, whoever watches
that, and whether it ends with the connection."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import libvirt

from virtbackup import errors, hypervisor, runtime
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    agent,
    capabilities,
    ending,
    job,
    lifecycle,
    monitor,
    naming,
    qcow2,
    status,
    watch,
)

logger = logging.getLogger(__name__)

GRACE = 2.0
"""Seconds from the end of QEMU to libvirt's word of it, where that may be heard."""
_LOOK_AGAIN = 0.02
PATIENCE = 10.0
"""Seconds for a daemon of libvirt's that is restarted to be there again."""
_TRY_AGAIN = 0.2
HASTE = 2.0
"""Seconds for what somebody has waited for in vain already."""


class Host(Protocol):
    """Who knows more of a domain than its QEMU does."""

    def why_ended(self) -> str | None:
        """Why its last run, before the one there may be now, ended; None where that is not known.
        For a domain that is not known any more: ``lifecycle.UNKNOWN``."""

    def listen(self, hearing: lifecycle.Hearing) -> None:
        """Have HEARING hear what there is to be heard. Errors: errors.Error."""

    def backup_ended(self, reason: str) -> None:
        """Its backup has ended before it was stopped, for REASON."""


def _may_come_back(failure: errors.Error) -> bool:
    """Whether the way to QEMU was lost, and not QEMU, as where libvirt's daemon is restarted."""
    lost = isinstance(failure, monitor.MonitorLost)
    return lost or failure.get_error_domain() == libvirt.VIR_FROM_RPC


def _saying(failure: errors.Error, what: str) -> errors.Error:
    """FAILURE, with WHAT has become of the backup."""
    text = f"{failure.get_error_message()} ({what})"
    return errors.Error(failure.get_error_code(), text, domain=failure.get_error_domain())


_LEFT_TO_CLOSE = "ends with the connection, else with the next start, or backup-cleanup"
_LEFT = "ends with the next start, or backup-cleanup"


def _after_no_start(is_left: bool, owned: bool) -> str:
    """What a start that failed has left, which was OWNED."""
    if not is_left:
        return "no backup was started, and nothing is left of it"
    return f"no backup was started; what is left of it {_LEFT_TO_CLOSE if owned else _LEFT}"


class DomainObj:
    """One domain."""

    def __init__(
        self,
        file: status.StatusFile,
        connect: job.Connect,
        engine: capabilities.Engine | None = None,
        quiesce: agent.Agent | None = None,
        host: "Host | None" = None,
        notify: ending.Notify | None = None,
    ) -> None:
        """QUIESCE None: there is no guest agent to be asked. HOST None: nobody but QEMU knows
        anything of the domain. NOTIFY: as ``listen``."""
        self.file = file
        self._host = host
        self.job = job.BackupJob(file, connect, self._why_ended, self._ended)
        self._engine = engine
        self._agent = quiesce
        # Taken and let go of without a line of Python, in which a signal's exception could come.
        self._keeping = threading.RLock()
        """Held for a look at what follows, and never while something is waited for."""
        self._watch: watch.Watch | None = None
        self._watched: _Watched | None = None
        self._autodestroy: naming.BackupId | None = None
        self._unended: naming.BackupId | None = None
        """The one whose stop QEMU did not answer, or which was not waited for."""
        self._closed = False
        # Whoever knows more of the domain knows QEMU's own process.
        passed_on = self.job.passed_on if host is None else ending.nobody
        self._ending = ending.Ending(self.job, self._why_ended, passed_on)
        self._ending.listen(notify)

    def listen(self, notify: ending.Notify | None) -> None:
        """Have NOTIFY called, by any thread, with whether a backup was good, and else why not, once
        for each that ends: the one that runs now, whoever started it, and those that are started
        or asked for here. None: nobody."""
        self._ending.listen(notify)

    def close(self, until: float | None = None) -> bool:
        """End the backup that was started to end with us; a failure to is logged. One that another
        thread is just starting is ended by that. UNTIL, for who closes several: by
        ``time.monotonic``, the end of their PATIENCE, which is one for all. One whose stop was just
        waited for in vain is hardly waited for once more: whether it was long enough."""
        in_vain = self._autodestroy is not None and self._autodestroy == self._unended
        self._stop_watching(wait=not in_vain)
        with self._keeping:
            self._closed = True
            id, self._autodestroy = self._autodestroy, None
        if id is None:
            return True
        until = time.monotonic() + PATIENCE if until is None else until
        if in_vain:
            end = threading.Thread(
                target=self._end_patiently, args=(id, until), name="virtbackup-end", daemon=True
            )
            end.start()
            end.join(HASTE)
            return not end.is_alive()
        self._end_patiently(id, until)
        return True

    def _end_patiently(self, id: naming.BackupId, until: float) -> None:
        """End backup ID, for which a daemon of libvirt's that is restarted is waited for; a failure
        to is logged. Of a signal's handler the call that it is in the middle of is not held up."""
        while True:
            try:
                self._end(id)
            except status.Interrupted:
                threading.Thread(
                    target=self._end_patiently, args=(id, until), name="virtbackup-end"
                ).start()
            except errors.Error as failure:
                if _may_come_back(failure) and time.monotonic() < until:
                    time.sleep(_TRY_AGAIN)
                    continue
                logger.warning("backup=%s could not be ended: %s", id, failure)
            return

    def _end(self, id: naming.BackupId) -> None:
        """End backup ID, if it is still there. Errors: those of ``BackupJob.stop``."""
        with self._ending.stopping() as ended:
            try:
                self.job.stop(id, cancel=True)
            except errors.Error as failure:
                if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                    raise
                return
            ended(id, False, ending.CANCELLED)

    @property
    def own(self) -> naming.BackupId | None:
        """The backup that was started here to end with us, if any: it is meant, and no other, by
        who has us for himself."""
        return self._autodestroy

    def backup_start(self, definition: backup_conf.BackupDef, flags: int) -> naming.BackupId:
        quiesce = self._agent if flags & hypervisor.START_QUIESCE else None
        if flags & hypervisor.START_QUIESCE and quiesce is None:
            raise errors.error(
                libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, "QEMU guest agent is not configured"
            )
        owned = bool(flags & hypervisor.START_AUTODESTROY)
        owner = runtime.this_process() if owned else None
        id = job.new_id()
        images: list[watch.Image] = []
        try:
            self.job.start(id, images, definition, owner, self._engine, quiesce)
            with self._keeping:
                if owned and self._closed:
                    raise errors.error(
                        libvirt.VIR_ERR_INVALID_CONN,
                        "virDomainBackupStart",
                        domain=libvirt.VIR_FROM_DOMAIN,
                    )
                self._autodestroy = id if owned else None
            self._begin_to_watch(id, images)
        except BaseException as failure:
            # Where the start itself failed there is only what it could not undo to be ended.
            self._stop_watching(id)
            watch.close_all(images)
            lost = isinstance(failure, errors.Error) and _may_come_back(failure)
            try:
                if not self.job.is_over(id):
                    self.job.stop(id, cancel=True)
            finally:
                if owned and self.job.is_left(id):
                    self._autodestroy = id
            if lost:
                self._end_patiently(id, time.monotonic() + PATIENCE)
            is_left = self.job.is_left(id)
            if not is_left:
                self._forget(id)
            if isinstance(failure, errors.Error) and (lost or is_left):
                raise _saying(failure, _after_no_start(is_left, owned)) from failure
            raise
        self._ending.find()
        return id

    def adopt(self) -> None:
        """Watch the backup that runs, if any, as if it had been started here: whoever started it
        may be gone. Then one that was to end with that process is ended. Takes as long as the
        scratch images' file systems hang. Errors: OSError, those of ``BackupJob.cleanup``."""
        running = self.file.load()
        if running is not None and not status.has_owner(self.file.path, running.owner):
            for line in self.job.cleanup():
                logger.info("backup=%s of a process that is gone, removed: %s", running.id, line)
            return
        if running is None or self._watch is not None or self.job.is_over(running.id):
            return
        self.job.look_after(running)
        self._begin_to_watch(running.id, _images(running))
        logger.info("backup=%s found running", running.id)
        self._ending.find()

    def _begin_to_watch(self, id: naming.BackupId, images: list[watch.Image]) -> None:
        """IMAGES are closed once they are watched no more, or are not watched at all."""
        try:
            watched = _Watched(self.job, id, self._host)
            watching = watch.Watch(images, watched)
            with self._keeping:
                before, self._watch, self._watched = self._watch, watching, watched
            watching.start()
            watched.listen(watching.wake)
        except BaseException:
            self._stop_watching(id)
            watch.close_all(images)
            raise
        if before is not None:
            before.close()

    def backup_stop(self, flags: int, only: naming.BackupId | None) -> None:
        """ONLY is the backup that is meant; None: whichever runs."""
        cancel = bool(flags & hypervisor.STOP_CANCEL)
        with self._ending.stopping() as ended:
            reasons = self._stop(only, cancel, ended)
        if reasons and not cancel:
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, ending.reason_of(reasons))

    def _stop(
        self, only: naming.BackupId | None, cancel: bool, ended: ending.Tell
    ) -> dict[str, str]:
        # Once the backup is over, another thread may have started the next one.
        own, watched = self._autodestroy, self._watched
        try:
            id, reasons = self._stop_patiently(only, cancel)
            reason = ending.reason_of(reasons) if reasons else None
            reason = ending.CANCELLED if cancel else reason
            ended(id, reason is None, reason)
            self._forget(id)
            self._stop_watching(id)
        except errors.Error as failure:
            if failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                # Where ONLY is meant another one may run, which is somebody else's.
                if only in (None, own):
                    self._forget(own)
                if watched is not None and only in (None, watched.id):
                    self._stop_watching(watched.id)
            if failure.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT:
                self._unended = own
            raise
        except BaseException:
            self._unended = own
            # It may have been interrupted as it had come to its end.
            with contextlib.suppress(errors.Error):
                if self.file.load() is None:
                    self._forget(own)
            raise
        return reasons

    def _stop_patiently(
        self, only: naming.BackupId | None, cancel: bool
    ) -> tuple[naming.BackupId, dict[str, str]]:
        """As ``BackupJob.stop``. For one that is to end with us, as a pull's, which has copied
        everything by then, a daemon of libvirt's that is restarted is waited for."""
        is_own = only is not None and only == self._autodestroy
        until = time.monotonic() + (PATIENCE if is_own and not cancel else 0.0)
        while True:
            try:
                return self.job.stop(only, cancel)
            except errors.Error as failure:
                if not _may_come_back(failure):
                    raise
                if time.monotonic() >= until:
                    what = "a stop tells its verdict, once QEMU can be asked again"
                    what = f"it {_LEFT_TO_CLOSE}" if is_own else what
                    raise _saying(failure, f"the backup is not stopped: {what}") from failure
            time.sleep(_TRY_AGAIN)

    def _forget(self, own: naming.BackupId | None) -> None:
        """It does not end with us any more."""
        with self._keeping:
            if self._autodestroy == own:
                self._autodestroy = None

    def backup_xml(self, only: naming.BackupId | None) -> str:
        """ONLY: as ``backup_stop``."""
        xml = self.job.definition(only)
        self._ending.find()
        return xml

    def backup_info(self, only: naming.BackupId | None) -> backup_conf.BackupInfo:
        """ONLY: as ``backup_stop``."""
        info = self.job.info(only)
        self._ending.find()
        return info

    def _stop_watching(self, id: naming.BackupId | None = None, wait: bool = True) -> None:
        """Watch backup ID no more; None: whichever is watched. WAIT: as ``Watch.close``."""
        with self._keeping:
            if self._watched is None or id not in (None, self._watched.id):
                return
            watching, self._watch, self._watched = self._watch, None, None
        if watching is not None:
            # It may wait for the call that a signal's handler, which we are in, has interrupted.
            watching.close(wait=wait and not self.file.is_taken_here())

    def _ended(self, reason: str) -> None:
        if self._host is not None:
            self._host.backup_ended(reason)

    def _why_ended(self, patience: float = 0.0) -> str | None:
        """Why there is no QEMU any more, or another one, where that is known within PATIENCE
        seconds: libvirt takes a moment to notice."""
        end = time.monotonic() + (0.0 if self._host is None else patience)
        while (why := self._why_it_ended()) is None and time.monotonic() < end:
            time.sleep(_LOOK_AGAIN)
        return why

    def _why_it_ended(self) -> str | None:
        watched = self._watched  # which a stop may take away at any moment
        if watched is not None and (heard := watched.heard()) is not None:
            return heard
        asked = None if self._host is None else self._host.why_ended()
        if asked == lifecycle.UNKNOWN and watched is not None:
            return watched.heard(lifecycle.PATIENCE) or asked
        return asked


def _images(running: status.Status) -> list[watch.Image]:
    """The scratch images of a backup, which have no names: each by its directory, as one that takes
    nothing yet. Errors: OSError."""
    disks = backup_conf.BackupDef.parse(running.definition).disks
    reserved = {disk.name for disk in disks if disk.source is not None and disk.source.reserve}
    with contextlib.ExitStack() as undo:
        images = []
        for disk in running.disks:
            if disk.target in reserved:
                continue
            fd = os.open(disk.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, fd)
            images.append(watch.Image(disk.target, fd, qcow2.full_size(disk.size)))
        undo.pop_all()
        return images


class BackupHooks:
    """The hooks of ``hypervisor.BackupDriver`` but the start, and of ``SharedDriver``, for a driver
    that keeps something of each domain."""

    def _obj(self, ref: hypervisor.DomainRef) -> DomainObj:
        """What is kept of a domain."""
        raise NotImplementedError

    def domain_backup_stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        self.domain_backup_stop_of(ref, flags, self._obj(ref).own)

    def domain_backup_stop_of(
        self, ref: hypervisor.DomainRef, flags: int, only: str | None
    ) -> None:
        self._obj(ref).backup_stop(flags, _id(only))

    def domain_backup_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return self.domain_backup_get_xml_desc_of(ref, flags, self._obj(ref).own)

    def domain_backup_get_xml_desc_of(
        self, ref: hypervisor.DomainRef, flags: int, only: str | None
    ) -> str:
        return self._obj(ref).backup_xml(_id(only))

    def domain_backup_get_info(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        return self.domain_backup_get_info_of(ref, flags, self._obj(ref).own)

    def domain_backup_get_info_of(
        self, ref: hypervisor.DomainRef, flags: int, only: str | None
    ) -> backup_conf.BackupInfo:
        return self._obj(ref).backup_info(_id(only))

    def domain_backup_cleanup(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        return self._obj(ref).job.cleanup()

    def domain_branch_list(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> Sequence[backup_conf.Branch]:
        return self._obj(ref).job.branches()

    def domain_branch_create(self, ref: hypervisor.DomainRef, name: str, flags: int) -> None:
        self._obj(ref).job.create_branch(name)

    def domain_branch_delete(self, ref: hypervisor.DomainRef, name: str, flags: int) -> None:
        self._obj(ref).job.delete_branch(name)


def _id(only: str | None) -> naming.BackupId | None:
    return None if only is None else naming.BackupId(only)


class _Watched:
    """Backup ID of one domain, for who watches it."""

    def __init__(self, backup: job.BackupJob, id: naming.BackupId, host: Host | None) -> None:
        self._job = backup
        self.id = id
        self._host = host
        self._qemu = None if host is None else backup.qemu_of(id)
        self._gone_since: float | None = None
        self._hearing = lifecycle.Hearing()

    def listen(self, wake: Callable[[], None]) -> None:
        """Have WAKE called when there is news of the domain."""
        if self._host is None:
            return
        self._hearing.wake = wake
        try:
            self._host.listen(self._hearing)
        except errors.Error as failure:
            logger.warning("backup=%s nothing is heard of the domain: %s", self.id, failure)

    def heard(self, timeout: float = 0.0) -> str | None:
        """Why the domain ended, where that was heard, or is within TIMEOUT seconds."""
        return self._hearing.reason(timeout)

    def is_over(self) -> bool:
        return self._job.is_over(self.id)

    def why_ended(self) -> str | None:
        if self._host is None or (self._qemu is not None and runtime.is_alive(self._qemu)):
            return None
        if (heard := self._hearing.reason()) is not None or self._qemu is None:
            return heard
        if self._gone_since is None:
            self._gone_since = time.monotonic()
        if self._hearing.listens and time.monotonic() < self._gone_since + GRACE:
            return None
        return self._host.why_ended()

    def note_end(self, reason: str) -> None:
        self._job.note_end(self.id, reason)

    def guest_trouble(self) -> str | None:
        return self._job.guest_trouble(self.id)

    def give_up(self, reason: str) -> bool:
        return self._job.give_up(self.id, reason) or self._host is None

    def let_go(self) -> None:
        self._hearing.close()
