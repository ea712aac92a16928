import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from torch import nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

from paper_harness import __main__ as command  # noqa: E402
from paper_harness import corpus, experiments, runs, workers  # noqa: E402
from paper_harness.ideas import IDEAS, OURS  # noqa: E402
from paper_harness.peers import FirstEmbeddingScale  # noqa: E402
from paper_harness.runs import Run, hash_of  # noqa: E402
from paper_harness.sizes import SIZES  # noqa: E402

from taperlit import LanguageModel, Trainer  # noqa: E402
from taperlit.cli.train import TaperlitCLI  # noqa: E402
from taperlit.data.module import default_cache  # noqa: E402
from taperlit.errors import TaperlitError  # noqa: E402
from taperlit.transformer import Transformer, TransformerConfig  # noqa: E402

LENGTH = 0.25  # tokens per parameter: 13 steps
# Run in a process of its own, too: a packaged corpus that is in the cache already.
REGISTER = """
import hashlib
from paper_harness import corpus
path = corpus.default_cache() / "corpora" / "small-1.jsonl"
digest = hashlib.sha256(path.read_bytes()).hexdigest()
corpus.CORPORA["small"] = corpus.Corpus("a small one", 0.3, package="small=1", sha256=digest)
"""


@pytest.fixture(autouse=True)
def _small_corpus(_own_cache, monkeypatch):
    """A corpus ``small`` in the cache, of words in a random order, and no more threads than a worker has."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(500)]
    folder = default_cache() / "corpora"
    folder.mkdir(parents=True)
    texts = [" ".join(rng.choices(words, k=150)) for _ in range(120)]
    (folder / "small-1.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(corpus, "CORPORA", dict(corpus.CORPORA))
    exec(REGISTER, {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path):
    return workers.Place(tmp_path / "out", tmp_path / "work")


def small(variant="internal_aux", seed=0, length=LENGTH, lr=None, **method) -> Run:
    return Run("toy", "small", variant, seed, length, lr, method)


def record_of(settings, place) -> dict:
    return json.loads(runs.record_path(place.out, hash_of(settings)).read_text())


def refuse(*_):
    raise AssertionError("a run was begun")


# ---- settings and their hash


def test_the_hash_of_a_stored_run_stays():
    # Whoever changes what it is of makes every stored record worthless.
    settings = Run("nano", "gcide", "internal_aux", 0, 10).settings()
    assert settings["steps"] == 1056
    assert hash_of(settings) == "05f78c21ab1bf3e3"
    assert hash_of(Run("nano", "gcide", "baseline", 2, 40.0, 0.004).settings()) == "94965c31ea2df365"


def test_the_hash_is_of_every_setting_and_of_nothing_else(monkeypatch, tmp_path):
    settings = small().settings()
    shuffled = json.loads(json.dumps(settings, sort_keys=True))
    assert hash_of(dict(reversed(shuffled.items()))) == hash_of(settings)
    monkeypatch.setenv("TAPERLIT_CACHE", str(tmp_path / "elsewhere"))
    assert hash_of(small().settings()) == hash_of(settings)
    assert str(tmp_path) not in json.dumps(settings)

    others = [
        small("all_aux"),
        small(seed=1),
        small(length=1),
        small(lr=1e-3),
        Run("toy", "gcide", "internal_aux", 0, 1),
    ]
    others += [small(**{name: value}) for name, value in
               {"warmup": 0.1, "end": 0.6, "shape": "linear", "ema_rate": 0.1, "weight": 1.0}.items()]  # fmt: skip
    others += [small(variant) for variant in runs.POLICIES if variant not in ("internal_aux", "all_aux")]
    others += [Run(size, "small", "internal_aux", 0, LENGTH) for size in SIZES if size != "toy"]
    hashes = [hash_of(run.settings()) for run in (small(), *others)]
    assert len(set(hashes)) == len(hashes)


def leaves(tree, path=()):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


def test_every_leaf_counts():
    settings = small("fakeln").settings()
    hashes = {hash_of(settings)}
    for path in leaves(settings):
        changed = json.loads(json.dumps(settings))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = "other"
        hashes.add(hash_of(changed))
    assert len(hashes) == 1 + sum(1 for _ in leaves(settings))


def test_no_norm_undoes_the_peers_scale():
    for variant in runs.POLICIES:
        overrides = Run("nano_unit", "gcide", variant, 0, 2).settings()["config"]["model"]["overrides"]
        assert overrides["embed_norm"] == (variant not in ("dyt", "derf"))
        assert "embed_norm" not in Run("nano", "gcide", variant, 0, 2).settings()["config"]["model"]["overrides"]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_steps_that_their_tokens_ask_for(size):
    shape = SIZES[size].shape
    d, f, v, n = shape["d_model"], shape["d_ff"], shape["vocab_size"], shape["n_layer"]
    assert SIZES[size].parameters == v * d + n * (4 * d * d + 3 * d * f + 2 * d) + d
    for length in (0.5, 2, 5, 10, 20, 40):
        steps, every = SIZES[size].length(length)
        wanted = length * SIZES[size].parameters / SIZES[size].tokens_per_step
        assert steps % every == 0
        assert steps // every <= 12
        assert steps == pytest.approx(wanted, rel=0.02, abs=0.51)


def test_a_config_spells_out_the_shape():
    # Else a preset's or a field's default could change what a stored run was.
    for size in SIZES.values():
        assert TransformerConfig.from_preset("small_1m", **size.shape) == TransformerConfig(**size.shape)


# ---- the corpora


def deb(files: dict[str, bytes]) -> bytes:
    """A Debian package with these files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./usr/share/dictd/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": lzma.compress(tar.getvalue())}
    package = b"!<arch>\n"
    for name, data in parts.items():
        package += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return package


def test_a_dictionary_becomes_documents(monkeypatch):
    entries = [f"entry {i}\n   is number {i}, and caf\xe9." for i in range(150)]
    text, index, digits = (
        b"00-database-short\n",
        "00-database-short\tA\tS\n",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
    )

    def number(value: int) -> str:
        return digits[value] if value < 64 else number(value // 64) + digits[value % 64]

    for entry in entries:
        data = entry.encode() + b"\n"
        index += f"{entry.split(chr(10))[0]}\t{number(len(text))}\t{number(len(data))}\n"
        text += data
    index += index.splitlines()[-1] + "\n"  # two headwords of one entry
    package = deb({"some.dict.dz": gzip.compress(text), "some.index": index.encode()})
    monkeypatch.setattr(corpus, "_download", lambda name: package)
    with pytest.raises(TaperlitError, match=r"is not the known text .its SHA-256 is [0-9a-f]+.; delete it") as error:
        corpus.fetch(packaged("0"))
    digest = str(error.value).split("SHA-256 is ")[1].split(")")[0]
    path = corpus.fetch(packaged(digest))
    found = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert sorted(found) == sorted(entries)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def packaged(sha256: str) -> str:
    corpus.CORPORA["some"] = corpus.Corpus("", 0.1, package="dict-some=1", sha256=sha256)
    return "some"


def test_a_package_that_cannot_be_had_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TaperlitError, match="no apt-get to fetch dict-some=1 with; choose --corpus"):
        corpus.fetch(packaged("0"))
    with pytest.raises(TaperlitError, match="no corpus 'nothing'"):
        corpus.find("nothing")


def test_pythons_source_is_a_corpus(monkeypatch, tmp_path):
    files = [tmp_path / "one.py", tmp_path / "two.py"]
    files[0].write_bytes(b"caf\xc3\xa9 = 1\n")
    files[1].write_bytes(b"# \xff\n")
    monkeypatch.setattr(corpus, "python_files", lambda: list(map(str, files)))
    lines = corpus.fetch("embedded").read_text().splitlines()
    assert sorted(json.loads(line)["text"] for line in lines) == ["# \ufffd\n", "caf\xe9 = 1\n"]
    assert corpus.fetch("tinystories") is None


# ---- runs


def test_a_record_holds_what_the_run_gave(place):
    settings = small(length=2).settings()
    record = runs.train(settings, place.out, place.work, "cpu")
    assert record == record_of(settings, place)
    result, steps = record["result"], settings["steps"]
    assert record["settings"] == settings
    assert [step for step, _ in result["val"]] == [steps // 2, steps]
    assert [step for step, _ in result["train"]] == list(range(1, steps + 1))
    gates = dict(map(tuple, result["traces"]["taper/gate"]))
    assert len(gates) <= 60
    assert gates[1] == 1
    assert all(gate == 0 for step, gate in gates.items() if step >= steps * 0.5)
    assert {"taper/pre_logit_rms", "taper/logit_norm", "train/grad_norm"} < result["traces"].keys()
    assert any(tag.startswith("grad_norm/model.blocks.attn") for tag in result["traces"])
    assert result["diverged"] is None
    assert result["tails"]["loss"] == pytest.approx(result["val"][-1][1], rel=1e-6)
    assert result["tails"]["loss_max"] >= result["tails"]["loss_p999"] > result["tails"]["loss"]
    rms = result["random"]
    assert rms["largest_rms"] / rms["median_rms"] == pytest.approx(rms["ratio"], rel=1e-5)
    assert result["parameters"] == SIZES["toy"].parameters
    assert result["tokens"] == steps * 256
    assert list(place.work.iterdir()) == []
    assert str(place.out.parent) not in json.dumps(record)


def test_random_tokens_are_measured_where_the_logits_begin():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SIZES["toy"].shape)).eval()
    found = runs._on_random_tokens(model, 512, 64)
    seen = []
    model.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output.double()))
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(512, (32, 65), generator=generator)
    with torch.no_grad():
        logits = model(blocks[:, :-1]).double()
    rms = torch.cat(seen).square().mean(-1).sqrt()
    assert found["largest_rms"] == pytest.approx(rms.max().item(), rel=1e-5)
    assert found["median_rms"] == pytest.approx(rms.flatten().median().item(), rel=1e-5)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="none")
    assert found["largest_loss"] == pytest.approx(losses.max().item(), rel=1e-5)


def test_pairs_have_equal_weights_and_data(place, monkeypatch):
    """A seed gives every variant the same matrices to begin with, and the same blocks in the same order."""
    seen = {}
    step = LanguageModel.training_step

    def watched(self, batch, batch_idx):
        if batch_idx == 0:
            matrices = [p for p in self.model.parameters() if p.dim() == 2]
            seen[variant, seed].append(torch.cat([p.detach().flatten() for p in matrices]).clone())
        seen[variant, seed].append(batch.clone())
        if batch_idx == 4:
            raise TaperlitError("enough")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", watched)
    for variant, seed in [*((variant, 0) for variant in runs.POLICIES), ("baseline", 1)]:
        seen[variant, seed] = []
        with pytest.raises(TaperlitError, match="enough"):
            runs.train(small(variant, seed).settings(), place.out, place.work, "cpu")
    first = seen["baseline", 0]
    assert len(first) == 1 + 5
    for variant in runs.POLICIES:
        assert all(torch.equal(a, b) for a, b in zip(first, seen[variant, 0], strict=True)), variant
    assert not any(torch.equal(a, b) for a, b in zip(first, seen["baseline", 1], strict=True))


def test_a_diverging_run_is_a_result(place):
    settings = small("baseline", lr=1e30).settings()
    workers.do_all([settings], place, 1)
    result = record_of(settings, place)["result"]
    lost = result["diverged"]
    assert 1 < lost["step"] <= settings["steps"]
    assert lost["gate"] is None
    assert "is not finite; it began in" in lost["why"]
    assert "resume" not in lost["why"]
    assert result["tails"] is result["random"] is None
    assert [step for step, _ in result["train"]] == list(range(1, lost["step"]))
    assert list(place.work.iterdir()) == []

    tapered = small("all", lr=1e30).settings()
    lost = runs.train(tapered, place.out, place.work, "cpu")["result"]["diverged"]
    assert lost["step"] == 2  # of the taper from 1 to 6
    assert lost["gate"] == pytest.approx((1 + math.cos(math.pi / 5)) / 2, abs=1e-3)


def test_a_validation_that_is_not_finite_is_a_divergence(place, monkeypatch):
    evaluate = LanguageModel._evaluate
    monkeypatch.setattr(LanguageModel, "_evaluate", lambda self, batch, *a: evaluate(spoilt(self), batch, *a))

    def spoilt(module):
        with torch.no_grad():
            module.model.final_norm.weight[0] = torch.nan
        return module

    settings = small("internal", length=LENGTH).settings()
    # The weights are lost with the validation, after the last step; FiniteGuard lets no checkpoint have them.
    monkeypatch.setattr("taperlit.callbacks.finite.FiniteGuard.on_save_checkpoint", lambda *_: None)
    lost = runs.train(settings, place.out, place.work, "cpu")["result"]["diverged"]
    assert lost == {"step": settings["steps"], "gate": 0.0, "why": "the validation loss is not finite"}


def test_a_run_that_ends_over_a_uniform_guess_is_lost():
    guess = math.log(300)
    assert runs._lost([(1, 2 * guess), (2, 0.99 * guess)], 300) is None
    assert runs._lost([(1, 0.5 * guess), (2, 1e5)], 300)["step"] == 2
    assert "ends at 1e+05" in runs._lost([(2, 1e5)], 300)["why"]
    assert runs._lost([(1, math.inf), (2, 1.0)], 300) == {"step": 1, "why": "the validation loss is not finite"}


def test_an_error_is_no_result(place, monkeypatch):
    settings = small().settings()
    settings["config"]["data"]["batch_size"] = 1 << 20
    with pytest.raises(TaperlitError, match=r"less than one batch"):
        workers.do_all([settings], place, 1)
    assert not runs.record_path(place.out, hash_of(settings)).exists()


@pytest.mark.parametrize(("idea", "fade"), [(None, None), ("fade", 0.5), ("early", None)])
def test_the_papers_scale_loss_does_not_fade_as_the_commands_does(tmp_path, monkeypatch, idea, fade):
    settings = dataclasses.replace(small("all_aux"), idea=idea).settings()
    assert settings["config"]["taper"]["anchor"]["init_args"].get("fade") == fade
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(runs.fit_config(settings, tmp_path / "fit", "cpu")))
    for built in ("instantiate_classes", "_run_subcommand"):
        monkeypatch.setattr(TaperlitCLI, built, lambda self, *args: None)
    assert runs._fit(path).config["fit"].taper.anchor.init_args.fade == fade


@pytest.mark.slow
def test_a_record_is_what_taperlit_fit_gives(place, tmp_path):
    """The same config, by the command line in a process of its own; the record is of a process that trained before."""
    settings = small("all_aux", length=2).settings()
    workers.do_all([small("fakeln").settings(), settings], place, 1)
    result = record_of(settings, place)["result"]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(runs.fit_config(settings, tmp_path / "fit", "cpu")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "taperlit", "fit", "--config", config], check=True, env=environment)
    logged = runs.scalars(runs.last_run(tmp_path / "fit/run"))
    assert result["val"] == [[step + 1, pytest.approx(loss, rel=1e-6)] for step, loss in logged["val/loss"]]
    assert result["train"] == [[step + 1, pytest.approx(loss, rel=1e-6)] for step, loss in logged["train/loss"]]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
{register}
import json
from pathlib import Path
from paper_harness import workers
from taperlit import LanguageModel
step, out, settings, last = LanguageModel.training_step, Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
def watched(self, batch, batch_idx):
    if self.trainer.global_step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
LanguageModel.training_step = watched
workers.work(settings, workers.Place(out / "out", out / "work", "cpu"))
"""


@pytest.mark.slow
def test_a_killed_worker_s_run_is_done(place, tmp_path):
    """It goes on from its last checkpoint, and its record is that of a run that nobody killed."""
    settings = small(length=2).settings()
    script = KILLED.format(register=REGISTER)
    words = [sys.executable, "-c", script, str(TOOLS), str(place.out.parent), json.dumps([settings]), "80"]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    assert not runs.record_path(place.out, hash_of(settings)).exists()
    workers.do_all([settings], place, 1)
    record = record_of(settings, place)
    assert record["ran"]["resumed"]
    assert list(place.work.iterdir()) == []
    whole = runs.train(settings, tmp_path / "whole", tmp_path / "work2", "cpu")
    assert record["result"] == whole["result"]


def test_a_run_that_stopped_before_its_first_checkpoint_begins_anew(place, tmp_path, monkeypatch):
    settings = small().settings()
    step = LanguageModel.training_step

    def stopped(self, batch, batch_idx):
        if batch_idx == 8:
            raise TaperlitError("stopped")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", stopped)
        with pytest.raises(TaperlitError, match="stopped"):
            runs.train(settings, place.out, place.work, "cpu")
    record = runs.train(settings, place.out, place.work, "cpu")
    assert not record["ran"]["resumed"]
    assert record["result"] == runs.train(settings, tmp_path / "whole", tmp_path / "work2", "cpu")["result"]


# ---- many runs


def test_a_remembered_run_is_not_done_again(place, monkeypatch):
    settings = [small("baseline").settings(), small("baseline", seed=1).settings()]
    workers.do_all(settings[:1], place, 1)
    done = []
    monkeypatch.setattr(runs, "train", lambda one, *_: done.append(one) or write(one, place))
    workers.do_all(settings, place, 1)
    assert done == settings[1:]
    workers.do_all(settings, place, 1)
    assert done == settings[1:]


def write(settings, place, seconds=1.0):
    """A record as of a run."""
    result = {"val": [[1, 1.0]], "diverged": None, "tokens": 1000}
    record = {"settings": settings, "result": result, "ran": {"seconds": seconds, "resumed": False}}
    path = runs.record_path(place.out, hash_of(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return record


def test_a_run_is_done_once_by_two(place, monkeypatch):
    """What another process is at is left to it, and done when it gave up."""
    mine, theirs = small("baseline").settings(), small("all").settings()
    order = []
    monkeypatch.setattr(runs, "train", lambda one, *_: order.append(one["variant"]) or write(one, place))
    monkeypatch.setattr(workers, "LOOK_EVERY", 0.01)
    place.work.mkdir()
    lock = FileLock(place.work / f"{hash_of(theirs)}.lock")
    lock.acquire()
    thread = threading.Thread(target=workers.work, args=([theirs, mine], place))
    thread.start()
    while order != ["baseline"]:
        time.sleep(0.01)
    time.sleep(0.1)
    assert order == ["baseline"]
    lock.release()
    thread.join()
    assert order == ["baseline", "all"]


def test_no_run_is_begun_after_the_budget(place, monkeypatch):
    monkeypatch.setattr(runs, "train", refuse)
    late = workers.Place(place.out, place.work, until=time.time())
    workers.do_all([small().settings()], late, 1)
    assert workers.remaining([small().settings()], place.out) == [small().settings()]


def test_a_worker_whose_parent_is_gone_stops(place, monkeypatch):
    monkeypatch.setattr(runs, "train", refuse)
    workers.work([small().settings()], place, parent=-1)


# ---- the experiments


def test_what_the_experiments_ask_for():
    options = experiments.Options()
    named = {name: make(options) for name, make in experiments.EXPERIMENTS.items()}
    assert len(named["pretrain"]) == 8 * 3
    assert {run.variant for run in named["pretrain"]} == set(runs.POLICIES)
    assert len(named["length"]) == 3 * 3 * 6
    assert {run.tokens_per_parameter for run in named["length"]} == {0.5, 2, 5, 10, 20, 40}
    # Nothing of the views' own, and the lengths' tens are pretrain's.
    pretrain = {hash_of(run.settings()) for run in named["pretrain"]}
    assert {hash_of(run.settings()) for run in named["gradnorm"] + named["logit_chasing"]} < pretrain
    tens = [run for run in named["length"] if run.tokens_per_parameter == 10]
    assert {hash_of(run.settings()) for run in tens} < pretrain
    schedule = named["schedule"]
    assert {run.seed for run in schedule} == {0}
    assert {run.lr for run in schedule} == {SIZES["nano"].lr, 4 * SIZES["nano"].lr}
    assert all(run.method["warmup"] < run.method["end"] for run in schedule if "end" in run.method)
    drawn = named["short"]
    assert drawn == experiments.short(options)
    assert {run.corpus for run in drawn} == set(SIZES["nano"].draw_corpora)
    steps = [SIZES["nano"].length(run.tokens_per_parameter)[0] for run in drawn]
    assert 100 <= min(steps) < 200
    assert 1000 < max(steps) <= 2010
    assert all(3e-4 <= run.lr <= 4e-3 for run in drawn)
    few = experiments.Options(seeds=(5,), variants=("all_aux",), lengths=(1.0,), lr=1e-3)
    assert [run.variant for run in experiments.pretrain(few)] == ["baseline", "all_aux"]
    assert [(run.seed, run.lr) for run in experiments.length(few)] == [(5, 1e-3)] * 2


def test_ours_has_the_papers_settings_and_at_one_length_its_peers_beside_it():
    asked = experiments.ours(experiments.Options(size="nano_unit", seeds=(0, 3), lr=1e-2))
    peers = [run for run in asked if run.variant in experiments.PEERS]
    assert {(run.size, run.own_idea, run.lr) for run in asked if run.variant.endswith("_aux")} == {
        ("nano_unit", OURS, 1e-2), ("nano", None, None)
    }  # fmt: skip
    assert {(run.size, run.own_idea, run.lr, run.tokens_per_parameter) for run in peers} == {
        ("nano_unit", None, 1e-2, 20)
    }  # fmt: skip
    assert {run.tokens_per_parameter for run in asked} == {20, 40}
    assert len({hash_of(run.settings()) for run in asked}) == len(asked) == 2 * (2 * 6 + 3)
    assert {run.size for run in experiments.ours(experiments.Options(size="micro_unit"))} == {"micro_unit"}
    assert asked[0].settings()["config"]["model"]["decay_start"] == 0.5
    assert "decay_start" not in asked[6].settings()["config"]["model"]


def test_an_idea_changes_what_it_names_and_no_baseline():
    plain, own = (Run("nano", "gcide", "all_aux", 0, 10, idea=idea).settings() for idea in (None, "end_100"))
    assert own.pop("idea") == "end_100"
    assert own["config"]["taper"]["gate"]["init_args"].pop("end") == 1.0
    assert plain["config"]["taper"]["gate"]["init_args"].pop("end") == 0.5
    assert own == plain
    baselines = [Run("nano", "gcide", "baseline", 0, 10, idea=idea).settings() for idea in (None, "end_100")]
    assert baselines[0] == baselines[1]
    shared = [Run("nano", "gcide", "baseline", 0, 10, idea=idea).settings() for idea in ("gelu", "gelu_tail")]
    assert shared[0] == shared[1] != baselines[0]


@pytest.mark.parametrize("idea", IDEAS)
def test_every_idea_can_be_trained(idea, place):
    length = 4 * LENGTH if "early" in idea else LENGTH  # whose warm-up has a step
    settings = Run("toy", "small", "all_aux", 0, length, idea=idea).settings()
    workers.work([settings], place)
    assert record_of(settings, place)["settings"]["idea"] == idea


def test_a_first_embedding_scale_is_set_once(tmp_path):
    def fit(steps, ckpt_path=None):
        module = LanguageModel("small_1m", taper="dyt", overrides=SIZES["toy"].shape, lr=1e-3)
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[FirstEmbeddingScale(100.0)],
        )  # fmt: skip
        rows = torch.randint(512, (8, 65), generator=torch.Generator().manual_seed(0))
        trainer.fit(module, DataLoader(rows, batch_size=4), ckpt_path=ckpt_path)
        return module.model.tok_embed.scale.item(), trainer

    value, trainer = fit(1)
    assert value == pytest.approx(100.0, abs=0.01)
    assert value != 100.0
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert fit(1, tmp_path / "one.ckpt")[0] == value


def test_the_command_lists_runs_and_does_them(place, monkeypatch, capsys):
    """--list runs nothing; then each run once, a whole seed before the next, and every experiment's page."""
    words = [
        "pretrain",
        "length",
        "--size",
        "toy",
        "--corpus",
        "small",
        "--variants",
        "all",
        "--lengths",
        "0.25",
        "0.5",
    ]
    words += ["--out", str(place.out), "--work", str(place.work), "--workers", "1"]
    monkeypatch.setattr(runs, "train", refuse)
    command.main([*words, "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 * 3 + 1
    assert listed[-1] == "6 runs, 6 left; no stored run of this size tells how long they take"

    order, pages = [], []
    monkeypatch.setattr(runs, "train", lambda one, *_: order.append(one) or write(one, place, seconds=60))
    monkeypatch.setattr("paper_harness.page.write_experiments", lambda names, out: pages.extend(names))
    command.main(words)
    assert [one["seed"] for one in order] == [0, 0, 0, 1, 1, 1]
    assert pages == ["pretrain", "length"]
    command.main(words)
    assert len(order) == 6
    command.main([*words, "--seeds", "0", "1", "2", "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.endswith(": done") for line in listed[:-1]] == [True] * 6 + [False] * 3
    tokens = sum(one["steps"] * 256 for one in order[:3])
    assert listed[-1] == f"9 runs, 3 left: about {tokens / 1000:.0f} minutes with 1 workers"


def test_what_cannot_be_asked_for_is_refused(capsys):
    for words in (["nothing"], ["pretrain", "--workers", "0"], ["pretrain", "--variants", "x"], []):
        with pytest.raises(SystemExit) as error:
            command.main(words)
        assert error.value.code == 2
    assert "--workers and --threads must be at least 1" in capsys.readouterr().err
