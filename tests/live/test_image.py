# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that QEMU made, read without QEMU: the disk is the same to both."""

import os
import pathlib
import subprocess
import tempfile
import threading

import pytest

import virtbackup
from virtbackup.nbd import checksum, copy, image

pytestmark = [pytest.mark.needs("qemu-img", "qemu-io", "qemu-nbd"), pytest.mark.timeout(60)]

SIZE = (9 << 20) + 512
WRITES = (
    "write -P 1 0 1M", "write -P 2 3M 100k", "write -z 4M 1M", "write -P 3 5M 512",
    "write -P 4 3200k 64k", "write -P 5 9M 512", "write -z 0 64k", "discard 128k 64k",
)  # fmt: skip


def made(path: pathlib.Path, options: str, backing: str | None = None) -> None:
    behind = () if backing is None else ("-b", backing, "-F", "qcow2")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *behind]
    subprocess.run([*create, path, str(SIZE)], check=True)
    commands = [word for write in WRITES for word in ("-c", write)]
    subprocess.run(["qemu-io", "-f", "qcow2", *commands, path], check=True, capture_output=True)


OPTIONS = (
    "compat=1.1", "compat=0.10", "cluster_size=256k", "cluster_size=2M", "preallocation=metadata",
    "preallocation=falloc", "lazy_refcounts=on", "refcount_bits=1",
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_a_full_image(tmp_path: pathlib.Path, options: str) -> None:
    path = tmp_path / "a.qcow2"
    made(path, options)
    with image.File(path) as file:
        assert image.Qcow2(file, SIZE).read(increment=False).checksum == copy.checksum_of_file(
            path, "qcow2", SIZE
        )


@pytest.mark.parametrize("options", ["compat=1.1", "cluster_size=256k", "cluster_size=2M"])
def test_an_increment(tmp_path: pathlib.Path, options: str) -> None:
    made(tmp_path / "a.qcow2", "compat=1.1")
    path = tmp_path / "b.qcow2"
    made(path, options, "a.qcow2")
    with image.File(path) as file:
        assert image.Qcow2(file, SIZE).read(increment=True).checksum == copy.checksum_of_increment(
            path, SIZE
        )


def test_a_file_without_end_is_none_of_an_image(tmp_path: pathlib.Path) -> None:
    """What has no data takes no room in a file, and would take it in memory."""
    path = tmp_path / "a.qcow2"
    made(path, "compat=1.1")
    os.truncate(path, 1 << 43)
    with image.File(path) as file, pytest.raises(image.Damaged, match="more than any image"):
        image.Qcow2(file, SIZE)


def test_a_hole_without_end_can_be_cancelled() -> None:
    """tmpfs takes as large a file as there may be."""
    cancel = copy.Cancel()
    timer = threading.Timer(0.5, cancel.set)
    with tempfile.TemporaryFile(dir="/dev/shm") as opened:
        os.truncate(opened.fileno(), 1 << 62)
        with image.File(pathlib.Path(f"/proc/self/fd/{opened.fileno()}")) as file:
            timer.start()
            with pytest.raises(virtbackup.Error, match="the copy was cancelled"):
                image.read_raw(file, 1 << 62, cancel=cancel)
    timer.join()
    cancel.close()


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_compressed_image_is_told_to_be(tmp_path: pathlib.Path, kind: str) -> None:
    made(tmp_path / "a.qcow2", "compat=1.1")
    subprocess.run(
        ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}",
         tmp_path / "a.qcow2", tmp_path / "b.qcow2"], check=True,
    )  # fmt: skip
    with image.File(tmp_path / "b.qcow2") as file:
        found = image.Qcow2(file, SIZE)
        assert found.has_compressed
        assert found.read_tables().read > checksum.BLOCK


def test_snapshots_and_other_data_files_are_refused(tmp_path: pathlib.Path) -> None:
    made(tmp_path / "a.qcow2", "compat=1.1")
    subprocess.run(["qemu-img", "snapshot", "-c", "one", tmp_path / "a.qcow2"], check=True)
    with pytest.raises(image.Damaged, match="snapshots"):
        image.tables_checksum(tmp_path / "a.qcow2", SIZE)
    made(tmp_path / "b.qcow2", f"data_file={tmp_path}/data,data_file_raw=on")
    with pytest.raises(image.Damaged, match="incompatible features, 0x4"):
        image.tables_checksum(tmp_path / "b.qcow2", SIZE)
