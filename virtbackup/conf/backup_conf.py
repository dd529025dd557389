# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``<domainbackup>`` document as proposed in 2016 (the patch's backup_conf.c).

``BackupDef.parse`` and ``BackupDef.format`` are inverses. ``align_disks`` then makes every default
explicit against a domain; after it nothing needs to ask again what was meant.
"""

import dataclasses
import re
import typing

import libvirt
from lxml import etree

from virtbackup import errors
from virtbackup.conf import domain_conf, storage_conf, xml

SCHEMA = "domainbackup.xsd"

MAX_SUN_PATH = 107
"""Bytes of a unix socket's path, the closing NUL not counted (unix(7))."""

MAX_EXPORT_NAME = 4096
"""Bytes of an NBD export's name (the NBD protocol's limit for strings)."""

MAX_BITMAP_NAME = 1023
"""Bytes of a dirty bitmap's name (BDRV_BITMAP_MAX_NAME_SIZE), and so of a branch's."""

OWN_PREFIX = "virtbackup-"
"""How the names of what a backup makes in QEMU begin, and so no branch's name."""


@dataclasses.dataclass(frozen=True)
class IpAddress:
    """The NBD server listens on a TCP port; HOST is a name or an address, IPv6 without brackets."""

    host: str
    port: int | None = None
    """None: no port has been picked yet."""
    tls: bool | None = None
    autoport: bool | None = None
    """The start picks a free port, whatever ``port`` says; true where that is None."""

    @property
    def picks_port(self) -> bool:
        """Whether the port is the start's to choose."""
        return bool(self.autoport) or self.port is None

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port, once the port is known."""
        assert self.port is not None
        return self.host, self.port


@dataclasses.dataclass(frozen=True)
class UnixAddress:
    """The NBD server listens on a unix socket at an absolute PATH."""

    path: str
    tls: bool | None = None


Address = IpAddress | UnixAddress

DiskType = typing.Literal["full", "incremental", "auto"]


@dataclasses.dataclass(frozen=True)
class BackupDiskDef:
    """One ``<disk>``. None is what the document left out; after align_disks only
    ``source``, ``granularity``, ``exportbitmap`` and ``reason`` may be None."""

    name: str
    present: bool | None = None
    type: DiskType | None = None
    source: storage_conf.Source | None = None
    granularity: int | None = None
    """Bytes, a power of two from 512 to 2 GiB."""
    exportname: str | None = None
    exportbitmap: str | None = None
    """What the changes of an incremental disk are called (``qemu:dirty-bitmap:NAME``); None: by the
    branch's name."""
    reason: str | None = None
    """Of a running backup: why an ``auto`` disk has the type it has. A start takes no notice."""

    def of_type(self, type: DiskType, reason: str | None = None) -> "BackupDiskDef":
        """The disk with TYPE, for REASON; whole, it has no changes to be called anything."""
        exportbitmap = None if type == "full" else self.exportbitmap
        return dataclasses.replace(self, type=type, reason=reason, exportbitmap=exportbitmap)


@dataclasses.dataclass(frozen=True)
class BackupDef:
    """A whole document."""

    address: Address
    disks: tuple[BackupDiskDef, ...] = ()
    branch: str | None = None
    advance: bool | None = None
    """False: the branch stays at its last point, however good the backup is."""
    fork: str | None = None
    """Another branch, which begins with this backup once it was good; ``branch`` stays."""

    @property
    def advances(self) -> str | None:
        """The branch of which the backup is the last point, once it was good."""
        return self.fork or (None if self.advance is False else self.branch)

    @classmethod
    def parse(cls, document: str) -> "BackupDef":
        """Read a document.

        Errors: VIR_ERR_XML_ERROR, VIR_ERR_XML_INVALID_SCHEMA, VIR_ERR_CONFIG_UNSUPPORTED or
        VIR_ERR_INTERNAL_ERROR (where the patch used it), with line and element; the texts are the
        patch's where it had one.
        """
        return cls.parse_node(xml.parse(document, "domainbackup"))

    @classmethod
    def parse_node(cls, root: etree._Element) -> "BackupDef":
        """As ``parse``, of a document that is read already."""
        if not xml.is_valid(root, SCHEMA):
            _refuse_with_the_patchs_text(root)
            raise xml.explain(root, SCHEMA)
        branch = root.find("branch")
        return cls(
            address=_parse_address(_child(root, "address")),
            disks=tuple(_parse_disk(disk) for disk in root.iterfind("disks/disk")),
            **({} if branch is None else _parse_branch(branch)),
        )

    def format(self) -> str:
        """The document; what is None or empty is left out. Errors: VIR_ERR_XML_ERROR."""
        root = etree.Element("domainbackup")
        with xml.writing():
            _format_address(self.address, root)
            if self.branch is not None:
                xml.append(root, "branch", name=self.branch, advance=self.advance, fork=self.fork)
            if self.disks:
                disks = xml.append(root, "disks")
                for disk in self.disks:
                    _format_disk(disk, disks)
        return xml.indented(root)

    def align_disks(self, domain: domain_conf.DomainDef) -> "BackupDef":
        """The same backup with every disk of DOMAIN listed, in the domain's order.

        A disk that is not listed is present when it is writable, has a medium and is no part of
        another. Errors, by name: VIR_ERR_CONFIG_UNSUPPORTED for a listed disk that the domain does
        not have, that is listed twice, is read-only or has no medium, for two exports of one name,
        and when no disk remains; those of ``DiskDef.takes_part``.
        """
        listed = self._listed(domain)
        disks = tuple(_align(listed.get(disk.target), disk, self.branch) for disk in domain.disks)
        present = [disk for disk in disks if disk.present]
        if not present:
            raise _unsupported("no disks selected for backup")
        exports: dict[str | None, str] = {}
        for disk in present:
            if (other := exports.setdefault(disk.exportname, disk.name)) != disk.name:
                raise _unsupported(
                    f"disks '{other}' and '{disk.name}' have the same export name"
                    f" '{disk.exportname}'"
                )
        return dataclasses.replace(self, disks=disks)

    def _listed(self, domain: domain_conf.DomainDef) -> dict[str, BackupDiskDef]:
        targets = {disk.target for disk in domain.disks}
        listed: dict[str, BackupDiskDef] = {}
        for disk in self.disks:
            if disk.name not in targets:
                raise _unsupported(f"no disk named '{disk.name}'")
            if disk.name in listed:
                raise _unsupported(f"disk '{disk.name}' specified twice")
            listed[disk.name] = disk
        return listed


def _align(
    disk: BackupDiskDef | None, domain_disk: domain_conf.DiskDef, branch: str | None
) -> BackupDiskDef:
    if disk is None:
        disk = BackupDiskDef(domain_disk.target, present=domain_disk.takes_part())
    present = disk.present is not False
    if present and not domain_disk.has_medium:
        raise _unsupported(f"disk '{disk.name}' has no media")
    if present and domain_disk.readonly:
        raise _unsupported(f"disk '{disk.name}' is read-only")
    if not present:
        return BackupDiskDef(disk.name, present=False)
    return dataclasses.replace(
        disk,
        present=True,
        type=disk.type or "full",
        exportname=disk.exportname or disk.name,
        exportbitmap=None if disk.exportbitmap == branch else disk.exportbitmap,
        reason=None,
    )


def _unsupported(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, detail, domain=libvirt.VIR_FROM_DOMAIN)


# --- reading ---


def _child(element: etree._Element, name: str) -> etree._Element:
    child = element.find(name)
    assert child is not None, name
    return child


def _parse_address(element: etree._Element) -> Address:
    host, port, path = (element.get(name) for name in ("host", "port", "path"))
    tls, autoport = xml.yes(element.get("tls")), xml.yes(element.get("autoport"))
    if element.get("type") == "ip":
        if host is None or (port is None and not autoport):
            raise xml.xml_error("both host and port must be specified for ip address type", element)
        if path is not None:
            raise xml.xml_error("'path' does not belong to ip address type", element)
        number = int(port or "0")
        if number == 0 and autoport is False:
            raise _bad_port(str(port), element)
        return IpAddress(unbracketed(host), number or None, tls, autoport if number else True)
    if path is None:
        raise xml.xml_error("path must be specified for unix address type", element)
    if host is not None or port is not None:
        raise xml.xml_error("'host' and 'port' do not belong to unix address type", element)
    if autoport is not None:
        raise xml.xml_error("'autoport' does not belong to unix address type", element)
    if len(path.encode()) > MAX_SUN_PATH:
        raise xml.xml_error(f"path is longer than {MAX_SUN_PATH} bytes", element)
    return UnixAddress(path, tls)


def _bad_port(text: str, element: etree._Element) -> errors.Error:
    return xml.report(
        libvirt.VIR_ERR_INTERNAL_ERROR,
        f"cannot parse port {text}: expected a number from 1 to 65535",
        element,
    )


def unbracketed(host: str) -> str:
    """HOST without the brackets that an IPv6 address has in a URI, and no others."""
    address = re.fullmatch(r"\[([^][]+)\]", host)
    return address[1] if address else host


def _parse_branch(element: etree._Element) -> dict[str, typing.Any]:
    """The fields of a ``BackupDef`` that its branch says."""
    name, fork = _branch_name(str(element.get("name")), element), element.get("fork")
    advance = xml.yes(element.get("advance"))
    if fork is not None:
        if fork == name:
            raise xml.xml_error(f"branch '{name}' cannot be its own fork", element)
        if advance:
            raise xml.xml_error(f"branch '{name}' cannot both advance and be forked", element)
        _branch_name(fork, element)
    return {"branch": name, "advance": advance, "fork": fork}


def _branch_name(name: str, element: etree._Element) -> str:
    if wrong := _wrong_in_branch_name(name):
        raise xml.xml_error(wrong, element)
    return name


def check_branch_name(name: str) -> None:
    """Refuse a NAME that no document could give a branch. Errors: VIR_ERR_INVALID_ARG."""
    wrong = _wrong_in_branch_name(name)
    if not name or "/" in name:
        wrong = f"branch name '{name}': expected a name without '/'"
    if not xml.is_carried(name):
        wrong = f"branch name '{xml.shown(name)}' holds characters that XML cannot carry"
    if wrong:
        raise errors.error(libvirt.VIR_ERR_INVALID_ARG, wrong, domain=libvirt.VIR_FROM_DOMAIN)


def _wrong_in_branch_name(name: str) -> str | None:
    if len(name.encode(errors="surrogatepass")) > MAX_BITMAP_NAME:
        return f"branch name is longer than {MAX_BITMAP_NAME} bytes"
    if name.startswith(OWN_PREFIX):
        return f"branch name '{name}' begins with '{OWN_PREFIX}', which is reserved"
    return None


def _parse_disk(element: etree._Element) -> BackupDiskDef:
    name = str(element.get("name"))
    source = element.find("source")
    bitmap = element.find("bitmap")
    exportname, exportbitmap = element.get("exportname"), element.get("exportbitmap")
    if exportbitmap is not None:
        if len(exportbitmap.encode()) > MAX_BITMAP_NAME:
            raise xml.xml_error(
                f"export bitmap of disk '{name}' is longer than {MAX_BITMAP_NAME} bytes", element
            )
        if element.get("type") not in ("incremental", "auto"):
            raise xml.xml_error(
                f"export bitmap of disk '{name}', which is not incremental", element
            )
    if exportname is not None and len(exportname.encode()) > MAX_EXPORT_NAME:
        raise xml.xml_error(
            f"export name of disk '{name}' is longer than {MAX_EXPORT_NAME} bytes", element
        )
    return BackupDiskDef(
        name=name,
        present=xml.yes(element.get("present")),
        type=typing.cast("DiskType | None", element.get("type")),
        source=None if source is None else storage_conf.Source.parse(source),
        granularity=None if bitmap is None else _parse_granularity(bitmap, name),
        exportname=exportname,
        exportbitmap=exportbitmap,
        reason=element.get("reason"),
    )


def _parse_granularity(element: etree._Element, disk: str) -> int:
    text = str(element.get("granularity"))
    size = storage_conf.parse_size(text)
    if not 512 <= size <= 1 << 31 or size & (size - 1):
        raise xml.report(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            f"bitmap granularity '{text}' of disk '{disk}' must be a power of two"
            " from 512 bytes to 2GiB",
            element,
        )
    return size


def _refuse_with_the_patchs_text(root: etree._Element) -> None:
    """Raise the 2016 parser's own error for ROOT, checks in its order; return where it had none."""
    address = root.find("address")
    if address is None:
        raise xml.report(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            "export address must be specifed: expected an <address> element",
            root,
        )
    _refuse_address(address)
    for disk in root.iterfind("disks/*"):
        _refuse_disk(disk)


def _refuse_address(address: etree._Element) -> None:
    kind, port = address.get("type"), address.get("port")
    if kind is None:
        raise xml.xml_error(
            "backup address type must be specified: expected type='ip' or type='unix'", address
        )
    if kind not in ("ip", "unix"):
        raise xml.report(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            f"unknown backup address type '{kind}': expected 'ip' or 'unix'",
            address,
        )
    if kind == "ip" and port is not None and not _is_port(port):
        raise _bad_port(port, address)
    if address.get("autoport") not in (None, "yes", "no"):
        return  # the schema says it
    _parse_address(address)


def _is_port(text: str) -> bool:
    return len(text) < 20 and text.isascii() and text.isdecimal() and int(text) <= 65535


def _refuse_disk(disk: etree._Element) -> None:
    name, present, kind = (disk.get(key) for key in ("name", "present", "type"))
    if kind in ("block", "dir", "network", "volume", "nvme"):
        raise xml.report(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            "'file' is the only supported backup source type",
            disk,
        )
    if not name:
        raise xml.report(
            libvirt.VIR_ERR_INTERNAL_ERROR,
            "missing name from disk backup element: expected a name attribute",
            disk,
        )
    if present not in (None, "yes", "no"):
        raise xml.xml_error(
            f"Invalid disk '{name}' present attribute value: expected 'yes' or 'no'", disk
        )


# --- writing ---


def _format_address(address: Address, parent: etree._Element) -> None:
    match address:
        case IpAddress(host, port, tls, autoport):
            picks = True if port is None else autoport
            xml.append(parent, "address", type="ip", host=host, port=port, autoport=picks, tls=tls)
        case UnixAddress(path, tls):
            xml.append(parent, "address", type="unix", path=path, tls=tls)


def _format_disk(disk: BackupDiskDef, parent: etree._Element) -> None:
    element = xml.append(
        parent,
        "disk",
        name=disk.name,
        present=disk.present,
        type=disk.type,
        reason=disk.reason,
        exportname=disk.exportname,
        exportbitmap=disk.exportbitmap,
    )
    if disk.source is not None:
        disk.source.format(element)
    if disk.granularity is not None:
        xml.append(element, "bitmap", granularity=storage_conf.format_size(disk.granularity))


# --- the running backup, as backupGetInfo tells it ---


SaveFailure = typing.Literal["backup", "save"]


@dataclasses.dataclass(frozen=True)
class DiskInfo:
    """One disk of a running backup."""

    name: str
    export: str
    state: typing.Literal["running", "failed"]
    reason: str | None
    """Why it failed, in QEMU's words where it said any."""
    capacity: int
    """The guest-visible size, bytes."""
    scratch_used: int | None
    """Bytes that the scratch image takes on its file system; None where nobody can tell."""
    dirty: int | None = None
    """Bytes changed since the branch's last point; None without a branch."""
    scratch_worst_case: int | None = None
    """Bytes that the scratch image takes when the guest overwrites the whole disk."""
    scratch_free: int | None = None
    """Bytes free on the scratch image's file system; None where nobody can tell."""
    scratch_hangs: bool = False
    """The scratch image does not take what is written to it, and the guest's writes wait for it."""
    warning: str | None = None
    """What is or may go wrong with the disk's scratch image, in words."""
    type: DiskType = "full"
    """``full`` or ``incremental``: what the backup has of this disk."""
    type_reason: str | None = None
    """Why, where the choice was left to us (``auto``)."""
    since: "Point | None" = None
    """The point since which an incremental backup has all changes."""


@dataclasses.dataclass(frozen=True)
class Point:
    """An instant at which a branch had a good backup."""

    id: str
    """The backup's; tells it from every other point."""
    time: float
    """Seconds since the epoch."""


@dataclasses.dataclass(frozen=True)
class BackupInfo:
    """What is known of a running backup at this instant."""

    state: typing.Literal["running", "failed"]
    started: float
    """Seconds since the epoch."""
    address: Address
    disks: tuple[DiskInfo, ...]
    engine: str | None = None
    """How the frozen disks are made, where the driver has several ways."""
    scratch_failure: typing.Literal["backup", "guest"] | None = None
    """What breaks when a scratch image fails: the backup, or the guest's write."""
    scratch_timeout: float | None = None
    """Seconds after which a scratch image that hangs has failed; None: the guest's writes hang as
    long as it does."""
    id: str | None = None
    """Tells the backup from every other; the id of its point once it was stopped and good."""
    branch: str | None = None
    save_failure: SaveFailure | None = None
    """What fails when the guest is saved in the middle of the backup: that, or the save, and a
    migration with it; None where nobody can tell."""
    save_reason: str | None = None
    """Why the save would."""

    @property
    def warnings(self) -> list[str]:
        """What may go wrong with a scratch image, a line for each disk."""
        return [f"disk '{disk.name}': {disk.warning}" for disk in self.disks if disk.warning]


# --- branches, as branchList tells them ---


@dataclasses.dataclass(frozen=True)
class BranchDisk:
    """What one disk has of a branch. Sizes are bytes."""

    name: str
    granularity: int | None
    """None where its bitmap is gone."""
    dirty: int | None
    """Changed since the last point, or up to that much; None where that is not known."""
    persistent: bool
    """Whether it outlives the guest's end: the image can hold it."""
    reason: str | None
    """Why the next backup of this disk cannot be incremental; None: it can."""
    point: Point | None
    """The last good backup."""
    note: str | None = None
    """What else is worth knowing, in words."""

    @property
    def sound(self) -> bool:
        """Whether the next backup of this disk can be incremental."""
        return self.reason is None


@dataclasses.dataclass(frozen=True)
class Branch:
    """A line of incremental backups; a foreign one is somebody else's bitmap, never touched."""

    name: str
    foreign: bool
    disks: tuple[BranchDisk, ...]
