"""Graft's own state dict as a trainer saved it: ``<module>.lora_A`` and ``lora_B`` beside the base's names.

The names say which parameter is adapted (``lora_A_<parameter>`` if it is not ``weight``), an
``adapter_config.json`` (as ``graft.save`` writes it) says the scale, and the base's shapes say the layout.
"""

from __future__ import annotations

from ..adapter import Adapter, LowRank
from ..errors import FormatError
from .ledger import Ledger
from .peft import config as peft_config
from .peft.config import LoraSettings
from .protocol import Options
from .source import Source


class GraftFormat:
    """The format's entry in the registry."""

    name = "graft"

    def detect(self, source: Source) -> bool:
        """By content: names that end in ``lora_A`` and ``lora_B``, and a configuration."""
        leaves = {key.rpartition(".")[2] for key in source.tensors}
        ours = bool(leaves) and all(leaf.startswith(("lora_A", "lora_B")) for leaf in leaves)
        return ours and source.config is not None and "peft_type" in source.config

    def read(self, source: Source, options: Options) -> Adapter:
        options.refuse_unused("Graft's checkpoint", alpha=True, enable_lora=True)
        return _read(source)


def _read(source: Source) -> Adapter:
    assert source.config is not None
    settings = peft_config.parse(source.config, source.config_path)
    ledger = Ledger(source.tensors, source.weights)
    ledger.check_tensors()
    ledger.problems.raise_if_any()
    if settings.dora or settings.lora_bias:
        raise FormatError(f"{source.config_path} asks for DoRA or lora_bias, which Graft's modules have not")
    sites: dict[str, LowRank] = {}
    for key in source.tensors:
        module, _, leaf = key.rpartition(".")
        if not leaf.startswith("lora_A"):
            continue
        other = f"{module}.{leaf.replace('lora_A', 'lora_B', 1)}".lstrip(".")
        a = ledger.take(key)
        if other not in source.tensors:
            ledger.problems.add(f"{key} has no {other}")
            continue
        b = ledger.take(other)
        parameter = leaf.removeprefix("lora_A").removeprefix("_") or "weight"
        rank, scale = _settings(settings, module, parameter)
        if a.dim() != 2 or b.dim() != 2 or b.shape[1] != rank or a.shape[0] % rank:
            ledger.problems.add(
                f"{key} {list(a.shape)} and {other} {list(b.shape)} are not of rank {rank}, which "
                f"{source.config_path.name} says (r and rank_pattern)"
            )
            continue
        fan = settings.fan_in_fan_out or None
        name = f"{module}.{parameter}".lstrip(".")
        sites[name] = LowRank(a, b, scale, fan_in_fan_out=fan, kind="graft")
    ledger.close(explain=lambda key: "its lora_A is missing")
    return Adapter(sites, format="graft", config=dict(source.config))


def _settings(settings: LoraSettings, module: str, parameter: str) -> tuple[int, float]:
    """Rank and scale: PEFT's patterns are written for the plain model's names, which these may extend."""
    parts = module.split(".")
    names = [".".join(parts[start:]) for start in range(len(parts))]
    names = names if parameter == "weight" else [f"{name}.{parameter}" for name in names]
    for name in names:
        for patterns in (settings.rank_pattern, settings.alpha_pattern):
            if peft_config.pattern_key(patterns, name) != name or name in patterns:
                return settings.of(name)
    return settings.of(names[0])
