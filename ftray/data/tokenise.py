"""Spans to tokens: rendering by shape, labels and weights by span.

`text` is a target from end to end; `prompt` + `completion` has a target completion; `messages` go through the
tokenizer's own chat template, one assistant turn at a time: what stands before a turn (with the generation
prompt) is context, what the turn adds (with its end of turn) is target. Context and target are tokenised
apart, so training sees the same boundary as serving, which encodes the context before anything is generated.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray.core.errors import DataError
from ftray.core.fs import digest_bytes, digest_json
from ftray.data.read import IGNORE_INDEX
from ftray.data.rows import BadRow, Row, Span

# More documents per call made the tokenizer slower, fewer made the calls count.
_DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True)
class Segment:
    """A piece of a document that is tokenised by itself."""

    text: str
    """The rendered characters."""
    weight: float = 0.0
    """Weight of its tokens in the loss; 0: context."""
    before: tuple[int, ...] = ()
    """Token ids put in front of it."""
    after: tuple[int, ...] = ()
    """Token ids put behind it."""


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


class Tokeniser:
    """A Hugging Face tokenizer and its chat template, as preparation uses them.

    Args:
        folder: a tokenizer or model folder, or a Hub id.

    Raises:
        DataError: one line, if there is no (fast) tokenizer or it has no end-of-sequence token.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.hf = _load(folder)
        self.backend = self.hf.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        if self.hf.eos_token_id is None:
            raise DataError(f"{folder}: the tokenizer has no `eos_token`; set it in tokenizer_config.json")
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
        """Digest of the chat template's bytes, `none` if there is no template."""
        template = self.hf.chat_template
        if not template:
            return "none"
        return digest_bytes(template.encode()) if isinstance(template, str) else digest_json(template)

    def segments(self, row: Row) -> list[Segment]:
        """A row as segments. Raises `BadRow` if the chat template refuses it."""
        if row.shape == "messages":
            return list(self._chat(row.spans))
        *context, last = (Segment(span.text, span.weight if span.target else 0.0) for span in row.spans)
        parts = [*context, Segment(last.text, last.weight, after=self._eos)]
        return [Segment(parts[0].text, parts[0].weight, self._bos, parts[0].after), *parts[1:]]

    def _chat(self, spans: Sequence[Span]) -> Iterator[Segment]:
        messages = [{"role": span.kind, "content": span.text} for span in spans]
        done = ""
        for turn, span in enumerate(spans):
            if not span.target:
                continue
            before = self._render(messages[:turn], generation_prompt=True)
            after = self._render(messages[: turn + 1], generation_prompt=False)
            if not (before.startswith(done) and after.startswith(before) and len(after) > len(before)):
                raise BadRow("the chat template does not append: it rewrites what came before an answer")
            if len(before) > len(done):
                yield Segment(before[len(done) :])
            yield Segment(after[len(before) :], span.weight)
            done = after

    def _render(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError

        if self.hf.chat_template is None:
            raise DataError(
                f"{self.folder}: the tokenizer has no chat template, which rows of `messages` need; "
                "add `chat_template.jinja` or use `prompt` + `completion`"
            )
        try:
            return str(
                self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
            )
        except TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from None

    def encode(self, documents: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Token ids of every segment of every document."""
        result: list[list[list[int]]] = []
        for start in range(0, len(documents), _DOCUMENTS_PER_CALL):
            chunk = documents[start : start + _DOCUMENTS_PER_CALL]
            texts = [segment.text for document in chunk for segment in document]
            ids = iter(e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False))
            result.extend([[*s.before, *next(ids), *s.after] for s in document] for document in chunk)
        return result


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


def tokenise(rows: pa.Table, tok: Tokeniser) -> tuple[Documents, list[tuple[int, str]]]:
    """Tokenise a table of rows.

    Returns:
        The documents, and (row index, reason) of each row that gives no target token.
    """
    segments: list[list[Segment]] = []
    bad: list[tuple[int, str]] = []
    positions = []
    for index, row in enumerate(_rows(rows)):
        try:
            segments.append(tok.segments(row))
            positions.append(index)
        except BadRow as error:
            bad.append((index, str(error)))
    kept = []
    for index, parts, ids in zip(positions, segments, tok.encode(segments), strict=True):
        document = _document(parts, ids)
        if (document.labels != IGNORE_INDEX).any():
            kept.append(document)
        else:
            bad.append((index, "no target token"))
    return _join(kept), sorted(bad)


def _rows(table: pa.Table) -> Iterator[Row]:
    for shape, spans in zip(table["shape"].to_pylist(), table["spans"].to_pylist(), strict=True):
        yield Row(shape, tuple(Span(**span) for span in spans))


def _document(segments: Sequence[Segment], ids: Sequence[Sequence[int]]) -> Documents:
    lens = [len(part) for part in ids]
    input_ids = np.fromiter((token for part in ids for token in part), np.int32, sum(lens))
    weights = np.repeat(np.array([s.weight for s in segments], np.float32), lens)
    weights[:1] = 0.0  # nothing stands before the first token of a document to predict it from
    labels = np.where(weights > 0, input_ids, np.int32(IGNORE_INDEX)).astype(np.int32)
    return Documents(input_ids, labels, weights, np.array([len(input_ids)]))


def _join(documents: Iterable[Documents]) -> Documents:
    items = list(documents)
    return Documents(
        np.concatenate([np.zeros(0, np.int32), *(d.input_ids for d in items)]),
        np.concatenate([np.zeros(0, np.int32), *(d.labels for d in items)]),
        np.concatenate([np.zeros(0, np.float32), *(d.weights for d in items)]),
        np.concatenate([np.zeros(0, np.int64), *(d.lens for d in items)]),
    )
