"""`nn.MultiheadAttention` swapped for FAVOR+ in a trained vision transformer.

The model is built as torchvision's: a convolution cuts an image into patches, blocks of attention
and MLP follow, and a token of its own tells the class. `swap` replaces each attention by a
`FavorAttention` with the same weights, so it fits any model that attends by
`nn.MultiheadAttention`. Its features are those for trained weights: sharp ones, with the statistics
of each image. Trained on the handwritten digits of scikit-learn, 8 × 8 pixels in patches of 2 × 2.

The figures are the accuracy on held-out digits of the exact model, of the same weights with FAVOR+,
and after some epochs more in which the weights get used to it; for comparison, after as many epochs
more of the exact model. At 17 tokens FAVOR+ saves nothing. What an image of more patches would
save is in benchmarks/.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; Choromanski et al. 2021.

Measured in 23 s of CPU time on AMD EPYC, 1 thread(s), torch 2.13.0+cpu:

    untrained: 10.7%
    exact: 92.4%
    swapped: 90.6%
    swapped, trained further: 92.7%
    exact, trained further: 92.9%
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from performers import FavorAttention, SharpFeatures


@dataclass(frozen=True)
class Settings:
    width: int = 48
    layers: int = 2
    heads: int = 4
    patch: int = 2
    num_projections: int = 64
    epochs: int = 15
    further_epochs: int = 3
    digits: int = 1797


FULL = Settings()
SMALL = Settings(width=16, layers=1, heads=2, epochs=1, further_epochs=1, digits=200)


class Block(nn.Module):
    """As torchvision.models.vision_transformer.EncoderBlock."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """Logits (batch, classes) of images (batch, 1, size, size)."""

    def __init__(self, settings: Settings, size: int = 8, classes: int = 10):
        super().__init__()
        width, tokens = settings.width, 1 + (size // settings.patch) ** 2
        self.cut = nn.Conv2d(1, width, settings.patch, settings.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, tokens, width) / 10)
        self.blocks = nn.Sequential(*[Block(width, settings.heads) for _ in range(settings.layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.cut(images).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        return self.head(self.norm(self.blocks(x + self.positions))[:, 0])


def swap(model: nn.Module, num_projections: int) -> nn.Module:
    """Replace each nn.MultiheadAttention within a model by FAVOR+ with the same weights."""
    exact = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
    ]
    for layer, (name, module) in enumerate(exact):
        favor = FavorAttention(
            module.embed_dim,
            module.num_heads,
            bias=module.in_proj_bias is not None,
            batch_first=module.batch_first,
            feature_map=SharpFeatures(
                module.head_dim,
                num_projections,
                num_heads=module.num_heads,
                statistics="call",
                query_ratio=2.0,
                layer=layer,
            ),
        )
        favor.load_state_dict(module.state_dict())
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, favor)
    return model


def digits(number: int) -> tuple[Tensor, Tensor]:
    """Images (number, 1, 8, 8) with pixels from −1 to 1, and what they show."""
    data = load_digits()
    images = torch.tensor(data.images[:number]).float()[:, None] / 8 - 1
    return images, torch.tensor(data.target[:number])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def run(settings: Settings) -> dict[str, str]:
    torch.manual_seed(0)
    images, labels = digits(settings.digits)
    held_out = len(images) // 4

    def accuracy(model: nn.Module) -> str:
        with torch.inference_mode():
            right = model(images[-held_out:]).argmax(dim=1) == labels[-held_out:]
        return f"{right.float().mean():.1%}"

    def train_further(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        train(model, images[:-held_out], labels[:-held_out], settings.further_epochs, 3e-4)
        return model

    model = VisionTransformer(settings)
    untrained = accuracy(model)
    train(model, images[:-held_out], labels[:-held_out], settings.epochs, 2e-3)
    swapped = swap(copy.deepcopy(model), settings.num_projections)
    return {
        "untrained": untrained,
        "exact": accuracy(model),
        "swapped": accuracy(swapped),
        "swapped, trained further": accuracy(train_further(swapped)),
        "exact, trained further": accuracy(train_further(model)),
    }


if __name__ == "__main__":
    from measured import command

    command(__file__, run, FULL, SMALL)
