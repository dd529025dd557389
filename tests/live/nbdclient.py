# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading exports as users do: by nbdcopy, nbdinfo and qemu-img, none of it ours."""

import json
import pathlib
import subprocess
from typing import Any


def uri(socket: pathlib.Path, export: str) -> str:
    return f"nbd+unix:///{export}?socket={socket}"


def read(socket: pathlib.Path, export: str) -> bytes:
    """The whole export, by nbdcopy."""
    return read_uri(uri(socket, export))


def read_uri(address: str) -> bytes:
    done = subprocess.run(["nbdcopy", address, "-"], check=True, capture_output=True, timeout=60)
    return done.stdout


def exports(socket: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What nbdinfo lists, by export name."""
    done = subprocess.run(
        ["nbdinfo", "--json", "--list", f"nbd+unix://?socket={socket}"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return {item["export-name"]: item for item in json.loads(done.stdout)["exports"]}


def changed(socket: pathlib.Path, export: str, bitmap: str) -> list[tuple[int, int]]:
    """(offset, length) of what a bitmap's context tells to have changed, in bytes."""
    done = subprocess.run(
        ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", uri(socket, export)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    told = json.loads(done.stdout)
    return [(extent["offset"], extent["length"]) for extent in told if extent["type"]]
