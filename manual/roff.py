# SPDX-License-Identifier: LGPL-2.1-or-later
"""Manual pages in roff's man macros (man(7)), a function for each thing that a page has."""

import re
import textwrap
from collections.abc import Iterable

_WIDTH = 78
_ESCAPES = {"\\": "\\e", "-": "\\-", "^": "\\(ha", "~": "\\(ti", "`": "\\(ga", "'": "\\(aq"}


def escape(text: str) -> str:
    """TEXT that comes out as it is."""
    escaped = "".join(_ESCAPES.get(char, char) for char in text)
    escaped = escaped.replace("[,", "\\:[,")  # where a diskspec may go on in the next line
    return re.sub(r"^(?=\.)", r"\\&", escaped, flags=re.MULTILINE)


def _marked(text: str) -> str:
    """TEXT escaped, what is between ` ` in bold and what is between < > in italics."""
    parts = re.split(r"(`[^`]+`|<[a-zA-Z][\w-]*>)", text)
    return "".join(
        bold(part[1:-1])
        if part.startswith("`") and len(part) > 1
        else italic(part[1:-1])
        if re.fullmatch(r"<[a-zA-Z][\w-]*>", part)
        else escape(part)
        for part in parts
    )


def bold(text: str) -> str:
    return rf"\fB{escape(text)}\fR"


def italic(text: str) -> str:
    return rf"\fI{escape(text)}\fR"


def title(name: str, section: int, date: str, version: str) -> str:
    """The beginning of a page with a ragged margin, which groff 1.23 keeps by the string alone."""
    return (
        '.\\" SPDX-License-Identifier: LGPL-2.1-or-later\n'
        '.\\" Made by python -m manual.\n'
        f'.TH {escape(name.upper())} {section} {date} "virtbackup {version}" "virtbackup"\n'
        ".nh\n.ds AD l\n.ad l\n"
    )


def section(heading: str, *content: str) -> str:
    return f".SH {escape(heading)}\n" + "".join(content)


def subsection(heading: str, *content: str) -> str:
    return f'.SS "{escape(heading)}"\n' + "".join(content)


def text(*paragraphs: str) -> str:
    """Paragraphs; what is between ` ` comes out bold, and <words> in italics."""
    return ".PP\n".join(_lines(paragraph) for paragraph in paragraphs)


def synopsis(*lines: str) -> str:
    return ".nf\n" + "".join(_lines(line) for line in lines) + ".fi\n"


def example(code: str) -> str:
    """Lines that are typed or printed as they are."""
    return ".PP\n.RS 4\n.EX\n" + escape(code.rstrip("\n")) + "\n.EE\n.RE\n"


def tagged(items: Iterable[tuple[str, str]]) -> str:
    """Terms, marked as ``text`` is, each with what there is to say of it."""
    return "".join(f".TP\n{_marked(term)}\n{_lines(said)}" for term, said in items)


def _lines(paragraph: str) -> str:
    """A sentence a line, as roff has it, which knows a sentence's end by the line's."""
    words = re.sub(r"\s+", " ", paragraph.strip())
    lines = [
        line
        for sentence in re.split(r"(?<=[.:;]) (?=[A-Z])", words)
        for line in textwrap.wrap(
            _marked(sentence), _WIDTH, break_long_words=False, break_on_hyphens=False
        )
    ]
    return "".join(("\\&" if line.startswith(".") else "") + line + "\n" for line in lines)
