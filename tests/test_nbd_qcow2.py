# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image can have: sizes, names of backing files."""

import libvirt
import pytest

import virtbackup
from virtbackup.nbd import qcow2


@pytest.mark.parametrize(("size", "rounded"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_a_size_is_whole_sectors(size: int, rounded: int) -> None:
    assert qcow2.virtual_size(size) == rounded


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 1024, "nbd:unix:/s", "json:{}", "a:b/c"])
def test_a_name_that_is_none_for_qemu(name: str) -> None:
    with pytest.raises(virtbackup.Error) as raised:
        qcow2.Backing(name, "raw")
    assert raised.value.get_error_code() == libvirt.VIR_ERR_INVALID_ARG


@pytest.mark.parametrize("name", ["x" * 1023, "./a:b", "a/b:c", "\u00e4.raw"])
def test_a_name_that_is_one(name: str) -> None:
    assert qcow2.Backing(name, "raw").file == name
