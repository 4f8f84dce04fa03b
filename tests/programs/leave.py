"""A script in which one rank, the first argument, ends before the others generate; how: return, or exit."""

import sys

import tpmpi

llm = tpmpi.load(threads=1)
if llm.rank == int(sys.argv[1]):
    if sys.argv[2] == 'exit':
        sys.exit(3)
else:
    llm.generate('And the LORD said', max_new_tokens=4)
