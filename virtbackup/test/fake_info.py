# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a fake QEMU tells of its block layer, as the recorded one would (QEMU's block/qapi.c). Pure.

A node that was there from the start is told as it was recorded, a new one with the members that the
recorded ones have.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from virtbackup.test import fake_state

Message = dict[str, Any]

_READ, _WRITE = ["consistent-read"], ["write", "consistent-read"]
_ANYTHING = ["resize", "write-unchanged", "write", "consistent-read"]


class Info:
    """Replies to queries, of one STATE; IMAGES are the files that nodes have open, TEMPLATES what
    was recorded of nodes. OLD_WORDS: as before QEMU 6.0."""

    def __init__(
        self,
        state: fake_state.State,
        images: Mapping[str, fake_state.Image],
        templates: Sequence[Message],
        old_words: bool,
    ) -> None:
        self._state = state
        self._images = images
        self._templates = templates
        self._old_words = old_words

    def block(self) -> list[Message]:
        return [self._drive(device) for device in self._state.devices]

    def _drive(self, device: fake_state.Device) -> Message:
        drive = {key: value for key, value in device.recorded.items() if key != "inserted"}
        if device.root is None:
            return drive
        recorded = device.recorded.get("inserted")
        if recorded is not None and recorded["node-name"] == device.root:
            inserted = copy.deepcopy(recorded)
            self._renew(inserted, self._state.nodes[device.root])
        else:
            inserted = self.info(self._state.nodes[device.root])
            if recorded is not None:
                inserted["cache"] = recorded.get("cache", inserted["cache"])
        if self._old_words and "dirty-bitmaps" in inserted:
            drive["dirty-bitmaps"] = inserted["dirty-bitmaps"]
        return {**drive, "inserted": inserted}

    def named_block_nodes(self, flat: bool = False) -> list[Message]:
        """FLAT: without what is below the images."""
        found = [self.info(node) for node in reversed(self._state.nodes.values())]
        for info in found:
            if flat:
                info["image"].pop("backing-image", None)
                info["backing_file_depth"] = 0
        return found

    def info(self, node: fake_state.Node) -> Message:
        """QAPI's BlockDeviceInfo."""
        found = copy.deepcopy(node.recorded) if node.recorded else self._made_up(node)
        found["image"] = self._image(node, self._filename(node))
        found["backing_file_depth"] = self._depth(node)
        self._renew(found, node)
        return found

    def _made_up(self, node: fake_state.Node) -> Message:
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
            found["backing_file"] = self._state.nodes[node.children["backing"]].filename
        return found

    def _image(self, node: fake_state.Node, filename: str) -> Message:
        """QAPI's ImageInfo."""
        if node.recorded is not None:
            image = dict(node.recorded["image"])
        else:
            image = self._made_up_image(node, filename)
        below = self._state.backing_of(node)
        if below is not None:
            image["backing-image"] = self._image(below, self._filename(below))
        return image

    def _made_up_image(self, node: fake_state.Node, filename: str) -> Message:
        """The image of a node that was not recorded, what is below it left out."""
        image: Message = {
            "filename": filename, "format": node.driver, "virtual-size": node.size,
            "actual-size": self._actual_size(node),
        }  # fmt: skip
        if node.driver not in ("snapshot-access", "null-co"):
            image["dirty-flag"] = False
        image |= self._as_others(node.driver)
        if self._in_clusters(node):
            image["cluster-size"] = fake_state.CLUSTER
        if node.driver in ("raw", *fake_state.FILTERS):
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

    def _inherit_limits(self, image: Message, node: fake_state.Node) -> None:
        """The strictest of what is below, but for how zeroes are written."""
        found: dict[str, int] = {}
        for child in node.children.values():
            limits = self._image(self._state.nodes[child], "").get("limits", {})
            found |= {key: max(value, found.get(key, 0)) for key, value in limits.items()}
        found.pop("write-zeroes-alignment", None)
        if found:
            image["limits"] = found

    def _in_clusters(self, node: fake_state.Node) -> bool:
        if node.driver in ("raw", *fake_state.JOB_FILTERS, *fake_state.GUEST_FILTERS):
            return self._in_clusters(self._state.nodes[next(iter(node.children.values()))])
        return node.driver == "qcow2"

    def _renew(self, info: Message, node: fake_state.Node) -> None:
        """What changes while a node is there."""
        info["write_threshold"] = node.write_threshold
        info.pop("dirty-bitmaps", None)
        if node.bitmaps:
            # The last made is told first.
            bitmaps = reversed(node.bitmaps)
            info["dirty-bitmaps"] = [bitmap.info(self._old_words) for bitmap in bitmaps]
        if any("children" in template for template in self._templates):
            info["children"] = [
                {"child": role, "node-name": child}
                for role, child in reversed(node.children.items())
            ]

    def _actual_size(self, node: fake_state.Node) -> int:
        if node.name in self._images:
            return self._images[node.name].actual_size()
        if node.recorded is not None:
            return int(node.recorded["image"].get("actual-size", 0))
        below = node.children.get("file")
        return 0 if below is None else self._actual_size(self._state.nodes[below])

    def _depth(self, node: fake_state.Node) -> int:
        below = self._state.backing_of(node)
        if below is not None:
            return 1 + self._depth(below)
        return 0 if node.recorded is None else int(node.recorded.get("backing_file_depth", 0))

    def _filename(self, node: fake_state.Node) -> str:
        """How QEMU calls a node: by its file where that says it all, else by its options."""
        if node.recorded is not None or node.driver in ("file", "null-co"):
            return node.filename
        overlay = "backing" in node.children and node.driver not in fake_state.JOB_FILTERS
        if overlay or node.limit is not None or node.offset:
            return "json:" + json.dumps(self._options(node), sort_keys=True)
        below = next(iter(node.children.values()), None)
        return node.filename if below is None else self._filename(self._state.nodes[below])

    def _options(self, node: fake_state.Node) -> Message:
        if node.driver == "file":
            return {"driver": "file", "filename": node.filename}
        if node.filename.startswith("json:"):  # it was recorded so
            return dict(json.loads(node.filename.removeprefix("json:")))
        found: Message = {"driver": node.driver}
        if node.limit is not None:
            found["size"] = node.limit
        if node.offset:
            found["offset"] = node.offset
        for role, child in node.children.items():
            if node.recorded is None or role == "file":
                found[role] = self._options(self._state.nodes[child])
        return found

    def graph(self) -> Message:
        """``x-debug-query-block-graph``."""
        ids: dict[tuple[str, str], int] = {}

        def vertex(kind: str, name: str) -> int:
            return ids.setdefault((kind, name), len(ids) + 1)

        edges = [
            {"parent": vertex(kind, parent), "child": vertex("block-driver", child), "name": role,
             "perm": perm, "shared-perm": shared}
            for kind, parent, role, child, perm, shared in self._edges()
        ]  # fmt: skip
        for node in self._state.nodes:
            vertex("block-driver", node)
        for job in self._state.jobs:
            vertex("block-job", job)
        for device in self._state.devices:
            vertex("block-backend", device.name)
        nodes = [
            {"id": id, "type": kind, "name": "" if kind == "block-backend" and name[:1] == "\0"
             else name}
            for (kind, name), id in ids.items()
        ]  # fmt: skip
        return {"nodes": nodes, "edges": edges}

    def _edges(self) -> Iterator[tuple[str, str, str, str, list[str], list[str]]]:
        """(kind, parent, role, child, permissions, shared ones)."""
        for node in self._state.nodes.values():
            for role, child in node.children.items():
                reads = role == "backing" or node.driver == "snapshot-access"
                below = self._state.nodes[child]
                perm = [] if reads else _READ if below.readonly else _WRITE
                yield "block-driver", node.name, role, child, perm, _ANYTHING if reads else _READ
        for job in self._state.jobs.values():
            for role, name in (("main node", job.filter), ("target", job.target)):
                if job.filter is not None and name is not None:
                    yield "block-job", job.id, role, name, [], _ANYTHING
            if job.filter is not None and self._old_words:
                root = job.source if job.status == "concluded" else job.filter
                yield "block-backend", f"\0job {job.id}", "root", root, _READ, _ANYTHING
        for device in self._state.devices:
            if device.root is not None:
                perm = _READ if self._state.nodes[device.root].readonly else _WRITE
                yield "block-backend", device.name, "root", device.root, perm, _READ
        for export in self._state.exports.values():
            # A backend without a name; the mark keeps two of them apart.
            yield "block-backend", f"\0export {export.id}", "root", export.node, _READ, _WRITE

    def jobs(self) -> list[Message]:
        return [
            {
                "id": job.id, "type": job.type, "status": job.status,
                "current-progress": 1 if job.type == "create" else 0,
                "total-progress": job.length, **({"error": job.error} if job.error else {}),
            }
            for job in reversed(self._state.jobs.values())
        ]  # fmt: skip

    def block_jobs(self) -> list[Message]:
        return [
            {
                "device": job.id, "type": job.type, "len": job.length, "offset": 0, "speed": 0,
                "status": job.status, "paused": job.paused, "busy": False,
                "ready": False, "io-status": "ok", "auto-finalize": True,
                "auto-dismiss": job.auto_dismiss, **({"error": job.error} if job.error else {}),
            }
            for job in reversed(self._state.jobs.values())
            if job.type == "backup"
        ]  # fmt: skip

    def blockstats(self, zero: Message) -> list[Message]:
        """``query-blockstats``; ZERO is QAPI's BlockDeviceStats, in which nothing was done."""
        found = []
        for device in self._state.devices:
            recorded = device.recorded
            drive: Message = {"device": recorded.get("device", "")}
            if device.qdev:
                drive["qdev"] = device.qdev
            if device.root is not None:
                drive |= self._node_stats(self._state.nodes[device.root], zero, below=True)
            counts = {"account_failed": True, "account_invalid": True}
            found.append({**drive, "stats": {**zero, **counts}})
        return found

    def node_blockstats(self, zero: Message) -> list[Message]:
        """``query-blockstats`` of nodes."""
        nodes = self._state.nodes.values()
        return [self._node_stats(node, zero, below=False) for node in nodes]

    def _node_stats(self, node: fake_state.Node, zero: Message, below: bool) -> Message:
        """BELOW: with what the node is over."""
        found: Message = {"node-name": node.name, "stats": dict(zero)}
        if node.driver == "file":
            found["driver-specific"] = dict(_FILE_STATS)
        nodes = self._state.nodes
        if below and (role := _over(node)) is not None:
            found["backing"] = self._node_stats(nodes[node.children[role]], zero, below)
        if (role := _mostly_in(node)) is not None:
            found["parent"] = self._node_stats(nodes[node.children[role]], zero, below)
        return found

    def exports(self) -> list[Message]:
        return [
            {"id": export.id, "node-name": export.node, "type": "nbd", "shutting-down": False}
            for export in reversed(self._state.exports.values())
        ]


def _over(node: fake_state.Node) -> str | None:
    """The role of what a node is over: a filter's only child, or an image's backing."""
    filters = (*fake_state.FILTERS, *fake_state.GUEST_FILTERS)
    role = "file" if node.driver in filters else "backing"
    return role if role in node.children else None


_FILE_STATS = {"driver": "file", "discard-bytes-ok": 0, "discard-nb-failed": 0, "discard-nb-ok": 0}
_QCOW2_FACTS = {"compat": "1.1", "compression-type": "zlib", "corrupt": False,
                "extended-l2": False, "lazy-refcounts": False, "refcount-bits": 16}  # fmt: skip


def _mostly_in(node: fake_state.Node) -> str | None:
    """The role of what has a node's bytes or their tables: of the file, or, for the filter of a
    backup in QEMU 5.2, of what it is over."""
    role = "backing" if node.driver == "backup-top" else "file"
    return role if role in node.children else None
