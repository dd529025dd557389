# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a command is valid by a ``query-qmp-schema``. Pure.

Source: QEMU's docs/devel/qapi-code-gen, client JSON protocol introspection. The package has no part
in this: what it sends is checked by another reading of the same document.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Entity = Mapping[str, Any]

REPLACEMENTS = {
    "nbd-server-add": "block-export-add",
    "nbd-server-remove": "block-export-del",
    "drive-backup": "blockdev-backup",
    "block-job-cancel": "job-cancel",
    "block-job-pause": "job-pause",
    "block-job-resume": "job-resume",
    "block-job-complete": "job-complete",
    "block-job-dismiss": "job-dismiss",
    "block-job-finalize": "job-finalize",
    "query-events": "query-qmp-schema",
}
"""What is deprecated, and the command that does it from then on. Where that one is absent, the old
one may be used."""

_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "int": (int,),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
    "value": (str, int, float, bool, type(None), dict, list),
}


@dataclasses.dataclass(frozen=True)
class Schema:
    """What one QEMU can be told; entities by name."""

    entities: Mapping[str, Entity]

    @classmethod
    def parse(cls, reply: Iterable[Entity]) -> "Schema":
        return cls({entity["name"]: entity for entity in reply})

    @functools.cached_property
    def commands(self) -> frozenset[str]:
        return frozenset(
            name for name, entity in self.entities.items() if entity["meta-type"] == "command"
        )

    def problems(self, execute: str, arguments: Mapping[str, Any] | None = None) -> list[str]:
        """What is wrong with a command, each with its place: ``blockdev-add.file.driver``."""
        if execute not in self.commands:
            return [f"{execute}: no such command"]
        command = self.entities[execute]
        return [
            *self._deprecated(command, execute, execute),
            *self._value(command["arg-type"], dict(arguments or {}), execute),
        ]

    def _deprecated(self, what: Entity, place: str, name: str) -> Iterator[str]:
        if "deprecated" not in what.get("features", ()):
            return
        replacement = REPLACEMENTS.get(name)
        if replacement is None or replacement in self.commands:
            yield f"{place}: '{name}' is deprecated" + (
                f", there is '{replacement}'" if replacement else ""
            )

    def _value(self, type_name: str, value: Any, place: str) -> Iterator[str]:
        """The problems of VALUE, which is to be of a type of the schema."""
        entity = self.entities[type_name]
        match entity["meta-type"]:
            case "builtin":
                if not _is(entity["json-type"], value):
                    yield f"{place}: {value!r} is no {entity['json-type']}"
            case "enum":
                yield from self._enum(entity, value, place)
            case "array":
                if not isinstance(value, list):
                    yield f"{place}: {value!r} is no array"
                    return
                for number, item in enumerate(value):
                    yield from self._value(entity["element-type"], item, f"{place}[{number}]")
            case "alternate":
                yield from self._alternate(entity, value, place)
            case "object":
                yield from self._object(entity, value, place)

    def _enum(self, entity: Entity, value: Any, place: str) -> Iterator[str]:
        # Their features came with "members", QEMU 6.2; "values" is what there was before.
        members = {member["name"]: member for member in entity.get("members", ())}
        known = members or {name: {} for name in entity["values"]}
        if not isinstance(value, str) or value not in known:
            yield f"{place}: {value!r} is none of {', '.join(known)}"
        else:
            yield from self._deprecated(known[value], place, value)

    def _alternate(self, entity: Entity, value: Any, place: str) -> Iterator[str]:
        """The branch goes by the JSON type; QAPI has at most one for each."""
        for member in entity["members"]:
            if _is(self._json_type(member["type"]), value):
                yield from self._value(member["type"], value, place)
                return
        yield f"{place}: {value!r} is no alternative"

    def _json_type(self, type_name: str) -> str:
        entity = self.entities[type_name]
        kind: str = entity["meta-type"]
        return entity["json-type"] if kind == "builtin" else {"enum": "string"}.get(kind, kind)

    def _object(self, entity: Entity, value: Any, place: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{place}: {value!r} is no object"
            return
        yield from self._deprecated(entity, place, place)
        members = {member["name"]: member for member in self._members(entity, value)}
        for name, member in members.items():
            if name in value:
                yield from self._deprecated(member, f"{place}.{name}", f"{place}.{name}")
                yield from self._value(member["type"], value[name], f"{place}.{name}")
            elif "default" not in member:
                yield f"{place}: '{name}' is missing"
        for name in value:
            if name not in members:
                yield f"{place}: '{name}' is unknown"

    def _members(self, entity: Entity, value: Mapping[str, Any]) -> Iterator[Entity]:
        """All members that VALUE can have: its own, and those of the variant it says it is."""
        yield from entity["members"]
        if "tag" in entity:
            tag = value.get(entity["tag"])
            for variant in entity["variants"]:
                if variant["case"] == tag:
                    yield from self._members(self.entities[variant["type"]], value)


def _is(json_type: str, value: Any) -> bool:
    if isinstance(value, bool):
        return json_type in ("boolean", "value")
    return isinstance(value, _JSON_TYPES[json_type])
