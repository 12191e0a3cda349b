"""DeepSpeed's engine checkpoints (ZeRO stages 0 to 3) as one lazy mapping of named tensors.

DeepSpeed is not imported and no code of a pickle is run. Files are mapped; a tensor is gathered from the
ranks' pieces when it is asked for. Trained values are the optimizer's fp32 masters, all others what the
module held.
"""

from __future__ import annotations

from .folder import find_files, is_checkpoint
from .reader import ZeroCheckpoint, open_zero_checkpoint

__all__ = ["ZeroCheckpoint", "find_files", "is_checkpoint", "open_zero_checkpoint"]
