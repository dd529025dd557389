# SPDX-License-Identifier: LGPL-2.1-or-later
"""That files of ours of which somebody made something else are told, and not waited for."""

import os
import pathlib
from collections.abc import Callable

import pytest

from tests.test_ending import RUNNING, having
from virtbackup import errors
from virtbackup.qemu import scratch, status

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


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_what_is_in_the_way_of_a_status(file: status.StatusFile, kind: str) -> None:
    make, _ = KINDS[kind]
    make(file.path.with_suffix(".partial"))
    make(file.path)
    file.save(RUNNING)
    assert file.load() == RUNNING
    assert file.path.is_file()
    assert not file.path.is_symlink()
    assert file.path.stat().st_mode & 0o777 == 0o600
    file.save(having(phase="stopping"))
    assert file.load() == having(phase="stopping")


def test_a_fifo_is_no_scratch_image(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "scratch"
    os.mkfifo(path, 0o600)
    assert not scratch.is_unused_image(str(path), 1 << 20)
