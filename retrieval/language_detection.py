"""Languages of texts, told from the texts: a function for the `language` of multilingual retrievers."""

from __future__ import annotations

from typing import Any


class LanguageDetector:
    """Tells the language of a text among those that a model has adapters for; deterministic, and never a default.

    `model.encode_documents(texts, language=LanguageDetector(model.config))` detects text by text. Short texts are
    guesses: name the language where it is known.

    Args:
        config: a configuration with `languages`, `default_language` and `language_id`.

    Raises:
        ImportError: py3langid (arXiv 1107.0001's langid.py with its model) is not installed.
        ValueError: it knows none of the languages.
    """

    def __init__(self, config: Any):
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError as error:
            raise ImportError(
                f"detecting languages needs py3langid: pip install 'rarezoo[retrieval]' ({error})"
            ) from error
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
        self._default = config.default_language
        self._codes: dict[str, str] = {}
        for name in self._identifier.labels:
            try:
                self._codes[name] = config.languages[config.language_id(name)]
            except ValueError:  # no adapter
                continue
        if not self._codes:
            raise ValueError(f"none of the model's languages can be detected: {', '.join(config.languages)}")
        self._identifier.set_languages(list(self._codes))

    def __call__(self, text: str) -> str:
        """The code of a text's language; the default language's where there is nothing to tell it by."""
        return self._codes[self._identifier.classify(text)[0]] if any(map(str.isalpha, text)) else self._default
