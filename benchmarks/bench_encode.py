"""Whole model against sentence-transformers' SparseEncoder: encoding and a training step, backbone included.

Mistral of 6 layers, hidden size 384, feed-forward 1024, vocabulary 32,000; 4 texts of 192 tokens echoed to 384. Both
sides run the same weights and the same echoed ids; the peer pools the second copy by its attention-mask input.
Measured twice: with about 5 % of the vocabulary active, as after training, and with an untrained head, where most of
it is active.

    python benchmarks/bench_encode.py
"""

import torch
from measure import extra_memory, interleaved, report, rounded
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval

BATCH, TEXT, ACTIVE = 4, 192, 0.05
SIZES = dict(
    vocab_size=32_000,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    sliding_window=None,
)


class Peer(nn.Module):
    """What SparseEncoder runs for a causal backbone: all logits, then SpladePooling over the pool mask."""

    def __init__(self, state_dict):
        super().__init__()
        self.transformer = MistralForCausalLM(MistralConfig(**SIZES))
        self.transformer.load_state_dict(state_dict)
        self.pooling = SpladePooling("max")

    def forward(self, input_ids, attention_mask, pool_mask):
        logits = self.transformer(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return self.pooling({"token_embeddings": logits, "attention_mask": pool_mask})["sentence_embedding"]


class Ours(nn.Module):
    def __init__(self, state_dict):
        super().__init__()
        self.model = MistralSpladeForRetrieval(MistralSpladeConfig(**SIZES))
        self.model.load_state_dict(state_dict)

    def forward(self, **inputs):
        return self.model(**inputs).sparse_embedding


METHODS = {"rarezoo": Ours, "peer": Peer}


def problem(sparse: bool):
    """Weights and inputs; for the sparse case a shared direction of the hidden states pushes most logits below zero."""
    torch.manual_seed(0)
    model = MistralSpladeForRetrieval(MistralSpladeConfig(**SIZES)).eval()
    text = torch.randint(3, SIZES["vocab_size"], (BATCH, TEXT))
    mask = torch.ones(BATCH, 2 * TEXT, dtype=torch.long)
    pool_mask = mask.clone()
    pool_mask[:, :TEXT] = 0
    inputs = {"input_ids": torch.cat([text, text], dim=1), "attention_mask": mask, "pool_mask": pool_mask}
    if sparse:
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] += 1.0
            hidden = model.model(inputs["input_ids"]).last_hidden_state[:, TEXT:]
            direction = hidden.mean(dim=(0, 1))
            push = (hidden @ direction).amin()
            maxima = torch.stack([(row @ model.lm_head.weight.t()).amax(0) for row in hidden])
            model.lm_head.weight -= direction * (maxima.flatten().quantile(1 - ACTIVE) / push)
    return model.state_dict(), inputs


def prepare(method: str, training: bool, sparse: bool, given=None):
    state_dict, inputs = given or problem(sparse)
    model = METHODS[method](state_dict).train(training)

    def infer():
        with torch.no_grad():
            return model(**inputs)

    def step():
        model.zero_grad(set_to_none=True)
        model(**inputs).square().sum().backward()

    return step if training else infer


def compare(sparse: bool) -> dict:
    given = problem(sparse)
    outputs = {method: prepare(method, False, sparse, given)() for method in METHODS}
    figures: dict = {
        "active share": round(float((outputs["peer"] > 0).float().mean()), 4),
        "largest difference to the peer": float((outputs["peer"] - outputs["rarezoo"]).abs().max()),
    }
    for name, training in (("encode", False), ("training step", True)):
        seconds = interleaved({method: prepare(method, training, sparse, given) for method in METHODS}, rounds=5)
        memory = {method: extra_memory(prepare, method, training, sparse) for method in METHODS}
        figures[name] = {
            "cpu seconds": rounded(seconds),
            "extra MiB": rounded(memory, 1),
            "times faster": round(seconds["peer"] / seconds["rarezoo"], 2),
            "times less memory": round(memory["peer"] / memory["rarezoo"], 2),
        }
    return figures


def main() -> None:
    torch.set_num_threads(1)
    figures = {"5 % active": compare(sparse=True), "untrained head": compare(sparse=False)}
    report("encode", __doc__.split("\n")[0], figures)


if __name__ == "__main__":
    main()
