"""Generate text from one prompt:  mpirun -n 2 python -m tpmpi.run --model model.h5 --prompt 'In the beginning'

Text goes to standard output as it is made; everything else goes to standard error, from rank 0.
"""

from __future__ import annotations

import argparse
import codecs
import json
import logging
import os
import sys
from pathlib import Path

from tpmpi import api, session
from tpmpi.comm import Communicator
from tpmpi.config import ACTIVATION_DTYPES, COLLECTIVES, CUDA_GRAPHS, KERNELS, STORED_KINDS

DEMO_PROMPT = 'The LORD is my shepherd'
log = logging.getLogger('tpmpi')


class PrintVersion(argparse.Action):
    """--version: what a bug report needs."""

    def __call__(self, parser, *_):
        from tpmpi.versions import report
        parser.tell(report() + '\n')


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of a run.  Raises SystemExit, as argparse does, for an unknown one or a value that is no number."""
    p = session.ArgumentParser('python -m tpmpi.run', description=__doc__.partition('\n')[0])
    p.add_argument('--model', metavar='FILE', help='model file made by tpmpi.convert (default: the bundled one)')
    text = p.add_mutually_exclusive_group()
    text.add_argument('--prompt', metavar='TEXT', help=f'default: {DEMO_PROMPT!r}')
    text.add_argument('--prompt-file', metavar='FILE', help='one prompt, UTF-8; - reads standard input')
    p.add_argument('--chat', action='store_true', help="the prompt is a user's message, put in the model's chat template")
    p.add_argument('--system', metavar='TEXT', help='system message, with --chat')
    p.add_argument('--max-new-tokens', type=int, metavar='N', help=f'default: {api.DEFAULT_NEW_TOKENS}, or what fits; '
                   '0 only scores the prompt')
    p.add_argument('--temperature', type=float, default=0.0, help='0, the default, takes the most probable token')
    p.add_argument('--top-k', type=int, default=0, metavar='K', help='sample from the K best tokens; 0: from all')
    p.add_argument('--top-p', type=float, default=1.0, metavar='P', help='sample from the best tokens that hold P of the mass')
    p.add_argument('--min-p', type=float, default=0.0, metavar='P', help='sample from tokens with P of the best probability')
    p.add_argument('--repetition-penalty', type=float, default=1.0, metavar='X', help='above 1: avoid tokens seen before')
    p.add_argument('--seed', type=int, default=0, help='the same seed gives the same text')
    p.add_argument('--stop', action='append', default=[], metavar='TEXT', help='end before this text; may be repeated')
    p.add_argument('--context', type=int, metavar='N', help='attention sees the last N tokens, older ones roll off')
    p.add_argument('--sinks', type=int, default=0, metavar='N', help='and the first N tokens besides, however long the text')
    p.add_argument('--kv', choices=('float32', 'bfloat16'),
                   help='element type of the KV cache (default: bfloat16 with int8 and int4 weights, else float32)')
    p.add_argument('--weights', choices=STORED_KINDS, help='kind of the matrices in memory (default: as in the file)')
    p.add_argument('--activations', default='float32', choices=ACTIVATION_DTYPES,
                   help='bfloat16, int8: they may be rounded where they meet bfloat16, or int8 and int4, weights')
    p.add_argument('--kernels', default='auto', choices=KERNELS, help='of the CPU: cpu, compiled by Numba, or reference, NumPy')
    p.add_argument('--chunk', type=int, default=512, metavar='N', help='prompt tokens computed at once')
    p.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda'))
    p.add_argument('--collective', default='auto', choices=COLLECTIVES, help='how sums over the ranks go: on CPUs auto '
                   'takes memory that ranks share for large ones, mpi messages for all; of GPU memory mpi takes it as it is, '
                   'staged by a host buffer, nccl by NCCL, and auto mpi where the library says that it can, else staged')
    p.add_argument('--share-gpu', action='store_true', help='several ranks may compute on one GPU')
    p.add_argument('--cuda-graphs', choices=CUDA_GRAPHS, default='auto', help='off: launch kernels of a GPU one by one')
    p.add_argument('--threads', type=int, metavar='N', help="per rank (default: the rank's fair share of the cores)")
    p.add_argument('--verify', action='store_true', help="check the model file's checksums while loading")
    p.add_argument('--json', action='store_true', help='one JSON object instead of text')
    p.add_argument('--logprobs', type=int, default=0, metavar='K', help='with --json: the K best tokens of each step')
    p.add_argument('--prompt-logprobs', action='store_true', help='with --json: log-probability of each prompt token')
    p.add_argument('--trace', action='store_true', help='print the diagram with shapes, times and bytes of every rank')
    p.add_argument('--version', action=PrintVersion, nargs=0, help='versions and facts for a bug report')
    options = p.parse_args(argv)
    if options.system is not None and not options.chat:
        p.error('--system needs --chat')
    if (options.logprobs or options.prompt_logprobs) and not options.json:
        p.error('--logprobs and --prompt-logprobs need --json')
    return options


def read_prompt(options: argparse.Namespace, comm: Communicator) -> str:
    """The prompt's text, read on rank 0 and shared.  Raises ValueError, on rank 0 only, when it is not UTF-8 or empty."""
    if comm.rank:
        return ''
    if options.prompt_file is None:
        prompt, name = DEMO_PROMPT if options.prompt is None else options.prompt, '--prompt'
        data = os.fsencode(prompt)
    else:
        name = '--prompt-file ' + options.prompt_file
        if options.prompt_file == '-' and sys.stdin is None:
            raise ValueError(f'{name}: standard input is closed; redirect a file to it')
        try:
            data = sys.stdin.buffer.read() if options.prompt_file == '-' else Path(options.prompt_file).read_bytes()
        except OSError as e:
            raise ValueError(f'{name}: {e.strerror}') from e
        data = data.removeprefix(codecs.BOM_UTF8)  # of some editors, which is no part of the text
    prompt = session.decoded(data, name)
    if not prompt:
        raise ValueError(f'{name}: the prompt is empty; expected some text')
    return prompt


def timing_of(request, llm: api.LLM) -> dict:
    """Rates and traffic of a request; a collective call, since the weights read are those of all ranks."""
    weights = sum(llm.session.comm.exchange(llm.engine.model.bytes_per_token))
    t = request.timing

    def per(amount, whole):
        return round(amount / whole, 6) if whole else None

    return {
        'prefill_tokens': t.prefill_tokens, 'prefill_seconds': round(t.prefill_seconds, 6),
        'prefill_tokens_per_s': per(t.prefill_tokens, t.prefill_seconds),
        'decode_tokens': t.decode_tokens, 'decode_seconds': round(t.decode_seconds, 6),
        'decode_tokens_per_s': per(t.decode_tokens, t.decode_seconds),
        'weights_gb_per_s': per(weights * t.decode_tokens / 1e9, t.decode_seconds),
        'allreduce_ms_per_token': per(1e3 * t.all_reduce_seconds, t.decode_tokens),
        'allreduce_bytes_per_token': per(t.all_reduce_bytes, t.decode_tokens),
        'ranks': llm.session.comm.size, 'threads': llm.session.threads}


def result_of(request, prompt: str, timing: dict) -> dict:
    """A request as the object that --json prints."""
    result = {'prompt': prompt, 'prompt_tokens': request.prompt_tokens, 'tokens': request.tokens, 'text': request.text,
              'finish_reason': request.finish_reason}
    if request.params.logprobs:
        result['logprobs'] = [{'token': c.token, 'logprob': c.logprob, 'top': c.top} for c in request.choices]
    if request.params.prompt_logprobs:
        result['prompt_logprobs'] = request.prompt_logprobs
    return result | {'timing': timing}


def closing_line(timing: dict) -> str:
    """The last line of a successful run."""
    def number(key, digits=1):
        return '-' if timing[key] is None else f'{timing[key]:,.{digits}f}'

    return (f'done: prefill {timing["prefill_tokens"]} tokens at {number("prefill_tokens_per_s")} tokens/s, '
            f'decode {timing["decode_tokens"]} at {number("decode_tokens_per_s")} tokens/s, '
            f'weights read at {number("weights_gb_per_s")} GB/s, '
            f'all-reduce {number("allreduce_ms_per_token", 3)} ms and {number("allreduce_bytes_per_token", 0)} bytes per token')


def body(s: session.Session, options: argparse.Namespace) -> int:
    """Load, generate, print; the same on every rank but for the printing."""
    from tpmpi.sampling import SamplingParams  # late: the session has limited the BLAS threads before NumPy starts
    names = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'seed', 'logprobs', 'prompt_logprobs')
    sampling = {name: getattr(options, name) for name in names}
    if options.max_new_tokens is not None:
        sampling['max_new_tokens'] = options.max_new_tokens
    output = session.Output()
    s.agreed(output.check)  # this and a bad value are told before a large model is read
    system = s.agreed(session.decoded, os.fsencode(options.system or ''), '--system')
    sampling['stop'] = s.agreed(lambda: tuple(session.decoded(os.fsencode(text), '--stop') for text in options.stop))
    s.agreed(SamplingParams, **sampling)
    prompt = s.comm.share(s.agreed(read_prompt, options, s.comm))
    llm = api.load(options.model, context=options.context, sinks=options.sinks, device=options.device, kv=options.kv,
                   chunk=options.chunk, verify=options.verify, weights=options.weights, kernels=options.kernels,
                   activations=options.activations, collective=options.collective, share_gpu=options.share_gpu,
                   cuda_graphs=options.cuda_graphs, session=s,
                   tracing=options.trace)
    first, config = s.comm.rank == 0, llm.config
    log.info('%s: %d layers, hidden %d, %d query and %d KV heads; %d rank%s x %d thread%s, %d on this node, device %s',
             options.model or 'bundled model', config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads,
             s.comm.size, 's' * (s.comm.size > 1), s.threads, 's' * (s.threads > 1), s.local_size, llm.engine.device.name)
    head = [] if options.system is None else [{'role': 'system', 'content': system}]
    request = llm.request([*head, {'role': 'user', 'content': prompt}] if options.chat else prompt, **sampling)
    if options.prompt is None and options.prompt_file is None:
        log.info('no --prompt is given; this continues: %s', prompt)
    for piece in llm.engine.stream(request, lambda: output.closed):
        if first and not options.json:
            output.write(piece)
    timing = timing_of(request, llm)
    if first:
        output.write(json.dumps(result_of(request, prompt, timing), ensure_ascii=False) + '\n' if options.json else '\n')
    if llm.tracer is not None:
        from tpmpi.trace import summary, table
        parts, hosts = s.comm.exchange(summary(llm.tracer)), s.comm.exchange(s.host)
        if first:
            print(table(parts, hosts), file=sys.stderr)
    s.agreed(output.check)
    if not output.closed:
        log.info(closing_line(timing))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns this rank's exit code."""
    return session.command(body, parse, argv)


if __name__ == '__main__':
    sys.exit(main())
