"""Real text that every machine has, varied to any size: Python sources, documentation and manual pages."""

import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_FILE_BYTES = 25 << 20
_WORD = re.compile(r"[A-Za-z_]{4,}")


def texts() -> list[str]:
    """Documents of this machine: the library and packages of this Python, and manual pages."""
    roots = [Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["purelib"])]
    files = [
        path for root in roots for kind in ("*.py", "*.md", "*.rst", "*.txt") for path in root.rglob(kind)
    ]
    files += sorted(Path("/usr/share/man").rglob("*.gz")) + sorted(Path("/usr/share/doc").rglob("*.gz"))
    found, total = [], 0
    for path in sorted(set(files)):
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError, EOFError):
            continue
        if 200 <= len(text) <= 40_000:
            found.append(text)
            total += len(text)
        if total > 120 << 20:
            break
    random.Random(0).shuffle(found)
    return found


def varied(documents: list[str], size_bytes: int) -> Iterator[str]:
    """Documents until `size_bytes`; from the second pass on some of their words are swapped for others."""
    total, passes = 0, 0
    words = sorted({word for text in documents[:200] for word in _WORD.findall(text)})
    while True:
        draw = random.Random(passes)
        for text in documents:
            if passes:
                chosen = {word: draw.choice(words) for word in draw.sample(words, 40)}
                text = _WORD.sub(lambda match: chosen.get(match[0], match[0]), text)  # noqa: B023 (used at once)
            yield text
            total += len(text.encode())
            if total >= size_bytes:
                return
        passes += 1


def write_corpus(folder: Path, documents: list[str], size_bytes: int) -> list[Path]:
    """JSON lines of `{"text": ...}` in files of about 25 MiB; returns the files, which are kept if there."""
    done = folder / "done"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file, written, number = None, _FILE_BYTES, 0
        for text in varied(documents, size_bytes):
            if written >= _FILE_BYTES:
                if file:
                    file.close()
                file, written, number = (folder / f"part-{number:04d}.jsonl").open("w"), 0, number + 1
            assert file is not None
            written += file.write(json.dumps({"text": text}) + "\n")
        if file:
            file.close()
        done.touch()
    return sorted(folder.glob("*.jsonl"))
