# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pages: none is lost, no link is broken, and what they list is what there is."""

import pathlib
import re
import xml.etree.ElementTree as etree

import pytest

from manual import api
from tests import test_layering

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
XS = "{http://www.w3.org/2001/XMLSchema}"


def prose(path: pathlib.Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)


def anchors(path: pathlib.Path) -> set[str]:
    """What a link can have behind its #."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"[\s]+", "-", text.strip()) for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        assert not re.match(r"[a-z]+:", target), "the pages are whole without a network"
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_site_and_found_from_its_home() -> None:
    site = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert site == {page.name for page in DOCS.glob("*.md")}
    assert site == {*re.findall(r"\((\w[\w-]*\.md)\)", (DOCS / "index.md").read_text()), "index.md"}


def test_every_element_and_attribute_of_the_document() -> None:
    schema = etree.parse(ROOT / "virtbackup" / "schemas" / "domainbackup.xsd")
    page = (DOCS / "xml.md").read_text()
    for element in schema.iter(f"{XS}element"):
        assert f"<{element.get('name')}" in page
    for kind in schema.iter(f"{XS}complexType"):
        for attribute in kind.iter(f"{XS}attribute"):
            assert f"\n| `{attribute.get('name')}` | " in page, attribute.get("name")
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert rows == {attribute.get("name") for attribute in schema.iter(f"{XS}attribute")}
    for value in schema.iter(f"{XS}enumeration"):
        assert f"`{value.get('value')}`" in page


def test_the_api_is_what_its_docstrings_say() -> None:
    """Else: python -m manual.api"""
    assert api.DOCUMENT.read_text() == api.page()


def test_every_file_that_is_named_is_there() -> None:
    named = r"`((?:virtbackup|tests|docs|systemd|examples)/[\w./-]*[\w-](?<!\.[ch]))`"
    for page in (DOCS / "layers.md", ROOT / "CONTRIBUTING.md"):
        for name in re.findall(named, page.read_text()):
            assert (ROOT / name).exists(), name


def test_every_layer_has_its_picture() -> None:
    page = (DOCS / "layers.md").read_text()
    for layer in ("conf", "qemu", "remote", "nbd"):
        section = page.split(f": `{layer}`\n")[1].split("\n## ")[0]
        assert section.startswith("\n```\n")


def modules_page() -> str:
    page = (DOCS / "layers.md").read_text()
    return page.split("\n## Every module, and who may import whom\n")[1].split("\n## ")[0]


def test_every_module_is_named_in_its_layer() -> None:
    _, *sections = re.split(r"\n\*\*(.*?)\*\*", modules_page())
    named = {
        title.strip("`"): re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.M)))
        for title, text in zip(sections[::2], sections[1::2], strict=True)
    }
    package = test_layering.PACKAGE
    layers = [path for path in package.iterdir() if (path / "__init__.py").exists()]
    assert set(named) == {"One module each", *(path.name for path in layers)}
    for title, names in named.items():
        directory = package if title == "One module each" else package / title
        there = (path.stem for path in directory.glob("*.py"))
        assert sorted(names) == sorted(name for name in there if name != "__init__")


def test_who_may_import_whom() -> None:
    """As tests/test_layering.py has it; that a layer may import itself goes without saying."""
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|$", modules_page().split("\n**")[0], re.MULTILINE)
    told = {
        layer: set(re.findall(r"`(\w+)`", others))
        for layers, others in rows
        for layer in re.findall(r"`([\w./]+)`", layers)
    }
    held = {
        layer: others - {layer}
        for layer, others in test_layering.MAY_IMPORT.items()
        if layer != "__init__"
    }
    assert told == held | test_layering.MAY_IMPORT_MORE


def test_every_bench_is_in_the_table() -> None:
    named = set(re.findall(r"python -m bench\.(\w+)", (DOCS / "performance.md").read_text()))
    benches = {path.stem for path in (ROOT / "bench").glob("[!_]*.py")}
    assert benches <= named
