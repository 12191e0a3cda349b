"""litgpt's files: fused q, k and v in both orders of rows, names of several families, and litgpt itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.adapter import Adapter, LowRank
from graft.bind import bind
from graft.errors import FormatError
from graft.formats import Target, read, write
from graft.formats.litgpt import LitgptFormat
from graft.formats.litgpt_names import FAMILIES
from graft.formats.litgpt_qkv import Heads
from graft.formats.yaml_text import yaml_text
from graft.layout import Layout

from .carrying import MODEL, SHAPES, assert_same_update, plain, update

#: 4 query heads on 2 key/value heads of 8 rows
ROWS = {"q": 32, "k": 16, "v": 16}
QKV = "transformer.h.0.attn.qkv"
OLD = "transformer.h.0.attn.attn"
ON = [(True, False, True), (True, True, True), (False, True, False), (False, True, True)]


def hyper(on: Sequence[bool], **changes: Any) -> dict[str, Any]:
    flags = dict(zip(("lora_query", "lora_key", "lora_value"), on, strict=True))
    return {"lora_r": 2, "lora_alpha": 16, **flags, **changes}


def save(folder: Path, tensors: dict[str, torch.Tensor], settings: Any, *, nested: bool = True) -> Path:
    folder.mkdir()
    torch.save({"model": tensors} if nested else tensors, folder / "lit_model.pth.lora")
    if settings is not None:
        (folder / "hyperparameters.yaml").write_text(yaml_text(settings))
    return folder


def lora(module: str, on: Sequence[bool], rank: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(sum(on))
    rows = sum(n for n, one in zip(ROWS.values(), on, strict=True) if one)
    return {f"{module}.lora_A": torch.randn(rank * sum(on), 16), f"{module}.lora_B": torch.randn(rows, rank)}


def products(tensors: dict[str, torch.Tensor], module: str, on: Sequence[bool]) -> dict[str, torch.Tensor]:
    """8·B_j·A_j of each adapted one of q, k and v, as litgpt documents its shapes."""
    names = [name for name, one in zip("qkv", on, strict=True) if one]
    a = tensors[f"{module}.lora_A"].double().chunk(len(names))
    b = tensors[f"{module}.lora_B"].double().split([ROWS[name] for name in names])
    return {name: 8 * y @ x for name, x, y in zip(names, a, b, strict=True)}


def kinds() -> list[str]:
    """What each row of the old order is: two query heads, a key head, a value head, and again."""
    return [kind for _ in range(2) for kind in "qqkv" for _ in range(8)]


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    found = bind(adapter, SHAPES, config=MODEL).sites
    prefix = "model.layers.0.self_attn."
    return {
        name.removeprefix(prefix)[0]: update(site, torch.zeros(SHAPES[name], dtype=torch.float64))
        for name, site in found.items()
    }


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("on", ON)
def test_each_of_q_k_and_v_gets_its_own_block(on: Sequence[bool], nested: bool, tmp_path: Path) -> None:
    tensors = lora(QKV, on)
    path = save(tmp_path / "a", tensors, hyper(on), nested=nested)
    adapter = read(path, model=MODEL)
    want, got = products(tensors, QKV, on), deltas(adapter)
    assert adapter.format == "litgpt" and want.keys() == got.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12)
        site = adapter.sites[f"model.layers.0.self_attn.{name}_proj.weight"]
        assert site.rank == 2


@pytest.mark.parametrize("on", ON)
def test_the_old_order_of_rows(on: Sequence[bool], tmp_path: Path) -> None:
    """Some adapted: each block goes to the rows of its kind. All three: B's rows lie as they come."""
    tensors = lora(OLD, on)
    found = products(tensors, OLD, on)
    order = kinds()
    if all(on):
        fused = torch.cat([found[name] for name in "qkv"])
    else:
        queues = {name: iter(tensor) for name, tensor in found.items()}
        zero = torch.zeros(16, dtype=torch.float64)
        fused = torch.stack([next(queues[kind]) if kind in queues else zero for kind in order])
    path = save(tmp_path / "a", tensors, hyper(on))
    for name, got in deltas(read(path, model=MODEL)).items():
        want = fused[[row for row, kind in enumerate(order) if kind == name]]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (path / "model_config.yaml").write_text("n_head: 4\nn_query_groups: 2\nn_embd: 16\nhead_size: 8\n")
    own = bind(read(path), {f"{OLD}.weight": (64, 16)}).sites[f"{OLD}.weight"]
    torch.testing.assert_close(update(own, torch.zeros(64, 16, dtype=torch.float64)), fused)


@pytest.mark.parametrize("on", ON)
def test_without_a_hugging_face_base_names_stay(on: Sequence[bool], tmp_path: Path) -> None:
    tensors = lora(QKV, on)
    path = save(tmp_path / "a", tensors, hyper(on))
    with pytest.raises(FormatError, match=r"--base BASE.*model_config\.yaml"):
        read(path)
    (path / "model_config.yaml").write_text("n_head: 4\nn_query_groups: 2\nn_embd: 32\n")
    adapter = bind(read(path), {f"{QKV}.weight": (64, 16)})
    got = update(adapter.sites[f"{QKV}.weight"], torch.zeros(64, 16, dtype=torch.float64))
    parts = products(tensors, QKV, on)
    blank = {name: torch.zeros(rows, 16, dtype=torch.float64) for name, rows in ROWS.items()}
    torch.testing.assert_close(got, torch.cat(list({**blank, **parts}.values())))
    assert any("--base" in note for note in adapter.notes)
    with pytest.raises(FormatError, match="--base BASE"):
        write(adapter, tmp_path / "b", format="litgpt")


def test_the_order_by_groups() -> None:
    order = kinds()
    want = [row for name in "qkv" for row, kind in enumerate(order) if kind == name]
    assert Heads(4, 2, 8).grouped().tolist() == want


NEOX = {**MODEL, "model_type": "gpt_neox", "num_key_value_heads": 4}
NEOX_SHAPES = {
    f"gpt_neox.layers.{n}.{name}.weight": shape
    for n in range(3)
    for name, shape in {
        "attention.query_key_value": (96, 16),
        "attention.dense": (16, 32),
        "mlp.dense_h_to_4h": (12, 16),
        "mlp.dense_4h_to_h": (16, 12),
    }.items()
}


def test_a_fused_weight_of_the_base_goes_there_and_back(tmp_path: Path) -> None:
    """Pythia's query_key_value holds q, k and v head by head; the written file has their rows apart."""
    torch.manual_seed(1)
    sites = {
        name: LowRank(torch.randn(2, i), torch.randn(o, 2), 1.5, Layout("o i"), None, False, shape=(o, i))
        for name, (o, i) in NEOX_SHAPES.items()
        if "dense_4h" not in name
    }
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    queries = sites[name].B.clone().view(4, 3, 8, 2)
    queries[:, 1] = 0  # no key is adapted
    sites[name] = replace(sites[name], B=queries.view(96, 2))
    write(Adapter(sites), tmp_path / "a", format="litgpt", model=NEOX)
    tensors = torch.load(tmp_path / "a" / "lit_model.pth.lora")["model"]
    assert tensors[f"{QKV}.lora_A"].shape == (6, 16) and tensors[f"{QKV}.lora_B"].shape == (96, 2)
    want = 1.5 * (sites[name].B.double() @ sites[name].A.double()).view(4, 3, 8, 16)
    a, b = (tensors[f"{QKV}.lora_{x}"].double() for x in "AB")
    for n in range(3):
        part = 1.5 * b[32 * n : 32 * n + 32] @ a[2 * n : 2 * n + 2]
        torch.testing.assert_close(part, want[:, n].reshape(32, 16), rtol=1e-12, atol=1e-12)
    back = bind(read(tmp_path / "a", model=NEOX), NEOX_SHAPES, config=NEOX)
    assert back.sites.keys() == sites.keys()
    for name, site in sites.items():
        zero = torch.zeros(NEOX_SHAPES[name], dtype=torch.float64)
        assert torch.equal(update(back.sites[name], zero), update(site, zero))


def test_experts_and_what_litgpt_wants_beside_them(tmp_path: Path) -> None:
    model = {**MODEL, "model_type": "mixtral", "num_local_experts": 2}
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    one = LowRank(torch.ones(2, 12), torch.ones(16, 2), 2.0, Layout("o i"), None, False, shape=(16, 12))
    write(Adapter({name: one}), tmp_path / "a", format="litgpt", model=model)
    tensors = torch.load(tmp_path / "a" / "lit_model.pth.lora")["model"]
    mlp = "transformer.h.{}.mlp.{}.lora_A"
    names = [f"experts.{e}.{leaf}" for e in range(2) for leaf in ("fc_1", "fc_2", "proj")]
    want = {mlp.format(n, leaf) for n in range(3) for leaf in ["gate", *names]}
    assert {key for key in tensors if key.endswith("lora_A")} == want
    assert tensors["transformer.h.0.mlp.gate.lora_B"].shape == (2, 2)
    adapter = read(tmp_path / "a", model=model)
    assert set(adapter.sites) == {name} and any("not adapted" in note for note in adapter.notes)


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        (None, {}, "--alpha"),
        (None, {"alpha": 16.0}, "--enable-lora"),
        (hyper((True, False, True)), {"alpha": 16.0}, "leave --alpha"),
        (hyper((True, False, True), lora_r=4), {}, "lora_r: 4"),
        (hyper((False, True, True)), {}, "do not fit k and v"),
        (hyper((True, True, True)), {}, "do not fit q and k and v"),
        (hyper((True, False, True)), {"model": {**MODEL, "model_type": "t5"}}, "'t5'; known are: llama"),
    ],
)
def test_what_must_be_told(settings: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a", lora(QKV, (True, False, True)), settings)
    with pytest.raises(FormatError, match=said):
        read(path, **{"model": MODEL, **options})


def test_blocks_may_be_told_by_hand(tmp_path: Path) -> None:
    on = (True, False, True)
    path = save(tmp_path / "a", lora(QKV, on), None)
    one = read(path, model=MODEL, alpha=16.0, enable_lora=on)
    other = read(save(tmp_path / "b", lora(QKV, on), hyper(on)), model=MODEL)
    assert_same_update(*(bind(x, SHAPES, config=MODEL) for x in (one, other)), rounded=False)


def test_faults_are_named(tmp_path: Path) -> None:
    tensors = lora(QKV, (True, False, True))
    tensors |= {"transformer.h.0.attn.proj.lora_A": torch.ones(2, 32)}
    tensors |= {"transformer.h.0.mlp.fc_1.lora_B": torch.ones(2, 32), "x.lora_A": torch.ones(1, 1)}
    tensors |= {
        "transformer.h.0.mlp.fc.lora_A": torch.ones(2, 3),
        "transformer.h.0.mlp.fc.lora_B": torch.ones(3, 1),
    }
    tensors |= {
        "transformer.h.1.mlp.fc.lora_A": torch.ones(2, 3),
        "transformer.h.1.mlp.fc.lora_B": torch.ones(3, 2),
    }
    with pytest.raises(FormatError) as refused:
        read(save(tmp_path / "a", tensors, hyper((True, False, True))), model=MODEL)
    for said in (
        "attn.proj.lora_A has no lora_B",
        "fc_1.lora_B: its lora_A is missing",
        "x.lora_A: not a tensor of litgpt's",
        "h.0.mlp.fc: lora_A [2, 3] and lora_B [3, 1] are not of one rank",
        "h.1.mlp.fc: a base of model_type llama has no such module",
    ):
        assert said in str(refused.value)


def test_modules_that_litgpt_does_not_have_are_lost() -> None:
    adapter = plain()
    losses = LitgptFormat().losses(adapter, Target(None, {**MODEL, "model_type": "phi"}))
    assert {loss.name.split(".")[-2] for loss in losses} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {loss.why for loss in LitgptFormat().losses(adapter, Target())} == {
        "litgpt's names and sizes follow from the base: give it (--base BASE)"
    }


@pytest.mark.parametrize("value", [1e-05, 3e22, 0.1, 16.0, 7, True, "a: b"])
def test_yaml_scalars_are_read_as_what_they_were(value: Any) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(yaml_text({"x": {"y": value}}))["x"]["y"] == value


def theirs(**changes: Any) -> Any:
    """litgpt's own model of the same decoder; everything random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("litgpt.lora")
    settings = {
        "n_layer": 3, "n_head": 4, "n_query_groups": 2, "n_embd": 16, "head_size": 8, "intermediate_size": 12,
        "vocab_size": 20, "padded_vocab_size": 20, "block_size": 32, "mlp_class_name": "LLaMAMLP",
        "norm_class_name": "RMSNorm", "norm_eps": 1e-6, "bias": False, "rotary_percentage": 1.0,
        "parallel_residual": False, "lora_r": 2, "lora_alpha": 3, **changes,
    }  # fmt: skip
    torch.manual_seed(5)
    model = module.GPT(module.Config(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    return model.eval()


def converted(model: Any, hf: Any) -> None:
    """litgpt's own conversion of a Hugging Face model, loaded beside its LoRA."""
    scripts = pytest.importorskip("litgpt.scripts.convert_hf_checkpoint")
    state: dict[str, torch.Tensor] = {}
    if hf.config.model_type == "gpt_neox":
        named = {name.replace("lm_head", "embed_out"): t for name, t in hf.state_dict().items()}
        scripts.copy_weights_gpt_neox(model.config, state, named)
    else:
        scripts.copy_weights_hf_llama(model.config, {}, state, hf.state_dict())
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    return LlamaForCausalLM(LlamaConfig(**MODEL, tie_word_embeddings=False)).eval()


def neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(6)
    sizes = {key: MODEL[key] for key in ("intermediate_size", "num_hidden_layers", "vocab_size")}
    config = GPTNeoXConfig(
        **sizes, hidden_size=32, num_attention_heads=4, rotary_pct=0.25, use_parallel_residual=True
    )
    return GPTNeoXForCausalLM(config).eval()


NEOX_MODEL = {
    "mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True, "norm_eps": 1e-5,
    "n_embd": 32, "rotary_percentage": 0.25, "parallel_residual": True, "n_query_groups": 4,
    "lora_key": True, "lora_head": False,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_litgpts_own_model_and_the_fused_hugging_face_one_agree(family: str, tmp_path: Path) -> None:
    import graft

    flags = {f"lora_{name}": True for name in ("query", "value", "projection", "mlp", "head")}
    flags |= {"lora_key": False, **(NEOX_MODEL if family == "gpt_neox" else {})}
    model, hf = theirs(**flags), llama() if family == "llama" else neox()
    converted(model, hf)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    on = (True, flags["lora_key"], True)
    path = save(tmp_path / "a", tensors, hyper(on, lora_alpha=3))  # type: ignore[arg-type]
    ids = torch.arange(12)[None] % 20
    with torch.no_grad():
        before, want = hf(ids).logits, model(ids)
        graft.load(hf, path, quiet=True)
        graft.fuse(hf)
        torch.testing.assert_close(hf(ids).logits, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before, want, atol=1e-2)


def test_litgpt_loads_and_merges_what_is_written(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    sites = {
        n: s
        for n, s in plain(scale=1.5).sites.items()
        if not n.endswith(("2.self_attn.q_proj.weight", "1.mlp.up_proj.weight"))
    }
    adapter = Adapter(sites)
    write(adapter, tmp_path / "a", format="litgpt", model=MODEL, base_name="somebody/tiny")
    settings = yaml.safe_load((tmp_path / "a" / "hyperparameters.yaml").read_text())
    model, hf = theirs(**{k: v for k, v in settings.items() if k.startswith("lora_")}), llama()
    tensors = torch.load(tmp_path / "a" / "lit_model.pth.lora")["model"]
    assert set(tensors) == {name for name in model.state_dict() if "lora_" in name}
    converted(model, hf)
    model.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        for name, site in sites.items():
            weight = hf.get_parameter(name)
            weight.copy_(update(site, weight))
        ids = torch.arange(12)[None] % 20
        unmerged = model(ids)
        pytest.importorskip("litgpt.lora").merge_lora_weights(model)
        torch.testing.assert_close(model(ids), unmerged, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(hf(ids).logits, unmerged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_names_of_every_family_go_there_and_back(kind: str) -> None:
    names = FAMILIES[kind].names
    for template in FAMILIES[kind].table:
        module = template.format(3, 1)
        assert names.theirs(names.ours(module) or "") == module
    for index, template in enumerate(FAMILIES[kind].qkv):
        assert FAMILIES[kind].part(template.format(3)) == ("transformer.h.3.attn.qkv", index)
