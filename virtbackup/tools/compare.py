# SPDX-License-Identifier: LGPL-2.1-or-later
"""One pull backup by two engines, ours and libvirt's own, on the same guest: what each costs.

Each engine starts the backup, all of it is read, and it is stopped, in turn, several times. Told is
how long a start and a stop took, what the guest's own writes took meanwhile, what was said to QEMU,
and whether both showed the same bytes; where the guest wrote in between, they need not.
"""

import dataclasses
import io
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import libvirt

from virtbackup import api, errors
from virtbackup.conf import backup_conf, dialects, domain_conf
from virtbackup.nbd import copy
from virtbackup.tools import exports, interrupt, pull

ENGINES = ("virtbackup", "libvirt")


@dataclasses.dataclass(frozen=True)
class Writes:
    """What the guest has written to its disks, all together, since it began."""

    count: int
    nanoseconds: int

    def since(self, before: "Writes") -> "Writes":
        return Writes(self.count - before.count, self.nanoseconds - before.nanoseconds)

    @property
    def latency(self) -> float | None:
        """Seconds that one write took on average; None where there was none."""
        return self.nanoseconds / self.count / 1e9 if self.count else None


@dataclasses.dataclass(frozen=True)
class Run:
    """One backup. Times are seconds."""

    start: float
    """From the call until it returned."""
    read: float
    stop: float
    before: Writes
    """As it began."""
    during: Writes
    checksums: Mapping[str, str]
    """Disk -> of what its export showed."""
    commands: int | None
    """Said to QEMU; None where nobody tells."""
    bytes_said: int | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several runs of each engine, of one guest."""

    runs: Mapping[str, Sequence[Run]]

    @property
    def agree(self) -> bool | None:
        """Whether every run showed the same bytes; None: they need not, as the guest wrote."""
        every = [run for runs in self.runs.values() for run in runs]
        if len({run.before.count for run in every}) > 1 or any(r.during.count for r in every):
            return None
        return all(run.checksums == every[0].checksums for run in every)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "agree": self.agree,
            "engines": {
                engine: {
                    "start": _median(runs, lambda run: run.start),
                    "read": _median(runs, lambda run: run.read),
                    "stop": _median(runs, lambda run: run.stop),
                    "write_latency": _median(runs, lambda run: run.during.latency),
                    "writes": sum(run.during.count for run in runs),
                    "commands": _median(runs, lambda run: run.commands),
                    "bytes_said": _median(runs, lambda run: run.bytes_said),
                    "checksums": [dict(run.checksums) for run in runs],
                }
                for engine, runs in self.runs.items()
            },
        }


def _median(runs: Sequence[Run], value: Callable[[Run], float | None]) -> float | None:
    known = [found for run in runs if (found := value(run)) is not None]
    return statistics.median(known) if known else None


def compare(
    ours: api.Domain,
    theirs: api.Domain,
    guest: "libvirt.virDomain",
    xml: str,
    rounds: int = 3,
    log: pathlib.Path | None = None,
) -> Comparison:
    """Back the same GUEST up by XML as OURS and THEIRS, ROUNDS times each, in changing order.

    LOG is libvirtd's debug log of its monitors, where there is one. Errors: before the first start
    VIR_ERR_CONFIG_UNSUPPORTED for a branch, which would move on; those of backupStart,
    ``copy.copy`` and backupStop; nothing runs afterwards. Signals as for ``pull.pull``.
    """
    wanted = dialects.read(xml, lambda: domain_conf.DomainDef.parse(guest.XMLDesc()))
    if wanted.branch is not None:
        raise errors.error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            f"branch '{wanted.branch}': only full backups without a branch can be compared",
        )
    runs: dict[str, list[Run]] = {engine: [] for engine in ENGINES}
    with interrupt.deferred() as cancel:
        for number in range(rounds):
            order = ENGINES if number % 2 == 0 else ENGINES[::-1]
            for engine in order:
                cancel.check()
                domain = ours if engine == ENGINES[0] else theirs
                said = _Trace(domain) if engine == ENGINES[0] else _Log(log)
                runs[engine].append(_run(domain, guest, xml, said, cancel))
    return Comparison(runs)


def _run(
    domain: api.Domain,
    guest: "libvirt.virDomain",
    xml: str,
    said: "_Trace | _Log",
    cancel: copy.Cancel,
) -> Run:
    before = _writes(guest)
    said.begin()
    began = time.perf_counter()
    domain.backupStart(xml, api.VIR_DOMAIN_BACKUP_START_AUTODESTROY)
    started = time.perf_counter()
    try:
        live = backup_conf.BackupDef.parse(domain.backupGetXMLDesc())
        found = exports.of(live)
        results = copy.copy([copy.Job(export, None) for export in found.values()], cancel=cancel)
    except BaseException:
        pull.give_up(domain)
        raise
    read = time.perf_counter()
    domain.backupStop()
    stopped = time.perf_counter()
    commands, size = said.end()
    return Run(
        start=started - began,
        read=read - started,
        stop=stopped - read,
        before=before,
        during=_writes(guest).since(before),
        checksums={name: result.checksum for name, result in zip(found, results, strict=True)},
        commands=commands,
        bytes_said=size,
    )


def _writes(guest: "libvirt.virDomain") -> Writes:
    """Of all disks together."""
    stats = guest.blockStatsFlags("")
    return Writes(int(stats.get("wr_operations", 0)), int(stats.get("wr_total_times", 0)))


# --- what is said to QEMU ---


class _Trace:
    """Of our own driver."""

    def __init__(self, domain: api.Domain) -> None:
        self._connection = domain.connect()
        self._lines = io.StringIO()

    def begin(self) -> None:
        self._connection.setTrace(self._lines)

    def end(self) -> tuple[int | None, int | None]:
        """(commands, their bytes and those of the replies)."""
        self._connection.setTrace(None)
        # A line is TIME DIRECTION MESSAGE.
        parts = [line.split(" ", 2) for line in self._lines.getvalue().splitlines()]
        commands = sum(part[1] == "->" for part in parts)
        return commands, sum(len(part[2]) for part in parts)


class _Log:
    """Of libvirt's, by its log, where that has the monitor's messages."""

    _SENT, _RECEIVED = b"QEMU_MONITOR_SEND_MSG", b"QEMU_MONITOR_RECV_REPLY"

    def __init__(self, path: pathlib.Path | None) -> None:
        self._path = path
        self._offset = 0

    def begin(self) -> None:
        if self._path is not None:
            self._offset = self._size(self._path)

    def end(self) -> tuple[int | None, int | None]:
        if self._path is None:
            return None, None
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError as failure:
            raise errors.system_error(failure, f"cannot read {self._path}") from failure
        said = [line for line in text.split(b"\n") if self._SENT in line or self._RECEIVED in line]
        if not said:
            return None, None
        commands = sum(self._SENT in line for line in said)
        return commands, sum(len(line.partition(b"=")[2].partition(b"=")[2]) for line in said)

    def _size(self, path: pathlib.Path) -> int:
        try:
            return path.stat().st_size
        except OSError as failure:
            raise errors.system_error(failure, f"cannot read {path}") from failure
