"""Harvest the standard library of this Python into JSON lines: a base's pre-training text and two small tasks.

    python harvest.py --out corpus

writes `pretrain.jsonl` and `pretrain-validation.jsonl` (`{"text": ...}`), and for each of the tasks `raises`
(name the exception a function raises) and `describe` (describe a signature in a sentence) a folder with
`train.jsonl`, `validation.jsonl` and `test.jsonl` (`{"messages": [...]}`).

What is held out is decided by a hash of a function's body without its literals, layout and case, so that copies
fall on one side. A held-out function is in no training row and in no pre-training text, and neither is any other
function whose code contains what a held-out row shows.
"""

import argparse
import ast
import copy
import hashlib
import json
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from textwrap import indent

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
SKIPPED |= {"pydoc_data", "lib2to3", "turtledemo"}

ELLIPSIS = "..."
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)

# As `ast.unparse` writes them: a string is on one line unless it is in triple quotes.
_STRING = re.compile(
    r'''(?<!\w)[rbfu]{0,2}(""".*?"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')''', re.DOTALL | re.IGNORECASE
)
_NUMBER = re.compile(r"\b\d[\w.]*")

MAX_PRETRAIN_CHARS = 6000
MAX_CODE_CHARS = 420
MAX_DESCRIBED_CHARS = 220
DISTINCT_CHARS = 40
TEST_SHARE, VALIDATION_SHARE = 0.20, 0.10
TEST_ROWS, VALIDATION_ROWS, TRAIN_ROWS = 220, 150, 3000
MAX_ROWS_PER_ANSWER = 450
EXCEPTIONS = ("ValueError", "TypeError", "NotImplementedError", "RuntimeError", "KeyError")
EXCEPTIONS += ("AttributeError", "OSError", "ImportError")
COUNTS = ("no parameters", "one parameter", "two parameters")


@dataclass(frozen=True)
class Function:
    """A function of a module or a method of a class; what is nested in it belongs to it."""

    node: FunctionNode
    is_method: bool

    @cached_property
    def text(self) -> str:
        """Its source with the docstring, in uniform layout."""
        return ast.unparse(self.node)

    @cached_property
    def code(self) -> str:
        """Its source without docstring and decorators: what a task shows."""
        node = copy.copy(self.node)
        node.body, node.decorator_list = without_docstring(node.body), []
        return ast.unparse(node)

    @property
    def header(self) -> str:
        """The line with its name and parameters."""
        return self.code.partition("\n")[0]

    @cached_property
    def skeleton(self) -> str:
        """Its whole code as it is compared."""
        return skeleton(self.code)

    @cached_property
    def content(self) -> str:
        """What makes it the function it is."""
        return distinct(self.code)

    @cached_property
    def split(self) -> str:
        """`train`, `validation` or `test`, by content; what is too short to be anybody's own is `train`."""
        share = fraction(self.content) if len(self.content) >= DISTINCT_CHARS else 1.0
        if share < TEST_SHARE:
            return "test"
        return "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


def skeleton(code: str) -> str:
    """Code without literals, layout and case, for comparing."""
    return " ".join(_NUMBER.sub("0", _STRING.sub("0", code)).lower().split())


def distinct(code: str) -> str:
    """The skeleton of a function's body, with its header where the body alone is too short to tell it apart."""
    _, _, body = code.partition("\n")
    shown = skeleton(body.removeprefix(f"    {ELLIPSIS}\n"))
    return shown if len(shown) >= DISTINCT_CHARS else skeleton(code)


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements without a leading docstring."""
    first = body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    if is_docstring and isinstance(first.value.value, str):  # type: ignore[attr-defined]
        return body[1:] or [ast.Pass()]
    return body


def parse_modules(root: Path) -> Iterator[ast.Module]:
    """The syntax trees of the library's modules; those this Python cannot parse are left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in SKIPPED or part.startswith("config-") for part in parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
                module = ast.parse(path.read_text("utf-8"))
        except (
            SyntaxError,
            ValueError,
            RecursionError,
        ):  # fixtures of the library with wrong code on purpose
            continue
        yield module


def functions_of(node: ast.AST, is_class: bool = False) -> Iterator[Function]:
    """Functions and methods below a node, not those nested in other functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(child, is_class)
        elif isinstance(child, ast.ClassDef):
            yield from functions_of(child, is_class=True)
        else:
            yield from functions_of(child, is_class)


def prose_of(module: ast.Module) -> Iterator[str]:
    """Docstrings of a module and of its classes, these below their headers; no function's code."""
    if text := ast.get_docstring(module):
        yield text
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and (text := ast.get_docstring(node)):
            header = copy.copy(node)
            header.body, header.decorator_list = node.body[:1], []
            yield ast.unparse(header)


@dataclass(frozen=True)
class Example:
    """Code to ask about, and the answer."""

    function: Function
    code: str
    answer: str

    @cached_property
    def content(self) -> str:
        """What the code shows, as it is compared."""
        return distinct(self.code)


def own_nodes(statements: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Nodes of statements, but not of the functions and classes defined in them."""
    waiting: list[ast.AST] = list(statements)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, _SCOPES):
            waiting.extend(ast.iter_child_nodes(node))


def raised(statements: Iterable[ast.stmt]) -> set[str]:
    """Names of the exceptions raised in statements; `?` where one cannot be named."""
    names = set()
    for node in own_nodes(statements):
        if isinstance(node, ast.Raise):
            exception = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            names.add(ast.unparse(exception).split(".")[-1] if exception else "?")
    return names


def raises(function: Function) -> Iterator[Example]:
    """Excerpts of a function that raise one exception, or a function that raises none."""
    block = without_docstring(function.node.body)
    if not raised(block):
        if len(function.code) <= MAX_CODE_CHARS:
            yield Example(function, function.code, "none")
        return
    for code, exception in excerpts(function.header, block, cut=False):
        if exception in EXCEPTIONS:
            yield Example(function, code, exception)


def excerpts(header: str, block: list[ast.stmt], *, cut: bool) -> Iterator[tuple[str, str]]:
    """Runs of a block's statements, each ending in one that raises, with the one exception they raise.

    A run reaches back as far as `MAX_CODE_CHARS` allows; `...` stands for what came before it. A statement
    that is too long or raises several exceptions is entered.
    """
    texts = [indent(ast.unparse(statement), "    ") for statement in block]
    start = 0
    for stop, statement in enumerate(block, 1):
        names = raised([statement])
        if not names:
            continue
        runs = (assemble(header, texts[first:stop], cut or first > 0) for first in range(start, stop))
        code = next((run for run in runs if len(run) <= MAX_CODE_CHARS), None)
        start = stop
        if code and len(names) == 1:
            yield code, names.pop()
        else:
            for inner in inner_blocks(statement):
                yield from excerpts(header, inner, cut=True)


def assemble(header: str, texts: list[str], cut: bool) -> str:
    """A function's code from its header and some of its statements."""
    return "\n".join([header, *([f"    {ELLIPSIS}"] if cut else []), *texts])


def inner_blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The blocks of a compound statement, not those of functions and classes."""
    if isinstance(statement, _SCOPES):
        return
    for name in ("body", "orelse", "finalbody"):
        if block := getattr(statement, name, None):
            yield block
    for part in [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]:
        yield part.body


def describe(function: Function) -> Iterator[Example]:
    """A short function and a sentence on its kind, its parameters and what it gives back."""
    if len(function.code) > MAX_DESCRIBED_CHARS or len(function.content) < DISTINCT_CHARS:
        return
    arguments = function.node.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    count = sum(name not in ("self", "cls") for name in names)
    count += (arguments.vararg is not None) + (arguments.kwarg is not None)
    parameters = COUNTS[count] if count < len(COUNTS) else "several parameters"
    kind = "method" if function.is_method else "function"
    answer = f"A {kind} with {parameters}. It {gives(function)}."
    yield Example(function, function.code, answer)


def gives(function: Function) -> str:
    """What a call of the function gives back."""
    nodes = list(own_nodes(without_docstring(function.node.body)))
    if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes):
        return "yields values"
    values = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
    return "returns a value" if any(ast.unparse(value) != "None" for value in values) else "returns nothing"


TASKS: dict[str, tuple[str, Callable[[Function], Iterator[Example]]]] = {
    "raises": ("# raises", raises),
    "describe": ("# In words", describe),
}
"""Task -> the line that ends the question, and the examples a function gives."""


def harvest(root: Path = STANDARD_LIBRARY) -> dict[str, list[dict]]:
    """All files by relative path, as lists of rows."""
    found: dict[str, Function] = {}
    prose: dict[str, None] = {}
    for module in parse_modules(root):
        prose.update(dict.fromkeys(prose_of(module)))
        for function in functions_of(module):
            found.setdefault(function.code, function)
    examples = {
        task: [example for function in found.values() for example in examples_of(function)]
        for task, (_, examples_of) in TASKS.items()
    }
    sides = separate(found.values(), [example for task in examples.values() for example in task])
    texts = [*(function.text for function in sides["train"]), *prose]
    watched = [f.text for f in sides["validation"] if len(f.text) <= MAX_PRETRAIN_CHARS]
    files: dict[str, list[dict]] = {
        "pretrain.jsonl": [{"text": text[:MAX_PRETRAIN_CHARS]} for text in texts],
        "pretrain-validation.jsonl": [{"text": text} for text in watched[:VALIDATION_ROWS]],
    }
    for task, (marker, _) in TASKS.items():
        for split, limit in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS), ("test", TEST_ROWS)):
            members = set(map(id, sides[split]))
            rows = balanced((e for e in examples[task] if id(e.function) in members), limit)
            files[f"{task}/{split}.jsonl"] = [chat(f"{row.code}\n{marker}", row.answer) for row in rows]
    return files


def separate(functions: Iterable[Function], examples: Iterable[Example]) -> dict[str, list[Function]]:
    """Functions by split; those of the first sides hold no content of a function or example of the later ones."""
    contents: dict[str, set[str]] = defaultdict(set)
    for item in [*functions, *examples]:
        split = item.split if isinstance(item, Function) else item.function.split
        if len(item.content) >= DISTINCT_CHARS:
            contents[split].add(item.content)
    sides: dict[str, list[Function]] = {}
    held_out: set[str] = set()
    for split in ("test", "validation", "train"):
        index = starts_of(held_out)
        sides[split] = [f for f in functions if f.split == split and not contains(f.skeleton, index)]
        held_out |= contents[split]
    return sides


def balanced(examples: Iterable[Example], limit: int) -> list[Example]:
    """At most `limit` examples, the answers in turn, in an order that depends on content alone.

    No answer has more than `MAX_ROWS_PER_ANSWER`.
    """
    by_answer: dict[str, dict[str, Example]] = defaultdict(dict)
    for example in sorted(examples, key=lambda example: (fraction(example.code), example.code)):
        if len(example.content) >= DISTINCT_CHARS:
            by_answer[example.answer].setdefault(example.content, example)
    rows = [list(by_answer[answer].values())[:MAX_ROWS_PER_ANSWER] for answer in sorted(by_answer)]
    turns = zip_longest(*rows)
    return [example for turn in turns for example in turn if example is not None][:limit]


def chat(question: str, answer: str) -> dict:
    """One exchange as a row."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def starts_of(contents: Iterable[str]) -> dict[str, set[str]]:
    """Contents by their first characters, to find them in longer texts."""
    index = defaultdict(set)
    for content in contents:
        index[content[:DISTINCT_CHARS]].add(content)
    return index


def contains(text: str, index: dict[str, set[str]]) -> bool:
    """True if one of the indexed contents stands in the text."""
    return any(
        text.startswith(content, position)
        for position in range(len(text))
        for content in index.get(text[position : position + DISTINCT_CHARS], ())
    )


def main() -> None:
    """Write the files and print a table of what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--root", type=Path, default=STANDARD_LIBRARY, help="folder of Python modules")
    arguments = parser.parse_args()
    print(f"{'file':<28}{'rows':>8}{'characters':>13}   most frequent answer")
    for name, rows in harvest(arguments.root).items():
        path = arguments.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), "utf-8")
        answers = Counter(row["messages"][-1]["content"] for row in rows if "messages" in row)
        common = "".join(f"{answer} ({count}x)" for answer, count in answers.most_common(1))
        print(f"{name:<28}{len(rows):>8}{sum(map(len, lines)):>13}   {common}")


if __name__ == "__main__":
    main()
