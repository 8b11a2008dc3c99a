"Tiny random models of every family, with gains, biases and norms that are far from trivial."

import torch
import transformers as tf

D_VOCAB, N_CTX = 97, 32
_IDS = dict(vocab_size=D_VOCAB, bos_token_id=0, eos_token_id=0, pad_token_id=0)
_HF = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=N_CTX, **_IDS)
_GQA = dict(_HF, intermediate_size=48, num_key_value_heads=2)
_OLD = dict(n_embd=32, n_layer=3, n_head=4, n_positions=N_CTX, **_IDS)  # names of GPT-2's time
_MOE = dict(_GQA, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
_WINDOW = dict(sliding_window=4)
_SPANS = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = dict(_GQA, head_dim=16, query_pre_attn_scalar=9, layer_types=_SPANS, sliding_window=4)
_TWO_BASES = dict(
    sliding_attention=dict(rope_type="default", rope_theta=100.0),
    full_attention=dict(rope_type="linear", factor=2.0, rope_theta=5000.0),
)

FAMILIES = {
    "gpt2": lambda: tf.GPT2Config(**_OLD),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_HF, intermediate_size=64, rotary_pct=0.25),
    "llama": lambda: tf.LlamaConfig(**_GQA),
    "olmo": lambda: tf.OlmoConfig(**_GQA),
    "olmoe": lambda: tf.OlmoeConfig(**_GQA, num_experts=4, num_experts_per_tok=2),
    "gemma3": lambda: tf.Gemma3TextConfig(**_GEMMA, rope_parameters=_TWO_BASES),
    "gemma2": lambda: tf.Gemma2Config(**_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=8.0),
    "olmo2": lambda: tf.Olmo2Config(**_GQA),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**_MOE, shared_expert_intermediate_size=40, decoder_sparse_step=1),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_MOE, head_dim=8),
    "mixtral": lambda: tf.MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2),
    "mistral": lambda: tf.MistralConfig(**_GQA, **_WINDOW),
    "qwen2": lambda: tf.Qwen2Config(**_GQA, **_WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**_GQA, head_dim=8, **_WINDOW, use_sliding_window=True, max_window_layers=1),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        **_HF,
        num_layers=3,
        num_heads=4,
        intermediate_size=64,
        window_size=4,
        attention_types=[[["global", "local", "global"], 1]],
    ),
    "gptj": lambda: tf.GPTJConfig(**_OLD, rotary_dim=4),
    "phi": lambda: tf.PhiConfig(**_HF, intermediate_size=64, partial_rotary_factor=0.5),
    "phi3": lambda: tf.Phi3Config(**_GQA, **_WINDOW),
    "stablelm": lambda: tf.StableLmConfig(**_GQA, partial_rotary_factor=0.5, use_qkv_bias=True),
    "stablelm-parallel": lambda: tf.StableLmConfig(
        **_GQA, partial_rotary_factor=0.5, use_parallel_residual=True, qk_layernorm=True
    ),
    "starcoder2": lambda: tf.Starcoder2Config(**_GQA, **_WINDOW),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(**_OLD),
    "gpt_bigcode-heads": lambda: tf.GPTBigCodeConfig(**_OLD, multi_query=False),
    "opt": lambda: tf.OPTConfig(**_HF, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": lambda: tf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **_IDS),
    "mpt": lambda: tf.MptConfig(d_model=32, n_layers=3, n_heads=4, max_seq_len=N_CTX, expansion_ratio=2, **_IDS),
    "falcon": lambda: tf.FalconConfig(**_HF, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon-7b": lambda: tf.FalconConfig(**_HF, multi_query=True, parallel_attn=True),
    "falcon-alibi": lambda: tf.FalconConfig(**_HF, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "granite": lambda: tf.GraniteConfig(
        **_GQA, attention_multiplier=0.5, residual_multiplier=0.4, embedding_multiplier=3.0, logits_scaling=2.0
    ),
    "smollm3": lambda: tf.SmolLM3Config(**_GQA, no_rope_layers=[1, 0, 1]),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=_SPANS, sliding_window=4
    ),
    "cohere": lambda: tf.CohereConfig(**_GQA, logit_scale=0.25, use_qk_norm=False),
    "cohere-normed": lambda: tf.CohereConfig(**_GQA, logit_scale=0.25, use_qk_norm=True),
    "gemma": lambda: tf.GemmaConfig(**_GQA, head_dim=16),
}
_FROM_ONE = ("gemma",)  # families whose gains are stored as 1 + weight


def tiny_family(name: str, seed: int = 0, peak: float = 3.0):
    "A random Hugging Face model of three layers; queries and keys are large, so that many heads fire."
    torch.manual_seed(seed)
    config = FAMILIES[name]()
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    start = 0.0 if name.startswith(_FROM_ONE) else 1.0
    with torch.no_grad():
        for key, p in model.named_parameters():
            norm = key.endswith("weight") and ("norm" in key or "ln_" in key or "ln1" in key)
            if p.ndim == 1 or norm:
                p.copy_(torch.randn_like(p) * 0.3 + (start if norm else 0.0))
                if any(part in key for part in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")):
                    p.add_(1.2)  # norms on queries and keys take the weights' size away
            else:
                p.copy_(torch.randn_like(p) * 0.1)
                if any(part in key for part in ("q_proj", "k_proj", "query_key_value", "c_attn", "Wqkv", "qkv_proj")):
                    p.mul_(peak)
    return model
