# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's own ``<domainbackup>`` document, of libvirt 6.0 and newer (its backup_conf.c).

``BackupDef.parse`` and ``BackupDef.format`` are inverses. ``align_disks`` makes the defaults that
decide what is backed up explicit against a domain, by libvirt's rules. Source: libvirt's
formatbackup documentation, its schema, and the documents of its xml2xml test.
"""

import dataclasses
import typing

import libvirt
from lxml import etree

from virtbackup import errors
from virtbackup.conf import backup_conf, domain_conf, xml

SCHEMA = "domainbackup-native.xsd"

DEFAULT_HOST = "localhost"
"""Where a pull without a server listens."""

TEXTS = ("incremental", "label")
"""The elements that hold text."""

Mode = typing.Literal["push", "pull"]
DiskType = typing.Literal["file", "block"]
BackupMode = typing.Literal["full", "incremental"]
State = typing.Literal["running", "complete", "failed", "cancelling", "cancelled"]


@dataclasses.dataclass(frozen=True)
class TcpServer:
    """NBD over TCP, which is the default transport."""

    name: str
    """A host name or an address, IPv6 without brackets."""
    port: int | None = None
    """None (and 0): libvirt is to choose, which no libvirt does so far."""
    tls: bool | None = None


@dataclasses.dataclass(frozen=True)
class UnixServer:
    """NBD on a unix socket at an absolute path."""

    socket: str
    tls: bool | None = None


@dataclasses.dataclass(frozen=True)
class FdServer:
    """NBD on a listening descriptor that was handed to libvirt before (since 11.3)."""

    fdgroup: str
    tls: bool | None = None


Server = TcpServer | UnixServer | FdServer


@dataclasses.dataclass(frozen=True)
class Kept:
    """An element that is of no concern here, whole: an ``<encryption>``, a ``<seclabel>``."""

    tag: str
    attributes: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    children: "tuple[Kept, ...]" = ()

    @classmethod
    def parse(cls, element: etree._Element) -> "Kept":
        """Read an element that the schema found well-shaped; white space between elements and
        attributes of other namespaces are not part of it."""
        return cls(
            tag=str(element.tag),
            attributes=tuple(
                (str(name), str(value))
                for name, value in element.items()
                if not str(name).startswith("{")
            ),
            text=element.text if element.tag in TEXTS else None,
            children=tuple(map(cls.parse, element)),
        )

    def format(self, parent: etree._Element) -> None:
        """Append the element to PARENT."""
        element = etree.SubElement(parent, self.tag, dict(self.attributes))
        element.text = self.text
        for child in self.children:
            child.format(element)


@dataclasses.dataclass(frozen=True)
class Image:
    """A ``<scratch>`` or a ``<target>``."""

    path: str
    encryption: Kept | None = None
    seclabels: tuple[Kept, ...] = ()


@dataclasses.dataclass(frozen=True)
class BackupDiskDef:
    """One ``<disk>``. None is what the document left out."""

    name: str
    backup: bool | None = None
    type: DiskType | None = None
    """Of ``image``: a file that libvirt makes (None too), or a block device that is there."""
    backupmode: BackupMode | None = None
    """None: incremental where there is a checkpoint, of the disk or of the whole backup."""
    incremental: str | None = None
    """The checkpoint since which changes are told."""
    exportname: str | None = None
    """None: the disk's name."""
    exportbitmap: str | None = None
    """Of an incremental disk, the meta context's name: ``qemu:dirty-bitmap:NAME``; None: libvirt's
    ``default_exportbitmap``."""
    image: Image | None = None
    """The scratch image of a pull, the target of a push."""
    driver: str | None = None
    """The format of ``image``; None: qcow2, all that a pull may have."""
    index: int | None = None
    """Of a running backup: by which block-threshold knows the scratch image."""
    state: State | None = None
    """Of a running backup."""


def default_exportbitmap(disk: str) -> str:
    """What libvirt calls the changes of an incremental DISK on its export."""
    return f"backup-{disk}"


@dataclasses.dataclass(frozen=True)
class BackupDef:
    """A whole document."""

    mode: Mode = "push"
    server: Server | None = None
    """None in a pull: TCP on localhost, without a port."""
    incremental: str | None = None
    disks: tuple[BackupDiskDef, ...] = ()

    @classmethod
    def parse(cls, document: str) -> "BackupDef":
        """Read a document.

        Errors: VIR_ERR_XML_ERROR, VIR_ERR_XML_INVALID_SCHEMA, VIR_ERR_CONFIG_UNSUPPORTED or
        VIR_ERR_INVALID_ARG (where libvirt uses it), with line and element; the texts are libvirt's
        where it has one.
        """
        root = xml.parse(document, "domainbackup")
        _refuse_with_libvirts_text(root)
        if not xml.is_valid(root, SCHEMA, TEXTS):
            raise xml.explain(root, SCHEMA, TEXTS)
        mode: Mode = "pull" if root.get("mode") == "pull" else "push"
        server, incremental = root.find("server"), root.find("incremental")
        return cls(
            mode=mode,
            server=None if server is None else _parse_server(server),
            incremental=None if incremental is None else _parse_incremental(incremental),
            disks=tuple(_parse_disk(disk, mode) for disk in root.iterfind("disks/disk")),
        )

    def format(self) -> str:
        """The document; what is None or empty is left out, but for the mode and the transport.
        Errors: VIR_ERR_XML_ERROR."""
        root = etree.Element("domainbackup", mode=self.mode)
        with xml.writing():
            if self.incremental is not None:
                etree.SubElement(root, "incremental").text = self.incremental
            if self.server is not None:
                _format_server(self.server, root)
            if self.disks:
                disks = etree.SubElement(root, "disks")
                for disk in self.disks:
                    _format_disk(disk, self.mode, disks)
        return xml.indented(root)

    def align_disks(self, domain: domain_conf.DomainDef) -> "BackupDef":
        """The same backup with every disk of DOMAIN listed, in the domain's order.

        Where no disk is listed, those take part that are writable and have a medium; else those
        that are listed. Of each, ``backup``, ``backupmode`` and ``incremental`` say what is meant.
        Errors, by name: VIR_ERR_CONFIG_UNSUPPORTED for a listed disk that the domain does not have,
        that is listed twice or has no medium, and for an incremental one without a checkpoint;
        those of ``DiskDef.takes_part``.
        """
        if not domain.disks:
            raise _unsupported("domain must have at least one disk to perform backup")
        listed = self._listed(domain)
        disks = tuple(self._align(listed, disk) for disk in domain.disks)
        return dataclasses.replace(self, disks=disks)

    def _listed(self, domain: domain_conf.DomainDef) -> dict[str, BackupDiskDef]:
        media = {disk.target: disk.has_medium for disk in domain.disks}
        listed: dict[str, BackupDiskDef] = {}
        for disk in self.disks:
            if disk.name not in media:
                raise _unsupported(f"no disk named '{disk.name}'")
            if disk.name in listed:
                raise _unsupported(f"disk '{disk.name}' specified twice")
            if disk.backup is not False and not media[disk.name]:
                raise _unsupported(f"disk '{disk.name}' has no media")
            listed[disk.name] = disk
        return listed

    def _align(
        self, listed: dict[str, BackupDiskDef], domain_disk: domain_conf.DiskDef
    ) -> BackupDiskDef:
        taken = not self.disks and domain_disk.takes_part()
        default = BackupDiskDef(domain_disk.target, backup=taken)
        disk = listed.get(domain_disk.target, default)
        if disk.backup is False:
            return BackupDiskDef(disk.name, backup=False)
        checkpoint = disk.incremental or self.incremental
        if disk.backupmode == "full" or (checkpoint is None and disk.backupmode is None):
            return dataclasses.replace(disk, backup=True, backupmode="full")
        if checkpoint is None:
            raise _unsupported(
                f"'incremental' backup mode of disk '{disk.name}' requires setting 'incremental'"
                " field for disk or backup"
            )
        return dataclasses.replace(
            disk, backup=True, backupmode="incremental", incremental=checkpoint
        )


def _unsupported(detail: str, element: etree._Element | None = None) -> errors.Error:
    return xml.report(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, detail, element)


# --- refusing in libvirt's words ---


def _refuse_with_libvirts_text(root: etree._Element) -> None:
    """Raise libvirt's own error for ROOT, checks in its order; return where it has none. Nothing is
    known of ROOT's shape."""
    mode = root.get("mode", "push")
    if mode not in ("push", "pull"):
        raise _unsupported(f"unknown backup mode '{mode}': expected 'push' or 'pull'", root)
    server = root.find("server")
    if server is not None:
        if mode == "push":
            raise _unsupported("use of <server> requires pull mode backup", server)
        _refuse_server(server)
    for disk in root.iterfind("disks/*"):
        if not disk.get("name"):
            raise xml.xml_error(
                "missing name from disk backup element: expected a name attribute", disk
            )
        if (kind := disk.get("type", "file")) not in ("file", "block"):
            raise xml.xml_error(
                f"unsupported disk backup type '{kind}': expected 'file' or 'block'", disk
            )


_BELONGING = {"tcp": ("name", "port"), "unix": ("socket",), "fd": ("fdgroup",)}
"""Transport -> its attributes, besides those that any has."""


def _refuse_server(server: etree._Element) -> None:
    transport, socket = server.get("transport", "tcp"), server.get("socket")
    if transport == "rdma":
        raise _unsupported("transport rdma is not supported for <server>", server)
    if transport not in _BELONGING:
        raise xml.xml_error(
            f"unknown protocol transport type '{transport}': expected 'tcp', 'unix' or 'fd'", server
        )
    if transport == "unix" and socket is None:
        raise xml.xml_error("missing socket for unix transport", server)
    if transport != "unix" and socket is not None:
        raise xml.xml_error(f"transport '{transport}' does not support socket attribute", server)
    if socket is not None and not socket.startswith("/"):
        raise xml.xml_error(f"backup socket path '{socket}' must be absolute", server)
    if transport == "tcp" and server.get("name") is None:
        raise xml.xml_error("missing name for host", server)
    _refuse_port(server)
    if transport == "fd" and server.get("fdgroup") is None:
        raise xml.xml_error("missing fdgroup for fd transport", server)
    for name in ("name", "port", "fdgroup"):
        if server.get(name) is not None and name not in _BELONGING[transport]:
            raise xml.xml_error(f"'{name}' does not belong to transport '{transport}'", server)


def _refuse_port(server: etree._Element) -> None:
    port = server.get("port", "0")
    if not (port.isascii() and port.isdecimal()):
        detail = f"failed to parse port number '{port}': expected a number from 0 to 65535"
        raise xml.report(libvirt.VIR_ERR_INVALID_ARG, detail, server)
    if len(port) >= 20 or int(port) > 65535:
        raise xml.report(libvirt.VIR_ERR_INVALID_ARG, f"port '{port}' out of range", server)


# --- reading ---


def _parse_server(element: etree._Element) -> Server:
    tls = xml.yes(element.get("tls"))
    match element.get("transport"):
        case "unix":
            socket = str(element.get("socket"))
            if len(socket.encode()) > backup_conf.MAX_SUN_PATH:
                detail = f"socket path is longer than {backup_conf.MAX_SUN_PATH} bytes"
                raise xml.xml_error(detail, element)
            return UnixServer(socket, tls)
        case "fd":
            return FdServer(str(element.get("fdgroup")), tls)
        case _:
            name = backup_conf.unbracketed(str(element.get("name")))
            return TcpServer(name, int(element.get("port", "0")) or None, tls)


def _parse_incremental(element: etree._Element) -> str:
    return _bounded(element, "checkpoint name", element.text or "", backup_conf.MAX_BITMAP_NAME)


def _bounded(element: etree._Element, what: str, text: str, limit: int) -> str:
    if len(text.encode()) > limit:
        raise xml.xml_error(f"{what} is longer than {limit} bytes", element)
    return text


def _parse_disk(element: etree._Element, mode: Mode) -> BackupDiskDef:
    name = str(element.get("name"))
    limits = {
        "incremental": backup_conf.MAX_BITMAP_NAME,
        "exportname": backup_conf.MAX_EXPORT_NAME,
        "exportbitmap": backup_conf.MAX_BITMAP_NAME,
    }
    for key, limit in limits.items():
        _bounded(element, f"{key} of disk '{name}'", element.get(key, ""), limit)
    index = element.get("index")
    disk = BackupDiskDef(
        name=name,
        backup=xml.yes(element.get("backup")),
        type=typing.cast("DiskType | None", element.get("type")),
        backupmode=typing.cast("BackupMode | None", element.get("backupmode")),
        incremental=element.get("incremental"),
        exportname=element.get("exportname"),
        exportbitmap=element.get("exportbitmap"),
        image=_parse_image(element, mode),
        driver=_parse_driver(element, mode),
        index=None if index is None else int(index),
        state=typing.cast("State | None", element.get("state")),
    )
    if disk.backupmode == "full" and disk.incremental is not None:
        raise xml.xml_error(
            f"'incremental' does not belong to backup mode 'full' of disk '{name}'", element
        )
    for key in ("exportname", "exportbitmap"):
        if mode == "push" and element.get(key) is not None:
            raise xml.xml_error(f"'{key}' of disk '{name}' requires pull mode backup", element)
    return disk


def _parse_driver(disk: etree._Element, mode: Mode) -> str | None:
    element = disk.find("driver")
    if element is None:
        return None
    format = str(element.get("type"))
    if mode == "pull" and format != "qcow2":
        name = disk.get("name")
        raise _unsupported(f"pull mode backup for disk '{name}' requires qcow2 driver", element)
    return format


_IMAGE = {"pull": "scratch", "push": "target"}
_PATH = {"file": "file", "block": "dev"}


def _parse_image(disk: etree._Element, mode: Mode) -> Image | None:
    name, kind = disk.get("name"), disk.get("type", "file")
    other = disk.find(_IMAGE["push" if mode == "pull" else "pull"])
    if other is not None:
        raise xml.xml_error(f"<{other.tag}> of disk '{name}' does not belong to mode {mode}", other)
    element = disk.find(_IMAGE[mode])
    if element is None:
        return None
    wanted, stray = _PATH[kind], _PATH["block" if kind == "file" else "file"]
    path = element.get(wanted)
    if path is None or element.get(stray) is not None:
        raise xml.xml_error(
            f"<{element.tag}> of disk '{name}' of type '{kind}': expected a '{wanted}' and no"
            f" '{stray}' attribute",
            element,
        )
    encryptions = element.findall("encryption")
    if len(encryptions) > 1:
        raise xml.xml_error(
            f"an <encryption> definition already found for disk '{name}'", encryptions[1]
        )
    for secret in element.iter("secret"):
        if (secret.get("uuid") is None) == (secret.get("usage") is None):
            raise xml.xml_error("exactly one of 'uuid' and 'usage' must be specified", secret)
    return Image(
        path=path,
        encryption=Kept.parse(encryptions[0]) if encryptions else None,
        seclabels=tuple(map(Kept.parse, element.iterfind("seclabel"))),
    )


# --- writing ---


def _format_server(server: Server, parent: etree._Element) -> None:
    match server:
        case TcpServer(name, port, tls):
            xml.append(parent, "server", transport="tcp", tls=tls, name=name, port=port)
        case UnixServer(socket, tls):
            xml.append(parent, "server", transport="unix", tls=tls, socket=socket)
        case FdServer(fdgroup, tls):
            xml.append(parent, "server", transport="fd", tls=tls, fdgroup=fdgroup)


def _format_disk(disk: BackupDiskDef, mode: Mode, parent: etree._Element) -> None:
    element = xml.append(
        parent,
        "disk",
        name=disk.name,
        backup=disk.backup,
        state=disk.state,
        type=disk.type,
        backupmode=disk.backupmode,
        incremental=disk.incremental,
        exportname=disk.exportname,
        exportbitmap=disk.exportbitmap,
        index=disk.index,
    )
    if disk.driver is not None:
        etree.SubElement(element, "driver", type=disk.driver)
    if disk.image is not None:
        path = _PATH[disk.type or "file"]
        image = etree.SubElement(element, _IMAGE[mode], {path: disk.image.path})
        for kept in (disk.image.encryption, *disk.image.seclabels):
            if kept is not None:
                kept.format(image)
