"""PEFT's files → the neutral carrier."""

from __future__ import annotations

import torch

from ...adapter import Adapter, LowRank
from ...errors import FormatError
from ..ledger import Ledger, listed
from ..source import Source
from . import config as peft_config
from . import keys as peft_keys
from .config import LoraSettings
from .keys import Key
from .parameters import packed

Module = tuple[str, ...]

_MHA_NOTE = (
    "{names}: MultiheadAttention; PEFT 0.21 adds the update of out_proj twice in its forward and merge, "
    "Graft adds what the file says, once"
)


def read(source: Source) -> Adapter:
    """Read a PEFT LoRA adapter.

    Site names are what the file claims; :func:`graft.bind.bind` fits them to a base.

    Raises:
        FormatError: another method, a setting that cannot be honoured, a tensor that is missing, left
            over, empty, not finite, or of a rank that the configuration contradicts.
    """
    if source.config is None:
        raise FormatError(
            f"{source.weights} has PEFT's tensor names but there is no {source.config_path.name} beside it, "
            "which holds the rank and alpha; put it there or name it with --adapter-config"
        )
    settings = peft_config.parse(source.config, source.config_path)
    reader = _Reader(source, settings)
    return reader.read()


class _Reader:
    def __init__(self, source: Source, settings: LoraSettings) -> None:
        self.source, self.settings = source, settings
        self.ledger = Ledger(source.tensors, source.weights)
        self.problems = self.ledger.problems
        self.keys = [peft_keys.parse(text) for text in source.tensors]
        self.adapters = frozenset({k.adapter for k in self.keys if k.adapter} | {"default"})
        self.notes: list[str] = []
        self.unmatched: list[str] = []
        self.sites: dict[str, LowRank] = {}
        self.replace: dict[str, torch.Tensor] = {}
        self.shift: dict[str, tuple[torch.Tensor, float]] = {}
        self.rows: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}

    def read(self) -> Adapter:
        self.ledger.check_tensors()
        self.problems.raise_if_any()
        self._one_adapter()
        modules = self._modules()
        self._factors(modules)
        self._tokens()
        self._plain()
        self.ledger.close(explain=_explain)
        self._patterns()
        if not (self.sites or self.replace or self.rows):
            raise FormatError(f"{self.source.weights} holds no adapter tensors")
        return Adapter(
            self.sites, self.replace, self.shift, self.rows,
            format="peft", config=dict(self.source.config or {}), notes=tuple(self.notes),
            unmatched=tuple(self.unmatched), base=self.source.fingerprints,
        )  # fmt: skip

    def _one_adapter(self) -> None:
        names = sorted({k.adapter for k in self.keys if k.adapter})
        if len(names) > 1:
            raise FormatError(
                f"{self.source.weights} holds several adapters ({', '.join(names)}); save one of them alone"
            )

    def _modules(self) -> dict[Module, dict[str, Key]]:
        """Adapter tensors by their module, wrappers included, in the file's order."""
        modules: dict[Module, dict[str, Key]] = {}
        for key in self.keys:
            if key.role in ("plain", "tokens", "tokens_original"):
                continue
            roles = modules.setdefault(key.module, {})
            if key.role in roles:
                self.ledger.take(key.text)
                self.problems.add(f"{key.text} and {roles[key.role].text} are the same tensor of one module")
                continue
            roles[key.role] = key
        return modules

    def _factors(self, modules: dict[Module, dict[str, Key]]) -> None:
        attention = {m[:-2] for m in modules if m[-2:] == ("base_layer", "out_proj") and m[:-2] in modules}
        if attention:
            names = listed(sorted(".".join(self._plain_name(m)) for m in attention))
            self.notes.append(_MHA_NOTE.format(names=names))
        wrapped: dict[Module, list[Module]] = {}
        for module in modules:
            wrapped.setdefault(self._plain_name(module), []).append(module)
        for name, found in wrapped.items():
            pairs = [(m, pair) for m in found if (pair := self._pair(modules[m])) is not None]
            candidates = self._candidates(name)
            if candidates and not any(m in attention for m in found):
                outermost_last = sorted(pairs, key=lambda pair: -len(pair[0]))
                packed(self, name, [p for _, p in outermost_last], candidates)
                continue
            if len(found) > 1:
                self.problems.add(
                    f"{'.'.join(name)} is wrapped {len(found)} times, but {self.source.config_path.name} "
                    "names no target_parameters for it"
                )
            for module, (a, b) in pairs:
                owner = name[:-1] if module[-2:] == ("base_layer", "out_proj") else name
                leaf = "in_proj_weight" if module in attention else "weight"
                self._site(module, name, leaf, owner, modules[module], a, b)

    def _plain_name(self, module: Module) -> Module:
        return peft_keys.plain_module(module, self.adapters)

    def _pair(self, roles: dict[str, Key]) -> tuple[Key, Key] | None:
        """A and B of one module; a missing half is recorded and the other counted as used."""
        for one, other in (("A", "B"), ("embedding_A", "embedding_B")):
            a, b = roles.get(one), roles.get(other)
            if a and b:
                return a, b
            alone = a or b
            if alone:
                self.ledger.take(alone.text)
                self.problems.add(f"{alone.text} has no {'B' if a else 'A'}")
        for role in ("B_bias", "magnitude"):
            if role in roles:
                self.ledger.take(roles[role].text)
        return None

    def _candidates(self, module: Module) -> list[str]:
        """Parameters of this module that ``target_parameters`` names, by PEFT's suffix rule."""
        full = ".".join(module)
        names: list[str] = []
        for target in self.settings.target_parameters:
            owner, _, leaf = target.rpartition(".")
            if not owner or full == owner or full.endswith(f".{owner}"):
                names.append(leaf)
        return sorted(set(names))

    def _site(
        self, module: Module, name: Module, leaf: str, owner: Module, roles: dict[str, Key], a: Key, b: Key
    ) -> None:
        rank, scale = self.settings.of(".".join(owner))
        factor_a, factor_b = self.ledger.take(a.text), self.ledger.take(b.text)
        shape = (*factor_b.shape[:1], *factor_a.shape[1:]) if factor_a.dim() > 2 else None
        kind, factor_a, factor_b = self._shaped(a, factor_a, factor_b)
        magnitude = self._magnitude(roles, b)
        self._bias(roles, name, leaf, scale)
        if factor_a.shape[1:] == factor_b.shape[:1] == (rank,) != factor_a.shape[:1]:
            self.problems.add(
                f"{a.text} {list(factor_a.shape)} and {b.text} {list(factor_b.shape)} are transposed or "
                f"exchanged: A is [r, in] and B is [out, r], and r is {rank}"
            )
            return
        if factor_a.dim() != 2 or factor_b.dim() != 2 or factor_a.shape[0] != factor_b.shape[1]:
            self.problems.add(
                f"{a.text} and {b.text} do not agree on the rank: "
                f"A {list(factor_a.shape)}, B {list(factor_b.shape)}"
            )
            return
        if factor_a.shape[0] != rank:
            self.problems.add(
                f"{a.text} has rank {factor_a.shape[0]}, but {self.source.config_path.name} says {rank} "
                "(r and rank_pattern)"
            )
            return
        fan = self.settings.fan_in_fan_out if kind == "linear" else None
        self.sites[".".join((*name, leaf))] = LowRank(
            factor_a, factor_b, scale, magnitude=magnitude, fan_in_fan_out=fan, kind=kind, shape=shape
        )

    def _shaped(self, a: Key, A: torch.Tensor, B: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
        """Kind of the module and its factors as 2-D tensors."""
        if a.role == "embedding_A":
            return "embedding", A, B
        if A.dim() < 3:
            return "linear", A, B
        if B.dim() > 1 and B.shape[1] != A.shape[0]:
            self.problems.add(
                f"{a.text}: a grouped convolution (its B has {B.shape[1]} of {A.shape[0]} ranks per group); "
                "PEFT's A reads all input channels, so no weight of the grouped convolution equals it"
            )
            return "conv", A.flatten(1), B.flatten(1).repeat(1, A.shape[0])[:, : A.shape[0]]
        return "conv", A.flatten(1), B.flatten(1)

    def _magnitude(self, roles: dict[str, Key], b: Key) -> torch.Tensor | None:
        key = roles.get("magnitude")
        tensor = self.ledger.take(key.text).flatten() if key else None
        if self.settings.dora and tensor is None:
            self.problems.add(f"{b.text}: use_dora is set but the module has no lora_magnitude_vector")
        if key and not self.settings.dora:
            self.problems.add(f"{key.text}: a DoRA magnitude, but use_dora is not set")
        return tensor

    def _bias(self, roles: dict[str, Key], name: Module, leaf: str, scale: float) -> None:
        key = roles.get("B_bias")
        if key is None:
            return
        tensor = self.ledger.take(key.text)
        if not self.settings.lora_bias:
            self.problems.add(f"{key.text}: a bias of lora_B, but lora_bias is not set")
        self.shift[".".join((*name, leaf.replace("weight", "bias")))] = (tensor, scale)

    def _tokens(self) -> None:
        """Trained rows of embeddings (``trainable_token_indices``)."""
        found = [key for key in self.keys if key.role == "tokens"]
        for key in self.keys:
            if key.role == "tokens_original":
                self.ledger.take(key.text)
        for key in found:
            delta = self.ledger.take(key.text)
            name = ".".join(self._plain_name(key.module))
            indices = self._indices(name, alone=len(found) == 1)
            if indices is None:
                self.problems.add(f"{key.text}: trainable_token_indices does not name {name}")
            elif len(indices) != delta.shape[0] or len(set(indices)) != len(indices):
                self.problems.add(
                    f"{key.text} holds {delta.shape[0]} rows, trainable_token_indices names {len(indices)} "
                    f"tokens of which {len(set(indices))} are distinct"
                )
            else:
                self.rows[f"{name}.weight"] = (indices, delta)

    def _indices(self, module: str, alone: bool) -> tuple[int, ...] | None:
        tokens = self.settings.tokens
        if isinstance(tokens, tuple):
            return tokens if alone else None
        return next((indices for name, indices in (tokens or {}).items() if module.endswith(name)), None)

    def _plain(self) -> None:
        """Full tensors: modules_to_save, trained biases, embeddings saved whole."""
        originals: list[Key] = []
        for key in self.keys:
            if key.role != "plain" or _looks_like_factor(key):
                continue
            if "original_module" in key.module:
                originals.append(key)
                continue
            name = ".".join((*self._plain_name(key.module), key.leaf))
            tensor = self.ledger.take(key.text)
            known = self.replace.get(name)
            if known is not None and not (known.shape == tensor.shape and torch.equal(known, tensor)):
                self.problems.add(f"{key.text}: {name} is saved twice with different values")
            self.replace[name] = tensor
        for key in originals:
            name = ".".join((*self._plain_name(key.module), key.leaf))
            if name in self.replace:
                self.ledger.take(key.text)

    def _patterns(self) -> None:
        """Patterns that match no module: harmless when names are as trained, else possibly a lost scale."""
        names = {key.module for key in self.keys if key.role in ("A", "embedding_A")}
        plain = {".".join(self._plain_name(m)) for m in names}
        plain |= {f"{name}.{leaf}" for name in plain for leaf in self._candidates(tuple(name.split(".")))}
        plain |= {name.rpartition(".")[0] for name in plain}
        for field, patterns in (
            ("rank_pattern", self.settings.rank_pattern),
            ("alpha_pattern", self.settings.alpha_pattern),
        ):
            missed = [p for p in patterns if all(peft_config.pattern_key({p: 0}, n) == n != p for n in plain)]
            if missed:
                self.unmatched += [f"{field}[{pattern!r}]" for pattern in missed]
                self.notes.append(
                    f"{field}: {listed(missed)} matches no adapted module, as in PEFT it is unused"
                )


def _looks_like_factor(key: Key) -> bool:
    return any(part.startswith("lora_") for part in (*key.module, key.leaf))


def _explain(key: str) -> str:
    parsed = peft_keys.parse(key)
    if "original_module" in parsed.module:
        return "the base's own tensor, without the trained one that should stand beside it"
    return "not a tensor of PEFT's LoRA; remove it, or read the file as what it is"
