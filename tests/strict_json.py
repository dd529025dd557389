# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON as the least forgiving of its readers takes it, and what shape it has."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

ANY_NAMES = frozenset({"exports", "fields", "message", "checksums"})
"""Members whose own members are called as the guest, the protocol or the monitor has it."""


def loads(text: str) -> Any:
    """The one value in TEXT. Errors: ValueError, for what Python alone takes (NaN, a name twice,
    bytes that are not ASCII), too."""
    text.encode("ascii")
    return json.loads(text, parse_constant=_refuse, object_pairs_hook=_members)


def lines(text: str) -> list[Any]:
    """Of each line of TEXT. Errors: ValueError."""
    return [loads(line) for line in text.splitlines()]


def first(process: "subprocess.Popen[str]") -> str:
    """The document that PROCESS prints before it goes on. Errors: AssertionError where it ends."""
    assert process.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        line = process.stdout.readline()
        assert line, f"it ended after {text!r}"
        text += line
    return text


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError(f"a name twice: {[name for name, _ in pairs]}")
    return members


def differences(example: Any, value: Any, path: str = "") -> Iterator[str]:
    """Where VALUE has not the shape of EXAMPLE: the same names, and the same types behind them;
    null in either stands for any type. A list's items all are as the example's first."""
    if isinstance(example, Mapping) and isinstance(value, Mapping):
        if re.sub(r"\[\d+\]$", "", path).rpartition(".")[2] in ANY_NAMES:
            return
        if set(example) != set(value):
            yield f"{path}: {sorted(set(example) ^ set(value))}"
        for name in set(example) & set(value):
            yield from differences(example[name], value[name], f"{path}.{name}")
    elif isinstance(example, list) and isinstance(value, list):
        for index, item in enumerate(value[: len(value) if example else 0]):
            yield from differences(example[0], item, f"{path}[{index}]")
    elif None not in (example, value) and _kind(example) != _kind(value):
        yield f"{path}: {value!r} is not as {example!r}"


def _kind(value: Any) -> str:
    if isinstance(value, float) or type(value) is int:
        return "number"
    return type(value).__name__
