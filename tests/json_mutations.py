# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON values, any and almost right, for hypothesis."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 511, 1 << 62, 1 << 63, 1 << 64, 10**400, -(10**400), 1.5, -1e300]),
    st.sampled_from(["", "text", "a\0b", "a\nb", "\x1b[2J", "/" * 3000, "\ufffe", "x" * 2000]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)

values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "name", "type", "x", ""]), inner, max_size=3)
    ),
    max_leaves=5,
)
"""Any value."""

Path = tuple[int | str, ...]


def paths(value: Any, below: Path = ()) -> Iterator[Path]:
    """The way to every part of VALUE, itself first."""
    yield below
    if isinstance(value, dict):
        for key, part in value.items():
            yield from paths(part, (*below, key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from paths(part, (*below, index))


def replaced(value: Any, path: Path, part: Any) -> Any:
    """VALUE with another PART at PATH."""
    if not path:
        return part
    value = copy.deepcopy(value)
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = part
    return value


def removed(value: Any, path: Path) -> Any:
    """VALUE without what is at PATH, which is not VALUE itself."""
    value = copy.deepcopy(value)
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return value


Spoil = Callable[[Any], Any]

spoilers: st.SearchStrategy[Spoil] = st.builds(
    lambda where, remove, part: functools.partial(_spoil, where=where, remove=remove, part=part),
    st.integers(0, 10_000),
    st.booleans(),
    values,
)
"""Functions that replace or take away one part of a value, at any depth."""


def _spoil(value: Any, where: int, remove: bool, part: Any) -> Any:
    found = list(paths(value))
    path = found[where % len(found)]
    return removed(value, path) if remove and path else replaced(value, path, part)
