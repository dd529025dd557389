# SPDX-License-Identifier: LGPL-2.1-or-later
"""XDR (RFC 4506) by declaration: a struct is a frozen dataclass, its field order the wire order.

A field's type says how it travels: ``Int``, ``UHyper``, ..., ``Annotated[str, String(100)]``,
``Annotated[bytes, Opaque(16)]``, ``Annotated[tuple[Struct, ...], Array(64)]``, another struct, or
any of these ``| None`` (XDR's ``*``). ``encode`` and ``decode`` are inverses and hold the same
limits: a peer that is sent more than it takes does not decode it at all.

As libvirt's C code does (rpcgen's), ``char``, ``short`` and their unsigned kin take four bytes
each, in arrays too.
"""

import abc
import dataclasses
import struct
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

T = TypeVar("T")


class ProtocolError(Exception):
    """What came is not libvirt's RPC; the connection cannot go on."""


class CodecError(ProtocolError):
    """A value that does not fit its type, or a payload that is not of it. The messages around it
    are whole, so the connection can go on. ``path`` names the field: ``args.disks[3].name``."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.path = ""

    def step(self, outer: str) -> None:
        """Say that it was within OUTER: a field's name or an index in brackets."""
        dot = "." if self.path and not self.path.startswith("[") else ""
        self.path = f"{outer}{dot}{self.path}"

    def __str__(self) -> str:
        return f"{self.path}: {self.args[0]}" if self.path else str(self.args[0])


class Codec(abc.ABC):
    """How one type travels."""

    name = ""
    """As XDR writes the type, where that takes no structs."""
    least: int = 4
    """The fewest bytes a value takes; no array can have more elements than there are bytes for."""

    @abc.abstractmethod
    def encode(self, value: Any, out: bytearray) -> None:
        """Append VALUE to OUT. Errors: CodecError."""

    @abc.abstractmethod
    def decode(self, data: bytes, offset: int) -> tuple[Any, int]:
        """The value at OFFSET and where it ends. Errors: CodecError."""


def encode(value: Any) -> bytes:
    """A struct's bytes; None, which is XDR's ``void``, has none. Errors: CodecError."""
    out = bytearray()
    if value is not None:
        try:
            _struct(type(value)).encode(value, out)
        except CodecError as failure:
            failure.step(type(value).__name__)
            raise
    return bytes(out)


def decode(kind: type[T], data: bytes) -> T:
    """A struct of KIND. Bytes behind it are not looked at, as libvirt does: they may be fields of
    a later version. Errors: CodecError."""
    return decode_prefix(kind, data)[0]


def decode_prefix(kind: type[T], data: bytes) -> tuple[T, int]:
    """A struct of KIND, and how many bytes it took. Errors: CodecError."""
    try:
        value, end = _struct(kind).decode(data, 0)
    except CodecError as failure:
        failure.step(kind.__name__)
        raise
    return value, end


# --- numbers ---


class Number(Codec):
    """One number of a fixed size, with more narrow bounds than its size where LEAST is given."""

    def __init__(self, name: str, format: str, low: int | None = None, high: int = 0) -> None:
        self.name = name
        self._struct = struct.Struct(format)
        self._low, self._high = low, high
        self.least = self._struct.size

    def encode(self, value: Any, out: bytearray) -> None:
        try:
            self._check(value)
            out += self._struct.pack(value)
        except (struct.error, OverflowError, TypeError) as failure:
            raise CodecError(f"{value!r:.50} is no {self.name}") from failure

    def decode(self, data: bytes, offset: int) -> tuple[Any, int]:
        try:
            (value,) = self._struct.unpack_from(data, offset)
        except struct.error as failure:
            raise _cut_short(self.name) from failure
        self._check(value)
        return value, offset + self.least

    def _check(self, value: Any) -> None:
        if self._low is not None and not self._low <= value <= self._high:
            raise CodecError(f"{value!r:.50} is no {self.name}")


class Boolean(Codec):
    name = "bool"

    def encode(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, bool):
            raise CodecError(f"{value!r:.50} is no bool")
        out += _LENGTH.pack(value)

    def decode(self, data: bytes, offset: int) -> tuple[bool, int]:
        value, offset = _length(data, offset)
        if value > 1:
            raise CodecError(f"{value} is no bool")
        return value == 1, offset


INT = Number("int", ">i")

Int = Annotated[int, INT]
UInt = Annotated[int, Number("unsigned int", ">I")]
Hyper = Annotated[int, Number("hyper", ">q")]
UHyper = Annotated[int, Number("unsigned hyper", ">Q")]
Double = Annotated[float, Number("double", ">d")]
Char = Annotated[int, Number("char", ">i", -128, 127)]
UChar = Annotated[int, Number("unsigned char", ">I", 0, 255)]
Short = Annotated[int, Number("short", ">i", -32768, 32767)]
UShort = Annotated[int, Number("unsigned short", ">I", 0, 65535)]
Bool = Annotated[bool, Boolean()]
"""XDR's ``bool``; libvirt's own structs use ``int``."""

_LENGTH = struct.Struct(">I")


def _length(data: bytes, offset: int) -> tuple[int, int]:
    try:
        (value,) = _LENGTH.unpack_from(data, offset)
    except struct.error as failure:
        raise _cut_short("length") from failure
    return value, offset + 4


def _cut_short(name: str) -> CodecError:
    return CodecError(f"the data ends within {name}")


# --- bytes ---


def _slice(data: bytes, offset: int, size: int, name: str) -> tuple[bytes, int]:
    """SIZE bytes at OFFSET, and where the next value is: padding makes four of everything. What
    the padding holds is not looked at."""
    end = offset + size + -size % 4
    if end > len(data):
        raise _cut_short(name)
    return data[offset : offset + size], end


def _too_long(name: str, size: int, max: int) -> CodecError:
    return CodecError(f"{name} of {size} bytes, at most {max}")


class String(Codec):
    """``string<MAX>``: at most MAX bytes, which need not be UTF-8 (``surrogateescape``); and none
    of them NUL, where C code would see another string than we do."""

    def __init__(self, max: int) -> None:
        self.name = f"string<{max}>"
        self.max = max

    def encode(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, str):
            raise CodecError(f"{value!r:.50} is no string")
        try:
            text = value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as failure:
            raise CodecError(f"a string that is no text: {failure.reason}") from failure
        if len(text) > self.max:
            raise _too_long("string", len(text), self.max)
        _refuse_nul(text)
        out += _LENGTH.pack(len(text))
        out += text
        out += bytes(-len(text) % 4)

    def decode(self, data: bytes, offset: int) -> tuple[str, int]:
        size, offset = _length(data, offset)
        if size > self.max:
            raise _too_long("string", size, self.max)
        text, end = _slice(data, offset, size, "string")
        _refuse_nul(text)
        return text.decode("utf-8", "surrogateescape"), end


def _refuse_nul(text: bytes) -> None:
    if b"\0" in text:
        raise CodecError("a NUL byte in a string")


class Opaque(Codec):
    """``opaque[SIZE]``: that many bytes."""

    def __init__(self, size: int) -> None:
        self.name = f"opaque[{size}]"
        self.size = size
        self.least = size + -size % 4

    def encode(self, value: Any, out: bytearray) -> None:
        _check_bytes(value, "opaque", self.size, self.size)
        out += value
        out += bytes(-self.size % 4)

    def decode(self, data: bytes, offset: int) -> tuple[bytes, int]:
        return _slice(data, offset, self.size, "opaque")


class Chars(Codec):
    """``char<MAX>`` as bytes: four on the wire for each. A C peer's sign does not matter."""

    def __init__(self, max: int) -> None:
        self.name = f"char<{max}>"
        self.max = max

    def encode(self, value: Any, out: bytearray) -> None:
        _check_bytes(value, "chars", 0, self.max)
        out += _LENGTH.pack(len(value))
        out += _widened(value)

    def decode(self, data: bytes, offset: int) -> tuple[bytes, int]:
        count, offset = _length(data, offset)
        if count > self.max:
            raise _too_long("chars", count, self.max)
        wide, end = _slice(data, offset, 4 * count, "chars")
        return _narrowed(wide), end


class FixedChars(Codec):
    """``char[SIZE]`` as exactly SIZE bytes: four on the wire for each."""

    def __init__(self, size: int) -> None:
        self.name = f"char[{size}]"
        self.size = size
        self.least = 4 * size

    def encode(self, value: Any, out: bytearray) -> None:
        _check_bytes(value, "chars", self.size, self.size)
        out += _widened(value)

    def decode(self, data: bytes, offset: int) -> tuple[bytes, int]:
        wide, end = _slice(data, offset, 4 * self.size, "chars")
        return _narrowed(wide), end


def _check_bytes(value: Any, name: str, low: int, high: int) -> None:
    if not isinstance(value, bytes):
        raise CodecError(f"{value!r:.50} is no {name}")
    if low == high != len(value):
        raise CodecError(f"{name} of {len(value)} bytes, not {high}")
    if len(value) > high:
        raise _too_long(name, len(value), high)


def _widened(value: bytes) -> bytes:
    return struct.pack(f">{len(value)}i", *(char - ((char & 0x80) << 1) for char in value))


def _narrowed(wide: bytes) -> bytes:
    numbers = struct.unpack(f">{len(wide) // 4}i", wide)
    if numbers and not (min(numbers) >= -128 and max(numbers) <= 255):
        raise CodecError("chars of more than eight bits")
    return bytes(number & 0xFF for number in numbers)


# --- what holds others ---


@dataclasses.dataclass(frozen=True)
class Array:
    """``<MAX>`` of what the annotated tuple has: at most MAX elements."""

    max: int


class Arm(NamedTuple):
    """A union's value: which TYPE it has, and the VALUE of that."""

    type: int
    value: Any


class Union(Codec):
    """``union switch (int type)``; ARMS: type -> how that arm travels."""

    def __init__(self, arms: Mapping[int, Any]) -> None:
        self.arms = {type: codec_of(hint) for type, hint in arms.items()}
        self.least = 4 + min(codec.least for codec in self.arms.values())

    def encode(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, Arm):
            raise CodecError(f"{value!r:.50} is no arm of a union")
        codec = self._arm(value.type)
        INT.encode(value.type, out)
        codec.encode(value.value, out)

    def decode(self, data: bytes, offset: int) -> tuple[Arm, int]:
        type, offset = INT.decode(data, offset)
        value, offset = self._arm(type).decode(data, offset)
        return Arm(type, value), offset

    def _arm(self, type: int) -> Codec:
        codec = self.arms.get(type)
        if codec is None:
            raise CodecError(f"a union of unknown type {type}")
        return codec


class Optional(Codec):
    """``*``: a flag, and the value where that says so."""

    def __init__(self, inner: Codec) -> None:
        self.inner = inner

    def encode(self, value: Any, out: bytearray) -> None:
        out += _LENGTH.pack(value is not None)
        if value is not None:
            self.inner.encode(value, out)

    def decode(self, data: bytes, offset: int) -> tuple[Any, int]:
        flag, offset = _length(data, offset)
        if flag > 1:
            raise CodecError(f"{flag} does not say whether there is a value")
        return self.inner.decode(data, offset) if flag else (None, offset)


class ArrayOf(Codec):
    """``<MAX>`` of one type."""

    def __init__(self, inner: Codec, max: int) -> None:
        self.inner, self.max = inner, max

    def encode(self, value: Any, out: bytearray) -> None:
        if not isinstance(value, tuple):
            raise CodecError(f"{value!r:.50} is no tuple")
        self._check(len(value))
        out += _LENGTH.pack(len(value))
        for index, item in enumerate(value):
            try:
                self.inner.encode(item, out)
            except CodecError as failure:
                failure.step(f"[{index}]")
                raise

    def decode(self, data: bytes, offset: int) -> tuple[tuple[Any, ...], int]:
        count, offset = _length(data, offset)
        self._check(count)
        if count * self.inner.least > len(data) - offset:
            raise _cut_short(f"an array of {count}")
        items: list[Any] = []
        try:
            for _ in range(count):
                item, offset = self.inner.decode(data, offset)
                items.append(item)
        except CodecError as failure:
            failure.step(f"[{len(items)}]")
            raise
        return tuple(items), offset

    def _check(self, count: int) -> None:
        if count > self.max:
            raise CodecError(f"array of {count}, at most {self.max}")


class Struct(Codec):
    """A frozen dataclass, field by field."""

    def __init__(self, kind: type) -> None:
        assert dataclasses.is_dataclass(kind), kind
        hints = typing.get_type_hints(kind, include_extras=True)
        self.kind = kind
        self.fields = [(f.name, codec_of(hints[f.name])) for f in dataclasses.fields(kind)]
        self.least = sum(codec.least for _, codec in self.fields)

    def encode(self, value: Any, out: bytearray) -> None:
        if type(value) is not self.kind:
            raise CodecError(f"{value!r:.50} is no {self.kind.__name__}")
        for name, codec in self.fields:
            try:
                codec.encode(getattr(value, name), out)
            except CodecError as failure:
                failure.step(name)
                raise

    def decode(self, data: bytes, offset: int) -> tuple[Any, int]:
        values: list[Any] = []
        try:
            for _, codec in self.fields:
                value, offset = codec.decode(data, offset)
                values.append(value)
        except CodecError as failure:
            failure.step(self.fields[len(values)][0])
            raise
        return self.kind(*values), offset


_structs: dict[type, Struct] = {}


def _struct(kind: type) -> Struct:
    """The codec of a struct, made at its first use."""
    codec = _structs.get(kind)
    if codec is None:
        codec = _structs[kind] = Struct(kind)
    return codec


def codec_of(hint: Any) -> Codec:
    """How a field with the annotation HINT travels. Errors: TypeError, for our own mistakes."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _struct(hint)
    if origin is Annotated:
        declared = hint.__metadata__[-1]
        if isinstance(declared, Codec):
            return declared
        if isinstance(declared, Array):
            return ArrayOf(codec_of(typing.get_args(inner[0])[0]), declared.max)
    elif origin in (typing.Union, types.UnionType) and inner[1:] == (type(None),):
        return Optional(codec_of(inner[0]))
    raise TypeError(f"{hint} says not how it travels")
