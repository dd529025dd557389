# SPDX-License-Identifier: LGPL-2.1-or-later
"""What holds for every test: the ``live`` and ``needs`` marks, no quiet skips, how long to look.

Everything in tests/live is marked ``live``. A live test names the programs it runs with
``@pytest.mark.needs("nbdkit")`` and is skipped, by name, where one is absent. ``./dev test``
installs them all, so under CI=true or VIRTBACKUP_NO_SKIP=1 a live test that skips has failed;
``@pytest.mark.may_skip`` excuses one that asks for more than ``./dev test`` can give.
VIRTBACKUP_LONG=1 (``./dev test --long``) makes hypothesis look at far more examples; for a mutant
(mutmut) it looks at few, the same each time.
"""

import gc
import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterable
from typing import Any

import hypothesis
import pytest

THIS = pathlib.Path(__file__)
HERE = THIS.parent
LIVE = HERE / "live"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
LONG_TIMEOUT = 1800.0
"""Seconds a test may take when it looks longer."""
MEMORY = pathlib.Path("/dev/shm")
MEMINFO = pathlib.Path("/proc/meminfo")
ROOM = 8 << 30
"""Bytes that have to be free in it, for files are to go there; a run takes some hundred MiB."""
LONGEST = 16
"""Characters that a TMPDIR may have: the path of a socket ends with the 107th."""

# A shell lets what it starts in the background ignore SIGINT, and nohup SIGHUP; and so would all
# that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# What they are run with says neither what others may read of them, nor that there is no home.
os.umask(0o022)
os.environ.setdefault("HOME", tempfile.gettempdir())

# An assertion that fails in what tests share tells what it saw, as one in a test does.
pytest.register_assert_rewrite(
    "tests.live", *(f"tests.{path.stem}" for path in HERE.glob("[!_]*.py") if path != THIS)
)

# How long it takes to make an example is told by the machine, too.
HOWEVER_SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile(
    "short", deadline=None, print_blob=True, max_examples=50, suppress_health_check=HOWEVER_SLOW
)
hypothesis.settings.register_profile(
    "long", parent=None, deadline=None, max_examples=5000, suppress_health_check=HOWEVER_SLOW
)
hypothesis.settings.register_profile(
    "mutant",
    deadline=None,
    suppress_health_check=HOWEVER_SLOW,
    max_examples=25,
    derandomize=True,
    database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)


def no_skip() -> bool:
    """Whether a skipped live test counts as a failure."""
    return os.environ.get("CI") == "true" or os.environ.get("VIRTBACKUP_NO_SKIP") == "1"


def long() -> bool:
    """Whether there is time to look at more examples."""
    return os.environ.get("VIRTBACKUP_LONG") == "1"


def profile() -> str:
    """How hypothesis looks."""
    if "MUTANT_UNDER_TEST" in os.environ:
        return "mutant"
    return "long" if long() else "short"


def has_memory() -> bool:
    """Whether files may be put into memory."""
    try:
        free = os.statvfs(MEMORY)
        told = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        available = int(told["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return False
    if free.f_flag & os.ST_NOEXEC:
        return False
    return min(free.f_bavail * free.f_frsize, available) > ROOM


def missing_programs(programs: Iterable[str]) -> list[str]:
    """Those of PROGRAMS that are not installed."""
    path = f"{os.environ.get('PATH', os.defpath)}:{SBIN}"
    return [program for program in programs if shutil.which(program, path=path) is None]


def is_live(path: pathlib.Path) -> bool:
    return LIVE in path.parents


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "live: runs real programs (QEMU, libvirtd, nbdkit)")
    config.addinivalue_line("markers", "needs(*programs): programs the test runs")
    config.addinivalue_line("markers", "may_skip: may skip even where a live test must not")
    hypothesis.settings.load_profile(profile())
    os.environ["VIRTBACKUP_CONF"] = os.devnull  # not this machine's settings
    place = _place_for_files()
    if not hasattr(config, "workerinput") and place is not None:
        directory = tempfile.mkdtemp(prefix="vb-", dir=place)
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
        os.environ["TMPDIR"] = directory
        tempfile.tempdir = None  # it may have been looked up
        if config.option.basetemp is None:
            config.option.basetemp = f"{directory}/t"  # short, for the sockets in it


def _place_for_files() -> pathlib.Path | None:
    """Where the files of tests go; None: where pytest has them."""
    if "TMPDIR" not in os.environ and has_memory():
        # What is tested syncs all that it makes: on a disk that is a sixth of the time.
        return MEMORY
    return pathlib.Path("/tmp") if len(tempfile.gettempdir()) > LONGEST else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What there is before the first test stays to the end: the collector need not go through all
    of it again and again, which was a good part of the time of tests that make much."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_live(item.path):
            item.add_marker("live")
        if long():
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = [program for mark in item.iter_markers("needs") for program in mark.args]
    if missing := missing_programs(wanted):
        pytest.skip(f"not installed: {', '.join(missing)}")


def fail_if_skipped(report: Any) -> None:
    """Turn a skip into a failure that tells the skip's reason."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"a live test may not skip here: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if no_skip() and is_live(item.path) and item.get_closest_marker("may_skip") is None:
        fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if no_skip() and is_live(collector.path):
        fail_if_skipped(report)
    return report
