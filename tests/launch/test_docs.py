"""Documentation: every relative link leads to a file, and every anchor to a heading."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(ROOT / name for name in subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).splitlines())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_relative_link_leads_somewhere(page):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_noticed():
    text = "[a](docs/no-such-page.md) and [b](README.md#no-such-heading) and [c](README.md)"
    assert broken_links(ROOT / "README.md", text) == ["docs/no-such-page.md", "README.md#no-such-heading"]


def test_the_quick_start_can_be_typed_from_top_to_bottom():
    """Its config is written before it is used; the run is resumed before it is done, and extended afterwards."""
    readme = (ROOT / "README.md").read_text()
    steps = (
        "manta init",
        "manta train run.yaml ",
        "Ctrl-C",
        "cluster.ranks_per_node=1",
        "train.steps=560",
        "drill run.yaml",
        "minutes with",
    )
    places = [readme.index(step, readme.index("## Quick start")) for step in steps]
    assert places == sorted(places)
