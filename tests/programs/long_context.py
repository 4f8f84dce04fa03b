"""Greedy continuation of a long prompt.  arguments: MODEL.h5 TOKENS.npy; prints tokens, log-probabilities, peak memory."""

import json
import resource
import sys

import numpy as np

import tpmpi

llm = tpmpi.load(sys.argv[1])
done = llm.generate(np.load(sys.argv[2]).tolist(), max_new_tokens=4, logprobs=1)
peak = llm.session.comm.exchange(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
if llm.rank == 0:
    print(json.dumps({'tokens': done.tokens, 'logprobs': [c.logprob for c in done.choices], 'peak': peak,
                      'cache': llm.engine.cache.nbytes}))
