"""Files that are either wholly there or not there: atomic commits, canonical JSON and digests.

A directory is committed by temp + fsync + rename + fsync of the parent. That is what survives `kill -9`
and a power cut on a POSIX file system; a plain copy into the final name tears.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

from ftray.core.errors import CheckpointError, FtrayError


def fsync_path(path: Path) -> None:
    """Flush one file or directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an `OSError` that names no file (a write to a full disk) name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def commit_dir(final: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `final` when the block ends without an error.

    Raises:
        FileExistsError: if `final` is already there with content (another writer was first).
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    tmp = final.parent / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
    tmp.mkdir()
    try:
        with naming(final):
            yield tmp
        move_new(tmp, final)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def move_new(tmp: Path, final: Path) -> None:
    """Rename a written directory to a name that is still free, durably.

    Raises:
        FileExistsError: if `final` is already there with content (another writer was first).
    """
    for path in [*tmp.rglob("*"), tmp]:
        fsync_path(path)
    try:
        tmp.rename(final)
    except OSError as error:  # ENOTEMPTY or EEXIST, by platform
        if final.exists():
            raise FileExistsError(str(final)) from error
        raise
    fsync_path(final.parent)


@contextlib.contextmanager
def replace_dir(final: Path) -> Iterator[Path]:
    """Yield a temporary directory that takes the place of `final` when the block ends without an error.

    A kill leaves the old directory, the new one, or for a moment neither, never half of one.
    """
    old = final.parent / f".tmp-old-{final.name}-{uuid.uuid4().hex[:8]}"
    aside = final.parent / f".tmp-new-{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        with commit_dir(aside) as tmp:
            yield tmp
        if final.exists():
            final.rename(old)
        aside.rename(final)
        fsync_path(final.parent)
    finally:
        for path in (old, aside):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def replace_file(final: Path) -> Iterator[Path]:
    """Yield a path for a file that takes the place of `final`, durably, when the block ends without an error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    tmp = final.parent / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        with naming(final):
            yield tmp
            fsync_path(tmp)
        tmp.replace(final)
        fsync_path(final.parent)
    finally:
        tmp.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Replace a file atomically and durably; `mode` are its permissions, else those of a new file."""
    with replace_file(path) as tmp, tmp.open("wb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(data)


def write_new_json(path: Path, value: Any) -> None:
    """Write a JSON file under a name that is still free, atomically and durably.

    Raises:
        FileExistsError: if there is such a file (another writer was first).
    """
    aside = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        write_json(aside, value)
        os.link(aside, path)
        fsync_path(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, mode: int | None = None) -> None:
    """Replace a JSON file atomically and durably; `mode` as in `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), mode=mode)


def read_json(path: Path, error: type[FtrayError] = FtrayError) -> Any:
    """Read a JSON file. Raises `error` (one line) if it is missing or is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as reason:
        raise error(f"{path}: not readable as JSON ({reason})") from reason


def digest_bytes(data: bytes) -> str:
    """Digest of bytes, as `xxh3:<32 hex digits>`. It finds damage; whoever wants to make two files of one can."""
    return "xxh3:" + xxhash.xxh3_128_hexdigest(data)


def digest_json(value: Any) -> str:
    """Digest of a JSON value in canonical form (sorted keys, no spaces), as `digest_bytes`."""
    return digest_bytes(_canonical(value))


def sha256_json(value: Any) -> str:
    """`digest_json` as `sha256:<64 hex digits>`: an identity that nobody can forge."""
    return "sha256:" + hashlib.sha256(_canonical(value)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_file(path: Path) -> str:
    """Digest of a file's bytes as `sha256:<64 hex digits>`, for what others wrote and trust depends on."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def digest_file(path: Path) -> str:
    """Digest of a file's bytes as `digest_bytes`, read in pieces of 4 MiB."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return "xxh3:" + state.hexdigest()


def digest_tree(folder: Path, *, skip: frozenset[str] = frozenset()) -> dict[str, str]:
    """Digests of every file below a folder, keyed by relative POSIX path; `skip` names files left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: digest_file(path) for name, path in named.items() if name not in skip}


def verify_tree(folder: Path, digests: dict[str, str], error: type[FtrayError] = CheckpointError) -> None:
    """Check that each named file is there with its digest, of either kind; raises `error` naming one that isn't."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise error(f"{path}: missing, though the manifest names it; restore it or delete {folder}")
        found = sha256_file(path) if digest.startswith("sha256:") else digest_file(path)
        if found != digest:
            raise error(f"{path}: its content is not what was committed; restore it or delete {folder}")


def private_dir(path: Path, error: type[FtrayError] = FtrayError) -> Path:
    """A folder that is this user's alone, made when needed, its parents too.

    Under a shared folder (`/tmp`) anybody may have made one of this name first, to be believed or to be written to.
    Raises `error` (one line) if it is a link, somebody else's or open to others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise error(
            f"{path}: not a folder of this user alone (mode 0700); remove it, or set TMPDIR elsewhere"
        )
    return path


def lock_file(path: Path, wait_s: float) -> IO[bytes] | None:
    """Hold an exclusive lock until the returned file is closed, or until this process ends in any way.

    Args:
        path: the lock's file; made when needed and left behind.
        wait_s: how long to wait for another process to let go.

    Returns:
        The open file, or None if another process held the lock all the while.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                return None
            time.sleep(0.1)
