# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's disks, read from what real QEMUs answered (tests/record.py)."""

import itertools
import json
import pathlib
from typing import Any

import pytest

from virtbackup.conf import domain_conf
from virtbackup.qemu import block, monitor_json, naming, qmp

DATA = pathlib.Path(__file__).parent / "qemublockdata"
VERSIONS = sorted(path.name for path in DATA.iterdir())


def recorded(version: str, state: str, command: str) -> Any:
    return json.loads((DATA / version / state / f"{command}.json").read_text())


@pytest.mark.parametrize(
    ("filename", "type", "source"),
    [
        ("/images/a:b.qcow2", "file", "/images/a:b.qcow2"),
        ("nbd://127.0.0.1:10809/a%20b", "network", "a b"),
        ("nbd+unix:///ex/p?socket=/run/nbd.sock", "network", "ex/p"),
        ("nbd://[::1]:10809", "network", "nbd"),
        ("nbd+unix://?socket=/run/nbd.sock", "network", "nbd"),
        ("rbd:pool/image:id=admin:mon_host=a\\:6789", "network", "pool/image"),
        ("iscsi://10.0.0.1/iqn.2013-07.com.example:x/1", "network", "iqn.2013-07.com.example:x/1"),
        ("https://host/a/b.img", "network", "a/b.img"),
        ('json:{"driver": "null-co"}', "file", 'json:{"driver": "null-co"}'),
        ("https://hans:a%40b@host/a/b.img", "network", "a/b.img"),
        (
            'json:{"driver": "raw", "file": {"user": "hans", "password": "a\\"b", "lun": "1"}}',
            "file",
            'json:{"driver": "raw", "file": {"user": "hans", "password": "***", "lun": "1"}}',
        ),
        (
            'json:{"url": "http://hans:a@b@host/x", "cookie": "c=d", "password-secret": "sec0"}',
            "file",
            'json:{"url": "http://hans@host/x", "cookie": "***", "password-secret": "sec0"}',
        ),
        (
            'json:{"file.password": "", "=keyvalue-pairs": "[\\"key\\", \\"a\\"]"}',
            "file",
            'json:{"file.password": "***", "=keyvalue-pairs": "***"}',
        ),
        ("/images/a:b@c://d:e", "file", "/images/a:b@c://d:e"),
    ],
)
def test_what_a_medium_is_in_libvirts_words(filename: str, type: str, source: str) -> None:
    medium = block.Medium(naming.NodeName("A"), "raw", filename, 512, readonly=False)
    told = block.Disk("vda", medium, None).definition()
    assert (told.type, told.source) == (type, source)
    again = domain_conf.DomainDef("vm", "uuid", None, (told,))
    assert domain_conf.DomainDef.parse(again.format()) == again


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("iscsi://hans%geheim@10.0.0.1/iqn.x:t/1", "iscsi://hans@10.0.0.1/iqn.x:t/1"),
        (
            "rbd:pool/image:id=admin:key=a\\:b=:mon_host=c",
            "rbd:pool/image:id=admin:key=***:mon_host=c",
        ),
        ("nbd+unix:///x?socket=/a:b@c", "nbd+unix:///x?socket=/a:b@c"),
    ],
)
def test_a_name_is_told_without_passwords(filename: str, shown: str) -> None:
    medium = block.Medium(naming.NodeName("A"), "raw", filename, 512, readonly=False)
    assert medium.shown == shown


@pytest.mark.parametrize("version", VERSIONS)
def test_disks_are_named_and_measured(version: str) -> None:
    disks = {d.target: d for d in block.parse_block(recorded(version, "rest", "query-block"))}
    media = {
        target: (disk.medium.driver, disk.medium.size, disk.medium.readonly)
        for target, disk in disks.items()
        if disk.medium
    }
    size = 4 << 20
    assert media == {
        "vda": ("qcow2", size, False),
        "drive-b": ("raw", size, False),
        "sdc": ("raw", size, False),
        "cdrom": ("raw", size, True),
        "F": ("raw", size, False),
    }
    assert disks["empty"].medium is None
    assert "pflash0" not in disks
    assert len(disks) == 6
    assert disks["vda"].qom_path == "/machine/peripheral/vda"
    assert disks["sdc"].qom_path == "/machine/peripheral/sdc"
    definitions = {d.target: d.definition() for d in disks.values()}
    assert definitions["cdrom"].readonly
    assert not definitions["empty"].has_medium
    assert definitions["vda"].source == "/images/a"


@pytest.mark.parametrize("qdev", ["/machine/system.flash1", "/machine/virt.flash1"])
def test_flash_is_no_disk_on_any_machine(qdev: str) -> None:
    """x86 has the first, and aarch64 the other."""
    drives = recorded(VERSIONS[-1], "rest", "query-block")
    [disk] = [drive for drive in drives if "peripheral/vda" in drive.get("qdev", "")]
    assert block.parse_block([disk])
    assert not block.parse_block([{**disk, "qdev": qdev}])


@pytest.mark.parametrize(
    ("qdev", "expected"),
    [
        ("/machine/peripheral/disk/virtio-backend", "disk"),
        ("/machine/peripheral/disk/disk.0/legacy[0]", "disk"),  # usb-storage
        ("disk/0", "disk/0"),
        # A device in JSON may be called "disk/0", and another one "disk".
        ("/machine/peripheral/disk/0/virtio-backend", "node"),
        ("/machine/peripheral-anon/device[1]/virtio-backend", "node"),
    ],
)
def test_a_device_is_called_by_all_of_its_id(qdev: str, expected: str) -> None:
    [item] = [
        i for i in recorded(VERSIONS[0], "rest", "query-block") if "/vda/" in i.get("qdev", "")
    ]
    item["inserted"]["node-name"] = "node"
    item["device"] = ""
    assert [disk.target for disk in block.parse_block([{**item, "qdev": qdev}])] == [expected]


@pytest.mark.parametrize("key", ["qdev", "device"])
def test_a_name_that_cannot_be_is_told(key: str) -> None:
    item = {**recorded(VERSIONS[0], "rest", "query-block")[0], key: "a\x01b"}
    with pytest.raises(qmp.ProtocolError) as raised:
        block.parse_block([item])
    assert str(raised.value).endswith(rf"unexpected block info: {key} is 'a\x01b'")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_graph_knows_who_is_below_and_jobs(version: str) -> None:
    at_rest = block.parse_graph(recorded(version, "rest", "x-debug-query-block-graph"))
    assert "fa" in at_rest.below([naming.NodeName("A")])
    assert "A" not in at_rest.below([naming.NodeName("A"), naming.NodeName("fa")])
    assert at_rest.jobs_on(naming.NodeName("A")) == frozenset()
    assert {"A", "fa", "C", "F"} <= at_rest.nodes()
    graph = block.parse_graph(recorded(version, "mirror", "x-debug-query-block-graph"))
    [vda] = [
        disk
        for disk in block.parse_block(recorded(version, "mirror", "query-block"))
        if disk.target == "vda"
    ]
    assert vda.medium is not None
    for held in (vda.medium.node, naming.NodeName("A"), naming.NodeName("T")):
        assert graph.jobs_on(held) == {"mirror0"}
    assert graph.jobs_on(naming.NodeName("C")) == frozenset()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_process_without_devices(version: str) -> None:
    nodes = block.parse_named_nodes(recorded(version, "rest", "query-named-block-nodes"))
    graph = block.parse_graph(recorded(version, "rest", "x-debug-query-block-graph"))
    assert {disk.target for disk in block.disks_of_nodes(nodes, graph)} == {"A", "C", "F"}
    assert {disk.target for disk in block.disks_of_nodes(nodes, None)} == {"A", "fa", "C", "F"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_process_without_devices_whose_disk_has_a_job(version: str) -> None:
    """The filter of a disk is QEMU's; the target is one that no node is over."""
    nodes = block.parse_named_nodes(recorded(version, "mirror", "query-named-block-nodes"))
    graph = block.parse_graph(recorded(version, "mirror", "x-debug-query-block-graph"))
    assert {disk.target for disk in block.disks_of_nodes(nodes, graph)} == {"A", "C", "F", "T"}


@pytest.mark.parametrize("version", VERSIONS)
def test_jobs_identity_and_commands(version: str) -> None:
    jobs = monitor_json.parse_jobs(recorded(version, "mirror", "query-jobs"))
    assert jobs[naming.JobId("mirror0")].type == "mirror"
    assert jobs[naming.JobId("mirror0")].status in ("running", "ready")
    assert monitor_json.parse_jobs(recorded(version, "rest", "query-jobs")) == {}
    assert monitor_json.parse_name(recorded(version, "rest", "query-name")) == "recorded"
    uuid = monitor_json.parse_uuid(recorded(version, "rest", "query-uuid"))
    assert uuid == "c0ffee00-0000-4000-8000-000000000001"
    assert not monitor_json.parse_status(recorded(version, "rest", "query-status")).running
    commands = monitor_json.parse_commands(recorded(version, "rest", "query-commands"))
    assert {"blockdev-add", "transaction"} <= commands


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_asked_of_the_guest(version: str) -> None:
    memory = monitor_json.parse_memory_size(recorded(version, "rest", "query-memory-size-summary"))
    assert memory == 64 << 20
    assert monitor_json.parse_cpus(recorded(version, "rest", "query-cpus-fast")) == 1
    assert monitor_json.parse_others_block_jobs(recorded(version, "rest", "query-block-jobs")) == ()
    [job] = monitor_json.parse_others_block_jobs(recorded(version, "mirror", "query-block-jobs"))
    assert (job.id, job.type, job.speed, job.length) == ("mirror0", "mirror", 1, 4 << 20)
    assert job.offset <= job.length


def test_jobs_of_ours_are_not_others() -> None:
    ours = naming.backup_job(naming.BackupId("00000001"), 0)
    job = {"type": "backup", "offset": 0, "len": 1, "speed": 0, "device": ours}
    by_speed = {**job, "device": "drive", "speed": naming.job_speed(ours)}
    assert monitor_json.parse_others_block_jobs([job, by_speed]) == ()


@pytest.mark.parametrize("version", VERSIONS)
def test_statistics_by_every_name_of_a_drive(version: str) -> None:
    found = block.parse_blockstats(recorded(version, "rest", "query-blockstats"))
    for disk in block.parse_block(recorded(version, "rest", "query-block")):
        for name in (disk.qom_path, disk.drive, disk.medium.node if disk.medium else None):
            assert name is None or name in found
    reply = recorded(version, "rest", "query-blockstats")
    for number, drive in enumerate(reply, 1):
        names = ("rd_operations", "rd_bytes", "rd_total_time_ns", "wr_operations", "wr_bytes",
                 "wr_total_time_ns", "flush_operations", "flush_total_time_ns")  # fmt: skip
        drive["stats"] |= {name: number * 10 + at for at, name in enumerate(names)}
    [vda] = [n for n, drive in enumerate(reply, 1) if "/vda/" in drive["qdev"]]
    counted = block.parse_blockstats(reply)["/machine/peripheral/vda"]
    assert counted == block.Statistics(*range(10 * vda, 10 * vda + 8))
    assert counted + counted == block.Statistics(*range(20 * vda, 20 * vda + 16, 2))


def test_what_images_say_of_theirs_is_the_same_told_flat() -> None:
    """By a drive, all at once; by nodes that QEMU was asked for without what is below each."""
    names = list(map(naming.NodeName, ["top", "middle", "base", "last"]))
    told = ("m.qcow2", None, "l.raw")
    below = {(over, "backing"): under for over, under in itertools.pairwise(names)}
    graph = block.Graph({}, below)

    def medium(node: naming.NodeName, *files: str | None) -> block.Medium:
        return block.Medium(node, "qcow2", f"/{node}", 512, False, backing_files=files)

    drive = medium(names[0], *told, None)
    flat = {
        naming.NodeName(name): medium(name, one)
        for name, one in zip(names, (*told, None), strict=True)
    }
    expected = tuple(
        block.Backing(over, under, one)
        for (over, under), one in zip(itertools.pairwise(names), told, strict=True)
    )
    assert graph.backing_of(drive, {}) == expected
    assert graph.backing_of(flat[names[0]], flat) == expected
    assert graph.backing_of(medium(names[0], "m.qcow2"), {}) == expected[:1]


def test_what_an_image_has_below_it_in_fact() -> None:
    """QEMU may be given other images than those that the image itself names."""
    [base, *_] = [one for one in recorded(VERSIONS[-1], "rest", "query-block") if "inserted" in one]
    image = base["inserted"]["image"]
    middle = {**image, "filename": "/m", "backing-filename": "https://b", "backing-image": image}
    image = {**image, "backing-filename": "https://m", "backing-image": middle}
    [disk] = block.parse_block([{**base, "inserted": {**base["inserted"], "image": image}}])
    assert disk.medium
    assert disk.medium.backing_files[:2] == ("https://m", "https://b")
    assert disk.medium.below == ("/m", middle["backing-image"]["filename"])
    assert not disk.medium.is_fetched
