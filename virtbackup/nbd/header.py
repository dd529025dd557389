# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the header of a qcow2 image says of the image. Pure.

Source: QEMU's docs/interop/qcow2.txt, versions 2 and 3. An image may come from anybody, so whatever
would make QEMU open another file than the one it is given is told here.
"""

import dataclasses
import struct

MAGIC = b"QFI\xfb"
"""What an image begins with."""
SIZE = 1 << 16
"""Bytes of a file that hold the header and all that ``parse`` needs."""

_FIXED = struct.Struct(">4sIQIIQI")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_V2_LENGTH, _V3_LENGTH = 72, 104
_EXTERNAL_DATA, _COMPRESSION = 1 << 2, 1 << 3
_ZSTD = b"\1"
_BACKING_FORMAT = 0xE2792ACA
_MOST_NAME = 1023


class BadHeader(Exception):
    """Not the header of a qcow2 image; the text says why."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What is to know of an image. Sizes are bytes."""

    size: int
    """Guest-visible."""
    cluster: int
    backing: str | None
    """The name of the file behind the image, as it stands there."""
    backing_format: str | None
    encrypted: bool
    external_data: bool
    """The guest's data is in another file."""
    zstd: bool
    """What is compressed of it is so by zstd."""


def parse(data: bytes) -> Header:
    """Read the first SIZE bytes of a file, or all there are. Errors: BadHeader."""
    if len(data) < _V2_LENGTH:
        raise BadHeader("it is shorter than the header of a qcow2 image")
    magic, version, name_at, name_size, bits, size, crypt = _FIXED.unpack_from(data)
    if magic != MAGIC:
        raise BadHeader("it is not a qcow2 image")
    if version not in (2, 3):
        raise BadHeader(f"qcow2 version {version} is unknown")
    if not 9 <= bits <= 21:
        raise BadHeader(f"clusters of 2^{bits} bytes are unknown")
    incompatible, length = 0, _V2_LENGTH
    if version == 3:
        if len(data) < _V3_LENGTH:
            raise BadHeader("it is shorter than the header of a qcow2 image")
        incompatible, _, _, _, length = _V3.unpack_from(data, _V2_LENGTH)
    return Header(
        size=size,
        cluster=1 << bits,
        backing=_name(data, name_at, name_size),
        backing_format=_backing_format(data, length),
        encrypted=crypt != 0,
        external_data=bool(incompatible & _EXTERNAL_DATA),
        zstd=bool(incompatible & _COMPRESSION) and data[_V3_LENGTH : _V3_LENGTH + 1] == _ZSTD,
    )


def _name(data: bytes, offset: int, size: int) -> str | None:
    if offset == 0 or size == 0:
        return None
    if size > _MOST_NAME or offset + size > len(data):
        raise BadHeader("the name of its backing file is out of place")
    try:
        return data[offset : offset + size].decode()
    except UnicodeDecodeError as failure:
        raise BadHeader("the name of its backing file is not text") from failure


def _backing_format(data: bytes, offset: int) -> str | None:
    while offset + _EXTENSION.size <= len(data):
        kind, length = _EXTENSION.unpack_from(data, offset)
        offset += _EXTENSION.size
        if kind == 0:
            break
        if kind == _BACKING_FORMAT:
            return data[offset : offset + length].decode("ascii", "replace")
        offset += -(-length // 8) * 8
    return None
