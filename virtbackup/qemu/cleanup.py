# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ending a backup for good: out of QEMU, its files removed, its status forgotten.

Used alike by a start that failed, a stop, backup-cleanup, a start that finds remains, and whoever
gives a backup up before it harms the guest.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import stat
import time
from collections.abc import Collection

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    block,
    blockjob,
    branches,
    dialect,
    domain,
    monitor_json,
    naming,
    nbdserver,
    scratch,
    status,
    sweep,
    verdict,
)

logger = logging.getLogger(__name__)
PATIENCE = 10.0
"""Seconds within which a scratch image must take a request, or its backup is not ended now."""
NBD_SERVER = "NBD server"
"""What the server is called among what is still there."""
_DYING = 1.0
"""Seconds for the kernel to close the sockets of a QEMU that was killed."""


def check_scratch(session: domain.Session, left: status.Status) -> None:
    """Raise VIR_ERR_OPERATION_TIMEOUT where a scratch image of LEFT hangs: if its backup were ended
    then, all of QEMU would stand still until it hangs no more."""
    if hung := verdict.hanging(session, left, PATIENCE):
        names = ", ".join(f"'{disk.target}'" for disk in left.disks if disk.target in hung)
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_TIMEOUT,
            f"the scratch image of disk {names} hangs, and all of the guest would wait for it if"
            " the backup were ended now: once its file system answers, or fails, try again",
        )


def clean(
    session: domain.Session,
    left: status.Status | None,
    file: status.StatusFile,
    sight: blockjob.Sight | None = None,
) -> tuple[list[str], list[str]]:
    """Take the backup LEFT out of QEMU, then its files; without a status, all that is ours by name.
    SIGHT: as ``take_out``.

    (A line for each thing done, what is still there.) Where not all of it could be taken out, the
    status stays, for the next clean to finish. Errors: as ``take_out``.
    """
    if left is not None and not left.server:
        # Before it is asked who listens: QEMU may have the socket and no server with it.
        sweeper_of(session, left).listener()
    if left is not None and _started_server(session, left):
        # Noted before it is cut off, as then it is no longer seen to listen.
        left = dataclasses.replace(left, server=True)
        file.save(left)
    removed, rest = take_out(session, left, sight)
    if left is not None and rest:
        sweep.left_logger.warning(
            "backup %s is not all out of QEMU, and backup-cleanup may end it: %s is left",
            left.id, ", ".join(rest),
        )  # fmt: skip
        removed += remove_files(left)
        file.save(dataclasses.replace(left, phase="stopping", told=True))
    elif left is not None:
        removed += forget(left, file)
    return removed, rest


def take_out(
    session: domain.Session, left: status.Status | None, sight: blockjob.Sight | None = None
) -> tuple[list[str], list[str]]:
    """Take the backup LEFT, or all that is ours by name, out of QEMU; a guest that was paused for
    an error of its disks goes on first of all, and one that comes to be meanwhile once the jobs are
    gone. (A line for each thing done, what is still there.) SIGHT is what QEMU shows at this
    moment, where it was just looked at, and at the scratch images.

    Errors, before anything is deleted: sweep.ClientStuck, ``check_scratch``'s.
    """
    if left is not None and sight is None:
        check_scratch(session, left)
    removed = []
    sweeper = sweeper_of(session, left)
    ours = left is not None and not session.restarted_since(left.qemu, left.id)
    replaced: list[status.DiskStatus] = []
    if left is not None and ours:
        now = sight or verdict.look_at(session, left)
        replaced = blockjob.replaced(left.disks, now)
        if blockjob.stopped_guest(left.disks, now):
            sweeper.stop_saving()
            removed += sweeper.jobs()
            removed += _go_on(session)
            sight = None
    known = sweeper.every_export() if sight is None or sight.exports is None else sight.exports
    sweeper.end_clients(known)
    exports = sweeper.exports(known)
    removed += exports
    server_left = False
    if _owns_server(session, left, bool(exports)):
        stopped_server, server_left = sweeper.server(known)
        removed += stopped_server
    removed += [*sweeper.frozen_disks(), *sweeper.jobs()]
    if left is not None and ours:
        removed += _go_on_at_last(session, left)
    removed += sweeper.scratch_images()
    removed += sweeper.credentials()
    removed += sweeper.fdsets()
    unguarded, guards = _remove_guards(session, left)
    joined, divided = _join_branches(session, left)
    removed += [*unguarded, *joined]
    if left is not None and ours:
        removed += _orphans(session, left, replaced, sweeper)
    rest = [NBD_SERVER] if server_left else []
    return removed, rest + sweeper.remaining() + guards + divided


def _remove_guards(
    session: domain.Session, left: status.Status | None
) -> tuple[list[str], list[str]]:
    """As ``branches.remove_guards``. QEMU is asked for its nodes only where those of LEFT are not
    where they were, or are in use."""
    if left is None:
        if not session.capabilities.guards(filtered=True):
            return [], []
    else:
        guards = [
            monitor_json.BitmapOf(node, naming.guard_bitmap(left.id, number))
            for number, disk in enumerate(left.disks)
            for node in disk.guards or ()
        ]
        is_known = all(disk.guards is not None for disk in left.disks)
        if is_known and not guards:
            return [], []
        if is_known and branches.remove(session, guards) is None:
            return list(map(str, guards)), []
        if not session.capabilities.guards(filtered=True):
            return [], []
    danger = domain.danger_of_named_nodes(session.qemu, session.capabilities)
    if danger is not None:
        return [], [f"bitmaps that keep disks from going back to a snapshot, as {danger}"]
    return branches.remove_guards(session, left.id if left else None)


def _join_branches(
    session: domain.Session, left: status.Status | None
) -> tuple[list[str], list[str]]:
    """As ``branches.roll_back``: what a stop that was good has not brought forward by now, is not
    to be."""
    if not session.capabilities.branches or (left is not None and left.branch is None):
        return [], []
    danger = domain.danger_of_named_nodes(session.qemu, session.capabilities)
    if danger is not None:
        return [], [f"bitmaps of a branch, as {danger}"]
    if left is None:
        return branches.roll_back(session, None)
    fork = left.advances if left.forks else None
    disown = left.cancelled or left.verdict != {}
    return branches.roll_back(session, left.id, disown, fork)


def _go_on_at_last(session: domain.Session, left: status.Status) -> list[str]:
    """Let a guest go on that was paused after the last look, as our jobs were about to end: nobody
    else will, as nobody is told of it."""
    if left.was_stopped or not _may_have_stopped(session):
        return []
    if not blockjob.stopped_guest(left.disks, verdict.look_at(session, left)):
        return []
    return _go_on(session)


def _may_have_stopped(session: domain.Session) -> bool:
    """Whether the guest may have, since we listen: where QEMU tells of that it is not asked."""
    if session.qemu.hears_events:
        return session.qemu.wait_event(lambda event: event.name == "STOP", 0) is not None
    return not domain.runs(session.qemu, session.capabilities)


def _go_on(session: domain.Session) -> list[str]:
    """Let the guest go on; the writes that failed are tried again then."""
    try:
        session.qemu.execute(monitor_json.cont())
    except monitor_json.CommandFailed as failure:
        logger.warning("the guest, paused by a disk error, cannot go on: %s", failure.desc)
        return []
    logger.warning("the guest was paused by a disk error during the backup; it goes on")
    return ["pause of the guest"]


def sweeper_of(session: domain.Session, left: status.Status | None) -> sweep.Sweeper:
    """What takes the backup LEFT, or all that is ours by name, out of QEMU."""
    if left is None:
        nameless = sweep.Sweeper(session.qemu, session.capabilities, None, session.pid)
        return nameless.seeking_server()
    inodes = frozenset(disk.inode for disk in left.disks if disk.inode is not None)
    return sweep.Sweeper(
        session.qemu, session.capabilities, left.id, session.pid, (left.address,), inodes
    )


def forget(left: status.Status, file: status.StatusFile) -> list[str]:
    """Forget a backup of which nothing is in QEMU (any more); a line for each thing removed."""
    removed = remove_outside(left)
    file.remove()
    return removed


def remove_outside(left: status.Status) -> list[str]:
    """Remove the files of a backup that a QEMU which is gone has left; a line for each. It is
    warned of the scratch images that cannot be."""
    removed = remove_files(left)
    address = left.address
    if isinstance(address, backup_conf.UnixAddress) and _left_socket(left, address):
        path = address.path
        if scratch.remove(path):
            removed.append(f"socket '{path}'")
    return removed


def remove_files(left: status.Status) -> list[str]:
    """Remove the scratch images that have a name; a line for each. It is warned of those that
    cannot be."""
    removed = [f"scratch image '{path}'" for path in _paths(left) if scratch.remove(path)]
    for path in _paths(left):
        sweep.left_logger.warning(
            "scratch image '%s' of backup %s cannot be removed, and is left", path, left.id
        )
    return removed


def with_files_left(left: status.Status) -> status.Status:
    """LEFT with the names of those of its scratch images alone that could not be removed: whoever
    comes next tries it again."""
    there = _paths(left)
    disks = (
        disk if disk.path in there else dataclasses.replace(disk, path=None) for disk in left.disks
    )
    return dataclasses.replace(left, disks=tuple(disks))


def _paths(left: status.Status) -> list[str]:
    """Where scratch images of LEFT are that have a name."""
    return [
        disk.path for disk in left.disks
        if disk.path is not None and os.path.lexists(disk.path) and _is_image_of(disk)
    ]  # fmt: skip


def _is_image_of(disk: status.DiskStatus) -> bool:
    """Whether what lies at the path of DISK's scratch image is that, and nothing of the user's."""
    path = pathlib.Path(str(disk.path))
    if naming.backup_of(path.stem):
        return True
    # The number does not tell: a FUSE file system may give the file another one.
    if scratch.has_mark(str(path), disk.scratch_file):
        return True
    if disk.inode is None:  # the start did not come to note it
        return scratch.is_unused_image(str(path), disk.size)
    try:
        if path.lstat().st_ino != disk.inode:
            return False
    except OSError:
        return False
    # The number may have been given to another file, once this one was gone.
    return scratch.is_image(str(path), disk.size)


def socket_inode(address: backup_conf.Address) -> int | None:
    """Which socket lies at a unix address; None for none, and for other addresses."""
    if isinstance(address, backup_conf.UnixAddress):
        with contextlib.suppress(OSError):
            found = pathlib.Path(address.path).lstat()
            return found.st_ino if stat.S_ISSOCK(found.st_mode) else None
    return None


def _left_socket(left: status.Status, address: backup_conf.UnixAddress) -> bool:
    """Whether what lies at ADDRESS is the socket of LEFT's server, which has ended."""
    here = socket_inode(address)
    if here is None or left.server is False:
        return False
    # Where the start did not come to note it, it had found nobody who listened there.
    is_own = left.server is None if left.socket is None else here == left.socket
    # Another server's may have been given the same number since.
    return is_own and is_abandoned(address)


def is_abandoned(address: backup_conf.Address) -> bool:
    """Whether nobody listens on ADDRESS, or soon does no more: the kernel may take its time with a
    dead QEMU's."""
    end = time.monotonic() + _DYING
    while nbdserver.answers(address):
        if time.monotonic() > end:
            return False
        nbdserver.pause()
    return True


def _orphans(
    session: domain.Session,
    left: status.Status,
    replaced: Collection[status.DiskStatus],
    sweeper: sweep.Sweeper,
) -> list[str]:
    """Delete the nodes of disks that were unplugged during the backup, and of those REPLACED by
    another. Who unplugs a disk deletes its nodes, and was refused that while our job used them;
    they would keep their images locked."""
    caps = session.capabilities
    if not caps.devices or not caps.block_graph:
        return []
    found = block.parse_block(session.qemu.execute(monitor_json.query_block()))
    drives = {disk.qom_path for disk in found}
    unplugged = [disk for disk in left.disks if disk.device and disk.device not in drives]
    removed = []
    for disk in (*unplugged, *replaced):
        todo = [disk.node]
        while todo:
            node = todo.pop()
            graph = block.parse_graph(session.qemu.execute(monitor_json.query_block_graph()))
            # A node without a name of the user's goes with the one over it.
            if node.startswith("#") or not graph.is_unused(node):
                continue
            todo += sorted(graph.children_of(node))
            if sweeper.delete_node(node):
                removed.append(f"node '{node}' of disk '{disk.target}', which was unplugged")
    return removed


def _owns_server(session: domain.Session, left: status.Status | None, had_exports: bool) -> bool:
    """Whether an NBD server that runs is ours to stop, if nobody else exports on it."""
    if left is None:
        return session.capabilities.block_exports and had_exports
    if not session.capabilities.block_exports:
        return still_serves(session, left)
    return bool(left.server) and not session.restarted_since(left.qemu, left.id)


def still_serves(session: domain.Session, left: status.Status) -> bool:
    """Whether the NBD server that LEFT started still listens, as far as can be seen: where exports
    cannot be asked for, all that tells whether somebody stopped it."""
    if not left.server or session.restarted_since(left.qemu, left.id):
        return False
    return session.pid is None or nbdserver.listens(session.pid, left.address)


def _started_server(session: domain.Session, left: status.Status) -> bool:
    """Whether a start that came to no end had the NBD server started: who would listen there?"""
    if left.server is not None or session.restarted_since(left.qemu, left.id):
        return False
    # Once this is answered, QEMU has done all that it was told before.
    session.qemu.execute(dialect.Dialect(session.capabilities).query_jobs())
    return nbdserver.listens(session.pid or os.getpid(), left.address)
