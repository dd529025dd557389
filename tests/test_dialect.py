# SPDX-License-Identifier: LGPL-2.1-or-later
"""What would be sent to which QEMU, as data: tests/dialectdata/VERSION.jsonl, from 2.5 to 5.1.

VIRTBACKUP_REGENERATE=1 writes the files anew, and the test fails that once.
"""

import dataclasses
import json
import os
import pathlib

import libvirt
import pytest

from tests import test_plan
from tests.live import older
from virtbackup import errors
from virtbackup.qemu import capabilities, dialect, monitor_json, naming

HERE = pathlib.Path(__file__).parent / "dialectdata"


def capabilities_of(age: older.Age) -> capabilities.Capabilities:
    """Of a QEMU of AGE, by its commands and its schema."""
    speaker = older.Translator(age)
    replies = {
        command: speaker.reply(command, {"return": test_plan.RECORDED.reply(command)})["return"]
        for command in ("query-commands", "query-qmp-schema")
    }
    return capabilities.Capabilities(
        (2, 5, 0),
        "",
        monitor_json.parse_commands(replies["query-commands"]),
        capabilities.parse_features(replies["query-qmp-schema"]),
    )


def conversation(caps: capabilities.Capabilities) -> list[monitor_json.Command]:
    """All kinds of commands of one backup of one disk, in the order of their sending."""
    left_out = tuple(test_plan.disk(name, present=False) for name in ("sdc", "vda", "F"))
    plan = test_plan.plan(test_plan.state(), caps, disks=left_out)
    [disk] = plan.disks
    spoken = dialect.Dialect(caps)
    drive = "" if caps.job_ids else disk.source_name
    job = monitor_json.Job(disk.job, "backup", "running", None, drive)
    return [
        *plan.server_commands(),
        plan.scratch_command(disk, "/dev/fdset/0"),
        plan.transaction(),
        *plan.export_commands(disk),
        spoken.query_jobs(),
        spoken.job_cancel(job),
        spoken.job_dismiss(job),
        spoken.blockdev_del(disk.scratch),
    ]


@pytest.mark.parametrize("age", older.AGES, ids=lambda age: age.name)
def test_what_is_sent(age: older.Age) -> None:
    lines = [
        json.dumps({"execute": command.execute, "arguments": dict(command.arguments)})
        for command in conversation(capabilities_of(age))
    ]
    text = "\n".join(lines) + "\n"
    path = HERE / f"{age.name}.jsonl"
    if os.environ.get("VIRTBACKUP_REGENERATE") == "1":
        path.write_text(text)
        pytest.fail(f"{path} written anew: read it, then run again")
    assert text == path.read_text()


def test_a_job_without_an_id_is_known_by_its_speed() -> None:
    backup = naming.BackupId("fedcba98")
    for number in (0, 1, 65535):
        job = naming.backup_job(backup, number)
        assert naming.job_of_speed(naming.job_speed(job)) == job
        assert naming.job_speed(job) < 1 << 63
    for speed in (0, 1 << 20, (1 << 61) - 1, (1 << 61) + (1 << 48), (1 << 63) - 1):
        assert naming.job_of_speed(speed) is None


@pytest.mark.parametrize("age", older.AGES, ids=lambda age: age.name)
def test_that_qemu_would_take_it(age: older.Age) -> None:
    """But for a job's dismissal, where a job that has ended is gone."""
    caps = capabilities_of(age)
    translator = older.Translator(age)
    for command in conversation(caps):
        if command.execute == "block-job-dismiss" and not caps.auto_dismiss:
            continue
        translator.command({"execute": command.execute, "arguments": dict(command.arguments)})


def test_a_node_without_a_drive_is_refused_where_only_drives_are_known() -> None:
    for age in older.AGES:
        caps = capabilities_of(age)
        if not age.drive_ids:
            assert test_plan.plan(test_plan.state(), caps).disks
            continue
        with pytest.raises(errors.Error, match="disk 'vda' is no drive with an id") as refusal:
            test_plan.plan(test_plan.state(), caps)
        assert refusal.value.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED


def test_an_export_name_is_refused_where_there_is_none() -> None:
    left_out = tuple(test_plan.disk(name, present=False) for name in ("sdc", "vda", "F"))
    for age in older.AGES:
        caps = capabilities_of(age)
        for exportname in ("mine", "drive-b", None):
            disks = (test_plan.disk("drive-b", exportname=exportname), *left_out)
            if not caps.export_names and exportname == "mine":
                with pytest.raises(errors.Error) as refusal:
                    test_plan.plan(test_plan.state(), caps, disks=disks)
                assert refusal.value.get_str2() == (
                    "disk 'drive-b': QEMU 2.5.0 cannot give an export a name of its own"
                )
                continue
            planned = test_plan.plan(test_plan.state(), caps, disks=disks)
            [one] = planned.disks
            names = {disk.exportname for disk in planned.definition.disks if disk.present}
            scratch = dialect.Dialect(caps).name(one.scratch)
            expected = exportname or "drive-b" if caps.export_names else scratch
            assert names == {one.exportname} == {expected}


def test_a_branch_is_refused_where_no_bitmap_can_be_exported() -> None:
    for age in older.AGES:
        caps = capabilities_of(age)
        assert caps.branches == (age.name == "5.1")
        if not caps.branches:
            with pytest.raises(errors.Error, match="cannot begin, end and export dirty bitmaps"):
                test_plan.plan(test_plan.state(), caps, branch="b")


@pytest.mark.parametrize(
    "missing",
    ["query-qmp-schema", "blockdev-add", "blockdev-del", "query-jobs", "nbd-server-start",
     "block-export-add"],
)  # fmt: skip
def test_what_a_qemu_lacks_is_named(missing: str) -> None:
    alternatives = {"query-jobs": {"query-block-jobs"}, "block-export-add": {"nbd-server-add"}}
    caps = capabilities_of(older.AGES[0])
    without = caps.commands - {missing} - alternatives.get(missing, set())
    lacking = dataclasses.replace(caps, commands=without)
    with pytest.raises(errors.Error, match=f"QEMU 2.5.0 has no {missing}"):
        test_plan.plan(test_plan.state(), lacking)
