# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole backup in one call: start, copy every disk, stop, and only then call it good.

What is not known to be good has no name in the directory: disks are ``NAME.FORMAT.partial`` until
the stop said that the backup was good, and the manifest comes last. Whatever ends a pull before,
SIGINT and SIGTERM included, the backup is cancelled and no file remains.
"""

import contextlib
import datetime
import errno
import logging
import os
import pathlib
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import libvirt

from virtbackup import api, errors, runtime
from virtbackup.conf import backup_conf, domain_conf
from virtbackup.nbd import checksum, connection, copy
from virtbackup.tools import manifest

logger = logging.getLogger(__name__)

FORMATS: tuple[copy.Format, ...] = ("qcow2", "raw")
PARTIAL = ".partial"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""An address to listen on -> the one to connect to."""


def pull(
    domain: api.Domain,
    directory: pathlib.Path,
    *,
    xml: str | None = None,
    fmt: copy.Format = "qcow2",
    quiesce: bool = False,
    progress: copy.Progress | None = None,
) -> manifest.Manifest:
    """Back DOMAIN up into DIRECTORY, which is made where absent; its manifest.

    XML is a ``<domainbackup>``; without one all writable disks are exported on a unix socket in a
    private directory. Errors: VIR_ERR_OPERATION_INVALID for a file that is in the way, those of
    ``BackupDef``, before the guest is touched; then those of ``backupStart``, ``copy.copy`` and
    ``backupStop``. On any error the backup is ended and DIRECTORY has no new file. SIGINT ends as
    KeyboardInterrupt, SIGTERM as SystemExit, both after the same clean-up; in the main thread.
    """
    if fmt not in FORMATS:
        raise errors.invalid_arg("backupPull", "fmt", f"unknown format '{fmt}'")
    domain_xml = domain.XMLDesc()
    with (
        _deferred_signals() as cancel,
        contextlib.ExitStack() as undo,
        contextlib.ExitStack() as files,
    ):
        if xml is None:
            xml = _private_document(undo)
        names = _names(xml, domain_xml)
        _claim(directory, _files(directory, names, fmt), files)
        cancel.check()
        with _started(domain, xml, quiesce) as live_xml:
            started = domain.backupGetInfo().started
            jobs = _jobs(backup_conf.BackupDef.parse(live_xml), directory, fmt)
            cancel.check()
            results = copy.copy(list(jobs.values()), progress=progress, cancel=cancel)
            cancel.check()
        _stop(domain, directory)
        cancel.check()
        made = manifest.Manifest(
            version=manifest.VERSION,
            domain=manifest.Domain(domain.name(), domain.UUIDString()),
            kind="full",
            time=datetime.datetime.fromtimestamp(started, datetime.timezone.utc).isoformat(),
            disks=tuple(_describe(*pair, fmt) for pair in zip(jobs, results, strict=True)),
            backup_xml=live_xml,
            domain_xml=domain_xml,
        )
        _name_good(directory, made)
        files.pop_all()
    return made


# --- before ---------------------------------------------------------------------------------------


def _private_document(undo: contextlib.ExitStack) -> str:
    """A document for all disks and a socket that only this user reaches; UNDO removes it."""
    try:
        directory = undo.enter_context(runtime.private_directory())
    except OSError as failure:
        place = runtime.directory()
        raise errors.system_error(failure, f"cannot make a directory in {place}") from failure
    socket = directory / "nbd.sock"
    return backup_conf.BackupDef(backup_conf.UnixAddress(str(socket))).format()


def _names(xml: str, domain_xml: str) -> list[str]:
    """The disks that a backup by XML is going to have. Errors: those of BackupDef."""
    wanted = backup_conf.BackupDef.parse(xml)
    aligned = wanted.align_disks(domain_conf.DomainDef.parse(domain_xml))
    names = [disk.name for disk in aligned.disks if disk.present]
    for name in names:
        if problem := manifest.file_name_problem(name):
            raise errors.error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, f"disk {problem}")
    return names


def _files(directory: pathlib.Path, names: Iterable[str], fmt: str) -> list[pathlib.Path]:
    """Every file of a backup, under its partial name and its final one."""
    files = [manifest.FILE, *(f"{name}.{fmt}" for name in names)]
    return [directory / (file + suffix) for file in files for suffix in (PARTIAL, "")]


def _claim(
    directory: pathlib.Path, paths: Sequence[pathlib.Path], undo: contextlib.ExitStack
) -> None:
    """Make DIRECTORY, and in it the first of PATHS, so that no other pull goes there; UNDO removes
    all PATHS. Errors: one of them exists, by its path."""
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            undo.callback(_remove_empty, directory)
        for path in paths:
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "", os.fspath(path))
        paths[0].touch(exist_ok=False)
    except FileExistsError as failure:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID, f"{failure.filename} exists already"
        ) from failure
    except OSError as failure:
        raise errors.system_error(failure, f"cannot make a backup in {directory}") from failure
    undo.callback(_remove, paths)


def _remove_empty(directory: pathlib.Path) -> None:
    """Unless somebody has put something there."""
    with contextlib.suppress(OSError):
        directory.rmdir()


# --- during ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _started(domain: api.Domain, xml: str, quiesce: bool) -> Iterator[str]:
    """A running backup and its live document; cancelled when the block fails."""
    flags = api.VIR_DOMAIN_BACKUP_START_AUTODESTROY
    if quiesce:
        flags |= api.VIR_DOMAIN_BACKUP_START_QUIESCE
    domain.backupStart(xml, flags)
    # Signals are deferred, so nothing comes between the start and this.
    try:
        yield domain.backupGetXMLDesc()
    except BaseException as failure:
        # Asked before the cancel forgets them: a lost backup shows here as a lost connection.
        reasons = _reasons(domain, failure)
        _cancel(domain)
        if reasons:
            text = f"the backup is not good: {'; '.join(reasons)}"
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, text) from failure
        raise


def _reasons(domain: api.Domain, failure: BaseException) -> list[str]:
    """Why the backup that FAILURE ended is not good, disk by disk; none where that is not why."""
    if not isinstance(failure, errors.Error):
        return []
    if failure.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED:
        return []
    try:
        disks = domain.backupGetInfo().disks
    except libvirt.libvirtError as unknown:
        logger.warning("event=info-failed domain=%s error=%s", domain.name(), unknown)
        return []
    return [f"disk '{disk.name}': {disk.reason}" for disk in disks if disk.reason is not None]


def _cancel(domain: api.Domain) -> None:
    try:
        domain.backupStop(api.VIR_DOMAIN_BACKUP_STOP_CANCEL)
    except libvirt.libvirtError as failure:
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
    live: backup_conf.BackupDef, directory: pathlib.Path, fmt: copy.Format
) -> dict[str, copy.Job]:
    """What to copy, by the disk's name."""
    server = _server(live.address)
    return {
        disk.name: copy.Job(
            connection.Export(server, disk.exportname or disk.name),
            directory / f"{disk.name}.{fmt}{PARTIAL}",
            fmt,
        )
        for disk in live.disks
        if disk.present
    }


def _server(address: backup_conf.Address) -> str | tuple[str, int]:
    if isinstance(address, backup_conf.UnixAddress):
        return address.path
    return _ANY_HOST.get(address.host, address.host), address.port


# --- after ----------------------------------------------------------------------------------------


def _describe(name: str, result: copy.Result, fmt: str) -> manifest.Disk:
    return manifest.Disk(
        name=name,
        file=f"{name}.{fmt}",
        format=fmt,
        size=result.size,
        checksum=manifest.Checksum(checksum.ALGORITHM, checksum.BLOCK, result.checksum),
        stored=result.stored,
    )


def _name_good(directory: pathlib.Path, made: manifest.Manifest) -> None:
    """Give the files of a good backup their names, the manifest last; durable when it returns."""
    files = [*(disk.file for disk in made.disks), manifest.FILE]
    try:
        with (directory / (manifest.FILE + PARTIAL)).open("w", encoding="utf-8") as file:
            file.write(made.to_json())
            file.flush()
            os.fsync(file.fileno())
        for name in files:
            (directory / (name + PARTIAL)).rename(directory / name)
        for path in (directory, directory.absolute().parent):
            _sync_directory(path)
    except OSError as failure:
        raise errors.system_error(failure, f"cannot finish the backup in {directory}") from failure


def _sync_directory(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(paths: Iterable[pathlib.Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as failure:
            logger.warning("event=remove-failed path=%s error=%s", path, failure.strerror)


# --- signals -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _deferred_signals() -> Iterator[copy.Cancel]:
    """SIGINT and SIGTERM set the cancel, however many come, and take effect when the block ended.

    So no exception comes out of nowhere between a step and the note of it, nor into a clean-up.
    Ignored signals stay ignored; outside the main thread nothing can be caught.
    """
    cancel = copy.Cancel()
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        cancel.set()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield cancel
    except errors.Error as failure:
        if caught:
            raise _exception_of(caught[0]) from failure
        raise
    finally:
        # All at once: a signal in the middle waits until each has its own handler again.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, before)
        for number, handler in before.items():
            signal.signal(number, handler)
        cancel.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if caught:
        raise _exception_of(caught[0])


def _exception_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
