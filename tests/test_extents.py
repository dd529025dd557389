# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block status replies, good and bad, against a model that marks every byte."""

import itertools
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtbackup.nbd import extents

GRAIN = 8

FLAGS = {extents.Kind.DATA: (0, 1), extents.Kind.ZERO: (2,), extents.Kind.HOLE: (3,)}
CHANGES = {extents.Kind.DATA: (1, 3), extents.Kind.SKIP: (0, 2)}


def runs_of(kinds: Iterable[extents.Kind]) -> st.SearchStrategy[list[tuple[int, extents.Kind]]]:
    pairs = st.tuples(st.integers(1, 30), st.sampled_from(list(kinds)))
    return st.lists(pairs, min_size=1, max_size=40)


runs = runs_of(FLAGS)
mixed_runs = runs_of(extents.Kind)
change_runs = runs_of(CHANGES)


def adjoining(pairs: list[tuple[int, extents.Kind]]) -> list[extents.Extent]:
    offset, made = 0, []
    for length, kind in pairs:
        made.append(extents.Extent(offset, length, kind))
        offset += length
    return made


def every_byte(known: list[extents.Extent]) -> list[extents.Kind]:
    return [extent.kind for extent in known for _ in range(extent.length)]


def by_grain(marks: list[extents.Kind], grain: int) -> list[extents.Kind]:
    """The model: every byte gets the highest kind that its grain has anywhere."""
    groups = [marks[i : i + grain] for i in range(0, len(marks), grain)]
    return [max(group) for group in groups for _ in group]


def assert_adjoining(known: list[extents.Extent], size: int) -> None:
    assert all(extent.length > 0 for extent in known)
    assert [extent.offset for extent in known] == [0, *(extent.end for extent in known)][:-1]
    assert (known[-1].end if known else 0) == size


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (0, extents.Kind.DATA),
        (1, extents.Kind.DATA),
        (2, extents.Kind.ZERO),
        (3, extents.Kind.HOLE),
        (4, extents.Kind.DATA),
        (6, extents.Kind.ZERO),
        (7, extents.Kind.HOLE),
    ],
)
def test_only_the_zero_bit_vouches_for_zeroes(flags: int, kind: extents.Kind) -> None:
    assert extents.kind_of(flags) is kind


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (0, extents.Kind.SKIP),
        (1, extents.Kind.DATA),
        (2, extents.Kind.SKIP),
        (3, extents.Kind.DATA),
    ],
)
def test_only_the_lowest_bit_tells_a_change(flags: int, kind: extents.Kind) -> None:
    assert extents.change_of(flags) is kind


def test_kinds_meet_the_protocols_bits() -> None:
    nbd = pytest.importorskip("nbd")
    assert (extents.STATE_HOLE, extents.STATE_ZERO) == (nbd.STATE_HOLE, nbd.STATE_ZERO)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([], "no extents"),
        ([10], "pairs"),
        ([10, 0, 5], "pairs"),
        ([0, 0], "0 bytes at 50"),
        ([10, 0, 0, 3], "0 bytes at 60"),
        ([-1, 0], "-1 bytes at 50"),
        ([51, 0], "past the end at 100"),
        ([50, 0, 1, 0], "past the end at 100"),
    ],
)
def test_a_bad_reply_is_refused(entries: list[int], text: str) -> None:
    with pytest.raises(extents.BadStatus, match=text):
        list(extents.parse(entries, 50, 100))


@given(runs)
def test_parse_keeps_every_byte(pairs: list[tuple[int, extents.Kind]]) -> None:
    expected = adjoining(pairs)
    entries = [number for length, kind in pairs for number in (length, FLAGS[kind][0])]
    assert list(extents.parse(entries, 0, expected[-1].end)) == expected


@given(change_runs)
def test_parse_of_changes_keeps_every_byte(pairs: list[tuple[int, extents.Kind]]) -> None:
    expected = adjoining(pairs)
    entries = [number for length, kind in pairs for number in (length, CHANGES[kind][0])]
    assert list(extents.parse(entries, 0, expected[-1].end, extents.change_of)) == expected


@given(mixed_runs)
def test_merge_joins_and_changes_nothing(pairs: list[tuple[int, extents.Kind]]) -> None:
    known = adjoining(pairs)
    merged = list(extents.merge(known))
    assert every_byte(merged) == every_byte(known)
    assert all(a.kind != b.kind for a, b in itertools.pairwise(merged))


@pytest.mark.parametrize("offset", [9, 11])
def test_merge_refuses_gaps_and_overlaps(offset: int) -> None:
    with pytest.raises(extents.BadStatus, match="expected one at 10"):
        list(
            extents.merge(
                [
                    extents.Extent(0, 10, extents.Kind.DATA),
                    extents.Extent(offset, 5, extents.Kind.DATA),
                ]
            )
        )


@given(mixed_runs)
def test_align_is_the_highest_kind_of_each_grain(pairs: list[tuple[int, extents.Kind]]) -> None:
    known = adjoining(pairs)
    aligned = list(extents.align(known, GRAIN))
    assert every_byte(aligned) == by_grain(every_byte(known), GRAIN)
    assert_adjoining(aligned, known[-1].end)
    assert all(extent.offset % GRAIN == 0 for extent in aligned)


def test_nothing_is_aligned_to_nothing() -> None:
    assert list(extents.align([], GRAIN)) == []


@given(runs, st.integers(0, 200))
def test_clip_keeps_what_is_before(pairs: list[tuple[int, extents.Kind]], size: int) -> None:
    known = adjoining(pairs)
    clipped = list(extents.clip(known, size))
    assert every_byte(clipped) == every_byte(known)[:size]
    assert all(extent.length > 0 for extent in clipped)


@given(st.integers(0, 1000), st.integers(1, 500), st.integers(1, 64))
def test_split_covers_in_order_and_in_bounds(offset: int, length: int, most: int) -> None:
    pieces = list(extents.split(extents.Extent(offset, length, extents.Kind.DATA), most))
    assert [piece[0] for piece in pieces] == [offset, *(sum(piece) for piece in pieces)][:-1]
    assert sum(pieces[-1]) == offset + length
    assert all(0 < count <= most and start // most == (start + count - 1) // most
               for start, count in pieces)  # fmt: skip


def ask_all(
    allocation: extents.Allocation,
    marks: list[extents.Kind],
    flags: Mapping[extents.Kind, tuple[int, ...]],
    data: st.DataObject,
) -> list[extents.Extent]:
    """What a server says that answers as short or as long as it likes about MARKS."""
    found: list[extents.Extent] = []
    while not allocation.complete:
        offset, count = allocation.next_request()
        assert 0 < count <= len(marks) - offset
        length = data.draw(st.integers(1, len(marks) - offset), label="answered")
        entries = [
            number
            for kind, group in itertools.groupby(marks[offset : offset + length])
            for number in (len(list(group)), data.draw(st.sampled_from(flags[kind])))
        ]
        certain = allocation.receive(offset, entries)
        found += certain
        assert all(e.end % GRAIN == 0 or allocation.complete for e in certain)
        assert all(e.length > 0 for e in certain)
    return found


@given(runs, st.data())
def test_replies_cut_anywhere_give_the_same_extents(
    pairs: list[tuple[int, extents.Kind]], data: st.DataObject
) -> None:
    """However short or long the server answers, the result is that of one whole answer."""
    whole = adjoining(pairs)
    marks, size = every_byte(whole), whole[-1].end
    found = ask_all(extents.Allocation(size, GRAIN), marks, FLAGS, data)
    assert every_byte(found) == by_grain(marks, GRAIN)
    assert_adjoining(found, size)


@given(runs, change_runs, st.data())
def test_changes_and_then_their_allocation(
    allocated: list[tuple[int, extents.Kind]],
    changed: list[tuple[int, extents.Kind]],
    data: st.DataObject,
) -> None:
    """Against every byte: a grain is held when any byte of it has changed, and has the highest kind
    that allocation tells of any byte of it."""
    kinds, marks = every_byte(adjoining(allocated)), every_byte(adjoining(changed))
    size = min(len(kinds), len(marks))
    kinds, marks = kinds[:size], marks[:size]
    changes = extents.Allocation(size, GRAIN, kind=extents.change_of)
    found = []
    for extent in ask_all(changes, marks, CHANGES, data):
        if extent.kind is extents.Kind.SKIP:
            found.append(extent)
        else:
            part = extents.Allocation(size, GRAIN, (extent.offset, extent.end))
            found += ask_all(part, kinds, FLAGS, data)
    assert_adjoining(found, size)
    held = by_grain(marks, GRAIN)
    expected = [
        extents.Kind.SKIP if change is extents.Kind.SKIP else kind
        for change, kind in zip(held, by_grain(kinds, GRAIN), strict=True)
    ]
    assert every_byte(found) == expected


@given(runs, st.integers(0, 40), st.integers(0, 40), st.integers(0, GRAIN - 1), st.data())
def test_a_part_is_that_of_the_whole(
    pairs: list[tuple[int, extents.Kind]], first: int, grains: int, rest: int, data: st.DataObject
) -> None:
    marks = every_byte(adjoining(pairs))
    start = min(first * GRAIN, len(marks) // GRAIN * GRAIN)
    end = min(start + grains * GRAIN + rest, len(marks))
    found = ask_all(extents.Allocation(len(marks), GRAIN, (start, end)), marks, FLAGS, data)
    assert every_byte(found) == by_grain(marks[start:end], GRAIN)
    assert all(extent.offset >= start for extent in found)


def test_an_answer_about_another_offset_is_refused() -> None:
    allocation = extents.Allocation(100, GRAIN)
    allocation.receive(0, [10, 0])
    with pytest.raises(extents.BadStatus, match="about 0, expected one about 10"):
        allocation.receive(0, [10, 0])


def test_the_step_grows_on_short_answers_and_shrinks_on_long_ones() -> None:
    allocation = extents.Allocation(1 << 50, 65536)
    for _ in range(20):
        offset, count = allocation.next_request()
        allocation.receive(offset, [count, 3])
    assert allocation.next_request()[1] == extents.Allocation.MOST_STEP
    for _ in range(20):
        offset, _ = allocation.next_request()
        allocation.receive(offset, [4096, 0, 4096, 3] * 4096)
    assert allocation.next_request()[1] == extents.Allocation.LEAST_STEP


@pytest.mark.parametrize(
    ("count", "step"),
    [(1, 128 << 20), (64, 128 << 20), (65, 64 << 20), (2047, 64 << 20), (2048, 16 << 20)],
)
@pytest.mark.parametrize("before", [0, 1])
def test_by_which_answers_the_step_changes(before: int, count: int, step: int) -> None:
    """Whatever answer came before: one that ends at a grain leaves nothing to the next."""
    flags = itertools.cycle([0, 3])
    allocation = extents.Allocation(1 << 50, 4096)
    for extents_said in [65] * before + [count]:
        entries = [number for _ in range(extents_said) for number in (4096, next(flags))]
        allocation.receive(allocation.offset, entries)
    assert allocation.next_request() == ((65 * before + count) * 4096, step)
    assert type(allocation.next_request()[1]) is int


@pytest.mark.parametrize(
    ("grain", "step"), [(4096, 16 << 20), (16384, 64 << 20), (65536, 256 << 20)]
)
def test_the_step_shrinks_to_what_a_long_answer_was_about(grain: int, step: int) -> None:
    """As the first one behind a long hole, of which no more is known than fits into an answer."""
    allocation = extents.Allocation(1 << 50, 4096)
    for _ in range(20):
        offset, count = allocation.next_request()
        allocation.receive(offset, [count, 3])
    offset, _ = allocation.next_request()
    allocation.receive(offset, [grain, 0, grain, 3] * 2048)
    assert allocation.next_request() == (offset + 4096 * grain, step)


def test_an_empty_export_needs_no_question() -> None:
    assert extents.Allocation(0, GRAIN).complete
