# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sdist, the wheel that is built from it, and an installation of that, without a network."""

import configparser
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from manual import __main__ as manual

ROOT = pathlib.Path(__file__).parents[1]
LEFT_OUT = {"build", "dist", "virtbackup.egg-info", "__pycache__"}

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("setuptools", "wheel")),
    reason="not installed: setuptools and wheel",
)


def run(*words: str | os.PathLike[str], cwd: pathlib.Path) -> str:
    """The output of a program that is not told of this tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(directory: pathlib.Path) -> set[str]:
    """The files below DIRECTORY that are kept."""
    found = set()
    for parent, directories, files in os.walk(directory):
        directories[:] = [
            name
            for name in directories
            if name == ".ci" or not (name in LEFT_OUT or name.startswith("."))
        ]
        found |= {os.path.relpath(os.path.join(parent, name), directory) for name in files}  # noqa: PTH118
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def sdist(work: pathlib.Path) -> pathlib.Path:
    """Made in a copy of the tree: setuptools leaves things behind."""
    tree = work / "tree"
    for name in sources(ROOT):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(work)!r})"
    run(sys.executable, "-c", code, cwd=tree)
    [found] = work.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
    """Built from the sdist, so that has all it takes; in isolation there would be no libvirt."""
    shutil.unpack_archive(sdist, work / "sdist")
    [tree] = (work / "sdist").iterdir()
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", work / "wheel", tree, cwd=work)
    [found] = (work / "wheel").iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
    """The prefix of a clean environment beside Debian's packages, with the wheel."""
    prefix = work / "prefix"
    base = pathlib.Path(sys.base_prefix, "bin", "python3")
    run(base, "-m", "venv", "--system-site-packages", "--without-pip", prefix, cwd=work)
    python = prefix / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", "--no-compile", wheel, cwd=work)
    return prefix


def test_the_sdist_has_everything(sdist: pathlib.Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    not_kept = {name for name in sources(ROOT) if name.startswith(".") and "/" not in name}
    assert sources(ROOT) - not_kept | {".gitignore"} <= names


def test_the_wheel_has_all_that_is_used(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = {name: archive.read(name).decode() for name in names if ".dist-info/" in name}
    package = {f"virtbackup/{name}" for name in sources(ROOT / "virtbackup")}
    assert package <= names
    assert {"virtbackup/py.typed", "virtbackup/schemas/domainbackup.xsd"} <= package
    data = "virtbackup-0.1.0.data/data/share/"
    assert {name.removeprefix(data) for name in names if name.startswith(data)} == set(
        manual.files()
    )
    assert {name.partition("/")[0] for name in names} == {
        "virtbackup", "virtbackup-0.1.0.data", "virtbackup-0.1.0.dist-info"
    }  # fmt: skip
    assert any(name.endswith("/COPYING.LESSER") for name in metadata)
    entries = configparser.ConfigParser(delimiters="=")
    entries.optionxform = str  # type: ignore[assignment,method-assign]  # as they are written
    entries.read_string(metadata["virtbackup-0.1.0.dist-info/entry_points.txt"])
    assert set(entries["console_scripts"]) == {"virsh-backup", "virtbackupd"}
    assert {"qemu", "qmp", "test", "virtbackup+unix"} <= set(entries["virtbackup.drivers"])


def test_what_is_installed_works(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program, daemon = installed / "bin" / "virsh-backup", installed / "bin" / "virtbackupd"
    assert run(program, "--version", cwd=tmp_path) == "0.1.0\n"
    listed = run(program, "-c", "test:///default", "list", cwd=tmp_path)
    assert re.search(r"^ 1 +vm +running$", listed, re.MULTILINE)
    checked = run(daemon, "--uri", "test:///default", "--check-config", cwd=tmp_path)
    assert checked == "configuration is good\n"
    assert run(daemon, "--version", cwd=tmp_path) == "virtbackupd 0.1.0\n"
    document = tmp_path / "backup.xml"
    document.write_text('<domainbackup><address type="ip" host="h" port="1"/></domainbackup>')
    assert '<server transport="tcp"' in run(
        program, "translate", document, "--to", "native", cwd=tmp_path
    )
    where = "import virtbackup; print(virtbackup.__file__)"
    home = run(installed / "bin" / "python", "-c", where, cwd=tmp_path)
    assert home.startswith(str(installed))


def test_what_is_installed_has_its_manual(installed: pathlib.Path) -> None:
    for name, text in manual.files().items():
        assert (installed / "share" / name).read_text() == text


def test_debian_depends_on_all_that_setup_does() -> None:
    """And on versions no older."""
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    options = metadata["options"]
    control = (ROOT / "debian" / "control").read_text()
    wanted = options["install_requires"].strip().split("\n")
    for line in (*wanted, f"python {options['python_requires'].replace('>=', '>= ')}"):
        name, version = line.split(" >= ")
        debians = {"python": "python3", "libvirt-python": "python3-libvirt"}
        assert f" {debians.get(name, f'python3-{name}')} (>= {version})," in control
