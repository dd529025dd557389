# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups of a branch in one directory: what follows what, what is refused, what a crash leaves.

That every chain holds the right bytes, random rounds show (test_branch_rounds).
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import libvirt
import pytest

import virtbackup
from tests.live import machines, places, scene
from virtbackup.nbd import copy
from virtbackup.tools import chain, listing, manifest, prune, pull, verify, virsh_backup

pytestmark = [pytest.mark.needs("qemu-system-x86_64", "qemu-img"), pytest.mark.timeout(120)]

SIZE = 4 << 20
UUID = "6a1b5b0c-0000-4000-8000-00000000000{}"


@pytest.fixture
def machine(tmp_path: pathlib.Path, state_dir: pathlib.Path) -> Iterator[machines.Machine]:
    with machines.two_disks(tmp_path, "-name", "vm", "-uuid", UUID.format(1), size=SIZE) as one:
        for disk in ("vda", "sdb"):
            one.io(disk, "write -P 1 0 1M")
        yield one


@pytest.fixture
def domain(machine: machines.Machine) -> Iterator[virtbackup.Domain]:
    with virtbackup.open(machine.uri) as connection:
        yield connection.lookupByName("vm")


@pytest.fixture
def out(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "out"


def names(directory: pathlib.Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def kinds(made: manifest.Manifest) -> dict[str, str]:
    return {disk.name: disk.kind for disk in made.disks}


def refused(call: Callable[[], object], machine: machines.Machine, code: int) -> str:
    """The text of the error of CALL, which left QEMU as it was."""
    before = machine.state()
    with pytest.raises(virtbackup.Error) as raised:
        call()
    assert raised.value.get_error_code() == code
    assert machine.state() == before
    return str(raised.value)


def test_a_chain(machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path) -> None:
    named = (  # by a name that only an increment has something for
        f'<domainbackup><address type="unix" path="{out}.sock"/>'
        '<disks><disk name="vda" type="auto" exportbitmap="changes"/></disks></domainbackup>'
    )
    first = pull.pull(domain, out, xml=named, branch="daily", kind="auto")
    assert kinds(first) == {"vda": "full", "sdb": "full"}
    assert first.disks[0].reason == f"{out} has no backup of it"
    machine.io("vda", "write -P 2 64k 4k")
    machine.io("vda", "write -z 512k 128k")
    machine.io("sdb", "write -P 3 3M 1k")
    want = machines.on_two_disks(machine)
    second = pull.pull(domain, out, branch="daily", kind="incremental")
    machine.io("vda", "write -P 4 0 2M")
    third = pull.pull(domain, out, xml=named, branch="daily", kind="auto")
    assert kinds(second) == kinds(third) == {"vda": "incremental", "sdb": "incremental"}
    assert names(out) == {
        "manifest.json", *(f"manifest.000{n}.json" for n in (1, 2, 3)),
        *(f"{disk}.000{n}.qcow2" for disk in ("vda", "sdb") for n in (1, 2, 3)),
    }  # fmt: skip
    assert manifest.read(out) == third
    assert [made.number for made in (first, second, third)] == [1, 2, 3]
    assert [disk.since for disk in third.disks] == [second.id] * 2
    for name, content in want.items():
        path = out / f"{name}.0002.qcow2"
        assert machines.contents(path, "qcow2") == content
        info = subprocess.run(
            ["qemu-img", "info", "--output=json", str(path)], check=True, capture_output=True
        )
        told = json.loads(info.stdout)
        assert told["backing-filename"] == f"{name}.0001.qcow2"
        assert told["backing-filename-format"] == "qcow2"
        subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
    # Only what changed is there: 64 KiB of data, and zeroes that take no room.
    [vda, _] = second.disks
    assert vda.stored < 1 << 20
    zeroes = json.loads(
        subprocess.run(
            ["qemu-img", "map", "--output=json", str(out / vda.file)],
            check=True, capture_output=True,
        ).stdout
    )  # fmt: skip
    own = [(e["start"], e["length"], e["zero"]) for e in zeroes if e["depth"] == 0]
    assert own == [(64 << 10, 64 << 10, False), (512 << 10, 128 << 10, True)]
    assert copy.checksum_of_increment(out / vda.file) == vda.checksum.value


def test_a_compressed_chain(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path
) -> None:
    """What changed to zeroes hides what is below, in QEMU's own compressed overlays as well; a
    prune makes whole what was compressed, compressed."""
    first = pull.pull(domain, out, branch="daily", kind="auto", compress=True, check=True)
    machine.io("vda", "write -P 2 64k 4k")
    machine.io("vda", "write -z 512k 128k")
    machine.io("sdb", f"write -P 3 {SIZE - 1024} 1k")
    made = pull.pull(domain, out, branch="daily", kind="incremental", compress=True, check=True)
    now = machines.on_two_disks(machine)

    def check(disks: Sequence[manifest.Disk]) -> None:
        for disk in disks:
            assert machines.contents(out / disk.file, "qcow2")[:SIZE] == now[disk.name]
            argv = ["qemu-img", "info", "--output=json", str(out / disk.file)]
            told = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
            assert told["format-specific"]["data"]["compression-type"] == "zstd"

    check(made.disks)
    with contextlib.closing(copy.Cancel()) as cancel:
        prune.prune(out, 1, cancel=cancel)
    [point] = listing.read(out).points
    check(point.made.disks)
    taken = {disk.name: disk.stored for disk in point.made.disks}
    assert all(taken[disk.name] < disk.stored + (256 << 10) for disk in first.disks)
    assert verify.verify(listing.read(out)).good


@pytest.mark.parametrize("size", [(4 << 20) + 512, 512, 65536 + 1024])
def test_a_compressed_disk_that_ends_within_a_cluster(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, size: int
) -> None:
    with machines.two_disks(tmp_path, size=size) as machine:
        for disk in ("vda", "sdb"):
            machine.io(disk, f"write -P 7 {size - 512} 512")
        out = tmp_path / "out"
        with virtbackup.open(machine.uri) as connection:
            [domain] = connection.listAllDomains()
            pull.pull(domain, out, branch="b", compress=True, check=True)
            for disk in ("vda", "sdb"):
                machine.io(disk, f"write -P 8 {size - 512} 512")
            made = pull.pull(domain, out, branch="b", kind="incremental", compress=True, check=True)
        for one in made.disks:
            assert machines.contents(out / one.file, "qcow2") == bytes(size - 512) + b"\x08" * 512


def test_a_disk_that_reads_otherwise_the_second_time(
    domain: virtbackup.Domain, out: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is not what was written, as by a medium that lies."""
    plain = copy.checksum_of_file

    def spoilt(path: pathlib.Path, *args: Any, **options: Any) -> str:
        with path.open("r+b") as file:
            file.seek(-65536, os.SEEK_END)
            file.write(b"\xff" * 65536)
        return plain(path, *args, **options)

    monkeypatch.setattr(copy, "checksum_of_file", spoilt)
    with pytest.raises(virtbackup.Error, match=r"disk 'vda': '.*' has not what was written"):
        pull.pull(domain, out, fmt="raw", check=True)
    assert not out.exists()


def test_an_export_that_reads_otherwise_the_second_time(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scratch image that does not keep what it was given, after it was read for the backup."""
    plain, scratch = copy.copy, tmp_path / "scratch"
    machine.io("vda", "write -P 77 1M 64k")
    before = machine.state()

    def copy_and_spoil(jobs: Sequence[copy.Job], **options: Any) -> list[copy.Result]:
        results = plain(jobs, **options)
        if jobs[0].path is not None:  # the first time
            machine.io("vda", "write -P 1 1M 64k")  # now the image has what was there
            at = scratch.read_bytes().index(b"\x4d" * 65536)
            with scratch.open("r+b") as file:
                file.seek(at + 4096)
                file.write(b"x")
        return results

    monkeypatch.setattr(copy, "copy", copy_and_spoil)
    xml = (
        f'<domainbackup><address type="unix" path="{tmp_path}/n"/><disks><disk name="vda">'
        f'<source file="{scratch}"/></disk></disks></domainbackup>'
    )
    with pytest.raises(virtbackup.Error, match="disk 'vda': its export does not read as it did"):
        pull.pull(domain, out, xml=xml, check=True)
    assert not out.exists()
    assert not scratch.exists()
    assert machine.state() == before


def test_a_branch_that_does_not_advance_is_no_chain(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path
) -> None:
    for more in ('advance="no"', 'fork="weekly"'):
        xml = (
            f'<domainbackup><address type="unix" path="{machine.directory}/n"/>'
            f'<branch name="daily" {more}/></domainbackup>'
        )
        said = refused(
            lambda xml=xml: pull.pull(domain, out, xml=xml),  # type: ignore[misc]
            machine,
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        )
        assert "branch 'daily' has to advance with each pull" in said


def test_a_full_one_begins_a_new_chain(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path
) -> None:
    pull.pull(domain, out, branch="daily", fmt="raw")
    text = refused(
        lambda: pull.pull(domain, out, branch="daily", kind="incremental", fmt="raw"),
        machine,
        libvirt.VIR_ERR_OPERATION_INVALID,
    )
    assert "disk 'vda': an increment is qcow2, not raw" in text
    machine.io("vda", "write -P 2 64k 4k")
    over_raw = pull.pull(domain, out, branch="daily", kind="incremental")
    assert (
        machines.contents(out / over_raw.disks[0].file, "qcow2")
        == machines.on_two_disks(machine)["vda"]
    )
    full = pull.pull(domain, out, branch="daily")
    assert kinds(full) == {"vda": "full", "sdb": "full"}
    assert [disk.backing for disk in full.disks] == [None, None]
    after = pull.pull(domain, out, branch="daily", kind="incremental")
    assert [disk.backing for disk in after.disks] == [disk.file for disk in full.disks]


def test_another_guest_branch_or_kind_of_directory(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    made = pull.pull(domain, out, branch="daily")
    before = names(out)
    invalid = libvirt.VIR_ERR_OPERATION_INVALID
    text = refused(lambda: pull.pull(domain, out, branch="weekly"), machine, invalid)
    assert f"{out} has backups of branch 'daily', not of 'weekly'" in text
    text = refused(lambda: pull.pull(domain, out), machine, invalid)
    assert f"{out} is of the backups of a branch, as it has manifest.0001.json" in text
    # So it is where the pull was cut off and is still to be finished by the next one.
    for file in before:
        (out / file).rename(out / f"{file}.partial")
    text = refused(lambda: pull.pull(domain, out, branch="weekly"), machine, invalid)
    assert f"{out} has backups of branch 'daily', not of 'weekly'" in text
    for file in before:
        (out / f"{file}.partial").rename(out / file)
    alone = tmp_path / "alone"
    pull.pull(domain, alone)
    text = refused(lambda: pull.pull(domain, alone, branch="daily"), machine, invalid)
    assert f"{alone} has a backup without a branch, not of 'daily'" in text
    for path in out.glob("manifest*.json"):
        path.write_text(path.read_text().replace(UUID.format(1), UUID.format(2)))
    text = refused(lambda: pull.pull(domain, out, branch="daily", kind="auto"), machine, invalid)
    assert f"has backups of guest 'vm' ({UUID.format(2)}), not of 'vm' ({UUID.format(1)})" in text
    assert names(out) == before
    assert made.branch == "daily"


def test_a_gap(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    """The branch went on elsewhere: an increment here would lack what changed before that."""
    pull.pull(domain, out, branch="daily")
    machine.io("vda", "write -P 9 0 64k")
    elsewhere = pull.pull(domain, tmp_path / "elsewhere", branch="daily", kind="full")
    text = refused(
        lambda: pull.pull(domain, out, branch="daily", kind="incremental"),
        machine,
        libvirt.VIR_ERR_OPERATION_INVALID,
    )
    assert f"disk 'vda': the last backup of the branch is '{elsewhere.id}'" in text
    made = pull.pull(domain, out, branch="daily", kind="auto")
    assert kinds(made) == {"vda": "full", "sdb": "full"}
    assert str(made.disks[0].reason).startswith("the last backup of the branch is")


@contextlib.contextmanager
def two_images(directory: pathlib.Path, first: str, second: str) -> Iterator[machines.Machine]:
    """A QEMU with the images 1.qcow2 and 2.qcow2 of DIRECTORY as the disks FIRST and SECOND."""
    argv = ["-name", "vm", "-uuid", UUID.format(1), "-device", "virtio-scsi"]
    for number, disk in ((1, first), (2, second)):
        file = f"file.driver=file,file.filename={directory}/{number}.qcow2"
        argv += ["-blockdev", f"qcow2,node-name=node{number},{file}"]
        argv += ["-device", f"scsi-hd,drive=node{number},id={disk}"]
    with machines.qemu(directory, *argv) as machine:
        yield machine


@pytest.mark.parametrize("names", [("vdb", "vda"), ("vdb", "vdc")])
def test_disks_that_are_called_otherwise_now(
    tmp_path: pathlib.Path, state_dir: pathlib.Path, out: pathlib.Path, names: tuple[str, str]
) -> None:
    """What has changed of one disk is no increment of the one that had its name before."""
    for number in (1, 2):
        machines.image(tmp_path / f"{number}.qcow2", SIZE, "qcow2")
    with two_images(tmp_path, "vda", "vdb") as machine:
        machine.io("vda", "write -P 1 0 1M")
        machine.io("vdb", "write -P 2 1M 1M")
        with virtbackup.open(machine.uri) as connection:
            pull.pull(connection.lookupByName("vm"), out, branch="daily")
    with two_images(tmp_path, *names) as machine:
        machine.io(names[0], "write -P 3 2M 64k")
        with virtbackup.open(machine.uri) as connection:
            domain = connection.lookupByName("vm")
            text = refused(
                lambda: pull.pull(domain, out, branch="daily", kind="incremental"),
                machine,
                libvirt.VIR_ERR_OPERATION_INVALID,
            )
            assert "disk 'vdb': at its last good backup it was called otherwise" in text
            made = pull.pull(domain, out, branch="daily", kind="auto")
            assert kinds(made) == dict.fromkeys(names, "full")
            again = pull.pull(domain, out, branch="daily", kind="incremental")
            assert kinds(again) == dict.fromkeys(names, "incremental")
    for number, disk in enumerate(names, 1):
        shown = machines.contents(tmp_path / f"{number}.qcow2", "qcow2")
        assert machines.contents(out / f"{disk}.0003.qcow2", "qcow2") == shown


@pytest.mark.parametrize("missing", ["vda.0001.qcow2", "vda.0002.qcow2", "manifest.0001.json"])
def test_a_link_of_the_chain_is_missing(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path, missing: str
) -> None:
    pull.pull(domain, out, branch="daily")
    pull.pull(domain, out, branch="daily", kind="incremental")
    (out / missing).unlink()
    text = refused(
        lambda: pull.pull(domain, out, branch="daily", kind="incremental"),
        machine,
        libvirt.VIR_ERR_OPERATION_INVALID,
    )
    words = (
        "has no manifest of vda.0001.qcow2"
        if "manifest" in missing
        else f"{missing}: it is missing"
    )
    assert words in text
    made = pull.pull(domain, out, branch="daily", kind="auto")
    sdb = "full" if "manifest" in missing else "incremental"
    assert kinds(made) == {"vda": "full", "sdb": sdb}


def _rebased(path: pathlib.Path) -> None:
    rebase = ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", "sdb.0001.qcow2", str(path)]
    subprocess.run(rebase, check=True)


@pytest.mark.parametrize(
    ("file", "spoil", "problem"),
    [
        ("vda.0001.qcow2", lambda path: os.truncate(path, 0), "it is shorter than the header"),
        ("vda.0002.qcow2", lambda path: os.truncate(path, path.stat().st_size - 1), "expected"),
        ("vda.0001.qcow2", lambda path: subprocess.run(
            ["qemu-img", "resize", "-q", str(path), "+1M"], check=True), "it is a disk of"),
        ("vda.0002.qcow2", _rebased, "its backing file is sdb.0001.qcow2, expected vda.0001.qcow2"),
        ("vda.0002.qcow2", lambda path: shutil.copy(path.with_name("vda.0001.qcow2"), path),
         "its backing file is none, expected vda.0001.qcow2"),
    ],
    ids=["empty", "cut", "resized", "rebased", "another"],
)  # fmt: skip
def test_a_link_of_the_chain_is_another(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    file: str,
    spoil: Callable[[pathlib.Path], object],
    problem: str,
) -> None:
    """Nothing follows what can be seen not to be the backup that it is called."""
    pull.pull(domain, out, branch="daily")
    pull.pull(domain, out, branch="daily", kind="incremental")
    spoil(out / file)
    text = refused(
        lambda: pull.pull(domain, out, branch="daily", kind="incremental"),
        machine,
        libvirt.VIR_ERR_OPERATION_INVALID,
    )
    assert f"disk 'vda': {out / file}: " in text
    assert problem in text
    assert "disk 'sdb'" not in text
    made = pull.pull(domain, out, branch="daily", kind="auto")
    assert kinds(made) == {"vda": "full", "sdb": "incremental"}
    assert problem in str(made.disks[0].reason)


def test_one_pull_at_a_time(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path
) -> None:
    out.mkdir()
    with chain.locked(out):
        text = refused(
            lambda: pull.pull(domain, out, branch="daily"),
            machine,
            libvirt.VIR_ERR_OPERATION_INVALID,
        )
    assert f"another backup is pulled into {out}" in text
    assert names(out) == set()


def test_files_of_the_users_are_not_touched(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path
) -> None:
    out.mkdir()
    (out / "notes.0001.raw").write_text("mine")
    (out / "sdb.0002.qcow2").write_text("mine")
    pull.pull(domain, out, branch="daily")
    text = refused(
        lambda: pull.pull(domain, out, branch="daily", kind="incremental"),
        machine,
        libvirt.VIR_ERR_OPERATION_INVALID,
    )
    assert f"{out}/sdb.0002.qcow2 exists already" in text
    assert (out / "notes.0001.raw").read_text() == (out / "sdb.0002.qcow2").read_text() == "mine"


# --- cut off --------------------------------------------------------------------------------------


def die_in(uri: str, out: pathlib.Path, where: Callable[[pytest.MonkeyPatch], None]) -> None:
    """A pull in a process of its own that dies where WHERE has put it."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch, virtbackup.open(uri) as connection:
                where(patch)
                pull.pull(connection.lookupByName("vm"), out, branch="daily", kind="auto")
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_stop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pull, "_stop", _die)


def after_the_stop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(chain, "finish", _die)


def among_the_names(patch: pytest.MonkeyPatch) -> None:
    rename = pathlib.Path.rename

    def last(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if path.name.startswith("manifest"):
            _die()
        return rename(path, target)

    patch.setattr(pathlib.Path, "rename", last)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", [before_the_stop, after_the_stop, among_the_names])
def test_killed(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    where: Callable[[pytest.MonkeyPatch], None],
    first: bool,
) -> None:
    """What was called good is kept, what was not is gone; the next increment lacks nothing."""
    if not first:
        pull.pull(domain, out, branch="daily")
    machine.io("vda", "write -P 5 1M 128k")
    then = machines.on_two_disks(machine)
    die_in(machine.uri, out, where)
    machine.io("sdb", "write -P 6 2M 128k")
    now = machines.on_two_disks(machine)
    made = pull.pull(domain, out, branch="daily", kind="auto")
    good = where is not before_the_stop
    assert made.number == 1 + good + (not first)
    assert kinds(made) == dict.fromkeys(
        ("vda", "sdb"), "incremental" if good or not first else "full"
    )
    for name in ("vda", "sdb"):
        assert machines.contents(out / f"{name}.{made.number:04}.qcow2", "qcow2") == now[name]
        if good:
            cut_off = out / f"{name}.{made.number - 1:04}.qcow2"
            assert machines.contents(cut_off, "qcow2") == then[name]
    assert not [name for name in names(out) if name.endswith(".partial")]
    assert manifest.read(out) == made


def test_a_file_that_somebody_took_away(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No manifest tells of a disk that is not there, of a branch or not."""
    stop = pull._stop

    def stop_and_take_away(*args: object) -> None:
        stop(*args)  # type: ignore[arg-type]
        [path] = out.glob("sdb.*.partial")
        path.unlink()

    monkeypatch.setattr(pull, "_stop", stop_and_take_away)
    for branch, fmt, told in (
        (None, "qcow2", f"cannot read {out}/sdb.qcow2.partial"),  # its tables are read after it
        (None, "raw", f"cannot finish the backup in {out}: {out}/sdb.raw.partial: No such"),
        ("daily", "qcow2", f"cannot finish the backup in {out}: {out}/sdb.0001.qcow2.partial: No"),
    ):
        with pytest.raises(virtbackup.Error, match=told):
            pull.pull(domain, out, branch=branch, fmt=cast("copy.Format", fmt))
        assert list(out.glob("manifest*.json")) == []


def test_a_directory_where_a_file_belongs(domain: virtbackup.Domain, out: pathlib.Path) -> None:
    """The error says which it is."""
    pull.pull(domain, out, branch="daily")
    for name, text in (
        ("vda.0002.qcow2.partial", "cannot make a backup in"),
        (manifest.FILE, "cannot finish the backup in"),
    ):
        (out / name).unlink(missing_ok=True)
        (out / name).mkdir()
        with pytest.raises(virtbackup.Error, match=f"{text} {out}: {out}/{name}: Is a directory"):
            pull.pull(domain, out, branch="daily", kind="incremental")
        (out / name).rmdir()
    pull.pull(domain, out, branch="daily", kind="incremental")
    assert verify.verify(listing.read(out), None).good


def test_a_killed_backup_whose_job_has_ended(
    machine: machines.Machine, domain: virtbackup.Domain, out: pathlib.Path
) -> None:
    """Where QEMU must not be asked for its images while a job of ours is not dismissed, the next
    pull dismisses it first."""
    xml = (
        f'<domainbackup><address type="unix" path="{machine.directory}/nbd.sock"/>'
        '<branch name="daily"/></domainbackup>'
    )
    scene.start_and_die(machine.uri, xml, autodestroy=True)
    for job in machine.probe("query-jobs"):
        machine.probe("job-cancel", id=job["id"])
        machine.probe.wait_event("BLOCK_JOB_CANCELLED")
    made = pull.pull(domain, out, branch="daily", kind="auto")
    assert (
        machines.contents(out / made.disks[0].file, "qcow2")
        == machines.on_two_disks(machine)["vda"]
    )


def test_a_signal_after_the_verdict(
    machine: machines.Machine,
    domain: virtbackup.Domain,
    out: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The branch has moved on by then, so the backup is kept, and that is said."""
    stop = pull._stop

    def stop_and_signal(*args: object) -> None:
        stop(*args)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(pull, "_stop", stop_and_signal)
        argv = ["-c", machine.uri, "backup-pull", "1", str(out), "--branch", "daily"]
        with pytest.raises(SystemExit):
            virsh_backup.main(argv)
    assert capsys.readouterr().err == (
        "warning: operation aborted: that was too late: the backup is whole, and kept in"
        f" {out}\nerror: interrupted by SIGTERM\n"
    )
    assert manifest.read(out).number == 1
    made = pull.pull(domain, out, branch="daily", kind="incremental")
    assert made.number == 2


def test_a_directory_that_can_only_be_read(
    machine: machines.Machine, domain: virtbackup.Domain, tmp_path: pathlib.Path
) -> None:
    """And one with room for all but the last file of an increment."""

    def next_one() -> manifest.Manifest:
        return pull.pull(domain, small / "out", branch="daily", kind="incremental")

    with places.small_file_system(tmp_path / "small", 64 << 20) as small:
        pull.pull(domain, small / "out", branch="daily", kind="auto")
        before, found = names(small / "out"), os.statvfs(small)
        three = f"remount,nr_inodes={found.f_files - found.f_ffree + 3}"
        subprocess.run(["mount", "-o", three, str(small)], check=True)
        text = refused(next_one, machine, libvirt.VIR_ERR_SYSTEM_ERROR)
        file = f"{small}/out/manifest.json.partial"
        assert f"cannot write to {small}/out: {file}: No space left on device" in text
        assert names(small / "out") == before
        subprocess.run(["mount", "-o", "remount,nr_inodes=0", str(small)], check=True)
        assert next_one().number == 2
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises(virtbackup.Error) as raised:
            pull.pull(domain, small / "out", branch="daily", kind="auto")
    assert raised.value.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
    text = f"cannot make a backup in {small}/out: {file}: Read-only file system"
    assert text in str(raised.value)
