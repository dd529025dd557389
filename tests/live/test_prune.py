# SPDX-License-Identifier: LGPL-2.1-or-later
"""backup-prune: what is kept is what it was, whenever it is killed, and the branch goes on."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import libvirt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import virtbackup
from tests import conftest, waiting
from tests.live import machines, places, points, test_restore
from virtbackup.nbd import checksum, copy
from virtbackup.tools import chain, listing, manifest, prune, pull

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-nbd", "nbdkit"),
    pytest.mark.timeout(180),
]

BLOCK = checksum.BLOCK


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> points.Backed:
    """Four points, never to be changed."""
    return points.pulled(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def backed(whole: points.Backed, tmp_path: pathlib.Path) -> points.Backed:
    return whole.copy(tmp_path / "backups")


@pytest.fixture(scope="module")
def announced(whole: points.Backed, tmp_path_factory: pytest.TempPathFactory) -> points.Backed:
    """The same as a prune to two points has left it that was killed before it renamed an image,
    never to be changed."""
    one = whole.copy(tmp_path_factory.mktemp("announced") / "backups")
    count = 1
    while not (one.directory / "manifest.0003.json.merged").exists():
        assert killed_at(one.directory, 2, count)
        count += 1
    return one


@pytest.fixture
def layered(tmp_path: pathlib.Path) -> points.Backed:
    """One disk in four points."""
    return points.built(tmp_path / "backups", 12 * BLOCK - 100, points.LAYERS, "raw")


def cut(directory: pathlib.Path, keep: int) -> prune.Plan:
    cancel = copy.Cancel()
    try:
        return prune.prune(directory, keep, cancel=cancel)
    finally:
        cancel.close()


def refused(directory: pathlib.Path, keep: int = 2) -> str:
    with pytest.raises(virtbackup.Error) as raised:
        cut(directory, keep)
    return str(raised.value)


def numbers(directory: pathlib.Path) -> list[int]:
    return [point.made.number or 0 for point in listing.read(directory).points]


def names(directory: pathlib.Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def check(backed: points.Backed, restored: bool = False) -> list[int]:
    """All that is listed is what it was, by our own reading and by QEMU's, and can be RESTORED;
    which points those are."""
    backups = listing.read(backed.directory)
    verdict = points.verified(backed.directory)
    assert verdict.good, verdict.problems
    for point in backups.points:
        shown = backed.shown[point.made.number or 0]
        for disk in point.made.disks:
            content = machines.contents(backed.directory / disk.file, disk.format)
            assert content == points.padded(shown[disk.name])
        if not restored:
            continue
        with tempfile.TemporaryDirectory() as out:
            done = points.put_back(backed, out, point=point.label, fmt="raw", force=True)
            assert {d.output.disk: d.output.path.read_bytes() for d in done} == shown
    return numbers(backed.directory)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep(backed: points.Backed, keep: int) -> None:
    newest = {
        name: (backed.directory / name).read_bytes()
        for number in range(6 - keep, 5)
        for name in (f"vda.000{number}.qcow2", f"sdb.000{number}.qcow2")
    }
    cut(backed.directory, keep)
    kept = list(range(5 - keep, 5))
    assert check(backed, restored=True) == kept
    assert names(backed.directory) == {
        "manifest.json", *(f"manifest.000{n}.json" for n in kept),
        *(f"{disk}.000{n}.qcow2" for n in kept for disk in ("vda", "sdb")),
    }  # fmt: skip
    oldest = listing.read(backed.directory).points[0].made
    assert oldest.kind == "full"
    for disk in oldest.disks:
        assert (disk.kind, disk.backing, disk.since) == ("full", None, None)
        assert disk.reason == "older backups were pruned"
        path = backed.directory / disk.file
        subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
        assert disk.stored == path.stat().st_blocks * 512
    before = backed.made[oldest.number or 0]
    assert dataclasses.replace(before, disks=oldest.disks, kind="full") == oldest
    for name, content in newest.items():
        assert (backed.directory / name).read_bytes() == content
    assert manifest.read(backed.directory).number == 4


def test_nothing_to_do(backed: points.Backed) -> None:
    before = names(backed.directory)
    plan = cut(backed.directory, 4)
    assert (plan.dropped, plan.merges) == ((), ())
    assert cut(backed.directory, 100).dropped == ()
    assert names(backed.directory) == before


def test_the_command(backed: points.Backed) -> None:
    directory = str(backed.directory)
    before = names(backed.directory)
    assert points.call("backup-prune", directory, "--keep=0")[0] == 2
    status, out, err = points.call("backup-prune", directory, "--keep=2", "--dry-run")
    assert (status, err) == (0, "")
    assert out.splitlines()[:3] == [
        "vda: vda.0003.qcow2 would be made whole of vda.0002.qcow2, vda.0001.qcow2",
        "sdb: sdb.0003.qcow2 would be made whole of sdb.0002.qcow2, sdb.0001.qcow2",
        f"point 1 ({listing.shown_time(backed.made[1].time)}) would be removed",
    ]
    assert out.splitlines()[-1].startswith("2 points would be kept, 2 would be removed (")
    assert names(backed.directory) == before
    status, out, err = points.call("backup-prune", directory, "--keep=3", "--json")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert [point["number"] for point in facts["kept"]] == [2, 3, 4]
    assert [one["file"] for one in facts["merged"]] == ["vda.0002.qcow2", "sdb.0002.qcow2"]
    assert facts["files"] == ["manifest.0001.json", "vda.0001.qcow2", "sdb.0001.qcow2"]
    status, out, err = points.call("backup-prune", directory, "--keep=2")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("2 points kept, 1 removed (")
    assert check(backed) == [3, 4]


# --- the branch goes on ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2] if conftest.long() else [1])
def test_pulls_go_on(tmp_path: pathlib.Path, keep: int) -> None:
    (tmp_path / "images").mkdir()
    backed = points.Backed(tmp_path / "backups")
    with points.guest(tmp_path / "images") as one:
        for step in range(3):
            one.change(step)
            one.back_up(backed)
        for step in range(3, 5):
            cut(backed.directory, keep)
            assert len(check(backed)) == keep
            one.change(step)
            made = one.back_up(backed)
            assert made.kind == "incremental"
            assert check(backed, restored=True) == list(range(step + 2 - keep - 1, step + 2))


def test_a_disk_that_comes_and_goes(backed: points.Backed) -> None:
    """Points 2 and 3 are without sdb, whose increment in 4 is over its file of 1."""
    for number in (2, 3):
        path = backed.directory / f"manifest.000{number}.json"
        made = manifest.read(backed.directory, path.name)
        path.write_text(dataclasses.replace(made, disks=made.disks[:1]).to_json())
        (backed.directory / f"sdb.000{number}.qcow2").unlink()
        del backed.shown[number]["sdb"]
    path = backed.directory / "sdb.0004.qcow2"
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", "sdb.0001.qcow2", str(path)], check=True
    )
    made = backed.made[4]
    [vda, sdb] = made.disks
    changed = dataclasses.replace(
        sdb,
        backing="sdb.0001.qcow2",
        since=backed.made[1].id,
        tables=manifest.tables_of(path, sdb.size),
    )
    for name in ("manifest.0004.json", "manifest.json"):
        text = dataclasses.replace(made, disks=(vda, changed)).to_json()
        (backed.directory / name).write_text(text)
    backed.shown[4]["sdb"] = machines.contents(path, "qcow2")
    assert check(backed) == [1, 2, 3, 4]
    plan = cut(backed.directory, 2)
    assert [[link.disk.file for link in links] for links in plan.merges] == [
        ["vda.0003.qcow2", "vda.0002.qcow2", "vda.0001.qcow2"],
        ["sdb.0004.qcow2", "sdb.0001.qcow2"],
    ]
    assert plan.lost == ()
    assert check(backed) == [3, 4]
    assert listing.read(backed.directory).points[1].made.kind == "incremental"


def test_a_disk_that_does_not_come_back(backed: points.Backed) -> None:
    """Its last backup goes with the points that have it, which is said."""
    for name in ("manifest.0004.json", "manifest.json"):
        made = dataclasses.replace(backed.made[4], disks=backed.made[4].disks[:1])
        (backed.directory / name).write_text(made.to_json())
    (backed.directory / "sdb.0004.qcow2").unlink()
    argv = ("backup-prune", str(backed.directory), "--keep=1")
    said = "warning: disk 'sdb' would be gone: no point that is kept has it\n"
    assert points.call(*argv, "--dry-run")[::2] == (0, said)
    assert json.loads(points.call(*argv, "--dry-run", "--json")[1])["lost"] == ["sdb"]
    assert points.call(*argv)[::2] == (
        0,
        "warning: disk 'sdb' is gone: no point that is kept has it\n",
    )
    assert points.call(*argv)[::2] == (0, "")


# --- killed ---------------------------------------------------------------------------------------

CHANGES = ("os.rename", "os.remove", "os.truncate", "open")


def killed_at(directory: pathlib.Path, keep: int, count: int) -> bool:
    """Prune, as ``killed_doing``."""
    return killed_doing(directory, count, lambda: cut(directory, keep))


def killed_doing(directory: pathlib.Path, count: int, work: Callable[[], object]) -> bool:
    """WORK in a process that is killed before the COUNT-th thing that it does to DIRECTORY's
    names; whether it was, and not done before."""
    pid = os.fork()
    if pid == 0:
        left = count
        own = os.fspath(directory)

        def audit(event: str, args: tuple[object, ...]) -> None:
            nonlocal left
            if event not in CHANGES or not str(args[0]).startswith(own):
                return
            if event == "open" and not int(args[2]) & (os.O_WRONLY | os.O_RDWR):  # type: ignore[call-overload]
                return
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def told(directory: pathlib.Path) -> manifest.Manifest:
    """What is told of point 3, but for the order of the clusters in its file."""
    made = manifest.read(directory, "manifest.0003.json")
    disks = tuple(dataclasses.replace(disk, tables=None) for disk in made.disks)
    return dataclasses.replace(made, disks=disks)


def test_killed_anywhere(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    """Also twice, the second time in the clean-up; all that is listed is right at any moment, and a
    prune without more ado ends as if nothing had been."""
    want = layered.copy(tmp_path / "want")
    cut(want.directory, 2)
    lists: list[list[int]] = []
    for count in itertools.count(1):
        one = layered.copy(tmp_path / f"killed{count}")
        if not killed_at(one.directory, 2, count):
            break
        lists.append(check(one))
        if count % 4 and not conftest.long():
            continue
        if count % 8:
            killed_at(one.directory, 2, 1 + count % 5)
        plan = cut(one.directory, 2)
        assert check(one) == [3, 4]
        assert names(one.directory) == names(want.directory)
        assert told(one.directory) == told(want.directory)
        assert plan.kept[-1].made.number == 4
    assert len(lists) > 11
    assert lists[0] == [1, 2, 3, 4]
    assert [1, 3, 4] in lists
    assert lists[-1] == [3, 4]


def test_killed_with_two_disks_and_the_newest_merged(
    tmp_path: pathlib.Path, whole: points.Backed
) -> None:
    """In the steps that one disk has not: between the images, and at manifest.json."""
    count = 3
    while True:
        one = whole.copy(tmp_path / f"killed{count}")
        assert killed_at(one.directory, 1, count)
        if not [name for name in names(one.directory) if name.endswith(".merged")]:
            break
        if count % 2:
            assert check(one) == [1, 2, 3, 4]
        count += 1 if conftest.long() else 3
    assert count > 8
    cut(one.directory, 1)
    assert check(one) == [4]


@pytest.mark.parametrize("gone", [("vda",), ("vda", "sdb")][: 2 if conftest.long() else 1])
def test_announced_images_are_gone(
    announced: points.Backed, tmp_path: pathlib.Path, gone: tuple[str, ...]
) -> None:
    """As in a copy of the directory that was made meanwhile, or where somebody has tidied up: the
    increments are there, and so is what they need."""
    backed = announced.copy(tmp_path / "backups")
    for disk in gone:
        (backed.directory / f"{disk}.0003.qcow2.merged").unlink()
    assert check(backed) == [1, 2, 3, 4]
    prune.finish(backed.directory)
    assert check(backed) == [1, 2, 3, 4]
    kinds = {
        disk.name: disk.kind for disk in manifest.read(backed.directory, "manifest.0003.json").disks
    }
    assert kinds == {disk: "incremental" if disk in gone else "full" for disk in ("vda", "sdb")}
    assert not listing.read(backed.directory).unfinished
    cut(backed.directory, 2)
    assert check(backed) == [3, 4]


def test_an_announced_image_is_cut(announced: points.Backed, tmp_path: pathlib.Path) -> None:
    backed = announced.copy(tmp_path / "backups")
    os.truncate(backed.directory / "vda.0003.qcow2.merged", 100000)
    cut(backed.directory, 2)
    assert check(backed) == [3, 4]


def test_a_merged_image_is_removed_by_somebody_else(
    layered: points.Backed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By who tidies up, as it was going to take its place: there is no journal then of what is
    needed, which would be in the way of every prune."""
    announce = prune._announce

    def announce_and_remove(
        directory: pathlib.Path, point: listing.Point, disks: tuple[manifest.Disk, ...]
    ) -> None:
        announce(directory, point, disks)
        (directory / "vda.0003.qcow2.merged").unlink()

    before = names(layered.directory)
    with monkeypatch.context() as patched:
        patched.setattr(prune, "_announce", announce_and_remove)
        assert "was removed or cut by somebody else" in refused(layered.directory)
    assert names(layered.directory) == before
    assert check(layered) == [1, 2, 3, 4]
    cut(layered.directory, 2)
    assert check(layered) == [3, 4]


def test_what_is_not_of_a_prune_stays(layered: points.Backed) -> None:
    """Whatever it is called."""
    ours = ["vda.0004.qcow2.merged", "manifest.0004.json.merged.partial", "prune.json.partial"]
    theirs = ["notes.merged", "a.0001.raw.merged", "x.merged.partial", "old.prune.json.partial"]
    for name in (*ours, *theirs):
        (layered.directory / name).write_text(name)
    (layered.directory / "d.merged").mkdir()
    cut(layered.directory, 3)
    left = names(layered.directory)
    assert left.issuperset({*theirs, "d.merged"})
    assert not left & set(ours)


@pytest.mark.parametrize("count", [5, 7, 13] if conftest.long() else [7])
def test_a_pull_comes_after_the_kill(tmp_path: pathlib.Path, count: int) -> None:
    (tmp_path / "images").mkdir()
    backed = points.Backed(tmp_path / "backups")
    with points.guest(tmp_path / "images") as one:
        for step in range(3):
            one.change(step)
            one.back_up(backed)
        assert killed_at(backed.directory, 1 + count % 2, count)
        one.change(4)
        assert one.back_up(backed).kind == "incremental"
        assert check(backed)[-1] == 4
        cut(backed.directory, 2)
        assert check(backed) == [3, 4]
        assert not listing.read(backed.directory).unfinished


def test_a_pull_killed_at_its_last_steps(tmp_path: pathlib.Path) -> None:
    """What is listed is whole at any moment, and can be pruned as soon as the pull is listed."""
    (tmp_path / "images").mkdir()
    with points.guest(tmp_path / "images") as one:
        for step in range(2):
            count, is_listed = 8, 0
            backed = points.Backed(tmp_path / f"backups{step}")
            while True:
                one.change(count)
                if step and not backed.shown:
                    one.back_up(backed)
                    one.change(count + 1)
                new = len(backed.shown) + 1
                backed.shown[new] = one.contents()
                killed = killed_doing(
                    backed.directory, count, functools.partial(_pull, one, backed)
                )
                found = [] if not (backed.directory / chain.manifest_file(1)).exists() else (
                    check(backed)
                )  # fmt: skip
                if new in found and killed:
                    is_listed += 1
                    assert points.verified(backed.directory).good
                    told = cut(backed.directory, 1 + count % 2)
                    assert told.kept[-1].made.number == new
                    assert not listing.read(backed.directory).unfinished
                    assert manifest.read(backed.directory).number == new
                if not killed:
                    break
                shutil.rmtree(backed.directory)
                backed = points.Backed(backed.directory)
                count += 1
            assert is_listed >= 1  # of the renames, only that to manifest.json is left


def _pull(one: points.Guest, backed: points.Backed) -> None:
    pull.pull(one.domain, backed.directory, branch="daily", kind="auto")


@settings(max_examples=6)
@given(
    st.lists(test_restore.LAYER, min_size=2, max_size=5), st.integers(1, 4), st.integers(1, 18),
    test_restore.SIZES, st.sampled_from(test_restore.FORMATS),
)  # fmt: skip
def test_any_layers(
    layers: list[dict[int, int | None]], keep: int, count: int, size: int, base: copy.Format
) -> None:
    with tempfile.TemporaryDirectory() as name:
        backed = points.built(pathlib.Path(name, "backups"), size, layers, base)
        killed_at(backed.directory, keep, count)
        assert check(backed)[-1] == len(layers)
        cut(backed.directory, keep)
        assert check(backed) == list(range(max(1, len(layers) - keep + 1), len(layers) + 1))


# --- while others read ----------------------------------------------------------------------------


def prunes_first(
    directory: pathlib.Path, program: str, backups: pathlib.Path, count: int
) -> dict[str, str]:
    """An environment where PROGRAM, called for the first time, begins only when a prune of BACKUPS
    has come to the COUNT-th thing that it does to names."""
    code = (
        "import pathlib; from tests.live import test_prune;"
        f"test_prune.killed_at(pathlib.Path({str(backups)!r}), 2, {count})"
    )
    place = directory / f"programs{count}"
    first = f'mkdir {place}/once 2>/dev/null && {sys.executable} -B -c "{code}"'
    return {**os.environ, "PATH": places.path_with(place, program, first)}


@pytest.fixture(params=[8, 99])
def overtaken(
    request: pytest.FixtureRequest, backed: points.Backed, tmp_path: pathlib.Path
) -> "Overtaken":
    """virsh-backup in a process of its own, overtaken by a prune as it calls PROGRAM: one that has
    put the images in their places, no more, or is done."""

    def run(program: str, command: str, *argv: str) -> tuple[int, str, str]:
        env = prunes_first(tmp_path, program, backed.directory, request.param)
        done = subprocess.run(
            [sys.executable, "-m", "virtbackup.tools.virsh_backup", command, backed.directory,
             *argv], capture_output=True, text=True, env=env, timeout=100,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


Overtaken = Callable[..., tuple[int, str, str]]


def is_told(said: tuple[int, str, str], backed: points.Backed) -> bool:
    *_, line = [line for line in said[2].splitlines() if line.startswith("error: ")]
    text = f"{backed.directory} was pruned while point 4 was read: try again"
    return said[:2] == (1, "") and text in line


def test_a_server_that_is_overtaken(overtaken: Overtaken, backed: points.Backed) -> None:
    """It would show what is no longer behind an image that stands alone by now."""
    said = overtaken("qemu-storage-daemon", "backup-serve")
    assert is_told(said, backed)
    assert "--blockdev" not in said[2]


def test_a_map_that_is_overtaken(overtaken: Overtaken, backed: points.Backed) -> None:
    assert is_told(overtaken("qemu-nbd", "backup-map"), backed)


def test_a_restore_that_is_overtaken(
    overtaken: Overtaken, backed: points.Backed, tmp_path: pathlib.Path
) -> None:
    """A directory that is good is not called anything else."""
    out = tmp_path / "out"
    assert is_told(overtaken("qemu-nbd", "backup-restore", str(out)), backed)
    assert not out.exists()
    points.put_back(backed, out, fmt="raw")
    for disk, shown in backed.shown[4].items():
        assert (out / f"{disk}.raw").read_bytes() == shown


def test_a_verify_that_is_overtaken(overtaken: Overtaken, backed: points.Backed) -> None:
    """What is wrong all the same is found, too."""
    points.flip(path := backed.directory / "sdb.0004.qcow2", points.find_data(path, 103))
    status, out, err = overtaken("qemu-img", "backup-verify", "--json")
    told = json.loads(out)
    assert (status, err.count("\n")) == (1, 2)
    assert [problem["file"] for problem in told["problems"]] == ["sdb.0004.qcow2"]
    assert "not to be restored: 4\n" in err


def test_a_verify_of_good_backups_that_is_overtaken(
    overtaken: Overtaken, backed: points.Backed
) -> None:
    status, _, err = overtaken("qemu-img", "backup-verify")
    assert (status, err) == (0, "")


# --- refused --------------------------------------------------------------------------------------


def test_a_file_that_is_not_as_it_was(backed: points.Backed) -> None:
    """It is needed: then nothing is changed. It is not: then it goes."""
    path = backed.directory / "vda.0002.qcow2"
    points.flip(path, points.find_data(path, 101))
    before = {file.name: file.read_bytes() for file in backed.directory.iterdir()}
    text = refused(backed.directory)
    assert f"disk 'vda': {path} is not good: it is not what was backed up" in text
    assert {file.name: file.read_bytes() for file in backed.directory.iterdir()} == before


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_what_is_kept_is_not_whole(tmp_path: pathlib.Path, keep: int, fmt: copy.Format) -> None:
    """The newest is a full backup, of which nothing is merged or read: the older ones stay."""
    images = tmp_path / "images"
    images.mkdir()
    backed = points.Backed(tmp_path / "backups")
    with points.guest(images) as one:
        one.back_up(backed)
        one.change(1)
        one.back_up(backed)
        pull.pull(one.domain, backed.directory, branch="daily", kind="full", fmt=fmt)
    path = backed.directory / f"vda.0003.{fmt}"
    content = path.read_bytes()
    for spoil in (path.unlink, lambda: path.write_bytes(content[:100])):
        spoil()
        before = {file.name: file.read_bytes() for file in backed.directory.iterdir()}
        text = refused(backed.directory, keep)
        assert f"point 3 is to be kept and is not whole: disk 'vda', {path.name}: it " in text
        argv = ("backup-prune", str(backed.directory), f"--keep={keep}")
        status, _, err = points.call(*argv, "--dry-run")
        assert (status, "point 3 is to be kept and is not whole" in err) == (1, True)
        assert {file.name: file.read_bytes() for file in backed.directory.iterdir()} == before
    path.write_bytes(content)
    assert len(cut(backed.directory, keep).kept) == keep


def test_directories_that_are_not_sound(
    backed: points.Backed, tmp_path: pathlib.Path, whole: points.Backed
) -> None:
    (backed.directory / "manifest.0002.json").write_text("{")
    assert "is not sound: manifest.0002.json: not a backup manifest" in refused(backed.directory)
    with chain.locked(whole.directory):
        assert "another backup is pulled into" in refused(whole.directory)
    alone = tmp_path / "alone"
    with points.guest(tmp_path) as one:
        pull.pull(one.domain, alone)
    assert "without a branch: nothing to prune" in refused(alone)
    assert "cannot lock" in refused(tmp_path / "none")


def test_of_a_pull_cut_off(backed: points.Backed) -> None:
    partial = backed.directory / "manifest.0005.json.partial"
    partial.touch()
    text = "was cut off: the next one has to finish it first"
    assert text in refused(backed.directory)
    argv = ("backup-prune", str(backed.directory), "--keep=2", "--dry-run")
    status, out, err = points.call(*argv)
    assert (status, out, text in err) == (1, "", True)
    with chain.locked(backed.directory):  # it runs
        assert points.call(*argv)[0] == 0
    partial.unlink()
    (backed.directory / "vda.0005.qcow2.partial").touch()
    cut(backed.directory, 2)
    assert (backed.directory / "vda.0005.qcow2.partial").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"manifests": 1, "files": []}', '{"manifests": [], "files": ["../x"]}',
     '{"manifests": [], "files": ["manifest.json"]}',
     '{"manifests": [], "files": ["vda.0002.qcow2"]}',
     '{"manifests": ["manifest.0004.json"], "files": ["vda.0003.qcow2"]}',
     '{"manifests": ["manifest.0001.json", "manifest.0002.json", "manifest.0003.json",'
     ' "manifest.0004.json"], "files": []}'],
)  # fmt: skip
def test_a_journal_of_nobody(backed: points.Backed, text: str) -> None:
    before = names(backed.directory)
    (backed.directory / "prune.json").write_text(text)
    assert "prune.json" in refused(backed.directory)
    assert names(backed.directory) == {*before, "prune.json"}


def test_an_announcement_of_nobody(backed: points.Backed) -> None:
    (backed.directory / "manifest.0009.json.merged").write_text("{}")
    assert "is of a backup that is not there" in refused(backed.directory)
    (backed.directory / "manifest.0009.json.merged").rename(
        backed.directory / "manifest.0003.json.merged"
    )
    assert "manifest.0003.json.merged is not a backup manifest: " in refused(backed.directory)
    second = manifest.read(backed.directory, "manifest.0002.json")
    for other in (second, dataclasses.replace(second, number=3)):
        (backed.directory / "manifest.0003.json.merged").write_text(other.to_json())
        assert "manifest.0003.json.merged is of another backup" in refused(backed.directory)
        assert check(backed) == [1, 2, 3, 4]
    alone = backed.directory / "manifest.0001.json"  # which stands alone in fact
    whole = manifest.read(backed.directory, alone.name)
    planted = dataclasses.replace(whole, id="another", time=backed.made[2].time)
    (backed.directory / "manifest.0001.json.merged").write_text(planted.to_json())
    assert listing.read(backed.directory).points[0].made == whole


def test_what_is_no_file_of_a_prune(layered: points.Backed) -> None:
    """The error says what is in the way."""
    (layered.directory / "vda.0004.qcow2.merged").mkdir()
    text = refused(layered.directory)
    assert f"cannot prune {layered.directory}: {layered.directory}/vda.0004.qcow2.merged: " in text
    assert check(layered) == [1, 2, 3, 4]


@pytest.mark.may_skip
def test_a_full_disk(whole: points.Backed, tmp_path: pathlib.Path) -> None:
    with places.small_file_system(tmp_path / "out", 8 << 20) as out:
        one = whole.copy(out / "backups")
        before = names(one.directory)
        assert "No space left on device" in refused(one.directory)
        assert names(one.directory) == before
        assert check(one) == [1, 2, 3, 4]


@contextlib.contextmanager
def pruning(directory: pathlib.Path) -> Iterator["subprocess.Popen[bytes]"]:
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "backup-prune", str(directory)]
    one = subprocess.Popen([*argv, "--keep=1"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield one
    finally:
        one.kill()
        one.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(tmp_path: pathlib.Path, number: signal.Signals) -> None:
    """In the middle of the merge: as if nothing had been."""
    layers: list[dict[int, int | None]] = [{n: n for n in range(2000)}, {1999: 1}]
    backed = points.built(tmp_path / "backups", 2000 * BLOCK, layers)
    before = names(backed.directory)
    with pruning(backed.directory) as one:
        aside = backed.directory / "vda.0002.qcow2.merged"
        waiting.until(lambda: aside.exists() and aside.stat().st_blocks > 0, process=one)
        one.send_signal(number)
        one.wait(waiting.DEADLINE)
        assert one.returncode == (130 if number == signal.SIGINT else 143)
    assert names(backed.directory) == before
    assert points.verified(backed.directory).good


def test_what_a_killed_one_had_yet_to_remove_is_told(
    layered: points.Backed, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("backup-prune", str(layered.directory), "--keep=3", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(prune, "_remove_old", _killed)
        with pytest.raises(SystemExit):
            cut(layered.directory, 3)
    before = names(layered.directory)
    foretold = json.loads(points.call(*argv, "--dry-run")[1])
    facts = json.loads(points.call(*argv)[1])
    assert [point["number"] for point in facts["removed"]] == [1]
    assert {**facts, "dry_run": True} == foretold
    assert {*facts["files"], "prune.json"} == before - names(layered.directory)
    assert json.loads(points.call(*argv)[1])["removed"] == []


def _killed(*_: object) -> None:
    raise SystemExit


def test_a_signal_after_the_work(layered: points.Backed, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = prune._remove_old

    def remove_and_signal(directory: pathlib.Path) -> prune.Plan:
        done = remove(directory)
        os.kill(os.getpid(), signal.SIGINT)
        return done

    monkeypatch.setattr(prune, "_remove_old", remove_and_signal)
    assert points.call("backup-prune", str(layered.directory), "--keep=3") == (
        130,
        "",
        f"warning: operation aborted: that was too late: {layered.directory} is pruned\n"
        "error: interrupted\n",
    )
    assert check(layered) == [2, 3, 4]


def test_cancel_between(layered: points.Backed) -> None:
    cancel = copy.Cancel()
    cancel.set()
    with pytest.raises(virtbackup.Error) as raised:
        prune.prune(layered.directory, 2, cancel=cancel)
    assert raised.value.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED
    cancel.close()
    assert check(layered) == [1, 2, 3, 4]
