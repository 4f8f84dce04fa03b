"""How the architectures of Hugging Face call their tensors: our names without 'layers/', and theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tpmpi.formats import views
from tpmpi.formats.families import (
    Taken,
    as_taken,
    expert,
    flat,
    for_each_head,
    for_each_kv_head,
    interleaved,
    of_each_head,
    of_qkv,
    part,
    plus_one,
    transposed,
)
from tpmpi.formats.source import TensorSource


def in_layer(**names: str) -> dict[str, str]:
    """Names within 'model.layers.{}.', without '.weight'."""
    return {ours: f'model.layers.{{}}.{theirs}.weight' for ours, theirs in names.items()}


def changed(table: Mapping[str, str | Taken], *changes, names: tuple[str, ...]) -> dict[str, str | Taken]:
    """The table with more changes made to some of its entries."""
    more = {name: Taken(as_taken(table[name]).name, (*changes, *as_taken(table[name]).changes)) for name in names}
    return {**table, **more}


def each_head(q: str, k: str) -> dict[str, Taken]:
    """Norms of q and k with one gain for all heads."""
    names = in_layer(q_norm='self_attn.' + q, k_norm='self_attn.' + k)
    return {'q_norm': Taken(names['q_norm'], (for_each_head,)), 'k_norm': Taken(names['k_norm'], (for_each_kv_head,))}


def expert_mlps(at: str, gate: str = 'gate_proj', up: str = 'up_proj', down: str = 'down_proj') -> dict[str, str]:
    """A router and experts with matrices of their own."""
    return in_layer(router=f'{at}.gate') | {
        f'experts/{ours}': f'model.layers.{{}}.{at}.experts.{{}}.{theirs}.weight'
        for ours, theirs in (('gate', gate), ('up', up), ('down', down))}


LLAMA = {
    'embedding': 'model.embed_tokens.weight', 'final_norm': 'model.norm.weight', 'head': 'lm_head.weight',
    **in_layer(attn_norm='input_layernorm', q='self_attn.q_proj', k='self_attn.k_proj', v='self_attn.v_proj',
               attn_out='self_attn.o_proj', mlp_norm='post_attention_layernorm', gate='mlp.gate_proj', up='mlp.up_proj',
               down='mlp.down_proj')}
QWEN3 = LLAMA | each_head('q_norm', 'k_norm')
POST_NORMS = in_layer(attn_post_norm='post_attention_layernorm', mlp_post_norm='post_feedforward_layernorm')
WHOLE_QK_NORMS = in_layer(q_norm='self_attn.q_norm', k_norm='self_attn.k_norm')  # one gain for all heads together
OLMO2 = LLAMA | POST_NORMS | WHOLE_QK_NORMS

GEMMA = changed(LLAMA, plus_one, names=('attn_norm', 'mlp_norm', 'final_norm'))
GEMMA2 = changed(LLAMA | POST_NORMS | in_layer(mlp_norm='pre_feedforward_layernorm'), plus_one,
                 names=('attn_norm', 'attn_post_norm', 'mlp_norm', 'mlp_post_norm', 'final_norm'))
GEMMA3 = changed(GEMMA2 | each_head('q_norm', 'k_norm'), plus_one, names=('q_norm', 'k_norm'))

PHI3 = LLAMA | {
    name: Taken('model.layers.{}.self_attn.qkv_proj.weight', (of_qkv(i),)) for i, name in enumerate('qkv')} | {
    name: Taken('model.layers.{}.mlp.gate_up_proj.weight', (part(i),)) for i, name in enumerate(('gate', 'up'))}
PHI = LLAMA | {'final_norm': 'model.final_layernorm.weight'} | in_layer(
    attn_out='self_attn.dense', up='mlp.fc1', down='mlp.fc2') | each_head('q_layernorm', 'k_layernorm')
COHERE = LLAMA | {
    'q': Taken(LLAMA['q'], (interleaved(),)), 'k': Taken(LLAMA['k'], (interleaved(kv=True),)),
    'q_norm': Taken(WHOLE_QK_NORMS['q_norm'], (flat, interleaved())),
    'k_norm': Taken(WHOLE_QK_NORMS['k_norm'], (flat, interleaved(kv=True)))}
STABLELM = LLAMA | {
    'q_norm': Taken('model.layers.{}.self_attn.q_layernorm.norms.{part}.weight', parts=lambda config: config.num_heads),
    'k_norm': Taken('model.layers.{}.self_attn.k_layernorm.norms.{part}.weight', parts=lambda config: config.num_kv_heads)}


def by_layer(source: TensorSource, place) -> TensorSource:
    """Queries of layer i divided by i + 1, as `scale_attn_by_inverse_layer_idx` divides their scores."""
    return views.mapped(source, lambda x: x / (place.layer + 1)) if place.layer else source


GPT2 = {
    'embedding': 'transformer.wte.weight', 'position_embedding': 'transformer.wpe.weight', 'head': 'lm_head.weight',
    'final_norm': 'transformer.ln_f.weight', 'attn_norm': 'transformer.h.{}.ln_1.weight',
    'mlp_norm': 'transformer.h.{}.ln_2.weight',
    **{name: Taken('transformer.h.{}.attn.c_attn.weight', (transposed, of_qkv(i))) for i, name in enumerate('qkv')},
    **{ours: Taken(f'transformer.h.{{}}.{theirs}.weight', (transposed,)) for ours, theirs in (
        ('attn_out', 'attn.c_proj'), ('up', 'mlp.c_fc'), ('down', 'mlp.c_proj'))}}
GPT2_BY_LAYER = GPT2 | {'q': Taken(GPT2['q'].name, (*GPT2['q'].changes, by_layer))}
NEOX_LAYER = 'gpt_neox.layers.{}.'
GPT_NEOX = {
    'embedding': 'gpt_neox.embed_in.weight', 'final_norm': 'gpt_neox.final_layer_norm.weight', 'head': 'embed_out.weight',
    'attn_norm': NEOX_LAYER + 'input_layernorm.weight', 'mlp_norm': NEOX_LAYER + 'post_attention_layernorm.weight',
    **{name: Taken(NEOX_LAYER + 'attention.query_key_value.weight', (of_each_head(i),)) for i, name in enumerate('qkv')},
    'attn_out': NEOX_LAYER + 'attention.dense.weight', 'up': NEOX_LAYER + 'mlp.dense_h_to_4h.weight',
    'down': NEOX_LAYER + 'mlp.dense_4h_to_h.weight'}

MIXTRAL = LLAMA | expert_mlps('block_sparse_moe', 'w1', 'w3', 'w2')
QWEN3_MOE = QWEN3 | expert_mlps('mlp')
QWEN2_MOE = LLAMA | expert_mlps('mlp') | in_layer(**{
    'shared/gate': 'mlp.shared_expert.gate_proj', 'shared/up': 'mlp.shared_expert.up_proj',
    'shared/down': 'mlp.shared_expert.down_proj', 'shared/gate_by_token': 'mlp.shared_expert_gate'})
OLMOE = LLAMA | WHOLE_QK_NORMS | expert_mlps('mlp')
GRANITE_MOE = LLAMA | in_layer(router='block_sparse_moe.router.layer') | {
    'experts/gate': Taken('model.layers.{}.block_sparse_moe.input_linear.weight', (expert, part(0))),
    'experts/up': Taken('model.layers.{}.block_sparse_moe.input_linear.weight', (expert, part(1))),
    'experts/down': Taken('model.layers.{}.block_sparse_moe.output_linear.weight', (expert,))}


# ---- names that differ between files


def embed_out(found: dict[str, TensorSource]) -> dict[str, TensorSource]:
    """GPT-NeoX's head, which is 'lm_head.weight' within transformers 5."""
    names = {'lm_head.weight': 'embed_out.weight'} if 'embed_out.weight' not in found else {}
    return {names.get(name, name): source for name, source in found.items()}


def of_language_model(found: dict[str, TensorSource]) -> dict[str, TensorSource]:
    """The language model within one that sees pictures, in the names of transformers 4 and 5."""
    return {re.sub(r'^language_model\.(?=model\.|lm_head\.)|(?<=^model\.)language_model\.', '', name): source
            for name, source in found.items()}


def single_experts(found: dict[str, TensorSource]) -> dict[str, TensorSource]:
    """Stacks of all experts of a layer, as transformers 5 holds them, as the matrices of each."""
    tidied = {}
    for name, source in found.items():
        stack = re.fullmatch(r'(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)', name)
        if stack is None or len(source.shape) != 3:
            tidied[name] = source
            continue
        for i in range(min(source.shape[0], 1 << 14)):
            one = views.element(source, i)
            if stack[2] == 'down_proj':
                tidied[f'{stack[1]}{i}.down_proj.weight'] = one
            else:
                half = one.shape[0] // 2
                tidied[f'{stack[1]}{i}.gate_proj.weight'] = views.rows(one, 0, half)
                tidied[f'{stack[1]}{i}.up_proj.weight'] = views.rows(one, half, one.shape[0])
    return tidied
