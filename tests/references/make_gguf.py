"""Makes gguf/*.json: what transformers and llama.cpp compute with the GGUF cases of tests/gguf_writer.py, on a CPU.

    pip install torch==2.13.0 transformers==5.23.0 safetensors gguf==0.19.0
    python tests/references/make_gguf.py transformers        # cases that families/ does not have
    python tests/references/make_gguf.py write FOLDER        # the GGUF files, float32
    pip install llama-cpp-python==0.3.36                     # in this environment or another
    python tests/references/make_gguf.py llama_cpp FOLDER    # their logits; needs numpy and llama_cpp only

llama.cpp runs with float32 in its cache and without flash attention.  A case that llama.cpp refuses has a reason in
place of logits: biases of attn_output in Qwen 3, norms of Q and K in Command R below 64 layers, OLMoE with fewer KV heads than
heads, GPT-NeoX without biases.  It computes something else than transformers for Phi-3 with a window, which it turns off, and
for LongRoPE, where it asks the size of its cache (256 here) and not the length of the text.  Its GELU comes from a table of
float16, so that those models differ by about 1e-3 of the spread, all others by 1e-5.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
KEPT = (31, 69)  # positions of the logits that are kept


def main(what: str, *arguments: str) -> None:
    {'transformers': by_transformers, 'write': write, 'llama_cpp': by_llama_cpp, 'one': one}[what](*arguments)


def by_transformers(*names: str) -> None:
    """As make_families.py, at KEPT only and without its checks."""
    import torch
    from family_cases import write_model
    from gguf_writer import CASES, FAMILY_CASES, GGUF_FOLDER
    from make_families import build, loaded, run, saved

    torch.set_num_threads(1)
    GGUF_FOLDER.mkdir(exist_ok=True)
    for name in names or [name for name in CASES if name not in FAMILY_CASES]:
        case = CASES[name]
        tokens = np.random.default_rng(case.seed).integers(0, 256, case.prompt_length + case.new_tokens).tolist()
        with tempfile.TemporaryDirectory() as folder:
            config, shapes = saved(build(case, case.settings), Path(folder))
            reference = {'architecture': case.architecture, 'seed': case.seed, 'zero_centred': case.zero_centred,
                         'tokens': tokens, 'config': config, 'shapes': shapes}
            write_model(Path(folder), reference)
            logits = run(loaded(Path(folder), case), tokens, case.prompt_length)
        reference |= {'positions': list(KEPT), 'spread': round(float(logits.std()), 6), 'logits': text_of(logits[list(KEPT)])}
        lines = (f' {json.dumps(key)}: {json.dumps(value)}' for key, value in reference.items())
        (GGUF_FOLDER / f'{name}.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')
        print(name, reference['spread'], flush=True)


def write(folder: str) -> None:
    from gguf_writer import CASES, reference_of, write_gguf

    for name in CASES:
        write_gguf(Path(folder, f'{name}.gguf'), name)
        Path(folder, f'{name}.tokens').write_text(json.dumps(reference_of(name)['tokens']), encoding='utf-8')


def by_llama_cpp(folder: str) -> None:
    """Each case in a process of its own: where llama.cpp does not like a file, it may end the process."""
    found = {}
    for path in sorted(Path(folder).glob('*.gguf')):
        done = subprocess.run([sys.executable, __file__, 'one', str(path)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[path.stem] = json.loads(done.stdout)
        else:
            lines = [line for line in done.stderr.splitlines() if 'error' in line or 'ASSERT' in line] or [done.stderr[-300:]]
            found[path.stem] = {'refused': lines[0].replace(folder, '')[:200]}
        print(path.stem, found[path.stem].get('refused', 'ok'), flush=True)
    lines = (f' {json.dumps(name)}: {json.dumps(value)}' for name, value in found.items())
    (HERE / 'gguf' / 'llama_cpp.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')


def one(path: str) -> None:
    """Prints the most probable token after each position, and the logits of some."""
    import ctypes

    import llama_cpp

    tokens = json.loads(Path(path).with_suffix('.tokens').read_text(encoding='utf-8'))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_mmap = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit(1)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_threads = 256, 128, 128, 1
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    flat = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    logits = np.ctypeslib.as_array(flat, (len(tokens), size))
    print(json.dumps({'best': logits.argmax(1).tolist(), 'positions': KEPT, 'logits': text_of(logits[list(KEPT)])}))


def text_of(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.astype('<f4').tobytes()).decode()


if __name__ == '__main__':
    main(*sys.argv[1:])
