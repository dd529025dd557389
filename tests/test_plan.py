# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan: all refusals, and what will be sent, without a QEMU."""

import dataclasses
import json
import pathlib
import struct
import types
from collections.abc import Sequence
from typing import Any

import libvirt
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests import datacases, odd_documents, record_conversations, test_block
from virtbackup import errors, hypervisor, runtime
from virtbackup.conf import backup_conf, domain_conf, storage_conf, virtbackup_conf
from virtbackup.qemu import (
    backup,
    block,
    blockjob,
    branch,
    capabilities,
    domain,
    monitor_json,
    naming,
    qcow2,
    recording,
    starting,
    status,
)

ID = naming.BackupId("0123abcd")
VERSION = test_block.VERSIONS[-1]
RECORDED = recording.parse((record_conversations.HERE / "7.2.22" / "list.jsonl").read_text())
CAPS = capabilities.Capabilities(
    (7, 2, 22),
    "Debian",
    monitor_json.parse_commands(RECORDED.reply("query-commands")),
    capabilities.parse_features(RECORDED.reply("query-qmp-schema")),
)


def state(recording: str = "rest", **changes: Any) -> backup.BlockState:
    asked = backup.BlockState(
        disks=block.parse_block(test_block.recorded(VERSION, recording, "query-block")),
        jobs=monitor_json.parse_jobs(test_block.recorded(VERSION, recording, "query-jobs")),
        exports={},
        graph=block.parse_graph(
            test_block.recorded(VERSION, recording, "x-debug-query-block-graph")
        ),
        vcpus_run=True,
        iothreads={},
    )
    return dataclasses.replace(asked, **changes)


def definition(asked: backup.BlockState, **changes: Any) -> backup_conf.BackupDef:
    wanted = backup_conf.BackupDef(backup_conf.UnixAddress("/run/x.sock"))
    domain = domain_conf.DomainDef("vm", "", 1, tuple(d.definition() for d in asked.disks))
    return dataclasses.replace(wanted, **changes).align_disks(domain)


def plan(asked: backup.BlockState, caps: Any = CAPS, **changes: Any) -> backup.BackupPlan:
    return backup.plan(definition(asked, **changes), asked, caps, ID, "/scratch")


def refusal(asked: backup.BlockState, caps: Any = CAPS) -> str:
    """Why this QEMU cannot do a backup of all disks now."""
    with pytest.raises(errors.Error) as caught:
        plan(asked, caps)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED
    return str(caught.value.get_str2())


def disk(name: str, **fields: Any) -> backup_conf.BackupDiskDef:
    return backup_conf.BackupDiskDef(name, **fields)


def test_all_disks_in_one_transaction() -> None:
    planned = plan(state())
    assert [d.target for d in planned.disks] == ["drive-b", "sdc", "vda", "F"]
    command = planned.transaction()
    assert command.execute == "transaction"
    actions = command.arguments["actions"]
    assert [action["type"] for action in actions] == ["blockdev-backup"] * 4
    assert actions[2]["data"] == {
        "job-id": "virtbackup-0123abcd-2",
        "device": "A",
        "target": "virtbackup-0123abcd-2-scr",
        "sync": "none",
        "auto-dismiss": False,
    }
    json.dumps(command.arguments)


def test_a_disk_is_kept_from_going_back_to_a_snapshot() -> None:
    """By a bitmap that is there from before the job on, where QEMU would let it."""
    actions = plan(state(), HYBRID).transaction().arguments["actions"]
    assert [action["type"] for action in actions] == [
        *["block-dirty-bitmap-add"] * 4,
        *["blockdev-backup"] * 4,
    ]
    assert actions[2]["data"] == {
        "node": "A",
        "name": "virtbackup-0123abcd-2-guard",
        "granularity": 1 << 31,
        "persistent": False,
        "disabled": True,
    }


def test_everything_about_a_disk() -> None:
    """The third of four: the number is the disk's among those that take part."""
    planned = plan(state(), breaking(HYBRID))
    assert planned.disks[2] == backup.DiskPlan(
        target="vda",
        number=2,
        node=naming.NodeName("A"),
        source_name="A",
        device="/machine/peripheral/vda",
        size=4 << 20,
        exportname="vda",
        source=storage_conf.Source(dir="/scratch"),
        scratch_file=naming.NodeName("virtbackup-0123abcd-2-file"),
        scratch=naming.NodeName("virtbackup-0123abcd-2-scr"),
        job=naming.JobId("virtbackup-0123abcd-2"),
        filter=naming.NodeName("virtbackup-0123abcd-2-flt"),
        access=naming.NodeName("virtbackup-0123abcd-2-acc"),
        breaks_snapshot=True,
        image=naming.NodeName("A"),
        stores=frozenset({naming.NodeName("fa"), naming.NodeName("#block009")}),
        offset=0,
        backing=(
            block.Backing(naming.NodeName("A"), naming.NodeName("#block008"), "/images/base"),
        ),
        export=naming.ExportId("virtbackup-0123abcd-2"),
        opaque="virtbackup-0123abcd-2",
        guards=(naming.NodeName("A"),),
    )
    assert (planned.id, planned.engine, planned.credentials) == (ID, "hybrid", None)


def test_the_engine_is_the_safest_or_the_one_that_is_wanted() -> None:
    asked = state()
    engines: list[tuple[Any, capabilities.Engine | None, str]] = [
        (CAPS, None, "classic"),
        (CAPS, "classic", "classic"),
        (HYBRID, None, "hybrid"),
        (HYBRID, "hybrid", "hybrid"),
        (HYBRID, "classic", "classic"),
    ]
    for caps, wanted, engine in engines:
        planned = backup.plan(definition(asked), asked, caps, ID, "/scratch", wanted)
        assert planned.engine == engine
        assert (planned.disks[0].access is not None) == (engine == "hybrid")
    with pytest.raises(errors.Error, match=r"the hybrid engine is not for QEMU 7\.2\.22"):
        backup.plan(definition(asked), asked, CAPS, ID, "/scratch", "hybrid")


def test_the_socket_that_listens_is_passed_along() -> None:
    assert [command.fds for command in plan(state()).server_commands(7)] == [(7,), ()]


def test_where_it_listens_is_told_later() -> None:
    planned = plan(state())
    picked = backup_conf.IpAddress("h", 7)
    told = planned.listening_on(picked)
    assert told.address == told.definition.address == picked
    assert told.listening_on(planned.address) == planned


@pytest.mark.parametrize(
    ("filename", "readonly", "refused"),
    [
        ("/images/a.raw", False, True),
        ("/images/a.raw", True, False),
        ("nbd+unix:///x?socket=/s", False, True),
        ("", False, False),
        ("null-co://", False, False),
        ('json:{"driver": "raw", "file": {"driver": "null-co", "size": 512}}', False, False),
    ],
)
def test_an_image_that_another_disk_writes_is_refused(
    filename: str, readonly: bool, refused: bool
) -> None:
    """Also where the other one is left out: it goes on writing."""
    asked = state()
    [one] = [disk for disk in asked.disks if disk.target == "vda"]
    assert one.medium is not None
    medium = dataclasses.replace(one.medium, filename=filename)
    twin = dataclasses.replace(medium, node=naming.NodeName("twin"), readonly=readonly)
    disks = dataclasses.replace(one, medium=medium), block.Disk("vdb", twin, None)
    without = (disk("vdb", present=False),)
    for left_out in without, ():
        if refused:
            with pytest.raises(errors.Error, match="'vda' and disk 'vdb' both write to"):
                plan(dataclasses.replace(asked, disks=disks), disks=left_out)
        else:
            plan(dataclasses.replace(asked, disks=disks), disks=left_out)
    if refused:
        strangers = dataclasses.replace(asked, disks=disks[:1], strangers=disks[1:])
        with pytest.raises(errors.Error, match="'vda' and disk 'vdb' both write to"):
            plan(strangers)


def test_an_image_that_a_part_of_another_disk_has_open_too() -> None:
    """The part has one node, below that disk, and this disk's is another; it is no twin of its own
    whole, but where a device has it, too."""
    asked = state()
    assert asked.graph is not None
    found = {disk.target: (disk, disk.medium) for disk in asked.disks}
    (one, medium), (other, others) = found["sdc"], found["vda"]
    assert medium is not None
    assert others is not None
    [node] = asked.graph.children_of(medium.node)
    part = block.Disk("part", dataclasses.replace(medium, node=node), None, is_part=True)
    assert plan(dataclasses.replace(asked, disks=(one, part)))
    shared = one, dataclasses.replace(part, qom_path="/machine/0", is_part=False)
    with pytest.raises(errors.Error, match="'sdc' and disk 'part' both write to"):
        plan(dataclasses.replace(asked, disks=shared), disks=(disk("part", present=False),))
    twin = dataclasses.replace(other, medium=dataclasses.replace(others, filename=medium.filename))
    with pytest.raises(errors.Error, match="'vda' and disk 'part' both write to"):
        plan(dataclasses.replace(asked, disks=(twin, part)))


def test_what_libvirt_calls_a_lun_is_passed_through() -> None:
    disks = state().disks
    known = [domain_conf.DiskDef(one.target, "lun" if one.target == "vda" else "disk")
             for one in disks]  # fmt: skip
    assert domain.passed_through(disks, known, {}) == {"vda"}
    assert domain.passed_through(disks, None, {"/machine/peripheral/sdc": "scsi-block"}) == {"sdc"}
    assert domain.passed_through(disks, None, {"/machine/peripheral/sdc": "scsi-hd"}) == set()


def test_a_node_that_two_devices_have_is_backed_up_once() -> None:
    asked = state()
    [one] = [disk for disk in asked.disks if disk.target == "vda"]
    asked = dataclasses.replace(asked, disks=(one, dataclasses.replace(one, target="vdb")))
    with pytest.raises(errors.Error, match="disks 'vda' and 'vdb' are the same block node 'A'"):
        plan(asked)
    assert [d.target for d in plan(asked, disks=(disk("vda", present=False),)).disks] == ["vdb"]


def test_a_disk_that_was_given_away_is_refused() -> None:
    """By its drives' permissions, and where QEMU tells, by the node itself."""
    reply = test_block.recorded(VERSION, "rest", "x-debug-query-block-graph")
    drives = {node["id"] for node in reply["nodes"] if node["type"] == "block-backend"}
    [a] = [node["id"] for node in reply["nodes"] if node["name"] == "A"]
    for edge in reply["edges"]:
        if edge["parent"] in drives and edge["child"] == a:
            edge["perm"] = []
    asked = state(graph=block.parse_graph(reply))
    assert asked.graph is not None
    assert asked.graph.given_away == {"A"}
    assert state().graph != asked.graph
    [one] = [disk for disk in asked.disks if disk.target == "vda"]
    assert one.medium is not None
    inactive = dataclasses.replace(one, medium=dataclasses.replace(one.medium, active=False))
    for given_away in asked, state(disks=(inactive,)):
        with pytest.raises(errors.Error, match="disk 'vda' is not this guest's to use") as caught:
            plan(given_away)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    assert "vda" not in [d.target for d in plan(asked, disks=(disk("vda", present=False),)).disks]
    # What a job has no permissions for, where there is no device, is not given away.
    assert plan(dataclasses.replace(asked, disks=(dataclasses.replace(one, qom_path=None),)))


@pytest.mark.parametrize(("size", "fits"), [(qcow2.MAX_SIZE, True), (qcow2.MAX_SIZE + 512, False)])
def test_a_disk_larger_than_a_scratch_image_can_be_is_refused(size: int, fits: bool) -> None:
    medium = block.Medium(naming.NodeName("n"), "raw", "/n", size, False)
    asked = state(disks=(block.Disk("vda", medium, None),))
    if fits:
        assert plan(asked).disks[0].size == size
        return
    with pytest.raises(errors.Error) as caught:
        plan(asked)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_CONFIG_UNSUPPORTED
    assert caught.value.get_str2() == (
        f"disk 'vda' of {size} bytes is larger than a scratch image can be: {qcow2.MAX_SIZE} bytes"
    )


def test_the_live_xml_has_every_default() -> None:
    planned = plan(state(), disks=(disk("sdc", source=storage_conf.Source(file="/my/sdc")),))
    live = {d.name: d for d in planned.definition.disks}
    assert live["sdc"].source == storage_conf.Source(file="/my/sdc")
    assert live["vda"].source == storage_conf.Source(dir="/scratch")
    assert live["vda"].exportname == "vda"
    assert live["cdrom"] == disk("cdrom", present=False)
    again = backup_conf.BackupDef.parse(planned.definition.format())
    assert again == planned.definition


def test_names_are_ours_unique_and_short() -> None:
    many = [
        name
        for number in (0, 1, 9999)
        for name in (
            naming.scratch_file_node(ID, number),
            naming.scratch_node(ID, number),
            naming.filter_node(ID, number),
            naming.access_node(ID, number),
            naming.probe_node(ID, number),
        )
    ]
    assert len(set(many)) == len(many)
    assert all(len(name) <= 31 for name in many)
    ours = [*many, naming.backup_job(ID, 0), naming.export(ID, 0), naming.fdset_opaque(ID, 0)]
    assert {naming.backup_of(name) for name in ours} == {ID}
    for foreign in ("virtbackup-of-mine", "libvirt-1-format", "", "virtbackup-0123abcd",
                    "xvirtbackup-0123abcd-0", "virtbackup-0123ABCD-0"):  # fmt: skip
        assert naming.backup_of(foreign) is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"disks": (disk("vda", type="auto"),)}, "disk 'vda': backup type 'auto' needs a branch"),
    ({"disks": (disk("vda", granularity=512),)}, "disk 'vda': a bitmap needs a branch"),
    (
        {"disks": tuple(disk(n, source=storage_conf.Source(file="/s")) for n in ("vda", "sdc"))},
        "disks '(vda|sdc)' and '(vda|sdc)' have the same source '/s'",
    ),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.Error, match=reason) as caught:
        plan(state(), **changes)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_CONFIG_UNSUPPORTED


def test_what_differs_is_not_refused() -> None:
    sources = (storage_conf.Source(file="/s"), storage_conf.Source(file="/t"))
    disks = (
        disk("vda", source=sources[0], exportname="sdc"),
        disk("sdc", source=sources[1], exportname="vda"),
    )
    planned = {one.target: one for one in plan(state(), disks=disks).disks}
    assert (planned["vda"].source, planned["sdc"].source) == sources
    assert (planned["vda"].exportname, planned["sdc"].exportname) == ("sdc", "vda")


def test_a_disk_with_a_job_is_refused_by_name_unless_it_is_left_out() -> None:
    asked = state("mirror")
    assert refusal(asked) == "disk 'vda' already in active block job 'mirror0' (mirror)"
    planned = plan(asked, disks=(disk("vda", present=False),))
    assert "vda" not in {d.target for d in planned.disks}


def test_a_job_that_only_the_graph_shows_is_one() -> None:
    asked = state("mirror", jobs={})
    assert refusal(asked) == "disk 'vda' already in active block job 'mirror0'"


def test_without_a_graph_a_job_is_its_drives() -> None:
    id = naming.JobId("drive-b")
    jobs = {id: monitor_json.Job(id, "stream", "running", None)}
    asked = state(graph=None, jobs=jobs)
    assert refusal(asked) == "disk 'drive-b' already in active block job 'drive-b' (stream)"
    assert plan(asked, disks=(disk("drive-b", present=False),))


def test_a_job_filter_is_recognised_without_a_graph() -> None:
    asked = state(graph=None)
    [vda] = [d for d in asked.disks if d.target == "vda"]
    assert vda.medium is not None
    filtered = dataclasses.replace(vda, medium=dataclasses.replace(vda.medium, driver="mirror_top"))
    disks = tuple(filtered if d is vda else d for d in asked.disks)
    filtered_state = dataclasses.replace(asked, disks=disks)
    assert refusal(filtered_state) == "disk 'vda' already in active block job (mirror)"


@pytest.mark.parametrize(
    ("version", "dies"),
    [
        ((7, 2, 13), False), ((7, 2, 14), True), ((7, 2, 22), True), ((7, 2, 50), True),
        ((8, 0, 0), False), ((10, 0, 13), False), ((5, 2, 0), False),
    ],
)  # fmt: skip
def test_iothreads_are_refused_where_qemu_would_die(version: Any, dies: bool) -> None:
    caps = dataclasses.replace(CAPS, version=version)
    asked = state(iothreads={"sdc": "io0"})
    if not dies:
        assert plan(asked, caps)
        return
    assert refusal(asked, caps) == (
        f"disk 'sdc' runs in iothread 'io0', which QEMU {capabilities.dotted(version)} would not"
        f" survive: {capabilities.NBD_IOTHREAD_ABORT.evidence}"
    )
    assert plan(asked, caps, disks=(disk("sdc", present=False),))


def test_a_storage_daemon_with_an_iothread_has_the_classic_engine() -> None:
    asked = state(iothreads={"sdc": "io0"})
    daemon = dataclasses.replace(HYBRID, commands=HYBRID.commands - {"query-status"})
    assert plan(asked, daemon).engine == "classic"
    assert plan(asked, HYBRID).engine == plan(state(), daemon).engine == "hybrid"
    with pytest.raises(errors.Error, match=r"'sdc' runs in iothread 'io0', .*bdrv_insert_node"):
        backup.plan(definition(asked), asked, daemon, ID, "/scratch", "hybrid")


@pytest.mark.parametrize(
    ("version", "dies"),
    [((2, 5, 0), True), ((5, 2, 0), True), ((7, 2, 0), False), ((7, 2, 22), False)],
)
def test_floppies_are_refused_where_qemu_would_stand_still(version: Any, dies: bool) -> None:
    caps = dataclasses.replace(CAPS, version=version)
    asked = state(synchronous=frozenset({"sdc"}))
    if not dies:
        assert plan(asked, caps)
        return
    assert refusal(asked, caps) == (
        "disk 'sdc' is a floppy or an SD card, the backup of which QEMU"
        f" {capabilities.dotted(version)} might not survive:"
        f" {capabilities.SYNCHRONOUS_WRITER.evidence}"
    )
    assert plan(asked, caps, disks=(disk("sdc", present=False),))


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"filename": "https://host/a.img"}, True),
        ({"filename": 'json:{"driver": "raw", "file": {"driver": "http", "url": "u"}}'}, True),
        ({"below": ("/base", "", "ftp://host/c")}, True),
        ({"below": ("/base", "/http://host/c")}, False),
        ({"backing_files": ("https://host/a.img",), "below": ("nbd+unix:///?socket=a",)}, False),
    ],
)
def test_an_image_on_a_web_server_is_refused(changes: Any, refused: bool) -> None:
    asked = state()
    disks = tuple(
        dataclasses.replace(one, medium=dataclasses.replace(one.medium, **changes))
        if one.target == "sdc" and one.medium else one
        for one in asked.disks
    )  # fmt: skip
    asked = dataclasses.replace(asked, disks=disks)
    if not refused:
        assert plan(asked)
        return
    assert refusal(asked, CAPS) == (
        "disk 'sdc' is, or has below it, an image on a web or FTP server, the reading of which QEMU"
        f" {capabilities.dotted(CAPS.version)} might not survive: {capabilities.CURL_HANG.evidence}"
    )
    assert plan(asked, disks=(disk("sdc", present=False),))


# --- branches: what is decided and sent is in plandata ---

PLANNED = pathlib.Path(__file__).parent / "plandata"
HYBRID = dataclasses.replace(CAPS, version=(8, 0, 0))
OLDER = dataclasses.replace(CAPS, version=(7, 1, 0))


def breaking(caps: capabilities.Capabilities) -> capabilities.Capabilities:
    """Of a QEMU that can have the backup break instead of the guest's write."""
    return dataclasses.replace(caps, features=caps.features | {"on-cbw-error"})


POINT = naming.Point(naming.BackupId("00000001"), 1700000000, 4 << 20)


def bitmap(name: str, **fields: Any) -> block.Bitmap:
    usual = block.Bitmap(naming.BitmapName(name), 65536, 0, True, True, False, False)
    return dataclasses.replace(usual, **fields)


OWN = bitmap("b", count=131072)
POINTED = bitmap(naming.point_bitmap("b", POINT), recording=False)
MARKED = bitmap(naming.mark_bitmap("b"))
SOUND = (OWN, POINTED, MARKED)


def branched_state(
    *bitmaps: block.Bitmap, base: tuple[block.Bitmap, ...] = ()
) -> backup.BlockState:
    """BITMAPS are those of disk vda's image, BASE those of its backing image."""
    reply = test_block.recorded(VERSION, "rest", "query-named-block-nodes")
    nodes = block.parse_named_nodes(reply)
    for node, held in ((naming.NodeName("A"), bitmaps), (naming.NodeName("#block008"), base)):
        nodes[node] = dataclasses.replace(nodes[node], bitmaps=held)
    return state(nodes=nodes)


def branched_plan(
    asked: backup.BlockState,
    target: str = "vda",
    caps: Any = CAPS,
    branch: str | None = "b",
    fork: str | None = None,
    **fields: Any,
) -> backup.BackupPlan:
    """The plan of a backup of one disk."""
    others = {found.target for found in asked.disks if found.medium} - {target}
    left_out = (disk(name, present=False) for name in sorted(others))
    disks = (disk(target, **fields), *left_out)
    return plan(asked, caps, disks=disks, branch=branch, fork=fork)


BRANCHED: dict[str, tuple[backup.BlockState, dict[str, Any]]] = {
    "first": (branched_state(), {}),
    "first-hybrid": (branched_state(), {"caps": HYBRID}),
    "first-that-breaks": (branched_state(), {"caps": breaking(HYBRID)}),
    "first-that-may-not-break": (branched_state(), {"caps": breaking(CAPS)}),
    "first-in-raw": (branched_state(), {"target": "sdc"}),
    "first-with-granularity": (branched_state(), {"granularity": 4096}),
    "full-again": (branched_state(*SOUND), {}),
    "full-of-lost": (branched_state(POINTED, MARKED), {}),
    "incremental": (branched_state(*SOUND), {"type": "incremental"}),
    "incremental-hybrid": (branched_state(*SOUND), {"type": "incremental", "caps": HYBRID}),
    "incremental-of-granularity": (
        branched_state(bitmap("b", granularity=512), POINTED, MARKED),
        {"type": "incremental", "granularity": 512},
    ),
    "incremental-without-a-mark": (branched_state(OWN, POINTED), {"type": "incremental"}),
    "incremental-through-an-overlay": (
        branched_state(OWN, base=SOUND),
        {"type": "incremental"},
    ),
    "incremental-named": (
        branched_state(*SOUND),
        {"type": "incremental", "exportbitmap": "c"},
    ),
    "incremental-named-hybrid": (
        branched_state(*SOUND),
        {"type": "incremental", "exportbitmap": "c", "caps": HYBRID},
    ),
    "incremental-named-older": (
        branched_state(*SOUND),
        {"type": "incremental", "exportbitmap": "c", "caps": OLDER},
    ),
    "incremental-older": (branched_state(*SOUND), {"type": "incremental", "caps": OLDER}),
    "auto-first": (branched_state(), {"type": "auto"}),
    "auto-sound": (
        branched_state(bitmap("b", granularity=512), POINTED, MARKED),
        {"type": "auto"},
    ),
    "auto-lost": (branched_state(POINTED, MARKED), {"type": "auto", "granularity": 512}),
    "forked": (branched_state(*SOUND), {"type": "incremental", "fork": "d"}),
}


@pytest.mark.parametrize("name", BRANCHED)
def test_a_branch(name: str) -> None:
    """What the disk is going to have, then what is sent up to its export."""
    asked, how = BRANCHED[name]
    planned = branched_plan(asked, **how)
    [one] = planned.disks
    [told] = [found for found in planned.definition.disks if found.present]
    assert backup_conf.BackupDef.parse(planned.definition.format()) == planned.definition
    commands = [
        planned.scratch_command(one, "/dev/fdset/0"),
        planned.transaction(),
        *planned.export_commands(one),
    ]
    decided = {
        "engine": planned.engine,
        "type": told.type,
        "reason": told.reason,
        "granularity": told.granularity,
        "since": one.since and one.since.backup,
    }
    sent = [{"execute": sent.execute, "arguments": dict(sent.arguments)} for sent in commands]
    text = "".join(f"{json.dumps(line)}\n" for line in [decided, *sent])
    datacases.check(PLANNED / f"{name}.jsonl", text)


def test_a_disk_that_is_whole_after_all_has_no_changes_to_be_called_anything() -> None:
    """Its running backup is a document that the stop can read."""
    planned = branched_plan(branched_state(), type="auto", exportbitmap="c")
    assert backup_conf.BackupDef.parse(planned.definition.format()) == planned.definition


def test_a_backup_of_which_the_document_could_not_be_read_is_refused() -> None:
    """It is what its stop begins with."""
    with pytest.raises(errors.Error, match=r"dir='/scr\\natch': expected an absolute path"):
        backup.plan(definition(state()), state(), CAPS, ID, "/scr\natch")


GRAPH = {"x-debug-query-block-graph"}
UNSUPPORTED = libvirt.VIR_ERR_OPERATION_UNSUPPORTED
BRANCHES_REFUSED: list[tuple[backup.BlockState, dict[str, Any], int, str]] = [
    (
        branched_state(OWN),
        {},
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        "disk 'vda' has a bitmap 'b' that was made by somebody else: choose another name for the"
        " branch",
    ),
    (
        branched_state(*SOUND),
        {"granularity": 512},
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        "disk 'vda': the bitmap of branch 'b' has granularity 65536, not 512",
    ),
    (
        branched_state(bitmap("b", busy=True), POINTED, MARKED),
        {},
        libvirt.VIR_ERR_OPERATION_INVALID,
        "disk 'vda': the bitmap 'b' is in use by somebody else",
    ),
    (
        branched_state(),
        {"type": "incremental"},
        errors.CHECKPOINT_INCONSISTENT,
        "branch 'b' has no sound point to be incremental from: disk 'vda': it has no good backup of"
        " this branch yet",
    ),
    (
        branched_state(*SOUND, bitmap("d")),
        {"fork": "d"},
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        "disk 'vda' has a bitmap 'd' already: choose another name for the new branch",
    ),
    (
        branched_state(*SOUND, bitmap(naming.point_bitmap("d", POINT), recording=False)),
        {"fork": "d"},
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        "disk 'vda' has a bitmap 'd' already: choose another name for the new branch",
    ),
    (
        dataclasses.replace(branched_state(), graph=None),
        {},
        UNSUPPORTED,
        "disk 'vda': QEMU does not tell which image the guest writes to",
    ),
    (
        branched_state(),
        {"caps": dataclasses.replace(CAPS, commands=frozenset(CAPS.commands - GRAPH))},
        UNSUPPORTED,
        "branch 'b': QEMU 7.2.22 cannot begin, end and export dirty bitmaps at one instant: full"
        " backups only",
    ),
    (
        branched_state(),
        {"branch": None, "granularity": 512},
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        "disk 'vda': a bitmap needs a branch",
    ),
]


@pytest.mark.parametrize(("asked", "how", "code", "text"), BRANCHES_REFUSED)
def test_a_branch_is_refused(
    asked: backup.BlockState, how: dict[str, Any], code: int, text: str
) -> None:
    with pytest.raises(errors.Error) as caught:
        branched_plan(asked, **how)
    assert (caught.value.get_error_code(), caught.value.get_str2()) == (code, text)


def sized(size: int, *bitmaps: block.Bitmap) -> backup.BlockState:
    """Disk vda is of SIZE bytes, and its image has BITMAPS."""
    asked = branched_state(*bitmaps)
    [one] = [disk for disk in asked.disks if disk.target == "vda"]
    assert one.medium is not None
    medium = dataclasses.replace(one.medium, size=size)
    return dataclasses.replace(asked, disks=(dataclasses.replace(one, medium=medium),))


@pytest.mark.parametrize(
    ("size", "least", "usual"),
    [
        (0, 512, 65536),
        (1 << 40, 512, 65536),
        ((1 << 40) + 512, 1024, 65536),
        (7 << 40, 4096, 65536),
        (1 << 47, 65536, 65536),
        ((1 << 47) + 512, 131072, 131072),
        (qcow2.MAX_SIZE, 1 << 20, 1 << 20),
    ],
)
def test_a_large_disk_has_a_bitmap_that_is_not_large(size: int, least: int, usual: int) -> None:
    """QEMU, and the guest with it, stands still while it goes through a bitmap."""
    assert branch.least_granularity(size) == least
    assert branched_plan(sized(size)).definition.disks[0].granularity == usual
    assert branched_plan(sized(size), granularity=least).definition.disks[0].granularity == least
    if least > 512:
        with pytest.raises(errors.Error) as caught:
            branched_plan(sized(size), granularity=least // 2)
        assert caught.value.get_str2() == (
            f"disk 'vda' of {size} bytes is too large for a bitmap of granularity {least // 2},"
            f" for which the guest would have to wait: it takes at least {least}"
        )
    # What there is already stays.
    there = sized(size, bitmap("b", granularity=512), POINTED, MARKED)
    assert branched_plan(there, granularity=512).definition.disks[0].granularity == 512


def test_every_disk_without_a_sound_point_is_named() -> None:
    disks = tuple(
        disk(found.target, type="incremental") if found.target in ("vda", "sdc")
        else disk(found.target, present=False)
        for found in state().disks if found.medium
    )  # fmt: skip
    with pytest.raises(errors.Error) as caught:
        plan(branched_state(), disks=disks, branch="b")
    why = "it has no good backup of this branch yet"
    assert str(caught.value).endswith(f"from: disk 'sdc': {why}; disk 'vda': {why}")


X509 = virtbackup_conf.X509("/tls", verify=True, client_directory="/client")
PSK = virtbackup_conf.Psk("/keys", "me")
IP, UNIX = backup_conf.IpAddress("h", 1, tls=True), backup_conf.UnixAddress("/x", tls=True)


def sent_to_listen(
    address: backup_conf.Address, credentials: Any, caps: Any = CAPS, fd: int | None = None
) -> list[tuple[str, Any]]:
    asked = state()
    wanted = definition(asked, address=address)
    planned = backup.plan(wanted, asked, caps, ID, "/scratch", credentials=credentials)
    return [(command.execute, command.arguments) for command in planned.server_commands(fd)]


def test_tls_by_certificates() -> None:
    tls = "virtbackup-0123abcd-0-tls"
    made, started = sent_to_listen(IP, X509)
    properties = {"dir": "/tls", "endpoint": "server", "verify-peer": True}
    assert made == ("object-add", {"qom-type": "tls-creds-x509", "id": tls, **properties})
    addr = {"type": "inet", "data": {"host": "h", "port": "1"}}
    arguments = {"addr": addr, "max-connections": 0, "tls-creds": tls}
    assert started == ("nbd-server-start", arguments)
    older = dataclasses.replace(CAPS, features=CAPS.features | {"object-add.props"})
    made, _ = sent_to_listen(IP, X509, older)
    assert made[1] == {"qom-type": "tls-creds-x509", "id": tls, "props": properties}
    assert naming.backup_of(tls) == ID


def test_tls_by_a_key_on_a_socket_that_is_handed_over() -> None:
    made, passed, started = sent_to_listen(IP, PSK, fd=7)
    assert made[1]["dir"] == "/keys"
    assert passed == ("getfd", {"fdname": "virtbackup-0123abcd-0-nbd"})
    assert started[1]["addr"] == {"type": "fd", "data": {"str": "virtbackup-0123abcd-0-nbd"}}
    assert "me" not in str([made, started])


def test_without_tls_there_are_no_credentials() -> None:
    [(execute, arguments)] = sent_to_listen(dataclasses.replace(IP, tls=False), X509)
    assert (execute, "tls-creds" in arguments) == ("nbd-server-start", False)


def test_tls_is_refused_where_there_is_none() -> None:
    old = dataclasses.replace(CAPS, version=(6, 2, 0))
    assert sent_to_listen(UNIX, X509)
    assert sent_to_listen(IP, X509, old)
    assert CAPS.takes_listener_for_tls
    assert not old.takes_listener_for_tls
    without = dataclasses.replace(CAPS, features=CAPS.features - {"object-add.tls-creds-psk"})
    for address, credentials, caps, reason in (
        (UNIX, X509, old, "no TLS for exports on a unix socket"),
        (IP, PSK, without, "no TLS for exports by tls-creds-psk"),
        (IP, X509, dataclasses.replace(CAPS, commands=frozenset(CAPS.commands - {"object-add"})),
         "no TLS for exports by tls-creds-x509"),
    ):  # fmt: skip
        with pytest.raises(errors.Error, match=reason) as caught:
            sent_to_listen(address, credentials, caps)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED


def test_a_backup_that_lets_the_disks_be_given_away() -> None:
    """What is over each scratch image for that is ours by name, and goes before the image."""
    asked = state()
    planned = backup.plan(definition(asked), asked, CAPS, ID, "/scratch", gives_way=True)
    sent = [command for disk in planned.disks for command in planned.give_way_commands(disk)]
    assert [command.execute for command in sent] == (
        ["blockdev-add", "blockdev-add", "blockdev-mirror"] * len(planned.disks)
    )
    for number, disk in enumerate(planned.disks):
        over, nowhere, job = (command.arguments for command in sent[3 * number : 3 * number + 3])
        assert over["file"] == disk.scratch
        assert (job["device"], job["target"]) == (over["node-name"], nowhere["node-name"])
        assert nowhere["size"] == disk.size
        names = [over["node-name"], nowhere["node-name"], job["job-id"]]
        assert {naming.backup_of(name) for name in names} == {ID}
        assert all(map(naming.is_image, names[:2]))
        assert sorted([*names[:2], disk.scratch]).index(disk.scratch) == 1
    assert not [c for disk in plan(asked).disks for c in plan(asked).give_way_commands(disk)]


@pytest.mark.parametrize(
    ("version", "engine", "expected"),
    [
        ((5, 2, 0), "classic", False),
        ((7, 2, 22), "classic", True),
        ((7, 2, 22), "hybrid", False),
        ((8, 2, 0), "hybrid", False),
        ((8, 2, 0), "classic", False),
        ((10, 0, 13), "hybrid", True),
        ((10, 0, 13), "classic", False),
    ],
)
def test_who_can_give_the_disks_away(version: Any, engine: Any, expected: bool) -> None:
    assert dataclasses.replace(CAPS, version=version).gives_way(engine) is expected


def test_what_qemu_shows_of_us() -> None:
    assert state().backups() == frozenset()
    job = naming.backup_job(ID, 3)
    running = monitor_json.Job(job, "backup", "running", None)
    ended = dataclasses.replace(running, status="concluded")
    assert state(jobs={job: running}).backups() == {ID}
    assert state(jobs={job: running}).running_jobs() == (job,)
    assert state(jobs={job: ended}).running_jobs() == ()
    beside = naming.yield_job(ID, 0)
    mirror = dataclasses.replace(running, id=beside, type="mirror", status="ready")
    assert state(jobs={beside: mirror, job: ended}).running_jobs() == ()
    theirs = naming.JobId("mirror0")
    assert state(jobs={theirs: dataclasses.replace(running, id=theirs)}).running_jobs() == ()


def test_an_export_or_a_node_shows_a_backup() -> None:
    export, scratch = naming.export(ID, 0), naming.scratch_node(ID, 0)
    shown = monitor_json.Export(export, "nbd", scratch, False)
    assert state(exports={export: shown}).backups() == {ID}
    assert state(graph=block.Graph({("block-driver", scratch): frozenset()})).backups() == {ID}
    nodes = {scratch: block.Medium(scratch, "qcow2", "/s", 1, False)}
    assert state(graph=None, nodes=nodes).backups() == {ID}


@pytest.mark.parametrize(("readonly", "traces"), [(False, {ID}), (True, set())])
def test_a_bitmap_in_an_image_that_is_written_to_is_a_trace(
    readonly: bool, traces: set[naming.BackupId]
) -> None:
    left = (bitmap("b"), bitmap(naming.next_bitmap(ID, 0, "b")))
    node = naming.NodeName("n")
    medium = block.Medium(node, "qcow2", "/n", 1, readonly, left, True)
    for asked in (
        state(nodes={node: medium}),
        state(disks=(block.Disk("vda", medium, None), block.Disk("empty", None, None))),
    ):
        assert asked.traces() == traces
        assert asked.backups() == frozenset()
    job = naming.backup_job(naming.BackupId("00000001"), 0)
    running = {job: monitor_json.Job(job, "backup", "running", None)}
    assert state(nodes={node: medium}, jobs=running).traces() == traces | {"00000001"}


@pytest.mark.parametrize(
    ("job_status", "error", "reason"),
    [
        ("running", None, None),
        ("paused", None, None),
        ("standby", None, None),
        ("concluded", "No space left on device", "its backup job ended: No space left on device"),
        ("concluded", None, "its backup job ended: concluded"),
        ("aborting", None, "its backup job ended: aborting"),
        ("null", None, "its backup job ended: null"),
        ("of the future", None, "its backup job ended: of the future"),
    ],
)
def test_a_job_vouches_only_while_it_runs(
    job_status: str, error: str | None, reason: str | None
) -> None:
    job = monitor_json.Job(naming.backup_job(ID, 0), "backup", job_status, error)
    assert blockjob.job_reason(job) == reason


def test_judgement_is_by_disk() -> None:
    def of(number: int) -> status.DiskStatus:
        return status.DiskStatus(
            target=f"d{number}", size=1, node=naming.NodeName("n"), device=f"/machine/{number}",
            image=naming.NodeName("n"), stores=(naming.NodeName("f"),), offset=0, backing=(),
            guards=(),
            export=naming.export(ID, number), exportname="",
            job=naming.backup_job(ID, number), scratch_file=naming.scratch_file_node(ID, number),
            access=naming.access_node(ID, number), breaks_snapshot=number != 4,
            directory="/scratch", threshold=None, path=None, inode=None, type="full",
            type_reason=None, branch=None,
        )  # fmt: skip

    jobs = {
        naming.backup_job(ID, n): monitor_json.Job(
            naming.backup_job(ID, n), "backup", "running", None
        )
        for n in range(10)
        if n not in (1, 8)
    }
    cancelled = naming.backup_job(ID, 8)
    jobs[cancelled] = monitor_json.Job(cancelled, "backup", "concluded", "Operation canceled")
    shown = {7: naming.access_node(ID, 7), 9: naming.NodeName("A")}
    exports = {
        naming.export(ID, n): monitor_json.Export(
            naming.export(ID, n), "nbd", shown.get(n, naming.scratch_node(ID, n)), n == 3
        )
        for n in range(10)
        if n != 2
    }
    medium = block.Medium(naming.NodeName("n"), "raw", "/n", 1, False)
    drives = {
        f"/machine/{n}": block.Disk(
            f"d{n}", None if n == 6 else medium, f"/machine/{n}", io_status=status_of
        )
        for n, status_of in enumerate(["ok", None, "ok", "ok", "nospace"] + ["ok"] * 5)
        if n not in (5, 8)
    }
    sight = blockjob.Sight(jobs, exports, drives, True, {naming.access_node(ID, 7): "EINVAL"})
    removed = "its export was removed before the backup was stopped"
    disks = [of(number) for number in range(10)]
    assert blockjob.judge(disks, sight) == {
        "d1": "its backup job disappeared",
        "d2": removed,
        "d3": removed,
        "d4": "a write of the guest failed ('nospace') and the guest was paused: its scratch image,"
        " or its own storage, is full or broken",
        "d5": "the disk was unplugged during the backup",
        "d6": "its medium was removed during the backup",
        "d7": "its snapshot is broken: EINVAL",
        "d8": "the disk was unplugged during the backup, and its backup job ended: Operation"
        " canceled",
        "d9": "its export shows node 'A' in place of the frozen disk",
    }
    assert blockjob.stopped_guest(disks, sight)
    reader = dataclasses.replace(drives["/machine/4"], io_status="failed")  # it may have read
    failed = dataclasses.replace(sight, drives={**drives, "/machine/4": reader})
    assert blockjob.judge(disks, failed)["d4"].startswith("a read or a write of the guest failed")
    runs = dataclasses.replace(sight, io_error=False)
    assert "d4" not in blockjob.judge(disks, runs)
    assert not blockjob.stopped_guest(disks, runs)
    away = dataclasses.replace(medium, active=False)
    given = {**drives, "/machine/0": dataclasses.replace(drives["/machine/0"], medium=away)}
    reasons = blockjob.judge(disks, dataclasses.replace(runs, drives=given))
    assert reasons["d0"] == "it was given away during the backup, to a migration or a save"
    node, file, other = (("block-driver", name) for name in "nfg")
    for below, reason in (
        ((file,), None),
        ((), None),
        ((other,), "it got another image, 'g', below its node 'n' during the backup"),
        ((file, other), "it got another image, 'g', below its node 'n' during the backup"),
    ):
        graph = block.Graph({node: frozenset(below), file: frozenset(), other: frozenset()})
        reasons = blockjob.judge(disks, dataclasses.replace(runs, graph=graph))
        assert reasons.get("d0") == reason
        assert reasons["d1"] == "its backup job disappeared"
    # Below a filter over the image: another image over that, and one in its place.
    below_filter = [
        dataclasses.replace(disk, node=naming.NodeName("t"), image=naming.NodeName("n"))
        for disk in disks
    ]
    root, over = ("block-driver", "t"), ("block-driver", "o")
    filtered = dataclasses.replace(drives["/machine/0"], medium=block.Medium(
        naming.NodeName("t"), "throttle", "/n", 1, False))  # fmt: skip
    behind = dataclasses.replace(runs, drives={**drives, "/machine/0": filtered})
    for at, reason in (
        ({over: frozenset({node, other}), node: frozenset({file})}, None),
        (
            {over: frozenset({other})},
            "it got another image, 'g', below its node 't' during the backup",
        ),
    ):
        graph = block.Graph({root: frozenset({over}), **at, file: frozenset(), other: frozenset()})
        reasons = blockjob.judge(below_filter, dataclasses.replace(behind, graph=graph))
        assert reasons.get("d0") == reason
        reasons = blockjob.judge(below_filter[:1], dataclasses.replace(runs, graph=graph))
        assert reasons["d0"] == (reason or "its device got another image, 'n', in place of its own")
    without_devices = dataclasses.replace(runs, drives=None)
    assert set(blockjob.judge(disks, without_devices)) == {"d1", "d2", "d3", "d7", "d8", "d9"}


@pytest.mark.parametrize(
    ("desc", "reason"),
    [
        ("Image not in Bochs format", None),
        ("Catalog size is too large", None),
        ("Extent size must be at least 512", None),
        ("Could not open 'json:{}': Permission denied", "Permission denied"),
        ("Could not open '/a: b': Invalid argument", "Invalid argument"),
        ("Cannot find device='' nor node-name='x'", "Cannot find device='' nor node-name='x'"),
        ("words of the future", "words of the future"),
    ],
)
def test_only_words_known_to_mean_it_say_that_a_frozen_disk_was_read(
    desc: str, reason: str | None
) -> None:
    command = monitor_json.blockdev_add_probe(naming.NodeName("p"), naming.NodeName("f"))
    failure = monitor_json.CommandFailed(command, "GenericError", desc)
    assert monitor_json.parse_probe(failure) == reason


@given(st.integers(0, 1 << 50))
def test_an_empty_image_is_consistent(size: int) -> None:
    """Its tables lie where the header says, within the file, each cluster counted once."""
    parts = dict(qcow2.empty_image(size))
    header = struct.unpack(">4sIQIIQIIQQIIQQQQII", parts[0])
    l1_size, l1_offset, table_offset = header[7], header[8], header[9]
    [block_offset] = struct.unpack(">Q", parts[table_offset])
    clusters = len(parts[block_offset]) // 2
    assert header[5] == size
    assert l1_size * (qcow2.CLUSTER**2 // 8) >= size
    assert clusters * qcow2.CLUSTER == qcow2.file_size(size) >= l1_offset + 8 * l1_size
    assert set(struct.unpack(f">{clusters}H", parts[block_offset])) == {1}
    marked = dict(qcow2.empty_image(size, "a mark"))[0]
    assert marked == parts[0] + b"vbmk\0\0\0\6a mark\0\0" + bytes(8)


def _disk_status() -> status.DiskStatus:
    point = naming.Point(ID, 1700000000, 1 << 20)
    line = status.BranchStatus(naming.NodeName("n"), keeps=True, since=point, dirty=512)
    return status.DiskStatus(
        target="vda", size=1, node=naming.NodeName("n"), device=None,
        image=naming.NodeName("n"), stores=(naming.NodeName("n"),), guards=(naming.NodeName("n"),),
        offset=512, backing=(block.Backing(naming.NodeName("n"), naming.NodeName("m"), None),),
        export=naming.export(ID, 0), exportname="vda",
        job=naming.backup_job(ID, 0), scratch_file=naming.scratch_file_node(ID, 0),
        access=None, breaks_snapshot=False,
        directory="/scratch", threshold=None, path=None, inode=None, type="incremental",
        type_reason="why", branch=line,
    )  # fmt: skip


def test_status_round_trip_and_garbage() -> None:
    whole = status.Status(
        id=ID, phase="running", name="vm", uuid="u",
        definition="<domainbackup><address type='unix' path='/s'/></domainbackup>",
        engine="classic", started=1.5, server=True, socket=None,
        qemu=runtime.Process(1, 2), owner=None, given_up=None, was_stopped=False,
        cancelled=False, advanced=False, verdict=None, told=False,
        save_failure="backup", save_reason=None, branch="b",
        advances="c", disks=(_disk_status(),),
    )  # fmt: skip
    assert status.parse(status.format(whole)) == whole
    for text in ("", "[]", "{}", "7", '{"version": 2}', status.format(whole)[:-20]):
        with pytest.raises(ValueError, match=r".*"):
            status.parse(text)


@pytest.mark.parametrize(
    ("version", "job_type", "job_status", "safe"),
    [
        ((5, 2, 0), "backup", "concluded", False),
        ((5, 2, 0), "backup", "running", True),
        ((5, 2, 0), "create", "concluded", True),
        ((7, 2, 22), "backup", "concluded", True),
        ((7, 2, 22), "stream", "concluded", False),
        ((7, 2, 22), "stream", "running", False),
        ((7, 2, 22), "commit", "concluded", True),
        ((7, 2, 22), "create", "running", False),
        ((7, 2, 22), "create", "concluded", True),
        ((10, 0, 13), "create", "running", True),
        ((10, 0, 13), "stream", "concluded", True),
    ],
)
def test_nodes_are_not_asked_for_where_that_kills_qemu(
    version: Any, job_type: str, job_status: str, safe: bool
) -> None:
    caps = dataclasses.replace(CAPS, version=version)
    job = monitor_json.Job(naming.JobId("theirs"), job_type, job_status, None)
    assert (caps.jobs_against_named_nodes([job]) == []) is safe


_CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff")
_TEXTS = st.text(_CHARACTERS | st.sampled_from("\t\n\r\x7f\x85\x9b"), min_size=1, max_size=6)
_ANY = _TEXTS | st.sampled_from(
    ["yes", "no", "/a b", "/é\u2028", "\u0085", " x ", "64KiB", "0", "]]>"]
)


def _with(
    names: Sequence[str], values: st.SearchStrategy[str]
) -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(st.sampled_from(names), values, max_size=3)


@st.composite
def _documents(draw: st.DrawFn, targets: Sequence[str]) -> str:
    """Mostly one that can be backed up, of any text in it."""
    element = odd_documents.element
    address = {"type": "unix", "path": "/" + draw(_ANY)} if draw(st.booleans()) else {
        "type": "ip", "host": draw(st.sampled_from(["::1", "fe80::1%eth0", "h"])),
        "port": draw(st.sampled_from(["0", "00010809", "65535", " 7000"])),
    }  # fmt: skip
    address |= draw(_with(["tls"], st.sampled_from(["yes", "no"])))
    disks = ""
    for target in targets:
        inner = ""
        if draw(st.booleans()):
            where = draw(st.sampled_from(["file", "dir"]))
            inner = element("source", {where: f"/{draw(_ANY)}"})
        more = draw(_with(["exportname", "reason"], _ANY))
        disks += element("disk", {"name": target} | more, inner)
    branch = draw(st.just("") | _ANY.map(lambda name: element("branch", {"name": name})))
    return element("domainbackup", {}, element("address", address) + branch
                   + element("disks", {}, disks))  # fmt: skip


@given(st.data(), st.lists(_TEXTS, min_size=2, max_size=2, unique=True))
def test_whatever_is_planned_can_be_noted_and_read_again(
    data: st.DataObject, targets: list[str]
) -> None:
    """Else a backup would run of which the next process could not tell."""
    asked = state()
    disks = [
        dataclasses.replace(disk, target=target)
        for disk, target in zip(asked.disks, targets, strict=False)
    ]
    asked = dataclasses.replace(asked, disks=(*disks, *asked.disks[2:]))
    domain = domain_conf.DomainDef("vm", "", 1, tuple(d.definition() for d in asked.disks))
    try:
        wanted = backup_conf.BackupDef.parse(data.draw(_documents(targets))).align_disks(domain)
        planned = backup.plan(wanted, asked, CAPS, ID, "/scratch")
    except errors.Error as failure:
        event(failure.get_str2() or "")
        return
    event("planned")
    ref = hypervisor.DomainRef(targets[0], "", 1)
    session = types.SimpleNamespace(ref=ref, process=None)
    run: Any = types.SimpleNamespace(plan=planned, session=session, thresholds={})
    noted = starting.status_of(run, None, False, None)
    assert status.parse(status.format(noted)) == noted
    assert backup_conf.BackupDef.parse(noted.definition) == planned.definition
