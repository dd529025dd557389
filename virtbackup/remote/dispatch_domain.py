# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls that find domains and look at them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import libvirt

from virtbackup import access, errors, hypervisor
from virtbackup.remote import checkpoint, domains, protocol, remote_types, rpc_error, wire_conf, xdr
from virtbackup.remote import remote_structs as structs
from virtbackup.remote.dispatch import Session, handles, hands_on
from virtbackup.remote.dispatch_connect import terminated

logger = logging.getLogger(__name__)

REMOTE, QEMU = protocol.REMOTE, protocol.QEMU

_SECRET = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE
"""Flags of virDomainGetXMLDesc that are not for read-only connections."""


# --- which there are ---


def _states(one: domains.Found) -> set[int]:
    """The flags of listAllDomains that a domain goes by, for its state."""
    state = one.call("virDomainGetState", "domain_get_state")[0]
    return {
        {
            libvirt.VIR_DOMAIN_RUNNING: libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING,
            libvirt.VIR_DOMAIN_PAUSED: libvirt.VIR_CONNECT_LIST_DOMAINS_PAUSED,
            libvirt.VIR_DOMAIN_SHUTOFF: libvirt.VIR_CONNECT_LIST_DOMAINS_SHUTOFF,
        }.get(state, libvirt.VIR_CONNECT_LIST_DOMAINS_OTHER)
    }


def _either(yes: int, no: int, holds: Callable[[domains.Found], bool]) -> Any:
    return (yes | no, lambda one: {yes if holds(one) else no})


_GROUPS: tuple[tuple[int, Callable[[domains.Found], set[int]]], ...] = (
    _either(
        libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE,
        libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE,
        lambda one: one.ref.id is not None,
    ),
    _either(
        libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT,
        libvirt.VIR_CONNECT_LIST_DOMAINS_TRANSIENT,
        lambda one: bool(one.call("virDomainIsPersistent", "domain_is_persistent")),
    ),
    _either(
        libvirt.VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE,
        libvirt.VIR_CONNECT_LIST_DOMAINS_NO_MANAGEDSAVE,
        lambda one: bool(
            one.call("virDomainHasManagedSaveImage", "domain_has_managed_save_image", 0)
        ),
    ),
    _either(
        libvirt.VIR_CONNECT_LIST_DOMAINS_AUTOSTART,
        libvirt.VIR_CONNECT_LIST_DOMAINS_NO_AUTOSTART,
        lambda one: bool(one.call("virDomainGetAutostart", "domain_get_autostart")),
    ),
    _either(
        libvirt.VIR_CONNECT_LIST_DOMAINS_HAS_SNAPSHOT,
        libvirt.VIR_CONNECT_LIST_DOMAINS_NO_SNAPSHOT,
        lambda one: bool(one.call("virDomainSnapshotNum", "domain_snapshot_num", 0)),
    ),
    _either(
        libvirt.VIR_CONNECT_LIST_DOMAINS_HAS_CHECKPOINT,
        libvirt.VIR_CONNECT_LIST_DOMAINS_NO_CHECKPOINT,
        # Those of a domain that does not run are in images that nobody has open.
        lambda one: one.ref.id is not None and bool(checkpoint.of(one)),
    ),
    (
        libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING
        | libvirt.VIR_CONNECT_LIST_DOMAINS_PAUSED
        | libvirt.VIR_CONNECT_LIST_DOMAINS_SHUTOFF
        | libvirt.VIR_CONNECT_LIST_DOMAINS_OTHER,
        _states,
    ),
)
"""The groups of flags of listAllDomains: of each that is asked for, a domain has to go by one; all
flags of a group are as good as none."""


@handles(REMOTE, "CONNECT_LIST_ALL_DOMAINS")
def list_all_domains(
    session: Session, args: structs.ConnectListAllDomainsArgs
) -> structs.ConnectListAllDomainsRet:
    known = 0
    for group, _ in _GROUPS:
        known |= group
    errors.check_flags("virConnectListAllDomains", args.flags, known)
    found = session.visible(session.daemon.domains.all())
    for group, goes_by in _GROUPS:
        wanted = args.flags & group
        if wanted not in (0, group):
            found = [one for one in found if _goes_by(one, goes_by) & wanted]
    refs = tuple(wire_conf.domain_to_wire(one.ref) for one in found)
    return structs.ConnectListAllDomainsRet(refs if args.need_results else (), len(refs))


def _goes_by(one: domains.Found, flags_of: Callable[[domains.Found], set[int]]) -> int:
    """The flags that a domain goes by; none once it is gone."""
    try:
        return sum(flags_of(one))
    except libvirt.libvirtError as failure:
        if failure.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            raise
        logger.info("domain=%s cannot be asked: %s", one.ref.name, failure)
        return 0


def _ids(session: Session) -> list[int | None]:
    """Of all domains; None of each that does not run."""
    return [one.ref.id for one in session.visible(session.daemon.domains.all())]


@handles(REMOTE, "CONNECT_NUM_OF_DOMAINS")
def num_of_domains(session: Session, args: None) -> structs.NumRet:
    return structs.NumRet(sum(id is not None for id in _ids(session)))


@handles(REMOTE, "CONNECT_LIST_DOMAINS")
def list_domains(
    session: Session, args: structs.ConnectListDomainsArgs
) -> structs.ConnectListDomainsRet:
    ids = [id for id in _ids(session) if id is not None]
    return structs.ConnectListDomainsRet(tuple(ids[: max(0, args.maxids)]))


@handles(REMOTE, "CONNECT_NUM_OF_DEFINED_DOMAINS")
def num_of_defined_domains(session: Session, args: None) -> structs.NumRet:
    return structs.NumRet(sum(id is None for id in _ids(session)))


@handles(REMOTE, "CONNECT_LIST_DEFINED_DOMAINS")
def list_defined_domains(
    session: Session, args: structs.ConnectListDefinedDomainsArgs
) -> structs.ConnectListDefinedDomainsRet:
    found = session.visible(session.daemon.domains.all())
    names = [one.ref.name for one in found if one.ref.id is None]
    return structs.ConnectListDefinedDomainsRet(tuple(names[: max(0, args.maxnames)]))


@handles(REMOTE, "DOMAIN_LOOKUP_BY_ID")
def lookup_by_id(session: Session, args: structs.DomainLookupByIdArgs) -> structs.DomainRet:
    one = session.daemon.domains.by_id(args.id)
    session.check(access.Perm.READ, one.ref.name, f"with id {args.id}")
    return structs.DomainRet(wire_conf.domain_to_wire(one.ref))


@handles(REMOTE, "DOMAIN_LOOKUP_BY_NAME")
def lookup_by_name(session: Session, args: structs.DomainLookupByNameArgs) -> structs.DomainRet:
    session.check(access.Perm.READ, args.name)
    one = session.daemon.domains.by_name(args.name)
    return structs.DomainRet(wire_conf.domain_to_wire(one.ref))


@handles(REMOTE, "DOMAIN_LOOKUP_BY_UUID")
def lookup_by_uuid(session: Session, args: structs.DomainLookupByUuidArgs) -> structs.DomainRet:
    uuid = wire_conf.uuid_from_wire(args.uuid)
    one = session.daemon.domains.by_uuid(uuid)
    session.check(access.Perm.READ, one.ref.name, f"with uuid '{uuid}'")
    return structs.DomainRet(wire_conf.domain_to_wire(one.ref))


# --- what they are ---


@handles(REMOTE, "DOMAIN_GET_XML_DESC")
def get_xml_desc(session: Session, args: structs.DomainFlagsArgs) -> structs.XmlRet:
    function = "virDomainGetXMLDesc"
    if session.read_only and args.flags & _SECRET:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_DENIED,
            "virDomainGetXMLDesc with secure flag",
            domain=libvirt.VIR_FROM_DOMAIN,
        )
    perm = access.Perm.BACKUP if args.flags & _SECRET else access.Perm.READ
    found = session.domain(args.dom, function, perm)
    return structs.XmlRet(found.call(function, "domain_get_xml_desc", args.flags))


@handles(REMOTE, "DOMAIN_GET_STATE")
def get_state(session: Session, args: structs.DomainFlagsArgs) -> structs.DomainGetStateRet:
    function = "virDomainGetState"
    errors.check_flags(function, args.flags, 0)
    found = session.domain(args.dom, function)
    return structs.DomainGetStateRet(*found.call(function, "domain_get_state"))


@handles(REMOTE, "DOMAIN_IS_ACTIVE")
def is_active(session: Session, args: structs.DomainArgs) -> structs.DomainIsActiveRet:
    found = session.domain(args.dom, "virDomainIsActive")
    return structs.DomainIsActiveRet(int(found.ref.id is not None))


def _label(told: tuple[str, bool]) -> structs.DomainGetSecurityLabelRet:
    label, enforcing = told
    return structs.DomainGetSecurityLabelRet(terminated(label), int(enforcing))


def _messages(told: Sequence[str]) -> structs.DomainGetMessagesRet:
    return structs.DomainGetMessagesRet(tuple(told))


hands_on(REMOTE, "DOMAIN_GET_INFO", "virDomainGetInfo", "domain_get_info")
hands_on(REMOTE, "DOMAIN_GET_OS_TYPE", "virDomainGetOSType", "domain_get_os_type")
hands_on(REMOTE, "DOMAIN_IS_PERSISTENT", "virDomainIsPersistent", "domain_is_persistent")
hands_on(REMOTE, "DOMAIN_GET_AUTOSTART", "virDomainGetAutostart", "domain_get_autostart")
hands_on(
    REMOTE, "DOMAIN_GET_AUTOSTART_ONCE", "virDomainGetAutostartOnce", "domain_get_autostart_once"
)
hands_on(
    REMOTE, "DOMAIN_HAS_MANAGED_SAVE_IMAGE", "virDomainHasManagedSaveImage",
    "domain_has_managed_save_image",
)  # fmt: skip
hands_on(REMOTE, "DOMAIN_SNAPSHOT_NUM", "virDomainSnapshotNum", "domain_snapshot_num")
hands_on(
    REMOTE, "DOMAIN_GET_SECURITY_LABEL", "virDomainGetSecurityLabel", "domain_get_security_label",
    _label,
)  # fmt: skip
hands_on(REMOTE, "DOMAIN_GET_MESSAGES", "virDomainGetMessages", "domain_get_messages", _messages)


# --- their disks ---


def _sizes(told: tuple[int, int, int]) -> structs.DomainGetBlockInfoRet:
    capacity, allocation, physical = told
    return structs.DomainGetBlockInfoRet(allocation, capacity, physical)


def _job(told: tuple[int, int, int, int] | None) -> structs.DomainGetBlockJobInfoRet:
    return structs.DomainGetBlockJobInfoRet(int(told is not None), *(told or (0, 0, 0, 0)))


hands_on(REMOTE, "DOMAIN_GET_BLOCK_INFO", "virDomainGetBlockInfo", "domain_get_block_info", _sizes)
hands_on(
    REMOTE, "DOMAIN_GET_BLOCK_JOB_INFO", "virDomainGetBlockJobInfo", "domain_get_block_job_info",
    _job,
)  # fmt: skip


@handles(REMOTE, "DOMAIN_BLOCK_STATS_FLAGS")
def block_stats_flags(
    session: Session, args: structs.DomainBlockStatsFlagsArgs
) -> structs.DomainBlockStatsFlagsRet:
    function = "virDomainBlockStatsFlags"
    found = session.domain(args.dom, function)
    if not 0 <= args.nparams <= remote_types.DOMAIN_BLOCK_STATS_PARAMETERS_MAX:
        raise rpc_error.internal("nparams too large")
    stats = found.call(function, "domain_block_stats_flags", args.path, args.flags)
    if not args.nparams:
        return structs.DomainBlockStatsFlagsRet((), len(stats))
    params = tuple(
        remote_types.TypedParam(name, xdr.Arm(libvirt.VIR_TYPED_PARAM_LLONG, value))
        for name, value in stats.items()
    )[: args.nparams]
    return structs.DomainBlockStatsFlagsRet(params, len(params))


@handles(REMOTE, "CONNECT_GET_ALL_DOMAIN_STATS")
def get_all_domain_stats(
    session: Session, args: structs.ConnectGetAllDomainStatsArgs
) -> structs.ConnectGetAllDomainStatsRet:
    function = "virConnectGetAllDomainStats"
    if args.doms:
        found = [session.domain(dom, function) for dom in args.doms]
    else:
        found = session.visible(session.daemon.domains.all())
    by_driver: dict[int, tuple[hypervisor.Driver, list[hypervisor.DomainRef]]] = {}
    for one in found:
        by_driver.setdefault(id(one.driver), (one.driver, []))[1].append(one.own)
    records: list[structs.DomainStatsRecord] = []
    refusal = None
    for driver, refs in by_driver.values():
        try:
            hook = domains.hook_of(driver, function, "get_all_domain_stats")
            records += [_record(session, *told) for told in hook(refs, args.stats, args.flags)]
        except libvirt.libvirtError as failure:
            # All domains are those of the hosts that have statistics, where there is one.
            if args.doms or failure.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise
            refusal = failure
    if refusal is not None and not records:
        raise refusal
    return structs.ConnectGetAllDomainStatsRet(tuple(records))


def _record(
    session: Session, own: hypervisor.DomainRef, stats: Mapping[str, hypervisor.Value]
) -> structs.DomainStatsRecord:
    ref = wire_conf.domain_to_wire(session.daemon.domains.public(own))
    return structs.DomainStatsRecord(ref, tuple(map(typed, stats, stats.values())))


def typed(name: str, value: hypervisor.Value) -> remote_types.TypedParam:
    """A statistic, by the type that its VALUE has."""
    match value:
        case bool():
            arm = xdr.Arm(libvirt.VIR_TYPED_PARAM_BOOLEAN, int(value))
        case int():
            kinds = libvirt.VIR_TYPED_PARAM_ULLONG, libvirt.VIR_TYPED_PARAM_LLONG
            arm = xdr.Arm(kinds[value < 0], value)
        case float():
            arm = xdr.Arm(libvirt.VIR_TYPED_PARAM_DOUBLE, value)
        case _:
            arm = xdr.Arm(libvirt.VIR_TYPED_PARAM_STRING, value)
    return remote_types.TypedParam(name, arm)


# --- what is done to them ---

hands_on(REMOTE, "DOMAIN_FSFREEZE", "virDomainFSFreeze", "domain_fsfreeze")
hands_on(REMOTE, "DOMAIN_FSTHAW", "virDomainFSThaw", "domain_fsthaw")
hands_on(REMOTE, "DOMAIN_SUSPEND", "virDomainSuspend", "domain_suspend")
hands_on(REMOTE, "DOMAIN_RESUME", "virDomainResume", "domain_resume")
hands_on(QEMU, "DOMAIN_MONITOR_COMMAND", "virDomainQemuMonitorCommand", "domain_monitor_command")
