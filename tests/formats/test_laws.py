"""The law of formats: read(write(adapter)) is the adapter, through any two formats, to the last bit.

A format joins by its line in the registry: it says itself which parts of an adapter it cannot hold.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.adapter import Adapter
from graft.errors import FormatError, OutputError
from graft.formats import FORMATS, SERVERS, WRITERS, writer, written
from graft.formats.holding import carried, without

from .carrying import LINEAR, TARGET, adapters, assert_same_update, plain, site, through

ALL = {**WRITERS, **{f"for {name}": one for name, one in SERVERS.items()}}


@pytest.mark.parametrize("first", sorted(ALL))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(adapter=adapters())
def test_an_adapter_goes_through_any_two_formats(first: str, adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kept, back, rounded = through(ALL[first], adapter, Path(folder) / "one")
        assert_same_update(kept, back, rounded=rounded)
        for n, second in enumerate(sorted(ALL)):
            kept, again, rounded = through(ALL[second], back, Path(folder) / f"two-{n}")
            assert_same_update(kept, again, rounded=rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(ALL))
def test_every_format_holds_plain_linear_weights_without_rounding(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    adapter = plain(dtype=dtype)
    assert ALL[name].losses(adapter, TARGET) == []
    kept, back, rounded = through(ALL[name], adapter, tmp_path / "out")
    assert kept == adapter and not rounded
    assert back.format == ("peft" if name.startswith("for ") else name)
    assert_same_update(adapter, back, rounded=False)


@pytest.mark.parametrize("name", sorted(ALL))
def test_losses_are_refused_all_at_once_and_said_when_accepted(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = Adapter(
        {
            "rnn.weight_ih_l0": site("rnn.weight_ih_l0", 2, 1.0, torch.float32),
            **{n: site(n, 2, 1.0, torch.float32) for n in LINEAR},
        },
        rows={"tokens.embed_tokens.weight": ((1,), torch.ones(1, 3))},
    )
    losses = ALL[name].losses(adapter, TARGET)
    assert "rnn.weight_ih_l0" in {loss.name for loss in losses} or name == "loralib"
    with pytest.raises(FormatError, match="--accept-loss") as refused:
        written(adapter, tmp_path / "out", ALL[name], TARGET)
    assert all(loss.name in str(refused.value) and loss.why in str(refused.value) for loss in losses)
    assert not list(tmp_path.iterdir())
    notes = written(adapter, tmp_path / "out", ALL[name], TARGET, accept_loss=True).notes
    assert notes[: len(losses)] == [f"lost: {loss.name}: {loss.why}" for loss in losses]
    with pytest.raises(OutputError, match="already exists"):
        written(without(adapter, losses), tmp_path / "out", ALL[name], TARGET)


@pytest.mark.parametrize("name", sorted(ALL))
def test_nothing_left_and_unbound_are_errors(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no low-rank update"):
        written(Adapter({}), tmp_path / "out", ALL[name], TARGET)
    from graft.adapter import LowRank

    loose = Adapter({"a.weight": LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)})
    with pytest.raises(FormatError, match="not bound"):
        carried(ALL[name], loose, TARGET, accept=True)


@given(adapters(), st.sampled_from(sorted(ALL)))
@settings(max_examples=60, deadline=None)
def test_what_is_left_has_no_losses(adapter: Adapter, name: str) -> None:
    kept, notes = carried(ALL[name], adapter, TARGET, accept=True)
    assert ALL[name].losses(kept, TARGET) == []
    assert len(notes) == len(set(notes)) and all(note.startswith("lost: ") for note in notes)
    untouched = set(adapter.sites) & set(kept.sites)
    assert all(torch.equal(adapter.sites[n].B, kept.sites[n].B) for n in untouched)


def test_formats_that_are_only_read_are_named() -> None:
    for known in FORMATS:
        if known.name not in WRITERS:
            with pytest.raises(FormatError, match=f"{known.name}.*read only"):
                writer(known.name)
    with pytest.raises(FormatError, match="unknown format 'x'"):
        writer("x")
