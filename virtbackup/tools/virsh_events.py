# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell's event loop, by which it hears from libvirt of the domains it backs up (virsh.c)."""

import threading

import libvirt


class EventLoop:
    """libvirt's own event loop in a thread, until closed. A process registers it once for good."""

    def __init__(self) -> None:
        """To be done before a connection is opened that is to have events."""
        libvirt.virEventRegisterDefaultImpl()
        self._closed = threading.Event()
        self._timer = libvirt.virEventAddTimeout(-1, lambda *_: None, None)
        self._thread = threading.Thread(target=self._run, name="virsh-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Run it no more."""
        self._closed.set()
        libvirt.virEventUpdateTimeout(self._timer, 0)
        self._thread.join()
        libvirt.virEventRemoveTimeout(self._timer)

    def _run(self) -> None:
        while not self._closed.is_set():
            libvirt.virEventRunDefaultImpl()
