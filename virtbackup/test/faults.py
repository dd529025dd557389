# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults that a fake QEMU is told to have (docs/test-driver.md). Pure.

A file is a JSON array of rules. A rule says at which command it applies, and what happens then:

    {"command": "block-export-add", "nth": 2, "error": {"class": "GenericError", "desc": "no"}}
"""

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

When = Literal["before", "after"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens at a command, before it is done or after its reply."""

    command: str
    """Its name, with ``*`` and ``?`` as in the shell."""
    nth: int | None = None
    """At which time, from 1; None: every time."""
    when: When = "before"
    error: Mapping[str, str] | None = None
    """The reply, with nothing done: its ``class`` and ``desc``."""
    event: Mapping[str, Any] | None = None
    """An event that arrives."""
    cancel_job: str | None = None
    """Jobs that end, by their names."""
    job_error: str | None = None
    """What they end with; None: they were cancelled."""
    break_snapshot: str | None = None
    """Backup jobs, by their names, whose snapshot is lost while they run."""
    unplug: str | None = None
    """The id of a device that goes."""
    stop: str | None = None
    """The guest stops, in this run state, as ``io-error``."""
    io_status: str | None = None
    """The io-status of all drives from then on, as ``nospace``; the guest's going on ends it."""
    silent: bool = False
    """The command is done, and no reply comes."""
    hang_up: bool = False
    """The connection ends: before the command is done, or after its reply."""
    quit: bool = False
    """QEMU ends, once the command is done."""


_TEXTS = ("command", "cancel_job", "job_error", "break_snapshot", "unplug", "stop", "io_status")
_ONE_OF = {
    "when": ("before", "after"),
    "stop": (
        "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch",
        "finish-migrate", "restore-vm", "shutdown", "suspended", "watchdog", "guest-panicked",
        "colo",
    ),
    "io_status": ("ok", "failed", "nospace"),
}  # fmt: skip
"""QAPI's RunState, of a guest that does not run, and BlockDeviceIoStatus."""
_FLAGS = ("silent", "hang_up", "quit")
_ONLY_BEFORE = ("error", "silent")


def parse(text: str) -> tuple[Rule, ...]:
    """Read a file. Errors: ValueError, naming the rule by its number from 1."""
    try:
        found = json.loads(text)
        # Not with half a character in it, nor with a number that is none.
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as failure:
        raise ValueError(f"not JSON: {failure}") from failure
    if not isinstance(found, list):
        raise ValueError("expected an array of rules")
    return tuple(_rule(number, rule) for number, rule in enumerate(found, 1))


def _rule(number: int, given: Any) -> Rule:
    if not isinstance(given, dict):
        raise ValueError(f"rule {number}: expected an object")
    known = {field.name.replace("_", "-"): field.name for field in dataclasses.fields(Rule)}
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"rule {number}: '{unknown[0]}' is not known")
    if "command" not in given:
        raise ValueError(f"rule {number}: 'command' is missing")
    values = {known[name]: value for name, value in given.items()}
    for name, value in values.items():
        if why := _wrong(name, value):
            raise ValueError(f"rule {number}: '{name.replace('_', '-')}' {why}")
    rule = Rule(**values)
    if rule.when == "after" and any(getattr(rule, name) for name in _ONLY_BEFORE):
        raise ValueError(f"rule {number}: a reply cannot be changed after it was sent")
    if not set(values) - {"command", "nth", "when", "job_error"}:
        raise ValueError(f"rule {number}: nothing happens")
    return rule


def _wrong(name: str, value: Any) -> str | None:
    """Why VALUE is none for the field NAME."""
    if name in _TEXTS and not isinstance(value, str):
        return "is no string"
    if name in _ONE_OF and value not in _ONE_OF[name]:
        return f"is none of {', '.join(_ONE_OF[name])}"
    if name in _FLAGS and value is not True:
        return "is not true"
    if name == "nth" and (type(value) is not int or value < 1):
        return "is no number from 1 on"
    if name == "error":
        match value:
            case {"class": str(), "desc": str()} if len(value) == 2:
                return None
        return "is no object of class and desc"
    if name == "event":
        match value:
            case {"event": str(), **rest} if isinstance(rest.get("data", {}), dict):
                return None if set(rest) <= {"data"} else "has more than event and data"
        return "is no object of event and data"
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's PATTERN means NAME."""
    return fnmatch.fnmatchcase(name, pattern)


class Rules:
    """The rules of one fake, which counts its commands."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = tuple(rules)
        self._seen = [0] * len(self._rules)

    def check(self, commands: Iterable[str]) -> None:
        """Raise ValueError for a rule, by its number, that means none of COMMANDS."""
        names = list(commands)
        for number, rule in enumerate(self._rules, 1):
            if not any(matches(rule.command, name) for name in names):
                raise ValueError(f"rule {number}: no command is called '{rule.command}'")

    def take(self, command: str) -> tuple[list[Rule], list[Rule]]:
        """COMMAND came: the rules that apply to it (before it is done, after its reply)."""
        found: dict[str, list[Rule]] = {"before": [], "after": []}
        for number, rule in enumerate(self._rules):
            if matches(rule.command, command):
                self._seen[number] += 1
                if rule.nth in (None, self._seen[number]):
                    found[rule.when].append(rule)
        return found["before"], found["after"]
