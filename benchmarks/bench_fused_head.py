"""Fused head against sentence-transformers' SpladePooling: hidden states given, head and pooling only.

Batch 4, text of 256 tokens echoed to 512 (the second half is pooled), hidden size 256, vocabulary 32,000, about 5 %
of the entries active. The peer gets what its users give it: all logits and the pool mask as attention mask; `peer,
second copy` is a user who slices the hidden states first.

    python benchmarks/bench_fused_head.py
"""

import torch
from measure import extra_memory, interleaved, report, rounded
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn

from rarezoo.mistral_splade.fused_vocabulary_pooling import pool_vocabulary_head

BATCH, LENGTH, TEXT, WIDTH, VOCABULARY, ACTIVE = 4, 512, 256, 256, 32_000, 0.05


def problem():
    """Hidden states, head and pool mask; the head is shifted so that a share ACTIVE of the maxima is positive."""
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, WIDTH)
    hidden[..., 0] = 10.0
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    mask[:, -TEXT:] = 1
    with torch.no_grad():
        maxima = torch.stack([(row[-TEXT:] @ head.weight.t()).amax(0) for row in hidden])
        head.weight[:, 0] -= maxima.flatten().quantile(1 - ACTIVE) / 10.0
    return hidden, head, mask


def fused(hidden, head, mask):
    return pool_vocabulary_head(head, hidden, mask)


def peer(hidden, head, mask):
    features = {"token_embeddings": head(hidden), "attention_mask": mask}
    return SpladePooling("max")(features)["sentence_embedding"]


def peer_on_second_copy(hidden, head, mask):
    return peer(hidden[:, -TEXT:], head, mask[:, -TEXT:])


METHODS = {"fused": fused, "peer": peer, "peer, second copy": peer_on_second_copy}


def prepare(method: str, training: bool, given=None):
    hidden, head, mask = given or problem()
    hidden = hidden.clone().requires_grad_(training)

    def infer():
        with torch.no_grad():
            METHODS[method](hidden, head, mask)

    def step():
        head.weight.grad = hidden.grad = None
        METHODS[method](hidden, head, mask).square().sum().backward()

    return step if training else infer


def main() -> None:
    torch.set_num_threads(1)
    given = problem()
    expected, found = peer(*given), fused(*given)
    figures: dict = {
        "active share": round(float((expected > 0).float().mean()), 4),
        "largest difference to the peer": float((expected - found).abs().max()),
    }
    for name, training in (("inference", False), ("training step", True)):
        seconds = interleaved({method: prepare(method, training, given) for method in METHODS})
        memory = {method: extra_memory(prepare, method, training) for method in METHODS}
        figures[name] = {
            "cpu seconds": rounded(seconds),
            "extra MiB": rounded(memory, 1),
            "times faster than the peer": round(seconds["peer"] / seconds["fused"], 2),
            "times less memory than the peer": round(memory["peer"] / memory["fused"], 2),
            "times faster than the peer on the second copy": round(seconds["peer, second copy"] / seconds["fused"], 2),
        }
    report("fused_head", __doc__.split("\n")[0], figures)


if __name__ == "__main__":
    main()
