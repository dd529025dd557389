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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from virtbackup.test import fake_info, fake_state, schema

Message = dict[str, Any]

Opened = Iterator[fake_state.Image | str]
"""The files that a command names, in their order: open, or why they cannot be."""

SIMULATED = frozenset({"file", "null-co", *fake_state.FORMATS, *fake_state.FILTERS})
"""The drivers of blockdev-add that the fake knows."""

ID = re.compile(r"[a-zA-Z][a-zA-Z0-9\-._]*")
"""What nodes, jobs and exports can be called."""
_OF_NULL = ("size", "latency-ns", "read-zeroes")
_QCOW2_SIZE = struct.Struct(">24xQ")


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened; its time is when it is told."""

    name: str
    data: Message


def event(name: str, data: Message | None = None) -> Event:
    """An event, as a rule without data."""
    return Event(name, data or {})


class BlockLayer:
    """See the module. A change takes arguments that fit the schema and may raise schema.Refused."""

    def __init__(self, version: tuple[int, int, int]) -> None:
        self.state = fake_state.State()
        self.images: dict[str, fake_state.Image] = {}
        """Node -> the file it has open."""
        self.events: list[Event] = []
        """Not fetched yet, see ``take_events``."""
        self._version = version
        self._templates: list[Message] = []

    @property
    def old_words(self) -> bool:
        return self._version < (6, 0, 0)

    @property
    def info(self) -> fake_info.Info:
        """What queries are told now."""
        return fake_info.Info(self.state, self.images, self._templates, self.old_words)

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
        for template in self._templates:
            image = template["image"]
            limits = image.get("limits", {}).values()
            if not all(type(value) is int for value in (image.get("actual-size", 0), *limits)):
                raise TypeError(f"image of node {template['node-name']!r}")
        for device in self.state.devices:
            if not isinstance(device.name, str) or not isinstance(device.qdev, str):
                raise TypeError(f"drive {device.name!r}")
        self.info.block()
        self.info.named_block_nodes()
        self.info.graph()

    def _load(self, blocks: Any, named: Any, graph: Any) -> None:
        children = _children(graph)
        infos: dict[str, Any] = {info["node-name"]: info for info in reversed(named)}
        if children:  # the nodes may have been asked for later than the graph was
            infos = {name: info for name, info in infos.items() if name in children}
        for drive in blocks:
            inserted = drive.get("inserted")
            if inserted is not None:
                # With the bitmaps of then, for the same reason.
                info = {**infos.get(inserted["node-name"], inserted)}
                info["dirty-bitmaps"] = inserted.get("dirty-bitmaps", [])
                infos[inserted["node-name"]] = info
            root = None if inserted is None else inserted["node-name"]
            self.state.devices.append(fake_state.Device(drive, root))
        self._templates = list(infos.values())
        for name in children:
            infos.setdefault(name, None)
        for name, info in infos.items():
            self.state.nodes[name] = self._loaded(name, info, children.get(name, {}))
        for node in self.state.nodes.values():
            missing = node.driver in fake_state.FORMATS and "file" not in node.children
            if missing and (below := self._file_of(node)):
                node.children["file"] = below

    def _loaded(self, name: str, info: Message | None, children: dict[str, str]) -> fake_state.Node:
        owned = not name.startswith("#")
        if info is None:
            return fake_state.Node(name, "file", "", 0, False, children, owned)
        bitmaps = [
            fake_state.Bitmap(
                bitmap.get("name"), bitmap["granularity"], bitmap.get("persistent", False),
                bitmap.get("recording", True), bitmap["count"],
            )
            for bitmap in info.get("dirty-bitmaps", ())
        ]  # fmt: skip
        return fake_state.Node(
            name, info["drv"], info["file"], info["image"]["virtual-size"], info["ro"], children,
            owned, info, write_threshold=info.get("write_threshold", 0), bitmaps=bitmaps,
        )  # fmt: skip

    def _file_of(self, node: fake_state.Node) -> str | None:
        """The protocol node of a format NODE, where no graph was recorded: by the file's name."""
        for other in self.state.nodes.values():
            if other.driver == "file" and other.filename == node.filename:
                return other.name
        return None

    # --- nodes ---

    def find(self, name: str) -> fake_state.Node:
        """The node, or what is in the drive, of that NAME."""
        for drive in self.state.devices:
            if name and drive.recorded.get("device") == name and drive.root is not None:
                return self.state.nodes[drive.root]
        return self.node(name, name)

    def node(self, name: str, device: str = "") -> fake_state.Node:
        """The node of that NAME alone; DEVICE is what a refusal says was looked for, too."""
        if name in self.state.nodes:
            return self.state.nodes[name]
        if self.old_words:
            raise schema.Refused(f"Cannot find device={device} nor node_name={name}")
        raise schema.Refused(f"Cannot find device='{device}' nor node-name='{name}'")

    def blockdev_add(self, options: Message, opened: Sequence[fake_state.Image | str]) -> None:
        """Add a node. OPENED has the files that OPTIONS name, in their order: open, or why they
        cannot be."""
        if "node-name" not in options and "id" not in options:
            raise schema.Refused("'node-name' must be specified for the root node")
        with _TakenBack(self):
            self._open(options, iter(opened), owned=True)

    def _open(
        self,
        options: Any,
        opened: Opened,
        owned: bool = False,
        no_flush: bool = False,
        readonly: bool = False,
    ) -> str:
        """The name of the node that OPTIONS describe or refer to; NO_FLUSH and READONLY are what a
        node that is described within another has from that one."""
        if isinstance(options, str):
            return self.find(options).name
        driver = options["driver"]
        if driver not in SIMULATED:
            raise schema.Refused(f"driver '{driver}' is not simulated")
        # Before QEMU 2.9 an id, a drive's, could be all that a node had.
        given: str | None = options.get("node-name", options.get("id"))
        if given is not None:
            self._check_name(given)
        name = self._automatic_name() if given is None else given
        no_flush = options.get("cache", {}).get("no-flush", no_flush)
        readonly = options.get("read-only", readonly)
        children = {}
        for role in ("file", "target"):
            if role in options:
                children[role] = self._open(
                    options[role], opened, no_flush=no_flush, readonly=readonly
                )
        if name in self.state.nodes:
            raise self._duplicate(name)
        node = fake_state.Node(
            name, driver, options.get("filename", ""), 0, readonly, children, owned,
            limit=options.get("size") if driver == "raw" else None,
            offset=options.get("offset", 0) if driver == "raw" else 0, no_flush=no_flush,
        )  # fmt: skip
        self._open_driver(node, options, opened)
        self.state.nodes[name] = node
        return name

    def _open_driver(
        self,
        node: fake_state.Node,
        options: Message,
        opened: Opened,
    ) -> None:
        if node.driver == "file":
            self._open_file(node, next(opened))
        elif node.driver == "null-co":
            told = {name: options[name] for name in _OF_NULL if name in options}
            node.size = options.get("size", 1 << 30)
            node.filename = "null-co://"
            if told:
                node.filename = "json:" + json.dumps({"driver": node.driver, **told})
        else:
            below = self.state.nodes[node.children["file"]]
            self._check_part(node, below.size)
            rest = -(-(below.size - node.offset) // 512) * 512
            node.size = rest if node.limit is None else node.limit
            node.filename = below.filename
        if node.driver == "bochs":
            if self.frozen_source(node.children["file"]) is None:
                raise schema.Refused(f"Could not open '{node.filename}': Operation not supported")
            raise schema.Refused("Image not in Bochs format")
        if node.driver == "qcow2":
            image = self.images.get(node.children["file"])
            if image is None or not image.header.startswith(b"QFI\xfb"):
                raise schema.Refused("Image is not in qcow2 format")
            (node.size,) = _QCOW2_SIZE.unpack_from(image.header)
            if options.get("backing") is not None:
                try:
                    node.children["backing"] = self._open(
                        options["backing"], opened, no_flush=node.no_flush
                    )
                except schema.Refused as failure:
                    raise schema.Refused(
                        f"Could not open backing file: {failure.desc}"
                    ) from failure

    def _check_part(self, node: fake_state.Node, whole: int) -> None:
        """Of a raw node: whether what it is to show is there."""
        for name, value in (("offset", node.offset), ("size", node.limit or 0)):
            if value < 0:
                words = f"Value '{value}' is out of range for parameter '{name}'"
                if not self.old_words and self._version < (10, 0, 0):
                    words = f"Parameter '{name}' expects a non-negative number below 2^64"
                raise schema.Refused(words)
        told = (0, 0) if self.old_words else (node.offset, node.limit or 0)
        if node.offset > whole:
            raise schema.Refused(
                f"Offset ({told[0]}) cannot be greater than size of the containing file ({whole})"
            )
        if node.limit is None:
            return
        if node.limit % 512:
            raise schema.Refused("Specified size is not multiple of 512")
        if node.offset + node.limit > whole:
            raise schema.Refused(
                f"The sum of offset ({told[0]}) and size ({told[1]}) has to be smaller or equal to"
                f" the  actual size of the containing file ({whole})"
            )

    def _open_file(self, node: fake_state.Node, image: fake_state.Image | str) -> None:
        if isinstance(image, str):
            raise schema.Refused(image)
        writers = {self.images[name].key for name in self.images if self._writes(name)}
        if not node.readonly and image.key in writers:
            raise schema.Refused('Failed to get "write" lock')
        node.size = image.size
        self.images[node.name] = image

    def _writes(self, name: str) -> bool:
        return name in self.state.nodes and not self.state.nodes[name].readonly

    def _automatic_name(self) -> str:
        self.state.last_number += 1
        return f"#block{self.state.last_number}"

    def _check_name(self, name: str) -> None:
        if not ID.fullmatch(name):
            raise schema.Refused(
                "Invalid node name" if self.old_words else f"Invalid node-name: '{name}'"
            )
        if len(name.encode()) > 31:
            raise schema.Refused("Node name too long")

    def _duplicate(self, name: str) -> schema.Refused:
        if self.old_words:
            return schema.Refused("Duplicate node name")
        return schema.Refused(f"Duplicate nodes with node-name='{name}'")

    def blockdev_del(self, name: str) -> None:
        node = self.state.nodes.get(name)
        if node is None:
            if self.old_words:
                raise schema.Refused(f"Cannot find node {name}")
            raise schema.Refused(f"Failed to find node with node-name='{name}'")
        users = [*self.state.devices, *self.state.exports.values()]
        if any(name in (getattr(user, "root", None), getattr(user, "node", None))
               for user in users):  # fmt: skip
            raise schema.Refused(f"Node {name} is in use")
        self._check_not_busy(name)
        if not node.owned:
            raise schema.Refused(f"Node {name} is not owned by the monitor")
        if self._parents(name):
            raise schema.Refused(f"Block device {name} is in use")
        node.owned = False
        self._drop(name)

    def _check_not_busy(self, name: str) -> None:
        """Against QEMU's operation blockers."""
        for node in self.state.nodes.values():
            if node.children.get("backing") == name and not node.name.startswith("#"):
                raise schema.Refused(
                    f"Node '{name}' is busy: node is used as backing hd of '{node.name}'"
                )
        self._check_no_job(name)

    def _check_no_job(self, name: str) -> None:
        for job in self.state.jobs.values():
            if job.filter is not None and name in (job.filter, job.target):
                raise schema.Refused(
                    f"Node '{name}' is busy: block device is in use by block job: {job.type}"
                )

    def _parents(self, name: str) -> list[tuple[fake_state.Node, str]]:
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
            raise schema.Refused(f"Device '{name}' not found")
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
        begun: list[fake_state.Job] = []
        try:
            with _TakenBack(self):
                for action in actions:
                    job = self._act(action["type"], action["data"])
                    if job is not None:
                        begun.append(job)
                        self._job_event(job.id, "created")
        except schema.Refused:
            for job in reversed(begun):
                for status in ("aborting", "concluded", "null"):
                    self._job_event(job.id, status)
            raise
        for node in self.state.nodes.values():
            node.bitmaps = [bitmap for bitmap in node.bitmaps if not bitmap.doomed]
        for status in ("running", "paused", "running"):
            for job in begun:
                self._job_event(job.id, status)

    def _act(self, type: str, data: Message) -> fake_state.Job | None:
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
                raise schema.Refused("Transaction aborted using Abort action")
            case _:
                raise schema.Refused(f"transaction action '{type}' is not simulated")
        return None

    def _backup(self, data: Message) -> fake_state.Job:
        source, target = self.find(data["device"]), self.find(data["target"])
        if "bitmap" in data:
            if data["bitmap"] not in {bitmap.name for bitmap in source.bitmaps}:
                raise schema.Refused(f"Bitmap '{data['bitmap']}' could not be found")
            if "bitmap-mode" not in data:
                raise schema.Refused("Bitmap sync mode must be given when providing a bitmap")
        if data["sync"] != "none":
            raise schema.Refused(f"sync mode '{data['sync']}' of a backup is not simulated")
        if source is target:
            raise schema.Refused("Source and target cannot be the same")
        self._check_no_job(source.name)
        self._check_no_job(target.name)
        if source.size != target.size:
            raise schema.Refused("Source and target image have different sizes")
        name = self._filter_name(data.get("filter-node-name"))
        if target.readonly:
            raise self._not_created("Block node is read-only")
        id = data.get("job-id", self._drive_of(source.name))
        if not ID.fullmatch(id):
            raise schema.Refused(f"Invalid job ID '{id}'")
        if id in self.state.jobs:
            raise schema.Refused(f"Job ID '{id}' already in use")
        self._insert_filter(name, source, target)
        auto_dismiss = data.get("auto-dismiss", True)
        job = fake_state.Job(id, source.name, target.name, name, source.size, auto_dismiss)
        self.state.jobs[id] = job
        return job

    def _filter_name(self, given: str | None) -> str:
        """The name of a job's filter; GIVEN, where it can be."""
        if given is None:
            return self._automatic_name()
        try:
            self._check_name(given)
            if given in self.state.nodes:
                raise self._duplicate(given)
        except schema.Refused as failure:
            raise self._not_created(failure.desc) from failure
        return given

    def _not_created(self, why: str) -> schema.Refused:
        """A job's filter, that is."""
        return schema.Refused(why if self.old_words else f"Could not create node: {why}")

    def _drive_of(self, node: str) -> str:
        """The drive's id by which a job is called that was given none; empty without a drive."""
        for device in self.state.devices:
            if device.root == node:
                return str(device.recorded.get("device", ""))
        return ""

    def _insert_filter(self, name: str, source: fake_state.Node, target: fake_state.Node) -> None:
        """Put a job's filter over SOURCE: under all that is there, but for what TARGET is over."""
        below = self._all_below(target.name)
        driver = fake_state.JOB_FILTERS[1 if self.old_words else 0]
        self._move_parents(source.name, name, but=below)
        children = {"backing" if self.old_words else "file": source.name, "target": target.name}
        saved = fake_state.Bitmap(None, fake_state.CLUSTER, False, False, source.size)
        done = fake_state.Bitmap(None, fake_state.CLUSTER, False, False)
        source.bitmaps.append(dataclasses.replace(saved))
        self.state.nodes[name] = fake_state.Node(
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

    def job(self, id: str, verb: str, blockjob: bool = False) -> fake_state.Job:
        """The job, where VERB can be done to it."""
        job = self.state.jobs.get(id)
        if blockjob and (job is None or job.type != "backup"):
            raise schema.Refused(f"Block job '{id}' not found", "DeviceNotActive")
        if job is None:
            raise schema.Refused("Job not found")
        if verb == "resume" and not job.paused:
            return job  # it is refused for that
        allowed = ("concluded",) if verb == "dismiss" else ("running", "paused")
        if job.status not in allowed:
            raise schema.Refused(
                f"Job '{id}' in state '{job.status}' cannot accept command verb '{verb}'"
            )
        return job

    def create(self, id: str, options: Message, failure: str | None) -> None:
        """Make an image, the file of which is made already, or not for a FAILURE; as a job."""
        if id in self.state.jobs:
            raise schema.Refused(f"Job ID '{id}' already in use")
        if options["driver"] == "qcow2":
            node = self.find(options["file"]) if isinstance(options["file"], str) else None
            image = None if node is None else self.images.get(node.name)
            if node is None or image is None:
                raise schema.Refused("the making of an image there is not simulated")
            try:
                image.format(options["size"])
                node.size = image.size
            except OSError as error:
                failure = f"Could not write qcow2 header: {error.strerror}"
        elif options["driver"] != "file":
            raise schema.Refused(f"the making of '{options['driver']}' images is not simulated")
        self.state.jobs[id] = fake_state.Job(
            id, "", "", None, 1, False, status="concluded", error=failure, type="create"
        )
        ends = ("aborting",) if failure else ("waiting", "pending")
        for status in ("created", "running", *ends, "concluded"):
            self._job_event(id, status)

    def cancel(self, job: fake_state.Job) -> None:
        """End a job before its time."""
        self.end_job(job, "Operation canceled")

    def end_job(self, job: fake_state.Job, error: str) -> None:
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

    def _bypass_filter(self, job: fake_state.Job) -> None:
        """Take a job's filter from over its source."""
        assert job.filter is not None
        source = self.state.nodes[job.source]
        self._move_parents(job.filter, source.name, but=set())
        children = self.state.nodes[job.filter].children
        children.pop("file", None)
        children.pop("backing", None)
        source.bitmaps = [bitmap for bitmap in source.bitmaps if bitmap.name is not None]
        self._drop(source.name)

    def _remove_filter(self, job: fake_state.Job) -> None:
        if job.filter is not None:
            del self.state.nodes[job.filter]
            job.filter = None

    def dismiss(self, job: fake_state.Job) -> None:
        self._remove_filter(job)
        del self.state.jobs[job.id]
        self._job_event(job.id, "null")

    def set_paused(self, job: fake_state.Job, paused: bool) -> None:
        if paused == job.paused:
            words = "Job is already paused" if paused else "Can't resume a job that was not paused"
            raise schema.Refused(words)
        job.paused = paused
        if not self.old_words:  # there it sleeps until the guest writes, and does not notice
            job.status = "paused" if paused else "running"
            self._job_event(job.id, job.status)

    def _job_event(self, id: str, status: str) -> None:
        self.events.append(Event("JOB_STATUS_CHANGE", {"id": id, "status": status}))

    def take_events(self) -> list[tuple[str, Message]]:
        """What happened since the last time: (event, data)."""
        taken, self.events = self.events, []
        return [(event.name, event.data) for event in taken]

    # --- bitmaps ---

    def _bitmap_add(self, data: Message) -> None:
        name, granularity = data["name"], data.get("granularity", fake_state.CLUSTER)
        if not 0 <= granularity < 1 << 32:
            raise schema.Refused("Parameter 'granularity' expects uint32_t")
        if not name:
            raise schema.Refused("Bitmap name cannot be empty")
        node = self.find(data["node"])
        if len(name.encode()) > 1023:
            raise schema.Refused(f"Bitmap name too long: {name}")
        if granularity < 512 or granularity & (granularity - 1):
            raise schema.Refused("Granularity must be power of 2 and at least 512")
        persistent = data.get("persistent", False)
        if persistent and node.driver != "qcow2":
            raise schema.Refused(
                f"Can't store persistent bitmaps to {node.name}: Operation not supported"
            )
        if any(bitmap.name == name for bitmap in node.bitmaps):
            raise schema.Refused(f"Bitmap already exists: {name}")
        recording = not data.get("disabled", False)
        node.bitmaps.append(fake_state.Bitmap(name, granularity, persistent, recording))

    def _usable_bitmap(self, data: Message, key: str = "name") -> fake_state.Bitmap:
        bitmap = self._bitmap(data["node"], data[key])
        _check_free(bitmap)
        return bitmap

    def _bitmap(self, node: str, name: str) -> fake_state.Bitmap:
        try:
            found = self.find(node)
        except schema.Refused as failure:
            raise schema.Refused(f"Node '{node}' not found") from failure
        return found.bitmap(name)

    def _bitmap_merge(self, data: Message) -> None:
        target = self._usable_bitmap(data, "target")
        for given in data["bitmaps"]:
            if isinstance(given, str):
                given = {"node": data["node"], "name": given}
            target.count = max(target.count, self._bitmap(given["node"], given["name"]).count)

    # --- exports ---

    def export(self, export: fake_state.Export, bitmaps: Iterable[Any]) -> None:
        """Add EXPORT, whose node was looked up, with BITMAPS."""
        for what, text in (("export name", export.name), ("description", export.description or "")):
            if len(text.encode()) > 4096:
                raise schema.Refused(f"{what} '{text}' too long")
        if export.name in {other.name for other in self.state.exports.values()}:
            raise schema.Refused(f"NBD server already has export named '{export.name}'")
        found = [self._bitmap_below(export.node, given) for given in bitmaps]
        for bitmap in found:
            bitmap.export = export.id
        self.state.exports[export.id] = export

    def _bitmap_below(self, node: str, given: Any) -> fake_state.Bitmap:
        """A bitmap by its name, of NODE or of what it is over; or by node and name."""
        if isinstance(given, dict):
            bitmap = self._bitmap(given["node"], given["name"])
        else:
            chain = [self.state.nodes[node]]
            while (below := self.state.backing_of(chain[-1])) is not None:
                chain.append(below)
            named = [b for one in chain for b in one.bitmaps if b.name == given]
            if not named:
                raise schema.Refused(f"Bitmap '{given}' is not found")
            bitmap = named[0]
        _check_free(bitmap)
        if bitmap.recording and not self.state.nodes[node].readonly:
            raise schema.Refused(
                f"Enabled bitmap '{bitmap.name}' incompatible with readonly export"
            )
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


def _check_free(bitmap: fake_state.Bitmap) -> None:
    if bitmap.export is not None:
        raise schema.Refused(
            f"Bitmap '{bitmap.name}' is currently in use by another operation and cannot be used"
        )
