"""Bad inputs of the commands of shards/ and slurm/."""

from __future__ import annotations

from tests.bad_inputs.case import HUGE, Case, all_of, copied, flipped, made, picture, written

LONG = 60 * "long-"
BUILD = "python -m shards.build"
VERIFY = "python -m shards.verify"
PICTURES = "--source folder:mine --split train --out new"
SHARDS = [
    Case(f"{BUILD}", "--source", "required", "--help"),
    Case(f"{BUILD} --source mnist --split train --out new", "source", "'mnist'", "choose cifar10"),
    Case(f"{BUILD} --source '' --split train --out new", "--source is", "''", "give a value"),
    Case(f"{BUILD} --source shapes --split middle --out new", "split", "'middle'", "train or test"),
    Case(f"{BUILD} --source shapes --split train --out ''", "--out is", "''", "give a value"),
    Case(f"{BUILD} --source shapes --split train --out shards", "shards", "not empty",
         "choose another --out", slow=True),
    Case(f"{BUILD} --source shapes --split train --out notes", "notes", "is a file",
         "choose another folder", written("notes", "mine")),
    Case(f"{BUILD} --source shapes --split train --out locked/new", "cannot write", "locked/new",
         "choose another folder", made("locked", 0o555), without_rights=True),
    Case(f"{BUILD} --source shapes --split train --out new --shard-size 0", "shard size is", "0",
         "1 or more"),
    Case(f"{BUILD} --source shapes --split train --out new --shard-size {HUGE}", "--shard-size is",
         HUGE, "below 2**63"),
    Case(f"{BUILD} --source shapes --split train --out new --shard 9", "--shard", "9",
         "did you mean --shard-size?"),
    Case(f"{BUILD} --source shapes --split train --out new --resize 0", "resize is", "0", "1 to"),
    Case(f"{BUILD} --source shapes --split train --out new --resize 1000000000", "resize is",
         "1000000000", "1 to 4096"),
    Case(f"{BUILD} --source shapes --split train --out new --resize big", "--resize", "'big'",
         "int"),
    Case(f"{BUILD} --source shapes --split train --out new --seed -1", "--seed is", "-1",
         "0 or more"),
    Case(f"{BUILD} {PICTURES}", "mine", "does not exist", "one folder per class"),
    Case(f"{BUILD} {PICTURES}", "mine", "is not a folder", "one folder per class",
         written("mine", "")),
    Case(f"{BUILD} {PICTURES}", "mine", "no class folders", "put images into", made("mine")),
    Case(f"{BUILD} {PICTURES}", "mine/dog", "no images", "add some or remove it",
         all_of(picture("mine/cat/0.png"), made("mine/dog"))),
    Case(f"{BUILD} {PICTURES}", "mine/dog/0.png", "16 x 16", "--resize",
         all_of(picture("mine/cat/0.png"), picture("mine/dog/0.png", 16))),
    Case(f"{BUILD} {PICTURES}", "mine/cat/1.png", "no readable image", "replace or delete",
         all_of(picture("mine/cat/0.png"), written("mine/cat/1.png", "no picture"))),
    Case(f"{BUILD} {PICTURES}", "mine/cat/1.png", "0 bytes", "delete or replace",
         all_of(picture("mine/cat/0.png"), written("mine/cat/1.png", ""))),
    Case(f"{BUILD} {PICTURES}", "mine/cat/1.png", "Permission denied", "check the file",
         all_of(picture("mine/cat/0.png"), written("mine/cat/1.png", "x", mode=0)),
         without_rights=True),
    Case(f"{BUILD} --source folder:mine --split test --out new", "mine", "'test'", "make",
         picture("mine/cat/0.png")),
    Case(f"{BUILD} --source shapes --split train --out {LONG}", LONG, "File name too long",
         "choose a shorter name"),
    Case(f"{VERIFY} {LONG}", LONG, "File name too long", "choose a shorter name"),
    Case(f"{VERIFY}", "DIR", "required", "--help"),
    Case(f"{VERIFY} nowhere", "nowhere", "is not a folder", "give a folder of shards"),
    Case(f"{VERIFY} pictures", "pictures", "index.json", "shards.build"),
    Case(f"{VERIFY} torn", "torn", "has changed", "build the shards again",
         copied("shards", "torn", "with a bit flipped", flipped("*.tar")), needs="shards"),
    Case(f"{VERIFY} shards --quick", "--quick", "unrecognized", "--help"),
]  # fmt: skip

SUBMIT = "python -m slurm.submit launch/train_ddpm.py --config ddpm.yaml --cluster local"
STATUS = "python -m slurm.status"
SWEEP = f"{SUBMIT} --dry-run --sweep sweep.yaml"


def sweep(text: str, thing: str, value: str, remedy: str, slow: bool = False) -> Case:
    """Make a case of a sweep."""
    return Case(SWEEP, thing, value, remedy, written("sweep.yaml", text), slow=slow)


SLURM = [
    Case("python -m slurm.submit", "script", "required", "--help"),
    Case("python -m slurm.submit launch/train_rnn.py --cluster local", "no trainer",
         "launch/train_rnn.py", "launch/train_*.py"),
    Case(f"{SUBMIT} --nodes 0", "--nodes is", "0", "MIN-MAX"),
    Case(f"{SUBMIT} --nodes 3-2", "--nodes is", "3-2", "MIN-MAX"),
    Case(f"{SUBMIT} --nodes 1-1000000000", "--nodes is", "1-1000000000", "of 10000 at most"),
    Case(f"{SUBMIT} --nodes 2", "--cluster local", "one node", "leave out --nodes"),
    Case(f"{SUBMIT} --gpus-per-node few", "--gpus-per-node", "few", "a whole number"),
    Case(f"{SUBMIT} --gpus-per-node {HUGE}", "--gpus-per-node is", HUGE, "below 2**31"),
    Case(f"{SUBMIT} --gpus-per-node 2 --processes-per-node 3", "--processes-per-node is", "3",
         "each process wants its own"),
    Case(f"{SUBMIT} --time soon", "--time is", "soon", "write minutes"),
    Case(f"{SUBMIT} --time 2 --lead-s 120", "--lead-s is", "120", "give more time"),
    Case(f"{SUBMIT} --max-faults 0", "--max-faults is", "0", "1 or more"),
    Case(f"{SUBMIT} --partitoin gpu", "--partitoin", "gpu", "did you mean --partition?"),
    Case(f"{SUBMIT} --gpus 2", "--gpus", "2", "did you mean --gpus-per-node?"),
    Case(f"{SUBMIT} --partition ''", "--partition is", "''", "leave it out"),
    Case(f"{SUBMIT} --python \"it's\"", "--python is", "it's", "mend its quotes"),
    Case("python -m slurm.submit launch/train_ddpm.py --cluster moon", "--cluster", "moon",
         "choose local"),
    Case("python -m slurm.submit launch/train_ddpm.py --cluster mine.yaml", "mine.yaml", "gpus",
         "choose nodes", written("mine.yaml", "gpus: 3\n")),
    Case("python -m slurm.submit launch/train_ddpm.py --cluster mine.yaml", "mine.yaml",
         "--lead-s is soon", "a whole number", written("mine.yaml", "lead_s: soon\n")),
    Case(f"{SUBMIT} --accelerate-config nowhere.yaml", "--accelerate-config", "nowhere.yaml",
         "name a YAML file"),
    Case(f"{SUBMIT} --sweep nowhere.yaml", "sweep", "nowhere.yaml", "name a YAML file"),
    sweep("sets: {}\n", "sets is", "{}", "give each set a name"),
    sweep("grid: {}\n", "grid is", "{}", "each with a list of values"),
    sweep("grid: {optim.lr: 0.1}\n", "optim.lr of the grid is", "0.1", "give a list"),
    sweep("runs: {a: {}}\n", "sweep.yaml", "sections", "sets, grid or both"),
    sweep("sets: [\n", "sweep.yaml", "line 1", "mend that line"),
    sweep("sets: {a: 3}\n", "the set a is", "3", "give it keys and values"),
    sweep("sets: {a/b: {}}\n", "a set named", "'a/b'", "use letters"),
    sweep("sets: {..: {}}\n", "a set named", "'..'", "use letters"),
    sweep("sets: {'a\\nb': {}}\n".replace("'", '"'), "a set named", "b", "use letters"),
    sweep("sets:\n  a: {}\n  a: {}\n", "gives a twice", "lines 2 and 3", "remove one"),
    sweep("grid: {run.seed: [0, 0]}\n", "names two sets", "seed=0", "write differing values"),
    sweep("grid:\n" + "".join(f"  k.{k}: {list(range(100))}\n" for k in range(4)), "makes",
          "100000000 runs", "10000 or fewer"),
    sweep("sets: {good: {}, bad: {optim.lrr: 1e-3}}\n", "set bad", "optim.lrr",
          "did you mean --optim.lr?", slow=True),
    sweep("sets: {a: {run.dir: same}, b: {run.dir: same}}\n", "the sets a and b", "same",
          "its own run.dir", slow=True),
    Case(f"{SUBMIT} --dry-run -- --optim.lr=.nan", "optim.lr is", "nan", "give a number",
         slow=True),
    Case(f"{STATUS}", "DIR", "required", "--help"),
    Case(f"{STATUS} nowhere", "no folder", "nowhere", "name a folder that holds runs"),
    Case(f"{STATUS} shads", "no folder", "shads", "did you mean shards?", needs="shards"),
    Case(f"{BUILD} --source shapes --split train --out ~nobody-here/x", "--out is", "~nobody-here",
         "write the whole path"),
    Case(f"{STATUS} ~nobody-here", "folder is", "~nobody-here", "write the whole path"),
    Case(f"{SUBMIT} --sweep ~nobody-here/s.yaml", "--sweep is", "~nobody-here", "the whole path"),
    Case(f"{STATUS} shards", "no run in", "shards", "name a folder that holds runs"),
    Case(f"{STATUS} runs --every nan", "--every is", "nan", "above 0"),
    Case(f"{STATUS} runs --wach", "--wach", "unrecognized", "did you mean --watch?"),
]  # fmt: skip

CASES = [*SHARDS, *SLURM]
