"""The CUDA C++ of the kernels: the .cu files beside this one, with an entry point for each instance of their templates."""

from __future__ import annotations

from pathlib import Path

ROWS_AT_ONCE = (1, 2, 4, 8)  # of x, in one reading of a matrix of float32
TENSOR_ROWS = {2: 1, 8: 3}  # of x, in one reading of a matrix of another kind: the tiles of 8 columns that they take
TENSOR_DEPTH = {'bfloat16': 4, 'float16': 4, 'int8': 4, 'int4': 8}  # groups of weights that are read before they are used
TENSOR_BLOCKS = 2  # on a multiprocessor at a time
ITEMS, SPANS = (1, 4, 8), (0, 1, 2, 4)  # instances of attention.cu: queries times heads; head_dim / KEYS, or 0: by eights
KINDS = {'float32': 'Float32', 'bfloat16': 'Bfloat16', 'float16': 'Float16', 'int8': 'Int8', 'int4': 'Int4'}  # products.cu
CACHES = {'float32': 'float', 'bfloat16': 'unsigned short'}
TILE_DIMS = (64, 96, 128)  # instances of attention_tiles.cu: head_dim, or more
FILES = {'elementwise': ('rows',), 'products': ('rows',), 'tensor': ('tiles',), 'attention': ('rings',),  # and what they build on
         'attention_tiles': ('tiles', 'rings'), 'head': ()}


def source(name: str) -> str:
    """The CUDA C++ of one file, with what it builds on and the entry points of its templates."""
    folder = Path(__file__).parent
    return '\n'.join([*((folder / f'{part}.cu').read_text() for part in ('common', *FILES[name], name)), *_entries(name)])


def tensor_depth(kind: str, tiles: int) -> int:
    """Groups of weights that tensor.cu reads before they are used: more rows of x leave fewer registers."""
    return TENSOR_DEPTH[kind] if tiles == 1 else 4


def _bounds(threads: int, blocks: int) -> str:
    """Threads of a block, and blocks that shall fit on a multiprocessor: what the compiler may spend registers for.

    Without, it expects 1024 threads, spares registers, and asks memory for the next numbers when the last ones are used up.
    """
    return f'__launch_bounds__({threads}, {blocks}) '


def _entries(name: str) -> list[str]:
    """The instances of a file's templates."""
    def entry(called, template, parameters, bounds=''):
        names = ', '.join(p.split()[-1].lstrip('*') for p in parameters.split(', '))
        return f'extern "C" __global__ void {bounds}{called}({parameters}) {{ {template}({names}); }}'

    found = []
    if name == 'products':
        w, y = 'const unsigned char* w, int row_bytes', 'float* y'
        found += [entry(f'multiply_{gated}float32_{rows}', f'multiply<Float32, {rows}, {str(bool(gated)).lower()}>',
                        f'const float* x, int rows, int k, {w}, int outputs, int kind, {y}', _bounds(128, 4))
                  for rows in ROWS_AT_ONCE for gated in ('', 'gated_')]
        for kind, struct in KINDS.items():
            found.append(entry(f'multiply_chosen_{kind}', f'multiply_chosen<{struct}>',
                               f'const float* x, int shared_by, int k, {w}, int outputs, const long long* choice, {y}'))
            found.append(entry(f'embed_{kind}', f'embed<{struct}>',
                               f'const long long* tokens, long long start, long long stop, {w}, int k, {y}'))
            if kind not in ('float32', 'bfloat16'):  # these the library multiplies as they are
                found.append(entry(f'unpack_{kind}', f'unpack<{struct}>',
                                   f'{w}, int k, unsigned short* high, unsigned short* low'))
    if name == 'tensor':
        parameters = ('const float* x, int rows, int k, const unsigned char* w, int row_bytes, int outputs, int kind, '
                      'int resident, float* y')
        for kind in TENSOR_DEPTH:
            for rows, tiles in TENSOR_ROWS.items():
                template = f'multiply_tensor<{KINDS[kind]}, {tiles}, {tensor_depth(kind, tiles)}'
                found += [entry(f'multiply_{gated}{kind}_{rows}', f'{template}, {str(bool(gated)).lower()}>', parameters,
                                _bounds(256, TENSOR_BLOCKS))                          for gated in ('', 'gated_')]
    for kv, number in CACHES.items():
        if name == 'elementwise':
            found.append(entry(f'rope_append_{kv}', f'rope_append<{number}>', (
                'const float* qkv, const float* cosines, const float* sines, int pairs, int heads, int kv_heads, int dim, '
                f'const long long* slots, long long num_slots, float* q, {number}* k, {number}* v')))
        if name == 'attention':
            found += [entry(f'attend_{kv}_{items}_{spans}', f'attend<{number}, {items}, {spans}>', (
                f'const float* q, const {number}* k, const {number}* v, const long long* tasks, const long long* blocks, '
                'int block, const long long* runs, int heads, int dim, long long num_slots, long long tokens, '
                'int window, int sinks, float scale, float cap, int split, float* b, float* parts, float* stats'),
                _bounds(128, 2)) for items in ITEMS for spans in SPANS]
        if name == 'attention_tiles':
            found += [entry(f'attend_tiles_{kv}_{dim}{called}', f'attend_tiles<{number}, {dim}, {rounded}>', (
                f'const float* q, const {number}* k, const {number}* v, const long long* tasks, const long long* blocks, '
                'int block, const long long* runs, int heads, int dim, long long num_slots, int window, int sinks, '
                'float scale, float cap, float* b'), _bounds(256, 1))
                for dim in TILE_DIMS for called, rounded in (('', 'false'), ('_rounded', 'true'))]
    return found
