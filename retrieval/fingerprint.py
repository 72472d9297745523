"""Fingerprints: short hashes by which vectors of different models, or of different settings, are told apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
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
    "attention_probs_dropout_prob",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "default_language",
    "dtype",
    "eos_token_id",
    "head_chunk_size",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "label2id",
    "languages",
    "max_position_embeddings",
    "pad_token_id",
    "quantization_config",
    "return_dict",
    "similarity",
    "top_k_document",
    "top_k_query",
    "transformers_version",
    "use_cache",
}

# A language's adapters, by the name that X-MOD gives them.
_ADAPTER = re.compile(r"\.adapter_modules\.([^.]+)\.")


def model_fingerprint(model: torch.nn.Module, processor: Any = None) -> str:
    """Hash of the function that a model computes: its weights and the settings that change its output.

    Of every weight tensor a fixed sample of 1024 values is hashed, rounded to bfloat16: the same checkpoint has one
    fingerprint on every device and whether it is loaded in float32 or bfloat16, and a fine-tuned one has another. Of
    quantized tensors all values count (not their order, which bitsandbytes changes while it runs): a quantized variant
    has a fingerprint of its own.

    Language adapters do not count: their languages share one vector space, and copies of a checkpoint with fewer, more
    or other adapters give the same vectors in all languages that they have in common. So an adapter that was trained
    anew is not noticed, as a new language is not; `adapter_fingerprint` notices it.

    Args:
        model: a transformers model, also with PEFT adapters.
        processor: the model's. Where queries and documents are comparable only with equal settings of the processor
            (its `shared_settings`; late interaction has such), they become part of the fingerprint.

    Returns:
        32 hexadecimal digits, and `;name=value` for every shared setting.
    """
    settings = model.config.to_dict()  # type: ignore[union-attr, operator]
    relevant = {name: value for name, value in settings.items() if value and name not in _IRRELEVANT_SETTINGS}
    tensors = ((name, tensor) for name, tensor in _stored_tensors(model) if not _ADAPTER.search(name))
    digits = _digest(json.dumps(relevant, sort_keys=True, default=str), tensors)
    shared = getattr(processor, "shared_settings", {})
    return ";".join([digits, *(f"{name}={value}" for name, value in shared.items())])


def adapter_fingerprint(model: torch.nn.Module, languages: Iterable[str]) -> str:
    """Hash of the adapters of some languages, which `model_fingerprint` leaves out.

    Args:
        model: a model with language adapters.
        languages: their codes, as the configuration lists them.

    Returns:
        32 hexadecimal digits.
    """
    wanted = set(languages)
    found = ((name, tensor, _ADAPTER.search(name)) for name, tensor in _stored_tensors(model))
    return _digest("", ((name, tensor) for name, tensor, match in found if match and match[1] in wanted))


def difference(first: str | None, second: str | None) -> tuple[str, str] | None:
    """What the fingerprints of two models say of them that is not the same; None where their vectors can be compared.

    A setting that only one of them tells of is passed over.

    Returns:
        Of the first and of the second, "by model …", or "with name=value, …" where shared settings differ.
    """
    if first == second:
        return None
    models, settings = zip(*(_parts(fingerprint) for fingerprint in (first, second)))
    if models[0] != models[1]:
        return models
    names = [name for name, value in settings[0].items() if settings[1].get(name, value) != value]
    if not names:
        return None
    told = ["with " + ", ".join(f"{name}={values[name]}" for name in names) for values in settings]
    return told[0], told[1]


def _parts(fingerprint: str | None) -> tuple[str, dict[str, str]]:
    if fingerprint is None:
        return "by an unknown model", {}
    digits, *settings = fingerprint.split(";")
    return f"by model {digits}", dict(setting.split("=", 1) for setting in settings)


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


def _digest(content: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    fingerprint = hashlib.blake2b(content.encode(), digest_size=16)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        fingerprint.update(name.encode())
        fingerprint.update(_summary(tensor))
    return fingerprint.hexdigest()


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
