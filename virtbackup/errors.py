# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's error codes and texts, raised without a libvirt call having failed (virerror.c).

``Error`` is a ``libvirt.libvirtError``, so ``except libvirt.libvirtError`` and
``get_error_code()`` work on it as on any error of libvirt-python.
"""

import copyreg

import libvirt

CHECKPOINT_INCONSISTENT = 109
"""VIR_ERR_CHECKPOINT_INCONSISTENT, which libvirt-python does not have before 8.1."""

# Code -> libvirt's text with a detail, and without one (virerror.c, virErrorMsg).
_TEXTS = {
    libvirt.VIR_ERR_INTERNAL_ERROR: ("internal error: %s", "internal error"),
    libvirt.VIR_ERR_NO_SUPPORT: (
        "this function is not supported by the connection driver: %s",
        "this function is not supported by the connection driver",
    ),
    libvirt.VIR_ERR_NO_CONNECT: (
        "no connection driver available for %s",
        "no connection driver available",
    ),
    libvirt.VIR_ERR_INVALID_CONN: (
        "invalid connection pointer in %s",
        "invalid connection pointer in",
    ),
    libvirt.VIR_ERR_INVALID_ARG: ("invalid argument: %s", "invalid argument"),
    libvirt.VIR_ERR_OPERATION_FAILED: ("operation failed: %s", "operation failed"),
    libvirt.VIR_ERR_XML_ERROR: ("XML error: %s", "XML description is invalid or not well formed"),
    libvirt.VIR_ERR_OPERATION_DENIED: (
        "operation forbidden: %s",
        "operation forbidden for read only access",
    ),
    libvirt.VIR_ERR_SYSTEM_ERROR: ("%s", "system call error"),
    libvirt.VIR_ERR_RPC: ("%s", "RPC error"),
    libvirt.VIR_ERR_CONF_SYNTAX: (
        "configuration file syntax error: %s",
        "configuration file syntax error",
    ),
    libvirt.VIR_ERR_NO_DOMAIN: ("Domain not found: %s", "Domain not found"),
    libvirt.VIR_ERR_AUTH_FAILED: ("authentication failed: %s", "authentication failed"),
    libvirt.VIR_ERR_OPERATION_INVALID: (
        "Requested operation is not valid: %s",
        "Requested operation is not valid",
    ),
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED: (
        "unsupported configuration: %s",
        "unsupported configuration",
    ),
    libvirt.VIR_ERR_OPERATION_TIMEOUT: (
        "Timed out during operation: %s",
        "Timed out during operation",
    ),
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: ("argument unsupported: %s", "argument unsupported"),
    libvirt.VIR_ERR_OPERATION_ABORTED: ("operation aborted: %s", "operation aborted"),
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED: (
        "Operation not supported: %s",
        "Operation not supported",
    ),
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: (
        "Guest agent is not responding: %s",
        "Guest agent is not responding",
    ),
    libvirt.VIR_ERR_RESOURCE_BUSY: ("resource busy: %s", "resource busy"),
    libvirt.VIR_ERR_ACCESS_DENIED: ("access denied: %s", "access denied"),
    libvirt.VIR_ERR_XML_INVALID_SCHEMA: (
        "XML document failed to validate against schema: %s",
        "XML document failed to validate against schema",
    ),
    libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT: (
        "Domain checkpoint not found: %s",
        "Domain checkpoint not found",
    ),
    libvirt.VIR_ERR_NO_DOMAIN_BACKUP: (
        "Domain backup job id not found: %s",
        "Domain backup job id not found",
    ),
    CHECKPOINT_INCONSISTENT: (
        "checkpoint inconsistent: %s",
        "checkpoint inconsistent",
    ),
}


class Error(libvirt.libvirtError):  # type: ignore[misc]
    """A libvirtError of our own making; ``err`` is libvirt's nine-tuple."""

    def __init__(
        self,
        code: int,
        message: str,
        *,
        domain: int = libvirt.VIR_FROM_QEMU,
        strings: tuple[str | None, str | None, str | None] = (None, None, None),
        ints: tuple[int, int] = (-1, -1),
    ) -> None:
        # libvirtError's own __init__ would ask the C library for its last error.
        Exception.__init__(self, message)
        self.err = (code, domain, message, libvirt.VIR_ERR_ERROR, *strings, *ints)

    def __reduce__(self) -> tuple[object, ...]:
        """Copied and pickled as libvirtError is, so that it comes out of another process."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


def of_libvirt(failure: libvirt.libvirtError) -> Error:
    """FAILURE of a call of libvirt-python's, as one of ours: the same in every respect."""
    if isinstance(failure, Error):
        return failure
    made = Error(failure.get_error_code() or libvirt.VIR_ERR_INTERNAL_ERROR, str(failure))
    made.err = failure.err or made.err
    return made


def error(code: int, detail: str | None = None, *, domain: int = libvirt.VIR_FROM_QEMU) -> Error:
    """An Error with libvirt's text for CODE around DETAIL (virReportError)."""
    with_detail, without = _TEXTS[code]
    if detail is None:
        return Error(code, without, domain=domain, strings=(without, None, None))
    text = with_detail % detail
    return Error(code, text, domain=domain, strings=(with_detail, detail, None))


def invalid_arg(function: str, argument: str, text: str) -> Error:
    """An argument of a public call is wrong; TEXT is the whole message (virReportInvalidArg)."""
    return Error(
        libvirt.VIR_ERR_INVALID_ARG,
        text,
        domain=libvirt.VIR_FROM_DOMAIN,
        strings=(function, argument, None),
        ints=(0, 0),
    )


def null_arg(function: str, argument: str) -> Error:
    """An argument that must be given is None (virReportInvalidNonNullArg)."""
    return invalid_arg(function, argument, f"{argument} in {function} must not be NULL")


def check_flags(function: str, flags: int, known: int) -> None:
    """Errors: VIR_ERR_INVALID_ARG for FLAGS that are not KNOWN (virCheckFlags)."""
    if unknown := flags & ~known:
        number = unknown if unknown > 0 else unknown & 0xFFFFFFFF  # libvirt's are unsigned
        text = f"unsupported flags (0x{number:x}) in function {function}"
        raise invalid_arg(function, "flags", text)


def system_error(failure: OSError, text: str) -> Error:
    """TEXT and the system's reason (virReportSystemError)."""
    reason = failure.strerror or str(failure)
    return Error(
        libvirt.VIR_ERR_SYSTEM_ERROR,
        f"{text}: {reason}",
        strings=("%s", f"{text}: {reason}", None),
        ints=(failure.errno or 0, -1),
    )
