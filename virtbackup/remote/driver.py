# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver for a server at the other end of a connection (libvirt's remote_driver.c).

``virtbackup+unix:///path``, ``virtbackup+tls://host/``, ``virtbackup+tcp://host/``: a virtbackupd,
or a daemon of libvirt's own, whose backups are made by its merged calls then. A backup runs on when
the connection is lost, but for one that was to end with it.
"""

import contextlib
import functools
import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import libvirt

from virtbackup import errors, hypervisor, native
from virtbackup.conf import backup_conf
from virtbackup.conf import xml as conf_xml
from virtbackup.remote import (
    client,
    connect,
    libvirt_native,
    program,
    remote_types,
    rpc,
    rpc_error,
    virtbackup_protocol,
    wire_conf,
    xdr,
)
from virtbackup.remote import remote_structs as structs
from virtbackup.remote.protocol import QEMU, REMOTE, VIRTBACKUP

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT = 30.0
"""Seconds that a server may take for its first answers; later ones may take what they take, while
it answers pings."""
CLOSE_TIMEOUT = 60.0
"""Seconds that a server may take to end the backups that were to end with the connection."""

_ALL_NEEDED = 1
"""``need_results``: what is listed is wanted, not only how much it is."""

Callback = Callable[[hypervisor.Event], None]


@hypervisor.checked_by(connect.parse_uri)
def open(uri: str, readonly: bool) -> "RemoteDriver":
    """Errors: VIR_ERR_INVALID_ARG for a URI that makes no sense; those of ``connect.connect``;
    VIR_ERR_AUTH_FAILED; the server's."""
    return RemoteDriver(connect.parse_uri(uri), readonly)


# --- events ---


class _Events:
    """Who wants to be told of events. A connection has this rather than the driver, which may be
    forgotten with its connection open."""

    def __init__(self) -> None:
        self.callbacks: tuple[Callback, ...] = ()

    def see(self, message: rpc.Message) -> None:
        """Tell of an event, by the connection's own thread."""
        read = _EVENTS.get((message.program, message.procedure))
        if read is None:
            return
        try:
            event = read(rpc.args(message))
        except rpc.CodecError as failure:
            logger.warning("an event that cannot be decoded: %s", failure)
            return
        if event is None:
            return
        for callback in self.callbacks:
            try:
                callback(event)
            except Exception:
                logger.exception("the callback of an event failed")


def _lifecycle(sent: structs.DomainEventCallbackLifecycleMsg) -> hypervisor.Event | None:
    domain = wire_conf.domain_from_wire(sent.msg.dom)
    return hypervisor.LifecycleEvent(domain, sent.msg.event, sent.msg.detail)


def _backup_ended(sent: virtbackup_protocol.BackupEndedMsg) -> hypervisor.Event | None:
    domain = wire_conf.domain_from_wire(sent.dom)
    return hypervisor.BackupEnded(domain, sent.good, sent.reason)


def _job_completed(sent: structs.DomainEventCallbackJobCompletedMsg) -> hypervisor.Event | None:
    """Of libvirt's own: a pull that was aborted is one that ended as it should."""
    params = wire_conf.params_from_wire(sent.params)
    if params.get("operation") != libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
        return None
    good = bool(params.get("success", True))
    reason = None if good else str(params.get("errmsg", "libvirt's backup job failed"))
    return hypervisor.BackupEnded(wire_conf.domain_from_wire(sent.dom), good, reason)


_EVENTS: dict[tuple[int, int], Callable[[Any], hypervisor.Event | None]] = {
    (of.number, of[name].number): read
    for of, name, read in (
        (REMOTE, "DOMAIN_EVENT_CALLBACK_LIFECYCLE", _lifecycle),
        (REMOTE, "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED", _job_completed),
        (VIRTBACKUP, "BACKUP_ENDED", _backup_ended),
    )
}

_Registration = tuple[program.Program, str, object, str]
"""(program, register, its arguments, deregister)."""


def _registrations(is_ours: bool) -> Iterator[_Registration]:
    """What has a server tell us of all domains."""
    lifecycle = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
    job_completed = libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED
    register = "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"
    deregister = "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY"
    for id in (lifecycle,) if is_ours else (lifecycle, job_completed):
        args = structs.ConnectDomainEventCallbackRegisterAnyArgs(id, None)
        yield REMOTE, register, args, deregister
    if is_ours:
        of_all = virtbackup_protocol.BackupEventRegisterArgs(None)
        yield VIRTBACKUP, "BACKUP_EVENT_REGISTER", of_all, "BACKUP_EVENT_DEREGISTER"


# --- one connection, opened ---


class _Session:
    """A connection on which the hypervisor is open."""

    def __init__(self, connection: client.Client, target: connect.Target, readonly: bool) -> None:
        """Errors: VIR_ERR_AUTH_FAILED, the server's; CONNECTION is closed then."""
        self.client = connection
        self._registered: list[tuple[program.Program, str, int]] = []
        try:
            self._authenticate()
            if self._supports(remote_types.FEATURE_PROGRAM_KEEPALIVE):
                connection.start_keepalive()
            flags = libvirt.VIR_CONNECT_RO if readonly else 0
            connection.call(REMOTE, "CONNECT_OPEN", structs.ConnectOpenArgs(target.name, flags))
            self.is_ours = self._knows_our_program()
        except BaseException:
            connection.close()
            raise

    def _authenticate(self) -> None:
        try:
            types = self.client.call(REMOTE, "AUTH_LIST", timeout=ANSWER_TIMEOUT).types
        except errors.Error as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise
            return  # an old server, that wants nothing
        match types[0] if types else remote_types.AUTH_NONE:
            case remote_types.AUTH_NONE:
                pass
            case remote_types.AUTH_POLKIT:
                if not self.client.call(REMOTE, "AUTH_POLKIT").complete:
                    raise _auth_failed("polkit has not authorized the connection")
            case remote_types.AUTH_SASL:
                raise _auth_failed("the server wants SASL, which this client does not speak")
            case unknown:
                raise _auth_failed(f"unsupported authentication type {unknown}")

    def _supports(self, feature: int) -> bool:
        args = structs.ConnectSupportsFeatureArgs(feature)
        try:
            answer = self.client.call(REMOTE, "CONNECT_SUPPORTS_FEATURE", args, ANSWER_TIMEOUT)
        except errors.Error as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise
            return False
        return bool(answer.supported)

    def _knows_our_program(self) -> bool:
        try:
            self.client.call(VIRTBACKUP, "SUPPORTED")
        except errors.Error as failure:
            if not rpc_error.is_unknown_program(failure):
                raise
            return False
        return True

    def register(self) -> None:
        """Be told of events, of those that it is not so of yet. Errors: the server's."""
        known = len(self._registered)  # some alone, where a KeyboardInterrupt came in between
        try:
            for of, name, args, deregister in itertools.islice(
                _registrations(self.is_ours), known, None
            ):
                id = self.client.call(of, name, args).callbackID
                self._registered.append((of, deregister, id))
        except errors.Error:
            self.deregister()
            raise

    def deregister(self) -> None:
        """Be told of events no more."""
        registered, self._registered = self._registered, []
        for of, name, id in registered:
            with contextlib.suppress(errors.Error):  # it is lost, and the events with it
                self.client.call(of, name, structs.CallbackIdArgs(id))


def _auth_failed(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_AUTH_FAILED, detail, domain=libvirt.VIR_FROM_RPC)


# --- the driver ---


class RemoteDriver:
    """A hypervisor at the other end of a connection. Every method may be called by any thread."""

    def __init__(
        self,
        target: connect.Target,
        readonly: bool = False,
        interval: float = client.KEEPALIVE_INTERVAL,
        count: int = client.KEEPALIVE_COUNT,
    ) -> None:
        """INTERVAL and COUNT: as ``client.Client``. Errors: as ``open``."""
        self._target = target
        self._readonly = readonly
        self._keepalive = interval, count
        self._pid = os.getpid()
        self._trace = client.Trace()
        self._events = _Events()
        patience = native.PATIENCE if target.reconnect else 0.0
        self._jobs = native.NativeJobs(libvirt_native.Calls(self._of), patience)
        self._closed = False
        self._warned = False
        self._connecting = threading.RLock()
        self._current = self._connect()

    def __del__(self) -> None:
        if "_current" in vars(self) and not self._closed and not sys.is_finalizing():
            self._current.client.abandon()

    # --- the connection ---

    def close(self) -> None:
        """Have the server end the backups that were started to end with us, and hang up. In a
        process that was forked from the one that opened us, nothing: what there is is the other's.
        """
        if os.getpid() != self._pid:
            return
        self._jobs.close()
        with self._connecting:
            if self._closed:
                return
            self._closed = True
        connection = self._current.client
        with contextlib.suppress(errors.Error):  # it is lost, or being shut down
            connection.call(REMOTE, "CONNECT_CLOSE", timeout=CLOSE_TIMEOUT)
        connection.close()

    def _connect(self) -> _Session:
        target = self._target
        connection = client.Client(
            connect.connect(target),
            connect.place(target.address),
            self._events.see,
            self._trace,
            *self._keepalive,
        )
        session = _Session(connection, target, self._readonly)
        if not session.is_ours and not self._warned:
            self._warned = True
            logger.warning("server is libvirt's own: using virDomainBackupBegin")
        return session

    def _session(self) -> _Session:
        """The connection; a new one in place of one that was lost, where that is wanted.
        Errors: as ``open``."""
        current = self._current
        if current.client.is_alive or not self._target.reconnect or os.getpid() != self._pid:
            return current
        with self._connecting:
            if self._current.client.is_alive or self._closed:
                return self._current
            session = self._connect()
            if self._events.callbacks:
                try:
                    session.register()
                except errors.Error as failure:
                    logger.warning("no events any more: %s", failure)
            self._current.client.close()
            self._current = session
            if self._closed:  # by a signal's handler, meanwhile
                session.client.close()
                raise client.socket_closed()
            logger.info("server=%s connected anew", session.client.name)
            return session

    def _call(self, of: program.Program, name: str, args: object = None) -> Any:
        return self._session().client.call(of, name, args)

    def get_type(self) -> str:
        return str(self._call(REMOTE, "CONNECT_GET_TYPE").type)

    def get_version(self) -> int:
        return int(self._call(REMOTE, "CONNECT_GET_VERSION").hv_ver)

    def is_alive(self) -> bool:
        """Whether the connection stands, or could be made anew where that is wanted."""
        try:
            return self._session().client.is_alive
        except errors.Error:
            return False

    def set_trace(self, trace: TextIO | None) -> None:
        """Write every message to TRACE, as ``dump.line`` shows it."""
        self._trace.to = trace

    # --- domains ---

    def list_domains(self) -> Sequence[hypervisor.DomainRef]:
        args = structs.ConnectListAllDomainsArgs(_ALL_NEEDED, 0)
        found = self._call(REMOTE, "CONNECT_LIST_ALL_DOMAINS", args).domains
        return [wire_conf.domain_from_wire(one) for one in found]

    def domain_lookup(
        self, *, uuid: str | None = None, name: str | None = None, id: int | None = None
    ) -> hypervisor.DomainRef | None:
        call: tuple[str, object]
        if uuid is not None:
            number = wire_conf.uuid_to_wire(uuid)
            call = "DOMAIN_LOOKUP_BY_UUID", structs.DomainLookupByUuidArgs(number)
        elif name is not None:
            call = "DOMAIN_LOOKUP_BY_NAME", structs.DomainLookupByNameArgs(name)
        else:
            assert id is not None
            call = "DOMAIN_LOOKUP_BY_ID", structs.DomainLookupByIdArgs(id)
        try:
            xdr.encode(call[1])
        except rpc.CodecError:
            return None  # no domain has such a name, or id
        try:
            return wire_conf.domain_from_wire(self._call(REMOTE, *call).dom)
        except errors.Error as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            return None

    def domain_get_state(self, ref: hypervisor.DomainRef) -> tuple[int, int]:
        found = self._of(ref, "DOMAIN_GET_STATE", 0)
        return found.state, found.reason

    def domain_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        return str(self._of(ref, "DOMAIN_GET_XML_DESC", flags).xml)

    def _of(
        self, ref: hypervisor.DomainRef, name: str, *args: Any, of: program.Program = REMOTE
    ) -> Any:
        """What a procedure on a domain returns; ARGS go behind that."""
        kind = of[name].args
        assert kind is not None
        return self._call(of, name, kind(wire_conf.domain_to_wire(ref), *args))

    # --- backup ---

    def domain_backup_start(self, ref: hypervisor.DomainRef, xml: str, flags: int) -> None:
        if not self._session().is_ours:
            self._jobs.start(ref, xml, flags)
            return
        dom = wire_conf.domain_to_wire(ref)
        args = virtbackup_protocol.DomainBackupStartArgs(dom, xml, flags)
        try:
            xdr.encode(args)
        except rpc.CodecError:
            conf_xml.parse(xml, "domainbackup")  # which says better what is wrong
        self._call(VIRTBACKUP, "DOMAIN_BACKUP_START", args)

    def domain_backup_stop(self, ref: hypervisor.DomainRef, flags: int) -> None:
        if not self._session().is_ours:
            self._jobs.stop(ref, flags)
            return
        self._of(ref, "DOMAIN_BACKUP_STOP", flags, of=VIRTBACKUP)

    def domain_backup_get_xml_desc(self, ref: hypervisor.DomainRef, flags: int) -> str:
        if not self._session().is_ours:
            return self._jobs.get_xml_desc(ref)
        return str(self._of(ref, "DOMAIN_BACKUP_GET_XML_DESC", flags, of=VIRTBACKUP).xml)

    def domain_backup_get_info(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> backup_conf.BackupInfo:
        if not self._session().is_ours:
            return self._jobs.get_info(ref)
        info = self._of(ref, "DOMAIN_BACKUP_GET_INFO", flags, of=VIRTBACKUP)
        with _readable():
            return wire_conf.info_from_wire(info)

    def domain_backup_cleanup(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        self._check_is_ours("virDomainBackupCleanup")
        return list(self._of(ref, "DOMAIN_BACKUP_CLEANUP", flags, of=VIRTBACKUP).removed)

    def domain_branch_list(
        self, ref: hypervisor.DomainRef, flags: int
    ) -> Sequence[backup_conf.Branch]:
        self._check_is_ours("virDomainBranchList")
        branches = self._of(ref, "DOMAIN_BRANCH_LIST", flags, of=VIRTBACKUP)
        with _readable():
            return wire_conf.branches_from_wire(branches)

    def domain_branch_create(self, ref: hypervisor.DomainRef, name: str, flags: int) -> None:
        self._check_is_ours("virDomainBranchCreate")
        self._of(ref, "DOMAIN_BRANCH_CREATE", name, flags, of=VIRTBACKUP)

    def domain_branch_delete(self, ref: hypervisor.DomainRef, name: str, flags: int) -> None:
        self._check_is_ours("virDomainBranchDelete")
        self._of(ref, "DOMAIN_BRANCH_DELETE", name, flags, of=VIRTBACKUP)

    def _check_is_ours(self, function: str) -> None:
        if not self._session().is_ours:
            raise libvirt_native.unsupported(function)

    # --- events ---

    def event_register(self, callback: Callback) -> Callable[[], None]:
        with self._connecting:
            session = self._session()
            wanted = self._once(callback)
            self._events.callbacks += (wanted,)
            try:
                session.register()
            except BaseException:
                self._forget(wanted)
                raise
        return functools.partial(self._event_deregister, wanted)

    @staticmethod
    def _once(callback: Callback) -> Callback:
        """CALLBACK as one that no other registration has."""
        return lambda event: callback(event)

    def _event_deregister(self, callback: Callback) -> None:
        if os.getpid() != self._pid:
            return
        with self._connecting:
            self._forget(callback)
            if not self._events.callbacks:
                self._current.deregister()

    def _forget(self, callback: Callback) -> None:
        self._events.callbacks = tuple(one for one in self._events.callbacks if one is not callback)

    # --- what libvirt's own clients ask for besides ---

    def get_hostname(self) -> str:
        return str(self._call(REMOTE, "CONNECT_GET_HOSTNAME").hostname)

    def get_lib_version(self) -> int:
        return int(self._call(REMOTE, "CONNECT_GET_LIB_VERSION").lib_ver)

    def get_capabilities(self) -> str:
        return str(self._call(REMOTE, "CONNECT_GET_CAPABILITIES").capabilities)

    def node_get_info(self) -> tuple[str, int, int, int, int, int, int, int]:
        sent = self._call(REMOTE, "NODE_GET_INFO")
        return (
            _text(sent.model),
            sent.memory,
            sent.cpus,
            sent.mhz,
            sent.nodes,
            sent.sockets,
            sent.cores,
            sent.threads,
        )

    def node_get_security_model(self) -> tuple[str, str]:
        sent = self._call(REMOTE, "NODE_GET_SECURITY_MODEL")
        return _text(sent.model), _text(sent.doi)

    def domain_get_info(self, ref: hypervisor.DomainRef) -> tuple[int, int, int, int, int]:
        sent = self._of(ref, "DOMAIN_GET_INFO")
        return sent.state, sent.maxMem, sent.memory, sent.nrVirtCpu, sent.cpuTime

    def domain_get_os_type(self, ref: hypervisor.DomainRef) -> str:
        return str(self._of(ref, "DOMAIN_GET_OS_TYPE").type)

    def domain_is_persistent(self, ref: hypervisor.DomainRef) -> bool:
        return bool(self._of(ref, "DOMAIN_IS_PERSISTENT").persistent)

    def domain_get_autostart(self, ref: hypervisor.DomainRef) -> bool:
        return bool(self._of(ref, "DOMAIN_GET_AUTOSTART").autostart)

    def domain_get_autostart_once(self, ref: hypervisor.DomainRef) -> bool:
        return bool(self._of(ref, "DOMAIN_GET_AUTOSTART_ONCE").autostart)

    def domain_has_managed_save_image(self, ref: hypervisor.DomainRef, flags: int) -> bool:
        return bool(self._of(ref, "DOMAIN_HAS_MANAGED_SAVE_IMAGE", flags).result)

    def domain_snapshot_num(self, ref: hypervisor.DomainRef, flags: int) -> int:
        return int(self._of(ref, "DOMAIN_SNAPSHOT_NUM", flags).num)

    def domain_get_security_label(self, ref: hypervisor.DomainRef) -> tuple[str, bool]:
        sent = self._of(ref, "DOMAIN_GET_SECURITY_LABEL")
        return _text(sent.label), bool(sent.enforcing)

    def domain_get_messages(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        return list(self._of(ref, "DOMAIN_GET_MESSAGES", flags).msgs)

    def domain_get_block_info(
        self, ref: hypervisor.DomainRef, path: str, flags: int
    ) -> tuple[int, int, int]:
        sent = self._of(ref, "DOMAIN_GET_BLOCK_INFO", path, flags)
        return sent.capacity, sent.allocation, sent.physical

    def domain_block_stats_flags(
        self, ref: hypervisor.DomainRef, path: str, flags: int
    ) -> Mapping[str, int]:
        count = self._of(ref, "DOMAIN_BLOCK_STATS_FLAGS", path, 0, flags).nparams
        sent = self._of(ref, "DOMAIN_BLOCK_STATS_FLAGS", path, count, flags)
        return {name: int(value) for name, value in wire_conf.params_from_wire(sent.params).items()}

    def domain_get_block_job_info(
        self, ref: hypervisor.DomainRef, path: str, flags: int
    ) -> tuple[int, int, int, int] | None:
        sent = self._of(ref, "DOMAIN_GET_BLOCK_JOB_INFO", path, flags)
        return (sent.type, sent.bandwidth, sent.cur, sent.end) if sent.found else None

    def get_all_domain_stats(
        self, domains: Sequence[hypervisor.DomainRef], stats: int, flags: int
    ) -> Sequence[tuple[hypervisor.DomainRef, Mapping[str, hypervisor.Value]]]:
        doms = tuple(map(wire_conf.domain_to_wire, domains))
        args = structs.ConnectGetAllDomainStatsArgs(doms, stats, flags)
        sent = self._call(REMOTE, "CONNECT_GET_ALL_DOMAIN_STATS", args).retStats
        return [
            (wire_conf.domain_from_wire(one.dom), wire_conf.params_from_wire(one.params))
            for one in sent
        ]

    def domain_fsfreeze(
        self, ref: hypervisor.DomainRef, mountpoints: Sequence[str], flags: int
    ) -> int:
        return int(self._of(ref, "DOMAIN_FSFREEZE", tuple(mountpoints), flags).filesystems)

    def domain_fsthaw(
        self, ref: hypervisor.DomainRef, mountpoints: Sequence[str], flags: int
    ) -> int:
        return int(self._of(ref, "DOMAIN_FSTHAW", tuple(mountpoints), flags).filesystems)

    def domain_suspend(self, ref: hypervisor.DomainRef) -> None:
        self._of(ref, "DOMAIN_SUSPEND")

    def domain_resume(self, ref: hypervisor.DomainRef) -> None:
        self._of(ref, "DOMAIN_RESUME")

    def domain_monitor_command(self, ref: hypervisor.DomainRef, command: str, flags: int) -> str:
        return str(self._of(ref, "DOMAIN_MONITOR_COMMAND", command, flags, of=QEMU).result)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """A value of the server's that no type of ours has is an error of the call."""
    try:
        yield
    except rpc.CodecError as failure:
        logger.warning("a reply with a value that is not known: %s", failure)
        raise rpc_error.undecodable() from failure


def _text(chars: bytes) -> str:
    """Up to the NUL that ends it."""
    return chars.partition(b"\0")[0].decode("utf-8", "surrogateescape")


_: Callable[[str, bool], hypervisor.BackupDriver] = open
_query: Callable[[str, bool], hypervisor.QueryDriver] = open
_event: Callable[[str, bool], hypervisor.EventDriver] = open
"""mypy's proof that the driver has every hook."""
