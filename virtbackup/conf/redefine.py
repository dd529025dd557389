# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's XML with some of its disks elsewhere: as the document of a guest that is put back."""

import dataclasses
import posixpath
import urllib.parse
from collections.abc import Callable, Mapping

import libvirt
from lxml import etree

from virtbackup import errors
from virtbackup.conf import domain_conf, xml

_NBD_PORT = 10809

_OF_OLD_MEDIUM = ("source", "backingStore", "mirror", "encryption", "auth", "capacity")
"""Elements of a ``<disk>`` that tell of the medium that it had."""


@dataclasses.dataclass(frozen=True)
class Medium:
    """Where a disk is now: PLACE is a path, or of type ``network`` an NBD URI."""

    type: str
    """file, block or network."""
    place: str
    format: str


def redefine(document: str, media: Mapping[str, Medium], here: str = "") -> tuple[str, list[str]]:
    """DOCUMENT, a ``<domain>``, with the disks of the target names in MEDIA there; and those of its
    disks with a medium that are not in MEDIA. It is of no running domain. HERE is the directory in
    which a server's socket is that is told without one.

    Errors: VIR_ERR_XML_ERROR, also where it has no disk of a name in MEDIA; VIR_ERR_INVALID_ARG and
    VIR_ERR_CONFIG_UNSUPPORTED for an URI that a document cannot have.
    """
    root = xml.parse(document, "domain")
    _forget(root, "id")
    left, found = [], set()
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        name = "" if target is None else target.get("dev", "")
        if name in media:
            with xml.writing():
                _move(disk, media[name], here)
            found.add(name)
        elif domain_conf.medium(disk) is not None:
            left.append(name)
    if missing := sorted(set(media) - found):
        raise xml.xml_error(f"the domain has no disk '{missing[0]}'", root)
    return xml.indented(root), left


def on_any_host(document: str, defined: Callable[[], str]) -> str:
    """DOCUMENT, of a running domain, with the CPU that its definition, which DEFINED tells, asks
    for, where that is the host's: what runs has that of this host, with which it may not start on
    another. What the domain's processors and memory have to fit is as it runs: the definition may
    be of others by now.

    Errors: VIR_ERR_XML_ERROR, those of DEFINED.
    """
    root = xml.parse(document, "domain")
    cpu = root.find("cpu")
    if cpu is None or cpu.get("mode") != "custom":
        return document
    wanted = xml.parse(defined(), "domain").find("cpu")
    if wanted is None or wanted.get("mode") != "host-model":
        return document
    for name in ("topology", "numa"):
        _drop(wanted, name)
        wanted.extend(cpu.findall(name))
    wanted.tail = cpu.tail
    root.replace(cpu, wanted)
    return xml.indented(root)


def _move(disk: etree._Element, medium: Medium, here: str) -> None:
    for name in _OF_OLD_MEDIUM:
        _drop(disk, name)
    disk.set("type", medium.type)
    _forget(disk, "snapshot")
    driver = disk.find("driver")
    if driver is None:
        driver = etree.Element("driver", name="qemu")
        disk.insert(0, driver)
    driver.set("type", medium.format)
    # libvirt takes no definition that has these with another format.
    if medium.format != "qcow2":
        _drop(driver, "metadata_cache")
        _forget(driver, "discard_no_unref")
    if medium.format != "raw":
        _drop(disk, "shareable")
    source = etree.Element("source")
    match medium.type:
        case "network":
            _nbd(source, medium.place, here)
        case "block":
            source.set("dev", medium.place)
        case _:
            source.set("file", medium.place)
    disk.insert(disk.index(driver) + 1, source)
    source.tail = driver.tail


def _drop(element: etree._Element, name: str) -> None:
    for old in element.findall(name):
        before = old.getprevious()
        if old.getnext() is None and before is not None:
            before.tail = old.tail  # where the line of the closing tag begins
        element.remove(old)


def _forget(element: etree._Element, attribute: str) -> None:
    if attribute in element.attrib:
        del element.attrib[attribute]


def _nbd(source: etree._Element, uri: str, here: str) -> None:
    """What libvirt calls an NBD URI (the NBD URI specification). Errors: it is none, or libvirt
    has no word for it."""
    try:
        parts = urllib.parse.urlsplit(uri)
        port = parts.port or _NBD_PORT
    except ValueError as failure:
        text = f"{uri} is no address of a server: {failure}"
        raise errors.error(libvirt.VIR_ERR_INVALID_ARG, text) from failure
    if parts.scheme.endswith("+vsock"):
        raise errors.error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            f"{uri} cannot be said in a domain's XML: libvirt reaches servers by TCP and by sockets"
            " in the file system",
        )
    source.set("protocol", "nbd")
    if name := urllib.parse.unquote(parts.path.removeprefix("/")):
        source.set("name", name)
    if parts.scheme.startswith("nbds"):
        source.set("tls", "yes")
    host = etree.SubElement(source, "host")
    sockets = urllib.parse.parse_qs(parts.query).get("socket")
    if sockets:
        host.set("transport", "unix")
        host.set("socket", posixpath.join(here, sockets[0]))
    else:
        host.set("name", parts.hostname or "localhost")
        host.set("port", str(port))
