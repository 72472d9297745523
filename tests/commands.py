"""The `rarezoo` command called in this process, and a collection for it to work on."""

import json
from pathlib import Path

from typer.testing import CliRunner

from rarezoo.cli import app


def call(*arguments, code: int = 0):
    """The result of a command that ends with this exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    problem = "" if result.exception is None or isinstance(result.exception, SystemExit) else repr(result.exception)
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{problem}"
    return result


def refused(*arguments) -> str:
    """The one line on standard error of a command that ends with exit code 2."""
    (line,) = call(*arguments, code=2).stderr.splitlines()
    assert line.startswith("rarezoo: ")
    return line


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_collection(
    folder: Path, documents: dict[str, str], queries: dict[str, str], qrels: dict[str, dict[str, int]]
) -> Path:
    """A BEIR folder."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        write_jsonl(folder / f"{name}.jsonl", ({"_id": key, "text": text} for key, text in texts.items()))
    rows = [f"{query}\t{name}\t{grade}" for query, grades in qrels.items() for name, grade in grades.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder
