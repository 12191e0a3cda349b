"""A ``torch_dist`` checkpoint of an adapter → the neutral carrier under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...adapter import Adapter, LowRank
from ...errors import FormatError
from ..ledger import Ledger, listed
from ..model_facts import ModelFacts, expert_count, model_facts, model_type
from ..protocol import Options
from ..source import Source
from . import fused, run_config
from .axes import each
from .names import Key, Module, is_adapter, is_optimizer, modules_of, parameter_of, parse

Roles = dict[str, Key]
Factor = torch.Tensor


def read(source: Source, options: Options) -> Adapter:
    """Read the adapter's tensors; scale = alpha / the adapter's own rank.

    Raises:
        FormatError: full tensors that were trained too, modules that are not known, ranks that
            ``run_config.yaml`` contradicts, no alpha, or q, k, v without the base's number of heads.
    """
    options.refuse_unused("Megatron", enable_lora=True)
    reader = _Reader(source, options)
    return reader.read()


class _Reader:
    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self.run = run_config.read(source)
        names = [name for name in source.tensors if is_adapter(name)]
        self.ledger = Ledger({name: source.tensors[name] for name in names}, source.weights)
        self.problems = self.ledger.problems
        self.table = modules_of(model_type(options.model))
        self.sites: dict[str, LowRank] = {}
        self.notes: list[str] = []
        self.untouched: list[str] = []

    def read(self) -> Adapter:
        alpha = self._alpha()
        self._others()
        self.ledger.check_tensors()
        self.problems.raise_if_any()
        modules: dict[tuple[Module, str], Roles] = {}
        for name in self.ledger.left():
            key = parse(name)
            if key is not None:
                modules.setdefault((key.module, key.part), {})[key.role + key.half] = key
        for (module, part), roles in modules.items():
            self._module(module, part, roles, alpha)
        self.ledger.close(explain=lambda key: "no module of Megatron's that is known here")
        if self.untouched:
            self.notes.append(f"zero in their fused module, so left out: {listed(self.untouched)}")
        config: dict[str, object] = {"alpha": alpha, "dim": self.run.dim}
        return Adapter(
            self.sites,
            format="megatron",
            config=config,
            notes=tuple(self.notes),
            base=self.source.fingerprints,
        )

    def _alpha(self) -> float:
        self.options.refuse_unused(run_config.NAME, alpha=self.run.alpha is not None)
        if self.run.alpha is not None:
            return self.run.alpha
        where = f"{self.source.weights} (no {run_config.NAME} with peft.alpha beside it)"
        return self.options.alpha_for("Megatron", where, "peft.alpha")

    def _others(self) -> None:
        """Tensors that are no adapter's: the optimizer's are passed over, a model's were trained."""
        rest = [name for name in self.source.tensors if not is_adapter(name)]
        optimizer = [name for name in rest if is_optimizer(name)]
        if optimizer:
            self.notes.append(f"the optimizer's states were passed over ({len(optimizer)} tensors)")
        full = [name for name in rest if not is_optimizer(name)]
        if full:
            raise FormatError(
                f"{self.source.weights} holds {len(full)} tensors besides the adapter's ({listed(full, 3)}); "
                "whether they were trained cannot be told. Save the adapter's alone, as Megatron-Bridge does"
            )

    def _module(self, module: Module, part: str, roles: Roles, alpha: float) -> None:
        a, b = self._taken(roles, "A"), self._taken(roles, "B")
        halves = [self._taken(roles, f"B{half}") for half in fused.GATED]
        magnitude = self._taken(roles, "magnitude")
        if b is None and halves[0] is not None and halves[1] is not None:
            b = torch.cat([halves[0], halves[1]], dim=-2)
        text = next(iter(roles.values())).text
        if a is None or b is None:
            self.problems.add(f"{text}: {'linear_in' if a is None else 'linear_out'}.weight is missing")
            return
        try:
            for one, factor_a, factor_b, m in each(module, a, b, magnitude, self._expert_count):
                self._check_rank(module, factor_a, factor_b)
                self._add(one, part, factor_a, factor_b, m, alpha)
        except ValueError as error:
            self.problems.add(f"{text}: {error}")

    def _taken(self, roles: Roles, role: str) -> Factor | None:
        key = roles.get(role)
        return None if key is None else self.ledger.take(key.text)

    def _expert_count(self) -> int:
        return expert_count(self.options.model, "Megatron's adapter that all experts share")

    def _check_rank(self, module: Module, a: Factor, b: Factor) -> None:
        """Raises ValueError: factors that disagree, or a rank that the run's configuration does not give."""
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"linear_in {list(a.shape)} and linear_out {list(b.shape)} do not agree")
        wanted = self.run.expert_dims if module.is_expert else {self.run.dim}
        if self.run.dim is not None and a.shape[0] not in wanted:
            said = " or ".join(map(str, sorted(n for n in wanted if n is not None)))
            raise ValueError(f"rank {a.shape[0]}, where {run_config.NAME} says {said}")

    def _add(self, module: Module, part: str, a: Factor, b: Factor, m: Factor | None, alpha: float) -> None:
        scale = alpha / a.shape[0]
        parts = () if module.is_head or part else tuple(self.table.get(module.name, ()))
        if parts in ((), ("",)):
            self._site(module, part, LowRank(a, b, scale, magnitude=m))
            return
        rows = fused.split(b, parts, self._facts(parts))
        norms = {} if m is None else self._magnitudes(m, parts)
        used = {name: block.any(dim=0) for name, block in rows.items()}
        for name, block in rows.items():
            ranks, others = used[name], any(bool(u.any()) for n, u in used.items() if n != name)
            if not ranks.any() and others and m is None:
                self.untouched.append(parameter_of(module, name, self.table))
                continue
            trim = bool(ranks.any()) and not bool(ranks.all())
            factors = (a[ranks], block[:, ranks]) if trim else (a, block)
            self._site(module, name, LowRank(*factors, scale, magnitude=norms.get(name)))

    def _facts(self, parts: tuple[str, ...]) -> ModelFacts | None:
        if parts != fused.QKV:
            if not self.run.gated:
                raise ValueError(
                    f"{run_config.NAME} says that the model's MLP has no gate, which is not known here"
                )
            return None
        if self.options.model is None and self.run.facts is not None:
            return self.run.facts
        return model_facts(self.options.model, "Megatron's linear_qkv")

    def _magnitudes(self, m: Factor, parts: tuple[str, ...]) -> Mapping[str, Factor]:
        """DoRA's magnitude of a fused module; Bridge saves that of fc1 rank by rank, [gate; up] each."""
        if parts == fused.GATED:
            if self.run.ranks is None:
                raise ValueError(
                    "the order of DoRA's magnitude is not known without model.tensor_model_parallel_size "
                    f"of {run_config.NAME}"
                )
            m = m.reshape(self.run.ranks, 2, -1).transpose(0, 1).flatten()
        return fused.split(m, parts, self._facts(parts))

    def _site(self, module: Module, part: str, site: LowRank) -> None:
        name = parameter_of(module, part, self.table)
        if module.is_head:
            site = self._without_padding(site)
        if name in self.sites:
            raise ValueError(f"{name} is adapted twice")
        self.sites[name] = LowRank(site.A, site.B, site.scale, magnitude=site.magnitude, fan_in_fan_out=False)

    def _without_padding(self, site: LowRank) -> LowRank:
        """Megatron pads the vocabulary; the padded tokens are no one's."""
        count = (self.options.model or {}).get("vocab_size")
        if not isinstance(count, int) or site.B.shape[0] <= count:
            return site
        self.notes.append(f"{site.B.shape[0] - count} rows of output_layer pad the vocabulary; left out")
        return LowRank(site.A, site.B[:count], site.scale)
