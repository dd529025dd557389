# SPDX-License-Identifier: LGPL-2.1-or-later
"""Back up a guest that never stops writing, in three ways, and prove every byte of each backup.

The proofs are not ours to bend: the first compares with copies made by cp and qemu-img while the
guest stood still, the others with what the guest's program must have written by the instant that
the images themselves tell (``demo.records``).
"""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from demo import guest, judge, kernel, records

MIB = 1 << 20
WARM_UP = records.DISKS[0].slots + 64
"""Writes to wait for, so that every slot of vda has been overwritten when we begin."""
DOCUMENT = """\
<domainbackup>
  <address type="unix" path="{socket}"/>
</domainbackup>
"""
SCRIPT = """\
import subprocess, sys, virtbackup
D = sys.argv[1]
with virtbackup.open(f"qmp://{D}/qmp.sock") as connection:
    domain = connection.lookupByName("guest")
    domain.backupStart(f'''
        <domainbackup>
          <address type="unix" path="{D}/backup.sock"/>
        </domainbackup>''')
    for disk in domain.backupGetInfo().disks:
        export = f"nbd+unix:///{disk.export}?socket={D}/backup.sock"
        subprocess.run(["nbdcopy", export, f"{D}/{disk.name}.api"], check=True)
    domain.backupStop()
"""


class Failed(Exception):
    """A step did not do what it was meant to; the text says which."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where the demonstration happens."""

    guest: guest.Guest
    directory: pathlib.Path
    nodes: frozenset[str]
    """QEMU's block nodes before the first backup."""

    @property
    def socket(self) -> pathlib.Path:
        return self.directory / "backup.sock"

    def copies(self, suffix: str) -> list[pathlib.Path]:
        """One file a disk."""
        return [self.directory / f"{disk.name}.{suffix}" for disk in records.DISKS]


def main() -> int:
    """Run the demonstration; 0 when every proof held."""
    signal.signal(signal.SIGTERM, _terminated)
    started = time.monotonic()
    try:
        with _stage() as stage:
            faults = _compare(stage) or _script(stage) or _pull(stage) or _left_over(stage)
    except (Failed, guest.GuestError, kernel.Unavailable) as error:
        faults = [str(error)]
    except KeyboardInterrupt:
        print("\ninterrupted; everything is cleaned up", file=sys.stderr)
        return 130
    _title(f"Result after {time.monotonic() - started:.0f} s")
    for fault in faults:
        _say(f"WRONG: {fault}")
    if not faults:
        _say("all right: every byte of all three backups is proven, and QEMU is left as it was")
    return 1 if faults else 0


@contextlib.contextmanager
def _stage() -> Iterator[Stage]:
    """A guest that has been writing for a while; gone with all its files at the end."""
    _title("A guest that never stops writing")
    began = time.monotonic()
    parent = os.environ.get("TMPDIR", "/var/tmp")
    with tempfile.TemporaryDirectory(dir=parent, prefix="virtbackup-demo-") as name:
        directory = pathlib.Path(name)
        _say(f"D={directory}")
        os.environ["VIRTBACKUP_STATE_DIR"] = str(directory)  # leave none of our files in /run
        with guest.start(directory) as running:
            _say(f"Linux on {', '.join(_describe(disk, directory) for disk in records.DISKS)}")
            running.wait_for_number(1)
            _say(f"writing after {time.monotonic() - began:.1f} s")
            report = running.wait_for_number(WARM_UP)
            _say(f"{report.number} writes to each disk so far: write N to vda, then to sda, ...")
            yield Stage(running, directory, _nodes(running))


def _compare(stage: Stage) -> list[str]:
    """Backup of an instant that we also copied by other means; what differs."""
    _title("1. Shell: backup-start, nbdcopy, backup-stop; compared with copies of a paused guest")
    document = stage.directory / "backup.xml"
    document.write_text(DOCUMENT.format(socket=stage.socket))
    _show(document.read_text())
    with _backup_ends(stage):
        with stage.guest.paused():
            _say("the guest is paused for a moment, so that other means can copy it too")
            _shell(stage, "backup-start", guest.NAME, str(document))
            _reference(stage)
        with _writing_on(stage):
            _shell(stage, "backup-info", guest.NAME)
            for disk, copy in zip(records.DISKS, stage.copies("copy"), strict=True):
                _run(stage, "nbdcopy", f"nbd+unix:///{disk.name}?socket={stage.socket}", str(copy))
        _shell(stage, "backup-stop", guest.NAME)
    return [fault for disk in records.DISKS for fault in _same(stage, disk)]


def _same(stage: Stage, disk: records.Disk) -> list[str]:
    """Compare the copy of DISK with its reference; and the live disk, which must differ by now."""
    copy, reference = (stage.directory / f"{disk.name}.{kind}" for kind in ("copy", "reference"))
    moved = judge.differing_records(disk, reference, _live(stage, disk))
    offset = judge.first_difference(copy, reference)
    if offset is not None:
        return [f"{disk.name}: the backup differs from the reference at byte {offset}"]
    if not moved:
        return [f"{disk.name}: the guest changed nothing meanwhile, so this proves nothing"]
    _say(
        f"{disk.name}: {copy.stat().st_size} bytes, equal to the reference; "
        f"the guest has overwritten {moved} of {disk.slots} records since"
    )
    return []


def _script(stage: Stage) -> list[str]:
    """Backup by the Python API, the guest never paused; what cannot be of one instant."""
    _title("2. Python: backupStart, nbdcopy, backupStop; the guest is never paused")
    _show(SCRIPT)
    with _backup_ends(stage), _writing_on(stage) as before:
        _run(stage, sys.executable, "-c", SCRIPT, str(stage.directory), shown="python -c ... $D")
    return _judge(stage, stage.copies("api"), before)


def _pull(stage: Stage) -> list[str]:
    """Backup by one command into files; what cannot be of one instant."""
    _title("3. Shell: backup-pull does it all; the guest is never paused")
    target = stage.directory / "backups"
    with _backup_ends(stage), _writing_on(stage) as before:
        _shell(stage, "backup-pull", guest.NAME, str(target))
    _run(stage, "ls", "-sh", str(target))
    copies = stage.copies("pulled")
    for disk, copy in zip(records.DISKS, copies, strict=True):
        _run(stage, "qemu-img", "convert", "-O", "raw", f"{target}/{disk.name}.qcow2", str(copy))
    return _judge(stage, copies, before)


def _judge(stage: Stage, images: list[pathlib.Path], before: int) -> list[str]:
    verdicts = [
        judge.examine(disk, image) for disk, image in zip(records.DISKS, images, strict=True)
    ]
    faults = list(judge.together(verdicts))
    newest = verdicts[0].newest
    after = stage.guest.report.number
    if not before <= newest <= after:
        faults.append(f"frozen at write {newest}, not between {before} and {after}")
    if not faults:
        numbers = ", ".join(f"{v.disk.name} at write {v.newest}" for v in verdicts)
        _say(f"frozen at one instant: {numbers}; every record and every byte as written by then")
    return faults


def _left_over(stage: Stage) -> list[str]:
    """What QEMU still has of the backups, asked through a monitor of our own."""
    queries = ("query-block-exports", "query-jobs")
    left = [str(item) for query in queries for item in stage.guest.monitor.command(query)]
    left += sorted(_nodes(stage.guest) - stage.nodes)
    return [f"left in QEMU: {item}" for item in left]


def _nodes(running: guest.Guest) -> frozenset[str]:
    nodes = running.monitor.command("query-named-block-nodes", flat=True)
    return frozenset(node["node-name"] for node in nodes)


@contextlib.contextmanager
def _writing_on(stage: Stage) -> Iterator[int]:
    """Check that the guest goes on writing meanwhile, and tell how far it came; gives where it is.

    Raises Failed when it wrote nothing.
    """
    before = stage.guest.wait_for_report().number
    stage.guest.forget_slowest()
    began = time.monotonic()
    yield before
    after = stage.guest.wait_for_report()
    seconds = time.monotonic() - began
    if after.number <= before:
        raise Failed("the guest wrote nothing meanwhile")
    _say(
        f"meanwhile the guest went from write {before} to {after.number} in {seconds:.1f} s; "
        f"its slowest write took {after.slowest * 1000:.0f} ms"
    )


@contextlib.contextmanager
def _backup_ends(stage: Stage) -> Iterator[None]:
    """When we are interrupted or fail, the backup does not outlive us."""
    try:
        yield
    except BaseException:
        argv = [_program("virsh-backup"), "-c", stage.guest.uri, "backup-stop", guest.NAME]
        subprocess.run([*argv, "--cancel"], capture_output=True, timeout=20, check=False)
        raise


def _reference(stage: Stage) -> None:
    for disk, copy in zip(records.DISKS, stage.copies("reference"), strict=True):
        image = guest.image(stage.directory, disk)
        if image.suffix == ".raw":
            _run(stage, "cp", str(image), str(copy))
        else:
            _run(stage, "qemu-img", "convert", "-U", "-O", "raw", str(image), str(copy))


def _live(stage: Stage, disk: records.Disk) -> pathlib.Path:
    """What DISK holds about now; not of one instant."""
    image = guest.image(stage.directory, disk)
    if image.suffix == ".raw":
        return image
    copy = stage.directory / f"{disk.name}.live"
    argv = ["qemu-img", "convert", "-U", "-O", "raw", str(image), str(copy)]
    subprocess.run(argv, check=True, capture_output=True)
    return copy


def _shell(stage: Stage, *arguments: str) -> None:
    _run(stage, _program("virsh-backup"), "-c", stage.guest.uri, *arguments)


def _program(name: str) -> str:
    """A command that was installed beside the Python we run in."""
    return str(pathlib.Path(sys.executable).with_name(name))


def _run(stage: Stage, *argv: str, shown: str | None = None) -> None:
    """Show a command, run it, show what it says and how long it took. Raises Failed."""
    name = pathlib.Path(argv[0]).name
    line = shlex.join([name, *argv[1:]]).replace("'", '"')
    text = (shown or line).replace(str(stage.directory), "$D")
    print(f"   $ {text}", flush=True)
    began = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    for line in (done.stdout + done.stderr).strip().splitlines():
        print(f"     {line}")
    if done.returncode != 0:
        raise Failed(f"{name} ended with {done.returncode}")
    print(f"     ({seconds:.2f} s)", flush=True)


def _show(text: str) -> None:
    for line in text.splitlines():
        print(f"     | {line}")


def _say(text: str) -> None:
    print(f"   {text}", flush=True)


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _describe(disk: records.Disk, directory: pathlib.Path) -> str:
    image = guest.image(directory, disk)
    return f"{disk.name} ({disk.size // MIB} MiB, {image.suffix[1:]})"


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt
