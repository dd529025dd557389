# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtbackup.conf: what it may say, where it is, and what TLS goes by."""

import pathlib

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtbackup import config, errors
from virtbackup.conf import virtbackup_conf

WHOLE = """
# TLS of exports
backup_tls_x509_cert_dir = "/etc/pki/virtbackup"   # as libvirt's
backup_tls_x509_verify=0
  backup_tls_x509_client_cert_dir = '/home/me/#1'
\tbackup_tls_psk_username = "me"

insecure = yes
"""


def parse(*texts: str) -> virtbackup_conf.Settings:
    return virtbackup_conf.Settings.parse({f"/{n}.conf": text for n, text in enumerate(texts)})


def test_everything() -> None:
    assert parse(WHOLE) == virtbackup_conf.Settings(
        backup_tls_x509_cert_dir="/etc/pki/virtbackup",
        backup_tls_x509_verify=False,
        backup_tls_x509_client_cert_dir="/home/me/#1",
        backup_tls_psk_username="me",
        insecure=True,
    )
    assert parse() == parse("", "\n# nothing\n#") == virtbackup_conf.Settings()


def test_the_last_file_decides() -> None:
    found = parse('insecure = "yes"\nbackup_tls_psk_dir = "/a"', "insecure = no", "insecure = 1\n")
    assert (found.insecure, found.backup_tls_psk_dir) == (True, "/a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("insecur = 1", "/0.conf:1: there is no setting 'insecur'"),
        ("files = 'x'", "/0.conf:1: there is no setting 'files'"),
        ("\n\ninsecure = maybe", "/0.conf:3: expected yes or no for 'insecure'"),
        ("insecure = 2", "/0.conf:1: expected yes or no for 'insecure'"),
        ("insecure = ''", "/0.conf:1: expected yes or no for 'insecure'"),
        ("insecure", "/0.conf:1: expected NAME = VALUE, with a text in quotes"),
        ("insecure =", "/0.conf:1: expected NAME = VALUE, with a text in quotes"),
        ("insecure = 1 2", "/0.conf:1: expected NAME = VALUE, with a text in quotes"),
        ("backup_tls_psk_dir = /a", "/0.conf:1: expected NAME = VALUE, with a text in quotes"),
        ("backup_tls_psk_dir = a", "/0.conf:1: expected a text in quotes for 'backup_tls_psk_dir'"),
        ("backup_tls_psk_dir = ''", "/0.conf:1: expected a text in quotes for 'backup_tls_psk_dir"),
        (
            'backup_tls_psk_dir = "a"',
            "/0.conf:1: expected an absolute path for 'backup_tls_psk_dir",
        ),
        ("[tls]", "/0.conf:1: expected NAME = VALUE, with a text in quotes"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(errors.Error) as caught:
        parse(text)
    assert str(caught.value).startswith(f"configuration file syntax error: {message}")
    assert caught.value.get_error_code() == libvirt.VIR_ERR_CONF_SYNTAX


@given(st.text(st.sampled_from("backup_tls_psk_dir=\"'#/ \n1yesno") | st.characters(), max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse(text)
    except errors.Error as failure:
        assert failure.get_error_code() == libvirt.VIR_ERR_CONF_SYNTAX


# --- credentials ----------------------------------------------------------------------------------


def test_credentials() -> None:
    x509 = parse('backup_tls_x509_cert_dir = "/a"').credentials()
    assert x509 == virtbackup_conf.X509("/a", verify=True, client_directory="/a")
    assert parse(WHOLE).credentials() == virtbackup_conf.X509(
        "/etc/pki/virtbackup", verify=False, client_directory="/home/me/#1"
    )
    psk = parse('backup_tls_psk_dir = "/a/"').credentials()
    assert psk == virtbackup_conf.Psk("/a/", "qemu")
    assert isinstance(psk, virtbackup_conf.Psk)
    assert psk.file == "/a/keys.psk"


def test_credentials_that_are_not_there() -> None:
    settings = virtbackup_conf.Settings.parse({}, ["/one", "/two"])
    with pytest.raises(errors.Error) as caught:
        settings.credentials()
    assert str(caught.value) == (
        "Requested operation is not valid: backup TLS directory not configured: expected"
        " backup_tls_x509_cert_dir or backup_tls_psk_dir in '/one' or '/two'"
    )
    assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID


def test_one_way_alone() -> None:
    with pytest.raises(errors.Error, match="are mutually exclusive"):
        parse('backup_tls_x509_cert_dir = "/a"', 'backup_tls_psk_dir = "/b"').credentials()


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """The machine's file and the user's, neither of which is there."""
    monkeypatch.delenv("VIRTBACKUP_CONF")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(config, "MACHINES", tmp_path / "machine.conf")
    (tmp_path / "home" / "virtbackup").mkdir(parents=True)
    return config.places()


def test_the_users_own_decides(places: list[pathlib.Path]) -> None:
    machine, own = places
    assert config.load().files == (str(machine), str(own))
    machine.write_text('insecure = yes\nbackup_tls_psk_dir = "/a"')
    own.write_text("insecure = no")
    found = config.load()
    assert (found.insecure, found.backup_tls_psk_dir) == (False, "/a")


def test_one_that_is_named_stands_alone(
    places: list[pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places[0].write_text("insecure = yes")
    named = tmp_path / "named.conf"
    monkeypatch.setenv("VIRTBACKUP_CONF", str(named))
    with pytest.raises(errors.Error, match=r"cannot read '.*named.conf': No such file"):
        config.load()
    named.write_text("# empty")
    assert not config.load().insecure


def test_files_that_cannot_be_read(places: list[pathlib.Path]) -> None:
    places[0].write_bytes(b"insecure = \xff")
    with pytest.raises(errors.Error, match="it is not UTF-8 text"):
        config.load()
    places[0].unlink()
    places[1].mkdir()
    with pytest.raises(errors.Error, match="Is a directory"):
        config.load()
