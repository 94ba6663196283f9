"""Hints for unknown keys and options, from similar names and from those of other toolkits."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from dgm.common.suggestions import nearest

# Names in the scripts of diffusers and Hugging Face, in Lightning's Trainer and in well-known
# repositories, by our key. A family that lacks a key has no such hint.
_FOREIGN_NAMES = {
    "optim.lr": "learning_rate base_lr max_lr init_lr",
    "optim.warmup_images": "warmup warmup_steps lr_warmup_steps num_warmup_steps warmup_ratio",
    "optim.decay": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "optim.clip_norm": "max_grad_norm gradient_clip_val grad_clip clip_grad gradient_clipping",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "adam_eps adam_epsilon",
    "optim.weight_decay": "wd adam_weight_decay",
    "train.global_batch": "batch_size batch train_batch_size total_batch_size global_batch_size "
    "train_batch per_device_train_batch_size per_gpu_train_batch_size",
    "train.micro_batch": "micro_batch_size gradient_accumulation_steps accumulate_grad_batches "
    "grad_accum",
    "train.total_images": "epochs epoch num_epochs max_epochs n_epochs num_train_epochs steps "
    "num_steps max_steps train_steps max_train_steps total_steps iterations iters num_iters "
    "max_iters kimg total_kimg",
    "train.save_every_images": "save_steps save_every checkpointing_steps save_interval "
    "every_n_train_steps save_model_epochs checkpoint_every",
    "train.keep_checkpoints": "save_total_limit checkpoints_total_limit save_top_k",
    "train.log_every_images": "logging_steps log_every log_every_n_steps log_interval",
    "train.sample_every_images": "sample_every sample_interval save_images_epochs "
    "save_and_sample_every validation_steps validation_epochs",
    "train.ema_halflife_images": "ema use_ema ema_decay ema_rate ema_max_decay ema_beta",
    "train.mixed_precision": "precision fp16 bf16 amp use_fp16 use_amp",
    "train.activation_checkpointing": "gradient_checkpointing grad_checkpoint use_checkpoint",
    "train.compile": "torch_compile compile_model",
    "train.tf32": "allow_tf32",
    "train.overfit_one_batch": "overfit_batches fast_dev_run",
    "train.detect_anomaly": "anomaly",
    "eval.every_images": "eval_steps eval_every eval_interval val_check_interval fid_every",
    "run.seed": "random_seed manual_seed",
    "run.dir": "output_dir output out out_dir outdir save_dir save_path log_dir logdir logging_dir "
    "default_root_dir exp_dir workdir work_dir results_folder run_name name",
    "run.trackers": "report_to logger log_with wandb use_wandb tensorboard",
    "data.source": "dataset dataset_name data data_name train_data_dir data_dir data_path "
    "data_root dataroot",
    "data.resize": "resolution image_size img_size imsize size",
    "diffusion.schedule": "beta_schedule noise_schedule ddpm_beta_schedule noise_scheduler",
    "diffusion.num_timesteps": "timesteps ddpm_num_steps num_train_timesteps diffusion_steps",
    "diffusion.prediction": "prediction_type parameterization objective pred_type",
    "diffusion.min_snr_gamma": "snr_gamma",
    "diffusion.label_drop": "cond_drop_prob p_uncond class_dropout_prob cfg_dropout",
    "diffusion.class_conditional": "class_cond",
    "sample.steps": "num_inference_steps ddpm_num_inference_steps sampling_steps "
    "sampling_timesteps",
    "sample.temperature": "truncation truncation_psi trunc",
    "sample.guidance": "guidance_scale cfg_scale cfg cond_scale",
    "model.channel_mult": "dim_mults ch_mult channel_mults",
    "model.channels": "dim model_channels base_channels num_channels ch",
    "model.latent": "latent_dim z_dim zdim nz latent_size",
    "model.generator_channels": "ngf",
    "model.discriminator_channels": "ndf",
    "gan.r1": "r1_gamma gp_weight",
    "gan.discriminator_steps": "n_critic d_steps",
    "gan.discriminator_lr": "d_lr lr_d",
    "gan.augment": "diffaug policy",
    "vae.beta": "kl_weight kld_weight",
}
_KEY_OF = {name: key for key, names in _FOREIGN_NAMES.items() for name in names.split()}
_NOTES = {
    "train.global_batch": "images per step over all processes",
    "train.micro_batch": "images per forward pass; smaller ones accumulate gradients",
    "train.total_images": "all lengths are counted in images: steps times train.global_batch, or "
    "epochs times the images of the data set",
    "data.source": "cifar10, shapes or folder:PATH; data.shards for shards",
    "train.ema_halflife_images": "the half-life of the average, in images",
}
for _key in ("optim.warmup_images", "train.save_every_images", "train.log_every_images"):
    _NOTES[_key] = "counted in images, not in steps"

_NOT_NEEDED = {
    "leave it out: the same command again continues the run in run.dir": "resume resume_from "
    "resume_from_checkpoint resume_path ckpt ckpt_path checkpoint load_checkpoint",
    "leave it to accelerate launch, which chooses engine and processes": "devices device gpus gpu "
    "num_gpus nproc_per_node num_processes num_nodes nodes strategy accelerator deepspeed "
    "zero_stage local_rank",
    "leave it out: images are read from memory, without loader processes": "num_workers workers "
    "dataloader_num_workers n_workers pin_memory",
}
_ADVICE = {name: advice for advice, names in _NOT_NEEDED.items() for name in names.split()}

# The same for scripts that sample or evaluate; an option that a script lacks is not suggested.
_OPTIONS = {
    "out": "output output_dir out_dir outdir save_dir save_path dest output_path",
    "batch": "batch_size sample_batch_size",
    "per_class": "num_samples n_samples samples n num_per_class images_per_class samples_per_class",
    "num_images": "num_samples n_samples samples n num_gen num_generated",
    "num_test": "num_test_images n_test",
    "steps": "num_inference_steps sampling_steps sampling_timesteps ddim_steps timesteps",
    "guidance": "guidance_scale cfg_scale cfg scale",
    "checkpoint": "ckpt ckpt_path checkpoint_path step images_seen",
    "seed": "random_seed manual_seed",
    "seeds": "num_seeds n_seeds",
    "metrics": "metric measure measures",
    "average": "ema use_ema",
    "classes": "class class_label class_labels labels label class_idx",
    "weights": "inception_weights inception_path",
    "num_shown": "nrow num_columns",
    "data": "source dataset dataset_name",
    "compile": "torch_compile",
}  # fmt: skip


def suggest_key(unknown: str, known: Collection[str]) -> str | None:
    """Return a hint for an unknown key of a trainer (`section.name` or `name`); None without one.

    `known` holds the trainer's keys.
    """
    section, _, last = unknown.lower().replace("-", "_").rpartition(".")
    by_last = {key.rpartition(".")[2]: key for key in known}
    siblings = [key for key in known if key.startswith(f"{section}.")]
    same_name = [key for key in known if key.rpartition(".")[2] == last]
    foreign = _KEY_OF.get(last)
    if siblings and (near := nearest(f"{section}.{last}", siblings)):
        return f"did you mean {near}?"
    if foreign in known:
        return f"did you mean {foreign}?" + (f" ({_NOTES[foreign]})" if foreign in _NOTES else "")
    if len(same_name) == 1:
        return f"did you mean {same_name[0]}?"
    if last in _ADVICE:
        return _ADVICE[last]
    if same_name:
        return f"did you mean one of {', '.join(same_name)}?"
    near = nearest(unknown, known) or by_last.get(nearest(last, by_last) or "")
    return f"did you mean {near}?" if near else None


def suggest_option(unknown: str, known: Iterable[str]) -> str | None:
    """Return a hint for an unknown option of a script (`--name`); None without one."""
    options = list(known)
    if near := nearest(unknown, options):
        return f"did you mean {near}?"
    name = unknown.lower().lstrip("-").replace("-", "_")
    for option, names in _OPTIONS.items():
        if name in names.split() and f"--{option}" in options:
            return f"did you mean --{option}?"
    return None
