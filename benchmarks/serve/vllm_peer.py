"""Run by a Python that has vLLM: answers the same prompts as often as it is asked to.

python -m benchmarks.serve.vllm_peer job.json: loads, prints `ready`, then answers once for every line of its input
and prints how many tokens it gave.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(path: Path) -> None:
    """Token ids only: no text is made of them."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(path.read_text())
    names = list(job["adapters"])
    lora: dict[str, Any] = (
        {"enable_lora": True, "max_loras": len(names), "max_lora_rank": job["rank"]} if names else {}
    )
    engine = LLM(
        model=job["base"],
        dtype=job["dtype"],
        max_model_len=job["max_length"],
        max_num_seqs=len(job["prompts"]),
        enable_prefix_caching=False,  # the prompts are the same every time
        enforce_eager=job["eager"],
        skip_tokenizer_init=True,
        seed=0,
        **lora,
    )
    requests = {
        name: LoRARequest(name, number, job["adapters"][name]) for number, name in enumerate(names, 1)
    }
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": ids} for ids, _ in job["prompts"]]
    loras: Any = [requests[name] for _, name in job["prompts"]] if names else None
    print("ready", flush=True)
    for _ in sys.stdin:
        found = engine.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
        print(sum(len(one.outputs[0].token_ids) for one in found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
