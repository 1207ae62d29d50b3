"""`FavorAttention`: multi-head FAVOR+ attention in the form of torch.nn.MultiheadAttention."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers.checks import (
    check_count,
    check_feature_map_parts,
    check_flags,
    check_instance,
    check_number,
    check_rows,
    check_tensor,
)
from performers.functional import attention_matrix, favor_attention
from performers.functional.masks import Seen, is_hidden, keys_of_pairs
from performers.nn.feature_maps import SoftmaxFeatures
from performers.typing import FeatureMap

__all__ = ["FavorAttention"]


class FavorAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with linear cost: the same words, parameters and `forward`.

    It loads a state dict of nn.MultiheadAttention; the feature map, the only addition, then stays
    as it is.
    `feature_map`: any `FeatureMap` for `dim = embed_dim // num_heads`; `SoftmaxFeatures(dim)`
    unless given.

    What differs, because no attention matrix exists to change: `dropout` is not applied (a warning
    says so once), and `attn_mask` may only say causality, padding, packed sequences, or how many of
    the first keys each query sees (a prefix, chunks), in any form: bool, or additive with −∞ or
    another number of at most −1e4. `need_weights=True` (torch's
    default!) computes the implied matrix, which is quadratic in the length; pass False where the
    output alone is wanted. While compiling, is_causal=True is believed without a look at the mask.

    >>> attention = FavorAttention(64, 4, batch_first=True)
    >>> x = torch.randn(2, 100, 64)
    >>> attention(x, x, x, need_weights=False)[0].shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        feature_map: nn.Module | None = None,
    ) -> None:
        check_count("embed_dim", embed_dim)
        check_count("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim: got {num_heads} and {embed_dim}, and every head "
                "has embed_dim / num_heads of the columns."
            )
        check_number("dropout", dropout, or_zero=True)
        check_flags(
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            batch_first=batch_first,
        )
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                check_count(name, width)
        if feature_map is not None:
            check_feature_map_parts(feature_map)
            check_instance("feature_map", feature_map, nn.Module, "an nn.Module")
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        if dropout > 0:
            warnings.warn(
                "FavorAttention does not apply dropout to attention weights: they are never "
                "formed. Drop the output instead, or pass dropout=0.",
                stacklevel=2,
            )
        self.feature_map = feature_map or SoftmaxFeatures(self.head_dim).to(device=device)
        self.register_forward_pre_hook(_must_be_called)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward, its conventions included: `key_padding_mask` is True
        for padding.

        Shapes: (length, batch, embed_dim), with `batch_first` (batch, length, embed_dim), unbatched
        (length, embed_dim). Returns the output and, with `need_weights`, the implied matrix,
        averaged over heads or not.
        """
        check_flags(
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        if isinstance(query, Tensor) and query.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        self._check_inputs(query, key, value, key_padding_mask)
        is_batched = query.ndim == 3
        if not is_batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        seen = self._seen(attn_mask, is_causal, query, key)
        visible, is_causal = seen.key_padding_mask, seen.is_causal
        if key_padding_mask is not None:
            unpadded = self._visible_keys(key_padding_mask)
            visible = unpadded if visible is None else visible & unpadded
        query, key, value = self._project_inputs(query, key, value)
        if is_causal and self.num_extra_keys:
            # Extra keys come first here, so that every causal row sees them. Causal attention takes
            # one query per key, so each extra key gets a query, whose output is dropped below.
            query = F.pad(query, (0, 0, self.num_extra_keys, 0))
        key, value, visible = self._with_extra_keys(key, value, visible)
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        phi: FeatureMap = self.feature_map  # type: ignore[assignment]  # nn.Module attribute
        # Every query sees the extra keys, which come before the others.
        order: dict[str, Any] = {"segment_ids": seen.segment_ids} | {
            name: None if lengths is None else lengths + self.num_extra_keys
            for name, lengths in (
                ("prefix_lengths", seen.prefix_lengths), ("seen_lengths", seen.seen_lengths)
            )
        }  # fmt: skip
        out = favor_attention(query, key, value, phi, is_causal, visible, **order)
        weights = None
        if need_weights:
            weights = attention_matrix(query, key, phi, is_causal, visible, **order)
            # torch has its extra keys at the end, so their columns move there.
            weights = weights.roll(-self.num_extra_keys, dims=-1)
        if is_causal and self.num_extra_keys:
            out = out[:, :, self.num_extra_keys :]
            weights = None if weights is None else weights[:, :, self.num_extra_keys :]
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not is_batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of sequences without padding: nn.TransformerEncoder takes it out of
        batches that it evaluates. The implied matrix is that of the padded batch.
        """
        is_self_attention = query is key is value and key_padding_mask is None
        if not is_self_attention or query.layout != torch.strided or not self.batch_first:
            raise ValueError(
                "a nested tensor must be query, key and value at once, of the layout torch.strided "
                "and with batch_first=True, without a key_padding_mask. Else pass "
                "query.to_padded_tensor(0.0) and a key_padding_mask."
            )
        lengths = [len(sequence) for sequence in query.unbind()]
        x = query.to_padded_tensor(0.0)
        position = torch.arange(x.shape[1], device=x.device)
        padding = position >= torch.tensor(lengths, device=x.device).unsqueeze(1)
        out, weights = self.forward(x, x, x, padding, *options)
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows), weights

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> None:
        """Raise for what nn.MultiheadAttention takes and a linear layer would refuse in words of
        its own.
        """
        named = {"query": query, "key": key, "value": value}
        widths = (self.embed_dim, self.kdim, self.vdim)
        layout = "(batch, length, dim)" if self.batch_first else "(length, batch, dim)"
        for (name, x), width in zip(named.items(), widths, strict=True):
            check_rows(name, x)
            if x.ndim not in (2, 3) or x.ndim != query.ndim or x.shape[-1] != width:
                raise ValueError(
                    f"{name} must be {layout}, or (length, dim) as query and key and value at "
                    f"once, with dim={width} here: got {tuple(x.shape)}."
                )
        axis = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                "key and value must have the same batch and length: key is "
                f"{tuple(key.shape)}, value is {tuple(value.shape)}."
            )
        if query.ndim == 3 and query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"query and key must have the same batch, the axis {axis} of {layout}: query is "
                f"{tuple(query.shape)}, key is {tuple(key.shape)}. See batch_first."
            )
        if key_padding_mask is None:
            return
        check_tensor("key_padding_mask", key_padding_mask)
        # (length, batch, dim) of a key becomes (batch, length) of its mask.
        expected = key.shape[:-1] if self.batch_first else key.shape[:-1][::-1]
        if key_padding_mask.shape != expected:
            raise ValueError(
                "key_padding_mask must be (batch, key_length), or (key_length,) without a batch: "
                f"{tuple(expected)} here, got {tuple(key_padding_mask.shape)}."
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        own = self.feature_map.state_dict(prefix=f"{prefix}feature_map.")
        # Without any entry of the feature map the checkpoint is one of nn.MultiheadAttention.
        if own.keys().isdisjoint(state_dict):
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def num_extra_keys(self) -> int:
        """Keys that belong to the module, not to the input: `add_bias_kv` and `add_zero_attn`."""
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _project_inputs(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        projected = [
            F.linear(*arguments) for arguments in zip(inputs, weights, biases, strict=True)
        ]
        return projected[0], projected[1], projected[2]

    def _with_extra_keys(
        self, key: Tensor, value: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # Extra keys go in front of the keys: [bias_k, zero, keys].
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0))
        if self.bias_k is not None and self.bias_v is not None:
            batch = key.shape[0]
            bias_k, bias_v = self.bias_k.to(key.dtype), self.bias_v.to(value.dtype)  # autocast
            key = torch.cat([bias_k.expand(batch, -1, -1), key], dim=1)
            value = torch.cat([bias_v.expand(batch, -1, -1), value], dim=1)
        if visible is not None:
            visible = F.pad(visible, (self.num_extra_keys, 0), value=True)
        return key, value, visible

    @staticmethod
    def _visible_keys(key_padding_mask: Tensor) -> Tensor:
        if key_padding_mask.dtype == torch.bool:
            return ~key_padding_mask
        if not key_padding_mask.is_floating_point():
            raise TypeError(
                "key_padding_mask must be bool with True for padding, got "
                f"{key_padding_mask.dtype}. From an attention mask with 1 for a real token write "
                "attention_mask == 0."
            )
        # nn.TransformerEncoder hands on its bool mask as floats: 0 for a key, -inf for padding.
        padding = is_hidden(key_padding_mask)
        if padding is None:
            raise ValueError(
                "key_padding_mask must be bool (True = padding) or hold only 0 and -inf, or other "
                "numbers of at most -1e4: other additive biases have no linear-time form."
            )
        return ~padding

    def _seen(self, attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Seen:
        """What an attn_mask says."""
        (batch, query_length), key_length = query.shape[:2], key.shape[1]
        if attn_mask is None:
            if is_causal:
                raise ValueError(
                    "is_causal=True is a hint about attn_mask, as in nn.MultiheadAttention: pass "
                    "attn_mask=nn.Transformer.generate_square_subsequent_mask(length) with it."
                )
            return Seen(None, is_causal=False)
        if is_causal and torch.compiler.is_compiling():
            return Seen(None, is_causal=True)  # a graph cannot depend on what a mask holds
        check_tensor("attn_mask", attn_mask)
        seen = self._read(attn_mask, batch, query_length, key_length)
        if isinstance(seen, str):
            raise ValueError(
                "attn_mask must be None or say causality, padding, packed sequences or how many of "
                "the first keys each query sees, and have the shape "
                f"(query_length, key_length) = {(query_length, key_length)}, with (batch · "
                f"num_heads) or (batch, num_heads) before it or not: got {tuple(attn_mask.shape)}, "
                f"and {seen}. Arbitrary masks have no linear-time form; use key_padding_mask for "
                "padding."
            )
        return seen

    def _read(
        self, attn_mask: Tensor, batch: int, query_length: int, key_length: int
    ) -> Seen | str:
        rows = (batch, self.num_heads)
        by_pair = attn_mask
        if attn_mask.ndim == 3 and len(attn_mask) == batch * self.num_heads:
            by_pair = attn_mask.unflatten(0, rows)
        try:
            by_pair = by_pair.expand(*rows, query_length, key_length)
        except RuntimeError:
            return "it does not have this shape"
        hidden = by_pair if attn_mask.dtype == torch.bool else is_hidden(by_pair)
        if hidden is None:
            return (
                "it adds, or learns to add, numbers other than 0 and those that hide, at most -1e4"
            )
        seen = keys_of_pairs(~hidden, prefers_causal=False)
        if self.num_extra_keys and not isinstance(seen, str) and seen.segment_ids is not None:
            return "it packs sequences, which add_bias_kv and add_zero_attn would give other keys"
        return seen


def _must_be_called(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Nothing, before each call. nn.TransformerEncoderLayer evaluates attention by a fused exact
    kernel of its own, from the weights alone, unless a hook says that there is more to it.
    """
