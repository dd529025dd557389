# SPDX-License-Identifier: LGPL-2.1-or-later
"""All programs, and the one table of their procedures that client, server and docs read."""

from collections.abc import Mapping

from virtbackup.remote import program, qemu_protocol, remote_protocol, virtbackup_protocol
from virtbackup.remote.program import Proc

REMOTE = remote_protocol.REMOTE
QEMU = qemu_protocol.QEMU
VIRTBACKUP = virtbackup_protocol.VIRTBACKUP
KEEPALIVE = program.Program(
    "KEEPALIVE",
    0x6B656570,
    1,
    (Proc(1, "PING", kind="event"), Proc(2, "PONG", kind="event")),
)
"""Source: libvirt's virkeepaliveprotocol.x."""

PROGRAMS: Mapping[int, program.Program] = {
    each.number: each for each in (REMOTE, QEMU, VIRTBACKUP, KEEPALIVE)
}
"""Number -> program."""
