"""Built on meta and streamed, a model is the one transformers loads; its bad folders are one line each."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftray.core.errors import ModelError
from ftray.model import convert
from ftray.model.build import load_model
from ftray.model.folder import resolve_folder, weight_map
from ftray.model.head import Head
from ftray.model.identity import base_identity
from ftray.testing import tiny

IDS = torch.randint(2, 250, (1, 31), generator=torch.Generator().manual_seed(0))
# With caps on scores and logits, and with attention sinks over transposed experts.
OTHERS: dict[str, dict[str, object]] = {
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 9,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
ARCHITECTURES = [*tiny.ARCHITECTURES, *OTHERS]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, name = tmp_path_factory.mktemp("base") / request.param, request.param
    return tiny.tiny_base(folder, "llama" if name in OTHERS else name, **OTHERS.get(name, {}))


@torch.no_grad()
def test_equals_from_pretrained(base: Path) -> None:
    ours = load_model(base)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


@torch.no_grad()
def test_packed_documents_equal_the_documents_apart(base: Path) -> None:
    model = load_model(base)
    bounds = torch.tensor([0, 4, 21, 31], dtype=torch.int32)
    lengths = (4, 17, 10)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(IDS, position_ids=positions, cu_seq_lens_q=bounds).logits
    start = 0
    for length in lengths:
        alone = model(IDS[:, start : start + length]).logits
        torch.testing.assert_close(packed[:, start : start + length], alone, rtol=1e-4, atol=1e-4)
        start += length


@torch.no_grad()
def test_head_equals_the_models_own_forward(base: Path) -> None:
    model = load_model(base)
    hidden = model.base_model(input_ids=IDS).last_hidden_state[0]
    torch.testing.assert_close(Head(model)(hidden), model(IDS).logits[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 4.0}, "softcap"),
        ({"model_type": "granite", "logits_scaling": 3.0}, "scale"),
        ({"model_type": "cohere", "logit_scale": 0.25}, "scale"),
    ],
)
def test_head_knows_scaled_and_capped_logits(settings: dict[str, object], field: str) -> None:
    from transformers import AutoConfig

    small = {
        k: v for k, v in tiny.ARCHITECTURES["llama"].items() if k not in ("model_type", "tie_word_embeddings")
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small, **settings, vocab_size=258)).eval()
    head = Head(model)
    assert head.plain_weight is None and getattr(head, field) not in (None, 1.0)
    hidden = model.base_model(input_ids=IDS).last_hidden_state[0]
    torch.testing.assert_close(head(hidden), model(IDS).logits[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_part_of_a_parameter_is_read_alone(base: Path) -> None:
    """As a rank reads its shard: the first axis of every parameter, experts too."""
    model = load_model(base)
    origins = convert.find_origins(model, weight_map(base))
    for name, parameter in model.named_parameters():
        part = convert.read_rows(origins[name], model, torch.float32, 1, 3)
        assert torch.equal(part, parameter[1:3]), name


@torch.no_grad()
def test_reverted_parameters_are_the_checkpoint(base: Path) -> None:
    model = load_model(base)
    saved = {key: safe_open(file, "pt").get_tensor(key) for key, file in weight_map(base).items()}
    found = dict(convert.revert(model, model.named_parameters()))
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key]) for key in saved)
    shapes = {
        key: value.shape
        for key, value in convert.revert(model, ((n, p.to("meta")) for n, p in model.named_parameters()))
    }
    assert shapes == {key: value.shape for key, value in saved.items()}


def test_an_incomplete_stack_of_experts_is_one_line(tmp_path: Path) -> None:
    folder = tiny.tiny_base(tmp_path, "mixtral")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"experts.gate_up_proj` cannot be made of 7 tensors"):
        load_model(folder)


def test_identity_follows_weights_and_not_the_path(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    other = tiny.tiny_base(tmp_path / "other", seed=9)
    assert base_identity(copy)["digest"] == base_identity(tiny_base)["digest"]
    assert base_identity(other)["digest"] != base_identity(tiny_base)["digest"]


def test_folders_that_are_no_model(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        resolve_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        resolve_folder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        resolve_folder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match="not readable as safetensors"):
        load_model(tmp_path)
    remote = tmp_path / "remote"
    shutil.copytree(tiny_base, remote)
    config = json.loads((remote / "config.json").read_text()) | {"auto_map": {"AutoConfig": "x.Y"}}
    (remote / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="remote code"):
        load_model(remote)


def test_weights_of_another_shape_are_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="do not belong together"):
        load_model(folder)
