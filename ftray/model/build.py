"""Build on meta, then stream the weights in.

The structure is built with its parameters on the meta device, so that adapters and sharding happen before any
weight is in memory; then each tensor is read from its safetensors file straight into its place. Buffers
(rotary frequencies, embedding scales) are computed for real: `to_empty` would leave garbage in them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from ftray.config.recipe import ModelConfig
from ftray.core.errors import ModelError
from ftray.model import attention
from ftray.model.convert import Origin, find_origins, read, read_rows
from ftray.model.folder import load_config, resolve_folder, weight_map
from ftray.model.shard import region, with_local

# What transformers raises for a configuration of another kind of model, or with impossible sizes.
_NOT_BUILT = (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError, StrictDataclassError)


class NotBuiltError(ModelError):
    """transformers builds no causal language model from a configuration, or none with the attention asked for."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside the block every new parameter lands on the meta device; buffers stay real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_structure(
    config: ModelConfig, *, seed: int = 0, attn: str = attention.NAME, empty: bool = False
) -> nn.Module:
    """The model of a recipe, nothing trainable yet.

    Weights are on meta (`pretrained`, or `empty`) or random (`init: config`).

    Raises:
        ModelError: if no causal language model can be built from the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    on_meta = empty or config.init == "pretrained"
    folder = resolve_folder(config.model_name_or_path) if config.init == "pretrained" else None
    try:
        settings = load_config(folder) if folder else AutoConfig.for_model(**config.config)
        _refuse_classifier(settings, folder)
        with torch.random.fork_rng(), parameters_on_meta() if on_meta else contextlib.nullcontext():
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(
                settings, dtype=DTYPES[config.dtype], attn_implementation=attn
            )
    except ModelError:
        raise
    except _NOT_BUILT as error:
        reason = " ".join(str(error).split())[:200]
        raise NotBuiltError(
            f"{folder or 'model.config'}: no causal language model can be built from this ({reason})"
        ) from None
    if on_meta:
        model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.config.use_cache = False
    # What is added later (an adapter's factors, a score head) is told from the base by this.
    model.ftray_base_names = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    return model


def _refuse_classifier(settings: Any, folder: Path | None) -> None:
    # A reward model of a base with tied embeddings would load as a language model, and answer as none.
    for name in settings.architectures or ():
        if name.endswith("ForSequenceClassification"):
            raise ModelError(
                f"{folder}: {name} scores texts and is no language model; name the base it was trained from"
            )


def load_weights(
    model: nn.Module,
    folder: Path,
    device: torch.device | str = "cpu",
    keep_part: Callable[[nn.Module, nn.Parameter], None] | None = None,
) -> None:
    """Stream a folder's weights into a structure built by `build_structure`, onto a device.

    Args:
        model: the structure.
        folder: where the weights are.
        device: where they go.
        keep_part: called with the model and each parameter as soon as it is there, and may shrink it.

    Raises:
        ModelError: if a weight is missing or has another shape.
    """
    origins = find_origins(model, weight_map(folder))
    placed: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.device.type != "meta":
            continue  # an adapter's own factors
        owner, _, leaf = name.rpartition(".")
        if id(parameter) not in placed:
            if name not in origins:
                continue  # perhaps a tied alias seen before its source; what stays on meta is reported below
            tensor = with_local(parameter.detach(), _read_part(origins[name], model, parameter).to(device))
            weight = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            del tensor
            if keep_part is not None:
                keep_part(model, weight)
            placed[id(parameter)] = weight
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in placed:
            # Tied aliases get the same object again: a second tensor would part them in silence.
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = placed[id(parameter)]
    missing = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if missing:
        raise ModelError(
            f"{folder}: no weights for `{missing[0]}` (and {len(missing) - 1} more); is it complete?"
        )


def move_rest(model: nn.Module, device: torch.device) -> None:
    """Move what was not streamed (buffers, an adapter's factors, random weights) to a device, in place."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device != device and not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def load_model(folder: str | Path, *, dtype: str = "float32", attn: str = attention.NAME) -> Any:
    """A frozen base model in evaluation mode, as `build_structure` and `load_weights` make it."""
    path = resolve_folder(str(folder))
    model = build_structure(ModelConfig(model_name_or_path=str(path), dtype=dtype), attn=attn)  # type: ignore[arg-type]
    load_weights(model, path)
    return model.eval()


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in a type, one after the other; buffers, as rotary frequencies, stay exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _read_part(origin: Origin, model: nn.Module, parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter; of a sharded one no more is read."""
    if not isinstance(parameter, DTensor):
        tensor = read(origin, model, parameter.dtype)
        _check_shape(origin, tensor.shape, parameter.shape)
        return tensor
    if origin.converter is None:
        with safe_open(origin.pieces[-1].file, "pt") as opened:
            shape = opened.get_slice(origin.pieces[-1].key).get_shape()
        _check_shape(origin, shape, parameter.shape)
    (start, *_), part = region(parameter)
    if 0 in part:
        return torch.empty(part, dtype=parameter.dtype)
    tensor = read_rows(origin, model, parameter.dtype, start, start + part[0])
    _check_shape(origin, tensor.shape, part)
    return tensor


def _check_shape(origin: Origin, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        piece = origin.pieces[0]
        shapes = f"{tuple(found)}, the configuration says {tuple(expected)}"
        raise ModelError(
            f"{piece.file}: `{piece.key}` has shape {shapes}; config.json and weights do not belong together"
        )
