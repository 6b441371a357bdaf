"""`python -m benchmarks.chaos --train|--tune|--serve [--json] [--minutes 10] [--keep FOLDER]`: what
kills leave behind.

Real commands, or an endpoint under load, are disturbed for some minutes, and their outcome is compared with that of
one nobody disturbed; the last line is one JSON object. With `--keep` a campaign goes on where the
last command left it.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from benchmarks import chaos_serve, chaos_train, chaos_tune


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    disturbed = parser.add_mutually_exclusive_group(required=True)
    disturbed.add_argument("--train", action="store_true", help="disturb training runs")
    disturbed.add_argument("--tune", action="store_true", help="disturb searches")
    disturbed.add_argument("--serve", action="store_true", help="disturb an endpoint")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no further run after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="*", default=list(chaos_train.KINDS), choices=chaos_train.KINDS, help="of --train"
    )
    parser.add_argument(
        "--keep", type=Path, help="leave everything in this folder, and go on with what is there"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="ftray-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    minutes, seed, quiet = arguments.minutes, arguments.seed, arguments.json
    try:
        if arguments.tune:
            found = chaos_tune.campaign(folder, minutes, seed, quiet)
            failed = found["promises_broken"] > 0
        elif arguments.serve:
            found = chaos_serve.campaign(folder, minutes, seed, quiet)
            failed = found["promises_broken"] > 0
        else:
            found = chaos_train.campaign(folder, minutes, seed, arguments.kinds, quiet)
            failed = found["runs_finished"] < found["runs"]
        print(json.dumps(found))
        if found["error"] or failed:
            sys.exit(1)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _end(signum: int, frame: FrameType | None) -> None:
    """End in order, so that the run at hand is ended too."""
    del frame
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
