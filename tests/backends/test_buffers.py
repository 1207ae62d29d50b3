"""Memory that tiles reuse, and the cuts that make tiles."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from performers.backends.buffers import Buffers, slices


@pytest.fixture
def buffers():
    """Full of NaN, so that whatever is not written shows."""
    buffers = Buffers()
    for name in ("product", "joined", "copied"):
        buffers.take(name, (1000,), torch.zeros(1)).fill_(torch.nan)
    return buffers


def test_a_name_stands_for_one_memory_as_long_as_that_is_large_enough(buffers):
    like = torch.zeros(1)
    first = buffers.take("tile", (3, 5), like)
    again = buffers.take("tile", (3, 5), like)
    reshaped, smaller = buffers.take("tile", (15,), like), buffers.take("tile", (2, 7), like)
    assert {x.data_ptr() for x in (again, reshaped, smaller)} == {first.data_ptr()}
    assert (reshaped.shape, smaller.shape) == ((15,), (2, 7))
    larger = buffers.take("tile", (4, 5), like)
    assert larger.shape == (4, 5)
    assert buffers.take("tile", (3, 5), like).data_ptr() == larger.data_ptr()


def test_other_names_precisions_and_threads_have_other_memory(buffers):
    like = torch.zeros(1)
    first = buffers.take("tile", (3, 5), like)
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(buffers.take, "tile", (3, 5), like).result()
    others = buffers.take("other", (3, 5), like), buffers.take("tile", (3, 5), like.double())
    assert others[1].dtype == torch.float64
    pointers = {x.data_ptr() for x in (first, elsewhere, *others)}
    assert len(pointers) == 4


def test_another_device_looks_after_its_own_memory(buffers):
    x = buffers.take("tile", (3, 5), torch.zeros(1, device="meta", dtype=torch.float64))
    assert (x.device.type, x.dtype, x.shape) == ("meta", torch.float64, (3, 5))
    assert buffers.take("tile", (3, 5), torch.zeros(1, dtype=torch.float64)).device.type == "cpu"


@pytest.mark.parametrize("factor", [1.0, 2.0, -0.25])
def test_a_product_is_written_over_whatever_was_there(buffers, factor):
    left, right = torch.randn(2, 3, 5), torch.randn(2, 5, 7)
    found = buffers.product("product", left, right, factor)
    torch.testing.assert_close(found, factor * (left @ right))


def test_columns_are_joined_and_numbers_copied(buffers):
    columns = [torch.randn(2, 3, width) for width in (5, 1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # memory of another size would be resized, with a warning
        joined = buffers.joined("joined", columns)
    assert torch.equal(joined, torch.cat(columns, dim=2))
    half = torch.randn(2, 3, 5).bfloat16()
    copied = buffers.copied("copied", half, columns[0])
    assert copied.dtype == torch.float32
    assert torch.equal(copied, half.float())


def test_the_largest_are_given_back_until_the_rest_is_small_enough(buffers):
    like, wanted = torch.zeros(1), {"product": 1000, "joined": 2000, "copied": 3000}
    taken = {name: buffers.take(name, (size,), like).data_ptr() for name, size in wanted.items()}

    def kept():
        return {name for name in wanted if (name, like.dtype) in buffers._flat}

    buffers.trim(24_000)
    assert kept() == set(wanted)
    buffers.trim(23_999)
    assert kept() == {"product", "joined"}
    assert buffers.take("product", (1000,), like).data_ptr() == taken["product"]
    buffers.trim(0)
    assert kept() == set()


@pytest.mark.parametrize(("length", "size"), [(13, 5), (10, 5), (3, 5), (0, 5)])
def test_cuts_cover_the_length_once_and_in_order(length, size):
    cuts = list(slices(length, size))
    assert [place for cut in cuts for place in range(length)[cut]] == list(range(length))
    assert all(cut.stop - cut.start == size for cut in cuts[:-1])
    assert all(0 < cut.stop - cut.start <= size and cut.stop <= length for cut in cuts)
