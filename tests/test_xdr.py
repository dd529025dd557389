# SPDX-License-Identifier: LGPL-2.1-or-later
"""XDR: vectors by RFC 4506, limits both ways, and the path to the field that is wrong."""

import dataclasses
import math
import struct
import tracemalloc
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import rpc_values
from virtbackup.remote import remote_structs, remote_types, virtbackup_protocol, xdr

UUID = bytes(range(16))
DOMAIN = remote_types.NonnullDomain("vm", UUID, -1)


@dataclasses.dataclass(frozen=True)
class Everything:
    a: xdr.Int
    b: xdr.UInt
    c: xdr.Hyper
    d: xdr.UHyper
    e: xdr.Double
    f: xdr.Char
    g: xdr.UChar
    h: xdr.Short
    i: xdr.UShort
    j: xdr.Bool
    k: Annotated[str, xdr.String(5)]
    l: Annotated[bytes, xdr.Opaque(3)]  # noqa: E741
    m: Annotated[bytes, xdr.Chars(4)]
    n: Annotated[bytes, xdr.FixedChars(2)]
    o: xdr.Short | None
    p: xdr.Short | None
    q: Annotated[tuple[xdr.UShort, ...], xdr.Array(3)]
    r: Annotated[xdr.Arm, xdr.Union({1: xdr.Int, 7: Annotated[str, xdr.String(5)]})]


VALUE = Everything(
    -2, 0xFFFFFFFE, -3, 0xFFFFFFFFFFFFFFFD, 1.0, -1, 255, -32768, 65535, True, "aé",
    b"xyz", b"a\xff", b"\x80\0", None, 5, (1, 2), xdr.Arm(7, "s"),
)  # fmt: skip
BYTES = bytes.fromhex(
    "fffffffe fffffffe fffffffffffffffd fffffffffffffffd 3ff0000000000000"
    "ffffffff 000000ff ffff8000 0000ffff 00000001 00000003 61c3a900 78797a00"
    "00000002 00000061 ffffffff ffffff80 00000000 00000000 00000001 00000005"
    "00000002 00000001 00000002 00000007 00000001 73000000"
)


def test_everything_is_encoded() -> None:
    assert xdr.encode(VALUE).hex() == BYTES.hex()
    assert xdr.decode(Everything, BYTES) == VALUE
    assert xdr.decode_prefix(Everything, BYTES + b"more") == (VALUE, len(BYTES))


def test_void_is_no_bytes() -> None:
    assert xdr.encode(None) == b""


PARTS = [
    (0, "a", "int"), (4, "b", "unsigned int"), (8, "c", "hyper"), (16, "d", "unsigned hyper"),
    (24, "e", "double"), (32, "f", "char"), (36, "g", "unsigned char"), (40, "h", "short"),
    (44, "i", "unsigned short"), (48, "j", "length"), (52, "k", "length"), (56, "k", "string"),
    (60, "l", "opaque"), (64, "m", "length"), (68, "m", "chars"), (76, "n", "chars"),
    (84, "o", "length"), (88, "p", "length"), (92, "p", "short"), (96, "q", "length"),
    (100, "q", "an array of 2"), (108, "r", "int"), (112, "r", "length"), (116, "r", "string"),
]  # fmt: skip
"""Where what begins in BYTES, and what it is called."""


@pytest.mark.parametrize("size", range(len(BYTES)))
def test_cut_short(size: int) -> None:
    _, field, name = max(part for part in PARTS if part[0] <= size)
    with pytest.raises(xdr.CodecError) as caught:
        xdr.decode(Everything, BYTES[:size])
    assert str(caught.value) == f"Everything.{field}: the data ends within {name}"


def test_the_fewest_bytes_that_a_value_takes() -> None:
    codec = xdr.codec_of(Everything)
    assert isinstance(codec, xdr.Struct)
    fewest = {name: inner.least for name, inner in codec.fields}
    longer = {"c": 8, "d": 8, "e": 8, "n": 8, "r": 8}
    assert fewest == dict.fromkeys("abcdefghijklmnopqr", 4) | longer
    assert codec.least == sum(fewest.values())
    assert xdr.codec_of(Everything) is codec
    assert [xdr.Opaque(size).least for size in (0, 1, 4, 5, 16)] == [0, 4, 4, 8, 16]


@pytest.mark.parametrize("kind", rpc_values.STRUCTS, ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_round_trip_of_every_struct(kind: type, data: st.DataObject) -> None:
    value = data.draw(rpc_values.of(kind))
    sent = xdr.encode(value)
    assert len(sent) % 4 == 0
    assert len(sent) >= xdr.codec_of(kind).least
    assert xdr.decode_prefix(kind, sent) == (value, len(sent))
    assert xdr.decode_prefix(kind, sent + b"\0\0\0\1") == (value, len(sent))
    cut = data.draw(st.integers(0, max(0, len(sent) - 1)))
    if sent:
        with pytest.raises(xdr.CodecError, match=kind.__name__):
            xdr.decode(kind, sent[:cut])


def _changed(**fields: Any) -> Everything:
    return dataclasses.replace(VALUE, **fields)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (_changed(a=1 << 31), "a: 2147483648 is no int"),
        (_changed(a=1.5), "a: 1.5 is no int"),
        (_changed(a=None), "a: None is no int"),
        (_changed(b=-1), "b: -1 is no unsigned int"),
        (_changed(c=1 << 63), "c: 9223372036854775808 is no hyper"),
        (_changed(d=-1), "d: -1 is no unsigned hyper"),
        (_changed(d="1" * 1000), "d: '1111111111111111111111111111111111111111111111111"),
        (_changed(e="x"), "e: 'x' is no double"),
        (_changed(e=10**400), "e: 1000000000"),
        (_changed(f=128), "f: 128 is no char"),
        (_changed(f="a"), "f: 'a' is no char"),
        (_changed(g=256), "g: 256 is no unsigned char"),
        (_changed(h=-32769), "h: -32769 is no short"),
        (_changed(i=65536), "i: 65536 is no unsigned short"),
        (_changed(j=1), "j: 1 is no bool"),
        (_changed(k="aééé"), "k: string of 7 bytes, at most 5"),
        (_changed(k=b"a"), "k: b'a' is no string"),
        (_changed(k=None), "k: None is no string"),
        (_changed(k="a\0"), "k: a NUL byte in a string"),
        (_changed(k="\ud800"), "k: a string that is no text"),
        (_changed(l=b"xy"), "l: opaque of 2 bytes, not 3"),
        (_changed(m=b"12345"), "m: chars of 5 bytes, at most 4"),
        (_changed(m="1"), "m: '1' is no chars"),
        (_changed(n=b"1"), "n: chars of 1 bytes, not 2"),
        (_changed(p=65536), "p: 65536 is no short"),
        (_changed(q=(1, 2, 3, 4)), "q: array of 4, at most 3"),
        (_changed(q=(1, 65536)), "q[1]: 65536 is no unsigned short"),
        (_changed(q=[1]), "q: [1] is no tuple"),
        (_changed(r=xdr.Arm(2, 0)), "r: a union of unknown type 2"),
        (_changed(r=xdr.Arm(1, "s")), "r: 's' is no int"),
        (_changed(r=(1, 2)), "r: (1, 2) is no arm of a union"),
        (_changed(r=xdr.Arm(0, 2)), "r: a union of unknown type 0"),
    ],
)
def test_what_does_not_fit_is_not_sent(value: Everything, text: str) -> None:
    with pytest.raises(xdr.CodecError) as caught:
        xdr.encode(value)
    assert str(caught.value).startswith(f"Everything.{text}")
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    "value",
    [
        _changed(a=-(1 << 31), b=0, c=-(1 << 63), d=0, f=-128, g=0, h=-32768, i=0, j=False),
        _changed(a=(1 << 31) - 1, b=(1 << 32) - 1, c=(1 << 63) - 1, d=(1 << 64) - 1),
        _changed(f=127, g=255, h=32767, i=65535, j=True),
        _changed(k="aéé", m=b"\x7f\x80\xff\0", q=(1, 2, 65535), r=xdr.Arm(1, -1)),
        _changed(k="", m=b"", o=-32768, p=32767, q=()),
        _changed(k="\udcff"),
    ],
)
def test_what_just_fits(value: Everything) -> None:
    assert xdr.decode(Everything, xdr.encode(value)) == value


@pytest.mark.parametrize(
    ("offset", "word", "text"),
    [
        (32, 128, "f: 128 is no char"),
        (36, 256, "g: 256 is no unsigned char"),
        (40, 0x8000, "h: 32768 is no short"),
        (44, 65536, "i: 65536 is no unsigned short"),
        (48, 2, "j: 2 is no bool"),
        (52, 6, "k: string of 6 bytes, at most 5"),
        (52, 0xFFFFFFFF, "k: string of 4294967295 bytes, at most 5"),
        (56, 0x61006100, "k: a NUL byte in a string"),
        (64, 5, "m: chars of 5 bytes, at most 4"),
        (68, 256, "m: chars of more than eight bits"),
        (72, 0xFFFFFF7F, "m: chars of more than eight bits"),
        (84, 2, "o: 2 does not say whether there is a value"),
        (96, 4, "q: array of 4, at most 3"),
        (104, 65536, "q[1]: 65536 is no unsigned short"),
        (108, 2, "r: a union of unknown type 2"),
        (112, 6, "r: string of 6 bytes, at most 5"),
    ],
)
def test_what_does_not_fit_is_not_taken(offset: int, word: int, text: str) -> None:
    data = BYTES[:offset] + struct.pack(">I", word) + BYTES[offset + 4 :]
    with pytest.raises(xdr.CodecError) as caught:
        xdr.decode(Everything, data)
    assert str(caught.value) == f"Everything.{text}"


def test_a_c_peers_chars_may_have_no_sign() -> None:
    data = BYTES[:72] + struct.pack(">I", 255) + BYTES[76:]
    assert xdr.decode(Everything, data) == VALUE


def test_what_padding_holds_does_not_matter() -> None:
    data = BYTES[:59] + b"\xff" + BYTES[60:]
    assert xdr.decode(Everything, data) == VALUE


def test_without_a_path_there_is_the_reason_alone() -> None:
    assert str(xdr.CodecError("why")) == "why"


def test_the_path_leads_to_the_field() -> None:
    long = remote_types.NonnullDomain("x" * 5_000_000, UUID, 1)
    with pytest.raises(xdr.CodecError) as caught:
        xdr.encode(remote_structs.ConnectListAllDomainsRet((DOMAIN, DOMAIN, long), 3))
    expected = "domains[2].name: string of 5000000 bytes, at most 4194304"
    assert str(caught.value) == f"ConnectListAllDomainsRet.{expected}"
    assert caught.value.path == "ConnectListAllDomainsRet.domains[2].name"
    with pytest.raises(xdr.CodecError, match=r"^DomainFlagsArgs\.dom: None is no NonnullDomain"):
        xdr.encode(remote_structs.DomainFlagsArgs(None, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "fits"), [(4194304, True), (4194305, False)])
def test_the_longest_string(size: int, fits: bool) -> None:
    """By bytes, as libvirt counts: this dumpxml still arrives, one byte more does not."""
    value = remote_structs.XmlRet("é" * (size // 2) + "x" * (size % 2))
    if fits:
        assert xdr.decode(remote_structs.XmlRet, xdr.encode(value)) == value
    else:
        with pytest.raises(xdr.CodecError, match="of 4194305 bytes, at most 4194304"):
            xdr.encode(value)


def test_names_that_are_not_utf8() -> None:
    """libvirtd takes and echoes any bytes."""
    data = bytes.fromhex("00000004fffefdfc")
    value = xdr.decode(remote_structs.DomainLookupByNameArgs, data)
    assert xdr.encode(value) == data


@given(st.floats())
def test_doubles(number: float) -> None:
    value = remote_types.TypedParam("x", xdr.Arm(5, number))
    found = xdr.decode(remote_types.TypedParam, xdr.encode(value)).value.value
    assert found == number or (math.isnan(found) and math.isnan(number))


HUGE = [
    # Counts and lengths that the data behind them do not have.
    (remote_structs.ConnectListAllDomainsRet, struct.pack(">I", 16384)),
    (remote_structs.ConnectListDomainsRet, struct.pack(">I", 16384) + bytes(100)),
    (remote_structs.XmlRet, struct.pack(">I", 4194304) + bytes(100)),
    (remote_structs.AuthSaslRet, struct.pack(">III", 0, 0, 65536) + bytes(100)),
    (remote_structs.ConnectGetAllDomainStatsRet, struct.pack(">I", 16384) + bytes(1000)),
    (remote_types.TypedParam, struct.pack(">I", 0xFFFFFFFF)),
    (virtbackup_protocol.DomainBranchListRet, struct.pack(">I", 16384)),
]


@pytest.mark.parametrize(("kind", "data"), HUGE)
def test_no_memory_is_taken_for_what_did_not_come(kind: type, data: bytes) -> None:
    xdr.codec_of(kind)
    tracemalloc.start()
    try:
        with pytest.raises(xdr.CodecError):
            xdr.decode(kind, data)
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()


def test_a_count_that_cannot_be_is_refused_before_the_first_element() -> None:
    data = struct.pack(">I", 16384) + 100 * xdr.encode(DOMAIN)
    with pytest.raises(xdr.CodecError, match="domains: the data ends within an array of 16384"):
        xdr.decode(remote_structs.ConnectListAllDomainsRet, data)


def test_a_type_without_a_declaration_is_our_mistake() -> None:
    hints = (int, str | None, Annotated[int, "x"], dict[str, int], int | str, xdr.Int | str)
    for hint in hints:
        with pytest.raises(TypeError, match="how it travels"):
            xdr.codec_of(hint)
