# SPDX-License-Identifier: LGPL-2.1-or-later
"""One backup of a machine to which something happens: what the guest, a client and the stop see.

The machine has vda (qcow2 over a base image, virtio-blk) and sdb (raw, virtio-scsi). Every byte of
both is known at the start; guest writes go through the devices and are remembered, so in the end
it can be said whether a client read the instant of the start and whether a write was lost.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import nbd

import virtbackup
from demo import guest, judge, records
from tests import waiting
from tests.live import machines, places
from virtbackup.conf import backup_conf
from virtbackup.qemu import monitor

SIZE = 8 << 20
CLUSTER = 64 << 10
CLUSTERS = SIZE // CLUSTER
DISKS = ("vda", "sdb")
RIGHT, WRONG = "right data", "WRONG DATA"


def pattern(disk: str) -> bytes:
    """What DISK holds at the start: every cluster its own byte, none of them zero."""
    first = DISKS.index(disk) * 7
    return b"".join(bytes([1 + (first + n) % 200]) * CLUSTER for n in range(CLUSTERS))


class Reader:
    """An NBD client that is connected before anything happens."""

    def __init__(self, socket: pathlib.Path, disk: str) -> None:
        self._disk = disk
        self.handle = nbd.NBD()
        self.handle.set_export_name(disk)
        self.handle.connect_unix(str(socket))

    def read(self) -> str:
        """What became of reading all of the disk."""
        data = b""
        try:
            for offset in range(0, SIZE, 256 << 10):
                data += self.handle.pread(256 << 10, offset)
        except nbd.Error as failure:
            return _words(failure)
        return RIGHT if data == pattern(self._disk) else WRONG


@dataclasses.dataclass(frozen=True)
class Row:
    """What was seen: a row of the failure table."""

    guest: str
    reader: str
    stop: str
    """``good``, or the error; ``refused: ...`` when already the start was. What ``backup-info``
    told before is the same."""


@dataclasses.dataclass
class Scene:
    """A machine in DIRECTORY and what is known of it."""

    directory: pathlib.Path
    scratch: pathlib.Path
    machine: machines.Machine
    uri: str
    live: dict[str, bytearray]
    """What the guest must find on its disks now."""
    guest: list[str] = dataclasses.field(default_factory=list)
    """What the guest saw of writes that failed."""
    readers: dict[str, Reader] = dataclasses.field(default_factory=dict)
    undo: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    """Ends what a fault left running, once all is seen."""

    @property
    def socket(self) -> pathlib.Path:
        return self.directory / "nbd.sock"

    @property
    def probe(self) -> machines.Probe:
        return self.machine.probe

    def document(self, disks: str = "") -> str:
        return (
            f'<domainbackup><address type="unix" path="{self.socket}"/>'
            f"<disks>{disks}</disks></domainbackup>"
        )

    @contextlib.contextmanager
    def domain(self) -> Iterator[virtbackup.Domain]:
        with virtbackup.open(self.uri) as connection:
            [domain] = connection.listAllDomains()
            yield domain

    def info(self) -> backup_conf.BackupInfo:
        with self.domain() as domain:
            return domain.backupGetInfo()

    def write(self, disk: str, cluster: int, count: int = 1, byte: int = 255) -> None:
        """Let the guest write; a failure is noted as what the guest saw."""
        offset, length = cluster * CLUSTER, count * CLUSTER
        try:
            self.machine.io(disk, f"write -P {byte} {offset} {length}")
        except AssertionError as failure:
            reason = re.search(r"write failed: (.*)", str(failure))
            self.guest.append(f"a write fails: {reason[1] if reason else failure}")
            return
        self.live[disk][offset : offset + length] = bytes([byte]) * length

    def flush(self) -> None:
        """Let the guest have on its disks what it wrote, whatever happens to QEMU."""
        for disk in DISKS:
            self.machine.io(disk, "flush")

    def job(self, disk: str) -> str:
        """The id of our job on DISK."""
        jobs = sorted(job["id"] for job in self.probe("query-jobs") if "virtbackup" in job["id"])
        return str(jobs[DISKS.index(disk)])

    def export(self, disk: str) -> str:
        """The id of our export of DISK."""
        exports = self.probe("query-block-exports")
        return str(sorted(e["id"] for e in exports if "virtbackup" in e["id"])[DISKS.index(disk)])

    def node(self, disk: str, part: str) -> str:
        """The name of a node of ours."""
        return f"{self.job(disk)}-{part}"

    def job_done(self, job: str, *states: str) -> None:
        """Wait until a job of somebody else has reached one of STATES, or is gone."""
        while True:
            now = {item["id"]: item["status"] for item in self.probe("query-jobs")}.get(job)
            if now is None or now in states:
                return
            self.probe.wait_event("JOB_STATUS_CHANGE")

    def reader(self, disk: str = "vda") -> Reader:
        """The client of DISK that was there from the start."""
        return self.readers[disk]


@contextlib.contextmanager
def scene(
    directory: pathlib.Path,
    scratch: pathlib.Path,
    engine: str,
    extra: Sequence[str] = (),
    source: str = "",
    iothread: bool = False,
) -> Iterator[Scene]:
    """A machine whose disks hold their pattern. SOURCE goes between sdb's format and its file, as
    blockdev options with ``{file}`` for the file's own; IOTHREAD puts both disks into one."""
    _make_images(directory)
    file = f"{directory}/b.raw"
    below = source.format(file=file) if source else f"file.driver=file,file.filename={file}"
    thread = ("-object", "iothread,id=io0") if iothread else ()
    inside = ",iothread=io0" if iothread else ""
    with machines.qemu(
        directory, *thread,
        "-blockdev", f"qcow2,node-name=base,read-only=on,file.driver=file,"
        f"file.filename={directory}/base.qcow2",
        "-blockdev", f"qcow2,node-name=A,backing=base,file.driver=file,"
        f"file.filename={directory}/a.qcow2",
        "-device", f"virtio-blk,drive=A,id=vda{inside}",
        "-device", f"virtio-scsi,id=scsi0{inside}",
        "-blockdev", f"raw,node-name=B,{below}",
        "-device", "scsi-hd,drive=B,id=sdb",
        *extra,
        before_exec=endure_limits,
    ) as machine:  # fmt: skip
        live = {disk: bytearray(pattern(disk)) for disk in DISKS}
        one = Scene(directory, scratch, machine, f"{machine.uri}?engine={engine}", live)
        with one.undo:
            yield one


def _make_images(directory: pathlib.Path) -> None:
    raw = directory / "pattern.raw"
    raw.write_bytes(pattern("vda"))
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw)]
    subprocess.run([*convert, f"{directory}/base.qcow2"], check=True)
    machines.image(directory / "a.qcow2", SIZE, "qcow2", backing=directory / "base.qcow2")
    (directory / "b.raw").write_bytes(pattern("sdb"))
    raw.unlink()


def play(one: Scene, happens: Callable[[Scene], None], before: Callable[[Scene], None]) -> Row:
    """Start a backup, let the guest write, let something happen, let it write on; then read, by the
    clients that were there and by new ones, and stop."""
    before(one)
    refused = _start(one)
    if refused is not None:
        return Row(_guest(one), "-", f"refused: {_plain(one, refused)}")
    one.readers.update({disk: Reader(one.socket, disk) for disk in DISKS})
    for disk in DISKS:
        one.write(disk, 3, 2)
    happens(one)
    reader = _read(one)
    told = _told(one)
    stop = _stop(one)
    assert _agree(told, stop), (told, stop)
    return Row(_guest(one), reader, stop)


def _start(one: Scene) -> virtbackup.Error | None:
    try:
        with one.domain() as domain:
            domain.backupStart(one.document())
    except virtbackup.Error as failure:
        return failure
    return None


def _stop(one: Scene) -> str:
    try:
        with one.domain() as domain:
            domain.backupStop()
    except virtbackup.Error as failure:
        return _plain(one, failure)
    return "good"


def _told(one: Scene) -> str:
    """What is told before the stop, in the words of the stop."""
    try:
        info = one.info()
    except virtbackup.Error as failure:
        return _plain(one, failure)
    reasons = [f"disk '{disk.name}': {disk.reason}" for disk in info.disks if disk.reason]
    assert (info.state == "failed") == bool(reasons)
    text = f"operation failed: the backup is not good: {'; '.join(reasons)}"
    return _plain(one, text) if reasons else "good"


def _agree(told: str, stop: str) -> bool:
    """Whether both tell the same. That a snapshot is broken a client is told in other words than
    whoever asks QEMU itself."""
    broken = re.compile(r"(its snapshot is broken): [^;]*")
    return broken.sub(r"\1", told) == broken.sub(r"\1", stop)


def _read(one: Scene) -> str:
    """What clients see of both disks, in as few words as say all of it."""
    seen = {disk: (_read_again(one, disk), one.reader(disk).read()) for disk in DISKS}
    news, olds = ({disk: pair[i] for disk, pair in seen.items()} for i in (0, 1))
    if news == olds:
        return _same(news)
    return f"connected before: {_same(olds)}; anew: {_same(news)}"


def _same(seen: dict[str, str]) -> str:
    vda, sdb = seen["vda"], seen["sdb"]
    return vda if vda == sdb else f"vda {vda}, sdb {sdb}"


def _read_again(one: Scene, disk: str) -> str:
    try:
        return Reader(one.socket, disk).read()
    except nbd.Error as failure:
        return "cannot connect" if failure.errnum in _UNREACHABLE else _words(failure)


_UNREACHABLE = (0, errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE)
_LOST = (errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE)


def _words(failure: nbd.Error) -> str:
    """An error of a client, without what depends on who was faster."""
    if failure.errnum in _LOST:
        return "connection lost"
    return f"error: {os.strerror(failure.errnum)}"


def _guest(one: Scene) -> str:
    """What the guest sees, after all of it."""
    if one.machine.process.poll() is not None:
        return "; ".join([*dict.fromkeys(one.guest), "is gone"])
    status = one.probe.reply("query-status")
    if "error" not in status and not status["return"]["running"]:
        one.guest.append(f"is paused ({status['return']['status']})")
    return "; ".join(dict.fromkeys(one.guest)) or "goes on"


def _plain(one: Scene, failure: virtbackup.Error | str) -> str:
    """The error's text without what differs from run to run."""
    text = str(failure).replace(str(one.directory), "DIR").replace(str(one.scratch), "SCRATCH")
    text = re.sub(r"virtbackup-[0-9a-f]{8}", "virtbackup-ID", text)
    return re.sub(r"\b\d{4,}\b", "N", text)


def leftovers(one: Scene, state_dir: pathlib.Path) -> list[str]:
    """Everything of ours that is still there."""
    left = [str(path) for path in (*state_dir.glob("*.json"), *one.scratch.glob("virtbackup-*"))]
    if one.socket.exists():
        left.append(str(one.socket))
    if one.machine.process.poll() is not None:
        return left
    for command in ("query-jobs", "query-block-exports", "query-fdsets", "query-named-block-nodes"):
        said: Any = one.probe.reply(command).get("return", [])
        left += re.findall(r"virtbackup-[0-9a-f]{8}[-\w]*", str(said))
    return left


def lost_writes(one: Scene) -> list[str]:
    """The clusters that do not hold what the guest wrote, in the images, QEMU being gone."""
    lost = []
    for disk, path, fmt in (("vda", "a.qcow2", "qcow2"), ("sdb", "b.raw", "raw")):
        found = machines.contents(one.directory / path, fmt)
        want = one.live[disk]
        lost += [
            f"{disk} cluster {n}"
            for n in range(CLUSTERS)
            if found[n * CLUSTER : (n + 1) * CLUSTER] != want[n * CLUSTER : (n + 1) * CLUSTER]
        ]
    return lost


def start_and_die(uri: str, xml: str, autodestroy: bool = False) -> None:
    """By a process that is gone afterwards, so that nobody watches."""
    flags = virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY if autodestroy else 0
    code = (
        "import os, signal, sys, virtbackup\n"
        "dom = virtbackup.open(sys.argv[1]).listAllDomains()[0]\n"
        "dom.backupStart(sys.argv[2], int(sys.argv[3]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, uri, xml, str(flags)], check=False)
    assert done.returncode == -signal.SIGKILL


def damage(linux: guest.Guest) -> tuple[str, ...]:
    """What is wrong with the records that a Linux guest has written to its disks; it goes on."""
    with linux.paused():
        verdicts = []
        for disk in records.DISKS:
            raw = linux.directory / "raw"
            path = guest.image(linux.directory, disk)
            argv = ["qemu-img", "convert", "-U", "-f", path.suffix[1:], "-O", "raw"]
            subprocess.run([*argv, str(path), str(raw)], check=True)
            verdicts.append(judge.examine(disk, raw))
    return judge.together(verdicts)


# --- what faults are made of ----------------------------------------------------------------------


def state_files() -> list[pathlib.Path]:
    """The status files there are."""
    return list(pathlib.Path(os.environ["VIRTBACKUP_STATE_DIR"]).glob("*.json"))


def start_again(one: Scene) -> str:
    """Why a second start is refused."""
    refused = _start(one)
    assert refused is not None
    return str(refused)


@contextlib.contextmanager
def full(one: Scene, leave: int = 0) -> Iterator[None]:
    """Somebody else has taken all but LEAVE bytes of the scratch images' file system."""
    hog = places.fill_up(one.scratch, leave)
    try:
        yield
    finally:
        hog.unlink()


@contextlib.contextmanager
def small_files(machine: machines.Machine, limit: int) -> Iterator[None]:
    """QEMU cannot make files longer than LIMIT bytes: such a write fails, with EFBIG."""
    before = resource.prlimit(machine.probe.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(machine.probe.pid, resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(machine.probe.pid, resource.RLIMIT_FSIZE, before)


def endure_limits() -> None:
    """Let a write beyond RLIMIT_FSIZE fail instead of killing the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _anew(one: Scene, start: Callable[[], None]) -> None:
    """End the backup there is and START another one, of the instant of now, that clients open."""
    with one.domain() as domain:
        domain.backupStop()
    for disk in DISKS:
        one.write(disk, 3, 2, pattern(disk)[3 * CLUSTER])
        one.write(disk, 4, 1, pattern(disk)[4 * CLUSTER])
    start()
    one.readers = {disk: Reader(one.socket, disk) for disk in DISKS}


def restart_watched(one: Scene) -> None:
    """The same backup again, by somebody who stays and watches."""

    def start() -> None:
        connection = one.undo.enter_context(virtbackup.open(one.uri))
        connection.listAllDomains()[0].backupStart(one.document())

    _anew(one, start)


def wait_until_given_up(one: Scene) -> None:
    """Until the watch has ended the backup."""
    waiting.until(lambda: one.info().state == "failed")


def restart_by_killed_process(one: Scene, autodestroy: bool = False) -> None:
    """The same backup again, by a process that is killed once it runs."""
    _anew(one, lambda: start_and_die(one.uri, one.document(), autodestroy))


def refused_while_held(one: Scene) -> str:
    """What a look at the backup says while another client has the monitor."""
    limit, monitor.CONNECT_TIMEOUT = monitor.CONNECT_TIMEOUT, 0.3
    try:
        one.info()
    except virtbackup.Error as failure:
        return str(failure)
    finally:
        monitor.CONNECT_TIMEOUT = limit
    return "not refused"


def start_bare_machine(one: Scene) -> None:
    """Another QEMU, without disks, on the monitor of the one that is gone."""
    one.undo.enter_context(machines.qemu(one.directory))
