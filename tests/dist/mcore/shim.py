"""Megatron-core on CPU with gloo: what it takes from CUDA, given from the CPU. For tests only."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Patch torch.cuda and Megatron's RNG tracker; call once in a process, before any model is built."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    make = torch_norm.WrappedTorchNorm.__new__

    def tolerant(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        # torch's norms are refused under sequence parallelism, because nobody sums their gradients
        # there; a frozen norm has none
        before, config.sequence_parallel = config.sequence_parallel, False
        try:
            return make(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = before

    torch_norm.WrappedTorchNorm.__new__ = tolerant


def start(rank: int, world: int, store: str) -> None:
    """One process of a gloo group over a file."""
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    install()


_GROUPS: dict[tuple[Any, ...], dict[str, Any]] = {}


def parallel(tp: int, ep: int = 1, etp: int | None = None, pp: int = 1) -> None:
    """Tensor parallelism over ``tp`` of the processes, experts over ``ep``, ``pp`` stages; the rest replicas.

    Some twenty groups are made, which is slow, so those of every layout are kept.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed

    state, sizes = vars(parallel_state), (tp, ep, etp, pp)
    names = [n for n in state if n.startswith("_") and n.isupper()]
    if () not in _GROUPS:
        _GROUPS[()] = {n: state[n] for n in names}  # none are made yet
    state.update(_GROUPS.get(sizes, _GROUPS[()]))
    if sizes not in _GROUPS:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            distributed_timeout_minutes=1,
            create_gloo_process_groups=False,
        )
        _GROUPS[sizes] = {n: state[n] for n in names}
    initialize_rng_tracker(force_reset=True)
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    torch.manual_seed(7)


def config(**values: Any) -> Any:
    """A small transformer's configuration, initialised on the CPU."""
    from megatron.core.transformer import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**{**settings, **values})
