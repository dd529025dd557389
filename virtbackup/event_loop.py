# SPDX-License-Identifier: LGPL-2.1-or-later
"""The event loop of libvirt's that our programs run, to hear from it of domains (virsh.c)."""

import logging
import os
import threading
import time

import libvirt

from virtbackup import errors

logger = logging.getLogger(__name__)

_starting = threading.Lock()
_process: int | None = None
"""That which runs the loop: a forked one has no threads of its parent's."""
_TRY_AGAIN = 0.5
"""Seconds, where the loop fails."""


def start() -> None:
    """Run libvirt's own event loop, in a thread, from before the first connection to the end of the
    process: libvirt's daemon lets go of who has a loop, and does not answer its pings by it. Twice
    is as once. Errors: libvirt's own."""
    global _process
    with _starting:
        if _process == os.getpid():
            return
        try:
            libvirt.virEventRegisterDefaultImpl()
        except libvirt.libvirtError as failure:
            raise errors.of_libvirt(failure) from failure
        threading.Thread(target=_run, name="virtbackup-event-loop", daemon=True).start()
        _process = os.getpid()


def _run() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as failure:
            logger.warning("libvirt's event loop: %s", failure)
            time.sleep(_TRY_AGAIN)
