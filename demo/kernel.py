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
from collections.abc import Callable, Iterable

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "guest"
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod")
_KERNEL = re.compile(r"linux-image-\d\S*-cloud-amd64")
_MODULE = re.compile(r"\.ko(\.xz|\.zst)?$")
_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")


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

    def keep(tar: tarfile.TarFile, kept: pathlib.Path) -> None:
        _keep_kernel(tar, kept, (*DRIVERS, *more))

    linux = _cached(f"linux-image-*-cloud-amd64_*{suffix}") or _download(
        _kernel_package, keep, suffix
    )
    busybox = fetch_program("busybox-static", "bin/busybox")
    order = (linux / "modules").read_text().split()
    return Kernel(linux / "vmlinuz", tuple(linux / name for name in order), busybox)


def fetch_program(package: str, path: str) -> pathlib.Path:
    """A program whose name in a PACKAGE ends with PATH. Raises Unavailable."""
    name = pathlib.PurePath(path).name

    def keep(tar: tarfile.TarFile, kept: pathlib.Path) -> None:
        for member in tar:
            if member.isfile() and member.name.endswith(path):
                (kept / name).write_bytes(_read(tar, member))

    return (_cached(f"{package}_*") or _download(lambda: package, keep)) / name


def _cached(pattern: str) -> pathlib.Path | None:
    return max(CACHE.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def _download(
    package: Callable[[], str],
    keep: Callable[[tarfile.TarFile, pathlib.Path], None],
    suffix: str = "",
) -> pathlib.Path:
    """Fetch a package, KEEP what is wanted of it; the directory it is in, SUFFIX to its name."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".new-") as name:
        work = pathlib.Path(name)
        archive = _fetch_archive(package, work)
        kept = work / (archive.stem + suffix)
        kept.mkdir()
        files = _run("dpkg-deb", "--fsys-tarfile", str(archive))
        with tarfile.open(fileobj=io.BytesIO(files)) as tar:
            keep(tar, kept)
        with contextlib.suppress(OSError):  # another run was faster
            kept.rename(CACHE / kept.name)
    return CACHE / kept.name


def _fetch_archive(package: Callable[[], str], directory: pathlib.Path) -> pathlib.Path:
    """Download the package; when the lists are missing or too old, refresh them and try again."""
    try:
        _run("apt-get", "-q", "download", package(), cwd=directory)
    except Unavailable:
        _run(*_as_root(), "apt-get", "-q", "update")
        _run("apt-get", "-q", "download", package(), cwd=directory)
    return next(directory.glob("*.deb"))


def _kernel_package() -> str:
    text = _run("apt-cache", "depends", "linux-image-cloud-amd64").decode()
    if found := _KERNEL.search(text):
        return found[0]
    raise Unavailable("apt knows no linux-image-cloud-amd64")


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


def _keep_kernel(tar: tarfile.TarFile, kept: pathlib.Path, drivers: Iterable[str]) -> None:
    modules = {}
    for member in tar:
        name = pathlib.PurePath(member.name).name
        if name.startswith("vmlinuz-"):
            (kept / "vmlinuz").write_bytes(_read(tar, member))
        elif _MODULE.search(name):
            modules[_MODULE.sub("", name).replace("-", "_")] = member
    order: dict[str, bytes] = {}
    for driver in drivers:
        _resolve(driver, lambda name: _unpack(tar, modules.get(name)), order)
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


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes | None:
    if member is None:
        return None
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
