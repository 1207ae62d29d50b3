"""The identity, the paper's X (OPT): attention that costs nothing, the lower bound of every
comparison.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["Identity"]


class Identity(nn.Module):
    """out = V: every position attends to itself alone, and nothing is computed.

    A model built on it has all costs of a Transformer except that of attention, so no attention can
    be faster. With fewer key heads than query heads each value serves its group of query heads.

    Raises ValueError if there is not one key per query.
    Cost: none.  Source: Choromanski et al. 2021, Figure 3 ("X (OPT)").

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    >>> bool((Identity()(query, key, value) == value).all())
    True
    """

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Float[Tensor, "batch heads query_length value_dim"]:
        """Shapes as in `favor_attention`. Both masks are satisfied without any work, because no
        position sees another.
        """
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                "identity attention needs one key per query: query length is "
                f"{query.shape[2]}, key length is {key.shape[2]}. It has no form for "
                "cross-attention."
            )
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
