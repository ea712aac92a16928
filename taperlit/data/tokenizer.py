"""Byte-level BPE: trained on the corpus, or loaded."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from taperlit.errors import TaperlitError

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with an end-of-text token (id 0).

    Args:
        texts: the documents; read once.
        vocab_size: tokens, the 256 bytes and the end-of-text token included.

    Raises:
        TaperlitError: a vocabulary too small for the bytes, or too large for the text.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise TaperlitError(f"data.vocab_size {vocab_size} is too small: bytes and end-of-text alone are 257.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise TaperlitError(
            f"The text gives only {tokenizer.get_vocab_size()} tokens; set data.vocab_size to that or add text."
        )
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer from a ``tokenizer.json`` or, by name, from the hub.

    Raises:
        TaperlitError: no such file, a damaged one, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json" and not path.exists():
        raise TaperlitError(f"data.tokenizer: there is no file {path}.")
    try:
        return Tokenizer.from_str(path.read_text()) if path.exists() else Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = " ".join(str(error).split())[:200]
        raise TaperlitError(f"The tokenizer {name!r} cannot be loaded: {reason}") from error


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document.

    Raises:
        TaperlitError: it has none under a known name.
    """
    for token in _KNOWN_ENDS:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return token_id
    raise TaperlitError(f"The tokenizer has no end-of-text token; it needs one of {', '.join(_KNOWN_ENDS)}.")


def fingerprint(tokenizer_json: str) -> str:
    """SHA-256 of the tokenizer's text."""
    return hashlib.sha256(tokenizer_json.encode()).hexdigest()
