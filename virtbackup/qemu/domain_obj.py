# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a driver keeps of one domain while it is open (virDomainObj): its backup, whoever watches
that, and whether it ends with the connection."""

import contextlib
import logging
import os
from collections.abc import Callable

import libvirt

from virtbackup import errors, runtime
from virtbackup.conf import backup_conf
from virtbackup.qemu import agent, capabilities, ending, job, naming, qcow2, status, watch

logger = logging.getLogger(__name__)

# The public flags (api.py), which a driver may not import: the numbers are the contract.
START_QUIESCE = 1 << 0
START_AUTODESTROY = 1 << 1
STOP_CANCEL = 1 << 0


class DomainObj:
    """One domain."""

    def __init__(
        self,
        file: status.StatusFile,
        connect: job.Connect,
        engine: capabilities.Engine | None = None,
        quiesce: agent.Agent | None = None,
        why_gone: Callable[[], str | None] = lambda: None,
        notify: ending.Notify | None = None,
    ) -> None:
        """QUIESCE None: there is no guest agent to be asked. WHY_GONE: as ``BackupJob``. NOTIFY:
        as ``listen``."""
        self.file = file
        self.job = job.BackupJob(file, connect, why_gone)
        self._engine = engine
        self._agent = quiesce
        self._watch: watch.Watch | None = None
        self._autodestroy: naming.BackupId | None = None
        self._ending = ending.Ending(file, why_gone)
        self._ending.listen(notify)

    def listen(self, notify: ending.Notify | None) -> None:
        """Have NOTIFY called, by any thread, with whether a backup was good, and else why not, once
        for each that ends: the one that runs now, whoever started it, and those that are started
        or asked for here. None: nobody."""
        self._ending.listen(notify)

    def close(self) -> None:
        """End the backup that was started to end with us; a failure to is logged."""
        self._stop_watching()
        id, self._autodestroy = self._autodestroy, None
        running = self.file.load()
        if id is None or running is None or running.id != id:
            return
        with self._ending.stopping() as ended:
            try:
                self.job.stop(id, cancel=True)
                ended(False, ending.CANCELLED)
            except errors.Error as failure:
                logger.warning("backup=%s could not be ended on close: %s", id, failure)

    def backup_start(self, definition: backup_conf.BackupDef, flags: int) -> None:
        quiesce = self._agent if flags & START_QUIESCE else None
        if flags & START_QUIESCE and quiesce is None:
            raise errors.error(
                libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, "QEMU guest agent is not configured"
            )
        owned = bool(flags & START_AUTODESTROY)
        owner = runtime.this_process() if owned else None
        id, images = self.job.start(definition, owner, self._engine, quiesce)
        if owned:
            self._autodestroy = id
        self._stop_watching()
        try:
            self._watch = self._watching(id, images)
        except BaseException:
            for image in images:
                os.close(image.fd)
            self.job.stop(id, cancel=True)
            raise
        self._ending.find()

    def adopt(self) -> None:
        """Watch the backup that runs, if any, as if it had been started here: whoever started it
        may be gone. Takes as long as the scratch images' file systems hang. Errors: OSError."""
        running = self.file.load()
        if running is None or self._watch is not None or self.job.is_over(running.id):
            return
        self._watch = self._watching(running.id, _images(running))
        logger.info("backup=%s found running", running.id)
        self._ending.find()

    def _watching(self, id: naming.BackupId, images: list[watch.Image]) -> watch.Watch:
        return watch.Watch(
            images,
            is_over=lambda: self.job.is_over(id),
            guest_trouble=lambda: self.job.guest_trouble(id),
            give_up=lambda reason: self.job.give_up(id, reason),
        )

    def backup_stop(self, flags: int) -> None:
        cancel = bool(flags & STOP_CANCEL)
        with self._ending.stopping() as ended:
            reasons = self._stop(cancel)
            reason = ending.CANCELLED if cancel else ending.reason_of(reasons) if reasons else None
            ended(reason is None, reason)
        if reasons and not cancel:
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, reason)

    def _stop(self, cancel: bool) -> dict[str, str]:
        # Where we started a backup that is to end with us, that one is meant and no other.
        try:
            reasons = self.job.stop(self._autodestroy, cancel)
        except errors.Error as failure:
            if failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                self._autodestroy = None
            raise
        self._autodestroy = None
        self._stop_watching()
        return reasons

    def backup_xml(self) -> str:
        xml = self.job.definition(self._autodestroy)
        self._ending.find()
        return xml

    def backup_info(self) -> backup_conf.BackupInfo:
        info = self.job.info(self._autodestroy)
        self._ending.find()
        return info

    def _stop_watching(self) -> None:
        watching, self._watch = self._watch, None
        if watching is not None:
            watching.close()


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
