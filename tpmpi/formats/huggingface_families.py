"""What the keys of config.json mean for each architecture of Hugging Face.  A new one is one more entry in HUGGING_FACE.

What a file leaves out is what the configuration classes of transformers 5.23 say.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

from tpmpi.config import ModelConfig
from tpmpi.formats import huggingface_tensors as tensors
from tpmpi.formats.families import REQUIRED, Family, Taken, number, read_facts, short, truth, whole
from tpmpi.formats.huggingface_config import (
    FIXED,
    NEUTRAL_KEYS,
    activation,
    agree,
    dense_layers,
    either,
    experts,
    flag,
    optional,
    pattern_windows,
    standard,
    telling,
    windows,
)
from tpmpi.formats.huggingface_rope import PHI3, SLIDING, WHERE, as_object, read_nested_rope, read_rope
from tpmpi.formats.source import FormatError

LLAMA = {  # the defaults of LlamaConfig
    'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32, 'num_attention_heads': 32,
    'num_key_value_heads': None, 'head_dim': None, 'hidden_act': 'silu', 'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6,
    'tie_word_embeddings': False, 'rope_theta': 10000.0, 'rope_scaling': None, 'rope_parameters': None}
LAYER_NORM = {key: value for key, value in LLAMA.items() if key not in ('rms_norm_eps', 'head_dim')} | {'layer_norm_eps': 1e-5}
MULTIPLIERS = {'embedding_multiplier': 1.0, 'logits_scaling': 1.0, 'residual_multiplier': 1.0, 'attention_multiplier': 1.0}
NO_BIAS = {'attention_bias': (False, None), 'mlp_bias': (False, None)}
GELU_TANH = ('gelu_pytorch_tanh', 'gelu', 'gelu_new', None)  # what Gemma's files say, for the same function
PICTURES = r'(model\.)?(vision_tower|multi_modal_projector)\..*'  # tensors that text does not meet
INV_FREQ = r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)'


def entry(config: Callable[[dict], ModelConfig], names: Mapping[str, str | Taken], facts: Mapping, fixed: Mapping | None = None,
          neutral: tuple[str, ...] = (), ignored: str = INV_FREQ, bos: int | None = 1, eos: int | None = 2, tidy: Callable = dict
          ) -> Family:
    """A family with the keys that all have; bos and eos are the defaults of its configuration class."""
    return Family(facts, FIXED | dict(fixed or {}), frozenset(neutral), config, names, re.compile(ignored), bos, eos, tidy)


# ---- the forms of Llama


def smollm3(facts: dict) -> ModelConfig:
    """no_rope_layers holds 1 for a layer that has RoPE."""
    count, interval = whole(facts, 'num_hidden_layers', WHERE), whole(facts, 'no_rope_layer_interval', WHERE)
    given = facts['no_rope_layers']
    if given is None and interval >= 1:
        given = [int((i + 1) % interval != 0) for i in range(min(count, 1 << 14))]
    if not isinstance(given, list) or len(given) != count or not all(type(i) is int and i in (0, 1) for i in given):
        raise FormatError(f'{WHERE}: no_rope_layers should hold 0 or 1 for each of {count} layers, '
                          'no_rope_layer_interval at least 1')
    return standard(facts, nope_layers=tuple(i for i, rope in enumerate(given) if not rope), **windows(
        facts, lambda i: not given[i], truth(facts, 'use_sliding_window', WHERE)))


def qwen(facts: dict, **more) -> ModelConfig:
    """Qwen 2 and 3."""
    first = whole(facts, 'max_window_layers', WHERE)
    return standard(facts, **windows(facts, lambda i: i >= first, truth(facts, 'use_sliding_window', WHERE)), **more)


def phi3(facts: dict) -> ModelConfig:
    """Phi-3 and Phi-4."""
    rope = functools.partial(read_rope, kinds=PHI3, partial='partial_rotary_factor')
    return standard(facts, rope, **windows(facts))


def ministral3(facts: dict) -> ModelConfig:
    """Ministral 3: queries grow with the position, as rope_parameters say."""
    key = 'rope_scaling' if facts['rope_scaling'] else 'rope_parameters'
    rope = as_object(facts[key] or MINISTRAL3_ROPE, key)
    growth = number({'llama_4_scaling_beta': rope.pop('llama_4_scaling_beta', None)}, 'llama_4_scaling_beta', WHERE)
    original = whole({'original_max_position_embeddings': rope.get('original_max_position_embeddings')},
                     'original_max_position_embeddings', WHERE)
    rope.pop('max_position_embeddings', None)
    return standard(facts | {key: rope}, query_growth=growth, query_growth_positions=original, **windows(facts))


def granite(facts: dict, **more) -> ModelConfig:
    """Granite with and without experts."""
    scaling = number(facts, 'logits_scaling', WHERE)
    if not scaling > 0:
        raise FormatError(f'{WHERE}: logits_scaling is {scaling}; expected a number above 0')
    return standard(facts, embedding_multiplier=number(facts, 'embedding_multiplier', WHERE), logit_multiplier=1 / scaling,
                    residual_multiplier=number(facts, 'residual_multiplier', WHERE),
                    attention_scale=number(facts, 'attention_multiplier', WHERE), **more)


# ---- Gemma


def gemma(facts: dict, rope: Callable = read_rope, **more) -> ModelConfig:
    """What the three have in common."""
    return standard(facts, rope, activation='gelu_tanh', embedding_multiplier=whole(facts, 'hidden_size', WHERE) ** 0.5, **more)


def gemma2(facts: dict) -> ModelConfig:
    """Even layers have a window; attn_logit_softcapping caps the scores."""
    return capped_gemma(facts, read_rope, attention_softcap=optional(facts, 'attn_logit_softcapping'),
                        **windows(facts, lambda i: i % 2 == 0))


def gemma3(facts: dict) -> ModelConfig:
    """Layers with a window have a RoPE of their own."""
    if facts['layer_types'] is None and facts['_sliding_window_pattern'] not in (None, 6):
        raise FormatError(f'{WHERE}: _sliding_window_pattern is {short(facts["_sliding_window_pattern"])}, which transformers '
                          'does not read; supported is 6, or layer_types')
    rope = functools.partial(read_nested_rope, local_theta='rope_local_base_freq', keep_length=True)
    return capped_gemma(facts, rope, qk_norm='head', **pattern_windows(facts, 6))


def capped_gemma(facts: dict, rope: Callable, **more) -> ModelConfig:
    """What Gemma 2 and 3 have in common."""
    scalar = number(facts, 'query_pre_attn_scalar', WHERE)
    if not scalar > 0:
        raise FormatError(f'{WHERE}: query_pre_attn_scalar is {scalar}; expected a number above 0')
    return gemma(facts, rope, post_norm=True, attention_scale=scalar ** -0.5,
                 logit_softcap=optional(facts, 'final_logit_softcapping'), **more)


def in_text_config(facts: dict, architectures: Mapping[str | None, str]) -> ModelConfig:
    """The language model in one that sees pictures.  architectures: by its model_type."""
    text = facts['text_config']
    if not isinstance(text, dict):
        raise FormatError(f'{WHERE}: text_config is no object')
    kind = text.get('model_type', next(iter(architectures)))
    if kind not in architectures:
        raise FormatError(f'{WHERE}: text_config: model_type is {short(kind)}; supported is {" or ".join(architectures)}')
    if facts.get('tie_word_embeddings') is not None:  # goes before the one inside
        text = text | {'tie_word_embeddings': facts['tie_word_embeddings']}
    family = HUGGING_FACE[architectures[kind]]
    return family.config(read_facts(telling(text, family), family, NEUTRAL_KEYS.__contains__, f'{WHERE}: text_config'))


# ---- layer norms


def gpt2(facts: dict) -> ModelConfig:
    """Its keys have names of their own."""
    hidden, positions = whole(facts, 'n_embd', WHERE), whole(facts, 'n_positions', WHERE)
    names = {'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head'}
    ffn = 4 * hidden if facts['n_inner'] is None else whole(facts, 'n_inner', WHERE)
    return standard(
        facts | {ours: facts[theirs] for ours, theirs in names.items()} | {'intermediate_size': ffn},
        lambda facts, head_dim: {'rope_theta': None, 'max_positions': positions, 'learned_positions': positions},
        activation=activation(facts['activation_function']), gated=False, norm='layer', norm_bias=True, qkv_bias=True,
        attn_out_bias=True, mlp_bias=True, attention_scale=None if truth(facts, 'scale_attn_weights', WHERE) else 1.0)


def gpt2_family(by_layer: bool) -> Family:
    """`scale_attn_by_inverse_layer_idx` changes what is taken of the file."""
    facts = {
        'vocab_size': 50257, 'n_positions': 1024, 'n_embd': 768, 'n_layer': 12, 'n_head': 12, 'n_inner': None,
        'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True, 'tie_word_embeddings': True}
    return entry(
        gpt2, tensors.GPT2_BY_LAYER if by_layer else tensors.GPT2, facts, {'scale_attn_by_inverse_layer_idx': (by_layer,)},
        ('reorder_and_upcast_attn', 'n_ctx', 'summary_activation', 'summary_first_dropout', 'summary_proj_to_labels',
         'summary_type', 'summary_use_proj'), r'transformer\.h\.\d+\.attn\.(masked_)?bias', 50256, 50256)


def layer_norm(facts: dict, rope: Callable = read_rope, **more) -> ModelConfig:
    return standard(facts, rope, norm='layer', norm_bias=True, **more)


def gpt_neox(facts: dict) -> ModelConfig:
    parallel = truth(facts, 'use_parallel_residual', WHERE)
    agree(facts, 'partial_rotary_factor', facts['rotary_pct'])
    agree(facts, 'rope_theta', facts['rotary_emb_base'])
    return layer_norm(facts, functools.partial(read_rope, partial='rotary_pct', theta='rotary_emb_base'), gated=False,
                      mlp_bias=True, parallel_block=parallel, parallel_mlp_norm=parallel)


def phi(facts: dict) -> ModelConfig:
    norm = truth(facts, 'qk_layernorm', WHERE)
    config = layer_norm(facts, functools.partial(read_rope, partial='partial_rotary_factor'), gated=False, parallel_block=True,
                        qkv_bias=True, attn_out_bias=True, mlp_bias=True, head_bias=True, qk_norm='head' if norm else 'none',
                        qk_norm_bias=norm)
    agree(facts, 'rotary_dim', config.rotary_dim or config.head_dim)
    return config


def stablelm(facts: dict) -> ModelConfig:
    return layer_norm(facts, functools.partial(read_rope, partial='partial_rotary_factor'),
                      parallel_block=truth(facts, 'use_parallel_residual', WHERE), qkv_bias=flag(facts, 'use_qkv_bias'),
                      qk_norm='head' if truth(facts, 'qk_layernorm', WHERE) else 'none')


def parallel_cohere(facts: dict, **more) -> ModelConfig:
    """What Cohere and Cohere 2 have in common."""
    return standard(facts, norm='layer', parallel_block=True, logit_multiplier=number(facts, 'logit_scale', WHERE), **more)


def cohere(facts: dict) -> ModelConfig:
    """The one with norms of q and k.  model_max_length goes before max_position_embeddings, which is smaller than that."""
    longer = {} if facts['model_max_length'] is None else {'max_positions': whole(facts, 'model_max_length', WHERE)}
    return parallel_cohere(facts, qk_norm='head' if flag(facts, 'use_qk_norm') else 'none', **longer)


def cohere2(facts: dict) -> ModelConfig:
    """Layers that see everything have no RoPE."""
    hidden, heads = whole(facts, 'hidden_size', WHERE), whole(facts, 'num_attention_heads', WHERE)
    if facts['head_dim'] not in (None, hidden // max(1, heads)):
        raise FormatError(f'{WHERE}: head_dim is {facts["head_dim"]!r}; supported is hidden_size / num_attention_heads only')
    found = pattern_windows(facts, 4)
    count = whole(facts, 'num_hidden_layers', WHERE)
    sliding = found and (found['window_layers'] if found['window_layers'] is not None else range(count))
    return parallel_cohere(facts, nope_layers=tuple(i for i in range(min(count, 1 << 14)) if i not in (sliding or ())), **found)


# ---- OLMo


def olmo3(facts: dict) -> ModelConfig:
    """Layers with a window have a RoPE that is not stretched."""
    local = as_object(as_object(facts['rope_parameters'], 'rope_parameters').get(SLIDING), SLIDING)
    if 'rope_theta' not in local and facts['rope_theta'] != 500000.0:
        raise FormatError(f'{WHERE}: rope_theta is {short(facts["rope_theta"])}; supported is 500000, or rope_parameters with '
                          f'one for {SLIDING!r}, because readers differ in what such layers have')
    rope = functools.partial(read_nested_rope, local_theta='rope_theta', keep_length=False)
    return standard(facts, rope, **OLMO, **windows(facts, lambda i: (i + 1) % 4 != 0))


OLMO = {'pre_norm': False, 'post_norm': True, 'qk_norm': 'all'}


# ---- mixtures of experts


def mixtral(facts: dict) -> ModelConfig:
    count = either(facts, ('num_local_experts', 'num_experts'), 8)
    return standard(facts, **windows(facts), **experts(facts, count, 'intermediate_size', normalize=True))


def qwen2_moe(facts: dict) -> ModelConfig:
    first = whole(facts, 'max_window_layers', WHERE)
    return standard(
        facts, qkv_bias=truth(facts, 'qkv_bias', WHERE),
        **windows(facts, lambda i: i % 2 == 0 and i < first, truth(facts, 'use_sliding_window', WHERE)),
        **experts(facts, whole(facts, 'num_experts', WHERE), 'moe_intermediate_size', dense_layers(facts), shared_gate=True,
                  shared_ffn_size=whole(facts, 'shared_expert_intermediate_size', WHERE)))


def qwen3_moe(facts: dict) -> ModelConfig:
    count = either(facts, ('num_local_experts', 'num_experts'), 128)
    return standard(facts, qk_norm='head', **windows(facts, use=truth(facts, 'use_sliding_window', WHERE)),
                    **experts(facts, count, 'moe_intermediate_size', dense_layers(facts)))


def olmoe(facts: dict) -> ModelConfig:
    count = either(facts, ('num_experts', 'num_local_experts'), 64)
    return standard(facts, qk_norm='all', **experts(facts, count, 'intermediate_size'))


def granite_moe(facts: dict) -> ModelConfig:
    return granite(facts, **experts(facts, whole(facts, 'num_local_experts', WHERE), 'intermediate_size', normalize=True))


# ---- the table

ROUTER = ('output_router_logits', 'router_aux_loss_coef', 'router_jitter_noise')  # of training
QWEN = LLAMA | {
    'vocab_size': 151936, 'intermediate_size': 22016, 'num_key_value_heads': 32, 'max_position_embeddings': 32768,
    'use_sliding_window': False, 'sliding_window': 4096, 'max_window_layers': 28, 'layer_types': None,
    'dual_chunk_attention_config': None}
QWEN_FIXED = {'use_mrope': (False, None)}
MISTRAL = LLAMA | {
    'intermediate_size': 14336, 'num_key_value_heads': 8, 'max_position_embeddings': 4096 * 32, 'sliding_window': 4096}
MINISTRAL3_ROPE = {  # where its file says nothing of RoPE
    'type': 'yarn', 'rope_theta': 1e6, 'factor': 16.0, 'original_max_position_embeddings': 16384, 'beta_fast': 32.0,
    'beta_slow': 1.0, 'mscale_all_dim': 1.0, 'mscale': 1.0, 'llama_4_scaling_beta': 0.1}
GEMMA = {key: value for key, value in LLAMA.items() if key != 'hidden_act'} | {
    'vocab_size': 256000, 'hidden_size': 3072, 'intermediate_size': 24576, 'num_hidden_layers': 28, 'num_attention_heads': 16,
    'num_key_value_heads': 16, 'head_dim': 256, 'max_position_embeddings': 8192, 'tie_word_embeddings': True,
    'attention_bias': False}
GEMMA2 = GEMMA | {
    'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26, 'num_attention_heads': 8, 'num_key_value_heads': 4,
    'query_pre_attn_scalar': 256, 'sliding_window': 4096, 'layer_types': None, 'final_logit_softcapping': 30.0,
    'attn_logit_softcapping': 50.0}
GEMMA3 = {key: value for key, value in GEMMA2.items() if key != 'attn_logit_softcapping'} | {
    'vocab_size': 262208, 'max_position_embeddings': 131072, 'final_logit_softcapping': None, 'rope_theta': 1e6,
    'rope_local_base_freq': 1e4, 'sliding_window_pattern': None, '_sliding_window_pattern': None}
GEMMA_FIXED = {'hidden_act': GELU_TANH, 'hidden_activation': GELU_TANH, 'use_bidirectional_attention': (False, None)}
COHERE = {**LAYER_NORM, 'vocab_size': 256000, 'hidden_size': 8192, 'intermediate_size': 22528, 'num_hidden_layers': 40,
          'num_attention_heads': 64, 'max_position_embeddings': 8192, 'tie_word_embeddings': True, 'attention_bias': False,
          'logit_scale': 0.0625}
COHERE2 = COHERE | {'head_dim': None, 'sliding_window': 4096, 'layer_types': None, 'sliding_window_pattern': None}
COHERE2_FIXED = {
    'use_qk_norm': (False, None), 'layer_norm_bias': (False, None), 'rotary_pct': (1.0, 1, None), 'layer_switch': (4, None),
    'position_embedding_type': ('rope_gptj', None), 'order_of_interleaved_layers': ('local_attn_first', None),
    'use_gated_activation': (True, None), 'use_parallel_block': (True, None), '_sliding_window_pattern': (4, None)}
OLMO2 = LLAMA | {'vocab_size': 50304, 'attention_bias': False, 'rms_norm_eps': 1e-5}
MOE = {'num_experts_per_tok': 2, 'norm_topk_prob': False}
QWEN_MOE = {'decoder_sparse_step': 1, 'mlp_only_layers': None, 'hidden_size': 2048, 'num_hidden_layers': 24}

HUGGING_FACE = {
    'LlamaForCausalLM': entry(
        standard, tensors.LLAMA, LLAMA | {'attention_bias': False, 'mlp_bias': False},
        {'rope_interleaved': (False,), 'partial_rotary_factor': (1.0, 1, None), 'sliding_window': (None,)}),
    'SmolLM3ForCausalLM': entry(
        smollm3, tensors.LLAMA,
        LLAMA | {'vocab_size': 128256, 'hidden_size': 2048, 'num_hidden_layers': 36, 'num_attention_heads': 16,
                 'num_key_value_heads': 4, 'max_position_embeddings': 32768, 'rope_theta': 2e6, 'use_sliding_window': False,
                 'sliding_window': None, 'no_rope_layers': None, 'no_rope_layer_interval': 4, 'layer_types': None,
                 'attention_bias': False, 'mlp_bias': False, 'tie_word_embeddings': True}, {},
        ('max_window_layers',), bos=128000, eos=128001),
    **dict.fromkeys(('MistralForCausalLM', 'MinistralForCausalLM'), entry(
        lambda facts: standard(facts, **windows(facts)), tensors.LLAMA, MISTRAL | {'layer_types': None}, NO_BIAS)),
    'Ministral3ForCausalLM': entry(
        ministral3, tensors.LLAMA,
        MISTRAL | {'vocab_size': 131072, 'num_hidden_layers': 34, 'head_dim': 128, 'rms_norm_eps': 1e-5, 'sliding_window': None,
                   'max_position_embeddings': 262144}, NO_BIAS),
    'Mistral3ForConditionalGeneration': entry(
        lambda facts: in_text_config(facts, {'mistral': 'MistralForCausalLM', 'ministral3': 'Ministral3ForCausalLM'}),
        tensors.LLAMA, {'text_config': REQUIRED, 'tie_word_embeddings': None}, {},
        ('vision_config', 'image_token_index', 'multimodal_projector_bias', 'projector_hidden_act', 'spatial_merge_size',
         'vision_feature_layer'), PICTURES, tidy=tensors.of_language_model),
    'Qwen2ForCausalLM': entry(
        lambda facts: qwen(facts, qkv_bias=True), tensors.LLAMA, QWEN, QWEN_FIXED | NO_BIAS, bos=None, eos=None),
    'Qwen3ForCausalLM': entry(
        lambda facts: qwen(facts, qk_norm='head'), tensors.QWEN3, QWEN | {'head_dim': 128, 'attention_bias': False}, QWEN_FIXED,
        bos=None, eos=None),
    'GemmaForCausalLM': entry(gemma, tensors.GEMMA, GEMMA, GEMMA_FIXED, bos=2, eos=1),
    'Gemma2ForCausalLM': entry(gemma2, tensors.GEMMA2, GEMMA2, GEMMA_FIXED, ('sliding_window_size',), bos=2, eos=1),
    'Gemma3ForCausalLM': entry(
        gemma3, tensors.GEMMA3, GEMMA3, GEMMA_FIXED | {'attn_logit_softcapping': (None,)}, bos=2, eos=1),
    'Gemma3ForConditionalGeneration': entry(
        lambda facts: in_text_config(facts, {'gemma3_text': 'Gemma3ForCausalLM'}), tensors.GEMMA3, {'text_config': REQUIRED},
        {'tie_word_embeddings': (True, None)},
        ('vision_config', 'mm_tokens_per_image', 'boi_token_index', 'eoi_token_index', 'image_token_index'), PICTURES, 2, 1,
        tensors.of_language_model),
    'Phi3ForCausalLM': entry(
        phi3, tensors.PHI3,
        LLAMA | {'vocab_size': 32064, 'hidden_size': 3072, 'intermediate_size': 8192, 'max_position_embeddings': 4096,
                 'original_max_position_embeddings': 4096, 'rms_norm_eps': 1e-5, 'sliding_window': None,
                 'partial_rotary_factor': 1.0},
        NO_BIAS | {'lm_head_bias': (False, None), 'full_attn_mod': (1, None), 'interpolate_factor': (1, None)}, ('auto_map',),
        eos=32000),
    'GPT2LMHeadModel': gpt2_family(by_layer=False),
    'GPTNeoXForCausalLM': entry(
        gpt_neox, tensors.GPT_NEOX,
        {key: value for key, value in LAYER_NORM.items() if key != 'num_key_value_heads'} | {
            'rope_theta': None, 'partial_rotary_factor': None,
            'vocab_size': 50432, 'hidden_size': 6144, 'intermediate_size': 24576, 'num_hidden_layers': 44,
            'num_attention_heads': 64, 'hidden_act': 'gelu', 'use_parallel_residual': True, 'attention_bias': True,
            'rotary_pct': 0.25, 'rotary_emb_base': 10000.0},
        {}, ('num_key_value_heads',), r'gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)', 0, 2,
        tensors.embed_out),
    'PhiForCausalLM': entry(
        phi, tensors.PHI,
        LAYER_NORM | {'vocab_size': 51200, 'hidden_size': 2048, 'intermediate_size': 8192, 'num_hidden_layers': 24,
                      'hidden_act': 'gelu_new', 'qk_layernorm': False, 'partial_rotary_factor': 0.5, 'rotary_dim': None}, {},
        ('auto_map', 'attention_bias')),
    'CohereForCausalLM': entry(
        cohere, tensors.COHERE, COHERE | {'rope_theta': 500000.0, 'use_qk_norm': False, 'model_max_length': None},
        {'layer_norm_bias': (False, None)}, bos=5, eos=255001),
    'Cohere2ForCausalLM': entry(
        cohere2, tensors.COHERE, COHERE2, COHERE2_FIXED, ('use_embedding_sharing', 'use_parallel_embedding'), bos=5, eos=255001),
    'Olmo2ForCausalLM': entry(lambda facts: standard(facts, **OLMO), tensors.OLMO2, OLMO2, bos=None, eos=50279),
    'Olmo3ForCausalLM': entry(
        olmo3, tensors.OLMO2, OLMO2 | {'rope_theta': 500000.0, 'sliding_window': 4096, 'layer_types': None}, bos=None, eos=50279),
    'GraniteForCausalLM': entry(granite, tensors.LLAMA, LLAMA | MULTIPLIERS | {'attention_bias': False, 'mlp_bias': False}),
    'StableLmForCausalLM': entry(
        stablelm, tensors.STABLELM,
        LAYER_NORM | {'vocab_size': 50304, 'hidden_size': 2560, 'intermediate_size': 6912, 'num_key_value_heads': 32,
                      'max_position_embeddings': 4096, 'use_qkv_bias': False, 'qk_layernorm': False,
                      'use_parallel_residual': False, 'partial_rotary_factor': 0.25},
        {'use_norm_bias': (True, None), 'rotary_scaling_factor': (1.0, None)}, ('num_heads',), bos=0, eos=0),
    'MixtralForCausalLM': entry(
        mixtral, tensors.MIXTRAL,
        MISTRAL | MOE | {'rms_norm_eps': 1e-5, 'rope_theta': 1e6, 'sliding_window': None, 'num_local_experts': None,
                         'num_experts': None},
        NO_BIAS, ROUTER),
    'Qwen2MoeForCausalLM': entry(
        qwen2_moe, tensors.QWEN2_MOE,
        QWEN | MOE | QWEN_MOE | {'intermediate_size': 5632, 'num_attention_heads': 16, 'num_key_value_heads': 16,
                                 'moe_intermediate_size': 1408, 'shared_expert_intermediate_size': 5632, 'num_experts_per_tok': 4,
                                 'num_experts': 60, 'qkv_bias': True}, QWEN_FIXED, ROUTER, bos=None, eos=None,
        tidy=tensors.single_experts),
    'Qwen3MoeForCausalLM': entry(
        qwen3_moe, tensors.QWEN3_MOE,
        {key: value for key, value in QWEN.items() if key not in ('layer_types', 'max_window_layers')} | MOE | QWEN_MOE | {
            'intermediate_size': 6144, 'num_key_value_heads': 4, 'moe_intermediate_size': 768, 'num_experts_per_tok': 8,
            'num_experts': None, 'num_local_experts': None, 'attention_bias': False},
        QWEN_FIXED | {'qkv_bias': (False,), 'use_qk_norm': (True,), 'shared_expert_intermediate_size': (0, None)},
        (*ROUTER, 'max_window_layers'), bos=None, eos=None, tidy=tensors.single_experts),
    'OlmoeForCausalLM': entry(
        olmoe, tensors.OLMOE,
        OLMO2 | MOE | {'hidden_size': 2048, 'intermediate_size': 2048, 'num_hidden_layers': 16, 'num_attention_heads': 16,
                       'max_position_embeddings': 4096, 'num_experts_per_tok': 8, 'num_experts': None, 'num_local_experts': None},
        {'clip_qkv': (None,)}, ROUTER, bos=None, eos=50279, tidy=tensors.single_experts),
    'GraniteMoeForCausalLM': entry(
        granite_moe, tensors.GRANITE_MOE,
        LLAMA | MULTIPLIERS | {'attention_bias': False, 'num_local_experts': 8, 'num_experts_per_tok': 2}, {}, ROUTER),
}
VARIANTS = {'GPT2LMHeadModel': ('scale_attn_by_inverse_layer_idx', gpt2_family(by_layer=True))}


def find_family(architecture: str, values: Mapping) -> Family:
    """The entry of an architecture.  Where a key decides what is taken of the tensors, there is one for when it is true."""
    key, variant = VARIANTS.get(architecture, (None, None))
    return variant if values.get(key) is True else HUGGING_FACE[architecture]
