# SPDX-License-Identifier: LGPL-2.1-or-later
"""The structs of the program REMOTE: what its calls take and return, and what its events carry.

Source: libvirt's remote_protocol.x, by whose names the fields go; a test compares every one with
what it says. Structs of one shape are one class (``DomainFlagsArgs``). ``flags`` and the numbers
of states, jobs and events are those of libvirt's public header.
"""

import dataclasses
from typing import Annotated

from virtbackup.remote import remote_types as types
from virtbackup.remote import xdr

# --- shapes that many procedures have ---


@dataclasses.dataclass(frozen=True, slots=True)
class DomainArgs:
    dom: types.NonnullDomain


DomainRet = DomainArgs


@dataclasses.dataclass(frozen=True, slots=True)
class DomainFlagsArgs:
    dom: types.NonnullDomain
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainPathFlagsArgs:
    dom: types.NonnullDomain
    path: types.NonnullString
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointFlagsArgs:
    checkpoint: types.NonnullDomainCheckpoint
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointRet:
    checkpoint: types.NonnullDomainCheckpoint


@dataclasses.dataclass(frozen=True, slots=True)
class CallbackIdArgs:
    callbackID: xdr.Int


CallbackIdRet = CallbackIdArgs


@dataclasses.dataclass(frozen=True, slots=True)
class XmlRet:
    xml: types.NonnullString


@dataclasses.dataclass(frozen=True, slots=True)
class TypeRet:
    type: types.NonnullString


@dataclasses.dataclass(frozen=True, slots=True)
class NumRet:
    num: xdr.Int


# --- connection ---


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectOpenArgs:
    name: types.String
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectGetVersionRet:
    hv_ver: xdr.UHyper


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectGetLibVersionRet:
    lib_ver: xdr.UHyper


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectGetHostnameRet:
    hostname: types.NonnullString


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectGetUriRet:
    uri: types.NonnullString


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectGetCapabilitiesRet:
    capabilities: types.NonnullString


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectSupportsFeatureArgs:
    feature: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectSupportsFeatureRet:
    supported: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectEventConnectionClosedMsg:
    reason: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class NodeGetInfoRet:
    model: Annotated[bytes, xdr.FixedChars(32)]
    """Padded with NUL."""
    memory: xdr.UHyper
    """KiB."""
    cpus: xdr.Int
    mhz: xdr.Int
    nodes: xdr.Int
    sockets: xdr.Int
    cores: xdr.Int
    threads: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class NodeGetSecurityModelRet:
    """A NUL ends each, where it is not empty."""

    model: Annotated[bytes, xdr.Chars(types.SECURITY_MODEL_MAX)]
    doi: Annotated[bytes, xdr.Chars(types.SECURITY_DOI_MAX)]


# --- authentication ---


@dataclasses.dataclass(frozen=True, slots=True)
class AuthListRet:
    types: Annotated[tuple[xdr.Int, ...], xdr.Array(types.AUTH_TYPE_LIST_MAX)]
    """AUTH_NONE, AUTH_SASL, AUTH_POLKIT."""


@dataclasses.dataclass(frozen=True, slots=True)
class AuthSaslInitRet:
    mechlist: types.NonnullString


@dataclasses.dataclass(frozen=True, slots=True)
class AuthSaslStartArgs:
    mech: types.NonnullString
    nil: xdr.Int
    """1 where there are no data, which is not the same as empty ones."""
    data: types.SaslData


@dataclasses.dataclass(frozen=True, slots=True)
class AuthSaslStepArgs:
    nil: xdr.Int
    data: types.SaslData


@dataclasses.dataclass(frozen=True, slots=True)
class AuthSaslRet:
    complete: xdr.Int
    nil: xdr.Int
    data: types.SaslData


@dataclasses.dataclass(frozen=True, slots=True)
class AuthPolkitRet:
    complete: xdr.Int


# --- domains ---


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectListAllDomainsArgs:
    need_results: xdr.Int
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectListAllDomainsRet:
    domains: types.Domains
    ret: xdr.UInt
    """How many there are, whether or not they are listed."""


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectListDomainsArgs:
    maxids: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectListDomainsRet:
    ids: Annotated[tuple[xdr.Int, ...], xdr.Array(types.DOMAIN_LIST_MAX)]


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectListDefinedDomainsArgs:
    maxnames: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectListDefinedDomainsRet:
    names: Annotated[tuple[types.NonnullString, ...], xdr.Array(types.DOMAIN_LIST_MAX)]


@dataclasses.dataclass(frozen=True, slots=True)
class DomainLookupByIdArgs:
    id: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainLookupByNameArgs:
    name: types.NonnullString


@dataclasses.dataclass(frozen=True, slots=True)
class DomainLookupByUuidArgs:
    uuid: types.Uuid


@dataclasses.dataclass(frozen=True, slots=True)
class DomainGetAutostartRet:
    autostart: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainGetInfoRet:
    """Memory in KiB, time in nanoseconds."""

    state: xdr.UChar
    maxMem: xdr.UHyper
    memory: xdr.UHyper
    nrVirtCpu: xdr.UShort
    cpuTime: xdr.UHyper


@dataclasses.dataclass(frozen=True, slots=True)
class DomainGetStateRet:
    state: xdr.Int
    reason: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainGetSecurityLabelRet:
    label: Annotated[bytes, xdr.Chars(types.SECURITY_LABEL_MAX)]
    """A NUL ends it, where it is not empty."""
    enforcing: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainIsActiveRet:
    active: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainIsPersistentRet:
    persistent: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainHasManagedSaveImageRet:
    result: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainGetMessagesRet:
    msgs: Annotated[tuple[types.NonnullString, ...], xdr.Array(types.DOMAIN_MESSAGES_MAX)]


@dataclasses.dataclass(frozen=True, slots=True)
class DomainDefineXmlFlagsArgs:
    xml: types.NonnullString
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainFsfreezeArgs:
    dom: types.NonnullDomain
    mountpoints: Annotated[
        tuple[types.NonnullString, ...], xdr.Array(types.DOMAIN_FSFREEZE_MOUNTPOINTS_MAX)
    ]
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainFsfreezeRet:
    filesystems: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainFdAssociateArgs:
    """The descriptors travel with the call."""

    dom: types.NonnullDomain
    name: types.NonnullString
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainStatsRecord:
    dom: types.NonnullDomain
    params: Annotated[
        tuple[types.TypedParam, ...], xdr.Array(types.CONNECT_GET_ALL_DOMAIN_STATS_MAX)
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectGetAllDomainStatsArgs:
    doms: types.Domains
    stats: xdr.UInt
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectGetAllDomainStatsRet:
    retStats: Annotated[tuple[DomainStatsRecord, ...], xdr.Array(types.DOMAIN_LIST_MAX)]


@dataclasses.dataclass(frozen=True, slots=True)
class StoragePoolLookupByTargetPathArgs:
    path: types.NonnullString


@dataclasses.dataclass(frozen=True, slots=True)
class StoragePoolLookupByTargetPathRet:
    pool: types.NonnullStoragePool


# --- blocks and jobs ---


@dataclasses.dataclass(frozen=True, slots=True)
class DomainGetBlockInfoRet:
    """Bytes."""

    allocation: xdr.UHyper
    capacity: xdr.UHyper
    physical: xdr.UHyper


@dataclasses.dataclass(frozen=True, slots=True)
class DomainBlockStatsFlagsArgs:
    dom: types.NonnullDomain
    path: types.NonnullString
    nparams: xdr.Int
    """0 asks how many there are."""
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainBlockStatsFlagsRet:
    params: Annotated[
        tuple[types.TypedParam, ...], xdr.Array(types.DOMAIN_BLOCK_STATS_PARAMETERS_MAX)
    ]
    nparams: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainGetBlockJobInfoRet:
    found: xdr.Int
    type: xdr.Int
    bandwidth: xdr.UHyper
    cur: xdr.UHyper
    end: xdr.UHyper


@dataclasses.dataclass(frozen=True, slots=True)
class DomainGetJobInfoRet:
    """Milliseconds and bytes."""

    type: xdr.Int
    timeElapsed: xdr.UHyper
    timeRemaining: xdr.UHyper
    dataTotal: xdr.UHyper
    dataProcessed: xdr.UHyper
    dataRemaining: xdr.UHyper
    memTotal: xdr.UHyper
    memProcessed: xdr.UHyper
    memRemaining: xdr.UHyper
    fileTotal: xdr.UHyper
    fileProcessed: xdr.UHyper
    fileRemaining: xdr.UHyper


@dataclasses.dataclass(frozen=True, slots=True)
class DomainGetJobStatsRet:
    type: xdr.Int
    params: types.JobParams


@dataclasses.dataclass(frozen=True, slots=True)
class DomainBackupBeginArgs:
    dom: types.NonnullDomain
    backup_xml: types.NonnullString
    checkpoint_xml: types.String
    flags: xdr.UInt


# --- checkpoints ---


@dataclasses.dataclass(frozen=True, slots=True)
class DomainCheckpointCreateXmlArgs:
    dom: types.NonnullDomain
    xml_desc: types.NonnullString
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainListAllCheckpointsArgs:
    dom: types.NonnullDomain
    need_results: xdr.Int
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainCheckpointListAllChildrenArgs:
    checkpoint: types.NonnullDomainCheckpoint
    need_results: xdr.Int
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointsRet:
    checkpoints: types.Checkpoints
    ret: xdr.Int
    """How many there are, whether or not they are listed."""


@dataclasses.dataclass(frozen=True, slots=True)
class DomainCheckpointLookupByNameArgs:
    dom: types.NonnullDomain
    name: types.NonnullString
    flags: xdr.UInt


@dataclasses.dataclass(frozen=True, slots=True)
class DomainCheckpointGetParentRet:
    parent: types.NonnullDomainCheckpoint


# --- events ---


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectDomainEventCallbackRegisterAnyArgs:
    eventID: xdr.Int
    dom: types.Domain
    """None: all of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class DomainEventLifecycleMsg:
    dom: types.NonnullDomain
    event: xdr.Int
    detail: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainEventCallbackLifecycleMsg:
    callbackID: xdr.Int
    msg: DomainEventLifecycleMsg


@dataclasses.dataclass(frozen=True, slots=True)
class DomainEventBlockJobMsg:
    dom: types.NonnullDomain
    path: types.NonnullString
    type: xdr.Int
    status: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainEventCallbackBlockJobMsg:
    callbackID: xdr.Int
    msg: DomainEventBlockJobMsg


@dataclasses.dataclass(frozen=True, slots=True)
class DomainEventBlockJob2Msg:
    callbackID: xdr.Int
    dom: types.NonnullDomain
    dst: types.NonnullString
    type: xdr.Int
    status: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class DomainEventCallbackJobCompletedMsg:
    callbackID: xdr.Int
    dom: types.NonnullDomain
    params: types.JobParams
