# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's kernel for the guest, wherever in its packages the files are."""

import io
import lzma
import pathlib
import tarfile

import pytest

from demo import kernel

BLK = b"\0depends=virtio-ring\0"
RING = b"\0depends=\0"
DEBIAN_12 = [
    {
        "./boot/vmlinuz-6.1.0-1-cloud-amd64": b"image",
        "./lib/modules/6.1.0-1-cloud-amd64/kernel/drivers/block/virtio_blk.ko": BLK,
        "./lib/modules/6.1.0-1-cloud-amd64/kernel/drivers/virtio/virtio_ring.ko": RING,
    }
]
DEBIAN_14 = [
    {"./usr/share/doc/linux-image-7.2-cloud-amd64/copyright": b""},
    {"./usr/lib/modules/7.2-cloud-amd64/vmlinuz": b"image"},
    {
        "./usr/lib/modules/7.2-cloud-amd64/kernel/virtio_ring.ko.xz": lzma.compress(RING),
        "./usr/lib/modules/7.2-cloud-amd64/kernel/virtio_blk.ko.xz": lzma.compress(BLK),
    },
]


def tar(files: dict[str, bytes]) -> tarfile.TarFile:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return tarfile.open(fileobj=io.BytesIO(out.getvalue()))


@pytest.mark.parametrize("packages", [DEBIAN_12, DEBIAN_14], ids=["12", "14"])
def test_what_is_kept(tmp_path: pathlib.Path, packages: list[dict[str, bytes]]) -> None:
    """Drivers come behind those they depend on; what is built in has no file."""
    kernel._keep_kernel([*map(tar, packages)], tmp_path, ("virtio_blk", "sd_mod"))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    order = b"virtio_ring\nvirtio_blk"
    assert kept == {"vmlinuz": b"image", "virtio_blk": BLK, "virtio_ring": RING, "modules": order}


def test_packages_without_a_kernel(tmp_path: pathlib.Path) -> None:
    with pytest.raises(kernel.Unavailable, match=r"^no kernel is in \S+, nor in what it depends"):
        kernel._keep_kernel([*map(tar, DEBIAN_14[::2])], tmp_path, ("virtio_blk",))


def test_which_packages_of_it_there_are() -> None:
    depends = (
        "linux-image-7.2.13+deb14-cloud-amd64\n  PreDepends: linux-base\n |Depends: dracut\n"
        "  Depends: linux-base-7.2.13+deb14-cloud-amd64\n"
        "  Depends: linux-binary-7.2.13+deb14-cloud-amd64\n"
        "  Depends: linux-modules-7.2.13+deb14-cloud-amd64\n  Breaks: initramfs-tools\n"
    )
    parts = ["linux-binary-7.2.13+deb14-cloud-amd64", "linux-modules-7.2.13+deb14-cloud-amd64"]
    assert kernel._KERNEL_PARTS.findall(depends) == parts
