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
    "domain_lookup": Perm.READ,
    "get_hostname": Perm.READ,
    "get_lib_version": Perm.READ,
    "get_capabilities": Perm.READ,
    "node_get_info": Perm.READ,
    "node_get_security_model": Perm.READ,
    "domain_get_info": Perm.READ,
    "domain_get_os_type": Perm.READ,
    "domain_is_persistent": Perm.READ,
    "domain_get_autostart": Perm.READ,
    "domain_has_managed_save_image": Perm.READ,
    "domain_get_security_label": Perm.READ,
    "domain_get_messages": Perm.READ,
    "domain_get_block_info": Perm.READ,
    "domain_block_stats_flags": Perm.READ,
    "domain_get_block_job_info": Perm.READ,
    "get_all_domain_stats": Perm.READ,
    "domain_fsfreeze": Perm.BACKUP,
    "domain_fsthaw": Perm.BACKUP,
    "domain_suspend": Perm.BACKUP,
    "domain_resume": Perm.BACKUP,
    "domain_monitor_command": Perm.BACKUP,
    "event_register": Perm.READ,
}
"""Driver call -> the permission it needs."""


def allowed(call: str, granted: Set[Perm]) -> bool:
    """Whether GRANTED holds what the driver CALL needs."""
    return NEEDED[call] in granted
