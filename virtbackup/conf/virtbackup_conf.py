# SPDX-License-Identifier: LGPL-2.1-or-later
"""``virtbackup.conf``: settings that are not of one backup (libvirt's virconf.c and qemu_conf.c).

A line is ``name = value``: a text in double or single quotes, a number, or yes or no; ``#`` begins
a comment. A setting that nobody knows is an error, for it may be a safeguard that is misspelt.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import libvirt

from virtbackup import errors

_LINE = re.compile(
    r"""\s*(?:(?P<name>[A-Za-z_][\w-]*)\s*=\s*
        (?:"(?P<double>[^"\n]*)"|'(?P<single>[^'\n]*)'|(?P<word>\w+))\s*)?(?:\#.*)?""",
    re.VERBOSE,
)
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
    backup_tls_x509_verify: bool = True
    backup_tls_x509_client_cert_dir: str | None = None
    """None: the same directory as the server's."""
    backup_tls_psk_dir: str | None = None
    backup_tls_psk_username: str = "qemu"
    insecure: bool = False
    """No warning of a backup that everybody on the network can read."""
    files: tuple[str, ...] = ()
    """Where settings were looked for; not one itself."""

    @classmethod
    def parse(cls, texts: Mapping[str, str], files: Iterable[str] = ()) -> "Settings":
        """What the files say, by their names; a later one takes the place of what an earlier says.
        FILES are those that might have been there. Errors: VIR_ERR_CONF_SYNTAX, by file and line.
        """
        values: dict[str, str | bool] = {}
        for file, text in texts.items():
            for number, line in enumerate(text.splitlines(), 1):
                values.update(_parse_line(line, f"{file}:{number}"))
        return cls(**values, files=tuple(files))  # type: ignore[arg-type]  # as _KINDS has them

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


_KINDS = {
    field.name: "yes or no" if field.default in (True, False) else "a text in quotes"
    for field in dataclasses.fields(Settings)
    if field.name != "files"
}
"""Setting -> what its value is to be."""


def _parse_line(line: str, place: str) -> dict[str, str | bool]:
    """The setting of a line, if it has one."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise _syntax(f"{place}: expected NAME = VALUE, with a text in quotes")
    name = match["name"]
    if name is None:
        return {}
    if name not in _KINDS:
        raise _syntax(f"{place}: there is no setting '{name}'")
    text = match["double"] if match["double"] is not None else match["single"]
    if _KINDS[name] == "yes or no":
        word = match["word"] if text is None else text
        if word not in _YES_OR_NO:
            raise _syntax(f"{place}: expected yes or no for '{name}'")
        return {name: _YES_OR_NO[word]}
    if not text:
        raise _syntax(f"{place}: expected a text in quotes for '{name}'")
    if name.endswith("_dir") and not text.startswith("/"):
        raise _syntax(f"{place}: expected an absolute path for '{name}'")
    return {name: text}


def _syntax(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_CONF_SYNTAX, detail, domain=libvirt.VIR_FROM_CONF)
