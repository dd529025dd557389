# SPDX-License-Identifier: LGPL-2.1-or-later
"""This host, as libvirt tells it (virhostcpu.c, virhostmem.c), by /proc and /sys."""

import contextlib
import os
import pathlib
import re

from virtbackup import runtime

NodeInfo = tuple[str, int, int, int, int, int, int, int]
"""As ``QueryDriver.node_get_info``."""


def arch() -> str:
    """What the processors are."""
    return os.uname().machine


def node_info(root: pathlib.Path = pathlib.Path("/")) -> NodeInfo:
    """The host whose /proc and /sys are below ROOT; as one NUMA node, whatever it has."""
    cpus = _cpus(root)
    sockets, cores, threads = _topology(cpus)
    return arch(), _memory_kib(root), len(cpus), _mhz(root), 1, sockets, cores, threads


def cpu_time(pid: int) -> int | None:
    """Nanoseconds of processor time that a process has used; None where there is none (proc(5))."""
    if not (fields := runtime.stat_of(pid)):
        return None
    return (int(fields[11]) + int(fields[12])) * 10**9 // os.sysconf("SC_CLK_TCK")


def _cpus(root: pathlib.Path) -> list[tuple[int, int]]:
    """(socket, core) of each processor that is online; 0 where that is not told."""
    found = []
    for path in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*")):
        if _number(path / "online", 1):
            topology = path / "topology"
            found.append((_number(topology / "physical_package_id"), _number(topology / "core_id")))
    return found or [(0, core) for core in range(os.cpu_count() or 1)]


def _topology(cpus: list[tuple[int, int]]) -> tuple[int, int, int]:
    """(sockets, cores of each, threads of each of those): they multiply to all CPUS, which are
    cores of one socket where they are not all alike."""
    sockets = len({socket for socket, _ in cpus})
    cores = max(len({core for s, core in cpus if s == socket}) for socket, _ in cpus)
    threads = max(cpus.count(cpu) for cpu in cpus)
    if sockets * cores * threads != len(cpus):
        return 1, len(cpus), 1
    return sockets, cores, threads


def _mhz(root: pathlib.Path) -> int:
    """Of one of the processors, all in whole MHz; 0 where it is not told."""
    found = re.search(r"^cpu MHz\s*:\s*(\d+)", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return int(found[1]) if found else 0


def _memory_kib(root: pathlib.Path) -> int:
    """What the NUMA nodes have, as libvirt counts it; without any, what the kernel has."""
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*/meminfo"))
    return sum(map(_mem_total, nodes)) or _mem_total(root / "proc/meminfo")


def _mem_total(path: pathlib.Path) -> int:
    found = re.search(r"MemTotal:\s*(\d+) kB", _read(path))
    return int(found[1]) if found else 0


def _number(path: pathlib.Path, otherwise: int = 0) -> int:
    with contextlib.suppress(ValueError):
        return int(_read(path))
    return otherwise


def _read(path: pathlib.Path) -> str:
    """What is in a file; nothing, where there is none."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""
