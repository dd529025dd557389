# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon with 1,000 domains and 200 clients that say nothing, against libvirtd's test driver.

libvirt-python asks both, over unix sockets, in turns. Ours serves a driver that has its domains in
memory, as libvirt's test driver has, so what is measured is the daemon and no hypervisor. Memory is
what is resident. Needs root: libvirtd is one of its own, the system's is neither used nor seen.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import libvirt

from tests.live import libvirtd
from virtbackup import hypervisor
from virtbackup.tools import virtbackupd

SCHEME = "bench"


class Domains:
    """A driver of domains that do nothing; they are found by a hook, as libvirt's are."""

    def __init__(self, count: int) -> None:
        self._refs = [hypervisor.DomainRef(f"vm-{n}", _uuid(n), n + 1) for n in range(count)]
        self._by = {
            "name": {ref.name: ref for ref in self._refs},
            "uuid": {ref.uuid: ref for ref in self._refs},
        }

    def close(self) -> None:
        pass

    def get_type(self) -> str:
        return "BENCH"

    def get_version(self) -> int:
        return 1000000

    def is_alive(self) -> bool:
        return True

    def set_trace(self, trace: TextIO | None) -> None:
        pass

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        return self._refs

    def domain_lookup(self, **wanted: str) -> hypervisor.DomainRef | None:
        [(field, value)] = wanted.items()
        return self._by[field].get(value)

    def domain_get_state(self, domain: hypervisor.DomainRef) -> tuple[int, int]:
        return libvirt.VIR_DOMAIN_RUNNING, 0

    def domain_get_xml_desc(self, domain: hypervisor.DomainRef, flags: int) -> str:
        return f"<domain><name>{domain.name}</name><uuid>{domain.uuid}</uuid></domain>"


def _uuid(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, str(number)))


_TEST_DOMAIN = (
    "<domain type='test'><name>vm-{n}</name><uuid>{uuid}</uuid><memory>65536</memory>"
    "<os><type>hvm</type></os></domain>"
)


def main() -> int:
    """Print memory, medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--serve", metavar="SOCKET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        hypervisor.register(SCHEME, lambda uri, readonly: Domains(options.domains))
        return virtbackupd.main(["--uri", f"{SCHEME}:///", "--listen", f"unix:{options.serve}"])
    if os.geteuid() != 0 or not shutil.which("libvirtd"):
        print("daemon: not measured (needs root and libvirtd)")
        return 0
    libvirt.registerErrorHandler(lambda *_: None, None)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        _measure(pathlib.Path(name), options)
    return 0


@contextlib.contextmanager
def _ours(directory: pathlib.Path, count: int) -> Iterator[tuple[str, int]]:
    socket = directory / "ours.sock"
    argv = [sys.executable, "-m", "bench.daemon", "--domains", str(count), "--serve", str(socket)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"virtbackupd: listening on ")
        try:
            yield f"qemu:///system?socket={socket}", process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def _theirs(directory: pathlib.Path, count: int) -> Iterator[tuple[str, int]]:
    directory.chmod(0o755)
    (directory / "libvirtd").mkdir()
    domains = (_TEST_DOMAIN.format(n=n, uuid=_uuid(n)) for n in range(count))
    node = directory / "node.xml"
    node.write_text(f"<node>{''.join(domains)}</node>")
    with libvirtd.running(directory / "libvirtd") as daemon:
        pid = int((daemon.directory / "libvirtd.pid").read_text())
        yield f"test+unix://{node}?socket={daemon.socket}", pid


def _rss(pid: int) -> float:
    """MiB."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _measure(directory: pathlib.Path, options: argparse.Namespace) -> None:
    with (
        _ours(directory, options.domains) as ours,
        _theirs(directory, options.domains) as theirs,
        contextlib.ExitStack() as connections,
    ):
        both = (ours, theirs)
        active = [_connect(connections, uri) for uri, _ in both]
        for connection in active:
            assert len(connection.listAllDomains()) == options.domains
        before = [_rss(pid) for _, pid in both]
        # A connection to a node of libvirt's test driver has its own copy of all domains, which is
        # not what is to be compared; those to the default node share that.
        for uri in (ours[0], theirs[0].replace(f"{directory}/node.xml", "/default")):
            for _ in range(options.clients):
                _connect(connections, uri)
        after = [_rss(pid) for _, pid in both]
        print(f"{options.domains} domains, {options.clients} idle clients, {options.runs} rounds")
        print(f"{'':34}{'virtbackupd':>14}{'libvirtd':>14}{'ratio':>8}")
        _line("resident, MiB", before, 1)
        per_client = [
            1024 * (late - early) / options.clients
            for early, late in zip(before, after, strict=True)
        ]
        _line("for each idle client, KiB", per_client, 1)
        for label, what in _questions(options.domains):
            _line(f"{label}, ms", _medians(active, what, options.runs), 2)
        rates = [_rate(uri, connections) for uri, _ in both]
        _line("lookups by 8 clients, 1/s", rates, 0)
        _line("resident at the end, MiB", [_rss(pid) for _, pid in both], 1)


def _connect(stack: contextlib.ExitStack, uri: str) -> "libvirt.virConnect":
    connection = libvirt.open(uri)
    stack.callback(connection.close)
    return connection


def _questions(count: int) -> Sequence[tuple[str, Callable[["libvirt.virConnect"], object]]]:
    last = f"vm-{count - 1}"
    return (
        ("list all", lambda conn: conn.listAllDomains()),
        ("list those that run", lambda conn: conn.listAllDomains(
            libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING)),
        ("look up by name", lambda conn: conn.lookupByName(last)),
        ("look up by uuid", lambda conn: conn.lookupByUUIDString(_uuid(count - 1))),
        ("look up by id", lambda conn: conn.lookupByID(count)),
    )  # fmt: skip


def _medians(
    connections: "Sequence[libvirt.virConnect]",
    what: Callable[["libvirt.virConnect"], object],
    runs: int,
) -> list[float]:
    times: list[list[float]] = [[] for _ in connections]
    for _ in range(runs):
        for connection, taken in zip(connections, times, strict=True):
            begun = time.perf_counter()
            what(connection)
            taken.append(1e3 * (time.perf_counter() - begun))
    return [statistics.median(taken) for taken in times]


def _rate(uri: str, stack: contextlib.ExitStack, clients: int = 8, each: int = 200) -> float:
    """Calls in a second, of CLIENTS at once."""
    connections = [_connect(stack, uri) for _ in range(clients)]

    def ask(connection: "libvirt.virConnect") -> None:
        for number in range(each):
            connection.lookupByName(f"vm-{number}")

    threads = [threading.Thread(target=ask, args=(one,)) for one in connections]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients * each / (time.perf_counter() - begun)


def _line(label: str, values: Sequence[float], digits: int) -> None:
    ours, theirs = values
    ratio = f"{ours / theirs:8.2f}" if theirs else ""
    print(f"{label:34}{ours:14.{digits}f}{theirs:14.{digits}f}{ratio}")


if __name__ == "__main__":
    sys.exit(main())
