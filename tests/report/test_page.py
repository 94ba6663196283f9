"""The page of a run shows what its folder holds, and is self-contained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from html_page import HtmlPage
from written_runs import ENVIRONMENT, opened, write_picture, write_run

from dgm.common.errors import UserError
from dgm.report.page import make_page
from dgm.report.pictures import evenly_spaced


def page_of(folder: Path) -> str:
    return make_page("x", [opened(folder)], [])


def text_of(folder: Path) -> str:
    return HtmlPage(page_of(folder)).text


@pytest.mark.parametrize(
    ("source", "shards", "shown"),
    [
        ("shapes", None, "shapes"),
        ("shapes", "/d/shapes-64", "shapes"),
        ("folder:/a/my cats", "/d/folder-my cats-0a1b2c3d", "folder:/a/my cats"),
        ("shapes", "/d/tars", "shards /d/tars"),
        (None, None, "null"),
    ],
)
def test_shards_that_are_not_of_the_source_are_named(
    tmp_path: Path, source: str | None, shards: str | None, shown: str
) -> None:
    settings = {"data": {"source": source, "shards": shards}}
    page = page_of(write_run(tmp_path / "x", [1.0], settings=settings))
    assert f">data</th><td>{shown}</td>" in page
    assert ("data.source: " in page) == (not shown.startswith("shards "))


def test_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    settings = {"data": {"shards": "https://a.b/c.tar"}}
    folder = write_run(tmp_path / "x", [2.0, 1.0], settings=settings)
    write_picture(folder / "samples" / "000000100.png")
    page = page_of(folder)
    sources = [a["src"] for _, a in HtmlPage(page).tags if "src" in a]
    assert len(sources) == 1 and str(sources[0]).startswith("data:image/png;base64,")
    assert not [t for t, a in HtmlPage(page).tags if t in ("link", "iframe", "base") or "href" in a]
    assert not [a for t, a in HtmlPage(page).tags if t == "script" and "src" in a]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp", page)
    assert "default-src 'none'" in page.replace("&#39;", "'")
    assert page.isascii()


def test_reporting_imports_no_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [2.0, 1.0])
    write_picture(folder / "samples" / "000000100.png")
    code = (
        "import sys, dgm.report.exercise, dgm.cli.report\n"
        "assert not {'torch', 'accelerate', 'matplotlib', 'plotly'} & set(sys.modules)\n"
        "from pathlib import Path; from dgm.report.page import make_page\n"
        f"from dgm.report.read_run import read_run; folder = Path({str(folder)!r})\n"
        "assert len(make_page('x', [read_run(folder, 'x', 'diffusion', {})], [])) > 1000\n"
        "print([name for name in ('torch', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_pictures_have_captions_and_damaged_ones_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [2.0, 1.0])
    for seen in range(100, 1100, 100):
        write_picture(folder / "samples" / f"{seen:09d}.png")
        write_picture(folder / "samples" / f"{seen:09d}-reconstructions.png")
    whole = (folder / "samples" / "000001000.png").read_bytes()
    (folder / "samples" / "000001000.png").write_bytes(whole[:50])
    (folder / "generated").mkdir()
    (folder / "generated" / "mine.png").write_text("no picture")
    page = page_of(folder)
    seen = [a["alt"] for t, a in HtmlPage(page).tags if t == "img"]
    assert seen == [
        *(f"x: samples, {k} images seen" for k in (100, 300, 500, 700)),
        "x: reconstructions, 1,000 images seen",
    ]
    assert "samples/000001000.png is left out" in page and "generated/mine.png is left out" in page


def test_first_and_last_grids_are_always_among_those_shown() -> None:
    grids = [(k, Path(str(k))) for k in range(17)]
    assert [k for k, _ in evenly_spaced(grids, 5)] == [0, 4, 8, 12, 16]
    assert [k for k, _ in evenly_spaced(grids, 1)] == [16] and evenly_spaced(grids, 0) == []


def test_fractions_are_in_percent(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [2.0, 1.0])
    found = {
        "images_seen": 200,
        "checkpoint": "0123abcd",
        "class_consistency": {
            "class_consistency": 0.975,
            "class_consistency_by_class": {"circle": 0.5},
            "spread_over_seeds": {"class_consistency": 0.0125},
            "by_seed": [{"class_consistency": 0.9625}, {"class_consistency": 0.9875}],
        },
        "distances_classifier": {"fd_classifier": 12.5, "num_generated": 500},
        "bits_per_dim": {"bound": 3.25, "error": 0.0125},
    }
    (folder / "evaluation.json").write_text(json.dumps(found))
    write_picture(folder / "neighbours-cifar.png")
    text = text_of(folder)
    assert "neighbours-cifar.png: generated images nearest to training images" in text
    assert "class consistency97.5 % ± 1.2 %" in text and "circle50.0 %" in text
    assert "bits/dim, bound3.25" in text and "FD-classifier12.5" in text and "not FID" in text
    assert "0123abcd" not in text and "spread" not in text and "0.9625" not in text


ACCELERATE = "accelerate launch --config_file launch/configs/accelerate"
NODES = "--num_machines 2 --main_process_ip HOST_OF_NODE_0 --main_process_port 29500"


@pytest.mark.parametrize(
    ("started", "command"),
    [
        ({}, "git checkout 0123456789abcdef\npython"),
        ({"engine": "DeepSpeed ZeRO-2, optimizer on the CPU on 2 processes", "world_size": 2},
         f"{ACCELERATE}/zero2_offload.yaml --num_processes 2"),
        ({"engine": "DDP on 8 processes", "world_size": 8, "num_nodes": 2},
         f"{ACCELERATE}/ddp_nodes.yaml --num_processes 8 {NODES} --machine_rank N"),
        ({"engine": "DeepSpeed ZeRO-2 on 8 processes", "world_size": 8, "num_nodes": 2},
         f"{ACCELERATE}/zero2.yaml --num_processes 8 {NODES} --machine_rank N"),
    ],
)  # fmt: skip
def test_command_is_that_of_the_engine_quoted_for_a_shell(
    tmp_path: Path, started: dict, command: str
) -> None:
    folder = write_run(tmp_path / "x", [2.0, 1.0])
    environment = {**ENVIRONMENT, "git_dirty": True, **started}
    (folder / "environment.json").write_text(json.dumps(environment))
    text = text_of(folder)
    assert f"{command} launch/train_ddpm.py --config 'my file.yaml' --run.dir runs/x" in text
    assert "uncommitted changes" in text
    for explained in ("On each of the 2 nodes", "0 to 1, for N"):
        assert (explained in text) == ("num_nodes" in started)


def test_energy_is_shown_with_what_it_covers(tmp_path: Path) -> None:
    gpu, packages = {"energy__gpu_kwh": [0.5, 1.25]}, {"energy__packages_kwh": [0.1, 0.2]}
    folder = write_run(tmp_path / "x", [2.0, 1.0], **gpu, **packages)
    text = text_of(folder)
    assert "energy of the GPU of the first process1.25 kWh" in text
    assert "energy of the processor packages of its machine0.2 kWh" in text and "logs0" not in text
    path = folder / "metrics.jsonl"  # whose last log was taken without a GPU
    path.write_text(path.read_text().replace(', "energy/gpu_kwh": 1.25', ""))
    other = write_run(tmp_path / "y", [2.0, 1.0])
    runs = [opened(folder), opened(other)]
    assert "0.5 kWh, read in 1 of 2 logs" in HtmlPage(make_page("x", runs[:1], [])).text
    page = make_page("both", runs, [])
    assert "kWh, GPU of the first process" in page and 'best">0.5' not in page
    assert "kWh" not in HtmlPage(make_page("y", runs[1:], [])).text


def test_cost_is_computed_from_the_log(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [2.0] * 10, time__save_s=[0.5] * 10)
    text = text_of(folder)
    assert "wall time until the last log20.0 s" in text
    assert "of which saving5.0 s (25.0 %)" in text
    assert "spent waiting for data6.67 %" in text  # 10 logs of 0.1 s, of the 15 s without saving
    assert "energy" not in text.lower()


def test_states_of_a_run(tmp_path: Path) -> None:
    assert opened(write_run(tmp_path / "done", [1.0, 1.0])).state == "finished"
    assert opened(write_run(tmp_path / "half", [1.0, 1.0], saved=100)).state == "stopped"
    new = write_run(tmp_path / "new", [1.0, 1.0], saved=0, age_s=1)
    assert opened(new).state == "still being written, no checkpoint yet"
    (new / "checkpoints" / "000000200").mkdir(parents=True)  # without a manifest it is none
    assert opened(new).saved is None


def test_a_torn_last_line_is_left_out_and_a_damaged_one_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [3.0, 2.0, 1.0])
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "images_s')
    assert len(opened(folder).lines) == 3
    path.write_text(whole.replace('{"step": 2,', '{"step": 2'))
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} is damaged in line 2 "):
        opened(folder)


def test_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "x", []))
    assert "Nothing was logged yet." in page and "application/" not in page
    assert "Observations" not in page and "Cost" not in page


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [2.0, 1.0])
    (folder / "evaluation.json").write_text("{")
    assert "evaluation.json is left out" in page_of(folder)
