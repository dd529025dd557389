# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents of any kind: parsed, or refused by an error of libvirt's, in time and in one line."""

import pathlib
import time
from collections.abc import Callable

import libvirt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import virtbackup
from tests import datacases, odd_documents
from virtbackup import errors
from virtbackup.conf import backup_conf, domain_conf, storage_conf, xml

DOCUMENTS = [path.read_text() for path in datacases.inputs("backupxmldata", "*/*.xml")]


def refused(document: str) -> str | None:
    """Why BackupDef.parse refuses DOCUMENT; None when it does not."""
    try:
        parsed = backup_conf.BackupDef.parse(document)
    except errors.Error as failure:
        assert failure.get_error_code()
        return str(failure)
    assert backup_conf.BackupDef.parse(parsed.format()) == parsed
    return None


# --- mutations ------------------------------------------------------------------------------------


@given(odd_documents.mutated(DOCUMENTS, odd_documents.pieces))
def test_mutated_documents(document: str) -> None:
    refused(document)


@given(st.lists(odd_documents.pieces, max_size=30).map("".join))
def test_any_markup(text: str) -> None:
    refused(text)
    refused(f"<domainbackup>{text}</domainbackup>")


_VALUES = ["ip", "unix", "/a", "yes", "", " ", "65536", "0", "00080", " 7 ", "\t7\n"]
_attributes = odd_documents.attributes(
    _VALUES, "type", "host", "port", "path", "name", "present", "file", "x"
)


@given(_attributes, _attributes, _attributes)
def test_any_attributes(
    address: dict[str, str], disk: dict[str, str], source: dict[str, str]
) -> None:
    element = odd_documents.element
    disks = f"<disks>{element('disk', disk, element('source', source))}</disks>"
    refused(f"<domainbackup>{element('address', address)}{disks}</domainbackup>")


# --- large ----------------------------------------------------------------------------------------

ADDRESS = '<address type="unix" path="/x"/>'


def _many_disks(count: int, last: str = "") -> str:
    return f"<domainbackup>{ADDRESS}{odd_documents.disks(count, last)}</domainbackup>"


LARGE: dict[str, tuple[str, str | None]] = {
    "many disks": (_many_disks(10_000), None),
    "many disks, the last one wrong": (_many_disks(2_000, '<disk name="x" wrong="1"/>'), "wrong"),
    "many disks, the last one nameless": (_many_disks(2_000, "<disk/>"), "missing name"),
    "many addresses": (f"<domainbackup>{ADDRESS * 2_000}</domainbackup>", "address"),
    "deep": ("<domainbackup>" * 50_000, "depth"),
    "deep and closed": ("<a>" * 100_000 + "</a>" * 100_000, "depth"),
    "long attribute": (
        f'<domainbackup><address type="unix" path="/{"x" * 1_000_000}"/></domainbackup>',
        "longer than 107",
    ),
    "long name": (
        f'<domainbackup>{ADDRESS}<disks><disk name="{"x" * 1_000_000}"/></disks></domainbackup>',
        None,
    ),
    "many attributes": (
        "<domainbackup " + " ".join(f"a{n}=''" for n in range(100_000)) + "/>",
        "more than 5000 attributes",
    ),
    "long port": (
        f'<domainbackup><address type="ip" host="h" port="{"0" * 5000}1"/></domainbackup>',
        "cannot parse port",
    ),
    "long port of a path": (
        f'<domainbackup><address type="unix" path="/x" port="{"1" * 5000}"/></domainbackup>',
        "do not belong to unix",
    ),
    "long size": (
        f'<domainbackup>{ADDRESS}<disks><disk name="a"><bitmap granularity="{"1" * 5000}"/>'
        "</disk></disks></domainbackup>",
        "a size such as",
    ),
    "too large": ("<domainbackup>" + " " * xml.MAX_DOCUMENT, "larger than"),
}


@pytest.mark.parametrize("case", LARGE)
def test_large(case: str) -> None:
    odd_documents.check_large(refused, *LARGE[case])


def test_many_disks_are_aligned_in_time() -> None:
    disks = tuple(domain_conf.DiskDef(f"d{n}", source="/x") for n in range(10_000))
    domain = domain_conf.DomainDef("vm", "u", 1, disks)
    began = time.process_time()
    aligned = backup_conf.BackupDef.parse(_many_disks(10_000)).align_disks(domain)
    assert len(aligned.disks) == 10_000
    assert time.process_time() - began < 20


# --- what a document may not reach ----------------------------------------------------------------


@pytest.mark.parametrize("hint", ["noNamespaceSchemaLocation", "schemaLocation"])
@pytest.mark.parametrize("more", ["", ' wrong="1"'])
def test_schema_hints_are_not_followed(hint: str, more: str, tmp_path: pathlib.Path) -> None:
    """Neither engine opens the file: what is in it would be an error."""
    hints = odd_documents.schema_hint(tmp_path, hint)
    found = refused(f"<domainbackup {hints}{more}>{ADDRESS}</domainbackup>")
    assert (found is None) == (more == "")
    assert "schema.xsd" not in str(found)


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", odd_documents.ODD)
@pytest.mark.parametrize(
    "make",
    [
        lambda text: backup_conf.BackupDef(backup_conf.UnixAddress(text)),
        lambda text: backup_conf.BackupDef(backup_conf.IpAddress(text, 1)),
        lambda text: backup_conf.BackupDef(backup_conf.UnixAddress("/x"), branch=text),
        lambda text: backup_conf.BackupDef(
            backup_conf.UnixAddress("/x"), (backup_conf.BackupDiskDef(text),)
        ),
        lambda text: backup_conf.BackupDef(
            backup_conf.UnixAddress("/x"),
            (backup_conf.BackupDiskDef("a", source=storage_conf.Source(file=text)),),
        ),
        lambda text: domain_conf.DomainDef(text, "u"),
        lambda text: domain_conf.DomainDef("n", "u", 1, (domain_conf.DiskDef(text),)),
    ],
)
def test_what_xml_cannot_carry_is_an_error(
    make: Callable[[str], backup_conf.BackupDef | domain_conf.DomainDef], text: str
) -> None:
    with pytest.raises(errors.Error, match="characters that XML cannot carry") as caught:
        make(text).format()
    assert caught.value.get_error_code() == libvirt.VIR_ERR_XML_ERROR


@pytest.mark.parametrize("text", odd_documents.ODD)
def test_a_medium_of_any_name_is_shown(text: str) -> None:
    disk = domain_conf.DiskDef("vda", source=f"/x{text}")
    read = domain_conf.DomainDef.parse(domain_conf.DomainDef("n", "u", 1, (disk,)).format())
    assert "\ufffd" in str(read.disks[0].source)


@pytest.mark.parametrize(
    "document",
    [
        '<domain id="x"/>',
        f'<domain id="{"1" * 5000}"/>',
        '<domain id="-1"/>',
        "<domain><devices><disk><target dev='a'/><capacity>x</capacity></disk></devices></domain>",
    ],
)
def test_a_domain_with_numbers_that_are_none(document: str) -> None:
    with pytest.raises(errors.Error, match="is not a number"):
        domain_conf.DomainDef.parse(document)


# --- where documents and names come in ------------------------------------------------------------


@given(st.text(max_size=20) | st.sampled_from(["qmp://[", "qmp:///a%00b", "qmp:///\ud800", "\0"]))
@example("qmp:///%ff")
@example("qmp:///" + "x" * 200)
@example("qmp:///x?engine=classic&engine=x;&&=")
@example("qmp://\u2100/")
@example("nowhere:")
def test_any_uri(uri: str) -> None:
    with pytest.raises(libvirt.libvirtError):
        virtbackup.open(uri)
