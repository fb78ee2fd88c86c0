"""The README's Python runs as it is written."""

import re
from pathlib import Path

import pytest

import sslvit
from sslvit.data import spec
from sslvit.data.source import ShapesSource

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.usefixtures("all_shapes")
def test_the_lines_of_the_readme_run_as_written(tmp_path, monkeypatch, capsys):
    """On a twentieth of the built-in images."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    monkeypatch.setattr(spec, "ShapesSource", lambda size, **options: ShapesSource(size // 20, **options))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    knn, linear = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert 0 < knn <= 1
    assert 0 < linear <= 1
    assert (names["run"].report.exists(), len(names["run"].evaluations)) == (True, 2)
    assert len(names["train"].x) == 250
    assert len(names["test"].x) == 200
    assert names["vit"].declared == "mean"
    assert sslvit.Run("runs/first").metrics[-1]["step"] == 8  # two passes over 250 images in batches of 64
