# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program virsh-backup: its commands, how each may be misused, exit statuses, the terminal."""

import contextlib
import io
import json
import os
import pathlib
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

import virtbackup
from tests import shell_driver, terminals, waiting
from virtbackup import errors, hypervisor
from virtbackup.conf import backup_conf, domain_conf
from virtbackup.tools import virsh_backup, virsh_connection, virsh_pull, vsh, vsh_readline

URI = "fake:///two"
DEADLINE = waiting.DEADLINE
"""Seconds that a program may take to say what it is waited for."""

HEAVY = {
    "readline", "tqdm", "nbd", "libvirt", "lxml", "xmlschema", "argparse", "json", "asyncio"
}  # fmt: skip
"""Modules that take their time to load."""
BACKUP = '<domainbackup><address type="unix" path="/run/x.sock"/></domainbackup>'

SHOWS = "'list --all' shows all that there are\n"
"""What to do about a domain that there is not."""

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


# --- misuse, of every command ---------------------------------------------------------------------

REQUIRED = {"domain": "vm1", "xmlfile": "x.xml", "directory": "/d", "file": "f", "first": "f",
            "second": "g", "branch": "nightly", "to": "native", "server": "unix:/s", "out": "/o",
            "keep": "2", "what": "vm1"}  # fmt: skip


def _good(command: vsh.Command, but: vsh.Option | None = None) -> list[str]:
    """The command with the values that it requires, BUT for one."""
    words = [command.name]
    for option in command.options:
        if option.required and option is not but:
            value = REQUIRED[option.name]
            words.append(value if option.kind is vsh.Kind.DATA else f"--{option.name}={value}")
    return words


def _shown(option: vsh.Option) -> str:
    return f"<{option.name}>" if option.kind is vsh.Kind.DATA else f"--{option.name}"


def _misuses() -> Iterator[tuple[str, list[str], str]]:
    for command in virsh_backup.TABLE.commands:
        good = _good(command)
        yield (
            f"{command.name} unknown option",
            [*good, "--nope"],
            f"command '{command.name}' doesn't support option --nope",
        )
        slots = [o for o in command.options if o.kind in (vsh.Kind.DATA, vsh.Kind.ARGV)]
        if not any(option.kind is vsh.Kind.ARGV for option in slots):
            words = [command.name, *("x" for _ in slots), "more"]
            yield f"{command.name} extra data", words, "unexpected data 'more'"
        if len(good) > 1:
            missing = [option for option in command.options if option.required][-1]
            yield (
                f"{command.name} missing data",
                good[:-1],
                f"command '{command.name}' requires {_shown(missing)} option",
            )
        for option in command.options:
            yield from _option_misuses(command, option, _good(command, but=option))


def _option_misuses(
    command: vsh.Command, option: vsh.Option, good: list[str]
) -> Iterator[tuple[str, list[str], str]]:
    use = f"--{option.name}"
    title = f"{command.name} {use}"
    if option.kind is vsh.Kind.BOOL:
        yield f"{title}=1", [*good, f"{use}=1"], f"invalid '=' after option {use}"
    elif option.kind is not vsh.Kind.ARGV:
        word = "number" if option.kind is vsh.Kind.INT else "string"
        yield f"{title} without value", [command.name, use], f"expected syntax: {use} <{word}>"
        yield (
            f"{title} empty",
            [command.name, f"{use}="],
            f"Failed to get option '{option.name}': Option argument is empty",
        )
    if option.kind is vsh.Kind.INT:
        for value in ("abc", option.least - 1, option.most + 1):
            yield (
                f"{title}={value}",
                [*good, f"{use}={value}"],
                f"Numeric value '{value}' for <{option.name}> option is malformed or out of range",
            )
    if option.choices:
        expected = " or ".join(option.choices)
        yield (
            f"{title}=zzz",
            [*good, f"{use}=zzz"],
            f"invalid value 'zzz' for {use}: expected {expected}",
        )


MISUSES = list(_misuses())


def _see_help(command: str) -> str:
    return f"'help {command}' shows what it takes\n"


@pytest.mark.parametrize(("title", "words", "message"), MISUSES, ids=[m[0] for m in MISUSES])
def test_misuse(title: str, words: list[str], message: str, run: Run) -> None:
    assert run(*words) == (2, "", f"error: {message}\n{_see_help(words[0])}")


def test_every_command_has_its_group_and_its_help(run: Run) -> None:
    keywords = [group.keyword for group in virsh_backup.TABLE.groups]
    for command in virsh_backup.TABLE.commands:
        assert command.group in keywords
        assert command.help
        assert all(option.help for option in command.options)
        status, out, err = run(command.name, "--help")
        assert (status, err) == (0, "")
        assert out.startswith(f"  NAME\n    {command.name} - {command.help}\n")
        assert run("help", command.name) == (0, out, "")


def test_what_virsh_calls_otherwise_is_done_here() -> None:
    for theirs, ours in virsh_backup.VIRSHS.items():
        assert virsh_backup.TABLE.find(theirs) is None
        name, *options = ours.split()
        command = virsh_backup.TABLE.command(name)
        assert all(command.option(option.removeprefix("--")) for option in options)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nope"], "unsupported option '--nope'. See --help."),
        (["-z"], "unsupported option '-z'. See --help."),
        (["-qz"], "unsupported option '-z'. See --help."),
        (["--quiet=1"], "unsupported option '--quiet=1'. See --help."),
        (["--t"], "unsupported option '--t'. See --help."),
        ([""], "the command is empty\n'help' shows all commands"),
        (["-c"], "option '-c'/'--connect' requires an argument"),
        (["--connect"], "option '-c'/'--connect' requires an argument"),
        (["--trace"], "option '--trace' requires an argument"),
        (["-d", "x"], "option -d takes a number from 0 to 4"),
        (["-d5"], "option -d takes a number from 0 to 4"),
        (["--version=x"], "option --version takes short or long"),
        (["uri", "-c", "x"],
         "unexpected data '-c'\nThe shell's own options stand in front of the command"),
        (["list; echo 'a"], "missing '"),
        (["backup-strat"], "unknown command: 'backup-strat'\n"
         "Did you mean: backup-start, backup-start-as, backup-stop?"),
        (["help", "backup-strat"], "command or command group 'backup-strat' doesn't exist\n"
         "Did you mean: backup-start, backup-start-as, backup-stop?"),
        (["backup-d"], "unknown command: 'backup-d'\nDid you mean: backup-dumpxml?"),
        (["help", "bran"], "command or command group 'bran' doesn't exist\n"
         "Did you mean: branch?"),
        (["backup-stop", "vm1", "--can"],
         "command 'backup-stop' doesn't support option --can\nDid you mean: --cancel?"),
        (["backup-begin", "vm1"],
         "unknown command: 'backup-begin'\nHere it is called: backup-start"),
        (["help", "checkpoint-list"], "command or command group 'checkpoint-list' doesn't exist\n"
         "Here it is called: branch-list"),
        (["help", "nope"], "command or command group 'nope' doesn't exist\n"
         "'help' shows all commands"),
        (["list", "--table", "--json"],
         "Options --json and --table are mutually exclusive\n'help list' shows what it takes"),
        (["--log"], "option '-l'/'--log' requires an argument"),
        (["--trace", "-q", "uri"], "option '--trace' requires an argument\n"
         "If that is meant as the value: --trace=-q"),
        (["-l", "--trace", "x"], "option '-l'/'--log' requires an argument\n"
         "If that is meant as the value: --log=--trace"),
        (["-qk"], "option '-k'/'--keepalive-interval' requires an argument"),
        (["-k", "x", "uri"], "option --keepalive-interval takes a number"),
        (["--keepalive-count=-1", "uri"], "option --keepalive-count takes a number"),
        (["echo --split --xml a"],
         "Options --xml and --split are mutually exclusive\n'help echo' shows what it takes"),
        (["echo a; nope"], "unknown command: 'nope'\n'help' shows all commands"),
        (["list", ";", "uri"], "unexpected data ';'\n'help list' shows what it takes"),
        (["list", "--name", "--table"],
         "Options --table and --name are mutually exclusive\n'help list' shows what it takes"),
    ],
)  # fmt: skip
def test_misuse_of_the_program(argv: list[str], message: str, run: Run) -> None:
    assert run(*argv) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    "words",
    [
        ["backup-pull", "vm1", "{}"],
        ["backup-pull", "vm1", "d", "--xml={}"],
        ["backup-pull", "vm1", "d", "--target=vda={}"],
        ["backup-list", "{}"],
        ["backup-verify", "d", "--device=vda={}"],
        ["backup-map", "vm1", "--output={}.svg"],
        ["backup-prune", "{}", "--keep=2"],
        ["backup-restore", "{}", "out"],
        ["backup-serve", "{}"],
        ["backup-start", "vm1", "{}"],
        ["monitor-diff", "{}", "b"],
        ["monitor-record", "{}"],
        ["monitor-replay", "{}"],
        ["monitor-replay", "f", "--socket={}"],
        ["translate", "{}", "--to=native"],
        ["--log={}", "uri"],
        ["--trace={}", "uri"],
    ],
)
@pytest.mark.parametrize("uri", ["ssh://host/x", "nbd://host/x", "file:///x", "S3://x"])
def test_uri_for_a_path(
    words: list[str], uri: str, run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be one of that odd name, below the current directory."""
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*(word.format(uri) for word in words))
    assert (status, out) == (2 if words[0] == "monitor-diff" else 1, "")
    uri += ".svg" if words[0] == "backup-map" else ""
    assert err == f"error: '{uri}' is a URI: expected a path\nThat name as a path: ./{uri}\n"
    assert not list(tmp_path.iterdir())


# --- the program's options ------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-v", "--version", "--version=short", "--vers"])
def test_short_version(option: str, run: Run) -> None:
    assert run(option) == (0, "0.1.0\n", "")


@pytest.mark.parametrize("option", ["-V", "--version=long"])
def test_long_version(option: str, run: Run) -> None:
    status, out, err = run(option)
    assert (status, err) == (0, "")
    assert re.fullmatch(r"Virsh-backup .* 0\.1\.0\nUsing libvirt [0-9.]+ and Python [0-9.]+\n", out)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_usage_names_every_command(option: str, run: Run) -> None:
    status, out, err = run(option)
    assert (status, err) == (0, "")
    assert all(f"    {command.name} " in out for command in virsh_backup.TABLE.commands)


def test_options_are_taken_together_and_shortened(run: Run) -> None:
    assert shell_driver.main("-qrcfake:///two", "--timi", "uri") == 0
    assert run("uri", uri="fake:///x")[1].startswith("fake:///two\n\n(Time: ")


def test_options_of_virsh_that_do_nothing_here(run: Run) -> None:
    words = ["-k", "5", "-K3", "-e", "^]", "--keepalive-interval=0", "--keepalive-count", "2"]
    words += ["--escape=x", "--no-pkttyagent"]
    assert run(*words, "uri") == (0, "fake:///two\n", "")


def test_timing(run: Run) -> None:
    status, out, err = run("-t", "uri")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"fake:///two\n\n\(Time: \d+\.\d{3} ms\)\n\n", out)


@pytest.mark.parametrize(
    ("environment", "uri"),
    [
        ({"VIRTBACKUP_DEFAULT_URI": "fake:///a", "LIBVIRT_DEFAULT_URI": "fake:///b"}, "fake:///a"),
        ({"LIBVIRT_DEFAULT_URI": "fake:///b"}, "fake:///b"),
        (
            {"VIRSH_DEFAULT_CONNECT_URI": "fake:///a", "LIBVIRT_DEFAULT_URI": "fake:///b"},
            "fake:///a",
        ),
        ({"VIRTBACKUP_DEFAULT_URI": "", "LIBVIRT_DEFAULT_URI": "fake:///b"}, "fake:///b"),
        ({}, "qemu:///system"),
    ],
)
def test_default_uri(
    environment: dict[str, str], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in virsh_connection.URI_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert virsh_connection.default_uri() == uri


def test_trace_is_handed_to_the_connection(tmp_path: pathlib.Path, run: Run) -> None:
    trace = tmp_path / "trace"
    assert run("--trace", str(trace), "list", "--name")[0] == 0
    assert trace.read_text() == "list_domains\nclosed\n"


def test_file_that_is_called_like_an_option(
    tmp_path: pathlib.Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--trace=-q", "uri") == (0, "fake:///two\n", "")
    assert (tmp_path / "-q").read_text() == "closed\n"


def test_trace_to_stderr(run: Run) -> None:
    assert run("--trace=-", "uri") == (0, "fake:///two\n", "closed\n")


def test_log_goes_to_the_end_of_a_file(tmp_path: pathlib.Path) -> None:
    """And keeps no warning from who looks at standard error."""
    recorded = pathlib.Path(virtbackup.__file__).with_name("recordings") / "qemu-7.2.22.jsonl"
    (tmp_path / "own.jsonl").symlink_to(recorded)
    fault = {"command": "job-dismiss", "error": {"class": "GenericError", "desc": "no"}}
    (tmp_path / "faults.json").write_text(json.dumps([fault]))
    log = tmp_path / "log"
    line = f"backup-start-as 1 --unix {tmp_path}/nbd.sock; backup-stop 1"
    for _ in range(2):
        status, out, err = _process("--log", str(log), line, uri=f"test://{tmp_path}")
        assert (status, out) == (0, "Domain backup started\nDomain backup stopped\n")
        assert re.match("warning: backup [0-9a-f]+ is not all out of QEMU", err)
    told = "is not all out of QEMU"
    assert _process("--debug", "4", line, uri=f"test://{tmp_path}")[2].count(told) == 1
    lines = log.read_text().splitlines()
    assert sum(told in line for line in lines) == 2
    assert lines
    assert len({line.split()[2] for line in lines}) == 2  # two processes
    assert " DEBUG virtbackup." in lines[0]
    status, out, err = _process("-l", "/nowhere/x", "echo")
    assert (status, out) == (1, "")
    assert err == "error: Failed to open file '/nowhere/x': No such file or directory\n"


def test_where_to_go_without_a_libvirtd(tmp_path: pathlib.Path) -> None:
    """In libvirt's own words, and ours behind them."""
    socket = tmp_path / "libvirt-sock"
    assert _process("list", uri=f"qemu:///system?socket={socket}") == (
        1,
        "",
        f"error: failed to connect to the hypervisor: Failed to connect socket to '{socket}':"
        " No such file or directory\n"
        "Start the daemon that listens there (libvirtd, virtqemud, virtbackupd), or name another"
        " one: -c URI\n",
    )


def test_trace_that_cannot_be_written(run: Run) -> None:
    message = "error: Failed to open file '/nowhere/x': No such file or directory\n"
    assert run("--trace", "/nowhere/x", "echo") == (1, "", message)


@pytest.mark.parametrize("words", [["echo", "a"], ["help", "uri"], ["echo a; echo b"]])
def test_no_connection_where_none_is_needed(words: list[str], run: Run) -> None:
    assert run(*words, uri="nowhere:///x")[0] == 0


def test_connection_that_fails(run: Run) -> None:
    message = (
        "error: failed to connect to the hypervisor:"
        " no connection driver available for nowhere:///x\n"
        "A URI begins with qmp:///, qemu:///, test:///, virtbackup+unix:///, virtbackup+tls:// or"
        " virtbackup+tcp://\n"
    )
    assert run("list", uri="nowhere:///x") == (1, "", message)


def test_bug_is_one_line_unless_debugging(run: Run, xmlfile: str) -> None:
    status, out, err = run("backup-start", "vm1", xmlfile, uri="fake:///bug")
    assert (status, out) == (1, "")
    assert err == "error: internal error: RuntimeError: two; lines\n"
    status, out, err = run("-d", "0", "backup-start", "vm1", xmlfile, uri="fake:///bug")
    assert (status, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith("error: internal error: RuntimeError: two; lines\n")


# --- the commands ---------------------------------------------------------------------------------


def test_list(run: Run) -> None:
    assert run("list") == (
        0,
        " Id   Name    State\n"
        "-----------------------\n"
        " 1    vm1     running\n"
        " 2    7       running\n"
        " 3    my vm   running\n",
        "",
    )
    assert run("-q", "list") == (
        0,
        " 1   vm1     running\n 2   7       running\n 3   my vm   running\n",
        "",
    )


def test_relative_path_is_told_as_it_was_typed(run: Run) -> None:
    assert run("-q", "backup-start-as", "vm1", "--unix", "x.sock") == (
        2, "", "error: invalid --unix 'x.sock': expected an absolute path\n",
    )  # fmt: skip
    assert run("-q", "backup-start-as", "vm1", "--unix", "/x", "--disk", "vda,source=x") == (
        2, "", "error: invalid --disk 'vda,source=x': source is not an absolute path\n",
    )  # fmt: skip


def test_group_in_place_of_a_command(run: Run) -> None:
    assert run("backup") == (
        2, "",
        "error: unknown command: 'backup'\n'help backup' shows the commands of that group\n",
    )  # fmt: skip


def test_list_all_in_every_form(run: Run) -> None:
    assert run("list", "--all")[1].endswith("running\n -    off     shut off\n")
    assert run("list", "--inactive", "--name") == (0, "off\n", "")
    assert run("list", "--all", "--name") == (0, "vm1\n7\nmy vm\noff\n", "")
    uuids = "".join(shell_driver.UUID.format(number) + "\n" for number in (4, 2, 3))
    assert run("list", "--uuid") == (0, uuids, "")
    facts = json.loads(run("list", "--all", "--json")[1])
    assert facts[0] == {
        "id": 1, "name": "vm1", "uuid": shell_driver.UUID.format(4), "state": "running",
    }  # fmt: skip
    assert facts[-1] == {
        "id": None, "name": "off", "uuid": shell_driver.UUID.format(1), "state": "shut off",
    }  # fmt: skip


def test_list_of_several_things(run: Run) -> None:
    """In virsh's order, whatever theirs is."""
    first, last = shell_driver.UUID.format(4), shell_driver.UUID.format(1)
    assert run("list", "--name", "--uuid")[1].startswith(f"{first} vm1\n")
    assert run("list", "--name", "--id") == (0, "1 vm1\n2 7\n3 my vm\n", "")
    assert run("list", "--id", "--name", "--uuid")[1].startswith(f"{first} 1 vm1\n")
    assert run("list", "--inactive", "--id", "--uuid") == (0, f"{last} -\n", "")
    for form in ("--name", "--uuid", "--id"):
        assert run("list", "--json", form)[0] == run("list", form, "--table")[0] == 2


def test_list_of_some_states(run: Run) -> None:
    assert run("list", "--state-running", "--id") == (0, "1\n2\n3\n", "")
    assert run("list", "--state-shutoff", "--name") == (0, "off\n", "")
    assert run("list", "--state-shutoff", "--state-running", "--name")[1].endswith("vm\noff\n")
    assert run("list", "--state-paused", "--state-other", "--name") == (0, "", "")
    assert run("list", "--table") == run("list")
    assert run("list", "--state-running", "--inactive") == run(
        "list", "--inactive", "--state-paused"
    )
    assert run("list", "--state-shutoff", "--inactive", "--name") == (0, "off\n", "")


def test_list_of_one_that_is_gone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a transient domain of whose backup something is left."""
    state = shell_driver.Driver.domain_get_state

    def gone(driver: shell_driver.Driver, ref: hypervisor.DomainRef) -> tuple[int, int]:
        if ref.id is None:
            raise errors.error(libvirt.VIR_ERR_NO_DOMAIN, f"no domain with uuid '{ref.uuid}'")
        return state(driver, ref)

    monkeypatch.setattr(shell_driver.Driver, "domain_get_state", gone)
    assert run("list", "--all")[1].endswith("running\n -    off     no state\n")
    assert json.loads(run("list", "--all", "--json")[1])[-1]["state"] == "no state"
    assert run("list", "--state-other", "--name") == (0, "off\n", "")
    assert run("domstate", "off")[0] == 1


def test_list_by_branches_is_of_those_that_run(run: Run) -> None:
    assert run("list", "--all", "--with-checkpoint", "--id") == (0, "1\n2\n3\n", "")
    assert run("list", "--all", "--without-checkpoint", "--name") == (0, "", "")
    assert run("list", "--without-checkpoint", "--name", uri="fake:///bad")[1].startswith("vm1\n")


def test_list_of_ids_is_of_those_that_run(run: Run) -> None:
    assert run("list", "--all", "--id") == (0, "1\n2\n3\n", "")


def test_list_of_titles(run: Run) -> None:
    assert run("list", "--inactive", "--title")[1] == (
        " Id   Name   State      Title\n"
        "----------------------------------\n"
        " -    off    shut off   Off duty\n"
    )
    titles = [one["title"] for one in json.loads(run("list", "--all", "--title", "--json")[1])]
    assert titles == [None, None, None, "Off duty"]


@pytest.mark.parametrize("option", ["persistent", "no-autostart", "with-managed-save"])
def test_list_by_what_the_driver_cannot_tell(option: str, run: Run) -> None:
    status, out, err = run("list", f"--{option}")
    assert (status, out) == (1, "")
    assert err.startswith("error: this function is not supported by the connection driver: virDom")
    assert run("list", "--managed-save") == run("list")


def test_what_a_domain_is_called(run: Run) -> None:
    uuid = shell_driver.UUID.format(4)
    assert run("domid", "vm1") == (0, "1\n", "")
    assert run("domid", "off") == (0, "-\n", "")
    assert run("domname", uuid) == (0, "vm1\n", "")
    assert run("domuuid", "1") == (0, f"{uuid}\n", "")
    assert run("domstate", "off") == (0, "shut off\n", "")
    assert run("domstate", "vm1", "--reason") == (0, "running (unknown)\n", "")
    told = json.loads(run("domstate", "off", "--reason", "--json")[1])
    assert told == {"domain": "off", "state": "shut off", "reason": "unknown"}
    assert domain_conf.DomainDef.parse(run("dumpxml", "vm1")[1]).name == "vm1"


def test_a_name_that_is_another_one_s_id(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id comes first, but where it is what is asked for."""
    named, other = (shell_driver.UUID.format(number) for number in (1, 2))
    domains = hypervisor.DomainRef("2", named, 7), hypervisor.DomainRef("vm", other, 2)
    monkeypatch.setattr(shell_driver, "DOMAINS", domains)
    assert run("domid", "2") == (0, "7\n", "")
    assert run("domuuid", "2") == (0, f"{other}\n", "")
    assert run("domid", "7") == (0, "7\n", "")


def test_dominfo(run: Run) -> None:
    uuid = shell_driver.UUID.format(4)
    out = (
        f"Id:             1\nName:           vm1\nUUID:           {uuid}\nState:          running\n"
    )
    assert run("dominfo", "vm1") == (0, out, "")
    assert run("dominfo", "--domain", "1") == (0, out, "")
    assert run("dominfo", f"--domain={uuid.upper()}") == (0, out, "")
    assert json.loads(run("dominfo", "off", "--json")[1])["id"] is None


@pytest.mark.parametrize(
    ("given", "name"), [("1", "vm1"), ("7", "7"), ("2", "7"), ("my vm", "my vm"), ("off", "off")]
)
def test_domain_is_an_id_then_a_uuid_then_a_name(given: str, name: str, run: Run) -> None:
    assert json.loads(run("dominfo", given, "--json")[1])["name"] == name


@pytest.mark.parametrize("given", ["nope", "99", "00000000-0000-0000-0000-000000000000", "--x"])
def test_no_such_domain(given: str, run: Run) -> None:
    message = f"error: failed to get domain '{given}'\n"
    assert run("dominfo", "--domain", given) == (1, "", message + SHOWS)
    assert run("-q", "dominfo", "--domain", given) == (1, "", message)


def test_domblklist(run: Run) -> None:
    assert run("domblklist", "vm1") == (
        0,
        " Target   Source\n"
        "---------------------------\n"
        " vda      /images/a.qcow2\n"
        " sdb      /dev/b\n"
        " sr0      -\n",
        "",
    )
    assert run("domblklist", "vm1", "--details")[1].splitlines()[2:] == [
        " file    disk     vda      /images/a.qcow2",
        " block   disk     sdb      /dev/b",
        " file    cdrom    sr0      -",
    ]
    facts = json.loads(run("domblklist", "vm1", "--json")[1])
    assert facts[0] == {
        "type": "file", "device": "disk", "target": "vda", "source": "/images/a.qcow2",
        "format": "qcow2", "readonly": False, "capacity": 64 << 20,
    }  # fmt: skip
    assert facts[2]["source"] is None


def test_host_commands(run: Run) -> None:
    assert run("uri") == (0, "fake:///two\n", "")
    assert run("hostname") == (0, os.uname().nodename + "\n", "")
    lines = run("version")[1].splitlines()
    assert lines[0] == "Using library: virtbackup 0.1.0"
    assert lines[2:] == ["Using API: FAKE 0.1.0", "Running hypervisor: FAKE 1.2.3"]
    status, _, err = run("version", "--daemon")
    missing = "this function is not supported by the connection driver: virConnectGetLibVersion"
    assert (status, err) == (1, f"error: {missing}\n")


def test_echo_splits_at_commas(run: Run) -> None:
    assert run("echo", "--split", "a,b,,c", "d", ",") == (0, "a\nb,c\nd\n\n\n", "")


def test_pwd_and_cd(run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert run("pwd") == (0, "/\n", "")
    assert run(f"cd {tmp_path}; pwd") == (0, f"{tmp_path}\n", "")


def test_connect_elsewhere(run: Run) -> None:
    status, out, err = run("connect fake:///b; uri; connect nowhere:///; uri; connect; uri")
    assert (status, out) == (1, "fake:///b\nfake:///b\nfake:///b\n")
    assert err.count("error: ") == 1


def test_connect_readonly_and_back(run: Run, xmlfile: str) -> None:
    start = f"backup-start vm1 {xmlfile}"
    status, _, err = run("-r", start)
    message = (
        "error: operation forbidden: read only access prevents virDomainBackupStart\n"
        "Leave out -r, or 'connect' anew without --readonly\n"
    )
    assert (status, err) == (1, message)
    assert run(f"connect --readonly; {start}")[2] == message
    assert run("-r", f"connect; {start}")[0] == 0


def test_lost_connection(run: Run) -> None:
    status, out, err = run("list --name; list; connect; list --name", uri="fake:///dies")
    assert (status, out) == (1, "vm1\n7\nmy vm\n" * 2)
    assert err == "error: connection to fake:///dies is lost\n'connect' opens it again\n"


def test_start_and_stop(run: Run, xmlfile: str) -> None:
    assert run(f"backup-start vm1 {xmlfile}; backup-stop vm1") == (
        0,
        "Domain backup started\nDomain backup stopped\n",
        "flags=0\n",
    )
    assert run("-q", f"backup-start --quiesce vm1 {xmlfile}; backup-stop vm1") == (
        0,
        "",
        "flags=1\n",
    )


def test_start_twice(run: Run, xmlfile: str) -> None:
    status, out, err = run(f"backup-start vm1 {xmlfile}; backup-start vm1 {xmlfile}")
    assert (status, out) == (1, "Domain backup started\n")
    assert err.endswith("\nerror: Requested operation is not valid: already running\n")


def test_start_from_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(BACKUP.encode())))
    status, out, _ = run("backup-start vm1 -; backup-dumpxml vm1")
    assert status == 0
    started, document = out.split("\n", 1)
    assert started == "Domain backup started"
    assert backup_conf.BackupDef.parse(document) == backup_conf.BackupDef.parse(BACKUP)


def test_start_from_no_file(run: Run) -> None:
    message = "error: Failed to open file '/nowhere': No such file or directory\n"
    assert run("backup-start", "vm1", "/nowhere") == (1, "", message)


def test_start_from_no_text(run: Run, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xff")
    message = f"error: file '{path}' is not UTF-8 text\n"
    assert run("backup-start", "vm1", str(path)) == (1, "", message)


def test_pull_tells_a_program_of_every_failure(run: Run, tmp_path: pathlib.Path) -> None:
    """Also of one that is not worded by us: the driver of libvirt's hosts hands some on."""
    made = tmp_path / "made"
    status, out, err = run("backup-pull", "vm1", str(made), "--json", uri="fake:///theirs")
    assert (status, err) == (1, "error: said by libvirt itself\n")
    assert json.loads(out) == {
        "event": "failed", "code": None, "error": "said by libvirt itself", "left": [],
    }  # fmt: skip
    assert not made.exists()


# --- translate ------------------------------------------------------------------------------------

LISTS_A_DISK = """<domainbackup mode="pull">
  <server transport="unix" socket="/run/x.sock"/>
  <disks>
    <disk name="vda"/>
  </disks>
</domainbackup>
"""


def test_translate_needs_no_connection(run: Run, xmlfile: str) -> None:
    assert run("translate", xmlfile, "--to", "native", uri="nowhere:///") == (
        0,
        '<domainbackup mode="pull">\n  <server transport="unix" socket="/run/x.sock"/>\n'
        "</domainbackup>\n",
        "",
    )


def test_translate_of_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    document = b"<domainbackup mode='pull'><server name='h' port='10809'/></domainbackup>"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(document)))
    status, out, err = run("-q", "translate", "-", "--to=proposal", uri="nowhere:///")
    assert (status, err) == (0, "")
    address = backup_conf.IpAddress("h", 10809)
    assert backup_conf.BackupDef.parse(out) == backup_conf.BackupDef(address)


def test_translate_asks_the_domain_for_its_disks(run: Run, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "native.xml"
    path.write_text(LISTS_A_DISK)
    status, out, err = run("translate", str(path), "--to", "proposal", "--domain", "vm1")
    assert (status, err) == (0, "")
    disks = backup_conf.BackupDef.parse(out).disks
    assert [(disk.name, disk.present) for disk in disks] == [
        ("vda", True),
        ("sdb", False),
        ("sr0", False),
    ]
    path.write_text(out)
    status, out, err = run("translate", str(path), "--to", "native", "--domain", "1")
    assert (status, err) == (0, "")
    assert '<disk name="vda" backup="yes" type="file"/>' in out


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (
            LISTS_A_DISK,
            [],
            "unsupported configuration: the disks of the domain must be known for a translation:"
            " of disks that are not listed, the proposal includes all, libvirt none"
            " (line 3, element <disks>)",
        ),
        (LISTS_A_DISK, ["--domain", "nobody"], "failed to get domain 'nobody'"),
        (
            LISTS_A_DISK.replace("vda", "sr0"),
            ["--domain", "vm1"],
            "unsupported configuration: disk 'sr0' has no media",
        ),
        (
            "<domainbackup mode='push'/>",
            [],
            "unsupported configuration: mode='push' cannot be said in the proposal: it pulls only"
            " (line 1, element <domainbackup>)",
        ),
        ("<domain/>", [], "XML error: unexpected root element <domain>, expecting <domainbackup>"
         " (line 1, element <domain>)"),
        ("", [], "XML error: Document is empty, line 1, column 1"),
    ],
)  # fmt: skip
def test_translate_refuses(
    text: str, words: list[str], message: str, run: Run, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "document.xml"
    path.write_text(text)
    expected = (1, "", f"error: {message}\n")
    assert run("-q", "translate", str(path), "--to", "proposal", *words) == expected


def test_translate_no_file(run: Run) -> None:
    message = "error: Failed to open file '/nowhere': No such file or directory\n"
    assert run("translate", "/nowhere", "--to", "native") == (1, "", message)


def test_translate_over_a_connection_that_fails(run: Run, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "native.xml"
    path.write_text(LISTS_A_DISK)
    words = ("translate", str(path), "--to", "proposal", "--domain", "vm1")
    status, out, err = run(*words, uri="nowhere:///")
    assert (status, out) == (1, "")
    assert err.startswith("error: failed to connect to the hypervisor: ")


# --- the end --------------------------------------------------------------------------------------


def test_stop_without_backup(run: Run) -> None:
    message = "error: Domain backup job id not found: no domain backup job present\n"
    hint = (
        "'backup-start' begins one; another user's is that user's to see and to stop, and libvirt's"
        " own is virsh's: domjobinfo\n"
    )
    assert run("backup-stop", "vm1") == (1, "", message + hint)
    assert run("-q", "backup-stop", "vm1") == (1, "", message)


def test_stop_tells_every_bad_disk(run: Run, xmlfile: str) -> None:
    status, out, err = run(f"-q backup-start vm1 {xmlfile}; backup-stop vm1", uri="fake:///bad")
    assert status == 2  # -q is the program's, not a command's
    status, out, err = run(f"backup-start vm1 {xmlfile}; backup-stop vm1", uri="fake:///bad")
    assert (status, out) == (1, "Domain backup started\n")
    reasons = shell_driver.FAILED.replace("\n", "; ")
    warning = "warning: disk 'vda': does not; fit\n"
    hint = "It has ended: throw away what was read of it, see to the reason, and take another one\n"
    assert err == f"flags=0\n{warning}error: operation failed: {reasons}\n{hint}"


def test_cancel_asks_for_no_verdict(run: Run, xmlfile: str) -> None:
    line = f"backup-start vm1 {xmlfile}; backup-stop vm1 --cancel"
    assert run(line, uri="fake:///bad")[0] == 0


@pytest.fixture
def _utc() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("_utc")
def test_info(run: Run, xmlfile: str) -> None:
    status, out, err = run(f"backup-start vm1 {xmlfile}; backup-info vm1", uri="fake:///bad")
    assert status == 0
    assert err.count("warning: disk 'vda': does not; fit\n") == 2
    assert out == (
        "Domain backup started\n"
        "State:          failed\n"
        "Started:        2023-11-14 22:13:20 +0000\n"
        "Engine:         hybrid\n"
        "Scratch fails:  the guest's write fails, or the guest is paused until the backup is"
        " stopped\n"
        "Scratch hangs:  the guest's writes hang with it: this QEMU has no time limit for it\n"
        "Guest saved:    the save fails, as a migration does: as QEMU has it\n"
        "Address:        nbd+unix:///vda?socket=/run/x.sock\n"
        "                nbd+unix:///s%2Fb?socket=/run/x.sock\n"
        "\n"
        " Disk   Export   State     Capacity    Scratch used   Dirty    Reason\n"
        "------------------------------------------------------------------------------\n"
        " vda    vda      failed    64.00 MiB   192.00 KiB     1000 B   No space left\n"
        " sdb    s/b      running   1.00 TiB    -              -        -\n"
    )


def test_info_as_json(run: Run, xmlfile: str) -> None:
    out = run("-q", f"backup-start vm1 {xmlfile}; backup-info vm1 --json", uri="fake:///bad")[1]
    assert json.loads(out) == {
        "domain": "vm1",
        "id": None,
        "branch": None,
        "state": "failed",
        "started": 1700000000.5,
        "address": {"type": "unix", "path": "/run/x.sock", "tls": False},
        "engine": "hybrid",
        "scratch_failure": "guest",
        "scratch_timeout": None,
        "save_failure": "save",
        "save_reason": "as QEMU has it",
        "disks": [
            {
                "name": "vda",
                "export": "vda",
                "uri": "nbd+unix:///vda?socket=/run/x.sock",
                "state": "failed",
                "reason": "No space\nleft",
                "type": "full",
                "type_reason": None,
                "since": None,
                "capacity": 64 << 20,
                "scratch_used": 196608,
                "dirty": 1000,
                "scratch_worst_case": 65 << 20,
                "scratch_free": 1 << 20,
                "scratch_hangs": False,
                "warning": "does not\nfit",
            },
            {
                "name": "sdb",
                "export": "s/b",
                "uri": "nbd+unix:///s%2Fb?socket=/run/x.sock",
                "state": "running",
                "reason": None,
                "type": "full",
                "type_reason": None,
                "since": None,
                "capacity": 1 << 40,
                "scratch_used": None,
                "dirty": None,
                "scratch_worst_case": None,
                "scratch_free": None,
                "scratch_hangs": False,
                "warning": None,
            },
        ],
    }


@pytest.mark.parametrize("quiet", [False, True])
def test_pull_tells_of_a_scratch_place_that_is_too_small(
    run: Run, tmp_path: pathlib.Path, quiet: bool
) -> None:
    """As a start does. There is no server here to pull from."""
    argv = [*(["-q"] if quiet else []), "backup-pull", "vm1", str(tmp_path / "made")]
    status, _, err = run(*argv, uri="fake:///bad")
    assert (status, "warning: disk 'vda': does not; fit\n" in err) == (1, not quiet)


def test_start_as_json_tells_what_runs(run: Run, xmlfile: str) -> None:
    told = run(f"backup-start vm1 {xmlfile}; backup-info vm1", uri="fake:///bad")[1]
    assert told.startswith("Domain backup started\n")
    for start in (
        f"backup-start vm1 {xmlfile} --json",
        "backup-start-as vm1 --unix /run/x.sock --json",
    ):
        status, out, err = run(f"{start}; backup-stop vm1 --cancel", uri="fake:///bad")
        assert status == 0
        assert err == "flags=0\nwarning: disk 'vda': does not; fit\n"
        started = out.removesuffix("Domain backup stopped\n")
        shown = run(f"{start}; backup-info vm1 --json", uri="fake:///bad")[1]
        assert shown == started * 2
        assert json.loads(started)["disks"][0]["uri"] == "nbd+unix:///vda?socket=/run/x.sock"


def test_start_as_json_of_a_backup_that_tells_nothing(run: Run, xmlfile: str) -> None:
    """It runs, so there is no error."""
    status, out, _ = run("backup-start", "vm1", xmlfile, "--json", uri="fake:///mute")
    assert (status, json.loads(out)) == (0, {"domain": "vm1"})


@pytest.mark.parametrize(
    ("trouble", "words", "status", "good"),
    [("two", "", 0, True), ("bad", "", 1, False), ("bad", "--cancel", 0, None)],
)
def test_stop_as_json(
    trouble: str, words: str, status: int, good: bool | None, run: Run, xmlfile: str
) -> None:
    line = f"backup-start vm1 {xmlfile}; backup-stop vm1 --json {words}"
    done, out, err = run(line, uri=f"fake:///{trouble}")
    assert (done, "error: operation failed: " in err) == (status, good is False)
    reason = None if good is not False else f"operation failed: {shell_driver.FAILED}"
    assert json.loads(out.removeprefix("Domain backup started\n")) == {
        "domain": "vm1", "cancelled": bool(words), "good": good, "reason": reason,
    }  # fmt: skip


def test_stop_of_nothing_as_json_has_no_verdict(run: Run) -> None:
    status, out, err = run("backup-stop", "vm1", "--json")
    assert (status, out) == (1, "")
    assert err.startswith("error: Domain backup job id not found")


def test_branches_come_and_go(run: Run) -> None:
    assert run("branch-create", "vm1", "weekly") == (0, "Branch weekly created\n", "")
    assert run("branch-delete", "vm1", "nightly") == (0, "Branch nightly deleted\n", "")
    assert run("-q", "branch-delete", "vm1", "nightly") == (0, "", "")
    created = json.loads(run("branch-create", "vm1", "weekly", "--json")[1])
    assert created == {"domain": "vm1", "created": "weekly"}
    deleted = json.loads(run("branch-delete", "vm1", "nightly", "--json")[1])
    assert deleted == {"domain": "vm1", "deleted": "nightly"}
    assert run("branch-delete", "vm1", "none", "--json") == (
        1,
        "",
        "error: Domain checkpoint not found: no branch named 'none'\n"
        "'branch-list' shows the branches\n",
    )


def test_cleanup_as_json(run: Run) -> None:
    facts = json.loads(run("backup-cleanup", "vm1", "--json", uri="fake:///bad")[1])
    assert facts == {"domain": "vm1", "removed": ["node scratch-vda", "file /images/x"]}
    assert json.loads(run("backup-cleanup", "vm1", "--json")[1])["removed"] == []


def test_version_as_json(run: Run) -> None:
    facts = json.loads(run("version", "--json")[1])
    assert facts["hypervisor"] == {"type": "FAKE", "version": "1.2.3"}
    assert facts["virtbackup"] in run("version")[1]


def test_cleanup(run: Run) -> None:
    assert run("backup-cleanup", "vm1") == (0, "Nothing to clean up\n", "")
    assert run("backup-cleanup", "vm1", uri="fake:///bad") == (
        0,
        "node scratch-vda\nfile /images/x\n",
        "",
    )


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        (backup_conf.UnixAddress("/a b/?x"), "nbd+unix:///v%25?socket=/a%20b/%3Fx"),
        (backup_conf.UnixAddress("/a", tls=True), "nbds+unix:///v%25?socket=/a"),
        (backup_conf.IpAddress("h", 1, tls=True), "nbds://h:1/v%25"),
        (backup_conf.IpAddress("::1", 1), "nbd://[::1]:1/v%25"),
        (backup_conf.IpAddress("localhost", 65535), "nbd://localhost:65535/v%25"),
    ],
)
def test_nbd_uri(address: backup_conf.Address, uri: str) -> None:
    assert virsh_connection.nbd_uri(address, "v%") == uri


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (3 << 29, "1.50 GiB"),
        (1 << 63, "8.00 EiB"),
        (1 << 80, "1048576.00 EiB"),
    ],
)
def test_human_size(size: int | None, text: str) -> None:
    assert virsh_connection.human_size(size) == text


# --- backup-start-as ------------------------------------------------------------------------------


def _printed(run: Run, *words: str) -> backup_conf.BackupDef:
    status, out, err = run("backup-start-as", "vm1", *words, "--print-xml", uri="nowhere:///")
    assert (status, err) == (0, "")
    return backup_conf.BackupDef.parse(out)


def test_start_as_prints_the_document(run: Run) -> None:
    definition = _printed(
        run,
        "--unix=/run/a,b.sock",
        "--branch", "nightly",
        "--disk", "vda,source=/scratch/a,,b.qcow2,type=incremental,granularity=32KiB",
        "--disk=sdb,present=no",
        "--disk", "a,,b,present=yes,granularity=64k",
        "--disk", "c,granularity=65536",
    )  # fmt: skip
    assert definition.address == backup_conf.UnixAddress("/run/a,b.sock")
    assert definition.branch == "nightly"
    vda, sdb, comma, plain = definition.disks
    assert (vda.name, vda.present, vda.type, vda.granularity) == (
        "vda", None, "incremental", 32768,
    )  # fmt: skip
    assert vda.source is not None
    assert vda.source.file == "/scratch/a,b.qcow2"
    assert sdb == backup_conf.BackupDiskDef("sdb", present=False)
    assert comma == backup_conf.BackupDiskDef("a,b", present=True, granularity=65536)
    assert plain == backup_conf.BackupDiskDef("c", granularity=65536)


def test_start_as_on_a_port(run: Run) -> None:
    definition = _printed(run, "--host", "::1", "--port", "10809")
    assert definition == backup_conf.BackupDef(backup_conf.IpAddress("::1", 10809))


def test_start_as_on_a_port_that_is_free(run: Run) -> None:
    picked = backup_conf.BackupDef(backup_conf.IpAddress("h", None, True, True))
    assert _printed(run, "--host", "h", "--port", "0", "--tls") == picked
    assert _printed(run, "--host", "h", "--autoport", "--tls") == picked
    with_tls = backup_conf.BackupDef(backup_conf.UnixAddress("/a", tls=True))
    assert _printed(run, "--unix", "/a", "--tls") == with_tls


WARNING = (
    "warning: whoever reaches 0.0.0.0 can read the exports, which have no TLS: see tls= of"
    " <address>, and --insecure\n"
)
NO_SETTING = "warning: configuration file syntax error: %s:2: there is no setting 'x'\n"


@pytest.mark.parametrize(
    ("words", "conf", "warning"),
    [
        (["--host", "0.0.0.0", "--port", "1"], "", WARNING),
        (["--host", "0.0.0.0", "--port", "1"], "insecure = 0", WARNING),
        (["--host", "0.0.0.0", "--port", "1"], "insecure = yes", ""),
        (["--host", "0.0.0.0", "--port", "1"], "insecure = yes\nx = 1", f"{NO_SETTING}{WARNING}"),
        (["--host", "0.0.0.0", "--port", "1", "--insecure"], "", ""),
        (["--host", "0.0.0.0", "--port", "1", "--tls"], "", ""),
        (["--host", "h.example", "--port", "1"], "", WARNING.replace("0.0.0.0", "h.example")),
        (["--host", "::", "--autoport"], "", WARNING.replace("0.0.0.0", "::")),
        (["--host", "127.9.9.9", "--port", "1"], "", ""),
        (["--host", "::1", "--port", "1"], "", ""),
        (["--host", "LocalHost.", "--port", "1"], "", ""),
        (["--unix", "/a"], "", ""),
    ],
)
def test_who_may_read_without_tls(
    words: list[str],
    conf: str,
    warning: str,
    run: Run,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "virtbackup.conf"
    path.write_text(conf)
    monkeypatch.setenv("VIRTBACKUP_CONF", str(path))
    warning = warning.replace("%s", str(path))
    status, out, err = run("backup-start-as", "vm1", *words)
    assert (status, out, err) == (0, "Domain backup started\n", f"flags=0\n{warning}")
    logged = [r.getMessage() for r in caplog.records if r.name.startswith("virtbackup.tools")]
    assert "".join(f"warning: {text}\n" for text in logged) == warning


def test_start_as_starts(run: Run) -> None:
    status, out, err = run("backup-start-as vm1 --unix /a --quiesce; backup-dumpxml vm1")
    assert (status, err) == (0, "flags=1\n")
    assert '<address type="unix" path="/a"/>' in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "command 'backup-start-as' requires --unix, or --host and --port"),
        (["--host", "h"], "command 'backup-start-as' requires --unix, or --host and --port"),
        (["--unix", "/a", "--print-xml", "--json"],
         "Options --print-xml and --json are mutually exclusive"),
        (["--port", "1"], "command 'backup-start-as' requires --unix, or --host and --port"),
        (["--unix", "/a", "--host", "h"], "Options --unix and --host are mutually exclusive"),
        (["--unix", "/a", "--port", "1"], "Options --unix and --port are mutually exclusive"),
        (["--autoport"], "command 'backup-start-as' requires --unix, or --host and --port"),
        (["--unix", "/a", "--autoport"], "Options --unix and --autoport are mutually exclusive"),
        (["--host", "h", "--port", "1", "--autoport"],
         "Options --port and --autoport are mutually exclusive"),
        (["--unix", "/a", "--disk", "a,b"], "invalid --disk 'a,b': 'b' is not understood"),
        (["--unix", "/a", "--disk", "a,b=c"], "invalid --disk 'a,b=c': 'b=c' is not understood"),
        (["--unix", "/a", "--disk", "a,source="],
         "invalid --disk 'a,source=': 'source=' is not understood"),
        (["--unix", "/a", "--disk", "a,"], "invalid --disk 'a,': '' is not understood"),
        (["--unix", "/a", "--disk", ",source=/b"],
         "invalid --disk ',source=/b': the name is missing"),
        (["--unix", "/a", "--disk", "a,type=full,type=full"],
         "invalid --disk 'a,type=full,type=full': 'type=full' is not understood"),
        (["--unix", "/a", "--disk", "a,present=maybe"],
         "invalid --disk 'a,present=maybe': present is not yes or no"),
        (["--unix", "/a", "--disk", "a,type=half"],
         "invalid --disk 'a,type=half': type is not full or incremental or auto"),
        (["--unix", "/a", "--disk", "a,granularity=big"],
         "invalid --disk 'a,granularity=big': the size is malformed"),
    ],
)  # fmt: skip
def test_misuse_of_start_as(words: list[str], message: str, run: Run) -> None:
    expected = (2, "", f"error: {message}\n{_see_help('backup-start-as')}")
    assert run("backup-start-as", "vm1", *words) == expected


def test_start_as_refuses_what_the_document_may_not_say(run: Run) -> None:
    words = ["backup-start-as", "vm1", "--unix", "/a", "--disk", "a,granularity=3k", "--print-xml"]
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    assert "power of two" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "words"), [("backup-start-as", ("--unix", "/a")), ("backup-pull", ("{}",))]
)
def test_no_document_is_advised_to_who_has_written_none(
    command: str, words: tuple[str, ...], run: Run, tmp_path: pathlib.Path
) -> None:
    words = tuple(word.format(tmp_path / "made") for word in words)
    status, out, err = run(command, "vm1", *words, "--branch", "a/b")
    assert (status, out) == (1, "")
    assert err.endswith(f": expected a name without '/'\n'help {command}' shows what it takes\n")


# --- completion -----------------------------------------------------------------------------------


@pytest.fixture
def shell(run: Run) -> Iterator[virsh_connection.Shell]:
    """A shell on the fake driver (``run`` has registered it)."""
    run("echo")
    control = virsh_connection.Control(URI)
    yield vsh.Shell(virsh_backup.TABLE, control, virsh_connection.describe)
    control.close()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("backup-start ", ["7", "my\\ vm", "off", "vm1"]),
        ("dominfo --domain=v", ["--domain=vm1 "]),
        ("backup-start-as vm1 --disk ", ["sdb", "sr0", "vda"]),
        ("backup-start-as --disk=v", []),
        ("backup-start-as vm1 --disk=v", ["--disk=vda "]),
        ("backup-start-as vm1 --disk vda,p", ["vda,present="]),
        ("backup-start-as vm1 --disk vda,type=f", ["vda,type=full "]),
        ("backup-start-as vm1 --disk vda,present=no,source=/et", ["vda,present=no,source=/etc/"]),
        ("backup-start vm1 /et", ["/etc/"]),
        ("backup-start vm1 x --", ["--insecure", "--json", "--quiesce"]),
        ("translate /et", ["/etc/"]),
        ("translate x --to ", ["native", "proposal"]),
        ("translate x --domain v", ["vm1 "]),
        ("help backup-du", ["backup-dumpxml "]),
        ("help domi", ["domid", "dominfo"]),
        ("list --t", ["--table", "--title", "--transient"]),
        ("dumpxml --in", ["--inactive "]),
        ("version --d", ["--daemon "]),
    ],
)
def test_completion(line: str, words: list[str], shell: virsh_connection.Shell) -> None:
    assert vsh_readline.completions(shell, line)[1] == words


def test_completion_over_no_connection_raises_for_its_caller_to_hide(
    shell: virsh_connection.Shell,
) -> None:
    shell.control.uri = "nowhere:///"
    with pytest.raises(vsh.Failure):
        vsh_readline.completions(shell, "dominfo ")


# --- as a process ---------------------------------------------------------------------------------

PROGRAM = (sys.executable, shell_driver.__file__)


def _process(*argv: str, uri: str = URI, text: str | None = None) -> Output:
    done = subprocess.run(
        [*PROGRAM, "-c", uri, *argv], input=text, capture_output=True, text=True, timeout=DEADLINE
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("argv", "status", "out", "err"),
    [
        (("uri",), 0, "fake:///two\n", ""),
        (("dominfo", "x"), 1, "", f"error: failed to get domain 'x'\n{SHOWS}"),
        (
            ("dominfo",), 2, "",
            f"error: command 'dominfo' requires <domain> option\n{_see_help('dominfo')}",
        ),
        (("echo", "a#b", "#c", "d e", ";"), 0, "a#b #c d e ;\n", ""),
    ],
)  # fmt: skip
def test_exit_status(argv: tuple[str, ...], status: int, out: str, err: str) -> None:
    assert _process(*argv) == (status, out, err)


def test_second_signal_ends_a_command_at_once_and_closes_its_connection(
    tmp_path: pathlib.Path, xmlfile: str
) -> None:
    trace = tmp_path / "trace"
    argv = [*PROGRAM, "-c", "fake:///hang", "--trace", str(trace), "backup-start", "vm1", xmlfile]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hanging\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)  # twice the same may be once
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (143, b"", b"error: interrupted by SIGTERM\n")
    assert trace.read_text().endswith("closed\n")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_interrupted_start_gives_the_backup_up(xmlfile: str, options: tuple[str, ...]) -> None:
    """And does not say that it runs."""
    assert _process("backup-start", "vm1", xmlfile, *options, uri="fake:///interrupt") == (
        130, "", "flags=0\nstopped, flags=1\nerror: interrupted\n",
    )  # fmt: skip


def test_interrupted_start_tells_that_the_backup_still_runs(xmlfile: str) -> None:
    status, out, err = _process("backup-start", "vm1", xmlfile, uri="fake:///interrupt-lost")
    assert (status, out) == (130, "")
    flags, warning, error = err.splitlines()
    assert (flags, error) == ("flags=0", "error: interrupted")
    assert warning.startswith("warning: the backup of domain 'vm1' could not be ended: ")
    assert "not now" in warning


def test_change_that_fails_while_it_is_interrupted_tells_why() -> None:
    status, out, err = _process("branch-create vm1 nightly", uri="fake:///interrupt")
    assert (status, out) == (1, "")
    assert err.startswith("error: unsupported configuration: there is a branch 'nightly'\n")


@pytest.mark.parametrize("command", ["backup-cleanup vm1", "branch-create vm1 weekly"])
def test_interrupt_waits_for_the_end_of_a_change(command: str) -> None:
    status, _, err = _process(command, uri="fake:///interrupt")
    assert (status, err) == (130, "error: interrupted\n")


def test_interactive_shell_survives_an_interrupted_command() -> None:
    text = "backup-start-as vm1 --unix /x; echo not this\nuri\n"
    status, out, err = _process("-q", uri="fake:///interrupt", text=text)
    assert (status, err) == (0, "flags=0\nstopped, flags=1\nerror: interrupted\n")
    assert "not this" not in out
    assert "fake:///interrupt" in out


def test_nobody_reads_the_output() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        argv = [*PROGRAM, "-c", URI, "list"]
        done = subprocess.run(argv, stdout=pipe, stderr=subprocess.PIPE, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("words", ["echo a", "", "backup-start vm1 -"])
def test_streams_that_are_closed(words: str) -> None:
    command = " ".join(map(vsh.quote, [*PROGRAM, "-c", URI, *([words] if words else [])]))
    done = subprocess.run(
        ["sh", "-c", f"exec {command} <&- >&-"], stderr=subprocess.PIPE, timeout=DEADLINE
    )
    assert b"internal error" not in done.stderr
    assert done.returncode == (1 if "-" in words else 0)


def test_output_does_not_fit() -> None:
    with pathlib.Path("/dev/full").open("w") as full:
        argv = [*PROGRAM, "-c", URI, "list"]
        done = subprocess.run(
            argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE
        )
    message = "error: cannot write output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_file_names_of_any_bytes(tmp_path: pathlib.Path) -> None:
    name = os.fsdecode(b"\xff.xml")
    (tmp_path / name).write_text(BACKUP)
    done = subprocess.run(
        [*PROGRAM, "-c", URI, f"backup-start vm1 '{tmp_path}/{name}'; echo {name}"],
        capture_output=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout) == (0, b"Domain backup started\n\xff.xml\n")


def test_lines_from_a_pipe() -> None:
    text = "echo a; echo b\nnope\nlist --name\n\n# x\ncd /\npwd\nquit\necho not here\n"
    status, out, err = _process("-q", text=text)
    assert (status, err) == (0, "error: unknown command: 'nope'\n")
    lines = [line.removeprefix("virtbackup # ") for line in out.splitlines()]
    assert "".join(lines).replace("virtbackup # ", "") == "abvm17my vm/"


def test_greeting_and_prompt(tmp_path: pathlib.Path) -> None:
    out = _process(text="")[1]
    assert out.startswith("Welcome to virsh-backup, ")
    assert out.endswith("\n\nvirtbackup # \n")
    assert _process("-q", "-r", text="")[1] == "virtbackup > \n"
    assert _process("-q", text="connect --readonly\n")[1] == "virtbackup # virtbackup > \n"


def test_readline_is_loaded_for_people_only() -> None:
    code = (
        "import sys; from virtbackup.tools import virsh_backup;"
        "virsh_backup.main(['help']); virsh_backup.main(['nope']);"
        "virsh_backup.main(['--complete', 'virsh-backup back']);"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE)
    *_, last, loaded = done.stdout.splitlines()
    assert (last.split("\t")[0], loaded) == ("backup-verify", "[]")


def test_completion_of_domains_loads_what_lists_them() -> None:
    seldom = HEAVY - {"libvirt", "lxml", "json"} | {
        "virtbackup.nbd", "virtbackup.tools.pull", "virtbackup.tools.chain",
    }  # fmt: skip
    code = (
        "import sys; from virtbackup.tools import virsh_backup, virsh_complete;"
        "virsh_complete.TIMEOUT = 60;"  # whatever else the machine does
        "virsh_backup.main(['--complete', 'virsh-backup -c test:///default dominfo ']);"
        f"print(sorted({seldom!r} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout.splitlines() == ["values", "vm", "[]"]


def test_a_plain_pull_loads_nothing_that_few_need(tmp_path: pathlib.Path) -> None:
    seldom = [
        "conf.native_conf", "conf.translate", "conf.virtbackup_conf", "nbd.device", "nbd.image",
        "nbd.writer", "tools.devices",
    ]  # fmt: skip
    argv = ["-c", "test:///default", "-q", "backup-pull", "vm", str(tmp_path), "--format", "raw"]
    code = (
        "import sys; from virtbackup.tools import virsh_backup;"
        f"assert virsh_backup.main({argv!r}) == 0;"
        f"print([name for name in {seldom!r} if 'virtbackup.' + name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=DEADLINE)
    assert (done.stderr, done.stdout) == (b"", b"[]\n")


# --- on a terminal --------------------------------------------------------------------------------


class Terminal(terminals.Terminal):
    """The shell."""

    def __init__(
        self,
        home: pathlib.Path,
        *argv: str,
        kind: str = "dumb",
        program: tuple[str, ...] = PROGRAM,
    ) -> None:
        own = {"TERM": kind, "XDG_CACHE_HOME": str(home / ".cache")}
        super().__init__([*program, *argv], home, own)

    def line(self, text: str) -> str:
        """Type a line and wait for the next prompt; what came between."""
        self.type(text + "\n")
        self.wait_for("\n")
        return self.wait_for("virtbackup # ")

    def wait_until_idle(self) -> None:
        """Until it waits for what is typed: an interrupt that comes just before that is only seen
        with the next key (Python's readline)."""
        status = pathlib.Path(f"/proc/{self.process.pid}/stat")
        waiting.until(lambda: status.read_text().rpartition(")")[2].split()[0] == "S")

    def close(self) -> int:
        """The exit status."""
        try:
            return self.process.wait(DEADLINE)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            os.close(self.master)


@contextlib.contextmanager
def _terminal(home: pathlib.Path, *argv: str, **more: Any) -> Iterator[Terminal]:
    terminal = Terminal(home, *argv, **more)
    try:
        yield terminal
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()


@pytest.fixture
def terminal(tmp_path: pathlib.Path) -> Iterator[Terminal]:
    with _terminal(tmp_path, "-c", URI) as terminal:
        assert "Welcome to virsh-backup" in terminal.wait_for("virtbackup # ")
        yield terminal


def test_session(terminal: Terminal, tmp_path: pathlib.Path) -> None:
    assert terminal.line("uri") == "fake:///two\n\nvirtbackup # "
    unknown = "error: unknown command: 'nope'\n'help' shows all commands\n"
    assert terminal.line("nope") == f"{unknown}virtbackup # "
    message = f"error: failed to get domain 'nope'\n{SHOWS}"
    assert terminal.line("dominfo nope") == f"{message}\nvirtbackup # "
    assert terminal.line("cd /; pwd") == "\n/\n\nvirtbackup # "
    assert terminal.line("cd") == "\nvirtbackup # "
    assert terminal.line("pwd") == f"{tmp_path}\n\nvirtbackup # "
    assert terminal.line("cd nope") == (
        "error: cd: nope: No such file or directory\n\nvirtbackup # "
    )
    terminal.type("quit\n")
    assert terminal.close() == 0


def test_tab_completes(terminal: Terminal) -> None:
    terminal.type("backup-du\t")
    terminal.wait_for("backup-dumpxml ")
    terminal.type("m\t")
    terminal.wait_for("my\\ vm ")
    terminal.type("\n")
    assert "no domain backup job present" in terminal.wait_for("virtbackup # ")
    terminal.type("dominfo 'm\t")
    terminal.wait_for("'my vm' ")
    terminal.type("\n")
    assert "Name:           my vm\n" in terminal.wait_for("virtbackup # ")
    terminal.type("dominfo my\\ v\t")
    terminal.wait_for("my\\ vm ")
    terminal.type("--js\t")
    terminal.wait_for("--json ")
    terminal.type("\n")
    assert '"name": "my vm"' in terminal.wait_for("virtbackup # ")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_tab_lists_what_there_is(terminal: Terminal) -> None:
    terminal.type("domin\t")
    terminal.wait_for("dominfo ")
    terminal.type("\t\t")
    listed = terminal.wait_for("virtbackup # ").replace("\a", "")
    assert listed.split() == ["7", "my\\", "vm", "off", "vm1", "virtbackup", "#"]
    terminal.type("7\n")
    assert "Name:           7\n" in terminal.wait_for("virtbackup # ")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_interrupt_drops_the_line_and_stays(terminal: Terminal) -> None:
    terminal.type("nope")
    terminal.wait_for("nope")
    terminal.wait_until_idle()
    terminal.type("\x03")
    terminal.wait_for("virtbackup # ")
    assert terminal.line("uri") == "fake:///two\n\nvirtbackup # "
    terminal.type("\x04")
    assert terminal.close() == 0


def test_lines_that_are_pasted_wait_for_enter(tmp_path: pathlib.Path) -> None:
    """The terminal is told to mark them, and no more once there is no line to paste into."""
    with _terminal(tmp_path, "-qc", URI, kind="xterm") as terminal:
        terminal.wait_for("\x1b[?2004hvirtbackup # ")
        terminal.type("\x1b[200~echo a\nuri\x1b[201~")
        assert URI not in terminal.wait_for("uri\x1b[27m")
        terminal.type("\n")
        terminal.wait_for(f"\x1b[?2004l\ra\n{URI}\n\x1b[?2004hvirtbackup # ")
        terminal.type("exit\n")
        terminal.wait_for("\x1b[?2004l")
        assert terminal.close() == 0


def test_a_line_goes_on_once_the_shell_does(tmp_path: pathlib.Path) -> None:
    """Ctrl-Z, and fg; the terminal is the other shell's meanwhile."""
    with _terminal(tmp_path, program=("bash", "--norc", "-i")) as terminal:
        terminal.type("PS1='$ '; bind 'set enable-bracketed-paste off'\n")
        terminal.wait_for("off'\n$ ")
        terminal.type(shlex.join([*PROGRAM, "-qc", URI]) + "\n")
        terminal.wait_for("virtbackup # ")
        terminal.type("echo before-")
        terminal.wait_for("before-")
        terminal.insist("\x1a", "Stopped")
        terminal.wait_for("$ ")
        terminal.type("fg\n")
        terminal.wait_for("virtbackup # echo before-")
        terminal.type("and-behind\n")
        terminal.wait_for("\nbefore-and-behind\nvirtbackup # ")
        terminal.type("exit\n")
        terminal.wait_for("$ ")
        terminal.type("exit\n")
        assert terminal.close() == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_history_is_kept_when_the_terminal_goes(
    tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    with _terminal(tmp_path) as terminal:
        terminal.wait_for("virtbackup # ")
        terminal.type("echo kept\n")
        terminal.wait_for("virtbackup # ")
        terminal.type("not yet")
        terminal.wait_for("not yet")
        terminal.wait_until_idle()
        terminal.process.send_signal(number)
        assert terminal.close() == 128 + number
    assert (tmp_path / ".cache/virtbackup/history").read_text() == "echo kept\n"


def test_interrupt_ends_the_command_and_stays(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b.xml").write_text(BACKUP)
    with _terminal(tmp_path, "-qc", "fake:///hang") as terminal:
        terminal.wait_for("virtbackup # ")
        terminal.type("backup-start vm1 b.xml\n")
        terminal.wait_for("hanging\n")
        terminal.insist("\x03", "error: interrupted\n")
        terminal.type("uri\n")
        terminal.wait_for("fake:///hang\nvirtbackup # ")
        terminal.type("exit\n")
        assert terminal.close() == 0


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"TERM": "xterm"}, "\x1b[1;31merror:\x1b[0m unknown command: 'nope'"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "error: unknown command: 'nope'"),
        ({"TERM": "dumb"}, "error: unknown command: 'nope'"),
    ],
)
def test_colours_are_for_terminals_that_have_them(settings: dict[str, str], shown: str) -> None:
    master, slave = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with os.fdopen(master, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            [*PROGRAM, "nope"], stdout=subprocess.PIPE, stderr=slave, env={**plain, **settings}
        )
        os.close(slave)
        assert process.communicate(timeout=DEADLINE)[0] == b""
        assert terminal.read(4096).decode().split("\r\n")[0] == shown


def test_no_colours_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert _process("nope")[2].startswith("error: unknown command: 'nope'\n")


def test_history_is_kept_and_private(terminal: Terminal, tmp_path: pathlib.Path) -> None:
    terminal.line("echo first")
    terminal.type("\x10")
    terminal.wait_for("echo first")
    terminal.type("\n")
    assert "first\n" in terminal.wait_for("virtbackup # ")
    terminal.type("\x04")
    assert terminal.close() == 0
    history = tmp_path / ".cache/virtbackup/history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "echo first" in history.read_text()
    with _terminal(tmp_path, "-c", URI) as again:
        again.wait_for("virtbackup # ")
        again.type("\x10")
        again.wait_for("echo first")
        again.type("\n\x04")
        assert again.close() == 0


def test_history_that_cannot_be_kept_disturbs_nobody(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".cache").write_text("not a directory")
    with _terminal(tmp_path, "-q", "-c", URI) as terminal:
        terminal.wait_for("virtbackup # ")
        assert terminal.line("echo a") == "a\nvirtbackup # "
        terminal.type("\x04")
        assert terminal.close() == 0


def test_a_copy_does_not_wait_for_who_reads_how_far_it_is(
    shell: virsh_connection.Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a program that reads only at the end, the pipe is full after some minutes: the copy stood
    still then, the guest's backup went on, and a signal did not end it."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb"), os.fdopen(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        lines = virsh_pull.Lines(shell)
        monkeypatch.setattr(lines, "EVERY", 0)
        lines.start(0, 1 << 40)
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"\n")
        os.set_blocking(writing, True)
        lines.advance(0, 1)
        os.read(reading, 1 << 20)
        lines.advance(0, 2)
        assert json.loads(os.read(reading, 1 << 20))["done"] == 3


def test_a_terminal_that_only_types_has_one_bar(
    shell: virsh_connection.Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the disks are below the first one, and the way up again is none of its."""
    screen = _Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    for term in ("xterm", "dumb"):
        monkeypatch.setenv("TERM", term)
        with virsh_pull.bar(shell) as bar:
            assert bar is not None
            bar.name(["vda", "vdb"])
            bar.start(0, 100)
            bar.advance(0, 100)
            assert ("\x1b" in screen.getvalue()) == (term == "xterm")
        screen.truncate(0)


class _Screen(io.StringIO):
    """A terminal, as far as what is written to it can tell."""

    def isatty(self) -> bool:
        return True


def test_a_warning_beside_bars_has_a_line_of_its_own(
    shell: virsh_connection.Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood behind the first bar, and the bars' ends were left on other lines than their own."""
    screen = _Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with virsh_pull.bar(shell) as bar:
        assert bar is not None
        bar.name(["vda", "vdb"])
        for index in range(2):
            bar.start(index, 100)
        shell.warn("something is left")
        warning, *bars = _lines_of(screen.getvalue())
        assert warning == "warning: something is left"
        assert [line.split(":")[0] for line in bars[1:3]] == ["vda", "vdb"]
    written = screen.getvalue()
    assert _lines_of(written)[:2] == ["warning: something is left", ""]
    shell.warn("all")
    assert _lines_of(screen.getvalue()[len(written) :]) == ["warning: all", ""]


def _lines_of(written: str) -> list[str]:
    """The lines of a terminal after WRITTEN, in which bars are cleared and drawn in any order."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\x1b\[[\d;]*m|[^\x1b]", written):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[A":
            row -= 1
            assert row >= 0
        elif not part.startswith("\x1b"):
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("command", [("list", "--name"), ("domname", "1")])
def test_a_name_leaves_the_terminal_alone_and_is_whole_for_programs(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    odd = shell_driver.ODD
    for stdout, shown in ((io.StringIO(), odd), (_Screen(), vsh.visible(odd))):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert shell_driver.main("-c", "fake:///odd", *command) == 0
        assert stdout.getvalue() == shown + "\n"
