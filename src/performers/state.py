"""What attention remembers of keys and values: sums of features, and the keys of a near field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.checks import check_count, check_instance, check_tensor, described
from performers.typing import FeatureMap

__all__ = ["LinearState", "Maker", "NearField", "NearKeys", "exp_difference"]


def exp_difference(
    exponent: Float[Tensor, "*#shape"], frame: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*#shape"]:
    """exp(exponent − frame), with exp(−∞ − frame) = 0 for every frame, −∞ included.

    A *frame* is what an online softmax calls its running maximum: the exponent relative to which a
    sum of exponentials is kept, so that exp is only taken of differences and nothing overflows. It
    is a factor common to numerator and normalizer, and cancels in the end.

    The exponent of nothing (a masked key, an empty state) is −∞. The frame of nothing is −∞ too,
    and −∞ − (−∞) would be NaN, hence this function. Every frame is at least its exponents.
    """
    # The clamp turns a frame of −∞ into the lowest finite number: −∞ minus that is −∞, not NaN.
    difference = exponent - frame.clamp(min=torch.finfo(frame.dtype).min)
    # exp2 costs a CPU a quarter of what exp does. log₂e is a literal, because dynamic compilation
    # makes inputs of floats that it reads, and loses them between recomputed tiles.
    return (difference * 1.4426950408889634).exp2()


class NearField(NamedTuple):
    """Which keys a query scores exactly. The other keys are estimated.

    The position of a token is the number of real tokens before it, and its block is position //
    window_size. Near a query are the keys of its own block and of the neighboring ones (causal: of
    the one before, and its own up to itself), and the first `num_sinks` tokens. The others are
    estimated by φ; without `far` they are left out, but for the `num_heavy` ones that near queries
    attended to most (`performers.backends.heavy`).
    """

    window_size: int
    num_sinks: int = 0
    far: bool = True
    num_heavy: int = 0

    @property
    def num_sums(self) -> int:
        """Near keys whose weights a state sums up."""
        return 2 * self.window_size if self.num_heavy else 0


@dataclass(frozen=True)
class NearKeys:
    """The keys and values that a near field needs one by one, before the token at position `count`.

    `key`, `value`: those of the next token's own block, which is not full yet, and of the block
    before it. Places that belong to no position from 0 to `count` are 0.
    `sink_key`, `sink_value`: of the first tokens, as far as there are any.
    `heavy_key`, `heavy_value`, `heavy_weight`: the heaviest of the far keys, and what near queries
    paid each on average, −∞ where there is no key. `heavy_sums`: what `key` got so far, where there
    are heavy keys.
    """

    key: Float[Tensor, "batch key_heads two_blocks dim"]
    value: Float[Tensor, "batch key_heads two_blocks value_dim"]
    sink_key: Float[Tensor, "batch key_heads num_sinks dim"]
    sink_value: Float[Tensor, "batch key_heads num_sinks value_dim"]
    heavy_key: Float[Tensor, "batch key_heads num_heavy dim"]
    heavy_value: Float[Tensor, "batch key_heads num_heavy value_dim"]
    heavy_weight: Float[Tensor, "batch key_heads num_heavy"]
    heavy_sums: Float[Tensor, "batch key_heads num_sums"]
    count: Int[Tensor, " batch"]

    @classmethod
    def empty(
        cls,
        key: Float[Tensor, "batch key_heads _ dim"],
        value: Float[Tensor, "batch key_heads _ value_dim"],
        near: NearField,
        dtype: torch.dtype,
    ) -> NearKeys:
        """What there is before the first token, for keys and values like these; weights of heavy
        keys are of `dtype`."""

        def zeros(x: Tensor, length: int) -> Tensor:
            return x.new_zeros(*x.shape[:2], length, x.shape[-1])

        return cls(
            key=zeros(key, 2 * near.window_size),
            value=zeros(value, 2 * near.window_size),
            sink_key=zeros(key, near.num_sinks),
            sink_value=zeros(value, near.num_sinks),
            heavy_key=zeros(key, near.num_heavy),
            heavy_value=zeros(value, near.num_heavy),
            heavy_weight=key.new_full((*key.shape[:2], near.num_heavy), -torch.inf, dtype=dtype),
            heavy_sums=key.new_zeros(*key.shape[:2], near.num_sums, dtype=dtype),
            count=torch.zeros(key.shape[0], dtype=torch.int64, device=key.device),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> NearKeys:
        """The same, with a function applied to every tensor."""
        return NearKeys(
            function(self.key),
            function(self.value),
            function(self.sink_key),
            function(self.sink_value),
            function(self.heavy_key),
            function(self.heavy_value),
            function(self.heavy_weight),
            function(self.heavy_sums),
            function(self.count),
        )


@dataclass(frozen=True)
class Maker:
    """The features, and their scale, that the sums of a state are of.

    Not a NamedTuple, for each of which torch.compile would make another graph.
    """

    features: tuple[object, ...]
    scale: float

    @classmethod
    def of(cls, phi: FeatureMap, scale: float) -> Maker | None:
        """None for features that have no `fingerprint`, as functions of one's own may have none."""
        features = getattr(phi, "fingerprint", None)
        return None if features is None else cls(features, scale)


@dataclass(frozen=True)
class LinearState:
    """All that linear attention remembers of the keys and values it has seen.

        normalizer_m = Σ_j φ_m(k_j) e^(−log_scale_m)
        values_m     = Σ_j φ_m(k_j) v_j e^(−log_scale_m)

    with one log-scale per feature, at least the largest exponent seen, so that every sum stays in
    range; −∞ in an empty state. The log-scale is a frame (see `exp_difference`), as the running
    maximum of an online softmax is. It cancels, so it is never differentiated.

    One object serves prefix sums, prefill and decoding, and ranks of a sequence-parallel group,
    because states merge associatively. With a near field (`window_size=`) the sums are those of the
    blocks that are far from the next token, and `near` has the other keys. Size: num_features ·
    (value_dim + 2) numbers per head at any length; with a near field two blocks of keys and values
    besides.

    `made_by`: whose sums these are; other features or another scale are refused. None, which goes
    with all: a state that is empty, was made while compiling, or by features without identity.

    Source: [V 1], Buf and the prefix sums G^PS of Choromanski et al. 2021, Section 2.5.1 and
    Appendix B.
    """

    log_scale: Float[Tensor, "batch key_heads num_features"]
    normalizer: Float[Tensor, "batch key_heads num_features"]
    values: Float[Tensor, "batch key_heads num_features value_dim"]
    near: NearKeys | None = None
    made_by: Maker | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        key_heads: int,
        num_features: int,
        value_dim: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> LinearState:
        """The state that has seen no key."""
        sizes = {"batch": batch, "key_heads": key_heads, "num_features": num_features}
        for name, size in (sizes | {"value_dim": value_dim}).items():
            if not isinstance(size, torch.SymInt):
                check_count(name, size, least=0)
        if device is not None:
            device = _device(device)
        check_instance("dtype", dtype, torch.dtype, "a dtype of torch")
        shape = (batch, key_heads, num_features)
        return cls(
            log_scale=torch.full(shape, -torch.inf, device=device, dtype=dtype),
            normalizer=torch.zeros(shape, device=device, dtype=dtype),
            values=torch.zeros(*shape, value_dim, device=device, dtype=dtype),
        )

    def rescaled(self, log_scale: Float[Tensor, "batch key_heads num_features"]) -> LinearState:
        """The same sums in another frame, which must not be so far below this one that exp
        overflows.
        """
        _check_like("log_scale", log_scale, self.log_scale)
        decay = exp_difference(self.log_scale, log_scale)
        values = self.values * decay.unsqueeze(-1)
        return replace(self, log_scale=log_scale, normalizer=self.normalizer * decay, values=values)

    def near_field(self) -> NearField | None:
        """The near field that this state was made with."""
        if self.near is None:
            return None
        # The near field is read off from shapes: two blocks of keys, the sinks, and no features if
        # nothing is far.
        size, sinks = self.near.key.shape[2] // 2, self.near.sink_key.shape[2]
        heavy = self.near.heavy_key.shape[2]
        return NearField(size, sinks, self.values.shape[2] > 0, heavy)

    def emptied(self, where: Bool[Tensor, "batch 1 1"]) -> LinearState:
        """The same sums, but 0 for some sequences of the batch."""
        shape = (len(self.values), 1, 1)
        _check_like("where", where, self.values.new_empty(shape, dtype=torch.bool))
        return replace(
            self,
            log_scale=self.log_scale.masked_fill(where, -torch.inf),
            normalizer=self.normalizer.masked_fill(where, 0.0),
            values=self.values.masked_fill(where.unsqueeze(-1), 0.0),
        )

    def merge(self, other: LinearState) -> LinearState:
        """The state of both key sets together. Associative and commutative up to rounding."""
        check_instance("other", other, LinearState, "a LinearState")
        if self.near is not None or other.near is not None:
            raise ValueError(
                "states with a window cannot merge: their recent keys are near for one sequence "
                "only. Merge states made with window_size=None."
            )
        makers = self.made_by, other.made_by
        if not torch.compiler.is_compiling() and None not in makers and makers[0] != makers[1]:
            raise ValueError(
                "states can merge only if the same features at the same scale made both: sums over "
                "one draw of ω and over another have nothing in common. Make both with one phi."
            )
        for name, part in self.parts().items():
            _check_like(f"other.{name}", getattr(other, name), part)
        # In the larger frame neither side can overflow; the smaller one may vanish, as it should.
        log_scale = torch.maximum(self.log_scale, other.log_scale)
        mine, theirs = self.rescaled(log_scale), other.rescaled(log_scale)
        return LinearState(
            log_scale,
            mine.normalizer + theirs.normalizer,
            mine.values + theirs.values,
            made_by=self.made_by or other.made_by,
        )

    def index_select(self, index: Int[Tensor, " chosen"]) -> LinearState:
        """The states of the given batch rows (reordering of beams)."""
        _check_index(index, len(self.values))
        return self.map(lambda part: part.index_select(0, index.to(part.device)))

    def repeat_interleave(self, repeats: int) -> LinearState:
        """Each batch row `repeats` times in succession (expansion to beams)."""
        check_count("repeats", repeats)
        return self.map(lambda part: part.repeat_interleave(repeats, dim=0))

    def detach(self) -> LinearState:
        """The same state cut off from the graph (truncated back-propagation through time)."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> LinearState:
        """The same state on another device; its precision is not the caller's to change."""
        device = _device(device)
        return self.map(lambda part: part.to(device))

    def parts(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name."""
        parts = {"log_scale": self.log_scale, "normalizer": self.normalizer, "values": self.values}
        if self.near is not None:
            parts |= {f"near.{name}": part for name, part in vars(self.near).items()}
        return parts

    def map(self, function: Callable[[Tensor], Tensor]) -> LinearState:
        """The state with a function of a tensor applied to every part."""
        if not callable(function):
            raise TypeError(f"function must be one of a tensor, got {described(function)}.")
        return LinearState(
            function(self.log_scale),
            function(self.normalizer),
            function(self.values),
            None if self.near is None else self.near.map(function),
            self.made_by,
        )


def _device(device: torch.device | str) -> torch.device:
    """Raise unless torch has such a device, and sees it if it is a GPU."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"device must be one of torch's, such as 'cpu' or 'cuda:0', got {described(device)}."
        ) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one that torch sees, got {str(found)!r}, and it sees "
            f"{torch.cuda.device_count()} GPUs."
        )
    return found


def _check_like(name: str, given: Tensor, part: Tensor) -> None:
    """Raise unless a tensor has the shape and the dtype of a part of a state, or of a mask."""
    check_tensor(name, given)
    if given.device != part.device:
        raise ValueError(
            f"{name} must be on the device of this state: it is on {given.device}, the state on "
            f"{part.device}. Move it with .to({str(part.device)!r})."
        )
    if given.shape != part.shape or given.dtype != part.dtype:
        raise ValueError(
            f"{name} must be {part.dtype} of shape {tuple(part.shape)} for this state, got "
            f"{given.dtype} of shape {tuple(given.shape)}: two states go together if they are of "
            "one batch, feature map, value_dim and dtype."
        )


def _check_index(index: Tensor, batch: int) -> None:
    """Raise unless these are numbers of batch rows, as far as the CPU knows them."""
    check_tensor("index", index)
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "index must be a vector of whole numbers, int32 or int64, one for each batch row that "
            f"is chosen, got {index.dtype} of shape {tuple(index.shape)}."
        )
    if (
        torch.compiler.is_compiling()
        or index.device.type != "cpu"
        or torch._C._functorch.is_batchedtensor(index)
    ):
        return  # a GPU would have to be waited for
    outside = index[(index < 0) | (index >= batch)]
    if outside.numel():
        raise ValueError(
            f"index must hold numbers of batch rows, 0 to {batch - 1}, got {int(outside[0])}."
        )
