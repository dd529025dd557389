# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a libvirt domain can be saved or migrated in the middle of its backup, and lives.

Again and again a small domain is backed up, and saved (or managed-saved, or migrated to another
libvirtd and back) meanwhile; then it is restored, and backed up anew. What became of libvirt's call
and of the backup is counted, and whatever is left in QEMU, and the time of the calls told. A QEMU
that dies ends the run. Needs root: libvirtd is one of its own, the system's is neither used nor
seen.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import libvirt
import nbd

import virtbackup
from tests.live import libvirtd

TO = (libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_UNSAFE, None, "tcp://127.0.0.1")


def main() -> int:
    """Print how often it ended how."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--how", choices=("save", "managedsave", "migrate"), default="save")
    parser.add_argument("--increment", action="store_true", help="of a branch, not all of the disk")
    parser.add_argument("--read", action="store_true", help="an NBD client reads meanwhile")
    parser.add_argument("--paused", action="store_true", help="the guest is paused before")
    parser.add_argument("--engine", default="", help="classic or hybrid")
    options = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("libvirtd"):
        print("saves: not tried (needs root and libvirtd)")
        return 0
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = pathlib.Path(name)
        directory.chmod(0o755)
        for below in ("daemon", "elsewhere", "images", "scratch"):
            (directory / below).mkdir()
        os.environ["VIRTBACKUP_STATE_DIR"] = str(directory / "state")
        os.environ["VIRTBACKUP_SCRATCH_DIR"] = str(directory / "scratch")
        return Trial(directory, options).run()


class Trial:
    """One domain, saved again and again."""

    def __init__(self, directory: pathlib.Path, options: argparse.Namespace) -> None:
        self._directory = directory
        self._options = options
        self._ends: collections.Counter[str] = collections.Counter()
        self._times: list[float] = []
        self._socket = directory / "images" / "nbd.sock"
        branch = '<branch name="b"/>' if options.increment else ""
        self._document = (
            f'<domainbackup><address type="unix" path="{self._socket}"/>{branch}'
            '<disks><disk name="vda"/></disks></domainbackup>'
        )
        if options.increment:
            self._document = self._document.replace('"vda"', '"vda" type="auto"')

    def run(self) -> int:
        migrates = self._options.how == "migrate"
        image = libvirtd.image(self._directory / "images" / "a.qcow2", 1)
        with (
            libvirtd.host(self._directory / "daemon", image.parent) as host,
            host.domain("saved", libvirtd.disk_xml("vda", image), persistent=not migrates),
            contextlib.ExitStack() as undo,
        ):
            there = None
            if migrates:
                elsewhere = undo.enter_context(
                    libvirtd.running(self._directory / "elsewhere", host.daemon)
                )
                there = libvirt.open(elsewhere.uri)
                undo.callback(there.close)
            engine = f"&engine={self._options.engine}" if self._options.engine else ""
            connection = undo.enter_context(virtbackup.open(host.daemon.uri + engine))
            for _ in range(self._options.runs):
                if not self._once(host.connection, connection.lookupByName("saved"), there):
                    break
        self._tell()
        return 0 if "QEMU died" not in self._ends else 1

    def _once(
        self,
        here: "libvirt.virConnect",
        dom: virtbackup.Domain,
        there: "libvirt.virConnect | None",
    ) -> bool:
        """Whether the domain lives."""
        domain = libvirtd.Domain(here.lookupByName("saved"))
        if self._options.increment:
            dom.backupStart(self._document)
            dom.backupStop()
            domain.write("vda", 1)
        dom.backupStart(self._document)
        domain.write("vda", 2)
        with self._reading():
            if self._options.paused:
                domain.libvirt.suspend()
            end = self._leave(domain.libvirt, there)
        alive = there.listAllDomains() if there and end == "done" else here.listAllDomains()
        if end != "done" and not any(one.isActive() for one in alive):
            self._ends["QEMU died"] += 1
            return False
        try:
            dom.backupStop()
            verdict = "good"
        except virtbackup.Error as failure:
            verdict = str(failure).partition("is not good: ")[2] or str(failure)
        self._ends[f"{self._options.how}: {end}; the backup: {verdict}"] += 1
        if end == "done":
            self._return(here, there)
        domain = libvirtd.Domain(here.lookupByName("saved"))
        if domain.libvirt.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.libvirt.resume()
        domain.write("vda", 3)
        left = [*domain.monitor("query-jobs"), *domain.monitor("query-block-exports")]
        left += list((self._directory / "scratch").iterdir())
        if left:
            self._ends["something was left"] += 1
        return True

    def _leave(self, domain: "libvirt.virDomain", there: "libvirt.virConnect | None") -> str:
        ways: dict[str, Callable[[], object]] = {
            "save": lambda: domain.save(str(self._directory / "saved")),
            "managedsave": domain.managedSave,
            "migrate": lambda: domain.migrate(there, *TO),
        }
        begun = time.monotonic()
        try:
            ways[self._options.how]()
        except libvirt.libvirtError as failure:
            return str(failure)
        finally:
            self._times.append(time.monotonic() - begun)
        return "done"

    def _return(self, here: "libvirt.virConnect", there: "libvirt.virConnect | None") -> None:
        if there is not None:
            there.lookupByName("saved").migrate(here, *TO)
        elif self._options.how == "save":
            here.restore(str(self._directory / "saved"))
        else:
            here.lookupByName("saved").create()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """A client that reads, connecting anew when it is cut off, as long as there is one."""
        ends = threading.Event()

        def read() -> None:
            while not ends.is_set():
                with contextlib.suppress(nbd.Error):
                    client = nbd.NBD()
                    client.connect_uri(f"nbd+unix:///vda?socket={self._socket}")
                    while not ends.is_set():
                        cluster = random.randrange(libvirtd.SIZE // libvirtd.CLUSTER)
                        client.pread(libvirtd.CLUSTER, cluster * libvirtd.CLUSTER)
                ends.wait(0.005)

        reader = threading.Thread(target=read)
        if self._options.read:
            reader.start()
        try:
            yield
        finally:
            ends.set()
            if self._options.read:
                reader.join()

    def _tell(self) -> None:
        print(
            f"{len(self._times)} calls, median {1e3 * statistics.median(self._times):.0f} ms,"
            f" slowest {1e3 * max(self._times):.0f} ms"
        )
        for end, count in self._ends.most_common():
            print(f"{count:5}  {end}")


if __name__ == "__main__":
    sys.exit(main())
