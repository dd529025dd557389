# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes over the RPC, a line a message, for people who look for a fault. Pure.

What is secret is not shown: what SASL says, passwords in documents and in monitor commands.
"""

import dataclasses
import datetime
import re
import uuid
from typing import Any, Literal

from virtbackup.remote import protocol, remote_types, rpc, xdr
from virtbackup.remote.program import MessageStatus, MessageType

Direction = Literal["->", "<-"]
"""Sent or received: of a proxy, by the client or by the server."""

MAX_TEXT = 2000
"""Characters of what a message carries."""

_SECRET = frozenset({"AUTH_SASL_START", "AUTH_SASL_STEP"})
"""Procedures of which neither arguments nor answer are shown."""

_HIDDEN = "(hidden)"
_QUOTE = r"""\\{0,7}["']|&quot;|&apos;"""
"""One of JSON's, which QEMU takes single ones for; within strings, or an attribute."""

_PASSWORDS = (
    # <graphics passwd='...'>
    re.compile(r"""(\bpasswd\s*=\s*(["'])).*?(?=\2|\Z)""", re.DOTALL),
    # <cookie name='...'>...</cookie>
    re.compile(r"(<cookie\b[^<>]*>)[^<]*"),
    # <secret><value>...</value></secret>, whatever else is in there
    re.compile(r"(<secret\b[^<>]*>\s*<value\b[^<>]*>)[^<]*"),
    re.compile(r"(<value\b[^<>]*>)[^<]*(?=</value>\s*</secret>)"),
    # {"password": "..."}, {"qom-type": "secret", "data": "..."}
    re.compile(
        rf"(({_QUOTE})(?:password|passwd|data|cookie|secret)\2\s*:\s*({_QUOTE})).*?(?=(?<!\\)\3|\Z)",
        re.DOTALL,
    ),
    # set_password vnc ..., change vnc password ...
    re.compile(
        r"(\b(?:set_password\s+\w+|change\s+\w+\s+passw(?:or)?d)\s+)"
        rf"(?:({_QUOTE}).*?(?=\2|$)|\S+)"
    ),
    # object_add secret,id=...,data=..., and as an argument of QEMU's; drive_add ...password=...
    re.compile(r"""(\b(?:data|password)=)(?!,(?!,))[^\s"'<>]+?(?=(?<!,),(?!,)|[\s"'<>]|\Z)"""),
)
"""No group is repeated for each character: for a long text that would take gigabytes."""


def line(when: datetime.datetime, direction: Direction, message: rpc.Message) -> str:
    """A message as a trace has it, without the end of the line. WHEN is of UTC."""
    return f"{_time(when)} {direction} {describe(message)}"


def facts(when: datetime.datetime, direction: Direction, message: rpc.Message) -> dict[str, Any]:
    """The same for JSON, and of any length: what the message carries is in ``fields``, where it is
    known and no secret, and ``problem`` says why it is not. Descriptors are counted in ``fds``;
    ``size`` is the payload's."""
    of, name = _names(message)
    told: dict[str, Any] = {
        "time": _time(when),
        "direction": direction,
        "program": of,
        "procedure": name,
        "serial": message.serial,
        "type": _word(MessageType, message.type),
        "status": _word(MessageStatus, message.status),
        "fds": len(message.fds),
        "size": len(message.payload),
        "struct": None,
        "fields": None,
        "hidden": _is_secret(message),
        "problem": None,
    }
    try:
        value = None if told["hidden"] else _decoded(message)
    except xdr.CodecError as failure:
        told["problem"] = str(failure)
    else:
        if value is not None:
            told |= {"struct": type(value).__name__, "fields": _plain(value)}
    return told


def _plain(value: Any, name: str = "") -> Any:
    """A VALUE, of the field NAME, as JSON has it: bytes in hex, a uuid as people write it."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), name) for name in names}
    match value:
        case xdr.Arm():
            return {"type": value.type, "value": _plain(value.value)}
        case tuple():
            return [_plain(item, name) for item in value]
        case bytes() if name == "uuid":
            return str(uuid.UUID(bytes=value))
        case bytes():
            return value.hex()
        case str():
            return _hidden(value)
    return value


def _time(when: datetime.datetime) -> str:
    return f"{when:%Y-%m-%dT%H:%M:%S.%fZ}"


def describe(message: rpc.Message) -> str:
    """``REMOTE.DOMAIN_LOOKUP_BY_NAME serial=5 CALL DomainLookupByNameArgs(name='vm')``."""
    of, name = _names(message)
    words = [f"{of}.{name}", f"serial={message.serial}", _word(MessageType, message.type)]
    if message.status != MessageStatus.OK:
        words.append(_word(MessageStatus, message.status))
    if message.fds:
        words.append(f"fds={len(message.fds)}")
    if carried := _carried(message):
        words.append(carried)
    return " ".join(words)


def _names(message: rpc.Message) -> tuple[str, str]:
    """Of program and procedure; where they are not known, their numbers."""
    known, proc = rpc.known_program(message), message.proc
    of = known.name if known is not None else f"{message.program:#x}/{message.version}"
    return of, proc.name if proc is not None else str(message.procedure)


def _word(of: type[MessageType] | type[MessageStatus], number: int) -> str:
    try:
        return of(number).name
    except ValueError:
        return str(number)


def _carried(message: rpc.Message) -> str:
    """What a message carries; as much as is known of it."""
    size = f"({len(message.payload)} bytes)" if message.payload else ""
    if _is_secret(message):
        return f"{_HIDDEN} {size}" if size else ""
    try:
        return _shown(_decoded(message), size)
    except xdr.CodecError as failure:
        return f"{size} that are not of its type: {failure}"


def _is_secret(message: rpc.Message) -> bool:
    proc = message.proc
    return proc is not None and proc.name in _SECRET and message.program == protocol.REMOTE.number


def _decoded(message: rpc.Message) -> Any:
    """The struct; None where there is none, or none that is known."""
    if message.type in (MessageType.STREAM, MessageType.STREAM_HOLE):
        return None
    if message.status == MessageStatus.ERROR:
        return xdr.decode(remote_types.RemoteError, message.payload)
    if message.proc is None or message.status != MessageStatus.OK:
        return None
    is_reply = message.type in (MessageType.REPLY, MessageType.REPLY_WITH_FDS)
    return rpc.ret(message) if is_reply else rpc.args(message)


def _shown(value: Any, otherwise: str) -> str:
    if value is None:
        return otherwise
    texts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    hidden = {name: _hidden(text) for name, text in texts.items() if isinstance(text, str)}
    text = repr(dataclasses.replace(value, **hidden))
    if len(text) > MAX_TEXT:
        return f"{text[:MAX_TEXT]}... ({len(text)} characters)"
    return text


def _hidden(text: str) -> str:
    for password in _PASSWORDS:
        text = password.sub(rf"\g<1>{_HIDDEN}", text)
    return text
