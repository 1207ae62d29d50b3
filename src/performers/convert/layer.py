"""`FavorLayer`: what a converted attention layer owns besides its pretrained weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from performers.convert.options import FavorOptions
from performers.functional.favor import favor_attention
from performers.functional.masks import Seen
from performers.functional.segments import attend_by_segment
from performers.functional.softmax import softmax_attention
from performers.nn.feature_maps import KernelFeatures, SoftmaxFeatures
from performers.nn.sharp import SharpFeatures
from performers.state import LinearState
from performers.typing import FeatureMap

__all__ = ["FavorLayer", "drop_keys"]


class FavorLayer(nn.Module):
    """FAVOR+ for one attention layer of a pretrained model: its feature map and its window.

    It is a child of the attention module. Its buffers are not saved with the model: φ is drawn
    again from the options, which are in config.json, and calibration has a file of its own.

    φ is made by the first call, or by `prepare`, because it needs the dim of a head, which has a
    different name in each architecture. `number` is the number of the layer; layers with different
    numbers get different draws.

    `is_cross`: keys are those of another sequence. Positions do not correspond then, so there is no
    window, even between sequences of one length. Nor are there statistics of the call: those of a
    decoder's queries would tell each position about later ones, and in generation there is only one
    query at a time.

    `attend`: `favor_attention`, or a function of the same arguments for whole sequences, as over
    the pieces of a sequence that is split (`performers.distributed`).
    """

    feature_map: SharpFeatures | SoftmaxFeatures | KernelFeatures | None
    attend: Callable[..., Tensor] = staticmethod(favor_attention)

    def __init__(self, options: FavorOptions, number: int, is_cross: bool = False) -> None:
        super().__init__()
        self.options = options
        self.number = number
        self.is_cross = is_cross
        self.is_calibrated = False
        self.feature_map = None

    def prepare(self, dim: int, device: torch.device, num_heads: int = 1) -> None:
        """Draw φ for heads of this dim. The result depends on nothing else but the options."""
        # A first call may come under autocast or in inference mode. The draw must not depend on
        # that, and tensors made in inference mode could never be used in training.
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            self.attach(self.new_feature_map(dim, num_heads).to(device))

    def new_feature_map(
        self, dim: int, num_heads: int
    ) -> SharpFeatures | SoftmaxFeatures | KernelFeatures:
        """A new φ for heads of this dim, which has learned nothing."""
        return self.options.feature_map(dim, num_heads, self.number, self.is_cross)

    def attach(self, feature_map: SharpFeatures | SoftmaxFeatures | KernelFeatures) -> None:
        """Make this the feature map, but keep it out of the model's state dict."""
        for module in feature_map.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)
        self.feature_map = feature_map

    def load(self, buffers: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the buffers of a feature map that was calibrated or redrawn."""
        heads = len(buffers["query_count"]) if "query_count" in buffers else 1
        # a kernel without ω acts on inputs of any dim
        dim = buffers["omega"].shape[1] if "omega" in buffers else 1
        feature_map = self.new_feature_map(dim, heads)
        feature_map.load_state_dict(dict(buffers))
        self.is_calibrated = "query_count" in buffers and bool(buffers["query_count"].any())
        self.attach(feature_map.to(device))

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None,
        scale: float | None,
        segment_ids: Int[Tensor, "batch key_length"] | None = None,
        prefix_lengths: Int[Tensor, " batch"] | None = None,
        seen_lengths: Int[Tensor, "batch query_length"] | None = None,
    ) -> Float[Tensor, "batch heads query_length value_dim"]:
        """`favor_attention` with this layer's φ, except for heads that stay exact. In causal
        attention there may be fewer queries than keys: they are then the last positions of the
        sequence. The other arguments are those of `favor_attention`.

        Raises ValueError for statistics of the call in cross-attention.
        """
        if segment_ids is not None:
            attend = partial(self.forward, is_causal=is_causal, scale=scale)
            return attend_by_segment(attend, segment_ids, query, key, value, key_padding_mask)
        streams = is_causal or seen_lengths is not None
        phi = self.feature_map_for(query, is_causal=streams)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query_length, key_length = query.shape[2], key.shape[2]
        near_field = self.options.near_field()
        if self.is_cross or (not streams and query_length != key_length):
            near_field = {}  # tokens of two sequences have no distance, so none are near
        # One query, the last of several keys, sees them all: the same in both directions, without a
        # scan.
        is_last = is_causal and query_length == 1 < key_length and not near_field
        # Causal attention takes one query per key. Without a state of what came before, queries of
        # the past are zeros, and their outputs are cut off at the end: it costs as much as the
        # whole sequence.
        if is_causal and not is_last and query_length < key_length:
            query = F.pad(query, (0, 0, key_length - query_length, 0))
        lengths = {"prefix_lengths": prefix_lengths, "seen_lengths": seen_lengths}
        out = self.attend(
            query,
            key,
            value,
            phi,
            is_causal=is_causal and not is_last,
            key_padding_mask=key_padding_mask,
            scale=scale,
            enable_gqa=True,
            # A sequence that is split over ranks has none.
            **{name: given for name, given in lengths.items() if given is not None},
            **near_field,
        )
        heads = self.options.exact_heads.get(self.number)
        if heads:
            group = query.shape[1] // key.shape[1]
            # Query heads of one group share a key head, so a key head may be listed more than once.
            key_heads = [head // group for head in heads]
            exact = softmax_attention(
                query[:, heads],
                key[:, key_heads],
                value[:, key_heads],
                is_causal=is_causal and not is_last,
                key_padding_mask=key_padding_mask,
                scale=scale,
                prefix_lengths=prefix_lengths,
                seen_lengths=seen_lengths,
            )
            # φ has numbers for every head, so all are estimated and these replaced.
            out = out.index_copy(1, torch.tensor(heads, device=out.device), exact)
        return out[:, :, out.shape[2] - query_length :]

    def resume(
        self,
        query: Float[Tensor, "batch heads length dim"],
        key: Float[Tensor, "batch key_heads length dim"],
        value: Float[Tensor, "batch key_heads length value_dim"],
        *,
        seen: Seen,
        scale: float | None,
        state: LinearState | None,
        phi: FeatureMap | None,
    ) -> tuple[Float[Tensor, "batch heads length value_dim"], LinearState, FeatureMap]:
        """Attention of positions that continue a sequence, causal but for a prefix or for blocks
        that see each other. Returns also the state after them and the φ that this state belongs to,
        for the next call. Both are None before the first call.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if phi is None:
            feature_map = self.feature_map_for(query, is_causal=True)
            phi = feature_map.fitted(
                query, key, seen.key_padding_mask, scale=scale, is_streaming=True
            )
        out, state = favor_attention(
            query,
            key,
            value,
            phi,
            is_causal=seen.seen_lengths is None,
            key_padding_mask=seen.key_padding_mask,
            prefix_lengths=seen.prefix_lengths,
            seen_lengths=seen.seen_lengths,
            scale=scale,
            enable_gqa=True,
            initial_state=state,
            return_state=True,
            **self.options.near_field(),
        )
        return out, state, phi

    def feature_map_for(
        self, query: Tensor, *, is_causal: bool
    ) -> SharpFeatures | SoftmaxFeatures | KernelFeatures:
        """φ for this kind of attention; a new one if there is none yet for heads of this dim."""
        # `head_dim` may have guessed wrong. What was calibrated has seen the true dim.
        if self.feature_map is None or (
            self.feature_map.dim != query.shape[-1] and not self.is_calibrated
        ):
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "a converted layer draws its random features in its first call, which cannot "
                    "be compiled: call the model once before torch.compile."
                )
            self.prepare(query.shape[-1], query.device)
        phi = self.feature_map
        assert phi is not None, "prepare() makes one"
        if self.is_cross and self.options.statistics == "call":
            raise ValueError(
                'statistics="call" in cross-attention would let a position see the queries of its '
                "future. Calibrate the model: FavorOptions(statistics='calibrated'), then "
                "performers.calibrate."
            )
        if (
            isinstance(phi, SharpFeatures)
            and self.options.statistics is None
            and not self.is_calibrated
        ):
            # Said anew in each call: one layer may attend in both directions, one after the other.
            phi.statistics = "calibrated" if is_causal or self.is_cross else "call"
        return phi

    def extra_repr(self) -> str:
        return (
            f"{self.options}, number={self.number}, is_cross={self.is_cross}, "
            f"is_calibrated={self.is_calibrated}"
        )


def drop_keys(
    value: Float[Tensor, "batch key_heads key_length value_dim"], probability: float
) -> Float[Tensor, "batch key_heads key_length value_dim"]:
    """Dropout of attention weights, in linear time: weights of one key are dropped together.

    Attention is linear in its values, so dropping the value of a key drops all weights of this key.
    For each query by itself the distribution is that of ordinary attention dropout; but all queries
    lose the same keys.
    """
    kept = F.dropout(value.new_ones(*value.shape[:-1], 1), probability)
    return value * kept
