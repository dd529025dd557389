# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls about checkpoints, which are a view of our branches."""

from collections.abc import Sequence

import libvirt

from virtbackup import access, errors
from virtbackup.conf import checkpoint_conf
from virtbackup.remote import checkpoint, domains, protocol, remote_types, wire_conf
from virtbackup.remote import remote_structs as structs
from virtbackup.remote.dispatch import Session, handles
from virtbackup.remote.dispatch_backup import check_can, definition_of

REMOTE = protocol.REMOTE

_ROOTS = libvirt.VIR_DOMAIN_CHECKPOINT_LIST_ROOTS
_DESCENDANTS = libvirt.VIR_DOMAIN_CHECKPOINT_LIST_DESCENDANTS
_TOPOLOGICAL = libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL
_LEAVES = libvirt.VIR_DOMAIN_CHECKPOINT_LIST_LEAVES
_NO_LEAVES = libvirt.VIR_DOMAIN_CHECKPOINT_LIST_NO_LEAVES


def _found(
    session: Session,
    sent: remote_types.NonnullDomainCheckpoint,
    function: str,
    perm: access.Perm = access.Perm.READ,
) -> tuple[domains.Found, checkpoint.Checkpoint, list[checkpoint.Checkpoint]]:
    """(The domain, the checkpoint that is meant, those that are in line behind it.)"""
    found = session.domain(sent.dom, function, perm)
    one, later = checkpoint.in_line(found, sent.name)
    return found, one, later


def _wire(found: domains.Found, name: str) -> remote_types.NonnullDomainCheckpoint:
    return remote_types.NonnullDomainCheckpoint(name, wire_conf.domain_to_wire(found.ref))


def _listed(
    found: domains.Found, some: Sequence[checkpoint.Checkpoint], need_results: int
) -> structs.CheckpointsRet:
    wire = tuple(_wire(found, one.name) for one in some)
    return structs.CheckpointsRet(wire if need_results else (), len(wire))


@handles(REMOTE, "DOMAIN_LIST_ALL_CHECKPOINTS")
def list_all(
    session: Session, args: structs.DomainListAllCheckpointsArgs
) -> structs.CheckpointsRet:
    function = "virDomainListAllCheckpoints"
    errors.check_flags(function, args.flags, _ROOTS | _TOPOLOGICAL | _LEAVES | _NO_LEAVES)
    found = session.domain(args.dom, function)
    known = checkpoint.of(found)
    listed = _with_leaves(known, args.flags)
    if args.flags & _ROOTS:
        listed = [one for one in listed if one.parent is None]
    return _listed(found, listed, args.need_results)


@handles(REMOTE, "DOMAIN_CHECKPOINT_LIST_ALL_CHILDREN")
def list_all_children(
    session: Session, args: structs.DomainCheckpointListAllChildrenArgs
) -> structs.CheckpointsRet:
    function = "virDomainCheckpointListAllChildren"
    errors.check_flags(function, args.flags, _DESCENDANTS | _TOPOLOGICAL | _LEAVES | _NO_LEAVES)
    found, one, later = _found(session, args.checkpoint, function)
    children = _with_leaves(later, args.flags)
    if not args.flags & _DESCENDANTS:
        children = [other for other in children if other.parent == one.name]
    return _listed(found, children, args.need_results)


def _with_leaves(some: list[checkpoint.Checkpoint], flags: int) -> list[checkpoint.Checkpoint]:
    """SOME, which end with the last of all, without what FLAGS leave out."""
    match bool(flags & _LEAVES), bool(flags & _NO_LEAVES):
        case True, False:
            return some[-1:]
        case False, True:
            return some[:-1]
    return some


@handles(REMOTE, "DOMAIN_CHECKPOINT_LOOKUP_BY_NAME")
def lookup_by_name(
    session: Session, args: structs.DomainCheckpointLookupByNameArgs
) -> structs.CheckpointRet:
    function = "virDomainCheckpointLookupByName"
    errors.check_flags(function, args.flags, 0)
    found = session.domain(args.dom, function)
    return structs.CheckpointRet(_wire(found, checkpoint.by_name(found, args.name).name))


@handles(REMOTE, "DOMAIN_CHECKPOINT_GET_PARENT")
def get_parent(
    session: Session, args: structs.CheckpointFlagsArgs
) -> structs.DomainCheckpointGetParentRet:
    function = "virDomainCheckpointGetParent"
    errors.check_flags(function, args.flags, 0)
    found, one, _ = _found(session, args.checkpoint, function)
    if one.parent is None:
        raise checkpoint.missing(f"checkpoint '{one.name}' does not have a parent")
    return structs.DomainCheckpointGetParentRet(_wire(found, one.parent))


@handles(REMOTE, "DOMAIN_CHECKPOINT_GET_XML_DESC")
def get_xml_desc(session: Session, args: structs.CheckpointFlagsArgs) -> structs.XmlRet:
    function = "virDomainCheckpointGetXMLDesc"
    known = (
        libvirt.VIR_DOMAIN_CHECKPOINT_XML_SECURE
        | libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        | libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
    )
    errors.check_flags(function, args.flags, known)
    secret = bool(args.flags & libvirt.VIR_DOMAIN_CHECKPOINT_XML_SECURE)
    if session.read_only and secret:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_DENIED,
            "virDomainCheckpointGetXMLDesc with secure flag",
            domain=libvirt.VIR_FROM_DOMAIN_CHECKPOINT,
        )
    perm = access.Perm.BACKUP if secret else access.Perm.READ
    found, one, _ = _found(session, args.checkpoint, function, perm)
    of_domain = None
    if not args.flags & libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN:
        flags = libvirt.VIR_DOMAIN_XML_SECURE if secret else 0
        of_domain = found.call("virDomainGetXMLDesc", "domain_get_xml_desc", flags)
    description = session.daemon.described.get((found.own.uuid, one.name))
    sizes = bool(args.flags & libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE)
    text = checkpoint.document(one, definition_of(found), description, sizes, of_domain)
    return structs.XmlRet(text)


@handles(REMOTE, "DOMAIN_CHECKPOINT_CREATE_XML")
def create_xml(
    session: Session, args: structs.DomainCheckpointCreateXmlArgs
) -> structs.CheckpointRet:
    """A checkpoint without a backup; one that is to be REDEFINEd has to be there."""
    function = "virDomainCheckpointCreateXML"
    redefine = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
    validate = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
    errors.check_flags(function, args.flags, redefine | validate)
    found = session.domain(args.dom, function, access.Perm.BACKUP)
    wanted = checkpoint_conf.CheckpointDef.parse(args.xml_desc)
    if args.flags & redefine:
        name = _known(found, wanted)
    else:
        check_can(found, "create checkpoint")
        name = checkpoint.name_of(wanted, found)
        domain = definition_of(found)
        taken = [disk.target for disk in domain.disks if disk.takes_part()]
        checkpoint.check_disks(wanted, name, domain, taken)
        found.call(function, "domain_branch_create", name, 0)
    session.daemon.describe(found.own.uuid, name, wanted.description)
    return structs.CheckpointRet(_wire(found, name))


def _known(found: domains.Found, wanted: checkpoint_conf.CheckpointDef) -> str:
    """The name of a checkpoint that is WANTED again. Errors: VIR_ERR_XML_ERROR where that has none;
    VIR_ERR_CHECKPOINT_INCONSISTENT where it is gone from the images: nobody can bring it back."""
    if wanted.name is None:
        raise errors.error(
            libvirt.VIR_ERR_XML_ERROR,
            "a redefined checkpoint must have a name",
            domain=libvirt.VIR_FROM_DOMAIN_CHECKPOINT,
        )
    for one in checkpoint.of(found):
        if one.name == wanted.name:
            return one.name
    raise errors.error(
        errors.CHECKPOINT_INCONSISTENT,
        f"no disk has a bitmap of checkpoint '{wanted.name}', which cannot be redefined",
        domain=libvirt.VIR_FROM_DOMAIN_CHECKPOINT,
    )


@handles(REMOTE, "DOMAIN_CHECKPOINT_DELETE")
def delete(session: Session, args: structs.CheckpointFlagsArgs) -> None:
    """With its children, where FLAGS say so. That libvirt forgets it and the images do not, as its
    METADATA_ONLY has it, is not to be had: there is nothing but the images."""
    function = "virDomainCheckpointDelete"
    children = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN
    only = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN_ONLY
    errors.check_flags(function, args.flags, children | only)
    found, one, later = _found(session, args.checkpoint, function, access.Perm.BACKUP)
    gone = [] if args.flags & only else [one]
    gone += later if args.flags & (children | only) else []
    for each in reversed(gone):
        found.call(function, "domain_branch_delete", each.name, 0)
        session.daemon.describe(found.own.uuid, each.name, None)
