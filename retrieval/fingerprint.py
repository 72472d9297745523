"""Fingerprints: short hashes by which vectors of different models, or of different settings, are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rarezoo.retrieval.token_keys import surface_forms

if TYPE_CHECKING:
    import torch

_SAMPLES_PER_TENSOR = 1024
_STRIDE = 2_654_435_761  # Knuth's multiplicative constant: spreads the samples over rows and columns

# What a configuration says beside the function that the model computes.
_IRRELEVANT_SETTINGS = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "head_chunk_size",
    "id2label",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "pad_token_id",
    "quantization_config",
    "return_dict",
    "top_k_document",
    "top_k_query",
    "transformers_version",
    "use_cache",
}


def model_fingerprint(model: torch.nn.Module) -> str:
    """Hash of the function that a model computes: its weights and the settings that change its output.

    Of every weight tensor a fixed sample of 1024 values is hashed, rounded to bfloat16: the same checkpoint has one
    fingerprint on every device and whether it is loaded in float32 or bfloat16, and a fine-tuned one has another. Of
    quantized tensors all values count (not their order, which bitsandbytes changes while it runs): a quantized variant
    has a fingerprint of its own.

    Args:
        model: a transformers model, also with PEFT adapters.

    Returns:
        32 hexadecimal digits.
    """
    settings = model.config.to_dict()  # type: ignore[union-attr, operator]
    fingerprint = hashlib.blake2b(digest_size=16)
    relevant = {name: value for name, value in settings.items() if value and name not in _IRRELEVANT_SETTINGS}
    fingerprint.update(json.dumps(relevant, sort_keys=True, default=str).encode())
    for name, tensor in sorted(_stored_tensors(model), key=lambda item: item[0]):
        fingerprint.update(name.encode())
        fingerprint.update(_summary(tensor))
    return fingerprint.hexdigest()


def processor_fingerprint(processor: Any) -> str:
    """Hash of a processor's settings and of its tokenizer's vocabulary and rules.

    Returns:
        32 hexadecimal digits.
    """
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call, not part of the tokenizer.
    tokenizer.update(padding=None, truncation=None)
    content = json.dumps([processor.to_dict(), tokenizer], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def vocabulary_fingerprint(vocabulary: Any) -> str:
    """Hash of the tokens in the order of their ids: vectors of equal size whose dimensions mean other words differ.

    Args:
        vocabulary: a tokenizer, or a sequence of tokens in the order of their ids.

    Returns:
        32 hexadecimal digits.
    """
    content = json.dumps(surface_forms(vocabulary, len(vocabulary)))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _stored_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers. `state_dict` would serve, but it re-packs bitsandbytes' 4-bit weights."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def _summary(tensor: torch.Tensor) -> bytes:
    import torch

    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: a tensor made of tensors
        return b"".join(_summary(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    size = tensor.numel()
    if tensor.is_floating_point():
        positions = torch.arange(min(size, _SAMPLES_PER_TENSOR), device=tensor.device)
        if size > _SAMPLES_PER_TENSOR:
            positions = positions * _STRIDE % size
        values = tensor.reshape(-1)[positions].to(torch.bfloat16)
        return repr(tuple(tensor.shape)).encode() + values.view(torch.int16).cpu().numpy().tobytes()
    counts = torch.bincount(tensor.reshape(-1).view(torch.uint8), minlength=256).reshape(16, 16)
    # Half-bytes, because 4-bit weights are stored in pairs and the pairs change.
    halves = counts.sum(0) + counts.sum(1) if tensor.dtype == torch.uint8 else counts.reshape(-1)
    return halves.cpu().numpy().tobytes()
