"""The documentation says what happens: every code block of README.md and docs/ is executed and its output compared.

How a page is read:

- A ```python block runs in the page's own folder; all of a page share one namespace. A ```text block right after it is
  what it prints.
- In a ```console block, lines that begin with `$ ` are commands (a trailing backslash continues them), the others what
  they print on standard output. A command without lines below it only has to succeed.
- `…` in an expected output stands for anything, on a line of its own for any lines.
- `<!-- no-test: reason -->` before a block leaves it out. `<!-- file: name -->` before a block of any language writes
  it to that file. `<!-- tolerance: 0.05 -->` before a block lets the numbers in its output differ by that share.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = ("python", "console")
SHELL = ("bash", "sh", "shell", "zsh")
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?"


@dataclass(frozen=True)
class Block:
    """A fenced block, with the comments that stand right before it."""

    line: int
    language: str
    text: str
    comments: dict[str, str]
    output: str | None = None


def read_blocks(page: str) -> list[Block]:
    blocks: list[Block] = []
    comments: dict[str, str] = {}
    lines = iter(enumerate(page.splitlines(), 1))
    adjacent = False
    for number, line in lines:
        if comment := re.fullmatch(r"<!--\s*(no-test|file|tolerance):\s*(.+?)\s*-->", line.strip()):
            comments[comment[1]] = comment[2]
        elif fence := re.fullmatch(r"(\s*)(`{3,})(\S*).*", line):
            body = []
            for _, inner in lines:
                if inner.strip() == fence[2]:
                    break
                body.append(inner.removeprefix(fence[1]))
            block = Block(number, fence[3], "\n".join(body), comments)
            if block.language == "text" and adjacent and blocks[-1].language == "python":
                before = blocks[-1]
                blocks[-1] = Block(
                    before.line, before.language, before.text, {**before.comments, **comments}, block.text
                )
            else:
                blocks.append(block)
            comments, adjacent = {}, True
        elif line.strip():
            comments, adjacent = {}, False
    return blocks


def read_commands(block: Block) -> list[tuple[str, str]]:
    """(command, expected output) of a console block."""
    commands: list[tuple[str, list[str]]] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command = command[:-1] + next(lines).lstrip("> ")
            commands.append((command, []))
        else:
            assert commands, f"a console block begins with a command after `$ `; found {line!r}"
            commands[-1][1].append(line)
    return [(command, "\n".join(output)) for command, output in commands]


def pattern_of(expected: str, numbers_vary: bool) -> str:
    """A regular expression that an output must match; with `numbers_vary` every number is a group."""
    parts = []
    for line in expected.rstrip().splitlines():
        if line.strip() == "…":
            parts.append(r"(?:[^\n]*\n)*?")
            continue
        pieces = re.split(f"({NUMBER})", line.rstrip()) if numbers_vary else [line.rstrip()]
        texts = [
            f"({NUMBER})" if position % 2 else ".*?".join(re.escape(part) for part in piece.split("…"))
            for position, piece in enumerate(pieces)
        ]
        # Columns may move when numbers change their width.
        parts.append(re.sub(r"(?:\\ )+", lambda _: r" +" if numbers_vary else _[0], "".join(texts)) + r"\n")
    return "".join(parts)


def check_output(expected: str, found: str, tolerance: str | None) -> None:
    found = "".join(f"{line.rstrip()}\n" for line in found.rstrip().splitlines())
    match = re.fullmatch(pattern_of(expected, tolerance is not None), found)
    assert match, f"expected:\n{expected}\n\nfound:\n{found}"
    if tolerance is not None:
        kept = "\n".join(line for line in expected.splitlines() if line.strip() != "…")
        for shown, printed in zip(re.findall(NUMBER, kept), match.groups(), strict=True):
            values = [float(text.replace(",", "")) for text in (shown, printed)]
            assert values[1] == pytest.approx(values[0], rel=float(tolerance), abs=float(tolerance)), found


def run_command(command: str) -> str:
    """Standard output of a command; `rarezoo` runs in this process, which has the libraries loaded already."""
    words = shlex.split(command)
    if words[0] == "rarezoo" and not set("|<>;&") & set(command):
        from typer.testing import CliRunner

        from rarezoo.cli import app

        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"$ {command}\n{result.output}\n{result.exception!r}"
        return result.stdout
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    finished = subprocess.run(["bash", "-ec", command], env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, f"$ {command}\n{finished.stdout}{finished.stderr}"
    return finished.stdout


def run_block(block: Block, namespace: dict) -> None:
    tolerance = block.comments.get("tolerance")
    if block.language == "console":
        for command, expected in read_commands(block):
            found = run_command(command)
            if expected.strip():
                check_output(expected, found, tolerance)
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, f"<line {block.line}>", "exec"), namespace)
    if block.output is not None:
        check_output(block.output, printed.getvalue(), tolerance)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_blocks_do_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for block in read_blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}, line {block.line}"
        if "no-test" in block.comments:
            continue
        assert block.language not in SHELL, f"{where}: write a console block, or say why it is not run"
        if "file" in block.comments:
            path = tmp_path / block.comments["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n", encoding="utf-8")
        elif block.language in RUNNABLE:
            try:
                run_block(block, namespace)
            except Exception as error:
                raise AssertionError(f"{where}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def numbers_in(value) -> list[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers_in(part)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_figures_are_those_of_the_benchmarks():
    """A row of the README's table of figures names its script; each of its bold numbers is in that script's output."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|(.*)\|[^|]*`benchmarks/bench_(\w+)\.py`[^|]*\|$", readme, re.MULTILINE)
    assert {script for _, script in rows} == {
        path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")
    }
    for row, script in rows:
        measured = numbers_in(json.loads((ROOT / "benchmarks" / "results" / f"{script}.json").read_text())["figures"])
        shown = re.findall(r"\*\*([\d.]+)", row)
        assert shown, row
        for text in shown:
            digits = len(text.partition(".")[2])
            assert any(f"{abs(number):.{digits}f}" == text for number in measured), (
                f"{text} is not a result of {script}: {row}"
            )


def test_the_site_builds(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    built = {path.parent.name for path in (tmp_path / "site").rglob("index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= built
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in page


# --- the reader itself ------------------------------------------------------------------------------------------------

_PAGE = """
A page.

```python
print("one", 1)
```

```text
one 1
```

<!-- no-test: no such host -->
```bash
curl example
```

```text
not an output
```

<!-- tolerance: 0.1 -->
```console
$ echo first \\
    line 1.00
first line 1.05
$ true
```
"""


def test_reading_a_page():
    python, skipped, text, console = read_blocks(_PAGE)
    assert (python.text, python.output, python.line) == ('print("one", 1)', "one 1", 4)
    assert skipped.comments == {"no-test": "no such host"}
    assert (text.language, text.output) == ("text", None)
    assert read_commands(console) == [("echo first line 1.00", "first line 1.05"), ("true", "")]
    run_block(console, {})


@pytest.mark.parametrize(
    ("expected", "found", "tolerance", "equal"),
    [
        ("a 1.00", "a 1.00\n", None, True),
        ("a 1.00", "a 1.01\n", None, False),
        ("a 1.00", "a 1.01\n", "0.02", True),
        ("a 1.00", "a 1.10\n", "0.02", False),
        ("a 1.00", "b 1.00\n", "0.02", False),
        ("a\n…\nz", "a\nb\nc\nz\n", None, True),
        ("a\n…\nz", "a\nz\n", None, True),
        ("a\n…\nz", "a\nb\n", None, False),
        ("took … seconds", "took 12.5 seconds\n", None, True),
        ("took … seconds", "took 12.5 hours\n", None, False),
        ("1,234 rows", "1,250 rows\n", "0.05", True),
        ("a", "a\nb\n", None, False),
        ("a  \n", "a\n\n", None, True),
    ],
)
def test_comparing_outputs(expected, found, tolerance, equal):
    if equal:
        check_output(expected, found, tolerance)
    else:
        with pytest.raises(AssertionError):
            check_output(expected, found, tolerance)


def test_a_wrong_page_fails(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 1"):
        test_code_blocks_do_what_the_page_says(page, tmp_path, monkeypatch)
