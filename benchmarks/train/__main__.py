"""Training speed and memory: `python -m benchmarks.train --json`.

Arms run in processes of their own and take turns step by step; a ratio is the median over pairs of steps. The same
packed rows (or their documents), weights, precision and optimiser go to every arm, and the losses must agree.
All of it takes the better part of an hour; `--record FILE` puts the sections of several shorter runs into one file.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.train import sections, spread
from benchmarks.train.record import commands, machine, merge
from ftray.core.fs import read_json, write_json

SECTIONS = {
    "trl": sections.versus_trl,
    "trl_default": sections.versus_trl_default,
    "fp32": sections.fp32,
    "lora": spread.lora,
    "ranks": spread.ranks,
    "checkpoint": spread.checkpoint,
    "ray": spread.on_ray,
}


def main() -> None:
    """Run the sections asked for; the last line is the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=None)
    parser.add_argument("--lengths", nargs="*", type=int, default=[512, 2048])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument(
        "--steps", type=int, default=6, help="steps of each arm; the first two are not counted"
    )
    parser.add_argument(
        "--batches", nargs="*", type=int, default=[1, 2, 8], help="sweep of TRL's batch with packing"
    )
    parser.add_argument("--folder", type=Path, help="keep texts, tokenizer and shards here")
    parser.add_argument("--record", type=Path, help="put the figures into this file beside those it has")
    parser.add_argument("--json", action="store_true", help="one JSON line only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        setup = sections.Setup(
            folder=(options.folder or Path(temporary)).resolve(),
            steps=options.steps,
            lengths=tuple(options.lengths),
            threads=tuple(options.threads),
            batches=tuple(options.batches),
        )
        figures: dict[str, Any] = {"benchmark": "train", "machine": machine(), "commands": {}}
        setup.prepare()
        for name in options.only or SECTIONS:
            found = SECTIONS[name](setup)
            figures |= found
            figures["commands"] |= commands(name, found, sys.argv[1:])
            if not options.json:
                print(json.dumps({name: found}), flush=True)
    if options.record and options.record.is_file():
        figures = merge(read_json(options.record), figures)
    figures |= sections.worst(figures)
    if options.record:
        write_json(options.record, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
