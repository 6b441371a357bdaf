"""Evaluate the base and deltas on held-out questions.

Beside every delta stand the three things it has to beat: what the base says freely, the best constant answer of
the training rows, and the base choosing among the allowed answers.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftray import catalog
from ftray.config.evaluate import EvalConfig
from ftray.core.errors import DataError, DeltaError
from ftray.core.fs import write_json
from ftray.core.types import Progress, no_progress
from ftray.data import tokenise
from ftray.data.tokenise import Tokeniser
from ftray.delta.manifest import MANIFEST
from ftray.engine.api import Engine, Request, Sampling
from ftray.eval.metrics import Metric
from ftray.eval.questions import Question, Questions, answer_ids, majority, read_answers, read_questions
from ftray.eval.rank import EngineScorer, Scorer
from ftray.eval.report import BASE, CONSTANT, RANKING, Report, Result
from ftray.registry.registry import Registry


def evaluate(
    engine: Engine,
    questions: Questions,
    deltas: Sequence[str],
    metric: Metric,
    *,
    train_answers: Sequence[str] = (),
    tokeniser: Tokeniser | None = None,
    scorer: Scorer | None = None,
    max_answers: int = 64,
    max_tokens: int = 32,
    progress: Progress = no_progress,
) -> Report:
    """Ask the base and deltas the same questions, greedily, and score what they say.

    Args:
        engine: holds the base, and the deltas loaded under their names.
        questions: what to ask.
        deltas: names of the deltas to ask, besides the base.
        metric: scores an answer.
        train_answers: answers of the training rows; they give the best constant answer and the allowed answers.
            Empty: the questions' own, which flatters the constant.
        tokeniser: the base's; None: the base ranks no answers.
        scorer: ranks answers; None: the engine does.
        max_answers: with more allowed answers than these none are ranked.
        max_tokens: tokens an answer may have.
        progress: called with answers done and wanted.

    Raises:
        DataError: if no question fits the engine.
    """
    questions = _fitting(questions, engine.info.max_length - max_tokens)
    items, expected = questions.items, [question.expected for question in questions.items]
    allowed = sorted(set(train_answers or expected))
    constant = majority(train_answers or expected)
    ranks = tokeniser is not None and 2 <= len(allowed) <= max_answers
    total = len(items) * (1 + len(deltas) + ranks)
    results, notes = [], []
    for number, delta in enumerate([None, *deltas]):
        counted = _shifted(progress, number * len(items), total)
        answers, failed = generate_answers(engine, items, delta, max_tokens, counted)
        results.append(_result(delta or BASE, "generated", answers, expected, metric))
        if failed:
            notes.append(f"{delta or BASE}: {failed} requests ended in an error and count as wrong")
    results.insert(1, _result(CONSTANT, "constant", [constant] * len(items), expected, metric))
    if tokeniser is not None and ranks:
        counted = _shifted(progress, total - len(items), total)
        best = rank_answers(scorer or EngineScorer(engine), items, allowed, tokeniser, counted)
        results.insert(2, _result(RANKING, "ranked", best, expected, metric))
    elif tokeniser is not None:
        notes.append(f"no ranking: {len(allowed)} different answers; 2 to {max_answers} are ranked")
    if not train_answers:
        notes.append("no training rows: constant and allowed answers come from the test rows themselves")
    return Report(
        metric=catalog.name_of(type(metric)) or type(metric).__name__,
        expected=expected,
        results=results,
        constant=constant,
        allowed=allowed if ranks else [],
        quarantined=questions.quarantined,
        notes=notes,
    )


def evaluate_config(config: EvalConfig, progress: Progress = no_progress) -> Report:
    """Run the evaluation that a file describes, and write its report if it says where."""
    folders = delta_folders(config.deltas, config.registry)
    tok = tokenise.tokeniser(config.base)
    columns = {str(name): column for name, column in config.columns.items()}
    questions = read_questions([config.rows], tok, config.max_rows, columns)
    train_answers = read_answers([config.train_rows], columns) if config.train_rows else []
    engine = config.engine.build(config.base)
    for name, folder in folders.items():
        engine.load_delta(name, str(folder))
    report = evaluate(
        engine,
        questions,
        list(folders),
        config.metric,
        train_answers=train_answers,
        tokeniser=tok if config.rank_answers else None,
        scorer=_scorer(config) if config.rank_answers else None,
        max_answers=config.max_answers,
        max_tokens=config.max_tokens,
        progress=progress,
    )
    if config.output:
        write_json(Path(config.output), report.to_json())
    return report


def delta_folders(deltas: Sequence[str], registry: str) -> dict[str, Path]:
    """Folders of deltas by the name they get: a delta folder by its path, a reference by `name@version`.

    Raises:
        DeltaError, RegistryError: one line, for what is neither.
    """
    found: dict[str, Path] = {}
    for text in deltas:
        if (Path(text) / MANIFEST).is_file():
            found[text] = Path(text)
        elif "/" in text:
            raise DeltaError(
                f"{text}: not a delta folder ({MANIFEST} is missing); give a run's `delta` folder"
            )
        else:
            entry = Registry(registry).resolve(text)
            found[entry.ref] = entry.path
    return found


def generate_answers(
    engine: Engine, questions: Sequence[Question], delta: str | None, max_tokens: int, progress: Progress
) -> tuple[list[str], int]:
    """Greedy answers to questions under the base or a delta, and how many requests failed."""
    sampling = Sampling(max_tokens=max_tokens)
    answers = {str(number): "" for number in range(len(questions))}
    for number, question in enumerate(questions):
        engine.add(Request(id=str(number), prompt_ids=question.prompt_ids, delta=delta, sampling=sampling))
    done = failed = 0
    while engine.has_work():
        for output in engine.step():
            answers[output.id] += output.text
            done += output.finish_reason is not None
            failed += output.finish_reason == "error"
        progress(done, len(questions))
    return list(answers.values()), failed


def rank_answers(
    scorer: Scorer,
    questions: Sequence[Question],
    allowed: Sequence[str],
    tokeniser: Tokeniser,
    progress: Progress = no_progress,
    delta: str | None = None,
) -> list[str]:
    """The most likely of the allowed answers to each question."""
    best = []
    for number, question in enumerate(questions):
        scores = scorer.score(question.prompt_ids, answer_ids(question, allowed, tokeniser), delta)
        best.append(allowed[max(range(len(allowed)), key=scores.__getitem__)])
        progress(number + 1, len(questions))
    return best


def _scorer(config: EvalConfig) -> Scorer | None:
    """A scorer that computes each prompt once, for engines whose base is a plain model folder."""
    from ftray.engine.hf_generate import HFGenerateConfig
    from ftray.engine.torch_engine import TorchEngineConfig
    from ftray.eval.rank import load_scorer

    if not isinstance(config.engine, TorchEngineConfig | HFGenerateConfig):
        return None
    return load_scorer(config.base, dtype=config.engine.dtype, device=config.engine.device)


def _fitting(questions: Questions, max_prompt_tokens: int) -> Questions:
    """Move questions that are too long for the engine to the quarantined rows."""
    fit = [question for question in questions.items if len(question.prompt_ids) <= max_prompt_tokens]
    reason = f"its prompt has more than the {max_prompt_tokens} tokens that leave room for an answer"
    long = [
        {"file": question.file, "offset": question.offset, "reason": reason}
        for question in questions.items
        if len(question.prompt_ids) > max_prompt_tokens
    ]
    if not fit:
        raise DataError(f"no row can be asked: {reason}; lower `max_tokens` or shorten the rows")
    return replace(questions, items=fit, quarantined=[*questions.quarantined, *long])


def _result(model: str, how: Any, answers: list[str], expected: list[str], metric: Metric) -> Result:
    scores = [metric.score(answer, right) for answer, right in zip(answers, expected, strict=True)]
    return Result(model, how, answers, scores)


def _shifted(progress: Progress, start: int, total: int) -> Progress:
    return lambda done, _: progress(start + done, total)
