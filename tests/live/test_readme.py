# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the README shows is what happens: its session and its Python, on a real QEMU."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.live import machines, pages
from tests.live.pages import README, ROOT, VM


@pytest.mark.needs("nbdcopy")
def test_the_session(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path, "-name", "vm"):
        script, expected = [], []
        for command, output in pages.session(README):
            script.append(f"{command.replace(VM, str(tmp_path))} 2>&1; echo END")
            expected.append(output)
        done = subprocess.run(
            ["sh", "-c", "\n".join(script)],
            capture_output=True, text=True, timeout=60, env=pages.environment(),
        )  # fmt: skip
        printed = done.stdout.replace(str(tmp_path), VM).split("END\n")[:-1]
        assert [pages.squeezed(text) for text in printed] == [
            pages.squeezed(text) for text in expected
        ]


def test_the_python(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path, "-name", "vm") as machine:
        before = machine.state()
        [code] = pages.blocks(README, "python")
        done = subprocess.run(
            [sys.executable, "-c", code.replace(VM, str(tmp_path))],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert '<disk name="vda" present="yes"' in done.stdout
        assert done.stdout.endswith("running\n")
        assert machine.state() == before


def test_the_doors_are_those_of_dev() -> None:
    shown = set(re.findall(r"\./dev (\w+)", README.read_text()))
    usage = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, check=True)
    assert shown == set(re.findall(r"^  (\w+) ", usage.stdout, re.MULTILINE))


def test_ci_runs_nothing_that_is_not_shown() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == ['cd "$(dirname "$0")/.." && exec ./dev test']
