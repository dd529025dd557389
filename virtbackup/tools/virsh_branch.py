# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands about branches, the lines of incremental backups."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from virtbackup.tools import virsh_connection, vsh

if TYPE_CHECKING:  # at run time where they are used, or help would wait for them
    import virtbackup
    from virtbackup.conf import backup_conf

GROUP = vsh.Group("branch", "Branch")


def _list(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    domain = virsh_connection.domain(shell, args)
    branches = domain.branchList()
    if args.flag("json"):
        facts = {"domain": domain.name(), "branches": list(map(_facts, branches))}
        shell.print_json(facts)
        return
    size = virsh_connection.human_size
    shell.print_table(
        ("Branch", "Disk", "Granularity", "Dirty", "Persistent", "Last point", "State"),
        [
            (
                branch.name,
                disk.name,
                size(disk.granularity),
                size(disk.dirty),
                "yes" if disk.persistent else "no",
                _when(disk.point),
                _state(branch, disk),
            )
            for branch in branches
            for disk in branch.disks
        ],
    )
    for branch in branches:
        for disk in branch.disks:
            if disk.note and not branch.foreign:
                shell.warn(f"branch '{branch.name}', disk '{disk.name}': {disk.note}")


def _when(point: "backup_conf.Point | None") -> str:
    if point is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(point.time))


def _state(branch: "backup_conf.Branch", disk: "backup_conf.BranchDisk") -> str:
    if branch.foreign:
        return "foreign"
    return "sound" if disk.reason is None else f"not sound: {disk.reason}"


def _facts(branch: "backup_conf.Branch") -> dict[str, object]:
    return {
        "name": branch.name,
        "foreign": branch.foreign,
        "disks": [
            {
                "name": disk.name,
                "granularity": disk.granularity,
                "dirty": disk.dirty,
                "persistent": disk.persistent,
                "sound": disk.sound and not branch.foreign,
                "reason": disk.reason,
                "point": point_facts(disk.point),
                "note": disk.note,
            }
            for disk in branch.disks
        ],
    }


def point_facts(point: "backup_conf.Point | None") -> dict[str, object] | None:
    """A point, for JSON."""
    return None if point is None else {"id": point.id, "time": point.time}


def _create(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.tools import interrupt

    domain = virsh_connection.domain(shell, args)
    with interrupt.held():
        domain.branchCreate(args.text("branch"))
    _tell_done(shell, args, domain, "created")


def _delete(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.tools import interrupt

    domain = virsh_connection.domain(shell, args)
    with interrupt.held():
        domain.branchDelete(args.text("branch"))
    _tell_done(shell, args, domain, "deleted")


def _tell_done(
    shell: virsh_connection.Shell, args: vsh.Args, domain: "virtbackup.Domain", done: str
) -> None:
    name = args.text("branch")
    if args.flag("json"):
        shell.print_json({"domain": domain.name(), done: name})
    else:
        shell.extra(f"Branch {name} {done}")


def _complete(shell: virsh_connection.Shell, args: vsh.Args, text: str) -> Iterable[str]:
    """The branches of the domain."""
    if not args.flag("domain"):
        return []
    branches = virsh_connection.domain(shell, args).branchList()
    return [branch.name for branch in branches if not branch.foreign]


BRANCH = vsh.Option("branch", vsh.Kind.STRING, "branch of incremental backups", completer=_complete)

COMMANDS = (
    vsh.Command(
        "branch-create", GROUP.keyword, "Begin a branch of incremental backups",
        "Begin a branch on every writable disk without a backup: its first incremental backup has\n"
        "what changes from now on, so there should be a copy of the disks as they are now.",
        (
            virsh_connection.DOMAIN,
            vsh.Option("branch", vsh.Kind.DATA, "name of the branch", required=True),
            virsh_connection.JSON,
        ),
        _create,
    ),
    vsh.Command(
        "branch-delete", GROUP.keyword, "Forget a branch of incremental backups",
        "Remove a branch from every disk; its next backup is a full one.",
        (
            virsh_connection.DOMAIN,
            vsh.Option(
                "branch", vsh.Kind.DATA, "name of the branch", required=True, completer=_complete
            ),
            virsh_connection.JSON,
        ),
        _delete,
    ),
    vsh.Command(
        "branch-list", GROUP.keyword, "List the branches of incremental backups",
        "List the branches disk by disk: what has changed since the last good backup, and whether\n"
        "the next one can be incremental. Dirty bitmaps of others are shown as foreign.",
        (virsh_connection.DOMAIN, virsh_connection.JSON),
        _list,
    ),
)  # fmt: skip
