# SPDX-License-Identifier: LGPL-2.1-or-later
"""What we call libvirt's own dialect is what the libvirt that is installed here calls valid."""

import pathlib

import libvirt
import pytest
from lxml import etree

from tests import datacases
from tests.test_backup_conf import DOMAIN, name
from virtbackup.conf import capabilities_conf, native_conf, translate

SCHEMA = pathlib.Path("/usr/share/libvirt/schemas/domainbackup.rng")
CAPABILITIES = SCHEMA.with_name("capability.rng")

NOT_EVERY_LIBVIRTS = {
    "bare-pull": "its schema demands a server that its code can do without",
    "empty-disks": "its schema demands a disk that its code can do without",
    "foreign-attribute": "what its code passes over, its schema does not know",
    "push": "a disk without a type is valid in newer ones only",
    "running": "what it prints",
    "tcp-brackets": "as people write it",
}
"""What we read and not every libvirt does."""

STRICTER = {
    "disk-exportbitmap-long", "disk-exportname-long", "disk-incremental-long", "incremental-long",
    "unix-long", "port-large", "port-20-digits",  # limits of QEMU and of the system
    "disk-incremental-slash", "incremental-slash",  # a checkpoint's name is a file's
    "disk-exportname-empty", "disk-incremental-empty", "incremental-empty",  # the same as nothing
}  # fmt: skip
"""What we refuse and libvirt's schema does not."""

FD = libvirt.getVersion() >= 11_003_000
"""Whether this libvirt knows a server's descriptors, with any name of theirs."""
FD_VALID, FD_STRICTER = {"fd", "fd-tls"}, {"fd-group-empty"}


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not installed")
    return etree.RelaxNG(etree.parse(str(SCHEMA)))


def _is_valid(schema: etree.RelaxNG, document: str) -> bool:
    return bool(schema.validate(etree.fromstring(document.encode())))


VALID = datacases.inputs("nativexmldata/valid")
INVALID = datacases.inputs("nativexmldata/invalid")


def test_the_exceptions_are_there() -> None:
    assert set(NOT_EVERY_LIBVIRTS) <= {case.stem for case in VALID}
    assert {case.stem for case in VALID} >= FD_VALID
    assert {case.stem for case in INVALID} >= STRICTER | FD_STRICTER


@pytest.mark.parametrize(
    "case", [case for case in VALID if case.stem not in NOT_EVERY_LIBVIRTS], ids=name
)
def test_what_we_read_and_write(case: pathlib.Path, schema: etree.RelaxNG) -> None:
    written = native_conf.BackupDef.parse(case.read_text()).format()
    known = case.stem not in FD_VALID or FD
    assert _is_valid(schema, case.read_text()) == known, schema.error_log
    assert _is_valid(schema, written) == known, schema.error_log


def test_capabilities() -> None:
    if not CAPABILITIES.exists():
        pytest.skip("libvirt's schemas are not installed")
    schema = etree.RelaxNG(etree.parse(str(CAPABILITIES)))
    assert _is_valid(schema, capabilities_conf.Capabilities("x86_64").format()), schema.error_log


@pytest.mark.parametrize("case", INVALID, ids=name)
def test_what_we_refuse(case: pathlib.Path, schema: etree.RelaxNG) -> None:
    try:
        valid = _is_valid(schema, case.read_text())
    except etree.XMLSyntaxError:
        valid = False
    assert valid == (case.stem in (STRICTER | FD_STRICTER if FD else STRICTER))


@pytest.mark.parametrize("case", datacases.inputs("translatedata/to-native", "*.out"), ids=name)
def test_what_we_translate(case: pathlib.Path, schema: etree.RelaxNG) -> None:
    assert _is_valid(schema, case.read_text()), schema.error_log


@pytest.mark.parametrize("case", datacases.inputs("translatedata/to-proposal", "*.out"), ids=name)
def test_what_we_translate_back(case: pathlib.Path, schema: etree.RelaxNG) -> None:
    if case.stem != "proposal-already":
        native = translate.translate(case.read_text(), "native", lambda: DOMAIN)
        assert _is_valid(schema, native), schema.error_log
