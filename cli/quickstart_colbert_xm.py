"""The ColBERT-XM tour: learn to find English messages by their translations, save, load, index, ask, add a language,
quantize."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import typer
from transformers.utils import logging

from rarezoo.cli.multilingual_collection import Collection, FurtherLanguage, collect_documentation, collect_messages
from rarezoo.cli.quickstart_stations import (
    QualityCurve,
    claim_folder,
    encode_without_rarezoo,
    finish,
    quantize_and_show,
    rank_with_bm25,
    read_losses,
    search_command,
    shortened,
    show,
    title,
    write_corpus,
)

DOCUMENTS = 2000
QUESTIONS = 200
STEPS = 150
LANGUAGE_STEPS = 60
ANSWERS_SHOWN = 3
_FOLDERS = ("model", "tokenizer", "index", "index-2-bit", "embeddings", "quantized")
_MATCHES_SHOWN = 6


def run(
    output: Path,
    documents: int = DOCUMENTS,
    questions: int = QUESTIONS,
    steps: int = STEPS,
    language_steps: int = LANGUAGE_STEPS,
    seed: int = 0,
    locale_folders: list[Path] | None = None,
) -> dict[str, Any]:
    """Run the tour and return its figures.

    Args:
        output: folder for the checkpoint, the indexes, the quantized copies and the picture: new, empty, or that of an
            earlier tour, which is replaced.
        documents: texts to search in.
        questions: held-out queries per language.
        steps: optimiser steps.
        language_steps: optimiser steps of the further language's adapter.
        seed: of the split and of the training.
        locale_folders: where the message catalogues are; None looks in the standard folders.

    Raises:
        FileExistsError: the folder holds something else.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of loading and saving, a moment each
    started = time.perf_counter()
    claim_folder(output, _FOLDERS)
    title("1. Real text on this machine, in several languages")
    collection = collect_messages(documents, questions, seed, locale_folders)
    if collection is None:
        typer.echo("Too few translated messages are installed here: documentation strings instead, in English alone.")
        collection = collect_documentation(documents, questions, seed)
    tour = _Tour(output, collection, seed)
    tour.train(steps)
    tour.load_without_rarezoo()
    tour.build_indexes()
    tour.answer()
    if collection.further is not None:
        tour.add_language(collection.further, language_steps)
    tour.quantize()
    tour.draw()
    language, asked = tour.example
    finish(output, tour.figures, started, search_command(output, f'"{asked}" --language {language}'))
    return tour.figures


class _Tour:
    """The stations of the tour; `figures` collects what they measured."""

    def __init__(self, output: Path, collection: Collection, seed: int):
        self.output = output
        self.model_folder = output / "model"
        self.collection = collection
        self.seed = seed
        self.languages = list(collection.questions)
        self.names = list(collection.documents)
        asked = sum(map(len, collection.questions.values()))
        self.figures: dict[str, Any] = {
            "languages": self.languages,
            "documents": len(self.names),
            "held-out queries": asked,
            "training pairs": len(collection.training_rows),
        }
        what = "documentation strings: the first sentence asks, the rest answers"
        if len(self.languages) > 1:
            what = f"English messages of programs; their translations ask, in {', '.join(self.languages)}"
        typer.echo(f"{len(self.names):,} {what}.")
        typer.echo(f"{asked:,} queries are held out; {len(collection.training_rows):,} other pairs are there to learn.")
        language = self.languages[0]
        name, question = next(iter(collection.questions[language].items()))
        show("query", question)
        show("answer", collection.documents[name])

    @property
    def example(self) -> tuple[str, str]:
        """A language, and a short question in it that needs no quoting."""
        language = self.languages[0]
        return language, min((text for _, text in self._plain_questions(language)), key=len)

    def _plain_questions(self, language: str) -> list[tuple[str, str]]:
        """(document id, question) of those made of words; of all, where there are none."""
        questions = list(self.collection.questions[language].items())
        plain = [
            pair
            for pair in questions
            if all(c.isalpha() or c in " ,.'\N{RIGHT SINGLE QUOTATION MARK}" for c in pair[1])
        ]
        return plain or questions

    def train(self, steps: int) -> None:
        """From nothing but the texts: a tokenizer, weights that match words by their rarity, then training."""
        from transformers import AutoModel, AutoProcessor

        from rarezoo.training import LateInteractionRecipe, train

        title("2. Train a small ColBERT-XM on it")
        recipe = LateInteractionRecipe.small_from_scratch(
            tokenizer=str(self._train_tokenizer()),
            processor={"max_query_length": 32, "max_document_length": 48},
            max_steps=steps,
            # The vectors of translations begin at right angles and have a long way to go.
            learning_rate=3e-3,
            logging_steps=5,
            seed=self.seed,
        )
        if len(self.languages) > 1:
            recipe.config["languages"] = self.collection.languages
        bm25 = {language: self._bm25(questions) for language, questions in self.collection.questions.items()}
        logging.enable_progress_bar()
        curve = QualityCurve(self.evaluate, every=max(steps // 3, 1))
        result = train(recipe, self.model_folder, rows=self.collection.training_rows, callbacks=[curve])
        logging.disable_progress_bar()
        self.model = AutoModel.from_pretrained(self.model_folder)
        self.processor = AutoProcessor.from_pretrained(self.model_folder)
        self.history, self.curve = read_losses(self.model_folder), curve.points
        self.figures["nDCG@10"] = {"before": self.curve[0][1], "after": self.curve[-1][1], "BM25": _with_mean(bm25)}
        typer.echo(
            f"{self.model.num_parameters():,} weights, {len(self.processor.tokenizer):,} tokens; {steps} steps of "
            f"{recipe.batch_size} pairs in {result['train_runtime']:.0f} s, measurements included"
        )
        typer.echo(f"{'nDCG@10':16} {'before training':>15} {'after':>8} {'BM25':>8}")
        for language in (*self.languages, "mean"):
            before, after, words = (values[language] for values in self.figures["nDCG@10"].values())
            typer.echo(f"{language:16} {before:15.3f} {after:8.3f} {words:8.3f}")
        typer.echo(f"saved to {self.model_folder}")

    def _train_tokenizer(self) -> Path:
        """Of all languages, the one that is added later too: as XLM-R's, it knows more words than the model learns."""
        from rarezoo.training import train_xlm_r_tokenizer

        rows = self.collection.training_rows
        texts = [row["query"] for row in rows] + list(dict.fromkeys(row["positive"] for row in rows))
        if self.collection.further is not None:
            texts += self.collection.further.texts
        train_xlm_r_tokenizer(texts, vocabulary_size=8192).save_pretrained(self.output / "tokenizer")
        return self.output / "tokenizer"

    def evaluate(self, model: Any, processor: Any) -> dict[str, float]:
        """nDCG@10 of the held-out queries over all documents, by language, and the mean of the languages."""
        documents = self._encode_documents(model, processor)
        return _with_mean(
            {
                language: self._quality(model, processor, documents, questions, language)
                for language, questions in self.collection.questions.items()
            }
        )

    def _encode_documents(self, model: Any, processor: Any) -> list[Any]:
        texts = list(self.collection.documents.values())
        return model.encode_documents(texts, processor, language="en", batch_size=64)

    def _quality(
        self, model: Any, processor: Any, documents: list[Any], questions: Mapping[str, str], language: Any
    ) -> float:
        queries = model.encode_queries(list(questions.values()), processor, language=language, batch_size=64)
        best = model.score(queries, documents).topk(min(10, len(documents)))
        return _ndcg(
            {
                name: {self.names[i]: score for i, score in zip(places, scores)}
                for name, places, scores in zip(questions, best.indices.tolist(), best.values.tolist())
            }
        )

    def _bm25(self, questions: Mapping[str, str]) -> float:
        return _ndcg(rank_with_bm25(self.collection.documents, questions))

    def load_without_rarezoo(self) -> None:
        title("3. Load it in a process that has never heard of rarezoo, whole and with some languages only")
        language, kept = self.languages[-1], list(dict.fromkeys(["en", self.languages[-1]]))
        question = next(iter(self.collection.questions[language].values()))
        loadings: list[dict[str, Any]] = [{}, {"languages": kept}]
        whole, pruned = encode_without_rarezoo(self.model_folder, question, {"language": language}, loadings)
        (here,) = self.model.encode_queries([question], self.processor, language=language)
        self.figures["same vectors without rarezoo"] = whole["vectors"] == here.tolist()
        self.figures["same vectors with some languages"] = pruned["vectors"] == here.tolist()
        self.figures["weights"] = {"bytes": whole["bytes"], "bytes with some languages": pruned["bytes"]}
        for there, arguments in ((whole, ""), (pruned, f", languages={kept}")):
            same = there["vectors"] == here.tolist()
            typer.echo(f"AutoModel.from_pretrained({str(self.model_folder)!r}, trust_remote_code=True{arguments})")
            typer.echo(
                f"  {there['class']}: {'the same vectors, bit for bit' if same else 'OTHER VECTORS'}; "
                f"{there['bytes'] / 1e6:.2f} MB of weights"
            )
        saved = whole["bytes"] - pruned["bytes"]
        typer.echo(f"{saved / 1e6:.2f} MB saved, {saved / whole['bytes']:.0%}: languages that are not asked for.")

    def build_indexes(self) -> None:
        """One with exact vectors, one with two bits per dimension, and what the second finds of the first."""
        from rarezoo.retrieval import Document, build_index, encode_corpus

        title("4. Index the corpus, exactly and in two bits per dimension")
        write_corpus(self.output / "corpus.jsonl", self.collection.documents)
        texts = [Document(name, text) for name, text in self.collection.documents.items()]
        start = time.perf_counter()
        embeddings = encode_corpus(
            self.model, self.processor, texts, self.output / "embeddings", batch_size=64, language="en"
        )
        typer.echo(f"{len(texts):,} documents encoded in {time.perf_counter() - start:.1f} s")
        queries = [
            vectors
            for language, questions in self.collection.questions.items()
            for vectors in self.model.encode_queries(
                list(questions.values()), self.processor, language=language, batch_size=64
            )
        ]
        self.figures["index"] = {}
        exact: list[set[str]] = []
        typer.echo(f"{'precision':10} {'vectors':>8} {'bytes per vector':>17} {'on disk':>9} {'recall@10':>10}")
        for precision, folder in (("float32", "index"), ("2-bit", "index-2-bit")):
            index: Any = build_index(embeddings, self.output / folder, precision)
            found = [{name for name, _ in answers} for answers in index.search(queries, top_k=10)]
            exact = exact or found
            size = sum(path.stat().st_size for path in (self.output / folder).iterdir())
            row = {
                "vectors": index.num_vectors,
                "bytes per vector": round(size / index.num_vectors, 1),
                "bytes": size,
                "recall@10 of exact search": fmean(len(a & b) / len(a) for a, b in zip(exact, found)),
            }
            self.figures["index"][precision] = row
            typer.echo(
                f"{precision:10} {row['vectors']:8,} {row['bytes per vector']:17.1f} {size / 1e6:6.1f} MB "
                f"{row['recall@10 of exact search']:10.3f}"
            )
            if precision == "float32":
                self.index = index

    def answer(self) -> None:
        title("5. Ask, in every language")
        if len(self.languages) > 1:
            self._detect_languages()
        for position, language in enumerate(self.languages):
            questions = self._plain_questions(language)
            right, question = questions[position % len(questions)]  # another one in every language
            (query,) = self.model.encode_queries([question], self.processor, language=language)
            typer.secho(f"\n{language}: {shortened(question)}", fg="cyan")
            answers = self.index.search([query], top_k=len(self.index))[0]
            for name, score in answers[:ANSWERS_SHOWN]:
                text = self.collection.documents[name]
                typer.echo(f"  {score:6.2f}  {name}{'  (right)' if name == right else ''}")
                typer.echo(f"          {shortened(text)}")
            rank = 1 + [name for name, _ in answers].index(right)
            original = self.collection.documents[right]
            if rank > ANSWERS_SHOWN:
                typer.echo(f"  number {rank} is the right one: {shortened(original)}")
            typer.echo(f"  words found in the right one: {self._matches(question, language, original)}")

    def _detect_languages(self) -> None:
        from rarezoo.retrieval import LanguageDetector

        detector = LanguageDetector(self.model.config)
        documents = self._encode_documents(self.model, self.processor)
        right = quality = 0.0
        for language, questions in self.collection.questions.items():
            right += sum(detector(text) == language for text in questions.values()) / len(questions)
            quality += self._quality(self.model, self.processor, documents, questions, detector)
        count = len(self.languages)
        self.figures["detected"] = {"right": right / count, "nDCG@10": quality / count}
        typer.echo(
            f"Languages detected instead of named: {right / count:.1%} right, nDCG@10 {quality / count:.3f} instead of "
            f"{self.figures['nDCG@10']['after']['mean']:.3f}."
        )

    def _matches(self, question: str, language: str, document: str) -> str:
        """Words of the question with the word of the document that each found, and their cosine: translations first,
        then those that stand out most from the rest of the document."""
        (query,) = self.model.encode_queries([question], self.processor, language=language)
        (found,) = self.model.encode_documents([document], self.processor, language="en")
        tokenizer = self.processor.tokenizer
        asked = tokenizer.convert_ids_to_tokens(self.processor.process_queries([question])["input_ids"][0].tolist())
        inputs = self.processor.process_documents([document])
        kept = inputs["keep_mask"][0].bool()
        answering = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0][kept].tolist())
        cosines = query @ found.T
        best = cosines.max(dim=1)
        pairs = [(first, answering[i]) for first, i in zip(asked, best.indices.tolist())]
        outstanding = (best.values - cosines.mean(dim=1)).tolist()
        # Whole words of some length; the others are pieces and particles.
        words = [i for i, pair in enumerate(pairs) if all(len(token) > 3 and token[0] == "▁" for token in pair)]
        words.sort(key=lambda i: (pairs[i][0] == pairs[i][1], -outstanding[i]))
        shown = {pairs[i]: f"{pairs[i][0][1:]}→{pairs[i][1][1:]} {best.values[i]:.2f}" for i in words}
        return "  ".join(list(shown.values())[:_MATCHES_SHOWN]) or "none"

    def add_language(self, further: FurtherLanguage, steps: int) -> None:
        """A copy of a relative's adapter, then masked language modelling; all other languages stay as they are."""
        from rarezoo.training import train_language

        title(f"6. Add a language: {further.code}, which the training has not seen")
        documents = self._encode_documents(self.model, self.processor)
        before = self._vectors_of_all_languages()
        quality = {"BM25": self._bm25(further.questions)}
        self.model.add_language(further.code, init_from=further.relative)
        arguments = (self.model, self.processor, documents, further.questions, further.code)
        quality["copied"] = self._quality(*arguments)
        losses = train_language(
            self.model,
            further.code,
            further.texts,
            self.processor,
            steps=steps,
            max_length=48,
            learning_rate=1e-3,
            seed=self.seed,
            disable_tqdm=True,
        )
        quality["trained"] = self._quality(*arguments)
        after = self._vectors_of_all_languages()
        same = all(first.equal(second) for first, second in zip(before, after))
        self.figures["added language"] = {
            "language": further.code,
            "copied from": further.relative,
            "nDCG@10": quality,
            "masked language loss": {name: losses[f"{name}_loss"] for name in ("first", "last")},
            "other languages bit-identical": same,
        }
        typer.echo(
            f"model.add_language({further.code!r}, init_from={further.relative!r}), then train_language: {steps} steps "
            f"on {len(further.texts):,} texts"
        )
        typer.echo(
            f"loss of masked words {losses['first_loss']:.2f} → {losses['last_loss']:.2f}; nDCG@10 by the copied "
            f"adapter {quality['copied']:.3f}, by the trained one {quality['trained']:.3f}, BM25 {quality['BM25']:.3f}"
        )
        if quality["trained"] <= quality["copied"]:
            typer.echo("Masked words alone do not help here: this model was not pretrained on them, as X-MOD was.")
        typer.echo(f"the other languages: {'the same vectors, bit for bit' if same else 'OTHER VECTORS'}")

    def _vectors_of_all_languages(self) -> list[Any]:
        vectors = self.model.encode_documents(
            list(self.collection.documents.values())[:100], self.processor, language="en"
        )
        for language, questions in self.collection.questions.items():
            vectors += self.model.encode_queries(list(questions.values())[:100], self.processor, language=language)
        return vectors

    def quantize(self) -> None:
        from transformers import AutoModel

        number = 7 if self.collection.further is not None else 6
        title(f"{number}. Quantize the layers, the rest in bfloat16")
        after = self.figures["nDCG@10"]["after"]["mean"]
        changes = {}

        def change(folder: Path, report: Mapping[str, Any]) -> str:
            quality = self.evaluate(AutoModel.from_pretrained(folder), self.processor)["mean"]
            changes[folder.name] = quality - after
            return f"{changes[folder.name]:+.4f}"

        reports = quantize_and_show(
            self.model_folder,
            self.output / "quantized",
            columns={
                "cosine": lambda _, report: f"{report['outputs']['cosine_mean']:.4f}",
                "score order kept": lambda _, report: f"{report['outputs']['score_rank_correlation']:.1%}",
                "nDCG@10 change": change,
            },
            sample_texts=list(self.collection.documents.values())[:256],
        )
        self.figures["quantized"] = {
            scheme: report | {"nDCG@10 change": changes[scheme]} for scheme, report in reports.items()
        }

    def draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
        history = self.history[1:] or self.history  # the first entry is of one batch, the others are means of several
        axes[0].plot([entry["step"] for entry in history], [entry["ranking_loss"] for entry in history])
        axes[0].set_title("loss")
        quality = self.figures["nDCG@10"]
        for language in self.languages:
            axes[1].plot(*zip(*((step, values[language]) for step, values in self.curve)), marker="o", label=language)
        axes[1].set_title("nDCG@10, held-out queries")
        axes[1].legend()
        for axis in axes[:2]:
            axis.set_xlabel("step")
        rows = [*self.languages, "mean"]
        for shift, (label, values) in enumerate(quality.items()):
            places = [place + (shift - 1) * 0.27 for place in range(len(rows))]
            axes[2].bar(places, [values[row] for row in rows], width=0.25, label=label)
        axes[2].set_xticks(range(len(rows)), rows, rotation=30)
        axes[2].set_title("nDCG@10 against BM25")
        axes[2].set_ylim(0, 1)
        axes[2].legend(loc="upper center", ncols=3)
        figure.savefig(self.output / "training.png", dpi=120)
        pyplot.close(figure)
        typer.echo(f"\nLoss and nDCG@10 over training, by language: {self.output / 'training.png'}")


def _with_mean(values: Mapping[str, float]) -> dict[str, float]:
    return {**values, "mean": fmean(values.values())}


def _ndcg(run: Mapping[str, Mapping[str, float]]) -> float:
    """nDCG@10 of queries that bear the name of the one document that answers them."""
    from rarezoo.retrieval import evaluate_run

    return evaluate_run(run, {name: {name: 1} for name in run}, ["nDCG@10"])["nDCG@10"]
