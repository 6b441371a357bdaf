"""Batch inference of JSON lines: rows in, one answer per row out, and a reason for each row that has none.

Rows are `{"prompt": ...}` or `{"messages": [...]}`; an answer that stands in them already (`completion`, a last
assistant message) is what is asked for again. Prompts are rendered as in training.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ftray.core.errors import RequestError
from ftray.data.rows import BadRow, parse_row
from ftray.data.source import Line, Unit, read_lines
from ftray.data.tokenise import Segment, Tokeniser
from ftray.engine.api import Engine, Output, Request, Sampling

_ANSWER = "x"


@dataclass
class UnitResult:
    """The answers to the rows that begin in one byte range of a file."""

    unit: Unit
    num_lines: int
    """Lines of the unit, blank ones counted."""
    answered: list[dict[str, Any]] = field(default_factory=list)
    """`line` (within the unit, from 0), `input`, `output`, `finish_reason` and token counts."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """`file`, `offset` (bytes), `line` (within the unit) and `reason`."""


def generate_unit(
    engine: Engine, tokeniser: Tokeniser, unit: Unit, delta: str | None, sampling: Sampling
) -> UnitResult:
    """Answer every row of a unit, in order.

    Args:
        engine: generates.
        tokeniser: the base's.
        unit: the byte range.
        delta: name of a loaded delta; None: the base.
        sampling: for all rows; a seed is made a different one for each row, the same in every run.
    """
    lines, num_lines = read_lines(unit)
    result = UnitResult(unit, num_lines)
    rows: dict[str, tuple[Line, dict[str, Any], int]] = {}
    parsed: list[tuple[Line, dict[str, Any], list[Segment]]] = []
    for line in lines:
        try:
            value = _object(line.content)
            parsed.append((line, value, prompt_segments(value, tokeniser)))
        except BadRow as error:
            result.quarantined.append(_bad(unit, line, str(error)))
    outputs: dict[str, list[Output]] = {}
    encoded = tokeniser.encode([segments for *_, segments in parsed])
    for (line, value, _), parts in zip(parsed, encoded, strict=True):
        ids = [token for part in parts for token in part]
        name = str(line.offset)
        try:
            own = _fitting(sampling, len(ids), engine.info.max_length, unit, line)
            engine.add(Request(id=name, prompt_ids=ids, delta=delta, sampling=own))
        except RequestError as error:
            result.quarantined.append(_bad(unit, line, str(error)))
            continue
        rows[name], outputs[name] = (line, value, len(ids)), []
    while engine.has_work():
        for output in engine.step():
            outputs[output.id].append(output)
    for name, (line, value, num_prompt) in rows.items():
        parts_out = outputs[name]
        if parts_out[-1].finish_reason == "error":
            result.quarantined.append(_bad(unit, line, parts_out[-1].error or "the engine failed"))
        else:
            result.answered.append(_answer(line, value, num_prompt, parts_out))
    result.quarantined.sort(key=lambda bad: bad["line"])
    return result


def prompt_segments(value: dict[str, Any], tokeniser: Tokeniser) -> list[Segment]:
    """What stands before a row's answer, rendered. Raises `BadRow`."""
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or not messages:
            raise BadRow("`messages` is not a list of messages")
        if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages:
            raise BadRow("nothing stands before the answer")
        row = parse_row({"messages": [*messages, {"role": "assistant", "content": _ANSWER}]})
    elif "prompt" in value:
        row = parse_row({"prompt": value["prompt"], "completion": _ANSWER})
    else:
        raise BadRow("no `messages` or `prompt`")
    return tokeniser.segments(row)[:-1]


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise BadRow("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRow("not JSON") from None
    if not isinstance(value, dict):
        raise BadRow("not a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise BadRow(f"not JSON: {name}")


def _fitting(sampling: Sampling, num_prompt: int, max_length: int, unit: Unit, line: Line) -> Sampling:
    """The sampling of one row: what room the prompt leaves, and a seed of its own."""
    room = max_length - num_prompt
    if room < 1:
        raise RequestError(f"prompt: {num_prompt} tokens leave no room in the {max_length} taken here")
    seed = None if sampling.seed is None else (sampling.seed << 48) ^ line.offset
    return replace(sampling, max_tokens=min(sampling.max_tokens, room), seed=seed)


def _answer(line: Line, value: dict[str, Any], num_prompt: int, parts: list[Output]) -> dict[str, Any]:
    return {
        "line": line.number,
        "input": value,
        "output": "".join(part.text for part in parts),
        "finish_reason": parts[-1].finish_reason,
        "prompt_tokens": num_prompt,
        "completion_tokens": sum(len(part.token_ids) for part in parts),
    }


def _bad(unit: Unit, line: Line, reason: str) -> dict[str, Any]:
    return {"file": unit.file, "offset": line.offset, "line": line.number, "reason": reason}


def numbered(results: Iterator[UnitResult]) -> Iterator[UnitResult]:
    """Units in order, their line numbers counted from the start of the file."""
    before = 0
    for result in results:
        for row in [*result.answered, *result.quarantined]:
            row["line"] += before
        before += result.num_lines
        yield result
