# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents before anybody looks for what they say: their bounds, and what is no part of them."""

import libvirt
import pytest
import xmlschema
from lxml import etree

from virtbackup import errors
from virtbackup.conf import backup_conf, native_conf, xml


def _of_size(size: int) -> str:
    return f"<é>{' ' * (size - 9)}</é>"


def _with_attributes(count: int) -> str:
    return "<a " + " ".join(f"a{number}=''" for number in range(count)) + "/>"


@pytest.mark.parametrize(
    ("document", "root"),
    [
        (_of_size(xml.MAX_DOCUMENT), "é"),
        (_with_attributes(5000), "a"),
        (f"<a>{_with_attributes(3000) * 2}</a>", "a"),
        ("<!-- <b/> --><a/>\n", "a"),
    ],
    ids=["size", "attributes", "attributes of two", "comment"],
)
def test_what_just_fits(document: str, root: str) -> None:
    assert xml.parse(document, root).tag == root


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ("<a>\ud800</a>", "not text that UTF-8 can carry: surrogates not allowed"),
        (_of_size(xml.MAX_DOCUMENT + 1), "document of 1048577 bytes is larger than 1048576"),
        ("<a>\0</a>", "document with a NUL character"),
        ("<a/>\0", "document with a NUL character"),
        (
            "\n<!DOCTYPE a>\n<!DOCTYPE b>\n<a/>",
            "document type declarations and entities are refused (line 2)",
        ),
        (_with_attributes(5001), "an element has more than 5000 attributes"),
        ("<b/>", "unexpected root element <b>, expecting <a> (line 1, element <b>)"),
        (
            "<a xmlns='urn:x'/>",
            "unexpected root element <{urn:x}a>, expecting <a> (line 1, element <{urn:x}a>)",
        ),
    ],
    ids=["text", "size", "NUL", "NUL behind", "type", "attributes", "root", "namespace"],
)
def test_what_is_refused(document: str, text: str) -> None:
    with pytest.raises(errors.Error) as caught:
        xml.parse(document, "a")
    assert str(caught.value) == f"XML error: {text}"
    assert caught.value.get_error_code() == libvirt.VIR_ERR_XML_ERROR
    assert caught.value.get_error_domain() == libvirt.VIR_FROM_DOMAIN


def test_comments_and_instructions_are_no_part_of_a_document() -> None:
    root = xml.parse("<a>b<!-- c -->d<?e f?>g</a>", "a")
    assert (list(root), root.text) == ([], "bdg")


@pytest.mark.parametrize("name", ["latin-1", "ISO-8859-1", "utf-16", "UCS-4", "utf-8", "x-of_ours"])
@pytest.mark.parametrize("quote", ["'", '"'])
def test_what_a_document_says_of_its_encoding_does_not_count(name: str, quote: str) -> None:
    said = f"<?xml version='1.0' encoding = {quote}{name}{quote} standalone='no' ?>"
    assert xml.parse(f"{said}<a>é</a>", "a").text == "é"
    unsaid = said.replace(f"encoding = {quote}{name}{quote}", " " * (len(name) + 13))
    assert _refused(f"{said}<a>é</b>") == _refused(f"{unsaid}<a>é</b>")
    _refused(f"{said[:-2]}encoding={quote}{name}{quote}?><a/>")
    _refused(f"<?xml version='1.0' encoding='{name} '?><a/>")


def _refused(document: str) -> str:
    with pytest.raises(errors.Error) as caught:
        xml.parse(document, "a")
    return str(caught.value)


def test_text_between_elements_is_told_behind_elements_that_hold_text() -> None:
    document = (
        "<domainbackup mode='pull'>\n<incremental>c</incremental>\n"
        "<disks>\n<disk name='vda'>\u00a0</disk>\n</disks></domainbackup>"
    )
    root = xml.parse(document, "domainbackup")
    failure = xml.explain(root, native_conf.SCHEMA, native_conf.TEXTS)
    assert str(failure) == (
        "XML document failed to validate against schema: line 4: /domainbackup/disks/disk: text"
        " between elements: expected elements only"
    )


def test_what_one_engine_alone_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No document is known that the other one takes."""
    monkeypatch.setattr(xmlschema.XMLSchema10, "iter_errors", lambda *_: iter(()))
    with pytest.raises(errors.Error, match="line 2: /domainbackup/address: ") as caught:
        backup_conf.BackupDef.parse(
            "<domainbackup>\n<address type='unix' path='/x' a=''/></domainbackup>"
        )
    assert caught.value.get_error_code() == libvirt.VIR_ERR_XML_INVALID_SCHEMA


def test_characters_that_xml_cannot_carry_are_shown_as_one_each() -> None:
    assert xml.shown("a\0\x1f\t\n\udcff\ufffeé\U0001f600") == (
        "a\ufffd\ufffd\t\n\ufffd\ufffdé\U0001f600"
    )


def test_what_cannot_be_written_is_an_error() -> None:
    with pytest.raises(errors.Error) as caught, xml.writing():
        etree.Element("a").text = "\0"
    assert str(caught.value) == (
        "XML error: a name or a path holds characters that XML cannot carry"
    )
