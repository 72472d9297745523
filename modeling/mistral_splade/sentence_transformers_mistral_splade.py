"""The module that sentence-transformers' `SparseEncoder` builds from a Mistral-SPLADE checkpoint.

`MistralSpladeForRetrieval.save_pretrained` names it in `modules.json`; `SparseEncoder(folder,
trust_remote_code=True)` then gives the model's own vectors, in every attention mode, through the fused head.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

try:
    from sentence_transformers.base.modules import InputModule
except ImportError:  # the file travels with every checkpoint; it is used only where sentence-transformers is installed
    from torch.nn import Module as InputModule

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers_mistral_splade.MistralSpladeEncoder"},
]
SPARSE_ENCODER_CONFIG: dict[str, object] = {
    "model_type": "SparseEncoder",
    "similarity_fn_name": "dot",
    "prompts": {},
    "default_prompt_name": None,
}


def write_sparse_encoder_files(folder) -> None:
    """Make `SparseEncoder(folder, trust_remote_code=True)` build `MistralSpladeEncoder`."""
    for name, content in (("modules", MODULES), ("config_sentence_transformers", SPARSE_ENCODER_CONFIG)):
        (Path(folder) / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class MistralSpladeEncoder(InputModule):
    """Texts to `sentence_embedding` (batch, vocab_size) float32: the processor's templates and the retrieval model.

    `encode_query` uses the query template, `encode_document` and `encode` the document template. A
    sentence-transformers prompt fills the template's `%%prompt%%` where it has one and is put before the text where
    it has none. Of each vector the `top_k_query` or `top_k_document` largest weights of the configuration are kept.
    """

    def __init__(self, model, processor):
        super().__init__()
        self.model = model
        self.processor = model.check_processor(processor)

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens kept of a document, per copy."""
        return self.processor.max_document_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"max_seq_length must be at least 1; found {value}")
        self.processor.max_document_length = self.processor.max_query_length = value

    def get_embedding_dimension(self) -> int:
        return self.model.config.vocab_size

    def preprocess(self, inputs, prompt=None, task=None, **kwargs):
        kind = "query" if task == "query" else "document"
        template = self.processor.query_template if kind == "query" else self.processor.document_template
        values = {}
        if prompt and "%%prompt%%" in template:
            values = {"prompt": prompt}
        elif prompt:
            inputs = [prompt + text for text in inputs]
        features = dict(self.processor.process([(kind, {"text": text, **values}) for text in inputs]))
        return {**features, "top_k": getattr(self.model.config, f"top_k_{kind}")}

    def forward(self, features, **kwargs):
        names = [*self.processor.model_input_names, "position_ids"]
        inputs = {name: features[name] for name in names if name in features}
        embedding = self.model(**inputs).sparse_embedding
        if features.get("top_k") is not None:
            kept = embedding.argsort(dim=1, descending=True, stable=True)[:, : features["top_k"]]
            embedding = torch.zeros_like(embedding).scatter(1, kept, embedding.gather(1, kept))
        features["sentence_embedding"] = embedding
        return features

    def save(self, output_path, *args, safe_serialization=True, **kwargs):
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path,
        subfolder="",
        token=None,
        cache_folder=None,
        revision=None,
        local_files_only=False,
        trust_remote_code=False,
        model_kwargs=None,
        processor_kwargs=None,
        config_kwargs=None,
        **kwargs,
    ):
        source = {
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        model = AutoModel.from_pretrained(
            model_name_or_path, **{**source, **(config_kwargs or {}), **(model_kwargs or {})}
        )
        processor = AutoProcessor.from_pretrained(model_name_or_path, **{**source, **(processor_kwargs or {})})
        return cls(model, processor)
