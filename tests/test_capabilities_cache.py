# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is kept of a QEMU's capabilities is for that very program, or it is not used."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from virtbackup import runtime
from virtbackup.qemu import capabilities, capabilities_cache, qmp

QEMU = "qemu-system-x86"
GREETING = qmp.Greeting((11, 1, 3), "Debian")
KNOWN = capabilities.Capabilities(
    GREETING.version,
    GREETING.package,
    frozenset({"query-commands", "query-status"}),
    frozenset({"job-id"}),
)


Running = tuple["subprocess.Popen[bytes]", runtime.Process]
Program = Callable[..., contextlib.AbstractContextManager[Running]]


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Runs a program of that name with arguments, which becomes another QEMU when it is sent a
    line."""
    names = tmp_path_factory.mktemp("bin")
    for name, what in ((QEMU, "sh"), ("other", "sh"), ("qemu-updated", "cat")):
        (names / name).symlink_to(str(shutil.which(what)))
    return functools.partial(_program, names)


@contextlib.contextmanager
def _program(names: pathlib.Path, name: str, *options: str) -> Iterator[Running]:
    argv = [str(names / name), "-c", f"echo; read line; exec {names}/qemu-updated", *options]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        start = runtime.process_start(process.pid)
        assert start is not None
        try:
            yield process, runtime.Process(process.pid, start)
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def state(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def process(program: Program) -> Iterator[runtime.Process]:
    with program(QEMU) as (_, process):
        yield process


def kept(
    process: runtime.Process, greeting: qmp.Greeting = GREETING
) -> capabilities.Capabilities | None:
    program = capabilities_cache.program_of(process)
    assert program is not None
    return capabilities_cache.load(program, greeting)


def keep(process: runtime.Process, known: capabilities.Capabilities) -> None:
    program = capabilities_cache.program_of(process)
    assert program is not None
    capabilities_cache.store(program, GREETING, known)


def test_what_was_stored_is_loaded(state: pathlib.Path, process: runtime.Process) -> None:
    assert kept(process) is None
    keep(process, KNOWN)
    assert kept(process) == KNOWN
    [file] = state.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_another_greeting_is_another_qemu(process: runtime.Process) -> None:
    keep(process, KNOWN)
    for other in (qmp.Greeting((11, 1, 4), "Debian"), qmp.Greeting((11, 1, 3), "")):
        assert kept(process, other) is None


def test_another_process_of_the_same_program(process: runtime.Process, program: Program) -> None:
    keep(process, KNOWN)
    with program(QEMU) as (_, other):
        assert kept(other) == KNOWN


@pytest.mark.parametrize("option", ["-compat", "--compat=deprecated-output=hide", "-readconfig"])
def test_an_option_that_hides_some_of_it(
    process: runtime.Process, program: Program, option: str
) -> None:
    """Whoever is started the same way has the same."""
    keep(process, KNOWN)
    less = dataclasses.replace(KNOWN, features=frozenset())
    with program(QEMU, option, "x") as (_, one), program(QEMU, option, "x") as (_, same):
        assert kept(one) is None
        keep(one, less)
        assert kept(same) == less
        assert kept(process) == KNOWN
        with program(QEMU, option, "y") as (_, other):
            assert kept(other) is None


@pytest.mark.parametrize("change", ["content", "times", "new"])
def test_an_update_of_the_program(tmp_path_factory: pytest.TempPathFactory, change: str) -> None:
    """Also one that has the size and the time of the one before."""
    names = tmp_path_factory.mktemp("bin")
    shell = pathlib.Path(str(shutil.which("sh"))).resolve()
    shutil.copy(shell, names / QEMU)
    with _program(names, QEMU) as (_, process):
        keep(process, KNOWN)
        assert kept(process) == KNOWN
    before = (names / QEMU).stat()
    if change == "new":
        (names / QEMU).unlink()
        shutil.copy(shell, names / QEMU)
    elif change == "content":
        with (names / QEMU).open("ab") as opened:
            opened.write(b"more")
    if change != "content":
        os.utime(names / QEMU, ns=(before.st_atime_ns, before.st_mtime_ns))
    with _program(names, QEMU) as (_, process):
        assert kept(process) is None


def test_another_program_in_the_same_process(program: Program) -> None:
    """As QEMU may update itself."""
    with program(QEMU) as (running, process):
        keep(process, KNOWN)
        assert kept(process) == KNOWN
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b"go\nhere\n")
        running.stdin.flush()
        assert running.stdout.readline() == b"here\n"
        assert runtime.is_alive(process)
        assert runtime.name_of_qemu(process[0]) is not None
        assert kept(process) is None


def test_who_looks_for_more_asks_again(
    monkeypatch: pytest.MonkeyPatch, process: runtime.Process
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(capabilities_cache, "_ASKED", "less")
        keep(process, KNOWN)
        assert kept(process) == KNOWN
    assert kept(process) is None


def test_nothing_is_kept_of_who_is_not_seen_to_be_qemu(program: Program) -> None:
    assert capabilities_cache.program_of(None) is None
    with program("other") as (_, process):
        assert capabilities_cache.program_of(process) is None


def test_what_is_kept_has_no_secret(state: pathlib.Path, program: Program) -> None:
    with program(QEMU, "-compat", "x", "-object", "secret,data=letmein") as (_, process):
        keep(process, KNOWN)
        assert kept(process) == KNOWN
    [file] = state.iterdir()
    assert "letmein" not in file.read_text()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", "[" * 100_000, "cut", "numbers", "nothing"],
)  # fmt: skip
def test_a_broken_file_is_no_file(state: pathlib.Path, process: runtime.Process, text: str) -> None:
    keep(process, KNOWN)
    [file] = state.iterdir()
    whole = file.read_text()
    said = json.loads(whole)
    made = {
        "cut": whole[:-1],
        "numbers": json.dumps({**said, "commands": [1]}),
        "nothing": json.dumps({**said, "features": None}),
    }
    file.write_text(made.get(text, text))
    assert kept(process) is None


def test_without_a_directory_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, state: pathlib.Path, process: runtime.Process
) -> None:
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(state / "none"))
    keep(process, KNOWN)
    assert not (state / "none").exists()
    assert kept(process) is None


def test_of_much_that_is_kept_the_newest_stay(
    monkeypatch: pytest.MonkeyPatch, state: pathlib.Path, program: Program
) -> None:
    monkeypatch.setattr(capabilities_cache, "_KEPT", 2)
    (state / "other").touch()
    with contextlib.ExitStack() as running:
        processes = []
        for number in range(3):
            _, process = running.enter_context(program(QEMU, "-compat", str(number)))
            keep(process, KNOWN)
            for file in state.glob("*.capabilities"):
                at = file.stat().st_mtime_ns - 10**9
                os.utime(file, ns=(at, at))
            processes.append(process)
        assert [kept(process) for process in processes] == [None, KNOWN, KNOWN]
    assert len(list(state.iterdir())) == 3


def test_all_of_it_is_kept() -> None:
    """A field more would have to be in the file."""
    names = [field.name for field in dataclasses.fields(capabilities.Capabilities)]
    assert names == ["version", "package", "commands", "features"]


@pytest.mark.timeout(30)
def test_what_is_no_file_is_not_waited_for(program: Program, state: pathlib.Path) -> None:
    with program(QEMU) as (running, process):
        keep(process, KNOWN)
        [file] = state.iterdir()
        file.unlink()
        os.mkfifo(file)
        os.mkfifo(file.with_suffix(f".{os.getpid()}"))
        assert kept(process) is None
        keep(process, KNOWN)
        assert kept(process) == KNOWN
        running.kill()
