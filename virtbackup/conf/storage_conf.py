# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a scratch image lives, and sizes as people write them (storage_source_conf.c)."""

import dataclasses
import re

from lxml import etree

from virtbackup.conf import xml

_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


@dataclasses.dataclass(frozen=True)
class Source:
    """The ``<source>`` of a disk in a backup: where its scratch image is to be.

    One of them at most is set: ``file``, an absolute path that must not exist yet, made at the
    start and removed at the end; ``dir``, an existing directory in which the image has no name at
    all. ``reserve``: all that the image may come to need is allocated before the start.
    """

    file: str | None = None
    dir: str | None = None
    reserve: bool | None = None

    @classmethod
    def parse(cls, element: etree._Element) -> "Source":
        """Read a ``<source>`` that the schema found well-shaped."""
        reserve = element.get("reserve")
        source = cls(element.get("file"), element.get("dir"), xml.yes(reserve))
        both = source.file is not None and source.dir is not None
        neither = source.file is None and source.dir is None and reserve is None
        if both or neither:
            raise xml.xml_error("exactly one of 'file' and 'dir' must be specified", element)
        return source

    def placed(self, directory: str) -> "Source":
        """The same in DIRECTORY, where it names no place of its own."""
        if self.file is None and self.dir is None:
            return dataclasses.replace(self, dir=directory)
        return self

    def format(self, parent: etree._Element) -> None:
        """Append the ``<source>`` to PARENT."""
        xml.append(parent, "source", file=self.file, dir=self.dir, reserve=self.reserve)


SIZE = r"[0-9]{1,19} *([bB]|bytes|[kKmMgGtT]([iI]?[bB])?)?"
"""The shape of a scaled size, as in the schema."""


def parse_size(text: str) -> int:
    """Bytes of a scaled size: ``65536``, ``64k``, ``64K``, ``64Kib``, ``64KiB``; ``64KB`` is 64000.

    TEXT has the shape of the schema's scaledSize. The case of the letters carries no meaning.
    """
    match = re.fullmatch(r"(\d+) *(?:bytes|b|([kmgt])(i?b)?)?", text.lower())
    assert match, text
    number, unit, suffix = match.groups()
    base = 1000 if suffix == "b" else 1024
    return int(number) * int(base ** _UNITS.get(unit, 0))


def format_size(size: int) -> str:
    """SIZE bytes in the largest IEC unit that divides it: 65536 is ``64KiB``, 1000 is ``1000``."""
    for unit in ("", "KiB", "MiB", "GiB"):
        if size % 1024 or not size:
            return f"{size}{unit}"
        size //= 1024
    return f"{size}TiB"
