"""Facts about llama.cpp and its devices as one JSON object: `python -m ocserve.engine.probe`.

Run as a child process by `ocserve doctor`, so that a broken GPU driver takes the probe down and nothing else.
"""

from __future__ import annotations

import sys

import msgspec

from ocserve.engine import llama, process


def main() -> None:
    facts = {
        "llama_cpp": llama.version(),
        "supports_gpu_offload": llama.supports_gpu_offload(),
        "system_info": llama.system_info(),
        "gpu_makers": process.gpu_makers(),
        "devices": [msgspec.to_builtins(device) for device in llama.devices()],
    }
    sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")


if __name__ == "__main__":
    main()
