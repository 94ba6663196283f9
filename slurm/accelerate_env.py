"""The environment variables of `accelerate launch`, from the same configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgm.common.errors import UserError
from dgm.common.yaml_io import read_yaml

_ENGINES = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED")
# What `accelerate launch` passes on and the trainers read (or refuse).
_VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
_DEEPSPEED_VARIABLES = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}


def read_accelerate(path: Path) -> dict[str, str]:
    """Return the variables that choose the engine; raise UserError for an unsupported file.

    Numbers of nodes and processes in the file are ignored: they come from the job.
    """
    try:
        config = read_yaml(path)
    except UserError as error:
        raise UserError(f"--accelerate-config {error}") from None
    engine = str(config.get("distributed_type", "NO")).upper()
    if engine not in _ENGINES:
        raise UserError(
            f"{path} has distributed_type {engine}, which the trainers do not support: choose "
            "NO, MULTI_GPU or DEEPSPEED"
        )
    variables = {_VARIABLES[key]: str(config[key]) for key in _VARIABLES if key in config}
    if backend := _section(path, config, "dynamo_config").get("dynamo_backend"):
        variables["ACCELERATE_DYNAMO_BACKEND"] = str(backend)
    if engine == "DEEPSPEED":
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        for key, value in _section(path, config, "deepspeed_config").items():
            if key in _DEEPSPEED_VARIABLES:
                variables[_DEEPSPEED_VARIABLES[key]] = str(value)
    return variables


def _section(path: Path, config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{path} has {name} {section!r}: give it keys and values")
    return section
