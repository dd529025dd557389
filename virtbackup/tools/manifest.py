# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a pulled backup says of itself: ``manifest.json`` beside the disks.

It is written last, so a directory that has one has a whole backup. Where backups of a branch follow
one another each has its own, ``manifest.NUMBER.json``, and ``manifest.json`` is the newest of them.

Its last field, ``checksum``, is the XXH3-128 of all that stands before it in the file; what follows
it is always the same. A manifest of an older virtbackup has none, nor ``tables`` for its disks.
"""

import collections
import dataclasses
import errno
import json
import os
import pathlib
from typing import Any, TypeVar

import libvirt
import xxhash

from virtbackup import errors, runtime
from virtbackup.nbd import checksum, copy

FILE = "manifest.json"
VERSION = 1
_OWN = "checksum"
_MOST = 64 << 20
"""Bytes."""
_MOST_NUMBER = (1 << 63) - 1
"""No file has more bytes."""

_T = TypeVar("_T", str, int, list[Any], dict[str, Any])


@dataclasses.dataclass(frozen=True)
class Checksum:
    """What virtbackup.nbd.checksum defines as ALGORITHM."""

    algorithm: str
    block: int
    value: str


@dataclasses.dataclass(frozen=True)
class Disk:
    """One disk of a backup. Sizes are bytes."""

    name: str
    file: str
    """In the manifest's directory; of a block device its path, which is absolute."""
    format: str
    size: int
    """Guest-visible; a qcow2 file's own is this rounded up to 512."""
    checksum: Checksum
    """Of what a guest reads."""
    stored: int
    """What the file took on its file system when it was written."""
    kind: str = "full"
    """``full``, or ``incremental``: the file has what changed since ``since``, over ``backing``."""
    backing: str | None = None
    """The file below an increment, in the manifest's directory."""
    since: str | None = None
    """The id of the backup that an increment follows."""
    reason: str | None = None
    """Why the disk's backup is of this kind, where that was not the user's choice."""
    tables: Checksum | None = None
    """Of all else that is in a qcow2 file; None of a raw one, and of an older virtbackup."""
    type: str = "file"
    """``file``, or ``block``: a block device, of which the disk takes the first bytes."""
    length: int | None = None
    """Of a qcow2 file, in bytes; None of what is raw, and of an older virtbackup."""


@dataclasses.dataclass(frozen=True)
class Domain:
    """Whose backup it is."""

    name: str
    uuid: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole backup."""

    version: int
    domain: Domain
    kind: str
    """``full`` when that of every disk is, else ``incremental``."""
    time: str
    """The instant that the backup shows, ISO 8601, UTC."""
    disks: tuple[Disk, ...]
    backup_xml: str
    """The ``<domainbackup>`` that ran, every default filled in."""
    domain_xml: str
    id: str | None = None
    """Tells the backup from every other, and its branch's point by that name."""
    branch: str | None = None
    number: int | None = None
    """Of the backups of a branch in one directory, from 1 on."""

    def to_json(self) -> str:
        """The file's text."""
        text = json.dumps(dataclasses.asdict(self), indent=2).removesuffix("\n}") + ",\n"
        return text + _ending(text)

    def facts(self) -> dict[str, Any]:
        """What the file says."""
        facts: dict[str, Any] = json.loads(self.to_json())
        return facts

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what ``to_json`` wrote; fields not known here are passed over.

        Errors: VIR_ERR_INVALID_ARG for anything else, a later version included.
        """
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise _Bad("expected an object")
            version = _get(fields, "version", int)
            if version != VERSION:
                raise _Bad(f"version {version} is not {VERSION}")
            domain = _get(fields, "domain", dict)
            return cls(
                version=version,
                domain=Domain(_get(domain, "name", str), _get(domain, "uuid", str)),
                kind=_get(fields, "kind", str),
                time=_get(fields, "time", str),
                disks=_disks(_get(fields, "disks", list)),
                backup_xml=_get(fields, "backup_xml", str),
                domain_xml=_get(fields, "domain_xml", str),
                id=_optional(fields, "id", str),
                branch=_optional(fields, "branch", str),
                number=_optional(fields, "number", int),
            )
        except (ValueError, RecursionError) as failure:  # json's, and _Bad
            raise errors.invalid_arg(
                "backupManifest", "text", f"not a backup manifest: {failure}"
            ) from failure


def _ending(text: str) -> str:
    """The rest of a manifest that begins with TEXT."""
    digest: str = xxhash.xxh3_128_hexdigest(text.encode("utf-8"))
    return f'  "{_OWN}": "xxh3-128:{digest}"\n}}\n'


def changed(text: str) -> str | None:
    """What tells that TEXT, which ``from_json`` takes, is not as ``to_json`` wrote it; None:
    nothing does, or it was written before there was a checksum."""
    body = text[: -len(_ending(""))]
    if text == body + _ending(body):
        return None
    fields = json.loads(text)
    if _OWN in fields or any("tables" in disk for disk in fields["disks"]):
        return "it is not as it was written: its own checksum does not fit"
    return None


class _Bad(ValueError):
    """A field is missing, has another type, or says what cannot be."""


def file_name_problem(name: str) -> str | None:
    """Why NAME cannot be the name of a file in a given directory; None when it can."""
    bad = name in ("", ".", "..") or "\0" in name or pathlib.PurePath(name).name != name
    try:
        name.encode()
    except UnicodeEncodeError:
        bad = True
    return f"'{name}' is not a file name" if bad else None


def device_problem(path: str) -> str | None:
    """Why PATH cannot be that of a block device in a manifest; None when it can."""
    bad = not path.startswith("/") or "\0" in path
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        bad = True
    return f"'{path}' is not the path of a device" if bad else None


def _disks(found: list[Any]) -> tuple[Disk, ...]:
    disks = tuple(map(_disk, found))
    for what, names in (
        ("called", [disk.name for disk in disks]),
        ("in", [disk.file for disk in disks]),
    ):
        for name, count in collections.Counter(names).items():
            if count > 1:
                raise _Bad(f"two disks are {what} '{name}'")
    return disks


def _disk(fields: Any) -> Disk:
    if not isinstance(fields, dict):
        raise _Bad("a disk is not an object")
    name, file = _get(fields, "name", str), _get(fields, "file", str)
    type = _optional(fields, "type", str) or "file"
    if type not in ("file", "block"):
        raise _Bad(f"a disk of type '{type}' is unknown")
    for problem in (
        file_name_problem(name),  # a restore makes files of these names
        file_name_problem(file) if type == "file" else device_problem(file),
    ):
        if problem:
            raise _Bad(problem)
    return Disk(
        name=name,
        file=file,
        format=_get(fields, "format", str),
        size=_get(fields, "size", int),
        checksum=_checksum(_get(fields, "checksum", dict)),
        stored=_get(fields, "stored", int),
        kind=_optional(fields, "kind", str) or "full",
        backing=_file(fields, "backing"),
        since=_optional(fields, "since", str),
        reason=_optional(fields, "reason", str),
        tables=None if (tables := _optional(fields, "tables", dict)) is None else _checksum(tables),
        type=type,
        length=_optional(fields, "length", int),
    )


def _checksum(fields: dict[str, Any]) -> Checksum:
    return Checksum(
        _get(fields, "algorithm", str), _get(fields, "block", int), _get(fields, "value", str)
    )


def _file(fields: dict[str, Any], name: str) -> str | None:
    file = _optional(fields, name, str)
    if file is not None and (problem := file_name_problem(file)):
        raise _Bad(problem)
    return file


def _optional(fields: dict[str, Any], name: str, kind: type[_T]) -> _T | None:
    return None if fields.get(name) is None else _get(fields, name, kind)


def _get(fields: dict[str, Any], name: str, kind: type[_T]) -> _T:
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Bad(f"{name} is not of type {kind.__name__}")
    if isinstance(value, int) and value < 0:
        raise _Bad(f"{name} is negative")
    if isinstance(value, int) and value > _MOST_NUMBER:
        raise _Bad(f"{name} is too large")
    return value


def tables_of(path: pathlib.Path, size: int, cancel: copy.Cancel | None = None) -> Checksum:
    """Of all that is in the qcow2 file at PATH beside its disk of SIZE bytes.

    Errors: VIR_ERR_SYSTEM_ERROR; VIR_ERR_OPERATION_FAILED where it is no image as a copy makes one;
    VIR_ERR_OPERATION_ABORTED when cancelled.
    """
    from virtbackup.nbd import image  # what lists backups has no need of it

    try:
        value = image.tables_checksum(path, size, cancel)
    except OSError as failure:
        raise errors.system_error(failure, f"cannot read {path}") from failure
    except image.Damaged as failure:
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_FAILED, f"{path} is not as it was written: {failure}"
        ) from failure
    return Checksum(checksum.TABLES, checksum.BLOCK, value)


def length_of(path: pathlib.Path) -> int:
    """Of the file at PATH, in bytes. Errors: VIR_ERR_SYSTEM_ERROR."""
    try:
        return path.stat().st_size
    except OSError as failure:
        raise errors.system_error(failure, f"cannot read {path}") from failure


def read_file(path: pathlib.Path) -> str:
    """The text at PATH, its line ends as they are. Errors: OSError, for what is no file or larger
    than any manifest, too; UnicodeDecodeError."""
    data = runtime.read_file(path, _MOST + 1)
    if len(data) > _MOST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return data.decode("utf-8")


def read(directory: pathlib.Path, file: str = FILE) -> Manifest:
    """The manifest in DIRECTORY. Errors, which name it: VIR_ERR_SYSTEM_ERROR,
    VIR_ERR_INVALID_ARG."""
    path = directory / file
    text = _text(path)
    try:
        return Manifest.from_json(text)
    except errors.Error as failure:
        raise errors.invalid_arg("backupManifest", "text", f"{path} is {failure}") from failure


def read_checked(directory: pathlib.Path, file: str = FILE) -> tuple[Manifest, str | None]:
    """The manifest in DIRECTORY, and what tells that it is not as it was written, as ``changed``.
    Errors: as ``read``."""
    text = _text(directory / file)
    return Manifest.from_json(text), changed(text)


def _text(path: pathlib.Path) -> str:
    try:
        return read_file(path)
    except OSError as failure:
        raise errors.system_error(failure, f"cannot read {path}") from failure
    except UnicodeDecodeError as failure:
        raise errors.error(
            libvirt.VIR_ERR_INVALID_ARG, f"{path} is not a backup manifest: {failure}"
        ) from failure
