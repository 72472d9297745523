"""Quantized variants of a Mistral-SPLADE against full precision: encoding time, file size, and what retrieval loses.

Speed and size: a backbone of 54 million parameters with the proportions of Mistral-7B (4 layers, hidden size 1024,
feed-forward 3584, vocabulary 16,384), random weights, about 5 % of the vocabulary active; batches of 8 real texts of
64 tokens, echoed; one thread, the variants taking turns. Quality: a small model trained on the spot on documentation
strings of the Python standard library and the installed packages (the first sentence finds the rest; queries held
out), or a trained checkpoint of your own; beside it, the same model with its layers switched off, which tells how
much there is to lose.

    python benchmarks/bench_quantization.py [--checkpoint FOLDER]
"""

import argparse
import logging
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from measure import interleaved, report, rounded
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from rarezoo.cli.docstring_corpus import DocstringPair, read_docstring_pairs
from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeProcessor
from rarezoo.quantization import EvaluationSet, quantize
from rarezoo.quantization.fidelity import compare_embeddings, compare_runs, rank, weight_file_bytes
from rarezoo.training import RetrievalCollator, SparseObjective, SparseRetrievalTrainer

VARIANTS = {
    "bf16": ("bf16", "bfloat16"),
    "nf4 + bf16": ("nf4", "bfloat16"),
    "nf4-double + bf16": ("nf4-double", "bfloat16"),
    "int8 + bf16": ("int8", "bfloat16"),
    "int8-torchao + bf16": ("int8-torchao", "bfloat16"),
}
LARGE = dict(
    vocab_size=16_384,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
)
SMALL = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
BATCH, TEXT_TOKENS, ACTIVE = 8, 64, 0.05
PAIRS, DOCUMENTS, HELD_OUT = 6000, 2000, 300
STEPS, TRAINING_BATCH = 120, 32


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    # Words are the units of merging, so that training takes seconds.
    words = (word for text in texts for word in text.split())
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def large_checkpoint(folder: Path, texts: list[str]) -> Path:
    torch.manual_seed(0)
    config = MistralSpladeConfig(**LARGE, attention_mode="echo", sliding_window=None)
    model = MistralSpladeForRetrieval(config).eval()
    processor = MistralSpladeProcessor(
        train_tokenizer(texts, LARGE["vocab_size"]), max_query_length=TEXT_TOKENS, max_document_length=TEXT_TOKENS
    )
    _make_sparse(model, processor.process_documents(texts[:BATCH]))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _make_sparse(model, inputs) -> None:
    """A direction that all hidden states share pushes most logits below zero, as training does."""
    model.model.embed_tokens.weight[:, 0] += 1.0
    hidden = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    hidden = hidden[inputs["pool_mask"].bool()]
    direction = hidden.mean(0)
    largest = (hidden @ model.lm_head.weight.t()).amax(0)
    model.lm_head.weight -= direction * (largest.quantile(1 - ACTIVE) / (hidden @ direction).amin())


@torch.no_grad()
def _start_from_words(model) -> None:
    """Start where every text is the set of its own tokens, so that minutes of training are enough: each token's logit
    is large at its own embedding, and a constant input dimension holds all others below zero. Embeddings are small
    beside what the layers add, so that the layers matter."""
    embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
    width = embeddings.shape[1]
    embeddings.normal_()
    head.copy_(embeddings * 5 / width)
    head[:, 0] = -20 / width
    embeddings[:, 0] = width**0.5
    embeddings.mul_(0.2)


def trained_checkpoint(folder: Path, pairs: list[DocstringPair]) -> Path:
    torch.manual_seed(0)
    processor = MistralSpladeProcessor(
        train_tokenizer([text for pair in pairs for text in (pair.query, pair.document)], SMALL["vocab_size"]),
        attention_mode="bidirectional",
        max_query_length=24,
        max_document_length=64,
    )
    model = MistralSpladeForRetrieval(MistralSpladeConfig(**SMALL, attention_mode="bidirectional"))
    _start_from_words(model)
    arguments = TrainingArguments(
        output_dir=str(folder / "runs"),
        max_steps=STEPS,
        per_device_train_batch_size=TRAINING_BATCH,
        learning_rate=2e-3,
        warmup_steps=STEPS // 10,
        logging_steps=STEPS // 4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = SparseRetrievalTrainer(
        model=model,
        args=arguments,
        objective=SparseObjective(query_regularizer_weight=1e-3, document_regularizer_weight=1e-3),
        data_collator=RetrievalCollator(processor),
        train_dataset=[{"query": pair.query, "positive": pair.document} for pair in pairs[HELD_OUT:]],
    )
    trainer.train()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def held_out(pairs: list[DocstringPair]) -> EvaluationSet:
    """Held-out first sentences must find their own text among `DOCUMENTS` texts."""
    return EvaluationSet(
        {str(i): pair.query for i, pair in enumerate(pairs[:HELD_OUT])},
        {str(i): pair.document for i, pair in enumerate(pairs[:DOCUMENTS])},
        {str(i): {str(i): 1} for i in range(HELD_OUT)},
    )


def quantized_folders(source: Path, target: Path) -> dict[str, Path]:
    folders = {"fp32": source}
    for name, (scheme, dtype) in VARIANTS.items():
        folders[name] = target / name.replace(" + ", "-")
        quantize(source, folders[name], scheme, dtype, fidelity=False)
    return folders


def speed_and_size(texts: list[str], workspace: Path) -> dict:
    source = large_checkpoint(workspace / "large", texts)
    folders = quantized_folders(source, workspace / "large-quantized")
    processor = AutoProcessor.from_pretrained(source)
    loaded = {name: AutoModel.from_pretrained(folder).eval() for name, folder in folders.items()}
    batch = [text for text in texts if len(text) > 6 * TEXT_TOKENS][:BATCH]
    seconds = interleaved({name: lambda m=m: m.encode_documents(batch, processor) for name, m in loaded.items()})
    sizes = {name: weight_file_bytes(folder) for name, folder in folders.items()}
    backbone = sum(parameter.numel() for parameter in loaded["fp32"].model.layers.parameters())
    active = loaded["fp32"].encode_documents(batch, processor).nnz / (BATCH * LARGE["vocab_size"])
    return {
        "backbone parameters": backbone,
        "all parameters": loaded["fp32"].num_parameters(),
        "active share": round(active, 4),
        "cpu seconds per batch": rounded(seconds),
        "times faster than fp32": rounded({name: seconds["fp32"] / value for name, value in seconds.items()}, 2),
        "megabytes of weights": rounded({name: size / 1e6 for name, size in sizes.items()}, 1),
        "share of the fp32 file": rounded({name: size / sizes["fp32"] for name, size in sizes.items()}, 3),
    }


def without_layers(checkpoint: Path):
    """The full-precision model with layers that add nothing: how much of the vectors the layers make."""
    model = AutoModel.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def quality(checkpoint: Path, evaluation: EvaluationSet, workspace: Path) -> dict:
    folders = quantized_folders(checkpoint, workspace / "quantized")
    processor = AutoProcessor.from_pretrained(checkpoint)
    loaded = {name: AutoModel.from_pretrained(folder).eval() for name, folder in folders.items()}
    loaded["fp32 without its layers"] = without_layers(checkpoint)
    texts = list(evaluation.documents.values())[:500]
    vectors = {name: model.encode_documents(texts, processor) for name, model in loaded.items()}
    runs = {name: rank(model, processor, evaluation) for name, model in loaded.items()}
    figures: dict = {"queries": len(evaluation.queries), "documents": len(evaluation.documents)}
    for name in list(loaded)[1:]:
        outputs = compare_embeddings(vectors["fp32"], vectors[name])
        retrieval = compare_runs(runs["fp32"], runs[name], evaluation)
        figures["nDCG@10 fp32"] = round(retrieval["nDCG@10"]["full_precision"], 4)
        figures[name] = {
            "nDCG@10": round(retrieval["nDCG@10"]["quantized"], 4),
            "nDCG@10 change": round(retrieval["nDCG@10"]["change"], 4),
            "top-10 term overlap": round(outputs["top_10_term_overlap"], 4),
            "top-10 document overlap": round(retrieval["top_10_document_overlap"], 4),
            "cosine": round(outputs["cosine_mean"], 5),
            "active dimensions": rounded(outputs["active_dimensions"], 1),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="trained checkpoint folder; trains a small one when absent")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    pairs = read_docstring_pairs(PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        figures = {"speed and size": speed_and_size([pair.document for pair in pairs], workspace)}
        trained = arguments.checkpoint or trained_checkpoint(workspace / "trained", pairs)
        figures["quality"] = quality(trained, held_out(pairs), workspace)
    figures["quantization libraries"] = {name: version(name) for name in ("bitsandbytes", "torchao")}
    report("quantization", __doc__.split("\n")[0], figures)


if __name__ == "__main__":
    main()
