# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every command that has ``--json``, on a real QEMU: what it prints is JSON, of the shape that
docs/json.md shows, and says what the command tells people."""

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import virtbackup
from tests import daemon_scene, strict_json, waiting
from tests.live import machines, pages, points
from virtbackup.tools import listing, virsh_backup, virsh_connection, vsh

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-nbd", "qemu-storage-daemon")

UUID = "6a1b5b0c-0000-4000-8000-000000000001"
NAME = 'it\'s "vm" <é> \\n'
RECORDING = pages.ROOT / "virtbackup" / "recordings" / "qemu-7.2.22.jsonl"
COMMANDS = {one.name for one in virsh_backup.TABLE.commands if one.option("json")}
ELSEWHERE = {"compare": "test_libvirt.py"}
"""Wants a libvirtd."""
LINES = {"backup-pull", "rpc-dump"}
DEADLINE = waiting.DEADLINE


def blocks() -> list[tuple[list[str], str]]:
    """What docs/json.md shows: of which commands, and the text."""
    page = (pages.DOCS / "json.md").read_text()
    parts = re.split(r"^```json\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)
    found = []
    for before, block in zip(parts[::2], parts[1::2], strict=False):
        paragraph = before.rstrip().rpartition("\n\n")[2]
        found.append((re.findall(r"`([\w-]+)`", paragraph.partition(" (")[0]), block))
    return found


def shown(command: str) -> list[Any]:
    """Of a command: its document, or its lines."""
    [block] = [block for names, block in blocks() if command in names]
    return strict_json.lines(block) if command in LINES else [strict_json.loads(block)]


@dataclasses.dataclass
class Scene:
    """What the commands have printed, by their names: with ``--json`` and without."""

    json: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    text: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def run(
        self, uri: str, command: str, *words: str, people: bool = False, status: int = 0
    ) -> Any:
        """Run a command, for PEOPLE before, too, where that changes nothing; what it said."""
        if people:
            said = points.call("-c", uri, command, *words)
            assert said[0] == status, said
            self.text.setdefault(command, []).append(said[1])
        said = points.call("-c", uri, command, *words, "--json")
        assert (said[0], said[2]) == (status, ""), (command, said)
        return self.heard(command, said[1])

    def of(self, command: str) -> list[Any]:
        """The documents, or the lines, of all times together."""
        if command in LINES:
            return strict_json.lines("".join(self.json[command]))
        return [strict_json.loads(text) for text in self.json[command]]

    def heard(self, command: str, printed: str) -> Any:
        self.json.setdefault(command, []).append(printed)
        return strict_json.lines(printed) if command in LINES else strict_json.loads(printed)

    def go_on(self, command: str, *words: str) -> tuple[Any, "subprocess.Popen[str]"]:
        """Start a command that goes on: what it said, and its process."""
        argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", command, *words, "--json"]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        return self.heard(command, strict_json.first(process)), process


def end(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=DEADLINE)[0] == ""
    assert process.returncode == 0


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, shared_dirs: None) -> Scene:
    """A guest and a directory whose names need care, and all there is to do with both."""
    place = tmp_path_factory.mktemp("json")
    directory = place / os.fsdecode(b'caf\xe9 "x"\n\\')
    scene = Scene()
    name = NAME.replace(",", ",,")
    with machines.two_disks(place, "-name", name, "-uuid", UUID, size=4 << 20) as machine:
        machine.io("vda", "write -P 7 0 1M")
        ask(scene, machine.uri)
        back_up(scene, machine.uri, place)
        for step in range(3):
            machine.io("vda", f"write -P {step + 1} {step}M 128k")
            scene.run(machine.uri, "backup-pull", NAME, str(directory), "--branch=b", "--auto")
        listen(scene, machine.uri, place)
    get_back(scene, str(directory), place)
    return scene


def ask(scene: Scene, uri: str) -> None:
    """What changes nothing."""
    for command in ("list", "uri", "hostname", "version", "help"):
        scene.run(uri, command, people=True)
    for command in ("dominfo", "domid", "domname", "domuuid", "domstate", "domblklist"):
        scene.run(uri, command, NAME, people=True)
    scene.run(uri, "list", "--inactive")
    scene.run(uri, "help", "backup-pull")
    scene.run(uri, "help", "branch")


def back_up(scene: Scene, uri: str, place: pathlib.Path) -> None:
    scene.run(uri, "branch-list", NAME, people=True)
    assert scene.run(uri, "branch-create", NAME, "weekly")["created"] == "weekly"
    xml = place / "backup.xml"
    xml.write_text(
        f'<domainbackup><address type="unix" path="{place}/nbd.sock"/><branch name="weekly"/>'
        '<disks><disk name="vda" type="incremental"/></disks></domainbackup>'
    )
    scene.run(uri, "backup-start", NAME, str(xml))
    scene.run(uri, "backup-info", NAME, people=True)
    scene.run(uri, "backup-map", NAME, people=True)
    assert scene.run(uri, "backup-stop", NAME)["good"] is True
    words = ["--unix", f"{place}/nbd.sock", "--disk=sdb,present=no"]
    scene.run(uri, "backup-start-as", NAME, *words)
    assert scene.run(uri, "backup-stop", NAME, "--cancel")["good"] is None
    scene.run(uri, "backup-cleanup", NAME)
    scene.run(uri, "branch-list", NAME, people=True)
    assert scene.run(uri, "branch-delete", NAME, "weekly")["deleted"] == "weekly"


def listen(scene: Scene, uri: str, place: pathlib.Path) -> None:
    """The commands about the monitor and the wire."""
    traces = [str(place / name) for name in ("one", "other")]
    for trace, command in zip(traces, ("list", "domblklist 1"), strict=True):
        assert points.call("-c", uri, "--trace", trace, command)[0] == 0
    scene.run(uri, "monitor-diff", *traces, people=True, status=1)
    scene.run(uri, "monitor-diff", *traces, "--all", status=1)
    scene.run(uri, "monitor-diff", traces[0], traces[0], people=True)

    told, process = scene.go_on("monitor-replay", str(RECORDING))
    with virtbackup.open(told["uri"]) as connection:
        assert len(connection.listAllDomains()) == 1
    end(process)

    proxy = place / "proxy"
    with daemon_scene.running(place, uri) as daemon:
        argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "rpc-dump"]
        argv += [f"unix:{daemon.path}", "--listen", f"unix:{proxy}", "--clients=2", "--json"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            listening = process.stdout.readline()
            for _ in range(2):
                with virtbackup.open(f"virtbackup+unix://{proxy}") as connection:
                    assert connection.lookupByName(NAME).UUIDString() == UUID
            out, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0
    scene.heard("rpc-dump", listening + out)


def get_back(scene: Scene, directory: str, place: pathlib.Path) -> None:
    """The commands about a directory; the guest is gone."""
    uri = "nowhere:///"
    scene.run(uri, "backup-list", directory, people=True)
    scene.run(uri, "backup-verify", directory, people=True)
    scene.run(uri, "backup-map", directory, people=True)
    scene.run(uri, "backup-restore", directory, directory + " out")
    _, process = scene.go_on("backup-serve", directory, "--unix", f"{place}/nbd.sock")
    end(process)
    scene.run(uri, "backup-prune", directory, "--keep=2", "--dry-run", people=True)
    scene.run(uri, "backup-prune", directory, "--keep=1")
    next(pathlib.Path(directory).glob("vda.*")).write_bytes(b"")
    status, printed, err = points.call("backup-verify", directory, "--json")
    assert (status, err[:7]) == (1, "error: ")
    assert scene.heard("backup-verify", printed)["good"] is False


# --- shape ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(COMMANDS - set(ELSEWHERE)))
def test_it_has_the_shape_that_is_shown(command: str, scene: Scene) -> None:
    for printed in scene.json[command]:
        if command in LINES:
            events = {one["event"]: one for one in shown(command)}
            for one in strict_json.lines(printed):
                assert list(strict_json.differences(events[one["event"]], one)) == []
        else:
            told = strict_json.loads(printed)
            assert list(strict_json.differences(example(command, told), told)) == []


def example(command: str, told: Any) -> Any:
    """What TOLD has to look like."""
    [document] = shown(command)
    if command != "help" or "groups" in told:
        return document
    group = document["groups"][0]
    return group if "commands" in told else group["commands"][0]


def test_what_is_shown_is_there() -> None:
    names = [name for names, _ in blocks() for name in names]
    assert sorted(names) == sorted(COMMANDS)
    assert [one["event"] for one in shown("backup-pull")] == [
        "disk", "progress", "finished", "failed",
    ]  # fmt: skip
    assert [one["event"] for one in shown("rpc-dump")] == [
        "listening", "connected", "message", "unreadable", "closed", "failed",
    ]  # fmt: skip


def test_the_one_that_is_run_elsewhere_is() -> None:
    for command, file in ELSEWHERE.items():
        assert f'test_json.example("{command}", ' in (pages.ROOT / "tests/live" / file).read_text()


# --- facts ----------------------------------------------------------------------------------------

size = virsh_connection.human_size
Rows = list[list[str]]


def rows(text: str) -> Rows:
    """The cells of a table."""
    _, _, body = text.partition("---\n")
    return [re.split(r" {2,}", line.strip()) for line in body.splitlines() if line]


def local(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def as_branch_table(told: Any) -> Rows:
    return [
        [branch["name"], disk["name"], size(disk["granularity"]), size(disk["dirty"]),
         "yes" if disk["persistent"] else "no", local(disk["point"]["time"]),
         "sound" if disk["sound"] else disk["reason"]]
        for branch in told["branches"] for disk in branch["disks"]
    ]  # fmt: skip


def as_list_of_backups(told: Any) -> Rows:
    return [
        [str(point["number"]), listing.shown_time(point["time"]), disk["name"], disk["kind"],
         size(disk["size"]), size(disk["stored"]), disk["problem"] or "there"]
        for point in told["points"] for disk in point["disks"]
    ]  # fmt: skip


TABLES: Mapping[str, Callable[[Any], Rows]] = {
    "list": lambda told: [[str(one["id"]), one["name"], one["state"]] for one in told],
    "domblklist": lambda told: [[one["target"], one["source"]] for one in told],
    "branch-list": as_branch_table,
    "backup-list": as_list_of_backups,
}


@pytest.mark.parametrize("command", TABLES)
def test_the_same_is_in_the_table(command: str, scene: Scene) -> None:
    documents = scene.of(command)[: len(scene.text[command])]
    assert [TABLES[command](told) for told in documents] == list(map(rows, scene.text[command]))
    assert any(documents)


@pytest.mark.parametrize("command", ["uri", "hostname", "domid", "domname", "domuuid", "domstate"])
def test_the_same_one_value(command: str, scene: Scene) -> None:
    [told], [text] = scene.of(command), scene.text[command]
    assert text == f"{list(told.values())[-1]}\n"


def test_the_same_is_in_lines(scene: Scene) -> None:
    [told], [text] = scene.of("dominfo"), scene.text["dominfo"]
    pairs = dict(re.findall(r"^(.*): +(.*)$", text, re.MULTILINE))
    assert float(pairs.pop("CPU time").removesuffix("s")) <= told["cpu_time"] + 0.1
    memory = f"{told['max_memory'] >> 10} KiB"
    assert pairs == {
        "Id": str(told["id"]), "Name": told["name"], "UUID": told["uuid"],
        "OS Type": told["os_type"], "State": told["state"], "CPU(s)": str(told["cpus"]),
        "Max memory": memory, "Used memory": memory, "Persistent": "no", "Autostart": "disable",
        "Managed save": "no",
    }  # fmt: skip
    assert {told[key] for key in ("persistent", "autostart", "managed_save")} == {False}
    [told], [text] = scene.of("version"), scene.text["version"]
    hypervisor = told["hypervisor"]
    assert f"Running hypervisor: {hypervisor['type']} {hypervisor['version']}\n" in text
    assert re.findall(r"Using library: (\w+) (.*)", text) == [
        (name, told[name]) for name in ("virtbackup", "libvirt")
    ]


def steady(told: Any) -> Any:
    """Of a running backup what is the same a moment later."""
    changing = ("scratch_free", "scratch_used")
    disks = [{k: v for k, v in disk.items() if k not in changing} for disk in told["disks"]]
    return {**told, "disks": disks}


def test_the_same_of_the_running_backup(scene: Scene) -> None:
    [told], [text] = scene.of("backup-info"), scene.text["backup-info"]
    assert steady(told) in map(steady, scene.of("backup-start"))
    pairs = dict(re.findall(r"^(\w[\w ]*): +(.*)$", text, re.MULTILINE))
    assert (pairs["State"], pairs["Branch"]) == (told["state"], told["branch"])
    assert pairs["Started"] == local(told["started"])
    assert pairs["Engine"] == told["engine"]
    for disk, row in zip(told["disks"], rows(text), strict=True):
        assert disk["uri"] in text
        assert row[:5] == [
            disk["name"], disk["export"], disk["state"], disk["type"], size(disk["capacity"]),
        ]  # fmt: skip
        assert row[6:] == [size(disk["dirty"]), disk["reason"] or disk["type_reason"] or "-"]


def test_the_same_of_a_directory(scene: Scene) -> None:
    told, text = scene.of("backup-verify")[0], scene.text["backup-verify"][0]
    assert text.startswith(f"{len(told['files'])} files, {size(told['read'])} read (")
    told, text = scene.of("backup-prune")[0], scene.text["backup-prune"][0]
    assert (
        f"{len(told['kept'])} points would be kept, {len(told['removed'])} would be removed"
        f" ({size(told['stored'])})\n"
    ) in text
    for one in told["merged"]:
        whole = f"{one['file']} would be made whole of {', '.join(one['of'][1:])}\n"
        assert f"{one['disk']}: {whole}" in text
    for told, text in zip(scene.of("backup-map"), scene.text["backup-map"], strict=True):
        assert text.startswith(vsh.visible(told["title"]))
        for disk in told["disks"]:
            assert f"\n{disk['name']}: {size(disk['size'])}, " in text
            ends = [one["start"] + one["length"] for one in disk["ranges"]]
            assert [0, *ends] == [*(one["start"] for one in disk["ranges"]), disk["size"]]


def test_names_come_as_they_are(scene: Scene) -> None:
    for command, printed in scene.json.items():
        for told in [strict_json.lines(text) if command in LINES else [strict_json.loads(text)]
                     for text in printed]:  # fmt: skip
            for one in told:
                if isinstance(one, dict) and isinstance(one.get("domain"), str):
                    assert one["domain"] == NAME
                if isinstance(one, dict) and one.get("directory") is not None:
                    assert os.fsencode(one["directory"]).endswith(b'/caf\xe9 "x"\n\\')
    assert scene.of("backup-list")[0]["domain"] == {"name": NAME, "uuid": UUID}


def test_every_message_is_told_once(scene: Scene) -> None:
    """Of two clients, from the first call to the last answer."""
    told = scene.of("rpc-dump")
    assert told[0]["event"] == "listening"
    for client in (1, 2):
        own = [one for one in told if one.get("client") == client]
        assert (own[0]["event"], own[-1]["event"]) == ("connected", "closed")
        messages = own[1:-1]
        assert all(one["problem"] is None for one in messages)
        asked = [one["serial"] for one in messages if one["type"] == "CALL"]
        assert asked == sorted(set(asked))
        [answer] = [one for one in messages if one["direction"] == "<-"
                    and one["procedure"] == "DOMAIN_LOOKUP_BY_NAME"]  # fmt: skip
        assert answer["fields"]["dom"] == {"name": NAME, "uuid": UUID, "id": 1}
