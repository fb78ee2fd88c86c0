"""Charts show their numbers where they are, whoever looks at the SVG."""

from xml.etree import ElementTree

import pytest

from sslvit.reports import page
from sslvit.reports.charts import BOTTOM, COLORS, HEIGHT, apart
from sslvit.reports.pictures import distance_chart

SVG = "{http://www.w3.org/2000/svg}"
DISTANCES = {"random <start>": [[3.0, 4.0], [5.0, 6.0]], "b": [[10.0, 1.0], [47.0, 2.0]]}


def drawn(distances: dict[str, list[list[float]]], even: float) -> ElementTree.Element:
    return ElementTree.fromstring(page.alone(distance_chart(distances, even)))


def test_the_dots_of_a_chart_of_distances_stand_at_their_values():
    root = drawn(DISTANCES, 20.0)
    words = {text.text: float(text.get("y")) for text in root.iter(f"{SVG}text")}
    assert {"layer", "1", "2", "random <start>", "b", "attention spread evenly"} <= words.keys()
    nought, top = words["0"] - 4, words["50"] - 4

    def value(y: str) -> float:
        return 50 * (nought - float(y)) / (nought - top)

    (evenly,) = root.iter(f"{SVG}polyline")
    assert [value(point.split(",")[1]) for point in evenly.get("points").split()] == pytest.approx([20, 20], abs=0.1)
    circles = [(float(dot.get("cx")), value(dot.get("cy"))) for dot in root.iter(f"{SVG}circle")]
    *dots, label = sorted(circles)  # the label is beside the plot
    assert label[0] > dots[-1][0] + 20
    assert sorted(y for _, y in dots) == pytest.approx([3, 4, 5, 6], abs=0.1)
    assert len({round(x) for x, _ in dots}) == 2  # layers
    squares = [shape for shape in root.iter(f"{SVG}polygon") if shape.get("fill") == COLORS[1]]
    assert len(squares) == 4 + 1  # and one at the label


def test_labels_give_way_to_each_other_and_stay_inside():
    bottom = float(HEIGHT - BOTTOM)
    assert apart([100.0, 20.0]) == [100.0, 20.0]
    assert apart([50.0, 50.0, 55.0]) == [50.0, 66.0, 82.0]
    assert apart([bottom, 12.0, bottom, bottom]) == [bottom - 32, 12.0, bottom - 16, bottom]  # the one on top stays
    assert apart([]) == []


def test_a_chart_of_a_single_distance_of_zero_has_an_axis():
    assert drawn({"one": [[0.0]]}, 0.0).find(f".//{SVG}circle") is not None
