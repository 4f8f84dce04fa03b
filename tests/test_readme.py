"""The README says what is there: its commands are CI's, its code is the model's, its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from readme_commands import ROOT, blocks

import tpmpi
from tpmpi import run

README = (ROOT / 'README.md').read_text()


def test_the_first_two_commands_are_those_that_ci_runs():
    commands = re.findall(r'(?m)^    (pip install .*)$', README)[:2]
    assert len(commands) == 2
    assert all(f'\n{c}\n' in (ROOT / '.ci/run').read_text() for c in commands)


def test_the_layer_shown_is_the_layer():
    (shown,) = blocks('python', 'The diagram')
    source = (Path(tpmpi.__file__).parent / 'model.py').read_text()
    assert '\n'.join('    ' + line for line in shown.splitlines()) in source


def test_the_table_of_options_is_complete():
    table = README[README.index('## Options'):README.index('## From Python')]
    with pytest.raises(SystemExit):
        run.parse(['--help'])
    options = set(re.findall(r'--[a-z-]+', Path(run.__file__).read_text().partition('def read_prompt')[0]))
    real = {o for o in options if f"add_argument('{o}'" in Path(run.__file__).read_text()}
    assert {o for o in re.findall(r'`?(--[a-z-]+)', table)} >= real and len(real) > 20


def test_every_module_is_in_the_guide_to_the_code():
    guide = README[README.index('## Reading the code'):]
    for path in Path(tpmpi.__file__).parent.glob('*.py'):
        assert path.name in guide or path.name in ('__init__.py',), path.name
