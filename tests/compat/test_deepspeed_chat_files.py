"""What save_hf_format and save_zero_three_model write, in one process; tests/dist does it under real ZeRO."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graft
from graft.compat import deepspeed_chat as dschat
from graft.compat.deepspeed_chat import saving
from tests.compat.dschat_reference import model
from tests.compat.test_deepspeed_chat import bits, converted

NAME = "pytorch_model.bin"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / NAME, weights_only=True)


def args(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(output_dir=str(folder), rank=4, names=["a", ("b", 2.5)], kind=signal.SIGINT)


class Words:
    """The least of a tokenizer, as slow ones were."""

    def save_vocabulary(self, folder: str) -> None:
        Path(folder, "vocab.txt").write_text("a b c")


@pytest.mark.parametrize("save", ["hf", "zero"])
def test_a_fused_model_is_saved_as_the_plain_one(save: str, tmp_path: Path, capsys: Any) -> None:
    m = converted()
    want = dict(model().state_dict())
    for name, layer in m.named_modules():
        if isinstance(layer, dschat.LinearLayer_LoRA):
            layer.fuse_lora_weight()
            want[f"{name}.weight"] = layer.weight.detach().clone()
    if save == "hf":
        dschat.save_hf_format(m, Words(), args(tmp_path), "epoch-0")
    else:
        dschat.save_zero_three_model(m, 0, str(tmp_path), zero_stage=2, sub_folder="epoch-0")
    got = stored(tmp_path / "epoch-0")
    assert list(got) == list(want) and "layers.0.flora_gate.weight" in got and "seen" in got
    assert all(torch.equal(got[n], t) for n, t in want.items())
    assert got["head.weight"].data_ptr() == got["embed.weight"].data_ptr(), "tied weights are stored once"
    assert (tmp_path / "epoch-0" / NAME).stat().st_size < sum(4 * t.numel() for t in got.values()) + 12_000
    model().load_state_dict(got, strict=True)
    assert "apart" not in capsys.readouterr().out
    dschat.unfuse_lora(m)
    assert bits(m) == bits(converted())


def test_of_a_model_that_is_not_fused_nothing_is_lost(tmp_path: Path, capsys: Any) -> None:
    m = converted()
    dschat.save_zero_three_model(m, 0, tmp_path)
    again = dschat.convert_linear_layer_to_lora(model(), "layers.", 3)
    again.load_state_dict(stored(tmp_path), strict=True)
    assert bits(again) == bits(m)
    assert "W and the factors apart" in capsys.readouterr().out


def test_a_view_into_a_large_buffer_is_stored_alone(tmp_path: Path) -> None:
    """DeepSpeed's stages 1 and 2 keep all parameters in one flat buffer."""
    m = nn.Linear(4, 4)
    flat = torch.randn(100_000)
    m.weight.data = flat[:16].view(4, 4)
    dschat.save_zero_three_model(m, 0, tmp_path)
    assert torch.equal(stored(tmp_path)["weight"], m.weight) and (tmp_path / NAME).stat().st_size < 5_000


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    dschat.save_zero_three_model(converted(), 1, tmp_path / "out", zero_stage=3)
    assert not (tmp_path / "out").exists()


def test_transformers_loads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    m = transformers.LlamaForCausalLM(config)
    dschat.convert_linear_layer_to_lora(m, "model.layers.", 2)
    for name, p in m.named_parameters():
        if name.endswith("lora_left_weight"):
            nn.init.normal_(p)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(19)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    dschat.fuse_lora(m)
    dschat.save_hf_format(m, tokenizer, args(tmp_path), sub_folder="final")
    ids = torch.arange(8).view(1, 8)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(loaded(ids).logits, m.eval()(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "final").convert_tokens_to_ids("w7") == 7
    assert not [p for p in (tmp_path / "final").iterdir() if p.name.startswith(".")]


def test_a_model_without_config_gets_its_arguments(tmp_path: Path, capsys: Any) -> None:
    class Kind(str, Enum):
        COSINE = "cosine"

    given = args(tmp_path)
    given.scheduler = Kind.COSINE
    dschat.save_hf_format(model(), Words(), given)
    assert "has no config" in capsys.readouterr().out
    kept = torch.load(tmp_path / "train_args.pt", weights_only=True)
    assert kept == {
        "output_dir": str(tmp_path), "rank": 4, "names": ["a", ["b", 2.5]], "kind": str(signal.SIGINT),
        "scheduler": str(Kind.COSINE),
    }  # fmt: skip
    assert (tmp_path / "vocab.txt").read_text() == "a b c"


def test_a_tokenizer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(graft.OutputError, match="NoneType has neither save_pretrained"):
        dschat.save_hf_format(model(), None, args(tmp_path / "new"), "a")
    assert not list(tmp_path.iterdir())


def _full(values: Any, path: Path) -> None:
    path.write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file: no space left on device")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", _full)
    with pytest.raises(graft.OutputError, match="nothing was kept"):
        dschat.save_zero_three_model(model(), 0, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    dschat.save_zero_three_model(model(), 0, tmp_path)
    before = (tmp_path / NAME).read_bytes()
    monkeypatch.setattr(torch, "save", _full)
    with pytest.raises(graft.OutputError):
        dschat.save_hf_format(model(), Words(), args(tmp_path))
    assert (tmp_path / NAME).read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [NAME]


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(graft.OutputError, match="is not a directory"):
        dschat.save_zero_three_model(model(), 0, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL")
def test_a_killed_save_leaves_no_file_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        import torch
        from graft.compat.deepspeed_chat import save_zero_three_model

        def killed(values, path):
            Path(path).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = killed
        save_zero_three_model(torch.nn.Linear(2, 2), 0, sys.argv[1])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], env=os.environ, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.is_dir() and left.name.startswith(".")
    dschat.save_zero_three_model(model(), 0, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_the_names_of_the_files() -> None:
    assert (saving.WEIGHTS_NAME, saving.CONFIG_NAME, saving.ARGS_NAME) == (
        NAME,
        "config.json",
        "train_args.pt",
    )


def test_grafts_file_of_the_format_is_the_factors(tmp_path: Path) -> None:
    m = converted(lora_scaling=2)
    graft.save(m, tmp_path / "lora.bin", format="deepspeed-chat", trained=False)
    tensors = torch.load(tmp_path / "lora.bin", weights_only=True)
    again = dschat.convert_linear_layer_to_lora(model(), "layers.", 3, 2)
    missing, unexpected = again.load_state_dict(tensors, strict=False)
    assert not unexpected and not [n for n in missing if "lora_" in n.rpartition(".")[2]]
    assert bits(again) == bits(m)
