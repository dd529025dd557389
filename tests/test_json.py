# SPDX-License-Identifier: LGPL-2.1-or-later
"""``--json``: who has it, and that what is printed is JSON, whatever things are called and however
a command ends. tests/live/test_json.py has every command on a real QEMU."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import virtbackup
from tests import shell_driver, strict_json, test_traffic, waiting
from virtbackup.tools import interrupt, virsh_backup, vsh

ROOT = pathlib.Path(__file__).parents[1]
RECORDING = ROOT / "virtbackup" / "recordings" / "qemu-7.2.22.jsonl"
DEADLINE = waiting.DEADLINE

WITHOUT = {
    "backup-dumpxml": "it prints XML",
    "dumpxml": "it prints XML",
    "translate": "it prints XML",
    "monitor-record": "what it writes is JSON",
    "connect": "it prints nothing",
    "cd": "it prints nothing",
    "exit": "it prints nothing",
    "quit": "it prints nothing",
    "echo": "it prints what it was given",
    "pwd": "for people in the interactive shell",
}
"""Command without ``--json`` -> why."""

WITH = [command for command in virsh_backup.TABLE.commands if command.name not in WITHOUT]
LINES = {"backup-pull", "rpc-dump"}
"""Those that print a line for each thing that happens."""

BACKUP = '<domainbackup><address type="unix" path="/run/x.sock"/></domainbackup>'

Output = shell_driver.Output
Run = shell_driver.Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return shell_driver.runner(capsys)


@pytest.fixture
def xmlfile(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "backup.xml"
    path.write_text(BACKUP)
    return str(path)


@pytest.mark.parametrize("command", virsh_backup.TABLE.commands, ids=lambda one: one.name)
def test_every_command_has_it_or_a_reason(command: vsh.Command) -> None:
    option = command.option("json")
    assert (option is None) == (command.name in WITHOUT)
    if option is not None:
        assert option.kind is vsh.Kind.BOOL
        assert ("lines" in option.help) == (command.name in LINES)


def test_every_reason_is_that_of_a_command() -> None:
    assert set(WITHOUT) <= {command.name for command in virsh_backup.TABLE.commands}


REQUIRED = {"domain": "nope", "xmlfile": "-", "directory": "/nope/d", "file": "/nope/f",
            "first": "/nope/a", "second": "/nope/b", "branch": "nightly", "server": "unix:/nope/s",
            "out": "/nope/o", "keep": "2", "what": "nope"}  # fmt: skip
MORE = {
    "backup-start-as": ["--unix=/run/x.sock"],
    "help": ["nope"],
    "rpc-dump": ["--listen=unix:/nope/l"],
}


def words_of(command: vsh.Command) -> list[str]:
    """The command as it cannot go well, with its ``--json``."""
    words = [command.name]
    for option in command.options:
        if option.required:
            value = REQUIRED[option.name]
            words.append(value if option.kind is vsh.Kind.DATA else f"--{option.name}={value}")
    return [*words, *MORE.get(command.name, []), "--json"]


ALWAYS_GOOD = ("list", "uri", "hostname", "version")
"""Where there is a connection."""


@pytest.mark.parametrize(
    ("command", "uri"),
    [
        *((command, "nowhere:///") for command in WITH),
        *((command, "fake:///two") for command in WITH if command.name not in ALWAYS_GOOD),
    ],
    ids=lambda given: getattr(given, "name", given),
)
def test_what_fails_at_once_prints_nothing(
    command: vsh.Command, uri: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", (ROOT / "tests" / "__init__.py").open())
    status, out, err = run(*words_of(command), uri=uri)
    assert (status in (1, 2), out) == (True, "")
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    "words",
    [["--bandwidth=x"], ["--full", "--auto"], ["--target=vda"]],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("uri", ["nowhere:///", "fake:///two"])
def test_a_pull_that_makes_no_sense_prints_nothing(
    words: list[str], uri: str, run: Run, tmp_path: pathlib.Path
) -> None:
    """And connects to nobody for it."""
    given = run("backup-pull", "vm1", str(tmp_path / "out"), *words, "--json", uri=uri)
    assert given[:2] == (2, "")
    assert given[2].startswith(("error: invalid", "error: 'x'", "error: Options"))


# --- one value ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["domid", "vm1"], {"domain": "vm1", "id": 1}),
        (["domid", "off"], {"domain": "off", "id": None}),
        (["domname", "2"], {"domain": "7", "name": "7"}),
        (["domuuid", "1"], {"domain": "vm1", "uuid": shell_driver.UUID.format(4)}),
        (["domstate", "off"], {"domain": "off", "state": "shut off"}),
        (["uri"], {"uri": "fake:///two"}),
        (["hostname"], {"hostname": os.uname().nodename}),
    ],
)
def test_one_value(words: list[str], facts: dict[str, Any], run: Run) -> None:
    status, out, err = run(*words, "--json")
    assert (status, strict_json.loads(out), err) == (0, facts, "")
    value = list(facts.values())[-1]
    assert run(*words)[1] == f"{'-' if value is None else value}\n"
    assert run("-q", *words, "--json")[1] == out


def test_help(run: Run) -> None:
    """So that a program learns what this one takes."""
    command = strict_json.loads(run("help", "backup-verify", "--json", uri="nowhere:///")[1])
    assert (command["name"], command["group"]) == ("backup-verify", "backup")
    assert command["options"][0] == {
        "name": "directory", "kind": "data", "help": "directory of backups", "required": True,
        "multi": False, "choices": [],
    }  # fmt: skip
    everything = strict_json.loads(run("help", "--json")[1])
    assert [group["keyword"] for group in everything["groups"]] == [
        group.keyword for group in virsh_backup.TABLE.groups
    ]
    commands = {one["name"]: one for group in everything["groups"] for one in group["commands"]}
    assert sorted(commands) == [one.name for one in virsh_backup.TABLE.commands]
    assert commands["backup-verify"] == command
    for group in everything["groups"]:
        assert strict_json.loads(run("help", group["keyword"], "--json")[1]) == group


# --- names, and numbers that are none -------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "find"),
    [
        (["list"], lambda told: told[0]["name"]),
        (["dominfo", "1"], lambda told: told["name"]),
        (["domid", shell_driver.ODD], lambda told: told["domain"]),
        (["domname", "1"], lambda told: told["name"]),
        (["domuuid", "1"], lambda told: told["domain"]),
        (["domstate", shell_driver.ODD], lambda told: told["domain"]),
        (["branch-list", "1"], lambda told: told["branches"][0]["disks"][0]["note"]),
        (["branch-create", "1", shell_driver.ODD], lambda told: told["created"]),
        (["backup-cleanup", "1"], lambda told: told["removed"][0]),
    ],
)
def test_any_name(words: list[str], find: Callable[[Any], str], run: Run) -> None:
    """Bytes that are no UTF-8 are as ``os.fsdecode`` has them, to be found again by that."""
    status, out, err = run(*words, "--json", uri="fake:///odd")
    assert (status, find(strict_json.loads(out)), err) == (0, shell_driver.ODD, "")


def test_a_number_that_is_none_is_null(run: Run, xmlfile: str) -> None:
    line = f"backup-start 1 {xmlfile}; backup-info 1 --json"
    out = run("-q", line, uri="fake:///odd")[1]
    told = strict_json.loads(out)
    assert (told["started"], told["scratch_timeout"]) == (None, None)
    assert (told["disks"][0]["reason"], told["disks"][0]["capacity"]) == (shell_driver.ODD, 1 << 63)


def test_nothing_to_list(run: Run) -> None:
    assert run("list", "--all", "--json", uri="fake:///none") == (0, "[]\n", "")
    told = strict_json.loads(run("branch-list", "vm1", "--json", uri="fake:///bad")[1])
    assert told == {"domain": "vm1", "branches": []}


# --- nothing but JSON -----------------------------------------------------------------------------


def test_the_time_it_took_is_told_elsewhere(run: Run) -> None:
    status, out, err = run("-t", "domid vm1 --json; list --json")
    assert status == 0
    assert "(Time:" not in out
    assert err.count("\n(Time: ") == 2


def test_a_picture_is_no_json(run: Run, tmp_path: pathlib.Path) -> None:
    picture = tmp_path / "x.svg"
    status, out, err = run("backup-map", "vm1", f"--output={picture}", "--json")
    assert (status, out) == (2, "")
    assert err.startswith("error: Options --json and --output are mutually exclusive\n")
    assert not picture.exists()


def test_a_map_of_a_backup_that_another_has_followed(run: Run) -> None:
    """What was told of the first has a disk that the second has left out."""
    start = "backup-start-as vm1 --unix=/nope/x.sock --disk=vda,present=yes"
    status, out, err = run(f"{start}; backup-map vm1 --json")
    assert (status, out) == (1, "Domain backup started\n")
    assert "error: operation failed: cannot connect to export 'vda': " in err


def test_a_pull_that_fails_by_our_own_fault_says_so(run: Run, tmp_path: pathlib.Path) -> None:
    made = tmp_path / "made"
    status, out, err = run("backup-pull", "vm1", str(made), "--json", uri="fake:///bug")
    assert (status, err) == (1, "error: internal error: RuntimeError: two; lines\n")
    told = {"event": "failed", "code": 1, "error": "two\nlines", "left": []}
    assert strict_json.lines(out) == [told]


def test_a_pull_whose_backup_runs_on_says_so(run: Run, tmp_path: pathlib.Path) -> None:
    argv = ("backup-pull", "vm1", str(tmp_path / "made"), "--json")
    status, out, err = run(*argv, uri="fake:///interrupt-lost")
    left = "the backup of domain 'vm1' could not be ended: Timed out during operation: not now"
    assert (status, err) == (130, f"flags=2\nwarning: {left}\nerror: interrupted\n")
    assert strict_json.lines(out) == [
        {"event": "failed", "code": 78, "error": "interrupted", "left": [left]}
    ]


def test_a_pull_whose_end_nobody_waits_for_says_so(
    run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a second Ctrl-C, once that takes long."""
    monkeypatch.setattr(interrupt, "GOES_WELL", 0.0)
    made = tmp_path / "made"
    status, out, err = run("backup-pull", "vm1", str(made), "--json", uri="fake:///interrupt-hang")
    left = (
        "nobody waits for the end of the backup of domain 'vm1': it ends with the connection, else"
        " with the next start, or backup-cleanup (of libvirt's own engine: virsh domjobabort)"
    )
    assert (status, err) == (130, f"flags=2\nwarning: {left}\nerror: interrupted\n")
    [told] = strict_json.lines(out)
    assert (told["error"], told["left"]) == ("interrupted", [left])
    assert not made.exists()


# --- monitor-diff ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", test_traffic.CASES, ids=lambda case: case.name)
def test_monitor_diff_tells_what_it_tells_people(
    case: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(test_traffic.DATA)
    options = case.with_suffix(".options")
    words = options.read_text().split() if options.exists() else []
    words += [f"{case.name}.a", f"{case.name}.b"]
    status = virsh_backup.main(["monitor-diff", "--json", *words])
    out, err = capsys.readouterr()
    assert virsh_backup.main(["monitor-diff", *words]) == status
    text, text_err = capsys.readouterr()
    assert err == text_err
    if status == vsh.USAGE:
        assert out == ""
        return
    told = strict_json.loads(out)
    assert (told["first"], told["second"]) == (f"{case.name}.a", f"{case.name}.b")
    assert (told["same"], told["differences"] == []) == (status == 0, status == 0)
    assert list(as_text(told, "--all" in words)) == [
        line.partition(" @@")[0] if line.startswith("@@") else line
        for line in (short(line) for line in text.splitlines()[2:])
    ]


def short(line: str) -> str:
    """A hunk's numbers without its lengths."""
    if not line.startswith("@@"):
        return line
    _, first, second, _ = line.split(" ", 3)
    return f"@@ {first.partition(',')[0]} {second.partition(',')[0]}"


def as_text(told: dict[str, Any], marked: bool) -> Iterator[str]:
    for hunk in told["differences"]:
        yield f"@@ -{hunk['first_number']} +{hunk['second_number']}"
        for one in hunk["messages"]:
            sign = {"both": " ", "first": "-", "second": "+"}[one["in"]]
            mark = f"{one['direction']} " if marked else ""
            yield sign + mark + json.dumps(one["message"], sort_keys=True)


def said(path: pathlib.Path, *messages: str) -> None:
    lines = ['{"<-": {"QMP": {}}}', '{"->": {"execute": "qmp_capabilities", "id": 1}}', *messages]
    path.write_text("".join(f"{line}\n" for line in lines))


def test_monitor_diff_of_what_python_alone_takes_for_json(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / os.fsdecode(b'a"\n\xff'), tmp_path / "b"
    said(first, '{"->": {"execute": "x", "arguments": {"y": NaN, "z": -1e999}, "id": 2}}')
    said(second, '{"->": {"execute": "x", "arguments": {"y": "\\ud800"}, "id": 2}}')
    assert virsh_backup.main(["monitor-diff", "--json", str(first), str(second)]) == 1
    told = strict_json.loads(capsys.readouterr().out)
    assert told["first"] == str(first)
    _, one, other = told["differences"][0]["messages"]
    assert one["message"] == {"execute": "x", "arguments": {"y": None, "z": None}}
    assert other["message"] == {"execute": "x", "arguments": {"y": "\ud800"}}


def test_monitor_diff_of_what_is_nested_too_deeply(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever step gives up: there is no half a document."""
    paths = [tmp_path / name for name in ("a", "b")]
    for depth in (100, 200, 300, 400, 600, 900, 100_000):
        for number, path in enumerate(paths):
            nested = "[" * depth + str(number) + "]" * depth
            said(path, f'{{"->": {{"execute": "x", "arguments": {{"y": {nested}}}, "id": 2}}}}')
        status = virsh_backup.main(["monitor-diff", "--json", *map(str, paths)])
        out, err = capsys.readouterr()
        assert (status, bool(out), err[:7]) in ((1, True, ""), (2, False, "error: ")), depth
        if out:
            assert strict_json.loads(out)["same"] is False


# --- monitor-replay -------------------------------------------------------------------------------


def document(process: "subprocess.Popen[str]") -> Any:
    """What a process prints that then goes on."""
    return strict_json.loads(strict_json.first(process))


@pytest.mark.parametrize("name", ["plain", os.fsdecode(b"a b%41?#\"'\n\xff\xc3\xa9")], ids=ascii)
def test_monitor_replay_tells_where_it_is(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / name
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-q", "monitor-replay", "--json"]
    with subprocess.Popen(
        [*argv, str(RECORDING), "--socket", str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            told = document(process)
            assert told["address"] == {"type": "unix", "path": str(path), "tls": False}
            with virtbackup.open(told["uri"]) as connection:
                assert len(connection.listAllDomains()) == 1
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.read() == ""
        assert process.wait(DEADLINE) == 0


# --- rpc-dump -------------------------------------------------------------------------------------


class Dump:
    """``rpc-dump`` in a process of its own."""

    def __init__(self, server: str, *words: str) -> None:
        argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "rpc-dump", server, *words]
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def line(self) -> Any:
        assert self.process.stdout is not None
        return strict_json.loads(self.process.stdout.readline())

    def end(self) -> tuple[int, str, str]:
        """Its exit status, and what else it printed."""
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, err


def connected(address: dict[str, Any]) -> socket.socket:
    if address["type"] == "ip":
        return socket.create_connection((address["host"], address["port"]), DEADLINE)
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(DEADLINE)
    made.connect(address["path"])
    return made


def test_a_dump_of_a_server_that_is_not_there(tmp_path: pathlib.Path) -> None:
    dump = Dump(f"unix:{tmp_path}/nope", "--json", "--clients=1")
    first = dump.line()
    assert first["event"] == "listening"
    with connected(first["address"]) as client:
        assert client.recv(1) == b""
    reason = f"cannot connect to 'unix:{tmp_path}/nope': No such file or directory"
    assert dump.line() == {"event": "failed", "client": 1, "error": reason}
    assert dump.end() == (0, "", "")


def test_a_dump_of_what_is_no_message(tmp_path: pathlib.Path) -> None:
    """It is passed on all the same, and where to connect to is told of a port that was picked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        dump = Dump(f"tcp:127.0.0.1:{port}", "--json", "--clients=1", "--listen", "tcp:127.0.0.1:0")
        listening = dump.line()
        assert listening["event"] == "listening"
        assert listening["address"].keys() == {"type", "host", "port", "tls"}
        with connected(listening["address"]) as client:
            accepted, _ = server.accept()
            client.sendall(b"\xff" * 64)
            assert accepted.recv(64, socket.MSG_WAITALL) == b"\xff" * 64
            accepted.close()
    assert dump.line() == {"event": "connected", "client": 1}
    told = dump.line()
    assert told.pop("problem").startswith("message of 4294967295 bytes")
    assert told == {"event": "unreadable", "client": 1, "direction": "->"}
    assert dump.line() == {"event": "closed", "client": 1}
    assert dump.end() == (0, "", "")


@pytest.mark.parametrize("words", [["--json"], []])
def test_a_dump_that_nobody_reads_ends(words: list[str], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "proxy"
    dump = Dump(f"unix:{tmp_path}/nope", *words, "--listen", f"unix:{path}")
    assert dump.process.stdout is not None
    assert dump.process.stdout.readline()
    dump.process.stdout.close()
    with connected({"type": "unix", "path": str(path)}) as client:
        assert client.recv(1) == b""
    assert dump.process.wait(DEADLINE) == 1
    assert dump.process.stderr is not None
    assert dump.process.stderr.read() == ""
    assert not path.exists()
