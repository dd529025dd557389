# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a backup's jobs still vouch for the data (qemu_blockjob.c). Pure.

A ``sync=none`` job runs until it is cancelled. While it runs, the overlay over the live disk is the
disk of the start's instant. Once it has ended for any reason the overlay silently shows the live
disk: only the job can vouch for what was read, and only if looked at after the last read.
"""

from collections.abc import Iterable, Mapping

from virtbackup.qemu import monitor_json, naming, status

RUNNING = frozenset({"created", "running", "paused", "ready", "standby"})
"""QAPI's JobStatus values in which a backup job still saves old data."""


def judge(
    disks: Iterable[status.DiskStatus],
    jobs: Mapping[naming.JobId, monitor_json.Job],
    exports: Mapping[naming.ExportId, monitor_json.Export],
) -> dict[str, str]:
    """Disk -> why its data cannot be trusted; a disk that is not there is good."""
    reasons = {}
    for disk in disks:
        reason = job_reason(jobs.get(disk.job)) or export_reason(exports.get(disk.export))
        if reason is not None:
            reasons[disk.target] = reason
    return reasons


def job_reason(job: monitor_json.Job | None) -> str | None:
    """Why a backup job no longer vouches for its disk, in QEMU's words where there are any."""
    if job is None:
        return "its backup job disappeared"
    if job.status in RUNNING:
        return None
    return f"its backup job ended: {job.error or job.status}"


def export_reason(export: monitor_json.Export | None) -> str | None:
    """Why a client cannot have read everything: somebody else took the export away."""
    if export is None or export.shutting_down:
        return "its export was removed before the backup was stopped"
    return None
