"""The README and docs/: links and anchors lead somewhere, every page is listed, and what is said is what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_pages import PAGES, PYPROJECT, ROOT, anchors, blocks, links

import sslvit


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(page):
    # What another page includes has links of its own place; these two are included as they are.
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_file() or page.parent == ROOT, f"{link}: Sphinx links to no folder"
        assert not anchor or anchor in anchors(target), link


def test_the_page_of_the_api_names_what_is_public():
    written = [name for text in blocks("{public}") for name in text.text.split()]
    assert len(written) == len(set(written))
    assert set(written) == set(sslvit.__all__) - {"__version__"}


def test_every_page_is_in_the_table_of_contents_and_every_room_on_its_page():
    toctree = [name for text in blocks("{toctree}") for name in text.text.split() if not name.startswith(":")]
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES if path.parent != ROOT}
    assert pages - {"index"} == {name for name in toctree if "/" in name or (ROOT / f"docs/{name}.md").exists()}
    shown = set(re.findall(r"\{room\} (\w+)", (ROOT / "docs" / "internals.md").read_text()))
    folders = {path.name for path in Path(sslvit.__file__).parent.iterdir() if (path / "__init__.py").exists()} - {
        "recipes"
    }
    assert folders <= shown


def test_the_lowest_versions_are_those_of_pyproject():
    done = subprocess.run([sys.executable, ROOT / ".ci/lowest.py"], capture_output=True, text=True, check=True)
    wanted = PYPROJECT["project"]["dependencies"]
    assert [one for one in wanted if one.replace(">=", "==") not in done.stdout.splitlines()] == []


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", "CITATION.cff", ".github/workflows/test.yml"])
def test_files_for_others_programs_are_yaml(name):
    assert isinstance(yaml.safe_load((ROOT / name).read_text()), dict)


def test_the_version_is_that_of_the_changelog_and_the_citation():
    released = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == sslvit.__version__ == str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"])
