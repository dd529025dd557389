# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that look at domains (virsh-domain.c, virsh-domain-monitor.c)."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import virtbackup
from virtbackup.tools import virsh_connection, vsh

_T = TypeVar("_T")

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
    """That of one that is gone, or was left by a backup, is not known."""
    state, _ = _known(domain, _state_and_reason) or (_STATES[0], "")
    return state


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


def _has_managed_save(domain: "virtbackup.Domain") -> bool:
    return bool(domain.hasManagedSaveImage())


def _has_branch(domain: "virtbackup.Domain") -> bool | None:
    """None of one that does not run: nobody can be asked."""
    import libvirt

    if not domain.isActive():
        return None
    try:
        return bool(domain.branchList())
    except libvirt.libvirtError as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
            raise
        return False


_FILTERS: tuple[tuple[str, str, Callable[["virtbackup.Domain"], int | None]], ...] = (
    ("persistent", "transient", lambda domain: domain.isPersistent()),
    ("autostart", "no-autostart", lambda domain: domain.autostart()),
    ("with-managed-save", "without-managed-save", _has_managed_save),
    ("with-snapshot", "without-snapshot", lambda domain: bool(domain.snapshotNum())),
    ("with-checkpoint", "without-checkpoint", _has_branch),
)
"""Options of list: those that it is so of, and those that it is not; both: all."""


_LIST_FLAGS = {
    "inactive": "list inactive domains",
    "all": "list inactive & active domains",
    "transient": "list transient domains",
    "persistent": "list persistent domains",
    "with-snapshot": "list domains with existing snapshot",
    "without-snapshot": "list domains without a snapshot",
    "with-checkpoint": "list running domains with existing branch, or checkpoint of libvirt's",
    "without-checkpoint": "list running domains without either",
    "state-running": "list domains in running state",
    "state-paused": "list domains in paused state",
    "state-shutoff": "list domains in shutoff state",
    "state-other": "list domains in other states",
    "autostart": "list domains with autostart enabled",
    "no-autostart": "list domains with autostart disabled",
    "with-managed-save": "list domains with managed save state",
    "without-managed-save": "list domains without managed save",
    "id": "list domain IDs only",
    "table": "list table (default)",
    "uuid": "list uuid's only",
    "name": "list domain names only",
    "managed-save": "mark inactive domains with managed save state",
    "title": "show domain title",
}
"""Option of list -> help."""


def _list(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    args.exclusive("json", "table")
    for form in ("name", "uuid", "id"):
        args.exclusive("json", form)
        args.exclusive("table", form)
    domains = _wanted(shell.control.connection().listAllDomains(), args)
    domains.sort(key=lambda domain: (not domain.isActive(), domain.ID(), domain.name().lower()))
    columns = [name for name in _COLUMNS if args.flag(name)]
    if args.flag("json"):
        told = (*_ALWAYS, "title") if args.flag("title") else _ALWAYS
        shell.print_json([_facts(domain, told) for domain in domains])
    elif columns:
        for domain in domains:
            if columns != ["id"] or domain.isActive():
                shell.print_value(" ".join(_COLUMNS[name](domain) for name in columns))
    else:
        _print_table(shell, args, domains)


def _wanted(domains: Iterable["virtbackup.Domain"], args: vsh.Args) -> list["virtbackup.Domain"]:
    """Those of DOMAINS that the options are about."""
    states = [state for name, some in _STATE_FILTERS.items() if args.flag(name) for state in some]
    whether_active = not args.flag("inactive")
    found = [
        domain
        for domain in domains
        if args.flag("all")
        or bool(domain.isActive()) == whether_active
        or (states and whether_active)
    ]
    if states:
        found = [domain for domain in found if _state(domain) in states]
    for yes, no, is_so in _FILTERS:
        if args.flag(yes) != args.flag(no):
            found = [one for one in found if _known(one, is_so) == int(args.flag(yes))]
    return found


def _known(domain: "virtbackup.Domain", fact: Callable[["virtbackup.Domain"], _T]) -> _T | None:
    """A FACT of DOMAIN; None where that is gone by now. Errors: libvirt's others."""
    import libvirt

    try:
        return fact(domain)
    except libvirt.libvirtError as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None


def _title(domain: "virtbackup.Domain") -> str | None:
    from virtbackup.conf import domain_conf

    return _known(domain, lambda one: domain_conf.DomainDef.parse(one.XMLDesc()).title)


def _print_table(
    shell: virsh_connection.Shell, args: vsh.Args, domains: Iterable["virtbackup.Domain"]
) -> None:
    titled, saved = args.flag("title"), args.flag("managed-save")
    header = ("Id", "Name", "State", *(("Title",) if titled else ()))
    rows = []
    for domain in domains:
        state = _state(domain)
        if saved and state == "shut off" and _known(domain, _has_managed_save):
            state = "saved"
        title = (_title(domain) or "",) if titled else ()
        rows.append((_id(domain), domain.name(), state, *title))
    shell.print_table(header, rows)


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
    "title": _title,
}
"""What there is to tell of a domain, and what JSON calls it."""

_ALWAYS = ("id", "name", "uuid", "state")
"""Of these, what is told unasked."""


def _facts(domain: "virtbackup.Domain", keys: Iterable[str] = _ALWAYS) -> dict[str, object]:
    return {key: _FACTS[key](domain) for key in keys}


def _dominfo(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    domain = virsh_connection.domain(shell, args)
    more = _more_facts(domain)
    if args.flag("json"):
        shell.print_json({**_facts(domain), **more})
        return
    facts = {**_facts(domain), "id": _id(domain), **more}
    pairs = [
        (label, form(facts[key])) for key, (label, form) in _INFO.items() if facts[key] is not None
    ]
    pairs += [("Messages", message) for message in more["messages"] or ()]
    virsh_connection.print_pairs(shell, pairs)


_INFO: dict[str, tuple[str, Callable[[Any], str]]] = {
    "id": ("Id", str),
    "name": ("Name", str),
    "uuid": ("UUID", str),
    "os_type": ("OS Type", str),
    "state": ("State", str),
    "cpus": ("CPU(s)", str),
    "cpu_time": ("CPU time", lambda seconds: f"{seconds:.1f}s"),
    "max_memory": ("Max memory", lambda size: f"{size >> 10} KiB"),
    "used_memory": ("Used memory", lambda size: f"{size >> 10} KiB"),
    "persistent": ("Persistent", lambda is_so: "yes" if is_so else "no"),
    "autostart": ("Autostart", lambda is_so: "enable" if is_so else "disable"),
    "autostart_once": ("Autostart Once", lambda is_so: "enable" if is_so else "disable"),
    "managed_save": ("Managed save", lambda is_so: "yes" if is_so else "no"),
    "security_model": ("Security model", str),
    "security_doi": ("Security DOI", str),
    "security_label": ("Security label", str),
}
"""What ``dominfo`` tells, and how."""


def _more_facts(domain: "virtbackup.Domain") -> dict[str, Any]:
    """What only some drivers can tell of a domain, in bytes and seconds; None where it is not
    known."""
    info = _if_told(domain.info)
    _, most, used, cpus, time = info or (0, 0, 0, 0, 0)
    return {
        "os_type": _if_told(domain.OSType),
        "cpus": cpus or None,
        "cpu_time": time / 1e9 if time else None,
        "max_memory": most << 10 or None,
        "used_memory": used << 10 or None,
        **{
            key: None if (is_so := _if_told(ask)) is None else bool(is_so)
            for key, ask in (
                ("persistent", domain.isPersistent),
                ("autostart", domain.autostart),
                ("autostart_once", domain.autostartOnce),
                ("managed_save", domain.hasManagedSaveImage),
            )
        },
        **_security(domain),
        "messages": _if_told(domain.messages),
    }


def _security(domain: "virtbackup.Domain") -> dict[str, str | None]:
    """What keeps the domain from others; None where there is nothing, or it does not run."""
    model, doi = _if_told(domain.connect().getSecurityModel) or ("", "")
    label, is_enforced = "", False
    if model and domain.isActive():
        label, is_enforced = _if_told(domain.securityLabel) or ("", False)
    mode = "enforcing" if is_enforced else "permissive"
    return {
        "security_model": model or None,
        "security_doi": doi if model else None,
        "security_label": f"{label} ({mode})" if label else None,
    }


def _if_told(ask: Callable[[], _T]) -> _T | None:
    """What the driver answers; None where it cannot, or the domain is gone by now."""
    import libvirt

    try:
        return ask()
    except libvirt.libvirtError as failure:
        if failure.get_error_code() not in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_NO_DOMAIN):
            raise
        return None


def _print_one(key: str) -> Callable[[virsh_connection.Shell, vsh.Args], None]:
    """A command that prints one of the facts."""

    def handler(shell: virsh_connection.Shell, args: vsh.Args) -> None:
        domain = virsh_connection.domain(shell, args, name_first=key == "id")
        value = _FACTS[key](domain)
        if args.flag("json"):
            shell.print_json({"domain": domain.name(), key: value})
        else:
            shell.print_value("-" if value is None else str(value))

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


_INACTIVE = 1 << 1
"""VIR_DOMAIN_XML_INACTIVE: by its number, as help would wait for libvirt."""

_XML_FLAGS = (
    ("inactive", _INACTIVE, "show inactive defined XML"),
    ("security-info", 1 << 0, "include security sensitive information in XML dump"),
    ("update-cpu", 1 << 2, "update guest CPU according to host CPU"),
    ("migratable", 1 << 3, "provide XML suitable for migrations"),
)
"""Option of dumpxml, its VIR_DOMAIN_XML_* flag, help."""


def _dumpxml(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    flags = sum(flag for name, flag, _ in _XML_FLAGS if args.flag(name))
    virsh_connection.print_xml(shell, args, virsh_connection.domain(shell, args).XMLDesc(flags))


def _domblklist(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.conf import domain_conf

    domain = virsh_connection.domain(shell, args)
    flags = _INACTIVE if args.flag("inactive") else 0
    disks = domain_conf.DomainDef.parse(domain.XMLDesc(flags)).disks
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
                "inactive", vsh.Kind.BOOL, "get inactive rather than running configuration"
            ),
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
        (
            virsh_connection.DOMAIN,
            *(vsh.Option(name, vsh.Kind.BOOL, text) for name, _, text in _XML_FLAGS),
            *virsh_connection.XPATH,
        ),
        _dumpxml,
    ),
    vsh.Command(
        "list", MONITORING.keyword, "list domains",
        "Returns list of domains.",
        (
            *(vsh.Option(name, vsh.Kind.BOOL, text) for name, text in _LIST_FLAGS.items()),
            virsh_connection.JSON,
        ),
        _list,
    ),
)  # fmt: skip
