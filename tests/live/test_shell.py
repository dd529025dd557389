# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program virsh-backup as people run it, on real QEMU; and read side by side with virsh."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests import conftest, terminals, waiting
from tests.live import machines, places, signalled
from virtbackup.conf import backup_conf
from virtbackup.tools import virsh_backup, virsh_connection, vsh

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

DEADLINE = waiting.DEADLINE
UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
PROGRAM = (sys.executable, "-m", "virtbackup.tools.virsh_backup")
VIRSH = ("virsh", "-c", "test:///default")

Output = tuple[int, str, str]
Run = Callable[..., Output]


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    with machines.two_disks(tmp_path, "-name", "my guest", "-uuid", UUID) as machine:
        yield machine


@pytest.fixture
def run(machine: machines.Machine) -> Run:
    """Run the program on the machine: exit status, output, errors."""

    def run_it(*argv: str, text: str | None = None) -> Output:
        done = subprocess.run(
            [*PROGRAM, "-c", machine.uri, *argv],
            input=text,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        return done.returncode, done.stdout, done.stderr

    return run_it


def _document(directory: pathlib.Path) -> str:
    return f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/></domainbackup>'


def test_whole_session(machine: machines.Machine, run: Run, tmp_path: pathlib.Path) -> None:
    before = machine.state()
    assert run("list", "--name") == (0, "my guest\n", "")
    assert json.loads(run("dominfo", UUID, "--json")[1])["name"] == "my guest"
    assert run("domblklist", "my guest")[1].splitlines()[2:] == [
        f" vda      {tmp_path}/a.qcow2",
        f" sdb      {tmp_path}/b.raw",
    ]
    xmlfile = tmp_path / "backup.xml"
    xmlfile.write_text(_document(tmp_path))
    assert run("backup-start", "my guest", str(xmlfile)) == (0, "Domain backup started\n", "")

    status, out, err = run("backup-info", "my guest", "--json")
    assert (status, err) == (0, "")
    info = json.loads(out)
    assert info["state"] == "running"
    assert [(disk["name"], disk["capacity"]) for disk in info["disks"]] == [
        ("vda", 64 << 20),
        ("sdb", 64 << 20),
    ]
    for disk in info["disks"]:
        # The address is one that clients take as it is.
        size = subprocess.run(
            ["nbdinfo", "--size", disk["uri"]], capture_output=True, timeout=DEADLINE, check=True
        )
        assert int(size.stdout) == 64 << 20
        assert disk["uri"] in run("backup-info", "my guest")[1]

    live = backup_conf.BackupDef.parse(run("backup-dumpxml", "my guest")[1])
    assert [(disk.name, disk.present, disk.exportname) for disk in live.disks] == [
        ("vda", True, "vda"),
        ("sdb", True, "sdb"),
    ]
    assert run("backup-start", "my guest", str(xmlfile)) == (
        1,
        "",
        "error: Requested operation is not valid: another backup job is already running\n"
        "'backup-info' shows it, 'backup-stop' ends it\n",
    )

    assert run("backup-stop", "my guest") == (0, "Domain backup stopped\n", "")
    status, out, err = run("backup-info", "my guest")
    assert (status, out) == (1, "")
    assert err.startswith("error: Domain backup job id not found")
    assert machine.state() == before


def test_paths_of_the_environment_are_those_of_the_start(
    machine: machines.Machine, tmp_path: pathlib.Path
) -> None:
    """Where the shell goes to meanwhile; what is typed is from where it is, as in virsh."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "x.xml").write_text(_document(tmp_path))
    (tmp_path / "conf").write_text("")
    paths = {"STATE_DIR": "state", "SCRATCH_DIR": "scratch", "CONF": "conf"}
    done = subprocess.run(
        [*PROGRAM, "-c", machine.uri],
        input="cd scratch\nbackup-start 1 ../x.xml\ncd /\nbackup-info 1\nbackup-stop 1\n",
        env={**os.environ, **{f"VIRTBACKUP_{name}": path for name, path in paths.items()}},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Domain backup stopped" in done.stdout
    assert (tmp_path / "state").is_dir()


def test_start_from_stdin_and_cancel(
    machine: machines.Machine, run: Run, tmp_path: pathlib.Path
) -> None:
    before = machine.state()
    status, out, err = run("backup-start", "1", "-", text=_document(tmp_path))
    assert (status, out, err) == (0, "Domain backup started\n", "")
    assert run("backup-stop", "1", "--cancel") == (0, "Domain backup stopped\n", "")
    assert machine.state() == before


def test_start_as(run: Run, tmp_path: pathlib.Path) -> None:
    socket = f"{tmp_path}/nbd,x.sock"
    words = ["--unix", socket, "--disk", f"vda,source={tmp_path}/s,,c.qcow2"]
    assert run("backup-start-as", "1", *words, "--disk=sdb,present=no") == (
        0,
        "Domain backup started\n",
        "",
    )
    live = backup_conf.BackupDef.parse(run("backup-dumpxml", "1")[1])
    assert live.address == backup_conf.UnixAddress(socket)
    vda, sdb = live.disks
    assert vda.source is not None
    assert vda.source.file == f"{tmp_path}/s,c.qcow2"
    assert sdb.present is False
    assert run("-q", "backup-stop", "1") == (0, "", "")


def test_trace_has_the_lines_of_the_monitor(run: Run, tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace"
    status, _, err = run("--trace", str(trace), "backup-start", "1", "-", text=_document(tmp_path))
    assert (status, err) == (0, "")
    lines = trace.read_text().splitlines()
    assert any('-> {"execute":"transaction"' in line for line in lines)
    assert any('<- {"return"' in line for line in lines)
    assert all(line[:2] == "20" for line in lines)
    assert '"execute"' in run("--trace=-", "backup-stop", "1")[2]


def test_refused_backup_leaves_nothing(
    machine: machines.Machine, run: Run, tmp_path: pathlib.Path
) -> None:
    before = machine.state()
    assert run("backup-start-as", "1", f"--unix={tmp_path}/s", "--disk", "nope") == (
        1,
        "",
        "error: unsupported configuration: no disk named 'nope'\n'domblklist' shows the disks\n",
    )
    assert machine.state() == before


def test_hypervisor_that_dies_is_one_line(
    machine: machines.Machine, tmp_path: pathlib.Path
) -> None:
    argv = [*PROGRAM, "-q", "-c", machine.uri]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write("list --name\n")
        shell.stdin.flush()
        assert shell.stdout.readline() == "virtbackup # my guest\n"
        machine.kill()
        _, err = shell.communicate("list --name\nconnect\nquit\n", timeout=DEADLINE)
    assert shell.returncode == 0
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
    assert lines[1].startswith("error: failed to connect to the hypervisor: ")


def test_connect_finds_the_hypervisor_again(
    machine: machines.Machine, run: Run, tmp_path: pathlib.Path
) -> None:
    assert run("list --name; connect; list --name; connect --readonly; list --name") == (
        0,
        "my guest\n" * 3,
        "",
    )


def test_interrupt_while_another_client_has_the_monitor(machine: machines.Machine) -> None:
    holder = machines.Probe(machine.qmp)
    try:
        with subprocess.Popen(
            [*PROGRAM, "-d0", "-c", machine.uri, "list"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            _wait_until_connected(process.pid)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out) == (130, b"")
        assert b"Traceback" not in err
    finally:
        holder.close()


def _wait_until_connected(pid: int) -> None:
    """Return once a process has a socket open, which it needs the monitor for."""
    waiting.until(lambda: any(name.startswith("socket:") for name in machines.opened(pid)))


# --- backup-pull ----------------------------------------------------------------------------------


def test_pull(machine: machines.Machine, run: Run, tmp_path: pathlib.Path) -> None:
    machine.io("vda", "write -P 7 1M 64k")
    before = machine.state()
    directory = tmp_path / "made" / "here"
    status, out, err = run("backup-pull", "1", str(directory))
    assert (status, err) == (0, "")
    vda, sdb, said = out.splitlines()
    assert vda.startswith(f"vda: {directory}/vda.qcow2 (64.00 MiB, ")
    assert sdb.startswith(f"sdb: {directory}/sdb.qcow2 (64.00 MiB, ")
    assert said == "Domain backup pulled"
    assert machine.state() == before
    # The guest's disk may not be looked at: QEMU holds its metadata back.
    image = str(directory / "vda.qcow2")
    subprocess.run(["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 1M 64k", image], check=True)
    assert run("backup-pull", "1", str(directory)) == (
        1,
        "",
        f"error: Requested operation is not valid: {directory}/manifest.json exists already\n"
        "Pull into another directory, or with --branch, by which backups follow one another in"
        " one\n",
    )


def test_pull_as_a_document_says_and_json(run: Run, tmp_path: pathlib.Path) -> None:
    document = _document(tmp_path).replace(
        "</domainbackup>", '<disks><disk name="sdb" present="no"/></disks></domainbackup>'
    )
    words = ["--xml", "-", "--format", "raw", "--json", "--domain", "1", str(tmp_path / "made")]
    status, out, err = run("backup-pull", *words, text=document)
    assert (status, err) == (0, "")
    *events, made = map(json.loads, out.splitlines())
    assert events[0]["event"] == "disk"
    assert events[-1]["event"] == "progress"
    assert events[-1]["done"] == events[-1]["total"] == events[0]["size"]
    assert made.pop("event") == "finished"
    assert [(disk["name"], disk["file"], disk["format"]) for disk in made["disks"]] == [
        ("vda", "vda.raw", "raw")
    ]
    assert json.loads((tmp_path / "made/manifest.json").read_text()) == made


def test_pull_compressed_checked_and_slowly(
    run: Run, machine: machines.Machine, tmp_path: pathlib.Path
) -> None:
    """Not faster than is asked for; QEMU says that it is compressed, and what is in it."""
    machine.io("vda", "write -P 7 1M 2M")
    begin = time.monotonic()
    words = ["--compress", "--check", "--bandwidth", "2MiB", "1", str(tmp_path / "made")]
    assert run("-q", "backup-pull", *words) == (0, "", "")
    assert time.monotonic() - begin > 0.8  # but for the first tenth of a second
    plain = tmp_path / "plain"
    assert run("-q", "backup-pull", "1", str(plain)) == (0, "", "")
    for disk in ("vda", "sdb"):
        image = tmp_path / "made" / f"{disk}.qcow2"
        told = json.loads(_output("qemu-img", "info", "--output=json", str(image)))
        assert told["format-specific"]["data"]["compression-type"] == "zstd"
        _output("qemu-img", "check", "-q", str(image))
        _output("qemu-img", "compare", str(image), str(plain / f"{disk}.qcow2"))
    sizes = [(path / "vda.qcow2").stat().st_blocks for path in (tmp_path / "made", plain)]
    assert sizes[0] < sizes[1] / 2


def _output(*argv: str) -> bytes:
    return subprocess.run(argv, check=True, capture_output=True).stdout


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--compress", "--format", "raw"], 1, "a raw image cannot be compressed"),
        (["--bandwidth", "fast"], 2, "'fast' for <--bandwidth> is no size"),
        (["--bandwidth", "0"], 2, "'0' for <--bandwidth> is no size"),
    ],
)
def test_pull_as_cannot_be(
    run: Run, tmp_path: pathlib.Path, words: list[str], status: int, text: str
) -> None:
    code, _, err = run("backup-pull", "1", str(tmp_path / "made"), *words)
    assert code == status
    assert text in err
    assert not (tmp_path / "made").exists()


def test_quiet_pull_says_nothing(run: Run, tmp_path: pathlib.Path) -> None:
    assert run("-q", "backup-pull", "1", str(tmp_path / "made")) == (0, "", "")


def test_pull_shows_its_progress_on_a_terminal(
    machine: machines.Machine, tmp_path: pathlib.Path
) -> None:
    argv = [*PROGRAM, "-c", machine.uri, "backup-pull", "1", str(tmp_path / "made")]
    shown, out = terminals.shown(argv, "stderr", os.environ | {"TERM": "xterm"})
    assert out.endswith(b"Domain backup pulled\n")
    assert b"128M" in shown
    for name in (b"vda", b"sdb"):  # a bar for each disk, below the one for both
        assert re.search(name + rb":[^\r\n]*64.0M", shown), shown
    assert b"error" not in shown


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "interrupted by SIGTERM"),
        (signal.SIGHUP, 129, "interrupted by SIGHUP"),
    ],
)
def test_interrupted_pull_leaves_nothing(
    number: signal.Signals,
    status: int,
    told: str,
    machine: machines.Machine,
    tmp_path: pathlib.Path,
) -> None:
    before = machine.state()
    directory = tmp_path / "made"
    argv = signalled.program(number, '"execute":"transaction"')
    argv += ["-c", machine.uri, "backup-pull", "1", str(directory)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"error: {told}\n")
    assert not directory.exists()
    assert machine.state() == before


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STEPS = ("block-export-del", "nbd-server-stop", "job-cancel", "blockdev-del")
SIGNALLED = [*itertools.product(STEPS, SIGNALS)]


@pytest.mark.parametrize(("command", "number"), SIGNALLED if conftest.long() else SIGNALLED[::4])
def test_signal_does_not_leave_a_stop_half_done(
    command: str,
    number: signal.Signals,
    run: Run,
    machine: machines.Machine,
    tmp_path: pathlib.Path,
) -> None:
    before = machine.state()
    assert run("backup-start-as", "1", "--unix", str(tmp_path / "nbd.sock"))[0] == 0
    argv = signalled.program(number, f'"execute":"{command}"')
    argv += ["-c", machine.uri, "backup-stop", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (128 + number, "Domain backup stopped\n")
    assert done.stderr.startswith("error: interrupted")
    assert machine.state() == before


# --- side by side with virsh ----------------------------------------------------------------------

WORDS = [
    "a b",
    "a'b c'd\"e f\"\\ g",
    '\'a\\b\' "a\\b" "a\\"b"',
    '"" x',
    "'' ''",
    "a#b # c",
    "# all",
    "a\n# x\necho b",
    "a \\\n b",
    "a\\\nb",
    '"a\\\nb"',
    "a;echo b",
    ";;echo 'c;d'",
    "\\; \\# \\' \\\" \\\\ \\n",
    "-- --shell",
    "a --shell 'b c'",
    "a=b --shell c",
    "-x - --",
    "--xml '<a b=\"c\">&'",
    "tab\there",
    "--shell ''",
    "--shell a=b a:b a@b a~b a*b 'a'\\''b'",
]


@pytest.mark.needs("virsh")
@pytest.mark.parametrize("words", WORDS)
def test_words_are_read_as_virsh_reads_them(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"echo {words}"
    theirs = subprocess.run([*VIRSH, line], stdin=subprocess.DEVNULL, capture_output=True)
    status = virsh_backup.main([line])
    assert (status, capsys.readouterr().out) == (theirs.returncode, theirs.stdout.decode())


MISUSES = [
    ["nope"],
    ["list", "--nope"],
    ["list", "--all=1"],
    ["list", "--all", "--all"],
    ["list", "-x"],
    ["list", "x"],
    ["list", "--all", "--", "x"],
    ["dominfo"],
    ["dominfo", "a", "b"],
    ["dominfo", "--domain"],
    ["dominfo", "--domain", "a", "b"],
    ["dominfo", ""],
    ["list", ";", "uri"],
    ['echo "a'],
    ["echo a\\"],
    ["help", "nope"],
    ["--nope"],
    ["-c"],
]


@pytest.mark.needs("virsh")
@pytest.mark.parametrize("argv", MISUSES)
def test_misuse_is_told_in_virshs_words(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = subprocess.run(
        [*VIRSH, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert theirs.returncode
    assert virsh_backup.main(argv)
    assert capsys.readouterr().err.split("\n")[0] == theirs.stderr.split("\n")[0]


@pytest.mark.needs("virsh")
def test_tables_look_as_virshs() -> None:
    """virsh's own tables, made again by ours from their cells."""
    for line in ("list --all", "domblklist test", "domblklist test --details"):
        done = subprocess.run([*VIRSH, line], capture_output=True, text=True, check=True)
        lines = done.stdout.rstrip("\n").split("\n")
        cells = [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in lines]
        assert vsh.table_lines(cells[0], cells[2:]) == lines
        quiet = subprocess.run([*VIRSH, "-q", line], capture_output=True, text=True, check=True)
        assert vsh.table_lines(None, cells[2:]) == quiet.stdout.rstrip("\n").split("\n")


@pytest.mark.needs("virsh")
def test_what_virsh_has_is_where_and_what_it_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of ours that virsh has, too: the same words of help, and no option that means
    something else."""
    usage = subprocess.run(["virsh", "help"], capture_output=True, text=True, check=True).stdout
    theirs = dict(re.findall(r"^    (\S+) +(\S.*)$", usage, re.MULTILINE))
    assert set(virsh_backup.VIRSHS) <= set(theirs)
    shared = [command for command in virsh_backup.TABLE.commands if command.name in theirs]
    assert {
        "list",
        "dominfo",
        "domblklist",
        "dumpxml",
        "domstate",
        "connect",
        "backup-dumpxml",
    } <= {command.name for command in shared}
    for group in re.split(r"^ (?=\S)", usage, flags=re.MULTILINE)[1:]:
        [keyword] = re.findall(r"\(help keyword '(.*)'\)", group)
        for command in shared:
            if re.search(rf"^    {command.name} ", group, re.MULTILINE):
                assert command.group == keyword
    for command in shared:
        page = subprocess.run(
            ["virsh", "help", command.name], capture_output=True, text=True, check=True
        ).stdout
        assert virsh_backup.main(["help", command.name]) == 0
        ours = capsys.readouterr().out
        headings = re.findall(r"^  (NAME|SYNOPSIS|DESCRIPTION|OPTIONS)$", page, re.MULTILINE)
        shown = re.findall(r"^  (NAME|SYNOPSIS|DESCRIPTION|OPTIONS)$", ours, re.MULTILINE)
        assert [one for one in headings if one in shown] == [
            one for one in shown if one in headings
        ]
        same = {option.name for option in command.options} & set(re.findall(r"--([\w-]+)", page))
        for name in same:
            form = rf"\[?--{name}\]?(?: <\w+>)?(?:\.\.\.)?"
            [said] = re.findall(rf"^    {form}  +(.*)$", page, re.MULTILINE)
            option = command.option(name)
            assert option is not None
            assert (option.kind is vsh.Kind.BOOL) == (
                f"--{name} <" not in page and f"[--{name}] <" not in page
            ), said


@pytest.mark.needs("virsh")
@pytest.mark.parametrize("form", ["--id", "--name", "--uuid", "--table", "--state-running"])
def test_list_takes_virshs_forms(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = subprocess.run([*VIRSH, "list", form], capture_output=True, text=True, check=True)
    assert virsh_backup.main(["-c", "test:///default", "list", form]) == 0
    ours = capsys.readouterr().out
    assert (
        re.sub(r"\S+", "x", ours).split("\n")[0]
        == re.sub(r"\S+", "x", theirs.stdout).split("\n")[0]
    )


@pytest.mark.needs("virsh", "qemu-nbd", "losetup")
def test_disks_are_listed_as_virsh_lists_them(tmp_path: pathlib.Path) -> None:
    """Of a QEMU by its QMP socket, and of a domain with the same disks."""
    image, socket = machines.image(tmp_path / "a.raw", 4 << 20), tmp_path / "nbd.sock"
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(places.block_device(tmp_path / "device", 4 << 20))
        argv = [
            "qemu-nbd",
            "-t",
            "-e",
            "4",
            "-f",
            "raw",
            "-k",
            str(socket),
            "-x",
            "a b/c",
            str(image),
        ]
        server = stack.enter_context(subprocess.Popen(argv))
        stack.callback(server.kill)
        waiting.until(socket.is_socket, process=server)
        options, disks = list[str](), ""
        for target, driver, place, kind, source in [
            ("vda", "host_device", f"filename={device}", "block", f"dev='{device}'"),
            ("vdb", "nbd", f"server.type=unix,file.server.path={socket},file.export=a b/c",
             "network", "protocol='nbd' name='a b/c'"),
            ("vdc", "file", f"filename={tmp_path}/c.raw", "file", f"file='{tmp_path}/c.raw'"),
        ]:  # fmt: skip
            (tmp_path / "c.raw").write_bytes(bytes(4 << 20))
            node = f"raw,node-name=n-{target},file.driver={driver},file.{place}"
            options += ["-blockdev", f"driver={node}"]
            options += ["-device", f"virtio-blk,drive=n-{target},id={target}"]
            disks += f"<disk type='{kind}'><source {source}/><target dev='{target}'/></disk>"
        machine = stack.enter_context(machines.qemu(tmp_path, *options))
        (tmp_path / "vm.xml").write_text(
            "<domain type='test'><name>vm</name><memory>65536</memory><os><type>hvm</type></os>"
            f"<devices>{disks}</devices></domain>"
        )
        define = f"define {tmp_path}/vm.xml; domblklist vm"
        for form in ("", " --details"):
            theirs = subprocess.run(
                [*VIRSH, "-q", define + form], capture_output=True, text=True, check=True
            )
            ours = subprocess.run(
                [*PROGRAM, "-c", machine.uri, "-q", f"domblklist 1{form}"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert sorted(ours.stdout.splitlines()) == sorted(theirs.stdout.splitlines())


@pytest.mark.needs("virsh")
@pytest.mark.parametrize(
    "words",
    [
        "--xpath //name",
        "--xpath '//name|//uuid'",
        "--xpath //devices/disk",
        "--xpath //disk/@type",
        "--xpath '//name/text()'",
        "--xpath //nope",
        "--xpath '/domain[/]'",
        "--xpath '//disk|//name' --wrap",
        "--xpath //nope --wrap",
        "--xpath //@type --wrap",
        "--xpath '//disk/target/@dev|//name/text()' --wrap",
        "--xpath '//name/text()|//uuid/text()' --wrap",
        "--wrap",
        "--xpath 'count(//name)'",
    ],
)
def test_nodes_are_printed_as_virsh_prints_them(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"dumpxml test {words}"
    argv = [*VIRSH, "-q", line]
    theirs = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    document = subprocess.check_output([*VIRSH, "-q", "dumpxml test"], text=True)
    shell = vsh.Shell(virsh_backup.TABLE, None, lambda error: None)
    call = vsh.parse(virsh_backup.TABLE, vsh.split(line)[0])

    def printed() -> None:
        virsh_connection.print_xml(cast("Any", shell), call.args, document)

    status = shell.guard(printed)
    out = capsys.readouterr().out
    assert (status, out.strip()) == (theirs.returncode, theirs.stdout.strip())
