# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian package, as ./dev deb builds it, the programs in it, and what dpkg does with it.

It is installed over a copy of this machine that lives for one test: a layer in memory on top of all
files, which nobody outside sees.
"""

import gzip
import os
import pathlib
import re
import subprocess
import tarfile
from collections.abc import Iterator

import pytest

from manual import __main__ as manual
from tests.live import pages
from tests.test_packaging import sources

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.needs("dpkg-buildpackage", "dh", "pybuild", "lintian")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The package; lintian has found no error and given no warning."""
    directory = tmp_path_factory.mktemp("deb")
    done = subprocess.run(
        [ROOT / "dev", "deb", directory], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    [found] = directory.glob("*.deb")
    assert done.stdout == f"{found}\n"
    return found


@pytest.fixture(scope="module")
def root(package: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What would be in /, unpacked: nothing of it is installed here."""
    directory = tmp_path_factory.mktemp("root")
    subprocess.run(["dpkg-deb", "-x", package, directory], check=True)
    return directory


def test_what_it_depends_on(package: pathlib.Path) -> None:
    def field(name: str) -> set[str]:
        shown = subprocess.run(
            ["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True
        )
        return {part.split(" ")[0] for part in shown.stdout.strip().split(", ")}

    names = ("libnbd", "libvirt", "lxml", "tqdm", "xmlschema", "xxhash")
    assert {f"python3-{name}" for name in names} | {"qemu-utils"} <= field("Depends")
    assert field("Version") == {"0.1.0"}


def test_what_is_in_it(root: pathlib.Path) -> None:
    share = root / "usr" / "share"
    for name, text in manual.files().items():
        if name.startswith("man/"):
            page = gzip.decompress((share / f"{name}.gz").read_bytes()).decode()
            undated = [
                re.sub(r"^(\.TH \S+ \d) \S+", r"\1", one, flags=re.M) for one in (page, text)
            ]
            assert undated[0] == undated[1]
        else:
            debians = name.replace("zsh/site-functions", "zsh/vendor-completions")
            assert (share / debians).read_text() == text
    [units] = list(root.rglob("systemd/system"))
    for unit in ("virtbackupd.service", "virtbackupd.socket"):
        assert (units / unit).read_text() == (ROOT / "systemd" / unit).read_text()
    started = re.search(r"^ExecStart=(\S+)", (units / "virtbackupd.service").read_text(), re.M)
    assert started
    assert os.access(root / started[1].lstrip("/"), os.X_OK)
    settings = root / "etc" / "virtbackup" / "virtbackup.conf"
    assert settings.read_text() == (ROOT / "systemd" / "virtbackup.conf").read_text()


def test_the_program_in_it(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """By Debian's Python and Debian's packages alone."""
    packages = root / "usr" / "lib" / "python3" / "dist-packages"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(packages), "LC_ALL": "C.UTF-8"}

    def run(program: str, *words: str) -> str:
        done = subprocess.run(
            [root / "usr" / "bin" / program, *words],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert run("virsh-backup", "--version") == "0.1.0\n"
    assert "vda" in run("virsh-backup", "-c", "test:///default", "domblklist", "vm")
    uri = ("--uri", "test:///default")
    assert run("virtbackupd", *uri, "--check-config") == "configuration is good\n"


def test_the_source_package_has_everything(tmp_path: pathlib.Path) -> None:
    """What the tests read included, and nothing of what was built in the tree before."""
    tree = tmp_path / "virtbackup"
    kept = {name for name in sources(ROOT) if name not in (".git", ".coverage")}
    for name in {*kept, "virtbackup.egg-info/PKG-INFO", "build/share/man/man1/virsh-backup.1"}:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes() if name in kept else b"")
    (tree / "dev").chmod(0o755)
    subprocess.run(
        ["dpkg-source", "-z1", "-b", tree], cwd=tmp_path, check=True, capture_output=True
    )
    [archive] = tmp_path.glob("*.tar.xz")
    with tarfile.open(archive) as unpacked:
        assert {m.name.partition("/")[2] for m in unpacked if m.isfile()} == kept


LAYER = """
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir up work root tree-up tree-work
mount -t overlay -o lowerdir=/,upperdir=up,workdir=work overlay root
for path in dev proc sys; do mount --rbind "/$path" "root/$path"; done
for path in run tmp; do mount -t tmpfs tmpfs "root/$path"; done
mkdir root/run/layer root/run/package root/run/tree
mount --bind . root/run/layer
mount --bind "$2" root/run/package
mount -t overlay -o "lowerdir=$3,upperdir=tree-up,workdir=tree-work" overlay root/run/tree
policy=/usr/sbin/policy-rc.d
! [ -e "$policy" ] || mount --bind /dev/null "root$policy"
exec chroot root sh -c 'echo ready; exec cat'
"""
"""A shell's way into the layer, with a process that stays there; ready once it is there."""

THERE = "test -d /run/layer/up || exit 99\n"
"""Before everything that is run in the layer: never on this machine itself."""

INSTALL = "dpkg --no-triggers -i /run/package/*.deb"
"""Those of other packages, for whom this is one more manual page, take most of the time."""


class Machine:
    """A copy of this machine, with the package's file in /run/package, this tree in /run/tree, and
    systemd not running."""

    def __init__(self, keeper: int) -> None:
        """KEEPER: the pid of a process on it."""
        self._keeper = keeper

    def run(self, script: str) -> str:
        """What SCRIPT prints there, errors included. Each of its commands has to succeed."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._keeper), "--mount", "--root", "--wd",
             "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8",
             "DEBIAN_FRONTEND=noninteractive", "sh", "-ec", THERE + script],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    def install(self) -> None:
        self.run(INSTALL)

    def compile_nothing(self) -> None:
        """From here on. It takes most of the time to install a package with Python in it."""
        self.run("ln -sf /bin/true /usr/bin/py3compile")

    def changed(self) -> set[str]:
        """The files that were made, changed or removed there, and the directories made (NAME/)."""
        layer = pathlib.Path(f"/proc/{self._keeper}/root/run/layer/up")
        found = set()
        for parent, directories, files in os.walk(layer):
            here = pathlib.Path("/", os.path.relpath(parent, layer))
            found |= {str(here / name) for name in files}
            found |= {f"{here / name}/" for name in directories if not (here / name).is_dir()}
        return found


@pytest.fixture
def machine(package: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Machine]:
    if os.geteuid() != 0:
        pytest.skip("only root installs a package")
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", LAYER, "sh"]
    with subprocess.Popen(
        [*argv, tmp_path, package.parent, ROOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as keeper:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"ready\n"
        yield Machine(keeper.pid)


installs = pytest.mark.needs("unshare", "nsenter", "dpkg")


@installs
@pytest.mark.needs("man", "zsh", "fish")
def test_it_is_installed(machine: Machine) -> None:
    machine.run(INSTALL.replace("--no-triggers ", ""))
    assert machine.run("dpkg --audit; dpkg --verify virtbackup") == ""
    assert machine.run("dpkg-query -W -f '${Status}' virtbackup") == "install ok installed"
    files = machine.run("dpkg -L virtbackup").splitlines()
    machine.run("".join(f"test -e '{name}'\n" for name in files))
    assert not [name for name in files if name.startswith("/usr/local")]
    modes = machine.run("dpkg -L virtbackup | xargs -d '\n' stat -L -c '%U:%G %a'").splitlines()
    assert set(modes) == {"root:root 644", "root:root 755"}

    assert machine.run("virsh-backup --version") == "0.1.0\n"
    assert machine.run("virtbackupd --version") == "virtbackupd 0.1.0\n"
    assert "backup-pull" in machine.run("virsh-backup help")
    assert machine.run("virsh-backup -c test:///default list --name").split() == ["vm"]
    for page in ("virsh-backup", "virtbackupd", "virtbackup.conf"):
        assert machine.run(f"man -w {page}").startswith("/usr/share/man/")
        assert re.search(rf"\n +{page} - ", machine.run(f"man {page}"))
    assert machine.run("fish -c 'complete -C \"virsh-backup backup-pu\"'").startswith(
        "backup-pull\t"
    )
    compinit = (
        "autoload -U compinit; compinit -u -D; print $_comps[virsh-backup] $_comps[virtbackupd]"
    )
    assert machine.run(f"zsh -f -c '{compinit}'") == "_virsh-backup _virtbackupd\n"


GUEST = """
cd /run
qemu-img create -q -f qcow2 a.qcow2 16M
qemu-io -c 'write -q -P 7 1M 2M' a.qcow2
qemu-system-x86_64 -M pc -accel tcg -nodefaults -display none -S -name vm \\
    -qmp unix:/run/qmp.sock,server=on,wait=off -drive if=none,id=a,file=a.qcow2 \\
    -device virtio-blk-pci,drive=a,id=vda &
guest=$!
virtbackupd --uri qmp:///run/qmp.sock &
daemon=$!
trap 'kill $guest $daemon; wait' EXIT
timeout 20 sh -c 'until [ -S qmp.sock ] && [ -S virtbackup/virtbackup-sock ]; do sleep 0.05; done'
"""


@installs
@pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-io")
def test_what_is_installed_backs_up(machine: Machine) -> None:
    """A guest by its socket, and by the daemon."""
    machine.compile_nothing()
    machine.install()
    for uri in ("qmp:///run/qmp.sock", "virtbackup+unix:///run/virtbackup/virtbackup-sock"):
        machine.run(
            f"""{GUEST}
            virsh-backup -c {uri} -q backup-pull vm /run/backup
            virsh-backup -q backup-verify /run/backup
            virsh-backup -q backup-restore /run/backup --disk vda /run/restored.qcow2
            qemu-img compare -q -U /run/restored.qcow2 /run/a.qcow2
            for picture in svg png; do
                virsh-backup -q backup-map /run/backup --output /run/map.$picture
                test -s /run/map.$picture
            done
            rm -r /run/backup /run/restored.qcow2 /run/map.* /run/virtbackup"""
        )


BOOKS = ("/var/lib/dpkg/", "/var/log/", "/var/cache/man/", "/var/cache/debconf/")
"""Where Debian writes down what it does, whatever the package."""


@installs
def test_nothing_of_it_is_left(machine: Machine) -> None:
    machine.install()
    machine.run("virsh-backup -c test:///default list; virsh-backup backup-cleanup --help")
    machine.run("mkdir -p /run/virtbackup; touch /run/virtbackup/qemu-1-1.capabilities")
    machine.run("dpkg --remove virtbackup")
    left = machine.changed()
    assert "/etc/virtbackup/virtbackup.conf" in left
    assert not [name for name in left if name.startswith("/usr")]
    machine.run("dpkg --purge virtbackup")
    assert [name for name in machine.changed() if not name.startswith(BOOKS)] == []
    assert machine.run("ls /run") == "layer\npackage\ntree\n"
    assert "virtbackup" not in machine.run("cat /etc/passwd /etc/group; ls /var/lib/dpkg/info")


@installs
def test_it_is_installed_over_itself(machine: Machine) -> None:
    """And removed and installed again. What an administrator wrote stays till the purge."""
    settings = "/etc/virtbackup/virtbackup.conf"
    machine.compile_nothing()
    machine.install()
    machine.run(f"echo 'insecure = yes' >>{settings}")
    machine.install()
    assert machine.run(f"tail -n 1 {settings}") == "insecure = yes\n"
    machine.run("dpkg --no-triggers --remove virtbackup")
    machine.install()
    assert machine.run(f"tail -n 1 {settings}; virsh-backup --version") == "insecure = yes\n0.1.0\n"
    machine.run("touch /etc/virtbackup/mine; dpkg --no-triggers --purge virtbackup")
    assert machine.run("ls /etc/virtbackup") == "mine\n"


SYSTEMCTL = r"""#!/bin/sh
for word; do
    case $word in
    is-enabled) cat /run/enabled; exit ;;
    is-active) exec test -e /run/active ;;
    start | stop | restart | try-restart) echo "$*" >>/run/asked ;;
    esac
done
"""
"""For a machine where systemd would run: what it answers is in /run, and what it is asked to do."""


@installs
def test_the_daemon(machine: Machine) -> None:
    """It is not started by itself, runs on after an upgrade, and is stopped when it is removed."""
    units = {"virtbackupd.service", "virtbackupd.socket"}
    machine.compile_nothing()
    machine.run(
        f"cat >/usr/bin/systemctl <<'END'\n{SYSTEMCTL}END\n"
        "chmod 755 /usr/bin/systemctl; mkdir -p /run/systemd/system"
    )

    def asked(script: str, enabled: str, *, active: bool) -> set[str]:
        """What systemd is asked to do by SCRIPT, and with which units."""
        answers = f"echo {enabled} >/run/enabled; {'touch' if active else 'rm -f'} /run/active"
        machine.run(f"rm -f /run/asked; {answers}; {script}; touch /run/asked")
        lines = machine.run("cat /run/asked").splitlines()
        return {word for line in lines for word in line.split() if not word.startswith("--")}

    assert asked(INSTALL, "disabled", active=False) == set()
    assert asked(INSTALL, "disabled", active=False) == set()
    assert asked(INSTALL, "disabled", active=True) == {"restart", *units}
    assert asked(INSTALL, "enabled", active=True) == {"restart", *units}
    assert asked("dpkg --no-triggers --remove virtbackup", "enabled", active=True) == {
        "stop",
        *units,
    }


@installs
def test_on_a_debian_that_is_too_old(machine: Machine) -> None:
    """Bullseye's Python and packages: dpkg leaves it unconfigured and says why."""
    machine.run(
        "sed -i '/^Package: python3$/,/^$/s/^Version: .*/Version: 3.9.2-3/' /var/lib/dpkg/status"
    )
    said = machine.run(f"! {INSTALL}")
    assert "virtbackup depends on python3 (>= 3.10)" in said


@installs
@pytest.mark.needs("apt", "man")
def test_what_the_page_about_it_shows(machine: Machine) -> None:
    """With the packages that are there: apt and pip know of no other."""
    machine.compile_nothing()
    (build, _), *commands = pages.session(pages.DOCS / "install.md")
    assert build == "./dev deb"  # which made the one that is tested
    machine.run("rm -rf /run/tree/dist; mkdir /run/tree/dist; cp /run/package/*.deb /run/tree/dist")
    machine.run("rm -rf /etc/apt/sources.list*")
    machine.run("rm -f /var/lib/man-db/auto-update")  # as with INSTALL
    offline = "export PIP_NO_INDEX=1 PIP_NO_DEPS=1 PIP_NO_BUILD_ISOLATION=0\n"  # 0 is pip's yes
    for command, output in commands:
        said = machine.run(f"cd /run/tree\n{offline}{command}")
        if not command.startswith("apt "):
            assert pages.squeezed(said) == pages.squeezed(output)
    machine.run("! test -e /usr/bin/virsh-backup")
    machine.run("test -s /opt/virtbackup/share/man/man1/virsh-backup.1")
