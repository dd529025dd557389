# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's own <domainbackup> read and written: mostly files of tests/nativexmldata."""

import functools
import pathlib
import time
from typing import Any

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import datacases
from tests.test_backup_conf import DOMAIN, name, refusal
from virtbackup import errors
from virtbackup.conf import domain_conf, native_conf, xml


@pytest.mark.parametrize("case", datacases.inputs("nativexmldata/valid"), ids=name)
def test_valid(case: pathlib.Path) -> None:
    parsed = native_conf.BackupDef.parse(case.read_text())
    datacases.check(case.with_suffix(".out"), parsed.format())
    assert native_conf.BackupDef.parse(parsed.format()) == parsed


@pytest.mark.parametrize("case", datacases.inputs("nativexmldata/invalid"), ids=name)
def test_invalid(case: pathlib.Path) -> None:
    with pytest.raises(errors.Error) as caught:
        native_conf.BackupDef.parse(case.read_text())
    datacases.check(case.with_suffix(".err"), refusal(caught.value))


@pytest.mark.parametrize("case", datacases.inputs("nativexmldata/aligned"), ids=name)
def test_aligned(case: pathlib.Path) -> None:
    aligned = native_conf.BackupDef.parse(case.read_text()).align_disks(DOMAIN)
    datacases.check(case.with_suffix(".out"), aligned.format())
    assert native_conf.BackupDef.parse(aligned.format()) == aligned
    assert aligned.align_disks(DOMAIN) == aligned


@pytest.mark.parametrize("case", datacases.inputs("nativexmldata/refused"), ids=name)
def test_refused_by_the_domain(case: pathlib.Path) -> None:
    with pytest.raises(errors.Error) as caught:
        native_conf.BackupDef.parse(case.read_text()).align_disks(DOMAIN)
    datacases.check(case.with_suffix(".err"), refusal(caught.value))


def test_a_domain_without_disks() -> None:
    with pytest.raises(errors.Error) as caught:
        native_conf.BackupDef().align_disks(domain_conf.DomainDef("vm", "u", 1))
    assert caught.value.get_error_code() == libvirt.VIR_ERR_CONFIG_UNSUPPORTED
    assert caught.value.get_str2() == "domain must have at least one disk to perform backup"


@pytest.mark.parametrize(
    ("inside", "what", "limit"),
    [
        ("<incremental>{}</incremental>", "checkpoint name", 1023),
        ("<server transport='unix' socket='/{}'/>", "socket path", 106),
        ("<disks><disk name='vda' incremental='{}'/></disks>", "incremental of disk 'vda'", 1023),
        ("<disks><disk name='vda' exportname='{}'/></disks>", "exportname of disk 'vda'", 4096),
        ("<disks><disk name='vda' exportbitmap='{}'/></disks>", "exportbitmap of disk 'vda'", 1023),
    ],
)
def test_the_longest_names(inside: str, what: str, limit: int) -> None:
    document = f"<domainbackup mode='pull'>{inside}</domainbackup>"
    longest = native_conf.BackupDef.parse(document.format("x" * limit))
    assert native_conf.BackupDef.parse(longest.format()) == longest
    for longer in ("x" * (limit + 1), "x" * (limit - 1) + "é"):
        with pytest.raises(errors.Error, match=f"{what} is longer than [0-9]+ bytes"):
            native_conf.BackupDef.parse(document.format(longer))


# --- any document ---------------------------------------------------------------------------------

_characters = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/")
_names = st.text(_characters, min_size=1, max_size=20)
_paths = _names.map(lambda text: f"/{text}")
_tls = st.none() | st.booleans()
_servers = st.one_of(
    st.builds(native_conf.UnixServer, _paths, _tls),
    st.builds(native_conf.FdServer, _names, _tls),
    st.builds(
        native_conf.TcpServer,
        st.sampled_from(["0.0.0.0", "::", "::1", "host.example", "fe80::1%eth0"]),
        st.none() | st.integers(1, 65535),
        _tls,
    ),
)
_secret = st.builds(
    native_conf.Kept,
    st.just("secret"),
    _names.map(lambda usage: (("type", "passphrase"), ("usage", usage))),
)
_encryption = _secret.map(
    lambda secret: native_conf.Kept("encryption", (("format", "luks"),), None, (secret,))
)
_seclabel = st.builds(
    native_conf.Kept,
    st.just("seclabel"),
    st.sampled_from([(), (("model", "dac"), ("relabel", "no"))]),
    st.none(),
    st.lists(st.builds(native_conf.Kept, st.just("label"), text=_names), max_size=2).map(tuple),
)
_images = st.builds(
    native_conf.Image,
    path=_paths,
    encryption=st.none() | _encryption,
    seclabels=st.lists(_seclabel, max_size=2).map(tuple),
)


@st.composite
def _disks(draw: st.DrawFn, mode: native_conf.Mode) -> native_conf.BackupDiskDef:
    modes: list[native_conf.BackupMode | None] = [None, "full", "incremental"]
    backupmode = draw(st.sampled_from(modes))
    pulled = st.none() | _names if mode == "pull" else st.none()
    formats = ["qcow2"] if mode == "pull" else ["qcow2", "raw"]
    return native_conf.BackupDiskDef(
        name=draw(_names),
        backup=draw(st.none() | st.booleans()),
        type=draw(st.sampled_from([None, "file", "block"])),
        backupmode=backupmode,
        incremental=draw(st.none() if backupmode == "full" else st.none() | _names),
        exportname=draw(pulled),
        exportbitmap=draw(pulled),
        image=draw(st.none() | _images),
        driver=draw(st.sampled_from([None, *formats])),
        index=draw(st.none() | st.integers(0, 999_999_999)),
        state=draw(st.sampled_from([None, "running", "cancelled"])),
    )


@st.composite
def definitions(draw: st.DrawFn) -> native_conf.BackupDef:
    """Any document that parse accepts."""
    mode: native_conf.Mode = draw(st.sampled_from(["pull", "push"]))
    return native_conf.BackupDef(
        mode=mode,
        server=draw(st.none() | _servers if mode == "pull" else st.none()),
        incremental=draw(st.none() | _names),
        disks=tuple(draw(st.lists(_disks(mode), max_size=4))),
    )


@given(definitions())
def test_parse_and_format_are_inverses(definition: native_conf.BackupDef) -> None:
    assert native_conf.BackupDef.parse(definition.format()) == definition


def test_many_disks_are_read_and_aligned_in_time() -> None:
    disks = "".join(f"<disk name='d{n}' backup='yes'/>" for n in range(10_000))
    document = f"<domainbackup mode='pull'><disks>{disks}</disks></domainbackup>"
    domain = domain_conf.DomainDef(
        "vm", "u", 1, tuple(domain_conf.DiskDef(f"d{n}", source="/x") for n in range(10_000))
    )
    began = time.process_time()
    aligned = native_conf.BackupDef.parse(document).align_disks(domain)
    assert len(aligned.disks) == 10_000
    assert time.process_time() - began < 20


_pieces = st.recursive(
    st.sampled_from(
        ["", '<server name="h" port="1"/>', '<server transport="unix" socket="/x"/>',
         "<incremental>c</incremental>", "<driver type='qcow2'/>", '<disk name="a"/>',
         '<scratch file="/x"/>', "<secret type='passphrase' usage='x'/>", "<label>x</label>",
         "text", "\u00a0"]
    ),
    lambda inner: st.tuples(
        st.sampled_from(["disks", "disk", "server", "incremental", "scratch", "target",
                         "encryption", "seclabel", "label", "x"]),
        st.sampled_from(["", ' name="a"', ' backup="yes"', ' type="file"', ' file="/y"',
                         ' format="luks"', ' relabel="no"']),
        st.lists(inner, max_size=3),
    ).map(lambda item: f"<{item[0]}{item[1]}>{''.join(item[2])}</{item[0]}>"),
    max_leaves=8,
)  # fmt: skip


@functools.cache
def _schema() -> Any:
    import xmlschema

    return xmlschema.XMLSchema10(xml._text(native_conf.SCHEMA))


@given(st.lists(_pieces, max_size=4), st.sampled_from(["", " mode='pull'", " x='y'"]))
def test_the_two_schema_engines_agree(pieces: list[str], attributes: str) -> None:
    """What lxml refuses, xmlschema can explain; what it accepts, xmlschema accepts."""
    document = f"<domainbackup{attributes}>{''.join(pieces)}</domainbackup>"
    root = xml.parse(document, "domainbackup")
    valid = xml.is_valid(root, native_conf.SCHEMA)
    if not valid:
        assert str(xml.explain(root, native_conf.SCHEMA, native_conf.TEXTS))
    elif "\u00a0" not in document:
        assert _schema().is_valid(root)
