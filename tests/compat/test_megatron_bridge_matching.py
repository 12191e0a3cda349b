"""Which modules Megatron-Bridge's names stand for."""

from __future__ import annotations

from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graft.compat.megatron_bridge import LoRA, ModuleMatcher, VLMLoRA, wildcard_match
from graft.compat.megatron_bridge.lora import is_expert

LINEAR = nn.Linear(2, 3)
TEXT = st.text("ab.1*+(", max_size=8)


@given(TEXT, TEXT.map(lambda key: key.replace("*", "a")))
def test_a_wildcard_is_a_glob_with_stars_only(pattern: str, key: str) -> None:
    assert wildcard_match(pattern, key) is fnmatchcase(key, pattern)


def test_no_name_matches_no_pattern() -> None:
    assert wildcard_match("*", None) is None
    assert ModuleMatcher().match(LINEAR) is None


@pytest.mark.parametrize("mode", ["target", "exclude", "canonical"])
def test_layer_1_is_not_layer_10(mode: str) -> None:
    patterns = [f"*.layers.{n}.*.linear_qkv" for n in (0, 1)]
    matcher = {
        "target": lambda: ModuleMatcher(patterns),
        "exclude": lambda: ModuleMatcher([], patterns),
        "canonical": lambda: ModuleMatcher(canonical_mapping={p: {"linear_q"} for p in patterns}),
    }[mode]()
    hits = {n for n in range(20) if matcher.match(LINEAR, "linear_qkv", f"decoder.layers.{n}.self_attention")}
    assert hits == ({*range(2, 20)} if mode == "exclude" else {0, 1})


@pytest.mark.parametrize("module", [LINEAR, nn.Conv2d(1, 1, 1), nn.Identity()])
@pytest.mark.parametrize("prefix", [None, "", "decoder.layers.3"])
def test_a_listed_name_matches_whatever_the_module_is(module: nn.Module, prefix: str | None) -> None:
    full = f"{prefix}.linear_fc1" if prefix else "linear_fc1"
    for matcher in (ModuleMatcher(), ModuleMatcher([], canonical_mapping={"linear_fc1": set()})):
        assert matcher.match(module, "linear_fc1", prefix) == ("linear_fc1", full)
        assert matcher.match(module, "linear_fc1_x", prefix) is None


def test_the_first_pattern_is_the_one_that_is_told() -> None:
    matcher = ModuleMatcher(["a.*", "linear", "*.linear"])
    assert matcher.match(LINEAR, "linear", "a") == ("a.*", "a.linear")
    assert matcher.match(LINEAR, "linear", "b") == ("linear", "b.linear")


def test_without_names_every_linear_that_is_not_excluded_matches() -> None:
    matcher = ModuleMatcher([], ["head", "*.fc*"])
    assert matcher.match(LINEAR, "query", "a.b") == ("query", "a.b.query")
    assert matcher.match(LINEAR, "head", "a.b") is None
    assert matcher.match(LINEAR, "fc1", "a.b") is None
    assert matcher.match(nn.Conv1d(1, 1, 1), "query", "a.b") is None
    assert matcher.match(type("RowParallelLinear", (nn.Module,), {})(), "query", "a.b") is None


@pytest.mark.parametrize(
    "matcher",
    [ModuleMatcher(["a"], ["b"]), ModuleMatcher([], ["b"], {"a": set()})],
    ids=["target", "canonical"],
)
@pytest.mark.parametrize("kind", [AssertionError, ValueError])
def test_excluding_beside_including_is_refused(matcher: ModuleMatcher, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="exclude_modules should be empty when using"):
        matcher.match(LINEAR, "a")


def test_fields_and_defaults_are_the_originals() -> None:
    expected: dict[str, Any] = {
        "target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "exclude_modules": [],
        "canonical_mapping": {},
        "dim": 32,
        "alpha": 32,
        "dropout": 0.0,
        "dropout_position": "pre",
        "lora_A_init_method": "xavier",
        "lora_B_init_method": "zero",
        "a2a_experimental": False,
        "lora_dtype": None,
        "normalize_moe_lora": False,
        "share_expert_adapters": True,
    }
    vision = {f"freeze_{name}": True for name in ("vision_model", "vision_projection", "language_model")}
    for method, own in ((LoRA(), expected), (VLMLoRA(), expected | vision)):
        assert {name: getattr(method, name) for name in own} == own
        assert method == type(method)(*own.values())
        assert method.params_to_save == set()


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1", True),
        ("decoder.layers.0.mlp.experts.linear_fc2", True),
        ("decoder.layers.0.mlp.local_experts.3.linear_fc2", True),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1", False),
        ("decoder.layers.0.mlp.linear_fc1", False),
        ("decoder.layers.0.mlp.experts.router", False),
        ("decoder.experts.mlp.linear_fc1", False),
    ],
)
def test_an_expert_is_known_by_the_components_of_its_name(name: str, expert: bool) -> None:
    assert is_expert(name) is expert


def experts(topk: int | None) -> nn.Module:
    model = nn.Module()
    model.mlp = nn.ModuleDict({"experts": nn.ModuleDict({"linear_fc1": nn.Linear(4, 4)})})
    model.mlp["linear_fc1"] = nn.Linear(4, 4)
    for module in (model.mlp["experts"]["linear_fc1"], model.mlp["linear_fc1"]):
        module.config = SimpleNamespace(moe_router_topk=topk)
    return model


def test_normalised_experts_take_their_share_of_the_rank() -> None:
    model = LoRA(["linear_fc1"], dim=8, alpha=16, normalize_moe_lora=True)(experts(2))
    expert, dense = model.mlp["experts"]["linear_fc1"], model.mlp["linear_fc1"]
    assert (expert.dim, expert.alpha, expert.scale) == (4, 16, 4)
    assert (dense.dim, dense.alpha, dense.scale) == (8, 16, 2)
    assert LoRA(["linear_fc1"], dim=8)(experts(2)).mlp["experts"]["linear_fc1"].dim == 8


@pytest.mark.parametrize(
    ("topk", "words"), [(3, "must be divisible by moe_router_topk=3"), (None, "has None")]
)
def test_a_rank_that_cannot_be_shared_is_refused(topk: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoRA(["linear_fc1"], dim=8, normalize_moe_lora=True)(experts(topk))
