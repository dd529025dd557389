# SPDX-License-Identifier: LGPL-2.1-or-later
"""Old points go, and the others stay: what they need of the old ones is merged into them.

The oldest point that is kept becomes a full backup. Its new image is made aside, checked, and takes
the place and the name of the increment that it was, so every overlay over it stays as it is and
shows what it showed. Whatever ends a prune, every point that is listed can be restored:

1. ``FILE.merged`` is made of the old files, which are checked on the way, read again, and durable;
2. ``manifest.NUMBER.json.merged`` tells of it: from here on the prune will be finished;
3. the images take their places, one by one. Until the manifest has followed, ``listing`` takes an
   image's description from the one of the two manifests that fits it;
4. ``manifest.json``, where it is of that point, and ``manifest.NUMBER.json`` follow;
5. ``prune.json`` tells what is to be removed; first manifests go, the newest first, as an older
   point does not need a newer one's files; then images; then the journal.

The next prune finishes what a killed one has begun, or removes it before step 2.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import libvirt

from virtbackup import errors, runtime
from virtbackup.nbd import checksum, copy, target, writer
from virtbackup.tools import chain, listing, manifest, restore, verify

MERGED = chain.MERGED
JOURNAL = listing.JOURNAL
REASON = "older backups were pruned"

_MERGED_MANIFEST = re.compile(r"(manifest\.[0-9]{4,9}\.json)" + re.escape(MERGED))
_LEFT = re.compile(
    rf".+\.[0-9]{{4,9}}\.qcow2{re.escape(MERGED)}"
    rf"|(manifest\.[0-9]{{4,9}}\.json{re.escape(MERGED)}|{re.escape(JOURNAL)})"
    rf"{re.escape(chain.PARTIAL)}",
    re.DOTALL,
)
"""What a prune makes before it has announced anything."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a prune comes to."""

    kept: tuple[listing.Point, ...]
    dropped: tuple[listing.Point, ...]
    merges: tuple[tuple[listing.Link, ...], ...]
    """The files of a disk of a kept point, the newest first; all of it goes into the first."""
    files: tuple[str, ...]
    """Images that are no longer needed."""

    @property
    def manifests(self) -> tuple[str, ...]:
        """Of the points that go, in the order in which they have to."""
        return tuple(point.file for point in reversed(self.dropped))

    @property
    def lost(self) -> tuple[str, ...]:
        """Disks that no point has any more."""
        kept = {disk.name for point in self.kept for disk in point.made.disks}
        gone = {disk.name: None for point in self.dropped for disk in point.made.disks}
        return tuple(name for name in gone if name not in kept)


def plan(backups: listing.Backups, keep: int) -> Plan:
    """What is to be done to keep the KEEP newest points alone.

    Errors: VIR_ERR_OPERATION_INVALID for a directory that is not sound enough to judge by, or one
    where what is kept is not whole, as far as that is seen without reading it.
    """
    if backups.problems:
        raise _invalid(f"{backups.directory} is not sound: {backups.problems[0]}")
    if backups.points[-1].made.number is None:
        raise _invalid(f"{backups.directory} has one backup, without a branch: nothing to prune")
    kept, dropped = backups.points[-keep:], backups.points[:-keep]
    if dropped:
        _check_kept(backups, kept)
    stay = {disk.file for point in kept for disk in point.made.disks}
    merges = tuple(
        backups.links(point, disk.name)
        for point in kept
        for disk in point.made.disks
        if disk.backing is not None and disk.backing not in stay
    )
    gone = [disk.file for point in reversed(dropped) for disk in point.made.disks
            if disk.type == "file"]  # fmt: skip
    return Plan(kept, dropped, merges, tuple(file for file in gone if file not in stay))


def _check_kept(backups: listing.Backups, kept: Sequence[listing.Point]) -> None:
    """Raise for a point of KEPT that would be lost, where older ones, which go, may be good."""
    states = backups.states()
    for point in kept:
        for disk in point.made.disks:
            if (problem := states[disk.file]) is not None:
                raise _invalid(
                    f"point {point.label} is to be kept and is not whole: disk '{disk.name}',"
                    f" {disk.file}: {problem}"
                )


def foretold(backups: listing.Backups, keep: int) -> Plan:
    """As ``plan``, for what is not going to be done now. Errors: also what a pull that was cut off
    has left; one that runs is going to be done by then."""
    made = plan(backups, keep)
    if not chain.is_locked(backups.directory):
        with chain.naming("cannot prune", backups.directory):
            _check_unfinished(backups)
    return made


def prune(
    directory: pathlib.Path,
    keep: int,
    *,
    progress: copy.Progress | None = None,
    cancel: copy.Cancel,
) -> Plan:
    """Keep the KEEP newest points of DIRECTORY alone; what was done, with what a killed prune had
    yet to remove.

    Errors: those of ``plan``; VIR_ERR_OPERATION_INVALID while a backup is pulled there or was cut
    off; VIR_ERR_OPERATION_FAILED for a file that is needed and not as it was backed up;
    VIR_ERR_SYSTEM_ERROR. Every point is there after an error, or every one that is kept.
    """
    assert keep > 0
    verify.need("qemu-nbd", "qemu-img")
    with chain.naming("cannot prune", directory), chain.locked(directory):
        earlier = finish(directory)
        backups = listing.read(directory)
        wanted = plan(backups, keep)
        _check_unfinished(backups)
        if any(one.file == manifest.FILE for one in backups.unfinished):
            _write(directory, manifest.FILE, backups.points[-1].made)
        _merge_all(directory, wanted, progress, cancel)
        cancel.check()
        if wanted.dropped:
            _write_json(directory, JOURNAL, {"manifests": wanted.manifests, "files": wanted.files})
            _remove_old(directory)
    if earlier is None:
        return wanted
    dropped, files = earlier.dropped + wanted.dropped, earlier.files + wanted.files
    return dataclasses.replace(wanted, dropped=dropped, files=files)


def _invalid(text: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_OPERATION_INVALID, text)


def _check_unfinished(backups: listing.Backups) -> None:
    """What a pull will finish when it comes again may need any of the files."""
    number = 1 + (backups.points[-1].made.number or 0)
    pending = chain.manifest_file(number) + chain.PARTIAL
    if runtime.status(backups.directory / pending):
        raise _invalid(
            f"a pull into {backups.directory} was cut off: the next one has to finish it first"
        )


# --- merging --------------------------------------------------------------------------------------


def _merge_all(
    directory: pathlib.Path,
    wanted: Plan,
    progress: copy.Progress | None,
    cancel: copy.Cancel,
) -> None:
    index = 0
    for point in wanted.kept:
        merges = [links for links in wanted.merges if links[0].point.file == point.file]
        if not merges:
            continue
        made: dict[str, manifest.Disk] = {}
        with contextlib.ExitStack() as undo:
            for links in merges:
                aside = _aside(links[0].path)
                undo.callback(_remove_quietly, aside)
                made[links[0].disk.file] = _merge(links, aside, progress, index, cancel)
                index += 1
            disks = tuple(made.get(disk.file, disk) for disk in point.made.disks)
            _announce(directory, point, disks)
            undo.pop_all()
        if not _take_places(directory, point.file):
            raise listing.bad(
                f"what was merged for point {point.label} was removed or cut by somebody else, and"
                f" all points of {directory} are as they were: prune it again"
            )


def _aside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + MERGED)


def _merge(
    links: Sequence[listing.Link],
    aside: pathlib.Path,
    progress: copy.Progress | None,
    index: int,
    cancel: copy.Cancel,
) -> manifest.Disk:
    """Make ASIDE show what LINKS do; its description."""
    restore.check(links)
    disk = links[0].disk
    # As the increment was: else the directory could take more room than before.
    is_compressed = chain.read_header(links[0].path).zstd

    def open_target(size: int) -> target.Target:
        return writer.QemuWriter(aside, size, compression="zstd" if is_compressed else None)

    found = restore.merge(links, open_target, progress=progress, index=index, cancel=cancel)
    again = copy.checksum_of_file(aside, "qcow2", disk.size, cancel=cancel)
    if again != found.checksum:
        raise listing.bad(f"{aside} does not read as it was written: is the storage sound?")
    return dataclasses.replace(
        disk,
        checksum=manifest.Checksum(checksum.ALGORITHM, checksum.BLOCK, found.checksum),
        stored=found.stored,
        kind="full",
        backing=None,
        since=None,
        reason=REASON,
        tables=manifest.tables_of(aside, disk.size, cancel),
        length=manifest.length_of(aside),
    )


def _announce(
    directory: pathlib.Path,
    point: listing.Point,
    disks: tuple[manifest.Disk, ...],
) -> None:
    """POINT's manifest of tomorrow, beside the one of today."""
    kind = "full" if all(disk.backing is None for disk in disks) else "incremental"
    _write(directory, point.file + MERGED, dataclasses.replace(point.made, kind=kind, disks=disks))


def _take_places(directory: pathlib.Path, file: str) -> bool:
    """Put the images that the announced manifest FILE tells of in their places, then it; whether
    all of them are there.

    Where one of them is not there any more, or is cut, as in a copy of the directory that was made
    meanwhile, the manifest goes on to tell of the increment that is in its place. Errors: one of
    them cannot be looked at, so that which of the two it is is not known: nothing is decided then.
    """
    coming = manifest.read(directory, file + MERGED)
    for disk in coming.disks:
        aside = _aside(directory / disk.file)
        if chain.seen_problem(aside, disk) is None:
            aside.rename(directory / disk.file)
    chain.sync_directory(directory)
    made = chain.in_place(directory, manifest.read(directory, file), coming, chain.stands_alone)
    if made != coming:
        _write(directory, file + MERGED, made)
    newest = manifest.read(directory)
    if newest.number == made.number and newest != made:
        _write(directory, manifest.FILE, made)
    (directory / (file + MERGED)).rename(directory / file)
    chain.sync_directory(directory)
    return made == coming


def _write(directory: pathlib.Path, file: str, made: manifest.Manifest) -> None:
    """A manifest, durable and whole under its name, or not there."""
    partial = directory / (file + chain.PARTIAL)
    partial.unlink(missing_ok=True)  # whatever it is
    chain.write(directory, file, made)
    partial.rename(directory / file)
    chain.sync_directory(directory)


# --- removing -------------------------------------------------------------------------------------


def _write_json(directory: pathlib.Path, file: str, value: object) -> None:
    """Durable and whole under its name, or not there."""
    chain.write_text(directory, file, json.dumps(value, indent=2))
    (directory / (file + chain.PARTIAL)).rename(directory / file)
    chain.sync_directory(directory)


def _remove_old(directory: pathlib.Path) -> Plan:
    """Remove what the journal tells; what that is. Errors: it tells of what is needed."""
    manifests, files = _read_journal(directory)
    points = listing.read(directory).points
    dropped = tuple(point for point in points if point.file in manifests)
    kept = points[len(dropped) :]
    needed = {disk.backing for point in kept for disk in point.made.disks}
    needed |= {disk.file for point in kept for disk in point.made.disks}
    if not kept or dropped != points[: len(dropped)] or needed & set(files):
        raise _invalid(f"{directory / JOURNAL} tells of files that are needed")
    for names in (manifests, files):
        for name in names:
            (directory / name).unlink(missing_ok=True)
        chain.sync_directory(directory)
    (directory / JOURNAL).unlink()
    chain.sync_directory(directory)
    return Plan(kept, dropped, (), tuple(files))


def _read_journal(directory: pathlib.Path) -> tuple[list[str], list[str]]:
    try:
        told = json.loads(manifest.read_file(directory / JOURNAL))
        manifests, files = (list(map(str, told[key])) for key in ("manifests", "files"))
    except (ValueError, KeyError, TypeError) as failure:
        raise _invalid(f"{directory / JOURNAL} is not the journal of a prune") from failure
    names = [*manifests, *files]
    if any(manifest.file_name_problem(name) or name == manifest.FILE for name in names):
        raise _invalid(f"{directory / JOURNAL} is not the journal of a prune")
    return manifests, files


def _remove_quietly(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


# --- after a crash --------------------------------------------------------------------------------


def finish(directory: pathlib.Path) -> Plan | None:
    """Finish what a killed prune has announced, remove what it has not; what it had yet to remove,
    if anything. DIRECTORY is locked.

    Errors: OSError; VIR_ERR_OPERATION_INVALID for what no prune can have left.
    """
    names = os.listdir(directory)  # noqa: PTH208  (names, not paths)
    for name in names:
        if match := _MERGED_MANIFEST.fullmatch(name):
            if runtime.status(directory / match[1]) is None:
                raise _invalid(f"{directory / name} is of a backup that is not there")
            one, other = (manifest.read(directory, file) for file in (name, match[1]))
            if (changed := manifest.read_checked(directory, name)[1]) is not None:
                raise _invalid(f"{directory / name}: {changed}")
            if (one.id, one.number) != (other.id, other.number):
                raise _invalid(f"{directory / name} is of another backup than {match[1]}")
            _take_places(directory, match[1])
    for name in _leftovers(names):
        (directory / name).unlink(missing_ok=True)
    return _remove_old(directory) if JOURNAL in names else None


def _leftovers(names: Iterable[str]) -> list[str]:
    """Of a prune that had not announced anything yet; those announced are gone by now."""
    return list(filter(_LEFT.fullmatch, names))
