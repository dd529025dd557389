# SPDX-License-Identifier: LGPL-2.1-or-later
"""What virsh and libvirtd say here and now is read by our code, and said again byte for byte."""

import struct

import pytest

from tests import record_rpc, test_rpc_recorded
from tests.live import libvirtd
from virtbackup.remote import protocol

LAST_OF_9_0 = 443
"""REMOTE_PROC_DOMAIN_FD_ASSOCIATE."""


def is_newer(one: record_rpc.Said) -> bool:
    """Whether libvirt 9.0 does not have the procedure: what a newer virsh asks besides."""
    of, procedure = struct.unpack(">4xI4xI", one.data[:16])
    return bool(of == protocol.REMOTE.number and procedure > LAST_OF_9_0)


@pytest.mark.needs("libvirtd", "virsh")
def test_traffic(libvirt_host: libvirtd.Host) -> None:
    place = libvirt_host.path("traffic")
    place.mkdir()
    place.chmod(0o755)
    scenes = record_rpc.play(libvirt_host, place)
    names = {
        name
        for said in scenes.values()
        for name in test_rpc_recorded.check([one for one in said if not is_newer(one)])
    }
    assert {"DOMAIN_BACKUP_BEGIN", "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED"} <= names
