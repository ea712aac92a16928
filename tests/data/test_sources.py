import gzip
import json
import sysconfig

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from taperlit.data import sources
from taperlit.data.sources import expand_globs, python_files, read_files, read_hub
from taperlit.errors import TaperlitError

TEXTS = ["first\ndocument", "second: ünïcödé 漢字\u2028same document", 'third "quoted" \\ back\\slash']


def documents(pieces) -> list[str]:
    texts, current = [], ""
    for piece in pieces:
        current += piece.text
        if piece.last:
            texts.append(current)
            current = ""
    assert not current
    return texts


def write(path, rows):
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    if path.suffix == ".zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(text.encode()))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_rows_of_every_format(tmp_path, name):
    # The metadata changes shape from row to row, as the Pile's does; parquet has one schema.
    metas = [{"set": "a"}, {"set": "b"}, {"set": "c"}] if "parquet" in name else [{"set": "a"}, {"x": [1]}, None]
    path = write(tmp_path / name, [{"text": t, "meta": m} for t, m in zip(TEXTS, metas, strict=True)])
    assert documents(read_files([path], "text")) == TEXTS


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
@pytest.mark.parametrize(("name", "other"), [("a[1]", "a1"), ("a?", "ab"), ("a*", "abc"), ("a[!b]", "ac")])
def test_a_name_that_is_a_pattern_too_is_that_file_alone(tmp_path, suffix, name, other):
    def make(name):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "txt":
            path.write_text(name)
            return str(path)
        return write(path, [{"text": name}])

    alone = make(name)
    assert documents(read_files([alone], "text")) == [name]
    make(other)
    assert documents(read_files([alone], "text")) == [name]
    assert sorted(documents(read_files(expand_globs(str(tmp_path / "*")), "text"))) == sorted([name, other])


def test_other_files_are_a_document_each(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.py.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    (tmp_path / "empty.txt").write_text("")
    files = expand_globs(str(tmp_path / "*"))
    assert documents(read_files(files, "text")) == TEXTS[:2]


def test_null_and_empty_rows_are_passed_over(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": None}, {"text": ""}, {"text": "x"}])
    assert documents(read_files([path], "text")) == ["x"]


@given(text=st.text(min_size=1, max_size=200), size=st.integers(1, 30))
def test_cutting_loses_nothing(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARACTERS", size)
        parts = list(sources._cut(text))
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_giant_document_comes_in_pieces_with_one_hash(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 1000)
    text = "".join(f"line {i} é\n" for i in range(2000))
    path = tmp_path / f"a{suffix}"
    path.write_text(text if suffix == ".txt" else json.dumps({"text": text}))
    pieces = list(read_files([str(path)], "text"))
    assert len(pieces) > 15
    assert documents(pieces) == [text]
    assert len({piece.document for piece in pieces}) == 1
    assert max(len(piece.text) for piece in pieces) <= 1100


def test_the_hash_is_of_the_text_wherever_it_lies(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[1])
    rows = write(tmp_path / "b.jsonl", [{"text": TEXTS[1]}])
    hashes = {piece.document for piece in read_files([str(tmp_path / "a.txt"), rows], "text")}
    assert len(hashes) == 1


def test_bytes_that_are_not_utf8_are_replaced_and_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and \xff more")
    with pytest.warns(UserWarning, match=r"a\.txt: 2 byte sequences are not UTF-8"):
        assert documents(read_files([str(tmp_path / "a.txt")], "text")) == ["caf\ufffd and \ufffd more"]
    lines = b'{"text": "caf\xe9"}\r\n{"text": "\\ud800 lone"}\n'
    for name, content in (("b.jsonl", lines), ("b.jsonl.gz", gzip.compress(lines))):
        (tmp_path / name).write_bytes(content)
        texts = documents(read_files([str(tmp_path / name)], "text"))
        assert texts[0] == "caf\ufffd"
        assert texts[1].endswith(" lone")
        texts[1].encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}', r"no column 'text'; set data.text_column to one of body, id"),
        ("a.jsonl", b'{"text": 3}', "column 'text' holds int"),
        ("a.jsonl", b'{"text": "x"}\n{"text', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]", "line 1 is not a JSON object"),
        ("a.jsonl.zst", b"not zstd at all", r"a\.jsonl\.zst cannot be read"),
        ("a.parquet", b"not parquet", r"a\.parquet cannot be read"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaperlitError, match=message) as error:
        list(read_files([str(tmp_path / name)], "text"))
    assert "\n" not in str(error.value)


def test_a_glob_without_files_is_refused(tmp_path):
    with pytest.raises(TaperlitError, match=r"no file matches .*\*\.parquet"):
        expand_globs([str(tmp_path / "*.parquet")])


def test_python_source_of_this_machine():
    files = python_files()
    assert any(path.endswith("argparse.py") for path in files)
    assert not any("site-packages" in path or "/test/" in path for path in files)
    assert set(files) < set(python_files(packages=True))
    assert any(path.startswith(sysconfig.get_paths()["purelib"]) for path in python_files(packages=True))


def test_hub_rows_and_a_hub_out_of_reach(monkeypatch):
    import datasets

    calls = []

    def load(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "offline/set":
            raise ConnectionError("Couldn't reach\nthe hub")
        return [{"story": text} for text in TEXTS]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert documents(read_hub("some/set", "en", "train", True, "story")) == TEXTS
    assert calls == [("some/set", "en", "train", True)]
    with pytest.raises(TaperlitError, match=r"'offline/set' cannot be loaded .*set data\.files") as error:
        list(read_hub("offline/set", None, "train", True, "text"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("told", ["Couldn't reach\nthe hub", ""])
def test_a_hub_data_set_that_fails_under_way_is_named(monkeypatch, told):
    import datasets

    def rows(*args, **options):
        yield {"story": TEXTS[0]}
        raise ConnectionError(told)

    monkeypatch.setattr(datasets, "load_dataset", rows)
    pieces = read_hub("some/set", None, "train", True, "story")
    assert next(pieces).text == TEXTS[0]
    reason = "Couldn't reach the hub" if told else "ConnectionError"
    with pytest.raises(
        TaperlitError, match=rf"'some/set' cannot be read to its end \({reason}\); begin again"
    ) as error:
        next(pieces)
    assert "\n" not in str(error.value)
    with pytest.raises(
        TaperlitError, match=r"^some/set has no column 'text'; set data\.text_column to one of story\.$"
    ):
        list(read_hub("some/set", None, "train", True, "text"))
