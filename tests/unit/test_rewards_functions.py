"""Reward functions of the user's own: what they are given, what they may return, and how they
fail.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from data.question import MediaRef, Question, Turn
from tests.support.zone_builders import group, rollout
from zppo_mm.config.load import load_config
from zppo_mm.errors import ConfigError, GradingError
from zppo_mm.observability.rollout_metrics import group_metrics
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rewards.failures import MIN_GRADED, FailureCheck, WatchedFunctions
from zppo_mm.rewards.function_process import BadReturn, read_reward
from zppo_mm.rewards.function_source import source_digest, source_file
from zppo_mm.rewards.verify import Verifier
from zppo_mm.run.judging import build_grading
from zppo_mm.run.resume import warn_of_edited_functions
from zppo_mm.zone.replay import ReplayBuffer

T = TypeVar("T")
FILE = str(Path(__file__).parents[1] / "support/reward_functions.py")
FUNCTIONS = {"words": f"{FILE}:overlap", "parts": f"{FILE}:parts", "stated": f"{FILE}:stated"}
LIMIT_SECONDS = 1.0


def question(answer_type: str, answer: str = "red green", metadata: str = "") -> Question:
    image = MediaRef("image", "s.tar", "0", "png")
    return Question("q7", "Which?", (image,), answer, answer_type, metadata=metadata)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(LIMIT_SECONDS, num_workers=1, functions=FUNCTIONS) as made:
        yield made


def test_a_number_is_the_reward_and_rules_grade_the_rest(verifier: Verifier) -> None:
    items = [
        (question("words"), "so \\boxed{green red}"),
        (question("math", "5"), "\\boxed{5}"),
        (question("words"), "\\boxed{red}"),
        (question("words"), "red green, without a box"),
        (question("math", "5"), "\\boxed{6}"),
    ]
    verdicts = verifier.verify_all(items)
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert [verdict.parsed for verdict in verdicts] == ["green red", "5", "red", None, "6"]
    assert [verdict.parts for verdict in verdicts] == [{}] * 5


def test_parts_make_a_weighted_mean_and_are_kept(verifier: Verifier) -> None:
    right, wrong = verifier.verify_all(
        [(question("parts", "A"), "\\boxed{A}"), (question("parts", "B"), "\\boxed{A}")]
    )
    brief = 1 - 9 / 100
    assert right.parts == {"accuracy": 1.0, "brief": brief, "length": 9 / 1000}
    assert right.reward == pytest.approx((3 * 1 + 1 * brief) / 4, abs=1e-15)
    assert wrong.reward == pytest.approx(brief / 4, abs=1e-15)


def test_a_function_is_given_question_response_answer_and_metadata(verifier: Verifier) -> None:
    metadata = json.dumps({"box": [1, 2.5], "name": "é"})
    earlier = (Turn("system", "Hi"), Turn("user", "é?"))
    asked = replace(question("stated", "gold", metadata), earlier=earlier)
    for claim in (
        "metadata == {'box': [1, 2.5], 'name': 'é'}",
        "question.answer == 'gold' and question.id == 'q7' and question.text == 'Which?'",
        "parsed == 'x y'  # \\boxed{x y}",
        "question.media == () and question.choices == ()",
        "[turn.role for turn in question.earlier] == ['system', 'user']",
        "question.earlier[1].text == 'é?'",
    ):
        assert verifier.verify(asked, claim).reward == 1, claim
    assert verifier.verify(replace(asked, metadata=""), "metadata is None").reward == 1


FAILURES = {
    "1 / 0": "ZeroDivisionError: division by zero",
    "float('nan')": "returned nan for it, expected a number from 0 to 1",
    "1.5": "returned 1.5 for it, expected a number from 0 to 1",
    "-0.1": "returned -0.1 for it",
    "None": "returned NoneType None for it, expected a number, or named parts",
    "'1'": "returned str '1' for it",
    "{'accuracy': 2}": "returned 2.0 for accuracy",
    "{'a b': 1}": "returned a part named 'a b'",
    "{'accuracy': (1, -1)}": "returned -1.0 as the weight of accuracy",
    "{'accuracy': (1, 0)}": "returned parts without any weight",
    "sys.exit(0)": "SystemExit: 0",
    "os._exit(3)": "the grading ended its process with code 3",
    "os.kill(os.getpid(), 9)": "the grading ended its process with code -9",
}


@pytest.mark.parametrize("response", FAILURES)
def test_a_failure_is_ungraded_counted_and_named(
    verifier: Verifier, caplog: pytest.LogCaptureFixture, response: str
) -> None:
    verifier.functions._known_failures.clear()
    before = verifier.functions.num_errors
    with caplog.at_level(logging.WARNING):
        verdicts = verifier.verify_all(
            [(question("stated"), text) for text in (response, f"{response} ", "1")]
        )
    assert [verdict.reward for verdict in verdicts] == [None, None, 1.0]
    assert verdicts[0].reason == "error"
    assert verifier.functions.num_errors == before + 2
    (record,) = caplog.records  # once per kind
    assert f"reward.functions.stated: {FAILURES[response]}" in record.message
    assert "question 'q7'" in record.message


def test_an_error_names_the_line_of_the_users_file(
    verifier: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    verifier.verify(question("words", ""), "\\boxed{red}")
    lines = Path(FILE).read_text().splitlines()
    number = next(index for index, line in enumerate(lines, 1) if "/ len(words)" in line)
    assert f"division by zero (reward_functions.py:{number})" in caplog.text


def test_a_call_that_never_ends_is_a_timeout(
    verifier: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    before = verifier.num_timeouts
    verdicts = verifier.verify_all(
        [(question("stated"), "sum(1 for _ in iter(int, 1))"), (question("stated"), "0.25")]
    )
    assert [(verdict.reward, verdict.reason) for verdict in verdicts] == [
        (None, "timeout"),
        (0.25, "function"),
    ]
    assert verifier.num_timeouts == before + 1
    assert "reward.functions.stated: no verdict within 1 s of processor time" in caplog.text


def test_the_judge_is_not_asked_about_what_a_function_grades() -> None:
    class NoJudge:
        def judge(self, items: object) -> list[bool | None]:
            raise AssertionError(items)

    functions = {**FUNCTIONS, "open": f"{FILE}:overlap", "math": f"{FILE}:overlap"}
    with Verifier(judge=NoJudge(), judge_mode="fallback", functions=functions) as verifier:
        kinds = ("open", "math", "words")
        assert all(verifier.can_grade(question(kind)) for kind in kinds)
        verdicts = verifier.verify_all([(question(kind), "\\boxed{red}") for kind in kinds])
        assert [verdict.reward for verdict in verdicts] == [0.5] * 3
    with Verifier() as none:
        assert not none.can_grade(question("words"))
        with pytest.raises(ConfigError, match=r"'words' and there is no such reward.*reward.funct"):
            none.verify(question("words"), "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", r"words: ModuleNotFoundError: No module named 'no_such_module'"),
        ("no/such/file.py:f", r"words: FileNotFoundError: no such file no/such/file.py"),
        (f"{FILE}:f", r"words: AttributeError: .*'reward_functions' has no attribute 'f'"),
        (f"{FILE}:NUMBER", r"words: TypeError: 3 is not a callable object"),
        (
            f"{FILE}:needs_nothing",
            r"words: TypeError: .*unexpected keyword argument 'question': it is called with q",
        ),
        ("{tmp}/raises.py:f", r"words: ValueError: not today \(raises.py:2\)"),
        ("{tmp}/exits.py:f", r"words: SystemExit: 3"),
        ("{tmp}/broken.py:f", r"words: SyntaxError: "),
    ],
)
def test_what_cannot_be_imported_or_called_is_an_error_at_the_start(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "raises.py").write_text("\nraise ValueError('not today')\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    name = name.replace("{tmp}", str(tmp_path))
    with (
        Verifier(functions={"words": name}) as verifier,
        pytest.raises(ConfigError, match=f"reward.functions.{message}.*expected module:function"),
    ):
        verifier.functions.start()


class OtherReplica(SingleProcess):
    """Another replica's leader, whose machine lacks the file, comes to the exchange too."""

    num_replicas = 2

    def gather(self, local: Sequence[T]) -> list[list[T]]:
        return [list(local), ["reward.functions.words: no such file"]]  # type: ignore[list-item]


def test_every_rank_ends_at_the_start_if_one_cannot_import() -> None:
    config = load_config(None, [f"reward.functions.words={FILE}:overlap"])
    grading = build_grading(config, None, SingleProcess(), ["never"])
    assert grading.verifier.verify(question("words"), "\\boxed{red}").reward == 0.5
    grading.check()
    grading.verifier.close()
    with pytest.raises(ConfigError, match=r"words: no such file"):
        build_grading(config, None, OtherReplica(), ["never"])
    config = load_config(None, [f"reward.functions.words={FILE}:giou"])
    with pytest.raises(ConfigError, match=r"words: AttributeError: .* no attribute 'giou'"):
        build_grading(config, None, SingleProcess(), ["never"])


@pytest.mark.parametrize("name", ["iou", "reward.py:", "reward.py:3d", ":iou"])
def test_a_name_that_is_none_is_refused_in_the_configuration(name: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.functions\.box: names no function, got"):
        load_config(None, [f"reward.functions.box='{name}'"])
    with pytest.raises(ConfigError, match=r"no name of an answer type, got 'my box'"):
        load_config(None, ["reward.functions={my box: a:b}"])
    config = load_config(None, ["reward.functions.box=a.b:c.d", "reward.functions.math=m.py:f"])
    assert config.reward.answer_types == ("math", "choice", "open", "box")


NEARLY_ONE = 0.7 + 0.2 + 0.1  # 0.9999999999999999 in floating point


@pytest.mark.parametrize(
    "number",
    [1, True, 1.0, np.float32(1), np.int64(1), np.bool_(True), NEARLY_ONE, 1.0000000000000002],
)
def test_any_real_number_is_a_reward(number: object) -> None:
    assert read_reward(number) == (1.0, {})
    assert read_reward({"accuracy": number}) == (1.0, {"accuracy": 1.0})


def test_what_is_close_to_a_bound_is_the_bound() -> None:
    assert [read_reward(each)[0] for each in (-1e-9, 1e-9, 1e-3, 0.999)] == [0, 0, 1e-3, 0.999]
    with pytest.raises(BadReturn, match=r"returned 1\.00001 for it"):
        read_reward(1.00001)


def test_huge_weights_are_weights() -> None:
    """Their sum is more than a float holds."""
    assert read_reward({"a": (1, 1e308), "b": (0, 1e308)})[0] == 0.5


def test_full_parts_are_a_full_reward_whatever_their_weights() -> None:
    for weights in ((0.1, 0.2, 0.7), (1e-9, 3.3, 1e9), (1 / 3, 1 / 7, 1 / 11)):
        reward, _ = read_reward({name: (1, w) for name, w in zip("abc", weights, strict=True)})
        assert reward == 1
    with pytest.raises(BadReturn, match="weight of a"):
        read_reward({"a": (1, math.inf)})


def test_a_response_without_the_accuracy_that_others_have_is_a_failure(
    verifier: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    verifier.functions._known_failures.clear()
    with Verifier(LIMIT_SECONDS, num_workers=1, functions=FUNCTIONS) as own:
        texts = ("{'brief': 1.0}", "{'accuracy': 0, 'brief': 1.0}", "0.9", "1 / 0")
        verdicts = own.verify_all([(question("stated"), text) for text in texts])
        assert [verdict.reward for verdict in verdicts] == [None, 0.5, None, None]
        assert (own.functions.num_errors, own.functions.num_calls) == (3, 4)
        assert own.verify(question("stated"), "1.0").reason == "error"  # in later calls too
        assert own.verify(question("words"), "\\boxed{red}").reward == 0.5
    assert "reward.functions.stated: returned no part accuracy" in caplog.text


def test_a_function_that_reads_standard_input_takes_no_request(verifier: Verifier) -> None:
    child = "__import__('subprocess').run(['cat'], capture_output=True, timeout=9).stdout == b''"
    asked = [(question("stated"), text) for text in ("sys.stdin.read() == ''", child, "0.25")]
    assert [verdict.reward for verdict in verifier.verify_all(asked)] == [1, 1, 0.25]


def test_a_file_that_is_edited_during_the_run_is_refused(tmp_path: Path) -> None:
    """Workers start later too, and would give other rewards."""
    path = tmp_path / "own.py"
    path.write_text("def f(**others):\n    return 0.25\n")
    with Verifier(LIMIT_SECONDS, 1, functions={"words": f"{path}:f"}) as own:
        own.functions.start()
        path.write_text("def f(**others):\n    return 0.75\n")
        assert own.verify(question("words"), "a").reward == 0.25
        own.functions.close()
        message = r"functions\.words: SourceChanged: the file was changed during the run, got"
        with pytest.raises(ConfigError, match=message) as caught:
            own.verify(question("words"), "b")
    assert "math-verify" not in str(caught.value)


def test_an_edit_of_a_module_is_seen_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ValueError('imported')\n")
    (package / "inner.py").write_text("a = 1\n")
    for name in (f"{package}/inner.py:f", "own_package.inner:f", "own_package:f"):
        monkeypatch.chdir(tmp_path)
        here = source_file(name)
        monkeypatch.chdir("/")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert here is not None
        assert source_file(name) == here
    before = source_digest("own_package.inner:f")
    assert before == source_digest(f"{package}/inner.py:f") != ""
    (package / "inner.py").write_text("a = 2\n")
    assert source_digest("own_package.inner:f") not in (before, "")
    assert source_digest("no_such_module.inner:f") == source_digest("sys:exit") == ""


def test_resuming_warns_of_an_edited_function(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_edited_functions({"box": "a", "words": "b"}, {"box": "a", "words": "c", "new": "d"})
    (record,) = caplog.records
    assert "reward.functions.words: the file of the function was changed since" in record.message


def test_partial_credit_is_no_correct_answer() -> None:
    """Hardness and candidates go by the accuracy part; advantages by the reward."""
    plain = rollout("x", "x", 0.9)
    exact = replace(plain, reward=0.4, parts={"accuracy": 1.0, "brief": 0.1})
    close = replace(plain, parts={"accuracy": 0.5, "brief": 1.0})
    assert [each.is_correct for each in (exact, close, plain)] == [True, False, False]
    made = replace(group("q", [0.0]), rollouts=(exact, close, plain))
    assert made.accuracy == pytest.approx((1 + 0.5 + 0.9) / 3)
    assert made.rewards_differ
    buffer = ReplayBuffer(4)
    buffer.update([made], 0.9, 1)
    (entry,) = buffer.entries()
    assert (entry.accuracy_at_admission, entry.last_accuracy) == (2 / 3, made.accuracy)
    values = group_metrics([made], 0.5).values()
    assert values["accuracy/plain"] == pytest.approx(made.accuracy)
    assert values["reward/mean"] == pytest.approx((0.4 + 0.9 + 0.9) / 3)
    assert values["reward/part/accuracy"] == 0.75
    assert values["batch/hard"] == 0


def test_a_function_that_mostly_fails_ends_the_run() -> None:
    with Verifier(LIMIT_SECONDS, functions=FUNCTIONS) as verifier:
        check = FailureCheck(WatchedFunctions(verifier.functions), 0.25, SingleProcess().gather)
        asked = question("stated")
        verifier.verify_all([(asked, f"1 if {number} > 5 else None") for number in range(19)])
        check()  # too few to say anything
        verifier.verify(asked, "1")
        with pytest.raises(
            GradingError,
            match=rf"functions: too many calls fail, got 6 of {MIN_GRADED} \(30%\), such as "
            "stated: returned NoneType",
        ):
            check()
