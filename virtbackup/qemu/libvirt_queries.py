# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt answers about its host and its domains, passed on (``hypervisor.QueryDriver``)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import libvirt
import libvirt_qemu

from virtbackup import errors, hypervisor, runtime
from virtbackup.qemu import status


class own_errors(contextlib.ContextDecorator):
    """libvirt's errors are errors of ours: the same, but of the type that callers look for; so is
    what libvirt-python cannot hand on, as clients say it in any bytes."""

    # No generator: its frame and the error would hold each other, and the error libvirt's
    # connection, which would stay open after its close until garbage is collected.

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, failure: BaseException | None, __: object) -> None:
        if isinstance(failure, libvirt.libvirtError) and not isinstance(failure, errors.Error):
            raise errors.of_libvirt(failure) from failure
        if isinstance(failure, UnicodeEncodeError):
            text = "a name, a path or a command is not UTF-8"
            raise errors.error(libvirt.VIR_ERR_INVALID_ARG, text) from failure


def ref_of(found: "libvirt.virDomain") -> hypervisor.DomainRef:
    """A domain as the driver interface names it; nothing is asked for that."""
    id = found.ID()
    return hypervisor.DomainRef(found.name(), found.UUIDString(), None if id < 0 else id)


class LibvirtQueries:
    """The hooks, for a driver that has libvirt's connection. Errors, of each: libvirt's own."""

    @property
    def _connection(self) -> "libvirt.virConnect":
        raise NotImplementedError

    def lookup(self, ref: hypervisor.DomainRef) -> "libvirt.virDomain":
        """libvirt's own. Errors: VIR_ERR_NO_DOMAIN."""
        raise NotImplementedError

    def _file(self, uuid: str) -> status.StatusFile:
        """Where what is known of a domain's backup is."""
        raise NotImplementedError

    def _left_behind(self) -> Iterator[hypervisor.DomainRef]:
        """The domains, gone or not, of which there is a status file, as if they were gone."""
        for file, one in status.all_in(runtime.directory()):
            if self._file(one.uuid).path == file:
                yield hypervisor.DomainRef(one.name, one.uuid, None)

    @own_errors()
    def domain_lookup(
        self, *, uuid: str | None = None, name: str | None = None, id: int | None = None
    ) -> hypervisor.DomainRef | None:
        """libvirt's; or a transient one that is gone, while its backup's status file is not."""
        try:
            return ref_of(_find(self._connection, uuid, name, id))
        except (ValueError, OverflowError):
            return None  # libvirt-python cannot hand it on, and no domain has such a name, or id
        except libvirt.libvirtError as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
        left = self._left_behind()
        return next((ref for ref in left if uuid == ref.uuid or name == ref.name), None)

    # --- the host ---

    @own_errors()
    def get_hostname(self) -> str:
        return str(self._connection.getHostname())

    @own_errors()
    def get_lib_version(self) -> int:
        return int(self._connection.getLibVersion())

    @own_errors()
    def get_capabilities(self) -> str:
        return str(self._connection.getCapabilities())

    @own_errors()
    def node_get_info(self) -> tuple[str, int, int, int, int, int, int, int]:
        connection = self._connection
        model, mib, cpus, mhz, nodes, sockets, cores, threads = connection.getInfo()
        memory = _memory_kib(connection, mib, nodes)
        return model, memory, cpus, mhz, nodes, sockets, cores, threads

    @own_errors()
    def node_get_security_model(self) -> tuple[str, str]:
        model, doi = self._connection.getSecurityModel()
        return model, doi

    # --- domains ---

    @own_errors()
    def domain_get_info(self, ref: hypervisor.DomainRef) -> tuple[int, int, int, int, int]:
        state, most, memory, vcpus, time = self.lookup(ref).info()
        return state, most, memory, vcpus, time

    @own_errors()
    def domain_get_os_type(self, ref: hypervisor.DomainRef) -> str:
        return str(self.lookup(ref).OSType())

    @own_errors()
    def domain_is_persistent(self, ref: hypervisor.DomainRef) -> bool:
        return bool(self.lookup(ref).isPersistent())

    @own_errors()
    def domain_get_autostart(self, ref: hypervisor.DomainRef) -> bool:
        return bool(self.lookup(ref).autostart())

    @own_errors()
    def domain_get_autostart_once(self, ref: hypervisor.DomainRef) -> bool:
        """Errors, too: VIR_ERR_NO_SUPPORT by a libvirt-python before 11.2."""
        ask = _known(self.lookup(ref), "autostartOnce", "virDomainGetAutostartOnce")
        return bool(ask())

    @own_errors()
    def domain_has_managed_save_image(self, ref: hypervisor.DomainRef, flags: int) -> bool:
        return bool(self.lookup(ref).hasManagedSaveImage(flags))

    @own_errors()
    def domain_snapshot_num(self, ref: hypervisor.DomainRef, flags: int) -> int:
        return int(self.lookup(ref).snapshotNum(flags))

    @own_errors()
    def domain_get_security_label(self, ref: hypervisor.DomainRef) -> tuple[str, bool]:
        label, enforced = self.lookup(ref).securityLabel()
        return label, bool(enforced)

    @own_errors()
    def domain_get_messages(self, ref: hypervisor.DomainRef, flags: int) -> Sequence[str]:
        """Errors, too: VIR_ERR_NO_SUPPORT by a libvirt-python before 7.1."""
        ask = _known(self.lookup(ref), "messages", "virDomainGetMessages")
        return list(ask(flags))

    @own_errors()
    def domain_get_block_info(
        self, ref: hypervisor.DomainRef, path: str, flags: int
    ) -> tuple[int, int, int]:
        capacity, allocation, physical = self.lookup(ref).blockInfo(path, flags)
        return capacity, allocation, physical

    @own_errors()
    def domain_block_stats_flags(
        self, ref: hypervisor.DomainRef, path: str, flags: int
    ) -> Mapping[str, int]:
        found: dict[str, int] = self.lookup(ref).blockStatsFlags(path, flags)
        return found

    @own_errors()
    def domain_get_block_job_info(
        self, ref: hypervisor.DomainRef, path: str, flags: int
    ) -> tuple[int, int, int, int] | None:
        found = self.lookup(ref).blockJobInfo(path, flags)
        return (found["type"], found["bandwidth"], found["cur"], found["end"]) if found else None

    @own_errors()
    def get_all_domain_stats(
        self, domains: Sequence[hypervisor.DomainRef], stats: int, flags: int
    ) -> Sequence[tuple[hypervisor.DomainRef, Mapping[str, hypervisor.Value]]]:
        """A domain that is gone is passed over, as libvirt does."""
        connection = self._connection
        if domains:
            found = [one for one in map(self._lookup_if_there, domains) if one is not None]
            if not found:
                return []
            records = connection.domainListGetStats(found, stats, flags)
        else:
            records = connection.getAllDomainStats(stats, flags)
        return [(ref_of(one), values) for one, values in records]

    def _lookup_if_there(self, ref: hypervisor.DomainRef) -> "libvirt.virDomain | None":
        try:
            return self.lookup(ref)
        except errors.Error as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            return None

    @own_errors()
    def domain_fsfreeze(
        self, ref: hypervisor.DomainRef, mountpoints: Sequence[str], flags: int
    ) -> int:
        return int(self.lookup(ref).fsFreeze(list(mountpoints) or None, flags))

    @own_errors()
    def domain_fsthaw(
        self, ref: hypervisor.DomainRef, mountpoints: Sequence[str], flags: int
    ) -> int:
        return int(self.lookup(ref).fsThaw(list(mountpoints) or None, flags))

    @own_errors()
    def domain_suspend(self, ref: hypervisor.DomainRef) -> None:
        self.lookup(ref).suspend()

    @own_errors()
    def domain_resume(self, ref: hypervisor.DomainRef) -> None:
        self.lookup(ref).resume()

    @own_errors()
    def domain_monitor_command(self, ref: hypervisor.DomainRef, command: str, flags: int) -> str:
        return str(libvirt_qemu.qemuMonitorCommand(self.lookup(ref), command, flags))


def _find(
    connection: "libvirt.virConnect", uuid: str | None, name: str | None, id: int | None
) -> "libvirt.virDomain":
    if uuid is not None:
        return connection.lookupByUUIDString(uuid)
    if name is not None:
        return connection.lookupByName(name)
    return connection.lookupByID(id)


def _known(found: "libvirt.virDomain", method: str, function: str) -> Callable[..., Any]:
    """The domain's METHOD, which calls FUNCTION. Errors: VIR_ERR_NO_SUPPORT by a libvirt-python
    that is too old for it."""
    if (known := getattr(found, method, None)) is None:
        raise errors.error(libvirt.VIR_ERR_NO_SUPPORT, function, domain=libvirt.VIR_FROM_DOMAIN)
    bound: Callable[..., Any] = known
    return bound


def _memory_kib(connection: "libvirt.virConnect", mib: int, nodes: int) -> int:
    """The host's memory, of which libvirt-python tells only whole MiB: of two ways to count the
    memory, libvirt has told the one that fits."""
    with contextlib.suppress(libvirt.libvirtError):
        of_nodes = sum(connection.getMemoryStats(node)["total"] for node in range(nodes))
        if of_nodes >> 10 == mib:
            return int(of_nodes)
        whole = connection.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)["total"]
        if whole >> 10 == mib:
            return int(whole)
    return mib << 10
