# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the programs begin: what goes wrong while one is loaded is told in a line, too."""

import importlib
import signal
import sys

_PACKAGES = {
    "libvirt": "python3-libvirt",
    "nbd": "python3-libnbd",
    "lxml": "python3-lxml",
    "xmlschema": "python3-xmlschema",
    "tqdm": "python3-tqdm",
    "xxhash": "python3-xxhash",
}
"""A module of others -> Debian's package that has it."""


def missing(error: BaseException) -> tuple[str, str] | None:
    """What to tell of an ERROR that is a module which is not installed, and what to do about it;
    None for any other."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    package = _PACKAGES.get((name or "").partition(".")[0])
    if package is None:
        return None
    return (
        f"the Python module '{name}' is not installed for {sys.executable}",
        f"Debian has it as {package}; a virtual environment sees that with --system-site-packages",
    )


def virsh_backup() -> int:
    """The shell; its exit status."""
    return _run("virsh_backup")


def virtbackupd() -> int:
    """The daemon; its exit status."""
    return _run("virtbackupd")


def _run(name: str) -> int:
    try:
        main = importlib.import_module(f"virtbackup.tools.{name}").main
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        told = missing(error)
        if told is None:
            raise
        print(f"error: {told[0]}\n{told[1]}", file=sys.stderr)
        return 1
    status: int = main()
    return status
