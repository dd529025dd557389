# SPDX-License-Identifier: LGPL-2.1-or-later
"""Branches: what a disk's bitmaps tell of its lines of incremental backups. Pure.

A branch has three bitmaps on a disk, all on the image that the guest writes to:

* one of the branch's own name. Between backups it records what changes; during one it stands still,
  to be exported;
* ``next``, during a backup only: records from the start's instant on;
* one that is always empty and whose name is the point that the first is relative to. It is what
  makes the first one ours: bitmaps without it are somebody else's.

A good backup makes ``next`` the branch's bitmap and sets the point; any other end joins both again.
Either is one transaction for all disks: at every instant the two have every change since the point.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from virtbackup.qemu import block, monitor_json, naming

_FILTERS = frozenset(
    {
        "backup-top", "blkdebug", "blklogwrites", "blkverify", "commit_top", "compress",
        "copy-before-write", "copy-on-read", "mirror_top", "preallocate", "throttle",
    }
)  # fmt: skip
"""Nodes over an image that hold no data, and no persistent bitmaps, themselves."""

DEFAULT_GRANULARITY = 65536
"""Bytes."""


@dataclasses.dataclass(frozen=True)
class Line:
    """What one disk has of one branch."""

    node: naming.NodeName
    """The image that the guest writes to, where the branch's bitmaps are or will be."""
    persistent: bool
    """Whether that image can hold them."""
    bitmap: block.Bitmap | None
    """The branch's own."""
    next: block.Bitmap | None
    point: naming.Point | None
    unsound: str | None
    """Why what has changed since the point is not known; None: it is."""
    foreign: bool = False
    """There is a bitmap of that name, and it is not ours."""
    marker: naming.BitmapName | None = None
    """The bitmap that is the point's note, if any."""
    below: tuple[monitor_json.BitmapOf, ...] = ()
    """The branch's bitmaps on backing images, which the guest wrote to after the point."""
    below_count: int = 0
    """Bytes that those know to have changed."""

    @property
    def dirty(self) -> int | None:
        """Bytes changed since the point; up to that many where several bitmaps have them."""
        if self.bitmap is None or self.unsound is not None:
            return None
        return self.bitmap.count + self.below_count + (self.next.count if self.next else 0)


@dataclasses.dataclass(frozen=True)
class Images:
    """A disk's images: the one that the guest writes to, then its backing images."""

    chain: tuple[block.Medium, ...]

    @property
    def active(self) -> block.Medium:
        return self.chain[0]


def images(
    root: naming.NodeName, nodes: Mapping[naming.NodeName, block.Medium], graph: block.Graph
) -> Images | None:
    """The images below ROOT, filters passed over; None where they are not known."""
    chain = []
    node: naming.NodeName | None = root
    while node is not None:
        below = graph.roles.get((node, "backing"))
        if node not in nodes or nodes[node].driver in _FILTERS:  # implicit filters are not told
            below = graph.roles.get((node, "file"), below)
        else:
            chain.append(nodes[node])
        node = below
    return Images(tuple(chain)) if chain else None


def line(branch: str, disk: Images, size: int) -> Line:
    """What the disk of guest-visible SIZE bytes has of BRANCH."""
    key = naming.branch_key(branch)
    active = disk.active
    bitmap = active.bitmap(branch)
    next = next_of(active, key)
    marker, point = _point(active, key)
    found = Line(active.node, active.stores_bitmaps, bitmap, next, point, None, marker=marker)
    if point is None:
        return _through_backing(branch, disk, size, found)
    if bitmap is None:
        return dataclasses.replace(found, unsound=f"its bitmap '{branch}' was removed")
    unsound = _reason(bitmap, recording=_records(bitmap, next)) or _resized(point, size)
    return dataclasses.replace(found, unsound=unsound)


def _through_backing(branch: str, disk: Images, size: int, found: Line) -> Line:
    """Where the image was put over that of the last point: the bitmap must go on in each of them,
    as libvirt makes it go on when it takes a snapshot."""
    key = naming.branch_key(branch)
    lower = []
    for medium in disk.chain[1:]:
        lower.append(medium)
        _, point = _point(medium, key)
        if point is not None:
            return _joined(branch, lower, point, size, found)
    if found.bitmap is not None:
        text = f"its bitmap '{branch}' is not a branch's"
        return dataclasses.replace(found, unsound=text, foreign=True)
    return dataclasses.replace(found, unsound="it has no good backup of this branch yet")


def _joined(
    branch: str, lower: Sequence[block.Medium], point: naming.Point, size: int, found: Line
) -> Line:
    base = lower[-1].node
    below = tuple(
        monitor_json.BitmapOf(medium.node, bitmap.name)
        for medium in lower
        if (bitmap := medium.bitmap(branch))
    )
    bitmaps = [medium.bitmap(branch) for medium in lower]
    count = sum(bitmap.count for bitmap in bitmaps if bitmap)
    unsound = None
    if found.bitmap is None:
        unsound = f"an overlay was put over the image '{base}' that has its bitmap"
    elif any(bitmap is None for bitmap in bitmaps):
        unsound = f"a backing image above '{base}' has no bitmap '{branch}'"
    else:
        unsound = _reason(found.bitmap, recording=_records(found.bitmap, found.next))
        for bitmap in bitmaps:
            assert bitmap is not None
            unsound = unsound or _reason(bitmap, bitmap.recording)
            if not unsound and bitmap.granularity != found.bitmap.granularity:
                unsound = "its bitmaps on backing images have another granularity"
    unsound = unsound or _resized(point, size)
    return dataclasses.replace(found, point=point, unsound=unsound, below=below, below_count=count)


def _records(bitmap: block.Bitmap, next: block.Bitmap | None) -> bool:
    """Whether no write is missed: during a backup ``next`` notes what the other does not."""
    return bitmap.recording or (next is not None and next.recording and not next.inconsistent)


def _reason(bitmap: block.Bitmap, recording: bool) -> str | None:
    if bitmap.inconsistent:
        return f"its bitmap '{bitmap.name}' is inconsistent: QEMU did not come to store it"
    if not recording:
        return f"its bitmap '{bitmap.name}' does not record"
    return None


def _resized(point: naming.Point, size: int) -> str | None:
    if point.size == size:
        return None
    return f"it was resized from {point.size} to {size} bytes"


def next_of(medium: block.Medium, key: str) -> block.Bitmap | None:
    """The bitmap that records during a backup of the branch of that KEY."""
    for bitmap in medium.bitmaps:
        if (told := naming.next_of(bitmap.name)) and told[1] == key:
            return bitmap
    return None


def own_of(medium: block.Medium, key: str) -> block.Bitmap | None:
    """The bitmap of the branch's own name, where only the KEY is known."""
    for bitmap in medium.bitmaps:
        if not bitmap.name.startswith(naming.PREFIX) and naming.branch_key(bitmap.name) == key:
            return bitmap
    return None


def _point(
    medium: block.Medium, key: str
) -> tuple[naming.BitmapName, naming.Point] | tuple[None, None]:
    for bitmap in medium.bitmaps:
        told = naming.point_of(bitmap.name)
        if told is not None and told[0] == key:
            return bitmap.name, told[1]
    return None, None


def names(disks: Iterable[Images]) -> list[str]:
    """Every name that a bitmap has and that is not ours internally, in order."""
    found = {
        bitmap.name
        for disk in disks
        for medium in disk.chain
        for bitmap in medium.bitmaps
        if not bitmap.name.startswith(naming.PREFIX)
    }
    return sorted(found)


# --- transactions ---


@dataclasses.dataclass(frozen=True)
class Step:
    """What a backup does to one disk's bitmaps."""

    branch: str
    node: naming.NodeName
    next: naming.BitmapName
    granularity: int
    persistent: bool
    keeps: bool
    """The branch's bitmap is of use and stays, standing still until the backup's end."""
    remove: tuple[naming.BitmapName, ...]
    """Of no use at all: removed with the start."""
    join: tuple[monitor_json.BitmapOf, ...]
    """On backing images: what they know, the branch's own is told at the start."""

    @property
    def own(self) -> monitor_json.BitmapOf:
        return monitor_json.BitmapOf(self.node, naming.BitmapName(self.branch))

    def before(self) -> list[dict[str, Any]]:
        """The actions of a start that come before the instant: ``next`` misses nothing after it."""
        next = monitor_json.BitmapOf(self.node, self.next)
        return [
            monitor_json.bitmap_add(next, self.granularity, self.persistent),
            *(monitor_json.bitmap_merge(self.own, below) for below in self.join),
        ]

    def after(self) -> list[dict[str, Any]]:
        """Those that come after it: the branch's own has everything up to it."""
        remove = [
            monitor_json.bitmap_remove(monitor_json.BitmapOf(self.node, name))
            for name in self.remove
        ]
        return ([monitor_json.bitmap_disable(self.own)] if self.keeps else []) + remove


def advance(
    branch: str, keeps: bool, medium: block.Medium, next: block.Bitmap, point: naming.Point
) -> list[dict[str, Any]]:
    """The actions that set POINT on MEDIUM: what NEXT has is what the branch has."""
    own = monitor_json.BitmapOf(medium.node, naming.BitmapName(branch))
    recent = monitor_json.BitmapOf(medium.node, next.name)
    marker = monitor_json.BitmapOf(medium.node, naming.point_bitmap(branch, point))
    begin = (
        # Enabled before it is told what ``next`` has: a write between is noted by both.
        [monitor_json.bitmap_clear(own), monitor_json.bitmap_enable(own)]
        if keeps
        else [monitor_json.bitmap_add(own, next.granularity, next.persistent)]
    )
    old, _ = _point(medium, naming.branch_key(branch))
    gone = [recent] if old is None else [recent, monitor_json.BitmapOf(medium.node, old)]
    return [
        *begin,
        monitor_json.bitmap_merge(own, recent),
        *map(monitor_json.bitmap_remove, gone),
        monitor_json.bitmap_add(marker, _LARGEST, next.persistent, disabled=True),
    ]


def roll_back(medium: block.Medium, next: block.Bitmap) -> list[dict[str, Any]]:
    """The actions that join on MEDIUM what NEXT has to what the branch has, if anything."""
    told = naming.next_of(next.name)
    assert told is not None
    recent = monitor_json.BitmapOf(medium.node, next.name)
    own = own_of(medium, told[1])
    remove = monitor_json.bitmap_remove(recent)
    if own is None or own.inconsistent:
        return [remove]
    target = monitor_json.BitmapOf(medium.node, own.name)
    if next.inconsistent:
        # What was written meanwhile is not known: the branch's own must not look as if it were.
        return [remove, *([] if own.recording else [monitor_json.bitmap_remove(target)])]
    return [
        monitor_json.bitmap_enable(target),
        monitor_json.bitmap_merge(target, recent),
        remove,
    ]


_LARGEST = 1 << 31
"""Bytes; the granularity of a bitmap that has nothing to tell."""
