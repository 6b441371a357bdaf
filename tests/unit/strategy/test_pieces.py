"""Tensors cut into pieces in one way and read in another."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftray.core.errors import CheckpointError
from ftray.model.tensor_file import TensorFile, write_tensors
from ftray.strategy import pieces
from ftray.strategy.single import Single


def cuts(length: int, parts: int) -> list[tuple[int, int]]:
    """Rows of each of `parts` ranks as FSDP divides them: equal, the last ones shorter or empty."""
    size = -(-length // parts)
    return [(min(length, k * size), min(length, (k + 1) * size)) for k in range(parts)]


def write(folder: Path, tensor: torch.Tensor, parts: int) -> list[str]:
    names = []
    for rank, (start, stop) in enumerate(cuts(len(tensor), parts)):
        held = start < stop
        index = {"shape": list(tensor.shape), "offset": [start] + [0] * (tensor.ndim - 1)}
        piece = pieces.Pieces(
            rank,
            parts,
            {"trainable": {"w": tensor[start:stop].clone()} if held else {}},
            {"trainable": {"w": index} if held else {}},
        )
        names += piece.write(folder)
    return names


@pytest.mark.parametrize(("shape", "writers"), itertools.product([(7, 5), (3,), (10, 2, 3)], [1, 2, 3, 5]))
def test_any_part_from_any_pieces(tmp_path: Path, shape: tuple[int, ...], writers: int) -> None:
    draw = random.Random(str((shape, writers)))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    reader = pieces.Reader(tmp_path, "trainable", write(tmp_path, tensor, writers))
    assert torch.equal(reader.read("w"), tensor)
    for _ in range(10):
        low = [draw.randrange(size) for size in shape]
        size = [draw.randint(1, whole - start) for whole, start in zip(shape, low, strict=True)]
        expected = tensor[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
        assert torch.equal(reader.read("w", (tuple(low), tuple(size))), expected)


def test_missing_pieces_are_told(tmp_path: Path) -> None:
    names = write(tmp_path, torch.randn(6, 2), 3)
    reader = pieces.Reader(tmp_path, "trainable", names[:1] + names[2:])
    assert reader.read("w", ((0, 0), (2, 2))).shape == (2, 2)
    with pytest.raises(CheckpointError, match="pieces of `w` are missing"):
        reader.read("w", ((1, 0), (2, 2)))


def stepped(dtype: torch.dtype) -> tuple[dict[str, torch.nn.Parameter], list[torch.optim.Optimizer]]:
    parameters = {
        "a": torch.nn.Parameter(torch.randn(4, 3, dtype=dtype)),
        "b": torch.nn.Parameter(torch.ones(2)),
    }
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([parameters["a"]], lr=0.1),
        torch.optim.SGD([parameters["b"]], lr=0.1, momentum=0.9),
    ]
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return parameters, optimizers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_is_of_its_moment(tmp_path: Path, dtype: torch.dtype) -> None:
    """Later steps do not reach into it, and parameters and moments come back to the bit."""
    parameters, optimizers = stepped(dtype)
    snapshot = Single().snapshot(parameters, optimizers)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    moments = optimizers[0].state[parameters["a"]]["exp_avg"].clone()
    for optimizer in optimizers:
        optimizer.step()
    names = snapshot.write(tmp_path)
    others, fresh = stepped(dtype)
    manifest = {"layout": pieces.LAYOUT, "files": dict.fromkeys(names, "")}
    Single().restore(tmp_path, manifest, others, fresh)
    assert all(torch.equal(others[name], before[name]) for name in before)
    assert torch.equal(fresh[0].state[others["a"]]["exp_avg"], moments)
    assert float(fresh[0].state[others["a"]]["step"]) == 1
    with pytest.raises(CheckpointError, match="another kind of strategy"):
        Single().restore(tmp_path, {**manifest, "layout": "strange"}, others, fresh)
    with pytest.raises(CheckpointError, match="`b` is trained on one side only"):
        Single().restore(tmp_path, manifest, {"a": others["a"]}, fresh)
    with pytest.raises(CheckpointError, match=r"`a` had shape \(4, 3\), now it has \(3, 4\)"):
        Single().restore(tmp_path, manifest, {**others, "a": torch.nn.Parameter(torch.ones(3, 4))}, fresh)


def test_memory_is_used_again_when_it_is_written(tmp_path: Path) -> None:
    parameters, optimizers = stepped(torch.float32)
    first = Single().snapshot(parameters, optimizers)
    second = Single().snapshot(parameters, optimizers)
    place = second.files["trainable"]["a"].data_ptr()
    assert first.files["trainable"]["a"].data_ptr() != place, "the first is still to be written"
    second.write(tmp_path)
    with torch.no_grad():
        parameters["a"].zero_()
    third = Single().snapshot(parameters, optimizers)
    assert third.files["trainable"]["a"].data_ptr() == place
    assert not third.files["trainable"]["a"].any() and first.files["trainable"]["a"].any()


def test_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 4).to(torch.bfloat16).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "numbers": torch.arange(5),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"said": "ä"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFile(tmp_path / "b.safetensors", layout) as file:
        for name in reversed(tensors):
            file.put(name, tensors[name])
    assert all(torch.equal(load_file(tmp_path / "b.safetensors")[name], tensors[name]) for name in tensors)
    with pytest.raises(AssertionError, match="not written"), TensorFile(tmp_path / "c.safetensors", layout):
        pass
