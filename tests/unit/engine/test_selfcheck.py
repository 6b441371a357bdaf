"""Models that do not go through the paged attention are found out and answered correctly all the same."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.engine import paged
from ftray.engine.api import Request, Sampling
from ftray.engine.base import DeltaReader, max_positions
from ftray.engine.torch_engine import Base, TorchEngineConfig
from ftray.model.build import load_model
from ftray.testing import tiny

FOREIGN: dict[str, dict[str, Any]] = {
    # an alibi bias of its own: takes no notice of the registration
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.15},
    # looks its attention up in a table of its own
    "falcon": {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    # no attention, and a state that a key-value cache does not hold
    "mamba": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3},
}


@pytest.mark.parametrize("architecture", FOREIGN)
def test_a_foreign_model_falls_back_aloud_and_answers_right(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setitem(tiny.ARCHITECTURES, architecture, FOREIGN[architecture])
    base = tiny.tiny_base(tmp_path / architecture, architecture)
    with caplog.at_level(logging.WARNING):
        engine = TorchEngineConfig().build(str(base))
    assert engine.info.engine == "hf_generate"
    assert "plain Hugging Face" in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    requests = [Request(id=str(n), prompt_ids=list(range(9, 9 + n)), sampling=sampling) for n in (3, 20)]
    for request, output in zip(requests, engine.generate(requests), strict=True):
        ids = [*request.prompt_ids, *output.token_ids]
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        rows = logits[len(request.prompt_ids) - 1 :]
        chosen = rows.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert (rows.max(-1).values - chosen <= 1e-3).all()


@pytest.mark.parametrize("swap", [True, False])
def test_a_wrong_window_is_seen(swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.tiny_base(tmp_path / "base", "mistral")
    config = TorchEngineConfig()

    def problem() -> str | None:
        model = load_model(base, attn=paged.NAME)
        return config.check(Base(model, DeltaReader(model, None)), swap=swap)

    assert problem() is None
    monkeypatch.setattr(paged.Prompt, "mask", lambda self, window: _causal(self))
    assert "differ" in (problem() or "")


def _causal(prompt: paged.Prompt) -> torch.Tensor:
    total = prompt.start + prompt.length
    return torch.ones(total, total, dtype=torch.bool).tril()[prompt.start :]


def test_rope_that_looks_at_the_batch_caps_the_length(tmp_path: Path) -> None:
    from transformers import AutoConfig

    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    config = AutoConfig.for_model("llama", max_position_embeddings=256, rope_parameters=rope)
    assert max_positions(config) == 64
    assert max_positions(AutoConfig.for_model("llama", max_position_embeddings=256)) == 256


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.7 * at for at in range(8)],
    "original_max_position_embeddings": 48,
}


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi-3 whose positions turn for the whole batch once a row has more than 48 tokens."""
    folder = tmp_path_factory.mktemp("longrope") / "base"
    sizes = {"sliding_window": None, "max_position_embeddings": 128, "original_max_position_embeddings": 48}
    return tiny.tiny_base(folder, "phi3", rope_parameters=LONGROPE, **sizes)


def test_positions_that_rows_share_keep_rows_short_and_say_so(
    longrope: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = TorchEngineConfig().build(str(longrope))
    assert (engine.info.engine, engine.info.max_length) == ("torch", 48)
    assert "takes 48 of its 128 tokens" in caplog.text


def test_longer_rows_are_answered_one_at_a_time_by_plain_hugging_face(
    longrope: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    with caplog.at_level(logging.WARNING):
        engine = TorchEngineConfig(max_length=128).build(str(longrope))
    assert (engine.info.engine, engine.info.max_length) == ("hf_generate", 128)
    assert "change each other's positions" in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(longrope, dtype=torch.float32).eval()
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    # One stays short, one passes the turn while it decodes, one begins beyond it; all at once.
    requests = [Request(id=str(n), prompt_ids=list(range(9, 9 + n)), sampling=sampling) for n in (5, 42, 70)]
    for request, output in zip(requests, engine.generate(requests), strict=True):
        ids = list(request.prompt_ids)
        for token in output.token_ids:
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert logits.max() - logits[token] <= 1e-3
            ids.append(token)


def test_a_batch_would_have_changed_the_answer(longrope: Path) -> None:
    """What the fallback is for: the same row beside a longer one has other logits."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(longrope, dtype=torch.float32).eval()
    short, long = torch.arange(9, 29), torch.arange(9, 79)
    with torch.no_grad():
        alone = plain(input_ids=short[None]).logits[0, -1]
        ids = torch.stack([torch.cat([short, torch.zeros(50, dtype=torch.long)]), long])
        beside = plain(input_ids=ids).logits[0, 19]
    assert (alone - beside).abs().max() > 0.1
