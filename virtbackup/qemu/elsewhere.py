# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups of the same QEMU over another monitor of it, or over libvirt, by their status files.

Each way to a QEMU has a file and a lock of its own. Errors, of each check:
VIR_ERR_OPERATION_INVALID.
"""

import pathlib
from collections.abc import Iterator

import libvirt

from virtbackup import errors
from virtbackup.qemu import backup, naming, status


def check_none(own: pathlib.Path, state: backup.BlockState) -> None:
    """Refuse while one runs, or is just started or ended, in the QEMU that STATE shows; OWN is the
    status file of the monitor that is asked."""
    shown = state.backups()
    for file, kept in status.of_other_versions_in(own.parent) if shown else ():
        if file != own and kept.id in shown:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID,
                f"{kept}: it is of another monitor of this QEMU, over which it is ended; where"
                f" there is no such monitor any more, remove '{file}' first",
            )
    for file, other in _running(own, state):
        raise _runs(file, other)


def check_none_begins(own: pathlib.Path, state: backup.BlockState, branch: str) -> None:
    """The same of one that is to begin BRANCH, which is not there yet, or to be its next point."""
    for file, other in _running(own, state):
        if other.advances == branch:
            raise _runs(file, other)


def has_status_of(directory: pathlib.Path, id: naming.BackupId | None) -> bool:
    """Whether there is a status of backup ID, whoever was at it."""
    return any(other.id == id for _, other in status.all_in(directory))


def _running(
    own: pathlib.Path, state: backup.BlockState
) -> Iterator[tuple[pathlib.Path, status.Status]]:
    shown, traces = state.backups(), state.traces()
    for file, other in status.all_in(own.parent) if traces else ():
        if other.phase == "running":
            is_theirs = other.id in shown and status.has_owner(file, other.owner)
        else:
            is_theirs = other.id in traces and status.is_locked(file)
        if file != own and is_theirs:
            yield file, other


def _runs(file: pathlib.Path, other: status.Status) -> errors.Error:
    return errors.error(
        libvirt.VIR_ERR_OPERATION_INVALID,
        f"backup {other.id} runs by another monitor of this QEMU, and backup-stop over that one"
        f" ends it; where there is no such monitor any more, remove '{file}' first",
    )
