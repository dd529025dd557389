# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a backup's jobs still vouch for the data (qemu_blockjob.c). Pure.

A ``sync=none`` job runs until it is cancelled. While it runs, the frozen disk is the disk of the
start's instant. Once it has ended for any reason, a classic overlay silently shows the live disk:
only the job can vouch for what was read, and only if looked at after the last read.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from virtbackup.qemu import block, monitor_json, naming, status

RUNNING = frozenset({"created", "running", "paused", "ready", "standby"})
"""QAPI's JobStatus values in which a backup job still saves old data."""

STOPPED = frozenset({"failed", "nospace"})
"""BlockDeviceIoStatus values of a drive for whose sake the guest was paused."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """What QEMU shows at one moment."""

    jobs: Mapping[naming.JobId, monitor_json.Job]
    exports: Mapping[naming.ExportId, monitor_json.Export] | None
    """None where they cannot be asked for."""
    drives: Mapping[str, block.Disk] | None
    """By place in QEMU's object tree; None where there are no devices at all."""
    io_error: bool
    """The guest is paused since a drive met an error, and was not so at the start already."""
    unreadable: Mapping[naming.NodeName, str] = dataclasses.field(default_factory=dict)
    """Frozen disks that were tried and cannot be read, with the reason."""
    unwritten: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Disk -> why the kernel could not write what it had taken for its scratch image, where it was
    asked for that."""
    lasting: frozenset[naming.ExportId] = frozenset()
    """Exports that are there after they were to end."""
    graph: block.Graph | None = None
    """None where it cannot be asked for."""
    nodes: Mapping[naming.NodeName, block.Medium] = dataclasses.field(default_factory=dict)
    """Every node, where they were asked for."""
    closed: str | None = None
    """QEMU's words that it has closed an image, for which the drives are not known."""
    nodes_untold: str | None = None
    """Why they could not be asked for, where the verdict is the last and would have needed them."""


def judge(disks: Iterable[status.DiskStatus], sight: Sight) -> dict[str, str]:
    """Disk -> why its data cannot be trusted; a disk that is not there is good."""
    reasons = {}
    for disk in disks:
        reason = (
            _closed_reason(sight)
            or _given_away_reason(disk, sight)
            or _job_reason(disk, sight)
            or _image_reason(disk, sight)
            or _frozen_reason(disk, sight)
            or _scratch_reason(disk, sight)
            or _export_reason(disk, sight)
            or _device_reason(disk, sight)
        )
        if reason is not None:
            reasons[disk.target] = reason
    return reasons


def _closed_reason(sight: Sight) -> str | None:
    if sight.closed is None:
        return None
    return f"QEMU has closed its image, or another disk's, as one that is corrupt: {sight.closed}"


def _given_away_reason(disk: status.DiskStatus, sight: Sight) -> str | None:
    """Why the disk may be written by another QEMU, past the job that saves its old data."""
    drive = _drive(disk, sight)
    if drive is None or drive.medium is None or drive.medium.active:
        return None
    return "it was given away during the backup, to a migration or a save"


def _image_reason(disk: status.DiskStatus, sight: Sight) -> str | None:
    """Why the frozen disk may show what was not on the disk: below the job's filter, which saves
    nothing of that, it got an image that it had not at the start, lost one, or shows another part
    of its file, by ``blockdev-reopen``. That it lost one by ``block-stream``, or got one over its
    own, as by a snapshot where it has another filter, leaves the data what it was."""
    if sight.graph is None or not disk.stores:
        return None
    is_below = disk.node in sight.graph.nodes_over(disk.image)
    node = disk.image if is_below else disk.node
    added = sight.graph.stores_of(node) - {node} - set(disk.stores)
    if added:
        return f"it got another image, '{min(added)}', below its node '{node}' during the backup"
    if disk.backing is None and (lost := set(disk.stores) - sight.graph.stores_of(node)):
        return (
            f"it has lost the image '{min(lost)}' below its node '{node}', and the older version of"
            " virtbackup that began the backup did not note by what that could be told to be right"
        )
    lost_reason = _lost_reason(disk, sight, sight.graph)
    return lost_reason or _offset_reason(disk, sight, sight.graph)


def _lost_reason(disk: status.DiskStatus, sight: Sight, graph: block.Graph) -> str | None:
    """Why an image that is gone from below the disk was not merged into the one over it, or may not
    have been. Whoever does that, notes it in the image over it; one that did not say before that it
    had the other below, and has none now, does not tell."""
    for backing in _lost(disk, sight):
        now = _backing_files(backing.node, disk, sight)
        if now is None and sight.nodes_untold is not None:
            return (
                f"the image '{backing.below}' is gone from below its node '{backing.node}', and"
                f" whether its data is still there cannot be told: {sight.nodes_untold}"
            )
        if now is None or now[:1] != (backing.told,):
            continue
        if backing.told is not None or (backing.node, "backing") in graph.roles:
            return (
                f"the image '{backing.below}' was taken away from below its node '{backing.node}'"
                " during the backup"
            )
    return None


def needs_nodes(disk: status.DiskStatus, sight: Sight) -> bool:
    """Whether only the nodes, which SIGHT does not have, tell why the image of DISK, or one below,
    is not backed by what it was."""
    return any(_backing_files(backing.node, disk, sight) is None for backing in _lost(disk, sight))


def _backing_files(
    node: naming.NodeName, disk: status.DiskStatus, sight: Sight
) -> tuple[str | None, ...] | None:
    """What the image NODE says that it is backed by, and so on: by the drive of DISK, where there
    are only filters over it there, which say nothing; None where it is not known."""
    drive = _drive(disk, sight)
    if sight.graph is not None and drive is not None and drive.medium is not None:
        root = drive.medium
        over = 0 if root.node == node else sight.graph.filters_over(node, root.node)
        if over is not None and not any(root.backing_files[:over]):
            return root.backing_files[over:]
    medium = sight.nodes.get(node)
    return None if medium is None else medium.backing_files


def _lost(disk: status.DiskStatus, sight: Sight) -> list[block.Backing]:
    """What below the image of DISK is not backed by what it was at the start: as by
    ``block-stream``, which leaves the data what it was, or by ``blockdev-reopen``."""
    if sight.graph is None:
        return []
    return [
        backing
        for backing in disk.backing or ()
        if not sight.graph.is_backed(backing)
        and disk.image in {backing.node, *sight.graph.nodes_over(backing.node)}
    ]


def _offset_reason(disk: status.DiskStatus, sight: Sight, graph: block.Graph) -> str | None:
    """Why the frozen disk may show another part of its file, by ``blockdev-reopen``."""
    drive = _drive(disk, sight)
    if drive is None or drive.medium is None or disk.offset in (None, drive.medium.offset):
        return None
    if not graph.is_filtered(drive.medium.node, disk.image):
        return None  # that of an overlay
    return (
        f"its node '{disk.image}' shows its file from byte {drive.medium.offset} on, no more from"
        f" {disk.offset}"
    )


def _job_reason(disk: status.DiskStatus, sight: Sight) -> str | None:
    """Why the job does not vouch. With a device that is unplugged QEMU deletes the drive that
    ``-drive`` made for it, and cancels that drive's jobs."""
    reason = job_reason(sight.jobs.get(disk.job))
    gone = _device_reason(disk, sight)
    return f"{gone}, and {reason}" if reason and gone else reason


def job_reason(job: monitor_json.Job | None) -> str | None:
    """Why a backup job no longer vouches for its disk, in QEMU's words where there are any."""
    if job is None:
        return "its backup job disappeared"
    if job.status in RUNNING:
        return None
    return f"its backup job ended: {job.error or job.status}"


def _export_reason(disk: status.DiskStatus, sight: Sight) -> str | None:
    """Why a client cannot have read everything, or not from the frozen disk: somebody else took the
    export away, or made another one of its id."""
    if sight.exports is None:
        return None
    export = sight.exports.get(disk.export)
    if export is None or export.shutting_down:
        return "its export was removed before the backup was stopped"
    if disk.export in sight.lasting:
        return "its export cannot be ended, and a client of it may read what is written by now"
    if naming.backup_of(export.node) is None:
        return f"its export shows node '{export.node}' in place of the frozen disk"
    return None


def stopped_guest(disks: Iterable[status.DiskStatus], sight: Sight) -> bool:
    """Whether the guest stands still for an error of one of DISKS: as it writes through our filter
    while we save its old data, it may be our scratch image's."""
    return sight.io_error and any(_scratch_reason(disk, sight) for disk in disks)


def _frozen_reason(disk: status.DiskStatus, sight: Sight) -> str | None:
    reason = None if disk.access is None else sight.unreadable.get(disk.access)
    return None if reason is None else f"its snapshot is broken: {reason}"


def _scratch_reason(disk: status.DiskStatus, sight: Sight) -> str | None:
    if (reason := sight.unwritten.get(disk.target)) is not None:
        return f"its scratch image in '{disk.directory}' has lost data on the way to disk: {reason}"
    if disk.breaks_snapshot:
        return None  # its scratch image cannot be why
    drive = _drive(disk, sight)
    if sight.io_error and drive is not None and drive.io_status in STOPPED:
        # A read is of its own storage alone, and paused the guest where it has rerror=stop.
        what = "a write" if drive.io_status == "nospace" else "a read or a write"
        return (
            f"{what} of the guest failed ('{drive.io_status}') and the guest was paused: its"
            " scratch image, or its own storage, is full or broken"
        )
    return None


def _device_reason(disk: status.DiskStatus, sight: Sight) -> str | None:
    if disk.device is None or sight.drives is None:
        return None
    drive = _drive(disk, sight)
    if drive is None:
        return "the disk was unplugged during the backup"
    if drive.medium is None:
        return "its medium was removed during the backup"
    other = _other_image(disk, drive.medium.node, sight.graph)
    return f"its device got another image, '{other}', in place of its own" if other else None


def replaced(disks: Iterable[status.DiskStatus], sight: Sight) -> list[status.DiskStatus]:
    """Those of DISKS in whose place another was plugged in. No medium is changed while a scratch
    image or a filter of ours is over it; a job that is lost takes its filter along, and then the
    node that was taken out is its owner's."""
    return [
        disk
        for disk in disks
        if (drive := _drive(disk, sight)) and drive.medium and sight.graph
        if _other_image(disk, drive.medium.node, sight.graph)
        if any(map(naming.backup_of, sight.graph.nodes_over(disk.node) - {disk.access}))
    ]


def _other_image(
    disk: status.DiskStatus, root: naming.NodeName, graph: block.Graph | None
) -> naming.NodeName | None:
    """ROOT, which the disk's device shows, where that is none of the disk's."""
    # One that the graph does not have yet came while all this was looked at: with a snapshot, say.
    if graph is None or root not in graph.nodes() or graph.shows(root, disk.node):
        return None
    # A snapshot below the job's filter, and then all data streamed into it, is the disk's yet.
    return None if disk.job in graph.jobs_on(root) else root


def _drive(disk: status.DiskStatus, sight: Sight) -> block.Disk | None:
    return None if disk.device is None else (sight.drives or {}).get(disk.device)
