# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading XML from anybody: bounded, no entities, no network, checked by a schema (virxml.c)."""

import contextlib
import functools
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any

import libvirt
from lxml import etree

from virtbackup import errors

MAX_DOCUMENT = 1 << 20
"""Bytes; a larger document is refused unread."""

_MAX_ATTRIBUTES = 5000
"""In one element: libxml2 compares each with each."""

_SCHEMAS = pathlib.Path(__file__).parents[1] / "schemas"
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_SPACE = " \t\r\n"
"""XML's; Unicode has more."""
_TYPE = "{http://www.w3.org/2001/XMLSchema-instance}type"


def xml_error(detail: str, element: etree._Element | None = None) -> errors.Error:
    """VIR_ERR_XML_ERROR, naming the line of ELEMENT where there is one."""
    return report(libvirt.VIR_ERR_XML_ERROR, detail, element)


def report(code: int, detail: str, element: etree._Element | None = None) -> errors.Error:
    """An error of any code about ELEMENT: ``DETAIL (line N, element <name>)``."""
    if element is not None:
        detail = f"{detail} (line {element.sourceline}, element <{element.tag}>)"
    return errors.error(code, detail, domain=libvirt.VIR_FROM_DOMAIN)


def parse(document: str, root: str) -> etree._Element:
    """The root element of DOCUMENT, which must be ROOT.

    Errors: VIR_ERR_XML_ERROR for a document that is too large, not well-formed, declares a
    document type (so no entity of any kind is ever read), or has another root.
    """
    try:
        data = _without_encoding(document).encode()
    except UnicodeEncodeError as failure:
        raise xml_error(f"not text that UTF-8 can carry: {failure.reason}") from failure
    if len(data) > MAX_DOCUMENT:
        raise xml_error(f"document of {len(data)} bytes is larger than {MAX_DOCUMENT}")
    if "\0" in document:  # where libxml2 would take it to end
        raise xml_error("document with a NUL character")
    if (start := document.find("<!DOCTYPE")) >= 0:
        line = document.count("\n", 0, start) + 1
        raise xml_error(f"document type declarations and entities are refused (line {line})")
    if any(part.count("=") > _MAX_ATTRIBUTES for part in document.split("<")):
        raise xml_error(f"an element has more than {_MAX_ATTRIBUTES} attributes")
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        element = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as failure:
        raise xml_error(f"{failure.msg}") from failure
    if element.tag != root:
        raise xml_error(f"unexpected root element <{element.tag}>, expecting <{root}>", element)
    return element


_ENCODING = re.compile(
    r"""(\ufeff?<\?xml[ \t\r\n]+version[ \t\r\n]*=[ \t\r\n]*(?:'[^'<>]*'|"[^"<>]*"))"""
    r"""([ \t\r\n]+encoding[ \t\r\n]*=[ \t\r\n]*(?:'[A-Za-z][\w.-]*'|"[A-Za-z][\w.-]*"))""",
    re.ASCII,
)
"""What a document says of its encoding. It is text already, and not every libxml2 that is told the
encoding passes over the name of one that it does not know."""


def _without_encoding(document: str) -> str:
    """With as much space in its place: an error's line and column stay."""
    found = _ENCODING.match(document)
    if found is None:
        return document
    return found[1] + re.sub(r"[^\n]", " ", found[2]) + document[found.end() :]


def embedded(document: str, root: str) -> etree._Element:
    """The root element of DOCUMENT, to be put into another one, by whose depth ``indented`` then
    lays it out. Errors: as ``parse``."""
    element = parse(document, root)
    for each in element.iter():
        if len(each) and not (each.text or "").strip():
            each.text = None
        if not (each.tail or "").strip():
            each.tail = None
    return element


def is_valid(element: etree._Element, schema: str, texts: Collection[str] = ()) -> bool:
    """Whether ELEMENT has the shape that the shipped SCHEMA (a file name) demands. Where an element
    is none of TEXTS, white space alone is nothing, as in libvirt's schemas, and dropped."""
    for each in element.iter():
        if each.tag not in texts and not len(each) and not (each.text or "").strip(_SPACE):
            each.text = None
    return bool(_compiled(schema).validate(element))


def explain(element: etree._Element, schema: str, texts: Collection[str] = ()) -> errors.Error:
    """Why ELEMENT is not valid, as VIR_ERR_XML_INVALID_SCHEMA with line, path and reason; TEXTS are
    the names of elements that may hold text."""
    import xmlschema

    for parent in _with_stray_text(element, texts):
        # XML Schema's white space is ASCII's; xmlschema takes all of Unicode's for it.
        path = element.getroottree().getpath(parent)
        text = f"line {parent.sourceline}: {path}: text between elements: expected elements only"
        return report(libvirt.VIR_ERR_XML_INVALID_SCHEMA, text)
    for each in element.iter():
        if _TYPE in each.attrib:  # xmlschema fails of one that does not fit
            path = element.getroottree().getpath(each)
            text = f"line {each.sourceline}: {path}: expected no xsi:type attribute"
            return report(libvirt.VIR_ERR_XML_INVALID_SCHEMA, text)
    tree: Any = element  # of lxml, which not every version's types know
    for found in xmlschema.XMLSchema10(_text(schema)).iter_errors(tree):
        at: Any = found.elem
        if (index := getattr(found, "index", None)) is not None and index < len(at):
            at = at[index]  # the child that is not expected
        line = at.sourceline or element.sourceline
        reason = " ".join((found.reason or found.message).split()).rstrip(".")
        if expected := _documentation(found.validator):
            reason = f"{reason.partition(': value')[0]}: expected {expected}"
        return report(libvirt.VIR_ERR_XML_INVALID_SCHEMA, f"line {line}: {found.path}: {reason}")
    # The other engine takes it, for which no document is known: it is refused all the same.
    engine: Any = _compile(schema)  # other threads use the compiled one, and its log
    engine.validate(element)
    last = engine.error_log.last_error
    told = f"line {last.line}: {last.path}: {last.message}" if last else "it is not valid"
    return report(libvirt.VIR_ERR_XML_INVALID_SCHEMA, told)


def _with_stray_text(element: etree._Element, texts: Collection[str]) -> Iterator[etree._Element]:
    """The elements, but for TEXTS, that hold white space that is none to XML."""
    for parent in element.iter():
        if parent.tag in texts:
            continue
        beside = [parent.text, *(child.tail for child in parent)]
        if any(text and text.strip(_SPACE) and not text.strip() for text in beside):
            yield parent


def _documentation(validator: Any) -> str | None:
    """What the schema says of the type that VALIDATOR, a component of xmlschema's, is part of, or
    that it has itself where it is an element."""
    while validator is not None and not hasattr(validator, "is_complex"):
        validator = getattr(validator, "type", None) or getattr(validator, "parent", None)
    annotation = getattr(validator, "annotation", None)
    text = "" if annotation is None else str(annotation).strip()
    return text or None  # the types of XML Schema itself have a comment, and no word in it


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """For the time that elements are made: text that XML cannot carry is VIR_ERR_XML_ERROR."""
    try:
        yield
    except ValueError as failure:
        raise xml_error("a name or a path holds characters that XML cannot carry") from failure


def yes(text: str | None) -> bool | None:
    """What an attribute says that is ``yes`` or ``no``; None: it is left out."""
    return None if text is None else text == "yes"


def append(parent: etree._Element, tag: str, /, **attributes: str | int | None) -> etree._Element:
    """Append an element to PARENT, with those of ATTRIBUTES that are not None: ``yes`` and ``no``
    for the two truths."""
    element = etree.SubElement(parent, tag)
    for name, value in attributes.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if value is not None:
            element.set(name, str(value))
    return element


def is_carried(text: str) -> bool:
    """Whether a document can hold TEXT."""
    return not _NOT_XML.search(text)


def shown(text: str) -> str:
    """TEXT for people to read in a document: U+FFFD for each character that XML cannot carry."""
    return _NOT_XML.sub("\ufffd", text)


def indented(element: etree._Element) -> str:
    """ELEMENT as libvirt prints documents: two spaces a level, a newline at the end."""
    return etree.tostring(element, pretty_print=True, encoding="unicode")


def _compile(schema: str) -> etree.XMLSchema:
    return etree.XMLSchema(etree.fromstring(_text(schema).encode()))


_compiled = functools.cache(_compile)


def _text(schema: str) -> str:
    return (_SCHEMAS / schema).read_text("utf-8")
