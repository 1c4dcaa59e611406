"""Generate texts with the newest checkpoint of a run: `python -m manta.trainer.serve RUN COUNT TOKENS PROMPT`.

Prints a line of JSON for each, as in samples.jsonl.
"""

import sys
from contextlib import suppress
from pathlib import Path

from manta.data.errors import DataError, InputError
from manta.trainer.run_directory import RunDirectory

OUT_OF_MEMORY = "1000"  # the kernel kills this process before any other


def main() -> None:
    directory, count, tokens, prompt = sys.argv[1:]
    with suppress(OSError):  # a container may not let it
        Path("/proc/self/oom_score_adj").write_text(OUT_OF_MEMORY, encoding="ascii")
    from manta.trainer.serve.generate import generate_texts

    try:
        for text in generate_texts(RunDirectory(Path(directory)), prompt, seeds=range(1, int(count) + 1), count=int(tokens)):
            sys.stdout.buffer.write(text.to_json() + b"\n")
            sys.stdout.buffer.flush()
    except (InputError, DataError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
