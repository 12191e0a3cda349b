"""An adapter's names against a base's: exact, repaired when proven, refused otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graft.adapter import Adapter, LowRank
from graft.bind import bind
from graft.errors import BaseMismatchError

BASE = {
    "model.embed_tokens.weight": (30, 8),
    **{
        f"model.layers.{n}.{m}.weight": shape
        for n in range(2)
        for m, shape in {
            "attn.q_proj": (12, 8),
            "attn.k_proj": (4, 8),
            "mlp.up": (16, 8),
            "norm": (8,),
        }.items()
    },
    "lm_head.weight": (30, 8),
}


def site(o: int, i: int, rank: int = 2) -> LowRank:
    return LowRank(torch.ones(rank, i), torch.ones(o, rank), 0.5, fan_in_fan_out=False)


def adapter(prefix: str = "model.layers.", layers: int = 2, o: int = 12) -> Adapter:
    return Adapter({f"{prefix}{n}.attn.q_proj.weight": site(o, 8) for n in range(layers)})


@pytest.mark.parametrize(
    "prefix",
    [
        "layers.",
        "model.model.layers.",
        "base_model.model.model.layers.",
        "base_model.model.base_model.model.model.layers.",
        "_forward_module.model.layers.",
        "_forward_module.base_model.model.model.layers.",
        "module.model.layers.",
        "_orig_mod.model.layers.",
        "model._orig_mod.layers.",
        "_fsdp_wrapped_module.model._fsdp_wrapped_module.layers.",
        "bert.model.layers.",
        "module.bert.model.layers.",
    ],
)
def test_proven_prefixes_are_repaired_and_said(prefix: str) -> None:
    bound = bind(adapter(prefix), BASE)
    assert set(bound.sites) == {f"model.layers.{n}.attn.q_proj.weight" for n in range(2)}
    assert [note for note in bound.notes if "repaired" in note]


def test_a_name_is_put_in_after_the_model() -> None:
    """A vision-language model's language model, for which an adapter was trained alone."""
    inner = {name.replace("model.", "model.language_model.", 1): shape for name, shape in BASE.items()}
    bound = bind(adapter(), inner)
    assert set(bound.sites) == {f"model.language_model.layers.{n}.attn.q_proj.weight" for n in range(2)}
    assert any("'model' is 'model.language_model'" in note for note in bound.notes)
    assert set(bind(bound, BASE).sites) == set(adapter().sites)


def test_right_names_stay_and_nothing_is_said() -> None:
    bound = bind(adapter(), BASE)
    assert set(bound.sites) == set(adapter().sites) and not bound.notes
    assert bind(bound, BASE) == bound


def test_checkpoint_wrappers_inside_a_name() -> None:
    name = "model.layers.0._checkpoint_wrapped_module.attn.q_proj.weight"
    assert set(bind(Adapter({name: site(12, 8)}), BASE).sites) == {"model.layers.0.attn.q_proj.weight"}


def test_repair_leaves_right_names_alone() -> None:
    mixed = Adapter({"layers.1.attn.q_proj.weight": site(12, 8), "lm_head.weight": site(30, 8)})
    assert set(bind(mixed, BASE).sites) == {"model.layers.1.attn.q_proj.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.layers.0.attention.q_proj.weight"], "nearest: model.layers.0.attn.q_proj.weight"),
        (
            ["model.blocks.0.attn.q_proj.weight", "model.layers.1.attn.q_proj.weight"],
            "names 1 of 2 parameters",
        ),
        (["model.layers.2.attn.q_proj.weight"], "layers up to 2, the base up to 1"),
        (["q_proj.weight"], "q_proj.weight; nearest"),
        (["model.layers.0.attn.query.weight"], "lacks"),
        (["transformer.layers.0.attn.q_proj.weight"], "lacks"),
        (["visual.layers.0.attn.q_proj.weight"], "lacks"),
        (["layers.5.attn.q_proj.weight", "layers.0.attn.q_proj.weight"], "layers up to 5"),
    ],
)
def test_renamed_and_extra_layers_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(BaseMismatchError) as error:
        bind(Adapter({name: site(12, 8) for name in names}), BASE)
    assert said in str(error.value)


def test_two_repairs_are_an_error() -> None:
    base = {f"{side}.layers.0.attn.q_proj.weight": (12, 8) for side in ("encoder", "decoder")}
    with pytest.raises(BaseMismatchError, match="fit the base in 2 ways"):
        bind(adapter("layers.", layers=1), base)


def test_the_repair_whose_shapes_fit_is_the_one() -> None:
    base = {"encoder.layers.0.attn.q_proj.weight": (12, 8), "decoder.layers.0.attn.q_proj.weight": (6, 8)}
    assert set(bind(adapter("layers.", layers=1), base).sites) == {"encoder.layers.0.attn.q_proj.weight"}


def test_wrong_shapes_are_listed_on_aligned_lines() -> None:
    with pytest.raises(BaseMismatchError) as error:
        bind(adapter(o=13), BASE)
    text = str(error.value)
    assert text.count("its factors do not fit") == 2
    lines = [line for line in text.splitlines() if line.strip().startswith(("base has", "A is", "B is"))]
    assert len(lines) == 6 and len({line.index("[") for line in lines}) == 1


def test_missing_bias_is_named() -> None:
    bias = Adapter(
        {"model.layers.0.mlp.up.weight": site(16, 8)},
        shift={"model.layers.0.mlp.up.bias": (torch.ones(16), 1.0)},
    )
    with pytest.raises(BaseMismatchError, match="no bias to add lora_bias to"):
        bind(bias, BASE)


def test_replaced_tensors_must_have_the_base_s_shape() -> None:
    one = adapter()
    bind(replace(one, replace={"model.layers.0.norm.weight": torch.ones(8)}), BASE)
    for name, shape in {"model.layers.0.norm.weight": (9,), "model.layers.0.mlp.up.weight": (17, 8),
                        "lm_head.weight": (29, 8), "model.embed_tokens.weight": (33, 9)}.items():  # fmt: skip
        with pytest.raises(BaseMismatchError, match="full tensor of another shape"):
            bind(replace(one, replace={name: torch.ones(shape)}), BASE)


def test_classifier_that_the_base_lacks_is_refused() -> None:
    with pytest.raises(BaseMismatchError, match=r"score\.weight"):
        bind(replace(adapter(), replace={"score.weight": torch.ones(2, 8)}), BASE)


@pytest.mark.parametrize(("indices", "rows"), [((30,), 1), ((-1,), 1), ((1, 2), 3)])
def test_rows_outside_the_vocabulary_are_refused(indices: tuple[int, ...], rows: int) -> None:
    trained = replace(adapter(), rows={"model.embed_tokens.weight": (indices, torch.ones(rows, 8))})
    with pytest.raises(BaseMismatchError, match="trained"):
        bind(trained, BASE)


def test_another_base_s_name_is_a_note() -> None:
    named = replace(adapter(), config={"base_model_name_or_path": "us/llama-a"})
    assert "llama-b" in bind(named, BASE, config={"_name_or_path": "them/llama-b"}).notes[-1]
    assert not bind(named, BASE, config={"_name_or_path": "/models/llama-a/"}).notes


def test_repairs_do_not_go_with_patterns_that_match_nothing() -> None:
    lost = replace(adapter("layers."), unmatched=("alpha_pattern['^model.layers.0']",))
    with pytest.raises(BaseMismatchError, match="scales cannot be trusted"):
        bind(lost, BASE)
    assert bind(replace(adapter(), unmatched=lost.unmatched), BASE).sites
