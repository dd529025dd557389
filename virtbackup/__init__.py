# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pull backup API that was proposed to libvirt in 2016, on real QEMU."""

from virtbackup.api import (
    VIR_DOMAIN_BACKUP_START_AUTODESTROY,
    VIR_DOMAIN_BACKUP_START_QUIESCE,
    VIR_DOMAIN_BACKUP_STOP_CANCEL,
    Connection,
    Domain,
    open,
)
from virtbackup.errors import Error

__all__ = [
    "VIR_DOMAIN_BACKUP_START_AUTODESTROY",
    "VIR_DOMAIN_BACKUP_START_QUIESCE",
    "VIR_DOMAIN_BACKUP_STOP_CANCEL",
    "Connection",
    "Domain",
    "Error",
    "open",
]
