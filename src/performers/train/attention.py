"""The attention matrices that a trained model implies, for one protein."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from performers.data.proteins import crop_sequences, find_protein
from performers.train.tasks import Model

__all__ = ["save_attention_maps"]

# Bovine pancreatic trypsin inhibitor, the protein of the paper's Figure 10; it is in the sample.
ACCESSION = "P00974"

MOST_LAYERS = 4
MOST_HEADS = 8


@torch.no_grad()
def save_attention_maps(model: Model, path: Path) -> str:
    """Write the matrices of the model on one protein to an npz file; returns the protein's name.

    "attention": (layers, heads, residues, residues), float16, without the special tokens; rows
    attend to columns. "layers": which layers, evenly spaced, at most four; of the heads the first
    eight.

    Source: Choromanski et al. 2021, Appendix C.4.
    """
    protein = find_protein(ACCESSION)
    tokens = crop_sequences([protein.sequence], len(protein.sequence) + 2)[0]["input_ids"]
    model.eval()
    outputs = model(input_ids=tokens[None].to(model.device), output_attentions=True)
    count = len(outputs.attentions)
    layers = np.linspace(0, count - 1, min(count, MOST_LAYERS)).round().astype(int)
    attention = torch.stack([outputs.attentions[layer][0, :MOST_HEADS] for layer in layers])
    residues = attention[:, :, 1:-1, 1:-1].float().cpu().numpy().astype(np.float16)
    np.savez_compressed(path, attention=residues, layers=layers)
    return f"{protein.identifier.split('|')[-1]} ({ACCESSION})"
