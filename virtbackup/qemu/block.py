# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's disks as QEMU tells them (patch 1: the guest-visible size from the block info).

Pure: replies of ``query-block``, ``query-named-block-nodes`` and ``x-debug-query-block-graph``
in, types out.
"""

import dataclasses
import functools
import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from virtbackup.conf import domain_conf
from virtbackup.qemu import naming, qmp

FILTERS = frozenset(
    {
        "backup-top", "blkdebug", "blklogwrites", "blkreplay", "blkverify", "commit_top",
        "compress", "copy-before-write", "copy-on-read", "mirror_top", "preallocate", "throttle",
    }
)  # fmt: skip
"""Nodes over an image that hold no data, and no persistent bitmaps, themselves."""
FILTERED = ("file", "image", "raw")
"""As what they have that image: blkdebug and blkreplay as the second, blkverify as the last."""
_FETCHED = re.compile(r'(https?|ftps?)://|json:.*"driver": "(https?|ftps?)"', re.DOTALL)
_SECRETS = (
    (r'("(?:[^"\\]*\.)?(?:password|cookie|=keyvalue-pairs)": )"(?:[^"\\]|\\.)*"', r'\1"***"'),
    (r"^(rbd:.*?:(?:key|password)=)(?:[^:\\]|\\.)*", r"\1***"),
    (r"(\b[a-z][a-z+]*://[^/@:%\s\"]*)[:%][^/\s\"]*@", r"\1@"),
)
"""What a file's name has of them, and what is shown in its place: in QEMU's options, in rbd's, and
in a URL behind the user's name."""


@dataclasses.dataclass(frozen=True)
class Bitmap:
    """A dirty bitmap that has a name (QAPI's BlockDirtyInfo)."""

    name: naming.BitmapName
    granularity: int
    """Bytes."""
    count: int
    """Bytes that it knows to have changed."""
    recording: bool
    persistent: bool
    busy: bool
    inconsistent: bool
    """Not stored when the image was last closed: nothing but its name is known."""


@dataclasses.dataclass(frozen=True)
class Medium:
    """What is in a drive: the node at its root."""

    node: naming.NodeName
    driver: str
    filename: str
    """As QEMU has it: with the password of a server, where it was given in that."""
    size: int
    """Guest-visible, bytes; a multiple of 512."""
    readonly: bool
    bitmaps: tuple[Bitmap, ...] = ()
    stores_bitmaps: bool = False
    """Whether the image can hold persistent bitmaps."""
    allocation: int | None = None
    """Bytes that its file takes, where the driver can tell."""
    active: bool = True
    """Not given away, to a migration or a save; told since QEMU 10.0."""
    backing_files: tuple[str | None, ...] = ()
    """What the image itself says its backing image is, then what that says, and so on."""
    below: tuple[str, ...] = ()
    """The names of the images that it has below it in fact, which may be others."""

    @property
    def shown(self) -> str:
        """``filename`` as it may be told: without passwords."""
        shown = self.filename
        for secret, instead in _SECRETS:
            shown = re.sub(secret, instead, shown)
        return shown

    @property
    def offset(self) -> int:
        """Bytes of the file before the first of the disk (a ``raw`` node's)."""
        return _offset(self.filename)

    def overlaps(self, other: "Medium") -> bool:
        """Whether some byte of the same file would be in both, as parts of it."""
        return self.offset < other.offset + other.size and other.offset < self.offset + self.size

    @property
    def tells_place(self) -> bool:
        """Whether ``filename`` says where the data is: not where there is none."""
        return self.filename != "" and re.search(r"^null-|^json:.*\bnull-", self.filename) is None

    @property
    def replays(self) -> bool:
        """Whether it is one whose requests QEMU may record, or has such a one below."""
        of_options = re.search(r'^json:.*"driver": "blkreplay"', self.filename) is not None
        return self.driver == "blkreplay" or of_options

    @property
    def is_fetched(self) -> bool:
        """Whether QEMU has it, or an image below it, from a web or FTP server."""
        return any(map(_FETCHED.match, (self.filename, *self.below)))

    def bitmap(self, name: str) -> Bitmap | None:
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)


@dataclasses.dataclass(frozen=True)
class Disk:
    """One drive of the guest, by the name users know it by."""

    target: str
    medium: Medium | None
    qom_path: str | None
    """The device's place in QEMU's object tree, where it has one that can be asked."""
    removable: bool = False
    drive: str | None = None
    """The drive's id; None where it has none (``-blockdev``)."""
    io_status: str | None = None
    """``ok``, or ``failed`` or ``nospace`` since the guest was paused for it; None: not told."""
    is_part: bool = False
    """No device has it, but what a device has is over it."""

    def definition(self) -> domain_conf.DiskDef:
        """The disk as domain XML tells it."""
        device = "cdrom" if self.removable and (not self.medium or self.medium.readonly) else "disk"
        if self.medium is None:
            return domain_conf.DiskDef(self.target, device)
        protocol, source = _place(self.medium.shown)
        return domain_conf.DiskDef(
            self.target,
            device,
            type="file" if protocol is None else "network",
            source=source,
            protocol=protocol,
            format=None if self.medium.driver in FILTERS else self.medium.driver,
            readonly=self.medium.readonly,
            capacity=self.medium.size,
            is_part=self.is_part,
        )


def _place(filename: str) -> tuple[str | None, str]:
    """(Protocol of the network, None for none; what libvirt calls it) of a file that QEMU tells."""
    if rbd := re.fullmatch(r"rbd:([^:@]+).*", filename, re.DOTALL):
        return "rbd", rbd[1]
    if uri := re.fullmatch(r"([a-z]+)(?:\+[a-z]+)?://[^/?]*/?([^?]*).*", filename, re.DOTALL):
        return uri[1], urllib.parse.unquote(uri[2]) or uri[1]
    return None, filename


def parse_block(reply: Any, targets: Mapping[str, str] | None = None) -> tuple[Disk, ...]:
    """``query-block``: every drive but the flash chips that hold firmware.

    A disk's name is its device's id, else its drive's id, else its node's name. With TARGETS, it is
    what those call the device of that id, and no other drive is told.
    """
    disks: list[Disk] = []
    taken: set[str] = set()
    for item in _items(reply):
        qdev, drive = _name(item, "qdev"), _name(item, "device")
        if re.match(r"/machine/[a-z]+\.flash\d", qdev) or re.match(r"pflash\d", drive):
            continue
        inserted = item.get("inserted")
        medium = None if inserted is None else _parse_medium(inserted)
        names: tuple[str, ...] = (_device_id(qdev), drive, medium.node if medium else "")
        if targets is not None:
            names = (targets.get(_device_id(qdev), ""),)
        target = next((name for name in names if name and name not in taken), None)
        if target is not None:
            taken.add(target)
            status = _name(item, "io-status") or None
            removable = item.get("removable") is True
            disks.append(Disk(target, medium, _qom_path(qdev), removable, drive or None, status))
    return tuple(disks)


def with_parts(disks: tuple[Disk, ...], graph: "Graph | None") -> tuple[Disk, ...]:
    """DISKS, those noted that another is made of, as ``-drive`` can name an image for the sake of
    another drive."""
    if graph is None or all(disk.qom_path for disk in disks):
        return disks
    parts = graph.below(disk.medium.node for disk in disks if disk.medium and disk.qom_path)
    return tuple(
        dataclasses.replace(disk, is_part=True)
        if disk.medium and not disk.qom_path and disk.medium.node in parts
        else disk
        for disk in disks
    )


def parse_named_nodes(reply: Any) -> dict[naming.NodeName, Medium]:
    """``query-named-block-nodes``: every node, as if it were in a drive."""
    media = (_parse_medium(item) for item in _items(reply))
    return {medium.node: medium for medium in media}


def parse_actual_sizes(reply: Any) -> dict[naming.NodeName, int]:
    """``query-named-block-nodes``: node -> bytes its file takes, where the driver can tell."""
    return {
        naming.NodeName(_name(item, "node-name")): size
        for item in _items(reply)
        if isinstance(item.get("image"), dict)
        and _is_size(size := item["image"].get("actual-size"))
    }


def parse_write_thresholds(reply: Any) -> dict[naming.NodeName, int]:
    """``query-named-block-nodes``: node -> its write threshold in bytes, 0 once it was passed."""
    return {
        naming.NodeName(_name(item, "node-name")): threshold
        for item in _items(reply)
        if _is_size(threshold := item.get("write_threshold"))
    }


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What was done in a drive since QEMU began: requests, bytes, and ns that they took."""

    rd_operations: int = 0
    rd_bytes: int = 0
    rd_time_ns: int = 0
    wr_operations: int = 0
    wr_bytes: int = 0
    wr_time_ns: int = 0
    flush_operations: int = 0
    flush_time_ns: int = 0

    def __add__(self, other: "Statistics") -> "Statistics":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Statistics(*(one + another for one, another in pairs))


def parse_blockstats(reply: Any) -> dict[str, Statistics]:
    """``query-blockstats``: by each way to name a drive, its device's place in QEMU's object tree,
    its own id, and its root node."""
    found: dict[str, Statistics] = {}
    for item in _items(reply):
        statistics = _parse_statistics(item.get("stats"))
        names = (_qom_path(_name(item, "qdev")), _name(item, "device"), _name(item, "node-name"))
        found.update((name, statistics) for name in names if name)
    return found


def _parse_statistics(stats: Any) -> Statistics:
    match stats:
        case {
            "rd_operations": rd_operations,
            "rd_bytes": rd_bytes,
            "rd_total_time_ns": rd_time_ns,
            "wr_operations": wr_operations,
            "wr_bytes": wr_bytes,
            "wr_total_time_ns": wr_time_ns,
            "flush_operations": flush_operations,
            "flush_total_time_ns": flush_time_ns,
        }:
            counts = (
                rd_operations, rd_bytes, rd_time_ns, wr_operations, wr_bytes, wr_time_ns,
                flush_operations, flush_time_ns,
            )  # fmt: skip
            if all(map(_is_size, counts)):
                return Statistics(*counts)
    raise _unexpected("statistics", stats)


def disks_of_nodes(
    nodes: Mapping[naming.NodeName, Medium], graph: "Graph | None"
) -> tuple[Disk, ...]:
    """The disks of a process without devices (qemu-storage-daemon): nodes that no node is over, but
    for those of jobs, ours, and ``snapshot-access``, which shows what a disk was."""
    media = {
        node: medium
        for node, medium in nodes.items()
        if not (node.startswith("#") or naming.backup_of(node))
        and medium.driver != "snapshot-access"
    }
    parts = graph.below(media) if graph else ()
    return tuple(Disk(node, medium, None) for node, medium in media.items() if node not in parts)


def _parse_medium(inserted: Any) -> Medium:
    match inserted:
        case {
            "node-name": str(node),
            "drv": str(driver),
            "ro": bool(readonly),
            "file": str(filename),
            "image": {"virtual-size": size, **image},
        } if qmp.is_plain(node) and qmp.is_plain(driver) and _is_size(size):
            return Medium(
                naming.NodeName(node),
                driver,
                filename,
                size,
                readonly,
                _parse_bitmaps(inserted.get("dirty-bitmaps", [])),
                driver == "qcow2" and _stores_bitmaps(image),
                allocation if _is_size(allocation := image.get("actual-size")) else None,
                inserted.get("active") is not False,
                tuple(_backing_files(image)),
                tuple(_below(image)),
            )
    raise _unexpected("info", inserted)


def _backing_files(image: Any) -> Iterator[str | None]:
    while isinstance(image, dict):
        told = image.get("backing-filename")
        yield told if isinstance(told, str) else None
        image = image.get("backing-image")


def _below(image: Any) -> Iterator[str]:
    while isinstance(image := image.get("backing-image"), dict):
        if isinstance(told := image.get("filename"), str):
            yield told


def _offset(filename: str) -> int:
    """As ``Medium.offset``; 0 where a name is too long for QEMU to tell it."""
    if not filename.startswith("json:"):
        return 0
    try:
        options = json.loads(filename.removeprefix("json:"))
    except (ValueError, RecursionError):
        return 0
    offset = 0
    while isinstance(options, dict):
        if options.get("driver") == "raw":
            told = str(options.get("offset", 0))
            offset += int(told) if re.fullmatch(r"[0-9]{1,19}", told) else 0
        elif options.get("driver") not in FILTERS:
            break
        options = next((options[role] for role in FILTERED if role in options), None)
    return offset


def _stores_bitmaps(image: Any) -> bool:
    """Whether a qcow2 IMAGE is of version 3, and its data is not to be a raw image by itself."""
    match image:
        case {"format-specific": {"data": {"compat": str(compat), **data}}}:
            return compat != "0.10" and data.get("data-file-raw") is not True
    return False


def _parse_bitmaps(reply: Any) -> tuple[Bitmap, ...]:
    """The bitmaps that have a name: those without are jobs'."""
    return tuple(_parse_bitmap(item) for item in _items(reply) if "name" in item)


def _parse_bitmap(item: Mapping[str, Any]) -> Bitmap:
    """Before QEMU 4.0 there is a status in place of what is left out here."""
    match item:
        case {"name": str(name), "granularity": granularity, "count": count} if _is_size(
            granularity
        ) and _is_size(count):
            status = item.get("status")
            return Bitmap(
                naming.BitmapName(name),
                granularity,
                count,
                recording=item.get("recording", status == "active") is True,
                persistent=item.get("persistent") is True,
                busy=item.get("busy", status in ("frozen", "locked")) is True,
                inconsistent=item.get("inconsistent") is True,
            )
    raise _unexpected("bitmap", item)


def _is_size(value: Any) -> TypeGuard[int]:
    """Whether VALUE is bytes as QEMU counts them."""
    return type(value) is int and 0 <= value < 1 << 63


def _name(item: Mapping[str, Any], key: str) -> str:
    """A name that may be left out."""
    value = item.get(key, "")
    if isinstance(value, str) and qmp.is_plain(value):
        return value
    raise qmp.ProtocolError(f"unexpected block info: {key} is {qmp.shown(value)}")


def _unexpected(what: str, value: Any) -> qmp.ProtocolError:
    return qmp.ProtocolError(f"unexpected block {what}: {qmp.shown(value)}")


def _device_id(qdev: str) -> str:
    """The user's id in a ``qdev``: the id itself, or a path under /machine/peripheral to what is
    within a virtio or a USB device. Of an id with a slash a path tells no end."""
    if match := re.fullmatch(r"/machine/peripheral/([^/]+)(/virtio-backend|/\1\.0/.+)?", qdev):
        return match[1]
    return "" if qdev.startswith("/") else qdev


def _qom_path(qdev: str) -> str | None:
    if not qdev:
        return None
    return (
        qdev.removesuffix("/virtio-backend")
        if qdev.startswith("/")
        else (f"/machine/peripheral/{qdev}")
    )


def _items(reply: Any) -> list[dict[str, Any]]:
    match reply:
        case list(items) if all(isinstance(item, dict) for item in items):
            return items
    raise _unexpected("info", reply)


@dataclasses.dataclass(frozen=True)
class Backing:
    """That NODE has BELOW as its backing image."""

    node: naming.NodeName
    below: naming.NodeName
    told: str | None
    """What NODE's image itself says it is, which whoever merges both into one changes."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """Who is over whom in the block layer: (kind, name) pairs, kinds as QEMU's
    XDbgBlockGraphNodeType (block-backend, block-job, block-driver)."""

    children: Mapping[tuple[str, str], frozenset[tuple[str, str]]]
    roles: Mapping[tuple[naming.NodeName, str], naming.NodeName] = dataclasses.field(
        default_factory=dict
    )
    """(a node, ``file`` or ``backing``) -> the node that it has below it as that."""
    given_away: frozenset[naming.NodeName] = frozenset()
    """Nodes that drives have and none of them may so much as read: QEMU has given them away, to a
    migration or a save, or has yet to be given them. Every QEMU that has a graph tells this."""

    def nodes(self) -> frozenset[naming.NodeName]:
        """Every node."""
        return frozenset(
            naming.NodeName(name) for kind, name in self.children if kind == "block-driver"
        )

    def below(self, nodes: Iterable[naming.NodeName]) -> frozenset[naming.NodeName]:
        """Every node that can be reached from another, which is one of NODES."""
        directly = (self.children.get(("block-driver", node), ()) for node in nodes)
        found = _reached(self.children, (child for below in directly for child in below))
        return frozenset(naming.NodeName(name) for kind, name in found if kind == "block-driver")

    def nodes_over(self, node: naming.NodeName) -> frozenset[naming.NodeName]:
        """Every node from which NODE can be reached."""
        over = _reached(self._parents, [("block-driver", node)]) - {("block-driver", node)}
        return frozenset(naming.NodeName(name) for kind, name in over if kind == "block-driver")

    def shows(self, root: naming.NodeName, node: naming.NodeName) -> bool:
        """Whether NODE is ROOT, or somewhere below it."""
        return root == node or root in self.nodes_over(node)

    def children_of(self, node: naming.NodeName) -> frozenset[naming.NodeName]:
        """The nodes directly below NODE."""
        below = self.children.get(("block-driver", node), frozenset())
        return frozenset(naming.NodeName(name) for kind, name in below if kind == "block-driver")

    def is_filtered(self, root: naming.NodeName, node: naming.NodeName) -> bool:
        """Whether ROOT, which is a filter, is over NODE with nothing but filters in between."""
        return self.filters_over(node, root) is not None

    def filters_over(self, node: naming.NodeName, root: naming.NodeName) -> int | None:
        """How many filters there are from ROOT, which is one, to NODE; None: others, too. Those of
        jobs are told to be backed by it up to 5.2, where two in a row cannot be known for it."""
        count = 0
        below = self.roles.get((root, "backing"))
        while root != node:
            found = self.filtered_by(root) or below
            if found is None:
                return None
            root, below = found, None
            count += 1
        return count

    def filtered_by(self, node: naming.NodeName) -> naming.NodeName | None:
        """What NODE, a filter or ``raw``, has below it."""
        found = (self.roles.get((node, role)) for role in FILTERED)
        return next(filter(None, found), None)

    def backing_of(
        self, image: Medium, nodes: Mapping[naming.NodeName, Medium]
    ) -> tuple[Backing, ...]:
        """IMAGE and those that it is backed by, as far as there are no filters between them. What
        IMAGE does not tell of the others, NODES do."""
        found: list[Backing] = []
        node = image.node
        while below := self.roles.get((node, "backing")):
            told = image.backing_files[len(found) :]
            if not told and node in nodes:
                told = nodes[node].backing_files
            if not told:
                break
            found.append(Backing(node, below, told[0]))
            node = below
        return tuple(found)

    def is_backed(self, backing: Backing) -> bool:
        """Whether it is still as BACKING says; filters in between do not matter."""
        now = self.roles.get((backing.node, "backing"))
        return now is not None and self.is_filtered(now, backing.below)

    def within(self, image: naming.NodeName) -> frozenset[naming.NodeName]:
        """The nodes below IMAGE that are none of its backing images, nor at the very bottom: those
        of the quorum that it is, say, or one that it shows a part of."""
        found: set[naming.NodeName] = set()
        todo = [image]
        while todo:
            node = todo.pop()
            below = {
                child for (parent, role), child in self.roles.items()
                if parent == node and role != "backing" and self.children_of(child)
            }  # fmt: skip
            todo += below - found
            found |= below
        return frozenset(found)

    def stores_of(self, node: naming.NodeName) -> frozenset[naming.NodeName]:
        """The nodes at the very bottom below NODE, or NODE itself: where its data is kept."""
        below = _reached(self.children, [("block-driver", node)])
        return frozenset(
            naming.NodeName(name)
            for kind, name in below
            if kind == "block-driver" and not self.children.get((kind, name))
        )

    def is_unused(self, node: naming.NodeName) -> bool:
        """Whether NODE is there and nothing is over it: no device, export, job or other node."""
        vertex = ("block-driver", node)
        return vertex in self.children and vertex not in self._parents

    def jobs_on(self, node: naming.NodeName) -> frozenset[naming.JobId]:
        """The block jobs that work above NODE (a filter hides it then) or below it."""
        vertex = ("block-driver", node)
        if vertex not in self._near_jobs:
            return frozenset()
        found = _reached(self._parents, [vertex])
        for below in _reached(self.children, [vertex]):
            found |= self._parents.get(below, frozenset())
        return frozenset(naming.JobId(name) for kind, name in found if kind == "block-job")

    @functools.cached_property
    def _parents(self) -> Mapping[tuple[str, str], frozenset[tuple[str, str]]]:
        """Who is over each that somebody is over."""
        turned = ((c, parent) for parent, children in self.children.items() for c in children)
        return _group((), turned)

    @functools.cached_property
    def _near_jobs(self) -> set[tuple[str, str]]:
        """All that is below a job, or over what is directly below one. So that asking disk after
        disk, as a rule without a job, does not walk the whole graph each time."""
        jobs = [vertex for vertex in self.children if vertex[0] == "block-job"]
        directly = [child for job in jobs for child in self.children[job]]
        return _reached(self.children, jobs) | _reached(self._parents, directly)


def _reached(
    edges: Mapping[tuple[str, str], frozenset[tuple[str, str]]], start: Iterable[tuple[str, str]]
) -> set[tuple[str, str]]:
    """START, and all that EDGES lead to from there."""
    found: set[tuple[str, str]] = set()
    todo = list(start)
    while todo:
        vertex = todo.pop()
        if vertex not in found:
            found.add(vertex)
            todo.extend(edges.get(vertex, ()))
    return found


def parse_graph(reply: Any) -> Graph:
    """``x-debug-query-block-graph``."""
    match reply:
        case {"nodes": list(nodes), "edges": list(edges)}:
            pass
        case _:
            raise _unexpected("graph", reply)
    vertices = dict(map(_parse_vertex, nodes))
    found = [_parse_edge(edge, vertices) for edge in edges]
    roles = {
        (naming.NodeName(edge.parent[1]), edge.role): naming.NodeName(edge.child[1])
        for edge in found
        if edge.parent[0] == edge.child[0] == "block-driver"
    }
    drives = [edge for edge in found if edge.parent[0] == "block-backend"]
    used = {edge.child for edge in drives if edge.permissions}
    given_away = {naming.NodeName(edge.child[1]) for edge in drives if edge.child not in used}
    pairs = [(edge.parent, edge.child) for edge in found]
    return Graph(_group(vertices.values(), pairs), roles, frozenset(given_away))


def _parse_vertex(node: Any) -> tuple[int, tuple[str, str]]:
    match node:
        case {"id": id, "type": str(kind), "name": str(name)} if type(id) is int:
            return id, (kind, name)
    raise _unexpected("graph", node)


@dataclasses.dataclass(frozen=True)
class _Edge:
    """PARENT has CHILD below it, as its ROLE, and may do with it what PERMISSIONS say."""

    parent: tuple[str, str]
    child: tuple[str, str]
    role: str
    permissions: tuple[Any, ...]


def _parse_edge(edge: Any, vertices: Mapping[int, tuple[str, str]]) -> _Edge:
    match edge:
        case {"parent": int(parent), "child": int(child), "name": str(role), "perm": list(perm)}:
            if parent in vertices and child in vertices:
                return _Edge(vertices[parent], vertices[child], role, tuple(perm))
    raise _unexpected("graph", edge)


def _group(
    vertices: Iterable[tuple[str, str]],
    pairs: Iterable[tuple[tuple[str, str], tuple[str, str]]],
) -> dict[tuple[str, str], frozenset[tuple[str, str]]]:
    children: dict[tuple[str, str], set[tuple[str, str]]] = {vertex: set() for vertex in vertices}
    for parent, child in pairs:
        children.setdefault(parent, set()).add(child)
    return {vertex: frozenset(below) for vertex, below in children.items()}
