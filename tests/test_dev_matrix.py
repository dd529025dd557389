# SPDX-License-Identifier: LGPL-2.1-or-later
"""``./dev test --matrix`` and ``./dev record --all`` with programs that only write down how they
were called."""

import hashlib
import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
REAL = (
    "sh", "dirname", "cat", "grep", "sed", "head", "tail", "rm", "mkdir", "touch", "env", "date",
    "sha256sum",
)  # fmt: skip
SUITES = ("bullseye", "bookworm", "trixie", "sid")
FAKES = {
    "id": "echo 0",
    "dpkg": "echo amd64",
    "dpkg-query": 'shift 2; for name; do echo "$name=installed"; done',
    "apt-get": "echo ${MIRROR-scheme://mirror/debian/}",
    "unshare": 'shift 3; exec "$@"',
    "mount": ":",
    "debootstrap": """
mkdir -p "$4/etc"
echo "debootstrap $3 $5" >>"$CALLS"
[ "$3" != "${BROKEN-}" ] || exit 1""",
    "chroot": """
case $2 in qemu*) ;; *) exit 0 ;; esac
[ "${1##*/}" != "${DEAD-}" ] || exit 1
echo "QEMU emulator version 1.2.3 (${1##*/})\"""",
    "qemu-system-x86_64": 'echo "QEMU emulator version 3.2.1 (installed)"',
}
PYTHON = """
case "$*" in
*--collect-only*--bogus*) echo "error: unrecognized arguments: --bogus" >&2; exit 4 ;;
*--collect-only*) exit 0 ;;
*pytest*) echo "pytest ${VIRTBACKUP_QEMU_ROOT##*/}: ${*##*testpaths=tests/live}" >>"$CALLS" ;;
*tests.recordings*) echo "record ${VIRTBACKUP_QEMU_ROOT##*/}: ${*##*--qemu }" >>"$CALLS" ;;
*) exit 0 ;;
esac
[ "${VIRTBACKUP_QEMU_ROOT##*/}" != "${FAILING-none}" ]"""


class Tree:
    """A checkout with nothing but the script, set up as far as the script can see."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.path = directory / "tree"
        self.calls = directory / "calls"
        self._bin = directory / "bin"
        (self.path / ".venv" / "bin").mkdir(parents=True)
        self._bin.mkdir()
        for name in REAL:
            (self._bin / name).symlink_to(str(shutil.which(name)))
        for name, script in FAKES.items():
            _program(self._bin / name, script)
        _program(self.path / ".venv" / "bin" / "python", PYTHON)
        for name in ("dev", "setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.path)
        (self.path / ".ci").mkdir()
        shutil.copy(ROOT / ".ci" / "run", self.path / ".ci")
        self._stamp()

    def _stamp(self) -> None:
        version = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, check=True).stdout
        texts = [(self.path / name).read_bytes() for name in ("setup.cfg", "pyproject.toml")]
        seen = b"".join([*texts, f"{self.path}\n".encode(), version])
        text = f"{hashlib.sha256(seen).hexdigest()}  -\n"
        (self.path / ".venv" / "stamp").write_text(text)

    def run(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.dev("test", "--matrix", *argv, **environment)

    def dev(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["/bin/sh", self.path / "dev", *argv],
            env={"PATH": str(self._bin), "CALLS": str(self.calls), **environment},
            text=True, capture_output=True,
        )  # fmt: skip

    def called(self, program: str) -> list[str]:
        lines = self.calls.read_text().splitlines()
        return [line.split(" ", 1)[1] for line in lines if line.startswith(f"{program} ")]


def _program(path: pathlib.Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> Tree:
    return Tree(tmp_path)


def installed() -> str:
    found = re.search(
        r"^VERSION_CODENAME=(\w+)$", pathlib.Path("/etc/os-release").read_text(), re.M
    )
    return found[1] if found else ""


pytestmark = pytest.mark.skipif(
    not shutil.which("dpkg-query") or not os.access("/usr/bin/python3", os.X_OK),
    reason="the script works on Debian only",
)
OTHERS = [suite for suite in SUITES if suite != installed()]


def test_one_run_each_and_what_is_installed_needs_no_root_directory(tree: Tree) -> None:
    done = tree.run("-k", "crash")
    assert done.returncode == 0, done.stderr
    assert tree.called("debootstrap") == [f"{suite} scheme://mirror/debian/" for suite in OTHERS]
    assert sorted(tree.called("pytest")) == sorted(
        f"{'' if suite == installed() else suite}:  -k crash" for suite in SUITES
    )
    headings = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert headings[:-1] == [
        f"== QEMU {'3.2.1' if suite == installed() else '1.2.3'} ({suite})" for suite in SUITES
    ]
    last = done.stdout.splitlines()[-len(SUITES) :]
    assert all(": passed in " in line for line in last)


def test_root_directories_are_made_once(tree: Tree) -> None:
    tree.run()
    assert tree.run().returncode == 0
    assert tree.called("debootstrap") == []
    assert len(tree.called("pytest")) == len(SUITES)


def test_an_unfinished_root_directory_is_made_anew(tree: Tree) -> None:
    assert tree.run(BROKEN=OTHERS[0]).returncode == 1
    assert tree.run().returncode == 0
    assert tree.called("debootstrap") == [f"{OTHERS[0]} scheme://mirror/debian/"]


@pytest.mark.parametrize("missing", OTHERS)
def test_a_qemu_that_cannot_be_fetched_does_not_keep_the_next_from_its_turn(
    tree: Tree, missing: str
) -> None:
    done = tree.run(BROKEN=missing)
    assert done.returncode == 1
    assert f"dev: no QEMU of {missing}, see .cache/qemu/{missing}.log\n" in done.stderr
    assert len(tree.called("pytest")) == len(SUITES) - 1
    verdicts = done.stdout.split("== Summary\n")[1].splitlines()
    assert len(verdicts) == len(SUITES)
    assert verdicts[SUITES.index(missing)] == f"QEMU of {missing}: NOT TESTED"
    assert sum(": passed in " in line for line in verdicts) == len(SUITES) - 1


def test_a_qemu_that_does_not_run_does_not_keep_the_next_from_its_turn(tree: Tree) -> None:
    done = tree.run(DEAD=OTHERS[0])
    assert done.returncode == 1
    assert len(tree.called("pytest")) == len(SUITES) - 1
    assert f"\nQEMU of {OTHERS[0]}: NOT TESTED\n" in done.stdout


def test_a_failure_does_not_keep_the_next_from_its_turn(tree: Tree) -> None:
    done = tree.run(FAILING=OTHERS[0])
    assert done.returncode == 1
    assert len(tree.called("pytest")) == len(SUITES)
    verdicts = done.stdout.split("== Summary\n")[1].splitlines()
    assert [": FAILED in " in line for line in verdicts] == [s == OTHERS[0] for s in SUITES]


def test_a_list_of_mirrors(tree: Tree, tmp_path: pathlib.Path) -> None:
    mirrors = tmp_path / "mirrors.list"
    mirrors.write_text("# the nearest\nscheme://near/debian\tpriority:1\nscheme://far/debian\n")
    assert tree.run(MIRROR=f"mirror+file:{mirrors}/").returncode == 0
    assert tree.called("debootstrap")[0] == f"{OTHERS[0]} scheme://near/debian"


def test_no_mirror(tree: Tree) -> None:
    done = tree.run(MIRROR="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "dev: apt knows no mirror of Debian here"


def test_what_pytest_does_not_take_is_told_at_once(tree: Tree) -> None:
    """And not once for each QEMU that was fetched before."""
    done = tree.run("--bogus")
    assert (done.returncode, tree.called("debootstrap"), tree.called("pytest")) == (4, [], [])
    assert done.stderr.splitlines()[-1] == "error: unrecognized arguments: --bogus"


def test_every_qemu_is_recorded_by_both_programs(tree: Tree) -> None:
    done = tree.dev("record", "--all")
    assert done.returncode == 0, done.stderr
    assert tree.called("debootstrap") == [f"{suite} scheme://mirror/debian/" for suite in OTHERS]
    assert tree.called("record") == [
        f"{'' if suite == installed() else suite}: {program}"
        for suite in SUITES
        for program in ("qemu-system-x86_64", "qemu-storage-daemon")
    ]


def test_what_is_more_than_all_is_refused(tree: Tree) -> None:
    done = tree.dev("record", "--all", "x")
    assert (done.returncode, tree.called("record")) == (1, [])
    assert done.stderr.splitlines()[-1] == "dev: record: unknown argument: x"


def test_one_qemu_is_recorded_by_its_path(tree: Tree) -> None:
    assert tree.dev("record", "--qemu", "/opt/qemu").returncode == 0
    assert tree.called("debootstrap") == []
    assert tree.called("record") == [": /opt/qemu"]


def test_a_qemu_that_cannot_be_recorded_is_an_error(tree: Tree) -> None:
    assert tree.dev("record", "--all", FAILING=OTHERS[0]).returncode == 1
