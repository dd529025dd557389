# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes over the RPC, a line a message, for people who look for a fault. Pure.

What is secret is not shown: what SASL says, passwords in documents and in monitor commands.
"""

import dataclasses
import datetime
import re
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
_PASSWORDS = (
    # <graphics passwd='...'>
    re.compile(r"""(\bpasswd\s*=\s*(["']))(?:(?!\2).)*""", re.DOTALL),
    # {"password": "..."}, {"qom-type": "secret", "data": "..."}
    re.compile(r'("(?:password|passwd|data)"\s*:\s*")(?:[^"\\]|\\.)*'),
    # set_password vnc ..., change vnc password ...
    re.compile(r"(\b(?:set_password\s+\w+|change\s+\w+\s+password)\s+)\S+"),
)


def line(when: datetime.datetime, direction: Direction, message: rpc.Message) -> str:
    """A message as a trace has it, without the end of the line. WHEN is of UTC."""
    return f"{when:%Y-%m-%dT%H:%M:%S.%fZ} {direction} {describe(message)}"


def describe(message: rpc.Message) -> str:
    """``REMOTE.DOMAIN_LOOKUP_BY_NAME serial=5 CALL DomainLookupByNameArgs(name='vm')``."""
    known = rpc.known_program(message)
    of = known.name if known is not None else f"{message.program:#x}/{message.version}"
    proc = message.proc
    name = proc.name if proc is not None else str(message.procedure)
    words = [f"{of}.{name}", f"serial={message.serial}", _word(MessageType, message.type)]
    if message.status != MessageStatus.OK:
        words.append(_word(MessageStatus, message.status))
    if message.fds:
        words.append(f"fds={len(message.fds)}")
    if carried := _carried(message):
        words.append(carried)
    return " ".join(words)


def _word(of: type[MessageType] | type[MessageStatus], number: int) -> str:
    try:
        return of(number).name
    except ValueError:
        return str(number)


def _carried(message: rpc.Message) -> str:
    """What a message carries; as much as is known of it."""
    size = f"({len(message.payload)} bytes)" if message.payload else ""
    proc = message.proc
    if proc is not None and proc.name in _SECRET and message.program == protocol.REMOTE.number:
        return f"{_HIDDEN} {size}" if size else ""
    try:
        return _shown(_decoded(message), size)
    except xdr.CodecError as failure:
        return f"{size} that are not of its type: {failure}"


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
