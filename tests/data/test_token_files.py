"""A token cache's and a tokenizer's file: read as they were written, or refused with the field that is not."""

import json
import os

import numpy as np
import pytest
from tokenizers import Tokenizer

from taperlit.checkpoint.checksum import checksum, checksum_of
from taperlit.data.sources import Piece
from taperlit.data.tokenizer import END_OF_TEXT, largest_id, load_tokenizer, parse_tokenizer, train_tokenizer
from taperlit.data.tokens import check_tokens, read_meta, write_tokens
from taperlit.errors import TaperlitError


@pytest.fixture
def cache(tmp_path):
    tokenizer = train_tokenizer(iter(["abc abd"]), 257)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    write_tokens(tmp_path, [Piece(f"abc {i}", os.urandom(8), last=True) for i in range(20)], tokenizer, 0.5, None)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(dtype="<f4"), "it.dtype is '<f4', not '<u2' or '<u4'"),
        (lambda m: m["tokens"].update(train=-1), "it counts -1"),
        (lambda m: m["tokens"].update(train=True), "it.tokens.train is True, not an integer"),
        (lambda m: m["documents"].pop("val"), "it.documents.val is missing"),
        (lambda m: m["checksums"].pop("train.bin"), "it has the checksums of other files"),
        (lambda m: m["checksums"].update({"../x": 1}), "it has the checksums of other files"),
        (lambda m: m.update(more=1), "it.more is no field of it"),
        (lambda m: m.update(corpus=None), "it.corpus is None, not a text"),
    ],
)
def test_a_description_with_a_right_checksum_and_a_wrong_field_is_told(cache, change, words):
    meta = json.loads((cache / "meta.json").read_text())
    change(meta)
    meta["checksums"]["meta.json"] = checksum_of(meta)
    (cache / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"meta\.json is not as it was written: ") as error:
        read_meta(cache)
    assert words in str(error.value)


def test_a_token_that_its_tokenizer_has_not_is_told_though_the_checksums_are_right(cache):
    check_tokens(cache)
    meta = json.loads((cache / "meta.json").read_text())
    tokens = np.fromfile(cache / "val.bin", dtype="<u2")
    tokens[-1] = 257  # the first id that there is not
    tokens.tofile(cache / "val.bin")
    meta["checksums"]["val.bin"] = checksum(cache / "val.bin")
    (cache / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"val\.bin has the token 257, and its tokenizer's largest is 256"):
        check_tokens(cache)
    check_tokens(cache, at_most=0)  # which leaves it at the sizes


def test_a_small_file_is_checked_beside_large_ones(cache):
    """Of a cache too large to be read each time the tokenizer still is."""
    sizes = {name: (cache / name).stat().st_size for name in ("train.bin", "tokenizer.json")}
    meta = json.loads((cache / "meta.json").read_text())
    meta["tokens"]["train"] = sizes["tokenizer.json"]
    meta["checksums"]["meta.json"] = checksum_of(meta)
    (cache / "meta.json").write_text(json.dumps(meta))
    (cache / "train.bin").write_bytes(bytes(2 * sizes["tokenizer.json"]))  # not what its checksum is of
    check_tokens(cache, at_most=sizes["tokenizer.json"])
    text = (cache / "tokenizer.json").read_text()
    (cache / "tokenizer.json").write_text(text.replace("endoftext", "endOftext"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not as it was written"):
        check_tokens(cache, at_most=sizes["tokenizer.json"])
    with pytest.raises(ValueError, match=r"train\.bin is not as it was written"):
        check_tokens(cache)


def test_tokens_stop_after_the_very_document_that_reaches_the_limit(tmp_path):
    tokenizer = train_tokenizer(iter(["abc abd"]), 257)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    train, val = b"\xff" * 8, b"\0" * 8
    pieces = [
        Piece("abc ", train, last=False),
        Piece("abd", train, last=True),
        Piece("abc" * 99, val, last=True),  # counts for nothing
        Piece("abc", train, last=True),
        Piece("abd", val, last=True),
        Piece("abd", train, last=True),
    ]
    texts = ["abc abd", "abc", "abd"]
    ends = np.cumsum([len(tokenizer.encode(text).ids) + 1 for text in texts]).tolist()

    def kept(limit):
        meta = write_tokens(tmp_path, iter(pieces), tokenizer, 0.5, limit)
        check_tokens(tmp_path)
        text = tokenizer.decode(np.fromfile(tmp_path / "train.bin", "<u2").tolist(), skip_special_tokens=False)
        assert text.endswith(END_OF_TEXT)
        assert meta["documents"]["train"] == text.count(END_OF_TEXT)
        return text.split(END_OF_TEXT)[:-1], meta["documents"]["val"]

    assert kept(1) == kept(ends[0]) == (texts[:1], 0)
    assert kept(ends[0] + 1) == kept(ends[1]) == (texts[:2], 1)
    assert kept(ends[1] + 1) == kept(ends[2] + 1) == kept(None) == (texts, 2)


def test_ids_beyond_two_bytes_take_four_though_the_tokens_are_few(tmp_path):
    text = json.loads(train_tokenizer(iter(["abc abd"]), 257).to_str())
    vocab = text["model"]["vocab"]
    far = max(vocab, key=vocab.get)
    vocab[far] = 70_000
    tokenizer = Tokenizer.from_str(json.dumps(text))
    assert (tokenizer.get_vocab_size(), largest_id(tokenizer)) == (257, 70_000)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    pieces = [Piece(f"abc {far}", os.urandom(8), last=True)]
    meta = write_tokens(tmp_path, pieces, tokenizer, 0.5, None)
    assert meta["dtype"] == "<u4"
    (name,) = [split for split, count in meta["tokens"].items() if count]
    tokens = np.fromfile(tmp_path / f"{name}.bin", "<u4").tolist()
    assert tokens[:-1] == tokenizer.encode(f"abc {far}").ids


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_is_told_in_one_line(text):
    with pytest.raises(TaperlitError, match=r"The tokenizer it cannot be loaded: .*; use another\.$") as error:
        parse_tokenizer(text, "it")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("largest", "refused"), [(2**24 - 1, False), (2**24, True), (4_000_000_000, True)])
def test_a_tokenizer_whose_ids_no_model_has_is_refused_before_anything_counts_them(largest, refused):
    text = json.dumps(
        {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"abc": 0, "far": largest}, "unk_token": "abc"}}
    )
    if not refused:
        assert parse_tokenizer(text, "it").token_to_id("far") == largest
        return
    with pytest.raises(TaperlitError, match=rf"it cannot be loaded: its ids go up to {largest:,}, .* use another\."):
        parse_tokenizer(text, "it")


def test_a_tokenizer_that_panics_is_told_in_one_line(monkeypatch):
    class PanicError(BaseException):
        """As Rust's panics are raised: no Exception."""

    def panics(text):
        raise PanicError("index out of\nbounds")

    monkeypatch.setattr(Tokenizer, "from_str", panics)
    with pytest.raises(TaperlitError, match="cannot be loaded: index out of bounds; use another"):
        parse_tokenizer("{}", "it")


def test_a_tokenizers_file_that_is_no_text_or_not_given(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"a": "caf\xe9"}')
    with pytest.raises(TaperlitError, match=r"tokenizer\.json' cannot be loaded: it is no text in UTF-8; use another"):
        load_tokenizer(str(path))

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_text", denied)
    with pytest.raises(TaperlitError, match=r"data\.tokenizer: .*tokenizer\.json cannot be read: Permission denied\.$"):
        load_tokenizer(str(path))
