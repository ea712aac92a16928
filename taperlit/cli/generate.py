"""``taperlit generate``: continue a prompt, printing as it goes."""

import torch
from tokenizers import Tokenizer

from taperlit.checkpoint.folded import load_model
from taperlit.data.tokenizer import end_of_text_id
from taperlit.decode.generate import stream_text
from taperlit.errors import TaperlitError


def generate(
    model: str,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Continue a prompt with a folded model or a checkpoint, printing as it goes.

    Args:
        model: a directory that ``taperlit fold`` wrote, or a checkpoint.
        prompt: text to continue.
        max_new_tokens: stop after this many tokens, or at the end of the text or of the model's context.
        temperature: 0 takes the likeliest token.
        top_k: draw from this many of the likeliest.
        top_p: draw from the likeliest that together reach this probability.
        seed: of the draws.

    Raises:
        TaperlitError: an unusable model, one without a tokenizer, or an empty prompt.
    """
    torch.set_float32_matmul_precision("high")
    loaded = load_model(model)
    if loaded.tokenizer_json is None:
        raise TaperlitError(f"{model} has no tokenizer; fold a checkpoint that was trained with text data.")
    tokenizer = Tokenizer.from_str(loaded.tokenizer_json)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pieces = stream_text(
        loaded.model.to(device),
        tokenizer,
        prompt,
        max_new_tokens,
        stop=end_of_text_id(tokenizer),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
    )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
