# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files as QEMU is told of them in JSON, which has no word for a name that is not UTF-8."""

import os
import pathlib

_HELD: dict[tuple[int, int], int] = {}
"""Descriptors of what has a path that cannot be told, as long as this process lives: by device and
inode, which are not used again while one is open."""


def told(path: pathlib.Path) -> str:
    """A name of the file at PATH for JSON; good as long as this process lives. Errors: OSError."""
    absolute = path.absolute()
    if _is_told(str(absolute)):
        return str(absolute)
    if _is_told(absolute.name):
        return f"/proc/{os.getpid()}/fd/{_held(absolute.parent)}/{absolute.name}"
    return f"/proc/{os.getpid()}/fd/{_held(absolute)}"


def _is_told(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _held(path: pathlib.Path) -> int:
    found = path.stat()
    key = found.st_dev, found.st_ino
    if key not in _HELD:
        _HELD[key] = os.open(path, os.O_PATH | os.O_CLOEXEC)
    return _HELD[key]
