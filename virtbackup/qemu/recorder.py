# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recording a real QEMU: what it says of itself, and one whole backup of its disks.

What is recorded is the driver's own traffic: the backup is started, looked at and stopped by the
code that serves every other.
"""

import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Iterator
from typing import Any, TextIO

import libvirt

from virtbackup import config, errors, runtime
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    capabilities,
    dialect,
    domain,
    ending,
    job,
    monitor,
    monitor_json,
    naming,
    normal,
    qmp,
    recording,
    scratch,
    status,
    watch,
)

logger = logging.getLogger(__name__)


MAX_TRACE = 64 << 20
"""Characters of a trace that are recorded; one schema has 300 thousand."""


class _Tee(io.StringIO):
    """A trace that is kept, and written on where there is another."""

    def __init__(self, other: TextIO | None) -> None:
        super().__init__()
        self._other = other
        self.is_whole = True

    def write(self, text: str) -> int:
        if self._other is not None:
            try:
                self._other.write(text)
                self._other.flush()
            except (OSError, ValueError) as failure:
                # As a monitor has it: not the recording's business.
                logger.warning("trace ends: %s", failure)
                self._other = None
        self.is_whole = self.is_whole and self.tell() + len(text) <= MAX_TRACE
        return super().write(text) if self.is_whole else len(text)

    def recording(self) -> recording.Recording:
        """What was traced. Errors: ValueError."""
        if not self.is_whole:
            raise ValueError("QEMU says too much to be recorded")
        return recording.parse_trace(self.getvalue())


class Recorder:
    """Records the QEMU behind one QMP socket."""

    def __init__(
        self,
        path: str,
        engine: capabilities.Engine | None = None,
        trace: TextIO | None = None,
    ) -> None:
        """ENGINE None is the safest that QEMU has. TRACE gets every line with its time, too."""
        self._path = path
        self._engine = engine
        self._other = trace
        self._trace: _Tee | None = None
        self._identity: domain.Identity | None = None
        self._job = job.BackupJob(status.StatusFile(os.path.realpath(path)), self._session)

    def record(self) -> recording.Recording:
        """Everything, in its normal form. The guest is as before, also when this fails, unless the
        stop is refused: the backup runs on then, as the error says.

        Errors: those of a start; VIR_ERR_OPERATION_FAILED when the backup was not good.
        """
        self._job.cleanup()  # what a crash left would be recorded, too
        self._trace = _Tee(self._other)
        with self._session() as session:
            _ask_everything(session)
        with contextlib.ExitStack() as undo:
            sockets = config.private_directory(undo)
            self._back_up(backup_conf.BackupDef(backup_conf.UnixAddress(f"{sockets}/nbd.sock")))
        ours = f"/{naming.PREFIX}"
        prefixes = {
            f"{sockets}/": "/sockets/",
            f"{scratch.default_directory()}{ours}": f"/scratch{ours}",
        }
        with _border():
            return normal.normalise(self._trace.recording(), prefixes)

    def _back_up(self, definition: backup_conf.BackupDef) -> None:
        id = job.new_id()
        images: list[watch.Image] = []
        try:
            self._job.start(id, images, definition, runtime.this_process(), self._engine)
            watch.close_all(images)
            self._job.info(id)
        except BaseException:
            watch.close_all(images)
            if not self._job.is_over(id):
                self._end(id)
            raise
        if reasons := self._job.stop(id)[1]:
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, ending.reason_of(reasons))

    def _end(self, id: naming.BackupId) -> None:
        """After a failure, which is the one to be told."""
        try:
            self._job.stop(id)
        except errors.Error as failure:
            logger.warning("backup=%s could not be ended: %s", id, failure)

    @contextlib.contextmanager
    def _session(self) -> Iterator[domain.Session]:
        with _border(), monitor.SocketMonitor(self._path, self._trace) as qemu:
            if self._identity is None:
                self._identity = domain.identify(qemu)
            yield domain.Session(qemu, self._identity)


@contextlib.contextmanager
def _border() -> Iterator[None]:
    """What no parser knows, or is nested too deeply, leaves here as an error for the caller."""
    try:
        yield
    except (qmp.ProtocolError, ValueError, RecursionError) as failure:
        raise errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, f"QEMU monitor: {failure}") from failure


def _ask_everything(session: domain.Session) -> None:
    """All that QEMU tells of itself and its disks; a question it does not answer is no failure."""
    caps = session.capabilities

    def ask(command: monitor_json.Command) -> Any:
        if command.execute not in caps.commands:
            return None
        try:
            return session.qemu.execute(command)
        except monitor_json.CommandFailed as failure:
            logger.info("command=%s failed: %s", command.execute, failure.desc)
            return None

    ask(monitor_json.Command("query-version"))
    ask(monitor_json.query_commands())
    schema = ask(monitor_json.query_qmp_schema())
    ask(monitor_json.query_name())
    ask(monitor_json.query_uuid())
    ask(monitor_json.query_status())
    ask(monitor_json.query_block())
    spoken = dialect.Dialect(caps)
    if not caps.jobs_against_named_nodes(
        spoken.parse_jobs(ask(spoken.query_jobs()) or []).values()
    ):
        ask(_query_named_block_nodes(schema))
    ask(monitor_json.query_block_exports())
    ask(monitor_json.query_block_graph())
    ask(monitor_json.query_fdsets())
    ask(monitor_json.qom_list("/objects"))


def _query_named_block_nodes(schema: Any) -> monitor_json.Command:
    """Without the images below each image, where QEMU can leave them out (from 5.0 on)."""
    plain = monitor_json.query_named_block_nodes()
    try:
        entities = {entity["name"]: entity for entity in schema or ()}
        arguments = entities.get(entities.get(plain.execute, {}).get("arg-type"), {})
        flat = any(member["name"] == "flat" for member in arguments.get("members", ()))
    except (KeyError, TypeError, AttributeError) as failure:
        raise qmp.ProtocolError(f"unexpected schema: {failure!r:.200}") from failure
    return dataclasses.replace(plain, arguments={"flat": True}) if flat else plain
