"""Names and settings are shown on a page as text, never as its tags or attributes."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from written_runs import ENVIRONMENT, opened, write_run

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


class Tags(HTMLParser):
    """Every tag and attribute of a page, and the content of its scripts by their type."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.other: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"]:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def unknown_decl(self, data: str) -> None:
        self.other.append(data)

    def handle_pi(self, data: str) -> None:
        self.other.append(data)


def assert_harmless(page: str) -> None:
    seen = Tags(page)
    assert set(seen.tags) <= TAGS, set(seen.tags) - TAGS
    assert seen.attributes <= ATTRIBUTES, seen.attributes - ATTRIBUTES
    assert seen.tags.count("style") == 1
    assert sorted(str(kind) for kind, _ in seen.scripts if kind != "application/json") == [
        "None", "application/gzip",
    ]  # fmt: skip
    figures = [json.loads(text) for kind, text in seen.scripts if kind == "application/json"]
    assert figures
    for trace in (trace for figure in figures for trace in figure["data"]):
        assert not set("<>") & set(trace["name"])  # Plotly takes tags in texts for markup
    assert not seen.other and all(source.startswith("data:image/png") for source in seen.sources)


@pytest.mark.parametrize("evil", EVIL)
def test_pages_hold_no_tag_or_attribute_of_others(tmp_path: Path, evil: str) -> None:
    settings = {"data": {"source": evil}, "optim": {"note": evil, evil: evil}}
    folder = write_run(tmp_path / "x", [3.0, 2.0, 1.0], settings=settings)
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
