# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that look at domains (virsh-domain.c, virsh-domain-monitor.c)."""

from collections.abc import Callable

import virtbackup
from virtbackup.tools import virsh_connection, vsh

MANAGEMENT = vsh.Group("domain", "Domain Management")
MONITORING = vsh.Group("monitor", "Domain Monitoring")

_STATES = (
    "no state",
    "running",
    "idle",
    "paused",
    "in shutdown",
    "shut off",
    "crashed",
    "pmsuspended",
)
"""By number, VIR_DOMAIN_NOSTATE first."""


_REASONS = (
    ("unknown",),
    (
        "unknown", "booted", "migrated", "restored", "from snapshot", "unpaused",
        "migration canceled", "save canceled", "event wakeup", "crashed", "post-copy",
        "post-copy failed",
    ),
    ("unknown",),
    (
        "unknown", "user", "migrating", "saving", "dumping", "I/O error", "watchdog",
        "from snapshot", "shutting down", "creating snapshot", "crashed", "starting up",
        "post-copy", "post-copy failed", "api error",
    ),
    ("unknown", "user"),
    (
        "unknown", "shutdown", "destroyed", "crashed", "migrated", "saved", "failed",
        "from snapshot", "daemon",
    ),
    ("unknown", "panicked"),
    ("unknown",),
)  # fmt: skip
"""Of each state, by number."""


def _state(domain: "virtbackup.Domain") -> str:
    return _state_and_reason(domain)[0]


def _state_and_reason(domain: "virtbackup.Domain") -> tuple[str, str]:
    state, reason = domain.state()
    if state >= len(_STATES):
        return _STATES[0], _REASONS[0][0]
    known = _REASONS[state]
    return _STATES[state], known[reason] if reason < len(known) else known[0]


_STATE_FILTERS = {
    "state-running": ("running",),
    "state-paused": ("paused",),
    "state-shutoff": ("shut off",),
    "state-other": ("no state", "idle", "in shutdown", "crashed", "pmsuspended"),
}
"""Option of list -> the states that it is about."""


def _list(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    args.exclusive("json", "table")
    for form in ("name", "uuid", "id"):
        args.exclusive("json", form)
        args.exclusive("table", form)
    states = [state for name, some in _STATE_FILTERS.items() if args.flag(name) for state in some]
    domains = [
        domain
        for domain in shell.control.connection().listAllDomains()
        if args.flag("all") or bool(states) or bool(domain.isActive()) != args.flag("inactive")
    ]
    if states:
        domains = [domain for domain in domains if _state(domain) in states]
    domains.sort(key=lambda domain: (not domain.isActive(), domain.ID(), domain.name()))
    wanted = [told for name, told in _COLUMNS.items() if args.flag(name)]
    if args.flag("json"):
        shell.print_json([_facts(domain) for domain in domains])
    elif wanted:
        for domain in domains:
            shell.print(" ".join(told(domain) for told in wanted))
    else:
        rows = [(_id(domain), domain.name(), _state(domain)) for domain in domains]
        shell.print_table(("Id", "Name", "State"), rows)


def _id(domain: "virtbackup.Domain") -> str:
    return str(domain.ID()) if domain.isActive() else "-"


_COLUMNS: dict[str, Callable[["virtbackup.Domain"], str]] = {
    "uuid": lambda domain: domain.UUIDString(),
    "id": _id,
    "name": lambda domain: domain.name(),
}
"""An option of ``list`` -> what it prints of a domain, in virsh's order."""

_FACTS: dict[str, Callable[["virtbackup.Domain"], object]] = {
    "id": lambda domain: domain.ID() if domain.isActive() else None,
    "name": lambda domain: domain.name(),
    "uuid": lambda domain: domain.UUIDString(),
    "state": _state,
}
"""What there is to tell of a domain, and what JSON calls it."""


def _facts(domain: "virtbackup.Domain") -> dict[str, object]:
    return {key: fact(domain) for key, fact in _FACTS.items()}


def _dominfo(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    domain = virsh_connection.domain(shell, args)
    if args.flag("json"):
        shell.print_json(_facts(domain))
        return
    pairs = [
        ("Id", _id(domain)),
        ("Name", domain.name()),
        ("UUID", domain.UUIDString()),
        ("State", _state(domain)),
    ]
    virsh_connection.print_pairs(shell, pairs)


def _print_one(key: str) -> Callable[[virsh_connection.Shell, vsh.Args], None]:
    """A command that prints one of the facts."""

    def handler(shell: virsh_connection.Shell, args: vsh.Args) -> None:
        domain = virsh_connection.domain(shell, args)
        value = _FACTS[key](domain)
        if args.flag("json"):
            shell.print_json({"domain": domain.name(), key: value})
        else:
            shell.print("-" if value is None else str(value))

    return handler


def _domstate(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    domain = virsh_connection.domain(shell, args)
    state, reason = _state_and_reason(domain)
    told = args.flag("reason")
    if args.flag("json"):
        more = {"reason": reason} if told else {}
        shell.print_json({"domain": domain.name(), "state": state, **more})
    else:
        shell.print(f"{state} ({reason})" if told else state)


def _dumpxml(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    virsh_connection.print_xml(shell, args, virsh_connection.domain(shell, args).XMLDesc())


def _domblklist(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.conf import domain_conf

    domain = virsh_connection.domain(shell, args)
    disks = domain_conf.DomainDef.parse(domain.XMLDesc()).disks
    if args.flag("json"):
        facts = [
            {
                "type": disk.type,
                "device": disk.device,
                "target": disk.target,
                "source": disk.source,
                "format": disk.format,
                "readonly": disk.readonly,
                "capacity": disk.capacity,
            }
            for disk in disks
        ]
        shell.print_json(facts)
    elif args.flag("details"):
        rows = [(disk.type, disk.device, disk.target, disk.source or "-") for disk in disks]
        shell.print_table(("Type", "Device", "Target", "Source"), rows)
    else:
        shell.print_table(
            ("Target", "Source"), [(disk.target, disk.source or "-") for disk in disks]
        )


COMMANDS = (
    vsh.Command(
        "domblklist", MONITORING.keyword, "list all domain blocks",
        "Get the summary of block devices for a domain.",
        (
            virsh_connection.DOMAIN,
            vsh.Option(
                "details", vsh.Kind.BOOL, "additionally display the type and device value"
            ),
            virsh_connection.JSON,
        ),
        _domblklist,
    ),
    vsh.Command(
        "dominfo", MONITORING.keyword, "domain information",
        "Returns basic information about the domain.",
        (virsh_connection.DOMAIN, virsh_connection.JSON),
        _dominfo,
    ),
    vsh.Command(
        "domid", MANAGEMENT.keyword, "convert a domain name or UUID to domain id",
        "", (virsh_connection.DOMAIN, virsh_connection.JSON), _print_one("id"),
    ),
    vsh.Command(
        "domname", MANAGEMENT.keyword, "convert a domain id or UUID to domain name",
        "", (virsh_connection.DOMAIN, virsh_connection.JSON), _print_one("name"),
    ),
    vsh.Command(
        "domstate", MONITORING.keyword, "domain state",
        "Returns state about a domain.",
        (
            virsh_connection.DOMAIN,
            vsh.Option("reason", vsh.Kind.BOOL, "also print reason for the state"),
            virsh_connection.JSON,
        ),
        _domstate,
    ),
    vsh.Command(
        "domuuid", MANAGEMENT.keyword, "convert a domain name or id to domain UUID",
        "", (virsh_connection.DOMAIN, virsh_connection.JSON), _print_one("uuid"),
    ),
    vsh.Command(
        "dumpxml", MANAGEMENT.keyword, "domain information in XML",
        "Print what is known of the domain as an XML document: at least its name, uuid and disks.",
        (virsh_connection.DOMAIN, *virsh_connection.XPATH), _dumpxml,
    ),
    vsh.Command(
        "list", MONITORING.keyword, "list domains",
        "Returns list of domains.",
        (
            vsh.Option("inactive", vsh.Kind.BOOL, "list inactive domains"),
            vsh.Option("all", vsh.Kind.BOOL, "list inactive & active domains"),
            vsh.Option("state-running", vsh.Kind.BOOL, "list domains in running state"),
            vsh.Option("state-paused", vsh.Kind.BOOL, "list domains in paused state"),
            vsh.Option("state-shutoff", vsh.Kind.BOOL, "list domains in shutoff state"),
            vsh.Option("state-other", vsh.Kind.BOOL, "list domains in other states"),
            vsh.Option("id", vsh.Kind.BOOL, "list domain IDs only"),
            vsh.Option("table", vsh.Kind.BOOL, "list table (default)"),
            vsh.Option("uuid", vsh.Kind.BOOL, "list uuid's only"),
            vsh.Option("name", vsh.Kind.BOOL, "list domain names only"),
            virsh_connection.JSON,
        ),
        _list,
    ),
)  # fmt: skip
