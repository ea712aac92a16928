"""``taperlit generate``, against a tokenizer and full forward passes that know no cache, no batch and no stream."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer

from taperlit.checkpoint.folded import load_model, write_folded
from taperlit.cli import main
from taperlit.data.tokenizer import END_OF_TEXT, train_tokenizer
from taperlit.decode.engine import Engine
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.norm import shared_gate

CONTEXT = 32
TEXT = "def function_1(x):\n    return x * 3 + 7\n\nclass One:\n    größe = 12\n"
GREEDY = ["--temperature=0"]


@pytest.fixture
def folded(tiny, tmp_path):
    """A folded model's directory."""
    model = tiny(["blocks.*"], block_size=CONTEXT).eval()
    shared_gate(model).set(0.0)
    structure = fold(model, lambda: model(torch.arange(8)[None]))
    tokenizer = train_tokenizer(iter([TEXT * 20]), 290)
    return str(write_folded(tmp_path / "folded", model, structure, tokenizer.to_str()))


@pytest.fixture
def run(folded, capsys):
    """Runs the command and returns what it printed."""

    def generate(*args: str, model: str = folded):
        capsys.readouterr()
        assert main(["generate", "--model", model, "--device=cpu", *args]) == 0, capsys.readouterr().err
        return capsys.readouterr()

    return generate


@torch.no_grad()
def greedy(model: str, prompt: str, steps: int) -> tuple[list[int], str]:
    """The likeliest tokens by full forward passes, and why there are no more."""
    loaded = load_model(model)
    tokenizer = Tokenizer.from_str(loaded.tokenizer_json)
    tokens, new = tokenizer.encode(prompt).ids, []
    while len(tokens) <= CONTEXT:
        if len(new) == steps:
            return new, "length"
        token = loaded.model(torch.tensor([tokens]))[0, -1].argmax().item()
        if token == tokenizer.token_to_id(END_OF_TEXT):
            return new, "stop"
        tokens, new = [*tokens, token], [*new, token]
    return new, "length" if len(new) == steps else "context"


def text_of(model: str, tokens: list[int]) -> str:
    return Tokenizer.from_str(load_model(model).tokenizer_json).decode(tokens)


def test_one_prompt_is_continued_on_the_standard_output_and_nothing_else_is_there(folded, run):
    printed = run("--prompt", "def f", "--max_new_tokens=12", *GREEDY)
    assert printed.out == "def f" + text_of(folded, greedy(folded, "def f", 12)[0]) + "\n"
    cache, rate = printed.err.splitlines()
    slots = 16  # 4 tokens or fewer and 11 more, rounded up
    assert cache.startswith(f"taperlit: the cache takes {2 * 2 * slots * 32 * 4 / 1e6:.1f} MB: 1 x ")
    assert rate.startswith("taperlit: 12 tokens in ")
    assert rate.endswith(" tokens/s")


PROMPTS = ["def function_1(x):", "class One:\n    x", "x * 3 + 7 return 12 = 12", "y", "def f"]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_several_prompts_are_continued_as_each_would_be_alone(folded, run, tmp_path, batch_size):
    (tmp_path / "more.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p} if i else {"text": p, "id": 3}) for i, p in enumerate(PROMPTS[2:]))
    )
    args = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--prompts", str(tmp_path / "more.jsonl"), *GREEDY]
    out = tmp_path / "new" / "out.jsonl"
    # So many tokens that the longest prompt fills the context of its batch before the others' texts are whole.
    printed = run(*args, "--max_new_tokens=25", f"--batch_size={batch_size}", "--out", str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    blocks = []
    for i, line in enumerate(lines, 1):
        expected, ended = greedy(folded, line["prompt"], 25)
        assert (line["tokens"], line["ended"]) == (expected, ended)
        assert line["text"] == text_of(folded, expected)
        blocks.append(f"== {i}/5\n{line['prompt']}{line['text']}\n")
    assert {line["ended"] for line in lines} == {"length", "context", "stop"}
    assert printed.out == "".join(blocks)
    full = ", ".join(f"prompt {i}" for i, line in enumerate(lines, 1) if line["ended"] == "context")
    assert f"taperlit: the model's context of {CONTEXT} tokens is full with the texts of {full}\n" in printed.err
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_a_text_ends_at_a_stop_token_its_length_or_the_context(folded, run, tmp_path):
    whole, ended = greedy(folded, "def f", 100)
    assert ended == "context"
    tokenizer = Tokenizer.from_str(load_model(folded).tokenizer_json)
    words = {token: text_of(folded, [token]) for token in whole[1:] if token != whole[0]}
    token, word = next((token, word) for token, word in words.items() if tokenizer.encode(word).ids == [token])
    before = whole[: whole.index(token)]
    for number, (args, tokens, ended) in enumerate(
        [
            (["--max_new_tokens=3"], whole[:3], "length"),
            ([], whole, "context"),
            ([f"--stop_tokens={token}"], before, "stop"),
            ([f"--stop_tokens=[1,{token}]"], before, "stop"),
            (["--stop", word, "--stop", word], before, "stop"),
        ]
    ):
        out = tmp_path / str(number)
        printed = run("--prompt", "def f", *GREEDY, *args, "--out", str(out))
        line = json.loads(out.read_text())
        assert (line["tokens"], line["ended"]) == (tokens, ended)
        assert ("context of 32 tokens is full\n" in printed.err) == (ended == "context")
        assert printed.out == f"def f{line['text']}\n"


def test_the_seed_decides_the_text(run, tmp_path):
    args = ["--max_new_tokens=10", "--batch_size=2", *["--prompt=def f"] * 5]
    texts = [run(*args, f"--seed={seed}").out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0].split("== ")[1:])) == 5  # nor do the batches of one run repeat each other
    one = [run("--prompt=def f", *options).out for options in ([], ["--top_k=1"], GREEDY)]
    assert one[0] != one[1] == one[2]
    filtered = ["--temperature=2", "--top_k=40", "--top_p=0.9", "--min_p=0.01", "--repetition_penalty=1.2"]
    assert run("--prompt=def f", *filtered).out.startswith("def f")


@pytest.mark.parametrize(
    "prompt", ["1", "1e3", "null", "true", "a: b", "[x", "[x]", "{x}", "- x", "--x", " x", "'x'", "é"]
)
def test_a_prompt_is_taken_as_it_stands(run, prompt):
    assert run(f"--prompt={prompt}", "--max_new_tokens=1").out.startswith(prompt)
    assert f"\n{prompt}" in run(f"--prompt={prompt}", "--prompt", "x", "--max_new_tokens=1").out


def test_prompts_from_a_file_and_options_from_another(run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffé x\r\n  two\u2028 \n".encode())
    out = run("--prompts", str(tmp_path / "prompts.txt"), "--max_new_tokens=1").out
    assert out.startswith("== 1/2\né x")
    assert "\n== 2/2\n  two\u2028 " in out
    (tmp_path / "options.yaml").write_text("prompt: ['1', b]\nmax_new_tokens: 1\n")
    out = run("--config", str(tmp_path / "options.yaml"), "--prompt=c").out
    assert [block.split("\n")[1][0] for block in out.split("== ")[1:]] == ["1", "b", "c"]
    (tmp_path / "options.yaml").write_text("prompt: one\nmax_new_tokens: 1\n")
    assert run("--config", str(tmp_path / "options.yaml")).out.startswith("one")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(run, dtype):
    assert run("--prompt=def f", f"--dtype={dtype}", "--backend=eager").out.startswith("def f")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to continue; give --prompt TEXT or --prompts FILE"),
        (["--prompt="], "The prompt has no tokens; give it at least one character"),
        (["--prompt=x", "--prompt="], "Prompt 2 has no tokens"),
        (["--prompt=" + "1 = " * 20], "tokens, and the model's context is 32; shorten it"),
        (["--prompt=\udcff"], "The prompt is not UTF-8"),
        (["--prompts=nowhere.txt"], "nowhere.txt cannot be read: No such file or directory"),
        (["--prompts=gap.txt"], "gap.txt, line 2, is empty"),
        (["--prompts=bytes.txt"], "bytes.txt cannot be read"),
        (["--prompts=torn.jsonl"], "torn.jsonl, line 1, is no JSON"),
        (["--prompts=other.jsonl"], "other.jsonl, line 1, has no `prompt` or `text` that is a string"),
        (["--prompts=none.txt"], "nothing to continue"),
        (["--prompt=x", "--out=gap.txt"], "gap.txt exists; name another --out"),
        (["--prompt=x", "--out=gap.txt/out"], "gap.txt/out cannot be written"),
        (["--prompt=x", "--out=gap.txt/new/out"], "gap.txt is a file"),
        (["--prompt=x", "--stop=return x * 3"], "stop 'return x * 3' is "),
        (["--prompt=x", "--stop="], "stop '' is 0 tokens"),
        (["--prompt=x", "--stop_tokens=300"], "stop_tokens has 300; the model's tokens are 0 to 299"),
        (["--prompt=x", "--device=tpu9"], "There is no device 'tpu9'"),
        (["--prompt=x", "--device=cuda:99"], "There is no device 'cuda:99' here"),
        (["--prompt=x", "--device=meta"], "There is no device 'meta' here"),
        (["--prompt=x", "--max_new_tokens=0"], "max_new_tokens is 0; give 1 or more"),
        (["--prompt=x", "--batch_size=0"], "batch_size is 0; give 1 or more"),
        (["--prompt=x", "--temperature=-1"], "temperature is -1"),
        (["--prompt=x", "--top_p=2"], "top_p is 2"),
    ],
)
def test_what_is_wrong_is_one_line(folded, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\n")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a\n')
    (tmp_path / "other.jsonl").write_text('{"prompt": 3}\n')
    (tmp_path / "none.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert main(["generate", "--model", folded, "--device=cpu", *args]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("taperlit: error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_without_a_tokenizer_is_refused(tiny, tmp_path, capsys):
    model = tiny(["blocks.*"]).eval()
    shared_gate(model).set(0.0)
    structure = fold(model, lambda: model(torch.arange(8)[None]))
    write_folded(tmp_path / "folded", model, structure)
    assert main(["generate", "--model", str(tmp_path / "folded"), "--prompt=x"]) == 1
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_file_of_texts_is_written_whole_or_not_at_all(folded, tmp_path, monkeypatch, capsys):
    stream = Engine.stream

    def failing(self, *args, **kwargs):
        yield next(iter(stream(self, *args, **kwargs)))
        raise TaperlitError("it broke.")

    monkeypatch.setattr(Engine, "stream", failing)
    out = tmp_path / "out" / "texts.jsonl"
    assert main(["generate", "--model", folded, "--prompt=x", "--out", str(out)]) == 1
    assert "it broke." in capsys.readouterr().err
    assert not out.parent.exists()


def test_nothing_is_imported_that_a_text_need_not_wait_for(folded):
    program = f"""
import sys
from taperlit.cli import main
assert main(["generate", "--model", {folded!r}, "--prompt=def f", "--max_new_tokens=2", "--device=cpu"]) == 0
slow = ("lightning", "datasets", "transformers", "torchmetrics", "tensorboard", "matplotlib")
slow += ("torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.utils.tensorboard")
print([name for name in slow if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
