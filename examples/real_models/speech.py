"""Sentences read by eSpeak NG, whose library a PyPI package carries (`espeakng-loader`); nothing is downloaded."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt


__all__ = ["synthesise"]

# From espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples are handed to the callback before espeak_Synth returns
_UTF8 = 1  # espeakCHARS_UTF8
_CHARACTERS = 1  # POS_CHARACTER
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_OK = 0


def synthesise(text: str, voice: str = "en-us") -> tuple[npt.NDArray[np.float32], int]:
    """What eSpeak NG says.

    It remembers something of what it said before, so that only the same sentences in the same order, in a process of
    their own, give the same samples.

    Args:
        text: a sentence.
        voice: name of one of its voices.

    Returns:
        Samples between -1 and 1, and how many of them a second has.

    Raises:
        ModuleNotFoundError: `espeakng-loader` is not installed.
        ValueError: there is no such voice.
    """
    library, rate = _library()
    if library.espeak_SetVoiceByName(voice.encode()) != _OK:
        raise ValueError(f"eSpeak NG has no voice {voice!r}; 'en-us' and 'en-gb' are two that it has.")
    pieces: list[npt.NDArray[np.int16]] = []

    @_Callback
    def keep(samples: Any, count: int, _: Any) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on

    library.espeak_SetSynthCallback(keep)
    data = text.encode() + b"\0"
    code = library.espeak_Synth(data, len(data), 0, _CHARACTERS, 0, _UTF8, None, None)
    if code != _OK or not pieces:
        raise ValueError(f"eSpeak NG could not read {text!r} (code {code}).")
    return np.concatenate(pieces).astype(np.float32) / 32768, rate


@cache
def _library() -> tuple[Any, int]:
    """The library, ready to speak, and its sampling rate."""
    try:
        import espeakng_loader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "espeakng-loader is not installed, so no sentence can be read: pip install espeakng-loader"
        ) from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG does not start (code {rate}).")
    return library, rate
