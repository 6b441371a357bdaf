"""Deltas that no batch can share: whole replacement weights, and PEFT's kinds that are not plain low rank.

Each becomes a model of its own, merged where it is an adapter, and answers in steps of its own. What can be merged
is not looked up but measured: the merged model must give the logits that PEFT gives with the adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ftray.adapt.peft_files import CONFIG, WEIGHTS, OtherKindError
from ftray.core.errors import DeltaError, FtrayError
from ftray.core.fs import read_json
from ftray.delta.manifest import Delta
from ftray.model.build import cast_weights
from ftray.model.folder import load_config

_TOLERANCE = 1e-3
"""Of the largest logit, in float32."""
_UNUSED = frozenset(
    {
        *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "id2label", "label2id"),
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    }
)
"""Settings of a model that its logits do not depend on while it serves."""


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """A delta in memory as a model of its own."""

    digest: str
    """Digest of what answers."""
    kind: str
    """`replacement`, or PEFT's name of the kind."""
    model: Any
    """In the base's type, its attention yet to be chosen."""
    mixed_batch: bool = False

    @property
    def size_bytes(self) -> int:
        """Of all its weights."""
        return sum(parameter.nbytes for parameter in self.model.parameters())


class OwnReader:
    """Reads such deltas of one base; it may run beside steps.

    Args:
        base: the base's folder.
        model: the base, as it was loaded.
    """

    def __init__(self, base: Path, model: Any) -> None:
        self._base = base
        self._dtype = model.dtype
        self._shapes = _shapes(model)
        self._config = _decisive(load_config(base).to_dict())

    def read(self, folder: Path, delta: Delta | None, digest: str) -> OwnWeights:
        """The model that a delta makes of the base. Raises `DeltaError`, one line."""
        try:
            if delta is not None and delta.kind == "replacement":
                self._check_config(folder)
                kind, model = "replacement", _load(folder, self._dtype)
            else:
                kind, model = self._merged(folder)
        except FtrayError as error:
            raise DeltaError(str(error)) from None
        # Files of tenants fail in ways of transformers' and PEFT's own.
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise DeltaError(f"{folder}: cannot be used ({type(error).__name__}: {reason})") from None
        shapes = _shapes(model)
        if wrong := [name for name, shape in self._shapes.items() if shapes.get(name) != shape]:
            raise DeltaError(
                f"{folder}: `{wrong[0]}` is {shapes.get(wrong[0])}, this base has {self._shapes[wrong[0]]};"
                " it is for another base"
            )
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise DeltaError(f"{folder}: `{name}` holds values that are not finite; train it again")
        return OwnWeights(digest, kind, cast_weights(model, self._dtype).requires_grad_(False))

    def _check_config(self, folder: Path) -> None:
        """Weights alone may differ: only the base's own settings were checked to keep rows of a step apart."""
        found = _decisive(load_config(folder).to_dict())
        for field in sorted(self._config.keys() | found.keys()):
            ours, theirs = self._config.get(field), found.get(field)
            if ours != theirs:
                raise DeltaError(
                    f"{folder / 'config.json'}: {field} is {str(theirs)[:80]}, this base has {str(ours)[:80]};"
                    " only weights may differ"
                )

    def _merged(self, folder: Path) -> tuple[str, Any]:
        from peft import PeftModel, get_peft_model_state_dict

        kind = _checked_kind(folder)
        adapted = PeftModel.from_pretrained(_load(self._base, torch.float32), str(folder)).eval()
        used = get_peft_model_state_dict(adapted).keys()
        with safe_open(folder / WEIGHTS, "pt") as file:
            if unused := sorted(set(file.keys()) - used):
                # PEFT passes it over without a word.
                raise DeltaError(
                    f"{folder}: tensor `{unused[0]}` is not used by {CONFIG}; save the adapter again"
                )
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise OtherKindError(f"{folder}: {kind} cannot be merged into the base; train a low-rank adapter")
        ids = torch.randint(
            adapted.config.get_text_config().vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            before = adapted(input_ids=ids, use_cache=False).logits
            merged = adapted.merge_and_unload(safe_merge=True)
            after = merged(input_ids=ids, use_cache=False).logits
        difference = float((after - before).abs().max()) / max(1.0, float(before.abs().max()))
        if not difference <= _TOLERANCE:
            raise OtherKindError(
                f"{folder}: {kind} merged gives other logits than the adapter (by {difference:.1e} of their size);"
                " train a low-rank adapter"
            )
        return kind.lower(), merged


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what says nothing of the logits, parts of it too."""
    return {
        name: _decisive(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in _UNUSED
    }


def _checked_kind(folder: Path) -> str:
    """PEFT's name of an adapter's kind; what its files could do besides adapting is refused."""
    if not (folder / WEIGHTS).is_file():
        raise DeltaError(f"{folder}: {WEIGHTS} is missing; pickled adapters are never read")
    config = read_json(folder / CONFIG)
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        # PEFT takes a text for a regular expression, and one can be made to run for ever.
        if isinstance(config.get(field), str) and config[field] != "all-linear":
            raise DeltaError(f"{folder}: {field} is a pattern; save the adapter with a list of names")
    return str(config.get("peft_type"))


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """A model, built without touching what other threads build: `load_model` patches torch for the time."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
    ).eval()


def _shapes(model: Any) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
