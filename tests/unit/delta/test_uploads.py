"""Uploads are not trusted: archives, names, sizes, pickles, code hooks, NaN, kinds that are not served."""

import contextlib
import json
import os
import pickle
import stat
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftray.cli.main import main
from ftray.core.errors import DeltaError
from ftray.core.fs import read_json, write_json
from ftray.delta import manifest
from ftray.delta.publishable import Caps, check_publishable
from ftray.delta.unpack import Limits, unpack
from ftray.registry.registry import Registry
from ftray.testing.deltas import BASE, weights_delta

WEIGHTS = "adapter_model.safetensors"
CANARY = "ftray_canary"


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (CANARY,)


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / CANARY).exists(), "something was unpickled"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return weights_delta(tmp_path / "delta")


def zipped(folder: Path, path: Path, *more: tuple[zipfile.ZipInfo | str, bytes], prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
        for info, data in more:
            archive.writestr(info, data)
    return path


@pytest.mark.parametrize("prefix", ["", "my-delta/"])
def test_a_zip_of_a_delta_is_published(
    folder: Path, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zipped(folder, tmp_path / "delta.zip", prefix=prefix)
    with pytest.raises(SystemExit) as ended:
        main(["publish", str(archive), "tone", "--registry", str(tmp_path / "registry")])
    assert ended.value.code == 0, capsys.readouterr().err
    assert Registry(tmp_path / "registry").resolve("tone").digest == manifest.read(folder).digest


def link(name: str, mode: int = stat.S_IFLNK) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (mode | 0o777) << 16
    return info


SLIPS: list[zipfile.ZipInfo | str] = [
    "../up.json",
    "/etc/up.json",
    "a/../../up.json",
    "a//b.json",
    "..\\up.json",
    "C:\\up.json",
    "nul\0.json",
    "ü.json",
    ".hidden.json",
    "weights.bin",
    "model.pkl",
    "run.py",
    "nested.zip",
    "x" * 200 + ".json",
    link("link.json"),
    link("device.json", stat.S_IFBLK),
    link("pipe.json", stat.S_IFIFO),
    link("dir/", stat.S_IFLNK),
    "../dir/",
    "adapter_config.json",
]


@pytest.mark.parametrize("name", SLIPS, ids=lambda name: repr(getattr(name, "filename", name))[:24])
def test_nothing_slips_out_of_an_archive(folder: Path, tmp_path: Path, name: zipfile.ZipInfo | str) -> None:
    archive, into = tmp_path / "slip.zip", tmp_path / "deep" / "into"
    into.mkdir(parents=True)
    with pytest.warns(UserWarning) if name == "adapter_config.json" else contextlib.nullcontext():
        zipped(folder, archive, (name, b"../../up.json"))
    if name == "nul\0.json":  # the library cuts the name it writes
        archive.write_bytes(archive.read_bytes().replace(b"nul", b"n\0l"))
    started = time.monotonic()
    with pytest.raises(DeltaError, match=r"^slip\.zip: [^\n]*$"):
        unpack(archive, into)
    assert time.monotonic() - started < 1
    assert not list(tmp_path.rglob("up.json")) and {p.name for p in (tmp_path / "deep").iterdir()} == {"into"}


def test_bombs_end_early(folder: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    bomb = zipped(folder, tmp_path / "bomb.zip", ("README.md", bytes(300 << 20)))
    assert bomb.stat().st_size < 1 << 20
    many = zipped(folder, tmp_path / "many.zip", *((f"n{number}.json", b"") for number in range(300)))
    lying = tmp_path / "lying.zip"
    # The directory says 1 byte; the data say otherwise.
    lying.write_bytes(bomb.read_bytes().replace(struct.pack("<I", 300 << 20), struct.pack("<I", 1)))
    started = time.monotonic()
    for archive, limits, message in (
        (bomb, Limits(), "README.md: unpacks to more than is allowed"),
        (bomb, Limits(max_bytes=1 << 10), "unpacks to more"),
        (many, Limits(), "more than 256 files"),
        (lying, Limits(), "not a readable zip archive|unpacks to more"),
    ):
        target = into / archive.name / str(limits.max_bytes)
        target.mkdir(parents=True)
        with pytest.raises(DeltaError, match=message):
            unpack(archive, target, limits)
    assert time.monotonic() - started < 1
    assert sum(path.stat().st_size for path in into.rglob("*") if path.is_file()) < 40 << 20


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100, pickle.dumps(Bomb())])
def test_what_is_no_archive_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DeltaError, match=r"^a\.zip: not a readable zip archive"):
        unpack(tmp_path / "a.zip", tmp_path)


def test_broken_archives_are_one_line(folder: Path, tmp_path: Path) -> None:
    good = zipped(folder, tmp_path / "good.zip").read_bytes()
    rng = np.random.default_rng(0)
    started = time.monotonic()
    for number in range(60):
        broken = bytearray(good)
        for place in rng.integers(0, len(good), 6):
            broken[place] ^= 1 << int(rng.integers(8))
        path, into = tmp_path / f"broken-{number}.zip", tmp_path / f"into-{number}"
        path.write_bytes(broken[: int(rng.integers(1, len(broken)))] if number % 3 == 0 else broken)
        into.mkdir()
        try:
            manifest.read(unpack(path, into))
        except DeltaError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - started < 5


def refused(folder: Path, message: str, kind: str = "low_rank", caps: Caps | None = None) -> None:
    """Rewritten with good digests, the folder is refused for what it holds."""
    (folder / manifest.MANIFEST).unlink(missing_ok=True)
    delta = manifest.write(folder, kind=kind, base=BASE)
    with pytest.raises(DeltaError, match=message) as caught:
        check_publishable(folder, delta, caps)
    assert "\n" not in str(caught.value)


def config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    write_json(path, read_json(path) | fields)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_values_that_are_not_finite_are_refused(folder: Path, value: float, dtype: str) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors["base_model.model.q_proj.lora_B.weight"][1, 1] = value
    save_file(tensors, folder / WEIGHTS)
    refused(folder, r"`base_model\.model\.q_proj\.lora_B\.weight` holds values that are not finite")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            r"modules_to_save=\['embed_tokens', 'lm_head'\] replaces",
        ),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora=True is not plain LoRA"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 3}, r"has factors \[2, 8\] and \[8, 2\], adapter_config.json says rank \[3\]"),
        ({"r": 4096}, "rank 4096 is more than 1024"),
        ({"r": 0}, "adapter_config.json"),
        ({"lora_alpha": float("nan")}, "adapter_config.json"),
        ({"loftq_config": {"deep": [{"auto_map": {"AutoModel": "evil.py"}}]}}, "auto_map"),
        ({"rank_pattern": {"q_proj": 99999}}, "rank 99999 is more than 1024"),
    ],
)
def test_kinds_and_ranks_that_are_not_served_are_refused_with_the_reason(
    folder: Path, fields: dict[str, object], message: str
) -> None:
    config(folder, **fields)
    refused(folder, message)


def rename(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.replace("lora_A", "lora_C"): tensor for name, tensor in tensors.items()}


def reshape(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor.reshape(-1) for name, tensor in tensors.items()}


def drop(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(list(tensors.items())[:1])


def mismatch(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor[:, :1].copy() if "lora_B" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "is no LoRA factor"),
        (reshape, "is no LoRA factor"),
        (drop, "has one factor only"),
        (mismatch, "says rank"),
        (lambda tensors: {}, "holds no tensors"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(
    folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], message: str
) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    refused(folder, message)


def test_caps(folder: Path) -> None:
    refused(folder, "more than 1 tensors", caps=Caps(max_tensors=1))
    refused(folder, "larger than 0 MiB", caps=Caps(max_json_bytes=10))
    refused(folder, "rank 2 is more than 1", caps=Caps(max_rank=1))


HEADERS = [
    {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}},
    {"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
    {"x": {"dtype": "OBJ", "shape": [4], "data_offsets": [0, 16]}},
    {"x": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
    {"x": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}},
    {"x": {"shape": [4], "data_offsets": [0, 16]}},
    {"x": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}},
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_headers_that_lie_are_one_line(folder: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(folder, "safetensors")


def test_a_pickle_under_a_good_name_is_never_opened(folder: Path) -> None:
    for name in (WEIGHTS, "adapter_config.json"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        refused(folder, name.replace(".", r"\."))
        (folder / name).write_bytes(good)


def test_whole_models(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    save_file({"weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    write_json(
        folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    )
    refused(folder, "scores texts", kind="replacement")
    write_json(folder / "config.json", {"architectures": []})
    refused(folder, "`model_type` is missing", kind="replacement")
    write_json(folder / "config.json", {"model_type": "llama"})
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": "model-00001-of-2.safetensors"}})
    refused(folder, "model-00001-of-2.safetensors: missing", kind="replacement")
    (folder / "model.safetensors.index.json").unlink()
    save_file({"weight": np.full((2, 2), np.nan, np.float32)}, folder / "model.safetensors")
    refused(folder, "not finite", kind="replacement")


def test_deep_settings_are_one_line(folder: Path) -> None:
    (folder / "extra.json").write_text("[" * 200_000 + "]" * 200_000)
    refused(folder, r"extra\.json: not JSON")
