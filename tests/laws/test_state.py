"""A state is all that later queries need: prefill, decoding and merging equal one call."""

import copy
import itertools
import pickle

import pytest
import torch
from cases import FEATURE_MAPS, MASKS, backends, inputs
from torch import Tensor

from performers import LinearState, SoftmaxFeatures, favor_attention

NORMS = ("1", "growing", "huge then tiny")
every_backend = pytest.mark.parametrize("backend", backends(has_state=True))


def continued(
    tensors: tuple[Tensor, Tensor, Tensor],
    phi: SoftmaxFeatures,
    cuts: list[int],
    mask: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, LinearState]:
    """Causal attention to one piece after another, the state handed on."""
    outputs, state = [], None
    for start, stop in itertools.pairwise([0, *cuts, tensors[0].shape[2]]):
        piece = (x[:, :, start:stop] for x in tensors)
        out, state = favor_attention(
            *piece,
            phi,
            is_causal=True,
            key_padding_mask=None if mask is None else mask[:, start:stop],
            enable_gqa=True,
            initial_state=state,
            return_state=True,
            **options,
        )
        outputs.append(out)
    return torch.cat(outputs, dim=2), state


def assert_same_state(state: LinearState, other: LinearState) -> None:
    """Equal sums, whatever the frame."""
    frame = torch.maximum(state.log_scale, other.log_scale)
    for mine, theirs in zip(
        state.rescaled(frame).parts().values(), other.rescaled(frame).parts().values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_pieces_with_carried_state_equal_the_whole(name, backend):
    phi = FEATURE_MAPS[name](5, 11)
    for norms, mask in zip(NORMS, ("no mask", "left", "holes"), strict=True):
        tensors = inputs(norms=norms, dtype=torch.float64)
        mask = MASKS[mask](23)
        whole = favor_attention(*tensors, phi, True, mask, enable_gqa=True, backend=backend)
        for cuts in ([5], [0, 7, 7, 20], list(range(1, 23))):
            pieces, _ = continued(tensors, phi, cuts, mask, backend=backend)
            torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6)


@every_backend
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_every_backend_leaves_the_state_of_the_definition(name, is_causal, backend):
    phi = FEATURE_MAPS[name](5, 11)
    mask = MASKS["holes"](23)
    query, key, value = inputs(dtype=torch.float64)
    _, state = favor_attention(
        query, key, value, phi, is_causal, mask, None, True, True, return_state=True,
        backend=backend,
    )  # fmt: skip
    features = phi.key_features(key * phi.default_scale**0.5).dense()
    features = features * mask[:, None, :, None]
    scale = state.log_scale.exp()
    torch.testing.assert_close(state.normalizer * scale, features.sum(dim=2), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        state.values * scale.unsqueeze(-1), features.mT @ value, rtol=1e-6, atol=1e-9
    )


@every_backend
def test_bidirectional_attention_continues_a_state_too(backend):
    phi = SoftmaxFeatures(5, 11)
    query, key, value = inputs()
    whole = favor_attention(query, key, value, phi, enable_gqa=True, backend=backend)
    _, state = favor_attention(
        query, key[:, :, :9], value[:, :, :9], phi, enable_gqa=True, return_state=True
    )
    rest = (key[:, :, 9:], value[:, :, 9:])
    out = favor_attention(query, *rest, phi, enable_gqa=True, initial_state=state, backend=backend)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_merging_is_associative_and_commutative(name, norms):
    phi = FEATURE_MAPS[name](5, 11)
    query, key, value = inputs(norms=norms, dtype=torch.float64)

    def state(start: int, stop: int) -> LinearState:
        keys, values = key[:, :, start:stop], value[:, :, start:stop]
        return favor_attention(query[:, :3], keys, values, phi, return_state=True)[1]

    whole, (a, b, c) = state(0, 23), (state(0, 5), state(5, 16), state(16, 23))
    assert_same_state(a.merge(b).merge(c), whole)
    assert_same_state(a.merge(b.merge(c)), whole)
    assert_same_state(c.merge(a).merge(b), whole)
    empty = LinearState.empty(2, 3, phi.num_features, 7, dtype=torch.float64)
    assert_same_state(empty.merge(whole), whole)
    assert_same_state(whole.merge(empty), whole)
    assert_same_state(empty.merge(empty), empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_is_float32_and_of_constant_size(dtype):
    phi = SoftmaxFeatures(5, 11)
    sizes = set()
    for length in (1, 23):
        _, state = continued(inputs(length, dtype=dtype), phi, [])
        assert {part.dtype for part in state.parts().values()} == {torch.float32}
        storages = [p.untyped_storage() for p in state.parts().values()]
        sizes.add(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
    assert len(sizes) == 1


def test_a_state_follows_its_rows_when_beams_are_reordered():
    phi = SoftmaxFeatures(5, 11)
    tensors = inputs()
    _, state = continued(tensors, phi, [11])
    index = torch.tensor([1, 0, 0])
    step = inputs(1, batch=3)
    expected, _ = continued(
        tuple(torch.cat([x[index], y], dim=2) for x, y in zip(tensors, step, strict=True)), phi, []
    )
    out = favor_attention(
        *step, phi, True, enable_gqa=True, initial_state=state.index_select(index)
    )
    torch.testing.assert_close(out, expected[:, :, -1:], rtol=1e-5, atol=1e-6)
    twice = state.repeat_interleave(2)
    assert torch.equal(twice.values, state.values[[0, 0, 1, 1]])


def test_a_detached_state_cuts_the_graph():
    phi = SoftmaxFeatures(5, 11)
    tensors = tuple(x.requires_grad_() for x in inputs())
    _, state = continued(tensors, phi, [])
    assert state.values.requires_grad
    assert not any(part.requires_grad for part in state.detach().parts().values())


def test_prefill_and_decoding_equal_the_parallel_run_after_8192_tokens(monkeypatch):
    monkeypatch.undo()  # the tiles that users get
    length, prefill, first_token = 8192, 3001, 7691
    phi = SoftmaxFeatures(8, 17)
    tensors = inputs(length, heads=2, key_heads=1, batch=1, dim=8, dtype=torch.bfloat16)
    parallel = favor_attention(*tensors, phi, is_causal=True, enable_gqa=True)
    cuts = [*range(prefill, first_token, 131), *range(first_token, length)]
    decoded, state = continued(tensors, phi, cuts)
    assert state.values.dtype == torch.float32
    torch.testing.assert_close(decoded, parallel, rtol=2**-7, atol=1e-5)  # one last place


def test_the_sums_of_many_tokens_do_not_stall():
    # In bfloat16 a sum of ones stops at 256, and attention over ones would return too much.
    phi = SoftmaxFeatures(8, 17)
    query, key, value = inputs(4099, heads=1, key_heads=1, batch=1, dim=8, dtype=torch.bfloat16)
    value = torch.ones_like(value)
    _, state = favor_attention(query, key, value, phi, is_causal=True, return_state=True)
    torch.testing.assert_close(state.values[..., 0], state.normalizer, rtol=1e-5, atol=0)
    token = (x[:, :, :1] for x in (query, key, value))
    out = favor_attention(*token, phi, is_causal=True, initial_state=state)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=0)


def other_features(name: str) -> dict[str, object]:
    """Maps of equal width whose features are others, by what makes them so."""
    same = {"redrawn": FEATURE_MAPS[name](5, 11), "loaded": FEATURE_MAPS[name](5, 11)}
    same["redrawn"].redraw()
    changed = {
        part: x + 1 if part == "omega" else x for part, x in same["loaded"].state_dict().items()
    }
    same["loaded"].load_state_dict(changed)
    return same


@pytest.mark.parametrize("name", ["positive", "relu", "sharp"])
def test_a_state_of_other_features_is_refused(name):
    tensors = inputs(heads=3)
    phi = FEATURE_MAPS[name](5, 11)
    options = {"is_causal": True, "return_state": True}
    _, state = favor_attention(*tensors, phi, **options)
    moved = state.detach().to("cpu").index_select(torch.tensor([1, 0])).repeat_interleave(1)
    for kept in (state, moved, pickle.loads(pickle.dumps(state.detach()))):
        for same in (phi, copy.deepcopy(phi), FEATURE_MAPS[name](5, 11)):
            favor_attention(*tensors, same, initial_state=kept, **options)
        for other in other_features(name).values():
            with pytest.raises(ValueError, match="initial_state must have been made by the same"):
                favor_attention(*tensors, other, initial_state=kept, **options)
        with pytest.raises(ValueError, match="or scale= differs"):
            favor_attention(*tensors, phi, initial_state=kept, scale=0.3, **options)
    _, other = favor_attention(*tensors, other_features(name)["redrawn"], **options)
    with pytest.raises(ValueError, match="can merge only if the same features"):
        state.merge(other)
    phi.redraw()
    with pytest.raises(ValueError, match="initial_state must have been made by the same"):
        favor_attention(*tensors, phi, initial_state=state, **options)


def test_a_state_of_an_earlier_calibration_is_refused():
    tensors = inputs(heads=3)
    phi = FEATURE_MAPS["sharp"](5, 11)
    _, state = favor_attention(*tensors, phi, True, return_state=True)
    phi.calibrate(tensors[0][:, :1], tensors[1][:, :1])
    with pytest.raises(ValueError, match="redrawn, calibrated or loaded since"):
        favor_attention(*tensors, phi, True, initial_state=state)
