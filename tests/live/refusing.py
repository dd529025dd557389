# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process whose kernel refuses what some file systems do, as NFS does: seccomp(2)."""

import ctypes
import errno
import platform
import struct

import pytest

_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}
_EXCHANGE = 2
_NUMBER_AT, _FLAGS_AT = 0, 16 + 4 * 8
"""Of struct seccomp_data: the system call, and the lower half of its fifth argument."""
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse_exchange() -> None:
    """From now on, renameat2(2) with RENAME_EXCHANGE gives this process and its children EINVAL."""
    steps = (
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_IF_EQUAL, 0, 3, _RENAMEAT2[platform.machine()]),
        (_LOAD, 0, 0, _FLAGS_AT),
        (_JUMP_IF_EQUAL, 0, 1, _EXCHANGE),
        (_RETURN, 0, 0, _ERRNO | errno.EINVAL),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    program = _Program(len(steps), code)
    assert _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert _LIBC.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(program)) == 0


needs = pytest.mark.skipif(
    platform.machine() not in _RENAMEAT2, reason="whose system calls have other numbers"
)
