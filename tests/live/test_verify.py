# SPDX-License-Identifier: LGPL-2.1-or-later
"""What backup-list and backup-verify see in directories that a pull made and something spoilt."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import libvirt
import pytest

import virtbackup
from tests import conftest, waiting
from tests.live import points
from virtbackup.nbd import checksum, copy, header, image, layers
from virtbackup.tools import chain, interrupt, listing, manifest, pull, verify, virsh_connection

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
    pytest.mark.timeout(120),
]

BOTH = ["sdb", "vda"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> points.Backed:
    """Four points, never to be changed."""
    return points.pulled(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def backed(whole: points.Backed, tmp_path: pathlib.Path) -> points.Backed:
    return whole.copy(tmp_path / "backups")


def told(verdict: verify.Verdict) -> list[tuple[str, str | None, str | None]]:
    return [(one.file, one.disk, one.point) for one in verdict.problems]


def labels(verdict: verify.Verdict) -> list[str]:
    return [point.label for point in verdict.bad_points]


# --- good -----------------------------------------------------------------------------------------


def test_a_whole_chain_is_good(whole: points.Backed) -> None:
    verdict = points.verified(whole.directory)
    assert verdict.good
    assert labels(verdict) == []
    assert {link.disk.file for link in verdict.files} == {
        f"{disk}.000{n}.qcow2" for disk in BOTH for n in (1, 2, 3, 4)
    }
    assert len(points.verified(whole.directory, "2").files) == 4
    status, out, err = points.call("backup-verify", str(whole.directory))
    assert (status, err) == (0, "")
    assert "8 files" in out
    assert out.endswith("Backups verified\n")
    status, out, err = points.call("backup-verify", str(whole.directory), "--json", "--point=1")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert facts["good"]
    assert facts["files"] == ["vda.0001.qcow2", "sdb.0001.qcow2"]


def test_raw_and_alone(tmp_path: pathlib.Path) -> None:
    """Disks of raw files, in a directory without a branch: its only point has no number."""
    with points.guest(tmp_path) as one:
        made = pull.pull(one.domain, tmp_path / "out", fmt="raw")
    assert points.verified(tmp_path / "out").good
    [point] = listing.read(tmp_path / "out").points
    assert point.label == point.time == listing.shown_time(made.time)
    status, out, _ = points.call("backup-list", str(tmp_path / "out"))
    assert status == 0
    assert " -       " + point.time in out
    points.flip(tmp_path / "out" / "sdb.raw", 4 << 20)
    verdict = points.verified(tmp_path / "out")
    assert told(verdict) == [("sdb.raw", "sdb", point.time)]
    os.truncate(tmp_path / "out" / "vda.raw", 4 << 20)
    assert str(points.verified(tmp_path / "out").problems[0]) == (
        f"disk 'vda', vda.raw: it has {4 << 20} bytes, expected {points.SIZE}"
    )


def test_list(whole: points.Backed) -> None:
    status, out, err = points.call("backup-list", str(whole.directory))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == [f"Guest:  vm ({points.UUID})", "Branch: daily"]
    assert len(lines) == 3 + 2 + 8
    assert lines[5].split() == [
        "1", listing.shown_time(whole.made[1].time), "vda", "full", "4.00", "MiB",
        *virsh_size(whole.made[1].disks[0].stored), "there",
    ]  # fmt: skip
    status, out, err = points.call("backup-list", str(whole.directory), "--json")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert [point["number"] for point in facts["points"]] == [1, 2, 3, 4]
    assert [point["id"] for point in facts["points"]] == [m.id for m in whole.made.values()]
    disk = facts["points"][1]["disks"][1]
    assert disk["name"] == "sdb"
    assert disk["backing"] == "sdb.0001.qcow2"
    assert disk["problem"] is None
    assert facts["unfinished"] == facts["problems"] == []


def virsh_size(size: int) -> list[str]:
    return virsh_connection.human_size(size).split()


# --- points by name -------------------------------------------------------------------------------


def test_names_of_points(whole: points.Backed) -> None:
    backups = listing.read(whole.directory)
    assert backups.find(None).label == "4"
    assert backups.find("0002").label == backups.find("2").label == "2"
    for number, made in whole.made.items():
        assert made.id is not None
        assert backups.find(made.id).made == made
        assert backups.find(made.time).label == str(number)
        assert backups.find(made.time.replace("T", " ")).label == str(number)
    for wanted, text in (
        ("7", "no point '7' in"), ("20", "no point '20' in"), ("", "no point '' in"),
        (backups.points[0].time[:5], "' is more than one point of"),
    ):  # fmt: skip
        with pytest.raises(virtbackup.Error) as raised:
            backups.find(wanted)
        assert raised.value.get_error_code() == libvirt.VIR_ERR_INVALID_ARG
        assert text in str(raised.value)
        assert f"1 ({backups.points[0].time}), 2 (" in str(raised.value)


def test_a_number_is_not_the_beginning_of_a_year(whole: points.Backed) -> None:
    """Else point 2, which was pruned, is the only one that is left."""
    backups = listing.read(whole.directory)
    left = listing.Backups(whole.directory, backups.points[-1:])
    assert left.find(left.points[0].time[:5]).label == "4"
    for wanted in ("2", "20", left.points[0].time[:4]):
        with pytest.raises(virtbackup.Error, match=f"no point '{wanted}' in"):
            left.find(wanted)


def test_of_many_points_the_newest_are_named(whole: points.Backed) -> None:
    one = listing.read(whole.directory).points[0]
    many = tuple(
        listing.Point(one.file, dataclasses.replace(one.made, number=n)) for n in range(1, 100)
    )
    with pytest.raises(virtbackup.Error, match=r": 89 earlier, 90 \("):
        listing.Backups(whole.directory, many).find("100")


# --- spoilt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("disk", BOTH)
def test_one_flipped_bit_of_data(backed: points.Backed, disk: str, number: int) -> None:
    file = f"{disk}.000{number}.qcow2"
    path, byte = backed.directory / file, number + 99 if number > 1 else 9
    points.flip(path, points.find_data(path, byte))
    verdict = points.verified(backed.directory)
    assert told(verdict) == [(file, disk, str(number))]
    assert "it is not what was backed up: its checksum is" in verdict.problems[0].text
    assert labels(verdict) == [str(n) for n in range(number, 5)]
    if number > 1:
        assert points.verified(backed.directory, str(number - 1)).good
    status, out, err = points.call("backup-verify", str(backed.directory))
    assert status == 1
    assert f"point {number}, disk '{disk}', {file}: it is not what" in out
    hint = f"'backup-restore' with --point {number - 1} takes the newest that is good"
    assert err.splitlines()[1:] == ([hint] if number > 1 else [])
    assert err.startswith(
        f"error: the backups in {backed.directory} are not whole: disk '{disk}', {file}: "
    )
    assert f"not to be restored: {', '.join(labels(verdict))}" in err
    status, out, _ = points.call("backup-verify", str(backed.directory), "--json")
    assert status == 1
    facts = json.loads(out)
    assert facts["problems"][0]["file"] == file
    assert len(facts["bad_points"]) == 5 - number


def places_of(path: pathlib.Path, source: random.Random) -> Iterator[int]:
    """Some bytes of a file, of its header and of those that are not zero; in long tests more."""
    size, many = path.stat().st_size, 1000 if conftest.long() else 20
    content = path.read_bytes()
    used = [at for at in range(size) if content[at]]
    yield from range(0, min(size, 112), 4)
    yield from source.sample(range(size), min(many, size))
    yield from source.sample(used, min(many, len(used)))


def look_of(directory: pathlib.Path, file: str) -> Callable[[], bool]:
    """Whether a look at a directory of one chain finds a problem of FILE: of an image at it alone,
    for there are many."""
    backups = listing.read(directory)
    links = backups.links(backups.points[-1], "vda")
    for link in links:
        if link.disk.file == file:
            return lambda: verify.examine(link).problem is not None

    def look() -> bool:
        try:
            problems = listing.read(directory).problems
        except virtbackup.Error as failure:
            return f" ({file}: not a backup manifest" in str(failure)
        return file in [problem.file for problem in problems]

    return look


@pytest.mark.parametrize("base", ["qcow2", "raw"])
def test_a_change_of_any_byte_of_any_file(tmp_path: pathlib.Path, base: copy.Format) -> None:
    """Data, tables, counts, what nobody uses, manifests; and cuts and what is appended."""
    layers: list[dict[int, int | None]] = [{0: 1, 2: 2}, {0: 4, 1: None, 2: 5}]
    backed = points.built(tmp_path / "b", 2 * checksum.BLOCK + 700, layers, base)
    assert points.verified(backed.directory).good
    source = random.Random(8)
    for path in sorted(backed.directory.iterdir()):
        content, look = path.read_bytes(), look_of(backed.directory, path.name)
        assert not look()
        for at in places_of(path, source):
            bit = 1 << source.randrange(8)
            points.flip(path, at, bit)
            assert look(), (path, at, bit)
            points.flip(path, at, bit)
        for size in (0, len(content) - 1, *source.sample(range(len(content)), 10)):
            os.truncate(path, size)
            assert look(), (path, size)
            path.write_bytes(content)
        for more in (b"\0", b"\n", b"\xff", bytes(checksum.BLOCK)):
            path.write_bytes(content + more)
            assert look(), (path, more[:1])
        path.write_bytes(content)
    assert points.verified(backed.directory).good


@pytest.mark.parametrize("compress", [False, True])
def test_a_change_of_any_byte_of_what_a_pull_made(tmp_path: pathlib.Path, compress: bool) -> None:
    """Of a real guest's disk, what is compressed too."""
    with points.guest(tmp_path) as one:
        pull.pull(one.domain, tmp_path / "out", compress=compress)
    [point] = listing.read(tmp_path / "out").points
    [link] = listing.read(tmp_path / "out").links(point, "vda")
    assert verify.examine(link).problem is None
    source = random.Random(9)
    content = link.path.read_bytes()
    places = [at for at, byte in enumerate(content) if byte]
    for at in (*source.sample(places, 20), *source.sample(range(len(content)), 20)):
        points.flip(link.path, at, 1 << source.randrange(8))
        assert (listing.problem(link) or verify.examine(link).problem) is not None, at
        link.path.write_bytes(content)


def older(directory: pathlib.Path) -> None:
    """Make the manifests those of an older virtbackup."""
    for path in directory.glob("manifest*.json"):
        fields = json.loads(path.read_text())
        del fields["checksum"]
        for disk in fields["disks"]:
            del disk["tables"]
        path.write_text(json.dumps(fields, indent=2) + "\n")


RIGHT = "all that it has of the disk is as it was backed up"


def restored(backed: points.Backed, point: int, out: pathlib.Path) -> bool:
    """Whether backup-restore takes POINT of vda, and the disk is what it was then."""
    argv = (str(backed.directory), str(out), f"--point={point}", "--disk=vda", "--format=raw")
    status, _, _ = points.call("backup-restore", *argv)
    return not status and out.read_bytes() == backed.shown[point]["vda"]


def test_one_flipped_bit_of_tables_is_told_apart(
    backed: points.Backed, tmp_path: pathlib.Path
) -> None:
    """The data is there, so the point can be restored; the exit status is 1 all the same."""
    path = backed.directory / "vda.0003.qcow2"
    points.flip(path, 110)  # behind the header
    verdict = points.verified(backed.directory)
    assert told(verdict) == [("vda.0003.qcow2", "vda", "3")]
    text = verdict.problems[0].text
    assert text.startswith("it is not what was backed up: beside the disk's own bytes its checksum")
    assert text.endswith(f"; {RIGHT}")
    assert labels(verdict) == []
    assert restored(backed, 4, tmp_path / "out")
    for argv, words in (((), "every point listed"), (("--point=3",), "the point")):
        status, _, err = points.call("backup-verify", str(backed.directory), *argv)
        assert (status, err.endswith(f"{RIGHT}; {words} can be restored\n")) == (1, True)
        assert len(err.splitlines()) == 1
    points.flip(path, points.find_data(path, 102))
    verdict = points.verified(backed.directory)
    [text] = [problem.text for problem in verdict.problems]
    assert "own bytes its checksum is" in text
    assert "; it is not what was backed up: its checksum is" in text
    assert labels(verdict) == ["3", "4"]


@pytest.mark.parametrize("count", [0, 2, 255])
def test_counts_that_are_wrong(backed: points.Backed, tmp_path: pathlib.Path, count: int) -> None:
    """Of a cluster's uses: nobody who only reads the disk looks at them."""
    path = backed.directory / "vda.0002.qcow2"
    with image.File(path) as file:
        blocks = int.from_bytes(file.read(48, 8), "big")
        counts = int.from_bytes(file.read(blocks, 8), "big")
    with path.open("r+b") as opened:
        opened.seek(counts)
        opened.write(count.to_bytes(2, "big"))
    verdict = points.verified(backed.directory)
    assert told(verdict) == [("vda.0002.qcow2", "vda", "2")]
    assert verdict.problems[0].text.endswith(f"; {RIGHT}")
    assert labels(verdict) == []
    older(backed.directory)
    verdict = points.verified(backed.directory)
    assert told(verdict) == [("vda.0002.qcow2", "vda", "2")]
    assert verdict.problems[0].text.startswith("its tables are damaged: ")
    assert verdict.problems[0].text.endswith(f"; {RIGHT}")
    assert labels(verdict) == []
    assert restored(backed, 2, tmp_path / "out")


def test_a_table_that_leads_out_of_the_file(backed: points.Backed, tmp_path: pathlib.Path) -> None:
    path = backed.directory / "vda.0002.qcow2"
    with image.File(path) as file:
        first = int.from_bytes(file.read(40, 8), "big")
    points.flip(path, first + 3)
    verdict = points.verified(backed.directory)
    [text] = [problem.text for problem in verdict.problems]
    assert text.startswith("its tables are damaged: one of its tables is out of place, at offset ")
    assert RIGHT not in text
    assert labels(verdict) == ["2", "3", "4"]
    assert not restored(backed, 2, tmp_path / "out")


@pytest.mark.parametrize("files", [4, 7])
def test_a_qemu_img_that_fails_is_no_damage(
    whole: points.Backed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    """Here for want of files that it may open: it is aborted, or ends with status 1."""
    real = shutil.which("qemu-img")
    script = tmp_path / "qemu-img"
    script.write_text(f'#!/bin/sh\nulimit -n {files}\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    verdict = points.verified(whole.directory, "1")
    assert labels(verdict) == []
    for problem in verdict.problems:
        assert problem.text.startswith("qemu-img cannot look through its tables: ")
        assert "Too many open files" in problem.text
        assert problem.text.endswith(f"; {RIGHT}")
    assert len(verdict.problems) == 2


def test_a_qemu_img_that_cannot_be_run_is_no_damage(
    whole: points.Backed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is no program; it can be for want of memory or processes as well."""
    (tmp_path / "qemu-img").touch(0o755)
    (tmp_path / "qemu-nbd").symlink_to(str(shutil.which("qemu-nbd")))
    monkeypatch.setenv("PATH", str(tmp_path))
    verdict = points.verified(whole.directory, "1")
    assert labels(verdict) == []
    expected = f"qemu-img cannot look through its tables: Exec format error; {RIGHT}"
    assert [problem.text for problem in verdict.problems] == [expected] * 2


def test_one_flipped_bit_of_a_manifest(backed: points.Backed) -> None:
    """It is named, also where the point can be restored all the same."""
    for file in ("manifest.0002.json", "manifest.json"):
        path = backed.directory / file
        content = path.read_bytes()
        points.flip(path, content.index(b"<domain "))
        verdict = points.verified(backed.directory)
        assert told(verdict) == [(file, None, None)]
        assert "its own checksum does not fit" in verdict.problems[0].text
        assert labels(verdict) == []
        status, _, err = points.call("backup-verify", str(backed.directory))
        assert status == 1
        assert f"are not whole: {file}: it is not as it was written" in err
        assert points.verified(backed.directory, "1").good
        path.write_bytes(content)
    assert points.verified(backed.directory).good
    points.flip(backed.directory / "manifest.0002.json", content.index(b"<domain "))
    assert told(points.verified(backed.directory, "3")) == [("manifest.0002.json", None, None)]


def test_manifests_of_an_older_virtbackup(backed: points.Backed) -> None:
    """They tell of what a guest reads alone; that is compared as it was, and said."""
    older(backed.directory)
    status, out, err = points.call("backup-verify", str(backed.directory))
    assert (status, err) == (0, "")
    assert "8 of them, of an older virtbackup, have no checksum of their tables" in out
    status, out, _ = points.call("backup-verify", str(backed.directory), "--json")
    assert (status, len(json.loads(out)["in_part"])) == (0, 8)
    points.flip(
        backed.directory / "vda.0002.qcow2",
        points.find_data(backed.directory / "vda.0002.qcow2", 101),
    )
    assert told(points.verified(backed.directory)) == [("vda.0002.qcow2", "vda", "2")]


def spoil_truncate(directory: pathlib.Path) -> None:
    path = directory / "vda.0002.qcow2"
    os.truncate(path, path.stat().st_size - (1 << 16))


def spoil_truncate_to_nothing(directory: pathlib.Path) -> None:
    os.truncate(directory / "vda.0002.qcow2", 0)


def spoil_remove(directory: pathlib.Path) -> None:
    (directory / "vda.0002.qcow2").unlink()


def spoil_replace_by_directory(directory: pathlib.Path) -> None:
    spoil_remove(directory)
    (directory / "vda.0002.qcow2").mkdir()


def spoil_rebase(directory: pathlib.Path) -> None:
    """Another backing file name, of the same length and so of nothing else changed."""
    path = directory / "vda.0002.qcow2"
    path.write_bytes(path.read_bytes().replace(b"vda.0001.qcow2", b"sdb.0001.qcow2", 1))


def spoil_swap(directory: pathlib.Path) -> None:
    """A good file, of the same size and with the right backing file's name, of another backup."""
    path = directory / "vda.0002.qcow2"
    other = (directory / "sdb.0004.qcow2").read_bytes()
    path.write_bytes(other.replace(b"sdb.0003.qcow2", b"vda.0001.qcow2", 1))


def spoil_standing_alone(directory: pathlib.Path) -> None:
    shutil.copy(directory / "vda.0001.qcow2", directory / "vda.0002.qcow2")


def spoil_other_format(directory: pathlib.Path) -> None:
    (directory / "vda.0002.qcow2").write_bytes(bytes(1 << 20))


def spoil_size(directory: pathlib.Path) -> None:
    path = directory / "vda.0002.qcow2"
    data = bytearray(path.read_bytes())
    data[24:32] = (8 << 20).to_bytes(8, "big")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_truncate, ""),
        (spoil_truncate_to_nothing, "it is shorter than the header of a qcow2 image"),
        (spoil_remove, "it is missing"),
        (spoil_replace_by_directory, "it is no file"),
        (spoil_rebase, "its backing file is sdb.0001.qcow2, expected vda.0001.qcow2"),
        (spoil_swap, "it is not what was backed up"),
        (spoil_standing_alone, "its backing file is none, expected vda.0001.qcow2"),
        (spoil_other_format, "it is not a qcow2 image"),
        (spoil_size, "it is a disk of 8388608 bytes, expected 4194816"),
    ],
)
def test_a_bad_link(
    backed: points.Backed, spoil: Callable[[pathlib.Path], None], text: str
) -> None:
    spoil(backed.directory)
    verdict = points.verified(backed.directory)
    assert told(verdict) == [("vda.0002.qcow2", "vda", "2")]
    assert text in verdict.problems[0].text
    assert labels(verdict) == ["2", "3", "4"]
    assert points.verified(backed.directory, "1").good
    status, out, _ = points.call("backup-list", str(backed.directory))
    assert status == 0
    if text and text != "it is not what was backed up":
        assert f" {text}\n" in out
        assert out.count(f" of vda.0002.qcow2: {text}\n") == 2


def test_a_manifest_is_missing(backed: points.Backed) -> None:
    (backed.directory / "manifest.0002.json").unlink()
    verdict = points.verified(backed.directory)
    assert labels(verdict) == ["3", "4"]
    assert [one.text for one in verdict.problems] == [
        "it is missing: backups before and after it are there"
    ] + [
        f"disk '{disk}': {backed.directory} has no manifest of {disk}.0002.qcow2"
        for _ in (3, 4)
        for disk in ("vda", "sdb")
    ]
    states = listing.read(backed.directory).states()
    assert states["vda.0003.qcow2"] == "no older manifest tells of vda.0002.qcow2"
    assert states["vda.0004.qcow2"] == (
        "of vda.0003.qcow2: no older manifest tells of vda.0002.qcow2"
    )
    [unfinished, _] = listing.read(backed.directory).unfinished
    assert unfinished.text == "no manifest tells of it"


def test_a_manifest_is_missing_that_nothing_follows(tmp_path: pathlib.Path) -> None:
    """A prune takes the oldest alone, so a number between two others was there."""
    backed = points.built(tmp_path / "backups", 3 * checksum.BLOCK, [{0: 1}])
    for number in (2, 3, 5):
        full = _with(backed.made[1], number=number, id=f"id{number}")
        (backed.directory / f"manifest.{number:04}.json").write_text(full)
    shutil.copy(backed.directory / "manifest.0005.json", backed.directory / "manifest.json")
    text = "it is missing: backups before and after it are there"
    expected = listing.Problem("manifest.0004.json", text, point="4")
    verdict = points.verified(backed.directory)
    assert (list(verdict.problems), labels(verdict)) == ([expected], [])
    status, _, err = points.call("backup-prune", str(backed.directory), "--keep=1")
    assert (status, "manifest.0004.json: it is missing" in err) == (1, True), err
    (backed.directory / "manifest.0002.json").unlink()
    (backed.directory / "manifest.0003.json").unlink()
    assert list(listing.read(backed.directory).problems) == [
        listing.Problem("manifest.0002.json", "it and all up to manifest.0004.json are missing:"
                        " backups before and after them are there")
    ]  # fmt: skip
    (backed.directory / "prune.json").write_text("{}")  # what it removes is not missing
    assert not listing.read(backed.directory).problems


@pytest.mark.parametrize("count", [1, 70000])
def test_a_cut_image_is_seen_without_reading_it(backed: points.Backed, count: int) -> None:
    path = backed.directory / "vda.0002.qcow2"
    length = path.stat().st_size
    os.truncate(path, length - count)
    text = f"it has {length - count} bytes, expected {length}"
    states = listing.read(backed.directory).states()
    assert states["vda.0002.qcow2"] == text
    assert states["vda.0003.qcow2"] == f"of vda.0002.qcow2: {text}"
    assert (states["vda.0001.qcow2"], states["sdb.0003.qcow2"]) == (None, None)
    status, _, err = points.call("backup-serve", str(backed.directory), "--point=3")
    assert (status, f"{path} is not good: {text}" in err) == (1, True), err


def test_the_newest_manifest_is_missing(backed: points.Backed) -> None:
    """It is there a second time, as manifest.json."""
    (backed.directory / "manifest.0004.json").unlink()
    verdict = points.verified(backed.directory)
    assert told(verdict) == [("manifest.0004.json", None, None)]
    assert labels(verdict) == []
    assert listing.read(backed.directory).find("4").made == backed.made[4]
    (backed.directory / "manifest.0004.json").write_text("{")
    _, _, err = points.call("backup-verify", str(backed.directory))
    assert "; every point listed can be restored\n" in err
    assert listing.read(backed.directory).find("4").made == backed.made[4]
    shutil.copy(backed.directory / "manifest.json", backed.directory / "manifest.0004.json")
    assert points.verified(backed.directory).good
    (backed.directory / "manifest.json").unlink()
    assert told(points.verified(backed.directory)) == [("manifest.json", None, None)]
    shutil.copy(backed.directory / "manifest.0002.json", backed.directory / "manifest.json")
    assert told(points.verified(backed.directory)) == [("manifest.json", None, None)]


def _with(made: manifest.Manifest, **fields: object) -> str:
    return dataclasses.replace(made, **fields).to_json()  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0", "null", '{"version": 2}'])
def test_a_manifest_is_broken(backed: points.Backed, text: str) -> None:
    (backed.directory / "manifest.0003.json").write_text(text)
    verdict = points.verified(backed.directory)
    assert verdict.problems[0].file == "manifest.0003.json"
    assert labels(verdict) == ["4"]
    status, _, err = points.call("backup-list", str(backed.directory))
    assert status == 0
    assert err.startswith("warning: manifest.0003.json: not a backup manifest: ")
    _, _, err = points.call("backup-verify", str(backed.directory))
    assert "; not to be restored: 3, 4\n" in err


def test_a_manifest_of_others(backed: points.Backed) -> None:
    made = backed.made[1]
    path = backed.directory / "manifest.0001.json"
    domain = manifest.Domain("x", points.UUID[:-1] + "2")
    for text, problem in (
        (_with(made, domain=domain), "it is of another guest, 'x'"),
        (_with(made, branch="b"), "it is of another branch, 'b'"),
        (_with(made, number=7), "it is the manifest of backup 7"),
    ):
        path.write_text(text)
        assert (
            str(points.verified(backed.directory).problems[0]) == f"manifest.0001.json: {problem}"
        )


def test_points_of_two_directories(tmp_path: pathlib.Path) -> None:
    """Of the same guest and branch, each whole, and what follows one is over the other."""
    (tmp_path / "images").mkdir()
    first, second = (points.Backed(tmp_path / name) for name in ("first", "second"))
    with points.guest(tmp_path / "images") as one:
        for backed in (first, second):
            for step in range(1, 4):
                one.machine.io("vda", f"write -P {step + len(backed.directory.name)} 3M 64k")
                one.back_up(backed)
            assert points.verified(backed.directory).good
            if backed is first:
                one.domain.branchDelete("daily")
        for file in ("manifest.0002.json", "vda.0002.qcow2", "sdb.0002.qcow2"):
            shutil.copy(first.directory / file, second.directory)
        verdict = points.verified(second.directory)
        assert labels(verdict) == ["2", "3"]
        own, other = second.made[2].id, first.made[2].id
        text = f"it follows backup '{own}', and vda.0002.qcow2 is of '{other}'"
        assert f"disk 'vda': vda.0003.qcow2: {text}" in [one.text for one in verdict.problems]
        states = listing.read(second.directory).states()
        assert states["vda.0003.qcow2"] == text
        with pytest.raises(virtbackup.Error, match=text):
            points.put_back(second, tmp_path / "out")
        made = one.back_up(second)
        assert made.kind == "full"
        assert made.disks[0].reason == f"{second.directory}/vda.0003.qcow2: {text}"
    assert labels(points.verified(second.directory)) == ["2", "3"]


@pytest.mark.parametrize("name", ["manifest.00003.json", "manifest.\u0660\u0660\u0660\u0663.json"])
def test_another_name_of_a_manifest(backed: points.Backed, name: str) -> None:
    """A copy is no point of its own, and none that a prune counts."""
    (backed.directory / name).write_bytes((backed.directory / "manifest.0003.json").read_bytes())
    assert [point.label for point in listing.read(backed.directory).points] == ["1", "2", "3", "4"]
    assert points.verified(backed.directory).good
    assert points.call("backup-prune", str(backed.directory), "--keep=3")[0] == 0
    assert [point.label for point in listing.read(backed.directory).points] == ["2", "3", "4"]


def test_a_manifest_that_leads_nowhere(backed: points.Backed) -> None:
    """Loops, disks of other sizes, checksums and formats that nobody knows."""
    made = backed.made[4]
    [vda, sdb] = made.disks

    def look(changed: manifest.Disk) -> str:
        text = _with(made, disks=(changed, sdb))
        for file in ("manifest.0004.json", "manifest.json"):
            (backed.directory / file).write_text(text)
        problem = points.verified(backed.directory).problems[0]
        assert (problem.file, problem.point) == (changed.file, "4")
        return problem.text

    assert "vda.0004.qcow2 cannot be behind vda.0004.qcow2" in look(
        dataclasses.replace(vda, backing=vda.file)
    )
    assert "cannot be behind" in look(dataclasses.replace(vda, size=1 << 20))
    assert "nothing is told to be behind" in look(dataclasses.replace(vda, backing=None))
    wrong = dataclasses.replace(vda.checksum, algorithm="md5")
    assert "a checksum 'md5' is unknown" in look(dataclasses.replace(vda, checksum=wrong))
    assert "format 'vmdk' is unknown" in look(dataclasses.replace(vda, format="vmdk"))


def test_an_image_that_would_open_others(backed: points.Backed, tmp_path: pathlib.Path) -> None:
    """A header with an external data file, which QEMU would open, is refused before that."""
    path = backed.directory / "vda.0001.qcow2"
    data = bytearray(path.read_bytes())
    data[79] |= 4
    path.write_bytes(data)
    assert header.parse(bytes(data)).external_data
    assert "in another file" in points.verified(backed.directory).problems[0].text


def test_an_image_that_names_what_it_needs(tmp_path: pathlib.Path) -> None:
    """As it likes: QEMU says the words as they are, and here they neither begin a line nor control
    a terminal."""
    backed = points.built(tmp_path / "backups", 1 << 20, [{0: 1}, {1: 2}])
    path = backed.directory / "vda.0001.qcow2"
    data = bytearray(path.read_bytes())
    data[78] |= 1 << 2  # the feature 10
    table = data.index(b"\x68\x03\xf8\x57") + 8
    data[table : table + 48] = b"\0\x0a" + b"\x1b[31mred\nerror: all is good".ljust(46, b"\0")
    path.write_bytes(data)
    words = r"Unsupported qcow2 feature(s): \x1b[31mred error: all is good"
    told = f"cannot connect to image {path}: {words}"
    status, out, err = points.run("backup-verify", str(backed.directory))
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("error: the backups in ")
    assert (out.count(told), err.count(told)) == (1, 1)
    for argv in (["backup-restore", str(tmp_path / "out")], ["backup-map"]):
        status, out, err = points.run(argv[0], str(backed.directory), *argv[1:])
        assert (status, out, err) == (1, "", f"error: operation failed: {told}\n")


@pytest.mark.timeout(30)
def test_what_is_no_file_is_not_waited_for(backed: points.Backed) -> None:
    """A pipe that nobody writes to, and a file without end."""
    path = backed.directory / "manifest.0003.json"
    path.unlink()
    os.mkfifo(path)
    assert str(points.verified(backed.directory).problems[0]) == (
        f"manifest.0003.json: cannot read {path}: it is no file"
    )
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "it is no file" in points.verified(backed.directory).problems[0].text
    path.unlink()
    path.touch()
    os.truncate(path, 1 << 40)
    assert "File too large" in points.verified(backed.directory).problems[0].text
    assert labels(points.verified(backed.directory)) == ["4"]
    path.unlink()
    path.write_text(backed.made[3].to_json())
    for name in ("prune.json", "manifest.0003.json.merged"):
        os.mkfifo(backed.directory / name)
        assert points.verified(backed.directory).good
        status, _, err = points.call("backup-prune", str(backed.directory), "--keep=3")
        assert (status, f"{backed.directory / name}: it is no file" in err) == (1, True)
        (backed.directory / name).unlink()
    os.mkfifo(backed.directory / "manifest.json.partial")  # of which nothing is kept
    assert points.call("backup-prune", str(backed.directory), "--keep=1")[0] == 0
    assert not (backed.directory / "manifest.json.partial").exists()
    assert points.verified(backed.directory).good


@pytest.mark.timeout(30)
def test_a_pipe_in_place_of_an_image_that_a_prune_has_put_there(tmp_path: pathlib.Path) -> None:
    """Which is looked at to see whether it did."""
    backed = points.built(tmp_path / "backups", 1 << 20, [{0: 1}, {1: 2}])
    path = backed.directory / "vda.0002.qcow2"
    [disk] = backed.made[2].disks
    alone = dataclasses.replace(disk, backing=None, kind="full", since=None)
    coming = _with(backed.made[2], disks=(alone,))
    (backed.directory / "manifest.0002.json.merged").write_text(coming)
    path.unlink()
    os.mkfifo(path)
    status, out, _ = points.run("backup-list", str(backed.directory))
    assert (status, "it is no file" in out) == (0, True)
    status, _, err = points.run("backup-verify", str(backed.directory))
    assert (status, "vda.0002.qcow2: it is no file; not to be restored: 2\n" in err) == (1, True)


def test_a_file_that_has_nothing_just_now(tmp_path: pathlib.Path) -> None:
    """Calls itself a file, and would be waited for."""
    try:
        os.close(os.open("/proc/kmsg", os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        pytest.skip("not allowed to read what the kernel says: this wants root")
    backed = points.built(tmp_path / "backups", 1 << 20, [{0: 1}, {1: 2}])
    path = backed.directory / "manifest.0002.json"
    path.unlink()
    path.symlink_to("/proc/kmsg")
    for _ in range(2):  # from the second time on
        problem = str(points.verified(backed.directory).problems[0])
    assert problem == f"manifest.0002.json: cannot read {path}: Resource temporarily unavailable"


# --- unfinished -----------------------------------------------------------------------------------


def test_what_is_unfinished_is_told(backed: points.Backed) -> None:
    for name in ("vda.0005.qcow2.partial", "manifest.0002.json.merged", "vda.0009.raw"):
        (backed.directory / name).touch()
    (backed.directory / "notes.txt").touch()
    status, _, err = points.call("backup-list", str(backed.directory))
    assert status == 0
    assert err.splitlines() == [
        "warning: no part of a backup: manifest.0002.json.merged: of a prune cut off",
        "warning: no part of a backup: vda.0005.qcow2.partial: of a backup that was not finished",
        "warning: no part of a backup: vda.0009.raw: no manifest tells of it",
    ]
    assert points.verified(backed.directory).good


def test_what_is_under_way_is_told(backed: points.Backed) -> None:
    """Nobody is to tidy up after a prune that runs."""
    (backed.directory / "vda.0002.qcow2.merged").touch()
    argv = ("backup-list", str(backed.directory))
    place = "warning: no part of a backup: vda.0002.qcow2.merged: of a "
    with chain.locked(backed.directory):
        assert points.call(*argv)[2] == f"{place}pull or a prune that runs\n"
    assert points.call(*argv)[2] == f"{place}prune cut off\n"
    with chain.locked(backed.directory):  # which looking does not hold
        pass


def test_directories_without_a_backup(tmp_path: pathlib.Path) -> None:
    for command in ("backup-list", "backup-verify"):
        status, out, err = points.call(command, str(tmp_path / "none"))
        assert (status, out) == (1, "")
        assert err == f"error: cannot read {tmp_path / 'none'}: No such file or directory\n"
    for name, text in (
        (None, f"{tmp_path} has no backup"),
        ("vda.qcow2.partial", "(vda.qcow2.partial: of a backup that was not finished)"),
        ("manifest.json", "(manifest.json: not a backup manifest: "),
    ):
        if name is not None:
            (tmp_path / name).write_text("")
        status, out, err = points.call("backup-list", str(tmp_path))
        assert (status, out) == (1, "")
        assert text in err
        if name is not None:
            (tmp_path / name).unlink()


# --- ended ----------------------------------------------------------------------------------------


def test_cancel(whole: points.Backed) -> None:
    cancel = copy.Cancel()
    cancel.set()
    with pytest.raises(virtbackup.Error) as raised:
        verify.verify(listing.read(whole.directory), cancel=cancel)
    assert raised.value.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED
    cancel.close()


@pytest.mark.timeout(30)
def test_a_look_through_tables_can_be_ended(
    whole: points.Backed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes minutes of an image of terabytes."""
    script, pid = tmp_path / "qemu-img", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\necho $$ > '{pid}.new'; mv '{pid}.new' '{pid}'; exec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "backup-verify"]
    with subprocess.Popen([*argv, str(whole.directory)], stderr=subprocess.DEVNULL) as process:
        waiting.until(pid.exists, process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(waiting.DEADLINE) == 143
    assert not pathlib.Path(f"/proc/{pid.read_text().strip()}").exists()


@pytest.mark.timeout(30)
def test_what_has_hardly_begun_can_be_ended(whole: points.Backed) -> None:
    """Where SIGTERM has a handler: a program that is not yet the program has it, too."""
    backups = listing.read(whole.directory)
    job = verify.job(backups.links(backups.points[0], "vda")[0])
    with interrupt.deferred() as cancel:
        cancel.set()
        for _ in range(30):
            with pytest.raises(virtbackup.Error, match="the copy was cancelled"):
                copy.copy([job], cancel=cancel)
            with pytest.raises(virtbackup.Error, match="the copy was cancelled"):
                list(layers.shown([job], cancel))


def test_a_missing_program_is_named(whole: points.Backed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(virtbackup.Error, match="cannot run qemu-nbd: No such file"):
        points.verified(whole.directory, "1")


def test_names_that_qemu_could_take_for_something_else(
    tmp_path: pathlib.Path, whole: points.Backed
) -> None:
    strange = whole.copy(tmp_path / "nbd:a, b")
    assert points.verified(strange.directory).good
