"""What differs between families in a Hugging Face folder: keys, names of tensors, and how fused ones are cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from family_cases import load_reference, write_folder

from tpmpi.formats import FormatError, TensorSource, open_checkpoint, views
from tpmpi.weights import decode, encode

REMOVE = object()


def edit(path: Path, **changes) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not REMOVE}))


@pytest.mark.parametrize('name, changes, message', [
    ('smollm3', {'no_rope_layers': [1, 0]}, 'no_rope_layers should hold 0 or 1 for each of 4 layers'),
    ('mistral', {'sliding_window': '16'}, "sliding_window is '16'; expected a whole number"),
    ('qwen2', {'layer_types': ['sliding_attention'] * 2}, "layer_types has 'sliding_attention', but there is no sliding_window"),
    ('qwen2', {'layer_types': ['chunked_attention'] * 2}, "layer_types is .*; expected 'full_attention' or 'sliding_attention'"),
    ('qwen3_moe', {'num_experts': 5}, 'num_local_experts is 6 and num_experts is 5; expected the same'),
    ('qwen3_moe', {'mlp_only_layers': [-1]}, 'mlp_only_layers is .-1.; expected numbers of layers'),
    ('qwen2_moe', {'decoder_sparse_step': 0}, 'decoder_sparse_step is 0; expected 1 or more'),
    ('gemma2', {'use_bidirectional_attention': True}, 'use_bidirectional_attention is True; supported is False or None'),
    ('gemma2', {'query_pre_attn_scalar': 0}, 'query_pre_attn_scalar is 0.0; expected a number above 0'),
    ('gemma2', {'hidden_activation': 'silu'}, "hidden_activation is 'silu'; supported is 'gelu_pytorch_tanh'"),
    ('gemma3', {'layer_types': REMOVE, '_sliding_window_pattern': 3}, '_sliding_window_pattern is 3'),
    ('gemma3', {'rope_parameters': {'rope_type': 'default'}}, "rope_parameters holds 'rope_type'; expected 'full_attention'"),
    ('olmo3', {'rope_parameters': None, 'rope_theta': 1e4}, 'rope_theta is 10000.0; supported is 500000'),
    ('phi3', {'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "type 'linear'; supported is default, longrope"),
    ('phi3', {'num_key_value_heads': 2}, r'qkv_proj.weight has the shape .120, 60.; the configuration asks for 100 rows'),
    ('granite', {'logits_scaling': 0}, 'logits_scaling is 0.0; expected a number above 0'),
    ('granitemoe', {'num_local_experts': 4}, 'router.layer.weight has the shape .5, 60.'),
    ('stablelm', {'qk_layernorm': True}, 'q_layernorm.norms.0.weight is missing'),
    ('cohere2', {'head_dim': 8}, 'head_dim is 8; supported is hidden_size / num_attention_heads only'),
    ('cohere2', {'layer_types': REMOVE, 'sliding_window_pattern': 0}, 'sliding_window_pattern is 0; expected 1 or more'),
])
def test_what_a_family_does_not_have_is_refused_by_name(tmp_path, name, changes, message):
    write_folder(tmp_path, load_reference(name))
    edit(tmp_path / 'config.json', **changes)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)


# ---- names that differ between files

def renamed(folder: Path, name: str, change) -> None:
    """The folder of a case whose tensors are `change`(those of the case)."""
    from safetensors.numpy import load_file, save_file
    write_folder(folder, load_reference(name))
    save_file(change(load_file(folder / 'model.safetensors')), folder / 'model.safetensors')


def same_as_reference(folder: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / 'plain').mkdir()
    write_folder(tmp_path / 'plain', load_reference(name))
    found, expected = open_checkpoint(folder), open_checkpoint(tmp_path / 'plain')
    assert found.config == expected.config
    for ours, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[ours].read(), tensor.read())


def stacked(tensors: dict) -> dict:
    """The experts of each layer in the two stacks that transformers 5 computes with."""
    stacks = {}
    for at in sorted({name.partition('experts.')[0] for name in tensors if '.experts.' in name}):
        gate, up, down = ([tensors.pop(f'{at}experts.{i}.{part}.weight') for i in range(6)]
                          for part in ('gate_proj', 'up_proj', 'down_proj'))
        stacks[at + 'experts.gate_up_proj'] = np.stack([np.concatenate(pair) for pair in zip(gate, up, strict=True)])
        stacks[at + 'experts.down_proj'] = np.stack(down)
    return tensors | stacks


@pytest.mark.parametrize('name, change', [
    ('gpt2', lambda tensors: {name.removeprefix('transformer.'): t for name, t in tensors.items()} | {
        'h.0.attn.bias': np.ones((1, 1, 8, 8), np.uint8), 'h.1.attn.masked_bias': np.zeros(1, np.float32)}),
    ('gpt_neox', lambda tensors: tensors | {'lm_head.weight': tensors.pop('embed_out.weight')}),
    ('gpt_neox', lambda tensors: tensors | {'gpt_neox.layers.0.attention.rotary_emb.inv_freq': np.ones(2, np.float32)}),
    ('qwen2_moe', stacked), ('qwen3_moe', stacked),
])
def test_other_names_of_the_same_tensors(tmp_path, name, change):
    (tmp_path / 'other').mkdir()
    renamed(tmp_path / 'other', name, change)
    same_as_reference(tmp_path / 'other', name, tmp_path)


@pytest.mark.parametrize('name', ['llama', 'qwen3', 'gemma2', 'mixtral'])
def test_names_without_the_prefix_of_the_body(tmp_path, name):
    """As embedding models are saved, which have no head."""
    (tmp_path / 'other').mkdir()
    renamed(tmp_path / 'other', name, lambda tensors: {name.removeprefix('model.'): t for name, t in tensors.items()})
    same_as_reference(tmp_path / 'other', name, tmp_path)


@pytest.mark.parametrize('name, changes', [
    ('llama', {'layer_types': ['full_attention'] * 2, 'use_sliding_window': False, 'max_window_layers': 28}),
    ('llama', {'original_max_position_embeddings': 4096}),
    ('mixtral', {'layer_types': ['full_attention'] * 2}), ('qwen3_moe', {'layer_types': ['full_attention'] * 2}),
    ('gpt_neox', {'head_dim': 'that of the heads'}), ('cohere', {'head_dim': 'that of the heads'}),
])
def test_keys_that_say_what_holds_anyway(tmp_path, name, changes):
    (tmp_path / 'other').mkdir()
    write_folder(tmp_path / 'other', load_reference(name))
    config = json.loads((tmp_path / 'other' / 'config.json').read_text())
    if isinstance(changes.get('head_dim'), str):
        changes = {'head_dim': config['hidden_size'] // config['num_attention_heads']}
    edit(tmp_path / 'other' / 'config.json', **changes)
    same_as_reference(tmp_path / 'other', name, tmp_path)
    news = {'layer_types': ['sliding_attention'] * 2, 'head_dim': 2, 'original_max_position_embeddings': 4096}
    key = next(key for key in changes if key in news)
    stretched = {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}} if key.startswith('original') else {}
    edit(tmp_path / 'other' / 'config.json', **{key: news[key]}, **stretched)
    with pytest.raises(FormatError, match=f'unknown key {key!r}'):
        open_checkpoint(tmp_path / 'other')


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('name', ['ministral3', 'mistral'])
def test_the_language_model_of_mistral_3_with_pictures(tmp_path, name, tied):
    folder = tmp_path / 'other'
    folder.mkdir()
    renamed(folder, name, lambda tensors: {f'language_model.{name}': t for name, t in tensors.items() if not (
        tied and name.startswith('lm_head'))} | {'vision_tower.patch_conv.weight': np.ones(3, np.float32)})
    text = json.loads((folder / 'config.json').read_text()) | {'model_type': name}
    (folder / 'config.json').write_text(json.dumps({
        'architectures': ['Mistral3ForConditionalGeneration'], 'model_type': 'mistral3', 'text_config': text, 'vision_config': {},
        'spatial_merge_size': 2, 'eos_token_id': 256, 'tie_word_embeddings': tied}))
    if not tied:
        same_as_reference(folder, name, tmp_path)
    assert open_checkpoint(folder).config.tie_embeddings == tied
    edit(folder / 'config.json', text_config=text | {'model_type': 'pixtral'})
    with pytest.raises(FormatError, match="model_type is 'pixtral'; supported is mistral or ministral3"):
        open_checkpoint(folder)


@pytest.mark.parametrize('prefix', ['language_model.model.', 'model.language_model.'])
def test_the_language_model_of_gemma_3_with_pictures(tmp_path, prefix):
    folder = tmp_path / 'other'
    folder.mkdir()
    renamed(folder, 'gemma3', lambda tensors: {name.replace('model.', prefix, 1): t for name, t in tensors.items()} | {
        'vision_tower.embeddings.weight': np.ones(3, np.float32), 'model.multi_modal_projector.w': np.ones(3, np.float32)})
    text = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({
        'architectures': ['Gemma3ForConditionalGeneration'], 'model_type': 'gemma3', 'text_config': text, 'vision_config': {},
        'mm_tokens_per_image': 256, 'eos_token_id': [256, 7]}))
    same_as_reference(folder, 'gemma3', tmp_path)
    assert open_checkpoint(folder).eos_token_ids == (256, 7)
    edit(folder / 'config.json', eos_token_id=REMOVE, text_config=text | {'eos_token_id': [256, 8]})
    assert open_checkpoint(folder).eos_token_ids == (256, 8)
    edit(folder / 'config.json', text_config=text | {'sliding_window': 'a'})
    with pytest.raises(FormatError, match="sliding_window is 'a'"):
        open_checkpoint(folder)


def test_eos_of_the_class_where_the_files_name_none(tmp_path):
    write_folder(tmp_path, load_reference('gemma2'))
    edit(tmp_path / 'config.json', eos_token_id=REMOVE, bos_token_id=REMOVE)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (2, (1,))
    (tmp_path / 'cohere').mkdir()
    write_folder(tmp_path / 'cohere', load_reference('cohere'))
    edit(tmp_path / 'cohere' / 'config.json', eos_token_id=REMOVE)
    assert open_checkpoint(tmp_path / 'cohere').eos_token_ids == ()  # its 255001 is no token of so small a vocabulary


# ---- views of tensors

def source(values: np.ndarray, reads: list) -> TensorSource:
    """A tensor in memory that notes which rows are read."""
    def part(start: int, stop: int) -> TensorSource:
        def load():
            reads.append((start, stop))
            return values[start:stop]
        return TensorSource('memory', values[start:stop].shape, 'float32', load,
                            rows=lambda first, last: part(start + first, start + last))
    return part(0, len(values))


def test_a_slice_of_a_fused_tensor_reads_no_more_than_its_rows():
    values, reads = np.arange(60, dtype=np.float32).reshape(12, 5), []
    whole = source(values, reads)
    view = views.rows(whole, 3, 9)
    assert reads == [] and view.shape == (6, 5)
    np.testing.assert_array_equal(views.rows(view, 1, 3).read(), values[4:6])
    assert reads == [(4, 6)]
    np.testing.assert_array_equal(views.transposed(view).read(), values[3:9].T)
    order = np.array([4, 0, 5])
    np.testing.assert_array_equal(views.rows(views.selected(whole, order), 1, 3).read(), values[order[1:]])
    with pytest.raises(FormatError, match='the configuration asks for 13 rows'):
        views.rows(whole, 3, 13)
    with pytest.raises(FormatError, match='the configuration asks for 13 rows'):
        views.selected(whole, np.array([12]))


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_selected_rows_of_groups_keep_every_number(kind):
    stored = encode(np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32), kind)
    whole = TensorSource('memory', (8, 64), 'Q', lambda: decode(stored), lambda asked: stored, (kind,))
    order = np.array([5, 0, 7])
    view = views.selected(whole, order)
    assert view.exact_kinds == (kind, 'float32')
    for name, part in view.read_stored(kind).parts.items():
        np.testing.assert_array_equal(part, getattr(stored, name)[order])
    assert views.transposed(whole).group_kinds == views.mapped(whole, np.negative).group_kinds == ()
