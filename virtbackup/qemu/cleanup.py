# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ending a backup for good: out of QEMU, its files removed, its status forgotten.

Used alike by a start that failed, a stop, backup-cleanup, and a start that finds remains.
"""

import contextlib
import dataclasses
import os
import pathlib
import stat

from virtbackup.conf import backup_conf
from virtbackup.qemu import domain, monitor_json, nbdserver, scratch, status, sweep


def clean(
    session: domain.Session, left: status.Status | None, file: status.StatusFile
) -> list[str]:
    """Take the backup LEFT out of QEMU, then its files; without a status, all that is ours by name.

    A line for each thing removed. Where the NBD server could not be stopped, the status stays, for
    the next clean to finish.
    """
    sweeper = sweep.Sweeper(session.qemu, session.capabilities, left.id if left else None)
    removed = sweeper.exports()
    server_left = False
    if _owns_server(session, left, bool(removed)):
        server_left = not sweeper.server(session.pid, _address(left) if left else None)
        removed += [] if server_left else ["NBD server"]
    removed += [*sweeper.jobs(), *sweeper.nodes(), *sweeper.fdsets()]
    if left is not None and server_left:
        removed += _remove_files(left)
        file.save(dataclasses.replace(left, phase="stopping", disks=()))
    elif left is not None:
        removed += forget(left, file)
    return removed


def forget(left: status.Status, file: status.StatusFile) -> list[str]:
    """Remove the files of a backup of which nothing is in QEMU (any more)."""
    removed = _remove_files(left)
    address = _address(left)
    # Not by asking whether anybody listens: the kernel may take its time with a dead QEMU's.
    here = socket_inode(address)
    if isinstance(address, backup_conf.UnixAddress) and here is not None and here == left.socket:
        pathlib.Path(address.path).unlink(missing_ok=True)
        removed.append(f"socket '{address.path}'")
    file.remove()
    return removed


def socket_inode(address: backup_conf.Address) -> int | None:
    """Which socket lies at a unix address; None for none, and for other addresses."""
    if isinstance(address, backup_conf.UnixAddress):
        with contextlib.suppress(OSError):
            found = pathlib.Path(address.path).lstat()
            return found.st_ino if stat.S_ISSOCK(found.st_mode) else None
    return None


def _owns_server(session: domain.Session, left: status.Status | None, had_exports: bool) -> bool:
    """Whether an NBD server runs that is ours to stop: nobody else may export on it."""
    reply = session.qemu.execute(monitor_json.query_block_exports())
    if any(export.type == "nbd" for export in monitor_json.parse_exports(reply).values()):
        return False
    if left is None:
        return had_exports
    if left.server is False or session.restarted_since(left.qemu):
        return False
    return left.server or nbdserver.listens(session.pid or os.getpid(), _address(left))


def _address(of: status.Status) -> backup_conf.Address:
    return backup_conf.BackupDef.parse(of.definition).address


def _remove_files(left: status.Status) -> list[str]:
    paths = [disk.path for disk in left.disks if disk.path is not None]
    return [f"scratch image '{path}'" for path in paths if scratch.remove(path)]
