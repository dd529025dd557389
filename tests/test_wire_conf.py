# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver interface's values on the wire and back."""

import dataclasses
import typing
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import rpc_values
from virtbackup import hypervisor
from virtbackup.conf import backup_conf
from virtbackup.remote import remote_types, virtbackup_protocol, wire_conf, xdr

TEXT = rpc_values.texts(12)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type of backup_conf's, as a driver may have them."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: values(hint) for name, hint in hints.items()})
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(inner)
    if inner:
        return st.one_of(*map(values, inner))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, (1 << 32) - 1),
        str: TEXT,
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return plain[kind]


@given(values(backup_conf.BackupInfo))
def test_info(info: backup_conf.BackupInfo) -> None:
    sent = wire_conf.info_to_wire(info)
    data = xdr.encode(sent)
    assert wire_conf.info_from_wire(xdr.decode(type(sent), data)) == info


@given(st.lists(values(backup_conf.Branch), max_size=3))
def test_branches(branches: list[backup_conf.Branch]) -> None:
    sent = wire_conf.branches_to_wire(branches)
    data = xdr.encode(sent)
    assert wire_conf.branches_from_wire(xdr.decode(type(sent), data)) == branches


@given(
    st.builds(
        hypervisor.DomainRef,
        TEXT,
        st.uuids().map(str),
        st.none() | st.integers(0, (1 << 31) - 1),
    )
)
def test_domains(ref: hypervisor.DomainRef) -> None:
    sent = wire_conf.domain_to_wire(ref)
    assert wire_conf.domain_from_wire(xdr.decode(type(sent), xdr.encode(sent))) == ref


def test_an_inactive_domain_has_no_id() -> None:
    number = uuid.UUID(int=1)
    sent = wire_conf.domain_to_wire(hypervisor.DomainRef("vm", str(number), None))
    assert sent == remote_types.NonnullDomain("vm", number.bytes, -1)


def test_no_uuid() -> None:
    with pytest.raises(xdr.CodecError, match="'x' is no uuid"):
        wire_conf.domain_to_wire(hypervisor.DomainRef("vm", "x", None))


@given(rpc_values.of(virtbackup_protocol.DomainBackupGetInfoRet))
def test_any_info_that_comes_is_one_or_a_codec_error(
    sent: virtbackup_protocol.DomainBackupGetInfoRet,
) -> None:
    try:
        info = wire_conf.info_from_wire(sent)
    except xdr.CodecError as failure:
        assert "is none of" in str(failure)
    else:
        assert wire_conf.info_to_wire(info) == sent


def test_words_that_we_do_not_know() -> None:
    good = virtbackup_protocol.DomainBackupGetInfoRet(
        "running", 1.0, xdr.Arm(2, virtbackup_protocol.UnixAddress("/s", None)), (),
        None, None, None, None, None, None, None,
    )  # fmt: skip
    assert wire_conf.info_from_wire(good).scratch_failure is None
    assert wire_conf.info_from_wire(dataclasses.replace(good, scratch_failure="guest"))
    for change in ({"state": "odd"}, {"scratch_failure": "odd"}):
        with pytest.raises(xdr.CodecError, match="'odd' is none of"):
            wire_conf.info_from_wire(dataclasses.replace(good, **change))  # type: ignore[arg-type]
