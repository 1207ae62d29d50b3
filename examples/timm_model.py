"""A vision transformer of timm, converted: its weights stay, its attention becomes FAVOR+.

timm's models attend by a module of their own, which computes queries, keys and values by one layer.
`FavorTimm` takes the place of this module and keeps its layers by their names, so the state dict of
the model has the entries that it had, and new ones for the features. `convert` does this to any
model that is built of timm.layers.Attention: ViT, DeiT, and those of CLIP and DINO in timm's form.

The model has timm's layout and is small, because nothing can be downloaded here. It is trained on
the handwritten digits of scikit-learn, 8 × 8 pixels in patches of 2 × 2. For a pretrained one
change a line: `model = timm.create_model("vit_small_patch16_224", pretrained=True)`.

The figures are the accuracy on held-out digits of the exact model, of the same weights converted,
and after some epochs more in which the weights get used to it.

It needs `pip install timm` beside performers[sklearn].

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; Choromanski et al. 2021.

Measured in 21 s of CPU time on AMD EPYC, 1 thread(s), torch 2.13.0+cpu:

    exact: 87.1%
    converted: 86.9%
    converted, trained further: 87.8%
    exact, trained further: 89.8%
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from performers import SharpFeatures, favor_attention


@dataclass(frozen=True)
class Settings:
    width: int = 48
    layers: int = 2
    heads: int = 4
    num_projections: int = 64
    epochs: int = 15
    further_epochs: int = 3
    digits: int = 1797


FULL = Settings()
SMALL = Settings(width=16, layers=1, heads=2, epochs=1, further_epochs=1, digits=200)


class FavorTimm(nn.Module):
    """timm.layers.Attention with FAVOR+ in the place of softmax, and the same layers."""

    def __init__(self, exact: Attention, num_projections: int, layer: int) -> None:
        super().__init__()
        self.num_heads = exact.num_heads
        self.gate = exact.gate  # None in most models
        for name, module in exact.named_children():
            self.add_module(name, module)
        self.phi = SharpFeatures(
            exact.head_dim,
            num_projections,
            num_heads=exact.num_heads,
            statistics="call",
            query_ratio=2.0,
            layer=layer,
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("attention must see all patches: leave out attn_mask and is_causal.")
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        out = favor_attention(self.q_norm(query), self.k_norm(key), value, self.phi)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def convert(model: nn.Module, num_projections: int) -> nn.Module:
    """Replace each timm.layers.Attention within a model by FAVOR+ with the same weights."""
    exact = [(name, x) for name, x in model.named_modules() if type(x) is Attention]
    for layer, (name, module) in enumerate(exact):
        model.set_submodule(name, FavorTimm(module, num_projections, layer))
    return model


def build(settings: Settings) -> VisionTransformer:
    return VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=settings.width,
        depth=settings.layers,
        num_heads=settings.heads,
        mlp_ratio=2.0,
    )


def digits(number: int) -> tuple[Tensor, Tensor]:
    """Images (number, 1, 8, 8) with pixels from −1 to 1, and what they show."""
    data = load_digits()
    images = torch.tensor(data.images[:number]).float()[:, None] / 8 - 1
    return images, torch.tensor(data.target[:number])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def run(settings: Settings) -> dict[str, str]:
    torch.manual_seed(0)
    images, labels = digits(settings.digits)
    held_out = len(images) // 4
    seen = images[:-held_out], labels[:-held_out]

    def accuracy(model: nn.Module) -> str:
        with torch.inference_mode():
            right = model(images[-held_out:]).argmax(dim=1) == labels[-held_out:]
        return f"{right.float().mean():.1%}"

    model = train(build(settings), *seen, settings.epochs, 2e-3)
    converted = convert(copy.deepcopy(model), settings.num_projections)
    return {
        "exact": accuracy(model),
        "converted": accuracy(converted),
        "converted, trained further": accuracy(
            train(converted, *seen, settings.further_epochs, 3e-4)
        ),
        "exact, trained further": accuracy(train(model, *seen, settings.further_epochs, 3e-4)),
    }


if __name__ == "__main__":
    from measured import command

    command(__file__, run, FULL, SMALL)
