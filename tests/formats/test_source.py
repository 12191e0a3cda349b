"""What the user names → the one adapter in it: companions, containers, directories with several files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.bind import bind
from graft.errors import BaseMismatchError, FormatError
from graft.formats import CONTAINERS, Source, read, write
from graft.formats.container import Opened, TensorFile, begins
from graft.formats.model_facts import model_facts
from graft.formats.source import find_source, open_source

from .carrying import MODEL, SHAPES, assert_same_update, plain


def opened(path: Path, config: Path | None = None) -> Source:
    return open_source(path, TensorFile(), config)


def test_companions_are_read_by_name_and_recorded(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors", {"about": "it"})
    (tmp_path / "params.json").write_text('{"lora": {"rank": 8}}')
    (tmp_path / "run_config.yaml").write_text("peft:\n  dim: 4\n")
    source = opened(tmp_path / "w.safetensors")
    assert source.metadata == {"about": "it"} and source.kind == "tensors" and source.config is None
    assert source.settings("other.json", "params.json") == {"lora": {"rank": 8}}
    assert source.settings("run_config.yaml") == {"peft": {"dim": 4}}
    assert source.files == tuple(tmp_path / n for n in ("w.safetensors", "params.json", "run_config.yaml"))


def test_a_named_configuration_stands_for_any(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "mine.yml").write_text("a: 1\n")
    source = opened(tmp_path / "w.safetensors", tmp_path / "mine.yml")
    assert source.settings("params.json") == source.config == {"a": 1}
    assert source.files[1:] == (tmp_path / "mine.yml",)


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", "!!python/object/apply:os.getcwd []\n"])
def test_odd_yaml_is_refused(text: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(FormatError, match=r"c\.yaml"):
        opened(tmp_path / "w.safetensors").settings("c.yaml")


def test_the_adapter_among_several_files_is_told_by_content(tmp_path: Path) -> None:
    write(plain(), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "step-9.safetensors")
    torch.save({"state": {0: {"step": 1}}}, tmp_path / "a" / "optimizer.pt")
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "a" / "other.safetensors")
    adapter = bind(read(tmp_path / "a"), SHAPES, config=MODEL)
    assert_same_update(plain(), adapter, rounded=False)
    assert adapter.files == (tmp_path / "a/step-9.safetensors", tmp_path / "a/adapter_config.json")


def test_several_adapters_are_named(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"m.lora_A": torch.ones(1, 2), "m.lora_B": torch.ones(3, 1)}, tmp_path / name)
    with pytest.raises(FormatError, match=r"several adapters \(one\.safetensors, two\.safetensors\)"):
        read(tmp_path, alpha=1)


class Boxed:
    """A container of its own: eight magic bytes, then a json of numbers."""

    def holds(self, path: Path) -> bool:
        return path.is_file() and begins(path, 4) == b"BOX!"

    def open(self, path: Path) -> Opened:
        found = {k: torch.tensor(v) for k, v in json.loads(path.read_bytes()[4:]).items()}
        return Opened(path, (path.parent,), (path,), "boxed", found, {"alpha": 2.5})


@pytest.mark.parametrize("name", ["adapter.gguf", "no-suffix"])
def test_a_container_is_told_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"BOX!" + json.dumps({"m.lora_A": [[1.0]]}).encode())
    source = find_source(path, (Boxed(), *CONTAINERS), lambda _: True)
    assert (source.kind, source.metadata, list(source.tensors)) == ("boxed", {"alpha": 2.5}, ["m.lora_A"])
    if name.endswith("gguf"):
        assert find_source(tmp_path, (Boxed(), *CONTAINERS), lambda _: True).kind == "boxed"


def flattened(change: Callable[[str], str] = lambda name: name):
    adapter = plain()
    sites = {}
    for name, site in adapter.sites.items():
        module, _, leaf = change(name).rpartition(".")
        sites[f"{module.replace('.', '_')}.{leaf}"] = replace(site, layout=None, shape=None)
    return replace(adapter, sites=sites, flattened=True)


@pytest.mark.parametrize("cut", ["", "model.", "model.layers."])
def test_flattened_names_are_spelled_out_by_the_base(cut: str) -> None:
    bound = bind(flattened(lambda name: name.removeprefix(cut)), SHAPES, config=MODEL)
    assert_same_update(plain(), bound, rounded=False)
    assert not bound.flattened and any("prefix" in note for note in bound.notes) == bool(cut)


def test_flattened_names_that_the_base_does_not_settle_are_refused() -> None:
    ambiguous = {**SHAPES, "model.layers.0.self_attn.q.proj.weight": (32, 16)}
    with pytest.raises(BaseMismatchError, match=r"may be any of .*q_proj\.weight, .*q\.proj\.weight"):
        bind(flattened(), ambiguous, config=MODEL)
    with pytest.raises(BaseMismatchError, match=r"q_prod\.weight is none; nearest: .*q_proj\.weight"):
        bind(flattened(lambda name: name.replace("q_proj", "q_prod")), SHAPES, config=MODEL)
    two = {f"{tower}.{name}": shape for tower in ("a", "b") for name, shape in SHAPES.items()}
    with pytest.raises(BaseMismatchError, match=r"2 prefixes \(a_, b_\)"):
        bind(flattened(), two, config=MODEL)


def test_flattened_names_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="--base"):
        write(replace(plain(), flattened=True), tmp_path / "a")


def test_model_facts() -> None:
    facts = model_facts(MODEL, "x")
    assert (facts.heads, facts.kv_heads, facts.head_dim, facts.layers, facts.per_group) == (4, 2, 8, 3, 2)
    gpt2 = model_facts({"n_head": 4, "n_embd": 32, "n_layer": 2, "model_type": "gpt2"}, "x")
    assert (gpt2.heads, gpt2.kv_heads, gpt2.head_dim, gpt2.layers) == (4, 4, 8, 2)
    assert model_facts({"text_config": MODEL}, "x") == facts
    with pytest.raises(FormatError, match=r"x needs the base.*--base"):
        model_facts(None, "x")
    with pytest.raises(FormatError, match="num_attention_heads"):
        model_facts({"hidden_size": 3}, "x")


def test_both_of_peft_s_files_are_one_adapter_if_they_hold_the_same(tmp_path: Path) -> None:
    write(plain(), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
    adapter = bind(read(tmp_path / "a"), SHAPES, config=MODEL)
    assert_same_update(plain(), adapter, rounded=False)
    assert any("adapter_model.bin holds the same" in note for note in adapter.notes)
    name = next(iter(tensors))
    for other in (
        {**tensors, name: tensors[name] + 1},
        {**tensors, name: tensors[name].double()},
        {name: tensors[name]},
    ):
        torch.save(other, tmp_path / "a" / "adapter_model.bin")
        with pytest.raises(FormatError, match="which may differ"):
            read(tmp_path / "a")


def test_weights_beside_the_adapter_are_said(tmp_path: Path) -> None:
    """LLaVA's training leaves its projector there; a trainer's own states are no weights."""
    write(plain(), tmp_path / "a")
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin"):
        torch.save({}, tmp_path / "a" / name)
    assert not any("beside" in note for note in read(tmp_path / "a").notes)
    torch.save({"x": torch.ones(1)}, tmp_path / "a" / "non_lora_trainables.bin")
    assert any("non_lora_trainables.bin. Weights" in note for note in read(tmp_path / "a").notes)


def test_folders_that_hold_adapters_are_named(tmp_path: Path) -> None:
    for name in ("default", "other"):
        write(plain(), tmp_path / "a" / name)
    with pytest.raises(FormatError, match="in its folders default, other: name one"):
        read(tmp_path / "a")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_the_name_of_safetensors_is_read_as_what_it_is(zipped: bool, tmp_path: Path) -> None:
    write(plain(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    assert_same_update(plain(), bind(read(tmp_path / "a"), SHAPES, config=MODEL), rounded=False)
    torch.save({"model": Opened}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match="could run code"):
        read(tmp_path / "a")
