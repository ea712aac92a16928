"""Tiny random models as people find them: folders and GGUF files that ``transformers`` wrote or reads.

Two layers, under 50 thousand parameters, a real byte-level BPE tokenizer of 300 tokens; nothing is downloaded. Every
parameter carries noise, so that no gain is 1 and no bias 0.
"""

import json
from functools import cache
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

VOCAB, WIDTH, HEADS, INNER, LAYERS, CONTEXT = 300, 32, 4, 64, 2, 128
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = [f"def function_{i}(x):\n    return x * {i} + the_other(value, {i % 7})\n" for i in range(100)]

_common = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    max_position_embeddings=CONTEXT,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_grouped = {**_common, "num_key_value_heads": 2}

CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT,
        bos_token_id=0, eos_token_id=0,
    ),
    "llama": lambda: tf.LlamaConfig(**_grouped, tie_word_embeddings=False),
    "llama_tied": lambda: tf.LlamaConfig(**_grouped, tie_word_embeddings=True),
    "mistral": lambda: tf.MistralConfig(**_grouped, sliding_window=None),
    "mixtral": lambda: tf.MixtralConfig(**{**_grouped, "intermediate_size": 16}, num_local_experts=4),
    "qwen2": lambda: tf.Qwen2Config(**_grouped),
    "qwen3": lambda: tf.Qwen3Config(**_grouped, head_dim=8),
    "phi3": lambda: tf.Phi3Config(**_grouped),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_common),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, ffn_dim=INNER, num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT, word_embed_proj_dim=WIDTH, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "gemma": lambda: tf.GemmaConfig(**_grouped, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(**_grouped, head_dim=8, query_pre_attn_scalar=8, sliding_window=64),
    "olmo2": lambda: tf.Olmo2Config(**_grouped),
    "starcoder2": lambda: tf.Starcoder2Config(**_grouped),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, alibi=False,
        max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
"""The architectures, each under the name that its config calls ``model_type`` (``llama_tied`` has a tied head)."""


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer.to_str()


def tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens, ``<|endoftext|>`` (0), ``<|im_start|>`` (1) and ``<|im_end|>`` (2) among them."""
    return Tokenizer.from_str(_tokenizer_json())


def chat_tokenizer() -> tf.PreTrainedTokenizerFast:
    """The same as ``transformers`` has it: a chat model's, whose eos is ``<|im_end|>``, with a chat template."""
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def build(name: str, seed: int = 0, **changes) -> nn.Module:
    """A random model in float32 and evaluation mode.

    Args:
        name: one of :data:`CONFIGS`.
        seed: of its values.
        changes: fields of its config.
    """
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    assert sum(parameter.numel() for parameter in model.parameters()) < 50_000
    return model.eval()


def save(model: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32, max_shard_size="5GB") -> Path:
    """Save a model as the hub has them: weights, config, generation config, tokenizer, chat template.

    Args:
        model: of :func:`build`; it is left in ``dtype``.
        folder: made if need be.
        dtype: that its weights are stored in.
        max_shard_size: ``"60KB"`` gives several files and an index.
    """
    model.generation_config.update(temperature=0.7, top_p=0.9, do_sample=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    chat_tokenizer().save_pretrained(folder)
    return Path(folder)


def saved(name: str, folder: str | Path, **options) -> Path:
    """Build a model and save it, as :func:`build` and :func:`save` do."""
    return save(build(name), folder, **options)


def write_gguf(model: nn.Module, path: str | Path, half: bool = False, add=lambda writer: None) -> Path:
    """Write a Llama as llama.cpp's converter does, its tokenizer and chat template included.

    Args:
        model: of ``build("llama")`` or ``build("llama_tied")``.
        path: ends in ``.gguf``; its folder is made if need be.
        half: matrices in float16 (vectors stay float32), else all in float32.
        add: called with the ``gguf.GGUFWriter`` in the end, for more keys and tensors.
    """
    import gguf

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = getattr(config, "rope_parameters", None)  # transformers 5's; before there was rope_theta alone
    writer.add_rope_freq_base(rope["rope_theta"] if rope else config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    _write_tokenizer(writer, gguf)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _, _, rest = name.rpartition("model.layers.")
        block, _, rest = rest.partition(".") if "model.layers." in name else ("", "", name)
        stem = names[rest.removesuffix(".weight")]
        if stem in ("attn_q", "attn_k"):  # llama.cpp rotates neighbours, transformers halves
            heads = config.num_attention_heads if stem == "attn_q" else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        tensor = tensor.half() if half and tensor.ndim > 1 else tensor.float()
        writer.add_tensor(f"{f'blk.{block}.' if block else ''}{stem}.weight", tensor.contiguous().numpy())
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer, gguf) -> None:
    ids = tokenizer().get_vocab()
    merges = json.loads(_tokenizer_json())["model"]["merges"]
    tokens = sorted(ids, key=ids.get)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
