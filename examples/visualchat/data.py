"""Images and captions made in code: one coloured shape in one corner, and the sentence that says so."""

from __future__ import annotations

import itertools

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
SHAPES = ("square", "cross", "frame")
CORNERS = {"top left": (0, 0), "top right": (0, 8), "bottom left": (8, 0), "bottom right": (8, 8)}
SCENES = list(itertools.product(COLOURS, SHAPES, CORNERS))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    text = [*COLOURS, *SHAPES, *" ".join(CORNERS).split(), "a", "at", "the", "<s>", "</s>", "<unk>"]
    words = Tokenizer(WordLevel({w: n for n, w in enumerate(dict.fromkeys(text))}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def draw(colour: str, shape: str, corner: str) -> torch.Tensor:
    """An image ``[3, 16, 16]`` of numbers between −1 and 1."""
    mark = torch.ones(8, 8)
    if shape == "frame":
        mark[2:6, 2:6] = 0
    elif shape == "cross":
        mark = (torch.eye(8) + torch.eye(8).flip(0)).clamp(max=1)
    y, x = CORNERS[corner]
    image = torch.zeros(3, 16, 16)
    image[:, y : y + 8, x : x + 8] = mark * torch.tensor(COLOURS[colour]).view(3, 1, 1)
    return image


def batches(words: PreTrainedTokenizerFast, size: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every scene once, shuffled: images ``[size, 3, 16, 16]`` and token ids ``[size, 9]``."""
    order = torch.randperm(len(SCENES), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for first in range(0, len(order) - size + 1, size):
        scenes = [SCENES[n] for n in order[first : first + size]]
        captions = [f"<s> a {colour} {shape} at the {corner} </s>" for colour, shape, corner in scenes]
        ids = [words.convert_tokens_to_ids(caption.split()) for caption in captions]
        found.append((torch.stack([draw(*scene) for scene in scenes]), torch.tensor(ids)))
    return found
