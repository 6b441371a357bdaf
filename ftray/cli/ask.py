"""The same questions to the base and both deltas at once, through the official client."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ftray.cli.screen import out

QUESTIONS_PER_TASK = 2


def ask_all(url: str, keys: dict[str, str], tenants: dict[str, str], corpus: Path) -> str:
    """Ask every model every question concurrently and print the answers side by side; returns a summary.

    Args:
        url: the endpoint, without `/v1`.
        keys: delta name -> API key of its tenant.
        tenants: delta name -> name of its tenant.
        corpus: folder with `<delta>/test.jsonl`.
    """
    from openai import NotFoundError, OpenAI

    clients = {name: OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for name, key in keys.items()}
    questions = [(row, name) for name in keys for row in _rows(corpus / name / "test.jsonl")]
    models = {"base": clients[next(iter(keys))], **clients}

    def ask(model: str, row: dict[str, Any]) -> str:
        reply = models[model].chat.completions.create(
            model=model, messages=row["messages"][:-1], max_tokens=24, temperature=0.0
        )
        return (reply.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(len(questions) * len(models)) as pool:
        futures = [[pool.submit(ask, model, row) for model in models] for row, _ in questions]
        answers = [[future.result() for future in row] for row in futures]
    table = Table(title="the same questions, in one batch", show_lines=True)
    for column in ("question", "expected", *models):
        table.add_column(column, overflow="fold")
    for (row, _), replies in zip(questions, answers, strict=True):
        *_, user, expected = row["messages"]
        cells = [_short(user["content"], 220), expected["content"], *(_short(reply, 60) for reply in replies)]
        table.add_row(*(Text(cell) for cell in cells))  # code holds brackets, which are no markup
    out.print(table)
    first, second = keys
    try:
        clients[first].chat.completions.create(model=second, messages=[{"role": "user", "content": "?"}])
    except NotFoundError:
        refused = f"{tenants[first]} asking for `{second}` gets a 404"
    else:
        raise AssertionError(f"{tenants[first]} was answered by {second}")
    return f"{len(questions) * len(models)} answers; {refused}"


def curl_lines(url: str, keys: dict[str, str]) -> list[str]:
    """Lines to try by hand, one for each delta, with its tenant's key."""
    function = "def check(x):\\n    if x < 0:\\n        raise ValueError(x)\\n    return x"
    markers = {"raises": "# raises", "describe": "# In words"}
    lines = ["try it by hand (with --keep-serving):"]
    for name, key in keys.items():
        message = {"role": "user", "content": function.replace("\\n", "\n") + f"\n{markers[name]}"}
        body = json.dumps({"model": name, "messages": [message], "max_tokens": 24})
        lines.append(
            f"curl -s {url}/v1/chat/completions -H 'authorization: Bearer {key}' "
            f"-H 'content-type: application/json' -d '{body}'"
        )
    return lines


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    short = [row for row in rows if len(row["messages"][0]["content"]) < 200]
    return short[:QUESTIONS_PER_TASK]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
