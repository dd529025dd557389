# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian package, as ./dev deb builds it, and the program that is in it."""

import gzip
import os
import pathlib
import re
import subprocess

import pytest

from manual import __main__ as manual

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.needs("dpkg-buildpackage", "dh", "pybuild", "lintian")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The package; lintian has found no error and given no warning."""
    directory = tmp_path_factory.mktemp("deb")
    done = subprocess.run(
        [ROOT / "dev", "deb", directory], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    [found] = directory.glob("*.deb")
    assert done.stdout == f"{found}\n"
    return found


@pytest.fixture(scope="module")
def root(package: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What would be in /, unpacked: nothing of it is installed here."""
    directory = tmp_path_factory.mktemp("root")
    subprocess.run(["dpkg-deb", "-x", package, directory], check=True)
    return directory


def test_what_it_depends_on(package: pathlib.Path) -> None:
    def field(name: str) -> set[str]:
        shown = subprocess.run(
            ["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True
        )
        return {part.split(" ")[0] for part in shown.stdout.strip().split(", ")}

    names = ("libnbd", "libvirt", "lxml", "tqdm", "xmlschema", "xxhash")
    assert {f"python3-{name}" for name in names} | {"qemu-utils"} <= field("Depends")
    assert field("Version") == {"0.1.0"}


def test_what_is_in_it(root: pathlib.Path) -> None:
    share = root / "usr" / "share"
    for name, text in manual.files().items():
        if name.startswith("man/"):
            page = gzip.decompress((share / f"{name}.gz").read_bytes()).decode()
            undated = [
                re.sub(r"^(\.TH \S+ \d) \S+", r"\1", one, flags=re.M) for one in (page, text)
            ]
            assert undated[0] == undated[1]
        else:
            debians = name.replace("zsh/site-functions", "zsh/vendor-completions")
            assert (share / debians).read_text() == text
    [units] = list(root.rglob("systemd/system"))
    for unit in ("virtbackupd.service", "virtbackupd.socket"):
        assert (units / unit).read_text() == (ROOT / "systemd" / unit).read_text()
    started = re.search(r"^ExecStart=(\S+)", (units / "virtbackupd.service").read_text(), re.M)
    assert started
    assert os.access(root / started[1].lstrip("/"), os.X_OK)
    settings = root / "etc" / "virtbackup" / "virtbackup.conf"
    assert settings.read_text() == (ROOT / "systemd" / "virtbackup.conf").read_text()


def test_the_program_in_it(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """By Debian's Python and Debian's packages alone."""
    packages = root / "usr" / "lib" / "python3" / "dist-packages"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(packages), "LC_ALL": "C.UTF-8"}

    def run(program: str, *words: str) -> str:
        done = subprocess.run(
            [root / "usr" / "bin" / program, *words],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert run("virsh-backup", "--version") == "0.1.0\n"
    assert "vda" in run("virsh-backup", "-c", "test:///default", "domblklist", "vm")
    uri = ("--uri", "test:///default")
    assert run("virtbackupd", *uri, "--check-config") == "configuration is good\n"
