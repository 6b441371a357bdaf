"""Repair of text: Unicode form, line ends, control characters; rows left with nothing to learn go."""

from collections import Counter
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ftray.core.spec import spec
from ftray.data.rows import per_row, span_targets, span_texts, with_span_texts

# C0 controls but tab and newline, DEL, and the byte order mark inside text.
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f\x{feff}]"


@spec
class Clean:
    """Normalise the text of every span; spaces and tabs stay as they are."""

    unicode_form: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalisation form."""
    control_characters: Literal["remove", "keep"] = "remove"
    """Control characters other than tab and newline."""

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, Counter[str]]:
        texts = span_texts(rows)
        if self.unicode_form != "none":
            texts = pc.utf8_normalize(texts, form=self.unicode_form)
        texts = pc.replace_substring_regex(texts, pattern=r"\r\n?", replacement="\n")
        if self.control_characters == "remove":
            texts = pc.replace_substring_regex(texts, pattern=_CONTROL, replacement="")
        blank = np.asarray(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0))
        empty = per_row(rows, blank & np.asarray(span_targets(rows))) > 0
        kept = with_span_texts(rows, texts).filter(pa.array(~empty))
        return kept, Counter(empty=int(empty.sum()))
