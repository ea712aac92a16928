import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from taperlit.data.tokenizer import train_tokenizer
from taperlit.decode.text import HALF, TextStream


def byte_level() -> Tokenizer:
    return train_tokenizer(iter(["añb" * 50 + "漢字 text 😀 the quick"] * 3), 280)


def byte_fallback() -> Tokenizer:
    """As Llama's: a space belongs to the word after it, and is stripped at a text's start; unknown bytes are tokens."""
    words = ["▁", "h", "e", "l", "o", "▁h", "w", "r", "d", "▁w", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "h"), ("▁", "w")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def push(stream: TextStream, tokens: list[int]) -> str:
    stream.take(tokens)
    return stream.piece()


@pytest.mark.parametrize("build", [byte_level, byte_fallback])
def test_pieces_join_to_the_text_and_never_show_half_a_character(build):
    tokenizer = build()
    for text in ("é漢字z", "hello world", " wohl", "h é😀 w"):
        whole = tokenizer.encode(f"he{text}").ids
        prompt = tokenizer.encode("he").ids
        assert whole[: len(prompt)] == prompt
        stream = TextStream(tokenizer, prompt)
        pieces = [push(stream, [token]) for token in whole[len(prompt) :]]
        assert not any(HALF in piece for piece in pieces)
        assert len([piece for piece in pieces if piece]) > 1
        assert stream.rest() == ""
        assert "".join(pieces) == stream.text == text
        several = TextStream(tokenizer, prompt)  # as from a GPU, several tokens at a time
        assert push(several, whole[len(prompt) : -1]) + push(several, whole[-1:]) + push(several, []) == text


def test_any_tokens_make_the_text_that_the_tokenizer_makes_of_them():
    tokenizer, draw = byte_level(), random.Random(0)
    for _ in range(300):
        tokens = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(draw.randrange(1, 12))]
        stream = TextStream(tokenizer, tokenizer.encode("the").ids)
        shown = "".join(push(stream, [token]) for token in tokens) + stream.rest()
        assert shown == stream.text == tokenizer.decode(tokens)


def test_bytes_that_spoil_what_was_shown_do_not_stop_the_text():
    tokenizer, draw = byte_fallback(), random.Random(0)
    prompt = tokenizer.encode("hello wor").ids
    before = tokenizer.decode(prompt)
    for _ in range(300):
        tokens = [draw.randrange(3, tokenizer.get_vocab_size()) for _ in range(draw.randrange(1, 12))]
        stream = TextStream(tokenizer, prompt)
        shown = "".join(push(stream, [token]) for token in tokens) + stream.rest()
        assert stream.text == tokenizer.decode([*prompt, *tokens]).removeprefix(before)
        if HALF not in stream.text:
            assert shown == stream.text


def test_a_character_that_never_comes_whole_is_shown_at_the_end():
    tokenizer = byte_level()
    tokens = tokenizer.encode("a漢").ids
    stream = TextStream(tokenizer)
    assert push(stream, tokens[:-1]) == ""
    assert stream.rest() == stream.text == f"a{HALF}"
    assert stream.rest() == ""


def test_a_text_ends_at_a_stop_token_at_its_limit_or_where_its_row_ended():
    tokenizer = byte_level()
    a, b, c = tokenizer.encode("acz").ids
    for tokens, options, ended, text in (
        ([a, b, c, a], dict(stop={c}), "stop", "ac"),
        ([a, -1, -1], dict(), "stop", "a"),
        ([a, b, c], dict(limit=2), "length", "ac"),
        ([a, b, c], dict(limit=2, stop={c}), "length", "ac"),
        ([a, c, b], dict(limit=2, stop={c}), "stop", "a"),
        ([a, b], dict(limit=3, stop={c}), None, "ac"),
        ([a, 0], dict(stop={0}), "stop", "a"),
        ([a, 0, b], dict(), None, "ac"),  # the end-of-text token is not shown
    ):
        stream = TextStream(tokenizer, **options)
        for token in tokens:
            push(stream, [token])
        assert (stream.ended, stream.text) == (ended, text)
        assert push(TextStream(tokenizer, **options), tokens) == text
    assert push(TextStream(tokenizer, limit=2), [a, b, c]) == "ac"
