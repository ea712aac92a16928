"""Byte-level BPE: trained on the corpus, or loaded."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from taperlit.errors import TaperlitError
from taperlit.hub.load import tokenizer_json_of
from taperlit.transformer import LARGEST

END_OF_TEXT = "<|endoftext|>"
# A chat model's eos ends a turn, not a document (SmolLM2: <|im_end|>); what it was pretrained with is still here.
_KNOWN_ENDS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<EOS_TOKEN>",
    "[EOS]",
)


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
    """A tokenizer from a ``tokenizer.json``, a folder that has one, a pretrained model's folder or ``.gguf`` file, or,
    by name, from the hub.

    It neither truncates nor pads, whatever its file says: a document is all of its tokens.

    Raises:
        TaperlitError: no such file or folder, a damaged one, one without a tokenizer, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json" and not path.exists():
        raise TaperlitError(f"data.tokenizer: there is no file {path}.")
    try:
        is_there = path.exists()
        text = _text_of(path) if is_there else ""
    except OSError as error:
        raise TaperlitError(f"data.tokenizer: {error.filename or path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TaperlitError(f"The tokenizer {name!r} cannot be loaded: it is no text in UTF-8; use another.") from error
    return parse_tokenizer(text, repr(name)) if is_there else _loaded(repr(name), Tokenizer.from_pretrained, name)


def parse_tokenizer(text: str, source: str) -> Tokenizer:
    """A tokenizer of the text of a ``tokenizer.json``. As :func:`load_tokenizer`'s it neither truncates nor pads.

    Args:
        text: of the file.
        source: what it came from, for the error's message.

    Raises:
        TaperlitError: it is no tokenizer.
    """
    return _loaded(source, Tokenizer.from_str, text)


def _loaded(source: str, load: Callable[[str], Tokenizer], what: str) -> Tokenizer:
    try:
        tokenizer = load(what)
        if (largest := largest_id(tokenizer)) >= LARGEST["vocab_size"]:  # writing it goes through every number below
            raise ValueError(f"its ids go up to {largest:,}, and no model has more than {LARGEST['vocab_size']:,}")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and where its Rust panics something beside them
        reason = " ".join(str(error).split())[:200]
        raise TaperlitError(f"The tokenizer {source} cannot be loaded: {reason}; use another.") from error


def largest_id(tokenizer: Tokenizer) -> int:
    """The largest id that it gives a token: its size less 1, unless there are gaps."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _text_of(path: Path) -> str:
    own = path / "tokenizer.json" if path.is_dir() else path
    if own.is_file() and own.suffix != ".gguf":
        return own.read_text(encoding="utf-8")
    text = tokenizer_json_of(str(path))
    if text is None:
        raise TaperlitError(f"data.tokenizer: {path} has no tokenizer that a tokenizer.json can hold.")
    return text


def end_of_text_id(tokenizer: Tokenizer, eos_token: str | None = None) -> int:
    """Id of the token that ends a document.

    Args:
        tokenizer: of the documents.
        eos_token: what its model's ``tokenizer_config.json`` calls so; taken where no token has a known name.

    Raises:
        TaperlitError: it has neither.
    """
    for token in (*_KNOWN_ENDS, *([eos_token] if eos_token else [])):
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return token_id
    raise TaperlitError(f"The tokenizer has no end-of-text token; it needs one of {', '.join(_KNOWN_ENDS)}.")


def fingerprint(tokenizer_json: str) -> str:
    """SHA-256 of the tokenizer's text."""
    return hashlib.sha256(tokenizer_json.encode()).hexdigest()
