# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a daemon does for a call: the session of a client, and the table of handlers
(libvirt's remote_daemon_dispatch.c).

A handler gets the session and the call's arguments, decoded, and returns what the reply carries.
What it raises is the reply.
"""

import dataclasses
import logging
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import libvirt

from virtbackup import access, errors, hypervisor
from virtbackup.remote import (
    domains,
    job_stats,
    program,
    remote_types,
    rpc,
    rpc_error,
    wire_conf,
)

logger = logging.getLogger(__name__)

TRY_AGAIN = 1.0
"""Seconds after which to try again to end a backup whose client is gone."""
PATIENCE = 3600.0
"""Seconds for that."""
MAX_SUBSCRIPTIONS = 4096
"""Of one client."""
MAX_SUBSCRIPTIONS_OF_ONE = 4 * MAX_SUBSCRIPTIONS
"""Of all clients that are the same user, or have the same certificate."""


class Peer(Protocol):
    """The client's connection, as far as a session knows it."""

    number: int

    @property
    def identity(self) -> access.Identity: ...

    def send(self, message: rpc.Message, unasked: bool = False) -> None: ...

    def start_keepalive(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Subscription:
    """What a client wants to be told."""

    program: program.Program
    event: int
    """libvirt's number of the event; of our own program, 0."""
    uuid: str | None
    """Of one domain; None: of all."""


class Session:
    """One client's."""

    def __init__(self, daemon: "Daemon", peer: Peer) -> None:
        self.daemon = daemon
        self.peer = peer
        self.opened = False
        self.read_only = False
        self.wants_close_event = False
        self.subscriptions: dict[int, Subscription] = {}
        self.ends_with: dict[str, str | None] = {}
        """Domains by uuid -> the id of their backup that is to end with the connection; None: the
        driver does not tell."""
        self._lock = threading.Lock()
        self._callbacks = 0

    # --- server.Session ---

    def handle(self, call: rpc.Message) -> rpc.Message | None:
        """The reply to CALL."""
        try:
            return self._handle(call)
        except libvirt.libvirtError as failure:
            logger.info("client=%d %s: %s", self.peer.number, _name(call), failure)
            return rpc_error.reply(call, failure)
        except Exception as failure:
            logger.exception("client=%d %s failed", self.peer.number, _name(call))
            text = f"{type(failure).__name__}: {failure}"
            error = errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, text)
            return rpc_error.reply(call, error)

    def _handle(self, call: rpc.Message) -> rpc.Message:
        handler = HANDLERS.get((call.program, call.procedure))
        if call.proc is None or handler is None:
            raise rpc_error.unknown(call)
        try:
            args = rpc.args(call)
        except rpc.CodecError as failure:
            logger.info("client=%d %s: %s", self.peer.number, _name(call), failure)
            raise rpc_error.undecodable() from failure
        if handler.opened and not self.opened:
            raise rpc_error.not_open()
        ret = handler.function(self, args)
        try:
            return rpc.reply(call, ret)
        except rpc.CodecError as failure:
            logger.warning("client=%d %s: %s", self.peer.number, _name(call), failure)
            raise rpc_error.rpc_error(f"Unable to encode message payload: {failure}") from failure

    def close(self) -> None:
        """The client is gone: so are its subscriptions, and the backups that are to end with it."""
        self.daemon.forget(self)
        self.end()

    def end(self) -> None:
        """Nothing is told any more, and the backups end that are to end with the connection."""
        with self._lock:
            self.opened = self.wants_close_event = False
            self.subscriptions.clear()
            ends, self.ends_with = self.ends_with, {}
        for uuid, id in ends.items():
            if not self._is_ended(uuid, id, logging.WARNING) and id is not None:
                threading.Thread(
                    target=self._insist, args=(uuid, id), name="virtbackup-end", daemon=True
                ).start()

    def _insist(self, uuid: str, id: str) -> None:
        """End a backup that could not be ended, once it can: its host may be away for a while."""
        until = time.monotonic() + PATIENCE
        while not self.daemon.closed.wait(TRY_AGAIN):
            is_last = time.monotonic() > until
            if self._is_ended(uuid, id, logging.WARNING if is_last else logging.DEBUG) or is_last:
                return

    def _is_ended(self, uuid: str, id: str | None, level: int) -> bool:
        """Whether a backup that is to end with the connection runs no more; why it does is logged
        at LEVEL."""
        try:
            self._end_backup(uuid, id)
        except libvirt.libvirtError as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                logger.log(level, "domain=%s backup not ended: %s", uuid, failure)
                return False
        return True

    def _end_backup(self, uuid: str, id: str | None) -> None:
        """Cancel a backup, if it is that one. Errors: VIR_ERR_NO_DOMAIN_BACKUP, the driver's."""
        found = self.daemon.domains.by_uuid(uuid)
        if id is None or found.tells_backups_apart or backup_id(found) == id:
            cancel = hypervisor.STOP_CANCEL
            found.call("virDomainBackupStop", "domain_backup_stop", cancel, only=id)

    def end_with(self, uuid: str, id: str | None) -> None:
        """Have a domain's backup end with the connection."""
        with self._lock:
            self.ends_with[uuid] = id

    def own(self, uuid: str) -> str | None:
        """The domain's backup that is to end with the connection, if any: it is meant by the
        client, and no other. None, too, where the driver does not tell."""
        with self._lock:
            return self.ends_with.get(uuid)

    def has_ended(self, uuid: str, id: str | None) -> None:
        """A domain's backup ID has; None: whichever ran, of a driver that does not tell."""
        with self._lock:
            if uuid in self.ends_with and self.ends_with[uuid] == id:
                del self.ends_with[uuid]

    def open(self, read_only: bool) -> None:
        """The connection is open from now on. Errors: VIR_ERR_INTERNAL_ERROR where it was."""
        with self._lock:
            if self.opened:
                raise rpc_error.internal("connection already open")
            self.read_only = read_only
            self.opened = True

    # --- what handlers need ---

    def may(self, perm: access.Perm, name: str) -> bool:
        """Whether the policy grants PERM on the domain of that NAME; not whether the connection
        does."""
        return perm in self.daemon.policy.granted(self.peer.identity, name)

    def check(self, perm: access.Perm, name: str, called: str | None = None) -> None:
        """CALLED is what the client has called the domain of that NAME, which whoever may not look
        at it is not to hear. Errors: VIR_ERR_ACCESS_DENIED for what the policy does not grant."""
        if not self.may(perm, name):
            raise access.denied(self.peer.identity, perm, called or f"'{name}'")

    def domain(
        self, sent: remote_types.NonnullDomain, function: str, perm: access.Perm = access.Perm.READ
    ) -> domains.Found:
        """The domain that a client means, for a FUNCTION that takes PERM. Errors: as ``check``;
        VIR_ERR_OPERATION_DENIED for what a read-only connection may not do; VIR_ERR_NO_DOMAIN."""
        ref = wire_conf.domain_from_wire(sent)
        if self.read_only and perm not in access.READ_ONLY:
            raise access.read_only(function)
        found = self.daemon.domains.by_uuid(ref.uuid)
        self.check(perm, found.ref.name, f"'{ref.name}'")
        return found

    def visible(self, found: Iterable[domains.Found]) -> list[domains.Found]:
        """Those of FOUND that the client may look at."""
        return [one for one in found if self.may(access.Perm.READ, one.ref.name)]

    def subscribe(self, subscription: Subscription) -> int:
        """The number of a new subscription. Errors: VIR_ERR_INTERNAL_ERROR."""
        who = self.peer.identity
        if self.daemon.subscriptions(who) >= MAX_SUBSCRIPTIONS_OF_ONE:
            raise rpc_error.internal(
                f"more than {MAX_SUBSCRIPTIONS_OF_ONE} event callbacks of {who}"
            )
        with self._lock:
            if len(self.subscriptions) >= MAX_SUBSCRIPTIONS:
                raise rpc_error.internal(f"more than {MAX_SUBSCRIPTIONS} event callbacks")
            number = self._callbacks
            self._callbacks += 1
            self.subscriptions[number] = subscription
            return number

    def unsubscribe(self, number: int, of: program.Program) -> None:
        """Errors: VIR_ERR_INTERNAL_ERROR, as libvirtd's."""
        with self._lock:
            known = self.subscriptions.get(number)
            if known is None or known.program is not of:
                raise rpc_error.internal(f"domain event callback {number} not registered")
            del self.subscriptions[number]

    def wanted(self, of: program.Program, event: int, ref: hypervisor.DomainRef) -> list[int]:
        """The numbers of the subscriptions to an event of a domain."""
        with self._lock:
            numbers = [
                number
                for number, known in self.subscriptions.items()
                if known.program is of and known.event == event and known.uuid in (None, ref.uuid)
            ]
        return numbers if numbers and self.may(access.Perm.READ, ref.name) else []


class Daemon:
    """What all sessions share."""

    def __init__(
        self, of: domains.Domains, uris: Iterable[str], policy: access.Policy | None = None
    ) -> None:
        self.domains = of
        self.uris = tuple(uris)
        self.policy = policy or access.Policy()
        self.closed = threading.Event()
        """Set when nothing is to be tried any more."""
        self.ended = job_stats.Ended()
        self.described: dict[tuple[str, str], str] = {}
        """(uuid, checkpoint) -> its description, for as long as the daemon runs."""
        self._sessions: set[Session] = set()
        self._lock = threading.Lock()
        for host in of.hosts:
            host.on_event(self._tell)

    def serve(self, peer: Peer) -> Session:
        """A new client's session."""
        session = Session(self, peer)
        with self._lock:
            self._sessions.add(session)
        return session

    def forget(self, session: Session) -> None:
        """A client is gone."""
        with self._lock:
            self._sessions.discard(session)

    def sessions(self) -> list[Session]:
        """Of all clients that are connected."""
        with self._lock:
            return list(self._sessions)

    def subscriptions(self, who: access.Identity) -> int:
        """How many all clients have that are WHO."""
        opened = [session for session in self.sessions() if session.opened]
        return sum(len(one.subscriptions) for one in opened if one.peer.identity == who)

    def describe(self, uuid: str, checkpoint: str, text: str | None) -> None:
        """Keep the description of a domain's new checkpoint."""
        self.described.pop((uuid, checkpoint), None)
        if text is not None:
            self.described[uuid, checkpoint] = text

    def _tell(self, event: hypervisor.Event) -> None:
        """Have clients told of an EVENT. By any thread."""
        ref = self.domains.public(event.domain)
        if isinstance(event, hypervisor.BackupEnded):
            self.ended.end(event)
        for session in self.sessions():
            try:
                for message in MESSAGES_OF[type(event)](session, ref, event):
                    session.peer.send(message, unasked=True)
            except rpc.CodecError as failure:
                logger.warning("client=%d is not told: %s", session.peer.number, failure)

    def serves(self, uri: str) -> bool:
        """Whether a client that opens URI is meant for us: by no name, by one of ours, or by a
        scheme of ours; and ``qemu``, as libvirt's clients have to say."""
        if not uri or uri in self.uris:
            return True
        return _scheme(uri) in {*map(_scheme, self.uris), "qemu"}


def _scheme(uri: str) -> str | None:
    """Without the transport; None of what is no URI."""
    try:
        return urllib.parse.urlsplit(uri).scheme.partition("+")[0]
    except ValueError:
        return None


def backup_id(found: domains.Found) -> str | None:
    """Of the backup that runs; None where the driver does not tell. Errors:
    VIR_ERR_NO_DOMAIN_BACKUP, the driver's."""
    try:
        info = found.call("virDomainBackupGetInfo", "domain_backup_get_info", 0)
    except libvirt.libvirtError as failure:
        if failure.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return None
        raise
    id: str | None = info.id
    return id


# --- the table ---

Function = Callable[[Session, Any], Any]
_F = TypeVar("_F", bound=Function)


@dataclasses.dataclass(frozen=True)
class Handler:
    function: Function
    opened: bool
    """Only on a connection that was opened (virConnectOpen)."""


HANDLERS: dict[tuple[int, int], Handler] = {}
"""(program, procedure) -> its handler; the modules ``dispatch_*`` fill it."""

MessagesOf = Callable[[Session, hypervisor.DomainRef, Any], Iterable[rpc.Message]]
MESSAGES_OF: dict[type, MessagesOf] = {}
"""Kind of event -> the messages that a session wants of one."""


def handles(of: program.Program, name: str, opened: bool = True) -> Callable[[_F], _F]:
    """Marks the handler of the procedure NAME."""

    def mark(function: _F) -> _F:
        HANDLERS[of.number, of[name].number] = Handler(function, opened)
        return function

    return mark


def hands_on(
    of: program.Program,
    name: str,
    function: str,
    hook: str,
    ret: Callable[[Any], Any] | None = None,
    flags: int | None = None,
) -> None:
    """Have the procedure NAME be the driver's HOOK, by the permission which that takes. The hook is
    given the domain that the first argument is, and then the others; what it returns are the
    reply's fields, or what RET makes of it. FUNCTION is the public one; FLAGS those that there are,
    where that is not the driver's to say."""
    proc = of[name]

    def handler(session: Session, args: Any) -> Any:
        _, *rest = (getattr(args, field.name) for field in dataclasses.fields(args))
        if flags is not None:
            errors.check_flags(function, args.flags, flags)
        found = session.domain(args.dom, function, access.NEEDED[hook])
        told = found.call(function, hook, *rest, only=session.own(found.own.uuid))
        if ret is not None:
            return ret(told)
        if proc.ret is None:
            return None
        return proc.ret(*told) if isinstance(told, tuple) else proc.ret(told)

    HANDLERS[of.number, proc.number] = Handler(handler, opened=True)


def _name(call: rpc.Message) -> str:
    return call.proc.name if call.proc else f"{call.program:#x}:{call.procedure}"
