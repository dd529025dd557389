# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a start takes: ours against libvirt's own backupBegin, called from one process.

All back up two 64 MiB disks (qcow2 and raw) of an idle guest of the same QEMU: ours over a QMP
socket, ours over libvirt, and libvirt's own, the latter two on the same domain. A start counts from
the call until an NBD client has been greeted by both exports. Needs root: libvirtd is one of its
own, the system's is neither used nor seen.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import libvirt
import nbd

import virtbackup
from tests.live import libvirtd, machines

SIZE = 64 << 20
LABELS = ("virtbackup by QMP", "virtbackup by libvirt", "libvirt backupBegin")


def main() -> int:
    """Print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--paused", action="store_true", help="guests that do not run")
    options = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("libvirtd"):
        print("start latency: not measured (needs root and libvirtd)")
        return 0
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        rounds = _measure(pathlib.Path(name), options.runs, options.paused)
    for label, times in zip(LABELS, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(own / one[-1] for own, one in zip(times, rounds, strict=True))
        print(
            f"{label:22} median {1e3 * statistics.median(times):6.1f} ms"
            f"  min {1e3 * min(times):6.1f}  max {1e3 * max(times):6.1f}  ratio {ratio:.2f}"
        )
    print(f"{options.runs} rounds, two disks; the ratio is the median of those to libvirt's own")
    return 0


def _measure(directory: pathlib.Path, runs: int, paused: bool) -> Sequence[tuple[float, ...]]:
    extra = ["-S"] if paused else []
    for name in ("daemon", "images", "state"):
        (directory / name).mkdir()
    os.environ["VIRTBACKUP_STATE_DIR"] = str(directory / "state")
    with (
        libvirtd.host(directory / "daemon", directory / "images") as host,
        _peer(host, paused) as peer,
        machines.two_disks(directory, *extra) as machine,
        virtbackup.open(machine.uri) as conn,
        virtbackup.open(host.daemon.uri) as by_libvirt,
    ):
        dom, same = conn.lookupByID(1), by_libvirt.lookupByName("peer")
        ours, theirs = directory / "ours.sock", directory / "theirs.sock"
        proposal = f'<domainbackup><address type="unix" path="{ours}"/></domainbackup>'
        native = (
            f"<domainbackup mode='pull'><server transport='unix' socket='{theirs}'/></domainbackup>"
        )
        return [
            (
                _timed(lambda: dom.backupStart(proposal), dom.backupStop, ours),
                _timed(lambda: same.backupStart(proposal), same.backupStop, ours),
                _timed(lambda: peer.backupBegin(native, None), lambda: _abort(peer), theirs),
            )
            for _ in range(runs + 1)
        ][1:]


def _timed(start: Callable[[], object], stop: Callable[[], object], path: pathlib.Path) -> float:
    begin = time.perf_counter()
    start()
    for export in ("vda", "sdb"):
        client = nbd.NBD()
        client.set_export_name(export)
        client.connect_unix(str(path))
        client.shutdown()
    took = time.perf_counter() - begin
    stop()
    return took


def _abort(domain: "libvirt.virDomain") -> None:
    domain.abortJob()
    deadline = time.monotonic() + 10
    while domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
        assert time.monotonic() < deadline


@contextlib.contextmanager
def _peer(host: libvirtd.Host, paused: bool) -> Iterator["libvirt.virDomain"]:
    a = machines.image(host.path("a.qcow2"), SIZE, "qcow2")
    b = machines.image(host.path("b.raw"), SIZE)
    disks = libvirtd.disk_xml("vda", a) + libvirtd.disk_xml("sdb", b, "raw")
    with host.domain("peer", disks) as domain:
        if paused:
            domain.libvirt.suspend()
        yield domain.libvirt


if __name__ == "__main__":
    sys.exit(main())
