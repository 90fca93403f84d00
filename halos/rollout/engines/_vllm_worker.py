"""Run by the interpreter that has vllm: PYTHON _vllm_worker.py MODEL. Imports nothing from halos.

Each line of stdin is a list of requests; each line of stdout that begins with {"number" is the answer to one.
"""

import json
import sys

sys.path.pop(0)  # the directory of this file, whose modules would shadow those that vllm imports

from vllm import LLM, SamplingParams


def main() -> None:
    model = LLM(model=sys.argv[1])
    for line in sys.stdin:
        requests = json.loads(line)
        prompts = [{"prompt_token_ids": each["prompt_token_ids"]} for each in requests]
        settings = [
            SamplingParams(
                seed=each["seed"], temperature=each["temperature"], max_tokens=each["max_tokens"], top_p=each["top_p"],
                top_k=each["top_k"], logprobs=0, skip_special_tokens=False,
            )
            for each in requests
        ]  # fmt: skip
        for number, result in enumerate(model.generate(prompts, settings, use_tqdm=False)):
            best = result.outputs[0]
            ids = list(best.token_ids)
            logps = [best.logprobs[position][token].logprob for position, token in enumerate(ids)]
            answer = {"number": number, "ids": ids, "logps": logps, "finish": best.finish_reason}
            sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
