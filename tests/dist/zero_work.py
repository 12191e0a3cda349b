"""What the processes of test_zero.py do: real DeepSpeed, CPU and gloo. Each check answers by raising."""

from __future__ import annotations

import copy
import errno
import json
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.dist import apart

TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
LR = 1e-2
ROWS = 4  # of a batch, shared by all processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(rank: int, world: int, port: int) -> Any:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank), LOCAL_SIZE=str(world), DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for half a minute
    # DeepSpeed asks the processor for fast fp16, of which these tests have no need
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    return deepspeed


@dataclass
class Case:
    """One configuration, and everything that its checks share."""

    name: str
    stage: int
    dtype: torch.dtype
    init: bool = False
    offload: bool = False
    persist: int = 100  # elements up to which a parameter stays gathered
    zero: dict[str, Any] = field(default_factory=dict[str, Any])  # more of zero_optimization
    more: dict[str, Any] = field(default_factory=dict[str, Any])  # more of the configuration

    def config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage, "stage3_param_persistence_threshold": self.persist}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
            "gradient_clipping": 0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "zero_optimization": {**zero, **self.zero},
            **self.more,
        }


CASES = [
    Case("z3-init-bf16", 3, torch.bfloat16, init=True, offload=True),
    Case("z3-fp32", 3, torch.float32, persist=100_000),
    Case("z2-bf16", 2, torch.bfloat16),
    Case("z1-fp32", 1, torch.float32),
]


def llama(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=67, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.register_buffer("extra", torch.arange(5.0))
    return model


def reference(dtype: torch.dtype) -> Any:
    """The base in one process, the same on every rank."""
    torch.manual_seed(0)
    return llama(dtype)


def adapted(case: Case, ds: Any) -> Any:
    """The same base, spread as the case says, with an adapter."""
    import graft

    whole = reference(case.dtype)
    if case.init:
        with ds.zero.Init(config_dict_or_path=case.config(), dtype=case.dtype):
            model = llama(case.dtype)
        with ds.zero.GatheredParameters(list(model.parameters()), modifier_rank=0), torch.no_grad():
            if dist.get_rank() == 0:
                for name, p in model.named_parameters():
                    p.copy_(whole.get_parameter(name))
        model.register_buffer("extra", torch.arange(5.0))
    else:
        model = whole
    torch.manual_seed(1)
    graft.adapt(model, TARGETS, rank=3, alpha=7, train=["model.norm"], quiet=True)
    return model


def engine_of(case: Case, ds: Any) -> Any:
    model = adapted(case, ds)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    return ds.initialize(model=model, optimizer=optimizer, config=case.config())[0]


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 67, (ROWS, 9), generator=torch.Generator().manual_seed(100 + step))


def own(ids: torch.Tensor) -> torch.Tensor:
    """This process's part of a batch."""
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def train(engine: Any, steps: range) -> list[float]:
    curve: list[float] = []
    for step in steps:
        ids = own(batch(step))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().clone()
        dist.all_reduce(total)
        curve.append(float(total) / dist.get_world_size())
    return curve


def train_alone(model: Any, steps: range) -> list[float]:
    """In one process without DeepSpeed, with fp32 masters of what trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().clone() for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=LR)
    curve: list[float] = []
    for step in steps:
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        for p, master in zip(trained, masters, strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        optimizer.step()
        for p, master in zip(trained, masters, strict=True):
            p.data.copy_(master)
        curve.append(float(loss))
    return curve


def base_slices(engine: Any, whole: Any) -> None:
    """Every parameter of the engine that ``whole`` has holds its slice of whole's, bit for bit."""
    ours = dict(engine.module.named_parameters())
    for name, w in whole.named_parameters():
        p, flat = ours[name], w.detach().view(-1)
        if hasattr(p, "ds_tensor"):
            size = p.ds_tensor.ds_numel
            first = p.ds_zero_partition_rank * size
            flat = flat[first : first + size]
            mine = p.ds_tensor.view(-1)[: flat.numel()]
        else:
            mine = p.detach().view(-1)
        assert same(mine, flat), name


def close(case: Case, x: torch.Tensor, y: torch.Tensor) -> None:
    far = (x.float() - y.float()).norm() / y.float().norm()
    assert far < (1e-5 if case.dtype == torch.float32 else 2e-2), far


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and bytes_of(x) == bytes_of(y)


def bytes_of(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def twin(case: Case, engine: Any) -> Any:
    """The single-process model with the engine's adapter and trained parameters."""
    import graft
    from graft.model import adapter_of

    adapter = adapter_of(engine)
    whole = reference(case.dtype)
    graft.adapt(whole, TARGETS, rank=3, alpha=7, dtype=case.dtype, quiet=True)
    with torch.no_grad():
        for name, site in adapter.sites.items():
            path = name.removesuffix("weight")
            whole.get_parameter(path + "lora_A").copy_(site.A)
            whole.get_parameter(path + "lora_B").copy_(site.B)
        full = [dict(adapter.replace)]
        dist.broadcast_object_list(full, 0)
        assert set(full[0]) == {"model.norm.weight"}
        for name, value in full[0].items():
            whole.get_parameter(name).copy_(value)
    return whole


def snapshot(engine: Any, **kwargs: Any) -> Any:
    """The engine's adapter now: where weights are whole, adapter_of answers with live tensors."""
    from graft.model import adapter_of

    return copy.deepcopy(adapter_of(engine, **kwargs))


# --- checks, in order; each gets the case, DeepSpeed, a trained engine and an empty folder -------------


def fused_shards(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    import graft

    whole, before = twin(case, engine), twin(case, engine)
    base_slices(engine, before)
    n = graft.fuse(engine)
    assert n == graft.fuse(whole) == 7, n
    base_slices(engine, whole)
    assert graft.fuse(engine) == 0
    engine.eval()
    with torch.no_grad():
        ids = batch(9)
        out, want = engine(input_ids=ids).logits, whole.eval()(input_ids=ids).logits
    close(case, out, want)
    base_slices(engine, whole)  # after a forward that gathered it all
    assert graft.unfuse(engine) == 7
    engine.train()
    base_slices(engine, before)


def live_copies(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    """A forward with gradients and no backward leaves full copies alive; fuse must not miss them."""
    import graft

    whole = twin(case, engine)
    engine(input_ids=batch(3)).logits.sum()
    graft.fuse(engine), graft.fuse(whole)
    base_slices(engine, whole)
    engine.eval()
    with torch.no_grad():
        got = engine(input_ids=batch(4)).logits
        want = whole.eval()(input_ids=batch(4)).logits
    close(case, got, want)
    graft.unfuse(engine)
    engine.train()


def exported(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    from transformers import LlamaForCausalLM

    import graft

    whole, before = twin(case, engine), twin(case, engine)
    graft.export(engine, folder / "model")
    base_slices(engine, before)
    graft.fuse(whole)
    graft.fuse(engine)
    graft.export(engine, folder / "fused", max_shard_size=4000)
    graft.unfuse(engine)
    graft.export(engine, folder / "gathered", gather=True)
    graft.export(engine, folder / "half", max_shard_size=4000, dtype=torch.float16)
    graft.export(engine, folder / "half-gathered", max_shard_size=4000, dtype=torch.float16, gather=True)
    dist.barrier()
    same_files(folder / "model", folder / "gathered")
    same_files(folder / "half", folder / "half-gathered")
    from safetensors.torch import load_file

    stored = load_file(folder / "model" / "model.safetensors")
    assert not [k for k in stored if "lora_A" in k or "lora_B" in k or "lora_fused" in k]
    assert "lm_head.weight" not in stored and same(stored["extra"], torch.arange(5.0))
    for path in ("model", "fused"):
        got = LlamaForCausalLM.from_pretrained(folder / path, dtype="auto").state_dict()
        want = {k: v for k, v in whole.state_dict().items() if k in got}
        assert len(want) == len(got) > 10
        assert all(same(got[k], v) for k, v in want.items()), path


def same_files(one: Path, other: Path) -> None:
    """Two directories with the same bytes."""
    files = sorted(p.name for p in one.iterdir())
    assert files == sorted(p.name for p in other.iterdir())
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def saved(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    import graft
    from graft.formats import read
    from graft.model import adapter_of

    notes = graft.save(engine, folder / "adapter")
    dist.barrier()
    whole = adapter_of(engine)
    file = read(folder / "adapter")
    for (_, s), f in zip(sorted(whole.sites.items()), _by_site(file, whole), strict=True):
        assert torch.equal(f.A, s.A) and torch.equal(f.B, s.B) and f.A.numel()
    low = f"{case.dtype}".removeprefix("torch.") + " copies"
    assert (case.dtype == torch.float32) == (not [n for n in notes if low in n]), notes
    notes = graft.save(engine, folder / "masters", masters=True)
    dist.barrier()
    file = read(folder / "masters")
    for (_, s), f in zip(sorted(whole.sites.items()), _by_site(file, whole), strict=True):
        assert f.A.dtype == torch.float32
        assert torch.equal(f.A.to(s.A.dtype), s.A) and torch.equal(f.B.to(s.B.dtype), s.B)
    values = graft.state_dict(engine, trained=True)
    assert len(values) == 15 and all(v.numel() for v in values.values())


def _by_site(file: Any, whole: Any) -> list[Any]:
    found = {name.removesuffix(".weight"): site for name, site in file.sites.items()}
    return [found[name.removesuffix(".weight")] for name in sorted(whole.sites)]


def loaded(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    """Into the running engine: both copies and masters; the next step starts from them."""
    import graft

    graft.save(engine, folder / "then", masters=True)
    dist.barrier()
    then, masters = snapshot(engine), snapshot(engine, masters=True)
    train(engine, range(20, 21))
    assert not torch.equal(next(iter(snapshot(engine).sites.values())).B, next(iter(then.sites.values())).B)
    graft.load(engine, folder / "then", quiet=True)
    for got, want in ((snapshot(engine), then), (snapshot(engine, masters=True), masters)):
        for name, site in want.sites.items():
            assert torch.equal(got.sites[name].A, site.A) and torch.equal(got.sites[name].B, site.B), name
        assert all(torch.equal(got.replace[n], t) for n, t in want.replace.items())
        assert dist.get_rank() or want.replace
    refused(graft.StateError, "graft.load before", graft.load, engine, folder / "then", replace=True)


def checkpoints(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    for lean in (False, True):
        then = snapshot(engine)
        engine.save_checkpoint(str(folder / f"ds-{lean}"), exclude_frozen_parameters=lean)
        train(engine, range(20, 21))
        engine.load_checkpoint(str(folder / f"ds-{lean}"), load_module_strict=not lean)
        now = snapshot(engine)
        for name, site in then.sites.items():
            assert torch.equal(now.sites[name].A, site.A) and torch.equal(now.sites[name].B, site.B)
        base_slices(engine, twin(case, engine))


def refusals(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    import graft

    refused(graft.StateError, "before deepspeed.initialize", graft.adapt, engine, ["k_proj"], quiet=True)
    if case.stage == 3:
        refused(graft.StateError, "one process", graft.verify, engine, input_ids=batch(0))
    else:
        graft.verify(engine, input_ids=batch(0))


def differing(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    for check in apart.CHECKS:
        own_folder = folder / check.__name__
        own_folder.mkdir(exist_ok=True)
        dist.barrier()
        check(engine, own_folder)


def failing(case: Case, ds: Any, engine: Any, folder: Path) -> None:
    """One process fails in the middle of an export: both raise, nothing is left, the next one works."""
    import graft
    from graft import shared_files
    from graft.engines.zero3 import ENGINE

    rank = dist.get_rank()
    text = "no space left" if rank == 0 else "another process"
    with patched(shared_files, "raw_bytes", full_disk if rank == 0 else shared_files.raw_bytes):
        refused(graft.GraftError, text, graft.export, engine, folder / "m")
    if case.stage == 3:
        real, calls = type(ENGINE).parts, iter(range(1000))

        def parts(self: Any, p: torch.Tensor) -> Any:
            if rank == 1 and next(calls) == 4:
                raise graft.StateError("moved by a test")
            return real(self, p)

        with patched(type(ENGINE), "parts", parts):
            text = "moved by a test" if rank == 1 else "another process"
            refused(graft.StateError, text, graft.export, engine, folder / "m")
    dist.barrier()
    left = list(folder.iterdir())
    dist.barrier()  # the next export may begin when all have looked
    assert not left
    graft.export(engine, folder / "m")
    # a factor that differs on one replica, and a scale that differs anywhere
    slot = next(m for m in engine.module.modules() if isinstance(m, graft.Adapted)).graft_slots["weight"]
    scale = slot.site.scale
    slot.site.scale += rank
    refused(graft.StateError, "different adapters", graft.fuse, engine)
    slot.site.scale = scale
    if case.stage < 3:
        factor = next(p for n, p in engine.module.named_parameters() if n.endswith("lora_B"))
        old = factor.detach().clone()
        factor.data.add_(rank)
        refused(graft.StateError, "different adapters", graft.fuse, engine)
        factor.data.copy_(old)


def full_disk(flat: torch.Tensor) -> memoryview:
    raise OSError(errno.ENOSPC, "no space left on device")


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Any:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def refused(kind: Any, text: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"{call} was not refused")


CHECKS: list[Callable[[Case, Any, Any, Path], None]] = [
    fused_shards, live_copies, exported, saved, loaded, checkpoints, refusals, differing, failing,
]  # fmt: skip


def curves(case: Case, ds: Any, folder: Path) -> None:
    """Training is that of one process, and export, fuse and unfuse between steps leave no trace in it."""
    import graft

    engine = engine_of(case, ds)
    plain = train(engine, range(4))
    again = engine_of(case, ds)
    disturbed: list[float] = []
    for step in range(4):
        disturbed += train(again, range(step, step + 1))
        graft.export(again, folder / f"epoch-{step}")
        graft.fuse(again)
        graft.unfuse(again)
    assert plain == disturbed, (plain, disturbed)
    for (n, x), (_, y) in zip(graft.state_dict(engine).items(), graft.state_dict(again).items(), strict=True):
        assert same(x, y), n
    if not case.stage:
        return  # the half-precision optimizer of stage 0 begins with a step of its own
    alone = reference(case.dtype)
    torch.manual_seed(1)
    own_dtype = case.dtype if case.init else None  # ZeRO-3's parameters have factors of their own dtype
    graft.adapt(alone, TARGETS, rank=3, alpha=7, dtype=own_dtype, train=["model.norm"], quiet=True)
    want = train_alone(alone.to(case.dtype), range(4))
    far = max(abs(x - y) for x, y in zip(plain, want, strict=True))
    assert far < (1e-5 if case.dtype == torch.float32 else 6e-3), (plain, want)
    assert abs(plain[0] - plain[3]) > 1e-2


def death(rank: int, world: int, port: int, folder: str, gather: bool) -> None:
    """The second process dies while it sends or writes; the first says what it met and what is left."""
    from graft.engines.zero3 import ENGINE

    ds = start(rank, world, port)
    engine = engine_of(next(c for c in CASES if c.name == "z3-fp32"), ds)
    apart.dies_in_export(engine, ENGINE, Path(folder), gather)


#: what to do with an engine of its own, then with one that is shared
Plan = list[
    tuple[Case, list[Callable[[Case, Any, Path], None]], list[Callable[[Case, Any, Any, Path], None]]]
]

PLAN: Plan = [(case, [curves], CHECKS) for case in CASES]


def work(rank: int, world: int, port: int, folder: str, plan: Plan) -> None:
    ds = start(rank, world, port)
    for case, alone, shared in plan:
        results: dict[str, str] = {}
        root = Path(folder, case.name)
        try:
            _case(case, ds, root, results, alone, shared)
        finally:
            Path(folder, f"{case.name}.{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _case(
    case: Case, ds: Any, root: Path, results: dict[str, str], alone: list[Any], shared: list[Any]
) -> None:
    engine: Any = None
    for check in [*alone, *shared]:
        name = check.__name__
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        results[name] = "did not end"
        began = time.perf_counter()
        try:
            if check in alone:
                check(case, ds, folder)
            else:
                if engine is None:
                    engine = engine_of(case, ds)
                    train(engine, range(2))
                check(case, ds, engine, folder)
            results[name] = ""
            if os.environ.get("ZERO_TIMES") and not dist.get_rank():
                print(case.name, name, round(time.perf_counter() - began, 1), flush=True)
        except BaseException:
            # the other process may be inside a collective: this case cannot go on
            results[name] = traceback.format_exc()
            raise
