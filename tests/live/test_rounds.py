# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random rounds of start, faults and stop on machines that live on: no wrong byte is called good,
nothing is left, and no write of the guest is lost.

A life is one machine and some twenty rounds. Everything in it follows from its seed, but for what
depends on who is faster. A failure tells the seed and what was done; to do it again:

VIRTBACKUP_ROUNDS_SEED=SEED pytest tests/live/test_rounds.py -k LIFE

VIRTBACKUP_LONG=1 makes it a thousand rounds; -s shows the figures.
"""

import collections
import contextlib
import fcntl
import os
import pathlib
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import libvirt
import nbd
import pytest

import virtbackup
from tests import conftest, waiting
from tests.live import callers, machines, places, scene

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "mount"),
    pytest.mark.timeout(120),
]

ROUNDS = 20
LIVES = 50 if conftest.long() else 1
SEED = os.environ.get("VIRTBACKUP_ROUNDS_SEED", "1")
SPACE = 24 << 20
FIGURES: collections.Counter[str] = collections.Counter()


def call_and_kill(caller: callers.Caller, after: float, uri: str, *words: str) -> None:
    """Call a method of the domain, in a process that is killed by SIGKILL AFTER seconds, unless it
    has ended by then."""
    pid = caller.begin(uri, *words)
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGCONT)
    # The moment is what is random here; nothing waits for it.
    threading.Event().wait(after)
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
    os.close(process)
    FIGURES[f"{words[0]} killed"] += caller.end() < 0


class Client:
    """An NBD client of one frozen disk."""

    def __init__(self, round: "Round", disk: str) -> None:
        self.disk = disk
        self._round = round
        self._handle = nbd.NBD()
        self._handle.set_export_name(disk)
        round.connect(self._handle)

    def read(self, offset: int, length: int) -> None:
        """Read, and note what is wrong with it."""
        try:
            data = self._handle.pread(length, offset)
        except nbd.Error as failure:
            self._round.failed[self.disk] = str(failure)
            return
        FIGURES["bytes read"] += length
        if data != self._round.frozen[self.disk][offset : offset + length]:
            self._round.wrong.add(self.disk)

    def read_all(self) -> None:
        for offset in range(0, scene.SIZE, 1 << 20):
            self.read(offset, 1 << 20)


class Round:
    """One backup: a start in some way, things that happen, a stop in some way, and its verdict."""

    def __init__(self, life: "Life", number: int) -> None:
        self.one, self.rng = life.one, life.rng
        self._life = life
        self.log = life.log
        self.log.append(f"--- round {number}")
        self.disks = self.rng.choice([("vda", "sdb"), ("vda",), ("sdb",)])
        self.port = places.free_port() if self.rng.random() < 0.3 else None
        self.named = self.rng.random() < 0.3
        self.frozen: dict[str, bytes] = {}
        self.wrong: set[str] = set()
        self.failed: dict[str, str] = {}
        self.harmed = False
        """Something was done after which a good verdict is not due."""
        self.ended = False
        """The backup is over before its stop."""
        self.last = False
        """Nothing else is to happen to it."""
        self.in_handshake = False
        """A client has connected and says no more."""
        self.stays: str | None = None
        """The disk that somebody reads until after the stop."""
        self.undo = contextlib.ExitStack()

    def run(self) -> None:
        for _ in range(self.rng.randrange(4)):
            self.guest_writes()
        self.start()
        clients = [Client(self, disk) for disk in self.disks if self.rng.random() < 0.7]
        with self.undo, self.reading():
            for action in self.rng.choices(ACTIONS, WEIGHTS, k=self.rng.randrange(1, 6)):
                self.log.append(action.__name__)
                action(self)
                if self.ended or self.last or self.one.guest:
                    break
            self.clients_in_the_end(clients)
            verdict = self.stop()
        self.judge(verdict)

    def connect(self, handle: nbd.NBD) -> None:
        if self.port is None:
            handle.connect_unix(str(self.one.socket))
        else:
            handle.connect_tcp("127.0.0.1", str(self.port))

    # --- start ---

    def document(self) -> str:
        address = f'type="unix" path="{self.one.socket}"'
        if self.port is not None:
            address = f'type="ip" host="127.0.0.1" port="{self.port}"'
        disks = "".join(
            f'<disk name="{disk}" present="{"yes" if disk in self.disks else "no"}">'
            + (f'<source file="{self.one.scratch}/{disk}.scr"/>' if self.is_named(disk) else "")
            + "</disk>"
            for disk in scene.DISKS
        )
        return f"<domainbackup><address {address}/><disks>{disks}</disks></domainbackup>"

    def is_named(self, disk: str) -> bool:
        return self.named and disk in self.disks

    def start(self) -> None:
        self.frozen = {disk: bytes(self.one.live[disk]) for disk in self.disks}
        how = self.rng.choice(["watch", "no watch", "no watch", "killed"])
        self.log.append(f"start {self.disks} port={self.port} named={self.named} {how}")
        if how == "killed":
            after = self.rng.uniform(0, 0.12)
            call_and_kill(self._life.caller, after, self.one.uri, "backupStart", self.document())
            if self.is_running():
                return
        connection = self.undo.enter_context(virtbackup.open(self.one.uri))
        connection.listAllDomains()[0].backupStart(self.document())
        if how != "watch":
            connection.close()
            self.undo.pop_all()

    def is_running(self) -> bool:
        try:
            return self.one.info().state == "running"
        except virtbackup.Error as failure:
            assert failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP, failure
            return False

    # --- meanwhile ---

    def guest_writes(self) -> None:
        """A random write of the guest's, of bytes or of zeroes, or a discard."""
        disk = self.rng.choice(scene.DISKS)
        length = self.rng.randrange(1, 600) * self.rng.choice([512, 4096])
        length = min(length, scene.SIZE)
        offset = self.rng.randrange(0, scene.SIZE - length + 1) // 512 * 512
        byte = self.rng.choice([0, self.rng.randrange(1, 256)])
        command = f"write -P {byte}" if byte else self.rng.choice(["write -z", "discard"])
        if command == "discard" and machines.version() < (7, 2, 0):
            command = "write -z -u"  # can be done in the background
        self.log.append(f"{disk} {command} {offset} {length}")
        try:
            self.one.machine.io(disk, f"{command} {offset} {length}")
        except AssertionError as failure:
            self.one.guest.append(str(failure))
            self._life.unsure[disk].append((offset, length))
            return
        FIGURES["guest writes"] += 1
        if command != "discard":
            # Where discards are not passed on, which is the default, they change nothing.
            self.one.live[disk][offset : offset + length] = bytes([byte]) * length

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Somebody else reads all the time, in some rounds up to the stop and beyond."""
        over = threading.Event()
        rng = random.Random(self.rng.random())

        def read() -> None:
            while not over.is_set() and disk not in self.failed:
                length = rng.randrange(1, 256) * 512
                client.read(rng.randrange(0, scene.SIZE - length) // 512 * 512, length)

        if self.rng.random() < 0.5:
            yield
            return
        disk = self.rng.choice(self.disks)
        client = Client(self, disk)
        reader = threading.Thread(target=read)
        self.undo.callback(reader.join)
        self.undo.callback(over.set)
        reader.start()
        if self.rng.random() < 0.5:
            self.log.append(f"a reader of {disk} that stays")
            self.stays = disk
            yield
            return
        yield
        over.set()
        reader.join()

    def clients_in_the_end(self, clients: list[Client]) -> None:
        """All is read by those who were there, and by new ones."""
        for client in clients:
            client.read_all()
        for disk in self.disks:
            if self.rng.random() < 0.7:
                try:
                    Client(self, disk).read_all()
                except nbd.Error as failure:
                    self.failed[disk] = str(failure)

    # --- stop ---

    def stop(self) -> str | None:
        """The verdict: ``good``, why not, or None where none was asked for."""
        self.read_failures = dict(self.failed)
        how = self.rng.choice(["stop", "stop", "stop", "cancel", "killed"])
        self.log.append(how)
        if how == "killed":
            self.harmed = True
            call_and_kill(self._life.caller, self.rng.uniform(0, 0.12), self.one.uri, "backupStop")
        flags = virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL if how == "cancel" else 0
        try:
            with self.one.domain() as domain:
                domain.backupStop(flags)
        except virtbackup.Error as failure:
            if how == "killed" and failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                return None
            return str(failure)
        return None if flags else "good"

    def judge(self, verdict: str | None) -> None:
        self.log.append(f"verdict: {verdict}; wrong: {self.wrong}; failed: {self.read_failures}")
        word = "none" if verdict is None else "good" if verdict == "good" else "bad"
        FIGURES[f"verdict {word}"] += 1
        FIGURES["rounds with wrong bytes read"] += bool(self.wrong)
        FIGURES["rounds with an error read"] += bool(self.read_failures)
        if verdict is not None and not self.ended:
            unsaid = {disk for disk in self.wrong if f"'{disk}'" not in verdict}
            assert not unsaid, "wrong bytes that the verdict does not tell of"
        if self._life.engine == "hybrid":
            assert not self.wrong, "the hybrid engine never shows wrong bytes"
        if not self.harmed:
            assert verdict in ("good", None), "nothing happened that would harm a backup"
            assert not self.wrong
            assert self.read_failures == {}
        self.leftovers()

    def leftovers(self) -> None:
        left = scene.leftovers(self.one, self._life.state_dir)
        left += [str(path) for path in self.one.scratch.glob("*.scr")]
        if self.port is not None and _listens_on(self.port):
            left.append(f"port {self.port}")
        assert left == []
        if self.one.machine.process.poll() is None:
            assert self.one.probe("query-status")["running"]


def _listens_on(port: int) -> bool:
    """Whether anybody does, or soon does no more: the kernel closes the sockets of a QEMU that was
    killed, and had them in an io_uring, some time after its end."""
    end = time.monotonic() + waiting.DEADLINE
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 2).close()
        except OSError:
            return False
    return True


# --- what may happen ------------------------------------------------------------------------------

Action = Callable[[Round], None]
ACTIONS: list[Action] = []
WEIGHTS: list[float] = []


def weighing(weight: float) -> Callable[[Action], Action]:
    def add(action: Action) -> Action:
        ACTIONS.append(action)
        WEIGHTS.append(weight)
        return action

    return add


def _ours(round: Round, command: str, key: str = "id") -> list[str]:
    found = (item[key] for item in round.one.probe(command))
    return sorted(name for name in found if name.startswith("virtbackup-"))


@weighing(12)
def guest_writes(round: Round) -> None:
    for _ in range(round.rng.randrange(1, 6)):
        round.guest_writes()


@weighing(3)
def somebody_reads(round: Round) -> None:
    if not round.harmed:
        Client(round, round.rng.choice(round.disks)).read_all()


@weighing(1)
def stop_and_cont(round: Round) -> None:
    round.one.probe("stop")
    round.one.probe("cont")


@weighing(1)
def guest_reset(round: Round) -> None:
    round.one.probe("system_reset")
    round.one.probe.wait_event("RESET")


@weighing(1)
def bitmap(round: Round) -> None:
    node = round.rng.choice("AB")
    round.one.probe("block-dirty-bitmap-add", node=node, name="theirs")
    round.guest_writes()
    round.one.probe("block-dirty-bitmap-remove", node=node, name="theirs")


@weighing(1)
def throttle(round: Round) -> None:
    limits = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}
    round.one.probe.exactly("block_set_io_throttle", {**limits, "id": "sdb", "bps": 64 << 20})
    round.guest_writes()
    round.one.probe.exactly("block_set_io_throttle", {**limits, "id": "sdb"})


@weighing(1)
def ask_for_information(round: Round) -> None:
    with round.one.domain() as domain:
        assert round.harmed or domain.backupGetInfo().state == "running"
        assert round.harmed or domain.backupGetXMLDesc()


@weighing(1)
def start_again(round: Round) -> None:
    if not round.harmed:
        assert "another backup job is already running" in scene.start_again(round.one)


@weighing(1)
def qemu_stands_still(round: Round) -> None:
    os.kill(round.one.probe.pid, signal.SIGSTOP)
    os.kill(round.one.probe.pid, signal.SIGCONT)


@weighing(1)
def client_goes_away(round: Round) -> None:
    if not round.harmed:
        client = nbd.NBD()
        client.set_export_name(round.disks[0])
        round.connect(client)
        client.aio_pread(nbd.Buffer(1 << 20), 0)
        del client


@weighing(0.5)
def client_stays_in_handshake(round: Round) -> None:
    if not round.harmed:
        if round.port is None:
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(round.one.socket))
        else:
            client = socket.create_connection(("127.0.0.1", round.port))
        client.recv(18)
        round.in_handshake = True
        round.undo.callback(client.close)


def _somebody_elses_job(round: Round, command: str, **arguments: object) -> None:
    """To be let begin or not; it comes to its end, or is ready and cancelled."""
    one = round.one
    if "error" not in one.probe.reply(command, job_id="theirs", device="A", **arguments):
        FIGURES["jobs of others"] += 1
        one.job_done("theirs", "ready", "concluded")
        round.guest_writes()
        one.probe.reply("block-job-cancel", device="theirs", force=True)
        one.job_done("theirs")


@weighing(0.7)
def stream(round: Round) -> None:
    _somebody_elses_job(round, "block-stream")


@weighing(0.7)
def commit(round: Round) -> None:
    _somebody_elses_job(round, "block-commit")


@weighing(0.7)
def backup_or_mirror(round: Round) -> None:
    command = round.rng.choice(["blockdev-backup", "blockdev-mirror"])
    with _other_disk(round, "T"):
        _somebody_elses_job(round, command, target="T", sync="full")


@weighing(0.7)
def internal_snapshot(round: Round) -> None:
    arguments = {"device": "A", "name": "theirs"}
    if "error" not in round.one.probe.reply("blockdev-snapshot-internal-sync", **arguments):
        round.one.probe("blockdev-snapshot-delete-internal-sync", **arguments)


@contextlib.contextmanager
def _other_disk(round: Round, node: str) -> Iterator[None]:
    path = machines.image(round.one.directory / f"{node}.qcow2", scene.SIZE, "qcow2")
    file = {"driver": "file", "filename": str(path)}
    round.one.probe("blockdev-add", driver="qcow2", node_name=node, file=file)
    yield
    round.one.probe("blockdev-del", node_name=node)


@weighing(0.7)
def plug_and_unplug(round: Round) -> None:
    with _other_disk(round, "P"):
        round.one.probe("device_add", driver="scsi-hd", drive="P", id="sdc", bus="scsi0.0", lun=5)
        round.guest_writes()
        round.one.probe("device_del", id="sdc")
        round.one.probe.wait_event("DEVICE_DELETED")


@weighing(1.5)
def cancel_a_job(round: Round) -> None:
    round.harmed = True
    if jobs := _ours(round, "query-jobs"):
        job = round.rng.choice(jobs)
        round.one.probe.reply("block-job-cancel", device=job)
        round.one.job_done(job, "concluded")
        if round.rng.random() < 0.5:
            round.one.probe.reply("job-dismiss", id=job)


@weighing(1)
def delete_an_export(round: Round) -> None:
    round.harmed = True
    if exports := _ours(round, "query-block-exports"):
        mode = round.rng.choice(["hard", "safe"])
        round.one.probe.reply("block-export-del", id=round.rng.choice(exports), mode=mode)


@weighing(0.7)
def stop_the_server(round: Round) -> None:
    if round.in_handshake:
        return  # somebody else's stop may never return then, and is not what is looked at
    round.harmed = True
    round.one.probe.reply("nbd-server-stop")


@weighing(0.5)
def take_over_the_server(round: Round) -> None:
    if round.in_handshake or "theirs" in (e["id"] for e in round.one.probe("query-block-exports")):
        return
    stop_the_server(round)
    address = {"type": "unix", "data": {"path": f"{round.one.directory}/theirs.sock"}}
    if "error" not in round.one.probe.reply("nbd-server-start", addr=address):
        round.one.probe("block-export-add", type="nbd", id="theirs", node_name="base", name="t")
        round.undo.callback(_stop_their_server, round)


def _stop_their_server(round: Round) -> None:
    if round.one.machine.process.poll() is None:
        round.one.probe.reply("nbd-server-stop")


@weighing(0.5)
def scratch_is_full(round: Round) -> None:
    """Where nobody watches a write may fail or break the backup; where somebody does, only that."""
    round.harmed = True
    with scene.full(round.one):
        for _ in range(4):
            round.guest_writes()


@weighing(0.7)
def clean_up_without_status(round: Round) -> None:
    if round.named:
        return  # only the status knew which file of the user's choice it is
    if not _ours(round, "query-block-exports"):
        return  # nor does anything else tell whose a server is that exports nothing
    round.harmed = round.ended = True
    with round.one.domain() as domain:
        while True:
            for path in scene.state_files():
                # The watch may be about to write it anew.
                with path.with_suffix(".lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    path.unlink(missing_ok=True)
            try:
                domain.backupCleanup()
                return
            except virtbackup.Error as failure:
                if "backup-stop ends it" not in str(failure):  # or it has, meanwhile
                    raise


@weighing(0.3)
def kill_qemu(round: Round) -> None:
    round.harmed = round.ended = round._life.over = True
    for disk in scene.DISKS:
        round.one.machine.io(disk, "flush")
    round.one.machine.kill()


@weighing(0.5)
def client_hangs(round: Round) -> None:
    """Nothing else may happen then: QEMU would wait for that client in any drain."""
    round.last = True
    if round.port is not None or round.harmed or round.stays:
        return
    client = nbd.NBD()
    client.set_export_name(round.disks[0])
    client.connect_unix(str(round.one.socket))
    for offset in range(0, scene.SIZE, 1 << 20):
        client.aio_pread(nbd.Buffer(1 << 20), offset)
    round.undo.callback(client.shutdown)


# --- lives ----------------------------------------------------------------------------------------


class Life:
    """A machine, and what is done to it."""

    def __init__(
        self,
        one: scene.Scene,
        state_dir: pathlib.Path,
        caller: callers.Caller,
        seed: str,
        engine: str,
    ) -> None:
        self.one, self.state_dir, self.caller, self.engine = one, state_dir, caller, engine
        self.rng = random.Random(seed)
        self.log: list[str] = []
        self.over = False
        self.unsure: dict[str, list[tuple[int, int]]] = {disk: [] for disk in scene.DISKS}
        """Where writes of the guest failed: what is there now is not known."""

    def live(self, rounds: int) -> int:
        """Some of ROUNDS, until the machine is not what it was any more; how many."""
        done = 0
        while done < rounds and not self.over:
            Round(self, done).run()
            done += 1
            FIGURES["rounds"] += 1
            self.over |= bool(self.one.guest)
        if self.one.machine.process.poll() is None:
            self.one.probe("quit")
            self.one.machine.process.wait()
        for disk, ranges in self.unsure.items():
            found = {"vda": ("a.qcow2", "qcow2"), "sdb": ("b.raw", "raw")}[disk]
            now = machines.contents(self.one.directory / found[0], found[1])
            for offset, length in ranges:
                self.one.live[disk][offset : offset + length] = now[offset : offset + length]
        assert scene.lost_writes(self.one) == []
        FIGURES["machines"] += 1
        return done


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    FIGURES.clear()
    yield
    print("\n" + "\n".join(f"{name}: {count}" for name, count in sorted(FIGURES.items())))


@pytest.fixture
def scratch(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pathlib.Path]:
    with places.small_file_system(tmp_path, SPACE) as path:
        monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", str(path))
        yield path


@pytest.fixture
def caller(scratch: pathlib.Path) -> Iterator[callers.Caller]:
    with callers.Caller() as running:
        yield running


@pytest.mark.parametrize("number", range(LIVES))
def test_rounds(
    state_dir: pathlib.Path,
    scratch: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    caller: callers.Caller,
    number: int,
) -> None:
    done = machine = 0
    engines = machines.engines()
    engine = engines[number % len(engines)]
    while done < ROUNDS:
        directory = tmp_path_factory.mktemp("machine")
        with scene.scene(directory, scratch, engine) as one:
            life = Life(one, state_dir, caller, f"{SEED}/{number}/{machine}", engine)
            try:
                done += life.live(ROUNDS - done)
            except BaseException:
                print(f"seed {SEED}, life {number}, machine {machine}, engine {engine}:")
                print(*life.log, sep="\n")
                raise
        machine += 1
