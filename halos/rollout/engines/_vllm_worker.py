"""Run by the interpreter that has vllm: PYTHON _vllm_worker.py MODEL SETTINGS. Imports nothing from halos.

SETTINGS are the engine's, as JSON. Each line of stdin is a request; each line of stdout that begins with {"number" is the answer
to one, written as soon as it is complete, in whatever order.
"""

import json
import queue
import sys
import threading

sys.path.pop(0)  # the directory of this file, whose modules would shadow those that vllm imports

from vllm import LLM, SamplingParams


def main() -> None:
    lines: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=read, args=(lines,), daemon=True).start()
    # the engine itself, since LLM.generate returns when the last of its requests is complete
    engine = LLM(model=sys.argv[1], **json.loads(sys.argv[2])).llm_engine
    is_open = True
    while is_open or engine.has_unfinished_requests():
        while is_open and (not engine.has_unfinished_requests() or not lines.empty()):
            line = lines.get()
            if line is None:
                is_open = False
            else:
                request = json.loads(line)
                prompt = {"prompt_token_ids": request["prompt_token_ids"]}
                engine.add_request(str(request["number"]), prompt, SamplingParams(**request["parameters"]))
        if engine.has_unfinished_requests():
            for result in engine.step():
                if result.finished:
                    write(result)


def read(lines: "queue.SimpleQueue") -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)


def write(result) -> None:
    best = result.outputs[0]
    ids = list(best.token_ids)
    logps = [best.logprobs[position][token].logprob for position, token in enumerate(ids)]
    answer = {"number": int(result.request_id), "ids": ids, "logps": logps, "finish": best.finish_reason}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
