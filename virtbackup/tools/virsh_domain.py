# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that look at domains (virsh-domain-monitor.c)."""

from collections.abc import Callable

import virtbackup
from virtbackup.tools import virsh_connection, vsh

GROUP = vsh.Group("domain", "Domain Monitoring")

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


def _state(domain: "virtbackup.Domain") -> str:
    number = domain.state()[0]
    return _STATES[number] if number < len(_STATES) else "no state"


def _list(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    args.exclusive("json", "name", "uuid")
    domains = [
        domain
        for domain in shell.control.connection().listAllDomains()
        if args.flag("all") or bool(domain.isActive()) != args.flag("inactive")
    ]
    domains.sort(key=lambda domain: (not domain.isActive(), domain.ID(), domain.name()))
    only: Callable[[virtbackup.Domain], str]
    if args.flag("json"):
        virsh_connection.print_json(shell, [_facts(domain) for domain in domains])
    elif args.flag("name") or args.flag("uuid"):
        only = virtbackup.Domain.name if args.flag("name") else virtbackup.Domain.UUIDString
        for domain in domains:
            shell.print(only(domain))
    else:
        rows = [(_id(domain), domain.name(), _state(domain)) for domain in domains]
        shell.print_table(("Id", "Name", "State"), rows)


def _id(domain: "virtbackup.Domain") -> str:
    return str(domain.ID()) if domain.isActive() else "-"


def _facts(domain: "virtbackup.Domain") -> dict[str, object]:
    return {
        "id": domain.ID() if domain.isActive() else None,
        "name": domain.name(),
        "uuid": domain.UUIDString(),
        "state": _state(domain),
    }


def _dominfo(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    domain = virsh_connection.domain(shell, args)
    if args.flag("json"):
        virsh_connection.print_json(shell, _facts(domain))
        return
    pairs = [
        ("Id", _id(domain)),
        ("Name", domain.name()),
        ("UUID", domain.UUIDString()),
        ("State", _state(domain)),
    ]
    virsh_connection.print_pairs(shell, pairs)


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
        virsh_connection.print_json(shell, facts)
    elif args.flag("details"):
        rows = [(disk.type, disk.device, disk.target, disk.source or "-") for disk in disks]
        shell.print_table(("Type", "Device", "Target", "Source"), rows)
    else:
        shell.print_table(
            ("Target", "Source"), [(disk.target, disk.source or "-") for disk in disks]
        )


COMMANDS = (
    vsh.Command(
        "domblklist", GROUP.keyword, "list all domain blocks",
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
        "dominfo", GROUP.keyword, "domain information",
        "Returns basic information about the domain.",
        (virsh_connection.DOMAIN, virsh_connection.JSON),
        _dominfo,
    ),
    vsh.Command(
        "list", GROUP.keyword, "list domains",
        "Returns list of domains.",
        (
            vsh.Option("inactive", vsh.Kind.BOOL, "list inactive domains"),
            vsh.Option("all", vsh.Kind.BOOL, "list inactive & active domains"),
            vsh.Option("uuid", vsh.Kind.BOOL, "list uuid's only"),
            vsh.Option("name", vsh.Kind.BOOL, "list domain names only"),
            virsh_connection.JSON,
        ),
        _list,
    ),
)  # fmt: skip
