"""Speed and memory of the lexinvariant model against a tied standard language model and the naive construction.

Training step: 32,128 symbols, 4 texts of 256, width 256, 4 layers, 4 heads; forward with loss and backward, against
transformers' `GPT2LMHeadModel` of the same size. Table and logits alone: rows, products with them and the loss without
any layer, against a table drawn per sequence (`randn(B, V, d)`). Memory of inference: one forward pass of one text at
128 and at 1,000,000 symbols. Decoding: greedy, 200 symbols with the cache, against the same network, its table learned;
the same for the paper's model of 151 million weights, 20 symbols.
CPU seconds on one thread, cases taking turns; memory is the growth of a fresh process at its peak.

    python benchmarks/bench_lexinvariant.py
"""

from __future__ import annotations

import statistics

import torch
from measure import extra_memory, interleaved, report, rounded
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from rarezoo.lexinvariant import LexinvariantConfig, LexinvariantForCausalLM

VOCABULARY, BATCH, LENGTH, WIDTH, LAYERS, HEADS = 32_128, 4, 256, 256, 4, 4
PROMPT, NEW = 64, 200
PAPER_SIZE = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "head_dim": 128,
    "intermediate_size": 4096,
}
TABLES = {
    "on demand, collapsed": {"table": "gaussian", "unseen_logits": "collapsed"},
    "permuted": {"table": "permuted"},
    "on demand, sampled": {"table": "gaussian"},
    "standard twin": {"table": "learned"},
}


def lexinvariant(**overrides) -> LexinvariantForCausalLM:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "head_dim": WIDTH // HEADS,
        "intermediate_size": 4 * WIDTH,
    }
    torch.manual_seed(0)
    return LexinvariantForCausalLM(LexinvariantConfig(**{**settings, **overrides}))


def text(batch: int = BATCH, length: int = LENGTH, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Ids with repetitions as in text: about 180 different ones in 256."""
    generator = torch.Generator().manual_seed(0)
    return (vocabulary ** torch.rand(batch, length, generator=generator)).long().clamp(max=vocabulary - 1)


# --- training step ----------------------------------------------------------------------------------------------------


def training_step(case: str):
    if case == "GPT-2":
        sizes = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
        no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **no_dropout))
    else:
        model = lexinvariant(**TABLES[case])
    model.train()
    ids = text()

    def step():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    return step


# --- table and logits alone -------------------------------------------------------------------------------------------


def table_and_logits(case: str):
    """Rows of the ids, their products with the rows of all symbols as in the model without a layer, loss, backward."""
    ids = text()
    if case == "naive":
        scale = torch.ones(WIDTH, requires_grad=True)

        def step(ids=ids, vocabulary=VOCABULARY):
            table = torch.randn(BATCH, vocabulary, WIDTH)
            hidden = scale * table.gather(1, ids[..., None].expand(-1, -1, WIDTH))
            logits = hidden @ table.transpose(1, 2) / WIDTH**0.5
            cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

        step(ids[:, :8] % 8, 8)
        return step
    model = lexinvariant(**TABLES[case]).train()
    model.model.layers = torch.nn.ModuleList()

    def step_of_model(ids=ids):
        model(ids, labels=ids).loss.backward()

    # What libraries set up at a first call is not counted.
    step_of_model(ids[:, :8])
    return step_of_model


# --- inference --------------------------------------------------------------------------------------------------------


def inference(vocabulary: int):
    """The loss of a text, without logits of all symbols: 128 of them are met whatever the vocabulary."""
    model = lexinvariant(vocab_size=vocabulary, table="gaussian", unseen_logits="collapsed").eval()
    ids = torch.randint(128, (1, LENGTH), generator=torch.Generator().manual_seed(0)) + vocabulary - 128

    def score():
        with torch.no_grad():
            model(ids, labels=ids, skip_logits=True)

    return score


def decoding(case: str, vocabulary: int = VOCABULARY, new: int = NEW, **sizes):
    model = lexinvariant(vocab_size=vocabulary, **TABLES[case], **sizes).eval()
    ids = text(1, PROMPT, vocabulary)
    mask = torch.ones_like(ids)

    def generate():
        model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    return generate


def main() -> None:
    torch.set_num_threads(1)
    cases = ["GPT-2", *TABLES]
    seconds = interleaved({case: training_step(case) for case in cases}, rounds=3)
    memory = {case: extra_memory(training_step, case) for case in cases}
    figures: dict = {
        "training step": {
            "cpu seconds": rounded(seconds, 3),
            "extra MiB": rounded(memory, 1),
            "times faster than GPT-2": rounded({case: seconds["GPT-2"] / seconds[case] for case in TABLES}, 2),
            "memory relative to GPT-2's": rounded({case: memory[case] / memory["GPT-2"] for case in TABLES}, 2),
        }
    }
    cases = ["naive", "on demand, collapsed", "permuted"]
    seconds = interleaved({case: table_and_logits(case) for case in cases}, rounds=3)
    memory = {case: extra_memory(table_and_logits, case) for case in cases}
    figures["table and logits alone"] = {
        "cpu seconds": rounded(seconds, 4),
        "extra MiB": rounded(memory, 1),
        "times faster than naive": rounded({case: seconds["naive"] / seconds[case] for case in cases[1:]}, 1),
        "times less memory than naive": rounded({case: memory["naive"] / memory[case] for case in cases[1:]}, 1),
    }
    # A process differs from the next by a few mebibytes, more than the vocabularies do.
    memory = {
        str(size): statistics.median(extra_memory(inference, size) for _ in range(9)) for size in (128, 1_000_000)
    }
    figures["inference, memory by vocabulary"] = {
        "extra MiB": rounded(memory, 1),
        "change": round(memory["1000000"] / memory["128"] - 1, 3),
    }
    names = ["on demand, collapsed", "standard twin"]
    for title, vocabulary, new, sizes in (
        ("128 symbols", 128, NEW, {}),
        (f"{VOCABULARY} symbols", VOCABULARY, NEW, {}),
        ("the paper's size", 128, 20, PAPER_SIZE),
    ):
        seconds = interleaved({case: decoding(case, vocabulary, new, **sizes) for case in names}, rounds=7)
        figures[f"decoding, {title}"] = {
            "tokens per cpu second": rounded({case: new / value for case, value in seconds.items()}, 1),
            "relative to the standard twin": round(seconds["standard twin"] / seconds["on demand, collapsed"], 2),
        }
    report("lexinvariant", __doc__.splitlines()[0], figures, ("torch", "transformers"))


if __name__ == "__main__":
    main()
