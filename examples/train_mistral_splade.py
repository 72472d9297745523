"""Train a Mistral-SPLADE retriever on your own pairs, measure it on held-out ones, and look at what it learned.

    python examples/train_mistral_splade.py pairs.jsonl retriever                       # small, from scratch, on a CPU
    python examples/train_mistral_splade.py pairs.jsonl retriever --model CHECKPOINT    # fine-tune; LoRA if it is large

A row of pairs.jsonl is {"query": …, "positive": …}; docs/training.md has the other forms.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModel, AutoProcessor

from rarezoo.retrieval import evaluate_run
from rarezoo.training import SparseTrainingRecipe, read_training_rows, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="rows of queries and positives, .jsonl, .tsv or .parquet")
    parser.add_argument("output", type=Path, help="new folder for the checkpoint")
    parser.add_argument("--model", help="checkpoint to fine-tune; without it a small model starts from scratch")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--held-out", type=int, default=200, help="rows kept for the measurement, at most a fifth")
    arguments = parser.parse_args()

    rows = [dict(row) for row in read_training_rows(arguments.pairs)]
    number_held_out = max(1, min(arguments.held_out, len(rows) // 5))
    held_out, training = rows[:number_held_out], rows[number_held_out:]
    changes = {"max_steps": arguments.steps} if arguments.steps else {}
    if arguments.model is None:
        recipe = SparseTrainingRecipe.small_from_scratch(**changes)
    else:
        recipe = SparseTrainingRecipe(
            model=arguments.model, batch_size=128, mini_batch_size=16, learning_rate=1e-4, bf16=True, **changes
        )
    metrics = train(recipe, arguments.output, rows=training)
    active = " and ".join(f"{metrics[f'{side}_active_dimensions']:.0f} ({side})" for side in ("query", "document"))
    print(f"{metrics['steps']} steps in {metrics['train_runtime']:.0f} s: loss {metrics['ranking_loss']:.3f}")
    print(f"active dimensions: {active}")

    model = AutoModel.from_pretrained(arguments.output)
    processor = AutoProcessor.from_pretrained(arguments.output)
    queries = model.encode_queries([row["query"] for row in held_out], processor)
    documents = model.encode_documents([row["positive"] for row in rows], processor, show_progress_bar=True)
    scores = model.score(queries, documents)
    run = {str(i): {str(j): float(row[j]) for j in row.argsort()[-10:]} for i, row in enumerate(scores)}
    qrels = {str(i): {str(i): 1} for i in range(len(held_out))}
    ndcg = evaluate_run(run, qrels, ["nDCG@10"])["nDCG@10"]
    print(f"nDCG@10 of {len(held_out)} held-out queries over {len(rows)} documents: {ndcg:.3f}")

    print(f"\n{held_out[0]['query']}")
    for token, weight in model.explain(held_out[0]["query"], processor, top_k=8, kind="query"):
        print(f"  {weight:.2f}  {token}")


if __name__ == "__main__":
    main()
