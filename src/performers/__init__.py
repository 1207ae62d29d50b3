"""Linear-time attention with FAVOR+.

    out = favor_attention(query, key, value, SoftmaxFeatures(dim=64))

The names below are the public ones. Each is imported when it is first used, so that importing the
package takes no time and the core needs torch alone; the models need the extra `hf`.

Source: Choromanski et al. 2021, "Rethinking Attention with Performers", arXiv 2009.14794.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors: what the table below says at run time
    from performers.convert import (
        FavorCache,
        FavorOptions,
        calibrate,
        linearize,
        load_linearized,
        load_state,
        register,
        restore,
        save_state,
    )
    from performers.diagnosis import diagnose
    from performers.distributed import sequence_parallel_attention
    from performers.distributed.heads import shard_heads
    from performers.distributed.models import parallelize
    from performers.functional import (
        attention_matrix,
        draw_projection,
        favor_attention,
        softmax_attention,
    )
    from performers.migration import import_checkpoint
    from performers.models import (
        PerformerConfig,
        PerformerForCausalLM,
        PerformerForConditionalGeneration,
        PerformerForImageGeneration,
        PerformerForMaskedLM,
        PerformerForSequenceClassification,
        PerformerForSequencePairClassification,
        PerformerForTokenClassification,
        PerformerModel,
    )
    from performers.nn import (
        FavorAttention,
        KernelFeatures,
        SharpFeatures,
        SoftmaxFeatures,
    )
    from performers.state import LinearState
    from performers.train.through_time import backward_through_time

    __version__: str

__all__ = [
    "FavorAttention",
    "FavorCache",
    "FavorOptions",
    "KernelFeatures",
    "LinearState",
    "PerformerConfig",
    "PerformerForCausalLM",
    "PerformerForConditionalGeneration",
    "PerformerForImageGeneration",
    "PerformerForMaskedLM",
    "PerformerForSequenceClassification",
    "PerformerForSequencePairClassification",
    "PerformerForTokenClassification",
    "PerformerModel",
    "SharpFeatures",
    "SoftmaxFeatures",
    "attention_matrix",
    "backward_through_time",
    "calibrate",
    "diagnose",
    "draw_projection",
    "favor_attention",
    "import_checkpoint",
    "linearize",
    "load_linearized",
    "load_state",
    "parallelize",
    "register",
    "restore",
    "save_state",
    "sequence_parallel_attention",
    "shard_heads",
    "softmax_attention",
]

_HOME = {
    "FavorCache": "convert",
    "FavorOptions": "convert",
    "calibrate": "convert",
    "linearize": "convert",
    "load_linearized": "convert",
    "register": "convert",
    "restore": "convert",
    "load_state": "convert",
    "save_state": "convert",
    "sequence_parallel_attention": "distributed",
    "parallelize": "distributed.models",
    "shard_heads": "distributed.heads",
    "attention_matrix": "functional",
    "draw_projection": "functional",
    "favor_attention": "functional",
    "softmax_attention": "functional",
    "import_checkpoint": "migration",
    "PerformerConfig": "models",
    "PerformerForCausalLM": "models",
    "PerformerForConditionalGeneration": "models",
    "PerformerForImageGeneration": "models",
    "PerformerForMaskedLM": "models",
    "PerformerForSequenceClassification": "models",
    "PerformerForSequencePairClassification": "models",
    "PerformerForTokenClassification": "models",
    "PerformerModel": "models",
    "FavorAttention": "nn",
    "KernelFeatures": "nn",
    "SharpFeatures": "nn",
    "SoftmaxFeatures": "nn",
    "diagnose": "diagnosis",
    "LinearState": "state",
    "backward_through_time": "train.through_time",
}


def __getattr__(name: str) -> Any:
    """Import `name` from the module it lives in, on first use (PEP 562)."""
    if name == "__version__":
        return metadata.version("performers")
    if name not in _HOME:
        raise AttributeError(f"module 'performers' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"performers.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError(
            f"performers.{name} needs transformers, which is not installed. "
            "Install it with: pip install 'performers[hf]'",
            name=error.name,
        ) from error
    globals()[name] = value  # so that the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
