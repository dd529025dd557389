# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that prints what happens: python -m tests.live.event_printer URI [loop|own]

A line of JSON for each event; ``ready`` once events are told; it ends with its input. Without
``loop``, the package's, or ``own``, the program's, libvirt's event loop is not run.
"""

import json
import sys
import threading

import libvirt

from virtbackup import event_loop, hypervisor


def told(event: hypervisor.Event) -> list[object]:
    """An event as JSON has it."""
    ref = event.domain
    match event:
        case hypervisor.LifecycleEvent():
            return ["lifecycle", ref.name, ref.uuid, ref.id, event.event, event.detail]
        case hypervisor.BackupEnded():
            return ["ended", ref.name, ref.uuid, event.good, event.reason]


def run_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def main(uri: str, *options: str) -> None:
    libvirt.registerErrorHandler(lambda *_: None, None)
    if "loop" in options:
        event_loop.start()
        event_loop.start()
    if "own" in options:
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=run_loop, daemon=True).start()
    driver = hypervisor.open_driver(uri, False)
    end = driver.event_register(lambda event: print(json.dumps(told(event)), flush=True))  # type: ignore[attr-defined]
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "deregister\n":
            end()
            end()
            print("silent", flush=True)
    driver.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
