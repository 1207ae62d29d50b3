"""Peak memory is that of tensors, and alike in every run; resident memory is of the process."""

import sys

import pytest
import torch

from performers.records.environment import PeakMemory, peak_of_tensors
from performers.train import Run, load_config

MEBIBYTE = 2**20


def test_the_peak_of_tensors_is_what_was_held_at_a_time():
    before = torch.zeros(MEBIBYTE, dtype=torch.uint8)

    def call():
        first, second = (torch.zeros(size * MEBIBYTE, dtype=torch.uint8) for size in (4, 2))
        del first
        return before, second, torch.zeros(3 * MEBIBYTE, dtype=torch.uint8)

    for _ in range(2):
        assert peak_of_tensors(call) == 6 * MEBIBYTE
    assert peak_of_tensors(lambda: None) == 0


def test_what_a_call_leaves_is_not_counted_for_the_next():
    left = []
    for _ in range(2):
        size = peak_of_tensors(lambda: left.append(torch.zeros(MEBIBYTE, dtype=torch.uint8)))
        assert size == MEBIBYTE


def test_what_lies_where_an_earlier_call_has_left_something_is_no_credit():
    places = set()

    def leave():
        return [places.add(x.data_ptr()) or x for x in map(torch.zeros, [MEBIBYTE] * 8)]

    left = []
    peak_of_tensors(lambda: left.extend(leave()))
    left.clear()
    again = [torch.zeros(MEBIBYTE) for _ in range(8)]
    if not places & {x.data_ptr() for x in again}:
        pytest.skip("this allocator does not use memory again")

    def call():
        again.clear()
        return torch.zeros(MEBIBYTE)

    assert peak_of_tensors(call) == 4 * MEBIBYTE


def test_what_a_call_frees_of_what_was_there_is_no_credit():
    held = [torch.zeros(4 * MEBIBYTE, dtype=torch.uint8)]

    def call():
        held.pop()
        return torch.zeros(MEBIBYTE, dtype=torch.uint8)

    assert peak_of_tensors(call) == MEBIBYTE


@pytest.fixture(scope="module")
def runs(config_file, tmp_path_factory):
    """The models of two runs of the same config."""
    folder = tmp_path_factory.mktemp("memory")
    torch.set_num_threads(1)
    return [
        Run.prepare(load_config(config_file), folder / name).train()["models"]
        for name in ("first", "second")
    ]


def test_the_peak_memory_of_a_run_is_that_of_another(runs):
    first, second = ([model["peak_memory"] for model in models] for models in runs)
    assert first == second


def test_it_holds_weights_gradients_and_optimizer_state(runs):
    for model in runs[0]:
        assert model["peak_memory"] > 4 * 4 * model["parameters"]  # with two moments of AdamW


@pytest.mark.skipif(sys.platform != "linux", reason="where the system says it")
def test_the_resident_memory_of_a_run_is_known(runs):
    assert all(model["resident_memory"] > 0 for model in runs[0])


@pytest.mark.skipif(sys.platform != "linux", reason="where the system says it")
def test_resident_memory_is_what_the_process_took_at_its_peak():
    memory = PeakMemory()
    torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
    assert memory.measure() == pytest.approx(64 * MEBIBYTE, rel=0.1)
