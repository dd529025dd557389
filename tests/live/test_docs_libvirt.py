# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every command and line that docs/libvirt.md shows, on a libvirtd of the tests' own."""

import pathlib
import subprocess
import sys

import pytest

from tests.live import agents, libvirtd, machines, pages
from tests.live.pages import DOCS
from virtbackup.tools import manifest

pytestmark = [
    pytest.mark.needs("libvirtd", "unshare", "mkfs.ext4", "qemu-system-x86_64", "nbdcopy"),
    pytest.mark.timeout(180),
]

PAGE = "libvirt.md"
DOCUMENT = '<domainbackup><address type="unix" path="{}/nbd.sock"/></domainbackup>'


def command(number: int, host: libvirtd.Host, directory: pathlib.Path) -> str:
    """The NUMBER-th of the page, for this libvirtd and with its paths in DIRECTORY."""
    [(shown, printed)] = pages.session(DOCS / PAGE)[number : number + 1]
    assert printed == ""
    theirs, options = "qemu:///system", host.daemon.uri.partition("?")[2]
    shown = shown.replace(f"'{theirs}?", f"'{theirs}?{options}&")
    shown = shown.replace(f"-c {theirs} ", f"-c '{theirs}?{options}' ")
    assert options in shown
    return shown.replace("/backup/", f"{directory}/backup/")


def run(script: str, directory: pathlib.Path) -> str:
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=directory, capture_output=True, text=True, timeout=120, env=pages.environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_all_are_run() -> None:
    assert len(pages.session(DOCS / PAGE)) == 2
    assert len(pages.blocks(DOCS / PAGE, "python")) == 1


def test_what_wants_an_agent(
    libvirt_host: libvirtd.Host, boot: agents.Boot, tmp_path: pathlib.Path
) -> None:
    """The nightly pull, twice, and the Python."""
    with agents.domain(libvirt_host, "vm", boot):
        for kind in ("full", "incremental"):
            assert f"({kind}, " in run(command(0, libvirt_host, tmp_path), tmp_path)
        assert manifest.read(tmp_path / "backup" / "vm").number == 2
        copy = tmp_path / "copy"
        copy.write_bytes(machines.contents(tmp_path / "backup" / "vm" / "vda.0002.qcow2", "qcow2"))
        assert agents.is_clean(copy)
        [shown] = pages.blocks(DOCS / PAGE, "python")
        program = shown.replace("qemu:///system", libvirt_host.daemon.uri)
        (tmp_path / "one.py").write_text(
            f"xml = {DOCUMENT.format(tmp_path)!r}\n{program}\nprint(dom.backupStop())\n"
        )
        assert run(f"{sys.executable} one.py", tmp_path) == "0\n"


def test_the_comparison(host: libvirtd.Host, tmp_path: pathlib.Path) -> None:
    """Of a guest that does not write."""
    path = libvirtd.image(host.path("compared.qcow2"), 1)
    (tmp_path / "backup.xml").write_text(DOCUMENT.format(tmp_path))
    with host.domain("vm", libvirtd.disk_xml("vda", path)):
        printed = run(command(1, host, tmp_path), tmp_path)
    assert "Both showed the same bytes" in printed
