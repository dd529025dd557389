# SPDX-License-Identifier: LGPL-2.1-or-later
"""What backups a directory holds, whoever made them: its points, their files, what is unfinished.

Nothing here needs a guest or changes anything. A point is one backup, of all its disks; the files
that a disk of it is made of, the newest first, are its links. What a broken directory has is told
as problems beside the points that are still there.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

import libvirt

from virtbackup import errors
from virtbackup.tools import chain, manifest

JOURNAL = "prune.json"
"""What a prune is about to remove."""

_UNFINISHED = {
    chain.PARTIAL: "of a backup that was not finished",
    chain.MERGED: "of a prune cut off",
}
_UNDER_WAY = "of a pull or a prune that runs"
_MOST_TOLD = 10
_MOST_READS = 10
"""Of a directory that changes meanwhile."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One backup."""

    file: str
    """Its manifest's name."""
    made: manifest.Manifest

    @property
    def label(self) -> str:
        """What people call it: its number, of a backup without a branch its time."""
        number = self.made.number
        return self.time if number is None else str(number)

    @property
    def time(self) -> str:
        """When it was, to the second: ``2026-01-02T03:04:05Z``."""
        return shown_time(self.made.time)

    def disk(self, name: str) -> manifest.Disk:
        """Errors: VIR_ERR_INVALID_ARG for a name that the point has not."""
        if (disk := self._by_name.get(name)) is not None:
            return disk
        known = ", ".join(disk.name for disk in self.made.disks) or "none"
        raise _wrong("disk", f"no disk '{name}' in point {self.label}: it has {known}")

    @functools.cached_property
    def _by_name(self) -> dict[str, manifest.Disk]:
        return {disk.name: disk for disk in self.made.disks}


@dataclasses.dataclass(frozen=True)
class Link:
    """One file of a disk, and the point that it came with."""

    point: Point = dataclasses.field(hash=False)  # it has as much as all of its disks
    disk: manifest.Disk
    path: pathlib.Path
    named: bool = False
    """Whether the user has named PATH, not the manifest."""

    @property
    def file(self) -> str:
        """What people are told that it is called."""
        return str(self.path) if self.named else self.disk.file

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is the directory alone that says what is to be read, and that is not in it: a
        device, what a symbolic link leads to."""
        if self.disk.type == "block":
            return not self.named
        return os.path.dirname(os.path.realpath(self.path)) != os.path.realpath(self.path.parent)  # noqa: PTH120


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a file; of a disk and a point where that can be said. One of a point alone
    is that its manifest is not there, or cannot be read, so that the point is lost."""

    file: str
    text: str
    disk: str | None = None
    point: str | None = None

    def __str__(self) -> str:
        place = "" if self.disk is None else f"disk '{self.disk}', "
        return f"{place}{self.file}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Backups:
    """What DIRECTORY holds, the oldest point first."""

    directory: pathlib.Path
    points: tuple[Point, ...]
    problems: tuple[Problem, ...] = ()
    """Of manifests."""
    unfinished: tuple[Problem, ...] = ()
    """Files that are no part of a point, and why they are there."""
    devices: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    """Disk -> the device that the user has named for it."""

    def with_devices(self, devices: Mapping[str, pathlib.Path]) -> "Backups":
        """The same with DEVICES in place of those in manifests. Errors: VIR_ERR_INVALID_ARG for a
        disk that is on none."""
        on_devices = {one.name for point in self.points for one in point.made.disks
                      if one.type == "block"}  # fmt: skip
        for name, path in devices.items():
            if name not in on_devices:
                text = f"no disk '{name}' of {self.directory} is on a device, so it is not {path}"
                raise _wrong("device", text)
        return dataclasses.replace(self, devices=dict(devices))

    def link(self, point: Point, disk: manifest.Disk) -> Link:
        """The file of DISK, of POINT, and nothing behind it."""
        if disk.type == "block" and disk.name in self.devices:
            return Link(point, disk, self.devices[disk.name], named=True)
        return Link(point, disk, self.directory / disk.file)

    def find(self, wanted: str | None) -> Point:
        """The point that WANTED means: a number, an id, the beginning of a time as ``label`` and
        ``time`` have them, a year alone excepted; None is the newest. Errors: VIR_ERR_INVALID_ARG,
        naming what there is; VIR_ERR_OPERATION_FAILED where the newest is lost: one before it is
        not to be taken for it.
        """
        if wanted is None:
            self._check_newest()
            return self.points[-1]
        for found in self._candidates(wanted):
            if len(found) == 1:
                return found[0]
            if found:
                raise _wrong("point", f"'{wanted}' is more than one point of {self._told(found)}")
        raise _wrong("point", f"no point '{wanted}' in {self._told(self.points)}")

    def _check_newest(self) -> None:
        newest = self.points[-1].made.number
        if newest is None:  # there is one, without a branch
            return
        for found in self.problems:
            if found.disk is None and found.point is not None and int(found.point) > newest:
                raise bad(f"{self.directory}: the newest point, {found.point}, is lost: {found}")

    def _candidates(self, wanted: str) -> Iterator[list[Point]]:
        if re.fullmatch(r"[0-9]{1,9}", wanted):
            yield [p for p in self.points if p.made.number == int(wanted)]
        yield [p for p in self.points if p.made.id == wanted]
        if re.fullmatch(r"[0-9]*", wanted):
            return  # a number that is not there, or no more: all times begin with a 2
        times = (wanted, wanted.replace(" ", "T"))
        yield [p for p in self.points if p.time.startswith(times)
               or p.made.time.startswith(times)]  # fmt: skip

    def _told(self, points: Iterable[Point]) -> str:
        names = [p.time if p.made.number is None else f"{p.label} ({p.time})" for p in points]
        more = f"{len(names) - _MOST_TOLD} earlier, " if len(names) > _MOST_TOLD else ""
        return f"{self.directory}: {more}{', '.join(names[-_MOST_TOLD:])}"

    def files(self) -> Iterator[pathlib.Path]:
        """All that the points are made of."""
        yield self.directory / manifest.FILE
        for point in self.points:
            yield self.directory / point.file
            for disk in point.made.disks:
                yield self.link(point, disk).path

    def links(self, point: Point, name: str) -> tuple[Link, ...]:
        """The files that disk NAME of POINT is made of, the newest first.

        Errors: VIR_ERR_INVALID_ARG for the name; VIR_ERR_OPERATION_FAILED where the manifests do
        not lead to a whole disk.
        """
        links = [self.link(point, point.disk(name))]
        seen = {links[0].disk.file}
        while (backing := links[-1].disk.backing) is not None:
            if backing not in self._by_file:
                raise bad(f"disk '{name}': {self.directory} has no manifest of {backing}")
            owner, disk = self._by_file[backing]
            if backing in seen or disk.size != links[0].disk.size:
                raise bad(f"disk '{name}': {backing} cannot be behind {links[-1].disk.file}")
            if problem := chain.other_backup(links[-1].disk, owner.made):
                raise bad(f"disk '{name}': {links[-1].disk.file}: {problem}")
            seen.add(backing)
            links.append(self.link(owner, disk))
        if links[-1].disk.kind != "full":
            raise bad(f"disk '{name}': nothing is told to be behind {links[-1].disk.file}")
        return tuple(links)

    def overtaken(self, points: Iterable[Point]) -> "Backups | None":
        """What the directory holds by now, where a prune has changed or removed meanwhile what
        POINTS are made of; None where it has not, or the directory is not to be read."""
        try:
            now = dataclasses.replace(read(self.directory), devices=self.devices)
        except errors.Error:
            return None
        same = all(point in now.points and self._needs(point) == now._needs(point)
                   for point in points)  # fmt: skip
        return None if same else now

    def check_not_pruned(self, point: Point) -> None:
        """Raise VIR_ERR_OPERATION_INVALID where POINT is ``overtaken``."""
        if self.overtaken([point]) is not None:
            raise self._pruned(point)

    @contextlib.contextmanager
    def telling_of_prunes(self, point: Point) -> Iterator[None]:
        """Has an error of the block, which reads POINT, say so where it is ``overtaken``."""
        try:
            yield
        except errors.Error as failure:
            was_cancelled = failure.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED
            if was_cancelled or self.overtaken([point]) is None:
                raise
            raise self._pruned(point, failure) from failure

    def _pruned(self, point: Point, failure: errors.Error | None = None) -> errors.Error:
        text = f"{self.directory} was pruned while point {point.label} was read: try again"
        if failure is not None:
            text += f" ({failure.get_str2() or failure})"
        return errors.error(libvirt.VIR_ERR_OPERATION_INVALID, text)

    def _needs(self, point: Point) -> list[tuple[Link, ...] | str]:
        """The files that the disks of POINT are made of, or why they cannot be told."""
        found: list[tuple[Link, ...] | str] = []
        for disk in point.made.disks:
            try:
                found.append(self.links(point, disk.name))
            except errors.Error as failure:
                found.append(str(failure))
        return found

    def states(self) -> dict[str, str | None]:
        """Of the file of every disk of every point, why the disk cannot be whole, as far as that is
        seen without reading it; None: nothing is seen."""
        found: dict[str, str | None] = {}
        for point in self.points:
            for disk in point.made.disks:
                own = problem(self.link(point, disk))
                found[disk.file] = own or self._state_behind(disk, found)
        return found

    def _state_behind(self, disk: manifest.Disk, found: dict[str, str | None]) -> str | None:
        """FOUND is that of the files of older points."""
        if disk.backing is None:
            return None if disk.kind == "full" else "nothing is told to be behind it"
        if disk.backing not in found:
            return f"no older manifest tells of {disk.backing}"
        if problem := chain.other_backup(disk, self._by_file[disk.backing][0].made):
            return problem
        behind = found[disk.backing]
        if behind is None or behind.startswith("of "):
            return behind
        return f"of {disk.backing}: {behind}"

    @functools.cached_property
    def _by_file(self) -> dict[str, tuple[Point, manifest.Disk]]:
        return {disk.file: (point, disk) for point in self.points for disk in point.made.disks}


def is_same(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether both are there, and one file."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def bad(text: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_OPERATION_FAILED, text)


def not_good(link: Link, why: str) -> errors.Error:
    return bad(f"disk '{link.disk.name}': {link.path} is not good: {why}")


def _wrong(argument: str, text: str) -> errors.Error:
    return errors.invalid_arg("backupRestore", argument, text)


def shown_time(time: str) -> str:
    """A manifest's time as people are shown it; what is no time, as it is."""
    try:
        read = datetime.datetime.fromisoformat(time).astimezone(datetime.timezone.utc)
    except (ValueError, OverflowError):
        return time
    return read.strftime("%Y-%m-%dT%H:%M:%SZ")


# --- a directory ----------------------------------------------------------------------------------


def read(directory: pathlib.Path) -> Backups:
    """What DIRECTORY holds. Errors: VIR_ERR_SYSTEM_ERROR; VIR_ERR_OPERATION_INVALID when it has no
    backup at all, saying what it has instead."""
    names = _names(directory)
    for _ in range(_MOST_READS):
        found, before = _read(directory, names), names
        names = _names(directory)
        if _manifests(names) == _manifests(before):
            break  # else a pull or a prune came between, and what was read does not belong together
    if not found.points:
        raise _no_backup(directory, (*found.problems, *found.unfinished))
    return found


def _names(directory: pathlib.Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208  (names, not paths)
    except OSError as failure:
        raise errors.system_error(failure, f"cannot read {directory}") from failure


def _manifests(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("manifest.")]


def _read(directory: pathlib.Path, names: list[str]) -> Backups:
    """The same, of what has NAMES there; without points where there is no backup."""
    numbers = chain.numbers_of(names)
    points: list[Point] = []
    problems: list[Problem] = []
    unfinished: list[Problem] = []
    for number in numbers:
        _read_point(directory, chain.manifest_file(number), number, points, problems)
    _read_newest(directory, names, points, problems, unfinished)
    if JOURNAL not in names:  # which tells what a prune was about to remove, in any order
        problems += _gaps(numbers)
    problems += _strangers(points)
    merged = [_merged(directory, point, names) for point in points]
    unfinished += _unfinished(directory, names, merged)
    return Backups(directory, tuple(merged), tuple(problems), tuple(unfinished))


def _no_backup(directory: pathlib.Path, found: tuple[Problem, ...]) -> errors.Error:
    why = f" ({'; '.join(map(str, found[:3]))})" if found else ""
    return errors.error(libvirt.VIR_ERR_OPERATION_INVALID, f"{directory} has no backup{why}")


def _read_point(
    directory: pathlib.Path,
    name: str,
    number: int | None,
    points: list[Point],
    problems: list[Problem],
) -> None:
    try:
        found, changed = manifest.read_checked(directory, name)
    except errors.Error as failure:
        lost = None if number is None else str(number)
        problems.append(Problem(name, str(failure), point=lost))
        return
    if changed is not None:
        problems.append(Problem(name, changed))
    if number is not None and found.number != number:
        text = f"it is the manifest of backup {found.number}"
        problems.append(Problem(name, text, point=str(number)))
        return
    points.append(Point(name, found))


def _read_newest(
    directory: pathlib.Path,
    names: list[str],
    points: list[Point],
    problems: list[Problem],
    unfinished: list[Problem],
) -> None:
    """``manifest.json``: all there is, or the same as the last of POINTS, or in its place; that of
    the one before, or none, where the pull of the last was cut off when it had all but this."""
    if manifest.FILE not in names:
        if len(points) == 1:
            unfinished.append(Problem(manifest.FILE, "it is missing: a pull was cut off"))
        elif chain.numbers_of(names):
            problems.append(Problem(manifest.FILE, "it is missing"))
        return
    found: list[Point] = []
    _read_point(directory, manifest.FILE, None, found, problems)
    last = [made for point in points[-1:]
            for made in (point.made, _merged(directory, point, names).made)]  # fmt: skip
    before = [point.made for point in points[-2:-1]]
    for newest in found:
        if newest.made in before:
            text = f"it is still that of backup {newest.label}: a pull was cut off"
            unfinished.append(Problem(manifest.FILE, text))
        elif newest.made not in last:
            _add_newest(newest, points, problems)


def _add_newest(newest: Point, points: list[Point], problems: list[Problem]) -> None:
    """What ``manifest.json`` has to POINTS, of which it is none."""
    number = newest.made.number
    last = points[-1].made.number if points else None
    if number is None and points:
        problems.append(Problem(manifest.FILE, "it is of a backup without a branch"))
    elif number is None:
        points.append(newest)
    elif last is None or number > last:
        own = chain.manifest_file(number)
        if not any(problem.file == own for problem in problems):
            problems.append(Problem(own, "it is missing"))
        points.append(newest)
    elif not any(problem.file == manifest.FILE for problem in problems):
        problems.append(Problem(manifest.FILE, f"it is not that of the newest backup, {last}"))


def _gaps(numbers: list[int]) -> Iterator[Problem]:
    """What is missing between NUMBERS, in order: backups follow one another without a gap, and a
    prune takes the oldest."""
    for before, after in itertools.pairwise(numbers):
        first, last = chain.manifest_file(before + 1), chain.manifest_file(after - 1)
        if after == before + 2:
            text = "it is missing: backups before and after it are there"
            yield Problem(first, text, point=str(before + 1))
        elif after > before + 2:
            text = f"it and all up to {last} are missing: backups before and after them are there"
            yield Problem(first, text)


def _strangers(points: list[Point]) -> Iterator[Problem]:
    """Points of another guest or branch than the newest."""
    for point in points[:-1]:
        one, other = point.made, points[-1].made
        if one.domain.uuid != other.domain.uuid:
            yield Problem(point.file, f"it is of another guest, '{one.domain.name}'")
        elif one.branch != other.branch:
            yield Problem(point.file, f"it is of another branch, '{one.branch}'")


def _merged(directory: pathlib.Path, point: Point, names: list[str]) -> Point:
    """As ``chain.merged``."""
    made = chain.merged(directory, point.file, point.made, names)
    return dataclasses.replace(point, made=made)


def _left_of(name: str) -> str | None:
    """What has made the file NAME and did not come to its end; None: it is whole by its name."""
    if name == JOURNAL:
        return _UNFINISHED[chain.MERGED]
    return next((what for end, what in _UNFINISHED.items() if name.endswith(end)), None)


def _unfinished(
    directory: pathlib.Path, names: list[str], points: list[Point]
) -> Iterator[Problem]:
    known = {disk.file for point in points for disk in point.made.disks}
    image = re.compile(
        "(?:" + "|".join(sorted({re.escape(d.name) for p in points for d in p.made.disks}))
        + r")\.[0-9]{4,9}\.(?:qcow2|raw)"
    )  # fmt: skip
    left = {name: what for name in names if (what := _left_of(name)) is not None}
    is_locked = bool(left) and chain.is_locked(directory)
    for name in names:
        if name in left:
            yield Problem(name, _UNDER_WAY if is_locked else left[name])
        elif points and name not in known and image.fullmatch(name):
            yield Problem(name, "no manifest tells of it")


# --- a file ---------------------------------------------------------------------------------------


def problem(link: Link) -> str | None:
    """As ``chain.file_problem``."""
    return chain.file_problem(link.path, link.disk)


def check(links: Iterable[Link]) -> None:
    """Raise VIR_ERR_OPERATION_FAILED for the first of LINKS that has a ``problem``."""
    for link in links:
        if found := problem(link):
            raise not_good(link, found)
