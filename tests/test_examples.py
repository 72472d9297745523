"""Every script in examples/ runs, on texts small enough for a test."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SUBJECTS = "paris berlin rome jupiter saturn bees honey hamlet photosynthesis coffee tea rivers".split()
# Script -> command lines, and what each must print.
RUNS = {
    "train_mistral_splade.py": [
        (
            ["pairs.jsonl", "small", "--steps", "2", "--held-out", "2"],
            r"nDCG@10 of 2 held-out .* 12 documents: [01]\.\d",
        ),
        (["pairs.jsonl", "tuned", "--steps", "1", "--held-out", "2", "--model", "small"], r"1 steps .*: loss \d"),
    ],
}


def test_every_example_has_runs():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [{"query": f"what about {word}", "positive": f"This text is about {word}."} for word in SUBJECTS]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for arguments, expected in RUNS[name]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert re.search(expected, capsys.readouterr().out)
