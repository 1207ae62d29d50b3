"""Attention over pieces of a sequence, one on each rank, is attention over the whole."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from performers import KernelFeatures, SharpFeatures, SoftmaxFeatures, favor_attention
from performers.distributed import sequence_parallel_attention
from performers.distributed.sharp import fitted_to_all

DIM, VALUE_DIM, HEADS, KEY_HEADS, PROJECTIONS = 7, 5, 6, 3, 11
# Pieces of very different lengths: some shorter than a block, one of a single token.
PIECES = {2: (29, 24), 3: (11, 1, 41), 4: (19, 1, 5, 28)}
LENGTH = 53


def split(x, number, dim):
    """The piece of this rank."""
    return x.split(PIECES[number], dim)[dist.get_rank()]


def calibrated():
    phi = SharpFeatures(DIM, PROJECTIONS, num_heads=KEY_HEADS)
    phi.calibrate(torch.randn(2, HEADS, 31, DIM), torch.randn(2, KEY_HEADS, 31, DIM))
    return phi


FEATURES = {
    "positive": lambda: SoftmaxFeatures(DIM, PROJECTIONS),
    "hyperbolic": lambda: SoftmaxFeatures(DIM, PROJECTIONS, "hyperbolic"),
    "relu": lambda: KernelFeatures(DIM, PROJECTIONS),
    "exp": lambda: KernelFeatures(DIM, PROJECTIONS, fn="exp"),
    "elu+1 without ω": lambda: KernelFeatures(DIM, fn="elu+1", projection=None),
    "a function": lambda: KernelFeatures(DIM, PROJECTIONS, fn=torch.nn.functional.softplus),
    "calibrated": calibrated,
    "sharp": lambda: SharpFeatures(DIM, PROJECTIONS, num_heads=KEY_HEADS, statistics="call"),
}


NONE = {}


class Case(NamedTuple):
    """One call of attention, whole and in pieces."""

    features: str = "positive"
    has_padding: bool = False
    options: dict = NONE

    def __str__(self):
        return f"{self.features}, padding {self.has_padding}, {self.options}"


def inputs(dtype=torch.float64, length=LENGTH):
    """Queries, keys whose norms grow along the sequence, values, a mask and a gradient."""
    generator = torch.Generator().manual_seed(3)

    def draw(heads, dim):
        return torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64)

    key = draw(KEY_HEADS, DIM) * torch.linspace(0.3, 3, length, dtype=torch.float64)[:, None]
    mask = torch.rand(2, length, generator=generator) > 0.3
    # A piece of padding alone, at the begin of one sequence and at the end of the other.
    mask[0, :12], mask[1, 40:] = False, False
    tensors = draw(HEADS, DIM), key, draw(KEY_HEADS, VALUE_DIM), draw(HEADS, VALUE_DIM)
    query, key, value, gradient = (x.to(dtype) for x in tensors)
    return query, key, value, mask, gradient


def worst_error(case, number, dtype=torch.float64):
    """Of the output and the gradients of this rank's piece, relative to the largest entry."""
    *rows, mask, gradient = inputs(dtype)
    mask = mask if case.has_padding else None
    if mask is not None:
        gradient = gradient * mask[:, None, :, None]  # outputs of padding mean nothing
    torch.manual_seed(0)
    phi = FEATURES[case.features]()
    whole = [x.clone().requires_grad_() for x in rows]
    expected = favor_attention(*whole, phi, key_padding_mask=mask, enable_gqa=True, **case.options)
    expected.backward(gradient)
    own = [split(x, number, 2).clone().requires_grad_() for x in rows]
    own_mask = None if mask is None else split(mask, number, 1)
    out = sequence_parallel_attention(
        *own, phi, dist.group.WORLD, key_padding_mask=own_mask, enable_gqa=True, **case.options
    )
    out.backward(split(gradient, number, 2))
    shown = 1.0 if own_mask is None else own_mask[:, None, :, None].to(dtype)
    pairs = [(out.detach() * shown, split(expected, number, 2) * shown, expected)]
    pairs += [(x.grad, split(y.grad, number, 2), y.grad) for x, y in zip(own, whole, strict=True)]
    return max(float((x - y).abs().max() / z.abs().max()) for x, y, z in pairs)


def errors_of(cases, number, dtype=torch.float64):
    return {str(case): worst_error(case, number, dtype) for case in cases}


CASES = [
    Case("relu", False, {"is_causal": False, "normalize": False}),
    Case("hyperbolic", True, {"is_causal": False}),
    Case("positive", False, {"window_size": 20, "far_limit": 0.2}),
    Case("sharp", True, {"window_size": 4, "num_sinks": 2}),
    Case("relu", True, {"is_causal": True}),
    Case("calibrated", True, {"is_causal": True, "window_size": 4, "num_sinks": 3}),
    Case("positive", False, {"is_causal": True}),
]
# More ranks take more time.
FEW = {2: CASES, 3: CASES[3:], 4: CASES[5:]}

GRID = [
    Case(features, has_padding, {"is_causal": is_causal})
    for features in FEATURES
    for has_padding in (False, True)
    for is_causal in (False, True)
    if features != "sharp" or not is_causal
] + [
    Case(features, has_padding, {"is_causal": is_causal, "window_size": size, **options})
    for features, is_causal in (("sharp", False), ("calibrated", False), ("calibrated", True))
    for has_padding in (False, True)
    for size in (1, 4, 7, 100)
    for options in (
        {},
        {"num_sinks": 3},
        {"num_sinks": 30, "far_limit": 0.2},
        {"num_sinks": 2, "far": False},
    )
]


@pytest.mark.parametrize("number", PIECES)
def test_pieces_on_ranks_give_the_outputs_and_gradients_of_the_whole(number):
    for errors in on_ranks(number, errors_of, FEW[number], number):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("number", PIECES)
def test_they_do_for_every_kind_of_features_and_near_field(number):
    for errors in on_ranks(number, errors_of, GRID, number):
        assert max(errors.values()) < 1e-12, errors


def test_float32_loses_no_more_than_rounding():
    cases = [Case("positive", False, {"is_causal": is_causal}) for is_causal in (False, True)]
    for errors in on_ranks(3, errors_of, cases, 3, torch.float32):
        assert max(errors.values()) < 16 * torch.finfo(torch.float32).eps, errors


# Pieces of whole chunks (16 positions) and whole blocks (8): the products of a piece then have the
# shapes that they have in the whole.
ALIGNED = (64, 32, 32)
NEAR = {"window_size": 8, "far": False}


def equal_bits(phi, options):
    """Whether the output, and the gradient of queries, of this rank's piece are those of the whole,
    bit by bit.
    """
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(2, 2, sum(ALIGNED), 8, generator=generator) for _ in range(4)]
    query, key, value, gradient = rows
    whole = query.clone().requires_grad_()
    expected = favor_attention(whole, key, value, phi, **options)
    expected.backward(gradient)
    own = [x.split(ALIGNED, 2)[dist.get_rank()].clone() for x in rows]
    own[0].requires_grad_()
    out = sequence_parallel_attention(*own[:3], phi, dist.group.WORLD, **options)
    out.backward(own[3])
    pairs = ((out, expected), (own[0].grad, whole.grad))
    return all(torch.equal(x, y.split(ALIGNED, 2)[dist.get_rank()]) for x, y in pairs)


def test_where_sums_keep_their_order_pieces_are_the_whole_bit_by_bit():
    """In causal attention nothing comes before the first piece, and a near field alone takes its
    keys one by one. Elsewhere states are summed by pieces.
    """
    positive, hyperbolic = SoftmaxFeatures(8, 16), SoftmaxFeatures(8, 8, "hyperbolic")
    sharp = SharpFeatures(8, 16, num_heads=2)
    sharp.calibrate(torch.randn(2, 2, 31, 8), torch.randn(2, 2, 31, 8))
    causal = {"is_causal": True}
    of_first = [(phi, causal) for phi in (positive, hyperbolic, sharp)]
    of_first += [(positive, causal | NEAR | {"far": True})]
    of_all = [(positive, NEAR), (positive, NEAR | causal)]

    def run():
        return [[equal_bits(*case) for case in cases] for cases in (of_first, of_all)]

    for rank, (first, near) in enumerate(on_ranks(3, run)):
        assert all(near), near
        assert rank > 0 or all(first), first


@pytest.mark.parametrize("options", [{}, {"window_size": 4, "num_sinks": 2}])
def test_later_pieces_leave_no_trace_in_earlier_ones(options):
    *rows, _, _ = inputs(torch.float32)
    phi = SoftmaxFeatures(DIM, PROJECTIONS)

    def outputs():
        found = []
        for later in (1.0, 30.0, torch.nan):
            own = [split(x, 3, 2) for x in rows]
            if dist.get_rank() == 2:
                own = [x * later for x in own]
            out = sequence_parallel_attention(
                *own, phi, dist.group.WORLD, is_causal=True, enable_gqa=True, **options
            )
            found.append(out)
        return found

    first, second, _ = on_ranks(3, outputs)
    for small, large, none in (first, second):
        assert torch.equal(small, large)
        assert torch.equal(small, none)


class Exchanged(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "c10d":
            tensors = torch.utils._pytree.tree_leaves(arguments)
            self.bytes += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return function(*arguments, **options or {})


def exchanged(length, options, features="positive"):
    """Bytes that a rank exchanges for a call, forward and backward."""
    query, key, value, _, gradient = inputs(torch.float32, length)
    phi = FEATURES[features]()
    rows = [x.requires_grad_() for x in (query, key, value)]
    with Exchanged() as counted:
        out = sequence_parallel_attention(*rows, phi, dist.group.WORLD, enable_gqa=True, **options)
        out.backward(gradient)
    return counted.bytes


@pytest.mark.parametrize(
    ("features", "options"),
    [
        ("positive", {"is_causal": True}),
        ("positive", {"is_causal": False}),
        ("positive", {"is_causal": True, "window_size": 4, "num_sinks": 2}),
        ("sharp", {"window_size": 4}),
    ],
)
def test_what_ranks_exchange_does_not_grow_with_the_length(features, options):
    def both():
        # Beyond the 997 positions of which sharp features take statistics.
        return [exchanged(length, options, features) for length in (521, 1031)]

    for short, long in on_ranks(2, both):
        assert short == long > 0


def test_bidirectional_attention_exchanges_one_state_each_way():
    def one():
        return exchanged(31, {"is_causal": False})

    state = 2 * KEY_HEADS * PROJECTIONS * 4
    frames, sums, gradients = state, state * (VALUE_DIM + 1), state * (VALUE_DIM + 1)
    headers = 3 * 8 * 3  # three numbers of this rank, and those of both
    for count in on_ranks(2, one):
        assert count == frames + sums + gradients + headers


def test_each_rank_learns_the_sharp_features_of_one_process():
    length = 2003
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, HEADS, length, DIM, generator=generator)
    key = torch.randn(2, KEY_HEADS, length, DIM, generator=generator)
    mask = torch.rand(2, length, generator=generator) > 0.2
    phi = FEATURES["sharp"]()
    expected = phi.fitted(query, key, mask, scale=0.3, is_streaming=False)

    def fitted():
        piece = (slice(0, 600), slice(600, 1999), slice(1999, None))[dist.get_rank()]
        return fitted_to_all(
            phi,
            query[:, :, piece],
            key[:, :, piece],
            mask[:, piece],
            dist.group.WORLD,
            scale=0.3,
            length=length,
        ).reparametrization

    for found in on_ranks(3, fitted):
        for part, whole in zip(found, expected.reparametrization, strict=True):
            assert torch.equal(part, whole)


def test_checkpointed_attention_has_the_same_gradients():
    *rows, _, gradient = inputs()
    phi = SoftmaxFeatures(DIM, PROJECTIONS)

    def gradients(is_checkpointed):
        own = [split(x, 2, 2).clone().requires_grad_() for x in rows]

        def attend(*own):
            return sequence_parallel_attention(
                *own, phi, dist.group.WORLD, is_causal=True, enable_gqa=True
            )

        out = checkpoint(attend, *own, use_reentrant=False) if is_checkpointed else attend(*own)
        out.backward(split(gradient, 2, 2))
        return [x.grad for x in own]

    def both():
        return gradients(False), gradients(True)

    for plain, checkpointed in on_ranks(2, both):
        assert all(torch.equal(x, y) for x, y in zip(plain, checkpointed, strict=True))


def test_a_compiled_function_breaks_there_and_computes_the_same():
    *rows, _, _ = inputs(torch.float32)
    phi = SoftmaxFeatures(DIM, PROJECTIONS)

    def attend(query, key, value):
        return 2 * sequence_parallel_attention(
            query, key, value, phi, dist.group.WORLD, is_causal=True, enable_gqa=True
        )

    def both():
        own = [split(x, 2, 2) for x in rows]
        return attend(*own), torch.compile(attend, backend="eager")(*own)

    for plain, compiled in on_ranks(2, both):
        torch.testing.assert_close(plain, compiled)


def refusal(change):
    """What each of two ranks says where one of them does something else."""
    query, key, value, *_ = inputs(torch.float32)
    arguments = {"query": query, "key": key, "value": value, "phi": SoftmaxFeatures(DIM, 11)}
    arguments |= {"is_causal": True, "enable_gqa": True}

    def attempt():
        own = dict(arguments)
        if dist.get_rank() == 1:
            own |= change
        try:
            sequence_parallel_attention(mesh=dist.group.WORLD, **own)
        except (TypeError, ValueError) as error:
            return str(error)
        return "nothing"

    return on_ranks(2, attempt)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"phi": SoftmaxFeatures(DIM, 11, seed=1)}, "same features"),
        ({"is_causal": False}, "same is_causal"),
        ({"scale": 0.5}, "same scale"),
        ({"query": torch.zeros(3, HEADS, LENGTH, DIM)}, "same batch"),
        ({"value": torch.zeros(2, KEY_HEADS, LENGTH - 1, 5)}, "key and value must agree"),
        ({"key_padding_mask": torch.ones(2, 9)}, "key_padding_mask must be bool"),
        ({"num_heavy": 3, "far": False, "window_size": 4}, "num_heavy=3 needs all blocks"),
        ({"phi": "positive"}, "phi must be a feature map"),
        ({"query": torch.zeros(2, HEADS, LENGTH, DIM, requires_grad=True)}, "need of gradients"),
    ],
)
def test_all_ranks_say_what_one_of_them_does_otherwise(change, word):
    # A batch of another size on one rank goes through all of its tensors.
    if "query" in change and len(change["query"]) == 3:
        change = change | {
            "key": torch.zeros(3, KEY_HEADS, LENGTH, DIM),
            "value": torch.zeros(3, KEY_HEADS, LENGTH, VALUE_DIM),
        }
    first, second = refusal(change)
    assert word in first, first
    assert word in second, second


@pytest.mark.usefixtures("without_shape_checks")
def test_what_is_no_mesh_of_one_dimension_is_refused():
    rows = [torch.zeros(1, 1, 3, DIM)] * 3
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh of one dimension"):
        sequence_parallel_attention(*rows, SoftmaxFeatures(DIM), 2)

    def attempt():
        mesh = torch.distributed.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tokens"))
        out = sequence_parallel_attention(*rows, SoftmaxFeatures(DIM), mesh["tokens"])
        try:
            sequence_parallel_attention(*rows, SoftmaxFeatures(DIM), mesh)
        except ValueError as error:
            return str(error), out.shape
        return "nothing", out.shape

    for said, shape in on_ranks(2, attempt):
        assert "this one has 2: ('data', 'tokens')" in said
        assert shape == (1, 1, 3, DIM)
