"""The module that sentence-transformers' `MultiVectorEncoder` builds from a ColBERT-XM checkpoint.

`ColBERTXMForRetrieval.save_pretrained` names it in `modules.json`; `MultiVectorEncoder(folder,
trust_remote_code=True)` then gives the model's own vectors. sentence-transformers' own modules know neither the
language of a text nor the `"replace"` form of the marker.
"""

import json
from pathlib import Path

from transformers import AutoModel, AutoProcessor

try:
    from sentence_transformers.base.modules import InputModule
except ImportError:  # the file travels with every checkpoint; it is used only where sentence-transformers is installed
    from torch.nn import Module as InputModule

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers_colbert_xm.ColBERTXMEncoder"},
]
MULTI_VECTOR_ENCODER_CONFIG: dict[str, object] = {
    "model_type": "MultiVectorEncoder",
    "similarity_fn_name": "maxsim",
    "prompts": {},
    "default_prompt_name": None,
}


def write_multi_vector_encoder_files(folder) -> None:
    """Make `MultiVectorEncoder(folder, trust_remote_code=True)` build `ColBERTXMEncoder`: write `modules.json` and
    `config_sentence_transformers.json` into a checkpoint folder. Raises OSError where that cannot be."""
    for name, content in (("modules", MODULES), ("config_sentence_transformers", MULTI_VECTOR_ENCODER_CONFIG)):
        (Path(folder) / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class ColBERTXMEncoder(InputModule):
    """Texts to `token_embeddings` (batch, length, dim) float32 and `attention_mask` (batch, length), True where the
    vector counts: all of a query's, `<mask>`s included; of a document's all but padding and punctuation.

    `encode_query`, `encode_document` and `encode` take `language`: X-MOD code, ISO code or BCP-47 tag of all texts, or
    a function from text to language. Without it the checkpoint's `default_language` counts. A sentence-transformers
    prompt is put before the text.
    """

    forward_kwargs = {"language"}

    def __init__(self, model, processor):
        super().__init__()
        self.model = model
        self.processor = model.check_processor(processor)

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens kept of a document; `processor.max_query_length` is the length of a query."""
        return self.processor.max_document_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.processor.max_document_length = value

    def get_embedding_dimension(self) -> int:
        """Components of a token vector."""
        return self.model.config.dim

    def preprocess(self, inputs, prompt=None, task=None, language=None, **kwargs):
        """The processor's tensors, int64 (batch, length), of queries for `task="query"` and of documents otherwise, and
        `lang_ids`, int64 (batch,).

        Raises:
            ValueError: no adapter for the language, or a list of languages.
        """
        if not (language is None or isinstance(language, str) or callable(language)):
            # sentence-transformers sorts the texts by length before they come here.
            raise ValueError(
                f"language must be one for all texts, or a function from text to language; found "
                f"{type(language).__name__}. Encode the texts of each language by themselves"
            )
        lang_ids = self.model.language_ids(language, inputs)
        texts = [prompt + text for text in inputs] if prompt else list(inputs)
        return {**self.processor(texts, kind="query" if task == "query" else "document"), "lang_ids": lang_ids}

    def forward(self, features, **kwargs):
        """The features of `preprocess` with `token_embeddings` (batch, length, dim) float32 and `attention_mask`."""
        names = [*self.processor.model_input_names, "lang_ids"]
        output = self.model(**{name: features[name] for name in names if name in features})
        features["token_embeddings"] = output.embeddings
        features["attention_mask"] = output.mask
        return features

    def save(self, output_path, *args, safe_serialization=True, **kwargs):
        """Write model and processor into the folder."""
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
        """From a checkpoint folder or Hub repository; `config_kwargs` and `model_kwargs` go to `AutoModel` (such as
        `languages`), `processor_kwargs` to `AutoProcessor`."""
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
