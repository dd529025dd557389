# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a command's arguments fit a ``query-qmp-schema``, and QEMU's words where not. Pure.

Source: QEMU's docs/devel/qapi-code-gen (introspection) and measured refusals. QEMU looks at the
members it knows, in their order, and only then for members it does not know.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


class Refused(Exception):
    """QEMU refuses a command: its error class and words."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class

    @property
    def reply(self) -> dict[str, Any]:
        """As QEMU sends it, without an id."""
        return {"error": {"class": self.error_class, "desc": self.desc}}


_IS: Mapping[str, Any] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int and -(1 << 63) <= value < 1 << 64,
    "number": lambda value: type(value) in (int, float),
    "null": lambda value: value is None,
    "value": lambda value: True,
}
_UNSIGNED = ("options.size", "write-threshold")
"""Integers of which QEMU says more than its schema does."""
_ZERO: Mapping[str, Any] = {"string": "", "boolean": False, "null": None}
_EXPECTED = {"string": "string", "boolean": "boolean", "int": "integer", "number": "number",
             "null": "null"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Schema:
    """What one QEMU takes."""

    entities: Mapping[str, Mapping[str, Any]]
    old_words: bool = False
    """QEMU words a bad enum value as it did before 6.0."""

    @classmethod
    def parse(cls, reply: Any, old_words: bool = False) -> "Schema":
        """From a ``query-qmp-schema`` reply. Errors: ValueError."""
        try:
            return cls({str(entity["name"]): entity for entity in reply}, old_words)
        except (KeyError, TypeError) as failure:
            raise ValueError(f"not a schema: {failure!r}") from failure

    def knows(self, command: str) -> bool:
        return self.entities.get(command, {}).get("meta-type") == "command"

    def check(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Raise Refused where ARGUMENTS do not fit COMMAND, which must be known."""
        try:
            self._check(self.entities[self.entities[command]["arg-type"]], arguments, "")
        except (KeyError, TypeError, AttributeError) as failure:
            raise Refused(f"the schema of '{command}' makes no sense: {failure!r}") from failure

    def zero(self, command: str) -> Any:
        """What COMMAND may return, with the members that there must be, and all of them zero; one
        item in each list at the top."""
        found = self.entities[self.entities[command]["ret-type"]]
        if found["meta-type"] == "array":
            return [self._zero(self.entities[found["element-type"]])]
        return self._zero(found)

    def _zero(self, entity: Mapping[str, Any]) -> Any:
        match entity["meta-type"]:
            case "object":
                needed = (member for member in entity["members"] if "default" not in member)
                return {m["name"]: self._zero(self.entities[m["type"]]) for m in needed}
            case "array":
                return []
            case "enum":
                return (entity.get("values") or [m["name"] for m in entity["members"]])[0]
        return _ZERO.get(entity.get("json-type", ""), 0)

    def _check(self, entity: Mapping[str, Any], value: Any, path: str) -> None:
        match entity["meta-type"]:
            case "builtin":
                if not _IS[entity["json-type"]](value):
                    raise _wrong_builtin(entity["json-type"], value, path)
            case "enum":
                self._check_enum(entity, value, path)
            case "array":
                if not isinstance(value, list):
                    raise _wrong_type(path, "array")
                element = self.entities[entity["element-type"]]
                for index, item in enumerate(value):
                    self._check(element, item, f"{path}[{index}]")
            case "alternate":
                self._check_alternate(entity, value, path)
            case "object":
                if not isinstance(value, dict):
                    raise _wrong_type(path, "object")
                self._check_object(entity, value, path)

    def _check_enum(self, entity: Mapping[str, Any], value: Any, path: str) -> None:
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        known = entity.get("values") or [member["name"] for member in entity["members"]]
        if value in known:
            return
        if self.old_words:
            raise Refused(f"Invalid parameter '{value}'")
        name = path.rsplit(".", 1)[-1]
        raise Refused(f"Parameter '{name}' does not accept value '{value}'")

    def _check_alternate(self, entity: Mapping[str, Any], value: Any, path: str) -> None:
        kinds = [self.entities[member["type"]] for member in entity["members"]]
        for kind in kinds:
            if _json_type_fits(kind, value):
                self._check(kind, value, path)
                return
        raise _wrong_type(path, " or ".join(sorted(kind["meta-type"] for kind in kinds)))

    def _check_object(self, entity: Mapping[str, Any], value: dict[str, Any], path: str) -> None:
        known = set()
        for member in self._members(entity, value):
            name = member["name"]
            known.add(name)
            below = f"{path}.{name}" if path else name
            if name in value:
                self._check(self.entities[member["type"]], value[name], below)
            elif "default" not in member:
                raise Refused(f"Parameter '{below}' is missing")
        for name in value:
            if name not in known:
                raise Refused(f"Parameter '{f'{path}.{name}' if path else name}' is unexpected")

    def _members(
        self, entity: Mapping[str, Any], value: Mapping[str, Any]
    ) -> Iterator[Mapping[str, Any]]:
        """The members of an object, those of its variant behind; the variant goes by a member that
        was checked by the time it is asked for."""
        yield from entity["members"]
        for case in entity.get("variants", ()):
            if case["case"] == value.get(entity["tag"]):
                yield from self.entities[case["type"]]["members"]


def _json_type_fits(kind: Mapping[str, Any], value: Any) -> bool:
    match kind["meta-type"]:
        case "builtin":
            return bool(_IS[kind["json-type"]](value))
        case "enum":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
    return isinstance(value, dict)


def _wrong_builtin(kind: str, value: Any, path: str) -> Refused:
    if type(value) is int and path in _UNSIGNED:
        return Refused(f"Parameter '{path}' expects uint64")
    return _wrong_type(path, _EXPECTED[kind])


def _wrong_type(path: str, expected: str) -> Refused:
    return Refused(f"Invalid parameter type for '{path}', expected: {expected}")
