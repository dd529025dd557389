# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's file systems stand still for the instant of a start, and go on on every path."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import libvirt
import libvirt_qemu
import pytest

import virtbackup
from demo import kernel
from tests import conftest, waiting
from tests.live import agents, libvirtd, machines, striking
from virtbackup.qemu import agent, process

pytestmark = pytest.mark.needs("qemu-system-x86_64", "nbdcopy")

QUIESCE = virtbackup.VIR_DOMAIN_BACKUP_START_QUIESCE


# --- a real agent ---------------------------------------------------------------------------------


def document(path: pathlib.Path) -> str:
    return f'<domainbackup><address type="unix" path="{path}"/></domainbackup>'


def check_real_agent(
    dom: virtbackup.Domain, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that is written to all the time is whole in the backup; the guest goes on."""
    copy = tmp_path / "copy"
    caplog.set_level("INFO", "virtbackup.qemu.agent")
    for flags, clean in ((0, False), (QUIESCE, True), (QUIESCE, True)):
        dom.backupStart(document(tmp_path / "nbd.sock"), flags)
        copy.write_bytes(libvirtd.read(tmp_path / "nbd.sock", "vda"))
        dom.backupStop()
        assert agents.is_clean(copy) == clean
    window = r"frozen=1 seconds=(\d+\.\d+)"
    assert len([r for r in caplog.messages if re.search(window, r)]) == 2


@pytest.mark.needs("libvirtd", "unshare", "mkfs.ext4")
def test_a_real_agent_by_way_of_libvirt(
    libvirt_host: libvirtd.Host,
    boot: agents.Boot,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        agents.domain(libvirt_host, "quiet", boot) as domain,
        virtbackup.open(libvirt_host.daemon.uri) as connection,
    ):
        dom = connection.lookupByName("quiet")
        check_real_agent(dom, tmp_path, caplog)
        xml = document(pathlib.Path("/nonexistent/nbd.sock"))
        with pytest.raises(virtbackup.Error, match="cannot listen"):
            dom.backupStart(xml, QUIESCE)
        assert _status(domain) == "thawed"
        argv = killed_when_frozen(libvirt_host.daemon.uri, tmp_path)
        assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
        libvirtd.wait_for(lambda: _status(domain) == "thawed")
        dom.backupCleanup()
        daemon = libvirt_host.daemon
        argv = [sys.executable, "-c", f"import os, sys{_KILLED_AFTER_LIBVIRTD}", *argv[-2:]]
        subprocess.run([*argv, str(daemon.pid)], check=False)
        daemon.start()
        domain = libvirt_host.again("quiet")
        libvirtd.wait_for(lambda: _is_there(domain) and _status(domain) == "thawed")
        dom.backupCleanup()
        domain.libvirt.fsFreeze()
        refused = r"the agent is in frozen state|guest-fsfreeze-freeze has been disabled"  # 9.1
        with pytest.raises(virtbackup.Error, match=refused):
            dom.backupStart(document(tmp_path / "nbd.sock"), QUIESCE)
        assert _status(domain) == "frozen"  # somebody else's to end
        domain.libvirt.fsThaw()
        before = domain.state()
        domain.libvirt.suspend()
        with pytest.raises(virtbackup.Error, match="not running: it is paused or susp"):
            dom.backupStart(document(tmp_path / "nbd.sock"), QUIESCE)
        domain.libvirt.resume()
        assert domain.state() == before
        if conftest.long():  # it is libvirt that waits for so long
            _ask(domain, "guest-exec", path="/bin/busybox", arg=["killall", "-STOP", "qemu-ga"])
            libvirtd.wait_for(lambda: not _is_there(domain))
            with pytest.raises(virtbackup.Error) as error:
                dom.backupStart(document(tmp_path / "nbd.sock"), QUIESCE)
            assert error.value.get_error_code() == libvirt.VIR_ERR_AGENT_UNRESPONSIVE
            assert domain.state() == before


def _ask(domain: libvirtd.Domain, command: str, **arguments: Any) -> Any:
    """What the agent says."""
    line = json.dumps({"execute": command, "arguments": arguments})
    return json.loads(libvirt_qemu.qemuAgentCommand(domain.libvirt, line, 30, 0))["return"]


def _is_there(domain: libvirtd.Domain) -> bool:
    try:
        libvirt_qemu.qemuAgentCommand(domain.libvirt, '{"execute":"guest-ping"}', 1, 0)
    except libvirt.libvirtError:
        return False
    return True


def _status(domain: libvirtd.Domain) -> str:
    return str(_ask(domain, "guest-fsfreeze-status"))


@pytest.mark.needs("libvirtd", "unshare")
def test_a_domain_without_an_agent(
    libvirt_host: libvirtd.Host, tmp_path: pathlib.Path, state_dir: pathlib.Path
) -> None:
    path = tmp_path / "a.qcow2"
    machines.image(path, 1 << 20, "qcow2")
    with (
        libvirt_host.domain("loud", libvirtd.disk_xml("vda", path)) as domain,
        virtbackup.open(libvirt_host.daemon.uri) as connection,
    ):
        before = domain.state()
        with pytest.raises(virtbackup.Error) as error:
            connection.lookupByName("loud").backupStart(document(tmp_path / "nbd.sock"), QUIESCE)
        assert str(error.value) == "argument unsupported: QEMU guest agent is not configured"
        assert domain.state() == before
        assert not list(state_dir.glob("*.json"))


def test_a_real_agent_by_its_own_socket(
    boot: agents.Boot, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "qga.sock"
    with (
        machines.qemu(
            tmp_path, "-m", "256", "-no-reboot", *machines.BOOTING,
            "-kernel", str(boot.kernel), "-initrd", str(boot.initrd),
            "-append", kernel.COMMAND_LINE, "-serial", f"file:{tmp_path}/console",
            "-blockdev", f"raw,node-name=disk,file.driver=file,file.filename={boot.disk}",
            "-device", "virtio-blk-pci,drive=disk,id=vda", "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=qga,path={path},server=on,wait=off",
            "-device", f"virtserialport,chardev=qga,name={agents.CHANNEL}",
        ) as machine,
        virtbackup.open(f"{machine.uri}?agent={path}") as connection,
    ):  # fmt: skip
        libvirtd.wait_for(lambda: _answers(path), 90)
        [dom] = connection.listAllDomains()
        check_real_agent(dom, tmp_path, caplog)


def _answers(path: pathlib.Path) -> bool:
    """Whether there is an agent, to whom a thaw is nothing."""
    limit, agent.TIMEOUT = agent.TIMEOUT, 0.5
    try:
        agent.SocketAgent(str(path)).thaw()
    except virtbackup.Error:
        return False
    finally:
        agent.TIMEOUT = limit
    return True


_FORKED = """
import os, signal, sys, virtbackup
from virtbackup.qemu import process
def freeze(self):
    if not os.fork():
        print(os.getpid(), flush=True)
        signal.pause()
    os.kill(os.getpid(), signal.SIGKILL)
process.Run.freeze = freeze
virtbackup.open(sys.argv[1]).listAllDomains()[0].backupStart(sys.argv[2], 1)
"""

_KILLED = """
import os, signal, sys, virtbackup
from virtbackup.qemu import process
process.Run.freeze = lambda self: os.kill(os.getpid(), signal.SIGKILL)
virtbackup.open(sys.argv[1]).listAllDomains()[0].backupStart(sys.argv[2], 1)
"""


_KILLED_AFTER_LIBVIRTD = f"""
import signal
import socket
def kill(self):
    os.kill(int(sys.argv[3]), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
{_KILLED.replace("lambda self: os.kill(os.getpid(), signal.SIGKILL)", "kill")}
"""


def killed_when_frozen(uri: str, directory: pathlib.Path) -> list[str]:
    """A process that starts a backup, and is killed while the file systems are frozen."""
    return [sys.executable, "-c", _KILLED, uri, document(directory / "nbd.sock")]


# --- agents that misbehave ------------------------------------------------------------------------


@dataclasses.dataclass
class Scene:
    """A machine without a guest, and its agent."""

    machine: machines.Machine
    agent: agents.FakeAgent
    directory: pathlib.Path

    @property
    def uri(self) -> str:
        return f"{self.machine.uri}?agent={self.agent.path}"

    @property
    def document(self) -> str:
        return document(self.directory / "nbd.sock")

    def start(self) -> None:
        with virtbackup.open(self.uri) as connection:
            connection.listAllDomains()[0].backupStart(self.document, QUIESCE)

    def stop(self) -> None:
        with virtbackup.open(self.uri) as connection:
            connection.listAllDomains()[0].backupStop()

    def thawing(self) -> list[int]:
        """The processes that are there to thaw."""
        told = os.fsencode(self.agent.path)
        found = []
        for one in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if told in (one / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(one.name))
        return found


@pytest.fixture(scope="module")
def machine() -> Iterator[machines.Machine]:
    with (
        tempfile.TemporaryDirectory(prefix="vb-agent-") as name,
        machines.two_disks(pathlib.Path(name), size=1 << 20) as one,
    ):
        yield one


@pytest.fixture
def scene(machine: machines.Machine, tmp_path: pathlib.Path) -> Iterator[Scene]:
    before = machine.state()
    with agents.FakeAgent(tmp_path / "qga.sock") as fake:
        yield Scene(machine, fake, tmp_path)
    assert machine.state() == before


def test_frozen_and_thawed_once(scene: Scene) -> None:
    scene.start()
    scene.agent.wait_for("freeze", "thaw")
    scene.stop()


HANGS: agents.Reply = lambda _: None  # noqa: E731


def hangs_up(_: dict[str, Any]) -> bytes:
    raise ConnectionError


REFUSALS: dict[str, tuple[dict[str, agents.Reply], str, list[str]]] = {
    "is not there for anybody": ({"sync": HANGS}, "does not answer", []),
    "refuses, as it does where somebody else has had all frozen": (
        {"freeze": agents.refuses("no way")}, "guest agent: no way", ["freeze"],
    ),
    "does not end a freeze": ({"freeze": HANGS}, "does not answer", ["freeze", "thaw"]),
    "hangs up": ({"freeze": hangs_up}, "it hung up", ["freeze", "thaw"]),
    "speaks of other things": (
        {"freeze": agents.returns("yes")}, "unexpected reply to guest-fsfreeze-freeze",
        ["freeze", "thaw"],
    ),
    "speaks no JSON": ({"freeze": lambda _: b"what?\n"}, "does not speak", ["freeze", "thaw"]),
    "is no agent": ({"freeze": lambda _: b"login: "}, "qga.sock' does not", ["freeze", "thaw"]),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSALS)
def test_an_agent_that(
    scene: Scene, how: str, monkeypatch: pytest.MonkeyPatch, state_dir: pathlib.Path
) -> None:
    """Nothing is started, nothing is left frozen; the same in a second, with an agent that does."""
    replies, text, commands = REFUSALS[how]
    scene.agent.on(**replies)
    with monkeypatch.context() as impatient:
        impatient.setattr(agent, "TIMEOUT", 1.0)
        impatient.setattr(agent, "FREEZE_TIMEOUT", 0.5)
        with pytest.raises(virtbackup.Error, match=text):
            scene.start()
    scene.agent.wait_for(*commands)
    assert not list(state_dir.glob("*.json"))
    scene.agent.on(sync=agents.sync, freeze=agents.returns(2))
    scene.start()
    scene.stop()


def test_an_agent_that_is_absent(machine: machines.Machine, tmp_path: pathlib.Path) -> None:
    before = machine.state()
    with virtbackup.open(f"{machine.uri}?agent={tmp_path}/none") as connection:
        [dom] = connection.listAllDomains()
        with pytest.raises(virtbackup.Error, match=f"guest agent '{tmp_path}/none': No such file"):
            dom.backupStart(document(tmp_path / "nbd.sock"), QUIESCE)
    with virtbackup.open(machine.uri) as connection:
        [dom] = connection.listAllDomains()
        with pytest.raises(virtbackup.Error, match="QEMU guest agent is not configured"):
            dom.backupStart(document(tmp_path / "nbd.sock"), QUIESCE)
    assert machine.state() == before


@pytest.mark.parametrize("failure", [virtbackup.Error(1, "refused"), KeyboardInterrupt()])
def test_a_transaction_that_fails(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def freeze(self: Any) -> None:
        raise failure

    monkeypatch.setattr(process.Run, "freeze", freeze)
    with pytest.raises(type(failure)):
        scene.start()
    scene.agent.wait_for("freeze", "thaw")


def test_an_interrupt_while_it_freezes(scene: Scene) -> None:
    """The second process thaws: we do not know how far the agent came."""

    def interrupt(_: dict[str, Any]) -> bytes | None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return None

    scene.agent.on(freeze=interrupt)
    with pytest.raises(KeyboardInterrupt):
        scene.start()
    scene.agent.wait_for("freeze", "thaw")


def test_an_interrupt_while_the_agent_does_not_answer(scene: Scene) -> None:
    """The agent was told nothing, so nobody tries to thaw."""
    struck = threading.Event()

    def interrupt(_: dict[str, Any]) -> bytes | None:
        if not struck.is_set():
            struck.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return None

    scene.agent.on(sync=interrupt)
    with pytest.raises(KeyboardInterrupt):
        scene.start()
    waiting.until(lambda: not scene.thawing())
    scene.agent.on(sync=agents.sync)
    scene.start()
    scene.stop()
    assert scene.agent.commands == ["freeze", "thaw"]


def test_an_interrupt_anywhere_leaves_nothing_frozen(scene: Scene) -> None:
    """Not for as long as its exception is looked at, either."""
    said = scene.agent.commands
    strikes = striking.Strikes(sys.maxsize, ("/agent.py",))
    with virtbackup.open(scene.uri) as connection:
        [dom] = connection.listAllDomains()
        while True:
            try:
                strikes.strike(lambda: dom.backupStart(scene.document, QUIESCE))
            except KeyboardInterrupt:
                waiting.until(lambda: said[-1:] != ["freeze"])
                waiting.until(lambda: not scene.thawing())
            else:
                break
            with contextlib.suppress(virtbackup.Error):
                dom.backupStop()
            said.clear()
        dom.backupStop()
    assert strikes.number > 60


def test_a_process_that_is_killed_while_all_is_frozen(scene: Scene) -> None:
    done = subprocess.run(killed_when_frozen(scene.uri, scene.directory), check=False)
    assert done.returncode == -signal.SIGKILL
    scene.agent.wait_for("freeze", "thaw")
    with virtbackup.open(scene.uri) as connection:
        connection.listAllDomains()[0].backupCleanup()


def test_killed_while_another_process_holds_its_files(scene: Scene) -> None:
    """One that was forked off meanwhile, and lives on."""
    argv = [sys.executable, "-c", _FORKED, scene.uri, scene.document]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        survivor = int(killed.stdout.readline())
        try:
            assert killed.wait() == -signal.SIGKILL
            scene.agent.wait_for("freeze", "thaw")
        finally:
            os.kill(survivor, signal.SIGKILL)
    with virtbackup.open(scene.uri) as connection:
        connection.listAllDomains()[0].backupCleanup()


@pytest.mark.parametrize("frozen", [agents.returns(2), hangs_up])
def test_a_thaw_that_fails_at_first(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, frozen: agents.Reply
) -> None:
    """Also after a freeze of which nobody knows what became of it."""
    monkeypatch.setattr(agent, "_PAUSE", 0.0)
    refused, real = agents.refuses("not now"), agents.returns(2)

    def second(message: dict[str, Any]) -> bytes | None:
        return real(message) if scene.agent.commands.count("thaw") == 2 else refused(message)

    scene.agent.on(freeze=frozen, thaw=second)
    if frozen is hangs_up:
        with pytest.raises(virtbackup.Error, match="it hung up"):
            scene.start()
        scene.agent.wait_for("freeze", "thaw", "thaw")
    else:
        scene.start()
        scene.agent.wait_for("freeze", "thaw", "thaw")
        scene.stop()


GONE = "Guest agent is not responding: Guest agent disappeared while executing command"


@pytest.mark.parametrize(
    ("code", "text", "attempts"),
    [
        # libvirtd ended, or its connection: the agent may have been told, and freeze.
        (libvirt.VIR_ERR_SYSTEM_ERROR, "cannot write data", agent.ATTEMPTS),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "cannot write data", agent.ATTEMPTS),
        (libvirt.VIR_ERR_RPC, "cannot write data", agent.ATTEMPTS),
        # So may have been one that ended, which comes back and finds the guest frozen.
        (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, GONE, agent.ATTEMPTS),
        # No agent was told anything, and there is none that could thaw.
        (libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, "not configured", 1),
        (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, "not connected", 1),
    ],
)
def test_a_freeze_by_libvirt_of_which_nobody_knows(
    code: int,
    text: str,
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(agent, "_PAUSE", 0.0)
    told: list[str] = []

    @contextlib.contextmanager
    def nobody(_: agent.Agent) -> Iterator[agent._Guard]:
        with contextlib.closing(socket.socket()) as unconnected:
            guard = agent._Guard(unconnected)
            monkeypatch.setattr(guard, "arm", lambda: setattr(guard, "is_done", False))
            try:
                yield guard
            finally:
                told.append("done" if guard.is_done else "goes on")

    class Domain:
        def fsFreeze(self) -> int:
            raise virtbackup.Error(code, text)

        def fsThaw(self) -> int:
            told.append("thaw")
            return self.fsFreeze()

    monkeypatch.setattr(agent, "_guard", nobody)
    with pytest.raises(virtbackup.Error, match=text):
        agent.standing_still(agent.LibvirtAgent(Domain, "guest"), lambda: None)
    assert told == ["thaw"] * attempts + ["goes on" if attempts > 1 else "done"]
    assert ("may be FROZEN (agent guest)" in capfd.readouterr().err) == (attempts > 1)


def test_a_connection_that_is_lost_before_the_freeze() -> None:
    """Nothing of ours can be frozen: what is, is somebody else's."""
    begun: list[str] = []

    def lost() -> libvirt.virDomain:
        raise virtbackup.Error(libvirt.VIR_ERR_INTERNAL_ERROR, "client socket is closed")

    with pytest.raises(virtbackup.Error, match="client socket is closed"):
        agent.LibvirtAgent(lost, "guest").freeze(lambda: begun.append("armed"))
    assert begun == []


def test_a_thaw_that_keeps_failing_is_said_aloud_and_tried_on(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The backup is good; the start does not wait for the one who tries on."""
    monkeypatch.setattr(agent, "_PAUSE", 0.0)
    times = agent.ATTEMPTS + 1
    refused, real = agents.refuses("not now"), agents.returns(2)

    def last(message: dict[str, Any]) -> bytes | None:
        return real(message) if scene.agent.commands.count("thaw") > times else refused(message)

    scene.agent.on(thaw=last)
    scene.start()
    assert "may be FROZEN" in capfd.readouterr().err
    assert "still FROZEN: operation failed: guest agent: not now" in caplog.text
    scene.agent.wait_for("freeze", *["thaw"] * (times + 1))
    scene.stop()


def test_a_libvirt_that_does_not_come_back_from_its_agent(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """libvirt itself waits for as long as it takes."""
    monkeypatch.setattr(agent, "FREEZE_TIMEOUT", 0.1)
    monkeypatch.setattr(agent, "TIMEOUT", 0.1)
    monkeypatch.setattr(agent, "_PAUSE", 0.0)
    over = threading.Event()

    class Domain:
        def fsFreeze(self) -> int:
            over.wait()
            return 0

        fsThaw = fsFreeze

    class Busy(Domain):
        def fsFreeze(self) -> int:
            text = "Timed out during operation: cannot acquire state change lock"
            raise virtbackup.Error(libvirt.VIR_ERR_OPERATION_TIMEOUT, text)

    class Frozen(Domain):
        def fsFreeze(self) -> int:
            text = "внутренняя ошибка: не удалось выполнить команду агента QEMU"
            text += " «guest-fsfreeze-freeze»: the agent is in frozen state"
            raise virtbackup.Error(libvirt.VIR_ERR_INTERNAL_ERROR, text)

    class FrozenByNewer(Domain):
        def fsFreeze(self) -> int:
            text = "guest agent command failed: unable to execute QEMU agent command"
            text += " 'guest-fsfreeze-freeze': Command guest-fsfreeze-freeze has been disabled"
            raise virtbackup.Error(113, text)

    for refusing in (
        Busy,
        Frozen,
        FrozenByNewer,
    ):  # by another's command, and ours was not sent; in any language
        with pytest.raises(agent.Refused):
            agent.LibvirtAgent(refusing, "guest").freeze(lambda: None)
    stuck = agent.LibvirtAgent(Domain, "guest")
    try:
        with pytest.raises(virtbackup.Error, match=r"no answer within 0\.1 seconds") as error:
            stuck.freeze(lambda: None)
        assert error.value.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
        assert not agent.thaw(stuck)
        assert "may be FROZEN (agent guest)" in capfd.readouterr().err
    finally:
        over.set()
