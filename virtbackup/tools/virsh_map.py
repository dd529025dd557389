# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command that draws where disks have data; ``virtbackup.tools.blockmap`` does the work."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from virtbackup.tools import virsh_connection, virsh_pull, virsh_restore, vsh

if TYPE_CHECKING:  # at run time where they are used: they bring libnbd with them
    from virtbackup.nbd import copy
    from virtbackup.tools import blockmap, listing

_MAP_ROWS = 16


def _map(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.tools import blockmap, interrupt

    args.exclusive("json", "output")
    output = args.optional("output")
    if output is not None and not output.endswith((".svg", ".png")):
        raise vsh.UsageError("--output is a file called .svg or .png")
    if output is not None:
        virsh_connection.local_path(output)
    columns = max(16, min(shutil.get_terminal_size().columns - 4, 128))
    count = blockmap.COLUMNS * blockmap.ROWS if output else columns * _MAP_ROWS
    about, sources = _map_sources(shell, args)
    title = str(about["title"])
    with interrupt.deferred() as cancel:
        if args.flag("json"):
            facts = [_range_facts(source, source.ranges(cancel)) for source in sources]
            shell.print_json({**about, "disks": facts})
            return
        maps = [
            blockmap.measure(one.disk, one.size, one.ranges(cancel), count, one.tells_dirty)
            for one in sources
        ]
    if output is None:
        _print_maps(shell, title, maps, columns)
    elif output.endswith(".svg"):
        _write_output(output, blockmap.svg(maps, title).encode())
    else:
        _write_output(output, blockmap.png(maps))


@dataclasses.dataclass(frozen=True)
class _MapSource:
    """A disk to be drawn."""

    disk: str
    size: int
    tells_dirty: bool
    ranges: "Callable[[copy.Cancel], Iterator[blockmap.Range]]"


def _map_sources(
    shell: virsh_connection.Shell, args: vsh.Args
) -> tuple[dict[str, object], list[_MapSource]]:
    """What is drawn, and its disks: of a directory, where there is one of that name, else of a
    domain's running backup."""
    wanted = args.optional("disk")
    if os.path.isdir(args.text("what")):  # noqa: PTH112  (not an error where it cannot be seen)
        about, sources = _sources_of_directory(args)
    else:
        for option in ("point", "device"):
            if args.flag(option):
                text = f"'{args.text('what')}' is no directory, so it has no --{option}"
                raise vsh.UsageError(text)
        about, sources = _sources_of_domain(shell, args)
    if wanted is None:
        return about, sources
    chosen = [one for one in sources if one.disk == wanted]
    if not chosen:
        known = ", ".join(one.disk for one in sources)
        raise vsh.Failure(f"no disk '{wanted}' in {about['title']}: it has {known}")
    return about, chosen


def _sources_of_directory(args: vsh.Args) -> tuple[dict[str, object], list[_MapSource]]:
    from virtbackup.tools import blockmap, listing

    directory = pathlib.Path(args.text("what"))
    backups = listing.read(directory).with_devices(virsh_pull.devices(args, "device"))
    point = backups.find(args.optional("point"))
    if (output := args.optional("output")) is not None:
        _check_output(output, backups)
    sources = [
        _MapSource(
            disk.name,
            disk.size,
            disk.backing is not None,
            functools.partial(blockmap.of_point, backups, point, disk.name),
        )
        for disk in point.made.disks
    ]
    about: dict[str, object] = {
        "title": f"{directory}, backup of {point.time}",
        "directory": str(directory),
        "point": virsh_restore.point_facts(point),
        "domain": None,
    }
    return about, sources


def _sources_of_domain(
    shell: virsh_connection.Shell, args: vsh.Args
) -> tuple[dict[str, object], list[_MapSource]]:
    from virtbackup.conf import backup_conf
    from virtbackup.tools import blockmap, exports

    what = vsh.Args({**args.values, "domain": args.values["what"]})
    domain = virsh_connection.domain(shell, what)
    info = domain.backupGetInfo()
    live = backup_conf.BackupDef.parse(domain.backupGetXMLDesc())
    found = exports.of(live)
    sources = []
    for disk in info.disks:
        if disk.name not in found:  # another backup has followed the one that was asked of
            continue
        context = exports.changes(live, disk.name) if disk.type == "incremental" else None
        ranges = functools.partial(blockmap.of_export, found[disk.name], context)
        sources.append(_MapSource(disk.name, disk.capacity or 0, context is not None, ranges))
    title = f"{domain.name()}, running backup"
    return {"title": title, "directory": None, "point": None, "domain": domain.name()}, sources


def _complete_what(shell: virsh_connection.Shell, args: vsh.Args, text: str) -> Iterable[str]:
    """Directories and domains."""
    found = [path for path in vsh.complete_files(shell, args, text) if path.endswith("/")]
    return [*found, *virsh_connection.complete_domains(shell, args, text)]


def _complete_map_disks(shell: virsh_connection.Shell, args: vsh.Args, text: str) -> Iterable[str]:
    if not args.flag("what"):
        return []
    what = vsh.Args({name: given for name, given in args.values.items() if name != "disk"})
    return [source.disk for source in _map_sources(shell, what)[1]]


def _print_maps(
    shell: virsh_connection.Shell, title: str, maps: "list[blockmap.Map]", columns: int
) -> None:
    from virtbackup.tools import blockmap

    signs = blockmap.BLOCKS
    try:
        "".join(dataclasses.astuple(signs)).encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        signs = blockmap.ASCII
    shell.extra(vsh.visible(title))
    for drawn in maps:
        cell = drawn.cells[0].size if drawn.cells else 0
        size = virsh_connection.human_size
        shell.print("")
        shell.print(f"{vsh.visible(drawn.disk)}: {size(drawn.size)}, {size(cell)} a sign")
        for line in blockmap.text(drawn, columns, signs, vsh.shows_colours(sys.stdout)):
            shell.print(line)


def _check_output(path: str, backups: "listing.Backups") -> None:
    """Raise where the picture would take the place of what is drawn."""
    from virtbackup.tools import listing

    for own in backups.files():
        if listing.is_same(pathlib.Path(path), own):
            raise vsh.Failure(f"{path} is {own}, a file of the backups themselves")


def _write_output(path: str, data: bytes) -> None:
    """All of DATA, or what was there before."""
    try:
        place = _followed(path)
        if place.exists() and not place.is_file():
            place.write_bytes(data)
            return
        partial = place.with_name(f"{place.name}.{os.getpid()}.partial")  # nobody else's
        partial.unlink(missing_ok=True)
        try:
            with partial.open("xb") as opened:
                opened.write(data)
            partial.rename(place)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise vsh.Failure(f"cannot write {path}: {error.strerror}") from error


def _followed(path: str) -> pathlib.Path:
    """Not the link to a file but the file, which need not be there. Errors: OSError."""
    with contextlib.suppress(FileNotFoundError):
        return pathlib.Path(os.path.realpath(path, strict=True))
    return pathlib.Path(os.path.realpath(path))


def _range_facts(source: _MapSource, ranges: "Iterable[blockmap.Range]") -> dict[str, object]:
    return {
        "name": source.disk,
        "size": source.size,
        "ranges": [
            {
                "start": one.start,
                "length": one.end - one.start,
                "kind": one.kind,
                "dirty": one.dirty if source.tells_dirty else None,
            }
            for one in ranges
        ],
    }


MAP = vsh.Command(
    "backup-map", "backup", "Draw where a backup has data",
    "Draw where the disks of a backup have data, zeroes and holes, and what has changed since the\n"
    "point before: of a point in a directory, or of a domain's running backup. What names both is\n"
    "the directory. In a picture data is blue, zeroes are green, holes grey, changes red.",
    (
        vsh.Option(
            "what", vsh.Kind.DATA, "a directory of backups, or a domain whose backup runs",
            required=True, completer=_complete_what,
        ),
        vsh.Option("disk", vsh.Kind.STRING, "one disk alone", completer=_complete_map_disks),
        vsh.Option("point", vsh.Kind.STRING, "of a directory: as for backup-restore"),
        vsh.Option(
            "device", vsh.Kind.STRING, "of a directory: as for backup-restore", multi=True
        ),
        vsh.Option(
            "output", vsh.Kind.STRING, "write a picture, FILE.svg or FILE.png",
            completer=vsh.complete_files,
        ),
        virsh_connection.JSON,
    ),
    _map,
)  # fmt: skip
