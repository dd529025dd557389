# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtbackupd in the test's own process, and drivers that are reached through one."""

import contextlib
import functools
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

from tests import waiting
from virtbackup import hypervisor
from virtbackup.conf import virtbackup_conf
from virtbackup.remote import connect, daemon, domains, driver, transport

DEADLINE = waiting.DEADLINE

Open = Callable[[], hypervisor.Driver]


def threads_left(*names: str) -> list[str]:
    """The threads whose names begin with one of NAMES and that do not come to an end."""
    found = [thread for thread in threading.enumerate() if thread.name.startswith(names)]
    for thread in found:
        thread.join(DEADLINE)
    return [thread.name for thread in found if thread.is_alive()]


class Served:
    """A daemon that runs."""

    def __init__(
        self,
        hosts: Sequence[tuple[str, Open]],
        listen: transport.Address,
        settings: virtbackup_conf.Settings | None = None,
    ) -> None:
        """HOSTS: (URI, how to open it)."""
        made = [domains.Host(uri, open) for uri, open in hosts]
        self.daemon = daemon.Daemon(made, settings or virtbackup_conf.Settings())
        self.place = self.daemon.listen(listen)
        self._thread = threading.Thread(target=self.daemon.run, name="daemon", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        kind, _, where = self.place.partition(":")
        return f"virtbackup+{kind}://{where}"

    def stop(self) -> None:
        """Once it has ended nothing of it is left."""
        self.daemon.stop()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def serving(
    hosts: Sequence[tuple[str, Open]],
    listen: transport.Address,
    settings: virtbackup_conf.Settings | None = None,
) -> Iterator[Served]:
    """A daemon for as long as this lasts."""
    served = Served(hosts, listen, settings)
    try:
        yield served
    finally:
        served.stop()


class ThroughDaemon(driver.RemoteDriver):
    """A driver of this process, at the other end of a connection to a daemon of its own."""

    def __init__(self, uri: str, open: Open, readonly: bool) -> None:
        """Errors: those of OPEN, and of opening it through the daemon."""
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vb-daemon-"))
            address = transport.Address("unix", path=str(pathlib.Path(directory, "sock")))
            served = stack.enter_context(serving([(uri, open)], address))
            served.daemon.domains.first()  # what is wrong with the URI is for who opens it
            super().__init__(connect.Target(address), readonly)
            self._stack = stack.pop_all()

    def close(self) -> None:
        super().close()
        self._stack.close()


def through_daemon(opener: hypervisor.Opener) -> hypervisor.Opener:
    """An OPENER whose drivers are reached through a daemon."""

    def open(uri: str, readonly: bool) -> hypervisor.Driver:
        return ThroughDaemon(uri, functools.partial(opener, uri, False), readonly)

    return open
