# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program before users, terminals and monitors that mean it no good.

Whatever is typed, piped in or answered: exit status 0, 1 or 2, an error in one line, no traceback;
memory and time are bounded.
"""

import io
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests import conftest, hostile_monitor, measured_shell, shell_driver
from tests import test_bad_input_monitor as spoilers
from virtbackup.qemu import qmp
from virtbackup.tools import virsh_backup, vsh

DEADLINE = 50.0
"""Seconds that a program may take on a machine that does other things too: fewer than it waits for
a reply where nobody says otherwise."""

Run = Callable[..., tuple[int, str, str]]


def check(status: int, err: str) -> None:
    """What every end of the program has in common."""
    assert status in (0, 1, 2)
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors or status == 0, (status, err)
    assert not re.search(r"internal error: [A-Z][A-Za-z]*(Error|Exception)\b", err), err
    # What the terminal cannot show is written as an escape: one character all the same.
    shown = [re.sub(r"\\(x..|u.{4}|U.{8})", "?", line) for line in errors]
    assert all(len(line) < vsh.MAX_ERROR + 20 for line in shown)


# --- what is typed --------------------------------------------------------------------------------

_COMMANDS = [command.name for command in virsh_backup.TABLE.commands]
_OPTIONS = sorted({f"--{o.name}" for c in virsh_backup.TABLE.commands for o in c.options})
HARMFUL = ("cd", "backup-pull")
"""These leave something in the world; they have their own tests."""

_words = st.one_of(
    st.sampled_from([name for name in _COMMANDS if name not in HARMFUL]),
    st.sampled_from(_OPTIONS),
    st.sampled_from(
        ["vm1", "7", "my vm", "-", "--", "-h", "-q", "-c", "fake:///bad", "-1", "9" * 30, "/x",
         "vda,source=/x", ",,,", "vda,granularity=1", "vda,granularity=" + "9" * 19 + "TiB",
         "--port=0", "--disk==", "--=", "/dev/null", "\x1b[2J", "\0", "\udcff", "\ufffe", "\x85",
         "x" * 5000, "qmp://[", "1" * 5000]
    ),
    st.text(
        st.characters(exclude_categories=["Cs"]), max_size=8
    ),
)  # fmt: skip

_lines = st.one_of(
    st.lists(_words, max_size=6).map(lambda words: " ".join(map(vsh.quote, words))),
    st.lists(_words, max_size=6).map(" ".join),
    st.text("ab \t\n;#'\"\\-=,\0\r\x1b", max_size=30),
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """The program on the fake driver, in this process, its streams as a terminal's would be."""

    def run_it(*argv: str) -> tuple[int, str, str]:
        streams = [io.BytesIO(), io.BytesIO(), io.BytesIO()]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding="ascii"))
        status = shell_driver.main("-c", "fake:///two", *argv)
        out, err = (stream.getvalue().decode(errors="replace") for stream in streams[1:])
        return status, out, err

    return run_it


_NOT_OURS = re.compile(r"-\w*[cl]|--[clt]")
"""Options that would lead the program elsewhere, or have it write files: -c, --log, --trace."""

quick = settings(
    suppress_health_check=[*conftest.HOWEVER_SLOW, HealthCheck.function_scoped_fixture]
)


@quick
@given(line=_lines)
@example(line="backup-start-as vm1 --unix \x1b")
@example(line="backup-start-as vm1 --unix \udcff --print-xml")
@example(line="echo 日本 \udcff")
@example(line="echo --err 日本 \udcff")
@example(line="backup-start vm1 /dev/zero")
@example(line="backup-start vm1 /proc/self/mem")
@example(line="connect qmp://[")
@example(line="connect qmp:///%00")
@example(line="help " + "x" * 100_000)
@example(line="'" * 99_999)
@example(line="\\" * 99_999)
@example(line="; " * 50_000)
@example(line="--all '\xa0\U00010000' " + "x" * 5_000)
def test_any_line(run: Run, line: str) -> None:
    status, _, err = run(line)
    check(status, err)


@quick
@given(argv=st.lists(_words, min_size=1, max_size=6))
def test_any_arguments(run: Run, argv: list[str]) -> None:
    if argv[0].startswith("-") and any(_NOT_OURS.match(word) for word in argv):
        argv = ["--", *argv]
    status, _, err = run(*argv)
    check(status, err)


@quick
@given(text=st.lists(_lines, max_size=5).map("\n".join))
def test_any_piped_lines(text: str) -> None:
    """In one interactive shell; a command that fails there does not end it."""
    with pytest.MonkeyPatch.context() as patch:
        streams = [io.BytesIO(text.encode(errors="surrogateescape")), io.BytesIO(), io.BytesIO()]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, io.TextIOWrapper(stream, encoding="utf-8"))
        assert shell_driver.main("-c", "fake:///two") == 0
        err = streams[2].getvalue().decode(errors="replace")
    assert "Traceback" not in err
    assert not re.search(r"internal error: [A-Z][A-Za-z]*Error", err), err


# --- what a program has around it -----------------------------------------------------------------

ARGV = (sys.executable, shell_driver.__file__, "-c", "fake:///two")


def process(
    *argv: str, env: dict[str, str] | None = None, **streams: object
) -> subprocess.CompletedProcess[bytes]:
    given: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        argv, timeout=DEADLINE, env={**os.environ, **(env or {})}, **given
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_the_locale_lacks(encoding: str) -> None:
    done = process(*ARGV, "echo 日; echo --err 日", env={"PYTHONIOENCODING": encoding})
    shown = b"\xe6\x97\xa5" if encoding == "utf-8" else b"\\u65e5"
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        shown + b"\n",
        b"error: " + shown + b"\n",
    )


def test_a_trace_that_does_not_fit() -> None:
    """The command does its work all the same."""
    done = process(*ARGV, "--trace=/dev/full", "list", "--name")
    message = b"error: Failed to write file '/dev/full': No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)
    assert done.stdout == b"vm1\n7\nmy vm\n"


def test_errors_that_nobody_can_read() -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = process(*ARGV, "nope", stderr=full)
        assert (done.returncode, done.stdout) == (2, b"")
        done = process(*ARGV, "dominfo", "nope", stderr=full)
        assert (done.returncode, done.stdout) == (1, b"")


def test_errors_that_nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = process(*ARGV, "dominfo", "nope", stderr=pipe)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "out of memory"),
        (RecursionError("too deep"), "internal error: RecursionError: too deep"),
        (AssertionError(), "internal error: AssertionError:"),
    ],
)
def test_what_can_go_wrong_anywhere(error: Exception, text: str, run: Run) -> None:
    """By a driver that fails so: one line, and which kind of failure it was."""
    with pytest.MonkeyPatch.context() as patch:

        def fail(self: shell_driver.Driver) -> None:
            raise error

        patch.setattr(shell_driver.Driver, "list_domains", fail)
        status, out, err = run("list")
    assert (status, out) == (1, "")
    assert err.strip() == f"error: {text}"


# --- a hostile monitor, and the program as it is --------------------------------------------------

BASE_MIB = 64
"""What the program takes at most when all is well: Python, libvirt and lxml."""


@pytest.fixture
def hostile(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[hostile_monitor.HostileMonitor]:
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", str(tmp_path))
    with hostile_monitor.HostileMonitor(tmp_path) as served:
        yield served


@pytest.fixture
def shell(hostile: hostile_monitor.HostileMonitor, tmp_path: pathlib.Path) -> Run:
    """The program on the hostile monitor: its output, and the MiB it took in the end."""

    def run_it(patience: float, *argv: str) -> tuple[int, str, str]:
        began = time.monotonic()
        done = process(
            sys.executable, measured_shell.__file__, str(patience), str(tmp_path / "peak"),
            "-c", hostile.uri, *argv,
        )  # fmt: skip
        assert time.monotonic() - began < DEADLINE
        err = done.stderr.decode()
        check(done.returncode, err)
        assert len(err.splitlines()) <= 2, err  # an error, and what to do next
        return done.returncode, done.stdout.decode(), err

    return run_it


def peak_mib(tmp_path: pathlib.Path) -> float:
    return int((tmp_path / "peak").read_text()) / 1024


def test_program_unspoilt(
    hostile: hostile_monitor.HostileMonitor, shell: Run, tmp_path: pathlib.Path
) -> None:
    assert shell(10, "list", "--name") == (0, "vm\n", "")
    assert peak_mib(tmp_path) < BASE_MIB


def _line_without_end(turn: hostile_monitor.Turn) -> None:
    turn.send(b"{")
    while True:
        turn.send(b"x" * (1 << 16))


def _reply_of(size: int) -> hostile_monitor.Spoiler:
    def spoil(turn: hostile_monitor.Turn) -> None:
        frame = b'{"id": %d, "return": "' % turn.id
        turn.send(frame, b"x" * (size - len(frame) - 2), b'"}\n')

    return spoil


def _reply_of_values(value: bytes) -> hostile_monitor.Spoiler:
    """As many as a line can hold, or as many as are decoded."""

    def spoil(turn: hostile_monitor.Turn) -> None:
        frame = b'{"id": %d, "return": [' % turn.id
        each = max(len(value) + 1, qmp.weight(value + b",") * qmp.MAX_LINE // qmp.MAX_WEIGHT)
        turn.send(frame, b",".join([value] * (qmp.MAX_LINE // (each + 1))), b"]}\n")

    return spoil


def _wide(turn: hostile_monitor.Turn) -> None:
    frame = b'{"id": %d, "return": "' % turn.id
    turn.send(frame, b"x" * (qmp.MAX_LINE - 100) + "\U0001f600".encode(), b'"}\n')


def _large_events(turn: hostile_monitor.Turn) -> None:
    stamp = b'{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "E", "data": {"x": "'
    for _ in range(40):
        turn.send(stamp, b"x" * (1 << 20), b'"}}\n')
    turn.answer()


def _large_answers_to_nothing(turn: hostile_monitor.Turn) -> None:
    for id in range(40):
        turn.send(b'{"id": %d, "return": "' % (1000 + id), b"x" * (1 << 20), b'"}\n')
    turn.answer()


def _small_events_for_ever(turn: hostile_monitor.Turn) -> None:
    while True:
        turn.send(hostile_monitor.EVENT * 1000)


COSTLY: dict[str, tuple[hostile_monitor.Spoiler, str | None, float]] = {
    "a line without an end": (_line_without_end, "longer than 10485760 bytes", 100),
    "a line just under the limit": (_reply_of(qmp.MAX_LINE), "unexpected reply", 130),
    "a line just over the limit": (_reply_of(qmp.MAX_LINE + 1), "longer than 10485760", 100),
    "a line of wide characters": (_wide, "unexpected reply", 200),
    "a line of dicts": (_reply_of_values(b'{"":1}'), "unexpected reply", 200),
    "a line of lists": (_reply_of_values(b"[[[]]]"), "unexpected reply", 200),
    "40 MiB of events": (_large_events, None, 100),
    "40 MiB of answers to nothing": (_large_answers_to_nothing, None, 80),
    "events for ever": (_small_events_for_ever, "no reply to", 100),
    "silence": (spoilers.SPOILERS["silence"], "no reply to", BASE_MIB),
}
"""What is sent, what the error says (None: there is none), and the MiB that it may take."""


@pytest.mark.parametrize("case", COSTLY)
def test_memory_is_bounded(
    case: str, hostile: hostile_monitor.HostileMonitor, shell: Run, tmp_path: pathlib.Path
) -> None:
    spoil, reason, mib = COSTLY[case]
    hostile.play("list", 2, spoil)
    status, _, err = shell(0.5 if reason == "no reply to" else 10, "list", "--name")
    peak = peak_mib(tmp_path)
    print(f"{case}: {peak:.0f} MiB")
    assert peak < mib
    assert status == (0 if reason is None else 1)
    assert (reason or "") in err


PROGRAM = {
    "list": ["list"],
    "backup-start": ["backup-start-as", "vm", "--unix", "/nowhere/x.sock"],
    "backup-cleanup": ["backup-cleanup", "vm"],
}


@pytest.mark.parametrize("conversation", PROGRAM)
@pytest.mark.parametrize("spoiler", ["hang up", "greeting again", "error"])
def test_program_before_spoilt_answers(
    conversation: str, spoiler: str, hostile: hostile_monitor.HostileMonitor, shell: Run
) -> None:
    """In the middle of its last connection."""
    hostile.play(conversation, spoilers.turns(conversation) // 2, spoilers.SPOILERS[spoiler])
    status, _, err = shell(0.5, *PROGRAM[conversation])
    assert status == 1 or (spoiler == "error" and conversation != "list")
    assert "\x1b" not in err
