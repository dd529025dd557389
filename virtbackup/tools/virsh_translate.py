# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command that turns one dialect of ``<domainbackup>`` into the other."""

from typing import TYPE_CHECKING, cast

from virtbackup.tools import virsh_connection, vsh

if TYPE_CHECKING:  # at run time where they are used, or help would wait for them
    from virtbackup.conf import dialects, domain_conf


def _translate(shell: virsh_connection.Shell, args: vsh.Args) -> None:
    from virtbackup.conf import domain_conf, translate

    def domain() -> "domain_conf.DomainDef":
        return domain_conf.DomainDef.parse(virsh_connection.domain(shell, args).XMLDesc())

    document = virsh_connection.read_document(args.text("file"))
    to = cast("dialects.Dialect", args.text("to"))
    shell.print_document(translate.translate(document, to, domain if args.flag("domain") else None))


TRANSLATE = vsh.Command(
    "translate", "backup", "Translate a domainbackup XML document",
    "Print a document in the proposal's dialect or in libvirt's own (6.0 and newer, pull mode).\n"
    "What cannot be said in the other one is an error, never left out. Of disks that are not\n"
    "listed the proposal includes all and libvirt none, so a document that lists disks takes the\n"
    "domain whose disks they are, and so does one that makes all incremental without a list; any\n"
    "other needs no connection.",
    (
        vsh.Option(
            "file", vsh.Kind.DATA, "domainbackup XML; - is standard input",
            required=True, completer=vsh.complete_files,
        ),
        vsh.Option(
            "to", vsh.Kind.STRING, "native (libvirt's own) or proposal",
            required=True, choices=("native", "proposal"),
        ),
        vsh.Option(
            "domain", vsh.Kind.STRING, "domain (name, id or uuid) that has the disks",
            completer=virsh_connection.complete_domains,
        ),
    ),
    _translate,
)  # fmt: skip
