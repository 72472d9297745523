"""A retriever without a pretrained language model: a tokenizer from the texts at hand, and weights that match words.

A randomly initialised model needs far more text than a small collection holds before it knows that a word is best
found by the same word. `initialize_as_lexical_matcher` gives it that knowledge, so that training starts from an
IDF-weighted bag of words and only has to learn what such a bag does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing BPE tokenizer.

    Words, punctuation marks and digits are separate units, so that "os.path" shares its parts with "path". Special
    tokens: `<unk>` 0 (also padding), `<s>` 1, `</s>` 2; nothing is added to a text by itself.

    Args:
        texts: raw texts.
        vocabulary_size: largest number of entries; few texts may give fewer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if vocabulary_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"vocabulary_size must be above {len(SPECIAL_TOKENS)}, found {vocabulary_size}")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}▁]|\p{N}"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        min_frequency=2,
        # Rare letters would take the place of words.
        limit_alphabet=vocabulary_size // 4,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def token_document_frequencies(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], vocab_size: int) -> Tensor:
    """Number of documents that contain each token: float32 `(vocab_size,)`."""
    counts = torch.zeros(vocab_size)
    for ids in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        counts[torch.tensor(sorted(set(ids)), dtype=torch.long)] += 1
    return counts


@torch.no_grad()
def initialize_as_lexical_matcher(
    model: PreTrainedModel, processor: Any, documents: Sequence[str], gain: float = 12.0, threshold: float = 0.35
) -> None:
    """Set the weights so that every pooled token activates itself, by its rarity, and hardly anything else.

    Token i gets the embedding `[u_i, c]`: a random unit vector and a constant. The head's row of token j is
    `s_j [u_j, -threshold / c]` with `s_j` proportional to its inverse document frequency, and the branches of all
    layers end in zeros. A pooled token i then gives the logit `gain * idf_j / max(idf) * (u_i . u_j - threshold)`:
    positive for j = i, and negative for all others as long as random vectors are nearly orthogonal (hidden_size of
    64 and more).

    Args:
        model: a retriever with an untied head and a Mistral-like backbone; changed in place.
        processor: its processor.
        documents: texts for the document frequencies.
        gain: logit of the rarest token, before the threshold. InfoNCE wants score differences of several units: with
            a small gain its first gradients raise all weights at once.
        threshold: cosine below which tokens do not activate each other.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embeddings, nn.Embedding) or head.weight is embeddings.weight:
        raise ValueError("initialize_as_lexical_matcher needs a model whose head is not tied to its embeddings")
    if gain <= 0 or not 0 <= threshold < 1:
        raise ValueError(f"expected gain above 0 and 0 <= threshold < 1, found {gain} and {threshold}")
    vocab_size, hidden_size = embeddings.weight.shape
    frequencies = token_document_frequencies(processor.tokenizer, documents, vocab_size)
    rarity = torch.log(1 + (len(documents) - frequencies + 0.5) / (frequencies + 0.5))
    constant = 0.5
    directions = nn.functional.normalize(torch.randn(vocab_size, hidden_size - 1), dim=1)
    # The final RMSNorm divides the embedding by its root mean square, which is the same for all tokens.
    root_mean_square = ((1 + constant**2) / hidden_size) ** 0.5
    strength = gain * rarity / rarity.max() * root_mean_square
    embeddings.weight.copy_(torch.cat([directions, torch.full((vocab_size, 1), constant)], dim=1))
    head.weight.copy_(torch.cat([directions * strength[:, None], -(threshold / constant) * strength[:, None]], dim=1))
    for layer in getattr(model, model.base_model_prefix).layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
