# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backup needs of a <domain>: mostly files of tests/domainxmldata."""

import dataclasses
import pathlib

import libvirt
import pytest

from tests import datacases
from tests.test_backup_conf import DOMAIN, name, refusal
from virtbackup import errors
from virtbackup.conf import backup_conf, capabilities_conf, domain_conf, native_conf


@pytest.mark.parametrize("case", datacases.inputs("domainxmldata/valid"), ids=name)
def test_valid(case: pathlib.Path) -> None:
    parsed = domain_conf.DomainDef.parse(case.read_text())
    datacases.check(case.with_suffix(".out"), parsed.format())


@pytest.mark.parametrize("case", datacases.inputs("domainxmldata/invalid"), ids=name)
def test_invalid(case: pathlib.Path) -> None:
    with pytest.raises(errors.Error) as caught:
        domain_conf.DomainDef.parse(case.read_text())
    datacases.check(case.with_suffix(".err"), refusal(caught.value))


def test_round_trip() -> None:
    more = (
        domain_conf.DiskDef("fda", "floppy", "dir", "/d", alias="fdc0-0-0"),
        domain_conf.DiskDef("sda", "lun", "block", "/dev/b", readonly=True),
        domain_conf.DiskDef("vdc", type="network", source="x"),
        domain_conf.DiskDef("vdd", type="volume", source="v"),
        domain_conf.DiskDef("part", source="/p", is_part=True),
    )
    for domain in (
        DOMAIN,
        domain_conf.DomainDef("vm", "u", disks=more),
        domain_conf.DomainDef("", "", 0),
    ):
        assert domain_conf.DomainDef.parse(domain.format()) == domain


def test_what_another_disk_is_made_of_takes_part_where_it_is_listed() -> None:
    """Also where the domain is known by its document, as to a pull and a daemon's clients."""
    disks = (
        domain_conf.DiskDef("vda", source="/a"),
        domain_conf.DiskDef("part", source="/a", is_part=True),
    )
    domain = domain_conf.DomainDef.parse(domain_conf.DomainDef("vm", "u", disks=disks).format())
    own = backup_conf.BackupDef(backup_conf.UnixAddress("/s"))
    native = native_conf.BackupDef.parse("<domainbackup mode='pull'/>")
    assert [disk.present for disk in own.align_disks(domain).disks] == [True, False]
    assert [disk.backup for disk in native.align_disks(domain).disks] == [True, False]
    listed = dataclasses.replace(own, disks=(backup_conf.BackupDiskDef("part"),))
    assert [disk.present for disk in listed.align_disks(domain).disks] == [True, True]


def test_a_disk_that_should_take_part_and_has_no_image() -> None:
    """QEMU has closed it. It is no empty drive, which a backup passes over without a word."""
    disks = (domain_conf.DiskDef("sr0", "cdrom"), domain_conf.DiskDef("vda"), DOMAIN.disks[1])
    domain = domain_conf.DomainDef("vm", "u", disks=disks)
    own = backup_conf.BackupDef(backup_conf.UnixAddress("/s"))
    native = native_conf.BackupDef.parse("<domainbackup mode='pull'/>")
    for definition in own, native:
        with pytest.raises(errors.Error, match="disk 'vda' has no image any more") as caught:
            definition.align_disks(domain)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    without = dataclasses.replace(own, disks=(backup_conf.BackupDiskDef("vda", present=False),))
    presence = [disk.present for disk in without.align_disks(domain).disks]
    assert presence == [False, False, True]


def test_a_path_that_no_xml_can_hold_is_only_shown() -> None:
    disk = domain_conf.DiskDef("vda", source="/a\x1b\udcff")
    told = domain_conf.DomainDef("vm", "u", disks=(disk,)).format()
    [read] = domain_conf.DomainDef.parse(told).disks
    assert read.source == "/a\ufffd\ufffd"


def test_a_name_that_no_xml_can_hold_is_refused() -> None:
    with pytest.raises(errors.Error, match="characters that XML cannot carry") as caught:
        domain_conf.DomainDef("v\x1b", "u").format()
    assert caught.value.get_error_code() == libvirt.VIR_ERR_XML_ERROR


def test_capabilities_tell_the_processors() -> None:
    assert capabilities_conf.Capabilities("x86_64").format() == (
        "<capabilities>\n  <host>\n    <cpu>\n      <arch>x86_64</arch>\n    </cpu>\n"
        "  </host>\n</capabilities>\n"
    )
