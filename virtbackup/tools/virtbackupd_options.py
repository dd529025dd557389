# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of ``virtbackupd``: its own module, as its manual is made without libvirt."""

import argparse

DEFAULT_LISTEN = "unix:/run/virtbackup/virtbackup-sock"
"""Where it listens, when nobody says anything else."""


def parser(version: str) -> argparse.ArgumentParser:
    """Of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="virtbackupd",
        description="Serve pull backups of QEMU guests over libvirt's wire protocol.",
        epilog="Settings not given here are those of virtbackup.conf.",
    )
    parser.add_argument("--version", action="version", version=f"virtbackupd {version}")
    parser.add_argument(
        "--uri", action="append", metavar="URI",
        help="what to serve: qemu:///system, qmp:///path, ...; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--listen", action="append", metavar="ADDRESS",
        help="unix:PATH, tcp:HOST:PORT (loopback only) or tls:HOST:PORT, beside the sockets that"
        " systemd hands over; may be given several times; where there is neither,"
        f" {DEFAULT_LISTEN}",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="in place of virtbackup.conf")
    parser.add_argument(
        "--check-config", action="store_true",
        help="say whether settings, certificates and addresses are good, and end",
    )  # fmt: skip
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log more; twice, more still"
    )
    return parser
