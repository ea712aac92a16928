"""``taperlit stress``: a model on tokens and prompts that no text has."""

import shlex
from typing import Any

from taperlit.errors import TaperlitError


def stress_model(model: str, device: str = "auto", seed: int = 0, quick: bool = False, json: str | None = None) -> None:
    """Try a model on tokens and prompts that no text has: do its logits stay finite, and its residuals of one size?

    It is run on every token of its vocabulary alone, on repeated tokens, on random ones, on contexts of all lengths (a
    spread of them where the context is long) and with the cache, in float32 (as every model is read), bfloat16 and
    float16. The exit status is 0 where in float32 every logit is finite and cached decoding is the forward pass, else
    1; for the other two it is told.

    Example::

        taperlit stress --model runs/quickstart/version_0/folded

    Args:
        model: a directory that ``taperlit fold`` wrote, a checkpoint, or a pretrained model's name, folder or ``.gguf``
            file.
        device: cpu, cuda, or auto for a GPU if there is one.
        seed: of the random tokens.
        quick: fewer tokens and lengths.
        json: write the rows, with versions, device, commit and command, to this file.

    Raises:
        TaperlitError: a model or device that cannot be used, a file that cannot be written, or what was found.
    """
    from taperlit.bench.machine import about, pick_device
    from taperlit.bench.results import check_paths, table, write_json
    from taperlit.checkpoint.folded import load_any
    from taperlit.data.tokenizer import parse_tokenizer
    from taperlit.norm import tapered_norms
    from taperlit.stress import FULL, QUICK, stress
    from taperlit.stress.report import COLUMNS

    check_paths(json, None)
    where = pick_device(device)
    loaded = load_any(model)
    if loaded.tokenizer_json is not None:
        parse_tokenizer(loaded.tokenizer_json, f"of {model}")  # refused before the model is tried
    sizes: Any = getattr(loaded.model, "config", loaded.model)
    report = stress(
        loaded.model.to(where),
        sizes.vocab_size,
        sizes.block_size,
        sizes=QUICK if quick else FULL,
        seed=seed,
        tokenizer_json=loaded.tokenizer_json,
    )
    rows = report.rows()
    print(table(rows, COLUMNS))
    print(f"verdict: {report.verdict()}")
    if json is not None:
        words = ["--model", model, "--device", device, "--seed", str(seed), *["--quick"] * quick, "--json", json]
        facts = about(shlex.join(["taperlit", "stress", *words]), where)
        write_json(json, {**facts, "model": model, "ok": report.ok, "verdict": report.verdict()}, rows)
        print(f"wrote {json}")
    if not report.ok:
        tapered = loaded.structure is not None or bool(tapered_norms(loaded.model))
        mend = ""
        if report.nonfinite(report.own) and tapered:
            mend = "; train it on with --taper.tail=true and fold it again, or leave the norms untapered that need it"
        raise TaperlitError(f"{model} fails in {report.own}, see the verdict{mend}.")
