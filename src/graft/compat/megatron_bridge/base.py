"""The base of the methods: walking a model, freezing it, and what of it is saved."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import nn

from ...adapted import Adapted, factors, slots_of
from ...attach import all_or_nothing, sites
from ...engines.wrappers import is_wrapped, unwrap
from ...errors import Problems, StateError, TargetError
from ...fusing import disabled
from ...kinds import read_always
from .bridged import Bridged
from .matcher import ModuleMatcher, is_linear
from .recompute import let_recomputed_layers_train

Model = TypeVar("Model", bound="nn.Module | list[Any]")
Transform = Callable[..., nn.Module]


def chunks(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The models inside of a model or a list of chunks: without wrappers such as DistributedDataParallel."""
    return [unwrap(m) for m in ([model] if isinstance(model, nn.Module) else model)]


def named(root: nn.Module) -> Iterator[tuple[nn.Module | None, str | None, str | None, nn.Module]]:
    """``(parent, name, prefix, module)`` of every module; not of those inside of an adapter."""
    waiting: list[tuple[nn.Module | None, str | None, str | None, nn.Module]] = [(None, None, None, root)]
    while waiting:
        parent, name, prefix, module = waiting.pop()
        yield parent, name, prefix, module
        if isinstance(module, Bridged):
            continue
        path = f"{prefix}.{name}" if prefix else name
        below = [(module, child, path, m) for child, m in module.named_children()]
        waiting.extend(reversed(below))


def walk(root: nn.Module, transform: Transform) -> None:
    """Call ``transform(module, name=…, prefix=…)`` on every module; what it returns takes its place."""
    for parent, name, prefix, module in list(named(root)):
        if parent is None or name is None:
            transform(module)
            continue
        made = transform(module, name=name, prefix=prefix)
        if made is not module:
            parent.add_module(name, made)


@dataclass
class PEFT(ABC):
    """A method that transforms the modules of a frozen model; call it on a model or a list of chunks.

    ``params_to_save`` are the names of what trains, once :meth:`set_params_to_save` was called.
    """

    params_to_save: set[str] = field(default_factory=set[str], init=False, repr=False)

    @abstractmethod
    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """The module that takes this one's place; the same one if it is none of the method's."""

    def __call__(self, model: Model, training: bool = True) -> Model:
        """Freeze the model and transform its modules, in place; all of it or nothing.

        Returns:
            The same model or list, in training mode if ``training``, else frozen whole and in eval mode.
        Raises:
            TargetError: targets that match no linear, tied weights, what a layer does not allow.
            StateError: new factors to train in a model that is in DistributedDataParallel already.
        """
        parts = chunks(cast(Any, model))
        if isinstance(self, ModuleMatcher):
            refuse_unmatched(self, parts)
        trained = [(p, p.requires_grad) for part in parts for p in part.parameters()]
        before = {id(m) for part in parts for m in part.modules() if slots_of(m)}
        try:
            with ExitStack() as stack:
                for part in parts:
                    stack.enter_context(all_or_nothing(part))
                self.freeze_model(model, training=training)
                for part in parts:
                    walk(part, self.transform)
                    _refuse_tied(part)
                    _heed_readers(part)
                if training:
                    _refuse_wrapped(model, before)
        except BaseException:
            for p, train in trained:
                p.requires_grad_(train)
            raise
        if training:
            _thaw(parts)
            for part in parts:
                let_recomputed_layers_train(part)
        else:
            self.freeze_model(model, training=False)
        for part in [model] if isinstance(model, nn.Module) else model:
            part.train(training)
        return model

    def freeze_model(self, model: nn.Module | list[Any], training: bool = True) -> None:
        """Freeze every parameter, and with ``training`` set training mode."""
        for part in chunks(model):
            part.requires_grad_(False)
        self._train(model, training)

    def _train(self, model: nn.Module | list[Any], training: bool) -> None:
        if training:
            for part in chunks(model):
                part.train()

    def enable_adapter_layers(self, model: nn.Module | list[Any]) -> None:
        """Let every adapted layer add ΔW."""
        for part in chunks(model):
            for module in part.modules():
                if isinstance(module, Bridged):
                    module.enable_adapter_layers()

    def disable_adapter_layers(self, model: nn.Module | list[Any]) -> None:
        """Let every adapted layer be the plain one.

        Raises:
            StateError: a layer that is merged.
        """
        for part in chunks(model):
            for module in part.modules():
                if isinstance(module, Bridged):
                    module.disable_adapter_layers()

    @contextmanager
    def disable_adapter(self, model: nn.Module | list[Any]) -> Generator[None]:
        """The plain model inside the block; afterwards every layer is as it was, merged or switched off."""
        with ExitStack() as stack:
            for part in chunks(model):
                if sites(part):
                    stack.enter_context(disabled(part))
            yield

    def set_params_to_save(self, model: nn.Module | list[Any]) -> None:
        """Note the names of all parameters that train, and of the running statistics of norms."""
        self.params_to_save = set()
        for part in [model] if isinstance(model, nn.Module) else model:
            self.params_to_save |= {n for n, p in part.named_parameters() if p.requires_grad}
            for path, module in part.named_modules():
                if hasattr(module, "track_running_stats"):
                    own = [n for n, _ in module.named_buffers()]
                    self.params_to_save |= {f"{path}.{n}" if path else n for n in own}

    def adapter_key_filter(self, key: str | tuple[Any, ...]) -> bool:
        """Whether a checkpoint of the adapter holds this key.

        True for the names in ``params_to_save``, those inside of a module called ``adapter``, and a last
        name ``adapters``. Of a pair ``(key, tensor)``: whether the tensor trains.
        """
        if isinstance(key, tuple):
            return bool(key[1].requires_grad)
        *inside, last = key.split(".")
        return key in self.params_to_save or "adapter" in inside or (last == "adapters" and bool(inside))


def refuse_unmatched(matcher: ModuleMatcher, parts: Sequence[nn.Module]) -> None:
    """Refuse targets that stand for no linear in any chunk.

    Raises:
        TargetError: naming each of them, with the nearest names.
    """
    wanted = matcher._wanted()  # pyright: ignore[reportPrivateUsage]
    found: set[str] = set()
    names: set[str] = set()
    for part in parts:
        for _, name, prefix, module in named(part):
            linear = is_linear(module)
            names |= {name} if name and linear else set()
            hit = matcher.match(module, name, prefix)
            if hit is not None and (linear or hit[0] == name):
                found.add(hit[0])
    problems = Problems(TargetError, "no linear matches these target_modules:")
    for pattern in wanted[1] if wanted is not None else []:
        if pattern not in found:
            near = (
                difflib.get_close_matches(pattern.rpartition(".")[2], sorted(names), n=3) or sorted(names)[:5]
            )
            problems.add(f"{pattern!r}; the linears are called {', '.join(near) or 'nothing: there is none'}")
    problems.raise_if_any()


def _refuse_tied(part: nn.Module) -> None:
    """A weight that a plain module holds too would change under it when it is merged."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in part.named_modules():
        for name, p in module.named_parameters(recurse=False):
            holders.setdefault(id(p), []).append((f"{path}.{name}" if path else name, module))
    problems = Problems(TargetError, "cannot adapt:")
    for held in holders.values():
        slots = [slots_of(module).get(name.rpartition(".")[2]) for name, module in held]
        if len({id(slot.site) if slot is not None else 0 for slot in slots}) > 1:
            problems.add(
                f"{' and '.join(name for name, _ in held)} are one tied weight; untie them, or use "
                "graft.adapt, which adapts all of them together"
            )
    problems.raise_if_any()


def _heed_readers(part: nn.Module) -> None:
    """A parent that computes with the weight itself sees W + ΔW, and has no x to drop from."""
    for module in part.modules():
        for child in read_always(module):
            for slot in slots_of(child).values():
                slot.factored = False
                if slot.site.options.dropout:
                    raise TargetError(
                        f"dropout={slot.site.options.dropout} cannot be applied to the "
                        f"{cast(Adapted, child).graft_plain.__name__} that a {type(module).__name__} reads "
                        "the weight of itself; exclude it or set dropout=0"
                    )


def _refuse_wrapped(model: Any, before: set[int]) -> None:
    for part in [model] if isinstance(model, nn.Module) else model:
        if is_wrapped(part) and any(slots_of(m) and id(m) not in before for m in unwrap(part).modules()):
            raise StateError(
                f"{type(part).__name__} was made before these factors and would not sum their gradients; "
                "call the LoRA on the model first, and wrap it then"
            )


def _thaw(parts: Sequence[nn.Module]) -> None:
    for part in parts:
        for module, parameter in sites(part).values():
            if module.graft_slots[parameter].site.fusion is None:
                f = factors(module, parameter)
                f.a.requires_grad_(True)
                f.b.requires_grad_(True)
