# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files as QEMU is told of them in JSON, which has no word for a name that is not UTF-8."""

import os
import pathlib

_HELD: dict[tuple[int, int], int] = {}
"""Descriptors of directories whose paths cannot be told, as long as this process lives: by device
and inode, which are not used again while one is open."""


def told(path: pathlib.Path) -> str:
    """A name of the file at PATH for JSON; good as long as this process lives. Errors: OSError."""
    absolute = path.absolute()
    try:
        str(absolute).encode()
    except UnicodeEncodeError:
        return f"/proc/{os.getpid()}/fd/{_held(absolute.parent)}/{absolute.name}"
    return str(absolute)


def _held(directory: pathlib.Path) -> int:
    found = directory.stat()
    key = found.st_dev, found.st_ino
    if key not in _HELD:
        _HELD[key] = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return _HELD[key]
