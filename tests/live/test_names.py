# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directories of backups by names that a program, a protocol or JSON could take for something."""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import strict_json
from tests.live import nbdclient, points

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-nbd", "qemu-storage-daemon"),
    pytest.mark.timeout(120),
]

NAMES = [
    os.fsdecode(b"nbd:a, b=c not UTF-8: \xff\xfe"),
    "json:{\"driver\": 'ä 😀'}",
    "--help,,\nb\t\\ %s {0} $HOME `id` ;*?[x]#" + "x" * 160,
]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[points.Guest]:
    with points.guest(tmp_path_factory.mktemp("guest")) as one:
        yield one


@pytest.fixture(params=NAMES, ids=ascii)
def name(request: pytest.FixtureRequest) -> str:
    given: str = request.param
    return given


def ok(*argv: str) -> str:
    """What a command prints that has nothing to complain of."""
    status, out, err = points.call(*argv)
    assert (status, err) == (0, ""), argv
    return out


def test_a_directory(
    guest: points.Guest, name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole life; every path is a relative one."""
    monkeypatch.chdir(tmp_path)
    directory = pathlib.Path(name)
    backed = points.Backed(directory)
    for step in range(3):
        if step:
            guest.change(step)
        backed.shown[step + 1] = guest.contents()
        fmt = "--format=raw" if step == 0 and len(name) % 2 else "--check"
        ok("-c", guest.machine.uri, "backup-pull", "vm", "--branch=names", "--auto", fmt, "--",
           name)  # fmt: skip
    facts = strict_json.loads(ok("backup-list", "--json", "--", name))
    assert facts["directory"] == name
    assert [point["number"] for point in facts["points"]] == [1, 2, 3]
    ok("backup-verify", "--", name)
    ok("backup-map", "--", name)
    ok("backup-map", "--output=map.svg", "--", name)
    for point, shown in backed.shown.items():
        out = pathlib.Path(f"{name} {point}")
        ok("backup-restore", f"--point={point}", "--", name, str(out))
        ok("backup-restore", f"--point={point}", "--disk=vda", "--", name, f"./{name}/x.raw")
        assert (directory / "x.raw").read_bytes() == shown["vda"]
        (directory / "x.raw").unlink()
        for disk in shown:
            info = ["qemu-img", "convert", "-O", "raw", f"{disk}.qcow2", "raw"]
            subprocess.run(info, cwd=out, check=True)
            assert (out / "raw").read_bytes() == shown[disk]
    ok("backup-restore", "--point=2", "--disk=vda", "--", name, f"./file {name}")
    read = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", f"./file {name}", "raw"]
    subprocess.run(read, check=True)
    assert pathlib.Path("raw").read_bytes() == backed.shown[2]["vda"]
    serve(directory, backed.shown[2])
    ok("backup-prune", "--keep=1", "--", name)
    ok("backup-verify", "--", name)
    ok("backup-restore", "--disk=sdb", "--format=raw", "--", name, "out.raw")
    assert pathlib.Path("out.raw").read_bytes() == backed.shown[3]["sdb"]


def serve(directory: pathlib.Path, shown: dict[str, bytes]) -> None:
    argv = ["backup-serve", "--point=2", "--json", "--", str(directory)]
    with subprocess.Popen(
        [sys.executable, "-m", "virtbackup.tools.virsh_backup", *argv],
        stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            facts = strict_json.loads(strict_json.first(server))
            for disk, uri in facts["exports"].items():
                assert nbdclient.read_uri(uri) == shown[disk]
        finally:
            server.send_signal(signal.SIGTERM)
