# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's disks as QEMU tells them (patch 1: the guest-visible size from the block info).

Pure: replies of ``query-block``, ``query-named-block-nodes`` and ``x-debug-query-block-graph``
in, types out.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from virtbackup.conf import domain_conf
from virtbackup.qemu import naming, qmp


@dataclasses.dataclass(frozen=True)
class Medium:
    """What is in a drive: the node at its root."""

    node: naming.NodeName
    driver: str
    filename: str
    size: int
    """Guest-visible, bytes; a multiple of 512."""
    readonly: bool


@dataclasses.dataclass(frozen=True)
class Disk:
    """One drive of the guest, by the name users know it by."""

    target: str
    medium: Medium | None
    qom_path: str | None
    """The device's place in QEMU's object tree, where it has one that can be asked."""
    removable: bool = False

    def definition(self) -> domain_conf.DiskDef:
        """The disk as domain XML tells it."""
        device = "cdrom" if self.removable and (not self.medium or self.medium.readonly) else "disk"
        if self.medium is None:
            return domain_conf.DiskDef(self.target, device)
        return domain_conf.DiskDef(
            self.target,
            device,
            source=self.medium.filename,
            format=self.medium.driver,
            readonly=self.medium.readonly,
            capacity=self.medium.size,
        )


def parse_block(reply: Any) -> tuple[Disk, ...]:
    """``query-block``: every drive but the flash chips that hold firmware.

    A disk's name is its device's id, else its drive's id, else its node's name.
    """
    disks: list[Disk] = []
    for item in _items(reply):
        qdev, drive = str(item.get("qdev", "")), str(item.get("device", ""))
        if re.match(r"/machine/system\.flash\d", qdev) or re.match(r"pflash\d", drive):
            continue
        inserted = item.get("inserted")
        medium = None if inserted is None else _parse_medium(inserted)
        taken = {disk.target for disk in disks}
        names = (_device_id(qdev), drive, medium.node if medium else "")
        target = next((name for name in names if name and name not in taken), None)
        if target is not None:
            disks.append(Disk(target, medium, _qom_path(qdev), bool(item.get("removable"))))
    return tuple(disks)


def parse_named_nodes(reply: Any) -> dict[naming.NodeName, Medium]:
    """``query-named-block-nodes``: every node, as if it were in a drive."""
    media = (_parse_medium(item) for item in _items(reply))
    return {medium.node: medium for medium in media}


def parse_actual_sizes(reply: Any) -> dict[naming.NodeName, int]:
    """``query-named-block-nodes``: node -> bytes its file takes, where the driver can tell."""
    return {
        naming.NodeName(str(item.get("node-name"))): size
        for item in _items(reply)
        if isinstance(item.get("image"), dict)
        and isinstance(size := item["image"].get("actual-size"), int)
    }


def disks_of_nodes(
    nodes: Mapping[naming.NodeName, Medium], graph: "Graph | None"
) -> tuple[Disk, ...]:
    """The disks of a process without devices (qemu-storage-daemon): nodes that no node is over."""
    return tuple(
        Disk(node, medium, None)
        for node, medium in nodes.items()
        if not node.startswith("#") and (graph is None or graph.is_root(node))
    )


def _parse_medium(inserted: Any) -> Medium:
    match inserted:
        case {
            "node-name": str(node),
            "drv": str(driver),
            "ro": bool(readonly),
            "file": str(filename),
            "image": {"virtual-size": int(size)},
        }:
            return Medium(naming.NodeName(node), driver, filename, size, readonly)
    raise qmp.ProtocolError(f"unexpected block info: {str(inserted)[:200]}")


def _device_id(qdev: str) -> str:
    """The user's id in a ``qdev``: the id itself, or a path under /machine/peripheral."""
    if match := re.match(r"/machine/peripheral/([^/]+)", qdev):
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
    raise qmp.ProtocolError(f"unexpected block info: {str(reply)[:200]}")


@dataclasses.dataclass(frozen=True)
class Graph:
    """Who is over whom in the block layer: (kind, name) pairs, kinds as QEMU's
    XDbgBlockGraphNodeType (block-backend, block-job, block-driver)."""

    children: Mapping[tuple[str, str], frozenset[tuple[str, str]]]

    def nodes(self) -> frozenset[naming.NodeName]:
        """Every node."""
        return frozenset(
            naming.NodeName(name) for kind, name in self.children if kind == "block-driver"
        )

    def is_root(self, node: naming.NodeName) -> bool:
        """Whether no other node is over NODE (devices, jobs and exports may be)."""
        return not any(
            kind == "block-driver" and ("block-driver", node) in children
            for (kind, _), children in self.children.items()
        )

    def jobs_on(self, node: naming.NodeName) -> frozenset[naming.JobId]:
        """The block jobs that work above NODE (a filter hides it then) or below it."""
        vertex = ("block-driver", node)
        below = self._below(vertex)
        return frozenset(
            naming.JobId(name)
            for (kind, name), children in self.children.items()
            if kind == "block-job" and (children & below or vertex in self._below((kind, name)))
        )

    def _below(self, top: tuple[str, str]) -> set[tuple[str, str]]:
        found: set[tuple[str, str]] = set()
        todo: list[tuple[str, str]] = [top]
        while todo:
            vertex = todo.pop()
            if vertex not in found:
                found.add(vertex)
                todo.extend(self.children.get(vertex, ()))
        return found


def parse_graph(reply: Any) -> Graph:
    """``x-debug-query-block-graph``."""
    match reply:
        case {"nodes": list(nodes), "edges": list(edges)}:
            pass
        case _:
            raise qmp.ProtocolError(f"unexpected block graph: {str(reply)[:200]}")
    try:
        names = {node["id"]: (str(node["type"]), str(node["name"])) for node in nodes}
        pairs = [(names[edge["parent"]], names[edge["child"]]) for edge in edges]
    except (KeyError, TypeError) as failure:
        raise qmp.ProtocolError(f"unexpected block graph: {failure!r}") from failure
    return Graph(_group(names.values(), pairs))


def _group(
    vertices: Iterable[tuple[str, str]],
    pairs: Iterable[tuple[tuple[str, str], tuple[str, str]]],
) -> dict[tuple[str, str], frozenset[tuple[str, str]]]:
    children: dict[tuple[str, str], set[tuple[str, str]]] = {vertex: set() for vertex in vertices}
    for parent, child in pairs:
        children[parent].add(child)
    return {vertex: frozenset(below) for vertex, below in children.items()}
