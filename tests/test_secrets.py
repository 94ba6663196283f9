"""No secret of the environment, the command line or an address is written or printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from optional import need
from written_runs import ENVIRONMENT, opened, write_run

from dgm.common.errors import UserError
from dgm.common.redact import without_password
from dgm.report.page import make_page
from dgm.training.run_folder import describe_machine

ROOT = Path(__file__).resolve().parents[1]
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "hidden-1", "HF_TOKEN": "hidden-2", "MY_PASSWORD": "hidden-3",
    "WANDB_API_KEY": "hidden-4",
}  # fmt: skip
ADDRESS = "https://me:hidden-5@host/x/{000..004}.tar?token=hidden-6&a=1"


def test_passwords_and_tokens_of_addresses_are_hidden() -> None:
    assert without_password(ADDRESS) == "https://***@host/x/{000..004}.tar?token=***&a=1"
    assert without_password("s3://b/x?X-Amz-Signature=ab%2F&y=2") == (
        "s3://b/x?X-Amz-Signature=***&y=2"
    )
    for plain in ("https://host/a@b", "a@b.c", "--key=3", "https://host/?page=3", "ssh a@b://c"):
        assert without_password(plain) == plain


def test_machine_and_command_are_written_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_ddpm.py", "--data.shards", ADDRESS])
    text = json.dumps(describe_machine())
    assert "hidden" not in text and "host/x" in text


def test_no_secret_is_shown_on_a_page(tmp_path: Path) -> None:
    settings = {"data": {"source": "x", "shards": ADDRESS, "test_shards": ADDRESS}}
    folder = write_run(tmp_path / "x", [3.0, 2.0, 1.0], settings=settings)
    environment = {**ENVIRONMENT, "command": ["train_ddpm.py", f"--data.shards={ADDRESS}"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    page = make_page("x", [opened(folder), opened(write_run(tmp_path / "y", [1.0]))], [])
    assert "hidden-" not in page and "***@host/x" in page


def test_a_failed_fetch_does_not_show_the_password(tmp_path: Path, monkeypatch) -> None:
    from shards.reader import open_shards

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for spec in ("none://me:hidden@127.0.0.1:9/x.tar", "file://me:hidden@127.0.0.1:9/x.tar"):
        with pytest.raises(UserError, match="could not be fetched") as caught:
            open_shards(spec)
        assert "hidden" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_no_secret_is_in_any_file_of_a_run(
    run_warm: Callable, tiny_config: Path, tmp_path: Path
) -> None:
    script = ROOT / "launch" / "train_ddpm.py"
    words = [script, "--config", tiny_config, "--run.dir", tmp_path / "run"]
    done = run_warm(*words, variables=SECRETS)
    assert done.code == 0, done.stderr
    done = run_warm(ROOT / "launch" / "report.py", tmp_path / "run", variables=SECRETS)
    assert done.code == 0, done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8 and not [p for p in files if b"hidden-" in p.read_bytes()]


def test_no_secret_is_in_what_is_submitted(tmp_path: Path) -> None:
    """Only the configuration of a job has the whole address, readable for its owner only."""
    need("submitit")
    code = f"""
import sys
from pathlib import Path
from slurm.preflight import Plan
from slurm.options import Request, Options
from slurm.resources import Resources
from slurm.submission import Submission, write_job
run = Path({str(tmp_path / "run")!r})
config = {{"data": {{"shards": {ADDRESS!r}}}, "train": {{"total_images": 1}}}}
plan = Plan("", run, config, (1,), 0, "")
made = Submission(Request("x.py", Options(), Resources(gpus_per_node=0), []), run / "slurm" / "now",
                  [plan], {{}})
made.home.mkdir(parents=True)
made.write()
made.job(plan).snapshot(plan.state)
sys.argv = ["submit", {ADDRESS!r}]
write_job(made, plan, cluster="local", job="local-1", pid=1)
"""
    variables = {**os.environ, **SECRETS}
    done = subprocess.run([sys.executable, "-c", code], env=variables, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    with_secret = {
        path.relative_to(tmp_path / "run" / "slurm"): path.stat().st_mode & 0o777
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and b"hidden-" in path.read_bytes()
    }
    assert with_secret == {Path("now/configs/run.yaml"): 0o600, Path("config.yaml"): 0o600}
