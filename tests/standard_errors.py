"""Random estimates are compared with closed forms in units of their own standard error."""

from torch import Tensor


def assert_mean_within(
    samples: Tensor, expected: Tensor | float, standard_errors: float = 4
) -> None:
    """The mean over the first axis equals `expected`, to 4 standard errors of that mean.

    Samples must be independent along the first axis. Each further position is compared by itself.
    """
    samples = samples.double()
    mean = samples.mean(dim=0)
    # A constant has no standard error, only rounding.
    tolerance = standard_errors * samples.std(dim=0) / len(samples) ** 0.5 + 1e-9 * mean.abs()
    off = (mean - expected).abs() / tolerance.clamp(min=1e-12)
    assert (off <= 1).all(), (
        f"the mean of {len(samples)} samples is {standard_errors * float(off.max()):.1f} standard "
        f"errors away: {mean.tolist()} is not {expected}"
    )
