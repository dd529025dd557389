# SPDX-License-Identifier: LGPL-2.1-or-later
"""Raw files: as sparse as the disk is, whatever the size of what is written at once."""

import pathlib
import re
import tempfile

from hypothesis import example, given
from hypothesis import strategies as st

from virtbackup.nbd import target

PAGE = 4096
BLOCK = 1 << 16


@given(st.lists(st.sampled_from([b"\0", b"a", b"\0a"]), max_size=40), st.integers(0, PAGE - 1))
@example([b"a", *[b"\0"] * 15], 0)
@example([b"\0"] * 15 + [b"\0a"], 1)
def test_pages_of_zeroes_take_no_space(pages: list[bytes], tail: int) -> None:
    """But one between two others. A page begins with zeroes and has something at its end, too
    (``\\0a``)."""
    disk = b"".join(page[:1] * (PAGE - 1) + page[-1:] for page in pages) + bytes(tail)
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "disk.raw")
        where = target.Raw(path, len(disk))
        if disk:
            where.write(0, memoryview(disk))
        stored = where.finish()
        assert path.read_bytes() == disk
        kept = "".join("0" if page == b"\0" else "1" for page in pages)
        assert stored <= PAGE * re.sub("(?<=1)0(?=1)", "1", kept).count("1")
