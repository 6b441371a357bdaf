"""Spans to tokens: rendering by shape, labels and weights by span.

`text` is a target from end to end; `prompt` + `completion` has a target completion; `messages` go through the
tokenizer's own chat template, one answer at a time (`ftray.data.chat`). Context and target are tokenised apart,
so training sees the same boundary as serving, which encodes the context before anything is generated.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray.core.errors import DataError
from ftray.core.fs import digest_bytes, digest_json
from ftray.data.chat import ChatTemplate, Segment
from ftray.data.pairs import sides
from ftray.data.read import IGNORE_INDEX
from ftray.data.rows import BadRow, Row, Span
from ftray.data.spans import LABELLED, PAIR

__all__ = ["Documents", "Segment", "Tokenised", "Tokeniser", "tokenise", "tokeniser"]

# More documents per call made the tokenizer slower, fewer made the calls count.
_DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True)
class Documents:
    """D tokenised documents laid end to end: N tokens."""

    input_ids: npt.NDArray[np.int32]
    """Token ids, [N]."""
    labels: npt.NDArray[np.int32]
    """The token's own id where it is a target, else -100, [N]."""
    weights: npt.NDArray[np.float32]
    """Weight in the loss, [N]."""
    lens: npt.NDArray[np.int64]
    """Tokens of each document, [D]."""

    def have_targets(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Which stretches [start, stop) of the tokens hold a target."""
        is_target = np.append(self.labels != IGNORE_INDEX, False)  # so that N is a place too
        bounds = np.stack([starts, stops], axis=1).ravel()
        return np.logical_or.reduceat(is_target, bounds)[::2] & (stops > starts)


class Tokenised(NamedTuple):
    """What a table of rows gave."""

    documents: Documents
    """The documents in the order of the rows."""
    bad: list[tuple[int, str]]
    """(row index, reason) of each row that gives no target token."""
    row_of: npt.NDArray[np.int64]
    """The row each document comes from, [D]; a conversation may give several."""
    groups: npt.NDArray[np.int64] | None = None
    """Documents of each group (2: a preference pair), in order; None: each document by itself."""


def chat_template_hash(tokenizer: Any) -> str:
    """Digest of the chat template's bytes; `none` if the tokenizer has no template."""
    template = tokenizer.chat_template
    if not template:
        return "none"
    return digest_bytes(template.encode()) if isinstance(template, str) else digest_json(template)


class Tokeniser:
    """A Hugging Face tokenizer and its chat template, as preparation uses them.

    Args:
        folder: a tokenizer or model folder, or a Hub id.
        hf: the tokenizer itself, if it is loaded already.

    Raises:
        DataError: one line, if there is no (fast) tokenizer or it has no end-of-sequence token.
    """

    def __init__(self, folder: str, hf: Any = None) -> None:
        self.folder = folder
        self.hf = hf or _load(folder)
        self.backend = self.hf.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        if self.hf.eos_token_id is None:
            raise DataError(f"{folder}: the tokenizer has no `eos_token`; set it in tokenizer_config.json")
        self.chat = ChatTemplate(self.hf, folder)
        self._eos = (int(self.hf.eos_token_id),)
        # Only tokenizers that put a beginning-of-sequence token in front of plain text get one here.
        self._bos = tuple(self.hf("")["input_ids"][:1])
        if self._bos != (self.hf.bos_token_id,) or self._bos == self._eos:
            self._bos = ()

    @functools.cached_property
    def digest(self) -> str:
        """Digest of everything that decides the token ids."""
        specials = {"eos": self._eos, "bos": self._bos}
        return digest_json({"backend": self.backend.to_str(), **specials})

    @property
    def template_digest(self) -> str:
        """See `chat_template_hash`."""
        return chat_template_hash(self.hf)

    def documents(self, row: Row) -> list[list[Segment]]:
        """A row as documents of segments. Raises `BadRow` if the chat template refuses it."""
        if row.shape == LABELLED:
            raise DataError(
                f"data: rows of the shape {LABELLED} hold answers to judge, which no objective here does; to learn "
                "them all, set `columns: {prompt: prompt, completion: completion}`"
            )
        if row.shape == PAIR:
            return self._pair(row)
        if row.is_chat:
            return self.chat.documents(row.spans)
        *context, last = (Segment(span.text, span.weight if span.target else 0.0) for span in row.spans)
        # A text that is rendered already may end with the token that ends it.
        after = () if last.text.endswith(self.hf.eos_token) else self._eos
        parts = [*context, Segment(last.text, last.weight, after=after)]
        return [[Segment(parts[0].text, parts[0].weight, self._bos, parts[0].after), *parts[1:]]]

    def _pair(self, row: Row) -> list[list[Segment]]:
        chosen, rejected = (self.documents(side) for side in sides(row))
        if len(chosen) != 1 or len(rejected) != 1:
            raise BadRow("the chat template rewrites earlier turns of `chosen` or `rejected`")
        return [*chosen, *rejected]

    def segments(self, row: Row) -> list[Segment]:
        """The document of a row's last (or chosen) answer, which is the last segment. Raises as `documents`."""
        return self.documents(row)[0 if row.shape == PAIR else -1]

    def prompt_ids(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Tokens before the answer to some messages (`role`, `content`), as training has them.

        Raises:
            BadRow: if the chat template refuses them.
        """
        return self.encode([[self.chat.prompt(messages, tools)]])[0][0]

    def encode(self, documents: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Token ids of every segment of every document."""
        return list(self._encoded(documents))

    def _encoded(self, documents: Sequence[Sequence[Segment]]) -> Iterator[list[list[int]]]:
        for start in range(0, len(documents), _DOCUMENTS_PER_CALL):
            chunk = documents[start : start + _DOCUMENTS_PER_CALL]
            pieces = [segment.pieces() for document in chunk for segment in document]
            texts = [text for piece in pieces for text, literal in piece if not literal]
            encoded = (e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False))
            piece = iter(pieces)
            for document in chunk:
                yield [self._ids(segment, next(piece), encoded) for segment in document]

    def laid(self, documents: Sequence[Sequence[Segment]]) -> Documents:
        """Documents encoded and laid end to end, each segment's weight and label on its tokens."""
        segment_lens: list[int] = []
        doc_lens: list[int] = []

        def parts() -> Iterator[list[int]]:
            for document in self._encoded(documents):
                segment_lens.extend(map(len, document))
                doc_lens.append(sum(map(len, document)))
                yield from document

        # Not all lists at once: Python's integers take ten times the room of the array's.
        input_ids = np.fromiter(itertools.chain.from_iterable(parts()), np.int32)
        lens = np.array(doc_lens, np.int64)
        weight_of = np.array([s.weight for segments in documents for s in segments], np.float32)
        weights = np.repeat(weight_of, segment_lens)
        # Nothing stands before the first token of a document to predict it from.
        weights[(np.cumsum(lens) - lens)[lens > 0]] = 0.0
        labels = np.where(weights > 0, input_ids, np.int32(IGNORE_INDEX))
        return Documents(input_ids, labels, weights, lens)

    def _ids(
        self, segment: Segment, pieces: Sequence[tuple[str, bool]], encoded: Iterator[list[int]]
    ) -> list[int]:
        """Token ids of a segment; `encoded` gives those of its pieces that are not literal."""
        found = list(segment.before)
        for text, literal in pieces:
            ids = self._literal(text) if literal else next(encoded)
            found = found + ids if found else ids  # mostly there is one piece: nothing is copied
        found.extend(segment.after)
        return found

    def _literal(self, text: str) -> list[int]:
        """Tokens of a special token's spelling as plain text."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def _plain(self) -> Any:
        """The tokenizer without its added tokens."""
        content = json.loads(self.backend.to_str())
        for token in content["added_tokens"]:
            token["special"] = True  # only special tokens can be left unread
        plain = type(self.backend).from_str(json.dumps(content))
        plain.encode_special_tokens = True
        return plain


@functools.lru_cache(maxsize=4)
def tokeniser(folder: str) -> Tokeniser:
    """The tokeniser of a folder, loaded once in a process."""
    return Tokeniser(folder)


def _load(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{folder}: no tokenizer can be loaded from there ({reason})") from None
    if not getattr(loaded, "is_fast", False):
        raise DataError(f"{folder}: its tokenizer has no `tokenizer.json`; convert it to a fast tokenizer")
    return loaded


def tokenise(rows: pa.Table, tok: Tokeniser) -> Tokenised:
    """Tokenise a table of rows."""
    documents: list[list[Segment]] = []
    bad: list[tuple[int, str]] = []
    row_of: list[int] = []
    pairs: list[int] = []
    for index, row in enumerate(_rows(rows)):
        try:
            found = tok.documents(row)
        except BadRow as error:
            bad.append((index, str(error)))
            continue
        documents.extend(found)
        row_of.extend([index] * len(found))
        pairs.extend([index] * (row.shape == PAIR))
    laid = tok.laid(documents)
    ends = np.cumsum(laid.lens)
    of, stays = np.array(row_of, np.int64), laid.have_targets(ends - laid.lens, ends)
    if pairs:  # none without the other
        stays &= ~np.isin(of, np.intersect1d(pairs, of[~stays]))
    kept = of[stays]
    bad += [(index, "no target token") for index in np.setdiff1d(of, kept).tolist()]
    groups = _group_sizes(kept, pairs) if pairs else None
    return Tokenised(_those(laid, stays), sorted(bad), kept, groups)


def _group_sizes(row_of: npt.NDArray[np.int64], pairs: list[int]) -> npt.NDArray[np.int64]:
    """Documents of each group: a pair's belong together, any other stands by itself."""
    begins = ~np.isin(row_of, pairs)
    begins[:1] = True
    begins[1:] |= row_of[1:] != row_of[:-1]
    return np.diff(np.flatnonzero(begins), append=len(row_of))


def _rows(table: pa.Table) -> Iterator[Row]:
    for shape, spans in zip(table["shape"].to_pylist(), table["spans"].to_pylist(), strict=True):
        yield Row(shape, tuple(Span(**span) for span in spans))


def _those(documents: Documents, stays: npt.NDArray[np.bool_]) -> Documents:
    """The documents that stay."""
    if stays.all():
        return documents
    of = np.repeat(stays, documents.lens)
    return Documents(
        documents.input_ids[of], documents.labels[of], documents.weights[of], documents.lens[stays]
    )
