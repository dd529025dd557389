# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands about backups in a directory; ``virtbackup.tools.pull`` does the work."""

import contextlib
import functools
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from virtbackup.tools import virsh_branch, virsh_connection, vsh

if TYPE_CHECKING:  # at run time where they are used: they bring libnbd with them
    from virtbackup.conf import backup_conf
    from virtbackup.nbd import copy


class Bar:
    """A progress bar for all disks together and, where they are several and have names, one more
    below it for each (``virtbackup.nbd.copy.Progress``)."""

    def __init__(self, more: Callable[..., Any]) -> None:
        """MORE makes a tqdm that counts bytes, of a total, and for a disk of a name and a line."""
        self._more, self._bar = more, more(0)
        self._names: Sequence[str] = ()
        self._disks: dict[int, Any] = {}

    def name(self, names: Sequence[str]) -> None:
        """The disks are called NAMES, in the order of their numbers. Not where the terminal has no
        way up, from their bars to the first one."""
        if vsh.is_dumb():
            return
        self._names = [vsh.visible(name) for name in names]

    def start(self, index: int, size: int) -> None:
        """The disk was opened and has SIZE bytes."""
        self._bar.total += size
        if len(self._names) > 1:
            name, widths = self._names[index], [vsh.width_of(name) for name in self._names]
            padded = name + " " * (max(widths) - widths[index])
            self._disks[index] = self._more(size, padded, index + 1)
        self._bar.refresh()

    def advance(self, index: int, count: int) -> None:
        """COUNT more bytes are done."""
        self._bar.update(count)
        if index in self._disks:
            self._disks[index].update(count)


class Lines:
    """JSON objects for programs, one a line: each disk as it begins, then now and then how far all
    of them are (``virtbackup.nbd.copy.Progress``); not where that had to wait for a program that
    does not read, and the guest's backup with it. All sizes are bytes."""

    EVERY = 0.5
    """Seconds between two lines of progress, at least."""

    def __init__(self, shell: virsh_connection.Shell) -> None:
        self._shell = shell
        self._total = self._done = 0
        self._began = self._last = time.monotonic()

    def tell(self, event: str, **facts: object) -> None:
        """Print an event."""
        self._shell.print_event(event, **facts)

    def start(self, index: int, size: int) -> None:
        """The disk was opened and has SIZE bytes."""
        self._total += size
        self.tell("disk", index=index, size=size)

    def advance(self, index: int, count: int) -> None:
        """COUNT more bytes are done."""
        self._done += count
        now = time.monotonic()
        if now < self._last + self.EVERY and self._done < self._total:
            return
        if not vsh.has_room():
            return
        self._last = now
        rate = self._done / max(now - self._began, 1e-6)
        self.tell("progress", done=self._done, total=self._total, rate=round(rate))


@contextlib.contextmanager
def _lines(shell: virsh_connection.Shell) -> Iterator[Lines]:
    """Lines on standard output for programs; the last one tells of a failure."""
    import libvirt

    lines = Lines(shell)
    with virsh_connection.noting_what_is_left() as left:
        try:
            yield lines
        except (vsh.OutputClosed, vsh.Failure):  # nothing can be told any more
            raise
        except Exception as failure:
            code = libvirt.VIR_ERR_INTERNAL_ERROR
            if isinstance(failure, libvirt.libvirtError):
                code = failure.get_error_code()
            lines.tell("failed", code=code, error=str(failure), left=left)
            raise
        except (KeyboardInterrupt, SystemExit) as end:
            with contextlib.suppress(vsh.OutputClosed, vsh.Failure):
                code = libvirt.VIR_ERR_OPERATION_ABORTED
                error = _left_by(end) or vsh.INTERRUPTION
                lines.tell("failed", code=code, error=error, left=left)
            raise


@contextlib.contextmanager
def bar(shell: virsh_connection.Shell) -> Iterator[Bar | None]:
    """Bars on standard error where people look at it."""
    if shell.quiet or not sys.stderr.isatty():
        yield None
        return
    import tqdm

    clearing = functools.partial(tqdm.tqdm.external_write_mode, sys.stderr)
    with vsh.standing(clearing), contextlib.ExitStack() as shown:

        def more(total: int, name: str | None = None, line: int = 0) -> Any:
            return shown.enter_context(
                tqdm.tqdm(
                    total=total, desc=name, position=line,
                    unit="B", unit_scale=True, unit_divisor=1024, leave=False,
                    dynamic_ncols=True,
                )
            )  # fmt: skip

        yield Bar(more)


def _pull(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.tools import pull

    xml, targets = args.optional("xml"), devices(args, "target")
    wanted, bandwidth = _kind(args), _bandwidth(args)
    document = None if xml is None else virsh_connection.read_document(xml)
    directory = virsh_connection.local_path(args.text("directory"))
    domain = virsh_connection.domain(shell, args)
    if document is not None:
        virsh_connection.warn_of_listener(shell, args, document)
    as_json = args.flag("json")
    written = virsh_connection.document_of_options("backup-pull")
    with (
        written if document is None else contextlib.nullcontext(),
        _lines(shell) if as_json else bar(shell) as progress,
        telling_what_is_left(shell),
    ):
        made = pull.pull(
            domain,
            directory,
            xml=document,
            fmt=cast("copy.Format | None", args.optional("format")),
            quiesce=args.flag("quiesce"),
            progress=progress,
            branch=args.optional("branch"),
            kind=wanted,
            compress=args.flag("compress"),
            bandwidth=bandwidth,
            check=args.flag("check"),
            targets=targets,
            named=progress.name if isinstance(progress, Bar) else None,
            warned=None if shell.quiet else shell.warn_of_each,
        )
        if isinstance(progress, Lines):
            progress.tell("finished", **made.facts())
    if as_json:
        return
    size = virsh_connection.human_size
    for disk in made.disks:
        path = directory / disk.file
        why = f"; {disk.reason}" if disk.reason else ""
        kind = f"{disk.kind}, " if made.branch else ""
        sizes = f"{size(disk.size)}, {size(disk.stored)} stored"
        shell.extra(vsh.visible(f"{disk.name}: {path} ({kind}{sizes}{why})"))
    shell.extra("Domain backup pulled")


def devices(args: vsh.Args, option: str) -> dict[str, pathlib.Path]:
    """Disk -> device, of an OPTION that may be given more than once."""
    found: dict[str, pathlib.Path] = {}
    for given in args.texts(option):
        name, _, path = given.partition("=")
        if not name or not path:
            raise vsh.UsageError(f"invalid --{option} '{given}': expected DISK=DEVICE")
        if name in found:
            raise vsh.UsageError(f"invalid --{option} '{given}': disk '{name}' has one already")
        found[name] = virsh_connection.local_path(path)
    return found


@contextlib.contextmanager
def telling_what_is_left(shell: virsh_connection.Shell) -> Iterator[None]:
    """Has an interruption of the block say what it has left, be it that a device or a server was
    written."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if (told := _left_by(end)) is not None:
            shell.warn(told)
        raise


def _left_by(end: BaseException) -> str | None:
    """What the END of what was interrupted has left; None: nothing, as everybody expects."""
    from virtbackup import errors
    from virtbackup.nbd import polling

    told = end.__cause__
    if not isinstance(told, errors.Error) or told.get_str2() == polling.CANCELLED:
        return None
    return str(told)


def _bandwidth(args: vsh.Args) -> int | None:
    from virtbackup.conf import storage_conf

    given = args.optional("bandwidth")
    if given is None:
        return None
    if not re.fullmatch(storage_conf.SIZE, given) or not (size := storage_conf.parse_size(given)):
        raise vsh.UsageError(f"'{given}' for <--bandwidth> is no size: expected such as 50MiB")
    return size


def _kind(args: vsh.Args) -> "backup_conf.DiskType | None":
    """What the backup is to be of each disk; None: as the XML says, and full by default."""
    kinds: tuple[backup_conf.DiskType, ...] = ("full", "incremental", "auto")
    for kind in kinds:
        for other in kinds[kinds.index(kind) + 1 :]:
            args.exclusive(kind, other)
    return next((kind for kind in kinds if args.flag(kind)), None)


def _complete_target(shell: virsh_connection.Shell, args: vsh.Args, text: str) -> Iterable[str]:
    """The disks of the domain; behind the equals sign devices."""
    from virtbackup.conf import domain_conf

    name, equals, path = text.partition("=")
    if equals:
        return [f"{name}={found}" for found in vsh.complete_files(shell, args, path)]
    if not args.flag("domain"):
        return []
    document = virsh_connection.domain(shell, args).XMLDesc()
    return [f"{disk.target}=" for disk in domain_conf.DomainDef.parse(document).disks]


PULL = vsh.Command(
    "backup-pull", "backup", "Pull a whole backup into a directory",
    "Start a backup, copy its disks into a directory, check and stop it.\n"
    "The directory holds a manifest.json when, and only when, the backup is good.\n"
    "With a branch, backups follow one another in the directory: an incremental one has what\n"
    "changed since the last, as a qcow2 overlay over its file.\n"
    "With a target, a disk goes to a block device; the directory tells which.",
    (
        virsh_connection.DOMAIN,
        vsh.Option(
            "directory", vsh.Kind.DATA, "directory, made where absent",
            required=True, completer=vsh.complete_files,
        ),
        vsh.Option(
            "xml", vsh.Kind.STRING,
            "file of domainbackup XML; - is standard input (default: all writable disks)",
            completer=vsh.complete_files,
        ),
        virsh_branch.BRANCH,
        vsh.Option("full", vsh.Kind.BOOL, "pull whole disks, which start the branch anew"),
        vsh.Option("incremental", vsh.Kind.BOOL, "pull what changed since the last backup"),
        vsh.Option("auto", vsh.Kind.BOOL, "incremental disk by disk where that is possible"),
        vsh.Option(
            "format", vsh.Kind.STRING, "qcow2 (default) or raw", choices=("qcow2", "raw")
        ),
        vsh.Option(
            "target", vsh.Kind.STRING,
            "DISK=DEVICE: a block device that the disk goes to, raw; what it has is overwritten",
            multi=True, completer=_complete_target,
        ),
        vsh.Option("compress", vsh.Kind.BOOL, "have qcow2 files compressed by QEMU (zstd)"),
        vsh.Option(
            "bandwidth", vsh.Kind.STRING, "bytes to read a second at most, such as 50MiB"
        ),
        vsh.Option("check", vsh.Kind.BOOL, "read exports and files once more before the stop"),
        virsh_connection.QUIESCE,
        virsh_connection.INSECURE,
        virsh_connection.JSON_LINES,
    ),
    _pull,
)  # fmt: skip
