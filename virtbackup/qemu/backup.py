# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan of a backup: everything decided, nothing done (the patch's qemuDomainBackupPrepare*).

``plan`` refuses whatever can be refused before QEMU is touched; after it there are only steps.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import libvirt

from virtbackup import errors
from virtbackup.conf import backup_conf, storage_conf
from virtbackup.qemu import block, blockjob, capabilities, monitor_json, naming

Engine = Literal["classic"]
"""How the frozen disk is made. classic: a job saves old data into a qcow2 overlay over the live
disk, and the overlay is exported."""

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
    node: naming.NodeName
    """The live disk's root node at the start; the job's filter hides it from query-block later."""
    size: int
    """Guest-visible, bytes."""
    exportname: str
    source: storage_conf.Source
    """Where the scratch image is: a file by name, or nameless in a directory."""
    scratch_file: naming.NodeName
    scratch: naming.NodeName
    job: naming.JobId
    export: naming.ExportId
    opaque: str

    def overlay_command(self, filename: str) -> monitor_json.Command:
        return monitor_json.blockdev_add_overlay(
            self.scratch, self.scratch_file, filename, self.node
        )

    def backup_action(self) -> dict[str, Any]:
        return monitor_json.blockdev_backup(self.job, self.node, self.scratch)

    def export_command(self) -> monitor_json.Command:
        return monitor_json.block_export_add_nbd(self.export, self.scratch, self.exportname)


@dataclasses.dataclass(frozen=True)
class BackupPlan:
    """A whole backup."""

    id: naming.BackupId
    engine: Engine
    definition: backup_conf.BackupDef
    """Aligned, and every scratch image placed: what backupGetXMLDesc tells."""
    disks: tuple[DiskPlan, ...]

    @property
    def address(self) -> backup_conf.Address:
        return self.definition.address

    def transaction(self) -> monitor_json.Command:
        """The instant: all jobs begin, or none."""
        return monitor_json.transaction([disk.backup_action() for disk in self.disks])


@dataclasses.dataclass(frozen=True)
class BlockState:
    """What was asked of QEMU before planning."""

    disks: tuple[block.Disk, ...]
    jobs: Mapping[naming.JobId, monitor_json.Job]
    exports: Mapping[naming.ExportId, monitor_json.Export]
    graph: block.Graph | None
    vcpus_run: bool
    iothreads: Mapping[str, str]
    """Disk -> the iothread it runs in; asked only of QEMUs where that matters."""

    def backups(self) -> frozenset[naming.BackupId]:
        """The backups of which QEMU shows a job, an export or a node."""
        names = {*self.jobs, *self.exports, *(self.graph.nodes() if self.graph else ())}
        return frozenset(id for name in names if (id := naming.backup_of(name)))

    def running_jobs(self) -> tuple[naming.JobId, ...]:
        """Backup jobs of ours that still save old data."""
        return tuple(
            id
            for id, job in self.jobs.items()
            if naming.backup_of(id) and job.status in blockjob.RUNNING
        )


def plan(
    definition: backup_conf.BackupDef,
    state: BlockState,
    caps: capabilities.Capabilities,
    backup: naming.BackupId,
    scratch_dir: str,
) -> BackupPlan:
    """Plan the backup of an aligned DEFINITION; images without a place go to SCRATCH_DIR.

    Errors, by disk: VIR_ERR_CONFIG_UNSUPPORTED for what is not offered,
    VIR_ERR_OPERATION_UNSUPPORTED for a disk with a block job of its own or one whose export would
    kill this QEMU.
    """
    caps.check_backup()
    _check_full(definition)
    _check_sources(definition.disks)
    media = {disk.target: disk.medium for disk in state.disks}
    disks: list[DiskPlan] = []
    placed = []
    for wanted in definition.disks:
        if not wanted.present:
            placed.append(wanted)
            continue
        medium = media[wanted.name]
        assert medium is not None
        assert wanted.exportname is not None
        _check_jobs(wanted.name, medium, state)
        _check_iothread(wanted.name, state, caps)
        source = wanted.source or storage_conf.Source(dir=scratch_dir)
        placed.append(dataclasses.replace(wanted, source=source))
        disks.append(_disk(wanted.name, medium, wanted.exportname, source, backup, len(disks)))
    return BackupPlan(
        backup, "classic", dataclasses.replace(definition, disks=tuple(placed)), tuple(disks)
    )


def _disk(
    target: str,
    medium: block.Medium,
    exportname: str,
    source: storage_conf.Source,
    backup: naming.BackupId,
    number: int,
) -> DiskPlan:
    return DiskPlan(
        target=target,
        node=medium.node,
        size=medium.size,
        exportname=exportname,
        source=source,
        scratch_file=naming.scratch_file_node(backup, number),
        scratch=naming.scratch_node(backup, number),
        job=naming.backup_job(backup, number),
        export=naming.export(backup, number),
        opaque=naming.fdset_opaque(backup, number),
    )


def _check_full(definition: backup_conf.BackupDef) -> None:
    if definition.branch is not None:
        raise _unsupported(f"branch '{definition.branch}': only full backups are supported")
    for disk in definition.disks:
        if disk.present and disk.type != "full":
            raise _unsupported(f"disk '{disk.name}': backup type '{disk.type}' needs a branch")
        if disk.granularity is not None:
            raise _unsupported(f"disk '{disk.name}': a bitmap needs a branch")


def _check_sources(disks: Iterable[backup_conf.BackupDiskDef]) -> None:
    files: dict[str, str] = {}
    for disk in disks:
        if disk.source is not None and disk.source.file is not None:
            other = files.setdefault(disk.source.file, disk.name)
            if other != disk.name:
                raise _unsupported(
                    f"disks '{other}' and '{disk.name}' have the same source '{disk.source.file}'"
                )


def _check_jobs(target: str, medium: block.Medium, state: BlockState) -> None:
    for job in sorted(state.graph.jobs_on(medium.node)) if state.graph else ():
        info = state.jobs.get(job)
        raise _in_use(target, f"'{job}'" + (f" ({info.type})" if info else ""))
    if medium.driver in _JOB_FILTERS:
        raise _in_use(target, f"({_JOB_FILTERS[medium.driver]})")


def _in_use(target: str, job: str) -> errors.Error:
    return errors.error(
        libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
        f"disk '{target}' already in active block job {job}",
    )


def _check_iothread(target: str, state: BlockState, caps: capabilities.Capabilities) -> None:
    defect = capabilities.NBD_IOTHREAD_ABORT
    if target in state.iothreads and defect.affects(caps.version):
        version = ".".join(map(str, caps.version))
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
            f"disk '{target}' runs in iothread '{state.iothreads[target]}', which QEMU {version}"
            f" would not survive: {defect.evidence}",
        )


def _unsupported(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, detail)
