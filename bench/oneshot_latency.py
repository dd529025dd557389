# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long one-shot commands of the shell take, start of the interpreter included.

A real QEMU with two 64 MiB disks; every command is a process of its own. ``bare`` is an
interpreter that does nothing. With root and ``--cold`` the page cache is dropped before every
run, QEMU's own files included.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests.live import machines

# As the installed script does; ``-m`` would compile the module anew every time.
_CODE = "import sys; from virtbackup.tools.virsh_backup import main; sys.exit(main())"
_SHELL = (sys.executable, "-c", _CODE)


def main() -> int:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measured = _measure(pathlib.Path(name), options.runs, options.cold)
    for title, seconds in measured.items():
        median, slowest = statistics.median(seconds), max(seconds)
        print(f"{title:<16} median {median * 1000:7.1f} ms   slowest {slowest * 1000:7.1f} ms")
    return 0


def _measure(directory: pathlib.Path, runs: int, cold: bool) -> dict[str, list[float]]:
    xmlfile = directory / "backup.xml"
    xmlfile.write_text(
        f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/></domainbackup>'
    )
    with machines.two_disks(directory) as machine:
        shell = (*_SHELL, "-c", machine.uri)
        commands = {
            "bare": (sys.executable, "-c", ""),
            "help": (*shell, "help"),
            "misuse": (*shell, "nope"),
            "list": (*shell, "list"),
            "Tab": (*_SHELL, "--complete", "virsh-backup back"),
            "Tab, a domain": (*_SHELL, "--complete", f"virsh-backup -c {machine.uri} dominfo "),
            "backup-start": (*shell, "backup-start", "1", str(xmlfile)),
            "backup-info": (*shell, "backup-info", "1"),
            "backup-stop": (*shell, "backup-stop", "1"),
        }
        before: Callable[[], None] = _drop_caches if cold else _nothing
        measured: dict[str, list[float]] = {title: [] for title in commands}
        for _ in range(runs):
            for title, argv in commands.items():
                before()
                measured[title].append(_time(argv, 2 if title == "misuse" else 0))
    return measured


def _time(argv: tuple[str, ...], status: int) -> float:
    start = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != status:
        raise RuntimeError(f"{argv}: exit status {done.returncode}: {done.stderr}")
    return seconds


def _drop_caches() -> None:
    subprocess.run(["sync"], check=True)
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def _nothing() -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
