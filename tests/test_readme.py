"""The README's numbers of comparisons are those of the data files that are kept, line by line."""

import json
import re
from pathlib import Path

from sslvit.results_page import as_markdown

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- from (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def test_every_line_of_a_comparison_in_the_readme_is_one_of_its_report():
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert sorted({file for file, _ in blocks}) == [
        "recipes/results/built-in.json",
        "recipes/results/fashion-mnist.json",
    ]
    for file, text in blocks:
        told = as_markdown(json.loads((ROOT / file).read_text())).splitlines()
        lines = [line for line in text.splitlines() if line]
        assert len(lines) > 3
        assert [line for line in lines if line not in told] == []
