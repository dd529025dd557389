# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a start takes: ours against libvirt's own backupBegin, called from one process.

Both back up two 64 MiB disks (qcow2 and raw) of an idle guest of the same QEMU; a start counts from
the call until an NBD client has been greeted by both exports. Needs root: libvirtd runs in
a mount namespace of its own, so the system's is neither used nor seen.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import libvirt
import nbd

import virtbackup
from tests.live import machines

_PRIVATE = ("/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
_INSIDE = "VIRTBACKUP_BENCH_NAMESPACE"

_DOMAIN = """
<domain type='qemu'>
  <name>peer</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
      <source file='{0}/peer-a.qcow2'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/>
      <source file='{0}/peer-b.raw'/><target dev='sdb' bus='scsi'/></disk>
    <controller type='scsi' model='virtio-scsi'/>
  </devices>
</domain>"""


def main() -> int:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--paused", action="store_true", help="guests that do not run")
    options = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("libvirtd"):
        print("start latency: not measured (needs root and libvirtd)")
        return 0
    if _INSIDE not in os.environ:
        argv = ["unshare", "--mount", sys.executable, "-m", "bench.start_latency", *sys.argv[1:]]
        return subprocess.call(argv, env={**os.environ, _INSIDE: "1"})
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = _measure(pathlib.Path(name), options.runs, options.paused)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    for label, times in (("virtbackup backupStart", ours), ("libvirt backupBegin", theirs)):
        print(
            f"{label:24} median {1e3 * statistics.median(times):6.1f} ms"
            f"  min {1e3 * min(times):6.1f}  max {1e3 * max(times):6.1f}"
        )
    print(f"ratio, median of pairs   {ratio:.2f}   ({options.runs} pairs, two disks)")
    return 0


def _measure(directory: pathlib.Path, runs: int, paused: bool) -> tuple[list[float], list[float]]:
    extra = ["-S"] if paused else []
    with (
        _libvirtd(directory),
        _peer(directory, paused) as peer,
        machines.two_disks(directory, *extra) as machine,
        virtbackup.open(machine.uri) as conn,
    ):
        dom = conn.lookupByID(1)
        ours, theirs = directory / "ours.sock", directory / "theirs.sock"
        proposal = f'<domainbackup><address type="unix" path="{ours}"/></domainbackup>'
        native = (
            f"<domainbackup mode='pull'><server transport='unix' socket='{theirs}'/></domainbackup>"
        )
        pairs = [
            (
                _timed(lambda: dom.backupStart(proposal), dom.backupStop, ours),
                _timed(lambda: peer.backupBegin(native, None), lambda: _abort(peer), theirs),
            )
            for _ in range(runs + 1)
        ][1:]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


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


def _abort(domain: libvirt.virDomain) -> None:
    domain.abortJob()
    deadline = time.monotonic() + 10
    while domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
        assert time.monotonic() < deadline


@contextlib.contextmanager
def _peer(directory: pathlib.Path, paused: bool) -> Iterator[libvirt.virDomain]:
    machines.image(directory / "peer-a.qcow2", 64 << 20, "qcow2")
    machines.image(directory / "peer-b.raw", 64 << 20)
    connection = libvirt.open("qemu:///system")
    flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
    domain = connection.createXML(_DOMAIN.format(directory), flags)
    try:
        yield domain
    finally:
        domain.destroy()
        connection.close()


@contextlib.contextmanager
def _libvirtd(directory: pathlib.Path) -> Iterator[None]:
    """A libvirtd that shares nothing with the system's but the programs."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for path in _PRIVATE:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    etc = directory / "etc"
    etc.mkdir()
    (etc / "qemu.conf").write_text(
        'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nstdio_handler = "file"\n'
        "remember_owner = 0\n"
    )
    (etc / "libvirtd.conf").write_text('auth_unix_rw = "none"\n')
    subprocess.run(["mount", "--bind", str(etc), "/etc/libvirt"], check=True)
    with (directory / "libvirtd.log").open("wb") as log:
        daemon = subprocess.Popen(["libvirtd"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not pathlib.Path("/run/libvirt/libvirt-sock").is_socket():
            assert daemon.poll() is None, (directory / "libvirtd.log").read_text()
            assert time.monotonic() < deadline
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(0.05)
        yield
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(20)


if __name__ == "__main__":
    sys.exit(main())
