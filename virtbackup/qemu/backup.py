# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan of a backup: everything decided, nothing done (the patch's qemuDomainBackupPrepare*).

``plan`` refuses whatever can be refused before QEMU is touched; after it there are only steps.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf, storage_conf
from virtbackup.qemu import (
    block,
    blockjob,
    branch,
    capabilities,
    dialect,
    monitor_json,
    naming,
    qcow2,
)

if TYPE_CHECKING:
    from virtbackup.conf import virtbackup_conf

# Filters that QEMU itself puts over a disk while a block job runs on it.
_JOB_FILTERS = {
    "mirror_top": "mirror",
    "commit_top": "commit",
    "backup-top": "backup",
    "copy-before-write": "backup",
}


@dataclasses.dataclass(frozen=True)
class DiskPlan:
    """One disk of the backup, and what everything about it will be called."""

    target: str
    number: int
    """Its place among the disks of the backup, from 0 on."""
    node: naming.NodeName
    """The live disk's root node at the start; the job's filter hides it from query-block later."""
    source_name: str
    """What the job is told to copy from: the node, or the drive where QEMU knows only drives."""
    device: str | None
    """The device's place in QEMU's object tree, None where there is none to be asked about."""
    size: int
    """Guest-visible, bytes."""
    exportname: str
    source: storage_conf.Source
    """Where the scratch image is: a file by name, or nameless in a directory."""
    scratch_file: naming.NodeName
    scratch: naming.NodeName
    job: naming.JobId
    filter: naming.NodeName | None
    """The job's filter, where the engine needs its name."""
    access: naming.NodeName | None
    """The frozen disk over the filter; None where the scratch image itself shows it."""
    breaks_snapshot: bool
    """When the scratch image fails, the backup breaks and not the guest's write."""
    export: naming.ExportId
    opaque: str
    image: naming.NodeName
    """What is below the filters at the live disk's root, if there are any; NODE where that is not
    known."""
    stores: frozenset[naming.NodeName]
    """Where the data of that is kept, its backing images' too; empty where that is not known."""
    offset: int
    """Bytes of its file before the first of the disk."""
    backing: tuple[block.Backing, ...]
    """What it is backed by, as far as that is known."""
    step: branch.Step | None = None
    """What is done to the bitmaps of the backup's branch, if it has one."""
    since: naming.Point | None = None
    """The point since which the changes are told along with the disk; None: they are not."""
    exportbitmap: naming.BitmapName | None = None
    """What the copy of the branch's bitmap is called that is exported; None: that itself is."""
    guards: tuple[naming.NodeName, ...] = ()
    """Its image, and the nodes that this is made of, that get a bitmap which keeps them from going
    back to a snapshot, where no bitmap of a branch does."""

    @property
    def changes(self) -> monitor_json.BitmapOf | None:
        """The bitmap that is exported with the disk."""
        if self.since is None:
            return None
        assert self.step is not None
        if self.copy is not None:
            # Found from the scratch image itself; where another node is exported, by its name.
            return dataclasses.replace(
                self.copy, node=None if self.access is None else self.scratch
            )
        # Found from an overlay over the disk; not from a node over its filter, which is no image.
        node = None if self.access is None else self.step.node
        return dataclasses.replace(self.step.own, node=node)

    @property
    def copy(self) -> monitor_json.BitmapOf | None:
        """A copy of the branch's bitmap on the scratch image, with which it goes."""
        if self.since is None or self.exportbitmap is None:
            return None
        return monitor_json.BitmapOf(self.scratch, self.exportbitmap)

    def make_copy(self) -> list[dict[str, Any]]:
        """The actions of a start that make the copy, once the branch's bitmap stands still."""
        if self.copy is None:
            return []
        assert self.step is not None
        return [
            monitor_json.bitmap_add(self.copy, self.step.granularity, False, disabled=True),
            monitor_json.bitmap_merge(self.copy, self.step.own),
        ]


@dataclasses.dataclass(frozen=True)
class BackupPlan:
    """A whole backup."""

    id: naming.BackupId
    engine: capabilities.Engine
    definition: backup_conf.BackupDef
    """Aligned, and every scratch image placed: what backupGetXMLDesc tells."""
    disks: tuple[DiskPlan, ...]

    dialect: dialect.Dialect
    credentials: "virtbackup_conf.Credentials | None" = None
    """What the NBD server does TLS by; None: it does not."""
    gives_way: bool = False
    """QEMU is let give the disks away, to a migration or libvirt's save, in the middle of it."""

    @property
    def address(self) -> backup_conf.Address:
        return self.definition.address

    def listening_on(self, address: backup_conf.Address) -> "BackupPlan":
        """The same plan, once it is known where the NBD server is going to listen."""
        definition = dataclasses.replace(self.definition, address=address)
        return dataclasses.replace(self, definition=definition)

    def server_commands(self, fd: int | None = None) -> list[monitor_json.Command]:
        """Start the NBD server, one command after the other; FD is its socket, where it has one."""
        commands = []
        name = tls = None
        if self.credentials is not None:
            tls = naming.credentials(self.id)
            commands.append(self.dialect.credentials_add(tls, self.credentials))
        if fd is not None:
            name = naming.listener_fd(self.id)
            commands.append(monitor_json.getfd(fd, name))
        return [*commands, self.dialect.nbd_server_start(self.address, name, tls)]

    def scratch_command(self, disk: DiskPlan, filename: str) -> monitor_json.Command:
        """Open the new image: over the live disk where it is going to be exported itself."""
        over = disk.node if disk.access is None else None
        return self.dialect.blockdev_add(
            monitor_json.blockdev_add_scratch(disk.scratch, disk.scratch_file, filename, over)
        )

    def transaction(self) -> monitor_json.Command:
        """The instant: all jobs begin, or none. The bitmaps that record from then on begin before
        it, those that have what changed up to it end after it: in an iothread the guest may write
        between two actions, and such a write is noted twice rather than not at all."""
        steps = [disk.step for disk in self.disks if disk.step]
        jobs = [
            self.dialect.backup_action(
                disk.job, disk.source_name, disk.scratch, disk.filter, disk.breaks_snapshot
            )
            for disk in self.disks
        ]
        before = [action for step in steps for action in step.before()]
        guards = [
            branch.guard(monitor_json.BitmapOf(node, naming.guard_bitmap(self.id, disk.number)))
            for disk in self.disks
            for node in disk.guards
        ]
        after = [action for step in steps for action in step.after()]
        copies = [action for disk in self.disks for action in disk.make_copy()]
        return monitor_json.transaction([*before, *guards, *jobs, *after, *copies])

    def give_way_commands(self, disk: DiskPlan) -> list[monitor_json.Command]:
        """Have QEMU leave the scratch image out when it gives the disks away, which it refuses to
        as long as it finds something that is written to.

        It goes through its nodes from those on, over which there is no other node, and asks of
        each below whether there is one over it yet that was not given away. It comes by none over
        which there is only the filter of a job: so that, and what is under it, is never given away,
        and the scratch image below both is never asked. The job has nothing to do.
        """
        if not self.gives_way:
            return []
        node = naming.yield_node(self.id, disk.number)
        target = naming.yield_target(self.id, disk.number)
        return [
            monitor_json.blockdev_add_raw(node, disk.scratch),
            monitor_json.blockdev_add_null(target, disk.size),
            monitor_json.blockdev_mirror(naming.yield_job(self.id, disk.number), node, target),
        ]

    def export_commands(self, disk: DiskPlan) -> list[monitor_json.Command]:
        """Show the frozen disk under its export name."""
        commands = []
        if disk.access is not None:
            assert disk.filter is not None
            commands.append(monitor_json.blockdev_add_snapshot_access(disk.access, disk.filter))
        frozen = disk.access or disk.scratch
        export = self.dialect.export_add(disk.export, frozen, disk.exportname, disk.changes)
        commands.append(export)
        return commands


@dataclasses.dataclass(frozen=True)
class BlockState:
    """What was asked of QEMU before planning."""

    disks: tuple[block.Disk, ...]
    jobs: Mapping[naming.JobId, monitor_json.Job]
    exports: Mapping[naming.ExportId, monitor_json.Export]
    graph: block.Graph | None
    """None where it cannot be asked for."""
    vcpus_run: bool
    iothreads: Mapping[str, str]
    """Disk -> the iothread it runs in; asked only of QEMUs where that matters."""
    io_error: bool = False
    """The guest is paused since a drive met an error."""
    synchronous: frozenset[str] = frozenset()
    """The disks that the guest writes in a way that some QEMUs do not survive; asked only of those.
    """
    nodes: Mapping[naming.NodeName, block.Medium] = dataclasses.field(default_factory=dict)
    """Every node, where they were asked for."""
    strangers: tuple[block.Disk, ...] = ()
    """The drives of the guest that those who give the disks their names do not know."""
    passed_through: frozenset[str] = frozenset()
    """The disks that are SCSI devices of the host which the guest itself gives their commands."""
    replayed: frozenset[str] = frozenset()
    """The disks whose requests QEMU records or replays."""
    elsewhere: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Devices of the guest whose disks QEMU does not read and write, but another process or the
    kernel: id -> type. Where somebody else gives the disks their names, it is his to tell."""

    def backups(self) -> frozenset[naming.BackupId]:
        """The backups of which QEMU shows a job, an export or a node."""
        nodes = self.graph.nodes() if self.graph else self.nodes
        names = {*self.jobs, *self.exports, *nodes}
        return frozenset(id for name in names if (id := naming.backup_of(name)))

    def traces(self) -> frozenset[naming.BackupId]:
        """These, and the backups that are not there any more but have a bitmap in an image that is
        written to."""
        media = [*self.nodes.values(), *(disk.medium for disk in self.disks if disk.medium)]
        written = (medium for medium in media if not medium.readonly)
        names = (bitmap.name for medium in written for bitmap in medium.bitmaps)
        return self.backups() | {id for name in names if (id := naming.backup_of(name))}

    def images(self, root: naming.NodeName) -> branch.Images | None:
        """What is below the node that a disk has at its root."""
        return branch.images(root, self.nodes, self.graph) if self.graph else None

    def below_parts(self, medium: block.Medium) -> block.Medium:
        """What MEDIUM is, or shows a part of: the first below it that is neither a filter nor a
        ``raw`` node, as far as the nodes are known."""
        found = medium
        while self.graph and (found.driver == "raw" or found.driver in block.FILTERS):
            below = self.graph.filtered_by(found.node)
            if below is None or below not in self.nodes:
                break
            found = self.nodes[below]
        return found

    def running_jobs(self) -> tuple[naming.JobId, ...]:
        """Backup jobs of ours that still save old data."""
        return tuple(
            id
            for id, job in self.jobs.items()
            if naming.is_backup_job(id) and job.status in blockjob.RUNNING
        )


def plan(
    definition: backup_conf.BackupDef,
    state: BlockState,
    caps: capabilities.Capabilities,
    backup: naming.BackupId,
    scratch_dir: str,
    engine: capabilities.Engine | None = None,
    credentials: "virtbackup_conf.Credentials | None" = None,
    gives_way: bool = False,
) -> BackupPlan:
    """Plan the backup of an aligned DEFINITION; images without a place go to SCRATCH_DIR. TLS, if
    it is wanted, goes by CREDENTIALS. GIVES_WAY: as ``BackupPlan``, which QEMU has to be made for.

    ENGINE None is the safest that this QEMU has. Errors: those of ``BackupDef.parse`` for what a
    document cannot tell; by disk, VIR_ERR_CONFIG_UNSUPPORTED for what is not offered,
    VIR_ERR_OPERATION_UNSUPPORTED for a disk with a block job of its own or one whose export would
    kill this QEMU, VIR_ERR_OPERATION_INVALID for one that was given away.
    """
    caps.check_backup()
    engine = engine or caps.engine_beside_iothreads(bool(state.iothreads))
    caps.check_engine(engine)
    if not definition.address.tls:
        credentials = None
    if credentials is not None:
        unix = isinstance(definition.address, backup_conf.UnixAddress)
        caps.check_tls(dialect.credentials_kind(credentials), unix)
    _check_branch(definition, caps)
    _check_sources(definition.disks)
    _check_nodes(definition.disks, state)
    found = {disk.target: disk for disk in state.disks}
    for wanted in definition.disks:
        if wanted.present:
            check_owned(found[wanted.name], state.graph)
    lines = _lines(definition, definition.branch, state)
    _check_sound(definition, lines)
    check_new(definition.fork, _lines(definition, definition.fork, state))
    spoken = dialect.Dialect(caps)
    disks: list[DiskPlan] = []
    placed = []
    for wanted in definition.disks:
        if not wanted.present:
            placed.append(wanted)
            continue
        medium = found[wanted.name].medium
        assert medium is not None
        _check_disk(wanted, found[wanted.name], medium, state, caps, engine)
        assert wanted.exportname is not None
        number = len(disks)
        scratch = naming.scratch_node(backup, number)
        wanted = dataclasses.replace(
            wanted,
            source=(wanted.source or storage_conf.Source()).placed(scratch_dir),
            exportname=spoken.export_name(scratch, wanted.exportname),
        )
        line = lines.get(wanted.name)
        if line is not None:
            wanted = _choose(wanted, line)
        placed.append(wanted)
        plan = _disk(wanted, found[wanted.name], engine, caps, backup, number, state)
        if line is not None:
            assert definition.branch is not None
            copies = gives_way or capabilities.BUSY_BITMAP_ABORT.affects(caps.version)
            plan = _with_branch(plan, definition.branch, wanted, line, backup, copies)
        disks.append(dataclasses.replace(plan, guards=_guards(plan, caps, state.graph)))
    placed_all = dataclasses.replace(definition, disks=tuple(placed))
    # The status has the document, and a backup of which it cannot be read could not be ended.
    backup_conf.BackupDef.parse(placed_all.format())
    return BackupPlan(backup, engine, placed_all, tuple(disks), spoken, credentials, gives_way)


def _disk(
    wanted: backup_conf.BackupDiskDef,
    disk: block.Disk,
    engine: capabilities.Engine,
    caps: capabilities.Capabilities,
    backup: naming.BackupId,
    number: int,
    state: BlockState,
) -> DiskPlan:
    assert wanted.exportname is not None
    assert wanted.source is not None
    assert disk.medium is not None
    hybrid = engine == "hybrid"
    image = _image(disk.medium, state)
    medium = (
        disk.medium if image == disk.medium.node else state.nodes.get(image or disk.medium.node)
    )
    return DiskPlan(
        target=wanted.name,
        number=number,
        node=disk.medium.node,
        source_name=(disk.drive or "") if caps.drive_ids else disk.medium.node,
        device=disk.qom_path,
        size=disk.medium.size,
        exportname=wanted.exportname,
        source=wanted.source,
        scratch_file=naming.scratch_file_node(backup, number),
        scratch=naming.scratch_node(backup, number),
        job=naming.backup_job(backup, number),
        filter=naming.filter_node(backup, number) if hybrid else None,
        access=naming.access_node(backup, number) if hybrid else None,
        breaks_snapshot=hybrid and caps.breaks_snapshot,
        export=naming.export(backup, number),
        opaque=naming.fdset_opaque(backup, number),
        image=image or disk.medium.node,
        stores=state.graph.stores_of(image) if state.graph and image else frozenset(),
        offset=disk.medium.offset,
        backing=state.graph.backing_of(medium, state.nodes) if state.graph and medium else (),
    )


def _guards(
    plan: DiskPlan, caps: capabilities.Capabilities, graph: block.Graph | None
) -> tuple[naming.NodeName, ...]:
    """As ``DiskPlan``."""
    nodes: list[naming.NodeName] = []
    if plan.step is None and caps.guards(plan.image != plan.node):
        nodes.append(plan.image)
    if graph and caps.guards(filtered=True):  # a job's own bitmap is above these, too
        nodes += sorted(graph.within(plan.image))
    return tuple(nodes)


def _image(medium: block.Medium, state: BlockState) -> naming.NodeName | None:
    """As ``DiskPlan``; None where it is not known."""
    if medium.driver not in block.FILTERS:
        return medium.node
    images = state.images(medium.node)
    return images.active.node if images else None


def _with_branch(
    plan: DiskPlan,
    name: str,
    wanted: backup_conf.BackupDiskDef,
    line: branch.Line,
    backup: naming.BackupId,
    copies: bool,
) -> DiskPlan:
    """PLAN with a branch; COPIES: the branch's own bitmap is not exported, but a copy of it."""
    assert wanted.granularity is not None
    recording = naming.next_bitmap(backup, plan.number, name)
    step = branch.step(name, line, recording, wanted.granularity)
    since = line.point if wanted.type == "incremental" else None
    copied = wanted.exportbitmap
    if copies:
        copied = copied or name
    exportbitmap = None if copied is None else naming.BitmapName(copied)
    return dataclasses.replace(plan, step=step, since=since, exportbitmap=exportbitmap)


def _choose(wanted: backup_conf.BackupDiskDef, line: branch.Line) -> backup_conf.BackupDiskDef:
    """WANTED with the type and granularity that it is going to have."""
    granularity = wanted.granularity or (
        line.bitmap.granularity if line.bitmap else branch.granularity(line.size)
    )
    wanted = dataclasses.replace(wanted, granularity=granularity)
    if wanted.type != "auto":
        return wanted
    if line.unsound is not None:
        return wanted.of_type("full", line.unsound)
    assert line.point is not None
    reason = f"its changes since the backup '{line.point.backup}' are known"
    return wanted.of_type("incremental", reason)


def _lines(
    definition: backup_conf.BackupDef, name: str | None, state: BlockState
) -> dict[str, branch.Line]:
    """What every disk of the backup has of branch NAME; empty without one."""
    if name is None:
        return {}
    media = {disk.target: disk.medium for disk in state.disks}
    lines = {}
    for disk in definition.disks:
        if not disk.present:
            continue
        medium = media[disk.name]
        assert medium is not None
        images = state.images(medium.node)
        if images is None:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"disk '{disk.name}': QEMU does not tell which image the guest writes to",
            )
        lines[disk.name] = branch.line(name, images, medium.size, disk.name)
    return lines


def _check_branch(definition: backup_conf.BackupDef, caps: capabilities.Capabilities) -> None:
    if definition.branch is not None:
        if not caps.branches:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"branch '{definition.branch}': QEMU {capabilities.dotted(caps.version)} cannot"
                " begin, end and export dirty bitmaps at one instant: full backups only",
            )
        return
    for disk in definition.disks:
        if disk.present and disk.type != "full":
            raise _unsupported(f"disk '{disk.name}': backup type '{disk.type}' needs a branch")
        if disk.granularity is not None:
            raise _unsupported(f"disk '{disk.name}': a bitmap needs a branch")


def _check_sound(definition: backup_conf.BackupDef, lines: Mapping[str, branch.Line]) -> None:
    """Refuse what the bitmaps that are there forbid."""
    wanted = {disk.name: disk for disk in definition.disks}
    for name, line in lines.items():
        if line.foreign:
            raise _unsupported(
                f"disk '{name}' has a bitmap '{definition.branch}' that was made by somebody else:"
                " choose another name for the branch"
            )
        given = wanted[name].granularity
        if given is not None and line.bitmap and line.bitmap.granularity != given:
            raise _unsupported(
                f"disk '{name}': the bitmap of branch '{definition.branch}' has granularity"
                f" {line.bitmap.granularity}, not {given}"
            )
        least = branch.least_granularity(line.size)
        if given is not None and line.bitmap is None and given < least:
            raise _unsupported(
                f"disk '{name}' of {line.size} bytes is too large for a bitmap of granularity"
                f" {given}, for which the guest would have to wait: it takes at least {least}"
            )
        if line.bitmap is not None and line.bitmap.busy:
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID,
                f"disk '{name}': the bitmap '{definition.branch}' is in use by somebody else",
            )
    reasons = [
        f"disk '{name}': {line.unsound}"
        for name, line in lines.items()
        if wanted[name].type == "incremental" and line.unsound is not None
    ]
    if reasons:
        raise errors.error(
            errors.CHECKPOINT_INCONSISTENT,
            f"branch '{definition.branch}' has no sound point to be incremental from:"
            f" {'; '.join(reasons)}",
        )


def check_new(name: str | None, lines: Mapping[str, branch.Line]) -> None:
    """Refuse to begin branch NAME where there is something of that name.

    Errors: VIR_ERR_CONFIG_UNSUPPORTED.
    """
    for disk, line in lines.items():
        if line.bitmap is not None or line.point is not None:
            raise _unsupported(
                f"disk '{disk}' has a bitmap '{name}' already: choose another name for the new"
                " branch"
            )


def _check_sources(disks: Iterable[backup_conf.BackupDiskDef]) -> None:
    files: dict[str, str] = {}
    for disk in disks:
        if disk.source is not None and disk.source.file is not None:
            other = files.setdefault(disk.source.file, disk.name)
            if other != disk.name:
                raise _unsupported(
                    f"disks '{other}' and '{disk.name}' have the same source '{disk.source.file}'"
                )


def _check_nodes(disks: Iterable[backup_conf.BackupDiskDef], state: BlockState) -> None:
    """Refuse a node that is to be backed up twice, as several devices have it: one is enough. And
    two of which one is below the other, where each would show the other's job."""
    media = {disk.target: disk.medium for disk in state.disks}
    nodes: dict[naming.NodeName, str] = {}
    for disk in disks:
        medium = media[disk.name] if disk.present else None
        if medium is not None and (other := nodes.setdefault(medium.node, disk.name)) != disk.name:
            raise _unsupported(
                f"disks '{other}' and '{disk.name}' are the same block node '{medium.node}': leave"
                ' one of them out (present="no")'
            )
    for node, name in nodes.items():
        below = state.graph.below([node]) if state.graph else frozenset[naming.NodeName]()
        if part := min(below & nodes.keys(), default=None):
            raise _unsupported(
                f"disk '{name}' is made of disk '{nodes[part]}' (block node '{part}'): leave one of"
                ' them out (present="no")'
            )


def check_owned(disk: block.Disk, graph: block.Graph | None) -> None:
    """Refuse a disk that another QEMU may write to by now, as this one was migrated or saved, or
    until it has come in: what is overwritten there is not saved, and bitmaps that are added here
    are in the way of those in the image. GRAPH None: where it cannot be asked for.

    Errors: VIR_ERR_OPERATION_INVALID.
    """
    if disk.medium is None:
        return
    # A node that no device has, a job may have whose drive has no permissions.
    given_away = graph.given_away if graph and disk.qom_path else ()
    if not disk.medium.active or disk.medium.node in given_away:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID,
            f"disk '{disk.target}' is not this guest's to use before it goes on: it was given away"
            " to a migration or a save, or the guest has not come in yet",
        )


def _check_disk(
    wanted: backup_conf.BackupDiskDef,
    disk: block.Disk,
    medium: block.Medium,
    state: BlockState,
    caps: capabilities.Capabilities,
    engine: capabilities.Engine,
) -> None:
    """Refuse what cannot be backed up, or not as it is WANTED."""
    _check_size(wanted.name, medium)
    _check_passed_through(wanted.name, state)
    _check_image(wanted.name, medium, state)
    _check_twins(wanted.name, medium, state)
    _check_drive(disk, caps)
    _check_jobs(disk, medium, state)
    _check_iothread(wanted.name, state, caps, engine)
    _check_synchronous(wanted.name, state, caps)
    _check_replayed(wanted.name, state, caps)
    _check_fetched(wanted.name, medium, caps)
    _check_export_name(wanted, caps)


def _check_size(target: str, medium: block.Medium) -> None:
    if medium.size > qcow2.MAX_SIZE:
        raise _unsupported(
            f"disk '{target}' of {medium.size} bytes is larger than a scratch image can be:"
            f" {qcow2.MAX_SIZE} bytes"
        )


def _check_passed_through(target: str, state: BlockState) -> None:
    """Refuse a SCSI device that is passed through: what the guest writes to it is seen by no job
    and by no bitmap, and below a job's filter QEMU refuses all that it asks of it."""
    if target in state.passed_through:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            f"disk '{target}' is a SCSI device that is passed through to the guest, of whose writes"
            ' QEMU knows nothing: leave it out (present="no")',
        )


def _check_image(target: str, medium: block.Medium, state: BlockState) -> None:
    """Refuse where the image was made smaller below a filter that has not noticed: that QEMU ends
    when a client asks what is behind the image's end, and the guest's bitmaps do not know of it."""
    if medium.driver not in block.FILTERS or not state.nodes:
        return
    images = state.images(medium.node)
    if images is not None and images.active.size < medium.size:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            f"disk '{target}' of {medium.size} bytes has an image of {images.active.size} bytes,"
            f" '{images.active.node}', below '{medium.node}': resize that node, too",
        )


def _check_twins(target: str, medium: block.Medium, state: BlockState) -> None:
    """Refuse where the guest can write a disk's image past its node, by another disk: what is
    overwritten that way is not saved."""
    whole = state.below_parts(medium)
    for twin in (*state.disks, *state.strangers):
        other = twin.medium
        if other is None or other.readonly or other.node == medium.node:
            continue
        others = state.below_parts(other)
        if others.filename != whole.filename or not whole.tells_place:
            continue
        below = state.graph.below if state.graph else lambda _: ()
        if medium.node in below([other.node]):
            continue  # what is written to that goes through this one
        if twin.is_part and other.node in below([medium.node]):
            continue  # and what is written to this one through that, which no device has
        if others.driver != whole.driver or medium.overlaps(other):
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"disk '{target}' and disk '{twin.target}' both write to '{whole.shown}', each"
                " by a block node of its own: what is written by the one would be missing in a"
                " backup of the other",
            )


def _check_drive(disk: block.Disk, caps: capabilities.Capabilities) -> None:
    if caps.drive_ids and not disk.drive:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            f"disk '{disk.target}' is no drive with an id, and QEMU"
            f" {capabilities.dotted(caps.version)} backs up no other",
        )


def _check_export_name(wanted: backup_conf.BackupDiskDef, caps: capabilities.Capabilities) -> None:
    if not caps.export_names and wanted.exportname != wanted.name:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            f"disk '{wanted.name}': QEMU {capabilities.dotted(caps.version)} cannot give an export"
            " a name of its own",
        )


def _check_jobs(disk: block.Disk, medium: block.Medium, state: BlockState) -> None:
    jobs = state.graph.jobs_on(medium.node) if state.graph else ()
    for job in sorted(jobs) or [naming.JobId(disk.drive or "")]:
        info = state.jobs.get(job)
        if info is not None or job in jobs:
            raise _in_use(disk.target, f"'{job}'" + (f" ({info.type})" if info else ""))
    if medium.driver in _JOB_FILTERS:
        raise _in_use(disk.target, f"({_JOB_FILTERS[medium.driver]})")


def _in_use(target: str, job: str) -> errors.Error:
    return errors.error(
        libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
        f"disk '{target}' already in active block job {job}",
    )


def _check_iothread(
    target: str,
    state: BlockState,
    caps: capabilities.Capabilities,
    engine: capabilities.Engine,
) -> None:
    defect = capabilities.NBD_IOTHREAD_ABORT
    if engine == "hybrid" and caps.aborts_in_iothreads:
        defect = capabilities.INSERT_NODE_ABORT
    if target in state.iothreads:
        what = f"disk '{target}' runs in iothread '{state.iothreads[target]}', which"
        _check_survival(caps, defect, what)


def _check_synchronous(target: str, state: BlockState, caps: capabilities.Capabilities) -> None:
    if target in state.synchronous:
        what = f"disk '{target}' is a floppy or an SD card, the backup of which"
        _check_survival(caps, capabilities.SYNCHRONOUS_WRITER, what, "might")


def _check_replayed(target: str, state: BlockState, caps: capabilities.Capabilities) -> None:
    if target in state.replayed:
        what = f"disk '{target}' is recorded or replayed (rr), which"
        _check_survival(caps, capabilities.RECORD_REPLAY, what)


def _check_fetched(target: str, medium: block.Medium, caps: capabilities.Capabilities) -> None:
    if medium.is_fetched:
        what = f"disk '{target}' is, or has below it, an image on a web or FTP server, the reading"
        _check_survival(caps, capabilities.CURL_HANG, f"{what} of which", "might")


def _check_survival(
    caps: capabilities.Capabilities, defect: capabilities.Defect, what: str, how: str = "would"
) -> None:
    if defect.affects(caps.version):
        version = capabilities.dotted(caps.version)
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            f"{what} QEMU {version} {how} not survive: {defect.evidence}",
        )


def _unsupported(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, detail)
