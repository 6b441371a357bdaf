"""MinHash signatures of rows (Broder, 1997) and the clusters of rows that are alike, found by LSH bands.

The estimated similarity is that of the sets of word n-grams (Jaccard); scripts written without spaces count
characters as words. Two rows are compared if one band of their signatures is equal, and joined if the share of
equal positions reaches the threshold. Clusters are closed under this: members may be alike through others only.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import rensa
import xxhash

from ftray.data.rows import per_row, span_texts

NUM_PERM = 128
_SEED = 42
# Thai to Khmer, kana, Han (with extension B and later) and their compatibility forms.
_SPACELESS = (
    r"([\x{0e00}-\x{0eff}\x{1000}-\x{109f}\x{1780}-\x{17ff}\x{3040}-\x{30ff}"
    r"\x{3400}-\x{9fff}\x{f900}-\x{faff}\x{20000}-\x{3ffff}])"
)
_NO_WORD = r"[^\pL\pN\pM_]+"
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MAX_STEPS = 16

Signatures = npt.NDArray[np.uint32]
Words = npt.NDArray[np.uint64]


def signatures(rows: pa.Table, ngram: int) -> Signatures:
    """Signatures [R, 128] of the whole text of each row."""
    if rows.num_rows == 0:
        return np.zeros((0, NUM_PERM), np.uint32)
    words, counts = _words(rows)
    shingles, offsets = _shingles(words, counts, ngram)
    found = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, offsets.astype(np.uint64), NUM_PERM, _SEED
    )
    matrix: Signatures = np.array(found.to_rows(), np.uint32)
    return matrix


def as_keys(found: Signatures) -> list[bytes]:
    """Signatures as the keys of a barrier."""
    flat, width = found.tobytes(), NUM_PERM * 4
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def from_keys(keys: list[bytes]) -> Signatures:
    """The signatures that `as_keys` made keys of."""
    return np.frombuffer(b"".join(keys), np.uint32).reshape(len(keys), NUM_PERM)


def rows_per_band(threshold: float) -> int:
    """The longest band that misses at most one in a hundred pairs that are exactly `threshold` alike."""
    fitting = [r for r in range(1, 33) if (1 - threshold**r) ** (NUM_PERM // r) <= 0.01]
    return max(fitting, default=1)


def clusters(found: Signatures, threshold: float) -> npt.NDArray[np.int64]:
    """The smallest index in the cluster of each row."""
    root = np.arange(len(found))
    width = rows_per_band(threshold)
    for band in range(NUM_PERM // width):
        left, right = _candidates(found[:, band * width : (band + 1) * width])
        apart = root[left] != root[right]
        left, right = left[apart], right[apart]
        alike = (
            np.concatenate(
                [
                    (found[left[i : i + 65536]] == found[right[i : i + 65536]]).mean(axis=1) >= threshold
                    for i in range(0, len(left), 65536)
                ]
            )
            if len(left)
            else np.zeros(0, np.bool_)
        )
        root = _joined(root, left[alike], right[alike])
    return root


def _words(rows: pa.Table) -> tuple[Words, npt.NDArray[np.int64]]:
    """Hashes of the words of all rows, and how many each row has (at least one)."""
    texts = pc.utf8_lower(span_texts(rows))
    if pc.any(pc.match_substring_regex(texts, _SPACELESS)).as_py():
        texts = pc.replace_substring_regex(texts, _SPACELESS, r" \1 ")
    split = pc.split_pattern_regex(texts, _NO_WORD)
    words = split.flatten().dictionary_encode()
    of_word = np.array(
        [xxhash.xxh3_64_intdigest(word) for word in words.dictionary.cast(pa.binary()).to_pylist()], np.uint64
    )
    hashes = of_word[np.asarray(words.indices)]
    full = np.asarray(pc.not_equal(words.dictionary, ""), np.bool_)[np.asarray(words.indices)]
    of_span = np.add.reduceat(np.append(full, False), np.asarray(split.offsets)[:-1]) * (
        np.asarray(pc.list_value_length(split)) > 0
    )
    counts = per_row(rows, of_span)
    hashes = hashes[full]
    bare = np.flatnonzero(counts == 0)
    if not len(bare):
        return hashes, counts
    # A row without any word is alike only to its equals.
    contents = ["\n".join(s["text"] for s in rows["spans"][int(i)].as_py()) for i in bare]
    whole = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in contents], np.uint64)
    places = (np.cumsum(counts) - counts)[bare]
    counts[bare] = 1
    return np.insert(hashes, places, whole), counts


def _shingles(words: Words, counts: npt.NDArray[np.int64], ngram: int) -> tuple[Words, npt.NDArray[np.int64]]:
    """Hashes of all n-grams (of all words of a row that has fewer), and where each row's begin and end."""
    starts = np.cumsum(counts) - counts
    padded = np.zeros(len(words) + len(counts) * (ngram - 1), np.uint64)
    shift = np.repeat(np.arange(len(counts)) * (ngram - 1), counts)
    padded[np.arange(len(words)) + shift] = words
    combined = np.zeros(len(padded) - ngram + 1, np.uint64)
    for place, factor in enumerate(np.full(ngram, _MIX).cumprod()):
        combined += padded[place : place + len(combined)] * factor
    combined ^= combined >> np.uint64(29)
    combined *= _MIX
    combined ^= combined >> np.uint64(32)
    num = np.maximum(1, counts - ngram + 1)
    offsets = np.concatenate([[0], np.cumsum(num)])
    first = starts + np.arange(len(counts)) * (ngram - 1)
    source = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], num)
    return combined[source], offsets


def _candidates(band: Signatures) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs of rows that are equal in a band: each with the first of its bucket and with those next to it."""
    key = np.zeros(len(band), np.uint64)
    for column in band.T:
        key = (key ^ column) * _MIX
        key ^= key >> np.uint64(31)
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    new = np.append(True, ordered[1:] != ordered[:-1]) if len(ordered) else np.zeros(0, np.bool_)
    first = np.maximum.accumulate(np.where(new, np.arange(len(ordered)), 0))
    member = np.flatnonzero(~new)
    pairs = [(first[member], member)]
    for step in range(1, _MAX_STEPS + 1):
        later = np.flatnonzero(ordered[step:] == ordered[:-step]) + step
        if not len(later):
            break
        pairs.append((later - step, later))
    left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return order[left], order[right]


def _joined(
    root: npt.NDArray[np.int64], left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Clusters (by smallest index) after joining those of some pairs."""
    while True:
        low = np.minimum(root[left], root[right])
        high = np.maximum(root[left], root[right])
        if (low == high).all():
            return root
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]
