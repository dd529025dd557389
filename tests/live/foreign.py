# SPDX-License-Identifier: LGPL-2.1-or-later
"""What somebody else has in a QEMU and in the scratch directory, named as ours nearly are."""

import os
import pathlib

from tests.live import machines

NODE, TARGET, JOB = "virtbackup-of-mine", "virtbackup-mirrored", "virtbackup-theirs"
TEXT = "not yours"


def add(machine: machines.Machine) -> None:
    """A node, a job that stays, and a bitmap with something in it, none of ours."""
    probe = machine.probe
    for node in (NODE, TARGET):
        probe.exactly(
            "blockdev-add",
            {"driver": "null-co", "node-name": node, "size": 1 << 20, "read-zeroes": True},
        )
    probe("blockdev-mirror", job_id=JOB, device=NODE, target=TARGET, sync="full")
    probe.wait_event("BLOCK_JOB_READY")
    probe("block-dirty-bitmap-add", node="A", name="theirs")
    machine.io("vda", "write -P 7 0 64k")
    for path in _files():
        path.write_text(TEXT)


def problems(machine: machines.Machine | None) -> list[str]:
    """What of it is not there any more, or not as it was; MACHINE None: QEMU has been killed."""
    missing = [str(path) for path in _files() if not path.exists() or path.read_text() != TEXT]
    if machine is None:
        return missing
    nodes = {node["node-name"]: node for node in machine.probe("query-named-block-nodes")}
    missing += {NODE, TARGET} - nodes.keys()
    jobs = {job["id"]: job["status"] for job in machine.probe("query-jobs")}
    if jobs.get(JOB) != "ready":
        missing.append(f"job {JOB}: {jobs.get(JOB)}")
    bitmaps = {b["name"]: b["count"] for b in nodes["A"].get("dirty-bitmaps", ())}
    if bitmaps.get("theirs") != 64 << 10:
        missing.append(f"bitmap of A: {bitmaps}")
    return missing


def _files() -> list[pathlib.Path]:
    """Names that a scratch image of ours might have, but for the list of those that do."""
    scratch = pathlib.Path(os.environ["VIRTBACKUP_SCRATCH_DIR"])
    state = pathlib.Path(os.environ["VIRTBACKUP_STATE_DIR"])
    return [
        scratch / "virtbackup-01234567-0.qcow2", scratch / "virtbackup-mine", state / "theirs"
    ]  # fmt: skip
