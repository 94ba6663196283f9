"""Arguments reach the trainer unchanged, through YAML, JSON, a batch script and a shell.

submitit passes a job as a pickle file. `slurm.submit` writes it into the run folder, beside the
copy of the code that the job runs, so that it is as safe as that code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, log_of
from damage import examples
from hypothesis import given
from hypothesis import strategies as st
from optional import need
from tiny import LAUNCH

from dgm.cli.parser import parse
from dgm.cli.train_ddpm import Config
from dgm.common.run_files import read_config
from dgm.training.run_folder import as_yaml

need("submitit")

from dgm.common.errors import UserError
from dgm.common.yaml_io import write_yaml
from slurm.options import Options, Request, read_options
from slurm.preflight import Plan
from slurm.resources import Resources
from slurm.submission import Submission, run_in_process, submission_folder, submit
from slurm.sweep import read_sweep, words_of

TRAINER = str(LAUNCH / "train_ddpm.py")
HARD = [
    "two words", " around ", "it's", 'a "b"', "$HOME", "${HOME}", "`touch x`", "$(touch x)", "a;b",
    "a&&b", "a|b", "a>b", "a\\b", "a\\", "\\n", "ä☃", "-x", "--y", "--", "a#b", "a #b", "50%", "%j",
    "*", "?", "!x", "a=b", "a: b", "- x", "[x", "{x}", "1e3", "010", "true", "", "a,b", "'", '"',
    "a\nb", "\n", "a\tb", "@x", "(", "~x", "2020-01-01", "1:30", "=", "<x>",
]  # fmt: skip
ODD_NAME = 'it\'s a "run" $HOME `touch x` $(touch y) ;& # 50% * ä☃ (1)'
# YAML, and options that may be null, read these as null.
NOTHING = ("null", "Null", "NULL", "~", "#", "&", "!")
ENDS = "--"  # ends the options for argparse, also as a value
HARD_TEXT = st.one_of(
    st.sampled_from(HARD),
    st.text("ab $`'\"\\\n\t#:-{}[]&*!|>%@,?=~é☃", max_size=8),
).filter(lambda text: text.strip() and text != ENDS and not text.strip().startswith(NOTHING))

STAND_IN = """
import json, os, sys
with open(os.environ["DGM_RUN_FOLDER"] + "/argv.json", "w") as file:
    json.dump({"argv": sys.argv, "config": open(sys.argv[2]).read(), "cwd": os.getcwd()}, file)
"""
# Stand-ins for the Slurm commands that the batch script and the job call.
PROGRAMS = {
    "sbatch": 'printf "%s\\0" "$@" >> "$SBATCH_LOG"; echo "Submitted batch job 7"',
    "scontrol": '[ "$2" = hostnames ] && echo "$3" || echo "JobState=RUNNING Requeue=1"',
    "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"',
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the programs first in PATH; return the file to which sbatch writes its arguments."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, script in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "sbatch.log"))
    return tmp_path / "sbatch.log"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Submission]:
    """Return a function that makes a submission of one run, with a stand-in for the trainer."""

    def submission(run: Path, note: str = "x", **resources) -> Submission:
        config = {"run": {"dir": str(run)}, "note": note, "train": {"total_images": 1}}
        plan = Plan("", run, config, (1,), 0, "")
        script = tmp_path / "stand_in.py"
        script.write_text(STAND_IN)
        request = Request(str(script), Options(), Resources(gpus_per_node=0, **resources), [])
        return Submission(request, run / "slurm" / "now", [plan], {"ODD": "a 'b' $c\nd"})

    return submission


@pytest.mark.parametrize("name", [ODD_NAME, "--run="])
def test_a_batch_script_passes_arguments_unchanged(
    programs: Path, make: Callable, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    run = folder / name
    note = "\n".join(HARD)
    made = make(run, note, setup=["export FROM_SETUP='a  b'"])
    with submission_folder(made):
        (made.home / "code" / "launch" / "stand_in.py").write_text(STAND_IN)
        assert submit(made) == ["7"]
    log = programs.read_text().split("\0")[:-1]
    assert len(log) == 1 and log[0].startswith(f"{run}/slurm/now/submitit/")
    [script] = (made.home / "submitit").glob("*_submission.sh")
    variables = {
        **os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
        "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", script], cwd=folder, env=variables, capture_output=True, text=True, timeout=20
    )
    log = made.plans[0].state.log
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    found = json.loads((run / "argv.json").read_text())
    trainer = str(made.home / "code" / "launch" / "stand_in.py")
    assert found["argv"] == [trainer, "--config", str(run / "slurm" / "config.yaml")]
    assert yaml.safe_load(found["config"]) == {
        "run": {"dir": str(run)}, "note": note, "train": {"total_images": 1},
    }  # fmt: skip
    assert [path.name for path in folder.iterdir()] == [name]  # no command in the text was run


@pytest.mark.parametrize(
    ("run", "resources", "named"),
    [
        ("%j", {}, "would replace %j: choose"),
        ("50%a", {}, "would replace %a: choose"),
        ("%A/x", {}, "would replace %A: choose"),
        ("a\\b", {}, "would replace \\: choose"),
        ("a\nb", {}, "a\\nb"),
        ("a\n#SBATCH --wrap=x", {}, "#SBATCH"),
        ("a\x1b[2J", {}, "x1b"),
        ("a", {"partition": "p\n#SBATCH --wrap=x"}, "partition"),
        ("a", {"account": "p\rq"}, "account"),
        ("a", {"constraint": "p\x85q"}, "constraint"),
        ("a", {"mem": "1G\ntouch x"}, "mem"),
        ("a", {"sbatch": {"comment": "p\nq"}}, "comment"),
        ("a", {"sbatch": {"x\ntouch x": "q"}}, "touch"),
        ("a", {"sbatch": {"x=1 --wrap": "q"}}, "wrap"),
    ],
)
def test_text_that_changes_the_batch_script_is_refused(
    programs: Path, make: Callable, tmp_path: Path, run: str, resources: dict, named: str
) -> None:
    made = make(tmp_path / "runs" / run, **resources)
    with pytest.raises(UserError) as caught, submission_folder(made):
        submit(made)
    message = str(caught.value)
    assert "\n" not in message and named in message, message
    assert "line of #SBATCH" in message or "would replace" in message, message
    assert not programs.exists() and not (tmp_path / "runs").exists()


def test_values_of_sbatch_lines_are_quoted(programs: Path, make: Callable, tmp_path: Path) -> None:
    hard = [text for text in HARD if text.isprintable() and text != "true"]  # which is a flag
    for text in hard:
        made = make(tmp_path / "a", sbatch={"comment": text})
        executor = made.executor()
        lines = executor._make_submission_file_text("true", "x").split("\n")
        [line] = [line for line in lines if line.startswith("#SBATCH --comment=")]
        assert words_of_slurm(line) == ["#SBATCH", f"--comment={text}"]


def words_of_slurm(line: str) -> list[str]:
    """Split a line into words as sbatch does: a backslash escapes also in quotes."""
    words, word, quote, started = [], "", "", False
    letters = iter(line)
    for letter in letters:
        if letter == "\\":
            word, started = word + next(letters), True
        elif quote:
            quote, word = ("", word) if letter == quote else (quote, word + letter)
        elif letter in "'\"":
            quote, started = letter, True
        elif letter.isspace():
            words, word, started = ([*words, word] if started else words), "", False
        elif letter == "#" and words:
            break
        else:
            word, started = word + letter, True
    assert not quote
    return [*words, word] if started else words


@pytest.mark.slow
@examples(25)
@given(text=HARD_TEXT)
def test_values_of_a_sweep_reach_the_trainer(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(write_yaml({"sets": {"a": {"run.dir": text, "data": {"shards": text}}}}))
    config = parse(Config, "ddpm_tiny.yaml", words_of(read_sweep(path)["a"]))
    assert (config.run.dir, config.data.shards) == (text, text)
    # The job passes the config.yaml that the trainer wrote.
    snapshot = tmp_path / "config.yaml"
    snapshot.write_text(write_yaml(yaml.safe_load(as_yaml(config))))
    again = parse(Config, "", ["--config", str(snapshot)])
    assert again == config and read_config(snapshot)["run.dir"] == text


@examples(25)
@given(text=HARD_TEXT)
def test_options_survive_the_command_line_and_a_cluster_file(tmp_path: Path, text: str) -> None:
    options = [f"--account={text}", f"--sbatch={json.dumps({'comment': text})}"]
    options += [f"--setup={json.dumps([text, text])}"]
    profile = tmp_path / "mine.yaml"
    profile.write_text("nodes: 1\n")
    first = read_options([TRAINER, "--cluster", str(profile), *options, "--", text, "--x", text])
    profile.write_text(
        write_yaml({"account": text, "sbatch": {"comment": text}, "setup": [text, text]})
    )
    second = read_options([TRAINER, "--cluster", str(profile), "--", text, "--x", text])
    for found in (first, second):
        resources = found.resources
        assert resources.account == text and resources.setup == [text, text]
        assert resources.sbatch == {"comment": text} and found.overrides == [text, "--x", text]


def test_a_local_job_passes_arguments_unchanged(make: Callable, tmp_path: Path) -> None:
    run = tmp_path / "runs" / 'it\'s\n"$HOME" `x` \\'
    made = make(run, "\n".join(HARD))
    with submission_folder(made):
        script = made.home / "code" / "launch" / "stand_in.py"
        script.write_text(STAND_IN)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(dataclasses.asdict(made.job(made.plans[0]))))
    done = subprocess.run(
        [sys.executable, "-m", "slurm.job", str(path)], cwd=LAUNCH.parent, timeout=60
    )
    assert done.returncode == 0, made.plans[0].state.log.read_text()
    found = json.loads((run / "argv.json").read_text())
    assert found["argv"] == [str(script), "--config", str(run / "slurm" / "config.yaml")]


@pytest.mark.parametrize(("note", "private"), [("https://me:secret@host/x", True), ("x", False)])
def test_a_configuration_with_credentials_is_private(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str, private: bool
) -> None:
    submission = make(tmp_path / "run", note)
    monkeypatch.setattr(sys, "argv", [])
    script = tmp_path / "debug.py"
    script.write_text("import os, sys; os.chmod(sys.argv[0], os.stat(sys.argv[2]).st_mode)")
    run_in_process(submission.plans[0], str(script), {})
    with submission_folder(submission):
        paths = [script, *(submission.home / "configs").iterdir()]
    assert [path.stat().st_mode & 0o077 == 0 for path in paths] == [private, private]


@pytest.mark.slow
def test_a_real_cluster_takes_any_name(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    run = cluster.submit(folder / ODD_NAME, steps=2)
    cluster.wait(run, "done")
    assert [path.name for path in folder.iterdir()] == [ODD_NAME], log_of(run)
    [log] = run.folder.glob("*/submitit/*_log.out")
    assert log.name == f"{cluster.job(run)}_0_log.out"
    assert (run.path / "metrics.jsonl").is_file() and (run.path / "loss.png").is_file()
