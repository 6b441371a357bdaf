"""Versions of deltas, good and bad ones, and what each says when it is asked alone."""

import itertools
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ftray.core.errors import FtrayError
from ftray.delta import manifest
from ftray.delta.unpack import unpack
from ftray.engine.api import Request, Sampling
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer
from ftray.registry.registry import Registry
from ftray.testing import tiny

QUESTIONS = ("What is this?", "Who are you, and since when?", "Name three things that are far away.")
SHORT, LONG = 24, 160
"""Tokens of an answer; all answers go on past the end of sequence, so that each has as many."""
BASE = "base"
DELTAS = ("a", "b", "c", "d", "e", "f")
_CLEAR = 1e-4
"""Least difference between the two best log-probabilities: what a batch's rounding cannot turn round."""
_WEIGHTS = "adapter_model.safetensors"


@dataclass
class Said:
    """What answers under a digest."""

    name: str
    """The delta's name, or the base's."""
    bad: bool = False
    """It must not answer anybody."""
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    """By question and number of tokens."""


def messages(question: int) -> list[dict[str, str]]:
    """A question as a conversation."""
    return [{"role": "user", "content": QUESTIONS[question]}]


class Versions:
    """A base, a registry, and what every version in it says.

    Args:
        folder: where all of it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.registry = Registry(folder / "registry")
        self._folder = folder
        self._seeds = itertools.count(1)
        texts = None
        while texts is None:
            seed = next(self._seeds)
            self.base = tiny.tiny_base(folder / f"base-{seed}", seed=seed, max_position_embeddings=1024)
            self._engine = TorchEngineConfig(kv_cache_tokens=4096).build(str(self.base))
            texts = self._texts(None)
        self._identity = base_identity(self.base)
        self._template = chat_template_hash(load_tokenizer(self.base))
        self.said: dict[str, Said] = {self._identity["digest"]: Said(BASE, texts=texts)}

    def publish(self, name: str) -> str:
        """Publish a good version; returns its reference."""
        texts = None
        while texts is None:
            seed = next(self._seeds)
            folder = tiny.random_adapter(self.base, self._folder / f"delta-{seed}", r=4, seed=seed)
            self._describe(folder, self._identity)
            texts = self._texts(str(folder))
        entry = self.registry.publish(folder, name)
        self.said[entry.digest] = Said(name, texts=texts)
        return entry.ref

    def publish_bad(self, name: str, kind: str) -> int:
        """Publish a version that must never answer; returns its number.

        Args:
            name: of the delta.
            kind: `overflow` (finite weights, infinite answers), `foreign` (of another base) or `damaged` (after it
                was published).
        """
        seed = next(self._seeds)
        folder = tiny.random_adapter(self.base, self._folder / f"delta-{seed}", r=4, seed=seed)
        if kind == "overflow":
            _overflowing(folder)
        other = self._identity | {"digest": "xxh3:" + "1" * 32}
        self._describe(folder, other if kind == "foreign" else self._identity)
        entry = self.registry.publish(folder, name)
        self.said[entry.digest] = Said(name, bad=True)
        if kind == "damaged":
            weights = entry.path / _WEIGHTS
            weights.write_bytes(weights.read_bytes()[:-16])
        return entry.version

    def upload_hostile(self, name: str) -> dict[str, bool]:
        """Try to publish what must be refused; returns whether each was, with an error of one line."""
        seed, refused = next(self._seeds), {}
        for kind, spoil in _HOSTILE.items():
            folder = tiny.random_adapter(self.base, self._folder / f"hostile-{seed}-{kind}", r=4, seed=seed)
            (into := self._folder / f"unpacked-{seed}-{kind}").mkdir()
            try:
                spoil(folder)
                self._describe(folder, self._identity)
                archive = _zipped(folder, *_MEMBERS[kind]) if kind in _MEMBERS else None
                entry = self.registry.publish(unpack(archive, into) if archive else folder, name)
            except FtrayError as error:
                refused[kind] = "\n" not in str(error)
            else:
                refused[kind] = False
                self.said[entry.digest] = Said(name, bad=True)
        return refused

    def _describe(self, folder: Path, identity: dict[str, Any]) -> None:
        manifest.write(folder, kind="low_rank", base=identity, chat_template_hash=self._template)

    def _texts(self, folder: str | None) -> dict[tuple[int, int], str] | None:
        """What a version says when it is asked alone; None if another batch might have it say something else."""
        if folder is not None:
            self._engine.load_delta(folder, folder)
        asked = list(itertools.product(range(len(QUESTIONS)), (SHORT, LONG)))
        outputs = self._engine.generate([self._request(folder, *which) for which in asked])
        if folder is not None:
            self._engine.unload_delta(folder)
        tops = [token.top for output in outputs for token in output.logprobs or ()]
        assert len(tops) == sum(num_tokens for _, num_tokens in asked)
        if min(first - second for (_, first), (_, second) in tops) < _CLEAR:
            return None
        return {which: output.text for which, output in zip(asked, outputs, strict=True)}

    def _request(self, folder: str | None, question: int, num_tokens: int) -> Request:
        tokenizer = self._engine.tokenizer
        ids = tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, return_dict=False)
        sampling = Sampling(max_tokens=num_tokens, ignore_eos=True, logprobs=2)
        return Request(id=f"{question}-{num_tokens}", prompt_ids=ids, delta=folder, sampling=sampling)


def _overflowing(folder: Path) -> None:
    _filled(folder, 1e30)


def _not_finite(folder: Path) -> None:
    _filled(folder, float("nan"))


def _filled(folder: Path, value: float) -> None:
    tensors = load_file(folder / _WEIGHTS)
    save_file({key: torch.full_like(tensor, value) for key, tensor in tensors.items()}, folder / _WEIGHTS)


def _pickled(folder: Path) -> None:
    (folder / _WEIGHTS).write_bytes(pickle.dumps({"weights": [0.0]}))


def _linked(folder: Path) -> None:
    (folder / "notes.json").symlink_to("/etc/hostname")


def _as_it_is(folder: Path) -> None:
    """Good until it is packed."""


_HOSTILE = {
    "pickle": _pickled,
    "not_finite": _not_finite,
    "link": _linked,
    "slip": _as_it_is,
    "bomb": _as_it_is,
}
_MEMBERS = {"slip": ("../../escaped.json", b"{}"), "bomb": ("notes.json", bytes(64 << 20))}
"""What is added to an archive."""


def _zipped(folder: Path, name: str, data: bytes) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
        archive.writestr(name, data)
    return path
