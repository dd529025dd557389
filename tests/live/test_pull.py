# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pull of a real QEMU: the bytes of one instant, a verdict, and nothing left on any way out."""

import contextlib
import datetime
import io
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import libvirt
import pytest

import virtbackup
from tests import conftest, waiting
from tests.live import copies, machines, places
from virtbackup.nbd import copy
from virtbackup.tools import chain, manifest, pull, virsh_backup

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
    pytest.mark.timeout(300),
]

MIB = 1 << 20
FORMATS: tuple[copy.Format, ...] = ("qcow2", "raw")


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    """A running QEMU with two disks that have something on them."""
    with machines.two_disks(tmp_path, size=16 * MIB) as running:
        running.io("vda", "write -P 1 0 5M")
        running.io("sdb", "write -P 2 1M 3M")
        yield running


@pytest.fixture
def domain(machine: machines.Machine) -> Iterator[virtbackup.Domain]:
    with virtbackup.open(machine.uri) as connection:
        yield connection.lookupByID(1)


@pytest.fixture
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """Where temporary files go; empty at the end."""
    path = tmp_path_factory.mktemp("t")
    before, tempfile.tempdir = tempfile.tempdir, str(path)
    yield path
    tempfile.tempdir = before
    assert list(path.iterdir()) == []


@pytest.fixture
def out(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "out"


class Watch:
    """Does something when the copy of a disk starts, and at every advance of it."""

    def __init__(
        self,
        at_start: Callable[[int], object] | None = None,
        at_advance: Callable[[int], object] | None = None,
    ) -> None:
        self._at_start = at_start
        self._at_advance = at_advance

    def start(self, index: int, size: int) -> None:
        if self._at_start is not None:
            self._at_start(index)

    def advance(self, index: int, count: int) -> None:
        if self._at_advance is not None:
            self._at_advance(index)


def backup(directory: pathlib.Path) -> dict[str, bytes]:
    """The disks of a backup, as its manifest tells them; every file is named there."""
    made = manifest.read(directory)
    files = {manifest.FILE, *(disk.file for disk in made.disks)}
    assert {path.name for path in directory.iterdir()} == files
    for disk in made.disks:
        path, fmt = directory / disk.file, disk.format
        assert fmt in FORMATS
        assert copy.checksum_of_file(path, fmt, disk.size) == disk.checksum.value
    return {disk.name: machines.contents(directory / disk.file, disk.format) for disk in made.disks}


def is_empty(directory: pathlib.Path) -> bool:
    return not directory.exists() or not list(directory.iterdir())


# --- good -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_bytes_are_those_of_the_start(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    private: pathlib.Path,
    fmt: copy.Format,
) -> None:
    """The guest writes before the first byte is read, and again at every chunk."""
    before, state = machines.on_two_disks(machine), machine.state()
    # The guest's own writes make its file grow, and that is told here.
    grows = ("query-block", "query-named-block-nodes")
    source = random.Random(5)

    def write(index: int) -> None:
        for device in ("vda", "sdb"):
            place = source.randrange(0, 15 * MIB) & ~511
            machine.io(device, f"write -P {source.randrange(1, 256)} {place} 100k")

    begin = datetime.datetime.now(datetime.timezone.utc)
    made = pull.pull(domain, out, fmt=fmt, progress=Watch(write, write))
    assert backup(out) == before
    assert machines.on_two_disks(machine) != before
    after = machine.state()
    assert [after[key] for key in state if key not in grows] == [
        state[key] for key in state if key not in grows
    ]
    assert made == manifest.read(out)
    assert [disk.name for disk in made.disks] == ["vda", "sdb"]
    assert [disk.size for disk in made.disks] == [16 * MIB] * 2
    assert (made.domain.name, made.domain.uuid) == (domain.name(), domain.UUIDString())
    started = datetime.datetime.fromisoformat(made.time)
    assert begin <= started <= datetime.datetime.now(datetime.timezone.utc)
    assert 'exportname="vda"' in made.backup_xml
    assert "<source file=" in made.domain_xml


@contextlib.contextmanager
def _writers_that_stand_still(
    machine: machines.Machine, then: signal.Signals
) -> Iterator[copy.Progress]:
    """Progress that stops what writes the images once all was handed to it, until the guest has no
    job any more; they get THEN at that time."""

    def writers() -> list[int]:
        mine = copies.children().items()
        return [pid for pid, name in mine if name.startswith(("qemu-nbd", "qemu-storage"))]

    class Progress(copies.Watch):
        def advance(self, index: int, count: int) -> None:
            super().advance(index, count)
            if self.counts == {0: 16 * MIB, 1: 16 * MIB}:
                for pid in writers():
                    with contextlib.suppress(ProcessLookupError):  # that of the other disk, done
                        os.kill(pid, signal.SIGSTOP)
                        stopped.append(pid)
                goes_on.start()

    def go_on() -> None:
        try:
            waiting.until(lambda: not machine.probe("query-jobs"))
            seen.append("free")
        finally:
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):  # it ended as it was stopped
                    os.kill(pid, then)

    stopped: list[int] = []
    seen: list[str] = []
    goes_on = threading.Thread(target=go_on)
    yield Progress()
    goes_on.join()
    assert stopped
    assert seen == ["free"]


def test_the_guest_is_free_before_the_files_are_whole(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    before, state = machines.on_two_disks(machine), machine.state()
    with _writers_that_stand_still(machine, signal.SIGCONT) as progress:
        made = pull.pull(domain, out, progress=progress)
    assert made == manifest.read(out)
    assert backup(out) == before
    assert machine.state() == state


def test_a_file_that_is_lost_after_the_stop(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    state = machine.state()
    with (
        _writers_that_stand_still(machine, signal.SIGKILL) as progress,
        pytest.raises(virtbackup.Error, match="the program that writes it"),
    ):
        pull.pull(domain, out, progress=progress)
    assert is_empty(out)
    assert machine.state() == state


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", None])
def test_a_document_of_the_users(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    private: pathlib.Path,
    tmp_path: pathlib.Path,
    host: str | None,
) -> None:
    before = machines.on_two_disks(machine)
    address = f'type="unix" path="{tmp_path}/mine.sock"'
    if host is not None:
        address = f'type="ip" host="{host}" port="{places.free_port()}"'
    xml = (
        f'<domainbackup><address {address}/><disks><disk name="sdb" exportname="other"/>'
        '<disk name="vda" present="no"/></disks></domainbackup>'
    )
    made = pull.pull(domain, out, xml=xml)
    assert backup(out) == {"sdb": before["sdb"]}
    assert f"<address {address}/>" in made.backup_xml


def test_a_directory_that_exists_may_have_other_files(
    domain: virtbackup.Domain, out: pathlib.Path
) -> None:
    out.mkdir()
    (out / "notes").write_text("mine")
    pull.pull(domain, out)
    assert {path.name for path in out.iterdir()} == {
        "notes", "manifest.json", "vda.qcow2", "sdb.qcow2"
    }  # fmt: skip
    assert (out / "notes").read_text() == "mine"


def test_as_many_files_are_opened_as_may_be(machine: machines.Machine, out: pathlib.Path) -> None:
    """Not only as many as a login allows at first: each disk takes some ten."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", machine.uri]
    done = subprocess.run(
        [*argv, "backup-pull", "1", str(out)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20, most)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(backup(out)) == {"vda", "sdb"}


@pytest.mark.parametrize("branch", [None, "nightly"])
@pytest.mark.may_skip
def test_a_directory_below_one_that_is_not_synced(
    domain: virtbackup.Domain, tmp_path: pathlib.Path, branch: str | None
) -> None:
    """An automounter's: a backup that all is there of is not called bad for it."""
    with places.automounted(tmp_path / "auto") as mounted:
        assert pull.pull(domain, mounted, branch=branch) == manifest.read(mounted)


@pytest.mark.parametrize("branch", [(), ("--branch", "nightly")])
@pytest.mark.may_skip
def test_a_directory_below_one_that_is_not_to_be_read(
    machine: machines.Machine, tmp_path: pathlib.Path, branch: tuple[str, ...]
) -> None:
    """As one of many users has it below one that only leads on."""
    above = tmp_path / "above"
    out = above / "mine"
    out.mkdir(parents=True)
    above.chmod(0o711)
    try:
        os.chown(above, 65534, 65534)
    except OSError:
        pytest.skip("not allowed to give a directory away: this wants root")
    rights = "-dac_override,-dac_read_search"
    pulled = subprocess.run(
        [
            "setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}",
            sys.executable, "-m", "virtbackup.tools.virsh_backup", "-q", "-c", machine.uri,
            "backup-pull", "1", str(out), *branch,
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert pulled.returncode == 0, pulled.stderr
    assert (out / manifest.FILE).is_file()


def test_a_directory_with_an_odd_name(
    machine: machines.Machine, out: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes nothing else to a terminal than its name."""
    place = out / "a\n\x1b[2Jb"
    assert virsh_backup.main(["-c", machine.uri, "backup-pull", "1", str(place)]) == 0
    said = capsys.readouterr().out
    assert f"vda: {out}/a\\n\\x1b[2Jb/vda.qcow2 (" in said
    assert "\x1b" not in said
    assert set(backup(place)) == {"vda", "sdb"}


def test_directories_are_made(domain: virtbackup.Domain, out: pathlib.Path) -> None:
    pull.pull(domain, out / "of" / "monday", fmt="raw")
    assert set(backup(out / "of" / "monday")) == {"vda", "sdb"}


# --- refused before the guest is touched ----------------------------------------------------------


def untouched(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, xml: str | None = None
) -> virtbackup.Error:
    """The error of a pull that never gave QEMU a command that changes anything."""
    trace = io.StringIO()
    domain.connect().setTrace(trace)
    with pytest.raises(virtbackup.Error) as raised:
        pull.pull(domain, out, xml=xml)
    assert "transaction" not in trace.getvalue()
    assert "blockdev" not in trace.getvalue()
    return raised.value


IN_THE_WAY = {
    **dict.fromkeys(["manifest.json", "vda.qcow2", "sdb.qcow2"], "{out}/{name} exists already"),
    **dict.fromkeys(
        ["manifest.json.partial", "sdb.qcow2.partial"],
        "{out}/{name} exists already, as what a killed pull leaves",
    ),
    # Of a branch, whose next pull would take ``manifest.json`` for its own, and with it all that
    # tells of a backup without one. After a crash it has none yet.
    **dict.fromkeys(
        ["manifest.0001.json", "manifest.0002.json.partial"],
        "{out} is of the backups of a branch, as it has {name}",
    ),
}


@pytest.mark.parametrize(("name", "reason"), IN_THE_WAY.items())
def test_what_is_in_the_way_is_refused(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    private: pathlib.Path,
    name: str,
    reason: str,
) -> None:
    out.mkdir()
    (out / name).write_text("mine")
    error = untouched(machine, domain, out)
    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    assert reason.format(out=out, name=name) in str(error)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]


def test_a_link_comes_in_place_of_the_manifest(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path
) -> None:
    """By whoever else may write to the directory: what it leads to stays as it is."""
    state, other = machine.state(), out.with_name("other")
    other.write_text("theirs")

    def come(_index: int) -> None:
        (out / "manifest.json.partial").unlink(missing_ok=True)
        (out / "manifest.json.partial").symlink_to(other)

    told = f"cannot write to {out}: {out}/manifest.json.partial: Too many levels of"
    with pytest.raises(virtbackup.Error, match=told):
        pull.pull(domain, out, progress=Watch(come))
    assert other.read_text() == "theirs"
    assert is_empty(out)
    assert machine.state() == state


@pytest.mark.parametrize("name", ["manifest.json", "sdb.qcow2"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_comes_in_the_way_meanwhile(
    domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path, name: str, fails: bool
) -> None:
    """It is somebody else's, however the pull ends."""

    def come(index: int) -> None:
        (out / name).write_text("mine")
        if fails:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError if fails else virtbackup.Error) as raised:
        pull.pull(domain, out, progress=Watch(at_start=come))
    assert fails or f"{out / name} exists already" in str(raised.value)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]
    with pytest.raises(virtbackup.Error, match="no domain backup job present"):
        domain.backupGetInfo()


def test_a_directory_that_is_pulled_into(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    """Another guest's backup of a branch, which has no ``manifest.json`` before its end."""
    out.mkdir()
    with chain.locked(out):
        error = untouched(machine, domain, out)
    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    assert f"another backup is pulled into {out}" in str(error)
    assert list(out.iterdir()) == []


def test_a_directory_that_is_a_file(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    out.write_text("mine")
    assert f"{out} exists already and is no directory" in str(untouched(machine, domain, out))
    assert f"{out} exists already and is no directory" in str(
        untouched(machine, domain, out / "below")
    )
    assert out.read_text() == "mine"


def test_directories_that_were_made_in_vain(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """All of them go, not the last alone."""
    domain.backupStart(f'<domainbackup><address type="unix" path="{tmp_path}/s"/></domainbackup>')
    assert "already running" in str(untouched(machine, domain, out / "made" / "deep"))
    assert not out.exists()
    domain.backupStop()


def test_a_document_that_makes_no_sense(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    xml = (
        f'<domainbackup><address type="unix" path="{tmp_path}/s"/>'
        '<disks><disk name="vdz"/></disks></domainbackup>'
    )
    error = untouched(machine, domain, out, xml)
    assert "no disk named 'vdz'" in str(error)
    assert "empty" in str(untouched(machine, domain, out, ""))  # of a program that made none
    assert not out.exists()


# --- bad ------------------------------------------------------------------------------------------


def test_a_backup_that_stop_calls_bad_is_not_kept(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    """Somebody cancels a job. Until QEMU 8 every read still succeeds, so only the verdict can tell;
    since then reads fail, and the verdict says why."""
    state = machine.state()

    def cancel(index: int) -> None:
        if index == 0:
            for job in machine.probe("query-block-jobs"):
                machine.probe("block-job-cancel", device=job["device"])
                machine.probe.wait_event("BLOCK_JOB_CANCELLED")

    with pytest.raises(virtbackup.Error) as raised:
        pull.pull(domain, out, progress=Watch(cancel))
    assert "disk 'vda': its backup job ended: Operation canceled" in str(raised.value)
    if machines.version() < (8, 0, 0):
        assert f"(no backup was kept in {out})" in str(raised.value)
    assert is_empty(out)
    assert machine.state() == state


def test_qemu_dies_in_the_middle(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    gone = r"disk 'vda': QEMU is gone; disk 'sdb': QEMU is gone"
    with pytest.raises(virtbackup.Error, match=gone):
        pull.pull(domain, out, progress=Watch(lambda _: machine.kill()))
    assert is_empty(out)


@pytest.mark.may_skip
def test_a_full_disk(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    state = machine.state()
    with places.small_file_system(out, 2 << 20):
        with pytest.raises(virtbackup.Error, match=r"cannot write .*: No space left on device"):
            pull.pull(domain, out, fmt="raw")
        assert list(out.iterdir()) == []
    assert machine.state() == state


def test_progress_that_fails_ends_the_pull(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    state = machine.state()

    def fail(_index: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        pull.pull(domain, out, progress=Watch(fail))
    assert is_empty(out)
    assert machine.state() == state


# --- signals --------------------------------------------------------------------------------------


class Signals(io.StringIO):
    """A trace that sends this process a signal at the given line of the monitor and every later."""

    def __init__(self, number: int, first: int) -> None:
        super().__init__()
        self.lines = 0
        self._number = number
        self._first = first

    def write(self, text: str) -> int:
        if self.lines >= self._first:
            os.kill(os.getpid(), self._number)
        self.lines += 1
        return len(text)


def lines_of(domain: virtbackup.Domain, call: Callable[[], object]) -> int:
    """How many lines go over the monitor in CALL."""
    trace = Signals(signal.SIGTERM, sys.maxsize)
    domain.connect().setTrace(trace)
    call()
    return trace.lines


def interrupted(domain: virtbackup.Domain, out: pathlib.Path, number: int, line: int) -> bool:
    """Whether a pull with signals from LINE on ended by them, as it must when there was one."""
    trace = Signals(number, line)
    domain.connect().setTrace(trace)
    try:
        pull.pull(domain, out)
    except KeyboardInterrupt:
        assert number == signal.SIGINT
    except SystemExit as failure:
        assert (number, failure.code) == (signal.SIGTERM, 128 + signal.SIGTERM)
    else:
        assert trace.lines <= line, "a signal was lost"
        return False
    assert trace.lines > line
    return True


def test_signals_from_every_moment_of_the_monitor_on(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    """At the first line that goes over the monitor, the second, and so on to the last; each time
    a further one comes with every line after it, those of the clean-up included."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    domain.XMLDesc()
    state = machine.state()
    # Before the pull defers them, signals are the caller's: its first call is not looked at.
    line = lines_of(domain, domain.XMLDesc)
    tried = 0
    while interrupted(domain, out, (signal.SIGINT, signal.SIGTERM)[line % 2], line):
        assert machine.state() == state
        assert list(private.iterdir()) == []
        if not is_empty(out):
            assert set(backup(out)) == {"vda", "sdb"}, "neither nothing nor a whole backup"
            for path in out.iterdir():
                path.unlink()
        line += 1 if conftest.long() else 5
        tried += 1
    assert tried > 12
    assert set(backup(out)) == {"vda", "sdb"}
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["start", "advance"])
def test_signals_while_it_copies(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    private: pathlib.Path,
    number: int,
    moment: str,
) -> None:
    state = machine.state()

    def send(_index: int) -> None:
        os.kill(os.getpid(), number)

    watch = Watch(send) if moment == "start" else Watch(None, send)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        pull.pull(domain, out, progress=watch)
    assert is_empty(out)
    assert machine.state() == state


def test_an_ignored_signal_stays_ignored(
    domain: virtbackup.Domain, out: pathlib.Path, private: pathlib.Path
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pull.pull(domain, out, progress=Watch(lambda _: os.kill(os.getpid(), signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert set(backup(out)) == {"vda", "sdb"}


_CHILD = """
import pathlib, sys
import virtbackup
from virtbackup.tools import pull
with virtbackup.open(sys.argv[1]) as connection:
    print("ready", flush=True)
    pull.pull(connection.lookupByID(1), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_a_process_at_any_moment(
    machine: machines.Machine, out: pathlib.Path, private: pathlib.Path, number: int
) -> None:
    state = machine.state()
    statuses = {-number, 128 + number, 0}
    environment = {**os.environ, "TMPDIR": str(private)}
    for _ in range(20 if conftest.long() else 3):
        argv = [sys.executable, "-c", _CHILD, machine.uri, str(out)]
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(random.uniform(0, 0.12))
            child.send_signal(number)
            said = child.communicate(timeout=waiting.DEADLINE)[1].decode()
        assert child.returncode in statuses, said
        assert machine.state() == state, said
        if not is_empty(out):
            assert set(backup(out)) == {"vda", "sdb"}
            for path in out.iterdir():
                path.unlink()
        assert list(private.iterdir()) == []
