# SPDX-License-Identifier: LGPL-2.1-or-later
"""Record what the driver and a real QEMU say to each other, for tests/hostile_monitor.py.

python -m tests.record_conversations     writes tests/monitordata/VERSION/CALL.jsonl anew

A line of a file is a message with its direction: ``->`` to QEMU, ``<-`` from it. Every connection
begins with QEMU's greeting.
"""

import json
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from unittest import mock

import virtbackup
from tests.live import machines
from virtbackup.qemu import hang

HERE = pathlib.Path(__file__).parent / "monitordata"

CALLS: dict[str, Callable[[virtbackup.Domain, str], object]] = {
    "list": lambda domain, document: domain.state(),
    "domblklist": lambda domain, document: domain.XMLDesc(),
    "backup-start": lambda domain, document: domain.backupStart(document),
    "backup-info": lambda domain, document: _info(domain),
    "backup-stop": lambda domain, document: domain.backupStop(),
    "backup-cleanup": lambda domain, document: domain.backupCleanup(),
    "branch-start": lambda domain, document: domain.backupStart(_of_branch(document)),
    "branch-stop": lambda domain, document: domain.backupStop(),
    "branch-list": lambda domain, document: domain.branchList(),
    "branch-delete": lambda domain, document: domain.branchDelete("nightly"),
}
"""In the order in which they are recorded."""


def _of_branch(document: str) -> str:
    return document.replace("</domainbackup>", '<branch name="nightly"/></domainbackup>')


def _info(domain: virtbackup.Domain) -> None:
    """Of a QEMU whose files cannot be seen, as that of a recording: it is asked for more."""
    with mock.patch.object(hang, "used", return_value={}):
        domain.backupGetInfo()


BACKUP_ID = "00000000"
"""Stands for the backup's id, which differs from start to start."""


class Wire(logging.Handler):
    """Keeps what goes over monitors."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "monitor=%s %s %s":
            _, direction, line = record.args or ("", "", "")
            self.lines.append(json.dumps({str(direction): json.loads(str(line))}, sort_keys=True))


def main() -> None:
    """One guest, from the first look to the end of its backup."""
    wire = Wire()
    logger = logging.getLogger("virtbackup.qemu.monitor")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(wire)
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        os.environ["VIRTBACKUP_STATE_DIR"] = os.environ["VIRTBACKUP_SCRATCH_DIR"] = name
        document = f'<domainbackup><address type="unix" path="{name}/nbd.sock"/></domainbackup>'
        with machines.two_disks(directory, "-name", "vm", size=4 << 20) as machine:
            version = machine.probe("query-version")["qemu"]
            folder = HERE / "{major}.{minor}.{micro}".format(**version)
            folder.mkdir(parents=True, exist_ok=True)
            for call, execute in CALLS.items():
                wire.lines.clear()
                for kept in directory.glob("*.capabilities"):
                    kept.unlink()  # whoever is served the recording keeps nothing
                with virtbackup.open(machine.uri) as connection:
                    execute(connection.lookupByName("vm"), document)
                text = "\n".join(wire.lines).replace(name, "/images")
                text = re.sub(r"virtbackup-[0-9a-f]{8}", f"virtbackup-{BACKUP_ID}", text)
                (folder / f"{call}.jsonl").write_text(text + "\n")


if __name__ == "__main__":
    main()
