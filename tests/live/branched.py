# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups in branches, and a client that lives by them.

The client keeps its last good copy of every disk. From an incremental backup it reads what is told
to have changed and nothing else, puts it over that copy, and must have the whole frozen disk then:
which it reads too, to see. A change that is missing from a branch's bitmap cannot hide from it.
"""

import contextlib
import dataclasses
import json
import pathlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence

import nbd

import virtbackup
from tests.live import machines
from virtbackup.conf import backup_conf, domain_conf

SIZE = 4 << 20
CLUSTER = 64 << 10
ZERO = 2
"""Of a ``base:allocation`` extent: it reads as zeroes."""


@dataclasses.dataclass(frozen=True)
class Changes:
    """What an export tells of one disk."""

    dirty: tuple[tuple[int, int], ...]
    """(offset, length) of what has changed since the branch's point, in order, joined."""
    zero: frozenset[int]
    """Clusters that read as zeroes by ``base:allocation``."""

    def clusters(self, size: int = CLUSTER) -> set[int]:
        """The clusters of SIZE bytes that have changed, as a whole."""
        found = set()
        for offset, length in self.dirty:
            assert offset % size == 0, (offset, size)
            found |= set(range(offset // size, -(-(offset + length) // size)))
        return found


@contextlib.contextmanager
def connected(socket: pathlib.Path, export: str, *contexts: str) -> Iterator[nbd.NBD]:
    """A client of EXPORT that asked for metadata CONTEXTS and got all of them."""
    handle = nbd.NBD()
    for context in contexts:
        handle.add_meta_context(context)
    handle.set_export_name(export)
    handle.connect_unix(str(socket))
    for context in contexts:
        assert handle.can_meta_context(context), context
    yield handle
    handle.shutdown()


def whole(socket: pathlib.Path, export: str) -> bytes:
    """All of an export."""
    with connected(socket, export) as handle:
        size = handle.get_size()
        return b"".join(handle.pread(min(1 << 20, size - at), at) for at in range(0, size, 1 << 20))


def changes(socket: pathlib.Path, export: str, branch: str) -> Changes:
    """What EXPORT says of changes and of zeroes, both by the same client."""
    bitmap = f"qemu:dirty-bitmap:{branch}"
    told: dict[str, list[tuple[int, int, int]]] = {bitmap: [], "base:allocation": []}

    def extents(context: str, offset: int, entries: list[int], error: object) -> int:
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            told[context].append((offset, length, flags))
            offset += length
        return 0

    with connected(socket, export, *told) as handle:
        size = handle.get_size()
        for at in range(0, size, CLUSTER):
            handle.block_status(min(CLUSTER, size - at), at, extents)
    zero = {at // CLUSTER for at, _, flags in told["base:allocation"] if flags & ZERO}
    return Changes(tuple(_joined(told[bitmap])), frozenset(zero))


def _joined(extents: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """The dirty ones of EXTENTS, which may be told several times over, each end to end."""
    begin = end = -1
    for offset, length, flags in sorted(extents):
        if not flags & 1:
            continue
        if offset > end:
            if end > begin:
                yield begin, end - begin
            begin = offset
        end = max(end, offset + length)
    if end > begin:
        yield begin, end - begin


def patched(copy: bytes, socket: pathlib.Path, export: str, told: Changes) -> bytes:
    """COPY, with what has changed read anew, and nothing else."""
    new = bytearray(copy)
    with connected(socket, export) as handle:
        for offset, length in told.dirty:
            length = min(length, handle.get_size() - offset)
            new[offset : offset + length] = handle.pread(length, offset)
    return bytes(new)


_CONNECTIONS = contextlib.ExitStack()
close = _CONNECTIONS.close
"""Ends the connections of all clients, as every test has to."""


@dataclasses.dataclass
class Client:
    """Backs up the machine in DIRECTORY; its QEMU may come and go."""

    directory: pathlib.Path
    uri: str
    copies: dict[tuple[str, str], bytes] = dataclasses.field(default_factory=dict)
    """(branch, disk) -> the last good copy."""
    pending: dict[tuple[str, str], bytes] = dataclasses.field(default_factory=dict)
    """Those that will be good if the stop says so."""
    stamp: int = 0
    _connection: virtbackup.Connection | None = None

    @property
    def socket(self) -> pathlib.Path:
        return self.directory / "nbd.sock"

    @contextlib.contextmanager
    def domain(self) -> Iterator[virtbackup.Domain]:
        """By a connection that stays, or each call would learn anew what QEMU can do."""
        if self._connection is None:
            self._connection = _CONNECTIONS.enter_context(virtbackup.open(self.uri))
        [domain] = self._connection.listAllDomains()
        yield domain

    def document(
        self,
        branch: str | None = "b",
        type: backup_conf.DiskType = "auto",
        disks: Sequence[str] = ("vda",),
        granularity: int | Mapping[str, int] | None = None,
        **types: backup_conf.DiskType,
    ) -> str:
        """DISKS of TYPE, or of that which is in TYPES; no other disk."""
        sizes = granularity if isinstance(granularity, Mapping) else {}
        one = granularity if isinstance(granularity, int) else None
        known = [target for target in self._targets() if target not in disks]
        wanted = [
            backup_conf.BackupDiskDef(
                name, type=types.get(name, type), granularity=sizes.get(name, one)
            )
            for name in disks
        ]
        wanted += [backup_conf.BackupDiskDef(name, present=False) for name in known]
        address = backup_conf.UnixAddress(str(self.socket))
        return backup_conf.BackupDef(address, tuple(wanted), branch).format()

    def _targets(self) -> list[str]:
        with self.domain() as domain:
            found = domain_conf.DomainDef.parse(domain.XMLDesc())
        return [disk.target for disk in found.disks]

    def start(
        self,
        branch: str | None = "b",
        type: backup_conf.DiskType = "auto",
        disks: Sequence[str] = ("vda",),
        granularity: int | Mapping[str, int] | None = None,
        **types: backup_conf.DiskType,
    ) -> backup_conf.BackupInfo:
        """Start; what backupGetInfo says then."""
        xml = self.document(branch, type, disks, granularity, **types)
        with self.domain() as domain:
            domain.backupStart(xml)
            return domain.backupGetInfo()

    def read(self, branch: str = "b") -> dict[str, Changes]:
        """Copy the disks of the running backup: whole, or what has changed where that is told. Disk
        -> its changes. Fails where copy and changes do not make the disk."""
        with self.domain() as domain:
            info = domain.backupGetInfo()
        found = {}
        for disk in info.disks:
            now = whole(self.socket, disk.export)
            if disk.type == "incremental":
                told = changes(self.socket, disk.export, branch)
                copy = patched(self.copies[branch, disk.name], self.socket, disk.export, told)
                missing = differing(copy, now)
                assert not missing, f"{disk.name}: changes of clusters {missing} are not told"
                found[disk.name] = told
            self.pending[branch, disk.name] = now
        return found

    def stop(self, cancel: bool = False) -> None:
        """Stop; where that is good, what was read is the last good copy."""
        pending, self.pending = self.pending, {}
        with self.domain() as domain:
            domain.backupStop(virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL if cancel else 0)
        if not cancel:
            self.copies.update(pending)

    def backup(
        self,
        branch: str = "b",
        type: backup_conf.DiskType = "auto",
        disks: Sequence[str] = ("vda",),
        granularity: int | Mapping[str, int] | None = None,
        **types: backup_conf.DiskType,
    ) -> dict[str, Changes]:
        """A whole backup, start to stop; what changed on the disks that were incremental."""
        self.start(branch, type, disks, granularity, **types)
        found = self.read(branch)
        self.stop()
        return found

    def write(self, machine: machines.Machine, disk: str, *clusters: int) -> None:
        """Let the guest write what was never there before."""
        for cluster in clusters:
            self.stamp = self.stamp % 255 + 1
            machine.io(disk, f"write -P {self.stamp} {cluster * CLUSTER} {CLUSTER}")

    def branches(self) -> dict[tuple[str, str], backup_conf.BranchDisk]:
        """(branch, disk) -> what branchList says; foreign ones left out."""
        with self.domain() as domain:
            return {
                (branch.name, disk.name): disk
                for branch in domain.branchList()
                if not branch.foreign
                for disk in branch.disks
            }

    def foreign(self) -> dict[tuple[str, str], backup_conf.BranchDisk]:
        """The same of foreign ones."""
        with self.domain() as domain:
            return {
                (branch.name, disk.name): disk
                for branch in domain.branchList()
                if branch.foreign
                for disk in branch.disks
            }

    def refusal(self, type: backup_conf.DiskType = "incremental", branch: str = "b") -> str:
        """Why a start is refused, before which nothing of QEMU was touched."""
        try:
            self.start(branch, type)
        except virtbackup.Error as failure:
            return str(failure)
        raise AssertionError("not refused")

    def refused_then_full(self, reason: str) -> None:
        """An incremental backup of vda is refused for REASON by name, and ``auto`` is full, saying
        it; the branch goes on from there."""
        assert f"disk 'vda': {reason}" in self.refusal()
        [disk] = self.start().disks
        assert disk.type == "full"
        assert reason in str(disk.type_reason)
        with self.domain() as domain:
            [told] = [
                disk
                for disk in backup_conf.BackupDef.parse(domain.backupGetXMLDesc()).disks
                if disk.present
            ]
        assert (told.type, told.reason) == ("full", disk.type_reason)
        self.read()
        self.stop()


def differing(one: bytes, other: bytes) -> list[int]:
    """The clusters in which two disks differ."""
    ends = range(0, max(len(one), len(other)), CLUSTER)
    return [at // CLUSTER for at in ends if one[at : at + CLUSTER] != other[at : at + CLUSTER]]


def bitmaps(machine: machines.Machine, node: str = "A") -> dict[str, dict[str, object]]:
    """The bitmaps of a node."""
    nodes = {item["node-name"]: item for item in machine.probe("query-named-block-nodes")}
    return {item["name"]: item for item in nodes[node].get("dirty-bitmaps", ()) if "name" in item}


def ours(machine: machines.Machine, node: str = "A") -> set[str]:
    """What kind of bitmap of ours, besides those of a branch's own name, NODE has."""
    kinds = set()
    for name in bitmaps(machine, node):
        if name.startswith("virtbackup-"):
            kinds.add("next" if "-next-" in name else name.split("-")[1])
    return kinds


def stored(path: pathlib.Path) -> dict[str, object]:
    """The bitmaps in a qcow2 image that no QEMU has open: name -> its flags."""
    argv = ["qemu-img", "info", "--output=json", str(path)]
    done = subprocess.run(argv, check=True, capture_output=True)
    data = json.loads(done.stdout)["format-specific"]["data"]
    return {item["name"]: item for item in data.get("bitmaps", ())}
