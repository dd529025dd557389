# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manifest of a pulled backup: what is written is read, what is not one is refused."""

import dataclasses
import errno
import json
import os
import pathlib
import struct
import time
import typing

import libvirt
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import virtbackup
from virtbackup.conf import backup_conf
from virtbackup.tools import chain, listing, manifest, prune

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1).filter(
    lambda name: name not in (".", "..")
)
sizes = st.integers(0, (1 << 63) - 1)
texts = st.text(st.characters(codec="utf-8"))
manifests = st.builds(
    manifest.Manifest,
    version=st.just(manifest.VERSION),
    domain=st.builds(manifest.Domain, texts, texts),
    kind=st.just("full"),
    time=texts,
    disks=st.lists(
        st.builds(
            manifest.Disk,
            name=names,
            file=names,
            format=texts,
            size=sizes,
            checksum=st.builds(manifest.Checksum, texts, sizes, texts),
            stored=sizes,
            kind=st.sampled_from(["full", "incremental"]),
            backing=st.none() | names,
            since=st.none() | texts,
            reason=st.none() | texts,
            tables=st.none() | st.builds(manifest.Checksum, texts, sizes, texts),
            length=st.none() | sizes,
        ),
        max_size=3,
        unique_by=(lambda disk: disk.name, lambda disk: disk.file),
    ).map(tuple),
    backup_xml=texts,
    domain_xml=texts,
    id=st.none() | texts,
    branch=st.none() | texts,
    number=st.none() | sizes,
)

GOOD = manifest.Manifest(
    version=manifest.VERSION,
    domain=manifest.Domain("vm", "b44330ff-db75-5045-85a1-73bcf9d5d122"),
    kind="full",
    time="2026-01-02T03:04:05+00:00",
    disks=(
        manifest.Disk("vda", "vda.raw", "raw", 1000, manifest.Checksum("a", 65536, "0f"), 4096),
    ),
    backup_xml="<domainbackup/>",
    domain_xml="<domain/>",
)


@given(manifests)
def test_what_is_written_is_read(made: manifest.Manifest) -> None:
    assert manifest.Manifest.from_json(made.to_json()) == made
    assert manifest.changed(made.to_json()) is None


def changed(**fields: object) -> str:
    return json.dumps(json.loads(GOOD.to_json()) | fields)


DISK = json.loads(GOOD.to_json())["disks"][0]


def changed_disk(**fields: object) -> str:
    return changed(disks=[DISK | fields])


def test_a_device_by_a_name_that_is_not_utf_8() -> None:
    made = manifest.Manifest.from_json(changed_disk(type="block", file="/dev/\udcff"))
    assert made.disks[0].file == "/dev/\udcff"


def test_a_field_not_known_is_passed_over() -> None:
    assert manifest.Manifest.from_json(changed(later="x")) == GOOD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "expected an object"),
        ("[" * 100_000, ""),
        ("{}", "version is not of type int"),
        (changed(version=2), "version 2 is not 1"),
        (changed(version=True), "version is not of type int"),
        (changed(domain="vm"), "domain is not of type dict"),
        (changed(disks=["vda"]), "a disk is not an object"),
        (changed(time=None), "time is not of type str"),
        (changed_disk(size=-1), "size is negative"),
        (changed_disk(size=1 << 63), "size is too large"),
        (changed_disk(stored=10**400), "stored is too large"),
        (changed(number=1 << 63), "number is too large"),
        (changed_disk(size="1000"), "size is not of type int"),
        (changed_disk(checksum={}), "algorithm is not of type str"),
        (changed_disk(file="../vda.raw"), "'../vda.raw' is not a file name"),
        (changed_disk(file="/etc/passwd"), "'/etc/passwd' is not a file name"),
        (changed_disk(file=".."), "'..' is not a file name"),
        (changed_disk(file=""), "'' is not a file name"),
        (changed_disk(file="\ud800"), "'\ud800' is not a file name"),
        (changed_disk(backing="\udcff"), "'\udcff' is not a file name"),
        (changed_disk(type="block", file="/dev/\ud800"), "'/dev/\ud800' is not the path of a"),
        # a restore makes files of these names
        (changed_disk(name="../../etc/x"), "'../../etc/x' is not a file name"),
        (changed_disk(name="/etc/x"), "'/etc/x' is not a file name"),
        (changed_disk(name="x\0"), "'x\0' is not a file name"),
        (changed_disk(name="x\udcff"), "'x\udcff' is not a file name"),
        (changed(disks=[DISK, DISK | {"file": "x"}]), "two disks are called 'vda'"),
        (changed(disks=[DISK, DISK | {"name": "vdb"}]), "two disks are in 'vda.raw'"),
    ],
)
def test_what_is_not_a_manifest_is_refused(text: str, reason: str) -> None:
    with pytest.raises(virtbackup.Error) as raised:
        manifest.Manifest.from_json(text)
    assert raised.value.get_error_code() == libvirt.VIR_ERR_INVALID_ARG
    assert f"not a backup manifest: {reason}" in str(raised.value)


def test_its_checksum_is_of_what_stands_before_it() -> None:
    """As the module defines it, for readers in another language."""
    text = GOOD.to_json()
    body = text[: text.index('  "checksum": "xxh3')]
    value = json.loads(text)["checksum"]
    assert value == f"xxh3-128:{xxhash.xxh3_128_hexdigest(body.encode())}"
    assert text[len(body) :] == f'  "checksum": "{value}"\n}}\n'


@pytest.mark.parametrize("mask", [1, 0x20, 0x80, 0xFF])
def test_a_flip_of_any_byte_is_noticed(mask: int, tmp_path: pathlib.Path) -> None:
    content = GOOD.to_json().encode()
    path = tmp_path / manifest.FILE
    for offset in range(len(content)):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ mask]) + content[offset + 1 :])
        try:
            _, problem = manifest.read_checked(tmp_path)
        except virtbackup.Error:
            continue
        assert problem is not None, (offset, content[offset - 10 : offset + 10])


def test_what_is_before_and_behind_it_counts() -> None:
    text = GOOD.to_json()
    for wrong in (text + "\n", " " + text, text.replace("\n", "\r\n"), text[:-1]):
        assert manifest.Manifest.from_json(wrong) == GOOD
        assert manifest.changed(wrong) is not None


def test_a_manifest_of_before_there_were_checksums_of_it() -> None:
    old = json.loads(GOOD.to_json())
    del old["checksum"]
    assert manifest.changed(json.dumps(old)) is not None  # it tells of tables
    for disk in old["disks"]:
        del disk["tables"]
    assert manifest.changed(json.dumps(old)) is None
    assert manifest.Manifest.from_json(json.dumps(old)) == GOOD


def test_reading_a_directory(tmp_path: pathlib.Path) -> None:
    with pytest.raises(virtbackup.Error, match=r"cannot read .*manifest\.json: No such file"):
        manifest.read(tmp_path)
    path = tmp_path / manifest.FILE
    path.write_bytes(b"\xff")
    with pytest.raises(virtbackup.Error, match="is not a backup manifest"):
        manifest.read(tmp_path)
    path.write_text(GOOD.to_json())
    assert manifest.read(tmp_path) == GOOD


def test_every_field_is_in_the_file() -> None:
    """A reader in another language finds these."""
    written = typing.cast("dict[str, object]", json.loads(GOOD.to_json()))
    assert sorted(written) == [
        "backup_xml", "branch", "checksum", "disks", "domain", "domain_xml", "id", "kind", "number",
        "time", "version",
    ]  # fmt: skip


def test_as_many_disks_as_the_file_has_room_for() -> None:
    """They are looked at one by one, and not each beside all others."""
    fields = json.loads(GOOD.to_json())
    [disk, *_] = fields["disks"]
    names = [f"v{number}" for number in range(20000)]
    fields["disks"] = [disk | {"name": name, "file": f"{name}.raw"} for name in names]
    started = time.process_time()
    read = manifest.Manifest.from_json(json.dumps(fields))
    point = listing.Point("manifest.json", read)
    links = {listing.Link(point, point.disk(name), pathlib.Path(name)) for name in names}
    assert len(links) == len(names)
    assert time.process_time() - started < 20


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_a_pull_cut_off_has_left_is_of_that_alone(
    tmp_path: pathlib.Path, is_damaged: bool
) -> None:
    """Whatever is under its manifest's name: a copy of another one, or what has come to be one."""
    disk = dataclasses.replace(GOOD.disks[0], file="vda.0001.qcow2")
    first = dataclasses.replace(GOOD, number=1, branch="b", disks=(disk,))
    coming = dataclasses.replace(disk, file="vda.0002.qcow2")
    second = dataclasses.replace(first, number=2, disks=(coming,)).to_json()
    text = second.replace(coming.file, disk.file) if is_damaged else first.to_json()
    image, pending = tmp_path / disk.file, tmp_path / "manifest.0002.json.partial"
    image.touch()
    pending.write_text(text)
    assert not chain.recover(tmp_path, {}, chain.Chain(tmp_path, (first,)))
    assert image.exists()
    assert not pending.exists()


@pytest.mark.timeout(20)
def test_no_increment_goes_over_images_that_are_behind_one_another(tmp_path: pathlib.Path) -> None:
    """As nobody makes them, but who means harm."""
    files = ("vda.0001.qcow2", "vda.0002.qcow2")
    backups = []
    for number, (file, other) in enumerate(zip(files, reversed(files), strict=True), 1):
        fixed = struct.pack(">4sIQIIQI", b"QFI\xfb", 2, 72, len(other), 16, 1024, 0)
        (tmp_path / file).write_bytes(fixed.ljust(72, b"\0") + other.encode())
        disk = dataclasses.replace(
            GOOD.disks[0], file=file, format="qcow2", kind="incremental", backing=other
        )
        backups.append(dataclasses.replace(GOOD, id=f"i{number}", number=number, disks=(disk,)))
    point = backup_conf.Point("i2", 1.0)
    line = backup_conf.BranchDisk("vda", 65536, 0, True, None, point)
    gap = chain.Chain(tmp_path, tuple(backups)).gap("vda", line)
    assert gap == f"{tmp_path}/vda.0002.qcow2 is behind itself"


def test_a_file_that_cannot_be_written_whole_is_not_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under a partial name is taken for whole by who gives it its own."""

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/journal.partial'"):
        chain.write_text(tmp_path, "journal", "text")
    assert not list(tmp_path.iterdir())


UNREADABLE = "/proc/self/mem"
"""A file of which no first byte can be read: an input/output error."""


def test_what_a_pull_cut_off_has_left_cannot_be_read(tmp_path: pathlib.Path) -> None:
    """It may be a good backup, to which the branch has moved on."""
    first = dataclasses.replace(GOOD, number=1, branch="b")
    image, pending = tmp_path / "vda.0002.raw.partial", tmp_path / "manifest.0002.json.partial"
    newest = tmp_path / "manifest.json.partial"
    for file in image, newest:
        file.touch()
    pending.symlink_to(UNREADABLE)
    with pytest.raises(virtbackup.Error, match=f"cannot read {pending}: Input/output error"):
        chain.recover(tmp_path, {}, chain.Chain(tmp_path, (first,)))
    assert image.exists()
    assert newest.exists()
    pending.unlink()
    pending.mkdir()  # of nobody
    with pytest.raises(virtbackup.Error, match=f"{pending}: Is a directory"):
        chain.recover(tmp_path, {}, chain.Chain(tmp_path, (first,)))


LOST = "d" * 300
"""What a link to it leads to cannot be looked at, as on a file system that does not answer."""


def test_what_cannot_be_looked_at_is_not_missing(tmp_path: pathlib.Path) -> None:
    """Python 3.14 has ``exists`` and ``is_file`` say no."""
    first = dataclasses.replace(GOOD, number=1, branch="b")
    known = chain.Chain(tmp_path, (first,))
    image, pending = tmp_path / "vda.0002.raw.partial", tmp_path / "manifest.0002.json.partial"
    image.touch()
    pending.symlink_to(LOST)
    with pytest.raises(virtbackup.Error, match=f"{pending}: File name too long"):
        chain.recover(tmp_path, {}, known)
    assert image.exists()
    backups = listing.Backups(tmp_path, (listing.Point("manifest.0001.json", first),))
    with pytest.raises(virtbackup.Error, match=f"cannot prune {tmp_path}: {pending}: File name"):
        prune.foretold(backups, 1)
    [disk] = GOOD.disks
    for one in disk, dataclasses.replace(disk, file=f"{tmp_path}/{disk.file}", type="block"):
        (tmp_path / disk.file).unlink(missing_ok=True)
        assert chain.file_problem(tmp_path / disk.file, one) == "it is missing"
        (tmp_path / disk.file).symlink_to(LOST)
        problem = chain.file_problem(tmp_path / disk.file, one)
        assert problem == "it cannot be read: File name too long"


@pytest.mark.parametrize("file", ["vda.0002.qcow2.merged", "vda.0002.qcow2"])
def test_an_image_of_a_prune_cut_off_that_cannot_be_read(tmp_path: pathlib.Path, file: str) -> None:
    """Nothing is decided: neither that there is no such image nor which of the two it is."""
    [disk] = GOOD.disks
    disk = dataclasses.replace(disk, file="vda.0002.qcow2", format="qcow2")
    below = dataclasses.replace(disk, kind="incremental", backing="vda.0001.qcow2")
    made = dataclasses.replace(GOOD, number=2, branch="b", disks=(below,))
    whole = dataclasses.replace(made, disks=(disk,)).to_json()
    for name in (chain.manifest_file(2), manifest.FILE):
        (tmp_path / name).write_text(made.to_json())
    coming = tmp_path / (chain.manifest_file(2) + chain.MERGED)
    coming.write_text(whole)
    (tmp_path / file).symlink_to(UNREADABLE)
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path / file}'"):
        prune.finish(tmp_path)
    assert (tmp_path / file).is_symlink()
    assert coming.read_text() == whole


def test_a_journal_of_a_prune_that_is_damaged(tmp_path: pathlib.Path) -> None:
    """The oldest points go, and no other: a bit makes 5 of 1."""
    for number in range(1, 6):
        disk = dataclasses.replace(GOOD.disks[0], file=f"vda.{number:04}.raw")
        made = dataclasses.replace(GOOD, number=number, branch="b", disks=(disk,))
        (tmp_path / chain.manifest_file(number)).write_text(made.to_json())
        (tmp_path / disk.file).touch()
    (tmp_path / manifest.FILE).write_text(made.to_json())
    told = {"manifests": ["manifest.0002.json", "manifest.0005.json"], "files": ["vda.0002.raw"]}
    (tmp_path / prune.JOURNAL).write_text(json.dumps(told))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(virtbackup.Error, match="tells of files that are needed"):
        prune.finish(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    told["manifests"][1] = "manifest.0001.json"
    (tmp_path / prune.JOURNAL).write_text(json.dumps(told))
    prune.finish(tmp_path)
    assert [point.label for point in listing.read(tmp_path).points] == ["3", "4", "5"]


def test_a_manifest_of_a_prune_cut_off_that_is_damaged(tmp_path: pathlib.Path) -> None:
    """It is not written anew, with a checksum that fits."""
    disk = dataclasses.replace(GOOD.disks[0], file="vda.0002.qcow2", format="qcow2")
    made = dataclasses.replace(GOOD, number=2, branch="b", disks=(disk,))
    file = chain.manifest_file(2)
    for name in (file, manifest.FILE):
        (tmp_path / name).write_text(made.to_json())
    coming = tmp_path / (file + chain.MERGED)
    coming.write_text(made.to_json().replace('"0f"', '"1f"'))
    with pytest.raises(virtbackup.Error, match=f"{coming}: it is not as it was written"):
        prune.finish(tmp_path)
    assert coming.exists()
