# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is to know of the qcow2 images that QEMU writes for us. Pure."""

import dataclasses
from typing import Literal

from virtbackup import errors

CLUSTER = 1 << 16
SECTOR = 512
"""The virtual size is a multiple of it."""

_MOST_NAME = 1023


@dataclasses.dataclass(frozen=True)
class Backing:
    """The image behind an image, by its name as it stands in the file.

    That is a path from the directory of the image on. Errors: VIR_ERR_INVALID_ARG for what QEMU
    would refuse or take for something else than a file.
    """

    file: str
    format: Literal["qcow2", "raw"]

    def __post_init__(self) -> None:
        if not 0 < len(self.file.encode()) <= _MOST_NAME or "\0" in self.file:
            raise _bad_name(f"'{self.file}' cannot be the name of a backing file")
        if ":" in self.file.partition("/")[0]:
            raise _bad_name(f"QEMU takes '{self.file}' for a protocol, not for a file's name")


def _bad_name(text: str) -> errors.Error:
    return errors.invalid_arg("backupPull", "backing", text)


def virtual_size(size: int) -> int:
    """SIZE rounded up to what an image can have."""
    return -(-size // SECTOR) * SECTOR
