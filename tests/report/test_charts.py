"""Charts hold what was logged, and the page can draw them from what it holds."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from written_runs import opened, write_run

from dgm.report.charts import metric_chart, moving_average, thin
from dgm.report.page import make_page
from dgm.report.read_run import Curve


def curve(*values: float) -> Curve:
    return Curve([100.0 * (k + 1) for k in range(len(values))], list(values))


def chart(key: str, *values: float) -> dict[str, Any]:
    return metric_chart(key, {"x": (0, curve(*values))}).figure


def test_minimum_is_the_true_one_and_marked_once() -> None:
    found = metric_chart("train/loss", {"x": (0, curve(3.0, 0.5, 0.1234567, 0.7, 0.2))})
    assert found.values == ["min 0.1235 after 300 images, last 0.2"]
    line, mark = found.figure["data"]
    assert line["y"] == [3.0, 0.5, 0.123457, 0.7, 0.2] and line["x"][2] == 300
    assert (mark["x"], mark["y"]) == ([300], [0.123457])


def test_the_best_is_marked_only_where_one_direction_is_better() -> None:
    assert "max -1 after 200 images" in chart("train/elbo", -3, -1, -2)["data"][1]["hovertemplate"]
    assert len(chart("train/kl", 3, 1, 2)["data"]) == 1
    assert chart("train/kl", 3)["data"][0]["mode"] == "markers"


@pytest.mark.parametrize(
    ("values", "scale", "menus"),
    [((30, 3, 0.3), "log", 2), ((3, 2, 1), "linear", 2), ((30, 1, -1), "linear", 1)],
)
def test_axis_is_logarithmic_beyond_a_decade_of_positive_values(
    values: tuple[float, ...], scale: str, menus: int
) -> None:
    layout = chart("train/loss", *values)["layout"]
    assert layout["yaxis"]["type"] == scale and len(layout["updatemenus"]) == menus
    if menus == 2:
        buttons = layout["updatemenus"][1]["buttons"]
        assert [button["args"][0]["yaxis.type"] for button in buttons] == ["linear", "log"]


def test_smoothing_replaces_the_lines_only() -> None:
    curves = {"a": (0, curve(1, 3, 2)), "b": (3, curve(4, 4, 4))}
    figure = metric_chart("train/loss", curves, named=True).figure
    for button in figure["layout"]["updatemenus"][0]["buttons"]:
        values, lines = button["args"]
        assert lines == [0, 1] and [len(own) for own in values["y"]] == [3, 3]
        assert values["y"][1] == [4, 4, 4]
    assert [trace["name"] for trace in figure["data"]] == ["a", "b", "a", "b"]
    assert moving_average([1.0, 3.0], 0.5) == pytest.approx([1.0, 7 / 3])


def test_a_thinned_curve_keeps_its_extremes() -> None:
    values = [float(k % 7) for k in range(5000)]
    values[1234], values[4321] = -9.0, 99.0
    kept = thin(curve(*values))
    assert len(kept) < 700 and kept == sorted(kept) and {0, 1234, 4321, 4999} <= set(kept)


def test_the_page_can_draw_its_charts(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [3.0, 2.0, 1.0]) for name in ("a", "b")]
    page = make_page("two", [opened(folder) for folder in folders], [])
    figures = re.findall(r'<script type="application/json">(.*?)</script>', page)
    assert len(figures) == page.count('<div class="chart"') == 2
    for figure in figures:
        go.Figure(json.loads(figure))  # raises where Plotly does not know a property
    (packed,) = re.findall(r'<script type="application/gzip" id="plotly">(.*?)</script>', page)
    library = gzip.decompress(base64.b64decode(packed))
    assert library.decode() == get_plotlyjs()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    for text in (library, script.encode()):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        assert f"sha256-{digest}" in page
    assert len(page) < 2.5e6
