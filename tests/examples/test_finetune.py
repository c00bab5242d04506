"""Fine-tuning on pairs: masks and packing, the script in miniature, resume. All tiny."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from finetune import chat_data, finetune_llama, prompts, solve
from finetune.chat_data import Example
from finetune.flags import parse_args
from helpers.files import GOLDEN
from llama.loading import load_hf
from llama.model import Llama, LlamaConfig
from train import log as train_log
from train.checkpoints import OtherRunError

BASE = GOLDEN / "llama_type1" / "base"
PLACE = jax.devices()[0]


def random_examples(count):
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(3, 128, rng.integers(1, 9)).tolist()
    return [Example(draw(), [*draw(), 2]) for _ in range(count)]


def test_rows_hold_each_pair_once_and_learn_its_response_alone():
    examples = random_examples(40)
    rows = chat_data.pack([*examples, Example([3] * 30, [2])], 23, packing=True)
    assert len(rows.tokens) < 40 / 2
    found = []
    for tokens, segments, response in zip(*rows[:3], strict=True):
        for segment in range(1, segments.max() + 1):
            own, learned = tokens[segments == segment], response[segments == segment]
            found.append(Example(own[~learned].tolist(), own[learned].tolist()))
            assert (np.diff(learned.astype(int)) >= 0).all()  # the response ends the pair
        assert not response[segments == 0].any()
    assert sorted(found) == sorted(examples)
    with pytest.raises(ValueError, match="none of 1 pairs fits into a row of 3 tokens"):
        chat_data.pack([Example([3, 4], [5, 6, 2])], 3, packing=True)


def test_packed_loss_and_gradient_are_those_of_padded_rows_however_cut():
    config, params = load_hf(BASE)
    model, examples = Llama(config), random_examples(12)
    packed = chat_data.pack(examples, 40, packing=True)
    assert packed.segments.max() > 2
    index = np.where(np.arange(6) < len(packed.tokens), np.arange(6), -1).reshape(2, 3)
    batch = chat_data.make_batch(packed, index, PLACE, packed.response.sum())
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda params, x: chat_data.response_loss(model, params, x))
    )
    parts = [value_and_grad(params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in (0, 1)]
    summed = jax.tree.map(jnp.add, *parts)

    # The oracle knows nothing of segments: padding on the right changes nothing on its left.
    padded = chat_data.pack(examples, 17, packing=False)

    @jax.jit
    @jax.value_and_grad
    def oracle(params):
        logits = model.apply({"params": params}, padded.tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, padded.tokens[:, 1:])
        return losses.mean(where=padded.response[:, 1:])

    wanted = oracle(params)
    np.testing.assert_allclose(summed[0], wanted[0], rtol=1e-5)
    chex.assert_trees_all_close(summed[1], wanted[1], rtol=1e-4, atol=1e-6)
    alone = chat_data.make_batch(padded, np.arange(12), PLACE, padded.response.sum())
    assert alone.segments is None
    np.testing.assert_allclose(value_and_grad(params, alone)[0], wanted[0], rtol=1e-5)
    with pytest.raises(ValueError, match="neither a mask nor a cache"):
        model.apply({"params": params}, index, mask=index > 0, segments=index)


@pytest.mark.parametrize(
    ("text", "exact", "last"),
    [
        ("... = 1,234\n#### 1,234", True, True),
        ("#### $1234.00.", True, True),
        ("The answer is 1234.", False, True),
        ("#### 12345", False, False),
        ("#### 1234 or 7", False, False),
        ("no number", False, False),
    ],
)
def test_answers_are_read_off_texts(text, exact, last):
    assert solve.accuracy([text], ["so\n#### 1234"]) == {"exact": exact, "last_number": last}


def test_what_is_no_pair_is_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    for line in ('{"question": "?"}', "[]", "{", '{"question": "?", "answer": 7}'):
        path.write_text('{"question": "?", "answer": "!"}\n' + line)
        with pytest.raises(ValueError, match=r"pairs.jsonl, line 2: wanted"):
            prompts.read_pairs(path, "question", "answer")
    with pytest.raises(ValueError, match=r"no <\|im_start\|>.*--template"):
        prompts.make_template(None, ["<s>"])
    with pytest.raises(ValueError, match=r"has no \{prompt\} in it"):
        prompts.make_template("Q:", [])


def test_a_model_that_the_run_would_delete_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model", str(tmp_path / "merged"), "--out", str(tmp_path)])
    assert "wanted another --out" in capsys.readouterr().err


@pytest.fixture
def flags(tmp_path):
    """A model of 128 tokens, 20 sums to train on and 4 of them to be answered."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(BASE / "config.json", folder)
    tensors = load_file(BASE / "model.safetensors")
    tensors["model.norm.weight"] *= 20  # random weights of its size give no logits worth learning
    save_file(tensors, folder / "model.safetensors")
    characters = {character: i for i, character in enumerate("?^$0123456789+=# ")}
    tokenizer = Tokenizer(models.BPE(characters, merges=[]))
    tokenizer.decoder = decoders.Fuse()  # else they come apart by spaces
    tokenizer.save(str(folder / "tokenizer.json"))
    pairs = [{"ask": f"{a}+{b}", "say": f"#### {a + b}"} for a in range(4) for b in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return ("--model", folder, "--data", tmp_path / "pairs.jsonl", "--test",
            tmp_path / "pairs.jsonl", "--prompt-field", "ask", "--response-field", "say",
            "--template", "{prompt}=", "--steps", 100, "--batch", 4, "--accumulate", 2,
            "--length", 40, "--lr", 3e-2, "--rank", 4, "--test-items", 4, "--test-batch", 3,
            "--new-tokens", 8, "--eval-every", 50, "--save-every", 20)  # fmt: skip


def run(out, *flags):
    return finetune_llama.finetune(parse_args([*map(str, (*flags, "--out", out))]))


@pytest.mark.slow
def test_the_script_in_miniature_goes_on_where_it_stopped(flags, tmp_path, capsys):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    summary = run(whole, *flags)
    first, last = summary["loss"]
    assert last < 0.2 * first
    assert summary["loss_merged"] == pytest.approx(last, rel=1e-3)
    before, after = summary["accuracy"]
    assert before["exact"] == 0.0
    assert after["exact"] >= 0.5  # what it says last hangs on roundings
    assert (whole / "adapters").is_dir()
    assert LlamaConfig.from_hf(load_hf(whole / "merged")[0].to_hf()) == load_hf(BASE)[0]
    assert (whole / "finetune.png").stat().st_size > 10_000
    answers = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    right = [row["after"] == row["response"] for row in answers]
    assert np.mean(right) == after["exact"]
    losses = [train_log.read(whole / name) for name in ("metrics.csv", "evaluations.csv")]
    assert [row["step"] for row in losses[1]] == ["0", "50", "100"]

    run(parted, *flags, "--stop-at", 50)
    capsys.readouterr()
    resumed = run(parted, *flags)
    assert "resumed at step 50" in capsys.readouterr().out
    assert resumed["steps"] == [50, 100]
    assert resumed["loss"] == summary["loss"]
    again = train_log.read(parted / "metrics.csv")
    assert [(x["step"], x["loss"]) for x in again] == [(x["step"], x["loss"]) for x in losses[0]]
    assert (parted / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()
    with pytest.raises(OtherRunError, match="packing: True there, False here"):
        run(parted, *flags, "--no-packing")
