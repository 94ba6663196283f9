"""Names and settings are shown on a page as text, never as its tags or attributes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from html_page import HtmlPage
from written_runs import ENVIRONMENT, opened, write_picture, write_run

from dgm.report.exercise import Exercise, exercise_page
from dgm.report.hypothesis_check import Hypothesis, parse_metric
from dgm.report.page import make_page
from dgm.report.read_run import Failure

EVIL = [
    "<script>alert(1)</script>", "</style><script>x</script>", '"><img src=x onerror=alert(1)>',
    "' onmouseover='x", "</title><svg onload=x>", "<!--", "]]><b>", "javascript:x", "&lt;i&gt;",
    "\u2028<i>", "</pre></code><iframe>",
]  # fmt: skip
TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "script", "h1", "h2", "h3", "p",
    "table", "caption", "thead", "tbody", "tr", "th", "td", "button", "div", "ul", "li", "details",
    "summary", "pre", "code", "figure", "figcaption", "img",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "scope", "type", "data-value",
    "id", "role", "aria-label", "src", "alt", "width", "height",
}  # fmt: skip


def assert_harmless(page: str) -> None:
    found = HtmlPage(page)
    tags = [tag for tag, _ in found.tags]
    attributes = {name for _, own in found.tags for name in own}
    assert set(tags) <= TAGS, set(tags) - TAGS
    assert attributes <= ATTRIBUTES, attributes - ATTRIBUTES
    assert tags.count("style") == 1 and not found.other
    for source in (own[name] for _, own in found.tags for name in ("src", "href") if name in own):
        assert str(source).startswith("data:image/png")
    figures = [json.loads(text) for kind, text in found.scripts if kind == "application/json"]
    assert figures and tags.count("script") == len(found.scripts) == len(figures) + 2
    assert {kind for kind, _ in found.scripts} == {None, "application/json", "application/gzip"}
    for trace in (trace for figure in figures for trace in figure["data"]):
        assert not set("<>") & set(trace["name"])  # Plotly takes tags in texts for markup


@pytest.mark.parametrize("evil", EVIL)
def test_pages_hold_no_tag_or_attribute_of_others(tmp_path: Path, evil: str) -> None:
    settings = {"data": {"source": evil}, "optim": {"note": evil, evil: evil}}
    folder = write_run(tmp_path / "x", [3.0, 2.0, 1.0], settings=settings)
    write_picture(folder / "samples" / f"000000100-{evil.replace('/', '')}.png")
    with open(folder / "metrics.jsonl", "a") as file:
        for seen in (400, 500):
            line = {"images_seen": seen, f"train/{evil}": 1.0, f"train/{evil}/loss": 2.0}
            file.write(json.dumps({**line, f"eval/{evil}": 1.0, f"time/{evil}_s": 1.0}) + "\n")
    environment = {**ENVIRONMENT, "engine": evil, "git_commit": evil, evil: {evil: [evil]},
                   "command": [evil, "--x", evil], "devices": [evil]}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    start = {"time": evil, "images_seen": 0, "changed": {evil: [evil, {evil: 1}]}, "engine": evil}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    by_class = {f"{name}_by_class": {evil: 0.5} for name in ("class_consistency", evil)}
    (folder / "evaluation.json").write_text(
        json.dumps({evil: {evil: 1.0}, "x": evil, "class_consistency": by_class})
    )
    other = opened(write_run(tmp_path / "y", [2.0, 1.0]), evil + "2")
    run = opened(folder, evil)
    failures = [Failure(evil, evil, f"error: {evil}")]
    assert_harmless(make_page(evil, [run], []))
    assert_harmless(make_page(evil, [run, other], failures))
    metric = parse_metric(f"final train/{evil.replace(' ', '')}/loss")
    hypothesis = Hypothesis(evil, metric, True, evil, "other")
    exercise = Exercise(evil, evil, [hypothesis], [metric], [metric], True, ["samples"])
    groups = {evil: [run], "other": [other]}
    assert_harmless(exercise_page(exercise, groups, [evil, evil]))
