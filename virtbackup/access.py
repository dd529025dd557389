# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what (viraccessperm.c, and what an access driver of libvirt's decides)."""

import dataclasses
import enum
import fnmatch
import re
from collections.abc import Iterable, Set

import libvirt

from virtbackup import errors


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
    "domain_get_autostart_once": Perm.READ,
    "domain_has_managed_save_image": Perm.READ,
    "domain_snapshot_num": Perm.READ,
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


def read_only(function: str) -> errors.Error:
    """The refusal of a public FUNCTION on a read-only connection."""
    return errors.error(
        libvirt.VIR_ERR_OPERATION_DENIED,
        f"read only access prevents {function}",
        domain=libvirt.VIR_FROM_DOMAIN,
    )


# --- the policy of a daemon ---


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who is at the other end of a connection, as far as that is sure."""

    kind: str
    """``unix``, by the kernel's word; ``tls``, by a certificate that was checked; or ``tcp``."""
    name: str = ""
    """The user; the certificate's common name; nothing of tcp, behind which anybody may be."""
    groups: frozenset[str] = frozenset()
    """Of a user."""

    def __str__(self) -> str:
        return f"{self.kind} client '{self.name}'" if self.name else f"{self.kind} client"


_RULE = re.compile(r"(?P<who>\S+)\s+(?P<domains>\S+)\s+(?P<perms>[a-z]+(?:,[a-z]+)*)")
_WHO = re.compile(r"(unix|tls):(@?)(.+)|tcp|\*")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a policy: ``unix:alice web-* read,backup``."""

    who: str
    """``unix:USER``, ``unix:@GROUP``, ``tls:NAME``, ``tcp`` or ``*``; names may be patterns."""
    domains: str
    """A pattern (fnmatch) of domains' names."""
    perms: frozenset[Perm]

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Read a rule. Errors: ValueError, in words for people."""
        match = _RULE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"'{text}': expected WHO DOMAINS PERMISSIONS")
        if not _WHO.fullmatch(match["who"]):
            raise ValueError(
                f"'{match['who']}': expected unix:USER, unix:@GROUP, tls:NAME, tcp or *"
            )
        if match["who"].startswith("tls:@"):
            raise ValueError(f"'{match['who']}': certificates have no groups")
        known = {perm.value: perm for perm in Perm}
        for word in match["perms"].split(","):
            if word not in known:
                raise ValueError(f"there is no permission '{word}': expected read or backup")
        perms = frozenset(known[word] for word in match["perms"].split(","))
        return cls(match["who"], match["domains"], perms)

    def is_about(self, who: Identity) -> bool:
        """Whether the rule grants WHO anything."""
        match = _WHO.fullmatch(self.who)
        assert match is not None
        if match[1] is None:
            return self.who in ("*", who.kind)
        names = who.groups if match[2] else {who.name}
        return match[1] == who.kind and any(
            name and fnmatch.fnmatchcase(name, match[3]) for name in names
        )


@dataclasses.dataclass(frozen=True)
class Policy:
    """What clients may do: what any of the rules about them grants. None: who can connect may do
    everything."""

    rules: tuple[Rule, ...] | None = None

    @classmethod
    def parse(cls, lines: Iterable[str]) -> "Policy":
        """Errors: ValueError, in words for people."""
        return cls(tuple(map(Rule.parse, lines)))

    def granted(self, who: Identity, domain: str) -> frozenset[Perm]:
        """What WHO may do with the DOMAIN of that name. Whoever may back it up may look at it."""
        if self.rules is None:
            return EVERYTHING
        perms: set[Perm] = set()
        for rule in self.rules:
            if rule.is_about(who) and fnmatch.fnmatchcase(domain, rule.domains):
                perms |= rule.perms
        return frozenset(perms | READ_ONLY if perms else perms)

    def admits(self, who: Identity) -> bool:
        """Whether WHO may do anything at all."""
        return self.rules is None or any(rule.is_about(who) for rule in self.rules)


def denied(who: Identity, perm: Perm, domain: str) -> errors.Error:
    """The refusal of a call that takes a permission which the policy does not grant; DOMAIN is what
    WHO has called it, quotes and all."""
    return errors.error(
        libvirt.VIR_ERR_ACCESS_DENIED,
        f"{who} has not the permission '{perm.value}' on domain {domain}",
        domain=libvirt.VIR_FROM_ACCESS,
    )
