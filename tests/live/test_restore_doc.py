# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every command that docs/restore.md shows does what it says; and the shell's help with them."""

import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests import terminals
from tests.live import pages, points
from virtbackup.tools import virsh_backup, virsh_connection, vsh

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-nbd", "qemu-storage-daemon",
                      "nbdcopy"),
    pytest.mark.timeout(120),
]  # fmt: skip

PAGE = "restore.md"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> points.Backed:
    """Three points, never to be changed."""
    return points.pulled(tmp_path_factory.mktemp("whole"), 3)


def commands(block: int, directory: pathlib.Path) -> list[str]:
    """Those of a console block, with their paths in DIRECTORY."""
    shown = pages.blocks(pages.DOCS / PAGE, "console")[block]
    program = f"{sys.executable} -m virtbackup.tools.virsh_backup"
    return [
        re.sub(r"(?<=[ =>'])/(backup|restore)\b", rf"{directory}/\1", line).replace(
            "virsh-backup", program, 1
        )
        for line in re.findall(r"^\$ (.*)$", shown, re.MULTILINE)
    ]


def test_the_commands(whole: points.Backed, tmp_path: pathlib.Path) -> None:
    (tmp_path / "backup").mkdir()
    (tmp_path / "restore").mkdir()
    backed = whole.copy(tmp_path / "backup" / "vm")
    for command in commands(0, tmp_path):
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), command
    out = tmp_path / "restore"
    assert (out / "vda.img").read_bytes() == whole.shown[1]["vda"]
    assert (out / "first" / "sdb.raw").read_bytes() == whole.shown[1]["sdb"]
    assert f'file="{out}/first/vda.raw"' in (out / "vm.xml").read_text()
    assert (out / "vm.svg").read_text().startswith("<?xml")
    assert (out / "newest" / "vda.qcow2").exists()
    assert not (backed.directory / "vda.0001.qcow2").exists()


def test_the_server(whole: points.Backed, tmp_path: pathlib.Path) -> None:
    (tmp_path / "backup").mkdir()
    (tmp_path / "restore").mkdir()
    whole.copy(tmp_path / "backup" / "vm")
    serve, copy = commands(1, tmp_path)
    with subprocess.Popen(
        ["sh", "-c", f"exec {serve}"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        while "sdb: nbd+unix" not in (line := server.stdout.readline()):
            assert line
        subprocess.run(["sh", "-c", copy], check=True)
        server.send_signal(signal.SIGINT)
    assert server.returncode == 0
    assert (tmp_path / "restore" / "copy.img").read_bytes() == whole.shown[2]["vda"]


def test_completion(whole: points.Backed) -> None:
    control = virsh_connection.Control("test:///default")
    shell = vsh.Shell(virsh_backup.TABLE, control, virsh_connection.describe)

    def complete(command: str, option: str, **given: str) -> list[str]:
        found = virsh_backup.TABLE.command(command).option(option)
        assert found is not None
        assert found.completer is not None
        args = vsh.Args({name: (value,) for name, value in given.items()})
        return list(found.completer(shell, args, ""))

    directory = str(whole.directory)
    for command in ("backup-restore", "backup-verify", "backup-serve"):
        assert complete(command, "point", directory=directory) == ["1", "2", "3"]
        assert complete(command, "point") == []
    for command in ("backup-restore", "backup-serve"):
        assert complete(command, "disk", directory=directory, point="1") == ["vda", "sdb"]
        assert complete(command, "disk") == []
    assert complete("backup-map", "disk", what=directory, disk="v") == ["vda", "sdb"]
    assert complete("backup-map", "disk") == []


def test_a_bar_for_people(whole: points.Backed) -> None:
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "backup-verify"]
    shown, _ = terminals.shown([*argv, str(whole.directory)], "stderr")
    assert b"%|" in shown
