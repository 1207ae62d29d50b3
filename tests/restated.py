"""What other libraries compute, restated from their formulas in float64: the oracles of imports.

Attention is written with the whole matrix; weights are random. Each model is a pair: `weights`, by
the library's names, and a function of them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

VOCABULARY, HIDDEN, HEADS, DIM, ROWS, MAX_LENGTH = 31, 20, 5, 8, 13, 67


def drawn(*shape: int, scale: float = 0.4) -> Tensor:
    return scale * torch.randn(*shape)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_sum: float = 0.0,
    added: float = 0.0,
    small: float = 0.0,
) -> Tensor:
    """Of features: their products, normalized as each library does."""
    weights = query @ key.mT
    if is_causal:
        weights = weights.tril()
    normalizer = weights.sum(dim=-1, keepdim=True)
    normalizer = normalizer + key_sum * query.sum(dim=-1, keepdim=True) + added
    normalizer = normalizer + 2 * small * (normalizer.abs() <= small)
    return weights @ value / normalizer


def epsilon_features(x: Tensor, omega: Tensor, epsilon: float, is_query: bool) -> Tensor:
    """`softmax_kernel` of performer-pytorch, and Google's nonnegative features."""
    x = x * x.shape[-1] ** -0.25
    projected = x @ omega.mT
    largest = projected.amax(dim=-1 if is_query else (-1, -2), keepdim=True)
    exponent = projected - x.square().sum(dim=-1, keepdim=True) / 2 - largest
    return (exponent.exp() + epsilon) / math.sqrt(len(omega))


def in_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def doubled(weights: dict[str, Any]) -> dict[str, Any]:
    """Of a state dict, or of a tree."""
    return {
        name: doubled(leaf) if isinstance(leaf, dict) else leaf.double()
        for name, leaf in weights.items()
    }


def named(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: drawn(*shape) for name, shape in shapes.items()}


# performer-pytorch 1.1.4


def performer_pytorch_weights(
    position: str = "rotary", has_biases: bool = False, is_tied: bool = False, layers: int = 2
) -> dict[str, Tensor]:
    inner = HEADS * DIM
    layer = {
        "0.norm.weight": (HIDDEN,),
        "0.norm.bias": (HIDDEN,),
        **{f"0.fn.to_{part}.weight": (inner, HIDDEN) for part in "qkv"},
        "0.fn.to_out.weight": (HIDDEN, inner),
        "0.fn.fast_attention.projection_matrix": (ROWS, DIM),
        "1.norm.weight": (HIDDEN,),
        "1.norm.bias": (HIDDEN,),
        "1.fn.fn.w1.weight": (4 * HIDDEN, HIDDEN),
        "1.fn.fn.w1.bias": (4 * HIDDEN,),
        "1.fn.fn.w2.weight": (HIDDEN, 4 * HIDDEN),
        "1.fn.fn.w2.bias": (HIDDEN,),
    }
    if has_biases:
        layer |= {f"0.fn.to_{part}.bias": (inner,) for part in "qkv"}
        layer["0.fn.to_out.bias"] = (HIDDEN,)
    weights = named(
        {"token_emb.weight": (VOCABULARY, HIDDEN), "norm.weight": (HIDDEN,), "norm.bias": (HIDDEN,)}
    )
    for number in range(layers):
        weights |= named(layer, f"performer.net.layers.{number}.")
        weights[f"performer.net.layers.{number}.0.fn.fast_attention.projection_matrix"] *= 2.5
    repeated = {  # as the module that redraws keeps them once more
        name.replace(".net.", ".proj_updater.instance."): tensor
        for name, tensor in weights.items()
        if ".net." in name
    }
    weights |= repeated | {"performer.proj_updater.calls_since_last_redraw": torch.tensor(7)}
    if position == "rotary":
        for name, dim in (("pos_emb.emb", HIDDEN), ("layer_pos_emb.emb", DIM)):
            frequency = 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)
            angle = torch.arange(MAX_LENGTH).unsqueeze(1) * frequency
            weights[name] = torch.cat([angle.sin(), angle.cos()], dim=-1)
    elif position == "absolute":
        weights["pos_emb.emb.weight"] = drawn(MAX_LENGTH, HIDDEN)
    else:
        weights |= {
            "pos_emb.weights.0": drawn(1, 7, 1, HIDDEN),
            "pos_emb.weights.1": drawn(1, 1, 11, HIDDEN),
        }
    if not is_tied:
        weights |= named({"to_out.weight": (VOCABULARY, HIDDEN), "to_out.bias": (VOCABULARY,)})
    return weights


def performer_pytorch(
    weights: dict[str, Tensor],
    tokens: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    kernel: str | None = None,
) -> Tensor:
    """The logits of `PerformerLM` in evaluation."""
    w = doubled(weights)
    length = tokens.shape[1]
    x = w["token_emb.weight"][tokens]
    if "pos_emb.weights.0" in w:
        x = x + (w["pos_emb.weights.0"] + w["pos_emb.weights.1"])[0].flatten(0, 1)[:length]
    else:
        x = x + w.get("pos_emb.emb.weight", w.get("pos_emb.emb"))[:length]
    numbers = {int(name.split(".")[3]) for name in w if name.startswith("performer.net.")}
    for number in sorted(numbers):
        layer = f"performer.net.layers.{number}."
        x = x + performer_pytorch_attention(
            w, layer, norm(x, w, f"{layer}0.norm"), mask, is_causal, kernel
        )
        y = F.gelu(linear(norm(x, w, f"{layer}1.norm"), w, f"{layer}1.fn.fn.w1"))
        x = x + linear(y, w, f"{layer}1.fn.fn.w2")
    x = norm(x, w, "norm")
    return linear(x, w, "to_out") if "to_out.weight" in w else x @ w["token_emb.weight"].mT


def performer_pytorch_attention(
    w: dict[str, Tensor],
    layer: str,
    x: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    kernel: str | None,
) -> Tensor:
    q, k, v = (in_heads(linear(x, w, f"{layer}0.fn.to_{part}"), HEADS) for part in "qkv")
    if mask is not None:
        v = v * mask[:, None, :, None]  # the keys stay as they are
    if "layer_pos_emb.emb" in w:
        q, k = (_turned_by_neighbors(part, w["layer_pos_emb.emb"]) for part in (q, k))
    omega = w[f"{layer}0.fn.fast_attention.projection_matrix"]
    if kernel is None:
        q, k = (epsilon_features(part, omega, 1e-4, part is q) for part in (q, k))
    else:
        function = {"relu": torch.relu, "elu+1": lambda x: F.elu(x) + 1}[kernel]
        q, k = (function(part * DIM**-0.25 @ omega.mT) + 1e-3 for part in (q, k))
    out = attention(q, k, v, is_causal, key_sum=1e-6 if is_causal else 0.0)
    return linear(out.transpose(1, 2).flatten(2), w, f"{layer}0.fn.to_out")


def _turned_by_neighbors(x: Tensor, table: Tensor) -> Tensor:
    """Coordinates 0 and 1, 2 and 3, … turned by the angles of a table of sines, then cosines."""
    sin, cos = table[: x.shape[2]].chunk(2, dim=-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


# pytorch-fast-transformers 0.4.0


def fast_transformers_weights(
    has_omega: bool = True, has_norm: bool = True, layers: int = 2
) -> dict[str, Tensor]:
    inner = HEADS * DIM
    layer = {
        **{
            f"attention.{part}_projection.weight": (inner, HIDDEN)
            for part in ("query", "key", "value")
        },
        **{f"attention.{part}_projection.bias": (inner,) for part in ("query", "key", "value")},
        "attention.out_projection.weight": (HIDDEN, inner),
        "attention.out_projection.bias": (HIDDEN,),
        "linear1.weight": (37, HIDDEN),
        "linear1.bias": (37,),
        "linear2.weight": (HIDDEN, 37),
        "linear2.bias": (HIDDEN,),
        **{f"norm{number}.{part}": (HIDDEN,) for number in (1, 2) for part in ("weight", "bias")},
    }
    weights = {}
    for number in range(layers):
        weights |= named(layer, f"layers.{number}.")
        if has_omega:
            weights[f"layers.{number}.attention.inner_attention.feature_map.omega"] = torch.randn(
                DIM, ROWS
            )
    if has_norm:
        weights |= named({"norm.weight": (HIDDEN,), "norm.bias": (HIDDEN,)})
    return weights


def fast_transformers(
    weights: dict[str, Tensor],
    x: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    features: str = "hyperbolic",
    softmax_temp: float | None = None,
) -> Tensor:
    """The output of `TransformerEncoder` in evaluation, of embeddings."""
    w = doubled(weights)
    x = x.double()
    for number in sorted({int(name.split(".")[1]) for name in w if name.startswith("layers.")}):
        layer = f"layers.{number}."
        q, k, v = (
            in_heads(linear(x, w, f"{layer}attention.{part}_projection"), HEADS)
            for part in ("query", "key", "value")
        )
        omega = w.get(f"{layer}attention.inner_attention.feature_map.omega")
        out = _fast_transformers_attention(q, k, v, omega, mask, is_causal, features, softmax_temp)
        out = linear(out.transpose(1, 2).flatten(2), w, f"{layer}attention.out_projection")
        x = norm(x + out, w, f"{layer}norm1")
        y = linear(torch.relu(linear(x, w, f"{layer}linear1")), w, f"{layer}linear2")
        x = norm(x + y, w, f"{layer}norm2")
    return norm(x, w, "norm") if "norm.weight" in w else x


def _fast_transformers_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    features: str,
    softmax_temp: float | None,
) -> Tensor:
    if features == "exact":
        scores = q @ k.mT * DIM**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
        return scores.softmax(dim=-1) @ v
    if features == "hyperbolic":  # Favor
        temperature = DIM**-0.5 if softmax_temp is None else softmax_temp

        def phi(x: Tensor) -> Tensor:
            x = x * temperature**0.5
            offset = x.square().sum(dim=-1, keepdim=True) / 2 + math.log(2 * ROWS) / 2
            return torch.cat([(x @ omega - offset).exp(), (-x @ omega - offset).exp()], dim=-1)

    elif features == "relu":  # GeneralizedRandomFeatures

        def phi(x: Tensor) -> Tensor:
            return torch.relu(x @ omega)

    else:  # elu_feature_map

        def phi(x: Tensor) -> Tensor:
            return F.elu(x) + 1

    keys = phi(k) if mask is None else phi(k) * mask[:, None, :, None]
    return attention(phi(q), keys, v, is_causal, added=1e-6)


# google-research/performer, in the models of google-research/protein_lm (old Flax) or of Flax Linen

Tree = dict[str, Any]


def google_tree(is_linen: bool = False, has_biases: bool = False, omega: str = "") -> Tree:
    """`omega`: "shared", "own" of each layer, or none."""

    def dense(rows: int, columns: int) -> Tree:
        return {"kernel": drawn(rows, columns), "bias": drawn(columns)}

    def layer_norm() -> Tree:
        return {"scale": drawn(HIDDEN), "bias": drawn(HIDDEN)}

    def self_attention() -> Tree:
        inner: Tree = {
            part: {"kernel": drawn(HIDDEN, HEADS, DIM)} for part in ("query", "key", "value")
        }
        inner["out"] = {"kernel": drawn(HEADS, DIM, HIDDEN)}
        if has_biases:
            for part in ("query", "key", "value"):
                inner[part]["bias"] = drawn(HEADS, DIM)
            inner["out"]["bias"] = drawn(HIDDEN)
        if omega == "own":
            inner["projection_matrix"] = torch.randn(ROWS, DIM)
        return inner

    # Old Flax counts all modules of a parent, Linen those of one class.
    second, mlp = ("LayerNorm_1", "MlpBlock_0") if is_linen else ("LayerNorm_2", "MlpBlock_3")
    tree: Tree = {
        "Dense_14": dense(HIDDEN, VOCABULARY),
        "LayerNorm_13": layer_norm(),
        "embed": {"embedding": drawn(VOCABULARY, HIDDEN)},
        "AddLearnedPositionalEncodings_1": {"pos_embedding": drawn(1, MAX_LENGTH, HIDDEN)},
    }
    for number in (12, 10, 2):  # in no order, and "10" is before "2" as text
        tree[f"Transformer1DBlock_{number}"] = {
            mlp: {"Dense_1": dense(29, HIDDEN), "Dense_0": dense(HIDDEN, 29)},
            second: layer_norm(),
            "LayerNorm_0": layer_norm(),
            "SelfAttention_1": self_attention(),
        }
    if omega == "shared":
        tree["projection_matrix"] = torch.randn(ROWS, DIM)
    return tree


def google_arrays(tree: Tree, above: str = "") -> dict[str, Any]:
    """The arrays of a tree by names such as "a/b", as flax.traverse_util.flatten_dict has them."""
    arrays = {}
    for name, leaf in tree.items():
        full = f"{above}{name}"
        arrays |= (
            google_arrays(leaf, f"{full}/") if isinstance(leaf, dict) else {full: leaf.numpy()}
        )
    return arrays


def google(
    tree: Tree,
    tokens: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    kernel: str | None = None,
) -> Tensor:
    """The logits in evaluation."""
    tree = doubled(tree)

    def layer_norm(x: Tensor, w: Tree) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w["scale"], w["bias"], eps=1e-6)

    x = tree["embed"]["embedding"][tokens]
    x = x + tree["AddLearnedPositionalEncodings_1"]["pos_embedding"][0, : tokens.shape[1]]
    for number in (2, 10, 12):
        block = tree[f"Transformer1DBlock_{number}"]
        second = block.get("LayerNorm_1", block.get("LayerNorm_2"))
        mlp = block.get("MlpBlock_0", block.get("MlpBlock_3"))
        inner = layer_norm(x, block["LayerNorm_0"])
        x = x + google_attention(block["SelfAttention_1"], tree, inner, mask, is_causal, kernel)
        y = layer_norm(x, second) @ mlp["Dense_0"]["kernel"] + mlp["Dense_0"]["bias"]
        y = F.gelu(y, approximate="tanh")
        x = x + y @ mlp["Dense_1"]["kernel"] + mlp["Dense_1"]["bias"]
    return (
        layer_norm(x, tree["LayerNorm_13"]) @ tree["Dense_14"]["kernel"] + tree["Dense_14"]["bias"]
    )


def google_attention(
    w: Tree, tree: Tree, x: Tensor, mask: Tensor | None, is_causal: bool, kernel: str | None
) -> Tensor:
    q, k, v = (
        torch.einsum("bli,ihd->bhld", x, w[part]["kernel"])
        + w[part].get("bias", torch.zeros(HEADS, DIM)).unsqueeze(1)
        for part in ("query", "key", "value")
    )
    if mask is not None:
        v = v * mask[:, None, :, None]
    omega = w.get("projection_matrix", tree.get("projection_matrix"))
    if kernel is None:
        q, k = (epsilon_features(part, omega, 1e-6, part is q) for part in (q, k))
        out = attention(q, k, v, is_causal, small=1e-6)
    else:
        function = {"relu": torch.relu, "sigmoid": torch.sigmoid}[kernel]
        q, k = (function(part if omega is None else part @ omega.mT) + 1e-3 for part in (q, k))
        out = attention(q, k, v, is_causal)
    return torch.einsum("bhld,hdi->bli", out, w["out"]["kernel"]) + w["out"].get("bias", 0.0)
