"""Feature maps as modules, which own ω."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from performers.checks import (
    check_choice,
    check_count,
    check_feature_map,
    check_number,
    check_whole_number,
)
from performers.functional.features import Kernel, kernel_features, resolve_kernel
from performers.functional.fingerprint import fingerprint
from performers.functional.projections import (
    DISTRIBUTIONS,
    PROJECTIONS,
    check_generator,
    draw_projection,
)
from performers.functional.seeds import mixed_seed
from performers.nn.estimators import ESTIMATORS
from performers.typing import Elementwise, FeatureMap, Features, LogLinearSide

__all__ = ["KernelFeatures", "RandomFeatures", "SoftmaxFeatures"]


class RandomFeatures(nn.Module):
    """A feature map that owns ω: a float32 buffer, saved with the weights, redrawn on demand.

    ω is a function of (seed, layer, num_redraws) alone, so it is the same on every rank and device.
    It stays float32 under `.half()` and `.to(torch.bfloat16)`: with 8 bits of mantissa in ω, large
    inputs would get clearly different features.
    """

    omega: Tensor | None
    num_redraws: Tensor
    # ω, its version, and the fingerprint of both
    _known: tuple[Tensor, int, tuple[object, ...] | None] | None = None

    def __init__(
        self,
        dim: int,
        num_projections: int,
        projection: str | None,
        distribution: str,
        seed: int,
        layer: int,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_whole_number("seed", seed)
        check_whole_number("layer", layer)
        self.dim = dim
        self.projection = projection
        self.distribution = distribution
        self.seed = seed
        self.layer = layer
        omega = None
        if projection is not None:
            check_count("num_projections", num_projections)
            check_choice("projection", projection, PROJECTIONS)
            omega = torch.empty(num_projections, dim, dtype=torch.float32, device="cpu")
        self.num_projections = num_projections if omega is not None else dim
        self.register_buffer("omega", omega)
        self.register_buffer("num_redraws", torch.zeros((), dtype=torch.int64, device="cpu"))
        self._draw(None)

    def fitted(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        *,
        scale: float,
        is_streaming: bool,
    ) -> FeatureMap:
        """The map itself, because these features do not depend on the call.

        Raises ValueError for queries of another dim or on another device.
        """
        check_feature_map(query, self.dim, self.num_redraws.device)
        phi: FeatureMap = self  # type: ignore[assignment]  # subclasses have the features
        return phi

    @property
    def fingerprint(self) -> tuple[object, ...] | None:
        """See `performers.functional.fingerprint`. Made again only when ω has changed."""
        omega = self.omega
        if omega is None or torch.compiler.is_compiling() or omega.is_inference():
            return fingerprint(self._kind(), () if omega is None else (omega,))
        known = self._known
        if known is None or known[0] is not omega or known[1] != omega._version:
            known = omega, omega._version, fingerprint(self._kind(), (omega,))
            self._known = known
        return known[2]

    def _kind(self) -> tuple[object, ...]:
        """What else than ω tells these features from others."""
        return (type(self).__name__,)

    def reset_parameters(self) -> None:
        """Draw the first ω of this seed and layer."""
        self.num_redraws.zero_()
        self._draw(None)

    def redraw(self, generator: Generator | None = None) -> None:
        """Replace ω by the next draw of this seed and layer, or by a draw from `generator`."""
        check_generator(generator)
        self.num_redraws += 1
        self._draw(generator)

    @torch.no_grad()
    def _draw(self, generator: Generator | None) -> None:
        # Under torch.device("meta") there is no memory to draw into; the weights are loaded later.
        if self.omega is None or self.omega.is_meta:
            return
        if generator is None:
            generator = Generator().manual_seed(
                mixed_seed(self.seed, self.layer, int(self.num_redraws))
            )
        assert self.projection is not None, "a map with omega has a kind of projection"
        omega = draw_projection(
            self.num_projections, self.dim, self.projection, self.distribution, generator
        )
        self.omega.copy_(omega)

    def __getstate__(self) -> dict[str, Any]:
        # Versions are of these tensors: those of a copy count anew, and may come to the same number
        # for another draw.
        return {**self.__dict__, "_known": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .half() and .to(dtype) cast every floating buffer. Those of φ are put back, on the new
        # device.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_projections={self.num_projections}, "
            f"projection={self.projection!r}, distribution={self.distribution!r}, "
            f"seed={self.seed}, layer={self.layer}"
        )


class SoftmaxFeatures(RandomFeatures):
    """Random features of the softmax kernel; `default_scale` is 1/√dim, as in softmax attention.

    `estimator`: a row of `performers.nn.estimators`: "positive" (the paper's SM⁺), "hyperbolic"
    (SM^hyp+, twice the features), "trigonometric" (SM^trig: unstable, for comparison).
    `projection`, `distribution`: see `draw_projection`. Defaults are the paper's (Appendix A.3).
    `layer` makes the layers of a model differ under one seed.

    Raises ValueError for unknown words or counts below 1.

    >>> SoftmaxFeatures(dim=64).omega.shape
    torch.Size([256, 64])
    """

    def __init__(
        self,
        dim: int,
        num_projections: int = 256,
        estimator: str = "positive",
        projection: str = "orthogonal",
        distribution: str = "gaussian",
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("projection", projection, PROJECTIONS)
        super().__init__(dim, num_projections, projection, distribution, seed, layer)
        self.estimator = estimator
        if not self.is_nonnegative:
            _warn_of_signs(f"{estimator} features", 'use estimator="positive"')

    @property
    def num_features(self) -> int:
        return self.num_projections * ESTIMATORS[self.estimator].features_per_projection

    @property
    def default_scale(self) -> float:
        return self.dim**-0.5

    @property
    def is_softmax(self) -> bool:
        return True

    @property
    def is_nonnegative(self) -> bool:
        return ESTIMATORS[self.estimator].is_nonnegative

    def _kind(self) -> tuple[object, ...]:
        return *super()._kind(), self.estimator

    @property
    def is_log_linear(self) -> bool:
        return ESTIMATORS[self.estimator].side is not None

    def query_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        assert self.omega is not None, "softmax features always have omega"
        return ESTIMATORS[self.estimator].features(x, self.omega)

    def key_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        return self.query_features(x)

    def query_side(self, dtype: torch.dtype) -> LogLinearSide:
        """The features before the product with ω, where `is_log_linear`."""
        assert self.omega is not None, "softmax features always have omega"
        side = ESTIMATORS[self.estimator].side
        assert side is not None, "only log-linear features are asked for their sides"
        return side(self.omega.to(dtype))

    def key_side(self, dtype: torch.dtype) -> LogLinearSide:
        return self.query_side(dtype)

    def extra_repr(self) -> str:
        return f"estimator={self.estimator!r}, {super().extra_repr()}"


class KernelFeatures(RandomFeatures):
    """Features of a generalized kernel; Performer-ReLU, the paper's default, is
    `KernelFeatures(dim)`.

    `fn`: a name in `performers.functional.KERNELS`, an elementwise callable or a `Kernel`.
    `epsilon` is added to every value (Appendix A.4).
    `projection=None` leaves out ω: φ(x) = fn(x) + ε of width dim, and
    `num_projections` has no part in it. `default_scale` is 1.

    Raises ValueError for unknown words or counts below 1.
    """

    def __init__(
        self,
        dim: int,
        num_projections: int = 256,
        fn: str | Callable[[Tensor], Tensor] | Kernel = "relu",
        epsilon: float = 1e-3,
        projection: str | None = "orthogonal",
        distribution: str = "gaussian",
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        kernel = resolve_kernel(fn)
        check_number("epsilon", epsilon, or_zero=True)
        super().__init__(dim, num_projections, projection, distribution, seed, layer)
        self.fn = fn
        self.kernel = kernel
        self.epsilon = epsilon
        if not kernel.is_nonnegative:
            _warn_of_signs(
                f"features of the kernel {fn!r}",
                'use a nonnegative kernel such as "relu" (of a callable of your own say so by '
                "Kernel(fn, is_nonnegative=True))",
            )

    @property
    def num_features(self) -> int:
        return self.num_projections

    @property
    def default_scale(self) -> float:
        return 1.0

    @property
    def is_softmax(self) -> bool:
        return False

    @property
    def is_nonnegative(self) -> bool:
        return self.kernel.is_nonnegative

    def _kind(self) -> tuple[object, ...]:
        # A callable has no identity that lasts: of two of them, ω alone is compared.
        return *super()._kind(), self.fn if isinstance(self.fn, str) else None, self.epsilon

    @property
    def elementwise(self) -> Elementwise | None:
        """The features before they are computed, where `fn` names a kernel with a derivative.

        A callable may hold parameters that learn, which only autograd knows.
        """
        if isinstance(self.fn, str) and self.kernel.backward is not None:
            return Elementwise(self.fn, self.epsilon, self.omega)
        return None

    def query_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        return kernel_features(x, self.omega, self.fn, self.epsilon)

    def key_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        return self.query_features(x)

    def extra_repr(self) -> str:
        return f"fn={self.fn!r}, epsilon={self.epsilon}, {super().extra_repr()}"


def _warn_of_signs(what: str, remedy: str) -> None:
    """Python shows the warning once for each line that makes such a map."""
    warnings.warn(
        f"{what} can be negative, so the normalizer of attention may vanish or change sign and "
        f"outputs may be of any size: {remedy}, or attend with normalize=False.",
        stacklevel=3,
    )
