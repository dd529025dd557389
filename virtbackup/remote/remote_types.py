# SPDX-License-Identifier: LGPL-2.1-or-later
"""The types that the structs of the program REMOTE are made of.

Source: libvirt's remote_protocol.x, by whose names they go.
"""

import dataclasses
from typing import Annotated

from virtbackup.remote import program, xdr

DOMAIN_LIST_MAX = 16384
DOMAIN_CHECKPOINT_LIST_MAX = 16384
DOMAIN_JOB_STATS_MAX = 64
DOMAIN_BLOCK_STATS_PARAMETERS_MAX = 16
DOMAIN_FSFREEZE_MOUNTPOINTS_MAX = 256
DOMAIN_MESSAGES_MAX = 2048
CONNECT_GET_ALL_DOMAIN_STATS_MAX = 262144
AUTH_TYPE_LIST_MAX = 20
AUTH_SASL_DATA_MAX = 65536
SECURITY_MODEL_MAX = 257
SECURITY_DOI_MAX = 257
SECURITY_LABEL_MAX = 4097

NonnullString = Annotated[str, xdr.String(program.STRING_MAX)]
String = NonnullString | None
Uuid = Annotated[bytes, xdr.Opaque(program.UUID_SIZE)]
SaslData = Annotated[bytes, xdr.Chars(AUTH_SASL_DATA_MAX)]

AUTH_NONE = 0
AUTH_SASL = 1
AUTH_POLKIT = 2

# What CONNECT_SUPPORTS_FEATURE asks for (virDrvFeature in libvirt_internal.h).
FEATURE_FD_PASSING = 8
FEATURE_PROGRAM_KEEPALIVE = 10
FEATURE_REMOTE_EVENT_CALLBACK = 14
FEATURE_REMOTE_CLOSE_CALLBACK = 15

# --- what others are made of ---


@dataclasses.dataclass(frozen=True, slots=True)
class NonnullDomain:
    name: NonnullString
    uuid: Uuid
    id: xdr.Int


@dataclasses.dataclass(frozen=True, slots=True)
class NonnullNetwork:
    name: NonnullString
    uuid: Uuid


@dataclasses.dataclass(frozen=True, slots=True)
class NonnullStoragePool:
    name: NonnullString
    uuid: Uuid


@dataclasses.dataclass(frozen=True, slots=True)
class NonnullDomainCheckpoint:
    name: NonnullString
    dom: NonnullDomain


Domain = NonnullDomain | None
Domains = Annotated[tuple[NonnullDomain, ...], xdr.Array(DOMAIN_LIST_MAX)]
Checkpoints = Annotated[tuple[NonnullDomainCheckpoint, ...], xdr.Array(DOMAIN_CHECKPOINT_LIST_MAX)]


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteError:
    """The payload of a reply whose status is ERROR; ``dom`` and ``net`` are never sent."""

    code: xdr.Int
    domain: xdr.Int
    message: String
    level: xdr.Int
    dom: Domain
    str1: String
    str2: String
    str3: String
    int1: xdr.Int
    int2: xdr.Int
    net: NonnullNetwork | None


TYPED_PARAM_BOOLEAN = 6
TYPED_PARAM_ARMS = {
    1: xdr.Int,
    2: xdr.UInt,
    3: xdr.Hyper,
    4: xdr.UHyper,
    5: xdr.Double,
    TYPED_PARAM_BOOLEAN: xdr.Int,
    7: NonnullString,
}
"""VIR_TYPED_PARAM_INT, UINT, LLONG, ULLONG, DOUBLE, BOOLEAN, STRING."""

TypedParamValue = Annotated[xdr.Arm, xdr.Union(TYPED_PARAM_ARMS)]


@dataclasses.dataclass(frozen=True, slots=True)
class TypedParam:
    field: NonnullString
    value: TypedParamValue


JobParams = Annotated[tuple[TypedParam, ...], xdr.Array(DOMAIN_JOB_STATS_MAX)]
