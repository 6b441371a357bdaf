"""The manifest: digests, the allow-list of files, the base it belongs to."""

import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import pytest

from ftray.core.errors import DeltaError
from ftray.core.fs import digest_file
from ftray.delta import manifest
from ftray.delta.publishable import check_publishable
from ftray.testing.deltas import BASE, weights_delta

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return weights_delta(tmp_path / "delta", metrics={"eval_loss": 1.5})


def rewrite(folder: Path, **fields: object) -> None:
    path = folder / manifest.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_written_manifest_reads_back_equal(folder: Path) -> None:
    delta = manifest.read(folder)
    assert set(delta.files) == {WEIGHTS, "adapter_config.json"}
    assert delta.metrics == {"eval_loss": 1.5}
    assert delta.base.digest == BASE["digest"]


def test_digest_is_of_what_answers_only(folder: Path, tmp_path: Path) -> None:
    same = weights_delta(tmp_path / "same", lineage={"run": "elsewhere"}, base=BASE | {"name": "moved"})
    other_weights = weights_delta(tmp_path / "weights", seed=1)
    other_template = weights_delta(tmp_path / "template", chat_template_hash="xxh3:1")
    other_base = weights_delta(tmp_path / "base", base=BASE | {"digest": "xxh3:" + "1" * 32})
    digest = manifest.read(folder).digest
    assert manifest.read(same).digest == digest
    assert digest not in {manifest.read(path).digest for path in (other_weights, other_template, other_base)}


def test_digests_cannot_be_forged(folder: Path) -> None:
    delta = manifest.read(folder)
    for name, digest in delta.files.items():
        assert digest == "sha256:" + hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert re.fullmatch("sha256:[0-9a-f]{64}", delta.digest)


@pytest.mark.parametrize("verify", [True, False])
def test_a_digest_that_could_be_forged_is_refused(folder: Path, verify: bool) -> None:
    rewrite(
        folder, format=1, files={name: digest_file(folder / name) for name in manifest.read(folder).files}
    )
    with pytest.raises(DeltaError, match="no SHA-256") as caught:
        manifest.read(folder, verify)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_file_is_named(folder: Path, damage: str) -> None:
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(DeltaError, match=WEIGHTS):
        manifest.read(folder)
    manifest.read(folder, verify=False)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "state.pkl", "weights.pt", "run.py", "lib.so", "no_suffix"]
)
def test_file_types_outside_the_list_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps({}))
    with pytest.raises(DeltaError, match=name):
        manifest.read(folder)
    with pytest.raises(DeltaError, match=name):
        manifest.write(folder, kind="low_rank", base=BASE)


def test_unnamed_file_is_refused(folder: Path) -> None:
    (folder / "notes.md").write_text("later")
    with pytest.raises(DeltaError, match=r"notes\.md: not named"):
        manifest.read(folder)


@pytest.mark.parametrize("target", ["file", "folder"])
def test_links_are_refused(folder: Path, tmp_path: Path, target: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    if target == "folder":
        elsewhere.mkdir()
    else:
        elsewhere.write_text("{}")
    (folder / "link.json").symlink_to(elsewhere)
    with pytest.raises(DeltaError, match=r"link\.json"):
        manifest.read(folder)


def test_fifo_is_refused_without_reading_it(folder: Path) -> None:
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(DeltaError, match=r"pipe\.json"):
        manifest.read(folder)


@pytest.mark.parametrize(
    "name", ["../up.json", "/etc/x.json", "a//b.json", "a/../b.json", "nul\0.json", "ü.json"]
)
def test_manifest_cannot_point_outside(folder: Path, name: str) -> None:
    rewrite(folder, files=manifest.read(folder).files | {name: "sha256:" + "0" * 64})
    with pytest.raises(DeltaError, match="not a file name"):
        manifest.read(folder, verify=False)


def test_wrong_fields_are_one_line_errors(folder: Path) -> None:
    for fields, words in (
        ({"kind": "sparse"}, "kind"),
        ({"bass": 1}, "did you mean `base`"),
        ({"base": {"digest": "../x"}}, "digest"),
        ({"format": 99}, "newer"),
    ):
        original = (folder / manifest.MANIFEST).read_bytes()
        rewrite(folder, **fields)
        with pytest.raises(DeltaError, match=words) as caught:
            manifest.read(folder)
        assert "\n" not in str(caught.value)
        (folder / manifest.MANIFEST).write_bytes(original)


def test_folder_that_is_no_delta(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="not a delta"):
        manifest.read(tmp_path)
    (tmp_path / manifest.MANIFEST).write_text("{")
    with pytest.raises(DeltaError, match="not readable as JSON"):
        manifest.read(tmp_path)


def test_weights_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match=r"adapter_config\.json: missing"):
        manifest.write(tmp_path, kind="low_rank", base=BASE)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DeltaError, match=r"no `\.safetensors` file"):
        manifest.write(tmp_path, kind="replacement", base=BASE)


def test_pickle_named_safetensors_is_not_publishable(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weight": [1.0] * 100}))
    delta = manifest.write(folder, kind="low_rank", base=BASE)
    with pytest.raises(DeltaError, match=f"{WEIGHTS}: not a safetensors file"):
        check_publishable(folder, delta)


def test_cut_safetensors_is_not_publishable(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])
    delta = manifest.write(folder, kind="low_rank", base=BASE)
    with pytest.raises(DeltaError, match="its length"):
        check_publishable(folder, delta)


def test_custom_code_hook_is_not_publishable(folder: Path) -> None:
    hook = {"text_config": [{"auto_map": {"AutoModel": "evil.py"}}]}
    (folder / "adapter_config.json").write_text(json.dumps(hook))
    delta = manifest.write(folder, kind="low_rank", base=BASE)
    with pytest.raises(DeltaError, match="auto_map"):
        check_publishable(folder, delta)


def test_delta_of_another_base_names_both(folder: Path) -> None:
    delta = manifest.read(folder)
    manifest.check_base(delta, BASE)
    other = {"digest": "xxh3:" + "f" * 32, "model_type": "llama", "name": "other"}
    with pytest.raises(DeltaError, match=r"base tiny \(xxh3:0+\), not to other \(xxh3:f+\)"):
        manifest.check_base(delta, other)
