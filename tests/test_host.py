# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host's numbers, from what Linux says of it."""

import os
import pathlib

import pytest

from virtbackup.conf import capabilities_conf, xml
from virtbackup.qemu import host


def made(
    root: pathlib.Path, cpus: list[tuple[int, int]], nodes: int, offline: int | None = None
) -> pathlib.Path:
    """/proc and /sys of a host with CPUS: (socket, core); NODES have 1000 kB each."""
    for number, (socket, core) in enumerate(cpus):
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{socket}\n")
        (topology / "core_id").write_text(f"{core}\n")
        (topology.parent / "online").write_text(f"{int(number != offline)}\n")
    (root / "sys/devices/system/cpu/cpufreq").mkdir(exist_ok=True, parents=True)
    for number in range(nodes):
        node = root / f"sys/devices/system/node/node{number}"
        node.mkdir(parents=True)
        (node / "meminfo").write_text(f"Node {number} MemTotal:      1000 kB\n")
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text("MemTotal:       5000 kB\nMemFree: 1 kB\n")
    (root / "proc/cpuinfo").write_text("processor\t: 0\ncpu MHz\t\t: 2596.134\n")
    return root


@pytest.mark.parametrize(
    ("cpus", "offline", "expected"),
    [
        ([(0, 0)], None, (1, 1, 1, 1)),
        ([(0, 0), (0, 1)], None, (2, 1, 2, 1)),
        ([(0, 0), (0, 0), (0, 1), (0, 1)], None, (4, 1, 2, 2)),
        ([(0, 0), (1, 0), (0, 1), (1, 1)], None, (4, 2, 2, 1)),
        ([(0, 0), (0, 0), (0, 1), (0, 1)], 3, (3, 1, 3, 1)),
        ([(0, 0), (0, 1), (1, 0)], None, (3, 1, 3, 1)),
    ],
)
def test_processors(
    cpus: list[tuple[int, int]],
    offline: int | None,
    expected: tuple[int, ...],
    tmp_path: pathlib.Path,
) -> None:
    """They multiply to all of them."""
    arch, memory, count, mhz, nodes, *topology = host.node_info(made(tmp_path, cpus, 2, offline))
    assert (count, *topology) == expected
    assert (arch, memory, mhz, nodes) == (os.uname().machine, 2000, 2596, 1)


def test_a_host_that_tells_little(tmp_path: pathlib.Path) -> None:
    assert host.node_info(made(tmp_path / "memory", [], 0))[1] == 5000
    _, memory, cpus, mhz, nodes, sockets, cores, threads = host.node_info(tmp_path / "nothing")
    assert (memory, mhz, nodes) == (0, 0, 1)
    assert cpus == sockets * cores * threads == os.cpu_count()


def test_processor_time() -> None:
    first = host.cpu_time(os.getpid())
    assert first is not None
    while host.cpu_time(os.getpid()) == first:
        pass
    assert host.cpu_time(0) is None


def test_capabilities() -> None:
    root = xml.parse(capabilities_conf.Capabilities("x86_64").format(), "capabilities")
    assert root.findtext("host/cpu/arch") == "x86_64"
