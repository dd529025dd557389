# SPDX-License-Identifier: LGPL-2.1-or-later
"""One dialect of <domainbackup> into the other: files of tests/translatedata, and there and back.

A file whose name begins with ``alone-`` is translated without a domain.
"""

import dataclasses
import pathlib

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import datacases
from tests.test_backup_conf import DOMAIN, name, refusal
from virtbackup import errors
from virtbackup.conf import (
    backup_conf,
    dialects,
    domain_conf,
    native_conf,
    storage_conf,
    translate,
)


def _domain() -> domain_conf.DomainDef:
    return DOMAIN


def _check(case: pathlib.Path, to: dialects.Dialect) -> None:
    alone = case.stem.startswith("alone-")
    try:
        translated = translate.translate(case.read_text(), to, None if alone else _domain)
    except errors.Error as failure:
        assert not case.with_suffix(".out").exists(), failure
        datacases.check(case.with_suffix(".err"), refusal(failure))
        return
    assert not case.with_suffix(".err").exists(), translated
    datacases.check(case.with_suffix(".out"), translated)
    assert translate.translate(translated, to) == translated


@pytest.mark.parametrize("case", datacases.inputs("translatedata/to-native"), ids=name)
def test_to_native(case: pathlib.Path) -> None:
    _check(case, "native")


@pytest.mark.parametrize("case", datacases.inputs("translatedata/to-proposal"), ids=name)
def test_to_proposal(case: pathlib.Path) -> None:
    _check(case, "proposal")


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in datacases.inputs("translatedata/to-proposal")
        if not case.stem.startswith("alone-")
    ],
    ids=name,
)
def test_what_is_read_is_what_is_translated(case: pathlib.Path) -> None:
    document = case.read_text()
    try:
        translated = translate.translate(document, "proposal", _domain)
    except errors.Error as failure:
        with pytest.raises(errors.Error) as caught:
            dialects.read(document, _domain)
        assert refusal(caught.value) == refusal(failure)
    else:
        assert dialects.read(document, _domain).format() == translated


def test_an_address_that_cannot_be_said_is_told_by_its_line() -> None:
    document = "<domainbackup mode='pull'>\n<server transport='fd' fdgroup='g'/>\n</domainbackup>"
    with pytest.raises(errors.Error) as caught:
        dialects.address(document)
    assert str(caught.value) == (
        "unsupported configuration: <server transport='fd'> cannot be said in the proposal"
        " (line 2, element <server>)"
    )


@pytest.mark.parametrize("case", datacases.inputs("translatedata/mixed"), ids=name)
def test_a_document_in_both_dialects(case: pathlib.Path) -> None:
    with pytest.raises(errors.Error) as caught:
        dialects.dialect(case.read_text())
    datacases.check(case.with_suffix(".err"), refusal(caught.value))
    both: tuple[dialects.Dialect, ...] = ("native", "proposal")
    for to in both:
        with pytest.raises(errors.Error) as again:
            translate.translate(case.read_text(), to, _domain)
        assert str(again.value) == str(caught.value)


# --- which dialect --------------------------------------------------------------------------------

PROPOSAL = datacases.inputs("backupxmldata", "*/*.xml")
NATIVE = [
    path
    for path in datacases.inputs("nativexmldata", "*/*.xml")
    if "<domainbackup/>" not in path.read_text()
]


@pytest.mark.parametrize("case", PROPOSAL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_proposal_is_known(case: pathlib.Path) -> None:
    """What the proposal's parser reads or refuses is not taken for anything else, even where what
    it refuses is libvirt's."""
    document = case.read_text()
    try:
        parsed = backup_conf.BackupDef.parse(document)
    except errors.Error as failure:
        with pytest.raises(errors.Error) as caught:
            dialects.read(document, _domain)
        expected = (str(failure), "mixes two dialects")
        assert any(text in str(caught.value) for text in expected)
    else:
        assert dialects.dialect(document) == "proposal"
        assert dialects.read(document, _never) == parsed


@pytest.mark.parametrize("case", NATIVE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_libvirts_own_is_known(case: pathlib.Path) -> None:
    try:
        native_conf.BackupDef.parse(case.read_text())
    except errors.Error:
        with pytest.raises(errors.Error):
            dialects.read(case.read_text(), _domain)
    else:
        assert dialects.dialect(case.read_text()) == "native"


def _never() -> domain_conf.DomainDef:
    raise AssertionError("asked for the domain without need")


@pytest.mark.parametrize(
    "document",
    [
        "<domainbackup mode='pull'><server name='h' port='1'/></domainbackup>",
        "<domainbackup><address type='unix' path='/x'/></domainbackup>",
        "<domainbackup><address type='unix' path='/x'/><disks><disk name='vda'/></disks>"
        "</domainbackup>",
    ],
)
def test_the_domain_is_asked_for_only_where_it_is_needed(document: str) -> None:
    address = dialects.read(document, _never).address
    assert isinstance(address, backup_conf.Address)
    assert dialects.address(document) == address


@pytest.mark.parametrize(
    ("document", "address"),
    [
        (
            "<domainbackup mode='pull'><server name='h' port='1' tls='yes'/>"
            "<disks><disk name='vda'/></disks></domainbackup>",
            backup_conf.IpAddress("h", 1, tls=True),
        ),
        ("<domainbackup mode='pull'/>", backup_conf.IpAddress("localhost", autoport=True)),
    ],
)
def test_the_address_is_told_without_the_domain(
    document: str, address: backup_conf.Address
) -> None:
    assert dialects.address(document) == address


# --- there and back -------------------------------------------------------------------------------

_names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/"),
    min_size=1,
    max_size=10,
)
_branches = _names.filter(lambda text: not text.startswith(backup_conf.OWN_PREFIX))
_hosts = st.sampled_from(["0.0.0.0", "::1", "h.example"])
_yes_or_no = st.none() | st.booleans()
_addresses = st.one_of(
    st.builds(backup_conf.UnixAddress, _names.map(lambda text: f"/{text}"), _yes_or_no),
    st.builds(backup_conf.IpAddress, _hosts, st.integers(1, 65535), _yes_or_no),
    st.builds(backup_conf.IpAddress, _hosts, st.none(), _yes_or_no, st.just(True)),
)
_files = st.none() | _names.map(lambda text: f"/{text}")


@st.composite
def _domains(draw: st.DrawFn) -> domain_conf.DomainDef:
    disks = []
    for letter in "abcde"[: draw(st.integers(0, 5))]:
        source = draw(st.sampled_from(["/images/x"] * 4 + [None]))
        device = "cdrom" if source is None else "disk"
        readonly = draw(st.sampled_from([False] * 4 + [True]))
        disks.append(domain_conf.DiskDef(f"vd{letter}", device, source=source, readonly=readonly))
    return domain_conf.DomainDef("vm", "u", 1, tuple(disks))


@st.composite
def proposals(draw: st.DrawFn, domain: domain_conf.DomainDef) -> backup_conf.BackupDef:
    """A document that says nothing that libvirt cannot."""
    branch = draw(st.none() | _branches)
    types: list[backup_conf.DiskType | None] = [None, "full"]
    if branch is not None:
        types.append("incremental")
    disks = []
    for disk in domain.disks:
        if draw(st.booleans()):
            continue
        file = draw(_files)
        usable = disk.has_medium and not disk.readonly
        presence = [None, True, False] if usable else [False] * 9 + [True]
        kind = draw(st.sampled_from(types))
        disks.append(
            backup_conf.BackupDiskDef(
                name=disk.target,
                present=draw(st.sampled_from(presence)),
                type=kind,
                exportbitmap=draw(st.none() | _names) if kind == "incremental" else None,
                source=None if file is None else storage_conf.Source(file=file),
                exportname=draw(st.none() | _names),
                reason=draw(st.none() | _names),
            )
        )
    if not any(disk.type == "incremental" and disk.present is not False for disk in disks):
        branch = None
    if branch is None:
        disks = [
            dataclasses.replace(disk, type=None, exportbitmap=None)
            if disk.type == "incremental"
            else disk
            for disk in disks
        ]
    return backup_conf.BackupDef(
        address=draw(_addresses), disks=tuple(draw(st.permutations(disks))), branch=branch
    )


@given(st.data())
def test_there_and_back_from_the_proposal(data: st.DataObject) -> None:
    """What a start makes of the document is what it makes of its translation's translation; what
    the one refuses about the domain, the translation refuses."""
    domain = data.draw(_domains())
    definition = data.draw(proposals(domain))
    try:
        aligned = definition.align_disks(domain)
    except errors.Error as failure:
        if definition.disks:
            with pytest.raises(errors.Error) as caught:
                translate.to_native(definition, lambda: domain)
            assert str(caught.value) == str(failure)
        return
    native = translate.to_native(definition, lambda: domain)
    assert native_conf.BackupDef.parse(native.format()) == native
    back = translate.to_proposal(native, lambda: domain)
    assert backup_conf.BackupDef.parse(back.format()) == back
    assert back.align_disks(domain) == aligned
    # From there on, not a letter changes.
    assert translate.to_native(back, lambda: domain) == native


@st.composite
def natives(draw: st.DrawFn, domain: domain_conf.DomainDef) -> native_conf.BackupDef:
    """A document that says nothing that the proposal cannot."""
    checkpoint = draw(st.none() | _branches)
    of_all = draw(st.booleans())
    disks = []
    for disk in domain.disks:
        if disk.readonly or not disk.has_medium or draw(st.booleans()):
            continue
        modes: list[native_conf.BackupMode | None] = [None]
        if checkpoint is not None:
            modes += ["full", "incremental"]
        mode = draw(st.sampled_from(modes))
        own = checkpoint if mode != "full" and (not of_all or draw(st.booleans())) else None
        file = draw(_files)
        disks.append(
            native_conf.BackupDiskDef(
                name=disk.target,
                backup=draw(st.sampled_from([None, True, False])),
                type=draw(st.sampled_from([None, "file"])),
                backupmode=mode,
                incremental=own,
                exportname=draw(st.none() | _names),
                exportbitmap=None
                if mode == "full" or checkpoint is None
                else draw(st.none() | _names),
                image=None if file is None else native_conf.Image(file),
                driver=draw(st.sampled_from([None, "qcow2"])),
                index=draw(st.none() | st.integers(0, 9)),
            )
        )
    address = draw(_addresses)
    return native_conf.BackupDef(
        mode="pull",
        server=native_conf.UnixServer(address.path, address.tls)
        if isinstance(address, backup_conf.UnixAddress)
        else native_conf.TcpServer(address.host, address.port, address.tls),
        incremental=checkpoint if of_all else None,
        disks=tuple(draw(st.permutations(disks))),
    )


def _meaning(definition: native_conf.BackupDef, domain: domain_conf.DomainDef) -> object:
    """What libvirt's start makes of a document."""
    aligned = definition.align_disks(domain)
    server = aligned.server
    assert server is not None
    return dataclasses.replace(server, tls=bool(server.tls)), [
        (
            disk.name,
            disk.backup and (
                disk.backupmode,
                disk.incremental,
                disk.exportname or disk.name,
                disk.incremental
                and (disk.exportbitmap or native_conf.default_exportbitmap(disk.name)),
                disk.image,
            ),
        )
        for disk in aligned.disks
    ]  # fmt: skip


@given(st.data())
def test_there_and_back_from_libvirts_own(data: st.DataObject) -> None:
    domain = data.draw(_domains())
    definition = data.draw(natives(domain))
    try:
        proposal = translate.to_proposal(definition, lambda: domain)
    except errors.Error as failure:
        # Not for its words, then, but for the domain.
        assert failure.get_error_code() == libvirt.VIR_ERR_CONFIG_UNSUPPORTED
        assert "cannot be said" not in str(failure)
        return
    assert backup_conf.BackupDef.parse(proposal.format()) == proposal
    native = translate.to_native(proposal, lambda: domain)
    assert native_conf.BackupDef.parse(native.format()) == native
    if domain.disks:
        assert _meaning(native, domain) == _meaning(definition, domain)
    # From there on, not a letter changes.
    assert translate.to_proposal(native, lambda: domain) == proposal


@given(st.data())
def test_nothing_is_left_out(data: st.DataObject) -> None:
    """Any one thing that cannot be said, wherever it stands, is an error that names its disk."""
    domain = domain_conf.DomainDef("vm", "u", 1, DOMAIN.disks[:2])
    definition = data.draw(proposals(domain).filter(lambda found: found.disks))
    number = data.draw(st.integers(0, len(definition.disks) - 1))
    disk = definition.disks[number]
    worse = [
        dataclasses.replace(disk, present=True, type="auto"),
        dataclasses.replace(disk, present=True, granularity=4096),
        dataclasses.replace(disk, present=True, source=storage_conf.Source(dir="/x")),
        dataclasses.replace(disk, present=True, source=storage_conf.Source(reserve=True)),
        dataclasses.replace(disk, present=True, source=storage_conf.Source("/x", reserve=True)),
    ]
    disk = data.draw(st.sampled_from(worse))
    disks = (*definition.disks[:number], disk, *definition.disks[number + 1 :])
    with pytest.raises(errors.Error, match=f"disk '{disk.name}': .* cannot be said") as caught:
        translate.to_native(dataclasses.replace(definition, disks=disks), lambda: domain)
    assert caught.value.get_error_code() == libvirt.VIR_ERR_CONFIG_UNSUPPORTED


def test_an_exportbitmap_that_is_not_said_is_libvirts() -> None:
    disk = native_conf.BackupDiskDef("vda", backup=True, type="file")
    definition = native_conf.BackupDef("pull", native_conf.UnixServer("/x"), "c", (disk,))
    proposal = translate.to_proposal(definition, _domain)
    [back] = [disk for disk in translate.to_native(proposal, _domain).disks if disk.backup]
    assert back == dataclasses.replace(disk, exportbitmap="backup-vda")


def test_a_running_backup_is_told_as_libvirt_tells_one() -> None:
    """With all that a client needs: the port that was picked, every export's name, which disks are
    incremental to what. A disk that was plugged in meanwhile is none of it."""
    running = backup_conf.BackupDef(
        backup_conf.IpAddress("localhost", 48297, autoport=True),
        disks=(
            backup_conf.BackupDiskDef(
                "vda", True, "incremental", storage_conf.Source(dir="/s"), 4096, "vda", "changes"
            ),
            backup_conf.BackupDiskDef(
                "vdb", True, "full", storage_conf.Source("/f"), None, "root", reason="new"
            ),
            backup_conf.BackupDiskDef("sdc", present=False),
        ),
        branch="B",
        fork="C",
    )
    told = translate.running_to_native(running)
    assert native_conf.BackupDef.parse(told.format()) == told
    assert told == native_conf.BackupDef(
        "pull",
        native_conf.TcpServer("localhost", 48297),
        "B",
        (
            native_conf.BackupDiskDef(
                "vda", True, "file", "incremental", "B", "vda", "changes"
            ),
            native_conf.BackupDiskDef(
                "vdb", True, "file", "full", exportname="root", image=native_conf.Image("/f")
            ),
            native_conf.BackupDiskDef("sdc", backup=False),
        ),
    )  # fmt: skip


def test_a_running_backup_that_begins_a_branch_is_full() -> None:
    disks = (backup_conf.BackupDiskDef("vda", True, "full", exportname="vda"),)
    running = backup_conf.BackupDef(backup_conf.UnixAddress("/x"), disks=disks, branch="B")
    assert translate.running_to_native(running).incremental is None
