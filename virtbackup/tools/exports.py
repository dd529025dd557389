# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exports of a running backup, as our own client reaches them."""

from virtbackup import config
from virtbackup.conf import backup_conf
from virtbackup.nbd import connection

_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""An address to listen on -> the one to connect to."""


def tls(address: backup_conf.Address) -> connection.Tls | None:
    """What clients of ADDRESS do TLS by; None where it has none. Errors: those of ``config.load``
    and ``Settings.credentials``."""
    if not address.tls:
        return None
    from virtbackup.conf import virtbackup_conf  # takes a while, and few need it

    match config.load().credentials():
        case virtbackup_conf.X509() as x509:
            return connection.Tls(certificates=x509.client_directory)
        case virtbackup_conf.Psk() as psk:
            return connection.Tls(psk_file=psk.file, username=psk.username)


def of(live: backup_conf.BackupDef) -> dict[str, connection.Export]:
    """Disk -> its export in the backup that runs as LIVE. Errors: those of ``tls``."""
    where, secrets = _server(live.address), tls(live.address)
    return {
        disk.name: connection.Export(where, disk.exportname or disk.name, secrets)
        for disk in live.disks if disk.present
    }  # fmt: skip


def changes(live: backup_conf.BackupDef, name: str) -> str | None:
    """The context that tells what has changed on disk NAME; None: nobody tells."""
    bitmaps = (disk.exportbitmap or live.branch for disk in live.disks if disk.name == name)
    bitmap = next(bitmaps, None)
    return None if bitmap is None else f"qemu:dirty-bitmap:{bitmap}"


def _server(address: backup_conf.Address) -> str | tuple[str, int]:
    """Where to connect to."""
    if isinstance(address, backup_conf.UnixAddress):
        return address.path
    host, port = address.endpoint
    return _ANY_HOST.get(host, host), port
