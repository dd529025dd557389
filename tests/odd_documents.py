# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents that nobody would write: what those in both dialects are made of, and what they share.

For test_bad_input_xml (the proposal's) and test_bad_input_native (libvirt's own).
"""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

from hypothesis import strategies as st

XSI = "http://www.w3.org/2001/XMLSchema-instance"

ODD = ["\0", "a\x1bb", "\ud800", "\udcff", "\ufffe", "\x0b"]
"""Texts that XML cannot carry."""

Refused = Callable[[str], str | None]
"""Why a document is refused; None when it is not."""

pieces = st.one_of(
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
"""Of markup, and of what is in its way."""


@st.composite
def mutated(draw: st.DrawFn, documents: Sequence[str], pieces: st.SearchStrategy[str]) -> str:
    """One of DOCUMENTS with some places overwritten by PIECES."""
    text: str = draw(st.sampled_from(documents))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + draw(pieces) + text[end:]
    return text


def attributes(known: Sequence[str], *names: str) -> st.SearchStrategy[dict[str, str]]:
    """Some of NAMES, with KNOWN values or any."""
    values = st.sampled_from(known) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    return st.dictionaries(st.sampled_from(names), values, max_size=4)


def element(name: str, attributes: Mapping[str, str], inner: str = "") -> str:
    """An element, whatever is in its attributes."""
    shown = "".join(
        f' {key}="' + "".join(f"&#{ord(char)};" for char in value) + '"'
        for key, value in attributes.items()
    )
    return f"<{name}{shown}>{inner}</{name}>"


def disks(count: int, last: str = "") -> str:
    """COUNT disks, and LAST behind them."""
    return "<disks>" + "".join(f'<disk name="d{n}"/>' for n in range(count)) + f"{last}</disks>"


def check_large(refused: Refused, document: str, reason: str | None) -> None:
    """REFUSED tells the REASON, and soon, however busy the machine is; None: it is not refused."""
    began = time.process_time()
    found = refused(document)
    assert time.process_time() - began < 20
    assert (found is None) == (reason is None), found
    assert reason is None or reason in str(found)


def schema_hint(directory: pathlib.Path, hint: str) -> str:
    """The attributes by which a document HINTs at a schema: at a file that is none, and that nobody
    may open."""
    path = directory / "schema.xsd"
    path.write_text("not a schema")
    path.chmod(0)
    value = path if hint.startswith("no") else f"urn:x {path}"
    return f"xmlns:xsi='{XSI}' xsi:{hint}='{value}'"
