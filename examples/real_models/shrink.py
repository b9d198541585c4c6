"""Store the plugin of a run in a few bits a number, as a run of its own that is measured and shipped like any other.

python examples/real_models/shrink.py --cache CACHE --model all-mpnet-base-v2 --run RUN --output SMALL
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from peft import PeftModel
from weights import WEIGHTS, Loaded, load

from peft_variator import shrink_plugin
from peft_variator.files import write_text


__all__ = ["shrink"]


def shrink(base: Loaded, run: Path, output: Path, bits: int, command: str) -> None:
    """Write `output/plugin` and `output/run.json`, which says what was done.

    Args:
        base: the model.
        run: folder of the run.
        output: folder to write.
        bits: 4 or 8, of each number of the copied neurons.
        command: how this was asked for.
    """
    model = PeftModel.from_pretrained(base.model, str(run / "plugin"))
    shrink_plugin(model, bits)
    model.save_pretrained(str(output / "plugin"))
    record = json.loads((run / "run.json").read_text())
    write_text(
        output / "run.json", json.dumps(record | {"shrunk": {"bits": bits, "command": command}}, indent=2) + "\n"
    )


def main() -> None:
    """Shrink the plugin of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder that weights.py filled")
    parser.add_argument("--model", choices=list(WEIGHTS), required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run that trained it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, in the form of a run's")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    arguments = parser.parse_args()
    base = load(arguments.model, arguments.cache)
    shrink(base, arguments.run, arguments.output, arguments.bits, shlex.join(["python", *sys.argv]))
    print(f"Wrote {arguments.output}. Next: measure.py and speed.py on {arguments.output / 'plugin'}, then ship.py.")


if __name__ == "__main__":
    main()
