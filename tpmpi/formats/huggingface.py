"""Opens a Hugging Face folder: config.json, *.safetensors, tokenizer.json and what goes with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tpmpi.config import ModelConfig
from tpmpi.formats.families import Family, match_tensors, read_facts, short
from tpmpi.formats.huggingface_config import NEUTRAL_KEYS, telling
from tpmpi.formats.huggingface_families import HUGGING_FACE, find_family
from tpmpi.formats.safetensors_file import DTYPES, open_safetensors
from tpmpi.formats.source import (
    Checkpoint,
    FormatError,
    TensorSource,
    checked_token_id,
    parse_json,
    read_json,
    read_text,
    sha256,
    understood,
)
from tpmpi.formats.tokenizer_json import add_special, added_token, bos_eos_processor, dump, vocabulary

WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
HOW_FOUND = ('single_word', 'lstrip', 'rstrip', 'normalized')  # an added token in a text
NAMED_TOKENS = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')


def open_huggingface(folder: Path) -> Checkpoint:
    """The checkpoint in a folder.  Raises FormatError for whatever is missing, damaged or not understood."""
    text = read_text(folder / 'config.json')
    values = parse_json(text, folder / 'config.json')
    with understood(folder / 'config.json'):
        family, architecture = choose_family(values)
        config = family.config(read_facts(telling(values, family), family, NEUTRAL_KEYS.__contains__, 'config.json'))
    files, found = open_weights(folder)
    tensors = assign(config, family, found, str(folder))
    tokenizer_json, chat_template, bos, eos = open_tokenizer(folder, config, family, values)
    return Checkpoint(
        config, tensors, tokenizer_json, chat_template, eos, bos,
        {'format': 'Hugging Face', 'architecture': architecture, 'source': folder.resolve().name,
         'files': ', '.join(files), 'config.json sha256': sha256(text.encode()),
         'tokenizer.json sha256': sha256(read_text(folder / 'tokenizer.json').encode())},
        tuple(folder / file for file in files))


def choose_family(values: Mapping) -> tuple[Family, str]:
    names = values.get('architectures')
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in HUGGING_FACE:
        raise FormatError(
            f'config.json: architectures is {short(names)}; supported is one of {", ".join(HUGGING_FACE)}')
    return find_family(names[0], values), names[0]


# ---- weights

def open_weights(folder: Path) -> tuple[list[str], dict[str, TensorSource]]:
    """File names, and every tensor of the folder by its name there.  As in transformers, an index beside a whole file is not
    read: it is left from an earlier save."""
    if (folder / WHOLE).exists():
        weight_map, files = None, [WHOLE]
    elif (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get('weight_map')
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f'{folder / INDEX}: weight_map is missing; expected tensor names with their files')
        files = sorted({str(name) for name in weight_map.values()})
        for name in files:
            if not re.fullmatch(r'[\w.-]+\.safetensors', name):  # never out of the folder
                raise FormatError(f'{folder / INDEX} names the file {name!r}; expected *.safetensors in that folder')
    else:
        pickled = sorted(path.name for path in folder.glob('*') if path.suffix in ('.bin', '.pt', '.pth', '.pkl'))
        raise FormatError(
            f'{folder} has no {WHOLE} and no {INDEX}'
            + (f'; {pickled[0]} is a pickle, which can run any code and is never opened: '
               'save the model as safetensors (save_pretrained does)' if pickled else ''))
    found = {}
    for file in files:
        for name, tensor in open_safetensors(folder / file).items():
            if name in found or (weight_map is not None and weight_map.get(name) != file):
                raise FormatError(f'{tensor.origin}: the index says {(weight_map or {}).get(name)!r} for this tensor')
            found[name] = tensor
    for name in weight_map or ():
        if name not in found:
            raise FormatError(f'{folder / INDEX}: {weight_map[name]} should hold {short(name)}, but does not')
    return files, found


def assign(config: ModelConfig, family: Family, found: dict[str, TensorSource], where: str) -> dict[str, TensorSource]:
    """The tensors by our names.

    A tied checkpoint may hold the shared matrix under either name.  Where it holds both, they must be equal: what
    transformers makes of two different ones has changed between its versions (4 ties them, 5 does not).
    """
    embedding, head = family.tensors['embedding'], family.tensors['head']
    found = family.tidy(with_prefix(found, embedding, head))
    if config.tie_embeddings and head in found:
        found = dict(found)
        tied = found.pop(head)
        other = found.setdefault(embedding, tied)
        if other is not tied and not same_bits(other, tied):
            raise FormatError(
                f'config.json: tie_word_embeddings is true, but {tied.origin} differs from {embedding}; '
                'set it to false if the model is meant to have its own head')
    tensors = match_tensors(config, found, family, where)
    supported = [ours for ours, _ in DTYPES.values()]
    for tensor in tensors.values():
        if tensor.dtype not in supported:
            raise FormatError(f'{tensor.origin} is {tensor.dtype}; supported are {", ".join(supported)}')
    return tensors


def with_prefix(found: dict[str, TensorSource], embedding: str, head: str) -> dict[str, TensorSource]:
    """The tensors of a file that was saved without the head, as GPT-2's own and embedding models are: their names begin
    with what 'model.' or 'transformer.' holds."""
    prefix = embedding.partition('.')[0] + '.'
    if embedding.removeprefix(prefix) not in found or any(name.startswith(prefix) for name in found):
        return found
    return {name if name in (head, 'lm_head.weight') else prefix + name: source for name, source in found.items()}


def same_bits(a: TensorSource, b: TensorSource) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and np.array_equal(a.load().view('u1'), b.load().view('u1'))


# ---- tokenizer

def open_tokenizer(folder: Path, config: ModelConfig, family: Family, values: Mapping
                   ) -> tuple[str, str | None, int | None, tuple[int, ...]]:
    """tokenizer.json, chat template, bos id, eos ids.

    As in transformers: the special tokens named in tokenizer_config.json count as special; chat_template.jinja goes before
    the one inside.  `add_bos_token` and `add_eos_token` there, where given, decide what encloses a text, as in llama.cpp and
    transformers 4 (5 goes by tokenizer.json alone).  The ids of generation_config.json end a text, or those of config.json
    where it names none, and the tokenizer's own.
    """
    if not (folder / 'tokenizer.json').exists():
        raise FormatError(f'{folder} has no tokenizer.json; save it with a fast tokenizer (save_pretrained does)')
    tokenizer, settings = parse_json(read_text(folder / 'tokenizer.json'), folder / 'tokenizer.json'), open_settings(folder)
    template = open_chat_template(folder, settings)
    known = usable_tokens(tokenizer, settings, template, config.vocab_size)
    if max(known.values(), default=0) >= config.vocab_size:
        raise FormatError(f'{folder / "tokenizer.json"} has token ids up to {max(known.values())}; '
                          f'config.json allows vocab_size {config.vocab_size}')
    take_added_tokens(tokenizer, known, settings, config.vocab_size)
    for token in special_tokens(settings):
        make_special(tokenizer, known, token)
    bos, eos = (named_id(known, settings, key) for key in ('bos_token', 'eos_token'))
    enclose(tokenizer, settings, {'bos_token': bos, 'eos_token': eos})
    generation = read_json(folder / 'generation_config.json') if (folder / 'generation_config.json').exists() else {}
    ends = generation.get('eos_token_id')
    where = 'generation_config.json' if ends is not None else 'config.json'
    if ends is None:
        ends = id_of(values, 'eos_token_id', default_id(family.eos, config))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    ends = [checked_token_id(id, config.vocab_size, f'{where}: eos_token_id') for id in ends]
    ids = dict.fromkeys(id for id in [eos, *ends] if id is not None)
    if 'bos_token' not in settings:
        bos = checked_token_id(id_of(values, 'bos_token_id', default_id(family.bos, config)), config.vocab_size,
                               'config.json: bos_token_id')
    return dump(tokenizer), with_named_tokens(template, settings), bos, tuple(ids)


def open_settings(folder: Path) -> dict:
    """What tokenizer_config.json says.  Where it does not yet list the added tokens, special_tokens_map.json goes before it,
    as in transformers."""
    settings, names = (read_json(folder / name) if (folder / name).exists() else {}
                       for name in ('tokenizer_config.json', 'special_tokens_map.json'))
    return settings if 'added_tokens_decoder' in settings else settings | names


def id_of(values: Mapping, key: str, default: int | None):
    """What config.json says, or its part for the language model."""
    text = values.get('text_config')
    return next((part[key] for part in (values, text) if isinstance(part, dict) and key in part), default)


def default_id(id: int | None, config: ModelConfig) -> int | None:
    """What the configuration class has where config.json leaves an id out; a smaller vocabulary has none."""
    return id if id is not None and id < config.vocab_size else None


def named_token(settings: Mapping, key: str) -> str | None:
    token = settings.get(key)
    token = token.get('content') if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise FormatError(f'tokenizer_config.json: {key} is {short(token)}; expected a token or null')
    return token


def named_id(known: Mapping[str, int], settings: Mapping, key: str) -> int | None:
    token = named_token(settings, key)
    if token is not None and token not in known:
        raise FormatError(f'tokenizer_config.json: {key} is {short(token)}, which tokenizer.json does not have')
    return known.get(token)


def usable_tokens(tokenizer: dict, settings: Mapping, template: str | None, vocab_size: int) -> dict[str, int]:
    """Every token with its id.  Leaves out added tokens for which the model has no row and that nothing here asks for, such
    as the one for pictures in the smallest Gemma 3."""
    vocabulary(tokenizer)
    wanted = [named_token(settings, key) for key in ('bos_token', 'eos_token', 'unk_token')]
    added = tokenizer.get('added_tokens') or []
    kept = [entry for entry in added if entry['id'] < vocab_size or entry['content'] in wanted
            or entry['content'] in (template or '')]
    if len(kept) < len(added):
        tokenizer['added_tokens'] = kept
    return vocabulary(tokenizer)


def without_row(id: str, vocab_size: int) -> bool:
    return id.isascii() and id.isdigit() and len(id) < 19 and int(id) >= vocab_size


def special_tokens(settings: Mapping) -> list[str]:
    """The tokens that tokenizer_config.json names as special ones, in the spellings of transformers 4 and 5."""
    named = [named_token(settings, key) for key in NAMED_TOKENS]
    extra = settings.get('extra_special_tokens') or {}
    several = [*(extra.values() if isinstance(extra, dict) else as_list(extra)),
               *as_list(settings.get('additional_special_tokens'))]
    decoder = settings.get('added_tokens_decoder') or {}
    several += [entry for entry in decoder.values() if isinstance(entry, dict) and entry.get('special') is True]
    several = [token.get('content') if isinstance(token, dict) else token for token in several]
    return [token for token in [*named, *several] if isinstance(token, str)]


def as_list(value) -> list:
    return value if isinstance(value, list) else []


def take_added_tokens(tokenizer: dict, known: dict[str, int], settings: Mapping, vocab_size: int) -> None:
    """Puts into the tokenizer, and among the known ids, what `added_tokens_decoder` says of how tokens are found or adds to them.

    Raises FormatError where it contradicts tokenizer.json.
    """
    added = {entry['content']: entry for entry in tokenizer.get('added_tokens') or ()}
    decoder = settings.get('added_tokens_decoder') or {}
    if not isinstance(decoder, dict):
        raise FormatError(f'tokenizer_config.json: added_tokens_decoder is {short(decoder)}; expected an object')
    for id, said in decoder.items():
        content = said.get('content') if isinstance(said, dict) else said
        if not isinstance(content, str):
            raise FormatError(f'tokenizer_config.json: added_tokens_decoder has {short(content)} as token {short(id)}; '
                              'expected its text')
        if content not in known and without_row(id, vocab_size):
            continue
        if content not in known and id == str(max(known.values(), default=-1) + 1):
            known[content] = int(id)
        if str(known.get(content)) != id:
            raise FormatError(f'tokenizer_config.json gives token {short(content)} the id {id}; '
                              f'tokenizer.json gives it {known.get(content)}')
        if isinstance(said, dict):
            special = said.get('special') is True
            entry = added.setdefault(content, added_token(int(id), content, special) | {'normalized': not special})
            entry.update((flag, said[flag]) for flag in HOW_FOUND if isinstance(said.get(flag), bool))
    if added:
        tokenizer['added_tokens'] = sorted(added.values(), key=lambda entry: entry['id'])


def make_special(tokenizer: dict, known: Mapping[str, int], token: str) -> None:
    """Makes a token of the vocabulary a special one."""
    for entry in tokenizer.get('added_tokens') or ():
        if entry['content'] == token:
            entry['special'] = True
    add_special(tokenizer, known, token)


def enclose(tokenizer: dict, settings: Mapping, ids: Mapping[str, int | None]) -> None:
    """Makes bos come before a text, and eos after it, or not, as add_bos_token and add_eos_token say where they are given.

    Whatever else the post-processor puts around a text stays.  ids: by 'bos_token' and 'eos_token'.
    """
    processor = tokenizer.get('post_processor')
    parts = [processor, *as_list(processor.get('processors'))] if isinstance(processor, dict) else []
    template = next((part for part in parts if isinstance(part, dict) and part.get('type') == 'TemplateProcessing'), None)
    items = as_list(template.get('single')) if template else []
    texts = [i for i, item in enumerate(items) if isinstance(item, dict) and 'Sequence' in item]
    around = {'bos_token': items[:texts[0]], 'eos_token': items[texts[-1] + 1:]} if texts else {'bos_token': [], 'eos_token': []}
    wanted, changed = {}, False
    for key, there in around.items():
        token, setting = named_token(settings, key), settings.get(f'add_{key}')
        present = token is not None and any(token_of(item) == token for item in there)
        wanted[key] = token if (setting if isinstance(setting, bool) else present) else None
        changed |= token is not None and (wanted[key] is not None) != present
        if template and wanted[key] is None and present:
            around[key] = [item for item in there if token_of(item) != token]
        elif template and wanted[key] is not None and not present:
            item = [{'SpecialToken': {'id': token, 'type_id': 0}}]
            around[key] = item + there if key == 'bos_token' else there + item
            template['special_tokens'] = dict(template.get('special_tokens') or {}) | {
                token: {'id': token, 'ids': [ids[key]], 'tokens': [token]}}
    if changed and texts:
        template['single'] = [*around['bos_token'], *items[texts[0]:texts[-1] + 1], *around['eos_token']]
    elif changed:
        tokenizer['post_processor'] = bos_eos_processor(wanted['bos_token'], ids['bos_token'], wanted['eos_token'],
                                                        ids['eos_token'])


def token_of(item) -> str | None:
    """The token that an item of a post-processor's template stands for."""
    special = item.get('SpecialToken') if isinstance(item, dict) else None
    return special.get('id') if isinstance(special, dict) else None


def with_named_tokens(template: str | None, settings: Mapping) -> str | None:
    """The template, knowing those special tokens that it names and that a model file does not: all but bos and eos.

    To one without bos or eos these are nothing, as in transformers, also where the configuration has an id for them.
    """
    if template is None:
        return None
    named = {key: named_token(settings, key) for key in NAMED_TOKENS}
    extra = settings.get('extra_special_tokens')
    named |= {key: named_token(extra, key) for key in extra if key.isidentifier()} if isinstance(extra, dict) else {}
    kept = [key for key in ('bos_token', 'eos_token') if named[key] is not None]
    used = {key: token or '' for key, token in named.items()
            if key not in kept and re.search(rf'\b{re.escape(key)}\b', template)}
    lines = [f'{{% set {key} = {json.dumps(token, ensure_ascii=False)} %}}\n' for key, token in used.items()]
    return ''.join(lines) + template  # the line's end is no part of the text: trim_blocks


def open_chat_template(folder: Path, settings: Mapping) -> str | None:
    if (folder / 'chat_template.jinja').exists():
        return read_text(folder / 'chat_template.jinja')
    template = settings.get('chat_template')
    if isinstance(template, list):  # several, by name
        named = {item.get('name'): item.get('template') for item in template if isinstance(item, dict)}
        template = named.get('default')
    if template is not None and not isinstance(template, str):
        raise FormatError(f'tokenizer_config.json: chat_template is {short(template)}; expected text')
    return template
