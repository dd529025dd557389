# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program QEMU: monitor passthrough. Source: libvirt's qemu_protocol.x."""

import dataclasses

from virtbackup.remote import program, xdr
from virtbackup.remote import remote_types as types
from virtbackup.remote.program import Proc


@dataclasses.dataclass(frozen=True, slots=True)
class DomainMonitorCommandArgs:
    dom: types.NonnullDomain
    cmd: types.NonnullString
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainMonitorCommandRet:
    result: types.NonnullString


QEMU = program.Program(
    "QEMU",
    0x20008087,
    1,
    (
        Proc(1, "DOMAIN_MONITOR_COMMAND", DomainMonitorCommandArgs, DomainMonitorCommandRet),
        # Descriptors travel with this call and may with its reply.
        Proc(
            7,
            "DOMAIN_MONITOR_COMMAND_WITH_FILES",
            DomainMonitorCommandArgs,
            DomainMonitorCommandRet,
        ),
    ),
)
