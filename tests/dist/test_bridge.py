"""Megatron's own checkpoints of adapters → Hugging Face's model, and Graft's adapters → Megatron's model.

The base is one decoder in both: Megatron's GPTModel and LlamaForCausalLM of the same numbers. What Megatron
computes with its adapter, Llama must compute with the fused weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
pytestmark = [
    pytest.mark.dist,
    # Megatron's modules are imported here only to name the checks
    pytest.mark.filterwarnings("ignore"),
]

from graft.adapter import Adapter, LowRank  # noqa: E402
from graft.bind import bind  # noqa: E402
from graft.formats import read, write  # noqa: E402
from graft.fuse_files import fuse  # noqa: E402
from graft.layout import Layout  # noqa: E402
from tests.dist import bridge_work  # noqa: E402
from tests.dist.bridge_work import ALPHA, GROUPS, HEAD, HEADS, RANK, WRITTEN, work  # noqa: E402
from tests.dist.mcore.models import tokens  # noqa: E402
from tests.dist.mcore.run import start  # noqa: E402
from tests.files import make  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "head_dim": HEAD, "vocab_size": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
CONFIG = {**SIZES, "model_type": "llama"}
MODULES = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}  # fmt: skip
RUN_CONFIG = f"peft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  dim: {RANK}\n  alpha: {ALPHA}\n"


def adapter(modules: list[str], rank: int) -> Adapter:
    """A random adapter of these modules in both layers, and of the head; scale = alpha / the written rank."""
    torch.manual_seed(5)
    shapes = {f"model.layers.{n}.{m}.weight": MODULES[m] for n in range(2) for m in modules}
    shapes["lm_head.weight"] = (64, 32)
    scale = ALPHA / WRITTEN["graft-canonical" if len(modules) == 7 else "graft-lora"]
    return Adapter(
        {
            name: LowRank(
                torch.randn(rank, i) * 0.3, torch.randn(o, rank) * 0.3, scale, Layout("o i"), shape=(o, i)
            )
            for name, (o, i) in shapes.items()
        }
    )


OURS = {
    "graft-lora": adapter([name for name in MODULES if not name.endswith(("k_proj", "gate_proj"))], 3),
    "graft-canonical": adapter(list(MODULES), 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes of Megatron wrote and computed."""
    folder = tmp_path_factory.mktemp("bridge")
    for name, ours in OURS.items():
        notes = write(ours, folder / name, format="megatron", model=CONFIG)
        assert any("one A" in note for note in notes) == (name == "graft-lora")
    assert start(2, work, folder) == [0, 0]
    for rank in range(2):
        failed = json.loads((folder / f"{rank}.json").read_text())
        assert not failed, f"process {rank}:\n{failed}"
    for place in folder.glob("*-tp?"):
        if place.is_dir():
            (place / "run_config.yaml").write_text(RUN_CONFIG)
    for singles in (False, True):
        (folder / f"experts-{singles}" / "run_config.yaml").write_text(RUN_CONFIG)
    return folder


def heads(fused: torch.Tensor) -> dict[str, torch.Tensor]:
    """linear_qkv's rows, sorted head by head: q q k v, q q k v."""
    found: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    for n, block in enumerate(fused.split(HEAD)):
        found["qqkv"[n % 4]].append(block)
    return {name: torch.cat(blocks) for name, blocks in found.items()}


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    """Megatron's base as a directory of Hugging Face's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = {n: t for n, t in torch.load(folder / "base.pt").items() if t is not None}
    ours = {
        "model.embed_tokens.weight": theirs["embedding.word_embeddings.weight"],
        "model.norm.weight": theirs["decoder.final_layernorm.weight"],
        "lm_head.weight": theirs["output_layer.weight"],
    }
    for n in range(2):
        one, other = f"decoder.layers.{n}", f"model.layers.{n}"
        parts = heads(theirs[f"{one}.self_attention.linear_qkv.weight"])
        fc1 = theirs[f"{one}.mlp.linear_fc1.weight"]
        ours |= {f"{other}.self_attn.{part}_proj.weight": rows for part, rows in parts.items()}
        ours |= {
            f"{other}.self_attn.o_proj.weight": theirs[f"{one}.self_attention.linear_proj.weight"],
            f"{other}.mlp.gate_proj.weight": fc1[:48],
            f"{other}.mlp.up_proj.weight": fc1[48:],
            f"{other}.mlp.down_proj.weight": theirs[f"{one}.mlp.linear_fc2.weight"],
            f"{other}.input_layernorm.weight": theirs[f"{one}.input_layernorm.weight"],
            f"{other}.post_attention_layernorm.weight": theirs[f"{one}.pre_mlp_layernorm.weight"],
        }
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    model.load_state_dict(ours)
    return make.save(model, folder / "llama")


def logits(model: Path) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(model).eval()(tokens()[0]).logits


@pytest.mark.parametrize("name", ["lora-tp1", "lora-tp2", "canonical-tp1", "canonical-tp2"])
def test_the_fused_model_computes_what_megatron_does(name: str, folder: Path, llama: Path) -> None:
    fuse(llama, folder / name, folder / f"fused-{name}")
    want, found = torch.load(folder / f"{name}.pt"), logits(folder / f"fused-{name}")
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert float((want - logits(llama)).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["lora", "canonical"])
def test_the_adapter_does_not_depend_on_the_split(kind: str, folder: Path) -> None:
    one, two = (read(folder / f"{kind}-tp{n}", model=CONFIG) for n in (1, 2))
    assert one.sites.keys() == two.sites.keys() and len(one.sites) == 15
    for name, site in one.sites.items():
        assert torch.equal(site.A, two.sites[name].A) and torch.equal(site.B, two.sites[name].B), name
        assert site.scale == ALPHA / RANK and site.rank == RANK


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", sorted(OURS))
def test_megatron_computes_what_was_written(name: str, tp: int, folder: Path, llama: Path) -> None:
    if not (folder / f"fused-{name}").exists():
        write(OURS[name], folder / f"peft-{name}")
        fuse(llama, folder / f"peft-{name}", folder / f"fused-{name}")
    want = logits(folder / f"fused-{name}")
    torch.testing.assert_close(torch.load(folder / f"{name}-tp{tp}.pt"), want, rtol=1e-4, atol=1e-4)


def test_what_was_written_comes_back(folder: Path) -> None:
    for name, ours in OURS.items():
        shapes = {n: site.shape or () for n, site in ours.sites.items()}
        for config in (CONFIG, None):  # run_config.yaml says how many heads there are, too
            back = bind(read(folder / name, model=config), shapes, config=config)
            assert back.sites.keys() == ours.sites.keys() and bool(back.notes) == (name == "graft-lora")
            for n, site in ours.sites.items():
                assert torch.equal(back.sites[n].A[: site.rank], site.A)
                assert torch.equal(back.sites[n].B[:, : site.rank], site.B)
                assert not back.sites[n].B[:, site.rank :].any()


@pytest.mark.parametrize("singles", [False, True])
def test_experts(singles: bool, folder: Path) -> None:
    """Megatron's sequential experts, stacked and under names of their own."""
    theirs = torch.load(folder / "experts.pt")
    config = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 3}
    sites = read(folder / f"experts-{singles}", model=config).sites
    assert len(sites) == 2 * (4 + 3 * 3) + 1
    for n in range(2):
        for e in range(3):
            for fc, parts in (("linear_fc1", ("gate_proj", "up_proj")), ("linear_fc2", ("down_proj",))):
                local = f"decoder.layers.{n}.mlp.experts.local_experts.{e}.{fc}.adapter"
                rows = theirs[f"{local}.linear_out.weight"].chunk(len(parts))
                for part, b in zip(parts, rows, strict=True):
                    site = sites[f"model.layers.{n}.mlp.experts.{e}.{part}.weight"]
                    assert torch.equal(site.B, b)
                    assert torch.equal(site.A, theirs[f"{local}.linear_in.weight"])


def test_the_work_names_what_is_here() -> None:
    assert WRITTEN.keys() == OURS.keys() and bridge_work.TARGETS[0] == "linear_qkv"
