"""DeepSpeed-Chat and DeepSpeed-VisualChat: ``LinearLayer_LoRA``'s tensors in a state dict.

``<module>.lora_right_weight`` is ``[in, r]`` and ``.lora_left_weight`` is ``[r, out]``, so A and B are their
transposes. The scale is lora_scaling / lora_dim, and lora_scaling is not in the file (``--alpha``; the
original's default is 1). Source: DeepSpeedExamples, ``training/utils/module/lora.py``.
"""

from __future__ import annotations

from pathlib import Path

from ..adapter import Adapter, LowRank
from .blocks import joined
from .holding import Holds
from .ledger import Ledger
from .protocol import Loss, Options, Target, Written
from .source import Source
from .state_file import save_state
from .uniform import alpha_of, commonest_scale, one_rank, with_scale

_RIGHT, _LEFT = "lora_right_weight", "lora_left_weight"
_HOLDS = Holds("DeepSpeed-Chat")
_WHOLE = (
    "the file holds the whole model: whether fuse_lora_weight had added ΔW to it is told by comparing its "
    "frozen weights with the base's, where both have one dtype or the file's is float32"
)


class DeepSpeedChatFormat:
    """The format's entry in the registry."""

    name = "deepspeed-chat"

    def detect(self, source: Source) -> bool:
        """By content: tensors whose last name component is one of the two."""
        return any(key.rpartition(".")[2] in (_RIGHT, _LEFT) for key in source.tensors)

    def read(self, source: Source, options: Options) -> Adapter:
        options.refuse_unused("DeepSpeed-Chat", enable_lora=True)
        alpha = options.alpha_for("DeepSpeed-Chat", source.weights, "lora_scaling")
        ledger = Ledger(source.tensors, source.weights)
        ledger.check_tensors()
        ledger.problems.raise_if_any()
        sites: dict[str, LowRank] = {}
        for key in source.tensors:
            module, _, leaf = key.rpartition(".")
            if leaf == _RIGHT and f"{module}.{_LEFT}" in source.tensors:
                a, b = ledger.take(key), ledger.take(f"{module}.{_LEFT}")
                if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
                    ledger.problems.add(
                        f"{module}: {_RIGHT} {list(a.shape)} and {_LEFT} {list(b.shape)} are not of one rank"
                    )
                else:
                    sites[f"{module}.weight"] = LowRank(a.T, b.T, alpha / a.shape[1], fan_in_fan_out=False)
        ledger.close(explain=_explain)
        notes = (_WHOLE,) if source.beside else ()
        return Adapter(sites, format="deepspeed-chat", config={"lora_scaling": alpha}, notes=notes)

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        found = _HOLDS.losses(adapter)
        why = "DeepSpeed-Chat adapts nn.Linear, whose weight is stored [out, in]"
        turned = [n for n, s in adapter.sites.items() if s.layout is not None and s.layout.transposed]
        gone = {loss.name for loss in found if loss.part == "site"}
        return [*found, *(Loss("site", name, why) for name in turned if name not in gone)]

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        rank, sites = one_rank({name: joined(site) for name, site in adapter.sites.items()})
        alpha = alpha_of(commonest_scale(sites), rank)
        sites, notes = with_scale(sites, alpha / rank)
        tensors = {f"{n.removesuffix('.weight')}.{_RIGHT}": site.A.T for n, site in sites.items()}
        tensors |= {f"{n.removesuffix('.weight')}.{_LEFT}": site.B.T for n, site in sites.items()}
        save_state(tensors, path)
        said = (
            f"the scale is not in the file: convert_linear_layer_to_lora(…, lora_dim={rank}, "
            f"lora_scaling={alpha:g}), then load_state_dict(strict=False)"
        )
        return Written([said, *notes], {"alpha": float(alpha)})


def _explain(key: str) -> str:
    leaf = key.rpartition(".")[2]
    if leaf in (_RIGHT, _LEFT):
        return f"it has no {_LEFT if leaf == _RIGHT else _RIGHT}"
    return "not a tensor of DeepSpeed-Chat's LoRA"
