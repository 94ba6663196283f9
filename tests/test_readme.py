"""The README's commands do what they say."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--train.global_batch 48 --train.samples_per_class 1 --train.compile none --data.source shapes"
)
SMALLER = {
    "train_ddpm.py": "--sample.steps 2 --model.channels 8",
    "train_gan.py": "--model.generator_channels 4 --eval.every_images 96 --eval.num_images 20",
    "train_vae.py": "--model.encoder_channels 4 --model.decoder_channels 4",
    "train_flow.py": "--model.steps 1 --model.hidden 8",
}
ALONE = ("python launch/", "accelerate launch launch/")  # on one process


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def made_small(command: str) -> str:
    """Leave a command as it is written, but that what it trains is tiny."""
    for script, options in SMALLER.items():
        if script in command and "--print_config" not in command:
            total = 192 if "--train.total_images" in command else 96  # a longer run goes on
            command += f" {TINY} --train.total_images {total} {options}"
    return command.replace("--num_processes", "--main_process_port 0 --num_processes")


@pytest.mark.slow
@pytest.mark.timeout(900)  # it takes one to three minutes
def test_commands_of_the_readme_run_in_order(
    run_warm: Callable, user_environment: dict[str, str], tmp_path: Path
) -> None:
    """Each runs as written, but that training is made tiny, and torch imported only once."""
    for name in ("launch", "dgm", "shards", "slurm", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    binaries = Path(sys.executable).parent
    environment = user_environment | {"PATH": f"{binaries}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(tmp_path)}
    ran = 0
    for command in map(made_small, commands()):
        words = shlex.split(command)
        if command.startswith(ALONE):
            script = next(k for k, word in enumerate(words) if word.startswith("launch/"))
            done = run_warm(*words[script:], cwd=tmp_path)
            code = done.code
        else:
            done = subprocess.run(
                words, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            code = done.returncode
        assert code == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 17
    starts = (tmp_path / "runs/engines/starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_seen"] for line in starts] == [0, 96]
    assert (tmp_path / "runs/small-ddpm-shapes/generated/guided.npz").is_file()
    assert list((tmp_path / "runs/debug/profile").iterdir())


def test_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"`((?:launch|dgm|shards|slurm)/[\w/.]*)`", (ROOT / "README.md").read_text())
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
