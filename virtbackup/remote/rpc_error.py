# SPDX-License-Identifier: LGPL-2.1-or-later
"""Errors on their way over the wire: ``errors.Error`` to the struct of virnetprotocol.x, and back.

Source: libvirt's virnetprotocol.x (virNetMessageError) and virnetclientprogram.c.
"""

import dataclasses
import re

import libvirt

from virtbackup import errors
from virtbackup.remote import program, remote_types, rpc, xdr

MAX_TEXT = program.STRING_MAX // 4
"""Characters of one text of an error that are sent: whatever they are, they fit a string."""

_UNKNOWN_PROCEDURE = "unknown procedure"
_UNKNOWN_PROGRAM = "Cannot find program"


def to_wire(error: libvirt.libvirtError) -> remote_types.RemoteError:
    """ERROR as it is sent; a text that is too long is cut."""
    code, domain, message, level, str1, str2, str3, int1, int2 = errors.of_libvirt(error).err
    return remote_types.RemoteError(
        code=code,
        domain=domain,
        message=_fitting(message),
        level=level,
        dom=None,
        str1=_fitting(str1),
        str2=_fitting(str2),
        str3=_fitting(str3),
        int1=int1,
        int2=int2,
        net=None,
    )


def from_wire(sent: remote_types.RemoteError) -> errors.Error:
    """The error that a server sent, as libvirt's own client raises it: a code of 0 and no message
    have texts, and what an unknown procedure is called is VIR_ERR_NO_SUPPORT."""
    code, message = sent.code, sent.message
    if code == libvirt.VIR_ERR_OK:
        code = libvirt.VIR_ERR_INTERNAL_ERROR
        message = message or "An error occurred, but the cause is unknown"
    if is_unknown_procedure(sent):
        code = libvirt.VIR_ERR_NO_SUPPORT
    made = errors.Error(code, message or "Unknown error", domain=sent.domain)
    strings = (sent.str1, sent.str2, sent.str3)
    made.err = (code, sent.domain, str(made), sent.level, *strings, sent.int1, sent.int2)
    return made


def is_unknown_procedure(sent: remote_types.RemoteError) -> bool:
    """Whether a server says that it has not the procedure."""
    return (
        sent.code == libvirt.VIR_ERR_RPC
        and sent.domain in (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE)
        and sent.level == libvirt.VIR_ERR_ERROR
        and (sent.message or "").startswith(_UNKNOWN_PROCEDURE)
    )


def is_unknown_program(error: libvirt.libvirtError) -> bool:
    """Whether a server, of which ERROR came, says that it has not the program."""
    return error.get_error_code() == libvirt.VIR_ERR_RPC and str(error).startswith(_UNKNOWN_PROGRAM)


def reply(to: rpc.Message, error: libvirt.libvirtError) -> rpc.Message:
    """The bad answer to any call."""
    return dataclasses.replace(
        to,
        type=program.MessageType.REPLY,
        status=program.MessageStatus.ERROR,
        payload=xdr.encode(to_wire(error)),
        fds=(),
    )


def of_reply(message: rpc.Message) -> errors.Error:
    """The error in a reply whose status is ERROR. Errors: CodecError."""
    return from_wire(xdr.decode(remote_types.RemoteError, message.payload))


# --- what a server says by itself: libvirtd's words (virnetserverprogram.c) ---


def unknown(call: rpc.Message) -> errors.Error:
    """For a call that is not in our table."""
    known = rpc.known_program(call)
    if known is None:
        number = _signed(call.program)
        return rpc_error(f"{_UNKNOWN_PROGRAM} {number} version {_signed(call.version)}")
    return rpc_error(f"{_UNKNOWN_PROCEDURE}: {call.procedure}")


def undecodable() -> errors.Error:
    """For a payload that is not of its type."""
    return rpc_error("Unable to decode message payload")


def not_open() -> errors.Error:
    """For a call before CONNECT_OPEN, or after CONNECT_CLOSE."""
    text = "hypervisor connection not open"
    return errors.Error(libvirt.VIR_ERR_INTERNAL_ERROR, text, domain=libvirt.VIR_FROM_RPC)


def rpc_error(text: str) -> errors.Error:
    """An error of the RPC itself."""
    return errors.error(libvirt.VIR_ERR_RPC, text, domain=libvirt.VIR_FROM_RPC)


def _signed(number: int) -> int:
    """As C's %d shows an unsigned NUMBER."""
    return number - (1 << 32) if number >> 31 else number


def _fitting(text: str | None) -> str | None:
    """TEXT as a string of the wire: cut, without NUL, and with halves of characters only where
    they stand for bytes."""
    if text is None:
        return None
    text = text[:MAX_TEXT].replace("\0", "")
    return _NO_BYTES.sub("?", text)


_NO_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Halves of characters that ``surrogateescape`` does not make of bytes."""
