"""The table of bad inputs: what is damaged, and what the one message must say."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .pairs import (
    HIDDEN,
    PREFIX,
    Q0,
    RANK,
    SHARDS,
    Pair,
    edit_header,
    edit_json,
    edit_tensors,
    llama,
    lora,
    write_header,
    write_shards,
)

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1048576\n"
SITE0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
A0, B0 = f"{SITE0}.lora_A.weight", f"{SITE0}.lora_B.weight"


@dataclass(frozen=True)
class Case:
    """A valid pair, damaged by ``damage``, must be refused with a message that matches ``says``."""

    name: str
    damage: Callable[[Pair], object]
    says: str


class Evil:
    """A pickle that would write a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


def settings(**changes: Any) -> Callable[[Pair], None]:
    """Change adapter_config.json; a value of ``...`` removes the key."""

    def edit(config: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is ...:
                del config[key]
            else:
                config[key] = value

    return lambda pair: edit_json(pair.settings, edit)


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Pair], None]:
    """Change the adapter's tensors."""
    return lambda pair: edit_tensors(pair.weights, edit)


def rename(change: Callable[[str], str]) -> Callable[[Pair], None]:
    """Rename every tensor of the adapter."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {change(name): t for name, t in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return weights(edit)


def replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Pair], None]:
    """Replace one tensor of the adapter."""
    return weights(lambda t: t.__setitem__(name, make(t[name])))


def shard(edit: Callable[[dict[str, torch.Tensor]], object], n: int = 0) -> Callable[[Pair], None]:
    """Change the tensors of one shard of the base."""
    return lambda pair: edit_tensors(pair.shards[n], edit)


def header(edit: Callable[[dict[str, Any]], object]) -> Callable[[Pair], None]:
    """Change the header of the base's first shard."""
    return lambda pair: edit_header(pair.shards[0], edit)


def index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Pair], None]:
    """Change the base's index."""
    return lambda pair: edit_json(pair.index, edit)


def args(*words: str) -> Callable[[Pair], None]:
    """Add arguments to the call."""
    return lambda pair: pair.args.extend(words)


def out(place: Callable[[Pair], Path], *words: str) -> Callable[[Pair], None]:
    """Put OUT somewhere else."""

    def damage(pair: Pair) -> None:
        pair.out = place(pair)
        pair.args.extend(words)

    return damage


def both(*damages: Callable[[Pair], object]) -> Callable[[Pair], None]:
    """Several damages, one after the other."""

    def damage(pair: Pair) -> None:
        for each in damages:
            each(pair)

    return damage


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def _file(path: Path, text: str = "not a folder") -> Path:
    path.write_text(text)
    return path


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def _first(data: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in data.items() if k != "__metadata__")


def _swap_offsets(data: dict[str, Any]) -> None:
    names = [k for k in data if k != "__metadata__" and data[k]["shape"] == [HIDDEN, HIDDEN]]
    data[names[0]]["data_offsets"] = data[names[1]]["data_offsets"]


def _two_of_one_name(pair: Pair) -> None:
    edit_tensors(pair.shards[1], lambda t: t.__setitem__(Q0, llama()[Q0] + 1))


def _twice_in_header(pair: Pair) -> None:
    data = torch.zeros(2).numpy().tobytes()
    one = '"w":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    text = "{" + one % (0, 4) + "," + one % (4, 8) + "}"
    pair.index.unlink()
    for file in pair.shards:
        file.unlink()
    write_header(pair.base / "model.safetensors", text.encode(), data)


def _other_model(pair: Pair) -> None:
    names = {n: n.replace("model.layers", "transformer.h").replace("self_attn", "attn") for n in llama()}
    write_shards(pair, {names[n]: t for n, t in llama().items()})


def _wider_model(pair: Pair) -> None:
    wide = {n: torch.zeros([2 * s for s in t.shape], dtype=t.dtype) for n, t in llama().items()}
    write_shards(pair, wide)


def _evil_base(pair: Pair) -> None:
    for file in (*pair.shards, pair.index):
        file.unlink()
    torch.save({Q0: torch.zeros(2), "x": Evil(pair.root / "executed")}, pair.base / "pytorch_model.bin")


def _evil_adapter(pair: Pair) -> None:
    pair.weights.unlink()
    torch.save({A0: torch.zeros(2), "x": Evil(pair.root / "executed")}, pair.adapter / "adapter_model.bin")


def _loralib(pair: Pair) -> None:
    for file in (pair.weights, pair.settings):
        file.unlink()
    pair.adapter.rmdir()
    kept = {n.removeprefix(PREFIX).removesuffix(".weight"): t for n, t in lora().items()}
    torch.save(kept, pair.adapter)


def _fused_before(pair: Pair) -> None:
    from graft.fuse_files import fuse

    once = pair.root / "once"
    fuse(pair.base, pair.adapter, once)
    pair.base = once


def _in_dtype(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q0] = torch.zeros(HIDDEN, HIDDEN).to(dtype)

    return edit


def _overflow(pair: Pair) -> None:
    write_shards(pair, llama(torch.float16))
    edit_tensors(pair.weights, lambda t: t.update({A0: t[A0] * 1e4, B0: t[B0] * 1e4}))


def _four_bits(pair: Pair) -> None:
    """As bitsandbytes saves: two weights a byte, in a column."""
    edit_tensors(
        pair.shards[0], lambda t: t.update({Q0: torch.zeros(HIDDEN * HIDDEN // 2, 1, dtype=torch.uint8)})
    )
    _quantised_by(pair, "bitsandbytes")


def _gptq(pair: Pair) -> None:
    tensors = {n.replace(".weight", ".qweight") if "_proj" in n else n: t for n, t in llama().items()}
    write_shards(pair, tensors)
    _quantised_by(pair, "gptq")


def _quantised_by(pair: Pair, method: str) -> None:
    edit_json(pair.base / "config.json", lambda d: d.update(quantization_config={"quant_method": method}))


def _only(file: str, text: str) -> Callable[[Pair], None]:
    return lambda pair: (pair.base / file).write_text(text)


def _cut(file: Callable[[Pair], Path], keep: int) -> Callable[[Pair], None]:
    def damage(pair: Pair) -> None:
        raw = file(pair).read_bytes()
        file(pair).write_bytes(raw[:keep])

    return damage


def _base_shard(pair: Pair) -> Path:
    return pair.shards[1]


BASE = [
    Case("base missing", lambda p: setattr(p, "base", p.root / "nowhere"), r"nowhere"),
    Case("base is an empty folder", lambda p: setattr(p, "base", _made(p.root / "empty")), r"empty"),
    Case("config.json not JSON", _only("config.json", "{oops"), r"config\.json"),
    Case("config.json a list", _only("config.json", "[1]"), r"config\.json"),
    Case("index not JSON", _only("model.safetensors.index.json", "{"), r"index\.json"),
    Case("index without weight_map", index(lambda d: d.pop("weight_map")), r"weight_map"),
    Case("index names ../x", index(lambda d: d["weight_map"].update({Q0: "../x.safetensors"})), r"\.\./x"),
    Case("index names /x", index(lambda d: d["weight_map"].update({Q0: "/x.safetensors"})), r"/x\.saf"),
    Case("index names a number", index(lambda d: d["weight_map"].update({Q0: 7})), r"index\.json"),
    Case("index names a list", index(lambda d: d["weight_map"].update({Q0: ["x"]})), r"index\.json"),
    Case(
        "index names a tensor that no shard holds",
        index(lambda d: d["weight_map"].update({"model.ghost.weight": SHARDS[0]})),
        r"model\.ghost\.weight",
    ),
    Case("a shard's tensor not in the index", index(lambda d: d["weight_map"].pop(Q0)), r"layers\.0.*q_proj"),
    Case("the same name in two shards", _two_of_one_name, r"layers\.0.*q_proj"),
    Case("the same name twice in a header", _twice_in_header, r"twice|duplicate"),
    Case("missing shard", lambda p: p.shards[1].unlink(), r"00002-of-00002.*(missing|not exist|no )"),
    Case("truncated shard", _cut(_base_shard, -100), r"00002-of-00002.*(truncated|download)"),
    Case("shard of zero bytes", _cut(_base_shard, 0), r"00002-of-00002.*empty"),
    Case("shard cut inside its header", _cut(_base_shard, 40), r"00002-of-00002"),
    Case("shard is an LFS pointer", lambda p: p.shards[0].write_text(LFS), r"(?i)lfs pull"),
    Case(
        "header of absurd length",
        lambda p: p.shards[0].write_bytes(b"\xff" * 7 + b"\x7f" + b"{}" * 50),
        r"00001-of-00002.*not a safetensors file",
    ),
    Case(
        "header not JSON",
        lambda p: write_header(p.shards[0], b"{nope", b"12"),
        r"00001-of-00002.*(header|not a safetensors)",
    ),
    Case(
        "header a list",
        lambda p: write_header(p.shards[0], b"[1, 2]", b"12"),
        r"00001-of-00002.*(header|not a safetensors)",
    ),
    Case("overlapping offsets", header(_swap_offsets), r"00001-of-00002.*(overlap|hole)"),
    Case(
        "offsets beyond the file", header(lambda d: _first(d).update(data_offsets=[0, 1 << 40])), r"00001-of"
    ),
    Case("negative offsets", header(lambda d: _first(d).update(data_offsets=[-8, 0])), r"00001-of"),
    Case("shape and bytes differ", header(lambda d: _first(d).update(shape=[3])), r"00001-of"),
    Case("negative shape", header(lambda d: _first(d).update(shape=[-64, -32])), r"00001-of"),
    Case("unknown dtype in the header", header(lambda d: _first(d).update(dtype="Q4_K")), r"Q4_K"),
    Case("no offsets in the header", header(lambda d: _first(d).pop("data_offsets")), r"00001-of"),
    Case("evil pickle as base", _evil_base, r"pytorch_model\.bin.*posix\.system"),
    Case("int8 weights", shard(_in_dtype(torch.int8)), r"int8|dequantise"),
    Case("fp8 weights", shard(_in_dtype(torch.float8_e4m3fn)), r"float8|dequantise"),
    Case("4-bit weights in bytes", _four_bits, r"(?i)quanti"),
    Case("GPTQ's names", _gptq, r"(?i)quanti"),
    Case(
        "4-bit base",
        lambda p: edit_json(
            p.base / "config.json",
            lambda d: d.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ),
        r"(?i)bitsandbytes|quanti",
    ),
    Case("other names in the base", _other_model, r"layers\.0\.self_attn\.q_proj"),
    Case("a wider base", _wider_model, r"q_proj"),
]

ADAPTER = [
    Case("adapter missing", lambda p: setattr(p, "adapter", p.root / "nowhere"), r"nowhere"),
    Case("adapter is an empty folder", lambda p: setattr(p, "adapter", _made(p.root / "empty")), r"empty"),
    Case("adapter_config.json missing", lambda p: p.settings.unlink(), r"adapter_config\.json|alpha"),
    Case("adapter weights missing", lambda p: p.weights.unlink(), r"adapter_model"),
    Case(
        ".bin and .safetensors that differ",
        lambda p: torch.save({**lora(), A0: lora()[A0] + 1}, p.adapter / "adapter_model.bin"),
        r"both .*which may differ",
    ),
    Case("adapter_config.json not JSON", lambda p: p.settings.write_text("{"), r"adapter_config\.json"),
    Case("adapter_config.json a list", lambda p: p.settings.write_text("[]"), r"adapter_config\.json"),
    Case("r missing", settings(r=...), r"\br\b"),
    Case("r zero", settings(r=0), r"\br\b"),
    Case("r negative", settings(r=-4), r"-4"),
    Case("r a word", settings(r="four"), r"four"),
    Case("r not whole", settings(r=4.5), r"4\.5"),
    Case("r is not the factors' rank", settings(r=8), r"rank|\br\b"),
    Case("alpha missing", settings(lora_alpha=...), r"alpha"),
    Case("alpha null", settings(lora_alpha=None), r"alpha"),
    Case("alpha NaN", settings(lora_alpha=float("nan")), r"(?i)alpha.*nan|nan.*alpha"),
    Case("alpha a word", settings(lora_alpha="big"), r"alpha.*big|big.*alpha"),
    Case("alpha_pattern infinite", settings(alpha_pattern={"q_proj": float("inf")}), r"alpha"),
    Case("rank_pattern zero", settings(rank_pattern={"q_proj": 0}), r"rank"),
    Case("rank_pattern negative", settings(rank_pattern={"q_proj": -2}), r"rank"),
    Case("rank_pattern against the factors", settings(rank_pattern={"q_proj": 2}), r"rank"),
    Case("rank_pattern a list", settings(rank_pattern=[4]), r"rank_pattern"),
    Case("rank_pattern no expression", settings(rank_pattern={"*bad[": 4}), r"\*bad\["),
    Case("use_rslora a word", settings(use_rslora="false"), r"use_rslora"),
    Case("modules_to_save a number", settings(modules_to_save=5), r"modules_to_save"),
    Case("target_parameters a number", settings(target_parameters=1.5), r"target_parameters"),
    Case("trained tokens no numbers", settings(trainable_token_indices=["q"]), r"trainable_token_indices"),
    Case(
        "trained tokens negative", settings(trainable_token_indices={"x": [-1]}), r"trainable_token_indices"
    ),
    Case("peft_type IA3", settings(peft_type="IA3"), r"IA3"),
    Case("peft_type missing", settings(peft_type=...), r"peft_type"),
    Case("layer replication", settings(layer_replication=[[0, 2], [1, 2]]), r"layer_replication"),
    Case("unknown trainable bias", settings(bias="some"), r"bias"),
    Case("missing B", weights(lambda t: t.pop(B0)), r"q_proj.*B|B.*q_proj"),
    Case("missing A", weights(lambda t: t.pop(A0)), r"q_proj.*A|A.*q_proj"),
    Case("no tensors", weights(lambda t: t.clear()), r"adapter_model|no "),
    Case("ranks of A and B differ", replace(A0, lambda t: t[:3].clone()), r"rank|q_proj"),
    Case("factors transposed", replace(A0, lambda t: t.T.contiguous()), r"q_proj"),
    Case(
        "empty tensors", weights(lambda t: t.update(dict.fromkeys([A0, B0], torch.zeros(0)))), r"empty|size 0"
    ),
    Case("all tensors empty", weights(lambda t: t.update({n: torch.zeros(0) for n in t})), r"empty|size 0"),
    Case("NaN in A", replace(A0, lambda t: t.index_fill(0, torch.tensor(1), torch.nan)), r"(?i)nan|finite"),
    Case(
        "infinity in B", replace(B0, lambda t: t.index_fill(0, torch.tensor(1), torch.inf)), r"(?i)inf|finite"
    ),
    Case("integer factors", replace(A0, lambda t: t.to(torch.int32)), r"int32|q_proj"),
    Case("unknown key", weights(lambda t: t.update({"mystery.tensor": torch.ones(2)})), r"mystery\.tensor"),
    Case("wrong in-features", replace(A0, lambda t: torch.ones(RANK, 2 * HIDDEN)), r"q_proj"),
    Case("extra layers", rename(lambda n: n.replace("layers.1", "layers.7")), r"layers\.7"),
    Case("renamed module", rename(lambda n: n.replace("self_attn", "attention")), r"attention"),
    Case(
        "another base's names",
        rename(lambda n: n.replace("model.layers", "transformer.h")),
        r"transformer\.h",
    ),
    Case(
        "prefix stripped beyond proof",
        weights(lambda t: t.update({"q_proj.lora_A.weight": t.pop(A0), "q_proj.lora_B.weight": t.pop(B0)})),
        r"q_proj",
    ),
    Case(
        "one site under two names",
        weights(
            lambda t: t.update(
                {
                    A0.removeprefix("base_model."): t[A0] + 1,
                    B0.removeprefix("base_model."): t[B0] + 1,
                }
            )
        ),
        r"q_proj",
    ),
    Case(
        "modules_to_save of a wrong shape",
        both(
            settings(modules_to_save=["lm_head"]),
            weights(lambda t: t.update({f"{PREFIX}lm_head.weight": torch.ones(3, HIDDEN)})),
        ),
        r"lm_head",
    ),
    Case("adapter is an LFS pointer", lambda p: p.weights.write_text(LFS), r"(?i)lfs pull"),
    Case("adapter_config.json is an LFS pointer", lambda p: p.settings.write_text(LFS), r"(?i)lfs pull"),
    Case("adapter of zero bytes", _cut(lambda p: p.weights, 0), r"adapter_model\.safetensors.*empty"),
    Case("adapter truncated", _cut(lambda p: p.weights, -10), r"adapter_model\.safetensors"),
    Case("evil pickle as adapter", _evil_adapter, r"adapter_model\.bin.*posix\.system"),
    Case(
        "a text file as adapter", lambda p: setattr(p, "adapter", _file(p.root / "a.bin", "hello")), r"a\.bin"
    ),
    Case("loralib without --alpha", _loralib, r"--alpha"),
    Case("fused before", _fused_before, r"already|before"),
    Case("infinite in fp16", _overflow, r"(?i)overflow|infinit|finite"),
]

CALL = [
    Case("inputs in the wrong order", lambda p: _swap(p), r"BASE ADAPTER"),
    Case("BASE twice", lambda p: setattr(p, "adapter", p.base), r"BASE ADAPTER|adapter"),
    Case("a hub id out of reach", lambda p: setattr(p, "base", Path("somebody/nothing-here")), r"hub"),
    Case("alpha beyond all bounds", settings(lora_alpha=1e300), r"(?i)overflow|infinit"),
    Case("OUT exists", out(lambda p: _made(p.root / "there")), r"--force"),
    Case("OUT is a file", out(lambda p: _file(p.root / "there")), r"there"),
    Case("OUT is a file, forced", out(lambda p: _file(p.root / "there"), "--force"), r"there"),
    Case("OUT is BASE", out(lambda p: p.base, "--force"), r"(?i)base|input"),
    Case(
        "OUT is BASE by a link", out(lambda p: _link(p.root / "link", p.base), "--force"), r"link|base|input"
    ),
    Case("OUT is ADAPTER", out(lambda p: p.adapter, "--force"), r"(?i)adapter|input"),
    Case("OUT inside BASE", out(lambda p: p.base / "fused"), r"(?i)inside|input"),
    Case("OUT inside ADAPTER", out(lambda p: p.adapter / "fused"), r"(?i)inside|input"),
    Case("OUT around BASE", out(lambda p: p.root, "--force"), r"(?i)input|contain|hold|base"),
    Case(
        "OUT is a folder of something else, forced",
        both(
            out(lambda p: _made(p.root / "home"), "--force"),
            lambda p: (p.root / "home" / "diary.txt").write_text("do not lose me"),
        ),
        r"home",
    ),
    Case("OUT below a file", out(lambda p: _file(p.root / "file") / "out"), r"file"),
    Case("OUT in a file system that takes nothing", out(lambda p: Path("/proc/graft-out")), r"/proc"),
    Case("unknown --dtype", args("--dtype", "int7"), r"int7"),
    Case("--scale nan", args("--scale", "nan"), r"--scale"),
    Case("--scale a word", args("--scale", "much"), r"--scale"),
    Case("--alpha infinite", args("--alpha", "inf"), r"--alpha"),
    Case("--alpha against the file's", args("--alpha", "99"), r"alpha"),
    Case("--max-shard-size a word", args("--max-shard-size", "lots"), r"--max-shard-size"),
    Case("--max-shard-size zero", args("--max-shard-size", "0GB"), r"--max-shard-size"),
    Case("--threads zero", args("--threads", "0"), r"--threads"),
    Case("unknown option", args("--faster"), r"--faster"),
    Case("--tied unknown", args("--tied", "loose"), r"--tied"),
    Case("--adapter-config missing", args("--adapter-config", "nowhere.json"), r"nowhere\.json"),
]

CASES = [*BASE, *ADAPTER, *CALL]

#: damage that must not be refused, and what must be said of it
REPAIRED = [
    Case("control", lambda p: None, r""),
    Case("config.json missing", lambda p: (p.base / "config.json").unlink(), r"no config\.json"),
    Case("_forward_module. prefix", rename(lambda n: f"_forward_module.{n}"), r"_forward_module"),
    Case("no base_model.model. prefix", rename(lambda n: n.removeprefix(PREFIX)), r""),
    Case("names with the adapter's name", rename(lambda n: n.replace(".weight", ".default.weight")), r""),
    Case("shards that are links into a cache", lambda p: _into_cache(p), r""),
    Case("a base of one .safetensors", lambda p: _one_file(p, save_file, "model.safetensors"), r""),
    Case("a base of one .bin", lambda p: _one_file(p, torch.save, "pytorch_model.bin"), r""),
    Case("the adapter's file itself", lambda p: setattr(p, "adapter", p.weights), r""),
    Case("an adapter as .bin", lambda p: _as_bin(p), r""),
    Case("--scale below zero", args("--scale=-0.5"), r""),
    Case("alpha far too large", settings(lora_alpha=1e6), r"times as large as the weights"),
    Case("a tensor larger than --max-shard-size", args("--max-shard-size", "1kB"), r""),
]


def _swap(pair: Pair) -> None:
    pair.base, pair.adapter = pair.adapter, pair.base


def _into_cache(pair: Pair) -> None:
    """The layout of the hub's cache: every file a relative link to ``../blobs/<hash>``."""
    blobs = _made(pair.root / "blobs")
    for n, file in enumerate(sorted(pair.base.iterdir())):
        file.rename(blobs / str(n))
        file.symlink_to(Path("..") / "blobs" / str(n))


def _one_file(pair: Pair, save: Callable[[dict[str, torch.Tensor], Path], object], name: str) -> None:
    for file in (*pair.shards, pair.index):
        file.unlink()
    save(llama(), pair.base / name)


def _as_bin(pair: Pair) -> None:
    pair.weights.unlink()
    torch.save(lora(), pair.adapter / "adapter_model.bin")


assert len({c.name for c in CASES}) == len(CASES)
