# SPDX-License-Identifier: LGPL-2.1-or-later
"""A comparison of engines that fails (``tests/live/test_libvirt.py`` has those that do not)."""

from typing import Any

import libvirt
import pytest

from virtbackup import errors
from virtbackup.tools import compare, virsh_connection

DOCUMENT = '<domainbackup><address type="unix" path="/x"/></domainbackup>'


class Domain:
    """Of which nothing can be asked, and whose backup cannot be ended."""

    def connect(self) -> "Domain":
        return self

    def setTrace(self, to: object) -> None:
        """Nothing is said."""

    def name(self) -> str:
        return "vm"

    def XMLDesc(self) -> str:
        return "<domain type='kvm'><name>vm</name></domain>"

    def blockStatsFlags(self, path: str) -> dict[str, int]:
        return {}

    def backupStart(self, xml: str, flags: int) -> None:
        """It runs."""

    def backupGetXMLDesc(self) -> str:
        raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, "QEMU is gone")

    def backupStop(self, flags: int) -> None:
        raise errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "cannot acquire a lock")


def test_a_cancel_that_fails_does_not_hide_why(caplog: pytest.LogCaptureFixture) -> None:
    one: Any = Domain()
    with pytest.raises(errors.Error, match="QEMU is gone"):
        compare.compare(one, one, one, DOCUMENT, 1)
    [left] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert left.getMessage() == (
        "the backup of domain 'vm' could not be ended:"
        " Timed out during operation: cannot acquire a lock"
    )
    assert left.name in virsh_connection._OF_WHAT_IS_LEFT  # the shell tells it
