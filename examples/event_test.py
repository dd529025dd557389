#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Print every event, until interrupted: event_test.py [URI]

The twin of libvirt's event-test.c, which knows the events of domains and jobs, and the end of a
backup besides. By libvirt's URIs it speaks as any program with libvirt-python does, to libvirtd or,
by ?socket=, to virtbackupd; by virtbackup+unix:///path and our other URIs with our own API.
"""

import contextlib
import signal
import sys
import threading
from typing import Any

import libvirt

import virtbackup

EVENTS = (
    "Defined", "Undefined", "Started", "Suspended", "Resumed", "Stopped", "Shutdown",
    "PMSuspended", "Crashed",
)  # fmt: skip


def say(callback: str, domain: Any, *words: object) -> None:
    print(f"{callback} EVENT: Domain {domain.name()}({domain.ID()})", *words, flush=True)


def lifecycle(connection: Any, domain: Any, event: int, detail: int, opaque: object) -> None:
    say("lifecycle", domain, EVENTS[event] if event < len(EVENTS) else event, detail)


def block_job(
    connection: Any, domain: Any, disk: str, type: int, status: int, opaque: object
) -> None:
    say("block job", domain, f"disk {disk} type {type} status {status}")


def job_completed(connection: Any, domain: Any, params: dict[str, Any], opaque: object) -> None:
    say("job completed", domain, params)


def backup_ended(connection: Any, domain: Any, good: bool, reason: str, opaque: object) -> None:
    say("backup ended", domain, "good" if good else f"not good: {reason}")


def by_libvirt(uri: str) -> None:
    """As event-test.c does it."""
    libvirt.virEventRegisterDefaultImpl()
    connection = libvirt.open(uri)
    for id, callback in (
        (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
        (libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, block_job),
        (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, job_completed),
    ):
        connection.domainEventRegisterAny(None, id, callback, None)
    connection.setKeepAlive(5, 3)
    print("waiting for events", flush=True)
    while connection.isAlive():
        libvirt.virEventRunDefaultImpl()


def by_ourselves(uri: str) -> None:
    with virtbackup.open(uri, readonly=True) as connection:
        for id, callback in (
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
            (virtbackup.VIR_DOMAIN_EVENT_ID_BACKUP_ENDED, backup_ended),
        ):
            connection.domainEventRegisterAny(None, id, callback, None)
        print("waiting for events", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wanted = sys.argv[1] if len(sys.argv) > 1 else "qemu:///system"
    ours = wanted.startswith(("virtbackup+", "qmp:", "test:"))
    with contextlib.suppress(KeyboardInterrupt):
        (by_ourselves if ours else by_libvirt)(wanted)
