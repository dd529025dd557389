# SPDX-License-Identifier: LGPL-2.1-or-later
"""Doing something in the middle of a start, between two of its steps, ``process.Run``'s methods."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from virtbackup.qemu import process

Deed = Callable[[process.Run], object]


def before(step: str, deed: Deed) -> contextlib.AbstractContextManager[None]:
    """While DEED is done before each STEP of that name."""
    return _around(step, deed, None)


def after(step: str, deed: Deed) -> contextlib.AbstractContextManager[None]:
    """While DEED is done after each STEP of that name."""
    return _around(step, None, deed)


@contextlib.contextmanager
def _around(step: str, first: Deed | None, last: Deed | None) -> Iterator[None]:
    goes_on = getattr(process.Run, step)

    def around(run: process.Run) -> None:
        if first is not None:
            first(run)
        goes_on(run)
        if last is not None:
            last(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process.Run, step, around)
        yield
