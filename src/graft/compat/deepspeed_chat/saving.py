"""``pytorch_model.bin``: the model's tensors as they are now, complete; the file is whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...atomic import atomic_files
from ...attach import adapter_keys
from ...engines import masters
from ...engines.wrappers import Together, is_spread, team_of, together, unwrap
from ...errors import OutputError, StateError

WEIGHTS_NAME = "pytorch_model.bin"
CONFIG_NAME = "config.json"
ARGS_NAME = "train_args.pt"


def save_zero_three_model(
    model_ema: nn.Module, global_rank: int, save_dir: str | Path, zero_stage: int = 0, sub_folder: str = ""
) -> None:
    """Write ``save_dir/sub_folder/pytorch_model.bin``: all of ``state_dict()``, also under ZeRO-3.

    Of fused layers the weight is W + ΔW and the factors are left out; of layers that are not fused both are
    there. Under ZeRO-3 every process calls this; parameters travel to the first one by one, and all return
    when the file is there, or raise. Otherwise the process with ``global_rank=0`` writes, and no other waits.

    Raises:
        StateError: parameters are partitioned and ``zero_stage`` is not 3, ``global_rank`` is not this
            process's, or another process failed.
        OutputError: the file cannot be written; what was there is still there.
    """
    team, model, out = team_of(model_ema), unwrap(model_ema), Path(save_dir, sub_folder)
    if not is_spread(team):
        if global_rank == 0:
            _write(_here(model), out)
            _say_unfused(model)
        return
    if zero_stage != 3:
        raise StateError(
            f"the parameters are partitioned over processes, got zero_stage={zero_stage}; pass zero_stage=3, "
            "and call save_zero_three_model on every process"
        )
    with together(team) as work:
        if (global_rank == 0) != team.is_writer():
            raise StateError(
                f"global_rank={global_rank} is not this process's rank; pass torch.distributed's"
            )
        tensors = _gathered(model, work)
        if team.is_writer():
            _write(tensors, out)
            _say_unfused(model)


def save_hf_format(model: nn.Module, tokenizer: Any, args: Any, sub_folder: str = "") -> None:
    """Write ``args.output_dir/sub_folder`` for ``from_pretrained``: weights, config.json, tokenizer.

    One process calls this, so under ZeRO-3, where no process has the weights, it leaves them to
    :func:`save_zero_three_model`. A model without ``config`` gets ``train_args.pt`` in its place:
    ``vars(args)``, where what is no number, text, list or dict is written as text. The files appear when all
    of them are whole.

    Raises:
        OutputError: the folder cannot be written, or the tokenizer cannot write itself.
    """
    here = not is_spread(team_of(model))
    model = unwrap(model)
    out = Path(args.output_dir, sub_folder)
    with atomic_files(out) as staging:
        if here:
            _save(_here(model), staging / WEIGHTS_NAME)
        has_config = _write_config(model, staging)
        if not has_config:
            _save({name: _simple(value) for name, value in vars(args).items()}, staging / ARGS_NAME)
        _write_tokenizer(tokenizer, staging)
    if here:
        _say_unfused(model)
    else:
        print(
            f"{out}: {WEIGHTS_NAME} is left to save_zero_three_model, which gathers the partitioned weights"
        )
    if not has_config:
        print(f"{out}: a {type(model).__name__} has no config to write; {ARGS_NAME} holds the arguments")


def _kept(model: nn.Module) -> dict[str, Any]:
    """The model's state, live, without the factors of fused weights."""
    state = cast("Mapping[str, Any]", model.state_dict(keep_vars=True))
    fused = {key for key, site in adapter_keys(model).items() if site.fusion is not None}
    return {name: value for name, value in state.items() if name not in fused}


def _here(model: nn.Module) -> dict[str, Any]:
    """The state of a model whose parameters are in this process."""
    copies: dict[int, Any] = {}
    return {name: copies.setdefault(id(value), _stored(value)) for name, value in _kept(model).items()}


def _gathered(model: nn.Module, work: Together) -> dict[str, Any]:
    """The state in full, on the process that writes; empty elsewhere. Collective."""
    found: dict[str, Any] = {}
    copies: dict[int, Any] = {}
    for name, value in _kept(model).items():
        if id(value) not in copies:
            work.step()
            try:
                whole = masters.whole(value) if isinstance(value, torch.Tensor) else value
            except StateError as error:
                raise StateError(f"{name}: {error}") from None
            copies[id(value)] = _stored(whole) if work.team.is_writer() else None
        if work.team.is_writer():
            found[name] = copies[id(value)]
    return found


def _stored(value: Any) -> Any:
    """A tensor on the CPU that does not drag a larger storage into the file; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach().cpu()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _write(tensors: Mapping[str, Any], folder: Path) -> None:
    with atomic_files(folder) as staging:
        _save(tensors, staging / WEIGHTS_NAME)


def _save(values: Mapping[str, Any], path: Path) -> None:
    try:
        torch.save(dict(values), path)
    except RuntimeError as error:  # torch's own writer: a full disk, mostly
        raise OutputError(f"{path.name} cannot be written, so nothing was kept: {error}") from error


def _write_config(model: nn.Module, folder: Path) -> bool:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_file"):
        return False
    config.to_json_file(str(folder / CONFIG_NAME))
    return True


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    for name in ("save_pretrained", "save_vocabulary"):
        if hasattr(tokenizer, name):
            getattr(tokenizer, name)(str(folder))
            return
    raise OutputError(
        f"a {type(tokenizer).__name__} has neither save_pretrained nor save_vocabulary; pass the tokenizer"
    )


def _simple(value: Any) -> Any:
    """What ``torch.load(weights_only=True)`` takes back."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_simple(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {str(name): _simple(item) for name, item in cast("dict[Any, Any]", value).items()}
    return str(value)


def _say_unfused(model: nn.Module) -> None:
    if any(site.fusion is None for site in adapter_keys(model).values()):
        print(f"{WEIGHTS_NAME} holds W and the factors apart, as the model is not fused (fuse_lora fuses it)")
