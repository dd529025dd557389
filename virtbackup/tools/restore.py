# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way back: the disks of a point into files, a block device or an NBD server.

Every layer of a disk is checked while it is read, see ``layers``: what is not what was backed up
does not get a name. A file has a partial name until all disks are good and on the medium; whatever
ends a restore before, SIGINT and SIGTERM included, no file remains.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import pathlib
import re
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence

import libvirt

from virtbackup import errors
from virtbackup.conf import redefine
from virtbackup.nbd import copy, destination, device, layers, target, writer
from virtbackup.tools import chain, listing, verify

PARTIAL = chain.PARTIAL

_URI = re.compile(r"([a-z][a-z0-9+.-]*)(://.*)", re.DOTALL | re.IGNORECASE)
_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")
_RAW_NAMES = (".raw", ".img")
_FLOCK = "hhqqi4x"
"""fcntl(2)'s struct: type, whence, start, length, pid."""
_OURS = (1 << 40, 1)
"""Bytes of a file that a restore locks, beside those that QEMU does."""
_JUST_MADE = 0.05
"""Seconds after which a restore has locked the file that it has made."""
_QEMUS = (100, 200)
_BUSY = (errno.EAGAIN, errno.EACCES)


@dataclasses.dataclass(frozen=True)
class Output:
    """Where one disk goes."""

    disk: str
    place: str
    """A path, or a URI."""
    type: str
    """file, block or network, as libvirt has it."""
    format: copy.Format

    @property
    def path(self) -> pathlib.Path:
        return pathlib.Path(self.place)

    @property
    def partial(self) -> pathlib.Path:
        return self.path.with_name(self.path.name + PARTIAL)


@dataclasses.dataclass(frozen=True)
class Restored:
    """One disk that is back. Sizes are bytes."""

    output: Output
    size: int
    stored: int
    read: int
    checksum: str
    """Of the disk, ``checksum.ALGORITHM``."""
    durable: bool = True
    """Whether it was made so: not by a server that cannot be told to."""


def restore(
    backups: listing.Backups,
    point: listing.Point,
    out: str,
    *,
    disk: str | None = None,
    fmt: copy.Format | None = None,
    force: bool = False,
    progress: copy.Progress | None = None,
    cancel: copy.Cancel,
) -> list[Restored]:
    """Put the disks of POINT, or DISK alone, back to OUT: a directory, with DISK a file, a block
    device or an NBD URI.

    FMT is a file's format; None: raw where the file is called so, else qcow2. FORCE overwrites.

    Errors: VIR_ERR_OPERATION_INVALID for what is in the way, and where a prune has changed
    meanwhile what POINT is made of; VIR_ERR_OPERATION_FAILED for a file of the backup that is not
    as it was, a target that is too small; those of ``copy.copy``. On any error OUT has no new file,
    and every file that was there.
    """
    verify.need("qemu-nbd")
    outputs = places(point, out, disk, fmt)
    chains = {output.disk: backups.links(point, output.disk) for output in outputs}
    for output in outputs:
        _check_output(output, backups, force)
    with backups.telling_of_prunes(point):
        for output in outputs:
            check(chains[output.disk])
            if output.type != "file":  # of which nothing is left where the disk is not good
                chains[output.disk] = verify.checked(chains[output.disk], progress, cancel)
    cancel.check()
    with contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
        if disk is None:
            _make(pathlib.Path(out), undo)
        done = []
        for index, output in enumerate(outputs):
            _make_room(output, force)
            links = chains[output.disk]
            with backups.telling_of_prunes(point):
                made = _restore(links, output, index, force, held, undo, progress, cancel)
            done.append(made)
        if all(output.type == "file" for output in outputs):  # another has the disk by now
            cancel.check()
        for output in outputs:  # once more: it took a while
            _check_output(output, backups, force)
        _finish(outputs)
        undo.pop_all()
    return done


def check(links: Sequence[listing.Link]) -> None:
    """Raise VIR_ERR_OPERATION_FAILED where one of LINKS cannot be what was backed up."""
    listing.check(links)
    for link in links:
        if problem := verify.unknown_checksum(link.disk):
            raise listing.not_good(link, problem)


def merge(
    links: Sequence[listing.Link],
    open_target: Callable[[int], target.Target],
    *,
    progress: copy.Progress | None = None,
    index: int = 0,
    cancel: copy.Cancel,
) -> layers.Result:
    """Write what a disk shows that is made of LINKS, every one of them checked.

    Errors: those of ``layers.merge``; VIR_ERR_OPERATION_FAILED naming the file that is not good.
    """

    def compare(found: Sequence[str]) -> None:
        for link, value in zip(links, found, strict=True):
            if value != link.disk.checksum.value:
                raise listing.not_good(link, verify.differs(value, link.disk))

    jobs = [verify.job(link) for link in links]
    return layers.merge(jobs, open_target, compare, progress=progress, index=index, cancel=cancel)


def domain_xml(point: listing.Point, outputs: Sequence[Output]) -> tuple[str, list[str]]:
    """The document of POINT's guest with its disks in OUTPUTS, and the disks that are not there.

    Errors: VIR_ERR_XML_ERROR; VIR_ERR_OPERATION_FAILED where the backup has no such document.
    """
    if not point.made.domain_xml.strip():
        raise listing.bad(f"point {point.label} has no domain XML")
    here = ""
    with contextlib.suppress(OSError):  # it was removed: nothing is in it
        here = os.getcwd()  # noqa: PTH109  (a string)
    media = {
        one.disk: redefine.Medium(
            one.type,
            one.place if one.type == "network" else str(pathlib.Path(here, one.place)),
            one.format,
        )
        for one in outputs
    }
    return redefine.redefine(point.made.domain_xml, media, here)


# --- where to -------------------------------------------------------------------------------------


def places(
    point: listing.Point, out: str, disk: str | None = None, fmt: copy.Format | None = None
) -> list[Output]:
    """Where ``restore`` puts the disks. Errors: OUT or FMT make no sense."""
    if disk is not None:
        return [_output(point.disk(disk).name, out, fmt)]
    if _server(out) is not None:
        raise _invalid("a server takes one disk: name it by --disk")
    made = fmt or "qcow2"
    directory = pathlib.Path(out)
    if os.path.exists(directory) and not os.path.isdir(directory):  # noqa: PTH110, PTH112  (told below)
        raise _invalid(f"{out} is not a directory; one disk into a file is named by --disk")
    names = [one.name for one in point.made.disks]
    return [Output(name, str(directory / f"{name}.{made}"), "file", made) for name in names]


def _server(out: str) -> str | None:
    """The URI that OUT is, its scheme as it is written by all; None: it is a path. Errors: it is
    none of an NBD server."""
    if (match := _URI.fullmatch(out)) is None:
        return None
    if (scheme := match[1].lower()) in _SCHEMES:
        return scheme + match[2]
    known = [f"{one}://" for one in _SCHEMES]
    raise _invalid(
        f"cannot write to {out}: a server is written to by {', '.join(known[:-1])} or {known[-1]}"
    )


def _output(name: str, out: str, fmt: copy.Format | None) -> Output:
    if (uri := _server(out)) is not None:
        _only_raw(out, fmt)
        return Output(name, uri, "network", "raw")
    path = pathlib.Path(out)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as failure:
        raise errors.system_error(failure, f"cannot write {out}") from failure
    if stat.S_ISBLK(mode):
        _only_raw(out, fmt)
        return Output(name, out, "block", "raw")
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise _invalid(f"{out} is {what}, and a disk goes into a file")
    if out.endswith("/"):
        raise _invalid(f"{out} is the name of a directory, and a disk goes into a file")
    guessed: copy.Format = "raw" if path.suffix in _RAW_NAMES else "qcow2"
    # Not the link to a file but the file is to be another one.
    return Output(name, str(path.resolve() if path.exists() else path), "file", fmt or guessed)


def _only_raw(out: str, fmt: copy.Format | None) -> None:
    if fmt not in (None, "raw"):
        raise _invalid(f"{out} gets the disk as it is: there is no format {fmt} to it")


def _check_output(output: Output, backups: listing.Backups, force: bool) -> None:
    """Errors: it is there, or it is a file of the backups."""
    if output.type == "network":
        return
    path = output.path
    if not os.path.lexists(path):
        return
    for own in backups.files():
        if listing.is_same(path, own) or (
            output.type == "block" and device.has_bytes_of(path, own)
        ):
            raise _invalid(f"{path} is a file of the backups themselves")
    if not force:
        raise _invalid(f"{path} exists already; --force overwrites it")
    if output.type == "file":
        if not os.path.isfile(path):  # noqa: PTH113  (nor what it leads to where that is not seen)
            raise _invalid(f"{path} is not a file")
        with _opened(path) as fd:
            if fd is not None and (_is_locked(fd, _QEMUS) or _is_open_in_a_qemu(fd)):
                raise _invalid(f"{path} is in use by a QEMU")


def _invalid(text: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_OPERATION_INVALID, text)


def _make(directory: pathlib.Path, undo: contextlib.ExitStack) -> None:
    """Make DIRECTORY where it is absent; UNDO removes what was made."""
    try:
        chain.make(directory, undo)
    except OSError as failure:
        raise errors.system_error(failure, f"cannot make {directory}") from failure


# --- who has a file -------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[int | None]:
    """A descriptor of the file at PATH; None where it cannot be opened."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):  # a FUSE file system that is gone; nothing was written
            os.close(fd)


def _is_locked(fd: int, part: tuple[int, int]) -> bool:
    """Whether somebody else has a lock on PART, (start, length), of the file; not where its file
    system does not tell."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *part, 0)
    try:
        told = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    except OSError:
        return False
    return bool(struct.unpack(_FLOCK, told)[0] != fcntl.F_UNLCK)


def _is_open_in_a_qemu(fd: int) -> bool:
    """Whether a QEMU has the file open, with no lock on it: it was told to have none
    (``file.locking=off``), or the file system has none. By its number first, which asks no other
    file system, as one that hangs."""
    own = os.fstat(fd)
    number = f"\nino:\t{own.st_ino}\n"
    for _, entry in device.in_qemus():
        with contextlib.suppress(OSError):
            told = (entry.parents[1] / "fdinfo" / entry.name).read_text()
            if number in told and os.path.samestat(entry.stat(), own):
                return True
    return False


def _hold(path: pathlib.Path, held: contextlib.ExitStack) -> None:
    """Keep other restores from the file at PATH, which was just made, until HELD is closed.
    Errors: one was faster."""
    fd = held.enter_context(_opened(path))
    if fd is None:
        return
    try:
        lock = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *_OURS, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    except OSError as failure:
        if failure.errno in _BUSY:
            raise _invalid(f"{path} is being written by another restore") from failure


# --- one disk -------------------------------------------------------------------------------------


def _make_room(output: Output, force: bool) -> None:
    """Remove what a killed restore has left of OUTPUT. Errors: it is not to be removed."""
    partial = output.partial
    if output.type != "file" or not os.path.lexists(partial):
        return
    if not force:
        raise _invalid(
            f"{partial} exists already: another restore runs, or was killed; --force removes it"
        )
    with _opened(partial) as fd:
        for is_last in (False, True):
            if fd is not None and _is_locked(fd, _OURS):
                raise _invalid(f"{partial} is being written by another restore")
            if not is_last:
                time.sleep(_JUST_MADE)
        if chain.is_locked(partial.parent):
            raise _invalid(f"{partial} is there, and a backup is pulled into {partial.parent}")
        _remove(partial)


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _restore(
    links: Sequence[listing.Link],
    output: Output,
    index: int,
    force: bool,
    held: contextlib.ExitStack,
    undo: contextlib.ExitStack,
    progress: copy.Progress | None,
    cancel: copy.Cancel,
) -> Restored:
    """UNDO removes the file, once it is this restore's own, and only then."""
    opened: target.Target | None = None

    def open_target(size: int) -> target.Target:
        nonlocal opened
        opened = made = _open(output, size, force, cancel)
        if output.type == "file":
            _hold(output.partial, held)
            undo.callback(_remove, output.partial)
        return made

    try:
        made = merge(links, open_target, progress=progress, index=index, cancel=cancel)
    except errors.Error as failure:
        if output.type == "file" or opened is None:
            raise
        text = f"{failure} (what {output.place} has now is not the disk)"
        raise errors.Error(failure.get_error_code(), text) from failure
    size = links[0].disk.size
    durable = not isinstance(opened, destination.Server) or opened.makes_durable
    return Restored(output, size, made.stored, made.read, made.checksum, durable)


def _open(output: Output, size: int, force: bool, cancel: copy.Cancel) -> target.Target:
    match output.type:
        case "network":
            return destination.Server(output.place, size, overwrite=force, cancel=cancel)
        case "block":
            return device.Device(output.path, size)
    if output.format == "raw":
        return target.Raw(output.partial, size)
    return writer.QemuWriter(output.partial, size)


def _finish(outputs: Sequence[Output]) -> None:
    """Give the files, all of which are good and on the medium, their names.

    Errors: one of them cannot have it. What has come to be new by then is removed again, and what
    has taken the place of another file is told of.
    """
    files = [output for output in outputs if output.type == "file"]
    replaced = []
    with contextlib.ExitStack() as undo:
        try:
            for output in files:
                is_new = not os.path.lexists(output.path)
                output.partial.rename(output.path)
                if is_new:
                    undo.callback(_remove, output.path)
                else:
                    replaced.append(output.place)
            for directory in {output.path.parent for output in files}:
                chain.sync_names(directory)
        except OSError:
            told = f", which has replaced {' and '.join(replaced)}," if replaced else ""
            with chain.naming(f"cannot finish the restore{told} in", files[0].path.parent):
                raise
        undo.pop_all()
