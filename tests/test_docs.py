"""The commands of README and docs run, and their links exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dgm.cli import reference

ROOT = Path(__file__).resolve().parents[1]
# In the order in which a reader meets them: later pages use the runs of earlier ones.
PAGES = ["README.md", *(f"docs/{name}.md" for name in (
    "training", "engines", "data", "sampling", "evaluation", "exploring", "library", "reports",
    "exercises", "slurm", "performance", "reliability", "results", "architecture", "contributing",
    "reference",
))]  # fmt: skip
BLOCK = re.compile(r"((?:<!-- not run: [^>]*-->\n)?)```(\w*)\n(.*?)```", re.DOTALL)
SMALL = (
    "--train.global_batch 48 --train.samples_per_class 1 --train.compile none --data.source shapes"
)
SMALLER = {
    "train_ddpm.py": "--sample.steps 2 --model.channels 8",
    "train_gan.py": "--model.generator_channels 4 --eval.every_images 96 --eval.num_images 20",
    "train_vae.py": "--model.encoder_channels 4 --model.decoder_channels 4",
    "train_flow.py": "--model.steps 1 --model.hidden 8",
}
IN_THIS_PROCESS = ("python launch/", "accelerate launch launch/")  # one process: by run_warm


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Return for each code block the reason not to run it, if any, its language and its text."""
    return BLOCK.findall((ROOT / page).read_text())


def commands() -> list[str]:
    found = [text for page in PAGES for _, kind, text in blocks(page) if kind == "bash"]
    return [line for text in found for line in text.splitlines() if line.strip()]


def made_small(command: str) -> str:
    """Return a command, with options for a tiny model if it trains."""
    for script, options in SMALLER.items():
        if script in command and "--print_config" not in command:
            total = 192 if "--train.total_images" in command else 96  # a longer run is resumed
            command += f" {SMALL} --train.total_images {total} {options}"
    return command.replace("--num_processes", "--main_process_port 0 --num_processes")


@pytest.mark.slow
@pytest.mark.timeout(900)  # it takes one to three minutes
def test_commands_run_in_order(
    run_warm: Callable, user_environment: dict[str, str], tmp_path: Path
) -> None:
    """Each runs as written, except that training is tiny."""
    for name in ("launch", "dgm", "shards", "slurm", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    binaries = Path(sys.executable).parent
    environment = user_environment | {"PATH": f"{binaries}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(tmp_path)}
    for command in map(made_small, commands()):
        words = shlex.split(command, comments=True)
        if command.startswith(IN_THIS_PROCESS):
            script = next(k for k, word in enumerate(words) if word.startswith("launch/"))
            done = run_warm(*words[script:], cwd=tmp_path)
            code = done.code
        else:
            done = subprocess.run(
                words, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            code = done.returncode
        assert code == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    starts = (tmp_path / "runs/engines/starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_seen"] for line in starts] == [0, 96]
    assert (tmp_path / "runs/small-ddpm-shapes/generated/guided.npz").is_file()
    assert list((tmp_path / "runs/debug/profile").iterdir())


@pytest.mark.slow
def test_python_of_readme_and_notebook_runs(
    tiny_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert cells == [text.rstrip() for _, _, text in blocks("docs/library.md")]
    shutil.copytree(tiny_run("diffusion"), tmp_path / "runs" / "small-ddpm-shapes")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for text in [*(t for _, kind, t in blocks("README.md") if kind == "python"), *cells]:
        exec(compile(text, "cell", "exec"), namespace)
    assert namespace["images"].shape == (64, 32, 32, 3) and namespace["run"].images_seen == 320
    assert namespace["results"]["cost"]["num_parameters"] > 0


def test_every_page_is_listed_and_every_block_is_run_or_excused() -> None:
    assert {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} | {"README.md"} == set(PAGES)
    for page in PAGES:
        for reason, kind, text in blocks(page):
            run = kind == "bash" or (kind == "python" and page in ("README.md", "docs/library.md"))
            assert run or reason, f"{page}: neither run nor excused:\n{text}"


def test_files_and_pages_that_are_named_exist() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        named = re.findall(r"`((?:launch|dgm|shards|slurm|tests|docs)/[\w/.]*[\w/])`", text)
        links = re.findall(r"\]\((?!http|#)([^)#]+)", text)
        missing = [name for name in named if not (ROOT / name).exists()]
        missing += [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
        assert not missing, f"{page}: {missing}"


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_reference_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    reference.main()
    assert (ROOT / "docs" / "reference.md").read_text() == capsys.readouterr().out
    used = set()
    for folder in ("dgm", "shards", "slurm", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r"\bDGM_[A-Z_]+\b", path.read_text()))
    assert used == {name for name in reference.ENVIRONMENT if name.startswith("DGM_")}
