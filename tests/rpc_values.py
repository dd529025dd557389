# SPDX-License-Identifier: LGPL-2.1-or-later
"""Values of any struct of the wire, for hypothesis, and all structs there are."""

import functools
from typing import Any

from hypothesis import strategies as st

from virtbackup.remote import protocol, remote_types, xdr

STRUCTS: list[type] = sorted(
    {
        kind
        for each in protocol.PROGRAMS.values()
        for proc in each.procedures
        for kind in (proc.args, proc.ret)
        if kind is not None
    }
    | {remote_types.RemoteError},
    key=lambda kind: (kind.__module__, kind.__name__),
)

NUMBERS = {
    "int": (-(1 << 31), (1 << 31) - 1),
    "unsigned int": (0, (1 << 32) - 1),
    "hyper": (-(1 << 63), (1 << 63) - 1),
    "unsigned hyper": (0, (1 << 64) - 1),
    "char": (-128, 127),
    "unsigned char": (0, 255),
    "short": (-(1 << 15), (1 << 15) - 1),
    "unsigned short": (0, (1 << 16) - 1),
}


def texts(max: int) -> st.SearchStrategy[str]:
    """Strings as the wire has them: bytes of any kind but NUL."""
    return (
        st.lists(st.integers(1, 255), max_size=min(max, 12))
        .map(bytes)
        .map(lambda data: data.decode("utf-8", "surrogateescape"))
    )


@functools.cache
def values(codec: xdr.Codec) -> st.SearchStrategy[Any]:
    """Values that CODEC encodes."""
    match codec:
        case xdr.Optional():
            return st.none() | values(codec.inner)
        case xdr.ArrayOf():
            return st.lists(values(codec.inner), max_size=min(codec.max, 3)).map(tuple)
        case xdr.Union():
            arms = [st.tuples(st.just(type), values(arm)) for type, arm in codec.arms.items()]
            return st.one_of(*arms).map(xdr.Arm._make)
        case xdr.Struct():
            return st.builds(codec.kind, **{name: values(inner) for name, inner in codec.fields})
    return plain_values(codec)


def plain_values(codec: xdr.Codec) -> st.SearchStrategy[Any]:
    """Values of a type that has no other in it."""
    match codec:
        case xdr.Number(name="double"):
            return st.floats(allow_nan=False)
        case xdr.Number(name=name):
            return st.integers(*NUMBERS[name])
        case xdr.Boolean():
            return st.booleans()
        case xdr.String(max=max):
            return texts(max)
        case xdr.Opaque(size=size) | xdr.FixedChars(size=size):
            return st.binary(min_size=size, max_size=size)
        case xdr.Chars(max=max):
            return st.binary(max_size=min(max, 12))
    raise AssertionError(codec)


def of(kind: type) -> st.SearchStrategy[Any]:
    """Values of the struct KIND."""
    return values(xdr.codec_of(kind))


def describe(codec: xdr.Codec) -> Any:
    """CODEC as the recorded digest of libvirt's types, its structs spelt out."""
    match codec:
        case xdr.Optional():
            return ["*", describe(codec.inner)]
        case xdr.ArrayOf():
            return ["<>", codec.max, describe(codec.inner)]
        case xdr.Union():
            return {str(type): describe(arm) for type, arm in codec.arms.items()}
        case xdr.Struct():
            return [[name, describe(inner)] for name, inner in codec.fields]
    assert codec.name, codec
    return codec.name
