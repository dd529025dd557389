# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's own kernel and busybox, fetched by apt-get and unpacked beside us, never installed.

Only what the guest needs is kept, in .cache/guest/PACKAGE_VERSION; a second run asks nobody.
"""

import contextlib
import dataclasses
import io
import lzma
import os
import pathlib
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "guest"
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod")
_KERNEL = re.compile(r"linux-image-\d\S*-cloud-amd64")
_KERNEL_PARTS = re.compile(r"Depends: (linux-(?:binary|modules)-\d\S*-cloud-amd64)")
_MODULE = re.compile(r"\.ko(\.xz|\.zst)?$")
_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")
COMMAND_LINE = "console=ttyS0 quiet loglevel=3 panic=-1 no_timer_check"
"""A kernel that finds no timer, as its emulator was not let run for a moment, is not to panic."""


class Unavailable(Exception):
    """The packages are not in the cache and cannot be fetched."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The files a guest boots with."""

    image: pathlib.Path
    modules: tuple[pathlib.Path, ...]
    """Not compressed, in the order to load them."""
    busybox: pathlib.Path


def fetch(more: tuple[str, ...] = ()) -> Kernel:
    """The kernel from the cache, else from the package archive; with MORE drivers.

    Raises Unavailable.
    """
    suffix = "".join(f"+{name}" for name in more)

    def keep(tars: Sequence[tarfile.TarFile], kept: pathlib.Path) -> None:
        _keep_kernel(tars, kept, (*DRIVERS, *more))

    linux = _cached(f"linux-image-*-cloud-amd64_*{suffix}") or _download(
        _kernel_packages, keep, suffix
    )
    busybox = fetch_program("busybox-static", "bin/busybox")
    order = (linux / "modules").read_text().split()
    return Kernel(linux / "vmlinuz", tuple(linux / name for name in order), busybox)


def fetch_program(package: str, path: str) -> pathlib.Path:
    """A program whose name in a PACKAGE ends with PATH. Raises Unavailable."""
    name = pathlib.PurePath(path).name

    def keep(tars: Sequence[tarfile.TarFile], kept: pathlib.Path) -> None:
        [tar] = tars
        for member in tar:
            if member.isfile() and member.name.endswith(path):
                (kept / name).write_bytes(_read(tar, member))

    return (_cached(f"{package}_*") or _download(lambda: [package], keep)) / name


def _cached(pattern: str) -> pathlib.Path | None:
    return max(CACHE.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def _download(
    packages: Callable[[], Sequence[str]],
    keep: Callable[[Sequence[tarfile.TarFile], pathlib.Path], None],
    suffix: str = "",
) -> pathlib.Path:
    """Fetch packages, KEEP what is wanted of them; the directory it is in, which has the name of
    the first, and SUFFIX."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".new-") as name:
        work = pathlib.Path(name)
        archives = _fetch_archives(packages, work)
        kept = work / (archives[0].stem + suffix)
        kept.mkdir()
        with contextlib.ExitStack() as stack:
            files = (_run("dpkg-deb", "--fsys-tarfile", str(archive)) for archive in archives)
            keep([stack.enter_context(tarfile.open(fileobj=io.BytesIO(f))) for f in files], kept)
        with contextlib.suppress(OSError):  # another run was faster
            kept.rename(CACHE / kept.name)
    return CACHE / kept.name


def _fetch_archives(
    packages: Callable[[], Sequence[str]], directory: pathlib.Path
) -> list[pathlib.Path]:
    """Download the packages; when the lists are missing or too old, refresh them and try again."""
    try:
        wanted = packages()
        _run("apt-get", "-q", "download", *wanted, cwd=directory)
    except Unavailable:
        _run(*_as_root(), "apt-get", "-q", "update")
        wanted = packages()
        _run("apt-get", "-q", "download", *wanted, cwd=directory)
    return [next(directory.glob(f"{package}_*.deb")) for package in wanted]


def _kernel_packages() -> list[str]:
    """The kernel's package; from Debian 14 on its files are in others, which that depends on."""
    found = _KERNEL.search(_run("apt-cache", "depends", "linux-image-cloud-amd64").decode())
    if found is None:
        raise Unavailable("apt knows no linux-image-cloud-amd64")
    parts = _KERNEL_PARTS.findall(_run("apt-cache", "depends", found[0]).decode())
    return [found[0], *parts]


def _as_root() -> Iterable[str]:
    return () if os.geteuid() == 0 else ("sudo", "-n")


def _run(*argv: str, cwd: pathlib.Path | None = None) -> bytes:
    env = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(argv, cwd=cwd, env=env, check=True, capture_output=True).stdout
    except FileNotFoundError as error:
        raise Unavailable(f"{argv[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(argv)}: {error.stderr.decode().strip()}") from error


def _keep_kernel(
    tars: Sequence[tarfile.TarFile], kept: pathlib.Path, drivers: Iterable[str]
) -> None:
    image = kept / "vmlinuz"
    modules = {}
    for tar in tars:
        for member in filter(tarfile.TarInfo.isfile, tar):
            name = pathlib.PurePath(member.name).name
            if name == image.name or name.startswith(f"{image.name}-"):
                image.write_bytes(_read(tar, member))
            elif _MODULE.search(name):
                modules[_MODULE.sub("", name).replace("-", "_")] = tar, member
    if not image.exists():
        raise Unavailable(f"no kernel is in {kept.name}, nor in what it depends on")
    order: dict[str, bytes] = {}
    for driver in drivers:
        _resolve(driver, lambda name: _unpack(*modules[name]) if name in modules else None, order)
    for name, module in order.items():
        (kept / name).write_bytes(module)
    (kept / "modules").write_text("\n".join(order))


def _resolve(name: str, load: Callable[[str], bytes | None], order: dict[str, bytes]) -> None:
    """Put the module NAME into ORDER, behind those it depends on; built-in ones have no file."""
    if name in order or (module := load(name)) is None:
        return
    if found := _DEPENDS.search(module):
        for other in found[1].decode().replace("-", "_").split(","):
            _resolve(other, load, order)
    order[name] = module


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    module = _read(tar, member)
    if member.name.endswith(".xz"):
        return lzma.decompress(module)
    if member.name.endswith(".zst"):
        return subprocess.run(["zstd", "-dc"], input=module, check=True, capture_output=True).stdout
    return module


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    with file:
        return file.read()
