# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running a plan, step by step, without deciding anything (the patch's qemuDomainBackupStart).

The caller undoes a run that fails, by a sweep; a step here only does.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import pwd
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import libvirt

from virtbackup import errors, runtime
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    backup,
    block,
    blockjob,
    domain,
    listener,
    monitor,
    monitor_json,
    naming,
    nbdserver,
    qcow2,
    scratch,
    watch,
)

logger = logging.getLogger(__name__)


_SHARED = 'Failed to get shared "write" lock'
"""Of a file that somebody else has locked as one that he writes to."""


class ServerRefused(errors.Error):
    """QEMU did not start the NBD server, by its own words."""

    def __init__(self, code: int, text: str, detail: str) -> None:
        super().__init__(code, text % detail, strings=(text, detail, None))


class PortTaken(ServerRefused):
    """Somebody else has the port that was free when it was picked."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a plan, its NBD server on LISTENER; BY_FD says how scratch images are handed over,
    THRESHOLDS how large each disk's may grow until QEMU takes a note."""

    session: domain.Session
    plan: backup.BackupPlan
    listener: listener.Listener
    by_fd: bool
    thresholds: Mapping[str, int]
    images: list[watch.Image]
    """The scratch images that may grow, so far; the descriptors are the caller's to close."""
    created: list[str] = dataclasses.field(default_factory=list)
    """Files with a name that this run has made, so far."""
    inodes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Disk -> the inode of its scratch image, so far."""

    @property
    def qemu(self) -> monitor.Monitor:
        return self.session.qemu

    def server(self) -> None:
        """Start the NBD server: first of all, as it is the step another user of QEMU refuses.

        Errors: VIR_ERR_OPERATION_INVALID when somebody else has started it, else
        VIR_ERR_OPERATION_FAILED with the address; ServerRefused where it is sure that it was not,
        PortTaken where another port may do.
        """
        try:
            self._start_server()
        except BaseException:
            self.listener.withdraw()
            raise
        finally:
            self.listener.close()

    def check_server(self) -> None:
        """Raise VIR_ERR_OPERATION_FAILED where nobody listens, though QEMU says so, or as somebody
        has put the server elsewhere before the exports came to it. Of a process that is not seen to
        be QEMU, its word is taken: one that only passes the monitor on may have another network,
        and a recording listens nowhere."""
        pid, address = self.session.pid, self.plan.address
        if pid is None or runtime.name_of_qemu(pid) is None:
            return
        if listener.same_network(pid) and nbdserver.is_taken(address):
            return
        if not (nbdserver.listens(pid, address) or nbdserver.answers(address)):
            where = nbdserver.describe(address)
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_FAILED, f"the NBD server does not listen on {where}"
            )

    def _start_server(self) -> None:
        try:
            for command in self.plan.server_commands(self.listener.fd):
                self.qemu.execute(command)
        except monitor_json.CommandFailed as failure:
            if failure.command.execute == "object-add":
                assert self.plan.credentials is not None
                raise ServerRefused(
                    libvirt.VIR_ERR_OPERATION_FAILED,
                    "operation failed: %s",
                    f"QEMU cannot use the TLS credentials in '{self.plan.credentials.directory}':"
                    f" {failure.desc}{self._who_qemu_is()}",
                ) from failure
            if failure.desc == "NBD server already running":
                raise ServerRefused(
                    libvirt.VIR_ERR_OPERATION_INVALID,
                    "Requested operation is not valid: %s",
                    "the domain's NBD server is already in use by another job or client",
                ) from failure
            where = nbdserver.describe(self.plan.address)
            address = self.plan.address
            path = address.path if isinstance(address, backup_conf.UnixAddress) else ""
            detail = f"cannot listen on {where}: {self._words(failure, os.path.dirname(path))}"  # noqa: PTH120
            if failure.desc.startswith("Failed to "):  # find a port, bind a socket
                picked = isinstance(address, backup_conf.IpAddress) and address.picks_port
                taken = picked and failure.desc.endswith(os.strerror(errno.EADDRINUSE))
                kind = PortTaken if taken else ServerRefused
                raise kind(
                    libvirt.VIR_ERR_OPERATION_FAILED, "operation failed: %s", detail
                ) from failure
            raise errors.error(libvirt.VIR_ERR_OPERATION_FAILED, detail) from failure

    def _words(self, failure: monitor_json.CommandFailed, directory: str) -> str:
        """A refusal; where QEMU may not do something, who it is, and where it finds no DIRECTORY
        that there is, why."""
        if os.strerror(errno.EACCES) in failure.desc:
            return failure.desc + self._who_qemu_is()
        if os.strerror(errno.ENOENT) in failure.desc and os.path.isdir(directory):  # noqa: PTH112
            seen = f"'{directory}' is there, but not where QEMU runs: in another mount namespace"
            return f"{failure.desc} ({seen})"
        return failure.desc

    def _who_qemu_is(self) -> str:
        """To be said behind a refusal; empty where QEMU is no other user than we, as far as is
        known."""
        uid = self.qemu.peer_uid()
        return "" if uid in (None, os.geteuid()) else f" (QEMU runs as user {_user(uid)})"

    def scratch_images(self) -> None:
        """Make every disk's scratch image and open it over the live disk."""
        for disk in self.plan.disks:
            try:
                with self._scratch_file(disk) as (filename, give_up):
                    self.qemu.execute_all([*self._scratch_commands(disk, filename), *give_up])
            except monitor_json.CommandFailed as failure:
                self._check_unchanged(failure)
                words = self._words(failure, scratch.place(disk.source))
                raise _of_disk(disk.target, failure, words) from failure

    def _scratch_commands(self, disk: backup.DiskPlan, filename: str) -> list[monitor_json.Command]:
        commands = [self.plan.scratch_command(disk, filename)]
        if (threshold := self.thresholds.get(disk.target)) is not None:
            commands.append(monitor_json.block_set_write_threshold(disk.scratch_file, threshold))
        return commands

    def freeze(self) -> None:
        """The instant: one transaction for all disks."""
        try:
            self.qemu.execute(self.plan.transaction())
        except monitor_json.CommandFailed as failure:
            self._check_unchanged(failure)
            if _SHARED in failure.desc:
                raise self._shared() from failure
            for disk in self.plan.disks:
                names = [disk.node, disk.job, *([disk.step.node] if disk.step else [])]
                if any(f"'{name}'" in failure.desc for name in names):
                    raise _of_disk(disk.target, failure) from failure
            raise

    def _shared(self) -> errors.Error:
        """That another node or another QEMU has a disk's image open, too, which may write to it: it
        can be one alone whose device lets it."""
        disks = [disk for disk in self.plan.disks if self._lets_others_write(disk)]
        names = " or ".join(f"'{disk.target}'" for disk in disks or self.plan.disks)
        return errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            f"the image of disk {names} is open for writing elsewhere, too (share-rw), by another"
            " guest or as another disk of this one: what is written there would be missing in the"
            " backup",
        )

    def _lets_others_write(self, disk: backup.DiskPlan) -> bool:
        if disk.device is None:
            return False
        try:
            return self.qemu.execute(monitor_json.qom_get(disk.device, "share-rw")) is True
        except monitor_json.CommandFailed:
            return False

    def _check_unchanged(self, refusal: monitor_json.CommandFailed) -> None:
        """Say it, in place of a REFUSAL of QEMU's, where a drive is not what the plan has seen: its
        words do not tell, and may name a node that is none of the plan's.

        Errors: VIR_ERR_OPERATION_FAILED, those of ``backup.check_owned``.
        """
        self._check_below(refusal)
        if not self.session.capabilities.devices:
            return
        graph = self._graph() if self.session.capabilities.block_graph else None
        drives = self._drives(self.qemu.execute(monitor_json.query_block()))
        there = {disk.target for disk, _, _ in drives}
        for disk in self.plan.disks:
            if disk.device and disk.target not in there:
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_FAILED,
                    f"disk '{disk.target}' was unplugged, or its medium removed, as the backup"
                    " began",
                ) from refusal
        for disk, drive, medium in drives:
            if medium.driver in block.FILTERS and medium.node != disk.node:
                continue  # it need not be the disk's own
            if medium.node != disk.node:
                raise _other_image(disk, medium.node) from refusal
            backup.check_owned(drive, graph)
            if medium.size != disk.size:
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_FAILED,
                    f"disk '{disk.target}' was resized from {disk.size} to {medium.size} bytes as"
                    " the backup began",
                ) from refusal

    def _drives(self, told: Any) -> list[tuple[backup.DiskPlan, block.Disk, block.Medium]]:
        """Of each disk its drive, by what was TOLD of all, and what is in it. Those that were
        unplugged, or whose medium was removed, are not there: the stop tells of them."""
        drives = {drive.qom_path: drive for drive in block.parse_block(told)}
        return [
            (disk, dataclasses.replace(drive, target=disk.target), drive.medium)
            for disk in self.plan.disks
            if disk.device and (drive := drives.get(disk.device)) and drive.medium
        ]

    def _graph(self) -> block.Graph:
        return block.parse_graph(self.qemu.execute(monitor_json.query_block_graph()))

    def check_media(self) -> None:
        """Refuse, after the instant, where a drive has another image at its root than the plan has
        seen: since it came there, by a snapshot, say, the guest has written past the one that was
        frozen, and that shows an earlier moment than the other disks. So may another QEMU have,
        where the drive was given away.

        Errors: VIR_ERR_OPERATION_FAILED, those of ``backup.check_owned``.
        """
        self._check_below()
        caps = self.session.capabilities
        if not caps.devices:
            self._check_nodes()
            return
        queries = [monitor_json.query_block()]
        if caps.block_graph and any(disk.filter is None for disk in self.plan.disks):
            # By its name the job's filter, which may be shown for the image, is not known.
            queries.append(monitor_json.query_block_graph())
        told = self.qemu.execute_all(queries)
        filtered = []
        for disk, drive, medium in self._drives(told[0]):
            backup.check_owned(drive, None)
            if medium.node in (disk.node, disk.filter):
                continue
            if medium.driver not in block.FILTERS:
                raise _other_image(disk, medium.node)
            filtered.append((disk, drive, medium.node))
        # Of those with a filter that need not be our job's, or not that alone: whether there are
        # only filters over what was frozen.
        if not filtered or not caps.block_graph:
            return
        graph = block.parse_graph(told[1]) if told[1:] else self._graph()
        for disk, drive, root in filtered:
            if not graph.is_filtered(root, disk.node):
                raise _other_image(disk, root)
            backup.check_owned(drive, graph)

    def _check_below(self, refusal: monitor_json.CommandFailed | None = None) -> None:
        """The same of an image below a filter that is the disk's own: it is frozen wherever it came
        from, but the bitmaps of its branch are on the one before, and miss what was written since.
        """
        below = [(disk, disk.step.node) for disk in self.plan.disks if disk.step]
        below = [(disk, image) for disk, image in below if image != disk.node]
        if not below:
            return
        graph = self._graph()
        for disk, image in below:
            if not graph.is_filtered(disk.node, image):
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_FAILED,
                    f"disk '{disk.target}' got another image as the backup began: '{image}', which"
                    f" has the bitmaps of its branch, is not the one below '{disk.node}' any more",
                ) from refusal

    def _check_nodes(self) -> None:
        """The same where a disk is a node that no node is over: an overlay is, now."""
        graph = self._graph()
        for disk in self.plan.disks:
            for node in graph.nodes_over(disk.node):
                # QEMU names what is a job's own so, and whatever is given no name.
                if not node.startswith("#") and naming.backup_of(node) is None:
                    raise _other_image(disk, node)

    def changed(self) -> dict[str, int]:
        """Disk -> bytes changed since its branch's last point; after the instant, and only of disks
        whose changes are told."""
        told = {disk.target: disk.step for disk in self.plan.disks if disk.since and disk.step}
        caps = self.plan.dialect.caps
        if not told or not domain.named_nodes_are_safe(self.qemu, caps):
            return {}
        sizes = {disk.target: disk.size for disk in self.plan.disks}
        asked = monitor_json.query_named_block_nodes(caps.flat_nodes)
        nodes = block.parse_named_nodes(self.qemu.execute(asked))
        return {
            target: min(bitmap.count, sizes[target])  # the last bit may be beyond the end
            for target, step in told.items()
            if step.node in nodes and (bitmap := nodes[step.node].bitmap(step.branch))
        }

    def exports(self) -> None:
        """Show every frozen disk under its export name."""
        try:
            self._each(self.plan.export_commands)
        except errors.Error as failure:
            self._check_jobs(failure)
            raise

    def _check_jobs(self, refusal: errors.Error) -> None:
        """Say it, in place of a REFUSAL of QEMU's, where a job has ended, and with it the node that
        was to be shown. Errors: VIR_ERR_OPERATION_FAILED."""
        spoken = self.plan.dialect
        jobs = spoken.parse_jobs(self.qemu.execute(spoken.query_jobs()))
        for disk in self.plan.disks:
            if (reason := blockjob.job_reason(jobs.get(disk.job))) is not None:
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_FAILED,
                    f"disk '{disk.target}': {reason}, as the backup began",
                ) from refusal

    def give_way(self) -> str | None:
        """Let QEMU give the disks away in the middle of it, where that can be. What it refuses of
        that is no reason not to back up: it is returned."""
        commands = [
            (d, command) for d in self.plan.disks for command in self.plan.give_way_commands(d)
        ]
        try:
            self.qemu.execute_all([command for _, command in commands])
        except monitor_json.CommandFailed as failure:
            [target] = {disk.target for disk, command in commands if failure.command is command}
            logger.warning("disk=%s no save and no migration of the guest: %s", target, failure)
            return f"disk '{target}': {failure}"
        return None

    def _each(self, commands_for: Callable[[backup.DiskPlan], list[monitor_json.Command]]) -> None:
        """Commands for every disk, sent together; a refusal says of which disk it was."""
        commands = [(disk, command) for disk in self.plan.disks for command in commands_for(disk)]
        try:
            self.qemu.execute_all([command for _, command in commands])
        except monitor_json.CommandFailed as failure:
            for disk, command in commands:
                if failure.command is command:
                    raise _of_disk(disk.target, failure) from failure
            raise

    @contextlib.contextmanager
    def _scratch_file(
        self, disk: backup.DiskPlan
    ) -> Iterator[tuple[str, list[monitor_json.Command]]]:
        """The name by which QEMU can open the new scratch file for as long as this lasts, and what
        to tell it once it has.

        A file of ours loses its name here, whatever happens; one of the user's keeps it.
        """
        path = scratch.name(disk.source, disk.opaque)
        fd = None
        if disk.source.dir is not None and self.by_fd:
            fd = scratch.create_nameless(disk.source.dir, disk.target)
        if fd is None:
            uid = self.qemu.peer_uid()
            # Noted before: a signal's exception may come in between (SIGINT).
            self.created.append(path)
            try:
                fd = scratch.create(path, disk.target, uid)
            except errors.Error:
                self.created.remove(path)
                raise
        try:
            self.inodes[disk.target] = os.fstat(fd).st_ino
            scratch.format(fd, disk.size, disk.target, bool(disk.source.reserve), disk.scratch_file)
            if not disk.source.reserve:
                worst_case = qcow2.full_size(disk.size)
                own = scratch.duplicate(fd, disk.target)
                self.images.append(watch.Image(disk.target, own, worst_case))
            if self.by_fd:
                # The set is given up as soon as QEMU has opened its own descriptor from it: with
                # the last of those it vanishes, even when the guest is paused by then.
                add = monitor_json.add_fd(fd, disk.opaque)
                fdset = monitor_json.parse_add_fd(self.qemu.execute(add))
                yield f"/dev/fdset/{fdset}", [monitor_json.remove_fd(fdset)]
            else:
                yield path, []
        finally:
            os.close(fd)
            if disk.source.dir is not None:
                scratch.remove(path)


def check_address(address: backup_conf.Address) -> None:
    """Refuse a unix path where QEMU would replace what is not a socket nobody listens on.

    Errors: VIR_ERR_INVALID_ARG.
    """
    if not isinstance(address, backup_conf.UnixAddress):
        return
    try:
        mode = pathlib.Path(address.path).lstat().st_mode
    except OSError:
        return  # QEMU says what is wrong with a path that it cannot bind
    if not stat.S_ISSOCK(mode):
        raise errors.error(
            libvirt.VIR_ERR_INVALID_ARG, f"'{address.path}' exists and is not a socket"
        )
    if nbdserver.answers(address):
        raise errors.error(
            libvirt.VIR_ERR_INVALID_ARG, f"another server listens on '{address.path}'"
        )


def _user(uid: int) -> str:
    """A user as people know it."""
    try:
        return f"'{pwd.getpwuid(uid).pw_name}'"
    except KeyError:
        return str(uid)


def _other_image(disk: backup.DiskPlan, node: naming.NodeName) -> errors.Error:
    return errors.error(
        libvirt.VIR_ERR_OPERATION_FAILED,
        f"disk '{disk.target}' got another image as the backup began: '{node}' in place of"
        f" '{disk.node}'",
    )


def _of_disk(
    target: str, failure: monitor_json.CommandFailed, words: str | None = None
) -> errors.Error:
    """A refused command, and of which disk it was; WORDS in place of the refusal's own."""
    return errors.error(
        libvirt.VIR_ERR_INTERNAL_ERROR,
        f"disk '{target}': unable to execute QEMU command '{failure.command.execute}':"
        f" {words or failure.desc}",
    )
