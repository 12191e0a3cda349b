"""The checksum is one number on every road, and sees what must be seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft import checksum, kernel


@given(st.binary(max_size=20000), st.integers(0, 3))
def test_kernel_and_torch_agree_and_parts_add_up(data: bytes, cut: int) -> None:
    flat = torch.frombuffer(bytearray(data + b"\0"), dtype=torch.uint8)[: len(data)]
    whole = checksum.checksum(flat)
    at = min(cut * checksum.CHUNK, flat.numel())
    parts = checksum.update(flat[:at], 0) + checksum.update(flat[at:], at if at % 4096 == 0 else 0)
    if at % 4096 == 0:
        assert checksum.finish(parts, flat.numel()) == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "usable", lambda tensor: False)
        assert checksum.checksum(flat) == whole


@given(st.integers(1, 9000), st.data())
def test_one_flipped_bit_two_swapped_words_and_length_are_seen(size: int, data: st.DataObject) -> None:
    torch.manual_seed(size)
    flat = torch.randint(0, 256, (size,), dtype=torch.uint8)
    before = checksum.checksum(flat)
    at, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    flipped = flat.clone()
    flipped[at] ^= 1 << bit
    assert checksum.checksum(flipped) != before
    assert checksum.checksum(torch.cat([flat, flat.new_zeros(1)])) != before
    rolled = flat.roll(4)
    if not torch.equal(rolled, flat):
        assert checksum.checksum(rolled) != before


def test_two_flipped_top_bits_do_not_cancel() -> None:
    words = torch.zeros(2048, dtype=torch.int32)
    seen = {checksum.checksum(words)}
    for i in range(64):
        flipped = words.clone()
        flipped[i], flipped[i + 1] = -(2**31), -(2**31)
        seen.add(checksum.checksum(flipped))
    assert len(seen) == 65


def test_dense_strides_are_read_in_memory_order() -> None:
    x = torch.randn(4, 3, 5, 5)
    last = x.to(memory_format=torch.channels_last)
    y = torch.randn(7, 9)
    assert checksum.checksum(y.T) == checksum.checksum(y)
    assert checksum.checksum(last) == checksum.checksum(last.permute(0, 2, 3, 1).contiguous())
    assert checksum.checksum(x[:, ::2]) == checksum.checksum(x[:, ::2].contiguous())
