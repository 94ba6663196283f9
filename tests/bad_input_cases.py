"""The bad inputs of `tests/bad_inputs.py`: commands, and what the line says of each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Prepare = Callable[[Path], None]
HUGE = "1" + 30 * "0"


@dataclass(frozen=True)
class Case:
    """A command, and what its line has to hold."""

    command: str
    thing: str
    value: str
    remedy: str
    prepare: Prepare | None = None  # in the folder in which the command runs
    without_rights: bool = False  # as a user whom modes of files bind
    slow: bool = False


def train(family: str, options: str, thing: str, value: str, remedy: str, **more) -> Case:
    """Make a case of a trainer with its smallest configuration, whose run.dir is `new`."""
    command = f"python launch/train_{family}.py --config {family}.yaml {options}"
    return Case(command, thing, value, remedy, **more)


def written(name: str, text: str | bytes, mode: int | None = None) -> Prepare:
    """Give what writes a file."""

    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        if mode is not None:
            path.chmod(mode)

    return write


def made(name: str, mode: int = 0o755) -> Prepare:
    """Give what makes a folder."""

    def make(folder: Path) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(mode)

    return make


def copied(source: str, target: str, change: Prepare | None = None) -> Prepare:
    """Give what copies a folder and changes the copy."""

    def copy(folder: Path) -> None:
        shutil.copytree(folder / source, folder / target)
        if change is not None:
            change(folder / target)

    return copy


def all_of(*prepares: Prepare) -> Prepare:
    """Give what does several things."""

    def do(folder: Path) -> None:
        for prepare in prepares:
            prepare(folder)

    return do


def emptied(folder: Path) -> None:
    """Take the checkpoints away from a run."""
    shutil.rmtree(folder / "checkpoints")


def flipped(pattern: str) -> Prepare:
    """Give what changes a byte in the middle of the first file of a pattern."""

    def flip(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return flip


def picture(name: str, side: int = 32) -> Prepare:
    """Give what draws a picture."""

    def draw(folder: Path) -> None:
        from PIL import Image

        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(folder / name)

    return draw


def linked(name: str) -> Prepare:
    """Give what makes a link that leads to itself."""
    return lambda folder: os.symlink(name, folder / name)


OPTIONS_OF_TRAINERS = [
    # What is no key, or no value.
    train("ddpm", "--train.colour=red", "--train.colour", "red", "see --help"),
    train("ddpm", "--train.kernel=false", "--train.kernel", "false", "mean --train.kernels?"),
    train("ddpm", "--optim.l 1e-3", "--optim.l", "1e-3", "did you mean --optim.lr?"),
    train("gan", "--gan.los=hinge", "--gan.los", "hinge", "did you mean --gan.loss?"),
    train("ddpm", "--train.global_bach=16", "--train.global_bach", "16", "--train.global_batch?"),
    train("ddpm", "extra", "unrecognized arguments", "extra", "see --help"),
    train("ddpm", "--run.dir", "--run.dir", "", "expected one argument"),
    train("ddpm", "--run.dir=", "run.dir is", "''", "give a value, or leave it out"),
    train("ddpm", "--data.source=", "data.source is", "''", "give a value, or leave it out"),
    train("ddpm", "--run.trackers=[crayon]", "run.trackers", "crayon", "choose of"),
    # Of another type.
    train("ddpm", "--optim.lr=fast", "optim.lr", "fast", "give a number"),
    train("ddpm", "--optim.lr=null", "optim.lr", "None", "give a number"),
    train("ddpm", "--run.seed=1.5", "run.seed", "1.5", "a whole number"),
    train("ddpm", "--train.micro_batch=many", "train.micro_batch", "many", "or null"),
    train("ddpm", "--train.kernels=perhaps", "train.kernels", "perhaps", "true or false"),
    train("ddpm", "--model.channel_mult=3", "model.channel_mult", "3", "give a list"),
    train("ddpm", "--model.channel_mult=[1,x]", "model.channel_mult", "x", "a whole number"),
    train("ddpm", "--optim.betas=[0.9]", "optim.betas", "[0.9]", "2 elements"),
    train("ddpm", "--train.compile=some", "train.compile", "some", "'noise'"),
    train("ddpm", "--diffusion.schedule=square", "diffusion.schedule", "square", "'cosine'"),
    # Numbers that are none, or too large for anything.
    train("ddpm", "--optim.lr=.nan", "optim.lr is", "nan", "give a number"),
    train("ddpm", "--optim.lr=.inf", "optim.lr is", "inf", "give a number"),
    train("ddpm", "--optim.lr=1e308", "optim.lr is", "1e+308", "at most"),
    train("ddpm", "--optim.lr=5000", "optim.lr is", "5000", "a number above 0, at most 1000"),
    train("ddpm", "--optim.weight_decay=-.inf", "optim.weight_decay", "-inf", "give a number"),
    train("gan", "--gan.r1=.nan", "gan.r1 is", "nan", "give a number"),
    train("vae", "--vae.beta=1e309", "vae.beta is", "inf", "give a number"),
    train("flow", "--model.logit=.nan", "model.logit is", "nan", "give a number"),
    train("ddpm", f"--run.seed={HUGE}", "run.seed is", HUGE, "below 2**64"),
    train("ddpm", "--run.seed=-1", "run.seed is", "-1", "choose 0 or more"),
    train("ddpm", f"--train.total_images={HUGE}", "train.total_images is", HUGE, "below 2**63"),
    train("ddpm", "--train.global_batch=1000000000000", "train.global_batch", "00000", "1 to 1677"),
    train("ddpm", "--train.samples_per_class=1000000", "train.samples_per_class", "000", "1 to 10"),
    train("ddpm", "--model.channels=4000000000", "model.channels", "4000000000", "choose small"),
    train("ddpm", "--model.channels=100000", "model.channels", "100000", "choose smaller"),
    train("ddpm", "--model.num_blocks=[1,1000000000]", "model.num_blocks", "000", "1 to 100"),
    train("ddpm", "--diffusion.num_timesteps=1000000000", "diffusion.num_timesteps", "00", "2 to "),
    train("gan", "--model.latent=1000000000000000", "model.latent", "10000", "choose smaller"),
    train("vae", "--model.num_blocks=[1,99999999]", "model.num_blocks", "999999", "0 to 100"),
    train("flow", "--model.levels=1000000000", "model.levels is", "1000000000", "1 to 1000"),
    train("flow", "--model.steps=1000000000", "model.steps is", "1000000000", "1 to 1000"),
    train("ddpm", "--eval.every_images=16 --eval.num_images=1000000000", "eval.num_images",
          "1000000000", "2 to 1000000"),
    # Numbers out of range.
    train("ddpm", "--train.global_batch=0", "train.global_batch is", "0", "choose 1"),
    train("ddpm", "--train.micro_batch=-4", "train.micro_batch is", "-4", "choose 1"),
    train("ddpm", "--train.total_images=0", "train.total_images is", "0", "choose 1 or more"),
    train("ddpm", "--train.log_every_images=0", "train.log_every_images is", "0", "1 or more"),
    train("ddpm", "--train.save_every_images=-1", "train.save_every_images is", "-1", "0 or more"),
    train("ddpm", "--train.sample_every_images=-1", "train.sample_every_images", "-1", "0 or more"),
    train("ddpm", "--train.keep_checkpoints=0", "train.keep_checkpoints is", "0", "1 or more"),
    train("ddpm", "--train.profile_steps=-1", "train.profile_steps is", "-1", "0 or more"),
    train("ddpm", "--train.ema_halflife_images=-5", "train.ema_halflife_images", "-5", "0 or more"),
    train("ddpm", "--optim.lr=0", "optim.lr is", "0", "above 0"),
    train("ddpm", "--optim.clip_norm=-1", "optim.clip_norm is", "-1", "0 or more"),
    train("ddpm", "--optim.betas=[0.9,1.0]", "optim.betas is", "[0.9, 1.0]", "below 1"),
    train("ddpm", "--eval.every_images=-1", "eval.every_images is", "-1", "0 or more"),
    train("ddpm", "--eval.num_images=1", "eval.num_images is", "1", "2 to"),
    train("ddpm", "--diffusion.num_timesteps=1", "diffusion.num_timesteps is", "1", "2 to"),
    train("ddpm", "--diffusion.label_drop=1.5", "diffusion.label_drop is", "1.5", "0 to 1"),
    train("ddpm", "--diffusion.min_snr_gamma=0", "diffusion.min_snr_gamma is", "0", "above 0"),
    train("ddpm", "--diffusion.vlb_weight=-1", "diffusion.vlb_weight is", "-1", "0 or more"),
    train("ddpm", "--sample.guidance=-1", "sample.guidance is", "-1", "0 or more"),
    train("ddpm", "--sample.eta=2", "sample.eta is", "2", "0 (no noise) to 1"),
    train("ddpm", "--sample.steps=1001", "sample.steps is", "1001", "1 to 1000"),
    train("ddpm", "--sample.batch=0", "sample.batch is", "0", "1 or more"),
    train("ddpm", "--model.channels=6", "model.channels is", "6", "a multiple of 4"),
    train("ddpm", "--model.dropout=1", "model.dropout is", "1", "less than 1"),
    train("ddpm", "--model.patch_size=0", "model.patch_size is", "0", "1 or more"),
    train("ddpm", "--model.num_heads=0", "model.num_heads", "0", "change it"),
    train("ddpm", "--model.channel_mult=[0,1]", "model.channel_mult is", "[0, 1]", "1 or more"),
    train("ddpm", "--model.channel_mult=[] --model.num_blocks=[]", "model.channel_mult", "[]",
          "at least one level"),
    train("gan", "--model.latent=0", "model.latent is", "0", "1 or more"),
    train("gan", "--gan.r1=-1", "gan.r1 is", "-1", "0 or more"),
    train("gan", "--gan.discriminator_steps=0", "gan.discriminator_steps is", "0", "1 or more"),
    train("gan", "--gan.discriminator_lr=0", "gan.discriminator_lr is", "0", "above 0"),
    train("gan", "--gan.augment=[blur]", "gan.augment", "blur", "'cutout'"),
    train("gan", "--gan.augment=[color,color]", "gan.augment is", "color", "each change once"),
    train("gan", "--gan.augment_probability=0", "gan.augment_probability", "0", "above 0"),
    train("gan", "--sample.truncation=0", "sample.truncation is", "0", "above 0"),
    train("vae", "--vae.free_bits=-0.1", "vae.free_bits is", "-0.1", "0 or more"),
    train("vae", "--model.latent=-3", "model.latent is", "-3", "1 or more"),
    train("vae", "--sample.temperature=0", "sample.temperature is", "0", "above 0"),
    train("flow", "--model.hidden=0", "model.hidden is", "0", "1 or more"),
    train("flow", "--model.logit=0.5", "model.logit is", "0.5", "less than 0.5"),
    train("flow", "--sample.temperature=-1", "sample.temperature is", "-1", "above 0"),
]  # fmt: skip

CONTRADICTIONS = [
    train("ddpm", "--train.micro_batch=3", "train.micro_batch", "3", "a divisor"),
    train("ddpm", "--sample.guidance=2 --diffusion.label_drop=0", "sample.guidance is", "2",
          "set it to 1"),
    train("ddpm", "--sample.guidance=2 --diffusion.class_conditional=false", "sample.guidance is",
          "2", "set it to 1"),
    train("ddpm", "--sample.variance=learned", "sample.variance is", "learned", "small or large"),
    train("ddpm", "--diffusion.zero_terminal_snr --diffusion.prediction=eps",
          "diffusion.prediction", "eps", "choose v or x_0"),
    train("ddpm", "--model.channel_mult=[1,1,1,1,1,1] --model.num_blocks=[1,1,1,1,1,1]",
          "images of side 32", "6 levels", "use fewer"),
    train("ddpm", "--model.channel_mult=[1,2,2]", "model.num_blocks", "[1, 1]", "give 3"),
    train("ddpm", "--train.float64 --train.mixed_precision=bf16", "train.float64", "bf16",
          "set one"),
    train("ddpm", "--train.compile=graphs", "train.compile is", "graphs", "auto or all"),
    train("gan", "--train.micro_batch=4", "train.micro_batch", "4", "leave it out"),
    train("gan", "--eval.every_images=64 --eval.metric=bits_per_dim", "eval.metric is",
          "bits_per_dim", "fd_classifier"),
    train("gan", "--train.activation_checkpointing=true", "train.activation_checkpointing is",
          "true", "leave it out"),
    train("gan", "--diffusion.schedule=linear", "--diffusion.schedule", "linear", "see --help"),
    train("vae", "--model.channel_mult=[1] --model.num_blocks=[1] --model.encoder=encoder_decoder",
          "model.encoder is", "encoder_decoder", "two levels or more"),
    train("flow", "--model.levels=6", "model.levels", "6", "lower it"),
    train("flow", "--model.architecture=realnvp --model.levels=6", "model.levels", "6", "lower it"),
    train("flow", "--eval.every_images=64 --data.test_shards=null", "data.test_shards", "shards",
          "eval.every_images 0"),
]  # fmt: skip

TRAIN = "python launch/train_ddpm.py --config"
PLACES_OF_TRAINERS = [
    Case(f"{TRAIN} nowhere.yaml", "--config", "nowhere.yaml", "name a YAML file"),
    Case(f"{TRAIN} launch", "--config", "launch", "name a YAML file"),
    Case(f"{TRAIN}=", "--config", "''", "name a YAML file"),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "line 1", "YAML", written("bad.yaml", "train: [un\n")),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "list", "YAML file of keys",
         written("bad.yaml", "- a list\n")),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "decode", "YAML file of keys",
         written("bad.yaml", bytes(range(256)))),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "train.colour", "see --help for the keys",
         written("bad.yaml", "train: {colour: red}\n")),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "train.kernel:", "did you mean train.kernels?",
         written("bad.yaml", "train: {kernel: false}\n")),
    Case(f"{TRAIN} bad.yaml", "train.global_batch", "null", "give a value",
         written("bad.yaml", "train: {global_batch: null}\n")),
    Case(f"{TRAIN} bad.yaml", "optim.lr is", "nan", "give a number",
         written("bad.yaml", "optim: {lr: .nan}\n")),
    Case(f"{TRAIN} ddpm.yaml --config secret.yaml", "secret.yaml", "Permission denied",
         "name a YAML file", written("secret.yaml", "{}", mode=0), without_rights=True),
    # The run folder.
    train("ddpm", "--run.dir=notes", "run.dir is", "notes", "name another",
          prepare=written("notes", "mine")),
    train("ddpm", "--run.dir=notes/run", "run.dir is", "notes/run", "name another",
          prepare=written("notes", "mine")),
    train("ddpm", "--run.dir=full", "run.dir", "full", "choose another",
          prepare=written("full/notes.txt", "mine")),
    train("ddpm", "--run.dir=loop", "run.dir is", "loop", "name another", prepare=linked("loop")),
    train("ddpm", "--run.dir=locked/run", "run.dir is", "locked", "name another",
          prepare=made("locked", 0o555), without_rights=True),
    train("ddpm", "--run.dir=runs/ddpm --optim.lr=0.5 --run.seed=7", "optim.lr was",
          "run.seed was 0, is 7", "another run.dir"),
    train("vae", "--run.dir=runs/ddpm", "runs/ddpm", "another family", "another run.dir"),
    # The data.
    train("ddpm", "--data.shards=nowhere", "nowhere", "do not exist", "python -m shards.build"),
    train("ddpm", "--data.shards=empty", "empty", "no shards", "python -m shards.build",
          prepare=made("empty")),
    train("ddpm", "--data.shards=torn", "torn", "has changed", "build the shards again",
          prepare=copied("shards", "torn", flipped("*.tar"))),
    train("ddpm", "--data.shards=null --data.source=mnist", "source", "'mnist'", "choose cifar10"),
    train("ddpm", "--data.shards=null --data.source=folder:nowhere", "nowhere", "does not exist",
          "one folder per class"),
    train("ddpm", "--data.shards=null --data.resize=0 --data.source=folder:pictures", "resize is",
          "0", "1 to 4096"),
    train("gan", "--data.shards=odd", "images are", "24 x 24", "data.resize 32",
          prepare=lambda folder: _odd_shards(folder)),
]  # fmt: skip


def _odd_shards(folder: Path) -> None:
    """Build shards of images that no GAN here makes."""
    from shards.build import build

    for name in ("odd_pictures/a/0.png", "odd_pictures/b/1.png"):
        picture(name, 24)(folder)
    build(f"folder:{folder / 'odd_pictures'}", "train", folder / "odd", progress=False)


SAMPLE = "python launch/sample.py"
SAMPLING = [
    Case(f"{SAMPLE}", "required: run", "", "see --help"),
    Case(f"{SAMPLE} nowhere", "nowhere", "no config.yaml", "name one of runs/"),
    Case(f"{SAMPLE} ddpm.yaml", "ddpm.yaml", "is not a run folder", "name one of runs/"),
    Case(f"{SAMPLE} ''", "run is", "''", "give a value"),
    Case(f"{SAMPLE} young", "young", "no whole checkpoint", "train it first",
         copied("runs/ddpm", "young", emptied)),
    Case(f"{SAMPLE} hurt --checkpoint 32", "hurt/checkpoints", "cannot be used", "choose another",
         copied("runs/ddpm", "hurt", flipped("checkpoints/*/ema.safetensors"))),
    Case(f"{SAMPLE} runs/ddpm --checkpoint last", "--checkpoint is", "last", "or best"),
    Case(f"{SAMPLE} runs/ddpm --checkpoint ²", "--checkpoint is", "²", "or best"),
    Case(f"{SAMPLE} runs/ddpm --checkpoint 99", "checkpoint", "99", "choose another"),
    Case(f"{SAMPLE} runs/ddpm --checkpoint best", "runs/ddpm", "no best checkpoint", "eval.every"),
    Case(f"{SAMPLE} runs/ddpm --per_class 0", "--per_class is", "0", "1 to"),
    Case(f"{SAMPLE} runs/ddpm --per_class 100000000", "--per_class is", "100000000", "1 to"),
    Case(f"{SAMPLE} runs/ddpm --per_klass 3", "--per_klass", "3", "did you mean --per_class?"),
    Case(f"{SAMPLE} runs/ddpm --guid 3", "--guid", "3", "did you mean --guidance?"),
    Case(f"{SAMPLE} runs/ddpm --classes dragon", "--classes names", "'dragon'", "ring"),
    Case(f"{SAMPLE} runs/ddpm --classes 10", "--classes names", "'10'", "ring"),
    Case(f"{SAMPLE} runs/ddpm --classes ''", "--classes is", "''", "leave it out"),
    Case(f"{SAMPLE} runs/ddpm --seed -1", "--seed is", "-1", "0 or more"),
    Case(f"{SAMPLE} runs/ddpm --seed {HUGE}", "--seed is", HUGE, "below 2**64"),
    Case(f"{SAMPLE} runs/ddpm --steps 0", "sample.steps is", "0", "1 to 1000"),
    Case(f"{SAMPLE} runs/ddpm --sampler euler", "sampler", "euler", "ddim"),
    Case(f"{SAMPLE} runs/ddpm --guidance .nan", "--guidance is", "nan", "give a number"),
    Case(f"{SAMPLE} runs/ddpm --guidance -2", "sample.guidance is", "-2", "0 or more"),
    Case(f"{SAMPLE} runs/ddpm --average maybe", "average", "maybe", "true or false"),
    Case(f"{SAMPLE} runs/ddpm --batch 0", "sample.batch is", "0", "1 or more"),
    Case(f"{SAMPLE} runs/ddpm --temperature 1", "--temperature", "1", "sampler, steps"),
    Case(f"{SAMPLE} runs/gan --sampler ddim", "--sampler", "ddim", "truncation"),
    Case(f"{SAMPLE} runs/gan --truncation 0", "sample.truncation is", "0", "above 0"),
    Case(f"{SAMPLE} runs/flow --classes ring", "--classes is", "ring", "omit it"),
    Case(f"{SAMPLE} runs/vae --guidance 2", "--guidance", "2", "temperature"),
    Case(f"{SAMPLE} runs/ddpm --out .", "--out is", ".", "give a path without its ending"),
    Case(f"{SAMPLE} runs/ddpm --out notes/made", "--out is", "notes", "name another place",
         written("notes", "mine")),
    Case(f"{SAMPLE} runs/ddpm --out locked/made", "--out is", "locked", "name another place",
         made("locked", 0o555), without_rights=True),
]  # fmt: skip

EVALUATE = "python launch/evaluate.py"
EVALUATING = [
    Case(f"{EVALUATE}", "required: runs", "", "see --help"),
    Case(f"{EVALUATE} nowhere", "nowhere", "no config.yaml", "name one of runs/"),
    Case(f"{EVALUATE} runs/ddpm --measure beauty", "--measure names", "'beauty'", "diversity"),
    Case(f"{EVALUATE} runs/ddpm --measure ''", "--measure is", "''", "leave it out"),
    Case(f"{EVALUATE} runs/gan --measure bits_per_dim", "--measure is", "bits_per_dim",
         "choose distances"),
    Case(f"{EVALUATE} runs/flow --measure class_consistency", "--measure is", "class_consistency",
         "choose diversity"),
    Case(f"{EVALUATE} runs/vae --measure loss_by_timestep", "runs/vae", "loss_by_timestep",
         "out of --measure"),
    Case(f"{EVALUATE} runs/ddpm --num_images 0", "--num_images is", "0", "1 to 1000000"),
    Case(f"{EVALUATE} runs/ddpm --num_images 1000000000000", "--num_images is", "00", "1 to 1000"),
    Case(f"{EVALUATE} runs/ddpm --num_images 5", "generated images", "5", "--num_images"),
    Case(f"{EVALUATE} runs/ddpm --num_images 20 --per_class 2", "--per_class", "2",
         "leave one out"),
    Case(f"{EVALUATE} runs/ddpm --seeds 0", "--seeds is", "0", "1 or more"),
    Case(f"{EVALUATE} runs/ddpm --epochs -1", "--epochs is", "-1", "1 or more"),
    Case(f"{EVALUATE} runs/vae --importance_samples -1", "--importance_samples is", "-1",
         "0 or more"),
    Case(f"{EVALUATE} runs/flow --importance_samples 5", "--importance_samples is", "5",
         "leave it out"),
    Case(f"{EVALUATE} runs/ddpm --weights w.pth", "--weights is", "w.pth", "--features inception"),
    Case(f"{EVALUATE} runs/ddpm --features inception --weights w.pth", "w.pth", "", "download",
         slow=True),
    Case(f"{EVALUATE} runs/ddpm --features beauty", "features", "beauty", "inception"),
    Case(f"{EVALUATE} moved", "data.shards", "elsewhere", "put them back",
         copied("runs/ddpm", "moved", lambda run: _with_other_shards(run))),
    Case(f"{EVALUATE} runs/ddpm --measure class_consistency --test_shards nowhere", "nowhere",
         "do not exist", "build"),
    Case(f"{EVALUATE} locked", "locked", "may not be written to", "change its mode",
         copied("runs/ddpm", "locked", lambda run: run.chmod(0o555)), without_rights=True),
]  # fmt: skip


def _with_other_shards(run: Path) -> None:
    """Let a run say that its images lie elsewhere."""
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("shards: shards", "shards: elsewhere"))


DENOISE, EXPLORE = "python launch/denoise.py", "python launch/explore.py"
LOOKING = [
    Case(f"{DENOISE} runs/gan", "runs/gan", "gan run", "name one of a diffusion model"),
    Case(f"{DENOISE} runs/ddpm --steps 50,,x", "--steps is", "'50,,x'", "whole numbers"),
    Case(f"{DENOISE} runs/ddpm --steps ''", "--steps is", "''", "give a value"),
    Case(f"{DENOISE} runs/ddpm --steps 0", "--steps names", "0", "1 to 1000"),
    Case(f"{DENOISE} runs/ddpm --steps 1001", "--steps names", "1001", "1 to 1000"),
    Case(f"{DENOISE} runs/ddpm --num_images 0", "--num_images is", "0", "1 or more"),
    Case(f"{DENOISE} runs/ddpm --curve -1", "--curve is", "-1", "0 to 1000"),
    Case(f"{DENOISE} runs/ddpm --curve {HUGE}", "--curve is", HUGE, "below 2**63"),
    Case(f"{DENOISE} runs/ddpm --guidance .inf", "--guidance is", "inf", "give a number"),
    Case(f"{DENOISE} runs/ddpm --sampler magic", "sampler", "magic", "ddim"),
    Case(f"{DENOISE} runs/ddpm --out notes", "--out is", "notes", "name another",
         written("notes", "mine")),
    Case(f"{EXPLORE} nowhere", "nowhere", "no config.yaml", "name one of runs/"),
    Case(f"{EXPLORE} runs/ddpm --guidance 1,-2", "--guidance names", "-2", "0 or more"),
    Case(f"{EXPLORE} runs/ddpm --guidance ''", "--guidance is", "''", "give a value"),
    Case(f"{EXPLORE} runs/ddpm --steps 5,2000", "--steps names", "2000", "1 to 1000"),
    Case(f"{EXPLORE} runs/ddpm --steps a,b", "--steps is", "'a,b'", "whole numbers"),
    Case(f"{EXPLORE} runs/gan --temperature 1", "--temperature", "1", "truncation"),
    Case(f"{EXPLORE} runs/gan --truncation nan", "--truncation names", "nan", "above 0"),
    Case(f"{EXPLORE} runs/flow --temperature 0", "--temperature names", "0", "above 0"),
    Case(f"{EXPLORE} runs/flow --path circle", "path", "circle", "sphere"),
    Case(f"{EXPLORE} runs/vae --num_images 1", "--num_images is", "1", "2 to"),
    Case(f"{EXPLORE} runs/vae --num_images 1000000000000", "--num_images is", "000", "2 to 1000"),
    Case(f"{EXPLORE} runs/vae --out locked/here", "--out is", "locked", "name another place",
         made("locked", 0o555), without_rights=True),
]  # fmt: skip

REPORT = "python launch/report.py"
REPORTING = [
    Case(f"{REPORT}", "required: runs", "", "see --help"),
    Case(f"{REPORT} nowhere", "nowhere", "no folder", "name a run folder"),
    Case(f"{REPORT} pictures", "pictures", "no config.yaml", "name one of runs/"),
    Case(f"{REPORT} runs/ddpm runs/vae", "--out", "2 folders", "--out report.html"),
    Case(f"{REPORT} runs/ddpm --out nowhere/r.html", "--out is", "nowhere", "make it first"),
    Case(f"{REPORT} runs/ddpm --out shards", "--out is", "shards", "name a file in it"),
    Case(f"{REPORT} runs/ddpm --out ''", "--out is", "''", "leave it out"),
    Case(f"{REPORT} runs/ddpm --out locked/r.html", "--out is", "locked", "name another place",
         made("locked", 0o555), without_rights=True),
]  # fmt: skip

EXERCISES = "python launch/exercises.py"
EXERCISING = [
    Case(f"{EXERCISES} --only week9", "--only names", "'week9'", "week1_gan"),
    Case(f"{EXERCISES} --only ''", "--only is", "''", "leave it out"),
    Case(f"{EXERCISES} --scale gigantic", "scale", "gigantic", "choose of small"),
    Case(f"{EXERCISES} --data mnist", "source", "'mnist'", "choose cifar10"),
    Case(f"{EXERCISES} --data folder:nowhere", "nowhere", "does not exist", "folder per class"),
    Case(f"{EXERCISES} --parallel 0", "--parallel is", "0", "1 to 1024"),
    Case(f"{EXERCISES} --processes 1000000000", "--processes is", "1000000000", "1 to 1024"),
    Case(f"{EXERCISES} --paralel 2", "--paralel", "2", "did you mean --parallel?"),
    Case(f"{EXERCISES} --out notes", "--out is", "notes", "name another",
         written("notes", "mine")),
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
    Case(f"{BENCHMARK} data --shards nowhere", "nowhere", "does not exist", "shards.build"),
    Case(f"{BENCHMARK} noise --batch 1000000000000", "--batch is", "1000000000000", "1 to 65536"),
    Case(f"{BENCHMARK} noise --repetitions -1", "--repetitions is", "-1", "1 or more"),
    Case(f"{BENCHMARK} noise --json nowhere/x.json", "--json is", "nowhere", "make it first"),
    Case(f"{BENCHMARK} noise --json shards", "--json is", "shards", "name a file in it"),
    Case(f"{BENCHMARK} step --options lr", "--options has", "'lr'", "key=value"),
    Case(f"{BENCHMARK} step --rounds 0 --png x.png", "--rounds is", "0", "1 or more"),
    Case(f"{BENCHMARK} scaling --processes 1", "--processes is", "1", "2 to 256"),
    Case(f"{BENCHMARK} scaling --links 1 2", "--links is", "[1.0, 2.0]", "three numbers above 0"),
    Case(f"{BENCHMARK} scaling --links 1 2 nan", "--links is", "nan", "give a number"),
    Case(f"{BENCHMARK} scaling --rate inf", "--rate is", "inf", "give a number"),
    Case(f"{BENCHMARK} growth --images 10 --batch 128", "--images has", "10", "at least"),
    Case(f"{BENCHMARK} growth --images {HUGE}", "--images is", HUGE, "below 2**63"),
    Case(f"{BENCHMARK} engines --steps 2", "--steps is", "2", "10 or more"),
    Case(f"{BENCHMARK} engines --families rnn", "--families", "'rnn'", "ddpm"),
    Case(f"{BENCHMARK} sample --steps 0", "--steps is", "0", "1 or more"),
    Case(f"{BENCHMARK} everything --out notes", "--out is", "notes", "name another",
         written("notes", "mine")),
    Case(f"{BENCHMARK} everything --out new --minutes 0", "--minutes is", "0", "above 0"),
    Case(f"{BENCHMARK} likelihood runs/vae --out new --test-shards shards --variance 0",
         "--variance is", "0", "above 0"),
    Case(f"{BENCHMARK} likelihood runs/ddpm --out new --test-shards shards", "runs/ddpm",
         "neither a vae nor a glow", "name one"),
]  # fmt: skip

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
    Case(f"{BUILD} --source shapes --split train --out new --image-format gif", "image format",
         "'gif'", "npy or png"),
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
    Case(f"{VERIFY}", "DIR", "required", "--help"),
    Case(f"{VERIFY} nowhere", "nowhere", "is not a folder", "give a folder of shards"),
    Case(f"{VERIFY} ddpm.yaml", "ddpm.yaml", "is not a folder", "give a folder of shards"),
    Case(f"{VERIFY} pictures", "pictures", "index.json", "shards.build"),
    Case(f"{VERIFY} torn", "torn", "has changed", "build the shards again",
         copied("shards", "torn", flipped("*.tar"))),
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
    Case(f"{SUBMIT} --gpus-per-node -1", "--gpus-per-node is", "-1", "0 or more"),
    Case(f"{SUBMIT} --gpus-per-node {HUGE}", "--gpus-per-node is", HUGE, "below 2**31"),
    Case(f"{SUBMIT} --processes-per-node 0", "--processes-per-node is", "0", "1 or more"),
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
         "name one"),
    Case(f"{SUBMIT} --sweep nowhere.yaml", "sweep", "nowhere.yaml", "name a YAML file"),
    sweep("sets: {}\n", "sets is", "{}", "give each set a name"),
    sweep("grid: {}\n", "grid is", "{}", "each with a list of values"),
    sweep("grid: {optim.lr: 0.1}\n", "optim.lr of the grid is", "0.1", "give a list"),
    sweep("grid: {optim.lr: []}\n", "optim.lr of the grid is", "[]", "give a list"),
    sweep("runs: {a: {}}\n", "sweep.yaml", "sections", "sets, grid or both"),
    sweep("- a\n", "sweep.yaml", "sections", "sets, grid or both"),
    sweep("sets: [\n", "sweep.yaml", "line 2", "YAML"),
    sweep("sets: {a: 3}\n", "the set a is", "3", "give it keys and values"),
    sweep("sets: {a/b: {}}\n", "a set named", "'a/b'", "use letters"),
    sweep("sets: {..: {}}\n", "a set named", "'..'", "use letters"),
    sweep("sets: {'a\\nb': {}}\n".replace("'", '"'), "a set named", "b", "use letters"),
    sweep("sets:\n  a: {}\n  a: {}\n", "sweep.yaml", "a is given twice", "YAML"),
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
    Case(f"{STATUS} shards", "no run in", "shards", "name a folder that holds runs"),
    Case(f"{STATUS} runs --every -1", "--every is", "-1", "above 0"),
    Case(f"{STATUS} runs --every nan", "--every is", "nan", "above 0"),
    Case(f"{STATUS} runs --wach", "--wach", "unrecognized", "did you mean --watch?"),
]  # fmt: skip

CASES = [
    *OPTIONS_OF_TRAINERS, *CONTRADICTIONS, *PLACES_OF_TRAINERS, *SAMPLING, *EVALUATING, *LOOKING,
    *REPORTING, *EXERCISING, *BENCHMARKING, *SHARDS, *SLURM,
]  # fmt: skip
