"""Supertokens against a byte-level BPE of the same size whose text is cut at words: compression and cost.

Texts: wikitext-2's validation split, tiny Shakespeare, XQuAD's paragraphs (English, German and Spanish together), and
the standard library's documentation strings; the last fifth of each is held out. Bytes per token, tokens per word and
the share of tokens that reach across words, by vocabulary size, with the default lengths of the training chunks and
with the published ones (probabilities scaled to 1); for XQuAD also by language.

Encoding: CPU seconds per million characters of one text, by its length, on one thread: the tokenizer alone, the same
with `encode_long_text` (the same ids, asserted), and the tokenizer that cuts at words.

    python benchmarks/bench_supertokens.py [FOLDER] [--picture FILE]

FOLDER holds wikitext2/valid.txt.gz, tinyshakespeare/input.txt.gz and xquad/{en,de,es}.json.gz; without it, only the
documentation strings are read.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import os
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from measure import interleaved, report, rounded

from rarezoo.tokenizer_transplant.supertokens import (
    compare_tokenizers,
    draw_comparison,
    encode_long_text,
    train_supertokens,
    train_word_tokens,
)

SIZES = (4_000, 8_000, 16_000)
LANGUAGES = ("en", "de", "es")
ENCODED_LENGTHS = (1_000, 10_000, 100_000, 1_000_000, 4_000_000)
PUBLISHED = {
    "4-5": 0.044, "6-7": 0.091, "8-9": 0.146, "10-11": 0.171, "12-13": 0.185,
    "14-15": 0.171, "16-17": 0.146, "18-19": 0.091, "20-21": 0.044, "22-23": 0.011,
}  # fmt: skip
FIGURES = ("bytes_per_token", "tokens_per_word", "multi_word_share", "lossless")


def paragraphs(path: Path) -> list[str]:
    """Of a compressed text file: articles of wikitext-2, speeches of Shakespeare."""
    text = gzip.open(path, "rt", encoding="utf-8").read()
    separator = "\n = " if "wikitext" in str(path) else "\n\n"
    return [part for part in text.split(separator) if part.strip()]


def xquad(folder: Path, language: str) -> list[str]:
    with gzip.open(folder / "xquad" / f"{language}.json.gz", "rt", encoding="utf-8") as file:
        return [paragraph["text"] for paragraph in json.load(file)["corpus"]]


def docstrings() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                yield ast.get_docstring(node) or ""


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """Four fifths to train on, one held out."""
    border = len(texts) * 4 // 5
    return texts[:border], texts[border:]


def read_corpora(folder: Path | None) -> dict[str, tuple[list[str], list[str]]]:
    documentation = {"documentation strings": halves(list(docstrings()))}
    if folder is None:
        return documentation
    languages = [halves(xquad(folder, language)) for language in LANGUAGES]
    return {
        "wikitext-2": halves(paragraphs(folder / "wikitext2" / "valid.txt.gz")),
        "tiny Shakespeare": halves(paragraphs(folder / "tinyshakespeare" / "input.txt.gz")),
        "XQuAD": tuple([text for language in languages for text in language[part]] for part in (0, 1)),
        **documentation,
    }


def trained(training: list[str], size: int) -> dict:
    """The tokenizers that are compared; few texts may give fewer tokens to some: then as few to all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = train_word_tokens(training, size)
        return {
            "words": words,
            "supertokens": train_supertokens(training, len(words)),
            "supertokens, published lengths": train_supertokens(training, len(words), chunk_lengths=PUBLISHED),
        }


def compression(corpora: dict) -> tuple[dict, dict]:
    """Figures by corpus and size; and the whole report of the first corpus's largest pair, for the picture."""
    figures: dict = {}
    pictured: dict = {}
    for corpus, (training, held_out) in corpora.items():
        for size in SIZES:
            start = time.process_time()
            tokenizers = trained(training, size)
            seconds = time.process_time() - start
            compared = compare_tokenizers(tokenizers, held_out)
            entry = {name: rounded({key: found[key] for key in FIGURES}) for name, found in compared.items()}
            gain = compared["supertokens"]["bytes_per_token"] / compared["words"]["bytes_per_token"]
            figures.setdefault(corpus, {})[str(len(tokenizers["words"]))] = {
                **entry,
                "supertokens / words, bytes per token": round(gain, 4),
                "training of all three, CPU seconds": round(seconds, 2),
            }
            if corpus == next(iter(corpora)):
                pictured = {name: compared[name] for name in ("words", "supertokens")}
            if len(tokenizers["words"]) < size:
                break
    return figures, pictured


def by_language(folder: Path) -> dict[str, dict[str, float]]:
    """One tokenizer of three languages: bytes per token in each."""
    texts = {language: halves(xquad(folder, language)) for language in LANGUAGES}
    tokenizers = trained([text for training, _ in texts.values() for text in training], 8_000)
    found = {language: compare_tokenizers(tokenizers, held_out) for language, (_, held_out) in texts.items()}
    return {
        language: rounded({name: entry["bytes_per_token"] for name, entry in figures.items()})
        for language, figures in found.items()
    }


def encoding_cost(training: list[str]) -> dict[str, dict[str, float]]:
    tokenizers = trained(training, 16_000)
    words, supertokens = tokenizers["words"], tokenizers["supertokens"]
    text = "\n\n".join(training)
    text = text * (ENCODED_LENGTHS[-1] // len(text) + 1)
    seconds = {}
    for length in ENCODED_LENGTHS:
        part = text[:length]
        assert encode_long_text(supertokens, part) == supertokens.encode(part)
        times = max(ENCODED_LENGTHS[-2] // length, 1)

        def repeated(encode, part=part, times=times):
            return lambda: [encode(part) for _ in range(times)]

        found = interleaved(
            {
                "words": repeated(words.encode),
                "supertokens": repeated(supertokens.encode),
                "supertokens, encode_long_text": repeated(lambda part: encode_long_text(supertokens, part)),
            },
            rounds=3,
        )
        scale = 1e6 / (length * times)
        seconds[f"{length:,} characters"] = rounded({name: value * scale for name, value in found.items()}, 3)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="texts, see above")
    parser.add_argument("--picture", type=Path, help="draw the first text's comparison into this file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="the probabilities of the chunk lengths")
    corpora = read_corpora(arguments.folder)
    figures, pictured = compression(corpora)
    if arguments.picture:
        draw_comparison(pictured, arguments.picture)
    results = {"held-out text, by vocabulary size": figures}
    if arguments.folder:
        results["XQuAD by language, 8,000 tokens, bytes per token"] = by_language(arguments.folder)
    training = corpora["tiny Shakespeare" if arguments.folder else "documentation strings"][0]
    results["CPU seconds per million characters of one text"] = encoding_cost(training)
    report("supertokens", __doc__.partition("\n")[0], results, packages=("tokenizers", "transformers"))


if __name__ == "__main__":
    main()
