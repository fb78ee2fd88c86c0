"""Charts show their numbers where they are, whoever looks at the SVG."""

from xml.etree import ElementTree

import pytest

from sslvit.reports import page
from sslvit.reports.charts import COLORS, column_chart

SVG = "{http://www.w3.org/2000/svg}"
SERIES = {"random <start>": [[3.0, 4.0], [5.0, 6.0]], "b": [[10.0, 1.0], [47.0, 2.0]]}


def drawn(series: dict[str, list[list[float]]], level: float) -> ElementTree.Element:
    return ElementTree.fromstring(page.alone(column_chart(series, x="layer", y="pixels", level=("evenly", level))))


def test_the_dots_of_a_column_chart_stand_at_their_values():
    root = drawn(SERIES, 20.0)
    words = {text.text: float(text.get("y")) for text in root.iter(f"{SVG}text")}
    assert {"layer", "1", "2", "pixels", "random <start>", "b", "- - evenly"} <= words.keys()
    nought, top = words["0"], words["50"]
    found = sorted(50 * (nought - 4 - float(dot.get("cy"))) / (nought - top) for dot in root.iter(f"{SVG}circle"))
    legend = found.pop()  # beside the plot, above all values
    assert legend > 47
    assert [round(value, 0) for value in found] == [3, 4, 5, 6]
    squares = [shape for shape in root.iter(f"{SVG}polygon") if shape.get("fill") == COLORS[1]]
    assert len(squares) == 4 + 1  # and one in the legend
    dashes = next(line for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray"))
    assert 50 * (nought - 4 - float(dashes.get("y1"))) / (nought - top) == pytest.approx(20, abs=0.1)


def test_a_column_chart_of_a_single_zero_has_an_axis_all_the_same():
    assert drawn({"one": [[0.0]]}, 0.0).find(f".//{SVG}circle") is not None
