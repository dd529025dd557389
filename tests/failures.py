# SPDX-License-Identifier: LGPL-2.1-or-later
"""The failure table: what was seen of every fault, as data, and docs/failures.md made from it.

python -m tests.failures      writes docs/failures.md anew

tests/failuresdata/MAJOR.MINOR.json holds what tests/live/test_faults.py saw on such a QEMU. A row
that is not there yet, or VIRTBACKUP_REGENERATE=1, is written, and the test fails that once. On a
QEMU of which there is no file at all, only what holds in all rows is tested.
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

_HEAD = """\
# What happens to a backup, and who sees it

The 2016 proposal left a question open: which failures can the client see that reads a pull backup,
and which only the stop? This is the answer, seen on real QEMUs. It is made from what the tests saw
(`tests/live/test_faults.py`; `python -m tests.failures` writes it anew), and a test that sees
something else fails.

In every row the guest writes to both disks after the start, then something happens, then clients
read both disks to the end, some connected since the start and some anew, and then the backup is
stopped. What the table does not repeat, as it holds in all rows: nothing of the backup is left
afterwards; no write of the guest that succeeded is lost; and *no backup is called good of which a
client could have read a wrong byte*.

- **classic** exports an overlay that a job fills. When the job is lost, the overlay shows the live
  disk: clients read wrong data and no error. Only the stop can tell, and does.
- **hybrid** (QEMU 8.0 and newer) exports a snapshot node over the job's filter: when the job is
  lost, reads fail. A client that read to the end without an error has read the right data.

Who can tell, in short: read errors, the client; a lost job, with classic only the stop, with hybrid
both; a scratch image that fails, with `on-cbw-error` (QEMU 10.1 and newer, hybrid) the client and
the stop, elsewhere the guest, whose write fails or which is paused until the stop or the watch lets
it go on; a QEMU that is gone or another one, both.

A write of the guest that is said to fail here is one that its device hands on. With the default
`werror` QEMU does not hand on that there is no space: it pauses the guest. See the last section.
"""

_TAIL = """
## A guest whose write met a full scratch image

A Linux guest that writes all the time, the default `werror`, nobody watching
(`tests/live/test_guard.py`):

| engine, QEMU | the guest | `backup-info` | what lets it go on |
|---|---|---|---|
| classic 5.2, 7.2; hybrid 10.0 | is paused (`io-error`) | failed: a write of the guest failed and the guest was paused | `backup-stop`, `backup-cleanup` or the next `backup-start`; the write is done then and none is lost |
| hybrid 11.1 | goes on | failed: its snapshot is broken | - |

While whoever started the backup is still there (`backup-pull`, the interactive shell, a program that
keeps its connection), it does not come to that: the backup is given up while there is still room,
half of what was free at the start, and 128 MiB at most.

## What a client can do to the guest

A client that asks and then does not read (a stopped process, a lost network) makes QEMU wait for it
whenever QEMU waits for all requests: in `nbd-server-stop`, in anybody's `transaction` (7.2, 10.0 and
11.1), when a device is reset (10.0 and 11.1). QEMU and the guest then stand still for as long as the
client does not read; QMP has no way out, and deleting the export does not help. So a stop
disconnects all clients before it does anything else; and when the monitor does not answer, the stop
and whoever watches look for such clients and disconnect them. That takes the right to duplicate
QEMU's sockets: being root, or QEMU's user where ptrace(2) is not restricted; freeing a unix socket
whose client does not read takes root.

## A scratch image that hangs

No QEMU seen has a time limit for the scratch images of a backup job: a write of the guest that has
to save old data waits as long as the scratch image's file system does. `backup-info` says so
("Scratch hangs"). Put scratch images on a local disk.
"""


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
    lines = [_HEAD]
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
    return "\n".join(lines) + "\n" + _TAIL


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    sys.exit(0)
