# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole backup in one call: start, copy every disk, stop, and only then call it good.

The backup is stopped once all was read: the guest does not have it while the files are synced.

What is not known to be good has no name in the directory: disks are ``NAME.FORMAT.partial`` until
the stop said that the backup was good, and the manifest comes last. Whatever ends a pull before,
SIGINT and SIGTERM included, the backup is cancelled and no file remains.

A disk may go to a block device instead, raw, from the device's start. What a device had is gone
once the copy has begun; the directory tells of it when, and only when, the backup is good.

Backups of a branch follow one another in the same directory, see ``chain``. There the stop has an
effect on the guest, too, the branch moves on; so all files are durable before it, however long that
takes, and from then on the backup is kept whatever happens.
"""

import contextlib
import dataclasses
import datetime
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import libvirt

from virtbackup import api, config, errors
from virtbackup.conf import backup_conf, dialects, domain_conf, redefine
from virtbackup.nbd import checksum, copy
from virtbackup.tools import chain, exports, interrupt, manifest

logger = logging.getLogger(__name__)
left_logger = logging.getLogger(f"{__name__}.left")
"""Of what is told even where nothing is logged, as no error tells it."""
_NOT_WAITED_FOR = (
    "nobody waits for the end of the backup of domain '%s': it ends with the connection, else with"
    " the next start, or backup-cleanup (of libvirt's own engine: virsh domjobabort)"
)

FORMATS: tuple[copy.Format, ...] = ("qcow2", "raw")
PARTIAL = chain.PARTIAL


def pull(
    domain: api.Domain,
    directory: pathlib.Path,
    *,
    xml: str | None = None,
    fmt: copy.Format | None = None,
    quiesce: bool = False,
    progress: copy.Progress | None = None,
    branch: str | None = None,
    kind: backup_conf.DiskType | None = None,
    compress: bool = False,
    bandwidth: int | None = None,
    check: bool = False,
    targets: Mapping[str, pathlib.Path] | None = None,
    named: Callable[[Sequence[str]], None] | None = None,
    warned: Callable[[Sequence[str]], None] | None = None,
) -> manifest.Manifest:
    """Back DOMAIN up into DIRECTORY, which is made where absent; its manifest.

    XML is a ``<domainbackup>``; without one all writable disks are exported on a unix socket in a
    private directory. FMT is of what is no increment; None: qcow2. BRANCH and KIND, where given,
    take the place of what XML says; an ``auto`` disk is pulled whole where DIRECTORY or the guest
    has not what an increment needs, and the manifest says why. COMPRESS: by zstd, qcow2 only.
    BANDWIDTH: bytes to read a second. CHECK: read exports and files once more before the stop.
    TARGETS: disk -> the block device that it goes to, of a backup without a branch. NAMED is given
    the disks' names before PROGRESS is told of the first, in the order of its numbers. WARNED is
    given what may go wrong with a scratch image, a line for each disk.

    Errors: VIR_ERR_OPERATION_INVALID for a file that is in the way, a directory of another guest or
    branch, an increment that would leave a gap, a device that is in use, is the guest's or is one
    already, those of ``BackupDef``, before the guest is touched; then those of ``backupStart``,
    ``copy.copy`` and ``backupStop``. On any error the backup is ended and DIRECTORY has no new
    file; once a device may have been written, the error says so. SIGINT ends as KeyboardInterrupt,
    SIGTERM as SystemExit, both after the same clean-up; in the main thread. Their cause is an error
    that says what became of the backup, where it was too late to undo it or a device was written.
    """
    if fmt not in (None, *FORMATS):
        raise errors.invalid_arg("backupPull", "fmt", f"unknown format '{fmt}'")
    if compress and fmt == "raw":
        raise errors.invalid_arg("backupPull", "compress", "a raw image cannot be compressed")
    if bandwidth is not None and bandwidth <= 0:
        raise errors.invalid_arg("backupPull", "bandwidth", "the bandwidth must be at least 1")
    domain_xml = domain.XMLDesc()
    kept_xml = redefine.on_any_host(
        domain_xml, lambda: domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    )
    with (
        interrupt.deferred() as cancel,
        contextlib.ExitStack() as undo,
        contextlib.ExitStack() as files,
    ):
        wanted = _wanted(_private_document(undo) if xml is None else xml, domain_xml, branch, kind)
        devices = _devices(targets, wanted, domain_xml)
        exports.tls(wanted.address)  # what is missing for it is known before the guest is touched
        _make(directory, files)
        undo.enter_context(chain.locked(directory))
        plan = _plan(domain, directory, wanted, fmt, devices)
        _claim(directory, plan, files)
        cancel.check()
        written = undo.enter_context(_telling_what_devices_have())
        with _started(domain, directory, plan.definition.format(), quiesce, cancel) as running:
            info = running.info  # now, when whom it is asked of was just there
            if warned is not None:
                warned(info.warnings)
            if plan.number is not None:
                plan = plan.as_started(info)
            live = backup_conf.BackupDef.parse(running.xml)
            jobs = _jobs(live, directory, plan, compress)
            cancel.check()
            written.update(devices)
            if named is not None:
                named(list(jobs))
            stop = functools.partial(running.stop, cancel)
            # Where neither the files nor a second look need the backup, it does not last for them.
            early = plan.number is None and not check
            results = copy.copy(
                list(jobs.values()), progress=progress, cancel=cancel, bandwidth=bandwidth,
                when_read=stop if early else None, when_failed=running.end,
            )  # fmt: skip
            if check:
                _check(jobs, results, cancel, bandwidth)
            of = manifest.Domain(domain.name(), domain.UUIDString())
            told = [_describe(directory, disk, result, cancel)
                    for disk, result in zip(plan.disks, results, strict=True)]  # fmt: skip
            made = _manifest(of, plan, running, told, kept_xml)
            _write_manifest(directory, plan, made)
            if not early:
                stop()
        if plan.number is None:
            cancel.check()
            _check_absent(plan.paths(directory))  # once more: it took a while
            files.callback(_remove, plan.paths(directory))
        else:
            files.pop_all()  # the branch has moved on: it is kept, if not now by the next pull
        chain.finish(directory, made)
        files.pop_all()
        interrupt.check_late(cancel, f"the backup is whole, and kept in {directory}")
    return made


# --- before ---------------------------------------------------------------------------------------


def _private_document(undo: contextlib.ExitStack) -> str:
    """A document for all disks and a socket that only this user reaches; UNDO removes it."""
    socket = config.private_directory(undo) / "nbd.sock"
    return backup_conf.BackupDef(backup_conf.UnixAddress(str(socket))).format()


@dataclasses.dataclass(frozen=True)
class _Disk:
    """One disk of the backup that is going to be."""

    name: str
    file: str
    """As ``manifest.Disk`` has it."""
    format: copy.Format
    backing: manifest.Disk | None = None
    """What an increment goes over; None for a whole disk."""
    since: str | None = None
    """The id of the backup that an increment follows."""
    reason: str | None = None
    type: str = "file"
    """Or ``block``, which has no other name before it is good."""

    def path(self, directory: pathlib.Path) -> pathlib.Path:
        """Where it goes, as long as it is not known to be good."""
        return directory / (self.file if self.type == "block" else self.file + PARTIAL)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is going to be pulled, and where to."""

    definition: backup_conf.BackupDef
    disks: tuple[_Disk, ...]
    number: int | None = None
    """Of a backup in a chain."""

    @property
    def manifest_file(self) -> str:
        return manifest.FILE if self.number is None else chain.manifest_file(self.number)

    def paths(self, directory: pathlib.Path, suffix: str = "") -> list[pathlib.Path]:
        """Every file of the backup, the manifest first, its name followed by SUFFIX; no devices."""
        files = [self.manifest_file, *(disk.file for disk in self.disks if disk.type == "file")]
        return [directory / (file + suffix) for file in files]

    def as_started(self, info: backup_conf.BackupInfo) -> "_Plan":
        """The same for the backup that runs: an increment that did not come to be one is whole.

        Errors: VIR_ERR_OPERATION_INVALID where the guest's changes are since another backup than
        the last one here: somebody was faster.
        """
        told = {disk.name: disk for disk in info.disks}
        disks = []
        for disk in self.disks:
            since = told[disk.name].since if disk.name in told else None
            if disk.since is not None and since is None:
                reason = told[disk.name].type_reason
                disk = dataclasses.replace(disk, backing=None, since=None, reason=reason)
            if (since.id if since else None) != disk.since:
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_INVALID,
                    f"disk '{disk.name}': another backup of branch '{self.definition.branch}' was"
                    " made just now",
                )
            disks.append(disk)
        return dataclasses.replace(self, disks=tuple(disks))


def _wanted(
    xml: str, domain_xml: str, branch: str | None, kind: backup_conf.DiskType | None
) -> backup_conf.BackupDef:
    """The backup that is asked for, aligned. Errors: those of BackupDef."""
    domain = domain_conf.DomainDef.parse(domain_xml)
    given = dialects.read(xml, lambda: domain)
    given = dataclasses.replace(given, branch=branch or given.branch)
    if given.advance is False or given.fork is not None:
        raise errors.error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            f"branch '{given.branch}' has to advance with each pull, as the next one in the"
            " directory follows this one",
        )
    # What BRANCH may be called, the parser says.
    given = backup_conf.BackupDef.parse(given.format())
    aligned = given.align_disks(domain)
    disks = tuple(
        disk.of_type(kind) if kind is not None and disk.present else disk for disk in aligned.disks
    )
    for disk in disks:
        if disk.present and (problem := manifest.file_name_problem(disk.name)):
            raise errors.error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, f"disk {problem}")
    return dataclasses.replace(aligned, disks=disks)


def _devices(
    targets: Mapping[str, pathlib.Path] | None, wanted: backup_conf.BackupDef, domain_xml: str
) -> Mapping[str, pathlib.Path]:
    """As ``devices.usable``."""
    if not targets:
        return {}
    from virtbackup.tools import devices  # few need it

    return devices.usable(targets, wanted, domain_xml)


def _invalid(text: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_OPERATION_INVALID, text)


def _plan(
    domain: api.Domain,
    directory: pathlib.Path,
    wanted: backup_conf.BackupDef,
    fmt: copy.Format | None,
    devices: Mapping[str, pathlib.Path],
) -> _Plan:
    """What is to be pulled into DIRECTORY, which is locked."""
    if wanted.branch is None:
        return _plan_alone(directory, wanted, fmt or "qcow2", devices)
    return _plan_next(domain, directory, wanted, wanted.branch, fmt)


def _plan_alone(
    directory: pathlib.Path,
    wanted: backup_conf.BackupDef,
    fmt: copy.Format,
    devices: Mapping[str, pathlib.Path],
) -> _Plan:
    """A backup without a branch."""
    chain.check_none(directory)
    for disk in wanted.disks:
        if disk.present and disk.type != "full":
            raise errors.error(
                libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
                f"disk '{disk.name}': backup type '{disk.type}' needs a branch",
            )
    disks = (
        _Disk(disk.name, str(devices[disk.name]), "raw", type="block") if disk.name in devices else
        _Disk(disk.name, f"{disk.name}.{fmt}", fmt)
        for disk in wanted.disks if disk.present
    )  # fmt: skip
    return _Plan(wanted, tuple(disks))


def _plan_next(
    domain: api.Domain,
    directory: pathlib.Path,
    wanted: backup_conf.BackupDef,
    branch: str,
    fmt: copy.Format | None,
) -> _Plan:
    """The next backup of a BRANCH."""
    known = chain.read(directory, domain, branch)
    found = chain.lines(domain, branch)
    if chain.recover(directory, found, known):
        known = chain.read(directory, domain, branch)
    gaps = {
        disk.name: known.gap(disk.name, found.get(disk.name))
        for disk in wanted.disks
        if disk.present and disk.type != "full"
    }
    _check_gaps(wanted, gaps)
    disks = []
    definition = []
    for disk in wanted.disks:
        if disk.present:
            disks.append(_next_disk(disk, known, gaps.get(disk.name, ""), fmt))
            if disks[-1].backing is None:  # else it is as asked for: the guest has a word in it
                disk = disk.of_type("full")
        definition.append(disk)
    return _Plan(
        dataclasses.replace(wanted, disks=tuple(definition)), tuple(disks), known.next_number
    )


def _check_gaps(wanted: backup_conf.BackupDef, gaps: Mapping[str, str | None]) -> None:
    reasons = [
        f"disk '{disk.name}': {gaps[disk.name]}"
        for disk in wanted.disks
        if disk.type == "incremental" and gaps.get(disk.name) is not None
    ]
    if reasons:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID,
            f"no increment of branch '{wanted.branch}' can follow: {'; '.join(reasons)}",
        )


def _next_disk(
    disk: backup_conf.BackupDiskDef, known: chain.Chain, gap: str | None, fmt: copy.Format | None
) -> _Disk:
    """GAP is why it cannot be an increment, empty where it is not to be one."""
    last = known.last(disk.name)
    if gap is not None or last is None:
        whole = fmt or "qcow2"
        file = chain.disk_file(disk.name, known.next_number, whole)
        return _Disk(disk.name, file, whole, reason=gap or None)
    if fmt not in (None, "qcow2"):
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID,
            f"disk '{disk.name}': an increment is qcow2, not {fmt}",
        )
    file = chain.disk_file(disk.name, known.next_number, "qcow2")
    return _Disk(disk.name, file, "qcow2", backing=last[1], since=last[0].id)


def _make(directory: pathlib.Path, undo: contextlib.ExitStack) -> None:
    """Make DIRECTORY where it is absent; UNDO removes it. Errors: it cannot be."""
    try:
        chain.make(directory, undo)
    except FileExistsError as failure:
        text = f"{failure.filename} exists already and is no directory"
        raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, text) from failure
    except OSError as failure:
        raise errors.system_error(failure, f"cannot make a backup in {directory}") from failure


def _claim(directory: pathlib.Path, plan: _Plan, undo: contextlib.ExitStack) -> None:
    """Make the file of the manifest in DIRECTORY, which has none of the backup's files; UNDO
    removes all of them that are not known to be good. Errors: one exists, by its path."""
    partial = plan.paths(directory, PARTIAL)
    if plan.number is not None:  # ``manifest.json``, which it has beside its own
        partial.append(directory / (manifest.FILE + PARTIAL))
    _check_absent(partial, _LEFT)
    _check_absent(plan.paths(directory))
    try:
        partial[0].touch(exist_ok=False)
    except FileExistsError as failure:
        raise _invalid(f"{partial[0]} exists already") from failure
    except OSError as failure:
        _remove(partial[:1])  # it may be there, as where only its close failed
        raise errors.system_error(failure, f"cannot make a backup in {directory}") from failure
    undo.callback(_remove, partial)


_LEFT = ", as what a killed pull leaves"
"""Of a partial file: nobody else pulls into a directory that we have locked."""


def _check_absent(paths: Iterable[pathlib.Path], note: str = "") -> None:
    """Errors: VIR_ERR_OPERATION_INVALID for the first of PATHS that exists, and the NOTE."""
    for path in paths:
        if os.path.lexists(path):
            raise _invalid(f"{path} exists already{note}")


# --- during ---------------------------------------------------------------------------------------


_VERDICTS = (libvirt.VIR_ERR_OPERATION_FAILED, libvirt.VIR_ERR_NO_DOMAIN_BACKUP)
"""What a stop says of a backup that has ended; of another it is refused, and may be for long."""


class _Running:
    """A backup from its start on, of DOMAIN for DIRECTORY."""

    def __init__(self, domain: api.Domain, directory: pathlib.Path, cancel: copy.Cancel) -> None:
        self._domain = domain
        self._directory = directory
        self._cancel = cancel
        self._is_over = False
        """Or is to be."""
        self.reasons: list[str] = []
        """Why it is not good, disk by disk, where that ended it."""
        self.is_lost = False
        """Nothing can be said of it any more, by the connection that began it."""

    @functools.cached_property
    def xml(self) -> str:
        """Its document, before the stop."""
        return self._domain.backupGetXMLDesc()

    @functools.cached_property
    def info(self) -> backup_conf.BackupInfo:
        """What was told of it first, before the stop."""
        return self._domain.backupGetInfo()

    def stop(self, cancel: copy.Cancel) -> None:
        """As ``_stop``, unless cancelled by now."""
        cancel.check()
        try:
            _stop(self._domain, self._directory)
        except errors.Error as failure:
            self._is_over = failure.get_error_code() in _VERDICTS
            raise
        self._is_over = True

    def end(self, failure: BaseException) -> None:
        """Cancel it, as FAILURE ended the pull; not one whose verdict was told. Another signal ends
        the wait for that where it takes long."""
        if self._is_over:
            return
        self._is_over = True
        try:
            with interrupt.hurried(self._cancel):
                # Asked before the cancel forgets them: a lost backup shows as a lost connection.
                reasons = _reasons(self._domain, failure)
                give_up(self._domain)
        except (KeyboardInterrupt, SystemExit):
            left_logger.warning(_NOT_WAITED_FOR, self._domain.name())
            return
        self.reasons = reasons or []
        self.is_lost = reasons is None and not self._domain.connect().isAlive()


@contextlib.contextmanager
def _started(
    domain: api.Domain, directory: pathlib.Path, xml: str, quiesce: bool, cancel: copy.Cancel
) -> Iterator[_Running]:
    """A running backup; cancelled when the block fails before its stop."""
    flags = api.VIR_DOMAIN_BACKUP_START_AUTODESTROY
    if quiesce:
        flags |= api.VIR_DOMAIN_BACKUP_START_QUIESCE
    domain.backupStart(xml, flags)
    # Signals are deferred, so nothing comes between the start and this.
    running = _Running(domain, directory, cancel)
    try:
        yield running
    except BaseException as failure:
        running.end(failure)
        if running.reasons:
            text = f"the backup is not good: {'; '.join(running.reasons)}"
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, text) from failure
        if running.is_lost:
            assert isinstance(failure, errors.Error)
            raise _lost(failure) from failure
        raise


def _lost(failure: errors.Error) -> errors.Error:
    """FAILURE of a backup that ended with its connection, as when a daemon is stopped: the exports
    end just before or after that."""
    code, domain = failure.get_error_code(), failure.get_error_domain()
    detail = failure.get_str2() or failure.get_error_message()
    text = f"the connection that began the backup is lost: {detail}"
    return errors.error(code, text, domain=domain)


@contextlib.contextmanager
def _telling_what_devices_have() -> Iterator[dict[str, pathlib.Path]]:
    """Has an error of the block say that what is on the devices is no backup: on those that were
    put into the dictionary, as they were to be written from then on."""
    written: dict[str, pathlib.Path] = {}
    try:
        yield written
    except errors.Error as failure:
        if not written:
            raise
        code, domain = failure.get_error_code(), failure.get_error_domain()
        what = f"(what {' and '.join(map(str, written.values()))} has now is not a backup)"
        if (detail := failure.get_str2()) is None:
            text = f"{failure.get_error_message()} {what}"
            raise errors.Error(code, text, domain=domain) from failure
        disk = next((f"disk '{name}': " for name, path in written.items()
                     if str(path) in detail and f"'{name}'" not in detail), "")  # fmt: skip
        raise errors.error(code, f"{disk}{detail} {what}", domain=domain) from failure


def _reasons(domain: api.Domain, failure: BaseException) -> list[str] | None:
    """Why the backup that FAILURE ended is not good, disk by disk; none where that is not why, and
    None where nobody answers that at once."""
    if not isinstance(failure, errors.Error):
        return []
    if failure.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED:
        return []
    try:
        disks = domain.backupGetInfo().disks
    except libvirt.libvirtError as unknown:
        logger.warning("event=info-failed domain=%s error=%s", domain.name(), unknown)
        return [] if unknown.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT else None
    return [f"disk '{disk.name}': {disk.reason}" for disk in disks if disk.reason is not None]


def give_up(domain: api.Domain) -> None:
    """Cancel a backup. That it cannot be is logged: there is an error already that is told."""
    try:
        domain.backupStop(api.VIR_DOMAIN_BACKUP_STOP_CANCEL)
    except libvirt.libvirtError as failure:
        if failure.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT:  # it runs on
            text = "the backup of domain '%s' could not be ended: %s"
            left_logger.warning(text, domain.name(), failure)
            return
        logger.warning("event=cancel-failed domain=%s error=%s", domain.name(), failure)


def _stop(domain: api.Domain, directory: pathlib.Path) -> None:
    """Ask for the verdict. Errors: as backupStop, saying that nothing was kept."""
    try:
        domain.backupStop()
    except libvirt.libvirtError as failure:
        raise errors.Error(
            failure.get_error_code(),
            f"{failure.get_error_message()} (no backup was kept in {directory})",
            domain=failure.get_error_domain(),
        ) from failure


def _jobs(
    live: backup_conf.BackupDef,
    directory: pathlib.Path,
    plan: _Plan,
    compress: bool,
) -> dict[str, copy.Job]:
    """What to copy, by the disk's name."""
    found = exports.of(live)
    return {
        disk.name: copy.Job(
            found[disk.name],
            disk.path(directory),
            disk.format,
            dirty=exports.changes(live, disk.name) if disk.backing else None,
            backing=_backing(disk),
            compression="zstd" if compress and disk.format == "qcow2" else None,
        )
        for disk in plan.disks
    }


def _check(
    jobs: Mapping[str, copy.Job],
    results: Sequence[copy.Result],
    cancel: copy.Cancel,
    bandwidth: int | None,
) -> None:
    """Read every export and every file once more. Errors: VIR_ERR_OPERATION_FAILED where one is not
    what was read at first, by disk; those of ``copy.copy``."""
    again = [
        dataclasses.replace(job, path=None, format="raw", backing=None, compression=None)
        for job in jobs.values()
    ]
    read = copy.copy(again, cancel=cancel, bandwidth=bandwidth)
    for (name, job), first, second in zip(jobs.items(), results, read, strict=True):
        assert job.path is not None
        if second.checksum != first.checksum:
            raise _differs(name, "its export does not read as it did before")
        if job.path.is_block_device():
            stored = _checksum_of_device(job.path, first.size, cancel)
        elif job.dirty is None:
            stored = copy.checksum_of_file(job.path, job.format, first.size, cancel=cancel)
        else:
            stored = copy.checksum_of_increment(job.path, first.size, cancel=cancel)
        if stored != first.checksum:
            raise _differs(name, f"'{job.path}' has not what was written")


def _checksum_of_device(path: pathlib.Path, size: int, cancel: copy.Cancel) -> str:
    from virtbackup.nbd import image  # few need it

    try:
        with image.File(path) as file:
            return image.read_raw(file, size, cancel=cancel).checksum
    except OSError as failure:
        raise errors.system_error(failure, f"cannot read {path}") from failure


def _differs(name: str, what: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_OPERATION_FAILED, f"disk '{name}': {what}")


def _backing(disk: _Disk) -> copy.Backing | None:
    if disk.backing is None:
        return None
    # What has a colon in its first part is taken for a protocol.
    file = f"./{disk.backing.file}" if ":" in disk.backing.file else disk.backing.file
    return copy.Backing(file, cast("copy.Format", disk.backing.format))


# --- after ----------------------------------------------------------------------------------------


def _manifest(
    domain: manifest.Domain,
    plan: _Plan,
    running: _Running,
    disks: Iterable[manifest.Disk],
    domain_xml: str,
) -> manifest.Manifest:
    info = running.info
    started = datetime.datetime.fromtimestamp(info.started, datetime.timezone.utc)
    return manifest.Manifest(
        version=manifest.VERSION,
        domain=domain,
        kind="full" if all(disk.backing is None for disk in plan.disks) else "incremental",
        time=started.isoformat(),
        disks=tuple(disks),
        backup_xml=running.xml,
        domain_xml=domain_xml,
        id=info.id,
        branch=plan.definition.branch,
        number=plan.number,
    )


def _describe(
    directory: pathlib.Path, disk: _Disk, result: copy.Result, cancel: copy.Cancel
) -> manifest.Disk:
    """What is told of a file that is still called partial. Errors: it cannot be read, or is not as
    a copy makes it; VIR_ERR_OPERATION_ABORTED when cancelled."""
    path, is_qcow2 = disk.path(directory), disk.format == "qcow2"
    return manifest.Disk(
        name=disk.name,
        file=disk.file,
        format=disk.format,
        size=result.size,
        checksum=manifest.Checksum(result.algorithm, checksum.BLOCK, result.checksum),
        stored=result.stored,
        kind="incremental" if disk.backing else "full",
        backing=disk.backing.file if disk.backing else None,
        since=disk.since,
        reason=disk.reason,
        tables=manifest.tables_of(path, result.size, cancel) if is_qcow2 else None,
        type=disk.type,
        length=manifest.length_of(path) if is_qcow2 else None,
    )


def _write_manifest(directory: pathlib.Path, plan: _Plan, made: manifest.Manifest) -> None:
    """Under its partial name, and that of ``manifest.json``; durable, with all files' names, when
    it returns: nothing has to have room after the stop."""
    with chain.naming("cannot write to", directory):
        chain.write(directory, plan.manifest_file, made)
        if plan.number is not None:
            chain.write(directory, manifest.FILE, made)


def _remove(paths: Iterable[pathlib.Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as failure:
            logger.warning("event=remove-failed path=%s error=%s", path, failure.strerror)
