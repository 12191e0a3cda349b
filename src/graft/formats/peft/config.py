"""PEFT's ``adapter_config.json``: which fields are honoured, which are harmless, which are refused.

Every field of PEFT 0.21's LoraConfig is decided here, and so is every field that it does not know: a
setting that changes what the adapter computes is either carried out or refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ...errors import FormatError, Problems

#: fields that say how training went, or what the tensors' names already say
HARMLESS = frozenset(
    [
        "task_type",
        "auto_mapping",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "merge_weights",
        "base_model_name_or_path",
        "peft_version",
        "peft_type",
        "init_lora_weights",
    ]
)

#: fields that the reader carries out
HONOURED = frozenset(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
    ]
)

#: fields that must be unset, and why
REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA works only after certain tokens, so no fused weight equals it",
    "use_qalora": "QA-LoRA pools the input in groups before A; its factors do not fit the weight",
    "monteclora_config": "MonteCLoRA samples its factors at run time, so no fused weight equals it",
    "layer_replication": "the adapter is for a model with replicated layers; replicate them in the base, "
    "save it, and set layer_replication to null",
    "megatron_config": "the adapter is for Megatron's layers; export it for the Hugging Face model first",
    "use_bdlora": "the factors are block-diagonal (BD-LoRA)",
    "arrow_config": "Arrow routes each token to other adapters, so no fused weight equals it",
    "kasa_config": "KaSA truncates the base's weights at training start; the adapter belongs to that base",
    "enable_lora": "MergedLinear adapters of PEFT before 0.3 do not say how their blocks lie",
}

_MUTATING = ("pissa", "corda", "olora", "lora_ga", "loftq")
_NEUTRAL = ("true", "false", "gaussian", "eva", "orthogonal", "mica", "none")


@dataclass(frozen=True)
class LoraSettings:
    """What of the configuration decides ΔW.

    Args:
        rank: the global rank. alpha: the global alpha.
        rank_pattern, alpha_pattern: exceptions by module, in the file's order.
        rslora: scale is alpha/√rank, not alpha/rank.
        version: PEFT's version as a tuple; None if the file does not say.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool | None
    bias: str
    lora_bias: bool
    dora: bool
    modules_to_save: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None
    target_parameters: tuple[str, ...]
    version: tuple[int, ...] | None

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of the module of this dotted name.

        PEFT's rule: the first key, in the file's order, for which ``(.*\\.)?(key)$`` matches.
        """
        rank = self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.rank)
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def pattern_key(patterns: Mapping[str, object], name: str) -> str:
    """The first pattern that matches the dotted name as PEFT matches it, else the name itself."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), name)


def parse(config: Mapping[str, object], where: object) -> LoraSettings:
    """Read and judge a PEFT configuration.

    Raises:
        FormatError: another PEFT method, a refused or unknown setting, a missing or senseless value.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        said = "does not say its peft_type" if kind is None else f"has peft_type {kind!r}"
        raise FormatError(f"{where} {said}; only LoRA adapters (peft_type 'LORA') can be read")
    problems = Problems(FormatError, f"{where} cannot be honoured:")
    _judge_fields(config, problems)
    _judge_initialisation(config.get("init_lora_weights", True), problems)
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if value is None:
            problems.add(f"{key} is missing (PEFT would silently take 8); add the value used in training")
        elif not _is_positive(value, whole=key == "r"):
            problems.add(f"{key} must be a positive {'integer' if key == 'r' else 'number'}, got {value!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        _judge_pattern(config.get(key), key, problems)
    _judge_types(config, problems)
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.add(f"bias must be 'none', 'all' or 'lora_only', got {config['bias']!r}")
    problems.raise_if_any()
    return _settings(config)


def _settings(config: Mapping[str, object]) -> LoraSettings:
    fan = config.get("fan_in_fan_out")
    return LoraSettings(
        rank=int(cast(int, config["r"])),
        alpha=float(cast(float, config["lora_alpha"])),
        rank_pattern=cast("Mapping[str, int]", config.get("rank_pattern") or {}),
        alpha_pattern=cast("Mapping[str, float]", config.get("alpha_pattern") or {}),
        rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=None if fan is None else bool(fan),
        bias=str(config.get("bias", "none")),
        lora_bias=bool(config.get("lora_bias")),
        dora=bool(config.get("use_dora")),
        modules_to_save=_names(config.get("modules_to_save")),
        tokens=_tokens(config.get("trainable_token_indices")),
        target_parameters=_names(config.get("target_parameters")),
        version=_version(config.get("peft_version")),
    )


def _judge_fields(config: Mapping[str, object], problems: Problems) -> None:
    for key, value in config.items():
        if not value:
            continue
        if key in REFUSED:
            problems.add(f"{key}: {REFUSED[key]}")
        elif key not in HARMLESS and key not in HONOURED:
            problems.add(
                f"{key}={value!r} is a setting that this version does not know; remove it from the file "
                "if it does not change what the adapter computes"
            )


def _judge_initialisation(value: object, problems: Problems) -> None:
    name = str(value).lower()
    if name.startswith(_MUTATING):
        problems.add(
            f"init_lora_weights={value!r} changed the base's weights at training start, so the adapter does "
            "not fit the original base; save it with "
            "save_pretrained(path, path_initial_model_for_weight_conversion=...), or fuse it into the "
            "changed base and set init_lora_weights to true"
        )
    elif name not in _NEUTRAL:
        problems.add(f"init_lora_weights={value!r} is unknown; set it to true if it left the base unchanged")


def _judge_types(config: Mapping[str, object], problems: Problems) -> None:
    """A setting of another type would be read as something that nobody meant: ``"false"`` is true."""
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            problems.add(f"{key} must be true or false, got {config[key]!r}")
    for key in ("modules_to_save", "target_parameters"):
        value = config.get(key)
        if not isinstance(value, str | None) and not _is_list(value, str):
            problems.add(f"{key} must be a list of names, got {value!r}")
    tokens = config.get("trainable_token_indices")
    lists = list(cast("Mapping[str, object]", tokens).values()) if isinstance(tokens, Mapping) else [tokens]
    if tokens is not None and not all(_is_list(one, int) for one in lists):
        problems.add(
            f"trainable_token_indices must be a list of tokens, or one for each module, got {tokens!r}"
        )


def _is_list(value: object, kind: type) -> bool:
    """A list of this very type; a token index is not negative."""
    if not isinstance(value, list):
        return False
    items = cast("list[object]", value)
    return all(type(one) is kind and (not isinstance(one, int) or one >= 0) for one in items)


def _judge_pattern(value: object, key: str, problems: Problems) -> None:
    if not value:
        return
    if not isinstance(value, Mapping):
        problems.add(f"{key} must map module patterns to numbers, got {value!r}")
        return
    for pattern, number in cast("Mapping[str, object]", value).items():
        if not _is_positive(number, whole=key == "rank_pattern"):
            problems.add(f"{key}[{pattern!r}] must be positive, got {number!r}")
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            problems.add(f"{key}[{pattern!r}] is not a regular expression: {error}")


def _is_positive(value: object, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return math.isfinite(value) and value > 0


def _names(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(map(str, cast("Sequence[object]", value)))


def _tokens(value: object) -> Mapping[str, tuple[int, ...]] | tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        given = cast("Mapping[str, Sequence[int]]", value)
        return {str(name): tuple(map(int, indices)) for name, indices in given.items()}
    return tuple(map(int, cast("Sequence[int]", value)))


def _version(value: object) -> tuple[int, ...] | None:
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(value or ""))
    return tuple(int(n or 0) for n in numbers.groups()) if numbers else None
