# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several processes at once on one domain: no deadlock, no leak, no loser that does not know it.

The processes are the installed program's, as people run it. Whatever they did, backup-stop and
backup-cleanup afterwards leave QEMU and every directory as they were before.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import nbd
import pytest

import virtbackup
from tests import conftest, waiting
from tests.live import libvirtd, machines, nbdclient, points
from virtbackup.nbd import copy
from virtbackup.qemu import status
from virtbackup.tools import pull

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

PROGRAM = pathlib.Path(sys.executable).with_name("virsh-backup")
DEADLINE = waiting.DEADLINE
"""Seconds within which every process must have ended by itself."""
BOUND = 20.0
"""Seconds within which a monitor that somebody else holds must be reported, and what processes
take to begin."""
SIZE = 4 << 20
WORKERS = 7
SECONDS = 20.0 if conftest.long() else 3.0
SEEDS = (1, 2, 3, 4, 5) if conftest.long() else (1,)

ADDRESS = '<address type="unix" path="{}"/>'
COMMANDS = ("start", "stop", "info", "pull", "cleanup")

RUNNING = "another backup job is already running"
NO_BACKUP = "no domain backup job present"
NOT_CLEANED = r"backup [0-9a-f]{8} is running: backup-stop ends it"
LOST = r"cannot [\w ]+ export '\w+'|disk '\w+': its "
"""The exports of a pull went away under it: somebody stopped its backup."""
TAKEN = "the backup that was started here was ended by somebody else, and another one runs"
"""The same, and the next backup was already there when the pull came to stop its own."""
IN_USE = "the domain's NBD server is already in use by another job or client"
IN_JOB = "disk '.*' already in active block job 'backup-vda-"
NOT_IN_YET = "disk 'vda' is not this guest's to use before it goes on"
HELD = "another client may be using it"

LOSERS = {
    "start": (RUNNING,),
    "stop": (NO_BACKUP,),
    "info": (NO_BACKUP,),
    "pull": (RUNNING, NO_BACKUP, LOST, TAKEN),
    "cleanup": (NOT_CLEANED,),
}
"""What a command may say when another was faster."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    command: str
    status: int
    error: str

    def check(self, *kinds: str) -> None:
        """Done, or a line that says why not: in the words of KINDS, else the usual ones; perhaps
        one of what to do next behind it."""
        if self.status == 0:
            assert self.error == "", self
            return
        assert self.status == 1, self
        assert re.fullmatch(r"error: [^\n]+\n([A-Z'][^\n]+\n)?", self.error), self
        assert re.search("|".join(kinds or LOSERS[self.command]), self.error), self


class Domain:
    """A guest, and the processes that work on it; all they may leave anywhere is in its places."""

    def __init__(self, machine: machines.Machine, places: tuple[pathlib.Path, ...]) -> None:
        self.machine = machine
        self.socket = machine.directory / "nbd.sock"
        self._places = places
        self._numbers = itertools.count()

    def argv(self, command: str) -> list[str]:
        """The command line of one of COMMANDS; every pull goes to a directory of its own."""
        words = [f"backup-{command}", "1"]
        if command == "start":
            words = ["backup-start-as", "1", "--unix", str(self.socket)]
        if command == "pull":
            words += [str(self.machine.directory / f"pulled-{next(self._numbers)}"), "--format=raw"]
        return [str(PROGRAM), "-q", "-c", self.machine.uri, *words]

    def at_once(self, *commands: str) -> list[Outcome]:
        """Run COMMANDS, a process each, started together."""
        processes = [
            subprocess.Popen(
                self.argv(command), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for command in commands
        ]  # fmt: skip
        try:
            return [
                Outcome(command, process.wait(DEADLINE), process.communicate()[1])
                for command, process in zip(commands, processes, strict=True)
            ]
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def one(self, command: str) -> Outcome:
        [outcome] = self.at_once(command)
        return outcome

    def here(self, command: str) -> Outcome:
        """The same in this process, which is faster: what comes before or after those at once."""
        _, *argv = self.argv(command)
        status, _, error = points.call(*argv)
        return Outcome(command, status, error)

    def good_pulls(self) -> list[pathlib.Path]:
        """Where a whole backup is; only such a directory may have a file in it."""
        good = []
        for directory in self.machine.directory.glob("pulled-*"):
            names = {path.name for path in directory.iterdir()}
            assert names in (set(), {"manifest.json", "vda.raw", "sdb.raw"})
            if names:
                good.append(directory)
        return good

    def everything(self) -> dict[str, object]:
        """QEMU's state, what it holds open, and all files that could be left."""
        names = {str(path) for place in self._places for path in place.iterdir()}
        return {
            "qemu": self.machine.state(),
            "runs": self.machine.probe("query-status"),
            "deleted": _deleted_files(self.machine.probe.pid),
            "files": {
                name
                for name in names
                if not name.endswith((".lock", ".capabilities")) and "/pulled-" not in name
            },
        }

    def end(self) -> None:
        """What the user does in the end."""
        self.here("stop").check()
        assert self.here("cleanup") == Outcome("cleanup", 0, "")


def _deleted_files(pid: int) -> list[str]:
    """Files without a name that process PID keeps: a scratch image, if it were leaked."""
    names = machines.opened(pid)
    return sorted(name for name in names if name[0] == "/" and name.endswith("(deleted)"))


@pytest.fixture
def places(
    tmp_path: pathlib.Path,
    state_dir: pathlib.Path,
    scratch_dir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[pathlib.Path, ...]:
    """All directories that processes may write to."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)  # that of the test before is kept in mind
    return tmp_path, state_dir, scratch_dir, temporary


@pytest.fixture
def domain(tmp_path: pathlib.Path, places: tuple[pathlib.Path, ...]) -> Iterator[Domain]:
    with machines.two_disks(tmp_path, size=SIZE) as machine:
        yield Domain(machine, places)


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True], ids=["idle", "running"])
def test_every_pair_of_commands_at_once(domain: Domain, running: bool) -> None:
    before = domain.everything()
    # Unless there is time, one third where no backup runs and another third where one does.
    pairs = [*itertools.combinations_with_replacement(COMMANDS, 2)]
    for pair in pairs if conftest.long() else pairs[running::3]:
        if running:
            assert domain.here("start").status == 0
        outcomes = domain.at_once(*pair)
        for outcome in outcomes:
            outcome.check()
        statuses = [outcome.status for outcome in outcomes]
        if pair == ("start", "start"):
            assert sorted(statuses) == ([1, 1] if running else [0, 1])
        if pair == ("stop", "stop"):
            assert sorted(statuses) == ([0, 1] if running else [1, 1])
        if not running and "pull" in pair:
            assert 0 in statuses, outcomes
        domain.end()
        assert domain.everything() == before, outcomes


@pytest.mark.parametrize("copied", [False, True], ids=["in the copy", "after the copy"])
def test_a_pull_ends_no_backup_but_its_own(
    domain: Domain, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """Somebody stops a pull's backup and starts another one before the pull has noticed."""
    before = domain.everything()
    plain_copy = copy.copy

    def copy_and_be_late(*args: Any, when_read: Callable[[], None], **options: Any) -> Any:
        def be_late() -> None:
            assert domain.one("stop").status == 0
            assert domain.one("start").status == 0
            if not copied:
                raise virtbackup.Error(libvirt.VIR_ERR_OPERATION_FAILED, "the export is gone")
            when_read()

        return plain_copy(*args, when_read=be_late, **options)

    monkeypatch.setattr(copy, "copy", copy_and_be_late)
    with virtbackup.open(domain.machine.uri) as connection:
        with pytest.raises(virtbackup.Error, match="the export is gone" if not copied else TAKEN):
            pull.pull(connection.lookupByID(1), domain.machine.directory / "pulled-x")
        assert domain.one("info").status == 0
    assert domain.good_pulls() == []
    assert domain.one("stop").status == 0
    domain.end()
    assert domain.everything() == before


# --- a mix ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _guest_that_writes(machine: machines.Machine) -> Iterator[None]:
    """It writes a number to vda and then to sdb, then the next number."""
    done = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for number in itertools.cycle(range(1, 251)):
                for disk in ("vda", "sdb"):
                    machine.io(disk, f"write -P {number} 0 64k")
                if done.wait(0.002):
                    return
        except AssertionError as failure:
            failures.append(failure)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()
    assert failures == []


def _check_instant(directory: pathlib.Path) -> None:
    """A pull that says it is good is of one instant, whatever went on around it."""
    manifest = json.loads((directory / "manifest.json").read_text())
    assert {disk["name"] for disk in manifest["disks"]} == {"vda", "sdb"}
    chunks = [(directory / f"{disk}.raw").read_bytes()[: 64 << 10] for disk in ("vda", "sdb")]
    assert all(len(set(chunk)) == 1 for chunk in chunks), f"{directory}: a torn write"
    assert (chunks[0][0] - chunks[1][0]) % 250 in (0, 1), f"{directory}: two instants"


def _done(outcomes: list[Outcome]) -> set[str]:
    return {outcome.command for outcome in outcomes if outcome.status == 0}


def _goes_on(begin: float, outcomes: list[Outcome]) -> bool:
    """For some seconds; on a busy machine for longer, if something has not come to happen."""
    took = time.monotonic() - begin
    return took < SECONDS or (took < 20 * SECONDS and not _done(outcomes) >= {"start", "stop"})


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mix_of_processes(domain: Domain, seed: int) -> None:
    outcomes: list[Outcome] = []
    failures: list[BaseException] = []
    for disk in ("vda", "sdb"):
        domain.machine.io(disk, "write -P 0 0 64k")
    before = domain.everything()
    begin = time.monotonic()

    def work(number: int) -> None:
        choose = random.Random(f"{seed} {number}")
        try:
            while _goes_on(begin, outcomes):
                outcomes.append(domain.one(choose.choice(COMMANDS)))
        except BaseException as failure:  # noqa: BLE001  (told below, in the main thread)
            failures.append(failure)

    with _guest_that_writes(domain.machine):
        workers = [threading.Thread(target=work, args=(number,)) for number in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert failures == []
    for outcome in outcomes:
        outcome.check()
    assert _done(outcomes) >= {"start", "stop"}, outcomes
    good = domain.good_pulls()
    assert len(good) == sum(o.status == 0 for o in outcomes if o.command == "pull")
    for directory in good:
        _check_instant(directory)
    domain.end()
    assert domain.everything() == before


# --- somebody else's monitor, lock, server --------------------------------------------------------


def _hold_monitor(domain: Domain) -> Callable[[], None]:
    return machines.Probe(domain.machine.qmp).close


def test_a_monitor_that_somebody_holds(domain: Domain) -> None:
    before = domain.everything()
    start = time.monotonic()
    assert domain.one("start").status == 0
    usual = time.monotonic() - start
    during = domain.everything()
    let_go = _hold_monitor(domain)
    start = time.monotonic()
    for outcome in domain.at_once(*COMMANDS):
        assert outcome.status == 1
        outcome.check(HELD)
    assert time.monotonic() - start < BOUND + 2 * len(COMMANDS) * usual
    let_go()
    assert domain.everything() == during
    assert domain.one("info") == Outcome("info", 0, "")
    assert domain.one("stop") == Outcome("stop", 0, "")
    assert domain.everything() == before


def test_a_monitor_that_is_let_go_in_time(domain: Domain) -> None:
    before = domain.everything()
    timer = threading.Timer(2, _hold_monitor(domain))
    timer.start()
    outcomes = domain.at_once("start", "start", "cleanup")
    timer.join()
    for outcome in outcomes:
        outcome.check()
    assert sorted(outcome.status for outcome in outcomes[:2]) == [0, 1]
    domain.end()
    assert domain.everything() == before


def test_a_process_that_keeps_the_domain_for_itself(
    domain: Domain, state_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was suspended in its work, say: the others give up in time and say so."""
    monkeypatch.setattr(status, "LOCK_TIMEOUT", 0.2)
    assert domain.one("start").status == 0
    during = domain.everything()
    [lock] = state_dir.glob("*.lock")
    with lock.open() as file, virtbackup.open(domain.machine.uri) as connection:
        fcntl.flock(file, fcntl.LOCK_EX)
        locked = connection.lookupByID(1)
        for call in (locked.backupStop, locked.backupGetInfo, locked.backupCleanup):
            with pytest.raises(virtbackup.Error, match="another process works on this domain"):
                call()
        with pytest.raises(virtbackup.Error, match="another process works on this domain"):
            locked.backupStart(f"<domainbackup>{ADDRESS.format(domain.socket)}</domainbackup>")
    assert domain.everything() == during
    domain.end()


class Reader:
    """A client of somebody else's export that reads all the time and minds what it reads."""

    def __init__(self, socket: pathlib.Path, export: str, expected: bytes) -> None:
        self._client = nbd.NBD()
        self._client.set_export_name(export)
        self._client.connect_unix(str(socket))
        self._expected = expected
        self._done = threading.Event()
        self._failures: list[object] = []
        self._reads = 0
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        try:
            while not self._done.is_set():
                if bytes(self._client.pread(len(self._expected), 0)) != self._expected:
                    self._failures.append("other data")
                self._reads += 1
        except nbd.Error as failure:
            self._failures.append(failure)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        assert self._failures == []
        assert self._reads > 0
        self._client.shutdown()


def _all_refused(domain: Domain, theirs: pathlib.Path, *why: str) -> None:
    """Nothing of ours comes to run beside somebody else's server, and nothing of theirs ends."""
    before = domain.everything()
    with Reader(theirs, "vda", b"\7" * 4096):
        for outcome in domain.at_once("start", "pull", "start"):
            assert outcome.status == 1
            outcome.check(*why)
        for command in ("stop", "info"):
            assert domain.one(command).status == 1
        assert domain.one("cleanup") == Outcome("cleanup", 0, "")
    assert domain.everything() == before
    assert domain.good_pulls() == []
    assert nbdclient.read(theirs, "vda")[:4096] == b"\7" * 4096


@pytest.mark.needs("nbdcopy")
def test_an_nbd_server_of_another_job(domain: Domain) -> None:
    """As libvirt's native backup has it: a read-only export of a node."""
    theirs = domain.machine.directory / "theirs.sock"
    domain.machine.io("sdb", "write -P 7 0 4k")
    domain.machine.probe("nbd-server-start", addr={"type": "unix", "data": {"path": str(theirs)}})
    domain.machine.probe(
        "block-export-add", type="nbd", id="theirs", node_name="B", name="vda", writable=False
    )
    _all_refused(domain, theirs, IN_USE, IN_JOB)


@pytest.mark.needs("nbdcopy")
def test_an_nbd_server_of_a_migration(
    tmp_path: pathlib.Path, places: tuple[pathlib.Path, ...]
) -> None:
    """The side that storage is copied to: a QEMU that waits, with a writable export of a disk."""
    theirs = tmp_path / "theirs.sock"
    with machines.two_disks(tmp_path, "-incoming", "defer", size=SIZE) as machine:
        machine.probe("nbd-server-start", addr={"type": "unix", "data": {"path": str(theirs)}})
        machine.probe(
            "block-export-add", type="nbd", id="x", node_name="B", name="vda", writable=True
        )
        client = nbd.NBD()
        client.set_export_name("vda")
        client.connect_unix(str(theirs))
        client.pwrite(b"\7" * 4096, 0)
        _all_refused(Domain(machine, places), theirs, NOT_IN_YET)
        client.pwrite(b"\7" * 4096, 4096)
        client.shutdown()


def test_our_server_while_somebody_wants_one(domain: Domain) -> None:
    """The other way round: theirs is refused, and ours goes on."""
    before = domain.everything()
    domain.machine.io("sdb", "write -P 7 0 4k")
    assert domain.one("start").status == 0
    with Reader(domain.socket, "sdb", b"\7" * 4096):
        theirs = {"type": "unix", "data": {"path": f"{domain.machine.directory}/theirs.sock"}}
        reply = domain.machine.probe.reply("nbd-server-start", addr=theirs)
        assert reply["error"]["desc"] == "NBD server already running"
    assert domain.one("stop") == Outcome("stop", 0, "")
    assert domain.everything() == before


# --- libvirt's own backup -------------------------------------------------------------------------

COMMAND_LINE = """
<qemu:commandline>
  <qemu:arg value='-qmp'/><qemu:arg value='unix:{0}/qmp.sock,server=on,wait=off'/>
  <qemu:arg value='-qmp'/><qemu:arg value='unix:{0}/probe.sock,server=on,wait=off'/>
</qemu:commandline>"""


class LibvirtMachine(machines.Machine):
    """A QEMU that libvirt started, with the two monitors of every machine."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.qmp = directory / "qmp.sock"
        self.probe = machines.Probe(directory / "probe.sock")


@pytest.mark.may_skip
@pytest.mark.needs("libvirtd", "nbdcopy", "unshare")
@pytest.mark.skipif(bool(machines.INTO_ROOT), reason="libvirtd starts the QEMU that is installed")
def test_libvirts_own_backup(
    tmp_path: pathlib.Path, places: tuple[pathlib.Path, ...], host: libvirtd.Host
) -> None:
    """Its NBD server and jobs are left alone; and ours are, when it comes second."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\7" * SIZE)
    theirs = tmp_path / "theirs.sock"
    native = f"""
        <domainbackup mode='pull'><server transport='unix' socket='{theirs}'/></domainbackup>"""
    monitors = COMMAND_LINE.format(tmp_path)
    with host.domain("theirs", libvirtd.disk_xml("vda", disk, "raw"), more=monitors) as running:
        peer = running.libvirt
        machine = LibvirtMachine(tmp_path)
        domain = Domain(machine, places)
        before = domain.everything()
        peer.backupBegin(native, None)
        _all_refused(domain, theirs, IN_USE, IN_JOB)
        assert peer.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE
        peer.abortJob()
        waiting.until(lambda: peer.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE)
        assert domain.everything() == before

        assert domain.one("start").status == 0
        with (
            Reader(domain.socket, "virtio-disk0", b"\7" * 4096),
            pytest.raises(libvirt.libvirtError, match="NBD server already running"),
        ):
            peer.backupBegin(native, None)
        assert domain.one("stop") == Outcome("stop", 0, "")
        assert domain.everything() == before
        machine.probe.close()
