"""The page on what denoising and exploring left in a run folder."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from html_page import HtmlPage
from written_runs import opened, write_picture, write_run

from dgm.report.figures import save_denoising_curves, save_sweep_plots, sweep_curves
from dgm.report.page import make_page

PICTURES = (
    "steps-0050.png", "steps-0005.png", "curve.png", "interpolation.png", "quality.png",
)  # fmt: skip
EVIL = "<script>alert('\"1\"')</script>"


def row(steps: int, nearness: float) -> dict[str, float]:
    measures = ("psnr_db", "ssim", "feature_distance", "class_seen")
    names = [f"{measure}_{kind}" for measure in measures for kind in ("noised", "denoised")]
    return {"steps": steps, **dict.fromkeys(names, nearness)}


DENOISED: dict[str, Any] = {
    "images_seen": 4200, "num_images": 40, "num_timesteps": 1000, "sampler": "ddpm",
    "most_evaluations": 50, "class_seen_real": 0.975,
    "steps": [row(50, 0.5), row(5, 0.75)], "curve": [row(k, 1 / k) for k in (1, 10, 1000)],
}  # fmt: skip
REAL = {"fd_classifier": 0.5, "class_consistency": 0.9, "diversity": 0.25}
EXPLORED: dict[str, Any] = {
    "family": "diffusion", "images_seen": 4200, "notes": ["Guidance is left out."],
    "sheets": [{"file": "interpolation.png", "caption": "Interpolation between things"}],
    "interpolation": {
        "between": "test images", "along": "line", "mean_step": 0.125, "largest_over_mean": 1.5,
    },
    "traversal": {
        "moved": "latents that say most", "reach": 3,
        "rows": [{"latent": 7, "kl_nats": 2.5}, {"latent": 3, "kl_nats": 1.25}],
    },
    "settings": {
        "varied": ["guidance", "steps"], "num_images": 20, "sampler": "ddim", "real": REAL,
        "rows": [
            {"guidance": g, "steps": s, "fd_classifier": 10.0 / s, "class_consistency": 0.5,
             "diversity": 0.2, "seconds_per_image": 0.01 * s * g}
            for g in (1, 2) for s in (20, 5)
        ],
    },
}  # fmt: skip


def changed(found: dict[str, Any], *path: str | int, to: Any) -> dict[str, Any]:
    """Return a copy with one value changed."""
    whole = copy.deepcopy(found)
    place: Any = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return whole


def page_of(folder: Path, denoised: Any = None, explored: Any = None) -> str:
    write_run(folder, [2.0, 1.0])
    for name, found in (("denoised/denoising", denoised), ("explored/exploration", explored)):
        if found is not None:
            path = folder / f"{name}.json"
            path.parent.mkdir()
            path.write_text(found if isinstance(found, str) else json.dumps(found))
            for picture in PICTURES:
                write_picture(path.parent / picture)
    return make_page("x", [opened(folder, "x")], [])


def test_a_run_without_studies_has_no_section_for_them(tmp_path: Path) -> None:
    page = page_of(tmp_path / "x")
    assert "Denoised" not in page and "Explored" not in page


def test_denoising_is_shown_with_sheets_figures_and_curves(tmp_path: Path) -> None:
    page = page_of(tmp_path / "x", denoised=DENOISED)
    text = HtmlPage(page).text
    assert "40 test images, noised by some of the 1000 steps" in text and "97.5 %" in text
    alts = re.findall(r'alt="x: (\d+) steps of noise', page)
    assert alts == ["50", "5"] and page.count("data:image/png") == 3
    assert 'alt="x: Each metric over the number of noising steps"' in page
    assert "75.0 %" in text and "PSNR, dB, noised" in text
    assert re.findall(r"<tr><td[^>]*>([\d,]+)</td>", page) == ["1", "5", "10", "50", "1,000"]


def test_exploring_is_shown_with_sheets_figures_and_plots(tmp_path: Path) -> None:
    page = page_of(tmp_path / "x", explored=EXPLORED)
    text = HtmlPage(page).text
    assert "Guidance is left out." in text and 'alt="x: Interpolation between things"' in page
    assert "latents that say most" in text and "kl nats" in text
    assert "20 images by ddim at each setting" in text
    assert 'alt="x: Each metric over the varied setting' in page
    (table,) = re.findall(r"<caption>20 images.*?</table>", page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in rows]
    assert cells[1] == ["1", "20", "0.5", "50.0 %", "0.2", "0.2"]
    assert cells[-1] == ["–".encode("ascii", "xmlcharrefreplace").decode()] * 2 + [
        "0.5", "90.0 %", "0.25", "&#8211;",
    ]  # fmt: skip


def test_curves_are_over_time_where_steps_vary_and_else_over_the_value() -> None:
    x_key, curves = sweep_curves(EXPLORED["settings"])
    assert x_key == "seconds_per_image" and list(curves) == ["guidance 1", "guidance 2"]
    assert [r["steps"] for r in curves["guidance 1"]] == [5, 20]
    rows = [{"temperature": t} for t in (1.0, 0.5)]
    x_key, curves = sweep_curves({"varied": ["temperature"], "rows": rows})
    assert x_key == "temperature" and curves == {"generated": rows[::-1]}


def test_plots_as_files(tmp_path: Path) -> None:
    curve = [row(1, math.inf), row(10, math.nan), row(100, 1e308), row(1000, 0.5)]
    save_denoising_curves(curve, 0.975, tmp_path / "new" / "curve.png")
    save_sweep_plots(EXPLORED["settings"], tmp_path / "new" / "quality.png")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["curve.png", "quality.png"]
    assert all(p.read_bytes()[1:4] == b"PNG" for p in (tmp_path / "new").iterdir())


NO_JSON = "it cannot be read as a JSON object"
BAD_DENOISED = [
    ("{", NO_JSON),
    ("[1]", NO_JSON),
    ({}, "it is not as launch/denoise.py writes it (no list steps)"),
    (changed(DENOISED, "steps", 0, "ssim_noised", to="1"), "no number ssim_noised"),
    (changed(DENOISED, "steps", 0, "steps", to=True), "no number steps"),
    (changed(DENOISED, "curve", to=[1]), "no list curve"),
    (changed(DENOISED, "num_images", to=10**400), NO_JSON),
    (changed(DENOISED, "sampler", to=None), "no text sampler"),
]
BAD_EXPLORED = [
    ({"sheets": []}, "it is not as launch/explore.py writes it (no object settings)"),
    (changed(EXPLORED, "sheets", 0, "file", to="../samples/a.png"), "is not a picture in explored"),
    (changed(EXPLORED, "sheets", 0, "file", to="exploration.json"), "is not a picture in explored"),
    (changed(EXPLORED, "settings", "varied", to=[]), "nothing was varied"),
    (changed(EXPLORED, "settings", "varied", to=["x"]), "no number x"),
    (changed(EXPLORED, "settings", "real", "diversity", to=[]), "no number diversity"),
    (changed(EXPLORED, "traversal", "rows", 1, to={"latent": 3}), "no number kl_nats"),
    (changed(EXPLORED, "notes", to="text"), "no list notes"),
]


@pytest.mark.parametrize(
    ("name", "found", "reason"),
    [
        *(("denoised/denoising.json", *case) for case in BAD_DENOISED),
        *(("explored/exploration.json", *case) for case in BAD_EXPLORED),
    ],
)
def test_a_file_that_cannot_be_shown_is_named(
    tmp_path: Path, name: str, found: Any, reason: str
) -> None:
    text = HtmlPage(page_of(tmp_path / "x", **{name.split("/")[0]: found})).text
    assert f"{name} is left out: " in text and reason in text
    assert "Evaluation" not in text and "Cost" in text  # the rest of the page is there


def test_what_comes_from_the_files_is_escaped(tmp_path: Path) -> None:
    found = changed(EXPLORED, "sheets", 0, "caption", to=EVIL)
    found = changed(found, "notes", to=[EVIL])
    for place, key in (
        ("interpolation", "between"),
        ("traversal", "moved"),
        ("settings", "sampler"),
    ):
        found = changed(found, place, key, to=EVIL)
    rows = [{**r, EVIL: 1.0} for r in found["settings"]["rows"]]
    found = changed(changed(found, "settings", "rows", to=rows), "settings", "varied", to=[EVIL])
    found = changed(found, "traversal", "rows", to=[{EVIL: 1}])
    denoised = changed(DENOISED, "sampler", to=EVIL)
    page = page_of(tmp_path / "x", denoised=denoised, explored=found)
    assert page.count("<script>") == 1 and "alert('" not in page
    assert page.count("&lt;script&gt;") >= 8
    missing = changed(EXPLORED, "sheets", 0, "file", to=f"{EVIL.replace('/', '')}.png")
    assert page_of(tmp_path / "y", explored=missing).count("<script>") == 1
