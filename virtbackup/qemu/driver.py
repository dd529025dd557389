# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU driver over a QMP socket: ``qmp:///absolute/path`` (the patch's hunk of qemu_driver.c).

A QMP socket serves one client at a time, so the driver connects for a call and lets go after it:
between calls the monitor is everybody's. What must outlast a call is in the status file and QEMU.
"""

import contextlib
import logging
import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import libvirt

from virtbackup import errors, hypervisor, runtime
from virtbackup.conf import backup_conf, domain_conf, translate
from virtbackup.qemu import capabilities, domain, job, monitor, naming, qmp, status, watch

logger = logging.getLogger(__name__)

# The public flags (api.py), which a driver may not import: the numbers are the contract.
START_QUIESCE = 1 << 0
START_AUTODESTROY = 1 << 1
STOP_CANCEL = 1 << 0


def open(uri: str, readonly: bool) -> "QmpDriver":
    """Serve ``qmp:///path[?engine=classic|hybrid]``; without an engine, the safest that QEMU has.

    Errors: those of ``parse_uri``; those of ``monitor.Monitor``, unless nobody listens and a status
    file says that a backup ran there.
    """
    return QmpDriver(*parse_uri(uri))


def parse_uri(uri: str) -> tuple[str, capabilities.Engine | None]:
    """The monitor's path and the engine asked for. Errors: VIR_ERR_INVALID_ARG."""
    parts = urllib.parse.urlsplit(uri)
    path = urllib.parse.unquote(parts.path, errors="surrogateescape")
    options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    engine = options.pop("engine", None)
    engines: tuple[capabilities.Engine | None, ...] = (None, "classic", "hybrid")
    bad = bool(parts.netloc or parts.fragment or options) or not _is_absolute(path)
    if bad or engine not in engines:
        raise errors.invalid_arg(
            "virConnectOpen",
            "uri",
            f"'{uri}': expected qmp:///absolute/path/to/qmp.sock[?engine=classic|hybrid]",
        )
    return path, engine


def _is_absolute(path: str) -> bool:
    """Whether PATH is absolute, and can be a file's at all."""
    try:
        return os.fsencode(path).startswith(b"/") and "\0" not in path
    except UnicodeEncodeError:
        return False


class QmpDriver:
    """The driver for the one QEMU (or qemu-storage-daemon) behind a QMP socket."""

    def __init__(
        self,
        path: str,
        engine: capabilities.Engine | None = None,
        file: status.StatusFile | None = None,
    ) -> None:
        """FILE is where the state of PATH's backup is, in place of the user's state directory."""
        self._path = path
        self._engine = engine
        self._watch: watch.Watch | None = None
        self._pid = os.getpid()
        self._trace: TextIO | None = None
        self._identity: domain.Identity | None = None
        self._file = file or status.StatusFile(os.path.realpath(path))
        self._job = job.BackupJob(self._file, self._session)
        self._autodestroy: naming.BackupId | None = None
        try:
            with self._session():
                pass
        except monitor.NotListening:
            if self._file.load() is None:
                raise

    # --- the connection ---

    def close(self) -> None:
        """End the backup that was started to end with us; a failure to is logged. In a process that
        was forked from the one that opened us, nothing: what there is is the other's."""
        if os.getpid() != self._pid:
            return
        self._stop_watching()
        id, self._autodestroy = self._autodestroy, None
        running = self._file.load()
        if id is None or running is None or running.id != id:
            return
        try:
            self._job.stop(id, cancel=True)
        except errors.Error as failure:
            logger.warning("backup=%s could not be ended on close: %s", id, failure)

    def get_type(self) -> str:
        return "QEMU"

    def get_version(self) -> int:
        if self._identity is None:
            raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running")
        major, minor, micro = self._identity.capabilities.version
        return major * 1000000 + minor * 1000 + micro

    def is_alive(self) -> bool:
        try:
            with self._session():
                return True
        except errors.Error:
            return False

    def set_trace(self, trace: TextIO | None) -> None:
        self._trace = trace

    @contextlib.contextmanager
    def _session(self) -> Iterator[domain.Session]:
        """QEMU, for one call. Who it is is asked again only when another process answers."""
        with _qmp_border(), monitor.Monitor(self._path, self._trace) as qemu:
            process = domain.process_of(qemu)
            if self._identity is None or process is None or process != self._identity.process:
                self._identity = domain.identify(qemu)
            yield domain.Session(qemu, self._identity)

    # --- domains ---

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        """The one domain; one whose QEMU is gone is listed while its backup's status file is."""
        try:
            with self._session() as session:
                return [session.ref]
        except monitor.NotListening:
            left = self._file.load()
            return [] if left is None else [hypervisor.DomainRef(left.name, left.uuid, None)]

    def domain_get_state(self, ref: hypervisor.DomainRef) -> tuple[int, int]:
        try:
            with self._session() as session:
                return domain.state(session.qemu, session.capabilities)
        except monitor.NotListening:
            return libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN

    def domain_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return self._definition().format()

    def _definition(self) -> domain_conf.DomainDef:
        with self._session() as session:
            return domain.definition(session.ref, self._job.disks(session))

    # --- backup ---

    def domain_backup_start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> None:
        definition = translate.read(xml, self._definition)
        if flags & START_QUIESCE:
            raise errors.error(
                libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, "QEMU guest agent is not configured"
            )
        owned = bool(flags & START_AUTODESTROY)
        owner = runtime.this_process() if owned else None
        id, images = self._job.start(definition, owner, self._engine)
        if owned:
            self._autodestroy = id
        self._stop_watching()
        try:
            self._watch = watch.Watch(
                images,
                is_over=lambda: self._job.is_over(id),
                guest_trouble=lambda: self._job.guest_trouble(id),
                give_up=lambda reason: self._job.give_up(id, reason),
            )
        except BaseException:
            for image in images:
                os.close(image.fd)
            self._job.stop(id, cancel=True)
            raise

    def _stop_watching(self) -> None:
        watching, self._watch = self._watch, None
        if watching is not None:
            watching.close()

    def domain_backup_stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        # Where we started a backup that is to end with us, that one is meant and no other.
        try:
            reasons = self._job.stop(self._autodestroy, bool(flags & STOP_CANCEL))
        except errors.Error as failure:
            if failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                self._autodestroy = None
            raise
        self._autodestroy = None
        self._stop_watching()
        if reasons and not flags & STOP_CANCEL:
            disks = "; ".join(f"disk '{target}': {why}" for target, why in reasons.items())
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, f"the backup is not good: {disks}")

    def domain_backup_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return self._job.definition(self._autodestroy)

    def domain_backup_get_info(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        return self._job.info(self._autodestroy)

    def domain_backup_cleanup(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        return self._job.cleanup()

    def domain_branch_list(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> Sequence[backup_conf.Branch]:
        return self._job.branches()

    def domain_branch_delete(self, ref: hypervisor.DomainRef, name: str, flags: int) -> None:
        self._job.delete_branch(name)


@contextlib.contextmanager
def _qmp_border() -> Iterator[None]:
    """A reply that no parser knows leaves here as an error for the caller."""
    try:
        yield
    except qmp.ProtocolError as failure:
        raise errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, f"QEMU monitor: {failure}") from failure


_: Callable[[str, bool], hypervisor.BackupDriver] = open
"""mypy's proof that the driver has every hook."""
