# SPDX-License-Identifier: LGPL-2.1-or-later
"""demo.records and demo.judge: the demonstration's own yardstick must be able to say no."""

import pathlib

import hypothesis
import pytest
from hypothesis import strategies

from demo import judge, records

SMALL = (
    records.Disk(0, "vda", size=1 << 20, record=65536, slots=12),
    records.Disk(1, "sda", size=1 << 20, record=4096, slots=192),
)


def write(disk: records.Disk, path: pathlib.Path, newest: int) -> pathlib.Path:
    """What a disk holds after write NEWEST, made by doing all the writes."""
    with path.open("wb") as file:
        for slot in range(disk.slots):
            file.write(disk.content(0, slot))
        for number in range(1, newest + 1):
            slot = disk.slot(number)
            file.seek(slot * disk.record)
            file.write(disk.content(number, slot))
        file.truncate(disk.size)
    return path


def patch(path: pathlib.Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("disk", records.DISKS, ids=lambda disk: disk.name)
def test_every_slot_is_written_once_a_round(disk: records.Disk) -> None:
    assert sorted(map(disk.slot, range(disk.slots))) == list(range(disk.slots))
    assert disk.used < disk.size


@hypothesis.given(
    strategies.sampled_from(SMALL), strategies.integers(0, 1000), strategies.integers(0, 11)
)
def test_last_is_what_the_writes_leave(disk: records.Disk, newest: int, slot: int) -> None:
    writes = [number for number in range(1, newest + 1) if disk.slot(number) == slot]
    assert disk.last(newest, slot) == max(writes, default=0)


@pytest.mark.parametrize("newest", [0, 1, 11, 12, 500])
def test_a_right_image_is_right(tmp_path: pathlib.Path, newest: int) -> None:
    for disk in SMALL:
        verdict = judge.examine(disk, write(disk, tmp_path / disk.name, newest))
        assert (verdict.newest, verdict.faults) == (newest, ())


def test_a_single_changed_byte_is_found(tmp_path: pathlib.Path) -> None:
    disk = SMALL[1]
    path = write(disk, tmp_path / "sda", 100)
    patch(path, 70000, b"x")
    assert len(judge.examine(disk, path).faults) == 1


def test_a_record_from_after_the_instant_is_found(tmp_path: pathlib.Path) -> None:
    disk = SMALL[0]
    path = write(disk, tmp_path / "vda", 20)
    slot = disk.slot(23)
    patch(path, slot * disk.record, disk.content(23, slot))
    assert judge.examine(disk, path).faults


def test_a_torn_record_is_found(tmp_path: pathlib.Path) -> None:
    disk = SMALL[0]
    path = write(disk, tmp_path / "vda", 20)
    slot = disk.slot(20)
    patch(path, slot * disk.record + 32768, disk.content(8, slot)[32768:])
    assert judge.examine(disk, path).faults


def test_data_behind_the_slots_and_a_wrong_size_are_found(tmp_path: pathlib.Path) -> None:
    disk = SMALL[0]
    path = write(disk, tmp_path / "vda", 5)
    patch(path, disk.size - 1, b"x")
    assert "not zero" in judge.examine(disk, path).faults[0]
    patch(path, disk.size, b"x")
    assert "bytes" in judge.examine(disk, path).faults[0]


@pytest.mark.parametrize(
    ("first", "second", "right"), [(20, 20, True), (20, 19, True), (19, 20, False), (21, 19, False)]
)
def test_one_instant(tmp_path: pathlib.Path, first: int, second: int, right: bool) -> None:
    numbers = (first, second)
    verdicts = [
        judge.examine(disk, write(disk, tmp_path / disk.name, number))
        for disk, number in zip(SMALL, numbers, strict=True)
    ]
    assert (judge.together(verdicts) == ()) is right


def test_first_difference(tmp_path: pathlib.Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(judge.CHUNK + 10))
    other.write_bytes(bytes(judge.CHUNK + 10))
    assert judge.first_difference(one, other) is None
    patch(other, judge.CHUNK + 3, b"x")
    assert judge.first_difference(one, other) == judge.CHUNK + 3
    other.write_bytes(bytes(judge.CHUNK + 4))
    assert judge.first_difference(one, other) == judge.CHUNK + 4
