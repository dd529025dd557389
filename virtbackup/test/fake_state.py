# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the block layer of a fake QEMU consists of: nodes, drives, jobs, exports, bitmaps. Pure."""

import dataclasses
from typing import Any, Protocol

from virtbackup.test import schema

Message = dict[str, Any]

FORMATS = ("qcow2", "raw", "bochs")
JOB_FILTERS = ("copy-before-write", "backup-top")
"""What a backup job puts over its source; the second before QEMU 6.1, over it as over a backing."""
FILTERS = ("copy-before-write", "snapshot-access")
GUEST_FILTERS = ("throttle", "copy-on-read")
"""Those that a recorded guest may have over a disk's image."""
CLUSTER = 1 << 16
"""Bytes; of images, and of what a job or a bitmap takes for one thing."""


class Image(Protocol):
    """A file that was opened."""

    @property
    def key(self) -> object:
        """The same for the same file."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def header(self) -> bytes:
        """What it begins with."""

    def actual_size(self) -> int:
        """Bytes that it takes."""

    def format(self, size: int) -> None:
        """Make it an empty qcow2 image of SIZE guest-visible bytes. Errors: OSError."""

    def close(self) -> None: ...


@dataclasses.dataclass
class Bitmap:
    """A dirty bitmap; nameless ones are a job's."""

    name: str | None
    granularity: int
    persistent: bool
    recording: bool
    count: int = 0
    """Bytes."""
    export: str | None = None
    """Who uses it."""
    doomed: bool = False
    """Its removal is part of a transaction that is not done yet."""

    def info(self, with_status: bool) -> Message:
        """QAPI's BlockDirtyInfo; WITH_STATUS as before QEMU 6.0."""
        found: Message = {
            "busy": self.export is not None, "count": self.count, "granularity": self.granularity,
            "persistent": self.persistent, "recording": self.recording,
        }  # fmt: skip
        if self.name is not None:
            found["name"] = self.name
        if with_status:
            idle = "active" if self.recording else "disabled"
            found["status"] = "locked" if self.export is not None else idle
        return found


@dataclasses.dataclass
class Node:
    """A block node."""

    name: str
    driver: str
    filename: str
    size: int
    """Guest-visible, bytes."""
    readonly: bool
    children: dict[str, str]
    """Role -> node, as ``file``, ``backing``, ``target``."""
    owned: bool
    """By the monitor: somebody must delete it. Others go with the last node over them."""
    recorded: Message | None = None
    """What ``query-named-block-nodes`` said of it, where it was there from the start."""
    limit: int | None = None
    """Bytes of a raw node that shows only a part of what is below it."""
    offset: int = 0
    """Bytes of what is below a raw node before the first that it shows."""
    no_flush: bool = False
    write_threshold: int = 0
    bitmaps: list[Bitmap] = dataclasses.field(default_factory=list)

    def bitmap(self, name: str) -> Bitmap:
        for bitmap in self.bitmaps:
            if bitmap.name == name:
                return bitmap
        raise schema.Refused(f"Dirty bitmap '{name}' not found")


@dataclasses.dataclass
class Device:
    """A drive of the guest, as ``query-block`` told it, and what is in it."""

    recorded: Message
    root: str | None

    @property
    def name(self) -> str:
        """As the block graph calls it."""
        return self.recorded.get("device") or self.recorded.get("qdev") or ""

    @property
    def qdev(self) -> str:
        """Its device, by id or by place in the object tree; empty without one."""
        qdev: str = self.recorded.get("qdev", "")
        return qdev


@dataclasses.dataclass
class Job:
    """A job: a backup, or the making of an image, which has no nodes and is done at once."""

    id: str
    source: str
    target: str
    filter: str | None
    """Gone once the job has ended."""
    length: int
    auto_dismiss: bool
    status: str = "running"
    paused: bool = False
    """By the user."""
    error: str | None = None
    type: str = "backup"
    broken: bool = False
    """Its scratch image has failed, and the snapshot with it (on-cbw-error=break-snapshot)."""


@dataclasses.dataclass
class Export:
    """An NBD export."""

    id: str
    node: str
    name: str
    description: str | None = None


@dataclasses.dataclass
class State:
    """Everything that a command can change: copied before it, taken back when it fails."""

    nodes: dict[str, Node] = dataclasses.field(default_factory=dict)
    devices: list[Device] = dataclasses.field(default_factory=list)
    jobs: dict[str, Job] = dataclasses.field(default_factory=dict)
    exports: dict[str, Export] = dataclasses.field(default_factory=dict)
    last_number: int = 1000
    """Of an automatic node name."""

    def backing_of(self, node: Node) -> Node | None:
        """What NODE's image is over; for a filter that is what it filters."""
        over_file = node.driver in ("copy-before-write", *GUEST_FILTERS)
        role = "file" if over_file else "backing"
        child = node.children.get(role)
        return None if child is None else self.nodes[child]
