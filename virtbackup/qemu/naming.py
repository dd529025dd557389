# SPDX-License-Identifier: LGPL-2.1-or-later
"""What we call things in QEMU: unique for a backup, and recognisable as ours after a crash.

Everything is named ``virtbackup-ID-N[-PART]``: ID is the backup's, eight hex digits; N the disk's
number. QEMU wants identifiers that begin with a letter and node names of at most 31 bytes.
"""

import dataclasses
import hashlib
import re
from typing import NewType

NodeName = NewType("NodeName", str)
JobId = NewType("JobId", str)
ExportId = NewType("ExportId", str)
BackupId = NewType("BackupId", str)
BitmapName = NewType("BitmapName", str)

PREFIX = "virtbackup-"
_JOB = re.compile(PREFIX + r"([0-9a-f]{8})-(\d+)")
_SPEED = 1 << 61
_OURS = re.compile(PREFIX + r"([0-9a-f]{8})-\d+(?:-[a-z]+)*(?:-next-[0-9a-f]{16})?")
_NEXT = re.compile(PREFIX + r"([0-9a-f]{8})-\d+-next-([0-9a-f]{16})")
_MARK = re.compile(PREFIX + r"branch-([0-9a-f]{16})")
_POINT = re.compile(
    PREFIX + r"point-([0-9a-f]{16})-([0-9a-f]{8})-(-?\d{1,12})-(\d{1,19})(?:-([0-9a-f]{8}))?"
)


def scratch_file_node(backup: BackupId, number: int) -> NodeName:
    """The scratch image's protocol node."""
    return NodeName(f"{PREFIX}{backup}-{number}-file")


def scratch_node(backup: BackupId, number: int) -> NodeName:
    """The scratch image itself: the overlay that is exported."""
    return NodeName(f"{PREFIX}{backup}-{number}-scr")


def filter_node(backup: BackupId, number: int) -> NodeName:
    """The filter that a backup job puts over the live disk, where it is given a name."""
    return NodeName(f"{PREFIX}{backup}-{number}-flt")


def access_node(backup: BackupId, number: int) -> NodeName:
    """The frozen disk over that filter: what the hybrid engine exports."""
    return NodeName(f"{PREFIX}{backup}-{number}-acc")


def probe_node(backup: BackupId, number: int) -> NodeName:
    """What is opened over the frozen disk for an instant, to see whether it can be read."""
    return NodeName(f"{PREFIX}{backup}-{number}-probe")


def yield_node(backup: BackupId, number: int) -> NodeName:
    """What is over the scratch image, for that to be left out when QEMU gives its disks away."""
    return NodeName(f"{PREFIX}{backup}-{number}-yield")


def yield_target(backup: BackupId, number: int) -> NodeName:
    """Where the job on that would write, if there was anything to be written."""
    return NodeName(f"{PREFIX}{backup}-{number}-none")


def yield_job(backup: BackupId, number: int) -> JobId:
    """The job on that, which does nothing but to be there."""
    return JobId(f"{PREFIX}{backup}-{number}-yield")


def drive_id(node: NodeName) -> str:
    """The id of the drive that one of our nodes is in, where a QEMU wants it to be in one: nodes
    and drives may not have the same name."""
    return f"{node}-dev"


def goes_by_itself(node: NodeName) -> bool:
    """Whether QEMU deletes one of our nodes with another thing of ours: an image's file with the
    image, a filter with its job."""
    return node.endswith(("-file", "-flt"))


def is_probe(node: NodeName) -> bool:
    """Whether one of our nodes is a probe of a frozen disk."""
    return node.endswith("-probe")


def is_scratch(node: NodeName) -> bool:
    """Whether one of our nodes is a scratch image."""
    return node.endswith("-scr")


def is_image(node: NodeName) -> bool:
    """Whether one of our nodes is a scratch image, or goes with one: a job holds on to it."""
    return is_scratch(node) or node.endswith(("-yield", "-none"))


def backup_job(backup: BackupId, number: int) -> JobId:
    """The job that copies old data before the guest's writes."""
    return JobId(f"{PREFIX}{backup}-{number}")


def is_backup_job(job: str) -> bool:
    """Whether JOB is one of those."""
    return _JOB.fullmatch(job) is not None


def job_speed(job: JobId) -> int:
    """A speed, bytes a second, that no other job has: for a QEMU where a job has no id of ours."""
    match = _JOB.fullmatch(job)
    assert match is not None
    return _SPEED + (int(match[1], 16) << 16) + int(match[2])


def job_of_speed(speed: int) -> JobId | None:
    """Our job that has SPEED; None: it is none of ours."""
    number = speed - _SPEED
    if not 0 <= number < 1 << 48:
        return None
    return backup_job(BackupId(f"{number >> 16:08x}"), number & 0xFFFF)


def export(backup: BackupId, number: int) -> ExportId:
    """The NBD export, by its id; its name is the user's."""
    return ExportId(f"{PREFIX}{backup}-{number}")


def fdset_opaque(backup: BackupId, number: int) -> str:
    """The note on the fd set that hands the scratch image over."""
    return f"{PREFIX}{backup}-{number}"


def listener_fd(backup: BackupId) -> str:
    """The descriptor that hands the NBD server's socket over, until the server has it."""
    return f"{PREFIX}{backup}-0-nbd"


def credentials(backup: BackupId) -> str:
    """The object that has the NBD server's TLS credentials."""
    return f"{PREFIX}{backup}-0-tls"


def backup_of(name: str) -> BackupId | None:
    """Whose backup's thing NAME is, or None when it is none of ours."""
    match = _OURS.fullmatch(name)
    return BackupId(match[1]) if match else None


# --- bitmaps of a branch: one bears the branch's own name; these are beside it -------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """The instant from which on a branch's bitmap knows what has changed: a good backup's start."""

    backup: BackupId
    time: int
    """Seconds since the epoch."""
    size: int
    """Guest-visible bytes that the disk had."""
    disk: str | None = None
    """What the disk was called, by its ``disk_key``; None: an older virtbackup did not note it."""


def branch_key(branch: str) -> str:
    """A branch's name of up to 1023 bytes, short enough to be a part of another name."""
    return hashlib.sha256(branch.encode(errors="surrogatepass")).hexdigest()[:16]


def disk_key(target: str) -> str:
    """A disk's name, of whatever length, as a part of another name."""
    return hashlib.sha256(target.encode(errors="surrogatepass")).hexdigest()[:8]


def next_bitmap(backup: BackupId, number: int, branch: str) -> BitmapName:
    """What records during a backup, while the branch's own bitmap stands still to be read."""
    return BitmapName(f"{PREFIX}{backup}-{number}-next-{branch_key(branch)}")


def next_of(name: str) -> tuple[BackupId, str] | None:
    """Of which backup, and branch by its key, NAME is the ``next_bitmap``; None: it is none."""
    match = _NEXT.fullmatch(name)
    return (BackupId(match[1]), match[2]) if match else None


def guard_bitmap(backup: BackupId, number: int) -> BitmapName:
    """What never records: QEMU does not have a disk with a bitmap go back to a snapshot."""
    return BitmapName(f"{PREFIX}{backup}-{number}-guard")


def is_guard(name: str) -> bool:
    """Whether NAME is a ``guard_bitmap``."""
    return name.endswith("-guard") and backup_of(name) is not None


def point_bitmap(branch: str, point: Point) -> BitmapName:
    """An empty bitmap beside the branch's, that by its name says what the branch's is relative to,
    wherever the image goes."""
    key = branch_key(branch)
    disk = "" if point.disk is None else f"-{point.disk}"
    return BitmapName(f"{PREFIX}point-{key}-{point.backup}-{point.time}-{point.size}{disk}")


def point_of(name: str) -> tuple[str, Point] | None:
    """The branch, by its key, and the point of which NAME is the ``point_bitmap``, or None."""
    if (match := _POINT.fullmatch(name)) is None:
        return None
    return match[1], Point(BackupId(match[2]), int(match[3]), int(match[4]), match[5])


def mark_bitmap(branch: str) -> BitmapName:
    """A bitmap beside the branch's that says whose that is, also when its point is lost."""
    return BitmapName(f"{PREFIX}branch-{branch_key(branch)}")


def mark_of(name: str) -> str | None:
    """The branch, by its key, of which NAME is the ``mark_bitmap``, or None."""
    match = _MARK.fullmatch(name)
    return match[1] if match else None


def is_own_bitmap(name: str) -> bool:
    """Whether NAME is one of the three that are beside a branch's bitmap, or a guard."""
    beside = any(told(name) is not None for told in (next_of, point_of, mark_of))
    return beside or is_guard(name)
