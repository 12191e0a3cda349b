"""Weight files: headers, mapped loading, shards, model directories, and refusals that say what to do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft import tensors
from graft.errors import FormatError
from graft.safetensors_header import CODES, DTYPES, build_header, read_header

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
PLAIN = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape) * 9).to(dtype)


def raw(table: object, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(PLAIN)), max_size=5)
)
@settings(max_examples=40)
def test_files_agree_with_the_safetensors_library(tmp_path_factory: pytest.TempPathFactory, spec) -> None:
    spec.pop("__metadata__", None)
    folder = tmp_path_factory.mktemp("st")
    held = {name: _filled(shape, dtype) for name, (shape, dtype) in spec.items()}
    tensors.save_file(held, folder / "ours.safetensors", {"format": "pt"})
    safetensors.torch.save_file(held, folder / "theirs.safetensors", {"format": "pt"})
    for got in (
        tensors.load_file(folder / "theirs.safetensors"),
        tensors.load_file(folder / "ours.safetensors"),
        safetensors.torch.load_file(folder / "ours.safetensors"),
    ):
        assert got.keys() == held.keys()
        for name, tensor in held.items():
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)
    assert tensors.metadata(folder / "ours.safetensors") == {"format": "pt"}


def test_every_dtype_of_the_library_is_known() -> None:
    assert set(CODES.values()) == set(DTYPES) and len(DTYPES) >= 17
    assert {DTYPES["F8_E8M0"], DTYPES["U16"], DTYPES["C64"]} <= set(CODES)


def test_unaligned_data_are_read(tmp_path: Path) -> None:
    data = torch.randn(3).numpy().tobytes()
    table = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    (tmp_path / "x.safetensors").write_bytes(raw(table, b"\x07" + data))
    got = tensors.load_file(tmp_path / "x.safetensors")
    assert got["b"].numpy().tobytes() == data and got["a"].item() == 7


def test_strided_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors.save_file({"t": base.T, "s": base[::2, 1:3]}, tmp_path / "x.safetensors")
    got = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert torch.equal(got["t"], base.T) and torch.equal(got["s"], base[::2, 1:3])


ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
DATA = b"12345678"
BAD_FILES = {
    "empty": (b"", "empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "tiny": (b"\x01\x02", "not a safetensors file"),
    "page": (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
    "cut header": (raw(ONE)[:20], "truncated"),
    "cut data": (raw(ONE, b"1234"), "truncated"),
    "long data": (raw(ONE, b"123456789"), "1 bytes after the last tensor"),
    "no json": (raw(b"{nope}"), "no JSON"),
    "not utf-8": (raw(b"\xff\xfe{}"), "no JSON"),
    "list": (raw([1]), "no JSON object"),
    "twice": (raw(b'{"a": {}, "a": {}}'), "occurs twice"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "dtype": (raw({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, DATA), "'F31'"),
    "shape": (raw({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, DATA), "no valid shape"),
    "size": (raw({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, DATA), "needs 12 bytes"),
    "hole": (raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"12"), "hole"),
    "overlap": (raw({**ONE, "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, DATA), "overlaps"),
    "none": (raw({"a": None}), "no description"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_safetensors(tmp_path: Path, name: str) -> None:
    content, said = BAD_FILES[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        tensors.load_file(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("ran",)


def _pickles() -> dict[str, tuple[object, str]]:
    return {
        "evil": (Evil(), "more than tensors"),
        "list": ([1], "not a dict"),
        "nested": ({"model": {"a": torch.ones(1)}}, "state dict alone"),
    }


@pytest.mark.parametrize("name", _pickles())
def test_bad_pickles(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    value, said = _pickles()[name]
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(FormatError, match=said):
        tensors.load_file(tmp_path / "x.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(value))
    with pytest.raises(FormatError):
        tensors.load_file(tmp_path / "plain.bin")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x80\x02", b"version https://git-lfs.github.com/spec/v1"]
)
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.bin"):
        tensors.load_file(tmp_path / "x.bin")


def test_bin_files_zip_and_legacy(tmp_path: Path) -> None:
    held = {"a": torch.randn(3, 4, dtype=torch.bfloat16), "n": torch.arange(4)}
    torch.save(held, tmp_path / "new.bin")
    torch.save(held, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for file in ("new.bin", "old.bin"):
        got = tensors.load_file(tmp_path / file)
        assert got.keys() == held.keys() and all(torch.equal(got[n], t) for n, t in held.items())


def _items(held: dict[str, torch.Tensor]) -> list[tensors.Item]:
    return [(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in held.items()]


@pytest.mark.parametrize("limit", [None, 1, 100, 400])
def test_shards_and_index(tmp_path: Path, limit: int | None) -> None:
    held = {f"layer.{n}": torch.randn(n + 1, 3) for n in range(9)}
    told = tensors.write_shards(tmp_path, _items(held), max_shard_size=limit)
    opened = tensors.open_checkpoint(tmp_path)
    assert list(opened.entries) == list(held)
    assert all(torch.equal(opened.read(n), t) for n, t in held.items())
    total = sum(t.numel() * 4 for t in held.values())
    assert told["total_size"] == total
    if limit is None:
        assert told["files"] == ["model.safetensors"] and not (tmp_path / tensors.INDEX).exists()
    else:
        index = json.loads((tmp_path / tensors.INDEX).read_text())
        assert index["metadata"]["total_size"] == total and index["weight_map"] == told["weight_map"]


def test_transformers_reads_our_shards(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    model = LlamaForCausalLM(config)
    tensors.write_shards(tmp_path, _items(dict(model.state_dict())), max_shard_size=4000)
    config.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


def _model(folder: Path) -> Path:
    tensors.write_shards(folder, _items({"a": torch.ones(4), "b": torch.zeros(4)}), max_shard_size=16)
    return folder


def _edit_index(folder: Path, **changes: object) -> None:
    path = folder / tensors.INDEX
    table = json.loads(path.read_text())
    table["weight_map"].update(changes)
    path.write_text(json.dumps({**table, "weight_map": {k: v for k, v in table["weight_map"].items() if v}}))


FIRST = "model-00001-of-00002.safetensors"
BROKEN_MODELS = {
    "missing shard": (lambda f: (f / FIRST).unlink(), "is missing"),
    "parent": (lambda f: _edit_index(f, b="../b.safetensors"), "outside the folder"),
    "absolute": (lambda f: _edit_index(f, b="/tmp/b.safetensors"), "outside the folder"),
    "number": (lambda f: _edit_index(f, b=3), "shard 3 is missing"),
    "wrong shard": (lambda f: _edit_index(f, b=FIRST), "b is not in model-00001"),
    "ghost": (lambda f: _edit_index(f, ghost=FIRST), "ghost is not in"),
    "not indexed": (lambda f: _edit_index(f, b=None, c="model-00002-of-00002.safetensors"), "nothing of it"),
    "no map": (lambda f: (f / tensors.INDEX).write_text("{}"), "no weight_map"),
    "no json": (lambda f: (f / tensors.INDEX).write_text("{"), "not valid JSON"),
    "bad config": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "nothing": (lambda f: (f / tensors.INDEX).unlink(), "holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models(tmp_path: Path, name: str) -> None:
    damage, said = BROKEN_MODELS[name]
    damage(_model(tmp_path))
    with pytest.raises(FormatError, match=said):
        tensors.open_checkpoint(tmp_path)


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="BASE ADAPTER"):
        tensors.open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match="does not exist"):
        tensors.open_checkpoint(tmp_path / "none")


def test_header_keeps_order_and_pads() -> None:
    raw_header = build_header([("b", (2,), torch.float32), ("a", (), torch.uint8)])
    assert len(raw_header) % 8 == 0
    assert list(json.loads(raw_header[8:])) == ["b", "a"]


def test_symlinked_shards_are_followed(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    tensors.save_file({"a": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert torch.equal(tensors.open_checkpoint(tmp_path / "snapshot").read("a"), torch.ones(2))
    assert read_header(tmp_path / "blob").entries[0].name == "a"
