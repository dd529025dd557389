# SPDX-License-Identifier: LGPL-2.1-or-later
"""The domains of all drivers that a daemon serves, as if they were one hypervisor's."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import libvirt

from virtbackup import errors, hypervisor

logger = logging.getLogger(__name__)

Open = Callable[[], hypervisor.Driver]


class Host:
    """One driver, by its URI. It is opened when it is asked for, and then as often as it takes: a
    guest's monitor may not be there yet, or again."""

    def __init__(self, uri: str, open: Open) -> None:
        self.uri = uri
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

    def _opened(self) -> hypervisor.Driver:
        try:
            driver = self._open()
        except libvirt.libvirtError as failure:
            if str(failure) != self._failure:
                logger.warning("uri=%s cannot be opened: %s", self.uri, failure)
            self._failure = str(failure)
            raise
        logger.info("uri=%s opened", self.uri)
        self._failure = None
        adopt = getattr(driver, "adopt_backups", None)
        if adopt is not None:
            threading.Thread(target=self._adopt, args=(adopt,), daemon=True).start()
        register = getattr(driver, "event_register", None)
        if register is not None and self._callback is not None:
            register(self._callback)
        return driver

    def _adopt(self, adopt: Callable[[], None]) -> None:
        try:
            adopt()
        except (OSError, libvirt.libvirtError) as failure:
            logger.warning("uri=%s backups that run are not watched: %s", self.uri, failure)

    def close(self) -> None:
        """Let go of the driver; backups that are to end with us end."""
        with self._opening:
            driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()


@dataclasses.dataclass(frozen=True)
class Found:
    """A domain, and by whom it is served."""

    driver: hypervisor.Driver
    own: hypervisor.DomainRef
    """As its driver knows it."""
    ref: hypervisor.DomainRef
    """As clients do: with an id that no other has."""

    def call(self, function: str, hook: str, *args: Any) -> Any:
        """What the driver's HOOK returns for the domain. Errors: VIR_ERR_NO_SUPPORT, of the public
        FUNCTION, where the driver has it not; the hook's own."""
        return hook_of(self.driver, function, hook)(self.own, *args)


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
        self._lock = threading.Lock()
        self._ids: dict[tuple[str, int], int] = {}
        """(uuid, a driver's id) -> the id that clients know, while the domain runs."""
        self._host_of: dict[str, Host] = {}
        """By uuid, where each was last seen."""

    def first(self) -> hypervisor.Driver:
        """The first driver, which answers for all where a hypervisor is asked. Errors: those of
        opening it, where none can be opened."""
        failures = []
        for host in self.hosts:
            try:
                return host.driver()
            except libvirt.libvirtError as failure:
                failures.append(failure)
        raise failures[0]

    def all(self) -> list[Found]:
        """All domains, in the order of the hosts; a host that cannot be asked has none. Errors:
        where no host can be asked, the first one's."""
        found: dict[str, Found] = {}
        failures = []
        for host in self.hosts:
            try:
                driver = host.driver()
                refs = driver.list_domains()
            except libvirt.libvirtError as failure:
                failures.append(failure)
                continue
            for ref in refs:
                if ref.uuid not in found:
                    self._host_of[ref.uuid] = host
                    found[ref.uuid] = Found(driver, ref, ref)
        if failures and len(failures) == len(self.hosts) and len(self.hosts) == 1:
            raise failures[0]
        return self._numbered(list(found.values()), whole=True)

    def by_uuid(self, uuid: str) -> Found:
        """Errors: VIR_ERR_NO_DOMAIN."""
        hint = self._host_of.get(uuid)
        for host in [hint] if hint else []:
            if (found := self._lookup(host, uuid=uuid)) is not None:
                return found
        for found in self._search(uuid=uuid):
            return found
        raise errors.error(libvirt.VIR_ERR_NO_DOMAIN, f"no domain with matching uuid '{uuid}'")

    def by_name(self, name: str) -> Found:
        """Errors: VIR_ERR_NO_DOMAIN; VIR_ERR_OPERATION_INVALID where several have the name."""
        found = list(self._search(name=name))
        if not found:
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN, f"no domain with matching name '{name}'")
        if len({one.ref.uuid for one in found}) > 1:
            uuids = ", ".join(one.ref.uuid for one in found)
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID,
                f"several domains have the name '{name}': ask by uuid ({uuids})",
            )
        return found[0]

    def by_id(self, id: int) -> Found:
        """Errors: VIR_ERR_NO_DOMAIN."""
        for found in self.all():
            if found.ref.id == id:
                return found
        raise errors.error(libvirt.VIR_ERR_NO_DOMAIN, f"no domain with matching id {id}")

    def public(self, own: hypervisor.DomainRef) -> hypervisor.DomainRef:
        """A driver's domain as clients know it."""
        with self._lock:
            return dataclasses.replace(own, id=self._id(own))

    def close(self) -> None:
        """Let go of every driver."""
        for host in self.hosts:
            host.close()

    def _search(self, **wanted: str) -> Iterator[Found]:
        for host in self.hosts:
            if (found := self._lookup(host, **wanted)) is not None:
                yield found

    def _lookup(self, host: Host, **wanted: str) -> Found | None:
        try:
            driver = host.driver()
            lookup = getattr(driver, "domain_lookup", None)
            if lookup is not None:
                ref = lookup(**wanted)
            else:
                [(key, value)] = wanted.items()
                refs = driver.list_domains()
                ref = next((ref for ref in refs if getattr(ref, key) == value), None)
        except libvirt.libvirtError as failure:
            if len(self.hosts) == 1:
                raise
            logger.info("uri=%s cannot be asked: %s", host.uri, failure)
            return None
        if ref is None:
            return None
        self._host_of[ref.uuid] = host
        return self._numbered([Found(driver, ref, ref)])[0]

    def _numbered(self, found: list[Found], whole: bool = False) -> list[Found]:
        with self._lock:
            if whole:
                running = {(one.own.uuid, one.own.id) for one in found}
                self._ids = {key: id for key, id in self._ids.items() if key in running}
            return [
                dataclasses.replace(one, ref=dataclasses.replace(one.own, id=self._id(one.own)))
                for one in found
            ]

    def _id(self, own: hypervisor.DomainRef) -> int | None:
        """The driver's own id where no other domain has it, else the next one that is free."""
        if own.id is None:
            return None
        key = own.uuid, own.id
        if key not in self._ids:
            taken = set(self._ids.values())
            self._ids[key] = own.id if own.id not in taken else max(taken) + 1
        return self._ids[key]
