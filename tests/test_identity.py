# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who a guest is that does not say so."""

import os
import uuid

import pytest

from virtbackup.qemu import domain


@pytest.mark.parametrize("path", ["/run/guest.sock", "guest.sock", "/run/Gast ä/\N{OK HAND SIGN}"])
def test_made_uuid_is_that_of_the_monitors_url(path: str) -> None:
    url = f"qmp://{os.path.realpath(path)}"
    assert domain.made_uuid(path) == str(uuid.uuid5(uuid.NAMESPACE_URL, url))


def test_made_uuid_of_a_path_that_is_no_text() -> None:
    made = [domain.made_uuid(os.fsdecode(b"/run/\xff" + end)) for end in (b"a", b"b")]
    assert made[0] != made[1]
    assert all(uuid.UUID(one).version == 5 for one in made)
