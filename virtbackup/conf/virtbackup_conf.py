# SPDX-License-Identifier: LGPL-2.1-or-later
"""``virtbackup.conf``: settings that are not of one backup (libvirt's virconf.c and qemu_conf.c).

A line is ``name = value``: a text in double or single quotes, a number, yes or no, or a list of
texts in brackets, which may go on over several lines; ``#`` begins a comment. A setting that nobody
knows is an error, for it may be a safeguard that is misspelt.
"""

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import libvirt

from virtbackup import errors

_TEXT = r"""(?:"[^"\n]*"|'[^'\n]*')"""
_LINE = re.compile(
    rf"""\s*(?:(?P<name>[A-Za-z_][\w-]*)\s*=\s*
        (?:"(?P<double>[^"\n]*)"|'(?P<single>[^'\n]*)'|(?P<word>\w+)
          |\[(?P<list>\s*(?:{_TEXT}\s*(?:,\s*{_TEXT}\s*)*,?\s*)?)\])
        \s*)?(?:\#.*)?""",
    re.VERBOSE,
)
_OPEN_LIST = re.compile(rf"""(\s*[A-Za-z_][\w-]*\s*=\s*\[(?:[^"'\#\]]|{_TEXT})*)(?:\#.*)?""")
"""The beginning of a list that goes on in the next line."""
_YES_OR_NO = {"1": True, "yes": True, "0": False, "no": False}


@dataclasses.dataclass(frozen=True)
class X509:
    """TLS by certificates."""

    directory: str
    """It has ca-cert.pem, server-cert.pem and server-key.pem."""
    verify: bool
    """A client must have a certificate of the same authority."""
    client_directory: str
    """It has ca-cert.pem and, for servers that verify, client-cert.pem and client-key.pem."""


@dataclasses.dataclass(frozen=True)
class Psk:
    """TLS by keys that both ends have."""

    directory: str
    """It has keys.psk: lines of a name, a colon and a key in hexadecimal digits."""
    username: str
    """Whose key a client of ours takes."""

    @property
    def file(self) -> str:
        return f"{self.directory.rstrip('/')}/keys.psk"


Credentials = X509 | Psk


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that can be set, with the defaults of what is not."""

    backup_tls_x509_cert_dir: str | None = None
    """It has ca-cert.pem, server-cert.pem and server-key.pem, for exports with TLS."""
    backup_tls_x509_verify: bool = True
    """Who reads an export must have a certificate of the same authority."""
    backup_tls_x509_client_cert_dir: str | None = None
    """It has ca-cert.pem, client-cert.pem and client-key.pem, for backup-pull. None: the same
    directory as the server's."""
    backup_tls_psk_dir: str | None = None
    """It has keys.psk, for exports with TLS by keys that both ends have."""
    backup_tls_psk_username: str = "qemu"
    """Whose key backup-pull takes."""
    insecure: bool = False
    """No warning of a backup that everybody on the network can read."""
    uris: tuple[str, ...] = ()
    """What the daemon serves, where its command line does not say."""
    listen: tuple[str, ...] = ()
    """Where it listens, likewise."""
    unix_sock_mode: str = "0600"
    """Permissions of its unix sockets, octal."""
    unix_sock_group: str | None = None
    """Their group; None: the daemon's own."""
    tls_x509_cert_dir: str | None = None
    """It has ca-cert.pem, server-cert.pem and server-key.pem, for clients of the daemon."""
    access: tuple[str, ...] | None = None
    """Who may do what (access.Rule); None: whoever can connect may do everything."""
    max_clients: int = 500
    """Clients of the daemon at a time."""
    max_client_requests: int = 5
    """Calls of a client that are worked on at a time."""
    max_workers: int = 20
    """Calls of all clients that are worked on at a time."""
    keepalive_interval: int = 5
    """Seconds of silence after which the daemon pings a client; 0: never."""
    keepalive_count: int = 5
    """Pings without an answer after which a client is let go."""
    files: tuple[str, ...] = ()
    """Where settings were looked for; not one itself."""
    places: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    """Setting -> file and line that say it; not one itself."""

    @classmethod
    def parse(cls, texts: Mapping[str, str], files: Iterable[str] = ()) -> "Settings":
        """What the files say, by their names; a later one takes the place of what an earlier says.
        FILES are those that might have been there. Errors: VIR_ERR_CONF_SYNTAX, by file and line.
        """
        values: dict[str, Value] = {}
        places: dict[str, str] = {}
        for file, text in texts.items():
            for number, line in _lines(text):
                said = _parse_line(line, f"{file}:{number}")
                values |= said
                places |= dict.fromkeys(said, f"{file}:{number}")
        return cls(**values, files=tuple(files), places=places)  # type: ignore[arg-type]

    def wrong(self, name: str, detail: str) -> errors.Error:
        """VIR_ERR_CONF_SYNTAX about the setting NAME, with its place where it has one."""
        place = f"{self.places[name]}: " if name in self.places else ""
        return _syntax(f"{place}{name}: {detail}")

    def credentials(self) -> Credentials:
        """What TLS of exports goes by. Errors: VIR_ERR_OPERATION_INVALID where that is not set,
        VIR_ERR_CONFIG_UNSUPPORTED where both ways are."""
        x509, psk = self.backup_tls_x509_cert_dir, self.backup_tls_psk_dir
        where = " or ".join(f"'{file}'" for file in self.files)
        if x509 is not None and psk is not None:
            raise errors.error(
                libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
                "backup_tls_x509_cert_dir and backup_tls_psk_dir are mutually exclusive, and both"
                f" are set in {where}",
            )
        if psk is not None:
            return Psk(psk, self.backup_tls_psk_username)
        if x509 is not None:
            client = self.backup_tls_x509_client_cert_dir or x509
            return X509(x509, self.backup_tls_x509_verify, client)
        raise errors.error(
            libvirt.VIR_ERR_OPERATION_INVALID,
            "backup TLS directory not configured: expected backup_tls_x509_cert_dir or"
            f" backup_tls_psk_dir in {where}",
        )


Value = str | bool | int | tuple[str, ...]


def _kind(hint: Any) -> str:
    """What a value is to be, by the type of a field."""
    if any(typing.get_origin(option) is tuple for option in (hint, *typing.get_args(hint))):
        return "a list of texts in brackets"
    return {bool: "yes or no", int: "a number"}.get(hint, "a text in quotes")


_KINDS = {name: _kind(hint) for name, hint in typing.get_type_hints(Settings).items()}
del _KINDS["files"], _KINDS["places"]
"""Setting -> what its value is to be."""

_AT_LEAST_ONE = ("max_clients", "max_client_requests", "max_workers", "keepalive_count")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines, each with its number; those of a list are one."""
    begun, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        whole, at = (f"{begun} {line}", first) if begun else (line, number)
        if (match := _OPEN_LIST.fullmatch(whole)) is not None:
            begun, first = match[1], at
            continue
        yield at, whole
        begun = ""
    if begun:
        yield first, begun


def _parse_line(line: str, place: str) -> dict[str, Value]:
    """The setting of a line, if it has one."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise _syntax(f"{place}: expected NAME = VALUE, with a text in quotes")
    name = match["name"]
    if name is None:
        return {}
    if name not in _KINDS:
        raise _syntax(f"{place}: there is no setting '{name}'")
    value = _value(name, match)
    if value is None:
        raise _syntax(f"{place}: expected {_KINDS[name]} for '{name}'")
    if name in _AT_LEAST_ONE and not value:
        raise _syntax(f"{place}: expected at least 1 for '{name}'")
    if isinstance(value, str) and name.endswith("_dir") and not value.startswith("/"):
        raise _syntax(f"{place}: expected an absolute path for '{name}'")
    return {name: value}


def _value(name: str, match: re.Match[str]) -> Value | None:
    """What a line says of NAME; None where that is of another kind."""
    text = match["double"] if match["double"] is not None else match["single"]
    word = match["word"] if text is None else text
    match _KINDS[name]:
        case "yes or no":
            return _YES_OR_NO.get(word)
        case "a number":
            fits = match["word"] and re.fullmatch(r"[0-9]{1,9}", match["word"])
            return int(match["word"]) if fits else None
        case "a list of texts in brackets":
            if match["list"] is None:
                return (text,) if text else None
            return tuple(found[1:-1] for found in re.findall(_TEXT, match["list"]))
    return text or None


def _syntax(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_CONF_SYNTAX, detail, domain=libvirt.VIR_FROM_CONF)
