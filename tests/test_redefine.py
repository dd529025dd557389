# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's document with its disks elsewhere."""

import pytest
from lxml import etree

import virtbackup
from virtbackup.conf import redefine

DOCUMENT = """<domain type='kvm' id='3'>
  <name>vm</name>
  <devices>
    <disk type='network' device='disk' snapshot='external'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <auth username='a'/>
      <source protocol='rbd' name='p/i'><host name='h'/><encryption format='luks'/></source>
      <backingStore type='file'><format type='raw'/><source file='/b'/></backingStore>

      <target dev='vda' bus='virtio'/>
      <mirror type='file'/>
      <encryption format='luks'/>
      <iotune/>
      <capacity unit='bytes'>1</capacity>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sr0'/>
    </disk>
    <disk type='block' device='disk'>
      <source dev='/dev/x'/>
      <target dev='vdb'/>
    </disk>
    <disk type='file' device='cdrom'>
      <source index='1'/>
      <target dev='sr1'/>
    </disk>
  </devices>
</domain>
"""


def test_a_file() -> None:
    made, left = redefine.redefine(DOCUMENT, {"vda": redefine.Medium("file", "/n<w", "raw")})
    assert left == ["vdb"]
    assert made.startswith('<domain type="kvm">\n  <name>vm</name>\n')
    assert (
        """    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none"/>
      <source file="/n&lt;w"/>
      <target dev="vda" bus="virtio"/>
      <iotune/>
    </disk>
"""
        in made
    )
    assert redefine.redefine(made, {"vda": redefine.Medium("file", "/n<w", "raw")})[0] == made


@pytest.mark.parametrize(
    ("fmt", "kept", "gone"),
    [
        ("raw", ["shareable"], ["metadata_cache", "discard_no_unref"]),
        ("qcow2", ["metadata_cache", "discard_no_unref"], ["shareable"]),
    ],
)
def test_what_libvirt_takes_of_one_format_alone(fmt: str, kept: list[str], gone: list[str]) -> None:
    document = DOCUMENT.replace(
        "<driver name='qemu' type='qcow2' cache='none'/>",
        "<driver name='qemu' type='qcow2' discard_no_unref='on'>"
        "<metadata_cache><max_size>1</max_size></metadata_cache></driver><shareable/>",
    )
    made, _ = redefine.redefine(document, {"vda": redefine.Medium("file", "/new", fmt)})
    assert [word in made for word in (*kept, *gone)] == [True] * len(kept) + [False] * len(gone)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("nbd://h:7/a%20b", '<source protocol="nbd" name="a b"><host name="h" port="7"/></source>'),
        ("nbds://h", '<source protocol="nbd" tls="yes"><host name="h" port="10809"/></source>'),
        ("nbd+unix:///?socket=/s%3f",
         '<source protocol="nbd"><host transport="unix" socket="/s?"/></source>'),
        ("nbd+unix:///?socket=d/s",
         '<source protocol="nbd"><host transport="unix" socket="/here/d/s"/></source>'),
        ("nbds+unix:///e?socket=/s&socket=/t",
         '<source protocol="nbd" name="e" tls="yes"><host transport="unix" socket="/s"/></source>'),
        ("nbd:////e/",
         '<source protocol="nbd" name="/e/"><host name="localhost" port="10809"/></source>'),
        ("nbd://[::1]:8", '<source protocol="nbd"><host name="::1" port="8"/></source>'),
    ],
)  # fmt: skip
def test_a_server(place: str, source: str) -> None:
    media = {"vdb": redefine.Medium("network", place, "raw")}
    made, _ = redefine.redefine(DOCUMENT, media, "/here")
    disk = etree.fromstring(made).findall("devices/disk")[2]
    assert disk.get("type") == "network"
    found = disk.find("source")
    assert found is not None
    assert disk.find("driver").attrib == {"name": "qemu", "type": "raw"}  # type: ignore[union-attr]
    assert etree.tostring(found).decode().replace("\n", "").replace("  ", "").strip() == source


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("nbd://[::1", "nbd://[::1 is no address of a server: Invalid IPv6 URL"),
        ("nbd://h:99999/x", "nbd://h:99999/x is no address of a server: Port out of range"),
        ("nbd+vsock://2/x", "nbd+vsock://2/x cannot be said in a domain's XML: libvirt reaches"),
    ],
)
def test_a_server_that_cannot_be_said(place: str, text: str) -> None:
    with pytest.raises(virtbackup.Error) as caught:
        redefine.redefine(DOCUMENT, {"vdb": redefine.Medium("network", place, "raw")})
    assert text in str(caught.value)


def test_a_disk_that_says_no_format_yet() -> None:
    media = {"vdb": redefine.Medium("file", "/y", "qcow2")}
    made, left = redefine.redefine(DOCUMENT, media)
    assert left == ["vda"]
    disk = etree.fromstring(made).findall("devices/disk")[2]
    assert [(child.tag, dict(child.attrib)) for child in disk] == [
        ("driver", {"name": "qemu", "type": "qcow2"}),
        ("source", {"file": "/y"}),
        ("target", {"dev": "vdb"}),
    ]


def test_what_is_elsewhere_already_is_left() -> None:
    """A disk with a medium whose target nobody can name is left, too."""
    document = "<domain><devices><disk><source file='/a'/>{}</disk></devices></domain>"
    for target in ("", "<target/>"):
        made, left = redefine.redefine(document.format(target), {})
        assert left == [""]
        assert '<source file="/a"/>' in made


def test_a_device_and_what_is_refused() -> None:
    media = {"vdb": redefine.Medium("block", "/dev/y", "raw")}
    assert '<source dev="/dev/y"/>' in redefine.redefine(DOCUMENT, media)[0]
    with pytest.raises(virtbackup.Error) as caught:
        redefine.redefine(DOCUMENT, dict.fromkeys(["vdz", "vdb", "vdy"], media["vdb"]))
    assert str(caught.value) == (
        "XML error: the domain has no disk 'vdy' (line 1, element <domain>)"
    )
    with pytest.raises(virtbackup.Error, match="characters that XML cannot carry"):
        redefine.redefine(DOCUMENT, {"vdb": redefine.Medium("file", "/\x01", "raw")})
    with pytest.raises(virtbackup.Error, match="XML error"):
        redefine.redefine("no document", {})


RUNS = "<domain>\n  <cpu mode='{}' check='full'>\n    <model>m</model>\n  </cpu>\n</domain>\n"


@pytest.mark.parametrize(
    "defined",
    [
        RUNS.format("custom"),
        "<domain><cpu mode='host-passthrough'/></domain>",
        "<domain/>",
    ],
)
def test_a_cpu_that_is_no_hosts_stays(defined: str) -> None:
    running = RUNS.format("custom")
    assert redefine.on_any_host(running, lambda: defined) == running


def test_a_hosts_model_is_asked_for_again() -> None:
    defined = "<domain><cpu mode='host-model'><cache mode='disable'/></cpu><x/></domain>"
    made = redefine.on_any_host(RUNS.format("custom"), lambda: defined)
    assert made == ('<domain>\n  <cpu mode="host-model"><cache mode="disable"/></cpu>\n</domain>\n')


def test_what_the_other_elements_have_to_fit_is_of_what_runs() -> None:
    """The definition may be of another number of processors by now, for the next start."""
    runs = RUNS.format("custom").replace("<model>", "<topology cores='2'/><numa/><model>")
    defined = "<domain><cpu mode='host-model'><topology cores='4'/>\n</cpu></domain>"
    made = redefine.on_any_host(runs, lambda: defined)
    assert '<cpu mode="host-model"><topology cores="2"/><numa/></cpu>' in made


@pytest.mark.parametrize("document", ["<domain/>", RUNS.format("host-passthrough")])
def test_the_definition_is_asked_for_where_it_may_tell_more(document: str) -> None:
    assert redefine.on_any_host(document, lambda: pytest.fail("asked")) == document
