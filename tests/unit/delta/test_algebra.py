"""What a calculation leaves behind, what it refuses, and its verbs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftray.cli.main import main
from ftray.core.errors import ConfigError, DeltaError, FtrayError
from ftray.core.fs import read_json, write_json
from ftray.core.spec import build_piece
from ftray.delta import manifest
from ftray.delta.algebra import Parent, derive
from ftray.registry.registry import Registry
from tests.unit.delta.answers import Calculate, parent


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
