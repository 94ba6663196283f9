"""Several runs on a page: which are ranked, drawn together and marked, and which failed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from written_runs import opened, write_checkpoint, write_run

from dgm.report.page import make_page
from dgm.report.read_run import find_failure, sweep_folders


def test_runs_side_by_side_sort_and_mark_the_best(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", [3.0, 1.0, 2.0], settings={"optim": {"lr": 0.01}}),
        write_run(tmp_path / "b", [3.0, 2.5, 1.5]),
    ]
    for folder, consistency in zip(folders, (0.25, 0.75), strict=True):
        (folder / "evaluation.json").write_text(json.dumps({"class_consistency": consistency}))
    page = make_page("2 runs", [opened(folder) for folder in folders], [])
    table = page[page.index('<table class="sortable"') :]
    table = table[: table.index("</table>")]
    heads = re.findall(r'<button type="button">(.*?)</button>', table)
    assert heads[:4] == ["run", "optim.lr", "train/loss, final", "train/loss, min"]
    assert "run.dir" not in heads
    rows = re.findall(r"<tr>(<th scope=\"row\".*?)</tr>", table)
    cells = [re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", row) for row in rows]
    best = {
        (heads[k], r) for r, row in enumerate(cells) for k, c in enumerate(row) if "best" in c[0]
    }
    assert best == {
        ("train/loss, final", 1),
        ("train/loss, min", 0),
        ("class consistency", 1),
    }  # not images/s, which are equal
    assert all('data-value="' in attributes for row in cells for attributes, _ in row)
    assert "a: min 1 after 200 images" in page


def test_of_many_runs_the_best_eight_are_drawn(tmp_path: Path) -> None:
    runs = [opened(write_run(tmp_path / f"r{k}", [9.0, 10.0 - k])) for k in range(10)]
    page = make_page("10 runs", runs, [])
    assert "Of 10 runs the 8 with the lowest final loss are drawn." in page
    assert "r2: min" in page and "r9: min" in page
    assert "r0: min" not in page and "r1: min" not in page


def test_losses_of_several_families_are_neither_ranked_nor_drawn_together(tmp_path: Path) -> None:
    runs = [
        opened(write_run(tmp_path / "d", [3.0, 2.0])),
        opened(write_run(tmp_path / "v", [6.0, 5.0], family="vae"), family="vae"),
    ]
    page = make_page("2 runs", runs, [])
    assert page.count("<figcaption>train/loss</figcaption>") == 2
    assert "d: min 2 after" in page and "v: min 5 after" in page
    assert "number best" not in page  # images/s are equal


def test_failures_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "config.yaml").write_text("")  # of the sweep's jobs, no run
    write_run(tmp_path / "well", [2.0, 1.0])
    write_run(tmp_path / "none", [2.0, 1.0], saved=0)
    mistaken, fault = tmp_path / "mistaken", write_run(tmp_path / "fault", [2.0, 1.0], saved=100)
    for folder, verdict, code in ((mistaken, "mistake", 2), (fault, "fault", 1)):
        (folder / "slurm").mkdir(parents=True)
        end = {"event": "end", "verdict": verdict, "code": code, "next": "nothing"}
        lines = [{"event": "start"}, end]
        (folder / "slurm" / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (mistaken / "slurm" / "log.txt").write_text("hello\nerror: optim.lr is <9>\nbye\n")
    names = [path.name for path in sweep_folders(tmp_path)]
    assert names == ["fault", "mistaken", "none", "well"]
    found = [f for path in sweep_folders(tmp_path) if (f := find_failure(path, path.name))]
    assert [(f.name, f.reason, f.error) for f in found] == [
        (
            "fault",
            "fault, exit code 1, then nothing, after a checkpoint at 100 images, 1 start",
            "",
        ),
        ("mistaken", "mistake, exit code 2, then nothing, 1 start", "error: optim.lr is <9>"),
        ("none", "no checkpoint", ""),
    ]
    page = make_page("sweep", [opened(tmp_path / "well")], found)
    assert "optim.lr is &lt;9&gt;" in page and "<caption>Runs that failed" in page
    write_checkpoint(tmp_path / "none", 200)
    assert find_failure(tmp_path / "none", "none") is None
