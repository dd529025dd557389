# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pull backup API that was proposed to libvirt in 2016, on real QEMU.

The names are loaded when they are first used: libvirt-python and lxml take longer to load than most
commands of the shell to run.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from virtbackup import extend
    from virtbackup.api import (
        VIR_DOMAIN_BACKUP_START_AUTODESTROY,
        VIR_DOMAIN_BACKUP_START_QUIESCE,
        VIR_DOMAIN_BACKUP_STOP_CANCEL,
        VIR_DOMAIN_EVENT_ID_BACKUP_ENDED,
        Connection,
        Domain,
        open,
    )
    from virtbackup.errors import Error

__all__ = [
    "VIR_DOMAIN_BACKUP_START_AUTODESTROY",
    "VIR_DOMAIN_BACKUP_START_QUIESCE",
    "VIR_DOMAIN_BACKUP_STOP_CANCEL",
    "VIR_DOMAIN_EVENT_ID_BACKUP_ENDED",
    "Connection",
    "Domain",
    "Error",
    "extend",
    "open",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    if name == "extend":
        return importlib.import_module("virtbackup.extend")
    home = importlib.import_module("virtbackup.errors" if name == "Error" else "virtbackup.api")
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    """With the names that are not loaded yet: whoever looks around finds them."""
    return sorted({*globals(), *__all__})
