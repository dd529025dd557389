# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands about backups in a directory; ``virtbackup.tools.pull`` does the work."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from virtbackup.tools import virsh_connection, vsh

if TYPE_CHECKING:  # at run time where they are used: they bring libnbd with them
    from virtbackup.nbd import copy


class Bar:
    """A progress bar for all disks together (``virtbackup.nbd.copy.Progress``)."""

    def __init__(self, bar: Any) -> None:
        """BAR is a tqdm that counts bytes, its total zero as yet."""
        self._bar = bar

    def start(self, index: int, size: int) -> None:
        """The disk was opened and has SIZE bytes."""
        self._bar.total += size
        self._bar.refresh()

    def advance(self, index: int, count: int) -> None:
        """COUNT more bytes are done."""
        self._bar.update(count)


@contextlib.contextmanager
def _progress(shell: virsh_connection.Shell) -> Iterator[Bar | None]:
    """A bar on standard error where people look at it."""
    if shell.quiet or not sys.stderr.isatty():
        yield None
        return
    import tqdm

    with tqdm.tqdm(total=0, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        yield Bar(bar)


def _pull(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.tools import pull

    xml = args.optional("xml")
    document = None if xml is None else virsh_connection.read_document(xml)
    directory = pathlib.Path(args.text("directory"))
    domain = virsh_connection.domain(shell, args)
    with _progress(shell) as progress:
        made = pull.pull(
            domain,
            directory,
            xml=document,
            fmt=cast("copy.Format", args.optional("format") or "qcow2"),
            quiesce=args.flag("quiesce"),
            progress=progress,
        )
    if args.flag("json"):
        shell.print_document(made.to_json())
        return
    size = virsh_connection.human_size
    for disk in made.disks:
        path = directory / disk.file
        shell.extra(f"{disk.name}: {path} ({size(disk.size)}, {size(disk.stored)} stored)")
    shell.extra("Domain backup pulled")


PULL = vsh.Command(
    "backup-pull", "backup", "Pull a whole backup into a directory",
    "Start a backup, copy its disks into a directory, check and stop it.\n"
    "The directory holds a manifest.json when, and only when, the backup is good.",
    (
        virsh_connection.DOMAIN,
        vsh.Option(
            "directory", vsh.Kind.DATA, "directory, made where absent",
            required=True, completer=vsh.complete_files,
        ),
        vsh.Option(
            "xml", vsh.Kind.STRING,
            "domainbackup XML; - is standard input (default: all writable disks)",
            completer=vsh.complete_files,
        ),
        vsh.Option(
            "format", vsh.Kind.STRING, "qcow2 (default) or raw", choices=("qcow2", "raw")
        ),
        virsh_connection.QUIESCE,
        virsh_connection.JSON,
    ),
    _pull,
)  # fmt: skip
