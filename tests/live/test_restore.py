# SPDX-License-Identifier: LGPL-2.1-or-later
"""backup-restore: the bytes of every point, wherever they go; and what is left when it fails."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from xml.sax import saxutils

import libvirt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

import virtbackup
from tests import waiting
from tests.live import copies, libvirtd, lying, machines, nbdclient, places, points
from virtbackup.nbd import checksum, copy, device, target, writer
from virtbackup.nbd import layers as layers_module
from virtbackup.tools import chain, listing, manifest, restore, verify

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-nbd", "nbdkit", "nbdcopy"),
    pytest.mark.timeout(120),
]

BLOCK = checksum.BLOCK
FORMATS: tuple[copy.Format, ...] = ("qcow2", "raw")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> points.Backed:
    """Four points, never to be changed."""
    return points.pulled(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> points.Backed:
    """One disk of half a sector more than 40 blocks, in three points."""
    layers: list[dict[int, int | None]] = [
        {n: n for n in range(30)}, {5: 100, 6: None, 39: 101}, {5: None, 7: 102, 40: 103},
    ]  # fmt: skip
    directory = tmp_path_factory.mktemp("layered") / "backups"
    return points.built(directory, 40 * BLOCK + 256, layers)


def refused(backed: points.Backed, out: object, **options: object) -> str:
    with pytest.raises(virtbackup.Error) as raised:
        points.put_back(backed, out, **options)
    return str(raised.value)


def content_of(path: pathlib.Path, fmt: str) -> bytes:
    """Of a raw file to the byte."""
    return path.read_bytes() if fmt == "raw" else machines.contents(path, fmt)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "fmt"), [*zip((1, 2, 3, 4), itertools.cycle(FORMATS))])
def test_every_point(
    whole: points.Backed,
    tmp_path: pathlib.Path,
    number: int,
    fmt: copy.Format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synced = places.synced(monkeypatch)
    done = points.put_back(whole, tmp_path / "a" / "b", point=str(number), fmt=fmt)
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= synced
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        f"sdb.{fmt}", f"vda.{fmt}",
    ]  # fmt: skip
    for one in done:
        path = one.output.path
        assert machines.contents(path, fmt) == whole.shown[number][one.output.disk]
        assert copy.checksum_of_file(path, fmt) == one.checksum
        assert one.stored == path.stat().st_blocks * 512 < 2 << 20
        assert path.stat().st_mode & 0o777 == 0o600
        if fmt == "qcow2":
            subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)


def test_over_raw(tmp_path: pathlib.Path) -> None:
    backed = points.pulled(tmp_path, 2, fmt="raw")
    points.put_back(backed, tmp_path / "o")
    assert machines.contents(tmp_path / "o" / "vda.qcow2", "qcow2") == backed.shown[2]["vda"]


def test_the_command(whole: points.Backed, tmp_path: pathlib.Path) -> None:
    directory, out = str(whole.directory), str(tmp_path / "out")
    status, said, err = points.call("backup-restore", directory, out, "--point=2")
    assert (status, err) == (0, "")
    assert said.splitlines()[0].startswith(f"vda: {out}/vda.qcow2 (qcow2, 4.00 MiB, 1.")
    assert said.endswith(f"Backup of {listing.shown_time(whole.made[2].time)} restored\n")
    again = points.call("backup-restore", directory, out)
    assert again[:2] == (1, "")
    assert again[2].endswith(f"{out}/vda.qcow2 exists already; --force overwrites it\n")
    assert machines.contents(tmp_path / "out" / "vda.qcow2", "qcow2") == whole.shown[2]["vda"]
    status, said, err = points.call("backup-restore", directory, out, "--force", "--json")
    assert (status, err) == (0, "")
    facts = json.loads(said)
    assert facts["point"]["number"] == 4
    assert [disk["place"] for disk in facts["disks"]] == [
        f"{out}/{d}.qcow2" for d in ("vda", "sdb")
    ]
    assert machines.contents(tmp_path / "out" / "vda.qcow2", "qcow2") == whole.shown[4]["vda"]
    assert points.call("backup-restore", directory, out, "--point=9")[0] == 1
    assert points.call("backup-restore", directory, out, "--disk=x")[2].endswith(
        "no disk 'x' in point 4: it has vda, sdb\n"
    )
    assert points.call("backup-restore", directory, out, "--json", "--define")[0] == 2


def test_define(
    whole: points.Backed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said, err = points.call(
        "backup-restore", str(whole.directory), "out.img", "--disk=sdb", "--define"
    )
    assert (status, err) == (0, "warning: disk 'vda' was not restored and is where it was\n")
    [_, sdb] = etree.fromstring(said).findall("devices/disk")
    source, driver = sdb.find("source"), sdb.find("driver")
    assert source is not None
    assert driver is not None
    assert source.get("file") == str(tmp_path / "out.img")
    assert driver.get("type") == "raw"
    assert (tmp_path / "out.img").read_bytes() == whole.shown[4]["sdb"]
    bare = whole.copy(tmp_path / "bare")
    for name in ("manifest.0004.json", "manifest.json"):
        made = manifest.read(bare.directory, name)
        text = dataclasses.replace(made, domain_xml="").to_json()
        (bare.directory / name).write_text(text)
    status, said, err = points.call("backup-restore", str(bare.directory), "o", "--define")
    assert (status, said) == (1, "")
    assert err == "error: operation failed: point 4 has no domain XML\n"
    argv = ("backup-restore", str(whole.directory), os.fsdecode(b"\xff"), "--define")
    status, said, err = points.call(*argv)
    assert (status, said) == (1, "")
    assert "a name or a path holds characters that XML cannot carry" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "out.img"]
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    given = points.call("backup-restore", str(whole.directory), "out", "--define")
    assert given == (1, "", "error: cannot make out: No such file or directory\n")


@pytest.mark.needs("libvirtd", "virsh", "unshare")
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_libvirt_defines_what_is_printed(
    host: libvirtd.Host, tmp_path: pathlib.Path, scratch_dir: pathlib.Path, fmt: str
) -> None:
    """And starts it, with what the disks had; other drives, options and names stay as they were."""
    base = libvirtd.image(host.path("base.qcow2"), 3)
    over = host.path("over & <1>.qcow2")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(over)]
    subprocess.run(create, check=True)
    disks = (
        libvirtd.disk_xml("vda", libvirtd.image(host.path("a.qcow2"), 1), driver="cache='none'"),
        libvirtd.disk_xml("sdb", saxutils.escape(str(over)), inside="<serial>S</serial>"),
        "<disk type='file' device='cdrom'><target dev='sdd' bus='sata'/></disk>",
    )
    cpu = "<cpu mode='host-model'/>"  # as libvirt tells it of a running domain, it is this host's
    with host.domain("restored", "".join(disks), persistent=True, more=cpu) as domain:
        domain.write("sdb", 5)
        run = ("-c", host.daemon.uri, "backup-pull", "restored", str(tmp_path / "backup"))
        assert points.call(*run)[0] == 0
        domain.libvirt.destroy()
        domain.libvirt.undefine()
        out = host.path(f"out {fmt}")
        status, said, err = points.call(
            "backup-restore", str(tmp_path / "backup"), str(out), "--format", fmt, "--define"
        )
        assert (status, err) == (0, "")
        (tmp_path / "restored.xml").write_text(said)
        virsh = ["virsh", "-q", "-c", host.daemon.uri, "define", "--validate"]
        subprocess.run([*virsh, str(tmp_path / "restored.xml")], check=True, capture_output=True)
        again = libvirtd.Domain(host.connection.lookupByName("restored"))
        assert "<cpu mode='host-model'" in again.libvirt.XMLDesc()
        for path in out.iterdir():
            path.chmod(0o666)  # libvirt here gives no image to its user
        again.libvirt.create()
        named = etree.fromstring(again.libvirt.XMLDesc()).iterfind("devices/disk/source[@file]")
        assert {source.get("file") for source in named} == {
            str(out / f"{disk}.{fmt}") for disk in ("vda", "sdb")
        }
        again.io("vda", f"read -P 38 0 {libvirtd.CLUSTER}")
        again.io("sdb", f"read -P 255 {5 * libvirtd.CLUSTER} {libvirtd.CLUSTER}")
    for disk, seed in (("vda", 1), ("sdb", 3)):
        want = bytearray(libvirtd.pattern(seed))
        if disk == "sdb":
            want[5 * libvirtd.CLUSTER : 6 * libvirtd.CLUSTER] = b"\xff" * libvirtd.CLUSTER
        assert content_of(out / f"{disk}.{fmt}", fmt) == want
    shutil.rmtree(out)


def test_one_disk(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    for name, fmt in (("a", "qcow2"), ("a.raw", "raw"), ("b.img", "raw"), ("c.x", "qcow2")):
        points.put_back(layered, tmp_path / name, disk="vda")
        want = layered.shown[3]["vda"]
        content = content_of(tmp_path / name, fmt)
        assert content == (want if fmt == "raw" else points.padded(want))
    assert (tmp_path / "a.raw").stat().st_size == 40 * BLOCK + 256


@pytest.mark.parametrize(
    "uri", ["nbd+ssh://h/x", "ssh://h/x", "NBDX+unix:///x", "file:///x", "sheep.dog-1+x://"]
)
@pytest.mark.parametrize("disk", [None, "vda"])
def test_what_cannot_be_written_to(
    layered: points.Backed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, uri: str,
    disk: str | None,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert refused(layered, uri, disk=disk, force=True) == (
        f"Requested operation is not valid: cannot write to {uri}: a server is written to by nbd://,"
        " nbds://, nbd+unix://, nbds+unix://, nbd+vsock:// or nbds+vsock://"
    )
    assert list(tmp_path.iterdir()) == []
    if disk is None:
        points.put_back(layered, f"./{uri}")
        assert (tmp_path / uri / "vda.qcow2").is_file()


@pytest.mark.parametrize("text", ["", '{"version": 2}'])
def test_the_newest_point_is_lost(
    layered: points.Backed, tmp_path: pathlib.Path, text: str
) -> None:
    """The one before it is not taken for it, but where it is asked for."""
    backed = layered.copy(tmp_path / "backups")
    last = f"manifest.{max(backed.made):04}.json"
    for name in (last, "manifest.json"):
        (backed.directory / name).write_text(text)
    for command in ("backup-restore", "backup-serve", "backup-map"):
        out = [str(tmp_path / "out")] if command == "backup-restore" else []
        status, _, err = points.call(command, str(backed.directory), *out)
        assert status == 1
        assert f"the newest point, {max(backed.made)}, is lost: {last}: " in err
        assert "--point names one" in err
    assert not (tmp_path / "out").exists()
    points.put_back(backed, tmp_path / "out", point=str(max(backed.made) - 1))


def test_what_is_in_the_way(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(file)
    assert "exists already; --force" in refused(layered, link, disk="vda")
    assert "is not a directory" in refused(layered, file)
    assert "is a directory" in refused(layered, tmp_path, disk="vda")
    assert "is the name of a directory" in refused(layered, f"{tmp_path}/none/", disk="vda")
    assert not (tmp_path / "none").exists()
    assert "neither a file nor a block device" in refused(layered, "/dev/null", disk="vda")
    for uri in ("nbd://localhost", "NBD://localhost", "nbds+Unix:///?socket=x"):
        assert "name it by --disk" in refused(layered, uri)
    assert "there is no format qcow2" in refused(layered, "nbd://h", disk="vda", fmt="qcow2")
    own = layered.directory / "vda.0001.qcow2"
    before = {path: path.read_bytes() for path in layered.directory.iterdir()}
    (tmp_path / "other").symlink_to(own)
    for place in (*before, tmp_path / "other"):
        text = refused(layered, place, disk="vda", force=True)
        assert "is a file of the backups themselves" in text
    assert {path: path.read_bytes() for path in layered.directory.iterdir()} == before
    assert file.read_text() == "mine"
    points.put_back(layered, link, disk="vda", force=True)
    assert link.is_symlink()
    assert machines.contents(file, "qcow2") == points.padded(layered.shown[3]["vda"])
    partial = tmp_path / "x.partial"
    partial.write_text("half")
    assert "another restore runs, or was killed" in refused(layered, tmp_path / "x", disk="vda")
    points.put_back(layered, tmp_path / "x", disk="vda", force=True)
    assert not partial.exists()
    assert "cannot make /proc/x" in refused(layered, "/proc/x")
    assert "cannot create" in refused(layered, tmp_path / "none" / "x", disk="vda")
    long = tmp_path / ("x" * 300)
    assert f"cannot make {long}: File name too long" in refused(layered, long)
    assert f"cannot write {long}: File name too long" in refused(layered, long, disk="vda")


@pytest.mark.parametrize("what", ["file", "qemu"])
def test_what_comes_in_the_way_meanwhile(
    layered: points.Backed, tmp_path: pathlib.Path, what: str
) -> None:
    """A restore may take hours; what is there at its end was not there, or not in use, before."""
    with contextlib.ExitStack() as undo:

        class Come:
            """Something else takes the place once the first byte is read."""

            def start(self, index: int, size: int) -> None:
                if what == "file":
                    (tmp_path / "x").write_text("mine")
                    return
                drive = f"raw,node-name=A,file.driver=file,file.filename={tmp_path}/x"
                argv = ("-blockdev", drive, "-device", "virtio-blk,drive=A,id=vda")
                undo.enter_context(machines.qemu(tmp_path, *argv))

            def advance(self, index: int, count: int) -> None:
                """Nothing."""

        if what == "qemu":
            machines.image(tmp_path / "x", 1 << 20)
        options = {"disk": "vda", "force": what == "qemu", "progress": Come()}
        text = refused(layered, tmp_path / "x", **options)
        said = {"file": "exists already; --force overwrites it", "qemu": "is in use by a QEMU"}
        assert said[what] in text
        assert (tmp_path / "x").read_bytes() == (b"mine" if what == "file" else bytes(1 << 20))
        assert not list(tmp_path.glob("*.partial"))


@pytest.mark.may_skip
@pytest.mark.parametrize("is_new", [True, False])
def test_the_last_file_cannot_have_its_name(
    whole: points.Backed, tmp_path: pathlib.Path, is_new: bool
) -> None:
    """No disk is restored alone without a word."""
    out = tmp_path / "out"
    out.mkdir()
    first, last = out / "vda.qcow2", out / "sdb.qcow2"
    for path in (last,) if is_new else (first, last):
        path.write_text("mine")
    with places.mount_point(last):
        text = refused(whole, out, force=True)
    told = "" if is_new else f", which has replaced {first},"
    assert f"cannot finish the restore{told} in {out}: {last}: Device or resource busy" in text
    assert sorted(out.iterdir()) == ([last] if is_new else [last, first])
    assert last.read_text() == "mine"


def test_a_file_that_a_pull_makes(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    """What a pull writes has such a name, too: another file in its place would be taken for it."""
    partial = tmp_path / "vda.raw.partial"
    partial.write_text("of a pull")
    with chain.locked(tmp_path):
        text = refused(layered, tmp_path, fmt="raw", force=True)
        assert f"{partial} is there, and a backup is pulled into {tmp_path}" in text
        assert [path.name for path in tmp_path.iterdir()] == [partial.name]
        assert partial.read_text() == "of a pull"
    points.put_back(layered, tmp_path, fmt="raw", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["vda.raw"]


LAYER = st.dictionaries(st.integers(0, 20), st.none() | st.integers(0, 9), max_size=12)
SIZES = st.sampled_from([0, 1, 511, 512, 513, BLOCK - 1, BLOCK, BLOCK + 1]) | st.integers(
    0, 20 * BLOCK
)


@settings(max_examples=15)
@given(
    SIZES, st.lists(LAYER, min_size=1, max_size=4),
    st.sampled_from(FORMATS), st.sampled_from(FORMATS), st.data(),
)  # fmt: skip
def test_round_trip(
    size: int,
    layers: list[Mapping[int, int | None]],
    base: copy.Format,
    fmt: copy.Format,
    data: st.DataObject,
) -> None:
    """Any sizes, any blocks of data and zeroes: restored is what was backed up."""
    with tempfile.TemporaryDirectory() as name:
        backed = points.built(pathlib.Path(name, "backups"), size, layers, base)
        number = data.draw(st.integers(1, len(layers)))
        out = pathlib.Path(name, "out")
        [one] = points.put_back(backed, out, point=str(number), disk="vda", fmt=fmt)
        want = backed.shown[number]["vda"]
        content = content_of(out, fmt) if size else b""
        assert content == (want if fmt == "raw" else points.padded(want))
        assert one.checksum == copies.defined_checksum(want)
        assert points.verified(backed.directory).good


@pytest.mark.parametrize(
    ("stretch", "most"), [(layers_module.STRETCH, 2048), (4 * BLOCK, 2048), (128 * BLOCK, 3)]
)
def test_much_that_is_hidden_and_many_links(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stretch: int, most: int
) -> None:
    """More of everything than there are buffers; questions are asked while data is on its way, and
    again where there is more than MOST in a stretch."""
    monkeypatch.setattr(layers_module, "STRETCH", stretch)
    monkeypatch.setattr(layers_module, "_MOST", most)
    if most < 2048:
        monkeypatch.setattr(layers_module, "_MANY", most)
    if stretch < 1 << 20:
        monkeypatch.setattr(layers_module, "_MOST_STRETCH", stretch)
    source = random.Random(3)
    layers: list[dict[int, int | None]] = [
        {source.randrange(300): source.choice([None, n]) for n in range(150)} for _ in range(12)
    ]
    backed = points.built(tmp_path / "backups", 300 * BLOCK - 7, layers)
    points.put_back(backed, tmp_path / "out.raw", disk="vda")
    assert (tmp_path / "out.raw").read_bytes() == backed.shown[12]["vda"]


class _Slowly(list[copy.Job]):
    """Jobs whose servers take their time to be started, as those of a long chain on a busy host."""

    def __iter__(self) -> Iterator[copy.Job]:
        for job in super().__iter__():
            time.sleep(0.6)
            yield job


def test_servers_that_wait_for_one_another(tmp_path: pathlib.Path) -> None:
    """A qemu-nbd (of 7.2.14 and newer) ends a client that says nothing for ten seconds."""
    layers: list[dict[int, int | None]] = [{n: n + 1} for n in range(20)]
    backed = points.built(tmp_path / "backups", 20 * BLOCK, layers)
    backups = listing.read(backed.directory)
    links = backups.links(backups.find("20"), "vda")
    jobs = _Slowly(verify.job(link) for link in links)
    with contextlib.closing(copy.Cancel()) as cancel:
        parts = list(layers_module.shown(jobs, cancel))
    assert sum(part.end - part.start for part in parts) == 20 * BLOCK


# --- not as it was backed up ----------------------------------------------------------------------


def test_a_flipped_bit(whole: points.Backed, tmp_path: pathlib.Path) -> None:
    """Also one that does not show in the point, as a later increment hides it."""
    backed = whole.copy(tmp_path / "backups")
    path = backed.directory / "vda.0002.qcow2"
    points.flip(path, points.find_data(path, 101))
    text = refused(backed, tmp_path / "out")
    assert f"disk 'vda': {path} is not good: it is not what was backed up: its checksum" in text
    assert not (tmp_path / "out").exists()
    points.put_back(backed, tmp_path / "out", point="1")
    points.put_back(backed, tmp_path / "sdb", disk="sdb")
    (tmp_path / "vda").write_text("mine")
    status, out, err = points.call(
        "backup-restore", str(backed.directory), str(tmp_path / "vda"), "--disk=vda", "--force"
    )
    assert (status, out) == (1, "")
    assert err.splitlines()[1:] == [
        "'backup-verify' tells which points are good: --point names one"
    ]
    assert (tmp_path / "vda").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))


def test_missing_links(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    backed = layered.copy(tmp_path / "backups")
    path = backed.directory / "vda.0001.qcow2"
    path.rename(tmp_path / "away")
    assert f"{path} is not good: it is missing" in refused(backed, tmp_path / "out")
    path.write_bytes(b"")
    assert "shorter than the header" in refused(backed, tmp_path / "out")
    path.unlink()
    (tmp_path / "away").rename(path)
    told = backed.directory / "manifest.0001.json"
    text = json.loads(told.read_text())
    text["disks"][0]["checksum"]["algorithm"] = "crc"
    told.write_text(json.dumps(text))
    assert "a checksum 'crc' is unknown" in refused(backed, tmp_path / "out")
    told.unlink()
    assert "has no manifest of vda.0001.qcow2" in refused(backed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.may_skip
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_full_disk(whole: points.Backed, tmp_path: pathlib.Path, fmt: copy.Format) -> None:
    with places.small_file_system(tmp_path / "out", 2 << 20) as out:
        text = refused(whole, out, fmt=fmt)
        assert f"cannot write {out}/sdb.{fmt}.partial: No space left on device" in text
        assert list(out.iterdir()) == []


# --- a block device -------------------------------------------------------------------------------


@pytest.mark.may_skip
@pytest.mark.needs("losetup")
def test_a_block_device(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    size = 41 * BLOCK
    with places.block_device(tmp_path / "disk", size) as device:
        text = refused(layered, device, disk="vda")
        assert f"{device} exists already; --force overwrites it" in text
        assert "there is no format" in refused(layered, device, disk="vda", fmt="qcow2")
        status, out, err = points.call(
            "backup-restore", str(layered.directory), str(device), "--disk=vda", "--force",
        )  # fmt: skip
        assert (status, err) == (0, "")
        assert out.startswith(f"vda: {device} (raw, 2.50 MiB)\n")
        content = device.read_bytes()
        want = layered.shown[3]["vda"]
        assert content[: len(want)] == want
        assert content[len(want) :] == places.FF * (size - len(want))
    with places.block_device(tmp_path / "small", 40 * BLOCK) as device:
        text = refused(layered, device, disk="vda", force=True)
        assert text.endswith(
            f"{device} is too small: it has {40 * BLOCK} bytes, and the disk {40 * BLOCK + 256}"
        )
        assert device.read_bytes() == places.FF * 40 * BLOCK


@pytest.mark.may_skip
@pytest.mark.needs("losetup")
def test_a_block_device_that_can_only_be_read(
    layered: points.Backed, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "disk").write_bytes(bytes(41 * BLOCK))
    with places.loop_device(tmp_path / "disk", "--read-only") as device:
        text = refused(layered, device, disk="vda", force=True)
        assert text.endswith(f"{device} is read-only: nothing was written to it")


def test_a_loop_device_over_a_file_of_the_backup(tmp_path: pathlib.Path) -> None:
    """As it is made to look into a raw image."""
    backed = points.built(tmp_path / "b, x", 16 * BLOCK, points.LAYERS, "raw")
    own = backed.directory / "vda.0001.raw"
    with places.loop_device(own) as device:
        text = refused(backed, device, disk="vda", force=True)
        assert f"{device} is a file of the backups themselves" in text
        with places.loop_device(device) as over:
            text = refused(backed, over, disk="vda", force=True)
            assert f"{over} is a file of the backups themselves" in text
    assert own.read_bytes() == backed.shown[1]["vda"]


# --- a server -------------------------------------------------------------------------------------


def uri(server: copies.Server) -> str:
    assert isinstance(server.export.server, str)
    return nbdclient.uri(pathlib.Path(server.export.server), server.export.name)


@pytest.mark.parametrize(
    "kit",
    [
        ["memory", "3M"],
        ["--filter=nozero", "memory", "3M"],
        ["--filter=blocksize-policy", "memory", "3M", "blocksize-minimum=4096",
         "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"],
        ["--filter=noextents", "memory", "3M"],
        ["--filter=delay", "memory", "3M", "delay-write=20ms"],
        ["--filter=error", "memory", "3M", "error-trim=EIO", "error-trim-rate=100%"],
    ],
    ids=lambda kit: kit[0],
)  # fmt: skip
def test_a_server(layered: points.Backed, tmp_path: pathlib.Path, kit: list[str]) -> None:
    """Fast, slow, one without zeroes, one of large blocks: the same bytes, twice over."""
    with copies.nbdkit(tmp_path, *kit) as server:
        if "noextents" in kit[0]:
            assert "has data; --force overwrites it" in refused(layered, uri(server), disk="vda")
        for number in (2, 1, 3):
            force = number != 2 or "noextents" in kit[0]
            if force and "noextents" not in kit[0]:
                text = refused(layered, uri(server), disk="vda")
                assert text.endswith("has data; --force overwrites it")
            points.put_back(layered, uri(server), disk="vda", point=str(number), force=force)
            want = layered.shown[number]["vda"]
            assert server.contents() == want + bytes((3 << 20) - len(want))


@pytest.mark.parametrize("fua", ["none", "native"])
def test_a_server_that_cannot_flush(
    layered: points.Backed, tmp_path: pathlib.Path, fua: str
) -> None:
    """It is asked for durable writes one by one, or it is told that nobody knows."""
    image, flags = tmp_path / "image", tmp_path / "flags"
    image.write_bytes(b"\1" * (3 << 20))
    write = f'echo "$5" >> {flags}; dd of={image} oflag=seek_bytes conv=notrunc seek=$4 status=none'
    kit = ["eval", "get_size=echo 3M", f"can_fua=echo {fua}", "can_flush=exit 3",
           "can_write=exit 0", f"pwrite={write}",
           f"pread=dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3"]  # fmt: skip
    with copies.nbdkit(tmp_path, *kit) as server:
        place = uri(server)
        argv = ["backup-restore", str(layered.directory), place, "--disk=vda", "--force"]
        status, _, err = points.call(*argv)
    want = layered.shown[3]["vda"]
    assert image.read_bytes() == want + b"\1" * ((3 << 20) - len(want))
    told = "cannot be told to flush: when the disk is on its medium, only its host knows"
    expected = ({"fua"}, (0, "")) if fua == "native" else ({""}, (0, f"warning: {place} {told}\n"))
    assert (set(flags.read_text().splitlines()), (status, err)) == expected


@pytest.mark.parametrize("more", [[], ["--filter=nozero"]], ids=["zero", "nozero"])
@pytest.mark.parametrize("number", ["1", "3"])
def test_a_server_has_more_behind_the_disk(
    tmp_path: pathlib.Path, number: str, more: list[str]
) -> None:
    """In the very block of the server's that the disk ends in, with data or zeroes."""
    size = 2 * BLOCK + 4096 + 256
    layers: list[dict[int, int | None]] = [{0: 1, 2: 3}, {0: 2}, {2: None}]
    backed = points.built(tmp_path / "backups", size, layers)
    (tmp_path / "image").write_bytes(b"\x55" * (3 * BLOCK))
    kit = ["--filter=blocksize-policy", *more, "file", str(tmp_path / "image"),
           "blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K",
           "blocksize-error-policy=error"]  # fmt: skip
    with copies.nbdkit(tmp_path, *kit) as server:
        points.put_back(backed, uri(server), disk="vda", point=number, force=True)
    want = backed.shown[int(number)]["vda"]
    assert (tmp_path / "image").read_bytes() == want + b"\x55" * (3 * BLOCK - size)


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_qemu_as_server(
    layered: points.Backed,
    tmp_path: pathlib.Path,
    fmt: copy.Format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Into a new image through QEMU's own writer, whatever it is: a raw one begins with some zeroes
    that are no hole. A guest will not look for the socket from here."""
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", fmt, str(image), "3M"], check=True)
    socket = tmp_path / "s"
    argv = ["qemu-nbd", "-f", fmt, "-k", str(socket), "-x", "e x", str(image)]
    place = nbdclient.uri(pathlib.Path("s"), "e%20x").replace("nbd+unix", "NBD+Unix")
    with copies.running(argv, socket.exists) as server:
        status, out, err = points.call(
            "backup-restore", str(layered.directory), place, "--disk=vda", "--define"
        )
        assert (status, err) == (0, "warning: disk 'vdb' was not restored and is where it was\n")
        assert f'<host transport="unix" socket="{socket}"/>' in out
        # It ends with its client, and until then has the image.
        assert server.wait(waiting.DEADLINE) == 0
    want = layered.shown[3]["vda"]
    assert machines.contents(image, fmt) == want + bytes((3 << 20) - len(want))


def test_a_server_with_a_little_data(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    image = tmp_path / "image"
    for length in (1, 1 << 20):
        image.write_bytes((b"\1" * length).ljust(4096, b"\0"))
        os.truncate(image, 3 << 20)
        with copies.nbdkit(tmp_path, "file", str(image)) as server:
            assert "has data; --force" in refused(layered, uri(server), disk="vda")


@pytest.mark.parametrize("what", ["pread", "extents"])
def test_a_server_whose_little_data_cannot_be_read(
    layered: points.Backed, tmp_path: pathlib.Path, what: str
) -> None:
    """Or told of. It is to be overwritten, which may mend it."""
    image = tmp_path / "image"
    image.write_bytes(b"\1" * 4096)
    os.truncate(image, 3 << 20)
    kit = ["--filter=error", "file", str(image), f"error-{what}=EIO", f"error-{what}-rate=100%"]
    with copies.nbdkit(tmp_path, *kit) as server:
        assert "has data; --force" in refused(layered, uri(server), disk="vda")
        points.put_back(layered, uri(server), disk="vda", force=True)
    want = layered.shown[3]["vda"]
    assert image.read_bytes() == want + bytes((3 << 20) - len(want))


@pytest.mark.parametrize(
    ("kit", "text"),
    [
        (["-r", "memory", "3M"], "it is read-only"),
        (["memory", "2M"], "is too small: it has 2097152 bytes, and the disk 2621696"),
        (["--filter=truncate", "memory", "3M", "truncate=1M"], "is too small: it has 1048576"),
        (["--filter=error", "memory", "3M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"],
         "at offset"),
        (["eval", "get_size=echo 3M", "pread=dd if=/dev/zero count=$3 iflag=count_bytes",
          # What is written is read: else nbdkit may tell of a broken pipe.
          "pwrite=cat >/dev/null; echo ENOSPC full >&2; exit 1", "can_write=exit 0"],
         "No space left on device"),
    ],
    ids=["read-only", "small", "truncate", "error", "full"],
)  # fmt: skip
def test_a_bad_server(
    layered: points.Backed, tmp_path: pathlib.Path, kit: list[str], text: str
) -> None:
    with copies.nbdkit(tmp_path, *kit) as server:
        said = refused(layered, uri(server), disk="vda", force=True)
        assert text in said
        if "at offset" in said:
            assert said.endswith(f"(what {uri(server)} has now is not the disk)")


@pytest.mark.parametrize(
    "told",
    [[[0, 3]], [[512, 3, 0, 3], [0, 3]], [[3 << 20, 3, 1, 3]]],
    ids=["none", "none-behind", "past-the-end"],
)
def test_a_server_that_lies(
    layered: points.Backed, tmp_path: pathlib.Path, told: list[list[int]]
) -> None:
    """Of what it has: it is taken for one that has something."""
    argv = ["backup-restore", str(layered.directory), "", "--disk=vda"]
    for force, said in ([], "has data; --force overwrites it"), (["--force"], ""):
        argv[2] = nbdclient.uri(path := tmp_path / f"s{len(force)}", "")
        with lying.serving(path, 3 << 20, *told):
            status, _, err = points.run(*argv, *force)
        assert (status, said in err, bool(err)) == (int(not force), True, not force), err


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1], ids=["large", "larger"])
def test_a_server_that_is_too_large(
    layered: points.Backed, tmp_path: pathlib.Path, size: int, force: list[str]
) -> None:
    place = nbdclient.uri(tmp_path / "s", "")
    with lying.serving(tmp_path / "s", size):
        argv = ["backup-restore", str(layered.directory), place, "--disk=vda", *force]
        status, out, err = points.run(*argv)
    assert (status, out) == (1, "")
    # A libnbd from 1.20 or so on refuses it before we see it.
    refused = (
        f"cannot open {place}: it has more bytes than a disk can have",
        f"cannot connect to {place}: Value too large for defined data type",
    )
    assert err in [f"error: operation failed: {one}\n" for one in refused]


def test_a_blank_server_needs_no_zeroes(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    kit = ["--filter=error", "memory", "3M", "error-zero=EIO", "error-zero-rate=100%"]
    with copies.nbdkit(tmp_path, *kit) as server:
        points.put_back(layered, uri(server), disk="vda", point="1")
        want = layered.shown[1]["vda"]
        assert server.contents() == want + bytes((3 << 20) - len(want))


def test_a_server_that_closes(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    kit = ["--filter=delay", "memory", "3M", "delay-write=200ms"]
    with copies.nbdkit(tmp_path, *kit) as server:

        class Kill:
            def start(self, index: int, size: int) -> None:
                """Nothing."""

            def advance(self, index: int, count: int) -> None:
                server.process.kill()

        said = refused(layered, uri(server), disk="vda", progress=Kill())
    assert f"cannot write {uri(server)}" in said
    assert said.endswith("has now is not the disk)")
    assert "cannot connect to nbd+unix" in refused(layered, uri(server), disk="vda")


def test_bad_data_for_a_server_is_told(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    backed = layered.copy(tmp_path / "backups")
    path = backed.directory / "vda.0003.qcow2"
    argv = ["qemu-img", "map", "--output=json", str(path)]
    told = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    own = [extent for extent in told if extent["depth"] == 0 and extent["data"]]
    points.flip(path, own[0]["offset"])
    with copies.nbdkit(tmp_path, "memory", "3M") as server:
        said = refused(backed, uri(server), disk="vda")
    assert "vda.0003.qcow2 is not good: it is not what was backed up" in said
    assert said.endswith("has now is not the disk)")


def test_a_hanging_server_is_left(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    kit = ["--filter=log", "--filter=delay", "memory", "3M", "delay-write=60", f"logfile={log}"]
    with copies.nbdkit(tmp_path, *kit) as server:
        argv = ["backup-restore", str(layered.directory), uri(server), "--disk=vda"]
        with process(*argv) as one:
            waiting.until(lambda: log.exists() and " Write " in log.read_text())
            one.send_signal(signal.SIGINT)
            err = one.communicate(timeout=50)[1].decode()
            assert one.returncode == 130
    told = f"(what {uri(server)} has now is not the disk)"
    assert err == f"warning: operation aborted: the copy was cancelled {told}\nerror: interrupted\n"


def test_a_server_that_wants_tls(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("me:00112233445566778899aabbccddeeff\n")
    with copies.nbdkit(tmp_path, "--tls=require", f"--tls-psk={keys}", "memory", "3M") as server:
        argv = ("backup-restore", str(layered.directory), uri(server), "--disk=vda")
        status, _, err = points.call(*argv)
    assert status == 1
    assert "cannot connect to nbd" in err
    assert "TLS" in err


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_an_image_that_a_qemu_has(
    layered: points.Backed, tmp_path: pathlib.Path, fmt: copy.Format
) -> None:
    """Its guest would go on in a file that has no name any more. The raw one has no lock on it, as
    on a file system that has none."""
    image = machines.image(tmp_path / f"a.{fmt}", 1 << 20, fmt)
    drive = f"{fmt},node-name=A,file.driver=file,file.filename={image}"
    if fmt == "raw":
        drive += ",file.locking=off"
    argv = ("backup-restore", str(layered.directory), str(image), "--disk=vda", "--force")
    with machines.qemu(tmp_path, "-blockdev", drive, "-device", "virtio-blk,drive=A,id=vda"):
        status, _, err = points.call(*argv)
        assert (status, err.splitlines()[0].endswith(f"{image} is in use by a QEMU")) == (1, True)
        assert not list(tmp_path.glob("*.partial"))
    assert points.call(*argv)[0] == 0


@pytest.mark.parametrize("name", ["kvm", "qemu-kvm"])
def test_an_image_that_a_qemu_of_another_name_has(
    layered: points.Backed, tmp_path: pathlib.Path, name: str
) -> None:
    """As Debian and Red Hat call it; another process has a name that was cut within a letter."""
    image = machines.image(tmp_path / "a.raw", 1 << 20, "raw")
    argv = ("backup-restore", str(layered.directory), str(image), "--disk=vda", "--force")
    with contextlib.ExitStack() as ended, image.open("rb") as opened:
        for called in (name, "of 14 letters \u00fc"):
            (tmp_path / called).symlink_to("/bin/sleep")
            sleep = [str(tmp_path / called), "60"]
            running = ended.enter_context(subprocess.Popen(sleep, stdin=opened))
            ended.callback(running.kill)
        status, _, err = points.call(*argv)
    assert (status, err.endswith(f": {image} is in use by a QEMU\n")) == (1, True), err


def test_a_device_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(virtbackup.Error) as raised:
        device.Device(tmp_path / "none", 1)
    assert raised.value.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR


def test_nothing_is_left_where_the_work_cannot_begin(
    layered: points.Backed, tmp_path: pathlib.Path
) -> None:
    """The target is made, and no file may be opened any more."""
    backups = listing.read(layered.directory)
    links = backups.links(backups.find(None), "vda")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def open_target(size: int) -> target.Target:
        made = writer.QemuWriter(tmp_path / "x", size)
        least = os.open("/dev/null", os.O_RDONLY)
        os.close(least)
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, limits[1]))
        return made

    cancel = copy.Cancel()
    try:
        with pytest.raises(virtbackup.Error, match=r"cannot make an eventfd .*: Too many open"):
            restore.merge(links, open_target, cancel=cancel)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        cancel.close()
    assert list(tmp_path.iterdir()) == []


def test_a_chain_takes_a_descriptor_for_each_file(tmp_path: pathlib.Path) -> None:
    """And few beside: as long a one as there may be open files can be restored."""
    layers = [{number % 16: number} for number in range(48)]
    backed = points.built(tmp_path / "backups", 16 * BLOCK, layers)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-q", "backup-restore",
         str(backed.directory), str(out)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80)),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert machines.contents(out / "vda.qcow2", "qcow2") == backed.shown[48]["vda"]


# --- signals --------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(*argv: str, pauses: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """virsh-backup; one that PAUSES stops itself once it has written something."""
    command = ["-c", _PAUSES] if pauses else ["-m", "virtbackup.tools.virsh_backup"]
    one = subprocess.Popen(
        [sys.executable, *command, *argv],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield one
    finally:
        one.kill()
        one.communicate()


_PAUSES = """
import os, signal, sys
from virtbackup.nbd import target, writer
from virtbackup.tools import virsh_backup
paused = []
def pausing(write):
    def then(*args):
        write(*args)
        if not paused:
            paused.append(True)
            os.kill(os.getpid(), signal.SIGSTOP)
    return then
target.pwrite = pausing(target.pwrite)
writer.QemuWriter.write = pausing(writer.QemuWriter.write)
sys.exit(virsh_backup.main())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> points.Backed:
    """Large enough to be caught in the middle of."""
    layers: list[dict[int, int | None]] = [{n: n for n in range(2000)}, {1999: 1}]
    return points.built(tmp_path_factory.mktemp("large") / "backups", 2000 * BLOCK, layers)


def processes_with(word: str) -> set[str]:
    """The ids of all that have WORD in their arguments."""
    found = set()
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word.encode() in (entry / "cmdline").read_bytes():
                found.add(entry.name)
    return found


_NOT_DUMPABLE = """
import ctypes, sys
from virtbackup.tools import virsh_backup
ctypes.CDLL(None).prctl(4, 0)
sys.exit(virsh_backup.main(sys.argv[1:]))
"""
"""PR_SET_DUMPABLE, as a process that was another user's before has it."""


@pytest.mark.needs("setpriv", "unshare")
@pytest.mark.parametrize(
    "argv",
    [
        ("unshare", "--pid", "--fork", sys.executable, "-m", "virtbackup.tools.virsh_backup"),
        ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace",
         sys.executable, "-c", _NOT_DUMPABLE),
    ],
    ids=["pid", "not-dumpable"],
)  # fmt: skip
def test_where_others_do_not_find_this_process_in_proc(
    layered: points.Backed, tmp_path: pathlib.Path, argv: tuple[str, ...]
) -> None:
    """Not by the pid that it knows of, or not what it has open: its own programs are to be told."""
    if os.geteuid() != 0:
        pytest.skip("wants root")
    out = tmp_path / "out"
    command = [*argv, "-q", "backup-restore", str(layered.directory), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    shown = layered.shown[3]["vda"]
    assert machines.contents(out / "vda.qcow2", "qcow2")[: len(shown)] == shown


@pytest.mark.needs("setpriv")
def test_killed_while_its_servers_begin(
    layered: points.Backed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A qemu-nbd whose only client went before it came to listen would wait for ever."""
    monkeypatch.setenv("PATH", places.path_with(tmp_path / "bin", "qemu-nbd", "sleep 1"))
    file = f"{layered.directory}/vda.0001.qcow2"
    with process("backup-restore", str(layered.directory), str(tmp_path / "out")) as one:
        waiting.until(lambda: processes_with(file), process=one)
        one.kill()
        one.wait()
    time.sleep(2)  # nothing tells that one that is slow would have come by now
    assert not processes_with(file)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_two_at_once(large: points.Backed, tmp_path: pathlib.Path, fmt: copy.Format) -> None:
    """What one restore writes, no other takes for what a killed one has left."""
    out = tmp_path / "out"
    argv = ["backup-restore", str(large.directory), str(out), f"--format={fmt}", "--force"]
    with process(*argv, "--point=1", pauses=True) as one:
        partial = out / f"vda.{fmt}.partial"
        waiting.stopped(one)
        before = partial.stat().st_ino
        status, _, err = points.call(*argv)
        assert (status, partial.stat().st_ino) == (1, before)
        assert f"{partial} is being written by another restore" in err
        one.send_signal(signal.SIGCONT)
        assert one.wait(waiting.DEADLINE) == 0
    assert [path.name for path in out.iterdir()] == [f"vda.{fmt}"]
    assert machines.contents(out / f"vda.{fmt}", fmt) == large.shown[1]["vda"]


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_another_is_faster(
    layered: points.Backed, tmp_path: pathlib.Path, fmt: copy.Format, force: list[str]
) -> None:
    """What it has made by the time that this one would make it is not removed: it, or a third's
    in its place, would be given the name without being whole."""
    out = tmp_path / f"x.{fmt}"
    partial = tmp_path / f"x.{fmt}.partial"
    path = places.path_with(tmp_path / "programs", "qemu-nbd", f"echo theirs >{partial}")
    argv = ["backup-restore", str(layered.directory), str(out), "--disk=vda", *force]
    done = subprocess.run(
        [sys.executable, "-m", "virtbackup.tools.virsh_backup", *argv],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"error: cannot create {partial}: File exists\n")
    assert partial.read_text() == "theirs\n"
    assert not out.exists()


def test_what_only_holds_a_file_has_nothing_to_tell(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a server under it goes, close(2) fails as well: the write has told, and by its name."""
    path = tmp_path / "out"
    path.touch()
    close = os.close

    def cut_off(fd: int) -> None:
        close(fd)
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    with monkeypatch.context() as patch, contextlib.ExitStack() as held:
        restore._hold(path, held)
        patch.setattr(os, "close", cut_off)
        held.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(large: points.Backed, tmp_path: pathlib.Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    argv = ["backup-restore", str(large.directory), str(out), "--format=raw"]
    with process(*argv, pauses=True) as one:
        waiting.stopped(one)
        assert (out / "vda.raw.partial").stat().st_blocks > 0
        one.send_signal(number)
        one.send_signal(signal.SIGCONT)
        one.wait(waiting.DEADLINE)
        assert one.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    if number == signal.SIGKILL:
        assert [path.name for path in out.iterdir()] == ["vda.raw.partial"]
        points.put_back(large, out, fmt="raw", force=True)
        assert [path.name for path in out.iterdir()] == ["vda.raw"]
    else:
        assert not out.exists()
    # Those of one that was killed end by themselves.
    waiting.until(lambda: not processes_with(str(large.directory)))


def test_a_signal_after_the_work(
    layered: points.Backed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there by then has taken another's place, perhaps: that is said."""
    finish = restore._finish

    def finish_and_signal(outputs: Sequence[restore.Output]) -> None:
        finish(outputs)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(restore, "_finish", finish_and_signal)
    out = tmp_path / "out.raw"
    out.write_text("another")
    argv = ("backup-restore", str(layered.directory), str(out), "--disk=vda", "--force")
    assert points.call(*argv) == (
        130,
        "",
        f"warning: operation aborted: that was too late: all is whole, in {out}\n"
        "error: interrupted\n",
    )
    assert out.read_bytes() == layered.shown[3]["vda"]

    def written(links: Sequence[listing.Link], output: restore.Output, *_: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)  # while it is flushed, say
        return restore.Restored(output, links[0].disk.size, 0, 0, "")

    monkeypatch.setattr(restore, "_restore", written)
    uri = f"nbd+unix:///?socket={tmp_path}/s"
    told = points.call("backup-restore", str(layered.directory), uri, "--disk=vda")
    assert told[0] == 130
    assert f"that was too late: all is whole, in {uri}\n" in told[2]
