# SPDX-License-Identifier: LGPL-2.1-or-later
"""Comparing what a fake QEMU answers with what a real one did.

Left out is what differs from one run of the same QEMU to the next: automatic names, numbers of
descriptors, threads and graph vertices, space used, the order of nodes, the guest's write cache
(its driver sets it), how often it did what (by names alone); and the nameless bitmaps by which a
job remembers what it saved.
"""

import json
import re
from typing import Any

_VOLATILE = {"actual-size", "fd", "thread-id", "timestamp", "writeback"}
_PERMS = {"perm", "shared-perm"}


def comparable(reply: Any) -> Any:
    """A reply or a part of one, fit to be compared."""
    match reply:
        case {"nodes": list(nodes), "edges": list(edges)}:
            names = {node["id"]: f"{node['type']} {comparable(node['name'])}" for node in nodes}
            return {
                "nodes": sorted(names.values()),
                "edges": sorted((names[e["parent"]], e["name"], names[e["child"]]) for e in edges),
            }
        case dict():
            return _members(reply)
        case list():
            found = [comparable(item) for item in reply]
            return sorted(found, key=lambda item: json.dumps(item, sort_keys=True))
        case str():
            if reply.startswith("json:"):
                return comparable(json.loads(reply.removeprefix("json:")))
            return re.sub(r"#block\d+", "#block", reply)
    return reply


def _members(reply: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in reply.items():
        if name == "dirty-bitmaps":
            value = [bitmap for bitmap in value if "name" in bitmap]
            if not value:
                continue
        if name == "stats":
            value = sorted(set(value) - {"idle_time_ns"})  # there is none before the first request
        if name not in _VOLATILE:
            found[name] = comparable(value)
    return found


def shape(reply: Any) -> Any:
    """Only the types in a reply, lists by their first item."""
    match reply:
        case dict():
            return {name: shape(value) for name, value in sorted(reply.items())}
        case list():
            return [shape(item) for item in reply[:1]]
    return type(reply).__name__
