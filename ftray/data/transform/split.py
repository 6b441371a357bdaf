"""Leak-proof parts of one corpus: near duplicates always go to the same part.

The part of a row follows from the smallest content digest in its cluster of near duplicates, so it does not
depend on where or in what order rows stand, and rows that are added move no cluster they are not in.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Field

from ftray.config.recipe import DataConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.data.transform.base import Mask
from ftray.data.transform.dedup import ExactDedup
from ftray.data.transform.minhash import as_keys, clusters, from_keys, signatures

Part = Literal["train", "validation", "test"]
_DIGEST_BYTES = 16


@spec
class Split:
    """Keep one part of the rows; a barrier over the whole data set.

    With `data.validation` left empty, the validation rows are this transform's validation part of `data.train`.
    """

    rule: ClassVar[str] = "other_part"

    validation: float = Field(default=0.05, ge=0, lt=1)
    """Share of the rows for validation (of clusters, to be exact)."""
    test: float = Field(default=0.0, ge=0, lt=1)
    """Share for testing; neither trained nor validated on."""
    part: Part = "train"
    """Which part stays; set by preparation for validation."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives other parts."""
    threshold: float = Field(default=0.6, gt=0.1, le=1)
    """Estimated share of common word n-grams from which two rows belong together; lower is safer."""
    ngram: int = Field(default=5, ge=1, le=32)
    """Words in an n-gram."""

    def __post_init__(self) -> None:
        if self.validation + self.test >= 1:
            raise ConfigError(f"validation: {self.validation} and test {self.test} leave nothing; lower one")

    def keys(self, rows: pa.Table) -> list[bytes]:
        """Content digests (of normalised text) and signatures."""
        contents = ExactDedup().keys(rows)
        return [a + b for a, b in zip(contents, as_keys(signatures(rows, self.ngram)), strict=True)]

    def keep(self, keys: list[list[bytes]]) -> list[Mask]:
        """The rows of this part."""
        flat = [key for unit in keys for key in unit]
        cluster = clusters(from_keys([key[_DIGEST_BYTES:] for key in flat]), self.threshold)
        smallest: dict[int, bytes] = {}
        for row, key in zip(cluster.tolist(), flat, strict=True):
            smallest[row] = min(smallest.get(row, key[:_DIGEST_BYTES]), key[:_DIGEST_BYTES])
        part = {row: self._part(digest) for row, digest in smallest.items()}
        mask = np.array([part[row] == self.part for row in cluster.tolist()], np.bool_)
        return np.split(mask, np.cumsum([len(unit) for unit in keys])[:-1])

    def _part(self, digest: bytes) -> Part:
        place = xxhash.xxh3_64_intdigest(digest, seed=self.seed) / 2**64
        if place < self.validation:
            return "validation"
        return "test" if place < self.validation + self.test else "train"


def part_of(data: DataConfig, split: Literal["train", "validation"]) -> DataConfig:
    """The settings by which one split is prepared: `split` keeps that part, and leaves validation files whole."""
    if split == "train":
        return data
    own_files = data.validation != data.train
    transforms = [
        dataclasses.replace(item, part="validation") if isinstance(item, Split) else item
        for item in data.transforms
        if not (own_files and isinstance(item, Split))
    ]
    return dataclasses.replace(data, transforms=transforms)
