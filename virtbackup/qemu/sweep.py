# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking out of QEMU what a backup put there, found by name.

One way for all ends of a backup: a start that fails, a stop, and what a crash left. What is
removed is what QEMU shows under our names, not what somebody remembers to have made: so a step
whose reply was lost is undone too, and a second sweep finds nothing. Failures are logged and the
sweep goes on; nothing here raises but MonitorLost, timeouts, ClientStuck and, where there is no
block graph, ``domain.named_nodes``'s.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    block,
    blockjob,
    capabilities,
    dialect,
    domain,
    hang,
    monitor,
    monitor_json,
    naming,
    nbdserver,
    qmp,
)

logger = logging.getLogger(__name__)
left_logger = logging.getLogger(f"{__name__}.left")
"""What a stop that was good tells nobody else of: what of a backup is left, and costs the guest, or
whoever comes next."""

TIMEOUT = 20.0
"""Seconds to wait for exports and jobs to end; a reading client is cut off, a job is cancelled."""
_LOOK_AGAIN = 0.05
"""Seconds after which to ask again even though no event came."""

_CONCLUDED = "concluded"
_LASTING = blockjob.RUNNING | {_CONCLUDED}
"""The statuses that a job keeps until somebody ends or dismisses it."""

Exports = Mapping[naming.ExportId, monitor_json.Export]
Name = TypeVar("Name", bound=str)
Thing = TypeVar("Thing")


class ClientStuck(errors.Error):
    """An NBD client cannot be sent away, and QEMU would stand still if its export were deleted. Not
    VIR_ERR_OPERATION_FAILED, which says of a stop that it was one."""

    def __init__(self, clients: int, address: str) -> None:
        super().__init__(
            libvirt.VIR_ERR_OPERATION_TIMEOUT,
            f"Timed out during operation: {clients} NBD client(s) of {address} cannot be"
            " disconnected, as they have stopped reading, or what they read does not answer (a"
            " disk's own storage): end them, or see to that, and try again",
        )


@dataclasses.dataclass(frozen=True)
class Sweeper:
    """Removes what carries the name of one backup, or of any of ours (BACKUP None)."""

    qemu: monitor.Monitor
    caps: capabilities.Capabilities
    backup: naming.BackupId | None
    pid: int | None = None
    """QEMU's process, where it can be seen."""
    addresses: tuple[backup_conf.Address, ...] = ()
    """Of our NBD server; where it is not known, of all that may be it. Empty: it may be any."""
    inodes: frozenset[int] = frozenset()
    """Of our scratch images, where they are known."""

    @property
    def _dialect(self) -> dialect.Dialect:
        return dialect.Dialect(self.caps)

    def exports(self, known: Exports | None = None) -> list[str]:
        """End our exports, whose clients are disconnected (see ``end_clients``). KNOWN are all that
        there are, where that is known.

        Returns when they are gone, but for those that QEMU refuses to end, or after TIMEOUT. Where
        exports cannot be asked for, nothing: they end with the server.
        """
        exports = self._own_exports() if known is None else self._ours_of(known)
        removed: list[str] = []
        refused: set[naming.ExportId] = set()
        for attempt in self._attempts():
            if not exports:
                break
            if attempt:
                self._wait("BLOCK_EXPORT_DELETED")
            ended = [] if attempt else [each for each in exports if not each.shutting_down]
            done, told = self._execute_each(
                [monitor_json.block_export_del(export.id) for export in ended],
                monitor_json.query_block_exports(),
            )
            removed += [f"export '{one.id}'" for one, gone in zip(ended, done, strict=True) if gone]
            refused |= {one.id for one, gone in zip(ended, done, strict=True) if not gone}
            left = self._ours_of(monitor_json.parse_exports(told))
            # QEMU refuses, too, to end one that it ends already.
            exports = [each for each in left if each.shutting_down or each.id not in refused]
        return removed

    def server(self, known: Exports | None = None) -> tuple[list[str], bool]:
        """Stop our NBD server, its clients sent away; nothing but a warning where somebody else
        exports on it. KNOWN: as ``exports``.

        (A line for it where it ran, whether it was left running: a client holds on, and this QEMU
        would stand still with it; or QEMU refuses.)
        """
        if known is not None and self._stays_for_others(known):
            return [], False
        unseen = self._send_clients_away() is None
        every = self.every_export()
        if self._stays_for_others(every):
            return [], False
        if self._ours_of(every) or (unseen and not self.caps.nbd_stop_is_safe):
            logger.warning("NBD server left running: a client of it cannot be disconnected")
            return [], True
        try:
            self.qemu.execute(monitor_json.nbd_server_stop())
        except monitor_json.CommandFailed as failure:
            if failure.desc == "NBD server not running":
                return [], False
            logger.warning("NBD server left running: %s", failure.desc)
            return [], True
        return ["NBD server"], False

    def seeking_server(self) -> "Sweeper":
        """The same, for who does not know where our NBD server listens. As long as there is an
        export of ours it is among what QEMU listens on, and is none of its character devices."""
        if self.pid is None or not self._own_exports():
            return self
        listening = nbdserver.listening(self.pid)
        chardevs = self._chardevs()
        others = tuple(a for a in listening if not nbdserver.is_chardev(a, chardevs))
        if len(others) == len(listening):
            return self  # it has not even the monitor: it is not QEMU, but stands before it
        return dataclasses.replace(self, addresses=others)

    def _chardevs(self) -> tuple[str, ...]:
        try:
            return monitor_json.parse_chardevs(self.qemu.execute(monitor_json.query_chardev()))
        except monitor_json.CommandFailed as failure:
            logger.debug("command=%s failed: %s", failure.command.execute, failure.desc)
            return ()

    def end_clients(self, known: Exports | None = None) -> None:
        """Disconnect the clients of our exports, where nobody else exports on the same server.
        KNOWN: as ``exports``.

        Errors: ClientStuck.
        """
        every = self.every_export() if known is None else known
        if self._ours_of(every) and not self._others_of(every):
            self._send_clients_away()

    def _others_of(self, exports: Exports) -> list[naming.ExportId]:
        """The exports of somebody else's on the NBD server."""
        return [id for id, e in exports.items() if e.type == "nbd" and not self._is_ours(id)]

    def _stays_for_others(self, exports: Exports) -> bool:
        """Whether somebody else exports on the NBD server, which is warned of then: no other backup
        can begin while it runs."""
        others = self._others_of(exports)
        if others:
            names = ", ".join(f"'{id}'" for id in others)
            left_logger.warning("NBD server left running: somebody else exports on it: %s", names)
        return bool(others)

    def _send_clients_away(self) -> int | None:
        """Disconnect every client of our server: 0 when none is left; None where there are, or may
        be, clients that we may not touch: QEMU will. Errors: ClientStuck."""
        pid = self.pid or os.getpid()  # QEMU is in the same network then, most likely
        if len(self.addresses) != 1:
            idle = [nbdserver.clients(pid, address) == 0 for address in self.addresses]
            return 0 if idle and all(idle) else None
        [address] = self.addresses
        left = nbdserver.send_clients_away(
            pid, address, lambda: self.qemu.execute(self._dialect.query_jobs())
        )
        if left:
            raise ClientStuck(left, nbdserver.describe(address))
        return left

    def jobs(self) -> list[str]:
        """Cancel our jobs and dismiss them. Returns when they are gone, but for those of which QEMU
        refuses that, and after TIMEOUT."""
        ended: dict[naming.JobId, None] = {}
        refused: dict[naming.JobId, str] = {}
        left = jobs = self._own_jobs()
        for _ in self._attempts():
            if not jobs:
                break
            ending = [job for job in jobs if job.status == _CONCLUDED or job.id not in ended]
            if not ending:
                self._wait("JOB_STATUS_CHANGE")
            done, told = self._execute_each(map(self._end_job, ending), self._dialect.query_jobs())
            ended |= dict.fromkeys(job.id for job in ending)
            refused |= {job.id: job.status for job, ok in zip(ending, done, strict=True) if not ok}
            left = self._ours_of(self._dialect.parse_jobs(told))
            # One that is about to end refuses, too, and has another status before long.
            jobs = [j for j in left if refused.get(j.id) != j.status or j.status not in _LASTING]
        still = {job.id for job in left}
        return [f"job '{id}'" for id in ended if id not in still]

    def _end_job(self, job: monitor_json.Job) -> monitor_json.Command:
        """Dismiss one that has ended, cancel another."""
        if job.status == _CONCLUDED:
            return self._dialect.job_dismiss(job)
        return self._dialect.job_cancel(job)

    def frozen_disks(self) -> list[str]:
        """Delete what is over our jobs' filters, before the jobs: nobody can read it any more.

        A QEMU that cannot show its graph has no nodes of that kind, and may be one that must not be
        asked for all nodes before the jobs are dismissed.
        """
        if not self.caps.block_graph:
            return []
        nodes = [node for node in self._own_nodes() if not naming.is_image(node)]
        # A probe is over a frozen disk.
        return self._delete(sorted(nodes, key=lambda node: (not naming.is_probe(node), node)))

    def scratch_images(self) -> list[str]:
        """Delete our scratch images, after the jobs; the node of an image's file goes with it."""
        with hang.closed_by_another(self.pid, self.inodes):
            # What is over an image goes before it.
            nodes = filter(naming.is_image, self._own_nodes())
            return self._delete(sorted(nodes, key=naming.is_scratch))

    def delete_node(self, node: naming.NodeName) -> bool:
        """Whether a node, not one of ours, was deleted."""
        return self._execute(monitor_json.blockdev_del(node))

    def _delete(self, nodes: Iterable[naming.NodeName]) -> list[str]:
        nodes = list(nodes)
        done, _ = self._execute_each(map(self._dialect.blockdev_del, nodes))
        return [f"node '{node}'" for node, gone in zip(nodes, done, strict=True) if gone]

    def stop_saving(self) -> None:
        """The fastest way to let the guest write freely again: cut the exports off and cancel the
        jobs, without waiting for either. What is read from now on is not the frozen disk.

        Errors: ClientStuck, with nothing done.
        """
        try:
            self.end_clients()
        except ClientStuck:
            if not self.caps.frees_beside_stuck_clients:
                raise
        commands = [
            *(monitor_json.block_export_del(e.id) for e in self._own_exports()),
            *(self._dialect.job_cancel(job) for job in self._own_jobs()),
        ]
        try:
            self.qemu.execute_all(commands)
        except monitor_json.CommandFailed as failure:
            logger.debug("command=%s failed: %s", failure.command.execute, failure.desc)

    def credentials(self) -> list[str]:
        """Delete the TLS credentials of our NBD server, after it."""
        ids = self._own_credentials()
        if self.backup is not None and self._has_tls:
            ids = [naming.credentials(self.backup)]
        return [
            f"TLS credentials '{id}'" for id in ids if self._execute(monitor_json.object_del(id))
        ]

    def fdsets(self) -> list[str]:
        """Take back the descriptors we handed over."""
        return [
            f"fdset {fdset}"
            for fdset in self._own_fdsets()
            if self._execute(monitor_json.remove_fd(fdset))
        ]

    def listener(self) -> None:
        """Take back the socket that was handed over for an NBD server that was not started."""
        another = self.qemu.peer_uid() != os.geteuid()
        handed = any(
            another if isinstance(address, backup_conf.UnixAddress) else address.picks_port
            for address in self.addresses
        )
        if self.backup is not None and handed and self.caps.takes_listener:
            self._execute(monitor_json.closefd(naming.listener_fd(self.backup)))

    def remaining(self) -> list[str]:
        """What of ours is still there."""
        if self.caps.block_exports and self.caps.block_graph:
            told = self.qemu.execute_all(
                [
                    monitor_json.query_block_exports(),
                    self._dialect.query_jobs(),
                    monitor_json.query_block_graph(),
                ]
            )
            own_exports = self._ours_of(monitor_json.parse_exports(told[0]))
            own_jobs = self._ours_of(self._dialect.parse_jobs(told[1]))
            names: Iterable[naming.NodeName] = block.parse_graph(told[2]).nodes()
        else:
            own_exports, own_jobs, names = self._own_exports(), self._own_jobs(), self._node_names()
        exports = [f"export '{export.id}'" for export in own_exports]
        jobs = [f"job '{job.id}'" for job in own_jobs]
        nodes = [f"node '{node}'" for node in names if self._is_ours(node)]
        return [*exports, *jobs, *nodes, *(f"object '{id}'" for id in self._own_credentials())]

    # --- what is ours ---

    def _is_ours(self, name: str) -> bool:
        backup = naming.backup_of(name)
        return backup is not None and self.backup in (None, backup)

    def _ours_of(self, found: Mapping[Name, Thing]) -> list[Thing]:
        """What has a name of ours."""
        return [thing for name, thing in found.items() if self._is_ours(name)]

    def every_export(self) -> Exports:
        """All exports, whosever; none where they cannot be asked for."""
        if not self.caps.block_exports:
            return {}
        return monitor_json.parse_exports(self.qemu.execute(monitor_json.query_block_exports()))

    def _own_exports(self) -> list[monitor_json.Export]:
        return self._ours_of(self.every_export())

    def _own_jobs(self) -> list[monitor_json.Job]:
        return self._ours_of(
            self._dialect.parse_jobs(self.qemu.execute(self._dialect.query_jobs()))
        )

    def _own_nodes(self) -> list[naming.NodeName]:
        nodes = self._node_names()
        own = (node for node in nodes if self._is_ours(node))
        return sorted(node for node in own if not naming.goes_by_itself(node))

    def _node_names(self) -> Iterable[naming.NodeName]:
        if self.caps.block_graph:
            return block.parse_graph(self.qemu.execute(monitor_json.query_block_graph())).nodes()
        return domain.named_nodes(self.qemu, self.caps)

    @property
    def _has_tls(self) -> bool:
        """Whether our NBD server may do TLS."""
        return self.backup is None or any(address.tls for address in self.addresses)

    def _own_credentials(self) -> list[str]:
        if not self._has_tls or not {"qom-list", "object-del"} <= self.caps.commands:
            return []
        try:
            reply = self.qemu.execute(monitor_json.qom_list("/objects"))
        except monitor_json.CommandFailed as failure:
            logger.debug("command=%s failed: %s", failure.command.execute, failure.desc)
            return []  # as where no object was ever made
        return [id for id in monitor_json.parse_credentials(reply) if self._is_ours(id)]

    def _own_fdsets(self) -> list[int]:
        if not self.caps.fdsets:
            return []
        fdsets = monitor_json.parse_fdsets(self.qemu.execute(monitor_json.query_fdsets()))
        return [fdset for fdset, notes in fdsets.items() if any(map(self._is_ours, notes))]

    # --- doing it ---

    def _execute(self, command: monitor_json.Command) -> bool:
        """Whether QEMU did it. That it was gone already is no news; else the reason is logged."""
        return self._execute_each([command])[0][0]

    def _execute_each(
        self, commands: Iterable[monitor_json.Command], *then: monitor_json.Command
    ) -> tuple[list[bool], Any]:
        """(Of each of COMMANDS whether QEMU did it, as ``_execute``; what was answered to THEN,
        which was sent behind them). Errors: CommandFailed by THEN."""
        commands = list(commands)
        replies = self.qemu.execute_each([*commands, *then]) if commands or then else []
        done = []
        for command, reply in zip(commands, replies, strict=False):
            refused = isinstance(reply, monitor_json.CommandFailed)
            if refused and not isinstance(reply, monitor_json.NotFound):
                logger.warning("cleanup command=%s failed: %s", command.execute, reply.desc)
            done.append(not refused)
        [told] = monitor.all_done(replies[len(commands) :]) or [None]
        return done, told

    def _attempts(self) -> Iterator[int]:
        """0, 1, 2, ... until TIMEOUT."""
        end = time.monotonic() + TIMEOUT
        attempt = 0
        while time.monotonic() < end:
            yield attempt
            attempt += 1
        logger.warning("cleanup gave up after %g seconds", TIMEOUT)

    def _wait(self, event: str) -> None:
        def matches(seen: qmp.Event) -> bool:
            return seen.name == event

        self.qemu.wait_event(matches, _LOOK_AGAIN)
