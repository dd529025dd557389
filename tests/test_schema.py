# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every command that the driver sends to a QEMU is valid by that QEMU's schema.

The QEMUs are those that were recorded, and those of libvirt's ``*.replies`` files in the directory
named by VIRTBACKUP_REPLIES. Each takes every kind of backup, good and failing, by the driver's own
code; a command is refused at each step, so that what undoes it is sent, too.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import pytest

from tests import canned_qemu, conftest, replies, schema
from virtbackup import errors, hypervisor, runtime
from virtbackup.conf import backup_conf
from virtbackup.qemu import (
    capabilities,
    domain,
    domain_obj,
    job,
    monitor_json,
    nbdserver,
    queries,
    recording,
    starting,
    status,
    sweep,
    watch,
)

RECORDINGS = pathlib.Path(job.__file__).parents[1] / "recordings"
REPLIES = os.environ.get("VIRTBACKUP_REPLIES")
SHIPPED = sorted(RECORDINGS.glob("*.jsonl"))
THEIRS = sorted(pathlib.Path(REPLIES).glob("*.replies")) if REPLIES else []
assert THEIRS or not REPLIES, f"no *.replies in VIRTBACKUP_REPLIES={REPLIES}"
FILES = [*SHIPPED, *THEIRS]

QUERIES = ("query-", "x-debug-query-", "qom-list", "qom-get", "qmp_capabilities")


@functools.cache
def said_by(path: pathlib.Path) -> replies.Replies:
    if path.suffix == ".replies":
        return replies.parse(path.read_text())
    return replies.of_recording(recorded(path))


@functools.cache
def recorded(path: pathlib.Path) -> recording.Recording:
    return recording.parse(path.read_text())


@functools.cache
def disks_for(path: pathlib.Path) -> dict[str, canned_qemu.Reply]:
    """What is answered about disks; libvirt's files tell nothing of any."""
    own = path if path.suffix == ".jsonl" else RECORDINGS / "qemu-7.2.22.jsonl"
    return canned_qemu.disks_of(recorded(own))


CLOCK = canned_qemu.Clock()

CERTIFICATES = 'backup_tls_x509_cert_dir = "/tls"'


# --- backups of every kind ------------------------------------------------------------------------


class Bench:
    """A QEMU, and the driver's own code for its backups."""

    def __init__(
        self,
        path: pathlib.Path,
        directory: pathlib.Path,
        engine: capabilities.Engine | None,
        identity: domain.Identity | None = None,
    ) -> None:
        self.qemu = canned_qemu.CannedQemu(said_by(path), disks_for(path), CLOCK)
        self.identity = identity
        self.engine = engine
        self.file = status.StatusFile(str(directory / "qmp.sock"))
        self.job = self.another_job()
        self.address: backup_conf.Address = backup_conf.UnixAddress(str(directory / "nbd.sock"))

    def another_job(self) -> job.BackupJob:
        """The same, of a process that knows the status file alone."""
        return job.BackupJob(self.file, self._session)

    def set(self, text: str) -> None:
        """What virtbackup.conf says from now on."""
        path = self.file.path.with_suffix(".conf")
        path.write_text(text)
        os.environ["VIRTBACKUP_CONF"] = str(path)

    @contextlib.contextmanager
    def _session(self) -> Iterator[domain.Session]:
        with canned_qemu.session(self.qemu, canned_qemu.MONITOR, self.identity) as session:
            self.identity = session.identity
            yield session

    def identify(self) -> domain.Identity:
        with self._session() as session:
            return session.identity

    def start(self) -> None:
        images: list[watch.Image] = []
        definition = backup_conf.BackupDef(self.address)
        self.job.start(job.new_id(), images, definition, None, self.engine)
        watch.close_all(images)

    def stop(self) -> dict[str, str]:
        return self.job.stop()[1]

    @property
    def jobs(self) -> list[str]:
        return list(self.qemu.jobs)


def whole(bench: Bench) -> dict[str, str]:
    bench.start()
    bench.job.info()
    return bench.stop()


def good(bench: Bench) -> None:
    assert whole(bench) == {}


def paused(bench: Bench) -> None:
    bench.qemu.run_state = "paused"
    good(bench)


def over_tcp(bench: Bench) -> None:
    bench.address = backup_conf.IpAddress("127.0.0.1", 10809)
    good(bench)


def on_a_picked_port(bench: Bench) -> None:
    bench.address = backup_conf.IpAddress("127.0.0.1", autoport=True)
    good(bench)


def with_certificates(bench: Bench) -> None:
    bench.address = backup_conf.IpAddress("127.0.0.1", 10809)
    _with_tls(bench, CERTIFICATES, good)


def with_certificates_on_a_unix_socket(bench: Bench) -> None:
    _with_tls(bench, CERTIFICATES, good)


def with_certificates_of_which_nobody_knows(bench: Bench) -> None:
    _with_tls(bench, CERTIFICATES, of_which_nobody_knows)


def with_a_key(bench: Bench) -> None:
    bench.address = backup_conf.IpAddress("127.0.0.1", autoport=True)
    _with_tls(bench, 'backup_tls_psk_dir = "/tls"', good)


def _with_tls(bench: Bench, settings: str, kind: Callable[[Bench], None]) -> None:
    bench.set(settings)
    bench.address = dataclasses.replace(bench.address, tls=True)
    try:
        kind(bench)
    except errors.Error as failure:
        assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED
        assert "has no TLS for exports" in str(failure)
        caps = bench.identify().capabilities
        unix = isinstance(bench.address, backup_conf.UnixAddress)
        assert not can_tls(caps) or (unix and caps.version < (7, 0, 0))


def can_tls(caps: capabilities.Capabilities) -> bool:
    return "tls-creds" in str(caps.features) and "object-add" in caps.commands


def with_a_job_that_ended(bench: Bench) -> None:
    bench.start()
    bench.qemu.end_job(bench.jobs[0], "Input/output error")
    bench.job.info()
    assert len(bench.stop()) == 1


def with_a_guest_that_was_stopped(bench: Bench) -> None:
    bench.start()
    bench.qemu.run_state, bench.qemu.io_status = "io-error", "nospace"
    bench.stop()


def with_disks_that_were_unplugged(bench: Bench) -> None:
    bench.start()
    bench.qemu.unplugged = {"vda", "sdb"}
    bench.stop()


def that_is_given_up(bench: Bench) -> None:
    bench.start()
    running = bench.file.load()
    assert running is not None
    bench.job.give_up(running.id, "given up")
    bench.stop()


def of_which_nobody_knows(bench: Bench) -> None:
    """What a crash left, found by its names, and by what QEMU's process listens on."""
    bench.start()
    bench.file.remove()
    bench.identity = dataclasses.replace(bench.identify(), process=runtime.this_process())
    bench.another_job().cleanup()
    if "query-block-exports" not in bench.identify().capabilities.commands:
        bench.qemu.clean()  # such a QEMU does not tell whose an export is, or even a job


def in_an_iothread(bench: Bench) -> None:
    """Refused by QEMUs that would die of it."""
    bench.qemu.iothread = True
    with contextlib.suppress(errors.Error):
        bench.start()
        bench.stop()


class Asked(queries.QmpQueries):
    """The driver, for what libvirt's clients ask."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._bench = bench
        self._identity = bench.identify()
        self._domain = domain_obj.DomainObj(bench.file, bench._session)

    @contextlib.contextmanager
    def _session(self) -> Iterator[domain.Session]:
        with self._bench._session() as session:
            yield session

    def domain_get_state(self, ref: hypervisor.DomainRef) -> tuple[int, int]:
        with self._session() as session:
            return domain.state(session.qemu, session.capabilities)


def ask(bench: Bench) -> None:
    """All that may be asked of a QEMU and its disks; of a process without a guest not all may."""
    driver = Asked(bench)
    ref = bench.identify().ref
    driver.domain_get_info(ref)
    with bench._session() as session:
        disks = [disk.target for disk in bench.job.disks(session) if disk.medium]
    for disk in disks:
        assert driver.domain_get_block_info(ref, disk, 0)[0]
        assert driver.domain_get_block_job_info(ref, disk, 0) is None
    for deed in (
        lambda: driver.domain_block_stats_flags(ref, "", 0),
        lambda: driver.domain_suspend(ref),
        lambda: driver.domain_monitor_command(ref, "info status", 1),
    ):
        try:
            deed()
        except errors.Error as failure:
            assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED
            assert not bench.identify().capabilities.devices
    bench.qemu.run_state = "paused"
    if bench.identify().capabilities.devices:
        driver.domain_resume(ref)
    bench.qemu.run_state = "running"


KINDS: list[Callable[[Bench], None]] = [
    good, paused, over_tcp, on_a_picked_port, with_certificates, with_a_key,
    with_certificates_on_a_unix_socket,
    with_certificates_of_which_nobody_knows, with_a_job_that_ended, with_a_guest_that_was_stopped,
    with_disks_that_were_unplugged, that_is_given_up, of_which_nobody_knows, in_an_iothread,
]  # fmt: skip


class Refusal:
    """Refuses the command that is the NUMBERth, from 0, of those that change something."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.refused = ""

    def __call__(self, command: monitor_json.Command) -> bool:
        if self.refused or command.execute.startswith(QUERIES):
            return False
        self._left -= 1
        if self._left < 0:
            self.refused = command.execute
        return bool(self.refused)


def sent_by(path: pathlib.Path, directory: pathlib.Path) -> list[monitor_json.Command]:
    """All that the driver says to the QEMU of PATH, whatever happens."""
    first = Bench(path, directory, None)
    identity = first.identify()
    sent = first.qemu.sent
    if "query-named-block-nodes" in identity.capabilities.commands:
        ask(first)
    try:
        identity.capabilities.check_backup()
    except errors.Error as failure:
        assert failure.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED
        with pytest.raises(errors.Error):
            first.start()
        assert all(command.execute.startswith(QUERIES) for command in sent)
        return sent
    for engine in engines(identity.capabilities):
        for kind in KINDS:
            bench = Bench(path, directory, engine, identity)
            kind(bench)
            assert bench.qemu.is_clean(), kind.__name__
            sent += bench.qemu.sent
        tls = can_tls(identity.capabilities)
        picked = backup_conf.IpAddress("127.0.0.1", tls=tls, autoport=True)
        for address in (first.address, picked):
            sent += sent_when_refused(path, directory, engine, identity, address)
    return sent


def sent_when_refused(
    path: pathlib.Path,
    directory: pathlib.Path,
    engine: capabilities.Engine,
    identity: domain.Identity,
    address: backup_conf.Address,
) -> Iterator[monitor_json.Command]:
    """A good backup with a command refused: the first at first, a later one each time."""
    number = 0
    while True:
        bench = Bench(path, directory, engine, identity)
        bench.address = address
        bench.set(CERTIFICATES)
        bench.qemu.refuse = refusal = Refusal(number)
        with contextlib.suppress(errors.Error):
            whole(bench)
        if not refusal.refused:
            return
        with contextlib.suppress(errors.Error):
            bench.stop()
        bench.job.cleanup()
        assert bench.qemu.is_clean(), f"{refusal.refused}, command {number}, was refused"
        yield from bench.qemu.sent
        number += 1 if conftest.long() else 5


def engines(caps: capabilities.Capabilities) -> Iterator[capabilities.Engine]:
    candidates: tuple[capabilities.Engine, ...] = ("classic", "hybrid")
    for engine in candidates:
        with contextlib.suppress(errors.Error):
            caps.check_engine(engine)
            yield engine


@pytest.fixture(autouse=True)
def places(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTBACKUP_CONF", os.devnull)
    for variable in ("VIRTBACKUP_STATE_DIR", "VIRTBACKUP_SCRATCH_DIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr(sweep, "time", CLOCK)
    paths = (canned_qemu.MONITOR, str(tmp_path / "nbd.sock"))
    listening = tuple(map(backup_conf.UnixAddress, paths))
    monkeypatch.setattr(nbdserver, "listening", lambda pid: listening)
    monkeypatch.setenv("PATH", "")  # no time for asking whether a file system hangs


SAVES: list[tuple[str, str | None, tuple[str | None, str | None]]] = [
    ("qemu-10.0.13", None, ("backup", None)),
    ("qemu-10.0.13", "blockdev-mirror", ("save", "disk 'sdb': .* 'blockdev-mirror': refused")),
    ("qemu-10.0.13", "blockdev-add", ("save", "disk 'sdb': .* 'blockdev-add': refused")),
    ("qemu-10.0.13", "as it is", ("save", "only where that was started over libvirt")),
    ("qemu-5.2.0", "as it is", ("backup", None)),
    ("storage-daemon-10.0.13", "as it is", (None, None)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "refused", "expected"), SAVES)
def test_it_is_told_what_becomes_of_a_save(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str, refused: str | None,
    expected: tuple[str | None, str | None],
) -> None:  # fmt: skip
    """Where QEMU does not give way, by its own words or by ours."""
    bench = Bench(RECORDINGS / f"{name}.jsonl", tmp_path, None)
    if refused != "as it is":
        monkeypatch.setattr(starting, "why_kept", lambda *_: None)
    bench.qemu.refuse = lambda command: command.execute == refused and "-yield" in str(command)
    bench.start()
    info = bench.job.info()
    assert info.save_failure == expected[0]
    assert re.search(expected[1], info.save_reason or "") if expected[1] else not info.save_reason
    assert bench.stop() == {}
    assert bench.qemu.is_clean()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_is_valid(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    said = said_by(path)
    if said.schema is None:
        pytest.skip("a QEMU without a schema")
    known = schema.Schema.parse(said.schema)
    names = {command["name"] for command in said.commands}
    seen = set()
    wrong = []
    for command in sent_by(path, tmp_path):
        text = json.dumps(command.arguments, sort_keys=True)
        if (command.execute, text) not in seen:
            seen.add((command.execute, text))
            wrong += known.problems(command.execute, command.arguments)
            if command.execute not in names:
                wrong.append(f"{command.execute}: not in query-commands")
    assert not wrong


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recorded_command_is_valid(path: pathlib.Path) -> None:
    found = recorded(path)
    known = schema.Schema.parse(found.reply("query-qmp-schema"))
    for exchange in found.exchanges():
        assert known.problems(exchange.execute, exchange.arguments) == []


# --- the validator itself -------------------------------------------------------------------------

NEWEST = schema.Schema.parse(recorded(RECORDINGS / "qemu-11.1.3.jsonl").reply("query-qmp-schema"))
OLDER = schema.Schema.parse(recorded(RECORDINGS / "qemu-7.2.22.jsonl").reply("query-qmp-schema"))

QCOW2 = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/x"}}
BACKUP = {"device": "d", "target": "t", "sync": "none", "job-id": "j"}


def changed(arguments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**arguments, **{name.replace("_", "-"): value for name, value in changes.items()}}


VALID: list[tuple[str, dict[str, Any]]] = [
    ("query-status", {}),
    ("blockdev-add", QCOW2),
    ("blockdev-add", changed(QCOW2, file="node")),
    ("blockdev-add", changed(QCOW2, backing=None)),
    ("blockdev-add", changed(QCOW2, backing="node", lazy_refcounts=True)),
    ("blockdev-backup", changed(BACKUP, speed=1, on_cbw_error="break-snapshot")),
    ("transaction", {"actions": [{"type": "blockdev-backup", "data": BACKUP}]}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/x"}}}),
    ("block-export-add", {"type": "nbd", "id": "i", "node-name": "n", "bitmaps": ["a"]}),
    ("block-export-add",
     {"type": "nbd", "id": "i", "node-name": "n", "bitmaps": [{"node": "n", "name": "a"}]}),
    ("qom-set", {"path": "/x", "property": "p", "value": [1, {"any": "thing"}]}),
]  # fmt: skip

INVALID: list[tuple[str, dict[str, Any], list[str]]] = [
    ("no-such-command", {}, ["no-such-command: no such command"]),
    ("SHUTDOWN", {}, ["SHUTDOWN: no such command"]),
    ("query-status", {"x": 1}, ["query-status: 'x' is unknown"]),
    ("blockdev-del", {}, ["blockdev-del: 'node-name' is missing"]),
    ("blockdev-del", {"node-name": None}, ["blockdev-del.node-name: None is no string"]),
    ("blockdev-del", {"node-name": 1}, ["blockdev-del.node-name: 1 is no string"]),
    ("blockdev-backup", changed(BACKUP, speed="1"), ["blockdev-backup.speed: '1' is no int"]),
    ("blockdev-backup", changed(BACKUP, speed=True), ["blockdev-backup.speed: True is no int"]),
    ("blockdev-backup", changed(BACKUP, auto_dismiss=0),
     ["blockdev-backup.auto-dismiss: 0 is no boolean"]),
    ("blockdev-backup", changed(BACKUP, sync="all"),
     ["blockdev-backup.sync: 'all' is none of top, full, none, incremental, bitmap"]),
    ("transaction", {"actions": {}}, ["transaction.actions: {} is no array"]),
    ("transaction", {"actions": [1]}, ["transaction.actions[0]: 1 is no object"]),
    ("transaction", {"actions": [{"type": "abort", "data": {"x": 1}}]},
     ["transaction.actions[0].data: 'x' is unknown"]),
    ("transaction", {"actions": [{"type": "blockdev-backup", "data": {"device": "d"}}]},
     ["transaction.actions[0].data: 'sync' is missing",
      "transaction.actions[0].data: 'target' is missing"]),
    ("blockdev-add", changed(QCOW2, file=1), ["blockdev-add.file: 1 is no alternative"]),
    ("blockdev-add", changed(QCOW2, file={"driver": "file"}),
     ["blockdev-add.file: 'filename' is missing"]),
    ("blockdev-add", changed(QCOW2, file={"driver": "file", "filename": "/x", "file": "n"}),
     ["blockdev-add.file: 'file' is unknown"]),
    # lazy-refcounts is qcow2's, not raw's
    ("blockdev-add", {"driver": "raw", "file": "n", "lazy-refcounts": True},
     ["blockdev-add: 'lazy-refcounts' is unknown"]),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"host": "h", "port": "1"}}},
     ["nbd-server-start.addr.data: 'path' is missing",
      "nbd-server-start.addr.data: 'host' is unknown",
      "nbd-server-start.addr.data: 'port' is unknown"]),
    ("nbd-server-add", {"device": "d"},
     ["nbd-server-add: 'nbd-server-add' is deprecated, there is 'block-export-add'"]),
    ("job-dismiss", {"id": []}, ["job-dismiss.id: [] is no string"]),
    ("query-kvm", {}, ["query-kvm: 'query-kvm' is deprecated"]),
    ("block-job-dismiss", {"id": "j"},
     ["block-job-dismiss: 'block-job-dismiss' is deprecated, there is 'job-dismiss'"]),
    ("eject", {"device": "d"}, ["eject.device: 'eject.device' is deprecated"]),
    ("transaction", {"actions": [{"type": "drive-backup", "data": BACKUP}]},
     ["transaction.actions[0].type: 'drive-backup' is deprecated, there is 'blockdev-backup'"]),
]  # fmt: skip


@pytest.mark.parametrize(("execute", "arguments"), VALID)
def test_valid(execute: str, arguments: dict[str, Any]) -> None:
    assert NEWEST.problems(execute, arguments) == []


@pytest.mark.parametrize(("execute", "arguments", "problems"), INVALID)
def test_invalid(execute: str, arguments: dict[str, Any], problems: list[str]) -> None:
    assert NEWEST.problems(execute, arguments) == problems


def test_what_is_valid_depends_on_the_schema() -> None:
    arguments = changed(BACKUP, on_cbw_error="break-snapshot")
    assert OLDER.problems("blockdev-backup", arguments) == [
        "blockdev-backup: 'on-cbw-error' is unknown"
    ]
    assert OLDER.problems("block-job-dismiss", {"id": "j"}) == []


def test_the_old_may_be_used_where_the_new_is_absent() -> None:
    without = {n: e for n, e in OLDER.entities.items() if n != "block-export-add"}
    assert OLDER.problems("nbd-server-add", {"device": "d"})
    assert schema.Schema(without).problems("nbd-server-add", {"device": "d"}) == []


def test_enums_without_features_are_read_too() -> None:
    entities: list[schema.Entity] = [
        {"name": "c", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
        {"name": "0", "meta-type": "object", "members": [{"name": "e", "type": "1"}]},
        {"name": "1", "meta-type": "enum", "values": ["a", "b"]},
    ]
    old = schema.Schema.parse(entities)
    assert old.problems("c", {"e": "a"}) == []
    assert old.problems("c", {"e": "c"}) == ["c.e: 'c' is none of a, b"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_change_of_a_recorded_command_is_seen(path: pathlib.Path) -> None:
    """A member more or a value of another type, anywhere in it."""
    found = recorded(path)
    known = schema.Schema.parse(found.reply("query-qmp-schema"))
    for exchange in found.exchanges():
        for spoilt in _spoilt(exchange.arguments):
            assert known.problems(exchange.execute, spoilt), (exchange.execute, spoilt)


def _spoilt(value: Any) -> Iterator[Any]:
    match value:
        case dict():
            yield {**value, "no-such-member": 1}
            for key, item in value.items():
                for other in (*_spoilt(item), 1.5):
                    yield {**value, key: other}
        case list():
            for number, item in enumerate(value):
                for other in _spoilt(item):
                    yield [*value[:number], other, *value[number + 1 :]]


# --- libvirt's format -----------------------------------------------------------------------------

VERSION = '{"return": {"qemu": {"micro": 1, "minor": 2, "major": 3}, "package": ""}, "id": "v"}'
COMMANDS = '{"return": [{"name": "quit"},\n\n {"name": "qmp_capabilities"}], "id": "c"}'
SCHEMA = """
{
  "return": [
    {"name": "quit", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
    {"name": "0", "meta-type": "object", "members": []}
  ]
}
"""


def test_only_replies() -> None:
    text = "\n\n".join(['{"return": {}}', VERSION, '{"return": []}', COMMANDS, SCHEMA])
    found = replies.parse(f"\n{text}\n\n")
    assert found.version["qemu"] == {"major": 3, "minor": 2, "micro": 1}
    assert [command["name"] for command in found.commands] == ["quit", "qmp_capabilities"]
    assert found.schema is not None
    assert schema.Schema.parse(found.schema).commands == {"quit"}


def test_commands_between_the_replies() -> None:
    text = (
        '{"execute": "query-version", "id": "v"}\n\n' + VERSION + "\n\n"
        '{"execute": "query-commands", "id": "c"}\n\n' + COMMANDS + "\n\n"
        '{"execute": "query-events", "id": "e"}\n\n{"return": [{"name": "STOP"}], "id": "e"}\n\n'
        '{"execute": "query-kvm"}\n\n{"error": {"class": "GenericError", "desc": "no"}}'
    )
    found = replies.parse(text)
    assert (len(found.commands), found.schema) == (2, None)


def test_a_greeting_tells_the_version_and_a_schema_the_commands() -> None:
    found = replies.parse(
        '{"QMP": {"version": {"qemu": {"major": 2, "minor": 5, "micro": 0}, "package": ""}}}'
        + SCHEMA
    )
    assert found.version["qemu"]["major"] == 2
    assert found.commands == [{"name": "quit"}]


@pytest.mark.parametrize("text", ["", "no JSON", '{"return": {}}', '{"return": ', COMMANDS])
def test_what_is_no_replies_file(text: str) -> None:
    with pytest.raises(ValueError, match=r"no reply tells|Expecting"):
        replies.parse(text)
