"""What a kind of weights, cache or activations costs in quality: the mean log-probability of a text, side by side.

    mpirun -n 2 python data/quality.py --model smollm2.h5 --text book.txt \
        --run weights=float32 --run weights=int8 --run weights=int8,kv=bfloat16

Each --run is a list of options of tpmpi.api.load, or `file` for none; the others are compared with the first one.  A text is read
in pieces of --context tokens, each seen alone; without --text, Python's own documentation of its topics is read.
"""

from __future__ import annotations

import argparse

import numpy as np


def main() -> None:
    """Print a table in Markdown on rank 0."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', required=True)
    p.add_argument('--text', help='a file in UTF-8')
    p.add_argument('--tokens', type=int, default=4096, help='of the text, at most (default: 4096)')
    p.add_argument('--context', type=int, default=1024, help='tokens of a piece (default: 1024)')
    p.add_argument('--run', action='append', required=True, metavar='OPTION=VALUE,…')
    options = p.parse_args()
    from tpmpi import api, session
    started, rows = session.start(1), []
    for run in options.run:
        llm = api.load(options.model, session=started, **dict(item.split('=', 1) for item in run.split(',') if item != 'file'))
        tokens = np.array(started.comm.share(llm.tokenizer.encode(text_of(options.text)) if llm.rank == 0 else None))
        tokens, found = tokens[:options.tokens], []
        for at in range(0, len(tokens) - 1, options.context):
            piece = tokens[at:at + options.context].tolist()
            found += llm.generate(piece, max_new_tokens=0, prompt_logprobs=True).prompt_logprobs or []
        rows.append((run, np.array(found)))
    if started.comm.rank == 0:
        base = rows[0][1]
        print(f'{options.model}, {len(base)} tokens predicted\n\n| run | mean log-probability | difference | relative | '
              'largest of a token |\n| --- | --- | --- | --- | --- |')
        for run, found in rows:
            mean, off = found.mean(), found.mean() - base.mean()
            print(f'| {run} | {mean:.5f} | {off:+.5f} | {off / abs(base.mean()):+.3%} | {np.abs(found - base).max():.4f} |')
    started.watch.close()


def text_of(path: str | None) -> str:
    """The text of a file, or a long one that every Python has."""
    if path is not None:
        with open(path, encoding='utf-8') as file:
            return file.read()
    from pydoc_data.topics import topics
    return '\n\n'.join(topics[name] for name in sorted(topics))


if __name__ == '__main__':
    main()
