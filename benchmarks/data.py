"""The data plane against the raw tokenizer, `datasets.map` and TRL's packing, per CPU-second.

    python -m benchmarks.data --json            # 200 MB and 1 GB, about a quarter of an hour on two cores
    python -m benchmarks.data --mb 20 --large-mb 60

The arms run one after another in one process, several times, and the median ratio counts: these figures hold on a
machine that others use too. Needs the peers: `pip install -c constraints.txt ".[bench]"`.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import numpy.typing as npt

from benchmarks.corpus import texts, write_corpus
from benchmarks.measure import Cost, cost, pss_bytes
from benchmarks.transforms import rate
from ftray.cluster.ray_session import session
from ftray.config.recipe import DataConfig
from ftray.core.spec import parse
from ftray.data.batch import collate
from ftray.data.ray_prepare import prepare
from ftray.data.read import Shards
from ftray.data.train_tokenizer import train_tokenizer

LENGTH = 2048
BATCHES = (64, 256, 1024)
_SAMPLE_S = 0.5
_PACKED_DOCUMENTS = 5000
_STORED_BYTES = 12  # of one token in a shard: id, label, weight
_ROWS, _MICRO_BATCH = 4000, 8
_DEDUP_BYTES = 20_000_000


def read_texts(files: list[Path]) -> list[str]:
    """All texts of a corpus."""
    return [json.loads(line)["text"] for file in files for line in file.open()]


def raw_tokenizer(tokenizer: Any, rows: list[str], batch: int) -> int:
    """The tokenizer alone: tokens made."""
    backend = tokenizer.backend_tokenizer
    chunks = (rows[start : start + batch] for start in range(0, len(rows), batch))
    return sum(len(encoding.ids) for chunk in chunks for encoding in backend.encode_batch_fast(chunk))


def ours(files: list[Path], tokenizer: Path, work: Path) -> Path:
    """Read, tokenise, pack and write through Ray Data."""
    shutil.rmtree(work, ignore_errors=True)
    settings = {"train": [str(file) for file in files], "transforms": [], "max_length": LENGTH}
    return Path(prepare(parse(DataConfig, settings | {"cache_dir": str(work)}), str(tokenizer), "train"))


def hugging_face(files: list[Path], tokenizer: Any, work: Path, batch: int) -> None:
    """The same work by `datasets` with two processes, packed by TRL."""
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    shutil.rmtree(work, ignore_errors=True)
    rows = Dataset.from_json([str(file) for file in files], cache_dir=str(work / "cache"))

    def encode(part: dict[str, list[str]]) -> dict[str, Any]:
        ids = [[*e.ids, 0] for e in tokenizer.backend_tokenizer.encode_batch_fast(part["text"])]
        return {"input_ids": ids}

    done = rows.map(encode, batched=True, batch_size=batch, num_proc=2, remove_columns=["text"])
    pack_dataset(done, LENGTH, "bfd_split").save_to_disk(str(work / "out"))


def packing_time(tokenizer: Any, rows: list[str]) -> dict[str, float]:
    """Packing alone, the same documents, against TRL's `bfd_split`."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    from ftray.data.pack import cut, pack
    from ftray.data.tokenise import Documents

    # Whole documents, also those that are longer than a row, so that both sides have something to split.
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(rows[:_PACKED_DOCUMENTS])
    lists = [[*encoding.ids, 0] for encoding in encodings]
    input_ids = np.concatenate(lists, dtype=np.int32, casting="unsafe")
    documents = Documents(
        input_ids, input_ids, np.ones(len(input_ids), np.float32), np.array([len(ids) for ids in lists])
    )
    dataset = Dataset.from_dict({"input_ids": lists})
    ratios = []
    for _ in range(3):
        with cost() as mine:
            pack(documents, cut(documents, LENGTH), LENGTH, packing=True)
        with cost() as theirs:
            pack_dataset(dataset, LENGTH, "bfd_split")
        ratios.append(mine.cpu_s / max(theirs.cpu_s, 1e-9))
    return {"packing_ratio_vs_trl_bfd_split": round(statistics.median(ratios), 3)}


def loader(prepared: Path) -> dict[str, float]:
    """The training reader against reading the same bytes with numpy.

    The reader takes micro batches of rows in random order. Numpy takes the stored bytes of all these rows (ids,
    labels, weights, lengths; 12 bytes of a token, where a batch has 28) out of the mapped files once, in the order
    they lie in, into one new array: a plain copy, without the search for rows and the jumps between them. Beside it
    the same copy in pieces of a micro batch into a buffer that stays in the cache, the least that reading can take.
    """
    shards = Shards(prepared)
    rows = next(
        (n for n in itertools.accumulate(s["rows"] for s in shards.shards) if n >= _ROWS), len(shards)
    )
    order = np.random.default_rng(0).permutation(rows)
    numbers = range(shards.shard_of(rows - 1) + 1)
    columns = [column.view(np.uint8) for number in numbers for column in shards.columns(number)]
    buffer = np.empty(_MICRO_BATCH * LENGTH * _STORED_BYTES, np.uint8)
    arms: dict[str, Callable[[], Any]] = {
        "reader": lambda: _read_batches(shards, order),
        "new_array": lambda: np.concatenate(columns),
        "cached": lambda: _copy_in_pieces(columns, buffer),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(7):
        for name, arm in arms.items():
            with cost() as found:
                arm()
            times[name].append(found.wall_s)
    # The first round maps the files' pages.
    best = {name: statistics.median(found[1:]) for name, found in times.items()}
    tokens = sum(shard["tokens"] for shard in shards.shards[: len(numbers)])
    return {
        "loader_ratio_vs_memcpy": round(best["new_array"] / best["reader"], 3),
        "loader_ratio_vs_cached_memcpy": round(best["cached"] / best["reader"], 3),
        "loader_mtokens_per_s": round(tokens / best["reader"] / 1e6, 1),
    }


def _read_batches(shards: Shards, order: npt.NDArray[np.int64]) -> None:
    for start in range(0, len(order), _MICRO_BATCH):
        part = order[start : start + _MICRO_BATCH]
        collate([shards.row(index) for index in part.tolist()], part)


def _copy_in_pieces(columns: list[npt.NDArray[np.uint8]], buffer: npt.NDArray[np.uint8]) -> None:
    for column in columns:
        for start in range(0, len(column), len(buffer)):
            piece = column[start : start + len(buffer)]
            np.copyto(buffer[: len(piece)], piece)


def dedup(documents: list[str]) -> dict[str, float]:
    """MB per CPU-second of exact and near dedup, which the ratios leave out."""
    total, count = 0, 0
    while count < len(documents) and total < _DEDUP_BYTES:
        total, count = total + len(documents[count].encode()), count + 1
    return {
        f"{name}_mb_per_cpu_s": round(rate(name, documents[:count])["mb_per_cpu_s"], 1)
        for name in ("dedup", "near_dedup")
    }


def best_batch(run: Callable[[int], Any]) -> int:
    """The batch size that takes the fewest CPU-seconds."""
    costs = {}
    for batch in BATCHES:
        with cost() as found:
            run(batch)
        costs[batch] = found.cpu_s
    return min(costs, key=costs.__getitem__)


def tokens_of(prepared: Path) -> int:
    """Tokens in a prepared data set."""
    return int(Shards(prepared, verify=False).manifest["counts"]["tokens"])


def measure(mb: int, large_mb: int, repeats: int, folder: Path) -> dict[str, Any]:
    """All figures."""
    from transformers import AutoTokenizer

    documents = texts()
    sample = write_corpus(folder / "sample", documents, 12 << 20)
    files = write_corpus(folder / f"{mb}mb", documents, mb << 20)
    tokenizer_folder = folder / "tokenizer"
    if not tokenizer_folder.exists():
        train_tokenizer([str(file) for file in sample], tokenizer_folder, 16384)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    sample_rows, rows = read_texts(sample), read_texts(files)
    raw_batch = best_batch(lambda batch: raw_tokenizer(tokenizer, sample_rows, batch))
    hf_batch = best_batch(lambda batch: hugging_face(sample, tokenizer, folder / "hf", batch))
    arms: dict[str, list[float]] = {"raw": [], "ours": [], "hf": []}
    costs: dict[str, Cost] = {}
    with session():
        ours(sample, tokenizer_folder, folder / "warm")
        for _ in range(repeats):
            with cost() as costs["raw"]:
                tokens = raw_tokenizer(tokenizer, rows, raw_batch)
            with cost() as costs["ours"]:
                prepared = ours(files, tokenizer_folder, folder / "ours")
            with cost() as costs["hf"]:
                hugging_face(files, tokenizer, folder / "hf", hf_batch)
            for name, found in costs.items():
                arms[name].append(tokens / found.cpu_s)
        packing = packing_time(tokenizer, rows)
        del rows
        result: dict[str, Any] = {
            "ratio_vs_raw_tokenizer": _ratio(arms["ours"], arms["raw"]),
            "ratio_vs_hf_datasets": _ratio(arms["ours"], arms["hf"]),
            "tokens_per_cpu_s": {name: round(statistics.median(rates)) for name, rates in arms.items()},
            "wall_s": {name: round(found.wall_s, 1) for name, found in costs.items()},
            "raw_batch": raw_batch,
            "hf_batch": hf_batch,
            "tokens": tokens,
        }
        counts = Shards(prepared).manifest["counts"]
        result["packing_padding_fraction"] = round(1 - counts["tokens"] / (counts["packed_rows"] * LENGTH), 5)
        result["split_documents_fraction"] = round(counts["split_documents"] / counts["documents"], 5)
        result |= packing | loader(prepared)
    result |= dedup(documents)
    result |= memory(files, large_mb, documents, tokenizer_folder, folder)
    return result


def memory(
    files: list[Path], large_mb: int, documents: list[str], tokenizer: Path, folder: Path
) -> dict[str, Any]:
    """Peak PSS of everything, object store included, for the small and the large corpus."""
    if not large_mb:
        return {}
    large = write_corpus(folder / f"{large_mb}mb", documents, large_mb << 20)
    documents.clear()
    peaks = []
    for corpus in (files, large):
        with session():
            before = pss_bytes()
            with cost(_SAMPLE_S) as found:
                ours(corpus, tokenizer, folder / "memory")
            peaks.append(found.peak_pss_bytes - before)
    return {
        "memory_ratio_1gb_vs_200mb": round(peaks[1] / peaks[0], 3),
        "peak_pss_over_start_mb": [round(peak / 2**20) for peak in peaks],
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def main() -> None:
    """Print the figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--large-mb", type=int, default=1000, help="0: no memory figure")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep corpora here; empty: a temporary folder")
    parser.add_argument("--json", action="store_true", help="one JSON line only (it is always the last)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        result = measure(arguments.mb, arguments.large_mb, arguments.repeats, folder)
    sizes = {"mb": arguments.mb, "large_mb": arguments.large_mb, "repeats": arguments.repeats}
    print(json.dumps({"benchmark": "data", "cpus": os.cpu_count(), **sizes, **result}))


if __name__ == "__main__":
    main()
