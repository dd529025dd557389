# SPDX-License-Identifier: LGPL-2.1-or-later
"""Daemons under test: in this process, on drivers that do as a test says, or as programs; and a
client that sends whatever it is told to."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import libvirt

from tests import waiting
from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, virtbackup_conf
from virtbackup.remote import (
    daemon,
    domains,
    program,
    protocol,
    remote_types,
    rpc,
    rpc_error,
    transport,
    wire_conf,
)

DEADLINE = waiting.DEADLINE
REMOTE, VIRTBACKUP, QEMU = protocol.REMOTE, protocol.VIRTBACKUP, protocol.QEMU
wait_for = waiting.until
PING = rpc.Message(0x6B656570, 1, 1, 2, 0)


# --- a client ---


class Raw:
    """A connection that says what it is told to, and waits for what comes."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(DEADLINE)
        self._parser = rpc.Parser()
        self._serial = 0
        self.events: list[rpc.Message] = []

    @classmethod
    def unix(cls, path: pathlib.Path | str) -> "Raw":
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(DEADLINE)
        made.connect(os.fspath(path))
        return cls(made)

    @classmethod
    def tcp(cls, port: int, context: ssl.SSLContext | None = None) -> "Raw":
        """With CONTEXT by tls."""
        made = socket.create_connection(("localhost", port), DEADLINE)  # whichever that is first
        if context is None:
            return cls(made)
        wrapped = context.wrap_socket(made, server_hostname="127.0.0.1")
        assert wrapped.recv(1) == transport.ACCEPTED
        return cls(wrapped)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def message(self, of: program.Program, name: str, *args: Any) -> rpc.Message:
        """A call with the next serial."""
        self._serial += 1
        kind = of[name].args
        value = None if kind is None else kind(*args)
        return rpc.call(of, name, self._serial, value)

    def post(self, of: program.Program, name: str, *args: Any) -> int:
        """Call, and do not wait; the serial."""
        message = self.message(of, name, *args)
        self.send(message.encode())
        return message.serial

    def receive(self) -> rpc.Message | None:
        """The next message; None at the end. Raises TimeoutError."""
        while (message := self._parser.next_message()) is None:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                return None
            self._parser.receive_data(data)
        return message

    def reply(self, serial: int | None = None) -> rpc.Message:
        """The reply to a call; events before it are kept."""
        while True:
            message = self.receive()
            assert message is not None, "the server has hung up"
            if message.type == program.MessageType.MESSAGE:
                self.events.append(message)
            elif serial in (None, message.serial):
                return message

    def event(self) -> rpc.Message:
        """The next event."""
        if self.events:
            return self.events.pop(0)
        message = self.receive()
        assert message is not None
        assert message.type == program.MessageType.MESSAGE
        return message

    def call(self, of: program.Program, name: str, *args: Any) -> Any:
        """What is returned. Raises what the server raised."""
        message = self.reply(self.post(of, name, *args))
        if message.status != program.MessageStatus.OK:
            raise rpc_error.of_reply(message)
        return rpc.ret(message)

    def open(self, uri: str | None = "", flags: int = 0) -> "Raw":
        self.call(REMOTE, "CONNECT_OPEN", uri, flags)
        return self

    def lookup(self, name: str) -> remote_types.NonnullDomain:
        found = self.call(REMOTE, "DOMAIN_LOOKUP_BY_NAME", name)
        assert isinstance(found.dom, remote_types.NonnullDomain)
        return found.dom

    def names(self) -> list[str]:
        """Of all domains, as listed."""
        listed = self.call(REMOTE, "CONNECT_LIST_ALL_DOMAINS", 1, 0)
        return [dom.name for dom in listed.domains]

    def is_dropped(self) -> bool:
        """Whether the server hangs up, whatever it still says."""
        try:
            while self.receive() is not None:
                pass
        except TimeoutError:
            return False
        except (OSError, rpc.ProtocolError):
            return True
        return True

    def is_served(self) -> bool:
        """Whether a call is answered."""
        self.call(REMOTE, "AUTH_LIST")
        return True


def code_of(what: Callable[..., object], *args: object) -> tuple[int, str]:
    """(code, text) of the error that a call raises."""
    try:
        what(*args)
    except libvirt.libvirtError as failure:
        return failure.get_error_code(), str(failure)
    raise AssertionError("no error")


# --- drivers ---


def ref(name: str, id: int | None = 1, number: int | None = None) -> hypervisor.DomainRef:
    """A domain whose uuid follows from its name, or NUMBER."""
    value = uuid.uuid5(uuid.NAMESPACE_DNS, name) if number is None else uuid.UUID(int=number)
    return hypervisor.DomainRef(name, str(value), id)


@dataclasses.dataclass
class Running:
    """A backup of a fake driver."""

    id: str
    xml: str
    started: float = dataclasses.field(default_factory=time.time)


class Driver:
    """Does as a test says; keeps backups in mind. ``hold(hook)`` has calls of a hook wait."""

    def __init__(self, *refs: hypervisor.DomainRef, host: str = "here") -> None:
        self.refs = list(refs)
        self.host = host
        self.running: dict[str, Running] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.closed = False
        self.state = (1, 1)
        self.failures: dict[str, Exception] = {}
        """Hook -> what it raises."""
        self._held: dict[str, threading.Event] = {}
        self.entered: dict[str, threading.Semaphore] = {}
        self._tell: Callable[[hypervisor.Event], None] | None = None
        self._lock = threading.Lock()
        self._number = 0

    def hold(self, hook: str) -> threading.Event:
        """Have calls of HOOK wait until what is returned is set."""
        self.entered[hook] = threading.Semaphore(0)
        self._held[hook] = threading.Event()
        return self._held[hook]

    def wait_entered(self, hook: str, times: int = 1) -> None:
        """Until HOOK, which is held, was called that often."""
        for _ in range(times):
            assert self.entered[hook].acquire(timeout=DEADLINE)

    def _enter(self, hook: str, *args: Any) -> None:
        self.calls.append((hook, *args))
        if (held := self._held.get(hook)) is not None:
            self.entered[hook].release()
            assert held.wait(DEADLINE * 3), hook
        if (failure := self.failures.get(hook)) is not None:
            raise failure

    def close(self) -> None:
        if "close" in self._held:  # else it is no call that tests count
            self._enter("close")
        self.closed = True

    def get_type(self) -> str:
        return "QEMU"

    def get_version(self) -> int:
        return 9000000

    def get_hostname(self) -> str:
        self._enter("get_hostname")
        return self.host

    def is_alive(self) -> bool:
        return True

    def set_trace(self, trace: TextIO | None) -> None:
        pass

    def event_register(self, callback: Callable[[hypervisor.Event], None]) -> Callable[[], None]:
        self._tell = callback
        return lambda: None

    def tell(self, event: hypervisor.Event) -> None:
        assert self._tell is not None
        self._tell(event)

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        self._enter("list_domains")
        return list(self.refs)

    def domain_get_state(self, domain: hypervisor.DomainRef) -> tuple[int, int]:
        self._enter("domain_get_state", domain)
        return (5, 0) if domain.id is None else self.state

    def domain_get_xml_desc(self, domain: hypervisor.DomainRef, flags: int) -> str:
        self._enter("domain_get_xml_desc", domain, flags)
        return (
            f"<domain type='kvm'><name>{domain.name}</name><uuid>{domain.uuid}</uuid><devices>"
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
            "<source file='/a.qcow2'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
        )

    def domain_suspend(self, domain: hypervisor.DomainRef) -> None:
        self._enter("domain_suspend", domain)

    def domain_fsfreeze(
        self, domain: hypervisor.DomainRef, mountpoints: Sequence[str], flags: int
    ) -> int:
        self._enter("domain_fsfreeze", domain)
        return 2

    def domain_monitor_command(self, domain: hypervisor.DomainRef, command: str, flags: int) -> str:
        self._enter("domain_monitor_command", domain, command)
        return "{}"

    def domain_backup_start(self, domain: hypervisor.DomainRef, xml: str, flags: int) -> None:
        self._enter("domain_backup_start", domain, xml, flags)
        with self._lock:
            if domain.uuid in self.running:
                raise errors.error(libvirt.VIR_ERR_OPERATION_INVALID, "another backup is running")
            self._number += 1
            self.running[domain.uuid] = Running(f"b{self._number}", xml)

    def domain_backup_stop(self, domain: hypervisor.DomainRef, flags: int) -> None:
        self._enter("domain_backup_stop", domain, flags)
        with self._lock:
            self._of(domain)
            del self.running[domain.uuid]
        if self._tell is not None:
            self._tell(hypervisor.BackupEnded(domain, not flags, "cancelled" if flags else None))

    def _of(self, domain: hypervisor.DomainRef) -> Running:
        if domain.uuid not in self.running:
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP, "no backup is running")
        return self.running[domain.uuid]

    def domain_backup_get_xml_desc(self, domain: hypervisor.DomainRef, flags: int) -> str:
        self._enter("domain_backup_get_xml_desc", domain, flags)
        return self._of(domain).xml

    def domain_backup_get_info(
        self, domain: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        self._enter("domain_backup_get_info", domain, flags)
        one = self._of(domain)
        address = backup_conf.UnixAddress("/x.sock")
        return backup_conf.BackupInfo("running", one.started, address, (), id=one.id)

    def domain_branch_list(
        self, domain: hypervisor.DomainRef, flags: int
    ) -> Sequence[backup_conf.Branch]:
        self._enter("domain_branch_list", domain, flags)
        return []


# --- a daemon in this process ---


@dataclasses.dataclass
class Served:
    """A daemon that runs."""

    daemon: daemon.Daemon
    path: pathlib.Path
    places: list[str]
    thread: threading.Thread

    def raw(self) -> Raw:
        return Raw.unix(self.path)

    def connect(self) -> Raw:
        """A client whose connection is open."""
        return self.raw().open()

    def port(self, kind: str) -> int:
        """Of the listener by tcp or tls."""
        return next(int(p.rpartition(":")[2]) for p in self.places if p.startswith(f"{kind}:"))

    def stop(self) -> None:
        self.daemon.stop()
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()


def _same(driver: hypervisor.Driver) -> hypervisor.Driver:
    return driver


@contextlib.contextmanager
def serving(
    directory: pathlib.Path,
    *drivers: hypervisor.Driver | Callable[[], hypervisor.Driver],
    listen: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    patience: float | None = None,
    uri: str = "fake{}:///",
) -> Iterator[Served]:
    """A daemon for DRIVERS, on a unix socket and at LISTEN; LIMITS are the server's that no setting
    changes."""
    path = directory / "daemon.sock"
    hosts = [
        domains.Host(
            uri.format(n), driver if callable(driver) else functools.partial(_same, driver)
        )
        for n, driver in enumerate(drivers)
    ]
    made = daemon.Daemon(hosts, virtbackup_conf.Settings(**(settings or {})))
    if limits:
        made.server.limits = dataclasses.replace(made.server.limits, **limits)
    if patience is not None:
        made.domains.patience = patience
    places = [made.listen(transport.parse_address(text)) for text in (f"unix:{path}", *listen)]
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    served = Served(made, path, places, thread)
    try:
        yield served
    finally:
        served.stop()


# --- a daemon as a program ---


class Program:
    """``virtbackupd`` with ARGV; its standard error is in ``log``."""

    def __init__(
        self,
        directory: pathlib.Path,
        *argv: str,
        name: str = "virtbackupd",
        env: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.path = directory / f"{name}.sock"
        self.log = directory / f"{name}.log"
        if not any(word.startswith("--listen") for word in argv) and command is None:
            argv = (*argv, "--listen", f"unix:{self.path}")
        if command is None:
            command = [sys.executable, "-m", "virtbackup.tools.virtbackupd", "-v"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})},
                pass_fds=pass_fds,
            )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        said = self.process.stdout.readline().decode() if ready else "nothing"
        match = re.fullmatch(r"virtbackupd: listening on (.*)\n", said)
        if match is None:
            self.process.terminate()
            self.process.wait(DEADLINE)
            raise AssertionError(f"{said!r} {self.log.read_text()}")
        self.places = match[1].split(", ")

    @property
    def pid(self) -> int:
        return self.process.pid

    def raw(self) -> Raw:
        return Raw.unix(self.path)

    def connect(self) -> Raw:
        return self.raw().open()

    @property
    def uri(self) -> str:
        """For libvirt's own clients."""
        return f"qemu:///system?socket={self.path}"

    def end(self, by: int = signal.SIGTERM) -> int:
        """How it ended."""
        self.process.send_signal(by)
        return self.wait()

    def wait(self) -> int:
        try:
            status = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # it says where it is
            self.process.wait(DEADLINE)
            raise AssertionError(f"it does not end: {self.log.read_text()[-9999:]}") from None
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def fds(self) -> int:
        """How many descriptors it has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))  # noqa: PTH208

    def rss(self) -> int:
        """Bytes that are resident."""
        pages = pathlib.Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)


@contextlib.contextmanager
def running(directory: pathlib.Path, *uris: str) -> Iterator[Program]:
    """``virtbackupd`` for URIS, which is asked to end in the end, and does so in good order."""
    with Program(directory, *(word for uri in uris for word in ("--uri", uri))) as one:
        yield one
        assert one.end() == 0, one.log.read_text()


def domain(name: str, id: int | None = 1, number: int | None = None) -> remote_types.NonnullDomain:
    """``ref`` as it is sent."""
    return wire_conf.domain_to_wire(ref(name, id, number))
