# SPDX-License-Identifier: LGPL-2.1-or-later
"""What QEMUs can do, kept for the next process that asks (virQEMUCapsCache).

For its schema alone QEMU's main loop, and the guest with it, is busy for ten milliseconds, and so
are we to read it; for every process of the same program, the answer is the same. So there is a file
for a program, in the user's state directory, called by a hash of all by which another one could be
told from it. A file that is not whole is no file: QEMU is asked.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re

from virtbackup import runtime
from virtbackup.qemu import capabilities, qmp

_SUFFIX = ".capabilities"
_KEPT = 8
"""Files, which an update of QEMU leaves behind: the newest stay."""
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")
_ASKED = hashlib.sha256(repr(sorted(capabilities.FEATURES.items())).encode()).hexdigest()
"""What is looked up in a schema: by the next version of ours it may be more."""
_CHANGING = re.compile(rb"--?(compat|readconfig)(=|$)")
"""Options that may hide a part of the schema (qapi/compat.json)."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The file that runs in a process, and how."""

    boot: str
    device: int
    inode: int
    size: int
    modified: int
    """The last change of its content, in nanoseconds."""
    changed: int
    """The last change of the file, which nobody can set."""
    options: str
    """A hash of the command line, which may have secrets, if it may make a difference."""


def program_of(process: runtime.Process | None) -> Program | None:
    """What runs in PROCESS now, and for as long as its monitor's connection does; None of one that
    is not seen to be QEMU: another one may stand behind it tomorrow."""
    if process is None or runtime.name_of_qemu(process[0]) is None:
        return None
    proc = pathlib.Path(f"/proc/{process[0]}")
    try:
        words = (proc / "cmdline").read_bytes()
        found = (proc / "exe").stat()
        boot = _BOOT.read_text().strip()
    except OSError:
        return None
    is_other = any(map(_CHANGING.match, words.split(b"\0")))
    return Program(
        boot=boot, device=found.st_dev, inode=found.st_ino, size=found.st_size,
        modified=found.st_mtime_ns, changed=found.st_ctime_ns,
        options=hashlib.sha256(words).hexdigest() if is_other else "",
    )  # fmt: skip


def load(program: Program, greeting: qmp.Greeting) -> capabilities.Capabilities | None:
    """What a QEMU that greets so can do, being PROGRAM; None where it has to be asked."""
    try:
        said = json.loads(runtime.read_file(_path(program, greeting)))
        commands, features = said["commands"], said["features"]
        if not all(isinstance(name, str) for name in (*commands, *features)):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return capabilities.Capabilities(
        greeting.version, greeting.package, frozenset(commands), frozenset(features)
    )


def store(program: Program, greeting: qmp.Greeting, known: capabilities.Capabilities) -> None:
    """Keep what is KNOWN of PROGRAM in the state directory, if there is one; of much that is kept,
    the oldest is removed."""
    said = {"commands": sorted(known.commands), "features": sorted(known.features)}
    path = _path(program, greeting)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # whatever it is
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(said))
        partial.replace(path)
        _forget_the_oldest(path.parent)
    except OSError:  # the next one asks again
        with contextlib.suppress(OSError):  # nor can anything be removed from what is only read
            partial.unlink()


def _path(program: Program, greeting: qmp.Greeting) -> pathlib.Path:
    of = repr((_ASKED, program, greeting.version, greeting.package))
    return runtime.directory() / f"qemu-{hashlib.sha256(of.encode()).hexdigest()}{_SUFFIX}"


def _forget_the_oldest(directory: pathlib.Path) -> None:
    kept = sorted(directory.glob(f"qemu-*{_SUFFIX}"), key=lambda path: path.lstat().st_mtime_ns)
    for path in kept[:-_KEPT]:
        path.unlink(missing_ok=True)
