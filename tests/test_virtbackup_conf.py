# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtbackup.conf: what it may say, where it is, and what TLS goes by."""

import os
import pathlib

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.live import points
from virtbackup import config, errors, runtime
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
        ("uris = ''", "/0.conf:1: expected a list of texts in brackets for 'uris'"),
        ("uris = a", "/0.conf:1: expected a list of texts in brackets for 'uris'"),
        ("uris = [a]", "/0.conf:1: expected NAME = VALUE, with a text in quotes"),
        ("uris = ['a' 'b']", "/0.conf:1: expected NAME = VALUE, with a text in quotes"),
        ("uris = ['a',, 'b']", "/0.conf:1: expected NAME = VALUE, with a text in quotes"),
        ("\nuris = ['a',\n'b'\n", "/0.conf:2: expected NAME = VALUE, with a text in quotes"),
        ("uris = [\n'a'\n] b", "/0.conf:1: expected NAME = VALUE, with a text in quotes"),
        ("uris = [\n]\nuris", "/0.conf:3: expected NAME = VALUE, with a text in quotes"),
        ("max_clients = 0", "/0.conf:1: expected at least 1 for 'max_clients'"),
        ("max_client_requests = 0", "/0.conf:1: expected at least 1 for 'max_client_requests'"),
        ("max_workers = 00", "/0.conf:1: expected at least 1 for 'max_workers'"),
        ("keepalive_count = 0", "/0.conf:1: expected at least 1 for 'keepalive_count'"),
        ("max_clients = 1234567890", "/0.conf:1: expected a number for 'max_clients'"),
        ("max_clients = \u0661", "/0.conf:1: expected a number for 'max_clients'"),
        ("max_clients = '5'", "/0.conf:1: expected a number for 'max_clients'"),
        ("max_clients = many", "/0.conf:1: expected a number for 'max_clients'"),
        ("max_clients = ['5']", "/0.conf:1: expected a number for 'max_clients'"),
        ("unix_sock_group = ['a']", "/0.conf:1: expected a text in quotes for 'unix_sock_group'"),
        ("insecure = ['yes']", "/0.conf:1: expected yes or no for 'insecure'"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(errors.Error) as caught:
        parse(text)
    assert str(caught.value).startswith(f"configuration file syntax error: {message}")
    assert caught.value.get_error_code() == libvirt.VIR_ERR_CONF_SYNTAX


@pytest.mark.parametrize(
    ("text", "uris"),
    [
        ("uris = []", ()),
        ("uris = [ ]", ()),
        ("uris = 'a'", ("a",)),
        ("uris=['a']", ("a",)),
        ("uris = ['a', \"b\"]  # both", ("a", "b")),
        ("uris = ['a' , 'b' ,]", ("a", "b")),
        ("uris = ['[::1]', '#', \"'\", '\"', '']", ("[::1]", "#", "'", '"', "")),
        ("uris = [\n'a',\n\n  'b'  # the second\n]", ("a", "b")),
        ("uris = [ # none\n]\n", ()),
        ("uris = ['a',\n'b']\ninsecure = yes", ("a", "b")),
    ],
)
def test_lists(text: str, uris: tuple[str, ...]) -> None:
    assert parse(text).uris == uris


def test_no_list_is_not_an_empty_one() -> None:
    assert parse().access is None
    assert parse("access = []").access == ()
    assert parse("access = ['read *', 'backup *']").access == ("read *", "backup *")


def test_numbers() -> None:
    found = parse("max_clients = 999999999\nmax_workers = 1\nkeepalive_interval = 0")
    assert (found.max_clients, found.max_workers, found.keepalive_interval) == (999999999, 1, 0)


def test_where_a_setting_is_said() -> None:
    """A list at its beginning, what several say at the last one's."""
    found = parse("\ninsecure = yes\nuris = [\n'a'\n]\nmax_clients = 7", "\n\nmax_clients = 8")
    assert found.places == {
        "insecure": "/0.conf:2",
        "uris": "/0.conf:3",
        "max_clients": "/1.conf:3",
    }
    assert str(found.wrong("max_clients", "too many")) == (
        "configuration file syntax error: /1.conf:3: max_clients: too many"
    )
    unsaid = found.wrong("listen", "nowhere")
    assert str(unsaid) == "configuration file syntax error: listen: nowhere"
    assert unsaid.get_error_code() == libvirt.VIR_ERR_CONF_SYNTAX
    assert unsaid.get_error_domain() == libvirt.VIR_FROM_CONF


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
    assert virtbackup_conf.Psk("/X", "me").file == "/X/keys.psk"


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
    both = {"/f": 'backup_tls_x509_cert_dir = "/a"\nbackup_tls_psk_dir = "/b"'}
    with pytest.raises(errors.Error) as caught:
        virtbackup_conf.Settings.parse(both, both).credentials()
    assert str(caught.value) == (
        "unsupported configuration: backup_tls_x509_cert_dir and backup_tls_psk_dir are mutually"
        " exclusive, and both are set in '/f'"
    )
    assert caught.value.get_error_code() == libvirt.VIR_ERR_CONFIG_UNSUPPORTED


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """The machine's file and the user's, neither of which is there."""
    monkeypatch.delenv("VIRTBACKUP_CONF")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(config, "MACHINES", tmp_path / "machine.conf")
    (tmp_path / "home" / "virtbackup").mkdir(parents=True)
    return config.places()


def test_a_relative_directory_of_the_users_is_none(
    places: list[pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As XDG's specification has it: it would be another one from directory to directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "virtbackup" / "virtbackup.conf").write_text("insecure = yes")
    assert config.load().insecure
    monkeypatch.setenv("XDG_CONFIG_HOME", "home")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert not config.load().insecure
    (tmp_path / "home" / ".config").symlink_to(tmp_path / "home")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "home")
    assert not config.load().insecure


@pytest.mark.parametrize("home", [None, "", "home"])
def test_who_has_no_home(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is no user's, in a container, say: its files have a place, if one that it may
    not write to."""
    for name in ("VIRTBACKUP_CONF", "VIRTBACKUP_STATE_DIR", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    assert str(runtime.directory()) == "/.cache/virtbackup"
    assert str(config.places()[-1]) == "/.config/virtbackup/virtbackup.conf"


def test_a_relative_place_in_a_directory_that_is_gone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("VIRTBACKUP_STATE_DIR", "state")
    told = "error: cannot tell where VIRTBACKUP_STATE_DIR=state is: No such file or directory\n"
    assert points.call("uri") == (1, "", told)


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
