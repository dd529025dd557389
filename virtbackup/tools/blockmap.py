# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a disk has data: a map of it, read from a backup or a running one, and drawn.

A disk is cut into cells of equal size; of each is known how many bytes are data, zeroes that are
stored, holes, and have changed since the point before. So memory has a bound whatever the disk's
size, and a drawing shows of a cell that anything in it has changed.
"""

import dataclasses
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal
from xml.sax import saxutils

from virtbackup.nbd import connection, copy, extents, layers
from virtbackup.tools import listing, restore, verify

Kind = Literal["data", "zero", "hole"]
KINDS: tuple[Kind, ...] = ("data", "zero", "hole")
_KIND: dict[extents.Kind, Kind] = {
    extents.Kind.DATA: "data",
    extents.Kind.ZERO: "zero",
    extents.Kind.HOLE: "hole",
}

_LEAST = 512
"""Bytes of the smallest cell."""


@dataclasses.dataclass(frozen=True)
class Range:
    """From START to END the disk is of one KIND; DIRTY: it has changed since the point before."""

    start: int
    end: int
    kind: Kind
    dirty: bool


@dataclasses.dataclass
class Cell:
    """A part of a disk; bytes."""

    size: int = 0
    data: int = 0
    zero: int = 0
    hole: int = 0
    dirty: int = 0

    def add(self, count: int, kind: Kind, dirty: bool) -> None:
        setattr(self, kind, getattr(self, kind) + count)
        self.size += count
        self.dirty += count if dirty else 0


@dataclasses.dataclass(frozen=True)
class Map:
    """A disk of SIZE bytes, drawn from CELLS of it that are equal but for the last."""

    disk: str
    size: int
    cells: tuple[Cell, ...]
    total: Cell
    tells_dirty: bool
    """Whether it is known what has changed."""


# --- what there is --------------------------------------------------------------------------------


def of_point(
    backups: listing.Backups, point: listing.Point, name: str, cancel: copy.Cancel
) -> Iterator[Range]:
    """The ranges of a disk of a backup. Errors: those of ``restore.check`` and ``copy.copy``;
    VIR_ERR_OPERATION_INVALID where a prune has changed meanwhile what POINT is made of."""
    verify.need("qemu-nbd")
    with backups.telling_of_prunes(point):
        yield from merged(_ranges(backups.links(point, name), cancel))
    backups.check_not_pruned(point)


def _ranges(links: Sequence[listing.Link], cancel: copy.Cancel) -> Iterator[Range]:
    """Of the disk that LINKS are the files of."""
    restore.check(links)
    increment = links[0].disk.backing is not None
    found = layers.shown([verify.job(link) for link in links], cancel)
    # A hole of an increment is zeroes that it has stored: what it leaves out is not its own.
    return (
        Range(
            part.start,
            part.end,
            "zero" if part.kind is extents.Kind.HOLE and part.layer < len(links) - 1
            else _KIND[part.kind],
            increment and part.layer == 0,
        )
        for part in found
    )  # fmt: skip


def of_export(
    export: connection.Export, changes: str | None, cancel: copy.Cancel
) -> Iterator[Range]:
    """The ranges of an export; CHANGES is the context that tells what has changed. Errors: those of
    ``copy.copy``."""
    found = layers.changes(copy.Job(export, None, dirty=changes), cancel)
    return merged(
        Range(start, end, _KIND[kind], change is not extents.Kind.SKIP)
        for start, end, kind, change in found
    )


def merged(ranges: Iterable[Range]) -> Iterator[Range]:
    """The same, with neighbours that are alike as one."""
    last: Range | None = None
    for one in ranges:
        if last is not None and (last.kind, last.dirty) == (one.kind, one.dirty):
            last = dataclasses.replace(last, end=one.end)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


def measure(disk: str, size: int, ranges: Iterable[Range], count: int, tells_dirty: bool) -> Map:
    """A map of at most COUNT cells, of whole blocks but for the last."""
    grain = -(-size // (count * _LEAST)) * _LEAST if size else _LEAST
    cells = [Cell() for _ in range(-(-size // grain))]
    total = Cell()
    for one in ranges:
        total.add(one.end - one.start, one.kind, one.dirty)
        at = one.start
        while at < one.end:
            index = at // grain
            end = min(one.end, (index + 1) * grain)
            cells[index].add(end - at, one.kind, one.dirty)
            at = end
    return Map(disk, size, tuple(cells), total, tells_dirty)


# --- in text --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Signs:
    """What cells are drawn by."""

    full: str
    """All data."""
    half: str
    some: str
    zero: str
    hole: str
    dirty: str


BLOCKS = Signs("█", "▓", "▒", "░", "·", "◆")
ASCII = Signs("#", "+", "-", "0", ".", "*")
_COLORS = {"dirty": "\033[31m", "data": "\033[34m", "zero": "\033[36m", "hole": "\033[2m"}
_PLAIN = "\033[0m"


def sign(cell: Cell, signs: Signs) -> str:
    """The sign of a cell."""
    if cell.dirty:
        return signs.dirty
    if not cell.data:
        return signs.zero if cell.zero else signs.hole
    if cell.data == cell.size:
        return signs.full
    return signs.half if cell.data * 2 >= cell.size else signs.some


def text(drawn: Map, width: int, signs: Signs, colors: bool) -> Iterator[str]:
    """Lines of the map, WIDTH cells each, and of what the signs mean."""
    for start in range(0, len(drawn.cells), width):
        row = drawn.cells[start : start + width]
        parts = (
            _colored("".join(sign(cell, signs) for cell in some), name, colors)
            for name, some in itertools.groupby(row, color_of)
        )
        yield f"  {''.join(parts)}"
    for name, mark in _legend(drawn, signs):
        count = getattr(drawn.total, name)
        shown = _colored(mark, name, colors)
        yield f"  {shown} {name:<6} {count:>16} bytes {_percent(count, drawn.size):>6}"


def _legend(drawn: Map, signs: Signs) -> list[tuple[str, str]]:
    known = [("data", signs.full), ("zero", signs.zero), ("hole", signs.hole)]
    return [*known, ("dirty", signs.dirty)] if drawn.tells_dirty else known


def color_of(cell: Cell) -> str:
    """What a cell is foremost."""
    if cell.dirty:
        return "dirty"
    if cell.data:
        return "data"
    return "zero" if cell.zero else "hole"


def _colored(mark: str, name: str, colors: bool) -> str:
    return f"{_COLORS[name]}{mark}{_PLAIN}" if colors else mark


def _percent(count: int, size: int) -> str:
    return f"{100 * count / size:.1f}%" if size else "-"


# --- as a picture ---------------------------------------------------------------------------------

COLUMNS, ROWS = 128, 32
"""Of a picture."""
_CELL = 6
_MARGIN = 12
_LINE = 18
_FILL = {"data": "#2f6db5", "some": "#8fb4dc", "zero": "#bfe3df", "hole": "#f0f0f0",
         "dirty": "#d1495b"}  # fmt: skip


def _fill(cell: Cell) -> str:
    name = color_of(cell)
    return _FILL["some"] if name == "data" and cell.data * 2 < cell.size else _FILL[name]


def svg(maps: Sequence[Map], title: str) -> str:
    """A picture of MAPS, one below the other, each with what its colors mean."""
    parts: list[str] = []
    y = _MARGIN + _LINE
    parts.append(_text(_MARGIN, y - 6, title, "bold"))
    for drawn in maps:
        y += _LINE
        parts.append(_text(_MARGIN, y - 5, f"{drawn.disk}, {drawn.size} bytes"))
        for x, row, span, fill in _runs(drawn):
            parts.append(
                f'<rect x="{_MARGIN + x * _CELL}" y="{y + row * _CELL}" width="{span * _CELL}"'
                f' height="{_CELL}" fill="{fill}"/>'
            )
        y += -(-len(drawn.cells) // COLUMNS) * _CELL + _LINE
        x = _MARGIN
        for name, _ in _legend(drawn, ASCII):
            share = _percent(getattr(drawn.total, name), drawn.size)
            parts.append(
                f'<rect x="{x}" y="{y - 10}" width="10" height="10" fill="{_FILL[name]}"/>'
            )
            parts.append(_text(x + 14, y - 1, f"{name} {share}"))
            x += 130
        y += _LINE // 2
    width = COLUMNS * _CELL + 2 * _MARGIN
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + _MARGIN}"'
        f' viewBox="0 0 {width} {y + _MARGIN}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{y + _MARGIN}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: int, y: int, words: str, weight: str = "normal") -> str:
    shown = "".join(char if char.isprintable() else "\ufffd" for char in words)
    return f'<text x="{x}" y="{y}" font-weight="{weight}">{saxutils.escape(shown)}</text>'


def _runs(drawn: Map) -> Iterator[tuple[int, int, int, str]]:
    """(column, row, cells, color) of cells in a row that look the same."""
    for start in range(0, len(drawn.cells), COLUMNS):
        row = [_fill(cell) for cell in drawn.cells[start : start + COLUMNS]]
        at = 0
        while at < len(row):
            end = at
            while end < len(row) and row[end] == row[at]:
                end += 1
            yield at, start // COLUMNS, end - at, row[at]
            at = end


def png(maps: Sequence[Map]) -> bytes:
    """The same without words: of each map its cells, and below a bar of how much is what."""
    width = COLUMNS * _CELL + 2 * _MARGIN
    lines: list[bytes] = []
    blank = _rgb("#ffffff") * width
    edge = _rgb("#ffffff") * _MARGIN
    for drawn in maps:
        lines += [blank] * _MARGIN
        for start in range(0, len(drawn.cells), COLUMNS):
            row = [_rgb(_fill(cell)) * _CELL for cell in drawn.cells[start : start + COLUMNS]]
            row += [_rgb("#ffffff") * _CELL] * (COLUMNS - len(row))
            lines += [edge + b"".join(row) + edge] * _CELL
        lines += [blank] * (_MARGIN // 2)
        lines += [edge + _bar(drawn, COLUMNS * _CELL) + edge] * _CELL
    lines += [blank] * _MARGIN
    header = struct.pack(">IIBBBBB", width, len(lines), 8, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + line for line in lines), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", rows)
        + _chunk(b"IEND", b"")
    )


def _bar(drawn: Map, width: int) -> bytes:
    """WIDTH pixels: data, zeroes, holes by their shares."""
    pixels, done = b"", 0
    for kind in KINDS:
        done += getattr(drawn.total, kind)
        end = done * width // drawn.size if drawn.size else width
        pixels += _rgb(_FILL[kind]) * (end - len(pixels) // 3)
    return pixels


def _rgb(color: str) -> bytes:
    return bytes.fromhex(color.removeprefix("#"))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
