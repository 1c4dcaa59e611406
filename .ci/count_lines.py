"""Count the product's lines of Python: without blank lines, comments and docstrings (those of fields included).

python .ci/count_lines.py
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

FOLDERS = ("cluster", "data", "launch", "trainer")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Return the number of lines that hold a token of code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> int:
    files = subprocess.check_output(["git", "ls-files", *FOLDERS], text=True).splitlines()
    counts = Counter[str]()
    for file in files:
        if file.endswith(".py"):
            counts[str(Path(file).parent)] += code_lines(Path(file).read_text())
    for folder, count in sorted(counts.items()):
        print(f"{count:7,} {folder}")
    print(f"{counts.total():7,} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
