"""Run by a Python that has vLLM: answers the requests of a JSON file through our protocol and prints what came.

python -m tests.vllm_contract requests.json
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ftray.core.errors import FtrayError
from ftray.engine.api import Output, Request, Sampling, ScoreItem
from ftray.engine.vllm_engine import VLLMEngineConfig


def main(path: Path) -> dict[str, Any]:
    """Everything the test asks for."""
    job = json.loads(path.read_text())
    arguments = {"enforce_eager": True, "block_size": 32, "disable_log_stats": True}
    config = VLLMEngineConfig(
        dtype="float32", max_num_seqs=8, max_loras=4, max_length=128, engine_args=arguments
    )
    engine = config.build(job["base"])
    for name, folder in job["deltas"].items():
        engine.load_delta(name, folder)
    requests = [
        Request(**(fields | {"sampling": Sampling(**fields["sampling"])})) for fields in job["requests"]
    ]
    whole = engine.generate(requests)
    streamed: dict[str, list[Output]] = {}
    for request in requests:
        engine.add(request)
    engine.cancel(job["cancel"])
    while engine.has_work():
        for output in engine.step():
            streamed.setdefault(output.id, []).append(output)
    refused = []
    for folder in job["bad"]:
        try:
            engine.load_delta("bad", folder)
        except FtrayError as error:
            refused.append(str(error))
    try:
        engine.score([ScoreItem(**item) for item in job["scores"]])
    except FtrayError as error:
        refused.append(str(error))
    return {
        "engine": engine.info.engine,
        "whole": [dataclasses.asdict(output) for output in whole],
        "streamed": {
            name: [token for part in parts for token in part.token_ids] for name, parts in streamed.items()
        },
        "texts": {name: "".join(part.text for part in parts) for name, parts in streamed.items()},
        "digests": {name: engine.delta_info(name).digest for name in job["deltas"]},
        "refused": refused,
        "in_flight": [engine.delta_info(name).in_flight for name in job["deltas"]],
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(Path(sys.argv[1]))))
