"""A late-interaction retriever without a pretrained language model: a tokenizer in XLM-R's layout, and weights with
which MaxSim counts shared words by their rarity.

As for sparse retrievers (`rarezoo.training.from_scratch`), a random model would need far more text than a small
collection holds before it knows that a word is best found by the same word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rarezoo.training.from_scratch import token_document_frequencies

XLM_R_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MASK_TOKEN = "<mask>"
# Components of the initial embeddings, on average. LayerNorm makes them 1; Adam moves small ones faster.
_EMBEDDING_SCALE = 0.1


def train_xlm_r_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing BPE tokenizer in XLM-R's layout: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, pieces with "▁"
    for the beginning of a word, `<mask>` last; a text becomes `<s> … </s>`.

    Unlike in XLM-R, punctuation marks and digits are words of their own, so that "os.path" shares its parts with
    "path", and the punctuation that documents drop is the symbols themselves.

    Args:
        texts: raw texts.
        vocabulary_size: largest number of entries; few texts may give fewer.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    smallest = len(XLM_R_SPECIAL_TOKENS) + 2
    if vocabulary_size < smallest:
        raise ValueError(f"vocabulary_size must be at least {smallest}, found {vocabulary_size}")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{M}\p{N}]|\p{N}"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=vocabulary_size - 1,  # <mask> follows
            special_tokens=list(XLM_R_SPECIAL_TOKENS),
            min_frequency=2,
            # Rare letters would take the place of words.
            limit_alphabet=max(vocabulary_size // 4, 1),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken(MASK_TOKEN, lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=MASK_TOKEN,
    )


@torch.no_grad()
def initialize_as_lexical_late_interaction(model: Any, processor: Any, documents: Sequence[str]) -> None:
    """Set the weights so that MaxSim is, up to a constant per query, the summed rarity of the query's tokens that the
    document contains: BM25 without term frequencies and document lengths, out of unit vectors.

    A token i gets the vector `v_i = [1 - g_i, sqrt(1 - (1 - g_i)^2) u_i]`: a direction that all tokens share, and a
    random unit vector u_i of its own; its gain g_i in [0, 1] is its inverse document frequency over the largest one.
    Special tokens have g = 0. A query token i then finds itself with cosine 1. Where the document lacks it, the best
    match is one without a direction of its own, of which every document has some (`<s>`): cosine 1 - g_i. The document
    that holds it gains exactly g_i. Random vectors are nearly orthogonal in many dimensions, so that other tokens
    seldom come closer.

    The vectors pass through the model unchanged: embeddings are multiples of `v_i B`, B an orthonormal basis of `dim`
    directions without mean, whose direction LayerNorm (weight 1, bias 0) keeps; positions are 0; attention,
    feed-forward layers and adapters end in zeros; the projection is B again. So all languages are alike, and training
    starts from here.

    Args:
        model: a multi-vector retriever with an X-MOD backbone, `dim` below `hidden_size`; changed in place.
        processor: its processor.
        documents: texts for the document frequencies.

    Raises:
        ValueError: `dim` is too large, or there are no documents.
    """
    hidden_size, dim = model.config.hidden_size, model.config.dim
    if dim >= hidden_size:
        raise ValueError(f"the lexical start needs dim below hidden_size, found {dim} and {hidden_size}")
    if not documents:
        raise ValueError("the lexical start needs documents, found none")
    gains = _relative_rarity(processor.tokenizer, documents, model.config.vocab_size)
    shared = 1 - gains
    own = nn.functional.normalize(torch.randn(len(gains), dim - 1), dim=1)
    vectors = torch.cat([shared[:, None], (1 - shared.square()).sqrt()[:, None] * own], dim=1)
    basis = _basis_without_mean(dim, hidden_size)

    backbone = model.roberta
    embeddings = backbone.embeddings
    embeddings.word_embeddings.weight.copy_(_EMBEDDING_SCALE * hidden_size**0.5 * vectors @ basis)
    embeddings.position_embeddings.weight.zero_()
    embeddings.token_type_embeddings.weight.zero_()
    for layer in backbone.encoder.layer:
        last = [layer.attention.output.dense, layer.output.dense]
        last += [adapter.dense2 for adapter in layer.output.adapter_modules.values()]
        for module in last:
            module.weight.zero_()
            module.bias.zero_()
    model.linear.weight.copy_(basis)


def _relative_rarity(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], vocab_size: int) -> Tensor:
    """Inverse document frequency of every token over the largest one, 0 for special tokens: `(vocab_size,)`."""
    frequencies = token_document_frequencies(tokenizer, documents, vocab_size)
    rarity = torch.log(1 + (len(documents) - frequencies + 0.5) / (frequencies + 0.5))
    gains = rarity / rarity.max()
    gains[tokenizer.all_special_ids] = 0
    return gains


def _basis_without_mean(size: int, hidden_size: int) -> Tensor:
    """`(size, hidden_size)`: orthonormal rows, each with mean 0."""
    random = torch.randn(hidden_size, size + 1)
    random[:, 0] = 1
    return torch.linalg.qr(random).Q[:, 1:].T.contiguous()
