"""The commands that the documents show, and what each needs. Those of README: test_readme.py."""

import itertools
import re
import shlex
import sys

from support.run_commands import ROOT

DOCUMENTS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
_SLURM = ("sbatch", "srun", "slurm/chain.sh")


def typed(document, need):
    """Return the commands of a document that need this, as words."""
    text = (ROOT / document).read_text()
    commands = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and needs(words) == need:
                commands.append(words)
    return commands


def needs(words):
    """Return what a line of a `console` block needs, in addition to the package.

    `slurm`, `s3`: one that is started; `make`: a clone; `cloud`: a third party's; `sketch`: to be
    completed; `output`: it is what a command printed.
    """
    program = next(word for word in words if not _is_variable(word))
    line = " ".join(words)
    if program in _SLURM or "hydra/launcher=slurm" in words:
        return "slurm"
    if program not in ("python", "torchrun", "make"):
        return "output"
    if "…" in line:
        return "sketch"
    if re.search(r"gs://|googleapis", line):
        return "cloud"
    if "s3://" in line:
        return "s3"
    return "make" if program == "make" else ""


def to_run(words, ranks=2):
    """Return the variables and the words with which a command is started here.

    Where it asks for eight ranks or tasks, it gets fewer.
    """
    env = dict(word.split("=", 1) for word in itertools.takewhile(_is_variable, words))
    program, *rest = words[len(env) :]
    starts = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    rest = [re.sub(r"((?:nproc-per-node|tasks.per.node))=8", rf"\1={ranks}", w) for w in rest]
    return env, [*starts.get(program, [program]), *rest]


def shorter(words):
    """Return the command of a training, or of its job, with two steps only."""
    return [*words, "trainer.max_steps=2"]


def _is_variable(word):
    return re.match(r"[A-Z_]+=", word) is not None
