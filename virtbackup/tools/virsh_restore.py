# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands about what a directory of backups holds: is it whole, and how to get it back."""

import contextlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from virtbackup.tools import virsh_connection, virsh_pull, vsh

if TYPE_CHECKING:  # at run time where they are used: they bring libnbd with them
    from virtbackup.conf import backup_conf
    from virtbackup.nbd import copy
    from virtbackup.tools import listing, prune, restore, verify


def _read(args: vsh.Args) -> "listing.Backups":
    from virtbackup.tools import listing

    return listing.read(virsh_connection.local_path(args.text("directory")))


def _read_with_devices(args: vsh.Args) -> "listing.Backups":
    devices = virsh_pull.devices(args, "device")
    return _read(args).with_devices(devices)


def _wanted(
    shell: virsh_connection.Shell, args: vsh.Args, backups: "listing.Backups"
) -> "listing.Point":
    """The point that is asked for; it is warned of what is wrong with its manifest."""
    point = backups.find(args.optional("point"))
    for problem in backups.problems:
        if problem.file == point.file:
            shell.warn(str(problem))
    return point


def _complete_points(shell: virsh_connection.Shell, args: vsh.Args, text: str) -> Iterable[str]:
    """The points of the directory."""
    if not args.flag("directory"):
        return []
    return [point.label for point in _read(args).points]


def _complete_disks(shell: virsh_connection.Shell, args: vsh.Args, text: str) -> Iterable[str]:
    """The disks of the point."""
    if not args.flag("directory"):
        return []
    point = _read(args).find(args.optional("point"))
    return [disk.name for disk in point.made.disks]


def _complete_devices(shell: virsh_connection.Shell, args: vsh.Args, text: str) -> Iterable[str]:
    """The disks on devices, and the paths that their manifests tell."""
    if not args.flag("directory"):
        return []
    disks = (disk for point in _read(args).points for disk in point.made.disks)
    return [f"{disk.name}={disk.file}" for disk in disks if disk.type == "block"]


DIRECTORY = vsh.Option(
    "directory", vsh.Kind.DATA, "directory of backups", required=True, completer=vsh.complete_files
)
POINT = vsh.Option(
    "point", vsh.Kind.STRING, "its number, its id, or how its time begins (default: the newest)",
    completer=_complete_points,
)  # fmt: skip
DISK = vsh.Option("disk", vsh.Kind.STRING, "one disk alone", completer=_complete_disks)
DEVICE = vsh.Option(
    "device", vsh.Kind.STRING,
    "DISK=DEVICE: where a disk is that was backed up to a block device, whatever the manifest says",
    multi=True, completer=_complete_devices,
)  # fmt: skip


# --- backup-list ----------------------------------------------------------------------------------


def _list(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    backups = _read(args)
    states = backups.states()
    if args.flag("json"):
        shell.print_json(_list_facts(backups, states))
        return
    newest = backups.points[-1].made
    shell.extra(f"Guest:  {vsh.visible(newest.domain.name)} ({vsh.visible(newest.domain.uuid)})")
    if newest.branch is not None:
        shell.extra(f"Branch: {vsh.visible(newest.branch)}")
    shell.extra("")
    size = virsh_connection.human_size
    shell.print_table(
        ("Point", "Time", "Disk", "Kind", "Size", "Stored", "State"),
        [
            (
                "-" if point.made.number is None else point.label,
                point.time,
                disk.name,
                disk.kind,
                size(disk.size),
                size(disk.stored),
                states[disk.file] or ("there" if disk.type == "file" else f"on {disk.file}"),
            )
            for point in backups.points
            for disk in point.made.disks
        ],
    )
    for problem in backups.problems:
        shell.warn(str(problem))
    for unfinished in backups.unfinished:
        shell.warn(f"no part of a backup: {unfinished}")


def _list_facts(backups: "listing.Backups", states: dict[str, str | None]) -> dict[str, object]:
    newest = backups.points[-1].made
    return {
        "directory": str(backups.directory),
        "domain": {"name": newest.domain.name, "uuid": newest.domain.uuid},
        "branch": newest.branch,
        "points": [
            {
                **point_facts(point),
                "kind": point.made.kind,
                "disks": [
                    {
                        "name": disk.name,
                        "kind": disk.kind,
                        "type": disk.type,
                        "file": disk.file,
                        "format": disk.format,
                        "size": disk.size,
                        "stored": disk.stored,
                        "backing": disk.backing,
                        "since": disk.since,
                        "reason": disk.reason,
                        "problem": states[disk.file],
                    }
                    for disk in point.made.disks
                ],
            }
            for point in backups.points
        ],
        "problems": [_problem_facts(problem) for problem in backups.problems],
        "unfinished": [_problem_facts(problem) for problem in backups.unfinished],
    }


def point_facts(point: "listing.Point") -> dict[str, object]:
    """A point of a directory, for JSON."""
    made = point.made
    return {"number": made.number, "id": made.id, "time": made.time}


def _problem_facts(problem: "listing.Problem") -> dict[str, object]:
    return {
        "disk": problem.disk, "file": problem.file, "point": problem.point,
        "problem": problem.text,
    }  # fmt: skip


LIST = vsh.Command(
    "backup-list", "backup", "List the backups in a directory",
    "List the points that a directory can be restored to, disk by disk, and what of them can be\n"
    "seen to be missing without reading all of it; backup-verify does that.",
    (DIRECTORY, virsh_connection.JSON),
    _list,
)  # fmt: skip


# --- backup-verify --------------------------------------------------------------------------------


def _verify(shell: virsh_connection.Shell, args: vsh.Args) -> int:
    from virtbackup.tools import interrupt, verify

    backups = _read_with_devices(args)
    wanted = args.optional("point")
    point = None if wanted is None else backups.find(wanted)
    begin = time.monotonic()
    with virsh_pull.bar(shell) as progress, interrupt.deferred() as cancel:
        verdict = verify.verify(backups, point, progress=progress, cancel=cancel)
    seconds = time.monotonic() - begin
    if args.flag("json"):
        shell.print_json(_verdict_facts(verdict, seconds))
    else:
        for problem in verdict.problems:
            place = "" if problem.point is None else f"point {problem.point}, "
            shell.print(vsh.visible(f"{place}{problem}"))
        size = virsh_connection.human_size
        shell.extra(
            f"{len(verdict.files)} files, {size(verdict.read)} read"
            f" ({size(int(verdict.read / max(seconds, 0.001)))}/s)"
        )
        if verdict.in_part:
            shell.extra(
                f"{len(verdict.in_part)} of them, of an older virtbackup, have no checksum of their"
                " tables: compared is what a guest reads, and QEMU has looked through the tables"
            )
    if verdict.good:
        if not args.flag("json"):
            shell.extra("Backups verified")
        return vsh.DONE
    raise vsh.Failure(_summary(verdict, point), _newest_good(verdict, point))


def _summary(verdict: "verify.Verdict", only: "listing.Point | None") -> str:
    first, more = verdict.problems[0], len(verdict.problems) - 1
    text = f"the backups in {verdict.backups.directory} are not whole: {first}"
    if more:
        text += f" (and {more} more)"
    lost = {one.point for one in verdict.problems if one.disk is None and one.point is not None}
    lost -= {point.label for point in verdict.backups.points}  # the newest, by ``manifest.json``
    if bad := lost | {point.label for point in verdict.bad_points}:
        in_order = sorted(bad, key=lambda label: (len(label), label))  # as numbers, as times
        return f"{text}; not to be restored: {', '.join(in_order)}"
    return f"{text}; {'every point listed' if only is None else 'the point'} can be restored"


def _newest_good(verdict: "verify.Verdict", only: "listing.Point | None") -> str | None:
    """What can be restored all the same; of points that were not looked at nothing is known."""
    good = [point for point in verdict.backups.points if point not in verdict.bad_points]
    if only is not None or not good or not verdict.bad_points:
        return None
    return f"'backup-restore' with --point {good[-1].label} takes the newest that is good"


def _verdict_facts(verdict: "verify.Verdict", seconds: float) -> dict[str, object]:
    return {
        "directory": str(verdict.backups.directory),
        "good": verdict.good,
        "files": [link.disk.file for link in verdict.files],
        "in_part": [link.disk.file for link in verdict.in_part],
        "problems": [_problem_facts(problem) for problem in verdict.problems],
        "bad_points": [point_facts(point) for point in verdict.bad_points],
        "read": verdict.read,
        "seconds": seconds,
    }


VERIFY = vsh.Command(
    "backup-verify", "backup", "Read backups again and compare them with their checksums",
    "Read every byte of the backups in a directory, or of one point, and compare it with the\n"
    "checksums in the manifests. Exit status 1, and what is wrong by disk, file and point, when\n"
    "anything is.",
    (
        DIRECTORY,
        vsh.Option(
            "point", vsh.Kind.STRING, "one alone: its number, its id, or how its time begins",
            completer=_complete_points,
        ),
        DEVICE,
        virsh_connection.JSON,
    ),
    _verify,
)  # fmt: skip


# --- backup-restore -------------------------------------------------------------------------------


def _restore(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.tools import interrupt, restore

    args.exclusive("json", "define")
    backups = _read_with_devices(args)
    point = _wanted(shell, args, backups)
    out, disk = args.text("out"), args.optional("disk")
    fmt = cast("copy.Format | None", args.optional("format"))
    document, left = "", list[str]()
    if args.flag("define"):  # what cannot be written is known before the work is done
        document, left = restore.domain_xml(point, restore.places(point, out, disk, fmt))
    with (
        virsh_pull.bar(shell) as progress,
        virsh_pull.telling_what_is_left(shell),
        interrupt.deferred() as cancel,
    ):
        done = restore.restore(
            backups,
            point,
            out,
            disk=disk,
            fmt=fmt,
            force=args.flag("force"),
            progress=progress,
            cancel=cancel,
        )
        interrupt.check_late(cancel, f"all is whole, in {out}")
    for one in done:
        if not one.durable:
            shell.warn(
                f"{one.output.place} cannot be told to flush: when the disk is on its medium, only"
                " its host knows"
            )
    if args.flag("json"):
        shell.print_json(_restored_facts(backups, point, done))
        return
    if args.flag("define"):
        shell.print_document(document)
        for name in left:
            shell.warn(f"disk '{name}' was not restored and is where it was")
        return
    size = virsh_connection.human_size
    for one in done:
        output = one.output
        stored = f", {size(one.stored)} stored" if output.type == "file" else ""
        shell.extra(
            vsh.visible(
                f"{output.disk}: {output.place} ({output.format}, {size(one.size)}{stored})"
            )
        )
    shell.extra(f"Backup of {point.time} restored")


def _restored_facts(
    backups: "listing.Backups", point: "listing.Point", done: "list[restore.Restored]"
) -> dict[str, object]:
    return {
        "directory": str(backups.directory),
        "point": point_facts(point),
        "disks": [
            {
                "name": one.output.disk,
                "type": one.output.type,
                "place": one.output.place,
                "format": one.output.format,
                "size": one.size,
                "stored": one.stored,
                "read": one.read,
                "checksum": one.checksum,
                "durable": one.durable,
            }
            for one in done
        ],
    }


RESTORE = vsh.Command(
    "backup-restore", "backup", "Put the disks of a backup back",
    "Write the disks of a point, as they were then, into a directory; with --disk one of them\n"
    "into a file, a block device or an NBD server (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH).\n"
    "All that is read is checked: a file has its name when, and only when, the disk is good.",
    (
        DIRECTORY,
        vsh.Option(
            "out", vsh.Kind.DATA, "a directory, made where absent; with --disk a file or a URI",
            required=True, completer=vsh.complete_files,
        ),
        POINT,
        DISK,
        DEVICE,
        vsh.Option(
            "format", vsh.Kind.STRING,
            "qcow2, or raw (default: raw for a device, a server and files called .raw or .img)",
            choices=("qcow2", "raw"),
        ),
        vsh.Option("force", vsh.Kind.BOOL, "overwrite what is there"),
        vsh.Option(
            "define", vsh.Kind.BOOL, "print the domain XML of then, its disks where they are now"
        ),
        virsh_connection.JSON,
    ),
    _restore,
)  # fmt: skip


# --- backup-serve ---------------------------------------------------------------------------------


def _serve(shell: virsh_connection.Shell, args: vsh.Args) -> int:
    from virtbackup.conf import backup_conf
    from virtbackup.tools import interrupt, serve

    unix = args.optional("unix")
    for other in ("host", "port"):
        args.exclusive("unix", other)
    backups = _read_with_devices(args)
    point = _wanted(shell, args, backups)
    disk = args.optional("disk")
    names = [one.name for one in point.made.disks] if disk is None else [disk]
    with contextlib.ExitStack() as undo:
        undo.enter_context(contextlib.suppress(KeyboardInterrupt, SystemExit))
        cancel = undo.enter_context(interrupt.deferred())
        address: backup_conf.Address | None = None
        if args.flag("host") or args.flag("port"):
            address = _tcp_address(shell, args)
        elif unix is not None:
            address = backup_conf.UnixAddress(unix)
        for name in names:
            for link in backups.links(point, name):
                _tell_what_is_read(shell, link)
        with virsh_pull.bar(shell) as progress:
            server = undo.enter_context(
                serve.serving(backups, point, names, address, progress=progress, cancel=cancel)
            )
        _tell_exports(shell, args, point, names, server.address)
        vsh.flush()
        server.wait(cancel)
    return vsh.DONE


def _tell_what_is_read(shell: virsh_connection.Shell, link: "listing.Link") -> None:
    """Before a server answers: that may take a while."""
    from virtbackup.tools import listing

    if link.is_elsewhere and listing.problem(link) is None:
        name = f"{link.disk.name}={link.path}"
        more = f"; --device {name} serves it at once" if link.disk.type == "block" else ""
        shell.warn(f"{link.path} is not in the directory and is checked first{more}")


def _tcp_address(shell: virsh_connection.Shell, args: vsh.Args) -> "backup_conf.IpAddress":
    from virtbackup.conf import backup_conf

    host, port = args.optional("host") or "127.0.0.1", args.number("port")
    port = _NBD_PORT if port is None else port
    if not args.flag("insecure") and not virsh_connection.is_loopback(host):
        shell.warn(f"whoever reaches {host} can read the backup, see --insecure")
    return backup_conf.IpAddress(host, port, None, None)


_NBD_PORT = 10809


def _tell_exports(
    shell: virsh_connection.Shell,
    args: vsh.Args,
    point: "listing.Point",
    names: list[str],
    address: "backup_conf.Address",
) -> None:
    uris = {name: virsh_connection.nbd_uri(address, name) for name in names}
    if args.flag("json"):
        facts = {"directory": args.text("directory"), "point": point_facts(point)}
        shell.print_json({**facts, "exports": uris})
        return
    shell.extra(f"Backup of {point.time}, until ^C:")
    for name, uri in uris.items():
        shell.print(vsh.visible(f"{name}: {uri}"))


SERVE = vsh.Command(
    "backup-serve", "backup", "Serve the disks of a backup over NBD",
    "Serve the disks of a point, as they were then and for reading only, until it is interrupted.\n"
    "An export has the disk's name. Nothing is restored, and no file of the backup is changed.",
    (
        DIRECTORY,
        POINT,
        DISK,
        DEVICE,
        vsh.Option(
            "unix", vsh.Kind.STRING, "path of the socket (default: one in a private directory)",
            completer=vsh.complete_files,
        ),
        vsh.Option("host", vsh.Kind.STRING, "address to listen on (with --port: 127.0.0.1)"),
        vsh.Option(
            "port", vsh.Kind.INT, "TCP port to listen on (with --host: 10809)",
            least=1, most=65535,
        ),
        virsh_connection.INSECURE,
        virsh_connection.JSON,
    ),
    _serve,
)  # fmt: skip


# --- backup-prune ---------------------------------------------------------------------------------


def _prune(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.tools import interrupt, prune

    keep = args.number("keep")
    if not keep:
        raise vsh.UsageError("--keep is the number of points to keep, one or more")
    if args.flag("dry-run"):
        plan = prune.foretold(_read(args), keep)
    else:
        directory = virsh_connection.local_path(args.text("directory"))
        _read(args)  # or it says that something is wrong with the lock
        with (
            virsh_pull.bar(shell) as progress,
            virsh_pull.telling_what_is_left(shell),
            interrupt.deferred() as cancel,
        ):
            plan = prune.prune(directory, keep, progress=progress, cancel=cancel)
            interrupt.check_late(cancel, f"{directory} is pruned")
    if args.flag("json"):
        facts = _prune_facts(plan, args.flag("dry-run"))
        shell.print_json({"directory": args.text("directory"), **facts})
        return
    would = "would be " if args.flag("dry-run") else ""
    for links in plan.merges:
        disk, files = links[0].disk, [link.disk.file for link in links]
        shell.print(
            vsh.visible(f"{disk.name}: {disk.file} {would}made whole of {', '.join(files[1:])}")
        )
    for point in plan.dropped:
        shell.print(vsh.visible(f"point {point.label} ({point.time}) {would}removed"))
    shell.extra(
        f"{len(plan.kept)} points {would}kept, {len(plan.dropped)} {would}removed"
        f" ({virsh_connection.human_size(_stored(plan))})"
    )
    gone = "would be gone" if args.flag("dry-run") else "is gone"
    for name in plan.lost:
        shell.warn(f"disk '{name}' {gone}: no point that is kept has it")


def _stored(plan: "prune.Plan") -> int:
    """Bytes that the points to be removed take."""
    return sum(disk.stored for point in plan.dropped for disk in point.made.disks)


def _prune_facts(plan: "prune.Plan", dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "kept": [point_facts(point) for point in plan.kept],
        "removed": [point_facts(point) for point in plan.dropped],
        "stored": _stored(plan),
        "lost": list(plan.lost),
        "merged": [
            {
                "disk": links[0].disk.name,
                "file": links[0].disk.file,
                "of": [link.disk.file for link in links],
            }
            for links in plan.merges
        ],
        "files": [*plan.manifests, *plan.files],
    }


PRUNE = vsh.Command(
    "backup-prune", "backup", "Remove all but the newest backups of a directory",
    "Keep the newest points and remove the older ones. The oldest one that is kept becomes a full\n"
    "backup, made aside of the files that it needs, which are checked on the way; all others stay\n"
    "as they are. Whatever ends it, every point that is listed can be restored; the next prune\n"
    "finishes what was begun.",
    (
        DIRECTORY,
        vsh.Option("keep", vsh.Kind.INT, "how many points to keep", required=True),
        vsh.Option("dry-run", vsh.Kind.BOOL, "change nothing, tell what would be done"),
        virsh_connection.JSON,
    ),
    _prune,
)  # fmt: skip


COMMANDS = (LIST, VERIFY, RESTORE, SERVE, PRUNE)
