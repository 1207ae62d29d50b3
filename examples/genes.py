"""The shape of scBERT: a cell is a sequence of 16,907 genes, all of which attend to each other.

scBERT is a Performer because a cell has so many tokens, one per gene: how strongly it is expressed,
in a few bins, at the position that stands for the gene. It learns to fill in masked expressions.
Positions are vectors of the genes that are known beforehand, in scBERT those of gene2vec. Here such
a model of `PerformerForMaskedLM` takes some steps on cells that are made up: how strongly a gene is
expressed depends on its vector, in another way in each of 4 types of cells. Which type a cell is of
shows only in its other genes.

The figures are what a step costs at the full length, beside exact attention in the same model, and
the loss on masked genes of cells that it has not seen. Beside it stand the loss of knowing how
often each bin occurs and that of knowing the rates that the cells were made with, than which
nothing is better. So few steps close a small part of the gap between the two.

Source: Yang et al. 2022, "scBERT as a large-scale pretrained deep language model for cell type
annotation of single-cell RNA-seq data".

Measured in 24 s of CPU time on AMD EPYC, 1 thread(s), torch 2.13.0+cpu:

    a training step: 0.24 s (exact attention 11.32 s)
    bits per masked gene: 2.227 after 40 steps (untrained 3.009)
    bits for who knows: 2.297 frequencies of the bins, 1.772 the rates
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from performers import PerformerConfig, PerformerForMaskedLM

BINS = 7  # how often a gene was counted: 0 times to 6 times and more
MASK = BINS  # the token in the place of what is hidden


@dataclass(frozen=True)
class Settings:
    genes: int = 16_907
    width: int = 32
    layers: int = 2
    num_projections: int = 64
    steps: int = 40
    exact_steps: int = 1


FULL = Settings()
SMALL = Settings(genes=211, width=16, layers=1, num_projections=16, steps=3)


def gene_vectors(settings: Settings) -> Tensor:
    """What is known of each gene: (genes, width)."""
    return torch.randn(settings.genes, settings.width, generator=Generator().manual_seed(1))


def cells(number: int, vectors: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Bins (number, genes), Poisson counts, and their rates, by the type of the cell."""
    types = torch.randn(4, vectors.shape[1], generator=Generator().manual_seed(2))
    rates = (types @ vectors.T / math.sqrt(vectors.shape[1])).exp()
    rates = rates[torch.randint(4, (number,), generator=generator)]
    return torch.poisson(rates, generator=generator).clamp(max=BINS - 1).long(), rates


def masked(cell: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Input and labels, where 15 % are hidden and only these have a label."""
    hidden = torch.rand(cell.shape, generator=generator) < 0.15
    return cell.masked_fill(hidden, MASK), cell.masked_fill(~hidden, -100)


def model(settings: Settings, attention: str) -> PerformerForMaskedLM:
    """A model whose positions are the genes."""
    torch.manual_seed(0)
    config = PerformerConfig(
        vocab_size=BINS + 1,
        attention=attention,
        num_projections=settings.num_projections,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=2,
        intermediate_size=2 * settings.width,
        position="learned",
        max_position_embeddings=settings.genes,
        hidden_dropout_prob=0.0,
    )
    network = PerformerForMaskedLM(config)
    positions = network.get_parameter("performer.positions.embedding.weight").requires_grad_(False)
    positions.copy_(0.3 * gene_vectors(settings))
    return network


def train(network: PerformerForMaskedLM, settings: Settings, steps: int) -> float:
    """Seconds of CPU time that the last step took."""
    generator, vectors = Generator().manual_seed(3), gene_vectors(settings)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(steps):
        start = time.process_time()
        tokens, labels = masked(cells(1, vectors, generator)[0], generator)
        network(tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start


def known_losses(cell: Tensor, rates: Tensor, labels: Tensor) -> tuple[float, float]:
    """Bits per masked gene for who knows how often each bin occurs, and for who knows the rates."""
    counts = torch.distributions.Poisson(rates[..., None]).log_prob(torch.arange(BINS - 1.0)).exp()
    by_rates = torch.cat([counts, 1 - counts.sum(dim=-1, keepdim=True)], dim=-1)
    by_bins = (cell.flatten().bincount(minlength=BINS) / cell.numel()).expand_as(by_rates)
    losses = [
        F.nll_loss(known.clamp(min=1e-6).log().flatten(0, 1), labels.flatten())
        for known in (by_bins, by_rates)
    ]
    return float(losses[0]) / math.log(2), float(losses[1]) / math.log(2)


def run(settings: Settings) -> dict[str, str]:
    exact_seconds = train(model(settings, "exact"), settings, settings.exact_steps)
    cell, rates = cells(4, gene_vectors(settings), Generator().manual_seed(4))
    tokens, labels = masked(cell, Generator().manual_seed(5))
    by_bins, by_rates = known_losses(cell, rates, labels)

    @torch.inference_mode()
    def loss(network: PerformerForMaskedLM) -> float:
        return float(network(tokens, labels=labels).loss) / math.log(2)

    network = model(settings, "performer-relu")
    untrained = loss(network)
    seconds = train(network, settings, settings.steps)
    return {
        "a training step": f"{seconds:.2f} s (exact attention {exact_seconds:.2f} s)",
        "bits per masked gene": f"{loss(network):.3f} after {settings.steps} steps (untrained "
        f"{untrained:.3f})",
        "bits for who knows": f"{by_bins:.3f} frequencies of the bins, {by_rates:.3f} the rates",
    }


if __name__ == "__main__":
    from measured import command

    command(__file__, run, FULL, SMALL)
