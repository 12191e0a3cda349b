"""``graft fuse`` and ``graft verify`` as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from graft.cli.app import cli

from ..pairs import CONFIG, Pair, edit_json, edit_tensors, llama, lora, snapshot, write_pair

Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path / "work")


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words, catch_exceptions=False)


def fused(pair: Pair, *words: str) -> dict[str, Any]:
    result = run(*pair.call, *words, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def verify(pair: Pair, *words: str) -> Result:
    return run("verify", str(pair.out), "--base", str(pair.base), "--adapter", str(pair.adapter), *words)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def expected(name: str, scale: float) -> torch.Tensor:
    site = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = lora()[f"{site}.lora_A.weight"].double(), lora()[f"{site}.lora_B.weight"].double()
    return llama()[name].double() + scale * b @ a


def test_json_has_the_fields_that_are_promised(pair: Pair) -> None:
    report = fused(pair)
    assert set(report) == {
        *("base", "adapter", "out", "format", "dry_run", "scale", "dtype", "tensors", "changed", "copied"),
        *("bytes_written", "files", "loss", "notes", "kernel", "seconds"),
    }
    assert set(report["loss"]) == {"ratio", "predicted", "measured", "elements"}
    assert (report["tensors"], len(report["changed"]), report["copied"]) == (21, 4, 17)
    proof = json.loads(verify(pair, "--json").stdout)
    assert set(proof) == {
        *(
            "verified",
            "out",
            "base",
            "adapter",
            "tensors",
            "recomputed",
            "bytes_compared",
            "files",
            "seconds",
        ),
    }
    assert proof["verified"] is True and proof["recomputed"] == 4


def test_summary_says_what_changed_and_what_to_do_next(pair: Pair) -> None:
    text = run(*pair.call).stdout
    for words in ("4 of 21 tensors", "17 bit for bit", "/s", "‖ΔW‖/‖W‖", "of the update (predicted", "next"):
        assert words in text, words
    command = text.partition("  next  ")[2].split()
    assert command[0] == "graft" and run(*command[1:]).exit_code == 0
    assert "4 tensors equal W + ΔW" in verify(pair).stdout


def test_scale(pair: Pair) -> None:
    fused(pair, "--scale", "0.5")
    assert torch.equal(tensors(pair.out)[Q1], expected(Q1, 0.5 * 2.0).to(torch.bfloat16))
    assert verify(pair).exit_code == 0


def test_dtype(pair: Pair) -> None:
    fused(pair, "--dtype", "fp32")
    found = tensors(pair.out)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert torch.equal(found[Q1], expected(Q1, 2.0).float())
    assert json.loads((pair.out / "config.json").read_text())["torch_dtype"] == "float32"
    assert verify(pair).exit_code == 0


def test_max_shard_size(pair: Pair) -> None:
    report = fused(pair, "--max-shard-size", "15kB")
    sizes = [p.stat().st_size for p in pair.out.glob("*.safetensors")]
    assert len(report["files"]) == len(sizes) == 3 and max(sizes) < 17_000
    index = json.loads((pair.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(pair.out).values())
    assert verify(pair).exit_code == 0


def test_threads_do_not_show(pair: Pair) -> None:
    fused(pair, "--threads", "1")
    one = {k: v for k, v in snapshot(pair.out).items() if k.endswith(".safetensors")}
    fused(pair, "--threads", "5", "--force")
    assert one == {k: v for k, v in snapshot(pair.out).items() if k.endswith(".safetensors")}


def test_dry_run_writes_nothing(pair: Pair) -> None:
    before = snapshot(pair.root)
    report = fused(pair, "--dry-run")
    assert report["dry_run"] is True and len(report["changed"]) == 4
    assert "would write" in run(*pair.call, "--dry-run").stdout
    assert snapshot(pair.root) == before


def test_dry_run_refuses_what_the_run_would(pair: Pair) -> None:
    edit_tensors(pair.weights, lambda t: t.pop(next(iter(t))))
    assert run(*pair.call, "--dry-run").exit_code == 2


def test_force_replaces_an_older_model(pair: Pair) -> None:
    fused(pair, "--scale", "0.5")
    fused(pair, "--force")
    assert torch.equal(tensors(pair.out)[Q1], expected(Q1, 2.0).to(torch.bfloat16))


def test_again(pair: Pair) -> None:
    fused(pair)
    pair.base, pair.out = pair.out, pair.root / "twice"
    refused = run(*pair.call)
    assert refused.exit_code == 2 and "--again" in refused.stderr
    fused(pair, "--again")
    once = expected(Q1, 2.0).to(torch.bfloat16).double()
    assert torch.equal(
        tensors(pair.out)[Q1], (once + expected(Q1, 2.0) - expected(Q1, 0.0)).to(torch.bfloat16)
    )


def test_adapter_config_from_elsewhere(pair: Pair) -> None:
    moved = pair.root / "my.json"
    pair.settings.rename(moved)
    fused(pair, "--adapter-config", str(moved))
    assert verify(pair, "--adapter-config", str(moved)).exit_code == 0


@pytest.mark.parametrize("choice", ["untie", "shared"])
def test_tied(choice: str, pair: Pair) -> None:
    edit_json(pair.base / "config.json", lambda c: c.update(tie_word_embeddings=True))
    edit_tensors(pair.shards[1], lambda t: t.pop("lm_head.weight"))
    edit_json(pair.index, lambda d: d["weight_map"].pop("lm_head.weight"))
    site = "base_model.model.lm_head"
    edit_tensors(
        pair.weights,
        lambda t: t.update(
            {f"{site}.lora_A.weight": torch.ones(4, 32), f"{site}.lora_B.weight": torch.ones(64, 4)}
        ),
    )
    refused = run(*pair.call)
    assert refused.exit_code == 2 and "--tied untie" in refused.stderr
    fused(pair, "--tied", choice)
    assert ("lm_head.weight" in tensors(pair.out)) == (choice == "untie")
    assert verify(pair).exit_code == 0


def test_loralib_with_alpha_and_enabled_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = loralib.MergedLinear(6, 12, r=3, lora_alpha=5, enable_lora=[True, False, True])
    torch.nn.init.normal_(layer.lora_B)
    model = torch.nn.ModuleDict({"qkv": layer})
    base, file, out = tmp_path / "base", tmp_path / "lora.pt", tmp_path / "out"
    base.mkdir()
    torch.save({"qkv.weight": layer.weight.detach().clone()}, base / "pytorch_model.bin")
    torch.save(loralib.lora_state_dict(model), file)
    (base / "config.json").write_text(json.dumps(CONFIG))
    words = ["fuse", str(base), str(file), "-o", str(out), "--alpha", "5"]
    refused = run(*words)
    assert refused.exit_code == 2 and "--enable-lora" in refused.stderr
    assert run(*words, "--enable-lora", "1,0,1").exit_code == 0
    layer.eval()
    assert torch.allclose(tensors(out)["qkv.weight"], layer.weight, atol=1e-6)
    assert run("verify", str(out), "--base", str(base), "--adapter", str(file)).exit_code == 0


def test_verify_names_what_differs(pair: Pair) -> None:
    fused(pair)
    edit_tensors(pair.out / pair.shards[1].name, lambda t: t[Q1][3, 4:5].add_(1))
    result = verify(pair)
    assert result.exit_code == 1 and result.stdout == ""
    assert Q1 in result.stderr and "norm" not in result.stderr


@pytest.mark.parametrize("part", ["config.json", "generation_config.json"])
def test_verify_sees_edited_files(part: str, pair: Pair) -> None:
    fused(pair)
    edit_json(pair.out / part, lambda c: c.update(edited=True))
    result = verify(pair)
    assert result.exit_code == 1 and part in result.stderr


def test_verify_sees_another_adapter(pair: Pair) -> None:
    fused(pair)
    edit_tensors(pair.weights, lambda t: next(iter(t.values())).mul_(1.5))
    assert verify(pair).exit_code == 1


def test_verify_sees_another_base(pair: Pair) -> None:
    fused(pair)
    edit_tensors(pair.shards[0], lambda t: t["model.embed_tokens.weight"][0].zero_())
    result = verify(pair)
    assert result.exit_code == 1 and "model.embed_tokens.weight" in result.stderr


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p.out / "graft.json").unlink(), "graft.json"),
        (lambda p: (p.out / "graft.json").write_text("{"), "graft.json"),
        (lambda p: edit_json(p.out / "graft.json", lambda d: d.update(version=99)), "99"),
        (lambda p: edit_json(p.out / "graft.json", lambda d: d["options"].update(scale="big")), "scale"),
        (lambda p: edit_json(p.out / "graft.json", lambda d: d["options"].update(dtype="int3")), "int3"),
        (lambda p: (p.out / p.shards[0].name).unlink(), "missing"),
        (lambda p: setattr(p, "out", p.root / "nowhere"), "nowhere"),
        (lambda p: setattr(p, "base", p.root / "nowhere"), "nowhere"),
    ],
)
def test_verify_of_what_cannot_be_read(damage: Any, says: str, pair: Pair) -> None:
    fused(pair)
    damage(pair)
    result = verify(pair)
    assert result.exit_code == 2 and says in result.stderr, result.stderr


def test_provenance_cannot_point_outside(pair: Pair) -> None:
    fused(pair)
    record = pair.out / "graft.json"
    edit_json(record, lambda d: d["output"]["files"].update({"../base/config.json": {"checksum": "0"}}))
    result = verify(pair)
    assert result.exit_code == 1 and "outside" in result.stderr


def test_inspect_tells_what_was_fused(pair: Pair) -> None:
    fused(pair)
    text = run("inspect", str(pair.out)).stdout
    assert "somebody/tiny-llama + adapter" in text
    assert json.loads(run("inspect", str(pair.out), "--json").stdout)["fused"]["graft"]


@pytest.mark.slow
def test_as_processes(pair: Pair) -> None:
    def graft(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "graft", *words]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    done = graft(*pair.call)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    again = graft(*pair.call)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "--force" in again.stderr
    (pair.out / "README.md").write_text("edited")
    proof = graft("verify", str(pair.out), "--base", str(pair.base), "--adapter", str(pair.adapter))
    assert proof.returncode == 1 and "README.md" in proof.stderr
