"""`import_checkpoint`: a model of another library as a model of this one, with equal outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from performers.checks import check_choice, check_count
from performers.kernels import KERNELS
from performers.migration.fast_transformers import FAST_TRANSFORMERS
from performers.migration.google_jax import GOOGLE_JAX
from performers.migration.library import OMEGA, Layout, Library, Renamed
from performers.migration.performer_pytorch import PERFORMER_PYTORCH
from performers.migration.sources import describe_source, read_tensors
from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerModel,
)
from performers.models.layers import PerformerAttention

__all__ = ["LIBRARIES", "import_checkpoint"]

LIBRARIES: dict[str, Library] = {
    "performer-pytorch": PERFORMER_PYTORCH,
    "fast-transformers": FAST_TRANSFORMERS,
    "google-jax": GOOGLE_JAX,
}

Imported = PerformerForMaskedLM | PerformerForCausalLM | PerformerModel | PerformerAttention


# The fields of a config that say how many rows a tensor has.
ROWS = {
    "embed_tokens.weight": "vocab_size",
    "layers.0.mlp.up_proj.weight": "intermediate_size",
    "positions.embedding.weight": "max_position_embeddings",
    "positions.added": "max_position_embeddings",
}
# Attention without biases, and models that read inputs_embeds.
ZERO_IF_ABSENT = (
    *(f"{part}_proj.bias" for part in ("q", "k", "v", "out")),
    "embed_tokens.weight",
)


@dataclass(frozen=True)
class Told:
    """What a checkpoint does not say."""

    features: str | None
    is_causal: bool
    num_heads: int | None
    num_projections: int | None
    hidden_act: str | None
    scale: float | None


def import_checkpoint(
    source: str | Path | Mapping[str, Any],
    library: str,
    *,
    is_causal: bool = False,
    features: str | None = None,
    num_heads: int | None = None,
    num_projections: int | None = None,
    hidden_act: str | None = None,
    scale: float | None = None,
    prefix: str = "",
) -> Imported:
    """A model of another library, with its weights and ω, its conventions, and equal outputs.

    `source`: a file of torch.save, safetensors or numpy.savez, or a state dict or tree of arrays.
    Files of torch.save are read with weights_only=True.
    `library`: "performer-pytorch", "fast-transformers" or "google-jax".

    A checkpoint does not say what its weights were used for, so say it where it is not what that
    library does by default:
    `is_causal`: whether attention was causal.
    `features`: "positive", "hyperbolic", a kernel such as "relu", or "exact".
    `num_heads`: where neither ω nor shapes say it. `num_projections`: draw so many where the
    checkpoint has no ω; outputs are then other estimates of the same attention.
    `hidden_act`: the activation of feed-forward layers, a word of transformers.
    `scale`: of q·k, in the place of the library's.
    `prefix`: read only the names that begin with it, such as "module.".

    Returns a PerformerForMaskedLM or PerformerForCausalLM of a language model, a PerformerModel of
    one without embeddings (it reads `inputs_embeds`, and its vocabulary is one token that means
    nothing) or without a head, and the attention layer of an attention layer; in evaluation mode.
    `config.dialect` has the conventions, `config.origin` where the weights are from.

    Raises ValueError or TypeError for what cannot be read, what has no counterpart here, and names
    and shapes that do not fit.
    """
    check_choice("library", library, LIBRARIES)
    row = LIBRARIES[library]
    told = Told(features, is_causal, num_heads, num_projections, hidden_act, scale)
    renamed = _renamed(read_tensors(source), library, prefix)
    config = _config(renamed, row, told)
    config.origin = {
        "library": library,
        **describe_source(source),
        **{name: word for name, word in asdict(told).items() if word is not None},
        **({"prefix": prefix} if prefix else {}),
    }
    model = _model(renamed.tensors, row, config)
    _load(model, renamed.tensors)
    return model.eval()


def _renamed(tensors: Mapping[str, Tensor], library: str, prefix: str) -> Renamed:
    chosen = _inside(tensors, prefix)
    try:
        found = LIBRARIES[library].rename(chosen)
    except (IndexError, RuntimeError) as error:  # of torch, on its way to our shapes
        raise ValueError(
            f"the shapes of the checkpoint must be those of a model of {library}: {error}. Pass "
            "the whole state dict of one model, or its library= if it is of another."
        ) from error
    if found.is_whole():
        return found
    remedy = "Pass the state dict of that model alone, or its library= if it is of another."
    for other in _prefixes(chosen):
        if LIBRARIES[library].rename(_inside(chosen, other)).is_whole():
            remedy = f"Those that begin with {other!r} are: pass prefix={prefix + other!r}."
            break
    raise ValueError(
        f"every name of the checkpoint must be one of a model of {library}, with an attention "
        f"layer among them: {_few(found.unknown or list(chosen))} is not. {remedy}"
    )


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What begins with the prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _prefixes(names: Mapping[str, Any]) -> list[str]:
    """What names begin with, up to each dot, the shortest first."""
    heads = {name[: place + 1] for name in names for place, sign in enumerate(name) if sign == "."}
    return sorted(heads, key=lambda head: (head.count("."), head))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more


def _config(renamed: Renamed, row: Library, told: Told) -> PerformerConfig:
    """The sizes that shapes say, and the words that were told or are the library's."""
    tensors = renamed.tensors
    query = next(tensor for name, tensor in tensors.items() if name.endswith("q_proj.weight"))
    omega = next((tensor for name, tensor in tensors.items() if name.endswith(OMEGA)), None)
    for what, tensor in (("projections of queries", query), ("ω", omega)):
        if tensor is not None and tensor.ndim != 2:
            raise ValueError(
                f"{what} must be a matrix in a checkpoint, got shape {tuple(tensor.shape)}. Pass "
                "the whole state dict of one model."
            )
    features = row.default(omega is not None) if told.features is None else told.features
    check_choice("features of this library", features, row.features)
    num_heads, head_dim = _heads(len(query), omega, renamed.num_heads, told.num_heads)
    num_projections = _num_projections(features, omega, told.num_projections)
    layout = Layout(features, told.is_causal, head_dim, num_projections or 1)
    dialect = row.dialect(layout)
    fields = dict(row.fields)
    if dialect is not None:
        fields["dialect"] = asdict(dialect)
        if told.scale is not None:
            fields["dialect"]["scale"] = told.scale
    elif told.scale is not None:
        raise ValueError(
            f"scale belongs to linear attention, and features={features!r} has 1/√head_dim: leave "
            "it out."
        )
    if told.hidden_act is not None:
        fields["hidden_act"] = told.hidden_act
    for part, name in ROWS.items():
        if part in tensors:
            fields[name] = len(tensors[part])
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    return PerformerConfig(
        **{"vocab_size": 1, **fields},
        hidden_size=query.shape[1],
        num_hidden_layers=len(layers) or 1,
        num_attention_heads=num_heads,
        head_dim=head_dim,
        attention="exact" if features == "exact" else f"performer-{features}",
        num_projections=num_projections or head_dim,
        projection=None if num_projections is None else "orthogonal",
        position=_position(tensors),
        final_norm="norm.weight" in tensors,
        lm_head_bias="lm_head.bias" in tensors,
        tie_word_embeddings=row.ties_head and "lm_head.weight" not in tensors,
        is_decoder=told.is_causal,
        use_cache=dialect is None or not dialect.feature_epsilon,
        hidden_dropout_prob=0.0,
    )


def _heads(
    query_size: int, omega: Tensor | None, of_shapes: int | None, told: int | None
) -> tuple[int, int]:
    """The number of heads and their dim."""
    if told is not None:
        check_count("num_heads", told)
    known = of_shapes if omega is None else query_size // omega.shape[1]
    if known is None and told is None:
        raise ValueError(
            "num_heads must be given, because neither ω nor the shapes of this checkpoint say it: "
            f"queries have {query_size} coordinates in all."
        )
    num_heads = known or told or 1
    if told not in (None, num_heads) or query_size % num_heads:
        raise ValueError(
            f"num_heads must be {known or 'a divisor of all coordinates of queries'} in this "
            f"checkpoint, whose queries have {query_size}: got {told}. Leave it out, or correct it."
        )
    return num_heads, query_size // num_heads


def _num_projections(features: str, omega: Tensor | None, told: int | None) -> int | None:
    """m; None for features without ω."""
    if omega is not None:
        if told is not None or features == "exact":
            given = f"num_projections={told}" if told is not None else "features='exact'"
            raise ValueError(
                f"this checkpoint has ω of {len(omega)} rows, which is loaded as it is: got "
                f"{given}. Leave it out, and redraw ω afterwards with model.redraw_features()."
            )
        return len(omega)
    if told is not None:
        check_count("num_projections", told)
        return told
    if features in KERNELS or features == "exact":
        return None
    raise ValueError(
        f"features {features!r} need ω, and this checkpoint has none: add the ω that was used "
        "(to a tree of JAX as projection_matrix, num_projections by head_dim), or pass "
        "num_projections= to draw another, with which outputs are another estimate."
    )


def _position(tensors: Mapping[str, Tensor]) -> str:
    if "positions.added" in tensors:
        return "sinusoidal+rotary"
    return "learned" if "positions.embedding.weight" in tensors else "none"


def _model(tensors: Mapping[str, Tensor], row: Library, config: PerformerConfig) -> Imported:
    if not any(name.startswith("layers.") for name in tensors):
        return PerformerAttention(config, 0)
    has_head = "lm_head.weight" in tensors or row.ties_head
    if not has_head or "embed_tokens.weight" not in tensors:
        return PerformerModel(config)
    return PerformerForCausalLM(config) if config.is_decoder else PerformerForMaskedLM(config)


def _load(model: Imported, tensors: Mapping[str, Tensor]) -> None:
    """Load all of them, by names of `PerformerModel`; a bias that attention lacks is 0.

    Raises ValueError unless these are the weights of the model.
    """
    is_whole = isinstance(model, PerformerForMaskedLM | PerformerForCausalLM)
    named = {
        f"performer.{name}" if is_whole and not name.startswith("lm_head.") else name: tensor
        for name, tensor in tensors.items()
    }
    expected = model.state_dict()
    for name in expected.keys() - named.keys():
        if name.endswith(ZERO_IF_ABSENT):
            named[name] = torch.zeros_like(expected[name])
        elif name.endswith((".num_redraws", OMEGA)):  # drawn when the model was made
            named[name] = expected[name]
        elif name == "lm_head.weight":  # tied
            named[name] = named["performer.embed_tokens.weight"]
    _check_weights(named, expected)
    model.load_state_dict(named)


def _check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        shapes = [
            str(tuple(tensors[name].shape)) if name in tensors else "absent"
            for tensors in (found, expected)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the weights of all layers must fit the sizes of the first: {name} is "
                f"{shapes[0]} in the checkpoint and must be {shapes[1]}. Pass the whole state dict "
                "of one model."
            )
