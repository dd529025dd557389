# SPDX-License-Identifier: LGPL-2.1-or-later
"""Branches on a real QEMU: what an incremental backup tells is what has changed, whatever happened
to guest, images and bitmaps in between; or it is refused by disk and reason, and ``auto`` is full.

Every incremental backup here is read as ``branched.Client`` reads: a change that is missing is an
error, without a word about it in the test.
"""

import contextlib
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import libvirt
import pytest

import virtbackup
from tests import waiting
from tests.live import branched, machines, places, scene, steps
from tests.live.branched import CLUSTER, SIZE, Client
from virtbackup.conf import backup_conf
from virtbackup.qemu import block, branch, capabilities, domain, naming, process, starting, verdict

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

ENGINES = machines.engines()
FIRST = "it has no good backup of this branch yet"
CLUSTERS = SIZE // CLUSTER


def images(directory: pathlib.Path) -> None:
    machines.image(directory / "a.qcow2", SIZE, "qcow2")
    machines.image(directory / "b.raw", SIZE)


@contextlib.contextmanager
def running(directory: pathlib.Path, *extra: str) -> Iterator[machines.Machine]:
    """A QEMU with the images in DIRECTORY, which quits in the end as with a guest's shutdown."""
    argv = [word.replace("node-name=", "discard=unmap,node-name=", 1)
            for word in machines.two_disks_of(directory)]  # fmt: skip
    with machines.qemu(directory, *argv, *extra) as machine:
        yield machine
        quit(machine)


def quit(machine: machines.Machine) -> None:
    """As when the guest has shut down."""
    if machine.process.poll() is None:
        machine.probe("quit")
        machine.process.wait(waiting.DEADLINE)


def client(directory: pathlib.Path, engine: str = ENGINES[0]) -> Client:
    return Client(directory, f"qmp://{directory}/qmp.sock?engine={engine}")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    branched.close()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    images(tmp_path)
    with running(tmp_path) as one:
        yield one


# --- what is told ---------------------------------------------------------------------------------


def test_an_incremental_tells_exactly_what_was_written(
    tmp_path: pathlib.Path, machine: machines.Machine, engine: str
) -> None:
    one = client(tmp_path, engine)
    both = ("vda", "sdb")
    for disk in both:
        machine.io(disk, f"write -P 9 0 {SIZE // 2}")
    [vda, sdb] = one.start(disks=both).disks
    assert (vda.type, vda.type_reason, vda.since, vda.dirty) == ("full", FIRST, None, None)
    one.write(machine, "vda", 1)  # already of the next one
    one.read()
    one.stop()
    first = one.branches()["b", "vda"].point
    assert first is not None
    one.write(machine, "vda", 3, 4, 40)
    machine.io("vda", f"write -z {6 * CLUSTER} {CLUSTER}")
    machine.io("vda", f"discard {8 * CLUSTER} {2 * CLUSTER}")
    one.write(machine, "sdb", 63)
    info = one.start(type="incremental", disks=both)
    one.write(machine, "vda", 20)
    one.write(machine, "sdb", 63, 3)
    told = one.read()
    assert told["vda"].clusters() == {1, 3, 4, 40, 6, 8, 9}
    assert told["vda"].zero >= {6, 8, 9} | set(range(CLUSTERS // 2, 40))
    assert not told["vda"].zero & {1, 3, 4, 40, 7}
    assert told["sdb"].clusters() == {63}
    [vda, sdb] = info.disks
    assert (vda.type, vda.type_reason, vda.since) == ("incremental", None, first)
    assert (vda.dirty, sdb.dirty) == (7 * CLUSTER, CLUSTER)
    one.stop()
    assert one.backup(disks=both)["vda"].clusters() == {20}
    second = one.branches()["b", "vda"].point
    assert second is not None
    assert second.id != first.id
    told = one.backup(type="incremental", disks=both)
    assert {disk: changed.dirty for disk, changed in told.items()} == {"vda": (), "sdb": ()}
    assert branched.ours(machine) == branched.ours(machine, "B")
    assert "next" not in branched.ours(machine)


def test_why_auto_is_what_it_is(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    one = client(tmp_path)
    one.backup()
    point = one.branches()["b", "vda"].point
    assert point is not None
    one.start()
    with one.domain() as domain:
        live = backup_conf.BackupDef.parse(domain.backupGetXMLDesc())
        info = domain.backupGetInfo()
    [vda] = [disk for disk in live.disks if disk.present]
    assert vda.type == "incremental"
    assert vda.reason == f"its changes since the backup '{point.id}' are known"
    assert vda.granularity == CLUSTER
    assert live.branch == info.branch == "b"
    assert info.disks[0].type_reason == vda.reason
    assert info.disks[0].since == point
    one.stop(cancel=True)


def test_a_disk_that_is_new_is_full_while_the_others_are_not(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    one.backup()
    add_disk(machine, tmp_path, new=True)
    three = ("vda", "sdb", "sdc")
    one.write(machine, "vda", 5)
    with pytest.raises(virtbackup.Error) as refused:
        one.start(type="incremental", disks=three)
    assert refused.value.get_error_code() == virtbackup.errors.CHECKPOINT_INCONSISTENT
    assert f"disk 'sdb': {FIRST}; disk 'sdc': {FIRST}" in str(refused.value)
    assert "vda" not in str(refused.value)
    types = {disk.name: disk.type for disk in one.start(disks=three).disks}
    assert types == {"vda": "incremental", "sdb": "full", "sdc": "full"}
    assert one.read()["vda"].clusters() == {5}
    one.stop()
    one.write(machine, "sdc", 6)
    told = one.backup(type="incremental", disks=three)
    assert {disk: changed.clusters() for disk, changed in told.items()} == {
        "vda": set(), "sdb": set(), "sdc": {6},
    }  # fmt: skip


def test_a_disk_left_out_keeps_its_own_point(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    both = ("vda", "sdb")
    one.backup(disks=both)
    one.write(machine, "vda", 1)
    one.write(machine, "sdb", 2)
    one.backup(disks=("vda",))
    points = {disk: told.point for (_, disk), told in one.branches().items()}
    assert points["vda"] != points["sdb"]
    told = one.backup(type="incremental", disks=both)
    assert told["vda"].clusters() == set()
    assert told["sdb"].clusters() == {2}


# --- ends that are not good -----------------------------------------------------------------------


def test_a_cancelled_backup_leaves_the_point(
    tmp_path: pathlib.Path, machine: machines.Machine, engine: str
) -> None:
    one = client(tmp_path, engine)
    one.start()
    one.stop(cancel=True)
    assert FIRST in one.refusal()
    assert branched.bitmaps(machine) == {}
    one.backup()
    before = one.branches()
    for type in ("incremental", "full"):
        one.write(machine, "vda", 10)
        one.start(type=type)
        one.write(machine, "vda", 11)
        one.read()
        one.stop(cancel=True)
        assert one.branches()["b", "vda"].point == before["b", "vda"].point
    one.write(machine, "vda", 12)
    assert one.backup(type="incremental")["vda"].clusters() == {10, 11, 12}


def test_a_job_cancelled_by_somebody_else_leaves_the_point(
    tmp_path: pathlib.Path, machine: machines.Machine, engine: str
) -> None:
    one = client(tmp_path, engine)
    both = ("vda", "sdb")
    one.backup(disks=both)
    points = {key: told.point for key, told in one.branches().items()}
    one.write(machine, "sdb", 1)
    one.start(disks=both)
    one.write(machine, "vda", 2)
    [job, _] = sorted(job["id"] for job in machine.probe("query-jobs"))
    machine.probe("job-cancel", id=job)
    with pytest.raises(virtbackup.Error, match="disk 'vda': its backup job"):
        one.stop()
    assert {key: told.point for key, told in one.branches().items()} == points
    told = one.backup(type="incremental", disks=both)
    assert (told["vda"].clusters(), told["sdb"].clusters()) == ({2}, {1})


@pytest.mark.needs("mount")
def test_a_scratch_image_that_is_full_leaves_the_point(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    space = tmp_path / "space"
    space.mkdir()
    with places.small_file_system(space, 16 << 20) as scratch:
        monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", str(scratch))
        with scene.scene(tmp_path, scratch, engine) as there:
            one = Client(tmp_path, there.uri)
            one.backup()
            point = one.branches()["b", "vda"].point
            with contextlib.ExitStack() as watched:
                connection = watched.enter_context(virtbackup.open(there.uri))
                [domain] = connection.listAllDomains()
                domain.backupStart(one.document())
                with scene.full(there):
                    for cluster in range(0, 100, 4):
                        there.write("vda", cluster, 4)
                    if engine == "classic" or machines.version() < (10, 1, 0):
                        scene.wait_until_given_up(there)
                with pytest.raises(virtbackup.Error, match="disk 'vda'"):
                    domain.backupStop()
            assert one.branches()["b", "vda"].point == point
            there.write("vda", 120)
            assert 120 in one.backup(type="incremental")["vda"].clusters()


def test_a_disk_unplugged_in_the_middle(
    tmp_path: pathlib.Path, machine: machines.Machine, engine: str
) -> None:
    one = client(tmp_path, engine)
    add_disk(machine, tmp_path, new=True)
    one.backup(disks=("sdc",))
    one.write(machine, "sdc", 1)
    one.start(disks=("sdc",))
    one.write(machine, "sdc", 2)
    machine.probe("device_del", id="sdc")
    machine.probe.wait_event("DEVICE_DELETED")
    with pytest.raises(virtbackup.Error, match="disk 'sdc': the disk was unplugged"):
        one.stop()
    flags = branched.stored(tmp_path / "c.qcow2")
    assert "b" in flags
    assert not any("-next-" in name for name in flags)
    add_disk(machine, tmp_path, new=False)
    assert one.backup(type="incremental", disks=("sdc",))["sdc"].clusters() == {1, 2}


def add_disk(machine: machines.Machine, directory: pathlib.Path, *, new: bool) -> None:
    """Plug sdc in, NEW or as it was."""
    path = directory / "c.qcow2"
    if new:
        machines.image(path, SIZE, "qcow2")
    file = {"driver": "file", "filename": str(path)}
    done = machine.probe.exactly(
        "blockdev-add", {"driver": "qcow2", "node-name": "C", "file": file}
    )
    assert "return" in done, done
    machine.probe("device_add", driver="scsi-hd", drive="C", id="sdc")


def test_a_job_of_somebody_else_that_has_ended_and_is_still_there(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    """Some QEMUs must not be asked for their nodes then."""
    one = client(tmp_path)
    one.backup()
    for name in ("X", "Y"):
        arguments = {"driver": "null-co", "node-name": name, "size": CLUSTER, "read-zeroes": True}
        machine.probe.exactly("blockdev-add", arguments)
    info = one.start()
    one.write(machine, "vda", 1)
    job = {"job_id": "theirs", "device": "X", "target": "Y", "sync": "full"}
    machine.probe("blockdev-backup", auto_dismiss=False, **job)
    machine.probe.wait_event("BLOCK_JOB_COMPLETED")
    one.read()
    if machines.version() < (7, 2, 0):
        with pytest.raises(virtbackup.Error, match="a backup job has ended that nobody has dismi"):
            one.stop()
    else:
        one.stop()
    machine.probe("job-dismiss", id="theirs")
    point = one.branches()["b", "vda"].point
    assert point is not None
    assert (point.id == info.id) == (machines.version() >= (7, 2, 0))
    assert one.backup(type="incremental")["vda"].clusters() == {1}
    assert "next" not in branched.ours(machine)


def test_a_stream_of_somebody_else_that_has_ended_and_is_still_there(
    tmp_path: pathlib.Path, machine: machines.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libvirt's blockpull ends, by one that dismisses the job late, or while we look. Some QEMUs
    must not be asked for their nodes then."""
    monkeypatch.setattr(domain, "STREAM_PATIENCE", 0.2)
    one = client(tmp_path)
    one.backup()
    for name, backing in (("X", None), ("Y", "X")):
        image = machines.image(tmp_path / f"{name}.qcow2", CLUSTER, "qcow2")
        file = {"driver": "file", "filename": str(image)}
        arguments = {"driver": "qcow2", "node-name": name, "file": file, "backing": backing}
        machine.probe.exactly("blockdev-add", arguments)
    one.start()
    one.write(machine, "vda", 1)
    one.read()
    hanging = verdict.hanging

    def late(*given: Any) -> frozenset[str]:
        machine.probe("block-stream", job_id="theirs", device="Y", auto_dismiss=False)
        machine.probe.wait_event("BLOCK_JOB_COMPLETED")
        return hanging(*given)

    with one.domain() as dom:
        with monkeypatch.context() as patch:
            patch.setattr(verdict, "hanging", late)
            assert dom.backupGetInfo().state == "running"
        assert dom.backupGetInfo().state == "running"
    if capabilities.STREAM_CRASH.affects(machines.version()):
        with pytest.raises(virtbackup.Error, match="job 'theirs' is not over"):
            one.branches()
        with pytest.raises(virtbackup.Error, match="its last point: job 'theirs' is not over"):
            one.stop()
    else:
        one.branches()
        one.stop()
    machine.probe("job-dismiss", id="theirs")
    assert one.backup(type="incremental")["vda"].clusters() == {1}
    machine.probe("block-stream", job_id="theirs", device="Y", auto_dismiss=False)
    machine.probe.wait_event("BLOCK_JOB_COMPLETED")
    with one.domain() as dom:  # nothing stands in the way of a backup that is of no branch
        for _ in range(2):
            address = f'<address type="unix" path="{tmp_path}/plain.sock"/>'
            dom.backupStart(f"<domainbackup>{address}</domainbackup>")
            dom.backupStop()
    machine.probe("job-dismiss", id="theirs")
    for node in ("A", "B"):
        names = branched.bitmaps(machine, node)
        assert not any(naming.is_guard(name) for name in names)
    assert "next" not in branched.ours(machine)


# --- names and granularities ----------------------------------------------------------------------

NAMES = [
    "nächtlich 夜 🌙",
    "n" * 1023,
    "with  spaces: and, commas=1",
    "qemu:dirty-bitmap:x",
    "-",
    "%s",
]


def test_names(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    one = client(tmp_path)
    for name in NAMES:
        one.backup(branch=name)
    one.write(machine, "vda", 7)
    for name in NAMES:
        assert one.backup(name, "incremental")["vda"].clusters() == {7}, name
    assert {branch for branch, _ in one.branches()} == set(NAMES)
    with one.domain() as domain:
        for name in NAMES:
            domain.branchDelete(name)
    assert branched.bitmaps(machine) == {}


@pytest.mark.parametrize("name", ["", "a/b", "virtbackup-x", "virtbackup-", "n" * 1024, "ä" * 512])
def test_names_refused(tmp_path: pathlib.Path, machine: machines.Machine, name: str) -> None:
    one = client(tmp_path)
    document = one.document("b").replace('branch name="b"', f'branch name="{name}"')
    with one.domain() as domain, pytest.raises(virtbackup.Error) as refused:
        domain.backupStart(document)
    assert refused.value.get_error_code() in (
        libvirt.VIR_ERR_XML_ERROR,
        libvirt.VIR_ERR_XML_INVALID_SCHEMA,
    )


def test_granularities(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    one = client(tmp_path)
    sizes = [512, 4096, 1 << 20, 1 << 31]
    for size in sizes:
        one.backup(f"g{size}", granularity=size)
    machine.io("vda", "write -P 3 1M 512")
    for size in sizes:
        [disk] = one.start(f"g{size}", "incremental", granularity=size).disks
        assert one.branches()[f"g{size}", "vda"].dirty == disk.dirty
        told = one.read(f"g{size}")["vda"]
        begin = (1 << 20) // size * size
        assert told.dirty == ((begin, min(size, SIZE - begin)),)
        assert disk.dirty == told.dirty[0][1]
        one.stop()
        assert one.branches()[f"g{size}", "vda"].granularity == size
    for type in ("full", "incremental", "auto"):
        with pytest.raises(virtbackup.Error) as refused:
            one.start("g4096", type, granularity=8192)
        said = "disk 'vda': the bitmap of branch 'g4096' has granularity 4096, not 8192"
        assert said in str(refused.value)
    assert one.backup("g4096")["vda"].dirty == ()


def test_branches_are_independent(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    one = client(tmp_path)
    both = ("vda", "sdb")
    one.backup("a", disks=both, granularity=4096)
    one.write(machine, "vda", 1)
    one.backup("b", disks=both, granularity=1 << 20)
    one.write(machine, "vda", 17)
    one.backup("c", granularity={"vda": 32768})
    one.write(machine, "vda", 33)
    one.start("b", disks=both)
    one.write(machine, "vda", 50)
    assert one.read("b")["vda"].clusters(1 << 20) == {1, 2}
    one.stop(cancel=True)
    assert one.backup("a", disks=both)["vda"].clusters() == {1, 17, 33, 50}
    with one.domain() as domain:
        domain.branchDelete("a")
    assert one.backup("b", disks=both)["vda"].clusters(1 << 20) == {1, 2, 3}
    assert one.backup("c")["vda"].clusters(32768) == {66, 67, 100, 101}
    assert {key for key in one.branches() if key[0] == "a"} == set()
    assert FIRST in one.refusal(branch="a")


# --- bitmaps of others ----------------------------------------------------------------------------


def test_somebody_elses_bitmaps_are_told_and_never_touched(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    names = ("theirs", "virtbackup-mine", "still", "two\nlines")
    for name in names:
        add_bitmap(machine, "A", name, granularity=4096)
    one.write(machine, "vda", 1)
    machine.probe("block-dirty-bitmap-disable", node="A", name="still")
    before = branched.bitmaps(machine)
    assert set(before) == set(names)
    for type in ("full", "incremental", "auto"):
        refused = one.refusal(type, "theirs")
        assert "disk 'vda' has a bitmap 'theirs' that was made by somebody else" in refused
    with one.domain() as domain:
        for _ in range(2):
            with pytest.raises(virtbackup.Error, match="was made by somebody else"):
                domain.branchDelete("theirs")
    told = one.foreign()
    assert set(told) == {(name, "vda") for name in names}
    assert told["theirs", "vda"].granularity == 4096
    assert told["theirs", "vda"].dirty == CLUSTER
    one.backup()
    one.start()
    one.stop(cancel=True)
    one.backup(type="incremental")
    with one.domain() as domain:
        domain.branchDelete("b")
        domain.backupCleanup()
    assert branched.bitmaps(machine) == before


def test_a_bitmap_of_the_branchs_name_that_somebody_makes_in_the_middle(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    """Of a first backup: the branch has no bitmap of that name yet."""
    one = client(tmp_path)
    one.start()
    add_bitmap(machine, "A", "b")
    one.write(machine, "vda", 1)
    before = branched.bitmaps(machine)["b"]
    with pytest.raises(virtbackup.Error, match=r"branch 'b' stays at its last point: .*made by"):
        one.stop()
    assert branched.bitmaps(machine) == {"b": before}
    assert "made by somebody else" in one.refusal("auto")


def test_a_bitmap_in_use_is_refused(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    one = client(tmp_path)
    one.backup()
    machine.probe("block-dirty-bitmap-disable", node="A", name="b")
    addr = {"type": "unix", "data": {"path": f"{tmp_path}/theirs.sock"}}
    machine.probe("nbd-server-start", addr=addr)
    machine.probe("block-export-add", type="nbd", id="t", node_name="A", name="t", bitmaps=["b"])
    for type in ("full", "auto"):
        assert "disk 'vda': the bitmap 'b' is in use by somebody else" in one.refusal(type)
    machine.probe("nbd-server-stop")
    one.refused_then_full("its bitmap 'b' does not record")
    one.backup(type="incremental")


def add_bitmap(machine: machines.Machine, node: str, name: str, granularity: int = CLUSTER) -> None:
    machine.probe(
        "block-dirty-bitmap-add", node=node, name=name, granularity=granularity, persistent=True
    )


def remove_bitmap(machine: machines.Machine, node: str, name: str) -> None:
    machine.probe("block-dirty-bitmap-remove", node=node, name=name)


def next_bitmap(machine: machines.Machine) -> str:
    [name] = [name for name in branched.bitmaps(machine) if "-next-" in name]
    return name


def point_bitmap(machine: machines.Machine) -> str:
    [name] = [name for name in branched.bitmaps(machine) if name.startswith("virtbackup-point-")]
    return name


@pytest.mark.parametrize("type", ["full", "incremental"])
@pytest.mark.parametrize("cancel", [False, True])
def test_our_next_bitmap_removed_behind_our_back(
    tmp_path: pathlib.Path, machine: machines.Machine, type: backup_conf.DiskType, cancel: bool
) -> None:
    one = client(tmp_path)
    one.backup()
    one.write(machine, "vda", 1)
    one.start(type=type)
    remove_bitmap(machine, "A", next_bitmap(machine))
    one.write(machine, "vda", 2)
    one.read()
    if cancel:
        one.stop(cancel=True)
    else:
        with pytest.raises(virtbackup.Error, match="branch 'b' stays at its last point: disk 'vda"):
            one.stop()
    one.refused_then_full("its bitmap 'b' does not record")
    one.write(machine, "vda", 3)
    assert one.backup(type="incremental")["vda"].clusters() == {3}


@pytest.mark.parametrize("cancel", [False, True])
def test_our_next_bitmap_disabled_behind_our_back(
    tmp_path: pathlib.Path, machine: machines.Machine, cancel: bool
) -> None:
    one = client(tmp_path)
    one.backup()
    one.start()
    machine.probe("block-dirty-bitmap-disable", node="A", name=next_bitmap(machine))
    one.write(machine, "vda", 2)
    one.read()
    if cancel:
        one.stop(cancel=True)
    else:
        with pytest.raises(virtbackup.Error, match="branch 'b' stays at its last point: disk 'vda"):
            one.stop()
    one.refused_then_full("its bitmap 'b' does not record")


def test_our_next_bitmap_removed_from_one_disk_of_two(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    both = ("vda", "sdb")
    one.backup(disks=both)
    point = one.branches()["b", "sdb"].point
    one.start(disks=both)
    remove_bitmap(machine, "A", next_bitmap(machine))
    one.write(machine, "sdb", 2)
    with pytest.raises(virtbackup.Error, match="stays at its last point: disk 'vda'"):
        one.stop()
    assert one.branches()["b", "sdb"].point == point
    assert "disk 'vda': its bitmap 'b' does not record" in one.refusal()
    assert one.backup(disks=("sdb",), type="incremental")["sdb"].clusters() == {2}


def test_the_branchs_own_bitmap_removed_behind_our_back(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    one.backup()
    remove_bitmap(machine, "A", "b")
    one.refused_then_full("its bitmap 'b' was removed")
    # In the middle: nobody can while it is exported, but in a full backup it is not.
    one.start(type="incremental")
    reply = machine.probe.reply("block-dirty-bitmap-remove", node="A", name="b")
    if capabilities.BUSY_BITMAP_ABORT.affects(machines.version()):  # its copy is exported
        with pytest.raises(virtbackup.Error, match="branch 'b' stays at its last point"):
            one.stop()
        one.refused_then_full("its bitmap 'b' was removed")
    else:
        assert "in use" in reply["error"]["desc"]
        one.stop(cancel=True)
    for cancel in (True, False):
        one.start(type="full")
        remove_bitmap(machine, "A", "b")
        one.write(machine, "vda", 3)
        one.read()
        if cancel:
            one.stop(cancel=True)
        else:
            with pytest.raises(virtbackup.Error, match="branch 'b' stays at its last point"):
                one.stop()
        one.refused_then_full("its bitmap 'b' was removed")


def test_the_branchs_own_bitmap_replaced_in_the_middle(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    one.backup()
    one.write(machine, "vda", 1)
    one.start(type="full")
    remove_bitmap(machine, "A", "b")
    add_bitmap(machine, "A", "b")
    one.write(machine, "vda", 2)
    one.read()
    one.stop(cancel=True)
    one.refused_then_full("its last good backup is not known any more")


def test_the_point_removed_behind_our_back(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    one.backup()
    remove_bitmap(machine, "A", point_bitmap(machine))
    one.refused_then_full("its last good backup is not known any more")
    # In the middle it does not matter: a good end sets another one.
    one.start()
    remove_bitmap(machine, "A", point_bitmap(machine))
    one.write(machine, "vda", 4)
    one.read()
    one.stop()
    assert one.backup(type="incremental")["vda"].clusters() == {4}


# --- the guest ends and comes again ---------------------------------------------------------------


def test_a_guest_shut_down_and_started_again(tmp_path: pathlib.Path, engine: str) -> None:
    images(tmp_path)
    one = client(tmp_path, engine)
    with running(tmp_path) as machine:
        one.backup()
        one.write(machine, "vda", 1)
    with running(tmp_path) as machine:
        one.write(machine, "vda", 2)
        assert one.backup(type="incremental")["vda"].clusters() == {1, 2}
        one.write(machine, "vda", 3)
        one.start()
        one.write(machine, "vda", 4)
        one.read()
    # Ended in the middle of a backup: it is not good, and nothing of it stays.
    with running(tmp_path) as machine:
        assert branched.ours(machine) >= {"next"}
        one.write(machine, "vda", 5)
        with pytest.raises(virtbackup.Error, match="disk 'vda': the domain was restarted"):
            one.stop()
        assert "next" not in branched.ours(machine)
        one.start()
        one.write(machine, "vda", 6)
    with running(tmp_path) as machine:
        one.write(machine, "vda", 7)
        assert one.backup(type="incremental")["vda"].clusters() == {3, 4, 5, 6, 7}
        one.start(type="full")
    with running(tmp_path) as machine:
        with one.domain() as domain:
            assert any("next" in line for line in domain.backupCleanup())
        assert one.backup(type="incremental")["vda"].clusters() == set()


def test_a_first_backup_during_which_the_guest_ends(tmp_path: pathlib.Path) -> None:
    images(tmp_path)
    one = client(tmp_path)
    with running(tmp_path):
        one.start()
    with running(tmp_path) as machine:
        assert FIRST in one.refusal()
        assert branched.bitmaps(machine) == {}


def test_qemu_killed(tmp_path: pathlib.Path) -> None:
    """A bitmap that was there when the image was opened is inconsistent then; one that was not is
    not there, and its branch has never been."""
    images(tmp_path)
    one = client(tmp_path)
    inconsistent = "its bitmap 'b' is inconsistent: QEMU did not come to store it"
    with running(tmp_path) as machine:
        one.backup()
        machine.kill()
    with running(tmp_path):
        one.refused_then_full(FIRST)
    for happens in ("at rest", "after a good backup", "in the middle", "after a full one"):
        with running(tmp_path) as machine:
            one.write(machine, "vda", 1)
            if happens == "after a good backup":
                one.backup(type="incremental")
            elif happens == "after a full one":
                one.backup(type="full")
            elif happens == "in the middle":
                one.start()
            machine.kill()
        with running(tmp_path) as machine:
            if happens == "in the middle":
                with pytest.raises(virtbackup.Error, match="the domain was restarted"):
                    one.stop()
            assert one.branches()["b", "vda"].reason == inconsistent
            one.refused_then_full(inconsistent)
            one.write(machine, "vda", 2)
            assert one.backup(type="incremental")["vda"].clusters() == {2}, happens


def test_qemu_killed_and_the_bitmap_made_anew_by_hand(tmp_path: pathlib.Path) -> None:
    images(tmp_path)
    one = client(tmp_path)
    with running(tmp_path):
        one.backup()
    with running(tmp_path) as machine:
        one.write(machine, "vda", 1)
        machine.kill()
    with running(tmp_path) as machine:
        remove_bitmap(machine, "A", "b")
        add_bitmap(machine, "A", "b")
        one.refused_then_full("its bitmap 'b' was made after QEMU did not come to store another")


def test_qemu_killed_and_the_branch_deleted(tmp_path: pathlib.Path) -> None:
    images(tmp_path)
    one = client(tmp_path)
    with running(tmp_path):
        one.backup()
    with running(tmp_path) as machine:
        one.backup()
        machine.kill()
    with running(tmp_path) as machine:
        with one.domain() as domain:
            domain.branchDelete("b")
        assert branched.bitmaps(machine) == {}
        one.refused_then_full(FIRST)


def test_a_stop_that_was_killed_is_ended_after_the_guest_came_again(
    tmp_path: pathlib.Path,
) -> None:
    """The node has another name then, where QEMU gives it one."""
    images(tmp_path)
    one = client(tmp_path)
    drive = ("-drive", f"if=none,id=a,format=qcow2,file={tmp_path}/a.qcow2",
             "-device", "virtio-blk,drive=a,id=vda")  # fmt: skip
    other = ("-blockdev", f"qcow2,node-name=new,file.driver=file,file.filename={tmp_path}/a.qcow2",
             "-device", "virtio-blk,drive=new,id=vda")  # fmt: skip
    with machines.qemu(tmp_path, *drive) as machine:
        one.backup()
        one.write(machine, "vda", 1)
        info = one.start()
        one.read()
        judged(tmp_path)
        quit(machine)
    with machines.qemu(tmp_path, *other) as machine:
        one.write(machine, "vda", 2)
        one.stop()
        point = one.branches()["b", "vda"].point
        assert point is not None
        assert point.id == info.id
        assert one.backup(type="incremental")["vda"].clusters() == {2}


def judged(directory: pathlib.Path) -> None:
    """As a stop leaves it that is killed once it has found the backup good."""
    [path] = scene.state_files()
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "phase": "stopping", "verdict": {}}))


# --- images that change ---------------------------------------------------------------------------


def test_a_disk_resized(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    one = client(tmp_path)
    one.backup()
    machine.probe("block_resize", node_name="A", size=2 * SIZE)
    one.refused_then_full(f"it was resized from {SIZE} to {2 * SIZE} bytes")
    one.write(machine, "vda", CLUSTERS + 3)
    assert one.backup(type="incremental")["vda"].clusters() == {CLUSTERS + 3}


def snapshot(
    machine: machines.Machine,
    directory: pathlib.Path,
    *bitmaps: str,
    disabled: Sequence[str] = (),
) -> None:
    """An overlay over A, and in the same transaction BITMAPS on it, as libvirt does it; those that
    are DISABLED record nothing."""
    machines.image(directory / "over.qcow2", SIZE, "qcow2", backing=directory / "a.qcow2")
    over = {"driver": "qcow2", "node-name": "over", "backing": None,
            "file": {"driver": "file", "filename": f"{directory}/over.qcow2"}}  # fmt: skip
    done = machine.probe.exactly("blockdev-add", over)
    assert "return" in done, done
    actions: list[dict[str, Any]] = [
        {"type": "blockdev-snapshot", "data": {"node": "A", "overlay": "over"}}
    ]
    actions += [
        {"type": "block-dirty-bitmap-add",
         "data": {"node": "over", "name": name, "persistent": True, "granularity": CLUSTER,
                  "disabled": name in disabled}}
        for name in bitmaps
    ]  # fmt: skip
    done = machine.probe.exactly("transaction", {"actions": actions})
    assert "return" in done, done


def recording(machine: machines.Machine) -> list[str]:
    """The bitmaps that libvirt would have go on in an overlay."""
    found = branched.bitmaps(machine).items()
    return [str(name) for name, b in found if b["recording"] and b["persistent"]]


def commit(machine: machines.Machine) -> None:
    """Everything back into A, which the guest writes to again."""
    machine.probe("block-commit", job_id="commit", device="over", auto_dismiss=False)
    machine.probe.wait_event("BLOCK_JOB_READY")
    machine.probe("job-complete", id="commit")
    machine.probe.wait_event("BLOCK_JOB_COMPLETED")
    machine.probe("job-dismiss", id="commit")
    machine.probe("blockdev-del", node_name="over")


def test_a_snapshot_without_the_bitmap_is_told(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    one.backup()
    snapshot(machine, tmp_path)
    one.write(machine, "vda", 1)
    told = one.branches()["b", "vda"]
    assert told.reason == "an overlay was put over the image 'A' that has its bitmap"
    with one.domain() as domain, pytest.raises(virtbackup.Error, match="is in a backing image"):
        domain.branchDelete("b")
    one.refused_then_full("an overlay was put over the image 'A' that has its bitmap")
    one.write(machine, "vda", 2)
    assert one.backup(type="incremental")["vda"].clusters() == {2}


def test_a_snapshot_in_which_the_bitmap_goes_on(tmp_path: pathlib.Path, engine: str) -> None:
    images(tmp_path)
    one = client(tmp_path, engine)
    with running(tmp_path) as machine:
        one.backup()
        one.write(machine, "vda", 1)
        snapshot(machine, tmp_path, "b")
        one.write(machine, "vda", 2)
        assert one.branches()["b", "vda"].dirty == 2 * CLUSTER
        one.start(type="incremental")
        one.write(machine, "vda", 3)
        assert one.read()["vda"].clusters() == {1, 2}
        one.stop(cancel=True)
        [disk] = one.start().disks
        assert disk.type == "incremental"
        assert disk.dirty == 3 * CLUSTER
        assert one.read()["vda"].clusters() == {1, 2, 3}
        one.stop()
        one.write(machine, "vda", 4)
        assert one.backup(type="incremental")["vda"].clusters() == {4}
        commit(machine)
        # It is relative to the point that the image has: more than was needed, and never less.
        one.write(machine, "vda", 5)
        assert one.backup(type="incremental")["vda"].clusters() >= {4, 5}


def test_a_snapshot_as_libvirt_takes_it(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    one = client(tmp_path)
    one.backup()
    snapshot(machine, tmp_path, *recording(machine))
    one.write(machine, "vda", 2)
    assert one.backup(type="incremental")["vda"].clusters() == {2}
    one.write(machine, "vda", 3)
    assert one.backup(type="incremental")["vda"].clusters() == {3}
    with one.domain() as domain:
        domain.branchDelete("b")
    assert branched.bitmaps(machine, "over") == {}


@pytest.mark.parametrize("standing_still", [False, True])
def test_a_snapshot_in_which_every_bitmap_goes_on(
    tmp_path: pathlib.Path, machine: machines.Machine, standing_still: bool
) -> None:
    """The note of the point too, enabled or as it was: what changed before, the image below has."""
    one = client(tmp_path)
    one.backup()
    one.write(machine, "vda", 1)
    found = branched.bitmaps(machine)
    still = [name for name, b in found.items() if standing_still and not b["recording"]]
    snapshot(machine, tmp_path, *found, disabled=still)
    one.write(machine, "vda", 2)
    assert one.branches()["b", "vda"].dirty == 2 * CLUSTER
    assert one.backup(type="incremental")["vda"].clusters() == {1, 2}
    one.write(machine, "vda", 3)
    assert one.backup(type="incremental")["vda"].clusters() == {3}


def test_a_snapshot_whose_overlay_took_the_point_and_then_all_data(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    one.backup()
    one.write(machine, "vda", 1)
    snapshot(machine, tmp_path, *branched.bitmaps(machine))
    machine.probe("block-stream", job_id="stream", device="over", auto_dismiss=False)
    machine.probe.wait_event("BLOCK_JOB_COMPLETED")
    machine.probe("job-dismiss", id="stream")
    one.refused_then_full("its last good backup is not known any more")


def test_a_snapshot_committed_back(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    one = client(tmp_path)
    machine.io("vda", f"write -P 9 {6 * CLUSTER} {CLUSTER}")
    one.backup()
    snapshot(machine, tmp_path)
    one.write(machine, "vda", 1)
    machine.io("vda", f"write -z {6 * CLUSTER} {CLUSTER}")
    commit(machine)
    one.write(machine, "vda", 2)
    assert one.backup(type="incremental")["vda"].clusters() >= {1, 2, 6}


def test_a_bitmap_that_is_missing_from_one_overlay_of_two(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    one.backup()
    snapshot(machine, tmp_path)
    machines.image(tmp_path / "top.qcow2", SIZE, "qcow2", backing=tmp_path / "over.qcow2")
    top = {"driver": "qcow2", "node-name": "top", "backing": None,
           "file": {"driver": "file", "filename": f"{tmp_path}/top.qcow2"}}  # fmt: skip
    assert "return" in machine.probe.exactly("blockdev-add", top)
    add = {"node": "top", "name": "b", "persistent": True}
    machine.probe(
        "transaction",
        actions=[
            {"type": "blockdev-snapshot", "data": {"node": "over", "overlay": "top"}},
            {"type": "block-dirty-bitmap-add", "data": add},
        ],
    )
    one.refused_then_full("a backing image above 'A' has no bitmap 'b'")


@pytest.mark.parametrize("advance", ["", ' advance="no"'])
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("step", ["scratch_images", "freeze"])
def test_a_snapshot_below_a_filter_in_the_middle_of_a_start(
    tmp_path: pathlib.Path, engine: str, step: str, joins: bool, advance: str
) -> None:
    """What the guest writes to the overlay before the instant, no bitmap of the branch has. Where
    it JOINS what several images know, QEMU refuses to, and not by the disk's name."""
    image = machines.image(tmp_path / "a.qcow2", SIZE, "qcow2")
    with machines.qemu(
        tmp_path,
        "-object", "throttle-group,id=group",
        "-blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={image}",
        "-blockdev", "throttle,node-name=throttled,throttle-group=group,file=A",
        "-device", "virtio-blk,drive=throttled,id=vda",
    ) as machine:  # fmt: skip
        for name in ("over", "over2"):
            overlay = machines.image(tmp_path / f"{name}.qcow2", SIZE, "qcow2")
            file = {"driver": "file", "filename": str(overlay)}
            machine.probe("blockdev-add", driver="qcow2", node_name=name, file=file, backing=None)
        one = client(tmp_path, engine)
        one.backup()
        one.write(machine, "vda", 1)
        if joins:
            _snapshot(machine, "A", "over2", "b")
        refused = []

        def late(run: process.Run) -> None:
            below = "over2" if joins else "A"
            reply = machine.probe.reply("blockdev-snapshot", node=below, overlay="over")
            refused.append("error" in reply)
            one.write(machine, "vda", 2)

        xml = one.document().replace('<branch name="b"', f'<branch name="b"{advance}')
        with (
            one.domain() as domain,
            steps.before(step, late),
            pytest.raises(virtbackup.Error, match="disk 'vda' got another image as the") as caught,
        ):
            domain.backupStart(xml)
        assert refused == [False]
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
        assert branched.ours(machine, "over") == set()
        one.refused_then_full("an overlay was put over the image 'A' that has its bitmap")
        one.write(machine, "vda", 3)
        assert one.backup()["vda"].clusters() == {3}


def _snapshot(machine: machines.Machine, node: str, overlay: str, *bitmaps: str) -> None:
    """An overlay over NODE in which BITMAPS go on."""
    actions: list[dict[str, Any]] = [
        {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}},
        *(
            {
                "type": "block-dirty-bitmap-add",
                "data": {"node": overlay, "name": name, "persistent": True},
            }
            for name in bitmaps
        ),
    ]  # fmt: skip
    machine.probe("transaction", actions=actions)


@pytest.mark.parametrize("propagated", [False, True])
def test_a_snapshot_in_the_middle(
    tmp_path: pathlib.Path, machine: machines.Machine, engine: str, propagated: bool
) -> None:
    """Where QEMU lets one be taken: the classic engine's overlay is in its way."""
    one = client(tmp_path, engine)
    one.backup()
    one.write(machine, "vda", 1)
    one.start()
    bitmaps = recording(machine) if propagated else []
    try:
        snapshot(machine, tmp_path, *bitmaps)
    except AssertionError:
        assert engine == "classic"
        one.read()
        one.stop()
        return
    one.write(machine, "vda", 2)
    one.read()
    with contextlib.suppress(virtbackup.Error):
        one.stop()
    one.branches()
    assert "disk 'vda': " in one.refusal()
    [disk] = one.start().disks
    assert disk.type == "full"
    one.read()
    one.stop()
    one.write(machine, "vda", 3)
    assert one.backup(type="incremental")["vda"].clusters() == {3}
    with one.domain() as domain:
        assert domain.backupCleanup() == []


def test_a_guest_whose_disks_are_given_away_in_the_middle(
    tmp_path: pathlib.Path, machine: machines.Machine, engine: str
) -> None:
    """As a migration or libvirt's save has it. Where QEMU does that, it outlives it: QEMU 5.2 would
    not, if the branch's own bitmap was exported."""
    one = client(tmp_path, engine)
    one.backup()
    one.write(machine, "vda", 3)
    one.start(type="incremental")
    machine.probe("stop")
    machine.probe("migrate", uri="exec:cat >/dev/null")
    waiting.until(lambda: machine.probe("query-migrate")["status"] in ("completed", "failed"))
    assert machine.process.poll() is None
    with contextlib.suppress(virtbackup.Error):
        one.stop(cancel=True)
    assert machine.process.poll() is None


@pytest.mark.skipif(
    machines.version() < (7, 2, 0),
    reason="this QEMU gives all disks away by itself, and tells nothing of it",
)
@pytest.mark.may_skip
def test_a_stop_that_comes_once_the_disks_are_given_away(
    tmp_path: pathlib.Path, machine: machines.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU is let do that, as otherwise only by libvirt, and is there yet: as in a migration whose
    other side runs already. It tells of it where another QEMU may write to the disk by then."""
    monkeypatch.setattr(starting, "why_kept", lambda *_: None)
    one = client(tmp_path, ENGINES[-1])  # its own
    one.start(type="full")
    machine.probe("migrate", uri="exec:cat >/dev/null")
    waiting.until(lambda: machine.probe("query-migrate")["status"] in ("completed", "failed"))
    assert machine.probe("query-migrate")["status"] == "completed"
    inserted = machine.probe("query-block")[0]["inserted"]
    if inserted.get("active", True):
        assert machines.version() < (10, 0, 0)  # it keeps the disk, and others from it
    else:
        with pytest.raises(virtbackup.Error, match="it was given away during the backup"):
            one.stop()
    assert machine.process.poll() is None


def test_bitmaps_that_are_given_away_before_they_are_joined(
    tmp_path: pathlib.Path, machine: machines.Machine, engine: str
) -> None:
    """With its disks a guest gives away what the end of a backup was just going to join."""
    one = client(tmp_path, engine)
    one.backup()
    one.start(type="incremental")
    nodes = block.parse_named_nodes(machine.probe("query-named-block-nodes"))
    joins = [
        branch.roll_back(medium, bitmap)
        for medium in nodes.values()
        for bitmap in medium.bitmaps
        if naming.next_of(bitmap.name)
    ]
    assert joins
    one.stop(cancel=True)
    with one.domain() as domain:
        domain.branchDelete("b")
    for actions in joins:
        reply = machine.probe.reply("transaction", actions=actions)
        assert "not found" in reply["error"]["desc"]
    assert machine.process.poll() is None


def test_an_overlay_made_while_the_guest_was_down_in_the_middle(tmp_path: pathlib.Path) -> None:
    """What the backup divided is in an image that is only read now."""
    images(tmp_path)
    one = client(tmp_path)
    with running(tmp_path) as machine:
        one.backup()
        one.write(machine, "vda", 1)
        one.start()
        one.write(machine, "vda", 2)
    machines.image(tmp_path / "over.qcow2", SIZE, "qcow2", backing=tmp_path / "a.qcow2")
    over = ("-blockdev", f"qcow2,node-name=O,file.driver=file,file.filename={tmp_path}/over.qcow2",
            "-device", "virtio-blk,drive=O,id=vda")  # fmt: skip
    with machines.qemu(tmp_path, *over) as machine:
        with one.domain() as domain:
            domain.backupCleanup()
        assert "disk 'vda': an overlay was put over the image" in one.refusal()
        one.backup()
        one.write(machine, "vda", 3)
        assert one.backup(type="incremental")["vda"].clusters() == {3}
        quit(machine)
    # Without the overlay, nothing of what it had counts, and what was divided is joined again.
    del one.copies["b", "vda"]
    with running(tmp_path) as machine:
        told = one.branches()["b", "vda"]
        assert told.reason is None
        one.start(type="incremental")
        changed = branched.changes(one.socket, "vda", "b").clusters()
        assert changed >= {1, 2}
        one.stop()
        assert "next" not in branched.ours(machine)


# --- images, nodes and processes of every kind ----------------------------------------------------


def test_what_cannot_be_kept_is_lost_with_the_guest(tmp_path: pathlib.Path) -> None:
    """A raw image, and a qcow2 image of version 2."""
    images(tmp_path)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10"]
    subprocess.run([*argv, f"{tmp_path}/a.qcow2", str(SIZE)], check=True)
    one = client(tmp_path)
    both = ("vda", "sdb")
    note = "the bitmap is lost when the guest ends: its image cannot hold it"
    with running(tmp_path) as machine:
        one.backup(disks=both)
        for disk in both:
            told = one.branches()["b", disk]
            assert (told.persistent, told.note, told.reason) == (False, note, None)
            one.write(machine, disk, 9)
        told_changes = one.backup(type="incremental", disks=both)
        assert {disk: c.clusters() for disk, c in told_changes.items()} == {
            "vda": {9}, "sdb": {9},
        }  # fmt: skip
    with running(tmp_path):
        assert one.branches() == {}
        one.refused_then_full(FIRST)


@pytest.mark.parametrize("filters", ["throttle", "copy-on-read", "both", "blkdebug", "blkverify"])
def test_filters_over_the_image(tmp_path: pathlib.Path, engine: str, filters: str) -> None:
    images(tmp_path)
    machines.image(tmp_path / "copy", SIZE)
    image = ("-blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={tmp_path}/a.qcow2")
    group = ("-object", "throttle-group,id=g")
    over = {
        "throttle": ("-blockdev", "throttle,node-name=top,throttle-group=g,file=A"),
        "copy-on-read": ("-blockdev", "copy-on-read,node-name=top,file=A"),
        "both": ("-blockdev", "throttle,node-name=mid,throttle-group=g,file=A",
                 "-blockdev", "copy-on-read,node-name=top,file=mid"),
        "blkdebug": ("-blockdev", "blkdebug,node-name=top,image=A"),
        "blkverify": ("-blockdev", f"file,node-name=T,filename={tmp_path}/copy",
                      "-blockdev", "blkverify,node-name=top,raw=A,test=T"),
    }[filters]  # fmt: skip
    device = ("-device", "virtio-blk,drive=top,id=vda")
    one = client(tmp_path, engine)
    with machines.qemu(tmp_path, *group, *image, *over, *device) as machine:
        one.backup()
        one.write(machine, "vda", 1)
        told = one.branches()["b", "vda"]
        assert (told.persistent, told.reason, told.dirty) == (True, None, CLUSTER)
        one.start(type="incremental")
        one.write(machine, "vda", 2)
        assert one.branches()["b", "vda"].dirty == 2 * CLUSTER
        assert one.read()["vda"].clusters() == {1}
        one.stop()
        quit(machine)
    assert "b" in branched.stored(tmp_path / "a.qcow2")


@pytest.mark.parametrize("options", ["", ",throttling.iops-total=1000000", ",copy-on-read=on"])
def test_drive_syntax(tmp_path: pathlib.Path, engine: str, options: str) -> None:
    images(tmp_path)
    drive = ("-drive", f"if=none,id=vda,format=qcow2,file={tmp_path}/a.qcow2{options}",
             "-device", "virtio-blk,drive=vda,id=vda")  # fmt: skip
    one = client(tmp_path, engine)
    for round in range(2):
        with machines.qemu(tmp_path, *drive) as machine:
            one.backup(type="incremental" if round else "auto")
            one.write(machine, "vda", 1)
            one.start(type="incremental")
            one.write(machine, "vda", 2)
            assert one.branches()["b", "vda"].reason is None
            assert one.read()["vda"].clusters() == {1}
            one.stop()
            one.write(machine, "vda", 3)
            quit(machine)


@pytest.mark.skipif(
    (7, 2, 14) <= machines.version() < (8, 0, 0), reason="this QEMU would abort (iothreads)"
)
@pytest.mark.may_skip
def test_a_disk_in_an_iothread(tmp_path: pathlib.Path, engine: str) -> None:
    images(tmp_path)
    argv = [
        re.sub("id=(vda|scsi0)$", r"id=\1,iothread=io", word)
        for word in machines.two_disks_of(tmp_path)
    ]
    one = client(tmp_path, engine)
    both = ("vda", "sdb")
    with machines.qemu(tmp_path, "-object", "iothread,id=io", *argv) as machine:
        one.backup(disks=both)
        one.write(machine, "vda", 1)
        one.start(type="incremental", disks=both)
        one.write(machine, "vda", 2)
        one.write(machine, "sdb", 3)
        told = one.read()
        assert (told["vda"].clusters(), told["sdb"].clusters()) == ({1}, set())
        one.stop()
        told = one.backup(type="incremental", disks=both)
        assert (told["vda"].clusters(), told["sdb"].clusters()) == ({2}, {3})
        quit(machine)


@pytest.mark.needs("qemu-storage-daemon")
def test_a_storage_daemon(tmp_path: pathlib.Path, engine: str) -> None:
    images(tmp_path)
    one = Client(tmp_path, f"qmp://{tmp_path}/qmp.sock?engine={engine}")
    argv = ("--blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={tmp_path}/a.qcow2")
    for round in range(2):
        with machines.storage_daemon(tmp_path, *argv) as machine:
            if round and machines.version() < (6, 0, 0):
                # It does not store bitmaps when it quits.
                with pytest.raises(virtbackup.Error, match="disk 'A': "):
                    one.start(type="incremental", disks=("A",))
            one.backup(disks=("A",))
            one.backup(type="incremental", disks=("A",))
            assert one.branches()["b", "A"].reason is None
            quit(machine)


# --- the shell ------------------------------------------------------------------------------------


def virsh(one: Client, *argv: str) -> tuple[int, str, str]:
    program = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", one.uri, *argv]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_shell_lists_and_deletes(tmp_path: pathlib.Path, machine: machines.Machine) -> None:
    one = client(tmp_path)
    one.backup(disks=("vda", "sdb"))
    add_bitmap(machine, "A", "theirs")
    add_bitmap(machine, "A", "two\nlines")
    one.write(machine, "vda", 1)
    status, said, warned = virsh(one, "branch-list", "1")
    assert status == 0
    rows = [line.split() for line in said.splitlines()]
    assert [row[:2] + row[-1:] for row in rows[2:]] == [
        ["b", "vda", "sound"], ["b", "sdb", "sound"], ["theirs", "vda", "foreign"],
        [r"two\nlines", "vda", "foreign"],
    ]  # fmt: skip
    assert "branch 'b', disk 'sdb': the bitmap is lost when the guest ends" in warned
    status, said, _ = virsh(one, "branch-list", "1", "--json")
    b, theirs, lines = json.loads(said)["branches"]
    assert lines["name"] == "two\nlines"
    point = one.branches()["b", "vda"].point
    assert point is not None
    assert b["disks"][0] == {
        "name": "vda", "granularity": CLUSTER, "dirty": CLUSTER, "persistent": True, "sound": True,
        "reason": None, "point": {"id": point.id, "time": point.time}, "note": None,
    }  # fmt: skip
    assert (theirs["name"], theirs["foreign"], theirs["disks"][0]["sound"]) == (
        "theirs", True, False,
    )  # fmt: skip
    start = ("backup-start-as", "1", "--unix", str(one.socket))
    assert virsh(one, *start, "--branch", "b", "--disk", "vda,type=incremental")[0] == 0
    status, _, said = virsh(one, "branch-delete", "1", "b")
    assert (status, said.strip().splitlines()[-1]) == (
        1, "error: Requested operation is not valid: a backup of branch 'b' is running:"
        " stop it first",
    )  # fmt: skip
    assert virsh(one, "backup-stop", "1")[0] == 0
    assert virsh(one, "branch-delete", "1", "theirs")[0] == 1
    assert virsh(one, "branch-delete", "1", "b")[1].strip() == "Branch b deleted"
    assert virsh(one, "branch-delete", "1", "b")[0] == 1
    assert set(branched.bitmaps(machine)) == {"theirs", "two\nlines"}
    assert branched.bitmaps(machine, "B") == {}


def test_deleting_another_branch_while_a_backup_runs(
    tmp_path: pathlib.Path, machine: machines.Machine, engine: str
) -> None:
    one = client(tmp_path, engine)
    one.backup("a")
    one.backup("b")
    one.write(machine, "vda", 1)
    one.start("b")
    with one.domain() as domain:
        domain.branchDelete("a")
        with pytest.raises(virtbackup.Error) as refused:
            domain.branchDelete("b")
        assert refused.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
        with pytest.raises(virtbackup.Error) as unknown:
            domain.branchDelete("nope")
        assert unknown.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT
    assert {branch for branch, _ in one.branches()} == {"b"}
    one.write(machine, "vda", 2)
    assert one.read("b")["vda"].clusters() == {1}
    one.stop()
    assert one.backup("b", "incremental")["vda"].clusters() == {2}
    assert FIRST in one.refusal(branch="a")


def test_branches_while_the_first_backup_runs(
    tmp_path: pathlib.Path, machine: machines.Machine
) -> None:
    one = client(tmp_path)
    one.start()
    assert one.branches() == {}
    assert one.foreign() == {}
    _neither_made_nor_removed(one, "b")
    one.stop()
    assert one.branches()["b", "vda"].reason is None
    with one.domain() as domain:
        document = one.document("b", "incremental", ("vda",), None)
        domain.backupStart(document.replace('name="b"', 'name="b" fork="c"'))
        assert 'fork="c"' in domain.backupGetXMLDesc()
    _neither_made_nor_removed(one, "c")
    one.stop()
    assert one.branches()["c", "vda"].reason is None


def _neither_made_nor_removed(one: branched.Client, branch: str) -> None:
    """While a backup runs that begins the branch, which would not be good then."""
    with one.domain() as domain:
        for call in (domain.branchCreate, domain.branchDelete):
            with pytest.raises(virtbackup.Error, match="is running: stop it first") as refused:
                call(branch)
            assert refused.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
