# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls about backups: the proposed ones, and those that libvirt has come to have, which take
libvirt's own dialect and checkpoints."""

import contextlib
import dataclasses
from collections.abc import Iterable

import libvirt

from virtbackup import access, errors, hypervisor
from virtbackup.conf import backup_conf, checkpoint_conf, domain_conf, native_conf, translate
from virtbackup.remote import (
    checkpoint,
    dispatch_event,
    domains,
    job_stats,
    protocol,
    remote_types,
    rpc,
    wire_conf,
)
from virtbackup.remote import remote_structs as structs
from virtbackup.remote import virtbackup_protocol as ours
from virtbackup.remote.dispatch import MESSAGES_OF, Session, backup_id, handles, hands_on
from virtbackup.remote.dispatch_connect import hostname
from virtbackup.remote.dispatch_domain import typed

REMOTE, VIRTBACKUP = protocol.REMOTE, protocol.VIRTBACKUP

JOB_COMPLETED = libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED

BACKUP = access.Perm.BACKUP


# --- the proposed calls ---


@handles(VIRTBACKUP, "SUPPORTED", opened=False)
def supported(session: Session, args: None) -> ours.SupportedRet:
    return ours.SupportedRet(VIRTBACKUP.version)


@handles(VIRTBACKUP, "CONNECT_GET_HOST")
def get_host(session: Session, args: None) -> ours.ConnectGetHostRet:
    driver = session.daemon.domains.first()
    return ours.ConnectGetHostRet(driver.get_type(), driver.get_version(), hostname(session))


@handles(VIRTBACKUP, "LIST_DOMAINS")
def list_domains(session: Session, args: None) -> ours.ListDomainsRet:
    listed = []
    for one in session.visible(session.daemon.domains.all()):
        try:
            state, reason = one.call("virDomainGetState", "domain_get_state")
        except libvirt.libvirtError as failure:
            if failure.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                continue  # it has gone since
            state, reason = libvirt.VIR_DOMAIN_NOSTATE, 0
        listed.append(ours.DomainState(wire_conf.domain_to_wire(one.ref), state, reason))
    return ours.ListDomainsRet(tuple(listed))


@handles(VIRTBACKUP, "DOMAIN_BACKUP_START")
def backup_start(session: Session, args: ours.DomainBackupStartArgs) -> None:
    errors.check_flags(
        "virDomainBackupStart", args.flags, hypervisor.START_QUIESCE | hypervisor.START_AUTODESTROY
    )
    found = session.domain(args.dom, "virDomainBackupStart", BACKUP)
    start(session, found, args.xml_desc, args.flags)


def start(session: Session, found: domains.Found, document: str, flags: int) -> None:
    """Start a backup, which ends with the client's connection where FLAGS say so."""
    before = session.daemon.ended.told(found.own.uuid, keep=True)
    own = session.own(found.own.uuid)
    id = found.call("virDomainBackupStart", "domain_backup_start", document, flags)
    session.daemon.ended.begin(found.own.uuid, before)
    if flags & hypervisor.START_AUTODESTROY:
        session.end_with(found.own.uuid, id)
        if id is None:
            with contextlib.suppress(libvirt.libvirtError):  # it runs, whatever is told of it
                session.end_with(found.own.uuid, backup_id(found))
    else:
        session.has_ended(found.own.uuid, own)


@handles(VIRTBACKUP, "DOMAIN_BACKUP_STOP")
def backup_stop(session: Session, args: structs.DomainFlagsArgs) -> None:
    errors.check_flags("virDomainBackupStop", args.flags, hypervisor.STOP_CANCEL)
    found = session.domain(args.dom, "virDomainBackupStop", BACKUP)
    stop(session, found, "virDomainBackupStop", args.flags)


def stop(session: Session, found: domains.Found, function: str, flags: int) -> None:
    """Stop a domain's backup, and keep in mind what is told of a job that has ended."""
    progress: job_stats.Stats = {}
    with contextlib.suppress(libvirt.libvirtError):  # the stop says better what is wrong
        progress = job_stats.running(found)
    session.daemon.ended.ending(found.own.uuid, progress)
    own = session.own(found.own.uuid)
    try:
        found.call(function, "domain_backup_stop", flags, only=own)
    except libvirt.libvirtError as failure:
        if failure.get_error_code() in _ENDED:
            _has_ended(session, found, own)
        raise
    _has_ended(session, found, own)


_ENDED = (libvirt.VIR_ERR_OPERATION_FAILED, libvirt.VIR_ERR_NO_DOMAIN_BACKUP)
"""What is said of a backup that was not good, or is not there: it is not to be ended any more."""


def _has_ended(session: Session, found: domains.Found, own: str | None) -> None:
    """A domain's backup has, be it the client's OWN or not: where backups are not told apart, it is
    to end with no client any more."""
    session.has_ended(found.own.uuid, own)
    for other in session.daemon.sessions():
        other.has_ended(found.own.uuid, None)


def _removed(told: Iterable[str]) -> ours.DomainBackupCleanupRet:
    return ours.DomainBackupCleanupRet(tuple(told))


hands_on(
    VIRTBACKUP, "DOMAIN_BACKUP_GET_XML_DESC", "virDomainBackupGetXMLDesc",
    "domain_backup_get_xml_desc", flags=0,
)  # fmt: skip
hands_on(
    VIRTBACKUP, "DOMAIN_BACKUP_GET_INFO", "virDomainBackupGetInfo", "domain_backup_get_info",
    wire_conf.info_to_wire, flags=0,
)  # fmt: skip
hands_on(
    VIRTBACKUP, "DOMAIN_BACKUP_CLEANUP", "virDomainBackupCleanup", "domain_backup_cleanup",
    _removed, flags=0,
)  # fmt: skip
hands_on(
    VIRTBACKUP, "DOMAIN_BRANCH_LIST", "virDomainBranchList", "domain_branch_list",
    wire_conf.branches_to_wire, flags=0,
)  # fmt: skip
hands_on(
    VIRTBACKUP, "DOMAIN_BRANCH_CREATE", "virDomainBranchCreate", "domain_branch_create", flags=0
)
hands_on(
    VIRTBACKUP, "DOMAIN_BRANCH_DELETE", "virDomainBranchDelete", "domain_branch_delete", flags=0
)


# --- libvirt's own calls ---


@handles(REMOTE, "DOMAIN_BACKUP_BEGIN")
def backup_begin(session: Session, args: structs.DomainBackupBeginArgs) -> None:
    """libvirt's own call, on our engine. A checkpoint that it is to begin is a branch from then on,
    once the backup was good."""
    function = "virDomainBackupBegin"
    errors.check_flags(function, args.flags, 0)
    found = session.domain(args.dom, function, BACKUP)
    check_can(found, "perform disk backup")
    definition = _definition(found, args.backup_xml)
    if definition.branch is not None:
        checkpoint.by_name(found, definition.branch)
    begins = None
    if args.checkpoint_xml is not None:
        wanted = checkpoint_conf.CheckpointDef.parse(args.checkpoint_xml)
        name = checkpoint.name_of(wanted, found)
        definition = checkpoint.begun_by(definition, wanted, name, definition_of(found))
        begins = name, wanted.description
    elif definition.branch is not None:
        definition = dataclasses.replace(definition, advance=False)
    start(session, found, definition.format(), 0)
    if begins is not None:
        session.daemon.describe(found.own.uuid, *begins)


def _definition(found: domains.Found, document: str) -> backup_conf.BackupDef:
    """What a document of libvirt's own asks for."""
    native = native_conf.BackupDef.parse(document)
    if native.mode == "push":
        raise errors.error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            "a push backup is not to be had here, only <domainbackup mode='pull'> with a <server>",
        )
    return translate.to_proposal(native, lambda: definition_of(found))


def definition_of(found: domains.Found) -> domain_conf.DomainDef:
    """The domain, by its own document."""
    xml = found.call("virDomainGetXMLDesc", "domain_get_xml_desc", 0)
    return domain_conf.DomainDef.parse(xml)


@handles(REMOTE, "DOMAIN_BACKUP_GET_XML_DESC")
def native_xml_desc(session: Session, args: structs.DomainFlagsArgs) -> structs.XmlRet:
    function = "virDomainBackupGetXMLDesc"
    errors.check_flags(function, args.flags, 0)
    found = session.domain(args.dom, function)
    document = found.call(function, "domain_backup_get_xml_desc", 0)
    live = backup_conf.BackupDef.parse(document)
    return structs.XmlRet(translate.running_to_native(live).format())


@handles(REMOTE, "DOMAIN_ABORT_JOB")
def abort_job(session: Session, args: structs.DomainArgs) -> None:
    """How a client of libvirt's ends a pull."""
    _abort(session, args.dom, "virDomainAbortJob")


@handles(REMOTE, "DOMAIN_ABORT_JOB_FLAGS")
def abort_job_flags(session: Session, args: structs.DomainFlagsArgs) -> None:
    errors.check_flags("virDomainAbortJobFlags", args.flags, 0)
    _abort(session, args.dom, "virDomainAbortJobFlags")


def _abort(session: Session, dom: remote_types.NonnullDomain, function: str) -> None:
    found = session.domain(dom, function, BACKUP)
    try:
        stop(session, found, function, 0)
    except libvirt.libvirtError as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
            raise
        _check_runs(found)
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID, "no job is active on the domain"
        ) from failure


def check_can(found: domains.Found, what: str) -> None:
    """Errors: VIR_ERR_OPERATION_UNSUPPORTED, in libvirt's words, for a domain that does not run."""
    if found.ref.id is None:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED, f"cannot {what} for inactive domain"
        )


def _check_runs(found: domains.Found) -> None:
    """A domain that does not run has no job, but for a backup that ended with it: that is looked at
    before. Errors: VIR_ERR_OPERATION_INVALID."""
    if found.ref.id is None:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID,
            "domain is not running",
            domain=libvirt.VIR_FROM_DOMAIN,
        )


# --- jobs ---


def _running(found: domains.Found) -> job_stats.Stats:
    """Of the backup that runs; empty where none does. Errors: as ``_check_runs``; the driver's."""
    stats = job_stats.running(found)
    if not stats:
        _check_runs(found)
    return stats


def _params(stats: job_stats.Stats) -> tuple[remote_types.TypedParam, ...]:
    """As libvirt types them."""
    return tuple(map(_param, stats, stats.values()))


def _param(name: str, value: hypervisor.Value) -> remote_types.TypedParam:
    param = typed(name, value)
    if name != "operation":
        return param
    as_int = param.value._replace(type=libvirt.VIR_TYPED_PARAM_INT)
    return dataclasses.replace(param, value=as_int)


@handles(REMOTE, "DOMAIN_GET_JOB_STATS")
def get_job_stats(session: Session, args: structs.DomainFlagsArgs) -> structs.DomainGetJobStatsRet:
    function = "virDomainGetJobStats"
    completed = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED
    keep = libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
    errors.check_flags(function, args.flags, completed | keep)
    found = session.domain(args.dom, function)
    if args.flags & completed:
        stats = session.daemon.ended.told(found.own.uuid, bool(args.flags & keep))
        good = bool(stats.get("success", True))
        kind = libvirt.VIR_DOMAIN_JOB_COMPLETED if good else libvirt.VIR_DOMAIN_JOB_FAILED
    else:
        stats, kind = _running(found), libvirt.VIR_DOMAIN_JOB_UNBOUNDED
    if not stats:
        return structs.DomainGetJobStatsRet(libvirt.VIR_DOMAIN_JOB_NONE, ())
    return structs.DomainGetJobStatsRet(kind, _params(stats))


@handles(REMOTE, "DOMAIN_GET_JOB_INFO")
def get_job_info(session: Session, args: structs.DomainArgs) -> structs.DomainGetJobInfoRet:
    stats = _running(session.domain(args.dom, "virDomainGetJobInfo"))
    kind = libvirt.VIR_DOMAIN_JOB_UNBOUNDED if stats else libvirt.VIR_DOMAIN_JOB_NONE
    elapsed = int(stats.get("time_elapsed", 0))
    return structs.DomainGetJobInfoRet(kind, elapsed, *[0] * 10)


# --- the end of a backup, told ---


@handles(VIRTBACKUP, "BACKUP_EVENT_REGISTER")
def event_register(session: Session, args: ours.BackupEventRegisterArgs) -> structs.CallbackIdRet:
    return dispatch_event.subscribe(session, VIRTBACKUP, 0, args.dom)


@handles(VIRTBACKUP, "BACKUP_EVENT_DEREGISTER")
def event_deregister(session: Session, args: structs.CallbackIdArgs) -> None:
    session.unsubscribe(args.callbackID, VIRTBACKUP)


def _ended(
    session: Session, ref: hypervisor.DomainRef, event: hypervisor.BackupEnded
) -> Iterable[rpc.Message]:
    dom = wire_conf.domain_to_wire(ref)
    for number in session.wanted(VIRTBACKUP, 0, ref):
        told = ours.BackupEndedMsg(number, dom, event.good, event.reason)
        yield rpc.event(VIRTBACKUP, "BACKUP_ENDED", told)
    stats = session.daemon.ended.told(ref.uuid, keep=True)
    for number in session.wanted(REMOTE, JOB_COMPLETED, ref):
        completed = structs.DomainEventCallbackJobCompletedMsg(number, dom, _params(stats))
        yield rpc.event(REMOTE, "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED", completed)


MESSAGES_OF[hypervisor.BackupEnded] = _ended
