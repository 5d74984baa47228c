"""Run as a program: texts on stdin, speech of eSpeak NG on stdout. A fresh process, so that each begins alike.

The library keeps the state of its noise and of its oscillators from one text to the next, beyond what its seed sets:
what it says of a text depends on all it has said before. So it is seeded once, and says a list in its order.

stdin: JSON {"library", "data", "seed", "speed", "pitch", "say": [[voice, text], ...]}. stdout: samples per second as a
little-endian int32, then for each text the number of samples as an int32 and the samples as int16.
"""

import ctypes
import json
import struct
import sys

SYNCHRONOUS, UTF8, SPEED, PITCH = 2, 1, 1, 3


def main() -> int:
    """Gives 0, or 1 with a line on stderr."""
    asked = json.load(sys.stdin)
    library = ctypes.CDLL(asked["library"])
    said = bytearray()
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

    def heard(samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            said.extend(ctypes.string_at(samples, 2 * count))
        return 0

    kept = callback(heard)  # as long as the library may call it
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, asked["data"].encode(), 0)
    if rate <= 0:
        print("eSpeak NG does not start: its data are missing", file=sys.stderr)
        return 1
    library.espeak_SetSynthCallback(kept)
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p,
        ctypes.c_void_p,
    ]  # fmt: skip
    library.espeak_ng_SetRandSeed(asked["seed"])
    out, present = sys.stdout.buffer, None
    out.write(struct.pack("<i", rate))
    for voice, text in asked["say"]:
        if voice != present:
            if library.espeak_SetVoiceByName(voice.encode()) != 0:
                print(f"eSpeak NG has no voice {voice!r}: choose e.g. en-us, en-us+f3, en-gb-scotland", file=sys.stderr)
                return 1
            library.espeak_SetParameter(SPEED, asked["speed"], 0)
            library.espeak_SetParameter(PITCH, asked["pitch"], 0)
            present = voice
        said.clear()
        data = text.encode()
        if library.espeak_Synth(data, len(data) + 1, 0, 1, 0, UTF8, None, None) != 0:
            print(f"eSpeak NG cannot say {text[:60]!r}", file=sys.stderr)
            return 1
        out.write(struct.pack("<i", len(said) // 2))
        out.write(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
