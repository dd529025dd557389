# SPDX-License-Identifier: LGPL-2.1-or-later
"""backup-map: what it draws is where the data is, of a directory and of a running backup."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from lxml import etree

import virtbackup
from tests import terminals
from tests.live import places, points
from virtbackup.nbd import checksum

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-nbd"),
    pytest.mark.timeout(120),
]

BLOCK = checksum.BLOCK


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> points.Backed:
    """One disk in four points."""
    directory = tmp_path_factory.mktemp("layered") / "backups"
    return points.built(directory, 16 * BLOCK - 100, points.LAYERS)


def told(*argv: str) -> dict[str, list[tuple[int, int, str, bool | None]]]:
    """Disk -> (start, length, kind, dirty), in blocks."""
    status, out, err = points.call(*argv, "--json")
    assert (status, err) == (0, "")
    found = {}
    for disk in json.loads(out)["disks"]:
        at = 0
        for one in disk["ranges"]:
            assert one["start"] == at
            at += one["length"]
        assert at == disk["size"]
        found[disk["name"]] = [
            (one["start"] // BLOCK, -(-one["length"] // BLOCK), one["kind"], one["dirty"])
            for one in disk["ranges"]
        ]
    return found


def test_a_directory(layered: points.Backed) -> None:
    directory = str(layered.directory)
    assert told("backup-map", directory, "--point=1") == {
        "vda": [(0, 12, "data", None), (12, 4, "hole", None)]
    }
    assert told("backup-map", directory, "--point=3")["vda"] == [
        (0, 5, "data", False), (5, 1, "zero", True), (6, 1, "zero", False), (7, 1, "data", True),
        (8, 4, "data", False), (12, 4, "hole", False),
    ]  # fmt: skip
    status, out, err = points.call("backup-map", directory, "--disk=vda")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{directory}, backup of 2026-01-01T00:00:04Z"
    assert lines[2].startswith("vda: 1023.90 KiB, ")
    assert lines[-1].split() == ["◆", "dirty", str(2 * BLOCK), "bytes", "12.5%"]
    assert points.call("backup-map", directory, "--disk=x")[2] == (
        f"error: no disk 'x' in {lines[0]}: it has vda\n"
    )


def test_pictures(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    for name in ("m.svg", "m.png"):
        argv = ("backup-map", str(layered.directory), f"--output={tmp_path / name}")
        assert points.call(*argv) == (0, "", "")
    assert etree.fromstring((tmp_path / "m.svg").read_bytes()).tag.endswith("svg")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert points.call("backup-map", "d", "--output=x.gif")[0] == 2
    status, _, err = points.call("backup-map", str(layered.directory), "--output=/none/x.png")
    assert (status, err) == (1, "error: cannot write /none/x.png: No such file or directory\n")


@pytest.mark.parametrize("before", [None, b"of yesterday"])
def test_a_picture_is_whole_or_not_there(
    layered: points.Backed, tmp_path: pathlib.Path, before: bytes | None
) -> None:
    with places.small_file_system(tmp_path / "small", 64 << 10) as small:
        picture = small / "m.svg"
        if before is not None:
            picture.write_bytes(before)
        places.fill_up(small)
        argv = ("backup-map", str(layered.directory), f"--output={picture}")
        said = f"error: cannot write {picture}: No space left on device\n"
        assert points.call(*argv) == (1, "", said)
        left = {path.name for path in small.iterdir()} - {"hog"}
        assert left == ({"m.svg"} if before else set())
        assert not before or picture.read_bytes() == before


def test_a_picture_through_a_link(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    link, picture = tmp_path / "link.png", tmp_path / "m.png"
    link.symlink_to(picture.name)
    for _ in range(2):
        assert points.call("backup-map", str(layered.directory), f"--output={link}")[0] == 0
        assert link.is_symlink()
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert len(list(tmp_path.iterdir())) == 2
        picture.write_bytes(b"")


def test_a_link_in_the_way_of_a_picture(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    """Under the name that it has until it is whole."""
    other, picture = tmp_path / "other", tmp_path / "m.svg"
    other.write_bytes(b"theirs")
    picture.with_name(f"m.svg.{os.getpid()}.partial").symlink_to(other)
    assert points.call("backup-map", str(layered.directory), f"--output={picture}")[0] == 0
    assert other.read_bytes() == b"theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"other", "m.svg"}


def test_a_picture_through_a_link_to_the_backup(
    layered: points.Backed, tmp_path: pathlib.Path
) -> None:
    """What is there else is overwritten by a picture."""
    backed = layered.copy(tmp_path / "backups")
    for number, own in enumerate(("vda.0002.qcow2", "manifest.json")):
        link, file = tmp_path / f"link{number}.svg", backed.directory / own
        link.symlink_to(file)
        before = file.read_bytes()
        said = f"error: {link} is {file}, a file of the backups themselves\n"
        argv = ("backup-map", str(backed.directory), f"--output={link}")
        assert points.call(*argv) == (1, "", said)
        assert file.read_bytes() == before


def test_what_is_no_place(layered: points.Backed, tmp_path: pathlib.Path) -> None:
    """An error of a word, whatever Python has for it."""
    (tmp_path / "loop.svg").symlink_to("loop.svg")
    picture = f"--output={tmp_path}/loop.svg"
    status, _, err = points.call("backup-map", str(layered.directory), picture)
    assert (status, err) == (
        1, f"error: cannot write {tmp_path}/loop.svg: Too many levels of symbolic links\n"
    )  # fmt: skip
    status, _, err = points.call("-c", "test:///default", "backup-map", "x" * 300)
    assert status == 1
    assert f"error: failed to get domain '{'x' * 300}'" in err


def test_terminals(layered: points.Backed) -> None:
    """Colors on a terminal alone, and no sign that the encoding has not."""
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "backup-map"]
    argv.append(str(layered.directory))
    plain = subprocess.run(
        argv, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    ).stdout
    assert b"\033" not in plain
    assert b"  # data" in plain
    wanted = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    wanted |= {"PYTHONUTF8": "1", "TERM": "xterm"}
    text, _ = terminals.shown(argv, env=wanted)
    assert b"\033[34m" in text
    assert "█".encode() in text
    for unwanted in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        text, _ = terminals.shown(argv, env=wanted | unwanted)
        assert b"\033" not in text
        assert "█".encode() in text


def test_a_running_backup(tmp_path: pathlib.Path) -> None:
    (tmp_path / "images").mkdir()
    backed = points.Backed(tmp_path / "backups")
    with points.guest(tmp_path / "images", 4 << 20) as one:
        uri = one.machine.uri
        status, out, err = points.call("-c", uri, "backup-map", "vm")
        assert (status, out) == (1, "")
        assert "error: Domain backup job id not found" in err
        assert points.call("-c", uri, "backup-map", "vm", "--point=1")[0] == 2
        assert points.call("-c", uri, "backup-map", "nobody")[0] == 1
        one.back_up(backed)
        one.machine.io("vda", "write -P 7 1M 64k")
        socket = tmp_path / "nbd.sock"
        document = (
            f"<domainbackup><address type='unix' path='{socket}'/><branch name='daily'/><disks>"
            "<disk name='vda' type='incremental'/><disk name='sdb' type='full'/></disks>"
            "</domainbackup>"
        )
        one.domain.backupStart(document)
        try:
            one.machine.io("vda", "write -P 8 3M 64k")
            found = told("-c", uri, "backup-map", "vm")
            assert found["vda"][:4] == [
                (0, 16, "data", False), (16, 1, "data", True), (17, 15, "hole", False),
                (32, 8, "data", False),
            ]  # fmt: skip
            # QEMU 5.2 has zeroes in the scratch image for what was nothing and is overwritten now.
            rest = found["vda"][4:]
            assert rest in (
                [(40, 24, "hole", False)],
                [(40, 8, "hole", False), (48, 1, "zero", False), (49, 15, "hole", False)],
            )
            assert {dirty for _, _, _, dirty in found["sdb"]} == {None}
            status, out, err = points.call("-c", uri, "backup-map", "vm", "--disk=vda")
            assert (status, err) == (0, "")
            assert out.startswith("vm, running backup\n")
            assert "◆ dirty" in out
        finally:
            one.domain.backupStop(virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL)
