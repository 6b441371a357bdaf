"""Train a byte-level BPE tokenizer on the rows of a corpus and save it as an ordinary Hugging Face folder."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ftray.core.errors import DataError
from ftray.core.fs import commit_dir
from ftray.core.types import Progress, no_progress
from ftray.data.rows import BadRow
from ftray.data.source import Records, Unit, find_sources, parse_record, split_units

END, PAD = "<|end|>", "<|pad|>"

# Every turn's text depends on that turn alone, so a conversation grows at its end only.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] + '\n# Answer:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '<|end|>' }}"
    "{% else %}{{ message['content'] + '\n' }}"
    "{% endif %}{% endfor %}"
).replace("\n", "\\n")


def train_tokenizer(
    patterns: Sequence[str], folder: Path, vocab_size: int = 4096, progress: Progress = no_progress
) -> int:
    """Train on every text of the rows in some files.

    Args:
        patterns: files, folders, globs or URLs; rows that cannot be used are passed over and counted.
        folder: where the tokenizer is saved.
        vocab_size: tokens, the 256 bytes and 2 special tokens among them.
        progress: called with the source bytes read and their total.

    Returns:
        How many rows could not be used.

    Raises:
        DataError: one line: a file is missing, no row can be used, or the folder exists.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if folder.exists():
        raise DataError(f"{folder}: is there already; name another folder or delete it")
    bad: list[str] = []
    texts = _texts(split_units(find_sources(patterns)), progress, bad)
    first = next(texts, None)
    if first is None:
        raise DataError(f"{', '.join(patterns)}: no row that can be used; see `ftray data inspect`")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_chain(first, texts), trainer)
    with commit_dir(folder) as tmp:
        _as_hugging_face(core).save_pretrained(tmp)
    return len(bad)


def _as_hugging_face(core: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(units: Sequence[Unit], progress: Progress, bad: list[str]) -> Iterator[str]:
    total = sum(unit.stop - unit.start for unit in units)
    for unit in units:
        for record in Records(unit):
            try:
                row = parse_record(unit, record)
            except BadRow as error:
                bad.append(str(error))
                continue
            yield from (span.text for span in row.spans if span.text)
        done = sum(other.stop - other.start for other in units[: unit.index + 1])
        progress(done, total)


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest
