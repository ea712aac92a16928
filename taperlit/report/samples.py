"""Short texts from a run's model."""

from pathlib import Path
from typing import NamedTuple

from taperlit.errors import TaperlitError

PROMPT_TOKENS = 32  # of the validation text that is continued
WAYS = {"likeliest tokens": 0.0, "temperature 0.8, top 50": 0.8}
TOP_K = 50


class Sample(NamedTuple):
    """A text.

    Args:
        way: how its tokens were chosen, in words.
        prompt: what it continues.
        text: the continuation.
    """

    way: str
    prompt: str
    text: str


def make_samples(
    model: Path, checkpoint: Path | None, prompt: str | None, new_tokens: int, seed: int = 0
) -> list[Sample]:
    """Continue a prompt greedily and by chance.

    Args:
        model: a folded folder or a checkpoint.
        checkpoint: whose validation text is continued where no prompt is given; without one the text begins itself.
        prompt: to continue.
        new_tokens: most tokens of each text.
        seed: of the draws.

    Returns:
        One per way in :data:`WAYS`, and the text as it goes on where the prompt is from validation text.

    Raises:
        TaperlitError: a model that cannot be read or decoded, or one without a tokenizer.
    """
    import torch

    from taperlit.checkpoint.folded import load_model
    from taperlit.data.tokenizer import end_of_text_id, parse_tokenizer
    from taperlit.decode.engine import Engine
    from taperlit.decode.sampling import Sampling
    from taperlit.decode.text import TextStream

    loaded = load_model(model)
    if loaded.tokenizer_json is None:
        raise TaperlitError(f"{model} has no tokenizer; fold a checkpoint that was trained with text data.")
    tokenizer = parse_tokenizer(loaded.tokenizer_json, "of the model")
    context, end = loaded.model.config.block_size, end_of_text_id(tokenizer)
    block = [] if prompt is not None or checkpoint is None else _validation_text(checkpoint)
    if prompt is None:
        most = min(PROMPT_TOKENS, max(1, context // 2))
        ids, after = block[:most] or [end], block[most : most + new_tokens]
    else:
        ids, after = tokenizer.encode(prompt, add_special_tokens=False).ids, []
        if not 1 <= len(ids) <= context:
            raise TaperlitError(f"--prompt has {len(ids)} tokens; give it 1 to {context}, the model's context.")
    count = min(new_tokens, context - len(ids) + 1)

    def text(tokens: list[int]) -> str:
        stream = TextStream(tokenizer, ids)
        stream.take(tokens)
        return stream.text

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(loaded.model, 1, len(ids) + count - 1, device, torch.float32, backend="eager")
    samples = []
    for way, temperature in WAYS.items():
        sampling = Sampling(temperature, TOP_K if temperature else None)
        samples.append(
            Sample(way, tokenizer.decode(ids), text(engine.generate([ids], count, sampling, {end}, seed)[0]))
        )
    if after:
        samples.append(Sample("the text itself", tokenizer.decode(ids), text(after)))
    return samples


def _validation_text(checkpoint: Path) -> list[int]:
    """The first block of validation text that a checkpoint keeps, if any, as token ids."""
    from taperlit.checkpoint.reader import open_checkpoint

    blocks = open_checkpoint(checkpoint, verify=False).get("TextDataModule", {}).get("sample")
    return [] if blocks is None or not len(blocks) else blocks[0].tolist()
