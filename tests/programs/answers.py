"""A loaded model on all ranks answers many requests.  arguments: MODEL.h5 REQUESTS.json ANSWERS.json

REQUESTS.json: a list of [token ids, sampling parameters].  ANSWERS.json, from rank 0: for each request the tokens, the
choices with their alternatives, and the prompt's log-probabilities.
"""

import json
import sys

import tpmpi

llm = tpmpi.load(sys.argv[1])
with open(sys.argv[2]) as f:
    requests = json.load(f)
answers = []
for ids, params in requests:
    done = llm.generate(ids, **params)
    answers.append({'tokens': done.tokens, 'prompt_logprobs': done.prompt_logprobs,
                    'choices': [[c.token, c.logprob, c.top] for c in done.choices]})
if llm.rank == 0:
    with open(sys.argv[3], 'w') as f:
        json.dump(answers, f)
    print(json.dumps({'ranks': llm.session.comm.size}))
