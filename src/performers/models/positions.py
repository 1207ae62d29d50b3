"""The positions of tokens: rotary, learned, sinusoidal, in an image or none, by name.

Learned and sinusoidal positions and those in an image are added to the token embeddings; rotary
ones turn queries and keys, before the feature map sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from performers.models.fields import PerformerFields

__all__ = ["POSITIONS", "Positions", "Rotation"]


class Rotation(NamedTuple):
    """cos and sin of the angle by which each pair of coordinates is turned at each position."""

    cos: Float[Tensor, "batch 1 length half_dim"]
    sin: Float[Tensor, "batch 1 length half_dim"]

    def turn(self, x: Float[Tensor, "b h l d"]) -> Float[Tensor, "b h l d"]:
        """Turn coordinates (i, i + dim/2) of queries or keys; x keeps its dtype and its norm."""
        # A rotation of each pair (x_i, x_{i + dim/2}), so lengths stay, and with them the quality
        # of random features.
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat(
            [first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1
        )
        return turned.to(x.dtype)


class Positions(nn.Module):
    """A kind of positions: it may add to the embeddings, or turn queries and keys."""

    def add_to(
        self,
        embeddings: Float[Tensor, "batch length hidden"],
        position_ids: Int[Tensor, "rows length"],
    ) -> Float[Tensor, "batch length hidden"]:
        return embeddings

    def rotation(self, position_ids: Int[Tensor, "rows length"]) -> Rotation | None:
        return None


class Rotary(Positions):
    """Rotary positions: q_i·k_j depends on i − j alone. There is no largest length.

    Source: Su et al. 2021, "RoFormer", arXiv 2104.09864, Eq. 34.
    """

    def __init__(self, config: PerformerFields) -> None:
        super().__init__()
        assert config.head_dim is not None, "a config has chosen it"
        self.dim = config.head_dim
        self.theta = config.rope_theta

    def rotation(self, position_ids: Int[Tensor, "rows length"]) -> Rotation:
        angles = _angles(position_ids, self.dim // 2, self.theta).unsqueeze(1)
        return Rotation(angles.cos(), angles.sin())


class Learned(Positions):
    """One trained vector per position, for at most `max_position_embeddings` of them."""

    def __init__(self, config: PerformerFields) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def add_to(
        self,
        embeddings: Float[Tensor, "batch length hidden"],
        position_ids: Int[Tensor, "rows length"],
    ) -> Float[Tensor, "batch length hidden"]:
        """Raises ValueError for a position beyond the table."""
        _check_limit("learned", position_ids, self.embedding.num_embeddings)
        return embeddings + self.embedding(position_ids)


class Sinusoidal(Positions):
    """Fixed sines and cosines, added to embeddings that are scaled by √hidden_size.

    Source: Vaswani et al. 2017, arXiv 1706.03762, Sections 3.4 and 3.5, the sines before the
    cosines.
    """

    def __init__(self, config: PerformerFields) -> None:
        super().__init__()
        self.theta = config.rope_theta

    def add_to(
        self,
        embeddings: Float[Tensor, "batch length hidden"],
        position_ids: Int[Tensor, "rows length"],
    ) -> Float[Tensor, "batch length hidden"]:
        hidden = embeddings.shape[-1]
        angles = _angles(position_ids, hidden // 2, self.theta)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return embeddings * math.sqrt(hidden) + waves.to(embeddings.dtype)


class SinusoidalAndRotary(Positions):
    """Fixed sines and cosines added to the embeddings, which are not scaled, and rotary positions.

    Both are read from tables of `max_position_embeddings` rows, which are saved with the weights:
    an angle of position · frequency is large, so that the rounding of the frequency shows in it.
    For models of performer-pytorch, whose tables these are.
    """

    added: Tensor
    turning: Tensor

    def __init__(self, config: PerformerFields) -> None:
        super().__init__()
        assert config.head_dim is not None, "a config has chosen it"
        position = torch.arange(config.max_position_embeddings)
        for name, dim in (("added", config.hidden_size), ("turning", config.head_dim)):
            angles = _angles(position, dim // 2, config.rope_theta)
            self.register_buffer(name, torch.cat([angles.sin(), angles.cos()], dim=-1))

    def add_to(
        self,
        embeddings: Float[Tensor, "batch length hidden"],
        position_ids: Int[Tensor, "rows length"],
    ) -> Float[Tensor, "batch length hidden"]:
        """Raises ValueError for a position beyond the tables."""
        _check_limit("sinusoidal+rotary", position_ids, len(self.added))
        return embeddings + self.added[position_ids].to(embeddings.dtype)

    def rotation(self, position_ids: Int[Tensor, "rows length"]) -> Rotation:
        sin, cos = self.turning[position_ids].unsqueeze(1).chunk(2, dim=-1)
        return Rotation(cos, sin)


class ImagePositions(Positions):
    """Three trained vectors per position: of the row, the column and the channel of the byte of an
    image that comes next.

    Tokens are a first one and the bytes in reading order, channels last. Position p comes before
    byte p; the last, height · width · channels, comes before nothing, at the start of the row below
    the image.
    """

    def __init__(self, config: PerformerFields) -> None:
        super().__init__()
        assert config.image_shape is not None, "a config has checked it"
        self.height, width, channels = config.image_shape
        self.rows = nn.Embedding(self.height + 1, config.hidden_size)
        self.columns = nn.Embedding(width, config.hidden_size)
        self.channels = nn.Embedding(channels, config.hidden_size)

    def add_to(
        self,
        embeddings: Float[Tensor, "batch length hidden"],
        position_ids: Int[Tensor, "rows length"],
    ) -> Float[Tensor, "batch length hidden"]:
        """Raises ValueError for a position beyond the image."""
        width, channels = self.columns.num_embeddings, self.channels.num_embeddings
        end = self.height * width * channels
        is_compiling = torch.compiler.is_compiling()  # as in `_check_limit`
        if not is_compiling and position_ids.numel() and int(position_ids.max()) > end:
            raise ValueError(
                f"an image of image_shape={[self.height, width, channels]} has {end} bytes, got "
                f"position {int(position_ids.max())}. Shorten the sequence, or build the model for "
                "larger images."
            )
        pixel = position_ids // channels
        return (
            embeddings
            + self.rows(pixel // width)
            + self.columns(pixel % width)
            + self.channels(position_ids % channels)
        )


def _check_limit(kind: str, position_ids: Int[Tensor, "rows length"], limit: int) -> None:
    if torch.compiler.is_compiling() or position_ids.is_meta:
        return  # there are no numbers yet; the table itself refuses what is beyond it
    if position_ids.numel() and int(position_ids.max()) >= limit:
        raise ValueError(
            f"{kind} positions end at max_position_embeddings={limit}, got position "
            f"{int(position_ids.max())}. Shorten the sequence, or build the model with a "
            "larger max_position_embeddings or with position='rotary', which has no limit."
        )


def _angles(
    position_ids: Int[Tensor, "*rows length"], count: int, theta: float
) -> Float[Tensor, "*rows length count"]:
    """position · θ^(−i/count) for i = 0 … count − 1, in float32 whatever the model's dtype is."""
    # Computed, not kept in a buffer: a buffer would be cast to half precision with the weights.
    exponents = torch.arange(count, dtype=torch.float32, device=position_ids.device) / count
    return position_ids.unsqueeze(-1).float() * theta**-exponents


POSITIONS: dict[str, Callable[[PerformerFields], Positions]] = {
    "rotary": Rotary,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "sinusoidal+rotary": SinusoidalAndRotary,
    "image": ImagePositions,
    "none": lambda config: Positions(),
}
