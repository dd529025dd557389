# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups by which their branch does not advance: alone, or as another branch begins with them.

As in test_branch, every incremental backup is read as ``branched.Client`` reads.
"""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

import pytest

import virtbackup
from tests import conftest
from tests.live import branched, machines, proxy, test_branch, test_branch_crash
from tests.live.branched import CLUSTER, Client
from virtbackup.conf import backup_conf

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

closed, engine, machine = test_branch.closed, test_branch.engine, test_branch.machine


def start(
    one: Client,
    branch: str,
    disks: Sequence[str] = ("vda",),
    exportbitmap: str | None = None,
    **fields: object,
) -> backup_conf.BackupInfo:
    """Start a backup of DISKS with FIELDS of its branch."""
    wanted = backup_conf.BackupDef.parse(one.document(branch, "auto", disks))
    listed = tuple(
        dataclasses.replace(disk, exportbitmap=exportbitmap) if disk.present is not False else disk
        for disk in wanted.disks
    )
    wanted = dataclasses.replace(wanted, disks=listed, **fields)  # type: ignore[arg-type]
    with one.domain() as domain:
        domain.backupStart(wanted.format())
        live = backup_conf.BackupDef.parse(domain.backupGetXMLDesc())
        assert (live.advance, live.fork) == (wanted.advance, wanted.fork)
        return domain.backupGetInfo()


@pytest.fixture
def one(tmp_path: pathlib.Path, machine: machines.Machine, engine: str) -> Client:
    """A client that has a good backup of vda in branch b."""
    found = test_branch.client(tmp_path, engine)
    found.backup()
    return found


def test_a_differential_backup(one: Client, machine: machines.Machine) -> None:
    point = one.branches()["b", "vda"].point
    base = dict(one.copies)
    one.write(machine, "vda", 3)
    start(one, "b", advance=False)
    one.write(machine, "vda", 4)
    assert one.read()["vda"].clusters() == {3}
    one.stop()
    assert one.branches()["b", "vda"].point == point
    one.copies = base
    one.write(machine, "vda", 5)
    assert one.backup()["vda"].clusters() == {3, 4, 5}
    assert branched.ours(machine) == {"point", "branch"}


def test_a_first_backup_that_is_no_point(one: Client, machine: machines.Machine) -> None:
    [disk] = start(one, "c", advance=False).disks
    assert disk.type == "full"
    one.read("c")
    one.stop()
    assert list(one.branches()) == [("b", "vda")]


def test_a_fork(one: Client, machine: machines.Machine) -> None:
    """Both branches have every change since their own points, whatever was written meanwhile."""
    point, base = one.branches()["b", "vda"].point, dict(one.copies)
    one.write(machine, "vda", 3)
    info = start(one, "b", fork="c")
    assert info.branch == "b"
    one.write(machine, "vda", 4)
    assert one.read()["vda"].clusters() == {3}
    one.stop()
    one.copies["c", "vda"] = one.copies["b", "vda"]
    one.copies["b", "vda"] = base["b", "vda"]
    known = one.branches()
    assert known["b", "vda"].point == point
    assert known["c", "vda"].point is not None
    assert known["c", "vda"].point.id == info.id
    assert known["c", "vda"].persistent
    one.write(machine, "vda", 5)
    assert one.backup("c")["vda"].clusters() == {4, 5}
    one.write(machine, "vda", 6)
    assert one.backup("b")["vda"].clusters() == {3, 4, 5, 6}
    assert one.backup("c")["vda"].clusters() == {6}


def test_a_fork_of_two_disks_one_of_which_is_new(one: Client, machine: machines.Machine) -> None:
    both = ("vda", "sdb")
    vda, sdb = start(one, "b", disks=both, fork="c").disks
    assert (vda.type, sdb.type) == ("incremental", "full")
    one.read()
    one.stop()
    for disk in both:
        one.copies["c", disk] = one.copies["b", disk]
        one.write(machine, disk, 7)
    told = one.backup("c", type="incremental", disks=both)
    assert [told[disk].clusters() for disk in both] == [{7}, {7}]
    assert ("b", "sdb") not in one.branches()


@pytest.mark.parametrize("cancel", [True, False])
def test_a_fork_of_a_backup_that_is_not_good(
    one: Client, machine: machines.Machine, cancel: bool
) -> None:
    before = branched.bitmaps(machine)
    info = start(one, "b", fork="c")
    one.write(machine, "vda", 4)
    if cancel:
        one.stop(cancel=True)
    else:
        job = f"virtbackup-{info.id}-0"
        machine.probe("block-job-cancel", device=job, force=True)
        with pytest.raises(virtbackup.Error, match="the backup is not good"):
            one.stop()
    assert list(one.branches()) == [("b", "vda")]
    assert branched.bitmaps(machine).keys() == before.keys()
    assert one.backup()["vda"].clusters() == {4}


def test_a_fork_by_a_name_that_is_taken(one: Client, machine: machines.Machine) -> None:
    machine.probe("block-dirty-bitmap-add", node="A", name="theirs")
    one.backup("d")
    before = branched.bitmaps(machine)
    for name in ("theirs", "d"):
        with pytest.raises(virtbackup.Error, match=f"disk 'vda' has a bitmap '{name}' already"):
            start(one, "b", fork=name)
    assert branched.bitmaps(machine) == before


def test_a_fork_whose_name_is_taken_in_the_middle(one: Client, machine: machines.Machine) -> None:
    start(one, "b", fork="c")
    one.write(machine, "vda", 4)
    machine.probe("block-dirty-bitmap-add", node="A", name="c")
    with pytest.raises(virtbackup.Error, match="branch 'c' does not begin: disk 'vda': its bitmap"):
        one.stop()
    assert "c" in branched.bitmaps(machine)
    assert one.foreign().keys() == {("c", "vda")}
    assert one.backup()["vda"].clusters() == {4}


def test_changes_by_another_name(one: Client, machine: machines.Machine) -> None:
    """As libvirt calls them, for its clients; with the scratch image they go."""
    one.write(machine, "vda", 9)
    start(one, "b", exportbitmap="backup-vda")
    told = branched.changes(one.socket, "vda", "backup-vda")
    assert told.clusters() == {9}
    one.write(machine, "vda", 10)
    assert branched.changes(one.socket, "vda", "backup-vda") == told
    one.stop()
    assert "backup-vda" not in str(machine.probe("query-named-block-nodes"))
    start(one, "b", exportbitmap="backup-vda")
    assert branched.changes(one.socket, "vda", "backup-vda").clusters() == {10}
    one.stop(cancel=True)


def test_a_branch_without_a_backup(one: Client, machine: machines.Machine) -> None:
    whole = {}
    with one.domain() as domain:
        one.start("x", disks=("vda", "sdb"))
        for disk in ("vda", "sdb"):
            whole["c", disk] = branched.whole(one.socket, disk)
        one.stop(cancel=True)
        assert domain.branchCreate("c") == 0
    one.copies.update(whole)
    one.write(machine, "vda", 1, 2)
    one.write(machine, "sdb", 5)
    told = one.backup("c", type="incremental", disks=("vda", "sdb"))
    assert told["vda"].clusters() == {1, 2}
    assert told["sdb"].clusters() == {5}
    with one.domain() as domain:
        for name, text in (
            ("c", "disk 'vda' has a bitmap 'c' already"),
            ("virtbackup-x", "which is reserved"),
            ("a/b", "expected a name without '/'"),
            ("", "expected a name without '/'"),
            ("x" * 1024, "longer than 1023 bytes"),
            ("\udcff", "characters that XML cannot carry"),
            ("\ufdd0", "JSON parse error"),  # which XML has, and QEMU has not
        ):
            with pytest.raises(virtbackup.Error, match=text):
                domain.branchCreate(name)
    assert {name for name, _ in one.branches()} == {"b", "c"}
    assert one.branches()["c", "sdb"].granularity == CLUSTER


@pytest.mark.parametrize("fault", ["kill-before", "kill-after"])
def test_we_are_killed_in_the_stop(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, engine: str, fault: proxy.Fault
) -> None:
    """At every command: where the second stop says good, both branches are whole; else there is no
    fork, and the first branch has every change since its own point."""
    ends = set()
    with test_branch_crash.watched(tmp_path) as (machine, between, caller):
        one = test_branch_crash.client(tmp_path, engine)
        one.backup()
        for number in itertools.count(0, 1 if conftest.long() else 5):
            fork, base = f"c{number}", dict(one.copies)
            one.write(machine, "vda", 3)
            start(one, "b", fork=fork)
            one.write(machine, "vda", 4)
            one.read()
            frozen = one.pending["b", "vda"]
            status = caller.spoilt(between, (number, fault), "", "backupStop")
            between.disarm()
            good = status == 0
            if not good:
                with contextlib.suppress(virtbackup.Error):
                    one.stop()
                    good = True
            where = f"{fault} {number} {between.spoilt}"
            one.pending, one.copies = {}, base
            assert (fork in {name for name, _ in one.branches()}) == good, where
            one.write(machine, "vda", 5)
            if good:
                one.copies[fork, "vda"] = frozen
                assert one.backup(fork, type="incremental")["vda"].clusters() == {4, 5}, where
                with one.domain() as domain:
                    domain.branchDelete(fork)
            assert one.backup(type="incremental")["vda"].clusters() == {3, 4, 5}, where
            assert branched.ours(machine) == {"point", "branch"}, where
            assert not list(state_dir.glob("*.json")), where
            ends.add(good)
            if status == 0:
                break
    assert number > 8
    assert True in ends
