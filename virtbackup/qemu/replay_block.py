# SPDX-License-Identifier: LGPL-2.1-or-later
"""The block layer of a fake QEMU: nodes, jobs, exports, bitmaps (QEMU's block.c, blockdev.c). Pure.

It begins as a recording's queries tell it and is changed by QMP commands with QEMU's rules and
words, which were measured (7.2.22, 10.0.13, 11.1.3; 5.2.0 where ``old_words``). What takes no part
in a backup is not here. Nothing is ever read or written: contents are the server's affair.
"""

import copy
import dataclasses
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from virtbackup.qemu.schema import Refused

Message = dict[str, Any]

FORMATS = ("qcow2", "raw", "bochs")
_JOB_FILTERS = ("copy-before-write", "backup-top")
"""What a backup job puts over its source; the second before QEMU 6.1, over it as over a backing."""
FILTERS = ("copy-before-write", "snapshot-access")
SIMULATED = frozenset({"file", "null-co", *FORMATS, *FILTERS})
"""The drivers of blockdev-add that the fake knows."""

_NODE_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9\-._]*")
_QCOW2_SIZE = struct.Struct(">24xQ")
_CLUSTER = 1 << 16
_READ, _WRITE = ["consistent-read"], ["write", "consistent-read"]
_ANYTHING = ["resize", "write-unchanged", "write", "consistent-read"]


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
    no_flush: bool = False
    write_threshold: int = 0
    bitmaps: list[Bitmap] = dataclasses.field(default_factory=list)

    def bitmap(self, name: str) -> Bitmap:
        for bitmap in self.bitmaps:
            if bitmap.name == name:
                return bitmap
        raise Refused(f"Dirty bitmap '{name}' not found")


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


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened; its time is when it is told."""

    name: str
    data: Message


def event(name: str, data: Message | None = None) -> Event:
    """An event, as a rule without data."""
    return Event(name, data or {})


class BlockLayer:
    """See the module. Every change takes arguments that fit the schema and may raise Refused."""

    def __init__(self, version: tuple[int, int, int]) -> None:
        self.state = State()
        self.images: dict[str, Image] = {}
        """Node -> the file it has open."""
        self.events: list[Event] = []
        """Not fetched yet, see ``take_events``."""
        self._version = version
        self._templates: list[Message] = []

    @property
    def old_words(self) -> bool:
        return self._version < (6, 0, 0)

    # --- how it begins ---

    def load(self, blocks: Any, named: Any, graph: Any) -> None:
        """Begin as ``query-block``, ``query-named-block-nodes`` and ``x-debug-query-block-graph``
        say; the latter two may be empty, and are made up then. Errors: ValueError."""
        try:
            self._load(blocks, named, graph)
            self._check_loaded()
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as failure:
            raise ValueError(f"the recorded block info is not understood: {failure!r}") from failure

    def _check_loaded(self) -> None:
        """Raise an error where what was recorded would make later answers impossible."""
        for node in self.state.nodes.values():
            shapes = (node.name, str), (node.driver, str), (node.filename, str), (node.size, int)
            if not all(isinstance(value, kind) for value, kind in shapes):
                raise TypeError(f"node {node.name!r}")
            for child in node.children.values():
                self._all_below(child)
        for device in self.state.devices:
            if not isinstance(device.name, str) or not isinstance(device.qdev, str):
                raise TypeError(f"drive {device.name!r}")
        self.query_block()
        self.query_named_block_nodes()
        self.query_graph()

    def _load(self, blocks: Any, named: Any, graph: Any) -> None:
        children = _children(graph)
        infos: dict[str, Any] = {info["node-name"]: info for info in reversed(named)}
        if children:  # the nodes may have been asked for later than the graph was
            infos = {name: info for name, info in infos.items() if name in children}
        for drive in blocks:
            inserted = drive.get("inserted")
            if inserted is not None:
                infos.setdefault(inserted["node-name"], inserted)
            root = None if inserted is None else inserted["node-name"]
            self.state.devices.append(Device(drive, root))
        self._templates = list(infos.values())
        for name in children:
            infos.setdefault(name, None)
        for name, info in infos.items():
            self.state.nodes[name] = self._loaded(name, info, children.get(name, {}))
        for node in self.state.nodes.values():
            missing = node.driver in FORMATS and "file" not in node.children
            if missing and (below := self._file_of(node)):
                node.children["file"] = below

    def _loaded(self, name: str, info: Message | None, children: dict[str, str]) -> Node:
        owned = not name.startswith("#")
        if info is None:
            return Node(name, "file", "", 0, False, children, owned)
        bitmaps = [
            Bitmap(
                bitmap.get("name"), bitmap["granularity"], bitmap.get("persistent", False),
                bitmap.get("recording", True), bitmap["count"],
            )
            for bitmap in info.get("dirty-bitmaps", ())
        ]  # fmt: skip
        return Node(
            name, info["drv"], info["file"], info["image"]["virtual-size"], info["ro"], children,
            owned, info, write_threshold=info.get("write_threshold", 0), bitmaps=bitmaps,
        )  # fmt: skip

    def _file_of(self, node: Node) -> str | None:
        """The protocol node of a format NODE, where no graph was recorded: by the file's name."""
        for other in self.state.nodes.values():
            if other.driver == "file" and other.filename == node.filename:
                return other.name
        return None

    # --- queries ---

    def query_block(self) -> list[Message]:
        return [self._drive(device) for device in self.state.devices]

    def _drive(self, device: Device) -> Message:
        drive = {key: value for key, value in device.recorded.items() if key != "inserted"}
        if device.root is None:
            return drive
        recorded = device.recorded.get("inserted")
        if recorded is not None and recorded["node-name"] == device.root:
            inserted = copy.deepcopy(recorded)
            self._renew(inserted, self.state.nodes[device.root])
        else:
            inserted = self.info(self.state.nodes[device.root])
            if recorded is not None:
                inserted["cache"] = recorded.get("cache", inserted["cache"])
        if self.old_words and "dirty-bitmaps" in inserted:
            drive["dirty-bitmaps"] = inserted["dirty-bitmaps"]
        return {**drive, "inserted": inserted}

    def query_named_block_nodes(self, flat: bool = False) -> list[Message]:
        """FLAT: without what is below the images."""
        found = [self.info(node) for node in reversed(self.state.nodes.values())]
        for info in found:
            if flat:
                info["image"].pop("backing-image", None)
                info["backing_file_depth"] = 0
        return found

    def info(self, node: Node) -> Message:
        """QAPI's BlockDeviceInfo."""
        found = copy.deepcopy(node.recorded) if node.recorded else self._made_up(node)
        found["image"] = self._image(node, self._filename(node))
        found["backing_file_depth"] = self._depth(node)
        self._renew(found, node)
        return found

    def _made_up(self, node: Node) -> Message:
        """The info of a node that was not recorded, with the members that this QEMU's have."""
        plain = self._templates[0] if self._templates else {}
        left_out = ("backing_file", "dirty-bitmaps", "image")
        found = {key: value for key, value in plain.items() if key not in left_out}
        found |= {
            "drv": node.driver, "file": self._filename(node), "node-name": node.name,
            "ro": node.readonly, "detect_zeroes": "off", "encrypted": False,
            "cache": {"direct": False, "no-flush": node.no_flush, "writeback": True},
        }  # fmt: skip
        if node.driver == "qcow2" and "backing" in node.children:
            found["backing_file"] = self.state.nodes[node.children["backing"]].filename
        return found

    def _image(self, node: Node, filename: str) -> Message:
        """QAPI's ImageInfo."""
        if node.recorded is not None:
            image = dict(node.recorded["image"])
        else:
            image = self._made_up_image(node, filename)
        below = self._backing_of(node)
        if below is not None:
            image["backing-image"] = self._image(below, self._filename(below))
        return image

    def _made_up_image(self, node: Node, filename: str) -> Message:
        """The image of a node that was not recorded, what is below it left out."""
        image: Message = {
            "filename": filename, "format": node.driver, "virtual-size": node.size,
            "actual-size": self._actual_size(node),
        }  # fmt: skip
        if node.driver != "snapshot-access":
            image["dirty-flag"] = False
        image |= self._as_others(node.driver)
        if self._in_clusters(node):
            image["cluster-size"] = _CLUSTER
        if node.driver in ("raw", *FILTERS):
            self._inherit_limits(image, node)
        return image

    def _as_others(self, driver: str) -> Message:
        """What the image of another node of DRIVER was recorded with; the limits of any other,
        where there is none."""
        images = {other["drv"]: other["image"] for other in self._templates}
        like = images.get(driver, {})
        limits = [image["limits"] for image in (like, *images.values()) if "limits" in image]
        found = {"limits": limits[0]} if limits else {}
        if driver == "qcow2":
            found["format-specific"] = {"type": "qcow2", "data": _QCOW2_FACTS}
        return found | {key: like[key] for key in ("format-specific",) if key in like}

    def _inherit_limits(self, image: Message, node: Node) -> None:
        """The strictest of what is below, but for how zeroes are written."""
        found: dict[str, int] = {}
        for child in node.children.values():
            limits = self._image(self.state.nodes[child], "").get("limits", {})
            found |= {key: max(value, found.get(key, 0)) for key, value in limits.items()}
        found.pop("write-zeroes-alignment", None)
        if found:
            image["limits"] = found

    def _in_clusters(self, node: Node) -> bool:
        if node.driver in ("raw", *_JOB_FILTERS):
            return self._in_clusters(self.state.nodes[next(iter(node.children.values()))])
        return node.driver == "qcow2"

    def _renew(self, info: Message, node: Node) -> None:
        """What changes while a node is there."""
        info["write_threshold"] = node.write_threshold
        info.pop("dirty-bitmaps", None)
        if node.bitmaps:
            # The last made is told first.
            bitmaps = reversed(node.bitmaps)
            info["dirty-bitmaps"] = [bitmap.info(self.old_words) for bitmap in bitmaps]
        if any("children" in template for template in self._templates):
            info["children"] = [
                {"child": role, "node-name": child}
                for role, child in reversed(node.children.items())
            ]

    def _actual_size(self, node: Node) -> int:
        if node.name in self.images:
            return self.images[node.name].actual_size()
        if node.recorded is not None:
            return int(node.recorded["image"].get("actual-size", 0))
        below = node.children.get("file")
        return 0 if below is None else self._actual_size(self.state.nodes[below])

    def _backing_of(self, node: Node) -> Node | None:
        role = "file" if node.driver == "copy-before-write" else "backing"
        child = node.children.get(role)
        return None if child is None else self.state.nodes[child]

    def _depth(self, node: Node) -> int:
        below = self._backing_of(node)
        if below is not None:
            return 1 + self._depth(below)
        return 0 if node.recorded is None else int(node.recorded.get("backing_file_depth", 0))

    def _filename(self, node: Node) -> str:
        """How QEMU calls a node: by its file where that says it all, else by its options."""
        if node.recorded is not None or node.driver == "file":
            return node.filename
        overlay = "backing" in node.children and node.driver not in _JOB_FILTERS
        if overlay or node.limit is not None:
            return "json:" + json.dumps(self._options(node), sort_keys=True)
        below = next(iter(node.children.values()), None)
        return node.filename if below is None else self._filename(self.state.nodes[below])

    def _options(self, node: Node) -> Message:
        if node.driver == "file":
            return {"driver": "file", "filename": node.filename}
        found: Message = {"driver": node.driver}
        if node.limit is not None:
            found["size"] = node.limit
        for role, child in node.children.items():
            if node.recorded is None or role == "file":
                found[role] = self._options(self.state.nodes[child])
        return found

    def query_graph(self) -> Message:
        """``x-debug-query-block-graph``."""
        ids: dict[tuple[str, str], int] = {}

        def vertex(kind: str, name: str) -> int:
            return ids.setdefault((kind, name), len(ids) + 1)

        edges = [
            {"parent": vertex(kind, parent), "child": vertex("block-driver", child), "name": role,
             "perm": perm, "shared-perm": shared}
            for kind, parent, role, child, perm, shared in self._edges()
        ]  # fmt: skip
        for node in self.state.nodes:
            vertex("block-driver", node)
        for job in self.state.jobs:
            vertex("block-job", job)
        for device in self.state.devices:
            vertex("block-backend", device.name)
        nodes = [
            {"id": id, "type": kind, "name": "" if kind == "block-backend" and name[:1] == "\0"
             else name}
            for (kind, name), id in ids.items()
        ]  # fmt: skip
        return {"nodes": nodes, "edges": edges}

    def _edges(self) -> Iterator[tuple[str, str, str, str, list[str], list[str]]]:
        """(kind, parent, role, child, permissions, shared ones)."""
        for node in self.state.nodes.values():
            for role, child in node.children.items():
                reads = role == "backing" or node.driver == "snapshot-access"
                below = self.state.nodes[child]
                perm = [] if reads else _READ if below.readonly else _WRITE
                yield "block-driver", node.name, role, child, perm, _ANYTHING if reads else _READ
        for job in self.state.jobs.values():
            for role, name in (("main node", job.filter), ("target", job.target)):
                if job.filter is not None and name is not None:
                    yield "block-job", job.id, role, name, [], _ANYTHING
            if job.filter is not None and self.old_words:
                root = job.source if job.status == "concluded" else job.filter
                yield "block-backend", f"\0{job.id}", "root", root, _READ, _ANYTHING
        for device in self.state.devices:
            if device.root is not None:
                perm = _READ if self.state.nodes[device.root].readonly else _WRITE
                yield "block-backend", device.name, "root", device.root, perm, _READ
        for export in self.state.exports.values():
            # A backend without a name; the mark keeps two of them apart.
            yield "block-backend", f"\0{export.id}", "root", export.node, _READ, _WRITE

    # --- nodes ---

    def find(self, name: str, device: str | None = None) -> Node:
        """The node, or what is in the drive, of that NAME."""
        for drive in self.state.devices:
            if name and drive.recorded.get("device") == name and drive.root is not None:
                return self.state.nodes[drive.root]
        if name in self.state.nodes:
            return self.state.nodes[name]
        device = name if device is None else device
        if self.old_words:
            raise Refused(f"Cannot find device={device} nor node_name={name}")
        raise Refused(f"Cannot find device='{device}' nor node-name='{name}'")

    def blockdev_add(self, options: Message, opened: Mapping[str, Image | str]) -> None:
        """Add a node. OPENED has the files that OPTIONS name: open, or why they cannot be."""
        if "node-name" not in options and "id" not in options:
            raise Refused("'node-name' must be specified for the root node")
        with _TakenBack(self):
            self._open(options, opened, owned=True)

    def _open(
        self,
        options: Any,
        opened: Mapping[str, Image | str],
        owned: bool = False,
        no_flush: bool = False,
    ) -> str:
        """The name of the node that OPTIONS describe or refer to; NO_FLUSH is what a node that is
        described within another has from that one."""
        if isinstance(options, str):
            return self.find(options).name
        driver = options["driver"]
        if driver not in SIMULATED:
            raise Refused(f"driver '{driver}' is not simulated")
        # Before QEMU 2.9 an id, a drive's, could be all that a node had.
        name = options.get("node-name") or options.get("id") or self._automatic_name()
        self._check_name(name)
        no_flush = options.get("cache", {}).get("no-flush", no_flush)
        children = {}
        for role in ("file", "target"):
            if role in options:
                children[role] = self._open(options[role], opened, no_flush=no_flush)
        if name in self.state.nodes:
            raise self._duplicate(name)
        node = Node(
            name, driver, options.get("filename", ""), 0, options.get("read-only", False), children,
            owned, limit=options.get("size") if driver == "raw" else None,
            no_flush=no_flush,
        )  # fmt: skip
        self._open_driver(node, options, opened)
        self.state.nodes[name] = node
        return name

    def _open_driver(self, node: Node, options: Message, opened: Mapping[str, Image | str]) -> None:
        if node.driver == "file":
            self._open_file(node, opened[node.filename])
        elif node.driver != "null-co":
            below = self.state.nodes[node.children["file"]]
            node.size = below.size if node.limit is None else node.limit
            node.filename = below.filename
        if node.driver == "bochs":
            if self.frozen_source(node.children["file"]) is None:
                raise Refused(f"Could not open '{node.filename}': Operation not supported")
            raise Refused("Image not in Bochs format")
        if node.driver == "qcow2":
            image = self.images.get(node.children["file"])
            if image is None or not image.header.startswith(b"QFI\xfb"):
                raise Refused("Image is not in qcow2 format")
            (node.size,) = _QCOW2_SIZE.unpack_from(image.header)
            if options.get("backing") is not None:
                try:
                    node.children["backing"] = self._open(
                        options["backing"], opened, no_flush=node.no_flush
                    )
                except Refused as failure:
                    raise Refused(f"Could not open backing file: {failure.desc}") from failure

    def _open_file(self, node: Node, image: Image | str) -> None:
        if isinstance(image, str):
            raise Refused(image)
        writers = {self.images[name].key for name in self.images if self._writes(name)}
        if not node.readonly and image.key in writers:
            raise Refused('Failed to get "write" lock')
        node.size = image.size
        self.images[node.name] = image

    def _writes(self, name: str) -> bool:
        return name in self.state.nodes and not self.state.nodes[name].readonly

    def _automatic_name(self) -> str:
        self.state.last_number += 1
        return f"#block{self.state.last_number}"

    def _check_name(self, name: str) -> None:
        if not name.startswith("#") and not _NODE_NAME.fullmatch(name):
            raise Refused("Invalid node name" if self.old_words else f"Invalid node-name: '{name}'")
        if len(name.encode()) > 31:
            raise Refused("Node name too long")

    def _duplicate(self, name: str) -> Refused:
        if self.old_words:
            return Refused("Duplicate node name")
        return Refused(f"Duplicate nodes with node-name='{name}'")

    def blockdev_del(self, name: str) -> None:
        node = self.state.nodes.get(name)
        if node is None:
            if self.old_words:
                raise Refused(f"Cannot find node {name}")
            raise Refused(f"Failed to find node with node-name='{name}'")
        users = [*self.state.devices, *self.state.exports.values()]
        if any(name in (getattr(user, "root", None), getattr(user, "node", None))
               for user in users):  # fmt: skip
            raise Refused(f"Node {name} is in use")
        self._check_not_busy(name)
        if not node.owned:
            raise Refused(f"Node {name} is not owned by the monitor")
        if self._parents(name):
            raise Refused(f"Block device {name} is in use")
        node.owned = False
        self._drop(name)

    def _check_not_busy(self, name: str) -> None:
        """Against QEMU's operation blockers."""
        for node in self.state.nodes.values():
            if node.children.get("backing") == name and not node.name.startswith("#"):
                raise Refused(f"Node '{name}' is busy: node is used as backing hd of '{node.name}'")
        self._check_no_job(name)

    def _check_no_job(self, name: str) -> None:
        for job in self.state.jobs.values():
            if job.filter is not None and name in (job.filter, job.target):
                raise Refused(
                    f"Node '{name}' is busy: block device is in use by block job: {job.type}"
                )

    def _parents(self, name: str) -> list[tuple[Node, str]]:
        """(who has it below, in which role)."""
        return [
            (node, role)
            for node in self.state.nodes.values()
            for role, child in node.children.items()
            if child == name
        ]

    def _drop(self, name: str) -> None:
        """Let go of a node: it goes, and what is below it, unless somebody else holds it."""
        node = self.state.nodes[name]
        users = {device.root for device in self.state.devices}
        users |= {export.node for export in self.state.exports.values()}
        users |= {job.filter for job in self.state.jobs.values()}
        if node.owned or self._parents(name) or name in users:
            return
        del self.state.nodes[name]
        if name in self.images:
            self.images.pop(name).close()
        for child in set(node.children.values()):
            self._drop(child)

    def set_write_threshold(self, name: str, threshold: int) -> None:
        if name not in self.state.nodes:
            raise Refused(f"Device '{name}' not found")
        self.state.nodes[name].write_threshold = threshold

    def unplug(self, id: str) -> str | None:
        """Take a device out of the guest; its place in the object tree, None where there is none
        of that ID."""
        for device in self.state.devices:
            qdev = device.qdev
            path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
            if path.removesuffix("/virtio-backend") == f"/machine/peripheral/{id}":
                self.state.devices.remove(device)
                return path.removesuffix("/virtio-backend")
        return None

    def set_io_status(self, status: str) -> None:
        """Of every drive that tells one."""
        for device in self.state.devices:
            if "io-status" in device.recorded:
                device.recorded = {**device.recorded, "io-status": status}

    # --- transactions and jobs ---

    def transaction(self, actions: Iterable[Message]) -> None:
        """All ACTIONS, or none."""
        begun: list[Job] = []
        try:
            with _TakenBack(self):
                for action in actions:
                    job = self._act(action["type"], action["data"])
                    if job is not None:
                        begun.append(job)
                        self._job_event(job.id, "created")
        except Refused:
            for job in reversed(begun):
                for status in ("aborting", "concluded", "null"):
                    self._job_event(job.id, status)
            raise
        for node in self.state.nodes.values():
            node.bitmaps = [bitmap for bitmap in node.bitmaps if not bitmap.doomed]
        for status in ("running", "paused", "running"):
            for job in begun:
                self._job_event(job.id, status)

    def _act(self, type: str, data: Message) -> Job | None:
        match type:
            case "blockdev-backup":
                return self._backup(data)
            case "block-dirty-bitmap-add":
                self._bitmap_add(data)
            case "block-dirty-bitmap-remove":
                self._usable_bitmap(data).doomed = True
            case "block-dirty-bitmap-enable" | "block-dirty-bitmap-disable":
                self._usable_bitmap(data).recording = type.endswith("enable")
            case "block-dirty-bitmap-clear":
                self._usable_bitmap(data).count = 0
            case "block-dirty-bitmap-merge":
                self._bitmap_merge(data)
            case "abort":
                raise Refused("Transaction aborted using Abort action")
            case _:
                raise Refused(f"transaction action '{type}' is not simulated")
        return None

    def _backup(self, data: Message) -> Job:
        source, target = self.find(data["device"]), self.find(data["target"])
        if "bitmap" in data and "bitmap-mode" not in data:
            raise Refused("Bitmap sync mode must be given when providing a bitmap")
        if data["sync"] != "none":
            raise Refused(f"sync mode '{data['sync']}' of a backup is not simulated")
        if source is target:
            raise Refused("Source and target cannot be the same")
        self._check_no_job(source.name)
        self._check_no_job(target.name)
        if source.size != target.size:
            raise Refused("Source and target image have different sizes")
        name = data.get("filter-node-name") or self._automatic_name()
        if name in self.state.nodes:
            words = self._duplicate(name).desc
            raise Refused(words if self.old_words else f"Could not create node: {words}")
        self._check_name(name)
        id = data.get("job-id") or self._drive_of(source.name)
        if not id:
            raise Refused("Invalid job ID ''")
        if id in self.state.jobs:
            raise Refused(f"Job ID '{id}' already in use")
        self._insert_filter(name, source, target)
        auto_dismiss = data.get("auto-dismiss", True)
        job = Job(id, source.name, target.name, name, source.size, auto_dismiss)
        self.state.jobs[id] = job
        return job

    def _drive_of(self, node: str) -> str:
        """The drive's id by which a job is called that was given none; empty without a drive."""
        for device in self.state.devices:
            if device.root == node:
                return str(device.recorded.get("device", ""))
        return ""

    def _insert_filter(self, name: str, source: Node, target: Node) -> None:
        """Put a job's filter over SOURCE: under all that is there, but for what TARGET is over."""
        below = self._all_below(target.name)
        driver = _JOB_FILTERS[1 if self.old_words else 0]
        self._move_parents(source.name, name, but=below)
        children = {"backing" if self.old_words else "file": source.name, "target": target.name}
        saved = Bitmap(None, _CLUSTER, False, False, source.size)
        done = Bitmap(None, _CLUSTER, False, False)
        source.bitmaps.append(dataclasses.replace(saved))
        self.state.nodes[name] = Node(
            name, driver, source.filename, source.size, source.readonly, children, owned=False,
            bitmaps=[] if self.old_words else [done, saved],
        )  # fmt: skip

    def _all_below(self, name: str) -> set[str]:
        found = {name}
        for child in self.state.nodes[name].children.values():
            found |= self._all_below(child)
        return found

    def _move_parents(self, old: str, new: str, but: set[str]) -> None:
        for parent, role in self._parents(old):
            if parent.name not in but:
                parent.children[role] = new
        for device in self.state.devices:
            if device.root == old:
                device.root = new
        for export in self.state.exports.values():
            if export.node == old:
                export.node = new

    def job(self, id: str, verb: str, blockjob: bool = False) -> Job:
        """The job, where VERB can be done to it."""
        job = self.state.jobs.get(id)
        if blockjob and (job is None or job.type != "backup"):
            raise Refused(f"Block job '{id}' not found", "DeviceNotActive")
        if job is None:
            raise Refused("Job not found")
        allowed = ("concluded",) if verb == "dismiss" else ("running", "paused")
        if job.status not in allowed:
            raise Refused(f"Job '{id}' in state '{job.status}' cannot accept command verb '{verb}'")
        return job

    def create(self, id: str, options: Message, failure: str | None) -> None:
        """Make an image, the file of which is made already, or not for a FAILURE; as a job."""
        if id in self.state.jobs:
            raise Refused(f"Job ID '{id}' already in use")
        if options["driver"] == "qcow2":
            node = self.find(options["file"]) if isinstance(options["file"], str) else None
            image = None if node is None else self.images.get(node.name)
            if node is None or image is None:
                raise Refused("the making of an image there is not simulated")
            try:
                image.format(options["size"])
                node.size = image.size
            except OSError as error:
                failure = f"Could not write qcow2 header: {error.strerror}"
        elif options["driver"] != "file":
            raise Refused(f"the making of '{options['driver']}' images is not simulated")
        self.state.jobs[id] = Job(
            id, "", "", None, 1, False, status="concluded", error=failure, type="create"
        )
        ends = ("aborting",) if failure else ("waiting", "pending")
        for status in ("created", "running", *ends, "concluded"):
            self._job_event(id, status)

    def cancel(self, job: Job) -> None:
        """End a job before its time."""
        self.end_job(job, "Operation canceled")

    def end_job(self, job: Job, error: str) -> None:
        """End a job with an ERROR, and take its filter away."""
        self._job_event(job.id, "aborting")
        told = {"device": job.id, "len": job.length, "offset": 0, "speed": 0, "type": job.type}
        if error == "Operation canceled":
            self.events.append(Event("BLOCK_JOB_CANCELLED", told))
        else:
            self.events.append(Event("BLOCK_JOB_COMPLETED", {**told, "error": error}))
        job.status, job.error = "concluded", error
        self._bypass_filter(job)
        if not self.old_words:  # those keep it, aside, until the job is dismissed
            self._remove_filter(job)
        self._job_event(job.id, "concluded")
        if job.auto_dismiss:
            self.dismiss(job)

    def _bypass_filter(self, job: Job) -> None:
        """Take a job's filter from over its source."""
        assert job.filter is not None
        source = self.state.nodes[job.source]
        self._move_parents(job.filter, source.name, but=set())
        children = self.state.nodes[job.filter].children
        children.pop("file", None)
        children.pop("backing", None)
        source.bitmaps = [bitmap for bitmap in source.bitmaps if bitmap.name is not None]
        self._drop(source.name)

    def _remove_filter(self, job: Job) -> None:
        if job.filter is not None:
            del self.state.nodes[job.filter]
            job.filter = None

    def dismiss(self, job: Job) -> None:
        self._remove_filter(job)
        del self.state.jobs[job.id]
        self._job_event(job.id, "null")

    def set_paused(self, job: Job, paused: bool) -> None:
        if paused == job.paused:
            raise Refused("Job is already paused" if paused else "Job is not paused")
        job.paused = paused
        if not self.old_words:  # there it sleeps until the guest writes, and does not notice
            job.status = "paused" if paused else "running"
            self._job_event(job.id, job.status)

    def query_jobs(self) -> list[Message]:
        return [
            {
                "id": job.id, "type": job.type, "status": job.status,
                "current-progress": 1 if job.type == "create" else 0,
                "total-progress": job.length, **({"error": job.error} if job.error else {}),
            }
            for job in reversed(self.state.jobs.values())
        ]  # fmt: skip

    def query_block_jobs(self) -> list[Message]:
        return [
            {
                "device": job.id, "type": job.type, "len": job.length, "offset": 0, "speed": 0,
                "status": job.status, "paused": job.paused, "busy": False,
                "ready": False, "io-status": "ok", "auto-finalize": True,
                "auto-dismiss": job.auto_dismiss, **({"error": job.error} if job.error else {}),
            }
            for job in reversed(self.state.jobs.values())
            if job.type == "backup"
        ]  # fmt: skip

    def _job_event(self, id: str, status: str) -> None:
        self.events.append(Event("JOB_STATUS_CHANGE", {"id": id, "status": status}))

    def take_events(self) -> list[tuple[str, Message]]:
        """What happened since the last time: (event, data)."""
        taken, self.events = self.events, []
        return [(event.name, event.data) for event in taken]

    # --- bitmaps ---

    def _bitmap_add(self, data: Message) -> None:
        node, name = self.find(data["node"]), data["name"]
        granularity = data.get("granularity", _CLUSTER)
        if not name:
            raise Refused("Bitmap name cannot be empty")
        if len(name.encode()) > 1023:
            raise Refused("Bitmap name too long")
        if granularity < 512 or granularity & (granularity - 1):
            raise Refused("Granularity must be power of 2 and at least 512")
        persistent = data.get("persistent", False)
        if persistent and node.driver != "qcow2":
            raise Refused(f"Can't store persistent bitmaps to {node.name}: Operation not supported")
        if any(bitmap.name == name for bitmap in node.bitmaps):
            raise Refused(f"Bitmap already exists: {name}")
        recording = not data.get("disabled", False)
        node.bitmaps.append(Bitmap(name, granularity, persistent, recording))

    def _usable_bitmap(self, data: Message, key: str = "name") -> Bitmap:
        bitmap = self.find(data["node"]).bitmap(data[key])
        _check_free(bitmap)
        return bitmap

    def _bitmap_merge(self, data: Message) -> None:
        target = self._usable_bitmap(data, "target")
        for given in data["bitmaps"]:
            if isinstance(given, str):
                given = {"node": data["node"], "name": given}
            target.count = max(target.count, self.find(given["node"]).bitmap(given["name"]).count)

    # --- exports ---

    def export(self, export: Export, bitmaps: Iterable[Any]) -> None:
        """Add EXPORT, whose node was looked up, with BITMAPS."""
        if export.name in {other.name for other in self.state.exports.values()}:
            raise Refused(f"NBD server already has export named '{export.name}'")
        found = [self._bitmap_below(export.node, given) for given in bitmaps]
        for bitmap in found:
            bitmap.export = export.id
        self.state.exports[export.id] = export

    def _bitmap_below(self, node: str, given: Any) -> Bitmap:
        """A bitmap by its name, of NODE or of what it is over; or by node and name."""
        if isinstance(given, dict):
            bitmap = self.find(given["node"]).bitmap(given["name"])
            chain = [self.find(given["node"])]
        else:
            chain = [self.state.nodes[node]]
            while (below := self._backing_of(chain[-1])) is not None:
                chain.append(below)
            named = [b for one in chain for b in one.bitmaps if b.name == given]
            if not named:
                raise Refused(f"Bitmap '{given}' is not found")
            bitmap = named[0]
        _check_free(bitmap)
        if bitmap.recording and not self.state.nodes[node].readonly:
            raise Refused(f"Enabled bitmap '{bitmap.name}' incompatible with readonly export")
        return bitmap

    def unexport(self, id: str) -> None:
        """Remove an export that is there."""
        export = self.state.exports.pop(id)
        for node in self.state.nodes.values():
            for bitmap in node.bitmaps:
                if bitmap.export == id:
                    bitmap.export = None
        self.events.append(Event("BLOCK_EXPORT_DELETED", {"id": id}))
        self._drop(export.node)

    def query_exports(self) -> list[Message]:
        return [
            {"id": export.id, "node-name": export.node, "type": "nbd", "shutting-down": False}
            for export in reversed(self.state.exports.values())
        ]

    # --- what a client of an export reads ---

    def frozen_source(self, node: str) -> str | None:
        """The disk whose contents NODE shows, None where they can be read no more: by name of the
        lowest node that holds data."""
        found = self.state.nodes[node]
        if found.driver == "snapshot-access":
            below = self.state.nodes[found.children["file"]]
            broken = {job.filter for job in self.state.jobs.values() if job.broken}
            if below.driver != "copy-before-write" or below.name in broken:
                return None
        for role in ("backing", "file"):
            child = found.children.get(role)
            if child is not None and found.recorded is None:
                return self.frozen_source(child)
        return node

    def close(self) -> None:
        """Close every file."""
        while self.images:
            self.images.popitem()[1].close()


class _TakenBack:
    """What is done within is undone where it is refused."""

    def __init__(self, layer: BlockLayer) -> None:
        self._layer = layer
        self._saved = copy.deepcopy(layer.state)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if value is None:
            return
        self._layer.state = self._saved
        for name in [name for name in self._layer.images if name not in self._saved.nodes]:
            del self._layer.images[name]  # closed by whoever opened it for the command


def _children(graph: Any) -> dict[str, dict[str, str]]:
    """Node -> (role -> node) of a block graph."""
    kinds = {node["id"]: (node["type"], node["name"]) for node in graph.get("nodes", ())}
    found: dict[str, dict[str, str]] = {
        name: {} for kind, name in reversed(kinds.values()) if kind == "block-driver"
    }
    for edge in graph.get("edges", ()):
        (kind, parent), (_, child) = kinds[edge["parent"]], kinds[edge["child"]]
        if kind == "block-driver":
            found[parent][edge["name"]] = child
    return found


def _check_free(bitmap: Bitmap) -> None:
    if bitmap.export is not None:
        raise Refused(
            f"Bitmap '{bitmap.name}' is currently in use by another operation and cannot be used"
        )


_QCOW2_FACTS = {"compat": "1.1", "compression-type": "zlib", "corrupt": False,
                "extended-l2": False, "lazy-refcounts": False, "refcount-bits": 16}  # fmt: skip
