# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``dev`` script: what it says where it cannot work, without installing anything."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = ("demo", "test", "lint", "bench", "record", "docs", "deb", "shell")
NEEDED = ("sh", "dirname", "cat", "grep", "sed")


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> pathlib.Path:
    """A PATH with nothing but the plainest programs."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in NEEDED:
        (directory / name).symlink_to(str(shutil.which(name)))
    return directory


def add(programs: pathlib.Path, name: str, script: str) -> None:
    (programs / name).write_text(f"#!/bin/sh\n{script}\n")
    (programs / name).chmod(0o755)


def dev(programs: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script, so that nothing it does can reach this tree."""
    copy = programs.parent / "tree" / "dev"
    copy.parent.mkdir()
    shutil.copy(ROOT / "dev", copy)
    return subprocess.run(
        ["/bin/sh", copy, *arguments], env={"PATH": str(programs)}, text=True, capture_output=True
    )


def test_without_a_command_it_shows_its_commands(programs: pathlib.Path) -> None:
    done = dev(programs)
    assert done.returncode == 2
    for command in COMMANDS:
        assert f"\n  {command} " in done.stderr


def test_an_unknown_command_is_an_error(programs: pathlib.Path) -> None:
    done = dev(programs, "frobnicate")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "dev: unknown command: frobnicate"


@pytest.mark.parametrize("command", COMMANDS)
def test_elsewhere_than_on_debian(programs: pathlib.Path, command: str) -> None:
    done = dev(programs, command)
    assert (done.returncode, done.stderr) == (1, "dev: not Debian 12 or newer\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "x"), ("lint", "virtbackup"), ("bench", "--help"), ("docs", "--help"),
        ("docs", "a", "b"), ("deb", "-h"), ("deb", "a", "b"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_arguments_that_nobody_knows(programs: pathlib.Path, arguments: tuple[str, ...]) -> None:
    """Before anything is installed, built or measured."""
    done = dev(programs, *arguments)
    assert done.returncode == 1
    unknown = arguments[-1]
    assert done.stderr.splitlines()[-1] == f"dev: {arguments[0]}: unknown argument: {unknown}"


def test_neither_root_nor_sudo(programs: pathlib.Path) -> None:
    if "ID=debian" not in pathlib.Path("/etc/os-release").read_text().splitlines():
        pytest.skip("asks the real /etc/os-release")
    add(programs, "dpkg-query", "echo python3=installed")
    add(programs, "dpkg", "echo amd64")
    add(programs, "id", "echo 1000")
    done = dev(programs, "lint")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("dev: not root and no sudo, cannot install: ca-certificates ")
    assert "python3-venv" in line
    assert " python3 " not in line
