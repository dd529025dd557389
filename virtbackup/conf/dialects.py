# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which dialect of ``<domainbackup>`` a document is in, the proposal's or libvirt's own, and what a
document in either asks for.

What libvirt's own takes is loaded for one in it alone: ``translate``.
"""

import typing
from collections.abc import Callable

from lxml import etree

from virtbackup.conf import backup_conf, domain_conf, xml

Dialect = typing.Literal["proposal", "native"]

Domain = Callable[[], domain_conf.DomainDef]
"""Asks for the domain; called at most once, and only where it is needed."""

_MARKS: dict[Dialect, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "proposal": (
        ("address", ()),
        ("branch", ()),
        ("disks/disk", ("present", "reason")),
        ("disks/disk/source", ()),
        ("disks/disk/bitmap", ()),
    ),
    "native": (
        (".", ("mode",)),
        ("server", ()),
        ("incremental", ()),
        (
            "disks/disk",
            ("backup", "backupmode", "incremental", "index", "state"),
        ),
        ("disks/disk/scratch", ()),
        ("disks/disk/target", ()),
        ("disks/disk/driver", ()),
    ),
}
"""Elements, or attributes of them, that only one dialect has."""


def dialect(document: str) -> Dialect:
    """Which dialect a document is in; the proposal's where nothing tells, as in an empty one.

    Errors: VIR_ERR_XML_ERROR for a document that is none (``xml.parse``), or is in both.
    """
    return _dialect(xml.parse(document, "domainbackup"))


def _dialect(root: etree._Element) -> Dialect:
    proposal, native = _mark(root, "proposal"), _mark(root, "native")
    if proposal is not None and native is not None:
        (ours, element), (theirs, other) = proposal, native
        raise xml.xml_error(
            f"the document mixes two dialects: {ours} (line {element.sourceline}) is the"
            f" proposal's, {theirs} (line {other.sourceline}) is libvirt's own"
        )
    return "proposal" if native is None else "native"


def _mark(root: etree._Element, of: Dialect) -> tuple[str, etree._Element] | None:
    """What in ROOT only the dialect OF has, as people write it, and the element."""
    for path, attributes in _MARKS[of]:
        for element in root.iterfind(path):
            if not attributes:
                return f"<{element.tag}>", element
            for name in attributes:
                if element.get(name) is not None:
                    return f"<{element.tag} {name}=>", element
    return None


def read(document: str, domain: Domain) -> backup_conf.BackupDef:
    """What a document in either dialect asks for. Errors: as ``translate.translate``."""
    root = xml.parse(document, "domainbackup")
    if _dialect(root) == "proposal":
        return backup_conf.BackupDef.parse_node(root)
    from virtbackup.conf import translate

    return translate.read_native(document, domain)


def address(document: str) -> backup_conf.Address:
    """Where the NBD server of a backup is to listen, by a document in either dialect.

    Errors: as ``translate.translate``, of what no domain is needed for.
    """
    if dialect(document) == "proposal":
        return backup_conf.BackupDef.parse(document).address
    from virtbackup.conf import translate

    return translate.address_of_native(document)
