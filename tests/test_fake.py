# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fake QEMU that is made from a recording answers as the recorded one did.

What it says differently on purpose is named here; tests/live/test_replay.py has the proof on what
was not recorded.
"""

import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

import virtbackup
from tests import json_mutations, replayed
from virtbackup.qemu import qcow2, recording, traffic
from virtbackup.test import fake, fake_state, faults

HERE = pathlib.Path(__file__).parent
PACKAGE = HERE.parent / "virtbackup"
SHIPPED = sorted((PACKAGE / "recordings").glob("*.jsonl"))
SIZE = 4 << 20
"""Of the disks in all recordings, and of the scratch images made for them."""

Message = dict[str, Any]


class Image:
    """A scratch image."""

    def __init__(self, key: object, size: int = SIZE) -> None:
        self.key = key
        self.size = qcow2.file_size(size)
        self.header = qcow2.empty_image(size)[0][1]

    def actual_size(self) -> int:
        return 1 << 16

    def format(self, size: int) -> None:
        self.header = qcow2.empty_image(size)[0][1]

    def close(self) -> None:
        pass


class Host:
    """A world in which every file is an empty scratch image."""

    def __init__(self) -> None:
        self.closed: list[int] = []
        self.address: Mapping[str, Any] | None = None
        self.readers: dict[str, int] = {}

    def now(self) -> float:
        return 0.5

    def open_image(self, path: str | int, readonly: bool) -> fake_state.Image:
        if str(path).startswith("/nothere"):
            raise FileNotFoundError(2, "No such file or directory")
        return Image(path)

    def create_file(self, path: str, size: int) -> None:
        if path.startswith("/nothere"):
            raise FileNotFoundError(2, "No such file or directory")

    def close_fd(self, fd: int) -> None:
        self.closed.append(fd)

    def start_server(self, address: Mapping[str, Any], fd: int | None, tls: bool) -> None:
        self.address = address

    def stop_server(self) -> None:
        self.address = None

    def clients(self, export: str) -> int:
        return self.readers.get(export, 0)

    def disconnect(self, export: str) -> None:
        self.readers.pop(export, None)


class Client:
    """What is said to a fake, without a wire."""

    def __init__(self, recorded: recording.Recording, rules: tuple[faults.Rule, ...] = ()) -> None:
        self.recorded = recorded
        self.host = Host()
        self.fake = fake.Fake(recorded, self.host, rules)
        self.fake.connect()
        self.ends: list[fake.Answer] = []
        self.events: list[Message] = []

    def __call__(self, execute: str, *fds: int, **arguments: Any) -> Message | None:
        """The reply, None where there is none."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.send({"execute": execute, "arguments": names}, *fds)

    def send(self, message: Any, *fds: int) -> Message | None:
        self.fake.take_fds(fds)
        answer = self.fake.receive(json.dumps(message).encode())
        self.ends.append(answer)
        self.events += [told for told in answer.messages if "event" in told]
        replies = [dict(told) for told in answer.messages if "event" not in told]
        return replies[0] if replies else None

    def done(self, execute: str, *fds: int, **arguments: Any) -> Any:
        reply = self(execute, *fds, **arguments)
        assert "return" in (reply or {}), reply
        assert reply is not None
        return reply["return"]

    def refused(self, execute: str, **arguments: Any) -> str:
        reply = self(execute, **arguments)
        assert reply is not None
        return str(reply["error"]["desc"])


def load(path: pathlib.Path) -> recording.Recording:
    return recording.parse(path.read_text())


@pytest.fixture(params=["qemu-7.2.22", "qemu-11.1.3"])
def client(request: pytest.FixtureRequest) -> Client:
    found = Client(load(PACKAGE / "recordings" / f"{request.param}.jsonl"))
    found.done("qmp_capabilities")
    return found


@pytest.fixture(scope="module")
def client_72() -> Client:
    found = Client(load(PACKAGE / "recordings" / "qemu-7.2.22.jsonl"))
    found.done("qmp_capabilities")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_fake_answers_as_the_recorded_qemu_did(path: pathlib.Path) -> None:
    recorded = load(path)
    fake = Client(recorded)
    for number, exchange in enumerate(recorded.exchanges()):
        if exchange.execute == "qmp_capabilities":
            fake.fake.connect()
        fds = (1000 + number,) if exchange.execute == "add-fd" else ()
        message = {"execute": exchange.execute, "arguments": exchange.arguments, "id": "x"}
        reply = fake.send(message, *fds)
        assert reply is not None
        assert reply.pop("id") == "x"
        real, ours = replayed.comparable(exchange.reply), replayed.comparable(reply)
        assert ours == real, f"{exchange.execute} {exchange.arguments}"
        if not exchange.execute.endswith("graph"):  # an edge may come without permissions
            assert replayed.shape(reply) == replayed.shape(exchange.reply)


def test_recordings_of_an_earlier_make() -> None:
    """One backup, over several files and connections, without a schema."""
    files = ("list", "domblklist", "backup-start", "backup-info", "backup-stop", "backup-cleanup")
    lines = [
        line
        for name in files
        for line in load(HERE / "monitordata" / "7.2.22" / f"{name}.jsonl").lines
    ]
    recorded = recording.Recording(tuple(lines))
    fake = Client(recorded)
    for number, exchange in enumerate(recorded.exchanges()):
        if exchange.execute == "qmp_capabilities":
            fake.fake.connect()
        fds = (1000 + number,) if exchange.execute == "add-fd" else ()
        reply = fake.send({"execute": exchange.execute, "arguments": exchange.arguments}, *fds)
        assert replayed.comparable(reply) == replayed.comparable(exchange.reply)


# --- what is simulated ---

SCRATCH = {"driver": "qcow2", "node_name": "S", "file": {"driver": "file", "filename": "/s"}}
BACKUP = {"device": "libvirt-1-format", "job-id": "j", "target": "S", "sync": "none"}
SERVER = {"type": "unix", "path": "/nbd"}
NBD = {"type": "unix", "data": {"path": "/nbd"}}


def backup(client: Client, **more: Any) -> None:
    client.done("blockdev-add", **SCRATCH, backing=None)
    client.done("transaction", actions=[{"type": "blockdev-backup", "data": {**BACKUP, **more}}])


def test_a_job_that_dismisses_itself(client: Client) -> None:
    backup(client)
    client.done("block-job-cancel", device="j")
    statuses = [e["data"]["status"] for e in client.events if e["event"] == "JOB_STATUS_CHANGE"]
    assert statuses[0] == "created"
    assert statuses[-3:] == ["aborting", "concluded", "null"]
    assert client.done("query-jobs") == []
    reply = client("block-job-cancel", device="j")
    assert reply == {"error": {"class": "DeviceNotActive", "desc": "Block job 'j' not found"}}


def test_events_have_times(client: Client) -> None:
    client.done("stop")
    [event] = client.events
    assert event == {"event": "STOP", "timestamp": {"seconds": 0, "microseconds": 500000}}


def test_descriptors_go_while_the_guest_runs(client: Client) -> None:
    assert client.done("add-fd", 7, opaque="note") == {"fdset-id": 0, "fd": 7}
    assert client.done("add-fd", 8, fdset_id=5) == {"fdset-id": 5, "fd": 8}
    client.done("stop")
    client.done("remove-fd", fdset_id=0)
    stays = [0] if client.fake.version < (9, 1, 0) else []
    assert [fdset["fdset-id"] for fdset in client.done("query-fdsets")] == [*stays, 5]
    client.done("cont")
    assert [fdset["fdset-id"] for fdset in client.done("query-fdsets")] == [*stays, 5]
    client.fake.connect()  # with the client before
    client.done("qmp_capabilities")
    assert client.done("query-fdsets") == [{"fdset-id": 5, "fds": [{"fd": 8}]}]
    assert client.host.closed == [7]


def test_one_descriptor_of_a_set_goes(client: Client) -> None:
    for fd in (7, 8):
        client.done("add-fd", fd, fdset_id=5)
    words = "File descriptor named 'fdset-id:5, fd:9' not found"
    assert client.refused("remove-fd", fdset_id=5, fd=9) == words
    client.done("remove-fd", fdset_id=5, fd=7)
    assert client.done("query-fdsets") == [{"fdset-id": 5, "fds": [{"fd": 8}]}]
    assert client.host.closed == [7]


def test_the_first_of_several_descriptors_is_taken(client: Client) -> None:
    assert client.done("add-fd", 7, 8, fdset_id=5) == {"fdset-id": 5, "fd": 7}
    assert client.host.closed == [8]
    words = "No file descriptor supplied via SCM_RIGHTS"
    assert client.refused("add-fd") == words


def test_descriptors_that_are_refused_are_closed(client: Client) -> None:
    assert client("add-fd", 7, fdset_id=-1) == {
        "error": {
            "class": "GenericError",
            "desc": "Parameter 'fdset-id' expects a non-negative value",
        }
    }
    assert client("getfd", 8, fdname="8") == {
        "error": {
            "class": "GenericError",
            "desc": "Parameter 'fdname' expects a name not starting with a digit",
        }
    }
    assert client.host.closed == [7, 8]


def test_a_guest_that_stands_is_not_stopped(client: Client) -> None:
    rules = faults.parse('[{"command": "query-jobs", "stop": "io-error"}]')
    guest = Client(client.recorded, rules)
    guest.done("qmp_capabilities")
    guest.done("query-jobs")
    guest.done("stop")
    assert guest.done("query-status")["status"] == "io-error"


def test_a_file_that_is_named_twice_is_opened_twice(client: Client) -> None:
    image = {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": "/s"}}
    client.done("blockdev-add", node_name="S", **image, backing=image)
    [one, other] = client.fake.layer.images.values()
    assert one is not other
    client.done("blockdev-del", node_name="S")


@pytest.mark.parametrize(
    "text", ['{"execute": "blockdev-del", "arguments": {"node-name": "\\ud800"}}',
             '{"execute": "query-status", "id": NaN}']
)  # fmt: skip
def test_what_is_no_json(client: Client, text: str) -> None:
    [reply] = client.fake.receive(text.encode()).messages
    assert reply["error"]["desc"].startswith("JSON parse error")


def test_a_fdset_stays_while_a_node_has_it_open(client: Client) -> None:
    client.done("add-fd", 7)
    file = {"driver": "file", "filename": "/dev/fdset/0"}
    client.done("blockdev-add", driver="qcow2", node_name="S", file=file, backing=None)
    client.done("remove-fd", fdset_id=0)
    assert client.done("query-fdsets") == [{"fdset-id": 0, "fds": []}]
    client.done("blockdev-del", node_name="S")
    assert client.done("query-fdsets") == []


def test_descriptors_that_nobody_takes_are_closed(client: Client) -> None:
    client.done("query-status", 7)
    client.done("getfd", 8, fdname="x")
    client.done("getfd", 9, fdname="x")
    client.fake.connect()
    client.fake.close()
    assert client.host.closed == [7, 8, 9]


def test_a_listening_descriptor(client: Client) -> None:
    client.done("getfd", 8, fdname="x")
    client.done("nbd-server-start", addr={"type": "fd", "data": {"str": "x"}})
    client.done("nbd-server-stop")
    assert client.host.closed == []


def test_an_export_that_is_read(client: Client) -> None:
    client.done("nbd-server-start", addr=NBD)
    client.done("block-export-add", type="nbd", id="e", node_name="libvirt-1-format", name="n")
    client.host.readers["e"] = 1
    assert client.refused("block-export-del", id="e") == "export 'e' still in use"
    client.done("block-export-del", id="e", mode="hard")
    assert client.host.readers == {}


def test_unplugging_during_a_backup(client: Client) -> None:
    backup(client)
    client.done("device_del", id="vda")
    assert client.events[-1]["event"] == "DEVICE_DELETED"
    assert not any("vda" in drive["qdev"] for drive in client.done("query-block"))
    assert "is busy" in client.refused("blockdev-del", node_name="S")
    client.done("job-cancel", id="j")
    client.done("blockdev-del", node_name="S")
    client.done("blockdev-del", node_name="libvirt-1-format")


def test_quit(client: Client) -> None:
    client.done("nbd-server-start", addr=NBD)
    client.done("quit")
    assert client.events[-1]["event"] == "SHUTDOWN"
    assert client.ends[-1].quit
    assert client.host.address is None


@pytest.mark.parametrize(
    ("execute", "arguments"),
    [
        ("blockdev-add", {"driver": "nbd", "node-name": "n", "server": SERVER, "export": "x"}),
        ("eject", {"id": "sdc"}),
        ("human-monitor-command", {"command-line": "info block"}),
        ("blockdev-backup", {**BACKUP, "sync": "full"}),
    ],
)
def test_what_is_not_simulated_says_so(client: Client, execute: str, arguments: Message) -> None:
    client.done("blockdev-add", **SCRATCH, backing=None)
    reply = client.send({"execute": execute, "arguments": arguments})
    assert reply is not None
    assert "not simulated" in reply["error"]["desc"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ([], "QMP input must be a JSON object"),
        (7, "QMP input must be a JSON object"),
        ({"execute": "query-block", "arguments": {"x": 1}}, "Parameter 'x' is unexpected"),
        ({"execute": "nope", "id": [1]}, "The command nope has not been found"),
    ],
)
def test_wrong_messages(client: Client, message: Any, words: str) -> None:
    reply = client.send(message)
    assert reply is not None
    assert reply["error"]["desc"] == words
    if isinstance(message, dict):
        assert reply.get("id") == message.get("id")


@pytest.mark.parametrize("depth", [10, 400, 5000])
def test_deep_messages(client: Client, depth: int) -> None:
    nodes = '{"driver": "raw", "node-name": "n", "file": ' * depth + '"x"' + "}" * depth
    line = f'{{"execute": "blockdev-add", "arguments": {nodes}}}'
    [reply] = client.fake.receive(line.encode()).messages
    assert "error" in reply


def test_endless_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "MAX_MESSAGE", 1000)
    with pytest.raises(ValueError, match="longer than 1000 bytes"):
        split(b'{"' + b"x" * 2000)


def test_nothing_is_done_before_the_negotiation() -> None:
    fake = Client(load(SHIPPED[0]))
    reply = fake("query-status")
    assert reply is not None
    assert reply["error"]["class"] == "CommandNotFound"
    assert "Expecting capabilities negotiation" in reply["error"]["desc"]


def test_commands_of_libvirts_own_backup(client: Client) -> None:
    """What libvirt 9.0 sent for virsh backup-begin and domjobabort, the disk's node alike."""
    text = (HERE / "trafficdata" / "libvirt-9.0-backup.log").read_text()
    said = [line.message for line in traffic.parse(text) if line.direction == "->"]
    assert len(said) == 15
    for message in said:
        reply = client.send(message)
        assert reply is not None
        assert "return" in reply, (message, reply)
    assert client.done("query-jobs") == []


# --- messages, however they come ---


def split(*pieces: bytes) -> list[bytes]:
    splitter = fake.Splitter()
    found = []
    for piece in pieces:
        splitter.receive_data(piece)
        while (message := splitter.next_message()) is not None:
            found.append(message)
    return found


MESSAGES = (b'{"a": "}{\\"\\\\"}', b'{"b": {"c": [{}]}}')


@pytest.mark.parametrize("between", [b"", b"\n", b" \r\n "])
def test_messages_are_split_however_they_are_cut(between: bytes) -> None:
    text = between.join((*MESSAGES, b""))
    assert split(text) == list(MESSAGES)
    assert split(*(bytes([byte]) for byte in text)) == list(MESSAGES)


def test_what_is_no_object_is_taken_by_the_line() -> None:
    assert split(b"nonsense\n", MESSAGES[0]) == [b"nonsense\n", MESSAGES[0]]


# --- recordings that are no beginning ---


def _lines(*exchanges: tuple[str, Any]) -> str:
    version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
    lines = [recording.Line("<-", {"QMP": {"version": version, "capabilities": []}})]
    for id, (execute, reply) in enumerate(exchanges):
        lines.append(recording.Line("->", {"execute": execute, "id": id}))
        lines.append(recording.Line("<-", {"return": reply, "id": id}))
    return recording.format(lines)


@pytest.mark.parametrize(
    ("exchanges", "words"),
    [
        ([], "no query-commands"),
        ([("query-commands", 7)], "no query-commands"),
        ([("query-commands", [{}])], "no query-commands"),
        ([("query-commands", []), ("query-qmp-schema", 7)], "not a schema"),
        ([("query-commands", []), ("query-block", [7])], "block info is not understood"),
        ([("query-commands", []), ("query-block", [{"inserted": {}}])], "not understood"),
        ([("query-commands", []), ("query-status", [])], "query-status is not understood"),
        ([("query-commands", []), ("query-jobs", [{"id": "x"}])], "while a block job ran"),
    ],
)
def test_recordings_that_no_fake_can_be_made_from(
    exchanges: list[tuple[str, Any]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        fake.Fake(recording.parse(_lines(*exchanges)), Host())


SOUND = load(PACKAGE / "recordings" / "qemu-7.2.22.jsonl").lines[:31]
SPOILT = {
    line.message["execute"]: number + 1
    for number, line in enumerate(SOUND)
    if line.direction == "->" and re.fullmatch(
        r"query-(block|named-block-nodes|commands|status|jobs)|x-debug.*", line.message["execute"]
    )
}  # fmt: skip
"""Query -> where its reply is; the schema is too large to be spoilt everywhere."""


@hypothesis.given(strategies.data())
def test_a_recording_with_anything_in_it(data: strategies.DataObject) -> None:
    """It is refused, or the fake that it makes answers everything."""
    number = SPOILT[data.draw(strategies.sampled_from(sorted(SPOILT)))]
    reply = SOUND[number].message["return"]
    path: json_mutations.Path = data.draw(
        strategies.sampled_from(list(json_mutations.paths(reply)))
    )
    remove: bool = data.draw(strategies.booleans())
    if path and remove:
        spoilt = json_mutations.removed(reply, path)
    else:
        spoilt = json_mutations.replaced(reply, path, data.draw(json_mutations.values))
    lines = list(SOUND)
    lines[number] = recording.Line("<-", {"id": lines[number].message["id"], "return": spoilt})
    try:
        fake = Client(recording.Recording(tuple(lines)))
    except ValueError:
        return
    fake("qmp_capabilities")
    for execute in ("query-block", "query-named-block-nodes", "x-debug-query-block-graph"):
        fake(execute)
    fake("blockdev-add", **SCRATCH, backing="libvirt-1-format")
    fake("transaction", actions=[{"type": "blockdev-backup", "data": BACKUP}])
    for execute in ("query-block", "query-named-block-nodes", "x-debug-query-block-graph"):
        fake(execute)
    fake("device_del", id="vda")
    fake("job-cancel", id="j")
    for node in ("S", "libvirt-1-format"):
        fake("blockdev-del", node_name=node)


@hypothesis.given(json_mutations.values)
def test_any_message(client_72: Client, message: Any) -> None:
    for sent in (message, {"execute": message}, {"execute": "blockdev-add", "arguments": message},
                 {"execute": "transaction", "arguments": {"actions": message}}):  # fmt: skip
        assert client_72.send(sent) is not None


# --- faults ---


def with_faults(*rules: Message) -> Client:
    found = Client(load(PACKAGE / "recordings" / "qemu-7.2.22.jsonl"),
                   faults.parse(json.dumps(rules)))  # fmt: skip
    found("qmp_capabilities")
    return found


def test_a_command_fails_at_its_nth_time() -> None:
    error = {"class": "GenericError", "desc": "no"}
    fake = with_faults({"command": "query-jobs", "nth": 2, "error": error})
    assert fake.done("query-jobs") == []
    assert fake("query-jobs") == {"error": error}
    assert fake.done("query-jobs") == []


def test_nothing_is_done_by_a_command_that_fails() -> None:
    error = {"class": "GenericError", "desc": "no"}
    fake = with_faults({"command": "sto?", "error": error})
    assert fake("stop") == {"error": error}
    assert fake.done("query-status")["running"]


@pytest.mark.parametrize(("when", "place"), [("before", 0), ("after", 1)])
def test_an_event_arrives(when: str, place: int) -> None:
    event = {"event": "BLOCK_IO_ERROR", "data": {"device": "vda"}}
    fake = with_faults({"command": "query-jobs", "when": when, "event": event})
    fake("query-jobs")
    message = fake.ends[-1].messages[place]
    assert message == {"timestamp": {"seconds": 0, "microseconds": 500000}, **event}


def test_jobs_end() -> None:
    fake = with_faults(
        {"command": "query-status", "cancel-job": "*"},
        {"command": "stop", "cancel-job": "k", "job-error": "No space left"},
    )
    backup(fake, **{"auto-dismiss": False})
    fake("query-status")
    assert fake.done("query-jobs")[0]["error"] == "Operation canceled"
    fake.done("job-dismiss", id="j")
    again = {**BACKUP, "job-id": "k", "auto-dismiss": False}
    fake.done("transaction", actions=[{"type": "blockdev-backup", "data": again}])
    fake("stop")
    assert fake.done("query-jobs")[0]["error"] == "No space left"
    assert "BLOCK_JOB_COMPLETED" in [event["event"] for event in fake.events]


def test_the_connection_ends() -> None:
    fake = with_faults({"command": "stop", "hang-up": True},
                       {"command": "cont", "when": "after", "hang-up": True})  # fmt: skip
    assert fake("stop") is None
    assert fake.ends[-1].hang_up
    assert fake("cont") == {"return": {}}
    assert fake.ends[-1].hang_up
    assert not fake.ends[-1].quit


def test_no_reply_comes_though_it_is_done() -> None:
    fake = with_faults({"command": "stop", "silent": True})
    assert fake("stop") is None
    assert not fake.done("query-status")["running"]


def test_the_guest_stands_and_goes_on() -> None:
    fake = with_faults({"command": "query-jobs", "stop": "io-error", "io-status": "nospace"})
    fake("query-jobs")
    assert fake.done("query-status")["status"] == "io-error"
    assert {drive["io-status"] for drive in fake.done("query-block")} == {"nospace"}
    fake.done("cont")
    assert {drive["io-status"] for drive in fake.done("query-block")} == {"ok"}


def test_qemu_ends_and_devices_go() -> None:
    fake = with_faults({"command": "stop", "quit": True},
                       {"command": "query-jobs", "unplug": "vda"})  # fmt: skip
    fake("query-jobs")
    assert fake.events[-1]["event"] == "DEVICE_DELETED"
    fake("stop")
    assert fake.ends[-1].quit


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "not JSON"),
        ("[" * 100000, "not JSON"),
        ("{}", "expected an array of rules"),
        ("[7]", "rule 1: expected an object"),
        ('[{"command": "a", "quit": true}, {"quit": true}]', "rule 2: 'command' is missing"),
        ('[{"command": "a"}]', "rule 1: nothing happens"),
        ('[{"command": "a", "nth": 1}]', "rule 1: nothing happens"),
        ('[{"command": 7, "quit": true}]', "rule 1: 'command' is no string"),
        ('[{"command": "a", "quit": false}]', "rule 1: 'quit' is not true"),
        ('[{"command": "a", "quit": 1}]', "rule 1: 'quit' is not true"),
        ('[{"command": "a", "nth": 0, "quit": true}]', "rule 1: 'nth' is no number"),
        ('[{"command": "a", "when": "now", "quit": true}]', "rule 1: 'when' is none of before"),
        ('[{"command": "a", "error": {"desc": "x"}}]', "rule 1: 'error' is no object"),
        ('[{"command": "a", "event": {"data": {}}}]', "rule 1: 'event' is no object"),
        ('[{"command": "a", "event": {"event": "E", "x": 1}}]', "rule 1: 'event' has more"),
        ('[{"command": "a", "when": "after", "silent": true}]', "rule 1: a reply cannot"),
        ('[{"command": "a", "stop": "x"}]', "rule 1: 'stop' is none of debug, inmigrate"),
        ('[{"command": "a", "io-status": "x"}]', "rule 1: 'io-status' is none of ok, failed"),
        ('[{"command": "a", "unplug": "\\ud800"}]', "not JSON: 'utf-8' codec can't encode"),
        ('[{"command": "a", "event": {"event": "E", "data": {"x": NaN}}}]', "not JSON: Out of"),
        ('[{"command": "a", "event": {"event": "E", "data": {"x": 1e999}}}]', "not JSON: Out of"),
        ('[{"command": "a", "cancel_job": "x"}]', "rule 1: 'cancel_job' is not known"),
    ],
)
def test_rules_that_are_refused_by_number(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        faults.parse(text)


def test_a_rule_for_no_command_is_refused_by_number() -> None:
    path = pathlib.Path(recording.__file__).parents[1] / "recordings" / "qemu-7.2.22.jsonl"
    recorded = recording.parse(path.read_text())
    rules = faults.parse(
        '[{"command": "query-*", "quit": true}, {"command": "quer", "quit": true}]'
    )
    with pytest.raises(ValueError, match="rule 2: no command is called 'quer'"):
        fake.Fake(recorded, Host(), rules)


def test_the_rules_in_the_documentation() -> None:
    text = (HERE.parent / "docs" / "test-driver.md").read_text()
    examples = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        assert faults.parse(example)
    for field in dataclasses.fields(faults.Rule):
        assert field.name.replace("_", "-") in text


def test_nodes_are_told_without_the_images_below_each(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a chain of 100 images keeps QEMU, and the guest, for 1.5 s, five times an increment."""
    tmp_path = tmp_path_factory.mktemp("flat")  # a socket's path is short
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", str(tmp_path))
    trace = io.StringIO()
    with virtbackup.open("test:///default") as conn:
        conn.setTrace(trace)
        [dom] = conn.listAllDomains()
        for kind in ("full", "incremental"):
            dom.backupStart(
                f'<domainbackup><address type="unix" path="{tmp_path}/s"/><branch name="b"/>'
                f'<disks><disk name="vda" type="{kind}"/></disks></domainbackup>'
            )
            dom.backupGetInfo()
            dom.backupStop()
        dom.branchDelete("b")
    sent = [line for line in trace.getvalue().splitlines() if "query-named-block-nodes" in line]
    assert len(sent) >= 4
    assert all('"arguments":{"flat":true}' in line for line in sent), sent
