"""A model without any norm in TransformerLens: its ``HookedTransformer`` with ``normalization_type=None``.

Without norms the logits are linear in what every component writes, so direct logit attribution needs no frozen scale.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taperlit.checkpoint.atomic import write_directory
from taperlit.checkpoint.checksum import CHECKSUMS, checksum, checksum_of
from taperlit.checkpoint.plain import cannot_be_read, check_fields, check_file, damaged, read_json
from taperlit.compare import largest_difference
from taperlit.errors import TaperlitError
from taperlit.norm import Affine
from taperlit.transformer import Transformer, TransformerConfig

FORMAT = "taperlit-transformer-lens-1"
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
ROTARY = "rotary.frequencies"
MEND = "export it again"
TOLERANCE = 1e-4  # of the largest logit: float32 through many layers
CHECKED_TOKENS = 32
ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu_new", "relu": "relu"}  # by TransformerConfig.mlp; it has no sigmoid


@torch.no_grad()
def export_lens(
    model: Transformer, directory: str | Path, tokenizer_files: dict[str, str] | None = None, force: bool = False
) -> Path:
    """Write a model without norms for TransformerLens, all or nothing.

    The directory holds ``model.safetensors``, the state dict of a ``HookedTransformer`` in float32; ``config.json``,
    what its config is made of, with the checksums of all files; and the tokenizer. :func:`load_hooked` reads it. Before
    it appears, its logits are compared with the model's own.

    Args:
        model: folded, in float32.
        directory: made here.
        tokenizer_files: the texts of ``tokenizer.json`` and its like, by name.
        force: replace a directory that exists.

    Raises:
        TaperlitError: a norm is left, which is named; the MLP is of a kind or has biases that TransformerLens' has not;
            transformer-lens 3 is not installed; the logits differ; or the directory exists or cannot be written.
    """
    hooked_transformer()
    check_no_norms(model)
    state, config = hooked_state(model), hooked_config(model.config)
    shape = (2, min(CHECKED_TOKENS, model.config.block_size))
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def fill(partial: Path) -> None:
        save_file(state, partial / WEIGHTS)
        for name, text in (tokenizer_files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        written: dict[str, Any] = {"format": FORMAT, "hooked": config}
        written[CHECKSUMS] = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        written[CHECKSUMS][CONFIG] = checksum_of(written)
        (partial / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
        shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # safetensors makes it for the user alone
        wanted, got = model(tokens), load_hooked(partial)(tokens)
        difference = largest_difference(wanted, got)
        if not wanted.isfinite().all() or not difference <= TOLERANCE:
            raise TaperlitError(
                f"TransformerLens' logits differ from the model's own by {difference:.2g}, relative to the largest: "
                "something was put on the model that is neither weights nor config, a forward hook say; remove it."
            )

    return write_directory(Path(directory), fill, force)


def load_hooked(directory: str | Path, device: str = "cpu") -> Any:
    """A ``HookedTransformer`` of a directory that ``taperlit export --to transformer-lens`` wrote.

    Example::

        model = load_hooked("folded-transformer-lens")
        logits, cache = model.run_with_cache("The harbour froze")
        heads = cache.stack_head_results()  # (n_layer * n_head, B, T, d_model), each through model.W_U its own logits

    Args:
        directory: see there.
        device: where its weights go.

    Returns:
        The model, in eval mode and float32.

    Raises:
        TaperlitError: transformer-lens 3 is not installed, or a file is missing, damaged, without a checksum or another
            program's.
    """
    HookedTransformer, HookedTransformerConfig = hooked_transformer()
    directory = Path(directory)
    config = _read_config(directory)
    try:
        state = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(directory / WEIGHTS, error, MEND) from error
    tokenizer = None
    if (directory / TOKENIZER).exists():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if (directory / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / TOKENIZER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that it is gone in 4.0 is said in hooked_transformer
        try:
            cfg = HookedTransformerConfig(**config["hooked"], dtype=torch.float32, init_weights=False, device=device)
            model = HookedTransformer(cfg, tokenizer=tokenizer)
        except (TypeError, ValueError, AssertionError) as error:
            raise damaged(directory / CONFIG, error, MEND) from error
    frequencies = state.pop(ROTARY, None)
    if frequencies is not None:
        _set_rotary(model, frequencies.to(device))
    missing, unexpected = model.load_state_dict(state, strict=False)  # masks and rotary tables are not in the file
    parameters = {name for name, _ in model.named_parameters()}
    if left := [*unexpected, *(name for name in missing if name in parameters)]:
        raise TaperlitError(f"{directory} is not what its config says ({left[0]}); {MEND}.")
    return model.eval()


def _read_config(directory: Path) -> dict[str, Any]:
    """What ``config.json`` says, once every file is known to be as it was written."""
    path = directory / CONFIG
    config = read_json(path, MEND)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise TaperlitError(f"{directory} was not written by `taperlit export --to transformer-lens`; name what was.")
    check_fields(config.get("hooked"), dict[str, Any], path, "hooked", MEND)
    sums = config.get(CHECKSUMS, {})
    check_fields(sums, dict[str, int], path, CHECKSUMS, MEND)
    for name in (CONFIG, WEIGHTS, *([TOKENIZER] if (directory / TOKENIZER).exists() else [])):
        if name not in sums:
            raise TaperlitError(f"{path}: {CHECKSUMS}.{name} is missing; {MEND}.")
    for name, expected in sums.items():
        file = directory / name
        if Path(name).name != name:
            raise TaperlitError(f"{path}: {CHECKSUMS}.{name[:60]} is of no file beside it; {MEND}.")
        check_file(file, MEND)
        try:
            differs = expected != (checksum_of(config) if name == CONFIG else checksum(file))
        except OSError as error:
            raise cannot_be_read(file, error, MEND) from error
        if differs:
            raise damaged(file, "its checksum differs", MEND)
    return config


def _set_rotary(model: Any, frequencies: Tensor) -> None:
    """Give all heads the model's own rotary positions, whole, in one table.

    TransformerLens rounds the frequencies otherwise, which at position 10000 is a milliradian.
    """
    angles = torch.arange(model.cfg.n_ctx, dtype=torch.float32, device=frequencies.device)[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)  # (n_ctx, d_head)
    sin, cos = angles.sin(), angles.cos()
    for block in model.blocks:
        block.attn.rotary_sin, block.attn.rotary_cos = sin, cos


def hooked_transformer() -> tuple[Any, Any]:
    """``HookedTransformer`` and ``HookedTransformerConfig`` of TransformerLens.

    Raises:
        TaperlitError: it is not installed, or of a version without them.
    """
    try:
        import transformer_lens
    except ImportError as error:
        raise TaperlitError("TransformerLens is not installed: pip install 'taperlit[transformer-lens]'.") from error
    try:
        return transformer_lens.HookedTransformer, transformer_lens.HookedTransformerConfig
    except (AttributeError, ImportError) as error:
        raise TaperlitError(
            "This TransformerLens has no HookedTransformer (4.0 took it out): pip install 'transformer-lens<4'; or "
            "export --to transformers, and open that folder with its TransformerBridge.boot_transformers."
        ) from error


def check_no_norms(model: Transformer) -> None:
    """Refuse a model with a norm in it, by name; a final one that became a linear map is none.

    Raises:
        TaperlitError: names it.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in ("attn_norm", "mlp_norm", "final_norm"):
            continue
        gone = type(module) is nn.Identity or (name == "final_norm" and type(module) is Affine)
        if not gone:
            raise TaperlitError(
                f"The model still has a norm, {name} ({type(module).__name__}), and logits are not linear in what its "
                "parts write; train with --model.taper all, which removes every norm, and fold that."
            )


def hooked_config(config: TransformerConfig) -> dict[str, Any]:
    """The fields of a ``HookedTransformerConfig``, as JSON has them.

    Raises:
        TaperlitError: it has no such MLP.
    """
    if config.mlp not in ACTIVATIONS:
        raise TaperlitError(
            f"TransformerLens has no MLP of the kind {config.mlp}, only {', '.join(ACTIVATIONS)}; "
            "export --to transformers."
        )
    fields: dict[str, Any] = {
        "n_layers": config.n_layer,
        "d_model": config.d_model,
        "n_ctx": config.block_size,
        "d_head": config.head_width,
        "n_heads": config.n_head,
        "n_key_value_heads": config.kv_heads if config.kv_heads != config.n_head else None,
        "d_mlp": config.d_inner,
        "d_vocab": config.vocab_size,
        "act_fn": ACTIVATIONS[config.mlp],
        "gated_mlp": config.gated_mlp,
        "normalization_type": None,
        "positional_embedding_type": "standard" if config.position == "learned" else "rotary",
        "model_name": "taperlit",
    }
    if config.position == "rope":
        # The halves of a head are rotated against each other, not its neighbouring channels.
        fields |= {"rotary_dim": config.head_width, "rotary_base": config.rope_theta, "rotary_adjacent_pairs": False}
    if (scaling := config.rope_scaling) is not None:
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": scaling["factor"],
            "NTK_by_parts_low_freq_factor": scaling["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": scaling["high_freq_factor"],
            "NTK_original_ctx_len": scaling["original_max_position_embeddings"],
        }
    return fields


def hooked_state(model: Transformer) -> dict[str, Tensor]:
    """The parameters of a ``HookedTransformer``, by its names; biases that the model has not are 0.

    Beside them are the frequencies of rotary positions, under :data:`ROTARY`.

    Raises:
        TaperlitError: the MLP has biases that TransformerLens' has not.
    """
    state = {"embed.W_E": model.token_table()}
    if model.pos_embed is not None:
        state["pos_embed.W_pos"] = model.pos_embed.weight
    for i in range(model.config.n_layer):
        block = model.get_submodule(f"blocks.{i}")
        for name, value in (*_attention(block.attn, model.config), *_mlp(block.mlp, i)):
            state[f"blocks.{i}.{name}"] = value
    if model.rope is not None:
        state[ROTARY] = model.rope.frequencies()
    state["unembed.W_U"], state["unembed.b_U"] = _unembed(model)
    return {name: value.detach().float().contiguous().clone() for name, value in state.items()}


def _attention(attn: Any, config: TransformerConfig) -> Iterator[tuple[str, Tensor]]:
    grouped = "_" if config.kv_heads != config.n_head else ""
    for letter, linear, heads in (
        ("Q", attn.q_proj, config.n_head),
        ("K", attn.k_proj, config.kv_heads),
        ("V", attn.v_proj, config.kv_heads),
    ):
        own = grouped if letter != "Q" else ""
        yield f"attn.{own}W_{letter}", linear.weight.view(heads, config.head_width, config.d_model).transpose(1, 2)
        yield f"attn.{own}b_{letter}", _bias(linear).view(heads, config.head_width)
    yield "attn.W_O", attn.o_proj.weight.t().reshape(config.n_head, config.head_width, config.d_model)
    yield "attn.b_O", _bias(attn.o_proj)


def _mlp(mlp: Any, i: int) -> Iterator[tuple[str, Tensor]]:
    if mlp.gate_proj is not None:
        for name, linear in (("gate_proj", mlp.gate_proj), ("up_proj", mlp.up_proj)):
            if linear.bias is not None and linear.bias.any():
                raise TaperlitError(
                    f"blocks.{i}.mlp.{name} has a bias, and the gated MLP of TransformerLens has none there; export "
                    "--to transformers instead."
                )
        yield "mlp.W_gate", mlp.gate_proj.weight.t()
    yield "mlp.W_in", mlp.up_proj.weight.t()
    yield "mlp.b_in", _bias(mlp.up_proj)
    yield "mlp.W_out", mlp.down_proj.weight.t()
    yield "mlp.b_out", _bias(mlp.down_proj)


def _unembed(model: Transformer) -> tuple[Tensor, Tensor]:
    """``W_U`` (d_model, vocab_size) and ``b_U`` (vocab_size,), with a final map that was kept in them."""
    weight, bias = model.head.weight.t().double(), _bias(model.head).double()
    if isinstance(kept := model.final_norm, Affine):
        if kept.bias is not None:
            bias = bias + kept.bias.double() @ weight
        weight = kept.weight.double()[:, None] * weight
        if kept.centred:
            weight = weight - weight.mean(0)
    return weight, bias


def _bias(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias
