# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell's event loop, by which it hears from libvirt of the domains it backs up (virsh.c)."""

import logging
import os
import threading
import time

import libvirt

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_process: int | None = None
"""That which runs the loop: a forked one has no threads of its parent's."""
_TRY_AGAIN = 0.5
"""Seconds, where the loop fails."""


def run() -> None:
    """Run libvirt's own event loop, in a thread, from before the first connection to the end of the
    process: libvirt's daemon lets go of who has a loop, and does not answer its pings by it."""
    global _process
    with _lock:
        if _process == os.getpid():
            return
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run, name="virsh-events", daemon=True).start()
        _process = os.getpid()


def _run() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as failure:
            logger.warning("libvirt's event loop: %s", failure)
            time.sleep(_TRY_AGAIN)
