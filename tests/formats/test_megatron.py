"""Megatron-Bridge's checkpoints, made with torch alone: forms of keys, run_config.yaml, and what is written.

Megatron itself is asked in ``tests/dist/test_bridge.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from graft.adapter import Adapter, LowRank
from graft.bind import bind
from graft.errors import FormatError
from graft.formats import read, write
from graft.layout import Layout

from .carrying import LINEAR, MODEL, SHAPES, assert_same_update, plain, site
from .test_dcp import save

L, HIDDEN, FFN = 3, 16, 12
QKV = 64  # 2 groups of 2 query heads, 1 key and 1 value, of 8 rows each


def checkpoint(folder: Path, state: dict[str, torch.Tensor], **config: Any) -> Path:
    """A directory as Bridge leaves it."""
    save(dict(state), folder)
    peft = {"_target_": "megatron.bridge.peft.lora.LoRA", "dim": 2, "alpha": 4, **config.pop("peft", {})}
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"peft": peft, **config}))
    return folder


def pair(module: str, out: int, wide: int, *lead: int, rank: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(module) + out)
    return {
        f"{module}.adapter.linear_in.weight": torch.randn(*lead, rank, wide),
        f"{module}.adapter.linear_out.weight": torch.randn(*lead, out, rank),
    }


PROJ = "decoder.layers.self_attention.linear_proj"
FC1 = "decoder.layers.mlp.linear_fc1"
FUSED = "decoder.layers.self_attention.linear_qkv"


def heads(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """q q k v, q q k v, picked head by head."""
    blocks = rows.split(8)
    return {
        "q": torch.cat([blocks[n] for n in (0, 1, 4, 5)]),
        "k": torch.cat([blocks[n] for n in (2, 6)]),
        "v": torch.cat([blocks[n] for n in (3, 7)]),
    }


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.module.", "language_model.", "module.llava_model.language_model."]
)
def test_layers_are_unstacked_under_any_wrapper(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{k}": t for k, t in pair(PROJ, HIDDEN, 32, L).items()}
    adapter = bind(read(checkpoint(tmp_path / "c", state), model=MODEL), SHAPES, config=MODEL)
    for n in range(L):
        found = adapter.sites[f"model.layers.{n}.self_attn.o_proj.weight"]
        a, b = state.values()
        assert torch.equal(found.A, a[n]) and torch.equal(found.B, b[n]) and found.scale == 2.0


def test_layers_with_numbers_of_their_own(tmp_path: Path) -> None:
    state = pair("decoder.layers.2.mlp.linear_fc2", HIDDEN, FFN)
    adapter = read(checkpoint(tmp_path / "c", state), model=MODEL)
    assert list(adapter.sites) == ["model.layers.2.mlp.down_proj.weight"]


def test_fused_rows_are_sorted_by_heads_and_halves(tmp_path: Path) -> None:
    state = {**pair(FUSED, QKV, HIDDEN, L), **pair(FC1, 2 * FFN, HIDDEN, L)}
    sites = bind(read(checkpoint(tmp_path / "c", state), model=MODEL), SHAPES, config=MODEL).sites
    for n in range(L):
        rows = heads(state[f"{FUSED}.adapter.linear_out.weight"][n])
        for part, b in rows.items():
            found = sites[f"model.layers.{n}.self_attn.{part}_proj.weight"]
            assert torch.equal(found.B, b)
            assert torch.equal(found.A, state[f"{FUSED}.adapter.linear_in.weight"][n])
        whole = state[f"{FC1}.adapter.linear_out.weight"][n]
        assert torch.equal(sites[f"model.layers.{n}.mlp.gate_proj.weight"].B, whole[:FFN])
        assert torch.equal(sites[f"model.layers.{n}.mlp.up_proj.weight"].B, whole[FFN:])


def test_dora_of_fused_modules(tmp_path: Path) -> None:
    """linear_fc1's magnitude lies in the order of the ranks that saved it: gate, up, gate, up at TP 2."""
    state = {**pair(FUSED, QKV, HIDDEN, L), **pair(FC1, 2 * FFN, HIDDEN, L), **pair(PROJ, HIDDEN, 32, L)}
    m = {k: torch.rand(L, n) + 0.5 for k, n in ((FUSED, QKV), (FC1, 2 * FFN), (PROJ, HIDDEN))}
    state |= {f"{k}.adapter.weight_magnitude": t for k, t in m.items()}
    dora = {"_target_": "megatron.bridge.peft.dora.DoRA"}
    folder = checkpoint(tmp_path / "c", state, peft=dora, model={"tensor_model_parallel_size": 2})
    sites = bind(read(folder, model=MODEL), SHAPES, config=MODEL).sites

    def magnitude(name: str) -> torch.Tensor:
        found = sites[f"model.layers.1.{name}.weight"].magnitude
        assert found is not None
        return found

    for part, want in heads(m[FUSED][1]).items():
        assert torch.equal(magnitude(f"self_attn.{part}_proj"), want)
    quarter = m[FC1][1].split(FFN // 2)
    assert torch.equal(magnitude("mlp.gate_proj"), torch.cat([quarter[0], quarter[2]]))
    assert torch.equal(magnitude("mlp.up_proj"), torch.cat([quarter[1], quarter[3]]))
    assert torch.equal(magnitude("self_attn.o_proj"), m[PROJ][1])
    with pytest.raises(FormatError, match="tensor_model_parallel_size"):
        read(checkpoint(tmp_path / "d", state, peft=dora), model=MODEL)


MOE = {**MODEL, "model_type": "qwen3_moe", "num_experts": 4}
EXPERTS = "decoder.layers.mlp.experts.{}linear_fc2"


@pytest.mark.parametrize(
    ("where", "lead_a", "lead_b"),
    [
        ("experts.", (L, 4), (L, 4)),  # one adapter an expert
        ("", (L, 4), (L, 4)),
        ("experts.", (L,), (L,)),  # one for all
        ("experts.", (L, 4), (L,)),  # Bridge's shared outer side
    ],
)
def test_forms_of_experts(where: str, lead_a: Any, lead_b: Any, tmp_path: Path) -> None:
    key = EXPERTS.format(where)
    a, b = torch.randn(*lead_a, 2, FFN), torch.randn(*lead_b, HIDDEN, 2)
    state = {f"{key}.adapter.linear_in.weight": a, f"{key}.adapter.linear_out.weight": b}
    sites = read(checkpoint(tmp_path / "c", state), model=MOE).sites
    assert len(sites) == L * 4
    found = sites["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert torch.equal(found.A, a[1, 3] if len(lead_a) == 2 else a[1])
    assert torch.equal(found.B, b[1, 3] if len(lead_b) == 2 else b[1])


def test_names_of_experts_follow_the_base(tmp_path: Path) -> None:
    state = {
        **pair("decoder.layers.0.mlp.experts.local_experts.2.linear_fc1", 2 * FFN, HIDDEN),
        **pair("decoder.layers.0.mlp.router", 4, HIDDEN),
    }
    mixtral = read(checkpoint(tmp_path / "c", state), model={**MOE, "model_type": "mixtral"})
    assert set(mixtral.sites) == {
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.block_sparse_moe.experts.2.w1.weight",
        "model.layers.0.block_sparse_moe.experts.2.w3.weight",
    }
    state = pair("decoder.layers.0.mlp.shared_experts.linear_fc2", HIDDEN, FFN)
    qwen = read(checkpoint(tmp_path / "d", state), model={**MOE, "model_type": "qwen2_moe"})
    assert set(qwen.sites) == {"model.layers.0.mlp.shared_expert.down_proj.weight"}


@pytest.mark.parametrize(
    ("rank", "settings", "fits"),
    [
        (4, {}, False),
        (8, {}, True),
        (4, {"moe_router_topk": 2}, True),
        (8, {"moe_router_topk": 2}, False),
        (3, {"moe_router_topk": 3, "expert_tensor_parallel_size": 2}, False),
        (2, {"moe_router_topk": 3, "expert_tensor_parallel_size": 2}, True),
        (4, {"moe_router_topk": 2, "expert_tensor_parallel_size": 3}, True),
        (6, {"moe_router_topk": 2, "expert_tensor_parallel_size": 3}, True),
    ],
)
def test_ranks_of_normalised_experts(rank: int, settings: dict[str, int], fits: bool, tmp_path: Path) -> None:
    state = pair(EXPERTS.format("experts."), HIDDEN, FFN, L, 4, rank=rank)
    peft = {"dim": 8, "alpha": 16, "normalize_moe_lora": bool(settings)}
    folder = checkpoint(tmp_path / "c", state, peft=peft, model=settings)
    if not fits:
        with pytest.raises(FormatError, match=rf"rank {rank}, where run_config\.yaml says"):
            read(folder, model=MOE)
        return
    assert {s.scale for s in read(folder, model=MOE).sites.values()} == {16 / rank}


def test_padding_of_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    state = pair("output_layer", 24, HIDDEN)
    adapter = read(checkpoint(tmp_path / "c", state), model=MODEL)
    found = adapter.sites["lm_head.weight"]
    assert torch.equal(found.B, state["output_layer.adapter.linear_out.weight"][:20])
    assert any("4 rows of output_layer pad" in note for note in adapter.notes)


def test_the_optimizers_states_are_passed_over(tmp_path: Path) -> None:
    state = pair(PROJ, HIDDEN, 32, L)
    states = {f"optimizer.state.exp_avg.{k}": t for k, t in state.items()}
    states |= {f"chained_0.optimizer.state.exp_avg_sq.{k}": t for k, t in state.items()}
    adapter = read(checkpoint(tmp_path / "c", {**state, **states}), model=MODEL)
    assert len(adapter.sites) == L and any("optimizer's states" in note for note in adapter.notes)


def test_alpha_is_asked_for_only_without_run_config(tmp_path: Path) -> None:
    state = pair(PROJ, HIDDEN, 32, L)
    folder = checkpoint(tmp_path / "c", state)
    with pytest.raises(FormatError, match="carry alpha themselves"):
        read(folder, alpha=3, model=MODEL)
    (folder / "run_config.yaml").unlink()
    with pytest.raises(FormatError, match=r"no run_config\.yaml.*peft\.alpha used in training with --alpha"):
        read(folder, model=MODEL)
    assert {s.scale for s in read(folder, alpha=3, model=MODEL).sites.values()} == {1.5}


def test_heads_are_the_bases_or_the_runs(tmp_path: Path) -> None:
    state = pair(FUSED, QKV, HIDDEN, L)
    with pytest.raises(FormatError, match=r"linear_qkv needs the base.*--base"):
        read(checkpoint(tmp_path / "c", state))
    model = {"num_attention_heads": 4, "num_query_groups": 2, "hidden_size": 32}
    told = read(checkpoint(tmp_path / "d", state, model=model)).sites
    asked = read(tmp_path / "d", model=MODEL).sites
    assert all(torch.equal(told[name].B, asked[name].B) for name in asked)


BAD: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "a full tensor": (
        {**pair(PROJ, HIDDEN, 32, L), "vision_projection.weight": torch.ones(2)},
        {},
        r"1 tensors besides the adapter's \(vision_projection\.weight\)",
    ),
    "no B": (dict([*pair(PROJ, HIDDEN, 32, L).items()][:1]), {}, "linear_out.weight is missing"),
    "no A": (dict([*pair(PROJ, HIDDEN, 32, L).items()][1:]), {}, "linear_in.weight is missing"),
    "unknown module": (pair("decoder.layers.0.mixer.in_proj", 8, 8), {}, "no module of Megatron's"),
    "another tower": (
        pair("vision_model.decoder.layers.mlp.linear_fc2", 8, 8, 2), {}, "no module of Megatron's",
    ),
    "a part of another module": (
        {k.replace("linear_", "adapter_q.linear_", 1): t for k, t in pair("output_layer", 8, 8).items()},
        {}, "no module of Megatron's",
    ),
    "ranks": (
        {f"{PROJ}.adapter.linear_{f}.weight": torch.ones(*n) for f, n in
         (("in", (L, 2, 32)), ("out", (L, 16, 3)))},
        {}, "do not agree",
    ),
    "layers": (
        {f"{PROJ}.adapter.linear_{f}.weight": torch.ones(*n) for f, n in
         (("in", (2, 2, 32)), ("out", (3, 16, 2)))},
        {}, "have other layers",
    ),
    "axes": (pair(PROJ, HIDDEN, 32, L, 4), {}, "of one layer"),
    "the run's rank": (pair(PROJ, HIDDEN, 32, L, rank=3), {}, r"rank 3, where run_config\.yaml says 2"),
    "heads": (pair(FUSED, 60, HIDDEN, L), {}, "60 rows are not 4 query heads and 2 key and value heads of 8"),
    "halves": (pair(FC1, 25, HIDDEN, L), {}, "25 rows are not a gate and an up"),
    "no gate": (pair(FC1, 24, HIDDEN, L), {"model": {"gated_linear_unit": False}}, "has no gate"),
    "twice": (
        {**pair(PROJ, HIDDEN, 32, L), **pair("decoder.layers.1.self_attention.linear_proj", HIDDEN, 32)},
        {}, "adapted twice",
    ),
    "OFT": (pair(PROJ, HIDDEN, 32, L), {"peft": {"_target_": "megatron.bridge.peft.oft.OFT"}}, "peft is OFT"),
    "dim": (pair(PROJ, HIDDEN, 32, L), {"peft": {"dim": "8"}}, "dim must be a positive integer, got '8'"),
    "alpha": (pair(PROJ, HIDDEN, 32, L), {"peft": {"alpha": -1}}, "alpha must be a positive number, got -1"),
    "empty": (pair(FC1, 24, 0, L), {}, "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused_by_name(name: str, tmp_path: Path) -> None:
    state, settings, said = BAD[name]
    with pytest.raises(FormatError, match=said):
        read(checkpoint(tmp_path / "c", state, **settings), model=MODEL)


# --- writing ----------------------------------------------------------------------------------------------


def written(
    adapter: Adapter, folder: Path, model: Any = MODEL
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors as torch's own reader loads them, and run_config.yaml."""
    import warnings

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    write(adapter, folder, format="megatron", model=model, base_name="some/base")
    sizes = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in sizes.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, storage_reader=FileSystemReader(folder), no_dist=True)
    return found, yaml.safe_load((folder / "run_config.yaml").read_text())


def back(folder: Path, adapter: Adapter, model: Any = MODEL) -> Adapter:
    shapes = {name: site.shape or () for name, site in adapter.sites.items()}
    return bind(read(folder, model=model), shapes, config=model)


def test_own_factors_are_canonical_lora(tmp_path: Path) -> None:
    adapter = plain()
    found, config = written(adapter, tmp_path / "c")
    assert config["peft"]["_target_"] == "megatron.bridge.peft.canonical_lora.CanonicalLoRA"
    assert config["peft"]["dim"] == 2 and config["peft"]["alpha"] == 4
    assert config["peft"]["target_modules"] == [
        "linear_fc1_gate", "linear_fc1_up", "linear_fc2", "linear_k", "linear_proj", "linear_q", "linear_v",
    ]  # fmt: skip
    assert config["model"]["hf_model_id"] == "some/base" and config["model"]["num_query_groups"] == 2
    key = "decoder.layers.self_attention.linear_qkv.adapter.adapter_k.linear_out.weight"
    assert torch.equal(found[key][1], adapter.sites["model.layers.1.self_attn.k_proj.weight"].B)


def test_one_shared_factor_is_lora(tmp_path: Path) -> None:
    """What Bridge trained comes back as it was: one A, rows of B by heads."""
    sites = dict(plain().sites)
    for n in range(L):
        for first, *others in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                               ("mlp.gate_proj", "mlp.up_proj")):  # fmt: skip
            a = sites[f"model.layers.{n}.{first}.weight"].A
            for other in others:
                name = f"model.layers.{n}.{other}.weight"
                sites[name] = replace(sites[name], A=a)
    found, config = written(Adapter(sites), tmp_path / "c")
    assert config["peft"]["_target_"] == "megatron.bridge.peft.lora.LoRA" and config["peft"]["dim"] == 2
    rows = heads(found[f"{FUSED}.adapter.linear_out.weight"][2])
    for part, b in rows.items():
        assert torch.equal(b, sites[f"model.layers.2.self_attn.{part}_proj.weight"].B)
    gate, up = found[f"{FC1}.adapter.linear_out.weight"][0].chunk(2)
    assert torch.equal(gate, sites["model.layers.0.mlp.gate_proj.weight"].B)
    assert torch.equal(up, sites["model.layers.0.mlp.up_proj.weight"].B)
    again = back(tmp_path / "c", Adapter(sites))
    assert all(
        torch.equal(again.sites[n].A, s.A) and torch.equal(again.sites[n].B, s.B) for n, s in sites.items()
    )


def test_missing_parts_are_joined_and_left_out_again(tmp_path: Path) -> None:
    names = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(L) for p in "qv"]
    adapter = Adapter({name: plain().sites[name] for name in names})
    found, config = written(adapter, tmp_path / "c")
    assert config["peft"]["dim"] == 4 and set(found) == {
        f"{FUSED}.adapter.linear_{f}.weight" for f in ("in", "out")
    }
    assert not heads(found[f"{FUSED}.adapter.linear_out.weight"][0])["k"].any()
    again = back(tmp_path / "c", adapter)
    assert set(again.sites) == set(names) and {s.rank for s in again.sites.values()} == {2}
    assert any("k_proj" in note for note in again.notes)
    assert_same_update(adapter, again, rounded=False)


def test_the_bases_fingerprints_are_kept(tmp_path: Path) -> None:
    told = {name: f"float32:{n:016x}" for n, name in enumerate(LINEAR)}
    write(replace(plain(), base=told), tmp_path / "c", format="megatron", model=MODEL)
    again = read(tmp_path / "c", model=MODEL)
    assert bind(again, SHAPES, config=MODEL).base == told and tmp_path / "c/graft_base.json" in again.files


def test_some_layers_have_numbers(tmp_path: Path) -> None:
    adapter = Adapter({n: s for n, s in plain().sites.items() if n.split(".")[2] != "1" and "o_proj" in n})
    found, _ = written(adapter, tmp_path / "c")
    assert {k.split(".")[2] for k in found} == {"0", "2"}
    assert_same_update(adapter, back(tmp_path / "c", adapter), rounded=False)


def normed(names: list[str]) -> Adapter:
    torch.manual_seed(1)
    return Adapter(
        {n: replace(site(n, 2, 2.0, torch.float32), magnitude=torch.rand(LINEAR[n][0]) + 0.5) for n in names}
    )


def test_dora_is_held_where_modules_are_whole(tmp_path: Path) -> None:
    adapter = normed(list(LINEAR))
    found, config = written(adapter, tmp_path / "c")
    assert config["peft"]["_target_"] == "megatron.bridge.peft.dora.DoRA"
    assert found[f"{FUSED}.adapter.weight_magnitude"].shape == (L, QKV)
    assert_same_update(adapter, back(tmp_path / "c", adapter), rounded=False)
    part = normed([n for n in LINEAR if "k_proj" not in n])
    with pytest.raises(FormatError, match=r"one magnitude for all of its rows, and k is not adapted"):
        write(part, tmp_path / "d", format="megatron", model=MODEL)
    mixed = Adapter({**adapter.sites, "lm_head.weight": LowRank(
        torch.ones(2, 16), torch.ones(20, 2), 1.0, Layout("o i"), shape=(20, 16))})  # fmt: skip
    with pytest.raises(FormatError, match="DoRA on all modules or none"):
        write(mixed, tmp_path / "d", format="megatron", model=MODEL)


def expert_adapter(count: int = 4) -> Adapter:
    torch.manual_seed(2)
    sites: dict[str, LowRank] = {}
    for n in range(L):
        for e in range(count):
            for name, (o, i) in (
                ("gate_proj", (FFN, HIDDEN)),
                ("up_proj", (FFN, HIDDEN)),
                ("down_proj", (HIDDEN, FFN)),
            ):
                made = LowRank(torch.randn(2, i), torch.randn(o, 2), 2.0, Layout("o i"), shape=(o, i))
                sites[f"model.layers.{n}.mlp.experts.{e}.{name}.weight"] = made
    return Adapter(sites)


def test_experts_are_stacked(tmp_path: Path) -> None:
    adapter = expert_adapter()
    found, config = written(adapter, tmp_path / "c", MOE)
    assert config["peft"]["dim"] == 4 and config["peft"]["share_expert_adapters"] is False
    key = "decoder.layers.mlp.experts.experts.linear_fc1.adapter.linear_{}.weight"
    assert found[key.format("in")].shape == (L, 4, 4, HIDDEN) and found[key.format("out")].shape == (
        L,
        4,
        2 * FFN,
        4,
    )
    again = back(tmp_path / "c", adapter, MOE)
    assert again.sites.keys() == adapter.sites.keys()
    for name, want in adapter.sites.items():
        got = again.sites[name]
        assert torch.equal(
            got.scale * got.B.double() @ got.A.double(), want.scale * want.B.double() @ want.A.double()
        )
    with pytest.raises(FormatError, match="1 of them have no update"):
        write(expert_adapter(3), tmp_path / "d", format="megatron", model=MOE)


def test_a_vision_language_models_language_model(tmp_path: Path) -> None:
    model = {"model_type": "vlm", "text_config": MODEL}
    names = {n: n.replace("model.", "model.language_model.", 1) for n in LINEAR}
    adapter = Adapter({names[n]: s for n, s in plain().sites.items()})
    found, _ = written(adapter, tmp_path / "c", model)
    assert all(key.startswith("language_model.decoder.layers.") for key in found)
    assert set(back(tmp_path / "c", adapter, model).sites) == set(adapter.sites)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (40, 16), r"'q': 40.* rows, where the base's heads have"),
        ("model.layers.3.mlp.down_proj.weight", (16, 12), "the base has 3 layers"),
        ("model.layers.0.mlp.c_fc.weight", (16, 12), "no module for it"),
        ("model.embed_positions.weight", (16, 12), "no module for it"),
    ],
)
def test_what_megatron_has_no_place_for(name: str, shape: Any, said: str, tmp_path: Path) -> None:
    o, i = shape
    one = LowRank(torch.ones(2, i), torch.ones(o, 2), 1.0, Layout("o i"), shape=shape)
    with pytest.raises(FormatError, match=said):
        write(Adapter({name: one}), tmp_path / "c", format="megatron", model=MODEL)
    with pytest.raises(FormatError, match="--base"):
        write(plain(), tmp_path / "c", format="megatron")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [0.1, 8 / 3**0.5, 1e-5, 0.0])
def test_odd_scales(scale: float, tmp_path: Path) -> None:
    adapter = plain(scale=scale)
    notes = write(adapter, tmp_path / "c", format="megatron", model=MODEL)
    assert not any("rounded once" in note for note in notes)
    assert_same_update(adapter, back(tmp_path / "c", adapter), rounded=False)
