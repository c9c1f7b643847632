"""Check the wording of code and documents: python scripts/check_words.py [--count] [PATH …].

Prints one line per finding, `path:line: text (use: replacement)`, and exits with 1 if there are any.
docs/style.md gives the rules; this file lists the phrases and names that break them.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ("trainer", "models", "scripts", "tests", "conf", "docs", "slurm", "kubernetes", "perdure",
           ".ci", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "AGENTS.md", "Makefile", "mkdocs.yml",
           "pyproject.toml")  # fmt: skip
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".js", ""}
EXCLUDED = (
    "scripts/check_words.py",
    "docs/style.md",
    "tests/golden/",
    "docs/img/",
    "trainer/reporting/uplot.js",
)

PHRASES = {
    r"(is|are|was|were|be) no(?! (longer|more|less|fewer|matter)\b)": "'is not a', 'has no', 'without'",
    r"there (is|are) no such": "'no such file'",
    r"no numbers?(?! of)": "'NaN or infinite', 'not a number'",
    r"(nobody|somebody|whoever|anybody|everybody|a person|persons?|other people'?s?)": "'the caller', 'the user', 'another process', 'third-party'",
    r"(goes|go|going|went|gone|gets) on (from|with|where|as|without|shard|in)": "'resumes from', 'continues'",
    r"go on": "'continue'",
    r"(begins?|began|begun|start|starts|started) anew": "'start over'",
    r"begun": "'started'",
    r"besides?": "'in addition'; of concurrent work: 'in the background', 'concurrently'",
    r"likewise": "'also', 'same'",
    r"for good": "'permanently'",
    r"by (itself|themselves|oneself)": "'automatically'",
    r"without a word|last words?|wordless(ly)?": "'without writing its end', 'heartbeat record', 'final record'",
    r"(stands?|stood|standing|stand)( still)?(?!ard|alone|-alone)": "'is stalled', 'is stored', 'is located'",
    r"(lies|lay|lie)(?! in wait)": "'is stored', 'is located'",
    r"(is|are|was|were|be|been|being|not|as|were) (told|said)": "'reported', 'logged', 'set'",
    r"told|foretold|foretells?": "'reported', 'estimated'",
    r"(says?|said|saying)": "'reports', 'logs', 'states'",
    r"(hears?|heard|hearing)": "'receives', 'detects'",
    r"knows": "'has', 'is given', 'depends on'",
    r"(judges?|judged|judging)": "'validate', 'evaluate'",
    r"refuse[sd]?": "'reject', 'raise', 'does not start'",
    r"litter": "'orphaned files'",
    r"foreign": "'external', 'third-party'",
    r"ours|of ours|theirs|of theirs": "'Perdure\\'s', 'reference'",
    r"whole(?!-)": "'complete', 'intact', 'entire'",
    r"(is|are|was|were|who|already|has|have) gone|gone for": "'lost', 'exited', 'deleted'",
    r"lacks?|lacking": "'is missing'",
    r"proven wrong": "'checksum mismatch', 'damaged'",
    r"taken away|takes? away|took away": "'removed', 'stopped by the scheduler'",
    r"handed on|hands? on\b": "'passed'",
    r"counted as|counts as": "'is treated as'",
    r"(?<!no )such(?! as)": "delete it",
    # not the former name of a task's train_metrics
    r"(?<![\"'<])(?<!def )figures?(?![\"']| = train_metrics|=)": "'metrics', 'numbers', 'measurements'",
    r"makes? known|made known|make (it|them) known": "'reports', 'publishes'",
    r"comes? of|came of": "'results from'",
    r"(of|in|for|with|by|after) so (many|much|long)": "name the setting or the number",
    r"so (large|small|long|short) an?": "name the setting or the number",
    r"at the most": "'at most'",
    r"one's": "'its own'",
    r"take[sn]? note|takes? care": "'record', 'handle'",
    r"give[sn]? up": "'abort', 'abandon'",
    r"look(s|ed|ing)? (at|for|after|into) (it|them|that|what)": "'check', 'search'",
    r"as (it|they) (is|are|was|were)": "'unchanged', 'as stored'",
    r"what there is|where there (is|are|was)|if there (is|are) (one|any)": "'if any', 'if present'",
    r"of its own": "'own', 'separate'",
    r"of one moment": "'consistent'",
    r"whatever": "'any', 'regardless of'",
    r"none of (it|them)": "'no'",
}  # fmt: skip
FIRST_WORDS = (
    "What",
    "Whether",
    "Where",
    "How",
    "Of",
    "Which",
    "When",
    "One",
    "That",
    "Who",
    "Whose",
    "Why",
)
NAMES = frozenset(
    "found made wanted given told known kept chosen shown taken held each most own whole left share "
    "place what why inner besides said heard gone ours theirs whose".split()
)  # fmt: skip
TEST_NAME = re.compile(
    r"test_(what|whether|where|how|who|whose|which|why|one|a|an|the|of|that|there|nobody|somebody|it|its)_"
    r"|_(nobody|somebody|whoever|told|foretold|gone|litter|judged|ours|theirs|besides|likewise|beside|refused|whole|foreign|is_no|are_no)(_|$)"
)  # fmt: skip
PATTERNS = [
    (re.compile(rf"(?<![\w.])(?:{p})(?![\w])", re.IGNORECASE), use) for p, use in PHRASES.items()
]


def files(paths: list[str]) -> Iterator[Path]:
    """Yield the tracked and new files to check, in order."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *(paths or CHECKED)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in sorted(set(listed)):
        path = ROOT / name
        if path.suffix in SUFFIXES and not name.startswith(EXCLUDED) and path.is_file():
            yield path


def phrases(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, phrase, replacement) of every banned phrase."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, use in PATTERNS:
            for match in pattern.finditer(line):
                around = (
                    line[match.start() - 1 : match.start()] + line[match.end() : match.end() + 1]
                )
                if around not in ('""', "''", "``"):  # a stored key or value, not prose
                    yield number, match[0], use


def names(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Yield participles and pronouns used as identifiers, riddle test names, and bad first words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            bound = node.attr
        elif isinstance(node, ast.arg):
            bound = node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound = node.name
            if bound.startswith("test_") and TEST_NAME.search(bound):
                yield node.lineno, bound, "test_<unit>_<condition>_<result>"
        else:
            bound = ""
        if bound.strip("_").lower() in NAMES:
            yield node.lineno, f"name {bound}", "a noun for a value, a verb for an action"
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            first = node.value.value.strip().split(" ", 1)[0].rstrip(",:")
            if first in FIRST_WORDS:
                yield (
                    node.lineno,
                    f"note begins with {first}",
                    "a noun phrase or an imperative verb",
                )


def findings(path: Path) -> list[tuple[int, str, str]]:
    """Return everything to change in a file, by line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    every = list(phrases(text))
    if path.suffix == ".py":
        every += names(ast.parse(text))
    return sorted(every)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Check the wording of code and documents.")
    parser.add_argument("paths", nargs="*", help="files or folders; default: everything checked")
    parser.add_argument("--count", action="store_true", help="print counts per file only")
    options = parser.parse_args()
    total = 0
    for path in files(options.paths):
        every = findings(path)
        total += len(every)
        if options.count and every:
            print(f"{len(every):5} {path.relative_to(ROOT)}")
        elif not options.count:
            for number, phrase, use in every:
                print(f"{path.relative_to(ROOT)}:{number}: {phrase!r} (use: {use})")
    print(f"{total} findings", file=sys.stderr)
    return 1 if total else 0


if __name__ == "__main__":
    raise SystemExit(main())
