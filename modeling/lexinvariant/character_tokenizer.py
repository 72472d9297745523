"""The 128 characters of ASCII as a tokenizer: the vocabulary of the paper's character models (arXiv 2305.16349)."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

# Names that no ASCII text contains: every such text has exactly its own codes for ids.
PAD_TOKEN = "⟨pad⟩"
EOS_TOKEN = "⟨eos⟩"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are ASCII codes, with 128 for padding and 129 for the end of a text.

    Other characters are dropped. `decode` gives back every ASCII text to the letter, control characters and leading
    spaces included. Nothing is added to a text; padding is on the left, as generation wants it. It is made of parts of
    the library `tokenizers` only: saved, it opens through `AutoTokenizer` on any machine.
    """
    # A BPE without merges splits into characters.
    backend = Tokenizer(models.BPE(vocab={chr(code): code for code in range(128)}, merges=[]))
    backend.normalizer = normalizers.Replace(Regex(r"[^\x00-\x7F]"), "")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD_TOKEN, EOS_TOKEN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
