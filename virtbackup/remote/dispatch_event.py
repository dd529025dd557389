# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls that ask for events, and the events (virConnectDomainEventRegisterAny)."""

from collections.abc import Iterable

import libvirt

from virtbackup import hypervisor
from virtbackup.remote import program, protocol, remote_types, rpc, rpc_error, wire_conf
from virtbackup.remote import remote_structs as structs
from virtbackup.remote.dispatch import MESSAGES_OF, Session, Subscription, handles

REMOTE = protocol.REMOTE
LIFECYCLE = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
LAST = 26
"""VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE, the last of libvirt 9.0's."""


def subscribe(
    session: Session, of: program.Program, event: int, dom: remote_types.Domain
) -> structs.CallbackIdRet:
    """Have a session told of an EVENT of a domain, or of all. Errors: as ``Session.domain``."""
    session.daemon.domains.open()  # where one is not yet, whose events are meant, too
    uuid = None
    if dom is not None:
        uuid = session.domain(dom, "virConnectDomainEventRegisterAny").own.uuid
    return structs.CallbackIdRet(session.subscribe(Subscription(of, event, uuid)))


@handles(REMOTE, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY")
def register_any(
    session: Session, args: structs.ConnectDomainEventCallbackRegisterAnyArgs
) -> structs.CallbackIdRet:
    """Of any of libvirt's events; there may be some that never come."""
    if not 0 <= args.eventID <= LAST:
        raise rpc_error.internal(f"unsupported event ID {args.eventID}")
    return subscribe(session, REMOTE, args.eventID, args.dom)


@handles(REMOTE, "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY")
def deregister_any(session: Session, args: structs.CallbackIdArgs) -> None:
    session.unsubscribe(args.callbackID, REMOTE)


def _lifecycle(
    session: Session, ref: hypervisor.DomainRef, event: hypervisor.LifecycleEvent
) -> Iterable[rpc.Message]:
    told = structs.DomainEventLifecycleMsg(wire_conf.domain_to_wire(ref), event.event, event.detail)
    for number in session.wanted(REMOTE, LIFECYCLE, ref):
        message = structs.DomainEventCallbackLifecycleMsg(number, told)
        yield rpc.event(REMOTE, "DOMAIN_EVENT_CALLBACK_LIFECYCLE", message)


MESSAGES_OF[hypervisor.LifecycleEvent] = _lifecycle
