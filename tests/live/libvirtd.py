# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirtd of the tests' own, without systemd, and domains on it.

It runs in a mount namespace in which everything that a libvirtd shares with another one is hidden
by something empty: the system's is neither used nor seen, and the test's own process is left where
it is. Only the daemon's socket is where both see it. Mounts that a test makes are seen inside.
"""

import contextlib
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import libvirt

HIDDEN = ("/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
DEADLINE = 30.0
LOOK_AGAIN = 0.005
MIB = 1 << 20

# Everything below the directory in $1; the daemon takes the shell's place.
_INSIDE = """
for path in {hidden}; do mkdir -p "$path"; done
mount --bind "$1/run" /run/libvirt
mount --bind "$1/lib" /var/lib/libvirt
mount --bind "$1/cache" /var/cache/libvirt
mount --bind "$1/log" /var/log/libvirt
mount --bind "$1/etc" /etc/libvirt
exec libvirtd -p "$1/libvirtd.pid"
"""

_QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
security_default_confined = 0
cgroup_controllers = []
stdio_handler = "file"
remember_owner = 0
namespaces = [{namespaces}]
"""
_LIBVIRTD_CONF = """
unix_sock_dir = "{directory}/sock"
auth_unix_ro = "none"
auth_unix_rw = "none"
listen_tls = 0
listen_tcp = 0
log_outputs = "{level}:file:{directory}/libvirtd.log"
log_filters = "3:remote 4:event 3:util 3:rpc"
"""


class Libvirtd:
    """One daemon in DIRECTORY, which all users may enter."""

    def __init__(self, directory: pathlib.Path, cache: pathlib.Path | None = None) -> None:
        """CACHE is another daemon's, of what it found out about QEMU."""
        self.directory = directory
        directory.chmod(0o755)
        for name in ("run", "lib", "cache", "log", "etc", "sock"):
            (directory / name).mkdir()
        if cache is not None:
            shutil.copytree(cache, directory / "cache", dirs_exist_ok=True)
        (directory / "etc" / "qemu.conf").write_text(_QEMU_CONF.format(namespaces=""))
        conf = _LIBVIRTD_CONF.format(directory=directory, level=3)
        (directory / "etc" / "libvirtd.conf").write_text(conf)
        self.log = directory / "libvirtd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def socket(self) -> pathlib.Path:
        return self.directory / "sock" / "libvirt-sock"

    @property
    def uri(self) -> str:
        return f"qemu:///system?socket={self.socket}"

    @property
    def cache(self) -> pathlib.Path:
        return self.directory / "cache"

    def start(self) -> None:
        """Start the daemon; it takes up the domains that are running."""
        self.socket.unlink(missing_ok=True)
        script = _INSIDE.format(hidden=" ".join(HIDDEN))
        with (self.directory / "output").open("ab") as output:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", script, "sh",
                 str(self.directory)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        wait_for(self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "output").read_text()
        if not self.socket.is_socket():
            return False
        try:
            with _quiet():
                libvirt.openReadOnly(self.uri).close()
        except libvirt.libvirtError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL; its domains run on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End all domains and the daemon."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        assert self._process is not None
        with contextlib.closing(libvirt.open(self.uri)) as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                domain.destroy()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(DEADLINE)


@contextlib.contextmanager
def running(directory: pathlib.Path, cache: pathlib.Path | None = None) -> Iterator[Libvirtd]:
    """A daemon for as long as this lasts."""
    daemon = Libvirtd(directory, cache)
    try:
        yield daemon
    finally:
        daemon.close()


def wait_for(what: Callable[[], bool], deadline: float = DEADLINE) -> None:
    """Wait until WHAT holds: for what no event tells."""
    end = time.monotonic() + deadline
    while not what():
        assert time.monotonic() < end, what
        time.sleep(LOOK_AGAIN)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """libvirt says no word of errors on stderr."""
    libvirt.registerErrorHandler(lambda *_: None, None)
    try:
        yield
    finally:
        libvirt.registerErrorHandler(None, None)
