"""Bad inputs of the other scripts of launch/."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.bad_inputs.case import (
    HUGE,
    Case,
    Preparation,
    copied,
    flipped,
    made,
    written,
)

SAMPLE = "python launch/sample.py"
SAMPLING = [
    Case(f"{SAMPLE}", "required: run", "", "see --help"),
    Case(f"{SAMPLE} nowhere", "nowhere", "no config.yaml", "name one of runs/", needs="runs/ddpm"),
    Case(f"{SAMPLE} ddpm.yaml", "ddpm.yaml", "is not a run folder", "did you mean runs/ddpm?",
         needs="runs/ddpm"),
    Case(f"{SAMPLE} ''", "run is", "''", "give a value"),
    Case(f"{SAMPLE} young", "young", "no complete checkpoint", "train it first",
         copied("runs/ddpm", "young", lambda run: shutil.rmtree(run / "checkpoints")),
         needs="runs/ddpm"),
    Case(f"{SAMPLE} hurt --checkpoint 32", "hurt/checkpoints", "cannot be used", "choose another",
         copied("runs/ddpm", "hurt", flipped("checkpoints/*/ema*")),
         needs="runs/ddpm"),
    Case(f"{SAMPLE} runs/ddpm --checkpoint last", "--checkpoint is", "last", "or best"),
    Case(f"{SAMPLE} runs/ddpm --checkpoint ²", "--checkpoint is", "²", "or best"),
    Case(f"{SAMPLE} runs/ddpm --checkpoint 99", "checkpoint", "99", "choose 32"),
    Case(f"{SAMPLE} runs/ddpm --checkpoint best", "runs/ddpm", "no best checkpoint", "eval.every"),
    Case(f"{SAMPLE} runs/ddpm --per_class 0", "--per_class is", "0", "1 to"),
    Case(f"{SAMPLE} runs/ddpm --per_class 100000000", "--per_class is", "100000000", "1 to"),
    Case(f"{SAMPLE} runs/ddpm --per_klass 3", "--per_klass", "3", "did you mean --per_class?"),
    Case(f"{SAMPLE} runs/ddpm --classes dragon", "--classes names", "'dragon'", "ring"),
    Case(f"{SAMPLE} runs/ddpm --classes ''", "--classes is", "''", "leave it out"),
    Case(f"{SAMPLE} runs/ddpm --seed -1", "--seed is", "-1", "0 or more"),
    Case(f"{SAMPLE} runs/ddpm --seed {HUGE}", "--seed is", HUGE, "below 2**64"),
    Case(f"{SAMPLE} runs/ddpm --steps 0", "sample.steps is", "0", "1 to 1000"),
    Case(f"{SAMPLE} runs/ddpm --batch 0", "sample.batch is", "0", "1 or more"),
    Case(f"{SAMPLE} runs/ddpm --sampler euler", "sampler", "euler", "ddim"),
    Case(f"{SAMPLE} runs/ddpm --guidance .nan", "--guidance is", "nan", "give a number"),
    Case(f"{SAMPLE} runs/ddpm --guidance -2", "sample.guidance is", "-2", "0 or more"),
    Case(f"{SAMPLE} runs/ddpm --average maybe", "average", "maybe", "true or false"),
    Case(f"{SAMPLE} runs/ddpm --temperature 1", "--temperature", "1", "sampler, steps"),
    Case(f"{SAMPLE} runs/gan --sampler ddim", "--sampler", "ddim", "temperature"),
    Case(f"{SAMPLE} runs/flow --temperature 0", "sample.temperature is", "0", "above 0"),
    Case(f"{SAMPLE} runs/flow --classes ring", "--classes is", "ring", "omit it"),
    Case(f"{SAMPLE} runs/ddpm --out .", "--out is", ".", "name a new or empty folder"),
    Case(f"{SAMPLE} runs/ddpm --out notes/made", "--out is", "notes", "name another path",
         written("notes", "mine")),
    Case(f"{SAMPLE} runs/ddpm --out x.png", "--out is", "x.npz", "move that",
         written("x.npz", "mine")),
    Case(f"{SAMPLE} runs/ddpm --out x.npz", "--out is", "x.png", "name another file",
         written("x.png", "mine")),
    Case(f"{SAMPLE} runs/ddpm --out locked/made", "--out is", "locked", "name another path",
         made("locked", 0o555), without_rights=True),
]  # fmt: skip

EVALUATE = "python launch/evaluate.py"
EVALUATING = [
    Case(f"{EVALUATE} runs/ddpm --metrics beauty", "--metrics names", "'beauty'", "diversity"),
    Case(f"{EVALUATE} runs/ddpm --metrics ''", "--metrics is", "''", "leave it out"),
    Case(f"{EVALUATE} runs/gan --metrics bits_per_dim", "--metrics is", "bits_per_dim",
         "choose distances"),
    Case(f"{EVALUATE} runs/flow --metrics class_consistency", "--metrics is", "class_consistency",
         "choose diversity"),
    Case(f"{EVALUATE} runs/vae --metrics loss_by_timestep", "runs/vae", "loss_by_timestep",
         "out of --metrics"),
    Case(f"{EVALUATE} runs/ddpm --num_images 1000000000000", "--num_images is", "00", "1 to 1000"),
    Case(f"{EVALUATE} runs/ddpm --num_images 5", "generated images", "5", "--num_images"),
    Case(f"{EVALUATE} runs/ddpm --num_images 20 --per_class 2", "--per_class", "2",
         "leave one out"),
    Case(f"{EVALUATE} runs/ddpm --metrics cost,reconstruction", "runs/ddpm", "vae runs",
         "out of --metrics"),
    Case(f"{EVALUATE} runs/ddpm --features vgg", "features", "vgg", "inception"),
    Case(f"{EVALUATE} runs/ddpm --seeds 0", "--seeds is", "0", "1 or more"),
    Case(f"{EVALUATE} runs/ddpm --epochs -1", "--epochs is", "-1", "1 or more"),
    Case(f"{EVALUATE} runs/vae --importance_samples -1", "--importance_samples is", "-1",
         "0 or more"),
    Case(f"{EVALUATE} runs/flow --importance_samples 5", "--importance_samples is", "5",
         "leave it out"),
    Case(f"{EVALUATE} runs/ddpm --metrics bits_per_dim_ode --ode_steps 7", "--ode_steps is", "7",
         "8 or more"),
    Case(f"{EVALUATE} runs/ddpm --metrics bits_per_dim_ode --ode_tolerance 0",
         "--ode_tolerance is", "0", "above 0"),
    Case(f"{EVALUATE} runs/ddpm --metrics bits_per_dim_ode --ode_tolerance nan",
         "ode_tolerance is", "nan", "give a number"),
    Case(f"{EVALUATE} runs/ddpm --weights w.pth", "--weights is", "w.pth", "--features inception"),
    Case(f"{EVALUATE} runs/ddpm --features inception --weights w.pth", "w.pth", "", "download",
         slow=True),
    Case(f"{EVALUATE} moved", "data.shards", "elsewhere", "put them back",
         copied("runs/ddpm", "moved", lambda run: _with_other_shards(run)),
         needs="runs/ddpm"),
    Case(f"{EVALUATE} runs/ddpm --metrics class_consistency --test_shards nowhere", "nowhere",
         "do not exist", "build"),
    Case(f"{EVALUATE} locked", "locked", "may not be written to", "change its mode",
         copied("runs/ddpm", "locked", lambda run: run.chmod(0o555)),
         needs="runs/ddpm",
         without_rights=True),
]  # fmt: skip


def _with_other_shards(run: Path) -> None:
    """Change the shards of a run to a missing folder."""
    path = run / "config.yaml"
    path.write_text(re.sub(r"(?m)^  shards: .*$", "  shards: elsewhere", path.read_text()))


DENOISE, EXPLORE = "python launch/denoise.py", "python launch/explore.py"
LOOKING = [
    Case(f"{DENOISE} runs/gan", "runs/gan", "gan run", "name a diffusion run"),
    Case(f"{DENOISE} runs/ddpm --steps 50,,x", "--steps is", "'50,,x'", "whole numbers"),
    Case(f"{DENOISE} runs/ddpm --steps ''", "--steps is", "''", "give a value"),
    Case(f"{DENOISE} runs/ddpm --steps 0", "--steps names", "0", "1 to 1000"),
    Case(f"{DENOISE} runs/ddpm --steps 5,9999", "--steps names", "9999", "1 to 1000"),
    Case(f"{DENOISE} runs/ddpm --num_images 0", "--num_images is", "0", "1 or more"),
    Case(f"{DENOISE} runs/ddpm --epochs 0", "--epochs is", "0", "1 or more"),
    Case(f"{DENOISE} runs/ddpm --sampler magic", "sampler", "magic", "ddim"),
    Case(f"{DENOISE} runs/ddpm --curve -1", "--curve is", "-1", "0 to 1000"),
    Case(f"{DENOISE} runs/ddpm --guidance .inf", "--guidance is", "inf", "give a number"),
    Case(f"{DENOISE} runs/ddpm --out notes", "--out is", "notes", "name another",
         written("notes", "mine")),
    Case(f"{EXPLORE} runs/ddpm --guidance 1,-2", "--guidance names", "-2", "0 or more"),
    Case(f"{EXPLORE} runs/ddpm --guidance ''", "--guidance is", "''", "give a value"),
    Case(f"{EXPLORE} runs/ddpm --steps 5,2000", "--steps names", "2000", "1 to 1000"),
    Case(f"{EXPLORE} runs/gan --guidance 1", "--guidance", "1", "temperature"),
    Case(f"{EXPLORE} runs/gan --temperature nan", "--temperature names", "nan", "above 0"),
    Case(f"{EXPLORE} runs/flow --temperature 0.7,0", "--temperature names", "0.0", "above 0"),
    Case(f"{EXPLORE} runs/flow --sampler ddim", "--sampler", "ddim", "temperature"),
    Case(f"{EXPLORE} runs/ddpm --num_pairs 0", "--num_pairs is", "0", "1 to 1000000"),
    Case(f"{EXPLORE} runs/flow --path circle", "path", "circle", "sphere"),
    Case(f"{EXPLORE} runs/vae --num_images 1000000000000", "--num_images is", "000", "2 to 1000"),
]  # fmt: skip

REPORT = "python launch/report.py"
REPORTING = [
    Case(f"{REPORT} nowhere", "nowhere", "not a folder", "name one of runs/", needs="runs/ddpm"),
    Case(f"{REPORT} pictures", "pictures", "no config.yaml", "name one of runs/",
         needs="runs/ddpm"),
    Case(f"{REPORT} runs/ddpm runs/vae", "--out", "2 folders", "--out report.html"),
    Case(f"{REPORT} runs/ddpm --out nowhere/r.html", "--out is", "nowhere", "make it first"),
    Case(f"{REPORT} runs/ddpm --out shards", "--out is", "shards", "name a file in it"),
    Case(f"{REPORT} runs/ddpm --out ''", "--out is", "''", "leave it out"),
    Case(f"{REPORT} runs/ddpm --out locked/r.html", "--out is", "locked", "name another path",
         made("locked", 0o555), without_rights=True),
]  # fmt: skip

EXERCISES = "python launch/exercises.py"
EXERCISING = [
    Case(f"{EXERCISES} --only week9", "--only names", "'week9'", "week1_gan"),
    Case(f"{EXERCISES} --only ''", "--only is", "''", "leave it out"),
    Case(f"{EXERCISES} --scale gigantic", "scale", "gigantic", "choose from small"),
    Case(f"{EXERCISES} --data mnist", "source", "'mnist'", "choose cifar10"),
    Case(f"{EXERCISES} --data folder:nowhere", "nowhere", "does not exist", "folder per class"),
    Case(f"{EXERCISES} --parallel 0", "--parallel is", "0", "1 to 1024"),
    Case(f"{EXERCISES} --processes 1000000000", "--processes is", "1000000000", "1 to 1024"),
    Case(f"{EXERCISES} --paralel 2", "--paralel", "2", "did you mean --parallel?"),
    Case(f"{EXERCISES} --out notes", "--out is", "notes", "name another", written("notes", "mine")),
    Case(f"{EXERCISES} --exercises nowhere", "--exercises is", "nowhere", "name a folder"),
    Case(f"{EXERCISES} --exercises mine", "mine/one.yaml", "titel", "use title",
         written("mine/one.yaml", "titel: x\n")),
]  # fmt: skip

BENCHMARK = "python launch/benchmark.py"
BENCHMARKING = [
    Case(f"{BENCHMARK}", "command", "", "--help"),
    Case(f"{BENCHMARK} lunch", "command", "'lunch'", "'noise'"),
    Case(f"{BENCHMARK} data --batch 0", "--batch is", "0", "1 or more"),
    Case(f"{BENCHMARK} data --batch many", "--batch", "'many'", "int"),
    Case(f"{BENCHMARK} data --num-images 1000000000000", "--num-images is", "000", "1 to 1000000"),
    Case(f"{BENCHMARK} data --batch 500 --num-images 100", "--batch", "500", "--num-images 100"),
    Case(f"{BENCHMARK} data --num 100", "--num", "100", "did you mean --num-images?"),
    Case(f"{BENCHMARK} data --shards nowhere", "nowhere", "do not exist", "shards.build"),
    Case(f"{BENCHMARK} noise --batch 1000000000000", "--batch is", "1000000000000", "1 to 65536"),
    Case(f"{BENCHMARK} noise --json nowhere/x.json", "--json is", "nowhere", "make it first"),
    Case(f"{BENCHMARK} noise --json shards", "--json is", "shards", "name a file in it"),
    Case(f"{BENCHMARK} step --options lr", "--options has", "'lr'", "key=value"),
    Case(f"{BENCHMARK} step --options optim.lr=fast", "optim.lr is", "fast", "a number"),
    Case(f"{BENCHMARK} step --rounds 0 --png x.png", "--rounds is", "0", "1 or more"),
    Case(f"{BENCHMARK} scaling --processes 1", "--processes is", "1", "2 to 256"),
    Case(f"{BENCHMARK} scaling --links 1 2", "--links is", "[1.0, 2.0]", "three numbers above 0"),
    Case(f"{BENCHMARK} scaling --links 1 2 nan", "--links is", "nan", "give a number"),
    Case(f"{BENCHMARK} growth --images 10 --batch 128", "--images has", "10", "at least"),
    Case(f"{BENCHMARK} engines --steps 2", "--steps is", "2", "10 or more"),
    Case(f"{BENCHMARK} engines --engines zero9", "--engines", "'zero9'", "zero3"),
    Case(f"{BENCHMARK} engines --families rnn", "--families", "'rnn'", "ddpm"),
    Case(f"{BENCHMARK} step --batch 0", "--batch is", "0", "1 to 65536"),
    Case(f"{BENCHMARK} step --options train.nonsense=1", "train.nonsense", "1", "nonsense"),
    Case(f"{BENCHMARK} sample --steps 0", "--steps is", "0", "1 or more"),
    Case(f"{BENCHMARK} roofline --tflops 0", "--tflops is", "0.0", "above 0"),
    Case(f"{BENCHMARK} roofline --batch -1", "--batch is", "-1", "1 to 65536"),
    Case(f"{BENCHMARK} roofline --bandwidth nan", "--bandwidth is", "nan", "give a number"),
    Case(f"{BENCHMARK} roofline --dropout 1", "--dropout is", "1.0", "less than 1"),
    Case(f"{BENCHMARK} roofline --channels 6", "--channels is", "6", "a multiple of 4"),
    Case(f"{BENCHMARK} roofline --image-size 36", "--image-size is", "36", "a multiple of 8"),
    Case(f"{BENCHMARK} roofline --usable 2", "--usable is", "2.0", "at most 1"),
    Case(f"{BENCHMARK} roofline --tflop 500", "--tflop", "500", "did you mean --tflops?"),
    Case(f"{BENCHMARK} likelihood runs/vae --out new --test-shards shards --num-test 1",
         "--num-test is", "1", "2 or more"),
    Case(f"{BENCHMARK} likelihood runs/flow --out runs/flow --test-shards shards", "--out is",
         "runs/flow", "choose a folder"),
    Case(f"{BENCHMARK} step --seconds 0", "--seconds is", "0", "above 0"),
    Case(f"{BENCHMARK} likelihood runs/vae --out new --test-shards shards --variance 0",
         "--variance is", "0", "above 0"),
    Case(f"{BENCHMARK} likelihood runs/ddpm --out new --test-shards shards", "runs/ddpm",
         "neither a vae nor a glow", "choose such a run"),
]  # fmt: skip

# Where images go, and names that other toolkits use.
OUT = f"{SAMPLE} runs/ddpm --out"
NAMING = [
    Case(f"{OUT} x.jpg", "--out is", "x.jpg", "FILE.png"),
    Case(f"{OUT} runs/", "--out is", "runs/", "name a new or empty folder"),
    Case(f"{OUT} ~nobody-here/x.png", "--out is", "~nobody-here", "write the whole path"),
    Case(f"{SAMPLE} runs/dppm", "runs/dppm", "no config.yaml", "did you mean runs/ddpm?",
         needs="runs/ddpm"),
    Case(f"{SAMPLE} runs/ddpm --num_samples 3", "--num_samples", "3", "--per_class?"),
    Case(f"{SAMPLE} runs/ddpm --cfg_scale 2", "--cfg_scale", "2", "did you mean --guidance?"),
    Case(f"{SAMPLE} runs/ddpm --output x", "--output", "x", "did you mean --out?"),
    Case(f"{SAMPLE} runs/ddpm --classes strr", "--classes names", "'strr'", "did you mean star?"),
    Case(f"{SAMPLE} runs/ddpm --steps 1.5", "steps is", "1.5", "a whole number"),
    Case(f"{EVALUATE} runs/ddpm --metrics fid", "--metrics names", "'fid'",
         "--metrics distances --features inception"),
    Case(f"{EVALUATE} runs/ddpm --metric fid", "--metric is", "fid",
         "--metrics distances --features inception"),
    Case(f"{EVALUATE} runs/ddpm --features fid", "--features is", "fid",
         "--metrics distances --features inception"),
    Case(f"{EVALUATE} runs/ddpm --fid", "--fid", "not an option",
         "--metrics distances --features inception"),
    Case(f"{EVALUATE} runs/ddpm --measure diversity", "--measure", "diversity",
         "did you mean --metrics?"),
    Case(f"{EVALUATE} runs/ddpm --metrics diversty", "--metrics names", "'diversty'",
         "did you mean diversity?"),
    Case(f"{DENOISE} runs/ddpm --out x.png", "--out is", "x.png", "name a folder"),
    Case(f"{EXPLORE} runs/ddpm --out x.png", "--out is", "x.png", "name a folder"),
    Case(f"{REPORT} runs/ddpm --out new/", "--out is", "new/", "name a file in it"),
    Case(f"{REPORT} runs/dppm", "runs/dppm", "not a folder", "did you mean runs/ddpm?",
         needs="runs/ddpm"),
]  # fmt: skip


def _closed_run(pattern: str) -> Preparation:
    """Return a preparation that copies a run and makes the first file that matches unreadable."""
    return copied("runs/ddpm", "closed", lambda run: sorted(run.glob(pattern))[0].chmod(0))


DENIED = [
    Case(f"{SAMPLE} closed", "model.safetensors", "may not be read", "chmod a+r",
         _closed_run("checkpoints/*/model*"), without_rights=True, needs="runs/ddpm"),
    Case(f"{SAMPLE} closed", "closed/config.yaml", "may not be read", "chmod a+r",
         _closed_run("config.yaml"), without_rights=True, needs="runs/ddpm"),
    Case(f"{EVALUATE} closed", "closed/checkpoints", "may not be read", "chmod -R a+rX",
         _closed_run("checkpoints"), without_rights=True, needs="runs/ddpm"),
    Case(f"{REPORT} closed", "closed/metrics.jsonl", "may not be read", "chmod a+r",
         _closed_run("metrics.jsonl"), without_rights=True, needs="runs/ddpm"),
]  # fmt: skip

CASES = [
    *DENIED, *SAMPLING, *EVALUATING, *LOOKING, *REPORTING, *EXERCISING, *BENCHMARKING, *NAMING,
]  # fmt: skip
