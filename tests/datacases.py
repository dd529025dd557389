# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cases that are files: NAME.xml in, NAME.out or NAME.err expected beside it.

A new case is a new file. Where the expectation is missing, or VIRTBACKUP_REGENERATE=1, it is
written from what came out and the test fails, so that nothing passes that nobody has read.
"""

import os
import pathlib

DATA = pathlib.Path(__file__).parent


def inputs(folder: str, pattern: str = "*.xml") -> list[pathlib.Path]:
    """The cases in a folder below tests/; an empty folder is a mistake."""
    found = sorted((DATA / folder).glob(pattern))
    assert found, folder
    return found


def check(expected: pathlib.Path, actual: str) -> None:
    """Compare ACTUAL with what the file EXPECTED holds."""
    if not expected.exists() or os.environ.get("VIRTBACKUP_REGENERATE") == "1":
        expected.write_text(actual)
        raise AssertionError(f"{expected.name} written anew: read it, then run again")
    assert actual == expected.read_text()
