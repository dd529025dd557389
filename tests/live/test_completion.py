# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion by bash, zsh and fish themselves, on terminals, of the program as it is installed."""

import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from manual import __main__ as manual
from tests import terminals, waiting
from virtbackup.tools import virsh_backup

ROOT = pathlib.Path(__file__).parents[2]
FAKE = "fake:///two"
SHOW = "\x14"
"""Ctrl-T, which prints the line that is being typed."""

BASH = """
PS1='> '
. share/bash-completion/completions/virsh-backup
. share/bash-completion/completions/virtbackupd
bind 'set bell-style none'
bind 'set show-all-if-ambiguous on'
bind -x '"\\C-t": printf "LINE[%s]\\n" "$READLINE_LINE"'
"""
ZSH = """
PS1='> '
fpath=(share/zsh/site-functions $fpath)
autoload -U compinit
compinit -u -D
setopt no_beep
show() { zle -M "LINE[$BUFFER]"; BUFFER="" }
zle -N show
bindkey -e
bindkey '^T' show
"""


class Terminal(terminals.Terminal):
    """A shell."""

    def __init__(self, home: pathlib.Path, *argv: str) -> None:
        super().__init__(
            argv, home, {"ZDOTDIR": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"}
        )

    def completed(self, line: str) -> tuple[str, str]:
        """LINE after a TAB, and what was printed meanwhile."""
        self.type(f"\x15{line}\t{SHOW}")
        printed = self.wait_for("LINE[").removesuffix("LINE[")
        return self.wait_for("]").removesuffix("]"), printed

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A home with the programs, their completion and a few files; the driver is the tests' own."""
    directory = tmp_path_factory.mktemp("home")
    manual.write(directory / "share")
    (directory / "bin").mkdir()
    program = directory / "bin" / "virsh-backup"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.shell_driver "$@"\n'
    )
    program.chmod(0o755)
    (directory / "disk one.xml").touch()
    (directory / "images").mkdir()
    (directory / "bashrc").write_text(BASH)
    (directory / ".zshrc").write_text(ZSH)
    return directory


@contextlib.contextmanager
def shell(home: pathlib.Path, *argv: str) -> Iterator[Terminal]:
    terminal = Terminal(home, *argv)
    try:
        terminal.wait_for("> ")
        yield terminal
    finally:
        terminal.close()


COMPLETED = [
    ("virsh-backup backup-du", "virsh-backup backup-dumpxml "),
    ("virsh-backup -q backup-stop --canc", "virsh-backup -q backup-stop --cancel "),
    (f"virsh-backup -c {FAKE} dominfo v", f"virsh-backup -c {FAKE} dominfo vm1 "),
    (f"virsh-backup -c {FAKE} dominfo my", f"virsh-backup -c {FAKE} dominfo my\\ vm "),
    (
        f"virsh-backup -c {FAKE} dominfo --domain=v",
        f"virsh-backup -c {FAKE} dominfo --domain=vm1 ",
    ),
    ("virsh-backup -c test", "virsh-backup -c test:///default "),
    ("virsh-backup -c test:///d", "virsh-backup -c test:///default "),
    (
        f"virsh-backup -c {FAKE} branch-delete vm1 n",
        f"virsh-backup -c {FAKE} branch-delete vm1 nightly ",
    ),
    (
        f"virsh-backup -c {FAKE} backup-start-as vm1 --disk v",
        f"virsh-backup -c {FAKE} backup-start-as vm1 --disk vda ",
    ),
    (
        f"virsh-backup -c {FAKE} backup-start-as vm1 --disk vda,pre",
        f"virsh-backup -c {FAKE} backup-start-as vm1 --disk vda,present=",
    ),
    ("virsh-backup translate x --to=p", "virsh-backup translate x --to=proposal "),
    ("virsh-backup backup-start vm1 dis", "virsh-backup backup-start vm1 disk\\ one.xml "),
    ("virsh-backup backup-pull vm1 im", "virsh-backup backup-pull vm1 images/"),
    ("virsh-backup backup-pull vm1 /d --xml=ima", "virsh-backup backup-pull vm1 /d --xml=images/"),
    ("virsh-backup -c nope:///x dominfo ", "virsh-backup -c nope:///x dominfo "),
    ("virtbackupd --check", "virtbackupd --check-config "),
    ("virtbackupd --config ima", "virtbackupd --config images/"),
]


@pytest.mark.needs("bash")
def test_bash(home: pathlib.Path) -> None:
    with shell(home, "bash", "--noprofile", "--rcfile", "bashrc", "-i") as bash:
        assert [bash.completed(line)[0] for line, _ in COMPLETED] == [line for _, line in COMPLETED]
        _, shown = bash.completed("virsh-backup backup-s")
        assert {"backup-start", "backup-start-as", "backup-stop"} <= set(shown.split())


@pytest.mark.needs("zsh")
def test_zsh(home: pathlib.Path) -> None:
    with shell(home, "zsh", "-i") as zsh:
        assert [zsh.completed(line)[0] for line, _ in COMPLETED] == [line for _, line in COMPLETED]
        _, shown = zsh.completed("virsh-backup backup-d")
        assert "Dump XML of the running backup" not in shown  # the only one: it is there at once
        zsh.type("\x15virsh-backup backup-s\t\t")
        shown = zsh.wait_for("Stop the running backup")
        told = [command.desc for command in virsh_backup.TABLE.commands if command.desc]
        assert not any(desc in shown for desc in told), "a few words are enough"


FISH = [
    ("virsh-backup backup-du", ["backup-dumpxml\tDump XML of the running backup"]),
    ("virsh-backup backup-stop vm1 --canc", ["--cancel\tgive the backup up: the branch stays"]),
    (f"virsh-backup -c {FAKE} dominfo ", ["7", "my vm", "off", "vm1"]),
    (f"virsh-backup -c {FAKE} dominfo my\\ ", ["my vm"]),
    (f"virsh-backup -c {FAKE} dominfo --domain=v", ["--domain=vm1"]),
    ("virsh-backup -c test:///d", ["test:///default"]),
    (f"virsh-backup -c {FAKE} branch-delete vm1 n", ["nightly"]),
    (f"virsh-backup -c {FAKE} backup-start-as vm1 --disk vda,pre", ["vda,present="]),
    ("virsh-backup backup-start vm1 dis", ["disk one.xml"]),
    ("virsh-backup backup-pull vm1 /d --xml=ima", ["--xml=images/"]),
    ("virsh-backup -c nope:///x dominfo ", []),
    ("virtbackupd --check", ["--check-config"]),
    ("virtbackupd --config ima", ["images/"]),
]


@pytest.mark.needs("fish")
@pytest.mark.parametrize(("line", "words"), FISH)
def test_fish(line: str, words: list[str], home: pathlib.Path) -> None:
    done = subprocess.run(
        ["fish", "--no-config", "-c", 'for f in share/fish/vendor_completions.d/*; source $f; end\n'
         "complete -C $argv[1]", line],
        cwd=home, capture_output=True, text=True, timeout=waiting.DEADLINE,
        env={**os.environ, "HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stderr == ""
    if line.startswith("virtbackupd") or "dis" in line or "ima" in line:
        found = [word.split("\t")[0] for word in done.stdout.splitlines()]
    else:
        found = done.stdout.splitlines()
    assert found == words
