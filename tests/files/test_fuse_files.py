"""The main job from file to file: numbers, layouts of files, what is copied beside them."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch

from graft.errors import GraftError, OutputError, StateError
from graft.files import shards, stream
from graft.fuse_files import fuse
from graft.tensors import INDEX, open_checkpoint, save_file
from graft.verify_files import verify

from . import make

LINEAR = ["q_proj", "v_proj", "down_proj"]
SCALE = 7 / 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded bf16 base and a PEFT adapter on some of its Linear modules."""
    folder = tmp_path_factory.mktemp("pair")
    model = make.llama()
    make.save(model, folder / "base", max_shard_size=40000)
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "base" / "training_args.bin").write_bytes(b"x")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Base\n")
    make.peft(model, folder / "adapter", target_modules=LINEAR)
    return folder


def test_bits_layout_and_files(pair: Path, tmp_path: Path) -> None:
    report = fuse(pair / "base", pair / "adapter", tmp_path / "out")
    make.same_bits(
        make.tensors(tmp_path / "out"), make.linear_reference(pair / "base", pair / "adapter", SCALE)
    )
    assert report.tensors == 21 and len(report.changed) == 6 and report.copied == 15
    before, after = open_checkpoint(pair / "base"), open_checkpoint(tmp_path / "out")
    assert [h.raw for h in before.headers.values()] == [h.raw for h in after.headers.values()]
    assert len(after.headers) > 2, "the base must be sharded"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in after.entries.values())
    assert filecmp.cmp(pair / "base" / "config.json", tmp_path / "out" / "config.json", shallow=False)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not (tmp_path / "out" / "training_args.bin").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model_relation: " in card and "license: mit" in card and "# Base" not in card
    record = json.loads((tmp_path / "out" / "graft.json").read_text())
    assert set(record["changed"]) == set(report.changed)
    assert set(record["output"]["files"]) == {p.name for p in (tmp_path / "out").iterdir()} - {"graft.json"}
    assert report.loss is not None and report.loss.measured == pytest.approx(report.loss.predicted, rel=0.3)


@pytest.mark.parametrize(("threads", "chunk"), [(1, 4096), (3, 4096), (2, 8192), (4, 1 << 20)])
def test_threads_and_chunks_leave_no_trace(
    pair: Path, tmp_path: Path, threads: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream.stream, "__kwdefaults__", {**stream.stream.__kwdefaults__, "chunk": chunk})
    fuse(pair / "base", pair / "adapter", tmp_path / "out", threads=threads)
    make.same_bits(
        make.tensors(tmp_path / "out"), make.linear_reference(pair / "base", pair / "adapter", SCALE)
    )
    verify(tmp_path / "out", pair / "base", pair / "adapter", threads=threads)


@pytest.mark.parametrize("kernel", ["c", "torch"])
def test_the_kernel_and_torch_write_the_same_files(pair: Path, tmp_path: Path, kernel: str) -> None:
    import os
    import subprocess
    import sys

    if kernel == "c":
        from graft import kernel as compiled

        if compiled.status() != "c":
            pytest.skip("no C compiler here")
    call = "import sys, pathlib, graft.fuse_files as f; f.fuse(*map(pathlib.Path, sys.argv[1:]))"
    words = [str(pair / "base"), str(pair / "adapter"), str(tmp_path / "out")]
    subprocess.run(
        [sys.executable, "-c", call, *words], check=True, env={**os.environ, "GRAFT_KERNEL": kernel}
    )
    make.same_bits(
        make.tensors(tmp_path / "out"), make.linear_reference(pair / "base", pair / "adapter", SCALE)
    )


@pytest.mark.parametrize("direct", [True, False])
def test_plain_writes_where_direct_ones_are_refused(
    pair: Path, tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if direct:
        write = stream.write_all

        def refuse(fd: int, view: memoryview, at: int) -> None:
            import errno
            import fcntl
            import os

            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "not here")
            write(fd, view, at)

        monkeypatch.setattr(stream, "write_all", refuse)
    else:
        monkeypatch.delattr("os.O_DIRECT", raising=False)
    fuse(pair / "base", pair / "adapter", tmp_path / "out")
    make.same_bits(
        make.tensors(tmp_path / "out"), make.linear_reference(pair / "base", pair / "adapter", SCALE)
    )


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dtype(pair: Path, tmp_path: Path, name: str) -> None:
    fuse(pair / "base", pair / "adapter", tmp_path / "out", dtype=name)
    dtype = getattr(torch, name)
    make.same_bits(
        make.tensors(tmp_path / "out"), make.linear_reference(pair / "base", pair / "adapter", SCALE, dtype)
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == name
    verify(tmp_path / "out", pair / "base", pair / "adapter")


@pytest.mark.parametrize("limit", [1, 5000, 10**9])
def test_max_shard_size(pair: Path, tmp_path: Path, limit: int) -> None:
    report = fuse(pair / "base", pair / "adapter", tmp_path / "out", max_shard_size=limit)
    make.same_bits(
        make.tensors(tmp_path / "out"), make.linear_reference(pair / "base", pair / "adapter", SCALE)
    )
    opened = open_checkpoint(tmp_path / "out")
    assert len(report.files) == {1: 21, 5000: len(report.files), 10**9: 1}[limit]
    for name in report.files:
        held = [e.nbytes for e in opened.headers[name].entries]
        assert sum(held) <= limit or len(held) == 1
    verify(tmp_path / "out", pair / "base", pair / "adapter")


@pytest.mark.parametrize("scale", [-1.0, 0.5, 0.0])
def test_scale(pair: Path, tmp_path: Path, scale: float) -> None:
    fuse(pair / "base", pair / "adapter", tmp_path / "out", scale=scale)
    reference = make.linear_reference(pair / "base", pair / "adapter", SCALE * scale)
    make.same_bits(make.tensors(tmp_path / "out"), reference)
    verify(tmp_path / "out", pair / "base", pair / "adapter")


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_base(pair: Path, tmp_path: Path, sharded: bool) -> None:
    held = make.tensors(pair / "base")
    held["model.layers.0.self_attn.q_proj.weight"] = (
        held["model.layers.0.self_attn.q_proj.weight"].T.contiguous().T
    )
    base = tmp_path / "base"
    base.mkdir()
    names = list(held)
    if sharded:
        parts = [names[:8], names[8:]]
        files = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
        for file, part in zip(files, parts, strict=True):
            torch.save({n: held[n] for n in part}, base / file)
        weight_map = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(held, base / "pytorch_model.bin")
    report = fuse(base, pair / "adapter", tmp_path / "out")
    assert report.files == (
        [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)] if sharded else ["model.safetensors"]
    )
    make.same_bits(
        make.tensors(tmp_path / "out"), make.linear_reference(pair / "base", pair / "adapter", SCALE)
    )
    verify(tmp_path / "out", base, pair / "adapter")


def test_unaligned_tensors(tmp_path: Path) -> None:
    """A tensor of odd length before bf16 data: elements lie across chunk borders, none is torn."""
    torch.manual_seed(0)
    weight = torch.randn(100, 64, dtype=torch.bfloat16)
    odd = torch.arange(4093, dtype=torch.uint8)
    (tmp_path / "base").mkdir()
    save_file({"odd": odd, "m.q_proj.weight": weight}, tmp_path / "base" / "model.safetensors")
    _plain_adapter(tmp_path / "adapter", {"m.q_proj": (100, 64)})
    for chunk in (4096, 8192):
        out = tmp_path / f"out{chunk}"
        stream_chunk = dict(stream.stream.__kwdefaults__)
        stream.stream.__kwdefaults__["chunk"] = chunk
        try:
            fuse(tmp_path / "base", tmp_path / "adapter", out)
        finally:
            stream.stream.__kwdefaults__.update(stream_chunk)
        make.same_bits(make.tensors(out), make.linear_reference(tmp_path / "base", tmp_path / "adapter", 2.0))


def _plain_adapter(
    folder: Path, modules: dict[str, tuple[int, int]], rank: int = 4, size: float = 0.1
) -> None:
    folder.mkdir()
    torch.manual_seed(1)
    held: dict[str, torch.Tensor] = {}
    for name, (o, i) in modules.items():
        held[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, i) * size
        held[f"base_model.model.{name}.lora_B.weight"] = torch.randn(o, rank) * size
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_overflow_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weight = torch.full((8, 8), 65000.0, dtype=torch.float16)
    save_file({"m.q_proj.weight": weight}, tmp_path / "base" / "model.safetensors")
    _plain_adapter(tmp_path / "adapter", {"m.q_proj": (8, 8)}, size=20.0)
    with pytest.raises(StateError, match=r"m\.q_proj\.weight.*--dtype bfloat16"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")


def test_a_large_base_cast_to_fp16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    held = {"m.q_proj.weight": torch.zeros(8, 8), "m.big": torch.full((3,), 1e6)}
    save_file(held, tmp_path / "base" / "model.safetensors")
    _plain_adapter(tmp_path / "adapter", {"m.q_proj": (8, 8)})
    with pytest.raises(StateError, match=r"m\.big \(3 elements\)"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float16")


def test_dry_run_writes_nothing(pair: Path, tmp_path: Path) -> None:
    report = fuse(pair / "base", pair / "adapter", tmp_path / "out", dry_run=True)
    assert report.dry_run and len(report.changed) == 6 and report.loss is not None
    assert list(tmp_path.iterdir()) == []


def test_the_same_adapter_twice_is_refused(pair: Path, tmp_path: Path) -> None:
    fuse(pair / "base", pair / "adapter", tmp_path / "once")
    with pytest.raises(OutputError, match="already holds this adapter"):
        fuse(tmp_path / "once", pair / "adapter", tmp_path / "twice")
    fuse(tmp_path / "once", pair / "adapter", tmp_path / "twice", again=True)
    record = json.loads((tmp_path / "twice" / "graft.json").read_text())
    assert len(record["fused"]) == 2


@pytest.mark.parametrize("where", ["base", "base/out", "adapter", ""])
def test_an_output_that_shares_files_with_an_input(pair: Path, where: str) -> None:
    with pytest.raises(OutputError, match="share files"):
        fuse(pair / "base", pair / "adapter", pair / where, force=True)


def test_a_full_disk_is_seen_before(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OutputError, match="free"):
        fuse(pair / "base", pair / "adapter", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"scale": float("nan")}, {"max_shard_size": 0}])
def test_bad_options(pair: Path, tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(GraftError, match=next(iter(options))):
        fuse(pair / "base", pair / "adapter", tmp_path / "out", **options)  # type: ignore[arg-type]


def test_a_base_that_shrinks_meanwhile(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = shards.OpenFile.read

    def short(self: shards.OpenFile, at: int, into: torch.Tensor) -> None:
        read(self, at + (1 << 40), into)

    monkeypatch.setattr(shards.OpenFile, "read", short)
    with pytest.raises(GraftError, match="became shorter"):
        fuse(pair / "base", pair / "adapter", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_bytes(pair: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = fuse(pair / "base", pair / "adapter", tmp_path / "out", progress=lambda *x: seen.append(x))
    assert seen[-1] == (report.bytes_written, report.bytes_written)


def test_a_hub_id_that_cannot_be_had(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network and not in the cache\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(GraftError, match="some/model is not a directory here and cannot be had") as caught:
        fuse("some/model", pair / "adapter", tmp_path / "out")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(pair / "base"))
    report = fuse("some/model", pair / "adapter", tmp_path / "out")
    assert report.base == "some/model"
    assert '"some/model"' in (tmp_path / "out" / "README.md").read_text()


def test_parts_of_a_sentence_encoder_are_copied(pair: Path, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(pair / "base", base)
    for folder in ("1_Pooling", "2_Dense", "onnx", "checkpoint-5"):
        (base / folder).mkdir()
        (base / folder / "config.json").write_text("{}")
    for folder in ("2_Dense", "onnx", "checkpoint-5"):
        (base / folder / "model.safetensors").write_bytes(b"w")
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    fuse(base, pair / "adapter", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["1_Pooling", "2_Dense"]
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == b"w"
    verify(tmp_path / "out", base, pair / "adapter")
