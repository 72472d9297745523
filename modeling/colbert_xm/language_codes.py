"""Languages by the names people use, as the codes of X-MOD's adapters (such as en_XX, pt_XX, zh_TW)."""

import re
from collections.abc import Sequence

# ISO 639-2 and 639-3 -> the code that X-MOD's list uses (ISO 639-1 where there is one).
_THREE_LETTERS = {
    "afr": "af", "als": "sq", "amh": "am", "ara": "ar", "arb": "ar", "aze": "az", "azj": "az", "bel": "be", "ben": "bn",
    "baq": "eu", "bul": "bg", "bur": "my", "cat": "ca", "ces": "cs", "chi": "zh", "cmn": "zh", "cym": "cy", "cze": "cs",
    "dan": "da", "deu": "de", "dut": "nl", "ell": "el", "eng": "en", "epo": "eo", "est": "et", "eus": "eu", "fas": "fa",
    "ekk": "et", "fil": "tl", "fin": "fi", "fra": "fr", "fre": "fr", "geo": "ka", "ger": "de", "gle": "ga", "glg": "gl",
    "gre": "el", "guj": "gu", "hau": "ha", "heb": "he", "hin": "hi", "hrv": "hr", "hun": "hu", "hye": "hy", "arm": "hy",
    "ice": "is", "ind": "id", "isl": "is", "ita": "it", "jpn": "ja", "kan": "kn", "kat": "ka", "kaz": "kk", "khk": "mn",
    "khm": "km", "kir": "ky", "kmr": "ku", "kor": "ko", "kur": "ku", "lao": "lo", "lat": "la", "lav": "lv", "lit": "lt",
    "lvs": "lv", "mac": "mk", "mal": "ml", "mar": "mr", "may": "ms", "mkd": "mk", "mon": "mn", "msa": "ms", "mya": "my",
    "nep": "ne", "nld": "nl", "nno": "no", "nob": "no", "nor": "no", "npi": "ne", "ori": "or", "ory": "or", "pan": "pa",
    "pbt": "ps", "per": "fa", "pes": "fa", "pol": "pl", "por": "pt", "pus": "ps", "ron": "ro", "rum": "ro", "rus": "ru",
    "san": "sa", "sin": "si", "slk": "sk", "slo": "sk", "slv": "sl", "som": "so", "spa": "es", "sqi": "sq", "alb": "sq",
    "srp": "sr", "swa": "sw", "swe": "sv", "swh": "sw", "tam": "ta", "tel": "te", "tgl": "tl", "tha": "th", "tur": "tr",
    "ukr": "uk", "urd": "ur", "uzb": "uz", "uzn": "uz", "vie": "vi", "wel": "cy", "zho": "zh", "zsm": "ms",
}  # fmt: skip
# Old and narrower codes of BCP-47's registry.
_TWO_LETTERS = {"in": "id", "iw": "he", "nb": "no", "nn": "no"}
_CODE = re.compile(r"[a-z]{2,3}_([A-Z]{2}|[A-Z][a-z]{3})")
_TRADITIONAL_CHINESE = {"tw", "hk", "mo", "hant"}
_SIMPLIFIED_CHINESE = {"cn", "sg", "hans"}


def find_language(language: str, codes: Sequence[str]) -> str:
    """The one of `codes` that stands for a language.

    Args:
        language: an X-MOD code ("pt_XX"), ISO 639 code ("pt", "por") or BCP-47 tag ("pt-BR", "zh-Hant-HK"); case does
            not matter. Region and script choose between two codes of one language, and are ignored otherwise.
        codes: of the adapters.

    Raises:
        TypeError: not a string.
        ValueError: none of the codes fits; the message lists them.
    """
    if not isinstance(language, str):
        raise TypeError(f"a language must be a string such as 'fr_XX', 'fr' or 'fr-CA'; found {language!r}")
    for code in codes:
        if code.lower() == language.strip().lower():
            return code
    wanted, detail = _parse(language)
    candidates = [(code, *_parse(code)) for code in codes]
    same = [(code, region) for code, name, region in candidates if name == wanted]
    if detail & {"hans", "hant"}:  # the script says more than the region
        detail &= {"hans", "hant"}
    if wanted == "zh":
        same = [(code, region) for code, region in same if not _is_other_script(detail, region)]
        same.sort(key=lambda pair: bool(pair[1] & _TRADITIONAL_CHINESE))  # simplified, unless the tag says otherwise
    exact = [code for code, region in same if region & detail]
    if exact or same:
        return exact[0] if exact else same[0][0]
    raise ValueError(f"no adapter for the language {language!r}; expected one of {', '.join(codes)}")


def check_code(code: str) -> None:
    """See that an adapter can have this name.

    Args:
        code: in X-MOD's form: ISO 639 code, underscore, region or "XX" (or a script), such as "rw_RW", "yue_Hant".
            Other names could be those of attributes of a module.

    Raises:
        ValueError: the code has another form.
    """
    if not isinstance(code, str) or not _CODE.fullmatch(code):
        raise ValueError(f"a language's code must have the form xx_YY, such as 'eu_ES' or 'eo_XX'; found {code!r}")


def check_new_code(code: str, codes: Sequence[str]) -> None:
    """See that a language can be added under this code, beside the adapters of `codes`.

    Raises:
        ValueError: there is an adapter of this name already, or the code has not the form of `check_code`.
    """
    if isinstance(code, str) and code.lower() in (known.lower() for known in codes):
        raise ValueError(f"there is an adapter for {code!r} already")
    check_code(code)


def _parse(tag: str) -> tuple[str, set[str]]:
    """Language and the other subtags, lower case."""
    language, *others = tag.strip().lower().replace("_", "-").split("-")
    return _THREE_LETTERS.get(language, _TWO_LETTERS.get(language, language)), set(others) - {"xx"}


def _is_other_script(first: set[str], second: set[str]) -> bool:
    both = ((first, second), (second, first))
    return any(one & _TRADITIONAL_CHINESE and other & _SIMPLIFIED_CHINESE for one, other in both)
