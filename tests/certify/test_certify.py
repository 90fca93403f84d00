"""The kit passes every loss of config/loss, and fails a wrong one of each kind with the right line."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from halos.certify import page, subjects
from halos.certify.case import synthetic_case
from halos.certify.certificate import Certificate, certify
from halos.certify.command import main
from halos.certify.own import OwnLoss
from halos.certify.worked import Worked
from halos.errors import UserError
from halos.repository import PACKAGES
from halos.trainers import humanline
from halos.trainers.humanline import Humanline
from halos.types import Mean

WRONG = '''
import torch
from torch import relu
from torch.nn.functional import logsigmoid

from halos.types import Labelled, Loss, Mean, Pair, TokenLogps


def h(policy, reference):
    return policy.chosen.sum - policy.rejected.sum - reference.chosen.sum + reference.rejected.sum


def wrong_sign(policy: Pair, reference: Pair) -> Loss:
    return Loss(logsigmoid(h(policy, reference)), {})


def one_side(policy: Pair, reference: Pair) -> Loss:
    return Loss(-logsigmoid(policy.chosen.sum - reference.chosen.sum), {})


def mean_of_each_micro_batch(policy: Pair, reference: Pair) -> Loss:
    values = -logsigmoid(h(policy, reference))
    return Loss(values / len(values), {})


def of_padding(policy: Pair, reference: Pair) -> Loss:
    return Loss(-logsigmoid(policy.chosen.values.mean(-1) - policy.rejected.values.mean(-1)), {})


def of_places(policy: Pair, reference: Pair) -> Loss:
    values = -logsigmoid(h(policy, reference))
    return Loss(values * torch.arange(1, len(values) + 1), {})


def half(policy: Pair, reference: Pair) -> Loss:
    return Loss(-logsigmoid(h(policy, reference).bfloat16()).to(policy.chosen.values.dtype), {})


def overflows(policy: Pair, reference: Pair) -> Loss:
    return Loss((1 + (-h(policy, reference)).exp()).log(), {})


def hides_nan(policy: Pair, reference: Pair) -> Loss:
    return Loss(-logsigmoid(h(policy, reference)).nan_to_num(), {})


def mask_by_value(policy: Pair, reference: Pair) -> Loss:
    """HALOs' IPO counts the tokens whose log-ratio is not 0."""
    sides = (policy.chosen, reference.chosen), (policy.rejected, reference.rejected)
    ratios = [mine.values - theirs.values for mine, theirs in sides]
    chosen, rejected = (ratio.sum(-1) / (ratio != 0).sum(-1) for ratio in ratios)
    return Loss((chosen - rejected - 5) ** 2, {})


def absent_class(policy: Labelled, reference: Labelled) -> Loss:
    ratio, good = policy.completion.sum - reference.completion.sum, policy.desirable
    return Loss(torch.where(good, -ratio, ratio), {"rewards/chosen": Mean(ratio.detach()[good].mean(), torch.ones(()))})


def own_keys(policy: Labelled, reference: Labelled) -> Loss:
    ratio, good = policy.completion.sum - reference.completion.sum, policy.desirable
    return Loss(torch.where(good, -ratio, ratio), {"chosen": Mean.of(ratio, good)} if good.any() else {})


def needs_two(policy: TokenLogps) -> Loss:
    if len(policy.sum) < 2:
        raise ValueError("one row")
    return Loss(-policy.values, {}, per="token")


def reduced(policy: TokenLogps) -> Loss:
    return Loss(-policy.values.mean(), {})
'''
DPO = '''
from torch.nn.functional import logsigmoid
from halos.types import Loss, Pair


def loss(policy: Pair, reference: Pair, *, beta: float) -> Loss:
    """-log sigmoid(beta h)."""
    chosen = policy.chosen.sum - reference.chosen.sum
    rejected = policy.rejected.sum - reference.rejected.sum
    return Loss(-logsigmoid(beta * (chosen - rejected)), {})
'''
SAME = {"chosen": [[-1.0, -0.5]], "rejected": [[-0.75, -0.25]]}
FAR = {"chosen": [[-0.5, -0.5]], "rejected": [[-2.0, -0.5]]}
NUMBERS = {"policy": FAR, "reference": SAME, "keys": {"beta": 0.5}, "values": [0.313262]}  # ln(1 + e^(-0.5 x 2))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def of(package: Path, source: str, function: str, **keys: float) -> Certificate:
    name = f"mine_{package.name}"
    (package / f"{name}.py").write_text(source)
    try:
        return certify(subjects.named(f"{name}.{function}", keys, [name], None))
    finally:
        sys.modules.pop(name, None)


def failing(certificate: Certificate) -> set[str]:
    return {check.name for check in certificate.checks if check.verdict == "FAIL"}


@pytest.mark.parametrize("name", subjects.choices())
def test_every_loss_of_the_repository_passes(name: str) -> None:
    """Also one that was added today: it is found by its YAML."""
    certificate = certify(subjects.named(name, {}, [], None))
    assert not [check for check in certificate.checks if check.verdict == "FAIL"]


@pytest.mark.parametrize(
    ("function", "lines"),
    [
        ("wrong_sign", {"gradient signs", "swap"}),
        ("mean_of_each_micro_batch", {"micro-batches", "accumulation", "ranks"}),
        ("of_padding", {"padding", "micro-batches", "accumulation", "ranks", "swap"}),
        ("of_places", {"micro-batches", "accumulation", "ranks", "order of rows"}),
        ("half", {"float32"}),
        ("overflows", {"large log-probs"}),
        ("hides_nan", {"NaN and Inf"}),
        ("mask_by_value", {"policy = reference", "gradient signs"}),
        ("absent_class", {"micro-batches", "ranks", "an empty class"}),
        ("own_keys", {"micro-batches", "ranks", "an empty class"}),
        ("needs_two", {"micro-batches", "accumulation", "ranks", "one row"}),
        ("reduced", {"contract"}),
    ],
)
def test_a_wrong_loss_of_each_kind_fails_with_its_lines(package: Path, function: str, lines: set[str]) -> None:
    assert failing(of(package, WRONG, function)) - {"worked numbers"} == lines


def test_worked_numbers_that_see_too_little_leave_mutants_alive(package: Path) -> None:
    """Where policy and reference are equal, beta does nothing; nor do the operands of the differences."""
    start = {"policy": SAME, "reference": SAME, "keys": {"beta": 0.5}, "values": [0.693147]}
    certificate = of(package, f"{DPO}\n\nEXAMPLES = [{start!r}]", "loss", beta=0.5)
    (line,) = [check for check in certificate.checks if check.verdict == "FAIL"]
    assert (line.name, "beta * (chosen - rejected) -> beta / (chosen - rejected)" in certificate.alive) == ("mutants", False)
    assert "line 10: beta * (chosen - rejected)" not in line.evidence
    assert "beta * (chosen - rejected) -> beta * (rejected - chosen)" not in certificate.alive
    assert "policy.chosen.sum - reference.chosen.sum -> reference.chosen.sum - policy.chosen.sum" in certificate.alive


def test_a_number_worked_by_hand_kills_every_mutant_and_a_wrong_one_is_named(package: Path) -> None:
    certificate = of(package, f"{DPO}\n\nEXAMPLES = [{NUMBERS!r}]", "loss", beta=0.1)
    assert certificate.passes, certificate.checks
    assert not certificate.alive
    wrong = {**NUMBERS, "values": [0.313272]}
    (line,) = [check for check in of(package, f"{DPO}\n\nEXAMPLES = [{NUMBERS!r}, {wrong!r}]", "loss", beta=0.1).checks
               if check.verdict == "FAIL"]  # fmt: skip
    assert line.evidence == "example 2 of 2: values[0] is 0.3132617, not 0.313272"


def test_what_is_declared_not_to_hold_counts_with_its_reason_and_not_in_vain(package: Path) -> None:
    kept = f"{WRONG}\nEXEMPT = {{'gradient signs': 'it unlearns', 'swap': 'the same'}}\nEXAMPLES = []"
    certificate = of(package, kept, "wrong_sign")
    lines = {check.name: check for check in certificate.checks}
    assert lines["gradient signs"].verdict == "exempt"
    assert lines["gradient signs"].evidence.startswith("it unlearns (the chosen completion is pushed the wrong way")
    assert failing(certificate) == {"worked numbers"}
    assert failing(of(package, kept, "hides_nan")) == {"exemptions", "NaN and Inf", "worked numbers"}


def test_a_side_that_is_never_pushed_fails(package: Path) -> None:
    (line,) = [check for check in of(package, WRONG, "one_side").checks if check.name == "gradient signs"]
    assert (line.verdict, line.evidence) == ("FAIL", "the rejected completion is never pushed: its gradients are all 0")


def test_a_loss_that_reads_no_more_than_some_tokens_fails(package: Path) -> None:
    early = DPO.replace("def loss", "FIRST = 500\n\n\ndef loss").replace("chosen.sum", "chosen.values[:, :FIRST].sum(-1)")
    lines = {check.name: check for check in of(package, f"{early}\n\nEXAMPLES = [{NUMBERS!r}]", "loss", beta=0.1).checks}
    assert lines["long completions"].verdict == lines["mutants"].verdict == "FAIL"
    assert lines["long completions"].evidence == "token 501 of the 768 of a completion has no gradient, and 267 others"
    assert "FIRST = 500 -> FIRST = 501" in lines["mutants"].evidence


def test_a_side_that_is_kept_out_of_the_gradient_is_a_mutant(package: Path) -> None:
    kept_out = DPO.replace("    rejected = policy", "    with torch.no_grad():\n        rejected = policy").replace(
        "\n\n\n", "\n", 1
    )
    certificate = of(package, f"import torch\n{kept_out}\n\nEXAMPLES = [{NUMBERS!r}]", "loss", beta=0.1)
    assert "torch.no_grad() -> torch.enable_grad()" in certificate.alive
    assert failing(certificate) == {"gradient signs", "mutants"}


def test_what_divides_by_the_size_of_a_group_is_seen_by_groups_of_two_sizes() -> None:
    grpo = subjects.named("grpo", {}, [], None)
    assert failing(certify(grpo)) == set()
    of_two = [each for each in grpo.worked.examples if set(Counter(each.get("sampled", {}).get("groups", ())).values()) <= {2}]
    assert any("sampled" in each for each in of_two)
    (line,) = [each for each in certify(replace(grpo, worked=Worked(of_two, {}))).checks if each.name == "worked numbers"]
    assert line.evidence == "every group in its examples has 2: give groups of two sizes, or what divides by it is not seen"


def test_without_worked_numbers_nothing_is_proved(package: Path) -> None:
    assert failing(of(package, DPO, "loss", beta=0.1)) == {"worked numbers"}


def test_a_loss_is_proved_under_humanline_by_the_trainers_own_clamp(monkeypatch: pytest.MonkeyPatch) -> None:
    kto = subjects.named("kto", {"humanline": True, "humanline.low": -1.0}, [], None)
    assert (kto.humanline, len(kto.worked.examples)) == (Humanline(-1.0, 1.5), 4)
    certificate = certify(kto)
    lines = {check.name: check for check in certificate.checks}
    assert certificate.passes, certificate.checks
    assert "humanline/clamped" in lines["contract"].evidence
    assert lines["NaN and Inf"].evidence.endswith("-inf is clamped and has no gradient")
    assert lines["humanline numbers"].evidence.endswith("1 of kto's own numbers are under it")
    assert page.title(certificate).endswith("undesirable_weight=1.0, humanline.low=-1 humanline.high=1.5")
    subject = OwnLoss(kto.spec, kto.humanline)
    far = synthetic_case(subject, scale=1e4)
    total, count = subject.step(far, far.whole).metrics["kl"]
    assert abs(total / count) <= 1.5 * far.items[0].completions[0].ids.size * len(far.items), "mismatched completions too"

    monkeypatch.setattr(Humanline, "clamp", lambda self, policy, reference: (policy, Mean.of(policy.sum)))
    assert {"worked numbers", "NaN and Inf"} & failing(certify(kto)) >= {"worked numbers"}
    assert certify(subjects.named("kto", {}, [], None)).passes
    monkeypatch.undo()
    monkeypatch.setattr(humanline, "clamp", lambda policy, reference, *, low, high: (policy, Mean.of(policy.sum)))
    assert "humanline numbers" in failing(certify(kto))


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_documented_loss_is_proved_by_the_documented_command(tmp_path: Path) -> None:
    """By a process, as a stranger starts it: outside the package, with pages."""
    text = (PACKAGES / "halos/losses/README.md").read_text()
    name, code = re.findall(r"```python\n# (mylosses/\w+\.py)\n(.*?)```", text, re.S)[0]
    (words,) = re.findall(r"^python -m halos\.losses\.certify (mylosses.*)$", text, re.M)
    (tmp_path / "mylosses").mkdir()
    (tmp_path / name).write_text(code)
    command = [sys.executable, "-m", "halos.losses.certify", *words.split(), "--output", "page.html", "--json", "found.json"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(PACKAGES)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("mylosses.squared_hinge.squared_hinge: mylosses.squared_hinge.squared_hinge of Pair beta=0.5\n")
    assert done.stdout.endswith("mylosses.squared_hinge.squared_hinge passes\n")
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert (found["passes"], found["settings"], found["mutants_alive"]) == (True, {"beta": 0.5}, [])
    assert '<th scope="row">micro-batches</th><td>pass</td>' in (tmp_path / "page.html").read_text()


def test_worked_numbers_may_be_in_a_file(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "filed.py").write_text(DPO)
    (package / "numbers.yaml").write_text(f"examples:\n- {json.dumps(NUMBERS)}\n")
    assert main(["filed.loss", "beta=1e-1", "--plugins", "filed", "--examples", str(package / "numbers.yaml")]) == 0
    assert "beta=0.1\n" in capsys.readouterr().out


def test_several_losses_make_one_page_and_one_that_fails_the_exit_status(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / "crooked.py").write_text(WRONG)
    page = package / "page.md"
    assert main(["sft", "crooked.wrong_sign", "--plugins", "crooked", "--output", str(page)]) == 1
    assert capsys.readouterr().out.endswith("1 of 2 losses pass; not crooked.wrong_sign\n")
    assert "| crooked.wrong_sign | FAILS: gradient signs, swap, worked numbers |" in page.read_text()
    assert "| FAIL | swap | the loss of 6 of 6 rows is no larger with the two sides exchanged |" in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dpoo", r"there is no loss 'dpoo': did you mean dpo\? There are aot"),
        ("zzzz", r"there is no loss 'zzzz'\. There are aot"),
        ("online", r"online is a loop, whose loss is online\.loss: certify that by its own name"),
        ("dpo beta=-1", r"loss.beta takes a number \(above 0\), not -1"),
        ("dpo betta=1", "did you mean beta"),
        ("dpo ipo beta=1", "KEY=VALUE goes with one LOSS"),
        ("elsewhere.loss", r"elsewhere.loss is outside halos: if you trust that package, add --plugins elsewhere"),
        (
            "simpo humanline=on",
            "humanline.low=-1.5 bounds log-ratios to a reference, and loss=simpo uses none",
        ),
        ("gkd humanline.high=1", "humanline.high=1 bounds log-ratios of tokens, and loss=gkd compares whole distributions"),
        ("dpo humanline=yess", "humanline has no choice 'yess'; choices: on, off"),
        ("dpo humanline.lov=-1", r"no key 'humanline.lov'; did you mean humanline.low\?"),
        ("dpo humanline.low=1", r"humanline.low takes a number \(at most 0\) or null, not 1"),
        ("dpo --output page.pdf", "it ends in .md or .html"),
        ("dpo --examples none.yaml", "none.yaml cannot be read"),
        ("dpo --examples rows.jsonl", r"rows\.jsonl, line 2: this is not YAML, in which worked examples are a mapping"),
        ("dpo --output none/page.md", "none/page.md cannot be written"),
    ],
)
def test_wrong_input_is_one_message(words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"values": [1]}\n' * 2)
    with pytest.raises(UserError, match=message):
        main(words.split())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"polcy": SAME, "values": [1]}, "has 'polcy': it may have policy, reference"),
        ({"policy": SAME, "reference": SAME}, "has no result"),
    ],
)
def test_an_example_that_cannot_be_read_is_named(example: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "numbers.yaml"
    file.write_text(json.dumps({"dpo": {"examples": [example]}}))
    with pytest.raises(UserError, match=message):
        main(["dpo", "--examples", str(file)])


def test_the_documented_shape_of_a_page_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kto"]) == 0
    shown = capsys.readouterr().out
    assert (
        dedent("""\
          pass    policy = reference  the loss is 0.500000, of every row
        """)
        in shown
    )
    assert "2 collectives a step" in shown
