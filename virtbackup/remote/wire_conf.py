# SPDX-License-Identifier: LGPL-2.1-or-later
"""The values of the driver interface as the wire's structs, and back; each pair are inverses.

The structs have the fields of conf/backup_conf's dataclasses by name. A word that we do not know,
or a uuid that is none, is a CodecError, as all of a payload that does not fit.
"""

import dataclasses
import typing
import uuid
from collections.abc import Sequence
from typing import Any, TypeVar

from virtbackup import hypervisor
from virtbackup.conf import backup_conf
from virtbackup.remote import remote_types, virtbackup_protocol, xdr

T = TypeVar("T")
Info = virtbackup_protocol.DomainBackupGetInfoRet

NO_ID = -1
"""The id of a domain that is not running."""


def domain_to_wire(ref: hypervisor.DomainRef) -> remote_types.NonnullDomain:
    id = NO_ID if ref.id is None else ref.id
    return remote_types.NonnullDomain(ref.name, uuid_to_wire(ref.uuid), id)


def uuid_to_wire(text: str) -> bytes:
    try:
        return uuid.UUID(text).bytes
    except ValueError as failure:
        raise xdr.CodecError(f"'{text}' is no uuid") from failure


def domain_from_wire(sent: remote_types.NonnullDomain) -> hypervisor.DomainRef:
    id = None if sent.id == NO_ID else sent.id
    return hypervisor.DomainRef(sent.name, uuid_from_wire(sent.uuid), id)


def uuid_from_wire(sent: bytes) -> str:
    return str(uuid.UUID(bytes=sent))


def info_to_wire(info: backup_conf.BackupInfo) -> Info:
    disks = tuple(_disk_info_to_wire(disk) for disk in info.disks)
    return _copied(Info, info, address=_address_to_wire(info.address), disks=disks)


def info_from_wire(sent: Info) -> backup_conf.BackupInfo:
    return _copied(
        backup_conf.BackupInfo,
        sent,
        address=_address_from_wire(sent.address),
        disks=tuple(_disk_info_from_wire(disk) for disk in sent.disks),
    )


def branches_to_wire(
    branches: Sequence[backup_conf.Branch],
) -> virtbackup_protocol.DomainBranchListRet:
    return virtbackup_protocol.DomainBranchListRet(tuple(map(_branch_to_wire, branches)))


def branches_from_wire(
    sent: virtbackup_protocol.DomainBranchListRet,
) -> list[backup_conf.Branch]:
    return [_branch_from_wire(branch) for branch in sent.branches]


def params_from_wire(sent: Sequence[remote_types.TypedParam]) -> dict[str, hypervisor.Value]:
    """Typed parameters by name."""
    return {
        param.field: bool(param.value.value)
        if param.value.type == remote_types.TYPED_PARAM_BOOLEAN
        else param.value.value
        for param in sent
    }


def _disk_info_to_wire(disk: backup_conf.DiskInfo) -> virtbackup_protocol.DiskInfo:
    return _copied(virtbackup_protocol.DiskInfo, disk, since=_point_to_wire(disk.since))


def _disk_info_from_wire(sent: virtbackup_protocol.DiskInfo) -> backup_conf.DiskInfo:
    return _copied(backup_conf.DiskInfo, sent, since=_point_from_wire(sent.since))


def _branch_to_wire(branch: backup_conf.Branch) -> virtbackup_protocol.Branch:
    disks = tuple(
        _copied(virtbackup_protocol.BranchDisk, disk, point=_point_to_wire(disk.point))
        for disk in branch.disks
    )
    return _copied(virtbackup_protocol.Branch, branch, disks=disks)


def _branch_from_wire(sent: virtbackup_protocol.Branch) -> backup_conf.Branch:
    disks = tuple(
        _copied(backup_conf.BranchDisk, disk, point=_point_from_wire(disk.point))
        for disk in sent.disks
    )
    return _copied(backup_conf.Branch, sent, disks=disks)


def _point_to_wire(point: backup_conf.Point | None) -> virtbackup_protocol.Point | None:
    return None if point is None else _copied(virtbackup_protocol.Point, point)


def _point_from_wire(sent: virtbackup_protocol.Point | None) -> backup_conf.Point | None:
    return None if sent is None else _copied(backup_conf.Point, sent)


def _address_to_wire(address: backup_conf.Address) -> xdr.Arm:
    match address:
        case backup_conf.IpAddress():
            ip = _copied(virtbackup_protocol.IpAddress, address)
            return xdr.Arm(virtbackup_protocol.ADDRESS_IP, ip)
        case backup_conf.UnixAddress():
            unix = _copied(virtbackup_protocol.UnixAddress, address)
            return xdr.Arm(virtbackup_protocol.ADDRESS_UNIX, unix)


def _address_from_wire(sent: xdr.Arm) -> backup_conf.Address:
    if sent.type == virtbackup_protocol.ADDRESS_IP:
        return _copied(backup_conf.IpAddress, sent.value)
    return _copied(backup_conf.UnixAddress, sent.value)


def _copied(kind: type[T], value: Any, **changed: Any) -> T:
    """A KIND of VALUE's fields, by name. Errors: CodecError for an unknown word."""
    assert dataclasses.is_dataclass(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    values = {name: getattr(value, name) for name in names if name not in changed} | changed
    for name, words in _words(kind).items():
        if values[name] not in words:
            raise xdr.CodecError(f"{name}: {values[name]!r:.50} is none of {words}")
    return kind(**values)


_words_of: dict[type, dict[str, tuple[Any, ...]]] = {}


def _words(kind: type) -> dict[str, tuple[Any, ...]]:
    """Field -> the words it may hold, of the fields that have such."""
    if kind not in _words_of:
        hints = typing.get_type_hints(kind, include_extras=True)
        _words_of[kind] = {
            name: words for name, hint in hints.items() if (words := _literals(hint))
        }
    return _words_of[kind]


def _literals(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, and None where that may be; empty for another type."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return inner
    words = tuple(word for option in inner for word in _literals(option))
    return words + (None,) if words and type(None) in inner else words
