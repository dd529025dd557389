# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the README shows is what happens: its session and its Python, on a real QEMU."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.live import machines

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
VM = "/tmp/vm"


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return str(found)


def session() -> list[tuple[str, str]]:
    """(command, what it prints) in the order of the README."""
    parts = re.split(r"^\$ (.*)\n", block("console"), flags=re.MULTILINE)
    assert parts[0] == ""
    return list(zip(parts[1::2], parts[2::2], strict=True))


def environment() -> dict[str, str]:
    """A user's who has set nothing."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("VIRTBACKUP_")}
    own["VIRTBACKUP_STATE_DIR"] = os.environ["VIRTBACKUP_STATE_DIR"]
    return {**own, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}


def squeezed(text: str) -> str:
    """Without blank lines, and with columns as wide as in the README."""
    lines = (re.sub(r" +", " ", re.sub(r"-{5,}", "---", line)).strip() for line in text.split("\n"))
    return "\n".join(filter(None, lines))


@pytest.mark.needs("nbdcopy")
def test_the_session(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path, "-name", "vm"):
        script, expected = [], []
        for command, output in session():
            script.append(f"{command.replace(VM, str(tmp_path))} 2>&1; echo END")
            expected.append(output)
        done = subprocess.run(
            ["sh", "-c", "\n".join(script)],
            capture_output=True, text=True, timeout=60, env=environment(),
        )  # fmt: skip
        printed = done.stdout.replace(str(tmp_path), VM).split("END\n")[:-1]
        assert [squeezed(text) for text in printed] == [squeezed(text) for text in expected]


def test_the_python(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path, "-name", "vm") as machine:
        before = machine.state()
        code = block("python").replace(VM, str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert '<disk name="vda" present="yes"' in done.stdout
        assert done.stdout.endswith("running\n")
        assert machine.state() == before


def test_the_doors_are_those_of_dev() -> None:
    shown = set(re.findall(r"\./dev (\w+)", README))
    usage = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, check=True)
    assert shown == set(re.findall(r"^  (\w+) ", usage.stdout, re.MULTILINE))


def test_ci_runs_nothing_that_is_not_shown() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == ['cd "$(dirname "$0")/.." && exec ./dev test']
