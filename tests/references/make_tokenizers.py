"""Makes the references in tokenizers/: small vocabularies and the ids that other programs give for nasty strings.

    pip install torch==2.13.0 transformers==5.23.0 sentencepiece==0.2.3 gguf    # the Python that runs this
    pip install llama-cpp-python==0.3.36                                        # in another environment, LLAMA
    python tests/references/make_tokenizers.py --llama LLAMA/bin/python

`byte_level.json`: one vocabulary whose tokens go across words, digits, signs and lines, so that every difference in how a
text is split shows in the ids.  Oracles, by name: `transformers`, its own tokenizer class for the model, or GPT-2's with the
pattern that transformers has for that name in a GGUF file (which alone lacks ignore_merges and tokens of spaces);
`llama.cpp` where transformers does not know the name.  `llama.cpp` holds its ids where they differ; `base` is gpt-2.
`without` are merges left out where llama.cpp is the oracle but leaves a step of the real tokenizer.json away, which no
vocabulary trained with that step can notice: DeepSeek's single digits, and Falcon's cut around digits, made of bytes.

`sentencepiece.json`: vocabularies trained by SentencePiece (byte-pair encoding with byte fallback), as of Llama 2 and of
Gemma; `ids` are SentencePiece's own, `transformers` and `llama.cpp` theirs where they differ.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tempfile
from pathlib import Path

import sentencepiece
from gguf import GGUFWriter
from make_references import HAND_PICKED, HERE, PROMPTS, STORY, nasty_strings
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, CohereTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

FOLDER = HERE / 'tokenizers'
EXTRA = (
    "Don't SHOUT, I'LL say'S; we'Ve", 'HTTPServer parseXMLFile iPhone ΑΒγδ ДОМдом ǅungla', 'ÉCOLE école Éa éA', "x'ſ 'ſ",
    '3333333 33333333 1/2/3 a/b//c\n/d', 'שָׁלוֹם नमस्ते 한국 e\u0301a\u0308 A\u030a \u212b \u0958',
    ' 12 123 1234 12345', 'a 1 b 22 c 333', '\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n', 'x \n\n y\r\n\r\n  z', 'end  ',
    '$5 +1 <=> ^~|`',
    '一二三ＡＢＣ１２３', '!!!abc ...def (ghi)', ' !x ?y', "''''''```\"\"\"......!!!!!!??????", 'កាន់តែពិសេសអាច😁',
    ' ' * 40 + 'x', '\t' * 5 + 'y', '\n' * 33, 'banana bandana ananas', 'aaaaaaaaaaaaa', '1234567890123')
TEXTS = tuple(dict.fromkeys((*nasty_strings(), *EXTRA)))
CORPUS = '\n'.join((STORY, *PROMPTS, *HAND_PICKED, *EXTRA * 3)).replace('<|', '<')
CLASSES = {  # the model's own class
    'gpt-2': GPT2Tokenizer, 'command-r': CohereTokenizer, 'qwen2': Qwen2Tokenizer, 'qwen35': Qwen3_5Tokenizer,
    'olmo': GPTNeoXTokenizer, 'stablelm2': Qwen2Tokenizer}  # StableLM 2's Arcade100k has Qwen's pattern and NFC
BUILT = ('llama-bpe', 'dbrx', 'smaug-bpe', 'gpt-4o', 'tekken')
IGNORE_MERGES = ('llama-bpe', 'smaug-bpe', 'tekken')  # in the tokenizer.json of Llama 3 and Mistral Nemo
DIGITS = ('smollm', 'starcoder')  # Sequence[Digits, ByteLevel], see make_references.py
ONLY_LLAMA = ('deepseek-llm', 'deepseek-coder', 'deepseek-v3', 'falcon')
ALIASES = {
    'phi-2': 'gpt-2', 'refact': 'smollm', 'llama-v3': 'llama-bpe', 'llama3': 'llama-bpe', 'mpt': 'olmo',
    'deepseek-r1-qwen': 'qwen2'}
CONTROL, USER_DEFINED = 3, 4

LLAMA_PROGRAM = """
import json, sys
from llama_cpp import Llama
path, texts = sys.argv[1:]
llama = Llama(path, vocab_only=True, verbose=False)
print(json.dumps([llama.tokenize(text.encode(), add_bos=False, special=True) for text in json.load(open(texts))]))
"""


def write_gguf(path: Path, architecture: str, keys: dict) -> None:
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        kind = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        kind(f'tokenizer.ggml.{key}', value)
    for key in ('context_length', 'embedding_length', 'block_count', 'feed_forward_length', 'attention.head_count',
                'attention.head_count_kv', 'attention.sliding_window'):
        writer.add_uint32(f'{architecture}.{key}', 8)
    writer.add_float32(f'{architecture}.attention.layer_norm_rms_epsilon', 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def llama_cpp(python: str, keys: dict, folder: Path, architecture: str = 'llama') -> list[list[int]]:
    write_gguf(folder / 'vocab.gguf', architecture, keys)
    (folder / 'texts.json').write_text(json.dumps(TEXTS))
    done = subprocess.run([python, '-c', LLAMA_PROGRAM, folder / 'vocab.gguf', folder / 'texts.json'],
                          check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def from_gguf(keys: dict, folder: Path, architecture: str) -> list[list[int]]:
    write_gguf(folder / 'vocab.gguf', architecture, keys)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file='vocab.gguf')
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def differing(ids, others) -> dict[str, list[int]]:
    return {str(n): other for n, (mine, other) in enumerate(zip(ids, others, strict=True)) if mine != other}


def write(path: Path, data: dict) -> None:
    """JSON with one line for each entry of an object at the top."""
    lines = [f'{json.dumps(key)}: {json.dumps(value, separators=(",", ":"))}' for key, value in data.items()]
    path.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')


# ---- byte level

def byte_level_vocabulary() -> dict:
    """GGUF keys of a vocabulary that was trained on whole texts, without any split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [CORPUS[at:at + 12] for at in range(0, len(CORPUS), 7)]
    tokenizer.train_from_iterator(pieces, trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(tokenizer.to_str())['model']
    tokens = sorted(model['vocab'], key=model['vocab'].get)
    tokens += ['Ġlighthouse', 'Hello']  # no merges lead to them
    types = [1] * len(tokens) + [CONTROL] * 3 + [USER_DEFINED] * 2
    return {'tokens': [*tokens, '<|im_start|>', '<|im_end|>', '<|endoftext|>', '<think>', '     '], 'token_type': types,
            'merges': [' '.join(pair) for pair in model['merges']], 'bos_token_id': len(tokens), 'eos_token_id': len(tokens) + 1}


def own_class(name: str, keys: dict) -> list[list[int]]:
    vocab = {token: id for id, token in enumerate(keys['tokens'])}
    tokenizer = CLASSES.get(name, GPT2Tokenizer)(
        vocab=vocab, merges=[tuple(merge.split(' ')) for merge in keys['merges']], bos_token=None, eos_token=None,
        unk_token=None, pad_token=None).backend_tokenizer
    if name in DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in BUILT:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.model.ignore_merges = name in IGNORE_MERGES
    for token, kind in zip(keys['tokens'], keys['token_type'], strict=True):
        if kind in (CONTROL, USER_DEFINED):
            (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)([AddedToken(token, normalized=False)])
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def impossible_merges(name: str, merges: list[str]) -> list[str]:
    if name == 'deepseek-llm':
        return [merge for merge in merges if sum(map(str.isdigit, merge)) > 1]
    if name == 'falcon':  # a digit is what Unicode calls a number, also where it stands for a byte
        return [merge for merge in merges if len(set(map(str.isnumeric, merge.replace(' ', '')))) > 1
                or sum(map(str.isdigit, merge)) > 3]
    return []


def make_byte_level(python: str, folder: Path) -> None:
    keys = byte_level_vocabulary()
    data = {'source': 'transformers 5.23.0, llama-cpp-python 0.3.36', 'texts': TEXTS, **keys}
    base = None
    for name in (*CLASSES, *DIGITS, *BUILT, *ONLY_LLAMA):
        without = impossible_merges(name, keys['merges'])
        file = {'model': 'gpt2', 'pre': name, **keys, 'merges': [merge for merge in keys['merges'] if merge not in without]}
        theirs = llama_cpp(python, file, folder)
        for alias in (alias for alias, of in ALIASES.items() if of == name):
            if llama_cpp(python, file | {'pre': alias}, folder) != theirs:
                raise SystemExit(f'{alias} is not {name}')
        ids = theirs if name in ONLY_LLAMA else own_class(name, keys)
        base = base or ids
        data[name] = {'oracle': 'llama.cpp' if name in ONLY_LLAMA else 'transformers', 'ids': differing(base, ids),
                      'without': without, 'llama.cpp': differing(ids, theirs)}
        print(name, len(data[name]['ids']), 'differ from gpt-2,', len(data[name]['llama.cpp']), 'from llama.cpp')
    data['base'] = base
    write(FOLDER / 'byte_level.json', data)


# ---- SentencePiece

def train(gemma: bool) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    words = ['\n' * n for n in range(1, 9)] + ['\u2581' * n for n in range(2, 9)] + ['<table>', '<b>']
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split('\n')), model_writer=model, model_type='bpe', vocab_size=700,
        character_coverage=0.98, byte_fallback=True, normalization_rule_name='identity', remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma, split_digits=True, allow_whitespace_only_pieces=True, hard_vocab_limit=False,
        user_defined_symbols=words if gemma else [], minloglevel=2,
        control_symbols=['<start_of_turn>', '<end_of_turn>'] if gemma else ['<|end|>', '<|user|>'])
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_keys(trained, gemma: bool) -> dict:
    """GGUF keys as llama.cpp's converter writes them: real spaces in the tokens that a user defined."""
    tokens, types = [], []
    for id in range(trained.get_piece_size()):
        token = trained.id_to_piece(id)
        kind = (2 if trained.is_unknown(id) else 3 if trained.is_control(id) else 6 if trained.is_byte(id)
                else 5 if trained.is_unused(id) else 1)
        if gemma and kind == 1 and (not token.strip('\n') or token in ('<table>', '<b>')
                                    or (len(token) > 1 and not token.strip('\u2581'))):
            token, kind = token.replace('\u2581', ' '), 4
        tokens.append(token)
        types.append(kind)
    return {'tokens': tokens, 'scores': [float(trained.get_score(id)) for id in range(len(tokens))], 'token_type': types,
            'bos_token_id': 1, 'eos_token_id': 2, 'unknown_token_id': 0, 'add_space_prefix': not gemma}


def make_sentencepiece(python: str, folder: Path) -> None:
    data = {'source': 'sentencepiece 0.2.3, transformers 5.23.0, llama-cpp-python 0.3.36', 'texts': TEXTS}
    for name, architecture in (('llama', 'phi3'), ('gemma', 'gemma2')):
        trained = train(name == 'gemma')
        keys = {'model': 'llama', **sentencepiece_keys(trained, name == 'gemma')}
        ids = [trained.encode(text) for text in TEXTS]
        data[name] = {'keys': keys, 'ids': ids, 'transformers': differing(ids, from_gguf(keys, folder, architecture)),
                      'llama.cpp': differing(ids, llama_cpp(python, keys, folder))}
        print(name, len(keys['tokens']), 'tokens,', len(data[name]['transformers']), 'texts differ in transformers,',
              len(data[name]['llama.cpp']), 'in llama.cpp')
    write(FOLDER / 'sentencepiece.json', data)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--llama', required=True, help='a Python that has llama-cpp-python')
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        make_byte_level(args.llama, Path(name))
        make_sentencepiece(args.llama, Path(name))
