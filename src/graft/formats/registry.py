"""Every known format and container.

A new one adds its line here, and so joins detection, the command and the laws.
"""

from __future__ import annotations

from collections.abc import Mapping

from .adapterhub import AdapterHubFormat
from .container import Container, EngineCheckpoint, TensorFile
from .dcp.checkpoint import DistributedCheckpoint
from .deepspeed_chat import DeepSpeedChatFormat
from .diffusers import DiffusersFormat
from .gguf.container import GgufFile
from .gguf.format import GgufFormat
from .graft_states import GraftFormat
from .kohya import KohyaFormat
from .litgpt import LitgptFormat
from .loralib import LoralibFormat
from .megatron.format import MegatronFormat
from .mistral import MistralFormat
from .mlx import MlxFormat
from .peft.format import PeftFormat, PortablePeft
from .protocol import Format, Writer
from .sharded import ShardedStateDict
from .torchtune import TorchtuneFormat

#: in the order in which they are asked; the last takes any file
CONTAINERS: tuple[Container, ...] = (
    EngineCheckpoint(),
    DistributedCheckpoint(),
    GgufFile(),
    ShardedStateDict(),
    TensorFile(),
)

#: in the order in which detection asks them: those with names of their own before those with common ones
FORMATS: tuple[Format, ...] = (
    AdapterHubFormat(),
    GraftFormat(),
    DeepSpeedChatFormat(),
    GgufFormat(),
    MegatronFormat(),
    MlxFormat(),
    MistralFormat(),
    LitgptFormat(),
    TorchtuneFormat(),
    KohyaFormat(),
    DiffusersFormat(),
    PeftFormat(),
    LoralibFormat(),
)

#: the formats that can be written, by name
WRITERS: Mapping[str, Writer] = {one.name: one for one in FORMATS if isinstance(one, Writer)}

#: formats whose files hold the adapters of several models of a diffusers pipeline
PIPELINES = frozenset({KohyaFormat.name, DiffusersFormat.name})

#: programs that serve adapters → the form that they load right
SERVERS: Mapping[str, Writer] = {"vllm": PortablePeft()}
