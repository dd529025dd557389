# SPDX-License-Identifier: LGPL-2.1-or-later
"""That files of ours of which somebody made something else are told, and not waited for."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from tests import conftest, waiting
from tests.live import places, refusing
from tests.test_ending import RUNNING, having
from virtbackup import errors, runtime
from virtbackup.qemu import cleanup, domain, job, scratch, status

pytestmark = pytest.mark.timeout(30)

KINDS: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "FIFO": (os.mkfifo, "it is no file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is no file"),
    "directory": (pathlib.Path.mkdir, "Is a directory"),
}


@pytest.fixture
def file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> status.StatusFile:
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path))
    return status.StatusFile("key")


@pytest.mark.parametrize("kind", KINDS)
def test_a_status_that_is_no_file(file: status.StatusFile, kind: str) -> None:
    make, words = KINDS[kind]
    make(file.path)
    with pytest.raises(errors.Error, match=f"cannot read status '{file.path}': {words}"):
        file.load()
    assert list(status.all_in(file.path.parent)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_is_no_file(file: status.StatusFile, kind: str) -> None:
    make, words = KINDS[kind]
    path = file.path.with_suffix(".lock")
    make(path)
    with pytest.raises(errors.Error, match=f"cannot open state lock '{path}': {words}"):
        file.locked()


def test_a_lock_that_the_same_thread_holds(file: status.StatusFile) -> None:
    """It would be waited for in vain; another thread's, and one that is forgotten, is not."""
    with file.locked():
        with pytest.raises(status.Interrupted, match="in the middle of another call"):
            file.locked()
        waits = threading.Thread(target=lambda: file.locked().close())
        waits.start()
    waits.join(waiting.DEADLINE)
    assert not waits.is_alive()
    file.locked()
    file.locked().close()


def test_a_lock_that_the_same_thread_holds_by_another_connection(
    file: status.StatusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is just getting: a signal's handler may come at any point of that."""
    other = status.StatusFile("key", file.path.parent)
    is_at, met = status._is_at, []

    def interrupted(*args: Any) -> bool:
        with pytest.raises(status.Interrupted):
            other.locked()
        met.append(args)
        return is_at(*args)

    monkeypatch.setattr(status, "_is_at", interrupted)
    with file.locked(), pytest.raises(status.Interrupted):
        other.locked()
    assert len(met) == 1
    monkeypatch.undo()
    with status.StatusFile("another", file.path.parent).locked():
        other.locked().close()


def test_a_process_that_was_forked_has_no_lock(
    file: status.StatusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a program's worker would keep everybody from the domain, and a backup from its end, for
    as long as it lives: a watch has the lock for a moment again and again."""
    monkeypatch.setattr(status, "LOCK_TIMEOUT", 0.2)
    reads, writes = os.pipe()
    with file.locked(), file.owned():
        child = os.fork()
        if not child:
            os.close(writes)
            os.read(reads, 1)
            os._exit(0)
        with pytest.raises(errors.Error, match="in the middle of another call"):
            file.locked()
        assert runtime.is_held(file.path.with_suffix(".owner"))
    try:
        waiting.until(lambda: not runtime.is_held(file.path.with_suffix(".owner")))
        file.locked().close()
    finally:
        os.close(writes)
        os.close(reads)
        os.waitpid(child, 0)


def test_a_lock_that_another_thread_holds(
    file: status.StatusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the watch of our own backup: no other process is blamed for it."""
    monkeypatch.setattr(status, "LOCK_TIMEOUT", 0.0)

    def hold() -> None:
        with file.locked():
            held.set()
            let_go.wait(30)

    held, let_go = threading.Event(), threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        with pytest.raises(errors.Error, match="another process, or another call of this one,"):
            file.locked()
    finally:
        let_go.set()
        holder.join()


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "always"])
def test_a_lock_that_is_removed_meanwhile(
    file: status.StatusFile, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """What is held is what others will ask for; where that cannot be, it is asked for no longer."""
    path, acquire = file.path.with_suffix(".lock"), status._acquire
    removals = itertools.count()

    def acquire_late(*args: Any) -> None:
        acquire(*args)
        if next(removals) < times:
            path.unlink()

    monkeypatch.setattr(status, "_acquire", acquire_late)
    with file.locked() as lock:
        assert (times > 1) != (
            path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino
        )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_the_way_of_a_status(file: status.StatusFile, kind: str) -> None:
    make, words = KINDS[kind]
    file.save(RUNNING)
    file.path.with_suffix(".partial").unlink()
    make(file.path.with_suffix(".partial"))
    with pytest.raises(errors.Error, match=f"cannot write status '{file.path}': {words}"):
        file.save(having(phase="stopping"))
    assert file.load() == RUNNING


def test_a_fifo_is_no_scratch_image(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "scratch"
    os.mkfifo(path, 0o600)
    assert not scratch.is_unused_image(str(path), 1 << 20)


# --- without room ---------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path: pathlib.Path) -> Iterator[status.StatusFile]:
    """A status in a file system that has no room for anything else."""
    with places.small_file_system(tmp_path / "full", 128 << 10) as path:
        file = status.StatusFile("key", path)
        file.save(having(name="old" * 3000))
        places.fill_up(path)
        yield file


EXCHANGES = pytest.mark.parametrize("exchanges", [True, pytest.param(False, marks=refusing.needs)])
"""Whether the file system can exchange two files' names in one step."""


@EXCHANGES
def test_a_status_without_room_is_the_old_or_the_new_one(
    full: status.StatusFile, exchanges: bool
) -> None:
    """Wherever who writes it is killed, as before each call of a function of the system's."""
    old = full.load()
    assert old is not None
    new = dataclasses.replace(old, name="new" * 2900, phase="stopping")
    found, steps = [], itertools.count(1, 1 if conftest.long() else 3)
    for step in steps:
        full.save(old)
        if (child := os.fork()) == 0:
            if not exchanges:
                refusing.refuse_exchange()
            sys.setprofile(_Killing(step))
            full.save(new)
            os._exit(0)
        status_of_child = os.waitpid(child, 0)[1]
        found.append(full.load())
        assert found[-1] in (old, new), step
        if not status_of_child:
            break
    assert found[0] == old
    assert found[-1] == new
    assert len(found) > 10


_PURE = ("copy.py", "dataclasses.py", "encoder.py")


class _Killing:
    """Ends the process as the STEPth function of C begins, or ends."""

    def __init__(self, step: int) -> None:
        self._left = step

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("c_call", "c_return") and not frame.f_code.co_filename.endswith(_PURE):
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


@EXCHANGES
def test_who_reads_a_status_without_room_finds_one(
    full: status.StatusFile, exchanges: bool
) -> None:
    """At any time, and without its lock. Where names are not exchanged, what a reader has open
    takes its room yet, so that a write may be refused meanwhile."""
    old = full.load()
    assert old is not None
    new = dataclasses.replace(old, name="new" * 2900, phase="stopping")
    if (child := os.fork()) == 0:
        refused: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not exchanges:
            refusing.refuse_exchange()
            refused = contextlib.suppress(errors.Error)
        for one in [new, old] * 1000:
            with refused:
                full.save(one)
        os._exit(0)
    count = 0
    while not os.waitpid(child, os.WNOHANG)[0]:
        assert full.load() in (old, new)
        count += 1
    assert count > 20


# --- of processes that cannot be seen -------------------------------------------------------------


def test_a_process_of_a_container(file: status.StatusFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number, and when it began, are another's here; its lock is its own everywhere."""
    here = runtime.this_process()
    gone, another = here._replace(start=1), here._replace(start=2)
    with file.owned():
        assert not status.has_owner(file.path, gone)
        assert runtime.are_different(here, gone)
        monkeypatch.setattr(runtime, "namespaces", lambda: "pid:[1] time:[1]")
        assert status.has_owner(file.path, gone)
        assert runtime.is_alive(gone)
        assert not runtime.are_different(gone, runtime.this_process())
        assert runtime.are_different(gone, another)
    assert not status.has_owner(file.path, gone)
    assert not status.has_owner(file.path, gone._replace(seen_from=""))
    with runtime.private_directory() as private:
        unseen = private.rename(private.with_name(f"private-{here.pid}-1-0badcafe"))
        assert runtime.sweep() == []
    assert runtime.sweep() == [f"directory '{unseen}'"]


# --- of other versions ----------------------------------------------------------------------------


def test_a_socket_of_somebody_else_s_by_the_number_of_ours(tmp_path: pathlib.Path) -> None:
    """As file systems give a number again that was given back."""
    path = tmp_path / "nbd.sock"
    address = f'<domainbackup><address type="unix" path="{path}"/></domainbackup>'
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        inode = path.lstat().st_ino
        left = having(definition=address, server=True, socket=inode)
        assert cleanup.remove_outside(left) == []
        assert path.exists()
    assert cleanup.remove_outside(left) == [f"socket '{path}'"]
    assert not path.exists()


def test_a_socket_that_cannot_be_removed_is_left(tmp_path: pathlib.Path) -> None:
    with places.small_file_system(tmp_path / "small", 1 << 20) as place:
        path = place / "nbd.sock"
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(path))
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        address = f'<domainbackup><address type="unix" path="{path}"/></domainbackup>'
        left = having(definition=address, server=True, socket=path.lstat().st_ino)
        assert cleanup.remove_outside(left) == []


STATUSES = sorted((pathlib.Path(__file__).parent / "statusdata").glob("*.json"))
"""Written by the package as it was, about a backup in a real QEMU; the places are others."""


def test_a_file_of_somebody_else_s_by_the_number_of_our_image(tmp_path: pathlib.Path) -> None:
    """As above: what is no image of the disk's size is none of ours."""
    path = tmp_path / "scratch.qcow2"
    [disk, *_] = status.parse(STATUSES[-1].read_text()).disks

    def remove_it() -> list[str]:
        own = dataclasses.replace(disk, path=str(path), inode=path.stat().st_ino)
        return cleanup.remove_files(having(disks=(own,)))

    path.write_text("important")
    assert remove_it() == []
    with path.open("wb") as file:
        scratch.format(file.fileno(), disk.size, disk.target)
    assert remove_it() == [f"scratch image '{path}'"]


def test_an_image_of_ours_by_another_number(tmp_path: pathlib.Path) -> None:
    """As a FUSE file system may give it, once it has forgotten the file. Another backup's is not
    touched."""
    path = tmp_path / "scratch.qcow2"
    [disk, *_] = status.parse(STATUSES[-1].read_text()).disks
    own = dataclasses.replace(disk, path=str(path), inode=1)
    for mark, removed in ("x" + disk.scratch_file[1:], []), (disk.scratch_file, [str(path)]):
        with path.open("wb") as file:
            scratch.format(file.fileno(), disk.size, disk.target, mark=mark)
        assert cleanup.remove_files(having(disks=(own,))) == [
            f"scratch image '{path}'" for path in removed
        ]


@pytest.mark.parametrize("path", STATUSES, ids=lambda path: path.stem)
def test_a_status_of_an_older_version(path: pathlib.Path) -> None:
    """What was not noted then is not known, or taken so that nothing is good for it."""
    old = status.parse(path.read_text())
    told = json.loads(path.read_text())
    version = told.pop("version")
    assert str(version) == path.stem.partition("-")[0]
    now = json.loads(status.format(old))
    assert now.pop("version") == status.VERSION
    for disk, was in zip(now["disks"], told["disks"], strict=True):
        assert (disk.pop("offset"), disk.pop("backing")) == (None, None)
        guards = disk.pop("guards")
        if version == 8:
            assert disk.pop("image") == disk["node"]
            assert guards == (None if old.branch is None else [])
        else:
            assert guards == ([disk["image"]] if was.pop("guarded") else [])
    assert now.pop("qemu") == [*told.pop("qemu"), ""]
    assert now == told
    assert status.parse(status.format(old)) == old


@pytest.mark.parametrize(("version", "age"), [(7, "an older"), (status.VERSION + 1, "a newer")])
def test_a_status_that_cannot_be_read_is_told(
    version: int, age: str, file: status.StatusFile
) -> None:
    """It is not as if there was no backup."""
    text = {"version": version, "id": "0badcafe", "news": []}
    file.path.write_text(json.dumps(text))
    assert file.load() is None
    words = f"backup 0badcafe was begun by {age} version of virtbackup, .* of version {version},"
    assert re.match(words, str(file.of_other_version()))
    own = job.BackupJob(file, _no_monitor)
    for ask in (own.stop, own.info, own.definition):
        with pytest.raises(errors.Error, match=f"{words}.* or have backup-cleanup end it"):
            ask()


def _no_monitor() -> contextlib.AbstractContextManager[domain.Session]:
    raise AssertionError("nobody is to be asked")


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"version": "9"}', '{"version": true, "id": ""}', "[" * 100_000,
     status.format(having(qemu=runtime.Process(7, 7))).replace("[7, 7,", "[1e999, 7,"),
     status.format(having(definition="<domainbackup><disk/></domainbackup>"))],
    ids=["empty", "nothing", "text", "yes", "deep", "endless", "document"],
)  # fmt: skip
def test_what_is_no_status_is_of_no_version(text: str, file: status.StatusFile) -> None:
    file.path.write_text(text)
    assert (file.load(), file.of_other_version()) == (None, None)
    assert list(status.all_in(file.path.parent)) == []
