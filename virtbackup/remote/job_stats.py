# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's backup as libvirt's clients know jobs: how far it is, and how the last one ended."""

import threading
import time

import libvirt

from virtbackup import hypervisor
from virtbackup.conf import backup_conf
from virtbackup.remote import domains

Stats = dict[str, hypervisor.Value]
"""By libvirt's names (VIR_DOMAIN_JOB_*)."""


def running(found: domains.Found) -> Stats:
    """Of the backup that runs; empty where none does. Errors: the driver's."""
    try:
        info: backup_conf.BackupInfo = found.call(
            "virDomainGetJobStats", "domain_backup_get_info", 0
        )
    except libvirt.libvirtError as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
            raise
        return {}
    return {
        "operation": libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP,
        "time_elapsed": max(0, int((time.time() - info.started) * 1000)),
        "disk_temp_used": sum(disk.scratch_used or 0 for disk in info.disks),
        "disk_temp_total": sum(disk.capacity for disk in info.disks),
    }


class Ended:
    """The last job of every domain, once it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ending: dict[str, Stats] = {}
        """By uuid: how far a job was that is being stopped."""
        self._ended: dict[str, Stats] = {}

    def begin(self, uuid: str, before: Stats) -> None:
        """A new job has begun: what was told BEFORE is of the past."""
        with self._lock:
            if before and self._ended.get(uuid) is before:
                del self._ended[uuid]

    def ending(self, uuid: str, stats: Stats) -> None:
        """A job with STATS is going to be stopped."""
        with self._lock:
            self._ending[uuid] = stats

    def end(self, event: hypervisor.BackupEnded) -> None:
        """A job has ended. A pull that is good ends by being cancelled, as libvirt says, too."""
        with self._lock:
            stats = self._ending.pop(event.domain.uuid, {})
            stats |= {
                "operation": libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP,
                "success": event.good,
                "errmsg": "Operation canceled" if event.good else event.reason or "unknown error",
            }
            self._ended[event.domain.uuid] = stats

    def told(self, uuid: str, keep: bool) -> Stats:
        """What is known of a domain's last job, once, unless it is to be KEPT; empty: nothing."""
        with self._lock:
            return self._ended.get(uuid, {}) if keep else self._ended.pop(uuid, {})
