"""Repair of text: Unicode form, line ends, control characters; rows left with nothing to learn go."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from ftray.core.spec import spec
from ftray.data.rows import per_row, span_targets, span_texts, with_span_texts
from ftray.data.transform.base import Applied

# C0 controls but tab, newline and carriage return (a line end of its own rule), DEL, and the byte order mark.
_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x{feff}]"
# Zero-width space, word joiner and soft hyphen; the joiners that emoji and some scripts need stay.
_INVISIBLE = r"[\x{200b}\x{2060}\x{00ad}]"


@spec
class Clean:
    """Normalise the text of every span; counts the rows each rule changed."""

    unicode_form: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalisation form."""
    line_ends: Literal["newline", "keep"] = "newline"
    """`newline` turns CR LF and CR into newlines."""
    control_characters: Literal["remove", "keep"] = "remove"
    """Control characters other than tab and newline."""
    invisible_characters: Literal["remove", "keep"] = "keep"
    """Zero-width spaces, word joiners and soft hyphens."""
    trailing_space: Literal["remove", "keep"] = "keep"
    """Spaces and tabs at the ends of lines."""
    max_blank_lines: int | None = Field(default=None, ge=0)
    """Blank lines that may follow one another; null: any number."""

    def __call__(self, rows: pa.Table) -> Applied:
        texts, changed = span_texts(rows), Counter[str]()
        for rule, after in self._rules(texts):
            differs = np.asarray(pc.not_equal(texts, after), np.bool_)
            changed[rule] = int((per_row(rows, differs) > 0).sum())
            texts = after
        blank = np.asarray(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0))
        empty = per_row(rows, blank & np.asarray(span_targets(rows))) > 0
        kept = with_span_texts(rows, texts).filter(pa.array(~empty))
        return Applied(kept, Counter(empty=int(empty.sum())), +changed)

    def _rules(self, texts: pa.StringArray) -> Iterator[tuple[str, pa.StringArray]]:
        """The rules in order, each with the texts after it."""
        if self.unicode_form != "none":
            texts = pc.utf8_normalize(texts, form=self.unicode_form)
            yield "unicode_form", texts
        for rule, (pattern, replacement) in self._patterns().items():
            texts = pc.replace_substring_regex(texts, pattern=pattern, replacement=replacement)
            yield rule, texts

    def _patterns(self) -> dict[str, tuple[str, str]]:
        patterns = {}
        if self.line_ends == "newline":
            patterns["line_ends"] = (r"\r\n?", "\n")
        if self.control_characters == "remove":
            patterns["control_characters"] = (_CONTROL, "")
        if self.invisible_characters == "remove":
            patterns["invisible_characters"] = (_INVISIBLE, "")
        if self.trailing_space == "remove":
            patterns["trailing_space"] = (r"(?m)[ \t]+$", "")
        if self.max_blank_lines is not None:
            patterns["max_blank_lines"] = (
                rf"(?:[ \t]*\n){{{self.max_blank_lines + 2},}}",
                "\n" * (self.max_blank_lines + 1),
            )
        return patterns
