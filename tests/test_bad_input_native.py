# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents of any kind in libvirt's own dialect, or in none: read and translated, or refused by an
error of libvirt's, in time and in one line."""

import pathlib
import time
from collections.abc import Callable

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import datacases, odd_documents
from tests.test_backup_conf import DOMAIN
from virtbackup import errors
from virtbackup.conf import backup_conf, dialects, domain_conf, native_conf, translate, xml

DOCUMENTS = [
    path.read_text()
    for folder in ("nativexmldata", "translatedata")
    for path in datacases.inputs(folder, "*/*.xml")
]
DIALECTS: tuple[dialects.Dialect, ...] = ("native", "proposal")
PARSE: dict[dialects.Dialect, Callable[[str], backup_conf.BackupDef | native_conf.BackupDef]] = {
    "native": native_conf.BackupDef.parse,
    "proposal": backup_conf.BackupDef.parse,
}


def domain() -> domain_conf.DomainDef:
    return DOMAIN


def refused(document: str) -> str | None:
    """Why libvirt's parser refuses DOCUMENT; None when it does not. Whatever it is, its dialect and
    its translations are sound."""
    for to in DIALECTS:
        _translated(document, to)
    try:
        parsed = native_conf.BackupDef.parse(document)
    except errors.Error as failure:
        assert failure.get_error_code()
        return str(failure)
    assert native_conf.BackupDef.parse(parsed.format()) == parsed
    return None


def _translated(document: str, to: dialects.Dialect) -> None:
    """What comes out is a document of that dialect, which the other one can say again."""
    try:
        found = dialects.dialect(document)
        translated = translate.translate(document, to, domain)
    except errors.Error as failure:
        assert failure.get_error_code()
        assert str(failure)
        return
    assert PARSE[to](translated).format() == translated
    if found != to:
        there = translate.translate(translated, found, domain)
        assert translate.translate(there, to, domain) == translated


# --- mutations ------------------------------------------------------------------------------------

_own = st.sampled_from(
    [" mode='pull'", " mode='push'", "<incremental>c</incremental>", "<server name='h' port='1'/>",
     "<server transport='fd' fdgroup='x'/>", " backup='no'", " type='block'", " exportbitmap='c'",
     " incremental='d'", " backupmode='full'", "<scratch file='/s'/>", "<target file='/s'/>",
     "<seclabel/>", "<label>\u00a0</label>", "<address type='unix' path='/x'/>", " present='no'",
     "vda", "vdb", "virtbackup-1"]
)  # fmt: skip


_pieces = _own | odd_documents.pieces


@given(odd_documents.mutated(DOCUMENTS, _pieces))
def test_mutated_documents(document: str) -> None:
    refused(document)


@given(st.lists(_pieces, max_size=30).map("".join))
def test_any_markup(text: str) -> None:
    refused(text)
    refused(f"<domainbackup mode='pull'>{text}</domainbackup>")


_VALUES = ["unix", "tcp", "fd", "/a", "yes", "no", "file", "block", "full", "incremental", "vda",
           "", " ", "65536", "0", "00080", " 7 ", "\t7\n", "[", "[]", "[::1]"]  # fmt: skip


def _attributes(*names: str) -> st.SearchStrategy[dict[str, str]]:
    return odd_documents.attributes(_VALUES, *names)


@given(
    _attributes("transport", "name", "port", "socket", "fdgroup", "tls", "x"),
    _attributes("name", "backup", "type", "backupmode", "incremental", "exportname", "index"),
    _attributes("file", "dev", "x"),
)
def test_any_attributes(
    server: dict[str, str], disk: dict[str, str], scratch: dict[str, str]
) -> None:
    element = odd_documents.element
    disks = f"<disks>{element('disk', disk, element('scratch', scratch))}</disks>"
    refused(f"<domainbackup mode='pull'>{element('server', server)}{disks}</domainbackup>")


# --- large ----------------------------------------------------------------------------------------

SERVER = '<server name="h" port="1"/>'


def _many_disks(count: int, last: str = "") -> str:
    return f"<domainbackup mode='pull'>{SERVER}{odd_documents.disks(count, last)}</domainbackup>"


def _of_a_disk(inner: str) -> str:
    disk = f'<disk name="vda"><scratch file="/s">{inner}</scratch></disk>'
    return f"<domainbackup mode='pull'>{SERVER}<disks>{disk}</disks></domainbackup>"


LARGE: dict[str, tuple[str, str | None]] = {
    "many disks": (_many_disks(10_000), None),
    "many disks, the last one wrong": (_many_disks(2_000, '<disk name="x" wrong="1"/>'), "wrong"),
    "many disks, the last one nameless": (_many_disks(2_000, "<disk/>"), "missing name"),
    "many servers": (f"<domainbackup mode='pull'>{SERVER * 2_000}</domainbackup>", "server"),
    "many labels": (_of_a_disk("<seclabel/>" * 50_000), None),
    "deep": (_of_a_disk("<seclabel>" * 50_000), "depth"),
    "long checkpoint": (
        f"<domainbackup><incremental>{'x' * 1_000_000}</incremental></domainbackup>",
        "longer than 1023",
    ),
    "long mode": (f"<domainbackup mode='{'x' * 1_000_000}'/>", "unknown backup mode"),
    "long port": (
        f"<domainbackup mode='pull'><server name='h' port='{'1' * 5000}'/></domainbackup>",
        "out of range",
    ),
    "many attributes": (
        "<domainbackup " + " ".join(f"a{n}=''" for n in range(100_000)) + "/>",
        "more than 5000 attributes",
    ),
    "too large": ("<domainbackup>" + " " * xml.MAX_DOCUMENT, "larger than"),
}


@pytest.mark.parametrize("case", LARGE)
def test_large(case: str) -> None:
    odd_documents.check_large(refused, *LARGE[case])


def test_many_disks_are_translated_in_time() -> None:
    disks = tuple(domain_conf.DiskDef(f"d{n}", source="/x") for n in range(10_000))
    many = domain_conf.DomainDef("vm", "u", 1, disks)
    began = time.process_time()
    proposal = translate.translate(_many_disks(10_000), "proposal", lambda: many)
    back = translate.translate(proposal, "native", lambda: many)
    assert back.count("backup='yes'".replace("'", '"')) == 10_000
    assert time.process_time() - began < 20


# --- what a document may not reach ----------------------------------------------------------------


@pytest.mark.parametrize("hint", ["noNamespaceSchemaLocation", "schemaLocation"])
@pytest.mark.parametrize("more", ["", ' wrong="1"'])
def test_schema_hints_are_not_followed(hint: str, more: str, tmp_path: pathlib.Path) -> None:
    """Neither engine opens the file, and nothing keeps the hint."""
    document = _of_a_disk(f"<seclabel {odd_documents.schema_hint(tmp_path, hint)}{more}/>")
    found = refused(document)
    assert (found is None) == (more == "")
    assert "schema.xsd" not in str(found)
    if found is None:
        assert "schema.xsd" not in native_conf.BackupDef.parse(document).format()


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", odd_documents.ODD)
@pytest.mark.parametrize(
    "make",
    [
        lambda text: native_conf.BackupDef("pull", native_conf.UnixServer(text)),
        lambda text: native_conf.BackupDef("pull", native_conf.TcpServer(text)),
        lambda text: native_conf.BackupDef("pull", native_conf.FdServer(text)),
        lambda text: native_conf.BackupDef(incremental=text),
        lambda text: native_conf.BackupDef(disks=(native_conf.BackupDiskDef(text),)),
        lambda text: native_conf.BackupDef(
            disks=(native_conf.BackupDiskDef("a", image=native_conf.Image(text)),)
        ),
        lambda text: native_conf.BackupDef(
            disks=(
                native_conf.BackupDiskDef(
                    "a",
                    image=native_conf.Image(
                        "/x", seclabels=(native_conf.Kept("label", text=text),)
                    ),
                ),
            )
        ),
    ],
)
def test_what_xml_cannot_carry_is_an_error(
    make: Callable[[str], native_conf.BackupDef], text: str
) -> None:
    with pytest.raises(errors.Error, match="characters that XML cannot carry") as caught:
        make(text).format()
    assert caught.value.get_error_code() == libvirt.VIR_ERR_XML_ERROR
