# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's root file system: busybox, this machine's Python and the writer, as one cpio archive.

The guest runs the same Python as we do, so no compiler is needed and both sides share
``demo.records``. Format: "newc" (Linux, Documentation/driver-api/early-userspace/buffer-format).
"""

import pathlib
import re
import stat
import subprocess
import sysconfig

from demo import kernel

PYTHON = pathlib.Path("/usr/bin/python3")
_LIBRARY = re.compile(r"(/\S+) \(0x")
_INIT = """#!/bin/busybox sh
export PATH=/bin PYTHONDONTWRITEBYTECODE=1
for dir in proc sys dev; do busybox mkdir -p /$dir; done
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
for module in $(busybox cat /modules); do busybox insmod /lib/modules/$module; done
"""


def build(linux: kernel.Kernel) -> bytes:
    """The archive for a guest with LINUX."""
    files = {}
    here = pathlib.Path(__file__).parent
    for name in ("__init__.py", "records.py", "writer.py"):
        files[f"/demo/{name}"] = (here / name).read_bytes()
    for path in _python_files():
        files[str(path)] = path.read_bytes()
    command = f"{PYTHON.resolve()} -E -s -S -c 'from demo import writer; writer.main()'"
    return build_for(linux, files, f"exec {command}")


def build_for(linux: kernel.Kernel, files: dict[str, bytes], script: str) -> bytes:
    """The archive for a guest with LINUX and FILES that runs SCRIPT in busybox's shell."""
    files = {**files, "/bin/busybox": linux.busybox.read_bytes()}
    for module in linux.modules:
        files[f"/lib/modules/{module.name}"] = module.read_bytes()
    files["/modules"] = "\n".join(module.name for module in linux.modules).encode()
    files["/init"] = (_INIT + script + "\n").encode()
    return _cpio(files)


def _python_files() -> set[pathlib.Path]:
    """The interpreter, its shared libraries, and the standard modules the writer imports."""
    script = (
        "import sys\nfrom demo import writer\n"
        "for module in list(sys.modules.values()):\n"
        "    print(getattr(module, '__file__', None) or '')"
    )
    output = subprocess.run(
        [PYTHON, "-E", "-s", "-S", "-c", script],
        cwd=pathlib.Path(__file__).parent.parent, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    modules = {pathlib.Path(line) for line in output.splitlines() if line}
    modules = {path for path in modules if root in path.parents} | {root / "os.py"}
    binaries = {PYTHON.resolve()} | {path for path in modules if ".so" in path.suffixes}
    return modules | binaries | {lib for binary in binaries for lib in libraries(binary)}


def libraries(binary: pathlib.Path) -> list[pathlib.Path]:
    """The shared libraries that a program loads, by this machine's."""
    output = subprocess.run(["ldd", binary], check=True, capture_output=True, text=True).stdout
    return [pathlib.Path(found) for found in _LIBRARY.findall(output)]


def _cpio(files: dict[str, bytes]) -> bytes:
    """FILES by absolute name, all executable, with every directory that leads to one."""
    directories = {parent for name in files for parent in pathlib.PurePath(name).parents}
    entries = [(str(path), stat.S_IFDIR | 0o755, b"") for path in directories]
    entries += [(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    entries.sort()
    entries = [entry for entry in entries if entry[0] != "/"]
    archive = b"".join(_entry(i, name, mode, data) for i, (name, mode, data) in enumerate(entries))
    return archive + _entry(0, "/TRAILER!!!", 0, b"")


def _entry(inode: int, name: str, mode: int, data: bytes) -> bytes:
    path = name.lstrip("/").encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
