# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages as man(1) and mandoc(1) read them; their examples, on a real QEMU."""

import os
import pathlib
import subprocess
import sys

import pytest

from manual import __main__ as manual
from manual import pages
from tests.live import machines

NAMES = sorted(pages.pages())


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """As /usr/share would be."""
    directory = tmp_path_factory.mktemp("share")
    manual.write(directory)
    return directory


def page(share: pathlib.Path, name: str) -> pathlib.Path:
    return share / "man" / f"man{name[-1]}" / name


@pytest.mark.needs("man")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", ["60", "80", "132"])
def test_man_has_no_warnings_and_shows_it(name: str, width: str, share: pathlib.Path) -> None:
    environment = {
        "LC_ALL": "C.UTF-8", "MANWIDTH": width, "MANROFFSEQ": "", "PATH": os.environ["PATH"],
    }  # fmt: skip
    checked = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page(share, name)],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (checked.returncode, checked.stderr) == (0, "")
    shown = subprocess.run(
        ["man", "-l", page(share, name)],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    sections = [line for line in shown.splitlines() if line and not line.startswith(" ")]
    assert sections[0].split()[0] == f"{name[:-2].upper()}({name[-1]})"
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", "SEE ALSO"} <= set(sections)
    assert "\\" not in shown


@pytest.mark.needs("mandoc")
@pytest.mark.parametrize("name", NAMES)
def test_mandoc_has_nothing_to_say(name: str, share: pathlib.Path) -> None:
    checked = subprocess.run(
        ["mandoc", "-Tlint", "-W", "style", page(share, name)], capture_output=True, text=True
    )
    # Between Debian's own and OpenBSD's mandoc.db, not all pages of others are known.
    said = [
        line for line in checked.stdout.splitlines() if "referenced manual not found" not in line
    ]
    assert (said, checked.stderr) == ([], "")


@pytest.mark.needs("lexgrog")
@pytest.mark.parametrize("name", NAMES)
def test_whatis_finds_its_name(name: str, share: pathlib.Path) -> None:
    parsed = subprocess.run(
        ["lexgrog", page(share, name)], capture_output=True, text=True, check=True
    )
    assert f': "{name[:-2]} - ' in parsed.stdout


@pytest.mark.needs("nbdcopy")
def test_the_examples(tmp_path: pathlib.Path) -> None:
    own = {name: value for name, value in os.environ.items() if name != "VIRTBACKUP_DEFAULT_URI"}
    programs = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    with machines.two_disks(tmp_path, "-name", "vm") as machine:
        before = machine.state()
        for _, how in pages.EXAMPLES:
            done = subprocess.run(
                ["sh", "-ec", how.replace("/tmp/vm", str(tmp_path))],
                capture_output=True, text=True, timeout=60, env={**own, "PATH": programs},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        assert (tmp_path / "monday" / "manifest.json").exists()
        assert (tmp_path / "nightly" / "manifest.json").exists()
        assert (tmp_path / "vda.raw").stat().st_size == 64 << 20
        assert machine.state()["query-block-jobs"] == before["query-block-jobs"]
