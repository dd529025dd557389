# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recordings that the package ships: made anew from a QEMU or a qemu-storage-daemon.

./dev record --qemu BINARY [FILE]

FILE is virtbackup/recordings/qemu-VERSION.jsonl or storage-daemon-VERSION.jsonl where it is not
given. With VIRTBACKUP_QEMU_ROOT the binary is that of another Debian (tests/live/machines.py).
"""

import argparse
import contextlib
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from unittest import mock

from tests.live import machines
from virtbackup import errors
from virtbackup.qemu import job, recorder, recording

HERE = pathlib.Path(__file__).parents[1] / "virtbackup" / "recordings"
UUID = "c0ffee00-0000-4000-8000-000000000001"
SIZE = 4 << 20
"""Guest-visible bytes of each disk."""
CLUSTER = 64 << 10


def is_storage_daemon(binary: str) -> bool:
    """By its name, as there is no other way to tell before it runs."""
    return "storage-daemon" in pathlib.PurePath(binary).name


def machine(directory: pathlib.Path, binary: str) -> machines.Machine:
    """The QEMU to be recorded, its images in DIRECTORY. Nothing in it moves by itself."""
    _images(directory)
    if is_storage_daemon(binary):
        return machines.storage_daemon(
            directory,
            "--blockdev", _node("qcow2", "vda", directory / "vda.qcow2"),
            "--blockdev", _node("raw", "sdb", directory / "sdb.raw"),
            binary=binary,
        )  # fmt: skip
    return machines.qemu(
        directory, "-name", "vm", "-uuid", UUID,
        "-device", "virtio-scsi-pci,id=scsi0",
        "-blockdev", _node("qcow2", "libvirt-1-format", directory / "vda.qcow2"),
        "-device", "virtio-blk-pci,drive=libvirt-1-format,id=vda",
        "-drive", f"file={directory}/sdb.raw,format=raw,if=none,id=drive-sdb",
        "-device", "scsi-hd,bus=scsi0.0,drive=drive-sdb,id=sdb",
        "-blockdev", _node("raw", "libvirt-3-format", directory / "sdc.iso") + ",read-only=on",
        "-device", "scsi-cd,bus=scsi0.0,drive=libvirt-3-format,id=sdc",
        "-device", "ide-cd,bus=ide.0,id=sdd",
        binary=binary,
    )  # fmt: skip


def _node(driver: str, node: str, path: pathlib.Path) -> str:
    file = f"file.driver=file,file.filename={path},file.node-name={node}-file"
    return f"driver={driver},node-name={node},{file}"


def _images(directory: pathlib.Path) -> None:
    """What the disks hold: every cluster tells its number; vda's are in the image below it."""
    clusters = (bytes([number + 1]) * CLUSTER for number in range(SIZE // CLUSTER))
    data = b"".join(clusters)
    for name in ("base.raw", "sdb.raw", "sdc.iso"):
        (directory / name).write_bytes(data)
    base = directory / "base.qcow2"
    _qemu_img("convert", "-f", "raw", "-O", "qcow2", f"{directory}/base.raw", str(base))
    _qemu_img(
        "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", f"{directory}/vda.qcow2"
    )


def _qemu_img(*arguments: str) -> None:
    """Run qemu-img, that of the QEMU to be recorded."""
    subprocess.run([*machines.INTO_ROOT, "qemu-img", *arguments], check=True)


@contextlib.contextmanager
def running(binary: str) -> Iterator[machines.Machine]:
    """The QEMU to be recorded, in a directory of its own; our own files are there, too."""
    # Always there: some of what QEMU says is the file system's word.
    with tempfile.TemporaryDirectory(prefix="vb-record-", dir="/tmp") as name:
        directory = pathlib.Path(name)
        own = {}
        for variable in ("VIRTBACKUP_STATE_DIR", "VIRTBACKUP_SCRATCH_DIR"):
            (directory / variable).mkdir()
            own[variable] = str(directory / variable)
        with (
            # A stop that takes its time asks once more: not what a slow machine is to change.
            mock.patch.object(job, "_NEWS", math.inf),
            mock.patch.dict(os.environ, own),
            machine(directory, binary) as started,
        ):
            yield started


def record(binary: str) -> recording.Recording:
    """What BINARY says, in its normal form."""
    with running(binary) as started:
        return recorder.Recorder(str(started.qmp)).record()


def default_path(binary: str, found: recording.Recording) -> pathlib.Path:
    """Where the recording FOUND of BINARY is shipped."""
    kind = "storage-daemon" if is_storage_daemon(binary) else "qemu"
    version = found.greeting["QMP"]["version"]["qemu"]
    return HERE / "{}-{major}.{minor}.{micro}.jsonl".format(kind, **version)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev record", description="Record a QEMU.")
    parser.add_argument(
        "--qemu",
        metavar="BINARY",
        required=True,
        help="qemu-system-x86_64 or qemu-storage-daemon, or a path to one",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", type=pathlib.Path)
    options = parser.parse_args(argv)
    try:
        print(_write(options.qemu, options.file))
    except (AssertionError, OSError, subprocess.CalledProcessError, errors.Error) as failure:
        reason = " ".join(str(failure).split())
        print(f"error: {options.qemu} cannot be recorded: {reason}", file=sys.stderr)
        return 1
    return 0


def _write(binary: str, file: pathlib.Path | None) -> pathlib.Path:
    found = record(binary)
    path = file or default_path(binary, found)
    path.write_text(recording.format(found.lines))
    if file is None and os.geteuid() == 0:
        whose = path.parent.stat()  # root for the sake of another Debian's QEMU
        os.chown(path, whose.st_uid, whose.st_gid)
    return path


if __name__ == "__main__":
    sys.exit(main())
