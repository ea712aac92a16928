"""The first campaign: every kind of file, damaged, and given to the commands that read it."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from taperlit.checkpoint.atomic import remove
from torture_harness import damage
from torture_harness.runner import Call, Runner
from torture_harness.specimens import Specimens, fit_args
from torture_harness.verdict import Allowed, Outcome, judge

CANARY = "canary"
Case = tuple[str, Call, Allowed, Path]  # in words, the command, what it may end in, the path that code would make
GENERATE = ["--prompt", "def f", "--max_new_tokens=6", "--temperature=0", "--backend=eager", "--out=work/texts.jsonl"]


class Mutations:
    """Cases by their number; each depends on the seed and its number alone.

    Args:
        specimens: that are damaged, in copies.
        runner: of the commands.
        seed: of all cases.
    """

    def __init__(self, specimens: Specimens, runner: Runner, seed: int) -> None:
        self.specimens, self.runner, self.seed = specimens, runner, seed
        self.work = specimens.folder / "work"
        self._expected: dict[tuple[str, ...], object] = {}

    def kind_of(self, number: int) -> str:
        """The kind of file of a case."""
        return ORDER[number % len(ORDER)]

    def run(self, number: int) -> tuple[Outcome, str, str]:
        """One case: its outcome, what shows it, and what was done."""
        draw = random.Random(f"{self.seed}/mutation/{number}")
        remove(self.work)
        self.work.mkdir()
        told, call, allowed, canary = KINDS[self.kind_of(number)](self, draw)
        outcome, words = judge(self.runner.run(call), allowed, canary)
        return outcome, words, f"{told}; {_in_words(call)}"

    def expected(self, kind: str, call: Call, prepare: Callable[[], object]) -> object:
        """The result of a command on the file as it was written."""
        key = (kind, *call.args, *call.result)
        if key not in self._expected:
            prepare()
            ended = self.runner.run(call)
            if ended.status or ended.result is None:
                raise RuntimeError(f"{_in_words(call)}: {ended.stderr[-2000:]}")
            self._expected[key] = ended.result
            for left in ("out", "texts.jsonl", "runs", "cache"):
                remove(self.work / left)
        return self._expected[key]

    def call(self, args: list[str], *result: str) -> Call:
        """A command in the specimens' folder."""
        return Call(args, self.specimens.folder, result, self.specimens.environment)


def _checkpoint(self: Mutations, draw: random.Random) -> Case:
    path = self.work / "last.ckpt"
    calls = {
        "fold": self.call(
            ["fold", "--ckpt", "work/last.ckpt", "--out", "work/out"], "folded_and_source", "work/out", "work/last.ckpt"
        ),
        "generate": self.call(
            ["generate", "--model", "work/last.ckpt", *GENERATE],
            "texts_and_model",
            "work/texts.jsonl",
            "work/last.ckpt",
        ),
        "fit": self.call(fit_args(12, "--ckpt_path", "work/last.ckpt", saves="work/runs"), "run_of", "work/runs/run"),
    }
    call = calls[draw.choice(("fold", "fold", "generate", "generate", "fit"))]
    same = self.expected("checkpoint", call, lambda: damage.copy(self.specimens.checkpoint, path))
    damage.copy(self.specimens.checkpoint, path)
    canary = self.work / CANARY
    if draw.random() < 0.1:
        return damage.plant_bomb(path, canary, draw), call, Allowed(), canary
    return f"last.ckpt: {damage.damage_bytes(path, draw)}", call, Allowed(same), canary


def _sharded(self: Mutations, draw: random.Random) -> Case:
    path = self.work / "shards.ckpt"
    call = self.call(
        ["fold", "--ckpt", "work/shards.ckpt", "--out", "work/out"], "folded_and_source", "work/out", "work/shards.ckpt"
    )
    same = self.expected("sharded", call, lambda: damage.copy(self.specimens.sharded, path))
    damage.copy(self.specimens.sharded, path)
    victim = draw.choice(sorted(path.iterdir()))
    canary = self.work / CANARY
    if victim.name == "meta.pt" and draw.random() < 0.2:
        return f"meta.pt: {damage.plant_bomb(victim, canary, draw)}", call, Allowed(), canary
    return f"{victim.name}: {damage.damage_bytes(victim, draw)}", call, Allowed(same), canary


def _folded(self: Mutations, draw: random.Random) -> Case:
    path = self.work / "folded"
    call = self.call(
        ["generate", "--model", "work/folded", *GENERATE], "texts_and_model", "work/texts.jsonl", "work/folded"
    )
    same = self.expected("folded", call, lambda: damage.copy(self.specimens.folded, path))
    damage.copy(self.specimens.folded, path)
    canary = self.work / CANARY
    how = draw.choice(("bytes", "bytes", "json", "mended", "mended", "tensors"))
    if how == "tensors":
        told, refused = damage.damage_tensors(path, draw)
        return f"model.safetensors, checksums mended: {told}", call, Allowed(edited=not refused), canary
    if how == "bytes":
        victim = draw.choice(sorted(path.iterdir()))
        return f"{victim.name}: {damage.damage_bytes(victim, draw)}", call, Allowed(same), canary
    victim = draw.choice([path / "config.json"] * 3 + [path / "tokenizer.json"])
    text, told = damage.damage_json(victim.read_text(), draw)
    victim.write_text(text)
    if how == "mended":
        damage.mend_checksums(path)
    told = f"{victim.name}{', checksums mended' * (how == 'mended')}: {told}"
    return told, call, Allowed(same, edited=how == "mended"), canary


def _tokenizer(self: Mutations, draw: random.Random) -> Case:
    source = self.specimens.folded / "tokenizer.json"
    args = fit_args(2, "--data.tokenizer", "work/tokenizer.json", "--data.cache_dir=work/cache", saves="work/runs")
    call = self.call(args, "done")
    self.expected("tokenizer", call, lambda: damage.copy(source, self.work / "tokenizer.json"))
    path = damage.copy(source, self.work / "tokenizer.json")
    if draw.random() < 0.5:
        told = damage.damage_bytes(path, draw)
    else:
        text, told = damage.damage_json(path.read_text(), draw)
        path.write_text(text)
    # It is the user's own: any other tokenizer is as good.
    return f"tokenizer.json: {told}", call, Allowed(edited=True), self.work / CANARY


def _cache(self: Mutations, draw: random.Random) -> Case:
    args = fit_args(2, "--data.cache_dir=work/cache", saves="work/runs")
    call = self.call(args, "run_and_cache", "work/runs/run", "work/cache")
    same = self.expected("cache", call, lambda: damage.copy(self.specimens.cache, self.work / "cache"))
    cache = damage.copy(self.specimens.cache, self.work / "cache")
    victim = draw.choice(
        sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix in (".bin", ".json"))
    )
    mended = False
    if victim.suffix == ".json" and draw.random() < 0.6:
        text, told = damage.damage_json(victim.read_text(), draw)
        victim.write_text(text)
        if mended := draw.random() < 0.5:
            damage.mend_meta(victim.parent)
    else:
        told = damage.damage_bytes(victim, draw)
    told = f"{victim.name}{', its checksum mended' * mended}: {told}"
    return told, call, Allowed(same, edited=mended), self.work / CANARY


def _config(self: Mutations, draw: random.Random) -> Case:
    path, source = self.work / "config.yaml", self.specimens.checkpoint.parents[1] / "config.yaml"
    args = ["fit", "--config", "work/config.yaml", "--trainer.max_steps=8", "--trainer.limit_val_batches=1"]
    args += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
    args += ["--trainer.logger=false", "--trainer.default_root_dir=work/runs", "--trainer.num_nodes=1"]
    call = self.call(args, "done")
    # A config that is read as another one has tokens of its own made, which the other cases' cache is not to have.
    call = replace(call, environment={"TAPERLIT_CACHE": str(self.work / "cache")})
    self.expected("config", call, lambda: damage.copy(source, path))
    damage.copy(self.specimens.cache, self.work / "cache")
    if draw.random() < 0.5:
        damage.copy(source, path)
        told = damage.damage_bytes(path, draw, pipe=False)  # a shell may give the options through one
    else:
        text = yaml.safe_load(source.read_text())
        # What says where files are written stays, and what says how long it trains.
        changed, told = damage.damage_json(damage.dump({key: text[key] for key in ("model", "data", "taper")}), draw)
        path.write_text(changed)
    return f"config.yaml: {told}", call, Allowed(edited=True), self.work / CANARY


KINDS: dict[str, Callable[[Mutations, random.Random], Case]] = {
    "checkpoint": _checkpoint,
    "folded": _folded,
    "sharded": _sharded,
    "cache": _cache,
    "tokenizer": _tokenizer,
    "config": _config,
}
ORDER = (
    "checkpoint",
    "folded",
    "checkpoint",
    "folded",
    "cache",
    "checkpoint",
    "folded",
    "sharded",
    "tokenizer",
    "config",
)


def _in_words(call: Call) -> str:
    first, *rest = call.args
    named = [word for word in rest if "work/" in word]
    return f"taperlit {first} ... {' '.join(named)}"
