# SPDX-License-Identifier: LGPL-2.1-or-later
"""KeyboardInterrupt at a chosen place, or what else a signal's handler does: wherever Python may
look for signals.

That is as a function begins, and after each call, before what it has returned is of use to anybody
(CHECK_EVAL_BREAKER in CPython's ceval.c).
"""

import contextlib
import dis
import functools
import pathlib
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import virtbackup

_OURS = str(pathlib.Path(virtbackup.__file__).parent)
_ALSO = frozenset({contextlib.__file__})
"""What runs between two lines of ours and holds what they have opened."""
_PURE = ("/conf/", "/block.py", "/errors.py", "/monitor_json.py", "/naming.py", "/qmp.py")
"""What opens nothing and has nothing to let go of."""
_NO_CALL = "CALL_INTRINSIC"
"""The interpreter's own, as at the end of a generator: it does not look for signals there."""
HOLD = ("/domain_obj.py", "/monitor.py", "/status.py")
"""What holds what others wait for."""


def _interrupt() -> None:
    raise KeyboardInterrupt


class Strikes:
    """The places that calls go through, each struck once, over as many calls as that takes: one in
    EVERY of them, but all of those modules that hold what others wait for."""

    def __init__(
        self, every: int, hold: tuple[str, ...], handler: Callable[[], object] = _interrupt
    ) -> None:
        """HOLD are those modules, by what the paths of their files end with. HANDLER is called at
        the place."""
        self._every = every
        self._handler = handler
        self._hold = (*_ALSO, *hold)
        self._met: set[tuple[CodeType, int]] = set()
        self.number = 0
        """How many were struck."""
        self.place = ""
        """The last one, for people; empty where none was left."""

    def strike(self, call: Callable[[], Any]) -> None:
        """Do CALL, in which the next place is struck. Whatever CALL raises is raised."""
        self.place = ""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        code = frame.f_code
        if event == "call":
            if not _is_looked_at(code.co_filename):
                return None
            frame.f_trace = self._trace  # Python 3.13 wants it first
            frame.f_trace_opcodes = True
        place = code, frame.f_lasti
        is_new = event == "opcode" and frame.f_lasti in _looks(code) and place not in self._met
        if not is_new or self.place:
            return self._trace
        self._met.add(place)
        if len(self._met) % self._every == 0 or code.co_filename.endswith(self._hold):
            self.number += 1
            self.place = f"{code.co_filename}:{frame.f_lineno} {code.co_name}+{frame.f_lasti}"
            self._handler()
        return self._trace

    @property
    def met(self) -> int:
        """How many places there are, so far."""
        return len(self._met)


@functools.cache
def _is_looked_at(path: str) -> bool:
    if path in _ALSO:
        return True
    return path.startswith(_OURS) and not any(part in path for part in _PURE)


@functools.cache
def _looks(code: CodeType) -> frozenset[int]:
    """The offsets of the instructions before which Python looks for signals."""
    found = set()
    last = ""
    for instruction in dis.get_instructions(code):
        if last == "RESUME" or (last.startswith("CALL") and not last.startswith(_NO_CALL)):
            found.add(instruction.offset)
        last = instruction.opname
    return frozenset(found)
