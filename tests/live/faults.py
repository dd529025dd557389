# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may happen to a backup, each as something to do to a scene: the rows of the failure table.

The order of the functions is the order of the table. What is seen then is recorded in
tests/failuresdata, by engine and QEMU version, and told in docs/failures.md.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import nbd

from tests import waiting
from tests.live import machines, scene
from tests.live.scene import Scene

Happens = Callable[[Scene], None]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One row. WORDS says what happens: ``happens`` does it during the backup, ``before`` ahead."""

    name: str
    group: str
    words: str
    happens: Happens
    before: Happens
    extra: tuple[str, ...] = ()
    source: str = ""
    iothread: bool = False
    ends_qemu: bool = False


FAULTS: list[Fault] = []


def _nothing(one: Scene) -> None:
    """The other half of a fault."""


def during(group: str, words: str, **fields: object) -> Callable[[Happens], Happens]:
    """The function does it to a running backup."""

    def add(function: Happens) -> Happens:
        name = function.__name__.replace("_", "-")
        FAULTS.append(Fault(name, group, words, function, _nothing, **fields))  # type: ignore[arg-type]
        return function

    return add


def before(group: str, words: str, **fields: object) -> Callable[[Happens], Happens]:
    """The function does it to a machine that is going to be backed up."""

    def add(function: Happens) -> Happens:
        name = function.__name__.replace("_", "-")
        FAULTS.append(Fault(name, group, words, _nothing, function, **fields))  # type: ignore[arg-type]
        return function

    return add


# --- nothing, and somebody else's hands on what is ours -----------------------------------------

OURS = "Somebody takes away what is ours"


@during("Nothing happens", "the guest writes, clients read")
def nothing(one: Scene) -> None:
    one.write("vda", 10)


@during(OURS, "the job of a disk is cancelled")
def job_cancelled(one: Scene) -> None:
    one.probe("block-job-cancel", device=one.job("vda"))
    one.probe.wait_event("BLOCK_JOB_CANCELLED")
    one.write("vda", 20)


@during(OURS, "the job of a disk is cancelled and dismissed: nothing tells of it any more")
def job_vanished(one: Scene) -> None:
    job = one.job("vda")
    job_cancelled(one)
    one.job_done(job, "concluded")
    one.probe("job-dismiss", id=job)


@during(OURS, "the job of a disk is paused")
def job_paused(one: Scene) -> None:
    one.probe("job-pause", id=one.job("vda"))
    one.write("vda", 20)


@during(OURS, "the export of a disk is deleted")
def export_deleted(one: Scene) -> None:
    one.probe("block-export-del", id=one.export("vda"), mode="hard")
    one.probe.wait_event("BLOCK_EXPORT_DELETED")


@during(OURS, "the NBD server is stopped")
def server_stopped(one: Scene) -> None:
    one.probe("nbd-server-stop")


@during(OURS, "the NBD server is stopped, and started again for other exports")
def server_taken_over(one: Scene) -> None:
    one.probe("nbd-server-stop")
    address = {"type": "unix", "data": {"path": f"{one.directory}/theirs.sock"}}
    one.probe("nbd-server-start", addr=address)
    one.probe("block-export-add", type="nbd", id="theirs", node_name="base", name="theirs")
    one.undo.callback(lambda: one.probe("nbd-server-stop"))


@during(OURS, "somebody tries to delete the scratch image's node")
def node_deleted(one: Scene) -> None:
    reply = one.probe.reply("blockdev-del", node_name=one.node("vda", "scr"))
    assert "in use" in reply["error"]["desc"]


@during(OURS, "the status file is lost, and backup-cleanup ends the backup")
def status_lost(one: Scene) -> None:
    [path] = scene.state_files()
    path.unlink()
    with one.domain() as domain:
        assert domain.backupCleanup()


@during(OURS, "another backup is started")
def second_start(one: Scene) -> None:
    refused = scene.start_again(one)
    assert "another backup job is already running" in refused


# --- scratch ------------------------------------------------------------------------------------

SCRATCH = "Scratch images"


@during(SCRATCH, "the file system of the scratch images is full, and nobody watches")
def scratch_full(one: Scene) -> None:
    with scene.full(one):
        one.write("sdb", 16, 96)
        one.write("vda", 60, 8)


@during(SCRATCH, "the file system of the scratch images was full, and has room again")
def scratch_was_full(one: Scene) -> None:
    scratch_full(one)
    one.write("sdb", 40)


@during(SCRATCH, "the file system of the scratch images fills, and whoever started it watches")
def scratch_full_watched(one: Scene) -> None:
    scene.restart_watched(one)
    with scene.full(one, leave=1 << 20):
        scene.wait_until_given_up(one)
        one.write("sdb", 16, 96)


@during(SCRATCH, "a scratch image cannot be written, though there is room (a limit, a bad disk)")
def scratch_write_error(one: Scene) -> None:
    with scene.small_files(one.machine, 1 << 20):
        one.write("sdb", 0, 16)


# --- the guest's own images ---------------------------------------------------------------------

IMAGES = "The guest's own images"

_BLKDEBUG = (
    "file.driver=blkdebug,file.image.driver=file,file.image.filename={file},"
    "file.inject-error.0.event=none,file.inject-error.0.iotype=%s,file.inject-error.0.errno=5,"
    "file.inject-error.0.sector=%d"
)


@during(
    IMAGES, "a sector of a disk cannot be read",
    source=_BLKDEBUG % ("read", 50 * scene.CLUSTER // 512),
)  # fmt: skip
def source_read_error(one: Scene) -> None:
    one.write("sdb", 10)


@during(
    IMAGES, "a sector of a disk cannot be read, and the guest overwrites it",
    source=_BLKDEBUG % ("read", 50 * scene.CLUSTER // 512),
)  # fmt: skip
def source_read_error_on_save(one: Scene) -> None:
    one.write("sdb", 50)


@during(
    IMAGES, "a sector of a disk cannot be written",
    source=_BLKDEBUG % ("write", 50 * scene.CLUSTER // 512),
)  # fmt: skip
def source_write_error(one: Scene) -> None:
    one.write("sdb", 50)


@during(IMAGES, "the guest writes zeroes and discards")
def zeroes_and_discard(one: Scene) -> None:
    for disk in scene.DISKS:
        one.machine.io(disk, "write -z 3M 512k")
        one.live[disk][3 << 20 : (3 << 20) + (512 << 10)] = bytes(512 << 10)


@during(IMAGES, "an I/O limit is set on a disk, and lifted")
def throttled(one: Scene) -> None:
    # QAPI's names with underscores, which the probe would turn into dashes.
    limits = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}
    one.probe.exactly("block_set_io_throttle", {**limits, "id": "sdb", "bps": 64 << 20})
    one.write("sdb", 10, 4)
    one.probe.exactly("block_set_io_throttle", {**limits, "id": "sdb"})


@during(IMAGES, "the disks run in an iothread", iothread=True)
def iothreads(one: Scene) -> None:
    one.write("vda", 10)


# --- clients ------------------------------------------------------------------------------------

CLIENTS = "Clients"


@during(CLIENTS, "a client is killed while it reads")
def client_killed(one: Scene) -> None:
    code = "import nbd,sys; h=nbd.NBD(); h.set_export_name('vda'); h.connect_unix(sys.argv[1]);"
    code += "print(1, flush=True)\nwhile True: h.pread(1<<20, 0)"
    argv = [sys.executable, "-c", code, str(one.socket)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        client.stdout.readline()
        client.kill()


@during(CLIENTS, "the connection of a client is cut")
def client_cut(one: Scene) -> None:
    with socket.socket(fileno=os.dup(one.reader("vda").handle.aio_get_fd())) as connection:
        connection.shutdown(socket.SHUT_RDWR)
    one.write("vda", 10)


@during(CLIENTS, "a client asks and never reads the answers")
def client_hangs(one: Scene) -> None:
    client = nbd.NBD()
    client.set_export_name("sdb")
    client.connect_unix(str(one.socket))
    for offset in range(0, scene.SIZE, 1 << 20):
        client.aio_pread(nbd.Buffer(1 << 20), offset)
    one.undo.callback(client.shutdown)
    one.write("sdb", 30)


@during(CLIENTS, "a client stops in the middle of the handshake")
def client_in_handshake(one: Scene) -> None:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(one.socket))
    client.recv(18)
    one.undo.callback(client.close)


@during(CLIENTS, "fifty clients read at once")
def fifty_clients(one: Scene) -> None:
    clients = [scene.Reader(one.socket, "vda") for _ in range(50)]
    cookies = [(c, c.handle.aio_pread(nbd.Buffer(1 << 20), 0)) for c in clients]
    one.write("vda", 0)
    for client, cookie in cookies:
        while not client.handle.aio_command_completed(cookie):
            client.handle.poll(-1)
    assert {client.read() for client in clients[:5]} == {scene.RIGHT}


# --- the guest and QEMU -------------------------------------------------------------------------

MACHINE = "The guest and QEMU"


@during(MACHINE, "the guest is paused, and goes on")
def paused(one: Scene) -> None:
    one.probe("stop")
    one.probe("cont")
    one.write("vda", 10)


@during(MACHINE, "the guest is reset")
def reset(one: Scene) -> None:
    one.probe("system_reset")
    one.probe.wait_event("RESET")
    one.write("vda", 10)


@during(MACHINE, "the guest is saved to a file (migrate exec:), and goes on")
def saved(one: Scene) -> None:
    one.probe("migrate-set-parameters", max_bandwidth=1 << 33)
    one.probe("migrate", uri=f"exec:cat > {one.directory}/saved")
    status = ""
    while status not in ("completed", "failed"):
        status = one.probe("query-migrate").get("status", "")
    (one.directory / "saved").unlink()
    if status == "failed":
        one.guest.append("is not saved: QEMU refuses")
    else:
        one.guest.append("is saved")
        one.probe("cont")
    one.write("vda", 10)


_SWITCH_OFF = (
    ("w", 0xCF8, 0x8000F840), ("w", 0xCFC, 0x601),  # PMBASE of the LPC bridge, 00:1f.0
    ("w", 0xCF8, 0x8000F844), ("b", 0xCFC, 0x80),  # ACPI_CNTL: enabled
    ("h", 0x604, 0x2000),  # PM1_CNT: SLP_EN, to S5
)  # fmt: skip


def _switch_off(one: Scene) -> None:
    """As a guest does it, by its firmware's and its own writes to I/O ports."""
    with contextlib.suppress(json.JSONDecodeError, OSError):  # QEMU ends
        for width, port, value in _SWITCH_OFF:
            line = f"o /{width} {port:#x} {value:#x}"
            one.probe("human-monitor-command", command_line=line)


@during(MACHINE, "the guest shuts itself down, and QEMU ends with it", ends_qemu=True)
def guest_shuts_down(one: Scene) -> None:
    _switch_off(one)
    one.machine.process.wait(waiting.DEADLINE)


@during(MACHINE, "the guest shuts itself down, and QEMU stays", extra=("-no-shutdown",))
def guest_shuts_down_and_qemu_stays(one: Scene) -> None:
    one.write("vda", 20)
    _switch_off(one)
    assert one.probe("query-status")["status"] == "shutdown"


@during(MACHINE, "QEMU is told to quit", ends_qemu=True)
def qemu_quits(one: Scene) -> None:
    one.probe("quit")
    one.machine.process.wait()


@during(MACHINE, "QEMU is killed", ends_qemu=True)
def qemu_killed(one: Scene) -> None:
    one.flush()
    one.machine.kill()


@during(MACHINE, "QEMU is killed and started again on the same monitor", ends_qemu=True)
def qemu_restarted(one: Scene) -> None:
    one.flush()
    one.machine.kill()
    scene.start_bare_machine(one)


@during(MACHINE, "QEMU stands still (SIGSTOP) for a moment")
def qemu_stands_still(one: Scene) -> None:
    pid = one.probe.pid
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGCONT)
    one.write("vda", 10)


@during(MACHINE, "another client holds the monitor for a while")
def monitor_held(one: Scene) -> None:
    holder = machines.Probe(one.machine.qmp)
    assert "another client may be using it" in scene.refused_while_held(one)
    holder.close()


# --- other block jobs ---------------------------------------------------------------------------

JOBS = "Other block jobs and snapshots"


def _target(one: Scene, node: str = "T") -> str:
    path = machines.image(one.directory / f"{node}.qcow2", scene.SIZE, "qcow2")
    file = {"driver": "file", "filename": str(path)}
    one.probe("blockdev-add", driver="qcow2", node_name=node, file=file)
    return node


def _cancel(one: Scene, job: str) -> None:
    one.probe.reply("block-job-cancel", device=job, force=True)
    one.job_done(job)


@before(JOBS, "a mirror of a disk runs already")
def mirror_before(one: Scene) -> None:
    one.probe(
        "blockdev-mirror", job_id="theirs", device="A", target=_target(one), sync="full", speed=1
    )
    one.undo.callback(_cancel, one, "theirs")


@before(JOBS, "a commit of a disk runs already")
def commit_before(one: Scene) -> None:
    one.write("vda", 1)
    one.probe("block-commit", job_id="theirs", device="A", speed=1)
    one.undo.callback(_cancel, one, "theirs")


@before(JOBS, "a stream of a disk runs already")
def stream_before(one: Scene) -> None:
    one.probe("block-stream", job_id="theirs", device="A", speed=1)
    one.undo.callback(_cancel, one, "theirs")


@before(JOBS, "somebody else's backup job of a disk runs already")
def backup_before(one: Scene) -> None:
    one.probe(
        "blockdev-backup", job_id="theirs", device="A", target=_target(one), sync="full", speed=1
    )
    one.undo.callback(_cancel, one, "theirs")


@before(JOBS, "the NBD server is in use: libvirt's own backup, or a migration of storage")
def server_before(one: Scene) -> None:
    address = {"type": "unix", "data": {"path": f"{one.directory}/theirs.sock"}}
    one.probe("nbd-server-start", addr=address)
    one.probe("block-export-add", type="nbd", id="theirs", node_name="base", name="theirs")
    one.undo.callback(lambda: one.probe("nbd-server-stop"))


def _tried(one: Scene, what: str, reply: dict[str, object], job: str = "theirs") -> None:
    """Note whether QEMU let somebody else do WHAT; if so, wait until it is done."""
    if "error" in reply:
        one.guest.append(f"{what} is refused by QEMU")
        return
    one.guest.append(f"{what} is done")
    one.job_done(job, "ready", "concluded")


@during(JOBS, "a mirror of a disk is begun")
def mirror(one: Scene) -> None:
    reply = one.probe.reply(
        "blockdev-mirror", job_id="theirs", device="A", target=_target(one), sync="full"
    )
    _tried(one, "a mirror", reply)
    one.write("vda", 10)
    _cancel(one, "theirs")


@during(JOBS, "a mirror of a disk is begun through its device, and pivots")
def mirror_of_device(one: Scene) -> None:
    root = next(d for d in one.probe("query-block") if "vda" in d["qdev"])["inserted"]["node-name"]
    reply = one.probe.reply(
        "blockdev-mirror", job_id="theirs", device=root, target=_target(one), sync="full"
    )
    _tried(one, "a mirror", reply)
    one.write("vda", 10)
    _cancel(one, "theirs")


@during(JOBS, "a commit of a disk is begun")
def commit(one: Scene) -> None:
    _tried(one, "a commit", one.probe.reply("block-commit", job_id="theirs", device="A"))
    one.write("vda", 10)
    _cancel(one, "theirs")


@during(JOBS, "a stream of a disk is begun")
def stream(one: Scene) -> None:
    _tried(one, "a stream", one.probe.reply("block-stream", job_id="theirs", device="A"))
    one.job_done("theirs")
    one.write("vda", 10)


@during(JOBS, "somebody else makes a full copy with a backup job of his own")
def other_backup(one: Scene) -> None:
    reply = one.probe.reply(
        "blockdev-backup", job_id="theirs", device="A", target=_target(one), sync="full"
    )
    _tried(one, "a backup job", reply)
    one.job_done("theirs")
    one.write("vda", 10)


@during(JOBS, "an external snapshot of a disk is taken")
def external_snapshot(one: Scene) -> None:
    path = one.directory / "snapshot.qcow2"
    machines.image(path, scene.SIZE, "qcow2")
    file = {"driver": "file", "filename": str(path)}
    one.probe("blockdev-add", driver="qcow2", node_name="S", file=file, backing=None)
    reply = one.probe.reply("blockdev-snapshot", node="B", overlay="S")
    _tried(one, "a snapshot", reply)
    one.write("vda", 10)


@during(JOBS, "an internal snapshot of a disk is taken")
def internal_snapshot(one: Scene) -> None:
    reply = one.probe.reply("blockdev-snapshot-internal-sync", device="A", name="theirs")
    _tried(one, "a snapshot", reply)
    one.write("vda", 10)


@during(JOBS, "somebody else begins to write to a disk, past the guest")
def other_writer(one: Scene) -> None:
    reply = one.probe.reply(
        "block-export-add", type="nbd", id="theirs", node_name="B", name="theirs", writable=True
    )
    _tried(one, "a writer", reply)
    one.write("sdb", 10)


@during(JOBS, "a disk is resized")
def resized(one: Scene) -> None:
    reply = one.probe.reply("block_resize", node_name="B", size=2 * scene.SIZE)
    _tried(one, "a resize", reply)
    one.write("sdb", 10)


@during(JOBS, "somebody else adds a dirty bitmap and removes it")
def bitmap(one: Scene) -> None:
    one.probe("block-dirty-bitmap-add", node="A", name="theirs")
    one.write("vda", 10)
    one.probe("block-dirty-bitmap-remove", node="A", name="theirs")


# --- plugging -----------------------------------------------------------------------------------

PLUG = "Plugging"


@during(PLUG, "a disk is unplugged")
def unplugged(one: Scene) -> None:
    one.probe("device_del", id="sdb")
    one.probe.wait_event("DEVICE_DELETED")
    one.write("vda", 10)


@during(PLUG, "another disk is plugged in")
def plugged(one: Scene) -> None:
    node = _target(one)
    one.probe("device_add", driver="scsi-hd", drive=node, id="sdc", bus="scsi0.0", lun=5)
    one.write("vda", 10)


@during(PLUG, "another disk is plugged in and unplugged again")
def plugged_and_unplugged(one: Scene) -> None:
    plugged(one)
    one.probe("device_del", id="sdc")
    one.probe.wait_event("DEVICE_DELETED")
    one.probe("blockdev-del", node_name="T")


# --- our own processes --------------------------------------------------------------------------

PROCESSES = "Our own processes"


@during(PROCESSES, "the process that started the backup is killed, and another one stops it")
def starter_killed(one: Scene) -> None:
    scene.restart_by_killed_process(one)
    one.write("vda", 10)


@during(PROCESSES, "the process that was to end the backup with itself is killed (backup-pull)")
def owner_killed(one: Scene) -> None:
    scene.restart_by_killed_process(one, autodestroy=True)
    one.write("vda", 10)
