"""Tokens of a document as coloured text."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from ftray.data.inspect import Document
    from ftray.data.tokenise import Tokeniser

_STYLES = {
    "context": ("dim", "dim white"),
    "target": ("green", "bright_green"),
    "other": ("yellow", "bright_yellow"),
}


def shown(document: "Document", tok: "Tokeniser", *, marks: bool) -> Text:
    """A document's text, every token in the style of what becomes of it.

    Args:
        document: of a prepared data set.
        tok: what it was tokenised with.
        marks: put what is learnt in ⟦ ⟧.
    """
    text, inside = Text(), False
    special = tok.hf.added_tokens_decoder
    for turn, (piece, ids, place) in enumerate(_pieces(document.token_ids, tok)):
        target, weight = document.is_target[place], document.weights[place]
        if marks and target != inside:
            text.append("⟦" if target else "⟧")
        inside = target
        kind = "context" if not target else "target" if weight == 1 else "other"
        underline = " underline" if any(token in special for token in ids) else ""
        text.append(piece, _STYLES[kind][turn % 2] + underline)
    if marks and inside:
        text.append("⟧")
    return text


def _pieces(ids: list[int], tok: "Tokeniser") -> Iterator[tuple[str, list[int], int]]:
    """Text, ids and first place of each token, or of the few that make up one character together."""
    start = 0
    for end in range(1, len(ids) + 1):
        piece = tok.backend.decode(ids[start:end], skip_special_tokens=False)
        # A character may be several tokens; the longest UTF-8 sequence has four bytes.
        if "\ufffd" not in piece or end - start == 4 or end == len(ids):
            yield piece, ids[start:end], start
            start = end
