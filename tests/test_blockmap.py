# SPDX-License-Identifier: LGPL-2.1-or-later
"""Maps of disks: what is counted, and how it is drawn."""

import struct
import zlib

from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from virtbackup.tools import blockmap

RUNS = st.lists(
    st.tuples(st.integers(1, 5000), st.sampled_from(blockmap.KINDS), st.booleans()), max_size=20
)


def ranges(runs: list[tuple[int, blockmap.Kind, bool]]) -> list[blockmap.Range]:
    found, at = [], 0
    for length, kind, dirty in runs:
        found.append(blockmap.Range(at, at + length, kind, dirty))
        at += length
    return found


@given(RUNS, st.integers(1, 60))
def test_nothing_is_lost(runs: list[tuple[int, blockmap.Kind, bool]], count: int) -> None:
    given = ranges(runs)
    size = given[-1].end if given else 0
    drawn = blockmap.measure("vda", size, iter(given), count, True)
    assert len(drawn.cells) <= count
    assert sum(cell.size for cell in drawn.cells) == drawn.total.size == size
    for kind in blockmap.KINDS:
        want = sum(length for length, k, _ in runs if k == kind)
        assert getattr(drawn.total, kind) == want
        assert sum(getattr(cell, kind) for cell in drawn.cells) == want
    assert drawn.total.dirty == sum(length for length, _, dirty in runs if dirty)
    assert len({cell.size for cell in drawn.cells[:-1]}) <= 1
    merged = list(blockmap.merged(given))
    assert blockmap.measure("vda", size, merged, count, True) == drawn
    lines = list(blockmap.text(drawn, 16, blockmap.ASCII, False))
    assert sum(len(line) - 2 for line in lines[:-4]) == len(drawn.cells)
    svg = etree.fromstring(blockmap.svg([drawn], "a <b> \x01").encode())
    rects = svg.findall("{http://www.w3.org/2000/svg}rect")
    own = [one for one in rects if one.get("height") == "6"]
    assert sum(int(one.get("width", "0")) // 6 for one in own) == len(drawn.cells)


def test_signs() -> None:
    Cell = blockmap.Cell
    for cell, sign in (
        (Cell(8, data=8), "#"), (Cell(8, data=4, hole=4), "+"), (Cell(8, data=1, zero=7), "-"),
        (Cell(8, zero=1, hole=7), "0"), (Cell(8, hole=8), "."), (Cell(8, hole=8, dirty=1), "*"),
    ):  # fmt: skip
        assert blockmap.sign(cell, blockmap.ASCII) == sign


def test_text() -> None:
    given = ranges([(512, "data", False), (512, "hole", True), (1024, "zero", False)])
    drawn = blockmap.measure("vda", 2048, given, 4, True)
    assert list(blockmap.text(drawn, 3, blockmap.ASCII, False)) == [
        "  #*0",
        "  0",
        "  # data                512 bytes  25.0%",
        "  0 zero               1024 bytes  50.0%",
        "  . hole                512 bytes  25.0%",
        "  * dirty               512 bytes  25.0%",
    ]
    plain = blockmap.measure("vda", 2048, given, 4, False)
    assert len(list(blockmap.text(plain, 3, blockmap.ASCII, False))) == 5
    colored = next(blockmap.text(drawn, 1, blockmap.BLOCKS, True))
    assert colored == "  \033[34m█\033[0m"


def test_png() -> None:
    """Every pixel of it, read back by the definition of the format."""
    given = ranges([(512 * 128, "data", False), (512 * 60, "zero", True)])
    drawn = blockmap.measure("vda", 512 * 188, given, 4096, True)
    data = blockmap.png([drawn, blockmap.measure("e", 0, [], 4096, True)])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        [crc] = struct.unpack_from(">I", data, at + 8 + length)
        assert crc == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 2, 0, 0, 0]
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(raw) == height * (1 + 3 * width)
    rows = [raw[i : i + 1 + 3 * width] for i in range(0, len(raw), 1 + 3 * width)]
    assert {row[0] for row in rows} == {0}

    def pixel(x: int, y: int) -> str:
        return "#" + rows[y][1 + 3 * x : 4 + 3 * x].hex()

    assert pixel(12, 12) == pixel(779, 17) == "#2f6db5"
    assert pixel(12, 18) == pixel(12 + 59 * 6, 18) == "#d1495b"
    assert pixel(12 + 60 * 6, 18) == pixel(0, 0) == pixel(width - 1, height - 1) == "#ffffff"
