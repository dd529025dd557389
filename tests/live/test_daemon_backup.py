# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon on a real QEMU: backups that outlive it and those that do not, many clients at once,
checkpoints, and clients that do their worst."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import libvirt
import pytest

import virtbackup
from tests import conftest, daemon_scene, test_server
from tests.live import libvirtd, machines
from virtbackup import errors, hypervisor
from virtbackup.remote import protocol, remote_types, rpc, rpc_error

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "nbdcopy")

REMOTE, VIRTBACKUP = protocol.REMOTE, protocol.VIRTBACKUP
SIZE = 4 << 20
CLUSTER = 64 << 10
AUTODESTROY = hypervisor.START_AUTODESTROY
CANCEL = hypervisor.STOP_CANCEL


class Scene:
    """A guest, and daemons that serve it one after the other."""

    def __init__(self, directory: pathlib.Path, machine: machines.Machine) -> None:
        self.directory = directory
        self.machine = machine
        self.nbd = directory / "nbd.sock"
        self.xml = f'<domainbackup><address type="unix" path="{self.nbd}"/></domainbackup>'
        self.native = (
            f"<domainbackup mode='pull'><server transport='unix' socket='{self.nbd}'/>"
            "{}</domainbackup>"
        )

    def daemon(self, *argv: str, name: str = "virtbackupd") -> daemon_scene.Program:
        return daemon_scene.Program(self.directory, "--uri", self.machine.uri, *argv, name=name)

    def read(self, disk: str) -> bytes:
        """What a client pulls."""
        return libvirtd.read(self.nbd, disk)

    def jobs(self) -> list[object]:
        jobs = self.machine.probe("query-block-jobs")
        assert isinstance(jobs, list)
        return jobs


@pytest.fixture
def scene(tmp_path: pathlib.Path) -> Iterator[Scene]:
    with machines.two_disks(tmp_path, "-name", "vm", size=SIZE) as machine:
        for disk in ("vda", "sdb"):
            machine.io(disk, f"write -P 7 0 {SIZE}")
        yield Scene(tmp_path, machine)


def vm(client: daemon_scene.Raw) -> remote_types.NonnullDomain:
    listed = client.call(REMOTE, "CONNECT_LIST_ALL_DOMAINS", 1, 0).domains
    assert len(listed) == 1
    dom = listed[0]
    assert isinstance(dom, remote_types.NonnullDomain)
    return dom


# --- a backup and its daemon ---


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_backup_outlives_its_daemon(scene: Scene, by: signal.Signals) -> None:
    with scene.daemon() as first, first.connect() as client:
        client.call(VIRTBACKUP, "DOMAIN_BACKUP_START", vm(client), scene.xml, 0)
        first.end(by)
    scene.machine.io("vda", f"write -P 9 0 {CLUSTER}")
    assert scene.read("vda") == b"\7" * SIZE
    with scene.daemon() as second, second.connect() as client:
        dom = vm(client)
        info = client.call(VIRTBACKUP, "DOMAIN_BACKUP_GET_INFO", dom, 0)
        assert info.state == "running"
        code, _ = daemon_scene.code_of(
            client.call, VIRTBACKUP, "DOMAIN_BACKUP_START", dom, scene.xml, 0
        )
        assert code == libvirt.VIR_ERR_OPERATION_INVALID
        client.call(REMOTE, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 21, None)
        assert scene.read("sdb") == b"\7" * SIZE
        client.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", dom, 0)
        told = client.event()
        assert told.proc == REMOTE["DOMAIN_EVENT_CALLBACK_JOB_COMPLETED"]
        assert not scene.jobs()
        assert second.end() == 0
        assert "Traceback" not in second.log.read_text()


@pytest.mark.parametrize("how", ["closes", "is killed", "daemon ends", "daemon is killed"])
def test_a_backup_that_is_to_end(scene: Scene, how: str) -> None:
    with scene.daemon() as first:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(first.path), scene.xml],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == b"started\n"
        assert scene.jobs()
        if how == "closes":
            client.stdin.close()
        elif how == "is killed":
            client.kill()
        else:
            first.end(signal.SIGTERM if "ends" in how else signal.SIGKILL)
        if how != "daemon is killed":
            daemon_scene.wait_for(lambda: not scene.jobs())
        client.kill()
        client.wait(daemon_scene.DEADLINE)
        client.stdin.close()
        client.stdout.close()
    with scene.daemon() as second, second.connect() as other:
        dom = vm(other)
        daemon_scene.wait_for(lambda: not scene.jobs())
        other.call(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, scene.xml, 0)
        assert scene.read("vda") == b"\7" * SIZE
        other.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", dom, 0)
    assert not scene.nbd.exists()


CLIENT = """
import sys
from tests import daemon_scene
client = daemon_scene.Raw.unix(sys.argv[1]).open()
[dom] = client.call(daemon_scene.REMOTE, "CONNECT_LIST_ALL_DOMAINS", 1, 0).domains
client.call(daemon_scene.VIRTBACKUP, "DOMAIN_BACKUP_START", dom, sys.argv[2], 2)
print("started", flush=True)
sys.stdin.read()
"""


def test_many_start_and_stop(scene: Scene) -> None:
    """Of those who start at once one does, and the others are told that a backup runs."""
    with scene.daemon() as program:
        clients = [program.connect() for _ in range(6)]
        dom = vm(clients[0])
        for _ in range(3):
            serials = [
                client.post(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, scene.xml, 0)
                for client in clients
            ]
            replies = [c.reply(serial) for c, serial in zip(clients, serials, strict=True)]
            assert sorted(reply.status for reply in replies) == [0, 1, 1, 1, 1, 1]
            for reply in replies:
                if reply.status:
                    error = rpc_error.of_reply(reply)
                    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID, error
            serials = [client.post(VIRTBACKUP, "DOMAIN_BACKUP_STOP", dom, 0) for client in clients]
            replies = [c.reply(serial) for c, serial in zip(clients, serials, strict=True)]
            assert sorted(reply.status for reply in replies) == [0, 1, 1, 1, 1, 1]
        for client in clients:
            client.close()
    assert not scene.jobs()


def test_whose_backup_is_meant(scene: Scene) -> None:
    """A client that has started one to end with it means that one, and no other client does."""
    with scene.daemon() as program, program.connect() as owner, program.connect() as other:
        dom = vm(owner)
        owner.call(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, scene.xml, AUTODESTROY)
        other.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", dom, 0)
        other.call(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, scene.xml, 0)
        for what, *flags in (("GET_INFO", 0), ("GET_XML_DESC", 0), ("STOP", CANCEL)):
            code, text = daemon_scene.code_of(
                owner.call, VIRTBACKUP, f"DOMAIN_BACKUP_{what}", dom, *flags
            )
            assert code == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
            assert "ended by somebody else, and another one runs" in text
        owner.call(REMOTE, "CONNECT_CLOSE")
        other.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", dom, 0)


def test_a_backup_that_ends_with_nobody_is_meant_by_who_had_one_that_does(scene: Scene) -> None:
    """It was ended by somebody else; what is started since is the client's own, too."""
    with scene.daemon() as program, program.connect() as owner, program.connect() as other:
        dom = vm(owner)
        owner.call(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, scene.xml, AUTODESTROY)
        other.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", dom, 0)
        owner.call(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, scene.xml, 0)
        assert owner.call(VIRTBACKUP, "DOMAIN_BACKUP_GET_INFO", dom, 0).state == "running"
        owner.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", dom, 0)


def test_another_s_backup_is_everybody_s_to_ask_about(scene: Scene) -> None:
    """Also where a client's, that was to end with it, was ended past the daemon."""
    with scene.daemon() as program, program.connect() as owner, program.connect() as other:
        dom = vm(owner)
        owner.call(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, scene.xml, AUTODESTROY)
        with virtbackup.open(scene.machine.uri) as connection:
            [domain] = connection.listAllDomains()
            domain.backupStop()
            domain.backupStart(scene.xml)
        assert other.call(VIRTBACKUP, "DOMAIN_BACKUP_GET_INFO", dom, 0).state == "running"
        stats = other.call(REMOTE, "DOMAIN_GET_JOB_STATS", dom, 0)
        assert stats.type == libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        owner.close()
        other.call(REMOTE, "DOMAIN_ABORT_JOB", dom)


# --- checkpoints, by libvirt-python ---


@contextlib.contextmanager
def by_libvirt(program: daemon_scene.Program) -> Iterator["libvirt.virDomain"]:
    """The guest, for libvirt's own client."""
    libvirt.registerErrorHandler(lambda *_: None, None)
    connection = libvirt.open(program.uri)
    try:
        yield connection.listAllDomains()[0]
    finally:
        connection.close()


def checkpoint(name: str, inside: str = "") -> str:
    return f"<domaincheckpoint><name>{name}</name>{inside}</domaincheckpoint>"


def names(some: "list[libvirt.virDomainCheckpoint]") -> list[str]:
    return [one.getName() for one in some]


def test_checkpoints(scene: Scene) -> None:
    with scene.daemon() as program, by_libvirt(program) as dom:
        assert dom.listAllCheckpoints() == []
        scene.machine.probe("block-dirty-bitmap-add", node="A", name="theirs", persistent=True)
        for number, name in enumerate(("a", "b", "c")):
            made = dom.checkpointCreateXML(checkpoint(name, "<description>d</description>"))
            assert made.getName() == name
            scene.machine.io("vda", f"write -P 9 {number * CLUSTER} {CLUSTER}")
        a, b, c = (dom.checkpointLookupByName(name) for name in "abc")
        everything = dom.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
        assert names(everything) == ["a", "b", "c"]
        roots, leaves = (
            libvirt.VIR_DOMAIN_CHECKPOINT_LIST_ROOTS,
            libvirt.VIR_DOMAIN_CHECKPOINT_LIST_LEAVES,
        )
        no_leaves = libvirt.VIR_DOMAIN_CHECKPOINT_LIST_NO_LEAVES
        descendants = libvirt.VIR_DOMAIN_CHECKPOINT_LIST_DESCENDANTS
        assert names(dom.listAllCheckpoints(roots)) == ["a"]
        assert names(dom.listAllCheckpoints(leaves)) == ["c"]
        assert names(dom.listAllCheckpoints(no_leaves)) == ["a", "b"]
        assert names(dom.listAllCheckpoints(roots | leaves)) == []
        assert names(dom.listAllCheckpoints(roots | no_leaves)) == ["a"]
        assert names(a.listAllChildren()) == ["b"]
        assert names(a.listAllChildren(descendants)) == ["b", "c"]
        assert names(a.listAllChildren(descendants | leaves)) == ["c"]
        assert names(c.listAllChildren(descendants)) == []
        assert b.getParent().getName() == "a"
        code, _ = daemon_scene.code_of(a.getParent)
        assert code == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT
        xml = a.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE)
        assert f'<disk name="vda" checkpoint="bitmap" bitmap="a" size="{3 * CLUSTER}"/>' in xml
        assert "<description>d</description>" in xml
        assert "<domain " in xml
        plain = c.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
        assert "<parent>" in plain
        assert "<domain " not in plain
        # What is there is taken: by one of ours, and by somebody else.
        code, text = daemon_scene.code_of(dom.checkpointCreateXML, checkpoint("a"))
        assert code == libvirt.VIR_ERR_OPERATION_FAILED, text  # as libvirtd has it
        code, text = daemon_scene.code_of(dom.checkpointCreateXML, checkpoint("theirs"))
        assert code == libvirt.VIR_ERR_CONFIG_UNSUPPORTED, text
        assert "theirs" in text
        code, _ = daemon_scene.code_of(dom.checkpointLookupByName, "theirs")
        assert code == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT
        redefine = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
        again = dom.checkpointCreateXML(checkpoint("b", "<description>e</description>"), redefine)
        assert "<description>e</description>" in again.getXMLDesc()
        code, _ = daemon_scene.code_of(dom.checkpointCreateXML, checkpoint("gone"), redefine)
        assert code == errors.CHECKPOINT_INCONSISTENT
        b.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN)
        assert names(dom.listAllCheckpoints()) == ["a"]
        dom.checkpointCreateXML(checkpoint("b"))
        assert "<description>" not in dom.checkpointLookupByName("b").getXMLDesc()
        a.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN_ONLY)
        assert names(dom.listAllCheckpoints()) == ["a"]
        a.delete()
        left = str(scene.machine.probe("query-named-block-nodes"))
        assert "'name': 'theirs'" in left
        assert "'name': 'a'" not in left


DISKS = "<disks>{}</disks>"


@pytest.mark.parametrize(
    ("xml", "code", "message"),
    [
        ("<domaincheckpoint><name/></domaincheckpoint>", libvirt.VIR_ERR_XML_ERROR, "empty"),
        ("<domaincheckpoint>", libvirt.VIR_ERR_XML_ERROR, "XML error"),
        ("<domainsnapshot/>", libvirt.VIR_ERR_XML_ERROR, "unexpected root"),
        (checkpoint("a/b"), libvirt.VIR_ERR_INVALID_ARG, "a/b"),
        (
            checkpoint("x", DISKS.format("<disk name='nope'/>")),
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED, "no disk named 'nope'",
        ),
        (
            checkpoint("x", DISKS.format("<disk name='vda' checkpoint='no'/><disk name='sdb'/>")),
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED, "disk 'vda' takes part",
        ),
        (
            checkpoint("x", DISKS.format("<disk name='vda' bitmap='y'/><disk name='sdb'/>")),
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED, "must match checkpoint name",
        ),
        (
            checkpoint("x", DISKS.format("<disk name='vda' checkpoint='sometimes'/>")),
            libvirt.VIR_ERR_XML_ERROR, "unknown checkpoint type",
        ),
    ],
)  # fmt: skip
def test_checkpoints_that_cannot_be(
    on_fake: "libvirt.virDomain", xml: str, code: int, message: str
) -> None:
    found, text = daemon_scene.code_of(on_fake.checkpointCreateXML, xml)
    assert (found, message in text) == (code, True), text
    assert on_fake.listAllCheckpoints() == []


@pytest.fixture(scope="module")
def fake_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemon_scene.Program]:
    directory = tmp_path_factory.mktemp("fake")
    with daemon_scene.Program(directory, "--uri", "test:///default") as program:
        yield program


@pytest.fixture
def on_fake(fake_program: daemon_scene.Program) -> Iterator["libvirt.virDomain"]:
    with by_libvirt(fake_program) as dom:
        yield dom


def test_what_libvirt_s_own_backup_calls_refuse(
    on_fake: "libvirt.virDomain", tmp_path: pathlib.Path
) -> None:
    nbd = tmp_path / "x.sock"
    server = f"<server transport='unix' socket='{nbd}'/>"
    pull = f"<domainbackup mode='pull'>{server}</domainbackup>"
    since = f"<domainbackup mode='pull'><incremental>gone</incremental>{server}</domainbackup>"
    for xml, expected in (
        ("<domainbackup mode='push'/>", libvirt.VIR_ERR_CONFIG_UNSUPPORTED),
        (since, libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT),
        ("<domainbackup", libvirt.VIR_ERR_XML_ERROR),
    ):
        code, text = daemon_scene.code_of(on_fake.backupBegin, xml, None)
        assert code == expected, text
    code, _ = daemon_scene.code_of(on_fake.backupBegin, pull, checkpoint("a/b"))
    assert code == libvirt.VIR_ERR_INVALID_ARG
    code, text = daemon_scene.code_of(on_fake.abortJob)
    assert (code, text) == (
        libvirt.VIR_ERR_OPERATION_INVALID,
        "Requested operation is not valid: no job is active on the domain",
    )
    code, _ = daemon_scene.code_of(on_fake.backupGetXMLDesc)
    assert code == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
    assert on_fake.jobStats() == {"type": libvirt.VIR_DOMAIN_JOB_NONE}


def test_checkpoints_of_a_fake(on_fake: "libvirt.virDomain", tmp_path: pathlib.Path) -> None:
    """Created, begun with a backup, the base of another, and gone."""
    server = f"<server transport='unix' socket='{tmp_path}/x.sock'/>"
    on_fake.checkpointCreateXML(checkpoint("one"))
    on_fake.backupBegin(f"<domainbackup mode='pull'>{server}</domainbackup>", checkpoint("two"))
    assert names(on_fake.listAllCheckpoints()) == ["one", "two"]
    stats = on_fake.jobStats()
    assert stats["type"] == libvirt.VIR_DOMAIN_JOB_UNBOUNDED
    on_fake.abortJob()
    assert names(on_fake.listAllCheckpoints()) == ["one", "two"]
    since = f"<domainbackup mode='pull'><incremental>one</incremental>{server}</domainbackup>"
    on_fake.backupBegin(since, None)
    assert "<incremental>one</incremental>" in on_fake.backupGetXMLDesc()
    code, text = daemon_scene.code_of(on_fake.checkpointLookupByName("one").delete)
    assert code == libvirt.VIR_ERR_OPERATION_INVALID, text
    on_fake.abortJob()
    on_fake.checkpointLookupByName("one").delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN)
    assert on_fake.listAllCheckpoints() == []


# --- the worst of clients, and a backup beside them ---


class Wild:
    """Clients that do anything, for as long as they may; none is ours to be sorry for."""

    def __init__(self, program: daemon_scene.Program, xml: str, seed: int) -> None:
        self._program = program
        self._xml = xml
        self._random = random.Random(seed)
        self.over = threading.Event()
        self.failures: list[object] = []
        self.rounds = 0

    def run(self) -> None:
        acts = [getattr(self, name) for name in dir(self) if name.startswith("_act_")]
        while not self.over.is_set():
            try:
                with self._program.raw() as client:
                    client.socket.settimeout(5.0)
                    self._random.choice(acts)(client)
                    self.rounds += 1
            except (OSError, AssertionError, rpc.ProtocolError, libvirt.libvirtError):
                continue
            except BaseException as failure:  # noqa: BLE001  (shown by the test)
                self.failures.append(failure)
                return

    def _act_garbage(self, client: daemon_scene.Raw) -> None:
        client.send(self._random.randbytes(self._random.randrange(1, 100000)))

    def _act_garbled_calls(self, client: daemon_scene.Raw) -> None:
        client.open()
        for _ in range(50):
            name = self._random.choice(REMOTE.procedures).number
            payload = self._random.randbytes(self._random.randrange(0, 64))
            message = rpc.Message(REMOTE.number, 1, name, 0, 5, 0, payload)
            client.send(message.encode())

    def _act_half(self, client: daemon_scene.Raw) -> None:
        client.send(b"\1\0\0\0" + b"\0" * self._random.randrange(1 << 20))
        self.over.wait(self._random.random() * 0.2)

    def _act_deaf(self, client: daemon_scene.Raw) -> None:
        client.open()
        client.call(REMOTE, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY", 21, None)
        call = client.message(REMOTE, "DOMAIN_GET_XML_DESC", vm(client), 0).encode()
        client.socket.settimeout(0.2)
        client.send(call * 5000)

    def _act_pings(self, client: daemon_scene.Raw) -> None:
        client.socket.settimeout(0.2)
        client.send(daemon_scene.PING.encode() * 5000)

    def _act_starts(self, client: daemon_scene.Raw) -> None:
        client.open()
        client.call(VIRTBACKUP, "DOMAIN_BACKUP_START", vm(client), self._xml, AUTODESTROY)
        self.failures.append("a second backup was started")

    def _act_looks(self, client: daemon_scene.Raw) -> None:
        client.open()
        dom = vm(client)
        for _ in range(10):
            client.post(VIRTBACKUP, "DOMAIN_BACKUP_GET_INFO", dom, 0)
            client.post(REMOTE, "DOMAIN_GET_STATE", dom, 0)
        if self._random.random() < 0.5:
            for _ in range(20):
                client.reply()

    def _act_descriptors(self, client: daemon_scene.Raw) -> None:
        test_server.send_fds(client, b"\0\0", self._random.randrange(1, 40))

    def _act_virsh(self, client: daemon_scene.Raw) -> None:
        argv = ["virsh", "-c", self._program.uri, "domstate", "1"]
        with subprocess.Popen(
            argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._random.random() * 0.1)
            process.kill()


@contextlib.contextmanager
def running(wild: list[Wild]) -> Iterator[None]:
    """They do their worst for as long as this lasts."""
    threads = [threading.Thread(target=one.run) for one in wild]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for one in wild:
            one.over.set()
        for thread in threads:
            thread.join(daemon_scene.DEADLINE)


@pytest.mark.needs("virsh")
def test_wild_clients_and_a_backup(scene: Scene) -> None:
    """In the end the backup is sound, and of all the clients nothing is left."""
    seed = int(os.environ.get("VIRTBACKUP_SEED", "0")) or random.randrange(1 << 32)
    print(f"seed {seed}")
    seconds = 180.0 if conftest.long() else 3.0
    with scene.daemon(name="wild") as program, program.connect() as steady:
        dom = vm(steady)
        steady.call(VIRTBACKUP, "DOMAIN_BACKUP_START", dom, scene.xml, 0)
        wild = [Wild(program, scene.xml, seed + n) for n in range(4)]
        fds, rss = program.fds(), program.rss()
        slowest, rounds, end = 0.0, 0, time.monotonic() + seconds
        with running(wild):
            while time.monotonic() < end:
                begun = time.monotonic()
                info = steady.call(VIRTBACKUP, "DOMAIN_BACKUP_GET_INFO", dom, 0)
                assert info.state == "running"
                slowest = max(slowest, time.monotonic() - begun)
                scene.machine.io("vda", f"write -P 9 {rounds % 64 * CLUSTER} {CLUSTER}")
                rounds += 1
            # On a busy machine they have not come far by then.
            daemon_scene.wait_for(
                lambda: sum(one.rounds for one in wild) > 10 or any(one.failures for one in wild)
            )
        assert [failure for one in wild for failure in one.failures] == []
        assert slowest < 50.0
        assert scene.read("vda") == b"\7" * SIZE
        assert scene.read("sdb") == b"\7" * SIZE
        steady.call(VIRTBACKUP, "DOMAIN_BACKUP_STOP", dom, 0)
        daemon_scene.wait_for(lambda: program.fds() <= fds)
        daemon_scene.wait_for(lambda: program.threads() <= 50)
        print(f"rounds {sum(one.rounds for one in wild)} slowest call {slowest:.3f} s")
        print(f"rss {rss >> 20} -> {program.rss() >> 20} MiB, threads {program.threads()}")
        assert program.rss() - rss < 200 << 20
        assert program.end() == 0
        assert "Traceback" not in program.log.read_text()
    assert not scene.jobs()
