"""Survey the Python files of the standard library: one durable execution a file, and one for the whole.

`make demo` has two workers do it, and kills one. A run that is lost with its worker is run again by the other one,
which goes on after the last step that was saved. `python examples/demo_tasks.py` is a worker.
"""

import asyncio
import io
import tokenize
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pgconductor import Conductor, Context, Orchestrator, RetryPolicy, SyncContext

app = Conductor(name="demo")


@dataclass
class Measured:
    path: str
    lines: int
    tokens: int
    functions: int
    longest_line: int


@dataclass
class Survey:
    paths: list[str]
    lines: int
    tokens: int
    functions: int
    longest_line: int
    largest: list[Measured]


@app.task(max_attempts=2)
def measure_file(ctx: SyncContext, path: str) -> Measured:
    """Measure one file. A plain function: it runs in a thread."""
    source = ctx.step("read", read, path)
    kinds = ctx.step("tokenize", count_tokens, source)
    return ctx.step("measure", measure, path, source, kinds)


@app.task(max_attempts=5, retry=RetryPolicy(first=0.5, factor=2))
async def proofread(ctx: Context, survey: Survey) -> str:
    """Check a survey with an office that does not answer the first two times."""
    return await ctx.step("ask", ask_the_office, survey.lines, ctx.attempt)


@app.task(max_attempts=1)
async def survey_library(ctx: Context, root: str) -> Survey:
    """Survey every file below a directory. While it waits it holds no slot, no thread and no connection."""
    paths = await ctx.step("list", python_files, root)
    files = await ctx.invoke_all("files", [measure_file.bind(path) for path in paths], timeout="5m")
    survey = await ctx.step("aggregate", aggregate, files)
    await ctx.sleep("let it settle", "2s")
    await ctx.invoke("proofread", proofread.bind(survey), timeout="1m")
    return survey


# What the steps do: ordinary functions, which know nothing of pgconductor.


def python_files(root: str) -> list[str]:
    """List the Python files of a standard library, its tests and what a step could not hold aside."""
    apart = {"site-packages", "dist-packages", "test"}
    found = (path for path in Path(root).rglob("*.py") if not apart & set(path.relative_to(root).parts))
    return sorted(str(path) for path in found if path.stat().st_size < 900_000)


def read(path: str) -> str:
    """Return a file's text, decoded as the file itself says."""
    with tokenize.open(path) as file:
        return file.read()


def count_tokens(source: str) -> dict[str, int]:
    """Count the tokens by kind, and the word `def`."""
    kinds: Counter[str] = Counter()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kinds["def" if token.string == "def" else tokenize.tok_name[token.type]] += 1
    return dict(kinds)


def measure(path: str, source: str, kinds: dict[str, int]) -> Measured:
    """Put the figures of a file together."""
    lengths = [len(line) for line in source.splitlines()]
    return Measured(path, len(lengths), sum(kinds.values()), kinds.get("def", 0), max(lengths, default=0))


def aggregate(files: list[Measured]) -> Survey:
    """Add the files up."""
    return Survey(
        paths=[file.path for file in files],
        lines=sum(file.lines for file in files),
        tokens=sum(file.tokens for file in files),
        functions=sum(file.functions for file in files),
        longest_line=max((file.longest_line for file in files), default=0),
        largest=sorted(files, key=lambda file: file.lines, reverse=True)[:5],
    )


def ask_the_office(lines: int, attempt: int) -> str:
    """Fail the first two times, as the network does."""
    if attempt < 3:
        raise ConnectionError(f"the office does not answer (attempt {attempt})")
    return f"{lines:,} lines, and no objections"


async def main() -> None:
    """Run a worker until it is told to stop."""
    async with Orchestrator(app, concurrency=4) as worker:
        await worker.stopped


if __name__ == "__main__":
    asyncio.run(main())
