# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's ``<domaincheckpoint>``, as a view of a branch (libvirt's checkpoint_conf.c).

A checkpoint is an instant since which QEMU notes what changes. So is the last point of a branch:
a checkpoint is a branch that never advances, by the same name.
"""

import dataclasses
import typing

from lxml import etree

from virtbackup.conf import xml

SCHEMA = "domaincheckpoint.xsd"

TEXTS = ("name", "description", "creationTime")
"""The elements that hold text."""

Kind = typing.Literal["no", "bitmap"]


@dataclasses.dataclass(frozen=True)
class CheckpointDiskDef:
    """One ``<disk>``. None is what the document left out."""

    name: str
    checkpoint: Kind | None = None
    bitmap: str | None = None
    size: int | None = None
    """Bytes changed since, where that was asked for."""


@dataclasses.dataclass(frozen=True)
class CheckpointDef:
    """A whole document, but for the domain in it."""

    name: str | None = None
    description: str | None = None
    parent: str | None = None
    creation_time: int | None = None
    """Seconds since the epoch."""
    disks: tuple[CheckpointDiskDef, ...] = ()

    @classmethod
    def parse(cls, document: str) -> "CheckpointDef":
        """Read a document; parent and creation time are for libvirt to say, and passed over.

        Errors: VIR_ERR_XML_ERROR and VIR_ERR_XML_INVALID_SCHEMA, with line and element.
        """
        root = xml.parse(document, "domaincheckpoint")
        name = root.findtext("name")
        if name is not None and not name:
            raise xml.xml_error("a checkpoint's name cannot be empty", root.find("name"))
        disks = tuple(map(_parse_disk, root.iterfind("disks/disk")))
        if not xml.is_valid(root, SCHEMA, TEXTS):
            raise xml.explain(root, SCHEMA, TEXTS)
        return cls(name, root.findtext("description"), disks=disks)

    def format(self, domain: str | None = None) -> str:
        """The document, with the DOMAIN's own in it. Errors: VIR_ERR_XML_ERROR."""
        root = etree.Element("domaincheckpoint")
        with xml.writing():
            for tag, text in (("name", self.name), ("description", self.description)):
                if text is not None:
                    etree.SubElement(root, tag).text = text
            if self.parent is not None:
                parent = etree.SubElement(root, "parent")
                etree.SubElement(parent, "name").text = self.parent
            if self.creation_time is not None:
                etree.SubElement(root, "creationTime").text = str(self.creation_time)
            if self.disks:
                disks = etree.SubElement(root, "disks")
                for disk in self.disks:
                    _format_disk(disk, disks)
        if domain is not None:
            root.append(xml.embedded(domain, "domain"))
        return xml.indented(root)

    def left_out(self, targets: typing.Iterable[str]) -> list[str]:
        """Of TARGETS, the disks that the checkpoint does not have: where any disk is listed, those
        that are not, or not as ``bitmap``."""
        if not self.disks:
            return []
        has = {disk.name for disk in self.disks if disk.checkpoint != "no"}
        return [target for target in targets if target not in has]


def _parse_disk(element: etree._Element) -> CheckpointDiskDef:
    name, kind = element.get("name"), element.get("checkpoint")
    if not name:
        raise xml.xml_error("missing name from disk checkpoint element", element)
    if kind not in (None, "no", "bitmap"):
        raise xml.xml_error(f"unknown checkpoint type '{kind}' of disk '{name}'", element)
    return CheckpointDiskDef(name, typing.cast("Kind | None", kind), element.get("bitmap"))


def _format_disk(disk: CheckpointDiskDef, parent: etree._Element) -> None:
    xml.append(
        parent,
        "disk",
        name=disk.name,
        checkpoint=disk.checkpoint,
        bitmap=disk.bitmap,
        size=disk.size,
    )
