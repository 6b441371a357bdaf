"""The rows of one part of a corpus as JSON lines, as they are after the transforms of preparation."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.core.types import Progress, no_progress
from ftray.data.messages import conversation
from ftray.data.pairs import SIDES
from ftray.data.prepare import Preparation
from ftray.data.spans import LABELLED, PAIR, TOOLS, Row, Span
from ftray.data.store import LocalStore
from ftray.data.transform.split import Split
from ftray.data.work import rows_of

Part = Literal["train", "validation", "test"]


def export(
    data: DataConfig, tokenizer_folder: str, part: Part, path: Path, progress: Progress = no_progress
) -> int:
    """Write the rows of a part, one object a line, in their order; returns how many.

    Args:
        data: sources and transforms.
        tokenizer_folder: as `prepare_local`.
        part: `test` and, without files of its own, `validation` are what the transform `split` sets apart.
        path: the file to make.
        progress: called with the source bytes done and their total.

    Raises:
        DataError: one line, if there is no such part or a source cannot be read.
    """
    if part == "test":
        if not any(isinstance(item, Split) and item.test > 0 for item in data.transforms):
            raise DataError("data.transforms: no `split` with a `test` part; add one, or export another part")
        transforms = [
            dataclasses.replace(item, part="test") if isinstance(item, Split) else item
            for item in data.transforms
        ]
        data = dataclasses.replace(data, transforms=transforms)
    preparation = Preparation(data, tokenizer_folder, "validation" if part == "validation" else "train")
    count = 0
    with (
        LocalStore(path.absolute().parent).writing(path.name) as made,
        made.open("w", encoding="utf-8") as file,
    ):
        for unit, masks in preparation.decided(progress=progress):
            for row in rows_of(preparation.plan, unit, masks):
                file.write(json.dumps(as_object(row), ensure_ascii=False) + "\n")
                count += 1
    return count


def as_object(row: Row) -> dict[str, Any]:
    """A row under the fields of its shape, as `parse_row` reads them; conversations as `messages`."""
    spans, tools = [span for span in row.spans if span.kind != TOOLS], {}
    if len(spans) != len(row.spans):
        tools = {TOOLS: json.loads(row.spans[0].text)}
    if row.shape == PAIR:
        return tools | _answers(spans, SIDES, is_chat=row.is_chat)
    if row.shape == LABELLED:
        [kind] = {span.kind for span in spans} & {"desirable", "undesirable"}
        found = _answers(spans, (kind,), is_chat=row.is_chat)
        return tools | {"completion": found.pop(kind), **found, "label": kind == "desirable"}
    if row.is_chat:
        return {"messages": _messages(spans), **tools}
    return {span.kind: span.text for span in spans}


def _answers(spans: Sequence[Span], kinds: Sequence[str], *, is_chat: bool) -> dict[str, Any]:
    """The prompt and what follows it, up to each of some kinds."""
    places = [next(n for n, span in enumerate(spans) if span.kind == kind) for kind in kinds]
    ends = [*places[1:], len(spans)]
    found: dict[str, Any] = {}
    if places[0]:
        prompt = spans[: places[0]]
        found["prompt"] = _messages(prompt, learn=False) if is_chat else prompt[0].text
    for kind, start, end in zip(kinds, places, ends, strict=True):
        answer = [dataclasses.replace(spans[start], kind="assistant"), *spans[start + 1 : end]]
        found[kind] = _messages(answer) if is_chat else spans[start].text
    return found


def _messages(spans: Sequence[Span], *, learn: bool = True) -> list[dict[str, Any]]:
    """Messages with the weights that say what of them is learnt, where that is not plain."""
    messages = []
    for turn in conversation(spans)[0]:
        message = dict(turn.message)
        weight = turn.weight if turn.target else 0.0
        if learn and message["role"] == "assistant" and weight != 1:
            message["weight"] = weight
        messages.append(message)
    return messages
