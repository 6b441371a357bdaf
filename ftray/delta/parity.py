"""The parity certificate: that a delta alone, merged into its base and served gives the same answers.

It is measured where there is an engine (`ftray.eval.parity`) and kept in the delta's manifest.
"""

from pydantic import Field

from ftray.core.errors import DeltaError
from ftray.core.spec import spec

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a log-probability that still counts as equal, by the type that is served."""


@spec
class Parity:
    """What was compared, and how far the answers were apart."""

    delta: str
    """Digest of the delta."""
    base: str
    """Digest of its base."""
    engine: str
    """The engine that served it."""
    dtype: str
    """Type of the served and the merged weights; the delta alone is computed in float32."""
    num_prompts: int
    """Fixed prompts."""
    num_tokens: int
    """Tokens whose log-probabilities were compared."""
    merged_difference: float
    """Largest difference between the delta alone and merged (natural logarithm)."""
    served_difference: float
    """Largest difference between the delta alone and served."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the libraries that computed it."""

    @property
    def tolerance(self) -> float:
        """What the differences may be."""
        return TOLERANCES[self.dtype]


def check_parity(parity: Parity, digest: str) -> None:
    """Refuse a certificate that is of another delta or does not hold.

    Raises:
        DeltaError: one line with the figures.
    """
    if parity.delta != digest:
        raise DeltaError(f"parity: the certificate is of {parity.delta}, not of {digest}; measure it again")
    for name, found in (("merged", parity.merged_difference), ("served", parity.served_difference)):
        if not found <= parity.tolerance:  # NaN too
            raise DeltaError(
                f"parity: {name} and alone, log-probabilities differ by {found:.2e}, more than"
                f" {parity.tolerance:g} ({parity.dtype}, {parity.engine}); it would not answer as it was trained"
            )
