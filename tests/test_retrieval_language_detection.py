"""Languages told from texts: only those that the model has, the same on every call, the default where nothing tells."""

import pytest

from rarezoo import ColBERTXMConfig
from rarezoo.configs import load_preset
from rarezoo.retrieval import LanguageDetector

pytest.importorskip("py3langid")

TEXTS = {
    "en_XX": "The capital of France lies on the river Seine.",
    "fr_XX": "La Loire est le plus long fleuve de France.",
    "de_DE": "Die Hauptstadt von Deutschland ist eine große Stadt.",
    "sw_KE": "Maji yake yanatoka ziwa Victoria na mto mrefu.",
    "ja_XX": "富士山は日本で一番高い山です。",
    "zh_CN": "北京是中国的首都。",
    "ar_AR": "القاهرة هي عاصمة مصر وأكبر مدنها.",
}


def test_each_text_has_its_language():
    detect = LanguageDetector(load_preset("colbert_xm", "colbert-xm"))
    for _ in range(2):
        assert {code: detect(text) for code, text in TEXTS.items()} == {code: code for code in TEXTS}
    assert [detect(text) for text in ("", " ", "3.14 + 2", "…")] == ["en_XX"] * 4


def test_only_languages_of_the_model():
    detect = LanguageDetector(ColBERTXMConfig(languages=["sw_KE", "fr_XX"], default_language="fr_XX"))
    assert {detect(text) for text in TEXTS.values()} <= {"sw_KE", "fr_XX"}
    assert detect(TEXTS["sw_KE"]) == "sw_KE" and detect("...") == "fr_XX"
    with pytest.raises(ValueError, match="none of the model's languages can be detected: tlh_XX"):
        LanguageDetector(ColBERTXMConfig(languages=["tlh_XX"], default_language="tlh_XX"))
