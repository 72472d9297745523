"""A retriever without a pretrained language model: a tokenizer from the texts at hand, and weights that match words.

A randomly initialised model needs far more text than a small collection holds before it knows that a word is best
found by the same word. `initialize_as_lexical_matcher` gives it that knowledge, so that training starts near BM25 and
only has to learn what BM25 does not know.
"""

from __future__ import annotations

import math
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


# The norm of a hidden state approximates BM25's length normalisation, 1.375 + 1.125 length / typical length (k1 = 1.5,
# b = 0.75, each term once), up to a constant factor: within a tenth from a third of the typical length to three times.
_LENGTH_SCALE = 6.9
_LENGTH_SATURATION = 3.1
_CONSTANT = 0.5


@torch.no_grad()
def initialize_as_lexical_matcher(
    model: PreTrainedModel, processor: Any, documents: Sequence[str], gain: float = 8.0, threshold: float = 0.35
) -> None:
    """Set the weights so that every pooled token activates itself, by its rarity and the text's length, and hardly
    anything else: BM25 without term frequencies, as a Transformer.

    Token i gets the embedding `[u_i, c, 0, 0]`: a random unit vector u_i and the constant c = 0.5; `<s>` gets
    `[0, c, 1, 0]`. The branches of all layers end in zeros, except that one attention head of the first layer writes
    the last coordinate: it looks at `<s>` with weight A / (n + A) and at each of the n tokens read so far with weight
    1 / (n + A), so that it can write e = 6.9 n / (n + A), A being 3.1 times the mean of n at the documents' pooled
    positions. The final norm divides by sqrt(1 + c^2 + e^2), which grows with the length of the text. The head's row of
    token j is `s_j [u_j, -threshold / c, 0, 0]`, s_j proportional to its inverse document frequency. A pooled token i
    then gives token j the logit

        gain * idf_j / max(idf) * (u_i . u_j - threshold) * sqrt((1 + c^2 + mean(e)^2) / (1 + c^2 + e^2))

    positive for j = i, and negative for nearly all others as long as random vectors are nearly orthogonal (hidden_size
    of 64 and more).

    Args:
        model: a retriever with an untied head and a Mistral-like backbone; changed in place.
        processor: its processor; templates begin with the tokenizer's `<s>`.
        documents: texts for the document frequencies and lengths.
        gain: logit of the rarest token in a text of typical length, before the threshold. InfoNCE wants score
            differences of several units: with a small gain its first gradients raise all weights at once.
        threshold: cosine below which tokens do not activate each other.

    Raises:
        ValueError: the head is tied to the embeddings, the tokenizer has no `<s>`, or there are no documents.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    start_token = processor.tokenizer.bos_token_id
    if not isinstance(embeddings, nn.Embedding) or head.weight is embeddings.weight:
        raise ValueError("initialize_as_lexical_matcher needs a model whose head is not tied to its embeddings")
    if gain <= 0 or not 0 <= threshold < 1:
        raise ValueError(f"expected gain above 0 and 0 <= threshold < 1, found {gain} and {threshold}")
    if not documents or start_token is None:
        raise ValueError(f"expected documents and a start token, found {len(documents)} and {start_token}")
    vocab_size, hidden_size = embeddings.weight.shape
    frequencies = token_document_frequencies(processor.tokenizer, documents, vocab_size)
    rarity = torch.log(1 + (len(documents) - frequencies + 0.5) / (frequencies + 0.5))
    directions = nn.functional.normalize(torch.randn(vocab_size, hidden_size - 3), dim=1)
    entries = nn.functional.pad(directions, (0, 3))
    entries[:, -3] = _CONSTANT
    entries[start_token] = 0
    entries[start_token, -3:-1] = torch.tensor([_CONSTANT, 1.0])
    embeddings.weight.copy_(entries)

    layers = getattr(model, model.base_model_prefix).layers
    for layer in layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    tokens_read = _mean_tokens_read(processor, documents, model.config.attention_mode == "bidirectional")
    saturation = max(_LENGTH_SATURATION * tokens_read, 1.0)
    _write_text_length(layers[0].self_attn, hidden_size, saturation)

    # The final RMSNorm divides by the root mean square; `strength` makes up for that of a typical text.
    length = _LENGTH_SCALE * tokens_read / (tokens_read + saturation)
    strength = gain * rarity / rarity.max() * ((1 + _CONSTANT**2 + length**2) / hidden_size) ** 0.5
    rows = nn.functional.pad(directions, (0, 3))
    rows[:, -3] = -threshold / _CONSTANT
    head.weight.copy_(rows * strength[:, None])


def _mean_tokens_read(processor: Any, documents: Sequence[str], bidirectional: bool) -> float:
    """Tokens that a pooled position of a document sees, itself included and `<s>` not, on average."""
    sample = list(documents[:: max(len(documents) // 1000, 1)])
    counts = []
    for start in range(0, len(sample), 100):
        inputs = processor.process_documents(sample[start : start + 100])
        seen = inputs["attention_mask"].cumsum(dim=1) - 1
        if bidirectional:
            seen = seen[:, -1:].expand_as(seen)
        counts.append(seen[inputs["pool_mask"].bool()])
    return torch.cat(counts).float().mean().item()


def _write_text_length(attention: Any, hidden_size: int, saturation: float) -> None:
    """Make the first head add `_LENGTH_SCALE * n / (n + saturation)` to the last coordinate; see
    `initialize_as_lexical_matcher` for the coordinates."""
    # What the layer's RMSNorm makes of 1: all embeddings have the same norm.
    unit = (hidden_size / (1 + _CONSTANT**2)) ** 0.5
    constant, start, length = hidden_size - 3, hidden_size - 2, hidden_size - 1
    # The slowest rotation: its cosine stays near 1 over any text.
    slowest = attention.head_dim // 2 - 1
    strength = (math.log(saturation) * attention.head_dim**0.5) ** 0.5
    attention.q_proj.weight[: attention.head_dim] = 0
    attention.q_proj.weight[slowest, constant] = strength / (_CONSTANT * unit)
    attention.k_proj.weight[: attention.head_dim] = 0
    attention.k_proj.weight[slowest, start] = strength / unit
    attention.v_proj.weight[0] = 0
    attention.v_proj.weight[0, constant] = 1 / (_CONSTANT * unit)
    attention.v_proj.weight[0, start] = -1 / unit
    attention.o_proj.weight[length, 0] = _LENGTH_SCALE
