# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a QEMU can do, and what it is known to get wrong (qemu_capabilities.c). Pure.

What it can do is asked of it; only defects go by version, each with its evidence.
"""

import dataclasses
from collections.abc import Iterable, Set

import libvirt

from virtbackup import errors
from virtbackup.qemu import monitor_json

REQUIRED = ("block-export-add", "blockdev-del", "job-dismiss", "transaction")
"""Commands a pull backup cannot do without here."""

Version = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Defect:
    """Something QEMUs from ``first`` up to, not including, ``fixed`` get wrong."""

    first: Version
    fixed: Version
    evidence: str

    def affects(self, version: Version) -> bool:
        return self.first <= version < self.fixed


NBD_IOTHREAD_ABORT = Defect(
    (7, 2, 14),
    (8, 0, 0),
    "QEMU aborts when an NBD client disconnects from an export whose node runs in an iothread"
    " (nbd_blockdev_client_closed: Assertion `qemu_in_main_thread() && nbd_server' failed)",
)

NBD_STOP_HANG = Defect(
    (7, 2, 14),
    (10, 0, 0),
    "nbd-server-stop never returns, and the guest stands still, while an NBD client is connected"
    " that has not finished the handshake",
)
"""Seen on 7.2.22; what lies between it and 10.0 is taken to be alike."""

NAMED_NODES_CRASH = Defect(
    (0, 0, 0),
    (7, 2, 0),
    "query-named-block-nodes kills QEMU between the end of a backup job and its dismissal",
)
"""Seen on 5.2.0 (a segmentation fault); what lies between it and 7.2 is taken to be alike."""


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """Of one running QEMU."""

    version: Version
    package: str
    commands: frozenset[str]

    @property
    def fdsets(self) -> bool:
        """Files can be handed over as descriptors and taken back."""
        return {"add-fd", "remove-fd", "query-fdsets"} <= self.commands

    @property
    def devices(self) -> bool:
        """There is a guest with devices; qemu-storage-daemon has only nodes."""
        return "query-status" in self.commands

    @property
    def block_graph(self) -> bool:
        """The block graph can be asked for."""
        return "x-debug-query-block-graph" in self.commands

    def named_nodes_are_safe(self, jobs: Iterable[monitor_json.Job]) -> bool:
        """Whether this QEMU survives query-named-block-nodes while it has JOBS."""
        ended = any(job.type == "backup" and job.status == "concluded" for job in jobs)
        return not (ended and NAMED_NODES_CRASH.affects(self.version))

    def check_backup(self) -> None:
        """Raise VIR_ERR_OPERATION_UNSUPPORTED when this QEMU has no way to a pull backup."""
        if missing := missing_commands(self.commands):
            version = ".".join(map(str, self.version))
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"QEMU {version} has no {' and no '.join(missing)}",
            )


def missing_commands(commands: Set[str]) -> list[str]:
    """Which of the REQUIRED are not among COMMANDS."""
    return [name for name in REQUIRED if name not in commands]
