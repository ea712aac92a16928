import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn
from tokenizers import Tokenizer

from taperlit import LanguageModel, Trainer
from taperlit.data import TextDataModule
from taperlit.data import module as data_module
from taperlit.data.loader import BlockSampler, ResumableLoader
from taperlit.data.sources import Piece
from taperlit.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from taperlit.data.tokens import TokenBlocks, check_tokens, split_of, write_tokens
from taperlit.errors import TaperlitError


def build(corpus, **options):
    defaults = {"files": str(corpus / "*"), "vocab_size": 300, "block_size": 32, "batch_size": 4, "val_fraction": 0.2}
    data = TextDataModule(**{**defaults, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def test_tokens_are_the_documents_and_no_document_is_in_both_splits(corpus):
    data = build(corpus)
    tokenizer = data.tokenizer
    texts = {path.read_text() for path in corpus.iterdir()}
    found = {}
    for split in ("train", "val"):
        text = tokenizer.decode(data._blocks[split].tokens.tolist(), skip_special_tokens=False)
        found[split] = text.split(END_OF_TEXT)
        assert found[split].pop() == ""
    assert not set(found["train"]) & set(found["val"])
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    assert 2 <= len(found["val"]) <= 25
    assert data._blocks["train"].tokens.dtype == np.uint16
    assert data._meta["documents"] == {split: len(found[split]) for split in found}


def test_copies_of_a_document_stay_together():
    hashes = [os.urandom(8) for _ in range(20000)]
    share = sum(split_of(h, 0.1) == "val" for h in hashes) / len(hashes)
    assert share == pytest.approx(0.1, abs=0.01)
    assert split_of(b"\0" * 8, 1e-9) == "val"
    assert split_of(b"\xff" * 8, 1 - 1e-9) == "train"


def test_the_cache_is_reused_and_depends_on_everything(corpus):
    data = build(corpus)
    path = data.cache_path()
    stamp = (path / "train.bin").stat().st_mtime_ns
    again = build(corpus, block_size=16, batch_size=2, seed=5)  # none of which changes the tokens
    assert again.cache_path() == path
    assert (path / "train.bin").stat().st_mtime_ns == stamp
    for change in ({"vocab_size": 310}, {"val_fraction": 0.3}, {"max_documents": 40}, {"max_tokens": 5000}):
        assert build(corpus, **change).cache_path() != path
    (corpus / "00.py").write_text("changed = True\n" * 100)
    assert build(corpus).cache_path() != path
    assert not any("partial" in name for name in os.listdir(path.parent))


def test_the_cache_of_a_local_hub_folder_depends_on_its_files(tmp_path, monkeypatch):
    paths = set()
    for name in ("a", "b"):
        (tmp_path / name / "corpus").mkdir(parents=True)
        (tmp_path / name / "corpus" / "train.jsonl").write_text('{"text": "x"}\n')
        monkeypatch.chdir(tmp_path / name)
        paths.add(TextDataModule(files=None, hub="./corpus").cache_path())
    (tmp_path / "b" / "corpus" / "train.jsonl").write_text('{"text": "other"}\n')
    paths.add(TextDataModule(files=None, hub="./corpus").cache_path())
    assert len(paths) == 3


def test_limits(corpus):
    assert sum(build(corpus, max_documents=40)._meta["documents"].values()) == 40


@pytest.mark.parametrize("limit", [5000, 8000])
def test_a_small_corpus_has_a_limit_of_tokens_too(corpus, limit):
    whole, data = build(corpus), build(corpus, max_tokens=limit)
    tokens = data._blocks["train"].tokens
    assert limit <= len(tokens) < len(whole._blocks["train"].tokens)
    (end,) = data.tokenizer.encode(END_OF_TEXT).ids
    before, last = np.flatnonzero(tokens == end)[-2:] + 1
    assert before < limit <= last == len(tokens)


def test_a_trained_tokenizer_is_deterministic_and_lossless(corpus):
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    one, two = (train_tokenizer(iter(texts), 320) for _ in range(2))
    assert one.to_str() == two.to_str()
    sample = "x = 'ünïcödé 漢字 \t\n\x00'"
    assert one.decode(one.encode(sample).ids) == sample


def test_a_tokenizer_from_a_file(corpus, tmp_path):
    tokenizer = train_tokenizer((path.read_text() for path in corpus.iterdir()), 290)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = build(corpus, tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.vocab_size == 290


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "vocab_size 100 is too small"),
        ({"vocab_size": 100000}, "The text gives only"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, r"there is no file /nowhere/tokenizer\.json"),
        ({"block_size": 10**6}, "validation split has .* less than one block"),
        ({"batch_size": 10**6}, "training split has .* less than one batch"),
        ({"files": "/nowhere/*"}, "no file matches /nowhere"),
        ({"val_fraction": 0.0}, "data.val_fraction is 0.0; it must be above 0 and below 1"),
        ({"batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
        ({"seed": -1}, "data.seed is -1; it must be at least 0"),
    ],
)
def test_bad_options_are_told(corpus, options, message):
    with pytest.raises(TaperlitError, match=message) as error:
        build(corpus, **options)
    assert "\n" not in str(error.value)


def test_no_documents_are_told(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/empty.txt").write_text("")
    with pytest.raises(TaperlitError, match="no documents to train on"):
        build(tmp_path / "docs")
    assert not (tmp_path / "cache").exists() or not os.listdir(tmp_path / "cache")


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[-100:]
    elif how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "zeroed":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "zeroed", "gone"])
def test_a_damaged_cache_is_told_and_the_advice_works(corpus, name, how):
    path = build(corpus).cache_path()
    if how == "gone":
        (path / name).unlink()
    else:
        damage(path / name, how)
    with pytest.raises(TaperlitError, match=rf"token cache .* is damaged \(.*{name}.*\); delete it") as error:
        build(corpus)
    assert "\n" not in str(error.value)
    shutil.rmtree(path)
    build(corpus)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_becomes_of_a_caches_description_is_told(tmp_path_factory, data):
    """One value of meta.json is another, its checksum included."""
    directory = tmp_path_factory.mktemp("cache")
    tokenizer = train_tokenizer(iter(["abc abd"]), 257)
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    pieces = [Piece(f"abc {i}", os.urandom(8), last=True) for i in range(20)]
    meta = write_tokens(directory, pieces, tokenizer, 0.5, None)
    check_tokens(directory)
    odd = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
    within = data.draw(st.sampled_from([meta, meta["tokens"], meta["checksums"]]))
    key = data.draw(st.sampled_from(sorted(within)))
    before = within[key]
    within[key] = data.draw(odd.filter(lambda value: value != before or type(value) is not type(before)))
    (directory / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="is not as it was written"):
        check_tokens(directory)


def test_a_large_cache_is_compared_where_a_run_goes_on(corpus, tmp_path, monkeypatch):
    def fit(steps, ckpt_path=None, what="fit"):
        shape = {"vocab_size": 300, "block_size": 32, "n_layer": 1, "n_head": 2, "d_model": 8, "d_ff": 8}
        options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_steps=steps, enable_model_summary=False, limit_val_batches=1, **options)
        module = LanguageModel("small_1m", taper="none", overrides=shape)
        getattr(trainer, what)(module, datamodule=build(corpus), ckpt_path=ckpt_path)
        return trainer

    data = build(corpus)
    fit(1).save_checkpoint(tmp_path / "one.ckpt")
    monkeypatch.setattr(data_module, "CHECKED_ALWAYS", 10)
    damage(data.cache_path() / "train.bin", "flipped")
    fit(1)  # begins, and trusts what is there
    with pytest.raises(TaperlitError, match=r"train\.bin is not as it was written"):
        fit(2, tmp_path / "one.ckpt")
    fit(1, tmp_path / "one.ckpt", "validate")


@pytest.mark.parametrize(
    ("blocks", "processes", "ways"),
    [
        (4, 1, "4 on 1"),
        (12, 3, "4 on 3"),
        (4, 3, "2 on 2 or 1 on 4"),
        (7, 3, "7 on 1"),
        (2, 5, "1 on 2"),
        (48, 5, "12 on 4 or 8 on 6"),
    ],
)
def test_the_advice_on_another_number_of_processes_can_be_followed(corpus, monkeypatch, blocks, processes, ways):
    data = build(corpus, batch_size=5)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), world_size=1, local_rank=0)
    monkeypatch.setattr(data_module, "data_rank", lambda trainer: (0, processes))
    state = {**data.state_dict(), "global_batch": blocks}
    told = f"had {blocks} blocks a batch over all processes; resume it with data.batch_size {ways}."
    with pytest.raises(TaperlitError, match=f"{re.escape(told)}$"):
        data.load_state_dict(state)
    for batch_size, on in re.findall(r"(\d+) on (\d+)", ways):
        data.hparams.batch_size = int(batch_size)
        monkeypatch.setattr(data_module, "data_rank", lambda trainer, on=int(on): (0, on))
        data.load_state_dict(state)


def _prepare(corpus, barrier, times):
    times.put(os.getpid())
    real = data_module.write_tokens

    def slow(*args):
        times.put("prepared")
        time.sleep(0.5)
        return real(*args)

    data_module.write_tokens = slow
    barrier.wait()
    build(corpus)


def test_of_two_that_want_the_same_tokens_one_prepares_them(corpus):
    context = multiprocessing.get_context("fork")
    barrier, told = context.Barrier(2), context.Queue()
    both = [context.Process(target=_prepare, args=(corpus, barrier, told)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(isinstance(told.get(), str) for _ in range(3)) == [False, False, True]
    assert told.empty()
    root = build(corpus).cache_path().parent
    assert [name for name in os.listdir(root) if name.startswith(".")] == []


def _die_half_way(corpus):
    data_module.write_tokens = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    build(corpus)


def test_what_a_killed_one_left_is_removed_by_the_next(corpus):
    process = multiprocessing.get_context("fork").Process(target=_die_half_way, args=(corpus,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    path = TextDataModule(files=str(corpus / "*"), vocab_size=300, val_fraction=0.2).cache_path()
    assert any(name.endswith(".partial") for name in os.listdir(path.parent))
    assert not path.exists()
    assert build(corpus).cache_path() == path
    assert os.listdir(path.parent) == [path.name]


def test_a_tokenizer_without_an_end_of_text_is_refused(corpus, tmp_path):
    text = train_tokenizer((path.read_text() for path in corpus.iterdir()), 290).to_str()
    (tmp_path / "t.json").write_text(text.replace(END_OF_TEXT, "<|other|>"))
    with pytest.raises(TaperlitError, match="no end-of-text token"):
        build(corpus, tokenizer=str(tmp_path / "t.json"))
    (tmp_path / "broken.json").write_text(text[:50])
    with pytest.raises(TaperlitError, match=r"broken\.json' cannot be loaded"):
        load_tokenizer(str(tmp_path / "broken.json"))


def test_a_tokenizer_from_the_hub(monkeypatch):
    tokenizer = train_tokenizer(iter(["abc"]), 257)
    monkeypatch.setattr(Tokenizer, "from_pretrained", lambda name: tokenizer)
    assert load_tokenizer("someone/tokenizer") is tokenizer

    def offline(name):
        raise FileNotFoundError("cannot reach\nthe hub")

    monkeypatch.setattr(Tokenizer, "from_pretrained", offline)
    with pytest.raises(TaperlitError, match="'gpt2' cannot be loaded: cannot reach the hub"):
        load_tokenizer("gpt2")


def test_ids_with_gaps_need_a_model_for_the_largest(corpus, tmp_path):
    text = json.loads(train_tokenizer(iter(["abc abd"]), 257).to_str())
    vocab = text["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = 299
    (tmp_path / "far.json").write_text(json.dumps(text))
    data = build(corpus, tokenizer=str(tmp_path / "far.json"))
    assert data.tokenizer.get_vocab_size() == 257
    assert data.vocab_size == 300
    assert data.largest_token == max(int(data._blocks[split].tokens.max()) for split in ("train", "val"))

    def fit(vocab_size):
        shape = dict(vocab_size=vocab_size, block_size=32, n_layer=1, n_head=2, d_model=16, d_ff=32)
        trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                          enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
        trainer.fit(LanguageModel("small_1m", overrides=shape), data)

    for vocab_size in (257, 299):
        with pytest.raises(TaperlitError, match=f"ids go up to 299 and the model's to {vocab_size - 1}; set .* to 300"):
            fit(vocab_size)
    fit(300)


def test_large_vocabularies_take_four_bytes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "get_vocab_size", lambda self, *a: 70000)
    tokenizer = train_tokenizer(iter(["abc"]), 257)
    tokenizer.save(str(tmp_path / "t.json"))
    assert build(corpus, tokenizer=str(tmp_path / "t.json"))._meta["dtype"] == "<u4"


class Numbers(TokenBlocks):
    """Block i is full of i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.tensor([index])


def loader(count, batch, rank=0, world=1, seed=0, train=True, **options):
    blocks = Numbers(count)
    return ResumableLoader(blocks, BlockSampler(blocks, batch, rank, world, seed, train), **options)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def drain(loader, epoch=None):
    if epoch is not None:
        loader.sampler.set_epoch(epoch)
    return [batch.flatten().tolist() for batch in loader]


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 60),
    batch=st.integers(1, 5),
    world=st.integers(1, 4),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    stop=st.integers(0, 30),
)
def test_resumed_order_neither_repeats_nor_skips(count, batch, world, seed, epoch, stop):
    whole = drain(loader(count, batch * world, seed=seed), epoch)
    assert len(set(flat(whole))) == count // (batch * world) * batch * world
    ranks = [drain(loader(count, batch, rank, world, seed), epoch) for rank in range(world)]
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == whole  # the same global batches
    for rank in range(world):
        first = loader(count, batch, rank, world, seed)
        first.sampler.set_epoch(epoch)
        seen = [b.flatten().tolist() for _, b in zip(range(stop), first, strict=False)]
        state = json.loads(json.dumps(first.state_dict()))
        second = loader(count, batch, rank, world, seed)
        second.load_state_dict(state)
        second.sampler.set_epoch(epoch)  # as Lightning does on resuming
        assert len(second) == len(first)
        assert seen[:stop] + drain(second) == ranks[rank]
        assert drain(second, epoch + 1) == drain(loader(count, batch, rank, world, seed), epoch + 1)


def test_order_differs_by_epoch_and_seed():
    orders = {str(drain(loader(50, 5, seed=seed), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_position_counts_what_was_handed_out_not_what_workers_fetched():
    first = loader(40, 4, num_workers=1, multiprocessing_context=multiprocessing.get_context("fork"))
    iterator = iter(first)
    seen = [next(iterator).flatten().tolist() for _ in range(3)]
    assert first.state_dict() == {"epoch": 0, "position": 12}
    second = loader(40, 4)
    second.load_state_dict(first.state_dict())
    assert seen + drain(second) == drain(loader(40, 4))


@given(count=st.integers(1, 40), batch=st.integers(1, 5), world=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_evaluation_sees_every_block_once_in_as_many_batches_on_every_rank(count, batch, world):
    ranks = [drain(loader(count, batch, rank, world, train=False)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    blocks = flat(flat(batches) for batches in ranks)
    assert sorted(block for block in blocks if block >= 0) == list(range(count))
    assert len(blocks) - count < world


def test_blocks_overlap_by_the_token_that_both_need(tmp_path):
    np.arange(101, dtype="<u2").tofile(tmp_path / "x.bin")
    blocks = TokenBlocks(tmp_path / "x.bin", "<u2", 10)
    assert len(blocks) == 10
    assert blocks[0].tolist() == list(range(11))
    assert blocks[9].tolist() == list(range(90, 101))
    assert blocks[-1].tolist() == [-100] * 11
    assert len(TokenBlocks(tmp_path / "x.bin", "<u2", 101)) == 0
