# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demonstration from outside: it proves, it can say no, it leaves nothing behind."""

import contextlib
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from demo import kernel
from tests import conftest, waiting

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "nbdcopy")

ROOT = pathlib.Path(__file__).parents[2]
LONG = 280.0
"""Seconds for all of it, on a slow machine that does other things too."""
CORRUPTING = """\
#!/bin/sh
{nbdcopy} "$@" || exit
for file; do :; done
printf x | dd of="$file" bs=1 seek=1000000 conv=notrunc status=none
"""

SOON = "import sys; from demo import demo; demo.WARM_UP = 1; sys.exit(demo.main())"
"""Without the wait until the guest has written everywhere, which only what proves something of
every byte needs."""


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    try:
        kernel.fetch()
    except kernel.Unavailable as error:
        pytest.skip(f"no kernel for the guest: {error}")


@pytest.fixture
def scratch() -> Iterator[pathlib.Path]:
    """Where the demonstration may put its files; a short path, for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="vb-", dir="/var/tmp") as name:
        yield pathlib.Path(name)


def start(
    scratch: pathlib.Path, path: str = "", how: tuple[str, str] = ("-m", "demo")
) -> subprocess.Popen[str]:
    env = {**os.environ, "TMPDIR": str(scratch), "PATH": f"{path}{os.environ['PATH']}"}
    return subprocess.Popen(
        [sys.executable, *how], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def processes_of(scratch: pathlib.Path) -> dict[int, bytes]:
    """Process id and command line of all processes that name SCRATCH."""
    found = {}
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = file.read_bytes()
            if str(scratch).encode() in line:
                found[int(file.parent.name)] = line
    return found


def assert_clean(scratch: pathlib.Path) -> None:
    # A command that was just being started ends by itself.
    waiting.until(lambda: processes_of(scratch) == {})
    assert list(scratch.glob("virtbackup-demo-*")) == []


def test_it_proves_every_byte(scratch: pathlib.Path) -> None:
    output, _ = (demo := start(scratch)).communicate(timeout=LONG)
    assert demo.returncode == 0, output
    assert "all right" in output.splitlines()[-1]
    assert_clean(scratch)


def test_one_wrong_byte_is_told(scratch: pathlib.Path, tmp_path: pathlib.Path) -> None:
    real = shutil.which("nbdcopy")
    (tmp_path / "nbdcopy").write_text(CORRUPTING.format(nbdcopy=real))
    (tmp_path / "nbdcopy").chmod(0o755)
    output, _ = (demo := start(scratch, f"{tmp_path}:", ("-c", SOON))).communicate(timeout=LONG)
    assert demo.returncode == 1, output
    assert "WRONG: vda: the backup differs from the reference at byte 1000000" in output
    assert_clean(scratch)


MOMENTS = [("writing after", signal.SIGINT), ("backup-info", signal.SIGTERM)]


@pytest.mark.parametrize(("moment", "number"), MOMENTS if conftest.long() else MOMENTS[:1])
def test_an_interruption_cleans_up(scratch: pathlib.Path, moment: str, number: int) -> None:
    demo = start(scratch, how=("-c", SOON) if moment == "backup-info" else ("-m", "demo"))
    assert demo.stdout is not None
    seen = []
    for line in demo.stdout:
        seen.append(line)
        if moment in line:
            demo.send_signal(number)
            break
    rest, _ = demo.communicate(timeout=waiting.DEADLINE)
    assert demo.returncode == 130, "".join(seen) + rest
    assert_clean(scratch)


def test_a_killed_demonstration_takes_its_guest_along(scratch: pathlib.Path) -> None:
    demo = start(scratch)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "writing after" in line:
            break
    (machine,) = processes_of(scratch)
    watched = os.pidfd_open(machine)
    try:
        demo.kill()
        demo.wait()
        assert select.select([watched], [], [], waiting.DEADLINE)[0], "QEMU goes on alone"
    finally:
        os.close(watched)
