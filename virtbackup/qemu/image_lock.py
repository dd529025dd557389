# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a QEMU that goes on having an image open keeps every other QEMU from writing to it.

QEMU locks what it writes to, byte by byte (file-posix). That keeps those of this host out where the
file system locks; those of another host have to be kept out by the file not being there.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterable

_LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "f2fs", "zfs", "bcachefs", "tmpfs", "overlay"))
"""File systems that only one host has, unless it serves them to others itself."""
_MOUNT = re.compile(r"^mnt_id:\s*(\d+)$", re.MULTILINE)
_LOCK = re.compile(r"^lock:\s.*\bOFDLCK\b", re.MULTILINE)


def is_kept(pid: int, filename: str) -> bool:
    """Whether process PID has FILENAME open, a file that is on no other host, and itself keeps
    others from writing to it. Not where that cannot be seen. The file's own file system, which may
    hang, is asked nothing."""
    try:
        mounts = pathlib.Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
        local = local_mounts(mounts.splitlines())
        for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if str(entry.readlink()) == filename and _is_kept_by(
                    pathlib.Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text(), local
                ):
                    return True
    except OSError:
        return False
    return False


def local_mounts(mountinfo: Iterable[str]) -> set[str]:
    """The mounts, by their ids, of file systems that only one host has (proc(5))."""
    found = set()
    for line in mountinfo:
        mount, _, kind = line.partition(" - ")
        if kind.split(" ")[0] in _LOCAL:
            found.add(mount.split(" ")[0])
    return found


def _is_kept_by(fdinfo: str, local: set[str]) -> bool:
    """Whether a descriptor is of a file in one of the mounts LOCAL, with a lock as QEMU has it: of
    the open file, not of the process."""
    mount = _MOUNT.search(fdinfo)
    return mount is not None and mount[1] in local and _LOCK.search(fdinfo) is not None
