"""Data sets of the Hugging Face Hub, through the `datasets` package: downloaded once, then read as Arrow files."""

import importlib.util

from ftray.core.errors import DataError


def hub_files(name: str, split: str = "train") -> list[str]:
    """The Arrow files of a split in the local cache (`HF_HOME`), downloaded if they are not there.

    Args:
        name: `owner/name`, or what else `datasets.load_dataset` takes without running code.
        split: the split's name.

    Raises:
        DataError: one line: `datasets` is not installed, or it finds no such data set.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{name}: no such file; if it is a data set of the Hugging Face Hub, `pip install datasets` first"
        )
    import datasets

    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # the package raises its own, the network's and the parsers' errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{name}: no such file, and `datasets` cannot load it from the Hugging Face Hub ({reason})"
        ) from error
    files = [str(entry["filename"]) for entry in found.cache_files]
    if not files:
        raise DataError(f"{name}: the split `{split}` is empty")
    return files
