"""An engine without a model: it says what it is told to, through the real scheduler and text path."""

import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from ftray.core.errors import DeltaError
from ftray.core.spec import spec
from ftray.engine.api import EngineInfo
from ftray.engine.core import StepEngine
from ftray.engine.scheduler import Row, Scheduler, Sequence

_EOS = 256
_BLOCK_SIZE = 16


class ByteTokenizer:
    """One token per UTF-8 byte, and one for the end."""

    chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    eos_token_id = _EOS

    def __len__(self) -> int:
        return _EOS + 1

    def get_vocab(self) -> dict[str, int]:
        """Tokens by their text."""
        return {chr(token): token for token in range(_EOS + 1)}

    def encode(self, text: str, **_: Any) -> list[int]:
        """Tokens of a text."""
        return list(text.encode())

    def decode(self, token_ids: Tokens[int], **_: Any) -> str:
        """Text of tokens."""
        return bytes(token for token in token_ids if token < _EOS).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        """Tokens of a conversation."""
        return self.encode("".join(f"{message['content']}\n" for message in messages))


class FakeRunner:
    """Spells a fixed text for each delta."""

    vocab_size = _EOS + 1

    def __init__(self, text: str, step_s: float) -> None:
        self._text = text
        self._step_s = step_s
        self._names: dict[str, str] = {}

    def forward(self, rows: list[Row], keys: list[str | None], keep: list[int]) -> torch.Tensor:
        """Logits that leave no doubt about the next byte of the text."""
        time.sleep(self._step_s)
        logits = torch.zeros(sum(row.length for row in rows), self.vocab_size)
        last = -1
        for row, key in zip(rows, keys, strict=True):
            last += row.length
            name = "base" if key is None else self._names[key]
            spelled = [*self._text.format(model=name).encode(), _EOS]
            logits[last, spelled[min(row.seq.num_generated, len(spelled) - 1)]] = 50.0
        return logits[keep]

    def release(self, seq: Sequence) -> None:
        """Nothing is kept."""

    def read(self, folder: str) -> "FakeDelta":
        """Any folder is a delta; its name is spelled."""
        if not folder:
            raise DeltaError("folder: it is empty; name one")
        return FakeDelta(folder.rstrip("/").rpartition("/")[2])

    def read_own(self, folder: str) -> "FakeDelta":
        """As `read`."""
        return self.read(folder)

    def load(self, key: str, delta: "FakeDelta") -> None:
        """Learn a name."""
        self._names[key] = delta.digest

    def unload(self, key: str) -> None:
        """Forget a name."""
        self._names.pop(key, None)


@dataclass(frozen=True)
class FakeDelta:
    """A name to spell."""

    digest: str
    kind: str = "low_rank"
    mixed_batch: bool = True
    size_bytes: int = 0


@spec
class FakeEngineConfig:
    """Settings of the engine without a model, for tests of what stands around an engine."""

    text: str = "Hello from {model}."
    """What it answers; `{model}` is the delta folder's name or `base`."""
    step_s: float = Field(default=0.0, ge=0)
    """Seconds a step takes."""
    max_num_seqs: int = Field(default=8, ge=1)
    """Requests that run at once."""
    max_length: int = Field(default=4096, ge=2)
    """Most tokens of prompt and answer."""
    num_blocks: int = Field(default=1024, ge=1)
    """Blocks of 16 tokens."""

    def load_tokenizer(self, base: str) -> ByteTokenizer:
        """The byte tokenizer, whatever the base."""
        return ByteTokenizer()

    def build(self, base: str) -> StepEngine:
        """The engine; the base is only a name."""
        scheduler = Scheduler(
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=max(256, self.max_num_seqs),
            num_blocks=self.num_blocks,
            block_size=_BLOCK_SIZE,
            max_length=self.max_length,
        )
        info = EngineInfo(
            engine="fake",
            base=base.rstrip("/").rpartition("/")[2] or "fake",
            base_digest="xxh3:" + "0" * 32,
            chat_template_hash="none",
            max_length=self.max_length,
        )
        return StepEngine(FakeRunner(self.text, self.step_s), ByteTokenizer(), scheduler, info, [_EOS])
