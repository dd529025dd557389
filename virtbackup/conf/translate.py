# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two dialects of ``<domainbackup>``: the proposal's and libvirt's own (native_conf).

``to_native`` and ``to_proposal`` are inverses on what both dialects can say. What the other one
cannot say is VIR_ERR_CONFIG_UNSUPPORTED, by element and disk; nothing is left out but what no start
looks at: ``reason``, ``index`` and ``state``, what is said of a disk that takes no part, a
checkpoint that no disk is relative to.

Once a disk is listed, the dialects differ about the others: the proposal includes them, libvirt
does not. So a document that lists disks takes the domain to be translated.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterable, Iterator

import libvirt
from lxml import etree

from virtbackup.conf import backup_conf, dialects, domain_conf, native_conf, storage_conf, xml

# --- whole documents ---


def translate(document: str, to: dialects.Dialect, domain: dialects.Domain | None = None) -> str:
    """The document in the dialect TO; one that is in it already, as ``format`` writes it.

    Errors: those of ``dialect`` and of both ``parse``; VIR_ERR_CONFIG_UNSUPPORTED, with the line,
    for what cannot be said; those of ``align_disks`` of both dialects.
    """
    root = xml.parse(document, "domainbackup")
    if dialects.dialect(document) == "proposal":
        ours = backup_conf.BackupDef.parse(document)
        if to == "proposal":
            return ours.format()
        with _telling(root):
            return _to_native(ours, domain).format()
    native = native_conf.BackupDef.parse(document)
    if to == "native":
        return native.format()
    with _telling(root):
        return _to_proposal(native, domain).format()


def read_native(document: str, domain: dialects.Domain) -> backup_conf.BackupDef:
    """What a document in libvirt's own dialect asks for. Errors: as ``translate``."""
    with _telling(xml.parse(document, "domainbackup")):
        return _to_proposal(native_conf.BackupDef.parse(document), domain)


def address_of_native(document: str) -> backup_conf.Address:
    """Where the NBD server of a backup is to listen, by a document in libvirt's own dialect.

    Errors: as ``translate``, of what no domain is needed for.
    """
    with _telling(xml.parse(document, "domainbackup")):
        return _address(native_conf.BackupDef.parse(document).server)


class _Unsayable(Exception):
    """The other dialect has no words for this; PATH is where it is said, from the root."""

    def __init__(self, detail: str, path: str) -> None:
        super().__init__(detail)
        self.path = path


@contextlib.contextmanager
def _telling(root: etree._Element | None) -> Iterator[None]:
    """What cannot be said leaves here as an error, with its line in ROOT if that is given."""
    try:
        yield
    except _Unsayable as failure:
        element = None if root is None else root.find(failure.path)
        raise xml.report(libvirt.VIR_ERR_CONFIG_UNSUPPORTED, str(failure), element) from None


def _ask(domain: dialects.Domain | None, path: str, why: str) -> domain_conf.DomainDef:
    if domain is None:
        raise _Unsayable(f"the disks of the domain must be known for a translation: {why}", path)
    return domain()


_UNLISTED = "of disks that are not listed, the proposal includes all, libvirt none"


_Disk = typing.TypeVar("_Disk", backup_conf.BackupDiskDef, native_conf.BackupDiskDef)


def _listed(disks: Iterable[_Disk]) -> list[tuple[str, _Disk]]:
    """The disks that a document lists, each with its path."""
    return [(f"disks/disk[{number}]", disk) for number, disk in enumerate(disks, 1)]


# --- proposal -> native ---


def to_native(
    definition: backup_conf.BackupDef, domain: dialects.Domain | None = None
) -> native_conf.BackupDef:
    """The same backup in libvirt's own dialect, the branch's name as the checkpoint's.

    That a branch moves on with the backup is not part of it: libvirt has a document of its own for
    the checkpoint to begin. Errors: as ``translate``, without lines.
    """
    with _telling(None):
        return _to_native(definition, domain)


def _to_native(
    definition: backup_conf.BackupDef, domain: dialects.Domain | None
) -> native_conf.BackupDef:
    server = _server(definition.address)
    for path, disk in _listed(definition.disks):
        if disk.present is not False:
            _refuse_for_native(disk, definition.branch, path)
    if definition.fork is not None:
        raise _Unsayable(
            f"<branch fork='{definition.fork}'> cannot be said in libvirt's own dialect: the"
            " checkpoint that begins is a document of its own",
            "branch",
        )
    if definition.branch is not None and all(
        disk.type != "incremental" or disk.present is False for disk in definition.disks
    ):
        raise _Unsayable(
            f"branch '{definition.branch}' of a backup without incremental disks cannot be said in"
            " libvirt's own dialect: the checkpoint that it begins is a document of its own",
            "branch",
        )
    if not definition.disks:
        return native_conf.BackupDef("pull", server)
    aligned = definition.align_disks(_ask(domain, "disks", _UNLISTED))
    return native_conf.BackupDef(
        mode="pull",
        server=server,
        incremental=definition.branch,
        disks=tuple(_native_disk(disk, definition.branch) for disk in aligned.disks),
    )


def _server(address: backup_conf.Address) -> native_conf.Server:
    if isinstance(address, backup_conf.UnixAddress):
        return native_conf.UnixServer(address.path, address.tls)
    port = None if address.picks_port else address.port
    return native_conf.TcpServer(address.host, port, address.tls)


def _refuse_for_native(disk: backup_conf.BackupDiskDef, branch: str | None, path: str) -> None:
    def unsayable(what: str, below: str = "") -> _Unsayable:
        detail = f"disk '{disk.name}': {what} cannot be said in libvirt's own dialect"
        return _Unsayable(detail, path + below)

    if disk.type == "auto":
        raise unsayable("type='auto'")
    if disk.type == "incremental" and branch is None:
        raise _Unsayable(f"disk '{disk.name}': backup type 'incremental' needs a branch", path)
    if disk.granularity is not None:
        raise unsayable("<bitmap granularity=>", "/bitmap")
    if disk.source is not None and disk.source.dir is not None:
        raise unsayable("<source dir=>", "/source")
    if disk.source is not None and disk.source.reserve:
        raise unsayable("<source reserve='yes'>", "/source")


def _native_disk(disk: backup_conf.BackupDiskDef, branch: str | None) -> native_conf.BackupDiskDef:
    """One disk of a backup that was aligned."""
    if not disk.present:
        return native_conf.BackupDiskDef(disk.name, backup=False)
    incremental = disk.type == "incremental"
    file = None if disk.source is None else disk.source.file
    return native_conf.BackupDiskDef(
        name=disk.name,
        backup=True,
        type="file",
        backupmode="full" if branch is not None and not incremental else None,
        exportname=None if disk.exportname == disk.name else disk.exportname,
        exportbitmap=(disk.exportbitmap or branch) if incremental else None,
        image=None if file is None else native_conf.Image(file),
    )


def running_to_native(definition: backup_conf.BackupDef) -> native_conf.BackupDef:
    """A running backup as libvirt's own tells one: of each disk that takes part how and by which
    names, of the server the port that was picked. What libvirt's own has no words for is left out.
    """
    address = definition.address
    if isinstance(address, backup_conf.IpAddress):
        address = dataclasses.replace(address, autoport=None)
    incremental = any(disk.type == "incremental" for disk in definition.disks)
    return native_conf.BackupDef(
        mode="pull",
        server=_server(address),
        incremental=definition.branch if incremental else None,
        disks=tuple(_running_disk(disk, definition.branch) for disk in definition.disks),
    )


def _running_disk(disk: backup_conf.BackupDiskDef, branch: str | None) -> native_conf.BackupDiskDef:
    told = _native_disk(disk, branch)
    if not disk.present:
        return told
    incremental = branch if disk.type == "incremental" else None
    return dataclasses.replace(
        told,
        backupmode="full" if incremental is None else "incremental",
        incremental=incremental,
        exportname=disk.exportname,
    )


# --- native -> proposal ---


def to_proposal(
    definition: native_conf.BackupDef, domain: dialects.Domain | None = None
) -> backup_conf.BackupDef:
    """The same backup in the proposal's dialect, the checkpoint's name as the branch's.

    A server without a port, which libvirt refuses so far, is one whose port the start picks.
    An ``exportbitmap`` that is not said is ``backup-DISK`` in libvirt's own, and is said in the
    proposal. Errors: as ``translate``, without lines.
    """
    with _telling(None):
        return _to_proposal(definition, domain)


def _to_proposal(
    definition: native_conf.BackupDef, domain: dialects.Domain | None
) -> backup_conf.BackupDef:
    if definition.mode == "push":
        raise _Unsayable("mode='push' cannot be said in the proposal: it pulls only", ".")
    address = _address(definition.server)
    for path, disk in _listed(definition.disks):
        if disk.backup is not False:
            _refuse_for_proposal(disk, path)
    if definition.disks:
        found = _ask(domain, "disks", _UNLISTED)
    elif definition.incremental is not None:
        why = "the proposal says disk by disk that one is incremental"
        found = _ask(domain, "incremental", why)
    else:
        return backup_conf.BackupDef(address)
    aligned = definition.align_disks(found)
    paths = {disk.name: path for path, disk in _listed(definition.disks)}
    branch = _branch(aligned, paths)
    proposal = backup_conf.BackupDef(
        address=address,
        disks=tuple(_proposal_disk(disk, branch, paths) for disk in aligned.disks),
        branch=branch,
    )
    proposal.align_disks(found)  # the proposal refuses more, as disks that are read-only
    return proposal


def _address(server: native_conf.Server | None) -> backup_conf.Address:
    match server:
        case native_conf.UnixServer(socket, tls):
            return backup_conf.UnixAddress(socket, tls)
        case native_conf.FdServer():
            raise _Unsayable("<server transport='fd'> cannot be said in the proposal", "server")
        case native_conf.TcpServer(name, port, tls):
            autoport = True if port is None else None
            return backup_conf.IpAddress(name, port, tls, autoport)
    return backup_conf.IpAddress(native_conf.DEFAULT_HOST, autoport=True)


def _refuse_for_proposal(disk: native_conf.BackupDiskDef, path: str) -> None:
    def unsayable(what: str, below: str = "") -> _Unsayable:
        return _Unsayable(
            f"disk '{disk.name}': {what} cannot be said in the proposal", path + below
        )

    if disk.type == "block":
        raise unsayable("type='block'")
    if disk.image is not None and disk.image.encryption is not None:
        raise unsayable("<encryption>", "/scratch/encryption")
    if disk.image is not None and disk.image.seclabels:
        raise unsayable("<seclabel>", "/scratch/seclabel")


def _branch(aligned: native_conf.BackupDef, paths: dict[str, str]) -> str | None:
    """The one checkpoint that all incremental disks are relative to; PATHS are those of the disks
    that the document lists."""
    incremental = [disk for disk in aligned.disks if disk.incremental is not None]
    if not incremental:
        return None
    branch = incremental[0].incremental
    assert branch is not None
    for disk in incremental:
        if disk.incremental != branch:
            raise _Unsayable(
                f"disk '{disk.name}': incremental='{disk.incremental}' where disk"
                f" '{incremental[0].name}' has '{branch}' cannot be said in the proposal: a backup"
                " has one branch",
                paths[disk.name],
            )
    if branch.startswith(backup_conf.OWN_PREFIX):
        raise _Unsayable(
            f"checkpoint '{branch}' cannot be said in the proposal: branch names that begin with"
            f" '{backup_conf.OWN_PREFIX}' are reserved",
            "incremental" if branch == aligned.incremental else paths[incremental[0].name],
        )
    return branch


def _proposal_disk(
    disk: native_conf.BackupDiskDef, branch: str | None, paths: dict[str, str]
) -> backup_conf.BackupDiskDef:
    """One disk of a backup that was aligned; PATHS as for ``_branch``."""
    if not disk.backup:
        return backup_conf.BackupDiskDef(disk.name, present=False)
    if disk.exportbitmap is not None and disk.incremental is None:
        raise _Unsayable(
            f"disk '{disk.name}': exportbitmap='{disk.exportbitmap}' cannot be said in the"
            " proposal: the backup of the disk is full",
            paths[disk.name],
        )
    bitmap = None
    if disk.incremental is not None:
        bitmap = disk.exportbitmap or native_conf.default_exportbitmap(disk.name)
    return backup_conf.BackupDiskDef(
        name=disk.name,
        present=True,
        type=None if branch is None else disk.backupmode,
        source=None if disk.image is None else storage_conf.Source(file=disk.image.path),
        exportname=None if disk.exportname == disk.name else disk.exportname,
        exportbitmap=None if bitmap == branch else bitmap,
    )
