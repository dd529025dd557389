# SPDX-License-Identifier: LGPL-2.1-or-later
"""The settings of ``virtbackup.conf``: the example's sections and comments, and what the dataclass
says of each field, which is read from its source, where alone the docstrings of fields are."""

import ast
import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "systemd" / "virtbackup.conf"
SOURCE = ROOT / "virtbackup" / "conf" / "virtbackup_conf.py"


@dataclasses.dataclass(frozen=True)
class Setting:
    name: str
    example: str
    """The line of the example, or its lines, without the mark of a comment."""
    comment: str
    """What the example says of it."""
    doc: str
    """What the field says of itself."""
    default: str


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    settings: tuple[Setting, ...]


def sections() -> list[Section]:
    """As the example has them."""
    found = re.split(r"^# --- (.*) ---$", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    fields = _fields()
    return [
        Section(title, tuple(_settings(body, fields)))
        for title, body in zip(found[1::2], found[2::2], strict=True)
    ]


_ENTRY = re.compile(
    r"(?P<comment>(?:^# .*\n)*)^#(?P<example>(?P<name>\w+) = (?:\[\n(?:^# .*\n)*^#\]|.*))$",
    re.MULTILINE,
)


def _settings(body: str, fields: dict[str, tuple[str, str]]) -> list[Setting]:
    settings = []
    for entry in _ENTRY.finditer(body):
        doc, default = fields[entry["name"]]
        example = re.sub(r"^#", "", entry["example"], flags=re.MULTILINE)
        comment = " ".join(line.removeprefix("# ") for line in entry["comment"].splitlines())
        settings.append(Setting(entry["name"], example, comment, doc, default))
    return settings


def _fields() -> dict[str, tuple[str, str]]:
    """Field -> its docstring, and its default."""
    module = ast.parse(SOURCE.read_text(encoding="utf-8"))
    [body] = [
        node.body
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == "Settings"
    ]
    fields = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = after.value if isinstance(after, ast.Expr) else None
            doc = str(said.value) if isinstance(said, ast.Constant) else ""
            default = "" if node.value is None else _default(ast.unparse(node.value))
            fields[node.target.id] = (re.sub("None:", _not_set, doc), default)
    return fields


def _not_set(found: re.Match[str]) -> str:
    """What takes the place of a ``None:``, which is Python's."""
    return "not set:" if found.string[: found.start()].endswith("; ") else "Not set:"


def _default(value: str) -> str:
    """A default as virtbackup.conf would have it."""
    known = {"None": "not set", "()": "none", "True": "yes", "False": "no"}
    return known.get(value, value.replace("'", '"'))
