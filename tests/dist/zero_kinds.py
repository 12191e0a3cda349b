"""More of DeepSpeed's configurations, each with the checks of zero_work that it could break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.dist.zero_work import (
    Case,
    Plan,
    batch,
    curves,
    engine_of,
    exported,
    fused_shards,
    live_copies,
    loaded,
    own,
    same,
    saved,
)

_TWICE = {"gradient_accumulation_steps": 2}
_WIDE = {"data_types": {"grad_accum_dtype": "fp32"}}  # BF16_Optimizer
_FP16 = {"fp16": {"enabled": True, "loss_scale": 128}}
_SECOND = {"zero_hpz_partition_size": 2}
_HOST = {"offload_param": {"device": "cpu"}}


def accumulates(case: Case, ds: Any, folder: Path) -> None:
    """Verbs between the micro-steps of one step, also before backward, leave no trace in the curve."""
    import graft

    def whole(engine: Any, path: Path) -> None:
        graft.export(engine, path)
        graft.save(engine, path.with_name(f"{path.name}-adapter"))

    def part(engine: Any, path: Path) -> None:
        whole(engine, path)
        graft.fuse(engine)
        graft.unfuse(engine)

    first, second = engine_of(case, ds), engine_of(case, ds)
    plain = _micro(first, folder, [])
    assert plain == _micro(second, folder, [whole, part, part])
    assert abs(plain[0] - plain[-2]) > 1e-2
    for (name, x), (_, y) in zip(
        graft.state_dict(first).items(), graft.state_dict(second).items(), strict=True
    ):
        assert same(x, y), name


def _micro(engine: Any, folder: Path, between: list[Callable[[Any, Path], None]]) -> list[float]:
    """Losses of each micro-step; what is called after forward, after backward and after step."""
    curve: list[float] = []
    for step in range(6):
        ids = own(batch(step % 2))
        loss = engine(input_ids=ids, labels=ids).loss
        curve.append(float(loss))
        acts = (lambda: None, lambda loss=loss: engine.backward(loss), engine.step)
        for n, act in enumerate(acts):
            act()
            for call in between[n : n + 1]:
                call(engine, folder / f"{step}-{n}")
    return curve


#: processes → what they do
KINDS: dict[int, Plan] = {
    2: [
        (Case("z3-params-on-cpu", 3, torch.bfloat16, init=True, offload=True, zero=_HOST), [curves],
         [fused_shards, live_copies, exported, saved, loaded]),
        (Case("z3-fp16", 3, torch.float16, more=_FP16), [curves], [fused_shards, exported, saved, loaded]),
        (Case("z2-fp16", 2, torch.float16, more=_FP16), [curves], [fused_shards, saved, loaded]),
        (Case("z1-wide", 1, torch.bfloat16, more=_WIDE), [curves], [fused_shards, saved, loaded]),
        (Case("z0-bf16", 0, torch.bfloat16), [curves], [fused_shards, exported, saved, loaded]),
        (Case("z3-twice", 3, torch.float32, zero={"overlap_comm": True}, more=_TWICE), [accumulates], []),
        (Case("z2-twice", 2, torch.bfloat16, offload=True, more=_TWICE), [accumulates], []),
        (Case("z2-robin-twice", 2, torch.float32, zero={"round_robin_gradients": True}, more=_TWICE),
         [accumulates], []),
        (Case("z1-wide-twice", 1, torch.bfloat16, more={**_TWICE, **_WIDE}), [accumulates], []),
        (Case("z0-twice", 0, torch.bfloat16, more=_TWICE), [accumulates], []),
    ],
    4: [
        (Case("z3-init-bf16", 3, torch.bfloat16, init=True, offload=True), [curves],
         [fused_shards, live_copies, exported, saved, loaded]),
        (Case("z3-fp32", 3, torch.float32, persist=0), [curves], [fused_shards, exported]),
        (Case("z3-second-copies", 3, torch.bfloat16, zero=_SECOND), [curves],
         [fused_shards, live_copies, exported, loaded]),
        (Case("z2-bf16", 2, torch.bfloat16), [curves], [fused_shards, exported, saved]),
        (Case("z1-fp32", 1, torch.float32), [curves], [fused_shards, saved]),
    ],
}  # fmt: skip
