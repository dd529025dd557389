# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every row of our tables against what libvirt's own sources say (tests/record_protocol.py)."""

import dataclasses
import importlib
import json
import re
from typing import Annotated, Any

import pytest

from tests import record_protocol, rpc_values
from virtbackup.conf import backup_conf
from virtbackup.remote import (
    daemon,
    dispatch,
    program,
    protocol,
    remote_types,
    virtbackup_protocol,
    xdr,
)

LIBVIRT = json.loads(record_protocol.DIGEST.read_text())
THEIRS = (protocol.REMOTE, protocol.QEMU, protocol.KEEPALIVE)
PARAMS = Annotated[
    tuple[remote_types.TypedParam, ...], xdr.Array(remote_types.CONNECT_GET_ALL_DOMAIN_STATS_MAX)
]
ROWS = [(each, proc) for each in THEIRS for proc in each.procedures]


def expand(type: str) -> Any:
    """A type of the digest as ``rpc_values.describe`` tells ours."""
    if type.startswith("*"):
        return ["*", expand(type[1:])]
    if type in LIBVIRT["structs"]:
        fields = LIBVIRT["structs"][type]
        if isinstance(fields, dict):
            return {value: expand(each) for value, each in fields.items()}
        return [[name, expand(each)] for name, each in fields]
    array = re.fullmatch(r"(.*)<(\d+)>", type)
    if array and array[1] not in ("string", "char", "opaque"):
        return ["<>", int(array[2]), expand(array[1])]
    return type


def ours(kind: type | None) -> Any:
    return None if kind is None else rpc_values.describe(xdr.codec_of(kind))


@pytest.mark.parametrize("one", THEIRS, ids=lambda one: one.name)
def test_programs(one: program.Program) -> None:
    theirs = LIBVIRT["programs"][one.name]
    assert (one.number, one.version) == (theirs["number"], theirs["version"])


@pytest.mark.parametrize(("one", "proc"), ROWS, ids=lambda row: row.name)
def test_procedures(one: program.Program, proc: program.Proc) -> None:
    theirs = LIBVIRT["programs"][one.name]["procedures"][proc.name]
    assert proc.number == theirs["number"]
    args, ret, msg = (
        expand(theirs[part]) if part in theirs else None for part in ("args", "ret", "msg")
    )
    assert ours(proc.args) == (args or msg)
    assert ours(proc.ret) == ret
    if one is not protocol.KEEPALIVE:
        assert (proc.kind == "event") == (msg is not None)


def test_the_comparison_can_fail() -> None:
    """Another order, limit or type is seen."""
    described = expand("remote_domain_stats_record")
    assert described == ours(
        dataclasses.make_dataclass(
            "Same", [("dom", remote_types.NonnullDomain), ("params", PARAMS)], frozen=True
        )
    )
    for fields in (
        [("params", PARAMS), ("dom", remote_types.NonnullDomain)],
        [("dom", remote_types.NonnullNetwork), ("params", PARAMS)],
        [("dom", remote_types.NonnullDomain), ("params", remote_types.JobParams)],
    ):
        assert described != ours(dataclasses.make_dataclass("Other", fields, frozen=True))


def test_errors() -> None:
    for name in ("remote_error", "virNetMessageError"):
        assert ours(remote_types.RemoteError) == expand(name)


def test_messages() -> None:
    constants, enums = LIBVIRT["constants"], LIBVIRT["enums"]
    assert constants["VIR_NET_MESSAGE_MAX"] == program.MESSAGE_MAX
    assert constants["VIR_NET_MESSAGE_HEADER_MAX"] == program.HEADER_SIZE
    assert constants["VIR_NET_MESSAGE_NUM_FDS_MAX"] == program.FDS_MAX
    assert constants["VIR_NET_MESSAGE_STRING_MAX"] == program.STRING_MAX
    for known, name, prefix in (
        (program.MessageType, "virNetMessageType", "VIR_NET_"),
        (program.MessageStatus, "virNetMessageStatus", "VIR_NET_"),
    ):
        assert {f"{prefix}{each.name}": each.value for each in known} == enums[name]
    assert enums["remote_auth_type"] == {
        "REMOTE_AUTH_NONE": remote_types.AUTH_NONE,
        "REMOTE_AUTH_SASL": remote_types.AUTH_SASL,
        "REMOTE_AUTH_POLKIT": remote_types.AUTH_POLKIT,
    }


def test_limits_go_by_libvirts_names() -> None:
    limits = [name for name in vars(remote_types) if name.endswith("_MAX")]
    assert len(limits) > 10
    for name in limits:
        assert getattr(remote_types, name) == LIBVIRT["constants"][f"REMOTE_{name}"]


@pytest.mark.parametrize("one", protocol.PROGRAMS.values(), ids=lambda one: one.name)
def test_no_number_or_name_twice(one: program.Program) -> None:
    assert len(one.by_number) == len(one.procedures)
    assert len({proc.name for proc in one.procedures}) == len(one.procedures)
    assert one[one.procedures[0].name] is one.procedures[0]


def test_our_program_is_nobody_elses() -> None:
    ours = protocol.VIRTBACKUP
    assert 0x20000000 <= ours.number < 0x40000000
    assert ours.number not in {each.number for each in THEIRS}
    assert [proc.number for proc in ours.procedures] == list(range(1, len(ours.procedures) + 1))


def test_each_call_of_our_program_is_served() -> None:
    """All but the one that the daemon sends, an event."""
    ours = protocol.VIRTBACKUP
    importlib.import_module(daemon.__name__)  # which has the table filled
    handlers = dispatch.HANDLERS
    left = {each.name for each in ours.procedures if (ours.number, each.number) not in handlers}
    assert left == {"BACKUP_ENDED"}


def test_the_reader_refuses_what_it_does_not_know() -> None:
    reader = record_protocol.Reader()
    for source in ("program X { };", "struct s { int (*f)(void); };", "nonsense"):
        with pytest.raises(ValueError, match="what is this"):
            reader.read(source)


@pytest.mark.parametrize(
    ("wire", "conf"),
    [
        (virtbackup_protocol.DomainBackupGetInfoRet, backup_conf.BackupInfo),
        (virtbackup_protocol.DiskInfo, backup_conf.DiskInfo),
        (virtbackup_protocol.IpAddress, backup_conf.IpAddress),
        (virtbackup_protocol.UnixAddress, backup_conf.UnixAddress),
        (virtbackup_protocol.Point, backup_conf.Point),
        (virtbackup_protocol.Branch, backup_conf.Branch),
        (virtbackup_protocol.BranchDisk, backup_conf.BranchDisk),
    ],
)
def test_our_structs_have_the_fields_of_the_values(wire: type, conf: type) -> None:
    """A field that is added to one is missed here before a user misses it."""
    assert [f.name for f in dataclasses.fields(wire)] == [f.name for f in dataclasses.fields(conf)]
