"""The bench refuses to tell the speed of what decodes something else."""

import copy
import dataclasses
import shutil

import pytest
import torch

from taperlit.bench.decode import Models, Setting, check, compare_decoding, decode_rows, first_difference
from taperlit.decode.engine import Engine
from taperlit.errors import TaperlitError
from taperlit.transformer import TransformerConfig

CONFIG = TransformerConfig(vocab_size=300, block_size=48, n_layer=2, n_head=2, d_model=32, d_ff=64)


def setting(dtype=torch.float32, batch=2, backend="eager"):
    return Setting("tiny", batch, 8, 9, dtype, backend, torch.device("cpu"), 2, 10.0)


@pytest.fixture(scope="module")
def models():
    return Models.build(CONFIG, "all", seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_is_measured_and_agrees(models, dtype):
    rows = list(decode_rows(models, setting(dtype), peers=False))
    slower = [row for row in rows if row["variant"] == "normalized-fused"]  # where torch's own norm is
    assert all(row["norm"] == "fused" for row in slower)
    rows = [row for row in rows if row not in slower]
    assert [row["variant"] for row in rows] == ["normalized", "explicit", "folded"]
    for row in rows:
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["step_ms"])
        assert row["bandwidth_share"] == pytest.approx(row["gb_s"] / 10)
        assert row["tokens"].startswith("equal")
        assert row["layout"] == rows[0]["layout"]
    first, explicit, last = rows
    assert first["ratio"] == first["low"] == first["high"] == 1
    # Five norms of four operations and more are one multiplication each, and then nothing.
    assert explicit["kernels_per_token"] == last["kernels_per_token"] + 5
    assert first["kernels_per_token"] >= last["kernels_per_token"] + 5 * 4
    assert last["kernels_per_layer"] == int(last["kernels_per_layer"])
    assert 6 <= last["kernels_per_layer"] < last["kernels_per_token"] / 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_every_norm_is_a_kernel_less():
    one = Models.build(dataclasses.replace(CONFIG, n_layer=1), "all", seed=0)
    rows = {row["variant"]: row for row in decode_rows(one, setting(batch=1, backend="compile"))}
    assert [*rows][:3] == ["normalized", "explicit", "folded"]
    for row in rows.values():
        assert row["backend"] == "compile"
        if row["ratio"] is None:  # it could not be measured here, and says why
            assert row["skipped"]
            assert row["variant"] == "transformers-compiled"
            continue
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["tokens"].startswith("equal")
    assert rows["normalized"]["ratio"] == 1
    # The layer's two are; the final one is one with the head's.
    assert rows["folded"]["kernels_per_token"] <= rows["normalized"]["kernels_per_token"] - 2
    assert rows["folded"]["kernels_per_layer"] <= 7


class Wrong:
    """An engine that decodes as another does, but for one step."""

    def __init__(self, engine, at):
        self.engine, self.at = engine, at

    def prefill(self, prompts):
        self.steps = 0
        return self.engine.prefill(prompts)

    def step(self, tokens):
        self.steps += 1
        logits = self.engine.step(tokens)
        if self.steps == self.at:
            logits = logits.clone()
            logits[1, 7] += 0.02 * logits.abs().max()
        return logits


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("at", [1, 8])
def test_a_wrong_logit_fails_the_bench(models, dtype, at):
    where, model = setting(dtype), models.variants["folded"]
    prompts = where.prompts(300)
    engine = Engine(model, 2, where.length, dtype=dtype)
    tokens, words, size = check("folded", engine, model, prompts, where)
    assert tokens.shape == (2, 9)
    assert words == "equal"
    assert size > sum(p.nbytes for p in model.parameters()) / 2
    with pytest.raises(TaperlitError, match=r"folded \(tiny, batch 2, prompt 8, eager\) does not decode"):
        check("folded", Wrong(engine, at), model, prompts, where)


def test_the_bytes_of_a_step_are_those_halfway(models):
    model, where = models.variants["folded"], dataclasses.replace(setting(), new_tokens=40)
    engine = Engine(model, 2, where.length, backend="eager")
    *_, size = check("folded", engine, model, where.prompts(300), where)
    per_slot = engine.cache.storage.nbytes // engine.cache.storage.shape[3]
    assert size == engine.bytes_per_step(0) + (8 + 20) * per_slot


def test_what_overflows_by_itself_fails_the_bench(models):
    where, model = setting(torch.float16), copy.deepcopy(models.variants["folded"])
    engine = Engine(models.variants["folded"], 2, where.length)
    with torch.no_grad():
        model.tok_embed.weight.mul_(1e6)
    with pytest.raises(TaperlitError, match="overflows in float16; measure another dtype"):
        check("folded", engine, model, where.prompts(300), where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_models_tokens_fail_the_bench(models, dtype):
    where = setting(dtype)
    engine = Engine(models.variants["folded"], 2, where.length, dtype=dtype)
    other = Models.build(CONFIG, "all", seed=1).variants["folded"]
    with pytest.raises(TaperlitError, match="does not decode"):
        check("folded", engine, other, where.prompts(300), where)


def test_tokens_may_differ_where_two_logits_tie():
    logits = torch.zeros(1, 3, 4)
    logits[0, :, 0] = 5.0
    logits[0, 1, 2] = 5.0 - 1e-6
    expected = torch.tensor([[0, 0, 0]])
    assert first_difference("a", expected, "b", expected, lambda _: logits) == "equal"
    assert first_difference("a", torch.tensor([[0, 2, 3]]), "b", expected, lambda _: logits) == (
        "equal until two logits tie"
    )
    with pytest.raises(TaperlitError, match="a decodes other tokens than b: row 0 differs from token 1 on"):
        first_difference("a", torch.tensor([[0, 1, 0]]), "b", expected, lambda _: logits)


def test_two_loaded_models_are_compared(models, tiny):
    variants = {"before": models.variants["explicit"], "after": models.variants["folded"]}
    before, after = compare_decoding(variants, prompt_tokens=8, new_tokens=6, batch_size=2, rounds=2)
    assert (before.name, after.name) == ("before", "after")
    assert before.ratio == 1
    assert after.low <= after.ratio <= after.high
    assert after.rate > 0
    (short,) = compare_decoding({"tiny": tiny(block_size=8).eval()}, prompt_tokens=32, new_tokens=128, rounds=1)
    assert short.rate > 0
