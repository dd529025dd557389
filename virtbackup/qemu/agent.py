# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest agent, for the instant of a start: the guest's file systems stand still and go on
(qemu_agent.c). By libvirt, or by the agent's own socket.

Frozen file systems are worse than no backup, so there is a second process that thaws them should
this one die in between; and a thaw that fails is tried again, and said aloud.
"""

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import libvirt

from virtbackup import errors
from virtbackup.qemu import qmp

logger = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds until the agent must have answered that it is there, or thawed."""
READY_TIMEOUT = 30.0
"""Seconds until the process that thaws in our place must be there."""
FREEZE_TIMEOUT = 60.0
"""Seconds that a freeze may take: the guest writes out what it has."""
ATTEMPTS = 3
"""How often a thaw is tried."""
MORE_ATTEMPTS = 60
"""How often the second process tries, whom nobody waits for."""
_PAUSE = 1.0
"""Seconds between two attempts."""
_FREEZE = "guest-fsfreeze-freeze"
_SENTINEL = b"\xff"
"""What the agent's answer to a delimited sync begins with: what came before is of no use."""


class Refused(errors.Error):
    """The agent's own word that it has frozen nothing, or libvirt's that it has not asked it. What
    stands still all the same, somebody else has had frozen, and counts on it."""


class NoAnswer(errors.Error):
    """Nobody knows what the agent has done, or may do yet."""


class Agent(Protocol):
    """A guest's agent."""

    name: str
    """For people."""

    @property
    def what(self) -> tuple[str, ...]:
        """What the second process is told, to find the same agent. Errors: libvirt.libvirtError."""

    def freeze(self, begin: Callable[[], None]) -> int:
        """Freeze all file systems; how many. BEGIN is called before the agent is told to, what it
        raises is raised. Errors: errors.Error, Refused among them."""

    def thaw(self) -> None:
        """Thaw all of them. Errors: libvirt.libvirtError."""


class LibvirtAgent:
    """The agent of the domain that LOOKUP finds; NAME is for people."""

    def __init__(self, lookup: "Callable[[], libvirt.virDomain]", name: str) -> None:
        self._lookup = lookup
        self.name = name

    @property
    def what(self) -> tuple[str, ...]:
        domain = self._lookup()
        return "libvirt", domain.connect().getURI(), domain.UUIDString()

    def freeze(self, begin: Callable[[], None]) -> int:
        domain = _in_time(self._lookup, TIMEOUT)  # nothing is asked of who is not found
        begin()
        try:
            return int(_in_time(domain.fsFreeze, FREEZE_TIMEOUT))
        except errors.Error as failure:
            code = failure.get_error_code()
            # Of a command that was sent libvirt has another code for that: somebody else's agent
            # command, a freeze maybe, has not ended.
            if code == libvirt.VIR_ERR_OPERATION_TIMEOUT and not isinstance(failure, NoAnswer):
                raise _refused(failure) from failure
            # libvirt names the command where the agent has answered it, in whatever language.
            if code in _ANSWERED and _FREEZE in str(failure):
                raise _refused(failure) from failure
            if code == libvirt.VIR_ERR_OPERATION_INVALID and self._is_active():
                text = "domain is not running: it is paused or suspended, and its guest agent, too"
                raise errors.error(code, text) from failure
            raise

    def _is_active(self) -> bool:
        try:
            return bool(self._lookup().isActive())
        except libvirt.libvirtError:
            return False

    def thaw(self) -> None:
        _in_time(lambda: self._lookup().fsThaw(), TIMEOUT)


def _in_time(call: Callable[[], Any], limit: float) -> Any:
    """What CALL returns or raises. Errors: NoAnswer; it is left to itself then."""
    returned: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as failure:  # noqa: BLE001  (raised again)
            failed.append(failure)

    thread = threading.Thread(target=run, name="virtbackup-agent", daemon=True)
    thread.start()
    thread.join(limit)
    if failed:
        failure = failed[0]
        raise errors.of_libvirt(failure) if isinstance(failure, libvirt.libvirtError) else failure
    if not returned:
        raise NoAnswer(
            libvirt.VIR_ERR_OPERATION_TIMEOUT,
            f"Timed out during operation: guest agent: no answer within {limit:g} seconds",
        )
    return returned[0]


class SocketAgent:
    """The agent behind a unix socket of QEMU's (``-chardev socket,...,server=on``), which serves
    one client at a time."""

    def __init__(self, path: str) -> None:
        self._path = self.name = path

    @property
    def what(self) -> tuple[str, ...]:
        return "socket", self._path

    def freeze(self, begin: Callable[[], None]) -> int:
        count = self._execute(_FREEZE, FREEZE_TIMEOUT, begin)
        if type(count) is not int:
            raise _failed(f"unexpected reply to {_FREEZE}: {qmp.shown(count)}")
        return count

    def thaw(self) -> None:
        self._execute("guest-fsfreeze-thaw", TIMEOUT)

    def _execute(
        self, command: str, timeout: float, begin: Callable[[], None] = lambda: None
    ) -> object:
        """What COMMAND returns, by a connection that is known to be answered; not held by who looks
        at a signal's exception (SIGINT), as nobody else could thaw then."""
        end = time.monotonic() + TIMEOUT
        code = libvirt.VIR_ERR_AGENT_UNRESPONSIVE
        opened = socket.socket(socket.AF_UNIX)
        try:
            opened.settimeout(TIMEOUT)
            opened.connect(self._path)
            connection = _Connection(opened, self._path)
            connection.sync(end)
            begin()
            code = libvirt.VIR_ERR_OPERATION_TIMEOUT
            replied = connection.execute(command, timeout)
        except TimeoutError as failure:
            raise errors.error(code, f"guest agent '{self._path}' does not answer") from failure
        except OSError as failure:
            raise errors.system_error(
                failure, f"cannot speak to guest agent '{self._path}'"
            ) from failure
        except qmp.ProtocolError as failure:  # no line that ends, of either
            raise _failed(f"'{self._path}' does not speak as an agent") from failure
        finally:
            opened.close()
        return replied


class _Connection:
    """One JSON object a line each way, as docs/interop/qemu-ga says."""

    def __init__(self, opened: socket.socket, path: str) -> None:
        self._socket = opened
        self._path = path
        self._parser = qmp.Parser()

    def sync(self, end: float) -> None:
        """Wait until the agent answers us, whatever was said before. Errors: TimeoutError."""
        token = int.from_bytes(os.urandom(4), "big") >> 1
        request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        self._socket.sendall(_SENTINEL + json.dumps(request).encode() + b"\n")
        seen = b""
        while _SENTINEL not in seen:
            seen = self._receive(end)
        self._parser.receive_data(seen.rpartition(_SENTINEL)[2])
        while self._answer(end) != token:
            pass

    def execute(self, command: str, timeout: float) -> object:
        """What COMMAND returns. Errors: errors.Error with the agent's words; TimeoutError."""
        self._socket.sendall(json.dumps({"execute": command}).encode() + b"\n")
        return self._answer(time.monotonic() + timeout)

    def _answer(self, end: float) -> object:
        while (line := self._parser.next_line()) is None:
            self._parser.receive_data(self._receive(end))
        try:
            message = json.loads(line)
        except ValueError as failure:
            raise _failed(f"'{self._path}' does not speak as an agent: {failure}") from failure
        match message:
            case {"return": value}:
                return value
            case {"error": {"desc": str(desc)}}:
                raise _refused(_failed(qmp.one_line(desc)))
        raise _failed(f"'{self._path}' does not speak as an agent: {qmp.shown(message)}")

    def _receive(self, end: float) -> bytes:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        if data := self._socket.recv(1 << 16):
            return data
        raise ConnectionError("it hung up")


def _failed(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_OPERATION_FAILED, f"guest agent: {detail}")


def _refused(failure: errors.Error) -> Refused:
    refused = Refused(failure.get_error_code(), str(failure))
    refused.err = failure.err
    return refused


# --- for the instant of a start ---


def standing_still(agent: Agent, do: Callable[[], None]) -> None:
    """DO it while the guest's file systems are frozen, which are thawed whatever happens.

    Errors: those of ``Agent.freeze``, nothing being frozen by us then; VIR_ERR_SYSTEM_ERROR.
    """
    with _guard(agent) as guard:
        try:
            count = agent.freeze(guard.arm)
        except libvirt.libvirtError as failure:
            guard.is_done = guard.is_done or _thawed_after(failure, agent)
            raise
        began = time.monotonic()
        try:
            do()
        finally:
            guard.is_done = thaw(agent)
        seconds = time.monotonic() - began
        logger.info("agent=%s frozen=%d seconds=%.3f", agent.name, count, seconds)


def _thawed_after(failure: "libvirt.libvirtError", agent: Agent) -> bool:
    """Whether nothing of ours is frozen after a freeze that failed: some file systems may be, all
    the same, but where the agent refused, and one that did not answer may yet freeze, as may one
    with whom the connection was lost, to it or to libvirtd, or that was lost to the guest."""
    if isinstance(failure, Refused):
        return True
    if failure.get_error_code() not in _NO_AGENT or _DISAPPEARED in str(failure):
        return thaw(agent)
    with contextlib.suppress(libvirt.libvirtError):
        agent.thaw()
    return True


# Codes of newer libvirts, which a libvirt-python may not know that speaks to one.
_AGENT_COMMAND_FAILED = 113
_ANSWERED = {libvirt.VIR_ERR_INTERNAL_ERROR, _AGENT_COMMAND_FAILED}
"""The agent's own error."""
_NO_AGENT = {
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED, libvirt.VIR_ERR_NO_SUPPORT,
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_OPERATION_INVALID,
    libvirt.VIR_ERR_OPERATION_DENIED, libvirt.VIR_ERR_ACCESS_DENIED, libvirt.VIR_ERR_NO_DOMAIN,
}  # fmt: skip
"""There is no agent that could be told, or none that listens. Of any other failure nobody knows
whether the command was sent, and what became of it."""
_DISAPPEARED = "Guest agent disappeared"
"""libvirt's words for an agent that ended as it was asked: of the code of one that does not listen,
VIR_ERR_AGENT_UNRESPONSIVE, but it may have frozen before."""


def thaw(
    agent: Agent, attempts: int = ATTEMPTS, pause: Callable[[float], None] = time.sleep
) -> bool:
    """Whether the file systems go on; a failure is said aloud, and tried again."""
    for attempt in range(attempts):
        if attempt:
            pause(_PAUSE)
        try:
            agent.thaw()
        except libvirt.libvirtError as failure:
            if failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return True  # there is nothing any more that could stand still
            logger.error("agent=%s the guest's file systems are still FROZEN: %s",
                         agent.name, failure)  # fmt: skip
        else:
            return True
    text = (
        "warning: the guest's file systems could not be thawed and may be FROZEN"
        f" (agent {agent.name}): thaw them, as by 'virsh domfsthaw'"
    )
    print(text, file=sys.stderr, flush=True)
    return False


_ARMED, _DONE = b"armed\n", b"done\n"


class _Guard:
    """What the second process is told, by a SOCKET to its standard input and output."""

    def __init__(self, socket: socket.socket) -> None:
        self.is_done = True
        """Nothing is frozen, or nothing any more."""
        self._socket = socket

    def is_ready(self) -> bool:
        """Whether the second process is there to thaw."""
        wait = select.poll()  # of any descriptor, however many are open
        wait.register(self._socket, select.POLLIN)
        with contextlib.suppress(OSError):
            return bool(wait.poll(READY_TIMEOUT * 1000)) and self._socket.recv(1) != b""
        return False

    def arm(self) -> None:
        """From now on the guest may be frozen. Errors: VIR_ERR_OPERATION_FAILED."""
        self.is_done = False
        try:
            self._socket.sendall(_ARMED)
        except OSError as failure:
            self.is_done = True
            raise _failed("what is to thaw the guest, should we die, has ended") from failure

    def dismiss(self) -> None:
        """Have the second process end; or thaw, on its own."""
        with contextlib.suppress(OSError):  # it has ended already
            if self.is_done:
                self._socket.sendall(_DONE)
        self._socket.close()


_MAIN = (
    "import sys; sys.path[:] = {path!r}; from {module} import main; sys.exit(main(sys.argv[1:]))"
)

_left_alone: list["subprocess.Popen[bytes]"] = []
"""Processes that still try to thaw."""


@contextlib.contextmanager
def _guard(agent: Agent) -> Iterator[_Guard]:
    """A process that thaws if this one ends within once it is armed, or cannot do it itself.

    Errors: VIR_ERR_SYSTEM_ERROR, VIR_ERR_OPERATION_FAILED.
    """
    _left_alone[:] = [one for one in _left_alone if one.poll() is None]
    main = _MAIN.format(path=sys.path, module=__name__)
    argv = [sys.executable, "-c", main, str(os.getpid()), *agent.what]
    # Not pipes of subprocess's, which keeps what is running for ever: a signal's exception may come
    # as it has started the process, and then nobody would close them.
    pair: tuple[socket.socket, ...] = ()
    try:
        try:
            pair = socket.socketpair()
            guard = _Guard(pair[0])
            theirs = pair[1].fileno()
            process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, start_new_session=True)
        except OSError as failure:
            raise errors.system_error(failure, "cannot start what thaws the guest") from failure
        pair[1].close()
        try:
            if not guard.is_ready():
                raise _failed("what is to thaw the guest, should we die, cannot reach its agent")
            yield guard
        finally:
            guard.dismiss()
            _see_off(process, guard.is_done)
    finally:
        for end in pair:
            end.close()


def _see_off(process: "subprocess.Popen[bytes]", is_done: bool) -> None:
    if not is_done:
        logger.error("process %d goes on trying to thaw the guest", process.pid)
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TIMEOUT)
            return
    _left_alone.append(process)


class _Lookup:
    """Finds the domain of a UUID by a connection to URI, or by another one once that is lost."""

    def __init__(self, uri: str, uuid: str) -> None:
        """Errors: libvirt's own."""
        self._uri = uri
        self._uuid = uuid
        self._connection = libvirt.open(uri)
        self()

    def __call__(self) -> "libvirt.virDomain":
        if not self._connection.isAlive():
            self._connection = libvirt.open(self._uri)
        return self._connection.lookupByUUIDString(self._uuid)


def main(argv: list[str]) -> int:
    """The second process: ready once it has said so. ARGV: the first process, and its agent."""
    agent: Agent
    if argv[1] == "libvirt":
        libvirt.registerErrorHandler(lambda *_: None, None)  # it would print what is raised
        try:
            agent = LibvirtAgent(_Lookup(argv[2], argv[3]), argv[3])
        except libvirt.libvirtError as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
    else:
        agent = SocketAgent(argv[2])
    parent = None
    with contextlib.suppress(OSError):  # before Linux 5.3
        parent = os.pidfd_open(int(argv[0]))
    with contextlib.suppress(OSError):  # nobody looks, and so nobody will arm us
        os.write(sys.stdout.fileno(), b".")
    if not _is_left_armed(parent):
        return 0
    return 0 if thaw(agent, MORE_ATTEMPTS) else 1


def _is_left_armed(parent: int | None) -> bool:
    """Wait until we are told that nothing is frozen, or our input ends, or the process of
    descriptor PARENT; whether something may be frozen. Both ends, as a process that was forked
    meanwhile may hold our input open."""
    said = b""
    wait = select.poll()
    wait.register(sys.stdin, select.POLLIN)
    if parent is not None:
        wait.register(parent, select.POLLIN)
    while not said.endswith(_DONE):
        ready = dict(wait.poll())
        if sys.stdin.fileno() not in ready:
            break
        more = b""
        with contextlib.suppress(OSError):  # of who ended without a look at our word
            more = os.read(sys.stdin.fileno(), len(_ARMED + _DONE))
        if not more:
            break
        said += more
    return said == _ARMED
