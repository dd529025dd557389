# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``virsh-backup --complete`` answers; real shells ask it in tests/live/test_completion.py."""

import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests import shell_driver, waiting
from virtbackup.tools import virsh_backup, virsh_complete

URI = "fake:///two"

Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(capsys: pytest.CaptureFixture[str]) -> Complete:
    """The lines of the answer, in this process."""

    def ask(line: str) -> list[str]:
        assert shell_driver.main("--complete", line) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.splitlines()

    return ask


def test_commands_are_those_of_the_table(complete: Complete) -> None:
    expected = [f"{command.name}\t{command.help}" for command in virsh_backup.TABLE.commands]
    assert complete("virsh-backup ") == ["values", *sorted(expected)]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("virsh-backup dominf", ["dominfo\tdomain information"]),
        ("virsh-backup -q --timing -d0 dominf", ["dominfo\tdomain information"]),
        ("/usr/bin/virsh-backup pw", ["pwd\tprint the current directory"]),
        ("virsh-backup nope ", []),
        ("virsh-backup dominfo vm --j", ["--json\tprint a JSON document"]),
        ("virsh-backup list --name --na", []),
        ("virsh-backup translate x --to ", ["native", "proposal"]),
        ("virsh-backup translate x --to=p", ["--to=proposal"]),
        ("virsh-backup --con", ["--connect=\thypervisor connection URI"]),
        ("virsh-backup -c test", ["test:///default"]),
        ("virsh-backup -qc test", ["test:///default"]),
        ("virsh-backup --connect=test", ["--connect=test:///default"]),
        ("virsh-backup --connect test", ["test:///default"]),
        ("virsh-backup -d ", ["0", "1", "2", "3", "4"]),
        ("virsh-backup --version=", ["--version=long", "--version=short"]),
        ("virsh-backup -c qmp:///et", ["qmp:///etc/"]),
        ("virsh-backup connect test", ["test:///default"]),
        ("virsh-backup connect qmp:///et", ["qmp:///etc/"]),
        ("virsh-backup --nope list --", None),
        (f"virsh-backup -c {URI} dominfo ", ["7", "my vm", "off", "vm1"]),
        (f"virsh-backup -c {URI} dominfo 'my", ["my vm"]),
        (f"virsh-backup -c {URI} dominfo my\\ ", ["my vm"]),
        (f"virsh-backup --connect={URI} dominfo --domain=v", ["--domain=vm1"]),
        (f"virsh-backup -rc {URI} backup-start-as vm1 --disk ", ["sdb", "sr0", "vda"]),
        (f"virsh-backup -c {URI} backup-start-as vm1 --disk vda,t", ["vda,type="]),
        ("virsh-backup -c fake:///dies dominfo vm1 --j", ["--json\tprint a JSON document"]),
        ("virsh-backup -c nope:///x dominfo ", None),
    ],
)
def test_answers(line: str, answer: list[str] | None, complete: Complete) -> None:
    assert complete(line) == ([] if answer is None else ["values", *answer])


@pytest.mark.parametrize(
    "line",
    [
        "virsh-backup backup-start vm ",
        "virsh-backup backup-start vm /et",
        "virsh-backup backup-pull vm /d --xml ",
        "virsh-backup backup-pull vm /d --xml=/e",
        "virsh-backup --trace ",
        "virsh-backup --trace=",
    ],
)
def test_the_shell_knows_files_best(line: str, complete: Complete) -> None:
    assert complete(line) == ["files"]


@pytest.mark.parametrize("arguments", [(), ("",), ("virsh-backup",), ("a 'b",), ("x #y",)])
def test_no_line_is_an_error(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell_driver.main("--complete", *arguments) == 0
    assert capsys.readouterr().err == ""


def test_what_is_not_a_word_is_left_out(tmp_path: pathlib.Path, complete: Complete) -> None:
    for name in ("plain", "two\nlines", "tab\tbed"):
        (tmp_path / name).touch()
    assert complete(f"virsh-backup -c qmp://{tmp_path}/") == ["values", f"qmp://{tmp_path}/plain"]


def test_a_hypervisor_that_hangs_is_not_waited_for() -> None:
    code = (
        "import threading\n"
        "from virtbackup.tools import virsh_backup, virsh_complete, virsh_connection\n"
        "virsh_complete.TIMEOUT = 0.2\n"
        "virsh_connection.Control.connection = lambda self: threading.Event().wait()\n"
        "virsh_backup.main(['--complete', 'virsh-backup dominfo '])\n"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=waiting.DEADLINE,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("values\n", "") or (done.stdout, done.stderr) == ("", "")
    assert time.monotonic() - start < 50
    assert 0 < virsh_complete.TIMEOUT <= 2


def test_commands_are_completed_without_libvirt() -> None:
    code = (
        "import sys\n"
        "from virtbackup.tools import virsh_backup\n"
        "virsh_backup.main(['--complete', 'virsh-backup backup-start vm --'])\n"
        "virsh_backup.main(['help'])\n"
        "assert not {'libvirt', 'lxml', 'nbd', 'xmlschema', 'tqdm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
