"""Megatron-Bridge's LoRA on plain and vision-language models: what is adapted, frozen, saved and merged."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graft
from graft.compat.megatron_bridge import PEFT, LinearAdapter, LoRA, LoRALinear, LoRAMerge, VLMLoRA

NAMES = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8, dtype=dtype)
        self.attention = nn.ModuleDict(
            {"linear_qkv": nn.Linear(8, 24, dtype=dtype), "linear_proj": nn.Linear(24, 8, dtype=dtype)}
        )
        self.linear_fc1 = nn.Linear(8, 16, bias=False, dtype=dtype)
        self.linear_fc2 = nn.Linear(16, 8, dtype=dtype)
        self.norm = nn.BatchNorm1d(8, dtype=dtype)
        self.output_projection = nn.Linear(8, 9, dtype=dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embedding(ids)
        h = h + self.attention["linear_proj"](self.attention["linear_qkv"](h))
        h = h + self.linear_fc2(self.linear_fc1(h).tanh())
        return self.output_projection(self.norm(h))


IDS = torch.arange(9)


def small(**options: Any) -> Small:
    torch.manual_seed(0)
    return LoRA(dim=4, **options)(Small())


def adapted(model: nn.Module) -> dict[str, LinearAdapter]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LinearAdapter)}


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


# --- what is adapted ---------------------------------------------------------------------------------


def test_the_targets_are_the_same_modules_with_factors_in_children() -> None:
    plain = Small()
    before, keys = dict(plain.named_modules()), set(plain.state_dict())
    method = LoRA(dim=4, alpha=6, dropout=0.25, dropout_position="post")
    model = method(plain)
    assert model is plain and model.training
    layers = adapted(model)
    assert {n.split(".")[-1] for n in layers} == set(NAMES)
    factors = {f"{n}.{child}.weight" for n in layers for child in ("linear_in", "linear_out")}
    assert set(model.state_dict()) == keys | factors
    assert trained(model) == factors
    for name, layer in layers.items():
        assert layer is before[name] and not isinstance(layer, LoRALinear)
        assert (layer.dim, layer.alpha, layer.scale, layer.dropout_position) == (4, 6, 1.5, "post")
        assert isinstance(layer.dropout, nn.Dropout) and layer.dropout.p == 0.25
        assert layer.linear_in.weight.shape == (4, layer.in_features)
        assert layer.linear_out.weight.shape == (layer.out_features, 4)
        assert (layer.linear_in.in_features, layer.linear_in.out_features) == (layer.in_features, 4)
        assert (layer.linear_out.in_features, layer.linear_out.out_features) == (4, layer.out_features)
        assert not layer.linear_out.weight.any() and layer.linear_in.weight.any()


def test_forward_is_the_plain_one_plus_the_scaled_product() -> None:
    model = small(alpha=6, lora_B_init_method="normal")
    layer = model.linear_fc2
    x = torch.randn(3, 16)
    update = x @ layer.linear_in.weight.T @ layer.linear_out.weight.T * 1.5
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + update)


def test_wildcards_take_one_layer_and_what_they_name_beside_linears_stays() -> None:
    model = LoRA(["attention*", "*_fc1"])(Small())
    assert set(adapted(model)) == {"attention.linear_qkv", "attention.linear_proj", "linear_fc1"}


def test_everything_but_what_is_excluded() -> None:
    model = LoRA([], ["linear_fc2", "attention.*"])(Small())
    assert set(adapted(model)) == {"linear_fc1", "output_projection"}
    assert set(adapted(LoRA([], [])(model))) == {*adapted(model), "linear_fc2", *(
        f"attention.{n}" for n in ("linear_qkv", "linear_proj"))}  # fmt: skip


def test_targets_may_be_set_after_the_method_was_made() -> None:
    method = LoRA()
    method.target_modules = ["linear_fc1"]
    assert set(adapted(method(Small()))) == {"linear_fc1"}


def test_chunks_are_adapted_together_and_a_target_may_be_in_one_of_them() -> None:
    parts = [nn.ModuleDict({"linear_qkv": nn.Linear(2, 2)}), nn.ModuleDict({"linear_fc1": nn.Linear(2, 2)})]
    method = LoRA(["linear_qkv", "linear_fc1"])
    assert method(parts) is parts
    assert [len(adapted(part)) for part in parts] == [1, 1]
    with pytest.raises(ValueError, match="linear_proj"):
        LoRA(["linear_qkv", "linear_proj"])(parts)


def test_twice_is_once() -> None:
    model = small(lora_B_init_method="normal")
    layers, state = adapted(model), {n: v.clone() for n, v in model.state_dict().items()}
    names = trained(model)
    LoRA(dim=9)(model)
    assert adapted(model) == layers and trained(model) == names
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    LoRA(dim=9)(model, training=False)
    assert not trained(model) and not model.training


def test_a_root_layer_and_one_made_by_hand() -> None:
    root = nn.Linear(3, 5)
    assert LoRA([], [], dim=2).transform(root, "root") is root and isinstance(root, LinearAdapter)
    plain = nn.Linear(10, 5)
    layer = LinearAdapter(plain, dim=8, alpha=16)
    assert torch.equal(layer.weight, plain.weight) and layer.weight is not plain.weight
    assert set(layer.state_dict()) == {"weight", "bias", "linear_in.weight", "linear_out.weight"}
    assert layer.scale == 2 and not layer.weight.requires_grad and not layer.bias.requires_grad
    assert torch.equal(layer(torch.eye(10)), plain(torch.eye(10)))
    assert LinearAdapter(nn.Linear(2, 2, bias=False)).bias is None


def untouched(model: nn.Module, method: PEFT, words: str) -> None:
    state, names = dict(model.state_dict(keep_vars=True)), trained(model)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=words):
        method(model)
    assert [type(m) for m in model.modules()] == classes
    assert trained(model) == names
    after = model.state_dict(keep_vars=True)
    assert after.keys() == state.keys() and all(after[n] is v for n, v in state.items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(4, 4)
        self.embedding, self.linear_fc2 = nn.Embedding(4, 4), nn.Linear(4, 4)
        self.linear_fc2.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("make", "method", "words"),
    [
        (Small, LoRA(["linear_qvk"]), r"'linear_qvk'.*linear_qkv"),
        (Small, LoRA(["linear_fc1", "norm"]), "norm is a BatchNorm1d"),
        (Small, LoRA(["linear_fc1", "*.norm"]), r"'\*.norm'"),
        (Small, LoRA(lora_A_init_method="xavir"), "xavir"),
        (Small, LoRA(lora_A_init_method="zero"), "never train"),
        (Small, LoRA(dropout_position=cast(Any, "before")), "before"),
        (Small, LoRA(dim=0), "rank=0"),
        (Tied, LoRA(["linear_fc1", "linear_fc2"]), "embedding.weight and linear_fc2.weight are one"),
        (lambda: nn.MultiheadAttention(4, 2), LoRA(["out_proj"], dropout=0.1), "dropout=0.1"),
        (Small, VLMLoRA(), "no vision_model"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_leaves_the_model_as_it_was(make: Any, method: PEFT, words: str) -> None:
    untouched(make(), method, words)


def test_a_parent_that_reads_the_weight_itself_sees_the_update() -> None:
    torch.manual_seed(0)
    model = LoRA(["out_proj"], dim=2, lora_B_init_method="normal")(nn.MultiheadAttention(4, 2))
    x = torch.randn(3, 1, 4)
    y = model(x, x, x)[0]
    y.sum().backward()
    assert model.out_proj.linear_in.weight.grad is not None
    with LoRA().disable_adapter(model):
        assert not torch.allclose(model(x, x, x)[0], y)
    LoRAMerge()(model, training=False)
    torch.testing.assert_close(model(x, x, x)[0], y)


# --- options -----------------------------------------------------------------------------------------

UNIFORM = {"xavier": math.sqrt(6 / (4096 + 64)), "kaiming": 1 / 64, "uniform": 1 / 64}


@pytest.mark.parametrize("method", ["xavier", "kaiming", "uniform", "normal", "zero"])
def test_factors_begin_as_the_originals(method: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4096, 2)
    b = "xavier" if method == "zero" else "zero"
    LoRA([], [], dim=64, lora_A_init_method=method, lora_B_init_method=b).transform(layer, "x")
    a = layer.linear_in.weight.detach()
    if method in UNIFORM:
        assert UNIFORM[method] * 0.999 < float(a.abs().max()) <= UNIFORM[method]
        assert abs(float(a.std()) / (UNIFORM[method] / math.sqrt(3)) - 1) < 0.01
    else:
        assert abs(float(a.std()) - {"normal": 0.2, "zero": 0.0}[method]) < 0.002
        assert abs(float(a.abs().max()) - {"normal": 1.0, "zero": 0.0}[method]) < 0.3


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_is_where_it_is_asked_for(position: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 50, bias=False)
    options: Any = {"dropout": 0.5, "dropout_position": position, "lora_B_init_method": "normal"}
    LoRA([], [], dim=2, alpha=2, **options).transform(layer, "x")
    nn.init.zeros_(layer.weight)
    x = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(200, 4)
    whole = 2 * (x @ layer.linear_in.weight.T @ layer.linear_out.weight.T)
    y = layer(x)
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, whole, 0))
    rows = kept.all(dim=1) | (~kept).all(dim=1)
    assert 0.4 < float(kept.float().mean()) < 0.6
    assert bool(rows.all()) is (position == "pre")
    layer.dropout.p = 0.0
    torch.testing.assert_close(layer(x), whole / 2)
    layer.eval()
    torch.testing.assert_close(layer(x), whole / 2)


def test_the_factors_dtype() -> None:
    model = LoRA()(Small(torch.bfloat16))
    assert model.linear_fc1.linear_in.weight.dtype == torch.bfloat16
    model = LoRA(lora_dtype=torch.float32)(Small(torch.bfloat16))
    assert model.linear_fc1.linear_out.weight.dtype == torch.float32
    assert model(IDS).dtype == torch.bfloat16


# --- vision-language models --------------------------------------------------------------------------


def block() -> nn.Module:
    return nn.ModuleDict({"linear_fc1": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


def vlm(names: tuple[str, str, str], inside: str, head: bool = False) -> nn.Module:
    inner = nn.Module()
    for name in names:
        inner.add_module(name, block())
    if not inside:
        return inner
    outer = nn.Module()
    outer.add_module(inside, inner)
    if head:
        outer.lm_head = nn.Linear(4, 4)
    return outer


BRIDGE = ("vision_model", "vision_projection", "language_model")
HUGGING = ("vision_tower", "multi_modal_projector", "language_model")


@pytest.mark.parametrize("flags", [(v, p, x) for v in (0, 1) for p in (0, 1) for x in (0, 1)])
@pytest.mark.parametrize(
    ("names", "inside"), [(BRIDGE, ""), (BRIDGE, "llava_model"), (HUGGING, ""), (HUGGING, "model")]
)
def test_the_chosen_parts_are_frozen(
    flags: tuple[bool, bool, bool], names: tuple[str, str, str], inside: str
) -> None:
    model = vlm(names, inside, head=inside == "model")
    method = VLMLoRA(["*language_model.linear_fc1"], [], {}, *LoRA_DEFAULTS, *flags)
    method([model])
    root = f"{inside}." if inside else ""
    expected = {f"{root}language_model.linear_fc1.linear_{end}.weight" for end in ("in", "out")}
    for name, frozen in zip(names, flags, strict=True):
        if not frozen:
            expected |= {f"{root}{name}.norm.{p}" for p in ("weight", "bias")}
            if name != "language_model":
                expected |= {f"{root}{name}.linear_fc1.{p}" for p in ("weight", "bias")}
    if inside == "model" and not flags[2]:
        expected |= {"lm_head.weight", "lm_head.bias"}
    assert trained(model) == expected


LoRA_DEFAULTS = (4, 4, 0.0, "pre", "xavier", "zero", False, None, False, True)


def test_a_stage_without_a_part_is_frozen_as_far_as_it_goes() -> None:
    model = vlm(BRIDGE, "")
    model.vision_model = None
    VLMLoRA(["linear_fc1"])(model)
    assert {n.split(".")[-2] for n in trained(model)} == {"linear_in", "linear_out"}


# --- what is saved, and switched off -------------------------------------------------------------------


def test_what_is_saved() -> None:
    method = LoRA(["linear_fc1"])
    model = method(Small())
    method.set_params_to_save([model])
    names = {f"linear_fc1.linear_{end}.weight" for end in ("in", "out")}
    stats = {f"norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert method.params_to_save == names | stats
    chosen = {key for key in model.state_dict() if method.adapter_key_filter(key)}
    assert chosen == names | stats


@pytest.mark.parametrize(
    ("key", "held"),
    [
        ("layers.0.linear_fc1.adapter.linear_in.weight", True),
        ("adapter.linear_in.weight", True),
        ("layers.0.adapters", True),
        ("layers.0.adapter_norm.weight", False),
        ("layers.0.my_adapter.weight", False),
        ("layers.0.adapter", False),
        ("layers.0.myadapters", False),
        ("layers.0.weight", False),
        (("any", nn.Parameter(torch.ones(1))), True),
        (("x.adapter.weight", torch.ones(1)), False),
    ],
)
def test_the_filter_goes_by_components(key: Any, held: bool) -> None:
    assert LoRA().adapter_key_filter(key) is held


def test_disabling_and_enabling() -> None:
    torch.manual_seed(0)
    model = Small().eval()
    plain = model(IDS)
    method = LoRA(dim=4, lora_B_init_method="normal")
    method(model).eval()
    full = model(IDS)
    assert not torch.allclose(full, plain)
    with pytest.raises(KeyError), method.disable_adapter([model]):
        assert torch.equal(model(IDS), plain)
        raise KeyError
    assert torch.equal(model(IDS), full)
    method.disable_adapter_layers(model)
    assert torch.equal(model(IDS), plain)
    with method.disable_adapter(model):
        pass
    assert torch.equal(model(IDS), plain), "it was switched off before the block, so it is afterwards"
    method.enable_adapter_layers([model])
    assert torch.equal(model(IDS), full)
    with method.disable_adapter(Small()):
        pass


def test_another_method_replaces_modules() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    class Double(PEFT):
        def transform(
            self, module: nn.Module, name: str | None = None, prefix: str | None = None
        ) -> nn.Module:
            seen.append(f"{prefix}.{name}" if prefix else name)
            return Doubled(module) if name == "linear_fc1" else module

    seen: list[str | None] = []
    model = Double()(Small())
    assert isinstance(model.linear_fc1, Doubled) and not trained(model)
    assert seen[:4] == [None, "embedding", "attention", "attention.linear_qkv"]


class TransformerBlock(nn.Module):
    """Recomputes as Megatron-core's: re-entrant."""

    def __init__(self, granularity: str | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(recompute_granularity=granularity)
        self.linear_fc1 = nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, checkpoint(self.linear_fc1, hidden_states, use_reentrant=True))


def test_recomputed_layers_behind_a_frozen_embedding_train() -> None:
    block = LoRA(["linear_fc1"])(TransformerBlock("full"))
    LoRA(["linear_fc1"])(block)
    assert len(block._forward_pre_hooks) == 1
    for call in (lambda x: block(x), lambda x: block(hidden_states=x)):
        block.zero_grad()
        call(torch.randn(3, 4)).sum().backward()
        assert block.linear_fc1.linear_out.weight.grad is not None
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="None of the inputs"):
        block.eval()(x)
    assert not x.requires_grad
    assert not LoRA(["linear_fc1"])(TransformerBlock(None))._forward_pre_hooks


# --- Graft's own verbs, and copies ---------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_whole(way: str) -> None:
    model = small(dropout=0.3, lora_B_init_method="normal").eval()
    if way == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model)
    assert set(adapted(other)) == set(adapted(model))
    assert torch.equal(other(IDS), model(IDS))
    other.linear_fc1.dropout.p = 0.9
    assert other.linear_fc1.graft_slots["weight"].site.options.dropout == 0.9
    assert model.linear_fc1.dropout.p == 0.3


def test_graft_saves_loads_and_removes_it(tmp_path: Path) -> None:
    model = small(lora_B_init_method="normal").eval()
    graft.save(model, tmp_path / "adapter")
    torch.manual_seed(0)
    other = Small().eval()
    graft.load(other, tmp_path / "adapter")
    torch.testing.assert_close(other(IDS), model(IDS))
    torch.manual_seed(0)
    keys = set(Small().state_dict())
    graft.unadapt(model)
    assert set(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == [type(m) for m in Small().modules()]


# --- merging -------------------------------------------------------------------------------------------


def test_merging_a_model_adds_each_update_once() -> None:
    model = small(lora_B_init_method="normal").eval()
    before, y = {n: m.weight.clone() for n, m in adapted(model).items()}, model(IDS)
    want = {
        n: LoRAMerge().merge(m.weight, m.linear_out.weight, m.linear_in.weight, m.alpha, m.dim)
        for n, m in adapted(model).items()
    }
    assert LoRAMerge()(model, training=False) is model
    for n, m in adapted(model).items():
        assert torch.equal(m.weight, want[n]) and not torch.equal(m.weight, before[n])
        assert LoRAMerge().transform(m) is m and torch.equal(m.weight, want[n])
    torch.testing.assert_close(model(IDS), y)
    with LoRA().disable_adapter(model):
        assert all(torch.equal(m.weight, before[n]) for n, m in adapted(model).items())
    with pytest.raises(ValueError, match="merged"):
        LoRA().disable_adapter_layers(model)
    graft.unadapt(model, keep_fused=True)
    assert not adapted(model) and torch.equal(model.linear_fc1.weight, want["linear_fc1"])
    plain = Small()
    assert LoRAMerge()(plain) is plain and not trained(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_rounds_the_exact_sum_once(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    w = torch.randn(40, 24, generator=g).to(dtype)
    # few bits each, so that float64 holds the sum exactly
    b, a = (torch.randint(-31, 32, shape, generator=g) / 32 for shape in ((40, 8), (8, 24)))
    merged = LoRAMerge().merge(w, b.to(dtype), a.to(dtype), 6, 8)
    exact = w.double() + 0.75 * (b.double() @ a.double())
    assert merged.dtype == dtype and torch.equal(merged, exact.to(dtype))


class Given(nn.Module):
    """An adapter as a user of the original holds one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.alpha, self.dim = 16, 8
        self.linear_in = nn.Linear(inputs, 8, bias=False)
        self.linear_out = nn.Linear(8, outputs, bias=False)


def test_a_layer_with_an_adapter_made_by_hand() -> None:
    torch.manual_seed(0)
    base, adapter = nn.Linear(6, 5), Given(6, 5)
    plain = base.weight.detach().clone()
    layer = LoRALinear(base, adapter)
    assert isinstance(layer, LoRALinear)
    assert layer.to_wrap is base and layer.adapter is adapter
    assert {"adapter.linear_in.weight", "adapter.linear_out.weight"} < set(layer.state_dict())
    x = torch.randn(3, 6)
    y = layer(x)
    update = 2 * adapter.linear_out.weight @ adapter.linear_in.weight
    assert LoRAMerge().transform(layer.eval()) is layer
    torch.testing.assert_close(layer.to_wrap.weight, plain + update)
    torch.testing.assert_close(layer(x), y)
    for module, given in ((nn.Linear(6, 5), nn.Identity()), (nn.ReLU(), Given(6, 5))):
        with pytest.raises(ValueError, match="LoRALinear needs"):
            LoRALinear(module, given)


def test_a_layer_that_is_adapted_takes_no_second_adapter() -> None:
    layer = LinearAdapter(nn.Linear(6, 5), dim=2)
    for again in (lambda: LinearAdapter(layer, dim=2), lambda: LoRALinear(layer, Given(6, 5))):
        with pytest.raises(ValueError, match="adapted already; call"):
            again()


class Grouped(nn.Module):
    """A grouped linear, as Transformer Engine's: one matrix for each group of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight0, self.weight1 = (nn.Parameter(torch.randn(5, 6)) for _ in range(2))

    def forward(self, x: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, None]:
        parts = zip(x.split(sizes), (self.weight0, self.weight1), strict=True)
        return torch.cat([part @ w.T for part, w in parts]), None


def test_a_grouped_layer_with_an_adapter_made_by_hand() -> None:
    torch.manual_seed(0)
    base, adapter, x = Grouped(), Given(6, 5), torch.randn(7, 6)
    weights = [w.detach().clone() for w in base.parameters()]
    want = base(x, [3, 4])[0] + 2 * adapter.linear_out(adapter.linear_in(x))
    layer = LoRALinear(base, adapter)
    assert layer.to_wrap is base and trained(layer) == {f"adapter.linear_{n}.weight" for n in ("in", "out")}
    torch.testing.assert_close(layer(x, [3, 4])[0], want)
    layer(x, [3, 4])[0].sum().backward()
    assert adapter.linear_in.weight.grad is not None and adapter.linear_in.weight.grad.any()
    for _ in range(2):
        assert LoRAMerge().transform(layer.eval()) is layer
        update = 2 * adapter.linear_out.weight @ adapter.linear_in.weight
        for held, plain in zip((layer.weight0, layer.weight1), weights, strict=True):
            torch.testing.assert_close(held, plain + update)
    torch.testing.assert_close(layer(x, [3, 4])[0], want)
    graft.unadapt(layer)
    assert type(base) is Grouped and adapter.linear_in.weight.shape == (8, 6)
    assert all(torch.equal(w, plain) for w, plain in zip(base.parameters(), weights, strict=True))


def test_what_was_adapted_before_is_as_it_was_after_an_adapt_that_failed() -> None:
    """Module objects, their order, dropout and bits, whether Graft or the method made the attempt."""
    torch.manual_seed(0)
    model: Any = LoRA(["linear_qkv"], dim=2, dropout=0.5, lora_B_init_method="normal")(Small())
    model.hand = LoRALinear(nn.Linear(6, 5), Given(6, 5))
    model.output_projection.weight = model.embedding.weight
    modules, state = dict(model.named_modules()), {n: v.clone() for n, v in model.state_dict().items()}
    drop = nn.Dropout(0.5)
    attempts: list[Any] = [
        lambda: LoRA(["linear_fc1", "output_projection"])(model),
        lambda: LoRA(["linear_fc1", "norm"])(model),
        lambda: graft.adapt(model, ["linear_fc1", "norm"], rank=2, dropout=0.1),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"norm|tied"):
            attempt()
        now = dict(model.named_modules())
        assert list(now) == list(modules) and all(now[n] is m for n, m in modules.items())
        assert {n: type(m) for n, m in now.items() if isinstance(m, (LinearAdapter, LoRALinear))}.keys() == {
            "attention.linear_qkv",
            "hand",
        }
        same = model.state_dict()
        assert list(same) == list(state) and all(torch.equal(v, state[n]) for n, v in same.items())
    x = torch.randn(3, 8)
    layer = model.train().attention["linear_qkv"]
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    update = drop(x) @ layer.linear_in.weight.T @ layer.linear_out.weight.T * layer.scale
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias) + update)


@pytest.mark.parametrize(
    ("out", "inside", "dim", "tp"),
    [
        ((6, 4), (2, 8), 4, 1),  # column-parallel, but one process
        ((6, 2), (2, 8), 4, 2),  # both of half the rank
        ((3, 4), (2, 8), 4, 2),  # both cut
        ((6, 4), (4, 4), 4, 2),  # inputs cut
        ((6, 4), (4, 8), 8, 1),  # another dim
        ((4, 8), (6, 4), 4, 1),  # the other way round
        ((2, 4), (4, 8), 4, 2),  # a third of the rows
    ],
)
def test_factors_of_no_layout_are_refused(out: Any, inside: Any, dim: int, tp: int) -> None:
    with pytest.raises(ValueError, match="neither whole, nor as column-parallel"):
        LoRAMerge().merge(torch.ones(6, 8), torch.ones(out), torch.ones(inside), 1, dim, tp_size=tp)


def test_merge_refuses_what_it_cannot_do() -> None:
    w, b, a = torch.ones(6, 8), torch.ones(6, 4), torch.ones(4, 8)
    merge = LoRAMerge().merge
    with pytest.raises(ValueError, match="there is no process group; pass tp_group"):
        merge(w, b, a[:2], 1, 4, tp_size=2)
    with pytest.raises(ValueError, match="tp_size=0"):
        merge(w, b, a, 1, 4, tp_size=0)
    with pytest.raises(ValueError, match="beyond the range"):
        merge(w.half(), b.half() * 300, a.half() * 300, 1, 4)
    with pytest.raises(ValueError, match="dequantise"):
        merge(w.to(torch.int8), b, a, 1, 4)
