# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether frozen images are right: by a reference, and by what the guest must have written."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from demo import records

CHUNK = 1 << 20
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found in one raw image."""

    disk: records.Disk
    newest: int
    """The number of the newest record in it: the guest's write it was frozen after."""
    faults: tuple[str, ...]
    """The first few records, or what is behind them, that are not as they must be; empty when all
    is right."""


def first_difference(one: pathlib.Path, other: pathlib.Path) -> int | None:
    """The offset of the first byte that differs, the end of the shorter file included."""
    offset = 0
    with one.open("rb") as a, other.open("rb") as b:
        while True:
            left, right = a.read(CHUNK), b.read(CHUNK)
            if left != right:
                pairs = zip(left, right, strict=False)
                shorter = min(len(left), len(right))
                return offset + next((i for i, (x, y) in enumerate(pairs) if x != y), shorter)
            if not left:
                return None
            offset += len(left)


def differing_records(disk: records.Disk, one: pathlib.Path, other: pathlib.Path) -> int:
    """How many slots of DISK differ between two raw images."""
    pairs = zip(_slots(disk, one), _slots(disk, other), strict=True)
    return sum(left != right for left, right in pairs)


def examine(disk: records.Disk, raw: pathlib.Path) -> Verdict:
    """Compare every byte of a raw image with what its newest record says must be there."""
    found = [disk.number_of(record) for record in _slots(disk, raw)]
    newest = max((number for number in found if number is not None), default=0)
    faults = []
    for slot, record in enumerate(_slots(disk, raw)):
        want = disk.last(newest, slot)
        if record != disk.content(want, slot):
            faults.append(f"{disk.name} at {slot * disk.record}: record {found[slot]}, not {want}")
    faults += _rest_faults(disk, raw)
    return Verdict(disk, newest, tuple(faults[:_SHOWN]))


def together(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """What is wrong with images that are said to be of one instant; empty when they are."""
    faults = [fault for verdict in verdicts for fault in verdict.faults]
    first, second = verdicts
    if first.newest - second.newest not in (0, 1):
        faults.append(
            f"{first.disk.name} is of write {first.newest}, "
            f"{second.disk.name} of write {second.newest}: not one instant"
        )
    return tuple(faults)


def _slots(disk: records.Disk, raw: pathlib.Path) -> Iterator[bytes]:
    with raw.open("rb") as file:
        for _ in range(disk.slots):
            yield file.read(disk.record)


def _rest_faults(disk: records.Disk, raw: pathlib.Path) -> list[str]:
    size = raw.stat().st_size
    if size != disk.size:
        return [f"{disk.name}: {size} bytes, not {disk.size}"]
    with raw.open("rb") as file:
        file.seek(disk.used)
        if any(file.read()):
            return [f"{disk.name} behind {disk.used}: not zero"]
    return []
