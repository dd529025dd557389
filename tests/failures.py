# SPDX-License-Identifier: LGPL-2.1-or-later
"""The failure table: what was seen of every fault, as data, and docs/failures.md made from it.

python -m tests.failures      writes docs/failures.md anew

tests/failuresdata/MAJOR.MINOR.json holds what tests/live/test_faults.py saw on such a QEMU. A row
that is not there yet, or VIRTBACKUP_REGENERATE=1, is written, and the test fails that once. On a
QEMU of which there is no file at all, only what holds in all rows is tested. head.md and tail.md
there are what the document says before and after the table.
"""

import dataclasses
import json
import os
import pathlib
import sys

from tests.live import faults, scene

HERE = pathlib.Path(__file__).parent / "failuresdata"
DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "failures.md"

Version = tuple[int, int]
Rows = dict[str, dict[str, scene.Row]]
"""Engine -> fault -> what was seen."""


def path(version: Version) -> pathlib.Path:
    """Where the rows of a QEMU version are."""
    return HERE / f"{'.'.join(map(str, version))}.json"


def versions() -> list[Version]:
    """The QEMUs of which rows are recorded, the oldest first."""
    found = []
    for file in HERE.glob("*.json"):
        major, minor = map(int, file.stem.split("."))
        found.append((major, minor))
    return sorted(found)


def load(version: Version) -> Rows:
    """All rows of a QEMU version; none where nothing was recorded."""
    try:
        data = json.loads(path(version).read_text())
    except FileNotFoundError:
        return {}
    return {
        engine: {name: scene.Row(**row) for name, row in rows.items()}
        for engine, rows in data.items()
    }


def check(version: Version, engine: str, fault: str, row: scene.Row) -> None:
    """Compare what was seen with what is recorded."""
    anew = os.environ.get("VIRTBACKUP_REGENERATE") == "1"
    rows = load(version)
    if not rows and not anew:
        return
    recorded = rows.get(engine, {}).get(fault)
    if recorded is None or anew:
        rows.setdefault(engine, {})[fault] = row
        text = {e: {n: dataclasses.asdict(r) for n, r in of.items()} for e, of in rows.items()}
        path(version).write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
        raise AssertionError(f"{fault} ({engine}) written anew: read it, then run again: {row}")
    assert row == recorded, f"{fault} ({engine}): {row}, not {recorded}"


def document() -> str:
    """docs/failures.md."""
    seen = {version: load(version) for version in versions()}
    lines = [(HERE / "head.md").read_text()]
    group = ""
    for fault in faults.FAULTS:
        if fault.group != group:
            group = fault.group
            lines += [
                "",
                f"## {group}",
                "",
                "| what happens | engine, QEMU | guest | client | stop |",
            ]
            lines.append("|---|---|---|---|---|")
        merged: dict[scene.Row, dict[str, list[str]]] = {}
        for version, rows in seen.items():
            for engine, of in rows.items():
                if fault.name in of:
                    where = merged.setdefault(of[fault.name], {}).setdefault(engine, [])
                    where.append(".".join(map(str, version)))
        what = fault.words
        for row, engines in merged.items():
            where_text = "; ".join(f"{e} {', '.join(v)}" for e, v in sorted(engines.items()))
            cells = (what, where_text, row.guest, row.reader, row.stop)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            what = ""
    return "\n".join(lines) + "\n" + (HERE / "tail.md").read_text()


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    sys.exit(0)
