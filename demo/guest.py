# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running guest: one QEMU process, its two disks, what its writer says on the console.

Software emulation only: it boots on every machine, also where /dev/kvm is there but real kernels
do not come up under it.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from demo import initramfs, kernel, records

NAME = "guest"
_REPORT = re.compile(r"wrote (\d+) slowest (\d+)")
_LOOK_AGAIN = 0.02
"""Seconds."""


class GuestError(Exception):
    """The guest did not do what it was meant to."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What the writer said last."""

    number: int
    """The last write that is done on all disks."""
    slowest: float
    """Seconds: the longest a single write took since ``Guest.forget_slowest``."""
    count: int
    """How many times it has said so."""


class Monitor:
    """A plain QMP client that knows nothing of the package it helps to judge."""

    def __init__(self, path: pathlib.Path, deadline: float = 60.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(deadline)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        """Run one QMP command. Raises GuestError when QEMU refuses it."""
        request = {"execute": name, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode())
        while line := self._file.readline():
            message = json.loads(line)
            if "error" in message:
                raise GuestError(f"{name}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
        raise GuestError(f"{name}: QEMU is gone")

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Guest:
    """The guest in DIRECTORY, from power on until ``close``."""

    def __init__(self, directory: pathlib.Path, within: Sequence[str] = ()) -> None:
        self.directory = directory
        self.socket = directory / "qmp.sock"
        self._lock = threading.Lock()
        self._report = Report(0, 0.0, 0)
        self._console: list[str] = []
        self._process = subprocess.Popen(
            _argv(directory, within), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read_console, daemon=True)
        self._reader.start()
        self._monitor: Monitor | None = None

    @property
    def uri(self) -> str:
        """The address of the monitor that is free for the backup."""
        return f"qmp://{self.socket}"

    @property
    def report(self) -> Report:
        """What the writer said last. Raises GuestError when it has ended."""
        with self._lock:
            self._check()
            return self._report

    def wait_for_number(self, number: int, deadline: float = 240.0) -> Report:
        """Wait until write NUMBER is done on all disks."""
        return self._wait(lambda report: report.number >= number, deadline)

    def wait_for_report(self, deadline: float = 60.0) -> Report:
        """Wait for a report that was made after this call: two, as the first may be on its way."""
        count = self.report.count
        return self._wait(lambda report: report.count >= count + 2, deadline)

    def forget_slowest(self) -> None:
        """Measure the slowest write anew."""
        with self._lock:
            self._report = dataclasses.replace(self._report, slowest=0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the guest's processor and let its writes settle; go on afterwards."""
        self.monitor.command("stop")
        try:
            yield
        finally:
            self.monitor.command("cont")

    @property
    def monitor(self) -> Monitor:
        """Our own monitor, not the one of ``uri``."""
        if self._monitor is None:
            self._monitor = Monitor(self.directory / "own.sock")
        return self._monitor

    def close(self) -> None:
        """Switch the guest off."""
        if self._monitor is not None:
            self._monitor.close()
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, wanted: Callable[[Report], bool], deadline: float) -> Report:
        end = time.monotonic() + deadline
        # No condition is waited for: Python's loses its lock to a KeyboardInterrupt now and then.
        while not wanted(report := self._report):
            self._check()
            if time.monotonic() >= end:
                raise GuestError(f"the guest was too slow: {self._last_words()}")
            time.sleep(_LOOK_AGAIN)
        return report

    def _check(self) -> None:
        if not self._reader.is_alive():
            raise GuestError(f"the guest has ended: {self._last_words()}")

    def _last_words(self) -> str:
        return " | ".join(self._console[-5:]) or "it never said a word"

    def _read_console(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._lock:
                if found := _REPORT.search(line):
                    slowest = max(int(found[2]) / 1e6, self._report.slowest)
                    self._report = Report(int(found[1]), slowest, self._report.count + 1)
                else:
                    self._console.append(line.strip())


def start(directory: pathlib.Path, within: Sequence[str] = ()) -> Guest:
    """Make kernel, root file system and disks in DIRECTORY and switch the guest on.

    WITHIN is what QEMU is to be started by, as in ("chroot", ROOT): all it reads is in DIRECTORY.
    Raises kernel.Unavailable when there is no kernel to boot.
    """
    linux = kernel.fetch()
    shutil.copyfile(linux.image, directory / "vmlinuz")
    (directory / "initrd").write_bytes(initramfs.build(linux))
    make_disks(directory)
    return Guest(directory, within)


def make_disks(directory: pathlib.Path) -> None:
    """vda is a qcow2 overlay on a full image, sda is raw; both hold record 0 everywhere."""
    vda, sda = records.DISKS
    _fill(directory / "base.raw", vda)
    _qemu_img("convert", "-O", "qcow2", "base.raw", "base.qcow2", cwd=directory)
    (directory / "base.raw").unlink()
    _qemu_img(
        "create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "vda.qcow2", cwd=directory
    )
    _fill(directory / "sda.raw", sda)


def image(directory: pathlib.Path, disk: records.Disk) -> pathlib.Path:
    """The image of DISK that the guest writes to; the suffix is its format."""
    return directory / ("vda.qcow2" if disk.number == 0 else "sda.raw")


def _fill(path: pathlib.Path, disk: records.Disk) -> None:
    with path.open("wb") as file:
        for slot in range(disk.slots):
            file.write(disk.content(0, slot))
        file.truncate(disk.size)


def _qemu_img(command: str, *arguments: str, cwd: pathlib.Path) -> None:
    subprocess.run(["qemu-img", command, *arguments], cwd=cwd, check=True, capture_output=True)


def _argv(directory: pathlib.Path, within: Sequence[str]) -> list[str]:
    return [
        "setpriv", "--pdeathsig", "KILL", "--",  # never outlives whoever started it
        *within,
        "qemu-system-x86_64", "-name", NAME, "-machine", "q35,accel=tcg", "-m", "256",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-kernel", f"{directory}/vmlinuz", "-initrd", f"{directory}/initrd",
        "-append", kernel.COMMAND_LINE,
        "-serial", "stdio",
        "-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off",
        "-qmp", f"unix:{directory}/own.sock,server=on,wait=off",
        "-blockdev", f"qcow2,node-name=disk0,file.driver=file,file.filename={directory}/vda.qcow2",
        "-device", "virtio-blk-pci,drive=disk0,id=vda",
        "-blockdev", f"raw,node-name=disk1,file.driver=file,file.filename={directory}/sda.raw",
        "-device", "virtio-scsi-pci,id=scsi0",
        "-device", "scsi-hd,drive=disk1,id=sda",
    ]  # fmt: skip
