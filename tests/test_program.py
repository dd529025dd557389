# SPDX-License-Identifier: LGPL-2.1-or-later
"""The beginning of the programs, before there is a shell or a daemon that could tell anything."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

BEGIN = "from virtbackup.tools import program\nsys.exit(program.{name}())\n"

INTERRUPT = """\
import os, signal
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "virtbackup.tools.{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


def _run(program: str, *argv: str) -> tuple[int, str, str]:
    """PROGRAM, by an interpreter that sees nothing that is installed beside it."""
    text = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", text, *argv],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "argv", "module", "package"),
    [
        ("virsh_backup", ("--version",), "libvirt", "python3-libvirt"),
        ("virsh_backup", ("-c", "test:///default", "list"), "libvirt", "python3-libvirt"),
        ("virsh_backup", ("backup-list", "/"), "libvirt", "python3-libvirt"),
        ("virtbackupd", ("--version",), "libvirt", "python3-libvirt"),
    ],
)
def test_module_that_is_not_installed_is_told_in_a_line(
    name: str, argv: tuple[str, ...], module: str, package: str
) -> None:
    status, out, err = _run(BEGIN.format(name=name), *argv)
    assert (status, out) == (1, "")
    assert err == (
        f"error: the Python module '{module}' is not installed for {sys.executable}\n"
        f"Debian has it as {package}; a virtual environment sees that with --system-site-packages\n"
    )


def test_help_needs_nothing_that_is_installed() -> None:
    status, out, err = _run(BEGIN.format(name="virsh_backup"), "help", "list")
    assert (status, err) == (0, "")
    assert out.startswith("  NAME\n    list - ")


@pytest.mark.parametrize(
    ("name", "module"), [("virsh_backup", "virsh_map"), ("virtbackupd", "virtbackupd")]
)
def test_interrupt_while_a_program_is_loaded(name: str, module: str) -> None:
    program = INTERRUPT.format(module=module) + BEGIN.format(name=name)
    assert _run(program, "help") == (130, "", "error: interrupted\n")


LOSE = """\
import contextlib, os, signal, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "lxml":
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


def test_interrupt_that_a_module_being_loaded_would_lose() -> None:
    """As lxml does, of some versions."""
    done = subprocess.run(
        [sys.executable, "-c", LOSE + BEGIN.format(name="virsh_backup"), "-c", "test:///default",
         "list"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


LATE = """
import os, signal, sys, threading, time
from virtbackup.tools import virsh_backup

struck = threading.Event()

def strike(*_):
    if not struck.is_set():
        struck.set()
        raise KeyboardInterrupt

class Late(threading.Thread):
    def _bootstrap(self):  # where it begins to run
        while not struck.is_set():  # one that comes just before a wait does not end that
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
            struck.wait(0.05)
        time.sleep(0.2)
        os.write(1, b"begun")
        super()._bootstrap()

def interrupted(argv):
    signal.signal(signal.SIGALRM, strike)
    try:
        Late(daemon=True).start()
    except KeyboardInterrupt:
        return 130

virsh_backup._main = interrupted
sys.exit(virsh_backup.main())
"""


def test_a_thread_whose_start_was_interrupted_begins_before_the_end() -> None:
    """Python crashes else, where it has not come to run by then."""
    done = subprocess.run(
        [sys.executable, "-c", LATE], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "begun", "")
