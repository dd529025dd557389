# SPDX-License-Identifier: LGPL-2.1-or-later
"""Branches: what a disk's bitmaps tell of its lines of incremental backups. Pure.

A branch has four bitmaps on a disk, all on the image that the guest writes to:

* one of the branch's own name. Between backups it records what changes; during one it stands still,
  to be exported;
* ``next``, during a backup only: records from the start's instant on;
* one that is always empty, as it never records, and whose name is the point that the first is
  relative to;
* a mark that makes the first one ours: without mark or point it is somebody else's. The point does
  not do for that. QEMU takes a bitmap that is removed out of the image at once and puts a new one
  in when it closes the image: after a QEMU that was killed there may be neither point, but the
  mark is in the image as long as the branch's bitmap is. It records, as libvirt makes bitmaps that
  do go on in overlays and copies.

A good backup makes ``next`` the branch's bitmap and sets the point; any other end joins both again.
Either is one transaction for all disks: at every instant the two have every change since the point.
Whoever removes, ends or replaces one of them meanwhile makes the branch unsound. What nobody can
see: a bitmap that is cleared, or replaced where there is no ``next`` (between two backups, or by
somebody who removed both), one that is ended between the look at it and the transaction of a start
or a stop, a disk that shrinks and grows again to what it was, as QEMU does not
note that as a change, nor a backing image that is put in another's place, and an overlay with exact
copies of all bitmaps, for whose sake the image below was then given up (``block-stream``).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from virtbackup.qemu import block, monitor_json, naming

DEFAULT_GRANULARITY = 65536
"""Bytes."""
_MOST_BITS = 1 << 31
"""Of a bitmap: 256 MiB of QEMU's memory. To join two QEMU goes through all of them, and the guest's
I/O waits: for half a second then, and for five with 7 TiB at 512 bytes."""


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
    beside: tuple[naming.BitmapName, ...] = ()
    """The bitmaps on that image that are the point's note and the mark."""
    marked: bool = False
    """The mark is one of them."""
    size: int = 0
    """Guest-visible, bytes."""
    below: tuple[monitor_json.BitmapOf, ...] = ()
    """The branch's bitmaps on backing images, which the guest wrote to after the point."""
    below_count: int = 0
    """Bytes that those know to have changed."""

    @property
    def dirty(self) -> int | None:
        """Bytes changed since the point; up to that many where several bitmaps have them."""
        if self.bitmap is None or self.unsound is not None:
            return None
        count = self.bitmap.count + self.below_count + (self.next.count if self.next else 0)
        return min(count, self.size)  # of a bit's bytes the last may be beyond the end


@dataclasses.dataclass(frozen=True)
class Images:
    """A disk's images: the one that the guest writes to, then its backing images."""

    chain: tuple[block.Medium, ...]

    @property
    def active(self) -> block.Medium:
        return self.chain[0]


def least_granularity(size: int) -> int:
    """Of a bitmap of a disk of SIZE bytes; bytes."""
    return max(512, 1 << (-(-size // _MOST_BITS) - 1).bit_length())


def granularity(size: int) -> int:
    """Of a bitmap of a disk of SIZE bytes where nobody says; bytes."""
    return max(DEFAULT_GRANULARITY, least_granularity(size))


def images(
    root: naming.NodeName, nodes: Mapping[naming.NodeName, block.Medium], graph: block.Graph
) -> Images | None:
    """The images below ROOT, filters passed over; None where they are not known."""
    chain = []
    node: naming.NodeName | None = root
    while node is not None:
        below = graph.roles.get((node, "backing"))
        if (
            node not in nodes or nodes[node].driver in block.FILTERS
        ):  # implicit filters are not told
            below = graph.filtered_by(node) or below
        else:
            chain.append(nodes[node])
        node = below
    return Images(tuple(chain)) if chain else None


def line(branch: str, disk: Images, size: int, target: str) -> Line:
    """What the disk that is called TARGET, of guest-visible SIZE bytes, has of BRANCH."""
    key = naming.branch_key(branch)
    active = disk.active
    bitmap = active.bitmap(branch)
    next = next_of(active, key)
    found = Line(
        active.node, active.stores_bitmaps, bitmap, next, _point(active, key), None,
        beside=_beside(active, key), marked=_mark(active, key) is not None, size=size,
    )  # fmt: skip
    point = found.point
    if point is None:
        return _through_backing(branch, disk, target, found)
    if bitmap is None:
        return dataclasses.replace(found, unsound=f"its bitmap '{branch}' was removed")
    if lower := _down_to(point, disk.chain[1:], key):
        return _joined(branch, active, lower, point, target, found)
    unsound = _own_reason(bitmap, next) or _broken(branch, active) or _another(point, size, target)
    return dataclasses.replace(found, unsound=unsound)


def _through_backing(branch: str, disk: Images, target: str, found: Line) -> Line:
    """Where the image was put over that of the last point: the bitmap must go on in each of them,
    as libvirt makes it go on when it takes a snapshot."""
    key = naming.branch_key(branch)
    lower = disk.chain[1:]
    point = next((told for medium in lower if (told := _point(medium, key))), None)
    if point is not None:
        return _joined(branch, disk.active, _down_to(point, lower, key), point, target, found)
    if found.bitmap is not None and found.marked:
        reason = _own_reason(found.bitmap, found.next)
        unsound = reason or "its last good backup is not known any more"
        return dataclasses.replace(found, unsound=unsound)
    if found.bitmap is not None:
        text = f"its bitmap '{branch}' is not a branch's"
        return dataclasses.replace(found, unsound=text, foreign=True)
    return dataclasses.replace(found, unsound="it has no good backup of this branch yet")


def _down_to(
    point: naming.Point, lower: Sequence[block.Medium], key: str
) -> Sequence[block.Medium]:
    """Those of the images LOWER down to the last that has POINT, too: the overlays over it got a
    copy of its note, as somebody has every bitmap go on. Empty: none has."""
    having = [n for n, medium in enumerate(lower) if _point(medium, key) == point]
    return lower[: having[-1] + 1] if having else ()


def _joined(
    branch: str,
    active: block.Medium,
    lower: Sequence[block.Medium],
    point: naming.Point,
    target: str,
    found: Line,
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
        unsound = _own_reason(found.bitmap, found.next)
        for bitmap in bitmaps:
            assert bitmap is not None
            unsound = unsound or _reason(bitmap, bitmap.recording)
        for medium in (active, *lower):
            unsound = unsound or _broken(branch, medium)
        for bitmap in bitmaps:
            assert bitmap is not None
            if not unsound and bitmap.granularity != found.bitmap.granularity:
                unsound = "its bitmaps on backing images have another granularity"
    unsound = unsound or _another(point, found.size, target)
    for medium in lower:
        if not unsound and medium.size != found.size:
            unsound = (
                f"its backing image '{medium.node}' is of {medium.size} bytes: it was resized in"
                " between"
            )
    return dataclasses.replace(found, point=point, unsound=unsound, below=below, below_count=count)


def _own_reason(bitmap: block.Bitmap, next: block.Bitmap | None) -> str | None:
    """Why the branch's own BITMAP, with NEXT during a backup, misses writes; None: it does not."""
    if next is None or bitmap.inconsistent:
        return _reason(bitmap, bitmap.recording)
    if bitmap.recording:
        return _made_meanwhile(bitmap.name)  # ours stands still
    return _reason(bitmap, recording=_is_whole(next))


def _made_meanwhile(name: str) -> str:
    return f"its bitmap '{name}' was made by somebody else meanwhile"


def _reason(bitmap: block.Bitmap, recording: bool) -> str | None:
    if bitmap.inconsistent:
        return f"its bitmap '{bitmap.name}' is inconsistent: QEMU did not come to store it"
    if not recording:
        return f"its bitmap '{bitmap.name}' does not record"
    return None


def _broken(branch: str, medium: block.Medium) -> str | None:
    """Why the branch's own bitmap on MEDIUM, which is good itself, tells nothing: those beside it
    show that QEMU was killed, so it has been made since."""
    key = naming.branch_key(branch)
    beside = _beside(medium, key)
    if any(bitmap.inconsistent for bitmap in medium.bitmaps if bitmap.name in beside):
        return f"its bitmap '{branch}' was made after QEMU did not come to store another"
    return None


def _another(point: naming.Point, size: int, target: str) -> str | None:
    """Why what the disk was at POINT is no base of it now, when it has SIZE and is TARGET."""
    if point.disk not in (None, naming.disk_key(target)):
        # Whoever has its last backup has it by that name, and maybe another disk's by this one.
        return "at its last good backup it was called otherwise"
    if point.size != size:
        return f"it was resized from {point.size} to {size} bytes"
    return None


def next_of(medium: block.Medium, key: str) -> block.Bitmap | None:
    """The bitmap that records during a backup of the branch of that KEY."""
    for bitmap in medium.bitmaps:
        if (told := naming.next_of(bitmap.name)) and told[1] == key:
            return bitmap
    return None


def own_of(medium: block.Medium, key: str) -> block.Bitmap | None:
    """The bitmap of the branch's own name, where only the KEY is known."""
    for bitmap in medium.bitmaps:
        if naming.branch_key(bitmap.name) == key:
            return bitmap
    return None


def _point(medium: block.Medium, key: str) -> naming.Point | None:
    """The point that is noted on MEDIUM. A note that records was not made by us: somebody had every
    bitmap go on in an overlay, and what changed before is not known here."""
    for bitmap in medium.bitmaps:
        told = naming.point_of(bitmap.name)
        if told is not None and told[0] == key and not bitmap.recording:
            return told[1]
    return None


def _mark(medium: block.Medium, key: str) -> block.Bitmap | None:
    return next((b for b in medium.bitmaps if naming.mark_of(b.name) == key), None)


def _points(medium: block.Medium, key: str) -> tuple[naming.BitmapName, ...]:
    """The notes of points of the branch of that KEY."""
    told = ((bitmap.name, naming.point_of(bitmap.name)) for bitmap in medium.bitmaps)
    return tuple(name for name, point in told if point is not None and point[0] == key)


def _beside(medium: block.Medium, key: str) -> tuple[naming.BitmapName, ...]:
    mark = _mark(medium, key)
    return (*_points(medium, key), *((mark.name,) if mark else ()))


def names(disks: Iterable[Images]) -> list[str]:
    """Every name that a bitmap has and that is not ours internally, in order."""
    found = {
        bitmap.name
        for disk in disks
        for medium in disk.chain
        for bitmap in medium.bitmaps
        if not naming.is_own_bitmap(bitmap.name)
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
    mark: bool = False
    """The branch's bitmap has no mark yet, as somebody else had it go on in an overlay."""

    @property
    def own(self) -> monitor_json.BitmapOf:
        return monitor_json.BitmapOf(self.node, naming.BitmapName(self.branch))

    def before(self) -> list[dict[str, Any]]:
        """The actions of a start that come before the instant: ``next`` misses nothing after it."""
        next = monitor_json.BitmapOf(self.node, self.next)
        return [
            monitor_json.bitmap_add(next, self.granularity, self.persistent),
            *([_add_mark(self.node, self.branch, self.persistent)] if self.mark else []),
            *(monitor_json.bitmap_merge(self.own, below) for below in self.join),
        ]

    def after(self) -> list[dict[str, Any]]:
        """Those that come after it: the branch's own has everything up to it."""
        remove = [
            monitor_json.bitmap_remove(monitor_json.BitmapOf(self.node, name))
            for name in self.remove
        ]
        return ([monitor_json.bitmap_disable(self.own)] if self.keeps else []) + remove


def guard(bitmap: monitor_json.BitmapOf) -> dict[str, Any]:
    """The action that begins BITMAP, of no branch."""
    return monitor_json.bitmap_add(bitmap, _LARGEST, persistent=False, disabled=True)


def step(branch: str, line: Line, next: naming.BitmapName, granularity: int) -> Step:
    """What a backup of BRANCH does where there is LINE; NEXT is what it records in meanwhile."""
    keeps = line.bitmap is not None and line.unsound is None
    useless = (*((line.bitmap.name,) if line.bitmap else ()), *line.beside)
    return Step(
        branch=branch,
        node=line.node,
        next=next,
        granularity=granularity,
        persistent=line.persistent,
        keeps=keeps,
        remove=() if keeps else useless,
        join=line.below if keeps else (),
        mark=keeps and not line.marked,
    )


def trouble(branch: str, keeps: bool, medium: block.Medium, next: block.Bitmap) -> str | None:
    """Why what NEXT has cannot be the branch's: somebody had a hand in it. None: it can."""
    if medium.readonly:
        return f"an overlay was put over its image '{medium.node}'"
    if not _is_whole(next):
        return f"its bitmap '{next.name}' does not record"
    own = medium.bitmap(branch)
    if keeps and own is None:
        return f"its bitmap '{branch}' was removed"
    if own is not None and (not keeps or own.recording):
        return _made_meanwhile(branch)
    return None


def set_point(
    branch: str, keeps: bool, medium: block.Medium, next: block.Bitmap, point: naming.Point
) -> list[dict[str, Any]]:
    """The actions that set POINT on MEDIUM: what NEXT has is what the branch has."""
    key = naming.branch_key(branch)
    own = monitor_json.BitmapOf(medium.node, naming.BitmapName(branch))
    recent = monitor_json.BitmapOf(medium.node, next.name)
    note = monitor_json.BitmapOf(medium.node, naming.point_bitmap(branch, point))
    begin = (
        # Enabled before it is told what ``next`` has: a write between is noted by both.
        [monitor_json.bitmap_clear(own), monitor_json.bitmap_enable(own)]
        if keeps
        else [monitor_json.bitmap_add(own, next.granularity, next.persistent)]
    )
    if _mark(medium, key) is None:
        begin.append(_add_mark(medium.node, branch, next.persistent))
    return [
        *begin,
        monitor_json.bitmap_merge(own, recent),
        *_remove(medium, _points(medium, key)),
        monitor_json.bitmap_add(note, _LARGEST, next.persistent, disabled=True),
    ]


def begin(branch: str, line: Line, point: naming.Point) -> list[dict[str, Any]]:
    """The actions that begin BRANCH where LINE is, with POINT, which is now."""
    own = monitor_json.BitmapOf(line.node, naming.BitmapName(branch))
    note = monitor_json.BitmapOf(line.node, naming.point_bitmap(branch, point))
    return [
        monitor_json.bitmap_add(own, granularity(line.size), line.persistent),
        _add_mark(line.node, branch, line.persistent),
        monitor_json.bitmap_add(note, _LARGEST, line.persistent, disabled=True),
    ]


def remove(medium: block.Medium, bitmap: block.Bitmap) -> list[dict[str, Any]]:
    """The action that removes BITMAP from MEDIUM."""
    return _remove(medium, [bitmap.name])


def roll_back(medium: block.Medium, next: block.Bitmap) -> list[dict[str, Any]]:
    """The actions that join on MEDIUM what NEXT has to what the branch has, if anything."""
    told = naming.next_of(next.name)
    assert told is not None
    _, key = told
    gone = remove(medium, next)
    own = own_of(medium, key)
    if own is None or own.inconsistent or not _beside(medium, key):
        return gone
    if own.recording:
        # It stood still, so it is another one, or missed what was written before it was enabled.
        return [*gone, *_remove(medium, _points(medium, key))]
    if not _is_whole(next):
        return gone  # and what was written is not known: the branch's own stands still for ever
    target = monitor_json.BitmapOf(medium.node, own.name)
    recent = monitor_json.BitmapOf(medium.node, next.name)
    return [
        # It does not record: this only fails where it is gone by now, and nothing else is done then
        # (capabilities.ENABLE_CRASH).
        monitor_json.bitmap_disable(target),
        monitor_json.bitmap_enable(target),
        monitor_json.bitmap_merge(target, recent),
        *gone,
    ]


def disown(
    medium: block.Medium, backup: naming.BackupId, fork: str | None = None
) -> list[dict[str, Any]]:
    """The actions that forget on MEDIUM a point that BACKUP set and nobody was told of, and the
    FORK that began with it."""
    told = ((bitmap.name, naming.point_of(bitmap.name)) for bitmap in medium.bitmaps)
    points = [name for name, point in told if point is not None and point[1].backup == backup]
    if fork is None or not points:
        return _remove(medium, points)
    key = naming.branch_key(fork)
    own = [bitmap.name for bitmap in (own_of(medium, key), _mark(medium, key)) if bitmap]
    return _remove(medium, [*own, *points])


def _is_whole(next: block.Bitmap) -> bool:
    """Whether NEXT has every write since it began."""
    return next.recording and not next.inconsistent


def _remove(medium: block.Medium, names: Iterable[naming.BitmapName]) -> list[dict[str, Any]]:
    return [monitor_json.bitmap_remove(monitor_json.BitmapOf(medium.node, name)) for name in names]


def _add_mark(node: naming.NodeName, branch: str, persistent: bool) -> dict[str, Any]:
    mark = monitor_json.BitmapOf(node, naming.mark_bitmap(branch))
    return monitor_json.bitmap_add(mark, _LARGEST, persistent)


_LARGEST = 1 << 31
"""Bytes; the granularity of a bitmap that has nothing to tell."""
