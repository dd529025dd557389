# SPDX-License-Identifier: LGPL-2.1-or-later
"""<domainbackup> read and written: mostly files of tests/backupxmldata."""

import pathlib
from typing import Any

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import datacases
from virtbackup import errors
from virtbackup.conf import backup_conf, domain_conf, storage_conf, xml

DOMAIN = domain_conf.DomainDef(
    "vm",
    "8f0d1f6e-0000-4000-8000-000000000001",
    1,
    (
        domain_conf.DiskDef("vda", source="/a", format="qcow2", capacity=1 << 30),
        domain_conf.DiskDef("vdb", source="/b", format="raw", capacity=512),
        domain_conf.DiskDef("sdro", device="cdrom", source="/c.iso", readonly=True),
        domain_conf.DiskDef("sdempty", device="cdrom"),
    ),
)


def name(path: pathlib.Path) -> str:
    return path.stem


def refusal(failure: errors.Error) -> str:
    return f"{failure.get_error_code()} {failure}\n"


@pytest.mark.parametrize("case", datacases.inputs("backupxmldata/valid"), ids=name)
def test_valid(case: pathlib.Path) -> None:
    parsed = backup_conf.BackupDef.parse(case.read_text())
    datacases.check(case.with_suffix(".out"), parsed.format())
    assert backup_conf.BackupDef.parse(parsed.format()) == parsed


@pytest.mark.parametrize("case", datacases.inputs("backupxmldata/invalid"), ids=name)
def test_invalid(case: pathlib.Path) -> None:
    with pytest.raises(errors.Error) as caught:
        backup_conf.BackupDef.parse(case.read_text())
    datacases.check(case.with_suffix(".err"), refusal(caught.value))


@pytest.mark.parametrize("case", datacases.inputs("backupxmldata/aligned"), ids=name)
def test_aligned(case: pathlib.Path) -> None:
    aligned = backup_conf.BackupDef.parse(case.read_text()).align_disks(DOMAIN)
    datacases.check(case.with_suffix(".out"), aligned.format())
    assert aligned.align_disks(DOMAIN) == aligned
    assert backup_conf.BackupDef.parse(aligned.format()) == aligned


@pytest.mark.parametrize("case", datacases.inputs("backupxmldata/refused"), ids=name)
def test_refused_by_the_domain(case: pathlib.Path) -> None:
    with pytest.raises(errors.Error) as caught:
        backup_conf.BackupDef.parse(case.read_text()).align_disks(DOMAIN)
    datacases.check(case.with_suffix(".err"), refusal(caught.value))
    assert caught.value.get_error_domain() == libvirt.VIR_FROM_DOMAIN


@pytest.mark.parametrize(
    ("disk", "limit"),
    [
        ('exportname="{}"', backup_conf.MAX_EXPORT_NAME),
        ('type="incremental" exportbitmap="{}"', backup_conf.MAX_BITMAP_NAME),
    ],
)
def test_the_longest_names(disk: str, limit: int) -> None:
    document = (
        '<domainbackup><address type="unix" path="/x"/><branch name="b"/>'
        f'<disks><disk name="vda" {disk}/></disks></domainbackup>'
    )
    assert backup_conf.BackupDef.parse(document.format("x" * limit)).disks
    for longer in ("x" * (limit + 1), "x" * (limit - 1) + "é"):
        with pytest.raises(errors.Error, match=f"of disk 'vda' is longer than {limit} bytes"):
            backup_conf.BackupDef.parse(document.format(longer))


def test_an_address_without_a_port_is_one_that_picks_it() -> None:
    bare = backup_conf.IpAddress("h")
    read = backup_conf.BackupDef.parse(backup_conf.BackupDef(bare).format()).address
    assert read == backup_conf.IpAddress("h", autoport=True)
    assert bare.picks_port
    assert not backup_conf.IpAddress("h", 1).picks_port
    assert backup_conf.IpAddress("h", 1, autoport=True).picks_port
    assert backup_conf.IpAddress("h", 1).endpoint == ("h", 1)


@pytest.mark.parametrize(
    ("branch", "advance", "fork", "advances"),
    [
        (None, None, None, None),
        ("b", None, None, "b"),
        ("b", True, None, "b"),
        ("b", False, None, None),
        ("b", None, "c", "c"),
        ("b", False, "c", "c"),
    ],
)
def test_which_branch_advances(
    branch: str | None, advance: bool | None, fork: str | None, advances: str | None
) -> None:
    address = backup_conf.UnixAddress("/x")
    definition = backup_conf.BackupDef(address, branch=branch, advance=advance, fork=fork)
    assert definition.advances == advances


@pytest.mark.parametrize(("reason", "sound"), [(None, True), ("why", False)])
def test_what_has_no_reason_against_it_is_sound(reason: str | None, sound: bool) -> None:
    assert backup_conf.BranchDisk("vda", 1, 1, True, reason, None).sound == sound


@pytest.mark.parametrize(
    ("branch", "text"),
    [
        ("", "branch name '': expected a name without '/'"),
        ("a/b", "branch name 'a/b': expected a name without '/'"),
        ("virtbackup-", "branch name 'virtbackup-' begins with 'virtbackup-', which is reserved"),
        ("x" * 1024, "branch name is longer than 1023 bytes"),
        ("é" * 512, "branch name is longer than 1023 bytes"),
        ("x" * 1023, None),
        ("not virtbackup-", None),
        ("\ud800", "branch name '\ufffd' holds characters that XML cannot carry"),
        ("a\udcff", "branch name 'a\ufffd' holds characters that XML cannot carry"),
        ("a\x01b", "branch name 'a\ufffdb' holds characters that XML cannot carry"),
        ("\ufdd0", None),
    ],
)
def test_branch_names(branch: str, text: str | None) -> None:
    if text is None:
        backup_conf.check_branch_name(branch)
        return
    with pytest.raises(errors.Error) as caught:
        backup_conf.check_branch_name(branch)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_INVALID_ARG
    assert caught.value.get_error_domain() == libvirt.VIR_FROM_DOMAIN
    assert caught.value.get_str2() == text


def test_a_large_document_is_refused_unread() -> None:
    padding = "<!--" + "x" * xml.MAX_DOCUMENT + "-->"
    with pytest.raises(errors.Error, match=r"larger than 1048576") as caught:
        backup_conf.BackupDef.parse(f"{padding}<domainbackup/>")
    assert caught.value.get_error_code() == libvirt.VIR_ERR_XML_ERROR


@pytest.mark.parametrize("document", ["\ud800", "<domainbackup>\x00</domainbackup>"])
def test_text_that_no_xml_can_hold(document: str) -> None:
    with pytest.raises(errors.Error):
        backup_conf.BackupDef.parse(document)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536), ("64k", 65536), ("64K", 65536), ("64KiB", 65536), ("32Kib", 32768),
        ("64KB", 64000), ("1M", 1 << 20), ("2GiB", 2 << 30), ("512b", 512), ("512 bytes", 512),
        ("1 TiB", 1 << 40), ("1mb", 1000**2),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert storage_conf.parse_size(text) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"), (1, "1"), (1000, "1000"), (1024, "1KiB"), (65536, "64KiB"), (1025, "1025"),
        (1 << 20, "1MiB"), ((1 << 20) + 1024, "1025KiB"), (3 << 30, "3GiB"), (1 << 40, "1TiB"),
        (1 << 50, "1024TiB"),
    ],
)  # fmt: skip
def test_sizes_as_documents_have_them(size: int, text: str) -> None:
    assert storage_conf.format_size(size) == text


@given(st.integers(0, 1 << 50))
def test_sizes_round_trip(size: int) -> None:
    assert storage_conf.parse_size(storage_conf.format_size(size)) == size


_characters = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/")
_names = st.text(_characters, min_size=1, max_size=20).filter(lambda text: text == text.strip())
_paths = _names.map(lambda text: f"/{text}")
_hosts = st.sampled_from(["0.0.0.0", "::", "::1", "host.example", "fe80::1%eth0"])
_yes_or_no = st.none() | st.booleans()
_addresses = st.one_of(
    st.builds(
        backup_conf.UnixAddress, _paths.filter(lambda path: len(path.encode()) < 100), _yes_or_no
    ),
    st.builds(backup_conf.IpAddress, _hosts, st.integers(1, 65535), _yes_or_no, _yes_or_no),
    st.builds(backup_conf.IpAddress, _hosts, st.none(), _yes_or_no, st.just(True)),
)
_sources = st.one_of(
    st.builds(storage_conf.Source, file=_paths), st.builds(storage_conf.Source, dir=_paths)
)
_disks = st.builds(
    backup_conf.BackupDiskDef,
    name=_names,
    present=st.none() | st.booleans(),
    type=st.sampled_from([None, "full", "incremental", "auto"]),
    source=st.none() | _sources,
    granularity=st.none() | st.integers(9, 31).map(lambda bits: 1 << bits),
    exportname=st.none() | _names,
    reason=st.none() | _names,
) | st.builds(
    backup_conf.BackupDiskDef,
    name=_names,
    type=st.sampled_from(["incremental", "auto"]),
    exportbitmap=st.none() | _names,
)
_definitions = st.builds(
    backup_conf.BackupDef,
    address=_addresses,
    disks=st.lists(_disks, max_size=5).map(tuple),
    branch=_names,
    advance=_yes_or_no,
) | st.builds(
    backup_conf.BackupDef,
    address=_addresses,
    disks=st.lists(_disks, max_size=5).map(tuple),
)


@given(_definitions)
def test_parse_and_format_are_inverses(definition: backup_conf.BackupDef) -> None:
    assert backup_conf.BackupDef.parse(definition.format()) == definition


@given(st.text(st.sampled_from('<>/="dis kabumproth&;0123'), max_size=200) | st.text(max_size=100))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        backup_conf.BackupDef.parse(text)
    except errors.Error as failure:
        assert str(failure)


_pieces = st.recursive(
    st.sampled_from(
        ["", '<address type="unix" path="/x"/>', '<address type="ip" host="h" autoport="yes"/>',
         '<address type="ip" host="h" port="0" tls="no"/>', '<address type="unix" tls="x"/>',
         '<address type="ip" host="h" port="7000"/>',
         '<branch name="b"/>', "<source/>", '<disk name="a"/>', '<bitmap granularity="1k"/>']
    ),
    lambda inner: st.tuples(
        st.sampled_from(["disks", "disk", "address", "branch", "x"]),
        st.sampled_from(["", ' name="a"', ' present="yes"', ' type="unix"', ' path="y"']),
        st.lists(inner, max_size=3),
    ).map(lambda item: f"<{item[0]}{item[1]}>{''.join(item[2])}</{item[0]}>"),
    max_leaves=6,
)  # fmt: skip


@given(st.lists(_pieces, max_size=4))
def test_the_two_schema_engines_agree(pieces: list[str]) -> None:
    """What lxml refuses, xmlschema can explain; what it accepts, xmlschema accepts."""
    import xmlschema

    root: Any = xml.parse(f"<domainbackup>{''.join(pieces)}</domainbackup>", "domainbackup")
    schema = xmlschema.XMLSchema10(xml._text(backup_conf.SCHEMA))
    assert schema.is_valid(root) == xml.is_valid(root, backup_conf.SCHEMA)
