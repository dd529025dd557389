# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program VIRTBACKUP: the proposed calls, and what of ours goes beyond them.

It is ours alone, its number from the range that RFC 5531 leaves to users. A server that does not
know it answers ``SUPPORTED`` with an error of VIR_ERR_RPC, and no harm is done. A server sends its
event only to who has registered for it: libvirt's own client hangs up on an event of a program it
does not know. Sizes are bytes, times are seconds since the epoch; the fields of what is told of
backups and branches mean what they mean in conf/backup_conf.
"""

import dataclasses
from typing import Annotated

from virtbackup.remote import program, xdr
from virtbackup.remote import remote_structs as structs
from virtbackup.remote import remote_types as types
from virtbackup.remote.program import Proc, event

DISKS_MAX = 4096
BRANCHES_MAX = 16384
NAMES_MAX = 65536

Names = Annotated[tuple[types.NonnullString, ...], xdr.Array(NAMES_MAX)]


@dataclasses.dataclass(frozen=True, slots=True)
class SupportedRet:
    version: xdr.UInt
    """Of the program; a later one only adds procedures, and fields at the ends of structs."""


# --- the connection ---


@dataclasses.dataclass(frozen=True, slots=True)
class DomainState:
    dom: types.NonnullDomain
    state: xdr.Int
    reason: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class ListDomainsRet:
    domains: Annotated[tuple[DomainState, ...], xdr.Array(types.DOMAIN_LIST_MAX)]


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectGetHostRet:
    type: types.NonnullString
    version: xdr.UHyper
    hostname: types.NonnullString


# --- a backup ---


@dataclasses.dataclass(frozen=True, slots=True)
class DomainBackupStartArgs:
    dom: types.NonnullDomain
    xml_desc: types.NonnullString
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainBackupCleanupRet:
    removed: Names


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    id: types.NonnullString
    time: xdr.Double


@dataclasses.dataclass(frozen=True, slots=True)
class IpAddress:
    host: types.NonnullString
    port: xdr.UInt | None
    tls: xdr.Bool | None
    autoport: xdr.Bool | None


@dataclasses.dataclass(frozen=True, slots=True)
class UnixAddress:
    path: types.NonnullString
    tls: xdr.Bool | None


ADDRESS_IP = 1
ADDRESS_UNIX = 2
Address = Annotated[xdr.Arm, xdr.Union({ADDRESS_IP: IpAddress, ADDRESS_UNIX: UnixAddress})]


@dataclasses.dataclass(frozen=True, slots=True)
class DiskInfo:
    name: types.NonnullString
    export: types.NonnullString
    state: types.NonnullString
    reason: types.String
    capacity: xdr.UHyper
    scratch_used: xdr.UHyper | None
    dirty: xdr.UHyper | None
    scratch_worst_case: xdr.UHyper | None
    scratch_free: xdr.UHyper | None
    scratch_hangs: xdr.Bool
    warning: types.String
    type: types.NonnullString
    type_reason: types.String
    since: Point | None


@dataclasses.dataclass(frozen=True, slots=True)
class DomainBackupGetInfoRet:
    state: types.NonnullString
    started: xdr.Double
    address: Address
    disks: Annotated[tuple[DiskInfo, ...], xdr.Array(DISKS_MAX)]
    engine: types.String
    scratch_failure: types.String
    scratch_timeout: xdr.Double | None
    id: types.String
    branch: types.String
    save_failure: types.String
    save_reason: types.String


# --- branches ---


@dataclasses.dataclass(frozen=True, slots=True)
class BranchDisk:
    name: types.NonnullString
    granularity: xdr.UHyper | None
    dirty: xdr.UHyper | None
    persistent: xdr.Bool
    reason: types.String
    point: Point | None
    note: types.String


@dataclasses.dataclass(frozen=True, slots=True)
class Branch:
    name: types.NonnullString
    foreign: xdr.Bool
    disks: Annotated[tuple[BranchDisk, ...], xdr.Array(DISKS_MAX)]


@dataclasses.dataclass(frozen=True, slots=True)
class DomainBranchListRet:
    branches: Annotated[tuple[Branch, ...], xdr.Array(BRANCHES_MAX)]


@dataclasses.dataclass(frozen=True, slots=True)
class DomainBranchDeleteArgs:
    dom: types.NonnullDomain
    name: types.NonnullString
    flags: xdr.UInt


# --- the event ---


@dataclasses.dataclass(frozen=True, slots=True)
class BackupEventRegisterArgs:
    dom: types.Domain
    """None: all of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class BackupEndedMsg:
    callbackID: xdr.Int
    dom: types.NonnullDomain
    good: xdr.Bool
    """What a stop has said, or will say."""
    reason: types.String
    """Why it is not good."""


VIRTBACKUP = program.Program(
    "VIRTBACKUP",
    0x20161086,
    1,
    (
        Proc(1, "SUPPORTED", None, SupportedRet),
        Proc(2, "DOMAIN_BACKUP_START", DomainBackupStartArgs),
        Proc(3, "DOMAIN_BACKUP_STOP", structs.DomainFlagsArgs),
        Proc(4, "DOMAIN_BACKUP_GET_XML_DESC", structs.DomainFlagsArgs, structs.XmlRet),
        Proc(5, "DOMAIN_BACKUP_GET_INFO", structs.DomainFlagsArgs, DomainBackupGetInfoRet),
        Proc(6, "DOMAIN_BACKUP_CLEANUP", structs.DomainFlagsArgs, DomainBackupCleanupRet),
        Proc(7, "DOMAIN_BRANCH_LIST", structs.DomainFlagsArgs, DomainBranchListRet),
        Proc(8, "DOMAIN_BRANCH_DELETE", DomainBranchDeleteArgs),
        Proc(9, "BACKUP_EVENT_REGISTER", BackupEventRegisterArgs, structs.CallbackIdRet),
        Proc(10, "BACKUP_EVENT_DEREGISTER", structs.CallbackIdArgs),
        event(11, "BACKUP_ENDED", BackupEndedMsg),
        Proc(12, "LIST_DOMAINS", None, ListDomainsRet),
        Proc(13, "CONNECT_GET_HOST", None, ConnectGetHostRet),
        Proc(14, "DOMAIN_BRANCH_CREATE", DomainBranchDeleteArgs),
    ),
)
