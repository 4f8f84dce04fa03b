"""Runs the README's commands as they stand: the real model's block in a shell, the Python example on 1 and 2 ranks.

    python tests/readme_commands.py FOLDER      runs in FOLDER, which is made; `.[…]` in a pip command means this checkout
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(kind: str, heading: str) -> list[str]:
    """The fenced blocks of a kind under a heading of the README."""
    section = re.search(rf'(?ms)^## {re.escape(heading)}\n(.*?)(?=^## |\Z)', (ROOT / 'README.md').read_text())[1]
    return re.findall(rf'(?ms)^```{kind}\n(.*?)^```', section)


def main(folder: str) -> None:
    """Run all; the first command that fails ends it with its exit code."""
    work = Path(folder)
    work.mkdir(parents=True)
    (shell,) = blocks('sh', 'A real model')
    subprocess.run(['bash', '-exuc', shell.replace('".[', f'"{ROOT}[')], cwd=work, check=True)
    (example,) = blocks('python', 'From Python')
    (work / 'example.py').write_text(example)
    for launcher in ([], ['mpirun', '-n', '2']):
        subprocess.run([*launcher, sys.executable, 'example.py'], cwd=work, check=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
