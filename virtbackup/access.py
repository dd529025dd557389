# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a caller must be allowed to do (viraccessperm.c)."""

import enum
from collections.abc import Set


class Perm(enum.Enum):
    """A permission on a domain, by the name that policies and refusals use."""

    READ = "read"
    BACKUP = "backup"


EVERYTHING = frozenset(Perm)
READ_ONLY = frozenset({Perm.READ})
"""What a read-only connection may do."""

NEEDED = {
    "domain_get_xml_desc": Perm.READ,
    "domain_backup_start": Perm.BACKUP,
    "domain_backup_stop": Perm.BACKUP,
    "domain_backup_cleanup": Perm.BACKUP,
    "domain_backup_get_xml_desc": Perm.READ,
    "domain_backup_get_info": Perm.READ,
    "domain_branch_list": Perm.READ,
    "domain_branch_create": Perm.BACKUP,
    "domain_branch_delete": Perm.BACKUP,
}
"""Driver call -> the permission it needs."""


def allowed(call: str, granted: Set[Perm]) -> bool:
    """Whether GRANTED holds what the driver CALL needs."""
    return NEEDED[call] in granted
