# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a file system answers, and whether a process waits for a file."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

from tests import waiting
from tests.live import places
from virtbackup.qemu import hang


@contextlib.contextmanager
def reader_of(fifo: pathlib.Path) -> Iterator[int]:
    """A process that waits in read(2) of FIFO, by pid."""
    os.mkfifo(fifo)
    code = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); print(flush=True); os.read(fd, 1)"
    argv = [sys.executable, "-c", code, str(fifo)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def image(path: pathlib.Path, inode: int | None = None) -> hang.Image:
    return hang.Image(str(path), inode)


def test_a_file_system_that_answers_and_one_that_is_not_there(tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    images = {"a": image(tmp_path), "b": image(tmp_path / "none")}
    assert hang.hanging(images, os.getpid(), 60) == set()
    assert time.monotonic() - start < 30


def test_a_process_that_waits_for_a_file_whatever_its_name(tmp_path: pathlib.Path) -> None:
    fifo = tmp_path / "fifo"
    with reader_of(fifo) as pid:
        images = {"it": image(tmp_path, fifo.stat().st_ino), "other": image(tmp_path, 1)}
        fifo.unlink()
        while hang.hanging(images, pid, 0.05) != {"it"}:
            pass  # it has not come to read yet; the test's own time limit applies
        assert hang.hanging({"other": images["other"]}, pid, 60) == set()


def test_what_an_image_takes(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        os.fsync(file.fileno())
        images = {"it": image(tmp_path, os.fstat(file.fileno()).st_ino), "no": image(tmp_path)}
        assert hang.used(images, os.getpid()) == {"it": os.fstat(file.fileno()).st_blocks * 512}
        assert hang.used(images, None) == {}


def test_images_of_one_number_on_several_file_systems(tmp_path: pathlib.Path) -> None:
    """As of the first file that is made on each; the guest's own disk may have it, too."""
    with contextlib.ExitStack() as undo:
        images, sizes = {}, {"a": 1 << 16, "guest": 1 << 18, "b": 1 << 17}
        for name, size in sizes.items():
            place = undo.enter_context(places.small_file_system(tmp_path / name, 1 << 20))
            file = undo.enter_context((place / "file").open("wb"))
            file.write(bytes(size))
            file.flush()
            images[name] = image(place, (place / "file").stat().st_ino)
        assert len({one.inode for one in images.values()}) == 1
        del images["guest"], sizes["guest"]
        assert hang.used(images, os.getpid()) == sizes
        (tmp_path / "a" / "file").unlink()
        waits = tmp_path / "a" / "fifo"
        with reader_of(waits) as pid:
            for name in images:
                images[name] = image(tmp_path / name, waits.stat().st_ino)
            while hang.hanging(images, pid, 0.05) != {"a"}:
                pass  # as above


def test_a_question_that_nobody_waits_for_leaves_no_process(tmp_path: pathlib.Path) -> None:
    with hang.Question([str(tmp_path)]) as question:
        assert question.unanswered([str(tmp_path)], time.monotonic() + 30) == set()
    with hang.Question([str(tmp_path)]):
        pass
    end = time.monotonic() + 30
    with hang.Question([str(tmp_path)]) as again:
        assert again.unanswered([str(tmp_path)], end) == set()


def test_another_process_closes_last(tmp_path: pathlib.Path) -> None:
    """As long as it is needed; then there is no such process any more."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        path.unlink()
        fd = os.dup(file.fileno())
        name = str(pathlib.Path(f"/proc/self/fd/{fd}").readlink())
        with hang.closed_by_another(os.getpid(), [os.fstat(fd).st_ino]):
            # Linux may leave out some of the children, where another one ends as they are listed.
            waiting.until(lambda: name in files_of_children())
        with hang.closed_by_another(os.getpid(), []):
            assert name not in files_of_children()
        os.close(fd)
    assert name not in files_of_children()


def files_of_children() -> set[str]:
    """The nameless files of our children, as far as these do not end just then."""
    found = set()
    children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            for entry in pathlib.Path(f"/proc/{child}/fd").iterdir():
                if (name := str(entry.readlink())).endswith("(deleted)"):
                    found.add(name)
    return found
