"""Calculating with deltas, against PEFT and plain torch: the same logits, the same tensors, measured errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftray.adapt.lora import load_adapter
from ftray.cli.main import main
from ftray.core.errors import ConfigError, DeltaError, FtrayError
from ftray.core.fs import read_json, write_json
from ftray.core.spec import build_piece
from ftray.delta import manifest
from ftray.delta.adopt import adopt, adopt_model
from ftray.delta.algebra import Parent, derive
from ftray.model.build import load_model
from ftray.registry.registry import Registry
from ftray.testing import tiny

IDS = torch.randint(2, 250, (2, 24), generator=torch.Generator().manual_seed(3))
ARCHITECTURES = ["llama", "gemma3", "gpt2"]
Calculate = Callable[..., Path]


def parent(folder: Path) -> Parent:
    return Parent(folder, manifest.read(folder))


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


@torch.no_grad()
def delta_logits(base: Path, folder: Path) -> torch.Tensor:
    """Logits under a delta folder, loaded by plain PEFT or plain transformers."""
    if manifest.read(folder).kind == "replacement":
        return logits(plain(folder))
    return logits(PeftModel.from_pretrained(plain(base), str(folder)).eval())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")

    def base(architecture: str) -> Path:
        folder = root / architecture
        return folder if folder.exists() else tiny.tiny_base(folder, architecture)

    return base


@pytest.fixture
def base(bases: Callable[[str], Path]) -> Path:
    return bases("llama")


@pytest.fixture
def low_rank(tmp_path: Path) -> Calculate:
    def make(base: Path, seed: int, r: int = 4) -> Path:
        folder = tmp_path / f"low-{base.name}-{seed}"
        adopt(
            tiny.random_adapter(base, tmp_path / f"peft-{base.name}-{seed}", r=r, seed=seed),
            str(base),
            folder,
        )
        return folder

    return make


@pytest.fixture
def whole(tmp_path: Path) -> Calculate:
    """Replacement weights: the base with noise on every parameter, or `rank` directions on linear layers alone."""

    def make(base: Path, seed: int, scale: float = 0.02, rank: int = 0) -> Path:
        folder, model = tmp_path / f"whole-{seed}", plain(base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not rank:
                    p += torch.randn(p.shape, generator=generator) * scale
                elif p.ndim == 2 and "_proj" in name:
                    left = torch.randn(p.shape[0], rank, generator=generator)
                    p += left @ torch.randn(rank, p.shape[1], generator=generator) * scale
        model.save_pretrained(tmp_path / f"hf-{seed}")
        adopt_model(tmp_path / f"hf-{seed}", str(base), folder)
        return folder

    return make


@pytest.fixture
def calculate(tmp_path: Path) -> Calculate:
    count = 0

    def run(method: str, *folders: Path, base: Path, **settings: Any) -> Path:
        nonlocal count
        count += 1
        rest = {key: settings.pop(key) for key in ("rank", "kind", "dtype") if key in settings}
        out = tmp_path / f"out-{count}"
        derive(
            build_piece("combine", {"type": method, **settings}),
            list(map(parent, folders)),
            str(base),
            out,
            **rest,
        )
        return out

    return run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sum_of_factors_is_exact(
    bases: Callable[[str], Path], low_rank: Calculate, calculate: Calculate, architecture: str
) -> None:
    base = bases(architecture)
    a, b = low_rank(base, 1), low_rank(base, 2, r=6)
    out = calculate("add", a, b, base=base, coefficients=[0.75, -0.5])
    config = read_json(out / "adapter_config.json")
    assert config["r"] == config["lora_alpha"] == 10
    model = plain(base)
    with torch.no_grad():
        for folder, weight in ((a, 0.75), (b, -0.5)):
            peft = PeftModel.from_pretrained(plain(base), str(folder)).merge_and_unload()
            mine = dict(peft.named_parameters())
            for (name, p), start in zip(model.named_parameters(), plain(base).parameters(), strict=True):
                p += weight * (mine[name] - start)
    torch.testing.assert_close(delta_logits(base, out), logits(model), rtol=1e-4, atol=1e-4)


def test_linear_combinations_are_those_of_peft(base: Path, low_rank: Calculate, calculate: Calculate) -> None:
    """`cat` is PEFT's exact one; its `linear` is of the factors and far from the sum of the deltas."""
    a, b = low_rank(base, 1), low_rank(base, 2)
    out = calculate("add", a, b, base=base, coefficients=[0.3, 0.6])
    model = PeftModel.from_pretrained(plain(base), str(a), adapter_name="a")
    model.load_adapter(str(b), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.6], "cat", combination_type="cat")
    model.set_adapter("cat")
    ours = delta_logits(base, out)
    torch.testing.assert_close(ours, logits(model.eval()), rtol=1e-4, atol=1e-4)
    model.add_weighted_adapter(["a", "b"], [0.3, 0.6], "linear", combination_type="linear")
    model.set_adapter("linear")
    assert (ours - logits(model)).abs().max() > 0.1


def test_truncation_is_pefts_svd_and_its_error_is_recorded(
    base: Path, low_rank: Calculate, calculate: Calculate
) -> None:
    a, b = low_rank(base, 1), low_rank(base, 2)
    out = calculate("add", a, b, base=base, rank=3)
    model = PeftModel.from_pretrained(plain(base), str(a), adapter_name="a")
    model.load_adapter(str(b), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "svd", combination_type="svd", svd_rank=3)
    model.set_adapter("svd")
    torch.testing.assert_close(delta_logits(base, out), logits(model.eval()), rtol=1e-3, atol=1e-3)
    delta = manifest.read(out)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    change = sum(layer.get_delta_weight(one) for one in ("a", "b"))
    with torch.no_grad():
        expected = (change - layer.get_delta_weight("svd")).norm() / change.norm()
    assert delta.derivation["relative_errors"][name] == pytest.approx(float(expected), rel=1e-3)
    assert 0.1 < delta.metrics["relative_error"] < 1


def test_ties_is_pefts(base: Path, low_rank: Calculate, calculate: Calculate) -> None:
    a, b = low_rank(base, 1), low_rank(base, 2)
    out = calculate("ties", a, b, base=base, density=0.4, coefficients=[1.0, 0.5], rank=8)
    model = PeftModel.from_pretrained(plain(base), str(a), adapter_name="a")
    model.load_adapter(str(b), adapter_name="b")
    model.add_weighted_adapter(
        ["a", "b"], [1.0, 0.5], "ties", combination_type="ties_svd", svd_rank=8, density=0.4
    )
    model.set_adapter("ties")
    torch.testing.assert_close(delta_logits(base, out), logits(model.eval()), rtol=1e-3, atol=1e-3)
    assert manifest.read(out).metrics["relative_error"] > 0.1


def ties_by_hand(base: torch.Tensor, tuned: list[torch.Tensor], density: float) -> torch.Tensor:
    """The paper's three steps, value by value."""
    kept = []
    for one in tuned:
        change = (one - base).flatten()
        order = change.abs().argsort(descending=True)[: int(density * len(change))]
        trimmed = torch.zeros_like(change)
        trimmed[order] = change[order]
        kept.append(trimmed)
    out = torch.zeros_like(kept[0])
    for index in range(len(out)):
        values = [one[index] for one in kept]
        sign = 1.0 if sum(values) >= 0 else -1.0
        same = [value for value in values if value * sign > 0]
        out[index] = sum(same) / len(same) if same else 0.0
    return base + out.view_as(base)


def test_ties_of_whole_weights_is_the_papers(base: Path, whole: Calculate, calculate: Calculate) -> None:
    a, b, c = (whole(base, seed) for seed in (1, 2, 3))
    out = calculate("ties", a, b, c, base=base, density=0.3)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = [load_file(folder / "model.safetensors")[name] for folder in (base, a, b, c, out)]
    torch.testing.assert_close(tensors[-1], ties_by_hand(tensors[0], tensors[1:4], 0.3))


@pytest.mark.parametrize(
    ("method", "settings", "weights"),
    [
        ("scale", {"factor": -0.5}, [-0.5]),
        ("interpolate", {"alpha": 0.25}, [0.25]),
        ("interpolate", {"alpha": 0.25}, [0.75, 0.25]),
        ("average", {}, [1 / 3, 1 / 3, 1 / 3]),
        ("average", {"coefficients": [1.0, 3.0]}, [0.25, 0.75]),
        ("add", {"coefficients": [2.0, -1.0]}, [2.0, -1.0]),
    ],
)
def test_whole_weights_are_combined_tensor_by_tensor(
    base: Path, whole: Calculate, calculate: Calculate, method: str, settings: Any, weights: list[float]
) -> None:
    folders = [whole(base, seed) for seed in range(len(weights))]
    out = calculate(method, *folders, base=base, **settings)
    start, made = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert made.keys() == start.keys()
    tuned = [load_file(folder / "model.safetensors") for folder in folders]
    for name, weight in start.items():
        expected = weight + sum(w * (one[name] - weight) for w, one in zip(weights, tuned, strict=True))
        torch.testing.assert_close(made[name], expected, rtol=1e-5, atol=1e-6)
    assert delta_logits(base, out).isfinite().all()


def test_factors_and_whole_weights_add_up(
    base: Path, low_rank: Calculate, whole: Calculate, calculate: Calculate
) -> None:
    low, high = low_rank(base, 1), whole(base, 2)
    out = calculate("add", low, high, base=base)
    merged = load_file(calculate("scale", low, base=base, kind="replacement") / "model.safetensors")
    start, tuned = load_file(base / "model.safetensors"), load_file(high / "model.safetensors")
    for name, made in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(made, merged[name] + tuned[name] - start[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_folders_answer_in_plain_transformers(
    bases: Callable[[str], Path], low_rank: Calculate, calculate: Calculate, architecture: str
) -> None:
    base = bases(architecture)
    low = low_rank(base, 1)
    out = calculate("scale", low, base=base, kind="replacement")
    torch.testing.assert_close(delta_logits(base, out), delta_logits(base, low), rtol=1e-4, atol=1e-4)
    half = calculate("scale", low, base=base, kind="replacement", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert read_json(half / "config.json")["dtype"] == "bfloat16"
    assert (delta_logits(base, half) - delta_logits(base, low)).abs().max() < 1.0


def test_factors_of_experts_merge_and_add_up(
    bases: Callable[[str], Path], calculate: Calculate, tmp_path: Path
) -> None:
    """Stacks of experts, whose factors PEFT lays end to end; held to our own layers."""
    from ftray.adapt.lora_experts import wrap_experts
    from ftray.adapt.lora_files import save_adapter
    from ftray.adapt.lora_linear import lora_layers, route_of, wrap

    base, folders = bases("qwen3_moe"), []
    for seed in (1, 2):
        model = load_model(base)
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        wrap_experts(model, targets, wrap(model, ["q_proj"]))
        generator = torch.Generator().manual_seed(seed)
        for layer in lora_layers(model).values():
            layer.add("x", 2 + seed, 0.5)
            for factor in (layer.lora_A["x"], layer.lora_B["x"]):
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
        save_adapter(model, "x", tmp_path / f"peft-{seed}", str(base), r=2 + seed, lora_alpha=(2 + seed) / 2)
        adopt(tmp_path / f"peft-{seed}", str(base), tmp_path / f"delta-{seed}")
        folders.append(tmp_path / f"delta-{seed}")
    added = calculate("add", *folders, base=base)
    merged = calculate("scale", added, base=base, kind="replacement")
    one_by_one = calculate("add", *folders, base=base, kind="replacement")
    again = calculate("scale", merged, base=base, rank=7)
    model = load_model(base, attn="sdpa")

    def served(folder: Path) -> torch.Tensor:
        load_adapter(model, "y", folder)
        route_of(model).active = "y"
        return logits(model)

    torch.testing.assert_close(served(added), logits(plain(merged)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(plain(one_by_one)), logits(plain(merged)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(served(again), served(added), rtol=1e-3, atol=1e-3)


def test_extraction_finds_what_is_low_rank_and_measures_what_is_not(
    base: Path, whole: Calculate, calculate: Calculate
) -> None:
    found = calculate("scale", exact := whole(base, 1, rank=3), base=base, rank=3)
    torch.testing.assert_close(delta_logits(base, found), delta_logits(base, exact), rtol=1e-3, atol=1e-3)
    assert manifest.read(found).metrics["relative_error"] < 1e-3
    full = whole(base, 2)
    errors = []
    for rank in (4, 16, 64):
        delta = manifest.read(calculate("scale", full, base=base, rank=rank))
        by_tensor = delta.derivation["relative_errors"]
        assert by_tensor["model.norm.weight"] == by_tensor["model.embed_tokens.weight"] == 1.0
        errors.append(by_tensor["model.layers.0.mlp.up_proj.weight"])
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3
    start, tuned = (load_file(folder / "model.safetensors") for folder in (base, full))
    name = "model.layers.0.mlp.up_proj.weight"
    values = torch.linalg.svdvals(tuned[name] - start[name])
    assert errors[1] == pytest.approx(float(values[16:].norm() / values.norm()), rel=1e-3)


def test_large_changes_are_decomposed_nearly_as_well() -> None:
    from ftray.delta.factors import factorise

    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(1100, 1200, generator=generator), full_matrices=False)
    change = u @ torch.diag(s * torch.exp(-torch.arange(len(s)) / 40)) @ vh
    a, b = factorise(change, 16)
    best = torch.linalg.svdvals(change)[16:].norm()
    assert (change - b @ a).norm() < 1.01 * best
    assert torch.equal(factorise(change, 16)[0], a), "the same every time"


def test_results_name_their_parents_and_data(base: Path, low_rank: Calculate, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    lineage = [{"data": ["xxh3:d1"], "sources": {"a": "xxh3:a"}}, {"data": ["xxh3:d1", "xxh3:d2"]}]
    entries = [registry.publish(low_rank(base, n), "tone", lineage=lineage[n]) for n in (0, 1)]
    parents = [
        Parent(entry.path, entry.delta, name) for entry, name in zip(entries, ("tone@1", ""), strict=True)
    ]
    out = tmp_path / "out"
    delta = derive(build_piece("combine", "average"), parents, str(base), out)
    assert delta == manifest.read(out)
    assert delta.lineage.parents == ["tone@1", entries[1].digest]
    assert delta.lineage.data == ["xxh3:d1", "xxh3:d2"] and delta.lineage.sources == {"a": "xxh3:a"}
    assert delta.derivation["method"] == "average" and delta.derivation["settings"] == {"coefficients": None}
    assert registry.publish(out, "mix").version == 1


def test_what_does_not_belong_together_is_refused(
    base: Path,
    bases: Callable[[str], Path],
    low_rank: Calculate,
    whole: Calculate,
    calculate: Calculate,
    tmp_path: Path,
) -> None:
    a, b = low_rank(base, 1), low_rank(base, 2)
    with pytest.raises(DeltaError, match="belongs to base llama"):
        calculate("add", a, b, base=bases("gpt2"))
    fields = read_json(b / manifest.MANIFEST)
    write_json(b / manifest.MANIFEST, fields | {"chat_template_hash": "xxh3:other"})
    with pytest.raises(DeltaError, match="2 chat templates"):
        calculate("add", a, b, base=base)
    with pytest.raises(ConfigError, match="are 1 for 2 deltas"):
        calculate("add", a, a, base=base, coefficients=[1.0])
    with pytest.raises(ConfigError, match="takes one delta, not 2"):
        calculate("scale", a, a, base=base)
    with pytest.raises(ConfigError, match="add up to 0"):
        calculate("average", a, a, base=base, coefficients=[1.0, -1.0])
    with pytest.raises(DeltaError, match="rank: needed"):
        calculate("scale", whole(base, 1), base=base, kind="low_rank")
    broken = whole(base, 5)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    manifest.write(broken, kind="replacement", base=fields["base"])
    with pytest.raises(DeltaError, match=r"`model\.norm\.weight` holds values that are not finite"):
        calculate("scale", broken, base=base)
    (tmp_path / "there").mkdir()
    with pytest.raises(DeltaError, match="is there already"):
        derive(build_piece("combine", "scale"), [parent(a)], str(base), tmp_path / "there")
    assert not list(tmp_path.glob(".tmp-*")), "nothing half written stays"


def test_verbs(base: Path, low_rank: Calculate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "registry")
    Registry(root).publish(low_rank(base, 1), "tone")
    second = str(low_rank(base, 2))

    def ftray(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["delta", *words, "--base", str(base), "--registry", root])
        assert ended.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    out = [str(tmp_path / f"made-{n}") for n in range(7)]
    ftray("scale", "tone@1", "--factor", "0.5", "--out", out[0])
    ftray("add", "tone@1", second, "--weight", "1", "--weight", "-1", "--out", out[1])
    ftray("average", "tone@1", second, out[0], "--out", out[2])
    ftray("interpolate", "tone", "--alpha", "0.3", "--out", out[3])
    assert "relative error" in ftray("ties", "tone@1", second, "--rank", "4", "--out", out[4])
    assert "replacement sha256:" in ftray("merge", "tone@1", "--out", out[5])
    made = json.loads(ftray("extract", out[5], "--rank", "4", "--out", out[6], "--json"))
    assert made["lineage"]["parents"] == [manifest.read(out[5]).digest]
    assert made["metrics"]["relative_error"] < 1e-3
    with pytest.raises(FtrayError, match="nothing is published"):
        Registry(root).resolve("other")
