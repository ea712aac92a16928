"""Models of transformers, tiny and random, with their own norms and outputs."""

import torch

from zoo.case import EITHER, FOLDS, REFUSED, add, floats, tokens

WORDS = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 12,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}


def family(config: str, model: str, **changes):
    """Builds a random model of a family from the names of its classes."""

    def build(norm):
        import transformers

        words = {**WORDS, **changes}
        return getattr(transformers, model)(getattr(transformers, config)(**words))

    return build


def pretrained(name, about, build, own, **words):
    add(name, about, build, own=own, theme="pretrained", inputs=words.pop("inputs", (tokens("B", "T"),)), **words)


def embedded(model, ids):
    """The encoder and the decoder of one."""
    return model(input_ids=ids, decoder_input_ids=ids.flip(1))


LLAMA = family("LlamaConfig", "LlamaForCausalLM")
TIED = family("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True)
pretrained("Llama", "LlamaForCausalLM", LLAMA, FOLDS)
pretrained("LlamaTied", "LlamaForCausalLM, tied", TIED, FOLDS)
pretrained("LlamaTiedScale", "LlamaForCausalLM, tied; tied='scale'", TIED, FOLDS, options={"tied": "scale"})
pretrained("LlamaBody", "LlamaModel: the final norm is the output", family("LlamaConfig", "LlamaModel"), REFUSED)
pretrained(
    "LlamaHidden",
    "LlamaForCausalLM with all hidden states returned",
    LLAMA,
    REFUSED,
    run=lambda model, ids: model(ids, output_hidden_states=True),
)
GPT2 = family(
    "GPT2Config",
    "GPT2LMHeadModel",
    n_embd=8,
    n_layer=2,
    n_head=2,
    n_positions=32,
    attn_pdrop=0.0,
    num_key_value_heads=2,
)
pretrained("GPT2", "GPT2LMHeadModel (tied, Conv1D)", GPT2, FOLDS)
pretrained("GPTNeoX", "GPTNeoXForCausalLM (parallel)", family("GPTNeoXConfig", "GPTNeoXForCausalLM"), FOLDS)
pretrained("GPTJ", "GPTJForCausalLM (parallel, one norm)", family(
    "GPTJConfig", "GPTJForCausalLM", n_embd=8, n_layer=1, n_head=2, n_positions=32, rotary_dim=4), FOLDS)  # fmt: skip
pretrained("Qwen2", "Qwen2ForCausalLM", family("Qwen2Config", "Qwen2ForCausalLM"), FOLDS)
QWEN3 = family("Qwen3Config", "Qwen3ForCausalLM")
pretrained("Qwen3", "Qwen3ForCausalLM: norms on queries and keys", QWEN3, REFUSED, blames="[qk]_norm")
pretrained("Qwen3Inner", "Qwen3ForCausalLM, the norms of blocks", QWEN3, FOLDS, names=("*layernorm",))
pretrained("Gemma", "GemmaForCausalLM (1 + weight, tied)", family("GemmaConfig", "GemmaForCausalLM"), FOLDS)
GEMMA2 = family("Gemma2Config", "Gemma2ForCausalLM")
pretrained("Gemma2", "Gemma2ForCausalLM: norms before and after", GEMMA2, REFUSED, blames="post_")
pretrained("Gemma2Inner", "Gemma2ForCausalLM, the norms before", GEMMA2, FOLDS,
    names=("*.input_layernorm", "*.pre_feedforward_layernorm"))  # fmt: skip
pretrained("Cohere", "CohereForCausalLM (parallel, centred without bias)",
    family("CohereConfig", "CohereForCausalLM"), FOLDS)  # fmt: skip
pretrained("Mixtral", "MixtralForCausalLM: routed experts", family(
    "MixtralConfig", "MixtralForCausalLM", num_local_experts=3), EITHER, why=".", dtypes=(torch.float32,))  # fmt: skip
pretrained("MixtralEager", "MixtralForCausalLM: routed experts in a loop", family("MixtralConfig", "MixtralForCausalLM",
    num_local_experts=3, experts_implementation="eager"), EITHER, sizes=[{"B": 4, "T": 16}] * 4)  # fmt: skip
pretrained("Bert", "BertForMaskedLM (post-norm)", family("BertConfig", "BertForMaskedLM"), REFUSED)
pretrained("T5", "T5ForConditionalGeneration", family(
    "T5Config", "T5ForConditionalGeneration", d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
    decoder_start_token_id=0), EITHER, run=embedded, call=embedded)  # fmt: skip
pretrained("HFViT", "ViTForImageClassification", family(
    "ViTConfig", "ViTForImageClassification", image_size=4, patch_size=2, num_key_value_heads=2), FOLDS,
    inputs=(floats("B", 3, 4, 4),))  # fmt: skip
pretrained("LlamaClassifier", "LlamaForSequenceClassification: the last token that is not padding",
    family("LlamaConfig", "LlamaForSequenceClassification", num_labels=3), EITHER)  # fmt: skip
