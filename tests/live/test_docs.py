# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the pages show is what happens: their sessions on a real QEMU; and the site is whole.

``SESSIONS`` are the pages whose every command is run, and ``ELSEWHERE`` says where those of the
others are; a page that is in neither fails. README's own are run by test_readme.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.live import certificates, machines, pages, places
from tests.live.pages import DOCS, ROOT, VM

SESSIONS = (
    "branches.md", "daemon.md", "devices.md", "dialects.md", "guide.md", "tls.md", "xml.md",
)  # fmt: skip
ELSEWHERE = {
    "install.md": "test_deb.py",
    "libvirt.md": "test_docs_libvirt.py",
    "restore.md": "test_restore_doc.py",
}
"""Those that want a machine to install on, a libvirtd with a domain, or a directory of backups."""


def run(script: str, directory: pathlib.Path) -> str:
    done = subprocess.run(
        ["sh", "-c", script.replace(VM, str(directory))],
        capture_output=True, text=True, timeout=120, env=pages.environment(), check=True,
    )  # fmt: skip
    return done.stdout.replace(str(directory), VM)


@pytest.mark.needs("qemu-img", "nbdcopy")
@pytest.mark.parametrize("page", ["guide.md", "xml.md"])
def test_the_session(page: str, tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path, "-name", "vm"):
        shown = pages.session(DOCS / page)
        printed = run("\n".join(f"{command} 2>&1; echo END" for command, _ in shown), tmp_path)
        outputs = printed.split("END\n")[:-1]
        assert [pages.squeezed(text) for text in outputs] == [
            pages.squeezed(text) for _, text in shown
        ]


def test_the_session_about_branches(tmp_path: pathlib.Path) -> None:
    """What it prints is not shown: figures and times."""
    with machines.two_disks(tmp_path, "-name", "vm"):
        uri = f"export VIRTBACKUP_DEFAULT_URI=qmp://{VM}/qmp.sock\n"
        commands = [command for command, _ in pages.session(DOCS / "branches.md")]
        commands = [command.replace("/backup/vm", f"{VM}/backup") for command in commands]
        printed = run("set -e\n" + uri + "\n".join(commands), tmp_path)
        assert "incremental" in printed
        assert re.search(r"nightly +vda .* sound$", printed, re.MULTILINE)


@pytest.mark.may_skip
@pytest.mark.needs("losetup", "qemu-img", "qemu-nbd")
def test_the_session_about_devices(tmp_path: pathlib.Path) -> None:
    shown = pages.session(DOCS / "devices.md")
    with (
        machines.two_disks(tmp_path, "-name", "vm"),
        places.block_device(tmp_path / "device", 65 << 20) as device,
    ):
        script = f"export VIRTBACKUP_DEFAULT_URI=qmp://{VM}/qmp.sock; set -e\n" + "\n".join(
            f"{command} 2>&1; echo END" for command, _ in shown
        )
        script = script.replace("/dev/vg/backup-vda", str(device))
        printed = run(script.replace("/backup", f"{VM}/backup"), tmp_path)
    assert printed.split("END\n")[:-1] == [text for _, text in shown]
    assert (tmp_path / "backup" / "restored.qcow2").exists()


@pytest.fixture
def tls(tmp_path: pathlib.Path) -> str:
    """The page's own virtbackup.conf, for certificates and keys that are here."""
    [settings] = pages.blocks(DOCS / "tls.md", "ini")
    pki, client = tmp_path / "pki", tmp_path / "root" / "pki"
    certificates.authority(pki)
    certificates.server(pki)
    certificates.keys(tmp_path / "keys")
    client.mkdir(parents=True)
    certificates.client(pki)
    for file in ("client-cert.pem", "client-key.pem", "ca-cert.pem"):
        shutil.copy(pki / file, client)
    shutil.copy(tmp_path / "keys" / "keys.psk", tmp_path / "root")
    for theirs, ours in (
        ("/etc/pki/qemu", pki), ("/root/", tmp_path / "root/"), ("/etc/virtbackup/", tmp_path)
    ):  # fmt: skip
        settings = settings.replace(theirs, f"{ours}{'/' if theirs.endswith('/') else ''}")
    return settings


def run_tls(number: int, settings: str, directory: pathlib.Path) -> None:
    """A session of the page about TLS: all of the disk has to arrive."""
    block = pages.blocks(DOCS / "tls.md", "console")[number]
    commands = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    (directory / "virtbackup.conf").write_text(settings)
    with machines.two_disks(directory, "-name", "vm") as one:
        one.io("vda", "write -P 7 1M 5M")
        port = str(places.free_port())
        script = "\n".join(commands).replace("10809", port).replace("/run/", f"{VM}/")
        script = script.replace("backup.example", "localhost").replace("/root/", f"{VM}/root/")
        uri, conf = f"qmp://{VM}/qmp.sock", f"{VM}/virtbackup.conf"
        variables = f"VIRTBACKUP_DEFAULT_URI={uri} VIRTBACKUP_CONF={conf}"
        run(f"set -e; cd {VM}; export {variables}\n{script}", directory)
        one.io("vda", "flush")
        assert (directory / "vda.raw").read_bytes() == machines.contents(
            directory / "a.qcow2", "qcow2"
        )


@pytest.mark.needs("nbdcopy", "openssl", "qemu-img")
def test_the_session_with_certificates(tls: str, tmp_path: pathlib.Path) -> None:
    run_tls(0, tls, tmp_path)


@pytest.mark.needs("nbdcopy", "openssl", "qemu-img")
@pytest.mark.may_skip
@pytest.mark.skipif(machines.version() < (7, 0, 0), reason="no TLS on a unix socket")
def test_the_session_with_keys(tls: str, tmp_path: pathlib.Path) -> None:
    """With the settings that are comments in the page."""
    found = re.findall(r"^#(backup_tls_psk_.*\n)", tls, re.MULTILINE)
    assert len(found) == 2
    run_tls(1, "".join(found), tmp_path)
    assert len(pages.blocks(DOCS / "tls.md", "console")) == 2


DIALECTS = (
    """<domainbackup><address type="unix" path="/run/x.sock"/></domainbackup>""",
    """<domainbackup mode="pull"><server transport="unix" socket="/run/x.sock"/>
       <disks><disk name="vda" backup="yes" type="file"/></disks></domainbackup>""",
)


def test_the_session_about_dialects(tmp_path: pathlib.Path) -> None:
    """The first document lists no disks, the second does; the page says so of each."""
    shown = pages.session(DOCS / "dialects.md")
    printed = []
    with machines.two_disks(tmp_path, "-name", "vm"):
        uri = f"export VIRTBACKUP_DEFAULT_URI=qmp://{VM}/qmp.sock; cd {VM}\n"
        for (command, _), document in zip(shown, DIALECTS, strict=True):
            (tmp_path / "backup.xml").write_text(document)
            printed.append(run(uri + command, tmp_path))
    assert '<server transport="unix" socket="/run/x.sock"/>' in printed[0]
    assert re.search(r'<disk name="sdb" present="no"', printed[1])


@pytest.mark.needs("virsh")
def test_the_session_about_the_daemon(tmp_path: pathlib.Path) -> None:
    """On a QEMU by its socket, in place of libvirt's domains."""
    (serve, _), *commands = pages.session(DOCS / "daemon.md")
    here = {
        "qemu:///system --listen": f"qmp://{VM}/qmp.sock --listen",
        "/run/virtbackup/virtbackup-sock": f"{VM}/daemon.sock",
        "/backup/vm": f"{VM}/backup",
    }

    def moved(command: str) -> str:
        for theirs, ours in here.items():
            command = command.replace(theirs, ours)
        return command.replace(VM, str(tmp_path))

    with machines.two_disks(tmp_path, "-name", "vm"):
        words = shlex.split(moved(serve))
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, env=pages.environment(), text=True
        ) as daemon:
            try:
                assert daemon.stdout is not None
                assert daemon.stdout.readline().startswith("virtbackupd: listening on unix:")
                printed = run("\n".join(moved(command) for command, _ in commands), tmp_path)
            finally:
                daemon.terminate()
        assert daemon.returncode == 0
    assert re.search(r"^ \d+ +vm +running$", printed, re.MULTILINE)
    assert (tmp_path / "backup" / "manifest.json").exists()


def test_the_commands_about_the_test_driver(tmp_path: pathlib.Path) -> None:
    """Those that can be typed as they are: not FILE, A or B."""
    page = (DOCS / "test-driver.md").read_text()
    found = re.findall(r"^    (virsh-backup -c test:.*)$", page, re.MULTILINE)
    assert len(found) == 2
    printed = run(
        "\n".join(f"{command} 2>&1" for command in found).replace("/tmp/b", f"{VM}/b"), tmp_path
    )
    assert re.search(r"^ vda +/images/vda.qcow2$", printed, re.MULTILINE)
    assert '"transaction"' in printed
    assert (tmp_path / "backup" / "manifest.json").exists()


@pytest.mark.needs("qemu-img")
def test_what_the_guides_timer_starts(tmp_path: pathlib.Path) -> None:
    service, timer = pages.blocks(DOCS / "guide.md", "ini")
    assert "[Timer]\nOnCalendar=" in timer
    [command] = re.findall(r"^ExecStart=/usr/bin/(.*)$", service, re.MULTILINE)
    [line] = re.findall(r"`0 2 \* \* \* root (.*?)`", (DOCS / "guide.md").read_text())
    assert shlex.split(line) == shlex.split(command.replace("%i", "vm"))
    [by_socket] = re.findall(r"`(-c qmp://.*?)` behind `-q`", (DOCS / "guide.md").read_text())
    with machines.two_disks(tmp_path, "-name", "vm"):
        ours = command.replace("%i", "vm").replace("/backup/", f"{VM}/backup/")
        ours = ours.replace(" -q ", f" -q {by_socket} ")
        assert run(f"mkdir {VM}/backup; {ours} && ls {VM}/backup/vm", tmp_path).split() == [
            "manifest.0001.json", "manifest.json", "sdb.0001.qcow2", "vda.0001.qcow2"
        ]  # fmt: skip


@pytest.mark.needs("systemd-analyze")
@pytest.mark.may_skip
def test_systemd_takes_the_units(tmp_path: pathlib.Path) -> None:
    """The guide's, and those that are installed."""
    service, timer = pages.blocks(DOCS / "guide.md", "ini")
    units = {"virtbackup-nightly@.service": service, "virtbackup-nightly@.timer": timer}
    for name in ("virtbackupd.service", "virtbackupd.socket"):
        units[name] = (ROOT / "systemd" / name).read_text()
    for name, unit in units.items():
        # Neither the programs nor their manual pages are installed here.
        here = re.sub(r"/usr/bin/(virsh-backup|virtbackupd)", sys.executable, unit)
        (tmp_path / name).write_text(re.sub(r"^Documentation=.*\n", "", here, flags=re.MULTILINE))
    names = [name.replace("@.", "@vm.") for name in units]
    done = subprocess.run(
        ["systemd-analyze", "verify", *names],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "virtbackup" in line]
    assert (done.returncode, said) == (0, [])


def test_every_page_is_run_or_says_where() -> None:
    pages = {page.name for page in DOCS.glob("*.md") if "```console" in page.read_text()}
    assert pages == {*SESSIONS, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert f'"{page}"' in (pathlib.Path(__file__).parent / test).read_text()


@pytest.mark.needs("mkdocs")
def test_the_site_is_built_without_a_warning(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        ["mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": os.fspath(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "guide.html" in home
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=.https?://", home)
