# SPDX-License-Identifier: LGPL-2.1-or-later
"""<domaincheckpoint> read and written: mostly files of tests/checkpointxmldata."""

import dataclasses
import pathlib

import pytest
from hypothesis import given

from tests import datacases, odd_documents
from tests.test_backup_conf import name, refusal
from virtbackup import errors
from virtbackup.conf import checkpoint_conf

WHOLE = checkpoint_conf.CheckpointDef(
    name="monday",
    description="before the upgrade",
    parent="sunday",
    creation_time=1700000000,
    disks=(
        checkpoint_conf.CheckpointDiskDef("vda", "bitmap", "monday", 65536),
        checkpoint_conf.CheckpointDiskDef("vdb", "no"),
        checkpoint_conf.CheckpointDiskDef("vdc"),
    ),
)


@pytest.mark.parametrize("case", datacases.inputs("checkpointxmldata/valid"), ids=name)
def test_valid(case: pathlib.Path) -> None:
    """What is libvirt's to say is passed over."""
    parsed = checkpoint_conf.CheckpointDef.parse(case.read_text())
    datacases.check(case.with_suffix(".out"), parsed.format())
    assert checkpoint_conf.CheckpointDef.parse(parsed.format()) == parsed


@pytest.mark.parametrize("case", datacases.inputs("checkpointxmldata/invalid"), ids=name)
def test_invalid(case: pathlib.Path) -> None:
    with pytest.raises(errors.Error) as caught:
        checkpoint_conf.CheckpointDef.parse(case.read_text())
    datacases.check(case.with_suffix(".err"), refusal(caught.value))


@given(
    odd_documents.mutated(
        [path.read_text() for path in datacases.inputs("checkpointxmldata", "*/*.xml")],
        odd_documents.pieces,
    )
)
def test_a_spoilt_document_is_read_or_refused(document: str) -> None:
    try:
        parsed = checkpoint_conf.CheckpointDef.parse(document)
    except errors.Error:
        return
    assert checkpoint_conf.CheckpointDef.parse(parsed.format()) == parsed


def test_all_that_is_known_is_told() -> None:
    """The domain by its depth, however it was laid out itself."""
    domain = (
        "<domain>\n<name>vm</name><description>a <b>bold</b> one</description>\n"
        "      <devices>  <disk/>\n</devices></domain>"
    )
    asked = datacases.DATA / "checkpointxmldata/valid/everything.xml"
    assert WHOLE.format(domain) == asked.read_text()


def test_what_is_no_domain_is_not_put_in() -> None:
    with pytest.raises(errors.Error, match="unexpected root element <x>, expecting <domain>"):
        WHOLE.format("<x/>")


def test_a_name_that_no_xml_can_hold_is_refused() -> None:
    with pytest.raises(errors.Error, match="characters that XML cannot carry"):
        dataclasses.replace(WHOLE, parent="\x1b").format()


def test_which_disks_are_left_out() -> None:
    assert WHOLE.left_out(["vda", "vdb", "vdc", "vdd"]) == ["vdb", "vdd"]
    assert checkpoint_conf.CheckpointDef().left_out(["vda"]) == []
