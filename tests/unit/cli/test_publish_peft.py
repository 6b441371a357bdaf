"""A LoRA saved by plain `peft` is published, and answers as plain `peft` does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftray.cli.main import main
from ftray.core.fs import digest_tree, read_json, write_json
from ftray.engine.api import Request, Sampling
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.model.identity import base_identity
from ftray.registry.registry import Registry
from ftray.testing import tiny


def publish(*words: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["publish", *map(str, words)])
    return int(str(ended.value.code))


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    """A PEFT folder as a trainer leaves it, with more in it than a delta may hold."""
    folder = tiny.random_adapter(tiny_base, tmp_path / "adapter")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-10").mkdir()
    (folder / "secret.txt").symlink_to("/etc/hostname")
    return folder


@torch.no_grad()
def greedy(base: Path, adapter: Path, prompt: list[int], count: int) -> list[int]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_published_resolved_and_answered(
    tiny_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest_tree(adapter)
    where = ("--registry", tmp_path / "registry")
    assert publish(adapter, "mine", "--base", tiny_base, "--alias", "prod", *where) == 0
    shown = capsys.readouterr()
    assert "published mine@1, mine@prod" in shown.out
    assert "checkpoint-10, secret.txt, training_args.bin" in shown.err
    assert digest_tree(adapter) == before

    entry = Registry(tmp_path / "registry").resolve("mine@prod")
    assert entry.delta.base.digest == base_identity(tiny_base)["digest"]
    assert set(entry.delta.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    engine = TorchEngineConfig().build(str(tiny_base))
    engine.load_delta("mine", str(entry.path))
    prompt = list(range(40, 60))
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    (output,) = engine.generate([Request(id="r", prompt_ids=prompt, delta="mine", sampling=sampling)])
    assert output.token_ids == greedy(tiny_base, adapter, prompt, 12)


def test_an_adapter_of_another_base_or_kind_is_one_line(
    tiny_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: Any) -> str:
        capsys.readouterr()
        assert publish(adapter, "mine", "--registry", tmp_path / "registry", *words) == 2
        *notes, line = capsys.readouterr().err.splitlines()
        assert all(note.startswith("note: ") for note in notes)
        return line

    assert "name it: --base FOLDER" in refused()
    assert "'./nowhere' is not a folder" in refused("--base", "./nowhere")
    other = tiny.tiny_base(tmp_path / "other", hidden_size=32, num_attention_heads=2)
    assert f"{adapter}: `model.layers.0." in (line := refused("--base", other)) and "another base" in line
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", config | {"megatron_config": {"a": 1}})
    assert "megatron_config asks for code to be imported" in refused("--base", tiny_base)
    write_json(adapter / "adapter_config.json", config | {"use_dora": True})
    assert "has to be merged to be served" in refused("--base", tiny_base, "--no-parity")
    write_json(adapter / "adapter_config.json", config)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "pickled adapters are never read" in refused("--base", tiny_base)
    assert not list((tmp_path / "registry").rglob("*.json"))


def test_a_delta_is_checked_against_the_base_that_is_named(
    tiny_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--registry", tmp_path / "registry")
    assert publish(adapter, "mine", "--base", tiny_base, *where) == 0
    delta = Registry(tmp_path / "registry").resolve("mine").path
    assert publish(delta, "again", "--base", tiny_base, *where) == 0
    other = tiny.tiny_base(tmp_path / "other", seed=7)
    assert publish(delta, "again", "--base", other, *where) == 2
    assert "belongs to base" in capsys.readouterr().err
