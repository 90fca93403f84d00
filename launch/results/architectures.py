#!/usr/bin/env python3
# ruff: noqa: E402
"""Test every causal architecture of the installed transformers that can be built small: how halos reads it, and whether its
log-probs equal the model's own.

    python launch/results/architectures.py [--output launch/results/architectures.md] [MODEL_TYPE ...]

Each is built with random weights, saved, loaded as in a run, and given three sequences at once. The ground truth is transformers'
own: the logits of each sequence alone by AutoModelForCausalLM with its default attention, in float32, and in float64 to bound
rounding errors. Log-probs, and the gradient of their sum in all trained tensors, must equal it (packed, or one at a time), or the
model is refused in one message. Each architecture has a process of its own.
"""

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
warnings.simplefilter("ignore")

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from halos.data.collate import pack
from halos.errors import UserError
from halos.examples import Completion
from halos.logps.attention import SEGMENTS
from halos.logps.model import LanguageModel
from halos.models.load import load_model

SECONDS, MEMORY, LARGEST = 120, 9 * 2**30, 16_000_000  # of CPU time for one architecture; bytes; parameters
VOCABULARY, LENGTHS, PROMPT = 268, (9, 30, 17), 4
KINDS = 4  # of layers, in a list with one per layer
SPREAD = 0.05  # added to every parameter: norms of 1 and biases of 0 hide mistakes
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SIZES = {
    name: value
    for value, names in {
        64: "hidden_size d_model n_embd dim model_dim emb_dim embed_dim embedding_size word_embed_proj_dim lru_width",
        96: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim",
        32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size",
        24: "q_lora_rank",
        16: "head_dim kv_channels kv_lora_rank v_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim "
        "index_head_dim hidden_size_per_layer_input",
        8: "index_topk laurel_rank "
        "qk_rope_head_dim qk_nope_head_dim state_size mamba_d_state mamba_n_heads sliding_window attention_window_size",
        4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts time_step_rank linear_num_value_heads index_n_heads",
        2: "num_key_value_heads num_kv_heads multi_query_group_num num_hidden_layers n_layer n_layers num_layers encoder_layers "
        "decoder_layers num_experts_per_tok moe_topk moe_k mamba_expand linear_num_key_heads",
        1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups",
        512: "max_position_embeddings n_positions n_ctx seq_length max_seq_len max_sequence_length",
        VOCABULARY: "vocab_size vocab_size_per_layer_input",
    }.items()
    for name in names.split()
}
NARROW_HEADS = ("axk1", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "youtu")
OWN: dict[str, dict[str, Any]] = {  # further sizes that some need
    **{name: {"head_dim": 8} for name in NARROW_HEADS},
    **{name: {"head_dim": 8, "num_key_value_heads": 4} for name in ("axk2", "deepseek_v32", "glm_moe_dsa")},
    **{name: {"head_dim": 16} for name in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "intermediate_size": [96, 96],
        "activation_sparsity_pattern": [0.95, 0.0],
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "xlnet": {"d_head": 16},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "gptj": {"rotary_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba2": {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "hybrid", "mamba"],
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "hybrid_layer_ids": [1],
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 64],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
    },
}


class NotBuilt(Exception):
    """No way of shrinking this architecture gives a model that runs."""


@dataclass
class Row:
    """The result of one architecture."""

    model_type: str
    name: str = ""
    verdict: str = ""  # packed | alone | refused | WRONG | TRACEBACK | not built
    head: str = ""
    error: float | None = None  # of a log-prob, nats
    noise: float | None = None  # of transformers' own float32
    gradient: float | None = None  # relative error, L2 over all trained tensors
    reason: str = ""


def sized(config: PretrainedConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for name, value in SIZES.items():
        try:
            given = getattr(config, name, None)
        except Exception:  # a configuration that differs from layer to layer
            given = value
        if isinstance(given, int) and not isinstance(given, bool):
            sizes[name] = value
    return sizes


def layered(config: PretrainedConfig) -> dict[str, Any]:
    """Return overrides that keep one layer of each kind of the default configuration; none where it has one kind."""
    depth = getattr(config, "num_hidden_layers", None)
    lists = {name: list(value) for name, value in vars(config).items() if isinstance(value, list | tuple) and len(value) == depth}
    lists = {name: value for name, value in lists.items() if len(set(map(str, value))) <= KINDS}  # no lists of numbers
    rows = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    kept = sorted(rows.index(row) for row in set(rows))
    if len(kept) < 2:
        return {}
    return {"num_hidden_layers": len(kept), **{name: [value[number] for number in kept] for name, value in lists.items()}}


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    for name, value in sized(config).items():
        try:
            setattr(config, name, value)
        except Exception:  # read-only, or checked against what is not shrunk yet
            continue
    for inner in [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]:
        shrunk(inner)
    return config


def build(model_type: str) -> Any:
    """Build a small random model. Raises NotBuilt where none of the ways gives one that runs."""
    kind = CONFIG_MAPPING[model_type]
    special = {"pad_token_id": 257, "bos_token_id": 256, "eos_token_id": 257}
    base = kind()
    own = OWN.get(model_type, {})
    flat = {**sized(base), **special, **own}
    parts = {name: value for name, value in vars(base).items() if isinstance(value, PretrainedConfig)}
    inner = {name: {**sized(value), **OWN.get(value.model_type, {})} for name, value in parts.items()}
    kinds = {name: {**sized(value), **layered(value), **OWN.get(value.model_type, {})} for name, value in parts.items()}
    ways = [
        lambda: kind(**{**flat, **layered(base), **own}),
        lambda: kind(**flat),
        lambda: kind(**{**flat, "layer_types": None}),
        lambda: kind(**{**flat, "rope_parameters": dict(ROPE)}),
        lambda: shrunk(kind()),
    ]
    problems = []
    for way in [lambda: kind(**kinds), lambda: kind(**inner), *ways] if inner else ways:
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(way()).parameters())
            if size > LARGEST:
                problems.append(f"{size} parameters")
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(way()).float().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += SPREAD * torch.randn(parameter.shape)
                if model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits.isfinite().all():
                    return model
            problems.append("numbers that are not finite")
        except Exception as error:
            problems.append(f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
    raise NotBuilt("; ".join(dict.fromkeys(problems)))


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def truth_of(model: Any, rows: list[Tensor]) -> Tensor:
    """Return the log-prob of every token after the prompts from the model's own logits, one sequence at a time."""
    parts = []
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        logps = (logits.float() if logits.dtype is not torch.float64 else logits).log_softmax(-1)
        parts.append(logps[PROMPT - 1 : -1].gather(-1, row[PROMPT:, None])[:, 0])
    return torch.cat(parts)


def gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logps.sum().backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def evaluate(model_type: str, path: Path) -> Row:
    """Build, save, load as a run does, and compare."""
    row = Row(model_type)
    try:
        model = build(model_type)
        row.name = type(model).__name__
        model.save_pretrained(path)
        plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        draw = np.random.default_rng(0)
        rows = [torch.from_numpy(draw.integers(3, 250, length)) for length in LENGTHS]
        truth = truth_of(plain, rows)
        wanted = gradients(plain, truth)
    except Exception as error:  # transformers itself does not run it
        row.verdict, row.reason = "not built", one_line(error)
        return row
    try:
        with torch.no_grad():
            row.noise = (truth_of(plain.double(), rows) - truth).abs().max().item()
    except Exception:  # some cannot compute in float64
        row.noise = None
    try:
        compare(row, path, rows, truth.detach(), wanted)
    except UserError as error:
        row.verdict, row.reason = "refused", one_line(error).replace(str(path), "MODEL")
    except Exception as error:
        row.verdict, row.reason = "TRACEBACK", one_line(error)
    return row


def one_line(error: Exception) -> str:
    kind = "" if isinstance(error, (UserError, NotBuilt)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def compare(row: Row, path: Path, rows: list[Tensor], truth: Tensor, wanted: dict[str, Tensor]) -> None:
    """Fill `row` with the errors of halos' log-probs for the model at `path`, given `truth` (nats) and its gradients `wanted`."""
    words = tokenizer()
    words.save_pretrained(path)
    batch = pack([(ids[:PROMPT].numpy().astype(np.int32), completion(ids[PROMPT:])) for ids in rows])
    module = LanguageModel(load_model(path, words, reward=None, dtype=torch.float32, attention=SEGMENTS).eval())
    logps = module(batch)
    row.verdict, row.head = "packed" if module.plan.is_packed else "alone", module.plan.head
    row.reason = module.plan.why or ""
    flat = logps.values[logps.mask]
    row.error = (flat.detach() - truth).abs().max().item()
    flat.sum().backward()
    read = {name.removeprefix("model."): p.grad for name, p in module.named_parameters() if p.grad is not None}
    off = sum((value - read.get(name, 0)).double().square().sum().item() for name, value in wanted.items())
    whole = sum(value.double().square().sum().item() for value in wanted.values())
    row.gradient = (off / max(whole, 1e-300)) ** 0.5
    allowed = max(1e-4, 32 * (row.noise or 0.0))
    if not (row.error <= allowed and row.gradient <= allowed):
        row.verdict, row.reason = "WRONG", f"was read {row.verdict}; {row.reason}"


def completion(ids: Tensor) -> Completion:
    return Completion(ids.numpy().astype(np.int32), np.ones(len(ids), bool))


def apart(model_type: str) -> Row:
    """Evaluate in a process of its own, which may hang or exhaust memory."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "row.json"
        child = os.fork()
        if child == 0:
            signal.alarm(10 * SECONDS)  # a process that hangs uses no CPU time
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of libraries
            try:
                out.write_text(json.dumps(asdict(evaluate(model_type, Path(scratch) / "model"))))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        if out.is_file():
            return Row(**json.loads(out.read_text()))
    return Row(model_type, verdict="not built", reason=f"no end within {SECONDS} s of CPU time or {MEMORY // 2**30} GiB")


def markdown(rows: list[Row]) -> str:
    counts = ", ".join(f"{number} {verdict}" for verdict, number in Counter(row.verdict for row in rows).most_common())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32 on a CPU"
    head = ["model type", "class", "rows", "head", "error of a log-prob", "float32's own", "gradient", "why"]
    lines = [f"# Architectures: {versions}", "", f"{len(rows)} model types: {counts}.", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *map(cells_of, rows))]
    return "\n".join(lines) + "\n"


def cells_of(row: Row) -> list[str]:
    numbers = [f"{value:.0e}" if value is not None else "" for value in (row.error, row.noise, row.gradient)]
    return [row.model_type, row.name, row.verdict, row.head, *numbers, row.reason.replace("|", "/")[:200]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="only these")
    parser.add_argument("--output", type=Path, help="write the table here")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        evaluate("llama", Path(scratch))  # imports what each child would import for itself
    rows = []
    for model_type in given.model_types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        row = apart(model_type)
        rows.append(row)
        numbers = f"{row.error or 0:.1e} {row.gradient or 0:.1e}"
        print(f"{row.verdict:10s} {model_type:28s} {row.head:6s} {numbers} {row.reason[:150]}", flush=True)
    text = markdown(rows)
    print(text.splitlines()[2])
    if given.output:
        given.output.write_text(text)
    return int(any(row.verdict in ("WRONG", "TRACEBACK") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
