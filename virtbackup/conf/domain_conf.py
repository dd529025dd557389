# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of a domain's XML that a backup needs: who it is, and its disks (domain_conf.c)."""

import dataclasses
import re

import libvirt
from lxml import etree

from virtbackup import errors
from virtbackup.conf import xml

# The attribute of <source> that names the medium, by the disk's type.
_SOURCE_ATTRIBUTE = {
    "file": "file",
    "block": "dev",
    "dir": "dir",
    "network": "name",
    "volume": "volume",
}


@dataclasses.dataclass(frozen=True)
class DiskDef:
    """One ``<disk>`` of a domain."""

    target: str
    device: str = "disk"
    """disk, cdrom, floppy or lun."""
    type: str = "file"
    source: str | None = None
    """A path or name by which people know the medium; None: an empty drive."""
    protocol: str | None = None
    """By which a network disk is reached."""
    format: str | None = None
    readonly: bool = False
    capacity: int | None = None
    """Guest-visible size, bytes; None where the document does not say."""
    alias: str | None = None
    """The device's id in QEMU, of a running domain."""
    is_part: bool = False
    """Another disk is made of it, and the guest has only that. No document of libvirt's says so."""

    @property
    def has_medium(self) -> bool:
        return self.source is not None

    def takes_part(self) -> bool:
        """Whether a backup has it that lists no disks. Errors: VIR_ERR_OPERATION_INVALID where it
        should, and cannot."""
        if not self.has_medium and self.device in ("disk", "lun"):
            raise no_image(self.target)
        return self.has_medium and not self.readonly and not self.is_part


def no_image(target: str) -> errors.Error:
    """Of the disk TARGET, which no drive is that may be empty."""
    return errors.error(
        libvirt.VIR_ERR_OPERATION_INVALID,
        f"disk '{target}' has no image any more, as QEMU closes one that it finds corrupt: leave it"
        ' out (present="no")',
    )


@dataclasses.dataclass(frozen=True)
class DomainDef:
    """A domain: NAME and UUID; ID is None when it is not running."""

    name: str
    uuid: str
    id: int | None = None
    disks: tuple[DiskDef, ...] = ()
    title: str | None = None
    """A few words of whoever runs it."""

    @classmethod
    def parse(cls, document: str) -> "DomainDef":
        """Read a ``<domain>``; what a backup does not need is passed over."""
        root = xml.parse(document, "domain")
        id = root.get("id")
        return cls(
            name=root.findtext("name", ""),
            uuid=root.findtext("uuid", ""),
            id=None if id is None else _number(id, root),
            disks=tuple(_parse_disk(disk) for disk in root.iterfind("devices/disk")),
            title=root.findtext("title"),
        )

    def format(self) -> str:
        """A ``<domain>`` that ``parse`` reads back; a source with characters that XML cannot carry
        is only shown. Errors: VIR_ERR_XML_ERROR for such characters elsewhere."""
        root = etree.Element("domain", type="qemu")
        with xml.writing():
            if self.id is not None:
                root.set("id", str(self.id))
            etree.SubElement(root, "name").text = self.name
            etree.SubElement(root, "uuid").text = self.uuid
            if self.title is not None:
                etree.SubElement(root, "title").text = self.title
            devices = etree.SubElement(root, "devices")
            for disk in self.disks:
                _format_disk(disk, devices)
        return xml.indented(root)


def _parse_disk(element: etree._Element) -> DiskDef:
    kind = element.get("type", "file")
    source, driver, target, capacity, alias = (
        element.find(name) for name in ("source", "driver", "target", "capacity", "alias")
    )
    name = None if target is None else target.get("dev")
    if not name:
        raise xml.xml_error("missing target dev of a disk", element)
    return DiskDef(
        target=name,
        device=element.get("device", "disk"),
        type=kind,
        source=medium(element),
        protocol=None if source is None else source.get("protocol"),
        format=None if driver is None else driver.get("type"),
        readonly=element.find("readonly") is not None,
        capacity=None if capacity is None else _number(capacity.text or "0", capacity),
        alias=None if alias is None else alias.get("name"),
        is_part=element.find("part") is not None,
    )


def medium(disk: etree._Element) -> str | None:
    """What the medium of a ``<disk>`` is called; None: there is none, though libvirt 12 has a
    ``<source>`` for an empty drive, too. What has no path, as an NBD server's only export, has no
    name in the document either, but is a medium all the same."""
    kind, source = disk.get("type", "file"), disk.find("source")
    if source is None:
        return None
    if (name := source.get(_SOURCE_ATTRIBUTE.get(kind, "file"))) or kind in ("file", "block"):
        return name
    return source.get("path") or source.get("protocol") or kind


def _number(text: str, element: etree._Element) -> int:
    if not re.fullmatch(r"\s*[0-9]{1,19}\s*", text, re.ASCII):
        raise xml.xml_error(f"'{text[:40]}' is not a number", element)
    return int(text)


def _format_disk(disk: DiskDef, parent: etree._Element) -> None:
    element = etree.SubElement(parent, "disk", type=disk.type, device=disk.device)
    if disk.format is not None:
        etree.SubElement(element, "driver", name="qemu", type=disk.format)
    if disk.source is not None:
        source = etree.SubElement(element, "source")
        if disk.protocol is not None:
            source.set("protocol", disk.protocol)
        source.set(_SOURCE_ATTRIBUTE.get(disk.type, "file"), xml.shown(disk.source))
    etree.SubElement(element, "target", dev=disk.target)
    if disk.readonly:
        etree.SubElement(element, "readonly")
    if disk.is_part:
        etree.SubElement(element, "part")
    if disk.capacity is not None:
        etree.SubElement(element, "capacity", unit="bytes").text = str(disk.capacity)
    if disk.alias is not None:
        etree.SubElement(element, "alias", name=disk.alias)
