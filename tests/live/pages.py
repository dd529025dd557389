# SPDX-License-Identifier: LGPL-2.1-or-later
"""What README.md and the pages of docs/ show: sessions and programs, and who tries them."""

import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
VM = "/tmp/vm"
"""Where they have the guest's files."""


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def session(page: pathlib.Path) -> list[tuple[str, str]]:
    """(command, what it prints) in the order of the page."""
    commands = []
    for block in blocks(page, "console"):
        parts = re.split(r"^[$#] (.*)\n", block, flags=re.MULTILINE)
        assert parts[0] == "", "a block begins with a command"
        commands += list(zip(parts[1::2], parts[2::2], strict=True))
    return commands


def environment() -> dict[str, str]:
    """A user's who has set nothing."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("VIRTBACKUP_")}
    own["VIRTBACKUP_STATE_DIR"] = os.environ["VIRTBACKUP_STATE_DIR"]
    return {**own, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}


def squeezed(text: str) -> str:
    """Without blank lines, and with columns as wide as on the page."""
    lines = (re.sub(r" +", " ", re.sub(r"-{5,}", "---", line)).strip() for line in text.split("\n"))
    return "\n".join(filter(None, lines))
