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
from tests import datacases
from virtbackup import errors
from virtbackup.conf import backup_conf, domain_conf, storage_conf, xml

XSI = "http://www.w3.org/2001/XMLSchema-instance"
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

_pieces = st.one_of(
    st.sampled_from(
        ["<", ">", "/>", '"', "'", "&", "&amp;", "&#0;", "&#xD800;", "&#1114112;", "&x;", "<!--",
         "-->", "<![CDATA[", "]]>", "<?x?>", "<?xml version='1.1'?>", "<!DOCTYPE a>", "\0", "\r",
         "\ufeff", "\ufffe", "\ud800", "\udcff", "\U0001f600", "\u202e", " ", "\u00a0", "0" * 30,
         "-1", "1e9", "disk", "<disk name='a'/>", "<source/>", " name='b'", " xml:id='x'",
         " xmlns='urn:x'", " xmlns:a='urn:a'", "a:", f" xmlns:xsi='{XSI}'", " xsi:nil='true'",
         " xsi:type='disk'", " xsi:schemaLocation='urn:x /dev/zero'", "\x1b[2J", "\x85"]
    ),
    st.text(max_size=3),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A document of ours with some places overwritten."""
    text: str = draw(st.sampled_from(DOCUMENTS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + draw(_pieces) + text[end:]
    return text


@given(mutated())
def test_mutated_documents(document: str) -> None:
    refused(document)


@given(st.lists(_pieces, max_size=30).map("".join))
def test_any_markup(text: str) -> None:
    refused(text)
    refused(f"<domainbackup>{text}</domainbackup>")


_attributes = st.dictionaries(
    st.sampled_from(["type", "host", "port", "path", "name", "present", "file", "x"]),
    st.one_of(
        st.sampled_from(
            ["ip", "unix", "/a", "yes", "", " ", "65536", "0", "00080", " 7 ", "\t7\n"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    ),
    max_size=4,
)


@given(_attributes, _attributes, _attributes)
def test_any_attributes(
    address: dict[str, str], disk: dict[str, str], source: dict[str, str]
) -> None:
    def element(name: str, attributes: dict[str, str], inner: str = "") -> str:
        shown = "".join(
            f' {key}="' + "".join(f"&#{ord(char)};" for char in value) + '"'
            for key, value in attributes.items()
        )
        return f"<{name}{shown}>{inner}</{name}>"

    disks = f"<disks>{element('disk', disk, element('source', source))}</disks>"
    refused(f"<domainbackup>{element('address', address)}{disks}</domainbackup>")


# --- large ----------------------------------------------------------------------------------------

ADDRESS = '<address type="unix" path="/x"/>'


def _many_disks(count: int, last: str = "") -> str:
    disks = "".join(f'<disk name="d{n}"/>' for n in range(count))
    return f"<domainbackup>{ADDRESS}<disks>{disks}{last}</disks></domainbackup>"


LARGE: dict[str, tuple[str, str | None]] = {
    "many disks": (_many_disks(10_000), None),
    "many disks, the last one wrong": (_many_disks(10_000, '<disk name="x" wrong="1"/>'), "wrong"),
    "many disks, the last one nameless": (_many_disks(10_000, "<disk/>"), "missing name"),
    "many addresses": (f"<domainbackup>{ADDRESS * 10_000}</domainbackup>", "address"),
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
    document, reason = LARGE[case]
    began = time.monotonic()
    found = refused(document)
    assert time.monotonic() - began < 5
    assert (found is None) == (reason is None), found
    assert reason is None or reason in str(found)


def test_many_disks_are_aligned_in_time() -> None:
    disks = tuple(domain_conf.DiskDef(f"d{n}", source="/x") for n in range(10_000))
    domain = domain_conf.DomainDef("vm", "u", 1, disks)
    began = time.monotonic()
    aligned = backup_conf.BackupDef.parse(_many_disks(10_000)).align_disks(domain)
    assert len(aligned.disks) == 10_000
    assert time.monotonic() - began < 5


# --- what a document may not reach ----------------------------------------------------------------


@pytest.mark.parametrize("hint", ["noNamespaceSchemaLocation", "schemaLocation"])
@pytest.mark.parametrize("more", ["", ' wrong="1"'])
def test_schema_hints_are_not_followed(hint: str, more: str, tmp_path: pathlib.Path) -> None:
    """Neither engine opens the file: what is in it would be an error."""
    path = tmp_path / "schema.xsd"
    path.write_text("not a schema")
    path.chmod(0)
    value = path if hint.startswith("no") else f"urn:x {path}"
    found = refused(
        f'<domainbackup xmlns:xsi="{XSI}" xsi:{hint}="{value}"{more}>{ADDRESS}</domainbackup>'
    )
    assert (found is None) == (more == "")
    assert "schema.xsd" not in str(found)


# --- writing --------------------------------------------------------------------------------------

ODD = ["\0", "a\x1bb", "\ud800", "\udcff", "\ufffe", "\x0b"]


@pytest.mark.parametrize("text", ODD)
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


@pytest.mark.parametrize("text", ODD)
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
