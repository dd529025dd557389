# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding out whether a frozen disk can be read, by the monitor alone.

A snapshot that broke (``on-cbw-error=break-snapshot``) shows in no query and no event: only reads
fail. So its first sector is read, by opening it as an image of a format that it is not: QEMU's
refusal says whether it came to see the sector. The node is read-only, sees that one sector, and is
gone at once should the sector happen to be such an image's.
"""

from virtbackup.qemu import monitor, monitor_json, naming


def read(qemu: monitor.Monitor, frozen: naming.NodeName, node: naming.NodeName) -> str | None:
    """Why FROZEN cannot be read, None when it can; NODE is the probe's name.

    Errors: monitor.MonitorLost, VIR_ERR_OPERATION_TIMEOUT.
    """
    try:
        qemu.execute(monitor_json.blockdev_add_probe(node, frozen))
    except monitor_json.CommandFailed as failure:
        if not failure.desc.startswith("Duplicate nodes"):
            return monitor_json.parse_probe(failure)
        # Somebody died over the same question.
        qemu.execute(monitor_json.blockdev_del(node))
        return read(qemu, frozen, node)
    qemu.execute(monitor_json.blockdev_del(node))
    return None
