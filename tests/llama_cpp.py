"""What llama.cpp makes of a GGUF file: tokens of texts, a conversation as text, the next token's odds.

    python tests/llama_cpp.py FILE < questions.json        {"texts": [...], "turns": [...], "prompts": [[id, ...]]}
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest


def ask_llama_cpp(file: Path, **questions: Any) -> dict[str, Any]:
    """Return the answers: tokens of each text, the text of the turns, log-probabilities by token after each prompt.

    Skips the test where there is no build of llama.cpp for this machine.
    """
    pytest.importorskip("xllamacpp")
    done = subprocess.run([sys.executable, __file__, str(file)], input=json.dumps(questions), capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port, params.verbosity = sys.argv[1], 256, 0, 1
    params.cpuparams.n_threads, params.warmup = 2, False
    server, questions = xllamacpp.Server(params), json.load(sys.stdin)

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def odds(prompt: list[int]) -> dict[str, float]:
        made = ask("/completion", prompt=prompt, n_predict=1, n_probs=100_000, temperature=0, cache_prompt=False,
                   logit_bias=[["a", 10_000]])  # a whole character: of others no odds are told; those are without bias
        return {str(each["id"]): each["logprob"] for each in made["completion_probabilities"][0]["top_logprobs"]}

    found: dict[str, Any] = {
        "tokens": [ask("/tokenize", content=text, add_special=True)["tokens"] for text in questions.get("texts", [])],
        "odds": [odds(prompt) for prompt in questions.get("prompts", [])]}
    if questions.get("turns"):
        found["conversation"] = ask("/apply-template", messages=questions["turns"])["prompt"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
