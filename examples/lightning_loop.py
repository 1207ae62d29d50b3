"""A Performer in PyTorch Lightning, whose random features are redrawn while it trains.

The model is any of this library's, and Lightning's Trainer runs the loop. One thing is particular
to Performers: new features from time to time, so that weights do not get used to one draw. That is
a call, `model.redraw_features()`, which a callback makes; the number of redraws is saved with the
weights.

The model reads proteins of the sample from left to right. The figure is its loss on held-out ones.

It needs `pip install lightning` beside performers[hf].

Source: Choromanski et al. 2021, Section 4.2 (redrawing).

Measured in 5 s of CPU time on AMD EPYC, 1 thread(s), torch 2.13.0+cpu:

    loss: 2.891 nats per residue (untrained 3.349)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from performers import PerformerConfig, PerformerForCausalLM
from performers.data import VOCAB_SIZE, CausalCollator, load_proteins


@dataclass(frozen=True)
class Settings:
    steps: int = 150
    length: int = 128
    redraw_every: int = 50
    held_out: int = 64


FULL = Settings()
SMALL = Settings(steps=3, length=31, redraw_every=2, held_out=5)


class LanguageModel(lightning.LightningModule):
    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.model = PerformerForCausalLM(config)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], number: int) -> None:
        self.log("loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class RedrawFeatures(lightning.Callback):
    """New features after every `every` optimizer steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: LanguageModel, *arguments: Any
    ) -> None:
        if trainer.global_step % self.every == 0:
            module.model.redraw_features()


def run(settings: Settings) -> dict[str, str]:
    lightning.seed_everything(0, verbose=False)
    splits = load_proteins("sample", length=settings.length)
    held_out = [splits.valid[row] for row in range(settings.held_out)]
    config = PerformerConfig(
        vocab_size=VOCAB_SIZE,
        attention="performer-positive",
        num_projections=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    module = LanguageModel(config)
    valid = DataLoader(held_out, batch_size=64, collate_fn=CausalCollator())
    trainer = lightning.Trainer(
        max_steps=settings.steps,
        callbacks=[RedrawFeatures(settings.redraw_every)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (untrained,) = trainer.validate(module, valid, verbose=False)
    train = DataLoader(splits.train, batch_size=8, shuffle=True, collate_fn=CausalCollator())
    trainer.fit(module, train)
    (trained,) = trainer.validate(module, valid, verbose=False)
    return {"loss": f"{trained['loss']:.3f} nats per residue (untrained {untrained['loss']:.3f})"}


if __name__ == "__main__":
    from measured import command

    command(__file__, run, FULL, SMALL)
