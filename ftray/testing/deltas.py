"""Small delta folders with random weights, for tests of what stores and moves deltas without running them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ftray.delta import manifest

BASE = {"digest": "xxh3:" + "0" * 32, "model_type": "llama", "name": "tiny"}
"""Identity of a base that exists nowhere."""


def weights_delta(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """Make a delta folder in PEFT's layout with one random factor pair.

    Args:
        folder: where; made if it is not there.
        seed: decides the weights.
        **fields: fields of the manifest besides kind and base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    factors = {
        "base_model.model.q_proj.lora_A.weight": random.standard_normal((2, 8), dtype=np.float32),
        "base_model.model.q_proj.lora_B.weight": random.standard_normal((8, 2), dtype=np.float32),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    manifest.write(folder, **{"kind": "low_rank", "base": BASE} | fields)
    return folder
