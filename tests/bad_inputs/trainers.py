"""Bad inputs of launch/train_*.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.build import build
from tests.bad_inputs.case import (
    HUGE,
    Case,
    Preparation,
    all_of,
    copied,
    flipped,
    made,
    picture,
    train,
    written,
)
from tests.support.tars import encode, write_tar

SOURCE = "--data.shards=null --data.source="
OPTIONS = [
    # Unknown keys, missing values.
    train("ddpm", "--train.colour=red", "--train.colour", "red", "see --help"),
    train("ddpm", "--train.kernel=false", "--train.kernel", "false", "mean --train.kernels?"),
    train("gan", "--gan.los=hinge", "--gan.los", "hinge", "did you mean --gan.loss?"),
    train("ddpm", "--train.global_bach=16", "--train.global_bach", "16", "--train.global_batch?"),
    train("ddpm", "extra", "unrecognized arguments", "extra", "see --help"),
    train("ddpm", "--run.dir", "--run.dir", "", "expected one argument"),
    train("ddpm", "--run.dir=", "run.dir is", "''", "give a value, or leave it out"),
    train("ddpm", "--data.source=", "data.source is", "''", "give a value, or leave it out"),
    train("ddpm", "--run.trackers=[crayon]", "run.trackers", "crayon", "choose from"),
    # Values of another type.
    train("ddpm", "--optim.lr=fast", "optim.lr", "fast", "give a number"),
    train("ddpm", "--run.seed=1.5", "run.seed", "1.5", "a whole number"),
    train("ddpm", "--train.micro_batch=many", "train.micro_batch", "many", "or null"),
    train("ddpm", "--train.kernels=perhaps", "train.kernels", "perhaps", "true or false"),
    train("ddpm", "--model.channel_mult=[1,x]", "model.channel_mult", "x", "a whole number"),
    train("ddpm", "--optim.betas=[0.9]", "optim.betas", "[0.9]", "2 elements"),
    train("ddpm", "--train.compile=some", "train.compile", "some", "'noise'"),
    train("flow", "--model.architecture=nice", "model.architecture", "nice", "'realnvp'"),
    train("ddpm", "--diffusion.schedule=square", "diffusion.schedule", "square", "'cosine'"),
    # NaN, infinity and numbers that are too large.
    train("ddpm", "--optim.lr=.nan", "optim.lr is", "nan", "give a number"),
    train("ddpm", "--optim.lr=1e308", "optim.lr is", "1e+308", "at most"),
    train("vae", "--vae.beta=1e309", "vae.beta is", "inf", "give a number"),
    train("ddpm", f"--run.seed={HUGE}", "run.seed is", HUGE, "below 2**64"),
    train("ddpm", "--run.seed=-1", "run.seed is", "-1", "choose 0 or more"),
    train("ddpm", f"--train.total_images={HUGE}", "train.total_images is", HUGE, "below 2**63"),
    train("ddpm", "--train.global_batch=1000000000000", "train.global_batch", "000", "1 to 104"),
    train("ddpm", "--train.samples_per_class=1000000", "train.samples_per_class", "000", "1 to 10"),
    train("ddpm", "--model.channels=4000000000", "model.channels", "4000000000", "choose small"),
    train("ddpm", "--model.channels=100000", "model.channels", "100000", "choose smaller"),
    train("ddpm", "--model.num_blocks=[1,1000000000]", "model.num_blocks", "000", "1 to 100"),
    train("ddpm", "--diffusion.num_timesteps=1000000000", "diffusion.num_timesteps", "00", "2 to "),
    train("gan", "--model.latent=1000000000000000", "model.latent", "10000", "choose smaller"),
    train("flow", "--model.levels=1000000000", "model.levels is", "1000000000", "1 to 1000"),
    train("ddpm", "--eval.every_images=16 --eval.num_images=1000000000", "eval.num_images",
          "1000000000", "2 to 1000000"),
    # Numbers out of range.
    train("ddpm", "--train.global_batch=0", "train.global_batch is", "0", "choose 1"),
    train("ddpm", "--train.micro_batch=-4", "train.micro_batch is", "-4", "choose 1"),
    train("ddpm", "--train.total_images=0", "train.total_images is", "0", "choose 1 or more"),
    train("ddpm", "--train.log_every_images=0", "train.log_every_images is", "0", "1 or more"),
    train("ddpm", "--train.save_every_images=-1", "train.save_every_images is", "-1", "0 or more"),
    train("ddpm", "--train.keep_checkpoints=0", "train.keep_checkpoints is", "0", "1 or more"),
    train("ddpm", "--train.ema_halflife_images=-5", "train.ema_halflife_images", "-5", "0 or more"),
    train("ddpm", "--optim.lr=0", "optim.lr is", "0", "above 0"),
    train("ddpm", "--optim.clip_norm=-1", "optim.clip_norm is", "-1", "0 or more"),
    train("ddpm", "--optim.betas=[0.9,1.0]", "optim.betas is", "[0.9, 1.0]", "below 1"),
    train("ddpm", "--eval.every_images=-1", "eval.every_images is", "-1", "0 or more"),
    train("ddpm", "--diffusion.label_drop=1.5", "diffusion.label_drop is", "1.5", "0 to 1"),
    train("ddpm", "--diffusion.min_snr_gamma=0", "diffusion.min_snr_gamma is", "0", "above 0"),
    train("ddpm", "--sample.guidance=-1", "sample.guidance is", "-1", "0 or more"),
    train("ddpm", "--sample.eta=2", "sample.eta is", "2", "0 to 1"),
    train("ddpm", "--sample.steps=1001", "sample.steps is", "1001", "1 to 1000"),
    train("ddpm", "--model.channels=6", "model.channels is", "6", "a multiple of 4"),
    train("ddpm", "--model.dropout=1", "model.dropout is", "1", "less than 1"),
    train("ddpm", "--model.patch_size=0", "model.patch_size is", "0", "1 or more"),
    train("ddpm", "--model.num_heads=0", "model.num_heads", "0", "change it"),
    train("ddpm", "--model.num_heads=3", "model.num_heads 3", "the width 8", "change it"),
    train("ddpm", "--model.num_blocks=[1,0]", "model.num_blocks is", "[1, 0]", "1 to 100"),
    train("ddpm", "--model.channel_mult=[0,1]", "model.channel_mult is", "[0, 1]", "1 or more"),
    train("ddpm", "--model.channel_mult=[] --model.num_blocks=[]", "model.channel_mult", "[]",
          "at least one level"),
    train("gan", "--gan.r1=-1", "gan.r1 is", "-1", "0 or more"),
    train("gan", "--gan.r1_interval=0", "gan.r1_interval is", "0", "1 or more"),
    train("gan", "--gan.discriminator_steps=0", "gan.discriminator_steps is", "0", "1 or more"),
    train("gan", "--gan.augment=[blur]", "gan.augment", "blur", "'cutout'"),
    train("gan", "--gan.augment=[color,color]", "gan.augment is", "color", "once"),
    train("gan", "--gan.discriminator_lr=0", "gan.discriminator_lr is", "0", "above 0"),
    train("gan", "--gan.augment_probability=0", "gan.augment_probability", "0", "above 0"),
    train("gan", "--sample.temperature=0", "sample.temperature is", "0", "above 0"),
    train("vae", "--model.latent=0", "model.latent is", "0", "1 or more"),
    train("vae", "--model.encoder_channels=0", "model.encoder_channels is", "0", "1 or more"),
    train("vae", "--model.channel_mult=[] --model.num_blocks=[]", "model.channel_mult is", "[]",
          "at least one level"),
    train("vae", "--vae.beta=-1", "vae.beta is", "-1", "0 or more"),
    train("vae", "--vae.free_bits=-0.1", "vae.free_bits is", "-0.1", "0 or more"),
    train("flow", "--model.steps=0", "model.steps is", "0", "1"),
    train("vae", "--sample.temperature=0", "sample.temperature is", "0", "above 0"),
    train("flow", "--model.hidden=0", "model.hidden is", "0", "1 or more"),
    train("flow", "--model.logit=0.5", "model.logit is", "0.5", "less than 0.5"),
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
          "the image side 32", "6 levels", "use fewer"),
    train("ddpm", "--model.patch_size=3", "model.patch_size", "3", "32"),
    train("ddpm", "--model.channel_mult=[1,2,2]", "model.num_blocks", "[1, 1]", "give 3"),
    train("ddpm", "--train.float64 --train.mixed_precision=bf16", "train.float64", "bf16",
          "set one"),
    train("ddpm", "--train.compile=graphs", "train.compile is", "graphs", "auto or all"),
    train("gan", "--model.architecture=dcgan --gan.r1=0.5", "gan.r1 is", "0.5",
          "model.discriminator_batch_norm false"),
    train("gan", "--train.micro_batch=4", "train.micro_batch", "4", "leave it out"),
    train("gan", "--eval.every_images=64 --eval.metric=bits_per_dim", "eval.metric is",
          "bits_per_dim", "fd_classifier"),
    train("gan", "--train.activation_checkpointing=true", "train.activation_checkpointing is",
          "true", "leave it out"),
    train("gan", "--diffusion.schedule=linear", "--diffusion.schedule", "linear", "see --help"),
    train("vae", "--model.channel_mult=[1] --model.num_blocks=[1] --model.encoder=encoder_decoder",
          "model.encoder is", "encoder_decoder", "two levels or more"),
    train("vae", "--model.num_blocks=[1,1]", "model.num_blocks is", "[1, 1]", "give 3 numbers"),
    train("flow", "--model.levels=6", "model.levels", "6", "lower model.levels"),
    train("flow", "--model.architecture=realnvp --model.levels=6", "model.levels 6",
          "leaves one pixel", "lower it"),
    train("flow", "--eval.every_images=64 --data.test_shards=null", "data.test_shards", "shards",
          "eval.every_images 0"),
]  # fmt: skip

TRAIN = "python launch/train_ddpm.py --config"
PATHS = [
    Case(f"{TRAIN} nowhere.yaml", "--config", "nowhere.yaml", "name a YAML file"),
    Case(f"{TRAIN} launch", "--config", "launch", "name a YAML file"),
    Case(f"{TRAIN}=", "--config", "''", "name a YAML file"),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "line 1", "YAML", written("bad.yaml", "train: [un\n")),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "train.colour", "see --help for the keys",
         written("bad.yaml", "train: {colour: red}\n")),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "train.kernel:", "did you mean train.kernels?",
         written("bad.yaml", "train: {kernel: false}\n")),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "the section train the value '3'", "write its keys",
         written("bad.yaml", "train: 3\n")),
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
    train("ddpm", f"--run.dir={60 * 'long-'}", "run.dir is", "long-long", "shorten it"),
    train("ddpm", "--run.dir=loop", "run.dir is", "loop", "name another",
          prepare=lambda folder: (folder / "loop").symlink_to("loop")),
    train("ddpm", "--run.dir=locked/run", "run.dir is", "locked", "name another",
          prepare=made("locked", 0o555), without_rights=True),
    train("ddpm", "--run.dir=runs/ddpm --optim.lr=0.5 --run.seed=7", "optim.lr was",
          "run.seed was 0, is 7", "another run.dir"),
    train("vae", "--run.dir=runs/ddpm", "runs/ddpm", "another family", "another run.dir"),
    # Threads.
    train("ddpm", "--train.threads=0", "train.threads is", "0", "1 to 1000"),
    train("ddpm", "--train.threads=all", "train.threads is", "all", "a whole number"),
    # The data.
    train("ddpm", "--data.shards=nowhere", "nowhere", "do not exist", "python -m shards.build"),
    train("ddpm", "--data.shards=empty", "empty", "no shards", "python -m shards.build",
          prepare=made("empty")),
    train("ddpm", "--data.shards=torn", "torn", "has changed", "build the shards again",
          prepare=copied("shards", "torn", flipped("*.tar"))),
    train("ddpm", f"{SOURCE}mnist", "source", "'mnist'", "choose cifar10"),
    train("ddpm", f"{SOURCE}folder:nowhere", "nowhere", "does not exist", "one folder per class"),
    train("ddpm", "--data.shards=null --data.resize=0 --data.source=folder:pictures", "resize is",
          "0", "1 to 4096"),
    train("gan", "--data.shards=odd", "images are", "24 x 24", "data.resize 32",
          prepare=lambda folder: _odd_shards(folder)),
]  # fmt: skip

FOLDER = f"{SOURCE}folder:"
FOLDERS = [
    # Image folders.
    train("ddpm", f"{FOLDER}mine", "1 of 32 x 32", "1 of 16 x 16", "--data.resize 32",
          prepare=all_of(picture("mine/cat/0.png"), picture("mine/dog/0.png", 16))),
    train("ddpm", f"{FOLDER}mine", "2 of 3 images", "cat/2.png is not a readable image",
          "--data.skip_bad",
          prepare=all_of(picture("mine/cat/0.png"), written("mine/cat/1.png", ""),
                         written("mine/cat/2.png", "no picture"))),
    train("vae", f"{FOLDER}pictures --data.holdout=1", "holdout is", "1.0", "a fraction from 0"),
    train("vae", f"{FOLDER}pictures --data.background=pink", "background is", "'pink'", "white"),
    train("gan", f"{SOURCE}shapes --data.holdout=0.1", "holdout is", "shapes", "leave it out"),
    train("flow", f"{FOLDER}pictures", "cannot write", "/data/folder-pictures", "DGM_DATA",
          prepare=written("data", "mine")),
    train("flow", f"{FOLDER}pictures", "/data/folder-pictures", "Permission denied",
          "--data.shards DIR", prepare=made("data", 0o555), without_rights=True),
]  # fmt: skip


def _odd_shards(folder: Path) -> None:
    """Build shards of an image size that no GAN supports."""
    all_of(picture("odd_pictures/a/0.png", 24), picture("odd_pictures/b/1.png", 24))(folder)
    build(f"folder:{folder / 'odd_pictures'}", "train", folder / "odd", progress=False)


PNG = encode(np.zeros((32, 32, 3), np.uint8), "png")


def foreign(*content: tuple[str, bytes]) -> Preparation:
    """Return a preparation that writes theirs/a.tar with these members."""
    return lambda folder: write_tar(folder / "theirs" / "a.tar", list(content))


FOREIGN = [
    train("vae", "--data.shards=theirs", "theirs", "(1 and 'cat')", "use one kind",
          prepare=foreign(("0.cls", b"1"), ("0.png", PNG), ("1.cls", b"cat"), ("1.png", PNG))),
    train("vae", "--data.shards=theirs", "theirs", "0 and '-1'", "use one kind",
          prepare=foreign(("0.cls", b"0"), ("0.png", PNG), ("1.cls", b"-1"), ("1.png", PNG))),
    train("vae", "--data.shards=theirs", "label", "9223372036854775808", "below 2**63, or names",
          prepare=foreign(("0.json", b'{"label": 9223372036854775808}'), ("0.png", PNG))),
    train("vae", "--data.shards=theirs", "sample 0", "no label", "json with label, cls",
          prepare=foreign(("0.json", b'{"note": 1}'), ("0.png", PNG))),
    train("vae", "--data.shards=theirs", "holds", "0.png twice", "rename or remove",
          prepare=foreign(("0.cls", b"1"), ("0.png", PNG), ("0.png", PNG))),
    train("vae", "--data.shards=theirs", "theirs holds", "compressed ones, such as a.tar.gz",
          "gzip -dc theirs/a.tar.gz > theirs/a.tar",
          prepare=written("theirs/a.tar.gz", b"\x1f\x8b" + bytes(9))),
    train("vae", "--data.shards=theirs.zip", "theirs.zip", "compressed",
          "unzip theirs.zip -d theirs", prepare=written("theirs.zip", b"PK\3\4" + bytes(9))),
    train("vae", f"{SOURCE}theirs.tar", "source", "'theirs.tar'",
          "give it as data.shards", prepare=written("theirs.tar", b"x")),
    train("vae", "--data.resize=5000", "resize is", "5000", "1 to 4096"),
]  # fmt: skip


# Names that other toolkits use, and mistakes in files.
NAMES = [
    train("ddpm", "--lr 1e-3", "--lr", "1e-3", "did you mean --optim.lr?"),
    train("ddpm", "--train.lr=1e-3", "--train.lr", "1e-3", "did you mean --optim.lr?"),
    train("gan", "--batch_size 8", "--batch_size", "8", "did you mean --train.global_batch?"),
    train("vae", "--epochs 3", "--epochs", "3", "did you mean --train.total_images?"),
    train("flow", "--seed 3", "--seed", "3", "did you mean --run.seed?"),
    train("ddpm", "--output_dir x", "--output_dir", "x", "did you mean --run.dir?"),
    train("ddpm", "--resume true", "--resume", "true", "same command again continues"),
    train("ddpm", "--num_workers 4", "--num_workers", "4", "leave it out"),
    train("ddpm", "--gan.r1 1", "--gan.r1", "1", "launch/train_gan.py"),
    train("ddpm", "--run.dir=~nobody-here/x", "run.dir is", "~nobody-here", "the whole path"),
    Case("python launch/train_ddpm.py ddpm.yaml", "ddpm.yaml", "unrecognized", "write --config"),
    train("ddpm", "--cfg x.yaml", "--cfg", "x.yaml", "did you mean --config?"),
    Case(f"{TRAIN} gan.yaml", "gan.yaml", "the section gan", "launch/train_gan.py"),
    Case(f"{TRAIN} bad.yaml", "bad.yaml", "learning_rate", "did you mean optim.lr?",
         written("bad.yaml", "optim: {learning_rate: 1e-4}\n")),
]  # fmt: skip

CASES = [*OPTIONS, *CONTRADICTIONS, *PATHS, *FOLDERS, *FOREIGN, *NAMES]
