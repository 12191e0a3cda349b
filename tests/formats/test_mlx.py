"""MLX's two files against the documented formulas, and against mlx-lm itself where it is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.adapter import Adapter, LowRank
from graft.bind import bind
from graft.errors import FormatError
from graft.formats import read, write

from .carrying import MODEL, SHAPES, plain, site, update

Q = "model.layers.1.self_attn.q_proj"


def save(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapters.safetensors")
    said = {"num_layers": 2, "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0}, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def factors(module: str, wide: int, out: int, rank: int = 3) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_a": torch.randn(wide, rank), f"{module}.lora_b": torch.randn(rank, out)}


def bound(path: Path, **options: Any) -> Adapter:
    return bind(read(path, model=MODEL, **options), SHAPES, config=MODEL)


def test_the_scale_is_the_multiplier(tmp_path: Path) -> None:
    t = {**factors(Q, 16, 32), **factors("model.embed_tokens", 20, 16)}
    adapter = bound(save(tmp_path / "a", t))
    for name in (Q, "model.embed_tokens"):
        a, b = t[f"{name}.lora_a"].double(), t[f"{name}.lora_b"].double()
        want = 20.0 * (b.T @ a.T if name == Q else a @ b)
        zero = torch.zeros(SHAPES[f"{name}.weight"], dtype=torch.float64)
        torch.testing.assert_close(
            update(adapter.sites[f"{name}.weight"], zero), want, rtol=1e-12, atol=1e-12
        )
    assert adapter.sites["model.embed_tokens.weight"].kind == "embedding" and adapter.format == "mlx"


def test_experts_are_unstacked(tmp_path: Path) -> None:
    a, b = torch.randn(2, 3, 16), torch.randn(2, 12, 3)
    for block, leaf, theirs in (("mlp", "up_proj", "up_proj"), ("block_sparse_moe", "down_proj", "w2")):
        module = f"model.layers.0.{block}.switch_mlp.{leaf}"
        adapter = read(save(tmp_path / block, {f"{module}.lora_a": a, f"{module}.lora_b": b}))
        names = [f"model.layers.0.{block}.experts.{n}.{theirs}.weight" for n in range(2)]
        assert list(adapter.sites) == names
        assert all(torch.equal(adapter.sites[name].A, a[n]) for n, name in enumerate(names))
        assert all(torch.equal(adapter.sites[name].B, b[n]) for n, name in enumerate(names))


def test_experts_are_stacked_again(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    shapes = {name.format(n): (12, 16) for n in range(3)}
    sites = {
        n: LowRank(torch.randn(2, 16), torch.randn(12, 2), 1.0) for n in (name.format(0), name.format(2))
    }
    adapter = bind(Adapter(sites), shapes)
    with pytest.raises(FormatError, match=r"experts\.0.*--base"):
        write(adapter, tmp_path / "a", format="mlx")
    write(adapter, tmp_path / "a", format="mlx", model={**MODEL, "num_experts": 3})
    stacked = load_file(tmp_path / "a" / "adapters.safetensors")
    b = stacked["model.layers.0.mlp.switch_mlp.up_proj.lora_b"]
    assert b.shape == (3, 12, 2) and not b[1].any()
    back = bind(read(tmp_path / "a"), shapes)
    assert all(
        torch.equal(back.sites[n].B, s.B) and torch.equal(back.sites[n].A, s.A) for n, s in sites.items()
    )


def test_whole_weights_replace(tmp_path: Path) -> None:
    full = {"model.layers.2.self_attn.q_proj.weight": torch.randn(32, 16), "norm.weight": torch.randn(4)}
    adapter = bound(save(tmp_path / "a", full, fine_tune_type="full"))
    assert not adapter.sites and all(torch.equal(adapter.replace[n], t) for n, t in full.items())


def test_dora(tmp_path: Path) -> None:
    t = {**factors(Q, 16, 32), f"{Q}.m": torch.rand(32)}
    adapter = bound(save(tmp_path / "a", t, fine_tune_type="dora"))
    magnitude = adapter.sites[f"{Q}.weight"].magnitude
    assert magnitude is not None and torch.equal(magnitude, t[f"{Q}.m"])
    with pytest.raises(FormatError, match="not dora"):
        read(save(tmp_path / "b", t))
    with pytest.raises(FormatError, match=r"q_proj\.m: missing"):
        read(save(tmp_path / "c", factors(Q, 16, 32), fine_tune_type="dora"))
    e = {**factors("model.embed_tokens", 20, 16), "model.embed_tokens.m": torch.rand(20)}
    with pytest.raises(FormatError, match="each token"):
        read(save(tmp_path / "d", e, fine_tune_type="dora"))


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        ({f"{Q}.lora_b": None}, {}, "has no lora_b"),
        ({f"{Q}.lora_a": None, f"{Q}.other": 1}, {}, "has no lora_a"),
        ({f"{Q}.lora_a_scales": 1}, {}, "lora_a_scales: not a tensor"),
        ({f"{Q}.lora_b": 2}, {}, "not of one rank"),
        ({}, {"lora_parameters": {"rank": 4, "scale": 1.0}}, r"not of one rank, 4 by adapter_config\.json"),
        ({}, {"lora_parameters": {"rank": 3, "alpha": 6}}, "scale must be a number, got None"),
        ({}, {"fine_tune_type": "ia3"}, "'ia3'"),
        ({"model.x.experts.up.lora_a": 3, "model.x.experts.up.lora_b": 3}, {}, "switch_mlp"),
    ],
)
def test_what_is_refused(change: dict[str, Any], config: dict[str, Any], said: str, tmp_path: Path) -> None:
    shapes = {1: (1,), 2: (2, 32), 3: (3, 3, 3)}
    t = {**factors(Q, 16, 32), **{n: torch.ones(shapes[s]) for n, s in change.items() if s}}
    kept = {n: one for n, one in t.items() if change.get(n, 0) is not None}
    with pytest.raises(FormatError, match=said):
        read(save(tmp_path / "a", kept, **config))


def test_the_configuration_must_be_there(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", factors(Q, 16, 32))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"holds the scale.*--adapter-config"):
        read(folder)


def test_written_settings(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.manual_seed(0)
    sites = {n: site(n, 2, 3.0, torch.float32) for n in SHAPES if n.endswith("v_proj.weight")}
    sites |= {name: site(name, 4, 0.7, torch.float32)}
    sites |= {"model.embed_tokens.weight": site("model.embed_tokens.weight", 1, 3.0, torch.float32)}
    notes = write(Adapter(sites), tmp_path / "a", format="mlx", model=MODEL, base_name="some/base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 4, "scale": 3.0, "dropout": 0.0,
        "keys": ["model.embed_tokens", "self_attn.q_proj", "self_attn.v_proj"],
    }  # fmt: skip
    assert (config["num_layers"], config["fine_tune_type"], config["model"]) == (3, "lora", "some/base")
    assert len(notes) == 1 and name in notes[0] and "rounded once" in notes[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_mlx_itself_loads_and_fuses_what_we_write(dora: bool, tmp_path: Path) -> None:
    """The same weights, from mlx-lm's own load_adapters and fuse and from ours."""
    pytest.importorskip("mlx_lm", reason="the oracles group is not installed")
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    known = MODEL | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    model: Any = Model(ModelArgs(**known))
    weights = {n: torch.tensor(w.tolist()) for n, w in tree_flatten(model.parameters())}
    adapter = plain(scale=2.5, rank=3)
    kept = {n: s for n, s in adapter.sites.items() if "layers.2" in n or n.endswith("q_proj.weight")}
    if dora:
        kept = {n: replace(s, magnitude=weights[n].norm(dim=1) * 1.5) for n, s in kept.items()}
    write(replace(adapter, sites=kept), tmp_path / "a", format="mlx", model=MODEL)
    load_adapters(model, str(tmp_path / "a"))
    fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    mx.eval(model.parameters())
    after = {n: torch.tensor(w.tolist()) for n, w in tree_flatten(model.parameters())}
    assert after.keys() == weights.keys()
    for name, weight in weights.items():
        want = weight
        if name in kept:
            want = update(kept[name], weight)
            if dora:
                want = want * (1.5 * weight.norm(dim=1) / want.norm(dim=1))[:, None]
        torch.testing.assert_close(after[name], want, rtol=2e-5, atol=2e-5)
