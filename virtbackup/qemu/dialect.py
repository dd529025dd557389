# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands of a backup in the words of one QEMU, from 2.5 on. Pure.

``monitor_json`` has every command that ever was; which of them a QEMU knows, and by which of its
names a thing has to be called, is decided here and nowhere else, by ``capabilities`` alone.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from virtbackup.conf import backup_conf
from virtbackup.qemu import capabilities, monitor_json, naming

if TYPE_CHECKING:
    from virtbackup.conf import virtbackup_conf

X509, PSK = "tls-creds-x509", "tls-creds-psk"
"""Kinds of QEMU's objects."""


def credentials_kind(credentials: "virtbackup_conf.Credentials") -> str:
    """Of which kind the object of CREDENTIALS is."""
    from virtbackup.conf import virtbackup_conf

    return X509 if isinstance(credentials, virtbackup_conf.X509) else PSK


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one QEMU is spoken to."""

    caps: capabilities.Capabilities

    # --- nodes ---

    def blockdev_add(self, command: monitor_json.Command) -> monitor_json.Command:
        """A ``blockdev-add`` as QEMU wants it: with its arguments as one, and an id for what is
        made, where it does."""
        if not self.caps.wraps_options:
            return command
        options = dict(command.arguments)
        if self.caps.drive_ids:
            options["id"] = self.name(options["node-name"])
        return dataclasses.replace(command, arguments={"options": options})

    def blockdev_del(self, node: naming.NodeName) -> monitor_json.Command:
        if "blockdev-del" in self.caps.commands:
            return monitor_json.blockdev_del(node)
        if self.caps.drive_ids:
            return monitor_json.x_blockdev_del(id=self.name(node))
        return monitor_json.x_blockdev_del(node)

    def name(self, node: naming.NodeName) -> str:
        """By what other commands call one of our nodes: its name, or its drive's id."""
        return naming.drive_id(node) if self.caps.drive_ids else node

    # --- jobs ---

    def backup_action(
        self,
        job: naming.JobId,
        device: str,
        target: naming.NodeName,
        filter: naming.NodeName | None,
        breaks_snapshot: bool,
    ) -> dict[str, Any]:
        """The transaction's action that starts JOB on DEVICE."""
        return monitor_json.blockdev_backup(
            job if self.caps.job_ids else None,
            device,
            self.name(target),
            filter,
            "break-snapshot" if breaks_snapshot else None,
            False if self.caps.auto_dismiss else None,
            None if self.caps.job_ids else naming.job_speed(job),
        )

    def query_jobs(self) -> monitor_json.Command:
        if self.caps.query_jobs:
            return monitor_json.query_jobs()
        return monitor_json.query_block_jobs()

    def parse_jobs(self, reply: Any) -> dict[naming.JobId, monitor_json.Job]:
        """The reply to ``query_jobs``. Errors: qmp.ProtocolError."""
        if self.caps.query_jobs:
            return monitor_json.parse_jobs(reply)
        return monitor_json.parse_block_jobs(reply)

    def job_cancel(self, job: monitor_json.Job) -> monitor_json.Command:
        if self.caps.query_jobs:
            return monitor_json.job_cancel(job.id)
        return monitor_json.block_job_cancel(job.device or job.id)

    def job_dismiss(self, job: monitor_json.Job) -> monitor_json.Command:
        """Of a job that has ended and is still there."""
        if self.caps.query_jobs:
            return monitor_json.job_dismiss(job.id)
        return monitor_json.block_job_dismiss(job.device or job.id)

    # --- NBD ---

    def nbd_server_start(
        self,
        address: backup_conf.Address,
        fdname: str | None = None,
        credentials: str | None = None,
    ) -> monitor_json.Command:
        most = 0 if self.caps.max_connections else None
        return monitor_json.nbd_server_start(address, most, fdname, credentials)

    def credentials_add(
        self, id: str, credentials: "virtbackup_conf.Credentials"
    ) -> monitor_json.Command:
        """Make the object by which the NBD server does TLS. QEMU reads the secrets from files."""
        from virtbackup.conf import virtbackup_conf

        wrapped = self.caps.wraps_properties
        match credentials:
            case virtbackup_conf.X509(directory, verify):
                return monitor_json.object_add(
                    X509, id, wrapped, dir=directory, endpoint="server", verify_peer=verify
                )
            case virtbackup_conf.Psk(directory):
                return monitor_json.object_add(PSK, id, wrapped, dir=directory, endpoint="server")

    def export_add(
        self,
        id: naming.ExportId,
        node: naming.NodeName,
        name: str,
        bitmap: monitor_json.BitmapOf | None = None,
    ) -> monitor_json.Command:
        """Show one of our nodes, read-only, under NAME, which is ``export_name``'s; with BITMAP, of
        a node that it is over or, where it is no such node's, by that node's name."""
        if self.caps.block_exports:
            return monitor_json.block_export_add_nbd(id, node, name, bitmap)
        given = name if self.caps.export_names else None
        return monitor_json.nbd_server_add(
            self.name(node), given, None if bitmap is None else bitmap.name
        )

    def export_name(self, node: naming.NodeName, wanted: str) -> str:
        """The name under which a node can be exported that is WANTED to have another."""
        return wanted if self.caps.export_names else self.name(node)
