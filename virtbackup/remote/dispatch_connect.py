# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls about a connection and its hypervisor."""

import socket
from collections.abc import Callable
from typing import Any

import libvirt

from virtbackup import errors
from virtbackup.remote import domains, protocol, remote_types, rpc_error
from virtbackup.remote import remote_structs as structs
from virtbackup.remote.dispatch import Session, handles

REMOTE = protocol.REMOTE

SPOKEN = 9 * 1000000, 11 * 1000000 + 9 * 1000
"""The libvirts whose calls these are: the next has a flag of virDomainBackupBegin's that is unknown
here, VIR_DOMAIN_BACKUP_BEGIN_PRESERVE_SHUTDOWN_DOMAIN."""
_FEATURES = frozenset(
    {
        remote_types.FEATURE_PROGRAM_KEEPALIVE,
        remote_types.FEATURE_REMOTE_EVENT_CALLBACK,
        remote_types.FEATURE_REMOTE_CLOSE_CALLBACK,
    }
)


def ask(session: Session, function: str, hook: str, *args: Any) -> Any:
    """What the first driver's HOOK returns. Errors: VIR_ERR_NO_SUPPORT, the hook's own."""
    return domains.hook_of(session.daemon.domains.first(), function, hook)(*args)


@handles(REMOTE, "AUTH_LIST", opened=False)
def auth_list(session: Session, args: None) -> structs.AuthListRet:
    """None is needed: the kernel, or TLS, has said who the client is."""
    return structs.AuthListRet((remote_types.AUTH_NONE,))


@handles(REMOTE, "CONNECT_SUPPORTS_FEATURE", opened=False)
def supports_feature(
    session: Session, args: structs.ConnectSupportsFeatureArgs
) -> structs.ConnectSupportsFeatureRet:
    if args.feature == remote_types.FEATURE_PROGRAM_KEEPALIVE:
        session.peer.start_keepalive()
    return structs.ConnectSupportsFeatureRet(int(args.feature in _FEATURES))


@handles(REMOTE, "CONNECT_OPEN", opened=False)
def connect_open(session: Session, args: structs.ConnectOpenArgs) -> None:
    errors.check_flags("virConnectOpenAuth", args.flags, libvirt.VIR_CONNECT_RO)
    if args.name is None:
        raise rpc_error.internal("connection not open")  # libvirtd's word for it
    if not session.daemon.serves(args.name):
        raise errors.error(libvirt.VIR_ERR_NO_CONNECT, args.name, domain=libvirt.VIR_FROM_NONE)
    who = session.peer.identity
    if not session.daemon.policy.admits(who):
        raise errors.error(
            libvirt.VIR_ERR_ACCESS_DENIED,
            f"{who} has not the permission 'read' on any domain",
            domain=libvirt.VIR_FROM_ACCESS,
        )
    session.open(read_only=bool(args.flags & libvirt.VIR_CONNECT_RO))


@handles(REMOTE, "CONNECT_CLOSE")
def connect_close(session: Session, args: None) -> None:
    session.end()


@handles(REMOTE, "CONNECT_REGISTER_CLOSE_CALLBACK")
def register_close_callback(session: Session, args: None) -> None:
    """The hypervisor's connection does not close before ours, so there is nothing to be told."""
    if session.wants_close_event:
        raise errors.error(libvirt.VIR_ERR_INTERNAL_ERROR, "A close callback is already registered")
    session.wants_close_event = True


@handles(REMOTE, "CONNECT_UNREGISTER_CLOSE_CALLBACK")
def unregister_close_callback(session: Session, args: None) -> None:
    session.wants_close_event = False


@handles(REMOTE, "CONNECT_GET_TYPE")
def get_type(session: Session, args: None) -> structs.TypeRet:
    return structs.TypeRet(ask(session, "virConnectGetType", "get_type"))


@handles(REMOTE, "CONNECT_GET_VERSION")
def get_version(session: Session, args: None) -> structs.ConnectGetVersionRet:
    return structs.ConnectGetVersionRet(ask(session, "virConnectGetVersion", "get_version"))


@handles(REMOTE, "CONNECT_GET_LIB_VERSION")
def get_lib_version(session: Session, args: None) -> structs.ConnectGetLibVersionRet:
    """Of the protocol that is spoken, where the driver is of no libvirt, or of a newer one: clients
    go by that."""
    oldest, newest = SPOKEN
    version = ask(session, "virConnectGetLibVersion", "get_lib_version")
    return structs.ConnectGetLibVersionRet(min(max(oldest, version), newest))


@handles(REMOTE, "CONNECT_GET_HOSTNAME")
def get_hostname(session: Session, args: None) -> structs.ConnectGetHostnameRet:
    return structs.ConnectGetHostnameRet(hostname(session))


def hostname(session: Session) -> str:
    """The first driver's host; ours, where it knows none."""
    get: Callable[[], str] = getattr(
        session.daemon.domains.first(), "get_hostname", socket.gethostname
    )
    return get()


@handles(REMOTE, "CONNECT_GET_URI")
def get_uri(session: Session, args: None) -> structs.ConnectGetUriRet:
    return structs.ConnectGetUriRet(session.daemon.uris[0])


@handles(REMOTE, "CONNECT_GET_CAPABILITIES")
def get_capabilities(session: Session, args: None) -> structs.ConnectGetCapabilitiesRet:
    document = ask(session, "virConnectGetCapabilities", "get_capabilities")
    return structs.ConnectGetCapabilitiesRet(document)


@handles(REMOTE, "NODE_GET_INFO")
def node_get_info(session: Session, args: None) -> structs.NodeGetInfoRet:
    model, *numbers = ask(session, "virNodeGetInfo", "node_get_info")
    chars = model.encode("utf-8", "surrogateescape")[:31]
    return structs.NodeGetInfoRet(chars.ljust(32, b"\0"), *numbers)


@handles(REMOTE, "NODE_GET_SECURITY_MODEL")
def node_get_security_model(session: Session, args: None) -> structs.NodeGetSecurityModelRet:
    model, doi = ask(session, "virNodeGetSecurityModel", "node_get_security_model")
    return structs.NodeGetSecurityModelRet(terminated(model), terminated(doi))


def terminated(text: str) -> bytes:
    """TEXT as a C string; nothing at all where it is empty."""
    return text.encode("utf-8", "surrogateescape") + b"\0" if text else b""
