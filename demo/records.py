# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guest writes, so that every byte of a frozen disk can be foretold from one number.

Write number N goes to slot ``N * stride % slots`` of every disk, to the first disk first and to
the next only when that write is done. A disk frozen after its write N therefore holds in each slot
the last record at or before N, and the numbers of two disks frozen together differ by 0 or 1.
Record 0 is what every slot holds before the guest starts; what lies behind the slots stays zero.
The guest imports this module too: it needs nothing but ``math`` and ``struct``.
"""

import math
import struct

BLOCK = 4096
_HEADER = struct.Struct("<8sIIQQ")
_MAGIC = b"VBRECORD"
_MIX = 0x9E3779B97F4A7C15


class Disk:
    """One disk of the guest: its Linux name, its size and its records, in bytes."""

    def __init__(self, number: int, name: str, size: int, record: int, slots: int) -> None:
        self.number = number
        self.name = name
        self.size = size
        self.record = record
        self.slots = slots
        self._stride = next(s for s in range(slots * 618 // 1000, slots) if math.gcd(s, slots) == 1)
        self._inverse = pow(self._stride, -1, slots)

    @property
    def used(self) -> int:
        """Where the slots end."""
        return self.slots * self.record

    def slot(self, number: int) -> int:
        """Where write NUMBER goes."""
        return number * self._stride % self.slots

    def last(self, newest: int, slot: int) -> int:
        """Which record SLOT holds after write NEWEST; 0 when none was written there yet."""
        first = slot * self._inverse % self.slots
        if newest < first:
            return 0
        return newest - (newest - first) % self.slots

    def content(self, number: int, slot: int) -> bytes:
        """Record NUMBER as it stands in SLOT: every word of it tells the number."""
        word = struct.pack("<Q", (number * _MIX + self.number) & (1 << 64) - 1)
        filler = word * ((BLOCK - _HEADER.size) // len(word))
        return b"".join(
            _HEADER.pack(_MAGIC, self.number, block, slot, number) + filler
            for block in range(self.record // BLOCK)
        )

    def number_of(self, record: bytes) -> int | None:
        """The number a record says it has; None for what is no record of this disk."""
        magic, disk, _, _, number = _HEADER.unpack_from(record)
        if magic != _MAGIC or disk != self.number:
            return None
        return int(number)


DISKS = (
    Disk(0, "vda", size=128 << 20, record=65536, slots=1536),
    Disk(1, "sda", size=128 << 20, record=4096, slots=24576),
)
"""The guest's disks in the order it writes to them."""
