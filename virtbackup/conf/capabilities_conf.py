# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host's capabilities, as far as they are known without libvirt (capabilities.c)."""

import dataclasses

from lxml import etree

from virtbackup.conf import xml


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What the host is; ARCH is its processors', as ``uname -m`` says it."""

    arch: str

    def format(self) -> str:
        """A ``<capabilities>``."""
        root = etree.Element("capabilities")
        with xml.writing():
            cpu = etree.SubElement(etree.SubElement(root, "host"), "cpu")
            etree.SubElement(cpu, "arch").text = self.arch
        return xml.indented(root)
