# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a QEMU can do, and what it is known to get wrong (qemu_capabilities.c). Pure.

What it can do is asked of it, by its commands and its schema; only defects go by version, each
with its evidence.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import libvirt

from virtbackup import errors
from virtbackup.qemu import monitor_json, qmp

Version = tuple[int, int, int]

Engine = Literal["classic", "hybrid"]
"""How a frozen disk is made. classic: a job saves old data into a qcow2 overlay over the live disk,
and the overlay is exported; when the job is lost, reads go on and show the live disk. hybrid: the
same job saves into a plain image, and a ``snapshot-access`` node over the job's filter is exported;
when the job is lost, reads fail."""

FEATURES: Mapping[str, str] = {
    "blockdev-add.options": "blockdev-add/options",
    "blockdev-add.id": "blockdev-add/options/id",
    "snapshot-access": "blockdev-add/+snapshot-access",
    "bochs": "blockdev-add/+bochs",
    "job-id": "blockdev-backup/job-id",
    "auto-dismiss": "blockdev-backup/auto-dismiss",
    "filter-node-name": "blockdev-backup/filter-node-name",
    "on-cbw-error": "blockdev-backup/on-cbw-error",
    "transaction.blockdev-backup": "transaction/actions/+blockdev-backup",
    "nbd-server-start.max-connections": "nbd-server-start/max-connections",
    "nbd-server-start.fd": "nbd-server-start/addr/+fd",
    "nbd-server-start.tls-creds": "nbd-server-start/tls-creds",
    "query-named-block-nodes.flat": "query-named-block-nodes/flat",
    "object-add.props": "object-add/props",
    "object-add.tls-creds-x509": "object-add/+tls-creds-x509",
    "object-add.tls-creds-psk": "object-add/+tls-creds-psk",
    "nbd-server-add.name": "nbd-server-add/name",
    "nbd-server-add.bitmap": "nbd-server-add/bitmap",
    "block-export-add.bitmaps": "block-export-add/+nbd/bitmaps",
    "transaction.bitmap-add": "transaction/actions/+block-dirty-bitmap-add",
    "transaction.bitmap-disable": "transaction/actions/+block-dirty-bitmap-disable",
    "transaction.bitmap-merge": "transaction/actions/+block-dirty-bitmap-merge",
    "transaction.bitmap-remove": "transaction/actions/+block-dirty-bitmap-remove",
}
"""What is looked up in the schema: a command, then what is below its arguments, step by step: a
member's name, or +CASE of a union. Lists and alternates are looked through."""


@dataclasses.dataclass(frozen=True)
class Defect:
    """Something QEMUs from ``first`` up to, not including, ``fixed`` get wrong (None: not fixed in
    any QEMU seen), and what is done about it here."""

    first: Version
    fixed: Version | None
    evidence: str
    answer: str

    def affects(self, version: Version) -> bool:
        return self.first <= version and (self.fixed is None or version < self.fixed)


SNAPSHOT_ACCESS_WRONG = Defect(
    (7, 0, 0),
    (8, 0, 0),
    "a read of a snapshot-access node that begins in a saved cluster and runs into one not saved"
    " is served from the live disk, and so is its block status (hbitmap_status returns false)",
    "the classic engine",
)
"""Seen on 7.2.22: wrong data with every client, no error. Right on 10.0.13 and 11.1.3; the fix is
of February 2023, so in 8.0."""

ON_CBW_ERROR_WITH_OVERLAY = Defect(
    (10, 1, 0),
    None,
    "with on-cbw-error=break-snapshot and an overlay that is exported itself, a scratch image that"
    " fails makes reads show the live disk, without an error or an event",
    "on-cbw-error only with the hybrid engine",
)
"""Seen on 11.1.3: 46 of 256 chunks wrong, job still running."""

QCOW2_V2_SCRATCH_ABORT = Defect(
    (7, 0, 0),
    None,
    "the block status of a snapshot-access node kills QEMU when the scratch image is qcow2 of"
    " version 2 (an assertion in cbw_co_snapshot_block_status)",
    "scratch images are made here, and never of version 2",
)
"""Seen on 7.2.22, 10.0.13 and 11.1.3."""

NBD_IOTHREAD_ABORT = Defect(
    (7, 2, 14),
    (8, 0, 0),
    "QEMU aborts when an NBD client disconnects from an export whose node runs in an iothread"
    " (nbd_blockdev_client_closed: Assertion `qemu_in_main_thread() && nbd_server' failed)",
    "a disk in an iothread is refused by name",
)
"""Seen on 7.2.22 with virtio-blk and virtio-scsi; 5.2.0, 10.0.13 and 11.1.3 do not."""

INSERT_NODE_ABORT = Defect(
    (8, 0, 0),
    None,
    "a qemu-storage-daemon aborts when a job's filter is put over a node that an export has in an"
    " iothread: the filter takes it out of that (bdrv_insert_node: Assertion"
    " `bdrv_get_aio_context(bs) == ctx' failed)",
    "the classic engine, whose overlay has taken it out by then, where there is an iothread",
)
"""Seen on 10.0.13 and 11.1.3 with exports by vhost-user-blk and FUSE; a device of a guest keeps its
node where it is. What lies between them and 8.0, from which on there is another engine than the
classic one, is taken to be alike."""

NBD_STOP_HANG = Defect(
    (7, 2, 14),
    (10, 0, 0),
    "nbd-server-stop never returns, and the guest stands still, while an NBD client is connected"
    " that has not finished the handshake",
    "such clients are cut off first; where they cannot be, the server is left running",
)
"""Seen on 7.2.22; what lies between it and 10.0 is taken to be alike."""

NBD_STOP_CRASH = Defect(
    (5, 2, 0),
    (7, 2, 14),
    "a client that had not finished the handshake when nbd-server-stop ended kills QEMU as soon as"
    " it goes away (nbd_blockdev_client_closed counts the clients of a server that is no more)",
    "such clients are cut off first; where they cannot be, the server is left running",
)
"""Seen on 5.2.0 (a segmentation fault, each of 13 times, over unix sockets and TCP), which is the
first to count its clients; 10.0.13 and 11.1.3 do not. What lies between it and 7.2.14, where
NBD_STOP_HANG begins, is taken to be alike."""

NBD_STUCK_CLIENT = Defect(
    (0, 0, 0),
    None,
    "an export whose client has stopped reading while answers wait for it is never deleted;"
    " nbd-server-stop, or on 11.1 already the deletion of another export, then never returns, and"
    " the guest stands still",
    "clients are disconnected first; where one is seen to hold on, nothing is deleted, and the stop"
    " says so",
)
"""Seen on 5.2.0, 7.2.22, 10.0.13 and 11.1.3, over a unix socket: QEMU waits for room in a socket
that it has itself shut down."""

NBD_STUCK_END = Defect(
    (8, 0, 0),
    None,
    "the first command that ends an export or a job beside a client that has stopped reading never"
    " returns, and the guest stands still",
    "clients are disconnected first; where one is seen to hold on, a backup is not given up either",
)
"""Seen on 10.0.13 and 11.1.3; 5.2.0 and 7.2.22 let the guest write freely by it. What lies between
is taken to be alike."""

SYNCHRONOUS_WRITER = Defect(
    (0, 0, 0),
    (7, 2, 0),
    "a floppy or an SD card that the guest writes waits for each write in a loop that may also run"
    " the end of the disk's export or backup job, which waits for the write: neither ends",
    "a writable floppy or SD card is refused by name",
)
"""Seen on 5.2.0: QEMU stood still for ever in 7 of 7 runs, after 30 to 218 backups of a floppy that
the guest wrote, whatever the order of their ends; not in over 1000 backups each on 7.2.22, 10.0.13
and 11.1.3. SD cards by QEMU's source."""

RECORD_REPLAY = Defect(
    (0, 0, 0),
    None,
    "QEMU stands still for ever as it waits for the requests of a disk that it records or replays"
    " (blkreplay), which a job does when it begins or ends",
    "such a disk is refused by name",
)
"""Seen on 5.2.0 and 7.2.22 (in the transaction), 10.0.13 (``job-cancel``) and 11.1.3
(``blockdev-add``), with ``-icount rr=record`` and a guest that writes. Before 5.2 it cannot be
asked for."""

CURL_HANG = Defect(
    (0, 0, 0),
    None,
    "its curl driver may lose a request where more than eight are asked of an image at once, as who"
    " reads a disk does, and whoever waits for it, the guest too, waits for ever",
    "a disk with such an image is refused by name",
)
"""Seen on 7.2.22 with two servers and a plain export of the guest's disk, no backup: nbdcopy hung
with 16 requests and more in 8 of 8 runs, within five reads of 8 MiB, and then the guest's own reads
did; with one in none of 60 reads. A backup-pull of 8 MiB hung three times in a dozen. On 11.1.3
nbdcopy hung in one of two runs; before 7.2 untried."""

NAMED_NODES_CRASH = Defect(
    (0, 0, 0),
    (7, 2, 0),
    "query-named-block-nodes kills QEMU between the end of a backup job and its dismissal",
    "not asked while a backup job is concluded",
)
"""Seen on 5.2.0 (a segmentation fault); what lies between it and 7.2 is taken to be alike."""

STREAM_CRASH = Defect(
    (0, 0, 0),
    (10, 0, 0),
    "query-named-block-nodes kills QEMU between the end of a block-stream job, as of libvirt's"
    " blockpull, and its dismissal",
    "not asked while there is a stream job, which may end at any moment; it is waited for",
)
"""Seen on 7.2.22 (a segmentation fault, each time, with ``flat`` or without; not of commit, mirror
and backup jobs); 10.0.13 and 11.1.3 do not. What lies between, and before, is taken to be alike. A
job that begins and ends between the question for jobs and that for nodes is not seen: of guests of
libvirt whose disks, without a backing image, were streamed over and over in six runs of incremental
backups, three died so. So it is asked for no more than is needed."""

CREATE_CRASH = Defect(
    (0, 0, 0),
    (10, 0, 0),
    "query-named-block-nodes kills QEMU while a blockdev-create job makes a qcow2 image, as for"
    " libvirt's snapshots, block copies and backups (qcow2_get_specific_info: Assertion `false'"
    " failed)",
    "not asked while there is such a job; it is waited for",
)
"""Seen on 5.2.0 and 7.2.22, beside a client that asked all the time, in the 4th and the 15th of
such jobs; on 10.0.13 and 11.1.3 not, in 843 and 1077. What lies between, and before, is taken to be
alike. One that begins between the question for jobs and that for nodes is not seen."""

BUSY_BITMAP_ABORT = Defect(
    (0, 0, 0),
    (7, 2, 0),
    "QEMU aborts when it gives its disks away, to a migration or libvirt's save, while a bitmap"
    " that is in an image is exported (Assertion `!bdrv_dirty_bitmap_busy(bitmap)' failed)",
    "a copy of the branch's bitmap is exported",
)
"""Seen on 5.2.0 whether a client reads the export or not; 7.2.22 and 10.0.13 refuse to give such a
disk away. What lies between is taken to be like 5.2."""


ENABLE_CRASH = Defect(
    (0, 0, 0),
    None,
    "a transaction that enables a bitmap which is not there kills QEMU: what failed is undone, and"
    " that looks for the bitmap, too (block_dirty_bitmap_enable_abort)",
    "an action on the same bitmap goes before, which fails as it should",
)
"""Seen on 5.2.0, 7.2.22, 10.0.13 and 11.1.3 (a segmentation fault, each time). It comes to that
where a backup is ended at the very instant in which QEMU gives its disks away, the bitmaps with
them: of 150 saves whose backup was ended meanwhile 9 killed QEMU 7.2, of 500 since then none."""


SNAPSHOT_LOAD = Defect(
    (8, 0, 0),
    None,
    "snapshot-load changes a disk below the filter of a backup job, which saves nothing of it: what"
    " was not saved before is shown as it is in the snapshot, without an error",
    "a bitmap on each disk, with which QEMU refuses",
)
"""Seen on 10.0.13 and 11.1.3 with both engines; what lies between 7.2 and these is taken to be
alike. No QEMU has loadvm take a disk with such a filter."""


SNAPSHOT_LOAD_BELOW = Defect(
    (6, 0, 0),
    (8, 0, 0),
    "the same, where the disk has a filter of its own over its image, or is made of other images (a"
    " part of one, a quorum): the bitmap with which the job itself has QEMU refuse is over these",
    "a bitmap on the image of such a disk, and on what it is made of",
)
"""Seen on 7.2.22; what lies before, from 6.0 on, which is the first with snapshot-load, is taken to
be alike."""


TLS_INET_ONLY = Defect(
    (0, 0, 0),
    (7, 0, 0),
    "the NBD server does TLS on addresses of TCP alone, not on unix sockets nor on sockets that are"
    " handed over (TLS is only supported with IPv4/IPv6)",
    "a unix socket with TLS is refused, and a port that is picked is not handed over",
)
"""Seen on 5.2.0; 7.2.22, 10.0.13 and 11.1.3 do, and by QEMU's history 7.0 is the first."""


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """Of one running QEMU."""

    version: Version
    package: str
    commands: frozenset[str]
    features: frozenset[str] = frozenset()
    """Those of FEATURES that the schema has."""

    @property
    def engine(self) -> Engine:
        """The safest engine that is right on this QEMU."""
        wanted = {"snapshot-access", "filter-node-name"} <= self.features
        wrong = SNAPSHOT_ACCESS_WRONG.affects(self.version)
        return "hybrid" if wanted and not wrong else "classic"

    @property
    def breaks_snapshot(self) -> bool:
        """A scratch image that fails can be made to break the backup instead of the guest: QEMU
        has the option, and a way to find out afterwards that it happened (``probe``)."""
        return {"on-cbw-error", monitor_json.PROBE_DRIVER} <= self.features

    @property
    def write_threshold(self) -> bool:
        """QEMU can note that an image has grown beyond a size."""
        return "block-set-write-threshold" in self.commands

    @property
    def flat_nodes(self) -> bool:
        """Each node can be told without the images below its own, again and again: of a chain of
        100 images that keeps all of QEMU busy for 1.5 s (from 5.0 on)."""
        return "query-named-block-nodes.flat" in self.features

    @property
    def fdsets(self) -> bool:
        """Files can be handed over as descriptors and taken back."""
        return {"add-fd", "remove-fd", "query-fdsets"} <= self.commands

    @property
    def takes_listener(self) -> bool:
        """The NBD server can be handed a socket that listens."""
        return {"getfd", "closefd"} <= self.commands and "nbd-server-start.fd" in self.features

    @property
    def takes_listener_for_tls(self) -> bool:
        """Also one that does TLS."""
        return self.takes_listener and not TLS_INET_ONLY.affects(self.version)

    @property
    def wraps_properties(self) -> bool:
        """object-add takes the properties of an object as one argument (up to 5.2)."""
        return "object-add.props" in self.features

    @property
    def wraps_options(self) -> bool:
        """blockdev-add takes all it is told as one argument (up to 2.7)."""
        return "blockdev-add.options" in self.features

    @property
    def drive_ids(self) -> bool:
        """What blockdev-add makes is a drive with an id, by which other commands know it; most of
        them do not know nodes (up to 2.7)."""
        return "blockdev-add.id" in self.features

    @property
    def job_ids(self) -> bool:
        """A block job can be given an id; else it has that of its drive (up to 2.6)."""
        return "job-id" in self.features

    @property
    def auto_dismiss(self) -> bool:
        """A job that has ended can be kept, for its error to be asked (2.12)."""
        return "auto-dismiss" in self.features

    @property
    def query_jobs(self) -> bool:
        """Jobs are asked for, cancelled and dismissed as such (3.0), not as block jobs."""
        return {"query-jobs", "job-cancel", "job-dismiss"} <= self.commands

    @property
    def block_exports(self) -> bool:
        """Exports have ids and can be asked for (5.2); else they only end with the server."""
        return {"block-export-add", "block-export-del", "query-block-exports"} <= self.commands

    @property
    def export_names(self) -> bool:
        """An export can have a name of its own (2.12), not only its node's or drive's."""
        return self.block_exports or "nbd-server-add.name" in self.features

    @property
    def branches(self) -> bool:
        """What a branch takes: dirty bitmaps that are begun and ended at the instant of a start,
        exported, and joined and removed at one instant, too (4.2)."""
        verbs = ("add", "disable", "merge", "remove")
        at_once = {f"transaction.bitmap-{verb}" for verb in verbs} <= self.features
        exported = {"block-export-add.bitmaps", "nbd-server-add.bitmap"} & self.features
        return at_once and bool(exported) and self.block_graph

    def guards(self, filtered: bool) -> bool:
        """A disk without a branch gets a bitmap for the time of its backup; FILTERED: where it has
        a filter of its own (SNAPSHOT_LOAD)."""
        defects = (SNAPSHOT_LOAD, SNAPSHOT_LOAD_BELOW) if filtered else (SNAPSHOT_LOAD,)
        loads = "snapshot-load" in self.commands
        return loads and self.branches and any(one.affects(self.version) for one in defects)

    @property
    def max_connections(self) -> bool:
        """The NBD server can be told how many clients to serve (5.2); before it serves any."""
        return "nbd-server-start.max-connections" in self.features

    def gives_way(self, engine: Engine) -> bool:
        """Whether this QEMU can be made to give away disks in the middle of a backup by ENGINE
        (``backup.BackupPlan.give_way_commands``): seen on 7.2.22, 10.0.13 and 11.1.3, in each with
        the engine that is its own. With the classic one it keeps the disk itself then, as the
        overlay over that is left out. 5.2 does without: its migrations ask nothing."""
        since = {"classic": (7, 2, 0), "hybrid": (10, 0, 0)}
        return (
            engine == self.engine
            and self.version >= since[engine]
            and {"blockdev-mirror", "job-cancel"} <= self.commands
        )

    @property
    def refuses_saves(self) -> bool | None:
        """Whether a save, or a migration, fails by a scratch image that is written to, where it is
        not made to give way. None: untried, or there is no guest."""
        if not self.devices or self.version < (5, 2, 0):
            return None
        return self.version >= (6, 0, 0)

    @property
    def devices(self) -> bool:
        """There is a guest with devices; qemu-storage-daemon has only nodes."""
        return "query-status" in self.commands

    @property
    def block_graph(self) -> bool:
        """The block graph can be asked for."""
        return "x-debug-query-block-graph" in self.commands

    @property
    def nbd_stop_is_safe(self) -> bool:
        """This QEMU survives nbd-server-stop while a client is still in the handshake."""
        return not any(defect.affects(self.version) for defect in (NBD_STOP_HANG, NBD_STOP_CRASH))

    @property
    def frees_beside_stuck_clients(self) -> bool:
        """This QEMU lets the guest write freely again while a client of ours does not read."""
        return not NBD_STUCK_END.affects(self.version)

    @property
    def named_nodes_are_always_safe(self) -> bool:
        """This QEMU survives query-named-block-nodes whichever jobs it has."""
        crashes = (NAMED_NODES_CRASH, STREAM_CRASH, CREATE_CRASH)
        return not any(defect.affects(self.version) for defect in crashes)

    def jobs_against_named_nodes(self, jobs: Iterable[monitor_json.Job]) -> list[monitor_json.Job]:
        """Those of JOBS for which this QEMU need not survive query-named-block-nodes. A stream job
        may have ended by the time it is asked."""
        ended = NAMED_NODES_CRASH.affects(self.version)
        streams = STREAM_CRASH.affects(self.version)
        creates = CREATE_CRASH.affects(self.version)
        return [
            job
            for job in jobs
            if (ended and job.type == "backup" and job.status == "concluded")
            or (streams and job.type == "stream")
            or (creates and job.type == "create" and job.status != "concluded")
        ]

    def engine_beside_iothreads(self, iothreads: bool) -> Engine:
        """As ``engine``, where disks run, or may run, in IOTHREADS."""
        return "classic" if iothreads and self.aborts_in_iothreads else self.engine

    @property
    def aborts_in_iothreads(self) -> bool:
        """This process does not survive the hybrid engine on a node that runs in an iothread."""
        return not self.devices and INSERT_NODE_ABORT.affects(self.version)

    def check_engine(self, engine: Engine) -> None:
        """Raise VIR_ERR_OPERATION_UNSUPPORTED when ENGINE is not right on this QEMU."""
        if engine == "hybrid" and self.engine != "hybrid":
            wrong = SNAPSHOT_ACCESS_WRONG.affects(self.version)
            why = SNAPSHOT_ACCESS_WRONG.evidence if wrong else "it has no snapshot-access"
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"the hybrid engine is not for QEMU {dotted(self.version)}: {why}",
            )

    def check_tls(self, kind: str, unix: bool) -> None:
        """Raise VIR_ERR_OPERATION_UNSUPPORTED where this QEMU's NBD server cannot go by objects of
        KIND, or not on a UNIX socket. Of one whose objects have no schema, only it knows the kinds.
        """
        made = self.wraps_properties or f"object-add.{kind}" in self.features
        commands = {"object-add", "object-del", "qom-list"} <= self.commands
        if not (made and commands and "nbd-server-start.tls-creds" in self.features):
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"QEMU {dotted(self.version)} has no TLS for exports by {kind}",
            )
        if unix and TLS_INET_ONLY.affects(self.version):
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"QEMU {dotted(self.version)} has no TLS for exports on a unix socket:"
                f" {TLS_INET_ONLY.evidence}",
            )

    def check_backup(self) -> None:
        """Raise VIR_ERR_OPERATION_UNSUPPORTED when this QEMU has no way to a pull backup."""
        if missing := self._missing():
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
                f"QEMU {dotted(self.version)} has no {' and no '.join(missing)}",
            )

    def _missing(self) -> list[str]:
        """What a pull backup cannot do without; of alternatives the newest."""
        has = {
            "query-qmp-schema": "query-qmp-schema" in self.commands,
            "blockdev-add": "blockdev-add" in self.commands,
            "blockdev-del": bool({"blockdev-del", "x-blockdev-del"} & self.commands),
            "blockdev-backup in a transaction": "transaction.blockdev-backup" in self.features,
            "query-jobs": self.query_jobs or "query-block-jobs" in self.commands,
            "nbd-server-start": {"nbd-server-start", "nbd-server-stop"} <= self.commands,
            "block-export-add": self.block_exports or "nbd-server-add" in self.commands,
        }
        return [name for name, there in has.items() if not there]


def dotted(version: Version) -> str:
    """As people write versions."""
    return ".".join(map(str, version))


def parse_features(reply: Any) -> frozenset[str]:
    """Those of FEATURES that a ``query-qmp-schema`` reply has. Errors: qmp.ProtocolError."""
    try:
        entities = {str(entity["name"]): entity for entity in reply}
        return frozenset(name for name, path in FEATURES.items() if _has(entities, path))
    except (KeyError, TypeError, AttributeError, RecursionError) as failure:
        raise qmp.ProtocolError(f"unexpected schema: {failure!r:.200}") from failure


def _has(entities: Mapping[str, Any], path: str) -> bool:
    command, *steps = path.split("/")
    if command not in entities:
        return False
    types = [entities[command]["arg-type"]]
    for step in steps:
        objects = [found for type in types for found in _objects(entities, type)]
        if step.startswith("+"):
            cases = (case for found in objects for case in found.get("variants", ()))
            types = [case["type"] for case in cases if case["case"] == step[1:]]
        else:
            members = (member for found in objects for member in found["members"])
            types = [member["type"] for member in members if member["name"] == step]
    return bool(types)


def _objects(entities: Mapping[str, Any], type: str) -> list[Mapping[str, Any]]:
    """The object types that a value of TYPE may be of, or be a list of."""
    entity = entities[type]
    match entity["meta-type"]:
        case "object":
            return [entity]
        case "array":
            return _objects(entities, entity["element-type"])
        case "alternate":
            return [o for member in entity["members"] for o in _objects(entities, member["type"])]
    return []
