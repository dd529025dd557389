# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verdict on a backup, so far or at its end: by what QEMU shows, and by trying to read."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from virtbackup import config, errors
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    block,
    blockjob,
    capabilities,
    domain,
    hang,
    monitor_json,
    naming,
    nbdserver,
    probe,
    qcow2,
    scratch,
    status,
)

if TYPE_CHECKING:
    from virtbackup.conf import virtbackup_conf
    from virtbackup.nbd import connection

logger = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds within which a scratch image must take a request, or ``look`` says that it hangs."""


def look(session: domain.Session, running: status.Status) -> backup_conf.BackupInfo:
    """The verdict so far, and what is known of the scratch images where it is safe to ask."""
    caps = session.capabilities
    sight = look_at(session, running)
    hung = hanging(session, running, PATIENCE)
    if not hung:
        sight = with_nodes(session, running, sight)
        sight = dataclasses.replace(sight, unreadable=_seen_by_client(session, running, sight))
    reasons = judge(session, running, sight)
    if hung:
        return info(running, reasons, hung=hung)
    # Where it may kill QEMU to be asked, it is not, as far as the files themselves tell.
    used = {} if caps.named_nodes_are_always_safe else hang.used(_images(running), session.pid)
    thresholds: Mapping[naming.NodeName, int] = {}
    backups_end = capabilities.NAMED_NODES_CRASH.affects(caps.version)
    told = backups_end or len(used) == len(running.disks) or sight.closed is not None
    if not told and domain.named_nodes_are_safe(session.qemu, caps):
        # Of none does QEMU tell where it has closed an image, as that of a disk that is left out.
        asked = monitor_json.query_named_block_nodes(caps.flat_nodes)
        [told_nodes] = session.qemu.execute_each([asked])
        nodes = [] if isinstance(told_nodes, monitor_json.CommandFailed) else told_nodes
        thresholds = block.parse_write_thresholds(nodes)
        sizes = block.parse_actual_sizes(nodes)
        used = {
            disk.target: sizes[disk.scratch_file]
            for disk in running.disks
            if disk.scratch_file in sizes
        }
    return info(running, reasons, used, thresholds)


def hanging(session: domain.Session, running: status.Status, limit: float) -> frozenset[str]:
    """The disks whose scratch image has not taken a request for LIMIT seconds: QEMU would stand
    still if it were to look at the image, or to wait for the guest's writes."""
    if session.restarted_since(running.qemu, running.id):
        return frozenset()
    return hang.hanging(_images(running), session.pid, limit)


def _images(running: status.Status) -> dict[str, hang.Image]:
    """Disk -> its scratch image."""
    return {disk.target: hang.Image(disk.directory, disk.inode) for disk in running.disks}


def look_at(session: domain.Session, running: status.Status) -> blockjob.Sight:
    """What has become of the backup RUNNING, the reading of frozen disks not tried."""
    sight = domain.look(session.qemu, session.capabilities)
    return dataclasses.replace(sight, io_error=sight.io_error and not running.was_stopped)


def with_nodes(
    session: domain.Session, running: status.Status, sight: blockjob.Sight, is_last: bool = False
) -> blockjob.Sight:
    """SIGHT with every node where those tell what has become of a disk's backing images, and it is
    safe to ask. No scratch image may hang. What cannot be told so is left to the verdict that
    IS_LAST, which waits for it to be safe, and else says why it is not."""
    if not any(blockjob.needs_nodes(disk, sight) for disk in running.disks):
        return sight
    qemu, caps = session.qemu, session.capabilities
    if not (is_last or domain.named_nodes_are_safe(qemu, caps)):
        return sight
    nodes = domain.told_nodes(qemu, caps)
    if isinstance(nodes, str):
        return dataclasses.replace(sight, nodes_untold=nodes) if is_last else sight
    return dataclasses.replace(sight, nodes=nodes)


def _seen_by_client(
    session: domain.Session, running: status.Status, sight: blockjob.Sight
) -> dict[naming.NodeName, str]:
    """The frozen disks that broke unseen, as an NBD client sees it: nothing in QEMU has to wait for
    that, as it does for ``unreadable``. What cannot be told so is left to the stop."""
    disks = [disk for _, disk in _may_have_broken(running, sight)]
    address = running.address
    if not disks or not nbdserver.is_reached(session.pid, address):
        return {}
    try:
        from virtbackup.nbd import connection  # libnbd, of which few calls have need
    except ImportError:
        return {}
    match address:
        case backup_conf.IpAddress():
            server: str | tuple[str, int] = address.endpoint
        case backup_conf.UnixAddress(path):
            server = path
    tls = None
    if address.tls:
        try:
            tls = _client(config.load().credentials())
        except errors.Error as failure:
            logger.debug("no client of an export with TLS: %s", failure)
            return {}
    broken = {}
    end = time.monotonic() + PATIENCE
    with contextlib.suppress(errors.Error):  # the next could not be told either
        for disk in disks:
            assert disk.access is not None
            export = connection.Export(server, disk.exportname, tls)
            if reason := connection.unreadable(export, end - time.monotonic()):
                broken[disk.access] = reason
    return broken


def _client(credentials: "virtbackup_conf.Credentials") -> "connection.Tls":
    """Who the server is, is known: what it shows is looked at, and nothing is told to it."""
    from virtbackup.conf import virtbackup_conf
    from virtbackup.nbd import connection

    match credentials:
        case virtbackup_conf.X509() as x509:
            return connection.Tls(certificates=x509.client_directory, verify=False)
        case virtbackup_conf.Psk() as psk:
            return connection.Tls(psk_file=psk.file, username=psk.username)


def _may_have_broken(
    running: status.Status, sight: blockjob.Sight
) -> Iterator[tuple[int, status.DiskStatus]]:
    """The disks, with their numbers, that may have broken without a sign of it and can be read."""
    for number, disk in enumerate(running.disks):
        unseen = disk.breaks_snapshot and not blockjob.job_reason(sight.jobs.get(disk.job))
        if unseen and disk.access is not None and disk.size:
            yield number, disk


def unreadable(
    session: domain.Session, running: status.Status, sight: blockjob.Sight
) -> dict[naming.NodeName, str]:
    """The frozen disks that broke unseen, by trying to read them: no job and no event tells. QEMU
    waits for all requests with that, so nobody may read from them, nor a scratch image hang."""
    broken = {}
    for number, disk in _may_have_broken(running, sight):
        assert disk.access is not None
        node = naming.probe_node(running.id, number)
        if reason := probe.read(session.qemu, disk.access, node):
            broken[disk.access] = reason
    return broken


def unwritten(session: domain.Session, running: status.Status) -> dict[str, str]:
    """Disk -> why its scratch image has lost data, now that nobody reads it any more."""
    if session.restarted_since(running.qemu, running.id):
        return {}
    return hang.unwritten(_images(running), session.pid)


def judge(session: domain.Session, running: status.Status, sight: blockjob.Sight) -> dict[str, str]:
    """Disk -> why its data is not good."""
    if running.given_up is not None:
        return of_all(running, running.given_up)
    if session.restarted_since(running.qemu, running.id):
        return of_all(running, "the domain was restarted")
    if running.phase != "running":
        return of_all(running, f"the process that was {running.phase} it did not come to an end")
    return _unguarded(session.capabilities, running) | blockjob.judge(running.disks, sight)


def _unguarded(caps: capabilities.Capabilities, running: status.Status) -> dict[str, str]:
    """Disk -> that nobody knows what an older version, which began the backup, did not note. That
    one guarded every disk where QEMU needs it of all, but not where of some."""
    if caps.guards(filtered=False) or not caps.guards(filtered=True):
        return {}
    return {
        disk.target: "an older version of virtbackup began the backup, and did not note whether the"
        " disk was kept from going back to a snapshot"
        for disk in running.disks
        if disk.guards is None
    }


def of_all(running: status.Status, reason: str) -> dict[str, str]:
    return {disk.target: reason for disk in running.disks}


def info(
    running: status.Status,
    reasons: Mapping[str, str],
    used: Mapping[str, int] | None = None,
    thresholds: Mapping[naming.NodeName, int] | None = None,
    hung: Collection[str] = (),
) -> backup_conf.BackupInfo:
    """As backupGetInfo tells it. USED: disk -> bytes of its scratch image; THRESHOLDS: a scratch
    file's node -> its write threshold, 0 once it was passed; HUNG are disks whose scratch image
    hangs. Each as far as it is known."""
    breaks = all(disk.breaks_snapshot for disk in running.disks)
    return backup_conf.BackupInfo(
        state="failed" if reasons else "running",
        started=running.started,
        address=running.address,
        engine=running.engine,
        id=running.id,
        branch=running.branch,
        scratch_failure="backup" if breaks else "guest",
        save_failure=running.save_failure,
        save_reason=running.save_reason,
        disks=tuple(
            backup_conf.DiskInfo(
                name=disk.target,
                export=disk.exportname,
                state="failed" if disk.target in reasons else "running",
                reason=reasons.get(disk.target),
                capacity=disk.size,
                type=disk.type,
                type_reason=disk.type_reason,
                since=_since(disk),
                dirty=disk.branch.dirty if disk.branch else None,
                scratch_used=(used or {}).get(disk.target),
                scratch_worst_case=qcow2.full_size(disk.size),
                scratch_free=None if hung else _free(disk.directory),
                scratch_hangs=disk.target in hung,
                warning=_warning(
                    disk,
                    (used or {}).get(disk.target),
                    (thresholds or {}).get(disk.scratch_file),
                    disk.target in hung,
                ),
            )
            for disk in running.disks
        ),
    )


def _since(disk: status.DiskStatus) -> backup_conf.Point | None:
    point = disk.branch.since if disk.branch else None
    return None if point is None else backup_conf.Point(point.backup, point.time)


def _warning(
    disk: status.DiskStatus, used: int | None, threshold: int | None, hangs: bool
) -> str | None:
    """Words about a scratch image that hangs or might fill its file system; QEMU's THRESHOLD is 0
    once the image has outgrown it."""
    if hangs:
        return (
            f"its scratch image in '{disk.directory}' hangs, and the guest's writes with it, until"
            " that file system answers again"
        )
    if disk.threshold is None:
        return None
    worst = (
        f"if the guest overwrites the whole disk, its scratch image in '{disk.directory}' does not"
        " fit"
    )
    if threshold == 0 or (used or 0) > disk.threshold:
        return f"the scratch image has grown beyond {disk.threshold} bytes; {worst}"
    return worst


def _free(directory: str) -> int | None:
    try:
        return scratch.free_bytes(directory)
    except OSError:
        return None
