# SPDX-License-Identifier: LGPL-2.1-or-later
"""Record what a real QEMU answers, for the tests that read replies.

python -m tests.record        writes tests/qemublockdata/VERSION/COMMAND.json anew
"""

import json
import pathlib
import re
import tempfile

from tests.live import machines

HERE = pathlib.Path(__file__).parent / "qemublockdata"
QUERIES = ("query-block", "query-named-block-nodes", "x-debug-query-block-graph", "query-jobs",
           "query-block-exports", "query-commands", "query-name", "query-uuid", "query-status",
           "query-fdsets", "query-block-jobs", "query-blockstats", "query-memory-size-summary",
           "query-cpus-fast")  # fmt: skip


def main() -> None:
    """A machine with every kind of drive, at rest and with a mirror running."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        images = {n: machines.image(directory / n, 4 << 20) for n in ("b", "c", "d", "e", "f")}
        base = machines.image(directory / "base", 4 << 20, "qcow2")
        machines.image(directory / "a", 4 << 20, "qcow2", backing=base)
        machines.image(directory / "target", 4 << 20)
        with machines.qemu(
            directory, "-S", "-name", "recorded", "-uuid", "c0ffee00-0000-4000-8000-000000000001",
            "-blockdev", f"file,node-name=fa,filename={directory}/a",
            "-blockdev", "qcow2,node-name=A,file=fa",
            "-device", "virtio-blk,drive=A,id=vda",
            "-device", "virtio-scsi,id=scsi0",
            "-drive", f"file={images['b']},format=raw,if=none,id=drive-b",
            "-device", "scsi-hd,drive=drive-b",
            "-drive", f"file={images['c']},format=raw,if=none,id=drive-c,node-name=C",
            "-device", "scsi-hd,drive=drive-c,id=sdc",
            "-drive", f"file={images['d']},format=raw,if=none,id=drive-d,readonly=on",
            "-device", "scsi-cd,drive=drive-d,id=cdrom",
            "-device", "ide-cd,id=empty",
            "-drive", f"file={images['e']},format=raw,if=pflash",
            "-blockdev", f"raw,node-name=F,file.driver=file,file.filename={images['f']}",
            "-device", "scsi-hd,drive=F",
        ) as machine:  # fmt: skip
            version = machine.probe("query-version")["qemu"]
            folder = HERE / "{major}.{minor}.{micro}".format(**version)
            _write(folder / "rest", machine, directory)
            target = {"driver": "file", "filename": f"{directory}/target"}
            machine.probe("blockdev-add", driver="raw", node_name="T", file=target)
            job = {"job-id": "mirror0", "device": "A", "target": "T", "sync": "full", "speed": 1}
            machine.probe("blockdev-mirror", **job)
            _write(folder / "mirror", machine, directory)


def _write(folder: pathlib.Path, machine: machines.Machine, directory: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    autos: dict[str, str] = {}

    def renumber(match: re.Match[str]) -> str:
        """Automatic node names differ from run to run."""
        return autos.setdefault(match[0], f"#block{len(autos):03}")

    for command in QUERIES:
        text = json.dumps(machine.probe(command), indent=1, sort_keys=True)
        text = re.sub(r"#block\d+", renumber, text.replace(str(directory), "/images"))
        (folder / f"{command}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
