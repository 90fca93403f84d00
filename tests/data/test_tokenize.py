import numpy as np
import pytest

from halos.data.collate import pack
from halos.data.encoded import PROMPT_TOO_LONG, TOO_LONG, Encoded
from halos.data.row import EQUAL
from halos.data.tokenize import WITHIN_TOKEN, Encoder, any_of, vocabulary_of
from halos.errors import UserError
from halos.examples import SampledTokens
from halos.types import Comparison, Demonstration, Example, Judgement, Scored, Turns

from .tokenizers import CHATML, GEMMA, LLAMA3, NO_END, THINKING, says, tokenizer, turn, user

PROMPT, ANSWER = (user("What is 12 + 30?"),), (says("It is 42, and no more."),)


def encode(example: Example, made=None, *, max_length: int = 1000, truncation: str = "drop") -> Encoded | str:
    return Encoder(made or tokenizer(), max_length=max_length, truncation=truncation).encode([(example, "a.jsonl:7")])[0]


def encoded(example: Example, made=None, **how) -> Encoded:
    done = encode(example, made, **how)
    assert isinstance(done, Encoded), done
    return done


def fed(made, turns: Turns) -> list[int]:
    """Return the ids that a sampler feeds the model."""
    text = made.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    return made(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, NO_END])
def test_the_prompt_equals_a_samplers_and_the_whole_is_the_text_tokenised_at_once(template):
    made = tokenizer(template, bos=True)
    done = encoded(Demonstration(PROMPT, ANSWER), made)
    assert done.prompt.tolist() == fed(made, PROMPT)
    text = made.decode([*done.prompt, *done.completions[0].ids])
    assert made(text, add_special_tokens=False)["input_ids"] == [*done.prompt, *done.completions[0].ids]
    assert done.completions[0].scored.all()
    assert not done.merged


def test_the_last_scored_token_is_the_end_token():
    for template, end in ((CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>"), (GEMMA, "<end_of_turn>"), (NO_END, "</s>")):
        made = tokenizer(template)
        completion = encoded(Demonstration(PROMPT, ANSWER), made).completions[0]
        assert made.convert_ids_to_tokens(int(completion.ids[-1])) == end
        assert completion.scored[-1]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, NO_END, None])
def test_a_sample_that_was_cut_gets_no_end_token_where_only_its_text_is_known(template):
    made, cut = tokenizer(template), SampledTokens(cut=True)
    for example in (
        Comparison(PROMPT, ANSWER, (says("It is 42, and"),), sampled=(SampledTokens(), cut)),
        Judgement(PROMPT, (says("It is 42, and"),), True, sampled=(cut,)),
        Scored(PROMPT, (says("It is 42, and"),), 1.0, cut=True),
    ):
        *ended, last = encoded(example, made).completions
        assert made.decode(last.ids).strip() == "It is 42, and"
        assert last.scored.all()
        assert all(made.decode(each.ids).strip() != "It is 42, and no more." for each in ended), "it has its end token"


def test_sampled_ids_are_kept_as_they_are_and_those_of_another_tokenizer_are_not():
    made = tokenizer()
    odd = made("It", add_special_tokens=False)["input_ids"] + made(" is 42", add_special_tokens=False)["input_ids"]
    odd[:1] = [token for letter in "It" for token in made(letter, add_special_tokens=False)["input_ids"]]
    own = SampledTokens(tuple(odd), vocabulary_of(made), cut=True)
    other = SampledTokens((*odd, made.convert_tokens_to_ids("<|im_end|>")), own.vocabulary)
    pair = Comparison(PROMPT, (says("It is 42"),), (says("It is 43"),), sampled=(other, own))
    done = encoded(pair, made)
    assert [each.ids.tolist() for each in done.completions] == [list(other.ids), list(own.ids)]
    assert all(each.scored.all() for each in done.completions)
    assert done.prompt.tolist() == fed(made, PROMPT)
    assert not done.tokenised_anew
    foreign = SampledTokens(own.ids, "another", cut=True)
    anew = encoded(Comparison(*(pair.prompt, pair.chosen, pair.rejected), sampled=(other, foreign)), made)
    assert anew.tokenised_anew
    assert [made.decode(each.ids) for each in anew.completions] == ["It is 42<|im_end|>", "It is 43"]


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, None])
def test_bos_comes_once_where_both_template_and_tokenizer_would_add_it(template):
    made = tokenizer(template, bos=True)
    done = encoded(Demonstration(PROMPT, ANSWER), made)
    assert [*done.prompt, *done.completions[0].ids].count(made.bos_token_id) == 1
    assert done.prompt[0] == made.bos_token_id


@pytest.mark.parametrize("style", ["bytes", "prefix", "spm", "unigram"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, THINKING, NO_END])
def test_tokenising_from_the_last_special_token_gives_the_ids_of_the_whole_text(style, template):
    made = tokenizer(template, style=style)
    turns = (turn("system", " Be brief. "), user("one  two"), says("three "), user("  What is 12 + 30?\n"))
    examples = [(Comparison(turns, (says("\n\n It is 42"),), (says(word),)), "") for word in ("no more", " no more", "a", "<b>")]
    fast = Encoder(made, max_length=1000, truncation="drop")
    slow = Encoder(made, max_length=1000, truncation="drop")
    slow._seams = any_of([])
    for one, other in zip(fast.encode(examples), slow.encode(examples), strict=True):
        assert isinstance(one, Encoded)
        assert isinstance(other, Encoded)
        assert one.prompt.tolist() == other.prompt.tolist()
        assert [c.ids.tolist() for c in one.completions] == [c.ids.tolist() for c in other.completions]


def test_a_completion_that_would_merge_with_its_prompt_is_tokenised_apart_and_counted():
    joining = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '' }}{% endif %}"
    made = tokenizer(joining)
    whole = made("Answer", add_special_tokens=False)["input_ids"]
    apart = made("Answ", add_special_tokens=False)["input_ids"]
    assert whole[: len(apart)] != apart, "this test needs a prompt whose ids are no prefix of the whole"
    done = encoded(Comparison((user("Answ"),), (says("er the question"),), (says(" no more"),)), made)
    assert done.merged
    assert done.prompt.tolist() == apart
    assert made.decode(done.completions[0].ids) == "er the question</s>"
    assert made.decode(done.completions[1].ids) == " no more</s>"


def test_only_tokens_of_assistant_turns_are_scored():
    made = tokenizer()
    talk = (says("one two"), user("And what is 12 + 30?"), says("It is 42, and no more."))
    completion = encoded(Demonstration(PROMPT, talk), made).completions[0]
    assert made.decode(completion.ids[completion.scored]) == "one two<|im_end|>It is 42, and no more.<|im_end|>"
    assert (
        made.decode(completion.ids[~completion.scored])
        == "\n<|im_start|>user\nAnd what is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_scored_turns_are_found_where_the_first_completion_was_tokenised_apart():
    joining = "{% for m in messages %}{{ m['content'] + ('' if m['role'] == 'user' else '</s>') }}{% endfor %}"
    made = tokenizer(joining)
    done = encoded(Demonstration((user("Answ"),), (says("er one"), user("What is"), says(" five"))), made)
    assert done.merged
    completion = done.completions[0]
    assert made.decode(completion.ids[~completion.scored]) == "What is"


def test_a_later_scored_turn_that_begins_within_a_token_is_counted():
    joining = "{% for m in messages %}{{ m['content'] + ('' if m['role'] == 'user' else '</s>') }}{% endfor %}"
    for asked, said, is_within in (("Answ", "er two", True), ("Answer", " two", False)):
        turns = (says("one"), user(asked), says(said))
        done = encoded(Demonstration((user("What?"),), turns), tokenizer(joining))
        assert (WITHIN_TOKEN in done.notes) == is_within
        completion = done.completions[0]
        text = tokenizer(joining).decode(completion.ids[completion.scored])
        assert text == "one</s> two</s>"


def test_after_an_empty_prompt_the_first_token_is_not_counted_as_scored():
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    done = encoded(Demonstration((user(""),), (says("one two"),)), tokenizer(bare))
    assert len(done.prompt) == 0
    completion = done.completions[0]
    assert completion.scored.tolist() == [False] + [True] * (len(completion.ids) - 1)
    assert len(pack([(done.prompt, completion)]).targets) == completion.scored.sum()


def test_a_row_over_max_length_is_dropped_whole_by_default():
    pair = Comparison(PROMPT, ANSWER, (says("no " * 50),))
    length = encoded(pair).length
    assert encode(pair, max_length=length - 1) == TOO_LONG
    assert encode(Comparison(PROMPT, pair.rejected, ANSWER), max_length=length - 1) == TOO_LONG, "whichever is too long"
    assert isinstance(encode(Demonstration(PROMPT, ANSWER), max_length=length - 1), Encoded)
    assert isinstance(encode(pair, max_length=length), Encoded)
    assert encode(pair, max_length=len(encoded(pair).prompt)) == PROMPT_TOO_LONG


def test_error_names_the_row_and_its_length():
    length = encoded(Demonstration(PROMPT, ANSWER)).length
    with pytest.raises(UserError, match=rf"a\.jsonl:7: {length} tokens.*max_length is 20"):
        encode(Demonstration(PROMPT, ANSWER), max_length=20, truncation="error")


HISTORY = (
    turn("system", "Be brief."),
    user("one " * 9),
    says("two " * 9),
    user("three " * 9),
    says("four " * 9),
    user("What is 12 + 30?"),
)


def test_truncation_removes_the_oldest_turns_and_keeps_the_system_turn_and_the_last_question():
    made, row = tokenizer(), Demonstration(HISTORY, ANSWER)
    full = encoded(row, made).length
    once = encoded(row, made, max_length=full - 1, truncation="truncate")
    assert once.prompt.tolist() == fed(made, (HISTORY[0], *HISTORY[3:])), "as few turns as it takes, the first one the user's"
    twice = encoded(row, made, max_length=once.length - 1, truncation="truncate")
    assert twice.prompt.tolist() == fed(made, (HISTORY[0], HISTORY[5]))
    for done in (once, twice):
        assert done.cut_turns
        assert not done.cut_completions
        assert made.decode(done.completions[0].ids) == "It is 42, and no more.<|im_end|>"


def test_a_completion_that_still_does_not_fit_is_truncated_without_an_end_token():
    made, row = tokenizer(), Comparison(HISTORY, (says("It is " * 30),), ANSWER)
    shortest = fed(made, (HISTORY[0], HISTORY[5]))
    done = encoded(row, made, max_length=len(shortest) + 20, truncation="truncate")
    chosen, rejected = done.completions
    assert done.prompt.tolist() == shortest
    assert len(chosen.ids) == 20
    assert made.convert_tokens_to_ids("<|im_end|>") not in chosen.ids
    assert made.decode(rejected.ids) == "It is 42, and no more.<|im_end|>", "one that fits is left alone"
    assert done.cut_completions == 1


def test_a_prompt_that_cannot_be_shortened_is_dropped_with_its_row():
    made = tokenizer()
    alone = len(fed(made, (HISTORY[0], HISTORY[5])))
    assert encode(Demonstration(HISTORY, ANSWER), made, max_length=alone, truncation="truncate") == PROMPT_TOO_LONG
    done = encoded(Demonstration(HISTORY, ANSWER), made, max_length=alone + 1, truncation="truncate")
    assert len(done.completions[0].ids) == 1


def test_truncation_without_an_older_turn_only_cuts_the_completion():
    done = encoded(Demonstration(PROMPT, ANSWER), max_length=30, truncation="truncate")
    assert done.length == 30
    assert not done.cut_turns
    assert done.cut_completions == 1


def test_where_all_turns_are_scored_the_oldest_of_them_are_removed_too():
    made = tokenizer()
    row = Demonstration(HISTORY[:2], (*HISTORY[2:], *ANSWER))
    full = encoded(row, made).length
    done = encoded(row, made, max_length=full - 1, truncation="truncate")
    assert done.prompt.tolist() == fed(made, (HISTORY[0], HISTORY[3]))
    completion = done.completions[0]
    assert made.decode(completion.ids[completion.scored]) == "four " * 9 + "<|im_end|>It is 42, and no more.<|im_end|>"


def test_completions_that_differ_only_beyond_the_cut_make_no_pair():
    pair = Comparison(PROMPT, (says("no " * 50 + "one"),), (says("no " * 50 + "two"),))
    assert encode(pair, max_length=encoded(pair).length - 10, truncation="truncate") == EQUAL


def test_ids_and_marks_are_compact_arrays():
    done = encoded(Demonstration(PROMPT, ANSWER))
    assert done.prompt.dtype == done.completions[0].ids.dtype == np.int32
    assert done.completions[0].scored.dtype == bool


@pytest.mark.parametrize("style", ["bytes", "prefix", "spm", "unigram"])
def test_ids_are_those_of_the_tokenizers_own_call_whatever_it_was_used_for_before(style):
    texts = ["", " two  blanks ", "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n", "naïve façade, 東京 🙂\n\n", "x" * 300]
    made = tokenizer(CHATML, style=style)
    expected = made(texts, add_special_tokens=False)["input_ids"]
    encoder = Encoder(made, max_length=1000, truncation="drop")
    assert [tokens.ids for tokens in encoder._tokenise(texts)] == expected
    made(texts, truncation=True, max_length=3, padding="max_length")
    assert [tokens.ids for tokens in encoder._tokenise(texts)] == expected
    assert [tokens.ids for tokens in encoder._tokenise(texts, bounds=True)] == expected
    made.split_special_tokens = True
    split = made(texts, add_special_tokens=False)["input_ids"]
    assert split != expected
    assert [tokens.ids for tokens in encoder._tokenise(texts)] == split


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    made = tokenizer(CHATML)

    class Upper(type(made)):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus([each.upper() for each in text], *args, **kwargs)

    expected = made(["ABC"], add_special_tokens=False)["input_ids"]
    made.__class__ = Upper
    assert [tokens.ids for tokens in Encoder(made, max_length=9, truncation="drop")._tokenise(["abc"])] == expected
