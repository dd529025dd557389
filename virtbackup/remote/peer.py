# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is at the other end of a connection (virnetserverclient.c, virnetsocket.c)."""

import grp
import os
import pwd
import socket
import ssl
import threading

from virtbackup import access, runtime


class Peer:
    """The other end of a CONNECTED socket, in words and, once that is known, as a policy has it."""

    def __init__(self, connected: socket.socket, tls: bool = False) -> None:
        """TLS: it has yet to prove who it is. Errors: OSError where it is gone already."""
        self._lock = threading.Lock()
        self._identity: access.Identity | None = None
        self._credentials: tuple[int, int, int] | None = None
        if connected.family == socket.AF_UNIX:
            pid, uid, _ = self._credentials = runtime.peer_of(connected)
            self.address = f"process {pid} of user {uid}"
            """For logs."""
        else:
            name = connected.getpeername()
            self.address = f"{name[0]}:{name[1]}"
            self._identity = None if tls else access.Identity("tcp")

    @property
    def has_all_places(self) -> bool:
        """Whether nobody is to be protected from the peer: it is root, or who runs us."""
        return self._credentials is not None and self._credentials[1] in (0, os.geteuid())

    @property
    def who(self) -> object:
        """The same for all clients of one user or certificate, and for all by tcp; None: not known
        yet. Without a question to anybody."""
        return self._identity if self._credentials is None else self._credentials[1]

    def has_shaken_hands(self, connected: ssl.SSLSocket) -> None:
        """By tls: its certificate was checked."""
        self._identity = access.Identity("tls", common_name(connected))

    @property
    def identity(self) -> access.Identity:
        """It may take time to ask for a user's groups; then callers wait for each other."""
        with self._lock:
            if self._identity is None:
                assert self._credentials is not None
                _, uid, gid = self._credentials
                self._identity = user(uid, gid)
            return self._identity


def user(uid: int, gid: int) -> access.Identity:
    """A user with all groups, and that of the process, which is GID; one whom nobody knows is named
    by the number."""
    try:
        known = pwd.getpwuid(uid)
        gids = os.getgrouplist(known.pw_name, known.pw_gid)
    except KeyError:
        return access.Identity("unix", str(uid), frozenset({_group(gid)}))
    return access.Identity("unix", known.pw_name, frozenset(map(_group, [gid, *gids])))


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def common_name(connected: ssl.SSLSocket) -> str:
    """Of the other end's certificate; empty where it has none."""
    found = connected.getpeercert() or {}
    pairs = [pair for relative in found.get("subject", ()) for pair in relative]
    names = [pair[1] for pair in pairs if pair[0] == "commonName"]
    return str(names[-1]) if names else ""
