# SPDX-License-Identifier: LGPL-2.1-or-later
"""What running QEMUs can do, kept for the next process that asks (virQEMUCapsCache).

For its schema alone QEMU's main loop, and the guest with it, is busy for ten milliseconds, and so
are we to read it; for as long as the same program runs in the same process, the answer is the same.
So there is a file for a process, in the user's state directory, that names all by which another
could be told from it. A file that is not right in every detail is no file: QEMU is asked.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

from virtbackup import runtime
from virtbackup.qemu import capabilities, nbdserver, qmp

_NAME = re.compile(r"qemu-(\d+)-(\d+)\.capabilities")
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")
_ASKED = hashlib.sha256(repr(sorted(capabilities.FEATURES.items())).encode()).hexdigest()
"""What is looked up in a schema: by the next version of ours it may be more."""


@dataclasses.dataclass(frozen=True)
class _Program:
    """What runs in a process: another one comes with another boot, or by exec(2)."""

    boot: str
    process: runtime.Process
    device: int
    inode: int
    changed: int
    """Its file's last change, in nanoseconds."""


def load(
    process: runtime.Process | None, greeting: qmp.Greeting
) -> capabilities.Capabilities | None:
    """What the QEMU that greets so, in PROCESS, can do; None where it has to be asked."""
    program = _program(process)
    if program is None:
        return None
    try:
        said = json.loads(runtime.read_file(_path(program.process)))
        if said.pop("of") != _of(program, greeting):
            return None
        commands, features = said["commands"], said["features"]
        if not all(isinstance(name, str) for name in (*commands, *features)):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return capabilities.Capabilities(
        greeting.version, greeting.package, frozenset(commands), frozenset(features)
    )


def store(
    process: runtime.Process | None, greeting: qmp.Greeting, known: capabilities.Capabilities
) -> None:
    """Keep what is KNOWN of the QEMU in PROCESS, if that can be told from others, in the state
    directory, if there is one; what was kept of processes that are gone is removed."""
    program = _program(process)
    if program is None:
        return
    said = {
        "of": _of(program, greeting),
        "commands": sorted(known.commands),
        "features": sorted(known.features),
    }
    path = _path(program.process)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        _forget_the_dead(path.parent)
        partial.unlink(missing_ok=True)  # whatever it is
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(said))
        partial.replace(path)
    except OSError:  # the next one asks again
        with contextlib.suppress(OSError):  # nor can anything be removed from what is only read
            partial.unlink()


def _program(process: runtime.Process | None) -> _Program | None:
    """None of a process that is not seen to be QEMU: another one may stand behind it tomorrow."""
    if process is None or not nbdserver.is_qemu(process[0]):
        return None
    try:
        found = pathlib.Path(f"/proc/{process[0]}/exe").stat()
        boot = _BOOT.read_text().strip()
    except OSError:
        return None
    return _Program(boot, process, found.st_dev, found.st_ino, found.st_mtime_ns)


def _of(program: _Program, greeting: qmp.Greeting) -> dict[str, Any]:
    """As JSON gives it back."""
    said = {"asked": _ASKED, "version": greeting.version, "package": greeting.package}
    as_json: dict[str, Any] = json.loads(json.dumps({**dataclasses.asdict(program), **said}))
    return as_json


def _path(process: runtime.Process) -> pathlib.Path:
    pid, start = process
    return runtime.directory() / f"qemu-{pid}-{start}.capabilities"


def _forget_the_dead(directory: pathlib.Path) -> None:
    for path in directory.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and not runtime.is_alive((int(match[1]), int(match[2]))):
            path.unlink(missing_ok=True)
