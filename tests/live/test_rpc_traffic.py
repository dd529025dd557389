# SPDX-License-Identifier: LGPL-2.1-or-later
"""What virsh and libvirtd say here and now is read by our code, and said again byte for byte."""

import pytest

from tests import record_rpc, test_rpc_recorded
from tests.live import libvirtd


@pytest.mark.needs("libvirtd", "virsh")
def test_traffic(libvirt_host: libvirtd.Host) -> None:
    place = libvirt_host.path("traffic")
    place.mkdir()
    place.chmod(0o755)
    scenes = record_rpc.play(libvirt_host, place)
    names = {name for said in scenes.values() for name in test_rpc_recorded.check(said)}
    assert {"DOMAIN_BACKUP_BEGIN", "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED"} <= names
