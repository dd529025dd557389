# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether what a directory holds is what was backed up: every file is read again.

Each file of a chain has checksums of its own in its manifest, an increment of what it holds and
nothing behind it. So every file is read once, whatever the number of points, and what is wrong has
a file's name; a point is good when all its files are, and their backing files are those told. A
file that has all of the disk, and something wrong beside it, is told apart: it can be restored.

The checksums cover every byte of a file. It is read as it lies there; QEMU reads what is
compressed, what is not as it was beside the disk, and what is of an older virtbackup, which did not
tell of all the bytes, and looks through the tables of every image.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterable, Sequence

import libvirt

from virtbackup import errors
from virtbackup.nbd import checksum, connection, copy, filename, image, qcow2
from virtbackup.tools import listing, manifest

FILES_AT_ONCE = 4
"""Read at the same time, at most, and no more than there are processors: each takes a buffer,
a qemu-img, and where QEMU has to read it a qemu-nbd and the buffers of a copy."""


_DAMAGED = (2, 3)
"""How qemu-img check ends where the tables are wrong, or clusters are lost: all else is an error of
its own."""
_CANNOT_LOOK = "qemu-img cannot look through its tables"
_LOOK = 0.1
"""Seconds after which it is seen whether that is still wanted."""


@dataclasses.dataclass(frozen=True)
class Look:
    """What became of a look at a file."""

    problem: str | None
    """None: nothing is wrong with it."""
    read: int
    """Bytes."""
    restorable: bool
    """Whether QEMU reads all of the disk from it, whatever is wrong beside that."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a look at a directory."""

    backups: listing.Backups
    """What it holds."""
    files: tuple[listing.Link, ...]
    """Those that were looked at."""
    problems: tuple[listing.Problem, ...]
    bad_points: tuple[listing.Point, ...]
    """Those that cannot be restored as they were."""
    read: int
    """Bytes."""

    @property
    def in_part(self) -> tuple[listing.Link, ...]:
        """Those of which the manifest tells only what a guest reads."""
        return tuple(link for link in self.files if _is_told_in_part(link.disk))

    @property
    def good(self) -> bool:
        return not self.problems


def verify(
    backups: listing.Backups,
    point: listing.Point | None = None,
    *,
    progress: copy.Progress | None = None,
    cancel: copy.Cancel | None = None,
) -> Verdict:
    """Read again all that POINT is made of, all there is for None.

    Where a prune has changed meanwhile what is read, what seems to be wrong is looked at again.

    Errors: VIR_ERR_OPERATION_ABORTED when cancelled, VIR_ERR_SYSTEM_ERROR where QEMU's programs are
    not installed, unless all is raw; VIR_ERR_INVALID_ARG where POINT was pruned meanwhile. What is
    wrong with files is no error but in the verdict.
    """
    good: dict[listing.Link, Look] = {}
    while True:
        points = backups.points if point is None else (point,)
        verdict = _verify(backups, points, point is None, good, progress, cancel)
        if verdict.good or (now := backups.overtaken(points)) is None:
            return verdict
        backups, point = now, None if point is None else now.find(point.label)


def _verify(
    backups: listing.Backups,
    points: Sequence[listing.Point],
    is_all: bool,
    good: dict[listing.Link, Look],
    progress: copy.Progress | None,
    cancel: copy.Cancel | None,
) -> Verdict:
    """The same of POINTS. GOOD are looks at files that are not to be read once more; it grows."""
    problems: list[listing.Problem] = []
    bad_points: list[listing.Point] = []
    files: dict[str, listing.Link] = {}
    users: dict[str, list[listing.Point]] = {}
    for one in points:
        for disk in one.made.disks:
            try:
                links = backups.links(one, disk.name)
            except errors.Error as failure:
                links = (backups.link(one, disk),)
                problems.append(_problem(links[0], reason(failure)))
                bad_points.append(one)
            for link in links:
                files.setdefault(link.disk.file, link)
                users.setdefault(link.disk.file, []).append(one)
    if any(link.disk.format != "raw" for link in files.values()):
        need("qemu-nbd", "qemu-img")
    manifests = {link.point.file for link in files.values()} | {one.file for one in points}
    problems[:0] = [one for one in backups.problems if is_all or one.file in manifests]
    unread = [link for link in files.values() if link not in good]
    looks = good | dict(zip(unread, _read_all(unread, progress, cancel), strict=True))
    good.update({link: look for link, look in looks.items() if look.problem is None})
    for link in files.values():
        look = looks[link]
        if look.problem is not None:
            problems.append(_problem(link, look.problem))
        if not look.restorable:
            bad_points += users[link.disk.file]
    return Verdict(
        backups,
        tuple(files.values()),
        tuple(problems),
        tuple(one for one in points if one in bad_points),
        sum(look.read for look in looks.values()),
    )


def _problem(link: listing.Link, text: str) -> listing.Problem:
    return listing.Problem(link.file, text, link.disk.name, link.point.label)


def _read_all(
    links: Sequence[listing.Link], progress: copy.Progress | None, cancel: copy.Cancel | None
) -> list[Look]:
    """At each of LINKS."""
    workers = max(1, min(FILES_AT_ONCE, os.cpu_count() or 1, len(links)))
    own = cancel or copy.Cancel()
    try:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            reading = [
                pool.submit(examine, link, index, progress, own) for index, link in enumerate(links)
            ]
            try:
                return [future.result() for future in reading]
            except BaseException:
                own.set()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        if cancel is None:
            own.close()


def examine(
    link: listing.Link,
    index: int = 0,
    progress: copy.Progress | None = None,
    cancel: copy.Cancel | None = None,
) -> Look:
    """At a file, all of it.

    INDEX is the file's for PROGRESS. Errors: VIR_ERR_OPERATION_ABORTED when cancelled.
    """
    if cancel is not None:
        cancel.check()
    if problem := listing.problem(link) or unknown_checksum(link.disk):
        return Look(problem, 0, False)
    try:
        return _examine(link, index, progress, cancel)
    except OSError as failure:
        return Look(f"it cannot be read: {failure.strerror}", 0, False)
    except MemoryError:
        return Look(f"it cannot be read: {os.strerror(errno.ENOMEM)}", 0, False)
    except errors.Error as failure:
        return Look(_reason_unless_cancelled(failure), 0, False)


def checked(
    links: Sequence[listing.Link],
    progress: copy.Progress | None = None,
    cancel: copy.Cancel | None = None,
) -> tuple[listing.Link, ...]:
    """LINKS, the files of a disk, for what gives their content away unchecked.

    What is elsewhere is read before that, for a manifest may name any device of this machine, or
    one that has something else by now; it is called by the name that no link of another user's
    leads to. Errors: VIR_ERR_OPERATION_FAILED where it has not what was backed up, those of
    ``examine``.
    """
    sure = []
    for index, link in enumerate(links):
        if link.is_elsewhere:
            link = dataclasses.replace(link, path=pathlib.Path(os.path.realpath(link.path)))
            look = examine(link, index, progress, cancel)
            if not look.restorable:
                raise listing.not_good(link, str(look.problem))
        sure.append(link)
    return tuple(sure)


def _examine(
    link: listing.Link, index: int, progress: copy.Progress | None, cancel: copy.Cancel | None
) -> Look:
    """The same. Errors: of the programs and the files."""
    disk, read = link.disk, 0
    content: image.Content | None = None
    beside: str | None = None
    if disk.format == "raw":
        with image.File(link.path) as file:
            content = image.read_raw(file, disk.size, progress=progress, index=index, cancel=cancel)
    elif disk.tables is not None:
        with image.File(link.path) as file:
            try:
                opened = image.Qcow2(file, disk.size)
                tables = opened.read_tables(cancel)
                read = tables.read
                beside = _other_tables(tables.checksum, disk.tables.value)
                if beside is None and not opened.has_compressed:
                    content = opened.read(
                        disk.backing is not None, progress=progress, index=index, cancel=cancel
                    )
            except image.Damaged as failure:
                beside = f"its tables are damaged: {failure}"
    if content is None:
        try:
            content = _read_by_qemu(link, index, progress, cancel)
        except errors.Error as failure:
            text = _reason_unless_cancelled(failure)
            return Look(_joined(beside, text), read, False)
    read += content.read
    if content.checksum != disk.checksum.value:
        return Look(_joined(beside, differs(content.checksum, disk)), read, False)
    if beside := beside or _bad_tables(link, cancel):
        beside = _joined(beside, "all that it has of the disk is as it was backed up")
    return Look(beside, read, True)


def _joined(first: str | None, second: str) -> str:
    return second if first is None else f"{first}; {second}"


def _reason_unless_cancelled(failure: errors.Error) -> str:
    if failure.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED:
        raise failure
    return reason(failure)


def _other_tables(found: str, told: str) -> str | None:
    if found == told:
        return None
    return (
        "it is not what was backed up: beside the disk's own bytes its checksum is"
        f" {found}, not {told}"
    )


def _read_by_qemu(
    link: listing.Link, index: int, progress: copy.Progress | None, cancel: copy.Cancel | None
) -> image.Content:
    told = None if progress is None else _As(progress, index)
    [result] = copy.copy([job(link)], progress=told, cancel=cancel)
    return image.Content(result.checksum, result.read)


def _is_told_in_part(disk: manifest.Disk) -> bool:
    return disk.format == "qcow2" and disk.tables is None


class _As:
    """Progress of the one job of a copy that is the INDEX-th to others."""

    def __init__(self, progress: copy.Progress, index: int) -> None:
        self._progress = progress
        self._index = index

    def start(self, index: int, size: int) -> None:
        """The file was opened and has SIZE bytes."""
        self._progress.start(self._index, size)

    def advance(self, index: int, count: int) -> None:
        """COUNT more bytes are done."""
        self._progress.advance(self._index, count)


def job(link: listing.Link) -> copy.Job:
    """Reads all of one file, and of nothing behind it, by QEMU."""
    options = () if link.disk.backing is None else ("-A",)
    export = connection.Export(
        connection.Program(
            ("qemu-nbd", "--read-only", *options, f"json:{json.dumps(node(link))}"),
            f"image {link.path}",
        ),
        "",
    )
    dirty = None if link.disk.backing is None else copy.HELD
    return copy.Job(export, None, size=link.disk.size, dirty=dirty)


def node(link: listing.Link) -> dict[str, object]:
    """A file as QEMU's block layer opens it, alone."""
    made: dict[str, object] = {"driver": link.disk.format, "file": file_node(link)}
    if link.disk.format == "qcow2":
        made["backing"] = None
    if link.disk.type == "block":
        made["size"] = qcow2.virtual_size(link.disk.size)  # QEMU's are whole sectors, too
    return made


def file_node(link: listing.Link) -> dict[str, object]:
    driver = "host_device" if link.disk.type == "block" else "file"
    return {"driver": driver, "filename": filename.told(link.path)}


def unknown_checksum(disk: manifest.Disk) -> str | None:
    """Why nothing can be checked by what the manifest has as DISK's checksum."""
    expected = checksum.ALGORITHM if disk.backing is None else checksum.INCREMENT
    for one, known in ((disk.checksum, expected), (disk.tables, checksum.TABLES)):
        if one is not None and (one.algorithm, one.block) != (known, checksum.BLOCK):
            return f"a checksum '{one.algorithm}' is unknown"
    return None


def differs(found: str, disk: manifest.Disk) -> str:
    return f"it is not what was backed up: its checksum is {found}, not {disk.checksum.value}"


def need(*programs: str) -> None:
    """Raise VIR_ERR_SYSTEM_ERROR for the first of PROGRAMS that is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            raise errors.system_error(missing, f"cannot run {program}")


def reason(failure: errors.Error) -> str:
    """What was said, without libvirt's words in front of it."""
    return str(failure.get_str2() or failure)


def _bad_tables(link: listing.Link, cancel: copy.Cancel | None) -> str | None:
    """What QEMU finds wrong with a qcow2 image that is read right all the same. Errors:
    VIR_ERR_OPERATION_ABORTED when cancelled."""
    if link.disk.format != "qcow2":
        return None
    argv = ["qemu-img", "check", "-q", "-U", "--output=json", f"json:{json.dumps(node(link))}"]
    try:
        done = _run(argv, cancel)
    except OSError as failure:
        return f"{_CANNOT_LOOK}: {failure.strerror}"
    if done.returncode == 0:
        return None
    said = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode in _DAMAGED:
        return f"its tables are damaged{f': {said[0]}' if said else _counts(done.stdout)}"
    why = said[-1].removeprefix("qemu-img: ") if said else f"it ended with status {done.returncode}"
    return f"{_CANNOT_LOOK}: {why}"


def _run(argv: Sequence[str], cancel: copy.Cancel | None) -> "subprocess.CompletedProcess[bytes]":
    """As ``subprocess.run``, of a program that may take minutes. Errors: OSError;
    VIR_ERR_OPERATION_ABORTED when cancelled."""
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as program:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    told = program.communicate(timeout=_LOOK)
                    return subprocess.CompletedProcess(argv, program.returncode, *told)
                if cancel is not None:
                    cancel.check()
        except BaseException:
            program.kill()
            raise


def _counts(output: bytes) -> str:
    try:
        told: dict[str, object] = json.loads(output)
    except ValueError:
        return ""
    kinds: Iterable[str] = ("corruptions", "leaks")
    counts = [f"{told[kind]} {kind}" for kind in kinds if told.get(kind)]
    return f": {', '.join(counts)}" if counts else ""
