# SPDX-License-Identifier: LGPL-2.1-or-later
"""The domains of all drivers that a daemon serves, as if they were one hypervisor's."""

import collections
import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Generic, TypeVar

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.remote import workers

logger = logging.getLogger(__name__)

Open = Callable[[], hypervisor.Driver]
T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that a host may take to answer where others are asked, too; one that still has not is
asked again when it has."""
_THREADS = 20
"""That are kept to ask hosts."""


class Host:
    """One driver, by its URI. It is opened when it is asked for, and then as often as it takes: a
    guest's monitor may not be there yet, or again."""

    def __init__(self, uri: str, open: Open) -> None:
        self.uri = uri
        self.gave_up = False
        """Whether the last that was asked is answered so: it did not come to answer in time."""
        self._open = open
        self._driver: hypervisor.Driver | None = None
        self._opening = threading.Lock()
        self._failure: str | None = None
        self._callback: Callable[[hypervisor.Event], None] | None = None

    def on_event(self, callback: Callable[[hypervisor.Event], None]) -> None:
        """Have CALLBACK called for every event of the driver, once that is open."""
        self._callback = callback

    def driver(self) -> hypervisor.Driver:
        """Errors: those of opening it."""
        with self._opening:
            if self._driver is None:
                self._driver = self._opened()
            return self._driver

    @property
    def is_open(self) -> bool:
        """Whether there is a driver already."""
        return self._driver is not None

    def _opened(self) -> hypervisor.Driver:
        try:
            driver = self._open()
        except Exception as failure:
            error = _as_error(failure)
            if str(error) != self._failure:
                logger.warning("uri=%s cannot be opened: %s", self.uri, error)
            self._failure = str(error)
            raise error from failure
        try:
            register = getattr(driver, "event_register", None)
            if register is not None and self._callback is not None:
                register(self._callback)
        except BaseException:
            driver.close()
            raise
        logger.info("uri=%s opened", self.uri)
        self._failure = None
        if isinstance(driver, hypervisor.KeeperDriver):
            threading.Thread(target=self._adopt, args=(driver,), daemon=True).start()
        return driver

    def _adopt(self, driver: hypervisor.KeeperDriver) -> None:
        try:
            driver.adopt_backups()
        except (OSError, libvirt.libvirtError) as failure:
            logger.warning("uri=%s backups that run are not watched: %s", self.uri, failure)

    def close(self) -> None:
        """Let go of the driver, once it is opened; backups that are to end with us end."""
        with self._opening:
            driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()


def _as_error(failure: Exception) -> errors.Error:
    """A FAILURE as an error of ours, of whatever kind a driver has raised it."""
    if isinstance(failure, libvirt.libvirtError):
        return errors.of_libvirt(failure)
    text = f"{type(failure).__name__}: {failure}"
    return errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, text)


class Question(Generic[T]):
    """WHAT one host is asked, answered by a thread; by KEY the same as another."""

    def __init__(self, host: Host, what: Callable[[hypervisor.Driver], T], key: object) -> None:
        self.host = host
        self.key = key
        self._what = what
        self._since = time.monotonic()
        self._answered = threading.Event()
        self._answer: T | errors.Error | None = None

    def ask(self) -> None:
        """Wait for the answer, as long as it takes."""
        try:
            self._answer = self._what(self.host.driver())
        except libvirt.libvirtError as failure:
            self._answer = errors.of_libvirt(failure)
        except Exception as failure:
            logger.exception("uri=%s cannot be asked", self.host.uri)
            self._answer = _as_error(failure)
        self.host.gave_up = (
            isinstance(self._answer, errors.Error)
            and self._answer.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
        )
        self._answered.set()

    @property
    def is_answered(self) -> bool:
        return self._answered.is_set()

    def hangs(self, patience: float) -> bool:
        """Whether it takes longer than a host should."""
        return not self.is_answered and time.monotonic() > self._since + patience

    def answer(self, until: float) -> T:
        """What the host has answered by then. Errors: those of asking it;
        VIR_ERR_OPERATION_TIMEOUT."""
        if not self._answered.wait(max(0.0, until - time.monotonic())):
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_TIMEOUT, f"'{self.host.uri}' does not answer"
            )
        if isinstance(self._answer, errors.Error):
            raise self._answer
        return self._answer  # type: ignore[return-value]  # which is a T


_SHARED = ("domain_backup_stop", "domain_backup_get_xml_desc", "domain_backup_get_info")
"""The hooks of ``hypervisor.SharedDriver``, as they are called for who has one client."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A domain, and by whom it is served."""

    driver: hypervisor.Driver
    own: hypervisor.DomainRef
    """As its driver knows it."""
    ref: hypervisor.DomainRef
    """As clients do: with an id that no other has."""

    def call(self, function: str, hook: str, *args: Any, only: str | None = None) -> Any:
        """What the driver's HOOK returns for the domain; of a hook that is about one backup, by
        ``hypervisor.SharedDriver`` where it can. Errors: VIR_ERR_NO_SUPPORT, of the public
        FUNCTION, where the driver has it not; the hook's own."""
        if hook in _SHARED and self.tells_backups_apart:
            return getattr(self.driver, f"{hook}_of")(self.own, *args, only)
        return hook_of(self.driver, function, hook)(self.own, *args)

    @property
    def tells_backups_apart(self) -> bool:
        """Whether ONLY is heeded."""
        return all(hasattr(self.driver, f"{hook}_of") for hook in _SHARED)


def hook_of(driver: hypervisor.Driver, function: str, hook: str) -> Callable[..., Any]:
    """A driver's HOOK. Errors: VIR_ERR_NO_SUPPORT, of the public FUNCTION."""
    found: Callable[..., Any] | None = getattr(driver, hook, None)
    if found is None:
        raise errors.error(libvirt.VIR_ERR_NO_SUPPORT, function, domain=libvirt.VIR_FROM_DOMAIN)
    return found


class Domains:
    """All domains of some hosts. Of two with one uuid, the first host's is the domain."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = hosts
        self.patience = PATIENCE
        self._lock = threading.Lock()
        self._ids: dict[tuple[str, int], int] = {}
        """(uuid, a driver's id) -> the id that clients know, while the domain runs."""
        self._taken: set[int] = set()
        """Those ids."""
        self._host_of: dict[str, Host] = {}
        """By uuid, where each was last seen."""
        self._hanging: dict[Host, Question[Any]] = {}
        """The eldest that a host was asked and may not have answered."""
        self._asked_next: dict[Host, collections.deque[Question[Any]]] = {}
        """What a host is going to be asked, while a thread asks it one thing after the other: a
        monitor speaks to one client at a time, and hosts times clients are many threads."""
        self._workers = workers.Workers(_THREADS)

    def open(self) -> None:
        """Open the hosts that are not, and do not wait for that."""
        for host in self.hosts:
            if not host.is_open and not self._is_asked(host):
                self._ask(host, lambda driver: None, "open")

    def first(self) -> hypervisor.Driver:
        """The first driver, which answers for all where a hypervisor is asked; not that of a host
        that is known to hang. Errors: those of opening it, where none can be opened."""
        for host in self.hosts:
            if host.is_open and not self._hangs(host):
                return host.driver()
        answers = self._asked(lambda driver: driver, "driver")
        for answer in answers.values():
            if not isinstance(answer, errors.Error):
                return answer
        raise _first_error(answers.values())

    def all(self) -> list[Found]:
        """All domains, in the order of the hosts; a host that cannot be asked has none. Errors:
        where no host can be asked, the first one's."""
        found: dict[str, Found] = {}
        host_of: dict[str, Host] = {}
        answers = self._asked(_all_of, "all")
        silent = {host for host, answer in answers.items() if isinstance(answer, errors.Error)}
        if len(silent) == len(self.hosts):
            raise _first_error(answers.values())
        for host, answer in answers.items():
            for driver, ref in [] if isinstance(answer, errors.Error) else answer:
                if ref.uuid not in found:
                    host_of[ref.uuid] = host
                    found[ref.uuid] = Found(driver, ref, ref)
        with self._lock:
            unseen = {uuid: host for uuid, host in self._host_of.items() if host in silent}
            self._host_of = unseen | host_of
            self._forget_ids({(one.own.uuid, one.own.id) for one in found.values()}, unseen)
        return self._numbered(found.values())

    def by_uuid(self, uuid: str) -> Found:
        """Errors: VIR_ERR_NO_DOMAIN; those of asking the host, where there is but one."""
        hint = self._host_of.get(uuid)
        if hint is None and len(self.hosts) > 1:
            with contextlib.suppress(libvirt.libvirtError):
                self.all()  # and with this one all others, which are asked for next as a rule
            hint = self._host_of.get(uuid)
        if hint is not None:
            try:
                driver = hint.driver()
                ref = _lookup(driver, uuid=uuid)
            except libvirt.libvirtError as failure:
                if len(self.hosts) == 1:
                    raise
                logger.info("uri=%s cannot be asked: %s", hint.uri, failure)
                ref = None
            if ref is not None:
                return self._numbered([Found(driver, ref, ref)])[0]
        found = self._search(f"uuid '{uuid}'", uuid=uuid)
        return found[0]

    def by_name(self, name: str) -> Found:
        """Errors: as ``by_uuid``; VIR_ERR_OPERATION_INVALID where several have the name."""
        found = self._search(f"name '{name}'", name=name)
        if len({one.ref.uuid for one in found}) > 1:
            uuids = ", ".join(one.ref.uuid for one in found)
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID,
                f"several domains have the name '{name}': ask by uuid ({uuids})",
            )
        return found[0]

    def by_id(self, id: int) -> Found:
        """Errors: VIR_ERR_NO_DOMAIN."""
        with self._lock:
            had = next((uuid for (uuid, _), known in self._ids.items() if known == id), None)
        if had is not None:
            with contextlib.suppress(libvirt.libvirtError):
                if (one := self.by_uuid(had)).ref.id == id:
                    return one
        for found in self.all():
            if found.ref.id == id:
                return found
        raise errors.error(libvirt.VIR_ERR_NO_DOMAIN, f"no domain with matching id {id}")

    def public(self, own: hypervisor.DomainRef) -> hypervisor.DomainRef:
        """A driver's domain as clients know it."""
        with self._lock:
            return self._public(own)

    def close(self) -> None:
        """Let go of every driver, but of one that hangs: libvirt's library waits for a libvirtd
        that stands still, whatever signals come."""
        held = set(self.hosts)

        def let_go(host: Host) -> None:
            try:
                host.close()
            finally:
                held.discard(host)

        for host in self.hosts:  # none waits for those that hang
            self._workers.do(functools.partial(let_go, host), urgent=True)
        self._workers.close(self.patience)
        for uri in sorted(host.uri for host in list(held)):
            logger.warning("uri=%s hangs, and is left to itself", uri)

    # --- asking hosts ---

    def _asked(
        self, what: Callable[[hypervisor.Driver], T], key: object
    ) -> dict[Host, T | errors.Error]:
        """What every host answers to WHAT, in their order; KEY is as for a ``Question``. Where
        there are several, one that hangs is not waited for longer than a while, and has not been
        heard."""
        if len(self.hosts) == 1:
            question = Question(self.hosts[0], what, key)
            question.ask()
            return {self.hosts[0]: _answer(question, 0.0)}
        questions = {host: self._ask(host, what, key) for host in self.hosts}
        begin = time.monotonic()
        return {
            host: _answer(question, begin + patience)
            for host, (question, patience) in questions.items()
        }

    def _ask(
        self, host: Host, what: Callable[[hypervisor.Driver], T], key: object
    ) -> tuple[Question[T], float]:
        """A question to HOST, be it one that somebody else is going to ask, or that nobody is, as
        HOST has not answered for long; and how long to wait for the answer. Whose driver gave up
        the last time is waited for a little, as one that is there again answers at once."""
        with self._lock:
            patience = self.patience / 10 if host.gave_up else self.patience
            asked = self._hanging.get(host)
            if asked is not None and asked.hangs(self.patience):
                return Question(host, what, key), 0.0
            following = self._asked_next.get(host)
            for other in following or ():
                if other.key == key:
                    return other, patience
            question = Question(host, what, key)
            if asked is None or asked.is_answered:
                self._hanging[host] = question
            if following is not None:
                following.append(question)
                return question, patience
            self._asked_next[host] = collections.deque([question])
        self._workers.do(functools.partial(self._ask_on, host), urgent=True)
        return question, patience

    def _ask_on(self, host: Host) -> None:
        """Ask HOST until there is nothing more to ask."""
        while (question := self._next_question(host)) is not None:
            question.ask()

    def _next_question(self, host: Host) -> Question[Any] | None:
        with self._lock:
            if following := self._asked_next[host]:
                return following.popleft()
            del self._asked_next[host]
        return None

    def _is_asked(self, host: Host) -> bool:
        """Whether HOST, which is opened to be asked, has not answered yet."""
        with self._lock:
            asked = self._hanging.get(host)
        return asked is not None and not asked.is_answered

    def _hangs(self, host: Host) -> bool:
        """Whether HOST is known to hang."""
        with self._lock:
            asked = self._hanging.get(host)
        return asked is not None and asked.hangs(self.patience)

    def _search(self, described: str, **wanted: str) -> list[Found]:
        """The domain, at every host that has it, in their order. Errors: VIR_ERR_NO_DOMAIN, which
        says who could not be asked; that of asking the only host."""
        key = tuple(wanted.items())
        answers = self._asked(lambda driver: (driver, _lookup(driver, **wanted)), key)
        found, silent = [], []
        for host, answer in answers.items():
            if isinstance(answer, errors.Error):
                if len(self.hosts) == 1:
                    raise answer
                logger.info("uri=%s cannot be asked: %s", host.uri, answer)
                silent.append(host.uri)
                continue
            driver, ref = answer
            if ref is not None:
                found.append(Found(driver, ref, ref))
                with self._lock:
                    self._host_of.setdefault(ref.uuid, host)
        if not found:
            but = f" (not to be asked: {', '.join(silent)})" if silent else ""
            raise errors.error(
                libvirt.VIR_ERR_NO_DOMAIN, f"no domain with matching {described}{but}"
            )
        return self._numbered(found)

    # --- ids ---

    def _numbered(self, found: Iterable[Found]) -> list[Found]:
        with self._lock:
            return [Found(one.driver, one.own, self._public(one.own)) for one in found]

    def _public(self, own: hypervisor.DomainRef) -> hypervisor.DomainRef:
        id = self._id(own)
        return own if id == own.id else dataclasses.replace(own, id=id)

    def _forget_ids(
        self, running: Collection[tuple[str, int | None]], unseen: Collection[str]
    ) -> None:
        """All but of those that are RUNNING, and of uuids that are UNSEEN for now."""
        self._ids = {key: id for key, id in self._ids.items() if key in running or key[0] in unseen}
        self._taken = set(self._ids.values())

    def _id(self, own: hypervisor.DomainRef) -> int | None:
        """The driver's own id where no other domain has it, else the next one that is free."""
        if own.id is None:
            return None
        key = own.uuid, own.id
        if key not in self._ids:
            self._ids[key] = own.id if own.id not in self._taken else max(self._taken) + 1
            self._taken.add(self._ids[key])
        return self._ids[key]


def _answer(question: Question[T], until: float) -> T | errors.Error:
    """What is answered, or why not."""
    try:
        return question.answer(until)
    except errors.Error as failure:
        return failure


def _first_error(answers: Iterable[object]) -> errors.Error:
    return next(answer for answer in answers if isinstance(answer, errors.Error))


def _all_of(driver: hypervisor.Driver) -> list[tuple[hypervisor.Driver, hypervisor.DomainRef]]:
    return [(driver, ref) for ref in driver.list_domains()]


def _lookup(driver: hypervisor.Driver, **wanted: str) -> hypervisor.DomainRef | None:
    """The domain of that uuid or name; None: there is none."""
    lookup = getattr(driver, "domain_lookup", None)
    if lookup is not None:
        found: hypervisor.DomainRef | None = lookup(**wanted)
        return found
    [(key, value)] = wanted.items()
    return next((ref for ref in driver.list_domains() if getattr(ref, key) == value), None)
