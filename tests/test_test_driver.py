# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test driver: all of the API and the shell on a fake QEMU, with none installed.

And all of it once more at the other end of a connection to a daemon: the API's suite, which runs
unchanged on the local and on the remote driver.
"""

import configparser
import contextlib
import dataclasses
import errno
import gc
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import pytest

import virtbackup
from tests import daemons, waiting
from tests.live import places
from virtbackup import errors, extend, hypervisor, runtime
from virtbackup.conf import backup_conf, domain_conf
from virtbackup.qemu import (
    block,
    cleanup,
    domain,
    driver,
    ending,
    monitor,
    monitor_json,
    naming,
    process,
    recording,
    status,
    sweep,
    verdict,
    watch,
)
from virtbackup.test import fake_server, test_driver
from virtbackup.tools import virsh_backup

ROOT = pathlib.Path(__file__).parents[1]
RECORDINGS = test_driver.RECORDINGS
URIS = ("test:///default", "test:///qemu-7.2.22", "test:///qemu-5.2.0", "test:///default?engine=classic",
        "test:///storage-daemon-10.0.13")  # fmt: skip
"""Both engines, old and new, with and without devices."""


@pytest.fixture(autouse=True, params=["local", "remote"])
def state(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[pathlib.Path]:
    """Where our files live, and scratch images; nothing may be left there."""
    directory = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(directory))
    monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", str(directory))
    opener: hypervisor.Opener = test_driver.open
    if request.param == "remote":
        opener = daemons.through_daemon(opener)
    hypervisor.register("test", opener)
    yield directory
    hypervisor.unregister("test")
    assert [path for path in directory.iterdir() if path.suffix != ".lock"] == []
    assert not daemons.threads_left("fake ")


ALONE = pytest.mark.parametrize("state", ["local"], indirect=True)
"""Of a driver that a test has made itself, behind no daemon."""


@pytest.fixture(params=URIS)
def uri(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def xml(tmp_path: pathlib.Path) -> str:
    return f'<domainbackup><address type="unix" path="{tmp_path}/nbd.sock"/></domainbackup>'


def only(connection: virtbackup.Connection) -> virtbackup.Domain:
    [domain] = connection.listAllDomains()
    return domain


def failure(call: Callable[[], object]) -> virtbackup.Error:
    with pytest.raises(virtbackup.Error) as caught:
        call()
    return caught.value


def script(directory: pathlib.Path, *rules: dict[str, Any], name: str = "qemu-7.2.22") -> str:
    """A directory of one's own; its URI."""
    (directory / "recording.jsonl").write_bytes((RECORDINGS / f"{name}.jsonl").read_bytes())
    (directory / "faults.json").write_text(json.dumps(rules))
    return f"test://{directory}"


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_what_libvirts_clients_ask_for(path: pathlib.Path) -> None:
    driver = test_driver.open(f"test:///{path.stem}", False)
    guest = not path.stem.startswith("storage-daemon")
    [ref] = driver.list_domains()
    state, most, memory, vcpus, _ = driver.domain_get_info(ref)
    assert (state, most, memory) == (libvirt.VIR_DOMAIN_RUNNING, *[64 << 10 if guest else 0] * 2)
    assert vcpus == int(guest)
    disks = domain_conf.DomainDef.parse(driver.domain_get_xml_desc(ref, 0)).disks
    sizes = [driver.domain_get_block_info(ref, d.target, 0)[0] for d in disks if d.has_medium]
    assert sizes == [disk.capacity for disk in disks if disk.has_medium]
    assert driver.domain_get_block_job_info(ref, disks[0].target, 0) is None
    happened: list[hypervisor.Event] = []
    end = driver.event_register(happened.append)
    if guest:
        assert set(driver.domain_block_stats_flags(ref, "", 0).values()) == {0}
        driver.domain_suspend(ref)
        driver.domain_resume(ref)
    assert len(happened) == 2 * guest
    end()
    driver.close()


# --- all is well ---


def test_the_entry_point_is_declared() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.entry_points"]["virtbackup.drivers"].split("\n")
    assert "test = virtbackup.test.test_driver:open" in lines


def test_who_it_is() -> None:
    with virtbackup.open("test:///default") as connection:
        domain = only(connection)
        assert connection.getURI() == "test:///default"
        assert connection.getType() == "QEMU"
        assert connection.getVersion() > 11 * 1000000
        assert connection.isAlive() == 1
        assert (domain.name(), domain.ID(), domain.isActive()) == ("vm", 1, 1)
        assert domain.state() == [libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_UNKNOWN]
        disks = domain_conf.DomainDef.parse(domain.XMLDesc()).disks
    found = [(disk.target, disk.device, disk.format, disk.readonly) for disk in disks]
    assert sorted(found) == [
        ("sdb", "disk", "raw", False),
        ("sdc", "cdrom", "raw", True),
        ("sdd", "cdrom", None, False),
        ("vda", "disk", "qcow2", False),
    ]


def test_a_guest_without_a_uuid_has_one_by_its_uri() -> None:
    found = []
    for name in ("storage-daemon-7.2.22", "storage-daemon-7.2.22", "storage-daemon-11.1.3"):
        with virtbackup.open(f"test:///{name}") as connection:
            found.append(only(connection).UUIDString())
    assert found[0] == found[1] != found[2]


def test_a_backup_from_start_to_stop(uri: str, xml: str, tmp_path: pathlib.Path) -> None:
    with virtbackup.open(uri) as connection:
        domain = only(connection)
        assert domain.backupStart(xml) == 0
        info = domain.backupGetInfo()
        assert info.state == "running"
        assert len(info.disks) == 2
        assert {disk.state for disk in info.disks} == {"running"}
        assert all(disk.export in domain.backupGetXMLDesc() for disk in info.disks)
        again = failure(lambda: domain.backupStart(xml))
        assert again.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
        assert domain.backupStop() == 0
        assert not (tmp_path / "nbd.sock").exists()
        gone = failure(domain.backupStop)
        assert gone.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
        assert domain.backupCleanup() == []
        assert domain.backupStart(xml) == 0
        assert domain.backupStop(virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL) == 0


def _native(tmp_path: pathlib.Path, inner: str = "") -> str:
    server = f"<server transport='unix' socket='{tmp_path}/nbd.sock'/>"
    return f"<domainbackup mode='pull'>{server}{inner}</domainbackup>"


def test_libvirts_own_dialect_is_started(uri: str, xml: str, tmp_path: pathlib.Path) -> None:
    """As its translation is: without disks all of them, else those that are listed."""
    with virtbackup.open(uri) as connection:
        domain = only(connection)
        domain.backupStart(xml)
        expected = domain.backupGetXMLDesc()
        both = [disk.name for disk in domain.backupGetInfo().disks]
        domain.backupStop()
        domain.backupStart(_native(tmp_path))
        assert domain.backupGetXMLDesc() == expected
        domain.backupStop()
        scratch = f"<scratch file='{tmp_path}/scratch.qcow2'/>"
        disk = f"<disk name='{both[1]}' exportname='x'>{scratch}</disk>"
        domain.backupStart(_native(tmp_path, f"<disks>{disk}</disks>"))
        found = [(disk.name, disk.export) for disk in domain.backupGetInfo().disks]
        assert found == [(both[1], "x")]
        assert f'<source file="{tmp_path}/scratch.qcow2"/>' in domain.backupGetXMLDesc()
        domain.backupStop()


def test_what_is_not_said_in_the_proposal_is_not_started(tmp_path: pathlib.Path) -> None:
    with virtbackup.open("test:///default") as connection:
        domain = only(connection)
        tls = _native(tmp_path).replace("transport", "tls='yes' transport")
        for document, words in (
            (
                "<domainbackup mode='pull'><server transport='fd' fdgroup='x'/></domainbackup>",
                "transport='fd'> cannot be said",
            ),
            ("<domainbackup mode='push'/>", "pulls only"),
            (tls, "backup TLS directory not configured"),
            (_native(tmp_path, "<disks><disk name='nope'/></disks>"), "no disk named 'nope'"),
            (_native(tmp_path, "<disks><disk name='sdc'/></disks>"), "read-only"),
            (_native(tmp_path, "<branch name='b'/>"), "mixes two dialects"),
            ("<domainbackup/>", "export address must be specifed"),
        ):
            text = str(failure(lambda document=document: domain.backupStart(document)))  # type: ignore[misc]
            assert words in text
        gone = failure(domain.backupStop)
        assert gone.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP


def test_engines(xml: str) -> None:
    for uri, engine in ((URIS[0], "hybrid"), (URIS[1], "classic"), (URIS[3], "classic")):
        with virtbackup.open(uri) as connection:
            domain = only(connection)
            domain.backupStart(xml)
            assert domain.backupGetInfo().engine == engine


def test_a_backup_goes_with_the_last_connection(xml: str, tmp_path: pathlib.Path) -> None:
    scratch = tmp_path / "scratch.qcow2"
    named = xml.replace(
        "</domainbackup>",
        f'<disks><disk name="vda"><source file="{scratch}"/></disk></disks></domainbackup>',
    )
    first, second = (virtbackup.open("test:///default") for _ in range(2))
    only(first).backupStart(named)
    assert scratch.exists()
    first.close()
    assert only(second).backupGetInfo().state == "running"
    second.close()
    assert not scratch.exists()
    with virtbackup.open("test:///default") as third:
        gone = failure(only(third).backupGetInfo)
        assert gone.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP


def test_a_connection_that_is_forgotten_is_closed(
    xml: str, tmp_path: pathlib.Path, state: pathlib.Path
) -> None:
    for _ in range(3):
        conn = virtbackup.open("test:///default")
        conn.lookupByID(1)
        del conn
        gc.collect()
    assert list(state.glob("private-*")) == []
    for _ in range(2):
        with virtbackup.open("test:///default") as conn:
            conn.lookupByID(1).backupStart(xml)


def test_a_connection_is_forgotten_as_another_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection of garbage may come at any time, in any thread."""
    forgotten: list[object] = [test_driver.open("test:///default", readonly=False)]
    forgotten.append(forgotten)
    load = test_driver.load

    def collect_and_load(*paths: Any) -> test_driver.Script:
        gc.collect()
        return load(*paths)

    monkeypatch.setattr(test_driver, "load", collect_and_load)
    del forgotten
    opening = threading.Thread(
        target=lambda: test_driver.open("test:///qemu-7.2.22", readonly=False).close(), daemon=True
    )
    opening.start()
    opening.join(waiting.DEADLINE)
    assert not opening.is_alive()


def test_a_domain_of_libvirts_own_test_driver_is_not_ours(xml: str) -> None:
    extend.install(libvirt)
    try:
        dom = libvirt.open("test:///default").lookupByName("test")
        with pytest.raises(libvirt.libvirtError) as refusal:
            dom.backupStart(xml)
        assert refusal.value.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT
    finally:
        extend.uninstall(libvirt)


def test_refusals(xml: str, tmp_path: pathlib.Path) -> None:
    def of(disk: str) -> str:
        disks = f'<disks><disk name="{disk}"/></disks></domainbackup>'
        return xml.replace("</domainbackup>", disks)

    with virtbackup.open("test:///default") as connection:
        domain = only(connection)
        for disk, words in (("sdc", "read-only"), ("sdd", "media"), ("nope", "nope")):
            assert words in str(failure(lambda disk=disk: domain.backupStart(of(disk))))  # type: ignore[misc]
        text = str(failure(lambda: domain.backupStart(xml.replace(str(tmp_path), "/no/where"))))
        assert text == (
            "operation failed: cannot listen on '/no/where/nbd.sock': Failed to bind socket to"
            " /no/where/nbd.sock: No such file or directory"
        )


@pytest.mark.parametrize(
    ("command", "good", "left"),
    [
        ("block-export-del", False, "export 'virtbackup-"),
        ("job-cancel", True, "job 'virtbackup-"),
        ("job-dismiss", True, "job 'virtbackup-"),
    ],
)
def test_what_qemu_does_not_give_back_is_told(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    good: bool,
    left: str,
    state: pathlib.Path,
) -> None:
    """At once. The verdict is on the data, of which a client may read more yet by an export."""
    uri = script(tmp_path, {"command": command, "error": {"class": "GenericError", "desc": "no"}})
    begin = time.monotonic()
    line = f"backup-start-as 1 --unix {tmp_path}/nbd.sock; backup-stop 1"
    assert virsh_backup.main(["-c", uri, line]) == (0 if good else 1)
    assert time.monotonic() - begin < sweep.TIMEOUT / 2
    told = capsys.readouterr()
    assert ("Domain backup stopped" in told.out) is good
    assert ("its export cannot be ended" in told.err) is not good
    [warning] = re.findall(r"^warning: .*$", told.err, re.M)
    assert re.match(rf"warning: backup [0-9a-f]+ is not all out of QEMU.*{left}", warning)


def test_what_is_not_given_back_holds_up_no_stop_where_nobody_reads_of_it(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    state: pathlib.Path,
) -> None:
    """The files still have to go, and the verdict to be told."""
    error = {"class": "GenericError", "desc": "no"}
    uri = script(tmp_path, {"command": "job-dismiss", "error": error})
    reader, writer = os.pipe()
    os.close(reader)
    line = f"backup-start-as 1 --unix {tmp_path}/nbd.sock; backup-stop 1"
    with os.fdopen(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stderr", nobody)
        assert virsh_backup.main(["-c", uri, line]) == 0
    assert "Domain backup stopped" in capsys.readouterr().out


def test_a_scsi_device_that_is_passed_through(tmp_path: pathlib.Path, xml: str) -> None:
    """What its guest does goes past QEMU, and would fail below a job's filter."""
    hd = '{"name": "sdb", "type": "child<scsi-hd>"}'
    for kind in "scsi-block", "scsi-generic":
        text = (RECORDINGS / "qemu-10.0.13.jsonl").read_text()
        assert hd in text
        (tmp_path / "own.jsonl").write_text(text.replace(hd, hd.replace("scsi-hd", kind)))
        with virtbackup.open(f"test://{tmp_path}") as connection:
            domain = only(connection)
            for disks in "", '<disks><disk name="sdb"/></disks>':
                with pytest.raises(libvirt.libvirtError, match="'sdb' is a SCSI device") as wrong:
                    domain.backupStart(xml.replace("</dom", f"{disks}</dom"))
                assert wrong.value.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED
            left_out = '<disks><disk name="sdb" present="no"/></disks></dom'
            domain.backupStart(xml.replace("</dom", left_out))
            domain.backupStop()
            domain.branchCreate("b")
            [branch] = domain.branchList()
            assert [disk.name for disk in branch.disks] == ["vda"]
            domain.branchDelete("b")


def test_unusable_uris(tmp_path: pathlib.Path) -> None:
    for uri in (
        "test:///",
        "test://host/default",
        "test:///default?x=1",
        "test:///default?engine=x",
        "test:///default?engine=classic&engine=hybrid",
    ):
        wrong = failure(lambda uri=uri: virtbackup.open(uri))  # type: ignore[misc]
        assert wrong.get_error_code() == libvirt.VIR_ERR_INVALID_ARG
    assert "No such file" in str(failure(lambda: virtbackup.open("test:///no/where")))
    own = f"test://{tmp_path}"
    assert "has no recording" in str(failure(lambda: virtbackup.open(own)))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"<-": {"QMP": {}}}\nnonsense\n')
    assert "more than one recording" in str(failure(lambda: virtbackup.open(own)))
    (tmp_path / "a.jsonl").unlink()
    assert f"'{tmp_path}/b.jsonl': line 2: not JSON" in str(failure(lambda: virtbackup.open(own)))
    (tmp_path / "b.jsonl").write_text('{"<-": {"QMP": {}}}\n')
    assert "the greeting has no version" in str(failure(lambda: virtbackup.open(own)))
    script(tmp_path, {"command": "x"})
    text = str(failure(lambda: virtbackup.open(own)))
    assert text == (f"unsupported configuration: '{tmp_path}/faults.json': rule 1: nothing happens")
    (tmp_path / "faults.json").unlink()
    (tmp_path / "faults.json").symlink_to(tmp_path / "moved.json")
    assert "faults.json': No such file" in str(failure(lambda: virtbackup.open(own)))


# --- faults ---

NO = {"class": "GenericError", "desc": "no room"}


def test_a_start_that_fails_is_undone(xml: str, tmp_path: pathlib.Path) -> None:
    rule = {"command": "block-export-add", "nth": 2, "error": NO}
    with virtbackup.open(script(tmp_path, rule)) as connection:
        domain = only(connection)
        text = str(failure(lambda: domain.backupStart(xml)))
        assert text.endswith("unable to execute QEMU command 'block-export-add': no room")
        assert domain.backupCleanup() == []
        assert domain.backupStart(xml) == 0
        assert domain.backupStop() == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_start_that_loses_the_monitor(xml: str, tmp_path: pathlib.Path, when: str) -> None:
    rule = {"command": "transaction", "nth": 1, "when": when, "hang-up": True}
    with virtbackup.open(script(tmp_path, rule)) as connection:
        domain = only(connection)
        lost = failure(lambda: domain.backupStart(xml))
        assert lost.get_error_code() == libvirt.VIR_ERR_INTERNAL_ERROR
        assert "monitor '" in str(lost)
        assert domain.backupCleanup() == []
        assert domain.backupStart(xml) == 0
        assert domain.backupStop() == 0


@pytest.mark.parametrize("name", ["qemu-7.2.22", "qemu-11.1.3"])
def test_a_job_that_ends_makes_the_backup_bad(xml: str, tmp_path: pathlib.Path, name: str) -> None:
    """It ends at the second look at the jobs: after the start's."""
    rule = {"command": "query-jobs", "nth": 2, "cancel-job": "virtbackup-*-0"}
    with virtbackup.open(script(tmp_path, rule, name=name)) as connection:
        domain = only(connection)
        domain.backupStart(xml)
        text = str(failure(domain.backupStop))
    assert text == (
        "operation failed: the backup is not good: disk 'sdb': its backup job ended:"
        " Operation canceled"
    )


def documented(directory: pathlib.Path, number: int, options: str = "") -> str:
    """The NUMBER-th example of a faults.json on the page, on the newest QEMU; its URI."""
    page = (ROOT / "docs" / "test-driver.md").read_text()
    rules = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[number])
    return script(directory, *rules, name="qemu-11.1.3") + options


def test_the_documented_export_that_fails(xml: str, tmp_path: pathlib.Path) -> None:
    with virtbackup.open(documented(tmp_path, 0)) as connection:
        domain = only(connection)
        assert "Failed to start the export" in str(failure(lambda: domain.backupStart(xml)))
        assert "no domain backup job present" in str(failure(domain.backupStop))


def test_the_documented_job_that_is_cancelled(xml: str, tmp_path: pathlib.Path) -> None:
    with virtbackup.open(documented(tmp_path, 1)) as connection:
        domain = only(connection)
        domain.backupStart(xml)
        first = domain_conf.DomainDef.parse(domain.XMLDesc()).disks[0].target
        assert f"disk '{first}': its backup job ended" in str(failure(domain.backupStop))


def test_the_documented_guest_that_stands(xml: str, tmp_path: pathlib.Path) -> None:
    with virtbackup.open(documented(tmp_path, 2, "?engine=classic")) as connection:
        domain = only(connection)
        domain.backupStart(xml)
        assert {disk.state for disk in domain.backupGetInfo().disks} == {"failed"}
        assert "end of file from monitor" in str(failure(domain.backupStop))
        assert "the guest was paused" in str(failure(domain.backupStop))


def test_a_snapshot_that_breaks_unseen(xml: str, tmp_path: pathlib.Path) -> None:
    rule = {"command": "block-export-add", "nth": 2, "when": "after", "break-snapshot": "*-1"}
    with virtbackup.open(script(tmp_path, rule, name="qemu-11.1.3")) as connection:
        domain = only(connection)
        domain.backupStart(xml)
        states = {disk.name: disk.state for disk in domain.backupGetInfo().disks}
        assert states == {"sdb": "running", "vda": "failed"}
        text = str(failure(domain.backupStop))
    assert text.endswith("disk 'vda': its snapshot is broken: Operation not supported")


def test_a_guest_that_stands_for_our_sake_goes_on(xml: str, tmp_path: pathlib.Path) -> None:
    rule = {"command": "block-export-add", "nth": 2, "when": "after",
            "stop": "io-error", "io-status": "nospace"}  # fmt: skip
    with virtbackup.open(script(tmp_path, rule)) as connection:
        domain = only(connection)
        domain.backupStart(xml)
        assert "a write of the guest failed ('nospace')" in str(failure(domain.backupStop))
        assert domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING


def test_a_guest_that_comes_to_stand_as_its_backup_ends_goes_on(
    xml: str, tmp_path: pathlib.Path
) -> None:
    """After the last look: the backup is good, and nobody would ever let it go on."""
    rule = {"command": "job-cancel", "nth": 1, "stop": "io-error", "io-status": "nospace"}
    with virtbackup.open(script(tmp_path, rule)) as connection:
        domain = only(connection)
        domain.backupStart(xml)
        domain.backupStop()
        assert domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING


def test_qemu_that_ends(xml: str, tmp_path: pathlib.Path) -> None:
    rule = {"command": "query-name", "nth": 2, "quit": True}
    uri = script(tmp_path, {**rule, "command": "query-block-exports", "nth": 2})
    with virtbackup.open(uri) as connection:
        domain = only(connection)
        domain.backupStart(xml)
        text = str(failure(domain.backupStop))
        assert "QEMU is gone" in text


def test_a_connection_whose_qemu_has_ended_is_dead(xml: str, tmp_path: pathlib.Path) -> None:
    """Of the local driver; one through a daemon stands while the daemon does."""
    uri = script(tmp_path, {"command": "query-block-exports", "nth": 2, "quit": True})
    with contextlib.closing(test_driver.open(uri, False)) as opened:
        [ref] = opened.list_domains()
        opened.domain_backup_start(ref, xml, 0)
        assert opened.is_alive()
        failure(lambda: opened.domain_backup_stop(ref, 0))
        assert not opened.is_alive()


# --- the shell ---


def shell(tools: pathlib.Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """The program in a process of its own that finds the programs in TOOLS only."""
    code = (
        "from virtbackup import hypervisor; from virtbackup.test import test_driver;"
        " hypervisor.register('test', test_driver.open);"
        " from virtbackup.tools import virsh_backup; import sys; sys.exit(virsh_backup.main())"
    )
    inherited = {k: v for k, v in os.environ.items() if k.startswith(("VIRTBACKUP", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        check=False, capture_output=True, text=True, cwd=ROOT, timeout=60,
        env={**inherited, "PATH": str(tools)},
    )  # fmt: skip


def test_the_shell_without_any_qemu(tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace"
    commands = (
        f"backup-start-as vm --unix {tmp_path}/nbd.sock; backup-info vm; backup-dumpxml vm;"
        " backup-stop vm; backup-cleanup vm; domblklist vm"
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cat", "touch"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = shell(tools, "-c", "test:///default", "--trace", str(trace), commands)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("Domain backup started", "Domain backup stopped", "/images/vda.qcow2"):
        assert words in done.stdout
    said = trace.read_text()
    assert '-> {"execute":"transaction"' in said
    assert '"event": "JOB_STATUS_CHANGE"' in said


def test_every_command_by_itself(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("list", "version", "uri", "dominfo vm", "domblklist vm", "backup-cleanup 1"):
        assert virsh_backup.main(["-c", "test:///default", command]) == 0
    assert virsh_backup.main(["-q", "-c", "test:///default", "backup-stop", "vm"]) == 1
    assert capsys.readouterr().err == (
        "error: Domain backup job id not found: no domain backup job present\n"
    )


def test_the_interactive_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    lines = f"list\nbackup-start-as vm --unix {tmp_path}/nbd.sock\nbackup-stop vm\nquit\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert virsh_backup.main(["-c", "test:///default"]) == 0
    out = capsys.readouterr().out
    assert "Domain backup started" in out
    assert "Domain backup stopped" in out


def test_a_pull(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real bytes over NBD; each disk's sectors tell whose they are. All directories that were
    made are durable, too."""
    pytest.importorskip("nbd")
    synced = places.synced(monkeypatch)
    pulled = tmp_path / "a" / "b" / "pulled"
    words = ["backup-pull", "vm", str(pulled), "--format", "raw"]
    assert virsh_backup.main(["-c", "test:///default", *words]) == 0, capsys.readouterr().err
    assert {tmp_path, tmp_path / "a", pulled.parent, pulled} <= synced
    data = (pulled / "vda.raw").read_bytes()
    assert len(data) == 4 << 20
    assert data[512:].startswith(b"/images/vda.qcow2 sector 1\n")
    assert data[1 << 20 :] == bytes(3 << 20)


def test_a_pull_whose_first_file_cannot_be_closed_leaves_none(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system may tell: it would be in the next one's way."""
    from virtbackup.tools import pull

    closed = os.close

    def fails(fd: int) -> None:
        path = pathlib.Path(f"/proc/self/fd/{fd}").readlink()
        closed(fd)
        if path.suffix == ".partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", fails)
    with virtbackup.open("test:///default") as conn:
        words = str(failure(lambda: pull.pull(only(conn), tmp_path, fmt="raw")))
    assert f"cannot make a backup in {tmp_path}: Input/output error" in words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("branch", "is_verdict"), [(None, False), ("b", False), ("b", True)],
    ids=["refused", "refused-branch", "verdict-branch"],
)  # fmt: skip
def test_a_pull_whose_stop_is_refused_ends_its_backup(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, branch: str | None, is_verdict: bool
) -> None:
    """As where a scratch image hangs, for a while: the connection may stay for long. Of a verdict
    there is nothing more to be ended, and what runs then is another's. No file is left."""
    from virtbackup.tools import pull

    refused: list[str] = []
    check = cleanup.check_scratch

    def hangs(session: domain.Session, left: status.Status) -> None:
        if not left.cancelled:
            refused.append(left.id)
            raise errors.error(code, "the scratch image hangs")
        check(session, left)

    code = libvirt.VIR_ERR_OPERATION_FAILED if is_verdict else libvirt.VIR_ERR_OPERATION_TIMEOUT
    monkeypatch.setattr(cleanup, "check_scratch", hangs)
    with virtbackup.open("test:///default") as conn:
        pulled = tmp_path / "pulled"
        words = str(failure(lambda: pull.pull(only(conn), pulled, fmt="raw", branch=branch)))
        assert f"the scratch image hangs (no backup was kept in {tmp_path}/pulled)" in words
        assert refused
        if is_verdict:
            assert only(conn).backupGetInfo().state == "running"
        else:
            none = failure(only(conn).backupGetInfo)
            assert none.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
    assert not (tmp_path / "pulled").exists()


# --- monitor-replay ---


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[fake_server.Server]:
    script = test_driver.load(RECORDINGS / "qemu-7.2.22.jsonl")
    with fake_server.Server(tmp_path / "qmp.sock", script.recorded) as served:
        yield served


class Wire:
    """A QMP client of a few lines."""

    def __init__(self, path: pathlib.Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(waiting.DEADLINE)
        end = time.monotonic() + waiting.DEADLINE
        while self.socket.connect_ex(str(path)):  # until somebody listens
            assert time.monotonic() < end
        self.file = self.socket.makefile("rb")

    def receive(self) -> Any:
        return json.loads(self.file.readline())

    def send(self, **message: Any) -> None:
        self.socket.sendall(json.dumps(message).encode())

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def test_one_client_at_a_time(server: fake_server.Server) -> None:
    first, second = Wire(server.path), Wire(server.path)
    assert "QMP" in first.receive()
    first.send(execute="qmp_capabilities", id="a")
    assert first.receive() == {"return": {}, "id": "a"}
    second.socket.settimeout(0.05)
    with pytest.raises(TimeoutError):
        second.socket.recv(1, socket.MSG_PEEK)
    second.socket.settimeout(waiting.DEADLINE)
    first.close()
    assert "QMP" in second.receive()
    second.close()


def test_a_client_comes_while_no_descriptor_is_left(server: fake_server.Server) -> None:
    """He waits, as QEMU's do."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    first, second = Wire(server.path), Wire(server.path)
    first.receive()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        first.close()
        second.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            second.socket.recv(1, socket.MSG_PEEK)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    second.socket.settimeout(waiting.DEADLINE)
    assert "QMP" in second.receive()
    second.close()


@pytest.mark.parametrize(
    ("execute", "arguments", "words"),
    [
        ("blockdev-add", {"driver": "file", "node-name": "n", "filename": "a\0b"},
         "Could not open 'a\0b': Invalid argument"),
        ("blockdev-add", {"driver": "file", "node-name": "n", "filename": "/"},
         "Could not open '/': Is a directory"),
        ("blockdev-add", {"driver": "file", "node-name": "n", "filename": "/", "read-only": True},
         "'file' driver requires '/' to be a regular file"),
        ("blockdev-create",
         {"job-id": "j", "options": {"driver": "file", "filename": "/nothere", "size": 1 << 64}},
         "Parameter 'options.size' expects uint64"),
        ("remove-fd", {"fdset-id": 1 << 64},
         "Invalid parameter type for 'fdset-id', expected: integer"),
        ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "a\0b"}}},
         "Failed to bind socket to a\0b: Invalid argument"),
        ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/" + "x" * 200}}},
         f"UNIX socket path '/{'x' * 200}' is too long"),
        ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "::1", "port": "x"}}},
         "address resolution failed for ::1:x: Servname not supported for ai_socktype"),
        ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "a\0b", "port": "1"}}},
         "address resolution failed for a\0b:1: Name or service not known"),
    ],
)  # fmt: skip
def test_what_no_file_and_no_address_can_be(
    server: fake_server.Server, execute: str, arguments: dict[str, Any], words: str
) -> None:
    client = Wire(server.path)
    client.receive()
    client.send(execute="qmp_capabilities")
    client.receive()
    client.send(execute=execute, arguments=arguments)
    nobody_resolves = words.replace(
        "Name or service not known", "Temporary failure in name resolution"
    )
    assert client.receive()["error"]["desc"] in (words, nobody_resolves)
    client.send(execute="query-jobs")
    assert client.receive() == {"return": []}
    client.close()


def test_a_descriptor_of_a_command_that_comes_in_pieces(
    server: fake_server.Server, tmp_path: pathlib.Path
) -> None:
    client = Wire(server.path)
    client.receive()
    client.send(execute="qmp_capabilities")
    client.receive()
    with (tmp_path / "file").open("wb") as file:
        socket.send_fds(client.socket, [b'{"execute": "add-fd"'], [file.fileno()])
        time.sleep(0.05)  # long enough to be read
        client.socket.sendall(b"}")
        assert client.receive()["return"]["fdset-id"] == 0
        words = "Could not dup FD for /dev/fdset/0 flags 0: Permission denied"
        opened = {"driver": "file", "node-name": "n", "filename": "/dev/fdset/0"}
        client.send(execute="blockdev-add", arguments={**opened, "read-only": True})
        assert client.receive()["error"]["desc"] == words
    client.close()


def test_a_socket_that_is_handed_over(server: fake_server.Server, tmp_path: pathlib.Path) -> None:
    """It need not listen yet."""
    client = Wire(server.path)
    client.receive()
    client.send(execute="qmp_capabilities")
    client.receive()
    getfd = json.dumps({"execute": "getfd", "arguments": {"fdname": "it"}}).encode()
    start = {"addr": {"type": "fd", "data": {"str": "it"}}}
    with (tmp_path / "file").open("wb") as file:
        socket.send_fds(client.socket, [getfd], [file.fileno()])
    client.receive()
    client.send(execute="nbd-server-start", arguments=start)
    assert client.receive()["error"]["desc"] == "File descriptor 'it' is not a socket"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        socket.send_fds(client.socket, [getfd], [listener.fileno()])
        client.receive()
        where = listener.getsockname()
    client.send(execute="nbd-server-start", arguments=start)
    assert client.receive() == {"return": {}}
    with socket.create_connection(where) as reader:
        assert reader.recv(8) == b"NBDMAGIC"
    client.close()


def test_a_port(server: fake_server.Server) -> None:
    """QEMU takes a port that another server has for one of several that might be free."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        client = Wire(server.path)
        client.receive()
        client.send(execute="qmp_capabilities")
        client.receive()
        address = {"type": "inet", "data": {"host": "127.0.0.1", "port": port}}
        client.send(execute="nbd-server-start", arguments={"addr": address})
        words = "Failed to find an available port: Address already in use"
        assert client.receive()["error"]["desc"] == words
    client.send(execute="nbd-server-start", arguments={"addr": address})
    assert client.receive() == {"return": {}}
    with socket.create_connection(("127.0.0.1", int(port))) as reader:
        assert reader.recv(8) == b"NBDMAGIC"
    client.send(execute="nbd-server-stop")
    assert client.receive() == {"return": {}}
    client.close()


def test_our_own_driver_on_a_served_recording(
    server: fake_server.Server, xml: str, state: pathlib.Path
) -> None:
    with virtbackup.open(f"qmp://{server.path}") as connection:
        domain = only(connection)
        domain.backupStart(xml)
        assert domain.backupGetInfo().state == "running"
        assert domain.backupStop() == 0
    for lock in state.glob("*.lock"):
        lock.unlink()


def test_stopping_with_a_client_connected(server: fake_server.Server) -> None:
    client = Wire(server.path)
    client.receive()
    server.close()
    assert client.file.read() == b""
    client.close()
    assert not server.path.exists()


def test_monitor_replay(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "own.sock"
    rules = tmp_path / "faults.json"
    rules.write_text('[{"command": "query-status", "error": {"class": "X", "desc": "y"}}]')
    recorded = RECORDINGS / "qemu-7.2.22.jsonl"
    argv = ["monitor-replay", str(recorded), "--socket", str(path), "--faults", str(rules)]
    thread = threading.Thread(target=virsh_backup.main, args=(argv,))
    thread.start()
    client = Wire(path)
    client.receive()
    for execute in ("qmp_capabilities", "query-status", "quit"):
        client.send(execute=execute)
    assert client.receive() == {"return": {}}
    assert client.receive() == {"error": {"class": "X", "desc": "y"}}
    assert client.receive()["event"] == "SHUTDOWN"
    client.close()
    thread.join()
    assert not path.exists()


def _heed_interrupts() -> None:
    """Whatever started the tests may have them ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_monitor_replay_ends_when_interrupted(state: pathlib.Path, by: signal.Signals) -> None:
    recorded = RECORDINGS / "qemu-11.1.3.jsonl"
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "monitor-replay", str(recorded)]
    with subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=_heed_interrupts,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        path = pathlib.Path(process.stdout.readline().strip())
        assert path.parent.parent == state
        client = Wire(path)
        assert client.receive()["QMP"]["version"]["qemu"]["major"] == 11
        process.send_signal(by)
        assert client.file.read() == b""
        client.close()
        assert process.stderr.read() == ""
        assert process.wait(waiting.DEADLINE) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["/no/where"], "cannot read '/no/where': No such file or directory"),
        (["/dev/zero"], "'/dev/zero': it has more than 67108864 characters"),
        (["setup.cfg"], "'setup.cfg': line 1: not JSON"),
        (
            [str(RECORDINGS / "qemu-7.2.22.jsonl"), "--socket", "/no/where/x"],
            "cannot listen on '/no/where/x': No such",
        ),
    ],
)
def test_monitor_replay_that_cannot(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert virsh_backup.main(["monitor-replay", *words]) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["monitor-replay", str(RECORDINGS / "qemu-7.2.22.jsonl")], ["rpc-dump", "unix:/x"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_no_private_directory(
    words: list[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path / "file"))
    assert virsh_backup.main(words) == 1
    text = f"error: cannot make a directory in {tmp_path}/file: Not a directory\n"
    assert capsys.readouterr().err == text


def test_a_socket_that_nobody_listens_on_is_replaced(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "qmp.sock"
    recorded = recording.parse((RECORDINGS / "qemu-7.2.22.jsonl").read_text())
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with fake_server.Server(path, recorded):
        with pytest.raises(OSError, match="in use"):
            fake_server.Server(path, recorded)
        client = Wire(path)
        assert "QMP" in client.receive()
        client.close()


def test_state_of_other_processes_is_not_touched(state: pathlib.Path) -> None:
    with virtbackup.open("test:///default"):
        [private] = state.iterdir()
        assert runtime.sweep() == []
        assert private.is_dir()


# --- a status that is lost ------------------------------------------------------------------------


def given_up_without_a_note(
    own: driver.QmpDriver, ref: hypervisor.DomainRef, xml: str, state: pathlib.Path
) -> naming.BackupId:
    """A backup, as the state directory was away."""
    id = naming.BackupId(own.domain_backup_start(ref, xml, 0))
    with away(state):
        assert own._domain.job.give_up(id, "given up, as a test said so")
    return id


@contextlib.contextmanager
def away(state: pathlib.Path) -> Iterator[None]:
    """A file has the name of the state directory meanwhile."""
    other = state.rename(state.with_name(f"{state.name}-away"))
    state.touch()
    yield
    state.unlink()
    other.rename(state)


@ALONE
def test_a_start_whose_qemu_stands_still(
    tmp_path: pathlib.Path, state: pathlib.Path, xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than it is waited for, by who would undo it, too: it says what it leaves."""
    monkeypatch.setattr(monitor, "REPLY_TIMEOUT", 1.0)
    monkeypatch.setattr(monitor, "CONNECT_TIMEOUT", 0.5)
    script(
        tmp_path,
        {"command": "transaction", "nth": 1, "silent": True},
        {"command": "qmp_capabilities", "nth": 4, "silent": True},
    )
    served = test_driver.load(tmp_path / "recording.jsonl", tmp_path / "faults.json")
    with (
        fake_server.Server(tmp_path / "qmp.sock", served.recorded, served.rules) as server,
        contextlib.closing(driver.QmpDriver(str(server.path))) as own,
    ):
        [ref] = own.list_domains()
        words = str(failure(lambda: own.domain_backup_start(ref, xml, 0)))
        assert words.startswith("Timed out during operation: ")
        assert words.endswith(
            "(no backup was started; what is left of it ends with the next start, or"
            " backup-cleanup)"
        )
        assert "job 'virtbackup-" in " ".join(own.domain_backup_cleanup(ref, 0))


@ALONE
@pytest.mark.parametrize("is_lost", [False, True])
def test_the_end_of_qemu_is_noted_without_a_status(
    server: fake_server.Server, tmp_path: pathlib.Path, state: pathlib.Path, xml: str, is_lost: bool
) -> None:
    """Where the state directory is away just then, or for good."""
    image = tmp_path / "scratch.qcow2"
    disk = f'<disks><disk name="vda"><source file="{image}"/></disk></disks></dom'
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        id = naming.BackupId(own.domain_backup_start(ref, xml.replace("</dom", disk), 0))
        own._domain._stop_watching()
        with away(state):
            own._domain.job.note_end(id, "the domain was destroyed")
            assert not image.exists()
        assert own._domain.job.is_over(id)
        for file in (*state.glob("*.json"), server.path) if is_lost else ():
            file.unlink()
        words = str(failure(lambda: own.domain_backup_stop(ref, 0)))
        assert "'vda': the domain was destroyed" in words


NOBODY = runtime.Process(pid=(1 << 22) + 1, start=1)
"""A process that there is not."""


@ALONE
def test_a_qemu_that_another_process_passes_on(
    server: fake_server.Server, state: pathlib.Path, xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where that was restarted: a backup that QEMU has is one that runs."""
    monkeypatch.setattr(ending, "GRACE", 0.0)
    told: list[hypervisor.Event] = []
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        own.domain_backup_start(ref, xml, 0)
        begun = own._domain.file.load()
        assert begun is not None
        own._domain.file.save(dataclasses.replace(begun, qemu=NOBODY))
    with contextlib.closing(driver.QmpDriver(str(server.path))) as other:
        other.event_register(told.append)
        assert other.domain_backup_get_info(ref, 0).state == "running"
        time.sleep(3 * ending.LOOK)  # nothing tells that nothing is told
        assert not told
        for again in (
            lambda: other.domain_backup_cleanup(ref, 0),
            lambda: other.domain_backup_start(ref, xml, 0),
        ):
            assert "running" in str(failure(again))
        other.domain_backup_stop(ref, 0)
        [ended] = told
        assert isinstance(ended, hypervisor.BackupEnded)
        assert (ended.good, ended.reason) == (True, None)
        with monitor.SocketMonitor(str(server.path)) as qemu:
            refused = monitor_json.CommandFailed
            with pytest.raises(refused, match="NBD server not running"):
                qemu.execute(monitor_json.nbd_server_stop())


@ALONE
def test_what_qemu_s_end_leaves_without_a_status(
    server: fake_server.Server, tmp_path: pathlib.Path, state: pathlib.Path, xml: str
) -> None:
    """And nobody says that a backup has ended which somebody else may have stopped."""
    image = tmp_path / "scratch.qcow2"
    disk = f'<disks><disk name="vda"><source file="{image}"/></disk></disks></dom'
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        own.domain_backup_start(ref, xml.replace("</dom", disk), 0)
        own._domain._stop_watching()
        begun = own._domain.file.load()
        assert begun is not None
        own._domain.job.look_after(dataclasses.replace(begun, qemu=NOBODY))
        for file in state.iterdir():
            file.unlink()
        server.path.unlink()
        words = str(failure(lambda: own.domain_backup_stop(ref, 0)))
        assert "no domain backup job present" in words
        assert not image.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="to mount over a file takes root")
@ALONE
def test_a_scratch_image_that_cannot_be_removed(
    server: fake_server.Server,
    tmp_path: pathlib.Path,
    state: pathlib.Path,
    xml: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who gives a backup up leaves it to its stop, which says so where it cannot, either."""
    image = tmp_path / "scratch.qcow2"
    disk = f'<disks><disk name="vda"><source file="{image}"/></disk></disks></dom'
    warning = f"scratch image '{image}' of backup "
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        for is_kept in False, True:
            id = naming.BackupId(own.domain_backup_start(ref, xml.replace("</dom", disk), 0))
            with places.mount_point(image):
                assert own._domain.job.give_up(id, "given up, as a test said so")
                assert warning in caplog.text
                caplog.clear()
                if is_kept:
                    failure(lambda: own.domain_backup_stop(ref, 0))
            if not is_kept:
                failure(lambda: own.domain_backup_stop(ref, 0))
            assert (warning in caplog.text) == image.exists() == is_kept
            assert not list(state.glob("*.json"))


@ALONE
def test_a_branch_that_a_backup_without_a_status_begins(
    server: fake_server.Server, state: pathlib.Path, xml: str
) -> None:
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        own.domain_backup_start(ref, xml.replace("</dom", '<branch name="b"/></dom'), 0)
        own._domain._stop_watching()
        for file in state.iterdir():
            file.unlink()
        words = str(failure(lambda: own.domain_branch_create(ref, "b", 0)))
        assert "a backup of branch 'b' is running: stop it first" in words
        own.domain_backup_stop(ref, 0)
        [branch] = own.domain_branch_list(ref, 0)
        assert all(disk.point is not None for disk in branch.disks)


@ALONE
@pytest.mark.parametrize("text", [None, "not a status"], ids=["lost", "broken"])
def test_what_is_beside_a_status_of_no_use_is_cleaned_up(
    tmp_path: pathlib.Path, state: pathlib.Path, xml: str, text: str | None
) -> None:
    recorded = test_driver.load(RECORDINGS / "qemu-10.0.13.jsonl").recorded
    with (
        fake_server.Server(tmp_path / "qmp.sock", recorded) as server,
        contextlib.closing(driver.QmpDriver(str(server.path))) as own,
        contextlib.closing(driver.QmpDriver(str(server.path))) as other,
    ):
        [ref] = own.list_domains()
        own.domain_backup_start(ref, xml, hypervisor.START_AUTODESTROY)
        own._domain._stop_watching()
        [file] = state.glob("*.json")
        assert {one.suffix for one in state.glob(f"{file.stem}.*")} > {".owner", ".partial"}
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        assert "NBD server" in other.domain_backup_cleanup(ref, 0)
        assert [one.suffix for one in state.glob(f"{file.stem}.*")] == [".lock"]


@ALONE
def test_a_server_that_somebody_else_exports_on(
    server: fake_server.Server,
    tmp_path: pathlib.Path,
    state: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It stays, and no other backup can begin: whoever stops ours gets to know why."""

    def run(line: str) -> str:
        assert virsh_backup.main(["-c", f"qmp://{server.path}", line]) == 0
        return capsys.readouterr().err

    start = f"backup-start-as 1 --unix {tmp_path}/nbd.sock"
    assert run(start) == ""
    with monitor.SocketMonitor(str(server.path)) as qemu:
        [disk, *_] = block.parse_block(qemu.execute(monitor_json.query_block()))
        assert disk.medium is not None
        theirs = {"type": "nbd", "id": "theirs", "node-name": disk.medium.node}
        qemu.execute(monitor_json.Command("block-export-add", theirs))
    words = "warning: NBD server left running: somebody else exports on it: 'theirs'\n"
    assert run("backup-stop 1") == words


@ALONE
def test_a_backup_that_another_one_stopped_does_not_come_back(
    server: fake_server.Server, state: pathlib.Path, xml: str
) -> None:
    with (
        contextlib.closing(driver.QmpDriver(str(server.path))) as own,
        contextlib.closing(driver.QmpDriver(str(server.path))) as other,
    ):
        [ref] = own.list_domains()
        id = given_up_without_a_note(own, ref, xml, state)
        stopped = failure(lambda: other.domain_backup_stop(ref, 0))
        assert "its backup job disappeared" in str(stopped)
        assert own._domain.job.is_over(id)
        other.domain_backup_start(ref, xml, 0)
        other.domain_backup_stop(ref, 0)
        assert "given up, as a test said so" in str(failure(lambda: own.domain_backup_stop(ref, 0)))
        own.domain_backup_start(ref, xml, 0)
        own.domain_backup_stop(ref, 0)


@ALONE
def test_why_a_backup_was_given_up_is_told_once_that_can_be_noted(
    server: fake_server.Server, state: pathlib.Path, xml: str
) -> None:
    """Its status is there again, as where a file system was mounted anew."""
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        told: list[hypervisor.Event] = []
        own.event_register(told.append)
        id = given_up_without_a_note(own, ref, xml, state)
        waiting.until(lambda: told)
        assert own._domain.job.is_over(id)
        assert own.domain_backup_get_info(ref, 0).state == "failed"
        assert "given up, as a test said so" in str(failure(lambda: own.domain_backup_stop(ref, 0)))


@ALONE
def test_a_backup_that_is_looked_after_is_not_cleaned_up_for_want_of_a_status(
    server: fake_server.Server, state: pathlib.Path, xml: str
) -> None:
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        own.domain_backup_start(ref, xml, 0)
        own._domain._stop_watching()  # it would write it anew at some time
        for file in state.glob("*.json"):
            file.unlink()
        words = str(failure(lambda: own.domain_backup_cleanup(ref, 0)))
        assert "is running: backup-stop ends it" in words
        own.domain_backup_stop(ref, 0)


@ALONE
def test_a_stop_while_another_thread_looks_for_the_status(
    server: fake_server.Server, state: pathlib.Path, xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As who tells of its end does: the stop may forget the backup at any moment."""
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        own.domain_backup_start(ref, xml, 0)
        job = own._domain.job

        def stopped(found: object) -> bool:
            monkeypatch.undo()
            monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(state))
            own.domain_backup_stop(ref, 0)
            return False

        monkeypatch.setattr(job, "_is_noted", stopped)
        assert job.load() is None


@ALONE
def test_a_stop_of_what_began_while_it_waited(
    server: fake_server.Server, state: pathlib.Path, xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread: it is that which is over, and is not to end with the connection."""
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        stop = own._domain.job.stop

        def waiting(*args: Any) -> tuple[naming.BackupId, dict[str, str]]:
            own.domain_backup_start(ref, xml, hypervisor.START_AUTODESTROY)
            return stop(*args)

        monkeypatch.setattr(own._domain.job, "stop", waiting)
        own.domain_backup_stop(ref, 0)
        assert own._domain.own is None
        assert own._domain._watch is None


@ALONE
def test_a_start_that_cannot_be_undone_ends_with_the_connection(
    server: fake_server.Server, state: pathlib.Path, xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was interrupted as it had come to its end, say."""
    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        start, stop = own._domain.job.start, own._domain.job.stop

        def interrupted(*args: Any) -> None:
            start(*args)
            raise KeyboardInterrupt

        def refused(*args: Any, **options: Any) -> None:
            monkeypatch.setattr(own._domain.job, "stop", stop)
            raise errors.error(libvirt.VIR_ERR_OPERATION_TIMEOUT, "the scratch image hangs")

        monkeypatch.setattr(own._domain.job, "start", interrupted)
        monkeypatch.setattr(own._domain.job, "stop", refused)
        words = str(
            failure(lambda: own.domain_backup_start(ref, xml, hypervisor.START_AUTODESTROY))
        )
        assert "the scratch image hangs" in words
    assert own._domain.file.load() is None


@ALONE
def test_a_signal_s_handler_that_closes_waits_for_no_watch(
    server: fake_server.Server, state: pathlib.Path, xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That waits for the call in the middle of which the handler is."""
    monkeypatch.setattr(watch, "LOOK", 0.0)
    look = verdict.look
    took: list[float] = []

    def interrupted(*args: Any) -> backup_conf.BackupInfo:
        time.sleep(2 * watch.LONGEST)  # the watch waits by then
        begin = time.monotonic()
        own.close()
        took.append(time.monotonic() - begin)
        return look(*args)

    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        own.domain_backup_start(ref, xml, hypervisor.START_AUTODESTROY)
        monkeypatch.setattr(verdict, "look", interrupted)
        own.domain_backup_get_info(ref, 0)
    assert took[0] < watch._JOIN / 2
    ours = ("virtbackup-watch", "virtbackup-end")
    waiting.until(lambda: not any(one.name in ours for one in threading.enumerate()))
    assert not list(state.glob("*.json"))


def test_a_signal_s_handler_that_looks_breaks_no_call(
    server: fake_server.Server, xml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A monitor serves one client at a time, which the call is that the handler is in the middle
    of."""
    freeze = process.Run.freeze
    told: list[object] = []

    def interrupted(run: process.Run) -> None:
        told.append(own.is_alive())
        for look in (own.list_domains, lambda: own.domain_get_state(ref)):
            with pytest.raises(status.Interrupted):
                look()
        freeze(run)

    with contextlib.closing(driver.QmpDriver(str(server.path))) as own:
        [ref] = own.list_domains()
        monkeypatch.setattr(process.Run, "freeze", interrupted)
        own.domain_backup_start(ref, xml, 0)
        assert told == [True]
        own.domain_backup_stop(ref, 0)
        assert own.list_domains() == [ref]
