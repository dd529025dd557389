# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test driver: ``test:///default`` (libvirt's test_driver.c, with a monitor behind it).

No hypervisor: a fake QEMU, made from a recording, listens in this process, and the QEMU driver
speaks to it as to any other. All connections of a process to one URI share a fake, which goes with
the last of them, and its backup with it.
"""

import atexit
import contextlib
import dataclasses
import os
import pathlib
import re
import sys
import threading
import urllib.parse
import weakref
from collections.abc import Callable
from typing import TypeVar

import libvirt

from virtbackup import errors, hypervisor, runtime
from virtbackup.qemu import capabilities, cleanup, driver, recording, status
from virtbackup.test import fake_server, faults

_T = TypeVar("_T")

RECORDINGS = pathlib.Path(__file__).parents[1] / "recordings"
DEFAULT = "qemu-*.jsonl"
"""What ``test:///default`` is made from: the newest of these."""
RECORDING = "recording.jsonl"
FAULTS = "faults.json"
MAX_FILE = 64 << 20
"""Characters of either."""

_SHAPE = (
    "expected test:///default, test:///NAME of a shipped recording or test:///absolute/directory,"
    " with [?engine=classic|hybrid]"
)


@dataclasses.dataclass(frozen=True)
class Script:
    """What a fake QEMU is made from."""

    recorded: recording.Recording
    rules: tuple[faults.Rule, ...] = ()


def parse_uri(uri: str) -> tuple[str, capabilities.Engine | None]:
    """(path, engine asked for). Errors: VIR_ERR_INVALID_ARG for another shape of URI."""
    parts = urllib.parse.urlsplit(uri)
    pairs = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    twice = len(options) < len(pairs)
    engine = options.pop("engine", None)
    path = urllib.parse.unquote(parts.path, errors="surrogateescape")
    engines: tuple[capabilities.Engine | None, ...] = (None, "classic", "hybrid")
    bad = bool(parts.netloc or parts.fragment or options or twice)
    bad = bad or not path.strip("/") or "\0" in path
    if bad or engine not in engines:
        raise errors.invalid_arg("virConnectOpen", "uri", f"'{uri}': {_SHAPE}")
    return path, engine


@hypervisor.checked_by(parse_uri)
def open(uri: str, readonly: bool) -> "TestDriver":
    """Serve ``test:///default``, ``test:///NAME``, ``test:///absolute/directory``, each with
    ``[?engine=classic|hybrid]``.

    Errors: those of ``parse_uri``, VIR_ERR_SYSTEM_ERROR for files that cannot be read,
    VIR_ERR_CONFIG_UNSUPPORTED for what they hold, by file and line.
    """
    path, engine = parse_uri(uri)
    return TestDriver(_share(path), engine)


def load(path: pathlib.Path, faults_path: pathlib.Path | None = None) -> Script:
    """A recording, and the faults to be had with it. Errors: as ``open``."""
    recorded = _read(path, recording.parse)
    return Script(recorded, () if faults_path is None else _read(faults_path, faults.parse))


def _load_of(path: str) -> Script:
    """What the path of a URI means."""
    name = path.strip("/")
    if name == "default":
        return load(max(RECORDINGS.glob(DEFAULT), key=_version_in))
    shipped = RECORDINGS / f"{name}.jsonl"
    if "/" not in name and shipped.is_file():
        return load(shipped)
    directory = pathlib.Path(path)
    try:
        found = sorted(file.name for file in directory.iterdir() if file.suffix == ".jsonl")
    except OSError as failure:
        raise errors.system_error(failure, f"cannot read directory '{path}'") from failure
    if RECORDING in found:
        found = [RECORDING]
    if len(found) != 1:
        many = "more than one recording, and none is" if found else "no recording, as"
        raise errors.error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED, f"directory '{path}' has {many} '{RECORDING}'"
        )
    rules = directory / FAULTS
    return load(directory / found[0], rules if os.path.lexists(rules) else None)


def _version_in(path: pathlib.Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", path.stem)))


def _read(path: pathlib.Path, parse: Callable[[str], _T]) -> _T:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_FILE + 1)
        if len(text) > MAX_FILE:
            raise ValueError(f"it has more than {MAX_FILE} characters")
        return parse(text)
    except OSError as failure:
        raise errors.system_error(failure, f"cannot read '{path}'") from failure
    except ValueError as failure:
        raise _unusable(str(path), failure) from failure


def _unusable(what: str, failure: ValueError) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, f"'{what}': {failure}")


# --- fakes that are shared ---


class Shared:
    """A fake QEMU, and how many connections it has."""

    def __init__(self, path: str) -> None:
        self.path = path
        script = _load_of(path)
        with contextlib.ExitStack() as stack:
            try:
                self.directory = stack.enter_context(runtime.private_directory())
                self.socket = self.directory / "qmp.sock"
                server = fake_server.Server(self.socket, script.recorded, script.rules)
                stack.enter_context(server)
            except OSError as failure:
                text = f"cannot listen for the monitor in '{runtime.directory()}'"
                raise errors.system_error(failure, text) from failure
            except ValueError as failure:
                raise _unusable(path, failure) from failure
            self._stack = stack.pop_all()
        self.users = 0

    def status_file(self) -> status.StatusFile:
        """Where its backup's status is."""
        return status.StatusFile(str(self.socket), self.directory)

    def close(self) -> None:
        """End the fake, and remove what it left in the file system."""
        self._stack.close()


# Reentrant: where garbage is collected in the middle, a driver may be closed that nobody knows.
_lock = threading.RLock()
_shared: dict[tuple[int, str], Shared] = {}
"""(process, path of a URI) -> its fake: a forked process has no threads of its parent's."""


def _share(path: str) -> Shared:
    """The fake at a PATH, made if need be; ``_release`` gives it back."""
    with _lock:
        key = os.getpid(), path
        while True:
            if (shared := _shared.get(key)) is None:
                shared = _shared[key] = Shared(path)
            shared.users += 1
            if _shared.get(key) is shared:  # else it was closed just then
                return shared


def _release(shared: Shared) -> bool:
    """Whether that was the last connection; the fake is the caller's to close then."""
    with _lock:
        shared.users -= 1
        if shared.users:
            return False
        for key in [key for key, other in _shared.items() if other is shared]:
            del _shared[key]
        return True


_open: "weakref.WeakSet[TestDriver]" = weakref.WeakSet()
"""Those that nobody has closed."""


def _close_all() -> None:
    """At the end of the process."""
    for left in list(_open):
        left.close()


atexit.register(_close_all)


class TestDriver(driver.QmpDriver):
    """The QEMU driver on a fake QEMU."""

    __test__ = False
    """Not for pytest, whatever it is called."""

    def __init__(self, shared: Shared, engine: capabilities.Engine | None) -> None:
        self._shared: Shared | None = shared
        # What is known of a backup goes with the fake, and is in nobody's way until then.
        file = shared.status_file()
        try:
            super().__init__(str(shared.socket), engine, file, place=shared.path)
        except BaseException:
            self._let_go()
            raise
        _open.add(self)

    def __del__(self) -> None:
        if "_shared" in vars(self) and not sys.is_finalizing():
            self.close()

    def close(self) -> None:
        super().close()
        if os.getpid() == self._pid:
            self._let_go()

    def _let_go(self) -> None:
        _open.discard(self)
        shared, self._shared = self._shared, None
        if shared is None or not _release(shared):
            return
        left = None
        with contextlib.suppress(errors.Error):
            left = shared.status_file().load()
        shared.close()
        if left is not None:
            cleanup.remove_outside(left)  # a scratch image may have a name


_: Callable[[str, bool], hypervisor.BackupDriver] = open
"""mypy's proof that the driver has every hook."""
