# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a QEMU said of itself, from one of our recordings or one of libvirt's. Pure.

libvirt keeps what its capability probes are answered in tests/qemucapabilitiesdata/*.replies: JSON
documents with blank lines between them. Newer files have the commands between the replies, older
ones have not; so a reply is known by its shape.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from virtbackup.qemu import recording


@dataclasses.dataclass(frozen=True)
class Replies:
    """The replies to ``query-version``, ``query-commands`` and ``query-qmp-schema``."""

    version: dict[str, Any]
    commands: list[dict[str, Any]]
    schema: list[dict[str, Any]] | None
    """None before QEMU 2.5, which has none."""


def of_recording(found: recording.Recording) -> Replies:
    """From a recording. Errors: KeyError for what is not in it."""
    version, commands, schema = map(
        found.reply, ("query-version", "query-commands", "query-qmp-schema")
    )
    return Replies(version, commands, schema)


def parse(text: str) -> Replies:
    """From libvirt's format. Errors: ValueError for what is not JSON or tells no version."""
    version: dict[str, Any] | None = None
    commands: list[dict[str, Any]] | None = None
    schema: list[dict[str, Any]] | None = None
    for document in _documents(text):
        match document:
            case {"QMP": {"version": {"qemu": {"major": _}} as found}}:
                version = version or found
            case {"return": {"qemu": {"major": _}} as found}:
                version = found
            case {"return": [{"meta-type": _}, *_] as found}:
                schema = found
            case {"return": [*found]} if {"name": "qmp_capabilities"} in found:
                commands = found
    if version is None:
        raise ValueError("no reply tells the version of QEMU")
    if commands is None:
        # libvirt no longer asks for what is in the schema anyway.
        entities = schema or ()
        commands = [{"name": e["name"]} for e in entities if e["meta-type"] == "command"]
    return Replies(version, commands, schema)


def _documents(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    rest = text.lstrip()
    position = len(text) - len(rest)
    while position < len(text):
        document, position = decoder.raw_decode(text, position)
        yield document
        while position < len(text) and text[position].isspace():
            position += 1
