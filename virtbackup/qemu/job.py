# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's backup from start to verdict (the patch's qemuDomainBackupStart and -Stop).

What runs is in QEMU and in the status file, never only in this process. Every call holds the
domain's lock from its first look to its last command.
"""

import contextlib
import dataclasses
import io
import logging
import os
import time
from collections.abc import Callable, Iterable

import libvirt

from virtbackup import config, errors, runtime
from virtbackup.conf import backup_conf, storage_conf
from virtbackup.qemu import (
    agent,
    backup,
    block,
    blockjob,
    branches,
    capabilities,
    cleanup,
    domain,
    elsewhere,
    ending,
    listener,
    monitor,
    naming,
    nbdserver,
    process,
    qmp,
    scratch,
    starting,
    status,
    verdict,
    watch,
)

logger = logging.getLogger(__name__)

Connect = Callable[[], contextlib.AbstractContextManager[domain.Session]]
"""Opens a session with the domain's QEMU; raises ``monitor.NotListening`` when there is none."""

_DYING = 2.0
"""Seconds for a QEMU whose monitor was lost to be gone, if that was why."""
_LOOK_AGAIN = 0.01
_NEWS = 0.5
"""Seconds for which what was seen of QEMU, and of the scratch images, is as good as a new look."""
_WORD = 1.0
"""Seconds for whoever knows why QEMU is gone to know it."""


class BackupJob:
    """The one backup that a domain can have."""

    def __init__(
        self,
        file: status.StatusFile,
        connect: Connect,
        why_ended: Callable[[float], str | None] = lambda patience: None,
        on_end: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """WHY_ENDED tells why there is no QEMU any more, or another one, where somebody knows, or
        gets to within so many seconds. ON_END is told why a backup ended that nobody has stopped,
        by who noted it."""
        self._file = file
        self._connect = connect
        self._why_ended = why_ended
        self._on_end = on_end
        self._begun: status.Status | None = None
        """The backup that is looked after here, as it was once it ran: its file may get lost."""
        self._owning: io.FileIO | None = None
        """What tells that we are there, with whom it ends."""

    def start(
        self,
        id: naming.BackupId,
        images: list[watch.Image],
        definition: backup_conf.BackupDef,
        owner: runtime.Process | None,
        engine: capabilities.Engine | None = None,
        quiesce: agent.Agent | None = None,
    ) -> None:
        """Start backup ID, by the safest ENGINE where that is None; it ends with OWNER, if any.
        QUIESCE has the guest's file systems stand still for the instant.

        To IMAGES are added the scratch images to be watched, whose descriptors the caller gets.
        Nothing remains of a start that fails. One that is interrupted (SIGINT) as it returns has
        its backup running: ``is_over`` tells.
        """
        tls = config.load().credentials() if definition.address.tls else None
        sources = [disk.source or storage_conf.Source() for disk in definition.disks]
        with (
            scratch.ask([storage_conf.Source(), *sources]) as asked,
            self._file.locked(),
            self._connect() as session,
        ):
            state = self._make_room(session, bitmaps=definition.branch is not None)
            definition = domain.check_known(session, definition, state)
            aligned = definition.align_disks(domain.definition(session.ref, state.disks))
            place = scratch.default_directory()
            caps = session.capabilities
            kept = starting.why_kept(session, engine or caps.engine, aligned, state)
            plan = backup.plan(aligned, state, caps, id, place, engine, tls, kept is None)
            process.check_address(plan.address)
            wanted = [scratch.Wanted(disk.target, disk.source, disk.size) for disk in plan.disks]
            scratch.check(wanted, asked)
            thresholds = _thresholds(wanted)
            if not caps.write_threshold:
                thresholds = {}
            fdsets = caps.fdsets and session.qemu.passes_files
            by_fd = fdsets and state.vcpus_run
            takes, uid = _takes_listener(session, plan), session.qemu.peer_uid()
            for more in reversed(range(listener.TRIES)):
                with listener.reserve(plan.address, takes, uid) as where:
                    placed = plan.listening_on(where.address)
                    run = process.Run(session, placed, where, by_fd, thresholds, images)
                    noted = starting.status_of(run, owner, state.io_error, kept)
                    try:
                        self._run(run, noted, quiesce)
                        return
                    except process.PortTaken:
                        if not more:
                            raise

    def look_after(self, running: status.Status) -> None:
        """Take RUNNING for a backup that was started here."""
        self._begun = running

    def is_over(self, id: naming.BackupId) -> bool:
        """Whether backup ID has ended or is ending. Errors: those of ``load``."""
        return _is_over(self.load(), id)

    def is_left(self, id: naming.BackupId) -> bool:
        """Whether there is still something of backup ID, which may be over. Errors: those of
        ``load``."""
        running = self.load()
        return running is not None and running.id == id

    def load(self) -> status.Status | None:
        """The status, also where its file is lost of a backup that was begun here. Errors: of the
        file, and then of the lock and the monitor."""
        found, begun = self._file.load(), self._begun  # which a stop may forget at any moment
        if begun is None or self._is_noted(found):
            return found
        if begun.given_up is not None:
            return begun
        with self._file.locked():
            return self._load_known()

    def _is_noted(self, found: status.Status | None) -> bool:
        """Whether the status FOUND has all that is known of the backup that was begun here: not
        where there is none, or we gave that up when it was not to be had."""
        begun = self._begun
        if found is None or begun is None or begun.given_up is None or found.id != begun.id:
            return found is not None
        return found.given_up is not None or found.phase != "running"

    def _begun_as(self, id: naming.BackupId) -> status.Status | None:
        begun = self._begun
        return begun if begun is not None and begun.id == id else None

    def qemu_of(self, id: naming.BackupId) -> runtime.Process | None:
        """QEMU, of backup ID; None where it cannot be seen, or the backup is over."""
        running = self._file.load()
        if running is None or running.id != id or running.qemu is None:
            return None
        return running.qemu if runtime.is_seen(running.qemu) else None

    def passed_on(self, running: status.Status) -> runtime.Process | None:
        """As ``ending.PassedOn``."""
        try:
            with self._connect() as session:
                is_other = session.restarted_since(running.qemu, running.id)
                return None if is_other else session.process
        except monitor.NotListening:
            return None

    def guest_trouble(self, id: naming.BackupId) -> str | None:
        """Why the guest stands still, if it does so because of backup ID. Errors: the monitor's."""
        try:
            with self._file.locked():
                running = self._load_known()
                if running is None or _is_over(running, id):
                    return None
                return self._guest_trouble(running)
        except status.Unusable:
            if (begun := self._begun_as(id)) is None:
                raise
            return self._guest_trouble(begun)

    def _guest_trouble(self, running: status.Status) -> str | None:
        try:
            with self._connect() as session:
                sight = verdict.look_at(session, running)
        except monitor.NotListening:
            return None  # the stop will say so
        except monitor.NoAnswer as failure:
            if not _rescue(running, failure):
                raise
            return "given up, as an NBD client stopped reading and QEMU stood still for it"
        if not blockjob.stopped_guest(running.disks, sight):
            return None
        return (
            "given up, as a scratch image, or the guest's own storage, failed and the guest was"
            " paused"
        )

    def give_up(self, id: naming.BackupId, reason: str) -> bool:
        """End backup ID for the guest's sake; its stop will tell REASON. Whether it is over: not
        where QEMU is gone, or another one runs, of which the stop will tell why. Where its status
        cannot be had it ends all the same, if it was begun here. Errors: the monitor's,
        sweep.ClientStuck; Unusable."""
        return self._end_unasked(id, reason, self._given_up)

    def note_end(self, id: naming.BackupId, reason: str) -> None:
        """Note that QEMU ended during backup ID, for REASON, which its stop will tell whoever calls
        it; what the backup left outside of QEMU is removed. Where its status cannot be had it is
        noted here alone, if it was begun here. Errors: Unusable."""
        self._end_unasked(id, reason, _without_qemu)

    def _end_unasked(
        self,
        id: naming.BackupId,
        reason: str,
        end: Callable[[status.Status], status.Status | None],
    ) -> bool:
        """Whether backup ID is over, as END ends it for REASON, unless that gives None. Errors:
        END's; Unusable, of one that was not begun here."""
        try:
            with self._file.locked():
                running = self._load_known()
                if running is None or _is_over(running, id):
                    return True
                if (ended := end(running)) is None:
                    return False
                self._file.save(dataclasses.replace(ended, given_up=reason))
        except status.Unusable as failure:
            if (begun := self._begun_as(id)) is None:
                raise
            logger.warning("backup=%s ends without a note of it: %s", id, failure)
            if (ended := end(begun)) is None:
                return False
            self._begun = dataclasses.replace(ended, given_up=reason)
        logger.warning("backup=%s %s", id, reason)
        self._on_end(reason)
        return True

    def _given_up(self, running: status.Status) -> status.Status | None:
        """RUNNING, once it is out of QEMU; None where that is gone, or another one."""
        try:
            rest = self._take_out(running)
        except monitor.NotListening:
            return None
        except monitor.NoAnswer as failure:
            if not _rescue(running, failure):
                raise
            rest = self._take_out(running)
        if rest is None:
            return None
        cleanup.remove_files(running)
        left = cleanup.with_files_left(running)
        return dataclasses.replace(left, server=cleanup.NBD_SERVER in rest)

    def _take_out(self, running: status.Status) -> list[str] | None:
        """Let the guest write freely, and take RUNNING out of QEMU: what is still there. None:
        another QEMU runs. Errors: the monitor's, sweep.ClientStuck."""
        with self._connect() as session:
            if session.restarted_since(running.qemu, running.id):
                return None
            cleanup.sweeper_of(session, running).stop_saving()
            return cleanup.take_out(session, running)[1]

    def stop(
        self, only: naming.BackupId | None = None, cancel: bool = False
    ) -> tuple[naming.BackupId, dict[str, str]]:
        """Take the backup down: (which it was, disk -> why its data is not good). Empty: all of it
        is.

        ONLY is the backup that is meant; None: whichever runs. Where all of it is good, it is the
        last point of its branch from now on, but with CANCEL. Errors: VIR_ERR_NO_DOMAIN_BACKUP when
        there is none, or another one; Unusable, but with CANCEL of one that was begun here: that is
        not to stay in QEMU for want of a status.
        """
        try:
            return self._stop_noted(only, cancel)
        except status.Unusable as failure:
            if not cancel or only is None or (begun := self._begun_as(only)) is None:
                raise
            logger.warning("backup=%s is ended without a note of it: %s", only, failure)
            self._stop_unnoted(begun)
            return begun.id, {}

    def _stop_noted(
        self, only: naming.BackupId | None, cancel: bool
    ) -> tuple[naming.BackupId, dict[str, str]]:
        with self._file.locked():
            running = self._load_known()
            if running is None:
                raise _no_backup()
            _check_is(running, only)
            running = dataclasses.replace(running, cancelled=running.cancelled or cancel)
            try:
                reasons = self._stop(running)
            except monitor.NoAnswer as failure:
                if not _rescue(running, failure):
                    raise
                reasons = self._stop(running)
            self._let_go()
        if running.told:
            raise _no_backup()
        logger.info("backup=%s stopped bad=%s", running.id, list(reasons))
        return running.id, reasons

    def _stop_unnoted(self, begun: status.Status) -> None:
        """Take a backup that was BEGUN here out of QEMU, without the lock, and as no good one.
        Errors: the monitor's, ``cleanup.take_out``'s."""
        with contextlib.suppress(monitor.NotListening), self._connect() as session:
            cleanup.take_out(session, dataclasses.replace(begun, cancelled=True))
        cleanup.remove_outside(begun)
        self._let_go()

    def _let_go(self) -> None:
        """There is no backup of ours any more."""
        self._begun = None
        if self._owning is not None:
            self._owning.close()
            self._owning = None

    def _stop(self, running: status.Status) -> dict[str, str]:
        try:
            with self._connect() as session:
                began = time.monotonic()
                reasons, sight = self._end(session, running)
                judged = dataclasses.replace(running, verdict=reasons)
                if not reasons and not judged.cancelled:
                    judged = self._advance(session, judged)
                    reasons = judged.verdict or {}
                is_news = time.monotonic() < began + _NEWS
                cleanup.clean(session, judged, self._file, sight if is_news else None)
        except (monitor.NotListening, monitor.MonitorLost) as failure:
            if not self._means_the_end(failure, running):
                raise
            return self._gone(running)
        return reasons

    def definition(self, only: naming.BackupId | None = None) -> str:
        """The live ``<domainbackup>``. ONLY and errors: as ``stop``."""
        with self._file.locked():
            return self._running(only).definition

    def info(self, only: naming.BackupId | None = None) -> backup_conf.BackupInfo:
        """The verdict so far. ONLY and errors: as ``stop``."""
        with self._file.locked():
            running = self._running(only)
            try:
                with self._connect() as session:
                    return verdict.look(session, self._knowing_end(session, running))
            except (monitor.NotListening, monitor.MonitorLost) as failure:
                if not self._means_the_end(failure, running):
                    raise
                why = running.given_up or self._why_ended(_WORD) or ending.GONE
                return verdict.info(running, verdict.of_all(running, why))

    def branches(self) -> list[backup_conf.Branch]:
        """Every branch of the domain, and bitmaps of others. Errors: VIR_ERR_OPERATION_UNSUPPORTED,
        ``cleanup.check_scratch``'s."""
        with self._file.locked(), self._connect() as session:
            _check_branches(session)
            left = self._file.load()
            return branches.told(_ask(session, left, bitmaps=True))

    def create_branch(self, name: str) -> None:
        """Begin a branch without a backup. Errors: those of ``branches.create``,
        ``backup_conf.check_branch_name``'s, and VIR_ERR_OPERATION_INVALID where a backup that runs
        is to begin it."""
        backup_conf.check_branch_name(name)
        with self._file.locked(), self._connect() as session:
            _check_branches(session)
            left = self._load_known(session)
            state = _ask(session, left, bitmaps=True)
            known = {each.name for each in branches.told(state)}
            if name not in known:
                if left is not None and left.advances == name:
                    self._check_no_backup_of(name, session, state, left)
                elsewhere.check_none_begins(self._file.path, state, name)
            now = naming.Point(new_id(), int(time.time()), 0)
            branches.create(session, state, name, now)

    def delete_branch(self, name: str) -> None:
        """Remove a branch from every disk. Errors: those of ``branches.delete``, and
        VIR_ERR_OPERATION_INVALID while a backup of it runs, or one that is not ours to end."""
        with self._file.locked(), self._connect() as session:
            _check_branches(session)
            left = self._load_known(session)
            state = _ask(session, left, bitmaps=True)
            self._check_no_backup_of(name, session, state, left)
            if left is None or self._is_stale(session, state, left):
                state = self._cleared(session, state, left, bitmaps=True)
            branches.delete(session, state, name)

    def disks(self, session: domain.Session) -> tuple[block.Disk, ...]:
        """The domain's disks. Errors: ``cleanup.check_scratch``'s."""
        return _ask(session, self._file.load()).disks

    def cleanup(self) -> list[str]:
        """Remove what a crash left; a line for each thing, a bad verdict first that nobody knows.

        Errors: VIR_ERR_OPERATION_INVALID while a backup runs."""
        with self._file.locked():
            left = self._file.load()
            other = self._file.of_other_version() if left is None else None
            try:
                with self._connect() as session:
                    if other is None:
                        left = self._load_known(session)
                    state = _ask(session, left)
                    if left is not None and not self._is_stale(session, state, left):
                        now = left.given_up or "running"
                        raise errors.error(
                            libvirt.VIR_ERR_OPERATION_INVALID,
                            f"backup {left.id} is {now}: backup-stop ends it",
                        )
                    elsewhere.check_none(self._file.path, state)
                    removed = self._clean(session, left)
            except monitor.NotListening:
                if left is not None and _serves(left):
                    raise
                why = self._why_ended(_WORD) or ending.GONE
                removed = [
                    *_untold(left, lambda left: verdict.of_all(left, left.given_up or why)),
                    *self._forget(_abandoned(left)),
                ]
            if left is None:  # what is beside a status that is lost, or that cannot be read
                self._file.remove()
            if other is not None:
                removed.insert(
                    0, f"verdict on backup {other.id}: not known, thus not good: {other}"
                )
            return removed + runtime.sweep()

    # --- start ---

    def _make_room(self, session: domain.Session, bitmaps: bool) -> backup.BlockState:
        """Refuse while a backup runs; clear away what a crash left of an earlier one. What QEMU has
        then, and with BITMAPS of every image."""
        left = self._load_known(session)
        unsafe = None
        try:
            state = _ask(session, left, bitmaps)
        except errors.Error as failure:
            if not bitmaps or failure.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                raise
            # It may be for a job of ours, which is cleared away below.
            unsafe, state = failure, _ask(session, left)
        if left is not None and not self._is_stale(session, state, left):
            text = "another backup job is already running"
            if left.given_up is not None:
                text = f"another backup job is not stopped yet, it was {left.given_up}"
            raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, text)
        for line in runtime.sweep():
            logger.info("left by a process that is gone, removed: %s", line)
        cleared = self._cleared(session, state, left, bitmaps)
        if unsafe is not None and cleared is state:
            raise unsafe
        return cleared

    def _check_no_backup_of(
        self,
        name: str,
        session: domain.Session,
        state: backup.BlockState,
        left: status.Status | None,
    ) -> None:
        """Errors: VIR_ERR_OPERATION_INVALID while LEFT is of a backup of branch NAME that runs, or
        that begins the branch."""
        if left is None or name not in (left.branch, left.advances):
            return
        if not self._is_stale(session, state, left):
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID,
                f"a backup of branch '{name}' is running: stop it first",
            )

    def _is_stale(
        self, session: domain.Session, state: backup.BlockState, left: status.Status
    ) -> bool:
        """Whether LEFT is of no running backup. The lock is held: nobody is starting or ending
        one."""
        return (
            left.phase != "running"
            or not status.has_owner(self._file.path, left.owner)
            or session.restarted_since(left.qemu, left.id)
            or (left.given_up is None and left.id not in state.backups())
        )

    def _cleared(
        self,
        session: domain.Session,
        state: backup.BlockState,
        left: status.Status | None,
        bitmaps: bool,
    ) -> backup.BlockState:
        """What QEMU has once all that a crash left is cleared away, of LEFT and without a status;
        STATE where there is nothing. Errors: VIR_ERR_OPERATION_INVALID while a backup runs that is
        none of ours, or whose status is lost."""
        if left is not None:
            state = self._clear(session, left, bitmaps)
        elsewhere.check_none(self._file.path, state)
        if jobs := state.running_jobs():
            place = self._file.path.parent
            why = f"but there is no status of it in '{place}'; if nobody owns it, backup-cleanup"
            if elsewhere.has_status_of(place, naming.backup_of(jobs[0])):
                why = "and who was at it over another monitor of this QEMU is gone: backup-cleanup"
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID,
                f"another backup job is already running ('{jobs[0]}'), {why} ends it",
            )
        return self._clear(session, None, bitmaps) if state.traces() else state

    def _clear(
        self, session: domain.Session, left: status.Status | None, bitmaps: bool
    ) -> backup.BlockState:
        for line in self._clean(session, left):
            logger.info("cleared away, of an earlier backup: %s", line)
        return domain.ask(session, bitmaps)

    def _clean(self, session: domain.Session, left: status.Status | None) -> list[str]:
        """As ``cleanup``, of what QEMU has. Errors: some of it is in use."""

        def judge(left: status.Status) -> dict[str, str]:
            known = self._knowing_end(session, left)
            return verdict.judge(session, known, verdict.look_at(session, left))

        untold = _untold(left, judge)
        removed, rest = cleanup.clean(session, _abandoned(left), self._file)
        if rest:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_FAILED,
                "what is left of a backup cannot be removed, as it is in use: "
                + "; ".join([", ".join(rest), *untold]),
            )
        return untold + removed

    def _run(self, run: process.Run, noted: status.Status, quiesce: agent.Agent | None) -> None:
        """Do the plan, or undo all of it. NOTED is what is on disk of it."""
        try:
            if noted.owner is not None:
                self._owning = self._file.owned()
            self._file.save(noted)
            run.server()
            socket = cleanup.socket_inode(run.plan.address)
            noted = dataclasses.replace(noted, server=True, socket=socket)
            run.scratch_images()
            noted = starting.with_inodes(noted, run.inodes)
            self._file.save(noted)
            if quiesce is None:
                run.freeze()
            else:
                agent.standing_still(quiesce, run.freeze)
            run.check_media()
            run.exports()
            run.check_server()
            if (refusal := run.give_way()) is not None:
                noted = starting.keeping(noted, run.session, refusal)
            noted = starting.with_changed(noted, run.changed())
            running = dataclasses.replace(noted, phase="running")
            self._file.save(running)
            self._begun = running
        except BaseException as failure:
            watch.close_all(run.images)
            self._let_go()
            if isinstance(failure, process.ServerRefused):
                noted = dataclasses.replace(noted, server=False)
            noted = starting.with_inodes(noted, run.inodes)
            self._undo(run.session, starting.without_others_files(noted, run.created))
            raise
        logger.info("backup=%s started disks=%d", noted.id, len(noted.disks))

    def _undo(self, session: domain.Session, noted: status.Status) -> None:
        """After a failed start. Where the monitor broke, by a new one; else the next call will."""
        try:
            cleanup.clean(session, noted, self._file)
        except (errors.Error, qmp.ProtocolError) as failure:
            logger.warning("backup=%s undo: %s; trying again", noted.id, failure)
            session.qemu.close()  # a monitor serves one client at a time
            try:
                with self._connect() as again:
                    cleanup.clean(again, noted, self._file)
            except monitor.NotListening:
                cleanup.forget(noted, self._file)
            except errors.Error as lasting:
                if _is_dead(noted.qemu):
                    cleanup.forget(noted, self._file)
                else:
                    logger.warning("backup=%s left for backup-cleanup: %s", noted.id, lasting)

    # --- stop and info ---

    def _running(self, only: naming.BackupId | None = None) -> status.Status:
        running = self._load_known()
        if running is None or running.phase != "running":
            raise _no_backup()
        _check_is(running, only)
        return running

    def _load_known(self, session: domain.Session | None = None) -> status.Status | None:
        """The status, None where there is none. The lock is held, and SESSION where there is one
        already. Errors: VIR_ERR_OPERATION_UNSUPPORTED for one of another version, which is not to
        be taken for none; where the file may be lost, the monitor's."""
        known = self._file.load()
        if known is None and (other := self._file.of_other_version()) is not None:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"{other}: stop it by that version, or have backup-cleanup end it as not good",
            )
        if self._begun is None or self._is_noted(known):
            return known
        if known is not None:
            self._file.save(self._begun)
        # One that was given up without a note is for our stop to tell of, and in nobody else's way.
        if known is not None or self._begun.given_up is not None:
            return self._begun
        if session is not None:
            return self._regained(session, self._begun)
        try:
            with self._connect() as session:
                return self._regained(session, self._begun)
        except monitor.NotListening:
            # Not noted as ended by that: somebody may have stopped it before.
            if _is_dead(self._begun.qemu):
                cleanup.remove_outside(self._begun)
                self._let_go()
            return None

    def _regained(self, session: domain.Session, begun: status.Status) -> status.Status | None:
        """The backup that was BEGUN here, its status written anew, where QEMU still has it although
        there is none; None where somebody has ended it."""
        if begun.id not in _ask(session, begun).backups():
            self._let_go()
            return None
        self._file.save(begun)
        if self._owning is not None:
            self._owning.close()
            self._owning = self._file.owned()
        logger.warning("backup=%s its status was lost, and is written anew", begun.id)
        return begun

    def _end(
        self, session: domain.Session, running: status.Status
    ) -> tuple[dict[str, str], blockjob.Sight | None]:
        """End the exports, and only then look whether the jobs still vouched for all reads. (The
        verdict, what was seen then; None where that was another time.)

        The verdict is on disk when this returns: an end that fails later does not lose it.
        """
        if running.verdict is not None:
            return running.verdict, None
        running = self._knowing_end(session, running)
        cleanup.check_scratch(session, running)
        before = verdict.look_at(session, running)
        if not session.capabilities.block_exports and not cleanup.still_serves(session, running):
            before = dataclasses.replace(before, exports={})
            running = dataclasses.replace(running, server=False)
        sweeper = cleanup.sweeper_of(session, running)
        sweeper.end_clients(before.exports)
        self._file.save(dataclasses.replace(running, phase="stopping"))
        if session.capabilities.block_exports:
            sweeper.exports(before.exports)
        elif running.server:
            sweeper.server()
            running = dataclasses.replace(running, server=False)
        after = verdict.look_at(session, running)
        sight = dataclasses.replace(
            verdict.with_nodes(session, running, after, is_last=True),
            exports=before.exports,
            lasting=frozenset(after.exports or ()),
            io_error=before.io_error or after.io_error,
            unreadable=verdict.unreadable(session, running, after),
            unwritten=verdict.unwritten(session, running),
        )
        reasons = verdict.judge(session, running, sight)
        self._file.save(dataclasses.replace(running, phase="stopping", verdict=reasons))
        return reasons, after

    def _knowing_end(self, session: domain.Session, running: status.Status) -> status.Status:
        """RUNNING with why its QEMU ended, where another one runs by now and somebody knows."""
        if running.given_up is not None or not session.restarted_since(running.qemu, running.id):
            return running
        return dataclasses.replace(running, given_up=self._why_ended(0.0))

    def _advance(self, session: domain.Session, judged: status.Status) -> status.Status:
        """A backup that was good, as the last point of its branch."""
        if judged.advances is None or judged.advanced:
            return judged
        if failure := branches.advance(session, judged):
            text = f"branch '{judged.branch}' stays at its last point: {failure}"
            if judged.forks:
                text = f"branch '{judged.advances}' does not begin: {failure}"
            return dataclasses.replace(judged, verdict=verdict.of_all(judged, text))
        judged = dataclasses.replace(judged, phase="stopping", advanced=True)
        self._file.save(judged)
        return judged

    def _gone(self, running: status.Status) -> dict[str, str]:
        """After QEMU's end. A good verdict that was reached before it stands where the branch has
        moved on by it; else nobody can have heard of it yet, and what is not sure is not good."""
        last = self._file.load() or running
        last = dataclasses.replace(last, cancelled=last.cancelled or running.cancelled)
        done = last.advances is not None and (last.advanced or last.cancelled)
        if last.verdict is None or not (last.verdict or done):
            may_be_point = last.verdict is not None
            why = last.given_up or self._why_ended(_WORD) or ending.GONE
            reasons = verdict.of_all(running, why)
            self._forget(dataclasses.replace(last, cancelled=last.cancelled or may_be_point))
            return reasons
        self._forget(last)
        return last.verdict

    def _forget(self, left: status.Status | None) -> list[str]:
        """Without its QEMU, forget the backup LEFT. One that may be its branch's point although
        nobody was told so is kept in mind, for that to be undone once QEMU is there again."""
        if left is None:
            return []
        if left.advances is None or left.verdict != {} or not left.cancelled:
            return cleanup.forget(left, self._file)
        removed = cleanup.forget(left, self._file)
        left = cleanup.with_files_left(left)
        self._file.save(dataclasses.replace(left, phase="stopping", told=True, server=False))
        return removed

    def _means_the_end(
        self, failure: monitor.NotListening | monitor.MonitorLost, running: status.Status
    ) -> bool:
        """Whether QEMU has ended, as its monitor failed so. One that is being killed takes clients
        for a moment yet, or libvirt takes commands for it."""
        end = time.monotonic() + _DYING
        while isinstance(failure, monitor.MonitorLost) and not _is_dead(running.qemu):
            try:
                with self._connect():
                    return False
            except monitor.NotListening as gone:
                failure = gone
            except monitor.MonitorLost:
                if time.monotonic() > end:
                    return False
            time.sleep(_LOOK_AGAIN)
        return not _serves(running)


def new_id() -> naming.BackupId:
    """Of a backup that nobody has begun."""
    return naming.BackupId(os.urandom(4).hex())


def _is_over(running: status.Status | None, id: naming.BackupId) -> bool:
    """Whether backup ID has ended or is ending, where RUNNING is what there is."""
    return (
        running is None
        or running.id != id
        or running.phase != "running"
        or running.given_up is not None
    )


def _without_qemu(running: status.Status) -> status.Status:
    """RUNNING, whose QEMU is gone, once what it left outside of that is removed."""
    cleanup.remove_outside(running)
    return dataclasses.replace(cleanup.with_files_left(running), server=False)


def _abandoned(left: status.Status | None) -> status.Status | None:
    """A backup whose stop did not come to tell its verdict, and is not going to: not a good one."""
    if left is None or left.told:
        return left
    return dataclasses.replace(left, cancelled=True)


def _untold(
    left: status.Status | None, judge: Callable[[status.Status], dict[str, str]]
) -> list[str]:
    """A line of why the backup LEFT is not good, as its stop would have told, by the verdict that
    one has reached, else as JUDGE finds; none where one has told it, or nobody wanted to know."""
    if left is None or left.told or left.cancelled or left.phase == "starting":
        return []
    reasons = judge(left) if left.verdict is None else left.verdict
    return [f"verdict on backup {left.id}: {ending.reason_of(reasons)}"] if reasons else []


def _no_backup() -> errors.Error:
    return errors.error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP, "no domain backup job present")


def _check_is(running: status.Status, only: naming.BackupId | None) -> None:
    if only is not None and running.id != only:
        raise errors.error(
            libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
            "the backup that was started here was ended by somebody else, and another one runs",
        )


def _rescue(running: status.Status, failure: monitor.NoAnswer) -> bool:
    """Whether FAILURE of the monitor was QEMU standing still for an NBD client of ours that has
    stopped reading, and the client is gone now."""
    if running.qemu is None or not runtime.is_seen(running.qemu):
        return False
    pid = running.qemu.pid
    address = running.address
    if not runtime.is_alive(running.qemu) or not nbdserver.stuck_clients(pid, address):
        return False
    logger.warning("backup=%s QEMU stands still, its NBD clients are disconnected", running.id)
    return nbdserver.send_clients_away(pid, address, nbdserver.pause) == 0


def _check_branches(session: domain.Session) -> None:
    if not session.capabilities.branches:
        version = capabilities.dotted(session.capabilities.version)
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED, f"QEMU {version} cannot have branches"
        )


def _ask(
    session: domain.Session, left: status.Status | None, bitmaps: bool = False
) -> backup.BlockState:
    """What a plan needs to know, with backup LEFT in QEMU or not; with BITMAPS, of every image.

    Errors: where QEMU has to look at all nodes' files for it, ``cleanup.check_scratch``'s.
    """
    caps = session.capabilities
    if left is not None and (bitmaps or not (caps.devices and caps.block_graph)):
        cleanup.check_scratch(session, left)
    return domain.ask(session, bitmaps)


def _thresholds(wanted: Iterable[scratch.Wanted]) -> dict[str, int]:
    """Disk -> the size of its scratch image that is worth a warning; those that fit are not there.

    Errors: VIR_ERR_SYSTEM_ERROR when there is not even room to begin.
    """
    thresholds = {}
    for space in scratch.spaces(wanted):
        if space.warning is None or space.threshold is None:
            continue
        logger.warning("%s", space.warning)
        for image in space.images:
            if not image.source.reserve:
                thresholds[image.target] = space.threshold
    return thresholds


def _takes_listener(session: domain.Session, plan: backup.BackupPlan) -> bool:
    """Whether QEMU can be handed the NBD server's socket, and is in our network with it."""
    caps = session.capabilities
    takes = caps.takes_listener_for_tls if plan.credentials else caps.takes_listener
    return takes and session.qemu.passes_files and listener.same_network(session.pid)


def _serves(running: status.Status) -> bool:
    """Whether QEMU is there although nobody listens at its monitor's socket, as where somebody has
    removed that: its process, as far as that is seen, and its NBD server, for longer than it takes
    to end."""
    qemu = running.qemu
    if qemu is None or not runtime.is_seen(qemu) or not runtime.is_alive(qemu):
        return False
    return bool(running.server) and not cleanup.is_abandoned(running.address)


def _is_dead(qemu: runtime.Process | None) -> bool:
    """Whether QEMU is seen to have ended, be that noticed by who passes commands on or not."""
    return qemu is not None and not runtime.is_alive(qemu)
