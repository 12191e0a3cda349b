"""Tensors → a DCP directory, in this process alone, whatever process group it is in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch


def save_checkpoint(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write ``.metadata`` and one data file with torch's own planner and writer.

    ``torch.distributed.checkpoint.save`` would meet with the other processes of a group; its parts do not.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Writer(FileSystemWriter):
        def storage_meta(self) -> StorageMeta:
            return StorageMeta()  # no path of this machine, no random name

    planner, writer = DefaultSavePlanner(), Writer(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    planner.set_up_planner(state, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writes = writer.write_data(plan, planner)
    writes.wait()
    writer.finish(metadata, [writes.value()])
