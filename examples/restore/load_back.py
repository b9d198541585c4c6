"""Load a packed encoder as anyone would, embed the STS-B test set, and write the embeddings.

python examples/restore/load_back.py MODEL_DIR EMBEDDINGS_FILE --data DATA
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from encoder import Encoder
from safetensors.torch import save_file
from transformers import AutoModel

import peft_variator  # noqa: F401  without it transformers does not know packed models


def main(
    model: Annotated[Path, typer.Argument(help="Folder with a packed model.")],
    embeddings: Annotated[Path, typer.Argument(help="File to write.")],
    data: Annotated[Path, typer.Option(help="Folder that holds stsb.")],
) -> None:
    """Embed both sentences of every pair."""
    loaded = AutoModel.from_pretrained(model, add_pooling_layer=False)
    save_file({"embeddings": Encoder(data, steps=0).embed(loaded)}, embeddings)


if __name__ == "__main__":
    typer.run(main)
