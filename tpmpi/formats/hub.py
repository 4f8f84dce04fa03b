"""Fetches a checkpoint of the Hugging Face Hub into huggingface_hub's own cache: only what the conversion reads.

That is JSON, the chat template, and the safetensors files of the index, or one GGUF file; never a pickle, never code.
huggingface_hub itself obeys HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tpmpi.formats.gguf import PART
from tpmpi.formats.source import FormatError, parse_json, read_json, read_text

WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
TEXTS = ('config.json', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'special_tokens_map.json',
         'chat_template.jinja', INDEX)
FILES = ('.gguf', '.safetensors', '.h5')  # a missing file of such a name is a missing file
NAME = re.compile(r'[\w.-]{1,96}/[\w.-]{1,96}', re.ASCII)
SHOWN = 5  # file names in a message
MOST_PARTS = 1000  # of a GGUF file


@dataclass(frozen=True)
class Fetched:
    """A checkpoint on this machine, and where it came from."""

    path: Path  # a folder, or a GGUF file
    repository: str
    commit: str

    @property
    def provenance(self) -> dict[str, str]:
        """What the model file says of it; a folder of the cache is named by the commit, which is no name of a model."""
        return {'repository': self.repository, 'revision': self.commit} | (
            {} if self.path.is_file() else {'source': self.repository})


def is_hub_name(source: str) -> bool:
    """Whether a text can be `org/name` on the Hub, by its rules: letters, digits, - _ . in both; 96 in all; no -- or .. ."""
    parts = source.split('/')
    return (NAME.fullmatch(source) is not None and len(source) <= 96 and not source.endswith(('.git', *FILES))
            and '--' not in source and '..' not in source
            and not any(part[0] in '-.' or part[-1] in '-.' for part in parts))


def locate(source: str | Path, revision: str | None = None, gguf: str | None = None) -> tuple[Path, dict[str, str]]:
    """Where a checkpoint lies on this machine, and what is known of where it came from.

    A text that is no path here and looks like `org/name` or `org/name:FILE.gguf` is fetched from the Hub.
    Raises FormatError with one line where that cannot be.
    """
    if isinstance(source, str) and not os.path.exists(source):
        name, colon, file = source.partition(':')
        if is_hub_name(name):
            if colon and gguf is not None:
                raise FormatError(f'{source}: names one file, --gguf {gguf} another; leave out one of the two')
            if not os.path.exists(name):
                fetched = fetch(name, revision, file if colon else gguf)
                return fetched.path, fetched.provenance
            source, gguf = name, file
    if revision is not None:
        raise FormatError(f'{source}: a path has no revision, only a name (org/name) of a repository on the Hugging Face Hub '
                          'has; leave out --revision')
    return Path(source) / (gguf or ''), {}


def fetch(repository: str, revision: str | None = None, gguf: str | None = None) -> Fetched:
    """Download what is not in the cache yet.  gguf: one GGUF file of the repository, instead of config.json and safetensors.

    Raises FormatError with one line where that cannot be.
    """
    if gguf is not None and (not gguf.endswith('.gguf') or any(part in ('', '.', '..') for part in gguf.split('/'))):
        raise FormatError(f'{repository}: {gguf!r} is no name of a GGUF file; expected FILE.gguf of that repository')
    hub = import_hub(repository)
    with warnings.catch_warnings():  # what they are about comes as an error, too
        warnings.simplefilter('ignore')
        hub.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            hub.utils.disable_progress_bars()
        if gguf is None:
            return fetch_folder(hub, repository, revision)
        path = fetch_file(hub, repository, gguf, revision)
        commit = path.parents[gguf.count('/')].name
        if (part := PART.fullmatch(gguf)) is not None and int(part[2]) == 1:  # its reader wants the others beside it
            for i in range(2, min(int(part[3]), MOST_PARTS) + 1):
                fetch_file(hub, repository, f'{part[1]}-{i:05d}-of-{part[3]}.gguf', commit)
    return Fetched(path, repository, commit)


def fetch_file(hub, repository: str, name: str, revision: str | None) -> Path:
    return Path(guarded(hub, repository, revision, lambda: hub.hf_hub_download(repository, name, revision=revision), name))


def import_hub(repository: str):
    try:
        import huggingface_hub
    except ImportError as error:
        raise FormatError(f'{repository}: there is no such file or folder; to get it from the Hugging Face Hub install '
                          f'huggingface_hub (pip install "tpmpi[hub]")') from error
    return huggingface_hub


def fetch_folder(hub, repository: str, revision: str | None) -> Fetched:
    """First the texts, which say what the weights are called and whether it is worth while to fetch them."""
    def snapshot(revision: str | None, patterns: list[str]) -> Path:
        return Path(guarded(hub, repository, revision, lambda: hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns)))

    folder = snapshot(revision, list(TEXTS))
    commit = folder.name
    if (folder / 'config.json').is_file():
        from tpmpi.formats.huggingface import choose_family

        choose_family(parse_json(read_text(folder / 'config.json'), folder / 'config.json'))
    names = weight_files(folder)
    if names != [WHOLE] and lists_whole_file(hub, repository, commit):
        names = [WHOLE]  # which goes before an index, as in a folder
    if names and not all((folder / name).is_file() for name in names):
        snapshot(commit, names)
    missing = next((name for name in ('config.json', *names) if not (folder / name).is_file()), None)
    if missing is not None:
        raise FormatError(f'{repository}: {why_missing(hub, repository, commit, missing)}')
    return Fetched(folder, repository, commit)


def weight_files(folder: Path) -> list[str]:
    """The one that needs no index, or those of the index.  None of an index that names anything else: its reader refuses it."""
    if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        return [WHOLE]
    weight_map = read_json(folder / INDEX).get('weight_map')
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    return names if all(re.fullmatch(r'[\w.-]+\.safetensors', name) for name in names) else []


def lists_whole_file(hub, repository: str, commit: str) -> bool:
    """Whether the repository has one file of all weights; False where that cannot be found out."""
    if hub.constants.HF_HUB_OFFLINE:
        return False
    with contextlib.suppress(FormatError):
        return WHOLE in guarded(hub, repository, commit, lambda: hub.HfApi().list_repo_files(repository, revision=commit))
    return False


def why_missing(hub, repository: str, commit: str, name: str) -> str:
    """What to do about a file that a repository, or this cache, does not have."""
    if hub.constants.HF_HUB_OFFLINE:
        return offline(hub, repository)
    files = guarded(hub, repository, commit, lambda: hub.HfApi().list_repo_files(repository, revision=commit))
    ggufs = sorted(file for file in files if file.endswith('.gguf'))
    pickles = sorted(file for file in files if file.endswith(('.bin', '.pt', '.pth', '.pkl', '.ckpt')))
    if ggufs:
        return f'the repository has no {name}, but GGUF files; name one of them: {listed(f"{repository}:{f}" for f in ggufs)}'
    if pickles and name != 'config.json':
        return (f'the repository has no {name}; {pickles[0]} is a pickle, which can run any code and is never fetched: look for '
                'a repository, or a --revision, with safetensors')
    return f'the repository has no {name}; expected config.json, *.safetensors and tokenizer.json'


def offline(hub, repository: str) -> str:
    return (f'not, or not wholly, in the cache {hub.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) '
            f'forbids to download it; run once without it where there is a network')


def listed(names) -> str:
    names = list(names)
    return ', '.join(names[:SHOWN]) + (f' and {len(names) - SHOWN} more' if len(names) > SHOWN else '')


def guarded(hub, repository: str, revision: str | None, download: Callable, file: str | None = None):
    """What `download` returns; its many errors, those of the HTTP library among them, become one line each."""
    try:
        return download()
    except Exception as error:
        raise FormatError(f'{repository}: {explain(hub, error, repository, revision, file)}') from error


def explain(hub, error: Exception, repository: str, revision: str | None, file: str | None) -> str:
    chain, utils = [error], hub.utils
    while chain[-1].__cause__ is not None or chain[-1].__context__ is not None:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)

    def among(*kinds):
        return next((e for e in chain if isinstance(e, kinds)), None)

    answers = [e.response for e in chain if isinstance(e, utils.HfHubHTTPError) and getattr(e, 'response', None) is not None]
    status = answers[0].status_code if answers else None
    full = next((e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)
    if full is not None:
        return f'{os.strerror(full.errno)} in the cache {hub.constants.HF_HUB_CACHE}; set HF_HUB_CACHE to a folder with room'
    if among(utils.GatedRepoError):
        return (f'the repository is gated; accept its terms at {hub.constants.ENDPOINT}/{repository}, and set HF_TOKEN to a '
                'token of that account')
    if among(utils.RepositoryNotFoundError):
        return ('no such file or folder here, and no such repository on the Hub, or a private one; check the name, or set '
                'HF_TOKEN to a token that may read it')
    if among(utils.RevisionNotFoundError):
        return f'the repository has no revision {revision!r}; give a branch, a tag or a commit hash'
    if isinstance(error, utils.EntryNotFoundError) and not isinstance(error, utils.LocalEntryNotFoundError):
        return why_missing(hub, repository, revision, file) if file else f'a file is missing ({first_line(error)})'
    if status in (401, 403):
        return f'the Hub refuses access (HTTP {status}); set HF_TOKEN to a token that may read it'
    if status is not None:
        return f'{hub.constants.ENDPOINT} answers with HTTP {status}; try again later'
    if hub.constants.HF_HUB_OFFLINE:
        return offline(hub, repository)
    system = next((e for e in chain if type(e) in (PermissionError, OSError) and e.filename), None)
    if system is not None:
        return f'{system.filename}: {system.strerror}; set HF_HUB_CACHE to a folder that can be written'
    return (f'no such file or folder here, and {hub.constants.ENDPOINT} cannot be reached ({first_line(chain[-1])}); where there '
            'is no network, fetch it elsewhere and give its folder, or copy the cache and set HF_HUB_CACHE')


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
